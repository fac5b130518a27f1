"""benchmarks/scaling.py: what it counts, its formula, and the figures that benchmarks/README.md shows of it."""

import json

import pytest
import scaling
import torch
from conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name, passes", [("all_reduce", 2), ("all_gather_single", 1), ("reduce_scatter_single", 1)])
def test_bytes_of_a_collective_in_a_ring(monkeypatch, name, passes):
    """Of the largest tensor, which is whole, each rank sends all but its own N-th, once a pass."""
    for each in ("all_reduce", "all_gather_single", "reduce_scatter_single"):
        monkeypatch.setattr(torch.distributed, each, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    counts = {}
    scaling.count_bytes(counts)
    getattr(torch.distributed, name)(torch.zeros(12), torch.zeros(3), group=None)
    assert counts == {name: passes * 3 / 4 * 12 * 4}


def test_formula_by_hand():
    assert scaling.formula(10, 1, True, 7) == 0
    assert scaling.formula(10, 2, False, 7) == 40  # half of 40 bytes there, and half back
    assert scaling.formula(10, 4, True, 2) == 3 * 2 * 0.75 * 40


def test_counted_bytes_are_those_of_the_formula():
    """Sharded, one layer's group less: its weights are still whole when the backward pass begins."""
    runs = json.loads((RESULTS / "scaling.json").read_text())["runs"]
    assert [(run["ranks"], run["shard"]) for run in runs] == [(1, False), (2, False), (2, True)]
    for run in runs:
        assert run["bytes"] == pytest.approx(run["formula"], rel=0.02)
        label = f"{run['ranks']}, `--shard`" if run["shard"] else f"{run['ranks']}"
        assert f"| {label} | {run['parameters']:,} | {run['seconds']:.2f} | {run['bytes'] / 1e6:.2f} | " \
               f"{run['formula'] / 1e6:.2f} |" in README
