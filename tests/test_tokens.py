"""Rows to token ids: boundaries, BOS, EOS, chat turns, truncation, and what reaches the loss, with real tokenizers too."""

import json

import pytest
import torch
import transformers
from common import encode, load_comparisons, read_rows, split_rows
from conftest import CHAT_TEMPLATE, ROOT

LAYOUTS = "prompt", "messages", "chosen rejected"
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "help me"},
    {"role": "assistant", "content": "Answer: help"},
]


def one(tokenizer, row, eos_ids=(2,), max_length=512, **options):
    """(ids, trained) of one row, checked for type and length."""
    ((ids, trained),) = encode(
        tokenizer, [{"_where": "rows.jsonl:7", **row}], list(eos_ids), max_length, **options
    )
    assert (
        all(type(i) is int for i in ids)
        and all(type(t) is bool for t in trained)
        and len(ids) == len(trained)
    )
    return ids, trained


def texts(tokenizer, ids, trained):
    """(text outside the loss, text inside it), special tokens included."""
    return (tokenizer.decode([i for i, t in zip(ids, trained) if not t]),
            tokenizer.decode([i for i, t in zip(ids, trained) if t]))  # fmt: skip


@pytest.fixture
def chat(bpe_tokenizer):
    bpe_tokenizer.chat_template = CHAT_TEMPLATE
    yield bpe_tokenizer
    bpe_tokenizer.chat_template = None


def test_no_token_straddles_the_boundary(bpe_tokenizer):
    """The whole string has a token that contains both sides' characters; the parts are tokenized apart."""
    whole = bpe_tokenizer("Answer: hello")["input_ids"]
    ids, trained = one(bpe_tokenizer, {"prompt": "Answer: ", "completion": "hello"})
    assert whole != ids[:-1]  # the tokenizer would merge across the seam
    assert texts(bpe_tokenizer, ids, trained) == ("<s>Answer: ", "hello</s>")
    assert trained == sorted(trained)  # prompt first, then the completion


@pytest.mark.parametrize("completion", ["hello", " hello", "\nhello", "hello</s>", "hello</s></s>", ""])
def test_exactly_one_bos_and_one_eos(bpe_tokenizer, completion):
    ids, trained = one(bpe_tokenizer, {"prompt": "Answer:", "completion": completion})
    assert ids.count(1) == 1 and ids[0] == 1
    assert ids.count(2) == 1 and ids[-1] == 2 and trained[-1]
    assert texts(bpe_tokenizer, ids, trained)[1] == completion.replace("</s>", "") + "</s>"
    prompt = bpe_tokenizer("Answer:")["input_ids"]
    assert ids[: len(prompt)] == prompt  # what a rollout will be prompted with


def test_eos_is_trained_although_it_is_the_pad_token(bpe_tokenizer):
    """Masks come from lengths: two rows, pad == EOS; each keeps its last label, and a pad id in the text is text."""
    rows = [
        {"prompt": "hello", "completion": " there", "_where": ""},
        {"prompt": "", "completion": "<pad> me", "_where": ""},
    ]
    from sft import collate

    input_ids, trained = collate(encode(bpe_tokenizer, rows, [2], 99), "cpu")
    for i in range(2):
        last = trained[i].nonzero().max()
        assert input_ids[i, last] == 2 and not trained[i, last + 1 :].any()
    assert 0 in input_ids[1][trained[1]]  # the <pad> written by the user


def test_plain_text_trains_all_but_its_first_token(bpe_tokenizer):
    ids, trained = one(bpe_tokenizer, {"text": "hello there"})
    assert trained == [False] + [True] * (len(ids) - 1) and bpe_tokenizer.decode(ids) == "<s>hello there</s>"


def test_every_assistant_turn_is_trained_with_its_eos_and_nothing_else(chat):
    ids, trained = one(chat, {"messages": TALK})
    assert chat.decode(ids) == (
        "<s><system>be kind</s>\n<user>hello</s>\n<assistant>hello there</s>\n<user>help me</s>\n<assistant>Answer: help</s>"
    )
    runs = "".join("x" if t else " " for t in trained).split()
    assert len(runs) == 2 and texts(chat, ids, trained)[1] == "hello there</s>Answer: help</s>"
    assert ids.count(1) == 1  # the template's BOS, no second one


def test_message_lists_as_prompt_and_completion(chat):
    ids, trained = one(chat, {"prompt": TALK[:4], "completion": TALK[4:]})
    assert texts(chat, ids, trained)[1] == "Answer: help</s>"
    assert texts(chat, ids, trained)[0].endswith(
        "<user>help me</s>\n<assistant>"
    )  # the generation prompt is prompt
    assert ids == one(chat, {"messages": TALK})[0]
    ids, trained = one(chat, {"prompt": TALK[:2], "completion": TALK[2:]})  # a completion of several turns
    assert texts(chat, ids, trained)[1] == "hello there</s>Answer: help</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(chat, capsys):
    chat.chat_template = "{% for m in messages %}{% if loop.last or m.role == 'user' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(SystemExit):
        one(chat, {"messages": TALK[1:]})
    line = capsys.readouterr().err
    assert line.startswith("error: rows.jsonl:7: ") and "chat template" in line


def test_truncation_keeps_the_prompt_and_the_eos_and_is_counted(bpe_tokenizer, capsys):
    row = {"prompt": "hello", "completion": " there" * 20}
    prompt = len(bpe_tokenizer("hello")["input_ids"])
    full, _ = one(bpe_tokenizer, row)
    assert capsys.readouterr().out == ""
    ids, trained = one(bpe_tokenizer, row, max_length=prompt + 4)
    assert ids == full[: prompt + 3] + [2] and trained == [False] * prompt + [True] * 3 + [False]
    assert "1 of 1 rows" in capsys.readouterr().out  # the EOS is there to be read at, and not to be learned
    assert one(bpe_tokenizer, row, max_length=len(full))[0] == full
    for too_short in (
        prompt,
        prompt - 1,
        prompt + 1,
    ):  # nothing, or nothing but the EOS, would be left to train
        with pytest.raises(SystemExit):
            one(bpe_tokenizer, row, max_length=too_short)


def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_at_the_seam():
    """Llama's and Mistral's first tokenizers prepend one; parts that are tokenized apart would get one each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b", "\n", "▁\n"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "b"), ("▁", "\n")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    assert tokenizer("b")["input_ids"] == [5]  # "▁b"
    ids, _ = one(tokenizer, {"prompt": "a", "completion": "b"})
    assert [words[i] for i in ids] == ["▁a", "b", "</s>"] and tokenizer.decode(ids[:-1]) == "ab"
    ids, _ = one(tokenizer, {"prompt": "a", "completion": " b"})
    assert [words[i] for i in ids] == ["▁a", "▁b", "</s>"] and tokenizer.decode(ids[:-1]) == "a b"


def test_truncation_of_a_conversation_ends_with_the_last_turn_that_fits(chat):
    """Never with a user's words and an EOS that the assistant would learn to say after them."""
    full, trained = one(chat, {"messages": TALK})
    first = trained.index(False, trained.index(True))  # behind the first assistant turn
    for max_length in range(first + 1, len(full)):
        ids, kept = one(chat, {"messages": TALK}, max_length=max_length)
        assert len(ids) <= max_length and ids[-1] == 2
        text = texts(chat, ids, kept)[1]
        assert text.count("</s>") == 1  # of the first turn, which is whole
        if any(trained[first : max_length - 1]):
            assert text.startswith("hello there</s>") and len(text) > 15 and not kept[-1]
        else:
            assert text == "hello there</s>" and ids == full[:first]


def test_rows_without_anything_to_train_are_refused(bpe_tokenizer, capsys):
    with pytest.raises(SystemExit):
        encode(BareTokenizer(bpe_tokenizer), [{"_where": "rows.jsonl:7", "text": ""}], [2], 9)
    assert "rows.jsonl:7: has no token to train on" in capsys.readouterr().err


class BareTokenizer:
    """The same tokenizer without BOS."""

    chat_template = None
    name_or_path = "bare"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, add_special_tokens=True):
        return self.tokenizer(texts, add_special_tokens=False)

    def get_added_vocab(self):
        return self.tokenizer.get_added_vocab()


# ---- pairs ----


def pairs_of(tokenizer, row, **options):
    return load_comparisons(tokenizer, [{"_where": "pairs.jsonl:3", **row}], [2], options.get("max_length", 512))


def test_pairs_share_their_prompt_and_carry_mu(bpe_tokenizer):
    (([(chosen, ct), (rejected, rt)], _, mu, _),) = pairs_of(
        bpe_tokenizer, {"prompt": "hello", "chosen": " there", "rejected": " Answer: help me", "mu": 0.5}
    )
    n = ct.index(True)
    assert mu == 0.5 and n == rt.index(True) and chosen[:n] == rejected[:n]
    assert texts(bpe_tokenizer, chosen, ct)[1] == " there</s>"
    assert texts(bpe_tokenizer, rejected, rt)[1] == " Answer: help me</s>"
    assert pairs_of(bpe_tokenizer, {"prompt": "a", "chosen": "b", "rejected": "c"})[0][2] == 1.0


def test_the_implicit_prompt_ends_at_a_turn_and_not_at_a_character(bpe_tokenizer, chat):
    talk = "\n\nHuman: hello\n\nAssistant: hello there\n\nHuman: help\n\nAssistant:"
    (([(ids, trained), _], *_),) = pairs_of(
        bpe_tokenizer, {"chosen": talk + " help me", "rejected": talk + " hello"}
    )
    assert texts(bpe_tokenizer, ids, trained) == ("<s>" + talk, " help me</s>")
    (([(ids, trained), _], *_),) = pairs_of(chat, {"chosen": TALK, "rejected": TALK[:4] + TALK[2:3]})
    assert texts(chat, ids, trained)[1] == "Answer: help</s>"
    with pytest.raises(SystemExit):
        pairs_of(bpe_tokenizer, {"chosen": "hello", "rejected": "help"})


def test_pairs_that_carry_no_information_are_dropped_and_counted(bpe_tokenizer, capsys):
    same = {"prompt": "hello", "chosen": " there" * 9 + " a", "rejected": " there" * 9 + " b"}
    rows = [{"_where": "", **same}, {"_where": "", "prompt": "hello", "chosen": " a", "rejected": " b"}]
    assert len(load_comparisons(bpe_tokenizer, rows, [2], 12)) == 1
    assert "1 of 2 pairs dropped" in capsys.readouterr().out
    chat = [{"_where": "", "chosen": TALK, "rejected": TALK}, {"_where": "", "chosen": TALK, "rejected": TALK[:4] + TALK[2:3]}]
    bpe_tokenizer.chat_template = CHAT_TEMPLATE
    assert len(load_comparisons(bpe_tokenizer, chat, [2], 512)) == 1
    bpe_tokenizer.chat_template = None
    assert "1 of 2 pairs dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        load_comparisons(bpe_tokenizer, [{"_where": "p:1", **same}], [2], 12)


# ---- files ----


def test_json_and_jsonl_give_the_same_rows_and_blank_lines_are_skipped(tmp_path):
    rows = [{"prompt": "a", "completion": "é"}, {"prompt": "b", "completion": "\u2028"}]
    (tmp_path / "x.jsonl").write_text(
        "\n" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    )
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for name in ("x.jsonl", "x.json"):
        got = read_rows(str(tmp_path / name))
        assert [{k: v for k, v in row.items() if k != "_where"} for row in got] == rows
    assert read_rows(str(tmp_path / "x.jsonl"))[1]["_where"].endswith("x.jsonl:4")


def test_held_out_rows_share_no_prompt_with_the_training_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i // 3}", "completion": str(i)}) + "\n" for i in range(300))
    )
    train, held_out = split_rows(str(path), "", *LAYOUTS)
    assert len(train) + len(held_out) == 300 and 9 <= len(held_out) <= 21
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    (tmp_path / "x_test.jsonl").write_text('{"prompt": "own"}\n')
    assert [r["prompt"] for r in split_rows(str(path), "", *LAYOUTS)[1]] == ["own"] and len(
        split_rows(str(path), "", *LAYOUTS)[0]
    ) == 300
    (tmp_path / "y.train.jsonl").write_text('{"prompt": "t"}\n')
    (tmp_path / "y.test.jsonl").write_text('{"prompt": "e"}\n')
    assert split_rows(str(tmp_path / "y.train.jsonl"), "", *LAYOUTS)[1][0]["prompt"] == "e"
    assert split_rows(str(path), str(tmp_path / "y.test.jsonl"), *LAYOUTS)[1][0]["prompt"] == "e"


def test_held_out_conversations_and_implicit_prompts_are_new(tmp_path):
    """Four answers a prompt, in the formats without a prompt column: what precedes the first answer decides."""
    user = lambda i: [{"role": "user", "content": f"question {i // 4}"}]
    answer = lambda i: [{"role": "assistant", "content": f"answer {i}"}]
    for name, row in {
        "messages": lambda i: {"messages": user(i) + answer(i)},
        "lists": lambda i: {"chosen": user(i) + answer(i), "rejected": user(i) + answer(i + 1)},
        "texts": lambda i: {"chosen": f"\n\nHuman: {i // 4}\n\nAssistant: {i}", "rejected": "-"},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(400)))
        train, held_out = split_rows(str(path), "", *LAYOUTS)
        number = {row["_where"]: i // 4 for i, row in enumerate(read_rows(str(path)))}
        assert len(held_out) == 20 and len(train) == 380
        assert not {number[row["_where"]] for row in train} & {number[row["_where"]] for row in held_out}


# ---- real tokenizers and data ----

REAL = ["stories260K", "gpt2-tokenizer", "qwen2.5-tokenizer", "minimind-tokenizer"]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_are_inverted_exactly(shared, name):
    """decode(prompt + completion) is the text, with its one space at the seam, and one EOS."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / name)
    rows = read_rows(str(shared / "data" / "tinystories_pref.test.jsonl"))[:50]
    eos = tokenizer.eos_token_id
    for row, (ids, trained) in zip(rows, encode(tokenizer, rows, [eos], 10_000, completion="chosen")):
        n = trained.index(True)
        assert tokenizer.decode(ids[:-1], skip_special_tokens=True) == row["prompt"] + row["chosen"]
        assert ids[:n] == tokenizer(row["prompt"])["input_ids"] and all(trained[n:])
        assert ids[-1] == eos and ids[n:].count(eos) == 1


@pytest.mark.parametrize("name", REAL[2:])
def test_real_chat_templates_and_message_lists(shared, name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / name)
    rows = read_rows(str(shared / "data" / "dpo_chat_300.test.jsonl"))
    pairs = load_comparisons(tokenizer, [dict(row) for row in rows], [tokenizer.eos_token_id], 100_000)
    assert len(pairs) == len(rows)
    for row, (completions, *_) in zip(rows, pairs):
        for side, (ids, trained) in zip(("chosen", "rejected"), completions):
            inside = texts(tokenizer, ids, trained)[1]
            assert inside.strip() == row[side][0]["content"].strip() + tokenizer.eos_token
            rendered = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            assert tokenizer.decode(ids) == rendered.rstrip("\n")
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "hi"), ("assistant", "a b"), ("user", "x"), ("assistant", "c"))
    ]
    ids, trained = one(tokenizer, {"messages": talk}, [tokenizer.eos_token_id])
    assert texts(tokenizer, ids, trained)[1] == f"a b{tokenizer.eos_token}c{tokenizer.eos_token}"


def test_the_embedded_tokenizer_is_lossless():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "model")
    for file, side in (
        ("demonstrations_test", "completion"),
        ("sums", "completion"),
        ("preferences_test", "rejected"),
    ):
        rows = read_rows(str(ROOT / "data" / f"{file}.jsonl"))[:500]
        for row, (ids, trained) in zip(rows, encode(tokenizer, rows, [1], 64, completion=side)):
            assert tokenizer.decode(ids) == row["prompt"] + row[side] + "<eos>" and 2 not in ids
            assert texts(tokenizer, ids, trained)[1] == row[side] + "<eos>"
            assert ids[:-1] == tokenizer(row["prompt"] + row[side])["input_ids"]  # joint or apart, the same


def test_dropout_is_off_and_weights_are_fp32_whatever_the_checkpoint_says(tmp_path, bpe_tokenizer):
    from common import load_model
    from conftest import make_model
    from sft import Args

    for kind in ("llama", "gpt2"):
        folder = str(tmp_path / kind)
        make_model(kind, dropout=0.3).bfloat16().save_pretrained(folder)
        bpe_tokenizer.save_pretrained(folder)
        model, _, eos_ids = load_model(folder, Args(), torch.device("cpu"))
        ids = torch.tensor([[5, 6, 7, 8]])
        assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model(ids).logits, model(ids).logits) and eos_ids == [2]
