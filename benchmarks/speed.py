"""How long do training steps and samples take, and how much memory, beside TRL's trainers and `generate`?

    pip install trl datasets
    python benchmarks/speed.py

Each case is a model and rows from which a script and TRL's trainer start alike: the same weights, the same
rows in the same order in every step, the same optimizer and learning rates. The mean losses of both have to
agree, and the benchmark ends with an error where they do not. Sampling is common.py's `sample` beside
transformers' `generate`, from the same prompts. In one process with one thread of torch, contenders take
turns, another one going first in each round:

    ours           the script's main() with its own default of --micro-batch-size, or `sample`; beside it
                   with --micro-batch-size 1
    fp32           TRL without bf16 and gradient checkpointing, which it switches on by default even on a CPU;
                   of DPO with the reference's log-probs computed once, before the first step
    single rows    the same, one row or pair at a time, gradients accumulated: nothing is padded
    static cache   of `generate`
    default        TRL's defaults, or those of `generate`

"Best" is the fastest of them that is not ours. --all-options adds what else TRL and ours offer.

Time: a step is what lies between the ends of two optimizer steps, whatever the loop does there: data,
sampling, losses, logging. The first one of a run is warm-up. CPU time of the process, which other jobs on the
machine disturb less, beside time on the wall. A ratio is that of two runs of one round, over the same steps;
the table has the median over rounds, the least and the largest one.
Memory: the largest resident set of a process of its own that imports what it needs and takes two steps.
First step: CPU seconds of a whole process, from the command to the end of its first optimizer step, in SFT on
the embedded world. sft.py evaluates the held-out rows before it, TRL does not.

Cases on real data need a folder with them, --shared, and are skipped with a reason without it. Without TRL
its columns stay empty. --cases runs some of the cases, and keeps what the file --output has of others.
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
from dataclasses import asdict, dataclass, field, replace
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
SEED = 1
LEARNING_RATE = 1e-4  # falls linearly to 0


@dataclass
class Args:
    cases: list[str] = field(default_factory=list)  # names of those to run; empty: all, and the first step
    rounds: int = 3  # each contender runs once in a round
    steps: int = 3  # optimizer steps of a run, of which the first one is warm-up
    shared: str = "../shared"  # folder with data/*.jsonl and models/, for the cases on real data
    memory: bool = True  # measure memory too, each contender in a process of its own
    all_options: bool = False  # measure the settings too that were found slower
    quick: bool = False  # seconds: tiny cases of the embedded world, one round, no memory, no first step
    output: str = "benchmarks/results/speed.json"  # empty: write nothing
    child: str = ""  # internal: the case and contender to run alone in --folder, to print its memory
    folder: str = ""  # internal: where the models of the cases are


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
    calls: int = 1  # of `sample` or `generate` in a run


def save_model(folder: Path, kind: str, tokenizer: str, hidden: int, vocabulary: int, head: str) -> str:
    """A random model of 4 layers, made once, with a tokenizer's files beside it."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(SEED)
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden,
            num_hidden_layers=4, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, num_labels=1)
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
             "eval_samples": 2, "kl_coef": 0.04}
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
            f"{small}; hh_harmless, 8 pairs", there(data / "hh_harmless.train.jsonl"), qwen(), 8, steps,
            1024),
        "reward model, hh_harmless": lambda: reward_case(
            f"{small}; hh_harmless, 8 pairs", there(data / "hh_harmless.train.jsonl"), classifier(), 8, steps,
            1024),
        "grpo, tinystories": lambda: grpo_case(
            "stories260K; 16 prompts of tinystories x 8 responses of 64 tokens",
            there(data / "tinystories.train.jsonl"), stories(), 16, 8, steps, 64),
        "sampling, 32k vocabulary": lambda: Sampling(
            "Llama, 4 layers of 256, vocabulary 32000; 32 prompts of 16 to 48 tokens x 8 responses of 16",
            llama(), random_prompts(32, 8), 16, False),
        "sampling, stories": lambda: Sampling(
            "stories260K; 32 prompts of tinystories x 8 responses of at most 64", stories(),
            story_prompts(stories(), 32, 8), 64, True),
        "sampling, embedded world": lambda: Sampling(
            "the model of sft.py; 32 prompts x 8 responses of at most 40", world(),
            world_prompts(world(), 32, 8), 40, True, calls=6)}


def prompts_of(model: str, rows: list[dict]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [{**row, "_where": "here"} for row in rows]
    return [ids for _, ids in load_prompts(tokenizer, rows, 1 << 30)]


def repeated(prompts: list[list[int]], group: int) -> list[list[int]]:
    return [ids for ids in prompts for _ in range(group)]


# ---- Contenders ----

FP32 = {"bf16": False, "gradient_checkpointing": False}
FP32_DPO = FP32 | {"precompute_ref_log_probs": True}
SETTINGS = {  # of TRL's config by script, and of `generate`; parts: micro-batches of a step, 0 for one a row
    "sft": {"fp32": FP32, "single rows": FP32 | {"parts": 0}, "default": {}},
    "dpo": {"fp32": FP32_DPO, "single rows": FP32_DPO | {"parts": 0}, "default": {}},
    "reward_model": {"fp32": FP32, "single rows": FP32 | {"parts": 0}, "default": {}},
    "grpo": {"fp32": FP32, "default": {}},
    "generate": {"static cache": {"cache_implementation": "static"}, "default": {}}}
EAGER = {"model_init_kwargs": {"attn_implementation": "eager"}}
MORE = {
    "sft": {"eager attention": FP32 | EAGER, "4 micro-batches": FP32 | {"parts": 4},
            "padding_free": FP32 | {"padding_free": True, "max_length": None},
            "bf16, single rows": {"gradient_checkpointing": False, "parts": 0}},
    "dpo": {"eager attention": FP32_DPO | EAGER, "4 micro-batches": FP32_DPO | {"parts": 4},
            "bf16, single rows": FP32_DPO | {"bf16": True, "parts": 0}},
    "reward_model": {"eager attention": FP32 | EAGER, "4 micro-batches": FP32 | {"parts": 4},
                     "bf16, single rows": {"gradient_checkpointing": False, "parts": 0}},
    "grpo": {"eager attention": FP32 | EAGER, "4 micro-batches": FP32 | {"parts": 4},
             "static cache": FP32 | {"cache_implementation": "static"},
             "bf16": {"gradient_checkpointing": False}},
    "generate": {"eager attention": {"attn_implementation": "eager"}}}


def settings_of(case, all_options: bool) -> tuple[dict, dict]:
    """(settings of ours, of the peer) for a case: name -> options."""
    kind = "generate" if isinstance(case, Sampling) else case.script
    ours = {"ours": {}}
    if kind in ("sft", "dpo", "reward_model"):
        ours["ours, single rows"] = {"micro_batch_size": 1}
    if not all_options:
        return ours, SETTINGS[kind]
    if kind != "generate":
        ours["ours, bf16"] = {"dtype": "bfloat16"}
    return ours, SETTINGS[kind] | MORE[kind]


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


def silence():
    return contextlib.redirect_stdout(io.StringIO())


def durations(stamps: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Milliseconds between neighbours, on the wall and of the CPU."""
    wall, cpu = zip(*stamps)
    between = lambda x: [1e3 * (b - a) for a, b in zip(x, x[1:])]
    return {"wall_ms": between(wall), "cpu_ms": between(cpu)}


def write_rows(path: str, rows: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(case: Training, steps: int) -> list[dict]:
    """What so many steps train on: no row twice."""
    return case.rows[: steps * case.batch_size // case.group]


def in_order(rows: list[dict]) -> list[dict]:
    """As the scripts take them."""
    return [rows[i] for i in shuffled(len(rows), SEED, 0)]


def train_ours(case: Training, steps: int, folder: str, options: dict) -> dict:
    """Times of steps, and the mean of what `check` compares: the loss, or of grpo the length of responses."""
    script = SCRIPTS[case.script]
    rows = rows_of(case, steps)
    os.makedirs(folder)
    data = {"dataset": write_rows(f"{folder}/rows.jsonl", rows),
            "eval_dataset": write_rows(f"{folder}/held_out.jsonl", rows[:1])}
    length = {"warmup_steps": 0, "num_train_epochs": 1}  # of the run: one pass
    if case.script == "grpo":
        length = {"total_episodes": steps * case.batch_size}
    args = script.Args(
        model=case.model, output_dir=f"{folder}/run", device="cpu", seed=SEED, eval_every=0, save_every=0,
        batch_size=case.batch_size, learning_rate=LEARNING_RATE, **data, **length, **case.flags, **options)
    with clock() as stamps, silence():
        script.main(args)
    log = [row for row in read_rows(f"{folder}/run/metrics.jsonl") if "loss" in row]
    name = "completions/mean_length" if case.script == "grpo" else "loss"
    return {**durations(stamps), "check": mean(row[name] for row in log)}


def train_trl(case: Training, steps: int, folder: str, options: dict) -> dict:
    """As train_ours, by TRL's trainer with `options` of its config; parts: micro-batches of a step."""
    import trl
    from datasets import Dataset, disable_progress_bars  # not above: they would count as memory of ours

    disable_progress_bars()
    options = dict(options)
    parts = options.pop("parts", 1) or case.batch_size
    rows = in_order(rows_of(case, steps))
    extra, lengths = {}, []

    def reward(prompts, completions, completion_ids, **columns):
        lengths.extend(map(len, completion_ids))
        return count_e(prompts, completions)

    if case.script == "grpo":
        extra["reward_funcs"] = reward
        order = {"shuffle_dataset": False}
    else:
        order = {"train_sampling_strategy": "sequential"}
    config = getattr(trl, f"{TRAINERS[case.script]}Config")(
        output_dir=folder, seed=SEED, max_steps=steps, per_device_train_batch_size=case.batch_size // parts,
        gradient_accumulation_steps=parts, learning_rate=LEARNING_RATE, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused", adam_beta2=0.999, max_grad_norm=1.0,
        use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        **order, **(case.config | options))
    make = getattr(trl, f"{TRAINERS[case.script]}Trainer")
    with clock() as stamps, silence(), contextlib.redirect_stderr(io.StringIO()):  # summaries, bars
        trainer = make(model=case.model, args=config, train_dataset=Dataset.from_list(rows), **extra)
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
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.case.model, attn_implementation=kind)
            self.loaded[kind] = model.eval(), None
        return self.loaded[kind]

    def eos_ids(self) -> list[int]:
        model, eos_ids = self.load("ours")
        return eos_ids if self.case.ends else [model.config.vocab_size]  # an id that no sample has

    def ours(self, seed: int, options: dict) -> dict:
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
    """A case with all that run on it: run(name, options)."""

    def __init__(self, case, folder: Path):
        self.case, self.folder, self.runs = case, folder, 0
        self.sampler = Sampler(case) if isinstance(case, Sampling) else None

    def run(self, name: str, options: dict, steps: int) -> dict:
        """wall_ms and cpu_ms of each step or sample, and a number to check that all do the same work."""
        gc.collect()
        self.runs += 1
        is_ours = name.startswith("ours")
        if self.sampler:
            seeds = range(self.runs * self.case.calls, (self.runs + 1) * self.case.calls)
            draw = self.sampler.ours if is_ours else self.sampler.generate
            results = [draw(seed, options) for seed in seeds]
            times = {key: sum((x[key] for x in results), []) for key in ("wall_ms", "cpu_ms")}
            return {**times, "check": mean(x["check"] for x in results)}
        folder = f"{self.folder}/run-{os.getpid()}-{self.runs}"
        train = train_ours if is_ours else train_trl
        try:
            return train(self.case, steps, folder, options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# ---- Measurements ----


def measure(args: Args, contenders: Contenders, has_trl: bool) -> dict:
    """Times of all settings of a case over the rounds, ratios to ours, and which other one is best."""
    ours, theirs = settings_of(contenders.case, args.all_options)
    has_peer = has_trl or contenders.sampler is not None
    settings = ours | theirs if has_peer else ours
    names, runs = list(settings), {name: [] for name in settings}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(contenders.run(name, settings[name], args.steps))
    result = {"shape": contenders.case.shape, "best": None, "settings": {}}
    for name in names:
        row = result["settings"][name] = {"check": mean(run["check"] for run in runs[name])}
        for key in ("cpu", "wall"):
            times = [run[f"{key}_ms"] for run in runs[name]]  # of each round
            row[f"{key}_ms"] = median(sum(times, []))
            row[f"{key}_ms_of_rounds"] = times
            own = [run[f"{key}_ms"] for run in runs["ours"]]
            ratios = [sum(a) / sum(b) for a, b in zip(times, own)]
            row[f"{key}_ratio"] = [median(ratios), min(ratios), max(ratios)]
    if has_peer:
        result["best"] = min(theirs, key=lambda name: result["settings"][name]["cpu_ms"])
    return result


def disagreement(case, row: dict) -> str:
    """What is wrong if losses differ more than bf16 explains, or mean lengths of samples more than chance."""
    tolerance = 0.01 if isinstance(case, Training) and case.script != "grpo" else 0.2
    own = row["settings"]["ours"]["check"]
    others = {name: x["check"] for name, x in row["settings"].items()}
    wrong = {name: x for name, x in others.items() if not abs(x - own) <= tolerance * abs(own)}
    return f"loss or length of ours is {own}, but of others {wrong}" if wrong else ""


def measure_alone(args: Args) -> None:
    """The child's part of `memory_of`: one run in this process; prints its memory as JSON."""
    case_name, name, options = json.loads(args.child)
    contenders = Contenders(cases_of(args, Path(args.folder))[case_name](), Path(args.folder))
    contenders.run(name, options, 2)
    print(json.dumps(resident("VmHWM")))


def memory_of(args: Args, folder: Path, case_name: str, name: str, options: dict) -> int | None:
    """Bytes of the largest resident set of a process in which this contender runs alone. None: not Linux."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "--child", json.dumps([case_name, name, options]), "--folder",
               str(folder), "--shared", args.shared, *(["--quick"] if args.quick else [])]
    process = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if process.returncode:
        fail(f"memory of {case_name}, {name}: {process.stderr[-500:]}")
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
config = SFTConfig(output_dir=sys.argv[2], per_device_train_batch_size=64, num_train_epochs=4,
                   learning_rate=6e-3, warmup_steps=30, bf16=False, gradient_checkpointing=False,
                   use_cpu=True, report_to=[])
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


def measure_first_step(args: Args, folder: Path, has_trl: bool) -> dict:
    """Seconds from the command to the first step of SFT on the embedded world, from the same weights."""
    model, script = world_model(folder / "start", False), folder / "trl_sft.py"
    script.write_text(TRL_SCRIPT)
    runs = {"ours": [], "trl": []} if has_trl else {"ours": []}
    for turn in range(args.rounds):
        for who in runs:
            output = str(folder / f"first-{who}-{turn}")
            command = ["sft.py", "--model", model, "--output-dir", output]
            if who == "trl":
                command = [str(script), model, output]
            seconds = seconds_to_first_step(*command, HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
            runs[who].append(seconds)
    result = {}
    for who in runs:
        rows = runs[who][1:] or runs[who]  # the first one filled caches
        result[who] = {key: median(row[key] for row in rows) for key in rows[0]} | {"runs": rows}
    if has_trl:
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(result["trl"]["runs"], result["ours"]["runs"])]
        result["cpu_ratio"] = [median(ratios), min(ratios), max(ratios)]
    return result


# ---- Report ----

HEAD = (f"{'milliseconds: CPU, wall':25} {'ours':>13} {'best':>13} {'default':>13} {'best / ours':>18} "
        f"{'default / ours':>18}   peak RSS, MB: ours, best")


def spread(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def cells_of(row: dict) -> list[str]:
    """A case's line of README.md's table, without its name: CPU milliseconds (wall), ratios, megabytes."""
    settings, memory = row["settings"], row["memory"]
    cells = []
    for names in (["ours"], ["ours, single rows"], ["fp32"], ["single rows", "static cache"], ["default"]):
        found = [settings[who] for who in names if who in settings]
        cells += [f"{x['cpu_ms']:.0f} ({x['wall_ms']:.0f})" for x in found] or [""]
    cells += [spread(settings[who]["cpu_ratio"]) for who in (row["best"], "default")]
    cells += [f"{memory[who] / 1e6:.0f}" if who in memory else "" for who in ("ours", "fp32", row["best"])]
    return cells


def report(name: str, row: dict) -> None:
    """A line of the table; below it what was run, and CPU milliseconds and checks of every setting."""
    if "skipped" in row:
        print(f"{name:25} skipped: {row['skipped']}", flush=True)
        return
    settings = row["settings"]
    columns = [settings.get(who) for who in ("ours", row["best"], "default")]
    cells = [f"{name:25}"]
    cells += [f"{x['cpu_ms']:6.0f} {x['wall_ms']:6.0f}" if x else f"{'-':>13}" for x in columns]
    cells += [f"{spread(x['cpu_ratio']) if x else '-':>18}" for x in columns[1:]]
    memory = row.get("memory", {})
    peaks = [memory.get(who) for who in ("ours", row["best"])]
    cells += [f"{peak / 1e6:6.0f}" if peak else f"{'-':>6}" for peak in peaks]
    print(" ".join(cells))
    print(f"    {row['shape']}; best: {row['best']}; measured in {row['cpu_seconds']:.0f} CPU seconds")
    parts = [f"{who} {x['cpu_ms']:.0f} ms ({x['check']:.4g})" for who, x in settings.items()]
    print(f"    with loss or length: {', '.join(parts)}", flush=True)


def report_first_step(result: dict) -> None:
    line = "seconds to the first step, CPU and wall:"
    for who in ("ours", "trl"):
        if who in result:
            line += f" {who} {result[who]['cpu_s']:.1f} {result[who]['wall_s']:.1f};"
    if "cpu_ratio" in result:
        line += f" TRL / ours {spread(result['cpu_ratio'])}"
    print(line, flush=True)


def write_result(output: str, result: dict, keep: bool) -> None:
    """Five digits, a line a case. keep: also the cases that the file has and this run has not."""
    path, result = Path(output), dict(result)
    if keep and path.exists():
        old = json.loads(path.read_text())
        if old["versions"] == result["versions"]:
            result["cases"] = old["cases"] | result["cases"]
            result["first_step"] = result["first_step"] or old["first_step"]
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    cases = rounded.pop("cases").items()
    cases = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in cases)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items()]
    path.write_text("{" + ",\n".join(lines) + ',\n"cases": {\n' + cases + "}}\n")


def main(args: Args) -> dict:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.quick:
        args = replace(args, rounds=1, memory=False)
    if min(args.rounds, args.steps - 1) < 1:
        fail("--rounds must be at least 1 and --steps at least 2: the first one is warm-up")
    has_trl = version("trl") is not None and version("datasets") is not None
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")  # TRL and transformers announce their own changes
        if args.child:
            return measure_alone(args) or {}
        return measure_all(args, Path(temporary), has_trl)


def measure_all(args: Args, folder: Path, has_trl: bool) -> dict:
    machine = hardware("cpu")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{machine['cpu']}, {machine['cores']} cores, 1 thread; "
          + ", ".join(f"{name} {number or '-'}" for name, number in versions.items()))
    print(HEAD, flush=True)
    cases, first_step = {}, None
    made = cases_of(args, folder)
    if unknown := set(args.cases) - {*made, "first step"}:
        fail(f"--cases {sorted(unknown)}: there are {', '.join(made)}, first step")
    for name in args.cases or made:
        if name == "first step":
            continue
        began = os.times()
        try:
            contenders = Contenders(made[name](), folder)
        except FileNotFoundError as error:
            cases[name] = {"skipped": str(error)}
            report(name, cases[name])
            continue
        row = cases[name] = measure(args, contenders, has_trl)
        row["load_average"] = os.getloadavg()[0]
        if args.memory:
            ours, theirs = settings_of(contenders.case, args.all_options)
            row["memory"] = {}
            for who in ("ours", "fp32", row["best"]):
                if who in row["settings"] and who not in row["memory"]:
                    row["memory"][who] = memory_of(args, folder, name, who, (ours | theirs)[who])
        row["cpu_seconds"] = sum(os.times()[:4]) - sum(began[:4])  # children's too
        report(name, row)
        if wrong := disagreement(contenders.case, row):
            fail(f"{name}: {wrong}")
    if "first step" in args.cases or not (args.cases or args.quick):
        first_step = measure_first_step(args, folder, has_trl)
        report_first_step(first_step)
    here = ("shared", "output", "child", "folder")  # of this machine
    settings = {name: x for name, x in asdict(args).items() if name not in here}
    result = {"args": settings, "hardware": machine, "versions": versions, "first_step": first_step,
              "cases": cases}
    if args.output:
        write_result(args.output, result, bool(args.cases))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
