"""Several processes on one machine: time of a step, and bytes that each one sends, beside the formula.

    python benchmarks/scaling.py                    1 and 2 processes on the CPU (gloo), a minute
    torchrun --nproc-per-node 8 benchmarks/scaling.py --worker --device cuda    on GPUs, rank 0 prints

A step of sft.py on random texts, with a model of --hidden-size and --num-layers. Of P trained parameters in
fp32, each of N ranks sends in a step (and receives as much, in a ring)

    plain      2 (N - 1) / N  x 4 P bytes: gradients are summed
    --shard    3 (N - 1) / N  x 4 P bytes for each micro-batch: weights gathered twice, gradients scattered

With G bytes a second between ranks and a step of T seconds on one GPU, N GPUs take T / N + bytes / G: the sum
is not hidden behind the backward pass. Processes that share the cores of one machine are no faster than one
process: there, the figures of interest are the bytes.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import sft  # noqa: E402


@dataclass
class Args:
    hidden_size: int = 128  # of the Llama that is trained, from random weights
    num_layers: int = 4  # of it
    batch_size: int = 16  # rows a step, of 16 to 64 words
    micro_batch_size: int = 4  # rows a forward pass
    num_steps: int = 10  # measured; the first two are left out
    device: str = "cpu"  # or cuda
    worker: bool = False  # be one of the processes, and print what they send as JSON
    shard: bool = False  # of a worker
    folder: str = "runs/scaling"  # of a worker: gets its model, rows and run
    output: str = str(ROOT / "benchmarks" / "results" / "scaling.json")  # of the table


def count_bytes(counts):
    """Let torch's collectives note in counts what a ring sends: (N - 1) / N of a tensor's bytes a pass."""
    passes = {"all_reduce": 2, "all_gather_single": 1, "reduce_scatter_single": 1}  # as of torch 2.13
    if not hasattr(dist, "all_gather_single"):
        passes = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
    for name, number in passes.items():
        inner = getattr(dist, name)

        def counted(*tensors, inner=inner, name=name, number=number, **options):
            world = dist.get_world_size()
            given = [x for x in (*tensors, *options.values()) if torch.is_tensor(x)]
            largest = max(x.numel() * x.element_size() for x in given)
            counts[name] = counts.get(name, 0) + number * (world - 1) / world * largest
            return inner(*tensors, **options)

        setattr(dist, name, counted)


def work(args):
    """Train, and return (P, seconds of a step, bytes of a step that each rank sends)."""
    folder = Path(args.folder)
    model = folder / "model"
    common.device_of(sft.Args(device=args.device))  # joins the other processes
    if common.ranks()[0] == 0:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "model")
        tokenizer.save_pretrained(model)
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden_size, intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.num_layers, num_attention_heads=4, num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(model)
        draw = random.Random(1)
        words = [word for word in tokenizer.get_vocab() if word.isalpha()]
        rows = [" ".join(draw.choices(words, k=draw.randint(16, 64))) for _ in range(args.batch_size)]
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    common.over_ranks(torch.zeros(1))  # the files are there
    counts, at_step, seconds = {}, [], []
    count_bytes(counts)
    log = common.Run.log

    def noted(run, step, metrics, samples=()):
        if "learning_rate" in metrics:
            at_step.append(sum(counts.values()))
            seconds.append(metrics["num_tokens"] / step / metrics["tokens_per_second"])
        log(run, step, metrics, samples)

    common.Run.log = noted
    rows = str(folder / "rows.jsonl")
    result = sft.main(sft.Args(
        model=str(model), dataset=rows, eval_dataset=rows, num_train_epochs=args.num_steps, eval_every=0,
        eval_samples=1, max_new_tokens=1, save_every=0, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, device=args.device, shard=args.shard,
        output_dir=str(folder / "run")))
    config = transformers.AutoConfig.from_pretrained(model)
    size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    sent = (at_step[-1] - at_step[1]) / (len(at_step) - 2)
    micro_batches = len(common.shares(args.batch_size, args.micro_batch_size))
    return {"parameters": size, "seconds": statistics.median(seconds[2:]), "bytes": sent,
            "loss": result["loss"], "micro_batches": micro_batches}


def formula(parameters, world, shard, micro_batches):
    """Bytes that each rank sends in a step."""
    passes = 3 * micro_batches if shard else 2
    return passes * (world - 1) / world * 4 * parameters


def main(args: Args) -> dict:
    if args.worker:
        result = work(args)
        if common.ranks()[0] == 0:
            print(json.dumps(result))
        return result
    table = {"torch": torch.__version__, "cores": os.cpu_count(), "runs": []}
    table["args"] = {name: value for name, value in asdict(args).items() if name not in ("folder", "output")}
    for world, shard in [(1, False), (2, False), (2, True)]:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(args).items()
                   if name not in ("worker", "shard", "folder", "output")]
        options += ["--shard"] * shard
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(world)]
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.run(
                [*torchrun, __file__, "--worker", f"--folder={folder}", *options],
                check=True, capture_output=True, text=True)
        run = json.loads(process.stdout.splitlines()[-1]) | {"ranks": world, "shard": shard}
        run["formula"] = formula(run["parameters"], world, shard, run["micro_batches"])
        table["runs"].append(run)
        megabytes = f"{run['bytes'] / 1e6:.2f} MB sent by each, {run['formula'] / 1e6:.2f} by the formula"
        print(f"{world} ranks{' --shard' * shard}: {run['seconds']:.3f} s a step, {megabytes}")
    Path(args.output).write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
