"""Do the scripts learn from real rows? A small real model, on preferences and rankings of people and models.

    python benchmarks/real_data.py --shared ../shared

The model is stories260K, Karpathy's Llama of 260,032 parameters, trained on TinyStories. Neither it nor the
data sets are part of this repository: --shared is a folder with models/stories260K and data/*.jsonl. The
commands are in RUNS, below. Each script has one setting for all of its runs, SETTINGS, which is not tuned:
nothing is chosen on the rows that are reported.

tinystories_pref      the beginning of a story; its own continuation is chosen over one that the model sampled
polite_1100           an instruction; the polite answer is chosen over the rude one
qa_feedback_rankings  a question with four answers, compared two by two by people; ties are allowed

Runs that have finished are kept in --folder, so a command that was stopped can be repeated. One CPU core, a
quarter of an hour.
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
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims import kept  # noqa: E402
from common import fail  # noqa: E402
from logprob import version  # noqa: E402

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
    "grpo": "grpo.py --dataset {folder}/prompts.train.jsonl",
    "dpo_stories": "dpo.py --dataset {data}/tinystories_pref.train.jsonl",
    "reward_polite": "reward_model.py --dataset {data}/polite_1100.train.jsonl",
    "ppo": "ppo.py --dataset {folder}/prompts.train.jsonl",
    "grpo_k1": "grpo.py --kl-in reward --dataset {folder}/prompts.train.jsonl",
    "dpo_polite": "dpo.py --dataset {data}/polite_1100.train.jsonl",
    "rankings": "reward_model.py --dataset {folder}/rankings.train.jsonl",
    "rankings_pl": "reward_model.py --loss-type plackett_luce --dataset {folder}/rankings.train.jsonl"}
TINY = {  # what a test changes, beside the number of rows
    "reward_model.py": "--num-train-epochs 1 --batch-size 8",
    "dpo.py": "--num-train-epochs 1 --batch-size 8 --max-new-tokens 8",
    "ppo.py": "--batch-size 8 --total-episodes 32 --max-new-tokens 8 --eval-samples 8",
    "grpo.py": "--batch-size 8 --total-episodes 32 --max-new-tokens 8 --eval-samples 8"}


@dataclass
class Args:
    shared: str = "../shared"  # folder with models/stories260K and data/*.jsonl
    tiny: bool = False  # the sizes of a test
    folder: str = "runs/real_data"  # of the runs
    output: str = "benchmarks/results/real_data.json"


# ---- Rows ----


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranking_of(row: dict) -> dict:
    """A row of qa_feedback_rankings as prompt, completions and ranking: by wins, a tie half a win."""
    judged = row["pairwise_1v2_1v3_1v4_2v3_2v4_3v4"]  # 1: the first is better, 2: the second, 0: a tie
    wins = [0.0] * 4
    for (i, j), better in zip(combinations(range(4), 2), judged):
        wins[i] += {1: 1.0, 2: 0.0, 0: 0.5}[better]
        wins[j] += {1: 0.0, 2: 1.0, 0: 0.5}[better]
    ranking = [1 + sum(other > own for other in wins) for own in wins]
    completions = [" " + answer for answer in row["responses"]]
    return {"prompt": row["prompt"], "completions": completions, "ranking": ranking}


def write_files(args: Args) -> str:
    """Write prompts and rankings into --folder; with --tiny 8 rows of the rest too. Returns RUNS' {data}."""
    folder, data = Path(args.folder), Path(args.shared) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    size = 8 if args.tiny else None
    for split in ("train", "test"):
        for name in ("tinystories_pref", "polite_1100"):
            rows = read(data / f"{name}.{split}.jsonl")[:size]
            if args.tiny:
                write(folder / f"{name}.{split}.jsonl", rows)
            if name == "tinystories_pref":
                prompts = dict.fromkeys(row["prompt"] for row in rows)
                write(folder / f"prompts.{split}.jsonl", [{"prompt": prompt} for prompt in prompts])
    rankings = [ranking_of(row) for row in read(data / "qa_feedback_rankings.jsonl")]
    write(folder / "rankings.train.jsonl", rankings[:400][:size])
    write(folder / "rankings.test.jsonl", rankings[400:][:size])
    return args.folder if args.tiny else str(data)


# ---- Runs ----


def train(args: Args, name: str, command: str, data: str) -> dict:
    """Run a command once: {"command", "held_out": rows, "cpu_seconds"}."""
    script, *flags = shlex.split(command)
    words = [script, "--model", "{shared}/models/stories260K", *flags, *shlex.split(SETTINGS[script]),
             "--eval-every", "0", "--output-dir", f"{{folder}}/{name}"]

    def run():
        shutil.rmtree(Path(args.folder) / name, ignore_errors=True)  # what a killed run left
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
    data = write_files(args)
    result = {"versions": {name: version(name) for name in ("torch", "transformers")}, "runs": {}}
    for name, command in RUNS.items():
        run = train(args, name, command, data)
        run |= measured(Path(args.folder) / name, run["held_out"])
        result["runs"][name] = run
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
