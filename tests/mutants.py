"""The bug zoo: plants known bugs of RLHF code bases into a copy of this one and shows which test kills each.

    python tests/mutants.py                       all of them, a line each; exit code 1 if one survives
    python tests/mutants.py --check               a second: is each entry well formed, its code still there?
    python tests/mutants.py "ppo.py: .*KL"        those whose "file: name" holds this regular expression
    python tests/mutants.py --jobs 2 --part 2/5   two at a time, every fifth from the second on
    python tests/mutants.py --generated 200       random changes in their place: see generated.py

A test that has never failed proves nothing. tests/mutants/ppo.txt holds the bugs of ppo.py, and so on:

    # ---- Advantages ----

    == GAE decays by lambda alone
    by test_ppo::test_gae_is_the_double_sum
    - gamma * gae_lambda * following
    + gae_lambda * following

The code behind "- " stands exactly once in the file: a part of a line, or several lines with their
indentation. It is replaced by the code behind "+ ", or by nothing. "by" names what kills it: a test file, or
better one test, which takes seconds; for several, there are several such lines. If they pass, their whole
files are run before a bug counts as a survivor. A bug that keeps the tests from ending counts as killed, by
hanging. At the end, all tests that killed are run without a bug: one that fails there too has killed nothing.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = Path("tests", "mutants")
NOT_COPIED = ("runs", ".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")
PASSED_OR_NOT_FOUND = (0, 4, 5)  # exit codes of pytest
# One thread a child. No compiled files: Python takes one for fresh if size and second of the change agree.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Mutant:
    where: str  # file and line of its entry
    file: str
    name: str
    lines: dict = field(default_factory=lambda: {"by": [], "-": [], "+": []})

    @property
    def title(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def old(self) -> str:
        return "\n".join(self.lines["-"])

    @property
    def new(self) -> str:
        return "\n".join(self.lines["+"])


@dataclass
class Result:
    mutant: Mutant
    verdict: str  # killed, hung, SURVIVED or UNCLEAR
    killer: str  # the test that failed, as pytest names it
    as_named: bool  # that test is one that the entry names
    seconds: float


# ---- Entries ----


def load(root: Path = ROOT) -> tuple[list[Mutant], list[str]]:
    """All entries, and a message for each line that is none."""
    mutants, unread = [], []
    for path in sorted((root / ENTRIES).rglob("*.txt")):
        if path.name == "equivalent.txt":  # of generated.py
            continue
        file = path.relative_to(root / ENTRIES).with_suffix(".py").as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(root)}:{number}"
            mark, _, text = line.partition(" ")
            if mark == "==":
                mutants.append(Mutant(where, file, text))
            elif mark in ("by", "-", "+") and mutants and mutants[-1].file == file:
                mutants[-1].lines[mark].append(text)
            elif mark not in ("", "#"):
                unread.append(f"UNREAD     {where}: {line}")
    return mutants, unread


def problems_of(mutant: Mutant, root: Path) -> list[str]:
    """What keeps this bug from being planted, or its tests from being found."""
    where = f"{mutant.where}: {mutant.name}"
    source = root / mutant.file
    if not source.is_file():
        return [f"STALE      {where}: there is no {mutant.file}"]
    problems = []
    code = source.read_text()
    count = code.count(mutant.old)
    if not mutant.old.strip() or mutant.old == mutant.new:
        problems.append(f"EMPTY      {where}: no old code, or the same as the new one")
    elif count == 0:
        problems.append(f"STALE      {where}: {mutant.file} no longer holds\n{indented(mutant.old)}")
    elif count > 1:
        problems.append(f"AMBIGUOUS  {where}: {mutant.file} holds {count} times\n{indented(mutant.old)}")
    else:
        try:
            compile_changed(code, mutant)
        except SyntaxError as error:
            problems.append(f"NO PYTHON  {where}: {error}")
    if not mutant.lines["by"]:
        problems.append(f"NO TEST    {where}: names none")
    for test in mutant.lines["by"]:
        if not test_exists(test, root):
            problems.append(f"NO TEST    {where}: there is no {test}{elsewhere(test, root)}")
    return problems


def compile_changed(code: str, mutant: Mutant) -> None:
    """The function or class around the change, which takes a tenth of the time; if that is not enough, the file."""
    start = code.index(mutant.old)
    head, tail = code[:start], code[start + len(mutant.old):]
    begin = max(head.rfind(f"\n{word}") for word in ("def ", "class ")) + 1
    end = min(tail.find(f"\n{word}") % (len(tail) + 1) for word in ("def ", "class ", "@"))
    try:
        compile(head[begin:] + mutant.new + tail[:end] + "\n", mutant.file, "exec")
    except SyntaxError:
        compile(head + mutant.new + tail, mutant.file, "exec")


def indented(code: str) -> str:
    return "\n".join(f"             {line}" for line in code.splitlines())


def test_exists(test: str, root: Path) -> bool:
    name, _, function = test.partition("::")
    path = root / "tests" / f"{name}.py"
    return path.is_file() and (not function or defines(path, function))


def defines(path: Path, function: str) -> bool:
    name = function.partition("[")[0]
    return re.search(rf"^def {re.escape(name)}\(", path.read_text(), re.MULTILINE) is not None


def elsewhere(test: str, root: Path) -> str:
    """Where a test of this name stands now, if it has moved."""
    function = test.partition("::")[2]
    if not function:
        return ""
    files = [path.stem for path in sorted((root / "tests").glob("test_*.py")) if defines(path, function)]
    return f", but {' and '.join(files)} has one of this name" if files else ""


def check(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """A message for each thing that is wrong with these entries."""
    problems, titles = [], set()
    for mutant in mutants:
        if mutant.title in titles:
            problems.append(f"TWICE      {mutant.where}: {mutant.name}")
        titles.add(mutant.title)
        problems += problems_of(mutant, root)
    return problems


# ---- Runs ----

RUNNING = set()  # the processes of pytest


def run_pytest(folder, tests, timeout=None) -> tuple[int | None, list[str]]:
    """pytest's exit code, None if it did not end in time, and the tests that failed."""
    options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    # a session of its own, so that what the tests have started can be ended with them
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    RUNNING.add(process)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_group(process.pid)
        process.communicate()
        return None, []
    finally:
        RUNNING.discard(process)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", output, re.MULTILINE)
    return process.returncode, failed


def end_group(number: int) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def node(test: str) -> str:
    """test_ppo::test_gae -> tests/test_ppo.py::test_gae, as pytest wants it."""
    name, colons, function = test.partition("::")
    return f"tests/{name}.py{colons}{function}"


def attempt(mutant: Mutant, copy: Path, timeout: float) -> Result:
    """Plants the bug in the copy, runs the tests that the entry names, then their files, and takes it out."""
    start = time.time()
    named = [node(test) for test in mutant.lines["by"]]
    files = list(dict.fromkeys(test.partition("::")[0] for test in named))
    path = copy / mutant.file
    code = path.read_text()
    path.write_text(code.replace(mutant.old, mutant.new))
    try:
        exit_code, failed = run_pytest(copy, ["-x", *named], timeout)
        as_named = exit_code not in PASSED_OR_NOT_FOUND
        if not as_named and files != named:
            exit_code, failed = run_pytest(copy, ["-x", *files], timeout)
    finally:
        path.write_text(code)
    killer = failed[0] if failed else ""
    return Result(mutant, verdict_of(exit_code, failed), killer, as_named, time.time() - start)


def verdict_of(exit_code: int | None, failed: list[str]) -> str:
    if exit_code is None:
        return "hung"
    if failed:
        return "killed"
    if exit_code == 0:
        return "SURVIVED"
    return "UNCLEAR"  # not even imported, no tests found, or a crash: whatever it is, no test has noticed the bug


def line_of(result: Result, timeout: float) -> str:
    if result.verdict == "killed":
        killer = result.killer.removeprefix("tests/").replace(".py::", "::")
        reason = f"by {killer}" if result.as_named else f"not by a test it names, but by {killer}"
    elif result.verdict == "hung":
        reason = f"no end within {timeout:.0f} s counts as killed"
    else:
        tests = ", ".join(result.mutant.lines["by"])
        reason = f"all of {tests} pass" if result.verdict == "SURVIVED" else f"{tests} did not run to an end"
    return f"{result.verdict:8}  {result.mutant.title}: {reason} ({result.seconds:.1f} s)"


def run(mutants: list[Mutant], jobs: int, timeout: float, root: Path = ROOT) -> int:
    """Tries each, prints a line each and the totals. Returns the exit code."""
    start, results = time.time(), []
    copies = queue.Queue()

    def work(mutant: Mutant) -> Result:
        copy = copies.get()
        try:
            return attempt(mutant, copy, timeout)
        finally:
            copies.put(copy)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for job in range(jobs):
            copy = Path(folder) / str(job) / "copy"
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
            copies.put(copy)
        futures = [pool.submit(work, mutant) for mutant in mutants]
        try:
            for future in as_completed(futures):
                results.append(future.result())
                print(line_of(results[-1], timeout), flush=True)
        except BaseException:  # Ctrl-C above all
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end_group(process.pid)
            raise
        killers = list(dict.fromkeys(result.killer for result in results if result.killer))
        exit_code, red = run_pytest(copies.get(), killers) if killers else (0, [])

    for result in results:
        if result.killer in red:
            print(f"NOT KILLED  {result.mutant.title}: {result.killer} fails without it, too")
    if exit_code not in (0, 1):
        print(f"the tests that killed could not be run without a bug: pytest ended with {exit_code}")
    hung = [result for result in results if result.verdict == "hung"]
    killed = [result for result in results if result.verdict == "killed" and result.killer not in red]
    by_others = [result for result in killed if not result.as_named]
    print(f"{len(killed) + len(hung)} of {len(results)} mutants killed, {len(hung)} of them by hanging, "
          f"{len(by_others)} not by a test they name")
    print(f"{len(killers) - len(red)} of the {len(killers)} tests that killed pass without a bug")
    print(f"{time.time() - start:.0f} s with --jobs {jobs}")
    return 0 if len(killed) + len(hung) == len(results) and exit_code == 0 else 1


# ---- Command line ----


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("pattern", nargs="?", default="", help='only those with it in "file: name"')
    parser.add_argument("--generated", type=int, default=0, metavar="N", help="N random changes, no entries")
    parser.add_argument("--seed", type=int, default=1, help="of --generated")
    parser.add_argument("--check", action="store_true", help="run no test")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th, from the K-th on")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, each in a copy of its own")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run of its tests")
    args = parser.parse_args(arguments)
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]) or args.jobs < 1:
        parser.error("--part is K/N with 1 <= K <= N, and --jobs at least 1")
    part = slice(int(part[1]) - 1, None, int(part[2]))
    if args.generated:
        return main_of_generated(args, part)

    mutants, problems = load()
    mutants = [mutant for mutant in mutants if re.search(args.pattern, mutant.title)]
    problems += check(mutants)
    for problem in problems:
        print(problem)
    if problems or not mutants:
        print(f"{len(problems)} problems in {len(mutants)} entries: nothing was run")
        return 1
    if args.check:
        print(f"{len(mutants)} entries, each fits the code")
        return 0
    return run(mutants[part], args.jobs, args.timeout)


def main_of_generated(args, part: slice) -> int:
    import generated

    changes, reasons = generated.all_changes(), generated.load_equivalent()
    problems = generated.check_equivalent(changes, reasons)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems in equivalent.txt: nothing was run")
        return 1
    chosen = generated.choose(changes, args.generated, args.seed)
    chosen = [change for change in chosen if re.search(args.pattern, change.title)][part]
    if args.check:
        for change in chosen:
            print(f"{change.title}\n- {change.old}\n+ {change.new}\n")
        print(f"{len(chosen)} of {len(changes)} changes; equivalent.txt has {len(reasons)} of them all")
        return 0
    return generated.run(chosen, reasons, args.timeout)


if __name__ == "__main__":
    sys.exit(main())
