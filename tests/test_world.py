"""The embedded world: its committed files are what its generator writes, they follow the grammar and the choice
models that they claim, and the gold reward is what is computed by hand.
"""

import inspect
import itertools
import math
import random
import re
import statistics

import gold_reward as gold
import make_world
import pytest
import transformers
from tiny_runs import DATA, PROMPT, head, read

# ---- Files ----


@pytest.fixture(scope="module")
def texts():
    """Every text of every row in data/, once."""
    found = set()
    for path in DATA.glob("*.jsonl"):
        for row in read(path):
            for value in row.values():
                found.update([value] if isinstance(value, str) else value if isinstance(value, list) else [])
    return sorted(text for text in found if isinstance(text, str))


def test_committed_files_are_what_the_generator_writes():
    world = make_world.world()
    files = {}
    for path in DATA.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py":
            files[path.relative_to(DATA).as_posix()] = path.read_text()
    assert set(files) == set(world)
    assert [file for file in files if files[file] != world[file]] == []
    assert sum(len(text.encode()) for text in files.values()) < 6_000_000


def test_every_text_survives_the_tokenizer(texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "model")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert len(texts) > 20_000
    assert not [text for text, row in zip(texts, ids) if tokenizer.unk_token_id in row or not row]
    assert tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) == texts
    words = [len(row) == len(text.split()) for text, row in zip(texts, ids) if not re.search("[0-9]", text)]
    assert all(words) and len(words) > 20_000


def test_held_out_prompts_are_held_out():
    prompts = {path.stem: {row["prompt"] for row in read(path)} for path in DATA.glob("*.jsonl")}
    stems = ("prompts", "demonstrations", "preferences", "rankings")
    reviews = set().union(*(prompts[stem] for stem in stems))
    held_out = set().union(*(prompts[f"{stem}_test"] for stem in stems))
    assert (len(reviews), len(held_out), len(reviews & held_out)) == (48, 12, 0)
    assert not prompts["sums_prompts_test"] & (prompts["sums"] | prompts["sums_prompts"])
    assert prompts["sums"] == prompts["sums_prompts"]
    assert len(prompts["sums_prompts"] | prompts["sums_prompts_test"]) == 800


# ---- The grammar ----


def probability(text, aspect) -> float:
    """Of a response under the grammar's tables, summed over its derivations."""
    verbs = set(sum(make_world.VERBS.values(), []))
    mood_of = {word: "positive" if value > 0 else "negative" if value < 0 else "neutral"
               for word, value in gold.VALUES.items()}

    def word_of(word, verb):
        if word not in mood_of or (word in verbs) != verb:
            return 0.0
        rivals = [w for w, mood in mood_of.items() if mood == mood_of[word] and (w in verbs) == verb]
        return make_world.MOODS[mood_of[word]] / len(rivals)

    def rest(slots, words):
        if not slots or not words:
            return float(not slots and not words)
        slot, word = slots[0], words[0]
        if slot == "V":
            return word_of(word, True) and word_of(word, True) * rest(slots[1:], words[1:])
        if slot != "S":
            return rest(slots[1:], words[1:]) if word == (aspect if slot == "X" else slot) else 0.0
        bare = make_world.BOOSTS[""] * word_of(word, False)
        total = bare and bare * rest(slots[1:], words[1:])
        if word in ("very", "slightly") and len(words) > 1:
            total += make_world.BOOSTS[word] * word_of(words[1], False) * rest(slots[1:], words[2:])
        return total

    return sum(p * q * rest(f"{opening} {closing}".split(), text.split())
               for opening, p in make_world.OPENINGS.items() for closing, q in make_world.CLOSINGS.items())


def aspect_of(prompt) -> str:
    return next(word for word in prompt.split() if word in gold.ASPECTS)


def within_3_se(values, expected):
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    assert abs(mean - expected) < 3 * error, f"{mean:.4f} +- {error:.4f}, expected {expected:.4f}"


def test_entropy_of_the_grammar():
    """-log p of draws, from a parser of responses that shares only the tables with make_world.entropy()."""
    assert math.fsum(make_world.MOODS.values()) == pytest.approx(1)
    nats, tokens = make_world.entropy()
    rng = random.Random(7)
    drawn = [make_world.response(rng, "plot") for _ in range(20_000)]
    within_3_se([-math.log(probability(text, "plot")) for text in drawn], nats)
    within_3_se([len(text.split()) + 1 for text in drawn], tokens)


def test_committed_demonstrations_follow_the_grammar():
    nats, tokens = make_world.entropy()
    rows = head("demonstrations", 0, None) + head("demonstrations_test", 0, None)
    chances = [probability(row["completion"], aspect_of(row["prompt"])) for row in rows]
    assert len(rows) == 6000 and min(chances) > 0
    within_3_se([-math.log(p) for p in chances], nats)
    within_3_se([len(row["completion"].split()) + 1 for row in rows], tokens)


# ---- The gold reward, and the labels drawn from it ----


def test_gold_reward_has_trls_signature():
    parameters = list(inspect.signature(gold.gold_reward).parameters.values())
    assert [p.name for p in parameters][:2] == ["prompts", "completions"]
    assert parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
    rewards = gold.gold_reward(prompts=[PROMPT] * 2, completions=["a", " ."], answer=["", ""], step=3)
    assert isinstance(rewards, list) and all(type(r) is float for r in rewards) and len(rewards) == 2
    with pytest.raises(ValueError):
        gold.gold_reward([PROMPT], ["a", "b"])
    texts = [" 3", "3", " 13", "", " 34", "3 3", " 3 .", "03"]
    assert gold.sum_reward(["1 + 2 ="] * 8, texts, answer=["3"] * 8) == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("completion, praise, penalty", [  # by hand, for "review of the plot :"
    (" the plot was good and also very superb .", 1 + 1.5 * 2, 0),
    (" i hated the plot , it was slightly weak . overall it seemed very nice .", -2 - 0.5 + 1.5, 0),
    (" the plot was awful and also slightly lovely", -2 + 0.5, 2),  # never ended
    (" the music was good and also okay .", 1, 1.5),  # off topic
    (" the plot was very very good .", 1.5, 1),  # only the booster before the word counts; one neighbour
    (" the plot was good good good .", 3, 2 + 1),  # two neighbours and one third time
    (" the plot was good and also good . overall it seemed good .", 3, 1),  # a third time, apart
    (" good plot , good plot , good plot , good .", 4, 2),  # a third and a fourth; only sentiment counts
    (" the plot was plain and also plain . overall it seemed plain .", 0, 1),  # a neutral sentiment word
    ("", 0, 2 + 1.5),
    (" superb superb superb superb", 8, 2 + 1.5 + 3 + 2)])
def test_gold_reward_by_hand(completion, praise, penalty):
    assert gold.gold_reward([PROMPT], [completion]) == pytest.approx([4 * math.tanh(praise / 4) - penalty])


@pytest.mark.parametrize("file", ["preferences", "preferences_test"])
def test_preferences_follow_bradley_terry(file):
    """A pair's votes for the better side are Binomial(2, q) / 2 with q = sigma(|r_a - r_b|): E = q."""
    rows = head(file, 0, None)
    assert {row["mu"] for row in rows} == {0.5, 1.0}
    chosen, rejected = (gold.gold_reward([row["prompt"] for row in rows], [row[side] for row in rows])
                        for side in ("chosen", "rejected"))
    agreement = [row["mu"] if a >= b else 1 - row["mu"] for row, a, b in zip(rows, chosen, rejected)]
    q = [1 / (1 + math.exp(-abs(a - b))) for a, b in zip(chosen, rejected) if a != b]
    agreement = [vote for vote, a, b in zip(agreement, chosen, rejected) if a != b]
    error = sum(p * (1 - p) / 2 for p in q) ** 0.5 / len(q)
    assert abs(statistics.fmean(agreement) - statistics.fmean(q)) < 3 * error
    ties = [row["mu"] == 0.5 for row, a, b in zip(rows, chosen, rejected) if a != b]
    error = sum(2 * p * (1 - p) * (1 - 2 * p * (1 - p)) for p in q) ** 0.5 / len(q)
    assert abs(statistics.fmean(ties) - statistics.fmean(2 * p * (1 - p) for p in q)) < 3 * error


@pytest.mark.parametrize("file, size", [("rankings", 1500), ("rankings_test", 300)])
def test_rankings_follow_plackett_luce(file, size):
    """Any two of the four compare by Bradley-Terry. Each response is in three of the six pairs, so their sum
    has at most thrice the variance it would have if they were independent.
    """
    rows = head(file, 0, None)
    assert len(rows) == size
    excess, variance = 0.0, 0.0
    for row in rows:
        places = row["ranking"]
        assert len(row["completions"]) == len(places) == 4
        assert places == [1 + sum(other < place for other in places) for place in places]  # 1 is best
        rewards = gold.gold_reward([row["prompt"]] * 4, row["completions"])
        for i, j in itertools.combinations(range(4), 2):
            better, worse = (i, j) if rewards[i] >= rewards[j] else (j, i)
            p = 1 / (1 + math.exp(rewards[worse] - rewards[better]))
            won = (places[better] < places[worse]) + (places[better] == places[worse]) / 2
            excess += (won - p) * (p > 0.5)
            variance += p * (1 - p) * (p > 0.5)
    assert abs(excess) < 3 * (3 * variance) ** 0.5
