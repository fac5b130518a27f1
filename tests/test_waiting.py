"""How often a step would wait for a GPU: seen on a CPU by what reads numbers of tensors, or needs them for a shape. And
how tensors get to a GPU.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from common import encode, load_comparisons, pad, to_device, to_floats
from conftest import ROOT
from tiny_runs import STEPWISE, scripts, write
from torch.utils._python_dispatch import TorchDispatchMode

import common

READS = "_local_scalar_dense is_nonzero equal nonzero masked_select bincount _unique2 unique_dim".split()
ON_THE_CPU = "micro_batches"  # reads lengths of a batch that is on the CPU in any case
SIZES_OF_ROWS = "sequence_logprobs", "token_values", "states", "__init__"  # depend on a mask, and Rows on the tokens


def reader() -> str:
    """The function of the scripts or of common.py that runs."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).parent == ROOT and not code.co_name.startswith("<"):
            return code.co_name
        frame = frame.f_back
    return "elsewhere"


class Reads(TorchDispatchMode):
    """Counts in `.counts`, by the function that asks, what would wait if all tensors were on a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def count(*inputs, **options):
            self.counts[reader()] += 1
            return method(*inputs, **options)

        return count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket is torch.ops.aten.index else []
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        if by_mask or func.overloadpacket.__name__ in READS:
            self.counts[reader()] += 1
        return func(*args, **(kwargs or {}))


def eight_rows(script, starts) -> str:
    return str(starts / f"{script.name}_short.jsonl")


def test_a_step_does_not_wait_for_each_micro_batch(script, go, starts, monkeypatch):
    """Two steps or updates. As many reads with micro-batches of 1 as of 4: one for the metrics of a step, an update or an evaluation."""
    counts = {}
    flags = {"update_epochs": 1, "total_episodes": 16} if script.is_sampler else {"dataset": eight_rows(script, starts)}
    for micro in (4, 1):
        with monkeypatch.context() as patch, Reads(patch) as reads:
            patch.setattr(common, "self_test", common.self_test.__wrapped__)
            go(f"micro {micro}", batch_size=4, micro_batch_size=micro, **flags)
        counts[micro] = reads.counts
        for function in (ON_THE_CPU, *SIZES_OF_ROWS, "shuffled"):  # what `shuffled` gives is kept
            del reads.counts[function]
    assert counts[4] == counts[1]
    evaluations = 0 if script.is_sampler or script.module.__name__ == "reward_model" else 2
    assert counts[4]["to_floats"] == 2 + evaluations
    assert counts[4]["forward"] == 0


class OnTheCpu:
    """A tensor that tells what is done with it."""

    def __init__(self, done=()):
        self.done = done

    def pin_memory(self):
        return OnTheCpu((*self.done, "pinned"))

    def to(self, device, non_blocking=False):
        return (*self.done, str(device), non_blocking)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_tensors_are_sent_to_a_gpu_from_pinned_memory_without_a_wait(device):
    assert to_device(OnTheCpu(), device) == ("pinned", str(device), True)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_on_the_cpu_nothing_is_copied(device):
    x = torch.ones(3)
    assert to_device(x, device) is x
    assert pad([[1, 2], [3]], device).tolist() == [[1, 2], [3, 0]]


def test_metrics_become_floats_and_others_stay():
    metrics = {"a": torch.tensor(0.1), "b": torch.tensor(3), "c": 5, "d": 0.25, "e": torch.tensor(0.1).double()}
    got = to_floats({name: metrics[name] for name in "ab"}, {name: metrics[name] for name in "cde"})
    assert set(got) == set(metrics) and not any(map(torch.is_tensor, got.values()))
    assert got["a"] == metrics["a"].item() and got["b"] == 3.0 and got["e"] == metrics["e"].item()
    assert got["c"] == 5 and type(got["c"]) is int and got["d"] == 0.25
    assert to_floats(metrics, {}) == {**got, "c": 5.0} and to_floats({"a": 0.5}, {"c": 5}) == {"a": 0.5, "c": 5}


@scripts(*STEPWISE)
def test_rows_of_a_step_are_ordered_by_length(script, go, training_rows, tmp_path):
    """The shortest first, over all micro-batches of a step, so that those of a micro-batch are of like length."""
    rows = script.rows(0, 16)
    for i, row in enumerate(rows):
        words = [" ".join(["very"] * (5 * i % 16 + k + 1)) for k in range(len(row.get("completions", script.sides)))]
        row |= {"completions": words} if "completions" in row else dict(zip(script.sides, words))
    path = write(tmp_path / "lengths.jsonl", rows)
    go("run", dataset=path, eval_dataset=path, batch_size=8, micro_batch_size=2)
    steps = [sum(training_rows[i : i + 4], []) for i in (0, 4)]
    for step in steps:
        lengths = [max(ids.count(",") for ids in re.findall(r"\[[\d, ]+\]", row)) for row in step]
        assert len(lengths) == 8 and lengths == sorted(lengths) and len(set(lengths)) > 4


def test_a_prompt_is_tokenized_once(bpe_tokenizer, monkeypatch):
    """And so is a text that several rows have: both sides of a pair, completions of a prompt."""
    seen, call = [], type(bpe_tokenizer).__call__

    def record(self, texts, **options):
        seen.extend([texts] if isinstance(texts, str) else texts)
        return call(self, texts, **options)

    rows = [{"prompt": f"the hero {i}", "chosen": " was good", "rejected": " was bad", "_where": f"x:{i}"}
            for i in range(1200)]
    flat = [{"prompt": row["prompt"], "completion": row["chosen"], "_where": "x"} for row in rows]
    want = encode(bpe_tokenizer, flat[:3] + flat[-3:], [2], 99)
    monkeypatch.setattr(type(bpe_tokenizer), "__call__", record)
    pairs = load_comparisons(bpe_tokenizer, rows, [2], 99)
    assert [chosen for (chosen, _), *_ in pairs[:3] + pairs[-3:]] == want and len(pairs) == 1200
    assert all(seen.count(row["prompt"]) == 1 for row in rows[::100])
    assert seen.count("\n was good") == seen.count("\n was bad") == 1
