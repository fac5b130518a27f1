"""What the scripts share and what carries no algorithm: token log-probs straight from hidden states, KL
estimators, masked statistics, sampling, rows of text to tokens, and the files of a run.

Shapes: B sequences, T tokens of prompt and completion, R of a response, N scored tokens of a batch, H hidden
size, V vocabulary. Log-probs, entropies and KL are in nats and in fp32 whatever the weights are.
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F

KEEP_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # token_logprobs keeps up to so much for the backward pass


def fail(message: str) -> NoReturn:
    """Bad input ends a script with one line on stderr and exit code 2, without a traceback."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- Token log-probs ----


def head_of(model) -> dict:
    """The output head of a transformers model as keyword arguments of `token_logprobs`."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        fail(f"{type(model).__name__} has no output embeddings: it is not a causal language model")
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"weight": head.weight, "bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}


def _autocast(*operands):
    """The operands in the dtype in which the model's own head would multiply them."""
    device = operands[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [x.to(dtype or x.dtype) for x in operands]


def _logits(hidden, weight, bias, scale, softcap, temperature):
    """z = softcap tanh(scale (h W^T + b) / softcap) / temperature: (rows, V), fp32 from any dtype."""
    if hidden.is_cuda and weight.element_size() == 2:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)  # tensor cores, and never a logit in 16 bits
    else:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Logits live one chunk of rows at a time. The backward pass turns a chunk's log-probs, kept or
    recomputed, in place into dz = g (1[y] - p) - g_H p (log p + entropy), then into the gradients of h, W and
    b.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, entropy, hits, rows, keep):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        half = hidden.is_cuda and hidden.dtype == weight.dtype != dtype  # 16-bit operands, fp32 products
        W, kept = weight if half else weight.to(dtype), []
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        normalizer, entropies = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        is_top = torch.zeros_like(targets, dtype=torch.bool)
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            z = _logits(hidden[s], W, bias, scale, softcap, temperature)  # (rows, V)
            normalizer[s] = z.logsumexp(-1)
            z -= normalizer[s, None]  # log p
            logprobs[s] = z.gather(-1, targets[s, None]).squeeze(-1)
            if entropy:
                entropies[s] = -(z.exp() * z).nan_to_num_(0.0).sum(-1)
            if hits:
                is_top[s] = z.argmax(-1) == targets[s]
            if keep:
                kept.append(z.to(hidden.dtype) if half else z)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropies)
        ctx.kept, ctx.options = kept, (scale, softcap, temperature, rows, dtype, half)
        ctx.mark_non_differentiable(is_top)
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs the backward pass nothing
        return logprobs, entropies, is_top

    @staticmethod
    def backward(ctx, g, g_entropy, _):
        hidden, weight, bias, targets, normalizer, entropies = ctx.saved_tensors
        scale, softcap, temperature, rows, dtype, half = ctx.options
        g = torch.zeros_like(normalizer) if g is None else g
        W, d_hidden = weight if half else weight.to(dtype), torch.empty_like(hidden)
        d_weight = torch.zeros_like(W, dtype=dtype) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        if ctx.kept and ctx.kept[0] is None:
            raise RuntimeError("the first backward pass freed the log-probs: a second one needs keep=False")
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            if ctx.kept:
                logp, ctx.kept[i // rows] = ctx.kept[i // rows].to(dtype), None  # freed after its chunk
            else:
                logp = _logits(hidden[s], W, bias, scale, softcap, temperature).sub_(normalizer[s, None])
            slope = scale / temperature  # of z in h W^T + b
            if softcap is not None:
                tanh = (logp + normalizer[s, None]).mul_(temperature / softcap)
                slope = (1 - tanh.square_()).mul_(slope)
            pull = g[s, None]
            if g_entropy is not None:
                pull = pull + g_entropy[s, None] * (logp + entropies[s, None]).nan_to_num_(neginf=0.0)
            d = logp.exp_().mul_(-pull).scatter_add_(-1, targets[s, None], g[s, None])  # (rows, V)
            d = d.mul_(slope).to(hidden.dtype if half else dtype)
            d_hidden[s] = d @ W
            if d_bias is not None:
                d_bias += d.sum(0)
            if d_weight is not None and half:
                d_weight += torch.mm(d.T, hidden[s], out_dtype=dtype)
            elif d_weight is not None:
                d_weight.addmm_(d.T, hidden[s].to(dtype))
        cast = lambda gradient, like: None if gradient is None else gradient.to(like.dtype)
        return d_hidden, cast(d_weight, weight), cast(d_bias, bias), *[None] * 8


def token_logprobs(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0,
                   entropy=False, hits=False, rows=None, keep=None):
    """log pi(y_n | h_n) = z_y - logsumexp(z), z = softcap tanh(scale (h W^T + b) / softcap) / temperature.

    Computes the logits `rows` at a time, in fp32 from operands of any dtype, so 16-bit weights cost the
    log-probs no precision. Differentiable in hidden, weight and bias under any upstream gradient per token: a
    loss stays plain mathematics on the result. For the backward pass one copy of the log-probs is kept
    (`keep`: 3 matrix products), by default up to KEEP_BYTES; else they are recomputed (4), never all held.

    Args:
        hidden: (N, H) last hidden states, those that predict the targets. targets: (N,) token ids.
        weight: (V, H) output embeddings, tied or not. bias: (V,) or None.
        scale, softcap: constants of the model's head (Cohere, Granite; Gemma), see `head_of`.
        temperature: of the sampling distribution that is to be scored.
        entropy: also return each token's entropy -sum_v p log p, differentiable too.
        hits: also return whether the target is the most likely token.
    Returns: log-probs (N,) in nats, fp32; a tuple of them and what else was asked for, each (N,).
    Raises: ValueError for shapes that do not fit or a temperature that is not positive.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
        raise ValueError(f"hidden, weight and targets are {shapes}, expected (N, H), (V, H) and (N,)")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    device = hidden.device.type
    hidden, weight = _autocast(hidden, weight)
    rows = rows or (2048 if hidden.is_cuda else 128)  # large products on a GPU, chunks in cache on a CPU
    if keep is None:
        size = len(hidden) * len(weight) * (hidden.element_size() if hidden.is_cuda else 4)
        keep = size <= KEEP_BYTES.get(device, 0)
    keep = keep and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        logprobs, *extras = _TokenLogprobs.apply(
            hidden, weight, bias, targets, scale, softcap, temperature, entropy, hits, rows, keep)
    extras = [x for x, wanted in zip(extras, (entropy, hits)) if wanted]
    return (logprobs, *extras) if extras else logprobs


def sequence_logprobs(model, input_ids, mask, **options):
    """log pi(y_t | y_<t) of the tokens where `mask` is True and 0 elsewhere: (B, T) -> (B, T). `options` are
    the temperature, entropy and hits of `token_logprobs`; the last two make it a tuple as there.

    Rows are padded on the right, so a causal model needs neither an attention mask nor position ids: no real
    token ever sees the padding. Only hidden states that predict a masked token reach the output head. mask[:,
    0] must be False: nothing predicts a first token.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    source = mask.roll(-1, dims=1)  # position t - 1 predicts token t
    result = token_logprobs(hidden[source], targets=input_ids[mask], **head_of(model), **options)
    spread = lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x)  # (N,) -> (B, T)
    return tuple(map(spread, result)) if isinstance(result, tuple) else spread(result)


def token_values(model, input_ids):
    """The scalar head at every position: (B, T) -> (B, T), fp32. Rows are padded on the right, as above.

    model: ...ForSequenceClassification or ...ForTokenClassification with one label. A reward model's score of
    a row is the value at its last token; a critic's V(s_t), before token t is chosen, the one at t - 1.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1)


@torch.no_grad()
def check_model(model, rows: list[list[int]], name="--model", lengths="--max-length") -> None:
    """Refuse a model with too few positions or embeddings for the rows' ids, or whose own log-probs or score
    of the first row `sequence_logprobs` or `token_values` does not reproduce: it would train wrongly.
    """
    longest, positions = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        fail(f"{lengths}: rows have up to {longest} tokens, {name} {positions} positions: lower it")
    largest, vocabulary = max(map(max, rows)), len(model.get_input_embeddings().weight)
    if largest >= vocabulary:
        fail(f"{name}: its tokenizer gives token id {largest}, but it has only {vocabulary} embeddings")
    ids = torch.tensor(rows[:1], device=model.device)  # (1, T)
    if model.get_output_embeddings() is None:
        want, got = model(input_ids=ids).logits[:, 0].float(), token_values(model, ids)[:, -1]
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        want = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        got = sequence_logprobs(model, ids, torch.arange(ids.shape[1], device=ids.device)[None] > 0)[:, 1:]
    if not (gap := (got - want).abs().max().item()) < 2e-3:  # NaN fails too
        fail(f"{name}: {type(model).__name__}'s log-probs or scores from hidden states differ from its own "
             f"by {gap:.2g}: its head does something that common.py does not know")


# ---- KL and masked statistics ----


def kl_estimate(logprobs, ref_logprobs, kind: str):
    """Per-token estimators of KL(pi || ref) for tokens drawn from pi (Schulman 2020,
    joschu.net/blog/kl-approx).

    With d = log pi - log ref:      value, mean over y ~ pi     mean gradient, as a term of the loss
      k1 = d                        KL(pi || ref), any sign     0, only noise: it belongs in the reward
      k2 = d^2 / 2                  biased, >= 0                that of KL(pi || ref)
      k3 = exp(-d) - 1 + d          KL(pi || ref), >= 0         that of KL(ref || pi), the other direction
    In the reward, where the estimate multiplies grad log pi, k1 gives the gradient of KL(pi || ref); k2 and
    k3 do not. In the loss, k3 times the differentiated ratio pi / pi_old gives it too.

    Args: log-probs of any equal shape; kind "k1", "k2" or "k3". Returns: nats, the same shape.
    """
    d = logprobs - ref_logprobs
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"unknown estimator {kind!r}: k1, k2 or k3")
    # expm1, since exp(-d) - 1 loses every digit of a small d
    return d if kind == "k1" else d.square() / 2 if kind == "k2" else torch.expm1(-d) + d


@torch.no_grad()
def exact_kl(hidden, head: dict, ref_hidden, ref_head: dict, temperature=1.0, rows=512):
    """KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v)) of each position, over the whole vocabulary: (N,),
    nats.

    Args: hidden (N, H) and ref_hidden (N, H') with their heads from `head_of`. No gradient: a metric, or a
    test.
    """
    result, heads = [], [{**h, "temperature": temperature} for h in (head, ref_head)]
    with torch.autocast(hidden.device.type, enabled=False):
        for pair in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
            p, q = (torch.log_softmax(_logits(h, **options), -1) for h, options in zip(pair, heads))
            result.append((p.exp() * (p - q)).nan_to_num(0.0).sum(-1))
    return torch.cat(result)


def masked_mean(x, mask):
    """Mean of x where mask is True, 0 if nowhere. No inf or NaN elsewhere in x reaches value or gradient."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean: bool = True):
    """(x - mean) / population std over all masked entries, plus the mean unless shift_mean; 0 elsewhere."""
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    white = (x - mean) / (masked_mean((x - mean).square(), mask).sqrt() + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


# ---- Sampling ----


@torch.no_grad()
def sample(model, prompts: list[list[int]], max_new_tokens: int, eos_ids: list[int], temperature: float = 1.0,
           seed: int = 0, batch_size: int = 256):
    """Draw a completion for each prompt from softmax(z / temperature), and at temperature 0 the most likely
    tokens.

    No top-k, top-p or penalty, whatever the model's generation_config says: what is sampled is what is
    scored. The noise of a row is a function of (seed, row), so batch_size changes memory and not the samples.

    Returns: tokens (B, R), log-probs (B, R) in fp32, lengths (B,), on the model's device. A row ends with its
    first token of eos_ids, or unfinished at max_new_tokens; behind its length it holds zeros.
    """
    device, B, training = model.device, len(prompts), model.training
    model.eval()  # activation checkpointing, which is for training mode, would leave the cache empty
    noise = torch.rand(B, max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise, stop = noise.to(device), torch.tensor(eos_ids, device=device)
    tokens, head = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device), head_of(model)
    logprobs, lengths = torch.zeros(tokens.shape, device=device), tokens.new_zeros(B)
    for first in range(0, B, batch_size):
        rows = prompts[first : first + batch_size]
        s, P = torch.arange(first, first + len(rows), device=device), max(map(len, rows))
        ids = torch.tensor([[0] * (P - len(row)) + row for row in rows], device=device)  # padded on the left
        mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=device)
        alive, cache = torch.ones(len(rows), dtype=torch.bool, device=device), None
        for t in range(max_new_tokens):
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=position,
                                   past_key_values=cache, use_cache=True)
            hidden, head["weight"] = _autocast(out.last_hidden_state[:, -1], head["weight"])
            with torch.autocast(device.type, enabled=False):  # fp32 logits, as in scoring
                z = _logits(hidden, **head, temperature=temperature or 1.0)
            logp, cache = torch.log_softmax(z, -1), out.past_key_values  # (rows, V)
            if temperature == 0:
                token = logp.argmax(-1)
            else:  # invert the cumulative distribution, in double precision
                cdf = logp.double().exp().cumsum(-1)
                token = torch.searchsorted(cdf, noise[s, t, None] * cdf[:, -1:], right=True).squeeze(-1)
                token = token.clamp(max=logp.shape[-1] - 1)
            tokens[s, t] = token.where(alive, 0)
            logprobs[s, t] = logp.gather(-1, token[:, None]).squeeze(-1).where(alive, 0.0)
            lengths[s] += alive
            alive &= ~torch.isin(token, stop)
            if not (left := int(alive.sum())):
                break
            ids, mask = token[:, None], F.pad(mask, (0, 1), value=1)
            layers = getattr(cache, "layers", [None])
            if left < 0.75 * len(s) and all(hasattr(layer, "batch_select_indices") for layer in layers):
                cache.batch_select_indices(alive)  # finished rows leave
                s, ids, mask, alive = s[alive], ids[alive], mask[alive], alive[alive]
    model.train(training)
    R = int(lengths.max())
    return tokens[:, :R], logprobs[:, :R], lengths


# ---- Rows of text to tokens ----


def read_rows(path: str, split: str = "train") -> list[dict]:
    """Rows of a .jsonl or .json file, or of a .parquet file or Hub id through the optional `datasets`
    package. Each carries its origin, "file:line", under the key "_where".
    """
    file, rows = Path(path), []
    if file.suffix in (".jsonl", ".json"):
        try:
            text = file.read_text(encoding="utf-8")
            whole = file.suffix == ".json" and text.lstrip().startswith("[")
            lines = list(map(json.dumps, json.loads(text))) if whole else text.split("\n")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            fail(f"{path}: {error}")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                fail(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object with named columns, found {line[:40]}")
            rows += [{**row, "_where": f"{path}:{number}"}] if line.strip() else []
    elif file.suffix == ".parquet" or (path.count("/") == 1 and not file.parent.exists()):
        try:
            import datasets

            source = {"path": "parquet", "data_files": path} if file.suffix else {"path": path}
            loaded = datasets.load_dataset(**source, split="train" if file.suffix else split)
        except ImportError:
            fail(f"{path}: .parquet files and Hub ids need `pip install datasets`")
        except Exception as error:  # of dozens of types, for a wrong name or a network that is down
            fail(f"{path}: {error}")
        rows = [{**row, "_where": f"{path}:{i}"} for i, row in enumerate(loaded, 1)]
    else:
        fail(f"{path}: not a .jsonl, .json or .parquet file, nor a data set's Hub id (owner/name)")
    return rows or fail(f"{path}: no rows")


def split_rows(dataset: str, eval_dataset: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows). The latter are those of eval_dataset, or of the data set's own test
    file (x.test beside x.train, x_test beside x), or every row of one prompt in twenty, so that no prompt is
    on both sides.
    """
    rows, file = read_rows(dataset), Path(dataset)
    names = file.name.replace("train", "test"), f"{file.stem}_test{file.suffix}"
    own = [str(file.with_name(name)) for name in names if name != file.name and file.with_name(name).exists()]
    if eval_dataset or own:
        return rows, read_rows(eval_dataset or own[0], "test")
    keys = []
    for row in rows:  # what precedes the first answer
        key = next((row[name] for name in ("prompt", "messages", "chosen", "text") if name in row), "")
        if isinstance(key, list):
            roles = [message.get("role") if isinstance(message, dict) else None for message in key]
            key = key[: roles.index("assistant")] if "assistant" in roles else key
        keys.append(str(key).split("\n\nAssistant:")[0])
    held_out = set(list(dict.fromkeys(keys))[::20])
    if len(set(keys)) < 2:
        fail(f"{dataset}: a single prompt, so none can be held out: pass --eval-dataset")
    train = [row for row, key in zip(rows, keys) if key not in held_out]
    return train, [row for row, key in zip(rows, keys) if key in held_out]


def explicit_pairs(rows: list[dict]) -> None:
    """Give each row mu, 1 if absent, and a prompt: without that column it is what both sides share, their
    leading messages or, of texts in the style of Anthropic HH, everything up to the last "\\n\\nAssistant:".
    """
    for row in rows:
        mu = row.setdefault("mu", 1.0)
        if type(mu) not in (int, float) or not 0 <= mu <= 1:
            fail(f"{row['_where']}: mu is {mu!r}; expected 1 (chosen is better) to 0, with 0.5 a tie")
        if not {"chosen", "rejected"} <= set(row):
            fail(f"{row['_where']}: needs chosen and rejected; found {sorted(set(row) - {'_where', 'mu'})}")
        if "prompt" not in row:
            chosen, rejected, marker = row["chosen"], row["rejected"], "\n\nAssistant:"
            if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
                fail(f"{row['_where']}: chosen and rejected must both be text, or both lists of messages")
            n = min(len(chosen), len(rejected)) - isinstance(chosen, list)  # of messages all but the last
            n = next((i for i in range(n) if chosen[i] != rejected[i]), n)
            if isinstance(chosen, str):
                n = chosen.rfind(marker, 0, n) + len(marker) if marker in chosen[:n] else 0
            if n == 0:
                fail(f"{row['_where']}: no prompt column, and chosen and rejected share no beginning")
            row.update(prompt=chosen[:n], chosen=chosen[n:], rejected=rejected[n:])


def segments_of(tokenizer, row: dict, completion: str) -> list[tuple[str, bool, bool]]:
    """A row as segments of text (text, trained?, chat?): `prompt` and `completion` as texts or message lists,
    `messages` with every assistant turn trained, or `text`, trained as a whole.

    Few chat templates mark the turns, so they are found by rendering prefixes: what a template writes for a
    message behind its own generation prompt is that message's turn.
    """
    where, first = row["_where"], 0
    formats = ["prompt", completion], ["messages"], ["text"]
    keys = next((keys for keys in formats if set(keys) <= set(row)), None)
    if keys is None:
        fail(f"{where}: needs prompt and {completion}, messages or text; has {sorted(set(row) - {'_where'})}")
    parts = [row[key] for key in keys]
    if all(isinstance(part, str) for part in parts):
        return [(part, k == len(parts) - 1, False) for k, part in enumerate(parts)]
    if not all(isinstance(part, list) for part in parts):
        fail(f"{where}: {' and '.join(keys)} must be text, or lists of messages with role and content")
    if not tokenizer.chat_template:
        fail(f"{where}: messages need a tokenizer with a chat template, and this one has none")
    messages, first = sum(parts, []), len(parts[0]) if len(parts) == 2 else 0
    segments, done, render = [], "", partial(tokenizer.apply_chat_template, tokenize=False)
    for i, message in enumerate(messages):
        try:
            if i < first or message["role"] != "assistant":
                continue
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
        except Exception as error:  # a template raises what it likes
            fail(f"{where}: the chat template refuses message {i + 1}: {error!r}")
        if not (before.startswith(done) and after.startswith(before)):
            fail(f"{where}: the chat template rewrites the turns before {i + 1}: give prompt and completion")
        segments += [(before[len(done) :], False, True), (after[len(before) :], True, True)]
        done = after
    return segments or fail(f"{where}: no assistant message to train on")


def encode(tokenizer, rows: list[dict], eos_ids: list[int], max_length: int, completion: str = "completion"):
    """Each row as (ids, trained), two lists of equal length: [(list[int], list[bool]), ...].

    Segments are tokenized apart and their ids concatenated, so no token straddles a boundary; all but the
    first behind a newline that is cut off again, since some tokenizers put a space before every text. Plain
    text gets the tokenizer's BOS; a chat template brings its own. A row ends with exactly one EOS, appended
    if missing; what a template writes behind it is dropped, or untrained within a row. max_length cuts a
    completion before its EOS.
    """
    segments = [segments_of(tokenizer, row, completion) for row in rows]
    bare = partial(tokenizer, add_special_tokens=False)
    texts = ["\n" * (k > 0) + text for row in segments for k, (text, *_) in enumerate(row)]
    pieces = iter(bare(texts)["input_ids"])
    anchor, marked = bare("\n")["input_ids"], tokenizer("\n")["input_ids"]
    bos = next((marked[:i] for i in range(len(marked)) if marked[i : i + len(anchor)] == anchor), [])
    result, cut = [], 0
    for row, parts in zip(rows, segments):
        ids, trained = [], []
        for k, (text, train, chat) in enumerate(parts):
            piece = next(pieces)
            if k == 0 and not chat:
                piece = bos + piece
            elif k:  # a newline that merged with the text cannot be cut off
                piece = piece[len(anchor) :] if piece[: len(anchor)] == anchor else bare(text)["input_ids"]
            end = max((i + 1 for i, token in enumerate(piece) if token in eos_ids), default=0)
            if k == len(parts) - 1:
                while not chat and piece and piece[-1] in eos_ids:
                    piece = piece[:-1]
                piece = piece[:end] if chat and end else piece + eos_ids[:1]
                end = len(piece)
            ids, trained = ids + piece, trained + [train and (i < end or not end) for i in range(len(piece))]
        if len(ids) > max_length:
            eos, cut = ids[-1], cut + 1
            kept = max((i + 1 for i in range(max_length - 1) if trained[i]), default=0)
            if kept == 0:
                fail(f"{row['_where']}: the prompt fills --max-length {max_length}: raise it or drop the row")
            ids, trained = ids[:kept], trained[:kept]  # to where the cut is, or the last turn before it ends
            if ids[-1] not in eos_ids:
                ids, trained = [*ids, eos], [*trained, True]
        trained[0] = False  # nothing predicts it
        if not any(trained):
            fail(f"{row['_where']}: has no token to train on")
        result.append((ids, trained))
    if cut:
        file = rows[0]["_where"].rpartition(":")[0]
        print(f"{cut} of {len(rows)} rows of {file} were cut to --max-length {max_length}")
    return result


# ---- Runs ----


def check_flags(args) -> None:
    """Refuse numbers that are negative, infinite, NaN or mostly 0, uneven micro-batches, a missing device."""
    zero = ("seed learning_rate critic_learning_rate warmup_steps weight_decay label_smoothing eval_every "
            "save_every kl_coef target_kl gae_lambda clip_coef_value missing_eos_penalty").split()
    for name, value in asdict(args).items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in zero):
            fail(f"--{name.replace('_', '-')} is {value}: out of range")
    if args.batch_size > args.micro_batch_size and args.batch_size % args.micro_batch_size:
        fail(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device")


def open_run(args):
    """(run folder, checkpoint or None). Never overwrites a finished run nor loses an interrupted one."""
    run, checkpoint = Path(args.output_dir), Path(args.output_dir, "state", "checkpoint.pt")
    if (run / "model").exists():
        fail(f"--output-dir {run} holds a finished run: choose another folder, or remove it")
    if checkpoint.exists() and not args.resume:
        fail(f"--output-dir {run} holds an interrupted run: continue it with --resume, or remove it")
    if not args.resume:
        try:
            run.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                (run / name).write_text("")
        except OSError as error:
            fail(f"--output-dir {run}: {error}")
        return run, None
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # none there, or not whole: torch raises many types
        fail(f"--resume: cannot read {checkpoint}: {error}")
    free = ("resume", "micro_batch_size", "save_every", "gradient_checkpointing", "track")
    for name, value in asdict(args).items():
        if name not in free and value != state["args"].get(name):
            fail(f"--resume: --{name.replace('_', '-')} is {value}, and was {state['args'].get(name)} before")
    for name, size in state["sizes"].items():
        os.truncate(run / name, size)  # what was logged after the checkpoint will be logged again
    return run, state


def make_logger(run, args):
    """log(step, metrics, samples): metrics.jsonl, samples.jsonl, TensorBoard if installed, W&B if asked."""
    sinks = []
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run))
        sinks.append(lambda step, metrics: [writer.add_scalar(*item, step) for item in metrics.items()])
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs `pip install wandb`")
        wandb.init(project=args.wandb_project_name, name=run.name, config=asdict(args))
        sinks.append(lambda step, metrics: wandb.log(metrics, step=step))

    def log(step, metrics, samples=()):
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with open(run / name, "a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
        for sink in sinks:
            sink(step, metrics)

    return log


def save_checkpoint(run, args, **state):
    """All that --resume needs, under a temporary name that is then renamed: a crash leaves the last whole."""
    state["sizes"] = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    (run / "state").mkdir(exist_ok=True)
    torch.save({**state, "args": asdict(args)}, run / "state" / "checkpoint.tmp")
    os.replace(run / "state" / "checkpoint.tmp", run / "state" / "checkpoint.pt")
