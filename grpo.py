r"""Group-relative policy optimization: PPO whose critic is the mean of a group. Step 3 of RLHF.

    maximize E[ 1/G sum_i (min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta KL_i) ]            (1)
    KL_i = pi_ref(y_i) / pi(y_i) - log(pi_ref(y_i) / pi(y_i)) - 1                                      (2)
    A_i  = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G),     rho_i = pi(y_i) / pi_old(y_i)               (3)

over G responses y_i ~ pi_old( . | x) to each prompt x: Eqs. 1 to 3 of arXiv:2501.12948.

What is done differently from these equations, and why:
1. rho and KL are each token's, and a response's loss is the mean over its tokens (Eqs. 3 and 4 of
   arXiv:2402.03300): a product over hundreds of tokens leaves the clip's range at once. As written above is
   --importance-sampling-level sequence, where (2) explodes: better k2, or --kl-in reward.
2. Its optimum is not pi* = pi_ref exp(r / beta) / Z. On samples of pi, (2) has the gradient of
   KL(pi_ref || pi), which ends at beta pi_ref / (lambda - r); and no token answers for the KL of later ones.
   --kl-in reward makes r - beta log(pi / pi_ref) the reward, and pi* the optimum.
3. The std divides by n - 1, and 1e-4 is added to it; a group of equal rewards has advantages of exactly 0.
4. A response without EOS stays in the loss; --missing-eos-penalty is subtracted from its reward.
REINFORCE with a leave-one-out baseline (RLOO, arXiv:2402.14740) is the case
    --kl-in reward --baseline leave_one_out --scale-rewards none --importance-sampling-level sequence

Every tensor about responses is (B, T): column t is about token t of prompt and response, padded on the right,
and `mask` says which columns are the response's.

One CPU core, the embedded world, 20 s:  python grpo.py
One CUDA GPU, a real model and data:     python grpo.py --model runs/my-sft/model \
    --reward my_reward.py:correct --dataset my_prompts.jsonl --learning-rate 1e-6 --kl-coef 0.001 \
    --batch-size 256 --micro-batch-size 8 --total-episodes 25600 --max-new-tokens 512
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from common import (
    Run, check_flags, check_model, clip_gradients, device_of, fail, kl_estimate, lighten, load_model,
    load_prompts, load_reward, make_first, micro_batches, over_ranks, rollout, sample_rows, sequence_logprobs,
    shuffled, split_rows, to_floats)


@dataclass
class Args:
    # run
    output_dir: str = "runs/grpo"  # gets args.json, metrics.jsonl, samples.jsonl and model/
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the prompts' order and the samples
    eval_every: int = 10  # updates between evaluations with samples (0: only before and after)
    eval_samples: int = 128  # responses to held-out prompts at each evaluation
    save_every: int = 20  # updates between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not of weights; auto: bf16 on CUDA
    shard: bool = False  # under torchrun, spread weights and optimizer over the GPUs (FSDP2): less memory
    track: bool = False  # log to Weights & Biases too
    # data
    model: str = "runs/sft/model"  # folder or Hub id: start and reference; sft.py makes the default one
    reward: tuple[str, ...] = ("data/gold_reward.py:gold_reward",)  # file.py:function or folder, one or more
    reward_weights: tuple[float, ...] = ()  # of several rewards in their sum; empty: 1 each
    dataset: str = "data/prompts.jsonl"  # file or Hub id: prompt; further columns reach a reward function
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 40  # tokens of the longest response
    temperature: float = 1.0  # of sampling, and of all log-probs
    # optimization
    total_episodes: int = 12800  # responses sampled in all
    batch_size: int = 128  # responses per optimizer step
    num_minibatches: int = 1  # optimizer steps per pass over an update's responses, so many times batch_size
    update_epochs: int = 1  # passes over them (1 to 4)
    micro_batch_size: int = 64  # responses per forward pass: a lower one saves memory, same gradient
    learning_rate: float = 1e-3  # peak of AdamW (1e-6 to 3e-6 with a pretrained model)
    anneal_lr: bool = True  # decay linearly to 0
    max_grad_norm: float = 1.0  # clip the gradient of a model to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train adapters of this rank (8 to 64; 10 times the learning rate), 0: all weights
    kl_coef: float = 0.3  # beta, the KL penalty in reward per nat (0 to 0.2 with a pretrained model)
    clip_coef: float = 0.2  # how far the ratio of policies may move, epsilon (0.1 to 0.3)
    # GRPO
    num_generations: int = 8  # responses to a prompt, its group: G (4 to 64)
    kl_in: Literal["loss", "reward"] = "loss"  # beta KL in the loss, as published, or r - beta KL as reward
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"  # auto: k3 in the loss, k1 in the reward
    baseline: Literal["mean", "leave_one_out"] = "mean"  # mean reward of the group, or of its other responses
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose std of rewards divides the advantage
    drop_zero_std: bool = False  # leave groups of equal rewards out of the loss, KL and denominators too
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # what a token weighs, see token_weights
    importance_sampling_level: Literal["token", "sequence"] = "token"  # of the ratio, and of a KL in the loss
    clip_coef_high: float = 0.2  # how far it may rise, where clip_coef is how far it may fall (0.28 in DAPO)
    missing_eos_penalty: float = 0.0  # subtracted from the reward of a response without EOS


# ---- The mathematics ----


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
    Raises: ValueError for groups of one and for unknown options.
    """
    if baseline not in ("mean", "leave_one_out") or scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"unknown baseline {baseline!r} or scale_rewards {scale_rewards!r}")
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

    Args: log-probs in nats and mask (B, T), advantages (B,); only logprobs carries a gradient. At the level
    "sequence" every token carries its whole response's rho and KL. (GSPO, arXiv:2507.18071, clips the |y|-th
    root of that rho.) Returns: losses, 0 where mask is False, and whether the clip decides: (B, T) each.
    """
    logprobs = torch.where(mask, logprobs, 0.0)
    old = torch.where(mask, old_logprobs, 0.0)
    ref = torch.where(mask, ref_logprobs, 0.0)
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"unknown importance_sampling_level {importance_sampling_level!r}")
    if importance_sampling_level == "sequence":  # of the whole response: (B, 1)
        logprobs, old, ref = (x.sum(1, keepdim=True) for x in (logprobs, old, ref))
    ratio = (logprobs - old).clamp(max=80).exp()  # (B, T) or (B, 1); an overflow would make 0 * inf
    advantages = advantages[:, None]  # (B, 1)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef_high) * advantages
    losses = -torch.min(free, clipped)  # Eq. 1
    if kl_coef:
        losses = losses + kl_coef * kl_estimate(logprobs, ref, kl_estimator)  # Eq. 2
    return torch.where(mask, losses, 0.0), mask & (clipped < free)


def token_weights(mask, loss_type, max_new_tokens):
    """What a token weighs in the loss of an optimizer step, whose B responses are the rows of mask: (B, T).

    grpo     1 / (B |y_i|)           mean over each response, then over responses   Eq. 3 of arXiv:2402.03300
    dapo     1 / sum_i |y_i|         mean over all tokens                           Eq. 8 of arXiv:2503.14476
    dr_grpo  1 / (B max_new_tokens)  sum over a response by a constant             Sec. 3 of arXiv:2503.20783
    """
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    total = {"grpo": len(mask) * lengths, "dapo": lengths.sum(), "dr_grpo": len(mask) * max_new_tokens}
    return mask.double() / total[loss_type]


# ---- Rollouts ----


def episode_metrics(episodes, specs):
    """Means over the responses of a rollout, in units of the reward and in nats per response."""
    mean = {name: x.nanmean(0) for name, x in episodes.items()}
    metrics = {"reward": mean["rewards"].item(), "kl": mean["kl"].item(),
               "completions/mean_length": mean["lengths"].item(),
               "completions/eos_rate": mean["finished"].item()}
    for spec, x in zip(specs, mean["scores"].tolist()):
        if len(specs) > 1 and not math.isnan(x):
            name = "rewards/" + "/".join(Path(spec).parts[-2:])
            metrics[f"rewards/{spec}" if name in metrics else name] = x
    return metrics


def pass_rates(scores):
    """Of scores (prompts, n), 1 for right, 0 for wrong, NaN for None: pass_at_1, the share of right
    responses, and pass_at_n, that of prompts with a right one among n. Of other scores: nothing.
    """
    judged = scores[~scores.isnan().all(1)].nan_to_num(0.0)
    right = judged == 1
    if len(judged) == 0 or not (right | (judged == 0)).all():
        return {}
    return {f"pass_at_{scores.shape[1]}": right.any(1).float().mean().item(),
            "pass_at_1": right.float().mean().item()}


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


# ---- Training ----


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    device, autocast = device_of(args)
    check_flags(args)
    num_episodes = args.batch_size * args.num_minibatches  # responses of an update
    if args.total_episodes % num_episodes:
        fail(f"--total-episodes {args.total_episodes} is no multiple of the {num_episodes} responses of an "
             "update, --batch-size times --num-minibatches")
    num_updates = args.total_episodes // num_episodes
    G = args.num_generations
    if G < 2 or num_episodes % G:
        fail(f"--num-generations {G}: at least 2, and a divisor of an update's {num_episodes} responses")
    if [word.partition("=")[0] for word in sys.argv].count("--reward") > 1:  # the last would win
        fail("--reward is given twice: several rewards go behind one --reward")
    if not args.reward or len(args.reward_weights) not in (0, len(args.reward)):
        fail(f"--reward, --reward-weights: rewards {len(args.reward)}, weights {len(args.reward_weights)}")
    if not all(abs(weight) < 1e6 for weight in args.reward_weights):
        fail(f"--reward-weights {args.reward_weights}: out of range")
    kl_estimator = args.kl_estimator
    if kl_estimator == "auto":
        kl_estimator = "k3" if args.kl_in == "loss" else "k1"
    run = Run(args)
    make_first(args.model, Args.model, "sft.py")

    # 2. prompts, models, optimizer
    train_rows, held_out_rows = split_rows(args.dataset, args.eval_dataset, "prompt")
    policy, tokenizer, eos_ids = load_model(args.model, args, device)
    rewards = [load_reward(spec, tokenizer, eos_ids, args, device, autocast) for spec in args.reward]
    score = lambda *texts: torch.stack([own(*texts) for own, *_ in rewards], dim=1)  # (B, number of rewards)
    prompts = load_prompts(tokenizer, train_rows, args.max_prompt_length)
    held_out = load_prompts(tokenizer, held_out_rows, args.max_prompt_length)
    ids = [ids for _, ids in prompts + held_out]
    longest = max(ids, key=len) + eos_ids[:1] * args.max_new_tokens
    check_model(policy, [longest, *ids], lengths="--max-prompt-length, --max-new-tokens")
    for spec, (_, model, read) in zip(args.reward, rewards):
        if model is not None:
            texts = read(*zip(*prompts, *held_out), [eos_ids[:1]] * len(ids))  # of empty responses
            longest = max(texts, key=len) + texts[0][-1:] * args.max_new_tokens
            check_model(model, [longest, *texts], f"--reward {spec}", "--max-prompt-length, --max-new-tokens")
    reference = policy  # without its adapters
    if not args.lora_rank:
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
    lighten(args, autocast, policy, reference, *(model for _, model, _ in rewards))
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    print(f"{len(prompts)} prompts, {len(held_out)} held out, "
          f"{num_updates} updates, {policy.num_parameters():,} parameters on {device}")
    print("The loss starts near 0, since a group's advantages sum to 0, and says little: watch the reward")

    def evaluate(update):
        """Log responses to held-out prompts, --eval-samples of them."""
        n = max(args.eval_samples // len(held_out), 1)
        rows = [row for row in held_out[: args.eval_samples] for _ in range(n)]
        batch, episodes = rollout(policy, reference, score, rows, eos_ids, args, autocast, args.seed)
        result = episode_metrics(episodes, args.reward) | pass_rates(episodes["scores"][:, 0].view(-1, n))
        result = {f"eval/{name}": x for name, x in result.items()}
        samples = sample_rows(
            tokenizer, [ids for _, ids in rows], batch, reward=episodes["rewards"], kl=episodes["kl"])[::n]
        run.log(update, result, samples)
        tqdm.write(f"update {update}: reward {result['eval/reward']:.3f} "
                   f"KL {result['eval/kl']:.3f} {samples[0]['completion'][:80]!r}")
        for line in diagnoses(metrics) if metrics else ():  # of the last update
            tqdm.write(f"  {line}")
        return result, samples

    # 3. the loop. Order and noise are functions of (seed, update), so that no random state has to be saved
    inputs = [({**row, "_where": ""}, ids) for row, ids in prompts + held_out]
    inputs += [getattr(model, "first_weights", "") for _, model, _ in rewards]
    for spec in args.reward:
        file = Path(spec.rpartition(":")[0] or f"{spec}/config.json")  # which holds the reward model's mean
        if file.exists():
            inputs.append((file.read_bytes(), spec.partition(".py:")[2]))
    first = run.start(num_updates, inputs, tokenizer, policy=policy, optimizer=optimizer)
    num_tokens, n, metrics = run.state.get("num_tokens", 0), len(prompts), {}
    bar = tqdm(range(first, num_updates), initial=first, total=num_updates, unit="update", disable=None)
    for update in bar:
        if update == 0 or (args.eval_every and update % args.eval_every == 0):
            evaluate(update)
        began = time.time()

        # 3a. rollout: responses to the next prompts, in an order drawn anew for each pass over them
        numbers = range(update * num_episodes, (update + 1) * num_episodes)
        rows = [prompts[shuffled(n, args.seed, k // G // n)[k // G % n]] for k in numbers]
        batch, episodes = rollout(
            policy, reference, score, rows, eos_ids, args, autocast, args.seed + 1000 * (update + 1))
        mask = batch["mask"]
        metrics = episode_metrics(episodes, args.reward)

        # 3b. advantages within the groups
        groups = episodes["rewards"].view(-1, G)  # (P, G)
        equal = zero_std(groups)  # (P,)
        metrics |= {"reward_std": groups.std(1).mean().item(),
                    "frac_reward_zero_std": equal.float().mean().item()}
        kept = torch.arange(num_episodes)
        if args.drop_zero_std:
            kept = kept[~equal.repeat_interleave(G)]
        if args.kl_in == "reward":
            kl = kl_estimate(batch["logprobs"], batch["ref_logprobs"], kl_estimator)
            kl = torch.where(mask, kl, 0.0)  # (B, T)
            groups = groups - args.kl_coef * kl.sum(1).view(-1, G)
        advantages = group_advantages(groups, args.baseline, args.scale_rewards)
        batch["advantages"] = advantages.view(-1, 1)  # (B, 1)

        # 3c. optimizer steps, with a learning rate that falls to 0
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * update / num_updates)
        sums = dict.fromkeys(("loss", "entropy", "policy/approx_kl", "policy/clipfrac"), 0.0)
        gap, grad_norm, num_steps = torch.zeros(1, device=device), 0.0, 0
        batch["weights"] = torch.zeros_like(batch["logprobs"])
        for epoch in range(args.update_epochs if len(kept) else 0):
            order = kept[shuffled(len(kept), args.seed, update * args.update_epochs + epoch)]
            for minibatch in order.chunk(args.num_minibatches):
                weights = token_weights(mask[minibatch], args.loss_type, args.max_new_tokens)
                batch["weights"][minibatch] = weights.to(batch["weights"].dtype)
                for _, mb in micro_batches(batch, minibatch, args.micro_batch_size, device):
                    with autocast():
                        logprobs, entropy = sequence_logprobs(
                            policy, mb["input_ids"], mb["mask"], temperature=args.temperature, entropy=True)
                    losses, clipped = grpo_loss(
                        logprobs, mb["logprobs"], mb["ref_logprobs"], mb["advantages"][:, 0], mb["mask"],
                        args.kl_coef if args.kl_in == "loss" else 0.0, kl_estimator, args.clip_coef,
                        args.clip_coef_high, args.importance_sampling_level)
                    losses = losses * mb["weights"]
                    losses.sum().backward()
                    terms = {"loss": losses, "entropy": entropy, "policy/clipfrac": clipped,
                             "policy/approx_kl": kl_estimate(mb["logprobs"], logprobs, "k3")}
                    for name, x in terms.items():
                        total = torch.where(mb["mask"], x.detach().double(), 0.0).sum()
                        sums[name] = sums.get(name, 0.0) + total
                    if num_steps == 0:  # before the first step only the sampler's arithmetic differs
                        off = torch.where(mb["mask"], logprobs.detach() - mb["logprobs"], 0.0)
                        gap = torch.cat([gap, off.abs().flatten()]).amax(0, keepdim=True)
                grad_norm = clip_gradients(policy, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                num_steps += 1

        # 3d. log, save
        batch_tokens = int(mask.sum())
        num_tokens += batch_tokens
        trained_tokens = args.update_epochs * int(mask[kept].sum())
        loss = sums.pop("loss") / max(num_steps, 1)
        means = {name: x / max(trained_tokens, 1) for name, x in sums.items()}
        metrics |= {"grad_norm": grad_norm, "policy/logprob_gap": over_ranks(gap, "MAX")}
        metrics = to_floats({"loss": loss, **means}, metrics)
        metrics |= {"learning_rate": optimizer.param_groups[0]["lr"],
                    "num_tokens": num_tokens, "episode": (update + 1) * num_episodes,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        run.log(update + 1, metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.2f}")
        run.checkpoint(update + 1, num_tokens=num_tokens)

    # 4. evaluate, save, and show what has changed
    after, samples = evaluate(max(first, num_updates))
    run.finish(policy)
    run.show_change(after, samples, "reward", "kl", "entropy", "completions/mean_length")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
