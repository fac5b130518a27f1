"""bandit_bt.py: losses, fits, errors and policies against closed forms, loops, enumeration and
float64 autograd; then its votes files and its main. Numbers of votes and fits are chosen so that each seed is far
from every bound; where a bound is statistical, its comment says which.
"""

import contextlib
import csv
import itertools
import json
import math
import runpy
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bandit_bt as bt
from bandit_lessons import minimize

SMALL = {"num_votes": 600, "num_bootstrap": 20, "num_steps": 40}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def votes_of(rows):
    """(i, j, mu, count), i < j, of rows (arm, arm, mu) or (arm, arm, mu, count) in any order of the arms."""
    rows = [(*row, 1)[:4] for row in rows]
    rows = [(a, b, mu, n) if a < b else (b, a, 1 - mu, n) for a, b, mu, n in rows]
    i, j, mu, count = zip(*rows)
    return torch.tensor(i), torch.tensor(j), tensor(*mu), tensor(*count)


def random_votes(K, N, seed, spread=1.0, voters=2):
    """(votes, rewards): N comparisons of random pairs by Bradley-Terry, each the mean of 1 or 2 voters."""
    generator = seeded(seed)
    r = spread * torch.randn(K, generator=generator, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(K, generator=generator)[:2].sort().values for _ in range(N)])
    i, j = pairs.T
    p = torch.sigmoid(r[i] - r[j])
    mu = (torch.rand(N, voters, generator=generator, dtype=torch.float64) < p[:, None]).double().mean(1)
    return (i, j, mu, torch.ones(N, dtype=torch.float64)), r - r.mean()


def fitted(votes, K, **options):
    return bt.fit(*bt.pairs_of(*votes, K)[:4], K, **options)


def gradient_norm(r, votes, l2=0.0):
    """Norm of the gradient of bt_loss + l2 / 2 sum r^2 / votes, by autograd."""
    r = r.clone().requires_grad_()
    (bt.bt_loss(r, *votes) + l2 / 2 * r.square().sum() / votes[3].sum()).backward()
    return r.grad.norm().item()


# ---- The loss ----


def test_loss_by_loops():
    """Also against the quotient exp(r_i) / (exp(r_i) + exp(r_j)) that defines the model."""
    (i, j, _, _), r = random_votes(6, 40, seed=1)
    generator = seeded(2)
    mu, count = torch.rand(40, generator=generator).double(), torch.randint(1, 5, (40,), generator=generator).double()
    total = 0.0
    for a, b, m, n in zip(i.tolist(), j.tolist(), mu.tolist(), count.tolist()):
        p = math.exp(r[a]) / (math.exp(r[a]) + math.exp(r[b]))
        total -= n * (m * math.log(p) + (1 - m) * math.log(1 - p))
    assert bt.bt_loss(r, i, j, mu, count).item() == pytest.approx(total / sum(count.tolist()), abs=1e-12)


def test_loss_knows_differences_only():
    """Exactly the same at r + 8 for rewards in binary fractions; another value at 2 r; log 2 at equal rewards."""
    votes, _ = random_votes(6, 50, seed=3)
    r = torch.randint(-64, 64, (6,), generator=seeded(4)).double() / 32
    loss = bt.bt_loss(r, *votes)
    assert torch.equal(loss, bt.bt_loss(r + 8, *votes))
    assert abs(bt.bt_loss(2 * r, *votes) - loss) > 0.01
    assert bt.bt_loss(torch.full((6,), 3.0).double(), *votes).item() == pytest.approx(math.log(2), abs=1e-15)


def test_loss_is_finite_at_any_margin():
    r = tensor(2000.0, -2000.0).requires_grad_()
    loss = bt.bt_loss(r, *votes_of([(0, 1, 1.0), (0, 1, 0.0)]))
    loss.backward()
    assert loss.item() == pytest.approx(2000) and r.grad.tolist() == pytest.approx([0.5, -0.5])


def test_soft_label_is_the_expectation_of_hard_labels():
    r, gradients = noise(4, seed=5).requires_grad_(), {}
    for mu in (0.0, 0.3, 0.5, 1.0):
        (gradients[mu],) = torch.autograd.grad(bt.bt_loss(r, *votes_of([(0, 1, mu), (1, 3, mu), (3, 2, mu)])), r)
    for mu in (0.3, 0.5):
        assert (gradients[mu] - mu * gradients[1.0] - (1 - mu) * gradients[0.0]).abs().max() < 1e-12


def test_all_ties_are_equal_rewards():
    votes = votes_of([(a, b, 0.5) for a, b in itertools.combinations(range(5), 2)] * 3)
    r = fitted(votes, 5)
    assert r.abs().max() < 1e-12 and bt.bt_loss(r, *votes).item() == pytest.approx(math.log(2), abs=1e-12)


def test_count_is_repeated_rows():
    rows = [(0, 1, 1, 3), (1, 2, 0.5, 2), (2, 0, 1, 1), (0, 2, 1, 4), (1, 2, 1, 1), (2, 1, 1, 2)]
    repeated = [row[:3] for row in rows for _ in range(row[3])]
    r = noise(3, seed=6)
    losses = [bt.bt_loss(r, *votes_of(x)).item() for x in (rows, repeated)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-14)
    pairs = [bt.pairs_of(*votes_of(x), 3)[:4] for x in (rows, repeated)]
    assert all(map(torch.equal, *pairs))
    assert pairs[0][2].tolist() == [3, 5, 5] and pairs[0][3].tolist() == [3, 4, 2]


# ---- The fit ----


CASES = {
    "ties": random_votes(8, 400, seed=11)[0],
    "hard labels": random_votes(8, 400, seed=12, voters=1)[0],
    "many arms": random_votes(60, 3000, seed=13)[0],
    "a chain of pairs": votes_of([(k, k + 1, mu, n) for k in range(19) for mu, n in ((1, 1 + k % 3), (0, 2))]),
    "a ring, each beats the next": votes_of([(k, (k + 1) % 9, 1, 1 + k) for k in range(9)]),
    "unbalanced": votes_of([(0, 1, 1, 10**6), (0, 1, 0, 3), (1, 2, 0.5, 1), (2, 3, 1, 10**5), (3, 2, 1, 10**5)]),
    "margins of 14": votes_of([(k, k + 1, mu, n) for k in range(6) for mu, n in ((1, 10**6), (0, 1))]),
    "soft labels": (*random_votes(6, 200, seed=14)[0][:2], torch.rand(200, generator=seeded(15)).double(),
                    torch.randint(1, 9, (200,), generator=seeded(16)).double()),
}  # fmt: skip


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_fit_is_stationary(case, l2):
    votes = CASES[case]
    K = int(votes[1].max()) + 1
    r = fitted(votes, K, l2=l2)
    assert gradient_norm(r, votes, l2) < 1e-9 and abs(r.sum()) < 1e-9 and r.dtype == torch.float64


def test_two_arms_in_closed_form():
    for wins, n in ((1, 2), (1, 3), (7, 9), (999_999, 1_000_000), (2.5, 4)):
        r = fitted(votes_of([(0, 1, wins / n, n)]), 2)
        assert (r[0] - r[1]).item() == pytest.approx(math.log(wins / (n - wins)), abs=1e-9)


def test_chain_in_closed_form():
    """Without cycles each pair's margin is its own log odds: 6 steps of log 10^6, 83 from end to end."""
    r = fitted(CASES["margins of 14"], 7)
    assert (r[:-1] - r[1:] - math.log(1e6)).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["ties", "hard labels", "soft labels"])
def test_fit_is_logistic_regression(case):
    """Plain Newton on the design matrix of +1 and -1, autograd's Hessian, the last arm's reward fixed at 0."""
    i, j, mu, count = CASES[case]
    K = int(j.max()) + 1
    rows = torch.arange(len(i))
    X = torch.zeros(len(i), K, dtype=torch.float64)
    X[rows, i], X[rows, j] = 1.0, -1.0

    def loss(w):
        p = 1 / (1 + torch.exp(-X[:, :-1] @ w))
        return -(count * (mu * p.log() + (1 - mu) * (1 - p).log())).sum()

    w = torch.zeros(K - 1, dtype=torch.float64)
    for _ in range(20):
        w = w - torch.linalg.solve(torch.autograd.functional.hessian(loss, w),
                                   torch.autograd.functional.jacobian(loss, w))  # fmt: skip
    w = torch.cat([w, torch.zeros(1, dtype=torch.float64)])
    assert (fitted(CASES[case], K) - w + w.mean()).abs().max() < 1e-9


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("case", ["ties", "many arms", "a chain of pairs", "unbalanced"])
def test_conjugate_gradients_find_the_same(case, l2, monkeypatch):
    K = int(CASES[case][1].max()) + 1
    dense = fitted(CASES[case], K, l2=l2)
    monkeypatch.setattr(bt, "DENSE", 0)
    monkeypatch.setattr(torch.linalg, "cholesky", None)  # would raise
    assert (fitted(CASES[case], K, l2=l2) - dense).abs().max() < 1e-8


def test_order_and_names_do_not_matter():
    (i, j, mu, count), _ = random_votes(7, 300, seed=17)
    r, order, names = fitted((i, j, mu, count), 7), torch.randperm(300, generator=seeded(18)), [3, 0, 6, 1, 5, 2, 4]
    assert (fitted(tuple(x[order] for x in (i, j, mu, count)), 7) - r).abs().max() < 1e-12
    renamed = votes_of([(names[a], names[b], m) for a, b, m in zip(i.tolist(), j.tolist(), mu.tolist())])
    assert (fitted(renamed, 7)[names] - r).abs().max() < 1e-11


def test_start_does_not_matter():
    votes, _ = random_votes(7, 300, seed=19)
    for start in (torch.zeros(7).double(), 10 * noise(7, seed=20)):
        assert (fitted(votes, 7, start=start) - fitted(votes, 7)).abs().max() < 1e-11


def test_l2_in_closed_form():
    """Two arms, one vote: l2 r = 1 - sigma(2 r) at (r, -r). A strong prior leaves nothing."""
    for l2 in (0.01, 0.1, 1.0, 10.0):
        r = fitted(votes_of([(0, 1, 1)]), 2, l2=l2)
        assert (l2 * r[0]).item() == pytest.approx(1 / (1 + math.exp(2 * r[0])), abs=1e-12)
    assert fitted(votes_of([(0, 1, 1)]), 2, l2=1e6).abs().max() < 1e-6
    pieces = fitted(votes_of([(0, 1, 1), (2, 3, 1)]), 4, l2=0.1)  # what no vote relates, the prior does
    assert (pieces[:2] - pieces[2:]).abs().max() < 1e-12


def test_fit_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(bt, "solver", lambda *_: torch.zeros_like)
    with pytest.raises(ArithmeticError, match="gradient"):
        fitted(CASES["ties"], 8)


def test_a_fit_ends_at_1e_9_or_says_so(monkeypatch):
    """Steps that go nowhere, from where the gradient of the mean loss, p - 1/2 for one tie, has a known norm."""
    monkeypatch.setattr(bt, "solver", lambda *_: torch.zeros_like)
    for size, enough in ((0.9e-9, True), (1.1e-9, False), (1e-7, False)):
        margin = 4 * size / math.sqrt(2)  # sigma'(0) = 1/4, and both arms have it
        start = tensor(margin, -margin) / 2
        if enough:
            assert (fitted(votes_of([(0, 1, 0.5)]), 2, start=start) - start).abs().max() < 1e-15
        else:
            with pytest.raises(ArithmeticError, match="gradient"):
                fitted(votes_of([(0, 1, 0.5)]), 2, start=start)


def test_transitivity():
    """logit p_ik = logit p_ij + logit p_jk of a fit."""
    r = fitted(CASES["ties"], 8)
    logits = torch.sigmoid(r[:, None] - r).logit()
    sums = logits[:, :, None] + logits[None]  # (i, j, k)
    assert (sums - logits[:, None]).abs().max() < 1e-12


# ---- Where there is no optimum ----


def why(votes, K):
    return bt.no_optimum(*bt.pairs_of(*votes, K)[:4], [f"<{k}>" for k in range(K)])


def test_no_optimum_says_which():
    ring = [(0, 1, 1), (1, 2, 1), (2, 0, 1)]
    assert why(votes_of(ring), 3) == ""
    assert why(votes_of([*ring, (3, 0, 1), (3, 1, 1)]), 4) == "<3> never loses to the others"
    assert why(votes_of([*ring, (3, 0, 0), (1, 3, 1)]), 4) == "<3> never wins against the others"
    assert why(votes_of([*ring, (3, 0, 0.5)]), 4) == ""  # a tie is half a win for both
    ties = [(3, 4, 0.5), (5, 6, 0.5), (6, 3, 0.5)]
    assert why(votes_of([*ring, *ties, (3, 0, 1), (5, 2, 1)]), 7) == "<0>, <1>, <2> never wins against the others"
    assert why(votes_of([*ring, (3, 4, 0.5), (3, 0, 1)]), 5) == "<3>, <4> never loses to the others"
    assert why(votes_of([*ring, (3, 4, 0.5)]), 5) == "in pieces: <3>, <4> never met the others"
    many = why(votes_of([(0, k, 0.5) for k in range(1, 10)] + [(k, k + 1, 0.5) for k in range(10, 18)]), 19)
    assert many.startswith("in pieces: ") and ", ... never met" in many and many.count("<") == 5


def test_reached_is_what_a_walk_from_arm_0_finds():
    sources, targets = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([2, 4, 0, 1, 0])
    yes, no = torch.ones(5, dtype=bool), torch.zeros(5, dtype=bool)
    for walk in ((0, sources, targets, yes, no, 6), (0, targets, sources, no, yes, 6)):
        assert bt.reached(*walk).tolist() == [True, False, True, False, True, False]
    assert bt.reached(0, sources, targets, no, yes, 6).tolist() == [True, False, True, False, False, True]
    assert bt.reached(3, sources, targets, yes, no, 6).tolist() == [False, True, False, True, False, False]
    assert bt.reached(0, sources, targets, no, no, 6).tolist() == [True] + [False] * 5


def test_no_optimum_by_brute_force():
    """500 random graphs: "" if and only if every arm reaches every other by wins (Floyd and Warshall), and then
    the fit's margins are finite; otherwise they grow without end, and what is said of the arms named is true.
    """
    generator, kinds = seeded(21), {"": 0, "pieces": 0, "loses": 0, "wins": 0}
    for _ in range(500):
        K = int(torch.randint(2, 7, (1,), generator=generator))
        N = int(torch.randint(1, 3 * K, (1,), generator=generator))
        rows = [(*torch.randperm(K, generator=generator)[:2].tolist(),
                 [0, 1, 1, 0.5][int(torch.randint(4, (1,), generator=generator))]) for _ in range(N)]  # fmt: skip
        beats = [[False] * K for _ in range(K)]
        for a, b, mu in rows:
            beats[a][b] |= mu > 0
            beats[b][a] |= mu < 1
        reach = [[a == b or beats[a][b] for b in range(K)] for a in range(K)]
        for k, a, b in itertools.product(range(K), repeat=3):
            reach[a][b] |= reach[a][k] and reach[k][b]
        votes, connected = votes_of(rows), all(map(all, reach))
        said = why(votes, K)
        assert (said == "") == connected
        kind = next(kind for kind in ("pieces", "loses", "wins", "") if kind in said)
        kinds[kind] += 1
        named = {k for k in range(K) if f"<{k}>" in said}
        edges = {(a in named) for a in range(K) for b in range(K) if beats[a][b] and (a in named) != (b in named)}
        assert edges == {"": set(), "pieces": set(), "loses": {True}, "wins": {False}}[kind]
        assert len(named) <= K / 2 and (said == "" or named)
        if kind != "pieces":
            r = fitted(votes, K)
            largest = max(abs(r[a] - r[b]).item() for a, b, _ in rows)
            assert (largest < 8) == connected and (largest > 25) == (not connected)
    assert min(kinds.values()) > 40, kinds


# ---- Standard errors and intervals ----


@pytest.mark.parametrize("l2", [0.0, 0.7])
@pytest.mark.parametrize("case", ["ties", "unbalanced", "a chain of pairs", "soft labels"])
def test_standard_errors_by_autograd(case, l2):
    """Square roots of the diagonal of the pseudo-inverse of autograd's Hessian, in the space of sum 0."""
    votes = CASES[case]
    K = int(votes[1].max()) + 1
    pairs = bt.pairs_of(*votes, K)
    r, total = bt.fit(*pairs[:4], K, l2), votes[3].sum()
    H = torch.autograd.functional.hessian(
        lambda x: bt.bt_loss(x, *votes) * total + l2 / 2 * x.square().sum(), r)  # fmt: skip
    centre = torch.eye(K).double() - 1 / K
    want = torch.linalg.pinv(centre @ H @ centre, hermitian=True, rtol=1e-12).diagonal().sqrt()
    assert (bt.standard_errors(r, *pairs[:3], l2) / want - 1).abs().max() < 1e-6


def test_two_arms_errors_in_closed_form():
    """The variance of the log odds of w wins of n is 1 / w + 1 / (n - w); either reward is half of them."""
    votes = votes_of([(0, 1, 1, 30), (0, 1, 0, 10)])
    pairs = bt.pairs_of(*votes, 2)
    errors = bt.standard_errors(bt.fit(*pairs[:4], 2), *pairs[:3])
    assert errors.tolist() == pytest.approx([math.sqrt(1 / 30 + 1 / 10) / 2] * 2, abs=1e-12)


@pytest.mark.parametrize("voters", [1, 2])
def test_coverage_of_standard_errors(voters):
    """Hard labels: 95 % of true rewards within 1.96 errors; ties of two voters: errors sqrt(2) too wide.

    500 fits of 5 arms: the share's own error is at most sqrt(.05 .95 / 500) = 0.0097 (were all arms one), the
    spread's relative one at most 1 / sqrt(1000) = 0.032; bounds at 3 of them.
    """
    r, generator, z = tensor(0.9, 0.2, 0.0, -0.3, -0.8), seeded(22), []
    i, j = torch.triu_indices(5, 5, 1).repeat(1, 40)  # 400 comparisons
    for _ in range(500):
        votes = torch.rand(400, voters, generator=generator, dtype=torch.float64)
        mu = (votes < torch.sigmoid(r[i] - r[j])[:, None]).double().mean(1)
        pairs = bt.pairs_of(i, j, mu, torch.ones(400).double(), 5)
        found = bt.fit(*pairs[:4], 5)
        z.append((found - r) / bt.standard_errors(found, *pairs[:3]))
    z = torch.stack(z)
    share, spread = (z.abs() < 1.96).double().mean().item(), z.square().mean().sqrt().item()
    if voters == 1:
        assert abs(share - 0.95) < 0.029 and abs(spread - 1) < 0.1
    else:  # 1.96 sqrt(2) of the estimates' own deviations: 99.4 %
        assert share > 0.98 and abs(spread * math.sqrt(2) - 1) < 0.1


def test_coverage_of_the_bootstrap():
    """With ties of two voters, where the Fisher information is no guide: 70 sets of votes, 4 arms, 80 draws.

    Error of the share at most sqrt(.05 .95 / 70) = 0.026, and percentiles of 80 draws cover 1 or 2 % less.
    """
    r, generator, inside = tensor(0.7, 0.2, -0.2, -0.7), seeded(23), []
    i, j = torch.triu_indices(4, 4, 1).repeat(1, 40)  # 240 comparisons
    ones = torch.ones(240).double()
    for k in range(70):
        draws = torch.rand(240, 2, generator=generator, dtype=torch.float64)
        mu = (draws < torch.sigmoid(r[i] - r[j])[:, None]).double().mean(1)
        *pairs, pair = bt.pairs_of(i, j, mu, ones, 4)
        replicates = bt.bootstrap(bt.fit(*pairs, 4), *pairs[:3], mu, ones, pair, 0.0, 80, k)
        low, high = replicates.quantile(bt.INTERVAL, dim=0)
        inside.append((low < r) & (r < high))
    assert 0.86 < torch.stack(inside).double().mean() < 0.99


def resampled(votes, K, replicates, seed, l2=0.0):
    *pairs, pair = bt.pairs_of(*votes, K)
    r = bt.fit(*pairs, K, l2)
    return r, pairs, bt.bootstrap(r, *pairs[:3], *votes[2:], pair, l2, replicates, seed)


@pytest.mark.parametrize("l2", [0.0, 2.0])
def test_replicates_are_fits_to_the_drawn_votes(l2):
    votes, _ = random_votes(5, 300, seed=24)
    _, _, replicates = resampled(votes, 5, 8, seed=25, l2=l2)
    generator = seeded(25)
    for replicate in replicates:
        drawn = torch.randint(300, (300,), generator=generator)
        r = fitted(tuple(x[drawn] for x in votes), 5, l2=l2)
        assert (replicate - r).abs().max() < 1e-5
        assert gradient_norm(replicate, tuple(x[drawn] for x in votes), l2) < 1e-8


def test_bootstrap_spread_is_fisher_for_hard_labels():
    """500 draws: relative error of a spread 1 / sqrt(1000) = 0.032; bound at 3 of them. With ties: sqrt(1/2)."""
    for voters, factor in ((1, 1.0), (2, math.sqrt(0.5))):
        votes, _ = random_votes(4, 4000, seed=26, spread=0.5, voters=voters)
        r, pairs, replicates = resampled(votes, 4, 500, seed=27)
        ratio = replicates.std(0) / bt.standard_errors(r, *pairs[:3])
        assert (ratio / factor - 1).abs().max() < 0.1
        assert (replicates.mean(0) - r).abs().max() < 0.01


def test_bootstrap_depends_on_the_seed_only():
    votes, _ = random_votes(5, 200, seed=28)
    torch.manual_seed(1)
    _, _, one = resampled(votes, 5, 5, seed=29)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, _, two = resampled(votes, 5, 5, seed=29)
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, resampled(votes, 5, 5, seed=30)[2])
    assert len(torch.unique(one, dim=0)) == 5


def test_bootstrap_counts_are_repeated_rows():
    rows = [(0, 1, 1, 30), (0, 1, 0.5, 7), (1, 2, 0, 12), (1, 2, 1, 15), (2, 0, 1, 20), (0, 2, 1, 25)]
    repeated = [row[:3] for row in rows for _ in range(row[3])]
    one, two = (resampled(votes_of(x), 3, 6, seed=31)[2] for x in (rows, repeated))
    assert (one - two).abs().max() < 1e-7


@pytest.mark.parametrize("dense", [True, False])
def test_bootstrap_without_some_arms(dense, monkeypatch):
    """Arm 5 has a win and a loss: a third of the draws lose either, an eighth both. The others do not mind."""
    monkeypatch.setattr(bt, "DENSE", 4000 if dense else 0)
    (i, j, mu, count), _ = random_votes(5, 300, seed=32)
    votes = tuple(map(torch.cat, zip((i, j, mu, count), votes_of([(0, 5, 1), (1, 5, 0)]))))
    _, _, replicates = resampled(votes, 6, 40, seed=33)
    assert replicates[:, :5].abs().max() < 5
    generator, absent = seeded(33), 0
    for replicate in replicates:
        drawn = torch.randint(302, (302,), generator=generator)
        won, lost = (drawn == 300).any(), (drawn == 301).any()  # arm 0 over arm 5, arm 5 over arm 1
        others = fitted(tuple(x[drawn[drawn < 300]] for x in votes), 5)
        if not won or not lost:
            assert (replicate[:5] - replicate[:5].mean() - others).abs().max() < 1e-5
        absent += not won and not lost
        above, below, unknown = replicate[5] > 1e8, replicate[5] < -1e8, replicate[5].isnan()
        assert [above, below, unknown] == [lost and not won, won and not lost, not won and not lost]
    assert absent > 0


def reference_limit(votes, K, r):
    """By brute force: components of the graph of wins by Floyd and Warshall; the middle one is fitted by itself."""
    i, j, mu, _ = votes
    lead = torch.eye(K, dtype=bool)
    for a, b, m in zip(i.tolist(), j.tolist(), mu.tolist()):
        lead[a, b] |= m > 0
        lead[b, a] |= m < 1
    for k in range(K):
        lead |= lead[:, k, None] & lead[k]
    up, down = 2 * lead.sum(1) > K, 2 * lead.sum(0) > K
    want = torch.full((K,), math.nan).double()
    want[up & ~down], want[down & ~up] = math.inf, -math.inf
    middle = (up & down).nonzero()[:, 0].tolist()
    if middle:
        assert lead[middle][:, middle].all()
        rows = [(middle.index(a), middle.index(b), m) for a, b, m in zip(i.tolist(), j.tolist(), mu.tolist())
                if a in middle and b in middle]  # fmt: skip
        inner = fitted(votes_of(rows), len(middle)) if rows else torch.zeros(1).double()
        want[middle] = inner + r[middle].mean()
    return want


def infinite(x):
    return x.where(~(x.abs() > bt.FAR / 2), math.inf * x.sign())


def test_replicates_without_an_optimum_are_at_their_limits():
    """Few votes: each draw against brute force, whichever arms are infinite, in the middle, or unknown."""
    seen = {"finite": 0, "inf": 0, "-inf": 0, "nan": 0, "no middle": 0}
    for seed in range(12):
        K = 2 + seed % 6
        (i, j, mu, count), _ = random_votes(K, [K, 4 * K][seed % 2], seed=700 + seed, voters=1)
        ring = votes_of([(k, (k + 1) % K, 1) for k in range(K)])
        votes = tuple(map(torch.cat, zip((i, j, mu, count), ring)))
        r, _, replicates = resampled(votes, K, 20, seed=seed)
        generator = seeded(seed)
        for replicate in replicates:
            drawn = torch.randint(len(votes[0]), (len(votes[0]),), generator=generator)
            want = reference_limit(tuple(x[drawn] for x in votes), K, r)
            assert torch.allclose(infinite(replicate), want, atol=1e-4, rtol=0, equal_nan=True)
            for name in ("inf", "-inf", "nan"):
                seen[name] += [str(x) for x in want.tolist()].count(name)
            seen["finite"] += int(want.isfinite().all())
            seen["no middle"] += not want.isfinite().any()
    assert min(seen.values()) > 3, seen


def never_loses(x_wins=20):
    """x over y once less than always; y and z are equal: in a third of the draws x never loses."""
    return votes_of([(0, 1, 1, x_wins), (1, 0, 1, 1), (1, 2, 1, 14), (2, 1, 1, 14)])


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-11])
def test_a_bound_is_infinite_whatever_the_tolerance_of_a_fit(tolerance, monkeypatch):
    """Of the arm that never loses in some draws, and of no other. Without this arm the others' bounds are nearly the same."""
    inner = bt.fit
    monkeypatch.setattr(bt, "fit", lambda *args: inner(*args[:8], tolerance) if len(args) == 9 else inner(*args))
    r, _, replicates = resampled(never_loses(), 3, 400, seed=3)
    rows = {row["arm"]: row for row in bt.leaderboard(["x", "y", "z"], r, r, replicates, {})}
    assert rows["x"]["high"] == math.inf and 1 < rows["x"]["low"] < r[0] and rows["x"]["worst_rank"] == 1
    for name in "yz":
        assert -2.5 < rows[name]["low"] < rows[name]["high"] < 0 and rows[name]["best_rank"] == 2
    turned = bt.leaderboard(["x", "y", "z"], -r, r, -replicates, {})
    assert turned[2]["low"] == -math.inf and turned[2]["high"] == -rows["x"]["low"]


def test_infinite_bounds_contain_the_estimate():
    """A chain of 99:1, whose draws break at every third link: nothing but the ranks is bounded."""
    votes = votes_of([(k, k + 1, mu, n) for k in range(14) for mu, n in ((1, 99), (0, 1))])
    r, _, replicates = resampled(votes, 15, 100, seed=5)
    rows = bt.leaderboard([str(k) for k in range(15)], r, r, replicates, {})
    assert [row["arm"] for row in rows] == [str(row["best_rank"] - 1) for row in rows]
    for row in rows:
        assert row["low"] <= row["reward"] <= row["high"] and row["worst_rank"] == row["rank"]
    assert rows[0]["high"] == math.inf and rows[14]["low"] == -math.inf


def test_an_unbounded_interval_in_the_files(tmp_path, capsys):
    """inf on the screen, null in JSON, an empty cell in the table."""
    run = tmp_path / "run"
    rows = [{**X, "wins_a": 20, "wins_b": 1}, {"item_a": "y", "item_b": "z", "wins_a": 14, "wins_b": 14}]
    bt.main(bt.Args(dataset=written(tmp_path, rows), output_dir=str(run), **{**SMALL, "num_bootstrap": 200}))
    board = json.loads((run / "leaderboard.json").read_text(), parse_constant=no_constant)
    assert board[0]["arm"] == "x" and board[0]["high"] is None and board[0]["low"] > 0.5
    assert None not in board[1].values() and None not in board[2].values()
    with open(run / "leaderboard.csv", newline="") as file:
        assert [row["high"] == "" for row in csv.DictReader(file)] == [True, False, False]
    assert f"{board[0]['low']:.3f} to    inf" in capsys.readouterr().out


# ---- Optima ----


R, REF = tensor(1, 0.5, 0, -0.5, 2), tensor(0.1, 0.3, 0.4, 0.15, 0.05).log()


def problem(seed):
    """(rewards, log pi_ref, beta)."""
    K = 2 + seed % 6
    return noise(K, seed=seed), torch.log_softmax(noise(K, seed=100 + seed), 0), 0.1 * 2 ** (seed % 5)


def test_optima_by_numbers():
    want = tensor(0.1559, 0.1721, 0.0844, 0.0116, 0.5760)
    assert (bt.optimum(R, REF, 0.5).exp() - want).abs().max() < 5e-5
    want = tensor(0.0483, 0.0978, 0.0983, 0.0296, 0.7260)
    assert (bt.forward_kl_optimum(R, REF, 0.5).exp() - want).abs().max() < 5e-5


def test_optima_of_several_problems_at_once():
    """(P, K): each row is a problem of its own; beta may be one number or a column of them."""
    r, ref = 2 * noise(3, 5, seed=40), torch.log_softmax(noise(3, 5, seed=41), 1)
    for optimum in (bt.optimum, bt.forward_kl_optimum):
        for beta in (0.3, tensor(0.1, 0.5, 2.0)[:, None]):
            betas = beta if torch.is_tensor(beta) else [beta] * 3
            want = torch.stack([optimum(*rows) for rows in zip(r, ref, betas)])
            assert (optimum(r, ref, beta) - want).abs().max() < 1e-12


def test_regret_is_a_divergence():
    """J(pi*) - J(pi) = beta KL(pi || pi*) of any pi; J(pi*) = beta log Z; r = beta log pi* / pi_ref + beta log Z."""
    for r, ref, beta in map(problem, range(20)):
        best = bt.optimum(r, ref, beta)
        Z = sum(math.exp(a) * math.exp(b / beta) for a, b in zip(ref.tolist(), r.tolist()))
        assert bt.objective(best, r, ref, beta).item() == pytest.approx(beta * math.log(Z), abs=1e-12)
        assert (best.exp() - ref.exp() * (r / beta).exp() / Z).abs().max() < 1e-12
        assert (beta * (best - ref) + beta * math.log(Z) - r).abs().max() < 1e-12
        assert (bt.optimum(r + 5, ref, beta) - best).abs().max() < 1e-12  # the same for a class of rewards
        for seed in range(5):
            logp = torch.log_softmax(2 * noise(len(r), seed=200 + seed), 0)
            J = sum(math.exp(p) * (a - beta * (p - q)) for p, a, q in zip(logp.tolist(), r.tolist(), ref.tolist()))
            assert bt.objective(logp, r, ref, beta).item() == pytest.approx(J, abs=1e-12)
            regret = bt.objective(best, r, ref, beta) - bt.objective(logp, r, ref, beta)
            assert regret.item() == pytest.approx(beta * bt.kl(logp, best), abs=1e-12) and regret > 0


@pytest.mark.parametrize("seed", range(12))
def test_forward_kl_optimum(seed):
    """lambda = r + beta pi_ref / pi is one number; no perturbation has more of E[r] - beta KL(pi_ref || pi)."""
    r, ref, beta = problem(seed)
    logp = bt.forward_kl_optimum(r, ref, beta)
    value = lambda x: (x.exp() @ r - beta * (ref.exp() * (ref - x)).sum()).item()
    lambdas = r + beta * ref.exp() / logp.exp()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-12) and lambdas.std() < 1e-9
    for k, size in itertools.product(range(10), (0.01, 0.1, 1.0)):
        other = torch.log_softmax(logp + size * noise(len(r), seed=300 + k), 0)
        assert value(other) < value(logp)


# ---- Policies ----


def gradient_of(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(torch.log_softmax(x, 0)), x)[0]


def deviation(r, ref, beta, p):
    """Standard deviation under p of r - beta log p / pi_ref."""
    reward = r - beta * (p.log() - ref)
    return math.sqrt(sum(w * (x - (p @ reward).item()) ** 2 for w, x in zip(p.tolist(), reward.tolist())))


@pytest.mark.parametrize("clip", [math.inf, 0.2])
@pytest.mark.parametrize("seed", range(6))
def test_policy_gradient_by_enumeration(seed, clip):
    """At pi = old, where no clip acts, REINFORCE's and PPO's gradient is J's; GRPO divides it by a deviation, or
    has the other divergence's gradient beside E[r]'s.
    """
    r, ref, beta = problem(seed)
    x = noise(len(r), seed=400 + seed)
    old = torch.log_softmax(x, 0)

    def loss(**kind):
        return gradient_of(lambda logp: bt.policy_loss(logp, old, r, ref, beta, clip_coef=clip, **kind), x)

    J = gradient_of(lambda logp: bt.objective(logp, r, ref, beta), x)
    assert (loss() + J).abs().max() < 1e-12
    assert (loss(divide=True) + J / deviation(r, ref, beta, old.exp())).abs().max() < 1e-11
    Er = gradient_of(lambda logp: logp.exp() @ r, x)
    forward = gradient_of(lambda logp: (ref.exp() * (ref - logp)).sum(), x)
    assert (loss(kl_in="loss") + Er - beta * forward).abs().max() < 1e-12
    scaled = Er / deviation(r, ref, 0.0, old.exp())
    assert (loss(kl_in="loss", divide=True) + scaled - beta * forward).abs().max() < 1e-11


def test_clip_by_hand():
    """PPO's table: advantages 1, 1, -1, -1 and ratios 1.5, .5, 1.5, .5 cost -1.2, -.5, 1.5, .8; a quarter each."""
    r, old = tensor(1, 1, -1, -1), torch.full((4,), 0.25).double().log()
    logp = (old + tensor(1.5, 0.5, 1.5, 0.5).log()).requires_grad_()
    loss = bt.policy_loss(logp, old, r, old, 0.0, clip_coef=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8) / 4, abs=1e-12)
    assert (logp.grad - tensor(0, -0.5, 1.5, 0) / 4).abs().max() < 1e-12
    unclipped = bt.policy_loss(logp, old, r, old, 0.0).item()
    assert unclipped == pytest.approx((-1.5 - 0.5 + 1.5 + 0.5) / 4, abs=1e-12)


def test_penalties_by_hand():
    """In the reward: log pi_old / pi_ref, which takes no gradient. In the loss: k3 of pi, weighted by pi_old."""
    r, ref, old = noise(4, seed=61), *(torch.log_softmax(noise(4, seed=k), 0) for k in (62, 63))
    logp = torch.log_softmax(old + 0.1 * noise(4, seed=64), 0)
    p, ratio = old.exp().tolist(), (logp - old).exp().tolist()
    reward = [(a - 0.3 * (b - c)).item() for a, b, c in zip(r, old, ref)]
    want = -sum(w * q * (x - sum(map(math.prod, zip(p, reward)))) for w, q, x in zip(p, ratio, reward))
    assert bt.policy_loss(logp, old, r, ref, 0.3).item() == pytest.approx(want, abs=1e-12)
    mean = sum(map(math.prod, zip(p, r.tolist())))
    d = (logp - ref).tolist()
    want = sum(w * (0.3 * (math.exp(-x) - 1 + x) - q * (a - mean)) for w, x, q, a in zip(p, d, ratio, r.tolist()))
    assert bt.policy_loss(logp, old, r, ref, 0.3, kl_in="loss").item() == pytest.approx(want, abs=1e-12)


def test_equal_rewards_move_nothing():
    """No deviation to divide by: 0, not 0 / 0."""
    ref, args = torch.log_softmax(torch.zeros(3).double(), 0), bt.Args(num_steps=5)
    for logp, goal in bt.train_all(torch.zeros(3).double(), ref, *torch.triu_indices(3, 3, 1), args).values():
        assert (logp - ref).abs().max() < 1e-9 and (goal - ref).abs().max() < 1e-9


def test_schedule_and_old_policy():
    """train_policy hands the loss pi and, every `epochs` steps, a new pi_old; the rate falls to 0."""
    calls, start = [], torch.log_softmax(noise(3, seed=65), 0)

    def loss(logp, old):
        calls.append((logp.detach().clone(), old.clone()))
        return logp[0]

    args = SimpleNamespace(learning_rate=0.1, num_steps=8)
    end = bt.train_policy(loss, start, 4, args)
    assert torch.equal(calls[0][0], start) or (calls[0][0] - start).abs().max() < 1e-15
    for step, (_, old) in enumerate(calls):
        assert torch.equal(old, calls[step - step % 4][0])
    moves = [(b - a).abs().max().item() for (a, _), (b, _) in itertools.pairwise([*calls, (end, end)])]
    assert all(b < a for a, b in itertools.pairwise(moves)) and moves[-1] < moves[0] / 30
    assert (end[0] < start[0]) and end.exp().sum().item() == pytest.approx(1)


def test_every_method_reaches_its_prediction():
    """5 problems of 3 to 7 arms, 300 steps at 0.2: KL to the prediction below 1e-5, or 0.005 of what it was for REINFORCE and
    PPO, whose gradient fades where pi does; DPO is there. Both directions of the KL penalty are told apart.
    """
    beta, args = 0.5, bt.Args(num_steps=300, learning_rate=0.2)
    for seed in range(5):
        K = 3 + seed
        r, ref = 0.8 * noise(K, seed=500 + seed), torch.log_softmax(0.6 * noise(K, seed=600 + seed), 0)
        reached = bt.train_all(r, ref, *torch.triu_indices(K, K, 1), args)
        best, forward = bt.optimum(r, ref, beta), bt.forward_kl_optimum(r, ref, beta)
        for name, (logp, goal) in reached.items():
            slow = name.startswith(("REINFORCE", "PPO"))
            assert bt.kl(logp, goal) < (0.005 * bt.kl(ref, goal) if slow else 1e-5), (seed, name)
        for name in ("REINFORCE", "PPO, 4 epochs, clip 0.2", "DPO", "GRPO, k1 in the reward"):
            assert torch.equal(reached[name][1], best)
        assert (reached["GRPO, k3 in the loss"][1] - forward).abs().max() < 1e-12
        assert (reached["DPO"][0] - best).abs().max() < 1e-5
        logp, goal = reached["GRPO, k3, A / std"]
        assert (goal - bt.forward_kl_optimum(r, ref, beta * deviation(r, ref, 0.0, goal.exp()))).abs().max() < 1e-9
        k1, k3 = reached["GRPO, k1 in the reward"][0], reached["GRPO, k3 in the loss"][0]
        apart = bt.kl(best, forward)
        assert bt.kl(k1, forward) > apart / 2 > 100 * bt.kl(k1, best)
        assert bt.kl(k3, best) > bt.kl(forward, best) / 2 > 100 * bt.kl(k3, forward)


def test_flipped_rewards_are_noticed():
    reached = bt.train_all(-R, REF, *torch.triu_indices(5, 5, 1), bt.Args(num_steps=300, learning_rate=0.2))
    for logp, _ in reached.values():
        assert (logp.exp() - bt.optimum(R, REF, 0.5).exp()).abs().sum() / 2 > 0.3


def test_dpo_from_population_preferences():
    """All pairs, or a chain that connects the arms; 64 arms in under a second. Without pi_ref it is elsewhere."""
    r, ref = noise(64, seed=71), torch.log_softmax(noise(64, seed=72), 0)
    start = time.process_time()
    logp = bt.dpo(r, ref, 0.5, *torch.triu_indices(64, 64, 1))
    assert time.process_time() - start < 1
    assert (logp - bt.optimum(r, ref, 0.5)).abs().max() < 1e-5
    chain = bt.dpo(R, REF, 0.5, torch.arange(4), torch.arange(1, 5))
    assert (chain - bt.optimum(R, REF, 0.5)).abs().max() < 1e-5
    uniform = torch.full((5,), 0.2).double().log()
    assert (bt.dpo(R, uniform, 0.5, torch.arange(4), torch.arange(1, 5)) - chain).abs().max() > 0.1


def test_dpo_on_votes_is_the_optimum_of_fitted_rewards():
    """Reward model, then its optimal policy, or DPO on the same votes: one policy."""
    (votes, _), beta = random_votes(6, 300, seed=73), 0.4
    ref = torch.log_softmax(noise(6, seed=74), 0)
    implicit = lambda x: beta * (torch.log_softmax(x, 0) - ref)
    logp = torch.log_softmax(minimize(lambda x: bt.bt_loss(implicit(x), *votes), ref), 0)
    r = fitted(votes, 6)
    assert (logp - bt.optimum(r, ref, beta)).abs().max() < 1e-5
    secret = beta * (logp - ref)
    assert (secret - secret.mean() - r).abs().max() < 1e-5
    # of its class, the one reward that is beta log pi / pi_ref: sum pi_ref exp(r / beta) = 1
    one, two = (x - beta * torch.logsumexp(ref + x / beta, 0) for x in (r, r + 3))
    assert (one - two).abs().max() < 1e-12 and (secret - one).abs().max() < 1e-5


# ---- Votes ----


def test_known_world_is_bradley_terry():
    """Each pair's mean mu within 4.5 standard errors of sigma(r_i - r_j), their variance p (1 - p) / 2."""
    names, votes, r = bt.known_world(SimpleNamespace(seed=3, num_arms=5, num_votes=50_000))
    assert len(names) == len(r) == 5 and (votes[0] < votes[1]).all()
    assert torch.unique(votes[2]).tolist() == [0, 0.5, 1] and (votes[3] == 1).all()
    i, j, number, wins, _ = bt.pairs_of(*votes, 5)
    p = torch.sigmoid(r[i] - r[j])
    assert len(i) == 10 and (number - 5000).abs().max() < 4.5 * math.sqrt(4500)
    assert ((wins / number - p) / (p * (1 - p) / 2 / number).sqrt()).abs().max() < 4.5


def written(tmp_path, rows):
    file = tmp_path / "votes.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(file)


X, Y, Z = {"item_a": "x", "item_b": "y"}, {"model_a": "y", "model_b": "x"}, {"item_a": "z", "item_b": "x"}


@pytest.mark.parametrize("row, votes", [
    ({**X, "outcome": "a"}, [(0, 1, 1, 1)]),
    ({**X, "outcome": "b"}, [(0, 1, 0, 1)]),
    ({**X, "outcome": "tie"}, [(0, 1, 0.5, 1)]),
    ({**X, "outcome": "x"}, [(0, 1, 1, 1)]),
    ({**X, "outcome": "y"}, [(0, 1, 0, 1)]),
    ({**X, "winner": "model_a"}, [(0, 1, 1, 1)]),
    ({**Y, "winner": "model_a"}, [(0, 1, 0, 1)]),
    ({**Y, "winner": "model_b"}, [(0, 1, 1, 1)]),
    ({**Y, "winner": "x"}, [(0, 1, 1, 1)]),
    ({**Y, "winner": "tie (bothbad)"}, [(0, 1, 0.5, 1)]),
    ({**X, "winner": "b", "count": 7}, [(0, 1, 0, 7)]),
    ({**X, "winner": "b", "count": 0}, []),
    ({**X, "mu": 0.75}, [(0, 1, 0.75, 1)]),
    ({**Y, "mu": 1, "count": 2}, [(0, 1, 0, 2)]),
    ({**Y, "mu": 0.25}, [(0, 1, 0.75, 1)]),
    ({**X, "wins_a": 3, "wins_b": 2}, [(0, 1, 1, 3), (0, 1, 0, 2)]),
    ({**Y, "wins_a": 3, "wins_b": 0, "ties": 4}, [(0, 1, 0, 3), (0, 1, 0.5, 4)]),
    ({**X, "outcome": "a", "prompt_id": 8, "judge": 58}, [(0, 1, 1, 1)]),
])  # fmt: skip
def test_accepted_votes(row, votes, tmp_path):
    first = {**X, "outcome": "a"}  # x is arm 0, y arm 1
    names, (i, j, mu, count), true = bt.load_votes(written(tmp_path, [first, row, "", {**Z, "outcome": "z"}]))
    assert names == ["x", "y", "z"] and true is None
    found = list(zip(i.tolist(), j.tolist(), mu.tolist(), count.tolist()))
    assert found == [(0, 1, 1, 1), *votes, (0, 2, 0, 1)]
    assert i.dtype == j.dtype == torch.int64 and mu.dtype == count.dtype == torch.float64


def test_whole_numbers_are_names(tmp_path):
    rows = [{"item_a": 30, "item_b": 5, "winner": 30}, {"item_a": 5, "item_b": 30, "winner": 30},
            {"item_a": 5, "item_b": 30, "winner": "5"}, {"item_a": 5, "item_b": 30, "winner": "b"}]  # fmt: skip
    names, votes, _ = bt.load_votes(written(tmp_path, rows))
    assert names == ["30", "5"] and votes[2].tolist() == [1, 1, 0, 1]


def test_a_list_in_a_json_file(tmp_path):
    file = tmp_path / "votes.json"
    file.write_text(json.dumps([{**X, "outcome": "a"}, {**X, "outcome": "b"}], indent=1))
    assert bt.load_votes(str(file))[1][2].tolist() == [1, 0]


GOOD = [{**X, "outcome": "a"}, {**X, "outcome": "b"}]


@pytest.mark.parametrize("row, parts", [
    ({**X, "outcome": "w"}, ["outcome 'w'", "expected a, b, tie", "'x', 'y'"]),
    ({**X, "outcome": "A"}, ["outcome 'A'", "expected a, b, tie"]),
    (X, ["outcome", "expected a, b, tie"]),
    ({**X, "winner": None}, ["outcome", "expected a, b, tie"]),
    ({**X, "mu": 1.5}, ["mu is 1.5", "0.5 a tie"]),
    ({**X, "mu": -0.1}, ["mu is -0.1"]),
    ({**X, "mu": "0.5"}, ["mu is '0.5'"]),
    ({**X, "mu": True}, ["mu is True"]),
    ({**X, "mu": None}, ["mu is None"]),
    ('{"item_a": "x", "item_b": "y", "mu": NaN}', ["mu is nan"]),
    ({"item_a": "x", "item_b": "x", "outcome": "a"}, ["'x' against itself"]),
    ({"item_a": "x", "outcome": "a"}, ["needs item_a, item_b or model_a, model_b", "['item_a', 'outcome']"]),
    ({"left": "x", "right": "y"}, ["needs item_a, item_b", "['left', 'right']"]),
    ({"item_a": "x", "item_b": None, "outcome": "a"}, ["needs item_a, item_b"]),
    ({"item_a": "x", "item_b": 1.5, "outcome": "a"}, ["needs item_a, item_b"]),
    ({**X, "outcome": "a", "count": -1}, ["-1 votes", "whole number"]),
    ({**X, "outcome": "a", "count": 1.5}, ["1.5 votes", "whole number"]),
    ({**X, "outcome": "a", "count": "2"}, ["'2' votes", "whole number"]),
    ({**X, "outcome": "a", "count": True}, ["True votes", "whole number"]),
    ({**X, "wins_a": 2}, ["None votes", "whole number"]),
    ({**X, "wins_a": 2, "wins_b": -3}, ["-3 votes"]),
    ('{"item_a": "x", ', ["JSONDecodeError"]),
    ("[1, 2]", ["expected a JSON object"]),
])  # fmt: skip
def test_bad_votes(row, parts, tmp_path, capsys):
    file = written(tmp_path, [*GOOD, row])
    refused([f"{file}:3: ", *parts], capsys, dataset=file, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def refused(parts, capsys, **options):
    """main ends with exit code 2 and one line on stderr that holds all parts."""
    with pytest.raises(SystemExit) as stop:
        bt.main(bt.Args(**{**SMALL, **options}))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize("rows, parts", [
    ([], ["no rows"]),
    ([{**X, "outcome": "a", "count": 0}], ["no votes"]),
    ([{**X, "outcome": "a"}], ["no finite optimum", "x never loses to the others", "--l2"]),
    ([*GOOD, {**Z, "outcome": "b"}], ["no finite optimum", "z never wins against the others"]),
    ([*GOOD, {"item_a": "v", "item_b": "w", "outcome": "tie"}], ["in pieces", "x, y never met the others"]),
])  # fmt: skip
def test_files_without_an_answer(rows, parts, tmp_path, capsys):
    file = written(tmp_path, rows)
    refused([file, *parts], capsys, dataset=file, output_dir=str(tmp_path / "run"))


def test_a_file_that_is_not_there(tmp_path, capsys):
    file = str(tmp_path / "none.jsonl")
    refused([file], capsys, dataset=file, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("flag, value", [
    ("num_arms", 1), ("num_votes", 0), ("l2", -0.1), ("l2", math.nan), ("num_bootstrap", 0), ("beta", 0.0),
    ("beta", math.inf), ("beta", math.nan), ("learning_rate", -1.0), ("num_steps", 0), ("seed", -1), ("seed", 2**64),
])  # fmt: skip
def test_flags_out_of_range(flag, value, tmp_path, capsys):
    options = {"output_dir": str(tmp_path / "run"), flag: value}
    refused([f"--{flag.replace('_', '-')} is {value}", "out of range"], capsys, **options)


# ---- Runs ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, metrics) of a run on known rewards; beside the folder, what it printed."""
    folder = tmp_path_factory.mktemp("bandit") / "run"
    with open(folder.with_suffix(".txt"), "w") as screen, contextlib.redirect_stdout(screen):
        metrics = bt.main(bt.Args(output_dir=str(folder), **SMALL))
    return folder, metrics


def test_files_of_a_run(finished):
    folder, metrics = finished
    assert {x.name for x in folder.iterdir()} >= {"args.json", "metrics.json", "leaderboard.json", "leaderboard.csv"}
    board = json.loads((folder / "leaderboard.json").read_text())
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    with open(folder / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: type(row[key])(text) for key, text in line.items()} for line, row in zip(rows, board)] == board
    assert [row["rank"] for row in board] == list(range(1, 9)) == sorted(row["rank"] for row in board)
    assert sum(row["votes"] for row in board) == 2 * SMALL["num_votes"]
    args = json.loads((folder / "args.json").read_text())
    assert {**bt.asdict(bt.Args(output_dir=str(folder), **SMALL)), "torch": torch.__version__}.items() <= args.items()


def test_numbers_of_a_run(finished):
    """The leaderboard is the fit to the votes that the seed draws; loss and accuracy by loops; policies' columns."""
    folder, metrics = finished
    names, votes, r = bt.known_world(bt.Args(**SMALL))
    found = fitted(votes, 8)
    pairs = bt.pairs_of(*votes, 8)
    errors = bt.standard_errors(found, *pairs[:3])
    board = json.loads((folder / "leaderboard.json").read_text())
    for row in board:
        k = names.index(row["arm"])
        assert row["reward"] == pytest.approx(found[k].item(), abs=1e-12)
        assert row["se"] == pytest.approx(errors[k].item(), abs=1e-12)
        assert row["votes"] == int(((votes[0] == k) | (votes[1] == k)).sum())
        assert row["low"] < row["high"] and 1 <= row["best_rank"] <= row["worst_rank"] <= 8
        assert row["true"] == pytest.approx((r[k] - r.mean()).item(), abs=1e-12)
    assert [row["reward"] for row in board] == sorted((row["reward"] for row in board), reverse=True)
    assert metrics["loss"] == pytest.approx(bt.bt_loss(found, *votes).item(), abs=1e-12)
    right = [m if found[a] > found[b] else 1 - m for a, b, m in zip(*(x.tolist() for x in votes[:3]))]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)
    assert metrics["rmse"] == pytest.approx((found - r + r.mean()).square().mean().sqrt().item(), abs=1e-12)
    assert metrics["rmse"] < 0.3 and metrics["regret"] > 0
    for name in ("pi_ref", "REINFORCE", "DPO", "GRPO, k3 in the loss", "pi*"):
        assert metrics[f"{name}/regret"] == pytest.approx(metrics[f"{name}/distance_to_optimal"], abs=1e-9)
    assert metrics["pi_ref/kl"] == 0 and metrics["pi*/regret"] == 0 and metrics["DPO/error"] < 1e-5
    assert metrics["pi_ref/regret"] > metrics["REINFORCE/regret"] > metrics["DPO/regret"]
    best = max(metrics[f"{x}/expected_reward"] - 0.5 * metrics[f"{x}/kl"] for x in ("pi_ref", "REINFORCE", "PPO, 4 epochs, clip 0.2"))
    assert best < metrics["pi*/expected_reward"] - 0.5 * metrics["pi*/kl"]


def test_the_same_numbers_twice_and_without_matplotlib(finished, tmp_path, monkeypatch):
    folder, metrics = finished
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    torch.manual_seed(99)
    assert bt.main(bt.Args(output_dir=str(tmp_path), **SMALL)) == metrics
    for name in ("metrics.json", "leaderboard.json", "leaderboard.csv"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_a_finished_run_stays(finished, capsys):
    folder, _ = finished
    before = {x.name: x.read_bytes() for x in folder.iterdir()}
    refused(["finished run", str(folder)], capsys, output_dir=str(folder))
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == before


def test_columns_of_policies(finished):
    """By loops over the leaderboard's own rewards and pi_ref: J* - J, twice, and what is lost where the theory has
    each method end; what the fitted rewards' optimal policy loses by the true ones.
    """
    folder, metrics = finished
    board = json.loads((folder / "leaderboard.json").read_text())
    rewards, true, ref = ([row[key] for row in board] for key in ("reward", "true", "pi_ref"))

    def tilted(r):
        weights = [q * math.exp(x / 0.5) for q, x in zip(ref, r)]
        return [w / sum(weights) for w in weights]

    def J(p, r):
        return sum(w * (x - 0.5 * math.log(w / q)) for w, x, q in zip(p, r, ref))

    assert sum(ref) == pytest.approx(1, abs=1e-12) and max(ref) - min(ref) > 0.05
    best = tilted(rewards)
    assert metrics["pi*/expected_reward"] == pytest.approx(sum(p * x for p, x in zip(best, rewards)), abs=1e-12)
    lost = J(best, rewards) - J(ref, rewards)
    for column in ("regret", "distance_to_optimal", "predicted"):
        assert metrics[f"pi_ref/{column}"] == pytest.approx(lost, abs=1e-12)
    assert metrics["regret"] == pytest.approx(J(tilted(true), true) - J(best, true), abs=1e-12)
    for name in ("REINFORCE", "PPO, 4 epochs, clip 0.2", "DPO", "GRPO, k1 in the reward", "pi*"):
        assert metrics[f"{name}/predicted"] == pytest.approx(0, abs=1e-12)
    low, high = max(x + 0.5 * q for x, q in zip(rewards, ref)), max(rewards) + 0.5
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(0.5 * q / (middle - x) for x, q in zip(rewards, ref)) > 1 else (low, middle)
    forward = [0.5 * q / (high - x) for x, q in zip(rewards, ref)]
    lost = J(best, rewards) - J(forward, rewards)
    assert metrics["GRPO, k3 in the loss/predicted"] == pytest.approx(lost, abs=1e-12) and lost > 0.005
    for name in ("REINFORCE", "GRPO, k3 in the loss"):  # 40 steps: nearer to pi_ref than to where they end
        assert metrics[f"{name}/error"] > 0.01
        lost = metrics["pi*/expected_reward"] - metrics[f"{name}/expected_reward"]
        lost -= 0.5 * (metrics["pi*/kl"] - metrics[f"{name}/kl"])
        assert metrics[f"{name}/regret"] == pytest.approx(lost, abs=1e-12)


def test_ranks_are_rounded_outwards():
    """Of 21 draws one has the arms the other way round: the 2.5 % and 97.5 % quantiles lie half way to it."""
    resampled = torch.tensor([[1.0, -1.0]] * 20 + [[-3.0, 3.0]]).double()
    r, errors = tensor(1, -1), tensor(0.1, 0.2)
    rows = bt.leaderboard(["x", "y"], r, errors, resampled, {"votes": torch.tensor([5, 5])})
    assert [tuple(row.values()) for row in rows] == [
        (1, "x", 1.0, 0.1, -1.0, 1.0, 1, 2, 5), (2, "y", -1.0, 0.2, -1.0, 1.0, 1, 2, 5)]  # fmt: skip


def test_equal_rewards_share_no_rank():
    """Rows are numbered 1 to K whatever is equal."""
    zeros = torch.zeros(3).double()
    rows = bt.leaderboard(list("xyz"), zeros, zeros, torch.zeros(4, 3).double(), {})
    assert [row["rank"] for row in rows] == [1, 2, 3] and sorted(row["arm"] for row in rows) == list("xyz")


def test_what_is_printed(finished):
    """Each arm's line has its true reward beside the fitted one; the columns of policies are those of the file."""
    folder, metrics = finished
    lines = [line.split() for line in folder.with_suffix(".txt").read_text().splitlines()]
    board = json.loads((folder / "leaderboard.json").read_text())
    assert lines[0][-1] == "true" and len(board) == 8
    for row, line in zip(board, lines[1:]):
        numbers = [f"{row[key]:.3f}" for key in ("reward", "se", "low")]
        assert line == [str(row["rank"]), *row["arm"].split(), *numbers, "to", f"{row['high']:.3f}",
                        str(row["best_rank"]), "to", str(row["worst_rank"]), str(row["votes"]), f"{row['true']:.3f}"]  # fmt: skip
    for name in ("pi_ref", "PPO, 4 epochs, clip 0.2", "GRPO, k3, A / std", "pi*"):
        row = [metrics[f"{name}/{key}"] for key in (
            "expected_reward", "kl", "regret", "distance_to_optimal", "predicted", "error")]
        texts = [f"{x:{kind}}" for x, kind in zip(row, (".3f", ".3f", ".2e", ".2e", ".2e", ".1e"))]
        assert [*name.split(), *texts] in lines


def test_an_arena(tmp_path, capsys):
    """Votes with counts, ties and soft labels: accuracy and loss by loops over single votes; pi_ref is uniform, and
    there is no true reward.
    """
    rows = [{**X, "wins_a": 5, "wins_b": 2, "ties": 3}, {**Z, "mu": 0.25, "count": 4}, {**Z, "outcome": "tie", "count": 3},
            {"item_a": "v", "item_b": "w", "outcome": "tie"}, {"item_a": "v", "item_b": "x", "wins_a": 4, "wins_b": 4},
            {"item_a": "w", "item_b": "x", "wins_a": 4, "wins_b": 4}]  # fmt: skip
    run = tmp_path / "run"
    metrics = bt.main(bt.Args(dataset=written(tmp_path, rows), output_dir=str(run), **SMALL))
    text = capsys.readouterr().out
    board = json.loads((run / "leaderboard.json").read_text())
    r = {row["arm"]: row["reward"] for row in board}
    assert r["v"] == pytest.approx(r["w"], abs=1e-12) and "true" not in board[0] and "true" not in text.splitlines()[0]
    assert [row["pi_ref"] for row in board] == pytest.approx([1 / 5] * 5, abs=1e-15)
    assert {row["arm"]: row["votes"] for row in board} == {"x": 33, "y": 10, "z": 7, "v": 9, "w": 9}
    votes = [("x", "y", 1)] * 5 + [("x", "y", 0)] * 2 + [("x", "y", 0.5)] * 3 + [("z", "x", 0.25)] * 4 + [("z", "x", 0.5)] * 3
    votes += [("v", "w", 0.5)] + [(a, "x", mu) for a in "vw" for mu in (1, 0)] * 4
    right, loss = 0.0, 0.0
    for a, b, mu in votes:
        margin = r[a] - r[b]
        right += 0.5 if abs(margin) < 1e-12 else mu if margin > 0 else 1 - mu
        loss += mu * math.log1p(math.exp(-margin)) + (1 - mu) * math.log1p(math.exp(margin))
    assert metrics["accuracy"] == pytest.approx(right / len(votes), abs=1e-12)
    assert metrics["loss"] == pytest.approx(loss / len(votes), abs=1e-12)
    assert "rmse" not in metrics and "regret" not in metrics


def test_a_circle_of_wins(tmp_path, capsys):
    """x over y over z over x: equal rewards, so each vote is half right and the loss is log 2; pi* is pi_ref."""
    rows = [{**X, "outcome": "a"}, {"item_a": "y", "item_b": "z", "outcome": "a"}, {**Z, "outcome": "a"}]
    run = tmp_path / "run"
    metrics = bt.main(bt.Args(dataset=written(tmp_path, rows), output_dir=str(run), **SMALL))
    board = json.loads((run / "leaderboard.json").read_text())
    assert [row["reward"] for row in board] == [0, 0, 0] and [row["rank"] for row in board] == [1, 2, 3]
    assert metrics["accuracy"] == 0.5 and metrics["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["pi_ref/regret"] == pytest.approx(0, abs=1e-12)
    assert "3 votes: accuracy 0.500, loss 0.6931" in capsys.readouterr().out


def test_columns_of_a_known_policy(tmp_path, monkeypatch, capsys):
    """Every column by hand, in the file and on the screen, of a method that reaches pi* where (9, 1) / 10 was
    predicted, and of another one the other way round. Three votes in four make pi* = (3, 1) / 4 at beta 1.
    """
    reached, goal = tensor(0.75, 0.25).log(), tensor(0.9, 0.1).log()
    monkeypatch.setattr(bt, "train_all", lambda *_: {"one": (reached, goal), "two": (goal, reached)})
    file, entropy = written(tmp_path, [{**X, "wins_a": 3, "wins_b": 1}]), lambda p: -sum(w * math.log(w) for w in p)
    metrics = bt.main(bt.Args(dataset=file, output_dir=str(tmp_path / "run"), beta=1.0, **SMALL))
    r, kl = math.log(3) / 2, lambda p, q: sum(x * math.log(x / y) for x, y in zip(p, q))
    one = {"expected_reward": r / 2, "kl": math.log(2) - entropy((0.75, 0.25)), "regret": 0.0,
           "distance_to_optimal": 0.0, "predicted": kl((0.9, 0.1), (0.75, 0.25)), "error": math.log(2.5)}  # fmt: skip
    lost = kl((0.9, 0.1), (0.75, 0.25))
    two = {"expected_reward": 0.8 * r, "kl": math.log(2) - entropy((0.9, 0.1)), "regret": lost,
           "distance_to_optimal": lost, "predicted": 0.0, "error": math.log(2.5)}  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, row in (("one", one), ("two", two)):
        assert {key: metrics[f"{name}/{key}"] for key in row} == pytest.approx(row, abs=1e-12)
        (shown,) = [line for line in lines if line[:1] == [name]]
        assert [float(x) for x in shown[1:]] == pytest.approx(list(row.values()), rel=0.05, abs=1e-3)
        assert shown[-1] == "9.2e-01"


def no_constant(name):
    raise AssertionError(f"{name} is no JSON: other readers refuse the file")


@pytest.mark.parametrize("rows, options, margin", [
    ([{**X, "wins_a": 3, "wins_b": 1}], {}, math.log(3)),
    ([{**X, "wins_a": 300_000, "wins_b": 100_000, "ties": 0}], {"num_bootstrap": 3}, math.log(3)),
    ([{**X, "outcome": "tie"}], {}, 0.0),
    ([{**X, "outcome": "a", "count": 9}], {"l2": 0.1}, None),
    ([{**X, "wins_a": 3, "wins_b": 2}], {"num_bootstrap": 1}, math.log(1.5)),  # outside its interval
])  # fmt: skip
def test_two_arms(rows, options, margin, tmp_path):
    """K = 2, a large count, nothing but ties, a prior: finite numbers in files that other readers take."""
    run = tmp_path / "run"
    bt.main(bt.Args(dataset=written(tmp_path, rows), output_dir=str(run), **{**SMALL, **options}))
    for name in ("metrics", "leaderboard", "args"):
        json.loads((run / f"{name}.json").read_text(), parse_constant=no_constant)
    board = json.loads((run / "leaderboard.json").read_text())
    rewards = {row["arm"]: row["reward"] for row in board}
    found = rewards["x"] - rewards["y"]
    assert 2 < found < 6 if margin is None else found == pytest.approx(margin, abs=1e-9)


def test_certain_ranks(tmp_path):
    """Arms z > x > y by thousands of votes: each draw has the same order; the file meets them in another. A name
    that looks like a broken formula is a name.
    """
    x, y, z = "x", "$y_{$", "z"
    rows = [{**X, "wins_a": 3000, "wins_b": 1000}, {**Z, "wins_a": 3000, "wins_b": 1000, "ties": 5}]
    rows = [{key: y if value == "y" else value for key, value in row.items()} for row in rows]
    file, run = written(tmp_path, [*rows, {"item_a": y, "item_b": z, "mu": 0.1, "count": 4000}]), tmp_path / "run"
    bt.main(bt.Args(dataset=file, output_dir=str(run), **SMALL))
    board = json.loads((run / "leaderboard.json").read_text())
    assert [(row["arm"], row["best_rank"], row["worst_rank"]) for row in board] == [(z, 1, 1), (x, 2, 2), (y, 3, 3)]
    for row in board:
        assert row["low"] < row["reward"] < row["high"] and row["high"] - row["low"] < 6 * row["se"] < 0.2
        assert row["votes"] == {x: 8005, y: 8000, z: 8005}[row["arm"]]


def test_two_known_arms(tmp_path):
    assert bt.main(bt.Args(num_arms=2, output_dir=str(tmp_path), **SMALL))["rmse"] < 0.3


def test_many_arms_are_cut_on_the_screen_only(tmp_path, capsys):
    bt.main(bt.Args(num_arms=40, output_dir=str(tmp_path), **{**SMALL, "num_votes": 4000}))
    assert "and 10 more" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "leaderboard.json").read_text())) == 40


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*flags): (exit code, stdout, stderr) of `python bandit_bt.py` in an empty folder."""

    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bandit_bt.py", *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "bandit_bt.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


def test_help_has_all_flags(command, tmp_path):
    """That an import does nothing is test_house.py's."""
    code, shown, error = command("--help")
    assert (code, error, list(tmp_path.iterdir())) == (0, "", [])
    assert all(f"--{name.replace('_', '-')}" in shown for name in bt.asdict(bt.Args()))


def test_bad_input_of_the_command(command, tmp_path):
    file = written(tmp_path, [{**X, "outcome": "w"}])
    code, shown, error = command("--dataset", file)
    assert (code, shown) == (2, "") and not (tmp_path / "runs").exists()
    assert error.startswith(f"error: {file}:1: outcome 'w'") and error.count("\n") == 1


# ---- Real votes ----


def test_real_votes(shared):
    """8,931 human votes on 59 models, ties among them, against a reference fit: exp(r) up to a factor."""
    file = shared / "data" / "battles_llmfao.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    names, votes, _ = bt.load_votes(str(file))
    rows = map(json.loads, (shared / "data" / "battles_llmfao_golden.jsonl").read_text().splitlines())
    golden = {row["item"]: row["score"] for row in rows if row["algorithm"] == "bradley_terry"}
    assert len(names) == 59 and votes[3].sum() == 8931 and set(golden) == set(names)
    want = tensor(*(golden[name] for name in names))
    r = fitted(votes, 59)
    assert (torch.softmax(r, 0) - want / want.sum()).abs().max() < 1e-9
    assert gradient_norm(r, votes) < 1e-12
