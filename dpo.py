r"""Direct preference optimization: the policy itself is the reward model. Steps 2 and 3 of RLHF in one.

    r(x, y) = beta log pi_theta(y|x) / pi_ref(y|x)   the implicit reward, up to beta log Z(x) that cancels in
    L = -E [ mu log sigma(r(x, chosen) - r(x, rejected)) + (1 - mu) log sigma(r(x, rejected) - r(x, chosen)) ]

Eq. 7 of arXiv:2305.18290 for mu = 1. Where preferences follow Bradley-Terry its minimum is the optimum of the
KL-regularized objective, pi* = pi_ref exp(r / beta) / Z. log pi(y|x) sums over the completion and its EOS.
A ranking of K completions is repeated choices of the best that is left (Plackett-Luce, Eq. 20 of App. A.3):
P = prod_k exp(r_k) / sum_{l >= k} exp(r_l), which is the above for K = 2.

What is done differently from the paper, and why:
1. Soft labels: mu is the share of votes for `chosen`, 0.5 a tie; label smoothing moves it towards 0.5 (cDPO).
2. The reference is the start itself: its log-probs are computed once, before the first step, and stored.
3. IPO (arXiv:2310.12036) is --loss-type ipo, on summed log-probs as in its Eq. 17; TRL averages them.
4. AdamW with linear warm-up and decay, in place of RMSprop at a constant rate; no dropout.

One CPU core, the embedded world, 35 s:  python dpo.py
One CUDA GPU, a real model and data:     python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --beta 0.1 \
    --dataset trl-lib/ultrafeedback_binarized --learning-rate 5e-7 --micro-batch-size 2 --max-length 8192
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from common import (
    Run, check_flags, check_model, clip_gradients, complete, device_of, fail, learning_rate, lighten,
    load_comparisons, load_model, make_first, over_ranks, pad, plackett_luce_loss, sequence_logprobs, shares,
    shuffled, split_rows, to_device, to_floats)


@dataclass
class Args:
    # run
    output_dir: str = "runs/dpo"  # gets args.json, metrics.jsonl, samples.jsonl and model/
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order and the samples
    eval_every: int = 100  # steps between evaluations with samples (0: only before and after)
    eval_samples: int = 64  # held-out prompts to complete at each evaluation
    max_new_tokens: int = 64  # tokens of the longest sample
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not of weights; auto: bf16 on CUDA
    shard: bool = False  # under torchrun, spread weights and optimizer over the GPUs (FSDP2): less memory
    track: bool = False  # log to Weights & Biases too
    # data
    model: str = "runs/sft/model"  # folder or Hub id: start and reference; sft.py makes the default one
    dataset: str = "data/preferences.jsonl"  # file, Hub id: chosen, rejected | prompt, completions, ranking
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, drops longer prompts
    # optimization
    num_train_epochs: int = 1  # passes over the comparisons (1 to 3; it overfits soon)
    batch_size: int = 64  # comparisons, that is pairs or rankings, per optimizer step
    micro_batch_size: int = 64  # comparisons per forward pass: a lower one saves memory, same gradient
    learning_rate: float = 5e-4  # peak of AdamW (5e-7 to 5e-6 with a pretrained model)
    warmup_steps: int = 10  # optimizer steps of linear warm-up, a fifth of the run at most
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train adapters of this rank (8 to 64; 10 times the learning rate), 0: all weights
    # DPO
    beta: float = 0.5  # strength of the KL penalty, in reward per nat (0.1 to 0.5; a lower one moves further)
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO, or IPO on summed log-probs
    label_smoothing: float = 0.0  # chance that a label is wrong (0 to 0.5)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, mu=1.0, beta=0.1,
             loss_type="sigmoid", label_smoothing=0.0):
    """-p log sigma(h) - (1 - p) log sigma(-h), with h = beta (log-ratio of chosen - log-ratio of rejected).

    p = mu (1 - label_smoothing) + (1 - mu) label_smoothing is the chance that `chosen` is the better one. IPO
    pulls the margin h / beta to 1 / (2 beta) with weight p, and to -1 / (2 beta) with weight 1 - p.

    Args: log pi(y|x) of policy and reference in nats, summed over the completion; mu in [0, 1]: (B,) each.
    Returns: losses (B,), and the implicit rewards of chosen and rejected (B,), detached, in reward units.
    Raises: ValueError for another loss_type than "sigmoid" and "ipo".
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # Eq. 5 of arXiv:2305.18290, less beta log Z(x)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    h = chosen_rewards - rejected_rewards
    p = mu * (1 - label_smoothing) + (1 - mu) * label_smoothing
    if loss_type == "sigmoid":
        losses = -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)  # Eq. 7 of arXiv:2305.18290
    elif loss_type == "ipo":
        margin = h / beta
        target = 1 / (2 * beta)  # Eq. 17 of arXiv:2310.12036
        losses = p * (margin - target).square() + (1 - p) * (margin + target).square()
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def collate(comparisons, device):
    """The N completions of B comparisons, padded on the right: input_ids and trained (N, T); mu (B,); present
    (B, K), which of the K completions of the longest comparison each has."""
    rows = [row for completions, *_ in comparisons for row in completions]
    trained = [trained for _, trained in rows]
    mu = torch.tensor([mu for _, _, mu, _ in comparisons], dtype=torch.get_default_dtype())
    present = [[True] * len(completions) for completions, *_ in comparisons]
    return (pad([ids for ids, _ in rows], device), pad(trained, device, False), to_device(mu, device),
            pad(present, device, False))


def completion_logps(model, input_ids, trained, present):
    """log pi(y|x), summed over a completion and its EOS, 0 where there is none: (N, T) -> (B, K)."""
    logps = sequence_logprobs(model, input_ids, trained).sum(1)  # (N,)
    return logps.new_zeros(present.shape).masked_scatter(present, logps)


@torch.no_grad()
def reference_logps(model, comparisons, args, autocast):
    """log pi_ref(y|x) of all completions: (len(comparisons), K), on the CPU."""
    K = max(len(completions) for completions, *_ in comparisons)
    result = torch.zeros(len(comparisons), K, device=model.device)
    for s in tqdm(shares(len(comparisons), args.micro_batch_size), "reference", disable=None):
        input_ids, trained, _, present = collate(comparisons[s], model.device)
        with autocast():
            logps = completion_logps(model, input_ids, trained, present)
        result[s, : logps.shape[1]] = logps
    return over_ranks(result).cpu()


def forward(model, comparisons, ref_logps, args, autocast):
    """(losses (B,), metrics as sums over B comparisons), all completions in one forward pass. Of a ranking
    the best is chosen, the worst rejected. rewards/accuracies is the share of votes that the implicit reward
    agrees with: mu or 1 - mu, 0.5 at margin 0.
    """
    input_ids, trained, mu, present = collate(comparisons, model.device)
    with autocast():
        logps = completion_logps(model, input_ids, trained, present)  # (B, K)
    ref_logps = to_device(ref_logps[:, : logps.shape[1]], model.device)
    worst = present.sum(1, keepdim=True) - 1  # (B, 1): its column
    chosen, ref_chosen = logps[:, 0], ref_logps[:, 0]
    rejected, ref_rejected = logps.gather(1, worst).squeeze(1), ref_logps.gather(1, worst).squeeze(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, mu, args.beta, args.loss_type, args.label_smoothing)
    for k, (_, ranking, *_) in enumerate(comparisons):
        if len(ranking) > 2:
            rewards = args.beta * (logps[k] - ref_logps[k])
            losses[k] = plackett_luce_loss(rewards[: len(ranking)], ranking)  # Eq. 20 of arXiv:2305.18290
    margins = chosen_rewards - rejected_rewards
    votes = 0.5 + (mu - 0.5) * margins.round(decimals=4).sign()  # rounding noise is a tie
    metrics = {"loss": losses, "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
               "rewards/margins": margins, "rewards/accuracies": votes,
               "logps/chosen": chosen, "logps/rejected": rejected}
    return losses, {name: value.detach().sum() for name, value in metrics.items()}


@torch.no_grad()
def evaluate(model, tokenizer, comparisons, ref_logps, eos_ids, args, autocast):
    """(metrics, samples): `forward` on held-out comparisons; completions of the first prompts."""
    totals = {}
    for s in shares(len(comparisons), args.micro_batch_size):
        _, sums = forward(model, comparisons[s], ref_logps[s], args, autocast)
        for name, value in sums.items():
            totals[f"eval/{name}"] = totals.get(f"eval/{name}", 0.0) + value.double() / len(comparisons)
    first = [completions[0] for completions, *_ in comparisons[: args.eval_samples]]
    prompts = [ids[: trained.index(True)] for ids, trained in first]
    with autocast():
        lengths, samples = complete(model, tokenizer, prompts, eos_ids, args)
    return to_floats(totals, lengths), samples


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    device, autocast = device_of(args)
    check_flags(args)
    if args.label_smoothing > 0.5:
        fail(f"--label-smoothing is {args.label_smoothing}: at most 0.5")
    run = Run(args)
    make_first(args.model, Args.model, "sft.py")

    # 2. model, data, optimizer; the reference is the start
    train_rows, held_out_rows = split_rows(
        args.dataset, args.eval_dataset, "chosen rejected", "prompt completions ranking")
    model, tokenizer, eos_ids = load_model(args.model, args, device)
    train = load_comparisons(tokenizer, train_rows, eos_ids, args.max_length)
    held_out = load_comparisons(tokenizer, held_out_rows, eos_ids, args.max_length)
    for row in train_rows + held_out_rows:
        if max(map(row["ranking"].count, row["ranking"])) > 10:
            fail(f"{row['_where']}: 11 or more in a tie: all their subsets would be summed")
    is_ranking = [len(ranking) > 2 for _, ranking, *_ in train + held_out]
    if any(is_ranking) and (args.loss_type == "ipo" or args.label_smoothing):
        fail(f"{args.dataset}: --loss-type ipo and --label-smoothing are for pairs, and these are rankings")
    check_model(model, [ids for completions, *_ in train + held_out for ids, _ in completions])
    lighten(args, autocast, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    num_steps = steps_per_epoch * args.num_train_epochs
    print(f"{len(train)} rows, {len(held_out)} held out, {num_steps} steps, "
          f"{model.num_parameters():,} parameters on {device}")
    if run.state:
        ref_train, ref_held_out = run.state["reference"]
    else:
        ref_train = reference_logps(model, train, args, autocast)
        ref_held_out = reference_logps(model, held_out, args, autocast)

    def report(step):
        metrics, samples = evaluate(model, tokenizer, held_out, ref_held_out, eos_ids, args, autocast)
        run.log(step, metrics, samples)
        tqdm.write(f"step {step}: eval/loss {metrics['eval/loss']:.4f} {samples[0]['completion'][:80]!r}")
        return metrics, samples

    # 3. the loop. The order is a function of (seed, epoch), so that no random state has to be saved
    first = run.start(num_steps, train + held_out, tokenizer, model=model, optimizer=optimizer)
    num_tokens, metrics = run.state.get("num_tokens", 0), {}
    bar = tqdm(range(first, num_steps), "dpo", initial=first, total=num_steps, unit="step", disable=None)
    for step in bar:
        if step == 0 or (args.eval_every and step % args.eval_every == 0):
            report(step)
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        start = position * args.batch_size
        index = shuffled(len(train), args.seed, epoch)[start : start + args.batch_size]
        index = sorted(index, key=lambda i: sum(len(ids) for ids, _ in train[i][0]))  # less padding
        batch = [train[i] for i in index]
        ref_batch = ref_train[index]  # (B, K)
        batch_tokens = sum(len(ids) for completions, *_ in batch for ids, _ in completions)

        # 3a. gradient, micro-batch by micro-batch
        totals = {}
        for s in shares(len(batch), args.micro_batch_size):
            losses, sums = forward(model, batch[s], ref_batch[s], args, autocast)
            (losses.sum() / len(batch)).backward()
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.double() / len(batch)

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
        run.checkpoint(step + 1, num_tokens=num_tokens, reference=[ref_train, ref_held_out])

    # 4. evaluate, save, and show what has changed
    after, samples = report(max(first, num_steps))
    run.finish(model)
    run.show_change(after, samples, "rewards/margins", "loss", "rewards/accuracies", "rewards/chosen")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
