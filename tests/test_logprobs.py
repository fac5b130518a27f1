"""token_logprobs, sequence_logprobs and check_model against float64 autograd, loops, and transformers' own loss."""

import itertools

import common
import pytest
import torch
import transformers
from common import check_model, head_of, sequence_logprobs, token_logprobs
from conftest import VOCABULARY, make_model, naive_logprobs, ragged_rows
from sft import collate

N, H, V = 23, 12, 61  # no two equal, and no multiple of a chunk


def problem(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    tensors = [randn(N, H), randn(V, H) * 0.6, randn(V) if bias else None]
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    targets = torch.randint(V, (N,), generator=generator)
    return tensors, targets, randn(N), randn(N)


def oracle(tensors, targets, bias, scale, softcap, temperature):
    """The textbook formula in float64 on the full logits: (log-probs, entropies), and the leaves for autograd."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    hidden, weight, b = leaves
    z = (hidden @ weight.T + (0 if b is None else b)) * scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = torch.log_softmax(z, -1)
    return logp[torch.arange(N), targets], -(logp.exp() * logp).sum(-1), leaves


CASES = list(
    itertools.product([True, False], [1.0, 0.25], [None, 5.0], [1.0, 0.7, 1.3], [True, False], [1, 7, 64])
)


@pytest.mark.parametrize("bias, scale, softcap, temperature, keep, rows", CASES)
def test_values_and_gradients_equal_float64_autograd(bias, scale, softcap, temperature, keep, rows):
    tensors, targets, g, g_entropy = problem(bias=bias)
    options = dict(scale=scale, softcap=softcap, temperature=temperature)
    want_logp, want_entropy, leaves = oracle(tensors, targets, bias, **options)
    (want_logp * g + want_entropy * g_entropy).sum().backward()
    logp, entropy = token_logprobs(
        *tensors[:2], targets, tensors[2], entropy=True, keep=keep, rows=rows, **options
    )
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - want_logp).abs().max() < 1e-5 and (entropy - want_entropy).abs().max() < 1e-5
    (logp * g.float() + entropy * g_entropy.float()).sum().backward()
    for got, want in zip(tensors, leaves):
        assert got is None or (got.grad - want.grad).norm() < 1e-6 * want.grad.norm()
    without = token_logprobs(*tensors[:2], targets, tensors[2], keep=keep, rows=rows, **options)
    assert torch.equal(without, logp)
    for x in tensors:
        if x is not None:
            x.grad = None
    (without * g.float()).sum().backward()
    want_logp, _, leaves = oracle(tensors, targets, bias, **options)
    (want_logp * g).sum().backward()
    for got, want in zip(tensors, leaves):
        assert got is None or (got.grad - want.grad).norm() < 1e-6 * want.grad.norm()


@pytest.mark.parametrize("option", ["scale", "softcap", "temperature"])
def test_options_have_no_special_value(option):
    """Of any size, 1 among them, where there is nothing to do. fp32 loses digits of 1 - tanh^2 near 0."""
    tensors, targets, g, _ = problem()
    options = {"scale": 1.0, "softcap": None, "temperature": 1.0}
    for options[option] in (0.5, 1.0, 2.0, 3.0):
        want, want_entropy, leaves = oracle(tensors, targets, True, **options)
        got, entropy = token_logprobs(*tensors[:2], targets, tensors[2], entropy=True, **options)
        assert (got - want).abs().max() < 1e-5 and (entropy - want_entropy).abs().max() < 1e-5
        [got_gradient] = torch.autograd.grad((got * g.float()).sum(), tensors[1])
        [want_gradient] = torch.autograd.grad((want * g).sum(), leaves[1])
        assert (got_gradient - want_gradient).norm() < 1e-5 * want_gradient.norm()


def test_gradcheck_in_float64():
    tensors, targets, *_ = problem(torch.float64)
    function = lambda h, w, b: token_logprobs(
        h, w, targets, b, 0.5, 4.0, 0.7, entropy=True, keep=False, rows=5
    )
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("keep", [True, False])
def test_bf16_weights_cost_the_logprobs_no_precision(keep):
    """Large logits (std 9): rounding them to bf16 would cost 0.1 nats, rounding log-probs 0.03."""
    tensors, targets, g, _ = problem(torch.bfloat16)
    with torch.no_grad():
        tensors[1].mul_(4)
    want, _, leaves = oracle(tensors, targets, True, 1.0, None, 1.0)
    got = token_logprobs(*tensors[:2], targets, tensors[2], keep=keep)
    assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-4
    (want * g).sum().backward()
    (got * g.float()).sum().backward()
    for x, leaf in zip(tensors, leaves):
        assert x.grad.dtype == torch.bfloat16
        assert (x.grad.double() - leaf.grad).norm() < 4e-3 * leaf.grad.norm()  # rounding of the result itself


def test_gradient_of_fp32_weights_under_autocast_is_a_sum_in_fp32():
    """Autocast multiplies by the weights in bf16. Their gradient is not rounded to bf16, for no micro-batch."""
    tensors, targets, g, _ = problem()
    rounded = [x.detach().bfloat16() for x in tensors[:2]] + [tensors[2]]
    want, _, leaves = oracle(rounded, targets, True, 1.0, None, 1.0)
    (want * g).sum().backward()
    for rows in torch.arange(N).split(3):
        with torch.autocast("cpu", torch.bfloat16):
            logp = token_logprobs(tensors[0][rows], tensors[1], targets[rows], tensors[2])
        assert (logp - want[rows]).abs().max() < 1e-5
        (logp * g[rows].float()).sum().backward()
    for got, leaf in zip(tensors[1:], leaves[1:]):
        assert (got.grad - leaf.grad).norm() < 1e-6 * leaf.grad.norm()
    # the head's inputs are what autocast computes, in bf16, and so is their gradient
    assert (tensors[0].grad - leaves[0].grad).norm() < 4e-3 * leaves[0].grad.norm()


def test_a_large_vocabulary_stays_accurate():
    """50,257 classes with logits up to +-40, where a bf16 log-softmax is off by 0.03 and more."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 64, generator=generator)
    weight, targets = (
        torch.randn(50257, 64, generator=generator),
        torch.randint(50257, (9,), generator=generator),
    )
    want = torch.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(9), targets]
    assert (token_logprobs(hidden, weight, targets) - want).abs().max() < 1e-5
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    want = torch.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(9), targets]
    assert (token_logprobs(hidden, weight, targets) - want).abs().max() < 1e-4


def test_entropy_of_uniform_one_hot_and_masked_vocabularies():
    hidden, weight, targets = torch.ones(3, 1), torch.zeros(VOCABULARY, 1), torch.tensor([0, 1, 2])
    _, entropy = token_logprobs(hidden, weight, targets, entropy=True)
    assert torch.allclose(entropy, torch.full((3,), VOCABULARY).log())
    bias = torch.full((VOCABULARY,), -torch.inf)
    bias[[0, 1, 2]] = 0.0  # a vocabulary of three, the rest forbidden
    bias.requires_grad_()
    logp, entropy = token_logprobs(hidden, weight, targets, bias, entropy=True)
    assert torch.allclose(entropy, torch.full((3,), 3.0).log()) and torch.allclose(logp, -entropy)
    (logp.sum() + entropy.sum()).backward()
    assert bias.grad.isfinite().all()
    bias = torch.zeros(VOCABULARY)
    bias[1] = 1e4
    assert token_logprobs(hidden, weight, targets, bias, entropy=True)[1].abs().max() == 0


def test_raising_the_entropy_raises_the_entropy():
    tensors, targets, *_ = problem()
    entropy = token_logprobs(*tensors[:2], targets, tensors[2], entropy=True)[1].mean()
    entropy.backward()
    moved = [x.detach() + 0.05 * x.grad for x in tensors]
    assert token_logprobs(*moved[:2], targets, moved[2], entropy=True)[1].mean() > entropy


def test_hits_are_the_most_likely_tokens():
    tensors, targets, *_ = problem()
    best = (tensors[0] @ tensors[1].T + tensors[2]).argmax(-1)
    targets[::2] = best[::2]
    _, hits = token_logprobs(*tensors[:2], targets, tensors[2], hits=True, rows=5)
    assert torch.equal(hits, targets == best) and hits.any() and not hits.all()


def test_inputs_are_left_alone_and_a_second_backward_is_refused():
    tensors, targets, g, _ = problem()
    before = [x.detach().clone() for x in tensors] + [targets.clone()]
    logp = token_logprobs(*tensors[:2], targets, tensors[2], temperature=0.5, softcap=3.0, keep=True)
    logp.sum().backward(retain_graph=True)
    assert all(map(torch.equal, before, [*tensors, targets]))
    with pytest.raises(RuntimeError, match="second one needs keep=False"):
        logp.sum().backward()


def test_a_gradient_of_a_gradient_is_refused():
    """Rather than wrong: the backward pass works in place on what it kept."""
    tensors, targets, *_ = problem()
    logp = token_logprobs(*tensors[:2], targets, tensors[2])
    [gradient] = torch.autograd.grad(logp.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("trained", [[0], [1], [0, 1]], ids=["hidden", "weight", "both"])
@pytest.mark.parametrize("room, kept", [(4 * N * V, True), (4 * N * V - 1, False), (0, False)])
def test_log_probs_are_kept_as_long_as_there_is_room(monkeypatch, room, kept, trained):
    """4 bytes a logit. Those that are kept serve one backward pass, those computed again any number."""
    monkeypatch.setitem(common.KEEP_BYTES, "cpu", room)
    tensors, targets, *_ = problem()
    for i in {0, 1, 2} - set(trained):
        tensors[i].requires_grad_(False)
    logp = token_logprobs(*tensors[:2], targets, tensors[2])
    logp.sum().backward(retain_graph=True)
    if kept:
        with pytest.raises(RuntimeError, match="second one needs keep=False"):
            logp.sum().backward()
    else:
        first = [tensors[i].grad.clone() for i in trained]
        logp.sum().backward()
        assert all(torch.allclose(tensors[i].grad, 2 * x) for i, x in zip(trained, first))


def test_wrong_shapes_and_temperatures_raise():
    (hidden, weight, bias), targets, *_ = problem()
    for arguments in (
        (hidden[None], weight, targets),
        (hidden, weight[:, 1:], targets),
        (hidden, weight, targets[1:]),
    ):
        with pytest.raises(ValueError, match="expected"):
            token_logprobs(*arguments)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, targets, temperature=0)


def test_agrees_with_torchs_own_fused_loss():
    """torch.nn.functional.linear_cross_entropy (torch 2.13 and later) is an independent implementation."""
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    (hidden, weight, _), targets, *_ = problem(bias=False)
    want = fused(hidden, weight, targets, reduction="sum")
    assert torch.allclose(-token_logprobs(hidden, weight, targets).sum(), want, rtol=1e-6)


def test_one_hot_logits_have_no_loss_and_a_shift_has(model):
    """A head that always says the next token scores 0; read one position off and it scores -100 a token."""
    ids, trained = ragged_rows()[0]
    ids = list(dict.fromkeys(ids[:-1]))  # no repeats: the next token is a function of this one
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for now, following in zip(ids, ids[1:]):
        table[following, now] = 200.0
    eye = torch.eye(VOCABULARY)
    hidden = eye[torch.tensor(ids)]
    assert token_logprobs(hidden[:-1], table, torch.tensor(ids[1:])).abs().max() < 1e-6
    assert token_logprobs(hidden[:-2], table, torch.tensor(ids[2:])).max() < -50


def test_sequence_logprobs_equal_a_loop_and_do_not_depend_on_the_batch(model):
    """Guard: batch invariance, ragged rows, GPT-2 and Llama; and only masked tokens are scored."""
    rows = ragged_rows()
    input_ids, trained = collate(rows, "cpu")
    with torch.no_grad():
        together, entropy, hits = sequence_logprobs(model, input_ids, trained, entropy=True, hits=True)
        for i, (ids, mask) in enumerate(rows):
            alone = sequence_logprobs(model, *collate([(ids, mask)], "cpu"))[0]
            assert (together[i, : len(ids)] - alone).abs().max() < 1e-5
            want = naive_logprobs(model, ids) * torch.tensor(mask[1:])
            assert (alone[1:] - want).abs().max() < 1e-5
    assert (together[~trained] == 0).all() and (entropy[~trained] == 0).all() and not hits[~trained].any()
    assert (together[trained] < 0).all() and (entropy[trained] > 0).all()


def test_padding_ids_do_not_matter(model):
    """Guard: pad poison. Whatever token stands in the padding, log-probs and gradients stay the same, bit by bit."""
    input_ids, trained = collate(ragged_rows(), "cpu")
    results = []
    for poison in (0, 2, 50):  # pad, EOS, any
        poisoned = input_ids.clone()
        for i, (ids, _) in enumerate(ragged_rows()):
            poisoned[i, len(ids) :] = poison
        model.zero_grad()
        logprobs = sequence_logprobs(model, poisoned, trained)
        logprobs.sum().backward()
        results.append((logprobs.detach(), model.get_output_embeddings().weight.grad.clone()))
    for logprobs, gradient in results[1:]:
        assert torch.equal(logprobs, results[0][0])
        assert torch.allclose(gradient, results[0][1], atol=1e-6)


def test_temperature_scales_the_logits(model):
    input_ids, trained = collate(ragged_rows(), "cpu")
    with torch.no_grad():
        got = sequence_logprobs(model, input_ids, trained, temperature=0.5)
        want = torch.log_softmax(2 * model(input_ids).logits[:, :-1], -1)
    want = want.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    assert (got[:, 1:] - want)[trained[:, 1:]].abs().max() < 1e-4


def test_nll_and_gradient_equal_transformers_own_loss(model):
    """labels= of transformers shifts by itself and means over the labels: the same mean NLL, the same gradient."""
    rows = ragged_rows()
    input_ids, trained = collate(rows, "cpu")
    loss = -sequence_logprobs(model, input_ids, trained).sum() / trained.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mask = torch.tensor([[1] * len(ids) + [0] * (input_ids.shape[1] - len(ids)) for ids, _ in rows])
    labels = torch.where(trained, input_ids, -100)
    want = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-5
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (gradients[name] - p.grad).norm() < 1e-5 * p.grad.norm() + 1e-7, name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_get_both_contributions(tied):
    model = make_model("llama", tie_word_embeddings=tied)
    ids, trained = collate(ragged_rows(), "cpu")
    sequence_logprobs(model, ids, trained).sum().backward()
    got = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    logp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    (logp * trained[:, 1:]).sum().backward()
    assert (got - model.get_input_embeddings().weight.grad).norm() < 1e-5 * got.norm()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEADS = {
    "Gemma2": dict(final_logit_softcapping=3.0, head_dim=16),
    "Cohere": dict(logit_scale=0.25),
    "Granite": dict(logits_scaling=4.0),
    "Phi": dict(),  # a bias in the head
    "Qwen2": dict(),
    "GPTNeoX": dict(),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_with_soft_cap_scale_or_bias_are_reproduced(name, monkeypatch):
    config = getattr(transformers, f"{name}Config")(**SMALL, **HEADS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = head_of(model)
    if head["bias"] is not None:
        torch.nn.init.normal_(head["bias"])
    ids = ragged_rows()[0][0]
    check_model(model, [ids])  # ends the process if it does not fit
    if name in (
        "Gemma2",
        "Cohere",
        "Granite",
        "Phi",
    ):  # without its soft cap, scale or bias it must be refused
        plain = {"weight": head["weight"], "bias": None, "scale": 1.0, "softcap": None}
        monkeypatch.setattr(common, "head_of", lambda model: plain)
        with pytest.raises(SystemExit):
            check_model(model, [ids])


def test_ids_beyond_the_embeddings_and_rows_beyond_the_positions_are_refused(model, capsys):
    for row, message in (([1, 5, VOCABULARY], "token id 97"), ([1] * 65, "64 positions")):
        with pytest.raises(SystemExit):
            check_model(model, [[1, 2, 3], row])
        assert message in capsys.readouterr().err


def test_a_head_it_does_not_know_is_refused(model, capsys):
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    check_model(model, [ragged_rows()[0][0]])
    model.forward = scaled
    with pytest.raises(SystemExit) as stop:
        check_model(model, [ragged_rows()[0][0]])
    assert stop.value.code == 2 and "cache or head unknown" in capsys.readouterr().err
