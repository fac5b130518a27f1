"""kill -9 at random moments: a run that is continued ends as one that nothing interrupts, to the last bit.

    python tests/kills.py                         25 kills, five of each training script: a line each
    python tests/kills.py --kills 100 --seed 2    others
    python tests/kills.py --everywhere            in their place: before each file operation, within each file
    python tests/kills.py --scripts ppo grpo      of these scripts only

Each run has nine steps, evaluations after every third and a checkpoint after every one or two. It is killed
at a random moment of the CPU time that a whole run takes: anywhere, within the last 15 %, or right behind a
new checkpoint. Then it is continued as a user would: by --resume, or anew where there is no checkpoint yet. One in
three is killed once more on its way. What it leaves in the end must be what the whole run leaves: the same
files, none left over, with the same bytes, timings and the flag --resume aside. A model/ must be whole
whenever there is one.

--everywhere stops a run before it opens a file to write, before it renames or removes one, and in the middle of
each file that it writes, once early and once late in the run: there the kernel ends it when a file reaches
half its size.

A run is a fork of this process, which has torch imported: so a kill takes a second or two. Exit code 1 if
anything differs.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
from tiny_runs import SCRIPTS, launch, make_starts, tiny_args
from tqdm import tqdm

FLAGS = {"epochs": 3, "eval_every": 3}
STEPS = 9
PAUSE = 0.0005  # seconds between two looks at a running child
KINDS = {  # of moments, with the shares of the whole run between which they are drawn
    "early": (0, 0.5), "checkpoint": (0, 0.75), "end": (0.85, 1), "late": (0.5, 1), "checkpoint again": (0, 0.75)}
TIMINGS = {"args.json": ("seconds", "resume", "output_dir"), "metrics.jsonl": ("tokens_per_second",)}


# ---- A run as a process of its own ----


class Child:
    """A script's main(args) in a fork of this process. Its output goes to the file `log`."""

    def __init__(self, script, args, log, prepare=lambda: None):
        self.log = log
        self.began = time.monotonic()
        self.code = None  # of its end: an exit code, or minus the number of the signal
        self.total = None  # CPU seconds, once it has ended
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run_and_exit(script, args, log, prepare)
            finally:
                os._exit(1)

    def seconds(self) -> float:
        """CPU time so far, so that a busy machine moves no kill. Without Linux's /proc: since the start."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        return time.monotonic() - self.began

    def ended(self, options=os.WNOHANG) -> bool:
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, options)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.total = usage.ru_utime + usage.ru_stime
        return self.code is not None

    def wait(self) -> int:
        self.ended(0)
        return self.code

    def kill(self) -> bool:
        """False if it was over before."""
        os.kill(self.pid, signal.SIGKILL)  # of this parent, which has not waited for it: the pid is still its own
        return self.wait() == -signal.SIGKILL

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def run_and_exit(script, args, log, prepare):
    """In the child, which shares nothing with the parent that could be kept, locked or continued by both."""
    gc.freeze()  # or a collection, at any moment, would look through all that the parent holds
    let_go_of_files(log)
    tqdm.set_lock(threading.RLock())  # tqdm's own is one for all forks: a killed one would never release it
    torch.set_num_threads(1)
    torch.seed()  # another process has another random state
    random.seed()
    code = 0
    try:
        prepare()
        launch(script, args)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def let_go_of_files(log):
    """Standard output and error go to the log. Every other open file, and with it its lock, is the parent's alone:
    here its number stands for /dev/null, as somebody may still close it.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in map(int, os.listdir("/dev/fd")):
        if number not in (1, 2):
            with contextlib.suppress(OSError):  # that of the list itself
                os.fstat(number)
                os.dup2(nothing, number)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # line by line, in the order of both
    sys.stderr = open(2, "w", closefd=False, buffering=1)


# ---- Whole runs, and what must be as they left it ----


@dataclasses.dataclass
class Whole:
    """A run that nothing interrupts."""

    script: object
    args: object
    folder: Path
    marks: list[tuple[float, int]]  # CPU seconds at which each step stood in metrics.jsonl; the first is (0, -1)
    seconds: float  # and at which model/ was there

    def moment(self, share) -> tuple[int, float]:
        """(step, CPU seconds behind it) after this share of the whole run."""
        goal = share * self.seconds
        began, step = next(mark for mark in reversed(self.marks) if mark[0] <= goal)
        return step, goal - began

    def rest(self, step) -> float:
        """CPU seconds that a run takes which resumes behind this step."""
        startup = self.marks[1][0]
        return startup + self.seconds - max(began for began, reached in self.marks if reached <= max(step, 0))


def run_whole(script, starts, folder, save_every, prepare=lambda: None) -> Whole:
    args = tiny_args(script, starts, folder, save_every=save_every, **FLAGS)
    child = Child(script, args, folder.with_suffix(".log"), prepare)
    marks, seconds = [(0.0, -1)], None
    while not child.ended():
        if last_step(folder) > marks[-1][1]:
            marks.append((child.seconds(), last_step(folder)))
        if seconds is None and (folder / "model").exists():
            seconds = child.seconds()
        time.sleep(PAUSE)
    if child.code:
        raise SystemExit(f"{script.name} ended with {child.code} though nothing stopped it: {child.last_words()}")
    assert marks[-1][1] == STEPS
    return Whole(script, args, folder, marks, seconds or child.total)


def rows_of(path) -> list[dict]:
    """Those of a .jsonl file, or of a .json file the one."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    rows = []
    for line in lines:
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if key not in TIMINGS[path.name]})
    return rows


def last_step(folder) -> int:
    """The step of the last whole line of metrics.jsonl, -1 if there is none."""
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-2])["step"] if len(lines) > 1 else -1
    return -1


def reached(folder) -> str:
    step = last_step(folder)
    return f"at step {step}" if step >= 0 else "before all steps"


def files_of(folder) -> dict[str, Path]:
    """Name -> path, folders included, less the events of TensorBoard, whose names hold the time of a start."""
    left_out = "events.out", "curves.png"  # a picture that is drawn when all else is done
    paths = [path for path in folder.rglob("*") if not path.name.startswith(left_out)]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def differences(folder, whole, part="") -> list[str]:
    """What is not as the whole run left it, in the folder or in this part of it."""
    got, want = files_of(folder / part), files_of(whole.folder / part)
    found = [f"{part}{name} is missing" for name in sorted(want.keys() - got.keys())]
    found += [f"{part}{name} is left over" for name in sorted(got.keys() - want.keys())]
    for name in sorted(got.keys() & want.keys()):
        if want[name].is_dir():
            continue
        if name in TIMINGS:
            found += different_rows(name, rows_of(got[name]), rows_of(want[name]))
        elif got[name].read_bytes() != want[name].read_bytes():
            found.append(f"{part}{name} differs")
    return found


def different_rows(name, got, want) -> list[str]:
    """The first row that differs, if any."""
    for number, (row, other) in enumerate(itertools.zip_longest(got, want, fillvalue={}), 1):
        if row != other:
            keys = sorted(key for key in {*row, *other} if row.get(key) != other.get(key))
            return [f"{name}:{number} differs in {', '.join(keys)}"]
    return []


# ---- Killed runs, and how a user goes on ----


@dataclasses.dataclass
class Story:
    """What happened to a run, and what is wrong with what it left."""

    script: str
    events: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __str__(self):
        result = f"DIFFERS: {'; '.join(self.wrong)}" if self.wrong else "identical"
        return f"{self.script:12}  {', '.join(self.events)}: {result}"


def look_at_model(folder, whole, story):
    """At this moment: whoever sees a model/ takes it for a finished one."""
    if (folder / "model").exists():
        story.wrong += [f"{what} while there is a model/" for what in differences(folder, whole, "model/")]


def go_on(whole, args, story):
    """The next start of a killed run, or None if nothing is left to do."""
    folder = Path(args.output_dir)
    finished, interrupted = (folder / "model").exists(), checkpoint_file(folder).exists()
    if finished and not (folder / "state").exists():
        story.events.append("it had finished")
        return None
    if finished:
        story.events.append("told to resume, though it had finished")
    elif interrupted:
        story.events.append(f"resumed {saved_step(folder)}")
    else:
        story.events.append("started anew")
        shutil.rmtree(folder, ignore_errors=True)  # as the refusal of a second start asks
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    return Child(whole.script, dataclasses.replace(args, resume=finished or interrupted), log)


def checkpoint_file(folder) -> Path:
    return folder / "state" / "checkpoint.pt"


def saved_step(folder) -> str:
    try:
        return f"behind step {torch.load(checkpoint_file(folder), weights_only=True)['step']}"
    except (RuntimeError, EOFError, KeyError):
        return "from a broken checkpoint"


def to_the_end(child, whole, args, story):
    """Wait for a run that goes on, and compare. --resume may refuse one that was already finished."""
    folder = Path(args.output_dir)
    finished = (folder / "model").exists()
    if child and child.wait() not in ((0, 2) if finished else (0,)):
        story.wrong.append(f"ended with {child.code}: {child.last_words()}")
    story.wrong += differences(folder, whole)


def kill_behind(child, folder, step, seconds, at_checkpoint=False) -> bool:
    """kill -9 so many CPU seconds behind this step, or at the next new checkpoint from then on. False if the run
    ended before.
    """
    while last_step(folder) < step:
        if child.ended():
            return False
        time.sleep(PAUSE)
    began = child.seconds() if step >= 0 else 0.0
    return kill_after(child, began + seconds, checkpoint_file(folder) if at_checkpoint else None)


def kill_after(child, seconds, new=None) -> bool:
    """kill -9 after so many CPU seconds, or when this file is next replaced. False if the run ended before."""
    while child.seconds() < seconds:
        if child.ended():
            return False
        time.sleep(PAUSE)
    before = stamp(new)
    while new and stamp(new) in (None, before):
        if child.ended():
            return False
        time.sleep(PAUSE)
    return child.kill()


def stamp(path):
    """What tells a file from that which replaces it; None if there is none."""
    with contextlib.suppress(OSError, TypeError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns
    return None


# ---- At random moments ----


@dataclasses.dataclass(frozen=True)
class Kill:
    script: str
    save_every: int
    share: float  # of the whole run's CPU time
    at_checkpoint: bool  # at the first new one behind that
    again: float | None  # the share of what the run still has to do, after which it is killed once more


def draw(number, seed, names) -> list[Kill]:
    """Each script gets each kind of moment in turn, and one kill in three is followed by another one."""
    generator = random.Random(seed)
    kills = []
    for i in range(number):
        kind = list(KINDS)[(i + i // len(names)) % len(KINDS)]
        first, last = KINDS[kind]
        share, save_every, again = generator.uniform(first, last), generator.choice([1, 2]), generator.random()
        at_checkpoint = kind.startswith("checkpoint")
        kills.append(Kill(names[i % len(names)], save_every, share, at_checkpoint, again if i % 3 == 2 else None))
    return kills


def try_random(kill, starts, whole, folder) -> Story:
    """whole: the run with the same flags that nothing interrupts."""
    story = Story(kill.script)
    args = tiny_args(whole.script, starts, folder, save_every=kill.save_every, **FLAGS)
    share = kill.share
    child = Child(whole.script, args, folder.with_suffix(".log"))
    while not kill_behind(child, folder, *whole.moment(share), kill.at_checkpoint):
        if child.code:
            story.wrong.append(f"ended with {child.code}: {child.last_words()}")
            return story
        shutil.rmtree(folder)  # no two runs take exactly the same time: this one was quicker
        share *= 0.97
        child = Child(whole.script, args, folder.with_suffix(".log"))
    place = f"by a new checkpoint after {share:.0%}" if kill.at_checkpoint else f"after {share:.0%}"
    story.events.append(f"killed {place} {reached(folder)}")
    look_at_model(folder, whole, story)
    child = go_on(whole, args, story)
    if child and kill.again is not None:
        left = whole.rest(last_step(folder))
        if kill_after(child, kill.again * left):
            story.events.append(f"killed after {kill.again:.0%} of the rest {reached(folder)}")
            look_at_model(folder, whole, story)
            child = go_on(whole, args, story)
        else:
            story.events.append("over before the second kill")
    to_the_end(child, whole, args, story)
    return story


# ---- Before each file operation and within each file ----


@dataclasses.dataclass(frozen=True)
class Place:
    number: int  # of a file operation of the run, counted from 0
    what: str
    size: int | None = None  # None: just before it; else of the file, behind it, in the middle of which to stop


def operation(folder, event, arguments) -> str:
    """What an audit event of Python does to the files in the folder; empty if nothing."""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return ""
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or isinstance(arguments[0], int):
        return ""
    path = Path(os.fsdecode(arguments[0]))
    if not path.is_absolute() and event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return f"{event} {path}"  # within shutil.rmtree
    if folder not in (path, *path.parents):
        return ""
    return f"{event} {path.relative_to(folder).as_posix()}"


def before_each_operation(folder, action):
    """Call action(number, what) before each one on files in the folder, in this process and till its end."""
    numbers = itertools.count()

    def hook(event, arguments):
        if what := operation(folder, event, arguments):
            action(next(numbers), what)

    sys.addaudithook(hook)


def record(folder, list_file):
    """Write a line for each operation, with the sizes of the files before it."""
    lines = open(list_file, "w")

    def action(number, what):
        sizes = {name: path.stat().st_size for name, path in files_of(folder).items() if path.is_file()}
        lines.write(json.dumps([what, sizes]) + "\n")
        lines.flush()

    before_each_operation(folder, action)


def places_of(list_file) -> list[Place]:
    """Before each operation; within each file that has grown between two: of like ones, the first and the last.
    That sees files that no Python code opens, too: the weights and the checkpoint.
    """
    lines = [json.loads(line) for line in list_file.read_text().splitlines()]
    places = []
    for number, (what, sizes) in enumerate(lines):
        places.append(Place(number, f"before {what}"))
        is_last = number + 1 == len(lines)
        following = {} if is_last or what.startswith("os.rename") else lines[number + 1][1]
        for name, size in following.items():
            before = sizes.get(name, 0)
            if size > before and (name not in sizes or what == f"open {name}"):
                places.append(Place(number, f"within {name}", (before + size) // 2))
    first = {place.what: place for place in reversed(places)}
    last = {place.what: place for place in places}
    return [place for place in places if place in (first[place.what], last[place.what])]


def stop_at(folder, place):
    """In the child: to be killed there."""

    def action(number, what):
        if number == place.number and place.size is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif number == place.number:
            limit_size(place.size)

    before_each_operation(folder, action)


def limit_size(size):
    """The kernel writes files up to this size, and then ends the process by SIGXFSZ, without a word to it."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # the log is a file, too
    os.dup2(nothing, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def try_place(place, starts, whole, folder) -> Story:
    story = Story(whole.script.name)
    args = tiny_args(whole.script, starts, folder, save_every=whole.args.save_every, **FLAGS)
    child = Child(whole.script, args, folder.with_suffix(".log"), functools.partial(stop_at, folder, place))
    if child.wait() not in (-signal.SIGKILL, -signal.SIGXFSZ):
        story.wrong.append(f"ended with {child.code}, and should have been killed {place.what}")
        return story
    story.events.append(f"killed {place.what} (operation {place.number}) {reached(folder)}")
    look_at_model(folder, whole, story)
    to_the_end(go_on(whole, args, story), whole, args, story)
    return story


# ---- Command line ----


def random_stories(number, seed, names, starts, folder):
    wholes = {}
    for i, kill in enumerate(draw(number, seed, names)):
        key = kill.script, kill.save_every
        if key not in wholes:
            wholes[key] = run_whole(SCRIPTS[kill.script], starts, folder / f"whole_{key}", kill.save_every)
        yield try_random(kill, starts, wholes[key], folder / f"run{i}")


def stories_everywhere(name, starts, folder):
    list_file, path = folder / "operations.txt", folder / f"whole_{name}"
    whole = run_whole(SCRIPTS[name], starts, path, 2, functools.partial(record, path, list_file))
    for i, place in enumerate(places_of(list_file)):
        yield try_place(place, starts, whole, folder / f"{name}{i}")


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1, help="of their moments")
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--everywhere", action="store_true", help="before each file operation, within each file")
    args = parser.parse_args(arguments)

    stories = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "starts").mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            starts = make_starts(folder / "starts")
        source = random_stories(args.kills, args.seed, args.scripts, starts, folder)
        if args.everywhere:
            source = itertools.chain.from_iterable(
                stories_everywhere(script, starts, folder) for script in args.scripts)
        for story in source:
            stories.append(story)
            print(story, flush=True)
    good = sum(not story.wrong for story in stories)
    times = os.times()
    print(f"{good} of {len(stories)} identical, {sum(times[:4]):.0f} CPU seconds")
    return 0 if good == len(stories) else 1


if __name__ == "__main__":
    sys.exit(main())
