"""Reward over-optimization: a weaker KL penalty buys more learned reward, and at last less of the true one.

    python benchmarks/overoptimization.py

A reward model learns from a number of comparisons of the embedded world; PPO then maximizes it with a falling
--kl-coef. Both rewards of each policy are measured, the learned one and the gold reward that the comparisons
were drawn from, on fresh samples for held-out prompts. The picture, as in arXiv:2210.10760 at a small scale,
has the KL from the start on its x-axis; dashed is what the policy was trained on, solid what was meant.

Runs that have finished are kept, so the command can be repeated. Needs matplotlib for the picture.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import frontier  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
from common import fail  # noqa: E402


@dataclass
class Args:
    betas: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1, 0.03])  # --kl-coef of PPO
    pairs: list[int] = field(default_factory=lambda: [2000, 20000])  # comparisons a reward model learns from
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # of PPO
    folder: str = "runs/overoptimization"  # of the runs
    output: str = "benchmarks/results/overoptimization"  # .json and .png


def main(args: Args) -> dict:
    try:
        import matplotlib
    except ImportError:
        fail("the picture needs `pip install matplotlib`")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder, gold, result = Path(args.folder), "data/gold_reward.py:gold_reward", {}
    for number in args.pairs:
        run, rows = folder / f"reward{number}", Path("data/preferences.jsonl").read_text().splitlines(True)
        run.parent.mkdir(parents=True, exist_ok=True)
        file = folder / f"pairs{number}.jsonl"
        file.write_text("".join(rows[:number]))
        if not (run / "model").exists():  # at least 63 optimizer steps
            reward_model.main(reward_model.Args(
                dataset=str(file), eval_dataset="data/preferences_test.jsonl", output_dir=str(run),
                eval_every=0, num_train_epochs=max(1, 4000 // number)))
        learned, policies = str(run / "model"), {}
        for beta in args.betas:
            for seed in args.seeds:
                name = folder / f"ppo{number}_beta{beta}_seed{seed}"
                policies[str(name / "model")] = (beta, seed)
                if not (name / "model").exists():
                    ppo.main(ppo.Args(
                        reward=(learned,), kl_coef=beta, seed=seed, eval_every=0, output_dir=str(name)))
        measured = frontier.main(frontier.Args(policies=list(policies), rewards=[learned, gold]))
        accuracy = json.loads((run / "model" / "config.json").read_text())["held_out_accuracy"]
        learned, true = measured[learned]["policies"], measured[gold]["policies"]
        result[number] = {"held_out_accuracy": accuracy, "gold_frontier": measured[gold]["frontier"]}
        result[number]["policies"] = [
            {"beta": beta, "seed": seed, "kl": true[name]["kl"], "learned": learned[name]["reward"],
             "gold": true[name]["reward"]} for name, (beta, seed) in policies.items()]

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for color, (number, row) in zip(("tab:red", "tab:blue", "tab:green", "tab:purple"), result.items()):
        label = f"{number:,} comparisons (accuracy {row['held_out_accuracy']:.3f})"
        for key, style in (("learned", "--"), ("gold", "-")):
            means = []
            for beta in args.betas:
                points = [(p["kl"], p[key]) for p in row["policies"] if p["beta"] == beta]
                axes.plot(*zip(*points), ".", color=color, alpha=0.5)
                means.append([sum(column) / len(points) for column in zip(*points)])
            axes.plot(*zip(*means), style, color=color, label=f"{key} reward, {label}")
            for beta, mean in zip(args.betas, means):
                axes.annotate(f"{beta:g}", mean, textcoords="offset points", xytext=(4, 5), fontsize=8)
    rows = next(iter(result.values()))["gold_frontier"]
    optimum = [(kl, reward) for _, reward, kl, _ in rows]
    axes.plot(*zip(*optimum), "k:", label="exact optimum, gold reward")
    axes.set(xlabel="KL(policy || start), nats a response", ylabel="reward, mean over held-out prompts",
             title="PPO on a learned reward (numbers: --kl-coef)")
    axes.legend(fontsize=8)
    figure.savefig(f"{args.output}.png", dpi=110)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    for number, row in result.items():
        for p in row["policies"]:
            print(f"{number:6} pairs, beta {p['beta']:5}, seed {p['seed']}: KL {p['kl']:6.2f}  learned "
                  f"{p['learned']:6.3f}  gold {p['gold']:6.3f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
