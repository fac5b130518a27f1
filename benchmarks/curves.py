"""Is my run healthy, and what should it look like? Its curves over those of five seeds, and a verdict.

    python benchmarks/curves.py runs/ppo                      one run, finished or not
    python benchmarks/curves.py runs/ppo runs/other runs/dpo  several, in one picture
    python benchmarks/curves.py --record runs/curves          makes reference and sick runs again: 25 minutes

Two things are looked at, both in metrics.jsonl:
1. Signs of sickness, `SIGNS`, for any model and data: each has a figure, a limit, and what to do.
2. The band: mean of five seeds of the run without flags, plus and minus `WIDTH` standard deviations, from
   benchmarks/results/curves/. A run leaves it where `ROW` parts in a row are outside, a part being 1/25 of
   the run. It is the embedded world's: a run with other tokens a step, or another first reward, has no band
   and is judged by the signs alone.

The picture needs matplotlib and is curves.png in the first run's folder; the words come without it.
"""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, variance
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from common import fail  # noqa: E402
from gold_reward import gold_reward  # noqa: E402

CURVES = ROOT / "benchmarks" / "results" / "curves"
PARTS = 25  # of a run
WIDTH = 5.0  # half the band, in standard deviations between seeds
ROW = 3  # so many parts in a row outside: the run leaves the band
WATCH = {  # script -> what to watch. The first one tells the scripts apart
    "sft": ("mean_token_accuracy", "loss", "grad_norm"),
    "reward_model": ("margin", "loss", "accuracy", "grad_norm"),
    "dpo": ("rewards/margins", "loss", "rewards/accuracies", "rewards/chosen"),
    "ppo": ("objective/scores", "objective/kl", "policy/entropy", "completions/mean_length"),
    "grpo": ("reward", "kl", "entropy", "completions/mean_length"),
}
REWARD = {"ppo": "objective/scores", "grpo": "reward"}
KL = {"ppo": "objective/kl", "grpo": "kl"}
KEPT = ("learning_rate", "policy/logprob_gap", "policy/approx_kl", "policy/clipfrac", "completions/eos_rate",
        "completions/mean_length", "frac_reward_zero_std")  # of a thinned log, besides what is watched


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # folders of runs
    output: str = ""  # the picture; empty: curves.png in the first run's folder
    record: str = ""  # folder for the runs behind the reference: makes those that are missing


# ---- Runs ----


class Log(NamedTuple):
    """A run: its script, the rows of training and of evaluations, its last step."""

    script: str
    training: list[dict]
    evaluations: list[dict]
    last: int

    def parts(self, name, last=0) -> dict[int, float]:
        """{part: mean of this metric}, a part being 1/25 of `last` steps, by default of its own."""
        values = {}
        for row in self.training:
            if name in row:
                part = (row["step"] - 1) * PARTS // (last or self.last)
                values.setdefault(part, []).append(row[name])
        return {part: fmean(values[part]) for part in sorted(values)}

    def start(self, name) -> float:
        """Before training, on held-out rows; where that is not logged, in the first part."""
        first = self.evaluations[0] if self.evaluations else {}
        return first.get(f"eval/{name}", next(iter(self.parts(name).values()), math.nan))

    def end(self, name) -> float:
        """The mean over the last fifth of the run."""
        values = list(self.parts(name).values())
        return fmean(values[-max(len(values) // 5, 1) :]) if values else math.nan

    @property
    def tokens(self) -> float:
        """Of the first step."""
        return self.training[0]["num_tokens"] / self.training[0]["step"]


def read(path) -> Log:
    """The log of a run's folder, or of a .jsonl file."""
    file = Path(path)
    if file.suffix != ".jsonl":
        file = file / "metrics.jsonl"
    if not file.exists():
        fail(f"{file} does not exist: pass the folder of a run")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    training = [row for row in rows if "learning_rate" in row]
    scripts = [script for script, (name, *_) in WATCH.items() if training and name in training[0]]
    if len(scripts) != 1:
        fail(f"{file}: it has no training step of sft.py, reward_model.py, dpo.py, ppo.py or grpo.py")
    evaluations = [row for row in rows if "learning_rate" not in row]
    return Log(scripts[0], training, evaluations, training[-1]["step"])


# ---- Signs of sickness, for any model and data ----


def gain(log) -> float:
    """Reward of the last fifth less that of the first part, in standard deviations of a part."""
    values = list(log.parts(REWARD[log.script]).values())
    jumps = [b - a for a, b in zip(values, values[1:])]
    noise = median(map(abs, jumps)) / 0.954 if jumps else 0.0  # of a part: |a - b| has the median 0.954 sd
    return (log.end(REWARD[log.script]) - values[0]) / max(noise, 1e-9)


def largest(name):
    return lambda log: max(log.parts(name).values(), default=math.nan)


def kl_of_tokens(log) -> list[float]:
    """KL of the parts, in nats a token."""
    kl, length = log.parts(KL[log.script]), log.parts("completions/mean_length")
    return [kl[part] / length[part] for part in kl]


def kl_at_the_end(log) -> float:
    values = kl_of_tokens(log)
    return fmean(values[-max(len(values) // 5, 1) :])


def kl_of_the_first_tenth(log) -> float:
    values = kl_of_tokens(log)
    return max(values[: max(len(values) // 10, 1)])


def is_solved(log) -> bool:
    """Nine responses in ten are right, of a reward of 1 for right and 0 for wrong: then all may be alike."""
    return last("pass_at_1")(log) > 0.9


def entropy_left(log) -> float:
    name = "policy/entropy" if log.script == "ppo" else "entropy"
    return math.nan if is_solved(log) else log.end(name) / next(iter(log.parts(name).values()))


def groups_without_variance(log) -> float:
    return math.nan if is_solved(log) else log.end("frac_reward_zero_std")


def rise(log) -> float:
    """The last loss on held-out rows over the least one."""
    values = [row["eval/loss"] for row in log.evaluations if "eval/loss" in row]
    return values[-1] / min(values) if values else math.nan


def fall_in_margins(log) -> float:
    """How far rewards/chosen has fallen, in units of the margin: beta cancels. NaN without a margin."""
    margin = log.end("rewards/margins")
    return -log.end("rewards/chosen") / margin if margin > 0.05 else math.nan


def chance(log) -> float:
    """The loss of a coin: log 2. Where DPO starts, which is another value for IPO."""
    return log.start("loss") if log.script == "dpo" else math.log(2)


def of_chance(log) -> float:
    return last("loss")(log) / chance(log)


def largest_of_chance(log) -> float:
    return max(log.parts("loss").values()) / chance(log)


def last(name):
    return lambda log: log.evaluations[-1].get(f"eval/{name}", math.nan) if log.evaluations else math.nan


def last_rate(log) -> float:
    return log.evaluations[-1].get("completions/eos_rate", math.nan) if log.evaluations else math.nan


def rate_left(log) -> float:
    first = log.evaluations[0].get("completions/eos_rate", 0.0) if log.evaluations else 0.0
    return last_rate(log) / first if first else math.nan


class Sign(NamedTuple):
    """A figure of a run with its limit, beyond which the run is sick. NaN: it is not logged."""

    sickness: str
    what: str
    figure: Callable[[Log], float]
    healthy: str  # "below" or "above" the limit
    limit: float
    advice: str

    def is_sick(self, figure) -> bool:
        return figure > self.limit if self.healthy == "below" else figure < self.limit


RATE, FLAT, AWAY = "learning rate too high", "flat reward", "the KL runs away"
LABELS, OVERFIT, OTHER_START = "labels as good as random", "overfitting", "another start than the reference"
SLOWER = "lower --learning-rate by three or ten"
READ_LABELS = "read pairs: are chosen and rejected exchanged, or the data too few?"
FEWER = "fewer --num-train-epochs, more data or a lower --learning-rate"
OF_SAMPLERS = [
    Sign(OTHER_START, "KL before training, nats a response", lambda log: abs(log.start(KL[log.script])),
         "below", 0.05, "--model has to be what the reference is"),
    Sign("sampler and training disagree", "their largest gap at a token, nats", largest("policy/logprob_gap"),
         "below", 0.5, "try --dtype float32"),
    Sign(RATE, "KL of one update, nats a token", largest("policy/approx_kl"), "below", 0.1, SLOWER),
    Sign(RATE, "tokens that are clipped", largest("policy/clipfrac"), "below", 0.3, SLOWER),
    Sign(RATE, "largest KL in the first tenth, nats a token", kl_of_the_first_tenth, "below", 0.5, SLOWER),
    Sign(FLAT, "gain of the reward, in its own noise", gain, "above", 3.0,
         "read samples and rewards: is it constant, shuffled, never reached, not about the text?"),
    Sign(AWAY, "KL at the end, nats a token", kl_at_the_end, "below", 0.5,
         "raise --kl-coef: a reward that rises as the text leaves all reason is over-optimized"),
    Sign("the entropy collapses", "entropy at the end, of the start's", entropy_left, "above", 0.33,
         "raise --kl-coef or lower --learning-rate: all responses become one"),
    Sign("responses are cut", "share that ends with an EOS, at the end",
         lambda log: log.end("completions/eos_rate"), "above", 0.5,
         "raise --max-new-tokens or --missing-eos-penalty"),
]
SIGNS = {  # script -> its signs, causes before effects
    "ppo": OF_SAMPLERS,
    "grpo": OF_SAMPLERS + [
        Sign("groups without variance", "their share at the end", groups_without_variance, "below", 0.5,
             "solved or hopeless: other prompts, a finer reward, more --num-generations"),
    ],
    "dpo": [
        Sign(OTHER_START, "margin before training", lambda log: abs(log.start("rewards/margins")),
             "below", 0.01, "the loss has to start at log 2 = 0.693"),
        Sign(RATE, "largest loss, of chance's", largest_of_chance, "below", 1.15, SLOWER),
        Sign(RATE, "fall of chosen at the end, in margins", fall_in_margins, "below", 3.0,
             f"{SLOWER}, or raise --beta: probability leaves both sides"),
        Sign(LABELS, "held-out loss at the end, of chance's", of_chance, "below", 0.98, READ_LABELS),
        Sign(OVERFIT, "held-out loss at the end, of the least", rise, "below", 1.1, FEWER),
        Sign("samples do not end", "share that ends with an EOS, of the start's", rate_left, "above", 0.5,
             "lower --learning-rate or raise --beta"),
    ],
    "reward_model": [
        Sign(RATE, "largest loss, of chance's", largest_of_chance, "below", 1.15, SLOWER),
        Sign(LABELS, "held-out loss at the end, of chance's", of_chance, "below", 0.98, READ_LABELS),
        Sign(OVERFIT, "held-out loss at the end, of the least", rise, "below", 1.1, FEWER),
        Sign("rewards are over-confident", "calibration error at the end", last("ece"), "below", 0.1, FEWER),
    ],
    "sft": [
        Sign(OVERFIT, "held-out loss at the end, of the least", rise, "below", 1.05, FEWER),
        Sign("samples do not end", "share that ends with an EOS at the end", last_rate, "above", 0.5,
             "does every row end with an EOS? is --max-new-tokens too low?"),
    ],
}


# ---- The band ----


def band_files(script) -> list[Path]:
    return sorted(CURVES.glob(f"{script}-[1-5].jsonl"))


def band(script) -> list[Log]:
    """The five runs of the reference."""
    return [read(file) for file in band_files(script)]


def limits(logs, name) -> dict[int, tuple[float, float]]:
    """{part: (low, high)}: mean of the seeds -+ WIDTH standard deviations, those of five parts in a row."""
    parts = [log.parts(name) for log in logs]
    columns = {part: [values[part] for values in parts] for part in parts[0]}
    result = {}
    for part, column in columns.items():
        near = [variance(columns[other]) for other in columns if abs(other - part) <= 2]
        half = WIDTH * math.sqrt(fmean(near))
        result[part] = fmean(column) - half, fmean(column) + half
    return result


def is_of_this_world(log, logs) -> bool:
    """It starts as the reference does: tokens of the first step within a tenth, first reward within 0.5."""
    tokens = fmean(each.tokens for each in logs)
    if abs(log.tokens / tokens - 1) > 0.1:
        return False
    name = REWARD.get(log.script)
    return not name or abs(log.start(name) - fmean(each.start(name) for each in logs)) < 0.5


def exits(log, logs) -> list[dict]:
    """Of each quantity that leaves the band: its longest stretch outside, and its farthest value there."""
    found = []
    for name in WATCH[log.script]:
        inside = limits(logs, name)
        values = log.parts(name, logs[0].last)
        longest, current, beyond = [], [], {}
        for part in inside.keys() & values.keys():
            low, high = inside[part]
            beyond[part] = max(low - values[part], values[part] - high)
        for part in sorted(beyond):
            current = [*current, part] if beyond[part] > 0 else []
            longest = max(longest, current, key=len)
        if len(longest) >= ROW:
            far = max(longest, key=beyond.get)
            low, high = inside[far]
            found.append({"name": name, "value": values[far], "low": low, "high": high,
                          "first_step": longest[0] * logs[0].last // PARTS + 1,
                          "last_step": (longest[-1] + 1) * logs[0].last // PARTS})
    return found


# ---- Words and pictures ----

OUTSIDE = "outside the band, without a sign of sickness"


def verdict(log, logs) -> dict:
    """What is to be said of a run: its signs as (sign, figure), where it leaves the band, and a word."""
    signs = [(sign, sign.figure(log)) for sign in SIGNS[log.script]]
    signs = [(sign, figure) for sign, figure in signs if not math.isnan(figure)]
    sick = dict.fromkeys(sign.sickness for sign, figure in signs if sign.is_sick(figure))
    compared = len(logs) > 2 and is_of_this_world(log, logs)
    left = exits(log, logs) if compared else []
    word = "healthy"
    if sick:
        word = "sick: " + ", ".join(sick)
    elif left:
        word = OUTSIDE
    return {"script": log.script, "steps": log.last, "verdict": word, "compared": compared, "signs": signs,
            "left": left, "seeds": len(logs)}


def say(name, found) -> None:
    """The verdict on the screen, each sign with its figure and limit."""
    against = f"beside {found['seeds']} seeds" if found["compared"] else "other data: by signs alone"
    print(f"\n{name}: {found['script']}.py, {found['steps']} steps, {against}")
    advice = {}
    for sign, figure in found["signs"]:
        mark = "ok"
        if sign.is_sick(figure):
            mark = "SICK"
            advice[sign.sickness] = sign.advice
        print(f"  {mark:4}  {sign.what:46} {figure:9.3g}   {sign.healthy} {sign.limit:g}")
    for left in found["left"]:
        side = "above" if left["value"] > left["high"] else "below"
        print(f"  {left['name']} is {side} the band in steps {left['first_step']} to {left['last_step']}: "
              f"{left['value']:.3g}, and the band {left['low']:.3g} to {left['high']:.3g}")
    print(f"  {found['verdict']}")
    for sickness, what in advice.items():
        print(f"    {sickness}: {what}")


def draw(named_logs, file) -> None:
    """A row for each script, a column for each quantity to watch; grey is the band of five seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    middle = lambda part, log: (part + 0.5) * log.last / PARTS
    scripts = [script for script in WATCH if any(log.script == script for log in named_logs.values())]
    size = 15, 3.4 * len(scripts)
    figure, grid = plt.subplots(len(scripts), 4, figsize=size, squeeze=False, layout="constrained")
    for script, row in zip(scripts, grid):
        reference = band(script)
        mine = {name: log for name, log in named_logs.items() if log.script == script}
        compared = reference and any(is_of_this_world(log, reference) for log in mine.values())
        for axes, name in zip(row, WATCH[script]):
            for label, log in mine.items():
                values = log.parts(name)
                axes.plot([middle(part, log) for part in values], list(values.values()), label=label)
            if compared:  # far from the band a curve leaves the picture
                low, high = zip(*limits(reference, name).values())
                steps = [middle(part, reference[0]) for part in range(PARTS)]
                axes.fill_between(steps, low, high, color="#cccccc", zorder=0, label="band of seeds")
                room = 1.5 * (max(high) - min(low))
                bottom, top = axes.get_ylim()
                axes.set_ylim(max(bottom, min(low) - room), min(top, max(high) + room))
            axes.set(title=f"{script}: {name}", xlabel="step")
        for axes in row[len(WATCH[script]) :]:
            axes.axis("off")
        row[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


# ---- The reference, and runs that are sick on purpose ----

SEEDS = (1, 2, 3, 4, 5)  # of the band
UNSEEN = {  # healthy runs that the band does not know: a sixth seed, or an SFT model of another seed
    "ppo-other-6": ("ppo", "--seed 6 --model {folder}/sft-1/model --reward {folder}/reward_model-1/model"),
    "dpo-other-6": ("dpo", "--seed 6 --model {folder}/sft-1/model"),
    "grpo-other-2": ("grpo", "--seed 2 --model {folder}/sft-1/model"),
    "grpo-other-3": ("grpo", "--seed 3 --model {folder}/sft-1/model"),
    "grpo-other-4": ("grpo", "--seed 4 --model {folder}/sft-1/model"),
    "grpo-other-5": ("grpo", "--seed 5 --model {folder}/sft-1/model"),
}
SICK_SEEDS = (1, 2)
OTHER_LABELS = "--dataset {folder}/shuffled.jsonl --eval-dataset data/preferences_test.jsonl"
SICK = {  # name -> script, flags, what it has to be found to have
    "ppo-lr": ("ppo", "--learning-rate 5e-3 --critic-learning-rate 1e-2", RATE),
    "ppo-shuffled": ("ppo", "--reward {curves}:shuffled", FLAT),
    "ppo-kl0": ("ppo", "--kl-coef 0", AWAY),
    "grpo-lr": ("grpo", "--learning-rate 1e-2", RATE),
    "grpo-shuffled": ("grpo", "--reward {curves}:shuffled", FLAT),
    "grpo-kl0": ("grpo", "--kl-coef 0", AWAY),
    "dpo-lr": ("dpo", "--learning-rate 5e-3", RATE),
    "dpo-shuffled": ("dpo", OTHER_LABELS, LABELS),
    "reward_model-lr": ("reward_model", "--learning-rate 3e-2", OUTSIDE),  # it learns, but less
    "reward_model-shuffled": ("reward_model", OTHER_LABELS, LABELS),
    "sft-lr": ("sft", "--learning-rate 6e-2", OUTSIDE),  # it learns more slowly, and ends nearly as well
}
order = random.Random(0)


def shuffled(prompts, completions, **columns):
    """The gold reward of another response: a reward with the right numbers and no information."""
    rewards = gold_reward(prompts, completions)
    return order.sample(rewards, len(rewards))


def shuffle_pairs(file) -> None:
    """The embedded world's pairs, chosen and rejected exchanged in half of them."""
    draw_side = random.Random(0)
    with open(ROOT / "data" / "preferences.jsonl") as source, open(file, "w") as target:
        for line in source:
            row = json.loads(line)
            if draw_side.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            target.write(json.dumps(row) + "\n")


def plan(folder) -> dict[str, tuple[str, list[str]]]:
    """name -> (script, flags) of all runs, in an order in which each finds the models that it needs."""
    result = {}
    for seed in SEEDS:
        start = f"--seed {seed} --model {folder}/sft-{seed}/model"
        learned = f"{start} --reward {folder}/reward_model-{seed}/model"
        starts = {"sft": f"--seed {seed}", "reward_model": start, "dpo": start, "ppo": learned, "grpo": start}
        for script, flags in starts.items():
            result[f"{script}-{seed}"] = script, flags
    for seed in SICK_SEEDS:
        for name, (script, flags, _) in SICK.items():
            own = result[f"{script}-{seed}"][1]
            if "--reward " in flags:
                own = own.partition(" --reward ")[0]
            result[f"{name}-{seed}"] = script, f"{own} {flags}"
    result |= UNSEEN
    fill = lambda flags: flags.format(curves=__file__, folder=folder).split()
    return {name: (script, fill(flags)) for name, (script, flags) in result.items()}


def thin(log) -> list[dict]:
    """The evaluations, and for each 25th of the run the means of what is watched and what signs are made of.
    num_tokens goes on at the rate of the first step, by which worlds are told apart.
    """
    means = {name: log.parts(name) for name in (*WATCH[log.script], *KEPT)}
    rows = list(log.evaluations)
    for part in means["learning_rate"]:
        step = (part + 1) * log.last // PARTS
        row = {"step": step, "num_tokens": round(log.tokens * step)}
        row |= {name: values[part] for name, values in means.items() if part in values}
        rows.append(row)
    rows.sort(key=lambda row: row["step"])
    return json.loads(json.dumps(rows), parse_float=lambda x: float(f"{float(x):.4g}"))


def record(folder) -> dict:
    """Make the runs that are missing in this folder, thin all, and judge them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    shuffle_pairs(Path(folder, "shuffled.jsonl"))
    CURVES.mkdir(parents=True, exist_ok=True)
    for name, (script, flags) in plan(folder).items():
        run = Path(folder, name)
        if not (run / "args.json").exists():  # a sick run may end before its end, with one line
            subprocess.run([sys.executable, ROOT / f"{script}.py", *flags, "--output-dir", run], cwd=ROOT)
        rows = thin(read(run))
        (CURVES / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return judge()


def judge() -> dict:
    """Judge all committed runs, those of the band beside the four others, and write what is found."""
    result = {"torch": version("torch"), "transformers": version("transformers"), "runs": {}}
    for name, (script, flags) in plan("FOLDER").items():
        file = CURVES / f"{name}.jsonl"
        if not file.exists():
            continue
        log = read(file)
        found = verdict(log, [read(other) for other in band_files(script) if other != file])
        say(name, found)
        made = SICK.get(name.rpartition("-")[0], (script, "", "healthy"))[2]
        result["runs"][name] = {
            "command": " ".join(["python", f"{script}.py", *flags]).replace(f"{ROOT}/", ""),
            "made": made, "verdict": found["verdict"],
            "figures": {sign.what: float(f"{figure:.4g}") for sign, figure in found["signs"]},
            "left": [left["name"] for left in found["left"]]}
    (CURVES / "verdicts.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nfor benchmarks/README.md:\n\n{summary(result['runs'])}\n\n{table(result['runs'])}")
    for script in ("ppo", "grpo"):
        healthy = next(name for name in UNSEEN if name.startswith(script))
        names = [healthy, f"{script}-lr-1", f"{script}-shuffled-1", f"{script}-kl0-1"]
        logs = {name: read(CURVES / f"{name}.jsonl") for name in names if (CURVES / f"{name}.jsonl").exists()}
        draw(logs, CURVES / f"{script}.png")
    return result


def table(runs) -> str:
    """Each sign in Markdown: its limit, the healthy runs' range, and the runs that were made to show it."""
    lines = ["| script | sign | healthy | healthy runs | made sick |", "|---|---|---|---|---|"]
    groups = {**SIGNS, "ppo": OF_SAMPLERS, "grpo": SIGNS["grpo"][len(OF_SAMPLERS) :]}
    for script, signs in groups.items():
        scripts = ["ppo", "grpo"] if script == "ppo" else [script]
        for sign in signs:
            healthy, sick = [], {}
            for name, row in runs.items():
                kind = name.rpartition("-")[0]
                figure = row["figures"].get(sign.what)
                if figure is None or not name.startswith(tuple(scripts)):
                    continue
                if row["made"] == "healthy":
                    healthy.append(figure)
                elif row["made"] == sign.sickness:
                    sick.setdefault(kind, []).append(f"{figure:.3g}")
            spread = f"{min(healthy):.3g} to {max(healthy):.3g}" if healthy else ""
            found = "; ".join(f"{kind}: {', '.join(figures)}" for kind, figures in sick.items())
            label = ", ".join(scripts) if sign is signs[0] else ""
            limit = f"{sign.healthy} {sign.limit:g}"
            lines.append(f"| {label} | {sign.what} ({sign.sickness}) | {limit} | {spread} | {found} |")
    return "\n".join(lines)


def summary(runs) -> str:
    """How many runs were called what they are, in a sentence."""
    healthy = [row for row in runs.values() if row["made"] == "healthy"]
    right = sum(row["verdict"] == "healthy" for row in healthy)
    sick = [row for row in runs.values() if row["made"] not in ("healthy", OUTSIDE)]
    named = sum(row["verdict"].startswith(f"sick: {row['made']}") for row in sick)
    seen = sum(bool(row["left"]) for row in sick)
    return (f"Of {len(healthy)} healthy runs, a seed of the band beside the four others, {right} are called "
            f"healthy. Of {len(sick)} runs that are sick on purpose {named} get the name of their sickness "
            f"first, and {seen} leave the band too.")


def main(args: Args) -> dict:
    if args.record:
        return record(args.record)
    if not args.runs:
        fail("pass the folder of a run: python benchmarks/curves.py runs/ppo")
    logs = {name: read(name) for name in args.runs}
    found = {}
    for name, log in logs.items():
        found[name] = verdict(log, band(log.script))
        say(name, found[name])
    first = Path(args.runs[0])
    file = args.output or (first if first.is_dir() else first.parent) / "curves.png"
    try:
        draw(logs, file)
        print(f"\nthe curves: {file}")
    except ImportError:
        print("\nthe picture needs `pip install matplotlib`")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
