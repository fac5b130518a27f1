"""The default runs over seeds: SFT, reward model, DPO, PPO, and GRPO with each form of its KL.

    python benchmarks/seeds.py

All scripts run without flags but --seed, those that say where their models are, and the flags of RUNS; those
of one seed build on each other. Each policy is judged by benchmarks/frontier.py on held-out prompts, by the
gold reward and by the reward model of its seed. Prints three tables of benchmarks/README.md.

Finished runs are kept in --folder, so that a command that was stopped can be repeated, and goes on with more
--seeds. Six minutes of one CPU core a seed. CPU seconds are those of a whole process.
"""

import json
import re
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import frontier  # noqa: E402
from claims import kept  # noqa: E402
from logprob import version  # noqa: E402
from pretrained import first_and_last, run  # noqa: E402

GOLD = "data/gold_reward.py:gold_reward"
RLOO = "--baseline leave_one_out --scale-rewards none --importance-sampling-level sequence"
RUNS = {  # name -> command
    "sft": "sft.py",
    "reward_model": "reward_model.py --model SFT",
    "dpo": "dpo.py --model SFT",
    "ppo": "ppo.py --model SFT --reward REWARD",
    "ppo-gold": f"ppo.py --model SFT --reward {GOLD}",
    "grpo": "grpo.py --model SFT",
    "grpo-undivided": "grpo.py --model SFT --scale-rewards none",
    "grpo-k2": "grpo.py --model SFT --kl-estimator k2",
    "grpo-k1": "grpo.py --model SFT --kl-in reward",
    "grpo-rloo": f"grpo.py --model SFT --kl-in reward {RLOO}"}
POLICIES = [name for name in RUNS if name not in ("sft", "reward_model")]
ROWS = {  # of the table of GRPO
    "grpo": "k3 in the loss, as published", "grpo-undivided": "the same, advantages not divided by the std",
    "grpo-k2": "k2 in the loss", "grpo-k1": "k1 in the reward", "grpo-rloo": "k1 in the reward, RLOO"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    only: list[str] = field(default_factory=lambda: list(RUNS))  # names of RUNS; those they need too
    reference_samples: int = 4000  # a held-out prompt, for the frontiers
    policy_samples: int = 300  # a held-out prompt
    tiny: bool = False  # the sizes of a test
    folder: str = "runs/seeds"  # of the runs
    output: str = "benchmarks/results/seeds.json"


def runs_of(args: Args, seed: int) -> dict:
    """Train what is missing: name -> {"command", "cpu_seconds", evaluations "before" and "after"}."""
    folder, result = Path(args.folder).absolute() / f"seed{seed}", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        script, _, flags = RUNS[name].partition(" ")
        flags += f" --seed {seed} --output-dir {folder / name}"
        flags = flags.replace("SFT", f"{folder}/sft/model").replace("REWARD", f"{folder}/reward_model/model")
        if args.tiny:
            last = "--total-episodes" if script in ("ppo.py", "grpo.py") else "--num-train-epochs"
            flags += f" {last} 0"
        run(name, ["python", script, *flags.split()], folder)
        (before, *_), (after, *_) = first_and_last(folder / name / "metrics.jsonl")
        command = f"python {script} {flags.strip()}".replace(str(folder.parent), Args.folder)
        cost = json.loads((folder / name / "cost.json").read_text())["cpu_seconds"]
        result[name] = {"command": command, "cpu_seconds": cost, "before": before, "after": after}
        print(f"{command}: {cost} s", flush=True)
    return result


def judged(args: Args, seed: int) -> dict:
    """"gold" and "learned" -> what frontier.py says of the policies of a seed."""
    folder = Path(args.folder) / f"seed{seed}"
    names = [name for name in POLICIES if name in args.only]
    rewards = {"gold": GOLD}
    if "reward_model" in args.only:
        rewards["learned"] = f"{folder}/reward_model/model"
    found = frontier.main(frontier.Args(
        reference=f"{folder}/sft/model", policies=[f"{folder}/{name}/model" for name in names],
        rewards=list(rewards.values()), reference_samples=args.reference_samples,
        policy_samples=args.policy_samples))
    result = {}
    for name, spec in rewards.items():
        policies = list(found[spec]["policies"].values())
        result[name] = found[spec] | {"policies": dict(zip(names, policies))}
    return result


# ---- Tables ----


def spread(values, digits: int) -> str:
    """mean ± sd over seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def of(result: dict, name: str, key: str, reward: str = "gold") -> list[float]:
    """A figure of a policy, of each seed."""
    return [found["judged"][reward]["policies"][name][key] for found in result["seeds"].values()]


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def dpo_table(result: dict) -> str:
    rows = []
    for seed, found in result["seeds"].items():
        loss = found["runs"]["sft"]["after"]["eval/loss"]
        accuracy = found["runs"]["dpo"]["after"]["eval/rewards/accuracies"]
        dpo = found["judged"]["gold"]["policies"]["dpo"]
        rows.append([
            seed, f"{loss:.4f}", f"{accuracy:.3f}", f"{dpo['reward']:.3f} ± {dpo['reward_se']:.3f}",
            f"{dpo['kl']:.2f} ± {dpo['kl_se']:.2f}", f"{dpo['frontier']:.3f}", f"**{dpo['fraction']:.3f}**"])
    return table(rows)


def ppo_table(result: dict) -> str:
    rows, accuracies = [], []
    for seed, found in result["seeds"].items():
        after = found["runs"]["reward_model"]["after"]
        accuracy, ceiling = after["eval/accuracy"], after["eval/accuracy_ceiling"]
        learned, gold = found["judged"]["learned"], found["judged"]["gold"]
        ppo, by_gold, on_gold = (
            learned["policies"]["ppo"], gold["policies"]["ppo"], gold["policies"]["ppo-gold"])
        rows.append([
            seed, f"{accuracy:.3f} ({accuracy / ceiling:.3f})",
            f"{learned['reference_reward']:.2f} → {ppo['reward']:.2f}", f"{ppo['kl']:.2f}",
            f"**{ppo['fraction']:.3f}**", f"{by_gold['reward']:.2f}", f"{by_gold['fraction']:.3f}",
            f"{gold['reference_reward']:.2f} → {on_gold['reward']:.2f}", f"{on_gold['kl']:.2f}",
            f"**{on_gold['fraction']:.3f}**"])
        accuracies.append(accuracy)
    means = [
        spread(accuracies, 3), "", "", f"**{spread(of(result, 'ppo', 'fraction', 'learned'), 3)}**",
        spread(of(result, "ppo", "reward"), 2), spread(of(result, "ppo", "fraction"), 3),
        spread(of(result, "ppo-gold", "reward"), 2), "",
        f"**{spread(of(result, 'ppo-gold', 'fraction'), 3)}**"]
    return table([*rows, ["mean ± sd over seeds", *means]])


def grpo_table(result: dict) -> str:
    rows = []
    for name, text in ROWS.items():
        flags = RUNS[name].partition("SFT ")[2]
        rows.append([
            text, f"`{flags}`" if flags else "none", spread(of(result, name, "reward"), 2),
            spread(of(result, name, "kl"), 2), f"**{spread(of(result, name, 'fraction'), 3)}**"])
    return table(rows)


def main(args: Args) -> dict:
    result = {"versions": {name: version(name) for name in ("torch", "transformers")}}
    result["args"] = {name: x for name, x in asdict(args).items() if name not in ("folder", "output")}
    result["seeds"] = {}
    for seed in args.seeds:
        runs = runs_of(args, seed)
        names = re.sub(r"\W+", "-", " ".join(args.only))
        file = Path(args.folder) / f"seed{seed}" / f"judged-{names}.json"
        found = kept(file, lambda seed=seed: judged(args, seed))
        result["seeds"][str(seed)] = {"runs": runs, "judged": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.only == list(RUNS) and len(args.seeds) > 1:
        print(dpo_table(result), ppo_table(result), grpo_table(result), sep="\n\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
