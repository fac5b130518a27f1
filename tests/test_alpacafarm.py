"""benchmarks/alpacafarm.py: the law of best-of-n and Quark's loss by enumeration, the rows that methods train on, the
judge beside frontier.py, a tiny run of everything, and the figures in the README.
"""

import contextlib
import importlib
import io
import itertools
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import alpacafarm
import frontier
import pytest
import torch
import tyro
from alpacafarm import Args, Quark, best_of_n_weights, quantiles, quark_losses
from common import load_prompts, read_rows, responses_of
from conftest import ROOT, make_model, noise
from make_world import ADJECTIVES, VERBS
from tiny_runs import read, without_pictures

FILE = ROOT / "benchmarks" / "results" / "alpacafarm.json"
TEXT = (ROOT / "benchmarks" / "README.md").read_text()

# ---- Best-of-n ----


def enumerated_law(scores, n):
    """Of the best of n draws from a list: all of them are looked at, ties decided by lot."""
    law = [0.0] * len(scores)
    draws = list(itertools.product(range(len(scores)), repeat=n))
    for draw in draws:
        best = max(scores[i] for i in draw)
        winners = [i for i in draw if scores[i] == best]
        for i in winners:
            law[i] += 1 / len(winners) / len(draws)
    return law


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0]])
def test_the_law_of_best_of_n(scores):
    for n in (1, 2, 4):
        got = best_of_n_weights(torch.tensor([scores], dtype=torch.float64), n)
        assert got[0].tolist() == pytest.approx(enumerated_law(scores, n), abs=1e-12)


def test_the_kl_of_best_of_n_is_below_its_bound():
    """log n - (n - 1) / n without ties and with many samples; less with ties; 0 if all are equal."""
    bound = math.log(16) - 15 / 16

    kl = lambda scores: alpacafarm.kl_of(best_of_n_weights(scores, 16))
    free = kl(noise(3, 4000))
    assert bound - 1e-4 < free < bound
    tied = kl(noise(3, 4000).round())
    assert 1 < tied < bound - 0.1
    assert kl(torch.ones(1, 50)) == pytest.approx(0, abs=1e-12)


def test_the_law_of_chosen_sides():
    """By all pairs of samples and all votes of two voters on each; pairs that they disagree on are left out."""
    rewards = noise(2, 4)
    got = alpacafarm.chosen_weights(rewards)
    for r, weights in zip(rewards.tolist(), got.tolist()):
        law = [0.0] * 4
        for a, b, first, second in itertools.product(range(4), range(4), (True, False), (True, False)):
            p = 1 / (1 + math.exp(r[b] - r[a]))
            chance = (p if first else 1 - p) * (p if second else 1 - p)
            if first and second:
                law[a] += chance
            elif not first and not second:
                law[b] += chance
        assert weights == pytest.approx([x / sum(law) for x in law], abs=1e-12)
    kl = sum(w * math.log(4 * w) for weights in got.tolist() for w in weights) / 2
    assert alpacafarm.kl_of(got) == pytest.approx(kl, abs=1e-12)


# ---- Quark ----


def test_parts_are_equal_and_the_worst_gets_the_rest():
    scores = torch.tensor([0.1, 0.9, 0.5, -3.0, 0.7, 0.2, 0.8])
    assert quantiles(scores, 3).tolist() == [2, 0, 1, 2, 1, 2, 0]
    assert quantiles(scores, 1).tolist() == [0] * 7


def test_quarks_loss_by_enumeration():
    """Token by token, over the whole vocabulary; the reference and the targets get no gradient."""
    logits, ref_logits = noise(4, 6).requires_grad_(), noise(4, 6, seed=1)
    targets = torch.tensor([0, 5, 2, 2])
    got = quark_losses(logits, ref_logits, targets, 0.3, 0.2)
    for n in range(4):
        p, q = ((x[n].exp() / x[n].exp().sum()).tolist() for x in (logits.detach(), ref_logits))
        kl = sum(p[v] * math.log(p[v] / q[v]) for v in range(6))
        entropy = -sum(p[v] * math.log(p[v]) for v in range(6))
        assert got[n].item() == pytest.approx(-math.log(p[targets[n]]) + 0.3 * kl - 0.2 * entropy, abs=1e-12)


def test_quarks_gradient_by_differences():
    """Of the mean loss in each logit."""
    logits, ref_logits, targets = noise(3, 5), noise(3, 5, seed=1), torch.tensor([4, 0, 1])
    loss = lambda x: quark_losses(x, ref_logits, targets, 0.3, 0.2).mean()
    x = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(x), x)
    for place in itertools.product(range(3), range(5)):
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        want = (loss(logits + step) - loss(logits - step)) / 2e-6
        assert got[place].item() == pytest.approx(want.item(), abs=1e-8)


def test_quarks_loss_keeps_the_reference_at_its_own_samples():
    """At pi = pi_ref, over tokens drawn from it, neither likelihood nor KL has a mean gradient: by all tokens."""
    logits = noise(1, 6).requires_grad_()
    p = logits.detach().softmax(-1)[0]
    losses = quark_losses(logits.expand(6, 6), logits.detach().expand(6, 6), torch.arange(6), 0.3, 0.0)
    (gradient,) = torch.autograd.grad((p * losses).sum(), logits)
    assert gradient.abs().max() < 1e-12


def test_logits_are_those_that_predict_the_responses(model):
    prompts, responses = [[5, 6, 7], [8, 9], [5, 6, 4, 3]], [[10, 11, 2], [12, 2], [13, 14, 15, 2]]
    got = alpacafarm.token_logits(model, prompts, responses).detach()
    want = []
    for prompt, response in zip(prompts, responses):
        logits = model(torch.tensor([prompt + response])).logits[0].detach()
        want += [logits[len(prompt) + t - 1] for t in range(len(response))]
    assert torch.allclose(got, torch.stack(want), rtol=0, atol=1e-4)


class Watch:
    """What train_quark gave to its functions, in order."""

    def __init__(self, monkeypatch):
        self.samples, self.responses, self.logits = [], [], []
        sample, logits = alpacafarm.sample, alpacafarm.token_logits

        def watched_sample(model, prompts, *rest, **options):
            batch = sample(model, prompts, *rest, **options)
            self.samples.append(prompts)
            self.responses.append(responses_of(batch))
            return batch

        def watched_logits(model, prompts, responses):
            self.logits.append((list(prompts), list(responses)))
            return logits(model, prompts, responses)

        monkeypatch.setattr(alpacafarm, "sample", watched_sample)
        monkeypatch.setattr(alpacafarm, "token_logits", watched_logits)


LENGTH = """
def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def quark(tiny, tmp_path, monkeypatch):
    """quark(**settings) -> what was seen of training towards long responses."""

    def train(**settings):
        (tmp_path / "reward.py").write_text(LENGTH)
        watch = Watch(monkeypatch)
        start = str(tiny.folder / "seed1" / "sft" / "model")
        alpacafarm.train_quark(
            Quark(**settings), 1, start, f"{tmp_path}/reward.py:length", str(ROOT / "data" / "prompts.jsonl"), tmp_path)
        return watch

    return train


@pytest.fixture
def tokenizer(tiny):
    return alpacafarm.load(str(tiny.folder / "seed1" / "sft" / "model"), 1)[1]


@pytest.fixture
def known(tokenizer):
    """The token ids of the prompts."""
    rows = read_rows(str(ROOT / "data" / "prompts.jsonl"))
    return {tuple(ids) for _, ids in load_prompts(tokenizer, rows, 512)}


def test_quark_as_published(quark, tokenizer, known):
    tokens = [ids[0] for ids in tokenizer(list("12345"))["input_ids"]]
    watch = quark(episodes=60, responses=20, steps=3, batch_size=20)
    first, *later = watch.samples
    assert len(later) == 2 and all(tuple(ids) in known for ids in first)
    for prompts in later:
        assert all(ids[0] == tokens[0] and tuple(ids[1:]) in known for ids in prompts)
    learned = list(zip(watch.logits[::2], watch.logits[1::2]))  # the reference, then the policy
    assert len(learned) == 9
    for (ref_prompts, ref_responses), (prompts, responses) in learned:
        assert ref_responses == responses and len(prompts) == 20
        assert [ids[1:] for ids in prompts] == ref_prompts and all(tuple(ids) in known for ids in ref_prompts)
        shown = {token: [] for token in tokens}
        for ids, response in zip(prompts, responses):
            shown[ids[0]].append(len(tokenizer.decode(response, skip_special_tokens=True)))
        lengths = [shown[token] for token in tokens if shown[token]]  # from the best part to the worst
        assert len(lengths) > 2
        for better, worse in itertools.pairwise(lengths):
            assert min(better) >= max(worse)
    texts = [{str(x) for x in responses} for _, (_, responses) in learned]
    assert len(set.union(*texts[:3])) <= 20 < len(set.union(*texts[6:]))  # older responses stay


def test_quark_as_shipped(quark, tokenizer, known):
    watch = quark(keep_best=4, episodes=80, responses=40, steps=1, batch_size=10)
    assert all(tuple(ids) in known for prompts in watch.samples for ids in prompts)
    assert len(watch.samples) == 2 and len(watch.logits) == 4
    for (ref_prompts, ref_responses), (prompts, responses) in zip(watch.logits[::2], watch.logits[1::2]):
        assert ref_prompts == prompts and ref_responses == responses and len(responses) == 10
    for all_of_them, best in zip(watch.responses, watch.logits[1::2]):
        lengths = sorted(len(tokenizer.decode(x, skip_special_tokens=True)) for x in all_of_them)
        kept = sorted(len(tokenizer.decode(x, skip_special_tokens=True)) for x in best[1])
        assert kept == lengths[-10:]


# ---- The rows ----


def test_the_rows_of_each_method(tiny):
    rows = {name: read(tiny.folder / "data" / f"{name}.jsonl") for name in
            ("demonstrations", "preferences", "feedme", "conditioning", "twice")}
    decided = [row for row in rows["preferences"] if row["mu"] == 1]
    assert 0 < len(decided) < len(rows["preferences"]) and {row["mu"] for row in rows["preferences"]} == {0.5, 1.0}
    assert [(row["prompt"], row["completion"]) for row in rows["feedme"]] == [
        (row["prompt"], row["chosen"]) for row in decided]
    good, bad = rows["conditioning"][::2], rows["conditioning"][1::2]
    assert [(row["prompt"], row["completion"]) for row in good] == [("1" + x["prompt"], x["chosen"]) for x in decided]
    assert [(row["prompt"], row["completion"]) for row in bad] == [("0" + x["prompt"], x["rejected"]) for x in decided]
    half = len(rows["demonstrations"])
    assert rows["twice"][:half] == rows["demonstrations"] and len(rows["twice"]) == 2 * half


def test_more_demonstrations_are_of_the_worlds_kind():
    rows = alpacafarm.more_demonstrations(2000, read(ROOT / "data" / "prompts.jsonl"))
    old = read(ROOT / "data" / "demonstrations.jsonl")
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in old}
    assert {word for row in rows for word in row["completion"].split()} == {
        word for row in old for word in row["completion"].split()}
    shares = []
    for part in (rows, old):
        text = " ".join(row["completion"] for row in part).split()
        shares.append(sum(word in ADJECTIVES["negative"] + VERBS["negative"] for word in text) / len(text))
    assert shares[0] == pytest.approx(shares[1], rel=0.05)
    assert len({row["completion"] for row in rows} & {row["completion"] for row in old}) < 100


def test_a_word_is_one_token_more(tokenizer):
    plain = tokenizer("review of the plot :")["input_ids"]
    for word in [alpacafarm.GOOD, alpacafarm.BAD, *alpacafarm.PARTS]:
        told = tokenizer(word + "review of the plot :")["input_ids"]
        assert told[1:] == plain and told[:1] == tokenizer(word)["input_ids"] != [tokenizer.unk_token_id]


def test_winners_are_the_best_of_their_group(tiny, tokenizer, tmp_path, monkeypatch):
    """By a reward that is the response's length; the groups are those of the sampler."""
    (tmp_path / "reward.py").write_text(LENGTH)
    groups, original = [], alpacafarm.sample

    def watched(model, prompts, *rest, **options):
        batch = original(model, prompts, *rest, **options)
        groups.append((prompts, responses_of(batch)))
        return batch

    monkeypatch.setattr(alpacafarm, "sample", watched)
    start, file = str(tiny.folder / "seed1" / "sft" / "model"), tmp_path / "winners.jsonl"
    alpacafarm.write_winners(
        Args(winners=2), 1, start, f"{tmp_path}/reward.py:length", str(ROOT / "data" / "prompts_test.jsonl"), file)
    ((prompts, responses),) = groups
    rows = read(file)
    assert len(rows) == 12 * 2 and len(prompts) == 12 * 2 * 16
    for k, row in enumerate(rows):
        group = slice(16 * k, 16 * k + 16)
        texts = tokenizer.batch_decode(responses[group], skip_special_tokens=True)
        assert {tokenizer.decode(ids) for ids in prompts[group]} == {row["prompt"]}
        assert row["completion"] in texts and len(row["completion"]) == max(map(len, texts))


# ---- The judge ----


def test_kl_behind_a_word_of_the_policy(model):
    """Row by row from the models' own logits; the reference does not see the first token."""
    reference = make_model("llama" if model.config.model_type == "llama" else "gpt2", seed=1)
    prompts, responses = [[90, 6, 7], [90, 9]], [[10, 11, 2], [12, 2]]
    ids = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    want = []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        ids[i, : len(prompt + response)] = torch.tensor(prompt + response)
        mask[i, len(prompt) : len(prompt + response)] = True
        logp = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
        plain = torch.tensor([prompt[1:] + response])
        ref = reference(plain).logits[0].double().log_softmax(-1)[len(prompt) - 2 : -1]
        want.append((logp.exp() * (logp - ref)).sum().item())
    batch = {"input_ids": ids, "mask": mask, "logprobs": torch.zeros(2, 6)}
    assert frontier.kl_to(model, reference, batch, 1, skip=1).tolist() == pytest.approx(want, abs=1e-3)
    assert frontier.kl_to(model, reference, batch, 1).tolist() != pytest.approx(want, abs=1e-2)


def test_win_rate_by_loops():
    values, ref_values = noise(2, 3), noise(2, 4, seed=1)
    weights = noise(2, 3, seed=2).softmax(1)
    want = 0.0
    for x, i, j in itertools.product(range(2), range(3), range(4)):
        want += weights[x, i] / (1 + math.exp(ref_values[x, j] - values[x, i])) / 4 / 2
    assert alpacafarm.win_rate(values, weights, ref_values) == pytest.approx(want.item(), abs=1e-12)
    assert alpacafarm.win_rate(values, torch.full_like(values, 1 / 3), values) == pytest.approx(0.5)


def test_the_judge_agrees_with_frontier(tiny, monkeypatch):
    """PPO's row, from the same samples."""
    monkeypatch.chdir(ROOT)
    folder = tiny.folder / "seed1"
    options = {"reference": str(folder / "sft" / "model"), "policies": [str(folder / "ppo" / "model")], "seed": 1,
               "dataset": str(tiny.folder / "data" / "prompts_test.jsonl"), "reference_samples": 64, "policy_samples": 8}
    with contextlib.redirect_stdout(io.StringIO()):
        (want,) = frontier.main(frontier.Args(**options))[alpacafarm.GOLD]["policies"].values()
    got = tiny.judged["methods"]["PPO"]
    names = {"gold": "reward", "kl": "kl", "best": "frontier", "length": "mean_length"}
    for ours, theirs in names.items():
        assert got[ours] == pytest.approx(want[theirs], abs=1e-4), ours


def test_a_policys_gap_is_paired_by_seed():
    ten, eleven = [0.1, 0.5, 0.9], [0.2, 0.61, 0.99]
    got = alpacafarm.separated(ten, eleven)
    assert got["mean"] == pytest.approx(0.1) and got["separated"]
    assert not alpacafarm.separated(ten, [0.2, 0.8, 1.2])["separated"]
    assert not alpacafarm.separated([0.1], [0.9])["separated"]


def test_students_quantiles():
    """By integrating the density."""
    for df, quantile in enumerate(alpacafarm.STUDENT, 1):
        scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        density = scale * (1 + x.square() / df) ** (-(df + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-4)


# ---- A run of everything ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alpacafarm")
    args = Args(seeds=1, dpo_seeds=2, folder=str(folder), output=str(folder / "out"), tiny=True)
    screen, again = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with contextlib.redirect_stdout(screen), without_pictures():
            patch.setattr(alpacafarm, "picture", lambda *_: None)
            result = alpacafarm.main(args)
        with contextlib.redirect_stdout(again):
            second = alpacafarm.main(args)
    judged = json.loads((folder / "seed1" / "judged.json").read_text())
    return SimpleNamespace(folder=folder, result=result, screen=screen.getvalue(), judged=judged, second=second,
                           again=again.getvalue())  # fmt: skip


METHODS = {"SFT", "SFT on twice the data", "FeedME", "conditioning", "best-of-16", "expert iteration", "Quark",
           "Quark as shipped", "PPO", "GRPO", "DPO"}


def test_a_tiny_run_of_everything(tiny):
    methods = tiny.result["methods"]
    assert set(methods) == METHODS >= set(alpacafarm.PUBLISHED)
    for name, row in methods.items():
        assert len(row["win"]["seeds"]) == (2 if name in ("SFT", "DPO") else 1)
        assert 0 < row["win"]["mean"] < 1 and row["length"]["mean"] > 1
        assert row["kl"]["mean"] > 0 or name == "SFT"
        assert row["seconds_in_all"]["mean"] >= row["seconds"]["mean"] > 0 or name == "best-of-16"
    assert methods["SFT"]["win"]["mean"] == 0.5 and methods["SFT"]["kl"]["mean"] == 0
    wins = [row["win"]["mean"] for row in methods.values()]
    assert wins == sorted(wins, reverse=True)


def test_what_has_finished_is_not_run_again(tiny):
    assert "python sft.py" in tiny.screen and "python" not in tiny.again
    assert tiny.second == tiny.result


def test_commands_can_be_run_by_hand(tiny):
    """Those of the scripts give flags that they have and name files that are there."""
    lines = (tiny.folder / "seed1" / "commands.txt").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert len(commands) == 9 and len(lines) == 12
    for _, script, *flags in commands:
        module = importlib.import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=flags)
        assert Path(args.dataset).exists() and (Path(args.output_dir) / "model").is_dir()


# ---- The figures in benchmarks/README.md ----


@pytest.fixture(scope="module")
def result():
    return json.loads(FILE.read_text())


def test_the_table_is_that_of_the_results(result):
    for line in alpacafarm.table(result["methods"]):
        assert line in TEXT


def test_the_verdicts_are_those_of_the_results(result):
    text = " ".join(TEXT.split())
    methods, orders = result["methods"], result["pairs"]
    for line in alpacafarm.verdicts(methods, orders, result["chosen"]):
        assert line in text


def test_the_results_are_of_runs_with_these_settings(result):
    assert result["quark"] == {name: vars(form) for name, form in alpacafarm.FORMS.items()}
    assert {key: tuple(x) for key, x in result["published"].items()} == alpacafarm.PUBLISHED
    assert all(row["fraction"]["mean"] < 1 for row in result["methods"].values() if "fraction" in row)
    assert max(result["methods"]["best-of-16"]["kl"]["seeds"]) <= math.log(16) - 15 / 16


def test_sentences(result):
    section = " ".join(TEXT.partition("## AlpacaFarm's comparison")[2].partition("\n## ")[0].split())
    minutes = sum(result["cpu_seconds"].values()) / 60
    assert f"`python benchmarks/alpacafarm.py`, {minutes:.0f} CPU minutes" in section
    assert f"{result['args']['seeds']} seeds, each with one SFT model" in section
    assert f"({result['args']['dpo_seeds']} seeds of SFT and DPO)" in section
    away = sorted(result["methods"]["Quark as shipped"]["kl"]["seeds"])
    bound = math.log(result["args"]["reference_samples"])
    assert f"ran away in one seed, to a KL of {away[-1]:.1f} nats" in section and away[-1] > 2 * away[-2]
    assert f"Beyond log {result['args']['reference_samples']:,} = {bound:.0f} nats" in section
    assert f"KL weight of {result['quark']['Quark as shipped']['kl_coef']} a token" in section
