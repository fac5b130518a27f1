"""Do the scripts learn from real rows? A small real model, on pairs of texts and a learned reward.

    python benchmarks/real_data.py --shared ../shared

The model is stories260K, Karpathy's Llama of 260,032 parameters, trained on TinyStories. Neither it nor the
data sets are part of this repository: --shared is a folder with models/stories260K and data/*.jsonl. The
commands are in RUNS, below. Each script has one setting for all of its runs, SETTINGS, which is not tuned:
nothing is chosen on the rows that are reported.

tinystories_pref  the beginning of a story; its own continuation is chosen over a generated one
polite_1100       an instruction; the politer of two answers is chosen

Beside them stands the linear model of pretrained.py, on the words of the completions, after the same rows.
Runs that have finished are kept in --folder, so a command that was stopped can be repeated. The five runs of
the README took 8 minutes of one CPU core.
"""

import json
import math
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims import kept  # noqa: E402
from common import fail  # noqa: E402
from logprob import version  # noqa: E402
from pretrained import linear_baseline  # noqa: E402

SPLITS = ("train", "test")
PAIRS = "--learning-rate 5e-4 --batch-size 32 --micro-batch-size 16"
POLICY = ("--reward {folder}/reward_stories/model --max-new-tokens 64 --missing-eos-penalty 0 --kl-coef 0.2 "
          "--learning-rate 2e-4 --batch-size 64 --num-minibatches 4 --total-episodes 2560 --eval-samples 256")
SETTINGS = {
    "reward_model.py": f"--num-train-epochs 2 {PAIRS}",
    "dpo.py": f"--num-train-epochs 2 --beta 0.3 {PAIRS}",
    "ppo.py": f"--critic-learning-rate 5e-4 {POLICY}",
    "grpo.py": POLICY}
RUNS = {  # name -> command, to which --model, SETTINGS and --output-dir are added
    "reward_stories": "reward_model.py --dataset {data}/tinystories_pref.train.jsonl",
    "dpo_stories": "dpo.py --dataset {data}/tinystories_pref.train.jsonl",
    "reward_polite": "reward_model.py --dataset {data}/polite_1100.train.jsonl",
    "dpo_polite": "dpo.py --dataset {data}/polite_1100.train.jsonl",
    "ppo": "ppo.py --dataset {folder}/prompts.train.jsonl",
    "grpo": "grpo.py --dataset {folder}/prompts.train.jsonl",
    "grpo_k1": "grpo.py --kl-in reward --dataset {folder}/prompts.train.jsonl"}
TINY = {  # what a test changes, beside the number of rows
    "reward_model.py": "--num-train-epochs 1 --batch-size 8",
    "dpo.py": "--num-train-epochs 1 --batch-size 8 --max-new-tokens 8",
    "ppo.py": "--batch-size 8 --total-episodes 32 --max-new-tokens 8 --eval-samples 8",
    "grpo.py": "--batch-size 8 --total-episodes 32 --max-new-tokens 8 --eval-samples 8"}


@dataclass
class Args:
    shared: str = "../shared"  # folder with models/stories260K and data/*.jsonl
    runs: list[str] = field(default_factory=lambda: list(RUNS))  # names; grpo and ppo need reward_stories
    tiny: bool = False  # the sizes of a test
    folder: str = "runs/real_data"  # of the runs
    output: str = "benchmarks/results/real_data.json"


# ---- Rows ----


def read(file: Path) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_pairs(args: Args) -> dict[str, list[list[dict]]]:
    """Data set -> its training and its held-out rows."""
    pairs = {}
    for name in ("tinystories_pref", "polite_1100"):
        parts = [read(Path(args.shared) / "data" / f"{name}.{split}.jsonl") for split in SPLITS]
        pairs[name] = [rows[:8] for rows in parts] if args.tiny else parts
    return pairs


def write_files(args: Args, pairs: dict) -> None:
    """Write the prompts of the stories, each once, into --folder; with --tiny the pairs too."""
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(SPLITS, pairs["tinystories_pref"]):
        prompts = dict.fromkeys(row["prompt"] for row in rows)
        write(folder / f"prompts.{split}.jsonl", [{"prompt": prompt} for prompt in prompts])
    if args.tiny:
        for name, parts in pairs.items():
            for split, rows in zip(SPLITS, parts):
                write(folder / f"{name}.{split}.jsonl", rows)


# ---- Runs ----


def train(args: Args, name: str) -> dict:
    """Run a command of RUNS once: {"command", "held_out": rows, "cpu_seconds"}."""
    script, *flags = shlex.split(RUNS[name])
    words = [script, "--model", "{shared}/models/stories260K", *flags, *shlex.split(SETTINGS[script]),
             "--eval-every", "0", "--output-dir", f"{{folder}}/{name}"]

    def run():
        shutil.rmtree(Path(args.folder) / name, ignore_errors=True)  # what a killed run left
        data = args.folder if args.tiny else f"{args.shared}/data"
        _, *flags = [word.format(shared=args.shared, folder=args.folder, data=data) for word in words]
        if args.tiny:
            flags += TINY[script].split()
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(done.stdout, flush=True)
        seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        shown = " ".join(words).format(shared=Args.shared, folder=Args.folder, data=f"{Args.shared}/data")
        held_out = int(re.search(r"(\d+) held out", done.stdout)[1])
        return {"command": f"python {shown}", "held_out": held_out, "cpu_seconds": round(seconds, 1)}

    return kept(Path(args.folder) / f"{name}.json", run)


def mean_and_error(values) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))]


def of_samples(rows: list[dict], beta: float) -> dict:
    """Means with their standard errors over the responses of one evaluation."""
    scores = [row.get("score", row.get("reward")) for row in rows]
    kls = [row["kl"] for row in rows]
    objective = [score - beta * kl for score, kl in zip(scores, kls)]
    columns = {"score": scores, "kl": kls, "objective": objective}
    return {name: mean_and_error(values) for name, values in columns.items()}


def measured(folder: Path, held_out: int) -> dict:
    """First and last evaluation of a run, with errors, and three samples of a policy before and after."""
    evaluations = [row for row in read(folder / "metrics.jsonl") if any("eval/" in key for key in row)]
    result = {"before": evaluations[0], "after": evaluations[-1]}
    beta = json.loads((folder / "args.json").read_text()).get("kl_coef")
    accuracy = result["after"].get("eval/rewards/accuracies")
    if accuracy is not None:  # of dpo.py; reward_model.py logs an interval of its own
        result["standard_error"] = math.sqrt(accuracy * (1 - accuracy) / held_out)
    if beta is not None:  # of a policy
        samples = read(folder / "samples.jsonl")
        for when in ("before", "after"):
            rows = [row for row in samples if row["step"] == result[when]["step"]]
            result[f"samples_{when}"] = rows[:3]
            result[f"means_{when}"] = of_samples(rows, beta)
    return result


def main(args: Args) -> dict:
    if not (Path(args.shared) / "models" / "stories260K").is_dir():
        fail(f"--shared {args.shared}: there is no models/stories260K in it")
    pairs = read_pairs(args)
    write_files(args, pairs)
    versions = {name: version(name) for name in ("torch", "transformers")}
    result = {"versions": versions, "linear": {}, "runs": {}}
    for name, parts in pairs.items():
        result["linear"][name] = linear_baseline(*parts)
    for name in args.runs:
        run = train(args, name)
        result["runs"][name] = run | measured(Path(args.folder) / name, run["held_out"])
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
