"""The bug zoo: plants known bugs of RLHF code bases into a copy of this one and shows which test kills each.

    python tests/mutants.py [PART OF A NAME]      prints a line a mutant and exits 1 if one survives (about half an hour)

A test that has never failed proves nothing. Each entry: what is wrong, the file, the code, the wrong code, the tests.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# fmt: off
MUTANTS = [
    ("log-probs off by one position", "common.py", "source = mask.roll(-1, dims=1)", "source = mask.roll(-2, dims=1)", "test_logprobs"),
    ("logits rounded to bf16", "common.py", "    if bias is not None:\n        z += bias", "    z = z.bfloat16().to(z.dtype)\n    if bias is not None:\n        z += bias", "test_logprobs"),
    ("temperature ignored in scoring", "common.py", "return z if temperature == 1.0 else z.div_(temperature)", "return z", "test_logprobs test_sampling"),
    ("temperature missing in the gradient", "common.py", "slope = scale / temperature  #", "slope = scale  #", "test_logprobs"),
    ("soft cap's slope missing", "common.py", "slope = (1 - tanh.square_()).mul_(slope)", "slope = slope", "test_logprobs"),
    ("scale of the head ignored", "common.py", "    if scale != 1.0:\n        z *= scale", "", "test_logprobs"),
    ("entropy's gradient without the entropy", "common.py", "(logp + entropies[s, None])", "logp", "test_logprobs"),
    ("upstream gradient averaged, not per token", "common.py", "pull = g[s, None]", "pull = g.mean().expand_as(g)[s, None]", "test_logprobs"),
    ("gradient of the head's weight of the last chunk only", "common.py", "d_weight.addmm_(d.T, hidden[s].to(dtype))", "d_weight.copy_(d.T @ hidden[s].to(dtype))", "test_logprobs"),
    ("no check of the head", "common.py", "< 2e-3:", "< 2e9:", "test_logprobs"),
    ("KL the wrong way round", "common.py", "d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs", "test_statistics"),
    ("k3 by exp(d) - 1", "common.py", "torch.expm1(-d) + d", "(torch.exp(-d) - 1) + d", "test_statistics"),
    ("exact KL of ref from pi", "common.py", "(p.exp() * (p - q))", "(q.exp() * (q - p))", "test_statistics"),
    ("mask by multiplication", "common.py", "return torch.where(mask, x, 0.0).sum()", "return (x * mask).sum()", "test_statistics"),
    ("whitening lets padding in", "common.py", "    x = torch.where(mask, x, 0.0)\n    mean = masked_mean(x, mask)", "    mean = x.mean()", "test_statistics"),
    ("sampling ignores the temperature", "common.py", "temperature=temperature or 1.0)", "temperature=1.0)", "test_sampling"),
    ("left padding without position ids", "common.py", " position_ids=position,", "", "test_sampling"),
    ("left padding without attention mask", "common.py", "attention_mask=mask, ", "", "test_sampling"),
    ("top-k in the sampler", "common.py", "cdf = logp.double().exp()", "cdf = logp.where(logp >= logp.topk(5)[0][:, -1:], -1e9).double().exp()", "test_sampling"),
    ("only the first EOS id stops", "common.py", "stop = noise.to(device), torch.tensor(eos_ids, device", "stop = noise.to(device), torch.tensor(eos_ids[:1], device", "test_sampling"),
    ("every row has the same noise", "common.py", "noise[s, t, None]", "noise[:1, t, None]", "test_sampling"),
    ("tokens beyond the end", "common.py", "tokens[s, t] = token.where(alive, 0)", "tokens[s, t] = token", "test_sampling"),
    ("EOS is not appended", "common.py", "else piece + eos_ids[:1]", "else piece", "test_tokens"),
    ("EOS is doubled", "common.py", "while not chat and piece and piece[-1] in eos_ids", "while False", "test_tokens"),
    ("BOS twice in chats", "common.py", "if k == 0 and not chat:", "if k == 0:", "test_tokens"),
    ("BOS missing", "common.py", "piece = bos + piece", "piece = piece", "test_tokens"),
    ("a space before every part", "common.py", "piece[len(anchor) :] if piece[: len(anchor)] == anchor else bare(text)", "bare(text)", "test_tokens"),
    ("EOS cut by truncation", "common.py", "ids, trained = [*ids, eos], [*trained, True]", "pass", "test_tokens"),
    ("a conversation cut within a user's turn", "common.py", "if trained[i]), default=0)\n            if kept", "if any(trained[: i + 1])), default=0)\n            if kept", "test_tokens"),
    ("prompt in the loss", "common.py", "[train and (i < end or not end)", "[(i < end or not end)", "test_tokens"),
    ("the template's newline after EOS in the loss", "common.py", "[train and (i < end or not end)", "[train", "test_tokens"),
    ("only the last assistant turn trained", "common.py", "(after[len(before) :], True, True)]", "(after[len(before) :], i == len(messages) - 1, True)]", "test_tokens"),
    ("prompts on both sides of the split", "common.py", "held_out = set(list(dict.fromkeys(keys))[::20])", "keys = [str(i) for i in range(len(rows))]\n    held_out = set(keys[::20])", "test_tokens"),
    ("mask from token values", "sft.py", "    return input_ids.to(device), trained.to(device)", "    return input_ids.to(device), (trained & (input_ids != 2)).to(device)", "test_tokens test_losses"),
    ("loss averaged per micro-batch", "sft.py", "logprobs, 0.0).sum() / num_tokens", "logprobs, 0.0).sum() / trained.sum()", "test_losses"),
    ("mean of sequence means", "sft.py", "-torch.where(trained, logprobs, 0.0).sum() / num_tokens", "-(torch.where(trained, logprobs, 0.0).sum(1) / trained.sum(1)).mean()", "test_losses"),
    ("dropout left on", "sft.py", '"drop" in key and value', '"nothing" in key and value', "test_tokens"),
    ("weights stay in the checkpoint's dtype", "sft.py", "name, config=config, dtype=torch.float32,", 'name, config=config, dtype="auto",', "test_tokens"),
    ("chosen and rejected swapped", "dpo.py", "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards", "test_losses"),
    ("no reference", "dpo.py", "rejected_rewards = beta * (rejected_logps - ref_rejected_logps)", "rejected_rewards = beta * rejected_logps", "test_losses"),
    ("beta twice", "dpo.py", "F.logsigmoid(h) - (1 - p)", "F.logsigmoid(beta * h) - (1 - p)", "test_losses"),
    ("log of a sigmoid", "dpo.py", "-p * F.logsigmoid(h)", "-p * torch.log(torch.sigmoid(h))", "test_losses"),
    ("label smoothing ignored", "dpo.py", "p = mu * (1 - label_smoothing) + (1 - mu) * label_smoothing", "p = mu", "test_losses"),
    ("ties ignored", "dpo.py", "p = mu * (1 - label_smoothing)", "mu = torch.ones_like(mu)\n    p = mu * (1 - label_smoothing)", "test_losses"),
    ("IPO's target 1 / beta", "dpo.py", "1 / (2 * beta)", "1 / beta", "test_losses"),
    ("IPO on rewards, not log-ratios", "dpo.py", "margin, target = h / beta", "margin, target = h", "test_losses"),
    ("halves of the batch interleaved", "dpo.py", "rows = [chosen for chosen, *_ in pairs] + [rejected for _, rejected, _ in pairs]", "rows = [side for pair in pairs for side in pair[:2]]", "test_losses"),
    ("accuracy counts ties at the margin as errors", "dpo.py", "0.5 + (mu - 0.5) * margins.round(decimals=4).sign()", "torch.where(margins > 0, mu, 1 - mu)", "test_losses"),
    ("log-probs averaged over the completion", "dpo.py", "sequence_logprobs(model, input_ids, trained).sum(1).chunk(2)", "(sequence_logprobs(model, input_ids, trained).sum(1) / trained.sum(1)).chunk(2)", "test_losses"),
    ("the implicit prompt at a character", "common.py", "n = chosen.rfind(marker, 0, n) + len(marker) if marker in chosen[:n] else 0", "n = n", "test_tokens"),
    ("the last rows of an epoch dropped", "sft.py", "math.ceil(len(train) / args.batch_size)", "len(train) // args.batch_size", "test_contract"),
    ("a first update with learning rate 0", "sft.py", "(step + 1) / max(args.warmup_steps, 1)", "step / max(args.warmup_steps, 1)", "test_contract"),
    ("order drawn from the global state", "sft.py", "generator=torch.Generator().manual_seed(args.seed + 1000 * epoch)", "generator=None", "test_contract"),
    ("resume forgets the optimizer", "sft.py", 'optimizer.load_state_dict(state["optimizer"])', "pass", "test_contract"),
    ("resume logs twice", "common.py", "os.truncate(run / name, size)", "pass", "test_contract"),
    ("values read one position late", "ppo.py", "token_values(critic, input_ids).roll(1, dims=1)", "token_values(critic, input_ids)", "test_ppo"),
    ("score one position late", "ppo.py", "last = mask.sum(1, keepdim=True) - 1", "last = mask.sum(1, keepdim=True).clamp(max=mask.shape[1] - 1)", "test_ppo"),
    ("score at the batch's last position", "ppo.py", "last = mask.sum(1, keepdim=True) - 1", "last = torch.full_like(mask.sum(1, keepdim=True), mask.shape[1] - 1)", "test_ppo"),
    ("next value from the padding", "ppo.py", "rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)", "rewards = torch.where(mask, rewards, 0.0)", "test_ppo"),
    ("GAE decays by lambda alone", "ppo.py", "gamma * gae_lambda * following", "gae_lambda * following", "test_ppo"),
    ("advantages as returns", "ppo.py", "return advantages, advantages + values", "return advantages, advantages", "test_ppo"),
    ("min for max in the policy loss", "ppo.py", "return torch.max(-advantages * ratio,", "return torch.min(-advantages * ratio,", "test_ppo"),
    ("ratio masked behind exp", "ppo.py", "torch.where(mask, logprobs - old_logprobs, 0.0).exp()", "torch.where(mask, (logprobs - old_logprobs).exp(), 1.0)", "test_ppo"),
    ("ratio clipped on one side", "ppo.py", "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(max=1 + clip_coef)", "test_ppo"),
    ("min for max in the value loss", "ppo.py", "torch.max(losses, clipped) / 2", "torch.min(losses, clipped) / 2", "test_ppo"),
    ("values clipped around recomputed ones", "ppo.py", "value_loss(values, old_values[index], returns[index], m,", "value_loss(values, values.detach(), returns[index], m,", "test_ppo"),
    ("rounding counted as clipping of values", "ppo.py", "(values.clamp(old_values - eps, old_values + eps) - returns)", "(old_values + (values - old_values).clamp(-eps, eps) - returns)", "test_ppo"),
    ("old log-probs recomputed", "ppo.py", "ppo_loss(logprobs, old, advantage, m, args.clip_coef)", "ppo_loss(logprobs, logprobs.detach(), advantage, m, args.clip_coef)", "test_ppo"),
    ("KL penalty as a bonus", "ppo.py", '-kl_coef * kl_estimate(logprobs, ref_logprobs, "k1")', 'kl_coef * kl_estimate(logprobs, ref_logprobs, "k1")', "test_ppo"),
    ("k3 in the reward", "ppo.py", '-kl_coef * kl_estimate(logprobs, ref_logprobs, "k1")', '-kl_coef * kl_estimate(logprobs, ref_logprobs, "k3")', "test_ppo"),
    ("returns from whitened advantages", "ppo.py", "            advantages = masked_whiten(advantages, mask)", "            advantages = masked_whiten(advantages, mask)\n            returns = advantages + old_values", "test_ppo"),
    ("advantages whitened per micro-batch", "ppo.py", "old_logprobs[index], advantages[index]", "old_logprobs[index], masked_whiten(advantages[index], mask[index])", "test_ppo"),
    ("advantages of other rows", "ppo.py", "old_logprobs[index], advantages[index]", "old_logprobs[index], advantages[index.sort()[0]]", "test_ppo"),
    ("critic sees no prompt", "ppo.py", "input_ids, mask = collate(prompts, responses, critic.device)", "input_ids, mask = collate([x[-1:] for x in prompts], responses, critic.device)", "test_ppo"),
    ("temperature missing in the reference", "ppo.py", "response_logprobs(reference, batch, index, args, autocast)[0]", "response_logprobs(reference, batch, index, Args(), autocast)[0]", "test_ppo"),
    ("temperature missing in training", "ppo.py", "sequence_logprobs(model, input_ids, mask, temperature=args.temperature, entropy=True)", "sequence_logprobs(model, input_ids, mask, entropy=True)", "test_ppo"),
    ("EOS is no action", "ppo.py", "mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]\n    responses = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]\n", "responses = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]\n    lengths = torch.tensor([len(row) - (row[-1] in eos_ids and len(row) > 1) for row in responses])\n    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]\n", "test_ppo"),
    ("responses masked by token values", "ppo.py", "mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]", "mask = tokens != 0", "test_ppo"),
    ("missing-EOS penalty added", "ppo.py", "- args.missing_eos_penalty * ~finished", "+ args.missing_eos_penalty * ~finished", "test_ppo"),
    ("finished by the first EOS id alone", "ppo.py", "row[-1] in eos_ids for row in responses", "row[-1] == eos_ids[0] for row in responses", "test_ppo"),
    ("finished if shorter than the longest", "ppo.py", "row[-1] in eos_ids for row in responses", "len(row) < tokens.shape[1] for row in responses", "test_ppo"),
    ("policy loss averaged per micro-batch", "ppo.py", "args.clip_coef)\n                    (losses.sum() / tokens).backward()", "args.clip_coef)\n                    (losses.sum() / m.sum()).backward()", "test_ppo"),
    ("entropy of the sampled token", "ppo.py", '"policy/entropy": entropy,', '"policy/entropy": -logprobs,', "test_ppo"),
    ("clip fraction without the advantage's sign", "ppo.py", "losses > -advantage * ratio", "(ratio - 1).abs() > args.clip_coef", "test_ppo"),
    ("adaptive KL controller unclipped", "ppo.py", "min(max(kl / target_kl - 1, -0.2), 0.2)", "(kl / target_kl - 1)", "test_ppo"),
    ("KL controller fed the KL a token", "ppo.py", 'adapted_kl_coef(kl_coef, metrics["objective/kl"],', 'adapted_kl_coef(kl_coef, metrics["objective/kl"] / metrics["completions/mean_length"],', "test_ppo"),
    ("critic's head at random", "ppo.py", "torch.nn.init.zeros_(head.weight)", "torch.nn.init.normal_(head.weight, std=0.02)", "test_ppo"),
    ("score of the token before the EOS", "ppo.py", "token_values(model, input_ids)[mask] - shift", "token_values(model, input_ids)[mask.roll(-1, 1)] - shift", "test_ppo"),
    ("score not centred", "ppo.py", "token_values(model, input_ids)[mask] - shift", "token_values(model, input_ids)[mask]", "test_ppo"),
    ("a second EOS is scored", "ppo.py", "(y[:-1] if y[-1] in eos_ids else y)", "y", "test_ppo"),
    ("dropout left on in the critic", "ppo.py", 'config = copy.deepcopy(source.config)\n    config.update({key: 0.0 for key, value in vars(config).items() if "drop" in key and value})', "config = copy.deepcopy(source.config)", "test_ppo"),
    ("prompt takes the completion's first token", "ppo.py", "ids[: trained.index(True)]", "ids[: trained.index(True) + 1]", "test_ppo"),
    ("reference is the policy", "ppo.py", "reference.eval().requires_grad_(False)", "reference = policy", "test_ppo"),
    ("an empty prompt is made up", "ppo.py", '"completion": "" if isinstance', '"completion": "." if isinstance', "test_ppo"),
    ("rewards swapped", "reward_model.py", "margins = first_rewards - second_rewards", "margins = second_rewards - first_rewards", "test_reward"),
    ("log of a sigmoid in the reward loss", "reward_model.py", "return -mu * F.logsigmoid(margins)", "return -mu * torch.log(torch.sigmoid(margins))", "test_reward"),
    ("soft labels ignored in the reward loss", "reward_model.py", "return -mu * F.logsigmoid(margins) - (1 - mu) * F.logsigmoid(-margins)", "return -F.logsigmoid(margins)", "test_reward"),
    ("Plackett-Luce: the tied are left all at once", "reward_model.py", "for size in range(1, len(tied) + 1):", "for size in range(len(tied), len(tied) + 1):", "test_reward"),
    ("Plackett-Luce: worst first", "reward_model.py", "if other > place]", "if other < place]", "test_reward"),
    ("Plackett-Luce for pairs, without their votes", "reward_model.py", "if len(own) > 2 else loss", "if own.dim() else loss", "test_reward"),
    ("confidence below a half", "reward_model.py", "confidence, votes = torch.sigmoid(margins.abs())", "confidence, votes = torch.sigmoid(margins)", "test_reward"),
    ("calibration error not weighted", "reward_model.py", "sum(n * abs(expected - seen) for n, expected, seen in table) / len(margins)", "sum(abs(expected - seen) for n, expected, seen in table) / len(table)", "test_reward"),
    ("a tie counts as a win", "reward_model.py", 'row["mu"] if ranking[i] < ranking[j] else 0.5', 'row["mu"]', "test_reward"),
    ("votes of a pair ignored", "reward_model.py", 'row["mu"] if ranking', "1.0 if ranking", "test_reward"),
    ("rankings read worst first", "reward_model.py", "key=ranking.__getitem__)", "key=lambda i: -ranking[i])", "test_reward"),
    ("score read before the EOS", "reward_model.py", "last = torch.tensor([len(ids) - 1 for ids in rows])", "last = torch.tensor([len(ids) - 2 for ids in rows])", "test_reward"),
    ("score read at the first EOS", "reward_model.py", "last = torch.tensor([len(ids) - 1 for ids in rows])", "last = torch.tensor([ids.index(rows[0][-1]) for ids in rows])", "test_reward"),
    ("score read at the end of the padding", "reward_model.py", "last = torch.tensor([len(ids) - 1 for ids in rows])", "last = torch.tensor([T - 1 for ids in rows])", "test_reward"),
    ("comparisons of three mixed up", "reward_model.py", "start += len(completions)", "start += 2", "test_reward"),
    ("a ranking of four weighs six pairs", "reward_model.py", ".index_add(0, owner, x) / owner.bincount()", ".index_add(0, owner, x)", "test_reward"),
    ("reward loss averaged per micro-batch", "reward_model.py", "(losses.sum() / len(batch)).backward()", "losses.mean().backward()", "test_reward"),
    ("rounding noise is a preference", "reward_model.py", "margins = (chosen - rejected).round(decimals=5)", "margins = chosen - rejected", "test_reward"),
    ("a standard error called a 95 % interval", "reward_model.py", "= 1.96 * deviation", "= deviation", "test_reward"),
    ("ceiling of the chosen side only", "reward_model.py", "max(p, 1 - p)", "p", "test_reward"),
    ("dropout left on in the reward model", "reward_model.py", '"drop" in key and value', '"nothing" in key and value', "test_reward"),
    ("two labels", "reward_model.py", "from_pretrained(name, num_labels=1)", "from_pretrained(name, num_labels=2)", "test_reward"),
    ("a trained head replaced", "reward_model.py", "    if missing:\n        torch.nn.init", "    if info:\n        torch.nn.init", "test_reward"),
    ("new head not seeded", "reward_model.py", "    torch.manual_seed(args.seed)\n", "", "test_reward"),
    ("a random head scores", "reward_model.py", " or (missing and args.score)", "", "test_reward"),
    ("pad token that is an EOS kept", "reward_model.py", "if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos_ids:", "if tokenizer.pad_token_id is None:", "test_reward"),
    ("settings put into a config that the model does not have", "reward_model.py", "model.config.update({", "config.update({", "test_reward"),
    ("pipelines squash the score", "reward_model.py", 'model.config.problem_type = "regression"', 'config.problem_type = "regression"', "test_reward"),
    ("--score forgets the mean", "reward_model.py", '"reward": score - mean}', '"reward": score}', "test_reward"),
    ("a value off by one position", "common.py", "return head(hidden.to(head.weight.dtype)).squeeze(-1)", "return head(hidden.to(head.weight.dtype)).squeeze(-1).roll(1, dims=1)", "test_reward"),
    ("no check of the evaluation", "ppo.py", 'if not math.isfinite(after["eval/objective/rlhf_reward"]):', "if False:", "test_contract"),
    ("NaN rewards pass", "ppo.py", " or not all(map(math.isfinite, scores)):", ":", "test_contract"),
    ("number of rewards unchecked", "ppo.py", "if len(scores) != len(rows) or", "if", "test_contract"),
    ("a random reward head", "ppo.py", 'if info["missing_keys"] or model.config', "if model.config", "test_contract"),
    ("long prompts dropped in silence", "ppo.py", "if len(kept) < len(prompts):", "if False:", "test_contract"),
    ("uneven episodes unchecked", "ppo.py", "if args.total_episodes % episodes:", "if False:", "test_contract"),
    ("pickled reward models", "ppo.py", "spec, dtype=torch.float32, use_safetensors=True, output", "spec, dtype=torch.float32, output", "test_contract"),
    ("critic trains with the policy's gradients left", "ppo.py", "optimizer.zero_grad(set_to_none=True)", "policy.zero_grad()", "test_contract"),
    ("a start without layers (reward model)", "reward_model.py", 'missing - {"score.weight"}', "False", "test_contract"),
    ("rankings of floats (reward model)", "reward_model.py", "[type(r) for r in ranking] != [int] * len(texts)", "len(ranking) != len(texts)", "test_contract"),
    ("no check of the loss (reward model)", "reward_model.py", 'if not math.isfinite(metrics["loss"] + grad_norm):', "if False:", "test_contract"),
    ("warm-up from 0 (reward model)", "reward_model.py", "(step + 1) / max(args.warmup_steps, 1)", "step / max(args.warmup_steps, 1)", "test_contract"),
    ("no check of gradients and weights", "ppo.py", "if not math.isfinite(sum(norms.values()) + sum(sizes)):", "if False:", "test_contract"),
    ("reward model unchecked", "ppo.py", '(("--model", policy), (f"--reward {args.reward}", reward_model))', '(("--model", policy),)', "test_contract"),
    ("a ranking by default (reward model)", "reward_model.py", 'row["completions"], row.get("ranking")', 'row["completions"], row.setdefault("ranking", [1, 2])', "test_contract"),
]
# fmt: on


def main() -> int:
    survivors, wanted = 0, sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if wanted in mutant[0]]
    for what, file, code, wrong, tests in chosen:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", ".venv"))
            source = (copy / file).read_text()
            if code not in source:
                print(f"STALE     {what}: {file} no longer holds {code!r}")
                survivors += 1
                continue
            (copy / file).write_text(source.replace(code, wrong))
            names = [f"tests/{name}.py" for name in tests.split()]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *names]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            killer = next((line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
            survivors += not killer
            print(f"{'killed   ' if killer else 'SURVIVED '} {what}: {killer[:100] or tests}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
