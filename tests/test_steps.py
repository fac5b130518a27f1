"""Whole epochs of sft.py, dpo.py and reward_model.py by loops over single rows in float64: the loss, gradient, clip and
AdamW step of each optimizer step, the short last one too, and every metric. And the dtype of all scripts' products.
"""

import copy
import itertools
import json
import math
import re
from collections import defaultdict

import pytest
import torch
from conftest import double_loads
from rl import adamw, bounded, optimizer_steps, put, vector
from tiny_runs import DATA, SCRIPTS, STEPWISE, head, launch, read, scripts, write

from common import shuffled

EOS = 1
VOCABULARY = json.loads((DATA / "model" / "tokenizer.json").read_text())["model"]["vocab"]
SMOOTHING, BETA = 0.1, 0.5  # of dpo.py
RATE, DECAY = 1e-2, 0.1
BOUNDS = {"sft": 3.0, "dpo": 1.8, "reward_model": 1.0}  # --max-grad-norm, between the norms of three steps

# ---- Rows: each word is a token, with the space before it ----


def ids_of(text):
    return [VOCABULARY[word] for word in re.findall(r" ?\S+", text)]


def cut(text, i):
    """Texts of very different lengths."""
    return " " + " ".join(text.split()[: 2 + 3 * (i % 4)])


def rows_for(name):
    """Ten rows: two batches of four and one of two. There are many ties among the comparisons."""
    if name == "sft":
        rows = head("demonstrations", 0, 10)
        return [{**row, "completion": cut(row["completion"], i)} for i, row in enumerate(rows)]
    pairs = head("preferences", 0, 10)
    for i, (row, mu) in enumerate(zip(pairs, [1.0, 0.5, 0.25, 0.5, 0.5, 1.0, 0.5, 0.75, 0.5, 0.0])):
        row.update(chosen=cut(row["chosen"], i), rejected=cut(row["rejected"], i + 1), mu=mu)
    if name == "dpo":
        return pairs
    rankings = head("rankings", 0, 5)
    for row, ranking in zip(rankings, [[1, 2, 2, 3], [2, 1, 3, 4], [1, 1, 1, 1], [2, 2, 1, 1], [4, 1, 2, 2]]):
        row.update(completions=[cut(text, i) for i, text in enumerate(row["completions"])], ranking=ranking)
    return pairs[:5] + rankings


# ---- What a batch gives, row by row ----


def logprobs_of(model, prompt, completion):
    """log pi of every token in the place of each of the completion's, from the model's own logits: (n, V)."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)


def mean(values):
    return sum(values) / len(values)


def of_demonstrations(model, rows, start):
    """(loss, metrics) of these rows. start: the model before the first step."""
    nll, hits = [], []
    for row in rows:
        completion = [*ids_of(row["completion"]), EOS]
        logprobs = logprobs_of(model, ids_of(row["prompt"]), completion)
        for t, token in enumerate(completion):
            nll.append(-logprobs[t, token])
            hits.append(logprobs[t].argmax().item() == token)
    return mean(nll), {"mean_token_accuracy": mean(hits)}


def logp(model, row, side):
    completion = [*ids_of(row[side]), EOS]
    logprobs = logprobs_of(model, ids_of(row["prompt"]), completion)
    return sum(logprobs[t, token] for t, token in enumerate(completion))


def negative_log_sigmoid(h):
    return torch.log(1 + torch.exp(-h))


def agreement(margin, mu):
    """The share of votes that a margin agrees with."""
    if abs(margin) < 1e-5:
        return 0.5
    return mu if margin > 0 else 1 - mu


def of_pairs(model, rows, start):
    losses, seen = [], defaultdict(list)
    for row in rows:
        rewards = {}
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                reference = logp(start, row, side)
            own = logp(model, row, side)
            rewards[side] = BETA * (own - reference)
            seen[f"logps/{side}"].append(own.item())
            seen[f"rewards/{side}"].append(rewards[side].item())
        h = rewards["chosen"] - rewards["rejected"]
        p = row["mu"] * (1 - SMOOTHING) + (1 - row["mu"]) * SMOOTHING
        losses.append(p * negative_log_sigmoid(h) + (1 - p) * negative_log_sigmoid(-h))
        seen["rewards/margins"].append(h.item())
        seen["rewards/accuracies"].append(agreement(h.item(), row["mu"]))
    return mean(losses), {name: mean(values) for name, values in seen.items()}


def of_comparisons(model, rows, start):
    losses, seen = [], defaultdict(list)
    for row in rows:
        completions = row.get("completions") or [row["chosen"], row["rejected"]]
        ranking = row.get("ranking", [1, 2])
        prompt = ids_of(row["prompt"])
        rewards = [model(torch.tensor([prompt + ids_of(text) + [EOS]])).logits[0, 0] for text in completions]
        own = defaultdict(list)
        for i, j in itertools.combinations(range(len(ranking)), 2):
            if ranking[j] < ranking[i]:
                i, j = j, i
            mu = 0.5 if ranking[i] == ranking[j] else row.get("mu", 1.0)
            h = rewards[i] - rewards[j]
            own["loss"].append(mu * negative_log_sigmoid(h) + (1 - mu) * negative_log_sigmoid(-h))
            own["accuracy"].append(agreement(h.item(), mu))
            own["margin"].append(h.item())
            own["rewards/chosen"].append(rewards[i].item())
            own["rewards/rejected"].append(rewards[j].item())
        losses.append(mean(own.pop("loss")))
        for name, values in own.items():
            seen[name].append(mean(values))
        seen["mean_reward"].append(mean(rewards).item())
    return mean(losses), {name: mean(values) for name, values in seen.items()}


BY_LOOPS = {"sft": of_demonstrations, "dpo": of_pairs, "reward_model": of_comparisons}


@scripts(*STEPWISE)
def test_an_epoch_by_loops_over_single_rows(script, tiny, tmp_path, float64, monkeypatch, trained):
    """The rows of a step weigh the same, ties and those of a short last batch included: its loss is their mean, or that
    of their tokens. Its gradient is held to --max-grad-norm, and AdamW does the rest."""
    double_loads(monkeypatch, script.module, *script.loaders)
    rows, by_loops, bound = rows_for(script.name), BY_LOOPS[script.name], BOUNDS[script.name]
    path = write(tmp_path / "rows.jsonl", rows)
    flags = {"label_smoothing": SMOOTHING, "beta": BETA} if script.name == "dpo" else {}
    args = tiny(dataset=path, eval_dataset=path, micro_batch_size=2, learning_rate=RATE, anneal_lr=False,
                weight_decay=DECAY, max_grad_norm=bound, **flags)  # fmt: skip
    with optimizer_steps() as steps:
        launch(script, args)
    model = trained["model"].eval()
    weights = [parameters for parameters, _ in steps] + [[p.detach().clone() for p in model.parameters()]]
    start = copy.deepcopy(model)
    put(start, weights[0])
    before, *logged, after = read(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == len(logged) == 3

    order, norms = shuffled(10, args.seed, 0), []
    for k, (parameters, gradients) in enumerate(steps):
        put(model, parameters)
        loss, metrics = by_loops(model, [rows[i] for i in order[4 * k : 4 * k + 4]], start)
        want = torch.autograd.grad(loss, list(model.parameters()))
        error = vector(gradients) - bounded(want, bound)
        norms.append(vector(want).norm().item())
        assert error.norm() < 1e-5 * vector(gradients).norm()
        assert logged[k]["grad_norm"] == pytest.approx(norms[-1], rel=1e-6)
        assert logged[k]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name, value in metrics.items():
            assert logged[k][name] == pytest.approx(value, rel=1e-6, abs=2e-5), name
    assert min(norms) < bound < max(norms)
    for got, want in zip(weights[1:], adamw(steps, RATE, DECAY)):
        assert (vector(got) - want).abs().max() < 1e-9

    for row, parameters in ((before, weights[0]), (after, weights[-1])):
        put(model, parameters)
        with torch.no_grad():
            loss, metrics = by_loops(model, rows, start)
        for name, value in {"loss": loss.item(), **metrics}.items():
            assert row[f"eval/{name}"] == pytest.approx(value, rel=1e-6, abs=2e-5), name
    assert set(metrics) | {"loss"} <= script.step_metrics


# ---- dtype ----


def test_products_are_in_the_dtype_asked_for(script, go):
    """In training too, of every model that is trained."""
    seen = set()

    def record(module, inputs, output):
        if isinstance(module, torch.nn.Linear) and module.out_features not in (1, len(VOCABULARY)):
            seen.add((torch.is_grad_enabled(), output.dtype))

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        go("run", dtype="bfloat16", **script.one_step)
    finally:
        hook.remove()
    assert {dtype for trains, dtype in seen if trains} == {torch.bfloat16}
    assert (False, torch.bfloat16) in seen


@scripts("dpo")
def test_in_bf16_the_reference_is_still_the_start(go):
    """Its log-probs are in the dtype of the policy's: nothing is learned before the first step."""
    run = go("run", dtype="bfloat16", **SCRIPTS["dpo"].one_step)
    before, first, _ = read(run / "metrics.jsonl")
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and before["eval/rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
