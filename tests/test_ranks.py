"""Several processes: each script on 1, 2 and 3 ranks of torch's own distributed engine (gloo, on the CPU), whole on
some and sharded on others, ends with the same weights, metrics, samples and files; stopped on 2 it goes on on 1 and on 3.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import forked
import kills
import pytest
import torch
from conftest import ROOT, make_model
from ranks import on_ranks, run, run_on_ranks, wait_for_all
from safetensors.torch import load_file
from tiny_runs import SCRIPTS, head, launch, read, timeless, write

import common

torchrun = pytest.importorskip("torch.distributed.run", reason="this torch has no torch.distributed")
subprocess_handler = importlib.import_module(
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler")
TOLERANCE = 5e-6  # of every weight and every metric
FLAGS = {  # 9 rows, 4 a step: the last step of an epoch has one row, less than there are ranks
    "device": "cpu", "batch_size": 4, "micro_batch_size": 2, "eval_every": 0, "eval_samples": 3, "save_every": 0,
    "warmup_steps": 0, "num_train_epochs": 1, "learning_rate": 1e-4, "critic_learning_rate": 1e-4,
    "num_minibatches": 2, "update_epochs": 2, "total_episodes": 16, "max_new_tokens": 6, "num_generations": 4,
    "clip_coef": 10.0, "clip_coef_high": 10.0}  # no token is at the edge of the clip, where rounding decides
KINDS = {  # of runs, by script: numbers of ranks, and of those on which a run goes on that was stopped on 2
    **dict.fromkeys(SCRIPTS, ("2", "3-shard")), "dpo": ("3", "2-shard")}
STOPPED = {"dpo": ("2-3", "2-1-shard"), "ppo": ("2-1", "2-3-shard")}
LABELS = [(name, label) for kinds in (KINDS, STOPPED) for name, labels in kinds.items() for label in labels]


def start_of(script, starts):
    """Of two layers, each of which is sharded; of one for ppo.py and grpo.py, which take most of the time."""
    return starts / ("small_run1" if script.is_sampler else "run1") / "model"


def job(name, starts, folder, label, **options):
    script = SCRIPTS[name]
    flags = {flag: value for flag, value in FLAGS.items() if flag in script.flags}
    flags |= {"dataset": str(starts / f"nine_{name}.jsonl"), "eval_dataset": str(starts / f"{name}_held_out.jsonl"),
              "model": str(start_of(script, starts)), "output_dir": str(folder / f"{name}-{label}")}
    if script.is_sampler:
        flags["reward"] = [str(starts / "small_reward1" / "model"), str(starts / "by_rank.py:words")]
    if name == "dpo":
        flags["eval_every"] = 2
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


@pytest.fixture(scope="module")
def fleet(starts, tmp_path_factory):
    """The folder of all runs: of 1 rank "NAME-1", of N ranks "NAME-N" and, sharded, "NAME-N-shard"; and of runs
    that were stopped on 2 ranks and ended on N "NAME-2-N" and "NAME-2-N-shard".
    """
    folder = tmp_path_factory.mktemp("fleet")
    nine_rows(starts)
    jobs = {1: [job(name, starts, folder, "1", resume=False) for name in SCRIPTS], 2: [], 3: []}
    stopped = []  # (name, label where it stops, label where it goes on)
    for name, label in LABELS:
        shard = label.endswith("-shard")
        world = int(label.removesuffix("-shard")[-1])  # on which it ends
        jobs[world].append(job(name, starts, folder, label, shard=shard, resume=label.startswith("2-") and label != "2-shard"))
        if label in STOPPED.get(name, ()):
            stopped.append((name, "2-stopped-shard" if shard else "2-stopped", label))
    for name, label in dict.fromkeys((name, label) for name, label, _ in stopped):
        jobs[2].append(job(name, starts, folder, label, shard=label.endswith("-shard")) | {"stop": 1})
    jobs[2].append(job("sft", starts, folder, "killed-1", save_every=1) | {"kill": 1})
    jobs[3].append(job("dpo", starts, folder, "killed-0", save_every=1, shard=True) | {"kill": 0})
    for each in jobs[1]:
        if not each["flags"]["resume"]:
            run_here(each)
    for world in (2, 3):
        log = folder / f"log-{world}"
        codes = run_on_ranks(world, jobs[world], log)
        assert sorted(codes) == [-9] + [1] * (world - 1), log.read_text()
        if world == 2:
            for name, label, after in stopped:
                path = folder / f"{name}-{label}"
                assert not (path / "model").exists() and (path / "state" / "checkpoint.pt").exists()
                shutil.copytree(path, folder / f"{name}-{after}")
    for each in jobs[1]:
        if each["flags"]["resume"]:
            run_here(each)
    return folder


def run_here(job):
    """On one rank, this process: what the forks need is then there, too."""
    launch(SimpleNamespace(module=SimpleNamespace(main=lambda _: run(job, 0, True))), None)


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
        want = load_file(start_of(script, starts) / "model.safetensors")
        gap = max((got[key] - want[key]).abs().max().item() for key in want.keys() & got.keys())
        assert gap > 30 * TOLERANCE, script.name


@pytest.mark.parametrize("name, world, killed", [("sft", 2, 1), ("dpo", 3, 0)])
def test_a_killed_rank_ends_the_others_with_a_line_and_the_checkpoint_is_whole(fleet, name, world, killed):
    """In its log of step 2, before that is saved; the others meet its absence in a sum over the ranks."""
    error = (fleet / f"log-{world}").read_text()
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


def agent(log, endpoint, *arguments):
    """A fork of this process that does what the command torchrun does, on one of two nodes of one process each, which
    is a fork, too.
    """
    def main(_):
        subprocess_handler.Popen = forked.Popen
        os.chdir(ROOT)
        os.environ["OMP_NUM_THREADS"] = "1"
        torchrun.main(["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
                       *map(str, arguments)])  # fmt: skip

    return kills.Child(SimpleNamespace(module=SimpleNamespace(main=main)), None, log)


def test_two_agents_are_two_nodes(fleet, starts, tmp_path):
    """The README's command for several nodes, both on this machine."""
    flags = job("sft", starts, tmp_path, "nodes")["flags"]
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    logs = [tmp_path / f"agent{k}.log" for k in range(2)]
    agents = [agent(log, endpoint, "sft.py", *arguments) for log in logs]
    codes = wait_for_all(agents)
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], outputs
    assert sorted("model, metrics and samples" in output for output in outputs) == [False, True]
    rows = timeless(read(fleet / "sft-1" / "metrics.jsonl")), timeless(read(tmp_path / "sft-nodes" / "metrics.jsonl"))
    for want, got in zip(*rows, strict=True):
        assert all(is_near(got[key], want[key]) for key in want)


def test_all_ranks_make_what_they_start_from(starts, tmp_path):
    """The script that makes it runs in them as any other does, with its own flags at their defaults."""
    (tmp_path / "first.py").write_text(
        "import dataclasses, torch\nfrom common import over_ranks, ranks\n"
        "@dataclasses.dataclass\nclass Args:\n    value: int = 3\n"
        "def main(args):\n"
        "    total = over_ranks(torch.tensor([args.value + ranks()[0]]))\n"
        "    open(f'made-{ranks()[0]}', 'w').write(str(total.item()))\n")

    def main(rank):
        os.chdir(tmp_path)
        sys.path.insert(0, str(tmp_path))
        common.__file__ = str(tmp_path / "common.py")  # beside which it looks for first.py
        common.device_of(SimpleNamespace(device="cpu", dtype="auto"))
        common.make_first("model", "model", "first.py")

    codes = on_ranks(2, main, tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert [(tmp_path / f"made-{rank}").read_text() for rank in range(2)] == ["7", "7"]


def test_bad_input_is_one_line_of_one_rank(starts, tmp_path):
    """The other waits until torchrun ends it, as it does when the first has ended."""
    log = tmp_path / "log"
    codes = run_on_ranks(2, [job("sft", starts, tmp_path, "bad", dataset="missing.jsonl")], log, ends_others=True)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert codes == [2, -signal.SIGTERM] and len(lines) == 1 and "missing.jsonl" in lines[0]


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
