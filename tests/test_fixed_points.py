"""benchmarks/fixed_points.py: grpo_loss, in expectation over all responses, ends where theory says."""

import math

import grpo
import pytest
import torch
from bandit_bt import forward_kl_optimum
from common import kl_estimate
from fixed_points import PROBLEMS, expected_loss, measure, random_problem, table_logprobs

ONE, THREE = PROBLEMS.values()
BETA = 0.5


@pytest.mark.parametrize("kl_in, estimator", [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_one_token(kl_in, estimator):
    """k1 in the reward and k2 end at pi*; k3 in the loss at beta pi_ref / (lambda - r), far from it."""
    row = measure(*ONE, 1, BETA, (kl_in, estimator, "token"))
    assert row["distance_to_prediction"] < 1e-4 and row["gradient_norm"] < 1e-10
    assert row["beta_kl"] == pytest.approx(row["J_lost"], abs=1e-12)
    if estimator == "k3":  # the negative control: pi* is not where this one ends
        assert row["distance_to_optimal"] > 1 and row["share_lost"] > 0.3
    else:
        assert row["distance_to_optimal"] < 1e-4


@pytest.mark.parametrize(
    "row, distance, share",
    [
        (("reward", "k1", "token"), 0.0, 0.0),
        (("loss", "k2", "sequence"), 0.0, 0.0),
        (("loss", "k2", "token"), 0.99, 0.076),
        (("loss", "k3", "token"), 5.4, 0.157),
        (("loss", "k3", "sequence"), 6.2, 1.41),
    ],
)
def test_three_tokens(row, distance, share):
    """A KL per token in the loss ends elsewhere than at pi*, as the backward recursion has it."""
    result = measure(*THREE, 1, BETA, row)
    assert result["distance_to_prediction"] < 1e-4
    assert result["distance_to_optimal"] == pytest.approx(distance, rel=0.02, abs=1e-4)
    assert result["share_lost"] == pytest.approx(share, rel=0.02, abs=1e-8)
    assert result["beta_kl"] == pytest.approx(result["J_lost"], abs=1e-12)


def test_k1_in_the_loss_has_no_gradient():
    row = measure(*THREE, 1, BETA, ("loss", "k1", "token"))
    assert row["kl_gradient"] < 1e-12 < row["gradient_norm"] and math.isinf(row["distance_to_optimal"])
    assert row["beta_kl"] == pytest.approx(row["J_lost"], abs=1e-12)


def test_a_reversed_k3_is_noticed(monkeypatch):
    """The control of the prediction: with policy and reference exchanged in k3, grpo_loss ends elsewhere."""
    wrong = lambda logprobs, ref, kind: kl_estimate(ref, logprobs, kind)
    monkeypatch.setattr(grpo, "kl_estimate", wrong)
    assert measure(*ONE, 1, BETA, ("loss", "k3", "token"))["distance_to_prediction"] > 0.1


def test_gradient_descent_ends_there_too():
    """The fixed point attracts: Adam from pi_ref, without any Jacobian, comes to it."""
    rewards, ref = random_problem(*ONE, 1)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        expected_loss(logits, logits.detach(), ref, rewards, *ONE, BETA, "loss", "k3", "token").backward()
        optimizer.step()
        schedule.step()
    logp, want = logits.detach().log_softmax(-1), forward_kl_optimum(rewards, ref.log_softmax(-1), BETA)
    assert want.exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert (logp - want).abs().max() < 1e-4


def test_k2_is_k3_times_the_ratio():
    """On samples of pi, at each token: how TRL's use_bias_correction_kl is --kl-estimator k2."""
    _, ref = random_problem(*THREE, 1)
    logits = (ref * 0.3).requires_grad_()
    logp, ref = table_logprobs(logits, *THREE), table_logprobs(ref, *THREE)
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = (logp - logp.detach()).exp()
    gradients = [torch.autograd.grad((noise * kl).sum(), logits, retain_graph=True)[0]
                 for kl in (ratio * kl_estimate(logp, ref, "k3"), kl_estimate(logp, ref, "k2"))]  # fmt: skip
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12 < gradients[0].abs().max()
