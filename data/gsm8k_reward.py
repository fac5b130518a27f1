"""Two verifiable rewards for GSM8K and other data with a number as the answer, called as TRL calls them:
fn(prompts, completions, answer, **columns) -> list of floats, 1 for right and 0 for wrong. `answer` is a
data column: "18", "$1,234", "\\boxed{18}", or a whole solution that ends with "#### 18". Another reference
than a number alone, as "1/2", is an error. Plain Python, no dependency.

Say which of the two a figure comes from. A published run of Qwen2.5-1.5B-Instruct (github.com/abhishuoza) has
1.7 % by its strict and 38.3 % by its lenient rule before training, 48.7 % and 55.0 % after it: the format is
learned first. The prompt has to ask for "####". Both as one reward, whose pass_at_1 is by the strict one:
    --reward data/gsm8k_reward.py:strict data/gsm8k_reward.py:lenient --reward-weights 1 0.1

Completions are a policy's, which will write whatever pays. So nothing in them is evaluated, only the last
number counts (a list of guesses is one guess), and any string takes time in proportion to its length.
"""

import re
from decimal import Decimal, InvalidOperation

# A minus is a sign unless a word, number or bracket stands right before it: "is -3", but "10-3" ends with 3.
# Nothing has to match behind a repetition, so the search never goes back further than the number it is in.
NUMBER = re.compile(
    r"\$?(?:(?<![\w)-])[-+\u2212])?\$?"  # -3, +3, $5, -$5, $-5
    r"(?:(?:\d{1,3}(?:,\d{3}(?!\d))+|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # 1,234 or 1234, then .50; or .50
    r"(?:[eE][-+]?\d+)?")
PLAIN = str.maketrans({"$": None, ",": None, "\u2212": "-"})  # \u2212 is the typographic minus


def value(number: str | None) -> Decimal | None:
    """What a match of NUMBER is worth, exactly: 3.50 is 3.5, and 1e999999999 is held, not written out."""
    try:
        return Decimal(number.translate(PLAIN)) if number else None
    except InvalidOperation:  # an exponent of twenty digits
        return None


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in the text."""
    return value((NUMBER.findall(text) or [None])[-1])


def number_alone(text: str) -> Decimal | None:
    """The number that is the whole text, but for spaces around it and, right behind it, "%" or "."."""
    text = text.strip().removesuffix(".").removesuffix("%")
    return value(text if NUMBER.fullmatch(text) else None)


def final_answer(text: str) -> Decimal | None:
    """The number behind the last "####", if nothing else follows there."""
    _, marker, rest = text.rpartition("####")
    return number_alone(rest) if marker else None


def reference(answer) -> Decimal | None:
    """The number of the data, which may stand behind "####", between dollars, in a box. There is none in
    "1/2": its last number would pay "2".
    """
    text = str(answer).rpartition("####")[2].strip().removesuffix(".")
    text = text.strip("$")  # LaTeX's, or one of money
    if text.startswith("\\boxed{") and text.endswith("}"):
        text = text[len("\\boxed{") : -1]
    return number_alone(text)


def compare(extract, completions, answers) -> list[float]:
    """1 where the number that `extract` finds equals the reference, 0 where it does not or finds none."""
    texts = [text if isinstance(text, str) else text[-1]["content"] or "" for text in completions]
    right = [reference(answer) for answer in answers]
    if None in right:
        raise ValueError(f"no number in the answer {str(answers[right.index(None)])[:60]!r}, or not it alone")
    return [float(extract(text) == number) for text, number in zip(texts, right, strict=True)]


def strict(prompts: list, completions: list, answer: list, **columns) -> list[float]:
    """1 if the completion ends as the solutions do, "#### 18", and the number is right. What to report."""
    return compare(final_answer, completions, answer)


def lenient(prompts: list, completions: list, answer: list, **columns) -> list[float]:
    """1 if the last number is right, in whatever format. It forgives a missing "####", and is wrong about
    "It is 18, which took 2 steps." and about "3/4", which it takes for 4."""
    return compare(last_number, completions, answer)
