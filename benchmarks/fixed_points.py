"""Where does GRPO end? The policy at which each KL term stops learning, and what it loses against pi*.

    python benchmarks/fixed_points.py

J(pi) = E[r(y)] - beta KL(pi || pi_ref) is maximal at pi* = pi_ref exp(r / beta) / Z. On problems so small
that every response can be written down, this script takes the loss of grpo.py in expectation over all of
them, in float64 and without a sample, follows its gradient to the point where it is 0, and compares that
point with pi* and with the one that theory predicts for the term. Rewards and pi_ref are random; policies are
tables with a logit for each next token behind each prefix. With s a prefix and Q(s, a) the mean reward behind
it and the token a, under the policy itself:

    k1 in the reward                       pi* = pi_ref exp(r / beta) / Z
    k2 in the loss, of responses           pi*
    k2 in the loss, of tokens              pi(a | s) = pi_ref(a | s) exp(Q(s, a) / beta) / Z(s)
    k3 in the loss, of responses           pi(y) = beta pi_ref(y) / (lambda - r(y))
    k3 in the loss, of tokens (GRPO)       pi(a | s) = beta pi_ref(a | s) / (lambda(s) - Q(s, a))
    k1 in the loss                         none: its mean gradient is 0, and the best response takes all

lambda makes probabilities sum to 1. Of tokens means that each has its own KL in the loss. Then Q holds no KL
of the later tokens, as the values behind pi* do: a token does not answer for it. Q depends on later tokens
only, so these fixed points follow backwards from the last token. With a single token the two levels are one.

k3 times the ratio pi / pi_old in the loss, TRL 1.16's default, has on each sample of pi the gradient of k2,
and so its fixed points. Division by a group's std, clipping and a moving pi_old would move all of them.

The table: the largest |log pi - log pi*| of a response; beta KL(pi || pi*) and J(pi*) - J(pi), in units of
the reward and equal by an identity; the latter's share of J(pi*) - J(pi_ref), here and over --instances
random problems: mean (least, largest); the largest |log pi - log prediction|; the norm of the gradient.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bandit_bt import forward_kl_optimum, optimum  # noqa: E402
from common import kl_estimate  # noqa: E402
from grpo import grpo_loss, token_weights  # noqa: E402

PROBLEMS = {"one token, 16 responses": (16, 1), "three tokens of 4, 64 responses": (4, 3)}  # name: (V, T)
ROWS = [("reward", "k1", "token"), ("reward", "k1", "sequence"), ("loss", "k2", "token"),
        ("loss", "k2", "sequence"), ("loss", "k3", "token"), ("loss", "k3", "sequence"),
        ("loss", "k1", "token")]  # --kl-in, --kl-estimator, --importance-sampling-level


@dataclass
class Args:
    beta: float = 0.5  # KL penalty; the rewards' standard deviation is 1
    seed: int = 1  # of the problems in the table
    instances: int = 10  # problems, with seeds from there on, over which the share lost is averaged
    output: str = "benchmarks/results/fixed_points.json"  # the table as JSON; empty: not written


def random_problem(V: int, T: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards of all V ** T responses, logits of pi_ref), standard normal."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(V ** (t + 1) for t in range(T))
    return tuple(torch.randn(n, generator=generator, dtype=torch.float64) for n in (V**T, size))


def table_logprobs(logits: torch.Tensor, V: int, T: int) -> torch.Tensor:
    """log pi of each token of every response, these in lexical order: (V ** T, T)."""
    tables = logits.split([V ** (t + 1) for t in range(T)])  # a row of V logits for each of V ** t prefixes
    steps = [torch.log_softmax(x.view(-1, V), -1).flatten() for x in tables]
    return torch.stack([x.repeat_interleave(V ** (T - 1 - t)) for t, x in enumerate(steps)], dim=1)


def expected_loss(logits, old_logits, ref_logits, rewards, V, T, beta, kl_in, estimator, level):
    """E over y ~ pi_old of grpo.py's loss of y, whose gradient in the first argument is the training step.

    What main() of grpo.py does to a batch, but with every response in it, once, and weighted by pi_old. The
    group's mean is the exact one, and nothing is divided by a standard deviation.
    """
    logprobs, old, ref = (table_logprobs(x, V, T) for x in (logits, old_logits, ref_logits))
    p = old.sum(1).exp()  # (V ** T,)
    if kl_in == "reward":
        rewards = rewards - beta * kl_estimate(old, ref, estimator).sum(1)
    advantages = rewards - (p * rewards).sum()
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    losses, _ = grpo_loss(logprobs, old, ref, advantages, mask, beta if kl_in == "loss" else 0.0, estimator,
                          importance_sampling_level=level)
    weights = len(mask) * token_weights(mask, "grpo", T)  # 1 / |y|: a constant here, with equal lengths
    return (p[:, None] * weights * losses).sum()


def fixed_point(gradient, logits: torch.Tensor, V: int, T: int) -> tuple[torch.Tensor, float, int]:
    """(logits where the gradient is 0, its norm there, steps): implicit steps along the natural gradient, a
    logit's over the probability of its prefix and token: x - (Jacobian + 1 / dt)^-1 natural(x). That is
    gradient descent with a small dt, and Newton's method with the large dt that these end with.
    """

    def natural(x):
        beginnings = table_logprobs(x, V, T).cumsum(1)  # each is shared by V ** (T - 1 - t) responses
        return gradient(x) / torch.cat([beginnings[:: V ** (T - 1 - t), t] for t in range(T)]).exp()

    jacobian, identity, dt = torch.func.jacrev(natural), torch.eye(len(logits), dtype=logits.dtype), 0.5
    steps = 0
    while steps < 100 and (field := natural(logits)).abs().max() > 1e-12:
        logits = logits - torch.linalg.solve(jacobian(logits) + identity / dt, field)
        dt = min(1.5 * dt, 1e6)  # the Jacobian alone is singular: the logits behind a prefix may be shifted
        steps += 1
    return logits, gradient(logits).norm().item(), steps


def predicted(ref_logits, rewards, V, T, beta, kl_in, estimator, level) -> torch.Tensor | None:
    """log pi of every response at the fixed point that theory gives: (V ** T,). None for k1 in the loss."""
    policy = forward_kl_optimum if estimator == "k3" else optimum
    ref = table_logprobs(ref_logits, V, T)
    if (kl_in, estimator) == ("loss", "k1"):
        return None
    if kl_in == "reward" or level == "sequence":
        return policy(rewards, ref.sum(1), beta)
    tables, values, result = ref_logits.split([V ** (t + 1) for t in range(T)]), rewards, 0.0
    for t in reversed(range(T)):  # values: Q(s, a), first behind the last token
        logp = policy(values.view(-1, V), torch.log_softmax(tables[t].view(-1, V), -1), beta)  # (V ** t, V)
        values = (logp.exp() * values.view(-1, V)).sum(-1)  # (V ** t,)
        result = result + logp.flatten().repeat_interleave(V ** (T - 1 - t))
    return result


def measure(V: int, T: int, seed: int, beta: float, row: tuple[str, str, str]) -> dict:
    """The fixed point of one row of the table, beside pi* and the prediction."""
    rewards, ref_logits = random_problem(V, T, seed)
    ref = table_logprobs(ref_logits, V, T).sum(1)
    best = optimum(rewards, ref, beta)
    J = lambda logp: (logp.exp() * (rewards - beta * (logp - ref))).sum().item()
    prediction = predicted(ref_logits, rewards, V, T, beta, *row)
    field = torch.func.grad(expected_loss)
    result = {"kl_in": row[0], "estimator": row[1], "level": row[2], "J_optimal": J(best), "J_ref": J(ref)}
    if prediction is None:  # the gradient with the term and without, away from pi_ref, and the policy's limit
        probe = ref_logits.flip(0)
        with_term, without = (field(probe, probe, ref_logits, rewards, V, T, x, *row) for x in (beta, 0.0))
        top = rewards.argmax()
        result |= {"kl_gradient": (with_term - without).norm().item(), "gradient_norm": without.norm().item(),
                   "distance_to_optimal": float("inf"), "beta_kl": -beta * best[top].item(),
                   "J_lost": J(best) - (rewards[top] + beta * ref[top]).item()}
    else:
        gradient = lambda x: field(x, x, ref_logits, rewards, V, T, beta, *row)
        logits, norm, steps = fixed_point(gradient, ref_logits, V, T)
        logp = table_logprobs(logits, V, T).sum(1)
        result |= {"distance_to_optimal": (logp - best).abs().max().item(),
                   "beta_kl": beta * (logp.exp() * (logp - best)).sum().item(), "J_lost": J(best) - J(logp),
                   "distance_to_prediction": (logp - prediction).abs().max().item(), "gradient_norm": norm,
                   "steps": steps}
    result["share_lost"] = result["J_lost"] / (J(best) - J(ref))
    return result


def main(args: Args) -> dict:
    torch.set_num_threads(1)
    results = {"args": asdict(args), "problems": {}}
    percent, flat = lambda x: f"{round(x, 6) + 0.0:.1%}", lambda x: f"{round(x, 6) + 0.0:.6f}"  # no -0.0
    for name, (V, T) in PROBLEMS.items():
        print(f"{name}, beta {args.beta:g}\n{'':28}{'to pi*':>7}{'beta KL':>10}{'J* - J':>10}{'lost':>8}"
              f"{f'lost, {args.instances} problems':>24}{'to prediction':>14}{'gradient':>9}")
        table = results["problems"][name] = []
        for row in ROWS if T > 1 else [row for row in ROWS if row[2] == "token"]:
            result, *others = (measure(V, T, args.seed + i, args.beta, row) for i in range(args.instances))
            shares = result["share_lost_all"] = [x["share_lost"] for x in (result, *others)]
            table.append(result)
            label = f"{row[1]} in the {row[0]}" + f", {row[2].replace('sequence', 'response')}s" * (T > 1)
            spread = f"{percent(sum(shares) / len(shares))} ({percent(min(shares))}, {percent(max(shares))})"
            to = f"{result['distance_to_prediction']:.0e}" if "distance_to_prediction" in result else "none"
            print(f"{label:28}{result['distance_to_optimal']:7.0e}{flat(result['beta_kl']):>10}"
                  f"{flat(result['J_lost']):>10}{percent(shares[0]):>8}{spread:>24}{to:>14}"
                  f"{result['gradient_norm']:9.0e}")
        print()
    rows = [row for table in results["problems"].values() for row in table]
    identity = max(abs(row["beta_kl"] - row["J_lost"]) for row in rows)
    nothing = max(row.get("kl_gradient", 0.0) for row in rows)
    print(f"J(pi*) - J(pi) = beta KL(pi || pi*) holds to {identity:.0e} in every row.\nk1 in the loss has a "
          f"mean gradient of {nothing:.0e}, so it penalizes nothing and the best response takes all:\n"
          "its rows show that limit, and the gradient of the reward on the way there.")
    results |= {"identity_error": identity, "k1_in_loss_gradient": nothing}
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1).replace("Infinity", "null") + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
