"""benchmarks/real_data.py: its errors against hand-made ones, its flags, its table and sentences, and one
tiny run on real rows, which takes what has ended as it is when it is repeated.
"""

import contextlib
import importlib
import io
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import real_data
import tyro
from conftest import ROOT, SHARED
from test_figures import held, rows, section
from tiny_runs import without_pictures

RESULT = json.loads((ROOT / "benchmarks" / "results" / "real_data.json").read_text())
RUNS = RESULT["runs"]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Parts ----


def test_means_of_samples():
    rows = [{"score": 1.0, "kl": 2.0}, {"score": 3.0, "kl": 6.0}, {"score": 5.0, "kl": 4.0}]
    found = real_data.of_samples(rows, 0.5)
    assert found["score"] == pytest.approx([3, 2 / math.sqrt(3)])
    assert found["kl"] == pytest.approx([4, 2 / math.sqrt(3)])
    assert found["objective"] == pytest.approx([1, math.sqrt(3) / math.sqrt(3)])  # 0, 0 and 3


def test_errors_and_samples_of_a_run(tmp_path):
    write(tmp_path / "metrics.jsonl", [
        {"step": 0, "eval/rewards/accuracies": 0.5}, {"step": 1, "loss": 1.0}, {"step": 1, "eval/rewards/accuracies": 0.8}])
    (tmp_path / "args.json").write_text("{}")
    found = real_data.measured(tmp_path, 100)
    assert found["before"]["step"] == 0 and found["standard_error"] == pytest.approx(0.04)
    write(tmp_path / "metrics.jsonl", [{"step": 0, "eval/reward": 0.0}, {"step": 2, "eval/reward": 1.0}])
    (tmp_path / "args.json").write_text('{"kl_coef": 0.2}')
    samples = [{"step": step, "prompt": str(i), "reward": i + step, "kl": step} for step in (0, 2) for i in range(5)]
    write(tmp_path / "samples.jsonl", samples)
    found = real_data.measured(tmp_path, 100)
    assert [row["reward"] for row in found["samples_after"]] == [2, 3, 4] and found["means_before"]["kl"] == [0, 0]
    assert found["means_after"]["objective"][0] == pytest.approx(4 - 0.4)


@pytest.mark.parametrize("name", real_data.RUNS)
def test_the_flags_are_the_scripts_own(name):
    script, *flags = shlex.split(real_data.RUNS[name])
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=[*flags, *shlex.split(real_data.SETTINGS[script])])
    if script in ("ppo.py", "grpo.py"):
        assert args.total_episodes % (args.batch_size * args.num_minibatches) == 0


def in_process(commands):
    """subprocess.run for the project's scripts, without the seconds that a process needs to start."""

    def run(command, **options):
        _, file, *words = command
        commands.append(Path(file).name)
        module = importlib.import_module(Path(file).stem)
        with contextlib.redirect_stdout(io.StringIO()) as text, without_pictures():
            module.main(tyro.cli(module.Args, args=words))
        return SimpleNamespace(stdout=text.getvalue())

    return run


def test_a_tiny_run_on_real_rows(shared, tmp_path, monkeypatch):
    names = ["reward_stories", "dpo_stories", "ppo", "grpo"]
    commands = []
    monkeypatch.setattr(real_data.subprocess, "run", in_process(commands))
    output = tmp_path / "out.json"
    args = real_data.Args(
        shared=str(SHARED), runs=names, tiny=True, folder=str(tmp_path / "runs"), output=str(output))
    result = real_data.main(args)
    assert commands == ["reward_model.py", "dpo.py", "ppo.py", "grpo.py"] and list(result["runs"]) == names
    assert str(tmp_path) not in output.read_text() and str(SHARED) not in output.read_text()
    assert set(result["linear"]) == {"tinystories_pref", "polite_1100"}
    for run in result["runs"].values():
        assert run["before"]["step"] == 0 < run["after"]["step"] and run["held_out"] <= 8
    again = real_data.main(args)
    assert len(commands) == 4 and again == result  # nothing was run anew


# ---- The results and what the README says of them ----


def test_the_results_are_of_these_commands():
    shown = f"--runs {' '.join(RUNS)}"
    assert shown in " ".join(section("Real data").replace("\\", "").split())
    for name, run in RUNS.items():
        script, *flags = shlex.split(real_data.RUNS[name])
        words = [script, *flags, *shlex.split(real_data.SETTINGS[script])]
        texts = " ".join(words).format(data="../shared/data", folder="runs/real_data").split()
        assert set(texts) <= set(run["command"].split()) and "/work" not in json.dumps(run)
        assert run["command"].startswith(f"python {script} --model ../shared/models/stories260K ")


def test_the_settings():
    shown = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("Real data", "script | flags")}
    used = {run["command"].split()[1] for run in RUNS.values()}
    assert set(shown) == used
    for script, flags in shown.items():
        assert flags == real_data.SETTINGS[script].format(folder="runs/real_data")


def test_the_pairs():
    """A row for each run of a script that learns from comparisons."""
    learned = [run for run in RUNS.values() if "means_after" not in run]
    for cells, run in zip(rows("Real data", "script | rows"), learned, strict=True):
        script, data = run["command"].split()[1], run["command"].partition("--dataset ")[2].split()[0]
        assert cells[0].strip("`") == script and cells[1] == Path(data).name.partition(".")[0]
        key = "eval/rewards/accuracies" if script == "dpo.py" else "eval/accuracy"
        after = run["after"]
        if script == "dpo.py":
            error = f"± {run['standard_error']:.3f}"
        else:
            error = f"({after['eval/accuracy_low']:.3f} to {after['eval/accuracy_high']:.3f})"
        assert cells[2] == f"{run['held_out']}" and cells[3] == f"{run['before'][key]:.3f}"
        assert cells[4] == f"{after[key]:.3f} {error}" and cells[6] == f"{run['cpu_seconds']:.0f}"
        assert cells[5] == f"{RESULT['linear'][cells[1]]:.3f}"


def test_the_policies():
    policies = [run for run in RUNS.values() if "means_after" in run]
    spread = lambda pair: f"{pair[0]:.2f} ± {pair[1]:.2f}"
    for cells, run in zip(rows("Real data", "script | score"), policies, strict=True):
        before, after = run["means_before"], run["means_after"]
        assert before["kl"][0] == pytest.approx(0, abs=1e-3)
        assert cells[0].strip("`").split()[0] == run["command"].split()[1] and cells[0].strip("`") in run["command"].replace(
            " --model ../shared/models/stories260K", "")
        want = [spread(before["score"]), spread(after["score"]), spread(after["kl"]), spread(after["objective"])]
        assert cells[1:] == [*want, f"{run['cpu_seconds']:.0f}"]


def test_the_samples():
    """The first three of the run that is shown, word for word."""
    run = RUNS["grpo"]
    shown = rows("Real data", "prompt | before")
    for cells, before, after in zip(shown, run["samples_before"], run["samples_after"], strict=True):
        texts = [f"{' '.join(row['completion'].split())} ({row['reward']:.1f})" for row in (before, after)]
        assert cells == [" ".join(before["prompt"].split()), *texts]


def test_the_sentences():
    reward, dpo, grpo = RUNS["reward_stories"]["after"], RUNS["dpo_stories"]["after"], RUNS["grpo"]
    own = reward["eval/rewards/chosen"] - reward["eval/mean_reward"]
    held(section("Real data"), f"gets {dpo['eval/rewards/accuracies']:.3f} on the same stories", "on the polite answers neither is separated", "two times in three",
         "of 256 responses to held-out prompts", f"the stories' own continuations ({own:.2f})")  # fmt: skip
    assert "--eval-samples 256" in grpo["command"] and grpo["means_after"]["score"][0] > own
    assert 0.6 < reward["eval/accuracy"] < 0.72 and reward["eval/accuracy_high"] < RESULT["linear"]["tinystories_pref"]
    error = RUNS["dpo_stories"]["standard_error"]
    assert dpo["eval/rewards/accuracies"] - 1.96 * error > RESULT["linear"]["tinystories_pref"]
    polite, linear = RUNS["reward_polite"]["after"], RESULT["linear"]["polite_1100"]
    dpo = RUNS["dpo_polite"]
    assert abs(dpo["after"]["eval/rewards/accuracies"] - linear) < 1.96 * dpo["standard_error"]
    assert polite["eval/accuracy_low"] < linear < polite["eval/accuracy_high"]
