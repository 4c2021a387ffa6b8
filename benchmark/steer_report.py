"""From run folders of steer_poe.py to the tables and figures of docs/steer_poe.md.

    python benchmark/steer_report.py --name steer_liquidation --run runs/<run folder>
    python benchmark/steer_report.py --picture

The first writes docs/results/<name>.md and .csv (cells, diagnostics and selector joined) and draws
docs/figures/<name>_curves.png and _grid.png from them. The second draws docs/figures/steer_poe.png, what PoE does to
two Gaussians.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runner import flags, read_csv  # noqa: E402

import steer_poe  # noqa: E402  (the scripts are not installed; they lie in the repository's root)


@dataclass
class Args:
    """Tables and figures of docs/steer_poe.md."""

    run: Path | None = None
    """a finished run folder of steer_poe.py"""
    name: str = "steer_liquidation"
    """what the files in docs/ are called"""
    picture: bool = False
    """draw what PoE does to two Gaussians"""


def report(run: Path, name: str) -> None:
    """The run's tables as one Markdown page and one CSV, and its two figures."""
    result = json.loads((run / "result.json").read_text())
    keys = ("prior", "goal", "rule", "alpha")
    diagnostics = {tuple(row[k] for k in keys): row for row in read_csv(run / "diagnostics.csv")}
    cells = [row | diagnostics[tuple(row[k] for k in keys)] for row in read_csv(run / "cells.csv")]
    docs = ROOT / "docs"
    with open(docs / "results" / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, cells[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    told = ("env_id", "episodes", "study", "references", "priors", "shifts")
    settings = " ".join(flags({key: value for key in told if (value := result["args"][key])}))
    lines = [
        f"`python steer_poe.py {settings}`, {result['machine']['device']}, {result['machine']['threads']} thread(s).",
        "",
        f"Data: {result['dataset']['name']}, {result['dataset']['source']}, SHA-256 "
        f"{result['dataset']['sha256'][:12]}. "
        f"Actor: {result['actor']}, Frozen's return {result['frozen_return']:.1f}. Seed {result['args']['seed']}, "
        f"{result['episodes']} episodes a configuration, {result['configurations']} configurations, "
        f"{result['seconds'] / 60:.1f} minutes. {versions}.",
        "",
        "Selector (KL budget " + f"{result['args']['kl_budget']:g}):",
        "",
        "| prior | shift | goal | α | KL | class | return, % of Frozen | oracle α | regret, % of Frozen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["selector"]:
        lines.append(
            f"| {row['prior']} | {row['shift']} | {row['goal']} | {row['alpha']:.3g} | {row['kl']:.3f} "
            f"| {row['class']} | {row['return_percent_of_frozen']:.0f} | {row['oracle_alpha']:.3g} "
            f"| {row['regret_percent_of_frozen']:.1f} |"
        )
    lines += [
        "",
        "Every configuration; in brackets the 95% interval of the paired difference to Frozen:",
        "",
        "| prior | shift | goal | rule | α | goal's objective | minus Frozen | | return | minus Frozen | | KL "
        "| mean TV | π_f < 0.01: mean action, drawn |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in cells:
        number = {
            key: float(row[key]) for key in row if key not in ("prior", "shift", "goal", "rule") and "class" not in key
        }
        both = ""
        for what in ("objective", "return"):
            low, high = number[f"{what}_low"], number[f"{what}_high"]
            against = f"{number[f'{what}_difference']:+.4g} [{low:+.4g}, {high:+.4g}] | {row[f'{what}_class']}"
            both += f" | {number[what]:.4g} | " + (" | " if row["rule"] == "frozen" else against)
        lines.append(
            f"| {row['prior']} | {row['shift']} | {row['goal']} | {row['rule']} | {number['alpha']:.3g}{both} "
            f"| {number['kl']:.3g} | {number['tv_mean']:.2f} "
            f"| {number['violation_mean_0.01']:.3f}, {number['violation_drawn_0.01']:.3f} |"
        )
    (docs / "results" / f"{name}.md").write_text("\n".join(lines) + "\n")
    text = ("prior", "shift", "goal", "rule", "objective_class", "return_class")
    summary = [{k: v if k in text else float(v) for k, v in row.items()} for row in read_csv(run / "cells.csv")]
    what = steer_poe.figure_name(result["env_id"], result["dataset"]["source"])
    steer_poe.plot_curves(summary, what, "objective", docs / "figures" / f"{name}_curves.png")
    steer_poe.plot_grid(summary, what, docs / "figures" / f"{name}_grid.png")
    print(f"docs/results/{name}.md, .csv and docs/figures/{name}_curves.png, _grid.png")


def picture(path: Path) -> None:
    """Two Gaussians and their product, additive mixture and KL-Reg, as ellipses of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Ellipse

    mean_f, mean_p = torch.tensor([0.0, 0.0]), torch.tensor([2.4, 1.6])
    std_f = torch.tensor([0.35, 0.8])
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.1), layout="constrained", sharex=True, sharey=True)
    titles = ("a prior that is sure of dimension 1", "the same prior, unsure", "KL-Reg: the same means, surer")
    for ax, title, std_p in zip(axes, titles, ([0.3, 1.0], [2.0, 2.0], [0.3, 1.0]), strict=True):
        std_p = torch.tensor(std_p)
        gaussians = mean_f, std_f**2, mean_p, std_p**2
        alphas = np.linspace(0, 0.999, 200)
        for rule, colour in {"additive": "C1", "kl-reg" if "KL" in title else "poe": "C0"}.items():
            path_of_means = np.array([steer_poe.compose(rule, a, *gaussians)[0].tolist() for a in alphas])
            ax.plot(*path_of_means.T, color=colour, lw=1)
            for alpha in (0.1, 0.5, 0.9):
                mean, var = steer_poe.compose(rule, alpha, *gaussians)
                width, height = (2 * var.sqrt()).tolist()
                ax.add_patch(
                    Ellipse(
                        mean.tolist(), width, height, fc="none", ec=colour, lw=1, ls="-" if rule != "additive" else ":"
                    )
                )
                ax.plot(
                    *mean.tolist(),
                    "o",
                    ms=3,
                    color=colour,
                    label=f"{rule}, α = 0.1, 0.5, 0.9" if alpha == 0.5 else None,
                )
        for name, mean, std, colour in (("frozen π_f", mean_f, std_f, "k"), ("prior π_p", mean_p, std_p, "C3")):
            width, height = (2 * std).tolist()
            ax.add_patch(Ellipse(mean.tolist(), width, height, fc=colour, ec="none", alpha=0.18))
            ax.plot(*mean.tolist(), "s", ms=5, color=colour, label=name)
        ax.set(title=title, xlabel="action dimension 1", aspect="equal", xlim=(-1.2, 4.6), ylim=(-1.2, 3.9))
        ax.legend(fontsize=7, loc="upper left", frameon=False)
    axes[0].set_ylabel("action dimension 2")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.run:
        report(args.run, args.name)
    if args.picture:
        picture(ROOT / "docs" / "figures" / "steer_poe.png")
