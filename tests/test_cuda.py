"""The branches for CUDA on a machine without it: which device and which dtype are chosen, and the arithmetic of 16-bit
operands with fp32 products, on tensors that only say that they are on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from common import device_of, token_logprobs


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU; so does all that is made of it."""

    is_cuda = True


@pytest.fixture
def products(monkeypatch):
    """The (dtype of the operands, dtype of the result) of all products of 16-bit matrices. A GPU's have the exact
    sums of fp32 for operands of 16 bits; the CPU knows no `out_dtype`.
    """
    seen, mm = [], torch.mm

    def exact(a, b, out_dtype=None):
        assert a.dtype == b.dtype == torch.bfloat16
        seen.append((a.dtype, out_dtype or a.dtype))
        return mm(a.double(), b.double()).to(out_dtype or a.dtype)

    monkeypatch.setattr(torch, "mm", exact)
    return seen


@pytest.mark.parametrize("available, device, dtype, want, bfloat16", [
    (True, "auto", "auto", "cuda", True), (True, "auto", "float32", "cuda", False),
    (True, "auto", "bfloat16", "cuda", True), (True, "cuda", "auto", "cuda", True),
    (True, "cpu", "auto", "cpu", False), (True, "cpu", "bfloat16", "cpu", True),
    (False, "auto", "auto", "cpu", False), (False, "auto", "bfloat16", "cpu", True)])  # fmt: skip
def test_device_and_dtype(monkeypatch, available, device, dtype, want, bfloat16):
    """auto is CUDA where there is one, and bf16 there; each can be chosen."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: asked.append((kind, dtype, enabled)))
    found, autocast = device_of(SimpleNamespace(device=device, dtype=dtype))
    autocast()
    assert found == torch.device(want) and asked == [(want, torch.bfloat16, bfloat16)]


def operands(N=300, H=24, V=40):
    """hidden (N, H), weight (V, H), in bf16, of targets (N,), upstream gradients of log-probs and entropies (N,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).bfloat16() for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, *torch.randn(2, N, generator=generator)


HEAD = {"scale": 0.5, "softcap": 4.0, "temperature": 0.7}


def reference(hidden, weight, targets, g, g_entropy, bias):
    """Log-probs, entropies and gradients by autograd in float64 on the same 16-bit operands."""
    inputs = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    h, W, b = inputs
    logp = torch.log_softmax(4.0 * torch.tanh(0.5 * (h @ W.T + b) / 4.0) / 0.7, -1)
    entropies, logprobs = -(logp.exp() * logp).sum(-1), logp.gather(-1, targets[:, None]).squeeze(-1)
    (g.double() @ logprobs + g_entropy.double() @ entropies).backward()
    return logprobs.detach(), entropies.detach(), [x.grad for x in inputs]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [None, 64])
def test_16_bit_operands_give_fp32_logprobs(products, keep, rows):
    """In one product or in chunks, kept or computed again: as exact as of fp32 weights; gradients to the digits of
    bf16, in which they are multiplied.
    """
    hidden, weight, targets, g, g_entropy = operands()
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1))
    want, want_entropy, gradients = reference(hidden, weight, targets, g, g_entropy, bias)
    bias.requires_grad_()
    hidden, weight = (x.as_subclass(OnCuda).requires_grad_() for x in (hidden, weight))
    logprobs, entropies = token_logprobs(hidden, weight, targets, bias, entropy=True, rows=rows, keep=keep, **HEAD)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert (logprobs - want).abs().max() < 2e-5 and (entropies - want_entropy).abs().max() < 2e-5
    chunks = 1 if rows is None else 5
    assert products == [(torch.bfloat16, torch.float32)] * chunks
    (g @ logprobs + g_entropy @ entropies).backward()
    for x, gradient in zip((hidden, weight, bias), gradients):
        assert (x.grad - gradient).norm() < 0.01 * gradient.norm()
    assert weight.grad.dtype == torch.bfloat16 and set(products) == {(torch.bfloat16, torch.float32)}
