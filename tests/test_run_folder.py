"""The folder of a run: its files and what is in them, saved models as others load them, a file scored with a
reward model, the start that is made when it is missing, and Weights & Biases.
"""

import dataclasses
import importlib.util
import itertools
import json
import shutil
import signal
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE
from safetensors.torch import load_file
from tiny_runs import (
    ASK, DEMONSTRATION, EVERY_STEP, OF_CRITIC, PROMPT, REFUSE, REPLY, SAMPLERS, SCRIPTS, copy_model, count_tokens,
    files_in, first_of, head, launch, read, result, scripts, trained_rows, two_steps, write)

import common

# ---- Files of a run ----


def test_run_folder(script, tiny, go, starts):
    run = go("run", eval_every=1, save_every=1)
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", *script.parts}  # and no state/
    record = json.loads((run / "args.json").read_text())
    flags = json.loads(json.dumps(dataclasses.asdict(tiny(eval_every=1, save_every=1, output_dir=str(run)))))
    assert {key: record[key] for key in flags} == flags
    assert record["torch"] == torch.__version__ and record["transformers"] == transformers.__version__
    assert record["device"] == "cpu" and 0 < record["seconds"] < 600
    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]
    assert set(rows[1]) == EVERY_STEP | script.step_metrics
    assert set(rows[0]) == set(rows[2]) == {"step"} | script.eval_metrics
    samples = read(run / "samples.jsonl")
    assert all(set(row) == {"step"} | script.sample_columns for row in samples)
    held_out = read(starts / f"{script.name}_held_out.jsonl")
    first = samples[: len(samples) // 4]
    assert [row["step"] for row in samples] == [step for step in range(4) for _ in first]
    if script.name == "reward_model":
        ranks = [(row["comparison"], row["text"], row["rank"]) for row in samples]
        assert ranks == ranked_texts(held_out) * 4
    else:
        assert [row["prompt"] for row in samples] == [row["prompt"] for row in held_out] * 4


def ranked_texts(rows) -> list[tuple[int, str, int]]:
    """(number of the comparison, prompt and completion, rank) of each completion of rows of comparisons, best first."""
    ranked = []
    for k, row in enumerate(rows):
        texts = row.get("completions", [row.get("chosen"), row.get("rejected")])
        ranks = row.get("ranking", [1, 2])
        best_first = sorted(zip(ranks, texts), key=lambda both: both[0])
        ranked += [(k, row["prompt"] + text, rank) for rank, text in best_first]
    return ranked


@scripts("ppo")
def test_run_folder_without_critic(script, go):
    run = go("run", critic="none")
    assert not (run / "critic").exists()
    assert set(read(run / "metrics.jsonl")[1]) == (EVERY_STEP | script.step_metrics) - OF_CRITIC


def test_main_returns_the_last_metrics(script, tiny, tmp_path, no_pictures):
    """And leaves no signal handler behind."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    last = script.module.main(tiny())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert {**rows[-2], **rows[-1]} == {"step": 3, **last}


def test_wandb_mirrors_what_tensorboard_gets(go, monkeypatch):
    """Stand-ins for the packages, which the tests must not need: W&B is asked once, before the writer is made,
    to mirror it (its project is that of the variable WANDB_PROJECT), and the writer gets what the file gets.
    """
    calls, scalars = [], {}

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, name, value, step):
            scalars.setdefault(step, {})[name] = value

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: calls.append(options)))
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run = go("films", track=True)
    asked, folder = calls
    assert asked["name"] == "films" and asked["config"]["learning_rate"] == 1e-3 and folder == str(run)
    assert asked["sync_tensorboard"] is True and "project" not in asked
    merged = {}
    for row in read(run / "metrics.jsonl"):
        merged.setdefault(row.pop("step"), {}).update(row)
    assert scalars == merged


# ---- Saved models ----


def test_saved_model_is_the_trained_one(script, go, trained):
    """As anyone loads it, the critic of ppo.py too."""
    run = go("run")
    assert set(trained) == set(script.parts)
    for part in script.parts:
        tokenizer, model = transformers.AutoTokenizer.from_pretrained(run / part), script.load(run, part)
        text = PROMPT + DEMONSTRATION["completion"]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert tokenizer.decode(ids[0]) == text
        want = trained[part].eval()
        with torch.no_grad():  # kernels depend on where a tensor lies in memory
            assert (model(ids).logits - want(ids).logits).abs().max() < 1e-6
        assert set(model.state_dict()) == set(want.state_dict())
        assert all(torch.equal(weight, want.state_dict()[key]) for key, weight in model.state_dict().items())
        files = {path.name for path in (run / part).iterdir()}
        assert "model.safetensors" in files and not any(file.endswith((".bin", ".pt")) for file in files)


@scripts(*SAMPLERS)
def test_the_right_models_are_trained(script, whole, starts):
    """The policy, and the critic; neither the reference's nor the reward model's weights are what is saved."""
    run = whole()
    for part, start in zip(script.parts, ("small_run1", "small_reward1")):
        before = load_file(starts / start / "model" / "model.safetensors")
        after = load_file(run / part / "model.safetensors")
        moved = [key for key in after if key in before and not torch.equal(before[key], after[key])]
        assert len(moved) == len(before) > 10
        if part == "critic":
            assert after["score.bias"] != 0


@scripts("sft", "dpo", *SAMPLERS)
def test_saved_model_generates_to_eos(script, whole):
    run = whole()
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(run / "model"), script.load(run)
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    assert eos == [tokenizer.eos_token_id] and pad not in eos
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * 64)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=48)
    rows = rows[:, ids.shape[1] :].tolist()
    ended = [row.index(eos[0]) for row in rows if eos[0] in row]
    assert len(ended) > 4 and min(ended) < 40
    for row in rows:
        assert eos[0] not in row or set(row[row.index(eos[0]) + 1 :]) <= {pad}


@pytest.fixture
def chat_ends(starts, tmp_path):
    """A start that pads with its EOS and, as chat models do, ends with any of several tokens, of which
    generation_config.json alone tells.
    """
    tokenizer = json.loads((starts / "run1" / "model" / "tokenizer_config.json").read_text())
    return copy_model(starts, tmp_path / "ends", generation_config__json=b'{"eos_token_id": [7, 1]}',
                      tokenizer_config__json=json.dumps({**tokenizer, "pad_token": "<eos>"}).encode())


@scripts("sft", "dpo", *SAMPLERS)
def test_pad_that_is_eos_and_several_eos(script, go, starts, chat_ends):
    """EOS is trained all the same, and any of them ends a sample."""
    run = go("run", model=str(chat_ends))
    saved = transformers.GenerationConfig.from_pretrained(run / "model")
    assert saved.eos_token_id == [1, 7] and saved.pad_token_id not in (1, 7)
    if not script.is_sampler:
        rows = read(starts / f"{script.name}.jsonl")
        assert trained_rows(run)[-1]["num_tokens"] == sum(map(count_tokens, rows))


@pytest.fixture
def reward_of_chat(chat_ends, starts, tmp_path):
    """The run of a reward model that is trained from `chat_ends`."""
    for file in ("reward_model.jsonl", "reward_model_held_out.jsonl"):
        shutil.copy(starts / file, tmp_path / file)
    two_steps(tmp_path, SCRIPTS["reward_model"], chat_ends, "reward")
    return tmp_path / "reward"


@pytest.mark.parametrize("start", ["run1", "ends"])
def test_saved_reward_model_is_one_for_others(request, starts, start):
    """transformers and vLLM read a row's score at the last token that is not padding, so pad is no EOS, and
    squash it unless the problem is called a regression. The mean reward of the held-out completions is 0.
    """
    folder = starts / "reward1" if start == "run1" else request.getfixturevalue("reward_of_chat")
    model = SCRIPTS["reward_model"].load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    config, kept = model.config, read(folder / "samples.jsonl")
    assert config.num_labels == 1 and config.problem_type == "regression"
    assert config.eos_token_id in ([[1, 7]] if start == "ends" else [[1], 1])
    assert config.pad_token_id == tokenizer.pad_token_id not in (None, 1, 7)
    last = [row for row in kept if row["step"] == kept[-1]["step"]]
    batch = tokenizer([row["text"] + tokenizer.eos_token for row in last], padding=True, return_tensors="pt")
    for mask in (batch["attention_mask"], None):  # in one padded batch
        with torch.no_grad():
            scores = model(input_ids=batch["input_ids"], attention_mask=mask).logits[:, 0]
        assert scores.tolist() == pytest.approx([row["reward"] for row in last], abs=1e-5)
    held_out = read(starts / "reward_model_held_out.jsonl")
    sizes = [len(row.get("ranking", [1, 2])) for row in held_out]
    assert len(last) == sum(sizes)
    means = [part.mean() for part in scores.split(sizes)]  # each comparison counts the same
    assert config.reward_mean == pytest.approx(torch.stack(means).mean().item(), abs=1e-5)
    row = read(folder / "metrics.jsonl")[-1]
    assert config.reward_mean == row["eval/mean_reward"] and config.held_out_accuracy == row["eval/accuracy"]


@scripts(*SAMPLERS)
def test_reward_model_with_a_pad_token_of_its_own(script, go, chat_ends, reward_of_chat):
    """reward_model.py adds one where pad is EOS: the policy's tokens are still all known to it."""
    run = go("run", model=str(chat_ends), **script.flag("reward", str(reward_of_chat / "model")))
    assert trained_rows(run)


def test_chat_template_is_saved(script, go, starts, tmp_path):
    """Message lists train with a chat template, and the template travels with the model."""
    flags = {}
    for flag, kind in script.model_flags.items():
        folder = copy_model(starts, tmp_path / flag, run=f"{kind}1", chat_template__jinja=CHAT_TEMPLATE.encode())
        flags |= script.flag(flag, str(folder))
    path = write(tmp_path / "chat.jsonl", script.chat)
    run = go("run", **flags, dataset=path, eval_dataset=path)
    for part in script.parts:
        assert transformers.AutoTokenizer.from_pretrained(run / part).chat_template == CHAT_TEMPLATE


@scripts("dpo", "reward_model")
def test_implicit_prompt_of_messages(go, starts, tmp_path):
    """The same rows with their prompt given and shared (UltraFeedback, HH as messages): the same run."""
    folder = copy_model(starts, tmp_path / "model", chat_template__jinja=CHAT_TEMPLATE.encode())
    sides = [(REPLY, REFUSE), (REFUSE, REPLY)]
    given = write(tmp_path / "given.jsonl", [{"prompt": [ASK], "chosen": [a], "rejected": [b]} for a, b in sides])
    shared = write(tmp_path / "shared.jsonl", [{"chosen": [ASK, a], "rejected": [ASK, b]} for a, b in sides])
    runs = [go(Path(path).stem, model=str(folder), dataset=path, eval_dataset=path) for path in (given, shared)]
    assert result(runs[0]) == result(runs[1])


def in_bf16(starts, folder, run, script):
    """A start with its weights in bf16."""
    copy_model(starts, folder, run=run)
    script.load(starts / run).bfloat16().save_pretrained(folder)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    return folder


def test_bf16_checkpoint_trains_in_fp32(script, go, tiny, starts, tmp_path):
    """A step of 1e-6 does not move a bf16 weight of 0.05, whose grid is 2e-4: each matrix must move."""
    policy = in_bf16(starts, tmp_path / "half", "run1", SCRIPTS["sft"])
    folders, flags, num_steps = {"model": policy}, {}, first_of(4, tiny()) - 1
    if script.is_sampler:
        reward = in_bf16(starts, tmp_path / "half_reward", "reward1", SCRIPTS["reward_model"])
        flags = script.flag("reward", str(reward))
    if "critic" in script.parts:
        folders["critic"] = reward
        flags["critic_learning_rate"] = 1e-6
    run = go("run", model=str(policy), learning_rate=1e-6, anneal_lr=False, **flags)
    for part, folder in folders.items():
        before, after = (load_file(path / "model.safetensors") for path in (folder, run / part))
        assert {weight.dtype for weight in after.values()} == {torch.float32}
        assert script.load(run, part).dtype == torch.float32
        assert set(before) <= set(after) <= {*before, "score.weight", "score.bias"} and len(after) > 15
        has_head = script.parts[part] is not transformers.AutoModelForCausalLM
        for key, weight in before.items():
            change = (after[key] - weight.float()).abs()
            assert change.max() < 1.4e-6 * num_steps, key  # as many steps of AdamW
            if weight.dim() == 2 and not (has_head and "embed" in key):  # words that no row holds
                assert (change > 0).float().mean() > 0.9, key


# ---- A file scored with a reward model ----


@pytest.fixture
def scorer(starts, tmp_path):
    """A finished run of reward_model.py to score with."""
    return shutil.copytree(starts / "reward1", tmp_path / "scorer")


@scripts("reward_model")
@pytest.mark.parametrize("micro", [1, 4])
def test_score_file(script, tiny, scorer, starts, tmp_path, micro):
    """Each row with its score, as samples.jsonl has it, and less the mean; nothing else is touched."""
    held_out = read(starts / "reward_model_held_out.jsonl")
    rows = []
    for k, row in enumerate(held_out):
        for text in row.get("completions", [row.get("chosen"), row.get("rejected")]):
            rows.append({"prompt": row["prompt"], "completion": text, "number": [k]})
    path = write(tmp_path / "some.rows.jsonl", rows)
    before = files_in(tmp_path)
    last = launch(script, tiny(score=path, output_dir=str(scorer), micro_batch_size=micro))
    output = tmp_path / "some.rows.scores.jsonl"
    scored = read(output)
    assert [{key: row[key] for key in ("prompt", "completion", "number")} for row in scored] == rows
    assert all(set(row) == {"prompt", "completion", "number", "score", "reward"} for row in scored)
    model, tokenizer = script.load(scorer), transformers.AutoTokenizer.from_pretrained(scorer / "model")
    for row in scored:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            assert row["score"] == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)
        assert row["reward"] == pytest.approx(row["score"] - model.config.reward_mean, abs=1e-6)
    assert last["mean_reward"] == pytest.approx(statistics.fmean(row["reward"] for row in scored), abs=1e-6)
    after = files_in(tmp_path)
    assert after.pop(output) and after == before


@scripts("reward_model")
def test_score_with_a_reward_model_of_others(script, tiny, scorer, tmp_path):
    """Theirs knows no mean reward."""
    config = json.loads((scorer / "model" / "config.json").read_text())
    del config["reward_mean"], config["held_out_accuracy"]
    (scorer / "model" / "config.json").write_text(json.dumps(config))
    path = write(tmp_path / "rows.jsonl", SCRIPTS["sft"].rows(0, 3))
    launch(script, tiny(score=path, output_dir=str(scorer)))
    assert all(row["reward"] == row["score"] for row in read(tmp_path / "rows.scores.jsonl"))


@scripts("reward_model")
def test_held_out_rankings_and_a_single_pair(go, tmp_path):
    """The labels' ceiling, of the known chances or else the votes; one comparison has no spread, and JSON no NaN."""
    pairs = head("preferences_test", 0, 3)
    for k, rows in enumerate((pairs, pairs[:1], head("rankings_test", 0, 2))):
        path = write(tmp_path / f"{k}.jsonl", rows)
        row = read(go(f"run{k}", eval_dataset=path) / "metrics.jsonl")[-1]
        best = [max(row["p_chosen"], 1 - row["p_chosen"]) for row in rows if "p_chosen" in row]
        for ranking in [row["ranking"] for row in rows if "ranking" in row]:
            pairs = itertools.combinations(ranking, 2)
            best.append(statistics.fmean(0.5 if first == second else 1.0 for first, second in pairs))
        assert row["eval/accuracy_ceiling"] == pytest.approx(statistics.fmean(best))


# ---- A default start that is missing ----

NEEDS_A_START = [name for name, script in SCRIPTS.items() if script.made_by]


@scripts(*NEEDS_A_START)
def test_missing_start_is_made(script, go, whole, starts, tmp_path, monkeypatch):
    """A script whose default start does not exist runs the script that makes it, once, and ends with it."""
    monkeypatch.chdir(tmp_path)
    folders, calls = dict(zip(script.made_by, script.model_flags.values())), []

    def import_module(maker):
        def make(args):
            calls.append((maker, args))
            shutil.copytree(starts / f"{script.size}{folders[maker]}1" / "model", Path("runs", maker, "model"))

        return types.SimpleNamespace(Args=lambda: "its defaults", main=make)

    monkeypatch.setattr(common, "importlib", types.SimpleNamespace(import_module=import_module, util=importlib.util))
    made = [flag for flag, _ in zip(script.model_flags, script.made_by)]
    defaults = {flag: getattr(script.module.Args, flag) for flag in made}
    first, second = go("first", **defaults), go("second", **defaults)
    assert calls == [(maker, "its defaults") for maker in script.made_by]
    assert result(first) == result(second) == result(whole())


@scripts(*NEEDS_A_START)
def test_missing_start_that_cannot_be_made(script, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def fails(args):
        calls.append(args)
        raise SystemExit(5)

    failing = types.SimpleNamespace(Args=lambda: "its defaults", main=fails)
    importer = types.SimpleNamespace(import_module=lambda maker: failing, util=importlib.util)
    monkeypatch.setattr(common, "importlib", importer)
    with pytest.raises(SystemExit) as stop:
        launch(script, tiny(model=script.module.Args.model))
    assert stop.value.code == 5 and len(calls) == 1
