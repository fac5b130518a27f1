"""benchmarks/gpu_check.py at tiny sizes on the CPU, where all of its comparisons have a known answer."""

import json
import subprocess
import sys

import forked
import gpu_check
import pytest
import torch


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What one run of a step writes."""
    out = tmp_path_factory.mktemp("gpu_check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check.subprocess, "Popen", forked.Popen)
        gpu_check.parent(gpu_check.Args(output_dir=str(out), tiny=True, only=("train_grpo",)))
    return json.loads((out / "gpu_check.json").read_text())


def test_a_step_has_ended_well(report):
    assert list(report) == ["train_grpo"] and report["train_grpo"]["status"] == "ok"


@pytest.fixture
def step(tmp_path, monkeypatch):
    """step(name): what a step works with, in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda name: gpu_check.Step(gpu_check.Args(step=name, tiny=True, output_dir=str(tmp_path)))


def test_the_environment_is_measured(step):
    environment = step("environment")
    gpu_check.environment(environment)
    figures = json.loads(environment.file.read_text())
    assert figures["versions"]["torch"] == torch.__version__ and len(figures) == 5
    assert all(x > 0 for name, x in figures.items() if name != "versions")


def test_the_device_under_test_agrees_with_itself(step, no_pictures):
    """On a CPU "CUDA in fp32" is the same computation, and a command repeated or resumed gives the same bits."""
    gpu_check.sft(step("sft"))
    world = json.loads(step("sft").file.read_text())
    for when in ("before", "first step", "end"):
        assert world["fp32 against the CPU"][when][0] == 0.0
        assert world["bf16 against the CPU"][when][0] < 0.1
    assert world["bf16 against the CPU"]["end"][0] > 0.0  # another arithmetic
    assert world["the same command twice"]["bit-identical"] and world["stopped and resumed"]["bit-identical"]
    assert world["stopped after step"] == 2


def test_tokens_are_those_of_the_rows(report):
    """6 updates of 16 responses of 6 tokens; two of the five later updates are the figure's."""
    step = report["train_grpo"]
    assert step["metrics"]["num_tokens"] == 6 * 16 * 6 and len(step["seconds of each step"]) == 4
    assert step["trained tokens/s, prompts among them"] > 0
    parts = step["seconds of the parts of the last step, waiting for each"]
    assert {"rollout", "sample", "sequence_logprobs", "backward", "optimizer"} <= set(parts)


def test_a_step_that_hangs_costs_itself_alone(tmp_path, monkeypatch):
    """It is stopped at its limit, its figures so far and its log are kept, and the next one runs."""
    script = "import pathlib, time; pathlib.Path('{0}/sft.json').write_text('{{\"a\": 1}}'); print('here', flush=True); "
    slow, work = "time.sleep(60)", tmp_path / "out" / "work"

    def start(name, work, tiny):
        code = script.format(work) + (slow if name == "sft" else "")
        return subprocess.Popen([sys.executable, "-c", code], stdout=open(work / f"{name}.log", "w"), start_new_session=True)

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(gpu_check, "STEPS", [{"sft": 1}, {"dpo": 30}])
    report = gpu_check.parent(gpu_check.Args(output_dir=str(tmp_path / "out")))
    assert report["sft"]["status"] == "stopped after 1 s" and report["sft"]["a"] == 1
    assert report["sft"]["log"] == "here\n" and report["dpo"]["status"] == "ok"
    assert json.loads((work.parent / "gpu_check.json").read_text()) == report


def test_digits():
    assert gpu_check.digits(0.0123456) == 0.0123 and gpu_check.digits(123456.0) == 123000.0
