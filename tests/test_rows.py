"""A row is either used as its author meant it, or refused with its place and its columns; and there is one way to
render and to end a conversation, for training, prompts and rewards alike.

Rows go through files and the loaders that the scripts call; what only main() does is seen in tiny runs.
"""

import copy
import functools
import gzip
import json

import pytest
import reward_model
import torch
import transformers
from common import encode, load_comparisons, load_prompts, load_reward, read_rows, responses_of, split_rows
from conftest import CHAT_TEMPLATE, naive_logprobs, watching
from tiny_runs import (
    ASK, CHAT_PAIR, DEMONSTRATION, PAIR, REFUSE, REPLY, SAMPLERS, copy_model, launch, read, scripts, write)

SYSTEM = {"role": "system", "content": "be kind"}
EOS, BOS = 2, 1  # of bpe_tokenizer
LIMIT = 512


def encode_file(tokenizer, path, eos_ids=(EOS,), limit=LIMIT):
    return encode(tokenizer, read_rows(path, "prompt completion", "messages", "text"), list(eos_ids), limit)


def comparisons_of_file(tokenizer, path, eos_ids=(EOS,), limit=LIMIT):
    rows = read_rows(path, "chosen rejected", "prompt completions ranking")
    return load_comparisons(tokenizer, rows, list(eos_ids), limit)


def prompts_of_file(tokenizer, path, eos_ids=(EOS,), limit=LIMIT):
    return [ids for _, ids in load_prompts(tokenizer, read_rows(path, "prompt"), limit)]


FILES = {"sft": encode_file, "dpo": comparisons_of_file, "reward_model": comparisons_of_file, "rankings": comparisons_of_file,
         "prompts": prompts_of_file}


def row_of(use, *prompt, good=REPLY, bad=REFUSE):
    """A row for this use, of messages."""
    prompt = list(prompt)
    return {"sft": {"messages": [*prompt, good]}, "dpo": {"prompt": prompt, "chosen": [good], "rejected": [bad]},
            "reward_model": {"chosen": [*prompt, good], "rejected": [*prompt, bad]},
            "rankings": {"prompt": prompt, "completions": [[good], [bad], [bad]], "ranking": [1, 2, 2]},
            "prompts": {"prompt": prompt}}[use]


@pytest.fixture
def tokens(tmp_path):
    """tokens(tokenizer, row, use) -> all token ids that this use of the row gives."""

    def load(tokenizer, row, use="sft", **options):
        path = write(tmp_path / "one.jsonl", [copy.deepcopy(row)])
        return FILES[use](tokenizer, path, **options)[0]

    return load


@pytest.fixture
def said(capsys):
    """said(function, *inputs, **options): it ends with exit code 2 and one line "error: ...", returned."""

    def run(function, *inputs, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*inputs, **options)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return run


@pytest.fixture
def refuses(said, tmp_path):
    """refuses(tokenizer, good row, bad row, use): the bad one is named by file and line."""

    def run(tokenizer, good, bad, use="sft", **options):
        path = write(tmp_path / "rows.jsonl", copy.deepcopy([good, bad]))
        line = said(FILES[use], tokenizer, path, **options)
        assert f"{path}:2: " in line, line
        return line

    return run


@pytest.fixture(scope="session")
def with_template(bpe_tokenizer):
    """with_template(template, *tokens) -> a copy of the tokenizer with it, and with these special tokens."""

    @functools.cache
    def make(template=CHAT_TEMPLATE, *special):
        tokenizer = copy.deepcopy(bpe_tokenizer)
        tokenizer.add_tokens(list(special), special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chat(with_template):
    return with_template()


uses = pytest.mark.parametrize("use", FILES)

# ---- Messages ----

KNOWN_ROLES = (  # as Qwen2.5's: what has another role vanishes
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
BAD_CONTENT = {"null": None, "a number": 5, "true": True, "an object": {"text": "hello"}, "texts": ["hello", "you"],
               "an image": [{"type": "text", "text": "hello"}, {"type": "image", "image": "cat.png"}],
               "a part of null": [{"type": "text", "text": None}], "a part of a number": [{"text": 5}],
               "a list of lists": [["hello"]], "audio": [{"type": "input_audio", "input_audio": {"data": "aa"}}]}
BAD_MESSAGES = {"role null": {"role": None, "content": "hello"}, "role 5": {"role": 5, "content": "hello"},
                "no role": {"content": "hello"}, "no content": {"role": "user"},
                "ShareGPT": {"from": "human", "value": "a"}, "text": "hello", "a list": ["user", "hello"], "nothing": None, "a number": 7, "empty": {}}


@uses
@pytest.mark.parametrize("content", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_content_that_is_no_text_is_refused(chat, refuses, use, content):
    """Some templates render it as an empty turn or as Python, and the run would learn that."""
    for message in ({"role": "user", "content": content}, {"role": "assistant", "content": content}):
        is_reply = message["role"] == "assistant" and use != "prompts"
        bad = row_of(use, ASK, good=message) if is_reply else row_of(use, message)
        refuses(chat, row_of(use, ASK), bad, use)


@uses
@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_what_is_no_message_is_refused(chat, refuses, use, message):
    refuses(chat, row_of(use, ASK), row_of(use, message), use)


@uses
@pytest.mark.parametrize("role", ["human", "gpt", "tool", "User", "", "developer"])
def test_a_role_that_the_template_leaves_out_is_refused(with_template, refuses, use, role):
    bad = row_of(use, ASK, {"role": role, "content": "hello"})
    assert role in refuses(with_template(KNOWN_ROLES), row_of(use, ASK), bad, use)


@pytest.mark.parametrize("first", ["see <0>", "see <1>", "<0> <1> <2>"])
def test_a_message_is_missed_whatever_the_others_say(with_template, refuses, first):
    bad = {"messages": [{"role": "user", "content": first}, {"role": "human", "content": "hello"}, REPLY]}
    if first == "see <0>":
        bad["messages"].insert(0, bad["messages"].pop(1))
    refuses(with_template(KNOWN_ROLES), row_of("sft", ASK), bad)


@uses
@pytest.mark.parametrize("parts", [["a film ?"], ["a film", " ?"], ["", "a ", "film", " ?"]], ids=len)
def test_parts_of_text_are_joined(chat, tokens, use, parts):
    for kind in ({"type": "text"}, {}):
        message = {"role": "user", "content": [{**kind, "text": part} for part in parts]}
        assert tokens(chat, row_of(use, message), use) == tokens(chat, row_of(use, ASK), use)


@uses
def test_parts_of_an_answer_are_joined(chat, tokens, use):
    parts = [{"type": "text", "text": "it was "}, {"type": "text", "text": "good ."}]
    message = {"role": "assistant", "content": parts}
    prompt = [ASK, message, ASK]
    row, same = row_of(use, *prompt, good=message), row_of(use, ASK, REPLY, ASK, good=REPLY)
    assert tokens(chat, row, use) == tokens(chat, same, use)


def test_a_held_out_conversation_of_parts_is_new(tmp_path):
    """The prompt ends before the first answer, however its content is written."""
    rows = []
    for i in range(80):
        parts = lambda text: [{"type": "text", "text": text}]
        rows.append({"messages": [{"content": parts(f"question {i // 4}"), "role": "user"},
                                  {"content": parts(f"answer {i}"), "role": "assistant"}]})
    train, held_out = split_rows(write(tmp_path / "rows.jsonl", rows), "", "messages")
    questions = [{str(row["messages"][0]) for row in part} for part in (train, held_out)]
    assert len(held_out) == 4 and not questions[0] & questions[1]


@pytest.mark.parametrize("more", [{"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]},
                                  {"reasoning_content": "two and two"}, {"thinking": "two and two"}], ids=" ".join)
def test_parts_of_an_answer_that_the_template_leaves_out_are_refused(chat, refuses, more):
    refuses(chat, row_of("sft", ASK), row_of("sft", ASK, good={**REPLY, **more}))


# ---- Tools ----

TOOLS = "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}" + CHAT_TEMPLATE
ADD = {"type": "function", "function": {"name": "add", "description": "two numbers", "parameters": {}}}


@uses
def test_tools_are_rendered(with_template, tokens, use):
    tokenizer = with_template(TOOLS)
    ids = tokens(tokenizer, {**row_of(use, ASK), "tools": [ADD]}, use)
    without = tokens(tokenizer, row_of(use, ASK), use)
    while not isinstance(ids[0], int):  # the first sequence
        ids, without = ids[0], without[0]
    text = tokenizer.decode(ids)
    assert '"name": "add"' in text and text.count("<tools>") == 1
    assert text.partition("</tools>")[2] == tokenizer.decode(without)
    want = tokens(tokenizer, row_of(use, ASK), use)
    for nothing in (None, []):
        assert tokens(tokenizer, {**row_of(use, ASK), "tools": nothing}, use) == want


@uses
def test_tools_that_the_template_ignores_are_refused(chat, refuses, use):
    assert "tools" in refuses(chat, row_of(use, ASK), {**row_of(use, ASK), "tools": [ADD]}, use)


@uses
@pytest.mark.parametrize("tools", ["add", json.dumps([ADD]), ADD, [5], [None], ["add"], 7, True], ids=repr)
def test_malformed_tools_are_refused(with_template, refuses, use, tools):
    refuses(with_template(TOOLS), row_of(use, ASK), {**row_of(use, ASK), "tools": tools}, use)


# ---- Columns ----

TALK = [ASK, REPLY]
STRINGS = {"JSON": json.dumps(TALK), "compact": json.dumps(TALK, separators=(",", ":")), "Python": str(TALK),
           "ShareGPT": json.dumps([{"from": "human", "value": "hi"}]), "spaces": " [ { \"role\": \"user\"} ]",
           "indented": json.dumps(TALK, indent=1),
           "content first": json.dumps([{"content": "hi", "role": "user"}])}
COLUMNS = {"sft": [("messages", {}), ("prompt", DEMONSTRATION), ("completion", DEMONSTRATION), ("text", {})],
           "dpo": [("prompt", PAIR), ("chosen", PAIR), ("rejected", PAIR)], "prompts": [("prompt", {})]}
LISTS_AS_TEXT = []
for use, columns in COLUMNS.items():
    for column, row in columns:
        for kind in STRINGS:
            LISTS_AS_TEXT.append(pytest.param(use, column, row, kind, id=f"{use} {column} {kind}"))


@pytest.mark.parametrize("use, column, row, kind", LISTS_AS_TEXT)
def test_a_list_of_messages_as_a_string_is_refused(chat, refuses, use, column, row, kind):
    good = {"sft": DEMONSTRATION, "dpo": PAIR, "prompts": {"prompt": "hello"}}[use]
    line = refuses(chat, good, {**row, column: STRINGS[kind]}, use)
    assert column in line, line


@pytest.mark.parametrize("value", [None, 5, True, {"text": "hello"}], ids=repr)
@pytest.mark.parametrize("use, column, row", [(use, *pair) for use, pairs in COLUMNS.items() for pair in pairs])
def test_a_column_that_is_no_text_is_named(chat, refuses, use, column, row, value):
    good = {"sft": DEMONSTRATION, "dpo": PAIR, "prompts": {"prompt": "hello"}}[use]
    error = refuses(chat, good, {**row, column: value}, use)
    assert (":2: " if value is None else f":2: {column}: ") in error and column in error


@pytest.mark.parametrize("text", ["[1] hello", "[{x}] is a set", '[{"a": 1}]', "[", "[role] of a list", "{'role': 1}"])
def test_text_with_brackets_is_text(bpe_tokenizer, tokens, text):
    ids, trained = tokens(bpe_tokenizer, {"prompt": "say ", "completion": text})
    assert bpe_tokenizer.decode(ids) == f"<s>say {text}</s>"


MEDIA = [{"images": ["cat.png"]}, {"image": "cat.png"}, {"image": {"bytes": "aa"}}, {"video": "cat.mp4"},
         {"videos": [["a.png"]]}, {"audio": {"path": "cat.wav"}},
         {"audios": ["cat.wav"]}]


@uses
@pytest.mark.parametrize("media", MEDIA, ids=str)
def test_media_are_refused(chat, refuses, use, media):
    assert next(iter(media)) in refuses(chat, row_of(use, ASK), {**row_of(use, ASK), **media}, use)


@uses
def test_media_columns_without_media_are_no_fault(chat, tokens, use):
    row = {**row_of(use, ASK), "images": [], "image": None, "audio": ""}
    assert tokens(chat, row, use) == tokens(chat, row_of(use, ASK), use)


@scripts("sft")
def test_rows_of_bad_completions_are_no_demonstrations(refused, tmp_path):
    rows = [{**DEMONSTRATION, "label": True}, {**DEMONSTRATION, "prompt": "my review :", "label": False}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert f"{path}:2: label" in refused(dataset=path)
    assert f"{path}:2: label" in refused(eval_dataset=path)


PUBLISHED = {
    "GSM8K": {"question": "1+1?", "answer": "#### 2"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}]},
    "Alpaca": {"instruction": "add", "input": "1 1", "output": "2"},
    "LLMBar": {"input": "q", "output_1": "x", "output_2": "y", "label": 1},
    "JudgeBench": {"question": "q", "response_A": "x", "response_B": "y", "label": "A>B"},
    "columns of another case": {"Prompt": "a", "Completion": "b"}, "a space": {"prompt ": "a", " completion": "b"},
    "query": {"query": "a", "response": "b"}, "wrapped": {"data": [{"prompt": "a", "completion": "b"}]}}


@pytest.mark.parametrize("case", PUBLISHED)
def test_missing_columns_are_named_before_anything_else(refused, tmp_path, case):
    """Even of a single row, from which none can be held out, and before the model is read."""
    row = PUBLISHED[case]
    path = write(tmp_path / "rows.jsonl", [row])
    error = refused(dataset=path, model=str(tmp_path))
    assert f"{path}:1: " in error and "data/convert.py" in error and "held out" not in error
    assert all(repr(column) in error for column in row), error


@scripts("dpo", "reward_model")
def test_lists_of_texts_are_pointed_to_the_converter(refused, tmp_path):
    """RM-Bench's layout, for which there is a conversion."""
    path = write(tmp_path / "rows.jsonl", [PAIR, {"prompt": "a b", "chosen": ["c", "d"], "rejected": ["e", "f"]}])
    error = refused(dataset=path)
    assert f"{path}:2: " in error and "data/convert.py" in error and "no prompt column" not in error


# ---- Files ----

ROW = {"prompt": "hé", "completion": "\u2028"}
LINE = json.dumps(ROW, ensure_ascii=False)


def plain(rows):
    return [{name: value for name, value in row.items() if name != "_where"} for row in rows]


@pytest.mark.parametrize("name, text", [("a.jsonl", f"{LINE}\n{LINE}\n"), ("a.json", f"[{LINE}, {LINE}]"),
                                        ("a.jsonl", f"\n{LINE}\r\n\n{LINE}"), ("a.json", f"\n [\n{LINE},\n{LINE}]")],
                         ids=["jsonl", "json", "blank lines", "indented"])
def test_a_byte_order_mark_is_no_text(tmp_path, name, text):
    path = tmp_path / name
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + text.encode())
        assert plain(read_rows(str(path), "prompt completion")) == [ROW] * 2


def second(line):
    """A file with this line behind a good one."""
    return f"{LINE}\n{line}".encode()


FILES_REFUSED = {  # name, content, words
    "gz": ("rows.jsonl.gz", gzip.compress(LINE.encode()), [".jsonl"]),
    "latin-1": ("rows.jsonl", LINE.replace("\u2028", "").encode("latin-1"), ["UnicodeDecodeError"]),
    "UTF-16": ("rows.jsonl", LINE.encode("utf-16"), ["UnicodeDecodeError"]),
    "CSV": ("rows.csv", b"prompt,completion\na,b\n", [":1: ", "JSON"]),
    "wrapped": ("rows.json", json.dumps({"data": [ROW]}).encode(), [":1: ", "['data']", "data/convert.py"]),
    "wrapped, indented": ("rows.json", json.dumps({"data": [ROW]}, indent=1).encode(), [":1: "]),
    "JSON in strings": ("rows.json", json.dumps(["hello"]).encode(), [":1: "]),
    "surrogate": ("rows.jsonl", second('{"prompt": "\\ud800", "completion": "a"}'), [":2: ", "surrogate"]),
    "surrogate in a message": ("rows.jsonl", second('{"messages": [{"role": "user", "content": "\\udfff"}]}'), [":2: "]),
    "surrogate as column": ("rows.jsonl", second('{"prompt": "a", "completion": "b", "\\udc00": 1}'), [":2: "]),
    "5,000 digits": ("rows.jsonl", second('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}"), [":2: "]),
    "nested": ("rows.jsonl", second('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}"), [":2: "]),
    "nested objects": ("rows.jsonl", second('{"n": ' * 100_000 + "1" + "}" * 100_000), [":2: "]),
    "NUL": ("rows.jsonl", second("\0"), [":2: "]),
    "nested as a list": ("rows.json", ("[" * 100_000 + "]" * 100_000).encode(), []),
    "a list of lists": ("rows.json", b"[[1, 2]]", [":1: "]), "a number": ("rows.jsonl", b"7", [":1: "]),
    "null": ("rows.jsonl", b"null", [":1: "])}


@pytest.mark.parametrize("case", FILES_REFUSED)
def test_file_that_is_refused(said, tmp_path, case):
    name, content, words = FILES_REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    line = said(read_rows, str(path), "prompt completion", "messages")
    assert str(path) in line and all(word in line for word in words) and len(line) < 1000, line


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "😀"}, {"prompt": "a", "completion": "9" * 5000},
                                 {"prompt": "\0", "completion": "\x7f\ufeff"}], ids=["pair", "digits", "control"])
def test_odd_text_is_text(tmp_path, row):
    """A pair of surrogates in JSON is one character, and digits in a string are no number."""
    path = write(tmp_path / "rows.jsonl", [row])
    assert plain(read_rows(path)) == plain([json.loads(json.dumps(row))])


# ---- Prompts of pairs ----

PAIRED = ["dpo", "reward_model"]
paired = pytest.mark.parametrize("use", PAIRED)


@paired
@pytest.mark.parametrize("before", [[], [SYSTEM], [SYSTEM, ASK, REPLY]], ids=len)
def test_lists_that_repeat_the_prompt_column(chat, tokens, use, before):
    """The layout of zephyr's data: a prompt of text, and whole conversations beside it."""
    want = tokens(chat, {"prompt": [*before, ASK], "chosen": [REPLY], "rejected": [REFUSE]}, use)
    talks = {"chosen": [*before, ASK, REPLY], "rejected": [*before, ASK, REFUSE]}
    assert tokens(chat, {"prompt": ASK["content"], **talks, "messages": talks["chosen"]}, use) == want
    assert tokens(chat, {"prompt": [*before, ASK], **talks}, use) == want  # the prompt as a list, too
    assert tokens(chat, talks, use) == want


@paired
@pytest.mark.parametrize("before", [[ASK], [SYSTEM, ASK], [ASK, REPLY, {"role": "user", "content": "why ?"}]], ids=len)
def test_a_prompt_column_that_the_lists_do_not_repeat_is_refused(chat, refuses, use, before):
    bad = {"prompt": "Be brief.", "chosen": [*before, REPLY], "rejected": [*before, REFUSE]}
    refuses(chat, CHAT_PAIR, bad, use)


@paired
def test_answers_that_begin_with_another_question_are_refused(chat, refuses, use):
    """Two turns of the user: is the prompt repeated in other words, as here in parts, or the lists wrong?"""
    parts = {"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}
    for prompt in ([parts], [SYSTEM]):
        refuses(chat, CHAT_PAIR, {"prompt": prompt, "chosen": [ASK, REPLY], "rejected": [ASK, REFUSE]}, use)


@paired
def test_a_prompt_of_text_beside_lists_that_repeat_it(chat, tokens, use):
    """As in UltraFeedback's binarized pairs; with quotes and lines."""
    ask = {"role": "user", "content": "it's \"good\"\n?"}
    pair = {"chosen": [ask, REPLY], "rejected": [ask, REFUSE]}
    assert tokens(chat, {"prompt": ask["content"], **pair}, use) == tokens(chat, pair, use)


@paired
def test_a_text_that_both_sides_repeat_is_no_answer(bpe_tokenizer, tokens, use):
    prompt = "Question: hello?\nAnswer:"
    row = {"prompt": prompt, "chosen": " help", "rejected": " there"}
    repeated = {"prompt": prompt, "chosen": prompt + " help", "rejected": prompt + " there"}
    assert tokens(bpe_tokenizer, repeated, use) == tokens(bpe_tokenizer, row, use)
    once = {"prompt": prompt, "chosen": prompt + " help", "rejected": " there"}  # one of them may quote it
    assert bpe_tokenizer.decode(first_ids(tokens(bpe_tokenizer, once, use))) == f"<s>{prompt}{prompt} help</s>"


def first_ids(part):
    while not isinstance(part[0], int):
        part = part[0]
    return part


@paired
@pytest.mark.parametrize("word", ["hello", "Yes,", "\nhello"])
def test_one_word_may_begin_both_answers(bpe_tokenizer, tokens, use, word):
    row = {"prompt": word, "chosen": f"{word} there", "rejected": f"{word} help"}
    assert bpe_tokenizer.decode(first_ids(tokens(bpe_tokenizer, row, use))) == f"<s>{word}{word} there</s>"


@paired
@pytest.mark.parametrize("prompt", ["你好,你是谁?", "Question:hello?\nAnswer:", "1+1=?\n2+2=?\n"],
                         ids=["Chinese", "lines", "sums"])
def test_a_prompt_without_spaces_that_both_sides_repeat(bpe_tokenizer, tokens, use, prompt):
    row = {"prompt": prompt, "chosen": "help", "rejected": "there"}
    repeated = {"prompt": prompt, "chosen": f"{prompt}help", "rejected": f"{prompt}there"}
    assert tokens(bpe_tokenizer, repeated, use) == tokens(bpe_tokenizer, row, use)


@pytest.mark.parametrize("prompt, texts", [("Question: hello?\nAnswer:", [" help", " there", " me"]),
                                           ([ASK], [[REPLY], [REFUSE], [REPLY, ASK, REFUSE]])], ids=["text", "lists"])
def test_a_prompt_that_all_ranked_completions_repeat(chat, tokens, prompt, texts):
    row = {"prompt": prompt, "completions": texts, "ranking": [1, 2, 3]}
    repeated = {**row, "completions": [prompt + text for text in texts]}
    assert tokens(chat, repeated, "rankings") == tokens(chat, row, "rankings")


@paired
@pytest.mark.parametrize("more", [{}, {"ranking": None}, {"ranking": [1]}], ids=str)
def test_completions_without_a_ranking_are_refused(bpe_tokenizer, refuses, use, more):
    """Beside chosen and rejected, which would do alone."""
    pair = {"prompt": "hello ", "chosen": "a", "rejected": "b"}
    assert "ranking" in refuses(bpe_tokenizer, pair, {**pair, "completions": ["a", "b"], **more}, use)


@paired
@pytest.mark.parametrize("bad", [
    {"prompt": "another", "chosen": [REPLY], "rejected": [REFUSE]},  # which of them is the prompt?
    {"prompt": "another", "chosen": [SYSTEM, REPLY], "rejected": [ASK, REFUSE]},
    {"prompt": [ASK], "chosen": "good", "rejected": "bad"},
    {"prompt": "a film ?", "chosen": "good", "rejected": [REFUSE]},
    {"prompt": [ASK], "chosen": [REPLY], "rejected": "bad"}, {"chosen": [REPLY], "rejected": [REFUSE]}], ids=str)
def test_pairs_of_no_one_prompt_are_refused(chat, refuses, use, bad):
    refuses(chat, CHAT_PAIR, bad, use)


@pytest.mark.parametrize("bad", [{"prompt": "a", "completion": [REPLY]}, {"prompt": [ASK], "completion": "a"},
                                 {"prompt": ["a"], "completion": ["b"]}, {"messages": [ASK]}, {"messages": []},
                                 {"messages": [[ASK, REPLY]]}, {"prompt": [ASK], "completion": []}], ids=str)
def test_demonstrations_of_two_kinds_or_without_an_answer_are_refused(chat, refuses, bad):
    refuses(chat, DEMONSTRATION, bad)


# ---- Prompts over --max-length ----

LONG = "hello there " * 40
OVER = {"sft": {"prompt": LONG, "completion": "a"}, "dpo": {"prompt": LONG, "chosen": "a", "rejected": "b"},
        "reward_model": {"prompt": LONG, "chosen": "a", "rejected": "b"},
        "rankings": {"prompt": LONG, "completions": ["a", "b", "c"], "ranking": [1, 2, 3]}}
SHORT = {use: {**row, "prompt": "hello "} for use, row in OVER.items()}
by_length = pytest.mark.parametrize("use", OVER)


@by_length
@pytest.mark.parametrize("num_long", [1, 2, 9])
def test_prompts_over_the_length_are_dropped_and_counted(bpe_tokenizer, tmp_path, capsys, use, num_long):
    rows = [OVER[use]] * num_long + [SHORT[use]] * (10 - num_long)
    want = FILES[use](bpe_tokenizer, write(tmp_path / "short.jsonl", rows[num_long:]), limit=24)
    assert capsys.readouterr().out == ""
    kept = FILES[use](bpe_tokenizer, write(tmp_path / "rows.jsonl", rows), limit=24)
    printed = capsys.readouterr().out
    assert [part for part in kept if part] == want
    num_sequences = {"rankings": 3, "reward_model": 2, "dpo": 2}.get(use, 1)  # of a row
    assert f"{num_long * num_sequences} dropped" in printed and "--max-length 24" in printed and "rows.jsonl" in printed
    assert f"of {10 * num_sequences} rows" in printed
    assert ("MORE THAN ONE IN TEN" in printed) == (num_long > 1)  # over a tenth of them


@by_length
def test_nothing_but_long_prompts_is_refused(bpe_tokenizer, said, tmp_path, use):
    path = write(tmp_path / "rows.jsonl", [OVER[use]] * 3)
    line = said(FILES[use], bpe_tokenizer, path, limit=24)
    assert path in line and "--max-length" in line


def test_one_long_ranked_completion_is_cut_and_a_long_prompt_drops_all(bpe_tokenizer, tmp_path):
    rows = [SHORT["rankings"], OVER["rankings"], {**SHORT["rankings"], "completions": ["a", LONG, "c"]}]
    kept = comparisons_of_file(bpe_tokenizer, write(tmp_path / "rows.jsonl", rows), limit=24)
    lengths = [[len(ids) for ids, _ in completions] for completions, *_ in kept]
    n = lengths[0][0]
    assert lengths == [[n, n, n], [n, 24, n]]
    row = {**SHORT["rankings"], "completions": ["", "a b", "c d"]}  # one of them fits, as there is nothing to cut
    path = write(tmp_path / "rows.jsonl", [row, {**row, "prompt": "a"}])
    assert len(comparisons_of_file(bpe_tokenizer, path)) == 2
    limit = len(bpe_tokenizer(row["prompt"])["input_ids"]) + 1
    ((completions, *_),) = comparisons_of_file(bpe_tokenizer, path, limit=limit)
    assert len(completions) == 3


@scripts("sft", "dpo", "reward_model")
def test_a_run_without_its_long_prompts(script, go, tmp_path, capsys):
    """They change no number: the run is that of the other rows, except for the rows' order."""
    long = {**script.row, "prompt": " very" * 30}
    good = script.rows(0, 4)
    path = write(tmp_path / "rows.jsonl", [good[0], long, *good[1:]])
    held_out = write(tmp_path / "held_out.jsonl", [long, *script.rows(4, 6)])
    run = go("run", dataset=path, eval_dataset=held_out, max_length=30)
    printed = capsys.readouterr().out
    assert printed.count("whose prompts fill it: MORE THAN ONE IN TEN") >= 2 and "4 rows, 2 held out" in printed
    without = go("other", dataset=write(tmp_path / "good.jsonl", good), max_length=30,
                 eval_dataset=write(tmp_path / "good_held_out.jsonl", script.rows(4, 6)))
    for file in ("samples.jsonl", "model/model.safetensors"):
        assert (run / file).read_bytes() == (without / file).read_bytes()


# ---- Completions over --max-length ----


def test_a_cut_row_has_an_eos_that_is_not_trained_and_nothing_else_changes(bpe_tokenizer, tokens):
    row = {"prompt": "hello", "completion": " there" * 9 + " help me"}
    full, trained = tokens(bpe_tokenizer, row)
    prompt = trained.index(True)
    for limit in range(prompt + 2, len(full)):
        want = full[: limit - 1] + [EOS], trained[: limit - 1] + [False]
        assert tokens(bpe_tokenizer, row, limit=limit) == want
    assert tokens(bpe_tokenizer, row, limit=len(full)) == (full, trained) and trained[-1]


def test_rows_beside_a_cut_one_keep_their_eos(bpe_tokenizer, tmp_path):
    rows = [SHORT["sft"], {"prompt": "hello ", "completion": LONG}, {"text": LONG}, {"text": "hello"}]
    kept = encode_file(bpe_tokenizer, write(tmp_path / "rows.jsonl", rows), limit=24)
    assert [(len(ids) == 24, ids[-1], trained[-1]) for ids, trained in kept] == [
        (False, EOS, True), (True, EOS, False), (True, EOS, False), (False, EOS, True)]


LONG_TALK = [SYSTEM, ASK, REPLY, {"role": "user", "content": "help me"}, REFUSE, ASK, REPLY]


def turn_ends(full, trained):
    """The lengths of the conversation behind each whole answer."""
    return [i + 1 for i, (token, train) in enumerate(zip(full, trained)) if train and token == EOS]


def test_a_cut_conversation_keeps_the_eos_of_its_whole_turns(chat, tokens):
    full, trained = tokens(chat, {"messages": LONG_TALK})
    ends = turn_ends(full, trained)
    begins = [i for i in range(1, len(full)) if trained[i] and not trained[i - 1]]
    assert len(ends) == len(begins) == 3
    for limit in range(begins[0] + 2, len(full)):
        ids, kept = tokens(chat, {"messages": LONG_TALK}, limit=limit)
        n = len(ids)
        assert n <= limit and ids[-1] == EOS and ids[:-1] == full[: n - 1] and kept[:-1] == trained[: n - 1]
        if any(begin < limit - 1 < end - 1 for begin, end in zip(begins, ends)):  # within an answer
            assert n == limit and not kept[-1]
        elif limit not in ends:  # within what the user says: the answer before is whole
            assert n == max(end for end in ends if end <= limit) and kept[-1] and ids == full[:n]


def test_a_conversation_cut_right_behind_a_turn_keeps_its_eos(chat, tokens):
    full, trained = tokens(chat, {"messages": LONG_TALK})
    for end in turn_ends(full, trained):
        assert tokens(chat, {"messages": LONG_TALK}, limit=end) == (full[:end], trained[:end])


@scripts("sft")
def test_cut_rows_alone_train_no_eos(script, go, tiny, starts, tmp_path):
    """The first step's loss is the mean over the tokens before each row's EOS, by the model's own logits."""
    rows = [{"prompt": "review of the plot :", "completion": f" it{' was good' * n} ."} for n in (8, 9, 10, 11)]
    folder = str(starts / "run1" / "model")
    run = go("run", dataset=write(tmp_path / "rows.jsonl", rows), model=folder, max_length=12, eval_every=1,
             eval_dataset=write(tmp_path / "held_out.jsonl", rows[:2]), micro_batch_size=2)
    model, tokenizer = script.load(starts / "run1"), transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        prompt, ids = (len(tokenizer(text)["input_ids"]) for text in (row["prompt"], row["prompt"] + row["completion"]))
        assert ids >= 12
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"][:11]
        losses.append(-naive_logprobs(model, ids)[prompt - 1 :].detach())
    before, step, *_ = read(run / "metrics.jsonl")
    assert step["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert before["eval/loss"] == pytest.approx(torch.cat(losses[:2]).mean().item(), rel=1e-5)
    assert step["num_tokens"] == sum(map(len, losses))


# ---- How templates end turns ----

TWO_ENDS = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|></s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NEXT_TURN_ENDS = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
                  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def inside(tokenizer, ids, trained):
    """The trained tokens as text, a string for each run of them."""
    runs = [[]]
    for token, train in zip(ids, trained):
        if train:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_an_end_of_turn_and_then_an_eos(with_template, tokens):
    """The sampler stops at the first: so does the row."""
    tokenizer = with_template(TWO_ENDS, *SPECIAL)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for eos_ids in ([EOS, end], [end, EOS]):
        ids, trained = tokens(tokenizer, {"messages": [ASK, REPLY]}, eos_ids=eos_ids)
        assert tokenizer.decode(ids) == "<|user|>a film ?<|end|></s><|assistant|>it was good .<|end|>"
        assert inside(tokenizer, ids, trained) == ["it was good .<|end|>"]
    ids, trained = tokens(tokenizer, {"messages": [ASK, REPLY]}, eos_ids=[EOS])  # nothing but </s> ends a sample
    assert inside(tokenizer, ids, trained) == ["it was good .<|end|></s>"] and ids.count(EOS) == 2


def test_an_end_of_turn_and_then_an_eos_in_inner_turns(with_template, tokens):
    tokenizer = with_template(TWO_ENDS, *SPECIAL)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids, trained = tokens(tokenizer, {"messages": [ASK, REPLY, ASK, REFUSE]}, eos_ids=[EOS, end])
    assert inside(tokenizer, ids, trained) == ["it was good .<|end|>", "it was bad .<|end|>"]


def test_an_end_that_begins_the_next_turn_is_trained(with_template, tokens):
    """As GLM-4's: the model says <|user|>, an EOS of its generation_config, where its turn ends."""
    tokenizer = with_template(NEXT_TURN_ENDS, *SPECIAL)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    ids, trained = tokens(tokenizer, {"messages": [SYSTEM, ASK, REPLY, ASK, REFUSE]}, eos_ids=[EOS, user])
    assert inside(tokenizer, ids, trained) == ["it was good .<|user|>", "it was bad .</s>"]
    assert tokenizer.decode(ids).endswith("<|user|>\na film ?<|assistant|>\nit was bad .</s>")
    assert not trained[ids.index(user)]  # the user's first turn follows no answer


R1 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
      "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
LAST_ONLY = ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% if loop.last %} think{% endif %}"
             "{% else %}<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize("template", [R1, LAST_ONLY], ids=["R1", "the last turn alone"])
@pytest.mark.parametrize("prompt", [[ASK], [ASK, REPLY, ASK]], ids=len)
def test_templates_that_rewrite_earlier_text_work_in_rl_alone(with_template, tokens, refuses, template, prompt):
    tokenizer = with_template(template, *SPECIAL)
    want = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokens(tokenizer, {"prompt": prompt}, "prompts") == want
    assert "rewrites" in refuses(tokenizer, DEMONSTRATION, {"messages": [*prompt, REPLY]})
    for use in ("dpo", "rankings"):
        assert "rewrites" in refuses(tokenizer, OVER[use], row_of(use, *prompt), use)


THINKING = (  # as Qwen3's: the thoughts of the last answer alone are shown
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


def test_a_template_that_drops_earlier_thoughts_is_refused_where_there_are_some(with_template, tokens, refuses):
    tokenizer = with_template(THINKING)
    thought = {"role": "assistant", "content": "<think>well</think>yes"}
    ids, trained = tokens(tokenizer, {"messages": [ASK, thought]})
    assert inside(tokenizer, ids, trained) == ["<think>well</think>yes</s>"]
    assert "rewrites" in refuses(tokenizer, {"messages": [ASK, thought]}, {"messages": [ASK, thought, ASK, REPLY]})
    ids, trained = tokens(tokenizer, {"prompt": [ASK, thought, ASK], "completion": [REPLY]})  # as it will be asked
    assert tokenizer.decode(ids) == "<user>a film ?</s><assistant>yes</s><user>a film ?</s><assistant>it was good .</s>"
    assert inside(tokenizer, ids, trained) == ["it was good .</s>"]


def test_a_prompt_that_the_template_refuses_is_named(with_template, refuses):
    """Templates refuse to ask for an answer behind an answer, but render the conversation so far."""
    tokenizer = with_template(CHAT_TEMPLATE.replace(
        "{% if add", "{% if add_generation_prompt and messages[-1].role == 'assistant' %}"
        "{{ raise_exception('nothing to answer') }}{% endif %}{% if add"))
    assert "nothing to answer" in refuses(tokenizer, {"prompt": [ASK]}, {"prompt": [ASK, REPLY]}, "prompts")


@uses
def test_ids_do_not_depend_on_the_day(with_template, tokens, use, monkeypatch):
    """As Llama 3's template: today, unless it is given a date."""
    from datetime import datetime

    from transformers.utils import chat_template_utils

    class Someday(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(day, 1, 2)

    tokenizer = with_template(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today is {{ date_string }}" + CHAT_TEMPLATE)
    monkeypatch.setattr(chat_template_utils, "datetime", Someday)
    seen = []
    for day in (1969, 2077):
        assert str(day) in tokenizer.apply_chat_template([ASK], tokenize=False)  # else this test sees nothing
        seen.append(tokens(tokenizer, row_of(use, ASK), use))
    assert seen[0] == seen[1]


@uses
@pytest.mark.parametrize("text", ["hello</s>", "</s>", "a</s>b", "</s></s>"])
def test_a_message_that_holds_the_eos_is_refused(chat, refuses, use, text):
    refuses(chat, row_of(use, ASK), row_of(use, {"role": "user", "content": text}), use)
    refuses(chat, row_of(use, ASK), row_of(use, {"role": "user", "content": [{"type": "text", "text": text}]}), use)
    if use != "prompts":
        answer = {"role": "assistant", "content": text}
        refuses(chat, row_of(use, ASK), row_of(use, ASK, good=answer), use)


@pytest.mark.parametrize("use", ["sft", "dpo", "reward_model", "rankings"])
@pytest.mark.parametrize("text", ["a</s>b", "</s>a", "a</s> </s>"])
def test_a_completion_that_holds_the_eos_is_refused(bpe_tokenizer, refuses, use, text):
    bad = {"sft": {"prompt": "hello ", "completion": text}, "dpo": {"prompt": "hello ", "chosen": "a", "rejected": text},
           "rankings": {"prompt": "hello ", "completions": ["a", text], "ranking": [1, 2]}}
    refuses(bpe_tokenizer, SHORT[use], bad.get(use, bad["dpo"]), use)


@pytest.mark.parametrize("use", ["sft", "dpo", "reward_model", "rankings"])
def test_a_message_that_holds_another_eos_of_the_model_is_refused(with_template, refuses, use):
    """An answer that quotes it would be cut there."""
    tokenizer = with_template(CHAT_TEMPLATE, *SPECIAL)
    eos_ids = [EOS, tokenizer.convert_tokens_to_ids("<|end|>")]
    answer = {"role": "assistant", "content": "say <|end|> at the end"}
    refuses(tokenizer, row_of(use, ASK), row_of(use, ASK, good=answer), use, eos_ids=eos_ids)


# ---- Tokenizers that add a BOS ----


def words_with_bos(kind):
    """A tokenizer whose post-processor adds <s>, of which a newline is no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "##s", "a"]
    if kind == "Unigram":
        words = ["<unk>", "<s>", "</s>", "▁the", "▁cat", "▁sat", "s", "▁a"]
        tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace("\n", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        model = {"WordLevel": models.WordLevel, "WordPiece": models.WordPiece}[kind]
        tokenizer = Tokenizer(model({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    ends = "<s> $A </s>" if kind == "WordPiece" else "<s> $A"  # as BERT's
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "WordPiece"])
def test_a_bos_is_found_whatever_happens_to_whitespace(tokens, kind):
    tokenizer = words_with_bos(kind)
    row = {"prompt": "the cat", "completion": "sat", "chosen": "sat", "rejected": "a cat"}
    assert tokens(tokenizer, row) == ([1, 3, 4, 5, 2], [False] * 3 + [True] * 2)
    assert tokens(tokenizer, row, "prompts") == [1, 3, 4]
    assert tokens(tokenizer, row, "dpo")[0][1] == ([1, 3, 4, 7, 4, 2], [False] * 3 + [True] * 3)
    assert tokens(tokenizer, {"text": "the cat sat"}) == ([1, 3, 4, 5, 2], [False] + [True] * 4)
    tokenizer.chat_template = "<s>{% for m in messages %} {{ m.content }} {% endfor %}"
    assert tokens(tokenizer, row_of("prompts", {"role": "user", "content": "the cat"}), "prompts")[:3] == [1, 3, 4]


@pytest.mark.parametrize("row", [{"text": "<s>hello there</s>"}, {"prompt": "<s>hello", "completion": " there"}], ids=len)
def test_a_text_with_a_bos_of_its_own_gets_no_second_one(bpe_tokenizer, tokens, row):
    ids, _ = tokens(bpe_tokenizer, row)
    assert bpe_tokenizer.decode(ids) == "<s>hello there</s>"


def test_a_tokenizer_that_knows_no_letters(tokens):
    """Of digits alone: it drops what it does not know."""
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *"0123456789+=\n"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(words, [])), eos_token="</s>", pad_token="<pad>")
    assert tokens(tokenizer, {"prompt": "1+2=", "completion": "3"}) == ([4, 13, 5, 14, 6, 2], [False] * 4 + [True] * 2)


# ---- One way to read a conversation, for training and for rewards ----

POLICY = ("{% for m in messages %} about{{ m.content }}{% if m.role == 'assistant' %}<eos> ,{% endif %}{% endfor %}"
          "{% if add_generation_prompt %} about{% endif %}")
OTHERS = {  # templates of the reward model, and its EOS ids. <unk> stands for an end of turn
    "the same": (POLICY, [1]),
    "other words": ("{% for m in messages %} my{% if m.role == 'assistant' %} view{% endif %}{{ m.content }}<eos> ,"
                    "{% endfor %}{% if add_generation_prompt %} my view{% endif %}", [1]),
    "end of turn, EOS": ("{% for m in messages %} my{{ m.content }}<unk><eos> .{% endfor %}"
                         "{% if add_generation_prompt %} my{% endif %}", [1, 2]),
    "another EOS": ("{% for m in messages %} my{{ m.content }}<unk> .{% endfor %}"
                    "{% if add_generation_prompt %} my{% endif %}", [2]),
    "no end": ("{% for m in messages %} ,{{ m.content }}{% endfor %}{% if add_generation_prompt %} ,{% endif %}", [1])}
SUFFIX = ("{% for m in messages %} my{{ m.content }} .<eos>{% endfor %}"
          "{% if add_generation_prompt %} my{% endif %}", [1])  # as Llama 2's space before </s>


def with_chat(starts, folder, run, template, eos_ids=(1,)):
    """A model folder with this chat template, and these EOS ids."""
    copy_model(starts, folder, run=run)
    (folder / "chat_template.jinja").write_text(template)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        config["eos_token_id"] = list(eos_ids)
        (folder / name).write_text(json.dumps(config))
    return folder


def scores_of(conversations, folder, tmp_path):
    """What `reward_model.py --score` gives each of them: rewards, less the mean."""
    return scores_of_file(write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in conversations]), folder)


def scores_of_file(path, folder):
    reward_model.main(reward_model.Args(score=path, output_dir=str(folder.parent), device="cpu", max_length=60))
    return [row["reward"] for row in read(path.replace(".jsonl", ".scores.jsonl"))]


def reward_of(folder, starts, tmp_path):
    """score() of a reward model's folder for a policy with another template and two EOS ids, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_chat(starts, tmp_path / "policy", "run1", POLICY))
    args = reward_model.Args(device="cpu", micro_batch_size=3)
    return load_reward(str(folder), tokenizer, [1, 17], args, torch.device("cpu"), torch.no_grad)[0], tokenizer


ASKED = [" the plot ?", " the music ?", " my view of it ?", " what was it about ?", " it ?", " my review ?", " the ?",
         " overall ?"]
ANSWERS = [(" it was good", [1]), (" the plot", []), (" the music was good", [17])]  # and how they end


@pytest.mark.parametrize("case", OTHERS)
def test_a_reward_is_the_score_of_the_conversation(starts, tmp_path, case):
    """Whatever the policy's template, its EOS, and whether the response has one."""
    folder = with_chat(starts, tmp_path / "reward" / "model", "reward1", *OTHERS[case])
    score, tokenizer = reward_of(folder, starts, tmp_path)
    rows, responses, talks = [], [], []
    for k, text in enumerate(ASKED):
        prompt = [{"role": "user", "content": text}]
        if k == 3:
            prompt = [*prompt, {"role": "assistant", "content": " it was good"}, *prompt]
        for answer, end in ANSWERS:
            rows.append({"prompt": prompt, "_where": "rows.jsonl:1"})
            responses.append(tokenizer(answer)["input_ids"] + end)
            talks.append([*prompt, {"role": "assistant", "content": answer}])
    scores = score(copy.deepcopy(rows), [[]] * len(rows), responses)
    assert scores.std() > 0.05
    assert scores.tolist() == pytest.approx(scores_of(talks, folder, tmp_path), abs=1e-5, rel=0)


def test_a_reward_sees_the_rows_tools(starts, tmp_path):
    tools = "{% if tools %} music{% endif %}" + OTHERS["other words"][0]
    folder = with_chat(starts, tmp_path / "reward" / "model", "reward1", tools)
    score, tokenizer = reward_of(folder, starts, tmp_path)
    row = {"prompt": [{"role": "user", "content": ASKED[0]}], "_where": "rows.jsonl:1"}
    response = tokenizer(" it was good")["input_ids"] + [1]
    scores = score([{**row, "tools": [ADD]}, {**row, "tools": None}], [[], []], [response] * 2).tolist()
    talk = [*row["prompt"], {"role": "assistant", "content": " it was good"}]
    path = write(tmp_path / "talks.jsonl", [{"messages": talk, "tools": [ADD]}, {"messages": talk}])
    assert scores == pytest.approx(scores_of_file(path, folder), abs=1e-5, rel=0) and abs(scores[0] - scores[1]) > 1e-3


def test_what_a_template_writes_before_its_eos_is_scored(starts, tmp_path):
    folder = with_chat(starts, tmp_path / "reward" / "model", "reward1", *SUFFIX)
    score, tokenizer = reward_of(folder, starts, tmp_path)
    prompt = [{"role": "user", "content": ASKED[0]}]
    answer = tokenizer(" it was good")["input_ids"] + [1]
    scores = score([{"prompt": prompt, "_where": "rows.jsonl:1"}], [[]], [answer])
    talk = [*prompt, {"role": "assistant", "content": " it was good"}]
    assert scores.tolist() == pytest.approx(scores_of([talk], folder, tmp_path), abs=1e-5)


@scripts(*SAMPLERS)
def test_rewards_of_a_run_are_the_scores_of_its_conversations(script, tiny, starts, tmp_path, monkeypatch):
    """Of the responses in which the tokenizer finds the same tokens again."""
    policy = with_chat(starts, tmp_path / "policy", "run1", POLICY)
    reward = with_chat(starts, tmp_path / "reward" / "model", "reward1", *OTHERS["end of turn, EOS"])
    path = write(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in ASKED])
    rollouts = watching(monkeypatch, script.module)("rollout")
    launch(script, tiny(model=str(policy), dataset=path, eval_dataset=path, max_new_tokens=6, eval_samples=len(ASKED),
                        missing_eos_penalty=0.0, **script.flag("reward", str(reward)), **script.one_step))
    responses = responses_of(rollouts[0][1][0])
    samples = [row for row in read(tmp_path / "run" / "samples.jsonl") if row["step"] == 0]
    assert len(samples) == len(responses) == len(ASKED)
    talks, rewards = [], []
    for sample, response, text in zip(samples, responses, ASKED):
        assert sample["prompt"] == f" about{text} about"
        without_space = {0, 1, 2, 3, 4, 5}  # and special ones: what follows them would be another token
        if not without_space & set(response[:-1]) and sample["completion"].startswith(" "):
            answer = {"role": "assistant", "content": sample["completion"]}
            talks.append([{"role": "user", "content": text}, answer])
            rewards.append(sample[script.score_column])
    assert len(talks) >= 3
    assert rewards == pytest.approx(scores_of(talks, reward, tmp_path), abs=1e-5, rel=0)
