"""pad, last_token, micro_batches and per_token: the one layout of a batch, by loops and on real models."""

import itertools
import math
import random

import pytest
import torch
import transformers
from common import last_token, micro_batches, pad, per_token, sequence_logprobs, token_values
from conftest import LENGTHS, PROMPTS, make_model, naive_logprobs, ragged_rows
from sft import collate

CPU = torch.device("cpu")
TOTALS = [p + n for p, n in zip(PROMPTS, LENGTHS)]  # 18, 8, 14, 8: two rows of equal length
SIZES = [1, 2, 3, 4, 99]


def ragged_batch():
    """The four ragged rows, and columns that name their row and their column."""
    input_ids, mask = collate(ragged_rows(), CPU)
    place = torch.arange(4)[:, None] * 100.0 + torch.arange(18)  # (4, 18)
    return {"input_ids": input_ids, "mask": mask, "logprobs": torch.zeros(4, 18), "place": place}


# ---- pad and last_token ----


@pytest.mark.parametrize("value, dtype", [(0, torch.long), (7, torch.long), (False, torch.bool), (0.0, torch.float32)])
def test_pad_keeps_the_rows_and_fills_up_behind_them(value, dtype):
    make = {torch.long: int, torch.bool: bool, torch.float32: float}[dtype]
    rows = [[make((3 * i + j) % 5) for j in range(n)] for i, n in enumerate(LENGTHS)]
    copies = [list(row) for row in rows]
    x = pad(rows, CPU, value)
    assert x.shape == (4, 16) and x.dtype == dtype and rows == copies
    for row, got in zip(rows, x.tolist()):
        assert got == row + [value] * (16 - len(row))


def test_pad_of_equal_rows_an_empty_row_and_a_single_one():
    assert pad([[1, 2], [3, 4]], CPU).tolist() == [[1, 2], [3, 4]]
    assert pad([[1], [], [2, 3]], CPU, -1).tolist() == [[1, -1], [-1, -1], [2, 3]]
    assert pad([[5]], CPU).tolist() == [[5]]
    assert pad(([1, 2], [3]), CPU).tolist() == [[1, 2], [3, 0]]  # a tuple of rows, as zip gives one


def test_last_token_of_ragged_responses_behind_prompts():
    mask = ragged_batch()["mask"]
    assert last_token(mask).tolist() == [total - 1 for total in TOTALS]
    assert last_token(mask.flip(1)).tolist() == [18 - prompt - 1 for prompt in PROMPTS]


def test_last_token_of_every_mask_of_five_columns():
    masks = torch.tensor(list(itertools.product([False, True], repeat=5)))[1:]
    assert last_token(masks).tolist() == [max(i for i in range(5) if row[i]) for row in masks.tolist()]


# ---- micro_batches ----


@pytest.mark.parametrize("size", SIZES)
def test_each_row_comes_once_and_whole(size):
    batch = ragged_batch()
    seen = []
    for rows, mb in micro_batches(batch, torch.arange(4), size):
        assert list(mb) == list(batch) and len(rows) <= size
        T = max(TOTALS[i] for i in rows)
        for name, x in mb.items():
            assert x.shape == (len(rows), T) and x.dtype == batch[name].dtype  # no column more than they need
            assert torch.equal(x, batch[name][rows, :T])
        assert mb["mask"].sum(1).tolist() == [LENGTHS[i] for i in rows]
        seen += rows.tolist()
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 2, 1, 0], [3, 0, 1], [2], [1, 3], [3, 1]])
def test_the_shortest_come_first_and_equals_stay_in_order(index):
    """Rows 1 and 3 have 8 tokens each, row 2 14 and row 0 18."""
    want = sorted(index, key=lambda i: TOTALS[i])  # a stable sort
    for size in SIZES:
        parts = [rows.tolist() for rows, _ in micro_batches(ragged_batch(), torch.tensor(index), size)]
        sizes = [len(part) for part in parts]
        assert sum(parts, []) == want and len(parts) == math.ceil(len(want) / size)
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_equals_stay_in_order_in_large_batches_too():
    """torch's sort keeps the order of a few equals in any case, and of many only if it is told to."""
    draw = random.Random(1)
    lengths = [draw.randint(1, 3) for _ in range(300)]
    mask = pad([[True] * n for n in lengths], CPU, False)
    [(rows, _)] = micro_batches({"mask": mask}, torch.arange(300), 300)
    assert rows.tolist() == sorted(range(300), key=lambda i: lengths[i])


def test_rows_outside_the_index_change_no_width():
    [(rows, mb)] = micro_batches(ragged_batch(), torch.tensor([1, 3]), 4)
    assert rows.tolist() == [1, 3] and mb["input_ids"].shape == (2, 8)
    assert mb["place"][1].tolist() == [300.0 + t for t in range(8)]


def test_a_random_batch_is_cut_into_all_its_rows():
    draw = random.Random(0)
    for _ in range(50):
        B, size = draw.randint(1, 20), draw.randint(1, 7)
        prompts = [[1] * draw.randint(1, 6) for _ in range(B)]
        responses = [[5] * draw.randint(1, 9) for _ in range(B)]
        mask = pad([[False] * len(p) + [True] * len(r) for p, r in zip(prompts, responses)], CPU, False)
        index = torch.tensor(draw.sample(range(B), draw.randint(1, B)))
        widths, seen = [], []
        for rows, mb in micro_batches({"mask": mask}, index, size):
            widths.append(mb["mask"].shape[1])
            seen += rows.tolist()
            assert mb["mask"][:, -1].any() and torch.equal(mb["mask"].sum(1), mask[rows].sum(1))
        assert sorted(seen) == sorted(index.tolist()) and widths == sorted(widths)


def test_sums_and_gradients_over_micro_batches_are_those_of_the_batch(model):
    """In float64, so that 1e-9 can be asked."""
    model.double()
    batch = ragged_batch()
    weights = torch.randn(4, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(parts):
        model.zero_grad()
        total = 0.0
        for rows, mb in parts:
            logprobs = sequence_logprobs(model, mb["input_ids"], mb["mask"])
            loss = (weights[rows, : logprobs.shape[1]] * logprobs).sum()
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want, want_gradient = gradient([(torch.arange(4), batch)])
    for size in SIZES:
        got, got_gradient = gradient(micro_batches(batch, torch.tensor([2, 0, 3, 1]), size))
        assert got == pytest.approx(want, rel=1e-9)
        assert (got_gradient - want_gradient).norm() < 1e-9 * want_gradient.norm()


# ---- per_token ----


def test_per_token_puts_everything_in_its_place():
    for size in SIZES:
        batch = ragged_batch()
        got = per_token(lambda mb: mb["place"] * mb["mask"], batch, size)
        assert torch.equal(got, batch["place"] * batch["mask"])
        assert sorted(batch) == ["input_ids", "logprobs", "mask", "place"]


@pytest.mark.parametrize("size", SIZES)
def test_per_token_log_probs_are_those_of_a_loop(model, size):
    batch = ragged_batch()
    got = per_token(lambda mb: sequence_logprobs(model, mb["input_ids"], mb["mask"]), batch, size)
    want = torch.zeros(4, 18)
    for i, (ids, trained) in enumerate(ragged_rows()):
        want[i, 1 : len(ids)] = naive_logprobs(model, ids).float().detach() * torch.tensor(trained[1:])
    assert (got - want).abs().max() < 1e-5 and (got[~batch["mask"]] == 0).all()
    assert not got.requires_grad


@pytest.mark.parametrize("size", SIZES)
def test_per_token_values_of_a_critic_do_not_depend_on_the_micro_batch(kind, size):
    """V_t is the head's output at token t - 1, for which no token behind it counts."""
    config = make_model(kind).config
    config.num_labels = 1
    critic = transformers.AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval()
    head = critic.score if hasattr(critic, "score") else critic.classifier
    torch.nn.init.normal_(head.weight)
    batch = ragged_batch()
    got = per_token(lambda mb: token_values(critic, mb["input_ids"]).roll(1, dims=1), batch, size)
    for i, (ids, trained) in enumerate(ragged_rows()):
        own = critic(torch.tensor([ids])).logits[0, :, 0].detach()  # (T,)
        where = torch.tensor(trained).nonzero().squeeze(1)
        assert (got[i, where] - own[where - 1]).abs().max() < 1e-5 and own.std() > 0.1
