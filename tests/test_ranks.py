"""Several processes: each script on 1, 2 and 3 ranks of torch's own distributed engine (gloo, on the CPU), whole and
sharded, ends with the same weights, metrics, samples and files; stopped on 2 it goes on on 1 and on 3.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model
from safetensors.torch import load_file
from tiny_runs import SCRIPTS, head, read, timeless, write

import common

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
TOLERANCE = 5e-6  # of every weight and every metric
FLAGS = {  # 9 rows, 4 a step: the last step of an epoch has one row, less than there are ranks
    "device": "cpu", "batch_size": 4, "micro_batch_size": 2, "eval_every": 2, "eval_samples": 3, "save_every": 0,
    "warmup_steps": 0, "num_train_epochs": 1, "learning_rate": 1e-4, "critic_learning_rate": 1e-4,
    "num_minibatches": 2, "update_epochs": 2, "total_episodes": 16, "max_new_tokens": 12, "num_generations": 4,
    "clip_coef": 10.0, "clip_coef_high": 10.0}  # no token is at the edge of the clip, where rounding decides
STOPPED = ("dpo", "ppo")  # continued on other numbers of ranks, sharded and not


def job(name, starts, folder, label, **options):
    script = SCRIPTS[name]
    flags = {flag: value for flag, value in FLAGS.items() if flag in script.flags}
    flags |= {"dataset": str(starts / f"nine_{name}.jsonl"), "eval_dataset": str(starts / f"{name}_held_out.jsonl"),
              "model": str(starts / "run1" / "model"), "output_dir": str(folder / f"{name}-{label}")}
    if script.is_sampler:
        flags["reward"] = [str(starts / "reward1" / "model"), str(starts / "by_rank.py:words")]
    if name == "reward_model":
        flags["loss_type"] = "plackett_luce"
    return {"script": name, "flags": flags | options}


def nine_rows(starts):
    """A file of nine rows for each script; and a reward function that must be asked by one rank for all: what it
    says depends on the process.
    """
    for name, script in SCRIPTS.items():
        rows = script.rows(0, 9)
        if name == "dpo":
            rows[6:] = head("rankings", 0, 3)
        write(starts / f"nine_{name}.jsonl", rows)
    (starts / "by_rank.py").write_text(
        "import os\n\n\ndef words(prompts, completions, **columns):\n"
        "    return [len(text.split()) + int(os.environ.get('RANK', 0)) for text in completions]\n")


def start(world, jobs, folder):
    path = folder / f"jobs-{world}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests" / "ranks.py"), str(world), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


@pytest.fixture(scope="module")
def fleet(starts, tmp_path_factory):
    """The folder of all runs: of 1 rank "NAME-1", of N ranks "NAME-N" and, sharded, "NAME-N-shard"; and of runs
    that were stopped on 2 ranks and ended on N "NAME-2-N" and "NAME-2-N-shard".
    """
    folder = tmp_path_factory.mktemp("fleet")
    nine_rows(starts)
    jobs = {world: [] for world in (1, 2, 3)}
    for name in SCRIPTS:
        jobs[1].append(job(name, starts, folder, "1"))
        for world in (2, 3):
            jobs[world].append(job(name, starts, folder, f"{world}"))
            jobs[world].append(job(name, starts, folder, f"{world}-shard", shard=True))
    for name in STOPPED:
        for label, shard in (("", False), ("-shard", True)):
            jobs[2].append(job(name, starts, folder, f"2-stopped{label}", shard=shard) | {"stop": 1})
            for world in (1, 3):
                jobs[world].append(job(name, starts, folder, f"2-{world}{label}", shard=shard, resume=True))
    jobs[2].append(job("sft", starts, folder, "killed-1", save_every=1) | {"kill": 1})
    jobs[3].append(job("ppo", starts, folder, "killed-0", save_every=1, shard=True) | {"kill": 0})
    for world in (2, 1, 3):
        process = start(world, jobs[world], folder)
        output, error = process.communicate(timeout=300)
        codes = json.loads(output.splitlines()[-1])
        (folder / f"errors-{world}").write_text(error)
        assert [0] == codes if world == 1 else sorted(codes) == [-9] + [1] * (world - 1), error
        if world == 2:
            for path in folder.glob("*-2-stopped*"):
                assert not (path / "model").exists() and (path / "state" / "checkpoint.pt").exists()
                for n in (1, 3):
                    shutil.copytree(path, folder / path.name.replace("stopped", str(n)))
    return folder


LABELS = [(name, label) for name in SCRIPTS for label in ("2", "3", "2-shard", "3-shard")]
LABELS += [(name, label) for name in STOPPED for label in ("2-1", "2-3", "2-1-shard", "2-3-shard")]


def is_near(got, want):
    return got == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("name, label", LABELS)
def test_ranks_end_where_one_process_does(fleet, name, label):
    one, many = fleet / f"{name}-1", fleet / f"{name}-{label}"
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if "events" not in path.name)
             for run in (one, many)]
    assert files[0] == files[1]
    rows = timeless(read(one / "metrics.jsonl")), timeless(read(many / "metrics.jsonl"))
    assert len(rows[0]) == len(rows[1]) >= 4
    for want, got in zip(*rows):
        assert got.keys() == want.keys() and all(is_near(got[key], want[key]) for key in want)
    samples = read(one / "samples.jsonl"), read(many / "samples.jsonl")
    assert len(samples[0]) == len(samples[1]) > 0
    for want, got in zip(*samples):
        for key, value in want.items():
            assert is_near(got[key], value) if isinstance(value, float) else got[key] == value
    for file in one.glob("*/model.safetensors"):
        want, got = load_file(file), load_file(many / file.relative_to(one))
        assert want.keys() == got.keys()
        for key, x in want.items():
            assert x.dtype == got[key].dtype and (x - got[key]).abs().max() <= TOLERANCE, key
    assert json.loads((many / "model" / "config.json").read_text())["architectures"] == \
        json.loads((one / "model" / "config.json").read_text())["architectures"]


def test_training_has_moved_the_weights(fleet, starts):
    """Else all of the above would be equal without a step."""
    for name, script in SCRIPTS.items():
        got = load_file(fleet / f"{name}-1" / "model" / "model.safetensors")
        want = load_file(starts / "run1" / "model" / "model.safetensors")
        gap = max((got[key] - want[key]).abs().max().item() for key in want.keys() & got.keys())
        assert gap > 30 * TOLERANCE, script.name


@pytest.mark.parametrize("name, world, killed", [("sft", 2, 1), ("ppo", 3, 0)])
def test_a_killed_rank_ends_the_others_with_a_line_and_the_checkpoint_is_whole(fleet, name, world, killed):
    """In its log of step 2, before that is saved; the others meet its absence in a sum over the ranks."""
    error = (fleet / f"errors-{world}").read_text()
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == world - 1 and all("another process of this run has ended" in line for line in lines)
    folder = fleet / f"{name}-killed-{killed}"
    assert not (folder / "model").exists()
    assert torch.load(folder / "state" / "checkpoint.pt", weights_only=True)["step"] == 1
    assert [row["step"] for row in read(folder / "metrics.jsonl")][:2] == [0, 1]


# ---- Shares of rows ----


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_a_partition_with_as_many_on_every_rank(world, monkeypatch):
    for n in [*range(12), 100]:
        for size in (1, 2, 5, 64):
            parts = []
            for rank in range(world):
                monkeypatch.setattr(common, "ranks", lambda rank=rank: (rank, world))
                parts.append(common.shares(n, size))
            flat = sorted(sum(parts, []), key=lambda s: (s.start, s.stop))
            assert [i for s in flat for i in range(s.start, s.stop)] == list(range(n))
            assert len({len(part) for part in parts}) == 1 and all(s.stop - s.start <= size for s in flat)
            assert len(parts[0]) == max(-(-n // (size * world)), 1)


def test_a_rank_without_rows_runs_the_model_and_has_no_gradient():
    model = make_model("llama").train()
    mask = torch.zeros(0, 1, dtype=torch.bool)
    logprobs = common.sequence_logprobs(model, common.pad([], "cpu"), mask)
    assert logprobs.shape == (0, 1)
    logprobs.sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_sampling_starts_again_with_fewer_rows_when_memory_runs_out(monkeypatch):
    model = make_model("llama").eval()
    prompts = [[1, 5, 9 + i] for i in range(40)]
    want = common.sample(model, prompts, 6, [2], seed=3)
    sample, sizes = common.sample, []

    def small(model, prompts, *rest, **options):
        sizes.append(rest[4])
        if rest[4] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, prompts, *rest, **options)

    monkeypatch.setattr(common, "sample", small)
    got = common.sample_all(model, prompts, 6, [2], seed=3)
    assert sizes == [256, 16]
    assert torch.equal(got["input_ids"], want["input_ids"]) and torch.equal(got["mask"], want["mask"])


def test_sampling_that_never_fits_names_the_flag(monkeypatch, capsys):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(common, "sample", never)
    with pytest.raises(SystemExit) as end:
        common.sample_all(make_model("llama"), [[1, 5]], 6, [2])
    assert end.value.code == 2 and "--max-new-tokens" in capsys.readouterr().err


def test_out_of_memory_in_training_is_a_line(capsys):
    common.on_error(torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--micro-batch-size" in error and "--gradient-checkpointing" in error


# ---- torchrun itself ----


def torchrun(n, *arguments, endpoint="localhost:0", nodes=1, cwd=ROOT):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(n),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_agents_are_two_nodes(fleet, starts, tmp_path):
    """The README's command for several nodes, both on this machine."""
    flags = job("sft", starts, tmp_path, "nodes")["flags"]
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    agents = [torchrun(1, "sft.py", *arguments, endpoint=endpoint, nodes=2) for _ in range(2)]
    outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sorted("model, metrics and samples" in output for output, _ in outputs) == [False, True]
    rows = timeless(read(fleet / "sft-1" / "metrics.jsonl")), timeless(read(tmp_path / "sft-nodes" / "metrics.jsonl"))
    for want, got in zip(*rows, strict=True):
        assert all(is_near(got[key], want[key]) for key in want)


FIRST = """import os, sys
assert "LOCAL_RANK" not in os.environ
open("made.txt", "a").write("once\\n")
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_one_rank_makes_what_all_start_from(tmp_path, code):
    """The others wait for it, and end as it ends."""
    shutil.copy(ROOT / "common.py", tmp_path)
    (tmp_path / "first.py").write_text(FIRST.format(code=code))
    (tmp_path / "run.py").write_text(
        "import types, common\n"
        "common.device_of(types.SimpleNamespace(device='cpu', dtype='auto'))\n"
        "common.make_first('model', 'model', 'first.py')\n"
        "open(f'after-{common.ranks()[0]}', 'w')\n")
    process = torchrun(2, "run.py", cwd=tmp_path)
    process.communicate(timeout=200)
    assert (tmp_path / "made.txt").read_text() == "once\n"
    assert len(list(tmp_path.glob("after-*"))) == (0 if code else 2)
    assert (process.returncode == 0) == (code == 0)


def test_bad_input_is_one_line_of_one_rank(fleet, starts, tmp_path):
    process = torchrun(2, "sft.py", "--dataset", "missing.jsonl", "--device", "cpu", "--output-dir", tmp_path / "run")
    _, error = process.communicate(timeout=200)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(lines) == 1 and "missing.jsonl" in lines[0]
    assert re.search(r"exitcode\s*: 2", error)


def test_frozen_layers_in_16_bits_change_no_product():
    """Under autocast a linear layer's weights are rounded in every product; held so, no bit of a log-prob moves."""
    ids = torch.tensor([[1, 5, 9, 4, 7, 2], [1, 8, 3, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    for kind in ("llama", "gpt2"):
        model = make_model(kind).requires_grad_(False)
        for rows in (False, True):
            if rows:
                common.use_rows(model)
            for autocast in (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.autocast("cpu", enabled=False)):
                with autocast():
                    want = common.sequence_logprobs(model, ids, mask)
                class Plain:
                    lora_rank, shard = 0, False
                light = make_model(kind).requires_grad_(False)
                if rows:
                    common.use_rows(light)
                common.lighten(Plain, autocast, light, None)
                dtypes = {p.dtype for p in light.parameters()}
                with autocast():
                    is_on = torch.is_autocast_enabled("cpu")
                    got = common.sequence_logprobs(light, ids, mask)
                assert torch.equal(got, want)
                assert dtypes == ({torch.float32, torch.bfloat16} if is_on else {torch.float32})
                assert light.get_input_embeddings().weight.dtype == torch.float32
    trained = make_model("llama")
    common.lighten(Plain, lambda: torch.autocast("cpu", torch.bfloat16), trained)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
