"""Everything about these scripts that only a GPU can settle, in one run of under ten minutes.

    python benchmarks/gpu_check.py          on a machine with a CUDA GPU
    python benchmarks/gpu_check.py --tiny   on a CPU, tiny sizes: tests this file itself

Each step is a process with a time limit of its own and writes each figure when it has it, so that a step that
hangs or crashes costs itself alone; gpu_check.json is rewritten after each. The steps, in this order:
environment   card and versions, and what it does with matrix products, copies, launches
sft ... ppo   the scripts on the embedded world: the CPU against CUDA in fp32 and in bf16, the same command
              twice, and a run that was stopped and resumed
logprobs      token_logprobs against float64, plain log_softmax and TRL's kernel: time, memory, error
rollouts      sample against transformers' generate
train_...     optimizer steps of the scripts with a random model of the size of Qwen2.5-0.5B
--only NAME NAME runs some of them.
"""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
STEPS = [  # those of a line run at the same time: name and seconds
    {"environment": 40},
    {"sft": 90},
    {"reward_model": 90, "dpo": 90, "grpo": 90},
    {"ppo": 90},
    {"logprobs": 90},
    {"rollouts": 90},
    {"train_sft": 60},
    {"train_dpo": 60},
    {"train_reward_model": 60},
    {"train_grpo": 70},
    {"train_ppo": 70},
]
TOTAL = 590  # seconds


@dataclass
class Args:
    output_dir: str = "gpu_check"  # gets gpu_check.json, and the steps' files in work/
    tiny: bool = False  # tiny sizes, on a CPU
    only: tuple[str, ...] = ()  # names of steps; empty: all
    step: str = ""  # used by this file itself: run one step in this process


# ---- The parent: runs the steps and merges what they write ----


def start(name, work, tiny):
    """The process of a step, in a session of its own, so that all of it can be killed."""
    command = [sys.executable, __file__, "--step", name, "--output-dir", str(work)]
    if tiny:
        command.append("--tiny")
    settings = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = open(work / f"{name}.log", "w")
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **settings},
        start_new_session=True)


def finish(name, process, seconds, work):
    """What a step has written, with its status, and the end of its log if it failed."""
    try:
        code = process.wait(max(seconds, 1))
        status = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped after {seconds:.0f} s"
    file = work / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result["status"] = status
    if status != "ok":
        result["log"] = (work / f"{name}.log").read_text(errors="replace")[-2000:]
    return result


def parent(args):
    began, out = time.time(), Path(args.output_dir).absolute()
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    report = {}
    for line in STEPS:
        running = []
        for name, limit in line.items():
            left = TOTAL - (time.time() - began)
            if not args.only or name in args.only:
                running.append((name, time.time(), min(limit, left), start(name, work, args.tiny)))
        for name, since, limit, process in running:
            result = finish(name, process, limit - (time.time() - since), work)
            result["seconds"] = round(time.time() - since, 1)
            report[name] = result
            print(f"{name}: {result['status']}, {result['seconds']} s", flush=True)
            for key, value in result.items():
                if key not in ("status", "seconds"):
                    text = value if key == "log" else json.dumps(value)
                    print(f"    {key}: {text}", flush=True)
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.time() - began:.0f} s; {out / 'gpu_check.json'}")
    return report


# ---- What the steps share ----


class Step:
    """A step's sizes, clock and results."""

    def __init__(self, args):
        import torch

        self.tiny, self.work = args.tiny, Path(args.output_dir)
        self.generator = torch.Generator().manual_seed(0)  # of the rows' words
        self.file = self.work / f"{args.step}.json"
        self.results = {}
        self.device = "cpu" if args.tiny else "cuda"
        if args.tiny:
            torch.set_num_threads(1)
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

    def put(self, key, value):
        self.results[key] = value
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1))
        os.replace(temporary, self.file)

    def synchronize(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def ms(self, function, repeats=5, warm=2):
        """Median milliseconds of a call, after some to warm up."""
        times = []
        for _ in range(warm + repeats):
            self.synchronize()
            now = time.perf_counter()
            function()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - now))
        return digits(statistics.median(times[warm:]))

    def peak(self):
        """GiB allocated at most since the last call of this function."""
        import torch

        if self.device == "cpu":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def digits(x):
    """Three significant digits."""
    return float(f"{x:.3g}")


def rows_of(file):
    return [json.loads(line) for line in open(file)]


def write(step, name, rows):
    file = step.work / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ---- Environment ----


def environment(step):
    import torch
    import transformers

    step.put("versions", {"python": sys.version.split()[0], "torch": torch.__version__,
                          "transformers": transformers.__version__, "cores": os.cpu_count()})
    n = 256 if step.tiny else 8192
    if not step.tiny:
        _, total = torch.cuda.mem_get_info()
        step.put("card", {"name": torch.cuda.get_device_name(), "GiB": round(total / 2**30, 1),
                          "tf32": torch.backends.cuda.matmul.allow_tf32})
    a, b = torch.randn(2, n, n, device=step.device, dtype=torch.bfloat16)
    step.put("bf16 product, TFLOP/s", digits(2 * n**3 / step.ms(lambda: a @ b) / 1e9))
    x = torch.randn(1 << 16 if step.tiny else 1 << 30, device=step.device)
    y = torch.empty_like(x)
    step.put("copy, TB/s read and written", digits(8 * x.numel() / step.ms(lambda: y.copy_(x)) / 1e9))
    small = torch.zeros(8, device=step.device)

    def launch():
        for _ in range(1000):
            small.add_(1)

    step.put("one launch, us", step.ms(launch))
    step.put("one .item(), us", digits(1e3 * step.ms(small.sum().item)))


# ---- The scripts on the embedded world ----


def difference(a, b):
    """Of two runs' metrics before, after the first step and at the end: the largest |x - y| / max(1, |x|)."""
    a, b = rows_of(a / "metrics.jsonl"), rows_of(b / "metrics.jsonl")
    result = {"rows": [len(a), len(b)]}
    for when, i in (("before", 0), ("first step", 1), ("end", -1)):
        gaps = {}
        for name in a[i].keys() & b[i].keys() - {"tokens_per_second"}:
            gaps[name] = abs(a[i][name] - b[i][name]) / max(1.0, abs(a[i][name]))
        worst = max(gaps, key=gaps.get)
        result[when] = [digits(gaps[worst]), worst]
    return result


def same_weights(a, b):
    """The largest difference of two runs' weights, and whether all bits are equal."""
    from safetensors.torch import load_file

    a, b = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    gap = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    return {"largest difference": digits(gap), "bit-identical": gap == 0.0}


def world(step, name, **flags):
    """A script on the CPU in fp32, on CUDA in fp32, in bf16, in bf16 again, and once more in two halves."""
    import common

    script = importlib.import_module(name)

    def run(tag, **more):
        folder = step.work / f"{name}-{tag}"
        began = time.time()
        try:
            script.main(script.Args(**{**flags, **more}, output_dir=str(folder)))
        except SystemExit as error:
            if error.code != 128 + signal.SIGTERM:
                raise
        step.put(f"seconds, {tag}", round(time.time() - began, 1))
        return folder

    cpu = run("cpu", device="cpu", dtype="float32")
    fp32 = run("fp32", device=step.device, dtype="float32")
    step.put("fp32 against the CPU", difference(cpu, fp32))
    bf16 = run("bf16", device=step.device, dtype="bfloat16")
    step.put("bf16 against the CPU", difference(cpu, bf16))
    step.put("bf16, policy/logprob_gap", rows_of(bf16 / "metrics.jsonl")[-2].get("policy/logprob_gap"))
    again = run("again", device=step.device, dtype="bfloat16")
    step.put("the same command twice", same_weights(bf16, again))
    checkpoint = common.Run.checkpoint

    def stop_early(self, number, **numbers):
        if number == 2:
            self.stopped = signal.SIGTERM
        checkpoint(self, number, **numbers)

    common.Run.checkpoint = stop_early
    halves = run("halves", device=step.device, dtype="bfloat16")
    common.Run.checkpoint = checkpoint
    step.put("stopped after step", rows_of(halves / "metrics.jsonl")[-1]["step"])
    run("halves", device=step.device, dtype="bfloat16", resume=True)
    step.put("stopped and resumed", same_weights(bf16, halves))


def head_of_file(step, name, n):
    """The first rows of a file of the embedded world, in a file of their own."""
    text = (ROOT / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    file = step.work / f"{step.file.stem}_{name}.jsonl"
    file.write_text("".join(text[:n]))
    return str(file)


def common_flags(step, train, test, rows):
    rows = rows // 2 if step.tiny else rows
    return {"dataset": head_of_file(step, train, rows), "eval_dataset": head_of_file(step, test, 64),
            "eval_every": 0, "micro_batch_size": 32}


def sft(step):
    flags = common_flags(step, "demonstrations", "demonstrations_test", 320)
    world(step, "sft", **flags, num_train_epochs=2, max_new_tokens=24)


def dpo(step):
    flags = common_flags(step, "preferences", "preferences_test", 192)
    world(step, "dpo", **flags, model=str(step.work / "sft-cpu" / "model"), max_new_tokens=24)


def reward_model(step):
    flags = common_flags(step, "preferences", "preferences_test", 192)
    world(step, "reward_model", **flags, model=str(step.work / "sft-cpu" / "model"))


def rl_flags(step):
    flags = common_flags(step, "prompts", "prompts_test", 48)
    return flags | {"model": str(step.work / "sft-cpu" / "model"), "batch_size": 32, "total_episodes": 256,
                    "max_new_tokens": 24, "eval_samples": 12}


def grpo(step):
    world(step, "grpo", **rl_flags(step), reward=(str(ROOT / "data" / "gold_reward.py") + ":gold_reward",))


def ppo(step):
    world(step, "ppo", **rl_flags(step), reward=(str(step.work / "reward_model-cpu" / "model"),))


# ---- Token log-probs ----


def logprobs(step):
    import logprob  # benchmarks/logprob.py

    shapes = [(16384, 896, 151936), (8192, 1536, 151936), (4096, 4096, 151936)]
    for N, H, V in [(256, 32, 500)] if step.tiny else shapes:
        args = logprob.Args(tokens=N, hidden=H, vocabulary=V, dtype="bfloat16", device=step.device)
        for row in logprob.measure(args, step.device):
            if row["full_s"]:
                figures = {"ms": digits(1e3 * statistics.median(row["full_s"])),
                           "forward ms": digits(1e3 * statistics.median(row["forward_s"])),
                           "GiB": row["bytes"] and digits(row["bytes"] / 2**30),
                           "errors of log-probs, dW, dh": [
                               digits(row[key]) for key in ("logprob_error", "dW_error", "dh_error")]}
            else:
                figures = row["note"]
            step.put(f"{N} x {H} x {V}, {row['implementation']}", figures)


# ---- A random model of the size of Qwen2.5-0.5B ----


def half_billion(step):
    """A folder with it and the embedded world's tokenizer, whose ids are small: Llama's class, which computes
    what Qwen2's does but for three biases, since transformers has another tokenizer for Qwen2.
    """
    import torch
    import transformers

    folder = step.work / "half_billion"
    if not (folder / "done").exists():
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
        if step.tiny:
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
        config = transformers.LlamaConfig(
            **sizes, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=1, pad_token_id=0)
        torch.manual_seed(0)
        with torch.device(step.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "data" / "model" / name, folder)
        (folder / "done").touch()
    return str(folder)


def lengths(step, n, mean, spread=0.4):
    """Ragged lengths in tokens, log-normal as those of GSM8K's answers are (mean 210, 95 % below 339)."""
    import torch

    x = (torch.randn(n, generator=torch.Generator().manual_seed(mean)) * spread).exp()
    x = x / x.mean() * mean / (8 if step.tiny else 1)
    return x.long().clamp(min=2).tolist()


def rollouts(step):
    import torch
    import transformers
    from common import check_model, sample

    folder = half_billion(step)
    new_tokens = 8 if step.tiny else 128
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32).to(step.device).eval()
    half = load(folder, dtype=torch.bfloat16).to(step.device).eval()
    generator = torch.Generator().manual_seed(0)

    def prompts(n):
        return [torch.randint(4, 90, (m,), generator=generator).tolist() for m in lengths(step, n, 100)]

    def ours(rows, temperature=1.0, bf16=True):
        with torch.autocast(step.device, torch.bfloat16, enabled=bf16):
            return sample(model, rows, new_tokens, [1 << 30], temperature)

    def generate(model, rows, bf16=True, **options):
        P = max(map(len, rows))
        ids = torch.tensor([[0] * (P - len(row)) + row for row in rows], device=step.device)
        mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=step.device)
        config = transformers.GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=1, pad_token_id=0, **options)
        with torch.no_grad(), torch.autocast(step.device, torch.bfloat16, enabled=bf16):
            return model.generate(ids, attention_mask=mask, generation_config=config)[:, P:]

    rows = prompts(8)
    check_model(model, rows)
    step.put("check_model", "passed")
    batch = ours(rows, temperature=0.0, bf16=False)
    tokens = batch["input_ids"][batch["mask"]].view(len(rows), -1)
    same = tokens.cpu() == generate(model, rows, bf16=False, do_sample=False).cpu()
    step.put("greedy tokens in fp32 that are generate's", digits(same.float().mean().item()))
    for n in (4, 8) if step.tiny else (32, 256):
        rows = prompts(n)
        groups = [row for row in rows[: n // 8] for _ in range(8)] or rows
        runs = {"ours": partial(ours, rows), "ours, groups of 8": partial(ours, groups),
                "generate": partial(generate, half, rows, bf16=False, do_sample=True, top_k=0)}
        for name, run in runs.items():
            step.peak()
            ms = step.ms(run, repeats=1, warm=1)
            step.put(f"{n} rows, {name}", {"tokens/s": round(1e3 * n * new_tokens / ms),
                                           "ms a token": digits(ms / new_tokens), "peak GiB": step.peak()})


def text(step, n):
    """About n tokens of the embedded world's vocabulary, at random: what rows share is computed once."""
    import torch

    words = "the acting was superb and i loved plot music cast it overall seemed".split()
    return " ".join(words[i] for i in torch.randint(len(words), (max(n, 1),), generator=step.generator))


def training(step, name, num_steps, **flags):
    """A few optimizer steps or updates of a script, the parts of the last one timed."""
    import common
    import torch

    script = importlib.import_module(name)
    clock, ends, seen = {}, [], []

    def timed(key, function):
        def wrapper(*positional, **options):
            if len(ends) != num_steps - 1:
                return function(*positional, **options)
            step.synchronize()
            now = time.time()
            result = function(*positional, **options)
            step.synchronize()
            clock[key] = clock.get(key, 0.0) + time.time() - now
            return result

        return wrapper

    def count(function):
        def wrapper(model, input_ids, mask, **options):
            if torch.is_grad_enabled():
                seen.append((len(ends), input_ids, mask))
            return function(model, input_ids, mask, **options)

        return wrapper

    common.sequence_logprobs = count(common.sequence_logprobs)
    for module in (common, script):
        if hasattr(module, "sequence_logprobs"):
            module.sequence_logprobs = timed("sequence_logprobs", common.sequence_logprobs)
        for key in ("sample", "rollout", "per_token", "token_values"):
            if hasattr(module, key):
                setattr(module, key, timed(key, getattr(module, key)))
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)
    torch.optim.AdamW.step = timed("optimizer", torch.optim.AdamW.step)
    log = common.Run.log

    def note(run, number, metrics, samples=()):
        log(run, number, metrics, samples)
        if "tokens_per_second" in metrics:
            step.synchronize()
            ends.append(time.time())
            step.put("metrics", {key: digits(value) for key, value in metrics.items()})
            step.put("peak GiB", step.peak())

    common.Run.log = note
    common.Run.checkpoint = common.Run.finish = lambda *parts, **more: None  # gigabytes that nobody reads
    began = time.time()
    flags |= {"model": half_billion(step), "device": step.device, "dtype": "bfloat16", "eval_every": 0}
    script.main(script.Args(**flags, output_dir=str(step.work / f"train-{name}")))
    step.put("seconds of the whole run", round(time.time() - began, 1))
    seconds = [after - before for before, after in zip(ends, ends[1:-1])]  # not of the first and the last
    step.put("seconds of each step", [digits(x) for x in seconds])
    first = len(seconds) // 2  # until then kernels are loaded and memory is taken
    seconds = sum(seconds[first:])
    parts = {name: digits(x) for name, x in clock.items()}
    step.put("seconds of the parts of the last step, waiting for each", parts)
    tokens = computed = 0
    for number, input_ids, mask in seen:
        if first < number < num_steps - 1:
            tokens += int((common.last_token(mask) + 1).sum())  # of the rows, prompts too
            computed += common.Rows(input_ids, mask.roll(-1, dims=1)).ids.numel()  # what rows share once
    if tokens:
        parameters = common.AutoModelForCausalLM.from_pretrained(half_billion(step)).num_parameters()
        step.put("trained tokens/s, prompts among them", round(tokens / seconds))
        step.put("of them computed, since rows share prompts", digits(computed / tokens))
        flops = 6 * parameters * computed / seconds
        step.put("MFU of 989 TFLOP/s, 6 flops a parameter and computed token", digits(flops / 989e12))


def sizes(step, batch_size):
    """Rows in a file and flags for eight steps of one micro-batch, of some 20,000 tokens, each."""
    batch_size = batch_size // 16 if step.tiny else batch_size
    flags = {"num_steps": 8, "batch_size": batch_size, "micro_batch_size": batch_size}
    return 8 * batch_size, flags


def train_sft(step):
    n, flags = sizes(step, 128)
    rows = []
    for prompt, completion in zip(lengths(step, n, 60), lengths(step, n, 150)):
        rows.append({"prompt": text(step, prompt), "completion": " " + text(step, completion)})
    training(step, "sft", **flags, dataset=write(step, "train_sft", rows), eval_samples=2, max_new_tokens=4,
             eval_dataset=write(step, "train_sft_test", rows[:4]), num_train_epochs=1, learning_rate=1e-5)


def pairs(step, n):
    """Pairs with the lengths of HH-RLHF's."""
    rows, of_both = [], (lengths(step, n, 38, 0.8), lengths(step, n, 48, 0.8))
    for prompt, chosen, rejected in zip(lengths(step, n, 120), *of_both):
        rows.append({"prompt": text(step, prompt), "chosen": " " + text(step, chosen) + " a",
                     "rejected": " " + text(step, rejected)})
    name = step.file.stem
    return {"dataset": write(step, name, rows), "eval_dataset": write(step, f"{name}_test", rows[:4])}


def train_dpo(step):
    n, flags = sizes(step, 64)
    training(step, "dpo", **flags, **pairs(step, n), eval_samples=2, max_new_tokens=4, learning_rate=1e-6)


def train_reward_model(step):
    n, flags = sizes(step, 64)
    training(step, "reward_model", **flags, **pairs(step, n), learning_rate=1e-6)


def rl(step, n):
    """Prompts, and a reward that counts characters."""
    rows = [{"prompt": text(step, length)} for length in lengths(step, 64, 100)]
    file = step.work / "length_reward.py"
    file.write_text("def reward(prompts, completions, **columns):\n"
                    "    return [float(len(text) % 7) for text in completions]\n")
    name = step.file.stem
    return {"dataset": write(step, name, rows), "eval_dataset": write(step, f"{name}_test", rows[:4]),
            "reward": (f"{file}:reward",), "batch_size": n, "num_minibatches": 1, "update_epochs": 1,
            "total_episodes": 6 * n, "micro_batch_size": n // 2, "eval_samples": 4, "num_steps": 6,
            "max_new_tokens": 6 if step.tiny else 128, "learning_rate": 1e-6}


def train_grpo(step):
    training(step, "grpo", **rl(step, 16 if step.tiny else 128), num_generations=8, kl_coef=0.001)


def train_ppo(step):
    training(step, "ppo", **rl(step, 16 if step.tiny else 128), kl_coef=0.05, critic="policy")


def main(args: Args):
    if not args.step:
        return parent(args)
    step = Step(args)
    try:
        globals()[args.step](step)
    except BaseException as error:
        step.put("error", repr(error)[:400])
        raise


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
