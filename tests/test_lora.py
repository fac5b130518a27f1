"""--lora-rank, where the optional package peft is installed: adapters start as nothing, the reference is the model
without them, what is saved is merged, and a checkpoint holds them alone.
"""

import math
import signal
import sys

import pytest
import torch
import transformers
from conftest import make_model
from ranks import run_on_ranks
from safetensors.torch import load_file
from test_ranks import is_near, job, nine_rows
from tiny_runs import interrupt, read, scripts, timeless

import common

peft = pytest.importorskip("peft", reason="needs the optional package peft")
BODY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Args:
    lora_rank, shard, seed = 4, False, 1


def adapted(kind, **options):
    model = make_model(kind, **options).train()
    common.lighten(Args, torch.no_grad, model)
    return model


def step_away(model):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1


IDS = torch.tensor([[1, 5, 9, 4, 7, 2], [1, 8, 3, 2, 0, 0]])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_on_every_linear_layer_of_the_body_and_nothing_else_is_trained(kind):
    model, plain = adapted(kind), make_model(kind)
    linear = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    want = {f"{name}.lora_{ab}.default.weight" for name, layer in plain.named_modules()
            if isinstance(layer, linear) and name != "lm_head" for ab in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    assert len(want) == 2 * 3 * (len(BODY) if kind == "llama" else 4)
    assert all(p.shape[0] == 4 or p.shape[1] == 4 for name, p in model.named_parameters() if name in want)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)  # B starts at 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_is_what_was_trained_and_without_adapters_is_the_start(kind, tmp_path, bpe_tokenizer):
    model, plain = adapted(kind), make_model(kind)
    step_away(model)
    with torch.no_grad():
        want = model(IDS).logits
        assert (want - plain(IDS).logits).abs().max() > 0.1
        with common.without_adapters(model):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model(IDS).logits, want)
        common.save_model(model, bpe_tokenizer, tmp_path / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (loaded(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()  # which is about 6
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() <= plain.state_dict().keys() and not (tmp_path / "model" / "adapter_config.json").exists()


def test_merging_by_the_formula(tmp_path, bpe_tokenizer):
    """W + 2 B A: alpha / r is 2 whatever the rank."""
    model = adapted("llama")
    step_away(model)
    layer = model.model.layers[1].mlp.down_proj
    want = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    common.save_model(model, bpe_tokenizer, tmp_path / "model")
    got = load_file(tmp_path / "model" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(got, want, rtol=0, atol=1e-6)


def test_frozen_layers_are_held_in_16_bits_under_adapters_and_saved_in_32(tmp_path, bpe_tokenizer):
    model = make_model("llama").train()
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    common.lighten(Args, autocast, model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.bfloat16) == name.endswith("base_layer.weight") for name, dtype in dtypes.items())
    step_away(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    with torch.no_grad(), autocast():
        want = common.sequence_logprobs(model, IDS, mask)
    common.save_model(model, bpe_tokenizer, tmp_path / "model")
    assert {x.dtype for x in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad(), autocast():
        assert (common.sequence_logprobs(loaded, IDS, mask) - want).abs().max() < 0.2  # bf16 of a sum, and a sum of bf16


def test_step_0_of_each_script(script, go):
    """Before the first step the adapters are nothing: the log-ratio is 0, and the loss log 2, the KL 0, the ratio 1."""
    run = go("run", lora_rank=4)
    first, *rows = read(run / "metrics.jsonl")
    if script.name == "dpo":
        assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["eval/rewards/margins"] == 0
    if script.is_sampler:
        assert abs(first[f"eval/{script.kl_metric}"]) < 1e-5
        assert rows[0]["policy/logprob_gap"] < 1e-5
        later = [row[script.kl_metric] for row in rows if script.kl_metric in row][1:]
        assert max(map(abs, later)) > 1e-5  # the reference has not moved with the policy
    weights = load_file(run / "model" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]


def test_the_head_of_a_reward_model_is_trained_whole():
    config = make_model("llama").config
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).train()
    common.lighten(Args, torch.no_grad, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all("lora_" in name for name in trained - {"score.weight"})
    assert not [name for name in trained if "score" in name and "lora_" in name]


def test_a_checkpoint_holds_adapters_alone_and_resumes_bit_identically(script, go, tiny, tmp_path):
    length = {"total_episodes": 48} if script.is_sampler else {}
    whole = go("whole", lora_rank=2, **length)
    assert interrupt(script, tiny(lora_rank=2, **length), 2, signal.SIGTERM)
    state = torch.load(tmp_path / "run" / "state" / "checkpoint.pt", weights_only=True)
    names = {name for part in state.values() if isinstance(part, dict) for name in part if str(name).endswith(".weight")}
    heads = {"score.weight"}
    assert names and all("lora_" in name for name in names - heads)
    assert ("score.weight" in names) == (script.name in ("reward_model", "ppo"))
    run = go("run", lora_rank=2, resume=True, **length)
    assert timeless(read(run / "metrics.jsonl")) == timeless(read(whole / "metrics.jsonl"))
    want, got = (load_file(path / "model" / "model.safetensors") for path in (whole, run))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@scripts("dpo", "ppo", "reward_model")
def test_adapters_on_shards(script, starts, tmp_path):
    """Two ranks, each with half of the frozen weights and of the adapters: the same merged weights."""
    name = script.name
    nine_rows(starts)
    for world in (1, 2):
        jobs, log = [job(name, starts, tmp_path, f"{world}", lora_rank=4, shard=world > 1)], tmp_path / f"log-{world}"
        assert run_on_ranks(world, jobs, log) == [0] * world, log.read_text()
    one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
    for want, got in zip(timeless(read(one / "metrics.jsonl")), timeless(read(two / "metrics.jsonl")), strict=True):
        assert all(is_near(got[key], want[key]) for key in want)
    for file in one.glob("*/model.safetensors"):
        want, got = load_file(file), load_file(two / file.relative_to(one))
        assert want.keys() == got.keys() and max((want[key] - got[key]).abs().max() for key in want) < 5e-6


def test_without_the_package_it_says_what_to_install(script, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(lora_rank=4)
