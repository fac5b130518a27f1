"""CPU seconds of the commands in the README's table "What you should see", one after the other.

    python benchmarks/first_minutes.py

Each is a process of its own, in a copy of the project without runs, and starts from what those before it have
made. Of several rounds the smallest time of a command counts: other work on the machine can only add to it.
Three to six minutes a round.
"""

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    rounds: int = 3
    output: str = "benchmarks/results/first_minutes.json"


def commands() -> list[str]:
    """Those of the table, in its order."""
    (_, section) = (ROOT / "README.md").read_text().split("\n## What you should see\n")
    return re.findall(r"^\| `(python [^`]+)` \|", section.partition("\n## ")[0], re.MULTILINE)


def cpu_seconds(command: str, folder) -> float:
    """Of a command that runs in this folder, and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, *words = shlex.split(command)
    subprocess.run([sys.executable, *words], cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_all(seconds: dict):
    """Every command once, in a new copy; the smaller of two times of a command stays in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "tests"))
        for command in commands():
            this_time = round(cpu_seconds(command, copy), 1)
            seconds[command] = min(seconds.get(command, this_time), this_time)


def main(args: Args) -> dict:
    result = {"torch": version("torch"), "transformers": version("transformers"), "rounds": args.rounds}
    result["cpu_seconds"] = {}
    for _ in range(args.rounds):
        run_all(result["cpu_seconds"])
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    for command, seconds in result["cpu_seconds"].items():
        print(f"{seconds:6.1f} s  {command}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
