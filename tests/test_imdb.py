"""benchmarks/imdb.py: its gold reward, pairs and best-of-n against hand-made answers and enumeration, its flags, its
table, and one tiny run on real reviews, which takes what has ended as it is when it is repeated.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import imdb
import pytest
import torch
import tyro
from conftest import ROOT, SHARED
from tiny_runs import read, without_pictures

RESULT = json.loads((ROOT / "benchmarks" / "results" / "imdb.json").read_text())
TEXT = (ROOT / "benchmarks" / "README.md").read_text()
HAS_REVIEWS = (SHARED / "data" / "imdb.train.jsonl").exists()
needs_reviews = pytest.mark.skipif(not HAS_REVIEWS, reason=f"real reviews are not at {SHARED / 'data'}")


# ---- Best of n ----


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = torch.tensor([[0.3, -1.0, 2.0, 0.9, 2.5], [5.0, 5.0, 4.0, 4.5, -3.0]], dtype=torch.float64)
    for n in range(1, 6):
        means = []
        for row in rewards.tolist():
            best = [max(subset) for subset in itertools.combinations(row, n)]
            means.append(sum(best) / len(best))
        assert imdb.best_of(rewards, n) == pytest.approx(sum(means) / 2, abs=1e-12)


def test_kl_of_best_of_n():
    """K outcomes of equal chance, all rewards different: the k-th is best with (k / K)^n - ((k - 1) / K)^n."""
    for n in (1, 2, 7, 64):
        for K, tolerance in ((10, None), (200_000, 1e-3)):
            k = torch.arange(1, K + 1, dtype=torch.float64)
            p = (k / K) ** n - ((k - 1) / K) ** n
            kl = torch.xlogy(p, p * K).sum().item()
            assert kl <= imdb.best_of_kl(n) + 1e-9
            if tolerance:
                assert kl == pytest.approx(imdb.best_of_kl(n), abs=tolerance)


# ---- The gold reward ----

REVIEWS = [
    {"text": "Good, good film", "label": 1}, {"text": "a good plot", "label": 1}, {"text": "bad film", "label": 0},
    {"text": "a BAD plot isn't good", "label": 0}, {"text": "film", "label": 1}, {"text": "plot", "label": 0},
]  # fmt: skip


def test_the_gold_model_is_the_maximum_of_the_penalized_likelihood():
    penalty = 0.1
    model = imdb.fit_gold(REVIEWS, least=2, penalty=penalty)
    words = list(model["weights"])
    assert words == ["a", "bad", "film", "good", "plot"]  # isn't is one word, of one text
    X = torch.tensor([[1, 0, 0, 0, 0]] * 6, dtype=torch.float64)
    for row, bag in enumerate(["good film", "a good plot", "bad film", "a bad plot good", "film", "plot"]):
        X[row] = torch.tensor([float(word in bag.split()) for word in words])
    w = torch.tensor(list(model["weights"].values()), dtype=torch.float64)
    y = torch.tensor([row["label"] for row in REVIEWS], dtype=torch.float64)
    error = torch.sigmoid(X @ w + model["bias"]) - y
    assert error.sum().abs() < 1e-4  # of the bias, which is not penalized
    assert (X.T @ error / 6 + penalty * w).abs().max() < 1e-4
    assert model["weights"]["good"] > 0.1 > -0.1 > model["weights"]["bad"]


def test_the_written_reward(tmp_path):
    """It reads prompt and completion as one text, each word once, in lower case."""
    weights = {"good": 1.0, "bad": -2.0, "goodness": 8.0}
    model = {"word": imdb.WORD, "bias": 0.25, "weights": weights, "scale": 3.0}
    (tmp_path / "gold.json").write_text(json.dumps(model))
    (tmp_path / "gold.py").write_text(imdb.GOLD)
    spec = importlib.util.spec_from_file_location("gold_of_test", tmp_path / "gold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rewards = module.reward(["A good", "good", "bad"], ["ness film, good", " Good GOOD film", " x"], label=[1, 2, 3])
    assert rewards == [3 * (0.25 + 8.0 + 1.0), 3 * (0.25 + 1.0), 3 * (0.25 - 2.0)]
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 1}, {"text": "bad good", "label": 0}]
    assert imdb.accuracy(model, rows) == pytest.approx(2 / 3)


# ---- Reviews ----


def test_reviews_of_a_folder_of_texts(tmp_path, capsys):
    for name, text in (("neg", "bad<br />film"), ("pos", "good")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        (folder / "0_1.txt").write_text(text)
    assert imdb.read_reviews(str(tmp_path), "train") == [
        {"text": "bad film", "label": 0}, {"text": "good", "label": 1}]  # fmt: skip
    with pytest.raises(SystemExit):
        imdb.read_reviews(str(tmp_path), "test")
    assert "imdb.test.jsonl" in capsys.readouterr().err


def test_beginnings(bpe_tokenizer):
    texts = ["hello there. Answer me! help me out of here and so on and on and on and on and on",
             "no end of a sentence here, so that nothing is left of it at all and so on",
             "hello. there is a longer sentence behind it. And one. " + "hello there " * 20]  # fmt: skip
    rows = imdb.beginnings(bpe_tokenizer, texts * 40, 24, seed=0)
    assert 40 <= len(rows) <= 80
    lengths = set()
    for row in rows:
        whole = row["prompt"] + row["completion"]
        assert any(text.startswith(whole) for text in texts) and whole[-1] in ".!" and row["completion"]
        ids = bpe_tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert len(ids) < 24
        assert any(bpe_tokenizer.decode(ids[:k]) == row["prompt"] for k in range(2, 9))
        lengths.add(len(bpe_tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]))
    assert len(lengths) >= 5


def test_pairs_follow_bradley_terry(tmp_path, monkeypatch):
    """4,000 prompts with samples of reward 1 and 0, in either order, and some that are no pairs."""
    n, eos = 4000, 7
    rows, responses, texts, rewards = [], [], [], []
    for k in range(n):
        for side in range(2):
            good = side == k % 2
            rows.append({"prompt": f"p{k}"})
            responses.append([3, 4] if k % 10 == 9 and good else [3, eos])  # the former has no end
            texts.append("same" if k % 10 == 8 else "good" if good else "bad")
            rewards.append(1.0 if good else 0.0)
    tokenizer = SimpleNamespace(batch_decode=lambda *_, **__: texts)
    world = SimpleNamespace(reference=SimpleNamespace(tokenizer=tokenizer, eos_ids=[eos]),
                            gold=lambda *_: torch.tensor(rewards))  # fmt: skip
    monkeypatch.setattr(imdb, "answer", lambda *_: (rows, None, responses, None))
    imdb.make_pairs(world, rows, tmp_path, 1)
    held_out, pairs = read(tmp_path / "pairs_test.jsonl"), read(tmp_path / "pairs.jsonl")
    assert len(held_out) + len(pairs) == 0.8 * n and len(held_out) == 355
    assert {row["prompt"] for row in held_out}.isdisjoint(row["prompt"] for row in pairs)
    p = 1 / (1 + math.exp(-1))
    for order in (0, 1):
        some = [row for row in held_out + pairs if int(row["prompt"][1:]) % 2 == order]
        wins = [row["chosen"] == "good" for row in some]
        assert sum(wins) / len(wins) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(wins)))
        for row, win in zip(some, wins):
            assert {row["chosen"], row["rejected"]} == {"good", "bad"}
            assert row["p_chosen"] == pytest.approx(p if win else 1 - p, abs=1e-6)
    preferred = read(tmp_path / "preferred.jsonl")
    assert [(row["prompt"], row["completion"]) for row in preferred] == [(row["prompt"], row["chosen"]) for row in pairs]


# ---- The runs ----


@pytest.mark.parametrize("kind", imdb.FLAGS)
def test_the_flags_are_the_scripts_own(kind):
    for script, flags in imdb.FLAGS[kind].items():
        name = "sft" if script == "preferred-FT" else script.removesuffix(".py")
        args = tyro.cli(importlib.import_module(name).Args, args=shlex.split(flags))
        if name in ("ppo", "grpo"):
            assert args.total_episodes % (args.batch_size * args.num_minibatches) == 0


def in_process(commands):
    """subprocess.run for the project's scripts, without the seconds that a process needs to start."""

    def run(command, check):
        _, file, *words = command
        commands.append(Path(file).name)
        module = importlib.import_module(Path(file).stem)
        with without_pictures():
            module.main(tyro.cli(module.Args, args=words))

    return run


@needs_reviews
def test_a_tiny_run_on_real_reviews(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    monkeypatch.setattr(imdb, "VOCABULARY", 600)
    monkeypatch.setattr(imdb, "SMALL", imdb.SMALL | {"hidden_size": 16, "intermediate_size": 16})
    commands = []
    monkeypatch.setattr(imdb, "read_reviews", functools.cache(imdb.read_reviews))
    picture = imdb.picture
    is_whole = lambda result: len(result["points"]) == len(imdb.STYLES)
    monkeypatch.setattr(imdb, "picture", lambda result, file: is_whole(result) and picture(result, file))
    monkeypatch.setattr(imdb.subprocess, "run", in_process(commands))
    args = imdb.Args(
        data=str(SHARED / "data"), folder=str(tmp_path / "runs"), output=str(tmp_path / "out"), dpo_betas=[0.1],
        ppo_gold=[0.1], grpo_gold=[0.1], ppo_learned=[0.2], grpo_learned=[0.2], pairs=100, prompts=8, reference_samples=64, policy_samples=8,
        max_tokens=32, every=20, tiny=True)  # fmt: skip
    result = imdb.main(args)
    assert commands == ["sft.py", "reward_model.py", "dpo.py", "sft.py", *["ppo.py", "grpo.py"] * 2]
    assert {point["method"] for point in result["points"]} == {*imdb.STYLES}
    for point in result["points"]:
        assert point["kl"] > 0 and 0 < point["length"] <= 32 and ("learned" in point) == ("learned" in point["method"])
    assert 0.5 < result["gold"]["test_accuracy"] < 0.9
    rewards = torch.tensor(read(tmp_path / "runs" / "pool.json")[0]["rewards"], dtype=torch.float64)
    assert rewards.shape == (8, 64) and result["start"]["gold"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps({**result, "points": [], "start": {}, "reward_models": {}})
    monkeypatch.setattr(imdb, "picture", lambda *_: None)
    again = imdb.main(args)
    assert len(commands) == 8  # nothing was run anew
    for name in ("points", "start", "best_of_n", "optimum"):
        assert again[name] == result[name]


# ---- The results ----


def test_means_over_seeds():
    points = [{"method": "DPO", "setting": 0.2, "gold": x, "gold_se": 9.0, "kl": 1.0, "kl_se": 0.5, "length": 10 * x,
               "best_of_n_at_kl": 1.0, "optimum_at_kl": None if x > 2 else 1.0, "cpu_seconds": 7.4} for x in (1.0, 2.0, 4.5)]
    other = {**points[0], "setting": 0}
    assert imdb.over_seeds([points[0], other, *points[1:]]) == [points, [other]]
    assert imdb.cells_of(points) == ["0.2", "2.50 ± 1.04", "1.00 ± 0.00", "1.00", "", "25.0", "7"]
    assert imdb.cells_of([other]) == ["", "1.00 ± 9.00", "1.00 ± 0.50", "1.00", "1.00", "10.0", "7"]


def test_the_results_hold_what_is_claimed():
    start, sizes = RESULT["start"]["gold"], dict((n, reward) for n, reward, _ in RESULT["best_of_n"])
    assert sizes[1] == pytest.approx(start, rel=1e-4)
    for n, reward, kl in RESULT["best_of_n"]:
        assert reward >= start and kl == pytest.approx(imdb.best_of_kl(n), rel=1e-4)
    for point in RESULT["points"]:
        assert point["method"] in imdb.STYLES and point["command"].startswith("python ")
        for _, reward, kl, ess in RESULT["optimum"]:
            if ess >= imdb.LEAST_ESS and abs(kl - point["kl"]) < 0.02:
                assert point["gold"] < reward + 4 * point["gold_se"]  # the optimum's row is of the same KL
    assert not any(word in json.dumps(RESULT) for word in ("/work", "/tmp", "/root"))


def test_the_table_is_that_of_the_results():
    section = TEXT.partition("## Real reviews")[2].partition("\n## ")[0]
    lines = []
    for line in section.splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if cells[0] in imdb.STYLES:
            lines.append(cells)
    groups = imdb.over_seeds(RESULT["points"])
    assert lines == [[points[0]["method"], *imdb.cells_of(points)] for points in groups]
    assert {len(points) for points in groups} == {len(RESULT["args"]["seeds"])}
    gold, start = RESULT["gold"], RESULT["start"]
    reward_model = {}
    for name in ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/accuracy_ceiling"):
        values = [found[name] for found in RESULT["reward_models"].values()]
        reward_model[name] = sum(values) / len(values)
    best = {n: f"{reward:.2f} at most {kl:.2f}" for n, reward, kl in RESULT["best_of_n"]}
    for words in (f"{gold['held_out_accuracy']:.3f}", f"{gold['test_accuracy']:.3f}",
                  f"{gold['test_accuracy_of_30_words']:.3f}", f"{start['eval/loss']:.2f}", f"{start['gold']:.2f}",
                  f"{start['length']:.1f} tokens", f"{start['parameters']:,} parameters", f"{start['spread']:.2f}",
                  f"{reward_model['eval/accuracy']:.3f}", f"{reward_model['eval/accuracy_low']:.3f}",
                  f"{reward_model['eval/accuracy_high']:.3f}", f"{reward_model['eval/accuracy_ceiling']:.3f}",
                  f"{RESULT['cpu_seconds'] / 60:.0f} CPU minutes", best[4], best[64]):  # fmt: skip
        assert words in " ".join(section.split()), words
