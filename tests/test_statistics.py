"""KL estimators by enumeration in float64, the exact KL, and masked statistics under poisoned padding."""

import math

import pytest
import torch
from common import head_of, kl_estimate, masked_mean, masked_whiten, sample
from conftest import VOCABULARY, make_model, ragged_rows
from frontier import exact_kl, kl_to
from sft import collate

K = 5


def categorical(seed):
    generator = torch.Generator().manual_seed(seed)
    return (1.3 * torch.randn(K, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def policies():
    """Logits of pi and of ref, log pi, log ref; pi differs from ref and the KL is not symmetric."""
    theta, phi = categorical(0), categorical(1)
    return theta, torch.log_softmax(theta, -1), torch.log_softmax(phi.detach(), -1)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def close(a, b, tolerance=1e-12):
    return (a - b).abs().max() < tolerance


def test_values_of_the_estimators(policies):
    _, p, q = policies
    for kind in ("k1", "k3"):
        assert close((p.exp() * kl_estimate(p, q, kind)).sum(), kl(p, q)), kind
    assert not close((p.exp() * kl_estimate(p, q, "k2")).sum(), kl(p, q), 1e-3)
    assert not close(kl(p, q), kl(q, p), 1e-3)  # so that a swap of the two would show
    assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()
    assert (kl_estimate(p, q, "k1") < 0).any()
    for kind in ("k1", "k2", "k3"):
        assert (kl_estimate(p, p, kind) == 0).all()


def test_gradients_in_the_loss(policies):
    """Samples do not depend on theta there: E over y ~ pi, detached, of the estimator's gradient."""
    theta, p, q = policies
    weight, reverse, forward = p.exp().detach(), gradient(kl(p, q), theta), gradient(kl(q, p), theta)
    in_loss = {kind: gradient((weight * kl_estimate(p, q, kind)).sum(), theta) for kind in ("k1", "k2", "k3")}
    assert close(in_loss["k1"], torch.zeros(K))
    assert close(in_loss["k2"], reverse)
    assert close(in_loss["k3"], forward) and not close(forward, reverse, 1e-2)
    old = torch.log_softmax(categorical(2).detach(), -1)  # with the ratio, off-policy too
    ratio = (p - old).exp()
    assert close(gradient((old.exp() * ratio * kl_estimate(p, q, "k3")).sum(), theta), reverse)
    assert close(gradient((old.exp() * ratio.detach() * kl_estimate(p, q, "k2")).sum(), theta), reverse)


def test_gradients_in_the_reward(policies):
    """The estimator, not differentiated, times grad log pi."""
    theta, p, q = policies
    weight, reverse = p.exp().detach(), gradient(kl(p, q), theta)
    in_reward = {
        k: gradient((weight * kl_estimate(p, q, k).detach() * p).sum(), theta) for k in ("k1", "k2", "k3")
    }
    assert close(in_reward["k1"], reverse)
    assert not close(in_reward["k2"], reverse, 1e-2) and not close(in_reward["k3"], reverse, 1e-2)


def test_k3_keeps_its_digits_and_unknown_kinds_raise():
    small = kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert small.item() == pytest.approx(1e-4**2 / 2 - 1e-4**3 / 6, rel=0.01)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_exact_kl_equals_enumeration(model):
    reference = make_model("gpt2", seed=7)
    input_ids, trained = collate(ragged_rows(), "cpu")
    hidden = [m.base_model(input_ids).last_hidden_state[trained] for m in (model, reference)]
    got = exact_kl(hidden[0], head_of(model), hidden[1], head_of(reference), temperature=0.7, rows=5)
    p, q = (torch.log_softmax(m(input_ids).logits[trained].double() / 0.7, -1) for m in (model, reference))
    assert (got - (p.exp() * (p - q)).sum(-1)).abs().max() < 1e-4 and got.min() > 0
    assert exact_kl(hidden[0], head_of(model), hidden[0], head_of(model)).abs().max() == 0


def test_exact_kl_is_fp32_whatever_the_weights_and_the_autocast():
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 9, 16, generator=generator).bfloat16()
    weight = 3 * torch.randn(40, 16, generator=generator).bfloat16()
    head = {"weight": weight, "bias": None, "scale": 1.0, "softcap": None}
    p, q = (torch.log_softmax(h.double() @ weight.double().T, -1) for h in (hidden, ref_hidden))
    want = (p.exp() * (p - q)).sum(-1)
    assert (exact_kl(hidden, head, ref_hidden, head) - want).abs().max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert (exact_kl(hidden, head, ref_hidden, head) - want).abs().max() < 1e-4


def test_exact_kl_of_a_forbidden_token_is_finite():
    """A token of probability 0 under both adds 0, not 0 (-inf + inf)."""
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 3, 8, generator=generator)
    weight, bias = torch.randn(6, 8, generator=generator), torch.zeros(6)
    bias[2] = -torch.inf
    head = {"weight": weight, "bias": bias, "scale": 1.0, "softcap": None}
    kept = [0, 1, 3, 4, 5]
    p, q = (torch.log_softmax(h.double() @ weight[kept].double().T, -1) for h in (hidden, ref_hidden))
    assert close(exact_kl(hidden, head, ref_hidden, head), (p.exp() * (p - q)).sum(-1), 1e-5)


def test_the_kl_along_a_response_is_the_sum_of_its_tokens(model):
    """Against a loop over the rows, with prompts and responses of all lengths, whatever the micro-batch."""
    reference = make_model("gpt2", seed=7)
    prompts = [[1, 5, 9], [1, 4, 7, 20, 33, 8, 11, 50], [1, 30]] * 4
    batch = sample(model, prompts, 12, list(range(2, VOCABULARY, 6)), seed=1)
    want = []
    for ids, mask in zip(batch["input_ids"], batch["mask"]):
        first, end = mask.nonzero()[0].item(), mask.nonzero()[-1].item() + 1
        p, q = (torch.log_softmax(m(ids[None, :end]).logits[0, first - 1 : end - 1].double(), -1) for m in (model, reference))
        want.append((p.exp() * (p - q)).sum())
    want = torch.stack(want)
    assert batch["mask"].sum(1).unique().numel() > 3 and want.min() > 0.1
    for size in (1, 5, 12):
        assert close(kl_to(model, reference, batch, size), want, 1e-4)
    assert kl_to(model, model, batch, 5).abs().max() == 0


def test_masked_mean_and_whiten_numbers():
    mask = torch.tensor([True, True, False])
    assert masked_mean(torch.tensor([1.0, 2.0, 99.0]), mask) == 1.5
    assert masked_mean(torch.tensor([1.0, 2.0, 99.0]), torch.zeros(3, dtype=torch.bool)) == 0
    x, mask = torch.tensor([[1.0, 2.0, 7.0], [3.0, 4.0, -9.0]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    want = torch.tensor([[-1.3416408, -0.4472136, 0.0], [0.4472136, 1.3416408, 0.0]])
    assert torch.allclose(masked_whiten(x, mask), want)
    assert (masked_whiten(torch.full((2, 3), 7.0), mask) == 0).all()  # no deviation, no division by 0


@pytest.mark.parametrize("poison", [1e4, torch.inf, -torch.inf, torch.nan])
def test_padding_reaches_neither_values_nor_gradients(poison):
    """Guard: pad poison. A mask that multiplies would give NaN."""
    generator = torch.Generator().manual_seed(0)
    clean, mask = (
        torch.randn(4, 16, generator=generator),
        torch.arange(16) < torch.tensor([16, 4, 8, 3])[:, None],
    )
    results = []
    for x in (clean.clone(), torch.where(mask, clean, poison)):
        x.requires_grad_()
        values = masked_mean(x, mask), masked_whiten(x, mask).square().mul(clean).nan_to_num().sum()
        sum(values).backward()
        results.append((*[v.detach() for v in values], x.grad[mask]))
        assert x.grad[~mask].abs().max() == 0
    for got, want in zip(*results):
        assert torch.isfinite(got).all() and torch.allclose(got, want, atol=1e-6)


def test_k3_survives_the_log_ratio_that_overflows():
    """Mask before the exponential: exp(100) is inf in fp32, and inf * 0 is NaN, forward and backward."""
    logprobs = torch.tensor([-1.0, -200.0], requires_grad=True)
    mask = torch.tensor([True, False])
    kept = torch.where(mask, logprobs, 0.0)
    value = masked_mean(kl_estimate(kept, torch.where(mask, torch.tensor([-1.5, -50.0]), 0.0), "k3"), mask)
    value.backward()
    assert value.item() == pytest.approx(math.exp(-0.5) - 1 + 0.5, rel=1e-5)
    assert logprobs.grad.isfinite().all() and logprobs.grad[1] == 0
