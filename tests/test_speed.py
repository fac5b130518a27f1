"""benchmarks/speed.py: its clock, its checks, its table, and a run of its tiny cases, with TRL or without it."""

import json
import time
from types import SimpleNamespace

import forked
import pytest
import speed
import torch
from common import shuffled
from conftest import ROOT

RESULT = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
TEXT = (ROOT / "benchmarks" / "README.md").read_text()


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("speed") / "speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "gc", SimpleNamespace(collect=lambda: None))  # of all that the tests hold
        return speed.main(speed.Args(quick=True, output=str(file))), json.loads(file.read_text())


def test_the_quick_run_measures_everything_that_is_installed(quick):
    result, written = quick
    assert list(result["cases"]) == list(written["cases"]) == ["sft", "dpo", "reward model", "grpo", "sampling"]
    for name, row in result["cases"].items():
        has_peer = result["versions"]["trl"] is not None or name == "sampling"
        peers = [setting for setting in row["settings"] if not setting.startswith("ours")]
        assert "ours" in row["settings"] and bool(peers) == has_peer
        assert row["best"] in peers if has_peer else row["best"] is None
        for setting in row["settings"].values():
            (times,) = setting["cpu_ms_of_rounds"]
            assert len(times) == (1 if name == "sampling" else 2) and 0 < min(times) and max(times) < 5000


def test_trl_takes_the_same_steps(quick):
    """Mean losses over three steps at a learning rate that changes them, each on rows of its own."""
    pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    for name in ("sft", "dpo", "reward model"):
        settings = quick[0]["cases"][name]["settings"]
        for setting in ("fp32", "single rows"):
            assert settings[setting]["check"] == pytest.approx(settings["ours"]["check"], rel=1e-5), (name, setting)


def test_durations_are_between_the_ends_of_optimizer_steps():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    burn(0.1)  # before the first step: not counted
    with speed.clock() as stamps:
        for seconds in (0.1, 0.02, 0.05):
            burn(seconds)
            optimizer.step()
    optimizer.step()  # nobody listens
    first, second = speed.durations(stamps)["cpu_ms"]
    assert 20 <= first < 40 and 50 <= second < 80
    assert speed.durations([(1.0, 7.0), (1.5, 7.2), (3.5, 7.3)]) == {
        "wall_ms": pytest.approx([500, 2000]), "cpu_ms": pytest.approx([200, 100])}  # fmt: skip


SCRIPT = """
import sys, time
import torch
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
burn(float(sys.argv[1]))
if len(sys.argv) == 3:
    optimizer.step()
    burn(float(sys.argv[2]))
"""


def test_the_first_step_ends_the_process(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(speed.subprocess, "Popen", forked.Popen)
    seconds = speed.seconds_to_first_step(str(script), "0.3", "30")
    assert 0.3 < seconds["cpu_s"] < 20
    monkeypatch.setattr(speed, "FIRST_STEP", "")  # a process that ends by itself
    with pytest.raises(SystemExit):
        speed.seconds_to_first_step(str(script), "0")
    assert "came to no optimizer step" in capsys.readouterr().err


def contenders_with(case, times):
    """Runs that take these CPU milliseconds, by name and round; twice as long on the wall."""
    times = {name: iter(x) for name, x in times.items()}
    calls = []

    def run(name, options, steps):
        calls.append(name)
        cpu = next(times[name])
        return {"cpu_ms": cpu, "wall_ms": [2 * x for x in cpu], "check": 1.0}

    return SimpleNamespace(case=case, sampler=None, run=run), calls


def test_ratios_are_of_runs_of_the_same_round():
    case = speed.Training("grpo", "shape", "model", [], 8, {}, {})
    contenders, calls = contenders_with(case, {
        "ours": [[1, 3], [10, 10], [1, 1]], "fp32": [[4, 4], [10, 20], [2, 3]], "default": [[8, 4], [10, 2], [8, 8]]})  # fmt: skip
    row = speed.measure(speed.Args(), contenders, True)
    assert calls == ["ours", "fp32", "default", "fp32", "default", "ours", "default", "ours", "fp32"]
    assert row["settings"]["fp32"]["cpu_ratio"] == [2.0, 1.5, 2.5]
    assert row["settings"]["default"]["wall_ratio"] == [3.0, 0.6, 8.0]
    assert row["settings"]["ours"]["cpu_ms"] == 2 and row["settings"]["fp32"]["cpu_ms"] == 4
    assert row["settings"]["default"]["wall_ms"] == 16 and row["best"] == "fp32"


@pytest.mark.parametrize("script, other, wrong", [
    ("sft", 2.01, False), ("sft", 2.03, True), ("dpo", 1.97, True), ("grpo", 2.3, False), ("grpo", 2.5, True),
    ("sft", float("nan"), True)])  # fmt: skip
def test_other_work_is_noticed(script, other, wrong):
    case = speed.Training(script, "shape", "model", [], 8, {}, {})
    row = {"settings": {"ours": {"check": 2.0}, "fp32": {"check": other}}}
    assert bool(speed.disagreement(case, row)) == wrong


def test_trl_gets_the_rows_in_the_order_of_the_script(tmp_path, monkeypatch):
    """Which the script draws from the seed: of what order() gives, each step takes the next batch_size rows."""
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(8)]
    case = speed.Training("sft", "shape", "model", rows, 2, {}, {})
    assert speed.rows_of(case, 3) == rows[:6]
    grouped = speed.Training("grpo", "shape", "model", rows, 4, {}, {}, group=2)
    assert speed.rows_of(grouped, 2) == rows[:4]
    assert speed.in_order(rows) == [rows[i] for i in shuffled(8, speed.SEED, 0)] != rows


def test_absent_data_is_a_reason_to_skip(tmp_path, capsys):
    names = ["sft, gsm8k", "grpo, tinystories"]
    result = speed.main(speed.Args(cases=names, shared=str(tmp_path), output=""))
    assert list(result["cases"]) == names
    assert all("is absent" in row["skipped"] for row in result["cases"].values())
    assert capsys.readouterr().out.count("skipped: ") == 2
    with pytest.raises(SystemExit):
        speed.main(speed.Args(cases=["no such case"], output=""))


def test_a_part_of_the_cases_keeps_the_others(tmp_path):
    path = str(tmp_path / "speed.json")
    result = lambda versions, first_step, **cases: {"versions": versions, "first_step": first_step, "cases": cases}
    speed.write_result(path, result("v", [1.23456789], a=1, b=2), True)
    speed.write_result(path, result("v", None, b=3), True)
    assert json.loads(open(path).read()) == result("v", [1.2346], a=1, b=3)
    speed.write_result(path, result("w", None, b=4), True)  # other versions cannot be compared
    assert json.loads(open(path).read()) == result("w", None, b=4)
    speed.write_result(path, result("w", None, c=5), False)
    assert json.loads(open(path).read()) == result("w", None, c=5)


def test_memory_is_the_peak_of_the_run(tmp_path, capsys):
    args = speed.Args(quick=True, child=json.dumps(["sampling", "ours", {}]), folder=str(tmp_path))
    speed.main(args)
    peak = int(capsys.readouterr().out.splitlines()[-1])
    assert 1e8 < speed.resident("VmRSS") - 5e7 < peak < 1e10
    assert (tmp_path / "tiny" / "model.safetensors").exists()


def test_the_table_is_that_of_the_results():
    rows = {}
    for line in TEXT.splitlines():
        name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if name in RESULT["cases"]:
            rows[name] = cells
    assert list(rows) == list(RESULT["cases"])
    for name, cells in rows.items():
        assert cells == speed.cells_of(RESULT["cases"][name]), name
