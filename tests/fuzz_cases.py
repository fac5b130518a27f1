"""The cases of fuzz.py: a tiny model and two finished runs, good rows, and for each kind of odd file a function that
spoils something in a case.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_runs import SCRIPTS, TINY, interrupt, launch

import bandit_bt

TARGETS = "sft dpo reward_model score ppo grpo bandit_bt".split()  # score: reward_model.py --score
ROWS = "sft dpo reward_model score ppo grpo"  # targets that read texts
TRAINED = "sft dpo reward_model ppo grpo"  # those that write a run folder with a model
SAMPLED = "ppo grpo"
NUM_ROWS = 4

# ---- The world: a tokenizer of bytes, so that any text comes back from its tokens, and two finished runs ----

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "plain": PLAIN,
    "known roles": (  # turns of other roles vanish
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "strings": (  # contents of other types vanish
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "parts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "trimmed": PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"),
    "tools": "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + PLAIN}


def make_tokenizer(template=PLAIN):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>",
        chat_template=template, clean_up_tokenization_spaces=False)


class World:
    """What every case copies from: world.model and world.reward, folders of finished runs in world.folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        transformers.logging.disable_progress_bar()
        self.tokenizer = make_tokenizer()
        start = self.folder / "start"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.1,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=4)
        transformers.LlamaForCausalLM(config).save_pretrained(start)
        self.tokenizer.save_pretrained(start)
        self.run, self.reward_run = self.folder / "sft", self.folder / "reward_model"
        self.model, self.reward = self.run / "model", self.reward_run / "model"
        for target, model, run in (("sft", start, self.run), ("reward_model", self.model, self.reward_run)):
            data = self.folder / f"{target}.jsonl"
            data.write_bytes(lines_of(good_rows(target, "text", random.Random(0))))
            flags = flags_of(target) | {"model": str(model), "dataset": str(data), "eval_dataset": str(data)}
            with contextlib.redirect_stdout(io.StringIO()):
                launch(SCRIPTS[target], SCRIPTS[target].module.Args(**flags, output_dir=str(run)))


# ---- Good rows, which the cases then spoil ----

NOUNS = "plot cast music scene hero story ending script villain romance".split()
WORDS = "lovely superb dull plain flat loud messy modern weak brilliant".split()


def lines_of(rows) -> bytes:
    """Rows (dicts, or lines of text) as the bytes of a .jsonl file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


def turn(role, content):
    return {"role": role, "content": content}


def good_rows(target, layout, rng, n=NUM_ROWS):
    """n rows of texts or, layout "chat", of messages. bandit_bt: votes of a cycle of three arms, and further ones."""
    if target == "bandit_bt":
        votes = [("x", "y", "a"), ("y", "z", "a"), ("z", "x", "a"), ("x", "z", "tie")]
        votes += [(*rng.sample("xyz", 2), rng.choice(["a", "b", "tie"])) for _ in range(n)]
        return [{"item_a": a, "item_b": b, "outcome": outcome} for a, b, outcome in votes]
    rows = []
    for noun, (good, bad) in zip(rng.sample(NOUNS, n), zip(rng.sample(WORDS, n), rng.sample(WORDS, n))):
        prompt, chosen, rejected = f"the {noun} ?", f" it was {good} .", f" it was not {bad} ."
        if layout == "chat":
            prompt = [turn("user", prompt)]
            chosen, rejected = [turn("assistant", chosen)], [turn("assistant", rejected)]
        if target in ("sft", "score"):
            row = {"prompt": prompt, "completion": chosen}
            rows.append({"messages": prompt + chosen} if layout == "chat" else row)
        elif target in ("dpo", "reward_model"):
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            rows.append({"prompt": prompt, "answer": good})
    return rows


def columns_of(target) -> list[str]:
    """Columns that rows of text must have."""
    return {"sft": ["prompt", "completion"], "score": ["prompt", "completion"], "ppo": ["prompt"],
            "grpo": ["prompt"], "bandit_bt": ["item_a", "item_b", "outcome"]}.get(target, ["chosen", "rejected"])


REWARD = "def reward(prompts, completions, **columns): return [float(len(text) % 3) for text in map(str, completions)]"


def flags_of(target) -> dict:
    """Flags of a run of one or two steps on four rows."""
    if target == "bandit_bt":
        return {"num_bootstrap": 5, "num_steps": 20}
    script = SCRIPTS["reward_model" if target == "score" else target]
    flags = TINY | script.tiny | {"max_length": 256, "max_prompt_length": 256, "max_new_tokens": 4,
                                  "num_train_epochs": 1, "total_episodes": 8, "batch_size": 4, "micro_batch_size": 4,
                                  "num_minibatches": 1, "update_epochs": 1, "eval_samples": 2}
    if target in SAMPLED:
        flags["max_prompt_length"] = 400
    return {name: value for name, value in flags.items() if name in script.flags}


# ---- A case ----


@dataclasses.dataclass
class Case:
    """A folder of a user's files, a run on them, and what has to come out."""

    name: str
    target: str
    folder: Path
    world: World
    rng: random.Random
    flags: dict = dataclasses.field(default_factory=dict)  # other than those of any tiny run
    wanted: str = "either"  # how it has to end: "refused", "ran" or "either"
    words: list = dataclasses.field(default_factory=list)  # words that the line of a refusal has to have
    seen: list = dataclasses.field(default_factory=list)  # texts that the model of a run has to be given
    unseen: list = dataclasses.field(default_factory=list)  # texts that it must never be given
    absent: list = dataclasses.field(default_factory=list)  # files that must not be there afterwards
    data_file: str = ""  # the file with the odd rows
    notes: list = dataclasses.field(default_factory=list)  # what was drawn

    @property
    def output(self) -> Path:
        return Path(self.flags["output_dir"])

    def pick(self, options):
        """One of these options, which the case's printed name then shows."""
        choice = self.rng.choice(options)
        self.notes.append(" ".join(repr(choice)[:70].split()))
        return choice

    def draw(self, **options):
        """One of the options in draw(refused=[...], either=[...], ran=[...]), and what has to come of it."""
        self.wanted, choice = self.rng.choice([(wanted, x) for wanted, several in options.items() for x in several])
        self.notes.append(" ".join(repr(choice)[:70].split()))
        return choice

    def write(self, name, content) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def data(self, content, name="rows.jsonl", flag="") -> str:
        """The odd file, bytes or rows, as --dataset or --eval-dataset (or --score) beside a good one."""
        content = content if isinstance(content, bytes) else lines_of(content)
        return self.point(self.write(name, content), flag)

    def point(self, path, flag="") -> str:
        """Name a file as the odd one, and give the run a good one where it needs another."""
        self.data_file = path
        if self.target == "score":
            self.flags["score"] = path
        elif self.target == "bandit_bt":
            self.flags["dataset"] = path
        else:
            flag = flag or self.rng.choice(["dataset", "dataset", "eval_dataset"])
            other = {"dataset": "eval_dataset", "eval_dataset": "dataset"}[flag]
            good = lines_of(good_rows(self.target, "text", self.rng))
            self.flags[other] = self.write("good.jsonl", good)
            self.flags[flag] = path
        return path

    def good(self, layout="text") -> list[dict]:
        return good_rows(self.target, layout, self.rng)

    def spoil(self, rows, change) -> list[dict]:
        """Rows with one of them, drawn, replaced by change(row); a refusal has to name its line."""
        k = self.rng.randrange(len(rows))
        rows = copy.deepcopy(rows)
        rows[k] = change(rows[k])
        self.words = [f":{k + 1}"]
        return rows

    def model(self, source="", name="start", **files) -> Path:
        """A copy of a model folder with other contents in some files, None for no such file."""
        folder = self.folder / name
        shutil.copytree(source or self.world.model, folder)
        for file, content in files.items():
            path = folder / file.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    def with_template(self, name):
        """Start from a model whose tokenizer has this chat template; the reward model too, where one scores."""
        source = self.world.reward_run if self.target == "score" else self.world.model
        folder = self.folder / "start"
        shutil.copytree(source, folder)
        inner = folder / "model" if self.target == "score" else folder
        make_tokenizer(TEMPLATES[name]).save_pretrained(inner)
        self.flags["output_dir" if self.target == "score" else "model"] = str(folder)

    def args(self):
        """Args of the run: what the case says, else a good file, model and reward."""
        target = self.target
        flags = flags_of(target) | {"output_dir": str(self.folder / "run")}
        if target == "bandit_bt":
            flags |= {"dataset": str(self.folder / "good.jsonl")}
            return bandit_bt.Args(**flags | self.flags)
        flags["model"] = str(self.world.model)
        if target in SAMPLED:
            flags["reward"] = (str(self.folder / "reward.py") + ":reward",)
        if target == "score":
            flags |= {"output_dir": str(self.world.reward_run), "score": str(self.folder / "good.jsonl")}
        else:
            flags |= dict.fromkeys(["dataset", "eval_dataset"], str(self.folder / "good.jsonl"))
        return SCRIPTS["reward_model" if target == "score" else target].module.Args(**flags | self.flags)


KINDS = {}  # name: (targets, how often in a round, function that spoils something in a case)


def kind(targets, times=1):
    def add(function):
        KINDS[function.__name__.replace("_", " ")] = (targets.split(), times, function)
        return function

    return add


EVERY = " ".join(TARGETS)

# ---- Bytes ----


@kind(EVERY)
def cut_bytes(case):
    content = lines_of(case.good())
    case.data(content[: case.rng.randrange(len(content))])


@kind(EVERY)
def flipped_bytes(case):
    content = bytearray(lines_of(case.good()))
    for _ in range(case.rng.randint(1, 4)):
        content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
    case.data(bytes(content))


@kind(EVERY)
def doubled_bytes(case):
    content = lines_of(case.good())
    a, b = sorted(case.rng.sample(range(len(content)), 2))
    case.data(content[:b] + content[a:])


@kind(EVERY)
def encodings(case):
    rows = case.good()
    text = lines_of(rows).decode()
    column = columns_of(case.target)[0]
    named = json.dumps({**rows[0], column: "café"}, ensure_ascii=False) + "\n"
    case.data(case.pick([
        b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode(),
        text.encode("utf-16"), (text + named).encode("latin-1"), b"\0" + text.encode(), text.encode() + b"\0" * 9,
        text.replace("\n", "\0\n").encode(), b"\xff\xfe" * 50, text.replace("\n", "\n\n\n").encode(),
        text.replace("\n", "\x0b\n").encode(), text.replace(" ", "\xa0").encode(), text.rstrip().encode()]))


@kind(EVERY)
def nothing_in_the_file(case):
    case.wanted, case.words = "refused", ["rows.jsonl"]
    case.data(case.pick([b"", b"\n", b"\n \n\t\n", b"\xef\xbb\xbf", b"\r\n\r\n"]))


@kind(EVERY)
def surrogates(case):
    """JSON can name half of a surrogate pair, which no encoding can hold."""
    column = case.pick(columns_of(case.target) + ["note"])
    half = case.pick(["\\ud800", "a \\udfff b", "\\ud83d", "\\udc80"])
    rows = case.spoil(case.good(), lambda row: json.dumps({**row, column: "@"}).replace("@", half))
    case.data(rows)
    case.words = []


@kind(EVERY)
def giant_line(case):
    rng, rows = case.rng, case.good()
    column = columns_of(case.target)[0]
    long = case.pick(["very " * 50_000, "x" * 300_000, "\\n" * 100_000, "é" * 100_000])
    joined = " ".join(map(json.dumps, rows))
    case.data(rng.choice([[joined], [*rows, {**rows[0], column: long}], [{**row, column: long} for row in rows]]))


@kind(EVERY)
def hard_to_parse(case):
    column = case.pick(columns_of(case.target) + ["mu", "note", "count"])
    value = case.pick(["9" * 5000, "-" + "1" * 5000, "[" * 100_000, "[" * 100_000 + "]" * 100_000,
                       '{"a":' * 100_000, '{"a":' * 900 + "1" + "}" * 900, "1e400", "-1e400", "NaN",
                       "Infinity", "-Infinity", "1e-400", "0x10", "01", "1_000", "True", "undefined", "'a'"])
    rows = case.spoil(case.good(), lambda row: json.dumps({**row, column: "@"}).replace('"@"', value))
    case.data(rows)
    case.words = []


@kind(EVERY)
def double_keys(case):
    column = columns_of(case.target)[0]
    case.data(case.spoil(case.good(), lambda row: json.dumps(row)[:-1] + f', "{column}": "again"}}'))
    case.words = []


@kind(EVERY)
def other_tops(case):
    """A list, an object of rows, a column of values, a scalar in place of lines of objects."""
    rows = case.good()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    content = case.pick([rows, {"data": rows}, {"train": rows}, columns, 5, "text", None, [], {}, [[]], [1, 2],
                         [rows, rows], [*rows, 5], [None], True])
    indent = case.pick([None, 1])
    name = case.pick(["rows.json", "rows.jsonl"])
    case.data(json.dumps(content, indent=indent).encode(), name)


@kind(EVERY)
def other_files(case):
    """Compressed, of another format, or no file at all."""
    content = lines_of(case.good())
    name = case.pick(["rows.jsonl.gz", "rows.jsonl", "rows.txt", "rows.csv", "rows", "rows.JSONL", "rows.ndjson",
                      "rows.json.bak", "rows.parquet", "rows.json", "no/such.jsonl", "no/such", "folder.jsonl",
                      "loop.jsonl", "", ".", "ro\nws.jsonl", "zeilen übung.jsonl", "rows.tar.gz", "a/b/c"])
    if name in ("no/such.jsonl", "no/such", "", ".", "a/b/c"):
        case.wanted = "refused"
        case.point(name and str(case.folder / name) if name != "a/b/c" else name)
        if name == "" and (case.target not in TRAINED.split() or case.flags["eval_dataset"] == ""):
            case.wanted = "either"  # what the flag means when it is empty
        return
    if name == "loop.jsonl":
        case.wanted = "refused"
        (case.folder / name).symlink_to(case.folder / name)
        case.point(str(case.folder / name))
    elif name == "folder.jsonl":
        case.wanted = "refused"
        (case.folder / name).mkdir()
        case.point(str(case.folder / name))
    elif name.endswith(".gz") or name == "rows.jsonl":
        case.data(gzip.compress(content), name)
    else:
        case.data(content, name)


@kind(EVERY)
def unreadable(case):
    path = case.data(case.good())
    if os.geteuid() != 0:  # root reads everything
        case.wanted = "refused"
        Path(path).chmod(0)


# ---- Columns ----

ODD = [None, 5, -0.5, True, [], {}, [None], ["a", "b"], [[]], {"text": "a"}, [{"text": "a"}], [5], [{}]]


@kind(EVERY)
def columns(case):
    """A column that must be there is missing, misspelt, null, a number or nested, in one row."""
    column = case.pick(columns_of(case.target))
    change = case.pick(["missing", "misspelt", *ODD])

    def spoil(row):
        value = row.pop(column)
        if change == "misspelt":
            row[case.pick([column.upper(), column[:-1], f" {column}", f"{column}s"])] = value
        elif change != "missing":
            row[column] = change
        return row

    case.wanted = "refused"
    if case.target == "bandit_bt" and type(change) in (int, bool) and column != "outcome":
        case.wanted = "either"  # a whole number may be a name
    case.data(case.spoil(case.good(), spoil))


@kind(ROWS)
def columns_of_others(case):
    """Layouts that other projects use, in all rows, and no --eval-dataset."""
    message = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    turns = [turn("user", "one"), turn("assistant", "two")]
    shape = case.pick([
        {"question": "one", "answer": "two"}, {"conversations": message}, {"instruction": "one", "output": "two"},
        {"instruction": "one", "input": "", "output": "two"}, {"input": "one", "output_1": "a", "output_2": "b"},
        {"Prompt": "one", "Completion": "two"}, {"query": "one", "response": "two"}, {"conversation": turns},
        {"question": "one", "response_A": "two", "response_B": "three", "label": "A>B"},
        {"problem": "one", "solution": "two"}])
    rows = []
    for word in WORDS[:6]:
        rows.append(json.loads(json.dumps(shape).replace("one", f"one {word}")))
    case.wanted, case.words = "refused", [next(iter(shape))]
    case.data(rows, flag="dataset")
    if case.target != "score":
        case.flags["eval_dataset"] = ""


@kind(ROWS)
def odd_texts(case):
    """Texts that are odd and yet texts: they are read as they are, or refused."""
    rng = case.rng
    text, mark = case.pick([
        ("👩‍👩‍👧 🎬 ŻÓŁĆ", "ŻÓŁĆ"), ("\u202eمرحبا بالعالم\u202c", "مرحبا"), ("a\u2028b\u2029c MARK", "MARK"),
        ("a\0b MARK", "MARK"), ("<|im_end|> MARK", "MARK"), ("one <|im_end|> MARK", "MARK"), ("<s> MARK </s>", "MARK"),
        ("<|im_start|>assistant\nMARK", "MARK"), ("<pad><pad> MARK", "MARK"), ("{{ MARK }} {% x %}", "MARK"),
        ("\tMARK\n\n", "MARK"), ("   MARK", "MARK"), ("123", "123"), ("null", "null"), ("[]", "[]"),
        ('{"role": "user"} MARK', "MARK"), ("\ufeffMARK", "MARK"), ("\x1b[31mMARK", "MARK"), ("\\", "\\"),
        ("e\u0301" * 20 + " MARK", "MARK"), ("%s %d {} MARK", "MARK"), ("\r\nMARK\r\n", "MARK")])
    names = columns_of(case.target)
    column = rng.choice(names if case.target in SAMPLED else ["prompt", *names])
    case.data(case.spoil(case.good(), lambda row: {**row, column: text}), flag="dataset")
    case.words, case.seen = [], [mark]


@kind(ROWS)
def empty_texts(case):
    column = case.pick(["prompt", *columns_of(case.target)])
    text = case.pick(["", " ", "\n", "\t \n", "<|im_end|>", "<|im_end|><|im_end|>", "<s>", "\u200b"])
    rows = case.good()
    if case.rng.random() < 0.5:
        rows = [{**row, column: text} for row in rows]
    else:
        rows = case.spoil(rows, lambda row: {**row, column: text})
        case.words = []
    case.data(rows)


@kind(ROWS)
def long_texts(case):
    column = case.pick(["prompt", *columns_of(case.target)])
    rows = case.good()
    rows[1][column] = "very " * case.pick([40, 60, 100, 300, 5000])
    if case.rng.random() < 0.3:
        rows = [{**row, column: "very " * 100 + row[column]} for row in rows]
    case.data(rows)


@kind(ROWS)
def equal_texts(case):
    rows = case.good()
    names = columns_of(case.target)
    which = case.rng.randrange(3)
    if which == 0:  # prompts equal to completions
        rows = [{**row, names[-1]: row["prompt"]} for row in rows]
    elif which == 1:  # all rows the same
        rows = [rows[0]] * 4
    else:
        rows = [{**row, names[-1]: row[names[0]]} for row in rows]
    case.data(rows, flag="dataset")
    if case.target != "score" and case.rng.random() < 0.5:
        case.flags["eval_dataset"] = ""


@kind("sft dpo reward_model score")
def labels_and_images(case):
    """Columns that change what a row means: labels of KTO, images."""
    name = case.pick(["label", "label", "images", "image", "videos"])
    value = {"label": False}.get(name, ["a.png"])
    rows = [{**row, name: True if name == "label" else None} for row in case.good()]
    column = columns_of(case.target)[-1]
    rows = case.spoil(rows, lambda row: {**row, name: value, column: " UNWANTED"})
    case.data(rows, flag="dataset")
    case.words = []
    if name != "label" or case.target == "sft":
        case.unseen = ["UNWANTED"]


TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "weather", "parameters": {"type": "object", "properties": {}}}}


@kind(ROWS)
def tools(case):
    """Tools beside messages reach the chat template, or the row is refused."""
    case.with_template(case.pick(["tools", "tools", "plain"]))
    value = case.pick([[TOOL], [TOOL], json.dumps([TOOL]), TOOL, [json.dumps(TOOL)], "get_weather", [5], 5,
                       [{"name": "get_weather"}], [["get_weather"]]])
    case.data(case.spoil(case.good("chat"), lambda row: {**row, "tools": value}), flag="dataset")
    case.words = []
    if "get_weather" in str(value):
        case.seen = ["get_weather"]


@kind("dpo reward_model")
def shares_of_votes(case):
    value = case.pick([1.5, -0.25, "0.5", "high", True, None, [1], {}, math.nan, math.inf, -math.inf, 1e308, 2,
                       -1, "", 10**30])
    case.wanted = "refused"
    case.data(case.spoil(case.good(), lambda row: {**row, "mu": value}))


@kind("reward_model")
def chances_of_labels(case):
    value = case.pick([1.5, -0.25, "0.5", True, None, [1], math.nan, math.inf, 2, ""])
    case.wanted = "either" if value is None else "refused"
    case.data(case.spoil(case.good(), lambda row: {**row, "p_chosen": value}))


@kind("reward_model")
def rankings(case):
    texts = [" good .", " fair .", " bad ."]
    ranking = case.pick([[1, 2], [1, 2, 3, 4], [], [1.0, 2.0, 3.0], ["1", "2", "3"], [True, True, False], "123",
                         [1, 2, None], None, {}, 1, [[1], [2], [3]], [1, 2, math.nan], [1.5, 2, 3]])
    case.wanted = "refused"
    good = {"prompt": "the plot ?", "completions": texts, "ranking": [1, 2, 3]}
    case.data(case.spoil([good] * 4, lambda row: {**row, "ranking": ranking}))


@kind("reward_model")
def lists_of_completions(case):
    texts, ranking = case.draw(
        refused=[([" good ."], [1]), ([], []), (None, [1, 2]), ("ab", [1, 2]), ([" good .", None], [1, 2]),
                 ([" good .", 5], [1, 2]), ({}, {}), ([" good .", ["bad"]], [1, 2]),
                 ([" good .", [turn("assistant", "b")]], [1, 2])],
        either=[([" a"] * 3, [1, 2, 3]), ([" a", " b"] * 20, list(range(40))), ([" a", ""], [1, 2]),
                ([f" {i}" for i in range(30)], [1] * 30)],
        ran=[([" a", " b", " c"], [1, 1, 1]), ([" a", " b", " c"], [10**20, -5, 0])])
    good = {"prompt": "the plot ?", "completions": [" x", " y", " z"], "ranking": [1, 2, 3]}
    case.data(case.spoil([good] * 4, lambda row: {**row, "completions": texts, "ranking": ranking}))
    case.flags["loss_type"] = case.rng.choice(["bradley_terry", "plackett_luce"])
    if case.wanted == "either":
        case.words = []


# ---- Messages ----

MARKS = ["ALPHA", "BRAVO", "CHARLIE", "DELTA"]


def conversation():
    return [turn(role, f"say {mark}") for role, mark in zip(["user", "assistant"] * 2, MARKS)]


def put(case, messages):
    """A row of the target that holds this conversation, whose last turn is the answer."""
    if case.target in ("sft", "score"):
        return {"messages": messages}
    if case.target in SAMPLED:
        return {"prompt": messages, "answer": "x"}
    return {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [turn("assistant", "no")]}


@kind(ROWS, times=3)
def broken_turns(case):
    """One turn is no turn, or has no text: never trained in silence as an empty one, or as Python's spelling."""
    case.with_template(case.pick(list(TEMPLATES)))
    messages = conversation()
    if case.target in SAMPLED:
        messages = messages[:3]
    k = case.rng.randrange(len(messages))
    role, text, mark = messages[k]["role"], messages[k]["content"], MARKS[k]
    part, image = {"type": "text", "text": text}, {"type": "image", "image": "a.png"}
    messages[k] = case.draw(
        refused=[turn(role, None), {"role": role}, turn(role, []), turn(role, {}), turn(role, [None]),
                 turn(role, [{"type": "text"}]), turn(role, [image, part]),
                 turn(role, [{"type": "image_url", "image_url": {"url": "a.png"}}]), {"from": role, "value": text},
                 {"role": role, "text": text}, text, None, 5, [], {}, [role, text], {"content": text},
                 turn(None, text), turn(5, text), turn([role], text)],
        either=[turn(role, 7319), turn(role, True), turn(role, [part]), turn(role, [text]),
                turn(role, [{"type": "text", "text": "say "}, {"type": "text", "text": mark}]),
                turn(role, {"text": text})])
    if case.wanted == "either":
        case.seen = [m for i, m in enumerate(MARKS[: len(messages)]) if i != k]
        case.seen.append({"7319": "7319", "True": "True"}.get(str(messages[k]["content"]), mark))
        case.unseen = ["{'", "['", "None"]
    case.data(case.spoil(case.good("chat"), lambda row: put(case, messages)), flag="dataset")


@kind(ROWS)
def unknown_roles(case):
    case.with_template(case.pick(list(TEMPLATES)))
    messages = conversation()[: 3 if case.target in SAMPLED else 4]
    k = case.rng.randrange(len(messages))
    messages[k]["role"] = case.pick(["human", "gpt", "tool", "function", "User", "Assistant", "assistant ", "bot",
                                     "developer", "", "model", "ipython"])
    case.seen = MARKS[: len(messages)]
    if k == 3 and case.target in ("sft", "score"):
        case.seen = MARKS[:2]  # what follows the last answer may stay away
    if k == 3 and case.target in ("dpo", "reward_model"):
        case.wanted = "refused"
    case.data(case.spoil(case.good("chat"), lambda row: put(case, messages)), flag="dataset")


@kind(ROWS)
def odd_conversations(case):
    case.with_template(case.pick(list(TEMPLATES)))
    ask, say, more, end = conversation()
    system = turn("system", "say ECHO")
    all_of = [ask, say, more, end]
    messages, marks = case.draw(
        refused=[(json.dumps(all_of), []), ([], []), ([all_of], []), (ask, []), (str(all_of), []),
                 ({"messages": all_of}, []), (None, [])],
        either=[([ask, say, end], ["ALPHA", "BRAVO", "DELTA"]), ([say, end], ["BRAVO", "DELTA"]),
                ([ask, say, system, more, end], [*MARKS, "ECHO"]), ([ask, more, end], ["ALPHA", "CHARLIE", "DELTA"]),
                ([system, end], ["ECHO", "DELTA"]), ([system, system, *all_of], [*MARKS, "ECHO"]), ([end], ["DELTA"]),
                ([ask, say] * 40 + [more, end], []), ([ask, turn("assistant", "")], ["ALPHA"]),
                ([turn("user", ""), end], ["DELTA"]), ([turn("user", "  "), turn("assistant", " \n ")], []),
                ([*all_of, ask], MARKS)])
    good = case.good("chat")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        row = put(case, messages)
        if messages[-1] is ask and case.target in ("dpo", "reward_model"):
            case.wanted = "refused"  # the user speaks last
    elif case.target in ("sft", "score"):
        row = {"messages": messages}
    else:
        row = {**good[0], "prompt": messages}
        if isinstance(messages, str) and case.target in SAMPLED:
            case.wanted = "either"  # a prompt of text, which no other row is
        elif messages == [] and case.target not in SAMPLED:
            case.wanted = "either"
    case.seen = marks
    case.data(case.spoil(good, lambda _: row), flag="dataset")


@kind("sft dpo reward_model score")
def mixed_layouts(case):
    """Text in one column and messages in another, a prompt that the answers repeat, rows of several layouts."""
    chat, text = case.good("chat"), case.good()
    ask, say, more, end = conversation()
    if case.target in ("sft", "score"):
        row = case.pick([{"prompt": "say ALPHA", "completion": [say]}, {"prompt": [ask], "completion": " say BRAVO"},
                         {"prompt": [ask], "completion": [ask, say]}, {"messages": [ask, say], "prompt": "other"},
                         {"text": [ask, say]}, {"prompt": [ask, say], "completion": [more]}])
    else:
        row = case.pick([
            {"prompt": "say ALPHA", "chosen": [ask, say], "rejected": [ask, end]},
            {"prompt": [ask], "chosen": [ask, say], "rejected": [ask, end]},
            {"prompt": "say ALPHA", "chosen": [say], "rejected": [end]},
            {"prompt": [ask], "chosen": [say], "rejected": " say DELTA"}, {"chosen": [say], "rejected": [end]},
            {"prompt": "say ALPHA", "chosen": "say ALPHA say BRAVO", "rejected": "say ALPHA say DELTA"},
            {"chosen": [ask, say, more, end], "rejected": [ask, say]},
            {"prompt": [], "chosen": [say], "rejected": [end]},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}])
    case.data(case.spoil(chat + text, lambda _: row), flag="dataset")
    case.words = []
    case.unseen = ["{'", "say ALPHAsay ALPHA"]


# ---- Votes ----


@kind("bandit_bt")
def votes(case):
    a, b = {"item_a": "x", "item_b": "y"}, {"model_a": "x", "model_b": "y"}
    row = case.draw(
        refused=[
            {**a, "outcome": "maybe"}, {**a, "outcome": None}, a, {**a, "outcome": 3}, {**b, "winner": ["model_a"]},
            {"item_a": "x", "item_b": "x", "outcome": "a"}, {"item_a": 1.5, "item_b": 2, "outcome": "a"},
            {"item_a": ["x"], "item_b": "y", "mu": 1}, {"item_a": "b", "item_b": "a", "outcome": "a"},
            {**a, "mu": 2}, {**a, "mu": "1"}, {**a, "mu": math.nan}, {**a, "wins_a": 3},
            {**a, "wins_a": 3, "wins_b": None}, {**a, "wins_a": math.inf, "wins_b": 1},
            {**a, "outcome": "a", "count": math.inf}, {**a, "outcome": "a", "count": -1},
            {**a, "outcome": "a", "count": 1.5}, {**a, "outcome": "a", "count": "5"},
            {**a, "outcome": "a", "count": True}],
        either=[
            {**b, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, {**a, "outcome": "a", "count": 0},
            {"item_a": 1, "item_b": 2, "outcome": 1}, {"item_a": "", "item_b": " ", "outcome": "a"},
            {"item_a": True, "item_b": False, "outcome": "a"}],
        ran=[{**b, "winner": "model_a"}, {**b, "winner": "tie (bothbad)"}, {**a, "wins_a": 3, "wins_b": 1}])
    case.data(case.spoil(case.good(), lambda _: row))
    if case.wanted == "either":
        case.words = []


@kind("bandit_bt")
def sets_of_votes(case):
    vote = lambda a, b, outcome, **more: {"item_a": a, "item_b": b, "outcome": outcome, **more}
    rows = case.draw(
        refused=[[vote("x", "y", "a")] * 5, [vote("x", "x", "a")], [vote("x", "y", "a", count=0)] * 3,
                 [vote("x", "y", "a"), vote("x", "y", "b"), vote("z", "w", "tie")],
                 [vote("x", "y", "tie", count=10**12)], [vote("x", "y", "tie", count=10**30)],
                 [vote("x", "y", "a"), {"model_a": "x", "model_b": "y"}]],
        either=[[vote("x", "y", "tie")] * 5, [vote("x", "y", "a", count=1_000_000), vote("x", "y", "b", count=1)],
                [vote("a" * 5000, "b\nc", "tie")] * 3,
                [vote(f"arm {k}", f"arm {(k + 1) % 200}", "tie") for k in range(200)]],
        ran=[[vote("x", "y", "a"), vote("x", "y", "b")], [vote("🎬", "\u202eمر", "tie")] * 3,
             [vote(1, 2, "tie"), vote(2, 3, "tie"), vote("3", "1", "tie")]])
    case.data(rows)


# ---- Rewards ----

HEAD = "def reward(prompts, completions, **columns):\n    "
REWARDS = {  # name: (how the run has to end, source)
    "syntax error": ("refused", "def reward(:\n"),
    "indentation": ("refused", "def reward(prompts, completions, **c):\nreturn 1"),
    "no function": ("refused", "x = 1\n"),
    "empty file": ("refused", ""),
    "NUL bytes": ("refused", "x = 1\0\n" + REWARD),
    "import error": ("refused", "import no_such_module\n" + REWARD),
    "exit at import": ("refused", "import sys; sys.exit(0)\n"),
    "raises": ("refused", HEAD + "raise KeyError('colour')"),
    "raises with lines": ("refused", HEAD + "raise ValueError('one\\ntwo\\nthree')"),
    "raises text of no encoding": ("refused", HEAD + "raise ValueError('\\ud800')"),
    "raises without message": ("refused", HEAD + "raise Exception"),
    "asserts": ("refused", HEAD + "assert False"),
    "stop iteration": ("refused", HEAD + "raise StopIteration"),
    "generator exit": ("refused", HEAD + "raise GeneratorExit"),
    "sys.exit": ("refused", HEAD + "import sys; sys.exit(0)"),
    "sys.exit with text": ("refused", HEAD + "import sys; sys.exit('bye')"),
    "base exception": ("refused", "class Stop(BaseException): pass\n" + HEAD + "raise Stop"),
    "recursion": ("refused", HEAD + "return reward(prompts, completions)"),
    "memory": ("refused", HEAD + "raise MemoryError"),
    "signature": ("refused", "def reward(text): return 1.0"),
    "one argument more": ("refused", "def reward(prompts, completions, colour, **columns): return [1.0]"),
    "None": ("refused", HEAD + "return None"),
    "nothing": ("refused", HEAD + "pass"),
    "all None": ("refused", HEAD + "return [None] * len(completions)"),
    "number": ("refused", HEAD + "return 1.0"),
    "short": ("refused", HEAD + "return [1.0] * (len(completions) - 1)"),
    "long": ("refused", HEAD + "return [1.0] * (len(completions) + 1)"),
    "NaN": ("refused", HEAD + "return [float('nan')] * len(completions)"),
    "infinity": ("refused", HEAD + "return [float('inf')] * len(completions)"),
    "1e39": ("refused", HEAD + "return [1e39] * len(completions)"),
    "huge integer": ("refused", HEAD + "return [10**400] * len(completions)"),
    "large": ("either", HEAD + "return [1e30 * i for i in range(len(completions))]"),
    "complex": ("refused", HEAD + "return [1j] * len(completions)"),
    "strings": ("refused", HEAD + "return ['high'] * len(completions)"),
    "strings of digits": ("refused", HEAD + "return ['1'] * len(completions)"),
    "string of digits": ("refused", HEAD + "return '1' * len(completions)"),
    "bytes": ("refused", HEAD + "return b'1' * len(completions)"),
    "dict": ("refused", HEAD + "return {i: 1.0 for i in range(len(completions))}"),
    "set": ("refused", HEAD + "return set(range(len(completions)))"),
    "lists": ("refused", HEAD + "return [[1.0]] * len(completions)"),
    "generator": ("either", HEAD + "return (float(i) for i in range(len(completions)))"),
    "raising generator": ("refused", HEAD + "return (1 / 0 for text in completions)"),
    "tuple": ("ran", HEAD + "return tuple(float(i) for i in range(len(completions)))"),
    "bools": ("ran", HEAD + "return [i % 2 == 0 for i in range(len(completions))]"),
    "ints": ("ran", HEAD + "return list(range(len(completions)))"),
    "numpy": ("ran", "import numpy\n" + HEAD + "return numpy.arange(len(completions), dtype=numpy.float32)"),
    "numpy numbers": ("ran", "import numpy\n" + HEAD + "return [numpy.float64(1)] * len(completions)"),
    "tensor": ("ran", "import torch\n" + HEAD + "return torch.arange(len(completions)).half()"),
    "tensor with gradient": ("either", "import torch\n" + HEAD
                             + "return torch.ones(len(completions), requires_grad=True)"),
    "some None": ("either", HEAD + "return [None] + [1.0] * (len(completions) - 1)"),
    "object": ("ran", "class R:\n    def __call__(self, prompts, completions, **c): return [1.0] * len(completions)\n"
               "reward = R()"),
    "BOM": ("ran", "\ufeff" + REWARD),
    "prints": ("ran", HEAD + "print('line\\n' * 20000); return [1.0] * len(completions)"),
    "warns": ("ran", HEAD + "import warnings; warnings.warn('slow'); return [1.0] * len(completions)"),
    "default dtype": ("either", "import torch\n" + HEAD
                      + "torch.set_default_dtype(torch.float64); return [1.0] * len(completions)"),
    "no gradients": ("ran", "import torch\n" + HEAD
                     + "torch.set_grad_enabled(False); return [1.0] * len(completions)"),
    "other folder": ("ran", "import os\nos.mkdir('other')\n" + HEAD
                     + "if os.path.exists('other'): os.chdir('other')\n    return [1.0] * len(completions)"),
    "signals": ("ran", "import signal\n" + HEAD
                + "signal.signal(signal.SIGTERM, signal.SIG_IGN); return [1.0] * len(completions)"),
    "changes prompts": ("ran", HEAD + "assert 'TAINTED' not in str(prompts)\n"
                        "    for p in prompts: p += [{'role': 'user', 'content': 'TAINTED'}]\n"
                        "    return [1.0] * len(completions)"),
    "changes messages": ("ran", HEAD + "assert 'TAINTED' not in str(prompts)\n"
                         "    for p in prompts: p[-1]['content'] = 'TAINTED'\n"
                         "    return [1.0] * len(completions)"),
    "changes columns": ("ran", HEAD + "assert 'TAINTED' not in str(columns)\n"
                        "    for notes in columns['notes']: notes.append('TAINTED')\n"
                        "    return [1.0] * len(completions)"),
    "empties lists": ("ran", HEAD + "n = len(completions); prompts.clear(); completions.clear(); return [1.0] * n")}


@kind(SAMPLED, times=0)  # one for each of REWARDS instead
def rewards(case):
    name = case.name.rpartition("/")[2]
    case.wanted, source = REWARDS[name]
    case.words = ["reward.py"] if case.wanted == "refused" else []
    case.write("reward.py", source)
    rows = [{**row, "notes": ["a"]} for row in case.good("chat")]
    path = case.data(rows)
    case.flags |= {"dataset": path, "eval_dataset": path, "output_dir": "run" if name == "other folder" else
                   str(case.folder / "run")}


@kind(SAMPLED)
def reward_specs(case):
    folder, world = case.folder, case.world
    case.write("folder.py/x", "")
    spec = case.pick([
        "reward.py", "reward.py:", ":reward", "reward.py:no_such", "no_such.py:reward", "folder.py:reward", "",
        "reward.py:reward:", "reward.py:__name__", "reward.py:reward()", "no_such", ".", "reward.txt:reward",
        str(world.model), str(world.run), str(world.reward_run), f"{world.reward}:reward", "reward.py:1"])
    case.wanted = "refused"
    case.words = ["--reward"]
    relative = spec.startswith(("reward.", "no_such", "folder"))
    case.flags["reward"] = (str(folder / spec) if relative else spec,)


# ---- Models ----


def config_with(folder, name="config.json", **changes) -> str:
    config = json.loads((folder / name).read_text())
    return json.dumps({**config, **changes})


def start_from(case, change) -> Path:
    """change(folder of a copied model): the run starts from it, or scores with it."""
    if case.target == "score":
        shutil.copytree(case.world.reward_run, case.folder / "start")
        folder = case.folder / "start" / "model"
        case.flags["output_dir"] = str(case.folder / "start")
    elif case.target in SAMPLED and case.rng.random() < 0.5:
        folder = case.model(case.world.reward, "scorer")
        case.flags["reward"] = (str(folder),)
    else:
        folder = case.model()
        case.flags["model"] = str(folder)
    change(folder)
    return folder


@kind(ROWS)
def missing_model_files(case):
    folder = start_from(case, lambda folder: None)
    names = sorted(path.name for path in folder.iterdir())
    name = case.rng.choice(names)
    (folder / name).unlink()
    others = {"model.safetensors": "ran" if folder.name == "start" else "refused", "config.json": "refused",
              "generation_config.json": "ran", "chat_template.jinja": "ran", "tokenizer.json": "refused"}
    case.notes.append(f"{folder.name} without {name}")
    case.wanted = others.get(name, "either")
    if name == "tokenizer.json" and folder.name == "scorer":
        case.wanted = "either"
    if name == "model.safetensors" and case.target == "reward_model":
        case.wanted = "either"  # a reward model may start at random, or be refused


@kind(ROWS)
def half_a_download(case):
    """Weights of another format, or an index without its shards: never a start from random weights."""
    def change(folder):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        name = case.pick(["model.safetensors.index.json", "model.gguf", "consolidated.00.pth", "tf_model.h5",
                          "model.safetensors.incomplete", "pytorch_model.bin", "model-00001-of-00002.safetensors",
                          "pytorch_model.bin.index.json", "model.ckpt", "flax_model.msgpack", "model.onnx"])
        index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / name).write_bytes(json.dumps(index).encode() if name.endswith("index.json") else weights)

    start_from(case, change)
    case.wanted = "refused"


@kind(ROWS)
def broken_weights(case):
    def change(folder):
        path, rng = folder / "model.safetensors", case.rng
        content = path.read_bytes()
        which = case.pick(["cut", "cut", "empty", "noise", "flip", "header", "names", "nan", "shape", "extra", "less"])
        case.wanted = "either" if which == "flip" else "refused"
        if which == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        elif which == "empty":
            path.write_bytes(b"")
        elif which == "noise":
            path.write_bytes(rng.randbytes(1000))
        elif which == "flip":
            k = rng.randrange(2000, len(content))
            path.write_bytes(content[:k] + bytes([content[k] ^ 64]) + content[k + 1 :])
        elif which == "header":
            path.write_bytes(content[:20] + rng.randbytes(30) + content[50:])
        else:
            weights = load_file(path)
            name = rng.choice(sorted(weights))
            if which == "names":
                weights["other." + name] = weights.pop(name)
            elif which == "nan":
                weights[name] = torch.full_like(weights[name], math.nan)
            elif which == "shape":
                weights[name] = torch.zeros(3, 5)
            elif which == "less":
                del weights[name]
            else:
                extra = rng.choice(["v_head.summary.weight", "model.layers.1.self_attn.q_proj.weight",
                                    "model.layers.0.self_attn.q_proj.lora_A.weight", "value_head.weight"])
                weights[extra] = torch.zeros(2, 16)
            save_file(weights, path, {"format": "pt"})

    start_from(case, change)


@kind(ROWS)
def broken_configs(case):
    def change(folder):
        rng, path = case.rng, folder / "config.json"
        text = path.read_text()
        which = case.pick([
            "cut", "{}", "[]", "5", "", "null", "noise",
            {"model_type": "no_such"}, {"model_type": None}, {"model_type": 5}, {"hidden_size": "sixteen"},
            {"hidden_size": 0}, {"hidden_size": -16}, {"hidden_size": 24},
            {"num_attention_heads": 0}, {"num_hidden_layers": 2}, {"num_hidden_layers": 0}, {"vocab_size": 100},
            {"vocab_size": 10**12}, {"max_position_embeddings": 4}, {"hidden_act": "no_such"}, {"rms_norm_eps": "x"},
            {"eos_token_id": "x"}, {"eos_token_id": -1}, {"eos_token_id": 10**6}, {"eos_token_id": [[4]]},
            {"torch_dtype": "no_such", "dtype": "no_such"}, {"architectures": ["T5ForConditionalGeneration"]},
            {"model_type": "bert"}, {"model_type": "t5"}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}])
        if isinstance(which, dict):
            path.write_text(config_with(folder, **which))
        else:
            content = {"cut": text[: rng.randrange(len(text) - 2)].encode(), "noise": rng.randbytes(200)}
            path.write_bytes(content.get(which, which.encode()))
        harmless = str(which).startswith(("{'eos", "{'arch", "{'torch", "{'max"))
        case.wanted = "either" if harmless else "refused"

    start_from(case, change)


@kind(ROWS)
def odd_tokenizers(case):
    def change(folder):
        rng = case.rng
        which = case.pick(["no eos", "larger", "larger", "cut", "empty object", "noise", "no pad", "odd template",
                           "template not found", "eos not in it", "no vocabulary", "pad is eos", "class"])
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        file = folder / "tokenizer.json"
        if which in ("no eos", "no pad"):
            settings.pop("eos_token" if which == "no eos" else "pad_token")
            if which == "no eos":
                (folder / "generation_config.json").unlink(missing_ok=True)
                (folder / "config.json").write_text(config_with(folder, eos_token_id=None))
                case.wanted = "refused"
        elif which == "larger":
            content = json.loads(file.read_text())
            for letter in " .aeiouts":  # every text has some of these
                letter = letter.replace(" ", "Ġ")
                content["model"]["vocab"][letter] += 1000
            file.write_text(json.dumps(content))
            case.wanted = "refused"
        elif which == "cut":
            file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
            case.wanted = "refused"
        elif which in ("empty object", "noise"):
            file.write_bytes(b"{}" if which == "empty object" else rng.randbytes(300))
            case.wanted = "refused"
        elif which == "odd template":
            (folder / "chat_template.jinja").write_text(rng.choice(
                ["{% for m in messages %}", "{{ 1 / 0 }}", "{{ no.such.thing }}", "", "{% include 'x' %}",
                 "{{ messages }}", "{{ raise_exception('no') }}", "{% for i in range(10) %}x{% endfor %}"]))
            case.data(case.good("chat"), flag="dataset")
            case.unseen = ["{'"]
        elif which == "template not found":
            (folder / "chat_template.jinja").unlink()
            case.data(case.good("chat"), flag="dataset")
        elif which == "eos not in it":
            settings["eos_token"] = "<|no such|>"
        elif which == "pad is eos":
            settings["pad_token"] = settings["eos_token"]
            case.wanted = "ran"
        elif which == "class":
            settings["tokenizer_class"] = rng.choice(["NoSuchTokenizer", 5, None, "BertTokenizer"])
        elif which == "no vocabulary":
            content = json.loads(file.read_text())
            content["model"]["vocab"] = {}
            file.write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    start_from(case, change)


@kind(ROWS)
def models_of_another_kind(case):
    """A reward model as --model, a policy as a reward model, an adapter, something else: refused."""
    world = case.world
    which = case.pick(["other", "other", "adapter", "adapter beside", "empty folder", "file", "run folder",
                       "nowhere"])
    case.wanted = "refused"
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(world.model), "r": 4})
    if which == "other" and case.target != "score":
        case.flags["model"] = str(world.reward)
        if case.target == "reward_model":
            case.wanted = "either"  # goes on from its head
    elif which == "other":
        shutil.copytree(world.run, case.folder / "start")
        case.flags["output_dir"] = str(case.folder / "start")
    elif which == "adapter":
        folder = start_from(case, lambda folder: [path.unlink() for path in folder.iterdir()])
        (folder / "adapter_config.json").write_text(adapter)
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 16)}, folder / "adapter_model.safetensors")
    elif which == "adapter beside":
        folder = start_from(case, lambda folder: None)
        (folder / "adapter_config.json").write_text(adapter)
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 16)}, folder / "adapter_model.safetensors")
    elif which == "empty folder":
        start_from(case, lambda folder: [path.unlink() for path in folder.iterdir()])
    else:
        paths = {"file": case.write("file", "x"), "run folder": str(world.run), "nowhere": str(case.folder / "no")}
        path = paths[which]
        case.flags["output_dir" if case.target == "score" else "model"] = path


@kind(ROWS)
def code_in_a_model_folder(case):
    """Python beside a model is not run, even if somebody answers yes."""
    def change(folder):
        case.absent = [case.folder / "executed"]
        code = f"open({str(case.absent[0])!r}, 'w').close()\n"
        (folder / "modeling_x.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n" + code
            + "class XConfig(LlamaConfig): model_type = 'x'\nclass XModel(LlamaForCausalLM): config_class = XConfig\n")
        (folder / "tokenization_x.py").write_text(code)
        classes = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel",
                   "AutoModelForSequenceClassification": "modeling_x.XModel"}
        which = case.pick(["config", "tokenizer", "both"])
        if which != "tokenizer":
            (folder / "config.json").write_text(config_with(
                folder, auto_map=classes, model_type=case.pick(["x", "llama"]), architectures=["XModel"]))
        if which != "config":
            (folder / "tokenizer_config.json").write_text(config_with(
                folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.T", None]},
                tokenizer_class="T"))

    start_from(case, change)


# ---- Run folders ----


def foreign_files(folder):
    """Files that a user may have, some with the names of a run's."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"mine": 1}\n')
    (folder / "samples.jsonl").write_text('{"mine": 2}\n')
    (folder / "args.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")


@kind("sft dpo reward_model ppo grpo bandit_bt")
def user_files_in_the_run_folder(case):
    """--output-dir is the user's own folder: nothing of theirs is changed."""
    which = case.pick(["foreign", "data", "data", "model", "file", "below a file"])
    folder = case.folder / "run"
    if which == "foreign":
        foreign_files(folder)
    elif which == "data":
        name = case.pick(["run/samples.jsonl", "run/metrics.jsonl", "run/args.json"])
        case.data(case.good() if name != "run/args.json" else json.dumps(case.good()).encode(), name)
    elif which == "model" and case.target != "bandit_bt":
        case.model(name="run")
        case.flags["model"] = str(folder)
    else:
        case.write("run", "mine")
        case.wanted = "refused"
        case.flags["output_dir"] = str(folder / "deeper" if which == "below a file" else folder)


@kind("sft dpo reward_model ppo grpo")
def finished_run(case):
    """A finished run in --output-dir stays, whatever else is asked for."""
    shutil.copytree(case.world.run, case.folder / "run")
    case.wanted = "refused"
    case.flags["resume"] = case.rng.random() < 0.5
    if case.rng.random() < 0.5:
        case.data(b"broken")


def interrupted(case):
    """A run in --output-dir that Ctrl-C ended after its first step, with a checkpoint."""
    case.flags |= {"batch_size": 2, "micro_batch_size": 2}
    args = case.args()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = interrupt(SCRIPTS[case.target], args, 1, signal.SIGINT)
    assert code == 130 and (case.output / "state").is_dir(), code
    case.flags["resume"] = True


@kind(TRAINED)
def interrupted_run(case):
    """--resume on data, a model or a folder that has changed since, or the same without --resume."""
    case.flags["output_dir"] = str(case.folder / "run")
    case.write("rows.jsonl", lines_of(case.good()))
    case.flags |= dict.fromkeys(["dataset", "eval_dataset"], str(case.folder / "rows.jsonl"))
    model = case.model()
    case.flags["model"] = str(model)
    interrupted(case)
    rows = case.folder / "rows.jsonl"
    which = case.pick(["no --resume", "broken rows", "other order", "fewer rows", "other texts", "no file",
                       "other weights", "no model", "seed"])
    case.wanted = "refused"
    lines = rows.read_bytes().splitlines(keepends=True)
    if which == "no --resume":
        case.flags["resume"] = False
    elif which == "broken rows":
        rows.write_bytes(b"broken")
    elif which == "other order":
        rows.write_bytes(b"".join(lines[::-1]))
    elif which == "fewer rows":
        rows.write_bytes(b"".join(lines[:3]))
    elif which == "other texts":
        rows.write_bytes(b"".join(lines).replace(b"the", b"one"))
    elif which == "no file":
        rows.unlink()
    elif which == "other weights":
        shutil.copy(case.world.folder / "start" / "model.safetensors", model)
    elif which == "no model":
        shutil.rmtree(model)
    else:
        case.flags["seed"] = 7


@kind(TRAINED)
def broken_checkpoint(case):
    """--resume where the run folder itself is broken: refused, or resumed, and never a pickle opened."""
    rng = case.rng
    case.flags["output_dir"] = str(case.folder / "run")
    interrupted(case)
    file = max((case.output / "state").iterdir(), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    which = case.pick(["cut", "empty", "noise", "flip", "pickle", "foreign", "no checkpoint", "no metrics",
                       "empty metrics", "no samples", "broken metrics", "list"])
    if which == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif which in ("empty", "noise"):
        file.write_bytes(b"" if which == "empty" else rng.randbytes(500))
    elif which == "flip":
        k = rng.randrange(len(content))
        file.write_bytes(content[:k] + bytes([content[k] ^ 32]) + content[k + 1 :])
    elif which == "pickle":
        case.absent = [case.folder / "executed"]
        file.write_bytes(f"cos\nsystem\n(S'touch {case.absent[0]}'\ntR.".encode())
    elif which == "foreign":
        torch.save({"model": {"x": torch.zeros(2)}, "step": 5}, file)
    elif which == "list":
        torch.save([1, 2], file)
    elif which == "no checkpoint":
        file.unlink()
    elif which == "no samples":
        (case.output / "samples.jsonl").unlink()
    elif which == "broken metrics":
        (case.output / "metrics.jsonl").write_text("broken")
    elif which == "no metrics":
        (case.output / "metrics.jsonl").unlink()
    else:
        (case.output / "metrics.jsonl").write_bytes(b"")
    if which in ("cut", "empty", "noise", "pickle", "foreign", "no checkpoint", "list"):
        case.wanted = "refused"


@kind("score")
def earlier_scores(case):
    """FILE.scores.jsonl of an earlier run stays, if this one is refused."""
    earlier = case.write("rows.scores.jsonl", '{"mine": 1}\n')
    case.data(case.spoil(case.good(), lambda row: case.pick(["broken", {"prompt": 5}, {**row, "completion": None}])))
    case.wanted = "refused"
    assert Path(earlier).exists()
