"""What the scripts share and what carries no algorithm: token log-probs straight from hidden states, KL estimators,
masked statistics, sampling, and the reading of rows into tokens.

Shapes: B sequences, T tokens of prompt and completion, N scored tokens of a batch, H hidden size, V vocabulary.
Log-probs, entropies and KL are in nats and in fp32 whatever the weights are. Copy this file, or a function of it.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F

KEEP_BYTES = 8 << 30  # token_logprobs keeps its log-probs for the backward pass up to here, and recomputes above


def fail(message: str) -> NoReturn:
    """Bad input ends a script with one line on stderr and exit code 2, without a traceback."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- Token log-probs ----


def head_of(model) -> dict:
    """The output head of a transformers model, as keyword arguments of `token_logprobs`."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        fail(f"{type(model).__name__} has no output embeddings: it is not a causal language model")
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return dict(weight=head.weight, bias=getattr(head, "bias", None), scale=scale,
                softcap=getattr(config, "final_logit_softcapping", None))  # fmt: skip


def _logits(hidden, weight, bias, scale, softcap, temperature):
    """z = cap tanh(scale (h W^T + b) / cap) / temperature in at least fp32, from operands of any dtype: (N, V)."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)  # tensor cores; never rounds the logits to 16 bits
    else:
        z = hidden.to(weight.dtype) @ weight.T
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Row chunks of logits live one at a time. The backward pass turns a chunk's log-probs, kept or recomputed, in
    place into dz = g (1[y] - p) - g_H p (log p + H) and multiplies it into the gradients of h, W and b.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, with_entropy, with_hits, rows, keep):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        half = hidden.is_cuda and hidden.dtype != compute  # 16-bit operands, fp32 products
        W = weight if half else weight.to(compute)
        N, kept = len(hidden), []
        logprobs = hidden.new_empty(N, dtype=compute)
        normalizer, entropy = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        hits = torch.zeros(N, dtype=torch.bool, device=hidden.device)
        for i in range(0, N, rows):
            s = slice(i, i + rows)
            z = _logits(hidden[s], W, bias, scale, softcap, temperature)  # (rows, V)
            normalizer[s] = z.logsumexp(-1)
            z -= normalizer[s, None]  # log p
            logprobs[s] = z.gather(-1, targets[s, None]).squeeze(-1)
            if with_entropy:
                entropy[s] = -(z.exp() * z).nan_to_num_(0.0).sum(-1)
            if with_hits:
                hits[s] = logprobs[s] >= z.amax(-1)
            if keep:
                kept.append(z.to(hidden.dtype) if half else z)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.kept, ctx.options = kept, (scale, softcap, temperature, rows, compute, half)
        ctx.with_entropy = with_entropy
        ctx.mark_non_differentiable(hits)
        return logprobs, entropy, hits

    @staticmethod
    def backward(ctx, g, g_entropy, _):
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        scale, softcap, temperature, rows, compute, half = ctx.options
        W = weight if half else weight.to(compute)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(W, dtype=compute) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=compute) if bias is not None and ctx.needs_input_grad[2] else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            if ctx.kept:
                logp, ctx.kept[i // rows] = ctx.kept[i // rows].to(compute), None  # frees it after this chunk
            else:
                logp = _logits(hidden[s], W, bias, scale, softcap, temperature).sub_(normalizer[s, None])
            slope = scale / temperature  # dz / d(h W^T + b)
            if softcap is not None:
                tanh = (logp + normalizer[s, None]).mul_(temperature / softcap)
                slope = (1 - tanh.square_()).mul_(slope)
            if not ctx.with_entropy:
                d = logp.exp_().mul_(-g[s, None])
            else:
                pull = (logp + entropy[s, None]).nan_to_num_(neginf=0.0).mul_(g_entropy[s, None]).add_(g[s, None])
                d = logp.exp_().mul_(pull).neg_()
            d.scatter_add_(-1, targets[s, None], g[s, None])  # (rows, V)
            d.mul_(slope) if softcap is not None or slope != 1.0 else d
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(hidden.dtype) if half else d
            d_hidden[s] = d @ W
            if d_weight is not None and half:
                d_weight += torch.mm(d.T, hidden[s], out_dtype=compute)
            elif d_weight is not None:
                d_weight.addmm_(d.T, hidden[s].to(compute))
        ctx.kept = ()
        to = lambda grad, like: None if grad is None else grad.to(like.dtype)
        return d_hidden, to(d_weight, weight), to(d_bias, bias), *[None] * 8


def token_logprobs(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0, entropy=False,
                   hits=False, rows=None, keep=None):  # fmt: skip
    """log pi(y_n | h_n) = z_y - logsumexp(z), with z = softcap tanh(scale (h W^T + b) / softcap) / temperature.

    Never holds the (N, V) logits in memory at once but `rows` of them, in fp32 from operands of any dtype, so 16-bit
    weights cost no precision in the log-probs. Differentiable in hidden, weight and bias under any upstream gradient per
    token, so that a loss stays plain mathematics on the result. For the backward pass the log-probs are kept (`keep`: 3
    matrix products), by default while they take less than KEEP_BYTES, or else recomputed (4 products).

    Args:
        hidden: (N, H) last hidden states, those that predict the targets. targets: (N,) token ids.
        weight: (V, H) output embeddings, tied or not. bias: (V,) or None.
        scale, softcap: constants of the model's head (Cohere, Granite; Gemma), see `head_of`.
        temperature: of the sampling distribution that is to be scored.
        entropy: also return each token's entropy -sum_v p log p, differentiable too.
        hits: also return whether the target is the most likely token.
    Returns: log-probs (N,), or a tuple of them and what else was asked for, each (N,), in nats, fp32.
    Raises: ValueError for shapes that do not fit or a temperature that is not positive.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} "
                         "do not fit (N, H), (V, H), (N,)")  # fmt: skip
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as the model's own head would
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = rows or (2048 if hidden.is_cuda else 128)  # large products on a GPU; chunks that stay in cache on a CPU
    if keep is None:
        keep = len(hidden) * len(weight) * (hidden.element_size() if hidden.is_cuda else 4) <= KEEP_BYTES
    keep = keep and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        result = _TokenLogprobs.apply(
            hidden, weight, bias, targets, scale, softcap, temperature, entropy, hits, rows, keep
        )
    extras = [x for x, wanted in zip(result[1:], (entropy, hits)) if wanted]
    return (result[0], *extras) if extras else result[0]


def sequence_logprobs(model, input_ids, mask, **options):
    """log pi(y_t | y_<t) of the tokens where `mask` is True and 0 elsewhere: (B, T) -> (B, T). `options`: temperature,
    entropy and hits of `token_logprobs`; the last two make it a tuple as there.

    Rows are padded on the right, so a causal model needs neither an attention mask nor position ids: no real token ever
    sees the padding. Only the hidden states that predict a masked token reach the output head. mask[:, 0] must be
    False: nothing predicts a first token.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    source = mask.roll(-1, dims=1)  # position t - 1 predicts token t
    result = token_logprobs(hidden[source], targets=input_ids[mask], **head_of(model), **options)
    spread = lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x)  # (N,) -> (B, T)
    return tuple(map(spread, result)) if isinstance(result, tuple) else spread(result)


@torch.no_grad()
def check_head(model, input_ids) -> None:
    """Refuse a model whose log-probs `sequence_logprobs` cannot reproduce (an unknown head), before it trains wrongly.

    Args: input_ids: one row (T,), T > 1, on the model's device. Runs in the weights' precision, without autocast.
    """
    ids = input_ids[None]
    want = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    want = want.gather(-1, ids[0, 1:, None]).squeeze(-1)
    mask = torch.arange(len(input_ids), device=ids.device)[None] > 0
    gap = (sequence_logprobs(model, ids, mask)[0, 1:] - want).abs().max().item()
    tolerance = 2e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
    if not gap < tolerance:  # NaN too
        fail(f"{type(model).__name__}: log-probs from its hidden states differ from its own logits by {gap:.2g} nats: "
             "its output head does something this code does not know")  # fmt: skip


# ---- KL and masked statistics ----


def kl_estimate(logprobs, ref_logprobs, kind: str):
    """Per-token estimators of KL(pi || ref) for tokens drawn from pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log ref:      value, E over y ~ pi      E of its gradient, as a term of the loss
      k1 = d                        KL(pi || ref), any sign   0: only noise. Use it in the reward
      k2 = d^2 / 2                  biased, >= 0              the gradient of KL(pi || ref)
      k3 = exp(-d) - 1 + d          KL(pi || ref), >= 0       the gradient of KL(ref || pi), the other direction
    In the reward (multiplying grad log pi, not differentiated) only k1 gives the gradient of KL(pi || ref); k2 and k3
    there are biased. In the loss, (pi / pi_old) k3 with its ratio differentiated gives it as well.

    Args: logprobs, ref_logprobs: any equal shape. kind: "k1", "k2" or "k3". Returns: nats, the same shape.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d  # expm1: exp(-d) - 1 loses all digits for small d
    raise ValueError(f"unknown estimator {kind!r}: k1, k2 or k3")


@torch.no_grad()
def exact_kl(hidden, head: dict, ref_hidden, ref_head: dict, temperature=1.0, rows=512):
    """KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v)) of each position over the whole vocabulary: (N,), nats.

    Args: hidden, ref_hidden: (N, H), (N, H'). head, ref_head: from `head_of`. No gradient: a metric, or a test.
    """

    def logp(h, head):
        head = {"bias": None, "scale": 1.0, "softcap": None, **head}
        return torch.log_softmax(_logits(h, head.pop("weight"), temperature=temperature, **head).float(), -1)

    result = []
    for h, ref_h in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
        p = logp(h, head)
        result.append((p.exp() * (p - logp(ref_h, ref_head))).nan_to_num(0.0).sum(-1))
    return torch.cat(result)


def masked_mean(x, mask):
    """Mean of x where mask is True; whatever x holds elsewhere (inf, NaN) reaches neither value nor gradient."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean: bool = True):
    """(x - mean) / std over all masked entries together (population std), plus the mean if not `shift_mean`; 0 elsewhere."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean).square(), mask).sqrt()
    white = (x - mean) / (std + 1e-8) + (0.0 if shift_mean else mean)
    return torch.where(mask, white, 0.0)


# ---- Sampling ----


@torch.no_grad()
def sample(model, prompts: list[list[int]], max_new_tokens: int, eos_ids: list[int], temperature: float = 1.0,
           seed: int = 0, batch_size: int = 256):  # fmt: skip
    """Draw one completion a prompt from softmax(z / temperature) and nothing else (temperature 0: the most likely).

    No top-k, top-p or penalty, whatever the model's generation_config says: what is sampled is what is scored. The
    noise of a row is a function of (seed, row), so batch_size changes memory and not the samples.

    Returns: tokens (B, R), log-probs (B, R) in fp32 and lengths (B,), on the model's device. A row ends with its first
    token of eos_ids, or unfinished at max_new_tokens; beyond its length it holds zeros.
    """
    device, B = model.device, len(prompts)
    noise = torch.rand(B, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs, lengths = torch.zeros(tokens.shape, device=device), torch.zeros(B, dtype=torch.long, device=device)
    stop = torch.tensor(eos_ids, device=device)
    for first in range(0, B, batch_size):
        rows = prompts[first : first + batch_size]
        s, P = slice(first, first + len(rows)), max(map(len, rows))
        ids = torch.tensor([[0] * (P - len(row)) + row for row in rows], device=device)  # padded on the left
        mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=device)
        alive, cache = torch.ones(len(rows), dtype=torch.bool, device=device), None
        for t in range(max_new_tokens):
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)  # fmt: skip
            logp, cache = torch.log_softmax(out.logits[:, -1].float() / (temperature or 1.0), -1), out.past_key_values
            if temperature == 0:
                token = logp.argmax(-1)
            else:  # inverse of the cumulative distribution, in double precision
                cdf = logp.double().exp().cumsum(-1)
                token = torch.searchsorted(cdf, noise[s, t, None] * cdf[:, -1:], right=True).squeeze(-1)
                token = token.clamp(max=logp.shape[-1] - 1)
            tokens[s, t] = token.where(alive, 0)
            logprobs[s, t] = logp.gather(-1, token[:, None]).squeeze(-1).where(alive, 0.0)
            lengths[s] += alive
            alive &= ~torch.isin(token, stop)
            if not alive.any():
                break
            ids, mask = token[:, None], F.pad(mask, (0, 1), value=1)
    R = int(lengths.max())
    return tokens[:, :R], logprobs[:, :R], lengths


# ---- Rows of text to tokens ----


def read_rows(path: str, split: str = "train") -> list[dict]:
    """Rows of a local .jsonl or .json file, or of a Hub id or .parquet file through the optional `datasets` package.

    Each row carries its origin ("file:line") under the key "where", for messages.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json"):
        try:
            text = file.read_text(encoding="utf-8")
            lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            if file.suffix == ".json" and text.lstrip().startswith("["):
                lines = [(i, json.dumps(row)) for i, row in enumerate(json.loads(text), 1)]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            fail(f"{path}: {error}")
        rows = []
        for number, line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected one JSON object a line, found {type(row).__name__}")
            rows.append({**row, "where": f"{path}:{number}"})
    elif file.suffix != ".parquet" and (path.count("/") != 1 or file.parent.exists()):
        fail(f"{path}: not a .jsonl, .json or .parquet file, nor the id of a data set on the Hub (owner/name)")
    else:
        try:
            import datasets
        except ImportError:
            fail(f"{path}: reading Hub ids and .parquet files needs `pip install datasets`")
        try:
            loaded = datasets.load_dataset("parquet", data_files=path, split="train") if file.suffix else \
                datasets.load_dataset(path, split=split)  # fmt: skip
        except Exception as error:  # the package raises dozens of types for a name or network that is wrong
            fail(f"{path}: {error}")
        rows = [{**row, "where": f"{path}:{i}"} for i, row in enumerate(loaded, 1)]
    if not rows:
        fail(f"{path}: no rows")
    return rows


def split_rows(dataset: str, eval_dataset: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): from `eval_dataset`, else the data set's own test file (x.train.jsonl beside
    x.test.jsonl, or x.jsonl beside x_test.jsonl), else every row of one prompt in twenty, so no prompt is on both sides.
    """
    rows, file = read_rows(dataset), Path(dataset)
    siblings = [file.with_name(file.name.replace("train", "test")), file.with_name(f"{file.stem}_test{file.suffix}")]
    own = [str(path) for path in siblings if path != file and path.exists()]
    if eval_dataset or own:
        return rows, read_rows(eval_dataset or own[0], "test")
    key = [json.dumps(row.get("prompt", row.get("messages", row.get("text", row.get("chosen"))))) for row in rows]
    held_out = set(list(dict.fromkeys(key))[::20])
    train = [row for row, k in zip(rows, key) if k not in held_out]
    if not train:
        fail(f"{dataset}: a single prompt is too few to hold some out: pass --eval-dataset")
    return train, [row for row, k in zip(rows, key) if k in held_out]


def segments_of(tokenizer, row: dict, completion: str) -> list[tuple[str, bool, bool]]:
    """A row as segments of text (text, trained?, chat?): `prompt` and its `completion` as texts or message lists,
    `messages` with every assistant turn trained, or `text`, trained as a whole.

    Few chat templates mark the turns, so they are found by rendering prefixes: what a template writes for an assistant
    message behind its own generation prompt is that message's turn.
    """
    where, first = row["where"], 0
    if completion in row and "prompt" in row:
        parts = [row["prompt"], row[completion]]
    else:
        parts = [row[key] for key in ("messages", "text") if key in row][:1]
    if not parts:
        fail(f"{where}: needs prompt and {completion}, messages or text; found {sorted(set(row) - {'where'})}")
    if all(isinstance(part, str) for part in parts):
        return [(part, k == len(parts) - 1, False) for k, part in enumerate(parts)]
    if not all(isinstance(part, list) for part in parts):
        fail(f"{where}: expected texts, or lists of messages with role and content")
    if not tokenizer.chat_template:
        fail(f"{where}: messages need a tokenizer with a chat template; this one has none")
    messages, first = sum(parts, []), len(parts[0]) if len(parts) == 2 else 0
    segments, done = [], ""
    for i, message in enumerate(messages):
        try:
            if i < first or message["role"] != "assistant":
                continue
            render = partial(tokenizer.apply_chat_template, tokenize=False)
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
        except Exception as error:  # a template raises what it likes
            fail(f"{where}: the chat template refuses message {i + 1}: {error!r}")
        if not (before.startswith(done) and after.startswith(before)):
            fail(f"{where}: the chat template rewrites the turns before message {i + 1}; give prompt and completion")
        segments += [(before[len(done) :], False, True), (after[len(before) :], True, True)]
        done = after
    return segments or fail(f"{where}: no assistant message to train on")


def encode(tokenizer, rows: list[dict], eos_ids: list[int], max_length: int, completion: str = "completion"):
    """Each row as (ids, trained), two lists of equal length: [(list[int], list[bool]), ...].

    Segments are tokenized apart and their ids concatenated, so no token straddles a boundary; all but the first behind a
    newline that is cut off again, since some tokenizers put a space before every text. Plain text gets the tokenizer's
    BOS; a chat template brings its own. A row ends with exactly one EOS, appended if missing; what a template writes
    behind it is dropped, or untrained within a row. A completion that exceeds max_length is cut before its EOS.
    """
    segments = [segments_of(tokenizer, row, completion) for row in rows]
    texts = [text for row in segments for text, *_ in row]
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    anchored = tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
    anchor, marked = tokenizer("\n", add_special_tokens=False)["input_ids"], tokenizer("\n")["input_ids"]
    bos = next(marked[:i] for i in range(len(marked)) if marked[i : i + len(anchor)] == anchor)
    pieces, result, cut = iter(zip(plain, anchored)), [], 0
    for row, parts in zip(rows, segments):
        ids, trained = [], []
        for k, (_, train, chat) in enumerate(parts):
            piece, behind = next(pieces)
            if k == 0 and not chat:
                piece = bos + piece
            elif k and behind[: len(anchor)] == anchor:
                piece = behind[len(anchor) :]
            end = max((i + 1 for i, token in enumerate(piece) if token in eos_ids), default=0)  # after the last EOS
            if k == len(parts) - 1:
                while not chat and piece and piece[-1] in eos_ids:
                    piece = piece[:-1]
                piece = piece[:end] if chat and end else piece + eos_ids[:1]
                end = len(piece)
            ids, trained = ids + piece, trained + [train and (i < end or not end) for i in range(len(piece))]
        if len(ids) > max_length:
            if not any(trained[: max_length - 1]):
                fail(f"{row['where']}: the prompt alone fills --max-length {max_length}: raise it or drop the row")
            ids, trained = ids[: max_length - 1] + ids[-1:], trained[: max_length - 1] + [True]
            cut += 1
        result.append((ids, [False, *trained[1:]]))
    if cut:
        print(f"{rows[0]['where'].rpartition(':')[0]}: {cut} of {len(rows)} completions cut to --max-length {max_length}")
    return result
