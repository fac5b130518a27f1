"""What reaches training and rewards from files, Hub ids and templates, seen from outside: by what main() reads,
trains on and writes.
"""

import json
import sys
import types

import pytest
import torch
import transformers
from rl import rows_of
from tiny_runs import SAMPLERS, Killed, copy_model, kill, read, scripts, write

import common

# ---- Hub ids and .parquet files ----


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: hub[path, split] -> rows, of what was asked for."""
    rows, package = {}, types.ModuleType("datasets")

    def load_dataset(path, name=None, *, data_files=None, split):
        return rows[data_files or path, split]

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return rows


@scripts("sft")
@pytest.mark.parametrize("held_out", ["owner/rows", "owner/others"])
def test_held_out_rows_of_a_hub_id_are_its_test_split(script, hub, go, capsys, held_out):
    """And training rows the train split, of the same id or of another one."""
    hub[held_out, "train"] = hub["owner/rows", "test"] = script.rows(20, 27)
    hub["owner/rows", "train"], hub[held_out, "test"] = script.rows(0, 10), script.rows(0, 4, "_test")
    run = go("run", dataset="owner/rows", eval_dataset=held_out)
    assert "10 rows, 4 held out" in capsys.readouterr().out
    shown = [row["prompt"] for row in read(run / "samples.jsonl")][:4]
    assert shown == [row["prompt"] for row in hub[held_out, "test"]]


@scripts("sft")
def test_a_parquet_file_has_one_split(script, hub, go, capsys, tmp_path):
    """As a held-out file too: all its rows."""
    for name, rows in (("a.parquet", script.rows(0, 10)), ("b.parquet", script.rows(0, 4, "_test"))):
        (tmp_path / name).touch()
        hub[str(tmp_path / name), "train"] = rows
    go("run", dataset=str(tmp_path / "a.parquet"), eval_dataset=str(tmp_path / "b.parquet"))
    assert "10 rows, 4 held out" in capsys.readouterr().out


# ---- Chats whose turns end with another EOS than texts do ----

TURN = "1"  # a word of the vocabulary, and an EOS by the configuration; texts end with <eos>
TURNS = (
    "{% for m in messages %}{{ ' review' if m.role == 'assistant' }}{{ m.content }}1{% endfor %}"
    "{{ ' review' if add_generation_prompt }}"
)


@pytest.fixture
def chats(starts, tmp_path):
    """chats(run) -> a copy of that start whose assistant ends with TURN."""

    def make(run):
        config = json.loads((starts / run / "model" / "config.json").read_text())
        tokenizer = transformers.AutoTokenizer.from_pretrained(starts / run / "model")
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN)]
        files = {"config__json": json.dumps({**config, "eos_token_id": ends}).encode()}
        if run.startswith("run"):
            files["generation_config__json"] = json.dumps({"eos_token_id": ends}).encode()
        return str(copy_model(starts, tmp_path / f"chat {run}", run=run, chat_template__jinja=TURNS.encode(), **files))

    return make


@scripts(*SAMPLERS)
def test_a_conversation_is_scored_at_the_end_of_its_last_turn(script, go, chats, tmp_path, monkeypatch):
    """As transformers scores what the template writes of it, whether the response was cut, ended by TURN or by <eos>.
    (Left out: responses whose text has other tokens than were drawn.)
    """
    drawn, sample = [], common.sample

    def record(*inputs, **options):
        drawn.append(sample(*inputs, **options))
        return drawn[-1]

    monkeypatch.setattr(common, "sample", record)
    talks = [[{"role": "user", "content": "what about the hero ?" + " very" * (i % 4)}] for i in range(12)]
    path, reward = write(tmp_path / "asked.jsonl", [{"prompt": talk} for talk in talks]), chats("reward1")
    run = go("run", model=chats("run1"), **script.flag("reward", reward), dataset=path, eval_dataset=path,
             eval_samples=12, max_new_tokens=4, missing_eos_penalty=0.0, seed=2, **script.one_step)  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward)
    drawn = next(rows for rows in map(rows_of, drawn) if len(rows) == 12)
    lengths = []
    for talk, (prompt, response), row in zip(talks, drawn, read(run / "samples.jsonl")):
        body = response[:-1] if response[-1] in model.config.eos_token_id else response
        said = {"role": "assistant", "content": tokenizer.decode(body)}
        ids = tokenizer.apply_chat_template([*talk, said])["input_ids"]
        if ids == [*prompt, *body, *tokenizer(TURN)["input_ids"]]:
            with torch.no_grad():
                score = model(input_ids=torch.tensor([ids])).logits.item() - model.config.reward_mean
            assert row[script.score_column] == pytest.approx(score, abs=1e-5)
            lengths.append(len(body))
    assert len(lengths) >= 6 and min(lengths) < 4  # one ended at least


HINT = ": unknown, or near chance. Make sure your reward model works first!"


@scripts("ppo")
@pytest.mark.parametrize("accuracy, words", [
    (0.9, "0.900"), (0.601, "0.601"), (0.6, "0.600" + HINT), (0.2, "0.200" + HINT), (None, "nan" + HINT)])
def test_a_reward_model_near_chance_is_said(script, go, starts, tmp_path, monkeypatch, capsys, accuracy, words):
    """What its config.json holds of its own evaluation, where it does."""
    config = json.loads((starts / "reward1" / "model" / "config.json").read_text())
    del config["held_out_accuracy"]
    if accuracy is not None:
        config["held_out_accuracy"] = accuracy
    reward = copy_model(starts, tmp_path / "reward", run="reward1", config__json=json.dumps(config).encode())
    monkeypatch.setattr(script.module, "rollout", lambda *_: kill())  # all that this test is about is printed before
    with pytest.raises(Killed):
        go("run", reward=(str(reward),))
    assert f"the reward model's held-out accuracy is {words}\n" in capsys.readouterr().out


@scripts("sft")
@pytest.mark.parametrize("max_length", [10, 13, 20])
def test_a_cut_conversation_ends_as_its_turns_do(script, go, chats, tmp_path, monkeypatch, max_length):
    """Or without an end: what is trained is what the template writes, up to where it was cut, and never the <eos>
    that ends texts.
    """
    seen, collate = [], script.module.collate

    def record(rows, *inputs):
        seen.extend(rows)
        return collate(rows, *inputs)

    monkeypatch.setattr(script.module, "collate", record)
    model = chats("run1")
    texts = [" what about the hero ?", " the hero was good .", " very good ?", " very very good ."]
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]
    path = write(tmp_path / "talk.jsonl", [{"messages": talk}, {"messages": talk[:2]}])
    go("run", model=model, dataset=path, eval_dataset=path, max_length=max_length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    whole = tokenizer.apply_chat_template(talk)["input_ids"]
    end = whole[-1]
    assert tokenizer.decode([end]) == TURN and len(whole) == 23
    for ids, trained in seen:
        assert ids == whole[: len(ids)] or ids == [*whole[: len(ids) - 1], end]
        assert len(ids) <= max_length and any(trained)
