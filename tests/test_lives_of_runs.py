"""Faults of the algorithms' edges and of a run's life, each failing until its cause is gone: ties of two, coefficients
that change their sign, a Ctrl-C that reaches what a reward has started, inputs that changed, full disks.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import kills
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from safetensors.torch import load_file, save_file
from tiny_runs import (
    PROMPT, SAMPLERS, Killed, at_step, copy_model, interrupt, kill, launch, read, result, scripts, tiny_args, write)

import common
import dpo
import ppo

ARGS = SimpleNamespace(beta=0.3, loss_type="sigmoid", label_smoothing=0.0, micro_batch_size=9)


# ---- Ties ----


def forward_of(ranking, tokenizer, answers):
    """(losses, metrics, implicit margin of the first two) of a ranking of these answers, by two random models."""
    row = {"_where": "a:1", "prompt": "me~", "completions": answers, "ranking": ranking}
    model, other = bpe_model(1), bpe_model(2)
    comparisons = common.load_comparisons(tokenizer, [row], [2], 99)
    reference = dpo.reference_logps(other, comparisons, ARGS, nullcontext)
    return dpo.forward(model, comparisons, reference, ARGS, nullcontext)


def bpe_model(seed):
    model = make_model("llama", seed=seed)
    torch.manual_seed(seed)
    model.resize_token_embeddings(420, mean_resizing=False)
    return model


def test_two_that_tie_are_no_win(bpe_tokenizer):
    """ranking [1, 1] is mu = 1/2, as in reward_model.py: the loss is the same whichever stands first."""
    losses, metrics = forward_of([1, 1], bpe_tokenizer, ["hello", "there"])
    h = metrics["rewards/margins"]
    want = -(F.logsigmoid(h) + F.logsigmoid(-h)) / 2
    assert abs(h) > 0.05
    assert losses.item() == pytest.approx(want.item(), abs=1e-5)
    turned, _ = forward_of([1, 1], bpe_tokenizer, ["there", "hello"])
    assert losses.item() == pytest.approx(turned.item(), abs=1e-5)
    assert metrics["rewards/accuracies"] == 0.5


def test_all_that_tie_are_half_right(bpe_tokenizer):
    _, metrics = forward_of([1, 1, 1], bpe_tokenizer, ["hello", "there", "help"])
    assert metrics["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("name, flags", [("dpo", {}), ("reward_model", {"loss_type": "plackett_luce"})])
def test_a_tie_of_eleven_is_refused_before_the_first_step(refused, starts, tmp_path, flags):
    """Not in the step that meets it: a run that dies there cannot go on, since --resume wants the same rows."""
    words = "the plot was good and bad it is also slow i".split()
    row = {"prompt": PROMPT, "completions": [f" {word} ." for word in words], "ranking": [7] * 11}
    good = {"prompt": PROMPT, "completions": [" the .", " plot ."], "ranking": [1, 2]}
    path = write(tmp_path / "rows.jsonl", [good] * 7 + [row])
    held_out = write(tmp_path / "held_out.jsonl", [good])
    assert "11" in refused(dataset=path, eval_dataset=held_out, save_every=1, **flags)
    assert not (tmp_path / "run").exists()


# ---- The KL coefficient ----


@pytest.mark.parametrize("kl, low, high", [(0.0, 0.8, 1.0), (9.0, 1.0, 1.2)])
def test_the_coefficient_moves_by_a_fifth_at_most(kl, low, high):
    """Whatever the horizon is: a negative one would reward the KL."""
    for horizon in (1, 10, 100, 1000):
        factor = ppo.adapted_kl_coef(0.3, kl, 1.0, 512, horizon) / 0.3
        assert low - 1e-9 <= factor <= high + 1e-9


# ---- A Ctrl-C in a terminal reaches all processes there ----

WITH_CHILDREN = """
import multiprocessing, os, pathlib, subprocess, time

here = pathlib.Path(__file__)

def judge(text):
    time.sleep(0.1)
    return float(len(text) % 3)

def announce():
    with here.with_name("calls").open("a") as file:
        file.write("x")

def pool(prompts, completions, **columns):
    announce()
    with multiprocessing.get_context("fork").Pool(2) as p:
        return p.map(judge, completions)
"""


@scripts("grpo")
def test_ctrl_c_while_a_reward_has_workers(script, starts, tmp_path):
    """The run still ends behind its step, with the checkpoint of a step that saw the true rewards."""
    (tmp_path / "children.py").write_text(WITH_CHILDREN)
    reward = {"reward": (f"{tmp_path}/children.py:pool",), "eval_samples": 2}
    child = kills.Child(script, tiny_args(script, starts, tmp_path / "run", **reward), tmp_path / "log", os.setsid)
    try:
        calls = tmp_path / "calls"
        wait_for(lambda: calls.exists() and len(calls.read_text()) >= 3, 30)
        time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)
        wait_for(child.ended, 10)
    finally:
        if not child.ended():
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.code == 128 + signal.SIGINT, child.last_words()
    for folder, flags in (("run", {"resume": True}), ("whole", {})):
        again = tiny_args(script, starts, tmp_path / folder, **reward, **flags)
        assert kills.Child(script, again, tmp_path / "log").wait() == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


@scripts("grpo")
def test_what_follows_a_failed_run_has_its_ctrl_c(script, tiny, rewards, capsys, monkeypatch):
    """In a notebook or at a prompt, where the process goes on: one signal may still be the run's, none kills."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            script.module.main(tiny(reward=(f"{rewards}:raises",)))
        if signal.getsignal(signal.SIGINT) != before:
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@scripts("grpo")
def test_workers_that_are_not_forks_find_the_reward(script, starts, tmp_path):
    """spawn and forkserver, which macOS and Python 3.14 use, import a function's module by its name and sys.path."""
    (tmp_path / "my_own_reward.py").write_text(
        "import pickle\n\ndef judge(text): return 1.0\n\n"
        "def score(prompts, completions, **columns):\n"
        "    with open(__file__ + '.sent', 'wb') as file:\n"
        "        pickle.dump(judge, file)\n"
        "    return [1.0] * len(completions)\n")
    reward = (f"{tmp_path}/my_own_reward.py:score",)
    args = tiny_args(script, starts, tmp_path / "run", reward=reward, total_episodes=0)
    child = kills.Child(script, args, tmp_path / "log")
    assert child.wait() == 0, child.last_words()
    read_it = "import pickle, sys; sys.path.append(sys.argv[1]); print(pickle.load(sys.stdin.buffer)('a'))"
    with open(tmp_path / "my_own_reward.py.sent", "rb") as sent:
        other = subprocess.run([sys.executable, "-c", read_it, tmp_path], stdin=sent, capture_output=True, text=True)
    assert other.stdout == "1.0\n", other.stderr


def test_two_functions_of_a_file_are_one_module(tmp_path, bpe_tokenizer):
    """By which spawned workers find both, wherever else on the path the file may be found."""
    (tmp_path / "twins.py").write_text(
        "def one(prompts, completions, **columns): return [1.0] * len(prompts)\n"
        "def two(prompts, completions, **columns): return [2.0] * len(prompts)\n")
    rows, cpu = [{"prompt": "me~", "_where": "rows.jsonl:1"}], torch.device("cpu")
    scores = [common.reward_function(f"{tmp_path}/twins.py:{name}", bpe_tokenizer, cpu) for name in ("one", "two")]
    assert [score(rows, [[]], [[5, 2]]).item() for score in scores] == [1.0, 2.0]
    assert sys.modules["twins"].two.__module__ == "twins"


# ---- Inputs that changed, files that cannot be written, names that are equal ----


@scripts(*SAMPLERS)
def test_resume_notices_another_reward_model_of_the_same_configuration(script, starts, tmp_path, refused):
    """As the ones of other libraries are, whose config.json holds no mean."""
    folder = copy_model(starts, tmp_path / "reward", run="small_reward1")
    flags = script.flag("reward", str(folder))
    args = tiny_args(script, starts, tmp_path / "run", **flags)
    assert interrupt(script, args, 1, signal.SIGTERM) == 128 + signal.SIGTERM
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= -5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "--resume" in refused(resume=True, **flags)


@scripts("sft")
def test_a_full_disk_in_the_logs_is_one_line(script, starts, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    args = tiny_args(script, starts, tmp_path / "run", epochs=3)
    child = kills.Child(script, args, tmp_path / "log", limit)
    assert child.wait() == 2 and "--output-dir" in child.last_words(), child.last_words()


@scripts("grpo")
def test_rewards_of_equal_names_are_both_logged(script, go, tmp_path):
    specs = []
    for letter, value in (("a", 1.0), ("b", 5.0)):
        folder = tmp_path / letter / "rewards"
        folder.mkdir(parents=True)
        code = f"def f(prompts, completions, **columns): return [{value}] * len(completions)\n"
        (folder / "mine.py").write_text(code)
        specs.append(f"{folder}/mine.py:f")
    metrics = read(go("run", total_episodes=0, reward=tuple(specs)) / "metrics.jsonl")[0]
    assert sorted(value for name, value in metrics.items() if "mine.py" in name) == [1.0, 5.0]


@scripts("sft")
def test_a_run_killed_behind_an_evaluation_is_resumed_again_and_again(script, tiny, go, whole, tmp_path):
    """Its logs are cut back to the checkpoint each time, to sizes that hold when it is stopped before the next row."""
    flags = {"epochs": 2, "eval_every": 2, "save_every": 3}
    with pytest.raises(Killed), at_step(6, kill):  # behind the evaluation and samples of step 4
        launch(script, tiny(**flags))
    assert interrupt(script, tiny(**flags, resume=True), 1, signal.SIGTERM)  # step 4 again, and no samples yet
    assert result(go("run", **flags, resume=True)) == result(whole(**flags))
