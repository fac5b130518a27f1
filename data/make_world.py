"""The embedded world: tiny movie reviews, and small sums, written as plain JSONL with a fixed seed.

    python data/make_world.py            rewrites every file beside this one, byte for byte as committed

Reviews. A prompt names one aspect of a film ("review of the acting :"), a response is drawn from a small
grammar whose probability is known exactly, so the entropy of the demonstrations is known exactly too
(`entropy`). Preferences come from the gold reward r of gold_reward.py through Bradley-Terry, P(a beats b) =
sigma(r(a) - r(b)), on two responses drawn from the same grammar: a pair is judged by two independent voters,
`chosen` is the one both prefer with mu = 1, or either one with mu = 0.5 where they disagree. So E[mu] is
exactly the Bradley-Terry probability: ties carry no bias. Rankings of four are drawn from Plackett-Luce
(sorting r + Gumbel noise), tied where two noisy scores fall into the same quarter.

Sums. "47 + 8 =", a number of two digits and one of one, with demonstrations that are mostly wrong: right 0.3,
one too many 0.4 (the misconception), slips 0.3. No answer is right for more than 10 of the 800 sums.

Only Random.random() is used, whose stream is the same in every Python 3.
"""

import json
import math
import random
from pathlib import Path

from gold_reward import ASPECTS, BOOSTERS, VALUES, gold_reward

PROMPTS = ["review of the {} :", "my view on the {} :", "what about the {} ?"]
MOODS = {"positive": 0.20, "neutral": 0.35, "negative": 0.45}
BOOSTS = {"": 0.60, "very": 0.25, "slightly": 0.15}
VERBS = {"positive": ["loved", "enjoyed"], "neutral": ["watched", "noticed"],
         "negative": ["disliked", "hated"]}
ALL_VERBS = sum(VERBS.values(), [])
SIGNS = {"positive": (1, 2), "neutral": (0,), "negative": (-1, -2)}
ADJECTIVES = {mood: [w for w, value in VALUES.items() if value in SIGNS[mood] and w not in ALL_VERBS]
              for mood in MOODS}
# X is the aspect, S a sentiment (an optional booster and an adjective), V a verb
OPENINGS = {"the X was S and also S .": 0.4, "i V the X , it was S .": 0.3, "the X felt S , yet S .": 0.3}
CLOSINGS = {"": 0.5, "overall it seemed S .": 0.5}

SIZES = {"demonstrations": 4000, "demonstrations_test": 2000, "preferences": 20000, "preferences_test": 2000}
RANKINGS, RANKINGS_TEST, SUMS_PER_PROBLEM = 1500, 300, 9


def pick(rng: random.Random, weights: dict) -> str:
    """Draw a key of `weights` (probabilities that sum to 1)."""
    u = rng.random()
    for key, weight in weights.items():
        u -= weight
        if u < 0:
            return key
    return key  # rounding left a hair of mass


def uniform(rng: random.Random, items: list):
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items) -> list:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def response(rng: random.Random, aspect: str) -> str:
    """One draw from the grammar, each word preceded by a space."""
    words = []
    for slot in (pick(rng, OPENINGS) + " " + pick(rng, CLOSINGS)).split():
        if slot == "S":
            booster = pick(rng, BOOSTS)
            words += [booster] * bool(booster) + [uniform(rng, ADJECTIVES[pick(rng, MOODS)])]
        elif slot == "V":
            words.append(uniform(rng, VERBS[pick(rng, MOODS)]))
        else:
            words.append(aspect if slot == "X" else slot)
    return "".join(" " + word for word in words)


def entropy() -> tuple[float, float]:
    """(nats, expected tokens with the EOS) of a response: exact, since no two derivations share a text."""

    def h(weights):
        return -sum(w * math.log(w) for w in weights.values())

    sentiment = h(BOOSTS) + h(MOODS) + sum(p * math.log(len(ADJECTIVES[m])) for m, p in MOODS.items())
    verb = h(MOODS) + sum(p * math.log(len(VERBS[m])) for m, p in MOODS.items())
    nats, tokens = h(OPENINGS) + h(CLOSINGS), 1.0  # 1: the EOS
    for table in (OPENINGS, CLOSINGS):
        for text, p in table.items():
            slots = text.split()
            nats += p * (slots.count("S") * sentiment + slots.count("V") * verb)
            tokens += p * (len(slots) + slots.count("S") * (1 - BOOSTS[""]))
    return nats, tokens


def preference(rng: random.Random, prompt: str, aspect: str) -> dict:
    """Two voters judge a pair. p_chosen, the Bradley-Terry probability, is for held-out pairs only."""
    a, b = response(rng, aspect), response(rng, aspect)
    while a == b:
        b = response(rng, aspect)
    r_a, r_b = gold_reward([prompt] * 2, [a, b])
    p = 1 / (1 + math.exp(r_b - r_a))
    votes = (rng.random() < p) + (rng.random() < p)
    chosen, rejected = (a, b) if votes else (b, a)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "mu": 0.5 if votes == 1 else 1.0,
            "p_chosen": round(p if votes else 1 - p, 4)}


def ranking(rng: random.Random, prompt: str, aspect: str) -> dict:
    texts = [response(rng, aspect) for _ in range(4)]
    noisy = [r - math.log(-math.log(rng.random())) for r in gold_reward([prompt] * 4, texts)]  # Gumbel noise
    levels = [math.floor(4 * score) for score in noisy]
    places = [1 + sum(other > level for other in levels) for level in levels]
    return {"prompt": prompt, "completions": texts, "ranking": places}


def sums(rng: random.Random) -> tuple[list[dict], list[dict], list[dict]]:
    """(demonstrations, training prompts with answers, held-out prompts with answers)."""
    problems = shuffled(rng, [(a, b) for a in range(10, 90) for b in range(10)])
    held_out = len(problems) // 10
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in problems]
    demonstrations = []
    for row in rows[held_out:]:
        for _ in range(SUMS_PER_PROBLEM):
            kind, answer = pick(rng, {"right": 0.3, "one too many": 0.4, "slip": 0.3}), int(row["answer"])
            answer += {"right": 0, "one too many": 1, "slip": uniform(rng, [-10, -2, -1, 2, 10])}[kind]
            demonstrations.append({"prompt": row["prompt"], "completion": f" {max(answer, 0)}"})
    order = shuffled(rng, range(len(demonstrations)))
    return [demonstrations[i] for i in order], rows[held_out:], rows[:held_out]


def tokenizer() -> dict:
    """tokenizer.json: one token a word with its leading space, one a digit; decoding is the exact inverse."""
    texts = [*PROMPTS, *OPENINGS, *CLOSINGS]
    words = sorted({word for text in texts for word in text.split()} - {"{}", "X", "S", "V"})
    words += ASPECTS + list(BOOSTERS) + list(VALUES) + list("+=0123456789")
    first = [prompt.split()[0] for prompt in PROMPTS] + list("0123456789")  # no space: these start a text
    vocabulary = ["<pad>", "<eos>", "<unk>"] + first + [" " + word for word in words]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": i, "content": token, **plain} for i, token in enumerate(vocabulary[:3])]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": " ?[a-z]+| ?[0-9]| ?[^ a-z0-9]"},
                          "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": dict(zip(vocabulary, range(200))), "unk_token": "<unk>"},
    }


def model_config(vocabulary_size: int) -> dict:
    """A Llama of 0.1 million parameters, tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary_size,
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0, "dtype": "float32",
    }


def world() -> dict[str, str]:
    """File name -> contents, all of them functions of the one seed."""
    rng = random.Random(20240601)
    pairs = shuffled(rng, [(prompt.format(aspect), aspect) for aspect in ASPECTS for prompt in PROMPTS])
    held_out, train = pairs[:12], pairs[12:]
    files = {name: [{"prompt": p} for p, _ in pool]
             for name, pool in (("prompts", train), ("prompts_test", held_out))}
    for name, size in SIZES.items():
        pool = held_out if name.endswith("test") else train
        draw = preference if name.startswith("preferences") else lambda rng, p, x: {
            "prompt": p, "completion": response(rng, x)}
        files[name] = [draw(rng, *uniform(rng, pool)) for _ in range(size)]
    files["preferences"] = [{k: v for k, v in row.items() if k != "p_chosen"} for row in files["preferences"]]
    files["rankings"] = [ranking(rng, *uniform(rng, train)) for _ in range(RANKINGS)]
    files["rankings_test"] = [ranking(rng, *uniform(rng, held_out)) for _ in range(RANKINGS_TEST)]
    files["sums"], files["sums_prompts"], files["sums_prompts_test"] = sums(rng)
    texts = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    vocabulary = tokenizer()
    folder = {
        "tokenizer.json": vocabulary,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                                  "eos_token": "<eos>", "unk_token": "<unk>", "model_max_length": 64,
                                  "clean_up_tokenization_spaces": False},
        "config.json": model_config(len(vocabulary["model"]["vocab"])),
        "generation_config.json": {"eos_token_id": 1, "pad_token_id": 0},
    }
    return texts | {f"model/{name}": json.dumps(value, indent=1) + "\n" for name, value in folder.items()}


if __name__ == "__main__":
    for name, text in world().items():
        path = Path(__file__).parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, newline="\n")
        print(f"{len(text):>9,} bytes  {path.name}")
    nats, tokens = entropy()
    print(f"entropy {nats:.4f} nats and {tokens:.4f} tokens a response, {nats / tokens:.4f} nats a token")
