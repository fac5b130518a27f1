"""sft_loss and dpo_loss: numbers by hand, gradients under micro-batching, and DPO against the closed-form optimum."""

import itertools
import math
from contextlib import nullcontext

import dpo
import pytest
import sft
import torch
from common import load_comparisons, plackett_luce_loss, sequence_logprobs
from conftest import flat_gradient, make_model, naive_logprobs, ragged_rows
from tiny_runs import scripts

ARGS = dpo.Args(micro_batch_size=2)


def loss(h, mu=1.0, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    """(dpo_loss, d loss / d h) at a log-ratio margin h, split unevenly over the four log-probs."""
    margin = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([-31.0], dtype=torch.float64)
    value, *_ = dpo.dpo_loss(margin + shift, shift / 2, shift, shift / 2, torch.tensor([mu], dtype=torch.float64),
                             beta, loss_type, label_smoothing)  # fmt: skip
    value.sum().backward()
    return value.item(), margin.grad.item()


@pytest.mark.parametrize(
    "options, value, slope",
    [
        (dict(h=0.0), math.log(2), -0.05),
        (dict(h=6.0), 0.437488, -0.0354344),
        (dict(h=-2000.0), 200.0, -0.1),
        (dict(h=-20000.0), 2000.0, -0.1),  # log(sigmoid(-2000)) would be -inf with a NaN gradient
        (dict(h=6.0, label_smoothing=0.1), 0.497488, None),
        (dict(h=10 * math.log(9), label_smoothing=0.1), None, 0.0),  # the minimum of cDPO
        (dict(h=6.0, mu=0.9), 0.497488, None),  # a soft label is label smoothing by another name
        (dict(h=1.0, mu=0.25, beta=0.5, label_smoothing=0.1), 0.824077, None),  # 0.3 of 0.474077, 0.7 of 0.974077
        (dict(h=1.0, mu=0.25, beta=0.5, label_smoothing=0.1, loss_type="ipo"), 2.8, None),  # 0.3 of 0, 0.7 of 4
        (dict(h=0.0, mu=0.5), math.log(2), 0.0),
        (dict(h=0.0, loss_type="ipo"), 25.0, -10.0),
        (dict(h=6.0, loss_type="ipo"), 1.0, 2.0),
        (dict(h=5.0, loss_type="ipo"), 0.0, 0.0),
    ],
)
def test_numbers_by_hand(options, value, slope):
    got_value, got_slope = loss(**options)
    assert value is None or got_value == pytest.approx(value, abs=1e-6)
    assert slope is None or got_slope == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_soft_labels_are_expectations_and_sides_are_symmetric(loss_type):
    for h, mu in itertools.product((-7.0, 0.3, 6.0), (0.0, 0.2, 0.5, 1.0)):
        soft, slope = loss(h, mu, loss_type=loss_type)
        hard = [loss(h, side, loss_type=loss_type) for side in (1.0, 0.0)]
        assert soft == pytest.approx(mu * hard[0][0] + (1 - mu) * hard[1][0])
        assert slope == pytest.approx(mu * hard[0][1] + (1 - mu) * hard[1][1])
        swapped, swapped_slope = loss(-h, 1 - mu, loss_type=loss_type)
        assert soft == pytest.approx(swapped) and slope == pytest.approx(-swapped_slope)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_smoothing_is_the_chance_that_a_vote_is_flipped(loss_type):
    """Of soft labels too: with chance e the vote mu counts as 1 - mu."""
    for h, mu, e in itertools.product((-7.0, 6.0), (0.0, 0.2, 0.7, 1.0), (0.1, 0.4)):
        smooth = loss(h, mu, loss_type=loss_type, label_smoothing=e)
        kept, flipped = loss(h, mu, loss_type=loss_type), loss(h, 1 - mu, loss_type=loss_type)
        assert smooth == pytest.approx([(1 - e) * a + e * b for a, b in zip(kept, flipped)])


def test_log_z_cancels_and_rewards_have_beta():
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mu = torch.tensor([1.0, 0.5, 0.0])
    base = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, mu, 0.3, "sigmoid", 0.0)
    shifted = dpo.dpo_loss(chosen + 5, rejected + 5, ref_chosen, ref_rejected, mu, 0.3, "sigmoid", 0.0)
    assert torch.allclose(base[0], shifted[0], atol=1e-5)
    assert torch.allclose(base[1], 0.3 * (chosen - ref_chosen)) and torch.allclose(
        shifted[2] - base[2], torch.tensor(1.5)
    )


# ---- micro-batches, prompts and padding, on real models ----


def sft_gradient(model, rows, sizes):
    model.zero_grad()
    num_tokens, total, start = sum(sum(trained) for _, trained in rows), 0.0, 0
    for size in sizes:
        input_ids, trained = sft.collate(rows[start : start + size], "cpu")
        value = sft.sft_loss(sequence_logprobs(model, input_ids, trained), trained, num_tokens)
        value.backward()
        total, start = total + value.item(), start + size
    return total, flat_gradient(model)


def ragged_pairs():
    """Four pairs: prompts of 2, 4, 6, 5 tokens, chosen of 16, 4, 8, 3 and rejected of 3, 8, 4, 16."""
    pairs = []
    for (ids, trained), (other, other_trained), mu in zip(
        ragged_rows(0), ragged_rows(1)[::-1], [1, 0.5, 0.25, 1]
    ):
        n = trained.index(True)
        rejected = ids[:n] + [t for t, use in zip(other, other_trained) if use]
        sides = [(ids, trained), (rejected, [False] * n + [True] * (len(rejected) - n))]
        pairs.append((sides, [1, 2], mu, None))
    return pairs


def ragged_comparisons():
    """Two pairs, and rankings of four and of three completions, one with a tie."""
    first, second, *others = ragged_pairs()
    four = [*others[0][0], *first[0]]
    three = [*others[1][0], second[0][1]]
    return [first, (four, [1, 2, 3, 4], 1.0, None), second, (three, [1, 1, 2], 1.0, None)]


def dpo_gradient(model, pairs, reference, sizes):
    model.zero_grad()
    metrics, start = {}, 0
    for size in sizes:
        s = slice(start, start + size)
        losses, sums = dpo.forward(model, pairs[s], reference[s], ARGS, nullcontext)
        (losses.sum() / len(pairs)).backward()
        metrics = {name: metrics.get(name, 0.0) + value.item() / len(pairs) for name, value in sums.items()}
        start += size
    return metrics, flat_gradient(model)


SIZES = [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]]


@pytest.mark.parametrize("sizes", SIZES)
def test_sft_gradient_does_not_depend_on_the_micro_batch(model, sizes):
    """Guard: micro-batch invariance on completions of 16, 4, 8, 3 tokens, in float64 so that 1e-9 can be asked."""
    model.double()
    want, want_gradient = sft_gradient(model, ragged_rows(), [4])
    got, gradient = sft_gradient(model, ragged_rows(), sizes)
    assert got == pytest.approx(want, rel=1e-9)
    assert (gradient - want_gradient).norm() < 1e-9 * want_gradient.norm()
    mean_of_means = sum(sft_gradient(model, [row], [1])[1] for row in ragged_rows()) / 4
    assert (mean_of_means - want_gradient).norm() > 0.1 * want_gradient.norm()  # what it must not be


@pytest.mark.parametrize("rows", [ragged_pairs, ragged_comparisons], ids=["pairs", "rankings"])
@pytest.mark.parametrize("sizes", SIZES)
def test_dpo_gradient_and_metrics_do_not_depend_on_the_micro_batch(model, sizes, rows):
    reference = dpo.reference_logps(make_model("gpt2", seed=3).double(), rows(), ARGS, nullcontext)
    model.double()
    want, want_gradient = dpo_gradient(model, rows(), reference, [4])
    got, gradient = dpo_gradient(model, rows(), reference, sizes)
    assert got == pytest.approx(want, rel=1e-9)
    assert (gradient - want_gradient).norm() < 1e-9 * want_gradient.norm()


def test_sft_loss_is_the_mean_nll_of_the_trained_tokens(model):
    want = [naive_logprobs(model, ids)[torch.tensor(trained[1:])] for ids, trained in ragged_rows()]
    got, _ = sft_gradient(model, ragged_rows(), [4])
    assert got == pytest.approx(-torch.cat(want).mean().item(), rel=1e-5)
    assert sum(map(len, want)) == 16 + 4 + 8 + 3


def test_dpo_sums_exactly_the_completions_of_both_halves(model):
    """In a ragged batch, against loops over single rows; then permuted, and with other prompts' tokens unscored."""
    pairs = ragged_pairs()
    got = dpo.reference_logps(model, pairs, dpo.Args(micro_batch_size=4), nullcontext)
    for i, pair in enumerate(pairs):
        for side in (0, 1):
            ids, trained = pair[0][side]
            want = naive_logprobs(model, ids)[torch.tensor(trained[1:])]
            assert len(want) == [[16, 4, 8, 3], [3, 8, 4, 16]][side][i]
            assert got[i, side].item() == pytest.approx(want.sum().item(), abs=1e-4)
    order = [2, 0, 3, 1]
    permuted = dpo.reference_logps(
        model, [pairs[i] for i in order], dpo.Args(micro_batch_size=4), nullcontext
    )
    assert torch.allclose(permuted, got[order], atol=1e-4)


def test_at_the_start_the_loss_is_log_2_and_the_gradient_is_not_zero(model):
    pairs = [(sides, ranking, 1.0, None) for sides, ranking, *_ in ragged_pairs()]
    reference = dpo.reference_logps(model, pairs, dpo.Args(micro_batch_size=4), nullcontext)
    metrics, gradient = dpo_gradient(model, pairs, reference, [4])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6) and gradient.norm() > 0.01
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0  # a tie is half right


def test_metrics_have_their_sign_and_accuracy_counts_votes(model):
    pairs = ragged_pairs()  # mu: 1, 0.5, 0.25, 1
    reference = dpo.reference_logps(model, pairs, dpo.Args(micro_batch_size=4), nullcontext)
    reference += torch.tensor(
        [[-1.0, 0.0], [0.0, -2.0], [-3.0, 0.0], [0.0, -4.0]]
    )  # margins 1, -2, 3, -4, times beta
    metrics, _ = dpo_gradient(model, pairs, reference, [4])
    assert metrics["rewards/margins"] == pytest.approx(ARGS.beta * (1 - 2 + 3 - 4) / 4, abs=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(ARGS.beta * 4 / 4, abs=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(ARGS.beta * 6 / 4, abs=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)


# ---- Rankings ----


def test_rankings_are_repeated_choices(model):
    """Against loops over single rows: P = prod_k exp(r_k) / sum_{l >= k} exp(r_l), r = beta log pi / pi_ref; a tie is
    the mean over both orders. Metrics are of the best and the worst.
    """
    other = make_model("gpt2", seed=3)
    rows = ragged_comparisons()
    reference = dpo.reference_logps(other, rows, ARGS, nullcontext)
    assert reference.shape == (4, 4)
    losses, sums = dpo.forward(model, rows, reference, ARGS, nullcontext)
    want, chosen, rejected = [], 0.0, 0.0
    for completions, ranking, mu, _ in rows:
        rewards = []
        for ids, trained in completions:
            mask = torch.tensor(trained[1:])
            ratio = naive_logprobs(model, ids)[mask].sum() - naive_logprobs(other, ids)[mask].sum()
            rewards.append(ARGS.beta * ratio.item())
        orders = [rewards]
        if ranking == [1, 1, 2]:
            orders.append([rewards[1], rewards[0], rewards[2]])
        nll = [sum(math.log(sum(map(math.exp, r[k:]))) - r[k] for k in range(len(r))) for r in orders]
        if mu != 1.0:  # a soft label, of a pair
            backwards = math.log(sum(map(math.exp, rewards))) - rewards[1]
            nll = [mu * nll[0] + (1 - mu) * backwards]
        want.append(sum(nll) / len(nll))
        chosen += rewards[0]
        rejected += rewards[-1]
    assert losses.tolist() == pytest.approx(want, abs=2e-4)
    assert sums["loss"].item() == pytest.approx(sum(want), abs=5e-4)
    assert sums["rewards/chosen"].item() == pytest.approx(chosen, abs=2e-4)
    assert sums["rewards/margins"].item() == pytest.approx(chosen - rejected, abs=4e-4)


def test_two_in_a_ranking_are_a_pair(bpe_tokenizer):
    """From the file on: `completions` and `ranking` of two are `chosen` and `rejected`, whichever comes first."""
    pair = {"_where": "a:1", "prompt": "me~", "chosen": "hello", "rejected": "there"}
    two = {"_where": "a:1", "prompt": "me~", "completions": ["there", "hello"], "ranking": [2, 1]}
    assert load_comparisons(bpe_tokenizer, [pair], [2], 99) == load_comparisons(bpe_tokenizer, [two], [2], 99)


@pytest.mark.parametrize("h", [-7.0, 0.3, 6.0])
def test_plackett_luce_of_two_is_dpo(h):
    rewards = torch.tensor([0.1 * h, 0.0], dtype=torch.float64)
    assert plackett_luce_loss(rewards, [1, 2]).item() == pytest.approx(loss(h)[0], abs=1e-12)


@pytest.mark.parametrize("beta, is_pi_star", [(0.5, True), (1.0, False)])
def test_dpo_on_population_rankings_reaches_the_optimum(monkeypatch, beta, is_pi_star):
    """All orders of all triples of five completions, weighted by their Plackett-Luce chances under r: the minimum of
    `forward`'s losses is pi* = pi_ref exp(r / 0.5) / Z. With another beta it is not.
    """
    generator = torch.Generator().manual_seed(7)
    ref, reward = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    ref = torch.log_softmax(ref, 0)
    rows, chances = [], []
    for order in itertools.permutations(range(5), 3):
        rows.append(([([0, y], [False, True]) for y in order], [1, 2, 3], 1.0, None))
        r = reward[list(order)]
        chances.append(math.exp(sum(r[k] - r[k:].logsumexp(0) for k in range(3))))
    chances = torch.tensor(chances, dtype=torch.float64)
    policy = torch.nn.Parameter(ref.clone())
    spread = lambda model, ids, trained: torch.log_softmax(model, 0)[ids] * trained
    monkeypatch.setattr(dpo, "sequence_logprobs", spread)
    args = dpo.Args(beta=beta)
    start = dpo.reference_logps(policy, rows, args, nullcontext).double()
    optimizer = torch.optim.LBFGS([policy], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = (chances * dpo.forward(policy, rows, start, args, nullcontext)[0]).sum()
        value.backward()
        return value

    optimizer.step(closure)
    gap = (torch.log_softmax(policy.detach(), 0) - torch.log_softmax(ref + reward / 0.5, 0)).abs().max()
    assert (gap < 1e-3) == is_pi_star and (is_pi_star or gap > 0.3)


@scripts("dpo")
def test_options_of_pairs_are_refused_for_rankings(refused):
    for flags in ({"loss_type": "ipo"}, {"label_smoothing": 0.1}):
        assert "are for pairs" in refused(dataset="data/rankings.jsonl", **flags)


# ---- the optimum ----

V, T, BETA = 4, 3, 0.5
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (64, 3), all there are


class Tabular(torch.nn.Module):
    """An autoregressive policy with free logits for each prefix: it can represent any distribution of 64 sequences."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.nn.ParameterList(
            torch.randn(V**t, V, generator=generator, dtype=torch.float64) for t in range(T))  # fmt: skip

    def forward(self):
        total, prefix = 0.0, torch.zeros(len(SEQUENCES), dtype=torch.long)
        for t in range(T):
            logp = torch.log_softmax(self.logits[t], -1)
            total = total + logp[prefix, SEQUENCES[:, t]]
            prefix = prefix * V + SEQUENCES[:, t]
        return total  # log pi of all 64 sequences


def fit(policy, ref, i, j, weight, mu, loss_type="sigmoid", beta=BETA):
    """Minimize the weighted dpo_loss over pairs (i, j) with L-BFGS, from the reference."""
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-15,
                                  history_size=50, line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        logps = policy()
        value = (weight * dpo.dpo_loss(logps[i], logps[j], ref[i], ref[j], mu, beta, loss_type, 0.0)[0]).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return policy().detach()


@pytest.fixture(scope="module")
def world():
    """(log pi_ref, r, log pi*, J): pi* = pi_ref exp(r / beta) / Z."""
    ref = Tabular(0)().detach()
    reward = torch.randn(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    optimum = torch.log_softmax(ref + reward / BETA, 0)
    objective = lambda logp: (logp.exp() * (reward - BETA * (logp - ref))).sum()
    return ref, reward, optimum, objective


def all_pairs():
    i, j = torch.triu_indices(64, 64, 1)
    return i, j, torch.full((len(i),), 1 / len(i), dtype=torch.float64)


def test_dpo_on_population_preferences_reaches_the_optimum(world):
    """Labels mu = P(i beats j) under Bradley-Terry on r: the minimum is pi*, on 64 sequences of three tokens."""
    ref, reward, optimum, objective = world
    i, j, weight = all_pairs()
    got = fit(Tabular(0), ref, i, j, weight, torch.sigmoid(reward[i] - reward[j]))
    assert (got - optimum).abs().max() < 1e-3
    gap, kl = objective(optimum) - objective(got), (got.exp() * (got - optimum)).sum()
    assert abs(gap - BETA * kl) < 1e-12  # J(pi*) - J(pi) = beta KL(pi || pi*)
    other = Tabular(9)().detach()
    assert objective(optimum) - objective(other) == pytest.approx(
        BETA * (other.exp() * (other - optimum)).sum().item()
    )


def test_controls_do_not_reach_it(world):
    """Without the reference, with another beta or with the labels turned round, the optimum is missed widely."""
    ref, reward, optimum, _ = world
    i, j, weight = all_pairs()
    mu = torch.sigmoid(reward[i] - reward[j])
    assert (fit(Tabular(0), torch.zeros(64), i, j, weight, mu) - optimum).abs().max() > 0.5
    assert (fit(Tabular(0), ref, i, j, weight, mu, beta=2 * BETA) - optimum).abs().max() > 0.5
    assert (fit(Tabular(0), ref, i, j, weight, 1 - mu) - optimum).abs().max() > 0.5


def test_ipo_on_population_preferences_reaches_its_own_fixed_point(world):
    """Its margins regress on (2 p - 1) / (2 beta); over all pairs the least-squares solution is the row mean of that."""
    ref, reward, _, _ = world
    i, j, weight = all_pairs()
    p = torch.sigmoid(reward[:, None] - reward[None, :])
    want = torch.log_softmax(ref + ((2 * p - 1) / (2 * BETA)).sum(1) / 64, 0)
    got = fit(Tabular(0), ref, i, j, weight, p[i, j], loss_type="ipo")
    assert (got - want).abs().max() < 1e-3


def test_dpo_on_sampled_labels_is_within_its_standard_error(world):
    """40,000 pairs judged once each, ties as half a vote from two judges: z-scores of beta log pi / pi_ref,
    centred, by the inverse Fisher information of Bradley-Terry have mean square 1.
    """
    ref, reward, _, _ = world
    generator = torch.Generator().manual_seed(11)
    i = torch.randint(64, (40_000,), generator=generator)
    j = (i + torch.randint(1, 64, (40_000,), generator=generator)) % 64
    p = torch.sigmoid(reward[i] - reward[j])
    votes = torch.rand(2, 40_000, generator=generator, dtype=torch.float64) < p
    judges = torch.where(
        torch.arange(40_000) % 4 == 0, 2, 1
    )  # every fourth pair has two judges, so ties occur
    mu = torch.where(judges == 2, votes.double().mean(0), votes[0].double())
    assert (mu == 0.5).any()
    got = fit(Tabular(0), ref, i, j, judges / judges.sum(), mu)
    implicit = BETA * (got - ref)
    error = implicit - implicit.mean() - (reward - reward.mean())
    information = torch.zeros(64, 64, dtype=torch.float64)
    curvature = judges * p * (1 - p)
    for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
        information.index_put_((a, b), sign * curvature, accumulate=True)
    z = error / torch.linalg.pinv(information).diagonal().sqrt()
    assert z.abs().max() < 4.5
    assert 0.5 < z.square().mean() < 1.6  # 63 degrees of freedom: 1 +- 0.18


def test_dpo_loss_alone_is_that_of_the_paper():
    """For who copies it: hard labels, beta 0.1, no smoothing; and an option that does not exist is an error."""
    logps = torch.tensor([[-3.0, -1.0], [-4.0, -2.5], [-3.5, -1.5], [-3.0, -2.0]], dtype=torch.float64)
    losses, *_ = dpo.dpo_loss(*logps)
    want = [math.log1p(math.exp(-0.1 * (0.5 + 1.0))), math.log1p(math.exp(-0.1 * (0.5 + 0.5)))]
    assert losses.tolist() == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="hinge"):
        dpo.dpo_loss(*logps, loss_type="hinge")
