"""data/convert.py: rows as their authors publish them, written here from the data sets' own descriptions, become
rows that the scripts read, by the values in them.
"""

import json
import runpy
import sys

import pytest
from conftest import ROOT
from convert import LAYOUTS, convert
from tiny_runs import write



def said(role, content):
    return {"role": role, "content": content}


TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TALK_OF_OURS = [said("user", "hi"), said("assistant", "hello")]
SYSTEM = said("system", "s")
CASES = [
    ({"question": "1+1?", "answer": "#### 2"}, [{"prompt": "1+1?", "completion": "#### 2", "answer": "#### 2"}]),
    ({"instruction": "add", "input": "1 1", "output": "2"}, [{"prompt": "add\n\n1 1\n\n", "completion": "2"}]),
    ({"instruction": "greet", "input": "", "output": "hi"}, [{"prompt": "greet\n\n", "completion": "hi"}]),
    ({"instruction": "greet", "output": "hi", "id": 3}, [{"prompt": "greet\n\n", "completion": "hi", "id": 3}]),
    ({"conversations": TALK},
     [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]),
    ({"input": "q", "output_1": "x", "output_2": "y", "label": 2},
     [{"prompt": "q", "chosen": "y", "rejected": "x", "mu": 1.0}]),
    ({"input": "q", "output_1": "x", "output_2": "y", "label": 1},
     [{"prompt": "q", "chosen": "x", "rejected": "y", "mu": 1.0}]),
    ({"question": "q", "response_A": "x", "response_B": "y", "label": "B>A"},
     [{"prompt": "q", "chosen": "y", "rejected": "x", "mu": 1.0}]),
    ({"question": "q", "response_A": "x", "response_B": "y", "label": "A=B"},
     [{"prompt": "q", "chosen": "x", "rejected": "y", "mu": 0.5}]),
    ({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]},
     [{"prompt": "q", "chosen": "a", "rejected": "c"}, {"prompt": "q", "chosen": "b", "rejected": "c"}]),
    ({"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": -2},
     [{"prompt": "q", "chosen": "x", "rejected": "y", "mu": 1.0}]),
    ({"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 1},
     [{"prompt": "q", "chosen": "y", "rejected": "x", "mu": 1.0}]),
    ({"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 0},
     [{"prompt": "q", "chosen": "x", "rejected": "y", "mu": 0.5}]),
    ({"history": "q", "human_ref_A": "x", "human_ref_B": "y", "labels": 0},
     [{"prompt": "q", "chosen": "y", "rejected": "x", "mu": 1.0}]),
    ({"instruction": "q", "completions": [{"response": r, "overall_score": s} for r, s in zip("abc", (3, 5, 3))]},
     [{"prompt": "q", "completions": ["a", "b", "c"], "ranking": [2, 1, 2]}]),
    ({"prompt": "q", "completion": "a", "label": True}, [{"prompt": "q", "completion": "a"}]),
    ({"prompt": "q", "completion": "a", "label": False}, []),
    ({"prompt": "q", "completion": "a", "label": 1}, [{"prompt": "q", "completion": "a"}]),
    ({"prompt": "q", "completion": "a", "label": 0}, []),
    ({"prompt": "q", "completion": "a", "label": -1}, []),
    ({"prompt": "q", "completion": "a", "label": "False"}, []),
    ({"prompt": "q", "completion": "a", "label": "True"}, [{"prompt": "q", "completion": "a"}]),
    ({"instruction": "greet", "input": "", "output": "hi", "system": "s", "history": []},
     [{"prompt": [SYSTEM, said("user", "greet\n\n")], "completion": [said("assistant", "hi")], "history": []}]),
    ({"instruction": "greet", "output": "hi", "system": ""}, [{"prompt": "greet\n\n", "completion": "hi", "system": ""}]),
    ({"conversations": TALK, "system": "s"}, [{"messages": [SYSTEM, *TALK_OF_OURS]}]),
    ({"conversations": TALK, "system_prompt": "s"}, [{"messages": [SYSTEM, *TALK_OF_OURS]}]),
    ({"conversations": [{"from": "system", "value": "s"}, *TALK], "system_prompt": None},
     [{"messages": [SYSTEM, *TALK_OF_OURS], "system_prompt": None}]),
    ({"conversations": TALK_OF_OURS}, [{"messages": TALK_OF_OURS}]),
    ({"conversations": ["hi", "hello", "bye"], "source": "x"},
     [{"messages": [*TALK_OF_OURS, said("user", "bye")], "source": "x"}]),
    ({"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "no"}},
     [{"prompt": TALK_OF_OURS[:1], "chosen": TALK_OF_OURS[1:], "rejected": [said("assistant", "no")]}]),
    ({"system": "s", "question": "q", "chosen": "x", "rejected": "y"},
     [{"prompt": [SYSTEM, said("user", "q")], "chosen": [said("assistant", "x")], "rejected": [said("assistant", "y")]}]),
    ({"input": "q", "chosen": "x", "rejected": "y"}, [{"prompt": "q", "chosen": "x", "rejected": "y"}]),
    ({"system": None, "question": "q", "chosen": "x", "rejected": "y"},
     [{"system": None, "prompt": "q", "chosen": "x", "rejected": "y"}]),
    ({"question": "1+1?", "answer": "#### 2", "context": []},
     [{"prompt": "1+1?", "completion": "#### 2", "answer": "#### 2", "context": []}]),
    ({"model_a": "x", "model_b": "y", "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
     [{"item_a": "x", "item_b": "y", "outcome": "tie"}]),
    ({"model_a": "x", "model_b": "y", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
     [{"item_a": "x", "item_b": "y", "outcome": "a"}]),
]


@pytest.mark.parametrize("row, want", CASES, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_rows_as_published(row, want):
    assert convert(dict(row)) == want


def test_every_layout_has_a_case():
    for columns in LAYOUTS:
        assert any(row.keys() >= set(columns.split()) for row, _ in CASES), columns


@pytest.mark.parametrize("row, words", [
    ({"prompt": "q", "colour": "red"}, ["no known layout", "colour"]),
    ({"input": "q", "output_1": "x", "output_2": "y", "label": 3}, ["llmbar"]),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["no conversion"]),
    ({"conversations": [{"text": "hi"}]}, ["sharegpt", "['text']", "from and value, or role and content"]),
    ({"conversations": [{"from": "human"}]}, ["sharegpt", "value"]),
    ({"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"}, ["needs no conversion"]),
    ({"prompt": "q", "chosen": TALK_OF_OURS, "rejected": TALK_OF_OURS}, ["no conversion"]),
    ({"prompt": "q", "completion": "a", "source": "x"}, ["needs no conversion"]),
    ({"messages": TALK_OF_OURS}, ["needs no conversion"]),
    ({"messages": TALK_OF_OURS, "system": "s"}, ["['system']", "left out"]),
    ({"question": "q", "answer": {"value": "x"}}, ["gsm8k", "no text"]),  # TriviaQA
    ({"prompt": "q", "completion": "a", "label": "maybe"}, ["kto", "maybe"]),
    ({"prompt": "q", "completion": "a", "label": None}, ["kto", "none"]),
    ({"question": "2+2?", "options": ["3", "4"], "answer": "B", "answer_index": 1}, ["['options']", "left out"]),  # MMLU-Pro
    ({"article": "Long.", "question": "Who?", "options": ["x", "y"], "answer": "A"}, ["['article', 'options']"]),  # RACE
    ({"question": "2+2?", "choices": ["3", "4"], "answer": "1"}, ["['choices']"]),  # MMLU
    ({"question": "q", "answer": "yes", "context": {"title": ["a"]}}, ["['context']"]),  # HotpotQA
    ({"question": "q", "passage": "text", "answer": "yes"}, ["['passage']"]),  # BoolQ
    ({"question": "q", "answer": "a", "system": "s"}, ["['system']"]),
    ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, ["['history']"]),  # LLaMA-Factory
    ({"conversations": [{"from": "system", "value": "t"}, *TALK], "system": "s"}, ["['system']"]),
])
def test_a_row_of_no_known_layout_is_refused(capsys, row, words):
    with pytest.raises(SystemExit) as stop:
        convert({**row, "_where": "rows.jsonl:7"})
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: rows.jsonl:7: ") and line.count("\n") == 1
    assert all(word in line for word in words), line


def test_the_command(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "published.jsonl", [row for row, _ in CASES[:5]])
    monkeypatch.setattr(sys, "argv", ["convert.py", path])
    runpy.run_path(str(ROOT / "data" / "convert.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [new for _, want in CASES[:5] for new in want]
