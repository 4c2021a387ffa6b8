"""The README's picture and the paper's Figure 2, from run folders.

    python benchmark/figures.py readme runs/*          # liquidation and one other task: PSPO's seeds, with IQL beside
    python benchmark/figures.py figure2 runs/<pspo run> …    # the return that the models predict, and the real one

A figure goes to docs/figures/<figure>.png, or where --output says.
"""

import csv
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]

# Okabe and Ito's, for every kind of eye
BLUE, ORANGE, GREEN, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00"


@dataclass
class Args:
    """Draw a figure from run folders."""

    figure: tyro.conf.Positional[Literal["readme", "figure2"]]  # which
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    output: Path | None = None  # the PNG; docs/figures/<figure>.png


def read(run: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """result.json, and metrics.csv by column."""
    with open(run / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    return json.loads((run / "result.json").read_text()), dict(zip(header, np.array(rows, float).T, strict=True))


def readme(runs: tuple[Path, ...]) -> plt.Figure:
    """Scores of PSPO's seeds over its iterations, beside behaviour, IQL and the optimum; two panels."""
    plt.rcParams["font.size"] = 13  # of 10 inches, shown at 800 pixels
    found = [read(run) for run in runs if {"result.json", "metrics.csv"} <= {path.name for path in run.iterdir()}]
    ours = [(result, columns) for result, columns in found if "eval/predicted_return" in columns]
    tasks = sorted({result["env_id"] for result, _ in ours}, key=lambda name: name != "liquidation")
    if len(tasks) != 2 or tasks[0] != "liquidation":
        sys.exit(f"needs finished runs of pspo.py on liquidation and on one other task; these are of {tasks}")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for ax, task in zip(axes, tasks, strict=True):
        result, columns = next(run for run in ours if run[0]["env_id"] == task)
        curves = np.array([columns["eval/score"] for result, columns in ours if result["env_id"] == task])
        thousands, legend = columns["iteration"] / 1000, f"PSPO, mean of {len(curves)} seeds"
        ax.plot(thousands, curves.T, color=SKY, lw=1)
        ax.plot(thousands, curves.mean(0), color=BLUE, lw=2.5, label=legend if len(curves) > 1 else "PSPO")
        iql = [other["score"] for other, columns in found if other["env_id"] == task and "value/v" in columns]
        lines = [("behaviour in the data", result["compared_with"]["behaviour in the data"], "0.35", ":")]
        lines += [("IQL", np.mean(iql), ORANGE, "--")] if iql else []
        lines += [("exact optimum", result["optimum_score"], "black", "-")] if task == "liquidation" else []
        for name, score, colour, style in lines:
            ax.axhline(score, color=colour, ls=style, lw=2, label=name)
        regenerated = ", regenerated data" if "not D4RL's file" in result["dataset"] else ""
        ax.set(xlabel="thousand iterations", ylabel="score", title=task.removesuffix("-v2") + regenerated)
        ax.set_ylim(bottom=min(0, curves.min()))
        ax.legend(fontsize=11, loc="lower right")
        ax.grid(alpha=0.25)
    return figure


def figure2(runs: tuple[Path, ...]) -> plt.Figure:
    """The return that the models predict for the average policy, and the one it earns; one colour a run."""
    figure, ax = plt.subplots(figsize=(7, 4.3), layout="constrained")
    for run, colour in zip(runs, itertools.cycle((BLUE, ORANGE, GREEN, SKY, RED))):
        result, columns = read(run)
        for key, what, style in (("return", "real", "-"), ("predicted_return", "predicted", ":")):
            label = f"{what}, seed {result['args']['seed']}"
            ax.plot(columns["iteration"], columns[f"eval/{key}"], color=colour, ls=style, lw=2, label=label)
    ax.set(xlabel="iteration", ylabel="return", title=f"{result['env_id']}, {result['dataset']}")
    ax.legend(fontsize=9, ncols=2)
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    figure = dict(readme=readme, figure2=figure2)[args.figure](args.runs)
    figure.savefig(args.output or ROOT / f"docs/figures/{args.figure}.png", dpi=160)


if __name__ == "__main__":
    main()
