"""The branches for CUDA on a machine without it: which device and which dtype are chosen, and the arithmetic of 16-bit
operands with fp32 products, on tensors that only say that they are on a GPU.
"""

import contextlib
from types import SimpleNamespace

import common
import pytest
import torch
from common import device_of, sample, token_logprobs, use_rows
from conftest import make_model


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

    def exact_sum(total, a, b, out, out_dtype=None):
        assert out is total and total.dtype == (out_dtype or a.dtype)
        return out.add_(exact(a, b, out_dtype))

    monkeypatch.setattr(torch, "mm", exact)
    monkeypatch.setattr(torch, "addmm", exact_sum)
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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50 << 30, 80 << 30))
    monkeypatch.setitem(common.KEEP_BYTES, "cuda", 0)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: asked.append((kind, dtype, enabled)))
    found, autocast = device_of(SimpleNamespace(device=device, dtype=dtype))
    autocast()
    assert found == torch.device(want) and asked == [(want, torch.bfloat16, bfloat16)]
    assert common.KEEP_BYTES["cuda"] == (5 << 30 if want == "cuda" else 0)  # a tenth of what is free


def test_attention_is_not_planned_anew_for_each_shape():
    """cuDNN's kernels are, for a fifth of a second, and ragged micro-batches have a new shape each time."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device_of(SimpleNamespace(device="cpu", dtype="auto"))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def operands(N=300, H=24, V=40):
    """hidden (N, H), weight (V, H), in bf16, of targets (N,), upstream gradients of log-probs and entropies (N,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).bfloat16() for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, *torch.randn(2, N, generator=generator)


HEADS = {"plain": {"scale": 0.5, "temperature": 0.7}, "soft-capped": {"scale": 0.5, "softcap": 4.0, "temperature": 0.7}}


def reference(hidden, weight, bias, targets, g, g_entropy, softcap):
    """Log-probs, entropies and gradients by autograd in float64 on the same 16-bit operands."""
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    h, W, b = inputs
    z = 0.5 * (h @ W.T + b)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = torch.log_softmax(z / 0.7, -1)
    entropies, logprobs = -(logp.exp() * logp).sum(-1), logp.gather(-1, targets[:, None]).squeeze(-1)
    (g.double() @ logprobs + g_entropy.double() @ entropies).backward()
    return logprobs.detach(), entropies.detach(), [x.grad for x in inputs]


def relative(got, want):
    return (got - want).norm() / want.norm()


@pytest.mark.parametrize("trained", ["log-probs", "entropies too"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [None, 64])
def test_16_bit_operands_give_fp32_logprobs(products, keep, rows, head, trained):
    """In one product or in chunks, kept or computed again: as exact as of fp32 weights; gradients to the digits of
    bf16, in which they are multiplied.
    """
    hidden, weight, targets, g, g_entropy = operands()
    g_entropy *= trained != "log-probs"
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1))
    want, want_entropy, gradients = reference(
        hidden, weight, bias, targets, g, g_entropy, HEADS[head].get("softcap"))
    bias.requires_grad_()
    hidden, weight = (x.as_subclass(OnCuda).requires_grad_() for x in (hidden, weight))
    logprobs, entropies = token_logprobs(
        hidden, weight, targets, bias, entropy=True, rows=rows, keep=keep, **HEADS[head])
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert (logprobs - want).abs().max() < 2e-5 and (entropies - want_entropy).abs().max() < 2e-5
    chunks = 1 if rows is None else 5
    assert products == [(torch.bfloat16, torch.float32)] * chunks
    loss = g @ logprobs
    if trained == "entropies too":
        loss = loss + g_entropy @ entropies
    loss.backward()
    limit = 3e-3 if head == "plain" and trained == "log-probs" else 5e-3  # kept in 16 bits, log-probs lose more
    for x, gradient in zip((hidden, weight, bias), gradients):
        assert relative(x.grad, gradient) < limit
    assert weight.grad.dtype == torch.bfloat16 and set(products) == {(torch.bfloat16, torch.float32)}


def test_gradient_of_fp32_weights_is_not_rounded_under_autocast(products):
    """The weights are multiplied in 16 bits, and their gradient comes from fp32 sums to their own fp32: rounded to 16
    bits for each micro-batch, it would lose what micro-batches after the first few add.
    """
    hidden, weight, targets, g, _ = operands()
    want = reference(hidden, weight, torch.zeros(40), targets, g, 0 * g, None)[2][1]
    # weights of fp32 that autocast rounds to the same 16 bits
    own = (weight.float() * (1 + 2.0**-12)).as_subclass(OnCuda).requires_grad_()
    assert torch.equal(own.bfloat16(), weight) and not torch.equal(own, weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        for part in torch.arange(len(hidden)).split(20):
            logprobs = token_logprobs(hidden[part].float().as_subclass(OnCuda).requires_grad_(), own, targets[part],
                                      **HEADS["plain"])
            (g[part] @ logprobs).backward()
    assert set(products) == {(torch.bfloat16, torch.float32)}
    assert own.grad.dtype == torch.float32 and relative(own.grad, want) < 3e-3
    with torch.autocast("cpu", torch.bfloat16):
        single = token_logprobs(hidden.as_subclass(OnCuda), own, targets, **HEADS["plain"])
    [gradient] = torch.autograd.grad(g @ single, own)
    assert not torch.equal(gradient, gradient.bfloat16().float())  # as it would be if it came in 16 bits


@pytest.mark.parametrize("keep", [True, False])
def test_p_of_a_sure_token_is_exact_in_16_bits(products, keep):
    """p - 1 where p is nearly 1: the rounding of p to 16 bits, by up to 0.004, would be all that is left of it."""
    logits = torch.tensor([[6.0, -1.0, 0.0], [8.0, 0.0, -2.0]])
    hidden, weight = logits.bfloat16(), torch.eye(3).bfloat16()
    p = torch.softmax(logits.double(), -1)
    hidden, weight = (x.as_subclass(OnCuda).requires_grad_() for x in (hidden, weight))
    token_logprobs(hidden, weight, torch.tensor([0, 0]), keep=keep).sum().backward()
    want = torch.tensor([[1.0, 0.0, 0.0]]) - p
    assert ((hidden.grad - want).abs() < 0.05 * want.abs()).all()


class Graph:
    """A CUDA graph's stand-in: what runs while it is captured, a call of a cache's `forward`, runs again at each replay,
    on the same tensors and at the same span, and its result goes to the same memory.
    """

    captured = None  # the one that is being captured

    def replay(self):
        cache, arguments, span, hidden = self.call
        now, cache.span = cache.span, span
        hidden.copy_(self.forward(cache, *arguments))
        cache.span = now


def pretend(monkeypatch):
    """Let steps of the sampler take the way of a GPU."""
    step = common.RowsCache.step
    on_cuda = lambda token: None if token is None else token.as_subclass(OnCuda)
    monkeypatch.setattr(common.RowsCache, "step", lambda cache, token=None: step(cache, on_cuda(token)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")


def test_a_step_that_waits_for_the_gpu_is_in_no_graph(monkeypatch):
    """The capture fails, torch's stream is set back, and steps go on without graphs, now and in later calls."""
    model = make_model("llama")
    use_rows(model)
    prompts = [[1, 5, 9], [1, 4, 7, 20, 33, 8, 11], [1, 30]]
    want = sample(model, prompts, 10, [2], seed=1)
    calls = []

    @contextlib.contextmanager
    def capture(graph):
        calls.append("capture")
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(common.RowsCache, "use_graphs", True)
    pretend(monkeypatch)
    for _ in range(2):
        got = sample(model, prompts, 10, [2], seed=1)
        assert all(torch.equal(want[name], got[name]) for name in want)
    assert calls == ["capture", "stream"] and not common.RowsCache.use_graphs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steps_from_graphs_sample_what_plain_steps_do(monkeypatch, kind):
    """The same tokens and log-probs with ragged prompts, rows that leave, several spans and a second batch."""
    model = make_model(kind)
    use_rows(model)
    prompts = [[1, 5, 9], [1, 4, 7, 20, 33, 8, 11], [1, 30], [1, 6, 6, 6, 6], [1, 5, 9]] * 2
    want = sample(model, prompts, 20, [2, 3, 4, 5, 6], seed=1, batch_size=7)
    forward, made = common.RowsCache.forward, []

    def recorded(cache, *arguments):
        hidden = forward(cache, *arguments)
        if Graph.captured is not None:
            Graph.captured.forward, Graph.captured.call = forward, (cache, arguments, cache.span, hidden)
            made.append((len(hidden), cache.span))
        return hidden

    @contextlib.contextmanager
    def capture(graph):
        Graph.captured = graph
        yield
        Graph.captured = None

    monkeypatch.setattr(torch.cuda, "graph", capture)
    pretend(monkeypatch)
    monkeypatch.setattr(common.RowsCache, "forward", recorded)
    monkeypatch.setitem(common.SPAN, "cpu", 8)
    monkeypatch.setitem(common.LOOK, "cpu", 4)
    got = sample(model, prompts, 20, [2, 3, 4, 5, 6], seed=1, batch_size=7)
    for name in want:
        assert torch.allclose(want[name].double(), got[name].double(), atol=1e-5), name
    assert len(made) == len(set(made)) > 3, made  # one for each number of rows and span
