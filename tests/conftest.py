"""Models, tokenizers and batches that the tests share: tiny, random, made on the spot. Weights at std 0.2,
since at the default 0.02 distributions are near uniform and errors shrink sevenfold. Llama and GPT-2 both,
since rotary positions hide position bugs that learned positions show.
"""

import gc
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real models and data, beside the checkout
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "benchmarks")]
torch.set_num_threads(1)
pytest_plugins = ["tiny_runs"]  # fixtures that run the scripts


def pytest_collection_finish():
    """What has been imported stays: the garbage collector need not look through it again, here or in a fork, and a
    tenth as often as usual through the rest.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)

VOCABULARY = 97
LENGTHS = [16, 4, 8, 3]  # of completions: ragged, since equal lengths hide every aggregation bug
PROMPTS = [2, 4, 6, 5]


def make_model(kind: str, seed: int = 0, dropout: float = 0.0, **options):
    """A causal model of 3 layers, float32, eval mode. kind: "llama" or "gpt2"."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            attention_dropout=dropout,
            max_position_embeddings=64,
            **ids,
            **options,
        )
    else:
        config = transformers.GPT2Config(
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            **ids,
            **options,
        )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def ragged_rows(seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Four rows (ids, trained): prompts of 2, 4, 6, 5 tokens, completions of 16, 4, 8, 3 that end with EOS, 2."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, completion in zip(PROMPTS, LENGTHS):
        ids = torch.randint(3, VOCABULARY, (prompt + completion - 1,), generator=generator).tolist() + [2]
        rows.append((ids, [False] * prompt + [True] * completion))
    return rows


def naive_logprobs(model, ids: list[int]) -> torch.Tensor:
    """log pi(y_t | y_<t) of one unpadded row from the model's own logits, by a loop, in float64: (T - 1,)."""
    logits = model(torch.tensor([ids])).logits[0].double()
    return torch.stack([torch.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(1, len(ids))])


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def shared():
    """The folder of real models and data sets; tests that need it skip without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"real models and data sets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """A merging byte-level BPE, pad 0, bos 1 (its post-processor adds it), eos 2; merges may cross spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ["Answer: hello there", "Answer: help", "Question: hello?\nAnswer: help me"] * 9
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ---- What the tests of ppo.py and grpo.py share ----

MASK = torch.arange(16) < torch.tensor(LENGTHS)[:, None]  # (4, 16)
POISON = [1e4, math.inf, -math.inf, math.nan]
STOPS = list(range(2, VOCABULARY, 6))  # so many EOS ids that random models end their responses early


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def poisoned(x, poison, mask=MASK):
    return torch.where(mask, x, poison)


def pure(function, *inputs, **options):
    """function(*inputs), which has to leave its inputs as they are."""
    copies = [x.detach().clone() if torch.is_tensor(x) else x for x in inputs]
    result = function(*inputs, **options)
    for x, copy in zip(inputs, copies):
        assert not torch.is_tensor(x) or torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0))
    return result


def word_tokenizer():
    """w4 .. w96, one token each, separated by spaces; no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *[f"w{i}" for i in range(4, VOCABULARY)]]
    words = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False)  # fmt: skip


def sampled(batch):
    """A batch of (B, T) as the responses alone, from their first token on: tokens (B, R), log-probs (B, R), lengths
    (B,); zeros behind each. What it must hold is checked on the way: whole responses and nothing outside them.
    """
    mask = batch["mask"]
    lengths = mask.sum(1)
    behind = torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]  # (B, R)
    assert mask.dtype == torch.bool and lengths.min() > 0 and not batch["logprobs"][~mask].any()
    results = []
    for name in ("input_ids", "logprobs"):
        x = batch[name]
        results.append(x.new_zeros(behind.shape).masked_scatter(behind, x[mask]))
    for row in mask.long():
        assert row.diff().abs().sum() <= 2 and row[0] == 0  # one piece, behind a prompt
    return *results, lengths


def sides(rows):
    """(prompts, responses) of rows (ids, trained)."""
    cuts = [trained.index(True) for _, trained in rows]
    return [ids[:n] for (ids, _), n in zip(rows, cuts)], [ids[n:] for (ids, _), n in zip(rows, cuts)]


@pytest.fixture(params=["llama", "gpt2"])
def kind(request):
    return request.param


@pytest.fixture
def float64():
    """Whatever has the default type, as means of masks do, is in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def copied(x):
    """x with its tensors cloned, those inside a dict, a list or a tuple too."""
    if torch.is_tensor(x):
        return x.clone()
    if type(x) is dict:
        return {name: copied(part) for name, part in x.items()}
    if type(x) in (list, tuple):
        return type(x)(copied(part) for part in x)
    return x


def watching(monkeypatch, script):
    """watch(name) -> list of (inputs as they were, result), one for each call of that function of the script. A
    result that is a batch, or holds one, is a copy: the loop adds columns to the batch that rollout() gave it.
    """

    def start(name):
        calls, function = [], getattr(script, name)

        def wrapper(*inputs, **options):
            before = tuple(copied(x) for x in inputs)
            result = function(*inputs, **options)
            holds_batch = type(result) is dict or (type(result) is tuple and type(result[0]) is dict)
            calls.append((before, copied(result) if holds_batch else result))
            return result

        monkeypatch.setattr(script, name, wrapper)
        return calls

    return start


def double_loads(monkeypatch, script, *names):
    """The models that these functions of the script load are in float64: sums in another order agree to 1e-9."""

    def doubled(load):
        def loader(*inputs, **options):
            result = load(*inputs, **options)
            for part in result if isinstance(result, tuple) else [result]:
                if isinstance(part, torch.nn.Module):
                    part.double()
            return result

        return loader

    for name in names:
        monkeypatch.setattr(script, name, doubled(getattr(script, name)))
