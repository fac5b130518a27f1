"""What does a batch of token log-probs with gradients cost: time, memory and error, against other ways.

    python benchmarks/logprob.py --dtype bfloat16 --output logprob.json

From hidden states h (N, H), output embeddings W (V, H) and targets y (N,) to log softmax(h W^T)[y], and with
a random upstream gradient per token, as a policy gradient or DPO has, back to h and W. The logits have a
standard deviation of 4, and the targets are drawn from their softmax, as sampled tokens are.

Time: on a CPU the CPU time of the process, which other jobs on the machine disturb little, or wall-clock time
if there are several threads; CUDA events on a GPU. Implementations take turns, in reverse order every other
round.
Memory: the peak above the level before the call, and so with the log-probs, dh and dW that are its results:
resident memory on Linux, allocated memory on a GPU. Every implementation starts without gradients.
Error: against float64 autograd on the same values of h and W: the largest of the log-probs' in nats, and
|difference| / |gradient| of dW and dh.
"""

import contextlib
import ctypes
import functools
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

PLAIN, TRL, OURS = "log_softmax + gather", "TRL ChunkedLogProb", "ours, default"
SLOW = 20.0  # seconds: what takes longer on a CPU gets a single run


@dataclass
class Args:
    tokens: int = 2048  # N
    hidden: int = 256  # H
    vocabulary: int = 32000  # V
    dtype: Literal["float32", "bfloat16"] = "float32"  # of h and W
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    repeats: int = 5  # timed runs of each implementation
    threads: int = 1  # of torch, on a CPU
    seed: int = 0  # of h, W, y and the upstream gradient
    output: str = ""  # also write the table here, as JSON


# ---- Implementations: (h, W, y) -> log-probs (N,) ----


def pick(logp, y):
    return logp.gather(-1, y[:, None]).squeeze(-1)


def implementations(dtype: torch.dtype) -> dict:
    """Name to function, or to a line that says why there is none."""
    rows = {PLAIN: lambda h, W, y: pick(F.log_softmax(h @ W.T, -1), y)}
    if dtype != torch.float32:
        rows["gather on logits.float()"] = lambda h, W, y: pick(F.log_softmax((h @ W.T).float(), -1), y)

    def gather_lse(h, W, y):
        z = h @ W.T
        return pick(z, y) - z.logsumexp(-1)

    rows["gather - logsumexp"] = gather_lse
    if hasattr(F, "linear_cross_entropy"):
        # without options torch forms all logits, like the first row; with them it takes chunks of rows
        options = torch.nn.LinearCrossEntropyOptions()
        rows["linear_cross_entropy"] = lambda h, W, y: -F.linear_cross_entropy(
            h, W, y, reduction="none", options=options)
    else:
        rows["linear_cross_entropy"] = f"not in torch {torch.__version__} (2.13 has it)"
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
    """(h, W, y, upstream gradient), all from one generator on the CPU, so the same on every device."""
    generator = torch.Generator().manual_seed(args.seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    dtype = getattr(torch, args.dtype)
    h = normal(args.tokens, args.hidden).to(dtype)
    W = (normal(args.vocabulary, args.hidden) * 4 / args.hidden**0.5).to(dtype)
    g = normal(args.tokens)
    h, W, y = h.to(device), W.to(device), []
    for chunk in h.split(256):  # y ~ softmax(z) = argmax of z + Gumbel noise
        z = chunk.float() @ W.float().T
        y.append((z - normal(*z.shape).exponential_(generator=generator).log_().to(device)).argmax(-1))
    return h.requires_grad_(), W.requires_grad_(), torch.cat(y), g.to(device)


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


def clock(device: str, threads: int):
    """A context manager whose value holds the seconds spent inside, once it is left."""

    @contextlib.contextmanager
    def cuda():
        start, end, seconds = (torch.cuda.Event(enable_timing=True) for _ in "se"), None, []
        start, end = start
        torch.cuda.synchronize()
        start.record()
        yield seconds
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)

    @contextlib.contextmanager
    def cpu():
        now, seconds = time.process_time if threads == 1 else time.perf_counter, []
        start = now()
        yield seconds
        seconds.append(now() - start)

    return cuda if device == "cuda" else cpu


def resident(key: str) -> int:
    """VmRSS, or its peak VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


class Peak:
    """`with Peak(device) as peak`: peak.bytes is then the peak above the start, None if unknown here."""

    def __init__(self, device: str):
        self.cuda, self.bytes = device == "cuda", None

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else memory freed before, but not given back, would hide a peak
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = resident("VmRSS")
        except (OSError, AttributeError, TypeError):  # not Linux with glibc
            self.start = None
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        elif self.start is not None:
            self.bytes = resident("VmHWM") - self.start


def measure(args: Args, device: str) -> list[dict]:
    """One row of figures for each implementation."""
    h, W, y, g = inputs(args, device)
    truth, timer = reference(h, W, y, g), clock(device, args.threads)
    table, timed = {}, {}

    def full(function):
        logprobs = function(h, W, y)
        return logprobs.detach(), *torch.autograd.grad(logprobs, (W, h), g.to(logprobs.dtype))

    def forward(function):
        with torch.no_grad():
            return function(h, W, y)

    for name, function in implementations(h.dtype).items():
        row = table[name] = {"implementation": name, "note": "", "full": [], "forward": []}
        if not callable(function):
            row["note"] = function
            continue
        function(h[:64], W, y[:64]).sum().backward()  # what is imported, compiled or allocated only once
        h.grad = W.grad = None
        try:
            with Peak(device) as peak, timer() as seconds:  # and the warm-up at full size
                result = full(function)
            row["bytes"] = peak.bytes
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
            continue
        error = lambda x, want: ((x - want).norm() / want.norm()).item()  # float64, as `want` is
        row["logprob_error"] = (result[0] - truth[0]).abs().max().item()
        row["dW_error"], row["dh_error"] = map(error, result[1:], truth[1:])
        del result
        if device == "cpu" and seconds[0] > SLOW:
            row["note"] = "slow: a single run"
            row["full"] = seconds
            with timer() as row["forward"]:
                forward(function)
        else:
            timed[name] = function
    for turn in range(args.repeats):
        for name in list(timed)[:: -1 if turn % 2 else 1]:
            for kind, run in (("full", full), ("forward", forward)):
                with timer() as seconds:
                    run(timed[name])
                table[name][kind] += seconds
    return list(table.values())


# ---- Report ----


def ratio(rows: dict, key: str, name: str, base: str) -> float:
    """Figure of `name` / figure of `base`, medians of times; NaN if one of them is missing."""
    values = [rows[x].get(key) for x in (name, base)]
    values = [statistics.median(x) if x and isinstance(x, list) else x for x in values]
    return values[0] / values[1] if all(values) else float("nan")


def report(rows: dict) -> None:
    number = lambda x, form: "-" if x is None or x != x else format(x, form)
    print(f"{'':25}{'forward + backward':^34}|{'forward':^8}|{'peak extra memory':^24}|{'error':^26}\n"
          f"{'':25}{'ms':>7}{'min':>7}{'/gather':>10}{'/TRL':>7}   |{'ms':>6}  |{'MiB':>7}{'/gather':>10}"
          f"{'/TRL':>6} |{'log-prob':>9}{'dW':>8}{'dh':>8}")
    for name, row in rows.items():
        if not row["full"]:
            print(f"{name:25}{row['note']}")
            continue
        ms = [1e3 * f(row[kind]) for kind, f in
              (("full", statistics.median), ("full", min), ("forward", statistics.median))]
        figures = [ratio(rows, key, name, base) for key in ("full", "bytes") for base in (PLAIN, TRL)]
        mib = None if row["bytes"] is None else row["bytes"] / 2**20
        print(f"{name:25}{ms[0]:7.0f}{ms[1]:7.0f}{number(figures[0], '10.2f'):>10}{number(figures[1], '7.2f'):>7}"
              f"   |{ms[2]:6.0f}  |{number(mib, '7.0f'):>7}{number(figures[2], '10.2f'):>10}"
              f"{number(figures[3], '6.2f'):>6} |{row['logprob_error']:9.1e}{row['dW_error']:8.1e}"
              f"{row['dh_error']:8.1e}  {row['note']}")


def checks(rows: dict) -> list[str]:
    """The targets, beside what was measured. Speed against TRL is TRL's time / ours."""
    memory = lambda base: ratio(rows, "bytes", OURS, base)
    return [f"default vs TRL: time ratio {ratio(rows, 'full', TRL, OURS):.2f} (target >= 2.5), "
            f"memory ratio {memory(TRL):.2f} (target <= 0.2)",
            f"default vs plain gather: time ratio {ratio(rows, 'full', OURS, PLAIN):.2f} (target <= 1.0), "
            f"memory ratio {memory(PLAIN):.2f} (target <= 0.5)"]


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
    print(f"N {args.tokens}, H {args.hidden}, V {args.vocabulary}, {args.dtype} on {machine.get('gpu', machine['cpu'])} "
          f"({machine['cores']} cores, {args.threads} threads), "
          + ", ".join(f"{k} {v or '-'}" for k, v in versions.items()), flush=True)
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
