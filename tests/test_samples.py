"""What sft.py and dpo.py report beside their losses: which prompts they complete, how the samples are drawn, the
figures about them, and the share of tokens that are the likeliest.
"""

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE
from rl import make_batch, rows_of
from tiny_runs import ASK, REFUSE, REPLY, copy_model, read, scripts, trained_rows, write

import common

ASK_AGAIN = {"role": "user", "content": "my view on the plot :"}
TALK = [ASK, REPLY, ASK_AGAIN]  # two turns, the second of which is to be answered


def first_samples(run) -> list[dict]:
    """Those of the first evaluation."""
    return [row for row in read(run / "samples.jsonl") if row["step"] == 0]


@scripts("sft", "dpo")
def test_the_last_turn_of_a_chat_is_answered(script, go, starts, tmp_path, monkeypatch):
    """Behind everything that was said before it, and behind nothing of the answer that the data has."""
    drawn, sample = [], common.sample

    def record(*inputs, **options):
        drawn.append(sample(*inputs, **options))
        return drawn[-1]

    monkeypatch.setattr(common, "sample", record)
    model = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    rows = {"sft": [{"messages": [*TALK, answer]} for answer in (REPLY, REFUSE)],
            "dpo": [{"prompt": TALK, "chosen": [REPLY], "rejected": [REFUSE]}] * 2}  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows[script.name])
    run = go("run", model=str(model), dataset=path, eval_dataset=path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    first, last = [rows for rows in map(rows_of, drawn) if [ids for ids, _ in rows] == [prompt] * 2]
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert "good" in text and "plot" in text and "bad" not in text
    responses = tokenizer.batch_decode([response for _, response in first], skip_special_tokens=True)
    assert first_samples(run) == [{"step": 0, "prompt": text, "completion": response} for response in responses]


@scripts("sft", "dpo")
def test_samples_are_drawn_from_the_model_itself(script, go, starts):
    """At temperature 1, with the noise of --seed: row by row what `sample` draws from the start."""
    model = transformers.AutoModelForCausalLM.from_pretrained(starts / "run1" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(starts / "run1" / "model")
    texts = [row["prompt"] for row in read(starts / f"{script.name}_held_out.jsonl")]
    prompts = tokenizer(texts)["input_ids"]
    shown = {}
    for seed in (3, 4):
        want = common.sample(model, prompts, 8, [tokenizer.eos_token_id], temperature=1.0, seed=seed)
        want = tokenizer.batch_decode(common.responses_of(want), skip_special_tokens=True)
        run = go(f"seed {seed}", model=str(starts / "run1" / "model"), seed=seed)
        shown[seed] = [row["completion"] for row in first_samples(run)]
        assert [row["prompt"] for row in first_samples(run)] == texts and shown[seed] == want
    assert shown[3] != shown[4] and len(set(shown[3])) == 4


@scripts("sft", "dpo")
def test_figures_of_samples_by_hand(script, go, starts, tmp_path, monkeypatch):
    """An EOS early, in the last slot, alone, and another one of several; and a response without any."""
    responses = [[9, 8, 1], [9, 8, 9, 8, 9, 8, 9, 1], [1], [9, 7], [9, 8, 9, 8, 9, 8, 9, 8]]
    sample = common.sample

    def canned(model, prompts, *inputs, **options):
        return make_batch(prompts, responses) if len(prompts) == 5 else sample(model, prompts, *inputs, **options)

    monkeypatch.setattr(common, "sample", canned)
    model = copy_model(starts, tmp_path / "model", generation_config__json=b'{"eos_token_id": [1, 7]}')
    held_out = write(tmp_path / "held_out.jsonl", script.rows(0, 5, "_test"))
    run = go("run", model=str(model), eval_dataset=held_out, eval_samples=5)
    first, *_, last = read(run / "metrics.jsonl")
    for row in (first, last):
        assert row["completions/eos_rate"] == pytest.approx(4 / 5)
        assert row["completions/mean_length"] == pytest.approx((3 + 8 + 1 + 2 + 8) / 5)


@scripts("sft")
@pytest.mark.parametrize("micro", [4, 1])
def test_token_accuracy_is_a_share_of_tokens(script, go, starts, tmp_path, micro):
    """Of all trained tokens of the rows, short and long, in training and in evaluation: by loops over single rows."""
    rows = script.rows(0, 4)
    for row, n in zip(rows, (1, 3, 5, 20)):
        row["completion"] = "".join(f" {word}" for word in row["completion"].split()[:n])
    path, start = write(tmp_path / "rows.jsonl", rows), starts / "run1" / "model"
    run = go("run", model=str(start), dataset=path, eval_dataset=path, micro_batch_size=micro)
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    right = []
    for row in rows:
        prompt, answer = (tokenizer(row[side])["input_ids"] for side in ("prompt", "completion"))
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right.append([likeliest[t - 1] == ids[t] for t in range(len(prompt), len(ids))])
    of_tokens = sum(map(sum, right)) / sum(map(len, right))
    of_rows = sum(sum(row) / len(row) for row in right) / 4
    assert abs(of_tokens - of_rows) > 0.02
    assert read(run / "metrics.jsonl")[0]["eval/mean_token_accuracy"] == pytest.approx(of_tokens)
    assert trained_rows(run)[0]["mean_token_accuracy"] == pytest.approx(of_tokens)
