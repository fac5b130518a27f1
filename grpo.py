"""Group-relative policy optimization: PPO whose critic is the mean of a group. Step 3 of RLHF.

    maximize E[ 1/G sum_i (min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta KL_i) ]            (1)
    KL_i = pi_ref(y_i) / pi(y_i) - log(pi_ref(y_i) / pi(y_i)) - 1                                      (2)
    A_i  = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G),     rho_i = pi(y_i) / pi_old(y_i)               (3)

over G responses y_i ~ pi_old( . | x) to each prompt x: Eqs. 1 to 3 of arXiv:2501.12948.

What is done differently from these equations, and why:
1. rho and KL are each token's, and a response's loss is the mean over its tokens (Eqs. 3 and 4 of
   arXiv:2402.03300, what everyone runs): a product over hundreds of tokens leaves the clip's range at once.
   --importance-sampling-level sequence takes those of the whole response, as written above; there (2), the
   exponential of a sum, explodes: better k2, or --kl-in reward.
2. Its optimum is not pi* = pi_ref exp(r / beta) / Z. On samples of pi, (2) has the gradient of
   KL(pi_ref || pi), which ends at beta pi_ref / (lambda - r); and no token answers for the KL of later ones.
   --kl-in reward makes r - beta log(pi / pi_ref) the reward, and pi* the optimum.
3. The std divides by n - 1, and 1e-4 is added to it; a group of equal rewards has advantages of exactly 0.
4. A response without EOS stays in the loss; --missing-eos-penalty is subtracted from its reward.

REINFORCE with a leave-one-out baseline (RLOO, arXiv:2402.14740) is the case
    --kl-in reward --baseline leave_one_out --scale-rewards none --importance-sampling-level sequence
One CPU core, the embedded world, 20 s:  python grpo.py
One CUDA GPU, a real model and data:     python grpo.py --model runs/my-sft/model
    --reward my_reward.py:correct --dataset my_prompts.jsonl --learning-rate 1e-6 --kl-coef 0.001
    --batch-size 256 --micro-batch-size 8 --total-episodes 25600 --max-new-tokens 512
"""

import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from tqdm import tqdm

from common import (
    check_flags, check_model, encode, fail, kl_estimate, make_logger, open_run, sample, save_checkpoint,
    sequence_logprobs, split_rows, token_values)


@dataclass
class Args:
    model: str = "runs/sft/model"  # folder or Hub id: start and reference; sft.py makes the default one
    reward: tuple[str, ...] = ("data/gold_reward.py:gold_reward",)  # file.py:function or folder, one or more
    reward_weights: tuple[float, ...] = ()  # of several rewards in their sum; empty: 1 each
    dataset: str = "data/prompts.jsonl"  # file or Hub id: prompt; further columns reach a reward function
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/grpo"  # args.json, metrics and samples.jsonl, model/, for a time state/
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the prompts' order and the samples
    total_episodes: int = 12800  # responses sampled in all
    num_generations: int = 8  # responses to a prompt, its group: G (4 to 64)
    batch_size: int = 128  # responses an optimizer step
    num_minibatches: int = 1  # optimizer steps a pass over an update's batch_size * num_minibatches responses
    update_epochs: int = 1  # passes over them (1 to 4)
    micro_batch_size: int = 64  # responses scored or trained at once: less memory if lower, the same gradient
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 40  # longest response, in tokens
    temperature: float = 1.0  # of sampling, and of all log-probs
    learning_rate: float = 1e-3  # peak of AdamW (1e-6 to 3e-6 with a pretrained model)
    anneal_lr: bool = True  # decay it linearly to 0
    max_grad_norm: float = 1.0  # clip the gradient's norm here
    kl_coef: float = 0.3  # beta, the KL penalty in reward per nat (0 to 0.1 with a pretrained model)
    kl_in: Literal["loss", "reward"] = "loss"  # beta KL in the loss, as published, or r - beta KL as reward
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"  # auto: k3 in the loss, k1 in the reward
    baseline: Literal["mean", "leave_one_out"] = "mean"  # mean reward of the group, or of its other responses
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose std of rewards divides the advantage
    drop_zero_std: bool = False  # leave groups of equal rewards out of the loss, KL and denominators too
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # what a token weighs, see token_weights
    importance_sampling_level: Literal["token", "sequence"] = "token"  # of the ratio, and of a KL in the loss
    clip_coef: float = 0.2  # how far the ratio of policies may fall, epsilon (0.1 to 0.3)
    clip_coef_high: float = 0.2  # how far it may rise (0.28 in DAPO)
    missing_eos_penalty: float = 0.0  # subtracted from the reward of a response without EOS
    eval_every: int = 10  # updates between evaluations with samples (0: only before and after)
    eval_samples: int = 128  # responses at each evaluation, one or several to a held-out prompt
    save_every: int = 20  # updates between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not weights; auto: bf16 on CUDA
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "rlhf"  # its project there


def zero_std(rewards):
    """Which groups, rows of (P, G), are equal but for rounding (1e-5 in fp32) and so teach nothing: (P,)."""
    largest = rewards.abs().amax(1).clamp(min=1)
    return rewards.amax(1) - rewards.amin(1) <= 100 * torch.finfo(rewards.dtype).eps * largest


def group_advantages(rewards, baseline="mean", scale_rewards="group"):
    """A_i = (r_i - mean(r)) / std(r) over the responses to a prompt: Eq. 3 of arXiv:2501.12948.

    Args:
        rewards: (P, G), a row for each prompt's group.
        baseline: "mean", or "leave_one_out", the mean of the other G - 1: G / (G - 1) times the advantage
            (RLOO, arXiv:2402.14740). Not divided by a std, it makes the gradient of E[r] without bias.
        scale_rewards: "group" divides by the group's std, "batch" by that of all P G rewards, "none" by
            nothing (Dr. GRPO, arXiv:2503.20783). n - 1 in the std, 1e-4 added to it.
    Returns: (P, G), in standard deviations, or in units of the reward; exactly 0 in a group of equal rewards.
    Raises: ValueError for groups of one.
    """
    G = rewards.shape[1]
    if G < 2:
        raise ValueError("a group of one response has no other to be compared with")
    advantages = rewards - rewards.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * G / (G - 1)
    if scale_rewards != "none":
        std = rewards.std(1, keepdim=True) if scale_rewards == "group" else rewards.std()
        advantages = advantages / (std + 1e-4)  # Eq. 3
    return torch.where(zero_std(rewards)[:, None], 0.0, advantages)  # else rounding would be divided by 1e-4


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, kl_coef, kl_estimator="k3",
              clip_coef=0.2, clip_coef_high=0.2, importance_sampling_level="token"):
    """beta KL - min(rho A, clip(rho, 1 - eps, 1 + eps_high) A): Eqs. 1 and 2 of arXiv:2501.12948.

    Args: log-probs in nats and mask (B, R), advantages (B,); only logprobs carries a gradient. At the level
    "sequence" every token carries its whole response's rho and KL. (GSPO, arXiv:2507.18071, clips the |y|-th
    root of that rho.) Returns: losses, 0 where mask is False, and whether the clip decides: (B, R) each.
    """
    logprobs, old, ref = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, ref_logprobs))
    if importance_sampling_level == "sequence":
        logprobs, old, ref = (x.sum(1, keepdim=True) for x in (logprobs, old, ref))  # (B, 1)
    ratio = (logprobs - old).clamp(max=80).exp()  # (B, R) or (B, 1); an overflow would make 0 * inf
    advantages = advantages[:, None]  # (B, 1)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef_high) * advantages
    losses = -torch.min(free, clipped)  # Eq. 1
    if kl_coef:
        losses = losses + kl_coef * kl_estimate(logprobs, ref, kl_estimator)  # Eq. 2
    return torch.where(mask, losses, 0.0), mask & (clipped < free)


def token_weights(mask, loss_type, max_new_tokens):
    """What a token weighs in the loss of an optimizer step, whose B responses are the rows of mask: (B, R).

    grpo     1 / (B |y_i|)           mean over each response, then over responses   Eq. 3 of arXiv:2402.03300
    dapo     1 / sum_i |y_i|         mean over all tokens                           Eq. 8 of arXiv:2503.14476
    dr_grpo  1 / (B max_new_tokens)  sum over a response by a constant             Sec. 3 of arXiv:2503.20783
    """
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    total = {"grpo": len(mask) * lengths, "dapo": lengths.sum(), "dr_grpo": len(mask) * max_new_tokens}
    return mask / total[loss_type]


def load_prompts(tokenizer, rows, eos_ids, max_prompt_length):
    """Rows to (row, prompt's token ids), with the very ids that the prompt has in front of a completion."""
    for row in rows:
        if not isinstance(row.get("prompt"), (str, list)):
            fail(f"{row['_where']}: needs prompt, as text or messages; has {sorted(set(row) - {'_where'})}")
    columns = dict.fromkeys(key for row in rows for key in row)
    chat = [{"role": "assistant", "content": "."}]
    probes = [{**row, "completion": "" if isinstance(row["prompt"], str) else chat} for row in rows]
    encoded = encode(tokenizer, probes, eos_ids, 1 << 30)
    rows = [{**columns, **row, "_end": ids[-1]} for row, (ids, _) in zip(rows, encoded)]  # _end: its EOS
    prompts = [(row, ids[: trained.index(True)]) for row, (ids, trained) in zip(rows, encoded)]
    kept = [(row, ids) for row, ids in prompts if len(ids) <= max_prompt_length]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are over --max-prompt-length: dropped")
    return kept or fail(f"{rows[0]['_where']}: every prompt is longer than --max-prompt-length")


def collate(prompts, responses, device):
    """Token ids padded on the right: input_ids (B, T), and a mask (B, T) of the responses. The padding is id
    0, whatever that token is: the mask comes from lengths, never from token values.
    """
    T = max(len(x) + len(y) for x, y in zip(prompts, responses))
    input_ids = [x + y + [0] * (T - len(x) - len(y)) for x, y in zip(prompts, responses)]
    mask = [[len(x) <= t < len(x) + len(y) for t in range(T)] for x, y in zip(prompts, responses)]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def align(x, mask, R):
    """What x (B, T) holds where mask is True, moved to the left: (B, R), 0 behind each row's last one."""
    real = torch.arange(R, device=x.device) < mask.sum(1, keepdim=True)
    return x.new_zeros(real.shape).masked_scatter(real, x[mask])


def response_logprobs(model, batch, index, args, autocast, entropy=False):
    """[log-probs of these responses' tokens, the entropy each was drawn with if asked]: (b, R) each, nats."""
    prompts, responses = ([batch[key][j] for j in index] for key in ("prompts", "responses"))
    input_ids, mask = collate(prompts, responses, model.device)
    with autocast():
        result = sequence_logprobs(model, input_ids, mask, temperature=args.temperature, entropy=entropy)
    return [align(x, mask, batch["mask"].shape[1]) for x in (result if entropy else [result])]


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


def load_reward(spec, tokenizer, eos_ids, args, device, autocast):
    """(reward, model): reward(rows, prompts, responses) -> scores (B,) of data rows and token ids; model is
    the reward model, or None if spec is file.py:function. That is called as TRL calls it, fn(prompts,
    completions, **columns), with texts or, where the prompt is one, with lists of messages. NaN stands for a
    None, by which a function says that a row is not its business.
    """
    file, _, name = spec.rpartition(":")
    if file.endswith(".py"):
        source = importlib.util.spec_from_file_location(spec.replace(".", "_"), file)  # a name of its own
        module = sys.modules[source.name] = importlib.util.module_from_spec(source)
        sys.path.append(str(Path(file).resolve().parent))  # for what it imports
        place = lambda error: "{1}:{2}: {0!r}".format(error, *traceback.extract_tb(error.__traceback__)[-1])
        try:
            source.loader.exec_module(module)
            function = getattr(module, name)
        except (Exception, SystemExit) as error:  # whatever the user's file raises
            fail(f"--reward {spec}: {place(error)}")

        def from_function(rows, prompts, responses):
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            chats = [isinstance(row["prompt"], list) for row in rows]
            texts = [[{"role": "assistant", "content": t}] if chat else t for t, chat in zip(texts, chats)]
            columns = {key: [row[key] for row in rows] for key in rows[0]
                       if key not in ("prompt", "completion", "_where", "_end")}
            try:
                scores = function(prompts=[row["prompt"] for row in rows], completions=texts, **columns)
                scores = [None if score is None else float(score) for score in scores]
            except (Exception, SystemExit) as error:
                fail(f"--reward {spec}: {place(error)}, given columns {sorted(columns)}")
            if len(scores) != len(rows):
                fail(f"--reward {spec}: {len(scores)} scores for {len(rows)} completions")
            if not all(score is None or abs(score) < 1e30 for score in scores):
                fail(f"--reward {spec}: a score that is not finite")
            return torch.tensor([math.nan if score is None else score for score in scores], device=device)

        return from_function, None
    if not Path(spec).is_dir() and (spec.count("/") != 1 or Path(spec).parent.exists()):
        fail(f"--reward {spec}: no such folder, nor a model's Hub id (owner/name), nor file.py:function")
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            spec, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        vocabulary = transformers.AutoTokenizer.from_pretrained(spec).get_vocab()
    except Exception as error:
        fail(f"--reward {spec}: {error}")
    if info["missing_keys"] or model.config.num_labels != 1 or not hasattr(model, "score"):
        fail(f"--reward {spec}: no reward model: it needs one label and a trained head named score")
    if tokenizer.get_vocab().items() - vocabulary.items():
        fail(f"--reward {spec}: its tokenizer is not the policy's: train it by reward_model.py from --model")
    model.to(device).eval().requires_grad_(False)
    shift, own = getattr(model.config, "reward_mean", 0.0), model.config.eos_token_id
    own = own if isinstance(own, list) else eos_ids if own is None else [own]

    def from_model(rows, prompts, responses):
        # read where it was trained to be read: at the EOS of its rows, behind a response that was cut as well
        ends = [[row["_end"] if row.get("_end") in own else own[0]] for row in rows]
        bodies = [x + (y[:-1] if y[-1] in eos_ids else y) for x, y in zip(prompts, responses)]
        scores = []
        for i in range(0, len(rows), args.micro_batch_size):
            s = slice(i, i + args.micro_batch_size)
            input_ids, mask = collate(bodies[s], ends[s], device)
            with torch.no_grad(), autocast():
                scores.append(token_values(model, input_ids)[mask] - shift)  # (b,)
        scores = torch.cat(scores)
        return scores if scores.isfinite().all() else fail(f"--reward {spec}: a score that is not finite")

    return from_model, model


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


@torch.no_grad()
def rollout(policy, reference, reward_funcs, rows, eos_ids, args, autocast, seed):
    """Sample and score a response for each (row, prompt ids): (batch, metrics). The batch holds prompts and
    responses as token ids; mask, logprobs (the sampler's) and ref_logprobs (B, R); kl, sizes (B,); scores
    (len(args.reward), B), NaN for None; rewards, their weighted sum (B,). Metrics are means over the
    responses, in nats a response and units of the reward.
    """
    rows, prompts = map(list, zip(*rows))
    with autocast():
        drawn = sample(policy, prompts, args.max_new_tokens, eos_ids, args.temperature, seed)
    tokens, logprobs, lengths = drawn
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    responses = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    finished = torch.tensor([row[-1] in eos_ids for row in responses], device=tokens.device)
    batch = {"prompts": prompts, "responses": responses, "mask": mask, "logprobs": logprobs}
    batch["sizes"] = torch.tensor([len(x) + len(y) for x, y in zip(prompts, responses)])  # in tokens
    batch["ref_logprobs"] = torch.zeros_like(logprobs)
    for index in batch["sizes"].argsort(stable=True).split(args.micro_batch_size):  # sorted: less padding
        batch["ref_logprobs"][index] = response_logprobs(reference, batch, index, args, autocast)[0]
    batch["kl"] = torch.where(mask, kl_estimate(logprobs, batch["ref_logprobs"], "k1"), 0.0).sum(1)
    batch["scores"] = torch.stack([reward(rows, prompts, responses) for reward, _ in reward_funcs])
    if batch["scores"].isnan().all(0).any():
        fail(f"--reward {' '.join(args.reward)}: None for a completion: at least one has to score it")
    weights = torch.tensor(args.reward_weights or [1.0] * len(reward_funcs), device=tokens.device)
    batch["rewards"] = (weights[:, None] * batch["scores"]).nansum(0) - args.missing_eos_penalty * ~finished
    metrics = {"reward": batch["rewards"].mean().item(), "kl": batch["kl"].mean().item(),
               "completions/mean_length": lengths.float().mean().item(),
               "completions/eos_rate": finished.float().mean().item()}
    if len(reward_funcs) > 1:
        metrics |= {f"rewards/{spec}": scores.nanmean().item()
                    for spec, scores in zip(args.reward, batch["scores"]) if not scores.isnan().all()}
    return batch, metrics


def evaluate(policy, reference, reward_funcs, tokenizer, held_out, eos_ids, args, autocast):
    """(metrics, samples): a rollout of the held-out prompts, n times each to have --eval-samples responses.

    If the first reward is 1 or 0, right or wrong, pass_at_1 is the share of right responses and pass_at_n
    that of prompts with a right one among n: what there is to select from.
    """
    n = max(args.eval_samples // len(held_out), 1)
    rows = [row for row in held_out[: args.eval_samples] for _ in range(n)]
    batch, metrics = rollout(policy, reference, reward_funcs, rows, eos_ids, args, autocast, args.seed)
    scores = batch["scores"][0].view(-1, n)  # (held-out prompts, n)
    scores = scores[~scores.isnan().all(1)].nan_to_num(0.0)  # those that the first reward has a say in
    if len(scores) and ((scores == 0) | (scores == 1)).all():
        shares = {f"pass_at_{n}": (scores == 1).any(1), "pass_at_1": scores == 1}
        metrics |= {name: x.float().mean().item() for name, x in shares.items()}
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
    columns = zip(decode(batch["prompts"]), decode(batch["responses"]), batch["rewards"], batch["kl"])
    samples = [{"prompt": x, "completion": y, "reward": float(r), "kl": float(kl)} for x, y, r, kl in columns]
    return {f"eval/{name}": value for name, value in metrics.items()}, samples[::n]


def diagnoses(metrics):
    """A line for each sign of trouble in an update's metrics, with what to do about it."""
    zero, cut = metrics["frac_reward_zero_std"], 1 - metrics["completions/eos_rate"]
    clipped, gap = metrics["policy/clipfrac"], metrics["policy/logprob_gap"]
    lines = [
        (zero > 0.5, f"{zero:.0%} of groups had zero variance and taught nothing: solved or hopeless: "
                     "take others, a finer reward or more --num-generations"),
        (cut > 0.5, f"{cut:.0%} of responses were cut: raise --max-new-tokens or --missing-eos-penalty"),
        (clipped > 0.3, f"the clip decides for {clipped:.0%} of tokens: lower --learning-rate"),
        (gap > 0.5, f"sampler and training differ by {gap:.2f} nats at a token: try --dtype float32")]
    return [line for trouble, line in lines if trouble]


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    check_flags(args)
    G, episodes = args.num_generations, args.batch_size * args.num_minibatches
    if args.total_episodes % episodes:
        fail(f"--total-episodes {args.total_episodes} is no multiple of an update's {episodes} responses, "
             "--batch-size times --num-minibatches")
    if G < 2 or episodes % G:
        fail(f"--num-generations {G}: at least 2, and a divisor of an update's {episodes} responses")
    if [word.partition("=")[0] for word in sys.argv].count("--reward") > 1:  # the last would win
        fail("--reward is given twice: several rewards go behind one --reward")
    if not args.reward or len(args.reward_weights) not in (0, len(args.reward)):
        fail(f"--reward, --reward-weights: rewards {len(args.reward)}, weights {len(args.reward_weights)}")
    if not all(abs(weight) < 1e6 for weight in args.reward_weights):
        fail(f"--reward-weights {args.reward_weights}: out of range")
    kl_estimator = args.kl_estimator
    if kl_estimator == "auto":
        kl_estimator = "k3" if args.kl_in == "loss" else "k1"
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    run, state = open_run(args)
    log = make_logger(run, args)
    if args.model == Args.model and not Path(args.model).exists():
        print(f"{args.model} does not exist yet: running sft.py, which makes it")
        if code := subprocess.run([sys.executable, Path(__file__).with_name("sft.py")]).returncode:
            raise SystemExit(code)

    # 2. models, prompts, optimizer
    data = split_rows(args.dataset, args.eval_dataset)
    policy, tokenizer, eos_ids = load_model(args, device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward_funcs = [load_reward(spec, tokenizer, eos_ids, args, device, autocast) for spec in args.reward]
    prompts, held_out = (load_prompts(tokenizer, part, eos_ids, args.max_prompt_length) for part in data)
    rows = [ids for _, ids in prompts + held_out]
    longest = max(rows, key=len) + eos_ids[:1] * args.max_new_tokens
    judges = {f"--reward {spec}": model for spec, (_, model) in zip(args.reward, reward_funcs)}
    for name, model in {"--model": policy, **judges}.items():
        if model is not None:
            check_model(model, [longest, *rows], name, "--max-prompt-length, --max-new-tokens")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    num_updates, update, num_tokens = args.total_episodes // episodes, 0, 0
    print(f"{len(prompts)} prompts, {len(held_out)} held out from {data[1][0]['_where'].rpartition(':')[0]}, "
          f"{num_updates} updates, {policy.num_parameters():,} parameters on {device}\n"
          "The loss starts near 0, since a group's advantages sum to 0, and says little: watch the reward")
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        update, num_tokens = state["update"], state["num_tokens"]
        if state["rows"] != len(prompts):
            fail(f"--resume: {args.dataset} has {len(prompts)} rows, and had {state['rows']} before")

    # 3. the loop. Order and noise are functions of (seed, update), so that no random state has to be saved
    generator = lambda number: torch.Generator().manual_seed(args.seed + 1000 * number)
    stopped, metrics = [], {}  # a first signal stops after the update, a second one at once
    stop = lambda number, frame: stopped.append(number) or signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=num_updates, initial=update, desc="grpo", unit="update", disable=None)
    while update == num_updates or not stopped:
        if update in (0, num_updates) or (args.eval_every and update % args.eval_every == 0):
            after, samples = evaluate(policy, reference, reward_funcs, tokenizer, held_out, eos_ids, args,
                                      autocast)
            if not math.isfinite(after["eval/reward"] + after["eval/kl"]):
                fail(f"update {update}: the evaluation gives NaN: lower --learning-rate")
            log(update, after, samples)
            bar.write(f"update {update}: reward {after['eval/reward']:.3f} KL {after['eval/kl']:.3f} "
                      f"{samples[0]['completion'][:80]!r}")
            for line in diagnoses(metrics) if metrics else ():
                bar.write(f"  {line}")
        if update == num_updates:
            break
        began = time.time()

        # 3a. rollout: G responses to each of the next prompts, in an order drawn anew for each pass over them
        numbers = range(update * episodes // G, (update + 1) * episodes // G)
        epochs = {k // len(prompts) for k in numbers}
        orders = {epoch: torch.randperm(len(prompts), generator=generator(epoch)) for epoch in epochs}
        rows = [prompts[orders[k // len(prompts)][k % len(prompts)]] for k in numbers for _ in range(G)]
        batch, metrics = rollout(policy, reference, reward_funcs, rows, eos_ids, args, autocast,
                                 args.seed + 1000 * (update + 1))
        mask, old_logprobs, ref_logprobs = (batch[key] for key in ("mask", "logprobs", "ref_logprobs"))

        # 3b. advantages within the groups
        groups = batch["rewards"].view(-1, G)  # (P, G)
        empty, kept = zero_std(groups).cpu(), torch.arange(episodes)
        if args.drop_zero_std:
            kept = kept[~empty.repeat_interleave(G)]
        metrics |= {"reward_std": groups.std(1).mean().item(),
                    "frac_reward_zero_std": empty.float().mean().item()}
        if args.kl_in == "reward":
            kl = torch.where(mask, kl_estimate(old_logprobs, ref_logprobs, kl_estimator), 0.0)
            groups = groups - args.kl_coef * kl.sum(1).view(-1, G)
        advantages = group_advantages(groups, args.baseline, args.scale_rewards).view(-1)  # (B,)

        # 3c. update, with a learning rate that falls to 0
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * update / num_updates)
        sums = dict.fromkeys(("loss", "entropy", "policy/approx_kl", "policy/clipfrac"), 0.0)
        gaps, norms = [], []
        for epoch in range(args.update_epochs if len(kept) else 0):
            order = kept[torch.randperm(len(kept), generator=generator(update * args.update_epochs + epoch))]
            for number, minibatch in enumerate(order.chunk(args.num_minibatches)):
                minibatch = minibatch[batch["sizes"][minibatch].argsort(stable=True)]
                weights = token_weights(mask[minibatch], args.loss_type, args.max_new_tokens)
                for index, w in zip(*(x.split(args.micro_batch_size) for x in (minibatch, weights))):
                    m, old = mask[index], old_logprobs[index]
                    logprobs, entropy = response_logprobs(policy, batch, index, args, autocast, entropy=True)
                    losses, clipped = grpo_loss(
                        logprobs, old, ref_logprobs[index], advantages[index], m,
                        args.kl_coef if args.kl_in == "loss" else 0.0, kl_estimator, args.clip_coef,
                        args.clip_coef_high, args.importance_sampling_level)
                    (losses * w).sum().backward()
                    terms = {"loss": losses * w, "entropy": entropy, "policy/clipfrac": clipped,
                             "policy/approx_kl": kl_estimate(old, logprobs, "k3")}
                    for name, value in terms.items():
                        sums[name] += torch.where(m, value.detach().float(), 0.0).sum()
                    if epoch == number == 0:  # before the first step only the sampler's arithmetic differs
                        gaps.append(torch.where(m, logprobs.detach() - old, 0.0).abs().max().item())
                norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(sum(norms) + torch.nn.utils.get_total_norm(policy.parameters()).item()):
            fail(f"update {update + 1}: gradient norms {norms}: lower --learning-rate; the last checkpoint, "
                 f"if any, is in {run / 'state'}")
        update, batch_tokens = update + 1, int(mask.sum())
        num_tokens += batch_tokens

        # 3d. log, save
        trained = args.update_epochs * int(mask[kept].sum())  # tokens
        metrics |= {name: float(value) / max(len(norms) if name == "loss" else trained, 1)
                    for name, value in sums.items()}
        metrics |= {"policy/logprob_gap": max(gaps, default=0.0), "grad_norm": norms[-1] if norms else 0.0,
                    "learning_rate": optimizer.param_groups[0]["lr"], "num_tokens": num_tokens,
                    "episode": update * episodes, "tokens_per_second": batch_tokens / (time.time() - began)}
        log(update, metrics)
        bar.update()
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.2f}")
        if stopped or (args.save_every and update % args.save_every == 0):
            save_checkpoint(run, args, policy=policy.state_dict(), optimizer=optimizer.state_dict(),
                            update=update, num_tokens=num_tokens, rows=len(prompts))
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if update < num_updates:
        print(f"stopped after update {update} of {num_updates}: --resume continues")
        raise SystemExit(128 + stopped[0])

    # 4. save, and show what has changed
    save_model(run, args, policy, tokenizer, eos_ids, time.time() - start)
    with open(run / "metrics.jsonl") as file, open(run / "samples.jsonl") as start_samples:
        before = json.loads(file.readline())
        for row, start_row in zip(samples[:5], map(json.loads, start_samples)):
            print(f"{row['prompt'][-90:]!r}")
            for when, x in (("before", start_row), ("after", row)):
                print(f"  {when:6} reward {x['reward']:6.2f}  KL {x['kl']:5.2f}  {x['completion'][:80]!r}")
    for name, value in after.items():
        print(f"{name:28} {before.get(name, math.nan):10.4f} -> {value:10.4f}")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args))
