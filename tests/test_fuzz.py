"""A sample of fuzz.py's odd files, and fuzz.py itself: it sees each way in which a script can fail a user, it spoils
files that are good before, and it leaves the process as it was.
"""

import os
import random
import signal
import sys
import time

import fuzz
import pytest
import torch
from fuzz import cases_of, run_case
from fuzz_cases import KINDS, REWARD, REWARDS, SAMPLED, TARGETS, World, good_rows, interrupted, lines_of
from safetensors.torch import load_file, save_file
from tiny_runs import SCRIPTS

SEED = 5  # of the sample; `python tests/fuzz.py` runs many more
SAMPLE = cases_of(SEED, 40)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world").resolve())


@pytest.mark.parametrize("name, kind_name, target", SAMPLE, ids=[name for name, *_ in SAMPLE])
def test_odd_file(world, tmp_path, name, kind_name, target):
    outcome = run_case(world, tmp_path.resolve() / "case", SEED, name, kind_name, target)
    assert outcome.is_good, outcome


# ---- The fuzzer ----


@pytest.fixture
def end(world, tmp_path, monkeypatch):
    """end(spoil, main) -> how a case of sft.py ends whose files spoil(case) made, with this main if one is given."""

    def run(spoil=lambda case: None, main=None, target="sft"):
        monkeypatch.setitem(KINDS, "planted", ([target], 1, spoil))
        if main:
            module = SCRIPTS["reward_model" if target == "score" else target].module
            monkeypatch.setattr(module, "main", main)
        return run_case(world, tmp_path.resolve() / "case", 1, f"planted/{target}/0", "planted", target)

    return run


@pytest.mark.parametrize("layout", ["text", "chat"])
@pytest.mark.parametrize("target", TARGETS)
def test_good_files_run(end, target, layout):
    """What a case spoils is good before, and the model is given all of it."""

    def good(case):
        rows = case.good(layout)
        case.data(rows, flag="" if target in ("score", "bandit_bt") else "dataset")
        case.wanted = "ran"
        column = {"score": "completion", "sft": "completion"}.get(target, "chosen")
        if target not in (*SAMPLED.split(), "bandit_bt") and layout == "text":
            case.seen = [row["prompt"] + row[column] for row in rows]

    outcome = end(good, target=target)
    assert outcome.label == "ran" and outcome.detail == "", outcome


def complain(*lines, code=2):
    def main(args):
        for line in lines:
            print(line, file=sys.stderr)
        raise SystemExit(code)

    return main


def never_ends(args):
    while True:
        time.sleep(0.01)


def never_ends_and_catches_all(args):
    try:
        never_ends(args)
    except BaseException:
        complain("error: --dataset is bad")(args)


def interrupts_itself(args):
    raise KeyboardInterrupt


def writes_no_files(args):
    return {"loss": 1.0}


def changes_data(args):
    with open(args.dataset, "a") as file:
        file.write("\n")
    complain("error: --dataset is bad")(args)


def removes_data(args):
    os.remove(args.dataset)
    raise ValueError


def changes_the_model(args):
    with open(os.path.join(args.model, "mine.txt"), "w") as file:
        file.write("mine")
    os.utime(args.model)
    with open(os.path.join(args.model, "config.json"), "a") as file:
        file.write("\n")
    complain("error: --model is bad")(args)


def prints_a_traceback(args):
    print("Traceback (most recent call last):", file=sys.stderr)


def finishes_first(args):
    os.makedirs(os.path.join(args.output_dir, "model"))
    complain("error: --dataset is bad")(args)


@pytest.mark.parametrize("main, label", [
    (complain("error: --dataset is bad"), "refused"),
    (complain("error: --dataset is bad", "and more"), "NOISE"),
    (complain("warning", "error: --dataset is bad"), "NOISE"),
    (complain("error: it is bad"), "NOISE"),
    (complain("--dataset is bad"), "NOISE"),
    (complain(), "NOISE"),
    (complain("error: --dataset " + 3000 * "x"), "NOISE"),
    (complain("error: --dataset is bad", code=1), "EXIT"),
    (complain("error: --dataset is bad", code="bye"), "EXIT"),
    (never_ends, "HANG"),
    (never_ends_and_catches_all, "HANG"),
    (interrupts_itself, "TRACEBACK"),
    (prints_a_traceback, "TRACEBACK"),
    (writes_no_files, "NONSENSE"),
    (changes_data, "LOST"),
    (removes_data, "LOST"),
    (changes_the_model, "LOST"),
    (finishes_first, "LATE")], ids=lambda x: getattr(x, "__name__", x))  # fmt: skip
def test_faults_of_scripts_are_seen(end, monkeypatch, main, label):
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)

    def own_model(case):
        case.flags["model"] = str(case.model())

    outcome = end(own_model, main)
    assert outcome.label == label, outcome
    assert outcome.is_good == (label == "refused")


def wanting(**wishes):
    """A case of good rows with other wishes."""

    def spoil(case):
        case.data(case.good(), flag="dataset")
        for name, value in wishes.items():
            setattr(case, name, value)

    return spoil


@pytest.mark.parametrize("spoil, words", [
    (wanting(wanted="refused"), "should have been refused"), (wanting(seen=["ALPHA"]), "'ALPHA' never reached"),
    (wanting(unseen=["the "]), "'the ' reached")], ids=["refused", "seen", "unseen"])
def test_silent_nonsense_is_seen(end, spoil, words):
    outcome = end(spoil)
    assert outcome.label == "NONSENSE" and words in outcome.detail, outcome


def test_refusals_of_good_files_are_seen(end):
    assert end(wanting(wanted="ran"), complain("error: --dataset is bad")).label == "STRICT"


def test_the_line_of_a_refusal_has_to_be_named(end):
    def spoil(case):
        case.data(case.spoil(case.good(), lambda row: "broken"), flag="dataset")

    assert end(spoil).label == "refused"


def test_the_wrong_line_is_no_refusal(end):
    def spoil(case):
        case.data(case.spoil(case.good(), lambda row: "broken"), flag="dataset")
        case.words = [":9"]

    assert end(spoil).label == "NOISE"


def test_logs_that_are_no_json_are_seen(end, world):
    def main(args):
        result = plain(args)
        with open(os.path.join(args.output_dir, "metrics.jsonl"), "a") as file:
            file.write('{"loss": NaN}\n')
        return result

    plain = SCRIPTS["sft"].module.main
    outcome = end(wanting(), main)
    assert outcome.label == "NONSENSE" and "metrics.jsonl" in outcome.detail, outcome


def test_metrics_that_are_not_finite_are_seen(end):
    plain = SCRIPTS["sft"].module.main
    outcome = end(wanting(), lambda args: {**plain(args), "loss": float("nan")})
    assert outcome.label == "NONSENSE" and "nan" in outcome.detail, outcome


def test_scores_that_are_not_finite_are_seen(end):
    def main(args):
        with open(args.score.replace(".jsonl", ".scores.jsonl"), "w") as file:
            file.write('{"score": NaN, "reward": 0.0}\n')
        return {}

    outcome = end(lambda case: case.data(case.good()), main, "score")
    assert outcome.label == "NONSENSE" and "scored" in outcome.detail, outcome


def test_weights_that_are_not_finite_are_seen(end):
    def main(args):
        result = plain(args)
        path = os.path.join(args.output_dir, "model", "model.safetensors")
        save_file({name: x / 0 for name, x in load_file(path).items()}, path, {"format": "pt"})
        return result

    plain = SCRIPTS["sft"].module.main
    outcome = end(wanting(), main)
    assert outcome.label == "NONSENSE" and "not finite" in outcome.detail, outcome


def test_a_damaged_checkpoint_is_seen(end):
    def main(args):
        if not args.resume:
            return plain(args)
        os.remove(os.path.join(args.output_dir, "state", "checkpoint.pt"))
        raise ValueError

    plain = SCRIPTS["sft"].module.main

    def spoil(case):
        case.flags["output_dir"] = str(case.folder / "run")
        interrupted(case)

    outcome = end(spoil, main)
    assert outcome.label == "LOST" and "checkpoint.pt" in outcome.detail, outcome


def test_code_that_was_executed_is_seen(end):
    def main(args):
        open(os.path.join(os.getcwd(), "executed"), "w").close()
        complain("error: --model is bad")(args)

    def spoil(case):
        case.absent = [case.folder / "executed"]

    assert end(spoil, main).label == "EXECUTED"


def test_the_process_is_as_it_was(end):
    """A reward may change what it likes: the next case starts like the first."""
    before = (torch.get_default_dtype(), torch.get_num_threads(), os.getcwd(), sys.getrecursionlimit(), sys.stdout,
              sys.stderr, sys.stdin, list(sys.path), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
              signal.getsignal(signal.SIGALRM), torch.is_grad_enabled(), torch.get_default_device())
    inside = []

    def main(args):
        inside.append(os.getcwd())
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        sys.setrecursionlimit(2000)
        sys.path.append("nowhere")
        sys.stdout = None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.chdir("/")
        raise KeyboardInterrupt

    assert end(main=main).label == "TRACEBACK" and inside != [os.getcwd()]
    after = (torch.get_default_dtype(), torch.get_num_threads(), os.getcwd(), sys.getrecursionlimit(), sys.stdout,
             sys.stderr, sys.stdin, list(sys.path), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
             signal.getsignal(signal.SIGALRM), torch.is_grad_enabled(), torch.get_default_device())
    assert after == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_every_kind_of_every_target_is_in_the_first_300():
    wanted = {(name, target) for name, (targets, times, _) in KINDS.items() for target in targets if times}
    missing = wanted - {(name, target) for _, name, target in cases_of(1, 350)}
    assert not missing
    assert {name.rpartition("/")[2] for name, kind_name, _ in cases_of(1, 350) if kind_name == "rewards"} == {*REWARDS}


def test_cases_are_a_function_of_the_seed():
    assert cases_of(1, 300) == cases_of(1, 600)[:300] != cases_of(2, 300)
    names = [name for name, *_ in cases_of(1, 900)]
    assert len({*names}) == 900
    late = names[-1]
    assert [name for name, *_ in cases_of(2, 5, late)] == [late]
    assert all("surrogates" in name for name, *_ in cases_of(1, 300, "surrogates/"))


def test_the_files_of_a_case_are_a_function_of_the_seed(world, tmp_path):
    """Whichever cases ran before."""
    contents = []
    for seed, number in ((1, 4), (1, 4), (2, 4), (1, 5)):
        path = tmp_path.resolve() / str(len(contents))
        run_case(world, path, seed, f"flipped bytes/bandit_bt/{number}", "flipped bytes", "bandit_bt")
        contents.append((path / "rows.jsonl").read_bytes())
    good = lines_of(good_rows("bandit_bt", "text", random.Random("1 flipped bytes/bandit_bt/4")))
    assert contents[0] == contents[1] and len({*contents, good}) == 4


@pytest.mark.parametrize("kind_name", KINDS)
def test_generators_make_files(world, tmp_path, monkeypatch, kind_name):
    """Every generator gives a run that can be started, for each of its targets, and that differs from a good one."""
    targets, times, _ = KINDS[kind_name]
    cases = []

    def main_of(case):
        cases.append(case)
        return case.args() and 0, None, "", "", []

    monkeypatch.setattr(fuzz, "run_main", main_of)
    for target in targets:
        folder = tmp_path.resolve() / target
        name = f"{kind_name}/{target}/{0 if times else 'dict'}"
        assert run_case(world, folder, 1, name, kind_name, target).name.startswith(name)
        files = {path.name for path in folder.iterdir()}
        assert {"good.jsonl", "reward.py"} <= files
        assert cases[-1].flags or files != {"good.jsonl", "reward.py"} or (folder / "reward.py").read_text() != REWARD


@pytest.mark.parametrize("only, code, words", [
    ("finished run/sft/0", 0, "1 refused"), ("planted", 1, "1 TRACEBACK")], ids=["good", "bad"])
def test_command_line(monkeypatch, capsys, only, code, words):
    def spoil(case):
        monkeypatch.setattr(SCRIPTS["sft"].module, "main", interrupts_itself)

    monkeypatch.setitem(KINDS, "planted", (["sft"], 1, spoil))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "350", "--only", only])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    assert fuzz.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(only) and lines[1] == words
