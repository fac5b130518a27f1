"""Figures in the READMEs, in tables and in sentences, are those of the files in benchmarks/results. What has a benchmark of
its own with a test of its own (claims, AlpacaFarm, imdb, pretrained, speed's table, memory, scaling, curves' table) is
tested there.
"""

import csv
import itertools
import json
import statistics

import curves
import first_minutes
import pytest
import seeds
from conftest import ROOT
from gold_reward import gold_reward
from make_world import entropy
from tiny_runs import read

RESULTS = ROOT / "benchmarks" / "results"
MAIN, TEXT = ((ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md"))


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def section(title, text=TEXT) -> str:
    """The words of a section."""
    (_, rest) = text.split(f"\n## {title}\n")
    return " ".join(rest.partition("\n## ")[0].split())


def rows(title, first, text=TEXT) -> list[list[str]]:
    """The cells of a table's rows below the line of headings that begins with `first`, without stars."""
    (_, rest) = text.split(f"\n## {title}\n")
    (_, rest) = rest.partition("\n## ")[0].split(f"\n| {first}")
    (table, *_) = rest.partition("\n")[2].partition("\n")[2].split("\n\n")
    return cells_of(table)


def cells_of(table) -> list[list[str]]:
    """Of each line, without stars."""
    return [[cell.strip(" *") for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()]


def held(words, *figures):
    """All of these are there, in this order."""
    for figure in figures:
        _, found, words = words.partition(figure)
        assert found, figure


def curve(name):
    """The evaluations of a recorded run: the first one and the last one."""
    found = [row for row in read(RESULTS / "curves" / f"{name}.jsonl") if any(key.startswith("eval/") for key in row)]
    return found[0], found[-1]


# ---- Files ----


@pytest.mark.parametrize("file", sorted(file.name for file in RESULTS.iterdir()))
def test_each_file_of_results_has_its_command(file):
    """The README names it, or a benchmark that the README names writes it."""
    stem = file.partition(".")[0]
    writers = [path.name for path in (ROOT / "benchmarks").glob("*.py") if f"results/{stem}" in path.read_text()]
    assert f"results/{file}" in TEXT or any(f"python benchmarks/{name}" in TEXT for name in writers)


# ---- Data ----


def test_the_embedded_world():
    pairs, held_out = (read(ROOT / "data" / f"preferences{part}.jsonl") for part in ("", "_test"))
    sizes = [len(read(ROOT / "data" / f"{name}.jsonl")) for name in ("demonstrations", "prompts_test")]
    ceilings = [max(row["p_chosen"], 1 - row["p_chosen"]) for row in held_out]
    noise = sum(x * (1 - x) / 2 for x in ceilings) ** 0.5 / len(ceilings)  # two voters a pair
    ties = sum(row["mu"] == 0.5 for row in pairs) / len(pairs)
    ceiling = f"{statistics.mean(ceilings):.3f}"
    held(section("The embedded world"), f"{sizes[0]:,} demonstrations", f"{len(pairs):,} preference pairs",
         f"of which {sizes[1]} are held out", f"{100 * ties:.0f} % are ties", f"accuracy is {ceiling}",
         f"over these {len(held_out):,} pairs", f"by ± {noise:.3f}")  # fmt: skip
    assert f"ceiling of the accuracy {ceiling}" in section("SFT and DPO")


def test_rankings():
    """The gold reward itself on the held-out rankings."""
    held_out = read(ROOT / "data" / "rankings_test.jsonl")
    assert len(read(ROOT / "data" / "rankings.jsonl")) == 1500 and len(held_out) == 300
    assert "1,500 rankings of four" in section("Rankings")
    assert f"{1500 + len(held_out):,} rankings of four" in section("The embedded world")
    shares = []
    for row in held_out:
        gold = gold_reward([row["prompt"]] * 4, row["completions"])
        right = []
        for (x, i), (y, j) in itertools.combinations(zip(gold, row["ranking"]), 2):
            vote = 0.5 if i == j else float(i < j)  # 1 is best
            right.append(vote if x > y else 1 - vote if x < y else 0.5)
        shares.append(statistics.mean(right))
    assert f"The gold reward itself has {statistics.mean(shares):.3f}." in section("Rankings")
    pairs, luce = (json.loads((RESULTS / f"rankings_{name}.json").read_text()) for name in ("pairs", "plackett_luce"))
    for found, words in ((pairs, ", 95 %) by all pairs"), (luce, ") with `--loss-type plackett_luce`")):
        accuracy, low, high = (found[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        assert f"{accuracy:.3f} ({low:.3f} to {high:.3f}{words}" in section("Rankings")
    (judged,) = json.loads((RESULTS / "dpo_rankings.json").read_text()).values()
    (policy,) = judged["policies"].values()
    assert f"{policy['fraction']:.3f} ± {policy['fraction_se']:.3f} of the optimum" in section("Rankings")
    assert f"a KL of {policy['kl']:.2f} nats" in section("Rankings")


# ---- The methods ----


def test_lengths():
    methods, optimum = load("frontier")["policies"], load("claims")["length"]["runs"]["gold"]["dpo"][0]
    length = {name: f"{row['mean_length']:.1f}" for name, row in methods.items()}
    pairs = read(ROOT / "data" / "preferences.jsonl")
    sides = []
    for side in ("chosen", "rejected"):
        sides.append(statistics.mean(len(pair[side].split()) + 1 for pair in pairs))  # a word a token, and the EOS
    held(section("SFT and DPO"), f"{optimum['start']:.1f} tokens before, {length['DPO']} after",
         f"{sides[0]:.1f} against {sides[1]:.1f} tokens", f"at the same KL ({optimum['optimum']:.1f})",
         f"({length['PPO, learned reward']} on the learned reward, {length['PPO, gold reward']} on the gold reward)",
         f"({length['GRPO, k3 in the loss (default)']} with k3 in the loss, {length['GRPO, k1 in the reward']}")  # fmt: skip


def test_sft_and_dpo():
    result, words = load("seeds"), section("SFT and DPO")
    assert rows("SFT and DPO", "seed |") == cells_of(seeds.dpo_table(result))
    losses = [found["runs"]["sft"]["after"]["eval/loss"] for found in result["seeds"].values()]
    nats, tokens = entropy()
    (_, _, kl, _), _ = load("frontier")["optima"]  # at DPO's default beta
    further = [x - kl for x in seeds.of(result, "dpo", "kl")]
    fractions = seeds.of(result, "dpo", "fraction")
    held(words, f"entropy {nats / tokens:.4f}", f"within {max(losses) - nats / tokens:.3f} nats",
         f"about {min(further):.1f} to {max(further):.1f} nats further", f"(KL {kl:.2f})")  # fmt: skip
    assert f"DPO stays at {min(fractions):.2f} to {max(fractions):.2f} of" in section("Reward model and PPO")
    assert f"no model can be below {nats / tokens:.3f}, the entropy" in MAIN


def test_ppo():
    result, words = load("seeds"), section("Reward model and PPO")
    assert rows("Reward model and PPO", "seed |") == cells_of(seeds.ppo_table(result))
    assert f"PPO reaches {statistics.mean(seeds.of(result, 'ppo', 'fraction')):.2f}." in words
    ends = []
    for name, reward in (("ppo", "learned"), ("ppo-gold", "gold")):
        ends.extend(seeds.of(result, name, "fraction", reward))
    assert min(ends) > 0.9 and "None of the five collapses" in words


def test_grpo():
    result, words = load("seeds"), section("GRPO")
    assert rows("GRPO", "KL term | flags") == cells_of(seeds.grpo_table(result))
    fractions = {name: seeds.of(result, name, "fraction") for name in seeds.POLICIES}
    least = [f"{int(1000 * min(fractions[name])) / 1000:.3f}" for name in ("grpo", "grpo-k1")]
    assert f"No seed of the first row is below {least[0]}, and none of the fourth below {least[1]}" in words
    mean = {name: statistics.mean(x) for name, x in fractions.items()}
    steps = mean["grpo-k2"] - mean["grpo"], mean["grpo-k1"] - mean["grpo-k2"]
    held(words, *(f": {100 * step:.0f} points" for step in steps))
    here = {row[0]: row[-1] for row in rows("Which KL where", "option |", MAIN)}
    dpo = fractions["dpo"]
    want = [f"{mean[name]:.2f}" for name in ("grpo-k1", "grpo", "grpo-k2")]
    assert list(here.values()) == [*want, "–", f"{min(dpo):.2f}–{max(dpo):.2f}"]


def test_sums():
    sums, words = load("claims")["sums"], section("Verifiable rewards")
    mean = {name: f"{statistics.mean(sums[name]):.2f}" for name in ("before", "greedy", "possible", "greedy_after")}
    answers = [row["answer"] for part in ("", "_test") for row in read(ROOT / "data" / f"sums_prompts{part}.jsonl")]
    held(words, f"{len(sums['after'])} seeds",
         f"from {statistics.mean(sums['before']):.3f} to {statistics.mean(sums['after']):.3f}",
         f"({min(sums['after']):.3f} to {max(sums['after']):.3f})", f"right for {mean['greedy']} of the held-out sums",
         f"among 32 samples for {mean['possible']} of them", f"after GRPO right for {mean['greedy_after']}",
         f"more than {max(map(answers.count, set(answers)))} of all {len(answers)} sums")  # fmt: skip
    percents = [f"{100 * end(sums['after']):.0f}" for end in (min, max)]
    assert f"to {' to '.join(percents)} % of held-out sums" in " ".join(MAIN.split())


def test_overoptimization():
    result = load("overoptimization")
    points = {}
    for point in result["2000"]["policies"]:
        points.setdefault(point["beta"], []).append(point)
    mean = lambda beta, key: f"{statistics.mean(point[key] for point in points[beta]):.2f}"
    last = [f"{point['gold']:.2f}" for point in points[0.03]]
    more = result["20000"]["held_out_accuracy"] - result["2000"]["held_out_accuracy"]
    held(section("Over-optimization"), f"rises from {mean(0.1, 'learned')} to {mean(0.03, 'learned')}",
         f"falls from {mean(0.1, 'gold')} to {mean(0.03, 'gold')}, in each seed (to {last[0]}, {last[1]} and {last[2]})",
         f"just {more:.3f} higher")  # fmt: skip


def test_fixed_points():
    table = rows("Fixed points", "KL term, beta 0.5")
    assert load("fixed_points")["args"]["beta"] == 0.5
    shares, worst = {}, [0.0, 0.0]
    for name, found in load("fixed_points")["problems"].items():
        for row in found:
            x = [100 * share for share in row["share_lost_all"]]
            key = row["kl_in"], row["estimator"], row["level"]
            shares[(name.partition(",")[0], *key)] = statistics.mean(x), min(x), max(x)
            worst[0] = max(worst[0], row.get("distance_to_prediction") or 0)
            worst[1] = max(worst[1], abs(row["J_lost"] - row["beta_kl"]))
    assert [f"{x:.0e}" for x in worst] == ["1e-11", "2e-16"]
    held(section("Fixed points"), "predicted point to 1e-11", "KL(pi || pi*)` to 2e-16")
    three = {key[1:]: x for key, x in shares.items() if key[0].startswith("three")}
    one = {key[1:]: x for key, x in shares.items() if key[0].startswith("one")}
    cells = [row[-2:] for row in table]
    assert cells[0] == ["0", "0"] and abs(one["reward", "k1", "token"][2]) < 1e-12
    mean, low, high = three["loss", "k2", "token"]
    assert cells[1] == ["0", f"{mean:.1f} % ({low:.0f} to {high:.0f})"] and one["loss", "k2", "token"][2] < 1e-12
    assert cells[2] == ["0", "0"] and abs(three["loss", "k2", "sequence"][2]) < 1e-12
    for shown, (mean, low, high) in ((cells[3][0], one["loss", "k3", "token"]), (cells[3][1], three["loss", "k3", "token"]),
                                     (cells[4][1], three["loss", "k3", "sequence"])):
        assert shown == f"{mean:.0f} % ({low:.0f} to {high:.0f})"
    assert cells[5] == [f"{x['loss', 'k1', 'token'][0]:.0f} %" for x in (one, three)]


# ---- Beside others ----


def test_beside_trl():
    result = load("grpo_trl")
    forms, words = result["forms"], section("Beside TRL")
    shown = {}
    for form, row in forms.items():
        for who in ("ours", "trl"):
            x = row[who]["held_out_fraction"]
            shown[form, who] = f"{x['mean']:.3f} ± {x['std']:.3f}"
    ratios = [x for row in forms.values() for x in row["cpu_ms_ratios"]]
    default = result["trl_defaults"]["cpu_ms"] / forms["k3"]["ours"]["cpu_ms"]
    held(words, f"{shown['k3', 'ours']} (TRL {shown['k3', 'trl']}) of the optimum",
         f"{shown['k2', 'ours']} (TRL {shown['k2', 'trl']}) with k2", "differ by 0.005, three standard errors",
         f"{forms['k3']['cpu_ms_ratio']:.2f} times as long with k3, and {forms['k2']['cpu_ms_ratio']:.2f} times",
         f"single seeds {min(ratios):.2f} to {max(ratios):.2f}", f"{default:.1f} times with the bf16")  # fmt: skip
    for name, figure in (("advantages", "2e-7"), ("ref_logprobs", "6e-6")):
        assert f"{max(row['difference'][name] for row in forms.values()):.0e}".replace("e-0", "e-") == figure and figure in words
    gradients = [row["difference"]["gradient"] for row in forms.values()]
    assert [f"{x:.0e}" for x in sorted(gradients)] == ["6e-07", "5e-06"] and "6e-7 to 5e-6 of their norm" in words


def test_bradley_terry():
    result, words = load("bradley_terry"), section("Bradley-Terry on arms")
    times = result["times"]
    table = rows("Bradley-Terry on arms", "1,000 arms")
    for cells, (name, digits) in zip(table, (("from votes", 2), ("from wins", 2), ("bootstrap", 1)), strict=True):
        row = times[name]
        peer = next(x for key, x in row.items() if key in ("evalica", "choix"))
        assert cells[1] == f"{row['bandit_bt']['median']:.{digits}f}" and cells[3] == f"{row['ratio']:.1f}"
        assert float(cells[2].rpartition(" ")[2]) == pytest.approx(peer["median"], rel=0.02)
    worst = max(max(row["evalica"], row["choix"]) for row in result["agreement"])
    smaller = list(result["smaller"].values())
    assert f"{worst:.0e}" == "2e-12" and "Scores agree to 2e-12" in words
    assert f"({smaller[3]:.1f}), and the bootstrap {smaller[4]:.1f} times" in words


def test_the_leaderboard():
    with open(RESULTS / "llmfao.csv") as file:
        board = {row["rank"]: row for row in csv.DictReader(file)}
    shown = [cells for cells in rows("Bradley-Terry on arms", "rank | model") if cells[0] != "..."]
    assert len(shown) == 8 and len(board) == 59
    for rank, arm, reward, interval, ranks, votes in shown:
        row = board[rank]
        assert (arm, reward, votes) == (row["arm"], f"{float(row['reward']):.3f}", row["votes"])
        assert interval == f"{float(row['low']):.2f} to {float(row['high']):.2f}"
        assert ranks == f"{row['best_rank']} to {row['worst_rank']}"


def test_fused_logprobs():
    words, table = section("Fused log-probs"), rows("Fused log-probs", "fp32 weights")
    names = ["log_softmax + gather", "gather on logits.float()", "linear_cross_entropy", "TRL ChunkedLogProb", "ours, default",
             "ours, recompute"]
    for offset, dtype in ((1, "float32"), (4, "bfloat16")):
        found = {row["implementation"]: row for row in load(f"logprob_cpu_{dtype}")["rows"]}
        base = statistics.median(found[names[0]]["full_s"])
        for cells, name in zip(table, names, strict=True):
            if name not in found:
                assert cells[offset] == ""
                continue
            row = found[name]
            time, memory, error = cells[offset : offset + 3]
            assert float(time) == pytest.approx(statistics.median(row["full_s"]) / base, abs=0.0051)
            assert memory == f"{row['bytes'] / 2**20:.0f}"
            assert float(error) == pytest.approx(row["logprob_error"], rel=0.13)
    for ratio in load("logprob_cpu_float32")["checks"]:
        time, memory = (x.partition(" ")[0] for x in ratio.split("ratio ")[1:])
        assert f"{time} " in words and f"at {memory} of its memory" in words
    assert "1.51 times as long as plain gather" in words
    assert load("logprob_cpu_bfloat16")["checks"][1].startswith("default vs plain gather: time ratio 1.51 ")


def test_the_first_step():
    first, words = load("speed")["first_step"], section("Speed")
    ratio, low, high = first["cpu_ratio"]
    assert f"{first['ours']['cpu_s']:.1f} CPU seconds, TRL {first['trl']['cpu_s']:.1f}, that is {ratio:.2f} " \
           f"({low:.2f}-{high:.2f}) times ours" in words


# ---- GPU ----


def test_on_a_gpu():
    result, words = load("gpu_check_h200"), section("On a GPU")
    scripts = ("sft", "reward_model", "dpo", "grpo", "ppo")
    bounds = []
    for when, bound in (("before", 4e-7), ("first step", 4e-6), ("end", 8e-7)):
        assert bound / 2 < max(result[script]["fp32 against the CPU"][when][0] for script in scripts) <= bound
        bounds.append(f"{bound:.0e}".replace("e-0", "e-"))
    held(words, f"{bounds[0]} before training, {bounds[1]} after the first step and {bounds[2]} at the end")
    bf16 = max(result[script]["bf16 against the CPU"]["end"][0] for script in scripts[:3])
    assert f"losses, accuracies and rewards differ by up to {bf16:.2f};" in words
    kinds = ["log_softmax + gather", "gather on logits.float()", "TRL ChunkedLogProb", "ours, default"]
    ratios = []
    for shape, *cells in rows("On a GPU", "tokens x hidden"):
        found = [result["logprobs"][f"{shape}, {kind}"] for kind in kinds]
        for cell, row in zip(cells, found, strict=True):
            time, error, memory = cell.replace("*", "").strip(")").replace(" (", "; ").split("; ")
            assert (time, memory) == (f"{row['ms']:.1f}", f"{row['GiB']:.1f}")
            assert float(error) == pytest.approx(row["errors of log-probs, dW, dh"][0], rel=0.2)
        ratios.append(f"{found[2]['ms'] / found[3]['ms']:.2f}")
    held(words, f"cost {ratios[0]}, {ratios[1]} and {ratios[2]} times TRL's speed", "dW 2.7e-3, dh 2.1e-3; TRL 7e-3")
    errors = result["logprobs"]["16384 x 896 x 151936, ours, default"]["errors of log-probs, dW, dh"]
    assert [f"{x:.1e}" for x in errors[1:]] == ["2.7e-03", "2.1e-03"]
    for number, *cells in rows("On a GPU", "rows |"):
        kinds = ("ours", "ours, groups of 8", "generate")
        speeds = [result["rollouts"][f"{number} rows, {kind}"]["tokens/s"] for kind in kinds]
        assert cells == [*(f"{x:,}" for x in speeds), f"{speeds[0] / speeds[2]:.1f}"]
    times = [result["rollouts"][f"{number} rows, ours"]["ms a token"] for number in (32, 256)]
    assert [f"{x:.1f}" for x in times] == ["4.5", "6.7"] or times[0] == 4.45
    assert "A step takes 4.5 to 6.7 ms" in words


# ---- Curves ----


def test_runs_at_ten_times_the_learning_rate():
    words = section("Is my run healthy")
    before, after = curve("dpo-lr-1")
    fall = [before[key] - after[key] for key in ("eval/logps/chosen", "eval/logps/rejected")]
    held(words, f"keeps its accuracy ({after['eval/rewards/accuracies']:.3f}, seed 1)",
         f"fall by {fall[0]:.0f} and {fall[1]:.0f} nats and four samples in ten")  # fmt: skip
    assert after["completions/eos_rate"] == pytest.approx(0.6, abs=0.05)
    losses = [f"{curve(name)[1]['eval/loss']:.3f}" for name in ("sft-lr-1", "sft-1")]
    accuracies = [f"{curve(name)[1]['eval/accuracy']:.3f}" for name in ("reward_model-lr-1", "reward_model-1")]
    held(words, f"a loss of {losses[0]} in place of {losses[1]} and an accuracy of {accuracies[0]} in place of {accuracies[1]}")
    chosen = curve("dpo-1")[1]["eval/rewards/chosen"]
    assert f"on the embedded world from 0 to {chosen:.1f} while" in section("Reading the curves")


def test_a_narrower_band(monkeypatch):
    """With 4 standard deviations one healthy run would leave it, with the 5 of the README none does."""
    lost = {}
    for width in (4.0, 5.0):
        monkeypatch.setattr(curves, "WIDTH", width)
        lost[width] = 0
        for name, row in load("curves/verdicts")["runs"].items():
            if row["made"] == "healthy":
                log = curves.read(curves.CURVES / f"{name}.jsonl")
                others = [curves.CURVES / f"{log.script}-{seed}.jsonl" for seed in curves.SEEDS]
                band = [curves.read(file) for file in others if file.stem != name]
                lost[width] += curves.verdict(log, band)["verdict"] != "healthy"
    assert lost == {4.0: 1, 5.0: 0} and "(4 would have lost one of them)" in section("Is my run healthy")


def test_what_you_should_see():
    shown = {cells[0].strip("`"): cells[2] for cells in rows("What you should see", "command |", MAIN)}
    before, after = curve("sft-1")
    assert shown["python sft.py"] == f"{before['eval/loss']:.3f} → {after['eval/loss']:.3f}"
    accuracy = curve("dpo-1")[1]["eval/rewards/accuracies"]
    assert shown["python dpo.py"] == f"0.5 → {accuracy:.3f}"
    assert shown["python reward_model.py"] == f"{curve('reward_model-1')[1]['eval/accuracy']:.3f}"
    methods = load("frontier")["policies"]
    assert shown["python benchmarks/frontier.py"] == f"{methods['DPO']['fraction']:.3f}"
    learned = seeds.of(load("seeds"), "ppo", "fraction", "learned")[0]
    assert shown["python ppo.py"] == f"{learned:.2f}, {methods['PPO, learned reward']['fraction']:.2f}"
    k3, k1 = (methods[name]["fraction"] for name in ("GRPO, k3 in the loss (default)", "GRPO, k1 in the reward"))
    assert shown["python grpo.py"] == f"{k3:.2f}"
    assert shown["python grpo.py --kl-in reward --output-dir runs/grpo-k1"] == f"{k1:.2f}"


def test_the_first_minutes():
    shown = {row[0].strip("`"): row[3] for row in rows("What you should see", "command |", MAIN)}
    seconds = load("first_minutes")["cpu_seconds"]
    assert list(seconds) == first_minutes.commands() == list(shown)
    assert shown == {command: f"{x:.0f}" for command, x in seconds.items()}


def test_no_file_tells_where_it_was_made():
    for file in RESULTS.rglob("*.json"):
        assert '"/' not in file.read_text(), file
