"""Claims of the lectures that no test of a script states: tests/README.md has the whole map."""

import math

import dpo
import pytest
import torch
from bandit_bt import kl, optimum
from conftest import noise
from frontier import tilted
from tiny_runs import DATA, SCRIPTS, head

import common


def test_the_sign_of_the_implicit_reward():
    """beta log(pi / pi_ref) is positive where the policy likes a response more than the reference does."""
    logps, ref = -noise(40, seed=1).abs(), -noise(40, seed=2).abs()
    _, chosen, rejected = dpo.dpo_loss(logps, ref, ref, logps, beta=0.3)
    assert torch.equal(chosen > 0, logps.exp() > ref.exp()) and 0 < (chosen > 0).sum() < 40
    assert torch.equal(rejected, -chosen)


def test_each_class_has_one_representative():
    """Of all r + f(x) one is beta log(pi / pi_ref) of a policy: r - beta log Z, for which Z = 1. That policy is pi*."""
    rewards, log_ref, beta = noise(7, seed=3), torch.log_softmax(noise(7, seed=4), 0), 0.4
    found = []
    for shift in (0.0, -2.5, 11.0):
        log_z = (log_ref + (rewards + shift) / beta).logsumexp(0)
        found.append(rewards + shift - beta * log_z)
        assert (log_ref + found[-1] / beta).logsumexp(0).abs() < 1e-12
        log_star = optimum(rewards + shift, log_ref, beta)
        assert torch.allclose(found[-1], beta * (log_star - log_ref), rtol=0, atol=1e-12)
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_z_is_a_mean_over_samples(beta):
    """The frontier from samples of pi_ref is worth beta log Z, Z = mean of exp(r / beta), at each prompt's own Z."""
    rewards = noise(3, 500, seed=5)
    reward, divergence, _ = tilted(rewards, beta)
    log_z = [math.log(sum(math.exp(r / beta) for r in row) / len(row)) for row in rewards.tolist()]
    assert reward - beta * divergence == pytest.approx(beta * sum(log_z) / 3, abs=1e-12)


def test_k3_is_unbiased_on_its_own_samples_only():
    """Its mean under pi is KL(pi || pi_ref); under another policy, as the one that sampled, it is not."""
    log_pi, log_ref, log_old = (torch.log_softmax(noise(6, seed=seed), 0) for seed in (6, 7, 8))
    k3 = common.kl_estimate(log_pi, log_ref, "k3")
    want = kl(log_pi, log_ref)
    assert (log_pi.exp() * k3).sum().item() == pytest.approx(want, abs=1e-12)
    assert abs((log_old.exp() * k3).sum().item() - want) > 0.1
    ratio = (log_pi - log_old).exp()  # which makes the mean right again
    assert (log_old.exp() * ratio * k3).sum().item() == pytest.approx(want, abs=1e-12)


def test_imitation_raises_what_was_rejected_too(starts):
    """Two steps of SFT: chosen and rejected sides of held-out pairs both get likelier, in nearly the same measure."""
    args = SCRIPTS["dpo"].module.Args(device="cpu")
    device, autocast = common.device_of(args)
    gains = []
    for path in (DATA / "model", starts / "run1" / "model"):
        model, tokenizer, eos_ids = common.load_model(str(path), args, device)
        rows = [{**row, "_where": ""} for row in head("preferences", 0, 40)]
        pairs = common.load_comparisons(tokenizer, rows, eos_ids, 512)
        gains.append(dpo.reference_logps(model, pairs, args, autocast).mean(0))
    chosen, rejected = (gains[1] - gains[0]).tolist()
    assert chosen > 3 and rejected > 3
    assert abs(chosen - rejected) < 0.2 * chosen
