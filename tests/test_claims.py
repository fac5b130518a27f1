"""benchmarks/claims.py: verdicts, bounds and fits against closed forms and enumeration; the README's table is that
of the results.
"""

import itertools
import json
import math
import re

import claims
import pytest
import torch
from conftest import ROOT
from gold_reward import gold_reward
from tiny_runs import head, read, without_pictures

RESULT = json.loads((ROOT / "benchmarks" / "results" / "claims.json").read_text())
README = (ROOT / "benchmarks" / "README.md").read_text()


# ---- Statistics ----


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (199, 1.972)])
def test_students_t(freedom, t):
    assert claims.student(freedom) == pytest.approx(t, abs=1e-3)


def test_an_interval_and_its_verdicts():
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)  # the standard deviation is 1
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    assert claims.verdict([1.0, 2.0, 3.0]) == "not separated"
    assert claims.verdict([1.9, 2.0, 2.1]) == "holds"
    assert claims.verdict([1.9, 2.0, 2.1], 2.5) == "fails"
    assert claims.verdict([1.9, 2.0, 2.1], 1.8) == "not separated"


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_bound_of_a_rate_without_failures(n):
    """All n succeed with probability (1 - p)^n, which is 0.05 at the bound."""
    assert claims.rate_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n))


def test_the_bound_of_a_rate_with_failures():
    p = claims.rate_bound(2, 10)
    assert (1 - p) ** 10 + 10 * p * (1 - p) ** 9 + 45 * p**2 * (1 - p) ** 8 == pytest.approx(0.05)
    assert claims.rate_bound(4, 4) == 1


def test_a_ratio_of_spreads():
    """For 5 seeds each, by a table of F: 9.605 is its 97.5 % quantile at (4, 4) degrees of freedom."""
    a = [1.0, 2.0, 4.0, 8.0, 9.0]
    ratio, low, high = claims.spread_ratio(a, [2 * x + 1 for x in a])
    assert ratio == pytest.approx(0.5)
    assert high == pytest.approx(0.5 * math.sqrt(9.605), rel=0.02)
    assert low == pytest.approx(0.5 / math.sqrt(9.605), rel=0.02)


# ---- Measures ----


def test_win_rate_by_loops():
    gold, other = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 1.0, 3.0], [0.5, 0.5, -2.0]])
    wins = [1 / (1 + math.exp(y - x)) for row, rest in zip(gold.tolist(), other.tolist()) for x in row for y in rest]
    assert claims.win_rate(gold, other) == pytest.approx(sum(wins) / 12)
    assert claims.win_rate(gold, gold) == pytest.approx(0.5)


def test_distinct_by_hand():
    responses = [[1, 2, 1], [1, 2], [5, 5, 5], [6, 7]]  # two to each of two prompts
    assert claims.distinct(responses, 2, 1) == pytest.approx((2 / 5 + 3 / 5) / 2)
    assert claims.distinct(responses, 2, 2) == pytest.approx((2 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_best_of_n_by_enumeration(n):
    """Over all choices of n from a pool of six; the gold reward is that of the best by the proxy."""
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
    learned, true = [], []
    for scores, rewards in zip(proxy.tolist(), gold.tolist()):
        for chosen in itertools.combinations(range(6), n):
            best = max(chosen, key=scores.__getitem__)
            learned.append(scores[best])
            true.append(rewards[best])
    want = (sum(learned) / len(learned), sum(true) / len(true))
    assert claims.best_of_n(proxy, gold, n) == pytest.approx(want)


def test_the_kl_of_best_of_n():
    """Its density against one draw, n u^(n - 1) at the quantile u, in the integral of the KL."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1e6
    for n in (2, 16, 256):
        density = n * u ** (n - 1)
        assert claims.best_of_n_kl(n) == pytest.approx((density * density.log()).nan_to_num().mean().item(), abs=1e-3)


@pytest.mark.parametrize("form", claims.FORMS)
def test_a_fit_finds_its_own_form(form):
    shape = claims.FORMS[form]
    points = []
    for kl in (0.2, 1.0, 2.0, 4.0, 9.0):
        d = math.sqrt(kl)
        points.append((kl, d * (2.0 - 0.4 * shape(torch.tensor(d)).item())))
    other = claims.FORMS[next(name for name in claims.FORMS if name != form)]
    fit = claims.fitted(points, shape)
    assert (fit["a"], fit["b"], fit["r2"]) == pytest.approx((2.0, 0.4, 1.0), abs=1e-5)
    assert claims.fitted(points, other)["r2"] < 0.999


def test_a_crossing():
    assert claims.crossing([0.0, 1.0, 2.0], [-2.0, -1.0, 3.0]) == pytest.approx(1.25)
    assert claims.crossing([0.5, 1.0], [1.0, 2.0]) == 0.5
    assert claims.crossing([0.0, 1.0], [-2.0, -1.0]) == math.inf


def test_a_collapse():
    healthy = {"gold": 2.0, "start": -0.8, "eos": 1.0}
    assert not claims.is_collapsed(healthy)
    assert claims.is_collapsed(healthy | {"gold": -0.9}) and claims.is_collapsed(healthy | {"eos": 0.5})


# ---- Labels and lengths ----


def test_labels_that_are_blind_to_length():
    """Less its slope on the number of words, the gold reward has no correlation with it."""
    pairs = head("preferences", 0, 2000)
    slope = claims.length_slope(pairs)
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    words = torch.tensor([float(len(text.split())) for text in texts])
    left = torch.tensor(gold_reward(prompts, texts)) - slope * words
    assert abs(torch.corrcoef(torch.stack([words, left]))[0, 1]) < 1e-4 and abs(slope) > 0.01


@pytest.mark.parametrize("per_word", [0.0, 2.0])
def test_new_labels_follow_bradley_terry(per_word):
    """The share of votes for the first answer of a pair, and its mean probability."""
    pairs = head("preferences", 0, 2000)
    for pair in pairs:
        pair["chosen"], pair["rejected"] = sorted((pair["chosen"], pair["rejected"]))
    rows = [json.loads(line) for line in claims.relabelled(pairs, per_word).splitlines()]
    votes, chances = [], []
    for pair, row in zip(pairs, rows, strict=True):
        assert {row["chosen"], row["rejected"]} == {pair["chosen"], pair["rejected"]} and row["mu"] in (0.5, 1.0)
        votes.append(row["mu"] if row["chosen"] == pair["chosen"] else 1 - row["mu"])
        rewards = [gold_reward([pair["prompt"]], [pair[side]])[0] for side in ("chosen", "rejected")]
        lengths = [len(pair[side].split()) for side in ("chosen", "rejected")]
        chances.append(1 / (1 + math.exp(rewards[1] - rewards[0] + per_word * (lengths[1] - lengths[0]))))
    noise = torch.tensor(votes) - torch.tensor(chances)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(len(noise))
    assert torch.corrcoef(torch.tensor([votes, chances]))[0, 1] > 0.4


def test_the_length_of_the_optimum():
    """Two answers a prompt, drawn as often, of rewards 0 and 1 + per_word and lengths 5 and 6: pi* is a coin."""
    pool = {"gold": torch.tensor([[0.0, 1.0]] * 3).double(), "length": torch.tensor([[5.0, 6.0]] * 3).double()}
    p = 0.9
    kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert claims.optimum_length(pool, 0.5, kl)[0] == pytest.approx(5 + p, abs=1e-6)
    assert claims.optimum_length(pool, -3.0, kl)[0] == pytest.approx(6 - p, abs=1e-6)


# ---- Runs ----


def test_what_is_kept_is_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": len(calls)}

    for _ in range(2):
        assert claims.kept(tmp_path / "folder" / "x.json", make) == {"x": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    args = claims.Args(
        only=["methods", "ratings"], seeds=2, few_seeds=2, samples=4, pool=16, worlds=2, tiny=True,
        folder=str(folder / "runs"), output=str(folder / "claims.json"))  # fmt: skip
    with without_pictures():
        return claims.main(args), args


def test_a_tiny_run(tiny):
    result, args = tiny
    assert json.loads(open(args.output).read()).keys() == result.keys()
    assert len(result["methods"]["rows"]) == 4 and len(result["ratings"]["rows"]) == 2
    for name in args.only:
        for row in result[name]["rows"]:
            assert row["verdict"] in ("holds", "fails", "not separated") and row["seeds"] == 2


def test_a_second_run_trains_nothing(tiny, monkeypatch):
    result, args = tiny
    for script in claims.TINY:
        monkeypatch.setattr(script, "main", None)
    args.only = ["methods"]
    assert claims.main(args)["methods"] == result["methods"]


def test_each_policy_is_measured(tiny):
    _, args = tiny
    files = [claims.home(args, seed) / name / "measured.json" for seed in (1, 2) for name in ("dpo", "ppo")]
    for file in files:
        policy = json.loads(file.read_text())
        assert 0 < policy["win"] < 1 and policy["kl"] > 0 and policy["length"] > 1 and policy["entropy"] > 0
        assert len(read(file.parent / "metrics.jsonl")) >= 3


# ---- The README ----


def test_the_table_is_that_of_the_results():
    lines = claims.table(RESULT).splitlines()
    assert set(claims.CLAIMS) - set(RESULT) <= {"sums"}  # as the README says
    assert "\n".join(lines) in README


def test_sentences_about_claims():
    section = " ".join(README.partition("## The claims of the lectures")[2].partition("\n## ")[0].split())
    few, many = (claims.rate_bound(0, n) for n in (3, 20))
    assert f"{few:.2f} after three, {many:.2f} after twenty" in section
    without = RESULT["no_kl"]["by_pairs_and_beta"]["20000"]["0"]
    for quoted, seed in re.findall(r'" (i loved [^"]*) \.\.\." \(seed (\d)\)', section):
        assert without[int(seed) - 1]["samples"][0].startswith(f" {quoted}")
    more = [row["win"] for row in without]
    assert all(x < 0.5 for x in more) and section.count("(seed ") == 2
    assert RESULT["prompts"]["pairs"] / 20_000 == pytest.approx(0.25, abs=0.01)  # "a quarter of the pairs"
    assert all(0.45 < x < 0.8 for x in RESULT["ratings"]["crossings"].values())  # "more than about a half"
    sizes = [RESULT[name]["args"] for name in claims.CLAIMS if name in RESULT]
    assert {(size["samples"], size["pool"]) for size in sizes} == {(256, 4000)}
    assert "256 answers of the policy and 4,000 of its SFT model" in section
    for run in RESULT["length"]["runs"]["neutral"]["dpo"]:
        assert run["start"] < run["length"] < run["optimum"]


def test_a_claims_command_makes_it_again():
    sizes = claims.asdict(claims.Args(seeds=10, labels=["gold"], tiny=True))
    command = claims.command_of("length", {key: sizes[key] for key in ("seeds", "pairs", "labels", "tiny", "few_seeds")})
    assert command == "python benchmarks/claims.py --only length --seeds 10 --labels gold --tiny"


def test_an_unknown_claim_is_refused(capsys):
    with pytest.raises(SystemExit):
        claims.main(claims.Args(only=["none"], output=""))
    assert "--only none" in capsys.readouterr().err
