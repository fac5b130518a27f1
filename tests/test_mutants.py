"""The bug zoo: every entry fits the code as it is now, and the runner tells what kills from what does not. Random
changes: which ones are made, and that each is one of code.
"""

import ast
import re
import textwrap

import generated
import mutants
import pytest
from conftest import ROOT

CODE = """
def double(x):
    return 2 * x


def half(x):
    return x / 2


def count_down(n):
    while n > 0:
        n -= 1
    return n


def untested(x):
    return x + 1
"""
TESTS = """
from calc import count_down, double, half


def test_double():
    assert double(3) == 6


def test_half():
    assert half(6) == 3 and count_down(3) == 0
"""
ENTRIES = """
# ---- Arithmetic ----

== a bug that is killed
by test_calc::test_double
- 2 * x
+ 3 * x

== a bug that another test of the file kills
by test_calc::test_double
- x / 2
+ x / 3

== a bug that survives
by test_calc::test_double
by test_calc::test_half
- def untested(x):
-     return x + 1
+ def untested(x):
+     return x + 2

== a bug that a red test kills
by test_red
- x + 1
+ x + 2

== a bug that keeps the module from being imported
by test_calc
- def double(x):
+ def double(x=nothing):

== a bug that hangs
by test_calc::test_half
-         n -= 1
+         n -= 0
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "calc.py").write_text(CODE)
    (tmp_path / "tests" / "test_calc.py").write_text(TESTS)
    (tmp_path / "tests" / "test_red.py").write_text("def test_red():\n    assert False\n")
    (tmp_path / "tests" / "mutants" / "calc.txt").write_text(ENTRIES)
    return tmp_path


def test_every_entry_fits_the_code():
    entries, unread = mutants.load()
    problems = unread + mutants.check(entries)
    assert len(entries) > 200 and not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("entry, problem", [
    ("- 4 * x\n+ 3 * x\nby test_calc", "STALE .*: calc.py no longer holds\n +4 \\* x"),
    ("- return\n+ pass\nby test_calc", "AMBIGUOUS .*: calc.py holds 4 times"),
    ("- 2 * x\n+ 2 *\nby test_calc", "NO PYTHON "),
    ("- 2 * x\n+ 2 * x\nby test_calc", "EMPTY "),
    ("+ 2 * x\nby test_calc", "EMPTY "),
    ("- 2 * x\n+ 3 * x", "NO TEST .*: names none"),
    ("- 2 * x\n+ 3 * x\nby test_nothing", "NO TEST .*: there is no test_nothing"),
    ("- 2 * x\n+ 3 * x\nby test_red::test_half", "NO TEST .*, but test_calc has one of this name"),
    ("- 2 * x\n+ 3 * x\nby test_calc\n\n== a bug\n- 2 * x\n+ 4 * x\nby test_calc", "TWICE "),
    ("- 2 * x\n3 * x\nby test_calc", "UNREAD .*: 3 \\* x"),
])
def test_entries_that_do_not_fit_are_named(project, entry, problem):
    (project / "tests" / "mutants" / "calc.txt").write_text(f"== a bug\n{entry}\n")
    entries, unread = mutants.load(project)
    problems = unread + mutants.check(entries, project)
    assert len(problems) == 1 and re.match(problem, problems[0]) and "calc.txt:" in problems[0]


def test_what_kills_and_what_does_not(project, capsys, monkeypatch):
    monkeypatch.setitem(mutants.ENVIRONMENT, "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these tests need no plugin
    entries, unread = mutants.load(project)
    assert not unread and not mutants.check(entries, project)
    assert mutants.run(entries[:-1], jobs=1, timeout=600, root=project) == 1
    assert mutants.run(entries[-1:], jobs=1, timeout=1, root=project) == 0
    lines = re.sub(r"\d+(\.\d)? s\b", "N s", capsys.readouterr().out)
    assert lines == textwrap.dedent("""\
        killed    calc.py: a bug that is killed: by test_calc::test_double (N s)
        killed    calc.py: a bug that another test of the file kills: not by a test it names, but by test_calc::test_half (N s)
        SURVIVED  calc.py: a bug that survives: all of test_calc::test_double, test_calc::test_half pass (N s)
        killed    calc.py: a bug that a red test kills: by test_red::test_red (N s)
        UNCLEAR   calc.py: a bug that keeps the module from being imported: test_calc did not run to an end (N s)
        NOT KILLED  calc.py: a bug that a red test kills: tests/test_red.py::test_red fails without it, too
        2 of 5 mutants killed, 0 of them by hanging, 1 not by a test they name
        2 of the 3 tests that killed pass without a bug
        N s with --jobs 1
        hung      calc.py: a bug that hangs: no end within N s counts as killed (N s)
        1 of 1 mutants killed, 1 of them by hanging, 0 not by a test they name
        0 of the 0 tests that killed pass without a bug
        N s with --jobs 1
        """)
    assert (project / "calc.py").read_text() == CODE


# ---- Random changes ----

PLACES = {  # a line of code -> what it becomes
    "if 0 <= x < n:": ["if 0 < x < n:", "if 0 > x < n:", "if 0 <= x <= n:", "if 0 <= x >= n:", "if 1 <= x < n:",
                       "if -1 <= x < n:"],
    "if a is None or not b in c:": ["if a is not None or not b in c:", "if a is None and not b in c:",
                                    "if a is None or b in c:", "if a is None or not b not in c:"],
    "x += (a - b) * ~c": ["x -= (a - b) * ~c", "x += (a + b) * ~c", "x += (a - b) / ~c", "x += (a - b) * c"],
    "y = x.sum(-1) + 0.5": ["y = x.mean(-1) + 0.5", "y = x.sum(0) + 0.5", "y = x.sum(-1) - 0.5",
                            "y = x.sum(-1) + 1.5", "y = x.sum(-1) + -0.5", "y = x.sum(-1) + 1.0"],
    "y = (a | b).square().amax(dim=1)": ["y = (a & b).square().amax(dim=1)", "y = (a | b).amax(dim=1)",
                                         "y = (a | b).square().amin(dim=1)", "y = (a | b).square().amax(dim=0)"],
    "y = x.clamp(min=a)[b:c]": ["y = x[b:c]", "y = x.clamp(max=a)[b:c]", "y = x.clamp(min=a)[b + 1:c]",
                                "y = x.clamp(min=a)[b - 1:c]", "y = x.clamp(min=a)[b:c + 1]",
                                "y = x.clamp(min=a)[b:c - 1]"],
    "y = torch.where(a, F.logsigmoid(-x), b)": ["y = (F.logsigmoid(-x))", "y = torch.where(a, (-x), b)",
                                                "y = torch.where(a, F.logsigmoid(x), b)"],
    "y = [x for x in range(n)]": ["y = [x for x in range(n + 1)]", "y = [x for x in range(n - 1)]"],
    "f(True, 'a < 1', f'{n + 1}')  # 1 < 2 and not 3": ["f(False, 'a < 1', f'{n + 1}')  # 1 < 2 and not 3"],
    "return max(x, y)": ["return min(x, y)"],
    '"""1 < 2, max(3)."""': [],
}


@pytest.mark.parametrize("line", PLACES)
def test_what_a_line_becomes(line):
    lines = [line, "    pass"] if line.startswith("if") else [line]
    code = "def other(x):\n    return x + 1\n\n\n@cache(1)\ndef f(x):\n" + textwrap.indent("\n".join(lines), "    ")
    changes = generated.changes_of("file.py", code, ["f"])
    assert sorted(change.new for change in changes) == sorted(PLACES[line])
    for change in changes:
        assert change.title == "file.py:7 f" and change.old == line
        assert change.apply(code.encode()).decode() == code.replace(line, change.new)


def test_defaults_and_methods_change_too():
    code = "class C:\n    @staticmethod\n    def f(x, n=1) -> 'a < b':\n        return x\n"
    changes = generated.changes_of("file.py", code, ["C"])
    assert [change.function for change in changes] == ["C.f"] * 2
    assert [change.new for change in changes] == ["def f(x, n=2) -> 'a < b':", "def f(x, n=0) -> 'a < b':"]


def test_every_change_is_one_of_code():
    """It compiles, other nodes than before are in the tree, and the docstring is the same."""
    seen = set()
    for file, names, _ in generated.GROUPS:
        code = (ROOT / file).read_text()
        functions = dict(generated.functions_of(ast.parse(code), names.split()))
        assert {name.partition(".")[0] for name in functions} == set(names.split())
        trees = {name: ast.dump(node) for name, node in functions.items()}
        for change in generated.changes_of(file, code, names.split())[::4]:  # a quarter of them, to be quick
            node = functions[change.function]
            lines = code.splitlines()
            own = lines[node.lineno - 1 : node.end_lineno]
            assert change.old == lines[change.line - 1].strip()
            changed = list(own)
            changed[change.line - node.lineno] = own[change.line - node.lineno].replace(change.old, change.new)
            [after] = ast.parse(textwrap.dedent("\n".join(changed))).body
            assert ast.get_docstring(node) == ast.get_docstring(after)
            assert trees[change.function] != ast.dump(after), change
            seen.add(change.function)
    assert len(seen) > 40


@pytest.fixture(scope="module")
def changes():
    return generated.all_changes()


def test_the_choice_depends_on_the_seed_and_on_the_line_alone(changes):
    keys = [[change.key for change in generated.choose(changes, number, seed)]
            for number, seed in ((50, 1), (50, 1), (100, 1), (50, 2))]
    assert keys[0] == keys[1] == keys[2][:50] and len(set(keys[0]) & set(keys[3])) < 15
    without_grpo = [change for change in reversed(changes) if change.file != "grpo.py"]
    assert [key for key in keys[2] if key[0] != "grpo.py"] == [
        change.key for change in generated.choose(without_grpo, 100, 1)][: sum(key[0] != "grpo.py" for key in keys[2])]


def test_equivalent_changes_are_still_made(changes):
    assert generated.check_equivalent(changes, generated.load_equivalent()) == []
    gone = ("ppo.py", "gae", "x = 1", "x = 2")
    assert "STALE" in generated.check_equivalent([], {gone: "it is not there"})[0]


def test_runs_of_changes(project, capsys, monkeypatch):
    monkeypatch.setattr(generated, "GROUPS", [("calc.py", "double count_down untested", "test_calc")])
    monkeypatch.setattr(generated, "IMPORTED_BEFORE", ())
    monkeypatch.setattr(generated, "CPU_SECONDS", 0.3)
    chosen = {"return 3 * x", "n += 1", "return x - 1", "return x + 2"}
    changes = [change for change in generated.all_changes(project) if change.new in chosen]
    assert len(changes) == 4
    reasons = {changes[-1].key: "nobody calls it"}
    assert generated.run(changes, reasons, timeout=600, root=project) == 1
    lines = re.sub(r"\d+(\.\d)? s\b", "N s", capsys.readouterr().out)
    assert lines == textwrap.dedent("""\
        killed    calc.py:3 double: by test_calc::test_double (N s)
        hung      calc.py:12 count_down: no end of a test counts as killed (N s)
        SURVIVED  calc.py:17 untested: by none of test_calc (N s)
                  - return x + 1
                  + return x - 1
        equal     calc.py:17 untested: nobody calls it (N s)
        2 of 3 changes killed (66.7%), 1 of them by hanging; 1 more are equivalent; N s
        """)
    assert (project / "calc.py").read_text() == CODE
