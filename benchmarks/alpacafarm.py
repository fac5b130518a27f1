"""AlpacaFarm's controlled comparison (the main table of arXiv:2305.14387) on the embedded world.

    python benchmarks/alpacafarm.py
    python benchmarks/alpacafarm.py --seeds 2 --dpo-seeds 2

All methods of a seed start from one SFT model, and those that need a reward have one reward model:

    SFT                  sft.py on the 4,000 demonstrations
    SFT on twice the data
                         sft.py on 8,000 demonstrations from random weights, in as many steps
    FeedME               sft.py from the SFT model, on the chosen side of each pair
    conditioning         the same on both sides, behind a word for good or for bad; asked with that for good
    best-of-16           the SFT model; of 16 responses that of the highest learned reward; nothing is trained
    expert iteration     best-of-16 on training prompts, then sft.py from the SFT model on the winners
    Quark                arXiv:2205.13636: all responses so far, sorted by learned reward and cut into 5
                         parts, are trained on behind a word for their part; asked with that for the best
    Quark as shipped     as in AlpacaFarm's code: no word; a round trains on the best quarter of its own alone
    PPO, GRPO            ppo.py, and grpo.py --kl-in reward, on the learned reward
    DPO                  dpo.py on the same pairs

The words are digits, which no review has: "1" before a prompt is one token more and needs no new embedding.
Ties, 27 % of the pairs, have no chosen side and are left out of FeedME and conditioning.

Judged on held-out prompts by the gold reward: its mean, the KL to the SFT model, the length, the fraction of
the exact frontier at that KL (frontier.py), and the expected Bradley-Terry win rate against the SFT model,
the mean of sigma(r_a - r_b) over all pairs of a response of the policy and one of the SFT model. Best-of-16
needs no samples of its own: its law follows from the ranks of those of the SFT model.

Everything is kept in --folder: commands.txt, the rows that each method wrote, each run. What has finished is
not run again. Seconds are of the CPU, with one thread. Needs matplotlib for the picture only.
"""

import contextlib
import copy
import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "data")]
import dpo  # noqa: E402
import grpo  # noqa: E402
import make_world  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402
from common import (  # noqa: E402
    _logits, head_of, learning_rate, load_model, load_prompts, load_reward, pad, read_rows, responses_of,
    sample, shuffled, states, use_rows)
from frontier import frontier_at, kl_to, tilted, win_rate  # noqa: E402
from gold_reward import ASPECTS  # noqa: E402
from logprob import hardware, version  # noqa: E402

GOLD = "data/gold_reward.py:gold_reward"
CPU = torch.device("cpu")
N = 16  # of best-of-n, here and in expert iteration
GOOD, BAD = "1", "0"  # words of reward conditioning, before the prompt
PARTS = "12345"  # words of Quark, from the best part to the worst
BETAS = [30 * 0.88**k for k in range(39)]  # of the frontier's curve: 30 to 0.23
STUDENT = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 0.975 quantile, df 1 to 9

# The main table of arXiv:2305.14387: win rate in % against Davinci003, simulated and human annotators
PUBLISHED = {
    "SFT": (36.7, 44.3),
    "FeedME": (36.6, 37.9),
    "conditioning": (32.4, None),
    "best-of-16": (45.0, 50.7),
    "expert iteration": (41.9, 45.7),
    "Quark as shipped": (35.6, None),
    "PPO": (46.8, 55.1),
}
SHARED = "sft", "reward_model"  # runs that methods of a seed have in common
COLUMNS = "win gold learned kl fraction ess length seconds seconds_in_all".split()


@dataclass
class Args:
    seeds: int = 5  # of everything: the SFT model, the reward model, each method
    dpo_seeds: int = 10  # of SFT and DPO
    folder: str = "runs/alpacafarm"  # of the runs
    output: str = "benchmarks/results/alpacafarm"  # .json and .png
    winners: int = 20  # a prompt, for expert iteration
    reference_samples: int = 3000  # of the SFT model a prompt, for the frontier and best-of-n
    policy_samples: int = 200  # of each policy a prompt
    tiny: bool = False  # few rows, samples and steps: to see that it runs


@dataclass
class Quark:
    """Settings of one of its two forms."""

    keep_best: int = 0  # train on the best of so many parts of this round alone (0: on all responses so far)
    episodes: int = 10240  # responses sampled in all
    responses: int = 512  # a round
    steps: int = 16  # optimizer steps a round
    batch_size: int = 64  # responses a step
    kl_coef: float = 0.05  # as published
    entropy_coef: float = 0.06  # as published
    learning_rate: float = 1e-3  # peak of AdamW
    warmup_steps: int = 10  # optimizer steps
    anneal_lr: bool = True


FORMS = {
    "Quark": Quark(),
    "Quark as shipped": Quark(keep_best=4, responses=256, steps=1, entropy_coef=0.0),
}


# ---- The methods that no script has ----


def best_of_n_weights(scores, n):
    """The law of best-of-n where pi is uniform on N samples: ((k / N)^n - (l / N)^n) / (k - l) for a sample
    if k score at most as much as it does, and l of them less. Ties are decided by lot.

    scores: (prompts, N). Returns: the same shape, float64, rows that sum to 1.
    """
    number = scores.shape[1]
    order = scores.sort(dim=1).values
    most = torch.searchsorted(order, scores, right=True).double()
    less = torch.searchsorted(order, scores).double()
    return ((most / number) ** n - (less / number) ** n) / (most - less)


def chosen_weights(rewards):
    """The law of the chosen side of pairs whose two voters agree, pi being uniform on N samples and a vote
    Bradley-Terry: a weighs E_b[sigma(r_a - r_b)^2]. FeedME and conditioning aim at it. (prompts, N) both.
    """
    weights = torch.stack([torch.sigmoid(r[:, None] - r).square().mean(1) for r in rewards])
    return weights / weights.sum(1, keepdim=True)


def kl_of(weights):
    """KL of such a law to pi, the mean over prompts, nats."""
    return (weights * (weights * weights.shape[1]).log()).sum(1).mean().item()


def quantiles(scores, number):
    """Which of `number` equal parts each score is in, the best being 0; the worst part gets the remainder."""
    rank = scores.argsort(descending=True, stable=True).argsort()
    return (rank // (len(scores) // number)).clamp(max=number - 1)


def quark_losses(logits, ref_logits, targets, kl_coef, entropy_coef):
    """-log pi(y) + kl_coef KL(pi || pi_ref) - entropy_coef H(pi) at each token, KL and entropy being sums
    over the vocabulary: arXiv:2205.13636 and its code. Args: (N, V), (N, V), (N,). Returns: (N,), nats.
    """
    logp = torch.log_softmax(logits, -1)
    ref_logp = torch.log_softmax(ref_logits, -1)
    p = logp.exp()
    kl = (p * (logp - ref_logp)).sum(-1)
    entropy = -(p * logp).sum(-1)
    nll = -logp.gather(-1, targets[:, None]).squeeze(-1)
    return nll + kl_coef * kl - entropy_coef * entropy


def token_logits(model, prompts, responses):
    """Logits that predict each response's tokens, behind its prompt: (N, V), row after row."""
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    masks = []
    for prompt, response in zip(prompts, responses):
        masks.append([False] * (len(prompt) - 1) + [True] * len(response) + [False])  # t - 1 predicts t
    hidden = states(model, pad(rows, CPU), pad(masks, CPU, False))
    return _logits(hidden, **head_of(model), temperature=1.0)


def explore(policy, prompts, word, seed, number, size, eos_ids, score):
    """`size` times (prompt ids, response ids), and their scores: of round `number`, behind the word."""
    chosen = []
    for k in range(number * size, (number + 1) * size):
        chosen.append(prompts[shuffled(len(prompts), seed, k // len(prompts))[k % len(prompts)]])
    rows, ids = map(list, zip(*chosen))
    told = [word + prompt for prompt in ids]
    responses = responses_of(sample(policy, told, 40, eos_ids, seed=seed + 1000 * (number + 1)))
    return list(zip(ids, responses)), score(rows, ids, responses)


def train_quark(config: Quark, seed: int, start: str, reward: str, dataset: str, folder: Path) -> None:
    policy, tokenizer, eos_ids = load(start, seed)
    reference = copy.deepcopy(policy).requires_grad_(False)
    score = load_score(reward, tokenizer, eos_ids, seed)
    prompts = load_prompts(tokenizer, read_rows(dataset), 512)
    words = tokenizer(list(PARTS))["input_ids"]  # a list of one token each
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    num_rounds = config.episodes // config.responses
    pool, scores = [], torch.zeros(0)
    for number in range(num_rounds):
        # 1. explore: first without a word, as the SFT model, then behind the word for the best part
        word = [] if config.keep_best or number == 0 else words[0]
        if config.keep_best:
            pool, scores = [], torch.zeros(0)
        new, new_scores = explore(policy, prompts, word, seed, number, config.responses, eos_ids, score)
        pool += new
        scores = torch.cat([scores, new_scores])

        # 2. sort into parts
        part = quantiles(scores, config.keep_best or len(words))
        kept = range(len(pool))
        if config.keep_best:
            kept = (part == 0).nonzero().squeeze(1).tolist()

        # 3. learn: each response behind the word for its part, the reference without a word
        for k in range(config.steps):
            epoch, first = divmod(k * config.batch_size, len(kept))
            order = shuffled(len(kept), seed + number, epoch) + shuffled(len(kept), seed + number, epoch + 1)
            index = [kept[i] for i in order[first : first + config.batch_size]]
            ids, responses = zip(*[pool[i] for i in index])
            told = ids
            if not config.keep_best:
                told = [words[part[i]] + pool[i][0] for i in index]
            targets = torch.tensor(sum(responses, []))
            with torch.no_grad():
                ref_logits = token_logits(reference, ids, responses)
            logits = token_logits(policy, told, responses)
            losses = quark_losses(logits, ref_logits, targets, config.kl_coef, config.entropy_coef)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            step = number * config.steps + k
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, num_rounds * config.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def write_winners(args: Args, seed: int, start: str, reward: str, dataset: str, file: Path) -> None:
    """Rows of the best of n responses, `winners` times for each prompt."""
    model, tokenizer, eos_ids = load(start, seed)
    score = load_score(reward, tokenizer, eos_ids, seed)
    rows = read_rows(dataset)
    number = args.winners * N
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    prompts = [row for row in ids for _ in range(number)]
    responses = responses_of(sample(model, prompts, 40, eos_ids, seed=seed, batch_size=1000))
    repeated = [row for row in rows for _ in range(number)]
    best = score(repeated, prompts, responses).view(-1, N).argmax(1).tolist()
    winners = []
    for group, place in enumerate(best):
        i = group * N + place
        text = tokenizer.decode(responses[i], skip_special_tokens=True)
        winners.append({"prompt": repeated[i]["prompt"], "completion": text})
    write_rows(file, winners)


# ---- Files and runs ----


def options(seed: int) -> SimpleNamespace:
    return SimpleNamespace(micro_batch_size=1000, seed=seed, gradient_checkpointing=False)


def load(folder: str, seed: int):
    model, tokenizer, eos_ids = load_model(folder, options(seed), CPU)
    use_rows(model)
    return model, tokenizer, eos_ids


def load_score(spec: str, tokenizer, eos_ids: list[int], seed: int):
    """score(rows, prompts, responses) of a reward."""
    score, model, _ = load_reward(spec, tokenizer, eos_ids, options(seed), CPU, contextlib.nullcontext)
    if model is not None:
        use_rows(model)
    return score


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(args: Args, folder: Path) -> None:
    """The rows that depend on no seed: the world's, and what methods make of them."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = lambda row: {key: x for key, x in row.items() if key != "_where"}
    for split in ("", "_test"):
        files = {}
        for name in ("demonstrations", "preferences", "prompts"):
            rows = [plain(row) for row in read_rows(f"data/{name}{split}.jsonl")]
            files[name] = rows[: 500 if split else None]  # an evaluation takes time
            if args.tiny:
                files[name] = rows[:48]
        decided = [row for row in files["preferences"] if row["mu"] == 1]
        files["feedme"] = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in decided]
        files["conditioning"] = []
        for row in decided:
            files["conditioning"].append({"prompt": GOOD + row["prompt"], "completion": row["chosen"]})
            files["conditioning"].append({"prompt": BAD + row["prompt"], "completion": row["rejected"]})
        files["twice"] = files["demonstrations"]
        if not split:
            files["twice"] = files["twice"] + more_demonstrations(len(files["twice"]), files["prompts"])
        for name, rows in files.items():
            write_rows(folder / f"{name}{split}.jsonl", rows)


def more_demonstrations(number: int, prompts: list[dict]) -> list[dict]:
    """Drawn as those of the world are, by another seed."""
    rng, rows = random.Random(1), []
    for _ in range(number):
        prompt = make_world.uniform(rng, prompts)["prompt"]
        aspect = next(word for word in prompt.split() if word in ASPECTS)
        rows.append({"prompt": prompt, "completion": make_world.response(rng, aspect)})
    return rows


def command(script, flags: dict) -> str:
    words = ["python", f"{script.__name__}.py"]
    for name, value in flags.items():
        value = " ".join(value) if isinstance(value, tuple) else value
        words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def once(folder: Path, name: str, what: str, function) -> None:
    """function(), unless it has finished before: with its CPU seconds on file, and `what` in commands.txt."""
    record = folder / f"{name}.seconds.json"
    if record.exists():
        return
    shutil.rmtree(folder / name, ignore_errors=True)  # what an interrupted run left
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)
    began = time.process_time()
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        function()
    seconds = time.process_time() - began
    with open(folder / "commands.txt", "a") as file:
        file.write(what + "\n")
    record.write_text(json.dumps({"seconds": seconds, "command": what}) + "\n")


def run(folder: Path, name: str, script, **flags) -> None:
    """A script makes folder/name."""
    flags = {**flags, "output_dir": str(folder / name)}
    once(folder, name, command(script, flags), lambda: script.main(script.Args(**flags)))


def run_seed(args: Args, seed: int, whole: bool) -> dict:
    """{method: (folder of its model, word before the prompt, steps on the way to it)}."""
    data, folder = Path(args.folder) / "data", Path(args.folder) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    file = lambda name: str(data / f"{name}.jsonl")
    common = {"seed": seed, "eval_every": 0}
    if args.tiny:
        common["eval_samples"] = 8
    start, reward = str(folder / "sft" / "model"), str(folder / "reward_model" / "model")
    run(folder, "sft", sft, dataset=file("demonstrations"), **common)
    from_random = dict(common)
    common["model"] = start
    run(folder, "dpo", dpo, dataset=file("preferences"), **common)
    methods = {"SFT": ("sft", "", ["sft"]), "DPO": ("dpo", "", ["sft", "dpo"])}
    if not whole:
        return methods

    run(folder, "twice", sft, dataset=file("twice"), num_train_epochs=2, **from_random)
    methods["SFT on twice the data"] = ("twice", "", ["twice"])
    for name, method, word in (("feedme", "FeedME", ""), ("conditioning", "conditioning", GOOD)):
        run(folder, name, sft, dataset=file(name), num_train_epochs=1, **common)
        methods[method] = (name, word, ["sft", name])

    run(folder, "reward_model", reward_model, dataset=file("preferences"), **common)
    methods["best-of-16"] = ("", "", ["sft", "reward_model"])
    winners = folder / "winners.jsonl"
    what = f"best of {N} responses to {args.winners} times each prompt -> {winners}"
    once(folder, "winners", what, lambda: write_winners(args, seed, start, reward, file("prompts"), winners))
    run(folder, "expert_iteration", sft, dataset=str(winners), eval_dataset=file("demonstrations_test"),
        num_train_epochs=3, **common)
    way = ["sft", "reward_model", "winners", "expert_iteration"]
    methods["expert iteration"] = ("expert_iteration", "", way)

    learned = {"reward": (reward,), "dataset": file("prompts"), **common}
    if args.tiny:
        learned["total_episodes"] = 256
    run(folder, "ppo", ppo, **learned)
    run(folder, "grpo", grpo, kl_in="reward", **learned)
    for name, method in (("ppo", "PPO"), ("grpo", "GRPO")):
        methods[method] = (name, "", ["sft", "reward_model", name])
    for method, config in FORMS.items():
        if args.tiny:
            config = replace(config, episodes=256, responses=128, steps=1)
        name = "quark_shipped" if config.keep_best else "quark"
        train = lambda config=config, name=name: train_quark(
            config, seed, start, reward, file("prompts"), folder / name)
        once(folder, name, f"{method}: {asdict(config)}, seed {seed} -> {folder / name}", train)
        methods[method] = (name, "" if config.keep_best else PARTS[0], ["sft", "reward_model", name])
    return methods


# ---- The judge ----


def figures(values, weights, kl, ref_values) -> dict:
    """Of one method: values {gold, length, perhaps learned: (prompts, n)}; weights (prompts, n) sum to 1."""
    row = {"kl": kl, "win": win_rate(values["gold"], weights, ref_values["gold"])}
    for name, x in values.items():
        row[name] = (weights * x).sum(1).mean().item()
    if kl > 1e-9:  # not the SFT model itself
        start = ref_values["gold"].mean().item()
        row["best"], row["ess"], _ = frontier_at(ref_values["gold"], kl)
        row["fraction"] = (row["gold"] - start) / (row["best"] - start)
    return row


def judge(args: Args, seed: int, methods: dict) -> dict:
    """{methods: {method: its figures on held-out prompts}, frontier: its curve, CPU seconds}."""
    folder = Path(args.folder) / f"seed{seed}"
    file = folder / "judged.json"
    if file.exists():
        result = json.loads(file.read_text())
        if result["methods"].keys() >= methods.keys():
            return result
    began = time.process_time()
    reference, tokenizer, eos_ids = load(str(folder / "sft" / "model"), seed)
    rewards = {"gold": load_score(GOLD, tokenizer, eos_ids, seed)}
    if "best-of-16" in methods:
        rewards["learned"] = load_score(str(folder / "reward_model" / "model"), tokenizer, eos_ids, seed)
    rows = read_rows(str(Path(args.folder) / "data" / "prompts_test.jsonl"))
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]

    def draw(model, word, number, seed):
        """({gold, learned, length: (prompts, number)}, batch) of responses to the prompts behind the word."""
        prompts = [row for row in ids for _ in range(number)]
        repeated = [row for row in rows for _ in range(number)]
        batch = sample(model, [word + prompt for prompt in prompts], 40, eos_ids, seed=seed, batch_size=1000)
        values = {"length": batch["mask"].sum(1)}
        for name, score in rewards.items():
            values[name] = score(repeated, prompts, responses_of(batch))
        return {name: x.double().view(len(rows), number) for name, x in values.items()}, batch

    def seconds(names):
        return sum(json.loads((folder / f"{name}.seconds.json").read_text())["seconds"] for name in names)

    ref_values, _ = draw(reference, [], args.reference_samples, seed)
    result = {"frontier": [tilted(ref_values["gold"], beta)[:2] for beta in BETAS], "methods": {}}
    for method, (name, word, way) in methods.items():
        if method in ("SFT", "best-of-16"):  # best of 1, and of 16
            values, scores = ref_values, ref_values.get("learned", ref_values["gold"])
            weights = best_of_n_weights(scores, 1 if method == "SFT" else N)
            kl = max(kl_of(weights), 0.0)
        else:
            policy, *_ = load(str(folder / name / "model"), seed)
            token = tokenizer(word)["input_ids"] if word else []
            values, batch = draw(policy, token, args.policy_samples, seed + 1)
            weights = torch.full_like(values["gold"], 1 / args.policy_samples)
            kl = kl_to(policy, reference, batch, 1000, len(token)).double().mean().item()
        row = figures(values, weights, kl, ref_values)
        row["seconds_in_all"] = seconds(way)
        row["seconds"] = seconds(part for part in way if method == "SFT" or part not in SHARED)
        result["methods"][method] = row
    weights = chosen_weights(ref_values["gold"])
    result["chosen"] = figures(ref_values, weights, kl_of(weights), ref_values)
    result["judging"] = time.process_time() - began
    result["training"] = seconds([file.name.partition(".")[0] for file in folder.glob("*.seconds.json")])
    file.write_text(json.dumps(result) + "\n")
    return result


# ---- The comparison ----


def separated(a: list[float], b: list[float]) -> dict:
    """Of b - a, paired by seed: mean, standard error, and whether Student's 95 % interval leaves 0 out."""
    gaps = [y - x for x, y in zip(a, b)]
    if len(gaps) < 2:
        return {"mean": gaps[0], "se": None, "separated": False}
    se = stdev(gaps) / math.sqrt(len(gaps))
    limit = STUDENT[min(len(gaps) - 2, len(STUDENT) - 1)]
    return {"mean": mean(gaps), "se": se, "separated": abs(mean(gaps)) > limit * se}


def over_seeds(rows: list[dict]) -> dict:
    """{column: values, mean and standard error} of what one method has in each seed."""
    columns = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if column in row]
        if values:
            se = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            columns[column] = {"mean": mean(values), "se": se, "seeds": values}
    return columns


def summary(judged: list[dict]) -> dict:
    """{method: over_seeds of it}, the best win rate first."""
    methods = {}
    for name in judged[0]["methods"]:
        results = [result["methods"] for result in judged]
        methods[name] = over_seeds([result[name] for result in results if name in result])
    return dict(sorted(methods.items(), key=lambda item: -item[1]["win"]["mean"]))


def pairs(methods: dict, column: str) -> list[dict]:
    """Each method against each one that is behind it in this column, the neighbours first."""
    order = [name for name in methods if column in methods[name]]
    order.sort(key=lambda name: -methods[name][column]["mean"])
    found = []
    for gap in range(1, len(order)):
        for first, second in zip(order, order[gap:]):
            values = [methods[name][column]["seeds"] for name in (second, first)]
            found.append({"better": first, "worse": second, "places": gap, **separated(*values)})
    return found


def shown(cell: dict | None, digits: int) -> str:
    if cell is None:
        return "–"
    error = "" if cell["se"] is None else f" ± {cell['se']:.{digits}f}"
    return f"{cell['mean']:.{digits}f}{error}"


def table(methods: dict) -> list[str]:
    """Lines of the table of README.md."""
    lines = ["| method | seeds | win rate against SFT | gold reward | KL (nats) | of the frontier | tokens "
             "| CPU s | in all | published: simulated, human |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in methods.items():
        published = ", ".join("–" if x is None else f"{x}" for x in PUBLISHED.get(name, ("–",)))
        cells = [name, str(len(row["win"]["seeds"])), shown(row["win"], 3), shown(row["gold"], 2),
                 shown(row["kl"], 2), shown(row.get("fraction"), 3), f"{row['length']['mean']:.1f}",
                 f"{row['seconds']['mean']:.0f}", f"{row['seconds_in_all']['mean']:.0f}", published]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdicts(methods: dict, orders: dict, chosen: dict) -> list[str]:
    """What the table shows, one line each."""
    lines = []
    highest = {name: max(row["fraction"]["seeds"]) for name, row in methods.items() if "fraction" in row}
    over = [name for name, fraction in highest.items() if fraction > 1]
    name = max(highest, key=highest.get)
    under = f"NO: {over}" if over else "yes"
    lines.append(f"all points of all seeds under the exact frontier: {under}; the highest is {name} with "
                 f"{highest[name]:.3f} of it")
    samples = {name: row["ess"]["mean"] for name, row in methods.items() if "ess" in row}
    low = [f"{name} ({ess:.0f})" for name, ess in samples.items() if ess < 50]
    lines.append("fewer than 50 effective samples a prompt behind the frontier, which is too low there, and "
                 f"the fraction too high: {', '.join(low) or 'none'}")
    bound = math.log(N) - (N - 1) / N
    kl = max(methods["best-of-16"]["kl"]["seeds"])
    holds = "holds" if kl <= bound else "FAILS"
    lines.append(f"KL of best-of-{N}, by the ranks of its samples: at most {kl:.4f} nats in any seed; the "
                 f"bound log {N} - {N - 1}/{N} = {bound:.4f} {holds}")
    lines.append(f"FeedME and conditioning aim at the law of the chosen sides, whose win rate is "
                 f"{shown(chosen['win'], 3)} at a KL of {shown(chosen['kl'], 2)} and a fraction of "
                 f"{shown(chosen['fraction'], 3)}")
    for column, name in (("win", "win rate"), ("fraction", "fraction of the frontier")):
        words = [orders[column][0]["better"]]
        for pair in orders[column]:
            if pair["places"] == 1:
                words += [">" if pair["separated"] else "≈", pair["worse"]]
        lines.append(f"order by {name}, > where a method is separated from the next and ≈ where it is not: "
                     f"{' '.join(words)}")
        same = [f"{pair['better']} ≈ {pair['worse']}" for pair in orders[column] if not pair["separated"]]
        if len(chosen["win"]["seeds"]) > 1:
            lines.append(f"not separated by {name}, {len(same)} of {len(orders[column])} pairs: "
                         f"{', '.join(same) or 'none'}")
    for kind, name in enumerate(("simulated", "human")):
        there = [method for method, rates in PUBLISHED.items() if rates[kind]]
        there.sort(key=lambda method: -PUBLISHED[method][kind])
        here = [method for method in methods if method in there]
        lines.append(f"AlpacaFarm's order, {name} annotators: {' > '.join(there)}; here: {' > '.join(here)}")
    return lines


def picture(methods: dict, curve: list, file: str) -> None:
    """Each method's mean below the frontier of seed 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rewards, kls = zip(*[(methods["SFT"]["gold"]["mean"], 0.0), *curve])
    axes.plot(kls, rewards, color="black", label="exact frontier (seed 1)")
    height = -math.inf
    for name, row in sorted(methods.items(), key=lambda item: item[1]["gold"]["mean"]):
        kl, gold = row["kl"], row["gold"]
        axes.errorbar(kl["mean"], gold["mean"], xerr=kl["se"], yerr=gold["se"], fmt="o", capsize=2)
        height = max(gold["mean"], height + 0.15)  # of the label, clear of the one below
        axes.text(kl["mean"] + (kl["se"] or 0) + 0.1, height, name, fontsize=9, verticalalignment="center")
    axes.set(xlabel="KL(policy || SFT), nats a response", ylabel="gold reward, held-out prompts",
             xlim=(-0.2, 1.35 * max(row["kl"]["mean"] for row in methods.values())))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.25)
    figure.savefig(f"{file}.png", dpi=110)


def main(args: Args) -> dict:
    if args.tiny:
        args = replace(args, winners=1, reference_samples=64, policy_samples=8)
    write_data(args, Path(args.folder) / "data")
    judged = []
    for seed in range(1, max(args.seeds, args.dpo_seeds) + 1):
        methods = run_seed(args, seed, whole=seed <= args.seeds)
        judged.append(judge(args, seed, methods))
    methods = summary(judged)
    orders = {"win": pairs(methods, "win"), "fraction": pairs(methods, "fraction")}
    chosen = over_seeds([result["chosen"] for result in judged])
    lines = verdicts(methods, orders, chosen)
    print("\n".join(table(methods) + lines))
    seconds = {name: sum(result[name] for result in judged) for name in ("training", "judging")}
    print(f"CPU seconds: {seconds['training']:.0f} of training, {seconds['judging']:.0f} of judging")
    commands = (Path(args.folder) / "seed1" / "commands.txt").read_text().splitlines()
    versions = {name: version(name) for name in ("torch", "transformers")}
    result = {"args": asdict(args), "hardware": hardware("cpu"), "versions": versions, "cpu_seconds": seconds,
              "commands_of_seed_1": commands, "quark": {name: asdict(x) for name, x in FORMS.items()},
              "published": PUBLISHED, "methods": methods, "chosen": chosen, "pairs": orders,
              "verdicts": lines, "frontier_of_seed_1": judged[0]["frontier"]}
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.7g}"))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items())
    Path(f"{args.output}.json").write_text("{" + lines + "}\n")
    if version("matplotlib"):
        picture(methods, judged[0]["frontier"], args.output)
    return rounded


if __name__ == "__main__":
    main(tyro.cli(Args))
