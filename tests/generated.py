"""Random bugs: changes one operator, constant, sign or call of a pure function, and tells whether a test notices.

    python tests/mutants.py --generated 200                      a line each, the survivors, the share killed
    python tests/mutants.py --generated 200 --seed 2 --part 1/8  other ones, every eighth from the first on
    python tests/mutants.py --generated 200 grpo_loss            those of the 200 with it in "file:line function"
    python tests/mutants.py --generated 200 --check              only lists them

The bug zoo holds bugs that people make and tests were written for. Nobody chose these: which places are changed
depends on the seed and on the changed line alone, so that 200 are the first 200 of 400, and code elsewhere may
move. Each is written into a copy of the project, at its exact place in the text, and a fork of this process,
which has torch and transformers in memory, runs the tests below until the first one fails.

Some changes are no bugs: `x >= 0` in place of `x > 0` where both sides give the same. mutants/equivalent.txt
lists those, found by reading survivors, each with the reason why no test can see it. They are not run:

    == common.py _logits
    because a product with 1.0 changes no bit
    - if scale != 1.0:
    + if scale != 0.0:
"""

import ast
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutants import ENTRIES, ENVIRONMENT, NOT_COPIED, ROOT, end_group, verdict_of
from mutants import node as name_for_pytest

# Pure functions, and the test files that are run for a change of them, in this order
GROUPS = [
    ("sft.py", "sft_loss", "test_losses"),
    ("dpo.py", "dpo_loss", "test_losses"),
    ("reward_model.py", "bradley_terry_loss calibration", "test_reward"),
    ("ppo.py", "token_rewards gae ppo_loss value_loss adapted_kl_coef", "test_ppo"),
    ("grpo.py", "zero_std group_advantages grpo_loss token_weights", "test_grpo test_fixed_points"),
    ("common.py", "_logits _TokenLogprobs token_logprobs sequence_logprobs",
     "test_logprobs test_losses test_sampling"),
    ("common.py", "kl_estimate masked_mean masked_whiten", "test_statistics test_fixed_points test_ppo"),
    ("common.py", "pad last_token micro_batches", "test_batches test_sampling test_ppo"),
    ("common.py", "ended responses_of", "test_sampling test_ppo test_grpo"),
    ("common.py", "learning_rate shuffled", "test_training"),
    ("common.py", "plackett_luce_loss", "test_reward"),
    ("common.py", "pick draw", "test_unpadded test_sampling"),
    ("bandit_bt.py", "bt_loss pairs_of reached no_optimum solver fit standard_errors bootstrap optimum "
     "forward_kl_optimum kl objective advantages policy_loss dpo leaderboard", "test_bandit"),
]
IMPORTED_BEFORE = ("pytest", "tokenizers", "tyro", "torch", "transformers.models.auto.modeling_auto",
                   "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama")
SLOW = {  # tests of a second and more, which come last
    "test_bootstrap_spread_is_fisher_for_hard_labels",
    "test_coverage_of_standard_errors", "test_coverage_of_the_bootstrap", "test_equal_rewards_move_nothing",
    "test_every_method_reaches_its_prediction", "test_first_tokens_follow_the_distribution",
    "test_flipped_rewards_are_noticed", "test_gradcheck_in_float64", "test_gradient_descent_ends_there_too",
    "test_gradients_of_an_update_in_combinations",
    "test_it_learns_from_rewards_and_nothing_from_noise", "test_no_optimum_by_brute_force"}
CPU_SECONDS = 60  # what a test may take, six times what the slowest one takes

# ---- Changes ----

COMPARISONS = {"<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="],
               "!=": ["=="], "is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"]}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "%", "%": "//", "**": "*", "&": "|", "|": "&"}
SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
    ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.BitAnd: "&", ast.BitOr: "|",
    ast.And: "and", ast.Or: "or", ast.USub: "-", ast.Invert: "~", ast.Not: "not "}
SIMILAR = {"max": "min", "min": "max", "amax": "amin", "amin": "amax", "argmax": "argmin", "sum": "mean",
           "mean": "sum", "any": "all", "all": "any", "zeros_like": "ones_like", "ones_like": "zeros_like"}
DROPPED = {"abs", "add_", "clamp", "clone", "cumsum", "detach", "div_", "double", "exp", "exp_", "flip", "log",
           "log_softmax", "long", "mul_", "nan_to_num_", "nonzero", "roll", "round", "sign", "sort", "sqrt",
           "square", "square_", "sub_", "tanh_"}  # x.exp() becomes x
FIRST_KEPT = {"F.logsigmoid", "math.ceil", "reversed", "sorted", "torch.expm1", "torch.log", "torch.log1p",
              "torch.log_softmax", "torch.sigmoid"}  # f(x, ...) becomes x
OVER_DIMENSION = {"all", "amax", "amin", "any", "argmax", "argsort", "gather", "log_softmax", "logsumexp", "mean",
                  "scatter_add", "scatter_add_", "sort", "squeeze", "std", "sum"}  # x.sum(1) becomes x.sum(0)


@dataclass(frozen=True)
class Change:
    file: str
    function: str
    line: int
    old: str  # the line as it is, without indentation
    new: str
    start: int  # the bytes of the file that are replaced
    end: int
    text: str  # by this

    @property
    def title(self) -> str:
        return f"{self.file}:{self.line} {self.function}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays if code moves."""
        return self.file, self.function, self.old, self.new

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


class Source:
    """A file's code as bytes, which is what the places of its syntax tree count."""

    def __init__(self, code: str):
        self.code = code.encode()
        self.tree = ast.parse(code)
        self.lines = self.code.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def first(self, node) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def last(self, node) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node) -> str:
        return self.code[self.first(node) : self.last(node)].decode()

    def between(self, left, symbol: str, right) -> tuple[int, int]:
        """Where an operator stands between its operands, with brackets and spaces around it."""
        begin = self.last(left)
        place = begin + self.code[begin : self.first(right)].index(symbol.encode())
        return place, place + len(symbol)

    def edits(self, node):
        """(start, end, new text) of each change at this node, but for its children."""
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, op, right in zip(operands, node.ops, node.comparators):
                symbol = SYMBOLS[type(op)]
                for other in COMPARISONS[symbol]:
                    yield *self.between(left, symbol, right), other
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            left, right = (node.target, node.value) if isinstance(node, ast.AugAssign) else (node.left, node.right)
            symbol = SYMBOLS.get(type(node.op))
            if symbol in ARITHMETIC:
                yield *self.between(left, symbol, right), ARITHMETIC[symbol]
        elif isinstance(node, ast.BoolOp):
            symbol = SYMBOLS[type(node.op)]
            for left, right in zip(node.values, node.values[1:]):
                yield *self.between(left, symbol, right), "or" if symbol == "and" else "and"
        elif isinstance(node, ast.UnaryOp):
            yield self.first(node), self.first(node) + len(SYMBOLS[type(node.op)]), ""
        elif isinstance(node, ast.Constant):
            for other in other_constants(node.value):
                yield self.first(node), self.last(node), other
        elif isinstance(node, ast.Slice):
            for bound in (node.lower, node.upper):
                yield from self.off_by_one(bound)
        elif isinstance(node, ast.Call):
            yield from self.edits_of_call(node)
        for number in dimensions_of(node):
            yield self.first(number), self.last(number), "1" if self.text(number) == "0" else "0"

    def off_by_one(self, bound):
        if bound is not None and not isinstance(bound, ast.Constant):
            for step in (" + 1", " - 1"):
                yield self.last(bound), self.last(bound), step

    def edits_of_call(self, node):
        function = self.text(node.func)
        name = function.rpartition(".")[2]
        name_starts = self.last(node.func) - len(name)
        if name in SIMILAR:
            yield name_starts, self.last(node.func), SIMILAR[name]
        if isinstance(node.func, ast.Attribute) and name in DROPPED and function not in FIRST_KEPT:
            yield name_starts - 1, self.last(node), ""
        if function in FIRST_KEPT:
            yield self.first(node), self.last(node), f"({self.text(node.args[0])})"
        if function == "torch.where":
            yield self.first(node), self.last(node), f"({self.text(node.args[1])})"
        if function == "range":
            yield from self.off_by_one(node.args[1] if len(node.args) > 1 else node.args[0])
        for keyword in node.keywords:
            if keyword.arg in ("min", "max"):
                yield self.first(keyword), self.first(keyword) + 3, SIMILAR[keyword.arg]


def other_constants(value) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int | float):
        others = [value + 1, value - 1, 2 * value]
        return list(dict.fromkeys(repr(other) for other in others if other != value))
    return []


def dimensions_of(node) -> list:
    """The numbers in x.sum(1), x.gather(-1, y), torch.log_softmax(x, 0), x.std(dim=0) and x.shape[1]."""
    found = []
    if isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "shape":
        found = [node.slice]
    if isinstance(node, ast.Call):
        if getattr(node.func, "attr", "") in OVER_DIMENSION:
            found = node.args[:2]
        found = found + [keyword.value for keyword in node.keywords if keyword.arg in ("dim", "dims")]
    return [part for part in found if ast.unparse(part) in ("0", "1", "-1")]


def parts_of(function):
    """The nodes of a function's defaults and body, without decorators, annotations, formatted texts, dimensions."""
    waiting, dimensions = [*function.args.defaults, *function.body], set()
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, ast.JoinedStr) and node not in dimensions:
            yield node
            dimensions.update(dimensions_of(node))
            waiting += ast.iter_child_nodes(node)


def functions_of(tree, names) -> list[tuple[str, ast.FunctionDef]]:
    """(name, function), and of a class (class.method, function)."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            found += [(f"{node.name}.{method.name}", method) for method in node.body
                      if isinstance(method, ast.FunctionDef)]
        elif isinstance(node, ast.FunctionDef) and node.name in names:
            found.append((node.name, node))
    return found


def changes_of(file: str, code: str, names: list[str]) -> list[Change]:
    """All changes of these functions that stay within a line."""
    source, changes = Source(code), []
    for name, function in functions_of(source.tree, names):
        for part in parts_of(function):
            for start, end, text in source.edits(part):
                number = source.code.count(b"\n", 0, start)
                first = source.starts[number]
                old = source.lines[number].decode()
                new = Change(file, name, 0, "", "", start - first, end - first, text).apply(old.encode()).decode()
                if b"\n" not in source.code[start:end] and old.strip() != new.strip():
                    changes.append(Change(file, name, number + 1, old.strip(), new.strip(), start, end, text))
    return changes


def all_changes(root: Path = ROOT) -> list[Change]:
    changes = []
    for file, names, _ in GROUPS:
        changes += changes_of(file, (root / file).read_text(), names.split())
    return changes


def choose(changes: list[Change], number: int, seed: int) -> list[Change]:
    """So many of them at random."""
    draw = lambda change: random.Random(f"{seed} {change.key}").random()
    return sorted(changes, key=lambda change: (draw(change), change.line))[:number]


def tests_of(change: Change) -> list[str]:
    function = change.function.partition(".")[0]
    return next(tests.split() for file, names, tests in GROUPS
                if file == change.file and function in names.split())


# ---- Equivalent changes ----


def load_equivalent(root: Path = ROOT) -> dict[tuple[str, str, str, str], str]:
    """{key of a change: reason}."""
    reasons = {}
    entries = re.split(r"^== ", (root / ENTRIES / "equivalent.txt").read_text(), flags=re.MULTILINE)[1:]
    for entry in entries:
        where, because, old, new = entry.strip().splitlines()[:4]
        file, function = where.split()
        reasons[file, function, old.removeprefix("- "), new.removeprefix("+ ")] = because.removeprefix("because ")
    return reasons


def check_equivalent(changes: list[Change], reasons) -> list[str]:
    """A message for each entry that is no change of the code as it is now."""
    keys = {change.key for change in changes}
    return [f"STALE      equivalent.txt: {' '.join(key[:2])}\n             - {key[2]}\n             + {key[3]}"
            for key in reasons if key not in keys]


# ---- Runs ----


class Watch:
    """A plugin of pytest: collects what fails, puts slow tests last and those with fixtures before them, and
    limits the time of each.
    """

    def __init__(self):
        self.failed = []

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: (item.originalname in SLOW, needs_fixtures(item)))

    def pytest_runtest_logstart(self):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # then SIGPROF ends the process

    def pytest_runtest_logfinish(self):
        signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def needs_fixtures(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return not set(item.fixturenames) <= set(parameters)


def run_tests(copy: Path, tests: list[str], options, sender) -> None:
    """In the fork."""
    import pytest

    os.setsid()  # so that what the tests have started can be ended with them
    os.chdir(copy)
    os.environ.update(ENVIRONMENT, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != ROOT / "tests")]
    watch = Watch()
    exit_code = pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", *options, *tests], plugins=[watch])
    sender.send((int(exit_code), watch.failed))


def in_fork(copy: Path, tests: list[str], *options, timeout=None) -> tuple[int | None, list[str]]:
    """As run_pytest: pytest's exit code, None if it did not end in time, and the tests that failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(copy, tests, options, sender))
    process.start()
    sender.close()
    process.join(timeout)
    if process.is_alive():
        end_group(process.pid)
        process.join()
    if process.exitcode in (-signal.SIGPROF, -signal.SIGKILL):
        return None, []
    try:
        return receiver.recv()
    except EOFError:  # a crash
        return process.exitcode, []


def attempt(change: Change, copy: Path, timeout: float) -> tuple[str, str]:
    """(killed, hung, SURVIVED or UNCLEAR, the test that failed)."""
    path = copy / change.file
    source = path.read_bytes()
    path.write_bytes(change.apply(source))
    try:
        shutil.rmtree(copy / "__pycache__", ignore_errors=True)  # fresh by its time, but of the last change
        exit_code, failed = in_fork(copy, [name_for_pytest(test) for test in tests_of(change)], "-x", timeout=timeout)
    finally:
        path.write_bytes(source)
        shutil.rmtree(copy / "__pycache__", ignore_errors=True)
    return verdict_of(exit_code, failed), failed[0] if failed else ""


def run(changes: list[Change], reasons, timeout: float, root: Path = ROOT) -> int:
    """Tries each, prints a line each, with the change if it survives, and the totals. Returns the exit code."""
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    start, results = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for change in changes:
            began = time.time()
            verdict, killer = ("equal", "") if change.key in reasons else attempt(change, copy, timeout)
            results.append((change, verdict, killer))
            if verdict == "killed":
                reason = f"by {killer.removeprefix('tests/').replace('.py::', '::')}"
            elif verdict == "equal":
                reason = reasons[change.key]
            elif verdict == "hung":
                reason = "no end of a test counts as killed"
            else:
                reason = f"by none of {', '.join(tests_of(change))}"
            print(f"{verdict:8}  {change.title}: {reason} ({time.time() - began:.1f} s)", flush=True)
            if verdict in ("SURVIVED", "UNCLEAR"):
                print(f"          - {change.old}\n          + {change.new}", flush=True)
        killers = list(dict.fromkeys(killer for _, _, killer in results if killer))
        exit_code, red = in_fork(copy, killers) if killers else (0, [])

    killed = 0
    for change, verdict, killer in results:
        if killer in red:
            print(f"NOT KILLED  {change.title}: {killer} fails without it, too")
        elif verdict in ("killed", "hung"):
            killed += 1
    if exit_code not in (0, 1):
        print(f"the tests that killed could not be run without a change: pytest ended with {exit_code}")
    counts = Counter(verdict for _, verdict, _ in results)
    rest = len(changes) - counts["equal"]
    print(f"{killed} of {rest} changes killed ({killed / max(rest, 1):.1%}), {counts['hung']} of them by hanging; "
          f"{counts['equal']} more are equivalent; {time.time() - start:.0f} s")
    return 0 if killed == rest and exit_code == 0 else 1
