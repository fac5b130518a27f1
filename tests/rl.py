"""What the tests of ppo.py and grpo.py share: batches of (B, T) tensors, folders of models, prompts and rewards,
what a run's optimizer steps see and do, and policies small enough to write down all their responses.
"""

import contextlib
import itertools
import json

import torch
import transformers
from common import micro_batches, sequence_logprobs
from conftest import LENGTHS, MASK, PROMPTS, STOPS, make_model, noise, word_tokenizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

CPU = torch.device("cpu")
MEAN = 0.37  # reward_mean of the reward models

# ---- Batches ----


def mask_of(prompts, lengths):
    """Responses of these lengths behind prompts of these lengths, by loops: (B, T)."""
    T = max(p + n for p, n in zip(prompts, lengths))
    return torch.tensor([[p <= t < p + n for t in range(T)] for p, n in zip(prompts, lengths)])


PLACED = mask_of(PROMPTS, LENGTHS)  # (4, 18)
LAYOUTS = {"alone": MASK, "behind prompts": PLACED}


def make_batch(prompts, responses, padding=0):
    """The batch of these lists of token ids, made by loops: input_ids, mask and log-probs of 0, (B, T) each."""
    mask = mask_of(list(map(len, prompts)), list(map(len, responses)))
    input_ids = torch.full(mask.shape, padding)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        ids = torch.tensor(prompt + response)
        input_ids[i, : len(ids)] = ids
    return {"input_ids": input_ids, "mask": mask, "logprobs": torch.zeros(mask.shape)}


def rows_of(batch):
    """[(prompt, response), ...] of a batch, as lists of token ids."""
    rows = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["mask"].tolist()):
        first, n = mask.index(True), sum(mask)
        rows.append((ids[:first], ids[first : first + n]))
    return rows


def score_logprobs(model, batch, temperature=1.0, index=None, size=2):
    """[log-probs, entropies] of a batch's rows in index as the scripts compute them, by micro-batches: (n, T) each,
    and NaN in the columns that were cut off."""
    index = torch.arange(len(batch["mask"])) if index is None else index
    result = torch.full((2, *batch["mask"].shape), torch.nan)
    for rows, mb in micro_batches(batch, index, size):
        both = sequence_logprobs(model, mb["input_ids"], mb["mask"], temperature=temperature, entropy=True)
        result[:, rows, : mb["mask"].shape[1]] = torch.stack(both)
    return result[:, index]


def same_rows(x, rows):
    """Each row of x is, to the bit, one of these rows."""
    return all((row == rows).all(1).any() for row in x)


# ---- Folders ----

REWARD = """
import random
import re
draw = random.Random(0)

def score(completions, **columns):
    return [sum(map(int, re.findall("[0-9]+", text))) % 17 / 8 for text in completions]

def uneven(completions, number, **columns):
    return [n if n % 2 else s for n, s in zip(number, score(completions))]

def by_prompt(completions, number, **columns):
    return [n / 10 for n in number]

def fraction(completions, **columns):
    return [text.split().count("w23") / 8 for text in completions]

def nothing(completions, **columns):
    return [0.0] * len(completions)

def shuffled(completions, **columns):
    return draw.sample(fraction(completions), len(completions))

def flipped(completions, **columns):
    return [-x for x in fraction(completions)]
"""


def make_folders(folder):
    """llama and gpt2: a policy each, and a reward model with another body; 12 prompts of 2 to 6 tokens; rewards."""
    for kind in ("llama", "gpt2"):
        model = make_model(kind)
        model.generation_config.eos_token_id = STOPS
        config = make_model(kind, seed=5).config
        config.num_labels, config.reward_mean, config.held_out_accuracy = 1, MEAN, 0.9
        reward = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for part, name in ((model, kind), (reward, f"{kind}-reward")):
            part.save_pretrained(folder / name)
            word_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": " ".join(f"w{4 + (7 * i + 5 * j) % 90}" for j in range(2 + i % 5)), "number": i}
            for i in range(12)]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def shares_of_a_word(run, folder, metric):
    """{reward: [before, after]}: what the metric, the share of one word, is before and after run(reward's name, its
    model, folder of the run), for that share as the reward, for one shuffled over the rows, for its sign flipped."""
    config = make_model("llama").config
    config.num_hidden_layers, model = 2, str(folder / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    shares = {}
    for name in ("fraction", "shuffled", "flipped"):
        metrics = run(name, model, str(folder / name))
        first = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])
        shares[name] = [abs(x[metric]) for x in (first, metrics)]
    return shares


# ---- Runs ----


@contextlib.contextmanager
def optimizer_steps():
    """Collects (parameters, gradients), copied, as each optimizer step of the block finds them."""
    steps = []

    def before(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append(([p.detach().clone() for p in parameters],
                      [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]))  # fmt: skip

    hook = register_optimizer_step_pre_hook(before)
    try:
        yield steps
    finally:
        hook.remove()


def watch_micro_batches(monkeypatch, script):
    """The row numbers of each micro-batch that the script trains on."""
    numbers = []

    def wrapper(*inputs):
        for rows, mb in micro_batches(*inputs):
            numbers.append(rows)
            yield rows, mb

    monkeypatch.setattr(script, "micro_batches", wrapper)
    return numbers


def vector(tensors):
    return torch.cat([x.flatten() for x in tensors])


def adamw(steps, rate, decay=0.0):
    """The weights behind each of these (parameters, gradients), the steps of one run from its first on, as one vector
    each: arXiv:1711.05101 with betas of 0.9 and 0.999. The decay is no part of the gradient. rate: a number, or one
    for each weight."""
    first = second = 0.0
    result = []
    for k, (parameters, gradients) in enumerate(steps, 1):
        p, g = vector(parameters), vector(gradients)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        size = (second / (1 - 0.999**k)).sqrt() + 1e-8
        result.append(p - rate * (first / (1 - 0.9**k) / size + decay * p))
    return result


def bounded(gradients, bound):
    """These gradients of one model, as one vector, no longer than the bound."""
    g = vector(gradients)
    return g * min(1.0, bound / g.norm().item())


def put(model, weights):
    """Give a model these weights, in the order of its parameters."""
    with torch.no_grad():
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.copy_(weight)


# ---- Enumeration ----


def all_responses(V, T, eos=None):
    """(tokens, mask), (S, T) each: all responses of T tokens out of V, or which end earlier at an EOS."""
    rows = {row[: row.index(eos) + 1] if eos in row else row for row in itertools.product(range(V), repeat=T)}
    rows = sorted(rows)
    tokens = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])
    return tokens, torch.arange(T) < torch.tensor(list(map(len, rows)))[:, None]


class Tabular(torch.nn.Module):
    """An autoregressive policy with free logits behind each prefix."""

    def __init__(self, V, T, seed):
        super().__init__()
        self.logits = torch.nn.ParameterList(noise(V**t, V, seed=seed + t) for t in range(T))

    def forward(self, tokens):
        result, prefix = [], torch.zeros(len(tokens), dtype=torch.long)
        for t, logits in enumerate(self.logits):
            result.append(torch.log_softmax(logits, -1)[prefix, tokens[:, t]])
            prefix = prefix * logits.shape[1] + tokens[:, t]
        return torch.stack(result, 1)  # log pi(y_t | y_<t), also of tokens behind the end


def flat(policy, value):
    """The gradient of value in all of the policy's parameters, as one vector."""
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True, materialize_grads=True)
    return vector(gradients)
