"""How close is a policy to the exact optimum of the KL-regularized objective, at its own KL?

    python benchmarks/frontier.py --reference runs/sft/model --policies runs/dpo/model
    python benchmarks/frontier.py --policies runs/ppo/model --rewards runs/reward_model/model
        data/gold_reward.py:gold_reward

J(pi) = E[r(x, y)] - beta KL(pi || pi_ref) is maximal at pi* = pi_ref exp(r / beta) / Z (Sec. 4 of
arXiv:2305.18290). Where r is known and pi_ref can be sampled at will, the reward and the KL of pi* follow for
every beta from samples of pi_ref with weights exp(r / beta), normalized per prompt: the frontier that no
policy can be above. A policy is judged by

    fraction = (reward - reward of pi_ref) / (frontier at the policy's KL - reward of pi_ref)

The KL of a policy is the sum over its samples' tokens of the exact KL over the vocabulary, which has the same
mean as the sampled log-ratio and less noise. Rewards and KL are measured on held-out prompts at temperature
1; +- is one standard error, by the policy's samples, its KL's and the frontier's own. The effective sample
size (ESS) says how far a row can be trusted: below about 50 a prompt it is biased low. Each of several
rewards, a reward model's folder or file.py:function, has its own frontier: a policy trained on a learned
reward is judged by that one and by the gold reward.
"""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (  # noqa: E402
    _logits, head_of, load_model, load_reward, per_token, read_rows, responses_of, sample)


@dataclass
class Args:
    reference: str = "runs/sft/model"  # folder of pi_ref
    policies: list[str] = field(default_factory=lambda: ["runs/dpo/model"])  # folders to judge
    dataset: str = "data/prompts_test.jsonl"  # held-out prompts
    rewards: list[str] = field(default_factory=lambda: ["data/gold_reward.py:gold_reward"])  # or folders
    reference_samples: int = 4000  # a prompt, for the frontier
    policy_samples: int = 300  # a prompt
    max_new_tokens: int = 40  # longest sample
    betas: list[float] = field(default_factory=lambda: [3.0, 2.0, 1.0, 0.7, 0.5, 0.4, 0.3])  # table
    seed: int = 1  # of the samples
    output: str = ""  # also write the table here, as JSON


def tilted(rewards: torch.Tensor, beta: float) -> tuple[float, float, float]:
    """(E*[r], KL(pi* || pi_ref) in nats, ESS) of pi* = pi_ref exp(r / beta) / Z, the mean over prompts.

    rewards: (prompts, samples of pi_ref), float64. KL = E*[r] / beta - log Z with both estimated from the
    samples.
    """
    log_w = torch.log_softmax(rewards / beta, dim=1)
    w = log_w.exp()
    reward = (w * rewards).sum(1)
    kl = (w * log_w).sum(1) + math.log(rewards.shape[1])
    return reward.mean().item(), kl.mean().item(), (1 / w.square().sum(1)).mean().item()


def frontier_at(rewards: torch.Tensor, kl: float) -> tuple[float, float, float]:
    """(the largest reward at this KL, its ESS, its beta), by bisection, since the KL falls with beta."""
    low, high = 1e-3, 1e4
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tilted(rewards, middle)[1] > kl else (low, middle)
    best, _, ess = tilted(rewards, high)
    return best, ess, high


@torch.no_grad()
def exact_kl(hidden, head: dict, ref_hidden, ref_head: dict, temperature=1.0, rows=512):
    """KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v)) of each position, over the whole vocabulary: (N,),
    nats, in fp32 whatever the weights are.

    Args: hidden (N, H) and ref_hidden (N, H') with their heads from `head_of`; rows, how many at a time. No
    gradient: a metric, or a test.
    """
    result = []
    with torch.autocast(hidden.device.type, enabled=False):
        for h, ref_h in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
            logp = torch.log_softmax(_logits(h, **head, temperature=temperature), -1)  # (rows, V)
            ref_logp = torch.log_softmax(_logits(ref_h, **ref_head, temperature=temperature), -1)
            terms = logp.exp() * (logp - ref_logp)
            result.append(terms.nan_to_num(0.0).sum(-1))  # a forbidden token, of probability 0, adds nothing
    return torch.cat(result)


def standard_error(x: torch.Tensor) -> float:
    """Of the mean of samples (prompts, n), n for each prompt: the prompts' own levels are no noise."""
    return (x.var(1).mean() / x.numel()).sqrt().item()


def frontier_error(rewards: torch.Tensor, kl: float, parts: int = 8) -> float:
    """Standard error of `frontier_at` by the samples of pi_ref: the spread over parts of them."""
    bests = [frontier_at(part, kl)[0] for part in rewards.chunk(parts, dim=1)]
    return torch.tensor(bests).std().item() / math.sqrt(parts)


def kl_to(policy, reference, batch: dict, size: int, skip: int = 0) -> torch.Tensor:
    """KL(pi || pi_ref) along each response of a batch: the exact KL at each token, summed: (B,), nats.

    The first `skip` tokens of each prompt are the policy's alone: pi_ref does not see them.
    """

    def exact(mb):
        ids, source = mb["input_ids"], mb["mask"].roll(-1, dims=1)  # position t - 1 predicts token t
        hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[source]  # (N, H)
        ref_ids, ref_source = ids[:, skip:], source[:, skip:]
        ref_hidden = reference.base_model(input_ids=ref_ids, use_cache=False).last_hidden_state[ref_source]
        kl = exact_kl(hidden, head_of(policy), ref_hidden, head_of(reference))  # (N,)
        return torch.zeros_like(mb["logprobs"]).masked_scatter(mb["mask"], kl)  # (b, t)

    return per_token(exact, batch, size, policy.device).sum(1)


def win_rate(values, weights, ref_values):
    """Mean over prompts of E[sigma(r_a - r_b)]: values (prompts, n) of a with weights, (prompts, n) too,
    which sum to 1, and ref_values (prompts, N) of b.
    """
    rates = []
    for v, w, ref in zip(values, weights, ref_values):
        wins = torch.sigmoid(v[:, None] - ref).mean(1)  # (n,)
        rates.append((w * wins).sum())
    return torch.stack(rates).mean().item()


def main(args: Args) -> dict:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    options = SimpleNamespace(micro_batch_size=1000, seed=args.seed, gradient_checkpointing=False)

    reference, tokenizer, eos_ids = load_model(args.reference, options, device, "--reference")
    rows = read_rows(args.dataset)
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    rewards = {}
    for spec in args.rewards:
        rewards[spec], *_ = load_reward(spec, tokenizer, eos_ids, options, device, contextlib.nullcontext)

    def draw(model, number, seed):
        """({spec: rewards (prompts, number)}, batch), prompt-major."""
        prompts = [row for row in ids for _ in range(number)]
        batch = sample(model, prompts, args.max_new_tokens, eos_ids, seed=seed, batch_size=1000)
        responses = responses_of(batch)
        repeated = [row for row in rows for _ in range(number)]
        values = {spec: reward(repeated, prompts, responses) for spec, reward in rewards.items()}
        return {spec: x.double().view(len(ids), number) for spec, x in values.items()}, batch

    print(f"sampling {args.reference_samples} responses to each of {len(ids)} prompts: 30 s", flush=True)
    ref_rewards, _ = draw(reference, args.reference_samples, args.seed)
    results = {spec: {"frontier": [], "policies": {}} for spec in args.rewards}
    for spec, result in results.items():
        result["reference_reward"] = ref_rewards[spec].mean().item()
        print(f"{spec}: reward of pi_ref = {args.reference} {result['reference_reward']:.3f} on {len(ids)} "
              f"held-out prompts, {args.reference_samples} samples each\n"
              "The optimum at each beta, pi_ref exp(r / beta) / Z: its reward E*[r], its KL to pi_ref, and\n"
              "the effective number of samples behind both (ESS; below 50 they are too low)\n"
              "  beta   E*[r]      KL  ESS/prompt")
        for beta in args.betas:
            row = tilted(ref_rewards[spec], beta)
            result["frontier"].append([beta, *row])
            print(f"{beta:6.2f} {row[0]:7.3f} {row[1]:7.3f} {row[2]:11.0f}")
    for folder in args.policies:
        policy, *_ = load_model(folder, options, device, "--policies")
        values, batch = draw(policy, args.policy_samples, args.seed + 1)
        kls = kl_to(policy, reference, batch, options.micro_batch_size).double().view(len(ids), -1)
        kl, length = kls.mean().item(), batch["mask"].sum(1).double().mean().item()
        kl_se = standard_error(kls)
        print(f"{folder}: KL {kl:.3f} +- {kl_se:.3f} nats, {length:.1f} tokens")
        for spec, result in results.items():
            mean, start = values[spec].mean().item(), result["reference_reward"]
            best, ess, beta = frontier_at(ref_rewards[spec], kl)
            reward_se = standard_error(values[spec])
            fraction = error = None
            shown = "at its reference: no fraction"
            if kl > 3 * kl_se and best > start:
                fraction = (mean - start) / (best - start)
                of_kl = beta * kl_se  # the frontier's slope is beta
                of_best = frontier_error(ref_rewards[spec], kl)
                error = math.hypot(reward_se, fraction * of_kl, fraction * of_best) / (best - start)
                shown = (f"fraction of the exact optimum {fraction:.3f} +- {error:.3f} "
                         "(1: none is better, 0: pi_ref)")
            result["policies"][folder] = {
                "reward": mean, "reward_se": reward_se, "kl": kl, "kl_se": kl_se, "frontier": best,
                "ess": ess, "frontier_beta": beta, "fraction": fraction, "fraction_se": error,
                "mean_length": length}
            print(f"  {spec}: {mean:.3f} +- {reward_se:.3f}; the optimum there has {best:.3f} (beta "
                  f"{beta:.2f}, ESS {ess:.0f}): {shown}")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
