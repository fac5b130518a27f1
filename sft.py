"""Supervised fine-tuning: maximum likelihood on demonstrations. Step 1 of RLHF.

    L(theta) = -1/n sum over trained tokens t of log pi_theta(y_t | x, y_<t)        in nats per token

with n the trained tokens of the optimizer step: the completion's with its EOS, or those of every assistant turn of a
conversation. Sec. 3.5 of arXiv:2203.02155 (InstructGPT), where the result is the start of the reinforcement learning
and the reference of its KL penalty.

What is done differently from the paper, and why:
1. The prompt is not trained: the model will be asked to answer prompts, never to write them.
2. Each token of a step weighs the same whatever the micro-batches. The mean of their means, which many loops compute,
   weighs the tokens of short rows more.
3. Linear warm-up and decay in place of a cosine; no dropout, so that what is logged can be reproduced.

One CPU core, the embedded world, 15 s:   python sft.py
One CUDA GPU, a real model and data:      python sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara
    --learning-rate 2e-5 --num-train-epochs 1 --micro-batch-size 8 --max-length 2048 --output-dir runs/capybara
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

from common import check_head, encode, fail, sample, sequence_logprobs, split_rows


@dataclass
class Args:
    model: str = "data/model"  # folder or Hub id to start from; a folder without weights starts from random ones
    dataset: str = "data/demonstrations.jsonl"  # file or Hub id: text | messages | prompt, completion
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/sft"  # gets args.json, metrics.jsonl, samples.jsonl, model/; state/ while unfinished
    resume: bool = False  # continue the interrupted run in output_dir, to the same end as without the interruption
    seed: int = 1  # of the data order, the samples and, if the model starts at random, its weights
    num_train_epochs: int = 6  # passes over the data (1 to 3 with a pretrained model)
    batch_size: int = 64  # rows an optimizer step
    micro_batch_size: int = 64  # rows a forward pass: lower it to save memory, the gradient stays the same
    max_length: int = 512  # tokens of prompt and completion; longer completions are cut, longer prompts refused
    learning_rate: float = 6e-3  # peak of AdamW (1e-5 to 5e-5 with a pretrained model)
    warmup_steps: int = 30  # optimizer steps of linear warm-up
    anneal_lr: bool = True  # decay linearly to 0 after the warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clip the gradient's norm here
    eval_every: int = 100  # steps between evaluations with samples (0: only before and after)
    eval_samples: int = 64  # held-out prompts to sample a completion for at each evaluation
    max_new_tokens: int = 64  # longest sample, in tokens
    save_every: int = 200  # steps between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products (weights: fp32); auto: bfloat16 on CUDA
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "rlhf"  # its project there


def sft_loss(logprobs, trained, num_tokens):
    """-1/n sum_t log pi(y_t | x, y_<t): Sec. 3.5 of arXiv:2203.02155.

    Args: logprobs (B, T) in nats; trained (B, T), which of them count; num_tokens, the n of the whole optimizer step,
    so that the losses of its micro-batches add up. Returns: a scalar, nats per token.
    """
    return -torch.where(trained, logprobs, 0.0).sum() / num_tokens


def collate(rows, device):
    """Rows (ids, trained) padded on the right to the longest one: input_ids (B, T), trained (B, T).

    The padding is id 0, whatever that token is: the mask comes from the rows, never from token values.
    """
    T = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    trained = torch.tensor([mask + [False] * (T - len(mask)) for _, mask in rows])
    return input_ids.to(device), trained.to(device)


def load_model(args, device, from_config=False):
    """(model, tokenizer, eos_ids): fp32 weights whatever the checkpoint's dtype, dropout off in every layer.

    eos_ids[0] ends the rows; a sample ends with any of them (generation_config of a chat model may name several).
    """
    name, folder = args.model, Path(args.model)
    if not folder.exists() and (name.count("/") != 1 or folder.parent.exists()):
        fail(f"--model {name}: no such folder, nor the id of a model on the Hub (owner/name)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
        config.update({key: 0.0 for key, value in vars(config).items() if "drop" in key and value})
        if from_config and folder.exists() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            print(f"{name} holds no weights: starting from random ones")
            torch.manual_seed(args.seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--model {name}: {error}")
    eos = model.generation_config.eos_token_id
    eos_ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    eos_ids = list(dict.fromkeys(token for token in eos_ids if token is not None))
    if not eos_ids:
        fail(f"--model {name}: neither its tokenizer nor its generation_config names an EOS token")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if device.type == "cpu" and model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # on matrices this small, threads wait for one another longer than they work
    return model.to(device).train(), tokenizer, eos_ids


def open_run(args):
    """(run folder, checkpoint or None). Never overwrites a finished run nor loses an interrupted one."""
    run, checkpoint = Path(args.output_dir), Path(args.output_dir, "state", "checkpoint.pt")
    if (run / "model").exists():
        fail(f"--output-dir {run} holds a finished run: choose another folder, or remove it")
    if args.resume != checkpoint.exists():
        fail(f"--resume: there is no {checkpoint}" if args.resume else
             f"--output-dir {run} holds an interrupted run: continue it with --resume, or remove it")  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (run / name).write_text("")
        return run, None
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is not whole
        fail(f"--resume: {checkpoint} cannot be read ({error}); remove {run} and start again")
    free = {"resume", "micro_batch_size", "save_every", "gradient_checkpointing", "track", "wandb_project_name"}
    for name, value in asdict(args).items():
        if name not in free and value != state["args"][name]:
            fail(f"--resume: --{name.replace('_', '-')} is {value}, but {state['args'][name]} in the interrupted run")
    for name, size in state["sizes"].items():
        os.truncate(run / name, size)  # forget what was logged after the checkpoint: it will be logged again
    return run, state


def make_logger(run, args):
    """log(step, metrics, samples): appends to metrics.jsonl and samples.jsonl; TensorBoard if installed; W&B if asked."""
    writer = wandb = None
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run))
    except ImportError:
        pass
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs `pip install wandb`")
        wandb.init(project=args.wandb_project_name, name=run.name, config=asdict(args))

    def log(step, metrics, samples=()):
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with open(run / name, "a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
        if writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
        if wandb:
            wandb.log(metrics, step=step)

    return log


def save_checkpoint(run, args, **state):
    """Everything --resume needs, under a temporary name that is then renamed: a crash leaves the old one whole."""
    state["sizes"] = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    (run / "state").mkdir(exist_ok=True)
    torch.save({**state, "args": asdict(args)}, run / "state" / "checkpoint.tmp")
    os.replace(run / "state" / "checkpoint.tmp", run / "state" / "checkpoint.pt")


def save_model(run, args, model, tokenizer, eos_ids, seconds):
    """The finished run: args.json, and model/ for AutoModelForCausalLM; state/ is no longer needed."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {**asdict(args), **versions, "device": str(model.device), "seconds": round(seconds, 1)}
    (run / "args.json").write_text(json.dumps(record, indent=1) + "\n")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id not in eos_ids else None
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos_ids, pad_token_id=pad
    )
    model.save_pretrained(run / "model.tmp")
    tokenizer.save_pretrained(run / "model.tmp")
    os.replace(run / "model.tmp", run / "model")
    shutil.rmtree(run / "state", ignore_errors=True)


@torch.no_grad()
def evaluate(model, tokenizer, rows, eos_ids, args, autocast):
    """(metrics, samples): loss per held-out token, and a completion for the first held-out prompts."""
    total, hits, num_tokens = 0.0, 0, 0
    with autocast():
        for i in range(0, len(rows), args.micro_batch_size):
            input_ids, trained = collate(rows[i : i + args.micro_batch_size], model.device)
            logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
            total += sft_loss(logprobs, trained, 1).item()
            hits, num_tokens = hits + hit.sum().item(), num_tokens + trained.sum().item()
        prompts = [ids[: len(ids) - trained[::-1].index(False)] for ids, trained in rows[: args.eval_samples]]
        tokens, _, lengths = sample(model, prompts, args.max_new_tokens, eos_ids, seed=args.seed)
    completions = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    metrics = {"eval/loss": total / num_tokens, "eval/mean_token_accuracy": hits / num_tokens,
               "completions/mean_length": sum(map(len, completions)) / len(completions),
               "completions/eos_rate": sum(row[-1] in eos_ids for row in completions) / len(completions)}  # fmt: skip
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return metrics, [{"prompt": decode(p), "completion": decode(c)} for p, c in zip(prompts, completions)]


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    if args.batch_size % args.micro_batch_size:
        fail(f"--batch-size {args.batch_size} is not divisible by --micro-batch-size {args.micro_batch_size}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    run, state = open_run(args)
    log = make_logger(run, args)

    # 2. model, data, optimizer
    model, tokenizer, eos_ids = load_model(args, device, from_config=True)
    train, held_out = (
        encode(tokenizer, rows, eos_ids, args.max_length)
        for rows in split_rows(args.dataset, args.eval_dataset)
    )
    check_head(model, torch.tensor(train[0][0], device=device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    num_steps, step, num_tokens = steps_per_epoch * args.num_train_epochs, 0, 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, num_tokens, before = state["step"], state["num_tokens"], state["before"]
    else:
        before, samples = evaluate(model, tokenizer, held_out, eos_ids, args, autocast)
        log(0, before, samples)

    # 3. the loop. The order is a function of (seed, epoch): no random state has to be saved
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one stops after the step, a second one at once
        signal.signal(number, lambda n, frame: stopped.append(n) or signal.signal(n, signal.SIG_DFL))
    bar = tqdm(total=num_steps, initial=step, desc="sft", unit="step", disable=None)
    while step < num_steps and not stopped:
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        batch = [train[i] for i in order[position * args.batch_size :][: args.batch_size].tolist()]
        batch_tokens = sum(sum(trained) for _, trained in batch)  # of the whole step, known before its micro-batches

        # 3a. gradient, micro-batch by micro-batch
        loss, hits = torch.zeros((), device=device), torch.zeros((), device=device)
        for i in range(0, len(batch), args.micro_batch_size):
            input_ids, trained = collate(batch[i : i + args.micro_batch_size], device)
            with autocast():
                logprobs, hit = sequence_logprobs(model, input_ids, trained, hits=True)
            micro_loss = sft_loss(logprobs, trained, batch_tokens)
            micro_loss.backward()
            loss, hits = loss + micro_loss.detach(), hits + hit.sum()

        # 3b. update, after the warm-up with a learning rate that falls to 0
        lr = args.learning_rate * min(1.0, (step + 1) / max(args.warmup_steps, 1))
        if args.anneal_lr and step >= args.warmup_steps:
            lr *= (num_steps - step) / (num_steps - args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step + 1}: the loss is {loss:.3g}, its gradient's norm {grad_norm:.3g}: lower --learning-rate; "
                 f"the last checkpoint is in {run}/state")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, num_tokens = step + 1, num_tokens + batch_tokens

        # 3c. log, evaluate, save
        metrics = {"loss": loss.item(), "mean_token_accuracy": hits.item() / batch_tokens, "learning_rate": lr,
                   "grad_norm": grad_norm.item(), "num_tokens": num_tokens, "epoch": step / steps_per_epoch,
                   "tokens_per_second": round(batch_tokens / (time.time() - began))}  # fmt: skip
        log(step, metrics)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=metrics["tokens_per_second"])
        if step == num_steps or (args.eval_every and step % args.eval_every == 0):
            after, samples = evaluate(model, tokenizer, held_out, eos_ids, args, autocast)
            log(step, after, samples)
            bar.write(f"step {step}: eval/loss {after['eval/loss']:.4f} |{samples[0]['prompt']}|{samples[0]['completion']}")
        if stopped or (args.save_every and step % args.save_every == 0):
            save_checkpoint(run, args, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                            num_tokens=num_tokens, before=before)  # fmt: skip
    if step < num_steps:
        bar.close()
        print(f"stopped after step {step} of {num_steps}; --resume continues")
        raise SystemExit(128 + stopped[0])

    # 4. save, and show what has changed
    bar.close()
    save_model(run, args, model, tokenizer, eos_ids, time.time() - start)
    for row in samples[:6]:
        print(f"  {row['prompt']!r:40} -> {row['completion']!r}")
    for name in before:
        print(f"  {name:28} {before[name]:10.4f} -> {after[name]:10.4f}")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args))
