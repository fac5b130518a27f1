"""Our losses against another implementation, the package polgrad: values and gradients in float64 on ragged rows.
Skipped where it is not installed (pip install polgrad). It has no DPO and no reward models.
"""

import pytest
import torch
from common import kl_estimate, masked_whiten
from conftest import LENGTHS, MASK, noise

import grpo
import ppo

polgrad = pytest.importorskip("polgrad", reason="polgrad is not installed (pip install polgrad)")

MEANS = {"grpo": polgrad.Aggregation.SEQ_MEAN_TOKEN_MEAN, "dapo": polgrad.Aggregation.TOKEN_MEAN,
         "dr_grpo": polgrad.Aggregation.TOKEN_SUM_NORM}  # fmt: skip
BUDGET = 16  # --max-new-tokens


def inputs_of(shape=MASK.shape):
    """log-probs with a gradient, old and reference ones, 0.25 and 0.5 nats apart from them, (B, T) each."""
    logprobs = noise(*shape, seed=1) - 2
    old = logprobs + 0.25 * noise(*shape, seed=2)
    return logprobs.requires_grad_(), old, logprobs.detach() + 0.5 * noise(*shape, seed=3)


def same(ours, theirs, x):
    """Both scalars, and their gradients in x, to 1e-12."""
    gradients = [torch.autograd.grad(value, x)[0] for value in (ours, theirs)]
    assert ours.dtype == theirs.dtype == torch.float64 and gradients[0].norm() > 1e-3
    assert abs(ours - theirs) < 1e-12 and (gradients[0] - gradients[1]).abs().max() < 1e-12


def policy_loss(loss_type, low, high, estimator="", kl_coef=0.0):
    """Their loss, as a function of (log-probs, old ones, reference's, advantages)."""
    kl = polgrad.KLLossConfig(kind=polgrad.KLEstimator(estimator), coef=kl_coef) if estimator else None
    config = polgrad.PolicyLossConfig(
        ratio=polgrad.RatioKind.TOKEN, surrogate=polgrad.SurrogateKind.PG_CLIP, kl=kl,
        clip=polgrad.ClipConfig(eps_low=low, eps_high=high), aggregation=MEANS[loss_type], norm_len=BUDGET)  # fmt: skip

    def loss(logprobs, old, ref, advantages):
        return polgrad.policy_loss(config, logprobs=logprobs, old_logprobs=old, ref_logprobs=ref,
                                   advantages=advantages, response_mask=MASK)  # fmt: skip

    return loss


@pytest.mark.parametrize("estimator", ["", "k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type, low, high", [
    ("grpo", 0.2, 0.2), ("dapo", 0.2, 0.28), ("dr_grpo", 0.2, 0.2)])  # fmt: skip
def test_losses_of_groups(loss_type, low, high, estimator):
    """GRPO, DAPO and Dr. GRPO with and without a KL in the loss, and where the clip decides."""
    inputs, advantages = inputs_of(), noise(4, seed=4)
    kl_coef = 0.3 if estimator else 0.0
    losses, clipped = grpo.grpo_loss(*inputs, advantages, MASK, kl_coef, estimator or "k3", low, high)
    ours = (losses * grpo.token_weights(MASK, loss_type, BUDGET)).sum()
    theirs = policy_loss(loss_type, low, high, estimator, kl_coef)(*inputs, advantages)
    same(ours, theirs.loss, inputs[0])
    assert torch.equal(clipped, theirs.clipped_low | theirs.clipped_high) and 0 < clipped.sum() < sum(LENGTHS)


def test_loss_of_ppo():
    (logprobs, old, _), advantages = inputs_of(), noise(*MASK.shape, seed=4)
    losses, ratio = ppo.ppo_loss(logprobs, old, advantages, MASK, 0.2)
    theirs = policy_loss("dapo", 0.2, 0.2)(logprobs, old, None, advantages)
    same(losses.sum() / MASK.sum(), theirs.loss, logprobs)
    assert (ratio - theirs.ratio).abs().max() < 1e-12


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_loss_of_values(clip):
    values, old, returns = inputs_of()
    losses, clipped = ppo.value_loss(values, old, returns, MASK, clip)
    theirs = polgrad.value_loss(values, old, returns, MASK, clip_eps=clip or None, aggregation=MEANS["dapo"])
    same(losses.sum() / MASK.sum(), theirs.loss, values)
    assert clipped.sum() / MASK.sum() == pytest.approx(theirs.clipped_frac)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_rewards_and_advantages_of_tokens(gamma, gae_lambda):
    """The KL in the reward, the score at the last token, and GAE."""
    (logprobs, _, ref), values = inputs_of(), noise(*MASK.shape, seed=5)
    scores = noise(4, seed=6)
    ours = ppo.token_rewards(scores, logprobs.detach(), ref, MASK, 0.3)
    given = torch.zeros(MASK.shape).double()
    for row, (length, score) in enumerate(zip(LENGTHS, scores)):
        given[row, length - 1] = score
    theirs = polgrad.kl_in_reward(given, logprobs, ref, polgrad.KLEstimator.K1, 0.3, response_mask=MASK)
    assert (ours - theirs).abs().max() < 1e-12
    config = polgrad.GAEConfig(gamma=gamma, lam=gae_lambda)
    pairs = zip(ppo.gae(ours, values, MASK, gamma, gae_lambda),
                polgrad.gae(ours, values, config=config, response_mask=MASK))  # fmt: skip
    assert all((x - y).abs().max() < 1e-12 for x, y in pairs)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_of_groups(scale):
    rewards, groups = noise(3, 5, seed=7), torch.arange(3).repeat_interleave(5)
    config = polgrad.GroupNormConfig(scale="std" if scale == "group" else "none")
    theirs = polgrad.grpo_advantages(rewards.flatten(), groups, config).view(3, 5)
    assert (grpo.group_advantages(rewards, scale_rewards=scale) - theirs).abs().max() < 1e-12
    theirs = polgrad.rloo_advantages(rewards.flatten(), groups).view(3, 5)
    assert (grpo.group_advantages(rewards, "leave_one_out", "none") - theirs).abs().max() < 1e-12


def test_whitened_advantages():
    """Theirs by n - 1, with 1e-8 behind the variance in place of the deviation."""
    x, n = noise(*MASK.shape, seed=8), sum(LENGTHS)
    theirs = polgrad.whiten(x, MASK, eps=0.0) * (n / (n - 1)) ** 0.5
    assert (masked_whiten(x, MASK) - theirs).abs().max() < 1e-7
    assert theirs[MASK].square().mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_of_the_kl(estimator):
    logprobs, _, ref = inputs_of()
    ours = torch.where(MASK, kl_estimate(logprobs, ref, estimator), 0.0)
    theirs = polgrad.kl_estimate(logprobs, ref, polgrad.KLEstimator(estimator), response_mask=MASK)
    assert (ours - theirs).abs().max() < 1e-12
    same(ours.sum(), theirs.sum(), logprobs)
