"""The two pictures of the README: the pipeline, and every method on the reward-KL frontier.

    python benchmarks/pictures.py

The methods are default runs of seed 1, judged by the gold reward on held-out prompts as frontier.py does it.
Runs that are missing are made first (about three minutes of one CPU core for all of them), finished ones are
kept. Needs matplotlib.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import frontier  # noqa: E402
from common import fail  # noqa: E402

GOLD = "data/gold_reward.py:gold_reward"
BETAS = [30 * 0.88**k for k in range(39)]  # of the curve: 30 to 0.23
OWN_BETAS = [0.5, 0.3]  # defaults: --beta of dpo.py, --kl-coef of ppo.py and grpo.py
INK, BLUE, GREEN, ORANGE, RED, PURPLE = "#333333", "#2a6fbb", "#2e8b57", "#d9822b", "#c0392b", "#7b4fa3"
FONT = 10


@dataclass(frozen=True)
class Method:
    label: str
    folder: str  # of the run
    command: str  # that makes it
    color: str
    marker: str
    label_at: tuple[float, float]  # KL and reward at which the label stands in the enlarged part


METHODS = [
    Method("PPO, learned reward", "runs/ppo", "ppo.py", BLUE, "s", (4.13, 3.13)),
    Method("PPO, gold reward", "runs/ppo-gold", f"ppo.py --reward {GOLD} --output-dir runs/ppo-gold",
           BLUE, "D", (2.93, 2.83)),
    Method("GRPO, k1 in the reward", "runs/grpo-kl-in-reward",
           "grpo.py --kl-in reward --output-dir runs/grpo-kl-in-reward", GREEN, "o", (3.88, 2.93)),
    Method("GRPO, k3 in the loss (default)", "runs/grpo", "grpo.py", ORANGE, "^", (3.08, 2.51)),
    Method("DPO", "runs/dpo", "dpo.py", RED, "v", (3.8, 2.75)),
]


@dataclass
class Args:
    folder: str = "benchmarks/results"  # of pipeline.png, frontier.png and frontier.json


def measure() -> dict:
    """The curve and each method's point, after making the runs that are missing."""
    for method in METHODS:
        if not Path(method.folder, "model").exists():
            print(f"{method.folder} is missing: python {method.command}")
            script, *flags = method.command.split()
            subprocess.run([sys.executable, str(ROOT / script), *flags], check=True)
    folders = [f"{method.folder}/model" for method in METHODS]
    measured = frontier.main(frontier.Args(policies=folders, rewards=[GOLD], betas=BETAS + OWN_BETAS))[GOLD]
    rows = measured["frontier"]
    points = {method.label: measured["policies"][f"{method.folder}/model"] for method in METHODS}
    return {"reference_reward": measured["reference_reward"], "frontier": rows[: len(BETAS)],
            "optima": rows[len(BETAS) :], "policies": points}


def draw_frontier(file, result) -> None:
    """Left the whole plane with the start, right the part with the methods, enlarged."""
    import matplotlib.pyplot as plt

    start = (0.0, result["reference_reward"])
    curve = [start] + [(kl, reward) for _, reward, kl, _ in result["frontier"]]
    kls, rewards = zip(*curve)
    figure, (whole, part) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[1, 1.7], layout="constrained")
    for axes in (whole, part):
        axes.fill_between(kls, rewards, 5, color="#eeeeee", linewidth=0)
        axes.plot(kls, rewards, color=INK, linewidth=2)
        for _, reward, kl, _ in result["optima"]:
            axes.plot(kl, reward, "o", color="white", markeredgecolor=INK, markersize=7)
        for method in METHODS:
            point = result["policies"][method.label]
            axes.plot(point["kl"], point["reward"], method.marker, color=method.color, markersize=8)
        axes.set_xlabel("KL(policy || start), nats per response", fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT - 1)

    whole.plot(*start, "*", color=PURPLE, markersize=14)
    whole.text(0.22, start[1] - 0.08, "start: SFT", color=PURPLE, fontsize=FONT)
    whole.text(0.12, 2.45, "no policy can\nbe up here", color="#777777", fontsize=FONT)
    formula = r"$\pi_{ref}\;e^{\,r/\beta}\,/\,Z$"
    whole.text(1.3, 1.3, f"exact optimum at each KL,\n{formula}", color=INK, fontsize=FONT)
    whole.add_patch(plt.Rectangle((2.42, 2.38), 2.0, 1.02, fill=False, edgecolor="#999999", linestyle="--"))
    whole.set(xlim=(-0.15, 4.5), ylim=(-1.1, 3.5))
    whole.set_ylabel("gold reward, mean over held-out prompts", fontsize=FONT)

    for (beta, reward, kl, _), whose in zip(result["optima"], ("DPO's", "the others'")):
        part.annotate(f"$\\beta$ = {beta:g}, {whose}", (kl, reward), xytext=(-6, 10),
                      textcoords="offset points", ha="right", color=INK, fontsize=FONT)
    for method in METHODS:
        point = result["policies"][method.label]
        text = f"{method.label}: {point['fraction']:.2f}"
        line = {"arrowstyle": "-", "color": method.color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 6}
        part.annotate(text, (point["kl"], point["reward"]), xytext=method.label_at, color=method.color,
                      fontsize=FONT, arrowprops=line, va="center")
    part.set(xlim=(1.95, 4.9), ylim=(2.38, 3.4))
    part.set_title("enlarged; numbers: gain over the start, as a fraction of the optimum's at the same KL",
                   fontsize=FONT, loc="left")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_pipeline(file) -> None:
    """Data and scripts from left to right; a panel holds all that starts from the SFT model."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = plt.subplots(figsize=(11, 3.5))
    axes.set(xlim=(0, 125), ylim=(0, 40))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)

    def frame(x, y, width, height, **style):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", **style))

    def script(x, y, width, name, what, color):
        frame(x, y, width, 8, facecolor="white", edgecolor=color, linewidth=1.6)
        axes.text(x + width / 2, y + 5.4, name, ha="center", va="center", color=color, fontsize=FONT + 1,
                  weight="bold")
        axes.text(x + width / 2, y + 2.3, what, ha="center", va="center", color=INK, fontsize=FONT - 1.5)

    def data(x, y, width, name):
        frame(x, y + 1.5, width, 5, facecolor="#e3e3e3", edgecolor="none")
        axes.text(x + width / 2, y + 4, name, ha="center", va="center", color=INK, fontsize=FONT)

    def arrow(start, end):
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch(start, end, color=INK, **style))

    data(1, 16, 17, "demonstrations")
    arrow((18, 20), (22, 20))
    script(22, 16, 19, "sft.py", "step 1: imitate", PURPLE)
    arrow((41, 20), (46, 20))

    frame(46, 1, 56, 38, facecolor="#f6f6f6", edgecolor="#bbbbbb", linewidth=1)
    axes.text(48, 36.6, "all start from the SFT model, $\\pi_{ref}$", va="center", color=INK, fontsize=FONT)
    data(48, 26, 19, "comparisons")
    script(48, 15, 19, "reward_model.py", "step 2: Bradley-Terry", ORANGE)
    data(48, 2, 19, "your own function")
    arrow((57.5, 27.5), (57.5, 23))
    arrow((67, 30), (78, 30))
    axes.text(72.2, 12.2, "reward", ha="center", va="center", color=INK, fontsize=FONT,
              bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": INK, "linewidth": 1.2})
    arrow((67, 17.5), (70.8, 14.2))
    arrow((67, 7.3), (70.8, 10.2))
    arrow((73.6, 14.1), (78, 17.5))
    arrow((73.6, 10.3), (78, 7.3))
    script(78, 26, 22, "dpo.py", "steps 2 and 3 in one", RED)
    script(78, 15, 22, "ppo.py", "step 3: prompts, a critic", BLUE)
    script(78, 3, 22, "grpo.py", "step 3: prompts, groups", GREEN)
    arrow((102, 20), (106, 20))
    script(106, 16, 18, "frontier.py", "distance from $\\pi^*$", INK)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(args: Args) -> dict:
    try:
        import matplotlib
    except ImportError:
        fail("the pictures need `pip install matplotlib`")
    matplotlib.use("Agg")
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_pipeline(folder / "pipeline.png")
    result = measure()
    (folder / "frontier.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_frontier(folder / "frontier.png", result)
    print(f"pipeline.png, frontier.png and frontier.json are in {folder}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
