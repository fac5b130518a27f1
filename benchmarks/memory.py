"""How much memory does a run take, and on which card does it fit? Computed, without a weight or a GPU.

    python benchmarks/memory.py --model 8B --lora-rank 16 --ranks 4
    python benchmarks/memory.py --model Qwen/Qwen2.5-0.5B --micro-batch-size 4 --response-tokens 1024
    python benchmarks/memory.py --measure     a check against real runs on a CPU (6 minutes)

The model is built on torch's meta device, where it has sizes and no memory. Of its P weights L are those of
Linear layers below the head; V is the vocabulary, H the hidden size. A run holds, in bytes,

weights      4 P trained in fp32; with --lora-rank r 2 L + 4 (P - L), as `lighten` leaves what is frozen, and
             4 r (in + out) of adapters for each Linear layer below the head. ppo's critic counts too
gradients    4 and Adam 8 for each trained weight
frozen       copies, 2 L + 4 (P - L): the reference of ppo and grpo (dpo's is a pass of the start, and with
             adapters it is the policy without them), the reward model of ppo
casts        bf16 copies of trained weights, 2 (L + V H), that autocast keeps up to the backward pass
activations  kept for the backward pass, for each token of a micro-batch and each layer, where q and k are the
             widths of all heads of queries and keys, m that of the MLP:
                 fp32 on a CPU       4 (6 H + 3 q + 2 k + 4 m)
                 bf16 on a GPU       26 H + 4 q + 4 k + 8 m
             Adapters add their inner widths, and a frozen norm keeps 8 H less in two. With
             --gradient-checkpointing 4 H a layer, and one layer in full
logprobs     of scored tokens, kept up to KEEP_BYTES (a tenth of the card), else computed again; and two
             chunks of fp32 logits, or the head's gradient, where it is more
cache        keys and values of the rows that are sampled, and the logits of a step, when gradients and
             activations have gone: the peak has the larger of both

With --shard on N ranks weights, gradients, Adam and frozen copies are a share of 1 / N, all in fp32; a rank
holds the head and two layers whole (in casts), and all weights while it samples. The formulas are those of
Llama and its like, with gated MLPs; of other models they are an estimate, of mixtures of experts none. Rows
that begin alike take less. A card fits if 10 % of it are left, for CUDA and for gaps, with 16 rows sampled at
the same time: so few it is when memory runs out with more.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from common import KEEP_BYTES, fail  # noqa: E402
from logprob import hardware  # noqa: E402

GIB, MIB = 2**30, 2**20
CARDS = 24, 48, 80  # GiB
SCRIPTS = "sft", "reward_model", "dpo", "ppo", "grpo"
PARTS = "weights", "gradients", "adam", "frozen", "casts", "activations", "logprobs", "cache"
SIZES = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    vocab_size""".split()
NAMED = {  # as published: kind, sizes, whether the head is the embedding
    "30M": ("llama", (512, 4, 8, 8, 1536, 32000), True),  # of --measure
    "0.5B": ("qwen2", (896, 24, 14, 2, 4864, 151936), True),  # Qwen2.5
    "1.5B": ("qwen2", (1536, 28, 12, 2, 8960, 151936), True),
    "7B": ("qwen2", (3584, 28, 28, 4, 18944, 152064), False),
    "8B": ("llama", (4096, 32, 32, 8, 14336, 128256), False)}  # Llama 3
H200 = {  # of gpu_check.py's steps at 0.5B, tokens that were computed and scored
    "sft": (11424, 128 * 150), "reward_model": (3668, 128), "dpo": (3668, 128 * 48)}


@dataclass
class Args:
    model: str = "0.5B"  # 0.5B, 1.5B, 7B, 8B, or a folder, a config.json, a Hub id
    scripts: tuple[str, ...] = SCRIPTS  # rows of the table
    lora_rank: int = 16  # of the rows with adapters
    ranks: int = 4  # of the rows with --shard
    micro_batch_size: int = 8  # rows of a forward pass; in dpo and reward_model pairs
    accumulate: bool = True  # --micro-batch-size is below --batch-size: gradients wait for the next rows
    prompt_tokens: int = 512  # of each row
    response_tokens: int = 512  # of each row, those that are scored
    sampled_rows: int = 256  # at the same time in ppo and grpo; in sft and dpo 64 at most
    gradient_checkpointing: bool = False  # as in the scripts
    device: Literal["cuda", "cpu"] = "cuda"  # cuda: bf16 products; cpu: fp32
    measure: bool = False  # run scripts on this CPU, and compare
    output: str = ""  # write the result here, as JSON


# ---- Bytes ----


@dataclass
class Sizes:
    """Of a model, in weights or widths; `inner` are in + out of its Linear layers below the head."""

    P: int
    linear: int
    head: int  # V x H
    own_head: int  # 0 if the embedding is the head
    V: int
    inner: int
    num_linear: int
    H: int
    layers: int
    q: int
    k: int
    m: int


def config_of(model: str):
    if model in NAMED:
        kind, sizes, tied = NAMED[model]
        return AutoConfig.for_model(kind, **dict(zip(SIZES, sizes)), tie_word_embeddings=tied)
    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def sizes_of(config) -> Sizes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [x for x in model.base_model.modules() if isinstance(x, torch.nn.Linear)]
    linear = inner = 0
    for layer in layers:
        linear += sum(p.numel() for p in layer.parameters())
        inner += layer.in_features + layer.out_features
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(
        P=model.num_parameters(),
        linear=linear,
        head=head.numel(),
        own_head=0 if tied else head.numel(),
        V=len(head),
        inner=inner,
        num_linear=len(layers),
        H=config.hidden_size,
        layers=config.num_hidden_layers,
        q=heads * width,
        k=(getattr(config, "num_key_value_heads", None) or heads) * width,
        m=getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def activations(s: Sizes, args: Args, rank: int) -> float:
    """Bytes of one token, kept for the backward pass."""
    if args.device == "cuda":
        layer = 26 * s.H + 4 * s.q + 4 * s.k + 8 * s.m
        top = 14 * s.H  # the last norm, and what the head reads
    else:
        layer = 4 * (6 * s.H + 3 * s.q + 2 * s.k + 4 * s.m)
        top = 16 * s.H
    if rank:
        element = 2 if args.device == "cuda" else 4
        layer += element * rank * s.num_linear / s.layers - 8 * s.H  # no x / rms of the two norms
    if args.gradient_checkpointing:
        return 4 * s.H * s.layers + layer + top
    return layer * s.layers + top


def plan(s: Sizes, script: str, args: Args, rank: int = 0, ranks: int = 1, card: int = 80) -> dict:
    """Bytes of each of `PARTS` on one device, and the peak, of a script with adapters of this rank (0: none),
    sharded over so many ranks (1: not)."""
    cuda = args.device == "cuda"
    shard = ranks > 1
    half = 2 if cuda else 4
    base = s.P - s.own_head + s.H  # a model with a score in the head's place
    number = {"ppo": 1, "reward_model": 0}.get(script, 0)  # of such models that are trained beside a policy
    P = (base if script == "reward_model" else s.P) + number * base
    models = 1 + number
    trained = P
    if rank:
        trained = models * rank * s.inner
    light = models * s.linear * (4 - half) * (not shard)  # what `lighten` saves
    result = {"weights": 4 * P, "gradients": 4 * trained, "adam": 8 * trained}
    if rank:
        result["weights"] += 4 * trained - light
    frozen = [s.P] * (script in ("ppo", "grpo") and not rank) + [base] * (script == "ppo")
    result["frozen"] = sum(4 * x - s.linear * (4 - half) * (not shard) for x in frozen)
    for name in result:
        result[name] = result[name] / ranks

    head = 0 if script == "reward_model" else s.head
    cached = kept = 0 if rank else s.linear  # by autocast
    if shard and not args.gradient_checkpointing:
        kept = s.linear  # by autograd, since frozen weights are fp32 then
    result["casts"] = 2 * (kept + head) * cuda
    if shard:  # two layers, and what is outside them
        result["casts"] += 4 * (s.P - s.linear) + 8 * s.linear / s.layers

    sides = 2 if script in ("dpo", "reward_model") else 1
    rows = sides * args.micro_batch_size
    length = args.prompt_tokens + args.response_tokens
    result["activations"] = rows * length * activations(s, args, rank)
    result["logprobs"] = 0
    if head:
        scored = rows * args.response_tokens
        chunk = min(scored, 2048 if cuda else 128)
        kept = scored * s.V * half
        limit = card * GIB // 10 if cuda else KEEP_BYTES["cpu"]
        kept = kept * (kept <= limit)
        gradient = 4 * head * (not rank)
        last = min(kept, chunk * s.V * half)  # is not kept yet while it is computed
        result["logprobs"] = kept + max(8 * chunk * s.V - last, gradient)

    sampled = {"sft": 64, "dpo": 64, "reward_model": 0}.get(script, 256)
    sampled = min(sampled, args.sampled_rows)
    cache = 2 * s.layers * s.k * length * half
    result["cache"] = sampled * (cache + 8 * s.V)
    held = result["weights"] + result["adam"] + result["frozen"]
    training = result["activations"] + result["logprobs"] + result["casts"]
    training += result["gradients"] * args.accumulate
    sampling = 0
    if sampled:  # with all weights
        sampling = result["cache"] + 2 * (cached + head) * cuda + 4 * s.P * (1 - 1 / ranks)
    result["peak"] = held + max(training, sampling, result["gradients"])
    return result


def modes(args: Args) -> dict:
    """Name of a way to run -> (rank of adapters, ranks)."""
    return {
        "full": (0, 1),
        f"--lora-rank {args.lora_rank}": (args.lora_rank, 1),
        f"--shard on {args.ranks}": (0, args.ranks),
        f"both on {args.ranks}": (args.lora_rank, args.ranks)}


def table(s: Sizes, args: Args) -> dict:
    """{script: {mode: GiB of each part, the peak, and the smallest of CARDS that it fits, or None}}"""
    result = {}
    few = replace(args, sampled_rows=min(args.sampled_rows, 16))
    for script in args.scripts:
        rows = result[script] = {}
        for mode, (rank, ranks) in modes(args).items():
            peaks = {card: plan(s, script, few, rank, ranks, card)["peak"] for card in CARDS}
            fits = [card for card, peak in peaks.items() if peak <= 0.9 * card * GIB]
            row = plan(s, script, args, rank, ranks)
            rows[mode] = {name: round(x / GIB, 2) for name, x in row.items()}
            rows[mode]["fits"] = min(fits, default=None)
    return result


def cells_of(row: dict) -> list[str]:
    """A row of the printed table."""
    return [f"{row[name]:.1f}" for name in (*PARTS, "peak")] + [f"{row['fits']}" if row["fits"] else "none"]


def show(result: dict) -> None:
    print("| script | " + " | ".join(("", *PARTS, "peak", "fits")) + " |")
    print("|---|---|" + "---:|" * (len(PARTS) + 2))
    for script, rows in result.items():
        for mode, row in rows.items():
            print(f"| {script} | {mode} | {' | '.join(cells_of(row))} |")


def examples() -> dict:
    """What benchmarks/README.md shows besides measured runs: peaks in GiB of dpo.py's documented command, if
    each of its rows has --max-length tokens, and of steps that were measured on a GPU; a table of 8B."""
    half = sizes_of(config_of("0.5B"))
    peak = lambda script, args: round(plan(half, script, args)["peak"] / GIB, 1)
    whole = Args(micro_batch_size=2, prompt_tokens=512, response_tokens=8192 - 512)
    commands = {
        "as documented": whole,
        "--micro-batch-size 4": replace(whole, micro_batch_size=4),
        "--max-length 4096": replace(whole, response_tokens=4096 - 512),
        "--gradient-checkpointing": replace(whole, gradient_checkpointing=True)}
    result = {"dpo.py": {name: peak("dpo", args) for name, args in commands.items()}, "H200": {}}
    measured = json.loads((ROOT / "benchmarks" / "results" / "gpu_check_h200.json").read_text())
    for script, (tokens, scored) in H200.items():
        step = Args(accumulate=False, sampled_rows=2, prompt_tokens=tokens - scored, response_tokens=scored)
        step.micro_batch_size = 1 if script == "sft" else 0.5
        result["H200"][script] = [peak(script, step), measured[f"train_{script}"]["peak GiB"]]
    eight = Args(gradient_checkpointing=True, micro_batch_size=4, ranks=8)
    result["8B"] = table(sizes_of(config_of("8B")), eight)
    return result


# ---- Measurement ----

PEAK = """
import atexit, os, runpy, sys
def show():
    lines = open("/proc/self/status").read().splitlines()
    print(*[line for line in lines if "VmHWM" in line], file=sys.__stderr__)
atexit.register(show)
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # a script, and at its end the peak of its resident memory
PROMPT, RESPONSE = 8, 56  # tokens of the rows that are measured, all alike
CASES = {  # script, rows of a forward pass, rank of adapters, --gradient-checkpointing
    "sft": ("sft", 8, 0, False),
    "sft, LoRA": ("sft", 8, 16, False),
    "dpo": ("dpo", 8, 0, False),
    "dpo, LoRA": ("dpo", 8, 16, False),
    "grpo": ("grpo", 8, 0, False),
    "grpo, LoRA": ("grpo", 8, 16, False),
    "sft, 16 rows": ("sft", 16, 0, False),
    "sft, 16 rows, checkpointing": ("sft", 16, 0, True)}


def write_model(folder: Path, model: str) -> None:
    """A configuration with the embedded world's tokenizer: the scripts start from random weights."""
    shutil.copytree(ROOT / "data" / "model", folder)
    if model:
        config = config_of(model)
        config.update({"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "dtype": "float32"})
        config.save_pretrained(folder)


def write_rows(folder: Path, n: int) -> dict:
    """Files of n rows and of held-out rows of random words, for each script; flags that name them."""
    vocabulary = json.loads((ROOT / "data" / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in vocabulary if word.isalpha()]
    draw = random.Random(1)
    text = lambda length: " ".join(draw.choices(words, k=length))
    for name, number in (("train", n), ("held_out", 4)):
        lines = []
        for _ in range(number):
            row = {"prompt": text(PROMPT), "completion": " " + text(RESPONSE - 1)}
            row |= {"chosen": row["completion"], "rejected": " " + text(RESPONSE - 1)}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"dataset": folder / "train.jsonl", "eval-dataset": folder / "held_out.jsonl"}


def measure(script: str, rows: int, rank: int, checkpointing: bool, model: str) -> int:
    """Peak resident bytes of a process that runs a script for two steps of two micro-batches each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "start", model)
        size = rows // 2 if script == "dpo" else rows
        flags = write_rows(folder, 4 * size)
        flags |= {"model": folder / "start", "output-dir": folder / "run", "device": "cpu", "lora-rank": rank,
                  "batch-size": 2 * size, "micro-batch-size": size, "eval-samples": 8,
                  "max-new-tokens": RESPONSE}
        if script == "grpo":
            gold = f"{ROOT / 'data' / 'gold_reward.py'}:gold_reward"
            flags |= {"total-episodes": 4 * size, "num-generations": 4, "reward": gold}
        else:
            flags |= {"num-train-epochs": 1}
        command = [sys.executable, "-c", PEAK, str(ROOT / f"{script}.py")]
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)]
        command += ["--gradient-checkpointing"] * checkpointing
        environment = os.environ | {  # one thread, and glibc gives back what is freed
            "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if process.returncode:
            fail(f"{script}: {process.stderr[-600:]}")
        return 1024 * int(process.stderr.split()[-2])


def args_of(case: str) -> Args:
    """What `plan` needs to know of a case."""
    script, rows, _, checkpointing = CASES[case]
    return Args(
        device="cpu",
        micro_batch_size=rows // 2 if script == "dpo" else rows,
        prompt_tokens=PROMPT,
        response_tokens=RESPONSE,
        sampled_rows=2 * rows if script == "grpo" else 8,
        gradient_checkpointing=checkpointing)


def compare(output: str, names=tuple(CASES)) -> dict:
    """In MiB: what the libraries take, which is what a run of the embedded world's 0.1M weights takes beyond
    its prediction; of each case its parts, its peak predicted and measured beyond the libraries, and their
    ratio; then `examples`. Each figure is written when it is there, and not measured again."""
    file = Path(output or os.devnull)
    result = json.loads(file.read_text()) if file.is_file() else {"libraries": {}, "cases": {}}
    result |= examples()
    result |= {"torch": torch.__version__, "transformers": transformers.__version__, **hardware("cpu")}
    libraries, cases = result["libraries"], result["cases"]
    small, large = sizes_of(config_of(str(ROOT / "data" / "model"))), sizes_of(config_of("30M"))
    for name in names:
        script, rows, rank, checkpointing = CASES[name]
        args = args_of(name)
        key = f"{script}, rank {rank}"
        if key not in libraries:
            used = measure(script, rows, rank, checkpointing, "")
            libraries[key] = round((used - plan(small, script, args, rank)["peak"]) / MIB, 1)
        if name not in cases:
            used = measure(script, rows, rank, checkpointing, "30M")
            parts = plan(large, script, args, rank)
            cases[name] = {part: round(x / MIB, 1) for part, x in parts.items()}
            cases[name]["measured"] = round(used / MIB - libraries[key], 1)
        row = cases[name]
        row["ratio"] = round(row["peak"] / row["measured"], 3)
        print(f"{name:28} libraries {libraries[key]:.0f} MiB, beyond them predicted {row['peak']:.0f}, "
              f"measured {row['measured']:.0f}, ratio {row['ratio']:.3f}", flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(args: Args) -> dict:
    if args.measure:
        return compare(args.output)
    sizes = sizes_of(config_of(args.model))
    print(f"{args.model}: {sizes.P:,} weights; GiB of one device, predicted; {args.micro_batch_size} rows of "
          f"{args.prompt_tokens} + {args.response_tokens} tokens at a time")
    result = {"args": asdict(args), "sizes": asdict(sizes), "table": table(sizes, args)}
    show(result["table"])
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
