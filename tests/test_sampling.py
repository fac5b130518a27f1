"""sample(): exactly the distribution that is scored, whatever the batch, the padding and the generation_config."""

import math
from collections import Counter

import pytest
import torch
import transformers
from common import ended, responses_of, sample, sequence_logprobs, use_rows
from conftest import VOCABULARY, make_model, sampled
from sft import collate

PROMPTS = [
    [1, 5, 9],
    [1, 4, 7, 20, 33, 2, 8, 11, 50, 60, 70, 80],
    [1, 30],
    [1, 6, 6, 6, 6],
]  # EOS (2) inside one


@pytest.fixture(params=["llama", "gpt2", "llama, padded", "gpt2, padded"])
def model(request):
    model = make_model(request.param.partition(",")[0])
    if "padded" not in request.param:
        use_rows(model)
    return model


def completions(tokens, lengths):
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]


def drawn(*arguments, **options):
    """sample() with its responses left-aligned: tokens (B, R), log-probs (B, R), lengths (B,)."""
    return sampled(sample(*arguments, **options))


@pytest.mark.parametrize("max_new_tokens", [20, 3, 1])
def test_a_batch_has_prompt_response_and_zeros_in_this_order(model, max_new_tokens):
    """Row by row, against the lists of ids; ragged in prompts and in responses."""
    prompts = PROMPTS * 6
    batch = sample(model, prompts, max_new_tokens, [2, 3, 4], seed=1, batch_size=7)
    responses, finished = responses_of(batch), ended(batch, [2, 3, 4]).tolist()
    T = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    assert list(batch) == ["input_ids", "mask", "logprobs"]
    assert [x.shape for x in batch.values()] == [(24, T)] * 3
    assert [x.dtype for x in batch.values()] == [torch.long, torch.bool, torch.float32]
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        P, R = len(prompt), len(response)
        behind = T - P - R
        assert batch["input_ids"][i].tolist() == prompt + response + [0] * behind
        assert batch["mask"][i].tolist() == [False] * P + [True] * R + [False] * behind
        logprobs = batch["logprobs"][i]
        assert (logprobs[P : P + R] < 0).all()
        assert (logprobs[:P] == 0).all() and (logprobs[P + R :] == 0).all()
        assert 1 <= R <= max_new_tokens
        assert finished[i] == (response[-1] in (2, 3, 4)) and (finished[i] or R == max_new_tokens)
        assert not set(response[:-1]) & {2, 3, 4}
    if max_new_tokens == 20:
        assert any(finished) and not all(finished)


def test_it_leaves_the_training_mode_and_the_random_state_as_they_were(model):
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        sample(model, PROMPTS, 3, [2])
        assert model.training == training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rope", ["default", "dynamic"])  # of which the second keeps what it has computed
def test_what_was_sampled_can_be_trained_on(rope):
    """Tensors of torch's inference mode cannot be saved for a backward pass, and may not be changed in place."""
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    model = make_model("llama", rope_parameters=parameters)
    use_rows(model)
    batch = sample(model, PROMPTS, 60, [2], seed=1)  # beyond the 64 positions of the model
    scale = torch.ones((), requires_grad=True)
    logprobs = sequence_logprobs(model, batch["input_ids"], batch["mask"])
    (logprobs * batch["logprobs"] * scale).sum().backward()
    assert scale.grad.isfinite() and all(p.grad is not None for p in model.parameters())
    for x in batch.values():
        x.zero_()


def test_ended_looks_at_the_last_token_of_the_response_alone():
    """Cut responses, one EOS of several, an EOS in the prompt, in the padding and within the response."""
    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 2, 0], [1, 2, 6, 7, 8], [1, 5, 3, 2, 2], [1, 2, 7, 2, 2], [1, 9, 2, 7, 0]]),
        "mask": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0]]) > 0,
    }
    assert ended(batch, [2]).tolist() == [True, False, False, False, False]
    assert ended(batch, [2, 3]).tolist() == [True, False, True, False, False]
    assert ended(batch, [7, 8]).tolist() == [False, True, False, True, True]
    assert ended(batch, []).tolist() == [False] * 5
    assert responses_of(batch) == [[6, 2], [6, 7, 8], [3], [7], [9, 2, 7]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_the_sampler_equal_those_of_the_training_forward(model, temperature):
    """Guard: generate and recompute, with ragged prompts on the left and right padding in training."""
    prompts = PROMPTS * 6
    tokens, logprobs, lengths = drawn(model, prompts, 20, [2, 3, 4], temperature, seed=1)
    assert lengths.min() < 20 and lengths.max() == 20  # some rows end, some do not
    rows = [
        (prompt + row, [False] * len(prompt) + [True] * len(row))
        for prompt, row in zip(prompts, completions(tokens, lengths))
    ]
    with torch.no_grad():
        again = sequence_logprobs(model, *collate(rows, "cpu"), temperature=temperature)
    for i, (prompt, length) in enumerate(zip(prompts, lengths.tolist())):
        recomputed = again[i, len(prompt) : len(prompt) + length]
        assert (logprobs[i, :length] - recomputed).abs().max() < 1e-4
        assert (logprobs[i, length:] == 0).all() and (tokens[i, length:] == 0).all()


@pytest.mark.parametrize("weights, autocast", [("float32", True), ("bfloat16", False)])
def test_in_16_bit_the_sampler_and_scoring_round_alike(model, weights, autocast):
    """One unpadded prompt and one new token, so that only the head differs: fp32 products in both, to 1e-4. The
    model's own head would round its logits to bf16, 0.03 nats off."""
    model = model.to(getattr(torch, weights))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, logprobs, _ = drawn(model, [PROMPTS[1]], 1, [2], seed=1)
        row = PROMPTS[1] + tokens[0].tolist()
        mask = torch.arange(len(row))[None] >= len(row) - 1
        again = sequence_logprobs(model, torch.tensor([row]), mask)[0, -1]
    assert logprobs.dtype == again.dtype == torch.float32
    assert (logprobs[0, 0] - again).abs() < 0.01


def test_greedy_output_is_that_of_generate(model):
    tokens, _, lengths = drawn(model, PROMPTS, 12, [2], temperature=0)
    for prompt, got in zip(PROMPTS, completions(tokens, lengths)):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2)
        assert out[0, len(prompt) :].tolist() == got


def test_batches_and_neighbours_change_no_sample(model):
    together = drawn(model, PROMPTS * 3, 9, [2], seed=5)
    apart = drawn(model, PROMPTS * 3, 9, [2], seed=5, batch_size=5)
    assert torch.equal(together[0], apart[0]) and torch.allclose(together[1], apart[1], atol=1e-4)
    other = drawn(model, PROMPTS * 3, 9, [2], seed=6)
    assert completions(other[0], other[2]) != completions(together[0], together[2])


def test_a_poisoned_generation_config_has_no_effect(model):
    want = drawn(model, PROMPTS, 9, [2], seed=5)
    model.generation_config = transformers.GenerationConfig(
        top_k=5, top_p=0.5, repetition_penalty=1.3, min_new_tokens=5, do_sample=True, temperature=0.1
    )
    got = drawn(model, PROMPTS, 9, [2], seed=5)
    assert torch.equal(want[0], got[0])


def test_first_tokens_follow_the_distribution():
    """A chi-square test of 20,000 first tokens over a peaked softmax; temperature must count."""
    model, n = make_model("llama"), 20_000
    for temperature in (1.0, 0.5):
        tokens, *_ = drawn(model, [[1, 5, 9]] * n, 1, [2], temperature, seed=3, batch_size=n)
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([[1, 5, 9]])).logits[0, -1].double() / temperature, -1)
        counts = torch.bincount(tokens[:, 0], minlength=VOCABULARY).double()
        likely = p * n >= 10  # the chi-square approximation needs some counts; the rest is one class
        observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
        expected = torch.cat([p[likely], p[~likely].sum()[None]]) * n
        statistic, freedom = (
            ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item(),
            likely.sum().item(),
        )
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_rows_of_one_prompt_differ_from_the_first_token_on():
    tokens, *_ = drawn(make_model("llama"), [[1, 5, 9]] * 64, 4, [2], temperature=3.0, seed=1)
    assert len(set(tokens[:, 0].tolist())) > 20


def test_ends_at_the_first_eos_of_several_and_not_at_one_in_the_prompt(model):
    free, _, lengths = drawn(model, PROMPTS, 30, [], seed=2)
    assert (lengths == 30).all()
    stops = [free[0, 3].item(), free[1, 7].item()]
    tokens, _, lengths = drawn(model, PROMPTS, 30, stops, seed=2)
    for i, row in enumerate(free.tolist()):
        want = next((t + 1 for t, token in enumerate(row) if token in stops), 30)
        assert lengths[i] == want and tokens[i, :want].tolist() == row[:want]
    short, long = [1, 5], [1] + [5] * 25
    assert drawn(model, [short, long], 12, [], seed=0)[2].tolist() == [12, 12]  # the budget excludes the prompt


def law_of(model, prompt, max_new_tokens, eos_ids, temperature):
    """{response: its probability} of all responses, in float64, from forward passes of single unpadded prefixes."""
    law, open_ones = {}, {(): 1.0}
    for _ in range(max_new_tokens):
        longer = {}
        for response, chance in open_ones.items():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, -1].double() / temperature
            for token, p in enumerate(torch.softmax(logits, -1).tolist()):
                place = law if token in eos_ids else longer
                place[(*response, token)] = chance * p
        open_ones = longer
    return law | open_ones


@pytest.mark.parametrize("kind, temperature, padded", [("llama", 0.6, False), ("gpt2", 1.7, False), ("gpt2", 1.7, True)])
def test_whole_responses_follow_their_law(kind, temperature, padded):
    """A chi-square test over all 53 responses of up to 3 tokens out of 5, of which two end them, behind four ragged
    prompts in the same batches; rows that have ended leave the batch. Each statistic is far below its bound.
    """
    model, n = make_model(kind), 1200
    if not padded:
        use_rows(model)
    model.resize_token_embeddings(5, mean_resizing=False)
    prompts = [[1, 4, 3], [1], [1, 0, 2, 4, 3, 0, 1, 4, 2], [1, 3, 3, 0]]
    batch = sample(model, prompts * n, 3, [2, 4], temperature, seed=3, batch_size=1000)
    responses = responses_of(batch)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            law = law_of(model, prompt, 3, [2, 4], temperature)
        assert len(law) == 53 and abs(sum(law.values()) - 1) < 1e-6
        counts = Counter(map(tuple, responses[i :: len(prompts)]))
        assert set(counts) <= set(law)
        frequent = [response for response in law if n * law[response] >= 5]
        cells = [(counts[response], n * law[response]) for response in frequent]
        rest = n - sum(expected for _, expected in cells)
        if rest > 1:  # the rare ones are one cell
            cells.append((n - sum(seen for seen, _ in cells), rest))
        statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
        freedom = len(cells) - 1
        assert freedom > 8
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (prompt, statistic, freedom)


def test_rare_tokens_are_drawn_as_often_as_they_should_be(monkeypatch):
    """64 tokens of probability 1e-9 each behind a likely one, and noise spread evenly over their share: each of them
    is drawn once. Sums in fp32, where 1 - 1e-8 is 1, would draw none of them.
    """
    model = make_model("llama", tie_word_embeddings=False)
    head = torch.nn.Linear(64, 65)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0] + [math.log(1e-9)] * 64))
    model.set_output_embeddings(head)
    share = (torch.arange(64, dtype=torch.float64) + 0.5) / 64  # of what lies behind the first token
    monkeypatch.setattr(torch, "rand", lambda *_, **__: (1 - 64e-9 / (1 + 64e-9) * (1 - share))[:, None])
    tokens, *_ = drawn(model, [[1, 5, 9]] * 64, 1, [2])
    assert tokens[:, 0].tolist() == list(range(1, 65))
