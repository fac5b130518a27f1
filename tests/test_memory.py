"""benchmarks/memory.py against tensors that were counted: weights, adapters, what autograd keeps, the sampler's cache
and the peak of a real run; then its table, its answers and the README's figures.
"""

import contextlib
import ctypes
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import forked
import memory
import pytest
import torch
import transformers
from conftest import ROOT

import common

PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
RESULT = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
TEXT = (ROOT / "benchmarks" / "README.md").read_text()
WIDTHS = 64, 3, 4, 2, 160, 100  # unlike each other, as far as they may be
ROWS, LENGTH = 12, 40
CPU = memory.Args(device="cpu", micro_batch_size=ROWS, prompt_tokens=10, response_tokens=LENGTH - 10)


def config(tied=True, **others):
    sizes = dict(zip(memory.SIZES, WIDTHS)) | others
    return transformers.LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=64)


def build(tied=True, **others):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(tied, **others), dtype=torch.float32)
    common.use_rows(model)
    return model.train()


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def lightened(model, rank=0, autocast=contextlib.nullcontext):
    """With adapters, if it is trained, and frozen weights as the scripts have them."""
    common.lighten(types.SimpleNamespace(lora_rank=rank, seed=1, shard=False), autocast, model)
    return model


def batch():
    ids = torch.randint(100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[:, 10:] = True
    return ids, mask


def trained_bytes(model):
    """(weights, gradients, Adam's states) after a step, counted."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    common.sequence_logprobs(model, *batch()).sum().backward()
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    return size(model.parameters()), size(p.grad for p in parameters), size(states)


# ---- What a run holds ----


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_adam_are_counted(tied):
    got = memory.plan(memory.sizes_of(config(tied)), "sft", CPU)
    assert (got["weights"], got["gradients"], got["adam"]) == trained_bytes(build(tied))
    assert got["frozen"] == got["casts"] == 0


@PEFT
def test_adapters_are_counted():
    got = memory.plan(memory.sizes_of(config(False)), "sft", CPU, rank=3)
    assert (got["weights"], got["gradients"], got["adam"]) == trained_bytes(lightened(build(False), 3))


def test_what_lighten_leaves():
    """Bytes of a frozen copy where autocast is on, as on a GPU."""
    s = memory.sizes_of(config(False))
    model = lightened(build(False).requires_grad_(False), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert memory.plan(s, "grpo", memory.Args())["frozen"] == size(model.parameters())
    assert memory.plan(s, "grpo", memory.Args(), rank=8)["frozen"] == 0
    assert memory.plan(s, "dpo", memory.Args())["frozen"] == memory.plan(s, "sft", memory.Args())["frozen"] == 0


def test_ppo_has_a_critic_and_a_reward_model():
    s = memory.sizes_of(config(False))
    score = transformers.AutoModelForSequenceClassification.from_config(config(False, num_labels=1))
    got = memory.plan(s, "ppo", CPU)
    assert got["weights"] == size(build(False).parameters()) + size(score.parameters())
    assert got["frozen"] == got["weights"] and got["adam"] == 2 * got["gradients"] == 2 * got["weights"]
    assert memory.plan(s, "reward_model", CPU)["weights"] == size(score.parameters())


def saved(model, autocast=contextlib.nullcontext):
    """Bytes that autograd keeps from the body's forward pass, weights aside."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids, mask = batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast():
        hidden = common.states(model, ids, mask | True)
    assert hidden.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("rank", [0, pytest.param(24, marks=PEFT)])
def test_activations_of_a_layer_in_fp32(rank):
    """By how much more is kept with two layers more."""
    s = memory.sizes_of(config())
    kept = []
    for layers in (2, 4):
        model = build(num_hidden_layers=layers)
        kept.append(saved(lightened(model, rank) if rank else model))
    layer = memory.activations(s, CPU, rank) / 3 - 16 * s.H / 3
    assert (kept[1] - kept[0]) / 2 / (ROWS * LENGTH) == pytest.approx(layer, rel=0.03)


@pytest.mark.parametrize("rank", [0, pytest.param(24, marks=PEFT)])
def test_activations_of_a_layer_in_bf16(rank):
    """On a CPU, whose attention copies its output once more; and the casts of the layers' trained weights."""
    s = memory.sizes_of(config())
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    kept = []
    for layers in (2, 4):
        model = build(num_hidden_layers=layers)
        kept.append(saved(lightened(model, rank, autocast) if rank else model, autocast))
    layer = (memory.activations(s, memory.Args(), rank) - 14 * s.H) / 3 + 2 * s.q
    casts = 2 * (rank * s.inner if rank else s.linear) / 3
    assert (kept[1] - kept[0]) / 2 == pytest.approx(layer * ROWS * LENGTH + casts, rel=0.03)
    assert memory.plan(s, "sft", memory.Args(), rank)["casts"] == 2 * (s.linear * (not rank) + s.head)


def test_checkpointing_keeps_a_layer_s_input():
    kept = []
    for layers in (2, 4):
        model = build(num_hidden_layers=layers)
        model.gradient_checkpointing_enable()
        kept.append(saved(model))
    assert (kept[1] - kept[0]) / 2 / (ROWS * LENGTH) == pytest.approx(4 * 64, rel=0.03)
    args = replace(CPU, gradient_checkpointing=True)
    few, many = (memory.activations(memory.sizes_of(config(num_hidden_layers=n)), args, 0) for n in (2, 4))
    assert many - few == 2 * 4 * 64


def test_logprobs_are_kept_as_said():
    s = memory.sizes_of(config())
    logprobs = common.sequence_logprobs(build(), *batch())
    kept = logprobs.grad_fn.next_functions[1][0]
    scored = ROWS * (LENGTH - 10)
    got = memory.plan(s, "sft", CPU)["logprobs"]
    assert size(kept.kept) == 4 * scored * s.V
    assert got == 4 * scored * s.V + max((8 - 4) * 128 * s.V, 4 * s.V * s.H)
    long = replace(CPU, micro_batch_size=10**6)
    assert memory.plan(s, "sft", long)["logprobs"] == max(8 * 128 * s.V, 4 * s.V * s.H)  # more than KEEP_BYTES


def test_the_cache_is_counted():
    s = memory.sizes_of(config())
    cache = common.RowsCache(build().eval(), [[1] * 10] * ROWS, 30)
    with torch.no_grad():
        cache.step()
    layers = [x for pair in cache.layers.values() for x in pair]
    got = memory.plan(s, "grpo", replace(CPU, sampled_rows=ROWS))["cache"]
    assert got == size(layers) + 2 * ROWS * s.V * 4
    assert memory.plan(s, "reward_model", CPU)["cache"] == 0


# ---- The peak ----


class Frugal(forked.Popen):
    """A fork that gives back what its parent has freed, and then whatever it frees, as the benchmark has glibc do."""

    @staticmethod
    def prepare():
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            assert libc.mallopt(option, 65536)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from here


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_of_a_real_run(tmp_path, monkeypatch):
    """With the widths and the vocabulary of the case, and 3 layers and rows of 32 tokens in place of its own."""
    monkeypatch.setattr(memory, "RESPONSE", 24)
    monkeypatch.setitem(memory.NAMED, "30M", ("llama", (320, 3, 5, 5, 960, 32000), True))
    monkeypatch.setattr(memory.subprocess, "Popen", Frugal)
    found = memory.compare(str(tmp_path / "memory.json"), ["sft"])
    assert 100 < found["libraries"]["sft, rank 0"] < 1500 and 100 < found["cases"]["sft"]["measured"] < 2000
    assert found["cases"]["sft"]["ratio"] == pytest.approx(1, abs=0.15)


def test_the_measured_cases():
    """Against this code's own predictions, so that neither can change without the other."""
    sizes = memory.sizes_of(memory.config_of("30M"))
    assert list(RESULT["cases"]) == list(memory.CASES)
    for name, row in RESULT["cases"].items():
        script, _, rank, _ = memory.CASES[name]
        parts = memory.plan(sizes, script, memory.args_of(name), rank)
        assert {part: row[part] for part in parts} == {part: round(x / 2**20, 1) for part, x in parts.items()}
        assert row["ratio"] == pytest.approx(row["peak"] / row["measured"], abs=1e-3)
        assert row["ratio"] == pytest.approx(1, abs=0.15), name
    for script in ("sft", "dpo", "grpo"):
        assert RESULT["cases"][f"{script}, LoRA"]["measured"] < 0.6 * RESULT["cases"][script]["measured"]


def test_steps_measured_on_a_gpu():
    for predicted, measured in RESULT["H200"].values():
        assert predicted == pytest.approx(measured, rel=0.15)


def test_the_readme_has_the_results():
    section = TEXT.split("\n## Memory\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    rows = {tuple(cells[:2]): cells[2:] for cells in lines}
    for name, row in RESULT["cases"].items():
        held = sum(row[part] for part in ("weights", "gradients", "adam", "frozen"))
        figures = held, row["activations"], row["logprobs"], row["peak"], row["measured"]
        want = [f"{x:.0f}" for x in figures] + [f"{row['ratio']:.2f}"]
        assert rows.pop((name, str(memory.CASES[name][1]))) == want
    for script, modes in RESULT["8B"].items():
        for mode, row in modes.items():
            assert rows.pop((script, mode)) == memory.cells_of(row)
    assert len(rows) == 4  # two headings, with the lines below them
    libraries = RESULT["libraries"].values()
    assert f"({min(libraries):.0f} to {max(libraries):.0f}, from the same run" in section
    figures = [f"{RESULT['cases'][name]['measured']:.0f}" for name in ("dpo, LoRA", "dpo", "grpo, LoRA", "grpo")]
    figures += [str(x) for pair in RESULT["H200"].values() for x in pair]
    figures += [str(x) for x in RESULT["dpo.py"].values()]
    text = section
    for figure in figures:  # in this order
        _, found, text = text.partition(figure)
        assert found, figure
    assert {key: RESULT[key] for key in ("dpo.py", "H200", "8B")} == json.loads(json.dumps(memory.examples()))


# ---- The table ----


def test_named_sizes_are_as_published():
    published = {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "7B": 7_615_616_512, "8B": 8_030_261_248}
    assert {name: memory.sizes_of(memory.config_of(name)).P for name in published} == published


def test_more_ranks_and_adapters_take_less():
    s = memory.sizes_of(memory.config_of("0.5B"))
    for script in memory.SCRIPTS:
        full, lora, shard, both = (
            memory.plan(s, script, memory.Args(), rank, ranks)["peak"] for rank, ranks in [(0, 1), (8, 1), (0, 4), (8, 4)])
        assert lora < full and both < shard < full
    parts = memory.plan(s, "ppo", memory.Args(), 0, 4)
    assert parts["adam"] == memory.plan(s, "ppo", memory.Args())["adam"] / 4


def test_a_folder_and_a_config_are_read(tmp_path):
    config().save_pretrained(tmp_path)
    want = memory.sizes_of(config())
    for name in (tmp_path, tmp_path / "config.json"):
        assert memory.sizes_of(memory.config_of(str(name))) == want


def test_the_printed_table(tmp_path, capsys):
    file = tmp_path / "table.json"
    args = memory.Args(model="0.5B", scripts=("sft", "grpo"), output=str(file))
    result = memory.main(args)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(shown) == 1 + 2 * 4 and json.loads(file.read_text())["table"] == result["table"]
    row = result["table"]["grpo"]["full"]
    assert shown[5] == f"| grpo | full | {' | '.join(memory.cells_of(row))} |"
    assert row["peak"] <= sum(row[name] for name in memory.PARTS) + 0.1
    assert row["fits"] == 48 and row["peak"] > 0.9 * 24
