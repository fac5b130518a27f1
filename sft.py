r"""Supervised fine-tuning: maximum likelihood on demonstrations. Step 1 of RLHF.

    L(theta) = -1/n sum over trained tokens t of log pi_theta(y_t | x, y_<t)        in nats per token

with n the trained tokens of the optimizer step: the completion's with its EOS, or those of every assistant
turn. Sec. 3.5 of arXiv:2203.02155 (InstructGPT), where the result starts the reinforcement learning and
anchors its KL.

What is done differently from the paper, and why:
1. The prompt is not trained: the model will be asked to answer prompts, never to write them.
2. Each token of a step weighs the same whatever the micro-batches. The mean of their means, which many loops
   compute, weighs the tokens of short rows more.
3. Linear warm-up and decay in place of a cosine; no dropout, so that what is logged can be reproduced.

One CPU core, the embedded world, 15 s:  python sft.py
One CUDA GPU, a real model and data:     python sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara \
    --learning-rate 2e-5 --num-train-epochs 1 --micro-batch-size 8 --max-length 2048 --output-dir runs/chat
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from common import (
    Run, check_flags, check_model, clip_gradients, complete, device_of, encode, fail, learning_rate, lighten,
    load_model, pad, sequence_logprobs, shares, shuffled, split_rows, to_floats)


@dataclass
class Args:
    # run
    output_dir: str = "runs/sft"  # gets args.json, metrics.jsonl, samples.jsonl and model/
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order, the samples and, if the model starts at random, its weights
    eval_every: int = 100  # steps between evaluations with samples (0: only before and after)
    eval_samples: int = 64  # held-out prompts to complete at each evaluation
    max_new_tokens: int = 64  # tokens of the longest sample
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not of weights; auto: bf16 on CUDA
    shard: bool = False  # under torchrun, spread weights and optimizer over the GPUs (FSDP2): less memory
    track: bool = False  # log to Weights & Biases too
    # data
    model: str = "data/model"  # folder or Hub id to start from; without weights in it, random ones
    dataset: str = "data/demonstrations.jsonl"  # file or Hub id: text | messages | prompt, completion
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, drops longer prompts
    # optimization
    num_train_epochs: int = 4  # passes over the data (1 to 3 with a pretrained model)
    batch_size: int = 64  # rows per optimizer step
    micro_batch_size: int = 64  # rows per forward pass: a lower one saves memory, same gradient
    learning_rate: float = 6e-3  # peak of AdamW (1e-5 to 5e-5 with a pretrained model)
    warmup_steps: int = 30  # optimizer steps of linear warm-up, a fifth of the run at most
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train adapters of this rank (8 to 64; 10 times the learning rate), 0: all weights


def sft_loss(logprobs, trained, num_tokens):
    """-1/n sum_t log pi(y_t | x, y_<t): Sec. 3.5 of arXiv:2203.02155.

    Args: logprobs (B, T) in nats; trained (B, T), which of them count; num_tokens, the n of the whole
    optimizer step, so that the losses of its micro-batches add up. Returns: a scalar, nats per token.
    """
    return -torch.where(trained, logprobs, 0.0).sum() / num_tokens


def collate(rows, device):
    """Rows (ids, trained) padded on the right to the longest one: input_ids (B, T), trained (B, T)."""
    ids = [ids for ids, _ in rows]
    return pad(ids, device), pad([trained for _, trained in rows], device, False)


@torch.no_grad()
def evaluate(model, tokenizer, rows, eos_ids, args, autocast):
    """(metrics, samples): loss per held-out token, and a completion of the first held-out prompts."""
    loss, hits, num_tokens = 0.0, 0.0, sum(sum(trained) for _, trained in rows)
    for s in shares(len(rows), args.micro_batch_size):
        input_ids, trained = collate(rows[s], model.device)
        with autocast():
            logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
        loss += sft_loss(logprobs, trained, num_tokens).double()
        hits += hit.sum().double()
    prompts = []
    for ids, trained in rows[: args.eval_samples]:
        end = len(ids) - trained[::-1].index(True)  # of the last answer
        answer = end - trained[:end][::-1].index(False)  # it begins behind the last untrained token
        prompts.append(ids[:answer])
    with autocast():
        metrics, samples = complete(model, tokenizer, prompts, eos_ids, args)
    sums = {"eval/loss": loss, "eval/mean_token_accuracy": hits / num_tokens}
    return to_floats(sums, metrics), samples


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    device, autocast = device_of(args)
    check_flags(args)
    run = Run(args)

    # 2. model, data, optimizer
    train_rows, held_out_rows = split_rows(
        args.dataset, args.eval_dataset, "prompt completion", "messages", "text")
    model, tokenizer, eos_ids = load_model(args.model, args, device)
    for row in train_rows + held_out_rows:
        if "completion" in row and str(row.get("label")).lower() in ("false", "0", "-1"):
            fail(f"{row['_where']}: label is {row['label']!r}: such a completion is no demonstration")
    train = list(filter(None, encode(tokenizer, train_rows, eos_ids, args.max_length)))  # None was dropped
    held_out = list(filter(None, encode(tokenizer, held_out_rows, eos_ids, args.max_length)))
    check_model(model, [ids for ids, _ in train + held_out])
    lighten(args, autocast, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    num_steps = steps_per_epoch * args.num_train_epochs
    print(f"{len(train)} rows, {len(held_out)} held out, {num_steps} steps, "
          f"{model.num_parameters():,} parameters on {device}")

    def report(step):
        metrics, samples = evaluate(model, tokenizer, held_out, eos_ids, args, autocast)
        run.log(step, metrics, samples)
        tqdm.write(f"step {step}: eval/loss {metrics['eval/loss']:.4f} {samples[0]['completion'][:80]!r}")
        return metrics, samples

    # 3. the loop. The order is a function of (seed, epoch), so that no random state has to be saved
    first = run.start(num_steps, train + held_out, tokenizer, model=model, optimizer=optimizer)
    num_tokens, metrics = run.state.get("num_tokens", 0), {}
    bar = tqdm(range(first, num_steps), "sft", initial=first, total=num_steps, unit="step", disable=None)
    for step in bar:
        if step == 0 or (args.eval_every and step % args.eval_every == 0):
            report(step)
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        start = position * args.batch_size
        batch = [train[i] for i in shuffled(len(train), args.seed, epoch)[start : start + args.batch_size]]
        batch.sort(key=lambda row: len(row[0]))  # less padding in micro-batches
        batch_tokens = sum(sum(trained) for _, trained in batch)  # of the step, before its micro-batches

        # 3a. gradient, micro-batch by micro-batch
        loss, hits = 0.0, 0.0
        for s in shares(len(batch), args.micro_batch_size):
            input_ids, trained = collate(batch[s], device)
            with autocast():
                logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
            micro_loss = sft_loss(logprobs, trained, batch_tokens)
            micro_loss.backward()
            loss += micro_loss.detach()
            hits += hit.sum().double()

        # 3b. optimizer step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, num_steps)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3c. log, save
        num_tokens += batch_tokens
        sums = {"loss": loss, "mean_token_accuracy": hits / batch_tokens}
        metrics = to_floats(sums, {"grad_norm": grad_norm})
        metrics |= {"learning_rate": optimizer.param_groups[0]["lr"], "num_tokens": num_tokens,
                    "epoch": (step + 1) / steps_per_epoch,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        run.log(step + 1, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
        run.checkpoint(step + 1, num_tokens=num_tokens)

    # 4. evaluate, save, and show what has changed
    after, samples = report(max(first, num_steps))
    run.finish(model)
    run.show_change(after, samples, "mean_token_accuracy", "loss", "grad_norm")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
