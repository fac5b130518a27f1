"""The README and the scripts' docstrings name only what exists: commands with their flags, files, functions."""

import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

SCRIPTS = ("sft", "reward_model", "ppo", "dpo", "grpo", "bandit_bt")
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
DOCSTRINGS = "\n".join((ROOT / f"{name}.py").read_text().split('"""')[1] for name in SCRIPTS)
COMMANDS = re.findall(r"python (\w+/)?(\w+)\.py([^&\n]*(?:\n {4}--[^\n]*)*)", BLOCKS + "\n" + DOCSTRINGS)


@pytest.mark.parametrize("folder, name, flags", COMMANDS)
def test_commands_have_their_flags(folder, name, flags):
    module = importlib.import_module(name)
    assert (ROOT / folder / f"{name}.py").exists()
    tyro.cli(module.Args, args=shlex.split(flags.replace("\n", " ")))


def test_it_starts_with_the_two_commands():
    first, second = re.findall(r"```bash\n(.*?)```", README, re.S)[:2]
    for part in ("python3 -m venv", "pip install -r requirements.txt", "python sft.py", "python dpo.py"):
        assert part in first
    assert second.strip() == "python -m pytest" and second.strip() in (ROOT / ".ci" / "run").read_text()
    assert len(COMMANDS) >= 15


def test_named_files_and_functions_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for module, function in re.findall(rf"`({'|'.join(SCRIPTS)}|common)\.(\w+)`", README):
        if function != "py":
            assert hasattr(importlib.import_module(module), function), f"{module}.{function}"
    assert f"{len(importlib.import_module('mutants').MUTANTS)} known bugs" in README
