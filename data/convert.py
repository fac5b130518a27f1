"""Rows of well-known public data sets, in the columns that the scripts read:

    python data/convert.py rows.jsonl > converted.jsonl      (.json, .parquet and Hub ids as well)

    data set as published       its columns                                    what a row becomes
    GSM8K                       question, answer                               prompt, completion (and answer)
    Alpaca                      instruction, input, output                     prompt, completion
    ShareGPT                    conversations of from and value                messages of role and content
    LLMBar                      input, output_1, output_2, label (1 or 2)      prompt, chosen, rejected
    JudgeBench                  question, response_A, response_B, label        prompt, chosen, rejected, mu
    RM-Bench                    prompt, chosen and rejected, lists of texts    a pair for each of both
    HelpSteer2 preferences      prompt, response_1, response_2,                prompt, chosen, rejected, mu
                                preference_strength (below 0: the first)
    SHP                         history, human_ref_A, human_ref_B, labels      prompt, chosen, rejected
    UltraFeedback               instruction, completions with overall_score    prompt, completions, ranking
    KTO                         prompt, completion, label                      prompt, completion, if true
    LMSYS arena, Kaggle         model_a, model_b, winner_model_a, _b, _tie     item_a, item_b, outcome

Columns that are not named here stay as they are. A row of no known layout ends it, naming file and line.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import blame, fail, read_rows  # noqa: E402

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def pair(row, prompt, first, second, mu):
    """Two answers, of which the first is the better one with probability mu."""
    prompt, first, second = row.pop(prompt), row.pop(first), row.pop(second)
    if mu < 0.5:
        first, second, mu = second, first, 1 - mu
    return [{**row, "prompt": prompt, "chosen": first, "rejected": second, "mu": mu}]


def gsm8k(row):
    prompt = row.pop("question")
    return [{**row, "prompt": prompt, "completion": row["answer"]}]


def alpaca(row):
    parts = [row.pop("instruction"), row.pop("input", "")]
    prompt = "".join(part + "\n\n" for part in parts if part)
    completion = row.pop("output")
    return [{**row, "prompt": prompt, "completion": completion}]


def sharegpt(row):
    messages = []
    for turn in row.pop("conversations"):
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]})
    return [{**row, "messages": messages}]


def llmbar(row):
    mu = {1: 1.0, 2: 0.0}[int(row.pop("label"))]
    return pair(row, "input", "output_1", "output_2", mu)


def judgebench(row):
    mu = {"A>B": 1.0, "B>A": 0.0, "A=B": 0.5}[row.pop("label")]
    return pair(row, "question", "response_A", "response_B", mu)


def rm_bench(row):
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    if isinstance(chosen, str):
        raise TypeError("chosen is text: such rows need no conversion")
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
    return [row] if row.pop("label") else []


def arena(row):
    won = [row.pop(f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    outcome = ("a", "b", "tie")[won.index(1)]
    item_a, item_b = row.pop("model_a"), row.pop("model_b")
    return [{**row, "item_a": item_a, "item_b": item_b, "outcome": outcome}]


LAYOUTS = {  # columns -> what makes rows of ours
    "conversations": sharegpt,
    "instruction completions": ultrafeedback,
    "instruction output": alpaca,
    "question response_A response_B label": judgebench,
    "question answer": gsm8k,
    "input output_1 output_2 label": llmbar,
    "prompt response_1 response_2 preference_strength": helpsteer,
    "history human_ref_A human_ref_B labels": shp,
    "prompt completion label": kto,
    "winner_model_a winner_model_b": arena,
    "prompt chosen rejected": rm_bench,
}


def convert(row):
    """Rows of ours, in a list, that say what this row of a known layout says."""
    where = row.pop("_where", "row")
    for columns, make in LAYOUTS.items():
        if row.keys() >= set(columns.split()):
            with blame(f"{where}: has the columns of {make.__name__}, but not its values"):
                return make(row)
    fail(f"{where}: no known layout: {sorted(row)}; those known are in the first lines of {__file__}")


def main():
    if len(sys.argv) != 2:
        fail("expected one file: python data/convert.py rows.jsonl > converted.jsonl")
    for row in read_rows(sys.argv[1]):
        for new in convert(row):
            print(json.dumps(new, default=str))


if __name__ == "__main__":
    main()
