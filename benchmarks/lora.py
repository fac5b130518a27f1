"""How much of full training do adapters of rank 8 reach, and what do they miss?

    pip install peft
    python benchmarks/lora.py

On the embedded world, from two SFT models: that of the defaults, with 64 dimensions, and one of 192. The
commands are in RUNS, below; all policies are judged by the gold reward, as by benchmarks/frontier.py, on
held-out prompts. In a row "without the word vectors" all other weights are trained: the word vectors, which
are the head too, stay as they are, as under adapters.

Runs that have finished are kept in --folder, so a command that was stopped can be repeated. The learning
rates of the 192 dimensions were chosen among the two shown of each, on seed 1 and the same prompts. About 20
minutes of one CPU core. Adapters: arXiv:2106.09685.
"""

import contextlib
import importlib.util
import json
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import dpo  # noqa: E402
import frontier  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402
from claims import kept, shown  # noqa: E402
from common import fail  # noqa: E402
from logprob import version  # noqa: E402

SCRIPTS = {"sft.py": sft, "reward_model.py": reward_model, "dpo.py": dpo, "ppo.py": ppo, "grpo.py": grpo}
WITHOUT = " without the word vectors"  # behind a command: all other weights are trained
INTERMEDIATE = {64: 192, 192: 512}  # hidden size -> that of the feed-forward layers
STARTS = {64: "sft.py", 192: "sft.py --learning-rate 2e-3"}
RUNS = {  # hidden size -> commands; those with a star are run with every seed, the others with the first
    192: [
        "* grpo.py --kl-in reward --learning-rate 3e-4",
        "* grpo.py --kl-in reward --lora-rank 8",
        "grpo.py --kl-in reward --learning-rate 3e-4" + WITHOUT,
        "grpo.py --kl-in reward",
        "grpo.py --kl-in reward --lora-rank 8 --learning-rate 2e-3"],
    64: [
        "grpo.py --kl-in reward",
        "grpo.py --kl-in reward" + WITHOUT,
        "grpo.py --kl-in reward --lora-rank 8",
        "grpo.py --kl-in reward --lora-rank 8 --learning-rate 3e-3",
        "grpo.py --kl-in reward --lora-rank 8 --learning-rate 1e-2",
        "grpo.py --lora-rank 8",
        "ppo.py --lora-rank 8",
        "dpo.py --lora-rank 8 --learning-rate 2e-4"]}
TINY = {  # sizes of a test
    "sft.py": "--num-train-epochs 0 --dataset data/demonstrations_test.jsonl",
    "reward_model.py": "--num-train-epochs 0 --dataset data/preferences_test.jsonl",
    "dpo.py": "--num-train-epochs 0 --dataset data/preferences_test.jsonl",
    "ppo.py": "--total-episodes 128 --eval-samples 12",
    "grpo.py": "--total-episodes 128 --eval-samples 12"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # of GRPO; the SFT models have the first
    reference_samples: int = 4000  # a held-out prompt, for the frontier
    policy_samples: int = 300  # a held-out prompt
    tiny: bool = False  # the sizes of a test
    folder: str = "runs/lora"  # of the runs
    output: str = "benchmarks/results/lora.json"


# ---- Runs ----


@contextlib.contextmanager
def fixed_word_vectors():
    """Meanwhile grpo.py leaves them, and the head, as they are."""
    load_model = grpo.load_model

    def load(*args):
        model, *others = load_model(*args)
        model.get_input_embeddings().requires_grad_(False)
        return model, *others

    grpo.load_model = load
    yield
    grpo.load_model = load_model


def train(args: Args, folder: Path, command: str) -> dict:
    """Run a command in this process, once: {"command", "cpu_seconds"}."""
    command, without, _ = command.removeprefix("* ").partition(WITHOUT)
    command += f" --output-dir {folder}"

    def run():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        script, *flags = command.split()
        module = SCRIPTS[script]
        if args.tiny:
            flags += TINY[script].split()
        began = time.process_time()
        with fixed_word_vectors() if without else contextlib.nullcontext():
            module.main(tyro.cli(module.Args, args=flags))
        line = f"python {command}".replace(args.folder, Args.folder)
        return {"command": line + without, "cpu_seconds": time.process_time() - began}

    return kept(folder / "cost.json", run)


def start_of(args: Args, size: int) -> tuple[str, dict]:
    """(the SFT model of this hidden size, its run). Its configuration is data/model's but for the sizes."""
    shape = Path(args.folder) / f"{size}-start"
    shutil.copytree(ROOT / "data" / "model", shape, dirs_exist_ok=True)
    config = json.loads((shape / "config.json").read_text())
    config |= {"hidden_size": size, "intermediate_size": INTERMEDIATE[size]}
    (shape / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    folder = Path(args.folder) / f"{size}-sft"
    return f"{folder}/model", train(args, folder, f"{STARTS[size]} --seed {args.seeds[0]} --model {shape}")


def policies_of(args: Args, size: int, start: str) -> dict[str, dict]:
    """folder of a policy -> its run, with "run", the command of RUNS, and "seed"."""
    policies = {}
    for run in RUNS[size]:
        flags = f" --model {start}"
        if run.startswith("ppo.py"):
            reward = Path(args.folder) / f"{size}-reward_model"
            train(args, reward, f"reward_model.py --model {start}")
            flags += f" --reward {reward}/model"
        for seed in args.seeds if run.startswith("*") else args.seeds[:1]:
            name = re.sub(r"\W+", "-", run.replace(".py", "").strip("* "))
            folder = Path(args.folder) / f"{size}-{name}-seed{seed}"
            cost = train(args, folder, run.replace(".py", f".py --seed {seed}{flags}"))
            policies[f"{folder}/model"] = {"run": run.strip("* "), "seed": seed, **cost}
            print(f"{size}: {cost['command']}: {cost['cpu_seconds']:.0f} s", flush=True)
    return policies


# ---- Figures ----


def main(args: Args) -> dict:
    if importlib.util.find_spec("peft") is None:
        fail("adapters need `pip install peft`")
    torch.set_num_threads(1)
    result = {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}}
    result["args"] = {name: x for name, x in asdict(args).items() if name not in ("folder", "output")}
    result["starts"], result["policies"] = [], []
    for size in RUNS:
        start, run = start_of(args, size)
        policies = policies_of(args, size, start)
        measured = frontier.main(frontier.Args(
            reference=start, policies=list(policies), reference_samples=args.reference_samples,
            policy_samples=args.policy_samples))
        (judged,) = measured.values()
        result["starts"].append({"size": size, "reward": judged["reference_reward"], **run})
        for name, row in policies.items():
            result["policies"].append({"size": size, **row, **judged["policies"][name]})
        every = result["starts"] + result["policies"]
        result["cpu_seconds"] = round(sum(run["cpu_seconds"] or 0 for run in every))
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return result


def table(result: dict) -> str:
    """Markdown: one row a command; of several seeds the means, with their standard errors."""
    columns = "dimensions | run | seeds | fraction of the optimum | KL | gold reward | CPU s"
    lines = [f"| {columns} |", "|---:|---|---:|---:|---:|---:|---:|"]
    groups = {}
    for policy in result["policies"]:
        groups.setdefault((policy["size"], policy["run"]), []).append(policy)
    for (size, run), group in groups.items():
        cells = []
        for key, digits in (("fraction", 3), ("kl", 2), ("reward", 2)):
            values = [policy[key] for policy in group]
            one = f"{values[0]:.{digits}f} ± {group[0][key + '_se']:.{digits}f}"
            cells.append(shown(values, digits) if len(values) > 1 else one)
        seconds = [policy["cpu_seconds"] for policy in group]
        mean = "–" if None in seconds else f"{sum(seconds) / len(group):.0f}"
        command, without, _ = run.partition(WITHOUT)
        cells = [f"`{command}`{without}", str(len(group)), *cells, mean]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
