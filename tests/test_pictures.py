"""benchmarks/pictures.py draws what benchmarks/results/frontier.json holds, and its commands exist."""

import importlib
import json
import shlex

import pytest
import torch
import tyro
from bandit_bt import optimum
from conftest import ROOT
from frontier import tilted
from pictures import METHODS, draw_frontier, draw_pipeline

RESULT = json.loads((ROOT / "benchmarks" / "results" / "frontier.json").read_text())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_commands_make_the_folders(method):
    script, *flags = shlex.split(method.command)
    args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
    assert args.output_dir == method.folder


def test_points_are_below_the_curve_and_fractions_are_those_of_the_gain():
    start = RESULT["reference_reward"]
    for method in METHODS:
        point = RESULT["policies"][method.label]
        assert start < point["reward"] < point["frontier"]
        assert point["fraction"] == pytest.approx((point["reward"] - start) / (point["frontier"] - start))
    for _, reward, divergence, _ in RESULT["frontier"]:
        assert reward > start and divergence > 0


def test_the_curve_is_that_of_the_exact_optimum():
    """Samples in exactly pi_ref's proportions, of two prompts; equal rewards cost no KL and keep every sample."""
    counts = torch.tensor([5, 3, 2])
    rewards = torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.0, -0.5]], dtype=torch.float64)
    log_ref = (counts.double() / 10).log()
    for beta in (0.3, 1.0, 5.0):
        best = [optimum(r, log_ref, beta) for r in rewards]
        want_reward = sum((p.exp() * r).sum() for p, r in zip(best, rewards)) / 2
        want_kl = sum((p.exp() * (p - log_ref)).sum() for p in best) / 2
        reward, divergence, _ = tilted(rewards.repeat_interleave(counts, dim=1), beta)
        assert reward == pytest.approx(want_reward.item(), abs=1e-12)
        assert divergence == pytest.approx(want_kl.item(), abs=1e-12)
    assert tilted(torch.ones(2, 10, dtype=torch.float64), 0.5) == pytest.approx((1.0, 0.0, 10.0), abs=1e-12)


def test_pictures_are_drawn_without_a_warning(tmp_path, recwarn):
    pytest.importorskip("matplotlib").use("Agg")
    draw_pipeline(tmp_path / "pipeline.png")
    draw_frontier(tmp_path / "frontier.png", RESULT)
    for name in ("pipeline.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list
