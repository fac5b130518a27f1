"""How long do training steps and samples take, and how much memory, beside TRL's trainers and `generate`?

    pip install trl datasets
    python benchmarks/speed.py

Each case is a model and rows that sft.py, dpo.py, reward_model.py or grpo.py and TRL's trainer start from alike:
the same weights, the same rows in the same order in every step, the same optimizer and learning rates. The mean
losses of both are printed: they have to agree. Sampling is `sample` beside transformers' `generate`, from the
same prompts. In one process with one thread of torch, contenders take turns, another one going first in each
round:

    ours       the script's main() or `sample`, in fp32
    best       TRL in fp32 as fast as its own options make it on this CPU: a first round tries those of `OPTIONS`
    default    TRL's defaults, bf16 and gradient checkpointing, or `generate` without options

Time: a step is what lies between the ends of two optimizer steps, whatever the loop does there: data, sampling,
losses, logging. The first optimizer step of a run is warm-up. CPU time of the process, which other jobs
on the machine disturb less, beside time on the wall. A ratio is that of two runs of one round, over the same
steps; the table has the median over rounds, and the least and the largest one.
Memory: the largest resident set of a process of its own that imports what it needs and takes two steps.
First step: CPU seconds of a whole process, from the command to the end of its first optimizer step.

Cases on real data need a folder with them, --shared, and are skipped with a reason without it. Without TRL,
its columns stay empty.
"""

import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
import transformers
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import dpo  # noqa: E402
import grpo  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402
from common import check_model, fail, load_model, load_prompts, read_rows, sample, shuffled  # noqa: E402
from logprob import hardware, resident, version  # noqa: E402

SCRIPTS = {"sft": sft, "dpo": dpo, "reward_model": reward_model, "grpo": grpo}
TRAINERS = {"sft": "SFT", "dpo": "DPO", "reward_model": "Reward", "grpo": "GRPO"}  # TRL's, without "Trainer"
WHO = "ours", "best", "default"
SEED = 1


@dataclass
class Args:
    cases: list[str] = field(default_factory=list)  # names to run; empty: all
    rounds: int = 3  # each contender runs once in a round
    steps: int = 3  # optimizer steps of a run, of which the first one is warm-up
    shared: str = "../shared"  # folder with data/*.jsonl and models/, for the cases on real data
    memory: bool = True  # measure memory too, each contender in a process of its own
    first_step: bool = True  # measure the time to the first step too
    quick: bool = False  # seconds: tiny cases from the embedded world, one round, no memory, no first step
    output: str = "benchmarks/results/speed.json"  # empty: write nothing
    child: str = ""  # internal: "case contender options" to run alone in --folder, and print its memory
    folder: str = ""  # internal: where the models and rows of the cases are


# ---- Cases ----


@dataclass
class Training:
    """Steps of a script and of TRL's trainer on the same rows."""

    script: str
    shape: str  # of model and batch, in words
    model: str  # folder that both start from
    rows: list[dict]  # batch_size for each step; of grpo prompts, fewer by group
    batch_size: int  # rows of an optimizer step; of grpo responses
    flags: dict  # of the script's Args
    config: dict  # of TRL's config: the same settings under its names
    group: int = 1  # responses to a prompt


@dataclass
class Sampling:
    """Responses to prompts by `sample` and by `generate`."""

    shape: str
    model: str
    prompts: list[list[int]]
    max_new_tokens: int
    ends: bool  # whether responses may end with an EOS


def save_model(folder: Path, kind: str, tokenizer: str, hidden: int, vocabulary: int, head: str) -> str:
    """A random model of 4 layers, made once, with a tokenizer's files beside it."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(SEED)
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=1)
        getattr(transformers, head).from_config(config, dtype=torch.float32).save_pretrained(folder)
        for file in Path(tokenizer).glob("*token*"):
            shutil.copy(file, folder)
    return str(folder)


def world_model(folder: Path, trained: bool, head: str = "AutoModelForCausalLM") -> str:
    """The embedded world's model, with random weights or as sft.py leaves it, made once."""
    if trained and not (folder / "model").exists():
        with silence():
            sft.main(sft.Args(output_dir=str(folder), eval_every=0, save_every=0, device="cpu"))
    if trained:
        return str(folder / "model")
    if not folder.exists():
        torch.manual_seed(SEED)
        config = transformers.AutoConfig.from_pretrained(ROOT / "data" / "model", num_labels=1)
        getattr(transformers, head).from_config(config, dtype=torch.float32).save_pretrained(folder)
        for file in (ROOT / "data" / "model").glob("*token*"):
            shutil.copy(file, folder)
    return str(folder)


def fitting_rows(path: str, columns: dict[str, str], model: str, n: int, max_length: int) -> list[dict]:
    """The first n rows whose texts, prompt and either completion, are at most max_length tokens long.
    columns: new name -> name in the file.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = []
    for row in read_rows(path):
        row = {new: row[old] for new, old in columns.items()}
        prompt = row["prompt"]
        longest = max(len(tokenizer(prompt + text)["input_ids"]) for text in row.values())
        if longest < max_length - 8:  # a few for special tokens
            rows.append(row)
        if len(rows) == n:
            break
    return rows


def sft_case(shape, path, columns, model, batch, steps, max_length) -> Training:
    rows = fitting_rows(path, columns, model, batch * steps, max_length)
    flags = {"eval_samples": 1, "max_new_tokens": 1, "max_length": max_length}
    return Training("sft", shape, model, rows, batch, flags, {"max_length": max_length})


def dpo_case(shape, path, model, batch, steps, max_length) -> Training:
    rows = fitting_rows(path, PAIR, model, batch * steps, max_length)
    flags = {"eval_samples": 1, "max_new_tokens": 1, "max_length": max_length, "beta": 0.1}
    return Training("dpo", shape, model, rows, batch, flags, {"max_length": max_length, "beta": 0.1})


def reward_case(shape, path, model, batch, steps, max_length) -> Training:
    rows = fitting_rows(path, PAIR, model, batch * steps, max_length)
    flags = {"eval_samples": 1, "max_length": max_length}
    return Training("reward_model", shape, model, rows, batch, flags, {"max_length": max_length})


def grpo_case(shape, path, model, prompts, group, steps, length) -> Training:
    rows = fitting_rows(path, {"prompt": "prompt"}, model, prompts * steps, 400)
    batch = prompts * group
    flags = {"reward": (f"{__file__}:count_e",), "num_generations": group, "max_new_tokens": length,
             "total_episodes": batch * steps, "eval_samples": 2, "kl_coef": 0.04}
    config = {"num_generations": group, "max_completion_length": length, "temperature": 1.0, "top_p": 1.0,
              "top_k": 0, "loss_type": "grpo", "scale_rewards": "group", "epsilon": 0.2, "beta": 0.04,
              "use_bias_correction_kl": False}
    return Training("grpo", shape, model, rows, batch, flags, config, group)


def count_e(prompts, completions, **columns):
    """A reward that costs nothing: the share of the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
DEMONSTRATION = {"prompt": "prompt", "completion": "completion"}


def cases_of(args: Args, folder: Path) -> dict[str, Callable]:
    """Name -> function that makes the case. It raises FileNotFoundError where data is absent."""
    data, models, steps = Path(args.shared, "data"), Path(args.shared, "models"), args.steps

    def there(path: Path) -> str:
        if not path.exists():
            raise FileNotFoundError(f"{path} is absent")
        return str(path)

    def qwen(name="qwen2", head="AutoModelForCausalLM"):
        return save_model(folder / name, "qwen2", there(models / "minimind-tokenizer"), 128, 6400, head)

    def story_prompts(model, n, group):
        rows = fitting_rows(there(data / "tinystories.test.jsonl"), {"prompt": "prompt"}, model, n, 400)
        return repeated(prompts_of(model, rows), group)

    def random_prompts(n, group):
        generator = torch.Generator().manual_seed(SEED)
        lengths = torch.randint(16, 49, (n,), generator=generator).tolist()
        draw = lambda length: torch.randint(3, 32000, (length,), generator=generator).tolist()
        return repeated(list(map(draw, lengths)), group)

    def world_prompts(model, n, group):
        return repeated(prompts_of(model, read_rows("data/prompts.jsonl")[:n]), group)

    if args.quick:
        tiny = "embedded world, random weights"
        plain = lambda: world_model(folder / "tiny", False)
        classifier = lambda: world_model(folder / "scorer", False, "AutoModelForSequenceClassification")
        pairs = "data/preferences.jsonl"
        return {
            "sft": lambda: sft_case(tiny, "data/demonstrations.jsonl", DEMONSTRATION, plain(), 4, steps, 64),
            "dpo": lambda: dpo_case(tiny, pairs, plain(), 4, steps, 64),
            "reward model": lambda: reward_case(tiny, pairs, classifier(), 4, steps, 64),
            "grpo": lambda: grpo_case(tiny, "data/prompts.jsonl", plain(), 2, 4, steps, 8),
            "sampling": lambda: Sampling(tiny, plain(), world_prompts(plain(), 2, 4), 8, True)}

    small = "Qwen2, 4 layers of 128, vocabulary 6400"
    stories = lambda: there(models / "stories260K")
    classifier = lambda: qwen("scorer", "AutoModelForSequenceClassification")
    llama = lambda: save_model(
        folder / "llama", "llama", there(models / "minimind-tokenizer"), 256, 32000, "AutoModelForCausalLM")
    world = lambda: world_model(folder / "world", True)
    return {
        "sft, gsm8k": lambda: sft_case(
            f"{small}; gsm8k, 16 rows", there(data / "gsm8k.train.jsonl"),
            {"prompt": "prompt", "completion": "solution"}, qwen(), 16, steps, 1024),
        "sft, tinystories": lambda: sft_case(
            "stories260K; tinystories, 16 rows", there(data / "tinystories.train.jsonl"), DEMONSTRATION,
            stories(), 16, steps, 512),
        "dpo, hh_harmless": lambda: dpo_case(
            f"{small}; hh_harmless, 8 pairs", there(data / "hh_harmless.train.jsonl"), qwen(), 8, steps, 1024),
        "reward model, hh_harmless": lambda: reward_case(
            f"{small}; hh_harmless, 8 pairs", there(data / "hh_harmless.train.jsonl"), classifier(), 8, steps,
            1024),
        "grpo, tinystories": lambda: grpo_case(
            "stories260K; 16 prompts of tinystories x 8 responses of 64 tokens",
            there(data / "tinystories.train.jsonl"), stories(), 16, 8, steps, 64),
        "sampling, 32k vocabulary": lambda: Sampling(
            "Llama, 4 layers of 256, vocabulary 32000; 32 prompts of 16 to 48 tokens x 8 responses of 24",
            llama(), random_prompts(32, 8), 24, False),
        "sampling, stories": lambda: Sampling(
            "stories260K; 32 prompts of tinystories x 8 responses of at most 64", stories(),
            story_prompts(stories(), 32, 8), 64, True),
        "sampling, embedded world": lambda: Sampling(
            "the model of sft.py; 32 prompts x 8 responses of at most 40", world(),
            world_prompts(world(), 32, 8), 40, True)}


def prompts_of(model: str, rows: list[dict]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [{**row, "_where": "here"} for row in rows]
    return [ids for _, ids in load_prompts(tokenizer, rows, 1 << 30)]


def repeated(prompts: list[list[int]], group: int) -> list[list[int]]:
    return [ids for ids in prompts for _ in range(group)]


# ---- Contenders ----

FULL = {"bf16": False, "gradient_checkpointing": False}  # fp32, nothing recomputed
EAGER = {"model_init_kwargs": {"attn_implementation": "eager"}}
OPTIONS = {  # of TRL that were tried for its best setting, by script
    "sft": {"fp32": FULL, "eager attention": FULL | EAGER, "4 micro-batches": FULL | {"parts": 4},
            "padding_free": FULL | {"padding_free": True, "max_length": None}},
    "dpo": {"fp32": FULL | {"precompute_ref_log_probs": True},
            "eager attention": FULL | EAGER | {"precompute_ref_log_probs": True},
            "2 micro-batches": FULL | {"parts": 2, "precompute_ref_log_probs": True}},
    "reward_model": {"fp32": FULL, "eager attention": FULL | EAGER, "2 micro-batches": FULL | {"parts": 2}},
    "grpo": {"fp32": FULL, "eager attention": FULL | EAGER, "2 micro-batches": FULL | {"parts": 2},
             "static cache": FULL | {"cache_implementation": "static"}}}
GENERATE = {"dynamic cache": {}, "static cache": {"cache_implementation": "static"},
            "eager attention": {"attn_implementation": "eager"}}


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@contextlib.contextmanager
def clock():
    """A list that gets `now` at the end of every optimizer step inside, whoever takes it."""
    stamps = []
    handle = register_optimizer_step_post_hook(lambda *_: stamps.append(now()))
    try:
        yield stamps
    finally:
        handle.remove()


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def durations(stamps: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Milliseconds on the wall and of the CPU between neighbours, without what came before the first one."""
    pairs = list(zip(stamps, stamps[1:]))
    return {"wall_ms": [1e3 * (b[0] - a[0]) for a, b in pairs], "cpu_ms": [1e3 * (b[1] - a[1]) for a, b in pairs]}


def write_rows(path: str, rows: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_ours(case: Training, steps: int, folder: str, options: dict) -> dict:
    """Times of steps, and the mean of what `check` compares: the loss, or of grpo the length of responses."""
    script = SCRIPTS[case.script]
    rows = case.rows[: steps * case.batch_size // case.group]
    os.makedirs(folder)
    data = {"dataset": write_rows(f"{folder}/rows.jsonl", rows),
            "eval_dataset": write_rows(f"{folder}/held_out.jsonl", rows[:1])}
    args = script.Args(
        model=case.model, output_dir=f"{folder}/run", device="cpu", seed=SEED, eval_every=0, save_every=0,
        batch_size=case.batch_size, learning_rate=LEARNING_RATE, **data, **case.flags, **options)
    for name, value in {"warmup_steps": 0, "num_train_epochs": 1}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    if case.script == "grpo":
        args.total_episodes = steps * case.batch_size
    with clock() as stamps, silence():
        script.main(args)
    log = [row for row in read_rows(f"{folder}/run/metrics.jsonl") if "loss" in row]
    name = "completions/mean_length" if case.script == "grpo" else "loss"
    return {**durations(stamps), "check": mean(row[name] for row in log)}


LEARNING_RATE = 1e-4  # falls linearly to 0


def train_trl(case: Training, steps: int, folder: str, options: dict) -> dict:
    """As train_ours, by TRL's trainer with `options` of its config; parts: micro-batches of a step."""
    import trl
    from datasets import Dataset

    options = dict(options)
    parts = options.pop("parts", 1)
    rows = case.rows[: steps * case.batch_size // case.group]
    rows = [rows[i] for i in shuffled(len(rows), SEED, 0)]  # the order of the scripts
    extra, lengths = {}, []

    def reward(prompts, completions, completion_ids, **columns):
        lengths.extend(map(len, completion_ids))
        return count_e(prompts, completions)

    if case.script == "grpo":
        extra["reward_funcs"] = reward
    config = getattr(trl, f"{TRAINERS[case.script]}Config")(
        output_dir=folder, seed=SEED, max_steps=steps, per_device_train_batch_size=case.batch_size // parts,
        gradient_accumulation_steps=parts, learning_rate=LEARNING_RATE, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused", adam_beta2=0.999, max_grad_norm=1.0,
        use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        **({} if case.script == "grpo" else {"train_sampling_strategy": "sequential"}),
        **({"shuffle_dataset": False} if case.script == "grpo" else {}), **(case.config | options))
    trainer = getattr(trl, f"{TRAINERS[case.script]}Trainer")(
        model=case.model, args=config, train_dataset=Dataset.from_list(rows), **extra)
    trainer.remove_callback(transformers.PrinterCallback)
    with clock() as stamps, silence():
        result = trainer.train()
    return {**durations(stamps), "check": mean(lengths) if lengths else result.training_loss}


class Sampler:
    """A case's model, loaded once for each way to sample from it."""

    def __init__(self, case: Sampling):
        self.case, self.loaded = case, {}

    def load(self, kind: str):
        if kind == "ours" and kind not in self.loaded:
            with silence():
                model, _, eos_ids = load_model(self.case.model, sft.Args(), torch.device("cpu"))
                check_model(model, self.case.prompts)
            self.loaded[kind] = model.eval(), eos_ids
        elif kind not in self.loaded:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.case.model, attn_implementation=kind)
            self.loaded[kind] = model.eval(), None
        return self.loaded[kind]

    def eos_ids(self) -> list[int]:
        model, eos_ids = self.load("ours")
        return eos_ids if self.case.ends else [model.config.vocab_size]  # an id that no sample has

    def ours(self, seed: int) -> dict:
        (model, _), eos_ids = self.load("ours"), self.eos_ids()
        start = now()
        batch = sample(model, self.case.prompts, self.case.max_new_tokens, eos_ids, seed=seed)
        times = durations([start, now()])
        return {**times, "check": batch["mask"].sum(1).double().mean().item()}

    @torch.no_grad()
    def generate(self, seed: int, options: dict) -> dict:
        options = dict(options)
        (model, _), eos_ids = self.load(options.pop("attn_implementation", "sdpa")), self.eos_ids()
        torch.manual_seed(seed)
        start = now()
        longest = max(map(len, self.case.prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in self.case.prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in self.case.prompts])
        result = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=self.case.max_new_tokens, eos_token_id=eos_ids, pad_token_id=0, **options)
        times = durations([start, now()])
        drawn = result[:, longest:]
        is_end = torch.isin(drawn, torch.tensor(eos_ids)).long()
        before_end = is_end.cumsum(1) - is_end == 0
        return {**times, "check": before_end.sum(1).double().mean().item()}


class Contenders:
    """run(who, options, number) of a case, whichever kind it is."""

    def __init__(self, case, folder: Path, steps: int):
        self.case, self.folder, self.steps, self.number = case, folder, steps, 0
        self.sampler = Sampler(case) if isinstance(case, Sampling) else None
        self.options = GENERATE if self.sampler else OPTIONS[case.script]

    def run(self, who: str, options: dict, steps: int = 0) -> dict:
        gc.collect()
        self.number += 1
        if self.sampler and who == "ours":
            return self.sampler.ours(self.number)
        if self.sampler:
            return self.sampler.generate(self.number, options)
        train = train_ours if who == "ours" else train_trl
        folder = f"{self.folder}/run-{os.getpid()}-{self.number}"
        result = train(self.case, steps or self.steps, folder, options)
        shutil.rmtree(folder, ignore_errors=True)
        return result


# ---- Measurements ----


def measure(args: Args, name: str, contenders: Contenders, peer: bool) -> dict:
    """Times of all contenders of a case over rounds, and what was tried for the peer's best setting."""
    tried, best = {}, next(iter(contenders.options))
    if peer and not args.quick:
        for label, options in contenders.options.items():
            run = contenders.run("best", options, steps=2)
            tried[label] = {"cpu_ms": median(run["cpu_ms"]), "check": run["check"]}
        best = min(tried, key=lambda label: tried[label]["cpu_ms"])
    options = {"ours": {}, "best": contenders.options[best], "default": {}}
    who = [x for x in WHO if peer or x == "ours"]
    runs = {x: [] for x in who}
    for turn in range(args.rounds):
        for x in who[turn % len(who):] + who[: turn % len(who)]:
            runs[x].append(contenders.run(x, options[x]))
    result = {"shape": contenders.case.shape, "best_setting": best if peer else None, "tried": tried}
    for x in who:
        times = {key: median(ms for run in runs[x] for ms in run[key]) for key in ("cpu_ms", "wall_ms")}
        result[x] = {**times, "check": mean(run["check"] for run in runs[x]), "runs": runs[x]}
    for x in who[1:]:
        for key in ("cpu_ms", "wall_ms"):
            ratios = [sum(a[key]) / sum(b[key]) for a, b in zip(runs[x], runs["ours"])]
            result[x][f"{key[:-3]}_ratio"] = [median(ratios), min(ratios), max(ratios)]
    return result


def measure_alone(args: Args) -> None:
    """The child's part of measure_memory: one run in this process, its memory as JSON on the last line."""
    name, who, label = json.loads(args.child)
    contenders = Contenders(cases_of(args, Path(args.folder))[name](), Path(args.folder), 2)
    options = contenders.options[label] if who == "best" else {}
    if who != "ours" and not contenders.sampler:
        import trl  # noqa: F401
    gc.collect()
    before = resident("VmRSS")
    contenders.run(who, options)
    print(json.dumps({"peak": resident("VmHWM"), "before": before}))


def measure_memory(args: Args, folder: Path, name: str, who: str, label: str | None) -> dict | None:
    """Bytes of the largest resident set of a process with this contender alone, and of that before its run."""
    command = [sys.executable, __file__, "--child", json.dumps([name, who, label]), "--folder", str(folder),
               "--shared", args.shared]
    if args.quick:
        command.append("--quick")
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if process.returncode:
        print(f"{name}, {who}: no memory: {process.stderr.strip().splitlines()[-1:]}")
        return None
    return json.loads(process.stdout.splitlines()[-1])


FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(17))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRL_SCRIPT = """
import sys
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
data = load_dataset("json", data_files="data/demonstrations.jsonl", split="train")
config = SFTConfig(output_dir=sys.argv[2], per_device_train_batch_size=64, num_train_epochs=4, learning_rate=6e-3,
                   warmup_steps=30, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[])
SFTTrainer(model=sys.argv[1], args=config, train_dataset=data).train()
"""


def seconds_to_first_step(*command: str, **environment: str) -> dict:
    """CPU and wall seconds of `python *command`, stopped at the end of its first optimizer step."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST_STEP, *command], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 17:
        fail(f"{command} came to no optimizer step: {error[-500:]}")
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall}


def measure_first_step(args: Args, folder: Path, peer: bool) -> dict:
    """CPU seconds from the command to the first step of SFT on the embedded world, from the same weights."""
    model = world_model(folder / "start", False)
    script = folder / "trl_sft.py"
    script.write_text(TRL_SCRIPT)
    runs = {"ours": [], "best": []} if peer else {"ours": []}
    for turn in range(args.rounds + 1):
        for who in runs:
            output = str(folder / f"first-{who}-{turn}")
            command = ["sft.py", "--model", model, "--output-dir", output]
            if who == "best":
                command = [str(script), model, output]
            runs[who].append(seconds_to_first_step(*command, HF_HOME=str(folder / "cache")))
    result = {}
    for who, rows in runs.items():
        rows = rows[1:]  # the first one filled caches
        result[who] = {key: median(row[key] for row in rows) for key in ("cpu_s", "wall_s")} | {"runs": rows}
    if peer:
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(runs["best"][1:], runs["ours"][1:])]
        result["cpu_ratio"] = [median(ratios), min(ratios), max(ratios)]
    return result


# ---- Report ----


def spread(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def report(name: str, row: dict) -> None:
    """A line of the table, and below it the setting that was best and what both computed."""
    if "skipped" in row:
        print(f"{name:26}skipped: {row['skipped']}", flush=True)
        return
    cells = [f"{name:26}"]
    for who in WHO:
        x = row.get(who)
        cells.append(f"{x['cpu_ms']:8.0f} {x['wall_ms']:6.0f}" if x else f"{'-':>8} {'-':>6}")
    for who in WHO[1:]:
        cells.append(f"{spread(row[who]['cpu_ratio']) if who in row else '-':>17}")
    memory = row.get("memory", {})
    for who in WHO:
        x = memory.get(who)
        cells.append(f"{x['peak'] / 1e6:6.0f}" if x else f"{'-':>6}")
    print(" ".join(cells), flush=True)


def details(name: str, row: dict) -> None:
    """What was run, the losses or lengths that have to agree, and what was tried."""
    checks = ", ".join(f"{row[who]['check']:.4f}" for who in WHO if who in row)
    tried = ", ".join(f"{label} {x['cpu_ms']:.0f} ({x['check']:.4f})" for label, x in row["tried"].items())
    print(f"  {row['shape']}; {checks}; best: {row['best_setting']} of {tried}", flush=True)


def main(args: Args) -> dict:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # TRL and transformers announce their own changes
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.quick:
        args.rounds, args.steps, args.memory, args.first_step = 1, 3, False, False
    if args.child:
        measure_alone(args)
        return {}
    has_trl = version("trl") is not None and version("datasets") is not None
    if has_trl:
        import datasets

        datasets.disable_progress_bars()
    machine = hardware("cpu")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{machine['cpu']}, {machine['cores']} cores, 1 thread; "
          + ", ".join(f"{name} {number or '-'}" for name, number in versions.items()))
    print(f"{'milliseconds, CPU and wall':26} {'ours':>15} {'TRL, best':>15} {'TRL, default':>15} "
          f"{'best / ours':>17} {'default / ours':>17}   peak RSS, MB", flush=True)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, first_step = {}, None
        for name, make in cases_of(args, folder).items():
            if args.cases and name not in args.cases:
                continue
            try:
                contenders = Contenders(make(), folder, args.steps)
            except FileNotFoundError as error:
                rows[name] = {"skipped": str(error)}
                report(name, rows[name])
                continue
            peer = has_trl or contenders.sampler is not None
            row = rows[name] = measure(args, name, contenders, peer)
            del contenders
            if args.memory:
                row["memory"] = {who: measure_memory(args, folder, name, who, row["best_setting"])
                                 for who in WHO[:2] if who in row}
            report(name, row)
            details(name, row)
        if args.first_step and (not args.cases or "first step" in args.cases):
            first_step = measure_first_step(args, folder, has_trl)
    if first_step:
        print("first step:", json.dumps(first_step))
    result = {"args": asdict(args), "hardware": machine | {"threads": 1, "load_average": os.getloadavg()[2]},
              "versions": versions, "cases": rows, "first_step": first_step,
              "cpu_seconds": time.process_time() - started}
    print(f"{result['cpu_seconds']:.0f} CPU seconds")
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
