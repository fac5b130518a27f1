"""Supervised fine-tuning: maximum likelihood on demonstrations. Step 1 of RLHF.

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
One CUDA GPU, a real model and data:     python sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara
    --learning-rate 2e-5 --num-train-epochs 1 --micro-batch-size 8 --max-length 2048 --output-dir runs/chat
"""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from tqdm import tqdm

from common import (
    check_flags, check_model, encode, fail, make_logger, open_run, sample, save_checkpoint, sequence_logprobs,
    split_rows)


@dataclass
class Args:
    model: str = "data/model"  # folder or Hub id to start from; without weights in it, random ones
    dataset: str = "data/demonstrations.jsonl"  # file or Hub id: text | messages | prompt, completion
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/sft"  # args.json, metrics.jsonl, samples.jsonl, model/; state/ while unfinished
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order, the samples and, if the model starts at random, its weights
    num_train_epochs: int = 4  # passes over the data (1 to 3 with a pretrained model)
    batch_size: int = 64  # rows an optimizer step
    micro_batch_size: int = 64  # rows a forward pass: lower it to save memory, the gradient stays the same
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, refuses longer prompts
    learning_rate: float = 6e-3  # peak of AdamW (1e-5 to 5e-5 with a pretrained model)
    warmup_steps: int = 30  # optimizer steps of linear warm-up
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient's norm here
    eval_every: int = 100  # steps between evaluations with samples (0: only before and after)
    eval_samples: int = 64  # held-out prompts to sample a completion for at each evaluation
    max_new_tokens: int = 64  # longest sample, in tokens
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not weights; auto: bf16 on CUDA
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "rlhf"  # its project there


def sft_loss(logprobs, trained, num_tokens):
    """-1/n sum_t log pi(y_t | x, y_<t): Sec. 3.5 of arXiv:2203.02155.

    Args: logprobs (B, T) in nats; trained (B, T), which of them count; num_tokens, the n of the whole
    optimizer step, so that the losses of its micro-batches add up. Returns: a scalar, nats per token.
    """
    return -torch.where(trained, logprobs, 0.0).sum() / num_tokens


def collate(rows, device):
    """Rows (ids, trained) padded on the right to the longest one: input_ids (B, T), trained (B, T). The
    padding is id 0, whatever that token is: the mask comes from the rows, never from token values.
    """
    T = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    trained = torch.tensor([mask + [False] * (T - len(mask)) for _, mask in rows])
    return input_ids.to(device), trained.to(device)


def load_model(args, device):
    """(model, tokenizer, eos_ids): fp32 weights whatever the checkpoint's dtype, dropout off in every layer.

    eos_ids[0] ends the rows; a sample ends with any of them (a chat model's generation_config may name
    several).
    """
    name, folder = args.model, Path(args.model)
    if not folder.is_dir() and (name.count("/") != 1 or folder.parent.exists()):
        fail(f"--model {name}: no such folder, nor a model's Hub id (owner/name)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
        config.update({key: 0.0 for key, value in vars(config).items() if "drop" in key and value})
        if folder.is_dir() and not {".safetensors", ".bin"} & {file.suffix for file in folder.iterdir()}:
            print(f"{name} holds no weights: starting from random ones")
            torch.manual_seed(args.seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:  # safetensors only: nothing is unpickled
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
            if info["missing_keys"]:
                fail(f"--model {name}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    except Exception as error:  # of many types, for files that are missing, broken or do not fit
        fail(f"--model {name}: {error}")
    eos = model.generation_config.eos_token_id
    eos_ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    eos_ids = [token for token in dict.fromkeys(eos_ids) if token is not None]
    if not eos_ids:
        fail(f"--model {name}: neither its tokenizer nor its generation_config names an EOS token")
    if args.gradient_checkpointing:
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)()  # the name since transformers 5.23, or before
    if device.type == "cpu" and model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # on matrices this small, threads wait longer than they work
    return model.to(device).train(), tokenizer, eos_ids


def save_model(run, args, model, tokenizer, eos_ids, seconds):
    """The finished run: args.json, and model/ for AutoModelForCausalLM. state/ is no longer needed."""
    record = {**asdict(args), "torch": torch.__version__, "transformers": transformers.__version__,
              "device": str(model.device), "seconds": round(seconds, 1)}
    (run / "args.json").write_text(json.dumps(record, indent=1) + "\n")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id not in eos_ids else None
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos_ids, pad_token_id=pad)
    model.save_pretrained(run / "model.tmp")
    tokenizer.save_pretrained(run / "model.tmp")
    os.replace(run / "model.tmp", run / "model")
    shutil.rmtree(run / "state", ignore_errors=True)


def complete(model, tokenizer, prompts, eos_ids, args):
    """(metrics, rows of samples.jsonl): a completion a prompt, at temperature 1 with the noise of --seed."""
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - args.max_new_tokens
    prompts = [ids for ids in prompts if len(ids) <= room] or [min(prompts, key=len)[: max(room, 1)]]
    tokens, _, lengths = sample(model, prompts, args.max_new_tokens, eos_ids, seed=args.seed)
    completions = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    metrics = {"completions/mean_length": sum(map(len, completions)) / len(completions),
               "completions/eos_rate": sum(row[-1] in eos_ids for row in completions) / len(completions)}
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return metrics, [{"prompt": decode(p), "completion": decode(c)} for p, c in zip(prompts, completions)]


@torch.no_grad()
def evaluate(model, tokenizer, rows, eos_ids, args, autocast):
    """(metrics, samples): loss per held-out token, and a completion for the first held-out prompts."""
    loss, hits, num_tokens = 0.0, 0, 0
    with autocast():
        for i in range(0, len(rows), args.micro_batch_size):
            input_ids, trained = collate(rows[i : i + args.micro_batch_size], model.device)
            logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
            loss += sft_loss(logprobs, trained, 1).item()
            hits, num_tokens = hits + hit.sum().item(), num_tokens + trained.sum().item()
        prompts = [ids[: len(ids) - trained[::-1].index(False)] for ids, trained in rows[: args.eval_samples]]
        metrics, samples = complete(model, tokenizer, prompts, eos_ids, args)
    return {"eval/loss": loss / num_tokens, "eval/mean_token_accuracy": hits / num_tokens, **metrics}, samples


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    check_flags(args)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    run, state = open_run(args)
    log = make_logger(run, args)

    # 2. model, data, optimizer
    rows = split_rows(args.dataset, args.eval_dataset)
    model, tokenizer, eos_ids = load_model(args, device)
    train, held_out = (encode(tokenizer, part, eos_ids, args.max_length) for part in rows)
    check_model(model, [ids for ids, _ in train + held_out])
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
    bar = tqdm(total=num_steps, initial=step, desc="sft", unit="step", disable=None)
    while step == num_steps or not stopped:
        if step in (0, num_steps) or (args.eval_every and step % args.eval_every == 0):
            after, samples = evaluate(model, tokenizer, held_out, eos_ids, args, autocast)
            if not math.isfinite(after["eval/loss"]):
                fail(f"step {step}: eval/loss is {after['eval/loss']}: lower --learning-rate")
            log(step, after, samples)
            bar.write(f"step {step}: eval/loss {after['eval/loss']:.4f} {samples[0]['completion'][:80]!r}")
        if step == num_steps:
            break
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        batch = [train[i] for i in order[position * args.batch_size :][: args.batch_size].tolist()]
        batch_tokens = sum(sum(trained) for _, trained in batch)  # of the step, before its micro-batches

        # 3a. gradient, micro-batch by micro-batch
        loss, hits = torch.zeros((), device=device), 0
        for i in range(0, len(batch), args.micro_batch_size):
            input_ids, trained = collate(batch[i : i + args.micro_batch_size], device)
            with autocast():
                logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
            micro_loss = sft_loss(logprobs, trained, batch_tokens)
            micro_loss.backward()
            loss, hits = loss + micro_loss.detach(), hits + hit.sum()
        metrics = {"loss": loss.item(), "mean_token_accuracy": hits.item() / batch_tokens}

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

    # 4. save, and show what has changed
    save_model(run, args, model, tokenizer, eos_ids, time.time() - start)
    with open(run / "metrics.jsonl") as file, open(run / "samples.jsonl") as start_samples:
        before = json.loads(file.readline())
        for row, start_row in zip(samples[:5], map(json.loads, start_samples)):
            print(f"{row['prompt'][-90:]!r}\n  before {start_row['completion'][:90]!r}")
            print(f"  after  {row['completion'][:90]!r}")
    for name, value in after.items():
        print(f"{name:28} {before[name]:10.4f} -> {value:10.4f}")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args))
