r"""Proximal policy optimization: a critic, and the KL penalty inside the reward. Step 3 of RLHF.

    maximize E[ r(x, y) ] - beta KL(pi || pi_ref),  y ~ pi( . | x)                   Eq. 2 of arXiv:2203.02155
    reward of token t   R_t = -beta (log pi(y_t) - log pi_ref(y_t)) + (r(x, y) at the last token)
    advantage           A_t = sum_l (gamma lambda)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l})
    policy loss         mean of max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)), rho = pi / pi_old
    value loss          mean of 1/2 max((V_t - G_t)^2, (clipped V_t - G_t)^2), G_t = A_t + V_t

What is done differently from InstructGPT, and why:
1. No pretraining loss mixed in, and fresh samples for each update: old log-probs are those of the sampler.
2. Critic and policy share no weights, so no coefficient has to balance their losses.
3. The last token carries the score: the EOS, whose choice is trained, or the last one before the cut. Then
   --missing-eos-penalty is subtracted, and the end is treated as one: no bootstrap.
4. Means are over all tokens of an optimizer step. --target-kl adapts beta (Sec. 2.2 of arXiv:1909.08593).
REINFORCE (Williams 1992) is one optimizer step per rollout and no critic:
    python ppo.py --critic none --num-minibatches 1 --update-epochs 1 --gae-lambda 1

Every tensor about responses is (B, T): column t is about token t of prompt and response, padded on the right,
and `mask` says which columns are the response's.

One CPU core, the embedded world, 30 s:  python ppo.py
One CUDA GPU, a real model and data:     python ppo.py --model runs/my-sft/model --reward runs/my-rm/model \
    --dataset my_prompts.jsonl --learning-rate 1e-6 --critic-learning-rate 1e-5 --kl-coef 0.05 \
    --batch-size 128 --num-minibatches 4 --micro-batch-size 8 --total-episodes 102400 --max-new-tokens 256
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from tqdm import tqdm

from common import (
    Run, blame, check_flags, check_model, clip_gradients, device_of, fail, kl_estimate, last_token,
    lighten, load_model, load_prompts, load_reward, make_first, masked_mean, masked_whiten, micro_batches,
    over_ranks, per_token, rollout, sample_rows, sequence_logprobs, shuffled, split_rows, to_floats,
    token_values)


@dataclass
class Args:
    # run
    output_dir: str = "runs/ppo"  # gets args.json, metrics.jsonl, samples.jsonl, model/ and critic/
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
    reward: tuple[str, ...] = ("runs/reward_model/model",)  # file.py:function or folder, one or more
    reward_weights: tuple[float, ...] = ()  # of several rewards in their sum; empty: 1 each
    dataset: str = "data/prompts.jsonl"  # file or Hub id: prompt; further columns reach a reward function
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 40  # tokens of the longest response
    temperature: float = 1.0  # of sampling, and of all log-probs
    # optimization
    total_episodes: int = 9600  # responses sampled in all
    batch_size: int = 64  # responses per optimizer step
    num_minibatches: int = 2  # optimizer steps per pass over an update's responses, so many times batch_size
    update_epochs: int = 2  # passes over them (1 to 4)
    micro_batch_size: int = 64  # responses per forward pass: a lower one saves memory, same gradient
    learning_rate: float = 5e-4  # peak of the policy's AdamW (1e-6 to 3e-6 with a pretrained model)
    critic_learning_rate: float = 1e-3  # peak of the critic's (5e-6 to 1e-5 with a pretrained model)
    anneal_lr: bool = True  # decay linearly to 0
    max_grad_norm: float = 1.0  # clip the gradient of a model to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train adapters of this rank (8 to 64; 10 times the learning rate), 0: all weights
    kl_coef: float = 0.3  # beta, the KL penalty in reward per nat (0 to 0.2 with a pretrained model)
    clip_coef: float = 0.2  # how far the ratio of policies may move, epsilon (0.1 to 0.3)
    # PPO
    critic: Literal["reward", "policy", "none"] = "reward"  # starts as the reward model, if any, or policy
    target_kl: float = 0.0  # adapt kl_coef to reach this KL per response, in nats (0: keep it)
    kl_horizon: int = 10000  # responses over which it adapts; it moves by at most 20 % in so many
    gamma: float = 1.0  # discount of later rewards
    gae_lambda: float = 0.95  # 1: Monte-Carlo returns less the critic's values; 0: one-step differences
    clip_coef_value: float = 0.2  # how far a value may move in an update, in units of the reward (0: free)
    norm_adv: bool = True  # whiten the advantages over all tokens of an update
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response without EOS


# ---- The mathematics ----


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """R_t = -beta (log pi(y_t) - log pi_ref(y_t)), plus the score at the last token: Eq. 2, arXiv:1909.08593.

    The k1 estimate of the KL, in the reward: with returns to go its gradient is that of KL(pi || pi_ref).
    Args: scores (B,); log-probs in nats and mask (B, T). Returns: (B, T), 0 where mask is False.
    """
    rewards = torch.where(mask, -kl_coef * kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
    last = last_token(mask)[:, None]  # (B, 1): the EOS, or the last token of a response without one
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards, values, mask, gamma, gae_lambda):
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t: Eq. 16 of arXiv:1506.02438.

    Behind a row's last token V = 0 and A = 0. Args: rewards, values and mask (B, T), V_t being the value
    before token t is chosen. Returns: advantages and returns A_t + V_t: (B, T), 0 where mask is False.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * advantage, 0.0)
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, advantages, mask, clip_coef):
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log pi - log pi_old): Eq. 7 of arXiv:1707.06347.

    Args: (B, T) each; only logprobs carries a gradient. Returns: losses, 0 where mask is False, and the ratio
    rho, 1 there: (B, T) each. At rho = 1 the gradient is that of REINFORCE, -A grad log pi.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # masked before exp: no overflow, no NaN
    advantages = torch.where(mask, advantages, 0.0)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.max(-advantages * ratio, -advantages * clipped_ratio), ratio


def value_loss(values, old_values, returns, mask, clip_coef_value):
    """1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), without the clip if eps = 0.

    From the code of arXiv:1707.06347; old_values are those the returns G were made with. Args: (B, T) each.
    Returns: losses, 0 where mask is False, and whether the clip decides: (B, T) each.
    """
    values = torch.where(mask, values, 0.0)
    old_values = torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    eps = clip_coef_value or math.inf
    clipped_values = values.clamp(old_values - eps, old_values + eps)
    free, clipped = (values - returns).square(), (clipped_values - returns).square()
    return torch.max(free, clipped) / 2, clipped > free


def adapted_kl_coef(kl_coef, kl, target_kl, episodes, kl_horizon):
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): Sec. 2.2 of arXiv:1909.08593.

    Args: kl, the mean over an update's n episodes, in nats per response, as is target_kl.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(episodes / kl_horizon, 1))


# ---- Rollouts ----


def episode_metrics(episodes, specs, kl_coef):
    """Means over the responses of a rollout, in units of the reward and in nats per response."""
    mean = {name: x.nanmean(0) for name, x in episodes.items()}
    score, kl = mean["rewards"].item(), mean["kl"].item()
    metrics = {"objective/scores": score, "objective/kl": kl, "objective/non_score_reward": -kl_coef * kl,
               "objective/rlhf_reward": score - kl_coef * kl, "objective/entropy": mean["entropy"].item(),
               "completions/mean_length": mean["lengths"].item(),
               "completions/eos_rate": mean["finished"].item()}
    for spec, x in zip(specs, mean["scores"].tolist()):
        if len(specs) > 1 and not math.isnan(x):
            name = "rewards/" + "/".join(Path(spec).parts[-2:])
            metrics[f"rewards/{spec}" if name in metrics else name] = x
    return metrics


def load_critic(args, policy, reward_model, device):
    """A copy of the reward model, worth the reward at an EOS, or of the policy with a head of 0, or None."""
    if args.critic == "none":
        return None
    source = reward_model if args.critic == "reward" and reward_model is not None else policy
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    with blame(f"--critic {args.critic}"):  # transformers has token classification of most models only
        critic = transformers.AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    critic.base_model.load_state_dict(source.base_model.state_dict())
    head = critic.score if hasattr(critic, "score") else critic.classifier
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    if source is reward_model:
        with torch.no_grad():
            head.weight.copy_(reward_model.score.weight)
            head.bias.sub_(getattr(reward_model.config, "reward_mean", 0.0))
    if args.gradient_checkpointing:
        critic.gradient_checkpointing_enable()
    return critic.to(device).train()


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
    if [word.partition("=")[0] for word in sys.argv].count("--reward") > 1:  # the last would win
        fail("--reward is given twice: several rewards go behind one --reward")
    if not args.reward or len(args.reward_weights) not in (0, len(args.reward)):
        fail(f"--reward, --reward-weights: rewards {len(args.reward)}, weights {len(args.reward_weights)}")
    if not all(abs(weight) < 1e6 for weight in args.reward_weights):
        fail(f"--reward-weights {args.reward_weights}: out of range")
    run = Run(args)
    make_first(args.model, Args.model, "sft.py")
    make_first(args.reward[0], Args.reward[0], "reward_model.py")

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
    reward_model = next((model for _, model, _ in rewards if model is not None), None)
    critic = load_critic(args, policy, reward_model, device)
    models = {"policy": policy, "critic": critic} if critic else {"policy": policy}
    lighten(args, autocast, policy, reference, critic, *(model for _, model, _ in rewards))
    peaks = {"policy": args.learning_rate, "critic": args.critic_learning_rate}
    groups = [{"params": list(model.parameters()), "peak": peaks[name]} for name, model in models.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    print(f"{len(prompts)} prompts, {len(held_out)} held out, "
          f"{num_updates} updates, {policy.num_parameters():,} parameters on {device}")
    if reward_model is not None:
        accuracy = getattr(reward_model.config, "held_out_accuracy", math.nan)
        hint = "" if accuracy > 0.6 else ": unknown, or near chance. Make sure your reward model works first!"
        print(f"the reward model's held-out accuracy is {accuracy:.3f}{hint}")

    def evaluate(update):
        """Log responses to held-out prompts, --eval-samples of them."""
        rows = [held_out[i % len(held_out)] for i in range(args.eval_samples)]
        batch, episodes = rollout(policy, reference, score, rows, eos_ids, args, autocast, args.seed)
        result = episode_metrics(episodes, args.reward, kl_coef)
        result = {f"eval/{name}": x for name, x in result.items()}
        samples = sample_rows(
            tokenizer, [ids for _, ids in rows], batch, score=episodes["rewards"], kl=episodes["kl"])
        run.log(update, result, samples)
        tqdm.write(f"update {update}: score {result['eval/objective/scores']:.3f} "
                   f"KL {result['eval/objective/kl']:.3f} {samples[0]['completion'][:80]!r}")
        return result, samples

    # 3. the loop. Order and noise are functions of (seed, update), so that no random state has to be saved
    inputs = [({**row, "_where": ""}, ids) for row, ids in prompts + held_out]
    inputs += [getattr(model, "first_weights", "") for _, model, _ in rewards]
    for spec in args.reward:
        file = Path(spec.rpartition(":")[0] or f"{spec}/config.json")  # which holds the reward model's mean
        if file.exists():
            inputs.append((file.read_bytes(), spec.partition(".py:")[2]))
    first = run.start(num_updates, inputs, tokenizer, **models, optimizer=optimizer)
    kl_coef = run.state.get("kl_coef", args.kl_coef)
    num_tokens, n, metrics = run.state.get("num_tokens", 0), len(prompts), {}
    bar = tqdm(range(first, num_updates), initial=first, total=num_updates, unit="update", disable=None)
    for update in bar:
        if update == 0 or (args.eval_every and update % args.eval_every == 0):
            evaluate(update)
        began = time.time()

        # 3a. rollout: responses to the next prompts, in an order drawn anew for each pass over them
        numbers = range(update * num_episodes, (update + 1) * num_episodes)
        rows = [prompts[shuffled(n, args.seed, k // n)[k % n]] for k in numbers]
        batch, episodes = rollout(
            policy, reference, score, rows, eos_ids, args, autocast, args.seed + 1000 * (update + 1))
        mask = batch["mask"]
        metrics = episode_metrics(episodes, args.reward, kl_coef) | {"objective/kl_coef": kl_coef}

        # 3b. rewards, values, advantages
        token_reward = token_rewards(
            episodes["rewards"], batch["logprobs"], batch["ref_logprobs"], mask, kl_coef)
        batch["values"] = torch.zeros_like(token_reward)
        if critic:
            batch["before"] = mask.roll(-1, dims=1)
            values_of = lambda mb: token_values(critic, mb["input_ids"], mb["before"]).roll(1, dims=1)
            with autocast():  # V_t, before token t is chosen, is the head's output at token t - 1
                batch["values"] = per_token(values_of, batch, args.micro_batch_size, device)
        advantages, batch["returns"] = gae(token_reward, batch["values"], mask, args.gamma, args.gae_lambda)
        batch["advantages"] = masked_whiten(advantages, mask) if args.norm_adv else advantages
        variance = masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)).square(), mask)
        unexplained = masked_mean(advantages.square(), mask)
        metrics["val/explained_variance"] = (1 - unexplained / variance).item() if variance > 0 else 0.0

        # 3c. optimizer steps, with a learning rate that falls to 0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - update / num_updates if args.anneal_lr else 1.0)
        sums, gap, num_steps = {}, torch.zeros(1, device=device), 0
        for epoch in range(args.update_epochs):
            order = torch.tensor(shuffled(num_episodes, args.seed, update * args.update_epochs + epoch))
            for minibatch in order.chunk(args.num_minibatches):
                step_tokens = int(mask[minibatch].sum())  # of the whole optimizer step
                for _, mb in micro_batches(batch, minibatch, args.micro_batch_size, device):
                    with autocast():
                        logprobs, entropy = sequence_logprobs(
                            policy, mb["input_ids"], mb["mask"], temperature=args.temperature, entropy=True)
                    losses, ratio = ppo_loss(
                        logprobs, mb["logprobs"], mb["advantages"], mb["mask"], args.clip_coef)
                    (losses.sum() / step_tokens).backward()
                    terms = {"loss/policy": losses, "policy/entropy": entropy, "val/ratio": ratio,
                             "policy/clipfrac": losses > -mb["advantages"] * ratio,
                             "policy/approx_kl": kl_estimate(mb["logprobs"], logprobs, "k3")}
                    if critic:
                        with autocast():
                            values = values_of(mb)
                        losses, clipped = value_loss(
                            values, mb["values"], mb["returns"], mb["mask"], args.clip_coef_value)
                        (losses.sum() / step_tokens).backward()
                        terms |= {"loss/value": losses, "val/clipfrac": clipped}
                    for name, x in terms.items():
                        total = torch.where(mb["mask"], x.detach().double(), 0.0).sum()
                        sums[name] = sums.get(name, 0.0) + total
                    if num_steps == 0:  # before the first step only the sampler's arithmetic differs
                        off = torch.where(mb["mask"], logprobs.detach() - mb["logprobs"], 0.0)
                        gap = torch.cat([gap, off.abs().flatten()]).amax(0, keepdim=True)
                for name, model in models.items():
                    metrics[f"grad_norm/{name}"] = clip_gradients(model, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                num_steps += 1
        if args.target_kl:
            kl_coef = adapted_kl_coef(
                kl_coef, metrics["objective/kl"], args.target_kl, num_episodes, args.kl_horizon)

        # 3d. log, save
        batch_tokens = int(mask.sum())
        num_tokens += batch_tokens
        means = {name: x / (args.update_epochs * batch_tokens) for name, x in sums.items()}
        metrics = to_floats(means, metrics | {"policy/logprob_gap": over_ranks(gap, "MAX")})
        metrics |= {"learning_rate": optimizer.param_groups[0]["lr"],
                    "num_tokens": num_tokens, "episode": (update + 1) * num_episodes,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        run.log(update + 1, metrics)
        bar.set_postfix(score=f"{metrics['objective/scores']:.3f}", kl=f"{metrics['objective/kl']:.2f}")
        run.checkpoint(update + 1, num_tokens=num_tokens, kl_coef=kl_coef)

    # 4. evaluate, save, and show what has changed
    after, samples = evaluate(max(first, num_updates))
    run.finish(policy)
    run.show_change(after, samples, "objective/scores", "objective/kl", "policy/entropy")
    return {**metrics, **after}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
