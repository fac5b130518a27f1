"""GRPO: advantages, losses and token weights by hand, by loops and by enumeration; rollouts and whole updates of
grpo.main against single rows and float64 autograd; the optima and exact gradients that each setting has.
"""

import contextlib
import itertools
import json
import math
import random
import statistics
from functools import lru_cache
from types import SimpleNamespace

import common
import pytest
import torch
import transformers
from common import kl_estimate
from conftest import (
    LENGTHS, MASK, POISON, STOPS, VOCABULARY, double_loads, make_model, noise, poisoned, pure,
    ragged_rows, sides, watching, word_tokenizer)
from rl import (
    LAYOUTS, PLACED, Tabular, all_responses, bounded, flat, make_batch, make_folders, mask_of, optimizer_steps, rows_of,
    same_rows, score_logprobs, shares_of_a_word, vector, watch_micro_batches)
from safetensors.torch import load_file

import grpo

pytestmark = pytest.mark.usefixtures("no_pictures")
layouts = pytest.mark.parametrize("mask", LAYOUTS.values(), ids=LAYOUTS.keys())
BASELINES, SCALES = ("mean", "leave_one_out"), ("group", "batch", "none")
ESTIMATORS, LEVELS, LOSS_TYPES = ("k1", "k2", "k3"), ("token", "sequence"), ("grpo", "dapo", "dr_grpo")
RLOO = {"kl_in": "reward", "baseline": "leave_one_out", "scale_rewards": "none",
        "importance_sampling_level": "sequence"}  # fmt: skip


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- Token weights ----


def test_three_aggregations_by_hand():
    """Losses of 1 in a response of one token and 2 in one of four."""
    mask, losses = torch.arange(4) < torch.tensor([1, 4])[:, None], torch.tensor([[1.0], [2.0]])
    for loss_type, want in (("grpo", 1.5), ("dapo", 1.8), ("dr_grpo", 0.5625)):
        weights = pure(grpo.token_weights, mask, loss_type, 8)
        assert (losses * weights).sum().item() == pytest.approx(want, abs=1e-6), loss_type


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1, 7], [3, 3, 2, 6, 1]])
def test_token_weights_by_loops_whatever_the_padding(loss_type, lengths):
    for padding in (0, 1, 9):
        width = max(lengths) + padding
        weights = grpo.token_weights(torch.arange(width) < torch.tensor(lengths)[:, None], loss_type, 40)
        assert weights.shape == (len(lengths), width) and weights.is_floating_point()
        for b, n in enumerate(lengths):
            of = {"grpo": len(lengths) * n, "dapo": sum(lengths), "dr_grpo": len(lengths) * 40}[loss_type]
            want = [1 / of] * n + [0.0] * (width - n)
            assert weights[b].tolist() == pytest.approx(want, rel=1e-6, abs=0)
        behind = mask_of([1 + b % 3 for b in range(len(lengths))], lengths)  # the same behind prompts
        placed = grpo.token_weights(behind, loss_type, 40)
        assert placed[behind].tolist() == weights[weights > 0].tolist() and (placed[~behind] == 0).all()
        assert loss_type == "dr_grpo" or weights.sum().item() == pytest.approx(1.0, rel=1e-6)


# ---- Advantages ----


def advantages_by_loops(groups, baseline="mean", scale="group"):
    """Of lists of rewards, by the statistics module."""
    result, everything = [], [r for group in groups for r in group]
    for group in groups:
        row = []
        for i, r in enumerate(group):
            a = r - statistics.fmean(group if baseline == "mean" else group[:i] + group[i + 1 :])
            if scale != "none":
                a /= statistics.stdev(group if scale == "group" else everything) + 1e-4
            row.append(a if max(group) > min(group) else 0.0)
        result.append(row)
    return result


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_advantages_by_loops(baseline, scale):
    for P, G in ((3, 5), (1, 2), (7, 4), (4, 4)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            rewards = (noise(P, G, seed=P) * tensor(*range(1, P + 1))[:, None] + 3).to(dtype)
            rewards[-1] = rewards[-1, 0] if P > 1 else rewards[-1]  # a group of equal rewards
            got = pure(grpo.group_advantages, rewards, baseline, scale)
            want = tensor(*advantages_by_loops(rewards.double().tolist(), baseline, scale))
            assert got.dtype == dtype and (got - want).abs().max() < tolerance
            assert got.sum(1).abs().max() < 10 * tolerance  # those of a group sum to 0
            moved = rewards + 16 * torch.arange(P, dtype=dtype)[:, None]  # each prompt's by its own constant
            change = (grpo.group_advantages(moved, baseline, "group") -
                      grpo.group_advantages(rewards, baseline, "group"))  # fmt: skip
            assert change.abs().max() < 100 * tolerance
    assert torch.equal(grpo.group_advantages(rewards), grpo.group_advantages(rewards, "mean", "group"))


def test_advantages_by_hand():
    got = grpo.group_advantages(tensor([1, 0, 0, 0]))  # the population's std would give 1.7317
    assert (got - tensor(1.4997, -0.4999, -0.4999, -0.4999)).abs().max() < 5e-5
    got = grpo.group_advantages(tensor([1, 2, 3, 6]), "leave_one_out", "none")
    assert (got - tensor(-8 / 3, -4 / 3, 0, 4)).abs().max() < 1e-12
    got = grpo.group_advantages(tensor([0, 1], [0, 3]), "mean", "batch")
    std = math.sqrt((1 + 0 + 1 + 2**2) / 3)  # n - 1, around the mean of all, 1
    assert (got * (std + 1e-4) - tensor([-0.5, 0.5], [-1.5, 1.5])).abs().max() < 1e-12


def test_groups_are_rows():
    """Rewards by prompt, all of a prompt's responses alike: nothing to learn, in any layout but a transposed one."""
    for baseline, scale in itertools.product(BASELINES, SCALES):
        got = grpo.group_advantages(torch.tensor([0.0, 0, 0, 1, 1, 1]).view(-1, 3), baseline, scale)
        assert got.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_0(dtype):
    """The mean of twelve floats 0.7 is not 0.7, and over a small std that is noise."""
    for c, G, baseline, scale in itertools.product((0, 0.01, 0.1, 0.3, 0.7, 1), (4, 8, 12, 16), BASELINES, SCALES):
        rewards = torch.full((3, G), c, dtype=dtype)
        assert (grpo.group_advantages(rewards, baseline, scale) == 0).all()
        assert grpo.zero_std(rewards).tolist() == [True] * 3
        rewards[1, 0] += 1  # beside a group that does teach
        got = grpo.group_advantages(rewards, baseline, scale)
        assert (got[[0, 2]] == 0).all() and got[1, 0] > 0.4 > 0 > got[1, 1:].max()
        assert grpo.zero_std(rewards).tolist() == [True, False, True]


def test_rounding_is_no_variance():
    """Rewards that differ by the rounding of a KL are equal: over std + 1e-4 they would be advantages of 0.01."""
    rewards = torch.tensor([[2.0, 2.0 + 3e-6, 2.0 - 3e-6, 2.0], [0.0, 1e-3, 0.0, 0.0]])
    for baseline, scale in itertools.product(BASELINES, SCALES):
        got = grpo.group_advantages(rewards, baseline, scale)
        assert (got[0] == 0).all() and got[1, 1] > 0 > got[1, 0]
    assert grpo.zero_std(rewards).tolist() == [True, False]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_counts_as_equal(size):
    """1e-5 of the largest reward, or 1e-5 if all are below 1."""
    near, far = 0.8e-5 * max(size, 1), 2e-5 * max(size, 1)
    rewards = torch.tensor([[size, size + near], [size, size - near], [-size, -size - near],
                            [size, size + far], [size, size - far], [-size, -size - far]])  # fmt: skip
    assert grpo.zero_std(rewards).tolist() == [True] * 3 + [False] * 3


def test_a_ratio_that_overflows_is_clipped():
    """exp(100) is infinite in fp32, and 0 times it no gradient at all."""
    logprobs = torch.tensor([[100.0, 0.1, 0.2]], requires_grad=True)
    old, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    for level in LEVELS:
        losses, clipped = grpo.grpo_loss(logprobs, old, old, torch.ones(1), mask, 0.0, importance_sampling_level=level)
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        assert losses[0, 0].item() == pytest.approx(-1.2) and clipped[0, 0]
        assert gradient.isfinite().all() and gradient[0, 0] == 0


def test_a_group_of_one_raises():
    for baseline, scale in itertools.product(BASELINES, SCALES):
        with pytest.raises(ValueError, match="group of one"):
            grpo.group_advantages(torch.ones(3, 1), baseline, scale)


# ---- Loss ----


def term(log_ratio, d, a, beta, estimator, low=0.2, high=0.2):
    """(loss, d loss / d log pi, whether the clip decides), by cases; d = log pi - log pi_ref."""
    rho = math.exp(log_ratio)
    clipped = rho > 1 + high if a > 0 else rho < 1 - low if a < 0 else False
    loss, slope = (-a * (1 + high if a > 0 else 1 - low), 0.0) if clipped else (-a * rho, -a * rho)
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
    pull = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[estimator]
    return loss + beta * kl, slope + beta * pull, clipped


def terms(new, old, ref, a, beta, estimator, level, low=0.2, high=0.2):
    """[(loss, derivative, clipped)] of each of a response's tokens, which at the level "sequence" all carry the same:
    the derivative of one of them in every token's log-prob.
    """
    if level == "sequence":
        new, old, ref, n = [math.fsum(new)], [math.fsum(old)], [math.fsum(ref)], len(new)
        return [term(new[0] - old[0], new[0] - ref[0], a, beta, estimator, low, high)] * n
    return [term(x - y, x - z, a, beta, estimator, low, high) for x, y, z in zip(new, old, ref)]


def loss_of(log_ratio, advantages, mask=None, d=None, kl_coef=0.0, **options):
    """(losses, d their sum / d log pi, clipped) at given log-ratios, away from log pi = 0."""
    old = torch.full_like(log_ratio, -1.7)
    logprobs = (old + log_ratio).requires_grad_()
    ref = old if d is None else logprobs.detach() - d
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    losses, clipped = pure(grpo.grpo_loss, logprobs, old, ref, advantages, mask, kl_coef, **options)
    losses.sum().backward()
    assert losses.shape == clipped.shape == mask.shape and clipped.dtype == torch.bool
    return losses.detach(), logprobs.grad, clipped


def test_clip_by_hand():
    advantages = tensor(1, 1, -1, -1)
    for width in (1, 3):
        log_ratio = tensor(1.5, 0.5, 1.5, 0.5).log()[:, None].expand(4, width)
        losses, gradient, clipped = loss_of(log_ratio, advantages)
        assert (losses - tensor(-1.2, -0.5, 1.5, 0.8)[:, None]).abs().max() < 1e-12
        assert (gradient - tensor(0, -0.5, 1.5, 0)[:, None]).abs().max() < 1e-12
        assert clipped.tolist() == [[x] * width for x in (True, False, False, True)]


def test_gradient_vanishes_exactly_where_clipped_and_improving():
    for low, high in ((0.2, 0.28), (0.1, 0.1), (0.3, 0.2)):
        edges = [1 - low - 0.01, 1 - low + 0.01, 1.0, 1 + high - 0.01, 1 + high + 0.01, 3.0, 0.1]
        for rho, a in itertools.product(edges, (-2.5, -0.3, 0.0, 0.7, 3.0)):
            losses, gradient, clipped = loss_of(tensor([rho]).log(), tensor(a), clip_coef=low, clip_coef_high=high)
            loss, slope, decided = term(math.log(rho), 0.0, a, 0.0, "k3", low, high)
            assert losses.item() == pytest.approx(loss, abs=1e-12)
            assert gradient.item() == pytest.approx(slope, abs=1e-12) and clipped.item() is decided
    for rho, alive in ((1.25, True), (1.29, False)):  # as in DAPO: 0.2 down, 0.28 up
        _, gradient, clipped = loss_of(tensor([rho]).log(), tensor(1.0), clip_coef=0.2, clip_coef_high=0.28)
        assert (gradient.item() == pytest.approx(-rho)) is alive and clipped.item() is not alive


def test_ratio_of_a_token_and_of_a_sequence_by_hand():
    wide = {"clip_coef": 0.9, "clip_coef_high": 9.0}
    for row, n, sequence in (([0.1, -0.1, 0.3], 2, 1.0), ([0.1, 0.1, 0.3], 2, math.exp(0.2)),
                             ([0.1, 0.1, 0.3], 3, math.exp(0.5)), ([0.1, 0.1, 60.0], 2, math.exp(0.2))):  # fmt: skip
        mask = torch.arange(3)[None] < n
        losses, gradient, _ = loss_of(tensor(row), tensor(1.0), mask, **wide)
        want = [-math.exp(x) for x in row[:n]] + [0.0] * (3 - n)
        assert losses[0].tolist() == pytest.approx(want) and gradient[0].tolist() == pytest.approx(want)
        losses, gradient, _ = loss_of(tensor(row), tensor(1.0), mask, importance_sampling_level="sequence", **wide)
        assert losses[0].tolist() == pytest.approx([-sequence] * n + [0.0] * (3 - n))
        assert gradient[0].tolist() == pytest.approx([-sequence * n] * n + [0.0] * (3 - n))  # n equal terms
    _, gradient, clipped = loss_of(tensor([0.1, 0.1, 0.3]), tensor(1.0), mask, importance_sampling_level="sequence")
    assert clipped.tolist() == [[True, True, False]] and (gradient == 0).all()  # e^0.2 > 1.2 > e^0.1
    assert not loss_of(tensor([0.1, 0.1, 0.3]), tensor(1.0), mask)[2].any()


def inputs_of(shape=(4, 16), dtype=torch.float64):
    """log-probs, old and reference ones apart by 0.25 and 0.5 nats, and advantages."""
    logprobs = noise(*shape, seed=11, dtype=dtype) - 2
    old = logprobs + 0.25 * noise(*shape, seed=12, dtype=dtype)
    return logprobs, old, logprobs + 0.5 * noise(*shape, seed=13, dtype=dtype), noise(shape[0], seed=14, dtype=dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_by_loops_and_by_finite_differences(estimator, level):
    options = dict(kl_coef=0.3, kl_estimator=estimator, clip_coef=0.2, clip_coef_high=0.28,
                   importance_sampling_level=level)  # fmt: skip
    decided = set()
    for shape, lengths in (((4, 16), LENGTHS), ((4, 4), [4, 1, 3, 2]), ((7, 2), [1, 2, 2, 1, 1, 2, 2])):
        logprobs, old, ref, advantages = inputs_of(shape)
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        logprobs.requires_grad_()
        losses, clipped = pure(grpo.grpo_loss, logprobs, old, ref, advantages, mask, **options)
        losses.sum().backward()
        for b, n in enumerate(lengths):
            rows = [x[b, :n].tolist() for x in (logprobs, old, ref)]
            each = terms(*rows, advantages[b].item(), 0.3, estimator, level, 0.2, 0.28)
            padding = [0.0] * (shape[1] - n)
            assert losses[b].tolist() == pytest.approx([loss for loss, *_ in each] + padding, abs=1e-12)
            assert clipped[b].tolist() == [cut for *_, cut in each] + [False] * len(padding)
            for t in range(n):
                h = torch.zeros(shape, dtype=torch.float64)
                h[b, t] = 1e-6
                up, down = (grpo.grpo_loss(logprobs.detach() + s * h, old, ref, advantages, mask, **options)[0].sum()
                            for s in (1, -1))  # fmt: skip
                assert logprobs.grad[b, t].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)
        assert (logprobs.grad[~mask] == 0).all()
        decided |= set(clipped[mask].tolist())
    assert decided == {True, False}


def test_kl_coef_0_needs_no_reference():
    logprobs, old, ref, advantages = inputs_of()
    want = grpo.grpo_loss(logprobs, old, ref, advantages, MASK, 0.0)[0]
    assert torch.equal(grpo.grpo_loss(logprobs, old, ref * math.nan, advantages, MASK, 0.0)[0], want)
    assert not torch.equal(grpo.grpo_loss(logprobs, old, ref, advantages, MASK, 0.3)[0], want)


@layouts
@pytest.mark.parametrize("poison", [*POISON, -1e4])
@pytest.mark.parametrize("level", LEVELS)
def test_loss_never_sees_the_padding(poison, level, mask):
    """exp of a log-ratio there overflows in fp32: masked behind it, the gradient would be 0 * inf."""
    clean = None
    for estimator, dirty in itertools.product(ESTIMATORS, ((), (0,), (1,), (2,), (0, 1), (0, 1, 2))):
        *inputs, advantages = inputs_of(mask.shape, dtype=torch.float32)
        inputs = [poisoned(x, poison, mask) if i in dirty else x for i, x in enumerate(inputs)]
        inputs[0].requires_grad_()
        losses, clipped = pure(grpo.grpo_loss, *inputs, advantages, mask, 0.3, estimator,
                               importance_sampling_level=level)  # fmt: skip
        losses.sum().backward()
        got = losses.detach(), clipped, inputs[0].grad
        clean = clean if dirty else got
        assert all(map(torch.equal, got, clean)) and all(x.isfinite().all() for x in got)
        assert all((x[~mask] == 0).all() for x in got) and got[2].norm() > 0.1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_where_the_response_stands_changes_nothing(estimator, level):
    """The same numbers behind prompts, in front of padding."""
    *inputs, advantages = inputs_of()
    options = dict(kl_coef=0.3, kl_estimator=estimator, importance_sampling_level=level)
    behind = [torch.full(PLACED.shape, math.nan, dtype=x.dtype).masked_scatter(PLACED, x[MASK]) for x in inputs]
    alone = grpo.grpo_loss(*inputs, advantages, MASK, **options)
    placed = grpo.grpo_loss(*behind, advantages, PLACED, **options)
    assert (alone[0][MASK] - placed[0][PLACED]).abs().max() < 1e-12 and torch.equal(alone[1][MASK], placed[1][PLACED])
    assert (placed[0][~PLACED] == 0).all() and not placed[1][~PLACED].any()


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    """The loss of a normalized group is 0 there and its gradient is not: -A (1[y] - p) in the logits."""
    logits, tokens = noise(4, 6, 7, seed=8).requires_grad_(), torch.randint(
        7, (4, 6), generator=torch.Generator().manual_seed(9))  # fmt: skip
    advantages, mask = grpo.group_advantages(noise(1, 4, seed=10))[0], torch.ones(4, 6, dtype=torch.bool)
    logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
    losses, clipped = grpo.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, mask, 0.3)
    loss = (losses * grpo.token_weights(mask, "grpo", 6)).sum()
    loss.backward()
    want = -advantages[:, None, None] * (torch.nn.functional.one_hot(tokens, 7) - torch.softmax(logits.detach(), -1))
    assert abs(loss.item()) < 1e-6 and not clipped.any()
    assert (logits.grad - want / 24).abs().max() < 1e-8 and logits.grad.norm() > 0.1


# ---- KL through the loss, by enumeration ----

K = 5


@pytest.mark.parametrize("level", LEVELS)
def test_value_and_gradient_of_each_kl_estimator(level):
    """Five tokens weighed by pi: in the loss k1 pulls nowhere, k2 along KL(pi || ref), k3 along KL(ref || pi)."""
    theta, ref = (1.3 * noise(K, seed=0)).requires_grad_(), torch.log_softmax(1.3 * noise(K, seed=1), 0)
    p, mask = torch.log_softmax(theta, 0), torch.ones(K, 1, dtype=torch.bool)
    weight, old = p.detach().exp(), p.detach()[:, None]
    slope = lambda value: torch.autograd.grad(value, theta, retain_graph=True)[0]
    kl, reverse = (p.exp() * (p - ref)).sum(), slope((p.exp() * (p - ref)).sum())
    forward = slope((ref.exp() * (ref - p)).sum())
    assert (forward - reverse).abs().max() > 0.01
    value, gradient = {}, {}
    for kind in ESTIMATORS:
        losses, _ = grpo.grpo_loss(p[:, None], old, ref[:, None], torch.zeros(K).double(), mask, 1.0, kind,
                                   importance_sampling_level=level)  # fmt: skip
        mean = (weight * losses[:, 0]).sum()
        value[kind], gradient[kind] = mean.item(), slope(mean)
    assert value["k1"] == pytest.approx(kl.item(), abs=1e-12) == pytest.approx(value["k3"], abs=1e-12)
    for kind, want in (("k1", 0.0), ("k2", reverse), ("k3", forward)):
        assert (gradient[kind] - want).abs().max() < 1e-12, kind
    penalty = kl_estimate(old, ref[:, None], "k1")[:, 0]  # in the reward
    losses, _ = grpo.grpo_loss(p[:, None], old, ref[:, None], -penalty, mask, 0.0, importance_sampling_level=level)
    assert (slope((weight * losses[:, 0]).sum()) - reverse).abs().max() < 1e-12


# ---- Exact gradients and optima, by enumeration of all groups ----

V, T, BETA, EOS = 3, 3, 0.5, 2


def expected_loss(logprobs, reference, scores, mask, G=2, baseline="leave_one_out", scale="none", level="sequence",
                  loss_type="grpo", kl_in="reward", estimator="k1", beta=BETA, old=None, **clip):
    """The script's loss of a group of G, drawn from old (by default pi itself): the mean over all tuples of S
    responses, whose log-probs are (S, R). Padding is poisoned.
    """
    old, S, R = (logprobs.detach() if old is None else old), len(mask), mask.shape[1]
    weight = torch.where(mask, old, 0.0).sum(1).exp()
    logprobs, old, ref = (torch.where(mask, x, y) for x, y in ((logprobs, 99.0), (old, 0.0), (reference, -99.0)))
    rewards = scores
    if kl_in == "reward":
        rewards = scores - beta * torch.where(mask, kl_estimate(old, ref, estimator), 0.0).sum(1)
    groups = torch.cartesian_prod(*[torch.arange(S)] * G)  # (S^G, G)
    advantages = grpo.group_advantages(rewards[groups], baseline, scale)
    rows = groups.flatten()
    losses, _ = grpo.grpo_loss(
        logprobs[rows], old[rows], ref[rows], advantages.flatten(), mask[rows], beta if kl_in == "loss" else 0.0,
        estimator, importance_sampling_level=level, **clip)  # fmt: skip
    weights = grpo.token_weights(mask[rows], loss_type, R) * len(groups)  # of a group alone
    return (weight[groups].prod(1) * (losses * weights).view(len(groups), -1).sum(1)).sum()


class World:
    """The 15 responses of up to three tokens that end at an EOS or there; a reference and a score for each."""

    def __init__(self):
        self.tokens, self.mask = all_responses(V, T, EOS)
        self.scores, self.reference = noise(len(self.tokens), seed=50), Tabular(V, T, 20)(self.tokens).detach()

    def total(self, logprobs):
        return torch.where(self.mask, logprobs, 0.0).sum(1)  # log pi(y)

    def loss(self, logprobs, **options):
        return expected_loss(logprobs, self.reference, self.scores, self.mask, **options)


def misfit(got, want):
    """What no factor explains of got by want, as a share of it."""
    return ((got - (got @ want) / (want @ want) * want).norm() / got.norm()).item()


@pytest.fixture
def exact(float64):
    """(world, policy, log-probs, gradients of E[r], KL(pi || ref) and KL(ref || pi))"""
    world = World()
    policy = Tabular(V, T, 3)
    logprobs = policy(world.tokens)
    p, q = world.total(logprobs), world.total(world.reference)
    assert p.exp().sum().item() == pytest.approx(1) == pytest.approx(q.exp().sum().item()) and len(p) == 15
    values = (p.exp() * world.scores).sum(), (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    return world, policy, logprobs, *[flat(policy, value) for value in values]


@pytest.mark.parametrize("G", [2, 3])
def test_leave_one_out_has_the_true_gradient(exact, G):
    """Of E[r] - beta KL, k1 in the reward; with the mean it is (G - 1) / G of it, with the std along another way."""
    world, policy, logprobs, reward, kl, _ = exact
    want = BETA * kl - reward
    got = lambda **options: flat(policy, world.loss(logprobs, G=G, **options))
    assert want.norm() > 0.1 and (got() - want).abs().max() < 1e-9
    assert (got(baseline="mean") - want * (G - 1) / G).abs().max() < 1e-9
    for baseline in BASELINES:
        assert misfit(got(baseline=baseline, scale="group"), want) > 0.05
    assert misfit(got(beta=-BETA), want) > 0.1 and misfit(got(estimator="k3"), want) > 0.05


def test_which_length_normalization_is_biased(exact):
    """Each token's ratio on-policy: summed over a response it is exact, up to Dr. GRPO's constant; divided by the
    response's length it is not."""
    world, policy, logprobs, reward, kl, _ = exact
    got = lambda **options: flat(policy, world.loss(logprobs, level="token", **options))
    assert (got(loss_type="dr_grpo") - (BETA * kl - reward) / T).abs().max() < 1e-9
    assert misfit(got(loss_type="grpo"), BETA * kl - reward) > 0.05


def test_gradient_of_kl_in_the_loss(exact):
    """Of a whole response k2 has the gradient of KL(pi || ref) and k3 that of KL(ref || pi); of tokens neither has,
    since none answers for what follows it."""
    world, policy, logprobs, reward, reverse, forward = exact
    got = lambda **options: flat(policy, world.loss(logprobs, kl_in="loss", **options))
    for estimator, kl in (("k1", 0.0), ("k2", reverse), ("k3", forward)):
        assert (got(estimator=estimator) - (BETA * kl - reward)).abs().max() < 1e-9, estimator
        by_token = T * got(estimator=estimator, level="token", loss_type="dr_grpo") + reward
        assert (by_token - BETA * kl).abs().max() > 1e-3 or estimator == "k1"
    assert (forward - reverse).abs().max() > 0.01


def test_ratio_of_a_sequence_corrects_for_another_sampler(exact):
    """Off-policy, clip out of reach: that of tokens leaves the others' ratios out."""
    world, policy, logprobs, reward, *_ = exact
    old, wide = Tabular(V, T, 9)(world.tokens).detach(), {"clip_coef": 1.0, "clip_coef_high": 1e9}
    got = lambda **options: flat(policy, world.loss(logprobs, old=old, beta=0.0, **options))
    assert (got(**wide) + reward).abs().max() < 1e-9
    assert misfit(got(level="token", loss_type="dr_grpo", **wide), reward) > 0.05
    assert misfit(got(), reward) > 0.05  # clipped


SCORES, REFERENCE = tensor(1, 0.5, 0, -0.5, 2), tensor(0.1, 0.3, 0.4, 0.15, 0.05)


def bandit(steps=150, rate=1.0, sign=1.0, **options):
    """Where exact expected updates of a single-token policy end: probabilities. Natural gradients, from ref."""
    theta, mask = REFERENCE.log(), torch.ones(K, 1, dtype=torch.bool)
    for _ in range(steps):
        theta = torch.log_softmax(theta.detach(), 0).requires_grad_()
        p = torch.log_softmax(theta, 0)
        loss = expected_loss(p[:, None], REFERENCE.log()[:, None], sign * SCORES, mask, **options)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta - rate * gradient / p.exp()
    return torch.softmax(theta.detach(), 0)


def optimum(beta=BETA):
    return torch.softmax(REFERENCE.log() + SCORES / beta, 0)


def distance(p, q):
    return (p - q).abs().sum().item() / 2  # total variation


@pytest.mark.parametrize("level", LEVELS)
def test_which_optimum_each_kl_reaches(float64, level):
    """k1 in the reward and k2 in the loss: pi* = ref exp(r / beta) / Z. k3 in the loss: beta ref / (lambda - r)."""
    assert (optimum() - tensor(0.1559, 0.1721, 0.0844, 0.0116, 0.5760)).abs().max() < 5e-5
    low, high = 2.0, 9.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * REFERENCE / (middle - SCORES)).sum() > 1 else (low, middle)
    other = BETA * REFERENCE / (low - SCORES)
    assert (other - tensor(0.0483, 0.0978, 0.0983, 0.0296, 0.7260)).abs().max() < 5e-5
    assert distance(bandit(level=level), optimum()) < 1e-8
    assert distance(bandit(level=level, kl_in="loss", estimator="k2"), optimum()) < 1e-8
    k3 = bandit(level=level, kl_in="loss", estimator="k3", rate=0.5, steps=400)
    assert distance(k3, other) < 1e-7 and distance(k3, optimum()) == pytest.approx(0.182, abs=1e-3)


def test_controls_reach_other_ends(float64):
    """The reward's sign flipped; the KL's; k1 in the loss, which does nothing. The mean with beta KL
    in the loss, whose beta is in effect G / (G - 1) times itself, since only the advantage shrinks.
    """
    for options in (dict(sign=-1.0), dict(beta=-BETA, rate=0.1, steps=20), dict(kl_in="loss", estimator="k1")):
        assert distance(bandit(**options), optimum()) > 0.1, options
    got = bandit(kl_in="loss", estimator="k2", baseline="mean", G=2)
    assert distance(got, optimum(2 * BETA)) < 1e-8 < 0.1 < distance(got, optimum())
    assert distance(bandit(baseline="mean"), optimum()) < 1e-8  # in the reward both shrink


# ---- Models and folders ----


def reward_of(name, ids, number):
    """What these functions give to these ids, w4 .. w96 (0 .. 3 are skipped): all responses to an odd prompt the same,
    if uneven."""
    return number if name == "uneven" and number % 2 else sum(i for i in ids if i > 3) % 17 / 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


only = lambda kind: pytest.mark.parametrize("kind", [kind], indirect=True)


@pytest.fixture
def tiny(folders, kind, tmp_path):
    """tiny(**flags) -> Args of a run of one update: four groups of 3 responses, two minibatches, two epochs.
    reward is the name of a function of REWARD, or a tuple as the flag is."""

    def make(reward="score", **flags):
        data = str(folders / "prompts.jsonl")
        defaults = {
            "model": str(folders / kind), "dataset": data, "eval_dataset": data, "output_dir": str(tmp_path / "run"),
            "total_episodes": 12, "num_generations": 3, "batch_size": 6, "num_minibatches": 2, "update_epochs": 2,
            "micro_batch_size": 6, "max_new_tokens": 16, "eval_every": 0, "eval_samples": 2, "save_every": 0,
            "device": "cpu"}  # fmt: skip
        reward = reward if isinstance(reward, tuple) else (f"{folders}/reward.py:{reward}",)
        return grpo.Args(**{**defaults, "reward": reward, **flags})

    return make


@pytest.fixture
def watch(monkeypatch):
    return watching(monkeypatch, grpo)


@pytest.fixture
def double(monkeypatch, float64):
    double_loads(monkeypatch, grpo, "load_model", "load_reward")


def row_logprobs(model, prompt, response, temperature=1.0):
    """log pi(y_t) of one response from the model's own logits of that row alone, in float64: (n,)."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return torch.log_softmax(logits, -1)[range(len(response)), response]


# ---- Rollouts ----


def roll(policy, reference, rewards, prompts, stops, **flags):
    args = grpo.Args(**{"max_new_tokens": 12, "micro_batch_size": 2, "missing_eos_penalty": 0.75, **flags})
    rows = [({"prompt": "", "number": i}, ids) for i, ids in enumerate(prompts)]
    score = lambda *texts: torch.stack([reward(*texts) for reward in rewards], dim=1)
    batch, episodes = grpo.rollout(policy, reference, score, rows, stops, args, contextlib.nullcontext, 1)
    return batch, episodes, grpo.episode_metrics(episodes, args.reward)


def test_unfinished_rows_pay_and_masks_come_from_lengths(model, monkeypatch):
    """EOS early, EOS in the last slot, no EOS, another EOS of several, and the padding's id within a text."""
    rows = [[9, 2], [9, 8, 7, 6, 2], [9, 8, 2 + 1, 7, 6], [5, 60], [0, 9, 0, 2]]
    prompts = [[4], [5, 6], [7], [8, 9, 10], [11]]
    monkeypatch.setattr(common, "sample", lambda policy, prompts, *_, **__: make_batch(prompts, rows))
    seen = {}

    def reward(data, prompts, responses):
        seen.update(numbers=[row["number"] for row in data], prompts=prompts, responses=responses)
        return torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    batch, episodes, metrics = roll(model, model, [reward], prompts, [2, 60])
    assert seen == {"numbers": [0, 1, 2, 3, 4], "prompts": prompts, "responses": rows}
    assert episodes["rewards"].tolist() == [1, 2, 3 - 0.75, 4, 5]
    assert episodes["scores"].tolist() == [[1], [2], [3], [4], [5]]
    assert metrics["reward"] == pytest.approx(15 / 5 - 0.15)
    assert metrics["completions/eos_rate"] == pytest.approx(4 / 5)
    assert batch["mask"].sum(1).tolist() == episodes["lengths"].tolist() == [2, 5, 5, 2, 4]
    assert episodes["finished"].tolist() == [1, 1, 0, 1, 1]
    assert rows_of(batch) == list(zip(prompts, rows))
    assert metrics["completions/mean_length"] == pytest.approx(18 / 5)


def test_several_rewards_are_a_weighted_sum_that_skips_none(model):
    """NaN stands for None: a reward that has nothing to say of a response adds nothing to it."""
    nan, prompts = math.nan, sides(ragged_rows())[0]
    rewards = [lambda *_: torch.tensor([1.0, nan, 3.0, 0.0]), lambda *_: torch.tensor([nan, 5.0, 7.0, -1.0])]
    options = dict(missing_eos_penalty=0.0, reward=("a.py:f", "b.py:g"))
    _, episodes, metrics = roll(model, model, rewards, prompts, STOPS, reward_weights=(2.0, -0.5), **options)
    assert episodes["scores"].nan_to_num(9.0).tolist() == [[1, 9], [9, 5], [3, 7], [0, -1]]
    assert episodes["rewards"].tolist() == pytest.approx([2.0, -2.5, 6 - 3.5, 0.5])
    assert metrics["reward"] == pytest.approx(2.5 / 4)
    assert metrics["rewards/a.py:f"] == pytest.approx(4 / 3) and metrics["rewards/b.py:g"] == pytest.approx(11 / 3)
    _, episodes, _ = roll(model, model, rewards, prompts, STOPS, **options)
    assert episodes["rewards"].tolist() == pytest.approx([1.0, 5.0, 10.0, -1.0])
    with pytest.raises(SystemExit):
        roll(model, model, rewards[:1], prompts, STOPS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_its_metrics_by_loops(model, temperature):
    """Log-probs of both models and the KL from the models' own logits of single rows; policy is not reference."""
    reference, prompts = make_model("gpt2", seed=7), sides(ragged_rows())[0] * 2
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 0.25, 2.0])
    batch, episodes, metrics = roll(model, reference, [lambda *_: scores], prompts, STOPS, temperature=temperature,
                                    max_new_tokens=8)  # fmt: skip
    finished, kls, lengths = [], [], []
    with torch.no_grad():
        for i, (prompt, response) in enumerate(rows_of(batch)):
            n, mask = len(response), batch["mask"][i]
            assert prompt == prompts[i]
            assert not set(response[:-1]) & set(STOPS) and (n == 8 or response[-1] in STOPS)
            finished.append(response[-1] in STOPS)
            p, q = (row_logprobs(m, prompts[i], response, temperature) for m in (model, reference))
            assert (batch["logprobs"][i, mask] - p).abs().max() < 5e-5
            assert (batch["ref_logprobs"][i, mask] - q).abs().max() < 5e-5
            assert (batch["logprobs"][i, ~mask] == 0).all() and (batch["ref_logprobs"][i, ~mask] == 0).all()
            assert mask.tolist() == [len(prompt) <= t < len(prompt) + n for t in range(len(mask))]
            lengths.append(n)
            kls.append((p - q).sum().item())
    assert len(set(lengths)) > 2 and any(finished) and not all(finished)
    assert episodes["kl"].tolist() == pytest.approx(kls, abs=5e-4)
    paid = [score - 0.75 * (not done) for score, done in zip(scores.tolist(), finished)]
    assert episodes["rewards"].tolist() == pytest.approx(paid)
    mean = lambda x: sum(x) / len(x)
    assert metrics == pytest.approx({
        "reward": mean(paid), "kl": mean(kls), "completions/mean_length": mean(lengths),
        "completions/eos_rate": mean(finished)}, abs=5e-4)  # fmt: skip
    assert not any(x.requires_grad for x in (*batch.values(), *episodes.values()))


@only("llama")
def test_no_hidden_filter_in_sampling(tiny, folders, watch, tmp_path):
    """Whatever the checkpoint's generation_config says, the same samples; their log-probs are the policy's own."""
    poison = json.loads((folders / "llama" / "generation_config.json").read_text())
    poison |= {"top_k": 5, "top_p": 0.5, "repetition_penalty": 1.3, "min_new_tokens": 5, "temperature": 0.3}
    policy = make_model("llama")
    policy.save_pretrained(tmp_path / "poisoned")
    word_tokenizer().save_pretrained(tmp_path / "poisoned")
    (tmp_path / "poisoned" / "generation_config.json").write_text(json.dumps({**poison, "do_sample": True}))
    rollouts = watch("rollout")
    grpo.main(tiny(output_dir=str(tmp_path / "clean")))
    grpo.main(tiny(model=str(tmp_path / "poisoned")))
    (clean, _), (got, _) = rollouts[1][1], rollouts[4][1]
    assert rows_of(got) == rows_of(clean) and min(len(response) for _, response in rows_of(got)) < 5
    with torch.no_grad():
        for i, row in enumerate(rows_of(got)):
            want = row_logprobs(policy, *row)
            assert (got["logprobs"][i, got["mask"][i]] - want).abs().max() < 5e-5


# ---- Groups in a run ----


def test_a_group_is_one_prompt_and_several_samples(tiny, watch):
    rollouts = watch("rollout")
    grpo.main(tiny(num_generations=6, update_epochs=1))
    (inputs, (batch, _)) = rollouts[1]
    prompts, responses = zip(*rows_of(batch))
    for k in range(2):
        rows = [row["number"] for row, _ in inputs[3]][6 * k : 6 * k + 6]
        assert len(set(rows)) == 1 and len(set(map(tuple, prompts[6 * k : 6 * k + 6]))) == 1
        assert len({response[0] for response in responses[6 * k : 6 * k + 6]}) > 1
    assert prompts[0] != prompts[6]


@pytest.mark.parametrize("drop", [False, True])
def test_a_reward_of_the_prompt_alone_teaches_nothing(tiny, watch, drop):
    """Advantages and the gradient are exactly 0; without its groups there is no optimizer step at all, KL or not."""
    advantages = watch("group_advantages")
    with optimizer_steps() as steps:
        args = tiny("by_prompt", kl_coef=0.3 if drop else 0.0, drop_zero_std=drop, total_episodes=24)
        metrics = grpo.main(args)
    assert len(advantages) == 2 and len({r for (x, *_), _ in advantages for r in x.flatten().tolist()}) == 8
    assert all((result == 0).all() for _, result in advantages) and metrics["frac_reward_zero_std"] == 1
    assert len(steps) == (0 if drop else 8) and all((g == 0).all() for _, gradients in steps for g in gradients)
    assert metrics["reward_std"] == metrics["policy/clipfrac"] == metrics["grad_norm"] == metrics["loss"] == 0
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (args.model, f"{args.output_dir}/model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_penalty_comes_before_the_statistics(tiny, watch):
    """Equal scores: responses without EOS are told apart by the penalty alone, within their group."""
    advantages, rollouts = watch("group_advantages"), watch("rollout")
    metrics = grpo.main(tiny("by_prompt", missing_eos_penalty=0.5, max_new_tokens=4, kl_coef=0.0))
    ((rewards, *_), got), (_, (batch, _)) = advantages[0], rollouts[1]
    done = [response[-1] in STOPS for _, response in rows_of(batch)]
    scores = [prompt["number"] / 10 for prompt, _ in rollouts[1][0][3]]
    paid = [score - 0.5 * (not end) for score, end in zip(scores, done)]
    groups = [paid[i : i + 3] for i in range(0, 12, 3)]
    assert rewards.tolist() == [pytest.approx(group) for group in groups]
    assert got.tolist() == [pytest.approx(row, abs=1e-5) for row in advantages_by_loops(groups)]
    assert got.abs().max() > 0.5 and metrics["completions/eos_rate"] == pytest.approx(sum(done) / 12)
    assert metrics["reward"] == pytest.approx(sum(paid) / 12)


@only("gpt2")
@pytest.mark.parametrize("batch_size, num_minibatches, updates", [(6, 2, 6), (15, 1, 5), (6, 1, 12), (60, 1, 2)])
def test_each_prompt_once_a_pass(tiny, watch, batch_size, num_minibatches, updates):
    """A pass may end within an update, and an update hold several."""
    rollouts, episodes = watch("rollout"), updates * batch_size * num_minibatches
    grpo.main(tiny(batch_size=batch_size, num_minibatches=num_minibatches, total_episodes=episodes, max_new_tokens=2,
                   micro_batch_size=batch_size, update_epochs=1))  # fmt: skip
    first, *training, last = [[row["number"] for row, _ in inputs[3]] for inputs, _ in rollouts]
    assert len(training) == updates and first == last == [0, 1]
    order = sum(training, [])
    assert order == [k for k in order[::3] for _ in range(3)]  # groups stay together
    passes = [order[i : i + 36 : 3] for i in range(0, len(order) - 35, 36)]
    assert len(passes) >= 2 and all(sorted(numbers) == list(range(12)) for numbers in passes)
    assert passes[0] != passes[1]


@only("gpt2")
def test_each_response_once_an_epoch_in_a_new_order(tiny, monkeypatch):
    trained = watch_micro_batches(monkeypatch, grpo)
    metrics = grpo.main(tiny(update_epochs=3, total_episodes=24, micro_batch_size=3, max_new_tokens=2))
    order = torch.cat(trained).view(6, 12).tolist()
    assert all(sorted(numbers) == list(range(12)) for numbers in order)
    assert len(set(map(tuple, [*order, range(12)]))) == 7
    assert metrics["learning_rate"] == pytest.approx(1e-3 / 2)  # of the second of two updates


# ---- Old log-probs, reference, reward model ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_is_on_policy(tiny, watch, double, temperature):
    """In float64: in float32 rounding alone, which machines differ in, may come to 1e-5 at a token of many logits."""
    losses, rollouts = watch("grpo_loss"), watch("rollout")
    metrics = grpo.main(tiny(temperature=temperature, micro_batch_size=2, update_epochs=1))
    batch, mask = rollouts[1][1][0], rollouts[1][1][0]["mask"]
    assert len(losses) == 6 and len(set(mask.sum(1).tolist())) > 2
    for (logprobs, old, _, _, m, *_), (_, clipped) in losses[:3]:  # the first optimizer step, of three micro-batches
        assert torch.where(m, logprobs - old, 0.0).abs().max() < 1e-9 and not clipped.any()
    assert torch.where(mask, batch["logprobs"] - batch["ref_logprobs"], 0.0).abs().max() < 1e-9
    assert metrics["policy/logprob_gap"] < 1e-9 and abs(metrics["kl"]) < 1e-9


def test_later_minibatches_are_not_and_old_logprobs_stay(tiny, watch):
    losses, rollouts, advantages = watch("grpo_loss"), watch("rollout"), watch("group_advantages")
    grpo.main(tiny(num_minibatches=1, batch_size=12, micro_batch_size=12, learning_rate=1e-2))
    batch = rollouts[1][1][0]
    assert len(losses) == 2
    for (new, old, ref, a, *_), _ in losses:
        assert same_rows(old, batch["logprobs"]) and same_rows(batch["logprobs"], old)
        assert same_rows(ref, batch["ref_logprobs"]) and not same_rows(ref, batch["logprobs"])
        assert new.requires_grad and not any(x.requires_grad for x in (old, ref, a))
        assert sorted(a.tolist()) == sorted(advantages[0][1].flatten().tolist())
    gaps = [torch.where(m, new - old, 0.0).abs().max() for (new, old, _, _, m, *_), _ in losses]
    assert gaps[0] < 1e-5 and gaps[1] > 0.05 and losses[1][1][1].any()


def test_without_learning_rate_nothing_moves(tiny, watch):
    losses = watch("grpo_loss")
    args = tiny(learning_rate=0.0, total_episodes=24, micro_batch_size=2)
    metrics = grpo.main(args)
    assert len(losses) == 24 and metrics["policy/clipfrac"] == 0 and abs(metrics["policy/approx_kl"]) < 1e-9
    assert all(torch.where(m, new - old, 0.0).abs().max() < 1e-5 for (new, old, _, _, m, *_), _ in losses)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (args.model, f"{args.output_dir}/model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reference_and_reward_model_never_change(tiny, folders, kind, watch):
    rollouts, rewards = watch("rollout"), watch("load_reward")
    args = tiny((str(folders / f"{kind}-reward"),), total_episodes=36, learning_rate=5e-3)
    grpo.main(args)
    (policy, reference, *_), (batch, episodes) = rollouts[-2]
    ((_, (_, reward_model, _)),) = rewards
    groups = [{x.data_ptr() for x in part.state_dict().values()} for part in (policy, reference, reward_model)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    fresh_reward = transformers.AutoModelForSequenceClassification.from_pretrained(*args.reward)
    for part, start in ((reference, fresh), (reward_model, fresh_reward)):
        want = start.state_dict()
        assert all(torch.equal(x, want[name]) for name, x in part.state_dict().items())
        assert not part.training and not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert not torch.equal(next(policy.parameters()), next(fresh.parameters()))
    moved = torch.where(batch["mask"], batch["logprobs"] - batch["ref_logprobs"], 0.0).abs().max()
    assert moved > 1e-2 and episodes["kl"].abs().max() > 1e-2


# ---- Whole updates ----


class Canned:
    """Four groups of 3 responses for a policy whose weights stay, so that a gradient is a sum of coefficients times the
    gradients of single log-probs. The third group has equal rewards, the fourth equal responses too.
    """

    lengths, rewards = [9, 4, 1, 3, 8, 2, 5, 2, 7, 4, 4, 4], [0.3, 1, -0.5, 2, 2.5, 2.2, *[0.7] * 3, *[1.0] * 3]
    STD = statistics.fmean(map(statistics.stdev, (rewards[:3], rewards[3:6], [0, 0], [0, 0])))

    def __init__(self, kind):
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
        if kind == "llama":
            config = transformers.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=64, **ids)  # fmt: skip
        else:
            config = transformers.GPT2Config(
                n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, **ids)  # fmt: skip
        models = []
        for seed in range(3):  # policy, sampler, reference
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p += 0.06 * noise(*p.shape, seed=100 * seed + i) * (seed > 0)
            models.append(model)
        self.policy = models[0]
        draw = random.Random(3)
        words = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]
        self.prompts = [prompt for prompt in (words(n) for n in (2, 4, 6, 5)) for _ in range(3)]
        self.responses = [words(n) for n in self.lengths[:10]]
        self.responses += self.responses[-1:] * 2
        self.new, self.old, self.ref = (
            [row_logprobs(model, x, y).tolist() for x, y in zip(self.prompts, self.responses)] for model in models)
        self.jacobian = []  # (n, parameters) of each response
        for x, y in zip(self.prompts, self.responses):
            rows = [torch.autograd.grad(logp, list(self.policy.parameters()), retain_graph=True)
                    for logp in row_logprobs(self.policy, x, y)]  # fmt: skip
            self.jacobian.append(torch.stack([vector(row) for row in rows]))

    def rollout(self, off, rows, padding):
        """A rollout of the first rows, as the policy's own or the sampler's. Behind and in front of responses log-probs
        are the padding; behind them input_ids are a word."""
        batch, lengths = make_batch(self.prompts[:rows], self.responses[:rows], padding=50), self.lengths[:rows]
        mask = batch["mask"]
        spread = lambda x: torch.full(mask.shape, padding).masked_scatter(mask, torch.tensor(sum(x[:rows], [])))
        batch |= {"logprobs": spread(self.old if off else self.new), "ref_logprobs": spread(self.ref)}
        rewards = torch.tensor(self.rewards[:rows])
        return batch, {"scores": rewards[:, None], "rewards": rewards, "kl": torch.zeros(rows),
                       "lengths": torch.tensor(lengths, dtype=torch.float64), "finished": torch.ones(rows)}

    def advantages(self, args, off):
        """(advantages, the responses that are trained on)"""
        rewards = list(self.rewards)
        if args.kl_in == "reward":
            for i, (x, y) in enumerate(zip(self.old if off else self.new, self.ref)):
                kl = math.fsum(term(0.0, p - q, 0.0, 1.0, args.kl_estimator)[0] for p, q in zip(x, y))
                rewards[i] -= args.kl_coef * kl
        groups = [rewards[i : i + 3] for i in range(0, 12, 3)]
        first = lambda i: 3 * (i // 3)
        kept = [i for i in range(12) if not args.drop_zero_std or len(set(self.rewards[first(i) : first(i) + 3])) > 1]
        return sum(advantages_by_loops(groups, args.baseline, args.scale_rewards), []), kept

    def step(self, rows, args, off, advantages):
        """(gradient, loss, tokens where the clip decides, tokens) of an optimizer step over these responses."""
        gradient, loss, cut, count = 0.0, 0.0, 0, sum(len(self.new[j]) for j in rows)
        for j in rows:
            new, old, n = self.new[j], (self.old if off else self.new)[j], self.lengths[j]
            weight = 1 / {"grpo": len(rows) * n, "dapo": count, "dr_grpo": len(rows) * args.max_new_tokens}[args.loss_type]
            beta = args.kl_coef if args.kl_in == "loss" else 0.0
            each = terms(new, old, self.ref[j], advantages[j], beta, args.kl_estimator,
                         args.importance_sampling_level, args.clip_coef, args.clip_coef_high)  # fmt: skip
            repeated = n if args.importance_sampling_level == "sequence" else 1  # n equal losses of all n tokens
            gradient = gradient + tensor(*[weight * repeated * slope for _, slope, _ in each]) @ self.jacobian[j]
            loss, cut = loss + weight * math.fsum(x for x, *_ in each), cut + sum(c for *_, c in each)
        return gradient, loss, cut, count


canned_of = lru_cache(Canned)


class NoFolder:
    """In place of common.Run: leaves no files."""

    state = {}

    def __init__(self, args):
        pass

    def start(self, num_steps, num_rows, tokenizer, **parts):
        return 0

    def log(self, step, metrics, samples=()):
        assert all(map(math.isfinite, metrics.values()))

    def ignore(self, *_, **__):
        pass

    checkpoint = finish = show_change = ignore


@pytest.fixture
def canned(double, tiny, monkeypatch):
    """canned(kind, flags, groups) -> (Canned, Args, metrics, the policy's index of each micro-batch, optimizer steps) of
    a run of two updates without learning rate: on samples of the policy, and on those of another.
    """

    def start(kind, groups=4, **flags):
        case = canned_of(kind)
        defaults = {"learning_rate": 0.0, "clip_coef_high": 0.28, "max_grad_norm": 1e9, "update_epochs": 1,
                    "total_episodes": 24, "max_new_tokens": 11}  # fmt: skip
        args = tiny(**{**defaults, **flags})
        padding = math.nan
        updates = [case.rollout(off, 3 * groups, padding) for off in (False, True)]
        evaluation = case.rollout(False, args.eval_samples, 0.0)

        def rollout(policy, reference, score, rows, eos_ids, args, autocast, seed):
            return evaluation if seed == args.seed else updates.pop(0)

        monkeypatch.setattr(grpo, "load_model", lambda *_: (case.policy.train(), tokenizer, [2]))
        monkeypatch.setattr(grpo, "load_reward", lambda *_: (None, None, None))
        monkeypatch.setattr(grpo, "load_prompts", lambda *_: prompts)
        monkeypatch.setattr(grpo, "copy", SimpleNamespace(deepcopy=lambda _: torch.nn.Identity()))  # never used
        monkeypatch.setattr(grpo, "lighten", lambda *_: None)
        monkeypatch.setattr(grpo, "Run", NoFolder)
        monkeypatch.setattr(grpo, "rollout", rollout)
        trained.clear()
        with optimizer_steps() as steps:
            metrics = grpo.main(args)
        assert not updates
        return case, args, metrics, [rows.tolist() for rows in trained], steps

    tokenizer, trained, prompts = word_tokenizer(), watch_micro_batches(monkeypatch, grpo), [({}, [5, 6])] * 12
    return start


@only("llama")  # of the fixture tiny; both kinds are taken in turns here
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_of_an_update_in_combinations(canned, loss_type, scale):
    """All optimizer steps of two updates, the first on samples of the policy, the second on those of another: every
    minibatch by loops over single responses, each with its own log-probs, and the metrics of the second update.
    Half of the combinations: those in which the numbers of all seven levels, loss type and scale among them, have an
    even sum. Any all but one of the two-level factors are in every combination, with every level of the others."""
    cases = itertools.product(BASELINES, ("loss", "reward"), ESTIMATORS, LEVELS, (False, True))
    levels = itertools.product(*map(range, (2, 2, 3, 2, 2)))
    first = LOSS_TYPES.index(loss_type) + SCALES.index(scale)
    cases = [case for case, numbers in zip(cases, levels, strict=True) if (first + sum(numbers)) % 2 == 0]
    assert len(cases) == 24
    seen = set()
    for k, (baseline, kl_in, estimator, level, drop) in enumerate(cases):
        parts = 2 if k % 3 == 0 else 1
        case, args, metrics, index, steps = canned(
            ("llama", "gpt2")[(k + k // 2 + k // 4 + k // 12) % 2], loss_type=loss_type,
            scale_rewards=scale, baseline=baseline, kl_in=kl_in, kl_estimator=estimator,
            importance_sampling_level=level, drop_zero_std=drop, num_minibatches=parts, batch_size=12 // parts,
            micro_batch_size=3 if k % 5 == 0 else 12 // parts)  # fmt: skip
        what, index = vars(args), sum(index, [])
        assert len(steps) == 2 * parts, what
        for number, off in enumerate((False, True)):
            advantages, kept = case.advantages(args, off)
            rows, index = index[: len(kept)], index[len(kept) :]
            assert sorted(rows) == kept and len(kept) == (6 if drop else 12), what
            cut = -(-len(kept) // parts)  # of an odd number, the first minibatch has one more
            minibatches = [rows[i : i + cut] for i in range(0, len(rows), cut)]
            want = [case.step(minibatch, args, off, advantages) for minibatch in minibatches]
            for (_, got), (gradient, *_) in zip(steps[parts * number :], want):
                assert (vector(got) - gradient).norm() < 1e-6 * gradient.norm() and gradient.norm() > 1e-3, what
        assert not index and metrics["loss"] == pytest.approx(sum(x[1] for x in want) / parts, rel=1e-5, abs=1e-6), what
        clipped = sum(x[2] for x in want) / sum(x[3] for x in want)
        assert metrics["policy/clipfrac"] == pytest.approx(clipped, abs=1e-6), what
        assert metrics["frac_reward_zero_std"] == 0.5 and metrics["reward_std"] == pytest.approx(case.STD), what
        seen.add((level, 0 < clipped < 1))
    assert ("token", True) in seen and ("sequence", True) in seen


@only("gpt2")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dropped_groups_leave_the_loss_and_its_denominators(canned, loss_type):
    """Two of four groups with equal rewards: the gradient is that of an update that never had them, up to
    rounding; kept, they dilute it, and pull towards the reference."""
    flags = dict(loss_type=loss_type, scale_rewards="none", num_minibatches=1, kl_estimator="k3")
    runs = [canned("gpt2", groups, drop_zero_std=drop, batch_size=3 * groups, micro_batch_size=3,
                   total_episodes=6 * groups, **flags) for groups, drop in ((4, True), (2, False), (4, False))]  # fmt: skip
    for number in (0, 1):
        dropped, alone, diluted = (vector(steps[number][1]) for *_, steps in runs)
        assert (dropped - alone).norm() < 1e-9 * alone.norm() and (diluted - alone).norm() > 0.1 * alone.norm()
    (_, _, dropped, *_), (_, _, alone, *_), (_, _, diluted, *_) = runs
    for name in ("loss", "entropy", "policy/clipfrac", "policy/approx_kl", "grad_norm"):
        assert dropped[name] == pytest.approx(alone[name], rel=1e-6)
        assert diluted[name] != pytest.approx(alone[name], rel=1e-3)
    assert dropped["frac_reward_zero_std"] == diluted["frac_reward_zero_std"] == 0.5
    assert dropped["reward_std"] == diluted["reward_std"] == pytest.approx(alone["reward_std"] / 2)


@only("llama")
def test_groups_of_equal_rewards_feel_the_kl_in_the_loss_alone(canned, monkeypatch):
    """Their gradient is beta times that of the KL: without one there is none."""
    gradients = {}
    monkeypatch.setattr(canned_of("llama"), "rewards", [0.7] * 12)
    for beta in (0.0, 0.2, 0.4):
        case, args, *_, steps = canned(
            "llama", kl_coef=beta, kl_estimator="k3", num_minibatches=1, batch_size=12, micro_batch_size=12)
        gradients[beta] = vector(steps[1][1])
        want = case.step(range(12), args, True, [0.0] * 12)[0]
        assert (gradients[beta] - want).norm() <= 1e-6 * want.norm() and (want.norm() > 1e-3) == (beta > 0)
    assert (gradients[0.0] == 0).all()
    assert (gradients[0.4] - 2 * gradients[0.2]).norm() < 1e-9 * gradients[0.4].norm()


@pytest.mark.parametrize("flags", [
    {"max_grad_norm": 9.0},
    RLOO | {"temperature": 0.7, "learning_rate": 1e-4, "clip_coef": 0.7, "clip_coef_high": 2.0},
    {"loss_type": "dapo", "scale_rewards": "batch", "baseline": "leave_one_out", "kl_estimator": "k2",
     "clip_coef": 0.1, "clip_coef_high": 0.15, "temperature": 0.7, "missing_eos_penalty": 0.4},
    {"reward": "uneven", "loss_type": "dr_grpo", "scale_rewards": "none", "kl_estimator": "k3",
     "importance_sampling_level": "sequence", "drop_zero_std": True, "learning_rate": 1e-4},
], ids=["published", "rloo", "dapo", "dr_grpo"])  # fmt: skip
def test_a_run_by_loops_over_single_rows(tiny, watch, double, monkeypatch, flags):
    """From the sampled ids alone: scores, penalty, KL and advantages of the second update, where pi is not pi_ref, and
    the gradient of each of its four optimizer steps, by autograd through the model's own logits of single rows, held
    to --max-grad-norm."""
    rollouts, loaded, trained = watch("rollout"), watch("load_model"), watch_micro_batches(monkeypatch, grpo)
    args = tiny(**{"total_episodes": 24, "learning_rate": 3e-3, "max_grad_norm": 1e9, "micro_batch_size": 3,
                   "max_new_tokens": 8, **flags})  # fmt: skip
    with optimizer_steps() as steps:
        metrics = grpo.main(args)
    rows, policy = rows_of(rollouts[2][1][0]), loaded[0][1][0]

    def score(weights):
        with torch.no_grad():
            for p, weight in zip(policy.parameters(), weights):
                p.copy_(weight)
        return [row_logprobs(policy, *row, args.temperature) for row in rows]

    with torch.no_grad():
        old, ref = score(steps[-4][0]), score(steps[0][0])  # the weights at the second update's start, and the first's
    name, inside = flags.get("reward", "score"), args.kl_in == "reward"
    numbers = [row["number"] for row, _ in rollouts[2][0][3]]
    rewards = [reward_of(name, y, number) - args.missing_eos_penalty * (y[-1] not in STOPS)
               for (_, y), number in zip(rows, numbers)]  # fmt: skip
    assert metrics["reward"] == pytest.approx(statistics.fmean(rewards), abs=1e-6)
    assert metrics["kl"] == pytest.approx(statistics.fmean((p - q).sum().item() for p, q in zip(old, ref)), abs=1e-4)
    empty = [i for i in range(12) if len(set(rewards[3 * (i // 3) : 3 * (i // 3) + 3])) == 1]
    assert metrics["frac_reward_zero_std"] == pytest.approx(len(empty) / 12)
    for i in range(12):  # KL in the reward is k1 unless asked otherwise
        rewards[i] -= args.kl_coef * (old[i] - ref[i]).sum().item() * inside
    groups = [rewards[i : i + 3] for i in range(0, 12, 3)]
    advantages = sum(advantages_by_loops(groups, args.baseline, args.scale_rewards), [])
    kept = [i for i in range(12) if not args.drop_zero_std or i not in empty]
    assert (0 < len(kept) < 12) == args.drop_zero_std and len({len(y) for _, y in rows}) > 2
    index = torch.cat(trained).tolist()[-2 * len(kept) :]
    half = -(-len(kept) // 2)
    parts = [index[:half], index[half : len(kept)], index[len(kept) : len(kept) + half], index[len(kept) + half :]]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == kept and parts[0] != parts[2]
    losses, norms, moved = [], [], 0.0
    for part, (weights, gradient) in zip(parts, steps[-4:]):
        new, loss = score(weights), 0.0
        count = sum(len(rows[j][1]) for j in part)
        for j in part:
            a, n = advantages[j], len(rows[j][1])
            p, q, o = (x[j].split(n if args.importance_sampling_level == "sequence" else 1) for x in (new, ref, old))
            total = 0.0
            for x, y, z in zip(p, q, o):
                d, rho = x.sum() - y.sum(), (x.sum() - z.sum()).exp()
                moved = max(moved, abs(rho.item() - 1))
                high = args.clip_coef_high if a > 0 else math.inf  # a rise is held for the good, a fall for the bad
                low = args.clip_coef if a < 0 else 1.0
                kl = d * d / 2 if args.kl_estimator == "k2" else (-d).exp() - 1 + d
                total = total - a * rho.clamp(1 - low, 1 + high) * len(x) + (not inside) * args.kl_coef * kl * len(x)
            by = {"grpo": len(part) * n, "dapo": count, "dr_grpo": len(part) * args.max_new_tokens}[args.loss_type]
            loss = loss + total / by
        want = vector(torch.autograd.grad(loss, list(policy.parameters())))
        held = bounded([want], args.max_grad_norm)
        assert (vector(gradient) - held).norm() < 1e-6 * held.norm() and held.norm() > 1e-3
        losses.append(loss.item())
        norms.append(want.norm().item())
    assert metrics["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5, abs=1e-6) and moved > 0.05
    assert metrics["grad_norm"] == pytest.approx(norms[-1], rel=1e-6)
    assert min(norms) < args.max_grad_norm and ("max_grad_norm" not in flags or args.max_grad_norm < max(norms))


@pytest.mark.parametrize("loss_type, kind, drop", [
    ("grpo", "gpt2", False), ("dapo", "llama", False), ("dr_grpo", "gpt2", False), ("grpo", "llama", True),
    ("dapo", "gpt2", True)], indirect=["kind"])  # fmt: skip
def test_micro_batches_change_no_gradient_and_no_metric(tiny, double, tmp_path, loss_type, drop):
    """Guard: micro-batch invariance, of all optimizer steps of an update and all that is logged, in float64."""
    seen = {}
    for micro in (8, 2, 1):
        folder = tmp_path / f"{micro}"
        with optimizer_steps() as steps:
            grpo.main(tiny("uneven" if drop else "score", micro_batch_size=micro, batch_size=8, num_generations=4,
                           total_episodes=16, loss_type=loss_type, drop_zero_std=drop, max_grad_norm=1e9,
                           update_epochs=1, output_dir=str(folder)))  # fmt: skip
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = {f"{i} {name}": value for i, row in enumerate(logged) for name, value in row.items()
                  if name != "tokens_per_second"}  # fmt: skip
        seen[micro] = [vector(gradient) for _, gradient in steps], logged
    assert len(seen[8][0]) == 2 and (0 < seen[8][1]["1 frac_reward_zero_std"] < 1 or not drop)
    for micro in (2, 1):
        for got, want in zip(seen[micro][0], seen[8][0]):
            assert (got - want).norm() < 1e-6 * want.norm() and want.norm() > 1e-3
        assert seen[micro][1] == pytest.approx(seen[8][1], rel=1e-5, abs=1e-6)  # summed in float32


@pytest.mark.parametrize("loss_type, level", [("grpo", "token"), ("dapo", "sequence")])
def test_metrics_of_an_update_by_loops(tiny, watch, loss_type, level):
    """Means over all tokens of all epochs, and of the loss over all optimizer steps, from what grpo_loss got."""
    losses, scored, rollouts = watch("grpo_loss"), watch("sequence_logprobs"), watch("rollout")
    advantages = watch("group_advantages")
    got = grpo.main(tiny("uneven", micro_batch_size=2, learning_rate=1e-2 if level == "token" else 1e-4,
                         clip_coef=0.05, clip_coef_high=0.07, loss_type=loss_type,
                         importance_sampling_level=level, missing_eos_penalty=0.5))  # fmt: skip
    entropies = [result[1] for (model, *_), result in scored if model.training]
    each = {name: [] for name in ("policy/clipfrac", "policy/approx_kl", "entropy")}
    steps = [0.0] * 4  # of three micro-batches each
    for k, ((new, old, ref, a, mask, beta, *_), _) in enumerate(losses):
        step = losses[k // 3 * 3 : k // 3 * 3 + 3]
        count = sum(int(inputs[4].sum()) for inputs, _ in step)
        for b, n in enumerate(mask.sum(1).tolist()):
            rows = [x[b, mask[b]].tolist() for x in (new, old, ref)]
            values = terms(*rows, a[b].item(), beta, "k3", level, 0.05, 0.07)
            steps[k // 3] += math.fsum(x for x, *_ in values) / (6 * n if loss_type == "grpo" else count)
            each["policy/clipfrac"] += [clipped for *_, clipped in values]
            each["policy/approx_kl"] += [math.exp(x - y) - 1 - (x - y) for x, y, _ in zip(*rows)]
            each["entropy"] += entropies[k][b, mask[b]].tolist()
    assert len(losses) == 12 and 0 < sum(each["policy/clipfrac"]) < len(each["policy/clipfrac"])
    for name, values in each.items():
        assert got[name] == pytest.approx(statistics.fmean(values), rel=1e-4, abs=1e-6), name
    assert got["loss"] == pytest.approx(statistics.fmean(steps), rel=1e-4, abs=1e-6)
    assert 0 < got["entropy"] < math.log(VOCABULARY) and got["policy/approx_kl"] > 0
    groups, batch = advantages[0][0][0].tolist(), rollouts[1][1][0]
    assert got["reward_std"] == pytest.approx(statistics.fmean(map(statistics.stdev, groups)), rel=1e-5)
    assert got["frac_reward_zero_std"] == pytest.approx(sum(len(set(group)) == 1 for group in groups) / 4)
    assert got["reward"] == pytest.approx(statistics.fmean(sum(groups, [])), rel=1e-5)
    assert got["num_tokens"] == sum(len(response) for _, response in rows_of(batch)) and got["episode"] == 12


def test_entropy_and_logprobs_by_loops(model):
    batch = make_batch(*sides(ragged_rows()))
    with torch.no_grad():
        logprobs, entropy = score_logprobs(model, batch, 0.7, size=4)
        for i, (prompt, response) in enumerate(rows_of(batch)):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / 0.7
            logp, mask = torch.log_softmax(logits, -1), batch["mask"][i]
            assert (logprobs[i, mask] - logp[range(len(response)), response]).abs().max() < 2e-5
            assert (entropy[i, mask] + (logp.exp() * logp).sum(-1)).abs().max() < 2e-5
    assert (logprobs[~batch["mask"]] == 0).all() and (entropy[~batch["mask"]] == 0).all()


# ---- Evaluation and diagnoses ----


RIGHT = [1.0, 0.0, 0.0, math.nan, 1.0, 1.0]


@only("llama")
@pytest.mark.parametrize("prompts, samples, n, first, want", [
    (3, 7, 2, RIGHT, {"eval/pass_at_1": 3 / 6, "eval/pass_at_2": 2 / 3}),
    (2, 6, 3, RIGHT, {"eval/pass_at_1": 3 / 6, "eval/pass_at_3": 1.0}),
    (6, 6, 1, RIGHT, {"eval/pass_at_1": 3 / 5}),  # the row without any score is none of its business
    (9, 6, 1, RIGHT, {"eval/pass_at_1": 3 / 5}),  # more prompts than samples: the first ones
    (6, 6, 1, [math.nan] * 6, {}),
    (3, 6, 2, [1.0, 0.0, 0.5, 0.0, 1.0, 1.0], {}),  # neither right nor wrong: nothing to pass
    (3, 6, 2, [1.0, 0.0, 2.0, 0.0, 1.0, 1.0], {}),
])  # fmt: skip
def test_pass_rates_by_hand(tiny, monkeypatch, prompts, samples, n, first, want):
    """Of an evaluation in a run: only the first reward counts; a None, NaN here, among scores has not passed; penalties
    have no part in it."""
    scores = torch.tensor([first, [9.0] * 6]).T  # (B, 2)
    seen = {}

    def rollout(policy, reference, score, rows, eos_ids, args, autocast, seed):
        seen.update(rows=[row["number"] for row, _ in rows], seed=seed)
        batch = make_batch([ids for _, ids in rows], [[10 + k, 2] for k in range(6)])
        return batch, {"scores": scores, "rewards": torch.arange(6.0) - 5, "kl": torch.arange(6.0) / 10,
                       "lengths": torch.full((6,), 2.0), "finished": torch.tensor([1.0, 1, 1, 0, 0, 0])}

    class FirstLog(Exception):
        pass

    class Logged(NoFolder):
        def log(self, *inputs):
            raise FirstLog(*inputs)

    held_out = [({"number": i}, [20 + i]) for i in range(prompts)]
    monkeypatch.setattr(grpo, "load_prompts", lambda *_: held_out)
    monkeypatch.setattr(grpo, "load_reward", lambda *_: (None, None, None))
    monkeypatch.setattr(grpo, "rollout", rollout)
    monkeypatch.setattr(grpo, "Run", Logged)
    with pytest.raises(FirstLog) as caught:
        grpo.main(tiny(("a", "b"), eval_samples=samples, seed=3))
    step, metrics, rows = caught.value.args
    judged = [x for x in first if not math.isnan(x)]
    means = {"eval/rewards/a": statistics.fmean(judged)} if judged else {}
    assert step == 0 and seen == {"rows": [k // n for k in range(6)], "seed": 3}
    assert metrics == pytest.approx({
        **want, **means, "eval/rewards/b": 9.0, "eval/reward": -2.5, "eval/kl": 0.25,
        "eval/completions/mean_length": 2.0, "eval/completions/eos_rate": 0.5})  # fmt: skip
    assert rows == [{"prompt": f"w{20 + k // n}", "completion": f"w{10 + k}", "reward": k - 5.0,
                     "kl": pytest.approx(k / 10)} for k in range(0, 6, n)]  # fmt: skip
    rates = grpo.pass_rates(scores[:, 0].view(-1, n))
    assert {f"eval/{name}": x for name, x in rates.items()} == pytest.approx(want)


def test_each_diagnosis_appears_exactly_on_its_trouble():
    healthy = {"frac_reward_zero_std": 0.5, "completions/eos_rate": 0.5, "policy/clipfrac": 0.3,
               "policy/logprob_gap": 0.5}  # fmt: skip
    assert grpo.diagnoses(healthy) == []
    troubles = {"frac_reward_zero_std": (0.51, "51% of groups had zero variance"),
                "completions/eos_rate": (0.25, "75% of responses were cut"),
                "policy/clipfrac": (0.42, "the clip decides for 42% of tokens"),
                "policy/logprob_gap": (0.75, "differ by 0.75 nats")}  # fmt: skip
    for name, (value, words) in troubles.items():
        (line,) = grpo.diagnoses({**healthy, name: value})
        assert words in line
    everything = grpo.diagnoses({name: value for name, (value, _) in troubles.items()})
    assert len(everything) == 4 and all(words in line for (_, words), line in zip(troubles.values(), everything))


@only("gpt2")
def test_diagnoses_reach_the_screen(tiny, capsys):
    grpo.main(tiny("by_prompt", max_new_tokens=4))
    assert "100% of groups had zero variance" in capsys.readouterr().out


# ---- It learns, and learns nothing from noise ----


@only("llama")
def test_it_learns_from_rewards_and_nothing_from_noise(tiny, tmp_path):
    """Share of one word: from 0.01 to above 0.75 in 30 updates; with rewards shuffled over the rows it stays, and with
    their sign flipped it falls."""

    def run(name, model, output_dir):
        return grpo.main(tiny(
            name, model=model, total_episodes=960, num_generations=8, batch_size=32, num_minibatches=1,
            update_epochs=1, micro_batch_size=32, max_new_tokens=8, learning_rate=3e-3, anneal_lr=False,
            kl_coef=0.0, eval_samples=256, output_dir=output_dir))  # fmt: skip

    share = shares_of_a_word(run, tmp_path, "eval/reward")
    assert all(0.005 < before < 0.02 for before, _ in share.values())
    assert share["fraction"][1] > 0.75 and share["shuffled"][1] < 0.02
    assert share["flipped"][1] < share["flipped"][0] / 2
