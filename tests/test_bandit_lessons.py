"""benchmarks/bandit_lessons.py: winners, sampled gradients, rankings, paths and ratings against brute force, loops
and enumeration; then its tables, its picture and what it refuses.
"""

import contextlib
import io
import itertools
import json
import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT
from test_bandit import SMALL, fitted, noise, seeded, tensor, votes_of, written

import bandit_bt as bt
import bandit_lessons as lessons


# ---- Elections ----


def brute_winners(P):
    K = len(P)
    others = [[b for b in range(K) if b != a] for a in range(K)]
    copeland = [sum(P[a][b] > 0.5 for b in others[a]) for a in range(K)]
    borda = [math.fsum(P[a][b] for b in others[a]) for a in range(K)]
    return {"Condorcet": [a for a in range(K) if all(P[a][b] >= 0.5 for b in others[a])],
            "Copeland": [a for a in range(K) if copeland[a] == max(copeland)],
            "Borda": [a for a in range(K) if borda[a] > max(borda) - 1e-9]}  # fmt: skip


def test_winners_by_brute_force():
    generator, differ = seeded(41), 0
    for k in range(300):
        K = 2 + k % 5
        P = torch.full((K, K), 0.5).double()
        for a, b in itertools.combinations(range(K), 2):
            P[a, b] = int(torch.randint(11, (1,), generator=generator)) / 10  # ties among them
            P[b, a] = 1 - P[a, b]
        P.diagonal().copy_(torch.rand(K, generator=generator))  # an arm against itself does not count
        found = lessons.winners(P)
        assert found == brute_winners(P.tolist())
        differ += found["Copeland"] != found["Borda"]
    assert differ > 50


def test_winners_agree_under_bradley_terry():
    for seed in range(200):
        r = noise(2 + seed % 9, seed=seed)
        assert set(map(tuple, lessons.winners(torch.sigmoid(r[:, None] - r)).values())) == {(int(r.argmax()),)}
    assert lessons.winners(torch.sigmoid(torch.zeros(3, 3))) == dict.fromkeys(("Condorcet", "Copeland", "Borda"), [0, 1, 2])


def test_cyclic_example_has_three_answers():
    assert (lessons.CYCLE + lessons.CYCLE.T - 1).abs().max() < 1e-6
    assert lessons.winners(lessons.CYCLE) == {"Condorcet": [], "Copeland": [0, 2], "Borda": [3]}
    assert lessons.winners(lessons.CYCLE) == brute_winners(lessons.CYCLE.double().mul(10).round().div(10).tolist())


def test_no_rewards_fit_the_cyclic_example():
    """It is far from logit p_ik = logit p_ij + logit p_jk, which Bradley-Terry implies."""
    logits = lessons.CYCLE.double().logit()
    assert (logits[:, :, None] + logits[None] - logits[:, None]).abs().max() > 1
    pairs = list(itertools.combinations(range(4), 2))
    found = fitted(votes_of([(a, b, lessons.CYCLE[a, b].item(), 10) for a, b in pairs]), 4)
    assert max(abs(torch.sigmoid(found[a] - found[b]) - lessons.CYCLE[a, b]).item() for a, b in pairs) > 0.1


# ---- Samples ----


def enumerated_gradient(logits, r, ref, beta):
    """Of -J by autograd, a sum over arms: without a sample and without an advantage."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(-bt.objective(logits.log_softmax(0), r, ref, beta), logits)[0]


def sampled_gradient(logits, drawn, r, ref, beta):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(lessons.reinforce_loss(logits, drawn, r, ref, beta), logits)[0]


def test_reinforce_on_a_sample_that_is_the_policy():
    """Each arm drawn as often as pi has it: the sampled gradient is the enumerated one, of J and of policy_loss."""
    r, ref, logits = noise(4, seed=58), noise(4, seed=59).log_softmax(0), tensor(0.1, 0.2, 0.3, 0.4).log()
    drawn = torch.arange(4).repeat_interleave(torch.tensor([1, 2, 3, 4]))
    found = sampled_gradient(logits, drawn, r, ref, 0.4)
    assert (found - enumerated_gradient(logits, r, ref, 0.4)).abs().max() < 1e-12
    x = logits.clone().requires_grad_()
    bt.policy_loss(x.log_softmax(0), logits.log_softmax(0), r, ref, 0.4).backward()
    assert (found - x.grad).abs().max() < 1e-12 and x.grad.norm() > 0.1


def test_reinforce_by_loops():
    """-1/N sum of A (e_drawn - pi), A the penalized reward less the mean of the samples."""
    r, ref, logits = noise(5, seed=60), noise(5, seed=61).log_softmax(0), noise(5, seed=62)
    drawn, p = torch.tensor([4, 0, 0, 2, 3, 1, 4]), logits.softmax(0).tolist()
    rewards = [(r[k] - 0.3 * math.log(p[k]) + 0.3 * ref[k]).item() for k in drawn.tolist()]
    want = [0.0] * 5
    for k, reward in zip(drawn.tolist(), rewards):
        for arm in range(5):
            want[arm] -= (reward - sum(rewards) / 7) * ((arm == k) - p[arm]) / 7
    assert sampled_gradient(logits, drawn, r, ref, 0.3).tolist() == pytest.approx(want, abs=1e-12)


def test_reinforce_is_unbiased_but_for_its_baseline():
    """The mean over all K^N samples of N = 4 arms, weighted by their probability, is (N - 1) / N of -J's gradient."""
    r, ref, logits = noise(3, seed=63), noise(3, seed=64).log_softmax(0), noise(3, seed=65)
    logp, mean = logits.log_softmax(0), torch.zeros(3).double()
    for arms in itertools.product(range(3), repeat=4):
        drawn = torch.tensor(arms)
        mean += logp[drawn].sum().exp() * sampled_gradient(logits, drawn, r, ref, 0.5)
    assert (mean - 0.75 * enumerated_gradient(logits, r, ref, 0.5)).abs().max() < 1e-12


def test_errors_of_the_sampled_gradient():
    """Of sizes that the variance of A (e_k - pi) predicts, the largest of 6 below 4.5 of them: 1 / sqrt(samples)."""
    r, ref, p = noise(6, seed=66), noise(6, seed=67).log_softmax(0), torch.full((6,), 1 / 6).double()
    A = r - 0.5 * (p.log() - ref)
    A = A - p @ A
    single = A[:, None] * (torch.eye(6) - p)  # (drawn arm, coordinate)
    spread = (p @ single.square() - (p @ single).square()).sqrt().max().item()
    errors = lessons.reinforce_errors(r, ref, 0.5, seeded(68))
    assert list(errors) == [100, 10_000, 1_000_000]
    for number, error in errors.items():
        assert 0.1 < error * math.sqrt(number) / spread < 4.5


# ---- Rankings ----


def test_rankings_of_two_are_comparisons():
    r, rankings = noise(5, seed=51), torch.tensor([[0, 1], [3, 2], [4, 0], [0, 4]])
    votes = votes_of([(a, b, 1) for a, b in rankings.tolist()])
    assert lessons.ranking_loss(r, rankings).item() == pytest.approx(bt.bt_loss(r, *votes).item(), abs=1e-14)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_probabilities_of_all_rankings_sum_to_1(K):
    r = 2 * noise(K, seed=52)
    rankings = torch.tensor(list(itertools.permutations(range(K))))
    p = torch.stack([(-lessons.ranking_loss(r, ranking[None])).exp() for ranking in rankings])
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    first = torch.stack([p[rankings[:, 0] == k].sum() for k in range(K)])  # the best of all: a softmax
    assert (first - torch.softmax(r, 0)).abs().max() < 1e-12
    before = (rankings == 0).int().argmax(1) < (rankings == 1).int().argmax(1)  # of any two: Bradley-Terry
    assert p[before].sum().item() == pytest.approx(torch.sigmoid(r[0] - r[1]).item(), abs=1e-12)


def test_ranking_loss_by_loops_and_differences():
    r = noise(6, seed=53).requires_grad_()
    rankings = torch.stack([torch.randperm(6, generator=seeded(k))[:4] for k in range(7)])
    total = 0.0
    strength = r.detach().exp().tolist()
    for ranking in rankings.tolist():
        for k in range(4):
            total -= math.log(strength[ranking[k]] / sum(strength[arm] for arm in ranking[k:]))
    loss = lessons.ranking_loss(r, rankings)
    assert loss.item() == pytest.approx(total / 7, abs=1e-12)
    assert lessons.ranking_loss(r + 9, rankings).item() == pytest.approx(loss.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, r)
    for k in range(6):
        step = torch.zeros(6).double()
        step[k] = 1e-6
        slope = (lessons.ranking_loss(r + step, rankings) - lessons.ranking_loss(r - step, rankings)) / 2e-6
        assert slope.item() == pytest.approx(gradient[k].item(), abs=1e-8)


def test_drawn_rankings_are_plackett_luce():
    """Of four arms, the share of each of the 24 orders within 4.5 standard errors; of six, any four as often."""
    r, N = noise(4, seed=69), 50_000
    found = lessons.draw_rankings(r, N, seeded(70))
    place = 4 ** torch.arange(4)
    for order in itertools.permutations(range(4)):
        order = torch.tensor(order)
        p = (-lessons.ranking_loss(r, order[None])).exp().item()
        share = (found @ place == order @ place).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / N)
    found = lessons.draw_rankings(noise(6, seed=71), N, seeded(72))
    assert found.shape == (N, 4) and all(len(set(row)) == 4 for row in found[:100].tolist())
    assert (torch.bincount(found.flatten()) / N - 4 / 6).abs().max() < 4.5 * math.sqrt(2 / 9 / N)


# ---- Paths ----


def edges_of(path):
    return [lessons.EDGES.index((t, path[t], path[t + 1])) for t in range(3)]


BLIND = torch.stack(list(lessons.BLIND.values()))  # (5, 10)
DIFFERENCES = torch.stack([a - b for a, b in itertools.permutations(lessons.VISITS, 2)])  # (56, 10)


def test_blind_directions_are_the_null_space():
    """Five directions that no difference of paths shows, as many as there are: what is named is all there is."""
    assert len(set(lessons.PATHS)) == 8 and len(set(lessons.EDGES)) == 10
    for path, visits in zip(lessons.PATHS, lessons.VISITS):
        assert visits.nonzero()[:, 0].tolist() == sorted(edges_of(path))
    returns = lessons.VISITS @ BLIND.T  # (8, 5): each column one number
    assert torch.equal(returns, returns[:1].expand(8, 5))
    assert torch.linalg.matrix_rank(DIFFERENCES) == 5 and torch.linalg.matrix_rank(BLIND) == 5 == len(BLIND)


def test_blind_directions_do_what_their_names_say():
    """By the edges one by one; those of state 1 are made of them: all of a step, less all of the next, less state 0's."""
    for t in range(3):
        want = [float(step == t) for step, _, _ in lessons.EDGES]
        assert lessons.BLIND[f"+1 on every edge of step {t + 1}"].tolist() == want
    for t, name in ((0, "+1 on the edge into state 0 of step 1, -1 on both edges out of it"),
                    (1, "+1 on both edges into state 0 of step 2, -1 on both edges out of it")):  # fmt: skip
        want = [float((s, b) == (t, "0")) - float((s, a) == (t + 1, "0")) for s, a, b in lessons.EDGES]
        assert lessons.BLIND[name].tolist() == want
        assert [want.count(1), want.count(-1)] == [1 if "the edge into" in name else 2, 2]
        of_state_1 = tensor(*(float((s, b) == (t, "1")) - float((s, a) == (t + 1, "1")) for s, a, b in lessons.EDGES))
        assert torch.equal(of_state_1, lessons.on_step(t) - lessons.on_step(t + 1) - lessons.BLIND[name])
        returns = lessons.VISITS @ of_state_1
        assert torch.equal(returns, returns[:1].expand(8))


def test_paths_from_population_preferences():
    """Returns up to a constant, the shortest such w, and the gradient; P is a softmax of summed rewards."""
    for seed in range(5):
        w = noise(10, seed=seed)
        returns = lessons.VISITS @ w
        mu = tensor(*(torch.softmax(tensor(*pair), 0)[0] for pair in itertools.permutations(returns.tolist(), 2)))
        found = lessons.fit_trajectories(DIFFERENCES, mu)
        assert (DIFFERENCES @ (found - w)).abs().max() < 1e-6
        assert (BLIND @ found).abs().max() < 1e-9
        assert lessons.greedy(found) == lessons.greedy(w)


def test_paths_from_votes():
    generator = seeded(54)
    a, b = torch.randint(8, (2, 500), generator=generator)
    features = lessons.VISITS[a] - lessons.VISITS[b]
    mu = (torch.rand(500, generator=generator) < torch.sigmoid(features @ noise(10, seed=55))).double()
    w = lessons.fit_trajectories(features, mu).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ w, mu)
    assert torch.autograd.grad(loss, w)[0].norm() < 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_greedy_by_brute_force(seed):
    """From each state on, the best of all paths through it; the same whatever is added along blind directions."""
    w = noise(10, seed=seed)
    policy = lessons.greedy(w)
    assert set(policy) == {(0, "s")} | {(t, x) for t in (1, 2) for x in "01"}
    for (t, x), following in policy.items():
        rest = {path: sum(w[edge].item() for edge in edges_of(path)[t:]) for path in lessons.PATHS if path[t] == x}
        assert max(rest, key=rest.get)[t + 1] == following
    for direction, c in itertools.product(BLIND, (-20.0, 0.5, 20.0)):
        assert lessons.greedy(w + c * direction) == policy


# ---- Ratings ----


def test_ratings_need_a_common_scale_and_comparisons_do_not():
    r, generator = noise(8, seed=56), seeded(57)
    share = lambda *args: torch.tensor([lessons.order_recovered(r, *args, generator) for _ in range(40)]).mean(0)
    rated, compared = share(400, 1.0)
    assert 0.5 < rated < compared - 0.02
    rated, compared = share(20_000, 0.0)
    assert rated > 0.98 and compared > 0.98
    assert share(400, 0.0)[0] > share(400, 3.0)[0] + 0.05


# ---- The tables ----


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """(metrics, what the command leaves in the working folder and in --output, what it prints)."""
    folder = tmp_path_factory.mktemp("lessons")
    shown, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(error):
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["bandit_lessons.py", "--output", "lessons.json"])
        runpy.run_path(str(ROOT / "benchmarks" / "bandit_lessons.py"), run_name="__main__")
    assert error.getvalue() == "" and [x.name for x in folder.iterdir()] == ["lessons.json"]
    return json.loads((folder / "lessons.json").read_text())["metrics"], shown.getvalue()


def test_what_is_printed(tables):
    """The cyclic matrix itself; as many blind directions as are announced; every figure of the file."""
    metrics, text = tables
    lines = text.splitlines()
    matrix = [line.split() for line in lines[1:6]]
    assert matrix[0] == list("ABCD") and [row[0] for row in matrix[1:]] == list("ABCD")
    assert torch.equal(torch.tensor([[float(x) for x in row[1:]] for row in matrix[1:]]), lessons.CYCLE)
    assert "the cyclic example: Condorcet none; Copeland A, C; Borda D" in text
    assert "Bradley-Terry on the known rewards: Condorcet arm 1; Copeland arm 1; Borda arm 1" in text
    place = lines.index("   5 of 10 directions of the edges' rewards show; 5 do not:")
    assert [line.strip() for line in lines[place + 1 : place + 6]] == list(lessons.BLIND)
    assert not lines[place + 6].strip().startswith("+1") and metrics["directions_shown"] == 5
    for number in (100, 10_000, 1_000_000):
        error = metrics[f"reinforce_error/{number} samples"]
        assert f"{number:,} samples: largest difference {error:.5f}" in text
    assert f"root mean square error of the rewards {metrics['rmse_rankings']:.3f}" in text
    assert "the greedy policy is the best in every state: True" in text and metrics["greedy_is_best"]
    for labels, spread in itertools.product((100, 400), (0.0, 0.5, 1.0)):
        row = metrics[f"order_recovered/{labels} labels, spread {spread}"]
        assert [str(labels), str(spread), f"{row['rated']:.3f}", f"{row['compared']:.3f}"] in [x.split() for x in lines]
        assert 0.7 < row["rated"] < row["compared"] < 0.95


def test_greedy_is_best_only_if_it_is(tmp_path, monkeypatch, capsys):
    """As learned; upside down; and with the two edges out of any one state the other way round."""
    orders = [range(10), *([*range(k), k + 1, k, *range(k + 2, 10)] for k in range(0, 10, 2))]
    fit_trajectories = lessons.fit_trajectories
    monkeypatch.setattr(lessons, "reinforce_errors", lambda *_: {})  # the other tables, which take their time
    monkeypatch.setattr(lessons, "minimize", lambda loss, x: x)
    monkeypatch.setattr(lessons, "order_recovered", lambda *_: (0.5, 0.5))
    for sign, order in ((-1, orders[0]), *((1, order) for order in orders)):
        learn = lambda *inputs, sign=sign, order=order: sign * fit_trajectories(*inputs)[list(order)]
        monkeypatch.setattr(lessons, "fit_trajectories", learn)
        best = sign == 1 and order == orders[0]
        assert lessons.main(lessons.Args(output=str(tmp_path / "lessons.json")))["greedy_is_best"] is best
        assert f"the greedy policy is the best in every state: {best}\n" in capsys.readouterr().out


def test_committed_tables(tables):
    """benchmarks/results holds what the command writes."""
    committed = json.loads((ROOT / "benchmarks" / "results" / "bandit_lessons.json").read_text())["metrics"]
    assert list(committed) == list(tables[0])
    for name, value in tables[0].items():
        assert committed[name] == (value if type(value) in (str, bool) else pytest.approx(value, abs=1e-6)), name


def test_known_rewards_are_those_of_the_bandit(tables):
    r = bt.known_world(bt.Args())[2]
    assert tables[0]["known_rewards"] == pytest.approx((r - r.mean()).tolist(), abs=1e-12)
    assert tables[0]["rmse_rankings"] < 0.2


def refused(parts, capsys, **options):
    """main ends with exit code 2 and one line on stderr that holds all parts."""
    with pytest.raises(SystemExit) as stop:
        lessons.main(lessons.Args(**options))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize("options", [{"num_arms": 1}, {"seed": -1}, {"beta": 0.0}, {"beta": math.nan}, {"beta": math.inf}])
def test_flags_out_of_range(options, capsys):
    refused([f"--{name.replace('_', '-')}" for name in options], capsys, **options)


# ---- The picture ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs: known rewards; and votes whose names look like broken formulas, a reward outside its interval."""
    folder = tmp_path_factory.mktemp("runs")
    x, y = {"item_a": "x", "item_b": "$y_{$"}, {"item_a": "$y_{$", "item_b": "z"}
    votes = written(folder, [{**x, "wins_a": 3, "wins_b": 2}, {**y, "wins_a": 2, "wins_b": 4, "ties": 1}])
    for name, options in (("known", {}), ("votes", {"dataset": votes, "num_bootstrap": 1})):
        bt.main(bt.Args(output_dir=str(folder / name), **{**SMALL, **options}))
    return folder


@pytest.mark.parametrize("name", ["known", "votes"])
def test_picture(name, runs, monkeypatch):
    """The figure that is saved: fitted and true rewards, each method's point, the frontier through pi*'s; methods that
    reach the same point differ in size. Nothing else of the run is touched.
    """
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: [figures.append(self), save(self, *args, **options)])
    before = {x.name: x.read_bytes() for x in (runs / name).iterdir()}
    assert lessons.main(lessons.Args(picture=str(runs / name))) == {}
    after = {x.name: x.read_bytes() for x in (runs / name).iterdir()}
    assert after.pop("leaderboard.png")[:4] == b"\x89PNG" and after == before

    board, metrics = (json.loads(before[f"{x}.json"]) for x in ("leaderboard", "metrics"))
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == [row["arm"] for row in board]
    rewards = {line.get_label().split(",")[0]: list(line.get_xdata()) for line in left.lines}
    assert rewards["fitted"] == [row["reward"] for row in board]
    assert rewards.get("true") == ([row["true"] for row in board] if name == "known" else None)
    intervals = [(low, high) for (low, _), (high, _) in left.collections[0].get_segments()]
    rewards = [row["reward"] for row in board]
    ends = min(rewards) - 1, max(rewards) + 1  # of an interval without a bound
    bounds = [(row["low"], row["high"]) for row in board]
    assert intervals == [tuple(x if x is not None else end for x, end in zip(row, ends)) for row in bounds]

    frontier, *methods = right.lines
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in methods}
    assert points == {
        key[:-3]: (metrics[key], metrics[f"{key[:-3]}/expected_reward"])
        for key in metrics if key.endswith("/kl") and not key.startswith("pi")}  # fmt: skip
    assert len(points) == len({line.get_marker() for line in methods}) == 6
    together = [line.get_markersize() for line in methods[:4]]
    assert all(a - b >= 4 for a, b in itertools.pairwise(together))
    x, y = torch.tensor(frontier.get_xdata()), torch.tensor(frontier.get_ydata())  # from a small beta to a large one
    assert (x.diff() < 0).all() and (y.diff() < 0).all()
    k = int((x > metrics["pi*/kl"]).sum())
    share = (metrics["pi*/kl"] - x[k]) / (x[k - 1] - x[k])
    assert abs(y[k] + share * (y[k - 1] - y[k]) - metrics["pi*/expected_reward"]) < 2e-3
    assert right.get_title() == "policies at beta 0.5"


def test_picture_of_what_is_no_run(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    refused(["--picture", str(folder), "finished run"], capsys, picture=str(folder))
    folder.mkdir()
    for name in ("args.json", "metrics.json", "leaderboard.json"):
        (folder / name).write_text((runs / "known" / name).read_text())
    (folder / "leaderboard.json").write_text("[{}]")
    refused(["--picture", str(folder), "finished run", "arm"], capsys, picture=str(folder))
    (folder / "leaderboard.json").write_text("[{")
    refused(["--picture", str(folder), "finished run"], capsys, picture=str(folder))
    assert not (folder / "leaderboard.png").exists()


def test_picture_without_matplotlib(runs, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    refused(["--picture", "pip install matplotlib"], capsys, picture=str(runs / "known"))
