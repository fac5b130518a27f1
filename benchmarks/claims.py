"""What the lectures claim about RLHF, measured: one verdict a claim, computed from the figures.

    python benchmarks/claims.py                        all claims
    python benchmarks/claims.py --only ratings         one of them: the names are those of CLAIMS, below
    python benchmarks/claims.py --only table           the table of the README, of the results so far

All on the embedded world, with the scripts' default flags but for those that a claim names. A seed has its
own SFT model and reward model, which all methods of that seed start from and learn from, so methods are
compared within seeds. Rewards are measured on held-out prompts, --samples responses to each. A verdict comes
from the 95 % interval of a mean over seeds (Student's t): "holds" where all of it is on the claim's side,
"fails" where all of it is on the other side, else "not separated".

What has finished is kept in --folder, so that a command that was stopped can be repeated, and goes on: with
more --seeds it trains only those that are new. Other --samples, --pool or --tiny need another --folder.

About two minutes of one CPU core a seed for SFT, reward model, DPO, PPO and their measures, as much again for
the claims with runs of their own, one and a half for the sums. Sources: arXiv:2305.18290 (DPO), 2210.10760
(forms of over-optimization), 1510.03055 (distinct-n); the formulas' own are in tests/README.md.
"""

import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "data")]
import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402
import frontier  # noqa: E402
from bandit_lessons import order_recovered  # noqa: E402
from common import (  # noqa: E402
    ended, fail, load_model, load_prompts, load_reward, pad, read_rows, responses_of, sample)
from frontier import frontier_at, kl_to  # noqa: E402
from gold_reward import gold_reward, sum_reward  # noqa: E402

GOLD = "data/gold_reward.py:gold_reward"
TINY = {  # sizes of a test, with 128 rows of each file
    sft: {"num_train_epochs": 1, "eval_samples": 8},
    reward_model: {},
    dpo: {"eval_samples": 8},
    ppo: {"total_episodes": 128, "eval_samples": 8},
    grpo: {"total_episodes": 128, "eval_samples": 8}}


@dataclass
class Args:
    only: list[str] = field(default_factory=list)  # names of claims; empty: all of them
    seeds: int = 5  # of SFT, reward model, DPO and PPO with default flags
    few_seeds: int = 3  # of the claims that train more than that
    sums_seeds: int = 3  # of grpo.py on sums
    samples: int = 256  # a held-out prompt, of each policy
    pool: int = 4000  # a held-out prompt, of each SFT model: for the frontier and best-of-n
    pairs: list[int] = field(default_factory=lambda: [20_000, 2000])  # behind the reward models of no_kl
    labels: list[str] = field(default_factory=lambda: ["neutral", "gold", "longer"])  # of length
    worlds: int = 200  # of the claim about ratings
    tiny: bool = False  # the sizes of a test
    folder: str = "runs/claims"  # of the runs
    output: str = "benchmarks/results/claims.json"  # the figures, claim by claim


# ---- Statistics ----


def interval(values) -> tuple[float, float, float]:
    """(mean, lower and upper end of its 95 % interval by Student's t), of one value a seed."""
    x = torch.tensor(values, dtype=torch.float64)
    n = len(x)
    half = student(n - 1) * x.std().item() / math.sqrt(n)
    return x.mean().item(), x.mean().item() - half, x.mean().item() + half


def student(freedom: int) -> float:
    """The t that |T| stays below with probability 0.95. T = sqrt(freedom) tan(angle) has, in the angle, a
    density proportional to cos(angle)^(freedom - 1)."""
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    share = (angle.cos() ** (freedom - 1)).cumsum(0)
    return math.sqrt(freedom) * angle[share < 0.95 * share[-1]][-1].tan().item()


def verdict(values, least: float = 0.0) -> str:
    """Is the mean of these above `least`?"""
    _, low, high = interval(values)
    return "holds" if low > least else "fails" if high < least else "not separated"


def rate_bound(failures: int, n: int) -> float:
    """The rate below which failures are with 95 % confidence (Clopper and Pearson): the p at which so few of
    n have probability 0.05."""
    if failures == n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        chance = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(failures + 1))
        low, high = (p, high) if chance > 0.05 else (low, p)
    return high


def spread_ratio(a, b) -> tuple[float, float, float]:
    """(sd(a) / sd(b), its 95 % interval), of a normal value a seed: the quotient of the squares, over that of
    the true ones, is Fisher's F, drawn here 100,000 times."""
    x, y = torch.tensor([a, b], dtype=torch.float64)
    normal = torch.randn(2, 100_000, len(x) - 1, generator=torch.Generator().manual_seed(1))
    above, below = normal.square().sum(2)
    low, high = (above / below).sqrt().quantile(torch.tensor([0.025, 0.975])).tolist()
    ratio = (x.std() / y.std()).item()
    return ratio, ratio * low, ratio * high


def shown(values, digits: int = 3) -> str:
    """mean ± standard error, over seeds."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f} ± {x.std() / math.sqrt(len(x)):.{digits}f}"


# ---- Runs ----


def kept(file: Path, make) -> dict:
    """What make() gave when it was called the first time, from this JSON file."""
    if not file.exists():
        result = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result))
        os.replace(temporary, file)
    return json.loads(file.read_text())


def train(args: Args, folder: Path, script, **flags) -> dict:
    """Run a script into this folder, once: {"before", "after": its evaluations, "cpu_s"}."""

    def run():
        shutil.rmtree(folder, ignore_errors=True)  # what a run left that was killed
        options = {"output_dir": str(folder), "eval_every": 0, "save_every": 0, **flags}
        if args.tiny:
            options = {"dataset": script.Args.dataset} | options | TINY[script]
            for flag in ("dataset", "eval_dataset"):
                if flag in options:
                    lines = Path(options[flag]).read_text().splitlines(True)
                    options[flag] = rows_file(args, f"tiny-{Path(options[flag]).stem}", "".join(lines[:128]))
        began = time.process_time()
        script.main(script.Args(**options))
        seconds = time.process_time() - began
        rows = read_rows(str(folder / "metrics.jsonl"))
        return {"before": rows[0], "after": rows[-1], "cpu_s": seconds}

    return kept(folder / "result.json", run)


def home(args: Args, seed: int) -> Path:
    return Path(args.folder) / f"seed{seed}"


def sft_of(args: Args, seed: int) -> tuple[str, dict]:
    """(the SFT model of a seed, its run)"""
    folder = home(args, seed) / "sft"
    return str(folder / "model"), train(args, folder, sft, seed=seed)


def reward_of(args: Args, seed: int, pairs: int = 20_000) -> tuple[str, dict]:
    """(the reward model of a seed from so many comparisons, its run): at least 63 optimizer steps."""
    start, _ = sft_of(args, seed)
    folder = home(args, seed) / f"reward{pairs}"
    run = train(
        args, folder, reward_model, model=start, dataset=first_rows(args, "preferences", pairs), seed=seed,
        eval_dataset="data/preferences_test.jsonl", num_train_epochs=max(1, 4000 // pairs))
    return str(folder / "model"), run


def dpo_of(args: Args, seed: int, name: str = "dpo", **flags) -> dict:
    """{"run": DPO of a seed, "policy": what `measure` says of it}"""
    start, _ = sft_of(args, seed)
    folder = home(args, seed) / name
    run = train(args, folder, dpo, model=start, seed=seed, **flags)
    return {"run": run, "policy": measure(args, seed, folder)}


def ppo_of(args: Args, seed: int, reward: str, name: str = "ppo", **flags) -> dict:
    """{"run": PPO of a seed on this reward model, "policy": what `measure` says of it}"""
    start, _ = sft_of(args, seed)
    folder = home(args, seed) / name
    run = train(args, folder, ppo, model=start, reward=(reward,), seed=seed, **flags)
    return {"run": run, "policy": measure(args, seed, folder, reward)}


def first_rows(args: Args, name: str, number: int) -> str:
    """A file of the first rows of data/`name`.jsonl."""
    lines = Path(f"data/{name}.jsonl").read_text().splitlines(True)
    return rows_file(args, f"{name}{number}", "".join(lines[:number]))


def rows_file(args: Args, name: str, text: str) -> str:
    file = Path(args.folder) / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


# ---- Measures on held-out prompts ----

OPTIONS = SimpleNamespace(micro_batch_size=1000, seed=1, gradient_checkpointing=False)
CPU = torch.device("cpu")


def draw(model, tokenizer, eos_ids, number: int, seed: int) -> tuple[list[dict], list[list[int]], dict]:
    """(rows, prompts, batch of responses): `number` to each held-out prompt, prompt by prompt."""
    rows = [row for row in read_rows("data/prompts_test.jsonl") for _ in range(number)]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    return rows, prompts, sample(model, prompts, 40, eos_ids, seed=seed, batch_size=1000)


def scores(spec: str, tokenizer, eos_ids, rows, prompts, responses) -> torch.Tensor:
    """The rewards of responses, (held-out prompts, responses to each), in float64."""
    score, *_ = load_reward(spec, tokenizer, eos_ids, OPTIONS, CPU, contextlib.nullcontext)
    values = score(rows, prompts, responses).double()
    return values.view(len(read_rows("data/prompts_test.jsonl")), -1)


def pool_of(args: Args, seed: int) -> dict:
    """--pool responses of the SFT model to each held-out prompt: {"gold" and "length" (prompts, pool),
    "responses" (prompts * pool, T)}."""
    file = home(args, seed) / "pool.pt"
    folder, _ = sft_of(args, seed)
    if not file.exists():
        model, tokenizer, eos_ids = load_model(folder, OPTIONS, CPU)
        rows, prompts, batch = draw(model, tokenizer, eos_ids, args.pool, 1)
        responses = responses_of(batch)
        gold = scores(GOLD, tokenizer, eos_ids, rows, prompts, responses)
        length = batch["mask"].sum(1).double().view(gold.shape)
        parts = {"gold": gold, "length": length, "responses": pad(responses, CPU).short()}
        torch.save(parts, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    return torch.load(file, weights_only=True)


def measure(args: Args, seed: int, folder: Path, learned: str = "") -> dict:
    """What one policy does on held-out prompts, means over --samples responses to each.

    gold; win, the Bradley-Terry probability sigma(r(y) - r(y')) under the gold reward that its response beats
    one of its SFT model, over all pairs of both samples; kl, fraction of the exact optimum at that KL; length
    in tokens with the EOS; eos, the share that ends; entropy, nats a response; distinct1 and distinct2, the
    share of different words and pairs of words among all of a prompt's responses (arXiv:1510.03055); learned.
    """

    @torch.no_grad()
    def make():
        pool = pool_of(args, seed)
        policy, tokenizer, eos_ids = load_model(str(folder / "model"), OPTIONS, CPU)
        reference, *_ = load_model(sft_of(args, seed)[0], OPTIONS, CPU)
        rows, prompts, batch = draw(policy, tokenizer, eos_ids, args.samples, 2)
        responses = responses_of(batch)
        gold = scores(GOLD, tokenizer, eos_ids, rows, prompts, responses)
        result = {"gold": gold.mean().item(), "win": win_rate(gold, pool["gold"])}
        result["kl"] = kl_to(policy, reference, batch, OPTIONS.micro_batch_size).double().mean().item()
        best, ess, beta = frontier_at(pool["gold"], result["kl"])
        start = pool["gold"].mean().item()
        fraction = (result["gold"] - start) / (best - start) if result["kl"] > 0.01 else 0.0
        result |= {"start": start, "fraction": fraction, "ess": ess}
        result["length"] = batch["mask"].sum(1).double().mean().item()
        result["eos"] = ended(batch, eos_ids).double().mean().item()
        result["entropy"] = -batch["logprobs"].sum(1).double().mean().item()
        result["distinct1"] = distinct(responses, args.samples, 1)
        result["distinct2"] = distinct(responses, args.samples, 2)
        result["samples"] = tokenizer.batch_decode(responses[:3], skip_special_tokens=True)
        if learned:
            result["learned"] = scores(learned, tokenizer, eos_ids, rows, prompts, responses).mean().item()
        return result

    return kept(folder / "measured.json", make)


def win_rate(gold: torch.Tensor, other: torch.Tensor) -> float:
    """Mean of sigma(r - r') over all pairs of a prompt: gold (prompts, n), other (prompts, m)."""
    return frontier.win_rate(gold, torch.full_like(gold, 1 / gold.shape[1]), other)


def distinct(responses: list[list[int]], number: int, n: int) -> float:
    """Share of different n-grams among all n-grams of a prompt's `number` responses, mean over prompts."""
    shares = []
    for i in range(0, len(responses), number):
        grams = []
        for ids in responses[i : i + number]:
            grams += zip(*(ids[k:] for k in range(n)))
        shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


# ---- The claims: each gives its rows of the table, and the figures behind them ----


def row(claim: str, source: str, found: str, figure: str, seeds: int) -> dict:
    return {"claim": claim, "source": source, "verdict": found, "figure": figure, "seeds": seeds}


def pairs_of_methods(args: Args, number: int) -> dict:
    """{"dpo", "ppo": [result of each seed]} with default flags."""
    results = {"dpo": [], "ppo": []}
    for seed in range(1, number + 1):
        results["dpo"].append(dpo_of(args, seed))
        results["ppo"].append(ppo_of(args, seed, reward_of(args, seed)[0]))
    return results


def values_of(results: list[dict], key: str) -> list[float]:
    return column([result["policy"] for result in results], key)


def column(rows: list[dict], key: str) -> list:
    return [row[key] for row in rows]


def differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def claim_win_rate(args: Args) -> dict:
    results = pairs_of_methods(args, args.seeds)
    wins = {name: values_of(rows, "win") for name, rows in results.items()}
    rows = []
    for name, values in wins.items():
        figure = f"beats an answer of SFT with probability {shown(values)}, worst seed {min(values):.3f}"
        claim = f"RLHF beats supervised fine-tuning: {name.upper()}"
        rows.append(row(claim, "Chicago, CS234, SUSTech", verdict(values, 0.5), figure, args.seeds))
    return {"rows": rows, "win": wins}


def claim_methods(args: Args) -> dict:
    """DPO and PPO with default flags: height, spread and collapses. A run has collapsed if it ends no better
    than it started, or if a tenth of its responses never end."""
    results = pairs_of_methods(args, args.seeds)
    fraction = {name: values_of(rows, "fraction") for name, rows in results.items()}
    gold = {name: values_of(rows, "gold") for name, rows in results.items()}
    gain = differences(fraction["ppo"], fraction["dpo"])
    rows = [row(
        "PPO gets more out of the same comparisons than DPO", "Austin, alignment notes", verdict(gain),
        f"fraction of the optimum: PPO {shown(fraction['ppo'])}, DPO {shown(fraction['dpo'])}", args.seeds)]
    ratio, low, high = spread_ratio(fraction["dpo"], fraction["ppo"])
    found = "holds" if high < 1 else "fails" if low > 1 else "not separated"
    rows.append(row(
        "DPO is more stable than PPO", "Chicago, Austin, alignment notes", found,
        f"sd over seeds, DPO's over PPO's: {ratio:.2f} (95 %: {low:.2f} to {high:.2f})", args.seeds))
    collapsed = {}
    for name, runs in results.items():
        collapsed[name] = sum(is_collapsed(run["policy"]) for run in runs)
        bound = rate_bound(collapsed[name], args.seeds)
        worst = f"worst seed {min(fraction[name]):.3f} of the optimum"
        rows.append(row(
            f"{name.upper()} collapses in half of its runs, as 2 of 4 published PPO runs did",
            "Austin; arXiv:2403.17031",
            "fails" if bound < 0.5 else "not separated",
            f"{collapsed[name]} of {args.seeds}: a rate of at most {bound:.3f} (95 %); {worst}", args.seeds))
    return {"rows": rows, "fraction": fraction, "gold": gold, "collapsed": collapsed}


def is_collapsed(policy: dict) -> bool:
    return policy["gold"] <= policy["start"] or policy["eos"] < 0.9


def greedy_share(folder: Path, eval_rows: list[dict]) -> float:
    """Share of sums that a model gets right with its likeliest tokens."""
    model, tokenizer, eos_ids = load_model(str(folder / "model"), OPTIONS, CPU)
    rows, prompts = zip(*load_prompts(tokenizer, eval_rows, 512))
    batch = sample(model, prompts, 8, eos_ids, temperature=0.0)
    answers = tokenizer.batch_decode(responses_of(batch), skip_special_tokens=True)
    return statistics.mean(sum_reward(prompts, answers, [row["answer"] for row in rows]))


def claim_sums(args: Args) -> dict:
    """The commands of the main README for rewards that can be verified, without evaluations in between."""
    result = {name: [] for name in ("before", "possible", "greedy", "after", "greedy_after", "cpu_s")}
    eval_rows = read_rows("data/sums_prompts_test.jsonl")
    for seed in range(1, args.sums_seeds + 1):
        folder = home(args, seed) / "sums"
        start = train(args, folder, sft, dataset="data/sums.jsonl", num_train_epochs=8, seed=seed)
        end = home(args, seed) / "sums-grpo"
        run = train(
            args, end, grpo, model=str(folder / "model"), seed=seed,
            reward=("data/gold_reward.py:sum_reward",), dataset="data/sums_prompts.jsonl", kl_coef=0.0,
            max_new_tokens=8, total_episodes=128_000, eval_samples=2560)
        result["before"].append(run["before"]["eval/pass_at_1"])
        result["after"].append(run["after"]["eval/pass_at_1"])
        (group,) = {name for name in run["before"] if "pass_at_" in name} - {"eval/pass_at_1"}
        result["possible"].append(run["before"][group])  # right at least once among the samples of a sum
        result["greedy"].append(greedy_share(folder, eval_rows))
        result["greedy_after"].append(greedy_share(end, eval_rows))
        result["cpu_s"].append([start["cpu_s"], run["cpu_s"]])
    before, after = result["before"], result["after"]
    collapsed = sum(end <= start for start, end in zip(before, after))
    quartile = torch.tensor(after).quantile(0.25).item()
    figure = (f"{shown(before)} → {shown(after)} of held-out sums; lower quartile {quartile:.3f}, worst seed "
              f"{min(after):.3f}; collapsed: {collapsed} of {len(after)}, at most "
              f"{rate_bound(collapsed, len(after)):.3f} (95 %)")
    claim = "RL on rewards that can be verified gets above 0.9 right where 0.3 of the demonstrations were"
    rows = [row(claim, "alignment notes, SUSTech", verdict(after, 0.9), figure, args.sums_seeds)]
    return {"rows": rows, **result, "collapsed": collapsed}


def claim_cost(args: Args) -> dict:
    """CPU seconds of the default runs, and the peak memory of single steps of a model of 11 million
    parameters on rows of the same length, above that of a process that only imports."""
    results = pairs_of_methods(args, args.few_seeds)
    dpo_s = [result["run"]["cpu_s"] for result in results["dpo"]]
    ppo_s = [result["run"]["cpu_s"] for result in results["ppo"]]
    both_s = [ppo_s[i] + reward_of(args, i + 1)[1]["cpu_s"] for i in range(args.few_seeds)]
    ratio = [both / one for both, one in zip(both_s, dpo_s)]
    rows = [row(
        "DPO is cheaper than a reward model and PPO", "Chicago, Austin, alignment notes", verdict(ratio, 1.0),
        f"CPU seconds: DPO {shown(dpo_s, 1)}, reward model and PPO {shown(both_s, 1)}, ratio "
        f"{shown(ratio, 2)}", args.few_seeds)]
    memory = kept(Path(args.folder) / "memory.json", lambda: peaks(args))
    more = [ppo / dpo for ppo, dpo in zip(memory["ppo"], memory["dpo"])]
    one, two = (sum(memory[name]) / len(more) / 1e6 for name in ("dpo", "ppo"))
    rows.append(row(
        "PPO needs more memory than DPO", "Austin, alignment notes", verdict(more, 1.0),
        f"MB of a step of 11 M parameters: DPO {one:.0f}, PPO {two:.0f}, ratio {shown(more, 2)}", len(more)))
    return {"rows": rows, "dpo_s": dpo_s, "reward_model_and_ppo_s": both_s, "memory": memory}


PEAK = """import sys
sys.path[:0] = [".", "benchmarks"]
import torch, tyro, dpo, ppo, reward_model, sft
from logprob import resident
torch.set_num_threads(1)
before = resident("VmHWM")
script = sys.modules[sys.argv.pop(1)]
script.main(tyro.cli(script.Args))
print(resident("VmHWM") - before)"""


def peaks(args: Args) -> dict:
    """{"dpo", "ppo": bytes of each of two processes}"""
    folder = Path(args.folder) / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("data/model", folder / "start")
    config = json.loads((folder / "start" / "config.json").read_text())
    size = 64 if args.tiny else 384
    config |= {"hidden_size": size, "intermediate_size": 3 * size, "num_hidden_layers": size // 64}
    (folder / "start" / "config.json").write_text(json.dumps(config))
    few = ["--micro-batch-size", "8", "--batch-size", "16", "--device", "cpu", "--eval-samples", "8"]
    demonstrations = [
        "--dataset", first_rows(args, "demonstrations", 16),
        "--eval-dataset", first_rows(args, "demonstrations_test", 8)]
    pairs = [
        "--dataset", first_rows(args, "preferences", 16),
        "--eval-dataset", first_rows(args, "preferences_test", 8)]
    start, reward = (str(folder / name / "model") for name in ("sft", "reward"))
    random_start = ["--model", str(folder / "start"), "--num-train-epochs", "0"]
    peak_of("sft", *random_start, *demonstrations, *few, "--output-dir", str(folder / "sft"))
    peak_of("reward_model", "--model", start, *pairs, *few, "--output-dir", str(folder / "reward"))
    few += ["--model", start, "--max-new-tokens", "13"]
    result = {"dpo": [], "ppo": []}
    for i in range(2):
        result["dpo"].append(peak_of("dpo", *pairs, *few, "--output-dir", str(folder / f"dpo{i}")))
        on_reward = ["--reward", reward, "--total-episodes", "32"]
        result["ppo"].append(peak_of("ppo", *on_reward, *few, "--output-dir", str(folder / f"ppo{i}")))
    return result


def peak_of(script: str, *flags: str) -> int:
    process = subprocess.run([sys.executable, "-c", PEAK, script, *flags], capture_output=True, text=True)
    if process.returncode:
        fail(f"{script} {' '.join(flags)}: {process.stderr[-500:]}")
    return int(process.stdout.splitlines()[-1])


def claim_implicit_reward(args: Args) -> dict:
    """beta log pi / pi_ref as a reward model: share of held-out votes that it agrees with."""
    results = pairs_of_methods(args, args.seeds)
    implicit = [result["run"]["after"]["eval/rewards/accuracies"] for result in results["dpo"]]
    learned = [reward_of(args, seed)[1]["after"]["eval/accuracy"] for seed in range(1, args.seeds + 1)]
    found = verdict(differences(implicit, learned), -0.01)
    figure = f"held-out accuracy: DPO {shown(implicit, 4)}, reward model {shown(learned, 4)}; possible 0.801"
    claim = "A DPO policy is as good a reward model as one that was trained (less than 0.01 worse)"
    rows = [row(claim, "alignment notes", found, figure, args.seeds)]
    return {"rows": rows, "dpo": implicit, "learned": learned}


def claim_sft_both(args: Args) -> dict:
    """log pi(y) of the better and the worse side of held-out pairs: random weights, SFT, SFT on chosen sides
    alone (from the SFT model, one pass over the 20,000 pairs), DPO."""
    chosen = "".join(
        json.dumps({"prompt": pair["prompt"], "completion": pair["chosen"]}) + "\n"
        for pair in read_rows("data/preferences.jsonl"))
    file = rows_file(args, "chosen", chosen)
    logps = {"random": [], "sft": [], "chosen": [], "dpo": []}
    for seed in range(1, args.few_seeds + 1):
        folder = home(args, seed)
        start, _ = sft_of(args, seed)
        train(args, folder / "chosen", sft, model=start, dataset=file, num_train_epochs=1, seed=seed,
              eval_dataset="data/demonstrations_test.jsonl")
        after_dpo = dpo_of(args, seed)["run"]
        logps["random"].append(pair_logps(args, folder / "logps-random", "data/model", seed))
        logps["sft"].append(sides(after_dpo["before"]))
        more = str(folder / "chosen" / "model")
        logps["chosen"].append(pair_logps(args, folder / "logps-chosen", more, seed))
        logps["dpo"].append(sides(after_dpo["after"]))
    change = {}
    for old, name in (("random", "sft"), ("sft", "chosen"), ("sft", "dpo")):
        after, before = torch.tensor([logps[name], logps[old]], dtype=torch.float64)
        change[name] = after - before  # (seeds, 2)
    rows = []
    for name, claim in (("sft", "SFT raises rejected answers too: it does not say what not to do"),
                        ("chosen", "More SFT, on chosen answers alone, raises rejected ones too"),
                        ("dpo", "DPO lowers rejected answers")):
        better, worse = change[name].T.tolist()
        signed = [-x for x in worse] if name == "dpo" else worse
        figure = f"nats: rejected {shown(worse, 2)}, chosen {shown(better, 2)}"
        rows.append(row(claim, "Austin", verdict(signed), figure, args.few_seeds))
    return {"rows": rows, "logps_chosen_rejected": logps}


def pair_logps(args: Args, folder: Path, model: str, seed: int) -> list[float]:
    """dpo.py without training evaluates the model it starts from."""
    test = "data/preferences_test.jsonl"
    return sides(train(args, folder, dpo, model=model, dataset=test, eval_dataset=test, num_train_epochs=0,
                       seed=seed)["before"])


def sides(metrics: dict) -> list[float]:
    return [metrics["eval/logps/chosen"], metrics["eval/logps/rejected"]]


def claim_length(args: Args) -> dict:
    """Three label sets for the same pairs of answers: by the gold reward (data/preferences.jsonl), by the
    gold reward with the number of words partialled out, and by the gold reward plus 0.2 a word. A method's
    excess is its length less that of the exact optimum, for the reward behind its labels, at its own KL."""
    slope = length_slope(read_rows("data/preferences.jsonl"))
    sets = {"neutral": -slope, "gold": 0.0, "longer": 0.2}
    found = {name: {"dpo": [], "ppo": []} for name in args.labels}
    for name in args.labels:
        for seed in range(1, args.few_seeds + 1):
            pool, results = pool_of(args, seed), on_labels(args, seed, name, sets[name])
            for method, result in results.items():
                policy = result["policy"]
                run = {key: policy[key] for key in ("length", "kl", "gold")}
                run["start"] = pool["length"].mean().item()
                run["optimum"], run["ess"] = optimum_length(pool, sets[name], policy["kl"])
                found[name][method].append(run)
    excess = {}
    for name, methods in found.items():
        for method, runs in methods.items():
            excess[name, method] = differences(column(runs, "length"), column(runs, "optimum"))
    rows = []
    texts = {"neutral": "blind to length", "gold": "of the gold reward", "longer": "plus 0.2 a word"}
    for name in args.labels:
        mean = {}
        for key in ("start", "length", "optimum"):
            mean[key] = shown(column(found[name]["dpo"], key), 1)
        figure = (f"tokens: {mean['start']} → {mean['length']}, optimum at that KL {mean['optimum']}; "
                  f"excess {shown(excess[name, 'dpo'], 2)}")
        if found[name]["ppo"]:
            figure += f", PPO's {shown(excess[name, 'ppo'], 2)}"
        claim = f"DPO writes longer than its labels ask: labels {texts[name]}"
        rows.append(row(claim, "Austin", verdict(excess[name, "dpo"]), figure, args.few_seeds))
    more = differences(excess["gold", "dpo"], excess["gold", "ppo"])
    rows.append(row(
        "DPO's excess length is larger than PPO's: labels of the gold reward", "Austin", verdict(more),
        f"by {shown(more, 2)} tokens", args.few_seeds))
    return {"rows": rows, "reward_per_word": sets, "runs": found}


def length_slope(pairs: list[dict]) -> float:
    """Gold reward per word, by least squares over all answers of the pairs."""
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    gold = torch.tensor(gold_reward(prompts, texts), dtype=torch.float64)
    words = torch.tensor([len(text.split()) for text in texts], dtype=torch.float64)
    words -= words.mean()
    return (words @ gold / (words @ words)).item()


def relabelled(pairs: list[dict], per_word: float) -> str:
    """The pairs with votes of their own, as in data/make_world.py, by the gold reward + per_word a word."""
    rng, lines = random.Random(1), []
    for pair in pairs:
        texts = [pair["chosen"], pair["rejected"]]
        gold = gold_reward([pair["prompt"]] * 2, texts)
        first, second = (r + per_word * len(text.split()) for r, text in zip(gold, texts))
        p = 1 / (1 + math.exp(second - first))
        votes = (rng.random() < p) + (rng.random() < p)
        chosen, rejected = texts if votes else texts[::-1]
        lines.append(json.dumps({
            "prompt": pair["prompt"], "chosen": chosen, "rejected": rejected,
            "mu": 0.5 if votes == 1 else 1.0}))
    return "\n".join(lines) + "\n"


def on_labels(args: Args, seed: int, name: str, per_word: float) -> dict:
    """DPO on a label set; from the gold labels, PPO on the reward model too."""
    if name == "gold":
        return {"dpo": dpo_of(args, seed), "ppo": ppo_of(args, seed, reward_of(args, seed)[0])}
    files = []
    for part in ("preferences", "preferences_test"):
        text = relabelled(read_rows(f"data/{part}.jsonl"), per_word)
        files.append(rows_file(args, f"{name}-{part}", text))
    return {"dpo": dpo_of(args, seed, f"dpo-{name}", dataset=files[0], eval_dataset=files[1])}


def optimum_length(pool: dict, per_word: float, kl: float) -> tuple[float, float]:
    """(mean length of pi_ref exp(r / beta) / Z at this KL, r the gold reward + per_word a token; its ESS)"""
    rewards = pool["gold"] + per_word * pool["length"]
    _, ess, beta = frontier_at(rewards, kl)
    weights = torch.softmax(rewards / beta, dim=1)
    return (weights * pool["length"]).sum(1).mean().item(), ess


def claim_prompts(args: Args) -> dict:
    """Comparisons on 12 of the 48 training prompts (with the 12 held-out ones, they are all that the world's
    grammar has); PPO may sample answers to the other 36 too, which nobody has compared."""
    few = read_rows("data/prompts.jsonl")[:12]
    names = {prompt["prompt"] for prompt in few}
    every = Path("data/preferences.jsonl").read_text().splitlines()
    labelled = [line for line in every if json.loads(line)["prompt"] in names]
    pairs = rows_file(args, "pairs-12-prompts", "\n".join(labelled) + "\n")
    lines = [json.dumps({"prompt": prompt["prompt"]}) for prompt in few]
    prompts = rows_file(args, "prompts-12", "\n".join(lines) + "\n")
    data = {"dataset": pairs, "eval_dataset": "data/preferences_test.jsonl"}
    fraction, gold = {}, {}
    for seed in range(1, args.few_seeds + 1):
        start, _ = sft_of(args, seed)
        folder = home(args, seed) / "reward-12"
        train(args, folder, reward_model, model=start, seed=seed, **data)
        reward = str(folder / "model")
        results = {
            "DPO on 12 prompts": dpo_of(args, seed, "dpo-12", **data),
            "PPO on 12 prompts": ppo_of(
                args, seed, reward, "ppo-12", dataset=prompts, eval_dataset="data/prompts_test.jsonl"),
            "PPO on 48 prompts": ppo_of(args, seed, reward, "ppo-48")}
        for name, result in results.items():
            fraction.setdefault(name, []).append(result["policy"]["fraction"])
            gold.setdefault(name, []).append(result["policy"]["gold"])
    figure = "fraction of the optimum: " + ", ".join(f"{name} {shown(x)}" for name, x in fraction.items())
    rows = []
    for other in ("PPO on 12 prompts", "DPO on 12 prompts"):
        rows.append(row(
            f"RLHF gains from prompts that nobody has compared: against {other}", "Austin",
            verdict(differences(fraction["PPO on 48 prompts"], fraction[other])), figure, args.few_seeds))
    return {"rows": rows, "pairs": len(labelled), "fraction": fraction, "gold": gold}


def without_kl(args: Args, pairs: int) -> dict[str, list[dict]]:
    """{"SFT", "0.3", "0": policies, one a seed}: the start, and PPO at these --kl-coef on a reward model from
    so many comparisons."""
    found = {"SFT": [], "0.3": [], "0": []}
    for seed in range(1, args.few_seeds + 1):
        reward, _ = reward_of(args, seed, pairs)
        default = "ppo" if pairs == 20_000 else f"ppo{pairs}"
        found["SFT"].append(measure(args, seed, home(args, seed) / "sft", reward_of(args, seed)[0]))
        found["0.3"].append(ppo_of(args, seed, reward, default)["policy"])
        found["0"].append(ppo_of(args, seed, reward, f"ppo{pairs}-beta0", kl_coef=0.0)["policy"])
    return found


SHOWN = "gold win learned kl entropy distinct2".split()


def lost(key: str, policies: dict) -> str:
    """Verdict: there is less of it without the penalty."""
    return verdict(differences(column(policies["0.3"], key), column(policies["0"], key)))


def claim_no_kl(args: Args) -> dict:
    rows, figures = [], {}
    for pairs in args.pairs:
        policies = figures[str(pairs)] = without_kl(args, pairs)
        mean = {}
        for beta, found in policies.items():
            mean[beta] = {key: shown(column(found, key), 2) for key in SHOWN}
        figure = "; ".join(
            f"beta {beta}: learned {x['learned']}, gold {x['gold']}, wins {x['win']}, KL {x['kl']}"
            for beta, x in mean.items() if beta != "SFT")
        rows.append(row(
            f"Maximizing a learned reward without KL does not work: wins against SFT, {pairs:,} pairs",
            "Chicago", lost("win", policies), figure, args.few_seeds))
        figure = "; ".join(
            f"{beta}: {x['entropy']} nats a response, distinct-2 {x['distinct2']}"
            for beta, x in mean.items())
        rows.append(row(
            f"The KL penalty keeps answers diverse: more entropy, {pairs:,} pairs", "alignment notes",
            lost("entropy", policies), figure, args.few_seeds))
    return {"rows": rows, "by_pairs_and_beta": figures}


def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> tuple[float, float]:
    """(proxy, gold) of the best of n by the proxy, exact for n answers drawn without replacement from a pool:
    the i-th smallest of N is the best of n with probability C(i - 1, n - 1) / C(N, n). Shapes (prompts, N).
    """
    N = proxy.shape[1]
    i = torch.arange(1, N + 1, dtype=torch.float64)
    log_choose = lambda a, b: torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)
    size = torch.tensor(float(n), dtype=torch.float64)
    log_weight = log_choose(i - 1, size - 1) - log_choose(torch.tensor(float(N), dtype=torch.float64), size)
    weights = torch.where(i >= n, log_weight, -torch.inf).exp()
    order = proxy.argsort(1)
    return tuple((weights * x.gather(1, order)).sum(1).mean().item() for x in (proxy, gold))


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, nats: the KL of the best of n, where no two rewards are equal."""
    return math.log(n) - (n - 1) / n


def fitted(points: list[tuple[float, float]], shape) -> dict:
    """Least squares of gain = d (a - b shape(d)) over (KL, gain), d = sqrt(KL): {"a", "b", "r2"}."""
    kl, gain = torch.tensor(points, dtype=torch.float64).unbind(1)
    d = kl.sqrt()
    features = torch.stack([d, -d * shape(d)], dim=1)
    a, b = torch.linalg.lstsq(features, gain).solution.tolist()
    left = gain - features @ torch.tensor([a, b], dtype=torch.float64)
    return {"a": a, "b": b, "r2": 1 - (left.square().sum() / (gain - gain.mean()).square().sum()).item()}


FORMS = {"d (a - b d)": lambda d: d, "d (a - b log d)": torch.log}


def claim_overoptimization(args: Args) -> dict:
    """Gold reward against d = sqrt(KL) in the forms of arXiv:2210.10760: best of n = 2 to 256 from the pool
    of each SFT model, and PPO at the four penalties of results/overoptimization.json, from SFT of seed 1."""
    figures, rows = {}, []
    published = json.loads((ROOT / "benchmarks/results/overoptimization.json").read_text())
    first = json.loads((ROOT / "benchmarks/results/frontier.json").read_text())["reference_reward"]
    for pairs in (20_000, 2000):
        found = figures[str(pairs)] = {"best of n": [], "PPO": [], "curves": []}
        for seed in range(1, args.few_seeds + 1):
            curve = best_of_n_curve(args, seed, pairs)
            found["curves"].append(curve)
            start = pool_of(args, seed)["gold"].mean().item()
            gains = [(point["kl"], point["gold"] - start) for point in curve]
            found["best of n"].append({form: fitted(gains, shape) for form, shape in FORMS.items()})
        policies = published[str(pairs)]["policies"]
        for seed in (1, 2, 3):
            points = [(p["kl"], p["gold"] - first) for p in policies if p["seed"] == seed]
            found["PPO"].append({form: fitted(points, shape) for form, shape in FORMS.items()})
        square, log = FORMS
        for method, form, other in (("best of n", square, log), ("PPO", log, square)):
            r2 = {name: column(column(found[method], name), "r2") for name in FORMS}
            rows.append(row(
                f"Gold reward of {method} is {form}, closer than {other}: {pairs:,} pairs",
                "arXiv:2210.10760", verdict(differences(r2[form], r2[other])),
                f"R² {shown(r2[form])} against {shown(r2[other])}", len(found[method])))
    more = more_of_best(args, figures["20000"]["curves"])
    rows.append(row(
        "Best of n gains more than RL at the same KL: 20,000 pairs", "arXiv:2210.10760", verdict(more),
        f"gold reward, at PPO's KL with beta 0.3: by {shown(more, 2)}", args.few_seeds))
    for found in figures.values():  # of the curves, n = 2, 4, 8, ...
        found["curves"] = [curve_at_powers(curve) for curve in found["curves"]]
    return {"rows": rows, "fits": figures}


def curve_at_powers(curve: list[dict]) -> list[dict]:
    return [point for point in curve if math.log2(point["n"]).is_integer()]


def more_of_best(args: Args, curves: list[list[dict]]) -> list[float]:
    """Gold reward of best-of-n less that of PPO, at the n with the nearest KL, of each seed."""
    more = []
    for seed, curve in enumerate(curves, 1):
        policy = ppo_of(args, seed, reward_of(args, seed)[0])["policy"]
        nearest = min(curve, key=lambda point: abs(point["kl"] - policy["kl"]))
        more.append(nearest["gold"] - policy["gold"])
    return more


def best_of_n_curve(args: Args, seed: int, pairs: int) -> list[dict]:
    """[{"n", "kl", "learned", "gold"}] for n = 2 to 256, by a reward model from so many comparisons."""

    def make():
        pool = pool_of(args, seed)
        _, tokenizer, eos_ids = load_model(sft_of(args, seed)[0], OPTIONS, CPU)
        rows = [line for line in read_rows("data/prompts_test.jsonl") for _ in range(pool["gold"].shape[1])]
        prompts = tokenizer([line["prompt"] for line in rows])["input_ids"]
        responses = [ids[: int(n)].tolist() for ids, n in zip(pool["responses"], pool["length"].flatten())]
        proxy = scores(reward_of(args, seed, pairs)[0], tokenizer, eos_ids, rows, prompts, responses)
        curve = []
        for n in range(2, min(256, proxy.shape[1]) + 1):
            learned, gold = best_of_n(proxy, pool["gold"], n)
            curve.append({"n": n, "kl": best_of_n_kl(n), "learned": learned, "gold": gold})
        return curve

    return kept(home(args, seed) / f"best-of-n{pairs}.json", make)


def claim_ratings(args: Args) -> dict:
    """Order of 50 arms from N labels, as ratings or as comparisons, in random worlds. Each of 20 raters has
    an offset and a log-scale of her own, with this spread (standard deviation); 0: all on one scale."""
    generator = torch.Generator().manual_seed(1)
    spreads, curves, crossings, gaps = [i / 4 for i in range(9)], {}, {}, {}
    for labels in (200, 1000, 4000):
        curves[labels] = []
        for spread in spreads:
            draws = []
            for _ in range(args.worlds):
                rewards = torch.randn(50, generator=generator).double()
                draws.append(order_recovered(rewards, labels, spread, generator))
            rated, compared = zip(*draws)
            gaps[labels, spread] = differences(compared, rated)
            curves[labels].append({"spread": spread, "rated": shown(rated), "compared": shown(compared)})
        crossings[labels] = crossing(spreads, [interval(gaps[labels, spread])[0] for spread in spreads])
    rows = []
    where = ", ".join(f"{labels:,} labels: {x:.2f}" for labels, x in crossings.items())
    for spread, raters in ((0.0, "on one scale"), (1.0, "each on a scale of her own")):
        point = curves[1000][spreads.index(spread)]
        rows.append(row(
            f"Comparisons order answers better than as many ratings: raters {raters}",
            "Chicago, CS234, SUSTech", verdict(gaps[1000, spread]),
            f"pairs in order, 1,000 labels: compared {point['compared']}, rated {point['rated']}; the curves "
            f"cross at a spread of the scales of ({where})", args.worlds))
    return {"rows": rows, "curves": curves, "crossings": crossings}


def crossing(x: list[float], y: list[float]) -> float:
    """The first x at which y rises through 0, by straight lines between points; x[0] if it is above at once,
    infinity if it never is."""
    if y[0] > 0:
        return x[0]
    for i in range(1, len(x)):
        if y[i] > 0:
            return x[i - 1] + (x[i] - x[i - 1]) * -y[i - 1] / (y[i] - y[i - 1])
    return math.inf


CLAIMS = {
    "win_rate": claim_win_rate, "methods": claim_methods, "length": claim_length, "prompts": claim_prompts,
    "no_kl": claim_no_kl, "overoptimization": claim_overoptimization, "cost": claim_cost,
    "implicit_reward": claim_implicit_reward, "sft_both": claim_sft_both, "ratings": claim_ratings,
    "sums": claim_sums}


def table(result: dict) -> str:
    """The rows of all claims in Markdown."""
    lines = ["| claim (lecture) | verdict | figure | seeds | command |", "|---|---|---|---|---|"]
    for name in CLAIMS:
        for part in result.get(name, {"rows": []})["rows"]:
            lines.append(f"| {part['claim']} ({part['source']}) | **{part['verdict']}** | {part['figure']} | "
                         f"{part['seeds']} | `--only {name}` |")
    return "\n".join(lines)


def command_of(name: str, sizes: dict) -> str:
    """The command that measures a claim, with those flags that are not the default."""
    words = ["python benchmarks/claims.py --only", name]
    for flag, value in sizes.items():
        if value == getattr(Args(), flag):
            continue
        words.append(f"--{flag.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def main(args: Args) -> dict:
    for name in args.only:
        if name not in [*CLAIMS, "table"]:
            fail(f"--only {name}: one of {', '.join([*CLAIMS, 'table'])}")
    torch.set_num_threads(1)
    output = Path(args.output)
    result = json.loads(output.read_text()) if output.exists() else {}
    if args.only == ["table"]:
        print(table(result))
        return result
    for name in args.only or CLAIMS:
        sizes = {key: value for key, value in asdict(args).items() if key not in ("only", "folder", "output")}
        result[name] = CLAIMS[name](args) | {"command": command_of(name, sizes), "args": sizes}
        result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        runs = [json.loads(file.read_text()) for file in Path(args.folder).rglob("result.json")]
        result["cpu_s_of_the_runs"] = round(sum(run["cpu_s"] for run in runs))
        output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
