"""Reward model: a scalar r(x, y) learned from comparisons of completions. Step 2 of RLHF.

    P(y_i > y_j | x) = sigma(r(x, y_i) - r(x, y_j))                                        Bradley-Terry
    L = -E [ mu log sigma(r_i - r_j) + (1 - mu) log sigma(r_j - r_i) ]

Eq. 1 of arXiv:2203.02155 (InstructGPT) for mu = 1. A ranking of K completions counts as the mean over its K
(K - 1) / 2 pairs, ties with mu = 1/2, or with --loss-type plackett_luce as repeated choices of the best that
is left, P = prod_k exp(r_k) / sum_{l >= k} exp(r_l), whose case K = 2 is Bradley-Terry. r(x, y) is linear in
the last hidden state at the completion's EOS.

What is done differently from the paper, and why:
1. Soft labels: mu is the share of votes for `chosen`, 0.5 a tie. A tie pulls the two rewards together.
2. All pairs of a ranking are in one batch element, as there: the model sees each completion once an epoch.
3. Comparisons leave a constant of r free. So the mean reward of the held-out comparisons is stored as
   `reward_mean` in config.json, and ppo.py subtracts it: E[r] = 0.
4. AdamW with linear warm-up and decay, in place of a cosine; no dropout.

One CPU core, the embedded world, 30 s:  python reward_model.py
One CUDA GPU, a real model and data:     python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct
    --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-5 --micro-batch-size 8 --max-length 2048
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from tqdm import tqdm

from common import (
    check_flags, check_model, encode, explicit_pairs, fail, make_logger, open_run, read_rows, save_checkpoint,
    split_rows, token_values)


@dataclass
class Args:
    model: str = "runs/sft/model"  # folder or Hub id to start from; sft.py makes the default one
    dataset: str = "data/preferences.jsonl"  # file, Hub id: chosen, rejected | prompt, completions, ranking
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/reward_model"  # args.json, metrics and samples.jsonl, model/, for a time state/
    score: str = ""  # no training: score this file's rows with output_dir's model, into FILE.scores.jsonl
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order and the new head
    loss_type: Literal["pairs", "plackett_luce"] = "pairs"  # of a ranking: all its pairs, or Plackett-Luce
    num_train_epochs: int = 1  # passes over the comparisons (1; it overfits soon)
    batch_size: int = 64  # comparisons, pairs or rankings, an optimizer step
    micro_batch_size: int = 64  # comparisons a forward pass: less memory if lower, and the same gradient
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, refuses longer prompts
    learning_rate: float = 3e-3  # peak of AdamW (5e-6 to 2e-5 with a pretrained model)
    warmup_steps: int = 10  # optimizer steps of linear warm-up
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient's norm here
    eval_every: int = 100  # steps between evaluations (0: only before and after)
    eval_samples: int = 64  # held-out comparisons written with their rewards at each evaluation
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not weights; auto: bf16 on CUDA
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "rlhf"  # its project there


def bradley_terry_loss(first_rewards, second_rewards, mu):
    """-mu log sigma(r_i - r_j) - (1 - mu) log sigma(r_j - r_i): Eq. 1 of arXiv:2203.02155 with soft labels.

    Args: rewards and mu, the share of votes for the first or its probability in [0, 1]: (M,) each.
    Returns: losses (M,) in nats. Only differences of rewards matter, so a shift of all changes nothing.
    """
    margins = first_rewards - second_rewards
    return -mu * F.logsigmoid(margins) - (1 - mu) * F.logsigmoid(-margins)


def plackett_luce_loss(rewards, ranking):
    """-log prod_k exp(r_k) / sum_{l >= k} exp(r_l), best first: App. A.3 of arXiv:2305.18290.

    Ties: the mean over every order of the tied ones, as mu = 1/2 is for a pair. At a choice among the tied,
    all their subsets of one size are equally likely to be left, together with all that rank below.

    Args: rewards (K,); ranking: K numbers, 1 the best and equal ones a tie. Returns: a scalar, nats.
    """
    loss = -rewards.sum()
    for place in set(ranking):
        tied = [i for i, other in enumerate(ranking) if other == place]
        below = [i for i, other in enumerate(ranking) if other > place]
        for size in range(1, len(tied) + 1):
            sets = torch.tensor([[*left, *below] for left in combinations(tied, size)])
            loss = loss + rewards[sets.to(rewards.device)].logsumexp(1).mean()
    return loss


def calibration(margins, mu, bins=10):
    """(rows of the reliability table, ECE): is a confidence of 70 % right 70 % of the time?

    The confidence sigma(|r_i - r_j|), from 0.5 to 1, is cut into equal bins; in each, the mean confidence is
    compared with the accuracy, the share of votes for the side with the larger reward. Their mean distance,
    weighted with the numbers of pairs, is the expected calibration error.

    Args: margins r_i - r_j and mu: (M,) each. Returns: [(pairs, mean confidence, accuracy), ...] and ECE.
    """
    confidence, votes = torch.sigmoid(margins.abs()), 0.5 + (mu - 0.5) * margins.sign()
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    members = [index == i for i in range(bins)]
    table = [(int(m.sum()), confidence[m].mean().item(), votes[m].mean().item()) for m in members if m.any()]
    return table, sum(n * abs(expected - seen) for n, expected, seen in table) / len(margins)


def load_comparisons(tokenizer, rows, eos_ids, max_length):
    """Rows to comparisons (K rows of token ids, ranking, pairs (i, j, mu), p_chosen or None)."""
    explicit_pairs([row for row in rows if "completions" not in row])
    flat = []
    for row in rows:
        if "completions" not in row:
            row.update(completions=[row["chosen"], row["rejected"]], ranking=[1, 2])
        elif row.setdefault("mu", 1.0) != 1.0:
            fail(f"{row['_where']}: mu is for chosen and rejected; give the completions a ranking")
        texts, ranking = row["completions"], row.get("ranking")
        if not isinstance(texts, list) or len(texts) < 2:
            fail(f"{row['_where']}: completions must be a list of two or more")
        if not isinstance(ranking, list) or [type(r) for r in ranking] != [int] * len(texts):
            fail(f"{row['_where']}: ranking must be {len(texts)} whole numbers, 1 for the best completion")
        p = row.get("p_chosen", 0.5)
        if type(p) not in (int, float) or not 0 <= p <= 1:
            fail(f"{row['_where']}: p_chosen is {p!r}; expected the probability that chosen is preferred")
        shared = {"prompt": row["prompt"]} if "prompt" in row else {}
        flat += [{**shared, "completion": text, "_where": row["_where"]} for text in texts]
    encoded = iter(encode(tokenizer, flat, eos_ids, max_length))
    comparisons = []
    for row in rows:
        ids, ranking = [next(encoded)[0] for _ in row["ranking"]], row["ranking"]
        pairs = combinations(sorted(range(len(ids)), key=ranking.__getitem__), 2)  # the better one first
        pairs = [(i, j, row["mu"] if ranking[i] < ranking[j] else 0.5) for i, j in pairs]
        if len(ids) > 2 or ids[0] != ids[1]:
            comparisons.append((ids, ranking, pairs, row.get("p_chosen")))
    if dropped := len(rows) - len(comparisons):
        print(f"{dropped} of {len(rows)} pairs dropped: chosen and rejected are the same tokens")
    return comparisons or fail(f"{rows[0]['_where']}: no pair in which chosen and rejected differ")


def collate(comparisons, device):
    """The N completions of B comparisons, padded on the right: input_ids (N, T), last (N,) the index of each
    row's last token; and their M pairs: first and second (M,) as rows, mu (M,), owner (M,) the comparison.
    The padding is id 0, whatever that token is: what is read comes from lengths, never from token values.
    """
    rows = [ids for completions, *_ in comparisons for ids in completions]
    T, start, pairs = max(map(len, rows)), 0, []
    for owner, (completions, _, own, _) in enumerate(comparisons):
        pairs += [(start + i, start + j, mu, owner) for i, j, mu in own]
        start += len(completions)
    input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids in rows])
    last = torch.tensor([len(ids) - 1 for ids in rows])
    first, second, mu, owner = map(torch.tensor, zip(*pairs))
    return [x.to(device) for x in (input_ids, last, first, second, mu, owner)]


def load_reward_model(name, args, device):
    """(model, tokenizer, eos_ids): one label read at the row's end; a new head unless the folder has one.

    Others look for the last token that is not padding, so the pad token must not be an EOS: if it is, a new
    one is added. fp32 weights whatever the checkpoint's dtype, dropout off in every layer.
    """
    folder, flag = Path(name), "--score needs a reward model," if args.score else "--model"
    if not folder.is_dir() and (name.count("/") != 1 or folder.parent.exists()):
        fail(f"{flag} {name}: no such folder, nor a model's Hub id (owner/name)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name, num_labels=1)
        config.update({key: 0.0 for key, value in vars(config).items() if "drop" in key and value})
        eos = config.eos_token_id
        with contextlib.suppress(OSError):  # a causal model's generation_config may name several
            eos = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # of many types, for files that are missing, broken or do not fit
        fail(f"{flag} {name}: {error}")
    missing = set(info["missing_keys"])
    if not hasattr(model, "score") or missing - {"score.weight"} or (missing and args.score):
        fail(f"{flag} {name}: its weights lack {', '.join(sorted(missing)[:3])}, or its class has no score")
    if missing:
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    eos_ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    eos_ids = [token for token in dict.fromkeys(eos_ids) if token is not None]
    if not eos_ids:
        fail(f"{flag} {name}: neither its tokenizer nor its generation_config names an EOS token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos_ids})
    model.config.problem_type = "regression"  # else pipelines and vLLM squash the score
    if args.gradient_checkpointing:
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)()  # the name since transformers 5.23, or before
    if device.type == "cpu" and model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # on matrices this small, threads wait longer than they work
    return model.to(device).train(), tokenizer, eos_ids


def save_reward_model(run, args, model, tokenizer, metrics, seconds):
    """The finished run: args.json, and model/ for AutoModelForSequenceClassification, whose scores are raw:
    r = score - reward_mean, a key of its config.json. state/ is no longer needed.
    """
    record = {**asdict(args), "torch": torch.__version__, "transformers": transformers.__version__,
              "device": str(model.device), "seconds": round(seconds, 1)}
    (run / "args.json").write_text(json.dumps(record, indent=1) + "\n")
    model.config.reward_mean = metrics["eval/mean_reward"]
    model.config.held_out_accuracy = metrics["eval/accuracy"]
    model.save_pretrained(run / "model.tmp")
    tokenizer.save_pretrained(run / "model.tmp")
    os.replace(run / "model.tmp", run / "model")
    shutil.rmtree(run / "state", ignore_errors=True)


def forward(model, comparisons, args, autocast):
    """(losses (B,), metrics of each comparison (B,), margins (M,), mu (M,), rewards (N,)). accuracy is the
    share of votes that the rewards agree with: mu or 1 - mu, and 0.5 at margin 0, as for a coin.
    """
    input_ids, last, first, second, mu, owner = collate(comparisons, model.device)
    with autocast():
        rewards = token_values(model, input_ids)[torch.arange(len(last)), last]  # (N,)
    mean = lambda x: x.new_zeros(len(comparisons)).index_add(0, owner, x) / owner.bincount()  # (M,) -> (B,)
    losses = mean(bradley_terry_loss(rewards[first], rewards[second], mu))
    sizes = [len(completions) for completions, *_ in comparisons]
    if args.loss_type == "plackett_luce":  # two of them are Bradley-Terry already
        losses = torch.stack([plackett_luce_loss(own, comparison[1]) if len(own) > 2 else loss
                              for own, comparison, loss in zip(rewards.split(sizes), comparisons, losses)])
    chosen, rejected = rewards.detach()[first], rewards.detach()[second]
    margins = (chosen - rejected).round(decimals=5)  # rounding noise is a tie
    metrics = {"loss": losses.detach(), "accuracy": mean(0.5 + (mu - 0.5) * margins.sign()),
               "margin": mean(margins), "rewards/chosen": mean(chosen), "rewards/rejected": mean(rejected),
               "mean_reward": torch.stack([own.mean() for own in rewards.detach().split(sizes)])}
    return losses, metrics, margins, mu, rewards.detach()


@torch.no_grad()
def evaluate(model, tokenizer, comparisons, args, autocast):
    """(metrics, samples, reliability table) of the held-out comparisons, each of the same weight."""
    parts = [forward(model, comparisons[i : i + args.micro_batch_size], args, autocast)
             for i in range(0, len(comparisons), args.micro_batch_size)]
    each = {name: torch.cat([metrics[name] for _, metrics, *_ in parts]).cpu() for name in parts[0][1]}
    margins, mu, rewards = (torch.cat([part[k] for part in parts]).cpu() for k in (2, 3, 4))
    table, ece = calibration(margins, mu)
    metrics = {f"eval/{name}": value.mean().item() for name, value in each.items()} | {"eval/ece": ece}
    deviation = each["accuracy"].std(correction=min(1, len(comparisons) - 1)).item()
    metrics["eval/accuracy_ci95"] = 1.96 * deviation / len(comparisons) ** 0.5
    if all(p is not None for *_, p in comparisons):  # the labels are known to be noisy
        metrics["eval/accuracy_ceiling"] = sum(max(p, 1 - p) for *_, p in comparisons) / len(comparisons)
    values, decode = iter(rewards.tolist()), partial(tokenizer.decode, skip_special_tokens=True)
    samples = [{"comparison": k, "text": decode(ids), "rank": rank, "reward": next(values)}
               for k, (completions, ranking, *_) in enumerate(comparisons[: args.eval_samples])
               for ids, rank in zip(completions, ranking)]
    return metrics, samples, table


@torch.no_grad()
def score_file(args, device, autocast):
    """Write FILE.scores.jsonl: the rows of --score with their raw score and reward = score - reward_mean."""
    model, tokenizer, eos_ids = load_reward_model(str(Path(args.output_dir, "model")), args, device)
    rows, scores = read_rows(args.score), []
    encoded = [ids for ids, _ in encode(tokenizer, rows, eos_ids, args.max_length)]
    for i in range(0, len(rows), args.micro_batch_size):
        part = [([ids], [1], [(0, 0, 0.5)], None) for ids in encoded[i : i + args.micro_batch_size]]
        input_ids, last, *_ = collate(part, device)
        with autocast():
            scores += token_values(model, input_ids)[torch.arange(len(last)), last].tolist()
    mean = getattr(model.config, "reward_mean", 0.0)
    output = Path(args.score).with_suffix(".scores.jsonl")
    with open(output, "w") as file:
        for row, score in zip(rows, scores):
            row.pop("_where")
            file.write(json.dumps({**row, "score": score, "reward": score - mean}) + "\n")
    print(f"{len(rows)} rows, mean reward {sum(scores) / len(scores) - mean:.4f}: {output}")
    return {"mean_reward": sum(scores) / len(scores) - mean}


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    check_flags(args)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    if args.score:
        return score_file(args, device, autocast)
    run, state = open_run(args)
    log = make_logger(run, args)
    if args.model == Args.model and not Path(args.model).exists():
        print(f"{args.model} does not exist yet: running sft.py, which makes it")
        if code := subprocess.run([sys.executable, Path(__file__).with_name("sft.py")]).returncode:
            raise SystemExit(code)

    # 2. model, data, optimizer
    rows = split_rows(args.dataset, args.eval_dataset)
    model, tokenizer, eos_ids = load_reward_model(args.model, args, device)
    train, held_out = (load_comparisons(tokenizer, part, eos_ids, args.max_length) for part in rows)
    check_model(model, [ids for completions, *_ in train + held_out for ids in completions])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    num_steps, step, num_tokens = steps_per_epoch * args.num_train_epochs, 0, 0
    print(f"{len(train)} rows, {len(held_out)} held out from {rows[1][0]['_where'].rpartition(':')[0]}, "
          f"{num_steps} steps, {model.num_parameters():,} parameters on {device}"
          + f"; --warmup-steps {args.warmup_steps} never ends" * (args.warmup_steps >= num_steps))
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, num_tokens = state["step"], state["num_tokens"]
        if state["rows"] != len(train):
            fail(f"--resume: {args.dataset} has {len(train)} rows, and had {state['rows']} before")

    # 3. the loop. The order is a function of (seed, epoch), so that no random state has to be saved
    stopped, metrics = [], {}  # a first signal stops after the step, a second one at once
    stop = lambda number, frame: stopped.append(number) or signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=num_steps, initial=step, desc="reward model", unit="step", disable=None)
    while step == num_steps or not stopped:
        if step in (0, num_steps) or (args.eval_every and step % args.eval_every == 0):
            after, samples, table = evaluate(model, tokenizer, held_out, args, autocast)
            if not math.isfinite(after["eval/loss"]):
                fail(f"step {step}: eval/loss is {after['eval/loss']}: lower --learning-rate")
            log(step, after, samples)
            bar.write(f"step {step}: loss {after['eval/loss']:.4f}, accuracy {after['eval/accuracy']:.4f}")
        if step == num_steps:
            break
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        batch = order[position * args.batch_size :][: args.batch_size].tolist()
        batch_tokens = sum(len(ids) for j in batch for ids in train[j][0])

        # 3a. gradient, micro-batch by micro-batch
        metrics = {}
        for i in range(0, len(batch), args.micro_batch_size):
            part = [train[j] for j in batch[i : i + args.micro_batch_size]]
            losses, each, *_ = forward(model, part, args, autocast)
            (losses.sum() / len(batch)).backward()
            metrics = {name: metrics.get(name, 0.0) + value.sum() for name, value in each.items()}
        metrics = {name: value.item() / len(batch) for name, value in metrics.items()}

        # 3b. update, after the warm-up with a learning rate that falls to 0
        lr = args.learning_rate * min(1.0, (step + 1) / max(args.warmup_steps, 1))
        if args.anneal_lr and step >= args.warmup_steps:
            lr *= (num_steps - step) / (num_steps - args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        if not math.isfinite(metrics["loss"] + grad_norm):
            fail(f"step {step + 1}: loss {metrics['loss']:.3g}, gradient norm {grad_norm:.3g}: lower "
                 f"--learning-rate; the last checkpoint, if any, is in {run / 'state'}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, num_tokens = step + 1, num_tokens + batch_tokens

        # 3c. log, save
        metrics |= {"learning_rate": lr, "grad_norm": grad_norm, "num_tokens": num_tokens,
                    "epoch": step / steps_per_epoch,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        log(step, metrics)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
        if stopped or (args.save_every and step % args.save_every == 0):
            save_checkpoint(run, args, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                            num_tokens=num_tokens, rows=len(train))
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if step < num_steps:
        print(f"stopped after step {step} of {num_steps}: --resume continues")
        raise SystemExit(128 + stopped[0])

    # 4. save, and show how good it is
    save_reward_model(run, args, model, tokenizer, after, time.time() - start)
    with open(run / "metrics.jsonl") as file:
        before = json.loads(file.readline())
    for name, value in after.items():
        print(f"{name:28} {before[name]:10.4f} -> {value:10.4f}")
    print("reliability on held-out pairs\n     pairs  confidence  accuracy")
    for row in table:
        print("{:10}  {:10.3f}  {:8.3f}".format(*row))
    accuracy, ceiling = after["eval/accuracy"], after.get("eval/accuracy_ceiling")
    print(f"held-out accuracy {accuracy:.3f} +- {after['eval/accuracy_ci95']:.3f} (95 %)" + (
        f", {accuracy / ceiling:.3f} of the ceiling that the labels' noise leaves" if ceiling else ""))
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args))
