"""grpo.py beside TRL's GRPOTrainer: same model, prompts, reward and flags. Time of a step, learning curves.

    pip install trl datasets matplotlib
    python benchmarks/grpo_trl.py

Both start from the folder that sft.py makes, on the embedded world's gold reward, in one process with one
thread of torch, and take turns in going first. Two forms of the KL term in the loss, under their names in TRL
and in grpo.py:

    use_bias_correction_kl=False         --kl-estimator k3    as published
    use_bias_correction_kl=True          --kl-estimator k2    k3 times the ratio of policies, TRL's default

With one optimizer step a batch the ratio is 1, and the second pair has the same gradient on every sample:
grad(rho k3) = (k3 + 1 - 1 / exp(d)) grad log pi = d grad log pi = grad(d^2 / 2), d = log pi / pi_ref.

Checked first: that both see the same token ids of prompts, and make the same of a batch that TRL sampled in
the middle of a run: advantages, log-probs of the reference, gradient.
Time: of whole steps, sampling, reward, update and logging, from the end of one to the end of the next, from
step 6 on, on the wall and of the process on its CPU, which other jobs on the machine disturb less. TRL runs
with bf16 and gradient checkpointing off, as grpo.py does on a CPU; its time with both on, its default, is
taken too.
Curves: reward and KL, in nats a response, of the samples that an update trains on. For the KL grpo.py logs
the mean of sum_t log pi / pi_ref, and TRL the mean k3 of a token, here times the mean length: both are
estimates of KL(pi || pi_ref) without bias. Final policies are judged by frontier.py on held-out prompts.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "data")]
import frontier  # noqa: E402
import grpo  # noqa: E402
from common import fail, pad, read_rows, sequence_logprobs  # noqa: E402
from gold_reward import gold_reward  # noqa: E402
from logprob import hardware, version  # noqa: E402


@dataclass
class Args:
    model: str = "runs/sft/model"  # folder that both start from
    dataset: str = "data/prompts.jsonl"  # prompts
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])  # of prompts' order, samples
    forms: list[str] = field(default_factory=lambda: ["k3", "k2"])  # of the KL term: --kl-estimator
    updates: int = 80  # a run
    prompts: int = 16  # an update
    generations: int = 8  # responses to each
    learning_rate: float = 1e-3  # falls linearly to 0
    beta: float = 0.3  # KL penalty
    max_new_tokens: int = 40  # longest response
    default_updates: int = 16  # of a run with TRL's own precision and checkpointing, for its time (0: none)
    output: str = "benchmarks/results/grpo_trl"  # .json and .png


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def step_times(stamps: list[tuple[float, float]]) -> dict:
    """Milliseconds of steps 6 to the last on the wall and on the CPU, from `now` at the end of each step."""
    times = [(1e3 * (b[0] - a[0]), 1e3 * (b[1] - a[1])) for a, b in zip(stamps[4:], stamps[5:])]
    return dict(zip(("wall_ms", "cpu_ms"), map(list, zip(*times))))


def run_ours(args: Args, form: str, seed: int, folder: str) -> dict:
    """wall_ms and cpu_ms of steps 6 to the last; reward, kl (nats a response) and length of every update."""
    rows, stamps, original = [], [], grpo.Run

    class TimedRun(original):
        def log(self, step, metrics, samples=()):
            super().log(step, metrics, samples)
            if "reward" in metrics:
                rows.append(metrics)
                stamps.append(now())

    batch = args.prompts * args.generations
    flags = grpo.Args(
        model=args.model, dataset=args.dataset, output_dir=folder, seed=seed, batch_size=batch, device="cpu",
        num_generations=args.generations, total_episodes=args.updates * batch,
        learning_rate=args.learning_rate, kl_coef=args.beta, kl_estimator=form, eval_every=0, save_every=0,
        max_new_tokens=args.max_new_tokens)  # else defaults: loss_type grpo, clip 0.2, gradient norm 1
    grpo.Run = TimedRun
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            grpo.main(flags)
    finally:
        grpo.Run = original
    columns = {"reward": "reward", "kl": "kl", "length": "completions/mean_length"}
    return {**step_times(stamps), **{key: [row[name] for row in rows] for key, name in columns.items()}}


def run_trl(args: Args, form: str, seed: int, folder: str, check: list | None = None, **options) -> dict:
    """As run_ours, by TRL's trainer. Differences on a batch in the middle of the run go into the list check.
    """
    import trl
    from datasets import Dataset

    stamps, middle, seen = [], args.updates // 2, {}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(now())

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            if check is not None and self.state.global_step == middle:
                seen.update(batch)
            return batch

        def training_step(self, model, *rest):
            loss = super().training_step(model, *rest)
            if check is not None and self.state.global_step == middle:
                check.append(differences(args, form, seen, seen["rewards"], self))
            return loss

    def reward(prompts, completions, **columns):
        rewards = gold_reward(prompts, completions)
        seen["rewards"] = torch.tensor(rewards)
        return rewards

    batch = args.prompts * args.generations
    config = trl.GRPOConfig(
        output_dir=folder, seed=seed, max_steps=args.updates, per_device_train_batch_size=batch,
        num_generations=args.generations, max_completion_length=args.max_new_tokens, temperature=1.0,
        top_p=1.0, top_k=0, loss_type="grpo", scale_rewards="group", epsilon=0.2, beta=args.beta,
        use_bias_correction_kl=form == "k2", learning_rate=args.learning_rate, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, disable_dropout=True, use_cpu=True, save_strategy="no",
        report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        **({"bf16": False, "gradient_checkpointing": False} | options))
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in read_rows(args.dataset)])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(model=args.model, reward_funcs=reward, args=config, train_dataset=rows,
                          callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)  # prints a line a step
        trainer.train()
        trainer.save_model(f"{folder}/model")
    log = [row for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in log]
    return {**step_times(stamps), "reward": [row["reward"] for row in log], "length": lengths,
            "kl": [row["kl"] * length for row, length in zip(log, lengths)]}


def differences(args: Args, form: str, batch: dict, rewards: torch.Tensor, trainer) -> dict:
    """What grpo.py makes of TRL's batch minus what TRL does: advantages, log-probs of the reference in nats
    and, relative to its norm, the gradient that TRL has left in its model.
    """
    rows, masks = [], []
    columns = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    for prompt, prompt_mask, completion, completion_mask in zip(*columns):
        prompt, completion = prompt[prompt_mask.bool()].tolist(), completion[completion_mask.bool()].tolist()
        rows.append(prompt + completion)
        masks.append([False] * len(prompt) + [True] * len(completion))
    input_ids, mask = pad(rows, "cpu"), pad(masks, "cpu", False)  # (B, T) each
    with torch.no_grad():
        ref = sequence_logprobs(trainer.ref_model, input_ids, mask)
    advantages = grpo.group_advantages(rewards.view(-1, args.generations)).view(-1)
    parameters = list(trainer.model.parameters())
    logprobs = sequence_logprobs(trainer.model, input_ids, mask)
    losses, _ = grpo.grpo_loss(logprobs, logprobs.detach(), ref, advantages, mask, args.beta, form)
    loss = (losses * grpo.token_weights(mask, "grpo", args.max_new_tokens)).sum()
    flat = lambda tensors: torch.cat([x.flatten() for x in tensors])
    got, want = flat(torch.autograd.grad(loss, parameters)), flat(p.grad for p in parameters)
    gap = lambda a, b: (a - b).abs().max().item()
    return {"advantages": gap(advantages, batch["advantages"]), "gradient_norm": want.norm().item(),
            "ref_logprobs": gap(ref[mask], batch["ref_per_token_logps"][batch["completion_mask"].bool()]),
            "gradient": ((got - want).norm() / want.norm()).item()}


def check_prompts(args: Args) -> None:
    """TRL takes prompts as tokenizer(prompt); see that grpo.py has the same ids for them and the same EOS."""
    flags = grpo.Args(model=args.model)
    _, tokenizer, eos_ids = grpo.load_model(args.model, flags, torch.device("cpu"))
    rows = read_rows(args.dataset)
    ours = [ids for _, ids in grpo.load_prompts(tokenizer, rows, flags.max_prompt_length)]
    if ours != tokenizer([row["prompt"] for row in rows])["input_ids"] or eos_ids != [tokenizer.eos_token_id]:
        fail(f"{args.model}, {args.dataset}: grpo.py and TRL see other token ids, so this compares nothing")


def picture(args: Args, runs: dict, figures: dict) -> None:
    """Reward and KL over updates: thin lines for seeds, thick ones for their means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {("k3", "ours"): "k3 in the loss", ("k3", "trl"): "k3 in the loss",
             ("k2", "ours"): "k2 in the loss", ("k2", "trl"): "ratio k3 in the loss"}
    colors = {"k3": {"ours": "tab:blue", "trl": "tab:red"}, "k2": {"ours": "tab:green", "trl": "tab:orange"}}
    plot, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, ("reward", "kl")):
        for form in args.forms:
            for who, style in (("ours", "-"), ("trl", "--")):
                curves = torch.tensor([run[key] for run in runs[form][who]])  # (seeds, updates)
                steps, color = range(1, curves.shape[1] + 1), colors[form][who]
                axis.plot(steps, curves.T, style, color=color, alpha=0.35, linewidth=0.6)
                name = "grpo.py" if who == "ours" else "TRL"
                label = f"{name}, {names[form, who]}, {figures[form][who]['cpu_ms']:.0f} ms of CPU a step"
                axis.plot(steps, curves.mean(0), style, color=color, linewidth=2, label=label)
        axis.set(xlabel="update", ylabel={"reward": "reward, mean over the samples of an update",
                                          "kl": "KL(policy || start), nats a response"}[key])
        axis.grid(alpha=0.25)
    kls = torch.tensor([run["kl"] for form in args.forms for who in runs[form] for run in runs[form][who]])
    axes[1].set_ylim(0, 1.1 * kls.quantile(0.99).item())  # a seed may spike for an update
    axes[0].legend(fontsize=8)
    plot.suptitle(f"GRPO on the embedded world, {args.prompts} prompts x {args.generations} responses, beta "
                  f"{args.beta:g}. Thin: {len(args.seeds)} seeds, thick: their mean", fontsize=11)
    plot.savefig(f"{args.output}.png", dpi=110)


def summary(args: Args, runs: dict, judged: dict, difference: dict) -> dict:
    """Of a form of the KL term: medians of times and ratios; results' means and deviations over seeds."""
    table, times = {"difference": difference}, ("wall_ms", "cpu_ms")
    for who in ("ours", "trl"):
        columns = {key: [mean(run[key][-10:]) for run in runs[who]] for key in ("reward", "kl", "length")}
        for key in ("reward", "kl", "fraction"):
            columns[f"held_out_{key}"] = [x[key] for x in judged[who]]
        table[who] = {key: {"mean": mean(x), "std": stdev(x) if len(x) > 1 else 0.0, "seeds": x}
                      for key, x in columns.items()}
        table[who] |= {key: median(ms for run in runs[who] for ms in run[key]) for key in times}
    for key in times:
        table[f"{key}_ratio"] = table["trl"][key] / table["ours"][key]
        pairs = zip(runs["trl"], runs["ours"])  # the two runs of a seed, one after the other
        table[f"{key}_ratios"] = [median(trl[key]) / median(ours[key]) for trl, ours in pairs]
    return table


def report(form: str, table: dict) -> None:
    gap = table["difference"]
    print(f"\n{form}: on a batch of TRL's, ours differs by {gap['advantages']:.0e} in the advantages, "
          f"{gap['ref_logprobs']:.0e} nats\nin the reference, {gap['gradient']:.0e} of the gradient's norm")
    print(f"{'':8}ms  CPU ms   {'last 10 updates: reward, KL':34}held out: reward, KL, fraction")
    for who in ("ours", "trl"):
        row = table[who]
        cells = {key: f"{x['mean']:6.3f} +- {x['std']:.3f}" for key, x in row.items() if "ms" not in key}
        print(f"{who:5}{row['wall_ms']:6.1f}{row['cpu_ms']:8.1f}   {cells['reward']} {cells['kl']}   "
              f"{cells['held_out_reward']} {cells['held_out_kl']} {cells['held_out_fraction']}")
    for key, name in (("wall_ms", "time"), ("cpu_ms", "CPU time")):
        ratios = ", ".join(f"{x:.2f}" for x in table[f"{key}_ratios"])
        print(f"TRL / ours in {name}: {table[f'{key}_ratio']:.2f} (seeds: {ratios})")


def main(args: Args) -> dict:
    missing = [name for name in ("trl", "datasets", "matplotlib") if version(name) is None]
    if missing:
        fail(f"not installed: {', '.join(missing)}; pip install trl datasets matplotlib")
    if not Path(args.model).is_dir():
        fail(f"{args.model}: no such folder; python sft.py makes it")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # TRL uses names that transformers is about to change
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_prompts(args)
    machine = hardware("cpu")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{machine['cpu']}, {machine['cores']} cores, 1 thread; "
          + ", ".join(f"{name} {number}" for name, number in versions.items()), flush=True)

    runs, folders, checks = {form: {"ours": [], "trl": []} for form in args.forms}, {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for form in args.forms:
            for turn, seed in enumerate(args.seeds):
                for who in ("ours", "trl")[:: -1 if turn % 2 else 1]:
                    folder = f"{temporary}/{form}_{who}_{seed}"
                    check = checks.setdefault(form, []) if turn == 0 else None
                    run = (run_ours(args, form, seed, folder) if who == "ours"
                           else run_trl(args, form, seed, folder, check))
                    runs[form][who].append(run)
                    folders.setdefault((form, who), []).append(f"{folder}/model")
                    print(f"{form} {who:4} seed {seed}: {median(run['wall_ms']):6.1f} ms a step, "
                          f"{median(run['cpu_ms']):6.1f} of CPU; last 10 updates: reward "
                          f"{mean(run['reward'][-10:]):.3f} KL {mean(run['kl'][-10:]):.3f}", flush=True)
        default = None
        if args.default_updates:
            short, options = replace(args, updates=args.default_updates), ("bf16", "gradient_checkpointing")
            default = run_trl(short, "k2", 1, f"{temporary}/default", **dict.fromkeys(options, True))
            default = {key: median(default[key]) for key in ("wall_ms", "cpu_ms")}
        with contextlib.redirect_stdout(io.StringIO()):
            policies = sum(folders.values(), [])
            judged = frontier.main(frontier.Args(reference=args.model, policies=policies))
    judged = judged["data/gold_reward.py:gold_reward"]["policies"]
    figures = {}
    for form in args.forms:
        policies = {who: [judged[folder] for folder in folders[form, who]] for who in ("ours", "trl")}
        figures[form] = summary(args, runs[form], policies, checks[form][0])
        report(form, figures[form])
    if default:
        print("\nTRL with bf16 and gradient checkpointing, its defaults: "
              f"{default['wall_ms']:.1f} ms a step, {default['cpu_ms']:.1f} of CPU")
    machine |= {"threads": 1, "load_average": os.getloadavg()[2]}  # of 15 minutes: 1 if nothing else ran
    result = {"args": asdict(args), "hardware": machine, "versions": versions,
              "trl_defaults": default, "forms": figures, "runs": runs}
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items())
    Path(f"{args.output}.json").write_text("{" + lines + "}\n")
    picture(args, runs, figures)
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
