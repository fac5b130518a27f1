"""Bradley-Terry fits of bandit_bt.py beside choix and evalica: the same rewards, and how long they take.

    pip install choix evalica
    python benchmarks/bradley_terry.py --output benchmarks/results/bradley_terry.json

Agreement: random votes on several numbers of arms, ties among them, tight tolerances. A tie is half a win
for each side: evalica's tie_weight 0.5, half wins in choix's matrix. The largest difference between rewards
that sum to 0.

Time: from votes, evalica takes lists of items and winners, bandit_bt.py tensors of arms (`pairs_of`, `fit`).
From wins, choix takes the matrix, bandit_bt.py the pairs that met (`fit` alone). Each stops at its own
default tolerance; the error that this leaves is the largest difference to choix at tolerance 1e-13. The
bootstrap is a fit to each draw of as many votes with replacement. CPU time of one process with one thread;
implementations take turns.
"""

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = "1"  # before NumPy and evalica start their threads

import torch  # noqa: E402
import tyro  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bandit_bt import bootstrap, fit, pairs_of  # noqa: E402
from common import fail  # noqa: E402
from logprob import hardware, version  # noqa: E402


@dataclass
class Args:
    arms: int = 1000  # of the timed votes
    votes: int = 1_000_000
    tie_share: float = 0.3  # of the votes
    repeats: int = 5  # timed fits of each implementation
    replicates: int = 200  # draws of the bootstrap
    peer_replicates: int = 0  # of evalica's, scaled to `replicates`; 0: all of them
    seed: int = 0
    output: str = ""  # also write the figures here, as JSON


def draw(K, N, tie_share, seed):
    """(a, b, mu): N votes by Bradley-Terry on standard normal rewards, a share of them replaced by ties."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(K, generator=generator).double()
    a, b = (torch.randint(n, (N,), generator=generator) for n in (K, K - 1))
    b = (a + 1 + b) % K
    won = torch.rand(N, generator=generator).double() < torch.sigmoid(r[a] - r[b])
    return a, b, won.double().masked_fill(torch.rand(N, generator=generator) < tie_share, 0.5)


# ---- Implementations ----


def ordered(a, b, mu):
    """The votes as bandit_bt.py keeps them: i < j."""
    return torch.minimum(a, b), torch.maximum(a, b), torch.where(a < b, mu, 1 - mu), torch.ones_like(mu)


def from_votes(votes, K):
    return fit(*pairs_of(*ordered(*votes), K)[:4], K)


def for_evalica(votes, evalica):
    """(items, items, winners), lists as its functions take them."""
    a, b, mu = votes
    winner = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    return a.tolist(), b.tolist(), [winner[x] for x in mu.tolist()]


def evalica_rewards(result):
    """log of its scores, which are named by item, from the best on."""
    scores = dict(result.scores.items())
    r = torch.tensor([scores[k] for k in range(len(scores))], dtype=torch.float64).log()
    return r - r.mean()


def matrix(votes, K):
    """Wins of the row's arm over the column's, ties half: (K, K), NumPy."""
    a, b, mu = votes
    wins = torch.bincount(torch.cat([a * K + b, b * K + a]), torch.cat([mu, 1 - mu]), K * K)
    return wins.view(K, K).numpy()


def choix_rewards(params):
    r = torch.from_numpy(params).double()
    return r - r.mean()


def apart(x, y) -> float:
    return (x - y).abs().max().item()


# ---- Measurements ----


def agreement(args, choix, evalica):
    """Largest differences to either, one row for each number of arms."""
    rows = []
    for seed, (K, N) in enumerate(((2, 50), (5, 200), (20, 2000), (100, 20_000), (300, 100_000))):
        votes = draw(K, N, args.tie_share, args.seed + 100 + seed)
        r = from_votes(votes, K)
        lists = for_evalica(votes, evalica)
        other = evalica.bradley_terry(*lists, tie_weight=0.5, tolerance=1e-14, limit=100_000)
        params = choix.ilsr_pairwise_dense(matrix(votes, K), tol=1e-13)
        rows.append({"arms": K, "votes": N, "evalica": apart(r, evalica_rewards(other)),
                     "choix": apart(r, choix_rewards(params))})
        print("agreement, {arms} arms, {votes} votes: to evalica {evalica:.1e}, to choix {choix:.1e}".format(
            **rows[-1]), flush=True)
    return rows


def in_turns(repeats, functions):
    """{name: (CPU seconds of each call, last result)}; in reverse order every other round."""
    seconds, results = {name: [] for name in functions}, {}
    for turn in range(repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            results[name] = functions[name]()
            seconds[name].append(time.process_time() - start)
    return {name: (seconds[name], results[name]) for name in functions}


def times(args, choix, evalica):
    K, votes = args.arms, draw(args.arms, args.votes, args.tie_share, args.seed)
    lists, wins = for_evalica(votes, evalica), matrix(votes, K)
    i, j, mu, count = ordered(*votes)
    *pairs, pair = pairs_of(i, j, mu, count, K)
    table, exact = {}, choix_rewards(choix.ilsr_pairwise_dense(wins, tol=1e-13))
    comparisons = {
        "from votes": {"bandit_bt": lambda: from_votes(votes, K),
                       "evalica": lambda: evalica_rewards(evalica.bradley_terry(*lists))},
        "from wins": {"bandit_bt": lambda: fit(*pairs, K),
                      "choix": lambda: choix_rewards(choix.ilsr_pairwise_dense(wins))}}
    for what, functions in comparisons.items():
        for function in functions.values():
            function()  # warm-up
        rows = in_turns(args.repeats, functions)
        table[what] = {
            name: {"seconds": seconds, "median": statistics.median(seconds), "error": apart(r, exact)}
            for name, (seconds, r) in rows.items()}
        peer = next(name for name in functions if name != "bandit_bt")
        table[what]["ratio"] = table[what][peer]["median"] / table[what]["bandit_bt"]["median"]
        report(what, table[what])

    drawn = args.peer_replicates or args.replicates
    rows = in_turns(1, {
        "bandit_bt": lambda: bootstrap(exact, *pairs[:3], mu, count, pair, 0.0, args.replicates, args.seed),
        "evalica": lambda: evalica.bootstrap(evalica.bradley_terry, *lists, n_resamples=drawn,
                                             bootstrap_method="percentile", random_state=args.seed)})
    ours, peer = rows["bandit_bt"][0], rows["evalica"][0]
    table["bootstrap"] = {
        "bandit_bt": {"seconds": ours, "median": ours[0], "replicates": args.replicates},
        "evalica": {"seconds": peer, "median": peer[0] / drawn * args.replicates, "replicates": drawn}}
    table["bootstrap"]["ratio"] = table["bootstrap"]["evalica"]["median"] / ours[0]
    report(f"bootstrap of {args.replicates}" + f", evalica's scaled from {drawn}" * (drawn < args.replicates),
           table["bootstrap"])
    theirs = torch.from_numpy(rows["evalica"][1].distribution[list(range(K))].to_numpy(copy=True)).log()
    spread = (theirs - theirs.mean(1, keepdim=True)).std(0)
    table["bootstrap"]["spread_ratio"] = (rows["bandit_bt"][1].std(0) / spread).median().item()
    print(f"standard deviations of the draws, ours / evalica's: {table['bootstrap']['spread_ratio']:.3f}")
    return table


def report(what, row):
    parts = [f"{name} {x['median']:.3f} s" + (f" (error {x['error']:.0e})" if "error" in x else "")
             for name, x in row.items() if isinstance(x, dict)]
    print(f"{what}: {', '.join(parts)}: {row['ratio']:.2f} times as fast", flush=True)


def main(args: Args) -> dict:
    try:
        import choix
        import evalica
    except ImportError as error:
        fail(f"{error.name} is missing: pip install choix evalica")
    if min(args.arms - 1, args.votes, args.repeats, args.replicates, args.peer_replicates + 1) < 1:
        fail("--arms must be at least 2; --votes, --repeats and --replicates must be positive")
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("torch", "numpy", "scipy", "choix", "evalica")}
    machine = hardware("cpu")
    print(f"{args.arms} arms, {args.votes} votes: {machine['cpu']}, {machine['cores']} cores, one thread; "
          + ", ".join(f"{name} {number}" for name, number in versions.items()), flush=True)
    rows, table = agreement(args, choix, evalica), times(args, choix, evalica)
    few = {"arms": 50, "votes": 20_000, "replicates": 20}
    print(*few.values(), "arms, votes, draws of the bootstrap")
    smaller = times(replace(args, **few), choix, evalica)
    worst = max(max(row["choix"], row["evalica"]) for row in rows)
    lines = [f"largest difference of a reward {worst:.1e} (target <= 1e-6)",
             *(f"fit {what}: {table[what]['ratio']:.2f} times as fast (target >= 1)"
               for what in ("from votes", "from wins")),
             f"bootstrap: {table['bootstrap']['ratio']:.2f} times as fast (target >= 5)"]
    print(*lines, sep="\n")
    result = {"args": asdict(args), "python": platform.python_version(), "hardware": machine,
              "versions": versions, "agreement": rows, "times": table, "checks": lines,
              "smaller": few | {"choix seconds / ours, from wins": smaller["from wins"]["ratio"],
                                "evalica bootstrap / ours": smaller["bootstrap"]["ratio"]}}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
