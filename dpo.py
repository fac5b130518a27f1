"""Direct preference optimization: the policy itself is the reward model. Steps 2 and 3 of RLHF in one.

    r(x, y) = beta log pi_theta(y|x) / pi_ref(y|x)   the implicit reward, up to beta log Z(x) that cancels in
    L = -E [ mu log sigma(r(x, chosen) - r(x, rejected)) + (1 - mu) log sigma(r(x, rejected) - r(x, chosen)) ]

Eq. 7 of arXiv:2305.18290 for mu = 1. Where preferences follow Bradley-Terry its minimum is the optimum of the
KL-regularized objective, pi* = pi_ref exp(r / beta) / Z. log pi(y|x) sums over the completion and its EOS.

What is done differently from the paper, and why:
1. Soft labels: mu is the share of votes for `chosen`, 0.5 a tie; label smoothing moves it towards 0.5 (cDPO).
2. The reference is the start itself: its log-probs are computed once, before the first step, and stored.
3. IPO (arXiv:2310.12036) is --loss-type ipo, on summed log-probs as in its Eq. 17; TRL averages them.
4. AdamW with linear warm-up and decay, for RMSprop at a constant rate.

One CPU core, the embedded world, 35 s:  python dpo.py
One CUDA GPU, a real model and data:     python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --beta 0.1
    --dataset trl-lib/ultrafeedback_binarized --learning-rate 5e-7 --micro-batch-size 4 --max-length 8192
"""

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
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from tqdm import tqdm

from common import (
    check_flags, check_model, encode, explicit_pairs, fail, make_logger, open_run, sample, save_checkpoint,
    sequence_logprobs, split_rows)


@dataclass
class Args:
    model: str = "runs/sft/model"  # folder or Hub id: start and reference; sft.py makes the default one
    dataset: str = "data/preferences.jsonl"  # file or Hub id: chosen, rejected, optionally prompt and mu
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/dpo"  # args.json, metrics.jsonl, samples.jsonl, model/; state/ while unfinished
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the data order and the samples
    beta: float = 0.5  # strength of the KL penalty, reward per nat (0.1 to 0.5; lower moves further)
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO, or IPO on summed log-probs
    label_smoothing: float = 0.0  # chance that a label is wrong (0 to 0.5)
    num_train_epochs: int = 1  # passes over the pairs (1 to 3; it overfits soon)
    batch_size: int = 64  # pairs an optimizer step
    micro_batch_size: int = 64  # pairs a forward pass: lower it to save memory, the gradient stays the same
    max_length: int = 512  # tokens of prompt and completion; cuts longer completions, refuses longer prompts
    learning_rate: float = 5e-4  # peak of AdamW (5e-7 to 5e-6 with a pretrained model)
    warmup_steps: int = 10  # optimizer steps of linear warm-up
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


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, mu, beta, loss_type,
             label_smoothing):
    """-p log sigma(h) - (1 - p) log sigma(-h), with h = beta (log-ratio of chosen - log-ratio of rejected).

    p = mu (1 - label_smoothing) + (1 - mu) label_smoothing is the chance that `chosen` is the better one. IPO
    pulls the margin h / beta to 1 / (2 beta) with weight p, and to -1 / (2 beta) with weight 1 - p.

    Args: log pi(y|x) of policy and reference in nats, summed over the completion; mu in [0, 1]: (B,) each.
    Returns: losses (B,), and the implicit rewards of chosen and rejected (B,), detached, in reward units.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # Eq. 5 of arXiv:2305.18290, less beta log Z(x)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    h = chosen_rewards - rejected_rewards
    p = mu * (1 - label_smoothing) + (1 - mu) * label_smoothing
    if loss_type == "sigmoid":
        losses = -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)  # Eq. 7 of arXiv:2305.18290
    else:
        margin, target = h / beta, 1 / (2 * beta)  # Eq. 17 of arXiv:2310.12036
        losses = p * (margin - target).square() + (1 - p) * (margin + target).square()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def load_pairs(tokenizer, rows, eos_ids, max_length):
    """Rows to pairs (chosen, rejected, mu), chosen and rejected being (ids, trained) with the same prompt."""
    explicit_pairs(rows)
    encoded = [encode(tokenizer, rows, eos_ids, max_length, side) for side in ("chosen", "rejected")]
    pairs = [(*pair, row["mu"]) for *pair, row in zip(*encoded, rows) if pair[0] != pair[1]]
    if dropped := len(rows) - len(pairs):
        print(f"{dropped} of {len(rows)} pairs dropped: chosen and rejected are the same tokens")
    return pairs or fail(f"{rows[0]['_where']}: no pair in which chosen and rejected differ")


def collate(pairs, device):
    """B pairs as 2B rows, chosen first, padded on the right: input_ids (2B, T), trained (2B, T), mu (B,). The
    padding is id 0, whatever that token is: the mask comes from the rows, never from token values.
    """
    rows = [chosen for chosen, *_ in pairs] + [rejected for _, rejected, _ in pairs]
    T = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    trained = torch.tensor([mask + [False] * (T - len(mask)) for _, mask in rows])
    mu = torch.tensor([float(mu) for *_, mu in pairs])
    return input_ids.to(device), trained.to(device), mu.to(device)


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
def reference_logps(model, pairs, args, autocast):
    """log pi_ref(y|x) of chosen and rejected: (len(pairs), 2), on the CPU."""
    result = []
    with autocast():
        for i in tqdm(range(0, len(pairs), args.micro_batch_size), desc="reference", disable=None):
            input_ids, trained, _ = collate(pairs[i : i + args.micro_batch_size], model.device)
            result.append(sequence_logprobs(model, input_ids, trained).sum(1).view(2, -1).T.cpu())
    return torch.cat(result)


def forward(model, pairs, ref_logps, args, autocast):
    """(losses (B,), metrics as sums over the B pairs), chosen and rejected in one forward pass.
    rewards/accuracies is the share of votes the implicit reward agrees with: mu or 1 - mu, 0.5 at margin 0.
    """
    input_ids, trained, mu = collate(pairs, model.device)
    with autocast():
        chosen, rejected = sequence_logprobs(model, input_ids, trained).sum(1).chunk(2)  # (B,) each
    references = ref_logps.to(model.device).unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *references, mu, args.beta,
                                                        args.loss_type, args.label_smoothing)
    margins = chosen_rewards - rejected_rewards
    votes = 0.5 + (mu - 0.5) * margins.round(decimals=4).sign()  # rounding noise is a tie
    metrics = {"loss": losses, "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
               "rewards/margins": margins, "rewards/accuracies": votes,
               "logps/chosen": chosen, "logps/rejected": rejected}
    return losses, {name: value.detach().sum() for name, value in metrics.items()}


@torch.no_grad()
def evaluate(model, tokenizer, pairs, ref_logps, eos_ids, args, autocast):
    """(metrics, samples): `forward` on the held-out pairs, and a completion for each of the first prompts."""
    metrics = {}
    for i in range(0, len(pairs), args.micro_batch_size):
        s = slice(i, i + args.micro_batch_size)
        for name, value in forward(model, pairs[s], ref_logps[s], args, autocast)[1].items():
            metrics[f"eval/{name}"] = metrics.get(f"eval/{name}", 0.0) + value.item() / len(pairs)
    prompts = [ids[: trained.index(True)] for (ids, trained), *_ in pairs[: args.eval_samples]]
    with autocast():
        lengths, samples = complete(model, tokenizer, prompts, eos_ids, args)
    return {**metrics, **lengths}, samples


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    check_flags(args)
    if args.label_smoothing > 0.5:
        fail(f"--label-smoothing is {args.label_smoothing}: at most 0.5")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    run, state = open_run(args)
    log = make_logger(run, args)
    if args.model == Args.model and not Path(args.model).exists():
        print(f"{args.model} does not exist yet: running sft.py, which makes it")
        if code := subprocess.run([sys.executable, Path(__file__).with_name("sft.py")]).returncode:
            raise SystemExit(code)

    # 2. model, data, optimizer
    rows = split_rows(args.dataset, args.eval_dataset)
    model, tokenizer, eos_ids = load_model(args, device)
    train, held_out = (load_pairs(tokenizer, part, eos_ids, args.max_length) for part in rows)
    check_model(model, [ids for pair in train + held_out for ids, _ in pair[:2]])
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
        ref_train, ref_held_out = state["reference"]
    else:  # the reference is the start
        ref_train, ref_held_out = (reference_logps(model, part, args, autocast) for part in (train, held_out))

    # 3. the loop. The order is a function of (seed, epoch), so that no random state has to be saved
    stopped, metrics = [], {}  # a first signal stops after the step, a second one at once
    stop = lambda number, frame: stopped.append(number) or signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=num_steps, initial=step, desc="dpo", unit="step", disable=None)
    while step == num_steps or not stopped:
        if step in (0, num_steps) or (args.eval_every and step % args.eval_every == 0):
            after, samples = evaluate(model, tokenizer, held_out, ref_held_out, eos_ids, args, autocast)
            if not math.isfinite(after["eval/loss"]):
                fail(f"step {step}: eval/loss is {after['eval/loss']}: lower --learning-rate")
            log(step, after, samples)
            bar.write(f"step {step}: eval/loss {after['eval/loss']:.4f} {samples[0]['completion'][:80]!r}")
        if step == num_steps:
            break
        began = time.time()
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        batch = order[position * args.batch_size :][: args.batch_size].tolist()
        batch_tokens = sum(len(ids) for j in batch for ids, _ in train[j][:2])

        # 3a. gradient, micro-batch by micro-batch
        metrics = {}
        for i in range(0, len(batch), args.micro_batch_size):
            index = batch[i : i + args.micro_batch_size]
            losses, sums = forward(model, [train[j] for j in index], ref_train[index], args, autocast)
            (losses.sum() / len(batch)).backward()
            metrics = {name: metrics.get(name, 0.0) + value for name, value in sums.items()}
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
                            num_tokens=num_tokens, rows=len(train), reference=[ref_train, ref_held_out])
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
