"""Rows without padding: the long row, its attention, and what models give for it, against loops and padded rows."""

import copy
import random

import pytest
import torch
import torch.nn.attention.varlen
import transformers
from common import (
    LOOK, Rows, check_model, draw, has_rows, pad, sample, sequence_logprobs, token_values, use_rows)
from conftest import STOPS, VOCABULARY, flat_gradient
from test_cuda import OnCuda

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
KINDS = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {"sliding_window": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Gemma2": {"attn_logit_softcapping": None, "head_dim": 8, **WINDOW},
    "Gemma3Text": {"head_dim": 8, **WINDOW}}  # fmt: skip


def make(kind, cls="CausalLM", **options):
    """A tiny random model whose layers can be told to attend as Rows say, in eval mode."""
    torch.manual_seed(0)
    sizes = {name: x for name, x in SIZES.items() if kind != "GPT2" or "_id" in name or name in ("vocab_size", "initializer_range")}
    config = getattr(transformers, f"{kind}Config")(**sizes, **KINDS[kind], **options)
    return getattr(transformers, f"AutoModelFor{cls}").from_config(config, dtype=torch.float32).eval()


def unpadded(model):
    """Also of a class that does not ask for torch's attention by itself, as Gemma 2."""
    use_rows(model)
    model.set_attn_implementation("rows")
    assert has_rows(model)
    return model


def batch_of(shared, seed=0):
    """(input_ids, mask) of ragged rows behind prompts; shared: groups, a row twice, one that begins another."""
    generator = torch.Generator().manual_seed(seed)
    draw_ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
    first, second = draw_ids(5), draw_ids(6)
    rows = [(5, first + draw_ids(16)), (6, second + draw_ids(4)), (5, first + draw_ids(8)), (6, second + draw_ids(3))]
    if shared:
        rows += [rows[0], (5, rows[0][1][:9]), (1, draw_ids(4)), (6, second + draw_ids(7))]
    else:
        rows = [(n, draw_ids(len(ids))) for n, ids in rows]
    mask = pad([[False] * n + [True] * (len(ids) - n) for n, ids in rows], "cpu", False)
    return pad([ids for _, ids in rows], "cpu", 7), mask


# ---- The long row ----


def naive_attention(query, key, value, scale, window):
    """One row by loops over heads and queries: (heads, t, d), keys (fewer heads, t, d) -> (heads, t, d)."""
    output = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    for head in range(len(query)):
        own = head * len(key) // len(query)
        for t in range(query.shape[1]):
            first = max(0, t + 1 - window) if window else 0
            scores = scale * key[own, first : t + 1] @ query[head, t]
            output[head, t] = scores.softmax(0) @ value[own, first : t + 1]
    return output


def random_batch(seed):
    """Rows over three tokens, so that they share much, with any number of tokens needed."""
    choose = random.Random(seed)
    B, T = choose.randint(1, 9), choose.randint(1, 12)
    ids = torch.tensor([[choose.randint(0, 2) for _ in range(T)] for _ in range(B)])
    needed = torch.tensor([[choose.random() < 0.3 for _ in range(T)] for _ in range(B)])
    needed[0, 0] |= not needed.any()
    return ids, needed


@pytest.mark.parametrize("seed", range(30))
def test_each_prefix_is_there_once(seed):
    """As many tokens as there are different prefixes of what is needed, each at its own position."""
    ids, needed = random_batch(seed)
    rows = Rows(ids, needed)
    prefixes = {}
    for i, row in enumerate(ids.tolist()):
        last = max([t for t in range(len(row)) if needed[i, t]], default=-1)
        for t in range(last + 1):
            place = int(rows.place[i, t])
            assert prefixes.setdefault(tuple(row[: t + 1]), place) == place
            assert rows.ids[0, place] == row[t] and rows.positions[0, place] == t
    assert rows.ids.shape == rows.positions.shape == (1, len(prefixes))
    assert sorted(prefixes.values()) == list(range(len(prefixes)))
    assert 0 <= rows.place.min() and rows.place.max() < len(prefixes)


def naive_varlen(query, key, value, queries, keys, *sizes, scale, window_size, **options):
    """What torch's varlen_attn does: rows one behind the other, queries are the last of their row's tokens."""
    assert sizes == (int(queries.diff().max()), int(keys.diff().max())) and queries.dtype == keys.dtype == torch.int32
    outputs = []
    for i in range(len(queries) - 1):
        own = slice(int(keys[i]), int(keys[i + 1]))
        q, k, v = query[int(queries[i]) : int(queries[i + 1])], key[own], value[own]
        q = torch.cat([q.new_zeros(len(k) - len(q), *q.shape[1:]), q])
        output = naive_attention(*(x.double().transpose(0, 1) for x in (q, k, v)), scale, window_size[0] + 1)
        outputs.append(output.transpose(0, 1)[len(k) - int(queries[i + 1] - queries[i]) :].to(query.dtype))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [0, 3, 50])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_attention_is_that_of_each_row_alone(seed, cuda, window, monkeypatch):
    """By torch's function for padded parts, and by the one for a GPU, of which the CPU knows no more than a twin."""
    ids, needed = random_batch(seed)
    rows = Rows(ids, needed)
    N, generator = rows.ids.shape[1], torch.Generator().manual_seed(seed)
    qkv = [torch.randn(1, heads, N, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    if cuda:
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", naive_varlen)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.Tensor, "is_cuda", False, raising=False)
        qkv = [x.bfloat16() for x in qkv]
        got = rows.attend(0, *(x.as_subclass(OnCuda) for x in qkv), 0.3, window).double()
        qkv = [x.double() for x in qkv]
    else:
        got = rows.attend(0, *qkv, 0.3, window)
    assert got.shape == (1, N, 4, 8)
    for i in range(len(ids)):
        n = max([t + 1 for t in range(ids.shape[1]) if needed[i, t]], default=0)
        place = rows.place[i, :n]
        want = naive_attention(*(x[0, :, place] for x in qkv), 0.3, window)
        assert (got[0, place].transpose(0, 1) - want).abs().max().item() < (1e-2 if cuda else 1e-12) if n else True


@pytest.mark.parametrize("d, of_value, capability", [(12, 12, (9, 0)), (24, 16, (9, 0)), (264, 264, (9, 0)), (8, 8, (7, 5))])
def test_heads_that_the_kernel_of_a_gpu_does_not_take(d, of_value, capability, monkeypatch):
    """Sizes that are no multiple of 8, over 256 or other for values, and older cards: padded parts, as right."""
    ids, needed = random_batch(1)
    rows = Rows(ids, needed)
    N, generator = rows.ids.shape[1], torch.Generator().manual_seed(1)
    sizes = [(4, d), (2, d), (2, of_value)]
    qkv = [torch.randn(1, heads, N, size, generator=generator).bfloat16() for heads, size in sizes]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    got = rows.attend(0, *(x.as_subclass(OnCuda) for x in qkv), 0.3, 0).double()
    want = rows.attend(0, *(x.double() for x in qkv), 0.3, 0)
    assert got.shape == want.shape == (1, N, 4, of_value) and (got - want).norm() < 1e-2 * want.norm()


# ---- Models ----


def distinct(input_ids, mask):
    """The number of different beginnings of rows that predict something."""
    prefixes = set()
    for row, own in zip(input_ids.tolist(), mask.tolist()):
        prefixes |= {tuple(row[:t]) for t in range(1, len(row)) if any(own[t:])}
    return len(prefixes)


def scored(model, input_ids, mask):
    """Log-probs and entropies, and the gradient of a random function of both."""
    model.zero_grad()
    logprobs, entropies = sequence_logprobs(model, input_ids, mask, temperature=0.7, entropy=True)
    weights = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (weights[0] * logprobs + weights[1] * entropies).sum().backward()
    return torch.stack([logprobs, entropies]).detach(), flat_gradient(model)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_padded_rows(kind, shared):
    model = make(kind).double()
    batch = batch_of(shared)
    want, gradient = scored(model, *batch)
    got, own_gradient = scored(unpadded(model), *batch)
    assert (got - want).abs().max() < 1e-5
    assert (own_gradient - gradient).norm() < 1e-6 * gradient.norm()
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].shape), with_kwargs=True)
    sequence_logprobs(model, *batch)
    assert seen == [(1, distinct(*batch))] and seen[0][1] < (60 if shared else 50)


@pytest.mark.parametrize("cls", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_values_of_reward_models_and_critics(kind, cls):
    model = make(kind, cls, num_labels=1).double()
    ids, mask = batch_of(True)
    before = mask.roll(-1, dims=1)
    want = token_values(model, ids, before)
    assert (token_values(model, ids) - want)[before].abs().max() < 1e-12 and not want[~before].any()
    unpadded(model)
    for needed in (before, None):
        got = token_values(model, ids, needed)
        assert (got - want)[before].abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(got[0, 3], [model.base_model.get_input_embeddings().weight])
    assert gradient[ids[0, :4]].abs().sum(1).min() > 0
    assert not gradient[list({*range(VOCABULARY)} - {*ids[0, :4].tolist()})].any()


def test_in_training_with_checkpoints_and_under_autocast():
    model = make("Llama")
    batch = batch_of(True)
    want, gradient = scored(unpadded(model), *batch)
    model.gradient_checkpointing_enable()
    got, own = scored(model.train(), *batch)
    assert torch.equal(got, want) and torch.allclose(own, gradient, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sequence_logprobs(model, *batch)
        model.set_attn_implementation("sdpa")
        padded = sequence_logprobs(model, *batch)
    assert rounded.dtype == torch.float32
    assert (rounded - want[0] * 0 - padded).abs().max() < 0.2 and (rounded - padded).abs().mean() < 0.02


def test_a_copy_has_rows_too_and_a_saved_folder_has_none(tmp_path):
    model = unpadded(make("Llama"))
    ids, mask = batch_of(True)
    want = sequence_logprobs(model, ids, mask)
    assert has_rows(copy.deepcopy(model)) and torch.equal(sequence_logprobs(copy.deepcopy(model), ids, mask), want)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    assert has_rows(transformers.AutoModelForTokenClassification.from_config(config))
    model.save_pretrained(tmp_path)
    assert "rows" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    for row, own in zip(ids, want):  # transformers' own calls are what they were
        logits = model(row[None]).logits
        assert torch.equal(logits, again(row[None]).logits) and own.shape == row.shape


# ---- The trial before step 1 ----


def test_a_model_that_is_right_needs_no_padding(capsys):
    model = make("Llama")
    ids, _ = batch_of(True)
    check_model(model, ids.tolist())
    assert has_rows(model) and capsys.readouterr().out == ""


def forget_the_rows(module, *inputs, rows=None, **options):
    return forget_the_rows.forward(module, *inputs, **options)


def leak(module, query, *inputs, **options):
    """What precedes a row in the long row reaches it."""
    output = forget_the_rows.attend(module, query, *inputs, **options)
    return output + 0.01 * output.cumsum(1) if output.shape[1] > 30 else output


def collapse(module, *inputs, **options):
    raise RuntimeError("a layer of another kind")


@pytest.mark.parametrize("name, action", [
    ("attend", leak), ("attend", collapse), ("attend", lambda *inputs: forget_the_rows.attend(*inputs) * float("nan"))])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_is_wrong_without_padding_is_padded(monkeypatch, capsys, name, action, training):
    forget_the_rows.attend = getattr(Rows, name)
    monkeypatch.setattr(Rows, name, action)
    model = make("Llama").train(training)
    ids, mask = batch_of(True)
    want = sequence_logprobs(model, ids, mask)
    check_model(model, ids.tolist(), "--reward x")
    assert not has_rows(model) and model.training == training
    why = " (RuntimeError)" if action is collapse else ""
    line = f"--reward x: LlamaForCausalLM errs in rows without padding{why}: padded ones take more time"
    assert capsys.readouterr().out == line + "\n"
    assert torch.equal(sequence_logprobs(model, ids, mask), want)


@pytest.mark.parametrize("longest, is_right", [(1100, False), (1000, True)])
def test_a_limit_that_only_a_mask_knows_is_tried(longest, is_right):
    """Qwen2Moe tells its attention no window: rows beyond it are padded, and shorter ones not."""
    options = {"use_sliding_window": True, "sliding_window": 1030, "layer_types": WINDOW["layer_types"], "num_experts": 4,
               "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
    config = transformers.Qwen2MoeConfig(**SIZES, **options)
    config.max_position_embeddings = 2048
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(5, VOCABULARY, (1, longest), generator=torch.Generator().manual_seed(0))
    check_model(model, ids.tolist())
    assert has_rows(model) == is_right


@pytest.mark.parametrize("options", [{"attn_logit_softcapping": 50.0}, {"attention_dropout": 0.1}])
def test_what_attention_does_not_know_is_refused_however_small(options):
    """A cap of 50 changes small scores by too little to be seen in a trial."""
    config = transformers.Gemma2Config(**SIZES, **{**KINDS["Gemma2"], **options})
    model = unpadded(transformers.AutoModelForCausalLM.from_config(config).train())
    with pytest.raises(NotImplementedError):
        sequence_logprobs(model, *batch_of(True))


# ---- Sampling ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_responses_as_with_padding(kind):
    """Ragged prompts, some twice, one the beginning of another; rows leave at their own time."""
    model = make(kind)
    ids, mask = batch_of(True)
    prompts = [row[: m.tolist().index(True)] for row, m in zip(ids.tolist(), mask)] * 3
    prompts += [ids[0, :9].tolist(), ids[0, :16].tolist()]
    want = sample(model, prompts, 20, STOPS, 1.2, seed=4)
    unpadded(model)
    tokens = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: tokens.append(options["input_ids"].numel()), with_kwargs=True)
    got = sample(model, prompts, 20, STOPS, 1.2, seed=4)
    assert torch.equal(got["input_ids"], want["input_ids"]) and torch.equal(got["mask"], want["mask"])
    assert (got["logprobs"] - want["logprobs"]).abs().max() < 1e-4
    assert tokens[0] == 16 + 6 + 1 and 13 < tokens[1] <= 26 and tokens[-1] < 13  # each beginning once, then rows
    greedy = sample(model, prompts, 9, STOPS, 0.0)
    again = sequence_logprobs(model, greedy["input_ids"], greedy["mask"], hits=True)
    assert again[1][greedy["mask"]].all() and (again[0] - greedy["logprobs"]).abs().max() < 1e-4


def test_rarer_looks_at_what_has_ended_change_nothing(monkeypatch):
    model = unpadded(make("Llama"))
    prompts = [[1, 5, 9], [1, 4, 7, 20, 33]] * 9
    want = sample(model, prompts, 30, STOPS, seed=4)
    monkeypatch.setitem(LOOK, "cpu", 16)
    got = sample(model, prompts, 30, STOPS, seed=4)
    for name in want:
        assert torch.allclose(got[name].double(), want[name].double(), atol=1e-5)


def naive_draw(z, noise):
    cumulative = z.double().softmax(1).cumsum(1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("V", [2, 65, 256, 257, 320, 1000, 5000])
def test_draws_are_where_the_cumulative_distribution_passes_the_noise(V):
    generator = torch.Generator().manual_seed(V)
    z = 4 * torch.randn(2000, V, generator=generator)
    noise = torch.rand(2000, generator=generator, dtype=torch.float64)
    token, logp = draw(z.clone(), noise)
    assert torch.equal(token, naive_draw(z, noise))
    assert (logp - z.log_softmax(1).gather(1, token[:, None])[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("V", [130, 4226])  # and by blocks
def test_draws_at_the_ends(V):
    """No noise gives the first token that has a probability at all, and the most the last."""
    z = torch.full((2, V), -1e9)
    z[:, 70:100] = torch.randn(30, generator=torch.Generator().manual_seed(0))
    token, logp = draw(z, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [70, 99] and logp.isfinite().all()
