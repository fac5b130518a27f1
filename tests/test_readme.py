"""READMEs and the scripts' docstrings name only what exists: files, lines, sections, commands, flags.

    python tests/test_readme.py     writes the present lines and the number of mutants into the READMEs
"""

import ast
import functools
import importlib
import os
import re
import shlex

import mutants
import pytest
import tyro
from conftest import ROOT

SCRIPTS = ("sft", "reward_model", "ppo", "dpo", "grpo", "bandit_bt")
READMES = {name: ROOT / name for name in ("README.md", "benchmarks/README.md", "tests/README.md")}
TEXTS = {name: path.read_text() for name, path in READMES.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s#]*)(#[^()\s]*)?\)")  # text, file, #anchor
NAME = re.compile(r"`(?:\w+\.)?([A-Za-z_]\w*)`")  # a link's text, if it names a function, class or constant
FIRST_TO_FIND = {"token_logprobs", "kl_estimate", "dpo_loss", "gae", "ppo_loss", "group_advantages",
                 "grpo_loss", "bradley_terry_loss"}


# ---- What the texts hold ----


def blocks(text, language) -> list[str]:
    """Fenced code blocks of a language."""
    return [body for kind, body in FENCE.findall(text) if kind == language]


def links(name) -> list[tuple[str, str, str]]:
    """(text, file as written, #anchor) of each link that stays inside the project."""
    prose = FENCE.sub("", TEXTS[name])
    return [link for link in LINK.findall(prose) if not link[1].startswith("http")]


def one_line_each(code) -> str:
    """Shell code whose continued lines are joined, without comments."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return re.sub(r"(^|\s)#[^\n]*", "", joined)


def commands() -> list[tuple[str, str, str]]:
    """(folder, script, flags) of each `python x.py ...` in code blocks, in the prose and in docstrings."""
    found = []
    for text in TEXTS.values():
        code = one_line_each("\n".join(blocks(text, "bash")))
        found += re.findall(r"python (\w+/)?(\w+)\.py([^&\n]*)", code)
        spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        for span in spans:
            found += re.findall(r"^(?:python )?(\w+/)?(\w+)\.py( --[^&]*)$", span)
            found += re.findall(r"^python (\w+/)?(\w+)\.py()$", span)
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
        found += re.findall(r"python (\w+/)?(\w+)\.py([^&\n]*(?:\n {4}--[^\n]*)*)", docstring)
    return list(dict.fromkeys(found))


COMMANDS = commands()


@functools.cache
def definitions(path) -> dict[str, int]:
    """Functions, classes and constants on the top level of a file, and their lines."""
    lines = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                lines[target.id] = node.lineno
    return lines


def anchors(path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def folder_of(script, folder):
    """Where a script lies that a text names without its folder, as in a table of flags."""
    return ROOT / (folder or "") / f"{script}.py"


# ---- The tests ----


@pytest.mark.parametrize("folder, name, flags", COMMANDS)
def test_commands_have_their_flags(folder, name, flags):
    path, words = folder_of(name, folder), shlex.split(flags.replace("\\\n", " ").replace("\n", " "))
    assert path.exists()
    module = importlib.import_module(name)
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=words)
    else:
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in path.read_text(), word


def test_commands_are_found():
    assert len(COMMANDS) >= 40
    assert {name for _, name, _ in COMMANDS} >= {*SCRIPTS, "frontier", "pictures", "mutants"}


def test_it_starts_with_the_two_commands():
    first, second = blocks(TEXTS["README.md"], "bash")[:2]
    for part in ("python3 -m venv", "pip install -r requirements.txt", "python sft.py", "python dpo.py"):
        assert part in first
    assert second.strip() == "python -m pytest" and second.strip() in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 190
    assert len(text.encode()) <= 13_000


@pytest.mark.parametrize("name", READMES)
def test_code_fits_the_page(name):
    for _, body in FENCE.findall(TEXTS[name]):
        for line in body.splitlines():
            assert len(line) <= 100, line


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    assert links(name)
    for text, file, anchor in links(name):
        path = (READMES[name].parent / file).resolve() if file else READMES[name]
        assert path.exists(), f"{file} of [{text}]"
        named = NAME.fullmatch(text)
        if path.suffix == ".py" and named and named[1] != "py":
            line = definitions(path).get(named[1])
            assert line, f"{file} defines no {named[1]}"
            assert anchor == f"#L{line}", f"{text} is at line {line}: run python tests/test_readme.py"
        elif path.suffix == ".md" and anchor:
            assert anchor in anchors(path), f"{file}{anchor} of [{text}]"
        else:
            assert not anchor, f"{file}{anchor} of [{text}]: a line without the name of what stands there"


def test_the_readme_links_the_functions_that_people_look_for():
    linked = {NAME.fullmatch(text)[1] for text, file, _ in links("README.md") if NAME.fullmatch(text)}
    assert linked >= FIRST_TO_FIND


@pytest.mark.parametrize("name", READMES)
def test_named_functions_exist(name):
    for module, function in re.findall(rf"`({'|'.join(SCRIPTS)}|common)\.(\w+)`", TEXTS[name]):
        if function != "py":
            assert hasattr(importlib.import_module(module), function), f"{module}.{function}"


def test_the_number_of_mutants():
    assert f"{len(mutants.load()[0])} known bugs" in TEXTS["tests/README.md"]


def rows_of_the_lectures() -> dict[str, str]:
    """number -> the rest of its row in the table of claims."""
    section = TEXTS["tests/README.md"].partition("## The lectures, claim by claim")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (A?\d+b?) \| (.*) \|$", section, re.M))


def test_each_claim_of_the_lectures_has_its_code_and_its_test():
    """All 62 items of the lectures and 10 remarks: a link in the last column, or the file that will measure it."""
    rows = rows_of_the_lectures()
    assert set(rows) >= {str(n) for n in range(1, 63)} | {"5b"} | {f"A{n}" for n in range(1, 11)}
    for number, row in rows.items():
        shown = row.split(" | ")[-1]
        assert LINK.search(shown) or "benchmarks/" in shown or number == "8", row


# ---- python tests/test_readme.py ----


def home_of(name, path):
    """(file, line) of a definition: in `path`, or in the only file of the project that has it, else None."""
    lines = definitions(path) if path.exists() else {}
    if name in lines:
        return path, lines[name]
    files = [file for folder in (".", "benchmarks", "data", "tests") for file in (ROOT / folder).glob("*.py")]
    homes = [(file, definitions(file)[name]) for file in files if name in definitions(file)]
    return homes[0] if len(homes) == 1 else None


def present(link, folder) -> str:
    """A link found in a text of this folder, with the file and line where its name is defined now."""
    text, file, _ = link.groups()
    named = NAME.fullmatch(text)
    if not file.endswith(".py") or not named or named[1] == "py":
        return link[0]
    home = home_of(named[1], (folder / file).resolve())
    if home is None:
        print(f"{text} is not in {file}, nor in exactly one other file: mend its link by hand")
        return link[0]
    path, line = home
    if path != (folder / file).resolve():
        file = os.path.relpath(path, folder)
        text = f"`{path.stem}.{named[1]}`" if "." in text else text
        print(f"{text} is now in {file}")
    return f"[{text}]({file}#L{line})"


def main() -> None:
    number = len(mutants.load()[0])
    for name, path in READMES.items():
        text = LINK.sub(lambda link, folder=path.parent: present(link, folder), TEXTS[name])
        text = re.sub(r"\d+ known bugs", f"{number} known bugs", text)
        path.write_text(text)
        print(f"{name}: {'changed' if text != TEXTS[name] else 'as it was'}")


if __name__ == "__main__":
    main()
