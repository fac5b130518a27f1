"""benchmarks/frontier.py on a model whose responses can all be written down: everything that it prints has an exact
value, and one of the policies is the optimum itself.
"""

import contextlib
import io
import json
import types

import frontier
import pytest
import torch
import transformers
from conftest import ROOT, make_model
from tiny_runs import SCRIPTS, read, write
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "b", "c", "</s>"]
EOS = 3
PROMPTS = [[0, 1], [1, 2, 0], [2, 2, 0, 1]]
ENDED = [[EOS]]
CUT = [[first, second] for first in range(EOS) for second in range(EOS + 1)]
RESPONSES = ENDED + CUT  # of at most two tokens: 13
PREFIXES = [[], [0], [1], [2]]  # behind a prompt, with a token to come
BETA = 0.6  # of the policy that is the optimum
N_REF, N = 4000, 1500  # samples a prompt

# ---- Exact answers ----


def next_logprobs(model):
    """log pi(next token) behind each prefix of each prompt: (3, 4, 4), float64."""
    rows = []
    for prompt in PROMPTS:
        for prefix in PREFIXES:
            logits = model(torch.tensor([prompt + prefix])).logits[0, -1].detach()
            rows.append(torch.log_softmax(logits.double(), -1))
    return torch.stack(rows).view(3, 4, 4)


def law(model):
    """log pi of each response to each prompt: (3, 13), float64."""
    logp = next_logprobs(model)
    result = torch.zeros(3, 13, dtype=torch.float64)
    for i, response in enumerate(RESPONSES):
        result[:, i] = logp[:, 0, response[0]]
        if len(response) == 2:
            result[:, i] += logp[:, 1 + response[0], response[1]]
    assert (result.exp().sum(1) - 1).abs().max() < 1e-9
    return result


def kl_along(model, reference):
    """The exact KL of each token, summed along each response: (3, 13)."""
    p, q = next_logprobs(model), next_logprobs(reference)
    kl = (p.exp() * (p - q)).sum(-1)  # (3, 4)
    result = torch.zeros(3, 13, dtype=torch.float64)
    for i, response in enumerate(RESPONSES):
        result[:, i] = kl[:, 0]
        if len(response) == 2:
            result[:, i] += kl[:, 1 + response[0]]
    return result


def optimum(log_ref, rewards, beta):
    """(E*[r], KL(pi* || pi_ref), share of the samples that is effective) of pi* = pi_ref exp(r / beta) / Z."""
    log_star = torch.log_softmax(log_ref + rewards / beta, 1)
    star, weight = log_star.exp(), (log_star - log_ref).exp()
    values = (star * rewards).sum(1), (star * (log_star - log_ref)).sum(1), 1 / (star * weight).sum(1)
    return [x.mean().item() for x in values]


def largest_reward(log_ref, rewards, kl):
    """That of the optimum whose KL is this one."""
    betas = torch.logspace(-1, 2, 3000, dtype=torch.float64).tolist()
    found = [optimum(log_ref, rewards, beta) for beta in betas]
    return min(found, key=lambda row: abs(row[1] - kl))[0]


def standard_errors(values, logp):
    """Bounds of the standard error of a mean over N samples a prompt: with the prompts fixed, and as if each sample
    had a prompt of its own."""
    p = logp.exp()
    means = (p * values).sum(1)
    within = ((p * values.square()).sum(1) - means.square()).mean()
    pooled = (p * values.square()).sum(1).mean() - means.mean().square()
    return [(x / (3 * N)).sqrt().item() for x in (within, pooled)]


# ---- Folders ----


def make_policy(seed):
    config = make_model("llama").config
    config.update({"vocab_size": len(WORDS), "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None,
                   "num_hidden_layers": 1})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_optimum(reference, rewards):
    """The reference with another head: the soft values of the next token, at each of the 12 hidden states."""
    by_first = torch.zeros(3, 4, dtype=torch.float64)  # beta log E[exp(r / beta)] behind each first token
    by_second = torch.zeros(3, 3, 4, dtype=torch.float64)
    log_ref = next_logprobs(reference)
    by_first[:, EOS] = rewards[:, 0]
    for i, (first, second) in enumerate(CUT):
        by_second[:, first, second] = rewards[:, 1 + i]
    by_first[:, :EOS] = BETA * (log_ref[:, 1:] + by_second / BETA).logsumexp(-1)
    values = torch.cat([by_first[:, None], by_second], 1)
    hidden = []
    for prompt in PROMPTS:
        for prefix in PREFIXES:
            hidden.append(reference.base_model(torch.tensor([prompt + prefix])).last_hidden_state[0, -1].detach())
    hidden = torch.stack(hidden).double()  # (12, 64)
    change = torch.linalg.lstsq(hidden, values.view(12, 4) / BETA).solution  # (64, 4)
    star = make_policy(0)
    star.load_state_dict(reference.state_dict())
    with torch.no_grad():
        star.get_output_embeddings().weight += change.T.float()
    return star


REWARD = """
import json
from pathlib import Path

TABLE = json.loads((Path(__file__).parent / "table.json").read_text())

def reward(prompts, completions, **columns):
    return [TABLE[prompt][completion] for prompt, completion in zip(prompts, completions)]

def shifted(prompts, completions, **columns):
    return [x + 100 * (prompt == "a b") for prompt, x in zip(prompts, reward(prompts, completions))]
"""


def text(ids):
    return " ".join(WORDS[i] for i in ids if i != EOS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What frontier.main gives and prints, and the exact quantities behind it."""
    folder = tmp_path_factory.mktemp("frontier")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)  # fmt: skip
    rewards = torch.randn(3, 13, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards += torch.tensor([[3.0], [2.0], [1.0]])  # prompts of different levels
    table = {}
    for prompt, values in zip(PROMPTS, rewards.tolist()):
        table[text(prompt)] = {}
        for response, value in zip(RESPONSES, values):
            table[text(prompt)][text(response)] = value
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "reward.py").write_text(REWARD)
    write(folder / "prompts.jsonl", [{"prompt": "c b a"}, {"prompt": "a a a a"}])  # those of training
    write(folder / "prompts_test.jsonl", [{"prompt": text(prompt)} for prompt in PROMPTS])
    reference = make_policy(0)
    policies = {"reference": reference, "optimum": make_optimum(reference, rewards), "other": make_policy(1)}
    for name, model in policies.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    specs = [f"{folder}/reward.py:{name}" for name in ("reward", "shifted")]
    args = frontier.Args(
        reference=str(folder / "reference"), policies=[str(folder / name) for name in policies], rewards=specs,
        dataset=str(folder / "prompts_test.jsonl"), reference_samples=N_REF, policy_samples=N, max_new_tokens=2,
        betas=[2.0, 1.0, 0.5])  # fmt: skip
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        results = frontier.main(args)
    by_name = {}
    for spec in specs:
        judged = {name: results[spec]["policies"][str(folder / name)] for name in policies}
        by_name[spec.rpartition(":")[2]] = {**results[spec], "policies": judged}
    return types.SimpleNamespace(results=by_name, screen=screen.getvalue(), policies=policies, rewards=rewards,
                                 log_ref=law(reference))  # fmt: skip


# ---- Tests ----


def test_the_optimum_is_one(world):
    """The policy in its folder is pi_ref exp(r / beta) / Z, by all of its responses."""
    want = torch.log_softmax(world.log_ref + world.rewards / BETA, 1)
    assert (law(world.policies["optimum"]) - want).abs().max() < 1e-4
    assert (want - world.log_ref).abs().max() > 1


def test_the_frontier_by_enumeration(world):
    result = world.results["reward"]
    start = (world.log_ref.exp() * world.rewards).sum(1).mean().item()
    assert result["reference_reward"] == pytest.approx(start, abs=0.04)  # four standard errors
    for beta, reward, kl, ess in result["frontier"]:
        want_reward, want_kl, share = optimum(world.log_ref, world.rewards, beta)
        assert reward == pytest.approx(want_reward, abs=0.05)
        assert kl == pytest.approx(want_kl, abs=0.05)
        assert ess == pytest.approx(N_REF * share, rel=0.1)


@pytest.mark.parametrize("name", ["optimum", "other"])
def test_a_policy_by_enumeration(world, name):
    policy, got = world.policies[name], world.results["reward"]["policies"][name]
    logp, kls = law(policy), kl_along(policy, world.policies["reference"])
    p = logp.exp()
    mean = lambda values: (p * values).sum(1).mean().item()
    lengths = torch.tensor([1.0] + [2.0] * 12, dtype=torch.float64)
    assert mean(kls) == pytest.approx(mean(logp - world.log_ref), abs=1e-6)  # the token's exact KL has the same mean
    assert got["reward"] == pytest.approx(mean(world.rewards), abs=4 * got["reward_se"])
    assert got["kl"] == pytest.approx(mean(kls), abs=4 * got["kl_se"])
    assert got["mean_length"] == pytest.approx(mean(lengths.expand(3, 13)), abs=0.03)
    for error, values in ((got["reward_se"], world.rewards), (got["kl_se"], kls)):
        lowest, highest = standard_errors(values, logp)
        assert 0.9 * lowest < error < 1.1 * highest
    start = (world.log_ref.exp() * world.rewards).sum(1).mean().item()
    gain = largest_reward(world.log_ref, world.rewards, mean(kls)) - start
    assert got["fraction"] == pytest.approx((mean(world.rewards) - start) / gain, abs=0.06)
    assert 0.9 < got["fraction_se"] / (got["reward_se"] / gain) < 3  # pi_ref's samples add an error of their own
    line = f"fraction of the exact optimum {got['fraction']:.3f} +- {got['fraction_se']:.3f}"
    assert line in world.screen


def test_the_optimum_has_fraction_1_at_its_own_beta(world):
    got = world.results["reward"]["policies"]["optimum"]
    assert got["fraction"] == pytest.approx(1, abs=0.05) and got["frontier_beta"] == pytest.approx(BETA, rel=0.1)
    assert world.results["reward"]["policies"]["other"]["fraction"] < 0.7
    gain = got["frontier"] - world.results["reward"]["reference_reward"]
    assert gain > 0.3 and got["frontier"] > 1.3 * gain  # a fraction of the reward would be another number


def test_the_reference_has_no_fraction(world):
    got = world.results["reward"]["policies"]["reference"]
    assert got["kl"] == got["kl_se"] == 0 and got["fraction"] is None
    assert got["reward"] == pytest.approx(world.results["reward"]["reference_reward"], abs=5 * got["reward_se"])


def test_a_prompts_own_level_changes_no_weight(world):
    """100 more for all responses to one of three prompts: each prompt has its own Z."""
    plain, shifted = world.results["reward"], world.results["shifted"]
    more = 100 / 3
    assert shifted["reference_reward"] == pytest.approx(plain["reference_reward"] + more, abs=1e-4)
    for row, (beta, reward, kl, ess) in zip(shifted["frontier"], plain["frontier"]):
        assert row == pytest.approx([beta, reward + more, kl, ess], rel=1e-4)
    for name in ("optimum", "other"):
        assert shifted["policies"][name]["kl"] == plain["policies"][name]["kl"]
        assert shifted["policies"][name]["fraction"] == pytest.approx(plain["policies"][name]["fraction"], abs=1e-3)


def test_the_prompts_are_held_out():
    """Those that frontier.py judges with unless asked otherwise are in no script's training data."""
    prompts = {row["prompt"] for row in read(ROOT / frontier.Args().dataset)}
    assert len(prompts) == 12
    for script in SCRIPTS.values():
        trained = read(ROOT / script.module.Args().dataset)
        assert prompts.isdisjoint(row["prompt"] for row in trained), script.name
