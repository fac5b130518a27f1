"""Tiny runs of the five training scripts, for the tests of what each of them promises whatever its algorithm.

`SCRIPTS` has one `Script` each: all that these tests know about it. A test that uses the fixture `script`, or one
that needs it (tiny, go, whole, refused), runs once for each script, or for those in `@scripts("ppo", "grpo")`.
What tests replace inside a script, or look into, stands under "Inside the scripts": a renamed function is a
change there. conftest.py makes the fixtures of this file known to all tests.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import dpo
import grpo
import ppo
import reward_model
import sft

DATA = ROOT / "data"

# ---- The scripts ----

PROMPT = "review of the plot :"
PAIR = {"prompt": PROMPT, "chosen": " the plot was good .", "rejected": " it was ."}
DEMONSTRATION = {"prompt": PROMPT, "completion": " the plot was good ."}
ASK = {"role": "user", "content": "a film ?"}
REPLY = {"role": "assistant", "content": "it was good ."}
REFUSE = {"role": "assistant", "content": "it was bad ."}
CHAT_PAIR = {"prompt": [ASK], "chosen": [REPLY], "rejected": [REFUSE]}
CHAT_RANKING = {"prompt": [ASK], "completions": [[REFUSE], [REPLY], [REPLY, ASK, REFUSE]], "ranking": [2, 1, 2]}

EVERY_STEP = {"step", "learning_rate", "num_tokens", "tokens_per_second"}
COMPLETIONS = {"completions/mean_length", "completions/eos_rate"}
DPO_MARGINS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
               "logps/rejected"}
COMPARISONS = {"loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected", "mean_reward"}
OBJECTIVES = {f"objective/{key}" for key in ("scores", "kl", "entropy", "non_score_reward", "rlhf_reward")}
OF_CRITIC = {"loss/value", "val/clipfrac", "grad_norm/critic"}

TINY = {  # flags of every tiny run that has them; where the files are is added by the fixture `tiny`
    "learning_rate": 1e-3, "eval_every": 0, "eval_samples": 4, "max_new_tokens": 8, "save_every": 0,
    "device": "cpu", "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 0, "num_minibatches": 2,
    "update_epochs": 2}


OTHER_START = {"model": "small_run2/model", "reward": "small_reward2/model"}  # of ppo.py and grpo.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """A training script: its data, its flags in tiny runs, and what it writes."""

    module: types.ModuleType
    data: list[str]  # files of data/ with rows for it; rows are taken from them in turn
    row: dict  # a good row
    chat: list[dict]  # rows of messages
    sides: tuple[str, ...] = ()  # columns with a text to learn
    tiny: dict = dataclasses.field(default_factory=dict)  # flags of a tiny run that are not as in TINY
    one_step: dict  # what makes it a run of one optimizer step
    options: dict = dataclasses.field(default_factory=dict)  # other values of flags than those in OPTIONS
    model_flags: dict  # flags that name a model's folder -> kind of folder among the `starts`: run or reward
    size: str = ""  # before these kinds, of the folders from which its tiny runs start
    made_by: tuple[str, ...] = ("sft",)  # scripts that make the default folders of the first of these flags
    loss: str = ""  # the function that gets the responses of each minibatch
    forwards: tuple[str, ...]  # functions that give what the losses are made of
    loaders: tuple[str, ...] = ("load_model",)  # functions that load a model
    step_metrics: set[str]  # of a training step, besides EVERY_STEP
    eval_metrics: set[str]  # of an evaluation, besides the step
    sample_columns: set[str]  # of samples.jsonl, besides the step
    score_metric: str = ""  # of a script that samples and scores responses: their mean score in metrics.jsonl,
    score_column: str = ""  # the score of one in samples.jsonl,
    kl_metric: str = ""  # and their KL in metrics.jsonl
    parts: dict = dataclasses.field(default_factory=lambda: {"model": transformers.AutoModelForCausalLM})

    @property
    def name(self) -> str:
        return self.module.__name__

    @property
    def is_sampler(self) -> bool:
        """It trains on responses of its own to prompts; what it logs is an update of several optimizer steps."""
        return bool(self.score_metric)

    @property
    def length_flag(self) -> str:
        """The flag that bounds the length of a row."""
        return "--max-new-tokens" if self.is_sampler else "--max-length"

    @property
    def flags(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.module.Args)]

    def flag(self, flag, *values) -> dict:
        """{flag: value} as this script takes it: ppo.py and grpo.py have a list of rewards."""
        takes_several = isinstance(getattr(self.module.Args, flag), tuple)
        return {flag: values if takes_several else values[0]}

    def rows(self, first, last, test="") -> list[dict]:
        """Rows of the embedded world for this script, of its files in turn."""
        files = [head(f"{stem}{test}", first, last) for stem in self.data]
        return [files[i % len(files)][i] for i in range(len(files[0]))]

    def load(self, run, part="model"):
        """A saved model as anyone loads it, in eval mode."""
        return self.parts[part].from_pretrained(run / part).eval()


SCRIPTS = {script.name: script for script in (
    Script(
        module=sft,
        data=["demonstrations"],
        row=DEMONSTRATION,
        chat=[{"messages": [ASK, REPLY]}, {"messages": [ASK, REFUSE]}],
        sides=("completion",),
        one_step={"batch_size": 12, "micro_batch_size": 12},
        tiny={"model": str(DATA / "model")},  # the start of all, which has no weights
        model_flags={"model": "run"},
        made_by=(),
        forwards=("sequence_logprobs",),
        step_metrics={"loss", "grad_norm", "epoch", "mean_token_accuracy"},
        eval_metrics={"eval/loss", "eval/mean_token_accuracy", *COMPLETIONS},
        sample_columns={"prompt", "completion"}),
    Script(
        module=dpo,
        data=["preferences"],
        row=PAIR,
        chat=[CHAT_PAIR] * 2,
        sides=("chosen", "rejected"),
        one_step={"batch_size": 12, "micro_batch_size": 12},
        model_flags={"model": "run"},
        forwards=("sequence_logprobs",),
        step_metrics={"loss", "grad_norm", "epoch", *DPO_MARGINS},
        eval_metrics={"eval/loss", *(f"eval/{key}" for key in DPO_MARGINS), *COMPLETIONS},
        sample_columns={"prompt", "completion"}),
    Script(
        module=reward_model,
        data=["preferences", "rankings"],
        row=PAIR,
        chat=[CHAT_PAIR, CHAT_PAIR, CHAT_RANKING],
        sides=("chosen", "rejected"),
        one_step={"batch_size": 12, "micro_batch_size": 12},
        options={"loss_type": "plackett_luce"},
        model_flags={"model": "run"},
        forwards=("token_values",),
        loaders=("load_reward_model",),
        step_metrics={"grad_norm", "epoch", *COMPARISONS},
        eval_metrics={f"eval/{key}" for key in {*COMPARISONS, "ece", "accuracy_low", "accuracy_high",
                                                         "accuracy_ceiling"}},
        sample_columns={"comparison", "text", "rank", "reward"},
        parts={"model": transformers.AutoModelForSequenceClassification}),
    Script(
        module=ppo,
        data=["prompts"],
        row={"prompt": PROMPT},
        chat=[{"prompt": [ASK]}] * 2,
        tiny={"batch_size": 2, "micro_batch_size": 2, "target_kl": 0.1, "kl_horizon": 40},
        one_step={"batch_size": 12, "micro_batch_size": 12, "total_episodes": 12, "num_minibatches": 1,
                  "update_epochs": 1},
        options={"batch_size": 4, **OTHER_START},
        model_flags={"model": "run", "reward": "reward"},
        size="small_",
        made_by=("sft", "reward_model"),
        loss="ppo_loss",
        forwards=("sequence_logprobs", "token_values"),
        loaders=("load_model", "load_reward", "load_critic"),
        step_metrics={"episode", "objective/kl_coef", "loss/policy", "grad_norm/policy", "policy/approx_kl",
                      "policy/clipfrac", "policy/entropy", "policy/logprob_gap", "val/ratio",
                      "val/explained_variance", *OF_CRITIC, *OBJECTIVES, *COMPLETIONS},
        eval_metrics={f"eval/{key}" for key in OBJECTIVES | COMPLETIONS},
        sample_columns={"prompt", "completion", "score", "kl"},
        score_metric="objective/scores",
        score_column="score",
        kl_metric="objective/kl",
        parts={"model": transformers.AutoModelForCausalLM,
               "critic": transformers.AutoModelForTokenClassification}),
    Script(
        module=grpo,
        data=["prompts"],
        row={"prompt": PROMPT},
        chat=[{"prompt": [ASK]}] * 2,
        tiny={"num_generations": 2, "eval_samples": 8},
        one_step={"batch_size": 12, "micro_batch_size": 12, "total_episodes": 12, "num_minibatches": 1,
                  "update_epochs": 1},
        options={"loss_type": "dr_grpo", "total_episodes": 32, **OTHER_START},
        model_flags={"model": "run", "reward": "reward"},
        size="small_",
        loss="grpo_loss",
        forwards=("sequence_logprobs",),
        loaders=("load_model", "load_reward"),
        step_metrics={"episode", "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "kl",
                      "entropy", "policy/approx_kl", "policy/clipfrac", "policy/logprob_gap", *COMPLETIONS},
        eval_metrics={f"eval/{key}" for key in {"reward", "kl", *COMPLETIONS}},
        sample_columns={"prompt", "completion", "reward", "kl"},
        score_metric="reward",
        score_column="reward",
        kl_metric="kl"))}
SAMPLERS = [name for name, script in SCRIPTS.items() if script.is_sampler]
STEPWISE = [name for name, script in SCRIPTS.items() if not script.is_sampler]  # a logged step is an optimizer step
PARTS = [(name, part) for name, script in SCRIPTS.items() for part in script.parts]  # models that runs leave


def scripts(*names):
    """Run a test for these scripts only."""
    return pytest.mark.parametrize("name", names)


# ---- Inside the scripts: what tests replace or look into ----


def rows_of_rollout(inputs) -> list[tuple[dict, list[int]]]:
    """Among the inputs of a `rollout`: (row, token ids of its prompt) of each response that is asked for."""
    rows = [x for x in inputs if isinstance(x, list) and isinstance(x[0], tuple) and isinstance(x[0][0], dict)]
    return rows[0]


def nonzero(row) -> tuple[float, ...]:
    """A response's log-probs, wherever padding stands around them."""
    return tuple(x for x in row.tolist() if x != 0.0)


@pytest.fixture
def trained(script, monkeypatch):
    """The models at the moment they are saved: trained["model"] and, of ppo.py, trained["critic"]."""
    seen = {}
    finish, load_critic = common.Run.finish, getattr(script.module, "load_critic", None)

    def record_model(*inputs, **options):
        seen["model"] = next(x for x in inputs if isinstance(x, torch.nn.Module) and hasattr(x, "config"))
        return finish(*inputs, **options)

    def record_critic(*inputs, **options):
        seen["critic"] = load_critic(*inputs, **options)
        return seen["critic"]

    monkeypatch.setattr(common.Run, "finish", record_model)
    monkeypatch.setattr(script.module, "load_critic", record_critic, raising=False)
    return seen


@pytest.fixture
def training_rows(script, monkeypatch):
    """The rows of each training forward pass of a script without samples of its own, as `collate` gets them."""
    seen, collate = [], script.module.collate

    def record(rows, *inputs):
        if torch.is_grad_enabled():
            seen.append([repr(row) for row in rows])
        return collate(rows, *inputs)

    monkeypatch.setattr(script.module, "collate", record)
    return seen


# ---- Files ----


def no_constant(name):
    raise AssertionError(f"{name} is no JSON: other readers refuse the file")


def read(path) -> list[dict]:
    return [json.loads(line, parse_constant=no_constant) for line in Path(path).read_text().splitlines()]


def write(path, rows) -> str:
    """Rows (dicts, or lines of text) to a .jsonl file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def head(name, first, last) -> list[dict]:
    """Rows of a file of the embedded world."""
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[first:last]]


def files_in(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_model(starts, folder, drop="", run="run1", **files):
    """A model folder less one file and with other contents in some: tokenizer_config__json=b"..."."""
    shutil.copytree(starts / run / "model", folder)
    if drop:
        (folder / drop).unlink()
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_bytes(content)
    return folder


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
BAD_REWARDS = ["raises", "needs", "short", "long", "empty", "nan", "inf", "huge", "none", "nones", "silent",
               "string", "strings", "number", "lists", "constant", "missing"]


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """Two model folders with weights, run1 and run2, from two steps of sft.py each, and reward1 and reward2,
    reward models of two steps from each; small_run1, small_reward1 and so on, the same with one layer in place of two,
    from which runs of ppo.py and grpo.py start, as these take most of the time; files of ten rows, the first eight, eight others and four held out; a
    file of reward functions.
    """
    return make_starts(tmp_path_factory.mktemp("starts"))


def make_starts(folder):
    """The fixture `starts`, in this empty folder."""
    (folder / "rewards.py").write_text(REWARDS)
    for name, script in SCRIPTS.items():
        write(folder / f"{name}.jsonl", script.rows(0, 10))
        write(folder / f"{name}_held_out.jsonl", script.rows(0, 4, "_test"))
        write(folder / f"{name}_short.jsonl", script.rows(0, 8))
        write(folder / f"{name}_other.jsonl", script.rows(30, 38))
    config = json.loads((DATA / "model" / "config.json").read_text())
    small = shutil.copytree(DATA / "model", folder / "small")
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for model, run, reward in ((DATA / "model", "run", "reward"), (small, "small_run", "small_reward")):
        for seed in (1, 2):
            two_steps(folder, SCRIPTS["sft"], model, f"{run}{seed}", seed)
            two_steps(folder, SCRIPTS["reward_model"], folder / f"{run}{seed}" / "model", f"{reward}{seed}", seed)
    return folder


def two_steps(folder, script, model, run, seed=1):
    """A run of two steps from this model, in folder/run."""
    few = {"max_new_tokens": 2} if "max_new_tokens" in script.flags else {}
    launch(script, script.module.Args(
        model=str(model), dataset=str(folder / f"{script.name}.jsonl"), num_train_epochs=1, batch_size=5,
        eval_dataset=str(folder / f"{script.name}_held_out.jsonl"), micro_batch_size=5, warmup_steps=0,
        eval_samples=4, output_dir=str(folder / run), seed=seed, device="cpu", **few))


@pytest.fixture
def rewards(starts):
    """The path of a file of reward functions."""
    return str(starts / "rewards.py")


def reward_specs(script, folder, *specs) -> dict:
    """--reward with folders and functions among the files in a folder."""
    return script.flag("reward", *(str(folder / spec) for spec in specs))


@pytest.fixture
def many_ends(starts, tmp_path):
    """A start in which any of 25 tokens ends a response: lengths from 1 to --max-new-tokens."""
    ends = json.dumps({"eos_token_id": [1, *range(20, 44)]}).encode()
    return str(copy_model(starts, tmp_path / "many_ends", run="small_run1", generation_config__json=ends))


# ---- Runs ----


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def script(name) -> Script:
    return SCRIPTS[name]


@pytest.fixture
def tiny(script, tmp_path, starts) -> Callable:
    """tiny(**flags) -> Args of a run in tmp_path/run, of three steps an "epoch": 4 + 4 + 2 rows, or three
    updates, each of 2 epochs of 2 minibatches: of ppo.py on 4 responses, with a KL coefficient that adapts, of
    grpo.py on 8 responses to 4 prompts. Evaluations are on two responses to each of four held-out prompts.
    """

    def make(epochs=1, **flags):
        return tiny_args(script, starts, tmp_path / "run", epochs, **flags)

    return make


def tiny_args(script, starts, folder, epochs=1, **flags):
    """What the fixture `tiny` makes, of a run in this folder."""
    args = TINY | {
        "dataset": str(starts / f"{script.name}.jsonl"), "num_train_epochs": epochs,
        "eval_dataset": str(starts / f"{script.name}_held_out.jsonl"), "output_dir": str(folder)}
    for flag, kind in script.model_flags.items():
        args |= script.flag(flag, str(starts / f"{script.size}{kind}1" / "model"))
    args |= script.tiny
    args = {flag: value for flag, value in args.items() if flag in script.flags} | flags
    if script.is_sampler and "total_episodes" not in flags:
        args["total_episodes"] = max(3 * epochs * args["batch_size"] * args["num_minibatches"], 1)
    return script.module.Args(**args)


@contextlib.contextmanager
def without_pictures():
    """As where matplotlib is not installed: the picture at the end of a tiny run takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield


@pytest.fixture
def no_pictures():
    with without_pictures():
        yield


def parts_of_common():
    """Its functions, and those of its classes: whatever a test may have replaced."""
    parts = []
    for x in vars(common).values():
        parts += filter(callable, vars(x).values()) if isinstance(x, type) and x.__module__ == "common" else [x]
    return tuple(x for x in parts if callable(x))


def all_of(model):
    """What its outputs depend on: classes, configuration, weights."""
    classes = dict.fromkeys((type(layer), type(layer).forward) for layer in model.modules())
    weights = 0
    for x in (*model.parameters(), *model.buffers()):
        weights = zlib.crc32(x.detach().contiguous().view(-1).view(torch.uint8).numpy(), weights)
    config = {**model.config.to_dict(), "_name_or_path": "", "attention": model.config._attn_implementation}
    types = [x.dtype for x in model.parameters()]
    return *classes, vars(model).get("forward"), *types, weights, model.training, json.dumps(config, default=str)


@pytest.fixture(scope="session", autouse=True)
def tested_once():
    """What a run tries its model with before it starts, the fifth part of a tiny run, is tried once for all runs in
    which nothing is different: the model, the rows, the functions.
    """
    found, self_test = {}, common.self_test

    @functools.wraps(self_test)
    def test(model, rows):
        if model.device.type != "cpu":
            return self_test(model, rows)
        settings = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        key = repr(rows), settings, parts_of_common(), all_of(model)
        if key not in found:
            found[key] = self_test(model, rows)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "self_test", test)
        yield


def is_small(folder) -> bool:
    """A folder, of a tiny model."""
    return Path(folder).is_dir() and sum(path.stat().st_size for path in Path(folder).iterdir()) < 4e6


def files_here(folder):
    """The files of a folder, but for those in folders of its own, by name and checksum."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, zlib.crc32(path.read_bytes())) for path in paths)


@pytest.fixture(scope="session", autouse=True)
def read_once():
    """A small model or a tokenizer is read from its folder once, then copied as long as no file is another one."""
    found = {}
    load_model = transformers.AutoModelForCausalLM.from_pretrained.__func__  # the others' are copies of it
    load_tokenizer = transformers.AutoTokenizer.from_pretrained.__func__

    def keep(key, x):
        if len(found) > 40:
            found.pop(next(iter(found)))  # the oldest
        found[key] = x

    def model(kind, name, *inputs, config=None, **options):
        if config is None or inputs or not options.get("output_loading_info") or not is_small(name):
            return load_model(kind, name, *inputs, config=config, **options)
        settings = json.dumps({**config.to_dict(), "_name_or_path": ""}, default=str)
        key = kind, settings, repr(sorted(options.items())), torch.get_default_dtype(), files_here(name)
        if key not in found:
            made, info = load_model(kind, name, config=config, **options)
            if any(info.values()):  # what is missing is drawn
                return made, info
            keep(key, (made, info))
        made, info = copy.deepcopy(found[key])
        made.name_or_path = made.config._name_or_path = config._name_or_path
        return made, info

    def tokenizer(kind, name, *inputs, **options):
        if inputs or not is_small(name):
            return load_tokenizer(kind, name, *inputs, **options)
        key = kind, repr(sorted(options.items())), files_here(name)
        if key not in found:
            keep(key, load_tokenizer(kind, name, **options))
        made = copy.deepcopy(found[key])
        made.name_or_path = made.init_kwargs["name_or_path"] = str(name)
        return made

    with pytest.MonkeyPatch.context() as patch:
        for script in SCRIPTS.values():
            for part in script.parts.values():
                patch.setattr(part, "from_pretrained", classmethod(model))
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", classmethod(tokenizer))
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_are_asked_for():
    """No run draws one, but in the test that undoes this."""
    show_change = common.Run.show_change

    @functools.wraps(show_change)
    def show(*inputs):
        with without_pictures():
            show_change(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "show_change", show)
        yield


def launch(script, args):
    """main(args) of a script, without a picture, and the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with without_pictures():
            return script.module.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def go(script, tiny, tmp_path) -> Callable:
    """go(folder, **flags) runs the script in tmp_path/folder and returns that path."""

    def run(folder, **flags):
        launch(script, tiny(output_dir=str(tmp_path / folder), **flags))
        return tmp_path / folder

    return run


@pytest.fixture(scope="session")
def finished():
    """Folders of runs that several tests read, by script and flags."""
    return {}


@pytest.fixture
def whole(script, tiny, finished, tmp_path_factory) -> Callable:
    """whole(**flags) -> the folder of a finished run that nothing interrupts. It runs once, whichever tests read
    it, so these must leave it as it is; and flags that hold a path of a single test belong in `go`.
    """

    def run(**flags):
        key = script.name, repr(sorted(flags.items()))
        if key not in finished:
            folder = tmp_path_factory.mktemp(f"whole_{script.name}") / "run"
            launch(script, tiny(output_dir=str(folder), **flags))
            finished[key] = folder
        return finished[key]

    return run


@pytest.fixture
def refused(script, tiny, capsys) -> Callable:
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
        of_this_script = re.sub("`[^`]*`", "", line)  # other commands stand in backticks
        named = re.findall(r"--([a-z][a-z-]+)", of_this_script)
        assert {flag.replace("-", "_") for flag in named} <= set(script.flags), line
        return line

    return run


def run_python(*arguments, cwd=ROOT, **environment):
    """`python arguments` as a process of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=120)


def as_flags(args) -> list[str]:
    """An Args as a command line."""
    line = []
    for field in dataclasses.fields(args):
        flag, value = field.name.replace("_", "-"), getattr(args, field.name)
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else [value]
            line += [f"--{flag}", *map(str, values)]
    return line


# ---- Interruptions ----


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


def checkpoint_of(run) -> dict:
    return torch.load(run / "state" / "checkpoint.pt", weights_only=True)


# ---- What a run leaves ----


def timeless(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def trained_rows(run) -> list[dict]:
    """Of metrics.jsonl those of steps, not of evaluations."""
    return [row for row in timeless(read(run / "metrics.jsonl")) if "learning_rate" in row]


def numbers(run) -> list[dict]:
    """What a run measures: no timing, and no echo of a flag."""
    rows = timeless(read(run / "metrics.jsonl"))
    return [{key: value for key, value in row.items() if key != "learning_rate"} for row in rows]


def approx_rows(want, tolerance) -> list[dict]:
    """An implicit reward is a difference of log-probs of 50 nats, which fp32 holds to 4e-6."""
    rows = []
    for row in want:
        rows.append({key: pytest.approx(value, rel=tolerance, abs=1e-5) for key, value in row.items()})
    return rows


def result(run):
    """What must not depend on interruptions nor on the process: metrics but the timing, samples, weights."""
    files = [run / "samples.jsonl", *sorted(run.glob("*/*.safetensors"))]
    digests = {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert "model/model.safetensors" in digests
    return timeless(read(run / "metrics.jsonl")), digests


def count_tokens(row) -> int:
    """num_tokens of a row of the embedded world, where each word is a token: trained ones of sft, all of dpo and
    reward_model.
    """
    if "completion" in row:
        return len(row["completion"].split()) + 1
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    return sum(len((row["prompt"] + text).split()) + 1 for text in texts)


# ---- Flags that matter, and those that must not ----

INERT = {"output_dir", "resume", "micro_batch_size", "save_every", "device", "gradient_checkpointing", "shard", "track",
         "wandb_project_name", "score"}  # must not change a number of training; each has a test of its own
OPTIONS = {  # another value of each other flag than that of the tiny runs
    "model": "run2/model", "reward": "reward2/model", "dataset": "_other.jsonl", "eval_dataset": "_other.jsonl",
    "critic": "none", "seed": 2, "num_train_epochs": 2, "total_episodes": 16, "batch_size": 8,
    "num_minibatches": 1, "update_epochs": 1, "max_length": 12, "max_prompt_length": 5, "max_new_tokens": 3,
    "temperature": 0.7, "learning_rate": 2e-3, "critic_learning_rate": 2e-3, "warmup_steps": 2,
    "anneal_lr": False, "weight_decay": 1.0, "max_grad_norm": 1e-6, "beta": 0.1, "label_smoothing": 0.2,
    "kl_coef": 3.0, "target_kl": 0.0, "kl_horizon": 16, "gamma": 0.5, "gae_lambda": 0.5, "clip_coef": 1e-3,
    "clip_coef_value": 1e-3, "norm_adv": False, "missing_eos_penalty": 3.0, "eval_every": 1,
    "eval_samples": 1, "dtype": "bfloat16", "loss_type": "ipo", "num_generations": 4, "reward_weights": (2.0,),
    "kl_in": "reward", "kl_estimator": "k2", "baseline": "leave_one_out", "scale_rewards": "none",
    "lora_rank": 2, "drop_zero_std": True, "importance_sampling_level": "sequence", "clip_coef_high": 1e-3}


def option(script, flag, starts):
    """Another value of this flag than that of the tiny runs."""
    value = script.options.get(flag, OPTIONS[flag])
    if flag in ("dataset", "eval_dataset"):
        return str(starts / f"{script.name}{value}")
    return script.flag(flag, str(starts / value))[flag] if flag in script.model_flags else value
