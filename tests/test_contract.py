"""The contract that every script keeps, whatever its algorithm: bad input, determinism, resuming, the folder
of a run, the bookkeeping of steps, the rules of the house, and the embedded world. Runs are tiny and in this
process; a subprocess only where a process matters.
"""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import gold_reward as gold
import make_world
import pytest
import torch
import transformers
import tyro
from conftest import CHAT_TEMPLATE, ROOT
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpo
import sft

DATA = ROOT / "data"
SCRIPTS = {"sft": sft, "dpo": dpo}
TRAIN = {"sft": "demonstrations", "dpo": "preferences"}
GOOD = {"sft": {"prompt": "review of the plot :", "completion": " the plot was good ."},
        "dpo": {"prompt": "review of the plot :", "chosen": " the plot was good .", "rejected": " it was ."}}
SIDES = {"sft": ["completion"], "dpo": ["chosen", "rejected"]}


# ---- Tiny runs ----


def read(path) -> list[dict]:
    return list(map(json.loads, Path(path).read_text().splitlines()))


def write(path, rows) -> str:
    """Rows (dicts, or lines of text) to a .jsonl file."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def head(name, first, last) -> list[dict]:
    return read(DATA / f"{name}.jsonl")[first:last]


def launch(script, args):
    """script.main(args), and the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return script.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """Two model folders with weights, from two steps of sft.py each; files of ten rows and four held out."""
    folder = tmp_path_factory.mktemp("starts")
    for script, name in TRAIN.items():
        write(folder / f"{script}.jsonl", head(name, 0, 10))
        write(folder / f"{script}_held_out.jsonl", head(f"{name}_test", 0, 4))
    for seed in (1, 2):
        launch(sft, sft.Args(
            model=str(DATA / "model"), dataset=str(folder / "sft.jsonl"), num_train_epochs=1, batch_size=5,
            micro_batch_size=5, eval_dataset=str(folder / "sft_held_out.jsonl"), warmup_steps=0,
            eval_samples=1, output_dir=str(folder / f"run{seed}"), seed=seed, device="cpu"))
    return folder


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


@pytest.fixture
def tiny(name, tmp_path, starts):
    """tiny(**flags) -> Args of a run of three steps, 4 + 4 + 2 rows, in tmp_path/run."""

    def make(**flags):
        defaults = {
            "model": str(DATA / "model" if name == "sft" else starts / "run1" / "model"),
            "dataset": str(starts / f"{name}.jsonl"), "eval_dataset": str(starts / f"{name}_held_out.jsonl"),
            "num_train_epochs": 1, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3,
            "warmup_steps": 0, "eval_every": 0, "eval_samples": 4, "max_new_tokens": 8, "save_every": 0,
            "device": "cpu"}
        return SCRIPTS[name].Args(**{**defaults, "output_dir": str(tmp_path / "run"), **flags})

    return make


@pytest.fixture
def go(script, tiny, tmp_path):
    """go(folder, **flags) runs the script in tmp_path/folder and returns that path."""

    def run(folder, **flags):
        launch(script, tiny(output_dir=str(tmp_path / folder), **flags))
        return tmp_path / folder

    return run


def timeless(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def result(run):
    """What must not depend on interruptions nor on the process: metrics but the timing, samples, weights."""
    digests = [hashlib.sha256((run / file).read_bytes()).hexdigest()
               for file in ("samples.jsonl", "model/model.safetensors")]
    return timeless(read(run / "metrics.jsonl")), digests


@contextlib.contextmanager
def at_step(number, action):
    """Call `action` within the optimizer step of this number."""
    steps = itertools.count(1)
    hook = register_optimizer_step_pre_hook(lambda *_: action() if next(steps) == number else None)
    try:
        yield
    finally:
        hook.remove()


class Killed(BaseException):
    """What nothing catches: stands for kill -9 and for a power cut."""


def kill():
    raise Killed


def interrupt(script, args, step, number) -> int:
    """Send the process a signal within this step; the exit code, or 0 when main returns."""
    try:
        with at_step(step, lambda: os.kill(os.getpid(), number)):
            launch(script, args)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def refused(script, tiny, capsys):
    """refused(**flags): the run ends with exit code 2 and one line "error: ..." on stderr, returned."""

    def run(**flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            launch(script, tiny(**flags))
        line = capsys.readouterr().err
        assert stop.value.code == 2
        assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1, line
        return line

    return run


# ---- 1. Bad input ----

PROMPT, LONG = "review of the plot :", "very " * 600
ASK, REPLY, REFUSE = ({"role": role, "content": text} for role, text in (
    ("user", "a film ?"), ("assistant", "it was good ."), ("assistant", "it was bad .")))
BAD_ROWS = {  # the second of two rows, what the error must name besides file:2, of which script
    "not JSON": ('{"prompt": "what', [], "sft dpo"),
    "not an object": ("[1, 2]", [], "sft dpo"),
    "missing columns": ({"prompt": PROMPT, "colour": "red"}, ["prompt", "colour"], "sft dpo"),
    "a number as prompt": ({"prompt": 5, "completion": "", "chosen": "a", "rejected": "b"}, ["prompt"],
                           "sft dpo"),
    "a null": ({"prompt": PROMPT, "completion": None, "chosen": None, "rejected": " b"}, [], "sft dpo"),
    "long prompt": ({"prompt": LONG, "completion": " good", "chosen": " good", "rejected": " bad"},
                    ["--max-length"], "sft dpo"),
    "no chat template": ({"prompt": [ASK], "completion": [REPLY], "chosen": [REPLY], "rejected": [REFUSE]},
                         ["chat template"], "sft dpo"),
    "no chat template for messages": ({"messages": [ASK, REPLY]}, ["chat template"], "sft"),
    "no chat template, implicit prompt": ({"chosen": [ASK, REPLY], "rejected": [ASK, REFUSE]},
                                          ["chat template"], "dpo"),
    "no shared beginning": ({"chosen": "good", "rejected": "bad"}, ["prompt"], "dpo"),
    "numbers without prompt": ({"chosen": 5, "rejected": 6}, [], "dpo"),
    "text and messages without prompt": ({"chosen": "good", "rejected": [ASK, REFUSE]}, [], "dpo"),
    **{f"mu {mu!r}": ({**GOOD["dpo"], "mu": mu}, ["mu", repr(mu)], "dpo")
       for mu in (1.5, -0.25, "high", "0.5", True, None, [1], math.nan)},
}


@pytest.mark.parametrize("name, case", [(name, case) for case, (*_, names) in BAD_ROWS.items()
                                        for name in names.split()])
def test_bad_row_is_named(refused, tmp_path, name, case):
    row, words, _ = BAD_ROWS[case]
    error = refused(dataset=write(tmp_path / "rows.jsonl", [GOOD[name], row]))
    assert "rows.jsonl:2" in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name", ["sft"])
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_rows_without_a_token_to_train(refused, tmp_path, flag):
    assert "rows.jsonl" in refused(**{flag: write(tmp_path / "rows.jsonl", [{"text": ""}] * 2)})


@pytest.mark.parametrize("lines", [[], ["", "  "]], ids=["empty", "blank lines"])
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_empty_file_is_named(refused, tmp_path, lines, flag):
    assert "none.jsonl" in refused(**{flag: write(tmp_path / "none.jsonl", lines)})


BAD_FLAGS = {
    "batches": ({"batch_size": 4, "micro_batch_size": 3}, ["--batch-size 4", "--micro-batch-size 3"]),
    "larger micro-batch": ({"batch_size": 4, "micro_batch_size": 8}, ["--batch-size", "--micro-batch-size"]),
    **{f"{flag} {value}": ({flag: value}, ["--" + flag.replace("_", "-"), str(value)])
       for flag in ("batch_size", "micro_batch_size", "num_train_epochs", "max_length", "eval_samples",
                    "max_new_tokens") for value in (0, -4)},
    "missing file": ({"dataset": "/nowhere/rows.jsonl"}, ["/nowhere/rows.jsonl"]),
    "missing held-out file": ({"eval_dataset": "/nowhere/rows.jsonl"}, ["/nowhere/rows.jsonl"]),
    "nothing as data set": ({"dataset": "nothing"}, ["nothing"]),
    "folder as data set": ({"dataset": str(DATA)}, [str(DATA)]),
    "nothing as model": ({"model": "nothing"}, ["--model nothing"]),
    "missing model": ({"model": str(DATA / "nothing")}, ["--model", str(DATA / "nothing")]),
    "folder without model": ({"model": str(ROOT / "tests")}, ["--model", str(ROOT / "tests")]),
    "file as output": ({"output_dir": str(DATA / "prompts.jsonl")}, ["--output-dir"]),
    "no checkpoint": ({"resume": True}, ["--resume", "checkpoint"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag_is_named(refused, case):
    flags, words = BAD_FLAGS[case]
    error = refused(**flags)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name", ["dpo"])
def test_ipo_at_beta_0_has_no_target(refused):
    assert "--beta" in refused(beta=0.0, loss_type="ipo")


@pytest.mark.parametrize("flags, words", [({"dataset": "owner/rows"}, "pip install datasets"),
                                          ({"track": True}, "pip install wandb")], ids=["datasets", "wandb"])
def test_missing_package_is_named(refused, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, words.split()[-1], None)
    assert words in refused(**flags)


def test_no_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refused(device="cuda")


def copy_model(starts, folder, drop="", **files):
    """A model folder less one file and with other contents in some: tokenizer_config__json=b"..."."""
    shutil.copytree(starts / "run1" / "model", folder)
    if drop:
        (folder / drop).unlink()
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_bytes(content)
    return folder


@pytest.mark.parametrize("files", [
    {"config__json": b"{"}, {"config__json": b'{"model_type": "nothing"}'}, {"tokenizer__json": b"{"},
    {"drop": "tokenizer.json"}, {"model__safetensors": b"not a header"}],
    ids=["config", "model type", "tokenizer", "no tokenizer", "weights"])
def test_broken_model_folder(refused, starts, tmp_path, files):
    folder = copy_model(starts, tmp_path / "model", **files)
    assert f"--model {folder}" in refused(model=str(folder))


def test_weights_of_another_size(refused, starts, tmp_path):
    config = json.loads((starts / "run1" / "model" / "config.json").read_text())
    folder = copy_model(starts, tmp_path / "model",
                        config__json=json.dumps({**config, "intermediate_size": 128}).encode())
    assert "--model" in refused(model=str(folder))


def test_weights_that_are_missing(refused, starts, tmp_path):
    """transformers draws them at random and says so in a warning that the scripts silence."""
    config = json.loads((starts / "run1" / "model" / "config.json").read_text())
    folder = copy_model(starts, tmp_path / "model",
                        config__json=json.dumps({**config, "num_hidden_layers": 3}).encode())
    assert "--model" in refused(model=str(folder))


def test_row_longer_than_the_models_positions(refused, starts, tmp_path):
    """GPT-2 looks its positions up in a table: a row longer than it ends in an index error."""
    folder = copy_model(starts, tmp_path / "model", drop="model.safetensors")
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=size, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1,
    )).save_pretrained(folder)
    assert "--max-length" in refused(model=str(folder))


def test_only_safetensors_are_read(refused, starts, tmp_path):
    folder = copy_model(starts, tmp_path / "model", drop="model.safetensors")
    torch.save(load_file(starts / "run1" / "model" / "model.safetensors"), folder / "pytorch_model.bin")
    assert f"--model {folder}" in refused(model=str(folder))


def test_poisoned_weights(refused, starts, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(starts / "run1" / "model")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = math.nan
    folder = copy_model(starts, tmp_path / "model")
    model.save_pretrained(folder)
    refused(model=str(folder))
    assert not (tmp_path / "run" / "model").exists()


def test_divergence_names_step_and_learning_rate(refused, tmp_path):
    error = refused(learning_rate=1e30)
    assert "step 2" in error and "--learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


def test_divergence_in_the_last_step(refused, tmp_path):
    """The last update, too, may ruin the model: the evaluation behind it shows it."""
    assert "--learning-rate" in refused(learning_rate=1e39, batch_size=12)
    assert not (tmp_path / "run" / "model").exists()


def test_nan_keeps_the_last_checkpoint(script, refused, tiny, go, monkeypatch, tmp_path):
    """The loss turns NaN at step 6. The checkpoint is that of step 4, and resuming from it is a good run."""
    flags, forwards = {"num_train_epochs": 3, "save_every": 2}, itertools.count(1)
    score = script.sequence_logprobs

    def poisoned(*args, **options):
        scores = score(*args, **options)
        if not torch.is_grad_enabled() or next(forwards) != 6:
            return scores
        return tuple(x * math.nan for x in scores) if isinstance(scores, tuple) else scores * math.nan

    with monkeypatch.context() as patch:
        patch.setattr(script, "sequence_logprobs", poisoned)
        assert "step 6" in refused(**flags)
    checkpoint = tmp_path / "run" / "state" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert not (tmp_path / "run" / "model").exists()
    assert result(go("run", **flags, resume=True)) == result(go("whole", **flags))


def test_finished_run_is_never_overwritten(refused, go):
    run = go("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for resume in (False, True):
        assert f"--output-dir {run}" in refused(resume=resume)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_interrupted_run_is_never_lost(script, refused, tiny, tmp_path, starts):
    """Neither a second start, nor --resume with another flag, nor a broken checkpoint touches its files."""
    assert interrupt(script, tiny(), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "--resume" in refused()
    changes = {"learning_rate": 2e-3, "seed": 9, "batch_size": 8, "num_train_epochs": 2, "max_length": 99,
               "model": str(starts / "run2" / "model"), "dataset": tiny().eval_dataset,
               **({"beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.1} if script is dpo else {})}
    for flag, value in changes.items():
        error = refused(resume=True, **{flag: value})
        assert f"--{flag.replace('_', '-')} is {value}" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "state" / "checkpoint.pt").write_bytes(before[run / "state" / "checkpoint.pt"][:5000])
    error = refused(resume=True)
    assert "--resume" in error and "checkpoint.pt" in error
    assert (run / "metrics.jsonl").read_bytes() == before[run / "metrics.jsonl"]


def test_checkpoint_that_is_a_pickle_is_refused(refused, tmp_path):
    """torch.load(weights_only=True): an object of any class in a checkpoint would run its code."""
    (tmp_path / "run" / "state").mkdir(parents=True)
    torch.save({"args": Killed()}, tmp_path / "run" / "state" / "checkpoint.pt")
    assert "checkpoint.pt" in refused(resume=True)


def run_python(*arguments, cwd=ROOT, **environment):
    """`python arguments` as a process of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=120)


def as_flags(args) -> list[str]:
    """An Args as a command line."""
    flags = {field.name.replace("_", "-"): getattr(args, field.name) for field in dataclasses.fields(args)}
    return list(itertools.chain.from_iterable(
        [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        for flag, value in flags.items()))


@pytest.mark.parametrize("name", ["sft"])
def test_bad_row_in_a_process(name, tiny, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD[name], '{"prompt": '])
    process = run_python(f"{name}.py", *as_flags(tiny(dataset=path)))
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {path}:2: ") and process.stderr.count("\n") == 1
    assert "Traceback" not in process.stderr + process.stdout


@pytest.mark.parametrize("flags", [["--lerning-rate", "1"], ["--learning-rate", "fast"], ["--device", "tpu"]],
                         ids=" ".join)
def test_wrong_flag(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


# ---- 2. and 3. Determinism, resuming ----


def test_same_command_same_files(name, tiny, go, tmp_path):
    """In this process, and in another one with another hash seed."""
    flags = {"eval_every": 2, "save_every": 2, "num_train_epochs": 2}
    first = result(go("first", **flags))
    second = tiny(**flags, output_dir=str(tmp_path / "second"))
    process = run_python(f"{name}.py", *as_flags(second), PYTHONHASHSEED="17")
    assert process.returncode == 0, process.stderr
    assert result(tmp_path / "second") == first
    assert len(first[0]) == 6 + 4  # steps and evaluations: after 0, 2, 4 and 6


def test_the_seed_matters(go):
    assert result(go("first")) != result(go("second", seed=2))


LONG_RUN = {"num_train_epochs": 3, "eval_every": 2, "save_every": 2}  # 9 steps: 3 times 4, 4, 2 rows


@pytest.mark.parametrize("stops", [
    [(3, signal.SIGTERM)], [(3, signal.SIGINT)], [(1, signal.SIGTERM)], [(4, signal.SIGINT)],
    [(2, signal.SIGTERM), (3, signal.SIGINT), (1, signal.SIGTERM)]], ids=str)
def test_resume_after_a_signal(script, tiny, go, stops, capsys):
    """Each stop is (step since the last start, signal)."""
    for k, (step, number) in enumerate(stops):
        assert interrupt(script, tiny(**LONG_RUN, resume=k > 0), step, number) == 128 + number
        assert "--resume" in capsys.readouterr().out
    assert result(go("run", **LONG_RUN, resume=True)) == result(go("whole", **LONG_RUN))


def test_signal_in_the_last_step(script, tiny, go, tmp_path):
    """Whether it stops there or finishes: nothing of the run may be missing in the end."""
    if interrupt(script, tiny(**LONG_RUN), 9, signal.SIGTERM):
        go("run", **LONG_RUN, resume=True)
    assert result(tmp_path / "run") == result(go("whole", **LONG_RUN))


def test_resume_after_a_kill_drops_later_log_lines(script, tiny, go, tmp_path):
    with pytest.raises(Killed), at_step(4, kill):
        launch(script, tiny(**LONG_RUN))
    steps = [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 2, 3]  # the checkpoint is that of step 2, before its evaluation
    assert torch.load(tmp_path / "run" / "state" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert result(go("run", **LONG_RUN, resume=True)) == result(go("whole", **LONG_RUN))


def test_resume_after_a_kill_within_a_checkpoint(script, tiny, go, monkeypatch):
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
    assert result(go("run", **LONG_RUN, resume=True)) == result(go("whole", **LONG_RUN))


def test_resume_after_a_kill_behind_the_last_step(script, tiny, go, monkeypatch):
    """The last checkpoint is that of the last step: only the evaluation and the model are missing."""
    flags = {**LONG_RUN, "save_every": 3}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "save_model", lambda *_: kill())
        launch(script, tiny(**flags))
    assert result(go("run", **flags, resume=True)) == result(go("whole", **flags))


def test_resume_may_change_what_changes_no_number(script, tiny, go):
    assert interrupt(script, tiny(), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    resumed = go("run", resume=True, save_every=1, micro_batch_size=2)
    assert numbers(resumed) == approx_rows(numbers(go("whole")), 1e-4)


# ---- 4. The run folder ----


@pytest.fixture
def trained(script, monkeypatch):
    """The model at the moment it is saved: trained["model"]."""
    seen, save_model = {}, script.save_model

    def capture(*args):
        seen["model"] = next(arg for arg in args if isinstance(arg, torch.nn.Module))
        return save_model(*args)

    monkeypatch.setattr(script, "save_model", capture)
    return seen


def test_run_folder(name, script, tiny, go):
    run = go("run", eval_every=1, save_every=1)
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", "model"}  # and no state/
    record = json.loads((run / "args.json").read_text())
    flags = dataclasses.asdict(tiny(eval_every=1, save_every=1, output_dir=str(run)))
    assert {key: record[key] for key in flags} == flags
    assert record["torch"] == torch.__version__ and record["transformers"] == transformers.__version__
    assert record["device"] == "cpu" and 0 < record["seconds"] < 600
    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]
    shared = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second", "epoch"}
    lengths = {"step", "eval/loss", "completions/mean_length", "completions/eos_rate"}
    more = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
            "logps/rejected"} if name == "dpo" else {"mean_token_accuracy"}
    assert set(rows[1]) == shared | more
    assert set(rows[0]) == set(rows[2]) == lengths | {f"eval/{key}" for key in more}
    samples = read(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert all(set(row) == {"step", "prompt", "completion"} for row in samples)
    held_out = head(f"{TRAIN[name]}_test", 0, 4)
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in held_out] * 4


def test_main_returns_the_last_metrics(script, tiny, tmp_path):
    last = launch(script, tiny())
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert {**rows[-2], **rows[-1]} == {"step": 3, **last}


def test_saved_model_is_the_trained_one(go, trained):
    run = go("run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    text = PROMPT + GOOD["sft"]["completion"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained["model"].eval()(ids).logits)
    files = {path.name for path in (run / "model").iterdir()}
    assert "model.safetensors" in files and not any(file.endswith((".bin", ".pt")) for file in files)


def test_saved_model_generates_to_eos(go):
    run = go("run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    assert eos == [tokenizer.eos_token_id] and pad not in eos
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * 64)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=48)
    rows = rows[:, ids.shape[1] :]
    ended = [row.index(eos[0]) for row in rows.tolist() if eos[0] in row]
    assert len(ended) > 4 and min(ended) < 40
    for row in rows.tolist():
        assert eos[0] not in row or set(row[row.index(eos[0]) + 1 :]) <= {pad}


def test_pad_that_is_eos_and_several_eos(name, go, starts, tmp_path):
    """Many models pad with their EOS and chat models end with any of several: EOS is trained all the same."""
    tokenizer = json.loads((starts / "run1" / "model" / "tokenizer_config.json").read_text())
    folder = copy_model(starts, tmp_path / "model", generation_config__json=b'{"eos_token_id": [7, 1]}',
                        tokenizer_config__json=json.dumps({**tokenizer, "pad_token": "<eos>"}).encode())
    run = go("run", model=str(folder))
    saved = transformers.GenerationConfig.from_pretrained(run / "model")
    assert saved.eos_token_id == [1, 7] and saved.pad_token_id not in (1, 7)
    num_tokens = read(run / "metrics.jsonl")[-2]["num_tokens"]
    assert num_tokens == sum(map(count_tokens, read(starts / f"{name}.jsonl")))


def test_chat_template_is_saved(name, go, starts, tmp_path):
    """Message lists train with a chat template, and the template travels with the model."""
    folder = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    rows = {"sft": [{"messages": [ASK, reply]} for reply in (REPLY, REFUSE)],
            "dpo": [{"prompt": [ASK], "chosen": [REPLY], "rejected": [REFUSE]}] * 2}
    path = write(tmp_path / "chat.jsonl", rows[name])
    run = go("run", model=str(folder), dataset=path, eval_dataset=path)
    assert transformers.AutoTokenizer.from_pretrained(run / "model").chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("name", ["dpo"])
def test_implicit_prompt_of_messages(go, starts, tmp_path):
    """The same rows with their prompt given and shared (UltraFeedback, HH as messages): the same run."""
    folder = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    sides = [(REPLY, REFUSE), (REFUSE, REPLY)]
    runs = []
    for kind, rows in (("given", [{"prompt": [ASK], "chosen": [a], "rejected": [b]} for a, b in sides]),
                       ("shared", [{"chosen": [ASK, a], "rejected": [ASK, b]} for a, b in sides])):
        path = write(tmp_path / f"{kind}.jsonl", rows)
        runs.append(result(go(kind, model=str(folder), dataset=path, eval_dataset=path)))
    assert runs[0] == runs[1]


@pytest.fixture
def half_model(starts, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(starts / "run1" / "model", dtype=torch.bfloat16)
    folder = copy_model(starts, tmp_path / "half")
    model.save_pretrained(folder)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    return folder


def test_bf16_checkpoint_trains_in_fp32(go, half_model):
    """A step of 1e-6 does not move a bf16 weight of 0.05, whose grid is 2e-4: each matrix must move."""
    run = go("run", model=str(half_model), learning_rate=1e-6, anneal_lr=False)
    before = load_file(half_model / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert transformers.AutoModelForCausalLM.from_pretrained(run / "model").dtype == torch.float32
    assert set(after) == set(before) and len(after) > 15
    for key, weight in after.items():
        change = (weight - before[key].float()).abs()
        assert change.max() < 4e-6, key  # 3 steps of AdamW
        if weight.dim() == 2:
            assert (change > 0).float().mean() > 0.9, key


# ---- 5. and 6. Micro-batches, bookkeeping ----


@pytest.fixture
def ragged(name, tmp_path):
    """Rows of very different lengths: equal lengths hide every aggregation bug."""
    rows = head(TRAIN[name], 0, 20)
    rows = [{key: value[: 20 + 13 * (i % 4)].rsplit(" ", 1)[0] if key in SIDES[name] else value
             for key, value in row.items()} for i, row in enumerate(rows)]
    return write(tmp_path / "ragged.jsonl", rows)


def approx_rows(want, tolerance):
    """An implicit reward is a difference of log-probs of 50 nats, which fp32 holds to 4e-6."""
    approx = lambda value: pytest.approx(value, rel=tolerance, abs=1e-5)
    return [{key: approx(value) for key, value in row.items()} for row in want]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_change_nothing(go, ragged, micro):
    flags = {"dataset": ragged, "batch_size": 8, "eval_every": 1}  # 20 rows: 8, 8, 4
    whole, parts = go("whole", **flags, micro_batch_size=8), go("parts", **flags, micro_batch_size=micro)
    logged = numbers(whole), numbers(parts)
    for first_step in (logged[0][1], logged[1][1]):  # pi = pi_ref: the sign of a margin of 0 is rounding
        assert abs(first_step.get("rewards/margins", 0.0)) < 1e-5
        first_step.pop("rewards/accuracies", None)
    assert logged[1] == approx_rows(logged[0], 1e-4)
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    for key, weight in a.items():
        assert (weight - b[key]).abs().max() < 1e-4, key  # a tenth of one step at the learning rate of 1e-3


def count_tokens(row) -> int:
    """num_tokens of a row of the world, where each word is a token: trained ones of sft, all of dpo."""
    if "completion" in row:
        return len(row["completion"].split()) + 1
    return sum(len((row["prompt"] + row[side]).split()) + 1 for side in ("chosen", "rejected"))


@pytest.fixture
def batches(script, monkeypatch):
    """The rows of each training forward pass, as collate gets them."""
    seen, collate = [], script.collate

    def record(rows, *args):
        if torch.is_grad_enabled():
            seen.append(list(map(repr, rows)))
        return collate(rows, *args)

    monkeypatch.setattr(script, "collate", record)
    return seen


def test_each_row_once_an_epoch(name, go, batches, starts):
    """10 rows, batch 4, 3 epochs: 9 steps, the last of an epoch smaller, in another order each epoch."""
    run = go("run", num_train_epochs=3)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    rows = [row for row in read(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["epoch"] for row in rows] == pytest.approx([step / 3 for step in range(1, 10)])
    total = sum(map(count_tokens, read(starts / f"{name}.jsonl")))
    assert [rows[i]["num_tokens"] for i in (2, 5, 8)] == [total, 2 * total, 3 * total]


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates(go, warmup, anneal):
    peak, steps = 1e-3, 9
    rows = read(go("run", num_train_epochs=3, warmup_steps=warmup, anneal_lr=anneal) / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    rising = [peak * (k + 1) / warmup for k in range(warmup)]
    falling = [peak * (1 - k / (steps - warmup)) if anneal else peak for k in range(steps - warmup)]
    assert rates == pytest.approx(rising + falling, rel=1e-9)
    assert rates[0] > 0 and max(rates) == peak
    if anneal:
        assert rates[-1] == pytest.approx(peak / (steps - warmup))


def test_logged_learning_rate_is_the_one_used(go):
    """AdamW's first step moves each weight by the learning rate, whatever the gradient."""
    flags = {"batch_size": 12, "micro_batch_size": 12, "anneal_lr": False, "max_grad_norm": 1e9}
    runs = [go(f"run{lr}", learning_rate=lr, **flags) for lr in (0.0, 1e-3)]
    a, b = (load_file(run / "model" / "model.safetensors") for run in runs)
    moves = torch.cat([(a[key] - b[key]).abs().flatten() for key in a if a[key].dim() == 2])
    assert moves.median().item() == pytest.approx(1e-3, rel=1e-3)


# ---- 8. and 9. Options ----

INERT = {"output_dir", "resume", "micro_batch_size", "save_every", "device", "gradient_checkpointing",
         "track", "wandb_project_name"}  # these must not change a number; each has its own test in this file
OPTIONS = {
    "model": "run2/model", "dataset": "other.jsonl", "eval_dataset": "other.jsonl", "seed": 2,
    "num_train_epochs": 2, "batch_size": 8, "max_length": 12, "learning_rate": 2e-3, "warmup_steps": 2,
    "anneal_lr": False, "weight_decay": 1.0, "max_grad_norm": 1e-6, "eval_every": 1, "eval_samples": 1,
    "max_new_tokens": 3, "dtype": "bfloat16", "beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.2}


def flags_of(script) -> list[str]:
    return [field.name for field in dataclasses.fields(script.Args)]


def numbers(run) -> list[dict]:
    """What a run measures: no timing, and no echo of a flag."""
    return [{key: value for key, value in row.items() if key != "learning_rate"}
            for row in timeless(read(run / "metrics.jsonl"))]


@pytest.mark.parametrize("name, flag", [(name, flag) for name, script in SCRIPTS.items()
                                        for flag in flags_of(script) if flag not in INERT])
def test_option_does_something(go, starts, tmp_path, name, flag):
    """Two steps with a changed flag measure something else, by more than rounding."""
    value = OPTIONS[flag]
    if flag == "model":
        value = str(starts / value)
    elif flag in ("dataset", "eval_dataset"):
        value = write(tmp_path / value, head(TRAIN[name], 50, 58))
    short = write(tmp_path / "short.jsonl", head(TRAIN[name], 0, 8))
    before, after = (numbers(go(kind, **{"dataset": short, "max_new_tokens": 40, **changed}))
                     for kind, changed in (("before", {}), ("after", {flag: value})))
    assert len(before) == 4
    assert [set(row) for row in after] != [set(row) for row in before] or after != approx_rows(before, 1e-6)


def test_gradient_checkpointing_changes_no_number(go, trained):
    """Nor a sample: transformers turns the cache off in a checkpointed model that is in training mode."""
    runs, enabled = [], []
    for value in (False, True):
        runs.append(go(f"run {value}", gradient_checkpointing=value))
        layers = trained["model"].modules()
        enabled.append(any(getattr(layer, "gradient_checkpointing", False) for layer in layers))
    assert enabled == [False, True]
    assert numbers(runs[1]) == approx_rows(numbers(runs[0]), 1e-5)
    assert read(runs[1] / "samples.jsonl")[:4] == read(runs[0] / "samples.jsonl")[:4]


def test_evaluation_and_checkpoints_change_no_training(go):
    """Neither evaluating, sampling nor saving draws from the noise of training."""
    never, always = go("never"), go("always", eval_every=1, save_every=1, eval_samples=2, max_new_tokens=5)
    rows = [[row for row in numbers(run) if "loss" in row] for run in (never, always)]
    assert len(rows[0]) == 3 and rows[0] == rows[1]
    assert result(never)[1][1] == result(always)[1][1]  # the weights


def test_wandb_gets_what_the_file_gets(go, monkeypatch):
    """A stand-in for the package, which the tests must not need: init and log are all that is called."""
    calls = []
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options),
                                  log=lambda metrics, step: calls.append({"step": step, **metrics}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = go("named", track=True, wandb_project_name="films")
    assert calls[0]["project"] == "films" and calls[0]["config"]["learning_rate"] == 1e-3
    assert calls[1:] == read(run / "metrics.jsonl")


# ---- 7. The house ----

BUDGETS = {"bandit_bt": 320, "sft": 300, "reward_model": 394, "dpo": 360, "grpo": 420, "ppo": 530,
           "common": 575}
SOURCES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
HOUSE = [stem for stem in SOURCES if stem != "common"]
BY_DESIGN = {"main", "evaluate", "collate", "forward", "Args"}  # the same name in every script, and not the same code


def test_the_house_is_complete():
    assert {"sft", "dpo", "common"} <= set(SOURCES) <= set(BUDGETS)


@pytest.mark.parametrize("stem", SOURCES)
def test_size(stem):
    tree = ast.parse(SOURCES[stem])
    assert len(SOURCES[stem].splitlines()) <= BUDGETS[stem]
    assert 1 <= len(ast.get_docstring(tree).splitlines()) <= 30
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            assert len(node.body) <= 35


@pytest.mark.parametrize("stem", SOURCES)
def test_lines_are_finished_and_short(stem):
    assert not re.search(r"\b([T]ODO|[F]IXME|[X]XX|[H]ACK)\b|\bbreakpoint\(|pdb", SOURCES[stem])
    assert max(map(len, SOURCES[stem].splitlines())) <= 110


@pytest.mark.parametrize("stem", HOUSE)
def test_script_ends_with_the_command_line(stem):
    assert SOURCES[stem].endswith('\n\nif __name__ == "__main__":\n    main(tyro.cli(Args))\n')


@pytest.mark.parametrize("stem", HOUSE)
def test_script_imports_nothing_of_the_house_but_common(stem):
    nodes = [node for node in ast.walk(ast.parse(SOURCES[stem]))
             if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name if isinstance(node, ast.Import) else node.module
                for node in nodes for alias in node.names}
    assert "common" in imported and not imported & (set(HOUSE) | {"make_world", "gold_reward", "trl", "peft"})


def test_duplicates_are_identical():
    """A helper of the same name in two scripts is the same code to the letter, docstring included."""
    definitions = {}
    for stem in HOUSE:
        for node in ast.parse(SOURCES[stem]).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in BY_DESIGN:
                definitions.setdefault(node.name, {})[stem] = ast.get_source_segment(SOURCES[stem], node)
    shared = {key: codes for key, codes in definitions.items() if len(codes) > 1}
    assert {"load_model", "save_model", "complete"} <= set(shared)
    for key, codes in shared.items():
        assert len(set(codes.values())) == 1, f"{key} differs between {sorted(codes)}"
        assert len({ast.dump(ast.parse(code)) for code in codes.values()}) == 1
    in_common = {node.name for node in ast.parse(SOURCES["common"]).body if isinstance(node, ast.FunctionDef)}
    assert not in_common & set(definitions)


@pytest.mark.parametrize("stem", HOUSE)
def test_no_dead_flag(stem):
    fields = next(node for node in ast.parse(SOURCES[stem]).body if getattr(node, "name", "") == "Args").body
    names = {field.target.id for field in fields}
    used = {node.attr for source in (SOURCES[stem], SOURCES["common"]) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}
    assert names and names <= used, f"never read: {sorted(names - used)}"


def field_comments(stem) -> dict[str, str]:
    """Flag -> the comment behind its definition."""
    body = SOURCES[stem].split("class Args:")[1].split("\n\n\n")[0]
    return dict(re.findall(r"^    (\w+): [^\n]*?  # ([^\n]+)$", body, re.M))


def letters(text) -> str:
    return "".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_help(name, script):
    """Quick, and with a text for each flag. The goal is 3 s; twice that survives a busy machine."""
    seconds = []
    for _ in range(3):
        began = time.time()
        process = run_python(f"{name}.py", "--help", COLUMNS="100")
        seconds.append(time.time() - began)
    assert process.returncode == 0 and not process.stderr
    assert statistics.median(seconds) < 6
    comments, shown = field_comments(name), letters(process.stdout)
    assert list(comments) == flags_of(script)
    for flag, comment in comments.items():
        assert f"--{flag.replace('_', '-')}" in process.stdout
        assert " " in comment and letters(comment) in shown, flag


def test_import_has_no_side_effects(tmp_path):
    """No network, no output, no file, no package that is optional."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
            "def hook(event, args):\n"
            "    if event in ('socket.connect', 'socket.getaddrinfo'): raise SystemExit(f'{event} {args}')\n"
            "sys.addaudithook(hook)\n"
            f"import {', '.join(SOURCES)}\n"
            "found = {'datasets', 'wandb', 'tensorboard', 'trl'} & set(sys.modules)\n"
            "sys.exit(f'imports {found}' if found else 0)")
    process = run_python("-c", code, cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- 10. The embedded world ----


@pytest.fixture(scope="module")
def texts():
    """Every text of every row in data/, once."""
    found = set()
    for path in DATA.glob("*.jsonl"):
        for row in read(path):
            for value in row.values():
                found.update([value] if isinstance(value, str) else value if isinstance(value, list) else [])
    return sorted(text for text in found if isinstance(text, str))


def test_committed_files_are_what_the_generator_writes():
    world = make_world.world()
    files = {path.relative_to(DATA).as_posix(): path.read_text() for path in DATA.rglob("*") if path.is_file()
             and "__pycache__" not in path.parts and path.suffix != ".py"}
    assert set(files) == set(world)
    assert [file for file in files if files[file] != world[file]] == []
    assert sum(len(text.encode()) for text in files.values()) < 6_000_000


def test_every_text_survives_the_tokenizer(texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "model")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert len(texts) > 20_000
    assert not [text for text, row in zip(texts, ids) if tokenizer.unk_token_id in row or not row]
    assert tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) == texts
    words = [len(row) == len(text.split()) for text, row in zip(texts, ids) if not re.search("[0-9]", text)]
    assert all(words) and len(words) > 20_000


def test_held_out_prompts_are_held_out():
    prompts = {path.stem: {row["prompt"] for row in read(path)} for path in DATA.glob("*.jsonl")}
    stems = ("prompts", "demonstrations", "preferences", "rankings")
    reviews = set().union(*(prompts[stem] for stem in stems))
    held_out = set().union(*(prompts[f"{stem}_test"] for stem in stems))
    assert (len(reviews), len(held_out), len(reviews & held_out)) == (48, 12, 0)
    assert not prompts["sums_prompts_test"] & (prompts["sums"] | prompts["sums_prompts"])
    assert prompts["sums"] == prompts["sums_prompts"]
    assert len(prompts["sums_prompts"] | prompts["sums_prompts_test"]) == 900


def probability(text, aspect) -> float:
    """Of a response under the grammar's tables, summed over its derivations."""
    verbs = set(sum(make_world.VERBS.values(), []))
    mood_of = {word: "positive" if value > 0 else "negative" if value < 0 else "neutral"
               for word, value in gold.VALUES.items()}

    def word_of(word, verb):
        if word not in mood_of or (word in verbs) != verb:
            return 0.0
        rivals = [w for w, mood in mood_of.items() if mood == mood_of[word] and (w in verbs) == verb]
        return make_world.MOODS[mood_of[word]] / len(rivals)

    def rest(slots, words):
        if not slots or not words:
            return float(not slots and not words)
        slot, word = slots[0], words[0]
        if slot == "V":
            return word_of(word, True) and word_of(word, True) * rest(slots[1:], words[1:])
        if slot != "S":
            return rest(slots[1:], words[1:]) if word == (aspect if slot == "X" else slot) else 0.0
        bare = make_world.BOOSTS[""] * word_of(word, False)
        total = bare and bare * rest(slots[1:], words[1:])
        if word in ("very", "slightly") and len(words) > 1:
            total += make_world.BOOSTS[word] * word_of(words[1], False) * rest(slots[1:], words[2:])
        return total

    return sum(p * q * rest(f"{opening} {closing}".split(), text.split())
               for opening, p in make_world.OPENINGS.items() for closing, q in make_world.CLOSINGS.items())


def aspect_of(prompt) -> str:
    return next(word for word in prompt.split() if word in gold.ASPECTS)


def within_3_se(values, expected):
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    assert abs(mean - expected) < 3 * error, f"{mean:.4f} +- {error:.4f}, expected {expected:.4f}"


def test_entropy_of_the_grammar():
    """-log p of draws, from a parser of responses that shares only the tables with make_world.entropy()."""
    assert math.fsum(make_world.MOODS.values()) == pytest.approx(1)
    nats, tokens = make_world.entropy()
    rng = random.Random(7)
    drawn = [make_world.response(rng, "plot") for _ in range(20_000)]
    within_3_se([-math.log(probability(text, "plot")) for text in drawn], nats)
    within_3_se([len(text.split()) + 1 for text in drawn], tokens)


def test_committed_demonstrations_follow_the_grammar():
    nats, tokens = make_world.entropy()
    rows = head("demonstrations", 0, None) + head("demonstrations_test", 0, None)
    chances = [probability(row["completion"], aspect_of(row["prompt"])) for row in rows]
    assert len(rows) == 6000 and min(chances) > 0
    within_3_se([-math.log(p) for p in chances], nats)
    within_3_se([len(row["completion"].split()) + 1 for row in rows], tokens)


def test_gold_reward_has_trls_signature():
    parameters = list(inspect.signature(gold.gold_reward).parameters.values())
    assert [p.name for p in parameters][:2] == ["prompts", "completions"]
    assert parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
    rewards = gold.gold_reward(prompts=[PROMPT] * 2, completions=["a", " ."], answer=["", ""], step=3)
    assert isinstance(rewards, list) and all(type(r) is float for r in rewards) and len(rewards) == 2
    with pytest.raises(ValueError):
        gold.gold_reward([PROMPT], ["a", "b"])
    assert gold.sum_reward(["1 + 2 ="] * 4, [" 3", "3", " 13", ""], answer=["3"] * 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("completion, praise, penalty", [  # by hand, for "review of the plot :"
    (" the plot was good and also very superb .", 1 + 1.5 * 2, 0),
    (" i hated the plot , it was slightly weak . overall it seemed very nice .", -2 - 0.5 + 1.5, 0),
    (" the plot was awful and also slightly lovely", -2 + 0.5, 2),  # never ended
    (" the music was good and also okay .", 1, 1.5),  # off topic
    (" the plot was very very good .", 1.5, 1),  # only the booster before the word counts; one neighbour
    (" the plot was good good good .", 3, 2 + 1),  # two neighbours and one third time
    (" the plot was good and also good . overall it seemed good .", 3, 1),  # a third time, apart
    (" good plot , good plot , good plot , good .", 4, 2),  # a third and a fourth; only sentiment counts
    (" the plot was plain and also plain . overall it seemed plain .", 0, 1),  # a neutral sentiment word
    ("", 0, 2 + 1.5),
    (" superb superb superb superb", 8, 2 + 1.5 + 3 + 2)])
def test_gold_reward_by_hand(completion, praise, penalty):
    assert gold.gold_reward([PROMPT], [completion]) == pytest.approx([4 * math.tanh(praise / 4) - penalty])


@pytest.mark.parametrize("file", ["preferences", "preferences_test"])
def test_preferences_follow_bradley_terry(file):
    """A pair's votes for the better side are Binomial(2, q) / 2 with q = sigma(|r_a - r_b|): E = q."""
    rows = head(file, 0, None)
    assert {row["mu"] for row in rows} == {0.5, 1.0}
    chosen, rejected = (gold.gold_reward([row["prompt"] for row in rows], [row[side] for row in rows])
                        for side in ("chosen", "rejected"))
    agreement = [row["mu"] if a >= b else 1 - row["mu"] for row, a, b in zip(rows, chosen, rejected)]
    q = [1 / (1 + math.exp(-abs(a - b))) for a, b in zip(chosen, rejected) if a != b]
    agreement = [vote for vote, a, b in zip(agreement, chosen, rejected) if a != b]
    error = sum(p * (1 - p) / 2 for p in q) ** 0.5 / len(q)
    assert abs(statistics.fmean(agreement) - statistics.fmean(q)) < 3 * error
    ties = [row["mu"] == 0.5 for row, a, b in zip(rows, chosen, rejected) if a != b]
    error = sum(2 * p * (1 - p) * (1 - 2 * p * (1 - p)) for p in q) ** 0.5 / len(q)
    assert abs(statistics.fmean(ties) - statistics.fmean(2 * p * (1 - p) for p in q)) < 3 * error


@pytest.mark.parametrize("file, size", [("rankings", 1500), ("rankings_test", 300)])
def test_rankings_follow_plackett_luce(file, size):
    """Any two of the four compare by Bradley-Terry. Each response is in three of the six pairs, so their sum
    has at most thrice the variance it would have if they were independent.
    """
    rows = head(file, 0, None)
    assert len(rows) == size
    excess, variance = 0.0, 0.0
    for row in rows:
        places = row["ranking"]
        assert len(row["completions"]) == len(places) == 4
        assert places == [1 + sum(other < place for other in places) for place in places]  # 1 is best
        rewards = gold.gold_reward([row["prompt"]] * 4, row["completions"])
        for i, j in itertools.combinations(range(4), 2):
            better, worse = (i, j) if rewards[i] >= rewards[j] else (j, i)
            p = 1 / (1 + math.exp(rewards[worse] - rewards[better]))
            won = (places[better] < places[worse]) + (places[better] == places[worse]) / 2
            excess += (won - p) * (p > 0.5)
            variance += p * (1 - p) * (p > 0.5)
    assert abs(excess) < 3 * (3 * variance) ** 0.5
