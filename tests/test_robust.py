"""What other people's folders, rewards and habits do to a run: each is used as it should be or refused in one line
before step 1, nothing of theirs is changed, and no finished step is lost.
"""

import asyncio
import contextlib
import errno
import io
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, ROOT, make_model, word_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import (
    ASK, DATA, PROMPT, REPLY, SAMPLERS, SCRIPTS, STEPWISE, copy_model, files_in, first_of, interrupt, launch,
    numbers, read, result, scripts, tiny_args, write)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import dpo
import grpo
import reward_model
from common import learning_rate, reward_function

CPU = torch.device("cpu")


def one_line(capsys, function) -> str:
    """The line on stderr with which function() ends the script, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


# ---- Folders of models ----

every_kind = pytest.mark.parametrize("name, flag, run", [("sft", "model", "run1"), ("reward_model", "model", "run1"),
                                                         ("grpo", "reward", "reward1")])


def with_weights(folder, **weights):
    """The folder with further weights in its file."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **weights}, path, {"format": "pt"})
    return folder


EXTRA = {  # weights that no class of transformers has
    "lora": "model.layers.0.self_attn.q_proj.lora_A.weight", "adapter's default": "lora_B.default.weight",
    "value head": "v_head.summary.weight", "another value head": "value_head.weight",
    "scale of 8 bits": "model.layers.1.mlp.up_proj.weight_scale", "third layer": "model.layers.2.mlp.up_proj.weight",
    "eyes": "visual.blocks.0.norm1.weight", "learned bias": "model.layers.0.self_attn.q_proj.bias"}


@every_kind
@pytest.mark.parametrize("label", EXTRA)
def test_weights_that_the_class_has_not_are_named(script, refused, starts, tmp_path, flag, run, label):
    """What is left out of a model would change what it says."""
    folder = with_weights(copy_model(starts, tmp_path / "model", run=run), **{EXTRA[label]: torch.ones(8, 64)})
    error = refused(**script.flag(flag, str(folder)))
    assert EXTRA[label] in error and f"--{flag} {folder}" in error


@pytest.mark.parametrize("name", ["sft", "dpo", *SAMPLERS])
def test_a_reward_model_is_no_policy(script, refused, starts, tmp_path):
    """Its body would be the policy, and its head would be dropped."""
    error = refused(model=str(starts / "reward1" / "model"))
    assert "score.weight" in error and "--model" in error
    assert not (tmp_path / "run").exists()


@every_kind
@pytest.mark.parametrize("with_base", [True, False])
def test_adapters_are_to_be_merged(script, refused, starts, tmp_path, flag, run, with_base):
    folder = copy_model(starts, tmp_path / "model", "" if with_base else "model.safetensors", run=run,
                        adapter_config__json=b'{"peft_type": "LORA"}')
    error = refused(**script.flag(flag, str(folder)))
    assert "adapter" in error and "merge" in error and f"--{flag} {folder}" in error


HALF = ["model.safetensors.index.json", "model.gguf", "consolidated.00.pth", "tf_model.h5", "weights.incomplete",
        "flax_model.msgpack", "pytorch_model.bin", "model-00002-of-00003.safetensors", "model.onnx", "rust_model.ot",
        "pytorch_model.bin.index.json", "model.safetensors.part", "q4_0.GGUF", "tmp8x1_k2"]


@scripts("sft")
@pytest.mark.parametrize("file", HALF)
def test_half_a_download_is_no_random_start(refused, starts, tmp_path, file):
    content = b'{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    folder = copy_model(starts, tmp_path / "model", "model.safetensors")
    (folder / file).write_bytes(content)
    assert f"--model {folder}" in refused(model=str(folder))
    assert not (tmp_path / "run").exists()


@scripts("dpo", "grpo")
def test_no_weights_at_all_are_no_reward_and_half_a_model_no_policy(script, refused, starts, tmp_path):
    for flag, kind in script.model_flags.items():
        folder = copy_model(starts, tmp_path / flag, "model.safetensors", f"{kind}1")
        (folder / "model.safetensors.index.json").write_text("{}")
        assert f"--{flag} {folder}" in refused(**script.flag(flag, str(folder)))


@scripts("sft")
def test_configuration_and_tokenizer_start_at_random(go, starts, tmp_path, capsys):
    """With what else such folders hold; from --seed alone."""
    plain = ["README.md", "LICENSE", ".gitattributes", "merges.txt", "vocab.json", "NOTICE", "USE_POLICY.md",
             "added_tokens.json", "LICENSE.txt", ".DS_Store"]
    folder = copy_model(starts, tmp_path / "model", "model.safetensors")
    for file in plain:
        (folder / file).write_text("{}")
    run = go("run", epochs=0, model=str(folder))
    assert f"{folder} holds no weights" in capsys.readouterr().out
    bare = go("bare", epochs=0)  # data/model has nothing but the two
    assert result(run) == result(bare)


SPY = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
class Scorer(LlamaForSequenceClassification): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
def generate(*inputs, **options): pass
"""


def with_code(folder, marker, files):
    """A model's folder that brings Python files, to which its configurations point."""
    for file in ("spy.py", "custom_generate/generate.py", "modeling_llama.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(SPY.format(marker=str(marker)))
    maps = {"AutoConfig": "spy.Config", "AutoModel": "spy.Model", "AutoModelForCausalLM": "spy.Model",
            "AutoModelForSequenceClassification": "spy.Scorer", "AutoTokenizer": ["spy.Tokenizer", "spy.Tokenizer"]}
    for file, options in files.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "auto_map": maps, **options}))
    return folder


CODE = {"config": {"config.json": {}}, "new type": {"config.json": {"model_type": "spy"}},
        "tokenizer": {"tokenizer_config.json": {}},
        "new class": {"tokenizer_config.json": {"tokenizer_class": "Tokenizer"}},
        "new architecture": {"config.json": {"architectures": ["Model"]}},
        "generation": {"generation_config.json": {"custom_generate": "spy.py"}},
        "all": {"config.json": {"model_type": "spy"}, "tokenizer_config.json": {"tokenizer_class": "Tokenizer"}}}


@pytest.mark.parametrize("name, flag, run", [("sft", "model", "run1"), ("grpo", "reward", "reward1")])
@pytest.mark.parametrize("label", CODE)
def test_code_of_a_folder_never_runs(script, tiny, starts, tmp_path, monkeypatch, flag, run, label):
    """Whatever stdin would answer, and though transformers would ask or just do it."""
    marker = tmp_path / "executed"
    folder = copy_model(starts, tmp_path / "model", run=run)
    with_code(folder, marker, {file: new for file, new in CODE[label].items() if (folder / file).exists()})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with contextlib.suppress(SystemExit):
        launch(script, tiny(0, **script.flag(flag, str(folder))))
    assert not marker.exists()


# ---- Models that are sampled otherwise than they are scored ----


def forget_the_padding(forward, inputs, options):
    options["attention_mask"] = None
    return forward(*inputs, **options)


def forget_the_positions(forward, inputs, options):
    """Each call counts from 0, those behind a cache too."""
    if options.get("use_cache"):
        options["position_ids"] = torch.arange(options["input_ids"].shape[1]).expand_as(options["input_ids"])
    return forward(*inputs, **options)


def forget_the_cache(forward, inputs, options):
    """A step sees the last token alone."""
    if options.get("use_cache") and options["input_ids"].shape[1] == 1:
        options["attention_mask"] = None
        for name in {"cache", "past_key_values"} & set(options):
            options[name] = transformers.DynamicCache()
    return forward(*inputs, **options)


def scale_what_is_cached(forward, inputs, options):
    output = forward(*inputs, **options)
    if options.get("use_cache"):
        output.last_hidden_state = output.last_hidden_state * 1.01
    return output


def add_noise(forward, inputs, options):
    output = forward(*inputs, **options)
    hidden = output.last_hidden_state
    output.last_hidden_state = hidden + 0.01 * torch.rand_like(hidden)
    return output


def add_noise_in_training(forward, inputs, options):
    model = forward.__self__
    return (add_noise if model.training else lambda f, i, o: f(*i, **o))(forward, inputs, options)


WRONG = [forget_the_padding, forget_the_positions, forget_the_cache, scale_what_is_cached, add_noise,
         add_noise_in_training]


@pytest.fixture
def llama_that(monkeypatch):
    """Make every Llama do something to its forward passes."""

    def change(action):
        forward = transformers.LlamaModel.forward

        def changed(self, *inputs, **options):
            return action(forward.__get__(self), inputs, options)

        monkeypatch.setattr(transformers.LlamaModel, "forward", changed)

    return change


@pytest.mark.parametrize("name, action", [
    *((name, action) for name in ("dpo", "grpo") for action in WRONG),
    *((name, action) for name in ("sft", "ppo") for action in (forget_the_padding, add_noise_in_training)),
    *(("reward_model", action) for action in (add_noise, add_noise_in_training))])
def test_a_model_that_is_wrong_is_refused_before_step_1(
    script, refused, starts, tmp_path, llama_that, action, monkeypatch
):
    """With rows that are padded; without padding, nothing of what is forgotten here is used."""
    model = str(starts / "run1" / "model")
    llama_that(action)
    if action not in (add_noise, add_noise_in_training):
        monkeypatch.setattr(common, "use_rows", lambda model: None)
    assert "Llama" in refused(model=model)
    assert not (tmp_path / "run").exists()


# ---- The folder of a run ----


def late_failures(script, tmp_path):
    """Flags that are wrong in what is read last."""
    rows = [script.row, script.row]
    bad = write(tmp_path / "bad.jsonl", [*rows, "{"])
    cases = [{"eval_dataset": bad}, {"dataset": bad}, {"model": str(tmp_path)}, {"dataset": str(tmp_path / "none")}]
    if "reward" in script.flags:
        cases += [script.flag("reward", f"{tmp_path}/none.py:f"), script.flag("reward", str(tmp_path))]
    if "max_length" in script.flags:
        long = {key: value * 30 if isinstance(value, str) else value for key, value in script.row.items()}
        cases.append({"dataset": write(tmp_path / "long.jsonl", [script.row, long])})  # over the model's positions
    else:
        cases.append({"max_new_tokens": 64})
    return cases


def test_a_failed_start_leaves_no_folder(script, refused, tmp_path):
    for flags in late_failures(script, tmp_path):
        refused(**flags)
        assert not (tmp_path / "run").exists(), flags


FOREIGN = {  # file in --output-dir -> its content
    "metrics.jsonl": b'{"a": 1}\n', "samples.jsonl": b"mine", ".git/HEAD": b"ref", "notes": b"", "args.json": b"{",
    "critic/config.json": b"{}", "state/other.pt": b"1", "empty/": b"", "model.tmp/x": b"x"}


def put(folder, file, content):
    path = folder / file
    (path if file.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if not file.endswith("/"):
        path.write_bytes(content)


@pytest.mark.parametrize("file", FOREIGN)
def test_a_folder_with_other_files_is_refused(script, refused, tmp_path, file):
    """With --resume too, where there is no checkpoint."""
    put(tmp_path / "run", file, FOREIGN[file])
    before = files_in(tmp_path / "run")
    for resume in (False, True):
        assert "--output-dir" in refused(resume=resume) or resume
    assert files_in(tmp_path / "run") == before
    names = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*")}
    assert names == {Path(file).parts[0]}


def test_a_data_set_in_the_output_folder_stays(script, refused, tmp_path, monkeypatch):
    """Under the name of a log, of that folder, and of one that is given as "."."""
    for name in ("samples.jsonl", "metrics.jsonl", "rows.jsonl"):
        folder = tmp_path / name.removesuffix(".jsonl")
        folder.mkdir()
        path = write(folder / name, [script.row] * 3)
        before = files_in(folder)
        assert "--output-dir" in refused(dataset=path, output_dir=str(folder))
        monkeypatch.chdir(folder)
        assert "--output-dir" in refused(dataset=name, eval_dataset=name, output_dir=".")
        assert files_in(folder) == before


@scripts("sft", "grpo")
def test_an_empty_folder_is_used(script, go, tmp_path):
    (tmp_path / "run").mkdir()
    assert (go("run", **no_steps(script)) / "model").exists()


def no_steps(script) -> dict:
    return {"total_episodes": 0} if script.is_sampler else {"epochs": 0}


# ---- --resume: the same run, or a refusal ----


def args_in(script, starts, home, **flags):
    """A tiny run in home/run, with data, model and rewards that lie in the folder home too."""
    paths = {"dataset": "rows.jsonl", "eval_dataset": "held_out.jsonl", "model": "model"}
    for flag, path in paths.items():
        flags.setdefault(flag, str(home / path))
    if "reward" in script.flags and "reward" not in flags:
        functions = [f"{home}/rewards.py:good"] if script.name == "grpo" else []
        flags["reward"] = (str(home / "reward"), *functions)
    return tiny_args(script, starts, flags.pop("folder", home / "run"), **flags)


@pytest.fixture(scope="module")
def stopped_runs():
    return {}


@pytest.fixture
def home(script, starts, stopped_runs, tmp_path_factory):
    """A folder with all that a run needs, and in run/ one that SIGTERM ended behind step 2 of 3: each test finds it
    as it was then, at the same place.
    """
    if script.name not in stopped_runs:
        folder = tmp_path_factory.mktemp(f"stopped_{script.name}") / "home"
        copy_model(starts, folder / "model")
        copy_model(starts, folder / "reward", run="reward1")
        shutil.copy(starts / "rewards.py", folder)
        shutil.copy(starts / f"{script.name}.jsonl", folder / "rows.jsonl")
        shutil.copy(starts / f"{script.name}_held_out.jsonl", folder / "held_out.jsonl")
        assert interrupt(script, args_in(script, starts, folder), 2, signal.SIGTERM) == 128 + signal.SIGTERM
        stopped_runs[script.name] = shutil.copytree(folder, folder.with_name("kept"))
    kept = stopped_runs[script.name]
    folder = kept.with_name("home")
    shutil.rmtree(folder)
    return shutil.copytree(kept, folder)


@pytest.fixture
def resume(script, starts, home):
    def run(**flags):
        launch(script, args_in(script, starts, home, resume=True, **flags))
        return home / "run"

    return run


def change_rows(path, change):
    rows = read(path)
    change(rows)
    write(path, rows)


def change_a_word(rows):
    """Of the last text of the last row."""
    row, key = rows[-1], list(rows[-1])[-1]
    for key in ("completion", "rejected", "prompt"):
        if key in row:
            row[key] = row[key].replace(row[key].split()[-1], "loud")
            return
    row["completions"][-1] += " loud"


def soften(rows):
    for row in rows:
        row["mu"] = 0.5


def swap_two(rows):
    rows.insert(3, rows.pop(4))


def double_one(rows):
    rows.append(rows[0])


def retrain(starts, folder, run):
    shutil.copy(starts / run / "model" / "model.safetensors", folder)
    shutil.copy(starts / run / "model" / "config.json", folder)


def swap_tokens(home):
    """Of the tokenizer, so that the same texts are other ids."""
    path = home / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words[" the"], words[" about"] = words[" about"], words[" the"]
    path.write_text(json.dumps(content))


CHANGES = {  # what happens between the two starts -> a function of (home, starts), and the scripts concerned
    "reordered rows": (lambda home, _: change_rows(home / "rows.jsonl", list.reverse), SCRIPTS),
    "another word, held out": (lambda home, _: change_rows(home / "held_out.jsonl", change_a_word), SCRIPTS),
    "retrained model": (lambda home, starts: retrain(starts, home / "model", "run2"), SCRIPTS),
    "two rows swapped": (lambda home, _: change_rows(home / "rows.jsonl", swap_two), ["dpo"]),
    "a row is missing": (lambda home, _: change_rows(home / "rows.jsonl", list.pop), ["sft"]),
    "a row twice": (lambda home, _: change_rows(home / "rows.jsonl", double_one), ["grpo"]),
    "another word": (lambda home, _: change_rows(home / "rows.jsonl", change_a_word), ["reward_model"]),
    "reordered held-out rows": (lambda home, _: change_rows(home / "held_out.jsonl", list.reverse), ["dpo"]),
    "fewer held-out rows": (lambda home, _: change_rows(home / "held_out.jsonl", list.pop), ["reward_model"]),
    "softer labels": (lambda home, _: change_rows(home / "rows.jsonl", soften), ["dpo"]),
    "a column for the reward": (lambda home, _: change_rows(home / "rows.jsonl", soften), ["grpo"]),
    "other token ids": (lambda home, _: swap_tokens(home), ["sft"]),
    "retrained reward model": (lambda home, starts: retrain(starts, home / "reward", "reward2"), SAMPLERS),
    "edited reward": (lambda home, _: (home / "rewards.py").open("a").write("# now\n"), ["grpo"])}


@pytest.mark.parametrize("name, change", [(name, change) for change, (_, names) in CHANGES.items() for name in names])
def test_resume_notices_what_has_changed(script, home, resume, starts, capsys, change):
    CHANGES[change][0](home, starts)
    before = files_in(home)
    assert "--resume" in one_line(capsys, resume)
    assert files_in(home) == before


@scripts("dpo", "grpo")
def test_resume_goes_on_elsewhere(home, resume, starts, script, tmp_path, monkeypatch):
    """The folder was moved, is given with a slash or from another folder; auto is the CPU that was named."""
    want = result(resume())
    shutil.copytree(home.with_name("kept") / "run", home / "moved")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(home / "model")
    resume(folder="../moved/", device="auto", model=str(home / "model") + "/")
    assert result(home / "moved") == want


# ---- --resume with a folder that is not as it was left ----


def foreign_checkpoints(good):
    """Other things that torch.load reads: of another script, another model, another program."""
    yield "another script", {**good, "args": {"output_dir": "runs/x", "model": good["args"]["model"]}}
    yield "no arguments", {"step": 2}
    yield "weights alone", good[next(key for key in good if isinstance(good[key], dict) and key != "args")]
    yield "no inputs", {key: value for key, value in good.items() if key != "inputs"}
    yield "no optimizer", {**good, "optimizer": {}}
    yield from (("a list", [1, 2]), ("a number", 3), ("none", None), ("text", "model"), ("empty", {}))


@scripts("sft", "dpo", "grpo")
def test_foreign_checkpoints_are_refused(script, home, resume, capsys):
    path = home / "run" / "state" / "checkpoint.pt"
    for label, state in foreign_checkpoints(torch.load(path, weights_only=True)):
        torch.save(state, path)
        before = files_in(home)
        error = one_line(capsys, resume)
        assert "--resume" in error, label
        assert files_in(home) == before, label


@scripts("sft")
def test_lost_rows_are_noticed(home, resume, capsys):
    for log, left in (("metrics.jsonl", -1), ("metrics.jsonl", 0), ("samples.jsonl", 9), ("metrics.jsonl", None)):
        path = home / "run" / log
        content = path.read_bytes()
        if left is None:
            path.unlink()
        else:
            path.write_bytes(content[:left])
        error = one_line(capsys, resume)
        assert log in error and "lost" in error
        path.write_bytes(content)
    resume()


# ---- The end of a run loses nothing ----


def no_space(*inputs, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name, place", [
    ("sft", "model"), ("reward_model", "tokenizer"), ("ppo", "second model"), ("dpo", "args.json"), ("grpo", "rename")])
def test_a_full_disk_at_the_end(script, refused, go, whole, tmp_path, monkeypatch, place):
    """Nothing was saved before, as --save-every is 0; then there is room, and --resume finishes."""
    model, tokenizer = transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast
    calls, save, write_text, replace = itertools.count(1), model.save_pretrained, Path.write_text, os.replace
    second = lambda *inputs, **options: (no_space if next(calls) == 2 else save)(*inputs, **options)
    args_json = lambda path, *inputs: (no_space if path.name == "args.json" else write_text)(path, *inputs)
    rename = lambda source, target: (no_space if Path(target).name == "model" else replace)(source, target)
    spots = {"model": (model, "save_pretrained", no_space), "tokenizer": (tokenizer, "save_pretrained", no_space),
             "second model": (model, "save_pretrained", second), "args.json": (Path, "write_text", args_json),
             "rename": (os, "replace", rename)}
    with monkeypatch.context() as patch:
        patch.setattr(*spots[place])
        error = refused()
    assert "--output-dir" in error and "No space left" in error
    assert not (tmp_path / "run" / "model").exists()
    assert result(go("run", resume=True)) == result(whole())
    assert not (tmp_path / "run" / "model.tmp").exists() and not (tmp_path / "run" / "state").exists()


@scripts("sft")
def test_a_full_disk_at_a_checkpoint(refused, go, whole, tmp_path, monkeypatch):
    """The one before is whole."""
    save, calls = torch.save, itertools.count(1)

    def half(state, path):
        save(state, path)
        if next(calls) == 2:
            path.write_bytes(path.read_bytes()[:999])
            no_space()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        error = refused(save_every=1)
    assert "--output-dir" in error and "No space left" in error
    assert result(go("run", resume=True)) == result(whole())


@scripts("sft")
def test_signals_while_the_model_is_saved(script, starts, tiny, go, whole, tmp_path, monkeypatch):
    """One is too late to stop the run. Two end the process, and --resume finishes."""
    save = transformers.PreTrainedModel.save_pretrained

    def interrupted(number):
        left = [signal.SIGTERM] * number

        def save_and_signal(*inputs, **options):
            save(*inputs, **options)
            while left:
                os.kill(os.getpid(), left.pop())

        return lambda: setattr(transformers.PreTrainedModel, "save_pretrained", save_and_signal)

    codes = []
    for number in (1, 2):
        args = tiny(output_dir=str(tmp_path / f"run{number}"))
        codes.append(kills.Child(script, args, tmp_path / f"{number}.log", interrupted(number)).wait())
    assert codes == [0, -signal.SIGTERM]
    assert not (tmp_path / "run2" / "model").exists()
    go("run2", resume=True)
    for number in (1, 2):
        assert result(tmp_path / f"run{number}") == result(whole())


# ---- Two runs at once ----


def wait_for(condition, seconds=30.0):
    """The first true value of condition()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def wait_in_step_2(args, gate):
    """In a child: until there is a file `gate`."""
    numbers = itertools.count(1)

    def hook(*_):
        if next(numbers) == first_of(2, args):
            gate.with_suffix(".reached").touch()
            wait_for(gate.exists)

    register_optimizer_step_pre_hook(hook)


@scripts("sft")
def test_two_runs_at_once(script, tiny, starts, whole, tmp_path):
    """The second one starts before the first has written anything, and its data come late; a third one resumes."""
    pipe, gate, run = tmp_path / "rows.jsonl", tmp_path / "gate", tmp_path / "run"
    os.mkfifo(pipe)
    children = [kills.Child(script, tiny(dataset=str(pipe)), tmp_path / "late.log")]
    try:
        rows = wait_for(lambda: os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # once it waits for them
        args = tiny(save_every=1)
        children.append(kills.Child(script, args, tmp_path / "first.log", lambda: wait_in_step_2(args, gate)))
        wait_for(gate.with_suffix(".reached").exists)
        before = files_in(run)
        children.append(kills.Child(script, tiny(resume=True), tmp_path / "resumed.log"))
        os.write(rows, (starts / f"{script.name}.jsonl").read_bytes())
        os.close(rows)
        late, first, resumed = children
        for second in (late, resumed):
            wait_for(second.ended)
            words = second.last_words()
            assert second.code == 2
            assert words.startswith("error: ") and "another run" in words and "--output-dir" in words, words
        assert files_in(run) == before
        gate.touch()
        wait_for(first.ended)
    finally:
        for child in children:
            if not child.ended():
                child.kill()
    assert first.code == 0
    assert result(run) == result(whole())


# ---- Rewards ----

WITH_WORKERS = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor

fork = multiprocessing.get_context("fork")

def count(text): return float(len(text))

def sleep(pipe):
    pipe.send("here")
    pipe.recv()

def pool(prompts, completions, **columns):
    here = fork.Barrier(3)
    with fork.Pool(2, here.wait) as p:
        here.wait()
        return p.map(count, completions)

def executor(prompts, completions, **columns):
    with ProcessPoolExecutor(2, mp_context=fork) as workers:
        return list(workers.map(count, completions))

def ended(prompts, completions, **columns):
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=sleep, args=(theirs,))
    worker.start()
    ours.recv()
    worker.terminate()
    worker.join()
    return [worker.exitcode + 15 + count(text) for text in completions]

def interrupted(prompts, completions, **columns):
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # Ctrl-C reaches it too, and is not for it
    return [code + count(text) for text in completions]

def alone(prompts, completions, **columns): return list(map(count, completions))
"""


@scripts("grpo")
def test_rewards_with_workers_of_their_own(script, tiny, starts, tmp_path):
    """These end when they are told to, which is when they run: one that kept the run's handler never would."""
    (tmp_path / "workers.py").write_text(WITH_WORKERS)
    functions = ("pool", "executor", "ended", "interrupted", "alone")
    args = tiny(reward=tuple(f"{tmp_path}/workers.py:{name}" for name in functions), total_episodes=0, eval_samples=2)
    child = kills.Child(script, args, tmp_path / "log", os.setsid)
    try:
        wait_for(child.ended, 20)
    finally:
        if not child.ended():
            os.killpg(child.pid, signal.SIGKILL)  # with its workers
            child.wait()
    assert child.code == 0, child.last_words()
    [metrics] = read(tmp_path / "run" / "metrics.jsonl")
    scores = {name.rpartition(":")[2]: value for name, value in metrics.items() if "workers.py" in name}
    assert scores == dict.fromkeys(functions, scores["alone"])


SPOILERS = """
def harmless(prompts, completions, size, tags, **columns):
    return [float(len(str(p)) + len(str(c)) + n + len(t)) for p, c, n, t in zip(prompts, completions, size, tags)]

def extends(prompts, completions, size, tags, **columns):
    scores = harmless(prompts, completions, size, tags)
    for prompt, completion in zip(prompts, completions):
        prompt += completion
    return scores

def clears(prompts, completions, size, tags, **columns):
    scores = harmless(prompts, completions, size, tags)
    prompts.clear(), completions.clear(), size.clear(), columns.clear()
    tags[0].append(9), tags[-1].clear()
    return scores

def rewrites(prompts, completions, size, tags, **columns):
    scores = harmless(prompts, completions, size, tags)
    for prompt in prompts:
        prompt[0]["content"] = "spoilt"
        prompt[0]["role"] = "system"
    size[:] = [0] * len(size)
    completions[0][0]["content"] = ""
    return scores
"""


@scripts("grpo")
def test_rewards_change_nothing_but_the_reward(script, go, starts, tmp_path):
    """Not even what they are given: the rows of later updates are those of the file."""
    (tmp_path / "spoilers.py").write_text(SPOILERS)
    model = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    rows = [{"prompt": [ASK], "size": 3, "tags": [1, 2]}, {"prompt": [ASK, REPLY, ASK], "size": 5, "tags": []}]
    flags = {"model": str(model), "dataset": write(tmp_path / "rows.jsonl", rows)}
    flags["eval_dataset"] = flags["dataset"]
    runs = []
    for names in (["harmless"] * 4, ["extends", "clears", "rewrites", "harmless"]):
        specs = tuple(f"{tmp_path}/spoilers.py:{name}" for name in names)
        runs.append(numbers(go(names[0], reward=specs, **flags)))
    for harmless, spoilt in zip(*runs):
        assert {key: value for key, value in spoilt.items() if ".py:" not in key} == {
            key: value for key, value in harmless.items() if ".py:" not in key}
    assert [row["prompt"] for row in read(tmp_path / "extends" / "samples.jsonl")] == [
        row["prompt"] for row in read(tmp_path / "harmless" / "samples.jsonl")]


class Stop(BaseException):
    pass


REWARDS_THAT_ARE_NONE = {  # what a reward function gives for two completions
    "digits": ["1", "2"], "digits of bytes": [b"1", b"2"], "a string of digits": "12", "a pair": [(1,), (2,)],
    "a complex number": [1j, 2j], "a date": ["2024-01-01"] * 2, "an object": [object(), object()], "None": None,
    "a type": [float, float], "a row of a table": [{"score": 1.0}] * 2, "words to scores": {"good": 1.0, "bad": 0.0},
    "a huge number": [10**400, 0], "two numbers": torch.ones(2, 2), "an array": np.ones((2, 3)),
    "a range of three": range(3)}
ERRORS = {"stop": Stop("now"), "generator": GeneratorExit(), "cancelled": asyncio.CancelledError(),
          "exit": SystemExit("no licence"), "exit 0": SystemExit(0), "memory": MemoryError(),
          "recursion": RecursionError("deep"), "cancelled thread": asyncio.TimeoutError()}


@pytest.fixture
def score_by(tmp_path, monkeypatch):
    """score_by(function) -> (score of a file whose reward function this is, its --reward)."""

    def make(function):
        code = "import robust_function\n\ndef f(**given): return robust_function.function(**given)\n"
        (tmp_path / "mine.py").write_text(code)
        monkeypatch.setitem(sys.modules, "robust_function", SimpleNamespace(function=function))
        spec = f"{tmp_path}/mine.py:f"
        score = reward_function(spec, word_tokenizer(), CPU)
        rows = [{"prompt": "w5", "_where": "x:1"}, {"prompt": "w6", "_where": "x:2"}]
        return lambda: score(rows, [[5], [6]], [[5, 2], [6, 7, 2]])

    return make


@pytest.mark.parametrize("label", REWARDS_THAT_ARE_NONE)
def test_what_is_no_list_of_numbers_is_no_reward(capsys, score_by, label):
    score = score_by(lambda **given: REWARDS_THAT_ARE_NONE[label])
    assert "mine.py:f" in one_line(capsys, score)


@pytest.mark.parametrize("given", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), 2.5],
                                   [True, 2.5], iter([1, 2.5]), torch.tensor([1, 2.5], dtype=torch.bfloat16)], ids=str)
def test_numbers_of_any_kind_are_rewards(score_by, given):
    assert score_by(lambda **_: given)().tolist() == [1.0, 2.5]


@pytest.mark.parametrize("label", ERRORS)
def test_whatever_a_reward_raises_is_one_line(capsys, score_by, label):
    def function(**given):
        raise ERRORS[label]

    error = one_line(capsys, score_by(function))
    assert "mine.py:3: " in error and type(ERRORS[label]).__name__ in error


def test_ctrl_c_in_a_reward_is_ctrl_c(score_by):
    def function(**given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_by(function)()


# ---- Flags, figures and what is printed ----


@pytest.mark.parametrize("value", [1 << 64, (1 << 64) - 1, 1 << 63, -1, 1 << 53, 10**30])
def test_seeds_that_are_none(refused, tmp_path, value):
    assert f"--seed is {value}: out of range" in refused(seed=value)


@pytest.mark.parametrize("value", [0, (1 << 32) + 1, (1 << 53) - 1])
@scripts("sft")
def test_large_seeds_are_seeds(script, go, value):
    go("run", seed=value, **no_steps(script))


def test_no_steps_evaluate_only(script, go, whole, starts):
    """The model is that of the start, and so are its figures."""
    run = go("none", **no_steps(script))
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [0]
    want = read(whole() / "metrics.jsonl")[0]
    [got] = read(run / "metrics.jsonl")
    assert got == want
    start = starts / f"{script.size}run1" / "model" / "model.safetensors"
    before = load_file(start) if script.name != "sft" else {}
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before) and len(after) > 10


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 30, 1000])
def test_warmup_is_a_fifth_of_the_run_at_most(warmup_steps):
    args = SimpleNamespace(learning_rate=3.0, warmup_steps=warmup_steps, anneal_lr=True)
    for num_steps in range(1, 120):
        rates = [learning_rate(args, step, num_steps) for step in range(num_steps)]
        top = rates.index(max(rates))
        assert top <= num_steps / 5 and top <= warmup_steps
        assert min(rates) > 0 and max(rates) <= 3.0
        if num_steps >= 5 and warmup_steps:
            length = min(warmup_steps, num_steps // 5)
            assert rates[:length] == pytest.approx(np.linspace(0, 3, length + 1)[1:].tolist())


@scripts(*STEPWISE)
def test_a_short_run_says_so_in_a_line(script, go, starts, capsys):
    go("short", batch_size=5, micro_batch_size=5)
    lines = capsys.readouterr().out.split("\n")
    [line] = [line for line in lines if line.startswith("only 2 steps")]
    assert "--batch-size" in line and "--num-train-epochs" in line
    if script.name == "reward_model":
        go("long", epochs=2, batch_size=1, micro_batch_size=1)
        assert "only" not in capsys.readouterr().out


def test_the_end_says_where_the_results_are(script, tiny, tmp_path, monkeypatch, capsys):
    """As it was given."""
    monkeypatch.chdir(tmp_path)
    launch(script, tiny(output_dir="here/run", **no_steps(script)))
    assert "model, metrics and samples: here/run\n" in capsys.readouterr().out
    assert (tmp_path / "here" / "run" / "model").is_dir()


@pytest.mark.parametrize("file", list(SCRIPTS))
def test_help_says_what_the_script_does(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{file}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{file}.py"), run_name="__main__")
    assert stop.value.code == 0
    title = (ROOT / f"{file}.py").read_text().split("\n")[0].lstrip("r\"")
    assert title.split(".")[0] in " ".join(capsys.readouterr().out.split()) and len(title) > 30


@scripts(*SAMPLERS)
def test_metrics_are_named_without_paths(script, go, starts, tmp_path, monkeypatch):
    """Wherever the rewards lie and however they are given."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(starts / "rewards.py", tmp_path / "mine.py")
    shutil.copytree(starts / "reward1" / "model", tmp_path / "scorer")
    specs = (str(tmp_path / "scorer"), f"{tmp_path}/mine.py:good", "mine.py:odd", "./mine.py:marks")
    run = go("run", reward=specs, total_episodes=0)
    names = [name for name in read(run / "metrics.jsonl")[0] if "rewards/" in name]
    assert len(names) == 4
    for name in names:
        assert "//" not in name and str(tmp_path) not in name and "/./" not in name, name
    assert {name.rpartition("/")[2] for name in names} == {"scorer", "mine.py:good", "mine.py:odd", "mine.py:marks"}


@pytest.mark.parametrize("call", [
    lambda x: dpo.dpo_loss(x, x, x, x, loss_type="hinge"),
    lambda x: dpo.dpo_loss(x, x, x, x, loss_type="Sigmoid"),
    lambda x: dpo.dpo_loss(x, x, x, x, loss_type=None),
    lambda x: grpo.group_advantages(x[None], baseline="loo"),
    lambda x: grpo.group_advantages(x[None], baseline=""),
    lambda x: grpo.group_advantages(x[None], scale_rewards="nothing"),
    lambda x: grpo.group_advantages(x[None], scale_rewards=False),
    lambda x: grpo.group_advantages(x[None], scale_rewards="std"),
    lambda x: grpo.grpo_loss(x[None], x[None], x[None], x[:1], x[None] > -9, 0.0, importance_sampling_level="sentence"),
    lambda x: grpo.grpo_loss(x[None], x[None], x[None], x[:1], x[None] > -9, 0.0, importance_sampling_level="Token"),
    lambda x: grpo.grpo_loss(x[None], x[None], x[None], x[:1], x[None] > -9, 0.1, kl_estimator="K3"),
    lambda x: grpo.token_weights(x[None] > -9, "gspo", 9),
    lambda x: grpo.token_weights(x[None] > -9, "DAPO", 9),
    lambda x: common.kl_estimate(x, x, "k4")])
def test_misspelt_options_run_nothing(call):
    with pytest.raises((ValueError, KeyError)):
        call(torch.tensor([0.5, -1.0, 2.0]))


@scripts("sft", "dpo")
def test_default_samples_are_of_all_prompts_and_whole(script, starts, tmp_path):
    """data/model has as many positions as --max-new-tokens: its own prompts are not cut for that."""
    rows = script.rows(0, 70, "_test")
    path = write(tmp_path / "held_out.jsonl", rows)
    model = {"model": str(starts / "run1" / "model")} if script.name == "dpo" else {"model": str(DATA / "model")}
    launch(script, script.module.Args(
        dataset=str(starts / f"{script.name}.jsonl"), eval_dataset=path, num_train_epochs=0,
        output_dir=str(tmp_path / "run"), device="cpu", **model))
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in rows[: script.module.Args.eval_samples]]
    lengths = [len(row["completion"].split()) for row in samples]
    assert max(lengths) > 40  # there is room for them


@pytest.mark.parametrize("p, n", [(1.0, 4), (0.5, 100), (0.0, 3), (0.75, 1), (0.9, 2000), (1.0, 10**6)])
def test_wilson_by_bisection(p, n):
    """The bounds are where p lies 1.96 standard errors away: of the bound, not of p."""
    z = lambda q: abs(p - q) / math.sqrt(q * (1 - q) / n)
    bounds = []
    for outer in (0.0, 1.0):
        inner, outer = p, outer
        for _ in range(200):
            middle = (inner + outer) / 2
            if 0 < middle < 1 and z(middle) < 1.96 or middle == p:
                inner = middle
            else:
                outer = middle
        bounds.append(inner)
    low, high = reward_model.wilson(p, n)
    assert (low, high) == pytest.approx(bounds, abs=1e-9)
    if (p, n) == (1.0, 4):
        assert low == pytest.approx(0.51, abs=5e-3) and high == pytest.approx(1.0)


@scripts("reward_model")
def test_a_tie_of_eleven_is_refused(refused, tmp_path):
    """All subsets of a tie are summed, and the next tie would take years."""
    with pytest.raises(ValueError, match="11"):
        reward_model.plackett_luce_loss(torch.zeros(12), [1] + [2] * 11)
    assert reward_model.plackett_luce_loss(torch.zeros(10), [3] * 10).item() == pytest.approx(math.lgamma(11), rel=1e-5)
    words = "the plot was good and bad it is also slow i".split()
    row = {"prompt": PROMPT, "completions": [f" {word} ." for word in words], "ranking": [7] * 11}
    path = write(tmp_path / "rows.jsonl", [row, row])
    assert "--loss-type plackett_luce" in refused(dataset=path, eval_dataset=path, loss_type="plackett_luce")


@scripts("reward_model")
def test_scores_are_of_whole_rows_and_finite(refused, starts, tmp_path):
    """As rows of training are: too long for the model, or NaN within it. No file is left then."""
    scorer = shutil.copytree(starts / "reward1", tmp_path / "scorer")
    path = write(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "completion": " good" * n} for n in (3, 80)])
    assert "positions" in refused(score=path, output_dir=str(scorer))
    path = write(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "completion": " good"}])
    weights = load_file(scorer / "model" / "model.safetensors")
    ruined = {"score.weight": math.nan, "model.layers.0.mlp.up_proj.weight": math.nan, "model.norm.weight": math.inf}
    for key, value in ruined.items():
        bad = {name: weight.clone() for name, weight in weights.items()}
        bad[key].view(-1)[5] = value
        save_file(bad, scorer / "model" / "model.safetensors", {"format": "pt"})
        refused(score=path, output_dir=str(scorer))
    assert not list(tmp_path.glob("*.scores.jsonl"))


@scripts("reward_model")
def test_other_models_are_no_scorers(refused, starts, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "completion": " good"}])
    for folder in (starts / "run1", tmp_path):
        assert "--score" in refused(score=path, output_dir=str(folder))
    assert not list(tmp_path.glob("*.scores.jsonl"))


# ---- The terminal ----


def test_the_terminal_may_leave(starts, tmp_path):
    """`python sft.py | head -1`: no traceback, and no other message."""
    command = [sys.executable, "sft.py", "--model", str(starts / "run1" / "model"), "--output-dir", str(tmp_path / "run"),
               "--dataset", str(starts / "sft.jsonl"), "--eval-dataset", str(starts / "sft_held_out.jsonl")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "rows" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@scripts("sft")
def test_a_sample_may_look_like_anything(script, go, tmp_path, monkeypatch):
    """As a list of messages, which no data set may hold as text."""
    monkeypatch.setattr(common, "sample_rows", lambda *_, **columns: [{"prompt": "", "completion": '[{"role": "user"}]'}])
    assert (go("run") / "model").exists()


@pytest.mark.parametrize("rows", [[[5, 6]], [[5], [6, 7, 8, 9, 10]]])
def test_rows_of_a_few_tokens_are_tried_without_padding(rows, capsys):
    model = make_model("gpt2")
    common.check_model(model, rows)
    assert common.has_rows(model) and capsys.readouterr().out == ""


@scripts(*SCRIPTS)
def test_curves_are_drawn_where_matplotlib_is(script, tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common.Run, "show_change", common.Run.show_change.__wrapped__)
    script.module.main(tiny())
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
