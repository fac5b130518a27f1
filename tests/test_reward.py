"""The reward model: its losses against closed forms and enumeration, its scores against transformers' own forward
on single rows, and what others get out of the saved folder.
"""

import copy
import itertools
import json
import math
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import ppo
import pytest
import reward_model
import torch
import transformers
from common import (
    check_model, encode, load_prompts, load_reward, masked_whiten, pad, read_rows, token_values)  # fmt: skip
from conftest import CHAT_TEMPLATE, flat_gradient, make_model, ragged_rows
from reward_model import bradley_terry_loss, calibration, load_comparisons, plackett_luce_loss
from torch.optim.optimizer import register_optimizer_step_pre_hook

CPU, PAD, EOS = torch.device("cpu"), 0, 2
KINDS = ["llama", "gpt2"]


def doubles(*values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


# ---- Bradley-Terry ----


@pytest.mark.parametrize(
    "h, mu, value, slope",
    [
        (0.0, 1.0, math.log(2), -0.5),
        (0.0, 0.25, math.log(2), 0.25),
        (0.0, 0.5, math.log(2), 0.0),
        (1.0, 1.0, 0.313262, -0.268941),
        (1.0, 0.0, 1.313262, 0.731059),
        (math.log(4), 0.8, 0.500402, 0.0),  # the minimum is where sigma(h) = mu, and the loss there mu's entropy
        (-2000.0, 1.0, 2000.0, -1.0),  # log(sigmoid(-2000)) would be -inf with a NaN gradient
        (2000.0, 1.0, 0.0, 0.0),
        (2000.0, 0.0, 2000.0, 1.0),
        (-2000.0, 0.5, 1000.0, -0.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_by_hand(h, mu, value, slope, dtype):
    first, second = (torch.tensor([x, x], dtype=dtype, requires_grad=True) for x in (h / 2, -h / 2))
    losses = bradley_terry_loss(first, second, torch.tensor([mu, mu], dtype=dtype))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([value] * 2, abs=1e-6)
    assert first.grad.tolist() == pytest.approx([slope] * 2, abs=1e-6)
    assert second.grad.tolist() == pytest.approx([-slope] * 2, abs=1e-6)


def slopes(h, mu):
    """(loss, d loss / d h) at margins h, each mu against each h: lists of equal length."""
    h = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    losses = bradley_terry_loss(h, torch.zeros_like(h), torch.tensor(mu, dtype=torch.float64))
    losses.sum().backward()
    return losses.tolist(), h.grad.tolist()


def test_gradient_is_probability_less_label_and_soft_labels_are_expectations():
    margins, labels = map(list, zip(*itertools.product((-7.0, -0.4, 0.0, 0.3, 6.0), (0.0, 0.2, 0.5, 1.0))))
    values, gradients = slopes(margins, labels)
    wins, losses = (slopes(margins, [side] * len(margins)) for side in (1.0, 0.0))
    for k, (h, mu) in enumerate(zip(margins, labels)):
        assert gradients[k] == pytest.approx(-(mu - 1 / (1 + math.exp(-h))), abs=1e-12)
        assert values[k] == pytest.approx(mu * wins[0][k] + (1 - mu) * losses[0][k], abs=1e-12)
        assert gradients[k] == pytest.approx(mu * wins[1][k] + (1 - mu) * losses[1][k], abs=1e-12)
        step = 1e-6
        up, down = (slopes([h + d], [mu])[0][0] for d in (step, -step))
        assert gradients[k] == pytest.approx((up - down) / (2 * step), abs=1e-8)


def test_a_tie_pulls_rewards_together_and_not_past_each_other():
    _, (apart, behind, level) = slopes([3.0, -3.0, 0.0], [0.5] * 3)
    assert apart > 0.4 and behind == -apart and level == 0.0


def test_shift_changes_nothing_and_scale_does():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(-64, 64, (2, 7), generator=generator) / 8  # exact in binary, also when shifted
    mu = torch.rand(7, generator=generator)
    losses = bradley_terry_loss(first, second, mu)
    assert torch.equal(losses, bradley_terry_loss(first + 1024, second + 1024, mu))
    assert (losses - bradley_terry_loss(2 * first, 2 * second, mu)).abs().max() > 0.5


def minimize(parameters, loss):
    optimizer = torch.optim.LBFGS(parameters, max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_linear_rewards_are_logistic_regression_on_differences_of_features():
    """300 sampled labels, ties among them; against Newton's method for logistic regression without intercept."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 300, 5, generator=generator, dtype=torch.float64)
    truth = doubles(1.0, -0.5, 0.0, 0.7, 2.0)
    mu = (torch.rand(2, 300, generator=generator) < torch.sigmoid((a - b) @ truth)).double().mean(0)
    assert set(mu.tolist()) == {0.0, 0.5, 1.0}
    design, want = a - b, torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        p = 1 / (1 + (-(design @ want)).exp())
        want = want + torch.linalg.solve((design.T * (p * (1 - p))) @ design, design.T @ (mu - p))
    got = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    minimize([got], lambda: bradley_terry_loss(a @ got, b @ got, mu).sum())
    assert (got - want).abs().max() < 1e-7
    assert (got - truth).abs().max() < 1.0 and want.norm() > 1


def test_population_labels_recover_the_rewards_up_to_a_constant():
    truth = doubles(1.0, 0.5, 0.0, -0.5, 2.0, -3.0)
    i, j = map(list, zip(*itertools.combinations(range(6), 2)))
    weights = truth.exp()
    mu = weights[i] / (weights[i] + weights[j])  # P(i beats j), in the form without the sigmoid
    got = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    minimize([got], lambda: bradley_terry_loss(got[i], got[j], mu).mean())
    assert ((got - got.mean()) - (truth - truth.mean())).abs().max() < 1e-4
    tied = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    minimize([tied], lambda: bradley_terry_loss(tied[i], tied[j], torch.full((15,), 0.5)).mean())
    assert tied.std() < 1e-4  # nothing but ties: all are equal


# ---- Plackett-Luce ----


def luce(rewards, order):
    """-log of the probability of this order, best first: each is chosen among those that are left. (), float64."""
    total = 0.0
    for k in range(len(order)):
        total = total - rewards[order[k]] + sum(rewards[i].exp() for i in order[k:]).log()
    return total


def orders(ranking):
    """All orders, best first, that the ranking allows: those that differ only in how they break its ties."""
    found = itertools.permutations(range(len(ranking)))
    return [order for order in found if [ranking[i] for i in order] == sorted(ranking)]


def test_plackett_luce_of_two_is_bradley_terry():
    for r in (doubles(0.3, -1.1), doubles(-4.0, 2.0), doubles(600.0, -600.0)):
        log_odds = (r[0] - r[1]).item()
        first_wins, second_wins = (max(-h, 0) + math.log1p(math.exp(-abs(h))) for h in (log_odds, -log_odds))
        assert plackett_luce_loss(r, [1, 2]).item() == pytest.approx(first_wins, abs=1e-9)
        assert plackett_luce_loss(r, [2, 1]).item() == pytest.approx(second_wins, abs=1e-9)
        assert plackett_luce_loss(r, [1, 1]).item() == pytest.approx((first_wins + second_wins) / 2, abs=1e-9)


def test_probabilities_of_all_rankings_sum_to_1():
    r, total = doubles(0.3, -1.1, 2.0, 0.7), 0.0
    for order in itertools.permutations(range(4)):
        ranking = [order.index(i) + 1 for i in range(4)]
        loss = plackett_luce_loss(r, ranking)
        assert loss.shape == () and loss.item() == pytest.approx(luce(r, order).item(), abs=1e-12)
        total += math.exp(-loss.item())
    assert total == pytest.approx(1, abs=1e-12)
    assert plackett_luce_loss(r, [30, 7, 10, 8]).item() == plackett_luce_loss(r, [4, 1, 3, 2]).item()


def test_ties_are_bounded_since_all_their_subsets_are_summed():
    r = torch.zeros(12, dtype=torch.float64)
    assert plackett_luce_loss(r[:10], [1] * 10).item() == pytest.approx(math.lgamma(11), abs=1e-12)  # log 10!
    with pytest.raises(ValueError, match="11 in a tie"):
        plackett_luce_loss(r, [1] * 11 + [2])


TIED = [[1, 3, 1, 3, 2], [2, 1, 2, 1, 2], [4, 1, 1, 1, 5], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("ranking", TIED)
def test_ties_are_the_mean_over_the_orders_that_break_them(ranking):
    r = doubles(0.3, -1.1, 2.0, 0.7, -0.4)
    allowed = orders(ranking)
    assert len(allowed) == math.prod(math.factorial(ranking.count(place)) for place in set(ranking))
    want = sum(luce(r, order) for order in allowed) / len(allowed)
    assert plackett_luce_loss(r, ranking).item() == pytest.approx(want.item(), abs=1e-12)


@pytest.mark.parametrize("ranking", [[2, 4, 1, 3, 5], *TIED])
def test_plackett_luce_gradient_and_shift(ranking):
    r = doubles(0.3, -1.1, 2.0, 0.7, -0.4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, ranking), r)
    (gradient,) = torch.autograd.grad(plackett_luce_loss(r, ranking), r)
    assert abs(gradient.sum()) < 1e-12 < gradient.abs().max()  # a shift of all rewards changes nothing
    shifted = plackett_luce_loss(r + 1000, ranking).item()
    assert shifted == pytest.approx(plackett_luce_loss(r, ranking).item(), abs=1e-9)


# ---- Comparisons through the model ----


def make_scorer(kind, seed=0):
    """A one-label classifier of the size and with the large weights of the causal models; float32, eval mode."""
    config = make_model(kind, seed).config
    config.num_labels = 1
    return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=KINDS)
def scorer(request):
    return make_scorer(request.param)


def own_score(model, ids):
    """transformers' own score of one row without padding: ()."""
    return model(input_ids=torch.tensor([ids])).logits[0, 0]


COMPLETIONS = [[16, 3], [9, 4, 6], [2, 5, 8, 12], [11, 7]]  # tokens, ragged, and as many as K differ
RANKINGS = [[1, 2], [1, 2, 2], [1, 1, 2, 3], [1, 2]]
MU = [0.3, None, None, None]
PAIRS = [
    [(0, 1, 0.3)],
    [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)],
    [(0, 1, 0.5), (0, 2, 1.0), (0, 3, 1.0), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 1.0)],
    [(0, 1, 1.0)],
]
CHOSEN_ODDS = [0.3, 0.9, 0.5, 0.6]


def make_comparisons(seed=0):
    """Comparisons (rows of ids, ranking, pairs, p_chosen) of 2, 3, 4 and 2 completions, ties among them, to prompts
    of 2, 4, 6 and 5 tokens.
    """
    generator, result = torch.Generator().manual_seed(seed), []
    for k, (prompt, sizes) in enumerate(zip((2, 4, 6, 5), COMPLETIONS)):
        draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()
        ids = draw(prompt)
        rows = [ids + draw(size - 1) + [EOS] for size in sizes]
        result.append((rows, RANKINGS[k], PAIRS[k], CHOSEN_ODDS[k]))
    return result


def loaded(comparisons):
    """The same as `load_comparisons` gives them."""
    result = []
    for rows, ranking, pairs, p_chosen in comparisons:
        completions = [(ids, [False] * 2 + [True] * (len(ids) - 2)) for ids in rows]
        result.append((completions, ranking, pairs[0][2] if len(rows) == 2 else 1.0, p_chosen))
    return result


def loop_loss(rewards, ranking, mu, loss_type):
    """The loss of one comparison, in float64, by loops over pairs or over orders: ()."""
    rewards, K = rewards.double(), len(ranking)
    if loss_type == "plackett_luce" and K > 2:
        return torch.stack([luce(rewards, order) for order in orders(ranking)]).mean()
    losses = []
    for i, j in itertools.combinations(range(K), 2):
        share = 0.5 if ranking[i] == ranking[j] else float(ranking[i] < ranking[j])
        share = share if mu is None else mu
        p = torch.softmax(torch.stack([rewards[i], rewards[j]]), 0)
        losses.append(-share * p[0].log() - (1 - share) * p[1].log())
    assert len(losses) == K * (K - 1) // 2
    return torch.stack(losses).mean()


ARGS = reward_model.Args(device="cpu", micro_batch_size=2, eval_samples=3)
LOSS_TYPES = ["pairs", "plackett_luce"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_comparison_is_the_mean_of_its_pairs_or_its_luce_choices(scorer, loss_type):
    comparisons = make_comparisons()
    args = reward_model.Args(device="cpu", loss_type=loss_type)
    losses, metrics, margins, mu, rewards = reward_model.forward(scorer, loaded(comparisons), args, nullcontext)
    assert losses.shape == (4,) and margins.shape == mu.shape == (1 + 3 + 6 + 1,)
    assert rewards.shape == (2 + 3 + 4 + 2,)
    start = 0
    for k, (rows, ranking, pairs, _) in enumerate(comparisons):
        own = torch.stack([own_score(scorer, ids) for ids in rows]).detach()
        assert torch.allclose(rewards[start : start + len(rows)], own, atol=1e-5)
        start += len(rows)
        assert losses[k].item() == pytest.approx(loop_loss(own, ranking, MU[k], loss_type).item(), abs=1e-5)
        differences = [(own[i] - own[j]).item() for i, j, _ in pairs]
        votes = [share if h > 0 else 1 - share for h, (_, _, share) in zip(differences, pairs)]
        n = len(pairs)
        assert metrics["margin"][k].item() == pytest.approx(sum(differences) / n, abs=1e-4)
        assert metrics["accuracy"][k].item() == pytest.approx(sum(votes) / n, abs=1e-6)
        for side, key in enumerate(("rewards/chosen", "rewards/rejected")):
            want = sum(own[pair[side]].item() for pair in pairs) / n
            assert metrics[key][k].item() == pytest.approx(want, abs=1e-4)
        assert metrics["mean_reward"][k].item() == pytest.approx(own.mean().item(), abs=1e-4)
        assert metrics["loss"][k].item() == losses[k].item()


def test_each_completion_passes_the_model_once(scorer):
    """C(K, 2) pairs, and K rows: not one more."""
    seen = []
    scorer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    rows = make_comparisons()[2][0]
    _, _, margins, *_ = reward_model.forward(scorer, loaded(make_comparisons()[2:3]), ARGS, nullcontext)
    assert len(margins) == 6
    assert [row[: len(ids)] for row, ids in zip(seen, rows)] == rows and len(seen) == 4


def test_a_ranking_weighs_as_much_as_a_pair(scorer):
    """Where all rewards are equal, all losses are log 2, and the pulls on each comparison's rewards add up to the
    same whatever K: a pair's 1/2 from each side, or 6 pairs of a sixth.
    """
    losses, *_ = reward_model.forward(scorer, loaded(make_comparisons()), ARGS, nullcontext)
    assert losses.std() > 0.05
    torch.nn.init.zeros_(scorer.score.weight)
    untied = lambda K: [(i, j, 1.0) for i, j in itertools.combinations(range(K), 2)]
    comparisons = [(rows, [1, 2, 3, 4][: len(rows)], untied(len(rows)), None) for rows, *_ in make_comparisons()]
    losses, metrics, *_ = reward_model.forward(scorer, loaded(comparisons), ARGS, nullcontext)
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    assert metrics["accuracy"].tolist() == [0.5] * 4  # a margin of 0 is half right, and neither right nor wrong
    for k, (rows, _, pairs, _) in enumerate(comparisons):
        (gradient,) = torch.autograd.grad(losses[k], scorer.score.weight, retain_graph=True)
        hidden = torch.stack([scorer.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows])
        want = sum(-0.5 * (hidden[i] - hidden[j]) / len(pairs) for i, j, _ in pairs)
        assert torch.allclose(gradient[0], want, atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_gradient_and_metrics_do_not_depend_on_the_micro_batch(scorer, loss_type, sizes):
    """In float64, against the gradient of loops over single rows in transformers' own forward."""
    scorer.double()
    comparisons, args = make_comparisons(), reward_model.Args(device="cpu", loss_type=loss_type)
    want = [loop_loss(torch.stack([own_score(scorer, ids) for ids in rows]), ranking, MU[k], loss_type)
            for k, (rows, ranking, *_) in enumerate(comparisons)]  # fmt: skip
    (sum(want) / 4).backward()
    want_gradient = flat_gradient(scorer)
    scorer.zero_grad()
    start, total, accuracy = 0, 0.0, 0.0
    for size in sizes:
        losses, metrics, *_ = reward_model.forward(scorer, loaded(comparisons)[start : start + size], args, nullcontext)
        (losses.sum() / 4).backward()
        start, total = start + size, total + losses.sum().item() / 4
        accuracy += metrics["accuracy"].sum().item() / 4
    assert total == pytest.approx(sum(want).item() / 4, rel=1e-6)
    assert (flat_gradient(scorer) - want_gradient).norm() < 1e-6 * want_gradient.norm()
    _, metrics, *_ = reward_model.forward(scorer, loaded(comparisons), args, nullcontext)
    assert accuracy == pytest.approx(metrics["accuracy"].mean().item(), abs=1e-12)


def test_the_same_completion_twice_in_a_ranking_is_half_right(scorer, monkeypatch):
    """Only pairs of equal sides are dropped. In larger batches matrix products give equal rows rewards that
    differ by 1e-7: that is no preference, and no more in the other order of the batch.
    """
    rows, *_ = make_comparisons()[2]
    comparison = loaded([([rows[0], rows[0], rows[2], rows[2]], [1, 2, 3, 3], [], None)])
    plain = reward_model.forward(scorer, comparison, ARGS, nullcontext)[1]["accuracy"].item()
    assert min(abs(plain - 1 / 6), abs(plain - 5 / 6)) < 1e-6  # two pairs are half right, and four as the scorer has it
    noise = torch.tensor([[1e-7], [-1e-7], [0.0], [1e-7]])
    for sign in (1, -1):
        rounded = lambda *inputs, sign=sign: token_values(*inputs) + sign * noise
        monkeypatch.setattr(reward_model, "token_values", rounded)
        accuracy = reward_model.forward(scorer, comparison, ARGS, nullcontext)[1]["accuracy"].item()
        assert accuracy == plain


# ---- The token that is read ----


def value_per_token(model, ids):
    """The head at each token of one row without padding, by a loop: (T,)."""
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return torch.stack([(h * model.score.weight[0]).sum() for h in hidden]).detach()


def scores_of(model, rows):
    """The rewards that training sees of these rows, all in one batch: (N,)."""
    comparison = (rows, list(range(len(rows))), [(0, 1, 1.0)], None)
    return reward_model.forward(model, loaded([comparison]), ARGS, nullcontext)[-1]


LAYOUTS = ["right padding", "left padding", "pad is EOS", "EOS in the prompt", "no padding"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_score_is_the_value_at_the_last_real_token(scorer, layout):
    rows = [ids for ids, _ in ragged_rows()]  # of 18, 8, 14 and 8 tokens
    if layout == "no padding":
        rows = [ids[-8:] for ids in rows[:3]]
    if layout == "EOS in the prompt":
        rows = [[ids[0], EOS, *ids[2:]] for ids in rows]
    if layout == "pad is EOS":
        scorer.config.pad_token_id = EOS
    want = torch.stack([value_per_token(scorer, ids)[-1] for ids in rows])
    before = torch.stack([value_per_token(scorer, ids)[-2] for ids in rows])
    assert (want - before).abs().min() > 1e-2  # the token before would show
    assert torch.allclose(scores_of(scorer, rows), want, atol=1e-5)
    for k, ids in enumerate(rows):
        assert torch.allclose(scores_of(scorer, [ids, ids])[0], want[k], atol=1e-5)
        if layout != "pad is EOS":  # transformers would read the token before
            assert torch.allclose(own_score(scorer, ids), want[k], atol=1e-5)
    if layout == "left padding":
        T = max(map(len, rows))
        input_ids = torch.tensor([[PAD] * (T - len(ids)) + ids for ids in rows])
        mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in rows])
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # GPT-2 needs them
        theirs = scorer(input_ids=input_ids, attention_mask=mask, position_ids=position).logits[:, 0]
        assert torch.allclose(scores_of(scorer, rows), theirs, atol=1e-5)


def test_values_of_real_tokens_whatever_stands_behind_them(scorer):
    """All of them, since a critic reads all; (4, 20), so that a transposed result would not fit."""
    rows = [ids for ids, _ in ragged_rows()]
    for filling in (PAD, EOS, 96):
        values = token_values(scorer, torch.tensor([ids + [filling] * (20 - len(ids)) for ids in rows]))
        assert values.shape == (4, 20) and values.dtype == torch.float32
        for k, ids in enumerate(rows):
            assert torch.allclose(values[k, : len(ids)], value_per_token(scorer, ids), atol=1e-5)


def test_values_under_autocast_are_fp32_and_from_an_fp32_head(scorer):
    """With bf16 activations the head's products are still exact: a reward of 8 bits would tie many pairs."""
    rows = torch.tensor([ids + [PAD] * (20 - len(ids)) for ids, _ in ragged_rows()])
    with torch.autocast("cpu", torch.bfloat16):
        values, hidden = token_values(scorer, rows), scorer.base_model(rows).last_hidden_state
    want = (hidden.double() * scorer.score.weight[0].double()).sum(-1)
    assert values.dtype == torch.float32 and (values - want).abs().max() < 1e-5


# ---- Folders to start from, and finished ones ----


def save_start(folder, kind, tokenizer, dropout=0.0, dtype=torch.float32, spare=0, **changes):
    """A causal model for the tokenizer's vocabulary, and the tokenizer: a folder to start from."""
    config = make_model(kind, dropout=dropout).config
    config.update({"vocab_size": len(tokenizer) + spare, **changes})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = "hello there help me Question Answer".split()


def texts(n, seed):
    """n texts of 1 to 6 words."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (n,), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(6, (size,), generator=draw).tolist()) for size in sizes]


def pair_rows(n, seed=0):
    """n rows prompt, chosen, rejected, mu. Nothing merges across "~", so texts may be tokenized as a whole."""
    prompts, chosen, rejected = (texts(n, 3 * seed + k) for k in range(3))
    return [{"prompt": x + "~", "chosen": y, "rejected": z + " there", "mu": [1.0, 0.5, 0.75][k % 3]}
            for k, (x, y, z) in enumerate(zip(prompts, chosen, rejected))]  # fmt: skip


def ranking_rows(n, seed=9):
    prompts, triples = texts(n, seed), zip(*[iter(texts(3 * n, seed + 1))] * 3)
    return [{"prompt": x + "~", "completions": [text + str(i) for i, text in enumerate(three)],
             "ranking": [[3, 1, 2], [1, 2, 1]][k % 2]} for k, (x, three) in enumerate(zip(prompts, triples))]  # fmt: skip


def tiny(folder, model, **flags):
    """Args of a run of two steps, 8 + 4 comparisons, 7 held out."""
    flags = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "eval_every": 0,
             "save_every": 0, "device": "cpu", "output_dir": str(folder / "run"), **flags}  # fmt: skip
    if "dataset" not in flags:
        flags["dataset"] = write(folder / "rows.jsonl", pair_rows(7) + ranking_rows(5))
        flags["eval_dataset"] = write(folder / "held_out.jsonl", pair_rows(7, seed=5))
    return reward_model.Args(model=model, **flags)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, bpe_tokenizer, tmp_path_factory):
    """A finished run: folder, kind, metrics, and of each held-out completion its prompt and its text."""
    folder = tmp_path_factory.mktemp(request.param)
    metrics = reward_model.main(tiny(folder, save_start(folder / "start", request.param, bpe_tokenizer)))
    held_out = [(row["prompt"], row[side]) for row in pair_rows(7, seed=5) for side in ("chosen", "rejected")]
    return SimpleNamespace(run=folder / "run", kind=request.param, metrics=metrics, held_out=held_out)


def load(finished):
    """(model, tokenizer) by nothing but transformers."""
    auto = transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer
    model, tokenizer = (kind.from_pretrained(finished.run / "model") for kind in auto)
    return model.eval(), tokenizer


@torch.no_grad()
def own_scores(finished):
    """transformers' scores of the held-out completions, one row at a time: list of floats."""
    model, tokenizer = load(finished)
    rows = [tokenizer(prompt + text)["input_ids"] + [EOS] for prompt, text in finished.held_out]
    return [own_score(model, ids).item() for ids in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 14])
def test_saved_folder_gives_the_same_scores_in_any_batch(finished, side, size):
    model, tokenizer = load(finished)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.score.weight.shape == (1, 64)
    rows = [tokenizer(prompt + text)["input_ids"] + [EOS] for prompt, text in finished.held_out]
    assert len({len(ids) for ids in rows}) > 3
    got = []
    for i in range(0, 14, size):
        batch = tokenizer.pad({"input_ids": rows[i : i + size]}, padding_side=side, return_tensors="pt")
        mask = batch["attention_mask"]
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            got += model(**batch, position_ids=position).logits[:, 0].tolist()
    assert got == pytest.approx(own_scores(finished), abs=1e-5)


def test_training_and_scoring_read_the_same_strings(finished, tmp_path):
    """--score, the last evaluation's samples and transformers on text + EOS agree; the rewards' mean is 0."""
    want = own_scores(finished)
    last = [row for row in map(json.loads, open(finished.run / "samples.jsonl")) if row["step"] == 2]
    assert [row["reward"] for row in last] == pytest.approx(want, abs=1e-5)
    assert [row["text"] for row in last] == [prompt + text for prompt, text in finished.held_out]
    assert [(row["comparison"], row["rank"]) for row in last] == [(k, rank) for k in range(7) for rank in (1, 2)]
    rows = [{"prompt": prompt, "completion": text, "id": k} for k, (prompt, text) in enumerate(finished.held_out)]
    result = reward_model.main(tiny(tmp_path, "", output_dir=str(finished.run), dataset="", batch_size=3,
                                    micro_batch_size=3, score=write(tmp_path / "new.jsonl", rows)))  # fmt: skip
    scored = list(map(json.loads, open(tmp_path / "new.scores.jsonl")))
    assert [row["score"] for row in scored] == pytest.approx(want, abs=1e-5)
    shift = load(finished)[0].config.reward_mean
    assert [row["reward"] for row in scored] == pytest.approx([score - shift for score in want], abs=1e-5)
    assert [row["id"] for row in scored] == list(range(14)) and "_where" not in scored[0]
    assert abs(result["mean_reward"]) < 1e-5


def test_the_text_classification_pipeline_gives_raw_scores(finished):
    """Nothing but its defaults: with one label and no problem_type it would squash them by a sigmoid."""
    pipe = transformers.pipeline("text-classification", model=str(finished.run / "model"), device="cpu")
    got = pipe([prompt + text + "</s>" for prompt, text in finished.held_out])
    want = own_scores(finished)
    assert min(want) < 0 or max(want) > 1
    assert [result["score"] for result in got] == pytest.approx(want, abs=1e-5)


def test_saved_config_names_what_others_need(finished):
    config = json.loads((finished.run / "model" / "config.json").read_text())
    tokenizer = load(finished)[1]
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id == PAD
    eos = config["eos_token_id"]
    assert (eos if isinstance(eos, list) else [eos]) == [EOS]
    assert config["held_out_accuracy"] == finished.metrics["eval/accuracy"]


# ---- E[r] = 0 ----


def test_mean_reward_of_the_held_out_completions_is_0(finished):
    want = own_scores(finished)
    shift = load(finished)[0].config.reward_mean
    assert abs(sum(want) / len(want)) > 0.01  # before
    assert abs(sum(score - shift for score in want) / len(want)) < 1e-5


def test_ppo_gets_rewards_and_a_critic_of_mean_0(finished):
    """On token ids, in ragged micro-batches, and the critic's value at the last token is the reward."""
    _, tokenizer = load(finished)
    args = ppo.Args(reward=str(finished.run / "model"), micro_batch_size=3, device="cpu")
    score, model, _ = load_reward(args.reward, tokenizer, [EOS], args, CPU, nullcontext)
    rows = [{"prompt": prompt, "_where": ""} for prompt, _ in finished.held_out]
    prompts = [ids for _, ids in load_prompts(tokenizer, rows, 512)]
    responses = [tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] for _, text in finished.held_out]
    got, shift = score(rows, prompts, responses), model.config.reward_mean
    assert abs(got.mean()) < 1e-5
    assert got.tolist() == pytest.approx([value - shift for value in own_scores(finished)], abs=1e-5)
    critic = ppo.load_critic(args, None, model, CPU)
    whole = [x + y for x, y in zip(prompts, responses)]
    input_ids, last = pad(whole, CPU), torch.tensor([len(ids) - 1 for ids in whole])
    values = token_values(critic, input_ids).detach()[torch.arange(14), last]
    assert values.tolist() == pytest.approx(got.tolist(), abs=1e-5)


SHIFT = 7.25


def test_a_shift_of_the_reward_changes_no_comparison_group_or_optimum():
    generator = torch.Generator().manual_seed(4)
    r = torch.randn(3, 5, generator=generator, dtype=torch.float64)  # 3 prompts, 5 responses each
    shifts = doubles(SHIFT, -2.0, 100.0)[:, None]  # a constant for each prompt
    mu = torch.rand(3, generator=generator, dtype=torch.float64)
    losses, shifted = (bradley_terry_loss(x[:, 0], x[:, 3], mu) for x in (r, r + shifts))
    assert torch.allclose(losses, shifted, atol=1e-12)
    for row, shift in zip(r, shifts):
        assert plackett_luce_loss(row, [2, 1, 2, 4, 3]).item() == pytest.approx(
            plackett_luce_loss(row + shift, [2, 1, 2, 4, 3]).item(), abs=1e-9)  # fmt: skip
    advantages, shifted = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (r, r + shifts))
    assert torch.allclose(advantages, shifted, atol=1e-9)
    ref = torch.log_softmax(torch.randn(3, 5, generator=generator, dtype=torch.float64), 1)
    optima, gradients = [], []
    for x in (r, r + shifts):
        z = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(z, 1)
        objective = (logp.exp() * (x - 0.5 * (logp - ref))).sum()  # E[r] - beta KL(pi || pi_ref), enumerated
        gradients.append(torch.autograd.grad(objective, z)[0])
        minimize([z], lambda z=z, x=x: (z.softmax(1) * (0.5 * (z.log_softmax(1) - ref) - x)).sum())
        optima.append(z.detach().softmax(1))
    assert torch.allclose(*gradients, atol=1e-9) and torch.allclose(*optima, atol=1e-6)
    weights = ref.exp() * (r / 0.5).exp()
    assert torch.allclose(optima[0], weights / weights.sum(1, keepdim=True), atol=1e-6)  # pi* itself


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_a_shift_of_reward_and_critic_changes_no_advantage(gae_lambda):
    """gamma = 1: each return moves by the constant, as do the critic's values. With a critic that does not move
    and lambda = 1 every advantage moves by it, which whitening takes away; else a shift does matter.
    """
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    first, length = torch.tensor([[0], [3], [2]]), torch.tensor([[7], [1], [4]])
    mask = (torch.arange(7) >= first) & (torch.arange(7) < first + length)  # (3, 7), behind prompts of 0, 3 and 2 tokens
    scores, values, logprobs, ref_logprobs = draw(3), draw(3, 7), draw(3, 7), draw(3, 7)

    def advantages(shift, critic_shift, gamma=1.0):
        rewards = ppo.token_rewards(scores + shift, logprobs, ref_logprobs, mask, 0.3)
        return ppo.gae(rewards, values + critic_shift, mask, gamma, gae_lambda)

    base, returns = advantages(0.0, 0.0)
    both, moved = advantages(SHIFT, SHIFT)
    assert torch.allclose(base, both, atol=1e-6)
    assert torch.allclose(moved, torch.where(mask, returns + SHIFT, 0.0), atol=1e-6)
    assert torch.allclose(masked_whiten(base, mask), masked_whiten(both, mask), atol=1e-6)
    alone, _ = advantages(SHIFT, 0.0)
    same = torch.allclose(masked_whiten(base, mask), masked_whiten(alone, mask), atol=1e-6)
    assert same == (gae_lambda == 1.0) and not torch.allclose(base, alone, atol=1.0)
    assert not torch.allclose(advantages(0.0, 0.0, 0.9)[0], advantages(SHIFT, SHIFT, 0.9)[0], atol=0.1)


# ---- Loading a model ----


@pytest.fixture
def tokenizer(bpe_tokenizer):
    """One that a test may change."""
    return copy.deepcopy(bpe_tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_new_head(tokenizer, tmp_path, kind):
    """Its weights have mean 0 and std (d + 1)^-0.5, d = 64, and are a function of the seed."""
    folder = save_start(tmp_path, kind, tokenizer)
    heads = []
    for seed in range(1, 11):
        torch.rand(seed)  # the state before does not matter
        model, *_ = reward_model.load_reward_model(folder, reward_model.Args(seed=seed, device="cpu"), CPU)
        heads.append(model.score.weight.detach().clone())
    model, *_ = reward_model.load_reward_model(folder, reward_model.Args(seed=1, device="cpu"), CPU)
    assert torch.equal(model.score.weight, heads[0]) and model.score.bias is None
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(heads, 2))
    heads = torch.cat(heads)
    assert heads.shape == (10, 64)  # one label
    assert heads.std().item() == pytest.approx(65**-0.5, rel=0.1) and abs(heads.mean()) < 3 * 65**-0.5 / 640**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_training_mode(tokenizer, tmp_path, kind):
    """GPT-2's layers and Llama's functional attention dropout."""
    folder = save_start(tmp_path, kind, tokenizer, dropout=0.3)
    ids = torch.tensor([ids for ids, _ in ragged_rows() if len(ids) == 8])
    noisy = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)  # what it must not be
    model, *_ = reward_model.load_reward_model(folder, ARGS, CPU)
    assert model.training
    assert torch.equal(token_values(model, ids), token_values(model, ids))
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["EOS", "none", "its own"])
def test_padding_is_never_an_eos(tokenizer, tmp_path, kind, pad):
    """Else others read the token before the EOS. The old embeddings, and so all scores, are untouched."""
    tokenizer.pad_token, pad_id = {"EOS": ("</s>", EOS), "none": (None, None), "its own": ("<pad>", PAD)}[pad]
    size = len(tokenizer)
    folder = save_start(tmp_path / "start", kind, tokenizer, pad_token_id=pad_id)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    model, loaded, eos_ids = reward_model.load_reward_model(folder, ARGS, CPU)
    model.eval()
    assert loaded.pad_token_id == (PAD if pad == "its own" else size)
    assert eos_ids == [EOS] and loaded.eos_token_id == EOS
    embeddings = model.get_input_embeddings().weight
    assert len(embeddings) == len(loaded) == size + (pad != "its own") and torch.equal(embeddings[:size], before)
    rows = [tokenizer(text)["input_ids"] + [EOS] for text in ("hello", "help me there", "Question: hello? help")]
    want = [value_per_token(model, ids)[-1].item() for ids in rows]
    check_model(model, rows)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    for scorer in (model, again):  # a batch in transformers' own forward
        batch = loaded.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        assert scorer(**batch).logits[:, 0].tolist() == pytest.approx(want, abs=1e-5)


def test_no_embedding_is_added_where_there_is_room(tokenizer, tmp_path):
    tokenizer.pad_token = None
    folder = save_start(tmp_path, "llama", tokenizer, spare=7)
    model, loaded, _ = reward_model.load_reward_model(folder, ARGS, CPU)
    assert loaded.pad_token_id == len(tokenizer) and len(model.get_input_embeddings().weight) == len(tokenizer) + 7


def test_a_run_where_the_pad_token_is_eos(tokenizer, tmp_path):
    """From such a folder through training and saving to batches in transformers' own forward."""
    tokenizer.pad_token = "</s>"
    run = SimpleNamespace(run=tmp_path / "run", held_out=[("help~", "hello"), ("me~", "hello there help me")])
    reward_model.main(tiny(tmp_path, save_start(tmp_path / "start", "gpt2", tokenizer, pad_token_id=EOS)))
    model, loaded = load(run)
    rows = [loaded(prompt + text)["input_ids"] + [EOS] for prompt, text in run.held_out]
    batch = loaded.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    want = [value_per_token(model, ids)[-1].item() for ids in rows]
    assert model(**batch).logits[:, 0].tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_become_fp32(tokenizer, tmp_path, kind):
    folder = save_start(tmp_path, kind, tokenizer, dtype=torch.bfloat16)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stored.dtype == torch.bfloat16
    model, *_ = reward_model.load_reward_model(folder, ARGS, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_input_embeddings().weight, stored.get_input_embeddings().weight.float())


def test_a_reward_model_reloads_with_its_head(finished):
    """Whatever the seed: a new head is for a folder that has none."""
    want, args = load(finished)[0].state_dict(), reward_model.Args(seed=77, device="cpu")
    model, *_ = reward_model.load_reward_model(str(finished.run / "model"), args, CPU)
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_language_model_scores_nothing(tokenizer, tmp_path, capsys):
    """A random head is for training only."""
    folder = save_start(tmp_path, "llama", tokenizer)
    with pytest.raises(SystemExit):
        reward_model.load_reward_model(folder, reward_model.Args(score="rows.jsonl", device="cpu"), CPU)
    assert "missing weights ['score.weight']" in capsys.readouterr().err


# ---- Rows to comparisons ----


def comparisons_of(tokenizer, rows, max_length=512):
    rows = [{**row, "_where": f"rows.jsonl:{k}"} for k, row in enumerate(rows, 1)]
    return load_comparisons(tokenizer, rows, [EOS], max_length)


def ids_of(comparison):
    """The token ids of each completion."""
    return [ids for ids, _ in comparison[0]]


def test_pairs_rankings_ties_and_votes(tokenizer):
    sides = {"prompt": "help~", "chosen": "hello", "rejected": "there"}
    three = {"prompt": "me~", "completions": ["hello", "there", "help"]}
    rows = [sides, {**sides, "mu": 0.3, "p_chosen": 0.4}, {**sides, "mu": 0.5},
            {**three, "ranking": [3, 1, 2]}, {**three, "ranking": [1, 2, 1]}, {**three, "ranking": [1, 1, 1]},
            {"prompt": "me~", "completions": ["hello", "there"], "ranking": [2, 1]},
            {"prompt": "me~", "completions": ["hello", "there"], "ranking": [1, 1]}]  # fmt: skip
    comparisons = comparisons_of(tokenizer, rows)
    rankings = [[1, 2], [1, 2], [1, 2], [1, 2, 3], [1, 1, 2], [1, 1, 1], [1, 2], [1, 1]]
    assert [ranking for _, ranking, *_ in comparisons] == rankings
    assert [mu for _, _, mu, _ in comparisons] == [1.0, 0.3, 0.5, 1.0, 1.0, 0.5, 1.0, 0.5]  # all tie: 0.5
    assert [p for *_, p in comparisons] == [None, 0.4, *[None] * 6]
    words = ["hello there", "hello there", "hello there", "there help hello", "hello help there", "hello there help",
             "there hello", "hello there"]  # best first
    for (completions, *_), wanted in zip(comparisons, words, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in completions]
        assert [text.partition("~")[2] for text in texts] == wanted.split()
    *_, first, second, mu, owner = reward_model.collate(comparisons, CPU)
    want = [(0, 1, 1.0), (0, 1, 0.3), (0, 1, 0.5), (0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (0, 1, 0.5), (0, 2, 1.0),
            (1, 2, 1.0), (0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5), (0, 1, 1.0), (0, 1, 0.5)]  # fmt: skip
    starts = torch.tensor([0, 2, 4, 6, 9, 12, 15, 17])[owner]
    got = list(zip((first - starts).tolist(), (second - starts).tolist(), mu.tolist()))
    assert got == [pytest.approx(pair) for pair in want]
    assert owner.tolist() == [0, 1, 2, *[3] * 3, *[4] * 3, *[5] * 3, 6, 7]


def test_equal_sides_are_dropped_and_counted(tokenizer, capsys):
    """Also those that are equal only once they are cut."""
    rows = [{"prompt": "help~", "chosen": "hello there" + end, "rejected": "hello there"}
            for end in (" help", "", "</s>")]  # fmt: skip
    (kept,) = comparisons_of(tokenizer, rows)
    assert tokenizer.decode(ids_of(kept)[0]).endswith("help</s>")
    assert "2 of 3 pairs dropped" in capsys.readouterr().out
    prompt = len(tokenizer("help~")["input_ids"])
    rows = [{"prompt": "help~", "chosen": "hello" + end, "rejected": "hello there"} for end in (" help", "???")]
    assert len(comparisons_of(tokenizer, rows)) == 2
    capsys.readouterr()
    long = [{"prompt": "help~", "chosen": "~~~~~hello", "rejected": "~~~~~there"}, rows[1]]
    (kept,) = comparisons_of(tokenizer, long, max_length=prompt + 5)
    assert "1 of 2 pairs dropped" in capsys.readouterr().out
    assert tokenizer.decode(ids_of(kept)[1]).startswith("<s>help~hello")
    with pytest.raises(SystemExit):
        comparisons_of(tokenizer, long[:1], max_length=prompt + 5)


@pytest.mark.parametrize("end", ["", "</s>", "</s></s>"])
def test_rows_are_the_prompt_as_elsewhere_a_completion_and_one_eos(tokenizer, end):
    """One BOS; the prompt's ids are those of SFT rows and of PPO's rollouts; exactly one EOS, the last token."""
    completions = [text + end for text in ("hello", " there", "")]
    row = {"prompt": "Question: help?~", "completions": completions, "ranking": [1, 2, 3]}
    (rows,) = map(ids_of, comparisons_of(tokenizer, [row]))
    prompt = tokenizer("Question: help?~")["input_ids"]
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hello", " there")] + [[]]
    assert rows == [prompt + ids + [EOS] for ids in bare]
    assert all(ids.count(1) == 1 and ids.count(EOS) == 1 for ids in rows)
    demonstration = {"prompt": row["prompt"], "completion": "hello", "_where": ""}
    assert [rows[0]] == [ids for ids, _ in encode(tokenizer, [demonstration], [EOS], 512)]
    ((_, ids),) = load_prompts(tokenizer, [demonstration], 512)
    assert ids == prompt


def test_messages(tokenizer):
    """As the template writes them, cut behind the last turn's EOS; with a prompt column, and without one."""
    tokenizer.chat_template = CHAT_TEMPLATE
    ask, *answers = ({"role": role, "content": text} for role, text in (
        ("user", "help me"), ("assistant", "hello"), ("assistant", "there")))  # fmt: skip
    rows = [{"prompt": [ask], "chosen": answers[:1], "rejected": answers[1:]},
            {"chosen": [ask, answers[0]], "rejected": [ask, answers[1]]},
            {"prompt": [ask], "completions": [[answers[1]], [answers[0]]], "ranking": [2, 1]}]  # fmt: skip
    first, second, third = map(ids_of, comparisons_of(tokenizer, rows))
    assert first == second == third
    assert [tokenizer.decode(ids) for ids in first] == [
        f"<s><user>help me</s>\n<assistant>{text}</s>" for text in ("hello", "there")
    ]
    assert [(ids.count(1), ids[-1], ids[-2] == EOS) for ids in first] == [(1, EOS, False)] * 2


def test_truncation_keeps_the_eos(tokenizer, capsys):
    row = {"prompt": "help~", "chosen": "there " * 9 + "hello", "rejected": "hello"}
    ((full, short),) = map(ids_of, comparisons_of(tokenizer, [row]))
    prompt = len(tokenizer("help~")["input_ids"])
    assert capsys.readouterr().out == ""
    for extra in (2, 3, 5):
        ((cut, other),) = map(ids_of, comparisons_of(tokenizer, [row], max_length=prompt + extra))
        assert cut == full[: prompt + extra - 1] + [EOS] and other[:prompt] == full[:prompt] and other[-1] == EOS
        assert f"cut to --max-length {prompt + extra}," in capsys.readouterr().out
    with pytest.raises(SystemExit):
        comparisons_of(tokenizer, [row], max_length=prompt)


# ---- Evaluation ----


def loop_ece(margins, mu, bins=10):
    """[(pairs, confidence, accuracy)] of the bins that are not empty, and ECE: a loop over pairs, plain Python."""
    cells = [[] for _ in range(bins)]
    for h, share in zip(margins, mu):
        confidence = 1 / (1 + math.exp(-abs(h)))
        right = 0.5 if h == 0 else share if h > 0 else 1 - share
        cells[min(math.floor((confidence - 0.5) / (0.5 / bins)), bins - 1)].append((confidence, right))
    table = [(len(cell), *(sum(x) / len(cell) for x in zip(*cell))) for cell in cells if cell]
    return table, sum(n * abs(a - b) for n, a, b in table) / len(margins)


def random_margins(n=5000):
    return 1.5 * torch.randn(n, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def test_calibrated_margins_have_no_calibration_error():
    """Labels that are the model's probabilities: 0 in each bin. Votes drawn from them: 0 but for noise."""
    margins = random_margins()
    p = torch.sigmoid(margins)
    table, ece = calibration(margins, p)
    assert ece < 1e-6 and len(table) == 10 and sum(n for n, *_ in table) == 5000
    votes = (torch.rand(5000, generator=torch.Generator().manual_seed(9)) < p).double()
    assert calibration(margins, votes)[1] < 0.03


def test_overconfident_margins():
    margins = random_margins()
    p = torch.sigmoid(margins)
    for bins in (10, 4):
        table, ece = calibration(3 * margins, p, bins)
        want, want_ece = loop_ece((3 * margins).tolist(), p.tolist(), bins)
        assert ece == pytest.approx(want_ece, abs=1e-6) and ece > 0.1
        assert [n for n, *_ in table] == [n for n, *_ in want] and len(table) == bins
        assert [tuple(row) for row in table] == [pytest.approx(row, abs=1e-6) for row in want]
    _, ece = calibration(torch.full((7,), 3.0), torch.full((7,), 1 / (1 + math.exp(-1))))
    assert ece == pytest.approx(1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(-1)), abs=1e-6)


def test_calibration_by_hand():
    """Confidences 0.75 three times, 0.9 twice and 0.5: whichever side is ahead, and a tie is half right."""
    a, b = math.log(3), math.log(9)
    margins, mu = torch.tensor([a, -a, a, b, -b, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0])
    table, ece = calibration(margins, mu, bins=4)
    want = (1, 0.5, 0.5), (3, 0.75, 2 / 3), (2, 0.9, 0.25)
    assert table == [pytest.approx(row, abs=1e-6) for row in want]
    assert ece == pytest.approx((0 + 3 * (0.75 - 2 / 3) + 2 * (0.9 - 0.25)) / 6, abs=1e-6)
    margins, mu = torch.tensor([200.0, -200.0, 200.0]), torch.tensor([1.0, 0.0, 0.5])  # confidence exactly 1
    table, ece = calibration(margins, mu)
    assert table == [(3, 1.0, pytest.approx(5 / 6))] and ece == pytest.approx(1 / 6, abs=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_evaluation(scorer, micro):
    """Against loops over single rows: votes, their 95 % interval, the ceiling, calibration, and the samples."""
    comparisons, decode = make_comparisons(), lambda ids, skip_special_tokens: " ".join(map(str, ids))
    args = reward_model.Args(device="cpu", micro_batch_size=micro, eval_samples=3)
    metrics, samples, table = reward_model.evaluate(
        scorer, SimpleNamespace(decode=decode), loaded(comparisons), args, nullcontext
    )
    own = [[own_score(scorer, ids).item() for ids in rows] for rows, *_ in comparisons]
    accuracies, margins, mu = [], [], []
    for rewards, (_, _, pairs, _) in zip(own, comparisons):
        votes = [share if rewards[i] > rewards[j] else 1 - share for i, j, share in pairs]
        accuracies.append(sum(votes) / len(votes))
        margins += [rewards[i] - rewards[j] for i, j, _ in pairs]
        mu += [share for *_, share in pairs]
    mean = sum(accuracies) / 4
    assert 0 < mean < 1
    want_losses = [loop_loss(torch.tensor(x), RANKINGS[k], MU[k], "pairs").item() for k, x in enumerate(own)]
    for end in ("low", "high"):  # where the share is 1.96 standard errors from what would be the true one
        bound = metrics[f"eval/accuracy_{end}"]
        assert (mean - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 4, abs=1e-6)
    assert metrics["eval/accuracy_low"] < mean < metrics["eval/accuracy_high"]
    want = {"eval/accuracy": mean, "eval/loss": sum(want_losses) / 4,
            "eval/accuracy_ceiling": (0.7 + 0.9 + 0.5 + 0.6) / 4, "eval/ece": loop_ece(margins, mu)[1]}  # fmt: skip
    assert {key: metrics[key] for key in want} == pytest.approx(want, abs=1e-4)
    assert [tuple(row) for row in table] == [pytest.approx(row, abs=1e-4) for row in loop_ece(margins, mu)[0]]
    assert [row["reward"] for row in samples] == pytest.approx(sum(own[:3], []), abs=1e-4)
    assert [row["rank"] for row in samples] == sum(RANKINGS[:3], [])
    assert [row["comparison"] for row in samples] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [row["text"] for row in samples] == [decode(ids, True) for rows, *_ in comparisons[:3] for ids in rows]


def test_the_ceiling_is_that_of_the_votes_where_the_noise_is_unknown(scorer):
    """Of soft labels nobody agrees with more than max(mu, 1 - mu), and of a tie with half; a mean over pairs, then over
    comparisons."""
    comparisons = [(*comparison[:3], None if k == 2 else 0.9) for k, comparison in enumerate(loaded(make_comparisons()))]
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
    metrics, *_ = reward_model.evaluate(scorer, tokenizer, comparisons, ARGS, nullcontext)
    bests = []
    for _, ranking, mu, _ in comparisons:
        pairs = list(itertools.combinations(ranking, 2))
        votes = [0.5 if first == second else mu for first, second in pairs]
        bests.append(statistics.fmean(max(vote, 1 - vote) for vote in votes))
    assert min(bests) < 1 and metrics["eval/accuracy_ceiling"] == pytest.approx(statistics.fmean(bests))


# ---- Whole runs ----


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_optimizer_gets_the_same_gradient_from_any_micro_batch(tokenizer, tmp_path, loss_type):
    """Of a first step of main on 8 ragged comparisons, pairs and rankings."""
    start, gradients, logs = save_start(tmp_path / "start", "gpt2", tokenizer), [], []
    rows = write(tmp_path / "few.jsonl", pair_rows(5) + ranking_rows(3))
    flat = lambda optimizer: torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]])
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: gradients.append(flat(optimizer)))
    try:
        for micro in (8, 1, 2):
            args = tiny(tmp_path, start, loss_type=loss_type, micro_batch_size=micro, dataset=rows, eval_dataset=rows,
                        max_grad_norm=1e9, output_dir=str(tmp_path / f"run{micro}"))  # fmt: skip
            reward_model.main(args)
            logs.append([json.loads(line) for line in open(tmp_path / f"run{micro}" / "metrics.jsonl")])
    finally:
        hook.remove()
    assert len(gradients) == 3 and gradients[0].norm() > 0.01
    for gradient, log in zip(gradients[1:], logs[1:]):
        assert (gradient - gradients[0]).norm() < 5e-6 * gradients[0].norm()
        for key, value in log[1].items():
            if key not in ("tokens_per_second", "step"):
                assert value == pytest.approx(logs[0][1][key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", ["tinystories_pref", "hh_harmless"])
def test_two_steps_on_real_data(shared, tmp_path, name):
    """A real model and 32 rows: E[r] = 0 held out, and the scores logged are transformers' own of a padded batch."""

    def rows(split, n):
        found = map(json.loads, open(shared / "data" / f"{name}.{split}.jsonl", encoding="utf-8"))
        short = (row for row in found if len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) < 300)
        return write(tmp_path / f"{split}.jsonl", list(itertools.islice(short, n)))

    train, held_out = rows("train", 32), rows("test", 6)
    reward_model.main(tiny(tmp_path, str(shared / "models" / "stories260K"), dataset=train, eval_dataset=held_out,
                           batch_size=16, micro_batch_size=8, eval_samples=6))  # fmt: skip
    log = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in log] == [0, 1, 2, 2] and all(math.isfinite(row.get("loss", 0.0)) for row in log)
    assert log[0]["eval/loss"] != log[-1]["eval/loss"] and 0 <= log[-1]["eval/accuracy"] <= 1
    model, tokenizer = load(SimpleNamespace(run=tmp_path / "run"))
    comparisons = load_comparisons(tokenizer, read_rows(held_out), [EOS], 512)
    ids = [ids for completions, *_ in comparisons for ids, _ in completions]
    assert all(row.count(EOS) == 1 and row[-1] == EOS and row.count(1) == 1 for row in ids)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")][-len(ids) :]
    assert [row["reward"] for row in samples] == pytest.approx(scores.tolist(), abs=1e-4)
    assert abs(scores.mean().item() - model.config.reward_mean) < 1e-5
