"""Bradley-Terry on K arms: preferences in, rewards out, and every policy at its exact distance from the best.

    P(i beats j) = exp(r_i) / (exp(r_i) + exp(r_j)) = sigma(r_i - r_j)         Bradley and Terry (1952)
    loss(r)      = -mean of mu log P(i beats j) + (1 - mu) log P(j beats i),   mu = 1, 0, or 0.5 for a tie
    J(pi)        = E_pi[r] - beta KL(pi || pi_ref), maximal at pi* = pi_ref exp(r / beta) / Z
    J(pi*) - J(pi) = beta KL(pi || pi*), in units of the reward: Eqs. 3, 4 and App. A.1 of arXiv:2305.18290

Arms are the answers to one prompt, or the models of an arena. What the other scripts estimate from samples is
enumerated here in float64. More: benchmarks/bandit_lessons.py. What is done differently, and why:
1. Newton's method works on the pairs that met, not on votes: each pair's two numbers determine the loss.
2. Where no finite optimum exists (an arm never loses, arms never met) it says so; --l2 makes one. A draw of
   the bootstrap without one counts as infinite, so that an interval may have no bound: `at_its_limit`.
3. A tie is half a win for each side. Fisher's standard errors are too wide then; the bootstrap's are not.
One CPU core, known rewards, 5 s:   python bandit_bt.py
The votes of an arena:              python bandit_bt.py --dataset battles.jsonl --output-dir runs/arena
"""

import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from common import blame, fail, kl_estimate, read_rows

DENSE = 4000  # up to so many arms the K x K matrix is factorized; above, conjugate gradients on the pairs
INTERVAL = torch.tensor([0.025, 0.975], dtype=torch.float64)  # 95 % of the bootstrap's fits
FAR = 1e9  # what an infinite reward of the bootstrap is shifted by: their order stays


@dataclass
class Args:
    # run
    output_dir: str = "runs/bandit"  # folder for leaderboard.json and .csv, metrics.json, args.json
    seed: int = 1  # of everything that is drawn: known rewards, votes, pi_ref and the bootstrap
    # data
    dataset: str = ""  # file or Hub id of votes (columns: see load_votes); empty: drawn from known rewards
    num_arms: int = 8  # K, the number of known rewards
    num_votes: int = 4000  # votes drawn from the known rewards, ties among them
    # optimization
    l2: float = 0.0  # Gaussian prior: adds l2 / 2 sum r^2 to the sum of losses; 0 is maximum likelihood
    num_bootstrap: int = 500  # resampled sets of votes behind the intervals
    # policies
    beta: float = 0.5  # KL penalty, in units of the reward per nat
    learning_rate: float = 0.05  # highest rate of Adam, which trains all policies but DPO's
    num_steps: int = 2000  # steps of Adam for each policy


# ---- Rewards from votes: K arms, N votes, E pairs that met ----


def bt_loss(r, i, j, mu, count):
    """-mean of mu log sigma(r_i - r_j) + (1 - mu) log sigma(r_j - r_i), nats, of rewards r (K,) and of arms
    i, j, mu in [0, 1] and count, the number of such votes: (N,) each. The same for r + c, but not for 2 r.
    """
    margin = r[i] - r[j]
    losses = -mu * F.logsigmoid(margin) - (1 - mu) * F.logsigmoid(-margin)
    return (count * losses).sum() / count.sum()


def pairs_of(i, j, mu, count, K):
    """(i, j, votes, wins of i, ties half) of the pairs that met, (E,) each; and each vote's pair, (N,)."""
    key, pair = torch.unique(i * K + j, return_inverse=True)
    votes = torch.bincount(pair, count)
    wins = torch.bincount(pair, count * mu)
    return key // K, key % K, votes, wins, pair


def reached(arm, i, j, forth, back, K):
    """(K,) of bool: where a walk from this arm can be, i to j in pairs `forth`, j to i in pairs `back`."""
    seen, size = torch.arange(K) == arm, 0
    while size < seen.sum() < K:
        size = seen.sum()
        seen[j[seen[i] & forth]] = True
        seen[i[seen[j] & back]] = True
    return seen


def no_optimum(i, j, votes, wins, names) -> str:
    """Why these pairs have no finite optimum, or "": each arm has to lead to each by wins (Ford 1957)."""
    K, won, lost = len(names), wins > 0, wins < votes
    met = reached(0, i, j, votes > 0, votes > 0, K)
    below = reached(0, i, j, won, lost, K)
    above = reached(0, i, j, lost, won, K)
    for group, problem, problem_of_rest in (
        (met, "in pieces: {} never met the others", "in pieces: {} never met the others"),
        (~below, "{} never loses to the others", "{} never wins against the others"),
        (above, "{} never loses to the others", "{} never wins against the others"),
    ):
        if 0 < group.sum() < K:
            if 2 * group.sum() > K:
                group, problem = ~group, problem_of_rest
            listed = [names[k] for k in group.nonzero()[:5, 0]]
            if group.sum() > 5:
                listed.append("...")
            return problem.format(", ".join(listed))
    return ""


def solver(r, i, j, votes, l2):
    """b -> H^-1 b for columns b of sum 0; the Fisher information H has votes p (1 - p) of pairs, and l2."""
    K, p = len(r), torch.sigmoid(r[i] - r[j])
    weight = votes * p * (1 - p)
    if K <= DENSE:
        H = torch.zeros(K, K).double()
        H[i, j] = -weight
        H[j, i] = -weight
        H.diagonal().copy_(l2 - H.sum(1))
        mean = H.diagonal().mean()
        H.diagonal().add_(1e-12 * mean)  # for an arm without votes in a bootstrap's draw
        factor = torch.linalg.cholesky(H + mean / K)  # and the mean for the null direction, equal rewards
        return lambda b: torch.cholesky_solve(b.view(K, -1), factor).view_as(b)
    diagonal = torch.bincount(i, weight, K) + torch.bincount(j, weight, K)
    ridge = l2 + 1e-12 * diagonal.mean()
    diagonal += ridge

    def conjugate_gradients(b):
        x = direction = torch.zeros_like(b)
        residual, rho = b - b.mean(), math.inf
        for _ in range(10 * K):
            z = residual / diagonal
            before, rho = rho, residual @ z
            if rho <= 1e-20 * (b @ (b / diagonal)):
                break
            direction = z + rho / before * direction  # z at first
            flow = weight * (direction[i] - direction[j])
            H_direction = torch.bincount(i, flow, K) - torch.bincount(j, flow, K) + ridge * direction
            step = rho / (direction @ H_direction)
            x = x + step * direction
            residual = residual - step * H_direction
        return x - x.mean()

    return conjugate_gradients


def fit(i, j, votes, wins, K, l2=0.0, start=None, solve=None, tolerance=1e-14):
    """Maximum likelihood: Newton's method on the pairs (E,) of `pairs_of`, to rewards that sum to 0: (K,).
    Each step H^-1 g is shortened to log(1 + d) / d of itself, d the largest change of a margin, so that it
    descends from anywhere (arXiv:1703.04599); H stays (solve) while it divides the gradient by 4 in a step.
    Ends where the norm of the mean loss's gradient is below tolerance; ArithmeticError where not below 1e-9.
    """
    if start is None:  # every arm's log odds against all others
        won = torch.bincount(i, wins, K) + torch.bincount(j, votes - wins, K)
        lost = torch.bincount(i, votes - wins, K) + torch.bincount(j, wins, K)
        start = torch.log((won + 0.5) / (lost + 0.5))
    r = start - start.mean()
    before = math.inf
    for _ in range(100):
        p = torch.sigmoid(r[i] - r[j])
        missing = wins - votes * p  # wins of i that the rewards do not explain
        gradient = torch.bincount(i, missing, K) - torch.bincount(j, missing, K) - l2 * r
        size = gradient.norm() / votes.sum()
        if size < tolerance:
            break
        if solve is None or size > before / 4:
            solve = solver(r, i, j, votes, l2)
        step = solve(gradient)
        d = (step[i] - step[j]).abs().max().clamp(min=1e-300)
        r = r + step * torch.log1p(d) / d
        before = size
    if not size < max(tolerance, 1e-9):
        raise ArithmeticError(f"the gradient's norm is still {size:.2g}")
    return r - r.mean()


def standard_errors(r, i, j, votes, l2=0.0):
    """Square roots of the diagonal of the inverse Fisher information, for rewards that sum to 0: (K,)."""
    centre = torch.eye(len(r)).double() - 1 / len(r)
    return solver(r, i, j, votes, l2)(centre).diagonal().sqrt()


def at_its_limit(found, r, i, j, votes, wins):
    """The fit `found` to a draw of the votes behind r, as the limit that Newton's method approaches: (K,).
    Measured from most arms, not from the mean, which an infinite one would drag along: arms that lead to more
    than half of all by chains of wins, and are led to by more than half, lead to each other, with finite
    differences, and keep their mean in r. The first alone: +FAR, the second: -FAR, neither: nan, unknown.
    """
    K, won, lost = len(r), wins > 0, wins < votes
    up, down = torch.zeros(2, K).bool()
    for arm in range(K):
        if not (up | down)[arm]:
            below = reached(arm, i, j, won, lost, K)
            above = reached(arm, i, j, lost, won, K)
            up |= above & (2 * below.sum() > K)
            down |= below & (2 * above.sum() > K)
    middle = up & down
    shift = (r - found)[middle].mean().nan_to_num()
    sign = up.int() - down.int()
    limit = found + shift + FAR * sign
    return limit.where(up | down, math.nan)


def bootstrap(r, i, j, votes, mu, count, pair, l2, replicates, seed):
    """The fits to sets of votes drawn from these with replacement, at their limits: (replicates, K)."""
    solve = solver(r, i, j, votes, l2)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(mu)).repeat_interleave(count.long())  # the row of each single vote
    fits = []
    for _ in range(replicates):
        drawn = rows[torch.randint(len(rows), rows.shape, generator=generator)]
        times = torch.bincount(drawn, minlength=len(mu))  # how often each row is drawn
        votes = torch.bincount(pair, times, len(i))
        wins = torch.bincount(pair, times * mu, len(i))
        found = fit(i, j, votes, wins, len(r), l2, r, solve, 1e-8)
        fits.append(found if l2 else at_its_limit(found, r, i, j, votes, wins))
    return torch.stack(fits)


# ---- Policies from rewards: log pi (K,) ----


def optimum(r, log_ref, beta):
    """log pi*, pi* = pi_ref exp(r / beta) / Z: Eq. 4 of arXiv:2305.18290, (..., K)."""
    return torch.log_softmax(log_ref + r / beta, -1)


def forward_kl_optimum(r, log_ref, beta):
    """log pi, pi = beta pi_ref / (lambda - r), where E[r] - beta KL(pi_ref || pi) is maximal: (..., K). Here
    GRPO as published stands still, since k3 in the loss has that KL's gradient. Newton's method from below.
    """
    mass = beta * log_ref.exp()
    behind = r.amax(-1, keepdim=True) - r
    x = (mass - behind).amax(-1, keepdim=True)  # lambda less the largest reward
    for _ in range(100):
        pi = mass / (x + behind)
        slope = (pi / (x + behind)).sum(-1, keepdim=True)
        x = x + (pi.sum(-1, keepdim=True) - 1) / slope
    return torch.log_softmax(log_ref - (x + behind).log(), -1)


def kl(logp, logq):
    """KL(p || q) = sum p (log p - log q), nats."""
    return (logp.exp() * (logp - logq)).sum().item()


def objective(logp, r, log_ref, beta):
    """J = E_pi[r] - beta KL(pi || pi_ref), in units of the reward."""
    return (logp.exp() * (r - beta * (logp - log_ref))).sum()


def advantages(reward, p):
    """(rewards less their mean under p (K,), their standard deviation, at least 1e-12)."""
    A = reward - (p * reward).sum()
    return A, (p * A.square()).sum().sqrt().clamp(min=1e-12)


def policy_loss(logp, old, r, log_ref, beta, kl_in="reward", clip_coef=math.inf, divide=False):
    """-E_old[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / old: Eq. 7 of arXiv:1707.06347, exact.
    REINFORCE without the clip: at pi = old its gradient is -E[A grad log pi], the log-derivative trick. A is
    the reward less its mean, with kl_in "reward" of r - beta log(pi / pi_ref); with "loss" beta k3 is added
    to the loss instead, and with divide A is in standard deviations: GRPO, Eqs. 1 to 3 of arXiv:2501.12948.
    """
    p, ratio = old.exp(), (logp - old).exp()
    reward = r - beta * (old - log_ref) if kl_in == "reward" else r
    A, std = advantages(reward, p)
    if divide:
        A = A / std
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -(p * torch.min(ratio * A, clipped * A)).sum()
    if kl_in == "loss":
        loss = loss + beta * (p * kl_estimate(logp, log_ref, "k3")).sum()
    return loss


def train_policy(loss, log_ref, epochs, args):
    """log pi after Adam on loss(log pi, log pi_old) from pi_ref; pi_old is renewed every `epochs` steps."""
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], args.learning_rate, (0.9, 0.95), 1e-16)  # for rare arms
    for step in range(args.num_steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.num_steps) ** 2
        logp = logits.log_softmax(0)
        if step % epochs == 0:
            old = logp.detach()
        optimizer.zero_grad()
        loss(logp, old).backward()
        optimizer.step()
    return logits.detach().log_softmax(0)


def dpo(r, log_ref, beta, i, j):
    """log pi of DPO, Eq. 7 of arXiv:2305.18290: bt_loss of its implicit reward beta log(pi / pi_ref)."""
    mu = torch.sigmoid(r[i] - r[j])
    implicit_reward = fit(i, j, torch.ones_like(mu), mu, len(r), start=0 * r)
    return torch.log_softmax(log_ref + implicit_reward / beta, -1)


def train_all(r, log_ref, i, j, args):
    """{method: (log pi reached, log pi predicted)}."""
    problem = (r, log_ref, args.beta)
    loss = partial(policy_loss, r=r, log_ref=log_ref, beta=args.beta)
    train = lambda epochs, **options: train_policy(partial(loss, **options), log_ref, epochs, args)
    best, forward = optimum(*problem), forward_kl_optimum(*problem)
    scaled = forward
    for _ in range(60):  # division by the standard deviation multiplies beta by it
        _, std = advantages(r, scaled.exp())
        scaled = forward_kl_optimum(r, log_ref, args.beta * std)
    return {
        "REINFORCE": (train(1), best),
        "PPO, 4 epochs, clip 0.2": (train(4, clip_coef=0.2), best),
        "DPO": (dpo(*problem, i, j), best),
        "GRPO, k1 in the reward": (train(4, clip_coef=0.2, divide=True), best),
        "GRPO, k3 in the loss": (train(4, clip_coef=0.2, kl_in="loss"), forward),
        "GRPO, k3, A / std": (train(4, clip_coef=0.2, kl_in="loss", divide=True), scaled),
    }


# ---- Votes ----


def known_world(args):
    """(names, votes, rewards): mu is the mean of two voters, 0.5 if they differ: E[mu] = sigma(r_i - r_j)."""
    generator = torch.Generator().manual_seed(args.seed)
    K, N = args.num_arms, args.num_votes
    r = torch.randn(K, generator=generator).double()
    a = torch.randint(K, (N,), generator=generator)
    b = (a + 1 + torch.randint(K - 1, (N,), generator=generator)) % K
    i, j = torch.stack([a, b]).sort(0).values
    p = torch.sigmoid(r[i] - r[j])
    for_i = torch.rand(N, 2, generator=generator) < p[:, None]
    names = [f"arm {k + 1}" for k in range(K)]
    return names, (i, j, for_i.double().mean(1), torch.ones_like(p)), r


def load_votes(path):
    """(names, (i, j, mu, count), None), i < j, of rows with item_a and item_b, or model_a and model_b, and
    with outcome or winner (a, b, model_a, model_b, an arm's name, tie...), or mu from 1 (a wins) to 0, or
    numbers of votes wins_a, wins_b and ties. A column count is the number of votes of a row without these.
    """
    arms, votes = {}, []
    letters = {"a": 1, "model_a": 1, "b": 0, "model_b": 0}
    for row in read_rows(path):
        where = row["_where"]
        sides = [row.get(f"item_{side}", row.get(f"model_{side}")) for side in "ab"]
        if not all(isinstance(side, (str, int)) for side in sides):
            fail(f"{where}: needs item_a, item_b or model_a, model_b; has {sorted(set(row) - {'_where'})}")
        names = [str(side) for side in sides]
        a, b = (arms.setdefault(name, len(arms)) for name in names)
        if a == b:
            fail(f"{where}: {sides[0]!r} against itself")
        outcome = str(row.get("outcome", row.get("winner")))
        known = {**letters, names[0]: 1, names[1]: 0}
        if outcome in ("a", "b") and known[outcome] != letters[outcome]:
            fail(f"{where}: outcome {outcome!r} is the letter of one side and the name of the other")
        counts = [(row.get("mu", known.get(outcome, 0.5)), row.get("count", 1))]
        if "wins_a" in row:
            counts = [
                (1, row["wins_a"]),
                (0, row.get("wins_b")),
                (0.5, row.get("ties", 0)),
            ]
        elif "mu" not in row and outcome not in known and not outcome.startswith("tie"):
            fail(f"{where}: outcome {outcome!r}: expected a, b, tie, or one of the arms {names}")
        for mu, count in counts:
            if type(mu) not in (int, float) or not 0 <= mu <= 1:
                fail(f"{where}: mu is {mu!r}; expected 1 (the first wins) to 0, with 0.5 a tie")
            if type(count) is not int or count < 0:
                fail(f"{where}: {count!r} votes; expected a whole number")
            if count > 0:
                votes.append((a, b, mu, count) if a < b else (b, a, 1 - mu, count))
    if not votes:
        fail(f"{path}: no votes")
    i, j, mu, count = torch.tensor(votes, dtype=torch.float64).T
    return list(arms), (i.long(), j.long(), mu, count), None


def leaderboard(names, r, errors, resampled, more):
    """Rows {column: value}, best first; low, high, ranks hold 95 % of the resampled fits, nan not counted."""
    low, high = resampled.nanquantile(INTERVAL, dim=0)
    low = low.where(low.abs() < 1e6, -math.inf)
    high = high.where(high.abs() < 1e6, math.inf)
    ranks = resampled.nan_to_num().argsort(1, descending=True).argsort(1) + 1.0
    best, worst = ranks.double().quantile(INTERVAL, dim=0)
    columns = {"reward": r, "se": errors, "low": low, "high": high}
    columns |= {"best_rank": best.long(), "worst_rank": worst.ceil().long(), **more}
    rows = []
    for k in r.argsort(descending=True).tolist():
        values = {name: column[k].item() for name, column in columns.items()}
        rows.append({"rank": len(rows) + 1, "arm": names[k], **values})
    return rows


def main(args: Args) -> dict:
    # 1. flags, votes
    start = time.time()
    torch.set_num_threads(1)  # on matrices this small, threads wait longer than they work
    smallest = {"num_arms": 2, "seed": 0, "l2": 0}
    for name, value in asdict(args).items():
        if not isinstance(value, str) and not smallest.get(name, 1e-300) <= value < 1e18:
            fail(f"--{name.replace('_', '-')} is {value}: out of range")
    run = Path(args.output_dir)
    if run.is_dir() and any(run.iterdir()):
        fail(f"--output-dir {run} holds a finished run or other files: remove it, or choose another folder")
    names, votes, true = load_votes(args.dataset) if args.dataset else known_world(args)
    i, j, mu, count = votes
    K = len(names)
    if count.sum() > 1e8:
        fail(f"{args.dataset}: {count.sum():.0f} votes; the bootstrap takes up to 1e8")
    with blame(f"--output-dir {run}"):
        run.mkdir(parents=True, exist_ok=True)

    # 2. rewards with their errors
    *pairs, pair = pairs_of(*votes, K)
    reason = no_optimum(*pairs, names)
    if reason and args.l2 == 0:
        fail(f"{args.dataset or 'the votes drawn'}: no finite optimum: {reason}. --l2 0.1 makes one")
    r = fit(*pairs, K, args.l2)
    resampled = bootstrap(r, *pairs[:3], mu, count, pair, args.l2, args.num_bootstrap, args.seed + 3)
    errors = standard_errors(r, *pairs[:3], args.l2) if K <= DENSE else resampled.std(0)  # no inverse there
    more = {"votes": torch.bincount(torch.cat([i, j]), count.repeat(2)).long()}
    log_ref = torch.zeros(K).double()
    if true is not None:
        log_ref = torch.randn(K, generator=torch.Generator().manual_seed(args.seed + 1)).double()
        true = true - true.mean()
        more["true"] = true
    log_ref = log_ref.log_softmax(0)
    more["pi_ref"] = log_ref.exp()
    board = leaderboard(names, r, errors, resampled, more)
    print(f"rank  {'arm':28}  reward      se  95 % interval      ranks     votes"
          f"{'' if true is None else '    true'}")
    for row in board[:30]:
        known = f"{row['true']:8.3f}" if "true" in row else ""
        print(f"{row['rank']:4}  {row['arm']:28.28}  {row['reward']:6.3f}  {row['se']:6.3f}  "
              f"{row['low']:6.3f} to {row['high']:6.3f}  {row['best_rank']:3} to {row['worst_rank']:<4} "
              f"{row['votes']:6}{known}")
    if K > 30:
        print(f"      and {K - 30} more in {run / 'leaderboard.csv'}")

    # 3. what votes tell, and what they cannot tell
    loss = bt_loss(r, *votes).item()
    margin = r[i] - r[j]
    agrees = 0.5 + (mu - 0.5) * margin.sign()  # mu or 1 - mu; without a margin 0.5
    metrics = {"loss": loss, "accuracy": ((count * agrees).sum() / count.sum()).item()}
    print(f"\n{count.sum():.0f} votes: accuracy {metrics['accuracy']:.3f}, loss {loss:.4f}; of equal rewards "
          f"{bt_loss(0 * r, *votes):.4f} = log 2; shifted, r + 7, {bt_loss(r + 7, *votes):.4f}, the same; "
          f"scaled, 2 r, {bt_loss(2 * r, *votes):.4f}: another model")

    # 4. policies on these rewards, and how far below the optimum they are: by value, and by divergence
    best = optimum(r, log_ref, args.beta)
    J = lambda logp: objective(logp, r, log_ref, args.beta).item()
    policies = {
        "pi_ref": (log_ref, log_ref),
        **train_all(r, log_ref, *pairs[:2], args),
        "pi*": (best, best),
    }
    print(f"\npolicies on these rewards, beta {args.beta:g}; the optimum has J = {J(best):.4f}\n{'':26}"
          "E[r]  KL(pi_ref)      J* - J beta KL(.|pi*)  predicted  max |dlog pi| to prediction")
    for name, (logp, goal) in policies.items():
        row = {
            "expected_reward": (logp.exp() @ r).item(),
            "kl": kl(logp, log_ref),
            "regret": J(best) - J(logp),
            "distance_to_optimal": args.beta * kl(logp, best),  # the same, by another way
            "predicted": args.beta * kl(goal, best),
            "error": (logp - goal).abs().max().item(),
        }
        metrics |= {f"{name}/{key}": value for key, value in row.items()}
        print(f"{name:24}{row['expected_reward']:6.3f}{row['kl']:12.3f}{row['regret']:12.2e}"
              f"{row['distance_to_optimal']:14.2e}{row['predicted']:12.2e}{row['error']:12.1e}")
    if true is not None:
        metrics["rmse"] = (r - true).square().mean().sqrt().item()
        metrics["regret"] = args.beta * kl(best, optimum(true, log_ref, args.beta))
        print(f"\nroot mean square error of the rewards {metrics['rmse']:.3f}; by the true ones their "
              f"optimal policy is {metrics['regret']:.4f} below the optimum")

    # 5. files; null where there is no bound, for JSON has no infinity
    for row in board:
        for key in ("se", "low", "high"):
            if not abs(row[key]) < 1e6:
                row[key] = None
    with open(run / "leaderboard.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, board[0])
        writer.writeheader()
        writer.writerows(board)
    seconds = round(time.time() - start, 1)
    record = {**asdict(args), "torch": torch.__version__, "seconds": seconds}
    for name, content in (("args", record), ("metrics", metrics), ("leaderboard", board)):
        (run / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"leaderboard and metrics are in {run}; {seconds} s. Picture:\n"
          f"  python benchmarks/bandit_lessons.py --picture {run}")
    return metrics


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
