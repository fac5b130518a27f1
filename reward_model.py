r"""Reward model: a scalar r(x, y) learned from comparisons of completions. Step 2 of RLHF.

    P(y_i > y_j | x) = sigma(r(x, y_i) - r(x, y_j))                                        Bradley-Terry
    L = -E [ mu log sigma(r_i - r_j) + (1 - mu) log sigma(r_j - r_i) ]

Eq. 1 of arXiv:2203.02155 (InstructGPT) for mu = 1. A ranking of K completions counts as the mean over its
K (K - 1) / 2 pairs, ties with mu = 1/2; as in the paper, all of them are in one batch element, so the model
sees each completion once per epoch. With --loss-type plackett_luce a ranking is repeated choices of the best
that is left, P = prod_k exp(r_k) / sum_{l >= k} exp(r_l), which is Bradley-Terry for K = 2. r(x, y) is linear
in the last hidden state at the completion's EOS.

What is done differently from the paper, and why:
1. Soft labels: mu is the share of votes for `chosen`, 0.5 a tie. A tie pulls the two rewards together.
2. Comparisons leave a constant of r free. So the mean reward of the held-out comparisons is stored as
   `reward_mean` in config.json, and ppo.py and grpo.py subtract it: E[r] = 0.
3. AdamW with linear warm-up and decay, in place of a cosine; no dropout.

One CPU core, the embedded world, 30 s:  python reward_model.py
One CUDA GPU, a real model and data:     python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct \
    --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-5 --micro-batch-size 8 --max-length 2048
"""

import json
import math
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from tqdm import tqdm

from common import (
    Run, blame, check_flags, check_model, clip_gradients, device_of, encode, fail, learning_rate, lighten,
    load_comparisons, load_model, make_first, pad, plackett_luce_loss, read_rows, read_scores, shares,
    shuffled, split_rows, to_device, to_floats, token_values)


@dataclass
class Args:
    # run
    output_dir: str = "runs/reward_model"  # gets args.json, metrics.jsonl, samples.jsonl and model/
    score: str = ""  # no training: score this file's rows with output_dir's model, into FILE.scores.jsonl
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order and the new head
    eval_every: int = 100  # steps between evaluations (0: only before and after)
    eval_samples: int = 64  # held-out comparisons written with their rewards at each evaluation
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not of weights; auto: bf16 on CUDA
    shard: bool = False  # under torchrun, spread weights and optimizer over the GPUs (FSDP2): less memory
    track: bool = False  # log to Weights & Biases too
    # data
    model: str = "runs/sft/model"  # folder or Hub id to start from; sft.py makes the default one
    dataset: str = "data/preferences.jsonl"  # file, Hub id: chosen, rejected | prompt, completions, ranking
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, drops longer prompts
    # optimization
    loss_type: Literal["pairs", "plackett_luce"] = "pairs"  # of a ranking: all its pairs, or Plackett-Luce
    num_train_epochs: int = 1  # passes over the comparisons (1; it overfits soon)
    batch_size: int = 64  # comparisons, that is pairs or rankings, per optimizer step
    micro_batch_size: int = 64  # comparisons per forward pass: a lower one saves memory, same gradient
    learning_rate: float = 3e-3  # peak of AdamW (5e-6 to 2e-5 with a pretrained model)
    warmup_steps: int = 10  # optimizer steps of linear warm-up, a fifth of the run at most
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train adapters of this rank (8 to 64; 10 times the learning rate), 0: all weights


def bradley_terry_loss(first_rewards, second_rewards, mu):
    """-mu log sigma(r_i - r_j) - (1 - mu) log sigma(r_j - r_i): Eq. 1 of arXiv:2203.02155 with soft labels.

    Args: rewards and mu, the share of votes for the first or its probability in [0, 1]: (M,) each.
    Returns: losses (M,) in nats. Only differences of rewards matter, so a shift of all changes nothing.
    """
    margins = first_rewards - second_rewards  # logsigmoid stays finite where log(sigmoid(margin)) would not
    return -mu * F.logsigmoid(margins) - (1 - mu) * F.logsigmoid(-margins)


def calibration(margins, mu, bins=10):
    """(rows of the reliability table, ECE): is a confidence of 70 % right 70 % of the time?

    The confidence sigma(|r_i - r_j|), from 0.5 to 1, is cut into equal bins; in each, the mean confidence is
    compared with the accuracy, the share of votes for the side with the larger reward. Their mean distance,
    weighted with the numbers of pairs, is the expected calibration error.
    Args: margins r_i - r_j and mu: (M,) each. Returns: [(pairs, mean confidence, accuracy), ...] and ECE."""
    confidence = torch.sigmoid(margins.abs())
    votes = 0.5 + (mu - 0.5) * margins.sign()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = []
    for i in range(bins):
        inside = bin_of == i
        if inside.any():
            table.append((int(inside.sum()), confidence[inside].mean().item(), votes[inside].mean().item()))
    return table, sum(n * abs(expected - seen) for n, expected, seen in table) / len(margins)


def wilson(p, n, z=1.96):
    """95 % interval (low, high) of a share p of n: the q with |p - q| = z sqrt(q (1 - q) / n) (Wilson)."""
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def collate(comparisons, device):
    """The N completions of B comparisons, padded on the right: input_ids (N, T), last (N, T) True at each
    row's last token; and their M pairs: first and second (M,) as rows, mu (M,), owner (M,) the comparison."""
    rows, pairs = [], []
    for owner, (completions, ranking, mu, _) in enumerate(comparisons):
        start = len(rows)
        for i, j in combinations(range(len(ranking)), 2):  # i is not the worse one
            own_mu = mu
            if ranking[i] == ranking[j]:
                own_mu = 0.5
            pairs.append((start + i, start + j, own_mu, owner))
        rows += [ids for ids, _ in completions]
    last = pad([[False] * (len(ids) - 1) + [True] for ids in rows], device, False)
    pairs = to_device(torch.tensor(pairs, dtype=torch.float64).view(-1, 4), device)
    first, second, owner = pairs[:, [0, 1, 3]].long().unbind(1)
    return pad(rows, device), last, first, second, pairs[:, 2].to(torch.get_default_dtype()), owner


def load_reward_model(name, args, device):
    """(model, tokenizer, eos_ids): one label read at the row's end; a new head unless the folder has one.
    Others look for the last token that is not padding, so a pad token that is an EOS is replaced."""
    flag = "--score needs a reward model," if args.score else "--model"
    new_head = "" if args.score else "score.weight"  # a random head is for training only
    kind = transformers.AutoModelForSequenceClassification
    model, tokenizer, eos_ids = load_model(name, args, device, flag, kind, new_head, num_labels=1)
    if not hasattr(model, "score"):
        fail(f"{flag} {name}: {type(model).__name__} has no head named score")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos_ids})
    model.config.problem_type = "regression"  # else pipelines and vLLM squash the score
    return model, tokenizer, eos_ids


def forward(model, comparisons, args, autocast):
    """(losses (B,), metrics of each comparison (B,), margins (M,), mu (M,), rewards (N,)). accuracy is the
    share of votes that the rewards agree with: mu or 1 - mu, and 0.5 at margin 0, as for a coin."""
    input_ids, last, first, second, mu, owner = collate(comparisons, model.device)
    with autocast():
        rewards = token_values(model, input_ids, last).sum(1)  # (N,): it is 0 elsewhere
    sizes = [len(completions) for completions, *_ in comparisons]  # B times K
    rewards_of = rewards.split(sizes)  # B times (K,)
    num_pairs = to_device(torch.tensor([K * (K - 1) // 2 for K in sizes]), model.device)  # (B,)
    mean = lambda x: x.new_zeros(num_pairs.shape).index_add(0, owner, x) / num_pairs  # (M,) -> (B,)
    losses = mean(bradley_terry_loss(rewards[first], rewards[second], mu))
    if args.loss_type == "plackett_luce" and comparisons:  # two of them are Bradley-Terry already
        losses = list(losses)
        for k, (completions, ranking, *_) in enumerate(comparisons):
            if len(completions) > 2:
                losses[k] = plackett_luce_loss(rewards_of[k], ranking)
        losses = torch.stack(losses)
    chosen, rejected = rewards.detach()[first], rewards.detach()[second]
    margins = (chosen - rejected).round(decimals=5)  # rounding noise is a tie
    votes = 0.5 + (mu - 0.5) * margins.sign()
    metrics = {"loss": losses.detach(), "accuracy": mean(votes), "margin": mean(margins),
               "rewards/chosen": mean(chosen), "rewards/rejected": mean(rejected),
               "mean_reward": torch.cat([chosen[:0], *(own.detach().mean(0, True) for own in rewards_of)])}
    return losses, metrics, margins, mu, rewards.detach()


@torch.no_grad()
def evaluate(model, tokenizer, comparisons, args, autocast):
    """(metrics, samples, reliability table) of the held-out comparisons, each of the same weight."""
    parts = []
    for i in range(0, len(comparisons), args.micro_batch_size):
        parts.append(forward(model, comparisons[i : i + args.micro_batch_size], args, autocast))
    _, metrics_of, margins, mu, rewards = zip(*parts)  # one entry for each micro-batch
    n = len(comparisons)
    metrics = {}
    for name in metrics_of[0]:
        values = torch.cat([each[name] for each in metrics_of]).cpu()  # of each comparison: (n,)
        metrics[f"eval/{name}"] = values.mean().item()
    table, metrics["eval/ece"] = calibration(torch.cat(margins).cpu(), torch.cat(mu).cpu())
    metrics["eval/accuracy_low"], metrics["eval/accuracy_high"] = wilson(metrics["eval/accuracy"], n)
    chances = [p_chosen for *_, p_chosen in comparisons]
    if None in chances:  # not known: then the votes themselves
        sizes = [len(ranking) for _, ranking, *_ in comparisons]
        num_pairs = [K * (K - 1) // 2 for K in sizes]
        best = torch.cat(mu).cpu().sub(0.5).abs() + 0.5
        chances = [own.mean().item() for own in best.split(num_pairs)]
    metrics["eval/accuracy_ceiling"] = sum(max(p, 1 - p) for p in chances) / n  # the best accuracy there is
    samples = []
    rewards = iter(torch.cat(rewards).tolist())  # in the order of the completions
    for k, (completions, ranking, *_) in enumerate(comparisons[: args.eval_samples]):
        for (ids, _), rank in zip(completions, ranking):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            samples.append({"comparison": k, "text": text, "rank": rank, "reward": next(rewards)})
    return metrics, samples, table


@torch.no_grad()
def score_file(args, device, autocast):
    """Write FILE.scores.jsonl: the rows of --score with their raw score and reward = score - reward_mean."""
    model, tokenizer, eos_ids = load_reward_model(str(Path(args.output_dir, "model")), args, device)
    rows = read_rows(args.score, "prompt completion", "messages", "text")
    encoded = encode(tokenizer, rows, eos_ids, args.max_length)
    rows, encoded = zip(*((row, ids) for row, ids in zip(rows, encoded) if ids))
    check_model(model, [ids for ids, _ in encoded])
    scores = read_scores(model, [ids for ids, _ in encoded], args.micro_batch_size, autocast)
    rewards = scores - getattr(model.config, "reward_mean", 0.0)
    output = Path(args.score).with_suffix(".scores.jsonl")
    with blame(f"--score: {output}"), open(output, "w") as file:
        for row, score, reward in zip(rows, scores.tolist(), rewards.tolist()):
            del row["_where"]
            file.write(json.dumps({**row, "score": score, "reward": reward}, default=str) + "\n")
    print(f"{len(rows)} rows, mean reward {rewards.mean():.4f}: {output}")
    return {"mean_reward": rewards.mean().item()}


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    device, autocast = device_of(args)
    check_flags(args)
    if args.score:
        return score_file(args, device, autocast)
    run = Run(args)
    make_first(args.model, Args.model, "sft.py")

    # 2. model, data, optimizer
    train_rows, held_out_rows = split_rows(
        args.dataset, args.eval_dataset, "chosen rejected", "prompt completions ranking")
    model, tokenizer, eos_ids = load_reward_model(args.model, args, device)
    train = load_comparisons(tokenizer, train_rows, eos_ids, args.max_length)
    held_out = load_comparisons(tokenizer, held_out_rows, eos_ids, args.max_length)
    for row in train_rows + held_out_rows:
        ranking = row["ranking"]
        largest_tie = max(map(ranking.count, ranking))
        if args.loss_type == "plackett_luce" and largest_tie > 10:
            fail(f"{row['_where']}: --loss-type plackett_luce: 11 or more in a tie, whose subsets it sums")
    check_model(model, [ids for completions, *_ in train + held_out for ids, _ in completions])
    lighten(args, autocast, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    num_steps = steps_per_epoch * args.num_train_epochs
    print(f"{len(train)} rows, {len(held_out)} held out, {num_steps} steps, "
          f"{model.num_parameters():,} parameters on {device}")

    def report(step):
        metrics, samples, table = evaluate(model, tokenizer, held_out, args, autocast)
        run.log(step, metrics, samples)
        tqdm.write(f"step {step}: loss {metrics['eval/loss']:.4f}, accuracy {metrics['eval/accuracy']:.4f}")
        return metrics, table

    # 3. the loop. The order is a function of (seed, epoch), so that no random state has to be saved
    first = run.start(num_steps, train + held_out, tokenizer, model=model, optimizer=optimizer)
    num_tokens, metrics = run.state.get("num_tokens", 0), {}
    bar = tqdm(range(first, num_steps), "reward", initial=first, total=num_steps, unit="step", disable=None)
    for step in bar:
        if step == 0 or (args.eval_every and step % args.eval_every == 0):
            report(step)
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        start = position * args.batch_size
        index = shuffled(len(train), args.seed, epoch)[start : start + args.batch_size]
        batch = [train[i] for i in index]
        batch.sort(key=lambda comparison: max(len(ids) for ids, _ in comparison[0]))  # less padding
        batch_tokens = sum(len(ids) for completions, *_ in batch for ids, _ in completions)

        # 3a. gradient, micro-batch by micro-batch
        totals = {}
        for s in shares(len(batch), args.micro_batch_size):
            losses, each, *_ = forward(model, batch[s], args, autocast)
            (losses.sum() / len(batch)).backward()
            for name, value in each.items():
                totals[name] = totals.get(name, 0.0) + value.sum().double() / len(batch)

        # 3b. optimizer step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, num_steps)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3c. log, save
        num_tokens += batch_tokens
        metrics = to_floats(totals, {"grad_norm": grad_norm})
        metrics |= {"learning_rate": optimizer.param_groups[0]["lr"], "num_tokens": num_tokens,
                    "epoch": (step + 1) / steps_per_epoch,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        run.log(step + 1, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
        run.checkpoint(step + 1, num_tokens=num_tokens)

    # 4. evaluate, save, and show how good it is. The saved scores are raw: r = score - reward_mean
    after, table = report(max(first, num_steps))
    model.config.reward_mean = after["eval/mean_reward"]
    model.config.held_out_accuracy = after["eval/accuracy"]
    run.finish(model)
    run.show_change(after, (), "margin", "loss", "accuracy", "grad_norm")
    print("reliability on held-out pairs\n     pairs  confidence  accuracy")
    for pairs, confidence, accuracy in table:
        print(f"{pairs:10}  {confidence:10.3f}  {accuracy:8.3f}")
    accuracy, low, high = (after[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    ceiling = after["eval/accuracy_ceiling"]
    print(f"held-out accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}, 95 %), {accuracy / ceiling:.3f} of "
          f"the ceiling {ceiling:.3f}")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
