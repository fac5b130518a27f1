"""benchmarks/lora.py: a tiny run, what it leaves as it is, its table; the table and the sentences of the README are those
of benchmarks/results/lora.json.
"""

import json
import statistics

import lora
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny_runs import read

RESULT = json.loads((ROOT / "benchmarks" / "results" / "lora.json").read_text())
TEXT = (ROOT / "benchmarks" / "README.md").read_text()
FEW = {
    192: ["* grpo.py --kl-in reward --learning-rate 3e-4", "grpo.py --kl-in reward" + lora.WITHOUT],
    64: ["ppo.py --lora-rank 8", "* grpo.py --lora-rank 8"]}
VECTORS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("peft", reason="needs the optional package peft")
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("lora")
    patch.chdir(ROOT)
    patch.setattr(lora, "RUNS", FEW)
    args = lora.Args(
        seeds=[1, 2], reference_samples=16, policy_samples=4, tiny=True, folder=str(folder / "runs"),
        output=str(folder / "lora.json"))  # fmt: skip
    yield args, lora.main(args), patch
    patch.undo()


def test_a_tiny_run(tiny):
    args, result, _ = tiny
    assert json.loads(open(args.output).read()) == result and result["versions"]["peft"]
    assert [(row["size"], row["seed"]) for row in result["policies"]] == [
        (192, 1), (192, 2), (192, 1), (64, 1), (64, 1), (64, 2)]  # those with a star have every seed
    for row in result["policies"]:
        assert row["kl"] > 0 and row["kl_se"] > 0 and row["cpu_seconds"] > 0 and args.folder not in row["command"]
    rows = lora.table(result).splitlines()
    assert len(rows) == 2 + 4 and rows[3].startswith("| 192 | `grpo.py --kl-in reward` without the word vectors | 1 |")


def test_models_differ_in_their_size_alone(tiny):
    args, _, _ = tiny
    configs = [json.loads(open(f"{args.folder}/{size}-start/config.json").read()) for size in (64, 192)]
    assert configs[0] == json.loads((ROOT / "data" / "model" / "config.json").read_text())
    differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differ == {"hidden_size", "intermediate_size"} and configs[1]["hidden_size"] == 192


def test_the_word_vectors_alone_are_fixed_and_only_then(tiny):
    args, _, _ = tiny
    start, full, without = (
        load_file(f"{args.folder}/192-{name}/model/model.safetensors")
        for name in ("sft", "grpo-kl-in-reward-learning-rate-3e-4-seed1", "grpo-kl-in-reward-without-the-word-vectors-seed1"))
    changed = lambda model: {name for name in start if not torch.equal(model[name], start[name])}
    assert changed(full) == set(start) and changed(without) == set(start) - {VECTORS}


def test_what_has_finished_is_kept(tiny):
    args, result, patch = tiny
    for script in lora.SCRIPTS.values():
        patch.setattr(script, "main", None)
    assert lora.main(args) == result
    assert len(read(f"{args.folder}/64-sft/metrics.jsonl")) >= 1


def test_a_table_by_hand():
    row = {"size": 8, "run": "grpo.py" + lora.WITHOUT, "cpu_seconds": 3.0, "fraction_se": 0.01, "kl_se": 0.02, "reward_se": 0.03}
    policies = [row | {"fraction": x, "kl": x + 1, "reward": x - 1} for x in (0.5, 0.7)]
    last = lora.table({"policies": policies}).splitlines()[-1]
    assert last == "| 8 | `grpo.py` without the word vectors | 2 | 0.600 ± 0.100 | 1.60 ± 0.10 | -0.40 ± 0.10 | 3 |"
    last = lora.table({"policies": policies[:1]}).splitlines()[-1]
    assert last == "| 8 | `grpo.py` without the word vectors | 1 | 0.500 ± 0.010 | 1.50 ± 0.02 | -0.50 ± 0.03 | 3 |"


# ---- The README ----


def of(size, run, key="fraction"):
    """A figure of a row, of each seed."""
    return [row[key] for row in RESULT["policies"] if (row["size"], row["run"]) == (size, run)]


def test_the_table_is_that_of_the_results():
    assert lora.table(RESULT) in TEXT
    assert {row["run"] for row in RESULT["policies"]} == {run.strip("* ") for runs in lora.RUNS.values() for run in runs}


def test_sentences():
    section = " ".join(TEXT.partition("## Adapters")[2].partition("\n## ")[0].split())
    grpo, without = "grpo.py --kl-in reward", lora.WITHOUT
    full, adapters = of(192, f"{grpo} --learning-rate 3e-4"), of(192, f"{grpo} --lora-rank 8")
    less = [x - y for x, y in zip(full, adapters, strict=True)]
    figures = [f"{statistics.mean(x):.3f}" for x in (adapters, full)]
    error = statistics.stdev(less) / len(less) ** 0.5
    assert len(less) == 3 and statistics.mean(less) < 0.03
    assert f"within 0.03 of full training: {figures[0]} of the optimum against {figures[1]}, less by " \
           f"{statistics.mean(less):.4f} ± {error:.4f} over three seeds" in section
    (rank,), (all_weights,), (fixed,) = (of(64, grpo + end) for end in (" --lora-rank 8", "", without))
    (faster,), (fastest,) = (of(64, f"{grpo} --lora-rank 8 --learning-rate {rate}") for rate in ("3e-3", "1e-2"))
    assert f"they are not: {rank:.3f} against {all_weights:.3f}." in section
    assert f"{faster:.3f} at 3e-3, {fastest:.3f} at 1e-2" in section
    assert f"all weights but these reaches {fixed:.3f}." in section and abs(fixed - rank) < 0.02 < 0.2 < all_weights - fixed
    assert f"has {of(192, grpo, 'ess')[0]:.0f} effective samples a prompt" in section
    assert f"{of(192, f'{grpo} --learning-rate 3e-4{without}')[0]:.3f} without them" in section
    dpo = "dpo.py --lora-rank 8 --learning-rate 2e-4"
    assert f"reaches {of(64, dpo)[0]:.3f} at a KL of {of(64, dpo, 'kl')[0]:.2f} nats" in section
    chosen, other = max(adapters[0], full[0]), [of(192, grpo)[0], of(192, f"{grpo} --lora-rank 8 --learning-rate 2e-3")[0]]
    assert other[0] < full[0] and other[1] < adapters[0] <= chosen  # "the better one was taken"
