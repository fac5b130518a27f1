"""blame, the order of rows, the learning rate and the rows of samples.jsonl: what every script's loop stands on."""

import importlib.util
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from common import blame, learning_rate, reward_function, sample_rows, shuffled
from conftest import VOCABULARY, word_tokenizer

# ---- blame ----


def refusal(capsys, function):
    """The line with which function() ends the script; exit code 2, nothing else written."""
    with pytest.raises(SystemExit) as stop:
        function()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err.strip()


def blamed(capsys, function, what="--thing x", file=""):
    """The line that blame() writes for an error in function()."""

    def within():
        with blame(what, file):
            function()

    return refusal(capsys, within)


def load(path):
    """The module of a file, as a user's reward function is loaded."""
    source = importlib.util.spec_from_file_location("users_file", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


USERS_FILE = """import json

def direct(row):
    return row["colour"]

def deeper(row):
    return [inner(row)
            for _ in range(2)]

def inner(row):
    return 1 / len(row)

def elsewhere(row):
    return json.loads("{")

def stops(row):
    raise SystemExit("no licence")
"""


@pytest.mark.parametrize(
    "name, place, error",
    [
        ("direct", 4, "KeyError: 'colour'"),
        ("deeper", 11, "ZeroDivisionError: division by zero"),  # where it arose, not where it was called
        ("elsewhere", 14, "JSONDecodeError: Expecting property name"),  # the user's line, not the library's
        ("stops", 17, "SystemExit: no licence"),
    ],
)
def test_blame_names_the_users_own_line(tmp_path, monkeypatch, capsys, name, place, error):
    path = tmp_path / "mine.py"
    path.write_text(USERS_FILE)
    function = getattr(load(path), name)
    line = blamed(capsys, lambda: function({}), "--reward mine.py:f", str(path))
    assert line.startswith(f"error: --reward mine.py:f: {path}:{place}: {error}")
    monkeypatch.chdir(tmp_path)  # as people write it: relative
    function = getattr(load("mine.py"), name)
    assert f"f: mine.py:{place}: {error}" in blamed(capsys, lambda: function({}), "--reward mine.py:f", "mine.py")


def test_blame_without_the_users_file_names_the_error_alone(tmp_path, capsys):
    assert blamed(capsys, lambda: {}["colour"]) == "error: --thing x: KeyError: 'colour'"
    assert blamed(capsys, lambda: sys.exit(0)) == "error: --thing x: SystemExit: 0"  # a silent end is none
    other = tmp_path / "other.py"
    other.write_text("1 / 0\n")
    line = blamed(capsys, lambda: load(other), file=str(tmp_path / "mine.py"))
    assert line == "error: --thing x: ZeroDivisionError: division by zero"


def test_blame_of_a_missing_or_broken_file_names_it(tmp_path, capsys):
    missing, broken = tmp_path / "missing.py", tmp_path / "broken.py"
    broken.write_text("x = 1\nif x\n")
    line = blamed(capsys, lambda: load(missing), file=str(missing))
    assert "FileNotFoundError" in line and str(missing) in line and "frozen" not in line
    line = blamed(capsys, lambda: load(broken), file=str(broken))
    assert "SyntaxError" in line and "broken.py, line 2" in line


def test_blame_lets_results_and_interrupts_through(capsys):
    with blame("--thing x"):
        result = 3
    assert result == 3
    with pytest.raises(KeyboardInterrupt), blame("--thing x"):
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


def test_blame_makes_one_line_of_an_error_of_many(capsys):
    def fails():
        raise ValueError("first\n  second\n\nthird")

    assert blamed(capsys, fails) == "error: --thing x: ValueError: first second third"


def test_the_reward_function_of_the_user_is_blamed_at_its_line(tmp_path, capsys):
    """When it is loaded and when it is called; there with the columns that it was given."""
    path = tmp_path / "mine.py"
    path.write_text("def colour(completions, **columns):\n    return [len(c) for c in columns['colour']]\n")
    spec = f"{path}:colour"
    score = reward_function(spec, word_tokenizer(), torch.device("cpu"))
    rows = [{"prompt": "w5", "size": 3, "_where": "x:1"}]
    line = refusal(capsys, lambda: score(rows, [[5]], [[6, 2]]))
    assert f"--reward {spec}, given columns ['size']: {path}:2: KeyError: 'colour'" in line
    assert score([{**rows[0], "colour": "red"}], [[5]], [[6, 2]]).tolist() == [3.0]
    for wrong in (f"{tmp_path}/none.py:colour", f"{path}:none"):
        line = refusal(capsys, lambda wrong=wrong: reward_function(wrong, word_tokenizer(), torch.device("cpu")))
        assert f"--reward {wrong}: " in line and re.search("FileNotFoundError|AttributeError", line)


# ---- shuffled ----


def test_shuffled_is_a_permutation_and_a_function_of_its_arguments():
    for n in (1, 2, 7, 100):
        for seed in (0, 1, 2):
            for epoch in (0, 1, 5):
                order = list(shuffled(n, seed, epoch))
                assert sorted(order) == list(range(n)) and type(order[0]) is int
                torch.manual_seed(3)
                shuffled.cache_clear()
                assert shuffled(n, seed, epoch) == order  # no cache and no global state decides
    state = torch.get_rng_state()
    shuffled(50, 9, 9)
    assert torch.equal(torch.get_rng_state(), state)
    orders = {tuple(shuffled(30, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25 and tuple(range(30)) not in orders


def test_every_order_of_three_comes_equally_often():
    n = 3000
    counts = Counter(tuple(shuffled(3, 1, epoch)) for epoch in range(n))
    assert len(counts) == 6
    statistic = sum((count - n / 6) ** 2 / (n / 6) for count in counts.values())
    assert statistic < 5 + 5 * 10**0.5  # chi-square of 5 degrees of freedom, 5 standard deviations above its mean


# ---- learning_rate ----


def rates(num_steps, warmup_steps, anneal_lr, peak=8.0):
    args = SimpleNamespace(learning_rate=peak, warmup_steps=warmup_steps, anneal_lr=anneal_lr)
    return [learning_rate(args, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    "arguments, want",
    [
        ((4, 0, True), [8, 6, 4, 2]),  # the step behind the last one would have 0
        ((4, 0, False), [8, 8, 8, 8]),
        ((10, 2, True), [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]),
        ((10, 2, False), [4, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        ((10, 9, True), [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]),  # at most a fifth of the run
        ((5, 4, True), [8, 8, 6, 4, 2]),
        ((4, 4, True), [8, 6, 4, 2]),  # and none of a run of fewer than five steps
        ((1, 0, True), [8]),
        ((1, 1, True), [8]),
    ],
)
def test_learning_rates_by_hand(arguments, want):
    assert rates(*arguments) == pytest.approx(want, abs=1e-12)


def test_the_first_step_learns_and_none_is_above_the_peak():
    for warmup_steps in range(12):
        values = rates(10, warmup_steps, True, peak=0.3)
        top = values.index(max(values))
        assert min(values) > 0 and max(values) <= 0.3 + 1e-12
        assert values[: top + 1] == sorted(values[: top + 1])
        assert values[top:] == sorted(values[top:], reverse=True)


# ---- sample_rows ----


def test_sample_rows_pair_prompts_responses_and_columns():
    """Ragged responses behind ragged prompts; special tokens are no text, and padding is none either."""
    prompts = [[5, 6, 7], [8], [9, 10]]
    responses = [[11, 2], [12, 13, 14], [2]]
    batch = {"input_ids": torch.full((3, 5), 50), "mask": torch.zeros(3, 5, dtype=torch.bool)}
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        ids = prompt + response
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["mask"][i, len(prompt) : len(ids)] = True
    rows = sample_rows(word_tokenizer(), prompts, batch, reward=torch.tensor([0.5, -1.0, 2.0]), kl=torch.zeros(3))
    assert rows == [
        {"prompt": "w5 w6 w7", "completion": "w11", "reward": 0.5, "kl": 0.0},
        {"prompt": "w8", "completion": "w12 w13 w14", "reward": -1.0, "kl": 0.0},
        {"prompt": "w9 w10", "completion": "", "reward": 2.0, "kl": 0.0},
    ]
    assert [list(row) for row in sample_rows(word_tokenizer(), prompts, batch)] == [["prompt", "completion"]] * 3
    assert VOCABULARY > 50  # the padding is a word, which must not appear
