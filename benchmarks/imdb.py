"""Real reviews: what DPO, PPO, GRPO, preferred fine-tuning and best-of-n buy for the KL they spend.

    python benchmarks/imdb.py
    python benchmarks/imdb.py --model gpt2-large --folder runs/imdb-gpt2 --output imdb-gpt2

The controlled sentiment experiment of arXiv:2305.18290 (Sec. 6, left of Fig. 2): film reviews are continued from
their first 2 to 8 tokens, and ought to be positive. The pipeline, whose commands are printed and can be run by hand:

1. Gold: a logistic bag of words, fitted to half of the labels; its log-odds are the reward, gold.py:log_odds.
2. SFT on the reviews' beginnings: whole sentences within their first 64 tokens.
3. Pairs of samples from the SFT model, labelled by Bradley-Terry with the gold reward.
4. A learned reward from the pairs; DPO on them, and SFT on their chosen sides (preferred fine-tuning).
5. PPO and GRPO on the gold reward and on the learned one.
6. All of them on prompts of held-out reviews: gold reward against KL(policy || SFT), beside best-of-n and the optimum.

Without --model a small Llama and its tokenizer of 2,048 pieces are made from the reviews alone, in place of gpt2-large;
the gold classifier takes the place of a fine-tuned RoBERTa, and labels are drawn rather than certain. What is finished is kept,
so the command can be repeated. Needs matplotlib for the picture.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import frontier  # noqa: E402
from common import device_of, fail, load_model, load_prompts, load_reward, read_rows, responses_of, sample  # noqa: E402


@dataclass
class Args:
    model: str = ""  # folder or Hub id to start from; empty: a small Llama from random weights
    data: str = "../shared/data"  # imdb.train.jsonl, imdb.test.jsonl (text, label); or train/pos/*.txt and so on
    folder: str = "runs/imdb"  # of the runs
    output: str = "benchmarks/results/imdb"  # .json and .png
    seeds: list[int] = field(default_factory=lambda: [1])  # of pairs and of what is trained on them
    dpo_betas: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0])  # --beta
    kl_coefs: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0])  # of PPO and GRPO
    pairs: int = 3000  # of training
    prompts: int = 64  # of held-out reviews, to judge by
    reference_samples: int = 256  # a prompt, for best-of-n and the optimum
    policy_samples: int = 16  # a prompt
    max_tokens: int = 48  # of prompt and completion
    tiny: bool = False  # a test of a few seconds, whose figures mean nothing


# Flags of each script, for a small model from random weights, for a pretrained one, and for a test.
FLAGS = {
    "small": {
        "sft.py": "--num-train-epochs 3 --batch-size 16 --learning-rate 3e-3 --warmup-steps 100",
        "preferred": "--num-train-epochs 1 --batch-size 32 --learning-rate 5e-4",
        "reward_model.py": "--batch-size 32 --learning-rate 1e-3",
        "dpo.py": "--batch-size 32 --learning-rate 3e-4",
        "ppo.py": "--total-episodes 2560 --learning-rate 3e-4 --critic-learning-rate 1e-3 --eval-samples 64",
        "grpo.py": "--total-episodes 3840 --learning-rate 5e-4 --eval-samples 64",
    },
    "pretrained": {  # of arXiv:2305.18290, with AdamW in place of RMSprop
        "sft.py": "--num-train-epochs 1 --learning-rate 1e-5",
        "preferred": "--num-train-epochs 1 --learning-rate 1e-5",
        "reward_model.py": "--learning-rate 1e-5",
        "dpo.py": "--learning-rate 1e-6 --warmup-steps 150",
        "ppo.py": "--total-episodes 51200 --batch-size 128 --num-minibatches 4 --learning-rate 2e-6 "
                  "--critic-learning-rate 1e-5",
        "grpo.py": "--total-episodes 51200 --batch-size 256 --learning-rate 2e-6",
    },
    "tiny": {
    "sft.py": "--num-train-epochs 1 --batch-size 16",
    "preferred": "--num-train-epochs 1 --batch-size 16",
    "reward_model.py": "--batch-size 16",
    "dpo.py": "--batch-size 16",
    "ppo.py": "--total-episodes 32 --batch-size 16 --num-minibatches 1 --eval-samples 8",
    "grpo.py": "--total-episodes 32 --batch-size 16 --eval-samples 8",
    },
}
LEAST_ESS = 50  # effective samples a prompt of a point of the frontier that is shown
STYLES = {"preferred-FT": ("tab:brown", "v"), "DPO": ("tab:red", "o"),
          "PPO, gold": ("tab:blue", "s"), "PPO, learned": ("tab:cyan", "s"),
          "GRPO, gold": ("tab:green", "^"), "GRPO, learned": ("tab:olive", "^")}

# ---- Reviews ----


def read_reviews(folder: str, split: str) -> list[dict]:
    """Rows of text and label (1 positive, 0 negative): imdb.SPLIT.jsonl, or text files as the data set's archive has."""
    file = Path(folder, f"imdb.{split}.jsonl")
    if file.exists():
        return read_rows(str(file), "text label")
    rows = []
    for label, name in enumerate(("neg", "pos")):
        for path in sorted(Path(folder, split, name).glob("*.txt")):
            rows.append({"text": path.read_text(encoding="utf-8").replace("<br />", " "), "label": label})
    return rows or fail(f"--data {folder}: neither {file.name} nor {split}/pos/*.txt and {split}/neg/*.txt")


def openings(tokenizer, rows: list[dict], max_tokens: int, seed: int) -> list[dict]:
    """Rows of prompt, the first 2 to 8 tokens, and completion, up to the last sentence that ends within max_tokens."""
    texts = [row["text"][: 10 * max_tokens] for row in rows]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (len(texts),), generator=generator).tolist()
    result = []
    for ids, length in zip(tokenizer(texts, add_special_tokens=False)["input_ids"], lengths):
        prompt, text = tokenizer.decode(ids[:length]), tokenizer.decode(ids[: max_tokens - 1])
        ends = [match.end() for match in re.finditer(r"[.!?](?= )", text)]
        if ends and ends[-1] > len(prompt) and text.startswith(prompt) and "\ufffd" not in text:
            result.append({"prompt": prompt, "completion": text[len(prompt) : ends[-1]]})
    return result


def make_start(folder: Path, texts: list[str]) -> None:
    """A folder of a tokenizer, byte-level BPE learned from the texts, and of a Llama's configuration, no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config.save_pretrained(folder)


# ---- The gold reward ----

GOLD = '''"""The gold reward: log-odds that a review is positive, by a logistic model of which words are in it."""

import json
import re
from pathlib import Path

MODEL = json.loads(Path(__file__).with_suffix(".json").read_text())
WORD = re.compile(MODEL["word"])


def log_odds(prompts, completions, **columns):
    rewards = []
    for prompt, completion in zip(prompts, completions):
        words = set(WORD.findall((prompt + completion).lower()))
        rewards.append(MODEL["bias"] + sum(MODEL["weights"].get(word, 0.0) for word in words))
    return rewards
'''
WORD = r"[a-z]+(?:'[a-z]+)?"


def words_of(text: str) -> set[str]:
    return set(re.findall(WORD, text.lower()))


def fit_gold(rows: list[dict], least: int = 10, penalty: float = 3e-3) -> dict:
    """{"word", "bias", "weights"} of logit P(positive) = bias + sum of the weights of the words in a text.

    Mean cross-entropy + penalty / 2 |weights|^2 is minimal there (L-BFGS). Words of fewer than `least` texts are left out.
    """
    bags = [words_of(row["text"]) for row in rows]
    counts = {}
    for bag in bags:
        for word in bag:
            counts[word] = counts.get(word, 0) + 1
    words = sorted(word for word, count in counts.items() if count >= least)
    index = {word: i for i, word in enumerate(words)}
    columns = [[index[word] for word in sorted(bag) if word in index] for bag in bags]
    owners = torch.arange(len(bags)).repeat_interleave(torch.tensor([len(column) for column in columns]))
    places = torch.stack([owners, torch.tensor(sum(columns, []))])
    values = torch.ones(places.shape[1], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that it does not check these indices
        X = torch.sparse_coo_tensor(places, values, (len(bags), len(words))).coalesce()
    y = torch.tensor([row["label"] for row in rows], dtype=torch.float64)
    w = torch.zeros(len(words) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def loss():
        optimizer.zero_grad()
        logits = (X @ w[:-1, None]).squeeze(1) + w[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        value = value + penalty / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {"word": WORD, "bias": w[-1].item(), "weights": dict(zip(words, w[:-1].tolist()))}


def log_odds(gold: dict, text: str) -> float:
    return gold["bias"] + sum(gold["weights"].get(word, 0.0) for word in words_of(text))


def accuracy(gold: dict, rows: list[dict]) -> float:
    """Share of reviews whose label has the sign of the log-odds."""
    hits = [(log_odds(gold, row["text"]) > 0) == (row["label"] == 1) for row in rows]
    return sum(hits) / len(hits)


# ---- Runs ----


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(file)


def run(args: Args, folder: Path, script: str, flags: str, settings: str = "") -> str:
    """Run a script unless its folder is finished; print its command. Returns the folder of its model."""
    given = FLAGS["tiny" if args.tiny else "pretrained" if args.model else "small"]
    command = f"{script} {flags} {given[settings or script]} --eval-every 0 --save-every 0 --output-dir {folder}"
    record = folder / "command.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        print(f"\npython {command}", flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *shlex.split(f"{ROOT}/{command}")], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write(record, [{"command": f"python {command}", "cpu_seconds": round(seconds, 1)}])
    return f"{folder}/model"


def load(args: Args, name: str) -> SimpleNamespace:
    """A model with what sampling from it needs."""
    options = SimpleNamespace(micro_batch_size=64, seed=1, gradient_checkpointing=False, device="auto", dtype="auto")
    device, autocast = device_of(options)
    model, tokenizer, eos_ids = load_model(name, options, device)
    model.requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=tokenizer, eos_ids=eos_ids, options=options, autocast=autocast,
                           max_new_tokens=args.max_tokens)


def answer(policy, rows: list[dict], number: int, seed: int) -> tuple:
    """`number` responses to each row's prompt: (rows, prompts, responses, batch), the same prompt's together."""
    pairs = [pair for pair in load_prompts(policy.tokenizer, rows, 512) for _ in range(number)]
    rows, prompts = map(list, zip(*pairs))
    with policy.autocast():
        batch = sample(policy.model, prompts, policy.max_new_tokens, policy.eos_ids, seed=seed)
    return rows, prompts, responses_of(batch), batch


def make_pairs(world, sft: str, rows: list[dict], folder: Path, seed: int) -> None:
    """pairs.jsonl, pairs_test.jsonl and preferred.jsonl: two finished samples to each prompt, and who won.

    The first wins with probability sigma(r_1 - r_2): Bradley-Terry on the gold reward.
    """
    policy = world.reference
    rows, prompts, responses, _ = answer(policy, rows, 2, seed)
    rewards = world.gold(rows, prompts, responses)
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(rows), generator=generator)
    pairs = []
    for k in range(0, len(rows), 2):
        finished = all(ids[-1] in policy.eos_ids for ids in responses[k : k + 2])
        p = torch.sigmoid(rewards[k] - rewards[k + 1]).item()
        first_wins = draws[k].item() < p
        winner, loser = (k, k + 1) if first_wins else (k + 1, k)
        if finished and texts[k] != texts[k + 1]:
            pairs.append({"prompt": rows[k]["prompt"], "chosen": texts[winner], "rejected": texts[loser],
                          "p_chosen": p if first_wins else 1 - p})
    held_out = len(pairs) // 9
    write(folder / "pairs_test.jsonl", pairs[:held_out])
    preferred = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    write(folder / "preferred_test.jsonl", preferred[:held_out])
    write(folder / "preferred.jsonl", preferred[held_out:])
    write(folder / "pairs.jsonl", pairs[held_out:])


def train(world, root: Path, sft: str, folder: Path, seed: int) -> list[dict]:
    """All methods from one set of pairs, each judged as soon as it has ended."""
    args = world.args
    gold = f"{root}/gold.py:log_odds"
    common = f"--seed {seed} --model {sft} --max-new-tokens {args.max_tokens}"
    pairs = f"--dataset {folder}/pairs.jsonl"
    learned = run(args, folder / "reward", "reward_model.py", f"--seed {seed} --model {sft} {pairs}")
    points = []

    def add(method, setting, script, flags, settings=""):
        name = folder / f"{method}{setting}".replace(" ", "_").replace(",", "")
        model = run(args, name, script, f"{common} {flags}", settings)
        point = judge(world, {"method": method, "setting": setting, "seed": seed}, model, learned)
        print("{method} {setting} seed {seed}: gold {gold:.3f}, KL {kl:.2f}, {length:.1f} tokens, "
              "{cpu_seconds:.0f} s".format(**point), flush=True)
        points.append(point)

    add("preferred-FT", "", "sft.py", f"--dataset {folder}/preferred.jsonl", "preferred")
    for beta in args.dpo_betas:
        add("DPO", beta, "dpo.py", f"{pairs} --beta {beta}")
    for name, reward in (("gold", gold), ("learned", learned)):
        for beta in args.kl_coefs:
            flags = f"--dataset {root}/prompts.jsonl --reward {reward} --kl-coef {beta} --missing-eos-penalty 0"
            add(f"PPO, {name}", beta, "ppo.py", f"{flags} --critic {'reward' if name == 'learned' else 'policy'}")
            add(f"GRPO, {name}", beta, "grpo.py", f"{flags} --kl-in reward")
    return points


# ---- Judging ----


def best_of(rewards: torch.Tensor, n: int) -> float:
    """E[largest of n] of N samples a prompt: sum_i r_(i) C(i - 1, n - 1) / C(N, n), exact over all subsets.

    rewards: (prompts, N), float64; the mean over prompts.
    """
    N = rewards.shape[1]
    i = torch.arange(1, N + 1, dtype=torch.float64)
    log_choose = lambda a, b: torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)
    b = torch.tensor(float(n - 1), dtype=torch.float64)
    total = log_choose(torch.tensor(float(N), dtype=torch.float64), b + 1)
    weights = torch.where(i >= n, (log_choose(i.sub(1).clamp(min=n - 1), b) - total).exp(), 0.0)
    return (rewards.sort(1).values @ weights).mean().item()


def best_of_kl(n: int) -> float:
    """KL(best of n || one) <= log n - (n - 1) / n nats, and equal without ties."""
    return math.log(n) - (n - 1) / n


def judge(world, point: dict, model: str, learned: str) -> dict:
    """The point with its rewards and KL on held-out prompts, which are kept in the run's folder."""
    file = Path(model).with_name("judged.json")
    if not file.exists():
        began = time.process_time()
        policy, n = load(world.args, model), len(world.rows)
        *texts, batch = answer(policy, world.rows, world.args.policy_samples, seed=2)
        gold = world.gold(*texts).double().cpu().view(n, -1)
        with policy.autocast():
            kl = frontier.kl_to(policy.model, world.reference.model, batch, 64).double().view(n, -1)
        found = {"gold": gold.mean().item(), "gold_se": frontier.standard_error(gold)}
        found |= {"kl": kl.mean().item(), "kl_se": frontier.standard_error(kl)}
        if "learned" in point["method"]:
            reward = reward_of(policy, learned)
            found["learned"] = reward(*texts).mean().item()
        found |= describe(policy, texts[2], world.args.policy_samples)
        found["judge_seconds"] = time.process_time() - began
        write(file, [found])
    command = read_rows(str(file.with_name("command.json")))[0]
    return point | read_rows(str(file))[0] | command


def reward_of(policy, spec: str):
    """score(rows, prompts, responses) of a reward model's folder or of file.py:function."""
    device = policy.model.device
    return load_reward(spec, policy.tokenizer, policy.eos_ids, policy.options, device, policy.autocast)[0]


def describe(policy, responses: list, step: int) -> dict:
    """Mean length in tokens, share with an EOS, and the first response to each of the first prompts."""
    ended = [ids[-1] in policy.eos_ids for ids in responses]
    texts = policy.tokenizer.batch_decode(responses[::step][:4], skip_special_tokens=True)
    return {"length": sum(map(len, responses)) / len(responses), "ended": sum(ended) / len(ended),
            "samples": texts}


def draw_pool(world) -> dict:
    """Gold rewards of pi_ref's samples (prompts, samples), for best-of-n and the optimum; kept in the folder."""
    file = Path(world.args.folder, "pool.json")
    if not file.exists():
        number = world.args.reference_samples
        *texts, _ = answer(world.reference, world.rows, number, seed=3)
        rewards = world.gold(*texts).double().view(len(world.rows), -1)
        write(file, [{"rewards": rewards.tolist(), **describe(world.reference, texts[2], number)}])
    return read_rows(str(file))[0]


def picture(result: dict, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    start = (0.0, result["reference"]["gold"])
    curve = [start] + [(kl, reward) for _, reward, kl, ess in result["frontier"] if ess >= LEAST_ESS]
    axes.plot(*zip(*curve), "k-", linewidth=2, label="optimum, from samples of the start")
    axes.plot(*zip(*[(kl, reward) for _, reward, kl in result["best_of_n"]]), "k.--", linewidth=1, label="best of n")
    methods = dict.fromkeys(point["method"] for point in result["points"])
    for method in methods:
        color, marker = STYLES[method]
        for k, seed in enumerate(result["args"]["seeds"]):
            points = [p for p in result["points"] if p["method"] == method and p["seed"] == seed]
            xy = sorted((p["kl"], p["gold"]) for p in points)
            style = {"color": color, "marker": marker, "linestyle": "--" if "learned" in method else "-"}
            axes.plot(*zip(*xy), alpha=1.0 if k == 0 else 0.4, label=method if k == 0 else None, **style)
    axes.plot(*start, "*", color="tab:purple", markersize=14, label="start: SFT")
    axes.set(xlabel="KL(policy || SFT), nats a response", ylabel="gold reward: log-odds of positive",
             title="Film reviews, prompts of held-out reviews")
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
    reviews = {split: read_reviews(args.data, split) for split in ("train", "test")}
    if args.tiny:
        reviews = {split: rows[::50] for split, rows in reviews.items()}

    # 1. the gold reward, of half of the labels
    if not (root / "gold.json").exists():
        gold = fit_gold(reviews["train"][::2])
        gold["held_out_accuracy"] = accuracy(gold, reviews["train"][1::2])
        gold["test_accuracy"] = accuracy(gold, reviews["test"])
        write(root / "gold.json", [gold])
    (root / "gold.py").write_text(GOLD)
    known = read_rows(str(root / "gold.json"))[0]
    print(f"gold: {len(known['weights'])} words, accuracy {known['held_out_accuracy']:.3f} on the other half of the "
          f"labels, {known['test_accuracy']:.3f} on {len(reviews['test'])} test reviews")

    # 2. the start: SFT on beginnings
    start = args.model or f"{root}/start"
    if not args.model and not Path(start).exists():
        make_start(Path(start), [row["text"][:600] for row in reviews["train"]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    rows = openings(tokenizer, reviews["train"], args.max_tokens, seed=1)
    judged_by = openings(tokenizer, reviews["test"], args.max_tokens, seed=2)[: args.prompts]
    n = len(rows) // 40
    write(root / "reviews_test.jsonl", rows[:n])  # what the scripts see as held out are training reviews
    write(root / "reviews.jsonl", rows[n:])
    write(root / "prompts_test.jsonl", [{"prompt": row["prompt"]} for row in rows[: min(n, 64)]])
    write(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[n : n + args.pairs]])
    sft = run(args, root / "sft", "sft.py",
              f"--model {start} --dataset {root}/reviews.jsonl --max-new-tokens {args.max_tokens}")

    # 3. samples of the start, and the gold reward of those for held-out reviews
    reference = load(args, sft)
    gold = reward_of(reference, f"{root}/gold.py:log_odds")
    world = SimpleNamespace(args=args, reference=reference, rows=judged_by, gold=gold)
    pool = draw_pool(world)
    rewards = torch.tensor(pool["rewards"], dtype=torch.float64)
    print(f"the start: gold {rewards.mean():.3f}, sd of a prompt's samples {rewards.std(1).mean():.2f}")

    # 4. pairs, what learns from them, and where it ends
    points = []
    for seed in args.seeds:
        folder = root / f"seed{seed}"
        if not (folder / "pairs.jsonl").exists():
            make_pairs(world, sft, rows[n : n + args.pairs * 5 // 4], folder, seed)
        points += train(world, root, sft, folder, seed)
    result = {"args": asdict(args), "reference": {"gold": rewards.mean().item()}, "points": points}
    result["best_of_n"] = [[n, best_of(rewards, n), best_of_kl(n)] for n in (1, 2, 4, 8, 16, 32, 64)]
    betas = [30 * 0.88**k for k in range(50)]
    result["frontier"] = [[beta, *frontier.tilted(rewards, beta)] for beta in betas]
    for p in points:
        print(f"{p['method']:14} {p['setting']!s:5} gold {p['gold']:.3f} KL {p['kl']:.2f} length {p['length']:.1f} "
              f"ended {p['ended']:.2f} {p['cpu_seconds']:.0f} s  {p['samples'][0][:80]!r}")
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(result, args.output)
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
