"""More lessons on K arms, beside bandit_bt.py: elections, samples, rankings, paths, ratings, and the picture.

    python benchmarks/bandit_lessons.py                         all tables
    python bandit_bt.py
    python benchmarks/bandit_lessons.py --picture runs/bandit   leaderboard.png of that run; needs matplotlib

1. Elections: the winners of Condorcet, Copeland and Borda are one arm under Bradley-Terry. On a cyclic matrix
   of preferences, which no rewards explain, they are three different answers.
2. Samples: REINFORCE's gradient, mean of A grad log pi over arms drawn from pi, nears the enumerated one as
   1 / sqrt(number of samples).
3. Rankings: rewards from the order of four arms at a time (Plackett-Luce, App. A.3 of arXiv:2305.18290).
4. Trajectories: rewards of single steps from comparisons of whole paths, P(path 1 beats path 2) = sigma(sum
   of rewards on 1 - sum on 2). Some changes of the rewards never show; the best policy is the same with them.
5. Ratings: numbers that raters give, each on her own scale, order the arms worse than as many comparisons.
"""

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bandit_bt  # noqa: E402
from bandit_bt import fit, kl, known_world, optimum, pairs_of, policy_loss  # noqa: E402
from common import fail  # noqa: E402

CYCLE = torch.tensor([
    [0.5, 0.6, 0.4, 0.6],
    [0.4, 0.5, 0.6, 0.1],
    [0.6, 0.4, 0.5, 0.6],
    [0.4, 0.9, 0.4, 0.5],
])  # P(row beats column): A beats B, B beats C, C beats A


@dataclass
class Args:
    # run
    picture: str = ""  # folder of a finished run of bandit_bt.py: only draw its leaderboard.png
    output: str = "benchmarks/results/bandit_lessons.json"  # the figures as JSON; empty: not written
    seed: int = 1  # of everything that is drawn; the same seed has the same rewards in bandit_bt.py
    # data
    num_arms: int = 8  # K, the number of known rewards
    # policies
    beta: float = 0.5  # KL penalty of REINFORCE's objective, in units of the reward per nat


# ---- 1. Elections ----


def winners(P):
    """{rule: its winners} from P(i beats j), (K, K): Condorcet's beats or ties every other arm, Copeland's
    beats the most, Borda's has the largest sum. Under Bradley-Terry each is the arm of the largest reward.
    """
    others = ~torch.eye(len(P), dtype=torch.bool)
    never_loses = ((P >= 0.5) | ~others).all(1)
    victories = ((P > 0.5) & others).sum(1)
    points = torch.where(others, P, 0.0).sum(1)
    won = {
        "Condorcet": never_loses,
        "Copeland": victories == victories.max(),
        "Borda": points >= points.max() - 1e-12,
    }
    return {rule: arms.nonzero()[:, 0].tolist() for rule, arms in won.items()}


# ---- 2. Samples ----


def reinforce_loss(logits, drawn, r, log_ref, beta):
    """-mean of A log pi over arms drawn from pi, (N,): its gradient estimates that of -J.

    A is the reward, less its KL penalty and the mean of the samples, and takes no gradient. Since this mean
    holds each sample itself, the expected gradient is (N - 1) / N of -J's.
    """
    logp = logits.log_softmax(0)[drawn]  # (N,)
    reward = r[drawn] - beta * (logp - log_ref[drawn]).detach()
    A = reward - reward.mean()
    return -(A * logp).mean()


def reinforce_errors(r, log_ref, beta, generator):
    """{number of samples: largest difference of the sampled from the enumerated gradient, at uniform pi}."""
    logits = torch.zeros_like(r, requires_grad=True)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(policy_loss(logp, logp.detach(), r, log_ref, beta), logits)
    errors = {}
    for number in (100, 10_000, 1_000_000):
        drawn = torch.multinomial(logp.detach().exp(), number, replacement=True, generator=generator)
        (sampled,) = torch.autograd.grad(reinforce_loss(logits, drawn, r, log_ref, beta), logits)
        errors[number] = (sampled - exact).abs().max().item()
    return errors


# ---- 3. Rankings ----


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


def ranking_loss(r, rankings):
    """-mean log prod_k exp(r_k) / sum_{l >= k} exp(r_l): Plackett-Luce, App. A.3 of arXiv:2305.18290; nats.

    Args: rankings (N, L) of arms, best first. For L = 2 it is Bradley-Terry.
    """
    scores = r[rankings]  # (N, L)
    left = scores.flip(1).logcumsumexp(1).flip(1)  # log sum over the arms from each place on
    return (left - scores).sum(1).mean()


def gumbel(shape, generator):
    """Standard Gumbel noise; the largest of r + noise is arm k with probability softmax(r)_k."""
    return -torch.rand(shape, generator=generator).double().log().neg().log()


def draw_rankings(r, number, generator):
    """Rankings of four random arms (of all if there are fewer), best first, by Plackett-Luce: (number, 4)."""
    four = torch.rand(number, len(r), generator=generator).argsort(1)[:, :4]
    perceived = r[four] + gumbel(four.shape, generator)
    return four.gather(1, perceived.argsort(1, descending=True))


# ---- 4. Trajectories ----

# A world of three steps, s -> x -> y -> z with x, y, z in {0, 1}, and a reward on each of its ten edges:
# (step, state, next state).
EDGES = [(0, "s", "0"), (0, "s", "1")]
EDGES += [(1, x, y) for x in "01" for y in "01"]
EDGES += [(2, y, z) for y in "01" for z in "01"]
PATHS = ["s" + "".join(states) for states in itertools.product("01", repeat=3)]


def visits(path):
    """Which edges a path takes: (10,) of 0 and 1."""
    taken = [(step, path[step], path[step + 1]) for step in range(3)]
    return torch.tensor([float(edge in taken) for edge in EDGES], dtype=torch.float64)


def on_step(t):
    """1 on every edge of step t: (10,)."""
    return torch.tensor([float(step == t) for step, _, _ in EDGES], dtype=torch.float64)


def through(t, x):
    """1 on the edges of step t that enter state x, -1 on those that then leave it: (10,)."""
    entering = torch.tensor([float((step, y) == (t, x)) for step, _, y in EDGES], dtype=torch.float64)
    leaving = torch.tensor([float((step, y) == (t + 1, x)) for step, y, _ in EDGES], dtype=torch.float64)
    return entering - leaving


VISITS = torch.stack([visits(path) for path in PATHS])  # (8, 10)
BLIND = {  # a basis of the changes of the edges' rewards that no comparison of two paths shows
    "+1 on every edge of step 1": on_step(0),
    "+1 on every edge of step 2": on_step(1),
    "+1 on every edge of step 3": on_step(2),
    "+1 on the edge into state 0 of step 1, -1 on both edges out of it": through(0, "0"),
    "+1 on both edges into state 0 of step 2, -1 on both edges out of it": through(1, "0"),
}


def fit_trajectories(features, mu):
    """Rewards w (D,) of steps from P(path 1 beats path 2) = sigma((phi_1 - phi_2) w): logistic regression on
    the differences of visits, features (N, D). Newton with a pseudo-inverse gives the shortest optimum.
    """
    w = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(features @ w)
        gradient = features.T @ (mu - p)
        H = features.T @ (features * (p * (1 - p))[:, None])
        step = torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ gradient
        d = (features @ step).abs().max().clamp(min=1e-300)
        w = w + step * torch.log1p(d) / d  # shortened as in bandit_bt.fit
    return w


def greedy(w):
    """The best next state in each state of that world, by backward induction: {(step, state): next state}."""
    reward = dict(zip(EDGES, w.tolist()))
    value = {"0": 0.0, "1": 0.0}  # of the states behind the last step
    policy = {}
    for step in (2, 1, 0):
        before = {}
        for x in "s" if step == 0 else "01":
            q = {y: reward[step, x, y] + value[y] for y in "01"}
            policy[step, x] = max(q, key=q.get)
            before[x] = max(q.values())
        value = before
    return policy


# ---- 5. Ratings ----


def order_recovered(r, labels, spread, generator, raters=20):
    """Share of pairs (K arms) in the right order: from `labels` ratings, and from as many comparisons.

    Both come from what a rater perceives, the reward plus Gumbel noise (so comparisons are Bradley-Terry).
    Ratings also pass through a rater's own scale and offset, exp(spread z) and spread z'.
    """
    K = len(r)
    arm = torch.randint(K, (labels,), generator=generator)
    other = (arm + 1 + torch.randint(K - 1, (labels,), generator=generator)) % K
    rater = torch.randint(raters, (labels,), generator=generator)
    log_scale, offset = (spread * torch.randn(2, raters, generator=generator)).double()

    ratings = log_scale.exp()[rater] * (r[arm] + gumbel(labels, generator)) + offset[rater]
    number = torch.bincount(arm, minlength=K).clamp(min=1)
    rated = torch.bincount(arm, ratings, K) / number  # mean rating of each arm

    arm_wins = r[arm] + gumbel(labels, generator) > r[other] + gumbel(labels, generator)
    low, high = torch.minimum(arm, other), torch.maximum(arm, other)
    low_wins = (arm_wins == (arm < other)).double()
    pairs = pairs_of(low, high, low_wins, torch.ones_like(low_wins), K)[:4]
    compared = fit(*pairs, K, l2=0.1)
    return right_order(rated, r), right_order(compared, r)


def right_order(x, r):
    """Share of pairs of arms that x puts in the order of r; equal ones count half."""
    a, b = torch.triu_indices(len(r), len(r), 1)
    agreement = ((x[a] - x[b]) * (r[a] - r[b])).sign()  # 1, 0 or -1
    return ((agreement + 1) / 2).mean().item()


# ---- The picture ----


def draw_picture(run):
    """leaderboard.png: rewards with their intervals, and the exact frontier of E[r] against KL(pi || pi_ref)
    with each method's point. Methods that reach the same policy are nested markers of different sizes.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        fail("--picture needs `pip install matplotlib`")
    columns = {}
    try:
        board = json.loads((run / "leaderboard.json").read_text())
        metrics = json.loads((run / "metrics.json").read_text())
        beta = json.loads((run / "args.json").read_text())["beta"]
        for key in ("arm", "reward", "low", "high", "pi_ref"):
            columns[key] = [row[key] for row in board]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--picture {run}: not the folder of a finished run of bandit_bt.py: {error!r}")
    plt.rcParams["text.parse_math"] = False  # a name may hold a $
    height = max(4.5, 1.5 + 0.16 * len(board))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")

    places = range(len(board))
    # Where an interval has no bound its line ends one beyond all rewards.
    ends = {"low": min(columns["reward"]) - 1, "high": max(columns["reward"]) + 1}
    for key, end in ends.items():
        columns[key] = [end if bound is None else bound for bound in columns[key]]
    left.hlines(places, columns["low"], columns["high"])
    left.plot(columns["reward"], places, "o", markersize=4, label="fitted, with 95 % interval (bootstrap)")
    if "true" in board[0]:
        left.plot([row["true"] for row in board], places, "kx", markersize=5, label="true")
    left.set_yticks(places, columns["arm"])
    left.set(xlabel="reward", title="leaderboard", ylim=(len(board), -1))
    left.legend(loc="lower right")

    r = torch.tensor(columns["reward"], dtype=torch.float64)
    log_ref = torch.tensor(columns["pi_ref"], dtype=torch.float64).log()
    frontier = []
    for scale in torch.logspace(-1.5, 1.5, 100):
        best = optimum(r, log_ref, scale * beta)
        frontier.append((kl(best, log_ref), (best.exp() @ r).item()))
    right.plot(*zip(*frontier), "k-", linewidth=1, label="pi* at every beta")
    methods = [key.removesuffix("/kl") for key in metrics if key.endswith("/kl")]
    methods = [name for name in methods if name not in ("pi_ref", "pi*")]
    for name, marker, size in zip(methods, "os^vDX", (21, 16, 11, 5, 9, 9)):
        point = metrics[f"{name}/kl"], metrics[f"{name}/expected_reward"]
        right.plot(*point, marker, markersize=size, fillstyle="none", label=name)
    right.set(xlabel="KL(pi || pi_ref), nats", ylabel="E[r]", title=f"policies at beta {beta:g}")
    right.legend(loc="lower right", labelspacing=1.0)
    figure.savefig(run / "leaderboard.png", dpi=120)
    plt.close(figure)
    print(f"the picture is {run / 'leaderboard.png'}")


# ---- The tables ----


def named(found, names):
    """`winners` in words."""
    parts = []
    for rule, arms in found.items():
        parts.append(f"{rule} {', '.join(names[k] for k in arms) or 'none'}")
    return "; ".join(parts)


def main(args: Args) -> dict:
    torch.set_num_threads(1)
    if args.picture:
        draw_picture(Path(args.picture))
        return {}
    if args.num_arms < 2 or not 0 <= args.seed < 1e18 or not 0 < args.beta < 1e18:
        fail("--num-arms must be at least 2, --seed 0 or more, --beta positive")
    names, _, r = known_world(bandit_bt.Args(seed=args.seed, num_arms=args.num_arms))
    generator = torch.Generator().manual_seed(args.seed + 2)
    metrics = {"known_rewards": (r - r.mean()).tolist()}

    print("1. Elections: P(row beats column) of a cyclic example, A over B over C over A")
    print("  " + "".join(f"{letter:>6}" for letter in "ABCD"))
    for letter, row in zip("ABCD", CYCLE.tolist()):
        print(f"  {letter}" + "".join(f"{p:6.1f}" for p in row))
    elections = {
        "the cyclic example": named(winners(CYCLE), "ABCD"),
        "Bradley-Terry on the known rewards": named(winners(torch.sigmoid(r[:, None] - r)), names),
    }
    for title, found in elections.items():
        metrics[f"winners/{title}"] = found
        print(f"   {title}: {found}")

    print("\n2. Samples: REINFORCE's mean of A grad log pi, beside the enumerated gradient; pi is uniform")
    log_ref = torch.randn(len(r), generator=torch.Generator().manual_seed(args.seed + 1)).double()
    log_ref = log_ref.log_softmax(0)  # as in bandit_bt.py
    errors = reinforce_errors(r, log_ref, args.beta, torch.Generator().manual_seed(args.seed + 4))
    for number, error in errors.items():
        metrics[f"reinforce_error/{number} samples"] = error
        print(f"   {number:9,} samples: largest difference {error:.5f}")

    print("\n3. Rankings: rewards from 1000 orders of four arms (Plackett-Luce)")
    rankings = draw_rankings(r, 1000, generator)
    ranked = minimize(lambda x: ranking_loss(x, rankings), torch.zeros_like(r))
    difference = (ranked - ranked.mean()) - (r - r.mean())
    metrics["rmse_rankings"] = difference.square().mean().sqrt().item()
    print(f"   root mean square error of the rewards {metrics['rmse_rankings']:.3f}")

    print("\n4. Trajectories: rewards of steps, from 2000 comparisons of paths")
    w = torch.randn(len(EDGES), generator=generator).double()
    one, two = torch.randint(len(PATHS), (2, 2000), generator=generator)
    features = VISITS[one] - VISITS[two]
    won = torch.rand(2000, generator=generator) < torch.sigmoid(features @ w)
    learned = fit_trajectories(features, won.double())
    rank = int(torch.linalg.matrix_rank(features))
    metrics["greedy_is_best"] = greedy(learned) == greedy(w)
    metrics["directions_shown"] = rank
    print(f"   the greedy policy is the best in every state: {metrics['greedy_is_best']}")
    print(f"   {rank} of {len(EDGES)} directions of the edges' rewards show; {len(EDGES) - rank} do not:")
    for name in BLIND:
        print(f"     {name}")
    print("   and what is made of these, such as the same for state 1; none of them changes the best policy")

    print("\n5. Ratings: share of pairs in the right order, mean of 50 draws")
    print("   labels  spread of the raters' scales  from ratings  from as many comparisons")
    for labels, spread in itertools.product((100, 400), (0.0, 0.5, 1.0)):
        draws = [order_recovered(r, labels, spread, generator) for _ in range(50)]
        rated, compared = torch.tensor(draws).mean(0).tolist()
        metrics[f"order_recovered/{labels} labels, spread {spread}"] = {"rated": rated, "compared": compared}
        print(f"   {labels:6}{spread:30}{rated:14.3f}{compared:26.3f}")

    if args.output:
        results = {"args": asdict(args), "metrics": metrics}
        try:
            Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
        except OSError as error:
            fail(f"--output {args.output}: {error}")
    return metrics


if __name__ == "__main__":
    main(tyro.cli(Args))
