"""The bug zoo: every entry fits the code as it is now, and the runner tells what kills from what does not."""

import re
import textwrap

import mutants
import pytest

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


def test_what_kills_and_what_does_not(project, capsys):
    entries, unread = mutants.load(project)
    assert not unread and not mutants.check(entries, project)
    assert mutants.run(entries[:-1], jobs=1, timeout=600, root=project) == 1
    assert mutants.run(entries[-1:], jobs=1, timeout=2, root=project) == 0
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
