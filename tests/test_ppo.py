"""PPO: rewards, advantages and losses by hand, by loops and by enumeration; rollouts, critic and whole updates
of ppo.main against single rows, float64 autograd and the closed-form optimum.
"""

import contextlib
import itertools
import math
from types import SimpleNamespace

import common
import pytest
import torch
import transformers
from common import (
    encode, ended, last_token, load_model, load_prompts, micro_batches, pad, per_token,
    responses_of, token_values)
from conftest import (
    CHAT_TEMPLATE, LENGTHS, MASK, POISON, STOPS, VOCABULARY, double_loads, make_model, noise, poisoned,
    pure, ragged_rows, sides, watching, word_tokenizer)
from rl import (
    CPU, LAYOUTS, MEAN, PLACED, Tabular, adamw, all_responses, bounded, flat, make_batch, make_folders,
    optimizer_steps, put, rows_of, same_rows, score_logprobs, shares_of_a_word, vector, watch_micro_batches)
from safetensors.torch import load_file

import ppo

pytestmark = pytest.mark.usefixtures("no_pictures")
layouts = pytest.mark.parametrize("mask", LAYOUTS.values(), ids=LAYOUTS.keys())


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


# ---- Advantages ----


def double_sum(rewards, values, mask, gamma, gae_lambda):
    """sum_s (gamma lambda)^(s - t) delta_s over s >= t, of each row's own tokens alone: (B, T), float64."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        r, v = rewards[b, row].tolist(), [*values[b, row].tolist(), 0.0]
        for t, column in enumerate(row.nonzero().flatten().tolist()):
            terms = [(gamma * gae_lambda) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, len(r))]
            result[b, column] = math.fsum(terms)
    return result


@pytest.mark.parametrize("rewards, values, n, advantages, returns", [
    ([0, 1, 0], [0, 0, 100], 2, [0.95, 1, 0], [0.95, 1, 0]),  # the value behind the end, if used: 5.7, 6, -100
    ([-0.1, -0.2, 1], [0.5, 0.4, 0.3], 3, [0.14675, 0.365, 0.7], [0.64675, 0.765, 1]),
    ([0, 0, 1, 0], [0.5, 0.4, 0.3, 0.25], 3, [0.43675, 0.565, 0.7, 0], [0.93675, 0.965, 1, 0]),
    ([0, 0, 1], [0.5, 0.4, 0.3], 3, [0.43675, 0.565, 0.7], [0.93675, 0.965, 1]),  # as long as the batch is wide
])  # fmt: skip
def test_gae_by_hand(rewards, values, n, advantages, returns):
    mask = torch.arange(len(rewards))[None] < n
    got = pure(ppo.gae, tensor(*rewards), tensor(*values), mask, 1.0, 0.95)
    assert (got[0] - tensor(*advantages)).abs().max() < 1e-12
    assert (got[1] - tensor(*returns)).abs().max() < 1e-12


@layouts
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, gae_lambda, dtype, tolerance, mask):
    rewards, values = noise(*mask.shape, seed=1, dtype=dtype), noise(*mask.shape, seed=2, dtype=dtype)
    want = double_sum(rewards, values, mask, gamma, gae_lambda)
    advantages, returns = pure(ppo.gae, rewards, values, mask, gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == dtype
    assert (advantages - want).abs().max() < tolerance
    assert (returns - torch.where(mask, want + values, 0.0)).abs().max() < tolerance
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_where_the_response_stands_changes_nothing():
    """The same numbers behind prompts, in front of padding: the same advantages, returns and rewards, to the bit."""
    rewards, values, logprobs, ref = (noise(4, 16, seed=s) for s in range(4))
    behind = lambda x: torch.full(PLACED.shape, math.nan, dtype=x.dtype).masked_scatter(PLACED, x[MASK])
    for alone, placed in [
        (ppo.gae(rewards, values, MASK, 0.9, 0.8), ppo.gae(behind(rewards), behind(values), PLACED, 0.9, 0.8)),
        ([ppo.token_rewards(rewards[:, 0], logprobs, ref, MASK, 0.3)],
         [ppo.token_rewards(rewards[:, 0], behind(logprobs), behind(ref), PLACED, 0.3)])]:  # fmt: skip
        assert all(torch.equal(x[MASK], y[PLACED]) for x, y in zip(alone, placed))


@layouts
@pytest.mark.parametrize("poison", POISON)
def test_gae_never_sees_the_padding(poison, mask):
    rewards, values = noise(*mask.shape, seed=1), noise(*mask.shape, seed=2)
    want = ppo.gae(rewards, values, mask, 0.9, 0.8)
    got = pure(ppo.gae, poisoned(rewards, poison, mask), poisoned(values, poison, mask), mask, 0.9, 0.8)
    assert all(map(torch.equal, got, want))


def test_gae_at_lambda_1_and_0():
    """Monte-Carlo returns, whatever the values are, and one-step differences."""
    rewards, values = noise(4, 16, seed=1), 5 * noise(4, 16, seed=2)
    _, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
    differences, _ = ppo.gae(rewards, values, MASK, 0.9, 0.0)
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            assert returns[b, t].item() == pytest.approx(rewards[b, t:n].sum().item(), abs=1e-12)
            following = values[b, t + 1].item() if t + 1 < n else 0.0
            step = rewards[b, t].item() + 0.9 * following - values[b, t].item()
            assert differences[b, t].item() == pytest.approx(step, abs=1e-12)


# ---- Rewards ----


@layouts
def test_rewards_by_loops(mask):
    """The score at the last real token, the first row's being the last of all; -beta log pi / pi_ref everywhere."""
    scores, logprobs, ref = noise(4, seed=3), noise(*mask.shape, seed=4), noise(*mask.shape, seed=5)
    rewards = pure(ppo.token_rewards, scores, logprobs, ref, mask, 0.3)
    for b in range(4):
        last = max(t for t in range(mask.shape[1]) if mask[b, t])
        for t in range(mask.shape[1]):
            kl = (logprobs[b, t] - ref[b, t]).item() if mask[b, t] else 0.0
            want = -0.3 * kl + (scores[b].item() if t == last else 0.0)
            assert rewards[b, t].item() == pytest.approx(want, abs=1e-12)
    total = scores - 0.3 * torch.where(mask, logprobs - ref, 0.0).sum(1)
    assert (rewards.sum(1) - total).abs().max() < 1e-12
    assert (rewards[~mask] == 0).all()


@layouts
@pytest.mark.parametrize("poison", POISON)
def test_rewards_never_see_the_padding(poison, mask):
    scores, logprobs, ref = noise(4, seed=3), noise(*mask.shape, seed=4), noise(*mask.shape, seed=5)
    want = ppo.token_rewards(scores, logprobs, ref, mask, 0.3)
    bad_logprobs, bad_ref = poisoned(logprobs, poison, mask), poisoned(ref, poison, mask)
    for x, y in [(logprobs, bad_ref), (bad_logprobs, ref), (bad_logprobs, bad_ref)]:
        assert torch.equal(pure(ppo.token_rewards, scores, x, y, mask, 0.3), want)


def test_score_at_eos_reaches_every_token_before_it():
    """[t0, t1, EOS, padding], score 1, no KL: a score one position late is lost or takes the padding's value."""
    mask, zeros = torch.tensor([[True, True, True, False]]), torch.zeros(1, 4, dtype=torch.float64)
    rewards = ppo.token_rewards(tensor(1.0)[0], zeros, zeros, mask, 0.3)
    assert rewards.tolist() == [[0, 0, 1, 0]]
    advantages, _ = ppo.gae(rewards, tensor(0.5, 0.4, 0.3, 0.25), mask, 1.0, 0.95)
    assert (advantages - tensor(0.43675, 0.565, 0.7, 0)).abs().max() < 1e-12


def test_adaptive_coefficient_by_hand():
    for kl, want in [(6.0, 0.2), (60.0, 0.202048), (0.0, 0.197952), (-3.0, 0.197952), (6.6, 0.201024)]:
        assert ppo.adapted_kl_coef(0.2, kl, 6.0, 512, 10_000) == pytest.approx(want, abs=1e-12)


# ---- Policy loss ----


def policy_loss(ratio, advantages, clip_coef=0.2, mask=None):
    """(losses, d losses / d log pi, ratio) at given ratios of probabilities, away from log pi = 0."""
    old = torch.full_like(ratio, -1.7)
    logprobs = (old + ratio.log()).requires_grad_()
    mask = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
    losses, got = pure(ppo.ppo_loss, logprobs, old, advantages, mask, clip_coef)
    losses.sum().backward()
    return losses.detach(), logprobs.grad, got.detach()


def test_policy_loss_by_hand():
    ratio, advantages = tensor(1.5, 0.5, 1.5, 0.5), tensor(1, 1, -1, -1)
    losses, gradient, got = policy_loss(ratio, advantages)
    assert (losses - tensor(-1.2, -0.5, 1.5, 0.8)).abs().max() < 1e-12
    assert (gradient - tensor(0, -0.5, 1.5, 0)).abs().max() < 1e-12
    assert (got - ratio).abs().max() < 1e-12
    clipped = losses > -advantages * ratio  # as main counts: where the clip decides, half of the tokens
    assert clipped.tolist() == [[True, False, False, True]]


def test_policy_gradient_vanishes_exactly_where_clipped_and_improving():
    for clip_coef in (0.1, 0.2, 0.3):
        for edge, a in itertools.product((-2, -1.01, -0.99, 0, 0.99, 1.01, 4), (-2.5, -0.3, 0.7, 3)):
            rho = 1 + edge * clip_coef
            losses, gradient, _ = policy_loss(tensor(rho), tensor(a), clip_coef)
            improved = rho > 1 + clip_coef if a > 0 else rho < 1 - clip_coef
            bound = 1 + clip_coef if a > 0 else 1 - clip_coef
            assert losses.item() == pytest.approx(-a * (bound if improved else rho), abs=1e-12)
            assert gradient.item() == pytest.approx(0.0 if improved else -a * rho, abs=1e-12)


def test_policy_gradient_is_the_finite_difference():
    ratio, advantages, h = (0.4 * noise(4, 16, seed=6)).exp(), noise(4, 16, seed=7), 1e-6
    losses, gradient, _ = policy_loss(ratio, advantages, mask=MASK)
    up, down = (policy_loss(ratio * math.exp(x), advantages, mask=MASK)[0] for x in (h, -h))
    assert (gradient - (up - down) / (2 * h)).abs().max() < 1e-8
    assert (losses[~MASK] == 0).all() and (gradient[~MASK] == 0).all()
    assert (gradient[MASK] == 0).any() and (gradient[MASK] != 0).any()


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    """-A grad log pi, in the logits: -A (1[y] - p). Ratio and loss are known there; the gradient is not zero."""
    logits, tokens = noise(4, 16, 7, seed=8).requires_grad_(), torch.randint(
        7, (4, 16), generator=torch.Generator().manual_seed(9))  # fmt: skip
    advantages = noise(4, 16, seed=10)
    logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
    losses, ratio = ppo.ppo_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2)
    assert (ratio == 1).all() and torch.equal(losses[MASK].detach(), -advantages[MASK])
    losses.sum().backward()
    one_hot = torch.nn.functional.one_hot(tokens, 7)
    want = -torch.where(MASK, advantages, 0.0)[..., None] * (one_hot - torch.softmax(logits.detach(), -1))
    assert (logits.grad - want).abs().max() < 1e-12
    ends = logits.grad[torch.arange(4), torch.tensor(LENGTHS) - 1]
    assert (ends.abs().amax(-1) > 1e-3).all()  # the last token, EOS or not, is an action like any other


@layouts
@pytest.mark.parametrize("poison", [*POISON, 100.0])
def test_policy_loss_never_sees_the_padding(poison, mask):
    """exp(log-ratio) of 100 overflows in fp32: masked behind it, the gradient would be 0 * inf."""
    results = []
    for dirty in (False, True):
        logprobs, old, advantages = (noise(*mask.shape, seed=s, dtype=torch.float32) for s in (11, 12, 13))
        if dirty:
            logprobs, advantages = poisoned(logprobs, poison, mask), poisoned(advantages, poison, mask)
            old = poisoned(old, 0.0 if poison == 100.0 else poison, mask)
        logprobs.requires_grad_()
        losses, ratio = pure(ppo.ppo_loss, logprobs, old, advantages, mask, 0.2)
        losses.sum().backward()
        results.append((losses.detach(), ratio.detach(), logprobs.grad))
        assert (losses[~mask] == 0).all() and (ratio[~mask] == 1).all() and (logprobs.grad[~mask] == 0).all()
    assert all(map(torch.equal, *results)) and all(x.isfinite().all() for x in results[1])


# ---- Value loss ----


def critic_loss(values, old_values, returns, eps, mask=None):
    """(losses, d losses / d values, whether the clip decides)."""
    values = values.clone().requires_grad_()
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    losses, clipped = pure(ppo.value_loss, values, old_values, returns, mask, eps)
    losses.sum().backward()
    return losses.detach(), values.grad, clipped


def test_value_loss_by_hand():
    values, returns = tensor(0.5, -0.5, 0.5), tensor(1, 1, 0.1)
    losses, gradient, clipped = critic_loss(values, torch.zeros_like(values), returns, 0.2)
    assert (losses - tensor(0.32, 1.125, 0.08)).abs().max() < 1e-12
    assert (gradient - tensor(0, -1.5, 0.4)).abs().max() < 1e-12
    assert clipped.tolist() == [[True, False, False]]
    shifted = critic_loss(values + 3, torch.full_like(values, 3.0), returns + 3, 0.2)  # around the old values
    assert (shifted[0] - losses).abs().max() < 1e-12 and (shifted[1] - gradient).abs().max() < 1e-12


def test_value_loss_without_clip_is_half_the_square():
    values, old_values, returns = (noise(4, 16, seed=s) for s in (14, 15, 16))
    losses, gradient, _ = critic_loss(values, old_values, returns, 0.0, MASK)
    error = torch.where(MASK, values - returns, 0.0)
    assert (losses - error.square() / 2).abs().max() < 1e-12 and (gradient - error).abs().max() < 1e-12


def test_value_gradient_is_the_finite_difference():
    values, old_values, returns, h = noise(4, 16, seed=14), noise(4, 16, seed=15), noise(4, 16, seed=16), 1e-6
    losses, gradient, clipped = critic_loss(values, old_values, returns, 0.4, MASK)
    up, down = (critic_loss(values + x, old_values, returns, 0.4, MASK)[0] for x in (h, -h))
    assert (gradient - (up - down) / (2 * h)).abs().max() < 1e-8
    assert (losses[~MASK] == 0).all() and (gradient[~MASK] == 0).all() and not clipped[~MASK].any()
    far = (values - old_values).abs() > 0.4
    nearer = (old_values + (values - old_values).clamp(-0.4, 0.4) - returns).abs() > (values - returns).abs()
    assert torch.equal(clipped, MASK & far & nearer) and clipped.any()
    assert (gradient[clipped] == 0).all()


@layouts
@pytest.mark.parametrize("poison", POISON)
def test_value_loss_never_sees_the_padding(poison, mask):
    inputs = [noise(*mask.shape, seed=s, dtype=torch.float32) for s in (14, 15, 16)]
    want = critic_loss(*inputs, 0.2, mask)
    assert all(map(torch.equal, critic_loss(*[poisoned(x, poison, mask) for x in inputs], 0.2, mask), want))


@pytest.mark.parametrize("eps", [0.0, 100.0])
def test_a_clip_that_is_never_reached_never_decides(eps):
    """Rounding of V_old + (V - V_old) in fp32 is no clipping."""
    values, old_values, returns = (noise(200, 16, seed=s, dtype=torch.float32) for s in (14, 15, 16))
    _, _, clipped = critic_loss(values, old_values, returns, eps)
    assert not clipped.any()


# ---- Models and folders ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def tiny(folders, kind, tmp_path):
    """tiny(**flags) -> Args of a run of one update: 8 responses, two minibatches of four, two epochs."""

    def make(**flags):
        data = str(folders / "prompts.jsonl")
        defaults = {
            "model": str(folders / kind), "reward": (str(folders / f"{kind}-reward"),), "dataset": data,
            "eval_dataset": data, "output_dir": str(tmp_path / "run"), "total_episodes": 8, "batch_size": 4,
            "num_minibatches": 2, "micro_batch_size": 4, "max_new_tokens": 16, "eval_every": 0,
            "eval_samples": 2, "save_every": 0, "device": "cpu"}  # fmt: skip
        return ppo.Args(**{**defaults, **flags})

    return make


@pytest.fixture
def watch(monkeypatch):
    return watching(monkeypatch, ppo)


@pytest.fixture
def double(monkeypatch, float64):
    double_loads(monkeypatch, ppo, "load_model", "load_critic", "load_reward")


def naive_response(model, prompt, response, temperature=1.0):
    """[(log pi(y_t), entropy)] of one response: a forward pass of the prefix alone for each token, in float64."""
    result = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double() / temperature
        logp = torch.log_softmax(logits, -1)
        result.append((logp[token], -(logp.exp() * logp).sum()))
    return result


# ---- Responses and their positions ----


def test_a_batch_by_hand():
    """What pads rows, finds their ends and cuts them out of a batch: by the mask, never by a token's id."""
    assert pad([[5, 6, 0, 8, 0], [7, 9]], CPU).tolist() == [[5, 6, 0, 8, 0], [7, 9, 0, 0, 0]]
    assert pad([[0.5], [1.5, 2.0]], CPU, -1.0).tolist() == [[0.5, -1.0], [1.5, 2.0]]
    batch = make_batch([[5, 6], [7], [8, 8, 8]], [[0, 8, 0], [9], [9, 0]])  # id 0, the padding's, is a token too
    assert batch["input_ids"].tolist() == [[5, 6, 0, 8, 0], [7, 9, 0, 0, 0], [8, 8, 8, 9, 0]]
    assert batch["mask"].int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert last_token(batch["mask"]).tolist() == [4, 1, 4]
    assert responses_of(batch) == [[0, 8, 0], [9], [9, 0]]
    assert ended(batch, [0]).tolist() == [True, False, True] and ended(batch, [2, 9]).tolist() == [False, True, False]
    for poison in (0, 2, 9):  # padding that looks like an EOS
        padded = make_batch([[5, 6], [7], [8, 8, 8]], [[0, 8, 0], [9], [9, 0]], poison)
        assert ended(padded, [0]).tolist() == [True, False, True] and responses_of(padded) == responses_of(batch)
    assert rows_of(batch) == [([5, 6], [0, 8, 0]), ([7], [9]), ([8, 8, 8], [9, 0])]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_micro_batches_by_hand(size):
    """Each row of the index once, whole, shortest first, in batches as wide as their longest row."""
    lengths, index = [3, 7, 4, 4, 1, 5], torch.tensor([5, 3, 0, 2, 4])
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    mask[:, 0] &= ~mask[:, 1]  # a prompt of one token, and of none in the row of length 1
    batch = {"mask": mask, "x": torch.where(torch.arange(8) < torch.tensor(lengths)[:, None], noise(6, 8), math.nan)}
    got = list(micro_batches(batch, index, size))
    order = [4, 0, 3, 2, 5]  # equal lengths in the order of the index
    cuts = {1: [0, 1, 2, 3, 4, 5], 2: [0, 1, 3, 5], 3: [0, 2, 5], 5: [0, 5], 9: [0, 5]}[size]  # as even as can be
    assert [rows.tolist() for rows, _ in got] == [order[i:j] for i, j in zip(cuts, cuts[1:])]
    for rows, mb in got:
        T = max(lengths[i] for i in rows)
        assert mb.keys() == batch.keys() and all(x.shape == (len(rows), T) for x in mb.values())
        for i, m, x in zip(rows.tolist(), mb["mask"], mb["x"]):
            assert m.tolist() == mask[i, :T].tolist() and x[: lengths[i]].tolist() == batch["x"][i, : lengths[i]].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_per_token_puts_each_row_where_it_was(size):
    batch = make_batch(*sides(ragged_rows()))
    got = per_token(lambda mb: mb["input_ids"] + 0.5 * mb["mask"], batch, size)
    for i, (prompt, response) in enumerate(rows_of(batch)):
        n = len(prompt + response)
        assert got[i, :n].tolist() == prompt + [token + 0.5 for token in response]
        assert (got[i, n:] == 0).all()
    assert not per_token(lambda mb: mb["logprobs"].requires_grad_(), batch, size).requires_grad


class PositionCritic(torch.nn.Module):
    """A critic whose value is its position."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.score = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.score.weight)

    def base_model(self, input_ids, use_cache):
        place = torch.arange(input_ids.shape[1], dtype=torch.float32)
        return SimpleNamespace(last_hidden_state=place.expand(input_ids.shape)[..., None])

    def save_pretrained(self, folder, **_):
        pass


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
@pytest.mark.parametrize("micro", [4, 1])
def test_values_are_read_before_their_token(tiny, watch, monkeypatch, micro):
    """Of a critic whose value is its position, in the rollout and in training: for a prompt of 4 tokens and a response
    of 3 they are 3, 4, 5."""
    monkeypatch.setattr(ppo, "load_critic", lambda *_: PositionCritic())
    monkeypatch.setattr(ppo, "lighten", lambda *_: None)
    gaes, losses = watch("gae"), watch("value_loss")
    ppo.main(tiny(critic_learning_rate=0.0, micro_batch_size=micro))
    (((_, values, mask, *_), _),) = gaes
    assert len(set(mask.int().argmax(1).tolist())) > 2  # prompts are ragged
    for x, m in [(values, mask), *[(inputs[0], inputs[3]) for inputs, _ in losses],
                 *[(inputs[1], inputs[3]) for inputs, _ in losses]]:  # fmt: skip
        for row, real in zip(x, m):
            columns = real.nonzero().flatten().tolist()
            assert row[columns].tolist() == [t - 1 for t in columns]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_by_loops_over_prefixes(model, temperature):
    batch = make_batch(*sides(ragged_rows()))
    mask = batch["mask"]
    with torch.no_grad():
        logprobs, entropy = score_logprobs(model, batch, temperature, size=4)
        assert logprobs.shape == entropy.shape == mask.shape
        for i, (prompt, response) in enumerate(rows_of(batch)):
            for t, (logp, h) in enumerate(naive_response(model, prompt, response, temperature), len(prompt)):
                assert logprobs[i, t].item() == pytest.approx(logp.item(), abs=2e-5)
                assert entropy[i, t].item() == pytest.approx(h.item(), abs=2e-5)
    assert (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()


def test_a_row_alone_equals_the_row_in_a_batch(model):
    batch = make_batch(*sides(ragged_rows()), padding=50)
    with torch.no_grad():
        together = score_logprobs(model, batch, size=4)[0]
        for i in (3, 1, 0, 2):
            alone = score_logprobs(model, batch, index=torch.tensor([i]))[0]
            n = int(last_token(batch["mask"])[i]) + 1  # alone it has no padding
            assert alone.shape == (1, 18) and (alone[0, :n] - together[i, :n]).abs().max() < 1e-5
            assert alone[0, n:].isnan().all() and (together[i, n:] == 0).all()
        order = torch.tensor([2, 0, 3])
        for size in (1, 2, 3):
            part = score_logprobs(model, batch, index=order, size=size)[0].nan_to_num(0.0)
            assert (part - together[order]).abs().max() < 1e-5


def load(args):
    """(reward function, reward model, critic, the reward model as transformers loads it)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    reward, model, _ = ppo.load_reward(args.reward[0], tokenizer, [2, 7], args, CPU, contextlib.nullcontext)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward[0]).eval()
    own = own.to(next(model.parameters()).dtype)
    policy = ppo.load_model(args.model, args, CPU)[0]
    return reward, model, ppo.load_critic(args, policy, model, CPU), own


def response_values(critic, batch, size=2):
    """V before each token of these responses, as main reads them: (B, T)."""
    return per_token(lambda mb: token_values(critic, mb["input_ids"]).roll(1, dims=1), batch, size)


def test_critic_is_the_reward_model_at_every_prefix(tiny, watch, double):
    """Scores are the model's own, less reward_mean, each row alone; the critic's value of each prefix is the score
    it would have: nothing of a response reaches the value before it, and everything of it the one behind."""
    args = tiny(micro_batch_size=2)
    reward, _, critic, own = load(args)
    prompts, responses = sides(ragged_rows(seed=3))
    batch = make_batch(prompts, responses)
    mask = batch["mask"]
    with torch.no_grad():
        values = response_values(critic, batch)
        scores = reward([{}] * 4, prompts, responses)
        after = token_values(critic, batch["input_ids"])
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            for t in range(len(response)):
                want = own(torch.tensor([prompt + response[:t]])).logits[0, 0].item() - MEAN
                assert values[i, len(prompt) + t].item() == pytest.approx(want, abs=1e-6)
            want = own(torch.tensor([prompt + response])).logits[0, 0].item() - MEAN
            assert scores[i].item() == pytest.approx(want, abs=1e-6)
            assert after[i, len(prompt + response) - 1].item() == pytest.approx(scores[i].item(), abs=1e-6)
        assert values.shape == (4, 18) and values[mask].std() > 0.1
        for t in (0, 2, 6):  # another token t of the third response
            changed = [list(response) for response in responses]
            changed[2][t] = 50 if changed[2][t] != 50 else 51
            changed = response_values(critic, make_batch(prompts, changed))
            difference = torch.where(mask, changed - values, 0.0).abs()
            here = len(prompts[2]) + t
            assert difference[2, : here + 1].max() < 1e-6 and difference[2, here + 1 : 14].min() > 1e-4
            assert difference[[0, 1, 3]].max() < 1e-6


def test_values_of_a_run_are_the_reward_model_at_every_prefix(tiny, watch, double):
    """What gae and value_loss get, before the critic's first step: the score that each prefix alone would have."""
    rollouts, gaes, losses = watch("rollout"), watch("gae"), watch("value_loss")
    args = tiny(micro_batch_size=2, max_new_tokens=8)
    ppo.main(args)
    own = load(args)[3]
    batch, (((_, values, mask, *_), _),) = rollouts[1][1][0], gaes
    assert torch.equal(mask, batch["mask"]) and len(set(mask.sum(1).tolist())) > 2
    wants = torch.zeros(mask.shape)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(rows_of(batch)):
            for t in range(len(response)):
                wants[i, len(prompt) + t] = own(torch.tensor([prompt + response[:t]])).logits[0, 0] - MEAN
    assert (values - wants)[mask].abs().max() < 1e-6 and wants[mask].std() > 0.1
    for (new, old, _, m, _), _ in losses[:2]:  # the first optimizer step, of two micro-batches
        assert (new - old)[m].abs().max() < 1e-9


def test_scores_are_read_at_the_reward_models_own_eos(tiny):
    """It was trained on rows that end with its first EOS: a response that was cut is read behind that one too,
    and one that ended with another EOS of the policy, 7, is read as if it had ended with this one, once.
    """
    reward, model, _, own = load(tiny(micro_batch_size=2))
    ends = model.config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    prompts, responses = [[5, 9], [11], [4, 8, 6]], [[20, 21, 22], [30, 31, 7], [40, 41, 42, 43, 2]]
    bodies = [[20, 21, 22], [30, 31], [40, 41, 42, 43]]
    want = [own(torch.tensor([x + y + [end]])).logits[0, 0].item() - MEAN for x, y in zip(prompts, bodies)]
    assert reward([{}] * 3, prompts, responses).tolist() == pytest.approx(want, abs=1e-5)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_critic_of_the_policy_starts_at_zero(tiny, kind):
    _, _, critic, _ = load(tiny(critic="policy"))
    batch = make_batch(*sides(ragged_rows()))
    values = token_values(critic, batch["input_ids"]).roll(1, dims=1)[batch["mask"]]
    assert (values == 0).all()
    values.sum().backward()
    head = critic.score if kind == "llama" else critic.classifier
    assert head.weight.grad.norm() > 0.1  # and can learn
    body = load_file(f"{tiny().model}/model.safetensors")
    name = next(name for name in body if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")))
    own = dict(critic.named_parameters())
    assert torch.equal(body[name], own[name if name in own else f"{critic.base_model_prefix}.{name}"])
    assert ppo.load_critic(tiny(critic="none"), None, None, CPU) is None


@pytest.mark.parametrize("critic", ["reward", "policy"])
def test_no_dropout_anywhere(kind, critic, tmp_path):
    """Whatever the checkpoint's configuration says, for policy, reference, reward model and critic."""
    model = make_model(kind, dropout=0.3)
    model.save_pretrained(tmp_path / "model")
    config = model.config
    config.num_labels = 1
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    for name in ("model", "reward"):
        word_tokenizer().save_pretrained(tmp_path / name)
    args = ppo.Args(model=str(tmp_path / "model"), reward=(str(tmp_path / "reward"),), critic=critic)
    _, reward_model, critic, _ = load(args)
    input_ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    for part in (ppo.load_model(args.model, args, CPU)[0], reward_model, critic):
        once, again = (part.base_model(input_ids).last_hidden_state for _ in range(2))
        assert torch.equal(once, again), type(part).__name__


# ---- Rollouts ----


def roll(policy, reference, reward, prompts, stops, **flags):
    args = ppo.Args(**{"max_new_tokens": 12, "micro_batch_size": 2, "missing_eos_penalty": 0.75, **flags})
    rows = [({"prompt": "", "number": i}, ids) for i, ids in enumerate(prompts)]
    score = lambda *texts: reward(*texts)[:, None]  # (B, 1): one reward
    batch, episodes = ppo.rollout(policy, reference, score, rows, stops, args, contextlib.nullcontext, 1)
    return batch, episodes, ppo.episode_metrics(episodes, args.reward, 0.3)


def test_unfinished_rows_pay_and_masks_come_from_lengths(model, monkeypatch):
    """EOS early, EOS in the last slot, no EOS, another EOS of several, and the padding's id within a text."""
    rows = [[9, 2], [9, 8, 7, 6, 2], [9, 8, 2 + 1, 7, 6], [5, 60], [0, 9, 0, 2]]
    prompts = [[4], [5, 6], [7], [8, 9, 10], [11]]
    monkeypatch.setattr(common, "sample", lambda policy, prompts, *_, **__: make_batch(prompts, rows))
    seen = {}

    def reward(data, prompts, responses):
        seen.update(numbers=[row["number"] for row in data], prompts=prompts, responses=responses)
        return torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    batch, episodes, metrics = roll(model, model, reward, prompts, [2, 60])
    assert seen == {"numbers": [0, 1, 2, 3, 4], "prompts": prompts, "responses": rows}  # the EOS is scored too
    assert episodes["rewards"].tolist() == [1, 2, 3 - 0.75, 4, 5]
    assert episodes["scores"].tolist() == [[1], [2], [3], [4], [5]]
    assert metrics["completions/eos_rate"] == pytest.approx(4 / 5)
    assert batch["mask"].sum(1).tolist() == episodes["lengths"].tolist() == [2, 5, 5, 2, 4]
    assert episodes["finished"].tolist() == [1, 1, 0, 1, 1]
    assert rows_of(batch) == list(zip(prompts, rows))
    assert metrics["completions/mean_length"] == pytest.approx(18 / 5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_its_metrics_by_loops(model, temperature):
    """KL, entropy and log-probs of both models from forward passes of single prefixes; policy and reference differ."""
    reference, prompts = make_model("gpt2", seed=7), sides(ragged_rows())[0] * 2
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 0.25, 2.0])
    batch, episodes, metrics = roll(model, reference, lambda *_: scores, prompts, STOPS, temperature=temperature,
                                    max_new_tokens=8)  # fmt: skip
    finished, kls, entropies, lengths = [], [], [], []
    with torch.no_grad():
        for i, (prompt, response) in enumerate(rows_of(batch)):
            n, mask = len(response), batch["mask"][i]
            assert prompt == prompts[i]
            assert not set(response[:-1]) & set(STOPS) and (n == 8 or response[-1] in STOPS)
            finished.append(response[-1] in STOPS)
            p, q = (naive_response(m, prompts[i], response, temperature) for m in (model, reference))
            p, q = (torch.stack([logp for logp, _ in x]) for x in (p, q))
            assert (batch["logprobs"][i, mask] - p).abs().max() < 5e-5
            assert (batch["ref_logprobs"][i, mask] - q).abs().max() < 5e-5
            assert (batch["logprobs"][i, ~mask] == 0).all() and (batch["ref_logprobs"][i, ~mask] == 0).all()
            assert mask.tolist() == [len(prompt) <= t < len(prompt) + n for t in range(len(mask))]
            lengths.append(n)
            kls.append((p - q).sum().item())
            entropies.append(-p.sum().item())
    assert len(set(lengths)) > 2 and any(finished) and not all(finished)
    assert episodes["kl"].tolist() == pytest.approx(kls, abs=5e-4)
    assert episodes["entropy"].tolist() == pytest.approx(entropies, abs=5e-4)
    paid = [score - 0.75 * (not done) for score, done in zip(scores.tolist(), finished)]
    assert episodes["rewards"].tolist() == pytest.approx(paid)
    mean = lambda x: sum(x) / len(x)
    assert metrics == pytest.approx({
        "objective/scores": mean(paid), "objective/kl": mean(kls), "objective/entropy": mean(entropies),
        "objective/non_score_reward": -0.3 * mean(kls), "objective/rlhf_reward": mean(paid) - 0.3 * mean(kls),
        "completions/mean_length": mean(lengths),
        "completions/eos_rate": mean(finished)}, abs=5e-4)  # fmt: skip
    assert not any(x.requires_grad for x in (*batch.values(), *episodes.values()))


# ---- Prompts ----


TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "help"},
        {"role": "user", "content": "help me"}]  # fmt: skip


def test_prompts_are_prefixes_of_what_sft_trains_on(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", CHAT_TEMPLATE)
    rows = [{"prompt": "Answer: ", "_where": "x:1"}, {"prompt": TALK, "_where": "x:2", "extra": 7}]
    (first, plain), (second, chat) = load_prompts(bpe_tokenizer, rows, 99)
    assert first == {**rows[0], "extra": None} and second == rows[1]
    assert plain == [1, *bpe_tokenizer("Answer: ", add_special_tokens=False)["input_ids"]]
    assert chat == bpe_tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert bpe_tokenizer.decode(chat).endswith("<user>help me</s>\n<assistant>")
    for row, ids, completion in [(rows[0], plain, "hello"), (rows[0], plain, "\nhe"),
                                 (rows[1], chat, [{"role": "assistant", "content": "hello there"}])]:  # fmt: skip
        ((trained_on, trained),) = encode(bpe_tokenizer, [{**row, "completion": completion}], [2], 999)
        assert trained_on[: trained.index(True)] == ids and ids.count(1) == 1


def test_long_prompts_are_dropped_and_counted(bpe_tokenizer, capsys):
    rows = [{"prompt": text, "_where": "x:1"} for text in ("hello", "hello there, help me! " * 9, "help")]
    kept = load_prompts(bpe_tokenizer, rows, 8)
    assert [row["prompt"] for row, _ in kept] == ["hello", "help"] and all(len(ids) <= 8 for _, ids in kept)
    assert "1 of 3 prompts" in capsys.readouterr().out
    exact = max(len(ids) for _, ids in kept)
    assert len(load_prompts(bpe_tokenizer, rows, exact)) == 2
    with pytest.raises(SystemExit):
        load_prompts(bpe_tokenizer, rows[1:2], 8)


def test_an_empty_prompt_without_bos_is_not_made_up():
    """There is no state to act in: the row is refused or dropped, not prompted with some token."""
    for empty in ("", " "):  # this tokenizer has no token for a space
        rows = [{"prompt": empty, "_where": "x:1"}, {"prompt": "w5 w9", "_where": "x:2"}]
        with contextlib.suppress(SystemExit):
            assert [ids for _, ids in load_prompts(word_tokenizer(), rows, 8)] == [[5, 9]]


# ---- Whole updates ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_is_on_policy(tiny, watch, temperature):
    losses, rewards = watch("ppo_loss"), watch("token_rewards")
    metrics = ppo.main(tiny(temperature=temperature, micro_batch_size=2))
    (_, logprobs, ref_logprobs, mask, _), _ = rewards[0]
    assert len(losses) == 8 and len(set(mask.sum(1).tolist())) > 2
    for _, (_, ratio) in losses[:2]:  # the first optimizer step, of two micro-batches
        assert (ratio - 1).abs().max() < 1e-5
    assert torch.where(mask, logprobs - ref_logprobs, 0.0).abs().max() < 1e-5
    assert 0 < metrics["policy/logprob_gap"] < 1e-5 and abs(metrics["objective/kl"]) < 1e-5


def test_later_minibatches_are_not_and_old_logprobs_stay(tiny, watch):
    losses, rewards, critics = watch("ppo_loss"), watch("token_rewards"), watch("value_loss")
    ppo.main(tiny(num_minibatches=1, batch_size=8, micro_batch_size=8, learning_rate=1e-2))
    (_, logprobs, *_), _ = rewards[0]
    assert len(losses) == 2
    for (_, old, advantages, *_), _ in losses:
        assert same_rows(old, logprobs) and same_rows(logprobs, old)
        assert not old.requires_grad and not advantages.requires_grad
    (first, (_, ratio)), (second, (_, moved)) = losses
    assert first[0].requires_grad and second[0].requires_grad
    assert (ratio - 1).abs().max() < 1e-5 and (moved - 1).abs().max() > 0.05
    for (_, old_values, returns, *_), _ in critics:
        assert not old_values.requires_grad and not returns.requires_grad
    assert same_rows(critics[1][0][1], critics[0][0][1]) and same_rows(critics[1][0][2], critics[0][0][2])


def test_without_learning_rate_nothing_moves(tiny, watch, tmp_path):
    losses, values = watch("ppo_loss"), watch("value_loss")
    args = tiny(learning_rate=0.0, critic_learning_rate=0.0, total_episodes=16, micro_batch_size=2)
    ppo.main(args)
    assert len(losses) == len(values) == 16
    assert all((ratio - 1).abs().max() < 1e-5 for _, (_, ratio) in losses)
    for (new, old, _, mask, _), _ in values:
        assert torch.where(mask, new - old, 0.0).abs().max() < 1e-5
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (args.model, tmp_path / "run/model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reference_and_reward_model_never_change(tiny, watch):
    rollouts, rewards, critics = watch("rollout"), watch("load_reward"), watch("load_critic")
    seen = watch("token_rewards")
    args = tiny(total_episodes=24, learning_rate=5e-3)
    metrics = ppo.main(args)
    (policy, reference, *_), _ = rollouts[-1]
    ((_, (_, reward_model, _)),), ((_, critic),) = rewards, critics
    groups = [{x.data_ptr() for x in part.state_dict().values()}
              for part in (policy, reference, reward_model, critic)]  # fmt: skip
    assert sum(map(len, groups)) == len(set().union(*groups))
    fresh, (_, fresh_reward, *_) = load_model(args.model, args, CPU)[0], load(args)
    for part, start in ((reference, fresh), (reward_model, fresh_reward)):
        want = start.state_dict()
        assert all(torch.equal(x, want[name]) for name, x in part.state_dict().items())
        assert not part.training and not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert not torch.equal(next(policy.parameters()), next(fresh.parameters()))
    (_, logprobs, ref_logprobs, mask, _), _ = seen[-1]
    assert torch.where(mask, logprobs - ref_logprobs, 0.0).abs().max() > 1e-2 and metrics["eval/objective/kl"]


def by_loops(rewards_call, values, args):
    """Raw advantages (B, T), from the inputs of token_rewards, in float64."""
    scores, logprobs, ref_logprobs, mask, kl_coef = rewards_call
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        columns = row.nonzero().flatten().tolist()
        for t in columns:
            rewards[b, t] = -kl_coef * (logprobs[b, t].item() - ref_logprobs[b, t].item())
        rewards[b, columns[-1]] += scores[b].item()
    return double_sum(rewards, values, mask, args.gamma, args.gae_lambda)


@pytest.mark.parametrize("critic", ["reward", "none"])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_an_update_by_loops_over_single_rows(tiny, watch, double, monkeypatch, critic, norm_adv):
    """Advantages whitened over all tokens of the update, returns from the raw ones; and the gradients of the first
    optimizer step: -A grad log pi (REINFORCE) and (V - G) grad V, summed over its rows one at a time."""
    rewards, advantages, losses = watch("token_rewards"), watch("gae"), watch("ppo_loss")
    value_losses, rollouts, loaded = watch("value_loss"), watch("rollout"), watch("load_model")
    trained = watch_micro_batches(monkeypatch, ppo)
    args = tiny(critic=critic, norm_adv=norm_adv, micro_batch_size=2, gamma=0.97, gae_lambda=0.9, kl_coef=0.3,
                max_grad_norm=1e9, total_episodes=16, learning_rate=5e-3, update_epochs=1)  # fmt: skip
    with optimizer_steps() as steps:
        ppo.main(args)
    assert len(steps) == 4 and len(rewards) == len(advantages) == 2 and len(losses) == 8
    call, ((_, old_values, mask, *_), _) = rewards[1][0], advantages[1]  # the second update: pi is not pi_ref
    assert torch.where(mask, call[1] - call[2], 0.0).abs().max() > 1e-3
    raw = by_loops(call, old_values, args)
    returns, tokens = raw + torch.where(mask, old_values, 0.0), raw[mask]
    want = (raw - tokens.mean()) / tokens.std(correction=0) if norm_adv else raw
    assert (old_values == 0).all() == (critic == "none")

    calls = trained[4:]  # the row numbers of each micro-batch
    numbers = torch.cat(calls)
    assert len(calls) == 4 and sorted(numbers.tolist()) == list(range(8)) and numbers.tolist() != list(range(8))
    for k, index in enumerate(calls):  # each once, shuffled
        (_, old, advantage, m, _), _ = losses[4 + k]
        T = m.shape[1]  # what was cut off is padding
        assert torch.equal(old, call[1][index, :T]) and torch.equal(m, mask[index, :T]) and not mask[index, T:].any()
        assert (torch.where(m, advantage - want[index, :T], 0.0)).abs().max() < 1e-6
        if critic != "none":
            (_, old, target, *_), _ = value_losses[4 + k]
            assert torch.equal(old, old_values[index, :T])
            assert torch.where(m, target - returns[index, :T], 0.0).abs().max() < 1e-9

    policy = loaded[0][1][0]
    value = None if critic == "none" else load(args)[2]
    parts = [policy] if value is None else [policy, value]
    sizes = [len(list(part.parameters())) for part in parts]
    parameters, gradients = steps[2]
    assert sum(sizes) == len(parameters)
    rows, texts = numbers[:4].tolist(), rows_of(rollouts[2][1][0])  # behind the evaluation and the first update
    count = sum(len(texts[j][1]) for j in rows)
    for k, part in enumerate(parts):
        mine = slice(sum(sizes[:k]), sum(sizes[: k + 1]))
        with torch.no_grad():
            for p, weight in zip(part.parameters(), parameters[mine]):
                p.copy_(weight)
        part.eval().zero_grad()  # without the dropout that a TokenClassification class has before its head
        for j in rows:
            prompt, response = texts[j]
            out = part(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            for t, token in enumerate(response):
                if part is policy:
                    loss = -want[j, len(prompt) + t] * torch.log_softmax(out[t], -1)[token]
                else:
                    loss = (out[t, 0] - returns[j, len(prompt) + t]).square() / 2
                (loss / count).backward(retain_graph=True)
        error = [(p.grad - g).norm() for p, g in zip(part.parameters(), gradients[mine]) if p.grad is not None]
        size = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert torch.stack(error).norm() < 1e-6 * size and size > 1e-3


def step_by_loops(policy, critic, rows, texts, old_logprobs, advantages, old_values, returns, args):
    """The gradients of policy and critic for the responses of one optimizer step, each token by itself: clipped ratio
    and clipped values; and how many tokens each clip decides for."""
    policy_losses, value_losses, held = [], [], [0, 0]
    for j in rows:
        prompt, response = texts[j]
        ids, first = torch.tensor([prompt + response]), len(prompt)
        logprobs = torch.log_softmax(policy(ids).logits[0], -1)
        values = critic(ids).logits[0, :, 0]
        for t, token in enumerate(response, first):
            a, target, start = advantages[j, t], returns[j, t], old_values[j, t]
            ratio = (logprobs[t - 1, token] - old_logprobs[j, t]).exp()
            bound = min(max(ratio.item(), 1 - args.clip_coef), 1 + args.clip_coef)
            if a * bound < a * ratio.item():
                policy_losses.append(-a * bound)
                held[0] += 1
            else:
                policy_losses.append(-a * ratio)
            value = values[t - 1]
            bound = start + min(max((value - start).item(), -args.clip_coef_value), args.clip_coef_value)
            if (bound - target) ** 2 > (value - target) ** 2:
                value_losses.append((bound - target) ** 2 / 2)
                held[1] += 1
            else:
                value_losses.append((value - target) ** 2 / 2)
    n = len(policy_losses)
    gradients = [torch.autograd.grad(sum(losses) / n, list(part.parameters()), materialize_grads=True)
                 for part, losses in ((policy, policy_losses), (critic, value_losses))]  # fmt: skip
    return *gradients, held, n


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_every_step_of_an_update_by_loops_over_single_rows(tiny, watch, double, monkeypatch):
    """Two epochs of two minibatches: behind the first step the ratio is not 1, and clips decide. No gradient is left
    from an earlier step, each model is clipped by its own norm, and nothing decays."""
    rewards, gaes, rollouts = watch("token_rewards"), watch("gae"), watch("rollout")
    policies, critics = watch("load_model"), watch("load_critic")
    trained = watch_micro_batches(monkeypatch, ppo)
    args = tiny(micro_batch_size=2, learning_rate=1e-3, critic_learning_rate=5e-3, max_grad_norm=5.0,
                clip_coef=0.1, clip_coef_value=0.05)  # fmt: skip
    with optimizer_steps() as steps:
        metrics = ppo.main(args)
    (call, _), ((_, old_values, mask, *_), _) = rewards[0], gaes[0]
    texts = rows_of(rollouts[1][1][0])  # behind the evaluation
    raw = by_loops(call, old_values, args)
    tokens = raw[mask]
    advantages, returns = (raw - tokens.mean()) / tokens.std(correction=0), raw + old_values
    parts = [policies[0][1][0], critics[0][1]]
    sizes = [len(list(part.parameters())) for part in parts]
    final = [p.detach().clone() for part in parts for p in part.parameters()]
    numbers = torch.cat(trained).tolist()
    assert len(steps) == 4 and len(numbers) == 16 and sorted(numbers[:8]) == sorted(numbers[8:]) == list(range(8))
    for part in parts:
        part.eval()  # without the dropout that a TokenClassification class has before its head
    decided, norms = [], []
    for k, (parameters, gradients) in enumerate(steps):
        for part, weights in zip(parts, (parameters[: sizes[0]], parameters[sizes[0] :])):
            put(part, weights)
        *want, held, n = step_by_loops(
            *parts, numbers[4 * k : 4 * k + 4], texts, call[1], advantages, old_values, returns, args)
        for got, own in zip((gradients[: sizes[0]], gradients[sizes[0] :]), want):
            own = bounded(own, args.max_grad_norm)
            assert (vector(got) - own).norm() < 1e-5 * own.norm()
        decided.append([0 < count < n for count in held])
        norms.append([vector(own).norm().item() for own in want])
    assert decided == [[False, False], *[[True, True]] * 3]
    assert min(norms)[0] < args.max_grad_norm < max(norms)[0]
    assert [metrics["grad_norm/policy"], metrics["grad_norm/critic"]] == pytest.approx(norms[-1], rel=1e-6)
    rates = [torch.full((vector(own).numel(),), rate) for own, rate in zip(want, (1e-3, 5e-3))]
    behind = [vector(parameters) for parameters, _ in steps[1:]] + [vector(final)]
    for got, own in zip(behind, adamw(steps, torch.cat(rates))):
        assert (got - own).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_without_advantages_no_weight_moves(tiny, folders, watch):
    """A reward of 0 everywhere and no KL: not a bit of any weight changes, in four steps at a high learning rate."""
    policies, critics = watch("load_model"), watch("load_critic")
    args = tiny(reward=(f"{folders}/reward.py:nothing",), critic="policy", kl_coef=0.0, missing_eos_penalty=0.0,
                learning_rate=0.1, critic_learning_rate=0.1)  # fmt: skip
    with optimizer_steps() as steps:
        ppo.main(args)
    parts = [policies[0][1][0], critics[0][1]]
    after = [p for part in parts for p in part.parameters()]
    assert len(steps) == 4 and all(torch.equal(p, start) for p, start in zip(after, steps[0][0], strict=True))


def test_micro_batches_change_no_gradient_and_no_metric(tiny, watch, double, tmp_path):
    """Guard: micro-batch invariance, of all optimizer steps of an update, in float64."""
    losses, returns, seen = watch("ppo_loss"), watch("gae"), {}
    for micro in (4, 2, 1):
        first = len(losses)
        with optimizer_steps() as seen_steps:
            metrics = ppo.main(tiny(micro_batch_size=micro, max_grad_norm=1e9, output_dir=str(tmp_path / f"{micro}")))
        steps = [vector(gradients) for _, gradients in seen_steps]
        used = torch.cat([advantages[m] for (_, _, advantages, m, _), _ in losses[first:]])
        assert all((advantages[~m] == 0).all() for (_, _, advantages, m, _), _ in losses[first:])
        del metrics["tokens_per_second"], metrics["policy/logprob_gap"]
        seen[micro] = steps, used, metrics
        mask = returns[-1][0][2]
        assert len(steps) == 4 and len(losses) - first == 16 // micro
    assert len(set(mask.sum(1).tolist())) > 2  # ragged
    for micro in (2, 1):
        for got, want in zip(seen[micro][0], seen[4][0]):
            assert (got - want).norm() < 1e-6 * want.norm() and want.norm() > 1e-3
        assert (seen[micro][1] - seen[4][1]).abs().max() < 1e-6
        assert seen[micro][2] == pytest.approx(seen[4][2], rel=1e-6, abs=1e-9)


def test_metrics_of_an_update_by_loops(tiny, watch):
    """Means over all tokens of all epochs, from what the loss functions got, token by token."""
    losses, values, scored = watch("ppo_loss"), watch("value_loss"), watch("sequence_logprobs")
    gaes = watch("gae")
    got = ppo.main(tiny(micro_batch_size=2, learning_rate=2e-2, clip_coef=0.05, clip_coef_value=0.05))
    terms = {name: [] for name in ("loss/policy", "policy/clipfrac", "policy/approx_kl", "val/ratio",
                                   "loss/value", "val/clipfrac", "policy/entropy")}  # fmt: skip
    entropies = [result[1] for (model, *_), result in scored if model.training]
    for k, ((logprobs, old, advantages, mask, eps), _) in enumerate(losses):
        (new, start, returns, *_), _ = values[k]
        for b, t in mask.nonzero().tolist():
            a, d = advantages[b, t].item(), (logprobs[b, t] - old[b, t]).item()
            rho = math.exp(d)
            bound = min(max(rho, 1 - eps), 1 + eps)
            terms["loss/policy"].append(max(-a * rho, -a * bound))
            terms["policy/clipfrac"].append(-a * bound > -a * rho)
            terms["policy/approx_kl"].append(rho - 1 - d)
            terms["val/ratio"].append(rho)
            v, v0, g = new[b, t].item(), start[b, t].item(), returns[b, t].item()
            held = v0 + min(max(v - v0, -0.05), 0.05)
            terms["loss/value"].append(max((v - g) ** 2, (held - g) ** 2) / 2)
            terms["val/clipfrac"].append(abs(v - v0) > 0.05 and (held - g) ** 2 > (v - g) ** 2)
            terms["policy/entropy"].append(entropies[k][b, t].item())
    assert 0 < sum(terms["policy/clipfrac"]) < len(terms["policy/clipfrac"])
    assert 0 < sum(terms["val/clipfrac"]) < len(terms["val/clipfrac"])
    for name, each in terms.items():
        assert got[name] == pytest.approx(sum(each) / len(each), rel=1e-4, abs=1e-6), name
    assert 0 < got["policy/entropy"] < math.log(VOCABULARY)
    (_, old_values, mask, *_), (_, returns) = gaes[0]
    left = (returns - old_values)[mask].square().mean() / returns[mask].var(correction=0)
    assert got["val/explained_variance"] == pytest.approx(1 - left.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_equal_returns_leave_no_variance_to_explain(tiny, folders, watch):
    """A reward of 0 for every response of an update, as a verifiable reward's may be, is no reason to stop."""
    gaes = watch("gae")
    metrics = ppo.main(tiny(reward=(f"{folders}/reward.py:nothing",), critic="none", kl_coef=0.0, missing_eos_penalty=0.0))
    assert (gaes[0][1][1] == 0).all() and metrics["val/explained_variance"] == 0


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_target_kl_moves_the_coefficient_of_the_next_update(tiny, watch):
    rewards, adapted = watch("token_rewards"), watch("adapted_kl_coef")
    ppo.main(tiny(target_kl=0.5, kl_horizon=40, total_episodes=24, learning_rate=1e-2))
    want = 0.3
    for k, ((_, logprobs, ref_logprobs, mask, kl_coef), _) in enumerate(rewards):
        assert kl_coef == pytest.approx(want, rel=1e-6)
        kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1).mean().item()  # a response, not a token
        assert adapted[k][0][1] == pytest.approx(kl, abs=1e-5)
        error = kl / 0.5 - 1
        want *= 1 + (0.2 if error > 0.2 else -0.2 if error < -0.2 else error) * 8 / 40
    assert rewards[1][0][4] == pytest.approx(0.3 * (1 - 0.2 * 8 / 40))  # KL 0 at the start


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_each_prompt_once_a_pass(tiny, watch):
    rollouts = watch("rollout")
    ppo.main(tiny(total_episodes=24))
    first, *training, last = [[row["prompt"] for row, _ in inputs[3]] for inputs, _ in rollouts]
    assert len(training) == 3 and first == last and len(first) == 2  # evaluations, on held-out prompts
    order = sum(training, [])
    assert len(set(order[:12])) == len(set(order[12:])) == 12 and order[:12] != order[12:]


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_responses_are_never_tokenized_again(tiny, monkeypatch, tmp_path):
    """Sampled ids reach the loss as they are: the same run with a tokenizer that refuses once it has started."""
    want = ppo.main(tiny(output_dir=str(tmp_path / "whole")))
    rollout = ppo.rollout

    def refuse(*_, **__):
        raise AssertionError("text was tokenized within the run")

    def first(*inputs):
        for name in ("__call__", "encode", "apply_chat_template"):
            monkeypatch.setattr(transformers.PreTrainedTokenizerFast, name, refuse)
        return rollout(*inputs)

    monkeypatch.setattr(ppo, "rollout", first)
    got = ppo.main(tiny())
    assert {**got, "tokens_per_second": 0} == {**want, "tokens_per_second": 0}


# ---- The optimum, by enumeration ----

V, T, BETA = 4, 3, 0.5


class World:
    """A reference, a score for each response, and the closed-form optimum pi* = pi_ref exp(r / beta) / Z."""

    def __init__(self, eos=None):
        self.tokens, self.mask = all_responses(V, T, eos)
        self.scores, self.reference = noise(len(self.tokens), seed=50), Tabular(V, T, 20)(self.tokens).detach()
        self.optimum = torch.log_softmax(self.total(self.reference) + self.scores / BETA, 0)

    def total(self, logprobs):
        return torch.where(self.mask, logprobs, 0.0).sum(1)  # log pi(y)

    def objective(self, total):
        """J = E[r] - beta KL(pi || pi_ref), differentiable."""
        return (total.exp() * (self.scores - BETA * (total - self.total(self.reference)))).sum()

    def row_losses(self, policy, values=None, gae_lambda=1.0, beta=BETA, late=False):
        """(the script's loss of each response at ratio 1, its probability): (S, 3), (S,); padding poisoned."""
        logprobs = torch.where(self.mask, policy(self.tokens), 100.0)
        old, reference = logprobs.detach(), torch.where(self.mask, self.reference, -100.0)
        rewards = ppo.token_rewards(self.scores, old, reference, self.mask, beta)
        if late:  # the score on the token behind the last one, and so lost
            rewards = ppo.token_rewards(torch.zeros_like(self.scores), old, reference, self.mask, beta)
        values = torch.zeros_like(rewards) if values is None else values
        advantages, _ = ppo.gae(rewards, values, self.mask, 1.0, gae_lambda)
        losses, _ = ppo.ppo_loss(logprobs, old, advantages, self.mask, 0.2)
        return losses, self.total(old).exp()

    def expected_loss(self, policy, **options):
        losses, weight = self.row_losses(policy, **options)
        return (weight[:, None] * losses).sum()

    def values(self, policy):
        """Exact values: the mean over all responses with the same prefix of what is still to come."""
        logprobs = policy(self.tokens).detach()
        weight, result = self.total(logprobs).exp(), torch.zeros(self.mask.shape, dtype=torch.float64)
        for t in range(T):
            going = self.mask[:, t]
            to_go = self.scores - BETA * torch.where(self.mask, logprobs - self.reference, 0.0)[:, t:].sum(1)
            for i in going.nonzero().flatten().tolist():
                same = going & (self.tokens[:, :t] == self.tokens[i, :t]).all(1)
                result[i, t] = (weight * to_go)[same].sum() / weight[same].sum()
        return result

    def fit(self, steps=300, **options):
        policy = Tabular(V, T, 20)  # from the reference; a short memory, since gradients of rare tokens fall fast
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, betas=(0.9, 0.9), eps=1e-15)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            self.expected_loss(policy, **options).backward()
            optimizer.step()
            schedule.step()
        return self.total(policy(self.tokens)).detach()

    def kl_to_optimum(self, total):
        return (total.exp() * (total - self.optimum)).sum()


@pytest.mark.parametrize("eos", [None, 2])
def test_the_expected_gradient_is_that_of_the_objective(eos):
    """grad E[loss] = -grad (E[r] - beta KL), for no values, for any values at lambda 1, and for exact ones at any."""
    world, policy = World(eos), Tabular(V, T, 3)
    total = world.total(policy(world.tokens))
    assert total.exp().sum().item() == pytest.approx(1.0) and len(total) == (64 if eos is None else 40)
    want = -flat(policy, world.objective(total))
    prefixes = {}  # any function of what precedes the token
    any_values = torch.tensor([[prefixes.setdefault(tuple(row[:t]), math.sin(9 * len(prefixes)))
                                for t in range(T)] for row in world.tokens.tolist()],
                              dtype=torch.float64)  # fmt: skip
    exact, junk = world.values(policy), torch.where(world.mask, 0.0, math.nan)
    for values, gae_lambda in [(None, 1.0), (any_values, 1.0), (exact, 1.0), (exact, 0.5), (exact, 0.0)]:
        values = None if values is None else values + junk
        got = flat(policy, world.expected_loss(policy, values=values, gae_lambda=gae_lambda))
        assert (got - want).abs().max() < 1e-9, gae_lambda
    assert want.abs().max() > 0.05
    biased = flat(policy, world.expected_loss(policy, values=any_values, gae_lambda=0.5))
    assert (biased - want).abs().max() > 1e-2
    for options in (dict(beta=-BETA), dict(beta=0.0), dict(late=True)):
        assert (flat(policy, world.expected_loss(policy, **options)) - want).abs().max() > 1e-2


@pytest.mark.parametrize("eos", [None, 2])
def test_ppo_reaches_the_optimum_of_the_objective(eos):
    """Exact expectations over all responses, on-policy steps of Adam: pi* = pi_ref exp(r / beta) / Z."""
    world = World(eos)
    got = world.fit()
    assert (got - world.optimum).abs().max() < 1e-3 and BETA * world.kl_to_optimum(got) < 1e-9
    other = world.total(Tabular(V, T, 9)(world.tokens)).detach()
    for total in (got, other, world.total(world.reference)):
        gap = world.objective(world.optimum) - world.objective(total)
        assert gap.item() == pytest.approx(BETA * world.kl_to_optimum(total).item(), abs=1e-12)
    assert BETA * world.kl_to_optimum(world.total(world.reference)) > 0.3


def test_controls_do_not_reach_it():
    """The penalty's sign flipped, the penalty dropped, the score one position late."""
    world = World()
    for options in (dict(beta=-BETA), dict(beta=0.0), dict(late=True)):
        got = world.fit(steps=150, **options)
        assert (got - world.optimum).abs().max() > 0.5 and BETA * world.kl_to_optimum(got) > 0.05, options


def test_reinforce_on_samples_is_within_its_confidence_interval():
    """20,000 responses, no critic: the mean gradient against the enumerated one, by its exact covariance, in all
    coordinates whose token is drawn a hundred times. Without the KL in the reward the same samples are far off."""
    world, policy, n = World(2), Tabular(V, T, 3), 20_000
    total = world.total(policy(world.tokens))
    want, probability = -flat(policy, world.objective(total)), total.detach().exp()
    drawn = torch.multinomial(probability, n, replacement=True, generator=torch.Generator().manual_seed(7))
    counts = torch.bincount(drawn, minlength=len(probability)).double()
    reached = torch.stack([flat(policy, x) for x in policy(world.tokens)[world.mask]]) > 0  # the token drawn
    used = probability.repeat_interleave(world.mask.sum(1)) @ reached.double() * n > 100

    def each_gradient(**options):
        return torch.stack([flat(policy, x) for x in world.row_losses(policy, **options)[0].sum(1)])[:, used]

    errors = each_gradient() - want[used]
    covariance = torch.einsum("s,sa,sb->ab", probability, errors, errors) / n
    precision = torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True)
    assert used.sum() == 38 and torch.linalg.matrix_rank(covariance, rtol=1e-9) == 31
    error = counts @ errors / n
    assert (error / covariance.diagonal().sqrt()).abs().max() < 4.3  # 99.9 % for all of them together
    assert 11 < error @ precision @ error < 61.1  # 99.9 % of chi-square with 31 degrees of freedom
    biased = counts @ each_gradient(beta=0.0) / n - want[used]
    assert (biased / covariance.diagonal().sqrt()).abs().max() > 10 and biased @ precision @ biased > 1000


# ---- It learns, and learns nothing from noise ----

@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_it_learns_from_rewards_and_nothing_from_noise(tiny, folders, tmp_path):
    """Share of one word: from 0.01 to above 0.75 in 30 updates; with rewards shuffled over the rows it stays, and with
    their sign flipped it falls."""

    def run(name, model, output_dir):
        return ppo.main(tiny(
            model=model, reward=(f"{folders}/reward.py:{name}",), critic="none", total_episodes=960, batch_size=32,
            num_minibatches=1, update_epochs=1, micro_batch_size=32, max_new_tokens=8, learning_rate=3e-3,
            anneal_lr=False, kl_coef=0.0, missing_eos_penalty=0.0, gae_lambda=1.0, eval_samples=256,
            output_dir=output_dir))  # fmt: skip

    share = shares_of_a_word(run, tmp_path, "eval/objective/scores")
    assert all(0.005 < before < 0.02 for before, _ in share.values())
    assert share["fraction"][1] > 0.75 and share["shuffled"][1] < 0.02
    assert share["flipped"][1] < share["flipped"][0] / 2
