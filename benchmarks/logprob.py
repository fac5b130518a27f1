"""What do token log-probs and their gradients cost: time, memory and error, beside other ways to get them.

    python benchmarks/logprob.py --dtype bfloat16 --output logprob.json

From hidden states h (N, H), output embeddings W (V, H) and targets y (N,) to log softmax(h W^T)[y], and from
a random upstream gradient per token, as a policy gradient or DPO has, back to h and W. The logits have a
standard deviation of 4, and the targets are drawn from their softmax, as sampled tokens are.

Time: CPU time of the process, which other jobs on the machine disturb less than wall-clock time, or the
latter with several threads; CUDA events on a GPU. Implementations take turns, in reverse order every other
round, and without gradients left over from before.
Memory: the peak above the level before the call, so it includes what the call returns: log-probs, dW and dh.
Resident memory on Linux, allocated memory on a GPU.
Error: against float64 autograd on the same values of h and W; the largest one of the log-probs, in nats, and
|difference| / |gradient| of dW and dh.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fail, token_logprobs  # noqa: E402

PLAIN, CAST = "log_softmax + gather", "gather on logits.float()"
TORCH, TRL, OURS = "linear_cross_entropy", "TRL ChunkedLogProb", "ours, default"


@dataclass
class Args:
    tokens: int = 2048  # N
    hidden: int = 256  # H
    vocabulary: int = 32000  # V
    dtype: Literal["float32", "bfloat16"] = "float32"  # of h and W
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    repeats: int = 5  # timed runs of each implementation
    threads: int = 1  # of torch, on a CPU; more than one needs cores that nothing else uses
    seed: int = 0  # of h, W, y and the upstream gradient
    output: str = ""  # also write the table here, as JSON


# ---- Implementations: (h, W, y) -> log-probs (N,) ----


def pick(logp, y):
    return logp.gather(-1, y[:, None]).squeeze(-1)


def implementations(dtype: torch.dtype) -> dict:
    """Name to function, or to a line that says why there is none."""
    rows = {PLAIN: lambda h, W, y: pick(F.log_softmax(h @ W.T, -1), y)}
    if dtype != torch.float32:
        rows[CAST] = lambda h, W, y: pick(F.log_softmax((h @ W.T).float(), -1), y)

    def gather_lse(h, W, y):
        z = h @ W.T
        return pick(z, y) - z.logsumexp(-1)

    rows["gather - logsumexp"] = gather_lse
    if hasattr(F, "linear_cross_entropy"):
        # without options torch forms all logits, like the first row; with them it takes chunks of rows
        options = torch.nn.LinearCrossEntropyOptions()
        rows[TORCH] = lambda h, W, y: -F.linear_cross_entropy(h, W, y, reduction="none", options=options)
    else:
        rows[TORCH] = f"not in torch {torch.__version__} (2.13 has it)"
    try:
        # as `add_fused_lm_head` of its trainers calls it: 32768 columns a tile, and only log-probs asked for
        kernel = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
        rows[TRL] = lambda h, W, y: kernel(h, W, None, y, 1.0, 32768, None, 1.0, ("log_probs",))[0]
    except ModuleNotFoundError as error:
        absent = (error.name or "").split(".")[0] == "trl" and version("trl") is None
        rows[TRL] = "not installed (pip install trl)" if absent else f"not in this trl: {error}"
    for name, keep in (("ours, keep", True), ("ours, recompute", False), (OURS, None)):
        rows[name] = lambda h, W, y, keep=keep: token_logprobs(h, W, y, keep=keep)
    return rows


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


# ---- Measurements ----


def inputs(args: Args, device: str):
    """(h, W, y, upstream gradient)."""
    torch.manual_seed(args.seed)
    normal = lambda *shape: torch.randn(*shape, device=device)
    dtype = getattr(torch, args.dtype)
    h = normal(args.tokens, args.hidden).to(dtype)
    W = (normal(args.vocabulary, args.hidden) * 4 / args.hidden**0.5).to(dtype)
    p = (torch.softmax(rows.float() @ W.float().T, -1) for rows in h.split(256))
    y = torch.cat([torch.multinomial(rows, 1).squeeze(-1) for rows in p])
    return h.requires_grad_(), W.requires_grad_(), y, normal(args.tokens)


def reference(h, W, y, g):
    """(log-probs, dW, dh) from float64 autograd, a chunk of rows at a time."""
    W64, logprobs, d_hidden = W.detach().double().requires_grad_(), [], []
    for rows, targets, upstream in zip(h.detach().split(256), y.split(256), g.double().split(256)):
        rows = rows.double().requires_grad_()
        logp = pick(F.log_softmax(rows @ W64.T, -1), targets)
        logp.backward(upstream)  # adds to W64.grad
        logprobs.append(logp.detach())
        d_hidden.append(rows.grad)
    return torch.cat(logprobs), W64.grad, torch.cat(d_hidden)


def stopwatch(device: str, threads: int):
    """A function that runs a function and returns (its result, seconds)."""

    def cuda(run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        return result, start.elapsed_time(end) / 1e3

    def cpu(run):
        now = time.process_time if threads == 1 else time.perf_counter
        start = now()
        result = run()
        return result, now() - start

    return cuda if device == "cuda" else cpu


def resident(key: str) -> int:
    """VmRSS, or its peak VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def peak(device: str, run):
    """(result of `run`, bytes of its peak above the level before, or None where nothing tells them)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but not given back would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library than glibc
        return run(), None
    return run(), resident("VmHWM") - before


def measure(args: Args, device: str) -> list[dict]:
    """One row of figures for each implementation."""
    h, W, y, g = inputs(args, device)
    truth, timed = reference(h, W, y, g), stopwatch(device, args.threads)
    table, functions = {}, {}

    def full(function):
        logprobs = function(h, W, y)
        return logprobs.detach(), *torch.autograd.grad(logprobs, (W, h), g.to(logprobs.dtype))

    def forward(function):
        with torch.no_grad():
            return function(h, W, y)

    for name, function in implementations(h.dtype).items():
        row = table[name] = {"implementation": name, "note": "", "full_s": [], "forward_s": []}
        if not callable(function):
            row["note"] = function
            continue
        try:
            function(h[:64], W, y[:64]).sum().backward()  # what is imported, compiled or allocated only once
            h.grad = W.grad = None
            (result, seconds), row["bytes"] = peak(device, lambda f=function: timed(lambda: full(f)))
        except (ImportError, torch.OutOfMemoryError) as error:
            row["note"] = f"failed: {str(error).splitlines()[0]}"
            continue
        relative = lambda x, want: ((x - want).norm() / want.norm()).item()  # in float64, as `want` is
        row["logprob_error"] = (result[0] - truth[0]).abs().max().item()
        row["dW_error"], row["dh_error"] = map(relative, result[1:], truth[1:])
        del result
        if device == "cpu" and name == TORCH:  # slow there, and in the table for its memory
            row.update(note="1 run", full_s=[seconds], forward_s=[timed(lambda f=function: forward(f))[1]])
        else:
            functions[name] = function  # its first run at full size was the warm-up
    for turn in range(args.repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            for key, run in (("full_s", full), ("forward_s", forward)):
                table[name][key].append(timed(lambda name=name, run=run: run(functions[name]))[1])
    return list(table.values())


# ---- Report ----


def figure(row: dict, key: str):
    """A row's number, the median of several; None if there is none."""
    value = row.get(key)
    return (statistics.median(value) if value else None) if isinstance(value, list) else value


def ratio(rows: dict, key: str, name: str, base: str):
    top, bottom = (figure(rows[x], key) for x in (name, base))
    return None if top is None or not bottom else top / bottom


def form(x: float | None, spec: str) -> str:
    """As format(x, spec), or "-" in a column of that width."""
    return format("-", ">" + spec.split(".")[0]) if x is None else format(x, spec)


def report(rows: dict) -> None:
    print(f"{'':25}|{'forward + backward, ms':^32}|{'forward':^9}|{'peak extra memory':^25}|{'error':^26}\n"
          f"{'':25}|{'median':>8}{'min':>7}{'/gather':>10}{'/TRL':>6} |{'ms':>7}  |{'MiB':>8}{'/gather':>10}"
          f"{'/TRL':>6} |{'log-prob':>9} {'dW':>7} {'dh':>7}")
    for name, row in rows.items():
        if not row["full_s"]:
            print(f"{name:25}| {row['note']}")
            continue
        ms, least, forward = figure(row, "full_s"), min(row["full_s"]), figure(row, "forward_s")
        time_ratios, memory_ratios = ([ratio(rows, key, name, base) for base in (PLAIN, TRL)]
                                      for key in ("full_s", "bytes"))
        mib = None if row["bytes"] is None else row["bytes"] / 2**20
        pair = lambda x: form(x[0], "10.2f") + form(x[1], "6.2f")
        print(f"{name:25}|{1e3 * ms:8.1f}{1e3 * least:7.0f}{pair(time_ratios)} |{1e3 * forward:7.1f}  "
              f"|{form(mib, '8.1f')}{pair(memory_ratios)} |{row['logprob_error']:9.1e} "
              f"{row['dW_error']:7.1e} {row['dh_error']:7.1e} {row['note']}".rstrip())


def checks(rows: dict) -> list[str]:
    """The targets beside what was measured."""
    text = lambda *x: form(ratio(rows, *x), ".2f")
    lines = [f"default vs TRL: time ratio {text('full_s', TRL, OURS)} (TRL / default, target >= 2.5), "
             f"memory ratio {text('bytes', OURS, TRL)} (default / TRL, target <= 0.2)"]
    for base, name in ((PLAIN, "plain gather"), (CAST, CAST)):
        if base in rows:
            lines += [f"default vs {name}: time ratio {text('full_s', OURS, base)} (target <= 1.0), "
                      f"memory ratio {text('bytes', OURS, base)} (target <= 0.5)"]
    return lines


def hardware(device: str) -> dict:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"cpu": name, "cores": os.cpu_count(), **gpu}


def main(args: Args) -> dict:
    if min(args.tokens, args.hidden, args.vocabulary, args.repeats, args.threads) < 1:
        fail("--tokens, --hidden, --vocabulary, --repeats and --threads must be positive")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this torch sees no GPU")
    torch.set_num_threads(args.threads)
    machine, versions = hardware(device), {x: version(x) for x in ("torch", "transformers", "trl")}
    print(f"N {args.tokens}, H {args.hidden}, V {args.vocabulary}, {args.dtype}, {device}: "
          f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, threads {args.threads}; "
          + ", ".join(f"{name} {number or '-'}" for name, number in versions.items()), flush=True)
    rows = {row["implementation"]: row for row in measure(args, device)}
    report(rows)
    print(*(lines := checks(rows)), sep="\n")
    result = {"args": asdict(args), "device": device, "hardware": machine, "versions": versions,
              "rows": list(rows.values()), "checks": lines}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
