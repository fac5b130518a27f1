"""PPO: rewards, advantages and losses by hand, by loops and by enumeration; rollouts, critic and whole updates
of ppo.main against single rows, float64 autograd and the closed-form optimum.
"""

import contextlib
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from common import encode
from conftest import (
    CHAT_TEMPLATE, LENGTHS, MASK, POISON, STOPS, VOCABULARY, double_loads, make_model, noise, poisoned,
    pure, ragged_rows, sides, watching, word_tokenizer)
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppo

CPU = torch.device("cpu")


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


# ---- Advantages ----


def double_sum(rewards, values, mask, gamma, gae_lambda):
    """sum_s (gamma lambda)^(s - t) delta_s over s >= t, of each row's own tokens alone: (B, R), float64."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for b, n in enumerate(mask.sum(1).tolist()):
        r, v = rewards[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]
        for t in range(n):
            terms = [(gamma * gae_lambda) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, n)]
            result[b, t] = math.fsum(terms)
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, gae_lambda, dtype, tolerance):
    rewards, values = noise(4, 16, seed=1, dtype=dtype), noise(4, 16, seed=2, dtype=dtype)
    want = double_sum(rewards, values, MASK, gamma, gae_lambda)
    advantages, returns = pure(ppo.gae, rewards, values, MASK, gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == dtype
    assert (advantages - want).abs().max() < tolerance
    assert (returns - torch.where(MASK, want + values, 0.0)).abs().max() < tolerance
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


@pytest.mark.parametrize("poison", POISON)
def test_gae_never_sees_the_padding(poison):
    rewards, values = noise(4, 16, seed=1), noise(4, 16, seed=2)
    want = ppo.gae(rewards, values, MASK, 0.9, 0.8)
    got = pure(ppo.gae, poisoned(rewards, poison), poisoned(values, poison), MASK, 0.9, 0.8)
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


def test_rewards_by_loops():
    """The score at the last real token, the first row's being the last of all; -beta log pi / pi_ref everywhere."""
    scores, logprobs, ref = noise(4, seed=3), noise(4, 16, seed=4), noise(4, 16, seed=5)
    rewards = pure(ppo.token_rewards, scores, logprobs, ref, MASK, 0.3)
    for b, n in enumerate(LENGTHS):
        for t in range(16):
            kl = (logprobs[b, t] - ref[b, t]).item() if t < n else 0.0
            want = -0.3 * kl + (scores[b].item() if t == n - 1 else 0.0)
            assert rewards[b, t].item() == pytest.approx(want, abs=1e-12)
    total = scores - 0.3 * torch.where(MASK, logprobs - ref, 0.0).sum(1)
    assert (rewards.sum(1) - total).abs().max() < 1e-12
    assert (rewards[~MASK] == 0).all()


@pytest.mark.parametrize("poison", POISON)
def test_rewards_never_see_the_padding(poison):
    scores, logprobs, ref = noise(4, seed=3), noise(4, 16, seed=4), noise(4, 16, seed=5)
    want = ppo.token_rewards(scores, logprobs, ref, MASK, 0.3)
    for x, y in [(logprobs, poisoned(ref, poison)), (poisoned(logprobs, poison), ref),
                 (poisoned(logprobs, poison), poisoned(ref, poison))]:  # fmt: skip
        assert torch.equal(pure(ppo.token_rewards, scores, x, y, MASK, 0.3), want)


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


@pytest.mark.parametrize("poison", [*POISON, 100.0])
def test_policy_loss_never_sees_the_padding(poison):
    """exp(log-ratio) of 100 overflows in fp32: masked behind it, the gradient would be 0 * inf."""
    results = []
    for dirty in (False, True):
        logprobs, old, advantages = (noise(4, 16, seed=s, dtype=torch.float32) for s in (11, 12, 13))
        if dirty:
            logprobs, advantages = poisoned(logprobs, poison), poisoned(advantages, poison)
            old = poisoned(old, 0.0 if poison == 100.0 else poison)
        logprobs.requires_grad_()
        losses, ratio = pure(ppo.ppo_loss, logprobs, old, advantages, MASK, 0.2)
        losses.sum().backward()
        results.append((losses.detach(), ratio.detach(), logprobs.grad))
        assert (losses[~MASK] == 0).all() and (ratio[~MASK] == 1).all() and (logprobs.grad[~MASK] == 0).all()
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


@pytest.mark.parametrize("poison", POISON)
def test_value_loss_never_sees_the_padding(poison):
    inputs = [noise(4, 16, seed=s, dtype=torch.float32) for s in (14, 15, 16)]
    want = critic_loss(*inputs, 0.2, MASK)
    assert all(map(torch.equal, critic_loss(*[poisoned(x, poison) for x in inputs], 0.2, MASK), want))


@pytest.mark.parametrize("eps", [0.0, 100.0])
def test_a_clip_that_is_never_reached_never_decides(eps):
    """Rounding of V_old + (V - V_old) in fp32 is no clipping."""
    values, old_values, returns = (noise(200, 16, seed=s, dtype=torch.float32) for s in (14, 15, 16))
    _, _, clipped = critic_loss(values, old_values, returns, eps)
    assert not clipped.any()


# ---- Models and folders ----

MEAN = 0.37  # reward_mean of the reward models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """llama and gpt2: a policy each, and a reward model with another body, with prompts of 2 to 6 tokens."""
    folder = tmp_path_factory.mktemp("folders")
    for kind in ("llama", "gpt2"):
        model = make_model(kind)
        model.generation_config.eos_token_id = STOPS
        config = make_model(kind, seed=5).config
        config.num_labels, config.reward_mean, config.held_out_accuracy = 1, MEAN, 0.9
        reward = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for part, name in ((model, kind), (reward, f"{kind}-reward")):
            part.save_pretrained(folder / name)
            word_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": " ".join(f"w{4 + (7 * i + 5 * j) % 90}" for j in range(2 + i % 5))} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tiny(folders, kind, tmp_path):
    """tiny(**flags) -> Args of a run of one update: 8 responses, two minibatches of four, two epochs."""

    def make(**flags):
        data = str(folders / "prompts.jsonl")
        defaults = {
            "model": str(folders / kind), "reward": str(folders / f"{kind}-reward"), "dataset": data,
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


def make_batch(prompts, responses):
    lengths = torch.tensor(list(map(len, responses)))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {"prompts": prompts, "responses": responses, "mask": mask}


def score_logprobs(model, batch, temperature=1.0, index=None):
    index = torch.arange(len(batch["prompts"])) if index is None else index
    args = ppo.Args(temperature=temperature)
    return ppo.response_logprobs(model, batch, index, args, contextlib.nullcontext, entropy=True)


def naive_response(model, prompt, response, temperature=1.0):
    """[(log pi(y_t), entropy)] of one response: a forward pass of the prefix alone for each token, in float64."""
    result = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double() / temperature
        logp = torch.log_softmax(logits, -1)
        result.append((logp[token], -(logp.exp() * logp).sum()))
    return result


# ---- Responses and their positions ----


def test_collate_and_align():
    prompts, responses = [[5, 6], [7]], [[0, 8, 0], [9]]  # id 0, the padding's, is a token too
    input_ids, mask = ppo.collate(prompts, responses, CPU)
    assert input_ids.tolist() == [[5, 6, 0, 8, 0], [7, 9, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    x = torch.arange(10.0).view(2, 5)
    assert ppo.align(x, mask, 4).tolist() == [[2, 3, 4, 0], [6, 0, 0, 0]]
    assert ppo.align(poisoned(x, math.nan, mask), mask, 4).tolist() == [[2, 3, 4, 0], [6, 0, 0, 0]]


def test_values_are_read_before_their_token():
    """A critic whose value is its position: for a prompt of 4 and a response of 3 tokens 3, 4, 5."""

    def positions(input_ids, use_cache):
        place = torch.arange(input_ids.shape[1], dtype=torch.float32)
        return SimpleNamespace(last_hidden_state=place.expand(input_ids.shape)[..., None])

    score = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(score.weight)
    critic = SimpleNamespace(base_model=positions, score=score, device=CPU)
    batch = make_batch([[5] * 4, [5] * 2], [[6, 7, 2], [6, 7, 8, 9, 2]])
    values = ppo.response_values(critic, batch, torch.tensor([0, 1]), contextlib.nullcontext)
    assert values.tolist() == [[3, 4, 5, 0, 0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_by_loops_over_prefixes(model, temperature):
    prompts, responses = sides(ragged_rows())
    with torch.no_grad():
        logprobs, entropy = score_logprobs(model, make_batch(prompts, responses), temperature)
        assert logprobs.shape == entropy.shape == (4, 16)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            for t, (logp, h) in enumerate(naive_response(model, prompt, response, temperature)):
                assert logprobs[i, t].item() == pytest.approx(logp.item(), abs=2e-5)
                assert entropy[i, t].item() == pytest.approx(h.item(), abs=2e-5)
    assert (logprobs[~MASK] == 0).all() and (entropy[~MASK] == 0).all()


def test_a_row_alone_equals_the_row_in_a_batch(model):
    batch = make_batch(*sides(ragged_rows()))
    with torch.no_grad():
        together = score_logprobs(model, batch)[0]
        for i in (3, 1, 0, 2):
            alone = score_logprobs(model, batch, index=torch.tensor([i]))[0]
            assert alone.shape == (1, 16) and (alone[0] - together[i]).abs().max() < 1e-5
        order = torch.tensor([2, 0, 3])
        assert (score_logprobs(model, batch, index=order)[0] - together[order]).abs().max() < 1e-5


def load(args):
    """(reward function, reward model, critic, the reward model as transformers loads it)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    reward, model = ppo.load_reward(args.reward, tokenizer, [2, 7], args, CPU, contextlib.nullcontext)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward).eval()
    own = own.to(next(model.parameters()).dtype)
    policy = ppo.load_model(args, CPU)[0]
    return reward, model, ppo.load_critic(args, policy, model, CPU), own


def test_critic_is_the_reward_model_at_every_prefix(tiny, double):
    """Scores are the model's own, less reward_mean, each row alone; the critic's value of each prefix is the score
    it would have: nothing of a response reaches the value before it, and everything of it the one behind."""
    args = tiny(micro_batch_size=2)
    reward, _, critic, own = load(args)
    batch = make_batch(*sides(ragged_rows(seed=3)))
    with torch.no_grad():
        values = ppo.response_values(critic, batch, torch.arange(4), contextlib.nullcontext)
        scores = reward([{}] * 4, batch["prompts"], batch["responses"])
        after = ppo.token_values(critic, ppo.collate(batch["prompts"], batch["responses"], CPU)[0])
        for i, (prompt, response) in enumerate(zip(batch["prompts"], batch["responses"])):
            for t in range(len(response)):
                want = own(torch.tensor([prompt + response[:t]])).logits[0, 0].item() - MEAN
                assert values[i, t].item() == pytest.approx(want, abs=1e-6)
            want = own(torch.tensor([prompt + response])).logits[0, 0].item() - MEAN
            assert scores[i].item() == pytest.approx(want, abs=1e-6)
            assert after[i, len(prompt + response) - 1].item() == pytest.approx(scores[i].item(), abs=1e-6)
        assert values.shape == (4, 16) and (values[~MASK] == 0).all() and values[MASK].std() > 0.1
        for t in (0, 2, 6):  # another token t of the third response
            responses = [list(response) for response in batch["responses"]]
            responses[2][t] = 50 if responses[2][t] != 50 else 51
            changed = ppo.response_values(
                critic, {**batch, "responses": responses}, torch.arange(4), contextlib.nullcontext)  # fmt: skip
            difference = (changed - values).abs()
            assert difference[:, : t + 1].max() < 1e-6 and difference[2, t + 1 : 8].min() > 1e-4
            assert difference[[0, 1, 3]].max() < 1e-6


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


def test_critic_of_the_policy_starts_at_zero(tiny, kind):
    _, _, critic, _ = load(tiny(critic="policy"))
    batch = make_batch(*sides(ragged_rows()))
    values = ppo.response_values(critic, batch, torch.arange(4), contextlib.nullcontext)
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
    args = ppo.Args(model=str(tmp_path / "model"), reward=str(tmp_path / "reward"), critic=critic)
    _, reward_model, critic, _ = load(args)
    input_ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    for part in (ppo.load_model(args, CPU)[0], reward_model, critic):
        once, again = (part.base_model(input_ids).last_hidden_state for _ in range(2))
        assert torch.equal(once, again), type(part).__name__


# ---- Rollouts ----


def roll(policy, reference, reward, prompts, stops, **flags):
    args = ppo.Args(**{"max_new_tokens": 12, "micro_batch_size": 2, "missing_eos_penalty": 0.75, **flags})
    rows = [({"prompt": "", "number": i}, ids) for i, ids in enumerate(prompts)]
    return ppo.rollout(policy, reference, reward, rows, stops, 0.3, args, contextlib.nullcontext, 1)


def test_unfinished_rows_pay_and_masks_come_from_lengths(model, monkeypatch):
    """EOS early, EOS in the last slot, no EOS, another EOS of several, and the padding's id within a text."""
    rows = [[9, 2], [9, 8, 7, 6, 2], [9, 8, 2 + 1, 7, 6], [5, 60], [0, 9, 0, 2]]
    tokens = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    lengths = torch.tensor(list(map(len, rows)))
    monkeypatch.setattr(ppo, "sample", lambda *_: (tokens, torch.zeros(tokens.shape), lengths))
    seen = {}

    def reward(data, prompts, responses):
        seen.update(numbers=[row["number"] for row in data], prompts=prompts, responses=responses)
        return torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    prompts = [[4], [5, 6], [7], [8, 9, 10], [11]]
    batch, metrics = roll(model, model, reward, prompts, [2, 60])
    assert seen == {"numbers": [0, 1, 2, 3, 4], "prompts": prompts, "responses": rows}  # the EOS is scored too
    assert batch["scores"].tolist() == [1, 2, 3 - 0.75, 4, 5]
    assert metrics["completions/eos_rate"] == pytest.approx(4 / 5)
    assert batch["mask"].sum(1).tolist() == [2, 5, 5, 2, 4]
    assert torch.equal(batch["mask"], torch.arange(5) < lengths[:, None])
    assert batch["responses"] == rows and metrics["completions/mean_length"] == pytest.approx(18 / 5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_its_metrics_by_loops(model, temperature):
    """KL, entropy and log-probs of both models from forward passes of single prefixes; policy and reference differ."""
    reference, prompts = make_model("gpt2", seed=7), sides(ragged_rows())[0] * 2
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 0.25, 2.0])
    batch, metrics = roll(model, reference, lambda *_: scores, prompts, STOPS, temperature=temperature,
                          max_new_tokens=8)  # fmt: skip
    finished, kls, entropies = [], [], []
    with torch.no_grad():
        for i, response in enumerate(batch["responses"]):
            n = len(response)
            assert not set(response[:-1]) & set(STOPS) and (n == 8 or response[-1] in STOPS)
            finished.append(response[-1] in STOPS)
            p, q = (naive_response(m, prompts[i], response, temperature) for m in (model, reference))
            p, q = (torch.stack([logp for logp, _ in x]) for x in (p, q))
            assert (batch["logprobs"][i, :n] - p).abs().max() < 5e-5
            assert (batch["ref_logprobs"][i, :n] - q).abs().max() < 5e-5
            assert (batch["logprobs"][i, n:] == 0).all() and (batch["ref_logprobs"][i, n:] == 0).all()
            assert batch["mask"][i].tolist() == [t < n for t in range(batch["mask"].shape[1])]
            kls.append((p - q).sum().item())
            entropies.append(-p.sum().item())
    assert len(set(map(len, batch["responses"]))) > 2 and any(finished) and not all(finished)
    assert batch["kl"].tolist() == pytest.approx(kls, abs=5e-4)
    paid = [score - 0.75 * (not done) for score, done in zip(scores.tolist(), finished)]
    assert batch["scores"].tolist() == pytest.approx(paid)
    mean = lambda x: sum(x) / len(x)
    assert metrics == pytest.approx({
        "objective/scores": mean(paid), "objective/kl": mean(kls), "objective/entropy": mean(entropies),
        "objective/non_score_reward": -0.3 * mean(kls), "objective/rlhf_reward": mean(paid) - 0.3 * mean(kls),
        "completions/mean_length": mean(list(map(len, batch["responses"]))),
        "completions/eos_rate": mean(finished)}, abs=5e-4)  # fmt: skip
    assert not any(x.requires_grad for x in batch.values() if torch.is_tensor(x))


# ---- Prompts ----


TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "help"},
        {"role": "user", "content": "help me"}]  # fmt: skip


def test_prompts_are_prefixes_of_what_sft_trains_on(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", CHAT_TEMPLATE)
    rows = [{"prompt": "Answer: ", "_where": "x:1"}, {"prompt": TALK, "_where": "x:2", "extra": 7}]
    (first, plain), (second, chat) = ppo.load_prompts(bpe_tokenizer, rows, [2], 99)
    assert first == {**rows[0], "extra": None, "_end": 2} and second == {**rows[1], "_end": 2}
    assert plain == [1, *bpe_tokenizer("Answer: ", add_special_tokens=False)["input_ids"]]
    assert chat == bpe_tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert bpe_tokenizer.decode(chat).endswith("<user>help me</s>\n<assistant>")
    for row, ids, completion in [(rows[0], plain, "hello"), (rows[0], plain, "\nhe"),
                                 (rows[1], chat, [{"role": "assistant", "content": "hello there"}])]:  # fmt: skip
        ((trained_on, trained),) = encode(bpe_tokenizer, [{**row, "completion": completion}], [2], 999)
        assert trained_on[: trained.index(True)] == ids and ids.count(1) == 1


def test_long_prompts_are_dropped_and_counted(bpe_tokenizer, capsys):
    rows = [{"prompt": text, "_where": "x:1"} for text in ("hello", "hello there, help me! " * 9, "help")]
    kept = ppo.load_prompts(bpe_tokenizer, rows, [2], 8)
    assert [row["prompt"] for row, _ in kept] == ["hello", "help"] and all(len(ids) <= 8 for _, ids in kept)
    assert "1 of 3 prompts" in capsys.readouterr().out
    exact = max(len(ids) for _, ids in kept)
    assert len(ppo.load_prompts(bpe_tokenizer, rows, [2], exact)) == 2
    with pytest.raises(SystemExit):
        ppo.load_prompts(bpe_tokenizer, rows[1:2], [2], 8)


def test_an_empty_prompt_without_bos_is_not_made_up():
    """There is no state to act in: the row is refused or dropped, not prompted with some token."""
    for empty in ("", " "):  # this tokenizer has no token for a space
        rows = [{"prompt": empty, "_where": "x:1"}, {"prompt": "w5 w9", "_where": "x:2"}]
        with contextlib.suppress(SystemExit):
            assert [ids for _, ids in ppo.load_prompts(word_tokenizer(), rows, [2], 8)] == [[5, 9]]


# ---- Whole updates ----


def same_rows(x, rows):
    """Each row of x is, to the bit, one of these rows."""
    return all((row == rows).all(1).any() for row in x)


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
    ((_, (_, reward_model)),), ((_, critic),) = rewards, critics
    groups = [{x.data_ptr() for x in part.state_dict().values()}
              for part in (policy, reference, reward_model, critic)]  # fmt: skip
    assert sum(map(len, groups)) == len(set().union(*groups))
    fresh, (_, fresh_reward, *_) = ppo.load_model(args, CPU)[0], load(args)
    for part, start in ((reference, fresh), (reward_model, fresh_reward)):
        want = start.state_dict()
        assert all(torch.equal(x, want[name]) for name, x in part.state_dict().items())
        assert not part.training and not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert not torch.equal(next(policy.parameters()), next(fresh.parameters()))
    (_, logprobs, ref_logprobs, mask, _), _ = seen[-1]
    assert torch.where(mask, logprobs - ref_logprobs, 0.0).abs().max() > 1e-2 and metrics["eval/objective/kl"]


def by_loops(rewards_call, values, args):
    """Raw advantages (B, R), from the inputs of token_rewards, in float64."""
    scores, logprobs, ref_logprobs, mask, kl_coef = rewards_call
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for b, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            rewards[b, t] = -kl_coef * (logprobs[b, t].item() - ref_logprobs[b, t].item())
        rewards[b, n - 1] += scores[b].item()
    return double_sum(rewards, values, mask, args.gamma, args.gae_lambda)


@pytest.mark.parametrize("critic", ["reward", "none"])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_an_update_by_loops_over_single_rows(tiny, watch, double, critic, norm_adv):
    """Advantages whitened over all tokens of the update, returns from the raw ones; and the gradients of the first
    optimizer step: -A grad log pi (REINFORCE) and (V - G) grad V, summed over its rows one at a time."""
    rewards, advantages, losses = watch("token_rewards"), watch("gae"), watch("ppo_loss")
    value_losses, scored, loaded = watch("value_loss"), watch("response_logprobs"), watch("load_model")
    args = tiny(critic=critic, norm_adv=norm_adv, micro_batch_size=2, gamma=0.97, gae_lambda=0.9, kl_coef=0.3,
                max_grad_norm=1e9, total_episodes=16, learning_rate=5e-3, update_epochs=1)  # fmt: skip
    steps = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(
        ([[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups],
         [[None if p.grad is None else p.grad.clone() for p in group["params"]]
          for group in optimizer.param_groups])))  # fmt: skip
    try:
        ppo.main(args)
    finally:
        hook.remove()
    assert len(steps) == 4 and len(rewards) == len(advantages) == 2 and len(losses) == 8
    call, ((_, old_values, mask, *_), _) = rewards[1][0], advantages[1]  # the second update: pi is not pi_ref
    assert torch.where(mask, call[1] - call[2], 0.0).abs().max() > 1e-3
    raw = by_loops(call, old_values, args)
    returns, tokens = raw + torch.where(mask, old_values, 0.0), raw[mask]
    want = (raw - tokens.mean()) / tokens.std(correction=0) if norm_adv else raw
    assert (old_values == 0).all() == (critic == "none")

    parameters, gradients = steps[2]
    calls = [inputs for inputs, _ in scored if inputs[0].training][4:]  # the policy's, not the reference's
    batch, numbers = calls[0][1], torch.cat([inputs[2] for inputs in calls])
    assert sorted(numbers.tolist()) == list(range(8)) and numbers.tolist() != list(range(8))  # each once, shuffled
    for k, inputs in enumerate(calls):
        (_, old, advantage, m, _), _ = losses[4 + k]
        index = inputs[2]
        assert torch.equal(old, call[1][index]) and torch.equal(m, mask[index])
        assert (torch.where(m, advantage - want[index], 0.0)).abs().max() < 1e-6
        if critic != "none":
            (_, old, target, *_), _ = value_losses[4 + k]
            assert torch.equal(old, old_values[index])
            assert torch.where(m, target - returns[index], 0.0).abs().max() < 1e-9

    policy = loaded[0][1][0]
    value = None if critic == "none" else load(args)[2]
    rows = numbers[:4].tolist()
    count = sum(len(batch["responses"][j]) for j in rows)
    for part, weights, gradient in zip([policy, value], parameters, gradients):
        with torch.no_grad():
            for p, weight in zip(part.parameters(), weights):
                p.copy_(weight)
        part.eval().zero_grad()  # without the dropout that a TokenClassification class has before its head
        for j in rows:
            prompt, response = batch["prompts"][j], batch["responses"][j]
            out = part(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            for t, token in enumerate(response):
                if part is policy:
                    loss = -want[j, t] * torch.log_softmax(out[t], -1)[token]
                else:
                    loss = (out[t, 0] - returns[j, t]).square() / 2
                (loss / count).backward(retain_graph=True)
        error = [(p.grad - g).norm() if g is not None else p.grad.norm()
                 for p, g in zip(part.parameters(), gradient) if p.grad is not None]  # fmt: skip
        size = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert torch.stack(error).norm() < 1e-6 * size and size > 1e-3


def test_micro_batches_change_no_gradient_and_no_metric(tiny, watch, double, tmp_path):
    """Guard: micro-batch invariance, of all optimizer steps of an update, in float64."""
    losses, returns, seen = watch("ppo_loss"), watch("gae"), {}
    for micro in (4, 2, 1):
        steps = []
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_, steps=steps: steps.append(torch.cat(
            [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]
             if p.grad is not None])))  # fmt: skip
        try:
            first = len(losses)
            metrics = ppo.main(tiny(micro_batch_size=micro, max_grad_norm=1e9, output_dir=str(tmp_path / f"{micro}")))
        finally:
            hook.remove()
        used = torch.cat([inputs[2] for inputs, _ in losses[first:]])
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
    losses, values, scored = watch("ppo_loss"), watch("value_loss"), watch("response_logprobs")
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


def all_responses(eos):
    """(tokens, mask), (S, 3) each: the 64 responses of three tokens; with an EOS the 40 that end at it or there."""
    rows = {row[: row.index(eos) + 1] if eos in row else row for row in itertools.product(range(V), repeat=T)}
    rows = sorted(rows)
    tokens = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])
    return tokens, torch.arange(T) < torch.tensor(list(map(len, rows)))[:, None]


class Tabular(torch.nn.Module):
    """An autoregressive policy with free logits behind each prefix."""

    def __init__(self, seed):
        super().__init__()
        self.logits = torch.nn.ParameterList(noise(V**t, V, seed=seed + t) for t in range(T))

    def forward(self, tokens):
        result, prefix = [], torch.zeros(len(tokens), dtype=torch.long)
        for t in range(T):
            result.append(torch.log_softmax(self.logits[t], -1)[prefix, tokens[:, t]])
            prefix = prefix * V + tokens[:, t]
        return torch.stack(result, 1)  # log pi(y_t | y_<t), also of tokens behind the end


class World:
    """A reference, a score for each response, and the closed-form optimum pi* = pi_ref exp(r / beta) / Z."""

    def __init__(self, eos=None):
        self.tokens, self.mask = all_responses(eos)
        self.scores, self.reference = noise(len(self.tokens), seed=50), Tabular(20)(self.tokens).detach()
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
        policy = Tabular(20)  # from the reference; a short memory, since gradients of rare tokens fall fast
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


def flat(policy, value):
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("eos", [None, 2])
def test_the_expected_gradient_is_that_of_the_objective(eos):
    """grad E[loss] = -grad (E[r] - beta KL), for no values, for any values at lambda 1, and for exact ones at any."""
    world, policy = World(eos), Tabular(3)
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
    other = world.total(Tabular(9)(world.tokens)).detach()
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
    world, policy, n = World(2), Tabular(3), 20_000
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

REWARD = """
import random
draw = random.Random(0)

def fraction(completions, **columns):
    return [text.split().count("w23") / 8 for text in completions]

def shuffled(completions, **columns):
    return draw.sample(fraction(completions), len(completions))

def flipped(completions, **columns):
    return [-x for x in fraction(completions)]
"""


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_it_learns_from_rewards_and_nothing_from_noise(tiny, tmp_path):
    """Share of one word: from 0.01 to above 0.75 in 30 updates; with rewards shuffled over the rows it stays, and with
    their sign flipped it falls."""
    config = make_model("llama").config
    config.num_hidden_layers, model = 2, str(tmp_path / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    (tmp_path / "reward.py").write_text(REWARD)
    share = {}
    for name in ("fraction", "shuffled", "flipped"):
        metrics = ppo.main(tiny(
            model=model, reward=f"{tmp_path}/reward.py:{name}", critic="none", total_episodes=960, batch_size=32,
            num_minibatches=1, update_epochs=1, micro_batch_size=32, max_new_tokens=8, learning_rate=3e-3,
            anneal_lr=False, kl_coef=0.0, missing_eos_penalty=0.0, gae_lambda=1.0, eval_samples=256,
            output_dir=str(tmp_path / name)))  # fmt: skip
        first = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        share[name] = [abs(x["eval/objective/scores"]) for x in (first, metrics)]
    assert all(0.005 < before < 0.02 for before, _ in share.values())
    assert share["fraction"][1] > 0.75 and share["shuffled"][1] < 0.02
    assert share["flipped"][1] < share["flipped"][0] / 2
