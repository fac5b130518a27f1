"""The bookkeeping of steps: micro-batches change nothing, each row and each response is used as often as it
should be, learning rates are those asked for, each flag changes what it should and nothing else, rewards and
their metrics are what was asked for.
"""

import contextlib
import itertools
import re
import statistics

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, double_loads, naive_logprobs
from rl import rows_of
from safetensors.torch import load_file
from tiny_runs import (
    DATA, INERT, PARTS, PROMPT, SAMPLERS, SCRIPTS, STEPWISE, approx_rows, copy_model, count_tokens, nonzero, numbers,
    option, read, result, reward_specs, rows_of_rollout, scripts, timeless, trained_rows, write)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import grpo

# ---- Micro-batches ----


def short(spec) -> str:
    """A reward in the names of metrics: without the path of its folder."""
    return "/".join(spec.split("/")[-2:])


def cut(text, i) -> str:
    """The first words of a text, more or fewer of them by its number."""
    return text[: 20 + 13 * (i % 4)].rsplit(" ", 1)[0]


@pytest.fixture
def ragged(script, tmp_path, many_ends) -> dict:
    """Flags for rows of very different lengths: equal lengths hide every aggregation bug. 20 rows: parts of 8, 8
    and 4.
    """
    if script.is_sampler:
        prompts = [{"prompt": " ".join([*["very"] * (i % 5), PROMPT])} for i in range(20)]
        return {"model": many_ends, "dataset": write(tmp_path / "ragged.jsonl", prompts)}
    rows = script.rows(0, 20)
    for i, row in enumerate(rows):
        for side in script.sides:
            if side in row:
                row[side] = cut(row[side], i)
        if "completions" in row:
            row["completions"] = [cut(text, i + k) for k, text in enumerate(row["completions"])]
    path = write(tmp_path / "ragged.jsonl", rows)
    return {"dataset": path, "eval_dataset": path}


def rows_without_rounding(run) -> list[dict]:
    """What a run measures, but for the accuracy at the first step: pi = pi_ref, and the sign of 0 is rounding."""
    rows = numbers(run)
    assert abs(rows[1].get("rewards/margins", 0.0)) < 1e-5
    rows[1].pop("rewards/accuracies", None)
    return rows


def test_micro_batches_change_nothing(script, go, ragged, float64, monkeypatch):
    """In float64, where no rounding decides on which side of a clip a ratio is: only what is summed could differ."""
    double_loads(monkeypatch, script.module, *script.loaders)
    flags = {**ragged, "batch_size": 8}
    if script.is_sampler:
        flags["total_episodes"] = 32
    whole = go("whole", **flags, micro_batch_size=8)
    parts = go("parts", **flags, micro_batch_size=2)
    assert rows_without_rounding(parts) == approx_rows(rows_without_rounding(whole), 1e-4)
    for path in whole.glob("*/model.safetensors"):
        a, b = (load_file(run / path.relative_to(whole)) for run in (whole, parts))
        for key, weight in a.items():
            assert (weight - b[key]).abs().max() < 1e-5, key  # a hundredth of one step at the rate of 1e-3


@scripts("reward_model")
def test_micro_batches_change_no_plackett_luce(go, ragged):
    flags = {**ragged, "batch_size": 8, "loss_type": "plackett_luce"}
    whole = go("whole", **flags, micro_batch_size=8)
    parts = go("parts", **flags, micro_batch_size=1)
    assert numbers(parts) == approx_rows(numbers(whole), 1e-4)


@scripts("grpo")
@pytest.mark.parametrize("flags", [
    {"loss_type": "dapo"}, {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "drop_zero_std": True, "reward": "odd"}], ids=str)
def test_micro_batches_change_no_loss(script, go, starts, ragged, float64, monkeypatch, flags):
    """Denominators are those of the optimizer step, whatever is left in it."""
    double_loads(monkeypatch, script.module, *script.loaders)
    drops = "reward" in flags
    flags = {**ragged, **flags, "batch_size": 8, "total_episodes": 16}
    if drops:
        flags |= reward_specs(script, starts, "rewards.py:odd")
    whole, parts = (go(f"micro {micro}", **flags, micro_batch_size=micro) for micro in (8, 1))
    assert numbers(parts) == approx_rows(numbers(whole), 1e-4)
    assert not drops or 0 < trained_rows(whole)[0]["frac_reward_zero_std"] < 1


@scripts(*SAMPLERS)
def test_sampler_is_scored_as_it_sampled(script, go, ragged, monkeypatch):
    """Before the first update of weights: the same log-probs at any temperature. A sampler that is off in
    one row is seen whatever the micro-batches are.
    """
    flags = {**ragged, "batch_size": 8, "max_new_tokens": 12, "total_episodes": 32}
    assert all(row["policy/logprob_gap"] < 1e-5 for row in trained_rows(go("warm", temperature=0.7, **flags)))
    sample = common.sample

    def off(*inputs, **options):
        batch = sample(*inputs, **options)
        if inputs[2] == 4:  # new tokens, which are tried before the run
            return batch
        numbers = torch.arange(len(batch["mask"]))[:, None]
        return {**batch, "logprobs": batch["logprobs"] + 1e-3 * numbers * batch["mask"]}

    monkeypatch.setattr(common, "sample", off)
    gaps = []
    for micro in (8, 1):
        rows = trained_rows(go(f"off{micro}", micro_batch_size=micro, **flags))
        gaps.append([row["policy/logprob_gap"] for row in rows])
    assert min(gaps[0]) > 5e-3 and gaps[1] == pytest.approx(gaps[0], abs=1e-5)


# ---- Every row, and every response ----


@scripts(*STEPWISE)
def test_each_row_once_an_epoch(script, go, training_rows, starts):
    """10 rows, batch 4, 3 epochs: 9 steps, the last of an epoch smaller, in another order each epoch."""
    run = go("run", epochs=3)
    assert [len(batch) for batch in training_rows] == [4, 4, 2] * 3
    epochs = [sum(training_rows[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 10 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    rows = trained_rows(run)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["epoch"] for row in rows] == pytest.approx([step / 3 for step in range(1, 10)])
    total = sum(map(count_tokens, read(starts / f"{script.name}.jsonl")))
    assert [rows[i]["num_tokens"] for i in (2, 5, 8)] == [total, 2 * total, 3 * total]


@pytest.mark.parametrize("name, size", [("ppo", 1), ("grpo", 2)])
def test_each_response_once_an_epoch(script, size, go, monkeypatch):
    """36 groups of this size, which grpo.py keeps together: 10 prompts in 3.6 passes, each in another order;
    the responses of an update twice, in two minibatches, in another order each time.
    """
    prompts_of, batches, trained_on, n = [], [], [], 4 * size  # n responses an update
    rollout, loss = script.module.rollout, getattr(script.module, script.loss)

    def record_rollout(*inputs, **options):
        drawn = rollout(*inputs, **options)
        prompts_of.append([row["prompt"] for row, _ in rows_of_rollout(inputs)])
        batches.append(drawn[0])
        return drawn

    def record_loss(logprobs, old_logprobs, *inputs, **options):
        known = [nonzero(row) for row in batches[-1]["logprobs"]]
        trained_on.append([known.index(nonzero(row)) for row in old_logprobs])
        return loss(logprobs, old_logprobs, *inputs, **options)

    monkeypatch.setattr(script.module, "rollout", record_rollout)
    monkeypatch.setattr(script.module, script.loss, record_loss)
    rows = trained_rows(go("run", epochs=3))
    prompts_of, batches = prompts_of[1:-1], batches[1:-1]  # but for the evaluations before and after
    assert [len(prompts) for prompts in prompts_of] == [n] * 9
    groups = [prompts[i : i + size] for prompts in prompts_of for i in range(0, n, size)]
    assert len(groups) == 36 and all(len(set(group)) == 1 for group in groups)
    prompts = [group[0] for group in groups]
    passes = [prompts[i : i + 10] for i in (0, 10, 20)]
    assert all(len(set(each)) == 10 and set(each) == set(passes[0]) for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0] and len(set(prompts[30:])) == 6
    assert len(trained_on) == 9 * 4 and all(len(minibatch) == n // 2 for minibatch in trained_on)
    epochs = [trained_on[i] + trained_on[i + 1] for i in range(0, 36, 2)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 8  # of the 24 orders of 4
    assert any(epochs[i] != epochs[i + 1] for i in range(0, 18, 2))
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["episode"] for row in rows] == list(range(n, 9 * n + 1, n))
    tokens = [int(batch["mask"].sum()) for batch in batches]
    assert [row["num_tokens"] for row in rows] == list(itertools.accumulate(tokens))
    assert [n * row["completions/mean_length"] for row in rows] == pytest.approx(tokens)


# ---- Learning rates ----


@scripts(*STEPWISE)
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates(go, warmup, anneal):
    peak, steps = 1e-3, 12
    rows = trained_rows(go("run", epochs=4, warmup_steps=warmup, anneal_lr=anneal))
    rates = [row["learning_rate"] for row in rows]
    rising = [peak * (k + 1) / warmup for k in range(warmup)]
    falling = [peak * (1 - k / (steps - warmup)) if anneal else peak for k in range(steps - warmup)]
    assert rates == pytest.approx(rising + falling, rel=1e-9)
    assert rates[0] > 0 and max(rates) == peak
    if anneal:
        assert rates[-1] == pytest.approx(peak / (steps - warmup))


@pytest.mark.parametrize("name, more", [("ppo", {"critic_learning_rate": 5e-3}), ("grpo", {})])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates_of_updates(go, anneal, more):
    """That of the policy is logged; a critic's is used too, in a group of its own in the optimizer."""
    used = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups]))
    rows = trained_rows(go("run", anneal_lr=anneal, **more))
    hook.remove()
    want = [1 - k / 3 if anneal else 1.0 for k in range(3)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * x for x in want], rel=1e-9)
    peaks = [1e-3, *more.values()]
    assert used == [pytest.approx([peak * x for peak in peaks], rel=1e-9) for x in want for _ in range(4)]


@pytest.mark.parametrize("name, part", PARTS)
def test_learning_rate_is_the_one_used(script, part, go):
    """AdamW's first step moves each weight by the learning rate, whatever the gradient."""
    rates = {"learning_rate": 0.1, "critic_learning_rate": 0.1}  # the other model's, if there is one
    flag = "critic_learning_rate" if part == "critic" else "learning_rate"
    runs = []
    for rate in (0.0, 1e-3):
        used = {key: value for key, value in {**rates, flag: rate}.items() if key in script.flags}
        runs.append(go(f"run{rate}", anneal_lr=False, max_grad_norm=1e9, **used, **script.one_step))
    a, b = (load_file(run / part / "model.safetensors") for run in runs)
    moves = torch.cat([(a[key] - b[key]).abs().flatten() for key in a if a[key].dim() == 2])
    assert moves.median().item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_0_changes_nothing(script, go):
    """The evaluations are equal to the last digit: the same rows, the same noise, the same weights. pi is
    pi_old and pi_ref, and no clip decides.
    """
    still = {"critic_learning_rate": 0.0, "target_kl": 0.0} if "critic" in script.parts else {}
    run = go("run", learning_rate=0.0, **still)
    first, *rows, last = timeless(read(run / "metrics.jsonl"))
    assert first == {**last, "step": 0}
    samples = read(run / "samples.jsonl")
    before, after = ([{**row, "step": 0} for row in samples if row["step"] == step] for step in (0, 3))
    assert before == after != []
    for row in rows if script.is_sampler else []:
        assert row["policy/clipfrac"] == row.get("val/clipfrac", 0) == 0
        assert row.get("val/ratio", 1) == pytest.approx(1, abs=1e-6)
        assert [row[script.kl_metric], row["policy/approx_kl"]] == pytest.approx([0, 0], abs=1e-5)


# ---- Options ----

MATTERS = [  # of grpo.py: flags' other values, and what else is set
    ({"kl_in": "reward"}, {}), ({"kl_estimator": "k1"}, {}), ({"kl_estimator": "k2"}, {}),
    ({"kl_estimator": "k2"}, {"kl_in": "reward"}), ({"kl_estimator": "k3"}, {"kl_in": "reward"}),
    ({"kl_coef": 0.0}, {}), ({"kl_coef": 0.0}, {"kl_in": "reward"}), ({"baseline": "leave_one_out"}, {}),
    ({"scale_rewards": "batch"}, {}), ({"scale_rewards": "none"}, {}),
    ({"scale_rewards": "batch"}, {"scale_rewards": "none"}), ({"loss_type": "dapo"}, {}),
    ({"loss_type": "dr_grpo"}, {}), ({"loss_type": "dr_grpo"}, {"loss_type": "dapo"}),
    ({"importance_sampling_level": "sequence"}, {}), ({"clip_coef": 1e-3}, {}), ({"clip_coef_high": 1e-3}, {}),
    ({"missing_eos_penalty": 3.0}, {"scale_rewards": "none"}), ({"temperature": 0.7}, {}),
    ({"update_epochs": 1}, {}), ({"num_minibatches": 1, "batch_size": 8}, {}), ({"num_generations": 4}, {}),
    ({"reward_weights": (1.0, 0.1)}, {}), ({"reward_weights": (-1.0, -1.0)}, {}), ({"drop_zero_std": True}, {}),
    ({"max_grad_norm": 0.01}, {"learning_rate": 1e-2}), ({"anneal_lr": False}, {}), ({"seed": 2}, {})]
CHANGED_IN_GRPO = {flag for flags, _ in MATTERS for flag in flags}


class Different(Exception):
    """Ends a run that has measured something else than another one."""


def differ(after, before) -> bool:
    return [set(row) for row in after] != [set(row) for row in before] or after != approx_rows(before, 1e-6)


@pytest.fixture(scope="session")
def measured():
    """What the runs of `test_option_does_something` without its flag measured, by script."""
    return {}


@pytest.mark.parametrize("name, flag", [(name, flag) for name, script in SCRIPTS.items()
                                        for flag in script.flags if flag not in INERT
                                        and not (name == "grpo" and flag in CHANGED_IN_GRPO)])
def test_option_does_something(script, go, starts, measured, monkeypatch, flag):
    """A few steps with a changed flag measure something else, by more than rounding: the run ends where it first
    does. Of grpo.py those flags that `test_option_changes_the_weights` has not.
    """
    if flag == "lora_rank":
        pytest.importorskip("peft")
    flags = {"dataset": str(starts / f"{script.name}_short.jsonl")}
    if script.is_sampler:
        flags = {"total_episodes": 8}
    if script.name == "grpo":
        flags = {"total_episodes": 16, **reward_specs(script, starts, "rewards.py:odd")}
    if flag == "warmup_steps":
        flags["num_train_epochs"] = 5  # it takes a fifth of the run at most

    def measure(run):
        return [*numbers(run), {"samples": len(read(run / "samples.jsonl"))}]

    key = script.name, flag == "warmup_steps"
    if key not in measured:
        measured[key] = measure(go("before", **flags))
    before = measured[key]
    assert len(before) >= 5
    log = common.Run.log

    def log_and_compare(run, *inputs):
        log(run, *inputs)
        rows = numbers(run.folder)
        if differ(rows, before[: len(rows)]):
            raise Different

    monkeypatch.setattr(common.Run, "log", log_and_compare)
    with contextlib.suppress(Different):
        assert differ(measure(go("after", **{**flags, flag: option(script, flag, starts)})), before)


def test_gradient_checkpointing_changes_no_number(script, go, trained):
    """Nor a sample: transformers turns the cache off in a checkpointed model that is in training mode."""
    runs, enabled = [], []
    for value in (False, True):
        runs.append(go(f"run {value}", gradient_checkpointing=value))
        layers = [list(model.modules()) for model in trained.values()]
        enabled.append([any(getattr(layer, "gradient_checkpointing", False) for layer in part) for part in layers])
    assert len(trained) == len(script.parts)
    assert enabled == [[False] * len(trained), [True] * len(trained)]
    assert numbers(runs[1]) == approx_rows(numbers(runs[0]), 1e-5)
    assert read(runs[1] / "samples.jsonl")[:4] == read(runs[0] / "samples.jsonl")[:4]


def weights_in(run) -> dict[str, str]:
    """Digests of the saved models."""
    return {file: digest for file, digest in result(run)[1].items() if file.endswith("safetensors")}


def test_evaluation_and_checkpoints_change_no_training(name, go, whole):
    """Neither evaluating, sampling nor saving draws from the noise of training."""
    more = {"max_new_tokens": 5} if name in ("sft", "dpo") else {}
    never, always = whole(), go("always", eval_every=1, save_every=1, eval_samples=2, **more)
    assert len(trained_rows(never)) == 3 and trained_rows(never) == trained_rows(always)
    assert weights_in(never) == weights_in(always)


# ---- Rewards and scores ----

LOG = """
import json, pathlib

def log(name="first", **inputs):
    with open(pathlib.Path(__file__).with_name(name), "a") as file:
        file.write(json.dumps(inputs) + "\\n")
    return [0.5] * len(inputs["completions"])

def too(**inputs): return log("second", **inputs)
"""


@scripts(*SAMPLERS)
@pytest.mark.parametrize("chat", [False, True])
def test_reward_function_gets_what_trl_gives_it(script, go, starts, tmp_path, chat):
    """By keyword: prompts and completions as texts, or as lists of messages where the prompt is one, and all
    columns of the data, with None where a row lacks one, whichever row comes first.
    """
    (tmp_path / "log.py").write_text(LOG)
    texts = [row["prompt"] for row in script.rows(0, 6)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(prompts)]
    for row in rows:
        if row["number"] % 3:
            row["answer"] = [row["number"]]
    template = {"chat_template__jinja": CHAT_TEMPLATE.encode()} if chat else {}
    model = copy_model(starts, tmp_path / "model", **template)
    path = write(tmp_path / "rows.jsonl", rows)
    specs = reward_specs(script, tmp_path, "log.py:log", "log.py:too")
    run = go("run", model=str(model), dataset=path, eval_dataset=path, missing_eos_penalty=0.0, **specs)
    calls = read(tmp_path / "first")
    assert read(tmp_path / "second") == calls
    n, update = {"ppo": (4, 4), "grpo": (6, 8)}[script.name]  # evaluation, three updates, evaluation
    assert [len(call["prompts"]) for call in calls] == [n, update, update, update, n]
    for call in calls:
        assert set(call) == {"prompts", "completions", "number", "answer"}
        for prompt, completion, number, answer in zip(*(call[key] for key in (
                "prompts", "completions", "number", "answer"))):
            assert prompt == prompts[number] and answer == ([number] if number % 3 else None)
            if chat:
                assert [set(message) for message in completion] == [{"role", "content"}]
                assert completion[0]["role"] == "assistant"
    shown = [completion[0]["content"] if chat else completion for completion in calls[0]["completions"]]
    assert shown == [row["completion"] for row in read(run / "samples.jsonl")][:n]
    assert all(len(text.split()) <= 8 and "<" not in text for text in shown)
    assert all(row[script.score_metric] == 1.0 for row in trained_rows(run))


@scripts(*SAMPLERS)
@pytest.mark.parametrize("function", ["good", "whole"])
def test_score_of_a_sample_is_the_functions_less_the_penalty(script, go, many_ends, starts, tmp_path, function):
    flags = {"model": many_ends, "eval_samples": 12, "total_episodes": 8, "max_new_tokens": 4,
             "eval_dataset": write(tmp_path / "held_out.jsonl", script.rows(0, 12)),
             **reward_specs(script, starts, f"rewards.py:{function}")}
    free, fined = (go(f"fine {fine}", missing_eos_penalty=fine, **flags) for fine in (0.0, 3.0))
    kept = [[row for row in read(run / "samples.jsonl") if row["step"] == 0] for run in (free, fined)]
    scores = [[row[script.score_column] for row in rows] for rows in kept]
    completions = [[row["completion"] for row in rows] for rows in kept]
    assert scores[0] == [len(text.split()) for text in completions[0]]
    assert completions[0] == completions[1]
    fines = [a - b for a, b in zip(*scores)]
    start = read(fined / "metrics.jsonl")[0]
    assert set(fines) == {0.0, 3.0} and fines.count(0.0) / 12 == pytest.approx(start["eval/completions/eos_rate"])
    assert start[f"eval/{script.score_metric}"] == pytest.approx(statistics.fmean(scores[1]))


@scripts(*SAMPLERS)
def test_texts_for_a_reward_function_hold_no_eos(script, go, starts):
    run = go("run", missing_eos_penalty=0.0, eval_samples=64, max_new_tokens=24, total_episodes=8,
             **reward_specs(script, starts, "rewards.py:marks"))
    start = read(run / "metrics.jsonl")[0]
    assert start["eval/completions/eos_rate"] > 0.05 and start[f"eval/{script.score_metric}"] == 0


@scripts(*SAMPLERS)
def test_score_of_a_sample_is_the_reward_models(script, go, starts):
    """Less its mean reward, read where the reward model was trained to be read: at an EOS, of a response that
    was cut before its own as well.
    """
    model = SCRIPTS["reward_model"].load(starts / "small_reward1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "model")
    run = go("run", missing_eos_penalty=0.0, eval_samples=8, eval_dataset=str(starts / f"{script.name}_other.jsonl"))
    rows = [row for row in read(run / "samples.jsonl") if len(row["completion"].split()) == 8]
    assert len(rows) > 6
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            score = model(input_ids=ids).logits.item() - model.config.reward_mean
        assert row[script.score_column] == pytest.approx(score, abs=1e-5)


@scripts(*SAMPLERS)
def test_noise_is_new_in_each_update(script, go, tmp_path, monkeypatch):
    """But at evaluations always the same, so that they differ by the policy alone. One prompt, no learning."""
    drawn, sample = [], common.sample

    def record(*inputs, **options):
        batch = sample(*inputs, **options)
        if inputs[2] != 4:  # new tokens, which are tried before the run
            drawn.append(batch)
        return batch

    monkeypatch.setattr(common, "sample", record)
    path = write(tmp_path / "one.jsonl", [script.row])
    go("run", dataset=path, eval_dataset=path, learning_rate=0.0, max_new_tokens=5)
    rows = [tuple(ids) for batch in drawn for ids in common.responses_of(batch)]
    n = len(rows) // 5
    assert n == len(drawn[0]["mask"]) >= 4 and rows[:n] == rows[4 * n :] and len(set(rows)) == 4 * n


# ---- PPO's objectives, KL coefficient and critic ----


@scripts("ppo")
def test_objectives_add_up(go, many_ends):
    """Scores less the coefficient times the KL, with the coefficient that the rewards were made with."""
    for row in read(go("run", model=many_ends, eval_every=1, max_new_tokens=16) / "metrics.jsonl"):
        prefix, used = ("", row["objective/kl_coef"]) if "loss/policy" in row else ("eval/", None)
        scores, kl, penalty, total = (row[f"{prefix}objective/{key}"] for key in (
            "scores", "kl", "non_score_reward", "rlhf_reward"))
        assert total == pytest.approx(scores + penalty)
        assert used is None or penalty == pytest.approx(-used * kl)
    assert used is None and abs(kl) > 1e-2  # by now the policy has left the reference


@scripts("ppo")
def test_kl_coefficient_adapts(script, go, monkeypatch):
    """By at most 20 % in --kl-horizon responses; here a KL near 0 is far below its target. What is logged is
    what the rewards are made with.
    """
    used, token_rewards = [], script.module.token_rewards

    def record(*inputs):
        used.append(inputs[-1])
        return token_rewards(*inputs)

    monkeypatch.setattr(script.module, "token_rewards", record)
    rows = trained_rows(go("run", target_kl=5.0))
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.3 * 0.98**k for k in range(3)])
    assert [row["objective/kl_coef"] for row in rows] == used


@scripts("ppo")
@pytest.mark.parametrize("model", ["run1/model", ""], ids=["weights", "random"])
def test_critic_of_the_policy(go, starts, rewards, model):
    """Without a reward model the critic starts as the policy does, even if that starts at random."""
    run = go("run", model=str(starts / model if model else DATA / "model"), reward=(f"{rewards}:good",))
    assert (run / "critic" / "model.safetensors").exists() and len(trained_rows(run)) == 3


# ---- Groups and several rewards ----


@scripts("ppo", "grpo")
@pytest.mark.parametrize("weights", [(), (2.0, -0.5)], ids=["sum", "weighted"])
def test_reward_is_the_weighted_sum(script, go, starts, many_ends, weights):
    """Less the penalty, which no weight scales; each one's own mean is logged too, as it is."""
    specs = reward_specs(script, starts, "rewards.py:good", "reward1/model")
    run = go("run", model=many_ends, **specs, reward_weights=weights, missing_eos_penalty=3.0, eval_every=1,
             max_new_tokens=4)
    used, shares = weights or (1.0, 1.0), []
    for row in read(run / "metrics.jsonl"):
        prefix = "" if "learning_rate" in row else "eval/"
        good, model = (row[f"{prefix}rewards/{short(spec)}"] for spec in specs["reward"])
        cut_off = 1 - row[f"{prefix}completions/eos_rate"]
        want = used[0] * good + used[1] * model - 3 * cut_off
        assert row[f"{prefix}{script.score_metric}"] == pytest.approx(want, abs=1e-5)
        assert 0 < good <= 4 and abs(model) > 1e-3
        shares.append(cut_off)
    assert 0 < statistics.fmean(shares) < 1


@scripts("ppo", "grpo")
@pytest.mark.parametrize("spec", ["rewards.py:good", "reward1/model"], ids=["function", "model"])
def test_a_watched_reward_changes_nothing(script, go, starts, spec):
    """With weight 0 the second reward is in the log, and all else, weights and critic included, is what it is
    without it, bit for bit.
    """
    one = reward_specs(script, starts, spec)
    two = reward_specs(script, starts, spec, "rewards.py:odd")
    alone, watched = go("alone", **one), go("watched", **two, reward_weights=(1.0, 0.0))
    names = {f"{prefix}rewards/{short(spec)}" for spec in two["reward"] for prefix in ("", "eval/")}
    seen, rows = set(), []
    for row in timeless(read(watched / "metrics.jsonl")):
        both = [row[name] for name in sorted(names) if name in row]
        assert len(both) == 2 and both[0] != both[1]
        seen |= names & set(row)
        rows.append({name: value for name, value in row.items() if name not in names})
    assert seen == names and rows == timeless(read(alone / "metrics.jsonl"))
    assert (watched / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    for part in script.parts:
        before, after = (load_file(run / part / "model.safetensors") for run in (alone, watched))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


ABSENT = """
import json, pathlib

def first(prompts, completions, who):
    with open(pathlib.Path(__file__).with_name("who.jsonl"), "a") as file:
        file.write(json.dumps(who) + "\\n")
    return [float(len(text)) if "1" in names else None for text, names in zip(completions, who)]

def second(prompts, completions, who):
    return [-1.0 if "2" in names else None for names in who]

def third(prompts, completions, who):
    return [float("nan") if "nan" in names else 0.25 if "3" in names else None for names in who]
"""


@scripts("grpo")
def test_none_counts_as_absent(script, go, tmp_path):
    """The others make the reward. A mean is one of what was scored, and there is none where nothing was."""
    (tmp_path / "absent.py").write_text(ABSENT)
    flags = reward_specs(script, tmp_path, "absent.py:first", "absent.py:second", "absent.py:third")
    specs, names = flags["reward"], ["1", "2", "12", "21"]
    held_out = [{**row, "who": who} for row, who in zip(script.rows(0, 4, "_test"), names)]
    rows = [{**row, "who": "3" if i == 4 else "1"} for i, row in enumerate(script.rows(0, 10))]
    run = go("run", **flags, reward_weights=(2.0, 3.0, -1.0), eval_samples=4,
             dataset=write(tmp_path / "rows.jsonl", rows),
             eval_dataset=write(tmp_path / "held_out.jsonl", held_out))
    logged, seen = timeless(read(run / "metrics.jsonl")), read(tmp_path / "who.jsonl")
    for row, who, step in zip((logged[0], logged[-1]), (seen[0], seen[-1]), (0, 3)):
        samples = [sample for sample in read(run / "samples.jsonl") if sample["step"] == step]
        letters = [len(sample["completion"]) for sample in samples]
        assert who == names and [sample["reward"] for sample in samples] == [
            2 * letters[0], -3, 2 * letters[2] - 3, 2 * letters[3] - 3]
        assert row["eval/reward"] == pytest.approx(statistics.fmean(sample["reward"] for sample in samples))
        assert row[f"eval/rewards/{short(specs[0])}"] == pytest.approx(statistics.fmean([letters[0], *letters[2:]]))
        assert row[f"eval/rewards/{short(specs[1])}"] == -1 and f"eval/rewards/{short(specs[2])}" not in row
    present = [{spec for spec in specs if f"rewards/{short(spec)}" in row} for row in logged[1:-1]]
    assert present == [{specs[int(who) - 1] for who in batch} for batch in seen[1:-1]]
    assert {len(specs) for specs in present} == {1, 2}  # a reward that is seldom asked is seldom logged


@scripts("grpo")
@pytest.mark.parametrize("flags, steps", [({"drop_zero_std": True}, 0), ({"kl_coef": 0.0}, 12)], ids=str)
def test_groups_of_equal_rewards_teach_nothing(go, starts, rewards, capsys, flags, steps):
    """Dropped or not, the weights stay as they are to the last bit; dropped, there is no optimizer step."""
    taken = []
    hook = register_optimizer_step_pre_hook(lambda *_: taken.append(1))
    run = go("run", reward=(f"{rewards}:same",), **flags)
    hook.remove()
    assert len(taken) == steps
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (starts / "small_run1", run))
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    rows = trained_rows(run)
    assert [row["grad_norm"] for row in rows] == [row["reward_std"] for row in rows] == [0, 0, 0]
    assert [row["frac_reward_zero_std"] for row in rows] == [1, 1, 1]
    assert [row["reward"] for row in rows] == pytest.approx([0.1] * 3)
    assert all(abs(row["loss"]) < 1e-6 and row["num_tokens"] > 0 for row in rows)
    assert "100% of groups had zero variance" in capsys.readouterr().out


@scripts("grpo")
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_dropped_groups_leave_the_denominators(script, go, rewards, many_ends, loss_type):
    """Without KL they add nothing to the gradient: only what it is divided by changes."""
    flags = {"model": many_ends, "reward": (f"{rewards}:odd",), "kl_coef": 0.0, "loss_type": loss_type,
             **script.one_step}
    (kept,), (dropped,) = (trained_rows(go(f"drop {drop}", drop_zero_std=drop, **flags)) for drop in (False, True))
    zero = kept["frac_reward_zero_std"]
    assert 0 < zero < 1 and dropped["frac_reward_zero_std"] == zero
    assert dropped["grad_norm"] == pytest.approx(kept["grad_norm"] / (1 - zero), rel=1e-4) != 0
    assert dropped["reward"] == kept["reward"] and dropped["num_tokens"] == kept["num_tokens"]


@scripts("grpo")
def test_a_group_may_be_as_large_as_an_update(script, go, monkeypatch):
    """And be spread over its minibatches: advantages are made before."""
    shapes, group_advantages = [], script.module.group_advantages

    def record(rewards, *inputs):
        shapes.append(rewards.shape)
        return group_advantages(rewards, *inputs)

    monkeypatch.setattr(script.module, "group_advantages", record)
    assert len(trained_rows(go("run", num_generations=8))) == 3 and shapes == [(1, 8)] * 3


def test_diagnoses_name_what_to_change():
    fine = {"frac_reward_zero_std": 0.5, "completions/eos_rate": 0.5, "policy/clipfrac": 0.3,
            "policy/logprob_gap": 0.5}
    assert grpo.diagnoses(fine) == []
    signs = [("frac_reward_zero_std", 0.75, "75% of groups", "num_generations"),
             ("completions/eos_rate", 0.25, "75% of responses", "max_new_tokens"),
             ("policy/clipfrac", 0.4, "40% of tokens", "learning_rate"),
             ("policy/logprob_gap", 0.8, "0.80 nats", "dtype")]
    for key, value, words, flag in signs:
        (line,) = grpo.diagnoses({**fine, key: value})
        assert words in line and f"--{flag.replace('_', '-')}" in line
        named = {name.replace("-", "_") for name in re.findall("--([a-z-]+)", line)}
        assert named <= set(SCRIPTS["grpo"].flags)
    assert len(grpo.diagnoses(fine | {key: value for key, value, *_ in signs})) == 4


EVEN = """
import json, pathlib

def even(prompts, completions, **columns):
    scores = [1.0 - len(text) % 2 for text in completions]
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps([prompts, completions, scores]) + "\\n")
    return scores

def length(prompts, completions, **columns): return [float(len(text)) for text in completions]
"""


@scripts("grpo")
@pytest.mark.parametrize("asked, n, size", [(14, 3, 4), (3, 1, 3)])
def test_evaluation_by_hand(script, go, starts, tmp_path, asked, n, size):
    """Before, during and after: n responses to each held-out prompt, of as many prompts as were asked for. A
    response passes if the first reward is 1, whatever the others are and its weight is.
    """
    (tmp_path / "rewards.py").write_text(EVEN)
    specs = reward_specs(script, tmp_path, "rewards.py:even", "rewards.py:length")
    run = go("run", **specs, reward_weights=(-1.0, 0.5), eval_samples=asked, eval_every=2)
    rows = [row for row in read(run / "metrics.jsonl") if "eval/reward" in row]
    samples, calls = read(run / "samples.jsonl"), read(tmp_path / "calls.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert [row["step"] for row in samples] == [0] * size + [2] * size + [3] * size
    held_out = [row["prompt"] for row in read(starts / "grpo_held_out.jsonl")][:size]
    for row, (prompts, completions, scores) in zip(rows, (calls[0], calls[3], calls[5])):
        assert prompts == [prompt for prompt in held_out for _ in range(n)]
        passed = [[score == 1 for score in scores[i : i + n]] for i in range(0, n * size, n)]
        assert row[f"eval/pass_at_{n}"] == pytest.approx(statistics.fmean(map(any, passed)))
        assert row["eval/pass_at_1"] == pytest.approx(statistics.fmean(itertools.chain(*passed)))
        assert {key for key in row if "pass" in key} == {"eval/pass_at_1", f"eval/pass_at_{n}"}
        rewards = [len(text) / 2 - score for text, score in zip(completions, scores)]
        assert row["eval/reward"] == pytest.approx(statistics.fmean(rewards), rel=1e-5)
        shown = [sample for sample in samples if sample["step"] == row["step"]]
        assert [sample["prompt"] for sample in shown] == held_out
        assert [sample["completion"] for sample in shown] == completions[::n]
        assert [sample["reward"] for sample in shown] == pytest.approx(rewards[::n], rel=1e-5)
    assert len({row["eval/pass_at_1"] for row in rows} | {0, 1}) > 2


@scripts("grpo")
def test_kl_of_a_sample_is_that_from_the_start(script, go, starts, monkeypatch):
    """log pi - log pi_ref of its tokens, EOS included, under the models as they are saved."""
    batches, rollout = [], script.module.rollout

    def record(*inputs, **options):
        drawn = rollout(*inputs, **options)
        batches.append(drawn[0])
        return drawn

    monkeypatch.setattr(script.module, "rollout", record)
    run = go("run", eval_samples=4, learning_rate=1e-2)
    samples = read(run / "samples.jsonl")[4:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    models = [script.load(folder) for folder in (starts / "small_run1", run)]
    for sample, (prompt, response) in zip(samples, rows_of(batches[-1]), strict=True):
        assert tokenizer(sample["prompt"])["input_ids"] == prompt
        with torch.no_grad():
            logprobs = [naive_logprobs(model, prompt + response) for model in models]
        ref, pi = (x[len(prompt) - 1 :].sum().item() for x in logprobs)
        assert sample["kl"] == pytest.approx(pi - ref, abs=1e-4)
    kls = [sample["kl"] for sample in samples]
    assert len(kls) == 4 and max(map(abs, kls)) > 0.1
    row = read(run / "metrics.jsonl")[-1]
    assert row["step"] == 3 and row["eval/kl"] == pytest.approx(statistics.fmean(kls), abs=1e-5)


SAME = [({"kl_estimator": "k3"}, {}), ({"kl_estimator": "k1"}, {"kl_in": "reward"}),
        ({"reward_weights": (1.0, 1.0)}, {})]


@pytest.fixture(scope="session")
def trained_weights():
    """The weights that runs of `weights_of` ended with, by their flags."""
    return {}


@pytest.fixture
def weights_of(script, go, starts, many_ends, trained_weights):
    """weights_of(**flags): the last ones of a run on two rewards with ties, as one vector."""
    def run(**flags):
        key = repr(sorted(flags.items()))
        if key not in trained_weights:
            rewards = reward_specs(script, starts, "rewards.py:odd", "rewards.py:brief")
            few = {"max_new_tokens": 6, "total_episodes": 16, "eval_samples": 1}  # two updates
            folder = go(f"run {len(trained_weights)}", **{"model": many_ends, **few, **rewards, **flags})
            weights = load_file(folder / "model" / "model.safetensors")
            trained_weights[key] = torch.cat([weights[part].flatten() for part in sorted(weights)])
        return trained_weights[key]

    return run


@scripts("grpo")
@pytest.mark.parametrize("flags, more", MATTERS, ids=str)
def test_option_changes_the_weights(weights_of, flags, more):
    """By 1e-5 on average, a hundredth of a step; micro-batches, which must not, by less than 1e-7."""
    assert (weights_of(**more) - weights_of(**{**more, **flags})).abs().mean() > 1e-5
    assert (weights_of() - weights_of(micro_batch_size=1)).abs().mean() < 1e-7


@scripts("grpo")
@pytest.mark.parametrize("flags, more", SAME, ids=str)
def test_option_by_its_own_name(weights_of, flags, more):
    """What --kl-estimator auto stands for, and a weight of 1 each: the same to the last bit."""
    assert torch.equal(weights_of(**more), weights_of(**{**more, **flags}))
