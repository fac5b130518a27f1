"""Proximal policy optimization: a critic, and the KL penalty inside the reward. Step 3 of RLHF.

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
4. Means are over all tokens of an optimizer step, of all its micro-batches.
5. --target-kl adapts beta (Sec. 2.2 of arXiv:1909.08593).

REINFORCE (Williams 1992) is the case of one step a rollout and no critic:
    python ppo.py --critic none --num-minibatches 1 --update-epochs 1 --gae-lambda 1
One CPU core, the embedded world, 30 s:  python ppo.py
One CUDA GPU, a real model and data:     python ppo.py --model runs/my-sft/model --reward runs/my-rm/model
    --dataset my_prompts.jsonl --learning-rate 1e-6 --critic-learning-rate 1e-5 --kl-coef 0.05
    --batch-size 128 --num-minibatches 4 --micro-batch-size 8 --total-episodes 102400 --max-new-tokens 256
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
    check_flags, check_model, encode, fail, kl_estimate, make_logger, masked_mean, masked_whiten, open_run,
    sample, save_checkpoint, sequence_logprobs, split_rows, token_values)


@dataclass
class Args:
    model: str = "runs/sft/model"  # folder or Hub id: start and reference; sft.py makes the default one
    reward: str = "runs/reward_model/model"  # reward model's folder, or file.py:function (see the README)
    critic: Literal["reward", "policy", "none"] = "reward"  # starts as the reward model, if any, or policy
    dataset: str = "data/prompts.jsonl"  # file or Hub id: prompt; further columns reach a reward function
    eval_dataset: str = ""  # held-out rows; empty: the data set's own test file, else one prompt in twenty
    output_dir: str = "runs/ppo"  # args.json, metrics and samples.jsonl, model/, critic/, for a time state/
    resume: bool = False  # continue the interrupted run in output_dir, to the end it would have had
    seed: int = 1  # of the prompts' order and the samples
    total_episodes: int = 9600  # responses sampled in all
    batch_size: int = 64  # responses an optimizer step
    num_minibatches: int = 2  # optimizer steps a pass over an update's batch_size * num_minibatches responses
    update_epochs: int = 2  # passes over them (1 to 4)
    micro_batch_size: int = 64  # responses scored or trained at once: less memory if lower, the same gradient
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    max_new_tokens: int = 40  # longest response, in tokens
    temperature: float = 1.0  # of sampling, and of all log-probs
    learning_rate: float = 5e-4  # peak of the policy's AdamW (1e-6 to 3e-6 with a pretrained model)
    critic_learning_rate: float = 1e-3  # peak of the critic's (5e-6 to 1e-5 with a pretrained model)
    anneal_lr: bool = True  # decay both linearly to 0
    max_grad_norm: float = 1.0  # clip the norm of each one's gradient here
    kl_coef: float = 0.3  # beta, the KL penalty in reward per nat (0.01 to 0.2 with a pretrained model)
    target_kl: float = 0.0  # adapt kl_coef to reach this KL a response, in nats (0: keep it)
    kl_horizon: int = 10000  # responses over which it adapts; it moves by at most 20 % in so many
    gamma: float = 1.0  # discount of later rewards
    gae_lambda: float = 0.95  # 1: Monte-Carlo returns less the critic's values; 0: one-step differences
    clip_coef: float = 0.2  # how far the ratio of policies may move, epsilon (0.1 to 0.3)
    clip_coef_value: float = 0.2  # how far a value may move in an update, in units of the reward (0: free)
    norm_adv: bool = True  # whiten the advantages over all tokens of an update
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response without EOS
    eval_every: int = 10  # updates between evaluations with samples (0: only before and after)
    eval_samples: int = 128  # responses to held-out prompts at each evaluation
    save_every: int = 20  # updates between checkpoints to resume from (0: only on Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products, not weights; auto: bf16 on CUDA
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "rlhf"  # its project there


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """R_t = -beta (log pi(y_t) - log pi_ref(y_t)), plus the score at the last token: Eq. 2, arXiv:1909.08593.

    The k1 estimate of the KL, in the reward: with returns to go its gradient is that of KL(pi || pi_ref).

    Args: scores (B,); log-probs in nats and mask (B, R), each row's real tokens first, at least one.
    Returns: (B, R) in units of the reward, 0 behind the last token.
    """
    rewards = torch.where(mask, -kl_coef * kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1): the EOS, or the last token of a response without one
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards, values, mask, gamma, gae_lambda):
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t: Eq. 16 of arXiv:1506.02438.

    Behind a row's last token there is nothing: V = 0 and A = 0 there, whatever the padding holds.

    Args: rewards, values and mask (B, R), V_t being the value before token t is chosen.
    Returns: advantages and returns A_t + V_t: (B, R) each, 0 where mask is False.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_values = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        following = rewards[:, t] + gamma * next_values - values[:, t] + gamma * gae_lambda * following
        following = torch.where(mask[:, t], following, 0.0)
        advantages[:, t] = following
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, advantages, mask, clip_coef):
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log pi - log pi_old): Eq. 7 of arXiv:1707.06347.

    Args: (B, R) each; only logprobs carries a gradient. Returns: losses, 0 where mask is False, and the ratio
    rho, 1 there: (B, R) each. At rho = 1 the gradient is that of REINFORCE, -A grad log pi.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # masked before exp: no overflow, no NaN
    advantages = torch.where(mask, advantages, 0.0)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)), ratio


def value_loss(values, old_values, returns, mask, clip_coef_value):
    """1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), without the clip if eps = 0.

    From the code of arXiv:1707.06347; old_values are those the returns G were made with. Args: (B, R) each.
    Returns: losses, 0 where mask is False, and whether the clip decides: (B, R) each.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    losses, eps = (values - returns).square(), clip_coef_value or math.inf
    clipped = (values.clamp(old_values - eps, old_values + eps) - returns).square()
    return torch.max(losses, clipped) / 2, clipped > losses


def adapted_kl_coef(kl_coef, kl, target_kl, episodes, kl_horizon):
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): Sec. 2.2 of arXiv:1909.08593.

    Args: kl, the mean of an update's n episodes, in nats a response, as is target_kl.
    """
    return kl_coef * (1 + min(max(kl / target_kl - 1, -0.2), 0.2) * episodes / kl_horizon)


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


def response_values(critic, batch, index, autocast):
    """V before each token of these responses, read at the token before it: (b, R), units of the reward."""
    prompts, responses = ([batch[key][j] for j in index] for key in ("prompts", "responses"))
    input_ids, mask = collate(prompts, responses, critic.device)
    with autocast():
        return align(token_values(critic, input_ids).roll(1, dims=1), mask, batch["mask"].shape[1])


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


def load_critic(args, policy, reward_model, device):
    """A copy of the reward model, whose value at a response's EOS is the reward, or of the policy with a head
    of zeros; None for --critic none.
    """
    if args.critic == "none":
        return None
    source = reward_model if args.critic == "reward" and reward_model is not None else policy
    config = copy.deepcopy(source.config)
    config.update({key: 0.0 for key, value in vars(config).items() if "drop" in key and value})
    config.num_labels = 1
    try:
        critic = transformers.AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    except ValueError:
        fail(f"--critic {args.critic}: transformers has no {config.model_type} for token classification")
    critic.base_model.load_state_dict(source.base_model.state_dict())
    head = critic.score if hasattr(critic, "score") else critic.classifier
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if source is reward_model:
        with torch.no_grad():
            head.weight.copy_(reward_model.score.weight)
            head.bias.sub_(getattr(reward_model.config, "reward_mean", 0.0))
    if args.gradient_checkpointing:
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(critic, new if hasattr(critic, new) else old)()
    return critic.to(device).train()


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
def rollout(policy, reference, reward, rows, eos_ids, kl_coef, args, autocast, seed):
    """Sample and score a response for each (row, prompt ids): (batch, metrics). The batch holds prompts and
    responses as token ids; mask, logprobs (the sampler's) and ref_logprobs (B, R); scores, kl, sizes (B,).
    Metrics are means over the responses, in nats a response and units of the reward.
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
    batch["scores"] = reward(rows, prompts, responses) - args.missing_eos_penalty * ~finished
    if batch["scores"].isnan().any():
        fail(f"--reward {args.reward}: gives None: every completion needs a score")
    scores, kl = batch["scores"].mean().item(), batch["kl"].mean().item()
    return batch, {
        "objective/scores": scores, "objective/kl": kl, "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl, "objective/entropy": -logprobs.sum(1).mean().item(),
        "completions/mean_length": lengths.float().mean().item(),
        "completions/eos_rate": finished.float().mean().item()}


def evaluate(policy, reference, reward, tokenizer, held_out, eos_ids, kl_coef, args, autocast):
    """(metrics, samples): a rollout of the held-out prompts, over and over until there are --eval-samples."""
    rows = [held_out[i % len(held_out)] for i in range(args.eval_samples)]
    batch, metrics = rollout(policy, reference, reward, rows, eos_ids, kl_coef, args, autocast, args.seed)
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
    columns = zip(decode(batch["prompts"]), decode(batch["responses"]), batch["scores"], batch["kl"])
    samples = [{"prompt": x, "completion": y, "score": float(r), "kl": float(kl)} for x, y, r, kl in columns]
    return {f"eval/{name}": value for name, value in metrics.items()}, samples


def main(args: Args) -> dict:
    # 1. flags, run folder, device
    start = time.time()
    check_flags(args)
    episodes = args.batch_size * args.num_minibatches
    if args.total_episodes % episodes:
        fail(f"--total-episodes {args.total_episodes} is no multiple of an update's {episodes} responses, "
             "--batch-size times --num-minibatches")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    run, state = open_run(args)
    log = make_logger(run, args)
    for flag, script in (("model", "sft.py"), ("reward", "reward_model.py")):
        name = getattr(args, flag)
        if name == getattr(Args, flag) and not Path(name).exists():
            print(f"{name} does not exist yet: running {script}, which makes it")
            if code := subprocess.run([sys.executable, Path(__file__).with_name(script)]).returncode:
                raise SystemExit(code)

    # 2. models, prompts, optimizer
    data = split_rows(args.dataset, args.eval_dataset)
    policy, tokenizer, eos_ids = load_model(args, device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward, reward_model = load_reward(args.reward, tokenizer, eos_ids, args, device, autocast)
    critic = load_critic(args, policy, reward_model, device)
    prompts, held_out = (load_prompts(tokenizer, part, eos_ids, args.max_prompt_length) for part in data)
    rows = [ids for _, ids in prompts + held_out]
    longest = max(rows, key=len) + eos_ids[:1] * args.max_new_tokens
    for name, model in (("--model", policy), (f"--reward {args.reward}", reward_model)):
        if model is not None:
            check_model(model, [longest, *rows], name, "--max-prompt-length, --max-new-tokens")
    models = {"policy": policy} | ({"critic": critic} if critic else {})
    rates = {"policy": args.learning_rate, "critic": args.critic_learning_rate}
    groups = [{"params": list(model.parameters())} for model in models.values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    num_updates, update, num_tokens, kl_coef = args.total_episodes // episodes, 0, 0, args.kl_coef
    print(f"{len(prompts)} prompts, {len(held_out)} held out from {data[1][0]['_where'].rpartition(':')[0]}, "
          f"{num_updates} updates, {policy.num_parameters():,} parameters on {device}")
    if reward_model is not None:
        accuracy = getattr(reward_model.config, "held_out_accuracy", math.nan)
        print(f"the reward model's held-out accuracy is {accuracy:.3f}"
              + ": unknown, or near chance. Make sure your reward model works first!" * (not accuracy > 0.6))
    if state:
        for name, model in models.items():
            model.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        update, num_tokens, kl_coef = state["update"], state["num_tokens"], state["kl_coef"]
        if state["rows"] != len(prompts):
            fail(f"--resume: {args.dataset} has {len(prompts)} rows, and had {state['rows']} before")

    # 3. the loop. Order and noise are functions of (seed, update), so that no random state has to be saved
    generator = lambda number: torch.Generator().manual_seed(args.seed + 1000 * number)
    stopped, metrics = [], {}  # a first signal stops after the update, a second one at once
    stop = lambda number, frame: stopped.append(number) or signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=num_updates, initial=update, desc="ppo", unit="update", disable=None)
    while update == num_updates or not stopped:
        if update in (0, num_updates) or (args.eval_every and update % args.eval_every == 0):
            after, samples = evaluate(policy, reference, reward, tokenizer, held_out, eos_ids, kl_coef, args,
                                      autocast)
            if not math.isfinite(after["eval/objective/rlhf_reward"]):
                fail(f"update {update}: the evaluation gives NaN: lower --learning-rate")
            log(update, after, samples)
            bar.write(f"update {update}: score {after['eval/objective/scores']:.3f} "
                      f"KL {after['eval/objective/kl']:.3f} {samples[0]['completion'][:80]!r}")
        if update == num_updates:
            break
        began = time.time()

        # 3a. rollout: the next prompts of an order that is drawn anew for each pass over them
        numbers = range(update * episodes, (update + 1) * episodes)
        epochs = {k // len(prompts) for k in numbers}
        orders = {epoch: torch.randperm(len(prompts), generator=generator(epoch)) for epoch in epochs}
        rows = [prompts[orders[k // len(prompts)][k % len(prompts)]] for k in numbers]
        batch, metrics = rollout(policy, reference, reward, rows, eos_ids, kl_coef, args, autocast,
                                 args.seed + 1000 * (update + 1))
        mask, old_logprobs, batch_tokens = batch["mask"], batch["logprobs"], int(batch["mask"].sum())

        # 3b. rewards, values, advantages
        rewards = token_rewards(batch["scores"], old_logprobs, batch["ref_logprobs"], mask, kl_coef)
        old_values = torch.zeros_like(rewards)
        if critic:
            with torch.no_grad():
                for index in batch["sizes"].argsort(stable=True).split(args.micro_batch_size):
                    old_values[index] = response_values(critic, batch, index, autocast)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
        metrics |= {"val/explained_variance": (1 - masked_mean(advantages.square(), mask) / spread).item(),
                    "objective/kl_coef": kl_coef}
        if args.norm_adv:
            advantages = masked_whiten(advantages, mask)
        if args.target_kl:
            kl_coef = adapted_kl_coef(kl_coef, metrics["objective/kl"], args.target_kl, episodes,
                                      args.kl_horizon)

        # 3c. update, with learning rates that fall to 0
        for group, name in zip(optimizer.param_groups, models):
            group["lr"] = rates[name] * ((1 - update / num_updates) if args.anneal_lr else 1.0)
        sums, gaps = {}, []
        for epoch in range(args.update_epochs):
            order = torch.randperm(episodes, generator=generator(update * args.update_epochs + epoch))
            for number, minibatch in enumerate(order.split(args.batch_size)):
                minibatch = minibatch[batch["sizes"][minibatch].argsort(stable=True)]
                tokens = mask[minibatch].sum()  # of the whole optimizer step
                for index in minibatch.split(args.micro_batch_size):
                    m, old, advantage = mask[index], old_logprobs[index], advantages[index]
                    logprobs, entropy = response_logprobs(policy, batch, index, args, autocast, entropy=True)
                    losses, ratio = ppo_loss(logprobs, old, advantage, m, args.clip_coef)
                    (losses.sum() / tokens).backward()
                    terms = {"loss/policy": losses, "policy/clipfrac": losses > -advantage * ratio,
                             "policy/approx_kl": kl_estimate(old, logprobs, "k3"), "policy/entropy": entropy,
                             "val/ratio": ratio}
                    if critic:
                        values = response_values(critic, batch, index, autocast)
                        losses, clipped = value_loss(values, old_values[index], returns[index], m,
                                                     args.clip_coef_value)
                        (losses.sum() / tokens).backward()
                        terms |= {"loss/value": losses, "val/clipfrac": clipped}
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + torch.where(m, value.detach().float(), 0.0).sum()
                    if epoch == number == 0:  # before the first step only the sampler's arithmetic differs
                        gaps.append(torch.where(m, logprobs.detach() - old, 0.0).abs().max().item())
                norms = {name: torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
                         for name, model in models.items()}
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        sizes = [torch.nn.utils.get_total_norm(model.parameters()).item() for model in models.values()]
        if not math.isfinite(sum(norms.values()) + sum(sizes)):
            fail(f"update {update + 1}: gradient norms {norms}, weights {sizes}: lower --learning-rate or "
                 f"--critic-learning-rate; the last checkpoint, if any, is in {run / 'state'}")
        update, num_tokens = update + 1, num_tokens + batch_tokens

        # 3d. log, save
        metrics |= {name: value.item() / (args.update_epochs * batch_tokens) for name, value in sums.items()}
        metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        metrics |= {"policy/logprob_gap": max(gaps), "learning_rate": optimizer.param_groups[0]["lr"],
                    "num_tokens": num_tokens, "episode": update * episodes,
                    "tokens_per_second": batch_tokens / (time.time() - began)}
        log(update, metrics)
        bar.update()
        bar.set_postfix(score=f"{metrics['objective/scores']:.3f}", kl=f"{metrics['objective/kl']:.2f}")
        if stopped or (args.save_every and update % args.save_every == 0):
            weights = {name: model.state_dict() for name, model in models.items()}
            save_checkpoint(run, args, **weights, optimizer=optimizer.state_dict(), update=update,
                            num_tokens=num_tokens, kl_coef=kl_coef, rows=len(prompts))
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if update < num_updates:
        print(f"stopped after update {update} of {num_updates}: --resume continues")
        raise SystemExit(128 + stopped[0])

    # 4. save, and show what has changed
    if critic:
        critic.save_pretrained(run / "critic")
        tokenizer.save_pretrained(run / "critic")
    save_model(run, args, policy, tokenizer, eos_ids, time.time() - start)
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
