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
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import types
from pathlib import Path

import gold_reward as gold
import make_world
import pytest
import torch
import transformers
import tyro
from conftest import CHAT_TEMPLATE, ROOT, naive_logprobs
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpo
import grpo
import ppo
import reward_model
import sft

DATA = ROOT / "data"
SCRIPTS = {"sft": sft, "dpo": dpo, "reward_model": reward_model, "ppo": ppo, "grpo": grpo}
ONE_LR = ["sft", "dpo", "reward_model"]  # an optimizer step is a logged step, with a warm-up
TRAIN = {"sft": ["demonstrations"], "dpo": ["preferences"], "reward_model": ["preferences", "rankings"],
         "ppo": ["prompts"], "grpo": ["prompts"]}
PAIR = {"prompt": "review of the plot :", "chosen": " the plot was good .", "rejected": " it was ."}
GOOD = {"sft": {"prompt": "review of the plot :", "completion": " the plot was good ."}, "dpo": PAIR,
        "reward_model": PAIR, "ppo": {"prompt": "review of the plot :"}, "grpo": {"prompt": "review of the plot :"}}
SIDES = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "reward_model": ["chosen", "rejected"]}
SAMPLERS = ["ppo", "grpo"]  # sample and score responses of their own; a logged step is an update of several
STEP = dict.fromkeys(SAMPLERS, "update")  # what a logged step is called in messages and in the checkpoint
SCORES = {"ppo": ("objective/scores", "score"), "grpo": ("reward", "reward")}  # in metrics, in samples
SAVE = {"reward_model": "save_reward_model"}  # the function that writes model/, else save_model
SCORE = {"reward_model": "token_values"}  # what a loss is made of, else sequence_logprobs


# ---- Tiny runs ----


def no_constant(name):
    raise AssertionError(f"{name} is no JSON: other readers refuse the file")


def read(path) -> list[dict]:
    return [json.loads(line, parse_constant=no_constant) for line in Path(path).read_text().splitlines()]


def write(path, rows) -> str:
    """Rows (dicts, or lines of text) to a .jsonl file."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def head(name, first, last) -> list[dict]:
    return read(DATA / f"{name}.jsonl")[first:last]


def rows_of(name, first, last, test="") -> list[dict]:
    """Rows of the world for this script: of its files in turn, so pairs and rankings for reward_model.py."""
    files = [head(f"{stem}{test}", first, last) for stem in TRAIN[name]]
    return [files[i % len(files)][i] for i in range(len(files[0]))]


def launch(script, args):
    """script.main(args), and the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return script.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

REWARDS = """
import math

def good(prompts, completions, **columns): return [float(len(text.split())) for text in completions]
def whole(prompts, completions, **columns): return [len(text.split()) for text in completions]
def marks(prompts, completions, **columns): return [float("<" in text) for text in completions]
def odd(prompts, completions, **columns): return [float(len(text) % 2) for text in completions]
def brief(prompts, completions, **columns): return [float(len(text.split()) < 3) for text in completions]
def same(prompts, completions, **columns): return [0.1] * len(completions)
def raises(prompts, completions, **columns): raise KeyError("colour")
def needs(prompts, completions, colour): return [0.0] * len(completions)
def short(prompts, completions, **columns): return [0.0] * (len(completions) - 1)
def long(prompts, completions, **columns): return [0.0] * (len(completions) + 1)
def empty(prompts, completions, **columns): return []
def nan(prompts, completions, **columns): return [0.0] * (len(completions) - 1) + [math.nan]
def inf(prompts, completions, **columns): return [math.inf] * len(completions)
def huge(prompts, completions, **columns): return [1e39] * len(completions)
def none(prompts, completions, **columns): return None
def nones(prompts, completions, **columns): return [0.0] * (len(completions) - 1) + [None]
def silent(prompts, completions, **columns): return [None] * len(completions)
def string(prompts, completions, **columns): return "good"
def strings(prompts, completions, **columns): return ["high"] * len(completions)
def number(prompts, completions, **columns): return 1.0
def lists(prompts, completions, **columns): return [[0.0]] * len(completions)
constant = [1.0, 2.0]
"""


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """Two model folders with weights, from two steps of sft.py each, and a reward model of two steps from
    each; files of ten rows, the first eight, eight others and four held out; a file of reward functions.
    """
    folder = tmp_path_factory.mktemp("starts")
    (folder / "rewards.py").write_text(REWARDS)
    for name in SCRIPTS:
        write(folder / f"{name}.jsonl", rows_of(name, 0, 10))
        write(folder / f"{name}_held_out.jsonl", rows_of(name, 0, 4, "_test"))
        write(folder / f"{name}_short.jsonl", rows_of(name, 0, 8))
        write(folder / f"{name}_other.jsonl", rows_of(name, 30, 38))
    for seed, (name, run, start) in itertools.product((1, 2), (
            ("sft", "run", lambda seed: DATA), ("reward_model", "reward", lambda seed: folder / f"run{seed}"))):
        launch(SCRIPTS[name], SCRIPTS[name].Args(
            model=str(start(seed) / "model"), dataset=str(folder / f"{name}.jsonl"), num_train_epochs=1,
            eval_dataset=str(folder / f"{name}_held_out.jsonl"), batch_size=5, micro_batch_size=5,
            warmup_steps=0, eval_samples=4, output_dir=str(folder / f"{run}{seed}"), seed=seed, device="cpu"))
    return folder


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


@pytest.fixture
def tiny(name, tmp_path, starts):
    """tiny(**flags) -> Args of a run of three steps an "epoch", in tmp_path/run: of 4 + 4 + 2 rows, or three
    updates, each of 2 epochs and 2 minibatches: of ppo.py on 4 responses, with a KL coefficient that adapts,
    of grpo.py on 8 responses to 4 prompts, and evaluations on 2 responses to each of the held-out ones.
    """

    def make(epochs=1, **flags):
        defaults = {
            "model": str(DATA / "model" if name == "sft" else starts / "run1" / "model"),
            "dataset": str(starts / f"{name}.jsonl"), "eval_dataset": str(starts / f"{name}_held_out.jsonl"),
            "output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "eval_every": 0, "eval_samples": 4,
            "max_new_tokens": 8, "save_every": 0, "device": "cpu", "num_train_epochs": epochs,
            "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 0}
        if name in SAMPLERS:
            defaults |= {**typed(name, "reward", str(starts / "reward1" / "model")), "num_minibatches": 2,
                         "update_epochs": 2}
            defaults |= {"ppo": {"batch_size": 2, "micro_batch_size": 2, "target_kl": 0.1, "kl_horizon": 40},
                         "grpo": {"num_generations": 2, "eval_samples": 8}}[name]
            responses = [flags.get(key, defaults[key]) for key in ("batch_size", "num_minibatches")]
            defaults["total_episodes"] = max(3 * epochs * math.prod(responses), 1)
        known = flags_of(SCRIPTS[name])
        return SCRIPTS[name].Args(**{**{key: defaults[key] for key in defaults if key in known}, **flags})

    return make


def rewarded(starts, *specs) -> dict:
    """--reward of grpo.py: folders and functions among the starts."""
    return {"reward": tuple(str(starts / spec) for spec in specs)} if specs else {}


def typed(name, flag, value) -> dict:
    """A flag with a single value, as this script takes it: grpo.py has a list of rewards."""
    return {flag: (value,) if (name, flag) == ("grpo", "reward") else value}


def one_step(name) -> dict:
    """Flags of a run of a single optimizer step."""
    single = {"num_minibatches": 1, "update_epochs": 1, "total_episodes": 12} if name in SAMPLERS else {}
    return {"batch_size": 12, "micro_batch_size": 12, **single}


@pytest.fixture
def go(script, tiny, tmp_path):
    """go(folder, **flags) runs the script in tmp_path/folder and returns that path."""

    def run(folder, **flags):
        launch(script, tiny(output_dir=str(tmp_path / folder), **flags))
        return tmp_path / folder

    return run


def timeless(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def trained_rows(run) -> list[dict]:
    """Of metrics.jsonl those of steps, not of evaluations."""
    return [row for row in timeless(read(run / "metrics.jsonl")) if "learning_rate" in row]


def result(run):
    """What must not depend on interruptions nor on the process: metrics but the timing, samples, weights."""
    files = [run / "samples.jsonl", *sorted(run.glob("*/*.safetensors"))]
    digests = {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert "model/model.safetensors" in digests
    return timeless(read(run / "metrics.jsonl")), digests


@pytest.fixture(scope="session")
def finished():
    """The results of whole runs, by script and flags."""
    return {}


@pytest.fixture
def whole(name, go, finished):
    """whole(**flags) -> the result of the run that nothing interrupts, which is run once for all tests."""

    def run(**flags):
        key = name, repr(sorted(flags.items()))
        if key not in finished:
            finished[key] = result(go("whole", **flags))
        return finished[key]

    return run


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


def first_of(step, args) -> int:
    """The number of the first optimizer step of this logged step: an update has several."""
    return (step - 1) * getattr(args, "num_minibatches", 1) * getattr(args, "update_epochs", 1) + 1


def interrupt(script, args, step, number) -> int:
    """Send the process a signal within this step; the exit code, or 0 when main returns."""
    try:
        with at_step(first_of(step, args), lambda: os.kill(os.getpid(), number)):
            launch(script, args)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def refused(script, tiny, capsys):
    """refused(**flags): the run ends with exit code 2 and one line "error: ..." on stderr, returned. What it
    tells the user to do has to be possible: the flags it names exist.
    """

    def run(**flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            launch(script, tiny(**flags))
        line = capsys.readouterr().err
        assert stop.value.code == 2
        assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1, line
        named = re.findall(r"--([a-z][a-z-]+)", re.sub("`[^`]*`", "", line))  # but for those of other commands
        named = {flag.replace("-", "_") for flag in named}
        assert named <= set(flags_of(script)), line
        return line

    return run


# ---- 1. Bad input ----

PROMPT, LONG = "review of the plot :", "very " * 600
ASK, REPLY, REFUSE = ({"role": role, "content": text} for role, text in (
    ("user", "a film ?"), ("assistant", "it was good ."), ("assistant", "it was bad .")))
THREE = {"prompt": PROMPT, "completions": [" good .", " okay .", " bad ."]}
BAD_ROWS = {  # the second of two rows, what the error must name besides file:2, of which script
    "not JSON": ('{"prompt": "what', [], "sft dpo reward_model ppo grpo"),
    "not an object": ("[1, 2]", [], "sft dpo reward_model ppo grpo"),
    "missing columns": ({"prompt": PROMPT, "colour": "red"}, ["prompt", "colour"], "sft dpo reward_model"),
    "missing prompt": ({"question": PROMPT, "colour": "red"}, ["prompt", "colour"], "ppo grpo"),
    "a number as prompt": ({"prompt": 5, "completion": "", "chosen": "a", "rejected": "b"}, ["prompt"],
                           "sft dpo reward_model ppo grpo"),
    "a null as prompt": ({"prompt": None}, ["prompt"], "ppo grpo"),
    "an empty prompt": ({"prompt": ""}, [], "ppo grpo"),  # nothing from which to choose the first token
    "a null": ({"prompt": PROMPT, "completion": None, "chosen": None, "rejected": " b"}, [],
               "sft dpo reward_model"),
    "long prompt": ({"prompt": LONG, "completion": " good", "chosen": " good", "rejected": " bad"},
                    ["--max-length"], "sft dpo reward_model"),
    "no chat template": ({"prompt": [ASK], "completion": [REPLY], "chosen": [REPLY], "rejected": [REFUSE]},
                         ["chat template"], "sft dpo reward_model ppo grpo"),
    "no chat template for messages": ({"messages": [ASK, REPLY]}, ["chat template"], "sft"),
    "no chat template, implicit prompt": ({"chosen": [ASK, REPLY], "rejected": [ASK, REFUSE]},
                                          ["chat template"], "dpo reward_model"),
    "no shared beginning": ({"chosen": "good", "rejected": "bad"}, ["prompt"], "dpo reward_model"),
    "numbers without prompt": ({"chosen": 5, "rejected": 6}, [], "dpo reward_model"),
    "text and messages without prompt": ({"chosen": "good", "rejected": [ASK, REFUSE]}, [],
                                         "dpo reward_model"),
    **{f"mu {mu!r}": ({**PAIR, "mu": mu}, ["mu", repr(mu)], "dpo reward_model")
       for mu in (1.5, -0.25, "high", "0.5", True, None, [1], math.nan)},
    **{f"ranking {ranking!r}": ({**THREE, "ranking": ranking}, ["ranking"], "reward_model") for ranking in (
        [1, 2], [1, 2, 3, 4], [], [1.0, 2.0, 3.0], ["1", "2", "3"], [True, True, False], [1, 2, None], "123",
        None)},
    "no ranking of three": (THREE, ["ranking"], "reward_model"),
    "no ranking of two": ({**THREE, "completions": [" good .", " bad ."]}, ["ranking"], "reward_model"),
    **{f"completions {texts!r}": ({**THREE, "completions": texts, "ranking": ranking}, [], "reward_model")
       for texts, ranking in (("good .", [1, 2]), ([" good ."], [1]), ([], []), (None, [1, 2]),
                              ([" good .", None], [1, 2]), ([" good .", 5], [1, 2]))},
    "completions without prompt": ({"completions": [" good .", " bad ."], "ranking": [1, 2]}, ["prompt"],
                                   "reward_model"),
    "mu of a ranking": ({**THREE, "ranking": [1, 2, 3], "mu": "high"}, ["mu"], "reward_model"),
    "no chat template, ranking": ({"prompt": [ASK], "completions": [[REPLY], [REFUSE]], "ranking": [1, 2]},
                                  ["chat template"], "reward_model"),
    **{f"p_chosen {p!r}": ({**PAIR, "p_chosen": p}, ["p_chosen", repr(p)], "reward_model") for p in ("high", 1.5)},
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


@pytest.mark.parametrize("name", ["reward_model"])
@pytest.mark.parametrize("ranking", [[1, 2, 3], [3, 1, 1], [2, 2, 2], [10, 7, 9], [0, -1, 5]], ids=str)
def test_good_rankings(go, tmp_path, ranking):
    """Any whole numbers: only their order counts, and equal ones are ties."""
    rows = [{**THREE, "ranking": ranking}, {**THREE, "completions": [" good .", " bad ."], "ranking": [2, 1]}]
    path = write(tmp_path / "rows.jsonl", rows)
    run = go("run", dataset=path, eval_dataset=path)
    assert [row["rank"] for row in read(run / "samples.jsonl")] == (ranking + [2, 1]) * 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_long_prompts_are_dropped_and_counted(go, refused, tmp_path, capsys):
    good = {"prompt": PROMPT}
    rows = [good, *({"prompt": " ".join(["very"] * n)} for n in (7, 8)), good]
    run = go("run", dataset=write(tmp_path / "rows.jsonl", rows), max_prompt_length=7)
    assert "1 of 4 prompts" in capsys.readouterr().out
    assert len(trained_rows(run)) == 3
    for flag in ("dataset", "eval_dataset"):
        error = refused(output_dir=str(tmp_path / flag), **{flag: write(tmp_path / "long.jsonl", rows[2:3])},
                        max_prompt_length=7)
        assert "long.jsonl" in error and "--max-prompt-length" in error


BAD_FLAGS = {
    "batches": ({"batch_size": 4, "micro_batch_size": 3}, ["--batch-size 4", "--micro-batch-size 3"]),
    **{f"{flag} {value}": ({flag: value}, ["--" + flag.replace("_", "-"), str(value)])
       for flag in ("batch_size", "micro_batch_size", "num_train_epochs", "max_length", "eval_samples",
                    "max_new_tokens", "total_episodes", "num_minibatches", "update_epochs",
                    "max_prompt_length", "kl_horizon", "num_generations") for value in (0, -4)},
    **{f"{flag} {value}": ({flag: value}, ["--" + flag.replace("_", "-"), str(value)])
       for flag in ("learning_rate", "critic_learning_rate", "temperature", "kl_coef", "target_kl",
                    "clip_coef", "clip_coef_high", "max_grad_norm",
                    "missing_eos_penalty") for value in (-0.5, math.nan, math.inf)},
    **{f"group of {size}": ({"num_generations": size}, [f"--num-generations {size}", "8"]) for size in (1, 3, 16)},
    **{f"weight {value}": ({"reward_weights": (value,)}, ["--reward-weights", str(value)])
       for value in (math.nan, math.inf, -math.inf)},
    **{f"weights {weights}": ({"reward_weights": weights}, ["--reward", "--reward-weights", str(len(weights))])
       for weights in ((1.0, 1.0), (1.0, 2.0, 3.0))},
    **{f"no reward, weights {weights}": ({"reward": (), "reward_weights": weights}, ["--reward"])
       for weights in ((), (1.0,))},
    "episodes": ({"total_episodes": 10}, ["--total-episodes 10", "--batch-size", "--num-minibatches"]),
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


@pytest.mark.parametrize("name, case", [(name, case) for name, script in SCRIPTS.items()
                                        for case, (flags, _) in BAD_FLAGS.items()
                                        if set(flags) <= set(script.Args.__dataclass_fields__)])
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


def copy_model(starts, folder, drop="", run="run1", **files):
    """A model folder less one file and with other contents in some: tokenizer_config__json=b"..."."""
    shutil.copytree(starts / run / "model", folder)
    if drop:
        (folder / drop).unlink()
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_bytes(content)
    return folder


BROKEN = {"config": {"config__json": b"{"}, "model type": {"config__json": b'{"model_type": "nothing"}'},
          "tokenizer": {"tokenizer__json": b"{"}, "no tokenizer": {"drop": "tokenizer.json"},
          "weights": {"model__safetensors": b"not a header"}}
FOLDERS = [*((name, "model", "run1") for name in SCRIPTS), *((name, "reward", "reward1") for name in SAMPLERS)]
every_folder = pytest.mark.parametrize("name, flag, run", FOLDERS, ids=[" ".join(ids) for ids in FOLDERS])


@every_folder
@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_broken_model_folder(name, refused, starts, tmp_path, flag, run, files):
    folder = copy_model(starts, tmp_path / "model", run=run, **files)
    assert f"--{flag} {folder}" in refused(**typed(name, flag, str(folder)))


@every_folder
def test_weights_of_another_size(name, refused, starts, tmp_path, flag, run):
    config = json.loads((starts / run / "model" / "config.json").read_text())
    folder = copy_model(starts, tmp_path / "model", run=run,
                        config__json=json.dumps({**config, "intermediate_size": 128}).encode())
    assert f"--{flag} {folder}" in refused(**typed(name, flag, str(folder)))


@every_folder
def test_weights_that_are_missing(name, refused, starts, tmp_path, flag, run):
    """transformers draws them at random and says so in a warning that the scripts silence."""
    config = json.loads((starts / run / "model" / "config.json").read_text())
    folder = copy_model(starts, tmp_path / "model", run=run,
                        config__json=json.dumps({**config, "num_hidden_layers": 3}).encode())
    assert f"--{flag} {folder}" in refused(**typed(name, flag, str(folder)))


def gpt2(starts, folder, run="run1", kind=transformers.GPT2LMHeadModel, **options):
    """A tiny GPT-2 with the tokenizer of this start."""
    copy_model(starts, folder, drop="model.safetensors", run=run)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    kind(transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, pad_token_id=0,
                                 eos_token_id=1, **options)).save_pretrained(folder)
    return folder


def test_row_longer_than_the_models_positions(name, refused, starts, tmp_path):
    """GPT-2 looks its positions up in a table: a row longer than it ends in an index error."""
    folder = gpt2(starts, tmp_path / "model", n_positions=8)
    assert ("--max-new-tokens" if name in SAMPLERS else "--max-length") in refused(model=str(folder))


@pytest.mark.parametrize("name", SAMPLERS)
def test_response_longer_than_the_reward_models_positions(name, refused, starts, tmp_path):
    folder = gpt2(starts, tmp_path / "model", "reward1", transformers.GPT2ForSequenceClassification,
                  n_positions=8, num_labels=1)
    critic = {"critic": "policy"} if name == "ppo" else {}
    assert f"--reward {folder}" in refused(**typed(name, "reward", str(folder)), **critic)


@every_folder
def test_only_safetensors_are_read(name, refused, starts, tmp_path, flag, run):
    folder = copy_model(starts, tmp_path / "model", drop="model.safetensors", run=run)
    torch.save(load_file(starts / run / "model" / "model.safetensors"), folder / "pytorch_model.bin")
    assert f"--{flag} {folder}" in refused(**typed(name, flag, str(folder)))


@every_folder
def test_poisoned_weights(name, refused, starts, tmp_path, flag, run):
    """A NaN in a folder is the folder's fault, and no learning rate helps."""
    folder = copy_model(starts, tmp_path / "model", run=run)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = refused(**typed(name, flag, str(folder)))
    assert "learning-rate" not in error and (flag == "model" or f"--{flag} {folder}" in error)
    assert not (tmp_path / "run" / "model").exists()


def test_divergence_names_step_and_learning_rate(name, refused, tmp_path):
    error = refused(learning_rate=1e30)
    assert ("update 1" if name in SAMPLERS else "step 2") in error and "--learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", ["ppo"])
def test_divergence_of_the_critic(refused, tmp_path):
    error = refused(critic_learning_rate=1e30)
    assert "update 1" in error and "--critic-learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name, flag, rate", [
    *((name, "learning_rate", rate) for name in SCRIPTS for rate in (1e12, 1e39)),  # finite weights, or not
    ("ppo", "critic_learning_rate", 1e39)])
def test_divergence_in_the_last_step(name, flag, rate, refused, tmp_path):
    """The last update, too, may ruin the model: the evaluation behind it, or a look at it, shows it."""
    assert f"--{flag.replace('_', '-')}" in refused(**{flag: rate}, **one_step(name))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name, score", [*((name, SCORE.get(name, "sequence_logprobs")) for name in SCRIPTS),
                                         ("ppo", "token_values")])
def test_nan_keeps_the_last_checkpoint(name, script, refused, tiny, go, whole, monkeypatch, tmp_path, score):
    """The loss turns NaN at step 6. The checkpoint is that of step 4, and resuming from it is a good run."""
    flags, forwards = {"epochs": 3, "save_every": 2}, itertools.count(1)
    original, wrong = getattr(script, score), first_of(6, tiny())

    def poisoned(*args, **options):
        scores = original(*args, **options)
        if not torch.is_grad_enabled() or next(forwards) != wrong:
            return scores
        return tuple(x * math.nan for x in scores) if isinstance(scores, tuple) else scores * math.nan

    with monkeypatch.context() as patch:
        patch.setattr(script, score, poisoned)
        assert f"{STEP.get(name, 'step')} 6" in refused(**flags)
    checkpoint = tmp_path / "run" / "state" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)[STEP.get(name, "step")] == 4
    assert not (tmp_path / "run" / "model").exists()
    assert result(go("run", **flags, resume=True)) == whole(**flags)


BAD_REWARDS = ["raises", "needs", "short", "long", "empty", "nan", "inf", "huge", "none", "nones", "silent", "string",
               "strings", "number", "lists", "constant", "missing", ""]


@pytest.fixture
def rewards(starts):
    """The path of a file of reward functions."""
    return str(starts / "rewards.py")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("function", BAD_REWARDS)
def test_bad_reward_function_is_named(name, refused, rewards, function):
    error = refused(**typed(name, "reward", f"{rewards}:{function}"))
    assert f"--reward {rewards}:{function}" in error
    assert {"raises": "colour", "needs": "colour", "missing": "missing"}.get(function, "") in error


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("content", [None, "def good(:", "import nothing_of_this_name"],
                         ids=["no file", "syntax", "import"])
def test_bad_reward_file_is_named(name, refused, tmp_path, content):
    path = tmp_path / "file.py"
    if content is not None:
        path.write_text(content)
    assert f"--reward {path}:good" in refused(**typed(name, "reward", f"{path}:good"))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["nothing", "run1/model", "file without function", "two labels", "vocabulary"])
def test_bad_reward_folder_is_named(name, refused, starts, rewards, tmp_path, kind):
    """Above all a language model, to which transformers would add a random head."""
    spec = rewards if kind == "file without function" else str(starts / kind)
    if kind == "two labels":
        spec = str(copy_model(starts, tmp_path / "labels", run="reward1"))
        transformers.AutoModelForSequenceClassification.from_pretrained(
            spec, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(spec)
    elif kind == "vocabulary":  # two words change places
        tokenizer = (starts / "reward1" / "model" / "tokenizer.json").read_text()
        for old, new in ((" good", "@"), (" awful", " good"), ("@", " awful")):
            tokenizer = tokenizer.replace(f'"{old}"', f'"{new}"')
        spec = str(copy_model(starts, tmp_path / "other", run="reward1", tokenizer__json=tokenizer.encode()))
    assert f"--reward {spec}" in refused(**typed(name, "reward", spec))


@pytest.mark.parametrize("name", ["ppo"])
def test_model_without_a_class_for_a_critic(refused, starts, tmp_path):
    """transformers has no token classifier of OPT: a critic cannot be made, whatever the reward is."""
    folder = copy_model(starts, tmp_path / "opt", drop="model.safetensors")
    transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=96, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1,
        max_position_embeddings=64, word_embed_proj_dim=16, eos_token_id=1, pad_token_id=0,
    )).save_pretrained(folder)
    assert "--critic" in refused(model=str(folder), critic="policy")


def test_finished_run_is_never_overwritten(refused, go):
    run = go("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for resume in (False, True):
        assert f"--output-dir {run}" in refused(resume=resume)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_interrupted_run_is_never_lost(name, script, refused, tiny, tmp_path, starts):
    """Neither a second start, nor --resume with another flag, nor a broken checkpoint touches its files."""
    length = {"total_episodes": 48} if name in SAMPLERS else {}
    assert interrupt(script, tiny(**length), 2, signal.SIGTERM)
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "--resume" in refused()
    for flag in flags_of(script):
        if flag in INERT:
            continue
        value = option(name, flag, starts)
        error = refused(resume=True, **{**length, flag: value})
        assert f"--{flag.replace('_', '-')} is {value}" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "state" / "checkpoint.pt").write_bytes(before[run / "state" / "checkpoint.pt"][:5000])
    error = refused(resume=True)
    assert "--resume" in error and "checkpoint.pt" in error
    assert (run / "metrics.jsonl").read_bytes() == before[run / "metrics.jsonl"]


def test_data_that_changed_under_its_name(name, script, refused, tiny, tmp_path):
    """The position in the data of a checkpoint means nothing in another file."""
    path = write(tmp_path / "rows.jsonl", rows_of(name, 0, 10))
    assert interrupt(script, tiny(dataset=path), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    write(tmp_path / "rows.jsonl", rows_of(name, 0, 9))
    assert all(word in refused(dataset=path, resume=True) for word in ("--resume", path, "9", "10"))


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
        [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else
        [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
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
    flags = {"eval_every": 2, "save_every": 2, "epochs": 2}
    first = result(go("first", **flags))
    second = tiny(**flags, output_dir=str(tmp_path / "second"))
    process = run_python(f"{name}.py", *as_flags(second), PYTHONHASHSEED="17")
    assert process.returncode == 0, process.stderr
    assert result(tmp_path / "second") == first
    assert len(first[0]) == 6 + 4  # steps and evaluations: after 0, 2, 4 and 6


def test_the_seed_matters(go):
    assert result(go("first")) != result(go("second", seed=2))


LONG_RUN = {"epochs": 3, "eval_every": 2, "save_every": 2}  # 9 steps: 3 times 4, 4, 2 rows


@pytest.mark.parametrize("stops", [
    [(3, signal.SIGTERM)], [(3, signal.SIGINT)], [(1, signal.SIGTERM)], [(4, signal.SIGINT)],
    [(2, signal.SIGTERM), (3, signal.SIGINT), (1, signal.SIGTERM)]], ids=str)
def test_resume_after_a_signal(name, script, tiny, go, whole, stops, capsys, tmp_path):
    """Each stop is (step since the last start, signal). The step is finished first, and with it all optimizer
    steps of an update.
    """
    done = 0
    for k, (step, number) in enumerate(stops):
        assert interrupt(script, tiny(**LONG_RUN, resume=k > 0), step, number) == 128 + number
        assert "--resume" in capsys.readouterr().out
        done += step
        state = torch.load(tmp_path / "run" / "state" / "checkpoint.pt", weights_only=True)
        assert state[STEP.get(name, "step")] == done == trained_rows(tmp_path / "run")[-1]["step"]
    assert result(go("run", **LONG_RUN, resume=True)) == whole(**LONG_RUN)


@pytest.mark.parametrize("name, flags", [
    ("ppo", {"critic": "none"}), ("ppo", {"critic": "policy", "target_kl": 0.0}),
    ("grpo", {"reward": ("rewards.py:odd", "reward2/model"), "reward_weights": (0.5, -3.0), "kl_in": "reward"}),
    ("grpo", {"reward": ("rewards.py:odd",), "drop_zero_std": True})],
    ids=str)
def test_resume_with_other_parts(script, tiny, go, whole, starts, flags):
    """Without a critic, or the controller of the KL coefficient; with several rewards; with groups dropped."""
    flags = {**LONG_RUN, **flags, **rewarded(starts, *flags.get("reward", ()))}
    assert interrupt(script, tiny(**flags), 4, signal.SIGTERM) == 128 + signal.SIGTERM
    assert result(go("run", **flags, resume=True)) == whole(**flags)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("inner", [2, 3, 4])
def test_signal_anywhere_in_an_update(script, tiny, go, whole, tmp_path, inner):
    """2 epochs of 2 minibatches: the rest of the update follows, or its samples would be drawn anew."""
    with pytest.raises(SystemExit), at_step(4 + inner, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        launch(script, tiny())
    assert [row["step"] for row in trained_rows(tmp_path / "run")] == [1, 2]
    assert result(go("run", resume=True)) == whole()


def test_signal_in_the_last_step(script, tiny, go, whole, tmp_path):
    """Whether it stops there or finishes: nothing of the run may be missing in the end."""
    if interrupt(script, tiny(**LONG_RUN), 9, signal.SIGTERM):
        go("run", **LONG_RUN, resume=True)
    assert result(tmp_path / "run") == whole(**LONG_RUN)


def test_resume_after_a_kill_drops_later_log_lines(name, script, tiny, go, whole, tmp_path):
    with pytest.raises(Killed), at_step(first_of(4, tiny()), kill):
        launch(script, tiny(**LONG_RUN))
    steps = [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 2, 3]  # the checkpoint is that of step 2, before its evaluation
    checkpoint = torch.load(tmp_path / "run" / "state" / "checkpoint.pt", weights_only=True)
    assert checkpoint[STEP.get(name, "step")] == 2
    assert result(go("run", **LONG_RUN, resume=True)) == whole(**LONG_RUN)


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
    assert result(go("run", **LONG_RUN, resume=True)) == whole(**LONG_RUN)


def test_resume_after_a_kill_behind_the_last_step(name, script, tiny, go, whole, monkeypatch):
    """The last checkpoint is that of the last step: only the evaluation and the model are missing."""
    flags = {**LONG_RUN, "save_every": 3}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, SAVE.get(name, "save_model"), lambda *_: kill())
        launch(script, tiny(**flags))
    assert result(go("run", **flags, resume=True)) == whole(**flags)


def test_resume_may_change_what_changes_no_number(script, tiny, go, whole):
    assert interrupt(script, tiny(), 2, signal.SIGTERM) == 128 + signal.SIGTERM
    resumed = go("run", resume=True, save_every=1, micro_batch_size=1, gradient_checkpointing=True)
    assert result(resumed)[0] == approx_rows(whole()[0], 1e-4)


# ---- 4. The run folder ----


@pytest.fixture
def trained(name, script, monkeypatch):
    """The models at the moment they are saved: trained["model"] and, of ppo.py, trained["critic"]."""
    seen, save = {}, SAVE.get(name, "save_model")
    save_model, load_critic = getattr(script, save), getattr(script, "load_critic", None)

    def capture(*args):
        seen["model"] = next(arg for arg in args if isinstance(arg, torch.nn.Module))
        return save_model(*args)

    def load(*args):
        seen["critic"] = load_critic(*args)
        return seen["critic"]

    monkeypatch.setattr(script, save, capture)
    monkeypatch.setattr(script, "load_critic", load, raising=False)
    return seen


EVERY_ROW = {"step", "learning_rate", "num_tokens", "tokens_per_second"}
SAMPLED = {"completions/mean_length", "completions/eos_rate"}
OBJECTIVES = {f"objective/{key}" for key in ("scores", "kl", "entropy", "non_score_reward", "rlhf_reward")}
OF_CRITIC = {"loss/value", "val/clipfrac", "grad_norm/critic"}
METRICS = {  # of a step less those of every row, of an evaluation less the prefix, and as they are
    "sft": ({"loss", "grad_norm", "epoch", "mean_token_accuracy"}, {"loss", "mean_token_accuracy"}, SAMPLED),
    "dpo": ({"loss", "grad_norm", "epoch", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "rewards/accuracies", "logps/chosen", "logps/rejected"},
            {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected"}, SAMPLED),
    "reward_model": ({"loss", "grad_norm", "epoch", "accuracy", "margin", "rewards/chosen",
                      "rewards/rejected", "mean_reward"},
                     {"loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected", "mean_reward", "ece",
                      "accuracy_ci95"}, set()),
    "ppo": ({"episode", "objective/kl_coef", "loss/policy", "grad_norm/policy", "policy/approx_kl",
             "policy/clipfrac", "policy/entropy", "policy/logprob_gap", "val/ratio", "val/explained_variance",
             *OF_CRITIC, *OBJECTIVES, *SAMPLED}, OBJECTIVES | SAMPLED, set()),
    "grpo": ({"episode", "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy",
              "policy/approx_kl", "policy/clipfrac", "policy/logprob_gap", *SAMPLED},
             {"reward", "kl", *SAMPLED}, set())}
SAMPLES = {"sft": {"prompt", "completion"}, "dpo": {"prompt", "completion"},
           "reward_model": {"comparison", "text", "rank", "reward"},
           "ppo": {"prompt", "completion", "score", "kl"}, "grpo": {"prompt", "completion", "reward", "kl"}}


def test_run_folder(name, script, tiny, go, starts):
    run = go("run", eval_every=1, save_every=1)
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    critic = {"critic"} if name == "ppo" else set()
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", "model"} | critic  # and no state/
    record = json.loads((run / "args.json").read_text())
    flags = json.loads(json.dumps(dataclasses.asdict(tiny(eval_every=1, save_every=1, output_dir=str(run)))))
    assert {key: record[key] for key in flags} == flags
    assert record["torch"] == torch.__version__ and record["transformers"] == transformers.__version__
    assert record["device"] == "cpu" and 0 < record["seconds"] < 600
    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]
    of_step, prefixed, plain = METRICS[name]
    assert set(rows[1]) == EVERY_ROW | of_step
    assert set(rows[0]) == set(rows[2]) == {"step"} | {f"eval/{key}" for key in prefixed} | plain
    samples = read(run / "samples.jsonl")
    assert all(set(row) == {"step"} | SAMPLES[name] for row in samples)
    held_out = read(starts / f"{name}_held_out.jsonl")
    first = samples[: len(samples) // 4]
    assert [row["step"] for row in samples] == [step for step in range(4) for _ in first]
    if name != "reward_model":
        assert [row["prompt"] for row in samples] == [row["prompt"] for row in held_out] * 4
        return
    want = [(k, row["prompt"] + text, rank) for k, row in enumerate(held_out) for text, rank in (
        zip(row["completions"], row["ranking"]) if "ranking" in row else
        ((row["chosen"], 1), (row["rejected"], 2)))]
    assert [(row["comparison"], row["text"], row["rank"]) for row in samples] == want * 4


@pytest.mark.parametrize("name", ["ppo"])
def test_run_folder_without_critic(go):
    run = go("run", critic="none")
    assert not (run / "critic").exists()
    assert set(trained_rows(run)[0]) == (EVERY_ROW | METRICS["ppo"][0]) - {"tokens_per_second"} - OF_CRITIC


def test_main_returns_the_last_metrics(script, tiny, tmp_path):
    """And leaves no signal handler behind."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    last = script.main(tiny())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert {**rows[-2], **rows[-1]} == {"step": 3, **last}


AUTO = {"sft": "CausalLM", "dpo": "CausalLM", "reward_model": "SequenceClassification", "ppo": "CausalLM",
        "grpo": "CausalLM"}


def load(run, name, part="model"):
    """A saved model as anyone loads it, in eval mode."""
    kind = "TokenClassification" if part == "critic" else AUTO[name]
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(run / part).eval()


@pytest.mark.parametrize("name, part", [*((name, "model") for name in SCRIPTS), ("ppo", "critic")])
def test_saved_model_is_the_trained_one(name, part, go, trained):
    run = go("run")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(run / part), load(run, name, part)
    text = PROMPT + GOOD["sft"]["completion"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    want = trained[part].eval()
    with torch.no_grad():  # kernels depend on where a tensor lies in memory
        assert (model(ids).logits - want(ids).logits).abs().max() < 1e-6
    assert set(model.state_dict()) == set(want.state_dict())
    assert all(torch.equal(weight, want.state_dict()[key]) for key, weight in model.state_dict().items())
    files = {path.name for path in (run / part).iterdir()}
    assert "model.safetensors" in files and not any(file.endswith((".bin", ".pt")) for file in files)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_right_models_are_trained(name, go, starts):
    """The policy, and the critic; neither the reference's nor the reward model's weights are what is saved."""
    run = go("run")
    for part, start in (("model", "run1"), ("critic", "reward1"))[: 1 + (name == "ppo")]:
        folders = (starts / start / "model", run / part)
        before, after = (load_file(folder / "model.safetensors") for folder in folders)
        moved = [key for key in after if key in before and not torch.equal(before[key], after[key])]
        assert len(moved) == len(before) > 15
    assert name == "grpo" or load_file(run / "critic" / "model.safetensors")["score.bias"] != 0


@pytest.mark.parametrize("name", ["sft", "dpo", *SAMPLERS])
def test_saved_model_generates_to_eos(name, go):
    run = go("run")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(run / "model"), load(run, name)
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


@pytest.fixture
def chat_ends(starts, tmp_path):
    """A start that pads with its EOS and, as chat models do, ends with any of several tokens, of which
    generation_config.json alone tells.
    """
    tokenizer = json.loads((starts / "run1" / "model" / "tokenizer_config.json").read_text())
    return copy_model(starts, tmp_path / "ends", generation_config__json=b'{"eos_token_id": [7, 1]}',
                      tokenizer_config__json=json.dumps({**tokenizer, "pad_token": "<eos>"}).encode())


@pytest.mark.parametrize("name", ["sft", "dpo", *SAMPLERS])
def test_pad_that_is_eos_and_several_eos(name, go, starts, chat_ends):
    """EOS is trained all the same, and any of them ends a sample."""
    run = go("run", model=str(chat_ends))
    saved = transformers.GenerationConfig.from_pretrained(run / "model")
    assert saved.eos_token_id == [1, 7] and saved.pad_token_id not in (1, 7)
    if name not in SAMPLERS:
        num_tokens = trained_rows(run)[-1]["num_tokens"]
        assert num_tokens == sum(map(count_tokens, read(starts / f"{name}.jsonl")))


@pytest.fixture
def reward_of_chat(chat_ends, tmp_path, starts):
    """The folder of a reward model that is trained from `chat_ends`."""
    launch(reward_model, reward_model.Args(
        model=str(chat_ends), dataset=str(starts / "reward_model.jsonl"), num_train_epochs=1, batch_size=5,
        eval_dataset=str(starts / "reward_model_held_out.jsonl"), micro_batch_size=5, device="cpu",
        output_dir=str(tmp_path / "reward")))
    return tmp_path / "reward"


@pytest.mark.parametrize("start", ["run1", "ends"])
def test_saved_reward_model_is_one_for_others(request, starts, tmp_path, start):
    """transformers and vLLM read a row's score at the last token that is not padding, so pad is no EOS, and
    squash it unless the problem is called a regression. The mean reward of the held-out completions is 0.
    """
    folder = starts / "reward1" if start == "run1" else request.getfixturevalue("reward_of_chat")
    model, tokenizer = load(folder, "reward_model"), transformers.AutoTokenizer.from_pretrained(folder / "model")
    config, kept = model.config, read(folder / "samples.jsonl")
    assert config.num_labels == 1 and config.problem_type == "regression"
    assert config.eos_token_id in ([[1, 7]] if start == "ends" else [[1], 1])
    assert config.pad_token_id == tokenizer.pad_token_id not in (None, 1, 7)
    last = [row for row in kept if row["step"] == kept[-1]["step"]]
    batch = tokenizer([row["text"] + tokenizer.eos_token for row in last], padding=True, return_tensors="pt")
    for mask in (batch["attention_mask"], None):  # in one padded batch
        with torch.no_grad():
            scores = model(input_ids=batch["input_ids"], attention_mask=mask).logits[:, 0]
        assert scores.tolist() == pytest.approx([row["reward"] for row in last], abs=1e-5)
    held_out = read(starts / "reward_model_held_out.jsonl")
    sizes = [len(row.get("ranking", [1, 2])) for row in held_out]
    assert len(last) == sum(sizes)
    means = [part.mean() for part in scores.split(sizes)]  # each comparison counts the same
    assert config.reward_mean == pytest.approx(torch.stack(means).mean().item(), abs=1e-5)
    row = read(folder / "metrics.jsonl")[-1]
    assert config.reward_mean == row["eval/mean_reward"] and config.held_out_accuracy == row["eval/accuracy"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_reward_model_with_a_pad_token_of_its_own(name, go, chat_ends, reward_of_chat):
    """reward_model.py adds one where pad is EOS: the policy's tokens are still all known to it."""
    assert trained_rows(go("run", model=str(chat_ends), **typed(name, "reward", str(reward_of_chat / "model"))))


def test_chat_template_is_saved(name, go, starts, tmp_path):
    """Message lists train with a chat template, and the template travels with the model."""
    folder = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    pairs = [{"prompt": [ASK], "chosen": [REPLY], "rejected": [REFUSE]}] * 2
    rows = {"sft": [{"messages": [ASK, reply]} for reply in (REPLY, REFUSE)], "dpo": pairs,
            "reward_model": [*pairs, {"prompt": [ASK], "completions": [[REFUSE], [REPLY], [REPLY, ASK, REFUSE]],
                                      "ranking": [2, 1, 2]}], **dict.fromkeys(SAMPLERS, [{"prompt": [ASK]}] * 2)}
    path = write(tmp_path / "chat.jsonl", rows[name])
    run = go("run", model=str(folder), dataset=path, eval_dataset=path)
    for part in {"model", "critic"} & {part.name for part in run.iterdir()}:
        assert transformers.AutoTokenizer.from_pretrained(run / part).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("name", ["dpo", "reward_model"])
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


def halved(starts, folder, run, name):
    """A start with its weights in bf16."""
    copy_model(starts, folder, run=run)
    load(starts / run, name).bfloat16().save_pretrained(folder)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    return folder


def test_bf16_checkpoint_trains_in_fp32(name, go, tiny, starts, tmp_path):
    """A step of 1e-6 does not move a bf16 weight of 0.05, whose grid is 2e-4: each matrix must move."""
    folders = {"model": halved(starts, tmp_path / "half", "run1", "sft")}
    more, steps = {}, first_of(4, tiny()) - 1
    if name in SAMPLERS:
        more = typed(name, "reward", str(halved(starts, tmp_path / "half_reward", "reward1", "reward_model")))
    if name == "ppo":
        folders["critic"], more["critic_learning_rate"] = tmp_path / "half_reward", 1e-6
    run = go("run", model=str(folders["model"]), learning_rate=1e-6, anneal_lr=False, **more)
    for part, folder in folders.items():
        before, after = (load_file(path / "model.safetensors") for path in (folder, run / part))
        assert {weight.dtype for weight in after.values()} == {torch.float32}
        assert load(run, name, part).dtype == torch.float32
        assert set(before) <= set(after) <= {*before, "score.weight", "score.bias"} and len(after) > 15
        for key, weight in before.items():
            change = (after[key] - weight.float()).abs()
            assert change.max() < 1.4e-6 * steps, key  # as many steps of AdamW
            if weight.dim() == 2 and not ("embed" in key and (name, part) in (
                    ("reward_model", "model"), ("ppo", "critic"))):  # words that no row holds
                assert (change > 0).float().mean() > 0.9, key


# ---- 5. and 6. Micro-batches, bookkeeping ----


@pytest.fixture
def many_ends(starts, tmp_path):
    """A start in which any of 25 tokens ends a response: lengths from 1 to --max-new-tokens."""
    return str(copy_model(starts, tmp_path / "many_ends",
                          generation_config__json=json.dumps({"eos_token_id": [1, *range(20, 44)]}).encode()))


@pytest.fixture
def ragged(request, name, tmp_path):
    """Flags for rows of very different lengths: equal lengths hide every aggregation bug."""
    def cut(text, i):
        return text[: 20 + 13 * (i % 4)].rsplit(" ", 1)[0]

    if name in SAMPLERS:
        prompts = [{"prompt": " ".join([*["very"] * (i % 5), "review of the plot :"])} for i in range(20)]
        return {"model": request.getfixturevalue("many_ends"),
                "dataset": write(tmp_path / "ragged.jsonl", prompts)}
    rows = [{key: cut(value, i) if key in SIDES[name] else
             [cut(text, i + k) for k, text in enumerate(value)] if key == "completions" else value
             for key, value in row.items()} for i, row in enumerate(rows_of(name, 0, 20))]
    path = write(tmp_path / "ragged.jsonl", rows)
    return {"dataset": path, "eval_dataset": path}  # 20 rows: parts of 8, 8 and 4


def approx_rows(want, tolerance):
    """An implicit reward is a difference of log-probs of 50 nats, which fp32 holds to 4e-6."""
    approx = lambda value: pytest.approx(value, rel=tolerance, abs=1e-5)
    return [{key: approx(value) for key, value in row.items()} for row in want]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_change_nothing(go, ragged, micro):
    flags = {**ragged, "batch_size": 8, "eval_every": 1}
    whole, parts = go("whole", **flags, micro_batch_size=8), go("parts", **flags, micro_batch_size=micro)
    logged = numbers(whole), numbers(parts)
    for first_step in (logged[0][1], logged[1][1]):  # pi = pi_ref: the sign of a margin of 0 is rounding
        assert abs(first_step.get("rewards/margins", 0.0)) < 1e-5
        first_step.pop("rewards/accuracies", None)
    assert logged[1] == approx_rows(logged[0], 1e-4)
    for path in whole.glob("*/model.safetensors"):
        a, b = (load_file(run / path.relative_to(whole)) for run in (whole, parts))
        for key, weight in a.items():
            assert (weight - b[key]).abs().max() < 1e-4, key  # a tenth of one step at the rate of 1e-3


@pytest.mark.parametrize("name", ["reward_model"])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_no_plackett_luce(go, ragged, micro):
    flags = {**ragged, "batch_size": 8, "loss_type": "plackett_luce"}
    whole, parts = go("whole", **flags, micro_batch_size=8), go("parts", **flags, micro_batch_size=micro)
    assert numbers(parts) == approx_rows(numbers(whole), 1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_is_scored_as_it_sampled(script, go, ragged, monkeypatch):
    """Before the first update of weights: the same log-probs at any temperature. A sampler that is off in
    one row is seen whatever the micro-batches are.
    """
    flags = {**ragged, "batch_size": 8, "max_new_tokens": 20}
    assert all(row["policy/logprob_gap"] < 1e-5 for row in trained_rows(go("warm", temperature=0.7, **flags)))
    sample = script.sample

    def off(*args):
        tokens, logprobs, lengths = sample(*args)
        return tokens, logprobs + 1e-3 * torch.arange(len(tokens))[:, None] * (logprobs != 0), lengths

    monkeypatch.setattr(script, "sample", off)
    gaps = [[row["policy/logprob_gap"] for row in trained_rows(go(f"off{micro}", micro_batch_size=micro, **flags))]
            for micro in (8, 1)]
    assert min(gaps[0]) > 5e-3 and gaps[1] == pytest.approx(gaps[0], abs=1e-5)


def count_tokens(row) -> int:
    """num_tokens of a row of the world, where each word is a token: trained ones of sft, all of dpo and
    reward_model.
    """
    if "completion" in row:
        return len(row["completion"].split()) + 1
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    return sum(len((row["prompt"] + text).split()) + 1 for text in texts)


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


@pytest.mark.parametrize("name", ONE_LR)
def test_each_row_once_an_epoch(name, go, batches, starts):
    """10 rows, batch 4, 3 epochs: 9 steps, the last of an epoch smaller, in another order each epoch."""
    run = go("run", epochs=3)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    rows = trained_rows(run)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["epoch"] for row in rows] == pytest.approx([step / 3 for step in range(1, 10)])
    total = sum(map(count_tokens, read(starts / f"{name}.jsonl")))
    assert [rows[i]["num_tokens"] for i in (2, 5, 8)] == [total, 2 * total, 3 * total]


@pytest.mark.parametrize("name, size", [("ppo", 1), ("grpo", 2)])
def test_each_response_once_an_epoch(name, size, go, script, monkeypatch, tmp_path):
    """36 groups of this size, which grpo.py keeps together: 10 prompts in 3.6 passes, each in another order;
    the responses of an update twice, in two minibatches, in another order each time.
    """
    drawn, trained_on, n = [], [], 4 * size  # n responses an update
    rollout, loss = script.rollout, getattr(script, f"{name}_loss")

    def draw(*args):
        batch, metrics = rollout(*args)
        drawn.append(([row["prompt"] for row, _ in args[3]], batch))
        return batch, metrics

    def record(logprobs, old, *args):
        trained_on.append([drawn[-1][1]["logprobs"].tolist().index(row) for row in old.tolist()])
        return loss(logprobs, old, *args)

    monkeypatch.setattr(script, "rollout", draw)
    monkeypatch.setattr(script, f"{name}_loss", record)
    rows = trained_rows(go("run", epochs=3))
    updates = drawn[1:-1]  # but for the evaluations before and after
    assert [len(prompts) for prompts, _ in updates] == [n] * 9
    groups = [prompts[i : i + size] for prompts, _ in updates for i in range(0, n, size)]
    assert len(groups) == 36 and all(len(set(group)) == 1 for group in groups)
    prompts = [group[0] for group in groups]
    passes = [prompts[i : i + 10] for i in (0, 10, 20)]
    assert all(len(set(each)) == 10 and set(each) == set(passes[0]) for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0] and len(set(prompts[30:])) == 6
    assert len(trained_on) == 9 * 4 and all(len(minibatch) == n // 2 for minibatch in trained_on)
    epochs = [trained_on[i] + trained_on[i + 1] for i in range(0, 36, 2)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 8  # of the 24 orders of 4
    assert any(epochs[i] != epochs[i + 1] for i in range(0, 18, 2))
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["episode"] for row in rows] == list(range(n, 9 * n + 1, n))
    tokens = [int(batch["mask"].sum()) for _, batch in updates]
    assert [row["num_tokens"] for row in rows] == list(itertools.accumulate(tokens))
    assert [n * row["completions/mean_length"] for row in rows] == pytest.approx(tokens)


@pytest.mark.parametrize("name", ONE_LR)
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates(go, warmup, anneal):
    peak, steps = 1e-3, 9
    rows = trained_rows(go("run", epochs=3, warmup_steps=warmup, anneal_lr=anneal))
    rates = [row["learning_rate"] for row in rows]
    rising = [peak * (k + 1) / warmup for k in range(warmup)]
    falling = [peak * (1 - k / (steps - warmup)) if anneal else peak for k in range(steps - warmup)]
    assert rates == pytest.approx(rising + falling, rel=1e-9)
    assert rates[0] > 0 and max(rates) == peak
    if anneal:
        assert rates[-1] == pytest.approx(peak / (steps - warmup))


@pytest.mark.parametrize("name, more", [("ppo", {"critic_learning_rate": 5e-3}), ("grpo", {})])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates_of_updates(go, anneal, more):
    """That of the policy is logged; a critic's is used too, in a group of its own in the optimizer."""
    used = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups]))
    rows = trained_rows(go("run", epochs=3, anneal_lr=anneal, **more))
    hook.remove()
    want = [1 - k / 9 if anneal else 1.0 for k in range(9)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * x for x in want], rel=1e-9)
    peaks = [1e-3, *more.values()]
    assert used == [pytest.approx([peak * x for peak in peaks], rel=1e-9) for x in want for _ in range(4)]


@pytest.mark.parametrize("name, part", [*((name, "model") for name in SCRIPTS), ("ppo", "critic")])
def test_learning_rate_is_the_one_used(name, part, go):
    """AdamW's first step moves each weight by the learning rate, whatever the gradient."""
    flags = {"anneal_lr": False, "max_grad_norm": 1e9, **one_step(name)}
    flag, other = ("critic_learning_rate", "learning_rate") if part == "critic" else ("learning_rate", None)
    flags |= {other: 0.1} if other else {"critic_learning_rate": 0.1} if name == "ppo" else {}
    runs = [go(f"run{lr}", **{flag: lr}, **flags) for lr in (0.0, 1e-3)]
    a, b = (load_file(run / part / "model.safetensors") for run in runs)
    moves = torch.cat([(a[key] - b[key]).abs().flatten() for key in a if a[key].dim() == 2])
    assert moves.median().item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_0_changes_nothing(name, go):
    """The evaluations are equal to the last digit: the same rows, the same noise, the same weights. pi is
    pi_old and pi_ref, and no clip decides.
    """
    still = {"critic_learning_rate": 0.0, "target_kl": 0.0} if name == "ppo" else {}
    run = go("run", learning_rate=0.0, **still)
    first, *rows, last = timeless(read(run / "metrics.jsonl"))
    assert first == {**last, "step": 0}
    before, after = ([{**row, "step": 0} for row in read(run / "samples.jsonl") if row["step"] == step]
                     for step in (0, 3))
    assert before == after != []
    for row in rows if name in SAMPLERS else []:
        assert row["policy/clipfrac"] == row.get("val/clipfrac", 0) == 0
        assert row.get("val/ratio", 1) == pytest.approx(1, abs=1e-6)
        assert [row["objective/kl" if name == "ppo" else "kl"], row["policy/approx_kl"]] == pytest.approx(
            [0, 0], abs=1e-5)


# ---- 8. and 9. Options ----

INERT = {"output_dir", "resume", "micro_batch_size", "save_every", "device", "gradient_checkpointing",
         "track", "wandb_project_name", "score"}  # these must not change a number; each has its own test here
OPTIONS = {
    "model": "run2/model", "reward": "reward2/model", "dataset": "_other.jsonl", "eval_dataset": "_other.jsonl",
    "critic": "none", "seed": 2, "num_train_epochs": 2, "total_episodes": 16, "batch_size": 8,
    "num_minibatches": 1, "update_epochs": 1, "max_length": 12, "max_prompt_length": 5, "max_new_tokens": 3, "temperature": 0.7,
    "learning_rate": 2e-3, "critic_learning_rate": 2e-3, "warmup_steps": 2, "anneal_lr": False,
    "weight_decay": 1.0, "max_grad_norm": 1e-6, "beta": 0.1, "label_smoothing": 0.2, "kl_coef": 3.0,
    "target_kl": 0.0, "kl_horizon": 16, "gamma": 0.5, "gae_lambda": 0.5, "clip_coef": 1e-3,
    "clip_coef_value": 1e-3, "norm_adv": False, "missing_eos_penalty": 3.0, "eval_every": 1,
    "eval_samples": 1, "dtype": "bfloat16", "loss_type": "ipo", "num_generations": 4, "reward_weights": (2.0,),
    "kl_in": "reward", "kl_estimator": "k2", "baseline": "leave_one_out", "scale_rewards": "none",
    "drop_zero_std": True, "importance_sampling_level": "sequence", "clip_coef_high": 1e-3}
OPTIONS_OF = {"reward_model": {"loss_type": "plackett_luce"}, "ppo": {"batch_size": 4},
              "grpo": {"loss_type": "dr_grpo", "total_episodes": 32}}


def option(name, flag, starts):
    """Another value of this flag than that of the tiny runs."""
    value = OPTIONS_OF.get(name, {}).get(flag, OPTIONS[flag])
    if flag in ("dataset", "eval_dataset"):
        return str(starts / f"{name}{value}")
    return typed(name, flag, str(starts / value))[flag] if flag in ("model", "reward") else value


def flags_of(script) -> list[str]:
    return [field.name for field in dataclasses.fields(script.Args)]


def numbers(run) -> list[dict]:
    """What a run measures: no timing, and no echo of a flag."""
    return [{key: value for key, value in row.items() if key != "learning_rate"}
            for row in timeless(read(run / "metrics.jsonl"))]


@pytest.fixture(scope="session")
def measured():
    """What the runs of `test_option_does_something` without its flag measured, by script."""
    return {}


@pytest.mark.parametrize("name, flag", [(name, flag) for name, script in SCRIPTS.items()
                                        for flag in flags_of(script) if flag not in INERT])
def test_option_does_something(go, starts, measured, name, flag):
    """Two steps with a changed flag measure something else, by more than rounding."""
    flags = {"ppo": {"total_episodes": 8}, "grpo": {"total_episodes": 16, **rewarded(starts, "rewards.py:odd")}}
    flags = flags.get(name, {"dataset": str(starts / f"{name}_short.jsonl")})
    flags |= {} if name == "reward_model" else {"max_new_tokens": 16}
    measure = lambda run: [*numbers(run), {"samples": len(read(run / "samples.jsonl"))}]
    if name not in measured:
        measured[name] = measure(go("before", **flags))
    before, after = measured[name], measure(go("after", **{**flags, flag: option(name, flag, starts)}))
    assert len(before) == 5
    assert [set(row) for row in after] != [set(row) for row in before] or after != approx_rows(before, 1e-6)


def test_gradient_checkpointing_changes_no_number(name, go, trained):
    """Nor a sample: transformers turns the cache off in a checkpointed model that is in training mode."""
    runs, enabled = [], []
    for value in (False, True):
        runs.append(go(f"run {value}", gradient_checkpointing=value))
        enabled.append([any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
                        for model in trained.values()])
    assert enabled == [[False] * len(trained), [True] * len(trained)]
    assert len(trained) == 1 + (name == "ppo")
    assert numbers(runs[1]) == approx_rows(numbers(runs[0]), 1e-5)
    assert read(runs[1] / "samples.jsonl")[:4] == read(runs[0] / "samples.jsonl")[:4]


def test_evaluation_and_checkpoints_change_no_training(name, go):
    """Neither evaluating, sampling nor saving draws from the noise of training."""
    more = {"max_new_tokens": 5} if name in ("sft", "dpo") else {}
    never, always = go("never"), go("always", eval_every=1, save_every=1, eval_samples=2, **more)
    assert len(trained_rows(never)) == 3 and trained_rows(never) == trained_rows(always)
    weights = [{key: value for key, value in result(run)[1].items() if key.endswith("safetensors")}
               for run in (never, always)]
    assert weights[0] == weights[1]


def test_wandb_gets_what_the_file_gets(go, monkeypatch):
    """A stand-in for the package, which the tests must not need: init and log are all that is called."""
    calls = []
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options),
                                  log=lambda metrics, step: calls.append({"step": step, **metrics}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = go("named", track=True, wandb_project_name="films")
    assert calls[0]["project"] == "films" and calls[0]["config"]["learning_rate"] == 1e-3
    assert calls[1:] == read(run / "metrics.jsonl")


# ---- Rewards, scores, and the default start ----


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("chat", [False, True])
def test_reward_function_gets_what_trl_gives_it(name, go, starts, tmp_path, chat):
    """By keyword: prompts and completions as texts, or as lists of messages where the prompt is one, and all
    columns of the data, with None where a row lacks one, whichever row comes first.
    """
    (tmp_path / "log.py").write_text(f"""
import json

def log(name="first", **inputs):
    with open({str(tmp_path)!r} + "/" + name, "a") as file:
        file.write(json.dumps(inputs) + "\\n")
    return [0.5] * len(inputs["completions"])

def too(**inputs): return log("second", **inputs)
""")
    texts = [row["prompt"] for row in rows_of("ppo", 0, 6)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    rows = [{"prompt": prompt, "number": i, **({"answer": [i]} if i % 3 else {})}
            for i, prompt in enumerate(prompts)]
    template = {"chat_template__jinja": CHAT_TEMPLATE.encode()} if chat else {}
    model = copy_model(starts, tmp_path / "model", **template)
    path = write(tmp_path / "rows.jsonl", rows)
    reward = {"ppo": {"reward": f"{tmp_path / 'log.py'}:log"}, "grpo": rewarded(tmp_path, "log.py:log", "log.py:too")}
    run = go("run", model=str(model), dataset=path, eval_dataset=path, missing_eos_penalty=0.0,
             **reward[name])
    calls = read(tmp_path / "first")
    assert name == "ppo" or read(tmp_path / "second") == calls
    n, update = {"ppo": (4, 4), "grpo": (6, 8)}[name]  # evaluation, three updates, evaluation
    assert [len(call["prompts"]) for call in calls] == [n, update, update, update, n]
    for call in calls:
        assert set(call) == {"prompts", "completions", "number", "answer"}
        for prompt, completion, number, answer in zip(*(call[key] for key in (
                "prompts", "completions", "number", "answer"))):
            assert prompt == prompts[number] and answer == ([number] if number % 3 else None)
            if chat:
                assert [set(message) for message in completion] == [{"role", "content"}]
                assert completion[0]["role"] == "assistant"
    shown = [completion[0]["content"] if chat else completion for completion in calls[0]["completions"]]
    assert shown == [row["completion"] for row in read(run / "samples.jsonl")][:n]
    assert all(len(text.split()) <= 8 and "<" not in text for text in shown)
    assert all(row[SCORES[name][0]] == {"ppo": 0.5, "grpo": 1.0}[name] for row in trained_rows(run))


@pytest.mark.parametrize("name", SAMPLERS)
def test_reward_file_may_hold_any_python(name, go, tmp_path):
    """Dataclasses with postponed annotations look their module up by its name."""
    (tmp_path / "typed.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Score:
    value: float

def typed(prompts, completions, **columns):
    return [Score(1.0).value for _ in completions]
""")
    assert trained_rows(go("run", total_episodes=8, **typed(name, "reward", f"{tmp_path / 'typed.py'}:typed")))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("function", ["good", "whole"])
def test_score_of_a_sample_is_the_functions_less_the_penalty(name, go, many_ends, rewards, tmp_path, function):
    flags = {"model": many_ends, "eval_samples": 12, "total_episodes": 8, "max_new_tokens": 4,
             "eval_dataset": write(tmp_path / "held_out.jsonl", rows_of(name, 0, 12)),
             **typed(name, "reward", f"{rewards}:{function}")}
    metric, score = SCORES[name]
    free, fined = (go(f"fine {fine}", missing_eos_penalty=fine, **flags) for fine in (0.0, 3.0))
    kept = [[row for row in read(run / "samples.jsonl") if row["step"] == 0] for run in (free, fined)]
    assert [row[score] for row in kept[0]] == [len(row["completion"].split()) for row in kept[0]]
    assert [row["completion"] for row in kept[0]] == [row["completion"] for row in kept[1]]
    fines = [a[score] - b[score] for a, b in zip(*kept)]
    start = read(fined / "metrics.jsonl")[0]
    assert set(fines) == {0.0, 3.0} and fines.count(0.0) / 12 == pytest.approx(start["eval/completions/eos_rate"])
    assert start[f"eval/{metric}"] == pytest.approx(statistics.fmean(row[score] for row in kept[1]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_texts_for_a_reward_function_hold_no_eos(name, go, rewards):
    start, *_ = read(go("run", missing_eos_penalty=0.0, eval_samples=64, max_new_tokens=24, total_episodes=8,
                        **typed(name, "reward", f"{rewards}:marks")) / "metrics.jsonl")
    assert start["eval/completions/eos_rate"] > 0.05 and start[f"eval/{SCORES[name][0]}"] == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_score_of_a_sample_is_the_reward_models(name, go, starts):
    """Less its mean reward, read where the reward model was trained to be read: at an EOS, of a response that
    was cut before its own as well.
    """
    model = load(starts / "reward1", "reward_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "model")
    rows = read(go("run", missing_eos_penalty=0.0, eval_samples=8, eval_dataset=str(starts / f"{name}_other.jsonl"))
                / "samples.jsonl")
    rows = [row for row in rows if len(row["completion"].split()) == 8]
    assert len(rows) > 6
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            score = model(input_ids=ids).logits.item() - model.config.reward_mean
        assert row[SCORES[name][1]] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_new_in_each_update(name, go, script, starts, tmp_path, monkeypatch):
    """But at evaluations always the same, so that they differ by the policy alone. One prompt, no learning."""
    drawn, sample = [], script.sample

    def record(*args):
        drawn.append(sample(*args))
        return drawn[-1]

    monkeypatch.setattr(script, "sample", record)
    path = write(tmp_path / "one.jsonl", [GOOD[name]])
    go("run", dataset=path, eval_dataset=path, learning_rate=0.0)
    rows = [row for tokens, *_ in drawn for row in map(tuple, tokens.tolist())]
    n = len(rows) // 5
    assert n == len(drawn[0][0]) >= 4 and rows[:n] == rows[4 * n :] and len(set(rows)) == 4 * n


@pytest.mark.parametrize("name", ["ppo"])
def test_objectives_add_up(go, many_ends):
    """Scores less the coefficient times the KL, with the coefficient that the rewards were made with."""
    for row in read(go("run", model=many_ends, eval_every=1, max_new_tokens=16) / "metrics.jsonl"):
        prefix, used = ("", row["objective/kl_coef"]) if "loss/policy" in row else ("eval/", None)
        scores, kl, penalty, total = (row[f"{prefix}objective/{key}"] for key in (
            "scores", "kl", "non_score_reward", "rlhf_reward"))
        assert total == pytest.approx(scores + penalty)
        assert used is None or penalty == pytest.approx(-used * kl)
    assert used is None and abs(kl) > 1e-2  # by now the policy has left the reference


@pytest.mark.parametrize("name", ["ppo"])
def test_kl_coefficient_adapts(go, script, monkeypatch):
    """By at most 20 % in --kl-horizon responses; here a KL near 0 is far below its target. What is logged is
    what the rewards are made with.
    """
    used, token_rewards = [], script.token_rewards
    monkeypatch.setattr(script, "token_rewards", lambda *args: used.append(args[-1]) or token_rewards(*args))
    rows = trained_rows(go("run", target_kl=5.0))
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.3 * 0.98**k for k in range(3)])
    assert [row["objective/kl_coef"] for row in rows] == used


@pytest.mark.parametrize("name", ["ppo"])
@pytest.mark.parametrize("model", ["run1/model", ""], ids=["weights", "random"])
def test_critic_of_the_policy(go, starts, rewards, model):
    """Without a reward model the critic starts as the policy does, even if that starts at random."""
    run = go("run", model=str(starts / model if model else DATA / "model"), reward=f"{rewards}:good")
    assert (run / "critic" / "model.safetensors").exists() and len(trained_rows(run)) == 3


@pytest.mark.parametrize("name", ["reward_model"])
def test_held_out_rankings_and_a_single_pair(go, starts, tmp_path):
    """The labels' ceiling is logged where it is known; one comparison has no spread, and JSON no NaN."""
    pairs = head("preferences_test", 0, 3)
    for k, rows in enumerate((pairs, pairs[:1], head("rankings_test", 0, 2))):
        path = write(tmp_path / f"{k}.jsonl", rows)
        row = read(go(f"run{k}", eval_dataset=path) / "metrics.jsonl")[-1]
        known = [max(row["p_chosen"], 1 - row["p_chosen"]) for row in rows if "p_chosen" in row]
        assert ("eval/accuracy_ceiling" in row) == bool(known)
        assert not known or row["eval/accuracy_ceiling"] == pytest.approx(statistics.fmean(known))


@pytest.fixture
def scorer(starts, tmp_path):
    """A finished run of reward_model.py to score with."""
    return shutil.copytree(starts / "reward1", tmp_path / "scorer")


@pytest.mark.parametrize("name", ["reward_model"])
@pytest.mark.parametrize("micro", [1, 4])
def test_score_file(script, tiny, scorer, starts, tmp_path, micro):
    """Each row with its score, as samples.jsonl has it, and less the mean; nothing else is touched."""
    held_out = read(starts / "reward_model_held_out.jsonl")
    rows = [{"prompt": row["prompt"], "completion": text, "number": [k]} for k, row in enumerate(held_out)
            for text in row.get("completions", [row.get("chosen"), row.get("rejected")])]
    path = write(tmp_path / "some.rows.jsonl", rows)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    last = launch(script, tiny(score=path, output_dir=str(scorer), micro_batch_size=micro))
    scored, output = read(tmp_path / "some.rows.scores.jsonl"), tmp_path / "some.rows.scores.jsonl"
    assert [{key: row[key] for key in ("prompt", "completion", "number")} for row in scored] == rows
    assert all(set(row) == {"prompt", "completion", "number", "score", "reward"} for row in scored)
    model, tokenizer = load(scorer, "reward_model"), transformers.AutoTokenizer.from_pretrained(scorer / "model")
    for row in scored:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            assert row["score"] == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)
        assert row["reward"] == pytest.approx(row["score"] - model.config.reward_mean, abs=1e-6)
    assert last["mean_reward"] == pytest.approx(statistics.fmean(row["reward"] for row in scored), abs=1e-6)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != output}
    assert after == before


@pytest.mark.parametrize("name", ["reward_model"])
@pytest.mark.parametrize("kind", ["nothing", "run1", "unfinished"])
def test_score_without_a_reward_model(refused, starts, tmp_path, kind):
    """A language model has no head for it; the flag to change is not --model."""
    folder = starts / kind
    if kind == "unfinished":
        (tmp_path / "unfinished" / "state").mkdir(parents=True)
        folder = tmp_path / "unfinished"
    error = refused(score=str(starts / "sft.jsonl"), output_dir=str(folder))
    assert str(folder) in error and ("--score" in error or "--output-dir" in error)


@pytest.mark.parametrize("name", ["reward_model"])
def test_score_with_a_reward_model_of_others(script, tiny, starts, scorer, tmp_path):
    """Theirs knows no mean reward."""
    config = json.loads((scorer / "model" / "config.json").read_text())
    del config["reward_mean"], config["held_out_accuracy"]
    (scorer / "model" / "config.json").write_text(json.dumps(config))
    path = write(tmp_path / "rows.jsonl", rows_of("sft", 0, 3))
    launch(script, tiny(score=path, output_dir=str(scorer)))
    assert all(row["reward"] == row["score"] for row in read(tmp_path / "rows.scores.jsonl"))


@pytest.mark.parametrize("name", ["reward_model"])
@pytest.mark.parametrize("rows", [["{"], [], [{"prompt": PROMPT}], [{**GOOD["sft"], "prompt": LONG}]],
                         ids=["not JSON", "empty", "column", "long"])
def test_bad_file_to_score(refused, scorer, tmp_path, rows):
    path = write(tmp_path / "bad.jsonl", [GOOD["sft"], *rows] if rows else [])
    assert f"{path}:2" * bool(rows) in refused(score=path, output_dir=str(scorer))
    assert not (tmp_path / "bad.scores.jsonl").exists()


MAKERS = {"dpo": {"sft": "run1"}, "reward_model": {"sft": "run1"}, "grpo": {"sft": "run1"},
          "ppo": {"sft": "run1", "reward_model": "reward1"}}


@pytest.mark.parametrize("name", MAKERS)
def test_missing_start_is_made(name, script, go, starts, tmp_path, monkeypatch):
    """A script whose default start does not exist runs the script that makes it, once, and ends with it."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def make(command, **options):
        calls.append(list(map(str, command)))
        stem = Path(command[1]).stem
        shutil.copytree(starts / MAKERS[name][stem] / "model", Path("runs", stem, "model"))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", make)
    flags = ("model", "reward")[: len(MAKERS[name])]
    defaults = {flag: getattr(script.Args, flag) for flag in flags}
    first, second = go("first", **defaults), go("second", **defaults)
    assert calls == [[sys.executable, str(ROOT / f"{maker}.py")] for maker in MAKERS[name]]
    assert result(first) == result(second) == result(go("third"))


@pytest.mark.parametrize("name", MAKERS)
def test_missing_start_that_cannot_be_made(script, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, failed = [], types.SimpleNamespace(returncode=5)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or failed)
    with pytest.raises(SystemExit) as stop:
        launch(script, tiny(model=script.Args.model))
    assert stop.value.code == 5 and len(calls) == 1


# ---- Groups and several rewards ----


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("function", [function for function in BAD_REWARDS if function])
def test_bad_reward_among_several_is_named(refused, starts, rewards, function):
    """A None is bad where no other function scores the completion."""
    other = function if function in ("nones", "silent") else "good"
    error = refused(**rewarded(starts, f"rewards.py:{other}", f"rewards.py:{function}"))
    assert "--reward " in error and f"{rewards}:{function}" in error


@pytest.mark.parametrize("name", ["grpo"])
def test_language_model_among_several_rewards_is_named(refused, starts):
    assert f"--reward {starts / 'run1/model'}" in refused(**rewarded(starts, "rewards.py:good", "run1/model"))


@pytest.mark.parametrize("name, others", [("ppo", []), ("grpo", []), ("grpo", ["rewards.py:good"])], ids=str)
def test_reward_model_that_knows_not_every_word(name, refused, starts, tmp_path, others):
    """A NaN of its is no None: the model is named, and nothing trained on the other rewards alone."""
    folder = copy_model(starts, tmp_path / "model", run="reward1")
    weights, tokenizer = load_file(folder / "model.safetensors"), transformers.AutoTokenizer.from_pretrained(folder)
    texts = [row["prompt"] for test in ("", "_held_out") for row in read(starts / f"{name}{test}.jsonl")]
    known = {token for ids in tokenizer(texts)["input_ids"] for token in ids} | {tokenizer.eos_token_id}
    unknown = [token for token in range(len(tokenizer)) if token not in known]
    weights["model.embed_tokens.weight"][unknown] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    flags = {"ppo": {"reward": str(folder)}, "grpo": {"reward": (str(folder), *(str(starts / x) for x in others))}}
    error = refused(**flags[name])
    assert "--reward " in error and str(folder) in error and "learning-rate" not in error


PICKLED = """
import pickle
from dataclasses import dataclass

@dataclass
class Score:
    value: float

def one(prompts, completions, **columns):
    return [pickle.loads(pickle.dumps(Score(1.0))).value for _ in completions]

def two(prompts, completions, **columns):
    return [pickle.loads(pickle.dumps(Score(2.0))).value for _ in completions]
"""


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("specs", [("a.py:one", "a.py:two"), ("a.py:one", "b.py:two")], ids=["a file", "two files"])
def test_each_reward_finds_its_own_module(go, tmp_path, specs):
    """By its name, as pickle does, and with it a pool of processes."""
    for spec in specs:
        (tmp_path / spec.split(":")[0]).write_text(PICKLED)
    rows = trained_rows(go("run", total_episodes=8, **rewarded(tmp_path, *specs)))
    assert [row["reward"] for row in rows] == [3]


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("specs, weights", [(["a.py:f"], ()), (["a.py:f", "folder", "b.py:g"], (1.0, -0.5, 0.0))],
                         ids=["one", "three"])
def test_rewards_of_the_command_line(script, tiny, specs, weights):
    args = tiny(reward=tuple(specs), reward_weights=weights)
    assert tyro.cli(script.Args, args=as_flags(args)) == args


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("weights", [(), (2.0, -0.5)], ids=["sum", "weighted"])
def test_reward_is_the_weighted_sum(go, starts, many_ends, weights):
    """Less the penalty, which no weight scales; each one's own mean is logged too, as it is."""
    (specs,) = rewarded(starts, "rewards.py:good", "reward1/model").values()
    run = go("run", model=many_ends, reward=specs, reward_weights=weights, missing_eos_penalty=3.0,
             eval_every=1, max_new_tokens=4)
    rows, used = read(run / "metrics.jsonl"), weights or (1.0, 1.0)
    for row in rows:
        prefix = "" if "loss" in row else "eval/"
        good, model = (row[f"{prefix}rewards/{spec}"] for spec in specs)
        cut = 1 - row[f"{prefix}completions/eos_rate"]
        want = used[0] * good + used[1] * model - 3 * cut
        assert row[f"{prefix}reward"] == pytest.approx(want, abs=1e-5)
        assert 0 < cut < 1 and 0 < good <= 4 and abs(model) > 1e-3


ABSENT = """
import json, pathlib

def first(prompts, completions, who):
    with open(pathlib.Path(__file__).with_name("who.jsonl"), "a") as file:
        file.write(json.dumps(who) + "\\n")
    return [float(len(text)) if "1" in names else None for text, names in zip(completions, who)]

def second(prompts, completions, who):
    return [-1.0 if "2" in names else None for names in who]

def third(prompts, completions, who):
    return [float("nan") if "nan" in names else 0.25 if "3" in names else None for names in who]
"""


@pytest.mark.parametrize("name", ["grpo"])
def test_none_counts_as_absent(go, starts, tmp_path):
    """The others make the reward. A mean is one of what was scored, and there is none where nothing was."""
    (tmp_path / "absent.py").write_text(ABSENT)
    specs = [f"{tmp_path / 'absent.py'}:{function}" for function in ("first", "second", "third")]
    names = ["1", "2", "12", "21"]
    held_out = [{**row, "who": who} for row, who in zip(rows_of("grpo", 0, 4, "_test"), names)]
    rows = [{**row, "who": "3" if i == 4 else "1"} for i, row in enumerate(rows_of("grpo", 0, 10))]
    run = go("run", reward=tuple(specs), reward_weights=(2.0, 3.0, -1.0), eval_samples=4,
             dataset=write(tmp_path / "rows.jsonl", rows),
             eval_dataset=write(tmp_path / "held_out.jsonl", held_out))
    logged, seen = timeless(read(run / "metrics.jsonl")), read(tmp_path / "who.jsonl")
    for row, who, step in zip((logged[0], logged[-1]), (seen[0], seen[-1]), (0, 3)):
        samples = [sample for sample in read(run / "samples.jsonl") if sample["step"] == step]
        letters = [len(sample["completion"]) for sample in samples]
        assert who == names and [sample["reward"] for sample in samples] == [
            2 * letters[0], -3, 2 * letters[2] - 3, 2 * letters[3] - 3]
        assert row["eval/reward"] == pytest.approx(statistics.fmean(sample["reward"] for sample in samples))
        assert row[f"eval/rewards/{specs[0]}"] == pytest.approx(statistics.fmean([letters[0], *letters[2:]]))
        assert row[f"eval/rewards/{specs[1]}"] == -1 and f"eval/rewards/{specs[2]}" not in row
    present = [{spec for spec in specs if f"rewards/{spec}" in row} for row in logged[1:-1]]
    assert present == [{specs[int(who) - 1] for who in batch} for batch in seen[1:-1]]
    assert {len(specs) for specs in present} == {1, 2}  # a reward that is seldom asked is seldom logged


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("flags, steps", [({"drop_zero_std": True}, 0), ({"kl_coef": 0.0}, 12)], ids=str)
def test_groups_of_equal_rewards_teach_nothing(go, starts, rewards, capsys, flags, steps):
    """Dropped or not, the weights stay as they are to the last bit; dropped, there is no optimizer step."""
    taken = []
    hook = register_optimizer_step_pre_hook(lambda *_: taken.append(1))
    run = go("run", reward=(f"{rewards}:same",), **flags)
    hook.remove()
    assert len(taken) == steps
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (starts / "run1", run))
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    rows = trained_rows(run)
    assert [row["grad_norm"] for row in rows] == [row["reward_std"] for row in rows] == [0, 0, 0]
    assert [row["frac_reward_zero_std"] for row in rows] == [1, 1, 1]
    assert [row["reward"] for row in rows] == pytest.approx([0.1] * 3)
    assert all(abs(row["loss"]) < 1e-6 and row["num_tokens"] > 0 for row in rows)
    assert "100% of groups had zero variance" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_dropped_groups_leave_the_denominators(go, rewards, many_ends, loss_type):
    """Without KL they add nothing to the gradient: only what it is divided by changes."""
    flags = {"model": many_ends, "reward": (f"{rewards}:odd",), "kl_coef": 0.0, "loss_type": loss_type}
    (kept,), (dropped,) = (trained_rows(go(f"drop {drop}", drop_zero_std=drop, **one_step("grpo"), **flags))
                           for drop in (False, True))
    zero = kept["frac_reward_zero_std"]
    assert 0 < zero < 1 and dropped["frac_reward_zero_std"] == zero
    assert dropped["grad_norm"] == pytest.approx(kept["grad_norm"] / (1 - zero), rel=1e-4) != 0
    assert dropped["reward"] == kept["reward"] and dropped["num_tokens"] == kept["num_tokens"]


@pytest.mark.parametrize("name", ["grpo"])
def test_a_group_may_be_as_large_as_an_update(go, script, monkeypatch):
    """And be spread over its minibatches: advantages are made before."""
    shapes, group_advantages = [], script.group_advantages
    monkeypatch.setattr(script, "group_advantages",
                        lambda rewards, *args: shapes.append(rewards.shape) or group_advantages(rewards, *args))
    assert len(trained_rows(go("run", num_generations=8))) == 3 and shapes == [(1, 8)] * 3


def test_diagnoses_name_what_to_change():
    fine = {"frac_reward_zero_std": 0.5, "completions/eos_rate": 0.5, "policy/clipfrac": 0.3,
            "policy/logprob_gap": 0.5}
    assert grpo.diagnoses(fine) == []
    signs = [("frac_reward_zero_std", 0.75, "75% of groups", "num_generations"),
             ("completions/eos_rate", 0.25, "75% of responses", "max_new_tokens"),
             ("policy/clipfrac", 0.4, "40% of tokens", "learning_rate"),
             ("policy/logprob_gap", 0.8, "0.80 nats", "dtype")]
    for key, value, words, flag in signs:
        (line,) = grpo.diagnoses({**fine, key: value})
        assert words in line and f"--{flag.replace('_', '-')}" in line
        assert {name.replace("-", "_") for name in re.findall("--([a-z-]+)", line)} <= set(flags_of(grpo))
    assert len(grpo.diagnoses(fine | {key: value for key, value, *_ in signs})) == 4


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("second", [["--reward", "b.py:f"], ["--reward=b.py:f"]])
def test_a_repeated_reward_is_refused(refused, monkeypatch, second):
    """A parser keeps the last of two flags: the first reward would be lost without a word."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--reward", "a.py:f", *second, "--reward-weights", "1", "2"])
    assert "--reward" in refused()


EVEN = """
import json, pathlib

def even(prompts, completions, **columns):
    scores = [1.0 - len(text) % 2 for text in completions]
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps([prompts, completions, scores]) + "\\n")
    return scores

def length(prompts, completions, **columns): return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("asked, n, size", [(14, 3, 4), (3, 1, 3)])
def test_evaluation_by_hand(go, starts, tmp_path, asked, n, size):
    """Before, during and after: n responses to each held-out prompt, of as many prompts as were asked for. A
    response passes if the first reward is 1, whatever the others are and its weight is.
    """
    (tmp_path / "rewards.py").write_text(EVEN)
    run = go("run", **rewarded(tmp_path, "rewards.py:even", "rewards.py:length"), reward_weights=(-1.0, 0.5),
             eval_samples=asked, eval_every=2)
    rows, samples = read(run / "metrics.jsonl"), read(run / "samples.jsonl")
    rows, calls = [row for row in rows if "eval/reward" in row], read(tmp_path / "calls.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3] and [row["step"] for row in samples] == (
        [0] * size + [2] * size + [3] * size)
    held_out = [row["prompt"] for row in read(starts / "grpo_held_out.jsonl")][:size]
    for row, (prompts, completions, scores) in zip(rows, (calls[0], calls[3], calls[5])):
        assert prompts == [prompt for prompt in held_out for _ in range(n)]
        passed = [[score == 1 for score in scores[i : i + n]] for i in range(0, n * size, n)]
        assert row[f"eval/pass_at_{n}"] == pytest.approx(statistics.fmean(map(any, passed)))
        assert row["eval/pass_at_1"] == pytest.approx(statistics.fmean(itertools.chain(*passed)))
        assert {key for key in row if "pass" in key} == {"eval/pass_at_1", f"eval/pass_at_{n}"}
        rewards = [len(text) / 2 - score for text, score in zip(completions, scores)]
        assert row["eval/reward"] == pytest.approx(statistics.fmean(rewards), rel=1e-5)
        shown = [sample for sample in samples if sample["step"] == row["step"]]
        assert [sample["prompt"] for sample in shown] == held_out
        assert [sample["completion"] for sample in shown] == completions[::n]
        assert [sample["reward"] for sample in shown] == pytest.approx(rewards[::n], rel=1e-5)
    assert len({row["eval/pass_at_1"] for row in rows} | {0, 1}) > 2


@pytest.mark.parametrize("name", ["grpo"])
def test_kl_of_a_sample_is_that_from_the_start(script, go, starts, monkeypatch):
    """log pi - log pi_ref of its tokens, EOS included, under the models as they are saved."""
    drawn, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *args: drawn.append(rollout(*args)) or drawn[-1])
    run = go("run", eval_samples=4, learning_rate=1e-2)
    samples, (last, _) = read(run / "samples.jsonl")[4:], drawn[-1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    models = [load(folder, "grpo") for folder in (starts / "run1", run)]
    for sample, prompt, response in zip(samples, last["prompts"], last["responses"]):
        assert tokenizer(sample["prompt"])["input_ids"] == prompt
        with torch.no_grad():
            ref, pi = (naive_logprobs(model, prompt + response)[len(prompt) - 1 :].sum().item() for model in models)
        assert sample["kl"] == pytest.approx(pi - ref, abs=1e-4)
    kls = [sample["kl"] for sample in samples]
    assert len(kls) == 4 and max(map(abs, kls)) > 0.1
    row = read(run / "metrics.jsonl")[-1]
    assert row["step"] == 3 and row["eval/kl"] == pytest.approx(statistics.fmean(kls), abs=1e-5)


MATTERS = [  # flags' other values, and what else is set
    ({"kl_in": "reward"}, {}), ({"kl_estimator": "k1"}, {}), ({"kl_estimator": "k2"}, {}),
    ({"kl_estimator": "k2"}, {"kl_in": "reward"}), ({"kl_estimator": "k3"}, {"kl_in": "reward"}),
    ({"kl_coef": 0.0}, {}), ({"kl_coef": 0.0}, {"kl_in": "reward"}), ({"baseline": "leave_one_out"}, {}),
    ({"scale_rewards": "batch"}, {}), ({"scale_rewards": "none"}, {}),
    ({"scale_rewards": "batch"}, {"scale_rewards": "none"}), ({"loss_type": "dapo"}, {}),
    ({"loss_type": "dr_grpo"}, {}), ({"loss_type": "dr_grpo"}, {"loss_type": "dapo"}),
    ({"importance_sampling_level": "sequence"}, {}), ({"clip_coef": 1e-3}, {}), ({"clip_coef_high": 1e-3}, {}),
    ({"missing_eos_penalty": 3.0}, {"scale_rewards": "none"}), ({"temperature": 0.7}, {}),
    ({"update_epochs": 1}, {}), ({"num_minibatches": 1, "batch_size": 8}, {}), ({"num_generations": 4}, {}),
    ({"reward_weights": (1.0, 0.1)}, {}), ({"reward_weights": (-1.0, -1.0)}, {}), ({"drop_zero_std": True}, {}),
    ({"max_grad_norm": 0.01}, {"learning_rate": 1e-2}), ({"anneal_lr": False}, {}), ({"seed": 2}, {})]
SAME = [({"kl_estimator": "k3"}, {}), ({"kl_estimator": "k1"}, {"kl_in": "reward"}),
        ({"reward_weights": (1.0, 1.0)}, {})]


@pytest.fixture
def weights_of(go, starts, many_ends, finished):
    """weights_of(**flags): the last ones of a run on two rewards with ties, as one vector."""
    def run(**flags):
        key = "weights", repr(sorted(flags.items()))
        if key not in finished:
            rewards = rewarded(starts, "rewards.py:odd", "rewards.py:brief")
            folder = go(f"run {len(finished)}", **{"model": many_ends, "max_new_tokens": 6, **rewards, **flags})
            weights = load_file(folder / "model" / "model.safetensors")
            finished[key] = torch.cat([weights[part].flatten() for part in sorted(weights)])
        return finished[key]

    return run


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("flags, more", MATTERS, ids=str)
def test_option_changes_the_weights(weights_of, flags, more):
    """By 1e-5 on average, a hundredth of a step; micro-batches, which must not, by less than 1e-7."""
    assert (weights_of(**more) - weights_of(**{**more, **flags})).abs().mean() > 1e-5
    assert (weights_of() - weights_of(micro_batch_size=1)).abs().mean() < 1e-7


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("flags, more", SAME, ids=str)
def test_option_by_its_own_name(weights_of, flags, more):
    """What --kl-estimator auto stands for, and a weight of 1 each: the same to the last bit."""
    assert torch.equal(weights_of(**more), weights_of(**{**more, **flags}))


@pytest.mark.parametrize("name", ["grpo"])
@pytest.mark.parametrize("flags", [
    {"loss_type": "dapo"}, {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "drop_zero_std": True, "reward": "odd"}], ids=str)
def test_micro_batches_change_no_loss(go, starts, ragged, flags):
    """Denominators are those of the optimizer step, whatever is left in it."""
    flags = {**ragged, **flags, "batch_size": 8, "total_episodes": 32}
    flags |= rewarded(starts, "rewards.py:odd") if "reward" in flags else {}
    whole, parts = (go(f"micro {micro}", **flags, micro_batch_size=micro) for micro in (8, 1))
    assert numbers(parts) == approx_rows(numbers(whole), 1e-4)
    assert "reward" not in flags or 0 < trained_rows(whole)[0]["frac_reward_zero_std"] < 1


# ---- 7. The house ----

BUDGETS = {"bandit_bt": 570, "sft": 300, "reward_model": 405, "dpo": 360, "grpo": 550, "ppo": 565,
           "common": 580}
SOURCES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
HOUSE = [stem for stem in SOURCES if stem != "common"]
BY_DESIGN = {"main", "evaluate", "rollout", "collate", "forward", "Args"}  # the same name in every script, and not the same code


def test_the_house_is_complete():
    assert {*SCRIPTS, "common"} <= set(SOURCES) <= set(BUDGETS)


@pytest.mark.parametrize("stem", SOURCES)
def test_size(stem):
    tree = ast.parse(SOURCES[stem])
    assert len(SOURCES[stem].splitlines()) <= BUDGETS[stem]
    assert 1 <= len(ast.get_docstring(tree).splitlines()) <= 30
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            assert len(node.body) <= 39


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


def test_ppo_and_grpo_share_what_is_no_algorithm():
    """diff ppo.py grpo.py shows flags, functions of their own, and the three that use them; else nothing."""
    codes = [{node.name: ast.get_source_segment(SOURCES[stem], node) for node in ast.parse(SOURCES[stem]).body
              if isinstance(node, ast.FunctionDef | ast.ClassDef)} for stem in SAMPLERS]
    same = {key for key in codes[0] if codes[0][key] == codes[1].get(key)}
    assert set(codes[0]) & set(codes[1]) == same | {"Args", "rollout", "evaluate", "main"}
    assert same == {"load_prompts", "collate", "align", "response_logprobs", "load_model", "load_reward", "save_model"}


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
    """Quick, and with a text for each flag. The goal is 3 s; twice that, of CPU time, survives a busy
    machine.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = run_python(f"{name}.py", "--help", COLUMNS="100")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and not process.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
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
    assert len(prompts["sums_prompts"] | prompts["sums_prompts_test"]) == 800


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
