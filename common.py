"""What the scripts share and what carries no algorithm, in two parts; part I can be copied alone.

I.  Compute: token log-probs straight from hidden states, KL estimators, masked statistics, batches, sampling.
II. Files: rows of text to tokens, models and rewards from folders, the folder of a run.
Shapes: B sequences, T tokens of prompt and completion, R of a response, N scored tokens of a batch, H hidden
size, V vocabulary. Log-probs, entropies and KL are in nats and in fp32 whatever the weights are.
"""

import contextlib
import copy
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache, partial
from itertools import combinations, islice, takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig)

warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable")  # transformers 5.17 has no other name
KEEP_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # token_logprobs keeps up to so much for the backward pass
LOOK = {"cpu": 1, "cuda": 16}  # steps of the sampler from one look at which rows have ended to the next
SPAN = {"cpu": 1, "cuda": 128}  # its attention sees a multiple of so many places

# ==== I. Compute ======================================================================================
# ---- Token log-probs ----
def head_of(model):
    """The output head of a causal language model as keyword arguments of `token_logprobs`."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return {"weight": head.weight, "bias": getattr(head, "bias", None), "scale": multiplier / divisor,
            "softcap": getattr(config, "final_logit_softcapping", None)}  # Gemma

def _autocast(*operands):
    """These in the dtype in which the model's own layers would multiply them."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in operands]

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
    """Logits live one chunk of rows at a time, and backward dz = -g (p - 1[y]) - g_H p (log p + entropy).
    W is multiplied; weight, the same in fp32, is there for its gradient."""
    @staticmethod
    def forward(ctx, hidden, weight, W, bias, targets, head, rows, keep, entropy, hits):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        half = hidden.is_cuda and hidden.dtype == W.dtype != dtype  # 16-bit operands, fp32 products
        W = W if half else W.to(dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        normalizer = torch.empty_like(logprobs)
        entropies = torch.zeros_like(logprobs)
        is_top = torch.zeros_like(targets, dtype=torch.bool)
        kept = []
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            y = targets[s, None]
            z = _logits(hidden[s], W, bias, *head)  # (rows, V)
            normalizer[s] = z.gather(1, y).flatten()
            z = z.log_softmax(-1)
            logprobs[s] = z.gather(1, y).flatten()
            if entropy:
                entropies[s] = -z.exp().mul_(z).nansum(-1)  # 0 log 0 is 0
            if hits:
                is_top[s] = z.argmax(-1) == targets[s]
            if keep:
                kept.append(z.to(W.dtype))
        normalizer -= logprobs
        ctx.save_for_backward(hidden, W, bias, targets, logprobs, normalizer, entropies)
        ctx.kept, ctx.options = kept, (head, rows, dtype, half)
        ctx.mark_non_differentiable(is_top)
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs the backward pass nothing
        return logprobs, entropies, is_top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_entropy, _):
        hidden, W, bias, targets, logprobs, normalizer, entropies = ctx.saved_tensors
        head, rows, dtype, half = ctx.options
        scale, softcap, temperature = head
        if ctx.kept and ctx.kept[0] is None:
            raise RuntimeError("the first backward pass freed the log-probs: a second one needs keep=False")
        g = torch.zeros_like(logprobs) if g is None else g
        product = {"out_dtype": dtype} if half else {}
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(W, dtype=dtype) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[3] else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            y = targets[s, None]
            if ctx.kept:
                logp = ctx.kept[i // rows]
                ctx.kept[i // rows] = None  # freed after its chunk
            else:
                logp = _logits(hidden[s], W, bias, *head).log_softmax(-1)
            factor = g[s, None] * (-scale / temperature)
            if softcap is not None:
                tanh = (logp + normalizer[s, None]).mul_(temperature / softcap)
            if g_entropy is None:  # g is a factor of its row, and d (rows, V) is p - 1[y]
                d = logp.exp_()
                d_target = logprobs[s, None].expm1()  # exact, in 16 bits too
                d.scatter_(-1, y, d_target.to(d.dtype))
            else:
                factor = torch.full_like(factor, -scale / temperature)
                logp = logp.to(dtype)
                pull = (logp + entropies[s, None]).nan_to_num_(neginf=0.0)
                pull = pull * g_entropy[s, None] + g[s, None]
                d = logp.exp().mul_(pull)
                d.scatter_add_(-1, y, -g[s, None])
            if softcap is not None:
                d = (1 - tanh.square_()).mul_(d)
            d = d.to(W.dtype)
            d_hidden[s] = torch.mm(d, W, **product).mul_(factor)
            if d_bias is not None:
                d_bias += (d * factor).sum(0)
            if d_weight is not None:
                h = hidden[s].mul(factor).to(W.dtype)
                torch.addmm(d_weight, d.T, h, out=d_weight, **product)
        return d_hidden, d_weight, None, d_bias, *[None] * 6

def token_logprobs(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0,
                   entropy=False, hits=False, rows=None, keep=None):
    """log pi(y_n | h_n) = z_y - logsumexp(z), z = softcap tanh(scale (h W^T + b) / softcap) / temperature.
    Computes the logits `rows` at a time, in fp32 from operands of any dtype, so 16-bit weights cost the
    log-probs no precision; differentiable under any upstream gradient per token. For the backward pass one
    copy of the log-probs is kept (`keep`: 3 matrix products), by default up to KEEP_BYTES, or recomputed (4).
    Args: hidden (N, H), the last hidden states that predict the targets (N,); weight (V, H), bias (V,) or
    None, scale and softcap of the output head, see `head_of`; temperature of the distribution to score;
    entropy, hits: return too each token's -sum_v p log p, differentiable, and whether it is the likeliest.
    Returns: log-probs (N,) in nats, fp32, or a tuple with what else was asked for, (N,) each.
    Raises: ValueError for shapes that do not fit or a temperature that is not positive."""
    if not hidden.dim() == weight.dim() == 2 or targets.shape + weight.shape[1:] != hidden.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
                         f"{tuple(targets.shape)}; expected (N, H), (V, H) and (N,)")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    device = hidden.device.type
    hidden, W = _autocast(hidden, weight)  # the gradient of an fp32 weight stays a sum in fp32
    if rows is None:
        rows = 2048 if hidden.is_cuda else 128  # large products on a GPU, chunks in cache on a CPU
    if keep is None:
        bytes_per_logit = hidden.element_size() if hidden.is_cuda else 4
        keep = len(hidden) * len(weight) * bytes_per_logit <= KEEP_BYTES.get(device, 0)
    keep = keep and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        logprobs, entropies, is_top = _TokenLogprobs.apply(
            hidden, weight, W, bias, targets, (scale, softcap, temperature), rows, keep, entropy, hits)
    extras = [x for x, wanted in ((entropies, entropy), (is_top, hits)) if wanted]
    return (logprobs, *extras) if extras else logprobs

# ---- Rows without padding ----
def take(x, index):
    """x[index] of x (N, ...), with a backward pass that is quick on a CPU."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])

class Rows:
    """A batch as one long row of the N tokens up to those needed. Rows share a beginning that is the same, as
    are its states then. ids, positions: (1, N); place (B, T): where in there the batch's tokens are."""
    def __init__(self, input_ids, needed):
        send = partial(to_device, device=input_ids.device)
        needed = needed.flip(1).cummax(1).values.flip(1)
        ids = input_ids.where(needed, -1).cpu()  # the one wait for a GPU; what follows is quicker here
        order = ids.unique(dim=0, return_inverse=True)[1].argsort()
        ids = ids[order]  # rows that begin alike are neighbours
        needed = ids >= 0
        same = F.pad(ids[1:] == ids[:-1], (0, 0, 1, 0))
        new = needed & (same.cumprod(1) == 0)  # what is not the same as in the row above, up to here
        count = new.flatten().cumsum(0) - 1
        place = count.view(new.shape).where(new, 0).cummax(0).values  # shared: of the row in which it is new
        self.place = send(place[order.argsort()])
        self.ids = send(ids[new][None])
        self.positions = send(new.nonzero()[:, 1][None])
        queries, keys = new.sum(1), needed.sum(1)
        ends = [F.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in (queries, keys)]
        self.sizes = *map(send, ends), int(queries.max()), int(keys.max())  # for varlen_attn: ends, longest
        self.keys = send(place[needed])
        size = len(ids) if input_ids.is_cuda else 1 + 65536 // ids.shape[1] ** 2
        padded, self.lengths, self.counts = new.clone(), [], []  # else a few rows at a time
        for part in padded.split(size):
            length = int(last_token(part).max()) + 1
            part[:, :length] = True
            self.lengths.append(length)
            self.counts.append(length * len(part))
        self.padded = send(place[padded])  # the tokens of all parts, one part behind the other
        self.fresh = send(new[padded].nonzero().flatten())  # which of them are new

    def forward(self, model, ids, positions):
        """Last hidden states. With a mask of four dimensions transformers makes none of its own."""
        mask = ids.new_ones(1, 1, 1, 1)
        out = body_of(model)(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, rows=self)
        return out.last_hidden_state

    def attend(self, layer, query, key, value, scale, window):
        """Causal attention of each row to itself: query (1, heads, N, d) -> (1, N, heads, d)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
        d = q.shape[-1]
        fits = q.element_size() == 2 and d == v.shape[-1] <= 256 and d % 8 == 0
        if q.is_cuda and fits and torch.cuda.get_device_capability() >= (8, 0):
            if len(self.keys) > len(k):  # some are of several rows
                k, v = take(k, self.keys), take(v, self.keys)
            from torch.nn.attention.varlen import varlen_attn  # not above: this takes a second
            options = {"scale": scale, "window_size": (window - 1, 0)}  # so many before it, and with -1 all
            if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 needs no word
                options["enable_gqa"] = True
            return varlen_attn(q, k, v, *self.sizes, **options)[None]
        outputs = []
        padded = [take(x, self.padded).split(self.counts) for x in (q, k, v)]
        for t, *rows in zip(self.lengths, *padded):
            rows = [x.unflatten(0, (-1, t)).transpose(1, 2) for x in rows]  # (b, heads, t, d) each
            seen = None
            if 0 < window < t:
                seen = self.ids.new_ones(t, t).tril().triu(1 - window).bool()
            output = F.scaled_dot_product_attention(
                *rows, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return take(torch.cat(outputs), self.fresh)[None]

def body_of(model):
    """The model below its head; of one that `shard` has spread, as a forward pass of the whole."""
    return getattr(model, "sharded_body", model.base_model)

def has_rows(model):
    """Whether this model's layers attend as `Rows` say, which `use_rows` lets them do."""
    return model.config._attn_implementation == "rows"

def states(model, input_ids, needed):
    """Last hidden states of the tokens where `needed` (B, T) is True: (n, H)."""
    if not len(input_ids):  # a rank without rows: no state, of a model that has run all the same
        return body_of(model)(input_ids=input_ids.new_zeros(1, 1), use_cache=False).last_hidden_state[0, :0]
    if not has_rows(model):
        return body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[needed]
    rows = Rows(input_ids, needed)
    index = rows.place[needed]  # before the model is called, so that a GPU has no reason to wait
    return take(rows.forward(model, rows.ids, rows.positions)[0], index)

def sequence_logprobs(model, input_ids, mask, **options):
    """log pi(y_t | y_<t) where `mask` is True and 0 elsewhere: (B, T) -> (B, T), or a tuple with what
    `options` of `token_logprobs` ask for. Rows are padded on the right; nothing predicts a first token."""
    source = mask.roll(-1, dims=1)  # position t - 1 predicts token t
    targets, hidden = input_ids[mask], states(model, input_ids, source)
    result = token_logprobs(hidden, targets=targets, **head_of(model), **options)
    spread = lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x)  # (N,) -> (B, T)
    return tuple(map(spread, result)) if isinstance(result, tuple) else spread(result)

def token_values(model, input_ids, needed=None):
    """The score head where `needed` (default: at each token), else 0: (B, T) -> (B, T). V_t is at t - 1."""
    needed = input_ids >= 0 if needed is None else needed
    hidden = states(model, input_ids, needed)
    head = getattr(model, "score", None) or model.classifier
    with torch.autocast(hidden.device.type, enabled=False):
        values = head(hidden.to(head.weight.dtype))  # (n, 1)
    return values.new_zeros(needed.shape).masked_scatter(needed, values)

# ---- KL and masked statistics ----
def kl_estimate(logprobs, ref_logprobs, kind):
    """Estimators of KL(pi || ref) from tokens drawn from pi (Schulman 2020, joschu.net/blog/kl-approx).
    With d = log pi - log ref:      value, mean over y ~ pi     mean gradient, as a term of the loss
      k1 = d                        KL(pi || ref), any sign     0, only noise: it belongs in the reward
      k2 = d^2 / 2                  biased, >= 0                that of KL(pi || ref)
      k3 = exp(-d) - 1 + d          KL(pi || ref), >= 0         that of KL(ref || pi), the other direction
    In the reward, where the estimate multiplies grad log pi, k1 gives the gradient of KL(pi || ref); k2 and
    k3 do not. In the loss, k3 times the differentiated ratio pi / pi_old gives it too. Nats, in any shape."""
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d  # exp(-d) - 1 would lose every digit of a small d
    raise ValueError(f"unknown estimator {kind!r}: k1, k2 or k3")

def masked_mean(x, mask):
    """Mean of x where mask is True, 0 if nowhere. No inf or NaN elsewhere in x reaches value or gradient."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)

def masked_whiten(x, mask):
    """(x - mean) / population standard deviation over all masked entries; 0 elsewhere."""
    x = torch.where(mask, x, 0.0)
    centered = x - masked_mean(x, mask)
    std = masked_mean(centered.square(), mask).sqrt()
    return torch.where(mask, centered / (std + 1e-8), 0.0)

# ---- Batches: a dict of (B, T) tensors on the CPU, padded on the right; a device gets micro-batches ----
def to_device(x, device):
    """A tensor of the CPU on the device; on CUDA without waiting until it is there."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)

def pad(rows, device, value=0):
    """Lists to a tensor (B, T), padded on the right. Masks say what counts, never the padding's value."""
    T = max(map(len, rows), default=1)
    x = torch.tensor([row + [value] * (T - len(row)) for row in rows], dtype=torch.tensor(value).dtype)
    return to_device(x.view(len(rows), T), device)

def last_token(mask):
    """Index of each row's last True column: (B, T) -> (B,)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)

# ---- Sampling ----
class PaddedCache:
    """transformers' own keys and values of B rows that are sampled, behind prompts padded on the left."""
    def __init__(self, model, prompts, room):
        self.model, self.past = model, {}
        self.ids = pad([prompt[::-1] for prompt in prompts], model.device).flip(1)
        self.mask = pad([[1] * len(prompt) for prompt in prompts], model.device).flip(1)

    def step(self, token=None):
        """Last hidden states (B, H): of the prompts, then of one more token (B,) each time."""
        if token is not None:
            self.ids, self.mask = token[:, None], F.pad(self.mask, (0, 1), value=1)
        position = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        out = body_of(self.model)(
            input_ids=self.ids, attention_mask=self.mask, position_ids=position, use_cache=True, **self.past)
        self.past = {name: out[name] for name in out.keys() & {"cache", "past_key_values"}}  # or its old name
        return out.last_hidden_state[:, -1]

class RowsCache(Rows):
    """The same for models with `Rows`: in memory taken once, each distinct prompt computed once."""
    use_graphs = True  # until a model cannot

    def __init__(self, model, prompts, room):
        self.model, self.room, self.layers, self.graphs = model, room, {}, {}
        prompt = pad([[True] * len(prompt) for prompt in prompts], model.device, False)  # (B, P)
        super().__init__(pad(prompts, model.device), prompt)
        self.width = prompt.shape[1]
        self.seen = torch.where(F.pad(prompt, (0, room)), 0.0, -math.inf)  # (B, P + room), a mask to add
        self.last = last_token(prompt)[:, None]

    def step(self, token=None):
        if token is None:
            hidden = self.forward(self.model, self.ids, self.positions)[0]
            return hidden[self.place.gather(1, self.last).flatten()]
        self.last += 1
        self.seen.scatter_(1, self.last, 0.0)
        self.width += 1
        span = SPAN[token.device.type]
        self.span = min(-(-self.width // span) * span, self.seen.shape[1])
        if token.is_cuda and RowsCache.use_graphs:
            return self.replay(token[:, None])[:, 0]
        return self.forward(self.model, token[:, None], self.last)[:, 0]

    def replay(self, token):
        """forward(token) from a CUDA graph, one a span, in the same memory: kernels are slower to launch."""
        if self.span not in self.graphs:
            fixed = token.clone()
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            hidden = self.forward(self.model, fixed, self.last)  # before, for libraries make plans
            try:
                with torch.cuda.graph(graph):
                    hidden = self.forward(self.model, fixed, self.last)
            except RuntimeError:  # in a step that waits for the GPU, as some mixtures of experts do
                torch.cuda.set_stream(stream)
                RowsCache.use_graphs = False
                return hidden
            self.graphs[self.span] = graph, fixed, hidden
        graph, fixed, hidden = self.graphs[self.span]
        fixed.copy_(token)
        graph.replay()
        return hidden

    def attend(self, layer, query, key, value, scale, window):
        if layer not in self.layers:  # the prompts
            self.layers[layer] = []
            for x in (key, value):
                x = take(x[0].transpose(0, 1), self.place)  # (B, P, heads, d)
                self.layers[layer].append(F.pad(x, (0, 0, 0, 0, 0, self.room)))
            return super().attend(layer, query, key, value, scale, window)
        rows = torch.arange(len(key), device=key.device)
        for memory, x in zip(self.layers[layer], (key, value)):
            memory[rows, self.last.flatten()] = x.squeeze(2)
        k, v = (memory[: len(key), : self.span].transpose(1, 2) for memory in self.layers[layer])
        seen = self.seen[:, : self.span].to(k.dtype)
        if window:
            is_old = torch.arange(self.span, device=seen.device) <= self.last - window
            seen = seen.masked_fill(is_old, -math.inf)
        q = query.unflatten(1, (k.shape[1], -1)).squeeze(3)  # heads that share keys, as its queries
        output = F.scaled_dot_product_attention(q, k, v, seen[:, None, None], scale=scale)
        return output.flatten(1, 2)[:, None]

    def keep(self, rows):
        """Let all other rows leave."""
        for pair in self.layers.values():
            for x in pair:
                x[: len(rows), : self.width] = x[rows, : self.width]
        self.last, self.seen, self.graphs = self.last[rows], self.seen[rows], {}

def pick(weights, noise):
    """(where the cumulative sum of weights (B, n) passes its share `noise` (B, 1): (B, 1); that sum)."""
    ends = weights.cumsum(1, dtype=torch.float64)
    place = torch.searchsorted(ends, noise * ends[:, -1:], right=True)
    return place.clamp(max=weights.shape[1] - 1), ends

def draw(z, noise):
    """Tokens of softmax(z) and their log-probs, (B,) each, by noise (B,) in [0, 1); z (B, V) is used up."""
    p = z.sub_(z.amax(1, keepdim=True)).exp_()
    V = p.shape[1]
    noise = noise[:, None]
    if V <= 256:
        token, ends = pick(p, noise)
    else:  # first a block of 64 tokens is drawn, and then one of these
        blocks = F.pad(p, (0, -V % 64)) if V % 64 else p
        blocks = blocks.unflatten(1, (-1, 64))
        masses = blocks.sum(2)  # (B, V / 64)
        block, ends = pick(masses, noise)
        share = (noise * ends[:, -1:] - ends.gather(1, block)) / masses.gather(1, block) + 1  # of the block
        place, _ = pick(blocks.take_along_dim(block[..., None], 1).squeeze(1), share)
        token = (64 * block + place).clamp(max=V - 1)
    logp = (p.gather(1, token) / ends[:, -1:]).log()
    return token.flatten(), logp.flatten().to(z.dtype)

@torch.inference_mode()
def sample(model, prompts, max_new_tokens, eos_ids, temperature=1.0, seed=0, batch_size=256, first=0):
    """A response to each prompt, a list of ids, from softmax(z / temperature), at 0 the likeliest tokens; its
    noise is a function of (seed, first + row). Returns a batch on the CPU: input_ids, mask, logprobs."""
    device, training, head = model.device, model.training, head_of(model)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(first + len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    noise = noise[first:].to(device)
    tokens = torch.zeros_like(noise, dtype=torch.long)
    logprobs = torch.zeros(noise.shape, device=device)
    lengths, stop = tokens.new_zeros(len(prompts)), tokens.new_tensor(eos_ids)
    kind = RowsCache if has_rows(model) else PaddedCache
    model.eval()  # activation checkpointing, which is for training mode, would leave the cache empty
    for rows in torch.arange(len(prompts), device=device).split(batch_size):  # those still in the batch
        cache = kind(model, [prompts[row] for row in rows.tolist()], max_new_tokens)
        alive = rows >= 0  # which of them have no EOS yet
        token = None
        for t in range(max_new_tokens):
            hidden, head["weight"] = _autocast(cache.step(token), head["weight"])
            with torch.autocast(device.type, enabled=False):  # fp32 logits, as in scoring
                z = _logits(hidden, **head, temperature=temperature or 1.0)  # (rows, V)
            if not temperature:
                token = z.argmax(-1)
                logp = z.amax(1) - z.logsumexp(1)
            else:
                token, logp = draw(z, noise[rows, t])
            tokens[rows, t], logprobs[rows, t] = token, logp
            lengths[rows] += alive
            alive &= ~torch.isin(token, stop)
            if t % LOOK[device.type] == 0:
                left = alive.nonzero().flatten()
                if not len(left):
                    break
                if len(left) < 0.75 * len(rows) and kind is RowsCache:  # those that have ended leave
                    cache.keep(left)
                    rows, token, alive = rows[left], token[left], alive[left]
    model.train(training)
    input_ids, mask, scores = [], [], []
    for prompt, row, logp, length in zip(prompts, tokens.tolist(), logprobs.tolist(), lengths.tolist()):
        input_ids.append(prompt + row[:length])
        mask.append([False] * len(prompt) + [True] * length)
        scores.append([0.0] * len(prompt) + logp[:length])
    with torch.inference_mode(False):  # tensors that a backward pass may use
        return {"input_ids": pad(input_ids, "cpu"), "mask": pad(mask, "cpu", False),
                "logprobs": pad(scores, "cpu", 0.0)}

# ==== II. Files =======================================================================================
TEXTS = "prompt completion chosen rejected messages text".split()  # columns that the scripts read
UNREAD = "image images video videos audio audios system parent_id".split()  # and do not
WRITTEN_LIST = re.compile(r"\s*\[\s*{\s*.(role|from|content|value)\b")  # of messages, in a string

def fail(message):
    """Bad input ends a script with one line on stderr and exit code 2, without a traceback."""
    line = " ".join(str(message).split())[:1000]
    if ranks()[0]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)  # if rank 0 says it too, torchrun ends this process by then
    print(f"error: {line}\n", end="", file=sys.__stderr__ if ranks()[0] else sys.stderr)
    raise SystemExit(2) from None  # by which `blame` knows it

@contextlib.contextmanager
def blame(what, file=""):
    """Any error inside is bad input: a line with `what`, the error, and its line in the user's own `file`."""
    kinds = BaseException if file else (Exception, SystemExit)
    try:
        yield
    except kinds as error:
        is_said = isinstance(error, SystemExit) and error.code == 2 and error.__suppress_context__
        if isinstance(error, KeyboardInterrupt) or is_said:
            raise
        trace = traceback.extract_tb(error.__traceback__)
        places = [f"{file}:{frame.lineno}: " for frame in trace if frame.filename == os.path.abspath(file)]
        fail(f"{what}: {places[-1] if places else ''}{type(error).__name__}: {error}")

def on_error(kind, error, trace):
    """Errors that no `blame` has met: in a line if they need no traceback."""
    if kind is torch.OutOfMemoryError:
        kind, error = SystemExit, f"{error}: lower --micro-batch-size, or set --gradient-checkpointing"
    if ranks()[1] > 1 and re.search("gloo|NCCL|onnection", str(error)):
        kind, error = SystemExit, f"another process of this run has ended: {error}"
    if kind is SystemExit:
        with contextlib.suppress(SystemExit):
            fail(error)
    elif kind is BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif kind is not KeyboardInterrupt:
        sys.stderr = sys.__stderr__
        sys.__excepthook__(kind, error, trace)

# ---- Several devices: each rank of torchrun runs the whole program, and of loops over rows its share ----
def ranks():
    """(this process's rank, how many there are)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()

def shares(n, size):
    """This rank's share of n rows: slices of at most `size`, as many on each, since ranks of shards wait."""
    rank, world = ranks()
    count = world * max(-(-n // (size * world)), 1)
    cuts = [i * n // count for i in range(count + 1)]
    return [slice(*pair) for pair in zip(cuts, cuts[1:])][rank::world]

def over_ranks(x, op="SUM"):
    """x, summed in place over the ranks, or their MAX. Each holds 0 where it has done nothing."""
    if ranks()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x

def clip_gradients(model, max_norm):
    """Sum the gradient over the ranks and clip it to this norm. Returns its norm before that."""
    parameters = list(model.parameters())
    if ranks()[1] > 1 and not hasattr(model, "sharded_body"):  # there, the backward pass sums
        used = over_ranks(torch.tensor([p.grad is not None for p in parameters]).int(), "MAX")
        for p, is_used in zip(parameters, used.tolist()):
            if is_used:  # by some rank: not each gets tokens to each expert
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                over_ranks(p.grad)
    return full(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

def lighten(args, autocast, *models):
    """Give models, or None, adapters and shards, or else frozen layers the bits that products see anyway."""
    linear = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    for model in filter(None, dict.fromkeys(models)):
        if args.lora_rank and any(p.requires_grad for p in model.parameters()):
            add_adapters(model, args)
        if args.shard and ranks()[1] > 1:
            shard(model)
        else:
            layers = [layer for layer in model.base_model.modules() if isinstance(layer, linear)]
            frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
            with autocast():
                for p in frozen:
                    (p.data,) = _autocast(p.data)

def add_adapters(model, args):
    """Train low-rank adapters (arXiv:2106.09685) of all linear layers of the body, and the head of scores."""
    with blame("--lora-rank needs `pip install peft`"):
        import peft
        torch.manual_seed(args.seed)
        config = peft.LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear",
            exclude_modules=["score", "classifier"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one has no such head, another its weights transposed
            model.adapters = (peft.get_peft_model(model, config),)  # in place; a tuple is no part of it
    for name in ("score", "classifier"):
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)

def shard(model):
    """Spread weights, gradients and optimizer states over the ranks by FSDP2."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    kinds = model._no_split_modules or ()
    for module in [m for m in model.modules() if type(m).__name__ in kinds] + [model]:
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)  # sums, as denominators are the whole step's
        module.set_force_sum_reduction_for_comms(True)
    model.sharded_body = lambda **inputs: model.base_model(**inputs)
    register_fsdp_forward_method(model, "sharded_body")

@contextlib.contextmanager
def unsharded(model):
    """All weights on every rank, to sample: ranks take different numbers of steps, and none may wait."""
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()

def full(x):
    """A tensor that may be sharded, put together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

def whole(tensors):
    """A dict with its sharded tensors put together, one by one, in the memory of rank 0's CPU."""
    tensors = dict(tensors)
    for name, x in tensors.items():
        if hasattr(x, "full_tensor"):
            x = full(x)
            tensors[name] = None if ranks()[0] else x.cpu()
    return tensors

def like(x, p):
    """A whole tensor x as the parameter p is: with this rank's part alone, if p is sharded."""
    if not hasattr(p, "placements") or x.shape != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)

def without_adapters(model):
    """The model as it was before --lora-rank."""
    return model.adapters[0].disable_adapter() if hasattr(model, "adapters") else contextlib.nullcontext()

def state_of(part):
    """What --resume needs of a model, its trained weights, or of an optimizer, whole."""
    if isinstance(part, torch.nn.Module):
        return whole({name: p.detach() for name, p in part.named_parameters() if p.requires_grad})
    state = part.state_dict()
    state["state"] = {i: whole(values) for i, values in state["state"].items()}
    return state

def load_state(part, state):
    """The inverse of `state_of`, on any number of ranks."""
    if isinstance(part, torch.nn.Module):
        trained = {name: like(state[name], p) for name, p in part.named_parameters() if p.requires_grad}
        part.load_state_dict(trained, strict=False)
    else:
        parameters = [p for group in part.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            values.update({name: like(x, parameters[i]) for name, x in values.items()})
        part.load_state_dict(state)

@torch.no_grad()
def save_model(model, tokenizer, folder):
    """A folder that transformers, TRL and vLLM load, with adapters merged and shards put together."""
    if hasattr(model, "adapters"):
        model.float()
        layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        with unsharded(model):
            deltas = [layer.get_delta_weight("default") for layer in layers]
        for layer, delta in zip(layers, deltas):
            weight = layer.base_layer.weight
            weight.data += like(delta, weight)
        model.adapters[0].unload()
    weights = None
    if hasattr(model, "sharded_body"):
        state = model.state_dict(keep_vars=True)
        names = {id(x): name for name, x in reversed(state.items())}  # tied weights once
        weights = whole({name: state[name].detach() for name in names.values()})
    if not ranks()[0]:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

# ---- Rows of text to tokens: a row is a dict of columns, and "_where" its origin, file:line ----
def read_rows(path, *layouts, split="train"):
    """Rows with the columns of a layout such as "prompt completion", of a file, or by `datasets` a Hub id."""
    file, result = Path(path), []
    is_parquet = file.suffix == ".parquet"
    if is_parquet or path.count("/") == 1 and "json" not in file.suffix and not file.parent.exists():
        with blame(f"{path} (.parquet files and Hub ids need `pip install datasets`)"):
            import datasets
            source = {"path": "parquet", "data_files": path} if is_parquet else {"path": path}
            rows = datasets.load_dataset(**source, split="train" if is_parquet else split)
    else:
        with blame(f"{path}: neither a .jsonl, .json or .parquet file nor a data set's Hub id (owner/name)"):
            text = file.read_text(encoding="utf-8-sig")  # lines, or one list of all rows
            rows = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    for number, row in enumerate(rows, 1):
        if isinstance(row, str) and not row.strip():
            continue
        where = f"{path}:{number}"
        with blame(f"{where}: expected a JSON object with named columns"):
            row = dict(json.loads(row) if isinstance(row, str) else row)
            row = {name: x for name, x in row.items() if x is not None or name not in TEXTS}
            json.dumps(row, ensure_ascii=False, default=str).encode()  # half of a surrogate pair is no text
        if not any(row.keys() >= set(layout.split()) for layout in layouts or [""]):
            fail(f"{where}: needs {' | '.join(layouts)}; has {sorted(row)}: see data/convert.py")
        for name, value in row.items() if layouts else ():
            is_text = isinstance(value, str) and not WRITTEN_LIST.match(value)
            is_talk = isinstance(value, list) and all(isinstance(message, dict) for message in value)
            if name in TEXTS and not (is_text or is_talk) or name in UNREAD and value:
                fail(f"{where}: {name}: read are text or messages of role and content: see data/convert.py")
        result.append(row | {"_where": where})
    return result or fail(f"{path}: no rows")

def split_rows(dataset, eval_dataset, *layouts):
    """(training rows, held-out rows): of eval_dataset, x.test or x_test beside x, else 1 prompt in 20."""
    rows, file = read_rows(dataset, *layouts), Path(dataset)
    for name in (file.name.replace("train", "test"), f"{file.stem}_test{file.suffix}"):
        if not eval_dataset and name != file.name and file.with_name(name).exists():
            eval_dataset = str(file.with_name(name))
    if eval_dataset:
        return rows, read_rows(eval_dataset, *layouts, split="test")
    prompts = []
    for row in rows:  # what precedes the first answer
        first = next(row[name] for name in ("prompt", "messages", "chosen", "text") if name in row)
        if isinstance(first, list):
            first = list(takewhile(lambda message: "'role': 'assistant'" not in str(message), first))
        prompts.append(str(first).split("\n\nAssistant:")[0])
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        fail(f"{dataset}: a single prompt, so none can be held out: pass --eval-dataset")
    held_out = set(distinct[::20])
    train = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    return train, [row for row, prompt in zip(rows, prompts) if prompt in held_out]

def renderer(tokenizer, row, messages, eos_ids=()):
    """The chat template with the row's tools, messages -> text. Refused: what it would leave out."""
    ends = [tokenizer.eos_token or "\0", *tokenizer.convert_ids_to_tokens(eos_ids)]
    with blame(f"{row['_where']}: expected messages with role and content that the chat template renders"):
        tools = row.get("tools") or None
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"  # in place of today's date
        template += tokenizer.get_chat_template(tools=tools)
        render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False, chat_template=template,
                         **(row.get("chat_template_kwargs") or {}))
        marked = []
        for i, message in enumerate(messages):
            if isinstance(message.get("content"), list):  # of parts
                message["content"] = "".join(part["text"] for part in message["content"]) or None
            if message.get("tool_calls"):
                message["content"] = message.get("content") or ""
            for end in ends:
                if end in message["role"] + message["content"] and "_sampled" not in row:
                    raise ValueError(f"message {i + 1} holds {end}, which would end it")
            marked.append(message | {"content": message["content"] + f"<message {i}>"})
        text = render(marked)
        beside = {"tool_calls", "function_call", "reasoning_content", "thinking", "weight"}
        for i, message in enumerate(messages):
            if f"<message {i}>" not in text and not message.get("tool_calls"):
                raise ValueError(f"message {i + 1}, of role {message['role']}, is left out")
            for name in beside & message.keys():
                without = list(marked)
                without[i] = {**marked[i], name: None}
                if message[name] not in (None, "", [], 1) and render(without) == text:
                    raise ValueError(f"{name} of message {i + 1} is left out")
        if tools and text == render(marked, tools=None):
            raise ValueError("the tools are left out")
    return render

def segments_of(tokenizer, row, eos_ids, completion):
    """A row as [(text, trained?, chat?), ...]; a turn is what is rendered behind its generation prompt."""
    where = row["_where"]
    layouts = ["prompt", completion], ["messages"], ["text"]
    names = next(names for names in layouts if set(names) <= set(row))
    parts = [row[name] for name in names]
    types = {type(part) for part in parts}
    if types == {str} and names != ["messages"]:
        return [(part, k == len(parts) - 1, False) for k, part in enumerate(parts)]
    if types != {list}:
        fail(f"{where}: {' and '.join(names)} must be text, or lists of messages with role and content")
    messages = sum(parts, [])
    render = renderer(tokenizer, row, messages, eos_ids)
    segments, done = [], ""
    for i in range(len(messages)):
        is_prompt = i < max(len(messages) - len(parts[-1]), 1)  # a greeting, too
        if is_prompt or messages[i]["role"] != "assistant":
            continue
        with blame(f"{where}: the chat template refuses message {i + 1}"):
            before = render(messages[:i], add_generation_prompt=True)
            after = render(messages[: i + 1])
        if "_sampled" in row and not after.startswith(before):  # it is scored all the same
            before = os.path.commonprefix([render(messages[:i]), after])
        elif not (before.startswith(done) and after.startswith(before)):
            fail(f"{where}: the chat template rewrites the turns before {i + 1}: give them as prompt")
        turn = after[len(before) :]
        words = re.split(r"\s+|(?<=>)|(?=<)", messages[i]["content"])
        left_out = [word for word in words if word not in before[-20:] + turn]
        if left_out and "_sampled" not in row:
            fail(f"{where}: the chat template leaves out {left_out[0]!r} of message {i + 1}")
        segments.append((before[len(done) :], False, True))
        segments.append((turn, True, True))
        done = after
    return segments or fail(f"{where}: no assistant message to train on")

def words_of(tokenizer):
    """(text or texts -> ids without special ones; ids -> the same with a BOS, if a text has one)."""
    bare = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    with blame(f"the tokenizer of {tokenizer.name_or_path} has no ids for text"):
        known = next(letter for letter in "a0." if bare(letter))
        marked = tokenizer(known)["input_ids"]
        bos = marked[: marked.index(bare(known)[0])]
    return bare, lambda ids: ids if ids[: len(bos)] == bos else bos + ids

def encode(tokenizer, rows, eos_ids, max_length, completion="completion"):
    """(ids, trained) of each row: one EOS ends it, untrained where cut; None if prompts fill max_length."""
    bare, begin = words_of(tokenizer)
    newline = bare("\n")
    specials = set(tokenizer.get_added_vocab().values())
    rows_shown = tqdm(rows, "rows", delay=3, disable=None)
    segments = [segments_of(tokenizer, row, eos_ids, completion) for row in rows_shown]
    texts = []
    for parts in segments:
        first, *others = [text for text, *_ in parts]
        texts += [first, *("\n" + text for text in others)]
    distinct = list(dict.fromkeys(texts))  # both sides of a pair have one prompt
    ids_of = {}
    for i in range(0, len(distinct), 1000):  # fast, and small
        part = distinct[i : i + 1000]
        ids_of.update(zip(part, bare(part)))
    pieces = map(ids_of.get, texts)
    result, num_cut = [], 0
    for row, parts in zip(rows, segments):
        ids, trained = [], []
        for k, (text, train, chat) in enumerate(parts):
            piece = next(pieces)
            is_last = k == len(parts) - 1
            if k == 0:
                piece = piece if chat else begin(piece)
            elif ids and ids[-1] in specials:  # some tokenizers put a space behind these
                piece = bare(tokenizer.convert_ids_to_tokens(ids[-1]) + text)[1:]
            elif piece[: len(newline)] == newline:  # before which some put one, too
                piece = piece[len(newline) :]
            else:  # it merged with the text and cannot be cut off
                piece = bare(text)
            while is_last and not chat and piece and piece[-1] in eos_ids:
                piece = piece[:-1]
            ends = [i + 1 for i, token in enumerate(piece) if token in eos_ids]
            if is_last and ends and not chat and k > 0:
                fail(f"{row['_where']}: {completion} holds an EOS that would end it")
            if is_last:
                piece = piece[: ends[0]] if chat and ends else piece + eos_ids[:1]
            end = ends[0] if chat and ends else len(piece)  # what follows a turn's EOS is the template's
            ids += piece
            trained += [train] * end + [False] * (len(piece) - end)
        for i in range(1, len(ids)):  # some templates let the next turn begin with the EOS of this one
            trained[i] |= trained[i - 1] and ids[i] in eos_ids and ids[i - 1] not in eos_ids
        trained[0] = False  # nothing predicts it
        if not any(trained):
            fail(f"{row['_where']}: has no token to train on")
        if len(ids) > max_length:
            last = max_length - 1  # is for an EOS
            ends = [0] + [i + 1 for i in range(max_length) if trained[i] and (i < last or ids[i] in eos_ids)]
            eos = [] if ids[ends[-1] - 1] in eos_ids else ids[-1:]  # unless cut behind a whole turn
            ids = ids[: ends[-1]] + eos
            trained = trained[: ends[-1]] + [False] * len(eos)
            num_cut += 1
        result.append((ids, trained) if any(trained) else None)
    where, num_dropped = rows[0]["_where"], result.count(None)
    if num_cut:
        loud = ": MORE THAN ONE IN TEN" if num_dropped > len(rows) / 10 else ""
        print(f"{num_cut - num_dropped} of {len(rows)} rows ({where} ...) cut to --max-length {max_length}, "
              f"{num_dropped} dropped, whose prompts fill it{loud}")
    if num_dropped == len(rows):
        fail(f"{where}: every prompt fills --max-length {max_length}: raise it")
    return result

def make_comparison(row):
    """Give a row completions, ranking (1 the best, equal ones tie), mu, and the prompt that all share."""
    where, prompt = row["_where"], row.get("prompt")
    if "completions" not in row:
        row.update(completions=[row["chosen"], row["rejected"]], ranking=[1, 2])
    elif row.get("mu", 1.0) != 1.0:
        fail(f"{where}: mu is for chosen and rejected; give the completions a ranking")
    answers, ranking = row["completions"], row.get("ranking")
    if not isinstance(answers, list) or len(answers) < 2:
        fail(f"{where}: completions must be a list of two or more")
    if not isinstance(ranking, list) or [type(rank) for rank in ranking] != [int] * len(answers):
        fail(f"{where}: ranking must be {len(answers)} whole numbers, 1 for the best completion")
    chances = {"mu": row.setdefault("mu", 1.0), "p_chosen": row.get("p_chosen", 0.5)}
    for name, value in chances.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            fail(f"{where}: {name} is {value!r}; expected 1 (chosen is better) to 0, with 0.5 a tie")
    if {type(answer) for answer in answers} not in ({str}, {list}):
        fail(f"{where}: chosen and rejected must both be text, or both lists of messages")
    is_text = isinstance(answers[0], str)
    if prompt is None or isinstance(prompt, str) and not is_text:  # such lists repeat it
        if is_text:
            shared = os.path.commonprefix(answers)
            found = "".join(shared.rpartition("\n\nAssistant:")[:2])
        else:
            shared = takewhile(lambda turns: all(turn == turns[0] for turn in turns), zip(*answers))
            found = [turns[0] for turns in shared][: min(map(len, answers)) - 1]  # the last is the answer
        if not found or prompt and json.dumps(prompt)[1:-1] not in json.dumps(found, default=str):
            fail(f"{where}: no prompt column, nor a shared beginning: see data/convert.py")
        prompt = found
    elif isinstance(prompt, str) and re.fullmatch(r"(?a)\s*\w{1,12}\W*", prompt):  # one word may begin all
        return
    n = len(prompt)
    repeated = [answer[:n] == prompt for answer in answers]
    if all(repeated):
        row.update(prompt=prompt, completions=[answer[n:] for answer in answers])
    elif not is_text and all("'role': 'user'" in str(answer[:1]) for answer in answers):
        fail(f"{where}: the answers begin with a user's turn, but do not repeat the prompt")

def load_comparisons(tokenizer, rows, eos_ids, max_length):
    """Rows to [(K completions, best first, each (ids, trained) with its prompt; ranking, mu, p_chosen)]."""
    flat = []
    for row in rows:
        make_comparison(row)
        flat += [row | {"completion": answer} for answer in row["completions"]]
    encoded = iter(encode(tokenizer, flat, eos_ids, max_length))  # together: a prompt is tokenized once
    comparisons = []
    for row in rows:
        ranking = row["ranking"]
        completions = list(islice(encoded, len(ranking)))
        if None not in completions and (len(completions) > 2 or completions[0] != completions[1]):
            best_first = sorted(range(len(ranking)), key=lambda i: ranking[i])
            completions = [completions[i] for i in best_first]
            mu = row["mu"] if len(set(ranking)) > 1 else 0.5  # all tie
            comparisons.append((completions, sorted(ranking), mu, row.get("p_chosen")))
    if not comparisons:
        fail(f"{rows[0]['_where']}: no pair fits in which chosen and rejected differ")
    if num_dropped := len(rows) - len(comparisons):
        print(f"{num_dropped} of {len(rows)} pairs dropped: too long, or the same tokens on both sides")
    return comparisons

def load_prompts(tokenizer, rows, max_prompt_length):
    """Rows to [(row with the columns of all, ids of its prompt), ...] without those that are too long."""
    bare, begin = words_of(tokenizer)
    columns = dict.fromkeys(name for row in rows for name in row)
    prompts = []
    for row in tqdm(rows, "prompts", delay=3, disable=None):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = begin(bare(prompt))
        else:
            with blame(f"{row['_where']}: the chat template refuses this as a prompt"):
                ids = bare(renderer(tokenizer, row, prompt)(prompt, add_generation_prompt=True))
        if not ids:
            fail(f"{row['_where']}: the prompt is empty")
        if len(ids) <= max_prompt_length:
            prompts.append((columns | row, ids))
    if len(prompts) < len(rows):
        print(f"{len(rows) - len(prompts)} of {len(rows)} prompts are over --max-prompt-length: dropped")
    return prompts or fail(f"{rows[0]['_where']}: every prompt is longer than --max-prompt-length")

# ---- Models and rewards ----
def device_of(args):
    """(device, autocast) of --device and --dtype. What torchrun has started joins in; only rank 0 prints."""
    sys.excepthook = on_error
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    local = os.environ.get("LOCAL_RANK")
    if local and cuda:
        torch.cuda.set_device(int(local))  # which "cuda" is from here on
    if local and not dist.is_initialized():  # rank 0 may make a model first, or wait for a reward
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=9))
    if ranks()[0]:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if args.device == "cuda" and not cuda:
        fail("--device cuda: torch finds no CUDA device")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for 0.2 s, at each new shape
    if cuda:
        KEEP_BYTES["cuda"] = torch.cuda.mem_get_info()[0] // 10  # of what is free
    bfloat16 = args.dtype == "bfloat16" or args.dtype == "auto" and cuda
    return device, partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)

def load_model(name, args, device, flag="--model", kind=AutoModelForCausalLM, new_head="", **options):
    """(model, tokenizer, eos_ids), fp32, without dropout. eos_ids[0] ends rows; any of them ends a sample."""
    folder, causal = Path(name), kind is AutoModelForCausalLM
    if not folder.is_dir() and (name.count("/") != 1 or folder.parent.exists()):
        fail(f"{flag} {name}: no such folder, nor a model's Hub id (owner/name)")
    if (folder / "adapter_config.json").exists():
        fail(f"{flag} {name}: holds an adapter: merge it into its model first (peft: merge_and_unload)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)  # of weights that start at random
    with blame(f"{flag} {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        for part in (config, *vars(config).values()):
            if isinstance(part, transformers.PretrainedConfig):  # of the model, or of one within it
                noise = [key for key, value in vars(part).items() if "drop" in key and value]
                part.update({key: type(getattr(part, key))(0) for key in noise})
        plain = r".*(?<!index)\.(json|jinja|txt|model|md|py)|[A-Z][^.]*|\.git.*|\.DS_Store"
        others = [file for file in folder.glob("*") if not re.fullmatch(plain, file.name)]
        if causal and folder.is_dir() and not others:
            print(f"{name} holds no weights: starting from random ones")
            model, info = kind.from_config(config, dtype=torch.float32, trust_remote_code=False), {}
        else:
            model, info = kind.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                trust_remote_code=False)
        eos = getattr(config, "eos_token_id", None)
        with contextlib.suppress(OSError):
            eos = GenerationConfig.from_pretrained(name).eos_token_id or eos
    missing = set(info.get("missing_keys", ()))
    buffers = r"attn\.(attention\.)?(masked_)?bias$"  # of old GPT-2, GPT-Neo, BigCode: masks, not weights
    others = {key for key in info.get("unexpected_keys", ()) if not re.search(buffers, key)}
    if new_head in missing:
        head = model.get_parameter(new_head)
        torch.nn.init.normal_(head, std=(head.shape[1] + 1) ** -0.5)
        missing.remove(new_head)
        others -= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}  # it replaces them
    if missing or others:
        fail(f"{flag} {name}: no {type(model).__name__}: missing weights {sorted(missing)[:3]}, others "
             f"{sorted(others)[:3]}: merge adapters, and pass a model of this kind")
    eos_ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    eos_ids = [token for token in dict.fromkeys(eos_ids) if token is not None]
    if not eos_ids:
        fail(f"{flag} {name}: neither its tokenizer nor its generation_config names an EOS token")
    if causal:  # what others need to sample from the saved model
        model.generation_config = GenerationConfig(
            bos_token_id=getattr(config, "bos_token_id", None), eos_token_id=eos_ids,
            pad_token_id=None if tokenizer.pad_token_id in eos_ids else tokenizer.pad_token_id)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.first_weights = [x.flatten()[:9].tolist() for x in model.parameters()]  # by which to know it
    if device.type == "cpu" and model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # on matrices this small, threads wait longer than they work
    return model.to(device).train(), tokenizer, eos_ids

def use_rows(model):
    """Let layers attend as `Rows` say, if there are some. Some models err then: see check_model."""
    from transformers import AttentionInterface, AttentionMaskInterface  # not above: this takes a second
    sdpa = AttentionInterface()["sdpa"]
    def attention(module, query, key, value, mask, rows=None, **options):
        if rows is None:
            return sdpa(module, query, key, value, mask, **options)
        for name in ("softcap", "s_aux", "position_bias", "dropout"):
            if options.get(name) not in (None, 0.0):  # of a tensor this errs as well
                raise NotImplementedError(name)
        window = options.get("sliding_window") or 0
        qkv = _autocast(query, key, value)  # some rotary embeddings are fp32
        output = rows.attend(module.layer_idx, *qkv, options["scaling"], window)
        return output, None
    AttentionInterface.register("rows", attention)
    AttentionMaskInterface.register("rows", AttentionMaskInterface()["sdpa"])
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("rows")

@torch.no_grad()
def check_model(model, rows, name="--model", lengths="--max-length"):
    """Refuse a model too small for these rows, or sampled or scored wrongly, without padding and with it."""
    longest, largest = max(rows, key=len), max(map(max, rows))
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    if 0 < positions < len(longest):
        fail(f"{lengths}: rows have up to {len(longest)} tokens, {name} {positions} positions: lower it")
    vocabulary = len(model.get_input_embeddings().weight)
    if largest >= vocabulary:
        fail(f"{name}: its tokenizer gives token id {largest}, but it has only {vocabulary} embeddings")
    limits = [1024]  # and what an attention may not see
    for key, x in vars(model.config.get_text_config()).items():
        if type(x) is int and re.search("window|chunk|topk", key) and x < len(longest):
            limits.append(x + 64)
    n = max(min(len(longest), max(limits)) - 4, 1)
    trial = [longest[:n], longest[: n // 4] + rows[-1][: max(n // 2, 1)]]  # the second begins as the first
    trial += [row[: min(n, 124)] for row in rows[:4]]
    limit = 2e-3 if model.device.type == "cuda" else 3e-4  # its kernels round otherwise for one token
    training = model.training
    gap, why = math.inf, ""
    use_rows(model)
    if has_rows(model):
        try:
            gap = self_test(model, trial)
        except Exception as error:  # of layers that know nothing of `Rows`
            why = f" ({type(error).__name__})"
    if not gap < limit:  # NaN neither
        if has_rows(model):
            model.set_attn_implementation("sdpa")
        print(f"{name}: {type(model).__name__} errs in rows without padding{why}: padded ones take more time")
        with blame(f"{name}: {type(model).__name__} cannot be sampled and scored"):
            gap = self_test(model.train(training), trial)
    if not gap < limit:
        fail(f"{name}: {type(model).__name__}'s log-probs or scores differ by {gap:.2g} in sampling, "
             "scoring and its own forward pass: it is random, or its cache or head unknown to common.py")

def self_test(model, rows):
    """The largest gap between a model's own log-probs or scores and those that training sees."""
    gaps = []
    if model.get_output_embeddings() is None:  # a reward model
        scores = read_scores(model, rows, len(rows), contextlib.nullcontext)
        for score, ids in zip(scores, rows):
            gaps.append(model(input_ids=pad([ids], model.device)).logits[0] - score)
    else:
        batch = sample(model, rows, 4, [-1])
        ids, mask, sampled = [x.to(model.device) for x in batch.values()]
        ends = (last_token(mask) + 1).tolist()
        inside = pad([[False] + [True] * (end - 1) for end in ends], model.device, False)
        scored = sequence_logprobs(model, ids, inside)
        for row, end in enumerate(ends):
            logits = model(input_ids=ids[row : row + 1, :end]).logits[0, :-1].float()
            tokens = ids[row, 1:end]
            own = -F.cross_entropy(logits, tokens, reduction="none")
            gaps.append(own - scored[row, 1:end])
            gap = own - sampled[row, 1:end]
            gaps.append(gap[mask[row, 1:end]])
    return torch.cat(gaps).abs().max().item()

def load_reward(spec, tokenizer, eos_ids, args, device, autocast):
    """(score, reward model or None, read): of rows, prompts and responses the scores (B,); what is scored."""
    if spec.rpartition(":")[0].endswith(".py"):
        return reward_function(spec, tokenizer, device), None, None
    model, own_tokenizer, own_ids = load_model(
        spec, args, device, "--reward", AutoModelForSequenceClassification)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        fail(f"--reward {spec}: no reward model: it needs one label and a trained head named score")
    same_start = words_of(tokenizer)[1]([]) == words_of(own_tokenizer)[1]([])
    if not same_start or tokenizer.get_vocab().items() - own_tokenizer.get_vocab().items():
        fail(f"--reward {spec}: its tokenizer is not the policy's: train it by reward_model.py from --model")
    model.eval().requires_grad_(False)
    def read(rows, prompts, responses):
        texts = []  # as in training: rendered by its own template, up to its own EOS
        for row, prompt, response in zip(rows, prompts, responses):
            body = response[:-1] if response[-1] in eos_ids else response
            text = [*prompt, *body, own_ids[0]]
            if isinstance(row.get("prompt"), list):
                answer = tokenizer.decode(body, skip_special_tokens=True)
                turn = {"role": "assistant", "content": answer.rstrip()}  # a template may end it by a newline
                chat = row | {"completion": [turn], "_sampled": True}
                (encoded,) = encode(own_tokenizer, [chat], own_ids, 1 << 30)
                text, _ = encoded
            texts.append(text)
        return texts
    def score(rows, prompts, responses):
        texts = read(rows, prompts, responses)
        scores = read_scores(model, texts, args.micro_batch_size, autocast)
        if not scores.isfinite().all():
            fail(f"--reward {spec}: a score that is not finite")
        return scores - getattr(model.config, "reward_mean", 0.0)
    return score, model, read

@torch.no_grad()
def read_scores(model, rows, size, autocast):
    """A reward model's raw scores of rows of token ids, each at its last token: (len(rows),)."""
    scores = torch.zeros(len(rows), device=model.device)
    for s in shares(len(rows), size):
        last = pad([[False] * (len(ids) - 1) + [True] for ids in rows[s]], model.device, False)
        with autocast():
            values = token_values(model, pad(rows[s], model.device), last)  # (b, T)
        scores[s] = values.sum(1)  # 0 but at the last
    return over_ranks(scores)

def ended(batch, eos_ids):
    """Which responses of a batch end with an EOS: (B,)."""
    last = batch["input_ids"].gather(1, last_token(batch["mask"])[:, None])  # (B, 1)
    return torch.isin(last, last.new_tensor(eos_ids)).flatten()

def responses_of(batch):
    """The token ids of each response in a batch, its EOS among them: a list of lists."""
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["mask"])]

def micro_batches(batch, index, size, device="cpu"):
    """(rows, their batch), `size` at a time of those in index (n,): shortest first, needless columns cut."""
    lengths = last_token(batch["mask"]) + 1
    index = index[lengths[index].argsort(stable=True)]
    for s in shares(len(index), size):
        T = max(lengths[index[s]].tolist(), default=1)
        yield index[s], {name: to_device(x[index[s], :T], device) for name, x in batch.items()}

@torch.no_grad()
def per_token(function, batch, size, device="cpu"):
    """function(micro-batch) -> (b, t), such as log-probs or values, of the whole batch: (B, T)."""
    result = torch.zeros_like(batch["logprobs"])
    parts = []
    for rows, mb in micro_batches(batch, torch.arange(len(result)), size, device):
        parts.append((rows, function(mb)))
    for rows, x in parts:  # now the device is waited for
        result[rows, : x.shape[1]] = x.to(result)
    return over_ranks(result)

def sample_all(model, prompts, max_new_tokens, eos_ids, temperature=1.0, seed=0):
    """`sample`, each rank its share of the prompts; again in smaller parts where memory runs out."""
    (s,) = shares(len(prompts), len(prompts))
    size = 256
    batch = None
    with unsharded(model):
        while s.start < s.stop and not batch:
            try:
                batch = sample(
                    model, prompts[s], max_new_tokens, eos_ids, temperature, seed, size, first=s.start)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    fail(f"{error}: lower --max-new-tokens")
                size //= 16
    parts = [batch] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, batch)  # None of a rank without prompts
    merged = {}
    for name in ("input_ids", "mask", "logprobs"):
        rows = []
        for part in parts:
            if part:
                rows.extend(part[name])
        merged[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return merged

@torch.no_grad()
def rollout(policy, reference, score, rows, eos_ids, args, autocast, seed):
    """Responses to (row, prompt ids), on the CPU: a batch with ref_logprobs; of each its rewards, kl, ..."""
    rows, prompts = map(list, zip(*rows))
    with autocast():
        batch = sample_all(policy, prompts, args.max_new_tokens, eos_ids, args.temperature, seed)
        score_reference = lambda mb: sequence_logprobs(
            reference, mb["input_ids"], mb["mask"], temperature=args.temperature)
        with without_adapters(reference):
            batch["ref_logprobs"] = per_token(score_reference, batch, args.micro_batch_size, policy.device)
    scores = score(rows, prompts, responses_of(batch)).cpu()  # NaN where a reward gives None
    weights = scores.new_tensor(args.reward_weights or [1.0] * len(args.reward))
    if scores.isnan()[:, weights != 0].all(1).any():  # a reward of weight 0 is only watched
        fail(f"--reward {' '.join(args.reward)}: None for a completion: at least one has to score it")
    finished = ended(batch, eos_ids)
    rewards = (scores * weights).nansum(1) - args.missing_eos_penalty * ~finished
    kl = kl_estimate(batch["logprobs"], batch["ref_logprobs"], "k1").sum(1)
    return batch, {"scores": scores, "rewards": rewards, "kl": kl, "entropy": -batch["logprobs"].sum(1),
                   "lengths": batch["mask"].sum(1).float(), "finished": finished.float()}

def reward_function(spec, tokenizer, device):
    """score() of file.py:function, which is called as TRL does, with texts or messages; NaN for its None."""
    file, _, name = spec.rpartition(":")
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports
    own_name = Path(file).stem.replace(".", "_")  # by which workers that are no forks import it
    found = importlib.util.find_spec(own_name)
    if found and found.origin != os.path.abspath(file):  # another module has it
        own_name = spec.replace(".", "_")
    source = importlib.util.spec_from_file_location(own_name, file)
    module = sys.modules.setdefault(own_name, importlib.util.module_from_spec(source))
    with blame(f"--reward {spec}", file):
        source.loader.exec_module(module)
        function = getattr(module, name)
    dtype = torch.get_default_dtype()
    def score(rows, prompts, responses):
        completions = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, row in enumerate(rows):
            if isinstance(row["prompt"], list):
                completions[i] = [{"role": "assistant", "content": completions[i].rstrip()}]
        columns = {}
        for name in sorted(rows[0].keys() - {"prompt", "completion", "_where"}):
            columns[name] = [row[name] for row in rows]
        given = columns | {"prompts": [row["prompt"] for row in rows], "completions": completions}
        if ranks()[0]:  # it may be slow, or random: rank 0 asks it
            return over_ranks(torch.zeros(len(rows), device=device))
        with blame(f"--reward {spec}, given columns {list(columns)}", file):
            given = function(**copy.deepcopy(given))  # what it does to its arguments stays there
            if isinstance(given, (dict, set, bytes)) or torch.get_default_dtype() != dtype:
                raise TypeError("expected a list of numbers, and torch's default dtype left alone")
            given = list(given)
            numbers = [math.nan if x is None else float(x + 0.0) for x in given]  # not of "1"
            scores = torch.tensor(numbers, device=device)
        if len(scores) != len(rows) or scores.isfinite().sum() + given.count(None) < len(rows):
            fail(f"--reward {spec}: {len(scores)} scores for {len(rows)} completions, or one not finite")
        return over_ranks(scores)
    return score

# ---- Training ----
def check_flags(args):
    """Refuse numbers that are negative or infinite, 0 where that has no meaning, and uneven micro-batches."""
    with contextlib.suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # for `| tee log`
    may_be_0 = """seed learning_rate critic_learning_rate warmup_steps weight_decay label_smoothing eval_every
        save_every kl_coef target_kl gae_lambda clip_coef_value missing_eos_penalty num_train_epochs
        total_episodes lora_rank""".split()
    for name, value in asdict(args).items():
        limit = 1 << 53 if isinstance(value, int) else math.inf
        is_good = not value and name in may_be_0
        if type(value) in (int, float) and not (is_good or 0 < value < limit):
            fail(f"--{name.replace('_', '-')} is {value}: out of range")
    if args.batch_size > args.micro_batch_size and args.batch_size % args.micro_batch_size:
        fail(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size}")

def make_first(path, default, script):
    """Run the script that makes the default model, if it has not run yet."""
    if path == default and not Path(path).exists():
        file = Path(__file__).with_name(script)
        if not file.exists():
            fail(f"{path} does not exist, nor {script}, which makes it: pass a folder or a Hub id")
        print(f"{path} does not exist yet: running {script}, which makes it")
        module = importlib.import_module(file.stem)
        module.main(module.Args())
        over_ranks(torch.zeros(1))  # it has been written

def learning_rate(args, step, num_steps):
    """Of this step, counted from 0: linear warm-up, in a fifth of the run at most, then linear decay to 0."""
    warmup_steps = min(args.warmup_steps, num_steps // 5)
    if step < warmup_steps:
        return args.learning_rate * ((step + 1) / warmup_steps)
    decay = (num_steps - step) / (num_steps - warmup_steps)
    return args.learning_rate * (decay if args.anneal_lr else 1.0)

def plackett_luce_loss(rewards, ranking):
    """-log prod_k exp(r_k) / sum_{l >= k} exp(r_l), best first: App. A.3 of arXiv:2305.18290.
    Ties: the mean over every order of the tied ones; at each choice, all subsets of a size are as likely.
    Args: rewards (K,); ranking: K numbers, 1 the best and equal ones a tie. Returns: a scalar, nats."""
    loss = -rewards.sum()
    for place in set(ranking):
        tied = [i for i, other in enumerate(ranking) if other == place]
        if len(tied) > 10:
            raise ValueError(f"{len(tied)} in a tie: at most 10, since all their subsets are summed")
        below = [i for i, other in enumerate(ranking) if other > place]
        for size in range(1, len(tied) + 1):
            left = [[*some, *below] for some in combinations(tied, size)]  # all sets that may be left
            loss = loss + rewards[to_device(torch.tensor(left), rewards.device)].logsumexp(1).mean()
    return loss

@lru_cache(maxsize=8)
def shuffled(n, seed, epoch):
    """0 to n - 1 in this epoch's order, a function of its arguments: no random state has to be saved."""
    generator = torch.Generator().manual_seed(seed + 1000 * epoch)
    return torch.randperm(n, generator=generator).tolist()

def complete(model, tokenizer, prompts, eos_ids, args):
    """(metrics, rows of samples.jsonl): a completion of each prompt at temperature 1, noise from --seed."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    prompts = [ids for ids in prompts if len(ids) <= positions // 2] or prompts  # half is for the completion
    room = positions - max(map(len, prompts))
    batch = sample_all(model, prompts, min(args.max_new_tokens, room), eos_ids, seed=args.seed)
    metrics = {"completions/mean_length": batch["mask"].sum(1).double().mean().item(),
               "completions/eos_rate": ended(batch, eos_ids).double().mean().item()}
    return metrics, sample_rows(tokenizer, prompts, batch)

def sample_rows(tokenizer, prompts, batch, **columns):
    """Rows of samples.jsonl: prompts and their responses in a batch as text, and further columns (B,)."""
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, responses_of(batch))]
    rows = zip(*texts, *(column.tolist() for column in columns.values()))
    return [dict(zip(("prompt", "completion", *columns), row)) for row in rows]

def to_floats(sums, metrics):
    """Both in one dict of floats, the sums added up over the ranks: the device is waited for once."""
    tensors = {name: x.double() for name, x in metrics.items() if torch.is_tensor(x)}
    totals = torch.stack([torch.as_tensor(x).double() for x in sums.values()])
    values = torch.hstack([over_ranks(totals), *tensors.values()]).tolist()
    return metrics | dict(zip([*sums, *tensors], values))

class Run:
    """Logs, checkpoint and finished model of a run, never overwritten. state: what to resume from, or {}."""
    LOGS = "metrics.jsonl", "samples.jsonl"
    FREE = """resume output_dir model reward dataset eval_dataset device micro_batch_size save_every
        gradient_checkpointing shard track""".split()  # on --resume: what is read is compared by its content

    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.folder = Path(args.output_dir).absolute()
        self.file = self.folder / "state" / "checkpoint.pt"
        self.state = {}
        self.stopped = 0  # or the number of the signal that ends the run
        ours = lambda file: file.name in self.LOGS and not file.stat().st_size or file.match("events.out*")
        is_used = not args.resume and not all(map(ours, self.folder.glob("*")))  # it may have empty logs
        is_finished = (self.folder / "model").exists()
        if is_finished and args.resume and not ranks()[0]:
            shutil.rmtree(self.file.parent, ignore_errors=True)  # if it was killed when all else was done
        if is_used or is_finished:
            what = "a finished run" if is_finished else "other files, or an interrupted run (--resume)"
            fail(f"--output-dir {self.folder} holds {what}: remove it, or choose another folder")
        if args.resume:
            with blame(f"--resume: cannot read {self.file}"):
                self.state = torch.load(self.file, "cpu", weights_only=True, mmap=os.name == "posix")
                before = self.state["args"]
            for name, value in asdict(args).items():
                if name not in self.FREE and value != before.get(name):
                    fail(f"--resume: --{name.replace('_', '-')} is {value}, and was {before.get(name)}")

    def start(self, num_steps, inputs, tokenizer, **parts):
        """Load the checkpoint into parts, open the logs, catch Ctrl-C, SIGTERM, and return the first step."""
        if 0 < num_steps < 20 and hasattr(self.args, "num_train_epochs"):
            print(f"only {num_steps} steps: a lower --batch-size or more --num-train-epochs make more")
        self.num_steps, self.tokenizer, self.parts = num_steps, tokenizer, parts
        self.models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        weights = [getattr(model, "first_weights", "") for model in self.models.values()]
        prints = lambda things: [zlib.crc32(repr(x).encode()) for x in things]
        self.inputs = {"the data or a reward": prints(inputs), "the model to start from": prints(weights)}
        if self.state:
            with blame(f"--resume: {self.file} does not fit"):
                for what, before in self.state["inputs"].items():
                    if self.inputs[what] != before:
                        raise ValueError(f"{what} has changed")
                for name, part in parts.items():
                    load_state(part, self.state.pop(name))
        over_ranks(torch.zeros(1))  # all have looked at the folder
        self.logs, self.writer = [], None
        self.catch_signals()
        if ranks()[0]:
            return self.state.get("step", 0)
        with blame(f"--output-dir {self.folder} cannot be written, or another run writes there"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.logs = [open(self.folder / name, "a") for name in self.LOGS]
            with contextlib.suppress(ImportError):  # there is none on Windows
                import fcntl
                fcntl.lockf(self.logs[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file, size in zip(self.logs, self.state.get("sizes", (0, 0))):
                if file.tell() < size:
                    raise ValueError(f"{file.name} has lost rows")
                file.seek(file.truncate(size))  # what is behind the checkpoint will come again
        if self.args.track:
            with blame("--track needs `pip install wandb tensorboard`"):
                import tensorboard  # noqa: F401
                import wandb
                wandb.init(name=self.folder.name, config=asdict(self.args), sync_tensorboard=True)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(self.folder))
        return self.state.get("step", 0)

    def catch_signals(self):
        both = signal.SIGINT, signal.SIGTERM
        self.handlers = {number: signal.signal(number, self.stop) for number in both}
        if os.name == "posix":  # the workers of a reward function end when they are told to
            block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, both)  # else a signal may be lost
            free = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, both)
            for number, action in zip(both, (signal.SIG_IGN, signal.SIG_DFL)):  # Ctrl-C is for the run alone
                os.register_at_fork(after_in_child=partial(signal.signal, number, action))
            os.register_at_fork(before=block, after_in_parent=free, after_in_child=free)

    def stop(self, number, frame):
        self.stopped = number  # after this step; a second signal ends the run at once
        if ranks()[1] == 1:  # torchrun sends several, and ends us itself after 30 s
            is_notebook = hasattr(sys, "ps1")  # or a prompt: the process goes on
            signal.signal(number, self.handlers[number] if is_notebook else signal.SIG_DFL)

    def check(self, step, name, value):
        flags = "--learning-rate"
        if hasattr(self.args, "critic_learning_rate"):
            flags += " or --critic-learning-rate"
        if not math.isfinite(value):
            fail(f"step {step}: {name} is {value}: lower {flags}; checkpoint, if any: {self.file.parent}")

    def log(self, step, metrics, samples=()):
        """A line of metrics.jsonl, lines of samples.jsonl, and TensorBoard's events if it is installed."""
        for name, value in metrics.items():
            self.check(step, name, value)
            if self.writer:
                self.writer.add_scalar(name, value, step)
        with blame(f"--output-dir {self.folder}"):
            for file, rows in zip(self.logs, ([metrics], samples)):
                for row in rows:
                    line = json.dumps({"step": step} | row)
                    file.write(line + "\n")
                file.flush()

    def checkpoint(self, step, **numbers):
        """What --resume needs: every --save-every steps, at the end, after a signal, which ends the run."""
        for name, model in self.models.items():
            norm = full(torch.nn.utils.get_total_norm(model.parameters()))
            self.check(step, f"the norm of the weights of {name}", norm.item())
        is_due = self.args.save_every and step % self.args.save_every == 0
        self.stopped = int(over_ranks(torch.tensor(self.stopped), "MAX"))  # all ranks, or none
        if is_due or self.stopped or step == self.num_steps:
            state = {"step": step, "inputs": self.inputs, "args": asdict(self.args), **numbers}
            for name, part in self.parts.items():
                state[name] = state_of(part)
            if not ranks()[0]:
                state["sizes"] = [file.tell() for file in self.logs]
                temporary = self.file.with_suffix(".tmp")
                with blame(f"--output-dir {self.folder}"):
                    self.file.parent.mkdir(exist_ok=True)
                    torch.save(state, temporary)
                    os.replace(temporary, self.file)  # a crash leaves the last one whole
        if self.stopped and step < self.num_steps:
            with blame(f"--output-dir {self.folder}"):
                for name, model in self.models.items():
                    save_model(model, self.tokenizer, self.file.with_name(name))
            tqdm.write(f"stopped after step {step}: --resume continues; model so far: {self.file.parent}/")
            raise SystemExit(128 + self.stopped)

    def finish(self, model):
        """args.json, and folders that transformers, TRL and vLLM load; model/ last, the sign of the end."""
        record = {**asdict(self.args), "torch": torch.__version__, "transformers": transformers.__version__,
                  "device": str(model.device), "seconds": round(time.time() - self.began, 1)}
        with blame(f"--output-dir {self.folder}"):
            for name, part in self.models.items():
                target = "model.tmp" if part is model else name  # a critic
                save_model(part, self.tokenizer, self.folder / target)
            if not ranks()[0]:
                (self.folder / "args.json").write_text(json.dumps(record, indent=1) + "\n")
                os.replace(self.folder / "model.tmp", self.folder / "model")
                shutil.rmtree(self.file.parent, ignore_errors=True)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def show_change(self, after, samples, *names):
        """Print samples and metrics beside those of the first evaluation; draw `names` into curves.png."""
        if ranks()[0]:
            return
        metrics, first = [(self.folder / name).read_text().splitlines() for name in self.LOGS]
        metrics = list(map(json.loads, metrics))
        with contextlib.suppress(ImportError):  # if it is installed
            from matplotlib.figure import Figure
            figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
            for axes, name in zip(figure.subplots(1, len(names)), names):
                points = [(row["step"], row[name]) for row in metrics if name in row]
                axes.plot(*zip(*points), ".-")
                axes.set(title=name, xlabel="step")
            figure.savefig(self.folder / "curves.png")
        for old, new in zip(map(json.loads, first), samples[:5]):
            print(f"{new['prompt'][-90:]!r}\n  before {old['completion'][:90]!r}\n"
                  f"  after  {new['completion'][:90]!r}")
        for name, value in after.items():
            print(f"{name:28} {metrics[0].get(name, math.nan):10.4f} -> {value:10.4f}")
        print(f"model, metrics and samples: {self.args.output_dir}")
