"""Bad input ends a script with one line that names it and says what to do: rows, flags, folders, rewards. Good
input of unusual kinds is accepted.
"""

import json
import math
import runpy
import sys

import pytest
import torch
import transformers
import tyro
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_runs import (
    ASK, BAD_REWARDS, CHAT_PAIR, DATA, DEMONSTRATION, PAIR, PROMPT, REFUSE, REPLY, SAMPLERS, SCRIPTS, as_flags,
    copy_model, read, reward_specs, scripts, trained_rows, write)

# ---- Rows ----

LONG = "very " * 600
THREE = {"prompt": PROMPT, "completions": [" good .", " okay .", " bad ."]}
RANKING = {**THREE, "ranking": [1, 2, 3]}
EVERY, PAIRS = "sft dpo reward_model ppo grpo", "dpo reward_model"
BAD_ROWS = {  # name: (the second of two rows, words of the error besides file:2, the scripts that read it)
    "not JSON": ('{"prompt": "what', [], EVERY),
    "not an object": ("[1, 2]", [], EVERY),
    "missing columns": ({"prompt": PROMPT, "colour": "red"}, ["prompt", "colour"], "sft dpo reward_model"),
    "missing prompt": ({"question": PROMPT, "colour": "red"}, ["prompt", "colour"], "ppo grpo"),
    "a number as prompt": ({"prompt": 5, "completion": "", "chosen": "a", "rejected": "b"}, ["prompt"], EVERY),
    "a null as prompt": ({"prompt": None}, ["prompt"], "ppo grpo"),
    "an empty prompt": ({"prompt": ""}, [], "ppo grpo"),  # nothing from which to choose the first token
    "a null": ({"prompt": PROMPT, "completion": None, "chosen": None, "rejected": " b"}, [],
               "sft dpo reward_model"),
    "no chat template": ({**CHAT_PAIR, "completion": [REPLY]}, ["chat template"], EVERY),
    "no chat template for messages": ({"messages": [ASK, REPLY]}, ["chat template"], "sft"),
    "no chat template, implicit prompt": ({"chosen": [ASK, REPLY], "rejected": [ASK, REFUSE]},
                                          ["chat template"], PAIRS),
    "no shared beginning": ({"chosen": "good", "rejected": "bad"}, ["prompt"], PAIRS),
    "numbers without prompt": ({"chosen": 5, "rejected": 6}, [], PAIRS),
    "text and messages without prompt": ({"chosen": "good", "rejected": [ASK, REFUSE]}, [], PAIRS),
    "no ranking of three": (THREE, ["ranking"], "reward_model"),
    "no ranking of two": ({**THREE, "completions": [" good .", " bad ."]}, ["ranking"], "reward_model"),
    "completions without prompt": ({"completions": [" good .", " bad ."], "ranking": [1, 2]}, ["prompt"],
                                   "reward_model"),
    "mu of a ranking": ({**RANKING, "mu": "high"}, ["mu"], "reward_model"),
    "no chat template, ranking": ({"prompt": [ASK], "completions": [[REPLY], [REFUSE]], "ranking": [1, 2]},
                                  ["chat template"], "reward_model")}
for mu in (1.5, -0.25, "high", "0.5", True, None, [1], math.nan):
    BAD_ROWS[f"mu {mu!r}"] = ({**PAIR, "mu": mu}, ["mu", repr(mu)], PAIRS)
for p in ("high", 1.5):
    BAD_ROWS[f"p_chosen {p!r}"] = ({**PAIR, "p_chosen": p}, ["p_chosen", repr(p)], "reward_model")
for ranking in ([1, 2], [1, 2, 3, 4], [], [1.0, 2.0, 3.0], ["1", "2", "3"], [True, True, False], [1, 2, None],
                "123", None):
    BAD_ROWS[f"ranking {ranking!r}"] = ({**THREE, "ranking": ranking}, ["ranking"], "reward_model")
for texts, ranking in (("good .", [1, 2]), ([" good ."], [1]), ([], []), (None, [1, 2]),
                       ([" good .", None], [1, 2]), ([" good .", 5], [1, 2])):
    BAD_ROWS[f"completions {texts!r}"] = ({**THREE, "completions": texts, "ranking": ranking}, [],
                                          "reward_model")


@pytest.mark.parametrize("name, case", [(name, case) for case, (*_, names) in BAD_ROWS.items()
                                        for name in names.split()])
def test_bad_row_is_named(script, refused, tmp_path, case):
    row, words, _ = BAD_ROWS[case]
    error = refused(dataset=write(tmp_path / "rows.jsonl", [script.row, row]))
    assert "rows.jsonl:2" in error
    assert all(word in error for word in words), error


@scripts("sft")
def test_bad_row_of_the_command(script, tiny, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rows.jsonl", [script.row, '{"prompt": '])
    monkeypatch.setattr(sys, "argv", ["sft.py", *as_flags(tiny(dataset=path))])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "sft.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {path}:2: ") and error.count("\n") == 1


@scripts("sft")
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_rows_without_a_token_to_train(refused, tmp_path, flag):
    assert "rows.jsonl" in refused(**{flag: write(tmp_path / "rows.jsonl", [{"text": ""}] * 2)})


@pytest.mark.parametrize("lines", [[], ["", "  "]], ids=["empty", "blank lines"])
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_empty_file_is_named(refused, tmp_path, lines, flag):
    assert "none.jsonl" in refused(**{flag: write(tmp_path / "none.jsonl", lines)})


@scripts("reward_model")
@pytest.mark.parametrize("ranking", [[1, 2, 3], [3, 1, 1], [2, 2, 2], [10, 7, 9], [0, -1, 5]], ids=str)
def test_good_rankings(go, tmp_path, ranking):
    """Any whole numbers: only their order counts, and equal ones are ties."""
    rows = [{**THREE, "ranking": ranking}, {**THREE, "completions": [" good .", " bad ."], "ranking": [2, 1]}]
    path = write(tmp_path / "rows.jsonl", rows)
    run = go("run", dataset=path, eval_dataset=path)
    assert [row["rank"] for row in read(run / "samples.jsonl")] == (sorted(ranking) + [1, 2]) * 2


@scripts(*SAMPLERS)
def test_long_prompts_are_dropped_and_counted(go, refused, tmp_path, capsys):
    good = {"prompt": PROMPT}
    seven, eight = ({"prompt": " ".join(["very"] * n)} for n in (7, 8))
    path = write(tmp_path / "rows.jsonl", [good, seven, eight, good])
    run = go("run", dataset=path, max_prompt_length=7)
    assert "1 of 4 prompts" in capsys.readouterr().out
    assert len(trained_rows(run)) == 3
    path = write(tmp_path / "long.jsonl", [eight])
    for flag in ("dataset", "eval_dataset"):
        error = refused(output_dir=str(tmp_path / flag), **{flag: path}, max_prompt_length=7)
        assert "long.jsonl" in error and "--max-prompt-length" in error


# ---- Flags ----

WHOLE_NUMBERS = ["batch_size", "micro_batch_size", "max_length", "eval_samples", "max_new_tokens", "num_minibatches",
                 "update_epochs", "max_prompt_length", "kl_horizon", "num_generations"]
NUMBERS = ["learning_rate", "critic_learning_rate", "temperature", "kl_coef", "target_kl", "clip_coef",
           "clip_coef_high", "max_grad_norm", "missing_eos_penalty"]
BAD_FLAGS = {  # name: (flags, words of the error)
    "batches": ({"batch_size": 4, "micro_batch_size": 3}, ["--batch-size 4", "--micro-batch-size 3"]),
    "episodes": ({"total_episodes": 10}, ["--total-episodes 10", "--batch-size", "--num-minibatches"]),
    "missing file": ({"dataset": "/nowhere/rows.jsonl"}, ["/nowhere/rows.jsonl"]),
    "missing held-out file": ({"eval_dataset": "/nowhere/rows.jsonl"}, ["/nowhere/rows.jsonl"]),
    "nothing as data set": ({"dataset": "nothing"}, ["nothing"]),
    "folder as data set": ({"dataset": str(DATA)}, [str(DATA)]),
    "nothing as model": ({"model": "nothing"}, ["--model nothing"]),
    "missing model": ({"model": str(DATA / "nothing")}, ["--model", str(DATA / "nothing")]),
    "folder without model": ({"model": str(ROOT / "tests")}, ["--model", str(ROOT / "tests")]),
    "file as output": ({"output_dir": str(DATA / "prompts.jsonl")}, ["--output-dir"]),
    "no checkpoint": ({"resume": True}, ["--resume", "checkpoint"])}
for flags, values in ((WHOLE_NUMBERS, (0, -4)), (NUMBERS, (-0.5, math.nan, math.inf))):
    for flag in flags:
        for value in values:
            BAD_FLAGS[f"{flag} {value}"] = ({flag: value}, [f"--{flag.replace('_', '-')}", str(value)])
for flag in ("num_train_epochs", "total_episodes"):  # 0 evaluates and trains nothing
    BAD_FLAGS[f"{flag} -4"] = ({flag: -4}, [f"--{flag.replace('_', '-')}", "-4"])
for size in (1, 3, 16):
    BAD_FLAGS[f"group of {size}"] = ({"num_generations": size}, [f"--num-generations {size}", "8"])
for value in (math.nan, math.inf, -math.inf):
    BAD_FLAGS[f"weight {value}"] = ({"reward_weights": (value,)}, ["--reward-weights", str(value)])
for weights in ((1.0, 1.0), (1.0, 2.0, 3.0)):
    BAD_FLAGS[f"weights {weights}"] = ({"reward_weights": weights},
                                       ["--reward", "--reward-weights", str(len(weights))])
for weights in ((), (1.0,)):
    BAD_FLAGS[f"no reward, weights {weights}"] = ({"reward": (), "reward_weights": weights}, ["--reward"])


@pytest.mark.parametrize("name, case", [(name, case) for name, script in SCRIPTS.items()
                                        for case, (flags, _) in BAD_FLAGS.items() if set(flags) <= set(script.flags)])
def test_bad_flag_is_named(refused, case):
    flags, words = BAD_FLAGS[case]
    error = refused(**flags)
    assert all(word in error for word in words), error


@scripts("dpo")
def test_ipo_at_beta_0_has_no_target(refused):
    assert "--beta" in refused(beta=0.0, loss_type="ipo")


@pytest.mark.parametrize("flags, words", [({"dataset": "owner/rows"}, "pip install datasets"),
                                          ({"track": True}, "pip install wandb")], ids=["datasets", "wandb"])
def test_missing_package_is_named(refused, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, words.split()[-1], None)
    assert words in refused(**flags)


def test_no_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refused(device="cuda")


@pytest.mark.parametrize("flags", [["--lerning-rate", "1"], ["--learning-rate", "fast"], ["--device", "tpu"]],
                         ids=" ".join)
def test_wrong_flag(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.module.Args, args=flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


@scripts(*SAMPLERS)
@pytest.mark.parametrize("specs, weights", [(["a.py:f"], ()), (["a.py:f", "folder", "b.py:g"], (1.0, -0.5, 0.0))],
                         ids=["one", "three"])
def test_rewards_of_the_command_line(script, tiny, specs, weights):
    args = tiny(reward=tuple(specs), reward_weights=weights)
    assert tyro.cli(script.module.Args, args=as_flags(args)) == args


@scripts(*SAMPLERS)
@pytest.mark.parametrize("second", [["--reward", "b.py:f"], ["--reward=b.py:f"]])
def test_a_repeated_reward_is_refused(refused, monkeypatch, second):
    """A parser keeps the last of two flags: the first reward would be lost without a word."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--reward", "a.py:f", *second, "--reward-weights", "1", "2"])
    assert "--reward" in refused()


# ---- Model folders ----

BROKEN = {"config": {"config__json": b"{"}, "model type": {"config__json": b'{"model_type": "nothing"}'},
          "tokenizer": {"tokenizer__json": b"{"}, "no tokenizer": {"drop": "tokenizer.json"},
          "weights": {"model__safetensors": b"not a header"}}
FOLDERS = [(name, flag, f"{kind}1") for name, script in SCRIPTS.items() for flag, kind in script.model_flags.items()]
every_folder = pytest.mark.parametrize("name, flag, run", FOLDERS, ids=[" ".join(ids) for ids in FOLDERS])


@every_folder
@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_broken_model_folder(script, refused, starts, tmp_path, flag, run, files):
    folder = copy_model(starts, tmp_path / "model", run=run, **files)
    assert f"--{flag} {folder}" in refused(**script.flag(flag, str(folder)))


def with_config(starts, folder, run, **options):
    """A model folder whose config.json has other values."""
    config = json.loads((starts / run / "model" / "config.json").read_text())
    return copy_model(starts, folder, run=run, config__json=json.dumps({**config, **options}).encode())


@every_folder
def test_weights_of_another_size(script, refused, starts, tmp_path, flag, run):
    folder = with_config(starts, tmp_path / "model", run, intermediate_size=128)
    assert f"--{flag} {folder}" in refused(**script.flag(flag, str(folder)))


@every_folder
def test_weights_that_are_missing(script, refused, starts, tmp_path, flag, run):
    """transformers draws them at random and says so in a warning that the scripts silence."""
    folder = with_config(starts, tmp_path / "model", run, num_hidden_layers=3)
    assert f"--{flag} {folder}" in refused(**script.flag(flag, str(folder)))


@every_folder
def test_only_safetensors_are_read(script, refused, starts, tmp_path, flag, run):
    folder = copy_model(starts, tmp_path / "model", drop="model.safetensors", run=run)
    torch.save(load_file(starts / run / "model" / "model.safetensors"), folder / "pytorch_model.bin")
    assert f"--{flag} {folder}" in refused(**script.flag(flag, str(folder)))


@every_folder
def test_poisoned_weights(script, refused, starts, tmp_path, flag, run):
    """A NaN in a folder is the folder's fault, and no learning rate helps."""
    folder = copy_model(starts, tmp_path / "model", run=run)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = refused(**script.flag(flag, str(folder)))
    assert "learning-rate" not in error and (flag == "model" or f"--{flag} {folder}" in error)
    assert not (tmp_path / "run" / "model").exists()


def gpt2(starts, folder, run="run1", kind=transformers.GPT2LMHeadModel, **options):
    """A tiny GPT-2 with the tokenizer of this start."""
    copy_model(starts, folder, drop="model.safetensors", run=run)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    kind(transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, pad_token_id=0,
                                 eos_token_id=1, **options)).save_pretrained(folder)
    return folder


def test_row_longer_than_the_models_positions(script, refused, starts, tmp_path):
    """GPT-2 looks its positions up in a table: a row longer than it ends in an index error."""
    folder = gpt2(starts, tmp_path / "model", n_positions=8)
    assert script.length_flag in refused(model=str(folder))


@scripts(*SAMPLERS)
def test_response_longer_than_the_reward_models_positions(script, refused, starts, tmp_path):
    folder = gpt2(starts, tmp_path / "model", "reward1", transformers.GPT2ForSequenceClassification,
                  n_positions=8, num_labels=1)
    critic = {"critic": "policy"} if "critic" in script.flags else {}
    assert f"--reward {folder}" in refused(**script.flag("reward", str(folder)), **critic)


@scripts("ppo")
def test_model_without_a_class_for_a_critic(refused, starts, tmp_path):
    """transformers has no token classifier of OPT: a critic cannot be made, whatever the reward is."""
    folder = copy_model(starts, tmp_path / "opt", drop="model.safetensors")
    transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=96, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1,
        max_position_embeddings=64, word_embed_proj_dim=16, eos_token_id=1, pad_token_id=0,
    )).save_pretrained(folder)
    assert "--critic" in refused(model=str(folder), critic="policy")


# ---- Learning rates that ruin a model ----


def test_divergence_names_step_and_learning_rate(script, refused, tmp_path):
    error = refused(learning_rate=1e30)
    assert "step 1" in error and "--learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


@scripts("ppo")
def test_divergence_of_the_critic(refused, tmp_path):
    error = refused(critic_learning_rate=1e30)
    assert "step 1" in error and "--critic-learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name, flag, rate", [
    *((name, "learning_rate", rate) for name in SCRIPTS for rate in (1e12, 1e39)),  # finite weights, or not
    ("ppo", "critic_learning_rate", 1e39)])
def test_divergence_in_the_last_step(script, refused, tmp_path, flag, rate):
    """The last update, too, may ruin the model: the evaluation behind it, or a look at it, shows it."""
    assert f"--{flag.replace('_', '-')}" in refused(**{flag: rate}, **script.one_step)
    assert not (tmp_path / "run" / "model").exists()


# ---- Rewards ----


@scripts(*SAMPLERS)
@pytest.mark.parametrize("function", [*BAD_REWARDS, ""])
def test_bad_reward_function_is_named(script, refused, rewards, function):
    error = refused(**script.flag("reward", f"{rewards}:{function}"))
    assert f"--reward {rewards}:{function}" in error
    assert {"raises": "colour", "needs": "colour", "missing": "missing"}.get(function, "") in error


@scripts(*SAMPLERS)
@pytest.mark.parametrize("content", [None, "def good(:", "import nothing_of_this_name"],
                         ids=["no file", "syntax", "import"])
def test_bad_reward_file_is_named(script, refused, tmp_path, content):
    path = tmp_path / "file.py"
    if content is not None:
        path.write_text(content)
    assert f"--reward {path}:good" in refused(**script.flag("reward", f"{path}:good"))


@scripts(*SAMPLERS)
@pytest.mark.parametrize("kind", ["nothing", "run1/model", "file without function", "two labels", "vocabulary"])
def test_bad_reward_folder_is_named(script, refused, starts, rewards, tmp_path, kind):
    """Above all a language model, to which transformers would add a random head."""
    spec = rewards if kind == "file without function" else str(starts / kind)
    if kind == "two labels":
        spec = str(copy_model(starts, tmp_path / "labels", run="reward1"))
        transformers.AutoModelForSequenceClassification.from_pretrained(
            spec, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(spec)
    elif kind == "vocabulary":  # two words change places
        tokenizer = (starts / "reward1" / "model" / "tokenizer.json").read_text()
        for old, new in ((" good", "@"), (" awful", " good"), ("@", " awful")):
            tokenizer = tokenizer.replace(f'"{old}"', f'"{new}"')
        spec = str(copy_model(starts, tmp_path / "other", run="reward1", tokenizer__json=tokenizer.encode()))
    assert f"--reward {spec}" in refused(**script.flag("reward", spec))


@scripts(*SAMPLERS)
@pytest.mark.parametrize("function", BAD_REWARDS)
def test_bad_reward_among_several_is_named(script, refused, starts, rewards, function):
    """A None is bad where no other function scores the completion."""
    other = function if function in ("nones", "silent") else "good"
    error = refused(**reward_specs(script, starts, f"rewards.py:{other}", f"rewards.py:{function}"))
    assert "--reward " in error and f"{rewards}:{function}" in error


@scripts(*SAMPLERS)
def test_language_model_among_several_rewards_is_named(script, refused, starts):
    specs = reward_specs(script, starts, "rewards.py:good", "run1/model")
    assert f"--reward {starts / 'run1/model'}" in refused(**specs)


@pytest.mark.parametrize("name, others", [("ppo", []), ("grpo", []), ("grpo", ["rewards.py:good"])], ids=str)
def test_reward_model_that_does_not_know_every_word(script, refused, starts, tmp_path, others):
    """A NaN of its is no None: the model is named, and nothing trained on the other rewards alone."""
    folder = copy_model(starts, tmp_path / "model", run="reward1")
    weights, tokenizer = load_file(folder / "model.safetensors"), transformers.AutoTokenizer.from_pretrained(folder)
    rows = read(starts / f"{script.name}.jsonl") + read(starts / f"{script.name}_held_out.jsonl")
    known = {tokenizer.eos_token_id, 0}  # and padding, so that the try before the run finds nothing
    for row in rows:
        known.update(tokenizer(row["prompt"])["input_ids"])
    unknown = [token for token in range(len(tokenizer)) if token not in known]
    weights["model.embed_tokens.weight"][unknown] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = refused(**script.flag("reward", str(folder), *(str(starts / other) for other in others)))
    assert "--reward " in error and str(folder) in error and "learning-rate" not in error


@scripts(*SAMPLERS)
def test_reward_file_may_hold_any_python(script, go, tmp_path):
    """Dataclasses with postponed annotations look their module up by its name."""
    (tmp_path / "typed.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Score:
    value: float

def typed(prompts, completions, **columns):
    return [Score(1.0).value for _ in completions]
""")
    run = go("run", total_episodes=8, **reward_specs(script, tmp_path, "typed.py:typed"))
    assert trained_rows(run)


PICKLED = """
import pickle
from dataclasses import dataclass

@dataclass
class Score:
    value: float

def one(prompts, completions, **columns):
    return [pickle.loads(pickle.dumps(Score(1.0))).value for _ in completions]

def two(prompts, completions, **columns):
    return [pickle.loads(pickle.dumps(Score(2.0))).value for _ in completions]
"""


@scripts("grpo")
@pytest.mark.parametrize("specs", [("a.py:one", "a.py:two"), ("a.py:one", "b.py:two")], ids=["a file", "two files"])
def test_each_reward_finds_its_own_module(script, go, tmp_path, specs):
    """By its name, as pickle does, and with it a pool of processes."""
    for spec in specs:
        (tmp_path / spec.split(":")[0]).write_text(PICKLED)
    rows = trained_rows(go("run", total_episodes=8, **reward_specs(script, tmp_path, *specs)))
    assert [row["reward"] for row in rows] == [3]


# ---- Files to score with reward_model.py ----


@scripts("reward_model")
@pytest.mark.parametrize("kind", ["nothing", "run1", "unfinished"])
def test_score_without_a_reward_model(refused, starts, tmp_path, kind):
    """A language model has no head for it; the flag to change is not --model."""
    folder = starts / kind
    if kind == "unfinished":
        folder = tmp_path / "unfinished"
        (folder / "state").mkdir(parents=True)
    error = refused(score=str(starts / "sft.jsonl"), output_dir=str(folder))
    assert str(folder) in error and ("--score" in error or "--output-dir" in error)


@scripts("reward_model")
@pytest.mark.parametrize("rows", [["{"], [], [{"prompt": PROMPT}]], ids=["not JSON", "empty", "column"])
def test_bad_file_to_score(refused, starts, tmp_path, rows):
    path = write(tmp_path / "bad.jsonl", [DEMONSTRATION, *rows] if rows else [])
    error = refused(score=path, output_dir=str(starts / "reward1"))
    assert (f"{path}:2" if rows else path) in error
    assert not (tmp_path / "bad.scores.jsonl").exists()


@scripts(*SAMPLERS)
def test_a_watched_reward_does_not_stand_in_for_none(script, refused, tmp_path):
    """With weight 0 it is no score: a response that no other reward judges would be worth 0 without a word."""
    path = tmp_path / "both.py"
    path.write_text("def none(prompts, completions, **columns):\n    return [None] * len(prompts)\n\n\n"
                    "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    specs = script.flag("reward", f"{path}:none", f"{path}:one")
    assert "None for a completion" in refused(**specs, reward_weights=(1.0, 0.0))
