"""Bradley-Terry on K arms: preferences in, rewards out, and every policy at its exact distance from the best.

    P(i beats j) = exp(r_i) / (exp(r_i) + exp(r_j)) = sigma(r_i - r_j)         Bradley and Terry (1952)
    loss(r)      = -mean of mu log P(i beats j) + (1 - mu) log P(j beats i),   mu = 1, 0, or 0.5 for a tie
    J(pi)        = E_pi[r] - beta KL(pi || pi_ref), maximal at pi* = pi_ref exp(r / beta) / Z
    J(pi*) - J(pi) = beta KL(pi || pi*), in units of the reward: Eqs. 3, 4 and App. A.1 of arXiv:2305.18290

Arms are the answers to one prompt, or the models of an arena. What the other scripts estimate from samples is
enumerated here in float64: rewards with their errors, then the policies of REINFORCE, PPO, DPO and GRPO.

What is done differently, and why:
1. Newton's method works on the pairs that met, not on votes: each pair's two numbers determine the loss.
2. Where no finite optimum exists (an arm never loses, arms never met) it says so; --l2 makes one.
3. A tie is half a win for each side. The Fisher information takes it for a coin toss, so where there are ties
   its standard errors are too wide; the bootstrap's intervals are not.

One CPU core, known rewards, 8 s:   python bandit_bt.py
The votes of an arena:              python bandit_bt.py --dataset battles.jsonl --output-dir runs/arena
"""

import csv
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from common import fail, kl_estimate, read_rows

DENSE = 4000  # up to so many arms the K x K matrix is factorized; above, conjugate gradients on the pairs
INTERVAL = torch.tensor([0.025, 0.975], dtype=torch.float64)
CYCLE = torch.tensor([[0.5, 0.6, 0.4, 0.6], [0.4, 0.5, 0.6, 0.1], [0.6, 0.4, 0.5, 0.6], [0.4, 0.9, 0.4, 0.5]])


@dataclass
class Args:
    dataset: str = ""  # file or Hub id of votes (see load_votes); empty: votes drawn from known rewards
    output_dir: str = "runs/bandit"  # args.json, metrics.json, leaderboard.json, .csv and .png
    seed: int = 1  # of everything that is drawn
    num_arms: int = 8  # K of the known rewards
    num_votes: int = 4000  # drawn from them, with ties
    l2: float = 0.0  # Gaussian prior: adds l2 / 2 sum r^2 to the sum of losses (0: maximum likelihood)
    num_bootstrap: int = 500  # resampled sets of votes behind the intervals
    beta: float = 0.5  # KL penalty of the policies, in units of the reward per nat
    learning_rate: float = 0.05  # peak of the policies' Adam
    num_steps: int = 2000  # of Adam, for each policy but DPO's, which L-BFGS finds


# ---- Rewards from votes ----


def bt_loss(r, i, j, mu, count):
    """-mean of mu log sigma(r_i - r_j) + (1 - mu) log sigma(r_j - r_i), rows standing for count votes: nats.

    Args: r (K,); i, j arms, mu in [0, 1], count of equal votes: (N,) each. No change under r + c: only
    differences are identified; r -> 2 r is another model. log 2 at r = 0.
    """
    margin = r[i] - r[j]
    return -(count * (mu * F.logsigmoid(margin) + (1 - mu) * F.logsigmoid(-margin))).sum() / count.sum()


def ranking_loss(r, rankings):
    """-mean log prod_k exp(r_k) / sum_{l >= k} exp(r_l): Plackett-Luce, App. A.3 of arXiv:2305.18290; nats.

    Args: rankings (N, L) of arms, best first. For L = 2 it is Bradley-Terry.
    """
    scores = r[rankings]  # (N, L)
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()


def to_arms(i, j, x, K):
    """sum over pairs of x (e_i - e_j): (E,) -> (K,), the gradient of a loss of margins."""
    return torch.zeros(K, dtype=x.dtype).index_add_(0, i, x).index_add_(0, j, -x)


def pairs_of(i, j, mu, count, K):
    """The sufficient statistics of votes with i < j: i, j, number of votes and wins of i (ties half) of each
    pair that met, (E,) each; and the pair of each vote (N,).
    """
    key, pair = torch.unique(i * K + j, return_inverse=True)
    return key // K, key % K, torch.bincount(pair, count), torch.bincount(pair, count * mu), pair


def no_optimum(i, j, votes, wins, names) -> str:
    """Why these pairs have no finite optimum, or "". They have one if and only if every arm leads to every
    other by a chain of wins (Ford 1957): the comparisons' graph is strongly connected.
    """
    def reached(*edges):  # from arm 0, along edges from winners to losers or back
        seen = torch.arange(len(names)) == 0
        while True:
            more = seen.clone()
            for a, b in edges:
                more[b[seen[a]]] = True
            if torch.equal(more, seen):
                return seen
            seen = more

    won, lost = wins > 0, wins < votes
    down = torch.cat([i[won], j[lost]]), torch.cat([j[won], i[lost]])  # winner, loser
    listed = lambda arms: ", ".join(names[k] for k in arms.nonzero()[:5, 0]) + ", ..." * (int(arms.sum()) > 5)
    smaller = lambda arms: arms if 2 * arms.sum() <= len(arms) else ~arms
    if not (met := reached(down, down[::-1])).all():
        return f"in pieces: {listed(smaller(met))} never met the others"
    below, above = reached(down), reached(down[::-1])
    best = ~below if not below.all() else above  # a set that never loses to the rest
    if best.all():
        return ""
    few = smaller(best)
    return f"{listed(few)} never {'loses to' if few is best else 'wins against'} the others"


def solver(i, j, weight, K, l2):
    """b -> H^-1 b for b (K,) that sums to 0; H = l2 + sum over pairs of weight (e_i - e_j) (e_i - e_j)^T."""
    if K <= DENSE:
        factor = torch.linalg.cholesky(information(i, j, weight, K, l2))
        return lambda b: torch.cholesky_solve(b[:, None], factor)[:, 0]
    diagonal = torch.zeros(K, dtype=weight.dtype).index_add_(0, i, weight).index_add_(0, j, weight)
    ridge = l2 + 1e-12 * diagonal.mean()  # as in `information`, for what nothing ties to the rest
    diagonal = diagonal + ridge

    def conjugate_gradients(b):
        x, direction, residual, rho = torch.zeros_like(b), torch.zeros_like(b), b - b.mean(), math.inf
        for _ in range(10 * K):
            z = residual / diagonal
            rho, before = residual @ z, rho
            if rho <= 1e-20 * (b @ (b / diagonal)):
                break
            direction = z + rho / before * direction  # z at first
            H_direction = to_arms(i, j, weight * (direction[i] - direction[j]), K) + ridge * direction
            step = rho / (direction @ H_direction)
            x, residual = x + step * direction, residual - step * H_direction
        return x - x.mean()

    return conjugate_gradients


def information(i, j, weight, K, l2):
    """That H, dense (K, K); its null direction, the same for all arms, gets the mean of the diagonal."""
    H = torch.zeros(K, K, dtype=weight.dtype)
    H[i, j], H[j, i] = -weight, -weight
    mean = H.diagonal().copy_(l2 - H.sum(1)).mean()
    H.diagonal().add_(1e-12 * mean)  # for an arm without votes in a bootstrap's draw
    return H + mean / K


def fit(i, j, votes, wins, K, l2=0.0, start=None, solve=None, tolerance=1e-14):
    """Maximum likelihood: Newton's method on the pairs (E,) of `pairs_of`, to rewards that sum to 0: (K,).

    Each step H^-1 g is shortened to log(1 + d) / d of itself, d the largest change of a margin, so that it
    descends from anywhere (arXiv:1703.04599); H stays (solve) while it divides the gradient by 4 a step.
    Ends where the norm of the mean loss's gradient is below tolerance. Raises ArithmeticError if it ends
    above that and above 1e-9.
    """
    total, before = votes.sum(), math.inf
    if start is None:  # every arm's odds against the others
        won, lost = (torch.bincount(i, x, K) + torch.bincount(j, votes - x, K) for x in (wins, votes - wins))
        start = torch.log((won + 0.5) / (lost + 0.5))
    r = start - start.mean()
    for _ in range(100):
        p = torch.sigmoid(r[i] - r[j])
        gradient = to_arms(i, j, wins - votes * p, K) - l2 * r  # of the log-likelihood
        size = gradient.norm() / total
        if size < tolerance:
            break
        if solve is None or size > before / 4:
            solve = solver(i, j, votes * p * (1 - p), K, l2)
        step, before = solve(gradient), size
        d = (step[i] - step[j]).abs().max().clamp(min=1e-300)
        r = r + step * torch.log1p(d) / d
    if not size < max(tolerance, 1e-9):
        raise ArithmeticError(f"the gradient's norm is still {size:.2g}")
    return r - r.mean()


def standard_errors(r, i, j, votes, l2=0.0):
    """Square roots of the diagonal of the inverse Fisher information, for rewards that sum to 0: (K,)."""
    p, K = torch.sigmoid(r[i] - r[j]), len(r)
    H = information(i, j, votes * p * (1 - p), K, l2)
    along = (H.sum() / K).reciprocal() / K  # what the null direction has in the inverse
    return (torch.cholesky_inverse(torch.linalg.cholesky(H)).diagonal() - along).sqrt()


def bootstrap(r, i, j, votes, mu, count, pair, l2, replicates, seed):
    """The fits to sets of votes drawn from these with replacement: (replicates, K)."""
    K, generator, p = len(r), torch.Generator().manual_seed(seed), torch.sigmoid(r[i] - r[j])
    solve, result = solver(i, j, votes * p * (1 - p), K, l2), torch.empty(replicates, K, dtype=torch.float64)
    rows, total = torch.arange(len(mu)).repeat_interleave(count.long()), int(count.sum())
    for k in range(replicates):
        drawn = rows[torch.randint(total, (total,), generator=generator)]
        drawn = torch.bincount(drawn, minlength=len(mu)).double()  # how often each row is drawn
        again = (torch.bincount(pair, weight, len(i)) for weight in (drawn, drawn * mu))
        result[k] = fit(i, j, *again, K, l2, r, solve, 1e-8)
    return result


# ---- Winners ----


def winners(P):
    """{rule: its winners} from P(i beats j), (K, K): Condorcet's beats or ties every other arm, Copeland's
    beats the most, Borda's has the largest sum. Under Bradley-Terry each is the arm of the largest reward.
    """
    off = ~torch.eye(len(P), dtype=torch.bool)
    copeland, borda = ((P > 0.5) & off).sum(1), torch.where(off, P, 0.0).sum(1)
    best = {"Condorcet": ((P >= 0.5) | ~off).all(1), "Copeland": copeland == copeland.max(),
            "Borda": borda >= borda.max() - 1e-12}
    return {rule: won.nonzero()[:, 0].tolist() for rule, won in best.items()}


# ---- Trajectories, and ratings ----

# a world of three steps, s -> x -> y -> z with x, y, z in {0, 1}, and a reward on each of its ten edges
EDGES = [(0, "s", x) for x in "01"] + [(t, x, y) for t in (1, 2) for x in "01" for y in "01"]
PATHS = [f"s{x}{y}{z}" for x in "01" for y in "01" for z in "01"]
VISITS = torch.tensor([[path[t : t + 2] == x + y for t, x, y in EDGES] for path in PATHS]).double()  # (8, 10)
BLIND = {  # changes of the edges' rewards that no comparison of two paths shows
    **{f"+c on every edge of step {t + 1}": [float(step == t) for step, *_ in EDGES] for t in range(3)},
    **{f"+c on the edges into {x} at step {t + 1}, -c on those out of it":
       [float((step, b) == (t, x)) - float((step, a) == (t + 1, x)) for step, a, b in EDGES]
       for t in (0, 1) for x in "01"}}


def fit_trajectories(features, mu):
    """Rewards w (D,) of steps from P(path 1 beats path 2) = sigma((phi_1 - phi_2) w): logistic regression on
    the differences of visits, features (N, D). Newton with a pseudo-inverse gives the shortest optimum.
    """
    w = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(features @ w)
        H = features.T @ (features * (p * (1 - p))[:, None])
        step = torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ (features.T @ (mu - p))
        d = (features @ step).abs().max().clamp(min=1e-300)
        w = w + step * torch.log1p(d) / d
    return w


def greedy(w):
    """The best next state in each state of that world, by backward induction: {(step, state): next state}."""
    value, policy = {"0": 0.0, "1": 0.0}, {}
    for t in (2, 1, 0):
        q = {(x, y): float(reward) + value[y] for (step, x, y), reward in zip(EDGES, w) if step == t}
        policy |= {(t, x): max("01", key=lambda y: q[x, y]) for x, _ in q}
        value = {x: q[x, policy[t, x]] for x, _ in q}
    return policy


def order_recovered(r, labels, spread, generator, raters=20):
    """Share of pairs (K arms) in the right order: from `labels` ratings, and from as many comparisons.

    Both come from what a rater perceives, the reward plus Gumbel noise (so comparisons are Bradley-Terry).
    Ratings also pass through a rater's own scale and offset, exp(spread z) and spread z'.
    """
    K = len(r)
    gumbel = lambda: -torch.rand(labels, generator=generator).double().log().neg().log()
    arm, other, rater = (torch.randint(n, (labels,), generator=generator) for n in (K, K - 1, raters))
    scale, offset = (spread * torch.randn(2, raters, generator=generator)).double()
    ratings = scale.exp()[rater] * (r[arm] + gumbel()) + offset[rater]
    rated = torch.bincount(arm, ratings, K) / torch.bincount(arm, minlength=K).clamp(min=1)
    other = (arm + 1 + other) % K
    won = (r[arm] + gumbel() > r[other] + gumbel()) == (arm < other)  # by the arm of the smaller number
    low, high, ones = torch.minimum(arm, other), torch.maximum(arm, other), torch.ones(labels).double()
    compared = fit(*pairs_of(low, high, won.double(), ones, K)[:4], K, l2=0.1)
    a, b = torch.triu_indices(K, K, 1)
    return [((((x[a] - x[b]) * (r[a] - r[b])).sign() + 1) / 2).mean().item() for x in (rated, compared)]


# ---- Policies from rewards ----


def optimum(r, log_ref, beta):
    """log pi*, pi* = pi_ref exp(r / beta) / Z: Eq. 4 of arXiv:2305.18290, (..., K)."""
    return torch.log_softmax(log_ref + r / beta, -1)


def forward_kl_optimum(r, log_ref, beta):
    """log pi, pi = beta pi_ref / (lambda - r), where E[r] - beta KL(pi_ref || pi) is maximal: (..., K). Here
    GRPO as published stands still, since k3 in the loss has that KL's gradient. lambda by bisection.
    """
    mass = beta * log_ref.exp()
    low, high = (r + mass).amax(-1, keepdim=True), r.amax(-1, keepdim=True) + beta
    for _ in range(100):
        middle = (low + high) / 2
        above = (mass / (middle - r)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.log_softmax(log_ref - (high - r).log(), -1)


def kl(logp, logq):
    """KL(p || q) = sum p (log p - log q), nats."""
    return (logp.exp() * (logp - logq)).sum().item()


def objective(logp, r, log_ref, beta):
    """J = E_pi[r] - beta KL(pi || pi_ref), in units of the reward."""
    return (logp.exp() * (r - beta * (logp - log_ref))).sum()


def policy_loss(logp, old, r, log_ref, beta, kl_in="reward", clip_coef=math.inf, divide=False):
    """-E_old[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / old: Eq. 7 of arXiv:1707.06347, exact.

    REINFORCE without the clip: at pi = old its gradient is -E[A grad log pi], the log-derivative trick. A is
    the reward less its mean, with kl_in "reward" of r - beta log(pi / pi_ref); with "loss" beta k3 is added
    to the loss instead, and with divide A is in standard deviations: GRPO, Eqs. 1 to 3 of arXiv:2501.12948.
    """
    p, ratio = old.exp(), (logp - old).exp()
    reward = r - beta * (old - log_ref) if kl_in == "reward" else r
    A = reward - (p * reward).sum()
    A = A / (p * A.square()).sum().sqrt().clamp(min=1e-12) if divide else A
    loss = -(p * torch.min(ratio * A, ratio.clamp(1 - clip_coef, 1 + clip_coef) * A)).sum()
    return loss if kl_in == "reward" else loss + beta * (p * kl_estimate(logp, log_ref, "k3")).sum()


def train_policy(loss, log_ref, epochs, args):
    """log pi after Adam on loss(log pi, log pi_old) from pi_ref; pi_old is renewed every `epochs` steps."""
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], args.learning_rate, (0.9, 0.95), 1e-16)  # for rare arms
    for step in range(args.num_steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.num_steps) ** 2
        logp = torch.log_softmax(logits, 0)
        if step % epochs == 0:
            old = logp.detach()
        optimizer.zero_grad()
        loss(logp, old).backward()
        optimizer.step()
    return torch.log_softmax(logits.detach(), 0)


def minimize(loss, x):
    """The argument of a convex loss's minimum, by L-BFGS from x on."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0.0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def dpo(r, log_ref, beta, i, j):
    """log pi of DPO, Eq. 7 of arXiv:2305.18290, from the preferences mu = sigma(r_i - r_j) of pairs (E,) that
    connect all arms: the minimum of bt_loss with the implicit reward beta log(pi / pi_ref).
    """
    mu, ones = torch.sigmoid(r[i] - r[j]), torch.ones(len(i)).double()
    loss = lambda x: bt_loss(beta * (torch.log_softmax(x, 0) - log_ref), i, j, mu, ones)
    return torch.log_softmax(minimize(loss, log_ref), 0)


def train_all(r, log_ref, i, j, args):
    """{method: (log pi reached, log pi predicted)}."""
    beta, best = args.beta, optimum(r, log_ref, args.beta)
    train = lambda epochs=1, **options: train_policy(
        lambda logp, old: policy_loss(logp, old, r, log_ref, beta, **options), log_ref, epochs, args)
    std = torch.tensor(1.0)
    for _ in range(100):  # the std of the rewards under the stationary point that depends on it
        p = forward_kl_optimum(r, log_ref, beta * std).exp()
        std = (p * (r - (p * r).sum()).square()).sum().sqrt().clamp(min=1e-12)
    return {
        "REINFORCE": (train(), best),
        "PPO, 4 epochs, clip 0.2": (train(4, clip_coef=0.2), best),
        "DPO": (dpo(r, log_ref, beta, i, j), best),
        "GRPO, k1 in the reward": (train(4, clip_coef=0.2, divide=True), best),
        "GRPO, k3 in the loss": (train(4, clip_coef=0.2, kl_in="loss"), forward_kl_optimum(r, log_ref, beta)),
        "GRPO, k3, A / std": (train(4, clip_coef=0.2, kl_in="loss", divide=True),
                              forward_kl_optimum(r, log_ref, beta * std))}


# ---- Votes ----


def known_world(args):
    """(names, votes, rewards): two voters judge each comparison by Bradley-Terry; where they disagree it is a
    tie, mu = 0.5. So E[mu] = sigma(r_i - r_j) exactly.
    """
    generator, K, N = torch.Generator().manual_seed(args.seed), args.num_arms, args.num_votes
    r = torch.randn(K, generator=generator).double()
    a, b = (torch.randint(n, (N,), generator=generator) for n in (K, K - 1))
    b = (a + 1 + b) % K
    i, j = torch.minimum(a, b), torch.maximum(a, b)
    mu = (torch.rand(N, 2, generator=generator) < torch.sigmoid(r[i] - r[j])[:, None]).double().mean(1)
    return [f"arm {k + 1}" for k in range(K)], (i, j, mu, torch.ones(N).double()), r


def load_votes(path):
    """(names, (i, j, mu, count), None), i < j, of rows with item_a and item_b, or model_a and model_b, and
    with outcome or winner (a, b, model_a, model_b, an arm's name, tie...), or mu from 1 (a wins) to 0, or
    numbers of votes wins_a, wins_b and ties. Without these, a column count is the number of votes of a row.
    """
    arms, votes = {}, []
    for row in read_rows(path):
        where, sides = row["_where"], [row.get(f"item_{s}", row.get(f"model_{s}")) for s in "ab"]
        if not all(isinstance(side, (str, int)) for side in sides):
            fail(f"{where}: needs item_a, item_b or model_a, model_b; has {sorted(set(row) - {'_where'})}")
        a, b = (arms.setdefault(str(side), len(arms)) for side in sides)
        if a == b:
            fail(f"{where}: {sides[0]!r} against itself")
        outcome, count = str(row.get("outcome", row.get("winner"))), row.get("count", 1)
        named = {str(sides[0]): 1, str(sides[1]): 0}
        known = {"a": 1, "model_a": 1, "b": 0, "model_b": 0} | named
        if outcome in ("a", "b") and known[outcome] != (outcome == "a"):
            fail(f"{where}: outcome {outcome!r} is the letter of one side and the name of the other")
        if "wins_a" in row:
            cells = [(1, row["wins_a"]), (0, row.get("wins_b")), (0.5, row.get("ties", 0))]
        elif "mu" in row or outcome in known or outcome.startswith("tie"):
            cells = [(row.get("mu", known.get(outcome, 0.5)), count)]
        else:
            fail(f"{where}: outcome {outcome!r}: expected a, b, tie, or one of the arms {sides}")
        for mu, count in cells:
            if type(mu) not in (int, float) or not 0 <= mu <= 1:
                fail(f"{where}: mu is {mu!r}; expected 1 (the first wins) to 0, with 0.5 a tie")
            if type(count) is not int or count < 0:
                fail(f"{where}: {count!r} votes; expected a whole number")
            votes += [(a, b, mu, count) if a < b else (b, a, 1 - mu, count)] * (count > 0)
    if not votes:
        fail(f"{path}: no votes")
    i, j, mu, count = (torch.tensor(x, dtype=torch.float64) for x in zip(*votes))
    return list(arms), (i.long(), j.long(), mu, count), None


def known_answers(r, true, log_ref, args):
    """Where rewards are known: the fit's error, rankings, paths and ratings, printed and as metrics."""
    generator, K = torch.Generator().manual_seed(args.seed + 2), len(true)
    rmse = lambda x: (x - x.mean() - true + true.mean()).square().mean().sqrt().item()
    regret = args.beta * kl(optimum(r, log_ref, args.beta), optimum(true, log_ref, args.beta))
    print(f"\nroot mean square error of the rewards {rmse(r):.3f}; by the true ones their optimal policy is "
          f"{regret:.4f} below the optimum")

    four = torch.rand(1000, K, generator=generator).argsort(1)[:, :4]
    noisy = true[four] - torch.rand(four.shape, generator=generator).double().log().neg().log()
    rankings = four.gather(1, noisy.argsort(1, descending=True))
    ranked = minimize(lambda x: ranking_loss(x, rankings), torch.zeros(K).double())
    print(f"from 1000 rankings of {four.shape[1]} (Plackett-Luce): {rmse(ranked):.3f}")

    w = torch.randn(len(EDGES), generator=generator).double()
    one, two = torch.randint(8, (2, 2000), generator=generator)
    features = VISITS[one] - VISITS[two]
    won = torch.rand(2000, generator=generator) < torch.sigmoid(features @ w)
    fitted = fit_trajectories(features, won.double())
    same, rank = greedy(fitted) == greedy(w), int(torch.linalg.matrix_rank(features))
    print("rewards of steps, from 2000 comparisons of paths: the greedy policy is the best in every state: "
          f"{same}\n{rank} of {len(EDGES)} directions show; the others do not, which for any c are made of")
    print("\n".join(f"  {name}" for name in BLIND))
    metrics = {"rmse": rmse(r), "regret": regret, "rmse_rankings": rmse(ranked), "greedy_is_best": same}
    print("share of pairs in the right order, mean of 50 draws: from ratings, and from as many comparisons")
    for labels, spread in itertools.product((100, 400), (0.0, 0.5, 1.0)):
        draws = [order_recovered(true, labels, spread, generator) for _ in range(50)]
        rated, compared = torch.tensor(draws).mean(0).tolist()
        metrics[f"order_recovered/{labels} labels, spread {spread}"] = {"rated": rated, "compared": compared}
        print(f"  {labels} labels, raters' scales spread by {spread}: {rated:.3f} and {compared:.3f}")
    return metrics


def draw_picture(file, board, r, log_ref, policies, beta):
    """Rewards with their intervals, and the exact frontier of reward against KL with each method's point."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: it needs `pip install matplotlib`")
    plt.rcParams["text.parse_math"] = False  # a name may hold a $
    size = (11, max(4.5, 1.5 + 0.16 * len(board)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    reward, low, high = (torch.tensor([row[key] for row in board]) for key in ("reward", "low", "high"))
    bars = torch.stack([reward - low, high - reward]).clamp(min=0)  # a reward may lie outside its interval
    left.errorbar(reward.tolist(), [row["arm"] for row in board], xerr=bars.tolist(), fmt="o", markersize=3)
    left.set(xlabel="reward, 95 % intervals of the bootstrap", title="leaderboard", ylim=(len(board), -1))
    points = [(kl(p, log_ref), float(p.exp() @ r)) for p in (
        optimum(r, log_ref, b) for b in torch.logspace(-1.5, 1.5, 100) * beta)]
    right.plot(*zip(*points), "k-", label="pi* at every beta")
    for (name, (logp, _)), marker in zip(policies.items(), "os^vDX"):
        right.plot(kl(logp, log_ref), float(logp.exp() @ r), marker, fillstyle="none", label=name)
    right.set(xlabel="KL(pi || pi_ref), nats", ylabel="E[r]", title=f"policies at beta {beta:g}")
    right.legend()
    figure.savefig(file, dpi=120)


def main(args: Args) -> dict:
    # 1. flags, votes
    start = time.time()
    torch.set_num_threads(1)  # on matrices this small, threads wait longer than they work
    for name, value in asdict(args).items():
        least = {"num_arms": 2, "seed": 0, "l2": 0}.get(name, 1e-300)
        if type(value) in (int, float) and not least <= value < 1e18:
            fail(f"--{name.replace('_', '-')} is {value}: out of range")
    run = Path(args.output_dir)
    if (run / "leaderboard.json").exists():
        fail(f"--output-dir {run} holds a finished run: choose another folder, or remove it")
    names, votes, true = load_votes(args.dataset) if args.dataset else known_world(args)
    (i, j, mu, count), K = votes, len(names)
    if count.sum() > 1e8:
        fail(f"{args.dataset}: {count.sum():.0f} votes; the bootstrap takes up to 1e8")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output-dir {run}: {error}")

    # 2. rewards with their errors
    *pairs, pair = pairs_of(*votes, K)
    if args.l2 == 0 and (reason := no_optimum(*pairs, names)):
        fail(f"{args.dataset or 'the votes drawn'}: no finite optimum: {reason}. --l2 0.1 makes one")
    r = fit(*pairs, K, args.l2)
    resampled = bootstrap(r, *pairs[:3], mu, count, pair, args.l2, args.num_bootstrap, args.seed + 3)
    errors = standard_errors(r, *pairs[:3], args.l2) if K <= DENSE else resampled.std(0)  # no inverse there
    ranks = resampled.argsort(1, descending=True).argsort(1) + 1.0
    (low, high), (best, worst) = (x.double().quantile(INTERVAL, dim=0).tolist() for x in (resampled, ranks))
    met = torch.bincount(pairs[0], pairs[2], K) + torch.bincount(pairs[1], pairs[2], K)
    board = [{"rank": rank, "arm": names[k], "reward": r[k].item(), "se": errors[k].item(), "low": low[k],
              "high": high[k], "best_rank": int(best[k]), "worst_rank": math.ceil(worst[k]),
              "votes": int(met[k])}
             for rank, k in enumerate(r.argsort(descending=True).tolist(), 1)]
    print(f"rank  {'arm':28}  reward      se  95 % interval      ranks     votes")
    for row in board[:30]:
        print("{rank:4}  {arm:28.28}  {reward:6.3f}  {se:6.3f}  {low:6.3f} to {high:6.3f}  {best_rank:3} to "
              "{worst_rank:<4} {votes:6}".format(**row))
    if K > 30:
        print(f"      and {K - 30} more in {run / 'leaderboard.csv'}")

    # 3. what votes tell, and what they cannot tell
    margin, losses = r[i] - r[j], [bt_loss(x, *votes).item() for x in (r, 0 * r, r + 7, 2 * r)]
    right = torch.where(margin > 0, mu, torch.where(margin < 0, 1 - mu, 0.5))  # ties count half
    metrics = {"loss": losses[0], "accuracy": ((count * right).sum() / count.sum()).item()}
    print("\n{:.0f} votes: accuracy {:.3f}, loss {:.4f}; of equal rewards {:.4f} = log 2; shifted, r + 7, "
          "{:.4f}, the same; scaled, 2 r, {:.4f}: another model".format(
              count.sum(), metrics["accuracy"], *losses))
    cases = [("Bradley-Terry", torch.sigmoid(r[:, None] - r), names)] if K <= DENSE else []  # K x K numbers
    for title, matrix, arms in [*cases, ("a cyclic example", CYCLE, "ABCD")]:
        found = {rule: ", ".join(arms[k] for k in won) or "none" for rule, won in winners(matrix).items()}
        print(f"winners, {title}: " + "; ".join(f"{rule} {won}" for rule, won in found.items()))

    # 4. policies on these rewards, and how far below the optimum they are: by value, and by divergence
    log_ref = torch.randn(K, generator=torch.Generator().manual_seed(args.seed + 1)).double()
    log_ref = torch.log_softmax(log_ref * (not args.dataset), 0)
    top, policies = optimum(r, log_ref, args.beta), train_all(r, log_ref, *pairs[:2], args)
    value = partial(objective, r=r, log_ref=log_ref, beta=args.beta)
    print(f"\npolicies on these rewards, beta {args.beta:g}; the optimum has J = {value(top):.4f}\n{'':26}"
          "E[r]  KL(pi_ref)      J* - J beta KL(.|pi*)  predicted  max |dlog pi| to prediction")
    for name, (logp, goal) in {"pi_ref": (log_ref, log_ref), **policies, "pi*": (top, top)}.items():
        row = {"expected_reward": (logp.exp() @ r).item(), "kl": kl(logp, log_ref),
               "regret": (value(top) - value(logp)).item(),  # the same as the next, by another way
               "distance_to_optimal": args.beta * kl(logp, top), "predicted": args.beta * kl(goal, top),
               "error": (logp - goal).abs().max().item()}
        metrics |= {f"{name}/{key}": x for key, x in row.items()}
        print("{:24}{:6.3f}{:12.3f}{:12.2e}{:14.2e}{:12.2e}{:12.1e}".format(name, *row.values()))
    if true is not None:
        metrics |= known_answers(r, true, log_ref, args)

    # 5. files
    draw_picture(run / "leaderboard.png", board, r, log_ref, policies, args.beta)
    with open(run / "leaderboard.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, board[0])
        writer.writeheader()
        writer.writerows(board)
    record = {**asdict(args), "torch": torch.__version__, "seconds": round(time.time() - start, 1)}
    for name, content in (("args", record), ("metrics", metrics), ("leaderboard", board)):
        (run / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"leaderboard and metrics are in {run}; {time.time() - start:.1f} s")
    return metrics


if __name__ == "__main__":
    main(tyro.cli(Args))
