"""benchmarks/curves.py: the committed runs are judged as they were made, each sign has its limit, the band is that of
the five seeds, and a run of one's own is read.
"""

import importlib
import json
import math
import runpy
import statistics
import sys

import curves
import pytest
import tyro
from conftest import ROOT
from curves import AWAY, FLAT, LABELS, OTHER_START, OVERFIT, PARTS, RATE, SIGNS, WATCH, Log, read, verdict
from tiny_runs import scripts

sys.path.append(str(ROOT / "data"))
from gold_reward import gold_reward  # noqa: E402

RECORDED = json.loads((curves.CURVES / "verdicts.json").read_text())["runs"]


def reference_of(name, script):
    """The seeds of the band, without the run itself."""
    names = [f"{script}-{seed}" for seed in curves.SEEDS]
    return [read(curves.CURVES / f"{other}.jsonl") for other in names if other != name]


# ---- The committed runs ----


@pytest.mark.parametrize("name", RECORDED)
def test_a_committed_run_is_judged_as_it_was_made(name):
    """Healthy seeds, each beside the four others; runs that the band does not know; every sick run by its sickness."""
    log, row = read(curves.CURVES / f"{name}.jsonl"), RECORDED[name]
    found = verdict(log, reference_of(name, log.script))
    assert found["verdict"] == row["verdict"]
    if row["made"] in ("healthy", curves.OUTSIDE):
        assert found["verdict"] == row["made"]
    else:
        assert found["verdict"].startswith(f"sick: {row['made']}")
    assert {sign.what: figure for sign, figure in found["signs"]} == pytest.approx(row["figures"], rel=1e-3, abs=1e-9)


def test_the_runs_that_are_there():
    """Five seeds of each script, healthy runs that the band does not know, and each sickness in two runs or more."""
    healthy = {f"{script}-{seed}" for script in WATCH for seed in (1, 2, 3, 4, 5)} | set(curves.UNSEEN)
    assert healthy <= set(RECORDED) <= set(curves.plan("FOLDER"))
    made = [row["made"] for row in RECORDED.values()]
    assert min(made.count(sickness) for sickness in (RATE, FLAT, AWAY)) >= 2
    sizes = [file.stat().st_size for file in curves.CURVES.glob("*.jsonl")]
    assert len(sizes) == len(RECORDED) and sum(sizes) < 400_000


@pytest.mark.parametrize("name", ["ppo-lr-1", "grpo-kl0-1", "dpo-3", "reward_model-2", "grpo-other-3"])
def test_commands_have_their_flags(name):
    script, flags = curves.plan("FOLDER")[name]
    tyro.cli(importlib.import_module(script).Args, args=flags)
    names = [flag for flag in flags if flag.startswith("--")]
    assert len(set(names)) == len(names)
    assert RECORDED[name]["command"] == f"python {script}.py {' '.join(flags)}".replace(f"{ROOT}/", "")


def test_the_table_of_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert curves.table(RECORDED) in text and curves.summary(RECORDED) in text.replace("\n", " ")


# ---- Logs by hand ----


def log_of(script, steps=50, evaluations=(), **metrics):
    """A run of 50 steps, two a part. metrics: a number, or a function of the step from 1 on."""
    base = dict.fromkeys(WATCH[script], 1.0) | {"learning_rate": 1e-3, "completions/mean_length": 10.0}
    base |= {name.replace("__", "/"): x for name, x in metrics.items()}
    rows = []
    for step in range(1, steps + 1):
        row = {name: x(step) if callable(x) else x for name, x in base.items()}
        rows.append({"step": step, "num_tokens": 100 * step, **row})
    return Log(script, rows, list(evaluations), steps)


def rising(step):
    return step / 10


HEALTHY = {
    "ppo": {"objective__scores": rising, "objective__kl": rising, "policy__entropy": 1.0, "completions__eos_rate": 1.0,
            "policy__approx_kl": 0.01, "policy__clipfrac": 0.02, "policy__logprob_gap": 1e-5},
    "grpo": {"reward": rising, "kl": rising, "entropy": 1.0, "completions__eos_rate": 1.0, "policy__logprob_gap": 1e-5,
             "policy__approx_kl": 1e-13, "policy__clipfrac": 0.0, "frac_reward_zero_std": 0.1},
    "dpo": {"loss": lambda step: 0.7 - step / 200},
    "reward_model": {"loss": lambda step: 0.7 - step / 200},
    "sft": {"loss": lambda step: 3 - step / 30},
}
ENDS = {
    "ppo": [{"eval/objective/kl": 0.0}],
    "grpo": [{"eval/kl": 0.0}],
    "dpo": [{"eval/rewards/margins": 0.0, "eval/loss": 0.69, "completions/eos_rate": 0.8},
            {"eval/loss": 0.5, "eval/rewards/accuracies": 0.7, "completions/eos_rate": 1.0}],
    "reward_model": [{"eval/loss": 0.7}, {"eval/loss": 0.5, "eval/accuracy": 0.7, "eval/ece": 0.02}],
    "sft": [{"eval/loss": 3.0}, {"eval/loss": 1.3, "completions/eos_rate": 1.0}],
}


def made(script, last=(), first=(), middle=None, **changed):
    """A healthy run with a change in its metrics, or in its first or last evaluation, or with one in the middle."""
    ends = [{"step": 50 * i, **row} for i, row in enumerate(ENDS[script])]
    if middle:
        ends.insert(1, {"step": 25, **middle})
    ends[0] |= dict(first)
    ends[-1] |= dict(last)
    return log_of(script, evaluations=ends, **(HEALTHY[script] | changed))


def one_at(step, value, other):
    return lambda s: value if s == step else other


@pytest.mark.parametrize("script", WATCH)
def test_a_healthy_run_has_no_sign(script):
    found = verdict(made(script), [])
    assert found["verdict"] == "healthy" and len(found["signs"]) == len(SIGNS[script]) and not found["left"]


SICK = [
    ("ppo", {"first": {"eval/objective/kl": 0.2}}, OTHER_START),
    ("ppo", {"policy__logprob_gap": one_at(9, 1.3, 0.0)}, "sampler and training disagree"),
    ("ppo", {"policy__approx_kl": one_at(9, 0.25, 0.01)}, RATE),  # of a part: 0.13
    ("ppo", {"policy__clipfrac": 0.4}, RATE),
    ("ppo", {"objective__kl": one_at(2, 40.0, 1.0)}, RATE),  # 2.05 nats a token in the first part
    ("ppo", {"objective__scores": lambda step: math.sin(2 * step)}, FLAT),
    ("ppo", {"objective__scores": 1.0}, FLAT),
    ("ppo", {"objective__scores": lambda step: -step / 10}, FLAT),
    ("ppo", {"objective__kl": lambda step: step / 3}, AWAY),
    ("ppo", {"policy__entropy": lambda step: 1 - step / 60}, "the entropy collapses"),
    ("ppo", {"completions__eos_rate": lambda step: 1 - step / 60}, "responses are cut"),
    ("grpo", {"frac_reward_zero_std": lambda step: step / 60}, "groups without variance"),
    ("grpo", {"kl": lambda step: step / 3}, AWAY),
    ("dpo", {"first": {"eval/rewards/margins": -0.3}}, OTHER_START),
    ("dpo", {"loss": one_at(20, 1.2, 0.5)}, RATE),
    ("dpo", {"rewards__chosen": -3.5}, RATE),
    ("dpo", {"first": {"eval/loss": 0.6931}, "last": {"eval/loss": 0.692}}, LABELS),
    ("dpo", {"middle": {"eval/loss": 0.5}, "last": {"eval/loss": 0.6}}, OVERFIT),
    ("dpo", {"last": {"completions/eos_rate": 0.3}}, "samples do not end"),
    ("reward_model", {"last": {"eval/loss": 0.69}}, LABELS),
    ("reward_model", {"last": {"eval/ece": 0.3}}, "rewards are over-confident"),
    ("sft", {"last": {"completions/eos_rate": 0.0}}, "samples do not end"),
]


@pytest.mark.parametrize("script, change, sickness", SICK)
def test_each_sign_appears_on_its_trouble_and_on_no_other(script, change, sickness):
    assert verdict(made(script, **change), [])["verdict"] == f"sick: {sickness}"


def test_a_solved_task_may_have_one_answer():
    """Right for nine in ten: no entropy and no variance are left, and that is no sickness."""
    alike = {"entropy": lambda step: 1 - step / 52, "frac_reward_zero_std": 0.9}
    for rate, word in ((0.95, "healthy"), (0.5, "sick: the entropy collapses, groups without variance")):
        log = made("grpo", last={"eval/pass_at_1": rate}, **alike)
        assert verdict(log, [])["verdict"] == word


def test_ipo_starts_at_another_loss():
    """(1 / (2 beta))^2 = 25 at beta 0.1: chance is what the run starts with."""
    ends = {"first": {"eval/loss": 25.0}, "last": {"eval/loss": 20.0}}
    assert verdict(made("dpo", loss=lambda step: 25 - step / 10, **ends), [])["verdict"] == "healthy"


def test_each_sickness_is_tried():
    assert {(script, sickness) for script, _, sickness in SICK} >= {
        ("ppo", sign.sickness) for sign in SIGNS["ppo"]} | {("dpo", sign.sickness) for sign in SIGNS["dpo"]}  # fmt: skip


def test_parts_are_means_of_a_25th():
    log = log_of("sft", steps=75, loss=float)
    assert list(log.parts("loss").values()) == [3 * part + 2 for part in range(PARTS)]
    assert log.end("loss") == statistics.fmean(3 * part + 2 for part in range(20, 25))
    assert log.start("loss") == 2 and math.isnan(log.start("nothing"))
    half = log_of("sft", steps=30, loss=float)
    assert list(half.parts("loss", last=75)) == list(range(10))  # beside a run of 75 steps it is not over yet


def test_thinning_changes_no_figure(tmp_path):
    for script in WATCH:
        log = made(script)
        rows = curves.thin(log)
        (tmp_path / "thin.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        again = read(tmp_path / "thin.jsonl")
        assert len(again.training) == PARTS and again.last == log.last and again.tokens == log.tokens
        figures = [{sign.what: x for sign, x in verdict(each, [])["signs"]} for each in (log, again)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3)


# ---- The band ----


def seeds_of(script="sft", **changed):
    return [log_of(script, loss=lambda step, k=k: 2.0 + 0.1 * k, **changed) for k in range(5)]


def test_limits_by_hand():
    """Five seeds at 2.0 to 2.4: mean 2.2, standard deviation sqrt(0.025)."""
    for low, high in curves.limits(seeds_of(), "loss").values():
        assert (low, high) == pytest.approx((2.2 - 5 * 0.025**0.5, 2.2 + 5 * 0.025**0.5))


@pytest.mark.parametrize("parts, leaves", [(2, False), (3, True)])
def test_a_run_leaves_the_band_in_three_parts_in_a_row(parts, leaves):
    outside = range(21, 21 + 2 * parts)  # steps; parts 10, 11, ..
    log = log_of("sft", loss=lambda step: 3.5 + step / 100 if step in outside else 2.3, grad_norm=1.0)
    found = verdict(log, seeds_of())
    assert found["compared"] and bool(found["left"]) == leaves
    if leaves:
        (left,) = found["left"]
        assert (left["name"], left["first_step"], left["last_step"]) == ("loss", 21, 20 + 2 * parts)
        assert left["value"] == pytest.approx(3.755) and left["high"] < 3  # of the part with steps 25 and 26
        assert found["verdict"] == curves.OUTSIDE
    else:
        assert found["verdict"] == "healthy"


def test_other_worlds_have_no_band():
    reference = [made("ppo") for _ in range(5)]
    log = made("ppo")
    assert curves.is_of_this_world(log, reference)
    doubled = [{**row, "num_tokens": 2 * row["num_tokens"]} for row in log.training]
    assert not curves.is_of_this_world(log._replace(training=doubled), reference)
    other_reward = made("ppo", first={"eval/objective/scores": 3.0})
    assert not curves.is_of_this_world(other_reward, reference)
    found = verdict(other_reward, reference)
    assert not found["compared"] and found["left"] == []


# ---- The runs that are sick on purpose ----


def test_a_shuffled_reward_is_the_rewards_of_others():
    prompts = ["review of the plot :"] * 6
    texts = [f" the plot was {word} ." for word in ("superb", "good", "okay", "weak", "awful", "very superb")]
    own, given = gold_reward(prompts, texts), curves.shuffled(prompts, texts)
    assert sorted(own) == sorted(given) and own != given


def test_shuffled_pairs_are_the_pairs(tmp_path):
    curves.shuffle_pairs(tmp_path / "pairs.jsonl")
    before = [json.loads(line) for line in (ROOT / "data" / "preferences.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    exchanged = [a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in zip(before, after)]
    assert all(a == b or swap for a, b, swap in zip(before, after, exchanged)) and len(before) == len(after)
    assert 0.48 < statistics.fmean(exchanged) < 0.52


# ---- The command ----


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    runs = [str(curves.CURVES / f"{name}.jsonl") for name in ("ppo-other-6", "ppo-kl0-1")]
    monkeypatch.setattr(sys, "argv", ["curves.py", *runs, "--output", str(tmp_path / "both.png")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "benchmarks" / "curves.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert not shown.err
    lines = shown.out.splitlines()
    assert "  healthy" in lines and f"  sick: {AWAY}, the entropy collapses" in lines
    assert any(line.startswith("  objective/kl is above the band") for line in lines)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, error", [
    ([], "pass the folder of a run"), (["nowhere"], "nowhere/metrics.jsonl does not exist"),
    (["empty"], "it has no training step")])  # fmt: skip
def test_what_is_no_run(words, error, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        curves.main(curves.Args(runs=tuple(words)))
    assert stop.value.code == 2 and error in capsys.readouterr().err


@scripts("sft", "reward_model", "dpo", "ppo", "grpo")
def test_own_runs_are_read(script, whole, monkeypatch, capsys, tmp_path):
    """A tiny run of each script: its quantities to watch and its signs are in its log; it has no band."""
    run = whole()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = curves.main(curves.Args(runs=(str(run),), output=str(tmp_path / "curves.png")))[str(run)]
    assert found["script"] == script.name and not found["compared"]
    assert len(found["signs"]) >= len(SIGNS[script.name]) - (script.name == "dpo")  # in three steps it has no margin
    log = read(run)
    assert all(log.parts(name) for name in WATCH[script.name])
    assert "pip install matplotlib" in capsys.readouterr().out
