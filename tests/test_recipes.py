"""benchmarks/recipes.md: each diff applies to the script as it is today and does what its formula says; each command
has its flags; the commands and files that are no diff are run, in small.

    python tests/test_recipes.py     writes the present lines into the diffs, after code has moved
"""

import ast
import dataclasses
import importlib.util
import itertools
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT, noise, watching
from test_readme import anchors, one_line_each
from tiny_runs import SCRIPTS, head, launch, read, run_python, tiny_args

PAGE = ROOT / "benchmarks" / "recipes.md"
TEXT = PAGE.read_text()
RECIPES = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
HEADER = re.compile(r"^@@ -(\d+),(\d+) \+(\d+),(\d+) @@ def (\w+)\n", re.M)
WITH_DIFF = {name: script for name, script in (("GSPO", "grpo"), ("CISPO", "grpo"), ("Dynamic sampling", "grpo"))}
LENGTHS, T = [3, 1, 4, 2], 5

# ---- Diffs ----


def blocks(name, language) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RECIPES[name], re.S | re.M)


def sides(diff) -> tuple[str, str]:
    """The lines of a diff's one hunk as they are before it, and behind it."""
    lines = HEADER.split(diff)[-1].splitlines(keepends=True)
    return tuple("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))


def place(source, before) -> int:
    """The line at which these lines stand, once and no more."""
    assert source.count(before) == 1, "the lines of this recipe are not, or more than once, in the script:\n" + before
    return source[: source.index(before)].count("\n") + 1


def patched(name, folder):
    """The script with a recipe's diff, as a module of its own."""
    (diff,) = blocks(name, "diff")
    before, after = sides(diff)
    source = (ROOT / f"{WITH_DIFF[name]}.py").read_text()
    place(source, before)
    path = folder / f"{WITH_DIFF[name]}_{len(name)}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", WITH_DIFF)
def test_diffs_are_small_and_in_their_place(name):
    (diff,) = blocks(name, "diff")
    start, old, new_start, new, function = HEADER.search(diff).groups()
    before, after = sides(diff)
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-"]
    assert 1 <= len(changed) <= 6
    assert (int(old), int(new)) == (before.count("\n"), after.count("\n"))
    line = place((ROOT / f"{WITH_DIFF[name]}.py").read_text(), before)
    assert (int(start), int(new_start)) == (line, line), "run python tests/test_recipes.py"
    body = ast.parse((ROOT / f"{WITH_DIFF[name]}.py").read_text()).body
    home = next(node for node in body if getattr(node, "name", "") == function)
    assert home.lineno <= line <= home.end_lineno
    assert re.search(r"arXiv:\d{4}\.\d{5}|arxiv.org/abs/\d{4}\.\d{5}", RECIPES[name])
    assert max(map(len, after.splitlines())) <= 110


@pytest.mark.skipif(shutil.which("patch") is None, reason="there is no command patch here")
@pytest.mark.parametrize("name", WITH_DIFF)
def test_patch_takes_them(name, tmp_path):
    (diff,) = blocks(name, "diff")
    script = shutil.copy(ROOT / f"{WITH_DIFF[name]}.py", tmp_path)
    subprocess.run(["patch", "-p1"], input=diff, text=True, cwd=tmp_path, check=True, capture_output=True)
    assert Path(script).read_text() == Path(patched(name, tmp_path).__file__).read_text()


def test_every_diff_is_tested():
    assert {name for name in RECIPES if blocks(name, "diff")} == set(WITH_DIFF)
    linked = re.findall(r"\]\((#[^)]*)\)", TEXT)
    assert linked and set(linked) <= anchors(PAGE)


# ---- Their mathematics ----


def responses(seed):
    """Log-probs, old ones and a mask of four ragged responses, advantages of both signs: float64."""
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    old = torch.where(mask, -noise(4, T, seed=seed).abs(), math.nan)
    logprobs = (old + 0.3 * noise(4, T, seed=seed + 1)).requires_grad_()
    return logprobs, old, mask, torch.tensor([1.5, -0.7, 0.4, -1.2], dtype=torch.float64)


def update(module, logprobs, old, mask, advantages, level, weights, eps, eps_high):
    """Loss, gradient and clipped tokens of a step, without a KL term."""
    losses, clipped = module.grpo_loss(logprobs, old, old, advantages, mask, 0.0, "k3", eps, eps_high, level)
    loss = (losses * module.token_weights(mask, weights, T)).sum()
    return loss, torch.autograd.grad(loss, logprobs)[0], clipped


@pytest.mark.parametrize("seed", range(3))
def test_gspo_by_loops(tmp_path, seed):
    """Eq. 5 of arXiv:2507.18071, and its gradient: s_i A_i / |y_i| for each token where the clip leaves it alone."""
    logprobs, old, mask, advantages = responses(seed)
    eps, eps_high = 0.05, 0.08
    loss, gradient, clipped = update(
        patched("GSPO", tmp_path), logprobs, old, mask, advantages, "sequence", "grpo", eps, eps_high)
    want_loss, want = 0.0, torch.zeros(4, T, dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        product = 1.0
        for t in range(n):
            product *= math.exp(logprobs[i, t].item() - old[i, t].item())
        s, A = product ** (1 / n), advantages[i].item()
        bounded = min(max(s, 1 - eps), 1 + eps_high)
        want_loss -= min(s * A, bounded * A) / 4
        if s * A <= bounded * A:
            want[i, :n] = -s * A / n / 4
        assert clipped[i].tolist() == [s * A > bounded * A] * n + [False] * (T - n)
    assert 0 < clipped.any(1).sum() < 4
    assert loss.item() == pytest.approx(want_loss, abs=1e-12)
    assert torch.allclose(gradient, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_by_loops(tmp_path, seed):
    """Eq. 4 of arXiv:2506.13585: no token loses its gradient, -clip(rho) A / (all tokens)."""
    logprobs, old, mask, advantages = responses(seed)
    module = patched("CISPO", tmp_path)
    for eps, eps_high in ((0.1, 0.1), (1.0, 0.2)):
        loss, gradient, clipped = update(module, logprobs, old, mask, advantages, "token", "dapo", eps, eps_high)
        want_loss, want, total = 0.0, torch.zeros(4, T, dtype=torch.float64), sum(LENGTHS)
        for i, n in enumerate(LENGTHS):
            for t in range(n):
                logp, A = logprobs[i, t].item(), advantages[i].item()
                weight = min(max(math.exp(logp - old[i, t].item()), 1 - eps), 1 + eps_high)
                want_loss -= weight * A * logp / total
                want[i, t] = -weight * A / total
        assert loss.item() == pytest.approx(want_loss, abs=1e-12)
        assert torch.allclose(gradient, want, rtol=0, atol=1e-12)
        assert clipped.any() and gradient[clipped].abs().min() > 0


def test_at_ratio_1_both_have_the_gradient_of_grpo(tmp_path):
    """One optimizer step a rollout: GSPO with 1 / (B length), CISPO with 1 / (all tokens)."""
    import grpo

    logprobs, _, mask, advantages = responses(0)
    old = logprobs.detach().clone()
    for name, level, weights in (("GSPO", "sequence", "grpo"), ("CISPO", "token", "dapo")):
        changed = update(patched(name, tmp_path), logprobs, old, mask, advantages, level, weights, 0.2, 0.2)[1]
        same = update(grpo, logprobs, old, mask, advantages, "token", weights, 0.2, 0.2)[1]
        assert torch.allclose(changed, same, rtol=0, atol=1e-12), name


# ---- Runs ----


def commands(name) -> list[tuple[str, list[str]]]:
    """(script, flags) of each `python x.py ...` that names a script of the project."""
    found = []
    for block in blocks(name, "bash"):
        for script, flags in re.findall(r"^python (\w+)\.py([^&\n]*)", one_line_each(block), re.M):
            if script in SCRIPTS:
                found.append((script, shlex.split(flags)))
    return found


def args_of(module, words, starts, folder, **sizes):
    """The command's flags in a tiny run: model, data and sizes are those of the tests."""
    tiny = dataclasses.asdict(tiny_args(SCRIPTS[module.__name__.split("_")[0]], starts, folder))
    places = {"reward", "dataset", "eval_dataset", "model", "output_dir", "batch_size", "total_episodes"}
    asked, plain = tyro.cli(module.Args, args=words), module.Args()
    changed = {key: value for key, value in dataclasses.asdict(asked).items() if value != getattr(plain, key)}
    changed = {key: value for key, value in changed.items() if key not in places}
    return module.Args(**(tiny | changed | sizes))


@pytest.mark.parametrize("name", RECIPES)
def test_commands_have_their_flags(name):
    for script, words in commands(name):
        tyro.cli(SCRIPTS[script].module.Args, args=words)
    assert commands(name) or name == "lm-eval"


@pytest.mark.parametrize("name", ["GSPO", "CISPO"])
def test_one_tiny_update(name, starts, tmp_path):
    """An update of four optimizer steps with the flags of the recipe is finite, and another than without the diff."""
    module = patched(name, tmp_path)
    ((script, words),) = commands(name)
    weights = []
    for source, folder in ((module, "changed"), (SCRIPTS[script].module, "plain")):
        args = args_of(source, words, starts, tmp_path / folder, total_episodes=16, learning_rate=1e-2)
        launch(SimpleNamespace(module=source), args)
        weights.append(SCRIPTS[script].load(tmp_path / folder).state_dict())
        assert all(x.isfinite().all() for x in weights[-1].values())
    assert any(not torch.equal(x, weights[1][key]) for key, x in weights[0].items())


MOST = """
def most(prompts, completions, **columns):  # the same in the first of every four groups of two
    return [float(i % 2 and i % 8 > 1) for i in range(len(completions))]
"""


def test_dynamic_sampling_keeps_its_batch(starts, tmp_path, monkeypatch):
    """Of eight groups six teach; the update trains on four of these, half of the responses, and on no other."""
    module = patched("Dynamic sampling", tmp_path)
    ((_, words),) = commands("Dynamic sampling")
    (tmp_path / "most.py").write_text(MOST)
    losses = watching(monkeypatch, module)("grpo_loss")
    args = args_of(module, words, starts, tmp_path / "run", total_episodes=16, batch_size=16, num_minibatches=1,
                   micro_batch_size=16, reward=(f"{tmp_path}/most.py:most",), eval_every=0)  # fmt: skip
    launch(SimpleNamespace(module=module), args)
    assert [len(inputs[3]) for inputs, _ in losses] == [8] * args.update_epochs
    for inputs, _ in losses:
        assert sorted(inputs[3].sign().tolist()) == [-1] * 4 + [1] * 4
    rows = [row for row in read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["frac_reward_zero_std"] for row in rows] == [0.25]


def test_iterative_dpo(starts, tmp_path):
    """Two rounds in small: the pairs are the policy's own responses, the better one by the reward is chosen."""
    maker = tmp_path / "make_pairs.py"
    maker.write_text(blocks("Iterative DPO", "python")[0])
    (ppo, sampling), (dpo, training) = commands("Iterative DPO")
    model = starts / "run1" / "model"
    for number in (1, 2):
        round_, run = tmp_path / f"round{number}", tmp_path / f"dpo{number}"
        args = args_of(SCRIPTS[ppo].module, sampling, starts, round_, model=str(model), total_episodes=0,
                       eval_dataset=str(starts / "ppo.jsonl"), eval_samples=40)  # fmt: skip
        launch(SCRIPTS[ppo], args)
        process = run_python(str(maker), str(round_))
        assert process.returncode == 0, process.stderr
        samples, pairs = read(round_ / "samples.jsonl"), read(round_ / "pairs.jsonl")
        scores = {}
        for row in samples:
            scores.setdefault((row["prompt"], row["completion"]), []).append(row["score"])
        prompts = {row["prompt"] for row in read(starts / "ppo.jsonl")}
        assert len(samples) == 40 and len(pairs) > 10 and {pair["prompt"] for pair in pairs} <= prompts
        for pair in pairs:
            good, bad = (scores[pair["prompt"], pair[side]] for side in ("chosen", "rejected"))
            assert max(good) > min(bad)
        best = {prompt: max(row["score"] for row in samples if row["prompt"] == prompt) for prompt in prompts}
        firsts = [next(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair["prompt"])]
        assert all(best[pair["prompt"]] in scores[pair["prompt"], pair["chosen"]] for pair in firsts)
        args = args_of(SCRIPTS[dpo].module, training, starts, run, model=str(model),
                       dataset=str(round_ / "pairs.jsonl"), batch_size=8)  # fmt: skip
        launch(SCRIPTS[dpo], args)
        model = run / "model"
        first, *_ = read(run / "metrics.jsonl")
        assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the new start


@pytest.fixture
def server(tmp_path):
    """The recipe's server on a free port, and the reward that asks it; the process that serves."""
    client, code = blocks("A reward server", "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = code.replace("8000", str(port)).replace('"data"', repr(str(ROOT / "data")))
    (tmp_path / "served_reward.py").write_text(client.replace("8000", str(port)))
    (tmp_path / "reward_server.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "reward_server.py")])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield process
    process.kill()
    process.wait()


def test_a_reward_server(server, starts, tmp_path, capsys):
    """Training with the served reward is training with the reward, bit for bit; a server that is down is one line."""
    script = SCRIPTS["grpo"]
    ((_, words),) = commands("A reward server")
    assert "served_reward.py:reward" in words
    rows = []
    for spec, folder in ((tmp_path / "served_reward.py:reward", "served"), (ROOT / "data/gold_reward.py:gold_reward", "own")):
        launch(script, args_of(script.module, words, starts, tmp_path / folder, reward=(str(spec),)))
        rows.append(read(tmp_path / folder / "metrics.jsonl"))
        for row in rows[-1]:
            row.pop("tokens_per_second", None)
    assert rows[0] == rows[1] and len({row["reward"] for row in rows[0] if "reward" in row}) > 1
    server.kill()
    server.wait()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(script, args_of(script.module, words, starts, tmp_path / "down",
                               reward=(f"{tmp_path}/served_reward.py:reward",)))  # fmt: skip
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "served_reward.py:reward" in error[0]


def test_lm_eval_reads_the_folder(starts):
    """Its model class loads a folder and scores a text as the model itself does."""
    pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "lm_eval[hf]")')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(starts / "run1" / "model"), device="cpu", batch_size=1)
    row = head("demonstrations", 0, 1)[0]
    request = Instance("loglikelihood", {}, (row["prompt"], row["completion"]), 0)
    ((got, _),) = harness.loglikelihood([request])
    assert math.isfinite(got) and got < 0


# ---- python tests/test_recipes.py ----


def main() -> None:
    text = TEXT
    for name, script in WITH_DIFF.items():
        (diff,) = blocks(name, "diff")
        before, after = sides(diff)
        line = place((ROOT / f"{script}.py").read_text(), before)
        old, new = before.count("\n"), after.count("\n")
        header = HEADER.search(diff)
        text = text.replace(diff, diff.replace(header[0], f"@@ -{line},{old} +{line},{new} @@ def {header[5]}\n"))
    PAGE.write_text(text)
    print(f"benchmarks/recipes.md: {'changed' if text != TEXT else 'as it was'}")


if __name__ == "__main__":
    main()
