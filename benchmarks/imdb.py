"""Real reviews: what DPO, PPO, GRPO, preferred fine-tuning and best-of-n buy for the KL that they spend.

    python benchmarks/imdb.py
    python benchmarks/imdb.py --model gpt2-large --max-tokens 64 --folder runs/gpt2 --output runs/gpt2-imdb

The controlled sentiment experiment of arXiv:2305.18290 (Sec. 6, left of Fig. 2): film reviews are continued
from their first 2 to 8 tokens, and ought to be positive. Each command is printed and can be run by hand.

1. Gold: a logistic model of which words a text has, from half of the labels; its log-odds, times 4, are the
   reward, gold.py:reward in the folder of the runs.
2. sft.py on beginnings of reviews: the sentences that end within their first 48 tokens.
3. Pairs of samples from that start, labelled by Bradley-Terry with the gold reward.
4. dpo.py on the pairs, sft.py on their chosen sides (preferred-FT), reward_model.py; ppo.py and grpo.py on
   the gold reward and on the learned one. GRPO has its KL in the reward, so that all of them maximize
   E[r] - beta KL.
5. Each is judged on beginnings of reviews that nothing has seen: gold reward against KL(policy || start),
   beside best-of-n and the optimum pi_ref exp(r / beta) / Z, both from one pool of the start's samples.

What is done differently from the paper: without --model, a Llama of 2M parameters and its tokenizer, made
from the reviews alone, stand for gpt2-large, and always a bag of words for a fine-tuned RoBERTa; labels are
drawn, where the paper's are certain; two samples a prompt in place of four; AdamW in place of RMSprop; fixed
penalties of PPO in place of target KLs. What is finished is kept, so the command can be repeated. Needs
matplotlib for the picture.
"""

import json
import math
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import frontier  # noqa: E402
from common import (  # noqa: E402
    device_of, fail, load_model, load_prompts, load_reward, read_rows, responses_of, sample)


@dataclass
class Args:
    model: str = ""  # folder or Hub id to start from; empty: a small Llama from random weights
    data: str = "../shared/data"  # has imdb.train.jsonl and imdb.test.jsonl (text, label), or train/pos/*.txt
    folder: str = "runs/imdb"  # of the runs
    output: str = "benchmarks/results/imdb"  # .json and .png
    seeds: list[int] = field(default_factory=lambda: [1])  # of the pairs and of all that is trained on them
    dpo_betas: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0, 2.0])  # --beta
    ppo_gold: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0])  # --kl-coef of PPO, gold reward
    grpo_gold: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0])  # of GRPO
    ppo_learned: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0])  # and on the learned reward
    grpo_learned: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0])
    pairs: int = 3750  # prompts with two samples each; also of PPO and GRPO
    prompts: int = 64  # to judge by
    reference_samples: int = 256  # a prompt, for best-of-n and the optimum
    policy_samples: int = 16  # a prompt
    max_tokens: int = 48  # of prompt and completion
    scale: float = 4.0  # reward per nat of log-odds: with 1, labels of such short texts are mostly noise
    every: int = 1  # take one review in so many
    tiny: bool = False  # a test, whose figures mean nothing


# Flags of each script for a small model from random weights, for a pretrained one, and for a test.
FLAGS = {
    "small": {  # rates chosen on held-out training reviews for a model of half the width, and halved
        "sft.py": "--num-train-epochs 6 --batch-size 16 --learning-rate 1.5e-3 --warmup-steps 100",
        "preferred-FT": "--num-train-epochs 1 --batch-size 32 --learning-rate 2.5e-4",
        "reward_model.py": "--batch-size 32 --learning-rate 1.5e-3",
        "dpo.py": "--batch-size 32 --learning-rate 1.5e-4",
        "ppo.py": "--total-episodes 5120 --eval-samples 64 --learning-rate 2.5e-4",
        "grpo.py": "--total-episodes 3840 --eval-samples 64 --learning-rate 5e-4",
    },
    "pretrained": {  # the paper's batches and rate of DPO; the others are usual, and untried here
        "sft.py": "--num-train-epochs 1 --learning-rate 1e-5",
        "preferred-FT": "--num-train-epochs 1 --learning-rate 1e-5",
        "reward_model.py": "--learning-rate 1e-5",
        "dpo.py": "--learning-rate 1e-6 --warmup-steps 150",
        "ppo.py": "--total-episodes 51200 --batch-size 128 --num-minibatches 4 --learning-rate 2e-6 "
                  "--critic-learning-rate 1e-5",
        "grpo.py": "--total-episodes 51200 --batch-size 256 --learning-rate 2e-6",
    },
    "tiny": {
        "sft.py": "--num-train-epochs 3 --batch-size 16 --learning-rate 1e-2 --eval-samples 4",
        "preferred-FT": "--num-train-epochs 1 --batch-size 8 --eval-samples 4",
        "reward_model.py": "--batch-size 8",
        "dpo.py": "--batch-size 8 --eval-samples 4",
        "ppo.py": "--total-episodes 16 --batch-size 8 --eval-samples 4",
        "grpo.py": "--total-episodes 16 --batch-size 16 --eval-samples 4",
    },
}
SMALL = {  # the Llama that starts from random weights
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
VOCABULARY = 2048  # of its tokenizer
NS = [1, 2, 4, 8, 16, 32, 64]  # of best-of-n
LEAST_ESS = 50  # effective samples a prompt, below which the optimum is not shown
STYLES = {  # of the picture: color, marker and line
    "preferred-FT": ("tab:brown", "v", "-"), "DPO": ("tab:red", "o", "-"),
    "PPO, gold": ("tab:blue", "s", "-"), "PPO, learned": ("tab:blue", "s", ":"),
    "GRPO, gold": ("tab:green", "^", "-"), "GRPO, learned": ("tab:green", "^", ":")}

# ---- Reviews ----


def read_reviews(folder: str, split: str) -> list[dict]:
    """Rows of text and label, 1 positive and 0 negative: of a file, or of folders of text files."""
    file = Path(folder, f"imdb.{split}.jsonl")
    if file.exists():
        return read_rows(str(file), "text label")
    rows = []
    for label, name in enumerate(("neg", "pos")):
        for path in sorted(Path(folder, split, name).glob("*.txt")):
            text = path.read_text(encoding="utf-8").replace("<br />", " ")
            rows.append({"text": text, "label": label})
    return rows or fail(f"--data {folder}: neither {file.name} nor {split}/neg/*.txt and {split}/pos/*.txt")


def beginnings(tokenizer, texts: list[str], max_tokens: int, seed: int) -> list[dict]:
    """Rows of prompt, a text's first 2 to 8 tokens, and completion, up to the end of the last sentence within
    max_tokens. Texts without such an end are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (len(texts),), generator=generator).tolist()
    encoded = tokenizer([text[: 10 * max_tokens] for text in texts], add_special_tokens=False)["input_ids"]
    rows = []
    for ids, length in zip(encoded, lengths):
        prompt = tokenizer.decode(ids[:length])
        text = tokenizer.decode(ids[: max_tokens - 1])  # and an EOS
        ends = [match.end() for match in re.finditer(r"[.!?](?= )", text)]
        whole = text.startswith(prompt) and "\ufffd" not in text  # a token may be half a letter
        if whole and ends and ends[-1] > len(prompt):
            rows.append({"prompt": prompt, "completion": text[len(prompt) : ends[-1]]})
    return rows


def make_start(folder: Path, texts: list[str]) -> None:
    """A folder with a byte-level BPE tokenizer learned from texts, a Llama's configuration and no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>"], initial_alphabet=letters,
        show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
    whole.save_pretrained(folder)
    transformers.LlamaConfig(vocab_size=len(whole), **SMALL).save_pretrained(folder)


# ---- The gold reward ----

WORD = r"[a-z]+(?:'[a-z]+)?"
GOLD = '''"""Log-odds, times a scale, that a review is positive: a logistic model of which words are in it."""

import json
import re
from pathlib import Path

GOLD = json.loads(Path(__file__).with_name("gold.json").read_text())


def reward(prompts, completions, **columns):
    rewards = []
    for prompt, completion in zip(prompts, completions):
        words = set(re.findall(GOLD["word"], (prompt + completion).lower()))
        odds = GOLD["bias"] + sum(GOLD["weights"].get(word, 0.0) for word in words)
        rewards.append(GOLD["scale"] * odds)
    return rewards
'''


def words_of(text: str) -> set[str]:
    return set(re.findall(WORD, text.lower()))


def fit_gold(rows: list[dict], least: int = 10, penalty: float = 3e-3) -> dict:
    """logit P(positive) = bias + sum of the weights of the words that a text has, by maximum likelihood.

    mean cross-entropy + penalty / 2 |weights|^2 is minimized by L-BFGS; words of fewer than `least` texts are
    left out. Returns {"word": what a word is, "bias", "weights"}.
    """
    bags = [words_of(row["text"]) for row in rows]
    counts = Counter(word for bag in bags for word in bag)
    words = sorted(word for word, count in counts.items() if count >= least)
    column_of = {word: k for k, word in enumerate(words)}
    owners, columns = [], []
    for owner, bag in enumerate(bags):
        known = sorted(column_of[word] for word in bag & column_of.keys())
        owners += [owner] * len(known)
        columns += known
    ones = torch.ones(len(columns), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not check these indices
        X = torch.sparse_coo_tensor([owners, columns], ones, (len(bags), len(words))).coalesce()
    y = torch.tensor([row["label"] for row in rows], dtype=torch.float64)
    weights = torch.zeros(len(words), 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=300, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = (X @ weights).squeeze(1) + bias
        value = F.binary_cross_entropy_with_logits(logits, y) + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {"word": WORD, "bias": bias.item(), "weights": dict(zip(words, weights.flatten().tolist()))}


def accuracy(gold: dict, rows: list[dict]) -> float:
    """Share of reviews whose log-odds have the sign of the label."""
    hits = 0
    for row in rows:
        odds = gold["bias"] + sum(gold["weights"].get(word, 0.0) for word in words_of(row["text"]))
        hits += (odds > 0) == (row["label"] == 1)
    return hits / len(rows)


# ---- Runs ----


def write(file: Path, rows: list[dict]) -> None:
    """JSON lines; whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(file)


def run(args: Args, name: str, script: str, flags: str, settings: str = "") -> str:
    """Print a command and run it, unless it has ended before. Returns the folder of its model."""
    folder = Path(args.folder, name)
    kind = "tiny" if args.tiny else "pretrained" if args.model else "small"
    flags += f" {FLAGS[kind][settings or script]} --eval-every 0 --save-every 0 --output-dir {folder}"
    if not (folder / "command.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        print(f"\npython {script} {flags}", flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, str(ROOT / script), *shlex.split(flags)], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write(folder / "command.json", [{"command": f"python {script} {flags}", "cpu_seconds": seconds}])
    return f"{folder}/model"


def load(args: Args, folder: str) -> SimpleNamespace:
    """A policy with what sampling from it needs."""
    options = SimpleNamespace(micro_batch_size=64, seed=1, gradient_checkpointing=False)
    device, autocast = device_of(SimpleNamespace(device="auto", dtype="auto"))
    model, tokenizer, eos_ids = load_model(folder, options, device)
    return SimpleNamespace(model=model.requires_grad_(False), tokenizer=tokenizer, eos_ids=eos_ids,
                           options=options, autocast=autocast, max_new_tokens=args.max_tokens)


def reward_of(policy, spec: str):
    """score(rows, prompts, responses) of a reward model's folder, or of file.py:function."""
    device = policy.model.device
    score, *_ = load_reward(spec, policy.tokenizer, policy.eos_ids, policy.options, device, policy.autocast)
    return score


def answer(policy, rows: list[dict], number: int, seed: int) -> tuple[list, list, list, dict]:
    """`number` responses to each prompt: (rows, prompts, responses, batch), those of a prompt together."""
    pairs = [pair for pair in load_prompts(policy.tokenizer, rows, 512) for _ in range(number)]
    rows, prompts = map(list, zip(*pairs))
    with policy.autocast():
        batch = sample(policy.model, prompts, policy.max_new_tokens, policy.eos_ids, seed=seed)
    return rows, prompts, responses_of(batch), batch


def make_pairs(world, rows: list[dict], folder: Path, seed: int) -> None:
    """Files of pairs, and of their chosen sides: two samples of the start, the first the better one with
    probability sigma(r_1 - r_2). Pairs with a side that has no end, or with equal sides, are left out.
    """
    policy = world.reference
    rows, prompts, responses, _ = answer(policy, rows, 2, seed)
    rewards = world.gold(rows, prompts, responses)
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    draws = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = []
    for k in range(0, len(rows), 2):
        ended = responses[k][-1] in policy.eos_ids and responses[k + 1][-1] in policy.eos_ids
        p = torch.sigmoid(rewards[k] - rewards[k + 1]).item()
        chosen, rejected, p_chosen = texts[k], texts[k + 1], p
        if draws[k] >= p:
            chosen, rejected, p_chosen = rejected, chosen, 1 - p
        if ended and chosen != rejected:
            pairs.append({"prompt": rows[k]["prompt"], "chosen": chosen, "rejected": rejected,
                          "p_chosen": p_chosen})
    preferred = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    n = len(pairs) // 9  # held out
    write(folder / "preferred_test.jsonl", preferred[:n])
    write(folder / "preferred.jsonl", preferred[n:])
    write(folder / "pairs_test.jsonl", pairs[:n])
    write(folder / "pairs.jsonl", pairs[n:])


def train(world, sft: str, learned: str, seed: int):
    """All methods from one set of pairs: one point after the other, judged as soon as its run has ended."""
    args = world.args
    pairs = f"--dataset {args.folder}/seed{seed}/pairs.jsonl"
    start = f"--seed {seed} --model {sft}"

    def point(method, setting, script, flags, settings=""):
        name = re.sub(r"\W+", "_", f"{method} {setting}")
        flags = f"{start} {flags} --max-new-tokens {args.max_tokens}"
        model = run(args, f"seed{seed}/{name}", script, flags, settings)
        return judge(world, {"method": method, "setting": setting, "seed": seed}, model, learned)

    for beta in args.dpo_betas:
        yield point("DPO", beta, "dpo.py", f"{pairs} --beta {beta}")
    preferred = f"--dataset {args.folder}/seed{seed}/preferred.jsonl"
    yield point("preferred-FT", 0, "sft.py", preferred, "preferred-FT")
    for name, spec in (("gold", world.gold_spec), ("learned", learned)):
        prompts = f"--dataset {args.folder}/prompts.jsonl --reward {spec} --missing-eos-penalty 0"
        for beta in getattr(args, f"ppo_{name}"):
            yield point(f"PPO, {name}", beta, "ppo.py", f"{prompts} --kl-coef {beta}")
        for beta in getattr(args, f"grpo_{name}"):
            yield point(f"GRPO, {name}", beta, "grpo.py", f"{prompts} --kl-in reward --kl-coef {beta}")


# ---- Judging ----


def best_of(rewards: torch.Tensor, n: int) -> float:
    """E[the largest of n]: sum_i r_(i) C(i - 1, n - 1) / C(N, n), the mean over all subsets of the N samples.

    rewards: (prompts, N), float64. Returns the mean over prompts.
    """
    N = rewards.shape[1]
    weights = [math.comb(i - 1, n - 1) / math.comb(N, n) for i in range(1, N + 1)]
    return (rewards.sort(1).values @ rewards.new_tensor(weights)).mean().item()


def best_of_kl(n: int) -> float:
    """KL(best of n || one) in nats: log n - (n - 1) / n where no two rewards are equal, else less."""
    return math.log(n) - (n - 1) / n


def best_of_at(curve: list, kl: float) -> float | None:
    """Reward of best-of-n where its KL is this one, between the n of the curve; None beyond it."""
    for (_, low, start), (_, high, end) in zip(curve, curve[1:]):
        if start <= kl <= end:
            return low + (high - low) * (kl - start) / (end - start)
    return None


def describe(policy, responses: list, number: int) -> dict:
    """Mean length in tokens, share with an EOS, and the first response to each of four prompts."""
    ended = [ids[-1] in policy.eos_ids for ids in responses]
    texts = policy.tokenizer.batch_decode(responses[::number][:4], skip_special_tokens=True)
    length = sum(map(len, responses)) / len(responses)
    return {"length": length, "ended": sum(ended) / len(ended), "samples": texts}


def draw_pool(world) -> dict:
    """Gold rewards (prompts, samples) of many samples of the start."""
    file, number = Path(world.args.folder, "pool.json"), world.args.reference_samples
    if not file.exists():
        *texts, _ = answer(world.reference, world.rows, number, seed=3)
        rewards = world.gold(*texts).double().view(len(world.rows), number)
        write(file, [{"rewards": rewards.tolist(), **describe(world.reference, texts[2], number)}])
    return read_rows(str(file))[0]


def judge(world, point: dict, model: str, learned: str) -> dict:
    """The point with its rewards, its KL (see frontier.py) and its samples, kept in the run's folder."""
    file, number = Path(model).with_name("judged.json"), world.args.policy_samples
    if not file.exists():
        began = time.process_time()
        policy = load(world.args, model)
        *texts, batch = answer(policy, world.rows, number, seed=2)
        gold = world.gold(*texts).double().cpu().view(-1, number)
        with policy.autocast():
            kl = frontier.kl_to(policy.model, world.reference.model, batch, 64).double().view(-1, number)
        found = {"gold": gold.mean().item(), "gold_se": frontier.standard_error(gold)}
        found |= {"kl": kl.mean().item(), "kl_se": frontier.standard_error(kl)}
        if "learned" in point["method"]:
            found["learned"] = reward_of(policy, learned)(*texts).mean().item()
        found |= describe(policy, texts[2], number)
        write(file, [{**found, "judge_seconds": time.process_time() - began}])
    (found,), (command,) = read_rows(str(file)), read_rows(str(file.with_name("command.json")))
    point = point | found | command
    del point["_where"]
    return point


def optimum_at(rewards: torch.Tensor, kl: float) -> float | None:
    """The largest reward at this KL; None where the pool is too small to tell."""
    best, ess, _ = frontier.frontier_at(rewards, kl)
    return best if ess >= LEAST_ESS else None


def over_seeds(points: list[dict]) -> list[list[dict]]:
    """The points of each method and setting, one a seed, in the order of the first seed."""
    groups = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"]), []).append(point)
    return list(groups.values())


def mean_of(points: list[dict], name: str, digits: int) -> str:
    """The mean over seeds and its standard error, of one seed that of its samples; empty if one has none."""
    values = [point[name] for point in points]
    if None in values:
        return ""
    x = torch.tensor(values, dtype=torch.float64)
    if f"{name}_se" not in points[0]:
        return f"{x.mean():.{digits}f}"
    error = points[0][f"{name}_se"]
    if len(x) > 1:
        error = x.std() / math.sqrt(len(x))
    return f"{x.mean():.{digits}f} ± {error:.{digits}f}"


def cells_of(points: list[dict]) -> list[str]:
    """A line of the table: beta, gold reward, KL, what best-of-n and the optimum have at that KL, tokens, CPU
    seconds.
    """
    setting = points[0]["setting"]
    beta = f"{setting:g}" if setting else ""
    names = {"gold": 2, "kl": 2, "best_of_n_at_kl": 2, "optimum_at_kl": 2, "length": 1, "cpu_seconds": 0}
    return [beta, *(mean_of(points, name, digits) for name, digits in names.items())]


def of_run(model: str, *names: str) -> dict:
    """The last of these metrics of a run, its command and its CPU seconds."""
    metrics = read_rows(str(Path(model).with_name("metrics.jsonl")))[-1]
    (command,) = read_rows(str(Path(model).with_name("command.json")))
    found = {name: metrics[name] for name in names}
    return found | {name: command[name] for name in ("command", "cpu_seconds")}


def save(args: Args, result: dict, pool: dict) -> None:
    """Add what follows from the pool, and write the figures and the picture."""
    rewards = torch.tensor(pool["rewards"], dtype=torch.float64)
    sizes = [n for n in NS if n <= args.reference_samples]
    best_of_n = [[n, best_of(rewards, n), best_of_kl(n)] for n in sizes]
    for point in result["points"]:
        point["optimum_at_kl"] = optimum_at(rewards, point["kl"])
        point["best_of_n_at_kl"] = best_of_at(best_of_n, point["kl"])
    result["start"] |= {name: pool[name] for name in ("length", "ended", "samples")}
    result["start"] |= {"gold": rewards.mean().item(), "spread": rewards.std(1).mean().item()}
    betas = [30 * 0.88**k for k in range(50)]
    runs = [result["start"], *result["reward_models"].values(), *result["points"]]
    settings = {name: x for name, x in asdict(args).items() if name not in ("data", "folder", "output")}
    result |= {
        "args": settings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "best_of_n": best_of_n,
        "optimum": [[beta, *frontier.tilted(rewards, beta)] for beta in betas],
        "cpu_seconds": sum(row["cpu_seconds"] + row.get("judge_seconds", 0.0) for row in runs)}
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    Path(f"{args.output}.json").write_text(json.dumps(rounded, indent=1) + "\n")
    picture(rounded, args.output)


def picture(result: dict, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    start = (0.0, result["start"]["gold"])
    optimum = [(kl, reward) for _, reward, kl, ess in result["optimum"] if ess >= LEAST_ESS]
    axes.plot(*zip(start, *optimum), color="k", linewidth=3, label="optimum, as far as the pool tells")
    axes.plot(*zip(*[(kl, reward) for _, reward, kl in result["best_of_n"]]), ".--", color="0.4",
              label=f"best of n = {NS[0]} to {result['best_of_n'][-1][0]}")
    for method, (color, marker, line) in STYLES.items():
        for seed in result["args"]["seeds"]:
            points = [p for p in result["points"] if (p["method"], p["seed"]) == (method, seed)]
            points.sort(key=lambda p: p["kl"])
            style = {"color": color, "marker": marker, "linestyle": line}
            if seed == result["args"]["seeds"][0]:
                style["label"] = method
            if "learned" in method:
                style["markerfacecolor"] = "white"
            if not points:
                continue
            axes.plot([p["kl"] for p in points], [p["gold"] for p in points], **style)
    axes.plot(*start, "*", color="tab:purple", markersize=14, label="start: SFT")
    axes.set(xlabel="KL(policy || start), nats a response", ylabel="gold reward: log-odds, times a scale",
             title="Film reviews continued from the first 2 to 8 tokens of held-out ones")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(f"{file}.png", dpi=110)
    plt.close(figure)


def main(args: Args) -> dict:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("the picture needs `pip install matplotlib`")
    torch.set_num_threads(1)
    root = Path(args.folder)
    root.mkdir(parents=True, exist_ok=True)

    # 1. the gold reward, from half of the labels
    train_rows, test_rows = [read_reviews(args.data, split)[:: args.every] for split in ("train", "test")]
    file = root / "gold.json"
    if not file.exists():
        model = fit_gold(train_rows[::2])
        short = [{**row, "text": " ".join(row["text"].split()[:30])} for row in test_rows]
        measured = {"words": len(model["weights"]), "held_out_accuracy": accuracy(model, train_rows[1::2]),
                    "test_accuracy": accuracy(model, test_rows),
                    "test_accuracy_of_30_words": accuracy(model, short)}
        write(file, [{**model, "scale": args.scale, "measured": measured}])
    (root / "gold.py").write_text(GOLD)
    gold = json.loads(file.read_text())["measured"]
    print("gold reward: " + ", ".join(f"{name} {x:.4g}" for name, x in gold.items()), flush=True)

    # 2. the start. What the scripts see as held out are training reviews
    model = args.model or f"{root}/start"
    if not args.model and not Path(model).exists():
        make_start(Path(model), [row["text"][:600] for row in train_rows])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = beginnings(tokenizer, [row["text"] for row in train_rows], args.max_tokens, seed=1)
    judged_by = beginnings(tokenizer, [row["text"] for row in test_rows], args.max_tokens, seed=2)
    n = len(rows) // 40
    prompts = [{"prompt": row["prompt"]} for row in rows]
    write(root / "reviews_test.jsonl", rows[:n])
    write(root / "reviews.jsonl", rows[n:])
    write(root / "prompts_test.jsonl", prompts[:n][:64])
    write(root / "prompts.jsonl", prompts[n : n + args.pairs])
    flags = f"--model {model} --dataset {root}/reviews.jsonl --max-new-tokens {args.max_tokens}"
    sft = run(args, "sft", "sft.py", flags)
    reference = load(args, sft)
    spec = f"{root}/gold.py:reward"
    world = SimpleNamespace(args=args, reference=reference, rows=judged_by[: args.prompts], gold_spec=spec,
                            gold=reward_of(reference, spec))
    pool = draw_pool(world)

    # 3. to 5. pairs, what is trained on them, and where it ends
    points, reward_models = [], {}
    for seed in args.seeds:
        folder = root / f"seed{seed}"
        if not (folder / "pairs.jsonl").exists():
            make_pairs(world, prompts[n : n + args.pairs], folder, seed)
        flags = f"--seed {seed} --model {sft} --dataset {folder}/pairs.jsonl"
        learned = run(args, f"seed{seed}/reward", "reward_model.py", flags)
        reward_models[seed] = of_run(learned, "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high",
                                     "eval/accuracy_ceiling")
        for point in train(world, sft, learned, seed):
            points.append(point)
            print("{method} {setting} seed {seed}: gold {gold:.3f} +- {gold_se:.3f}, KL {kl:.2f} +- "
                  "{kl_se:.2f}, {length:.1f} tokens, {cpu_seconds:.0f} s".format(**point), flush=True)
            start = of_run(sft, "eval/loss") | {"parameters": reference.model.num_parameters()}
            result = {"gold": gold, "start": start, "reward_models": reward_models, "points": points}
            save(args, result, pool)  # after each point, so that a long run shows its picture
    return json.loads(Path(f"{args.output}.json").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
