"""The same command gives the same files, to the last bit, and so does a run that was interrupted anywhere and
resumed. What an interrupted or a finished run has written is never lost.
"""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny_runs import (
    INERT, SAMPLERS, SCRIPTS, Killed, approx_rows, as_flags, at_step, checkpoint_of, files_in, first_of, interrupt,
    kill, launch, option, read, result, reward_specs, run_python, scripts, tiny_args, trained_rows, write)
from transformers import AutoTokenizer


LONG_RUN = {"epochs": 2, "eval_every": 2, "save_every": 2}  # 6 steps: 2 times 4, 4, 2 rows

# ---- Determinism ----

COMMANDS = """
import json, runpy, signal, sys

sys.modules["matplotlib.figure"] = None  # no pictures
for path, *flags in json.loads(sys.argv[1]):
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
"""


@pytest.fixture(scope="module")
def commands(starts, tmp_path_factory):
    """The folder of a run of each script by its command, all in one process with another hash seed than this one."""
    folder = tmp_path_factory.mktemp("commands")
    lines = []
    for name, script in SCRIPTS.items():
        args = tiny_args(script, starts, folder / name, **LONG_RUN)
        lines.append([str(ROOT / f"{name}.py"), *as_flags(args)])
    process = run_python("-c", COMMANDS, json.dumps(lines), PYTHONHASHSEED="17", PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    return folder


def test_same_command_same_files(script, commands, whole):
    """In this process, and in another one with another hash seed."""
    first = result(whole(**LONG_RUN))
    assert result(commands / script.name) == first
    assert len(first[0]) == 6 + 4  # steps and evaluations: after 0, 2, 4 and 6


def test_the_seed_matters(go, whole):
    assert result(whole()) != result(go("second", seed=2))


# ---- Resuming ----


def test_resume_after_a_signal(script, tiny, go, whole, capsys, tmp_path):
    """Each stop is (step since the last start, signal). The step is finished first, and with it all optimizer
    steps of an update.
    """
    done = 0
    for k, (step, number) in enumerate([(2, signal.SIGTERM), (2, signal.SIGINT), (1, signal.SIGTERM)]):
        assert interrupt(script, tiny(**LONG_RUN, resume=k > 0), step, number) == 128 + number
        assert "--resume" in capsys.readouterr().out
        done += step
        saved = checkpoint_of(tmp_path / "run")["step"]
        assert saved == done == trained_rows(tmp_path / "run")[-1]["step"]
    assert result(go("run", **LONG_RUN, resume=True)) == result(whole(**LONG_RUN))


@pytest.mark.parametrize("name, flags", [
    ("ppo", {"critic": "none"}), ("ppo", {"critic": "policy", "target_kl": 0.0}),
    ("grpo", {"reward": ("rewards.py:odd", "reward2/model"), "reward_weights": (0.5, -3.0), "kl_in": "reward"}),
    ("grpo", {"reward": ("rewards.py:odd",), "drop_zero_std": True})],
    ids=str)
def test_resume_with_other_parts(script, tiny, go, whole, starts, flags):
    """Without a critic, or the controller of the KL coefficient; with several rewards; with groups dropped."""
    if "reward" in flags:
        flags = flags | reward_specs(script, starts, *flags["reward"])
    assert interrupt(script, tiny(**flags), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    assert result(go("run", **flags, resume=True)) == result(whole(**flags))


@scripts(*SAMPLERS)
@pytest.mark.parametrize("inner", [2, 4])
def test_signal_anywhere_in_an_update(script, tiny, go, whole, tmp_path, inner):
    """2 epochs of 2 minibatches: the rest of the update follows, or its samples would be drawn anew."""
    with pytest.raises(SystemExit), at_step(4 + inner, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        launch(script, tiny())
    assert [row["step"] for row in trained_rows(tmp_path / "run")] == [1, 2]
    assert result(go("run", resume=True)) == result(whole())


def test_signal_in_the_last_step(script, tiny, go, whole, tmp_path):
    """Whether it stops there or finishes: nothing of the run may be missing in the end."""
    if interrupt(script, tiny(), 3, signal.SIGTERM):
        go("run", resume=True)
    assert result(tmp_path / "run") == result(whole())


def test_a_signal_leaves_the_model_as_it_is(script, tiny, go, capsys, tmp_path):
    """In a folder of state/ that can be loaded, with the weights of the checkpoint, until the run has ended."""
    assert interrupt(script, tiny(), 2, signal.SIGTERM)
    state = tmp_path / "run" / "state"
    assert f"model so far: {state}" in capsys.readouterr().out
    kinds = {"policy" if script.is_sampler and name == "model" else name: kind for name, kind in script.parts.items()}
    assert {path.name for path in state.iterdir() if path.is_dir()} == kinds.keys()
    for name, kind in kinds.items():
        model = kind.from_pretrained(state / name)
        AutoTokenizer.from_pretrained(state / name)
        saved = checkpoint_of(tmp_path / "run")[name]
        weights = dict(model.named_parameters())
        assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in saved)
    go("run", resume=True)
    assert not state.exists()


def test_second_signal_ends_the_process(script, tiny):
    """At once: the first one leaves the system's own handler behind it."""
    handlers = []

    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(SystemExit), at_step(first_of(2, tiny()), stop):
        launch(script, tiny())
    assert handlers == [signal.SIG_DFL]


def test_resume_after_a_kill_drops_later_log_lines(script, tiny, go, whole, tmp_path):
    with pytest.raises(Killed), at_step(first_of(4, tiny()), kill):
        launch(script, tiny(**LONG_RUN))
    steps = [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 2, 3]  # the checkpoint is that of step 2, before its evaluation
    assert checkpoint_of(tmp_path / "run")["step"] == 2
    assert result(go("run", **LONG_RUN, resume=True)) == result(whole(**LONG_RUN))


def test_resume_after_a_kill_within_a_checkpoint(script, tiny, go, whole, monkeypatch):
    """Half of the second checkpoint is on the disk: the first one is still whole."""
    save, calls = torch.save, itertools.count(1)

    def half(state, path):
        save(state, path)
        if next(calls) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:9999])
            kill()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", half)
        launch(script, tiny(**LONG_RUN))
    assert result(go("run", **LONG_RUN, resume=True)) == result(whole(**LONG_RUN))


def test_resume_may_change_what_changes_no_number(script, tiny, go, whole):
    assert interrupt(script, tiny(), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    resumed = go("run", resume=True, save_every=1, micro_batch_size=1, gradient_checkpointing=True)
    assert result(resumed)[0] == approx_rows(result(whole())[0], 1e-4)


@pytest.mark.parametrize("name, function", [(name, function) for name, script in SCRIPTS.items()
                                            for function in script.forwards])
def test_nan_keeps_the_last_checkpoint(script, refused, tiny, go, whole, monkeypatch, tmp_path, function):
    """The loss turns NaN at step 3. The checkpoint is that of step 2, and resuming from it is a good run."""
    original, wrong, forwards = getattr(script.module, function), first_of(3, tiny()), itertools.count(1)

    def poisoned(*inputs, **options):
        outputs = original(*inputs, **options)
        if not torch.is_grad_enabled() or next(forwards) != wrong:
            return outputs
        return tuple(x * math.nan for x in outputs) if isinstance(outputs, tuple) else outputs * math.nan

    with monkeypatch.context() as patch:
        patch.setattr(script.module, function, poisoned)
        assert "step 3" in refused(save_every=2)
    assert checkpoint_of(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "model").exists()
    assert result(go("run", save_every=2, resume=True)) == result(whole())


# ---- What was written is never lost ----


def test_finished_run_is_never_overwritten(refused, whole):
    run = whole()
    before = files_in(run)
    for resume in (False, True):
        assert f"--output-dir {run}" in refused(resume=resume, output_dir=str(run))
    assert files_in(run) == before


def test_interrupted_run_is_never_lost(script, refused, tiny, tmp_path, starts):
    """Neither a second start, nor --resume with another flag, nor a broken checkpoint touches its files."""
    length = {"total_episodes": 48} if script.is_sampler else {}
    assert interrupt(script, tiny(**length), 2, signal.SIGTERM)
    run = tmp_path / "run"
    before = files_in(run)
    assert "--resume" in refused()
    for flag in script.flags:
        if flag in INERT:
            continue
        value = option(script, flag, starts)
        error = refused(resume=True, **{**length, flag: value})
        if flag in ("dataset", "eval_dataset", "reward"):  # which may move, with the same content
            assert "--resume" in error and "the data or a reward has changed" in error
        elif flag == "model":
            assert "--resume" in error and "the model to start from has changed" in error
        else:
            assert f"--{flag.replace('_', '-')} is {value}" in error
    assert files_in(run) == before
    checkpoint = run / "state" / "checkpoint.pt"
    checkpoint.write_bytes(before[checkpoint][:5000])
    error = refused(resume=True)
    assert "--resume" in error and "checkpoint.pt" in error
    assert (run / "metrics.jsonl").read_bytes() == before[run / "metrics.jsonl"]


def test_data_that_changed_under_its_name(script, refused, tiny, tmp_path):
    """The position in the data of a checkpoint means nothing in another file."""
    path = write(tmp_path / "rows.jsonl", script.rows(0, 10))
    assert interrupt(script, tiny(dataset=path), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    write(tmp_path / "rows.jsonl", script.rows(0, 9))
    error = refused(dataset=path, resume=True)
    assert "--resume" in error and "the data or a reward has changed" in error


def test_checkpoint_that_is_a_pickle_is_refused(refused, tmp_path):
    """torch.load(weights_only=True): an object of any class in a checkpoint would run its code."""
    (tmp_path / "run" / "state").mkdir(parents=True)
    torch.save({"args": Killed()}, tmp_path / "run" / "state" / "checkpoint.pt")
    assert "checkpoint.pt" in refused(resume=True)
