"""Is my run healthy, and what should it look like? Its curves over those of five seeds, and a verdict in words.

    python benchmarks/curves.py runs/ppo                     one run, finished or not
    python benchmarks/curves.py runs/ppo runs/other runs/dpo several, in one picture
    python benchmarks/curves.py --record runs/curves         makes the reference and the sick runs again

Reads metrics.jsonl of each run folder. Two things are looked at:
1. Signs of sickness, which hold for any model and data: each with its figure, its limit and what to do. They are
   in the tables below, `SIGNS`.
2. The band: mean of five seeds of the run without flags, plus and minus `WIDTH` standard deviations, from
   benchmarks/results/curves/. It is that of the embedded world, and a run is compared with it only if it has as
   many tokens a step. A run leaves the band where `ROW` parts in a row, of 25, are outside.

Curves are means over the 25 parts of a run. Needs matplotlib for the picture, which is curves.png in the first
run's folder; words come without it.
"""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from common import fail  # noqa: E402
from gold_reward import gold_reward  # noqa: E402

CURVES = ROOT / "benchmarks" / "results" / "curves"
SEEDS = (1, 2, 3, 4, 5)  # of the band
PARTS = 25  # of a run
WIDTH = 4  # half the band's width, in standard deviations between seeds
ROW = 3  # so many parts in a row outside: the run leaves the band
WATCH = {  # script -> what to watch. The first one tells the scripts apart
    "sft": ("mean_token_accuracy", "loss", "grad_norm"),
    "reward_model": ("margin", "loss", "accuracy", "grad_norm"),
    "dpo": ("rewards/margins", "loss", "rewards/accuracies", "rewards/chosen"),
    "ppo": ("objective/scores", "objective/kl", "policy/entropy", "completions/mean_length"),
    "grpo": ("reward", "kl", "entropy", "completions/mean_length"),
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # folders of runs
    output: str = ""  # picture; empty: curves.png in the first run's folder
    record: str = ""  # folder of the runs behind the reference: makes those that are missing, and writes them


class Log(NamedTuple):
    """A run: its script, the rows of training and of evaluations, the last step."""

    script: str
    training: list[dict]
    evaluations: list[dict]
    last: int

    def parts(self, name, last=0) -> dict[int, float]:
        """{part: mean of this metric}, a part being 1/25 of `last` steps, by default of the run's own."""
        values = {}
        for row in self.training:
            if name in row:
                part = (row["step"] - 1) * PARTS // (last or self.last)
                values.setdefault(part, []).append(row[name])
        return {part: fmean(values[part]) for part in sorted(values)}

    def start(self, name) -> float:
        """The metric before training, or in its first part."""
        first = self.evaluations[0] if self.evaluations else {}
        if f"eval/{name}" in first:
            return first[f"eval/{name}"]
        return next(iter(self.parts(name).values()), math.nan)

    def end(self, name) -> float:
        """Its mean over the last fifth of the run."""
        values = list(self.parts(name).values())
        return fmean(values[-max(len(values) // 5, 1) :]) if values else math.nan


def read(path) -> Log:
    """The log of a run folder, or of a .jsonl file."""
    path = Path(path)
    file = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
    if not file.exists():
        fail(f"{file} does not exist: pass the folder of a run")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    training = [row for row in rows if "learning_rate" in row]
    scripts = [script for script, (name, *_) in WATCH.items() if training and name in training[0]]
    if len(scripts) != 1:
        fail(f"{file}: no training step of sft.py, reward_model.py, dpo.py, ppo.py or grpo.py")
    evaluations = [row for row in rows if "learning_rate" not in row]
    return Log(scripts[0], training, evaluations, training[-1]["step"])


# ---- Signs of sickness ----


def gain_in_noise(log, name) -> float:
    """Last fifth less first part, in standard deviations of what a part does from one to the next."""
    values = list(log.parts(name).values())
    jumps = [b - a for a, b in zip(values[len(values) // 2 :], values[len(values) // 2 + 1 :])]
    noise = math.sqrt(fmean(jump * jump for jump in jumps) / 2) if jumps else 0.0
    return (log.end(name) - values[0]) / max(noise, 1e-9)


def worst(log, name) -> float:
    return max(log.parts(name).values(), default=math.nan)


class Sign(NamedTuple):
    """A figure of a run with its limit. It is sick where the figure is on the wrong side; NaN: not logged."""

    sickness: str
    what: str
    figure: Callable[[Log], float]
    healthy: str  # "below" or "above"
    limit: float
    advice: str

    def is_sick(self, log) -> bool:
        x = self.figure(log)
        return x >= self.limit if self.healthy == "below" else x <= self.limit


SIGNS = {}  # script -> its signs, the most telling ones first
