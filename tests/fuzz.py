"""Broken and odd files for all six scripts: python tests/fuzz.py [--cases 300] [--seed 1] [--only NAME]

Each case is a folder with a user's files, one of them odd, and a tiny run on it. It has to end in one of two ways:

    refused   exit code 2 and one line on stderr, "error: ...", that names a file, a row or a flag
    ran       exit code 0, finite numbers in every log, finite weights in model/, and the texts of all rows read

in less than 20 seconds, and whichever way, the user's files and any run that was in --output-dir are as before. A
case is a function of the seed and its name, so `--only columns/sft/3` runs it again, whatever --cases says.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import torch
from fuzz_cases import KINDS, REWARD, REWARDS, SAMPLED, Case, World, good_rows, lines_of
from safetensors.torch import load_file
from tiny_runs import SCRIPTS

import bandit_bt
import common

LIMIT = 20.0  # seconds for a case

# ---- Running a case ----


class Hang(BaseException):
    """Raised by the alarm."""


@contextlib.contextmanager
def as_it_was(folder):
    """A process of its own, nearly: what user code may change is put back. Yields what it printed."""
    streams = sys.stdin, sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    path, modules, limit, cwd = list(sys.path), set(sys.modules), sys.getrecursionlimit(), os.getcwd()
    printed = types.SimpleNamespace(
        out=io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True),
        err=io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True))
    sys.stdin, sys.stdout, sys.stderr = io.StringIO("y\n" * 20), printed.out, printed.err
    os.chdir(folder)
    try:
        yield printed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.startswith(str(folder).replace(".", "_")):
                del sys.modules[name]
        sys.setrecursionlimit(limit)
        os.chdir(cwd)


@contextlib.contextmanager
def texts_given(tokenizer):
    """A list that gets the texts of all token ids which a model is given."""
    texts = []

    def record(module, inputs):
        if isinstance(module, torch.nn.Embedding) and inputs[0].dim() == 2 and inputs[0].shape[1] > 1:
            texts.extend(tokenizer.batch_decode(inputs[0].tolist()))

    make = common.Rows.__init__

    def record_rows(self, input_ids, needed):
        make(self, input_ids, needed)
        for place, own in zip(self.place, needed):
            ids = self.ids[0, place[: own.nonzero().max() + 1]]  # from where the model is given them
            texts.append(tokenizer.decode(ids.tolist()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    common.Rows.__init__ = record_rows
    try:
        yield texts
    finally:
        hook.remove()
        common.Rows.__init__ = make


def files_in(*folders) -> dict[Path, bytes]:
    """Every readable file of these folders."""
    contents = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and os.access(path, os.R_OK):
                contents[path] = path.read_bytes()
    return contents


def run_main(case):
    """(exit code, or an exception; what it returned; stdout, stderr, texts that the model was given)."""
    main = bandit_bt.main if case.target == "bandit_bt" else None
    if main is None:
        main = SCRIPTS["reward_model" if case.target == "score" else case.target].module.main
    hung = []

    def alarm(number, frame):
        hung.append(number)
        raise Hang

    end, result = 0, None
    with as_it_was(case.folder) as printed, texts_given(case.world.tokenizer) as texts:
        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, LIMIT, 1.0)
        faulthandler.dump_traceback_later(3 * LIMIT, exit=True, file=sys.__stderr__)
        try:
            result = main(case.args())
        except SystemExit as stop:
            end = stop.code
        except BaseException as error:  # noqa: B036  what a user would see as a traceback
            end = error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
    printed = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (printed.out, printed.err)]
    return Hang() if hung else end, result, *printed, texts


def no_number(name):
    raise ValueError(f"{name} is no JSON")


def numbers_in(value):
    if isinstance(value, float):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)


def fault_of_run(case, result) -> str:
    """What is wrong with the files of a run that ended with exit code 0, or ""."""
    if not all(map(math.isfinite, numbers_in(result))):
        return f"returned {result}"
    folder = Path(case.folder, case.args().output_dir)
    if case.target == "score" and case.flags.get("score") != "":
        scores = sorted(Path(case.args().score).parent.glob("*.scores.jsonl"))
        if not scores or not scores[-1].stat().st_size:
            return "no file of scores"
        for line in scores[-1].read_text().splitlines():
            row = json.loads(line)
            if not math.isfinite(row["score"]) or not math.isfinite(row["reward"]):
                return f"scored {line[:80]}"
        return ""
    names = ["args.json", "metrics.jsonl", "samples.jsonl", "model/model.safetensors", "model/config.json"]
    if case.target == "bandit_bt":
        names = ["args.json", "metrics.json", "leaderboard.json", "leaderboard.csv"]
    for name in names:
        path = folder / name
        if not path.exists():
            return f"no {name}"
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for line in lines:
                try:
                    row = json.loads(line, parse_constant=no_number)
                except ValueError as error:
                    return f"{name}: {error}"
                if not all(map(math.isfinite, numbers_in(row))):
                    return f"{name}: {line[:80]}"
    for path in folder.glob("*/model.safetensors"):
        for name, weight in load_file(path).items():
            if not weight.isfinite().all():
                return f"{path.parent.name}: {name} is not finite"
    return ""


def fault_of_refusal(case, err) -> str:
    """What is wrong with the stderr of a refusal, or ""."""
    if not err.startswith("error: ") or err.count("\n") != 1 or not err.endswith("\n"):
        return "more or less than one line"
    if "Traceback" in err or len(err) > 2000:
        return f"a line of {len(err)} characters"
    for word in case.words:
        if word not in err:
            return f"does not name {word!r}"
    if "--" not in err and not any(name in err for name in (".json", ".py", "rows", "good", "tokenizer")):
        return "names no file, row or flag"
    return ""


def lost(case, before, after, went_on) -> str:
    """A file that was there and is not as it was; a run may end, and cut its logs behind a checkpoint."""
    output = Path(case.folder, case.args().output_dir)
    for path, content in before.items():
        own = output in path.parents and case.flags.get("resume")
        if own and went_on:
            continue
        same = after.get(path) == content
        if own and path.name in ("metrics.jsonl", "samples.jsonl") and path in after:
            same = same or content.startswith(after[path]) or after[path].startswith(content)
        if not same:
            return f"{path.name} was {'changed' if path in after else 'removed'}"
    return ""


@dataclasses.dataclass
class Outcome:
    name: str
    label: str  # refused or ran; or what is wrong: TRACEBACK, HANG, LOST, EXECUTED, EXIT, NOISE, NONSENSE, STRICT
    detail: str
    seconds: float

    @property
    def is_good(self):
        return self.label in ("refused", "ran")

    def __str__(self):
        return f"{self.name:62} {self.label:9} {self.seconds:4.1f} s  {self.detail}"


def judge(case, before, end, result, out, err, texts) -> tuple[str, str]:
    """(label, detail) of an ended run."""
    line = err.strip().splitlines()[-1][:220] if err.strip() else ""
    if isinstance(end, Hang):
        return "HANG", f"more than {LIMIT:g} s"
    for path in case.absent:
        if path.exists():
            return "EXECUTED", "code of the model's folder or of a checkpoint was run"
    damage = lost(case, before, files_in(case.folder, case.world.folder), end in (0, None))
    finished = Path(case.folder, case.args().output_dir, "model")
    was_finished = any(finished in path.parents for path in before)
    if end == 2 and finished.exists() and not was_finished and case.target != "score":
        return "LATE", f"model/ was written already: {line}"
    if damage:
        return "LOST", f"{damage}; {line}"
    if isinstance(end, BaseException):
        frames = traceback.extract_tb(end.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent == Path(bandit_bt.__file__).parent]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        with contextlib.suppress(BaseException):
            return "TRACEBACK", " ".join(f"{place} {type(end).__name__}: {end}".split())[:220]
        return "TRACEBACK", f"{place} {type(end).__name__}"
    if end == 2:
        fault = fault_of_refusal(case, err)
        if fault:
            return "NOISE", f"{fault}: {line}"
        return ("STRICT" if case.wanted == "ran" else "refused"), line
    if end not in (0, None):
        return "EXIT", f"code {end}: {line}"
    if "Traceback" in err + out:
        return "TRACEBACK", "printed, and went on"
    if case.wanted == "refused":
        return "NONSENSE", "ran, and should have been refused"
    fault = fault_of_run(case, result)
    given = "\n".join(texts)
    for text in case.seen:
        if text not in given:
            fault = fault or f"ran, but {text!r} never reached the model"
    for text in case.unseen:
        if text in given:
            fault = fault or f"ran, and {text!r} reached the model"
    return ("NONSENSE", fault) if fault else ("ran", line and f"stderr: {line}")


def cases_of(seed, number, only="") -> list[tuple[str, str, str]]:
    """(name, kind, target) of this number of cases, in rounds that the seed shuffles: each kind for each of its
    targets, and each reward file for one of the two scripts, in the next round for the other.
    """
    rounds, names = 0, []
    last = only.rpartition("/")[2]
    while len(names) < number or (last.isdecimal() and rounds <= int(last)):
        cases = []
        for kind_name, (targets, times, _) in KINDS.items():
            for target in targets:
                for k in range(times):
                    cases.append((f"{kind_name}/{target}/{rounds * times + k}", kind_name, target))
        for k, reward in enumerate(REWARDS if rounds < 2 else ()):
            target = SAMPLED.split()[(k + rounds) % 2]
            cases.append((f"rewards/{target}/{reward}", "rewards", target))
        names += random.Random(f"{seed} {rounds}").sample(cases, len(cases))
        rounds += 1
    if only in [name for name, *_ in names]:
        return [case for case in names if case[0] == only]
    return [case for case in names[:number] if only in case[0]]


def run_case(world, folder, seed, name, kind_name, target) -> Outcome:
    """Make a case's files in this folder, run it, and judge."""
    folder.mkdir(parents=True)
    case = Case(name, target, folder, world, random.Random(f"{seed} {name}"))
    case.write("good.jsonl", lines_of(good_rows(target, "text", random.Random(0))))
    case.write("reward.py", REWARD)
    KINDS[kind_name][2](case)
    before = files_in(folder, world.folder)
    began = time.time()
    label, detail = judge(case, before, *run_main(case))
    name = f"{name} ({', '.join(case.notes)})" if case.notes else name
    return Outcome(name, label, detail.replace(str(folder), ""), time.time() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a case, or part of the names of several")
    parser.add_argument("--keep", default="", help="leave the files of all cases in this folder")
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    faulthandler.enable(sys.__stderr__)
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary).resolve()
        world = World(folder / "world")
        for number, case in enumerate(cases_of(args.seed, args.cases, args.only)):
            outcome = run_case(world, folder / f"case{number:03}", args.seed, *case)
            counts[outcome.label] += 1
            print(outcome, flush=True)
            if not args.keep:
                shutil.rmtree(folder / f"case{number:03}", ignore_errors=True)
    print(", ".join(f"{count} {label}" for label, count in counts.most_common()))
    bad = sum(count for label, count in counts.items() if label not in ("refused", "ran"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
