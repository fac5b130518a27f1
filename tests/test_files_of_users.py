"""What users' own files brought to light: each test fails where its fault is present."""

import contextlib
import copy
import datetime

import dpo
import ppo
import pytest
import torch
import transformers
import transformers.utils.chat_template_utils as rendering
from common import encode, load_comparisons, load_reward, read_rows, reward_function
from conftest import make_model
from fuzz_cases import PLAIN, make_tokenizer
from test_rows import ASKED, OTHERS, reward_of, scores_of, with_chat
from tiny_runs import scripts, write
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

EOS = 4  # of make_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def encoded(tokenizer, row, **options):
    ((ids, trained),) = encode(tokenizer, [{**copy.deepcopy(row), "_where": "rows.jsonl:1"}], [tokenizer.eos_token_id],
                               512, **options)
    return ids, trained


def trained_text(tokenizer, row):
    ids, trained = encoded(tokenizer, row)
    return tokenizer.decode([token for token, train in zip(ids, trained) if train])


# ---- Labels ----


@pytest.mark.parametrize("K", [2, 3])
def test_dpo_reads_a_ranking_of_equals_as_a_tie(K):
    """Two completions of one rank are a pair with mu 0.5; whichever is likelier, half the votes agree."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    texts = ["a", "b", "c"][:K]
    row = {"prompt": "a b:", "completions": texts, "ranking": [1] * K, "_where": "rows.jsonl:1"}
    comparisons = load_comparisons(tokenizer, [row], [EOS], 99)
    comparisons = [([([1, 2, 3, 5 + k], [False, False, True, True]) for k in range(K)], *comparisons[0][1:])]
    ref = torch.zeros(1, K)
    args = dpo.Args(device="cpu")
    _, metrics = dpo.forward(model, comparisons, ref, args, contextlib.nullcontext)
    assert metrics["rewards/accuracies"].item() == 0.5
    if K == 2:
        swapped = [(comparisons[0][0][::-1], *comparisons[0][1:])]
        losses = [dpo.forward(model, each, ref, args, contextlib.nullcontext)[0].item() for each in (comparisons, swapped)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# ---- Rewards ----


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_column_of_the_data_never_stands_in_for_what_was_sampled(tmp_path, column):
    tokenizer = make_tokenizer()
    write(tmp_path / "r.py", [])
    (tmp_path / "r.py").write_text(
        "def r(prompts, completions, **columns):\n    return [float((p, c) == ('ask', 'said')) for p, c in zip(prompts, completions)]\n")
    score = reward_function(f"{tmp_path / 'r.py'}:r", tokenizer, torch.device("cpu"))
    rows = [{"prompt": "ask", column: ["other", "texts"], "_where": "rows.jsonl:1"}]
    assert score(rows, [[]], [tokenizer("said")["input_ids"] + [EOS]]).tolist() == [1.0]


def test_a_reward_reads_an_answer_without_what_a_template_writes_behind(tmp_path):
    """As that of Qwen2.5's base models, which ends a turn by a token and a newline: the EOS, of which the template knows
    nothing, follows these, so the policy has learnt to write all three.
    """
    tokenizer = make_tokenizer()
    (tmp_path / "r.py").write_text(
        "def r(prompts, completions, **columns):\n    return [float(x[0]['content'] == 'good') for x in completions]\n")
    score = reward_function(f"{tmp_path / 'r.py'}:r", tokenizer, torch.device("cpu"))
    rows = [{"prompt": [user("q")], "_where": "rows.jsonl:1"}]
    assert score(rows, [[]], [tokenizer("good\n")["input_ids"] + [EOS]]).tolist() == [1.0]


REWRITES = (  # as minimind's: what a generation prompt says of thoughts, an answer with thoughts does not repeat
    "{% for m in messages %} my{% if m.role == 'assistant' %}{% set c = m.content %}{% if ' good' in c %} but"
    "{% else %} and{% endif %}{{ c }}{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %} my and{% endif %}")


def test_a_response_that_the_reward_models_template_rewrites_ends_no_run(starts, tmp_path):
    """It is read as the whole conversation is rendered, whatever the generation prompt would have been."""
    folder = with_chat(starts, tmp_path / "reward" / "model", "reward1", REWRITES, [1])
    own = transformers.AutoTokenizer.from_pretrained(folder)
    policy = with_chat(starts, tmp_path / "policy", "run1", PLAIN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    args = ppo.Args(device="cpu", micro_batch_size=3)
    score, _, read = load_reward(str(folder), tokenizer, [1], args, torch.device("cpu"), contextlib.nullcontext)
    rows = [{"prompt": [user(ASKED[0])], "_where": "rows.jsonl:1"}] * 2
    answers = " the plot", " it was good"
    responses = [tokenizer(text)["input_ids"] + [1] for text in answers]
    for ids, answer in zip(read(rows, [[]] * 2, responses), answers):
        whole = own.apply_chat_template([user(ASKED[0]), assistant(answer)], tokenize=False)
        assert ids == own(whole, add_special_tokens=False)["input_ids"]
    assert score(rows, [[]] * 2, responses).isfinite().all()


def test_an_empty_response_gets_the_score_of_an_empty_answer(starts, tmp_path):
    folder = with_chat(starts, tmp_path / "reward" / "model", "reward1", *OTHERS["other words"])
    score, tokenizer = reward_of(folder, starts, tmp_path)
    prompt = [user(ASKED[0])]
    (empty, space) = scores_of([[*prompt, assistant(text)] for text in ("", " it")], folder, tmp_path)
    assert score([{"prompt": prompt, "_where": "rows.jsonl:1"}], [[]], [[1]]).tolist() == pytest.approx([empty], abs=1e-5)
    assert abs(empty - space) > 1e-3


# ---- Templates and tokenizers ----


THOUGHTS = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")  # as DeepSeek-R1's


def test_words_of_an_answer_that_the_template_leaves_out_are_refused(capsys):
    tokenizer = make_tokenizer(THOUGHTS)
    assert trained_text(tokenizer, {"messages": [user("q"), assistant("answer")]}) == "answer<|im_end|>"
    with pytest.raises(SystemExit):
        encoded(tokenizer, {"messages": [user("q"), assistant("<think>long thoughts</think>answer")]})
    assert "rows.jsonl:1" in capsys.readouterr().err


def test_ids_do_not_depend_on_the_day_under_templates_that_ask_the_clock(monkeypatch):
    """As Granite's, SmolLM3's, gpt-oss's: `strftime_now` without a look at `date_string`."""
    tokenizer = make_tokenizer("{{ strftime_now('%Y-%m-%d') }}" + PLAIN)
    row = {"messages": [user("q"), assistant("answer")]}
    before = encoded(tokenizer, row)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 2)

    monkeypatch.setattr(rendering, "datetime", Tomorrow)
    assert encoded(tokenizer, row) == before


def prepending(rstrip):
    """Text behind a special token begins with a space's mark, as in Llama 2's, Mistral's and Phi-3's."""
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = [*specials, "\u2581", *"abcdefghijklmnopqrstuvwxyz:?[]/INST", "\n"]
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokens = [AddedToken(token, special=True, rstrip=rstrip, normalized=False) for token in specials[2:]]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", True, "<|end|>")  # Phi-3
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
           "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", False, "</s>")  # Mistral 7B Instruct v0.2


@pytest.mark.parametrize("template, rstrip, eos", [PHI, MISTRAL], ids=["Phi-3", "Mistral"])
def test_a_conversation_has_the_tokens_that_the_tokenizer_gives_to_its_rendering(template, rstrip, eos):
    tokenizer = prepending(rstrip)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    talk = [user("a"), assistant("ok"), user("b"), assistant("no")]
    ids, _ = encoded(tokenizer, {"messages": talk})
    whole = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokenizer.convert_ids_to_tokens(whole[: len(ids)])


# ---- Columns ----


LEFT_OUT = {  # columns, and what must be in the tokens of a row that is not refused
    "OpenAI's weight": {"messages": [user("q"), assistant("bad", weight=0)]},
    "Anthropic's system": {"system": "be rude", "messages": [user("q"), assistant("a")]},
    "system of pairs": {"system": "be rude", "prompt": "q", "completion": "a"},
    "TRL's chat_template_kwargs": {"chat_template_kwargs": {"thinking": True}, "messages": [user("q"), assistant("a")]},
    "function_call": {"messages": [user("q"), assistant("", function_call={"name": "f", "arguments": "{}"})]},
    "OpenAssistant": {"text": "what is x?", "role": "prompter", "message_id": "1", "parent_id": "0"}}
NAMES = {"weight", "system", "chat_template_kwargs", "function_call", "role", "message_id", "parent_id"}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_nothing_of_a_row_is_left_out_in_silence(case, tmp_path):
    """It is refused, or its tokens are others than without the column."""
    tokenizer = make_tokenizer(PLAIN + "{% if thinking %}thoughts{% endif %}")
    row = LEFT_OUT[case]
    plain = {name: x for name, x in row.items() if name not in NAMES}
    if "messages" in plain:
        plain["messages"] = [{name: turn[name] for name in ("role", "content")} for turn in plain["messages"]]
    try:
        (row,) = read_rows(write(tmp_path / "rows.jsonl", [row]), "prompt completion", "messages", "text")
        del row["_where"]
        tokens = encoded(tokenizer, row)
    except SystemExit:
        return
    assert tokens != encoded(tokenizer, plain), tokenizer.decode(tokens[0])


@scripts("sft")
@pytest.mark.parametrize("label", [0, -1, "False", False])
def test_what_is_labelled_bad_is_no_demonstration(refused, tmp_path, label):
    row = {"prompt": "the plot :", "completion": " good"}
    path = write(tmp_path / "rows.jsonl", [{**row, "label": True}, {**row, "label": label}])
    assert f"{path}:2: label" in refused(dataset=path, eval_dataset=path)


@scripts("dpo")
def test_a_tie_that_the_loss_cannot_take_is_refused_before_the_first_step(script, refused, tmp_path):
    """In the training rows alone, where the first evaluation would not meet it."""
    answers = [" good" * (1 + i) for i in range(12)]
    rows = [{"prompt": "the plot :", "completions": answers, "ranking": [1] + [2] * 11}]
    path = write(tmp_path / "rows.jsonl", rows)
    good = write(tmp_path / "good.jsonl", [{"prompt": "the plot :", "chosen": " good", "rejected": " good good"}])
    assert "in a tie" in refused(dataset=path, eval_dataset=good)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompt", ["中国的首都是哪里?", "東京の人口は?"])
def test_a_short_prompt_without_latin_letters_that_both_sides_repeat(prompt):
    tokenizer = make_tokenizer()
    row = {"prompt": prompt, "chosen": f"{prompt}a", "rejected": f"{prompt}b", "_where": "rows.jsonl:1"}
    ((completions, *_),) = load_comparisons(tokenizer, [row], [EOS], 512)
    assert tokenizer.decode(completions[0][0]).count(prompt) == 1


# ---- What stays allowed ----


QWEN3 = (  # white space around thoughts is the template's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # in the generation prompt
ALLOWED = {
    "thoughts": (QWEN3, assistant("<think>hm so</think>hello you")),
    "no thoughts": (QWEN3, assistant("<think></think>ok")),
    "thoughts that the prompt begins": (THINKING, assistant("<think>hm so</think>hello you")),
    "a call without content": (PLAIN + "{{ messages[-1].tool_calls }}", {"role": "assistant", "tool_calls": [{"f": 1}]}),
    "weight 1": (PLAIN, assistant("good", weight=1))}


@pytest.mark.parametrize("case", ALLOWED)
def test_honest_turns_are_taken(case):
    template, turn = ALLOWED[case]
    assert any(encoded(make_tokenizer(template), {"messages": [user("q"), turn]})[1])


@pytest.mark.parametrize("start", ["\n", "  ", "\n  \n"])
def test_white_space_at_a_templates_beginning_is_as_the_tokenizers_own(start):
    tokenizer = make_tokenizer(start + PLAIN)
    talk = [user("q"), assistant("a")]
    ids, _ = encoded(tokenizer, {"messages": talk})
    assert tokenizer.apply_chat_template(talk, tokenize=False).startswith(tokenizer.decode(ids))


def test_columns_that_the_scripts_refuse_are_others_to_read(tmp_path):
    """data/convert.py and bandit_bt.py read rows of any columns."""
    path = write(tmp_path / "rows.jsonl", [{"system": "be nice", "instruction": "q", "output": "a", "parent_id": 3}])
    assert read_rows(path)[0]["system"] == "be nice"


@scripts("sft")
def test_a_label_of_another_kind_is_no_judgement(go, tmp_path):
    path = write(tmp_path / "rows.jsonl", [
        {"prompt": f"the plot {word} :", "completion": " good", "label": label}
        for word, label in (("was", "positive"), ("is", 2), ("and", True), ("it", None))])
    assert go("run", dataset=path, eval_dataset=path).exists()
