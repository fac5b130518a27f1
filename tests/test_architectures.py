"""Causal language models of many classes of transformers, tiny and random. Each is right, in scoring, gradient,
sampling and saving, or refused in one line before the first step; none is wrong, none ends in a traceback.
The tables say which of the two a class is, so that none changes sides in silence; a few may be either.
"""

import contextlib
import json
import logging
import runpy
import shutil
import string
import sys
import types
import warnings

import pytest
import torch
import transformers
from conftest import ROOT
from tiny_runs import DATA, launch, read, scripts, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import lighten, sample, sequence_logprobs

TOLERANCE = 1e-4  # nats; those that are right are right to 1e-5 in float32, those that are wrong often by 1 and more

# ---- The table: label -> (model_type, what its configuration has besides SIZES; None: not this one of SIZES) ----

# fmt: off
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "attention_dropout": 0.1,
    "hidden_dropout": 0.1, "eos_token_id": 1, "pad_token_id": 0}
HEADS_OF_8 = {"head_dim": 8}
ALL_HEADS = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the rows
GEMMA = {"query_pre_attn_scalar": 8, **WINDOW, **HEADS_OF_8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS_OF_16 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS_OF_16, "shared_expert_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
          "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {**ROUTED, **ALL_HEADS, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 8}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_num_value_heads": 4, "linear_value_head_dim": 8, **HEADS_OF_8}
HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8,
          "n_mamba_heads": 2}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
           "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "init_std": 0.2, "is_decoder": True,
           "is_encoder_decoder": False}
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}}
DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
LLAMA_4 = {**HEADS_OF_8, "intermediate_size_mlp": 48, "moe_layers": [1], "num_experts_per_tok": 1,
           "num_local_experts": 4, "attention_chunk_size": 8, "no_rope_layers": [1, 0],
           "layer_types": ["chunked_attention", "full_attention"]}
IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}

RIGHT = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", HEADS_OF_8),
    "qwen2_moe": ("qwen2_moe", SHARED_EXPERT),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS_OF_16, **HEADS_OF_8}),
    "qwen3_next": ("qwen3_next", {**LINEAR, **SHARED_EXPERT}),
    "qwen3_5 of text": ("qwen3_5_text", LINEAR),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mixtral": ("mixtral", EXPERTS),
    "phimoe": ("phimoe", {"router_jitter_noise": 0.0, **EXPERTS}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 4, **EXPERTS, **HEADS_OF_8}),
    "gemma": ("gemma", HEADS_OF_8),
    "gemma2": ("gemma2", GEMMA),
    "gemma3 of text": ("gemma3_text", GEMMA),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **WINDOW}),
    "granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {"logits_scaling": 2.0, **EXPERTS}),
    "phi": ("phi", ALL_HEADS),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("bloom", {}),
    "falcon, rotary": ("falcon", {"alibi": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "dbrx": ("dbrx", {**DBRX, "attn_config": DBRX_ATTENTION}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "glm": ("glm", HEADS_OF_8),
    "glm4": ("glm4", HEADS_OF_8),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8,
                        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "bamba": ("bamba", {"attn_layer_indices": [1], **MAMBA_2}),
    "zamba": ("zamba", {"mamba_dt_rank": 4, "use_mamba_kernels": False, **HYBRID}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "nemotron": ("nemotron", {}),
    "xglm": ("xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48, "init_std": 0.2}),
    "biogpt": ("biogpt", {}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64, **MAMBA_2}),
    "ctrl": ("ctrl", {"n_embd": 32, "dff": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}),
}
REFUSED = {
    # log-probs of the cached steps, alone or behind padding, are not those of a whole row
    "mamba": ("mamba", {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "zamba2": ("zamba2", {**HYBRID, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4,
                          "chunk_size": 8}),
    "bart": ("bart", DECODER),
    "trocr": ("trocr", DECODER),
    "minimax": ("minimax", {"block_size": 4, "layer_types": LINEAR["layer_types"], **EXPERTS, **HEADS_OF_8}),
    # no cache among the outputs
    "openai-gpt": ("openai-gpt", {}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}),
    "xlm": ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "cpmant": ("cpmant", {"dim_head": 8, "dim_ff": 48, "prompt_length": 4}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "max_position_embeddings": None}),
    # a head that is more than a matrix, a bias and a scale
    "bert": ("bert", {"is_decoder": True}),
    "roberta": ("roberta", {"is_decoder": True}),
    "electra": ("electra", {"is_decoder": True, "embedding_size": 16}),
    "modernbert-decoder": ("modernbert-decoder", {"global_attn_every_n_layers": 2, "local_attention": 4}),
    # no body without the head
    "llama4 of text": ("llama4_text", LLAMA_4),
}
EITHER = {
    # noise in training mode that is not a dropout of the outermost configuration: turned off, or refused
    "mixtral with jitter": ("mixtral", {"router_jitter_noise": 0.1, **EXPERTS}),
    "phimoe with jitter": ("phimoe", {"router_jitter_noise": 0.01, **EXPERTS}),
    "dbrx with dropout": ("dbrx", {**DBRX, "attn_config": {**DBRX_ATTENTION, "attn_pdrop": 0.1}}),
    "gemma3": ("gemma3", {"text_config": {**SIZES, **GEMMA}, "vision_config": IMAGES, "mm_tokens_per_image": 4}),
    # right, but for older versions of transformers that name its cache otherwise among the outputs
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
}
CASES = {**RIGHT, **REFUSED, **EITHER}
# fmt: on

# ---- Folders and rows ----

ROWS = [
    {"prompt": "what about the hero ?", "completion": " the hero was loud ."},
    {"prompt": "my", "completion": " plot"},
    {"prompt": "review of the plot :", "completion": " it was dull , yet i felt ."},
    {"prompt": "my view :", "completion": " okay and also very messy ."},
]
PROMPTS = [*(row["prompt"] for row in ROWS), "review", "what about the plot ? my view : it was", "my plot", "review :"]
EOS_IDS = list(range(1, 96, 5))  # so many that random models end their rows early
NEW_TOKENS = 12


def letters():
    """A tokenizer of single letters, since Qwen2 has a class of tokenizers of its own that takes no words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<eos>", "Ġ", *string.ascii_lowercase, *string.digits, *".,:?"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_random(model_type, options, folder):
    """A random model with noise on each parameter, biases and norms too, and a tokenizer; skips unknown classes."""
    sizes = {} if "text_config" in options else SIZES
    options = {name: value for name, value in (sizes | options).items() if value is not None}
    try:
        config = AutoConfig.for_model(model_type, **options)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    if model_type == "qwen2":
        letters().save_pretrained(folder)
    else:
        for file in (DATA / "model").glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---- What is right: the model's own logits of single, unpadded rows ----


def own_logprobs(model, ids):
    """log pi(y_t | y_<t) from position 1 on: (T - 1,)."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def own_loss(model, tokenizer):
    """Mean over all tokens of the completions with their EOS."""
    logprobs = []
    for row in ROWS:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        logprobs.append(own_logprobs(model, prompt + completion + [1])[len(prompt) - 1 :])
    return -torch.cat(logprobs).mean()


def check_scoring(metrics, folder):
    """Step 0's loss in evaluation, step 1's in training and the norm of its gradient."""
    model = load(folder)
    loss = own_loss(model, AutoTokenizer.from_pretrained(folder))
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    before, step = metrics[:2]
    assert (before["step"], step["step"]) == (0, 1)
    assert before["eval/loss"] == pytest.approx(loss.item(), abs=TOLERANCE)
    assert step["loss"] == pytest.approx(loss.item(), abs=TOLERANCE)
    assert step["grad_norm"] == pytest.approx(torch.cat(gradients).norm().item(), rel=TOLERANCE)


@torch.no_grad()
def check_saving(metrics, folder, model, trained):
    """The folder holds the trained model, the one that the last evaluation saw, and names its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(ROWS[0]["prompt"])["input_ids"]])
    after = metrics[-1]["eval/loss"]
    logits, want = (x(input_ids=ids).logits for x in (model, trained.eval()))
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert own_loss(model, tokenizer).item() == pytest.approx(after, abs=TOLERANCE)
    assert abs(after - metrics[0]["eval/loss"]) > 100 * TOLERANCE  # or an untrained model would pass
    named = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert 1 in (named if isinstance(named, list) else [named])


@torch.no_grad()
def check_sampling(folder, model):
    """Ragged prompts, and rows that end at their own time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer(PROMPTS)["input_ids"]
    batch = sample(model, prompts, NEW_TOKENS, EOS_IDS, seed=1)
    lengths = batch["mask"].sum(1).tolist()
    assert len(set(map(len, prompts))) >= 4 and len(set(lengths)) >= 3
    for row, prompt, length in zip(range(len(prompts)), prompts, lengths):
        ids = batch["input_ids"][row, : len(prompt) + length].tolist()
        drawn = batch["logprobs"][row, len(prompt) : len(ids)]
        assert ids[: len(prompt)] == prompt and (ids[-1] in EOS_IDS or length == NEW_TOKENS)
        torch.testing.assert_close(drawn, own_logprobs(model, ids)[-length:], atol=TOLERANCE, rtol=0)


# ---- Runs ----


@pytest.fixture(scope="module")
def filters():
    """The filters of warnings in a process that runs a script: Python's own, and those that common.py adds."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        runpy.run_path(str(ROOT / "common.py"))
        return warnings.filters[:]


@contextlib.contextmanager
def as_in_a_new_process(filters):
    """transformers' log goes to stderr as it is now, from warnings on; yields the warnings that would be printed."""
    log, level = logging.StreamHandler(sys.stderr), transformers.logging.get_verbosity()
    transformers.logging.add_handler(log)
    transformers.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(record=True) as printed:
            warnings.filters[:] = filters
            yield printed
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.remove_handler(log)


@scripts("sft")
@pytest.mark.parametrize("label", CASES)
def test_each_class_is_right_or_refused(label, script, trained, filters, tmp_path, capsys):
    """One step of sft.py on four ragged rows, which it is evaluated on too."""
    model_type, options = CASES[label]
    folder, run = save_random(model_type, options, tmp_path / "random"), tmp_path / "run"
    rows = str(write(tmp_path / "rows.jsonl", ROWS))
    args = script.module.Args(
        model=str(folder), dataset=rows, eval_dataset=rows, output_dir=str(run), num_train_epochs=1, batch_size=4,
        micro_batch_size=4, learning_rate=1e-2, warmup_steps=0, eval_samples=2, max_new_tokens=4, save_every=0,
        device="cpu")  # fmt: skip
    capsys.readouterr()
    code = 0
    with as_in_a_new_process(filters) as printed:
        try:
            launch(script, args)
        except SystemExit as stop:
            code = stop.code
    stderr = capsys.readouterr().err
    metrics = read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    assert [str(warning.message) for warning in printed] == []
    if code == 0:
        check_scoring(metrics, folder)
        saved = load(run / "model")
        check_saving(metrics, run / "model", saved, trained["model"])
        check_sampling(run / "model", saved)
        assert stderr == ""
        assert label not in REFUSED, "it is right: its place in the table is RIGHT"
    else:
        assert code == 2
        assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
        [name] = json.loads((folder / "config.json").read_text())["architectures"]
        assert str(folder) in stderr or name in stderr
        assert not [row for row in metrics if row["step"] > 0] and not (run / "model").exists()
        assert label not in RIGHT, stderr


@pytest.mark.parametrize("label", ["gpt2", "qwen2_moe", "phimoe", "gemma3 of text", "granitemoe", "gpt_neo", "olmo2", "olmoe",
                                   "deepseek_v3", "jamba", "bamba", "lfm2"])
def test_frozen_layers_in_16_bits_change_no_product(label, filters, tmp_path):
    """Routers and latent attention too: what no layer multiplies in 16 bits under autocast must stay in 32."""
    model = load(save_random(*CASES[label], tmp_path / "random")).requires_grad_(False)
    ids = torch.tensor([[5, 9, 14, 20, 33, 41, 7], [5, 9, 14, 22, 30, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast():
        want = sequence_logprobs(model, ids, mask)
    lighten(types.SimpleNamespace(lora_rank=0, shard=False), autocast, model)
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    with torch.no_grad(), autocast():
        assert torch.equal(sequence_logprobs(model, ids, mask), want)
