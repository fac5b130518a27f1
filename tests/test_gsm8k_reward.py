"""The verifiable rewards of data/gsm8k_reward.py: a table of what a policy writes, numbers in every spelling
against the numbers that they were made from, strings made to take long, and the real data's own solutions.
"""

import ast
import fractions
import inspect
import json
import math
import random
import re
import shutil
import sys
import time

import gsm8k_reward as gsm8k
import pytest
import transformers

import grpo

# text, answer, strict, lenient
TABLE = [
    ("answer is -3", "-3", 0, 1),
    ("3", "-3", 0, 0),
    ("-3", "3", 0, 0),
    ("#### -3", "-3", 1, 1),
    ("#### -3", "3", 0, 0),
    ("#### \u22123", "-3", 1, 1),  # the typographic minus
    ("x = -3", "-3", 0, 1),
    ("10-3", "3", 0, 1),  # a difference, not a sign
    ("10-3", "-3", 0, 0),
    ("10 - 3", "3", 0, 1),
    ("(5)-3", "3", 0, 1),
    ("the total--3", "3", 0, 1),
    ("#### --3", "3", 0, 1),
    ("#### - 3", "-3", 0, 0),
    ("#### +3", "3", 1, 1),
    ("#### 1,234", "1234", 1, 1),
    ("#### 1234", "1,234", 1, 1),
    ("#### 1,234,567.50", "1234567.5", 1, 1),
    ("#### 12,34", "1234", 0, 0),
    ("#### 1,2345", "1234", 0, 0),
    ("#### 1,2345", "5", 0, 0),
    ("18, 20, 22", "22", 0, 1),
    ("1,2,3", "3", 0, 1),
    ("1,2,3", "123", 0, 0),
    ("#### 1,2,3", "3", 0, 1),
    ("#### $5", "5", 1, 1),
    ("#### -$5", "-5", 1, 1),
    ("#### $-5", "-5", 1, 1),
    ("#### $$5", "5", 1, 1),
    ("#### $5-$3", "3", 0, 1),
    ("#### $1,234.00", "1234", 1, 1),
    ("#### 3.50", "3.5", 1, 1),
    ("#### 3.5", "3.50", 1, 1),
    ("#### 3.05", "3.5", 0, 0),
    ("#### 18.0", "18", 1, 1),
    ("#### 018", "18", 1, 1),
    ("#### .5", "0.5", 1, 1),
    ("#### $.5", "0.5", 1, 1),
    ("#### .5", "5", 0, 0),
    ("it makes ...5", "5", 0, 1),
    ("#### 0.30000000000000004", "0.3", 0, 0),  # exact, unlike floats
    ("#### 9007199254740993", "9007199254740992", 0, 0),
    ("#### 18.", "18", 1, 1),
    ("#### 18. ", "18", 1, 1),
    ("#### 18..", "18", 0, 1),
    ("#### 50%", "50", 1, 1),
    ("#### 50%.", "50", 1, 1),
    ("#### 50%%", "50", 0, 1),
    ("#### 1e3", "1000", 1, 1),
    ("#### 1e3", "3", 0, 0),
    ("#### 1E-1", "0.1", 1, 1),
    ("#### 1e999999999", "18", 0, 0),
    ("#### -1e999999999", "18", 0, 0),
    ("#### 1e-999999999", "0", 0, 0),
    ("#### 1e" + "9" * 30, "18", 0, 0),
    ("#### 18e" + "9" * 30, "18", 0, 0),
    ("no number", "18", 0, 0),
    ("#### eighteen", "18", 0, 0),
    ("", "18", 0, 0),
    (" \n", "0", 0, 0),
    ("####", "0", 0, 0),
    ("#### ", "18", 0, 0),
    ("18 ####", "18", 0, 1),
    ("18", "18", 0, 1),  # right, without the marker
    ("So it is 18.", "18", 0, 1),
    ("\\boxed{18}", "18", 0, 1),
    ("**18**", "18", 0, 1),
    ("#### **18**", "18", 0, 1),
    ("The answer is 3/4", "3", 0, 0),
    ("####18", "18", 1, 1),
    ("####\n18\n", "18", 1, 1),
    ("### 18", "18", 0, 1),
    ("##### 18", "18", 1, 1),
    ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "18", 1, 1),
    ("#### 18 dollars", "18", 0, 1),
    ("#### about 18", "18", 0, 1),
    ("#### 18\nThat took 2 steps", "18", 0, 0),
    ("#### 18\nThat took 2 steps", "2", 0, 1),
    ("#### 18 #### 19", "18", 0, 0),
    ("#### 18 #### 19", "19", 1, 1),
    ("#### 17 18 19", "18", 0, 0),  # a list of guesses is one guess
    ("#### 17 18 19", "19", 0, 1),
    ("#### 44**19**7", "7", 0, 1),  # not a power of powers
    ("44**19**7", "44", 0, 0),
    ("#### 2*9", "18", 0, 0),
    ("#### 0x12", "18", 0, 0),
    ("#### 1_8", "18", 0, 0),
    ("#### __import__('os').getpid()", "18", 0, 0),
    ("#### nan", "18", 0, 0),
    ("#### inf", "18", 0, 0),
    ("#### \u0661\u0668", "18", 1, 1),  # the Arabic digits
    ("#### \uff11\uff18", "18", 1, 1),  # the full-width digits
    ("#### \u2468", "9", 0, 0),  # a circled 9 is no digit
    ("3\u00b2", "3", 0, 1),  # nor is the exponent of a square
    ("#### 18\x00", "18", 0, 1),
    ("\ud800 18", "18", 0, 1),  # half of a pair of surrogates
    ("#### 18", "She has 9.\n#### 18", 1, 1),  # GSM8K's own column
    ("#### 9", "She has 9.\n#### 18", 0, 0),
    ("#### 18", 18, 1, 1),
    ("#### 3.5", 3.5, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("text, answer, strict, lenient", TABLE)
def test_what_counts(text, answer, strict, lenient):
    assert gsm8k.strict(prompts=["?"], completions=[text], answer=[answer]) == [strict]
    assert gsm8k.lenient(prompts=["?"], completions=[text], answer=[answer]) == [lenient]


def test_a_batch_of_texts_and_messages():
    """In order, each with its own answer; as TRL passes them, with columns that nothing here reads."""
    texts, answers = ["#### 1", "2", "#### 9", "#### 4"], ["1", "2", "3", "4"]
    columns = {"answer": answers, "completion_ids": [[5]] * 4, "trainer_state": None}
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        prompts = [[{"role": "user", "content": "?"}]] * 4
        assert gsm8k.strict(prompts, completions, **columns) == [1, 0, 0, 1]
        assert gsm8k.lenient(prompts, completions, **columns) == [1, 1, 0, 1]
        assert all(type(x) is float for x in gsm8k.lenient(prompts, completions, **columns))
    turns = [{"role": "assistant", "content": "#### 1"}, {"role": "tool", "content": "#### 7"}]
    for last, score in (("#### 2", 1), ("", 0), (None, 0)):
        completion = [*turns, {"role": "assistant", "content": last}]
        assert gsm8k.strict(["?"], [completion], ["2"]) == gsm8k.lenient(["?"], [completion], ["2"]) == [score]


def test_a_reference_without_a_number_is_an_error():
    """It would be wrong for every completion, and nobody would see why."""
    for answer in ("", "eighteen", None, "18 is\n#### it"):
        with pytest.raises(ValueError, match=r"no number in the answer"):
            gsm8k.strict(["?", "?"], ["#### 18", "#### 18"], ["18", answer])
    with pytest.raises(ValueError):
        gsm8k.lenient(["?", "?"], ["18", "18"], ["18"])


@pytest.mark.parametrize("answer, number", [
    ("$18", 18), ("1,234", 1234), ("\\boxed{12}", 12), ("$\\boxed{1,200}$", 1200), ("$12$", 12), ("-3", -3),
    ("-$5", -5), ("She has 9.\n#### $1,234", 1234), ("50%", 50), (" 18.\n", 18), ("\\boxed{18}.", 18), (3.5, 3.5),
    ("So 2\n#### \\boxed{7}", 7), ("1/2", None), ("\\frac{3}{4}", None), ("2\\sqrt{3}", None), ("3 or 4", None),
    ("18 dollars", None), ("x = 3", None), ("\\boxed{1/2}", None), ("\\boxed{12", None), ("12}", None), ("(1, 2)", None),
    ("1:2", None), ("10-3", None), ("3^2", None), ("$5-$3", None), ("Step 1\n#### 1/2", None), ([1, 2], None),
])  # fmt: skip
def test_a_reference_is_one_number_or_an_error(answer, number):
    """Of "1/2" the last number would pay "#### 2", and the right answer nothing."""
    for reward in (gsm8k.strict, gsm8k.lenient):
        if number is None:
            with pytest.raises(ValueError, match="no number in the answer"):
                reward(["?"], ["#### 2"], [answer])
        else:
            assert reward(["?"] * 2, [f"#### {number}", f"#### {number}1"], [answer] * 2) == [1.0, 0.0]


def test_every_spelling_of_a_number_is_that_number():
    """Against exact fractions: what a number is written from is what it is read as, and nothing else is."""
    draw = random.Random(0)
    for _ in range(2000):
        places, digits = draw.choice([0, 0, 1, 2, 5]), draw.randint(1, 12)
        scaled = draw.randint(-(10**digits), 10**digits)
        exact = fractions.Fraction(scaled, 10**places)
        whole, cents = divmod(abs(scaled), 10**places)
        written = draw.choice([f"{whole}", f"{whole:,}"])
        if places or draw.random() < 0.2:
            written += f".{cents:0{places}d}" + "0" * draw.randint(0, 3) if places else ".00"
        sign = "-" if scaled < 0 else draw.choice(["", "", "+"])
        written = draw.choice([f"{sign}{written}", f"{sign}${written}", f"{sign}{written}%", f"{sign}{written}."])
        text = draw.choice(["", "first 7, then 8\n"]) + "#### " + written + draw.choice(["", "\n", "  "])
        assert fractions.Fraction(gsm8k.final_answer(text)) == exact, text
        assert fractions.Fraction(gsm8k.last_number(text)) == exact, text
        plain = f"{'-' if scaled < 0 else ''}{whole}.{cents:0{places}d}" if places else str(scaled)
        off = str(int(scaled) + draw.choice([-1, 1])) if not places else plain + "1"
        for answer, score in ((plain, 1), (f"so\n#### {plain}", 1), (off, 0)):
            assert gsm8k.strict(["?"], [text], [answer]) == gsm8k.lenient(["?"], [text], [answer]) == [score]


def test_every_digit_of_unicode_can_be_read():
    digits = [c for c in map(chr, range(sys.maxunicode + 1)) if re.match(r"\d", c)]
    assert len(digits) > 600 and {gsm8k.last_number(c) for c in digits} == set(range(10))
    random.Random(0).shuffle(digits)  # of different scripts in one number, which Decimal reads as well
    assert gsm8k.last_number("".join(digits)) is not None


UNITS = ["1,", "1,1", "111,", "-", "-1", "--1", "$", "-$", "$-", "$-$", "1", "1.", ".", ".1", "1.1.", "e", "1e",
         "1e-", "1e1e", "1 ", " ", "\n", "#", "####", "#### 1", "#### 1 ", "+", "%", "%.", "\u0663", "\u2212",
         "1_", "1*", "**1", "(1)-", "a1"]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_long_texts_take_no_time(unit):
    """Of a repeated unit behind the marker, with an end that does not fit; and a fifth of that by itself, and
    before and behind a number. A quadratic search would take minutes.
    """
    body = (unit * 200_000)[:200_000]
    for text in ("####" + body + "x", *(x.format(body[:40_000]) for x in ("{}", "#### 1{}", "####{}1%."))):
        for reward in (gsm8k.strict, gsm8k.lenient):
            start = time.process_time()
            assert reward(["?"], [text], ["18"]) == [0.0]
            assert time.process_time() - start < 2


def test_a_number_of_200_000_digits_is_compared_exactly():
    ones = "1" * 200_000
    start = time.process_time()
    for text, score in ((ones, 1), (ones + "1", 0), (ones[:-1] + "2", 0), (ones + ".0", 1), (ones + "e0", 1)):
        assert gsm8k.strict(["?"], ["#### " + text], [ones]) == gsm8k.lenient(["?"], [text], [ones]) == [score]
    parts = ["1" * 333_333 for _ in range(3)]
    assert gsm8k.strict(["?"], ["#### {}.{}e{}x".format(*parts)], [ones]) == [0.0]
    assert gsm8k.lenient(["?"], ["10e999999998"], ["1e999999999"]) == [1.0]
    assert time.process_time() - start < 2


def test_random_strings_end_in_a_score():
    draw = random.Random(1)
    alphabet = "0123456789" + "#$%.,-+eE*_/()\\{}= \n\u2212\u0663x"
    for _ in range(5000):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 40)))
        strict, lenient = (reward(["?"], [text], ["3"])[0] for reward in (gsm8k.strict, gsm8k.lenient))
        assert strict in (0.0, 1.0) and lenient in (0.0, 1.0)
        assert strict <= lenient, text  # a right answer in the right format is the last number


def test_nothing_is_evaluated():
    tree = ast.parse(inspect.getsource(gsm8k))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"eval", "exec", "__import__", "literal_eval", "getattr", "globals", "open", "system"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "compile" not in calls and "re.compile" in calls
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"re", "decimal"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_real_solutions_are_right(shared, split):
    """GSM8K's own solutions earn 1 by both rules, from the short column and from the solution as the column."""
    file = shared / "data" / f"gsm8k.{split}.jsonl"
    if not file.exists():
        pytest.skip(f"GSM8K is not at {file}")
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    prompts, solutions, short = ([row[key] for row in rows] for key in ("prompt", "solution", "answer"))
    assert len(rows) > 1000
    for reward in (gsm8k.strict, gsm8k.lenient):
        for answer in (short, solutions):
            assert set(reward(prompts, solutions, answer)) == {1.0}
            assert set(reward(prompts, [f"#### {number}." for number in short], answer)) == {1.0}
            assert set(reward(prompts, [f"#### {number}1" for number in short], answer)) == {0.0}
    unmarked = [solution.replace("#### ", "It is ") for solution in solutions]
    assert set(gsm8k.strict(prompts, unmarked, short)) == {0.0}
    assert set(gsm8k.lenient(prompts, unmarked, short)) == {1.0}


def test_grpo_runs_on_it(shared, tmp_path, no_pictures):
    """Two updates of a random small Qwen2 with its real tokenizer, by both rules, on texts and on messages."""
    folder = shutil.copytree(shared / "models" / "qwen2.5-tokenizer", tmp_path / "model")
    transformers.Qwen2Config(
        vocab_size=151_936, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True).save_pretrained(folder)  # fmt: skip
    rows = [json.loads(line) for line in open(shared / "data" / "gsm8k.train.jsonl", encoding="utf-8")][:6]
    for row in rows[::2]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    files = [tmp_path / name for name in ("rows.jsonl", "rows_test.jsonl")]
    for file, part in zip(files, (rows[:4], rows[4:])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    reward = tuple(f"{gsm8k.__file__}:{rule}" for rule in ("strict", "lenient"))
    metrics = grpo.main(grpo.Args(
        model=str(folder), dataset=str(files[0]), reward=reward, reward_weights=(1.0, 0.1), num_generations=2,
        batch_size=4, total_episodes=8, max_new_tokens=4, eval_samples=4, output_dir=str(tmp_path / "run"), device="cpu"))
    assert metrics["eval/reward"] == pytest.approx(sum(w * metrics["eval/rewards/" + "/".join(x.split("/")[-2:])] for w, x in zip((1, 0.1), reward)))
    assert 0 <= metrics["eval/pass_at_1"] <= metrics["eval/pass_at_2"] <= 1 and metrics["policy/logprob_gap"] < 1e-3
    assert metrics["num_tokens"] <= 32 and math.isfinite(metrics["loss"] + metrics["grad_norm"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.model_type == "qwen2" and len(loaded.get_input_embeddings().weight) == 151_936
