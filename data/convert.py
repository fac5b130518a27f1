"""Rows of well-known public data sets, in the columns that the scripts read:

    python data/convert.py rows.jsonl > converted.jsonl      (.json, .parquet and Hub ids as well)

    data set as published       its columns                                    what a row becomes
    GSM8K                       question, answer                               prompt, completion (and answer)
    Alpaca                      instruction, input, output                     prompt, completion
    ShareGPT                    conversations of from and value, or role and   messages of role and content
                                content, or of texts by turns (LIMA)
    ShareGPT pairs              the same with chosen, rejected, a turn each    prompt, chosen, rejected
    Orca pairs                  system, question (or input), chosen, rejected  prompt, chosen, rejected
    LLMBar                      input, output_1, output_2, label (1 or 2)      prompt, chosen, rejected
    JudgeBench                  question, response_A, response_B, label        prompt, chosen, rejected, mu
    RM-Bench                    prompt, chosen and rejected, lists of texts    a pair for each of both
    HelpSteer2 preferences      prompt, response_1, response_2,                prompt, chosen, rejected, mu
                                preference_strength (below 0: the first)
    SHP                         history, human_ref_A, human_ref_B, labels      prompt, chosen, rejected
    UltraFeedback               instruction, completions with overall_score    prompt, completions, ranking
    KTO                         prompt, completion, label                      prompt, completion, if true
    LMSYS arena, Kaggle         model_a, model_b, winner_model_a, _b, _tie     item_a, item_b, outcome

A column `system` (or `system_prompt`) of Alpaca, ShareGPT and Orca becomes a message before the others.
Columns that are not named here stay as they are, but nothing reads them: a row with a part of the question in
one, as `options` or `context`, is refused, as is one of no known layout, naming file and line.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import blame, fail, read_rows  # noqa: E402

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
ASKED = "options choices context passage article history system system_prompt".split()  # parts of a question
OURS = "messages", "prompt completion", "chosen rejected", "prompt completions ranking", "item_a item_b"


def message(role, content):
    return {"role": role, "content": content}


def system_of(row):
    """[the message of a column for it], or []."""
    for name in ("system", "system_prompt"):
        if row.get(name):
            return [message("system", row.pop(name))]
    return []


def answered(row, prompt, **answers):
    """A row of this prompt and these answers {column: text}: as messages where there is a system message."""
    system = system_of(row)
    if system:
        prompt = [*system, message("user", prompt)]
        answers = {name: [message("assistant", text)] for name, text in answers.items()}
    return [{**row, "prompt": prompt, **answers}]


def pair(row, prompt, first, second, mu):
    """Two answers, of which the first is the better one with probability mu."""
    prompt, first, second = row.pop(prompt), row.pop(first), row.pop(second)
    if mu < 0.5:
        first, second, mu = second, first, 1 - mu
    return [{**row, "prompt": prompt, "chosen": first, "rejected": second, "mu": mu}]


def gsm8k(row):
    prompt = row.pop("question")
    if not isinstance(row["answer"], str):
        raise TypeError(f"answer is {row['answer']!r}, no text")
    return [{**row, "prompt": prompt, "completion": row["answer"]}]


def alpaca(row):
    parts = [row.pop("instruction"), row.pop("input", "")]
    prompt = "".join(part + "\n\n" for part in parts if part)
    return answered(row, prompt, completion=row.pop("output"))


def orca(row):
    prompt = row.pop("question" if "question" in row else "input")
    return answered(row, prompt, chosen=row.pop("chosen"), rejected=row.pop("rejected"))


def turn_of(turn, number):
    """A message of a turn of a conversation, the first of which is the user's."""
    if isinstance(turn, str):
        return message("assistant" if number % 2 else "user", turn)
    if "from" not in turn and "role" not in turn:
        raise ValueError(f"a turn has {sorted(turn)}: expected from and value, or role and content")
    if "role" in turn:
        return turn
    return message(ROLES.get(turn["from"], turn["from"]), turn["value"])


def sharegpt(row):
    turns = row.pop("conversations")
    messages = [turn_of(turn, number) for number, turn in enumerate(turns)]
    if not messages or messages[0]["role"] != "system":
        messages = system_of(row) + messages
    return [{**row, "messages": messages}]


def sharegpt_pair(row):
    (row,) = sharegpt(row)
    pair = {name: [turn_of(row.pop(name), 1)] for name in ("chosen", "rejected")}
    prompt = row.pop("messages")
    return [{**row, "prompt": prompt, **pair}]


def llmbar(row):
    mu = {1: 1.0, 2: 0.0}[int(row.pop("label"))]
    return pair(row, "input", "output_1", "output_2", mu)


def judgebench(row):
    mu = {"A>B": 1.0, "B>A": 0.0, "A=B": 0.5}[row.pop("label")]
    return pair(row, "question", "response_A", "response_B", mu)


def rm_bench(row):
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    if isinstance(chosen, str) or not isinstance(chosen[0], str):
        raise TypeError("chosen is text, or messages: such rows need no conversion")
    return [{**row, "chosen": good, "rejected": bad} for good in chosen for bad in rejected]


def helpsteer(row):
    strength = row.pop("preference_strength")  # -3 to 3
    mu = 0.5 if strength == 0 else float(strength < 0)
    return pair(row, "prompt", "response_1", "response_2", mu)


def shp(row):
    mu = {1: 1.0, 0: 0.0}[row.pop("labels")]
    return pair(row, "history", "human_ref_A", "human_ref_B", mu)


def ultrafeedback(row):
    answers = row.pop("completions")
    scores = [answer["overall_score"] for answer in answers]
    ranking = [1 + sum(other > score for other in scores) for score in scores]
    texts = [answer["response"] for answer in answers]
    prompt = row.pop("instruction")
    return [{**row, "prompt": prompt, "completions": texts, "ranking": ranking}]


def kto(row):
    label = str(row.pop("label")).lower()
    return {"true": [row], "1": [row], "false": [], "0": [], "-1": []}[label]


def arena(row):
    won = [row.pop(f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    outcome = ("a", "b", "tie")[won.index(1)]
    item_a, item_b = row.pop("model_a"), row.pop("model_b")
    return [{**row, "item_a": item_a, "item_b": item_b, "outcome": outcome}]


LAYOUTS = {  # columns -> what makes rows of ours
    "conversations chosen rejected": sharegpt_pair,
    "conversations": sharegpt,
    "instruction completions": ultrafeedback,
    "instruction output": alpaca,
    "question response_A response_B label": judgebench,
    "question chosen rejected": orca,
    "input chosen rejected": orca,
    "question answer": gsm8k,
    "input output_1 output_2 label": llmbar,
    "prompt response_1 response_2 preference_strength": helpsteer,
    "history human_ref_A human_ref_B labels": shp,
    "prompt completion label": kto,
    "winner_model_a winner_model_b": arena,
    "prompt chosen rejected": rm_bench,
}


def refuse_what_is_left_out(rows, where):
    lost = {name for name in ASKED for row in rows if row.get(name)}
    if lost:
        fail(f"{where}: {sorted(lost)} would be left out: put it into the prompt's text")


def convert(row):
    """Rows of ours, in a list, that say what this row of a known layout says."""
    where = row.pop("_where", "row")
    for columns, make in LAYOUTS.items():
        if row.keys() >= set(columns.split()):
            with blame(f"{where}: has the columns of {make.__name__}, but not its values"):
                rows = make(row)
            refuse_what_is_left_out(rows, where)
            return rows
    if any(row.keys() >= set(columns.split()) for columns in OURS):
        refuse_what_is_left_out([row], where)
        fail(f"{where}: needs no conversion: the scripts read {sorted(row)} as they are")
    fail(f"{where}: no known layout: {sorted(row)}; those known are in the first lines of {__file__}")


def main():
    if len(sys.argv) != 2:
        fail("expected one file: python data/convert.py rows.jsonl > converted.jsonl")
    for row in read_rows(sys.argv[1]):
        for new in convert(row):
            print(json.dumps(new, default=str))


if __name__ == "__main__":
    main()
