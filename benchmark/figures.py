"""The papers' figures, drawn from run folders.

    python benchmark/figures.py figure2 runs/<pspo run> …      # PSPO: predicted return and real one
    python benchmark/figures.py figure3 runs/<pspo run>        # PSPO: TD target against uncertainty
    python benchmark/figures.py boundary runs/<liquidation run> …  # where it sells, and where it should
    python benchmark/figures.py curves runs/<steer_poe run> …      # steering: objective against α
    python benchmark/figures.py grid runs/<steer_poe run> …        # steering: HELP, FROZEN or HURT
    python benchmark/figures.py expectile                      # IQL: expectiles of one variable, and of one per state

A figure goes to docs/figures/<figure>.png, or where --output says.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runner import read_csv  # noqa: E402

import iql  # noqa: E402  (the scripts are not installed; they lie in the repository's root)
import liquidation_env  # noqa: E402
import pspo  # noqa: E402


@dataclass
class Args:
    figure: Annotated[Literal["figure2", "figure3", "boundary", "curves", "grid", "expectile"], tyro.conf.Positional]
    """which figure to draw"""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run folders that it is drawn from"""
    output: Path | None = None
    """the PNG to write (default: docs/figures/<figure>.png)"""


# --- Reading run folders ---


def read_result(run: Path) -> dict:
    """result.json of a finished run. Raises UserError."""
    pspo.require((run / "result.json").is_file(), f"{run} has no result.json: give the folder of a finished run")
    return json.loads((run / "result.json").read_text())


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """metrics.csv of a run, by column. Raises UserError."""
    pspo.require((run / "metrics.csv").is_file(), f"{run} has no metrics.csv: give the folder of a run")
    rows = read_csv(run / "metrics.csv")
    pspo.require(bool(rows), f"{run} has no evaluation yet: wait for its first row in metrics.csv")
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def read_actor(run: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The deterministic policy of actor.pt, of either script: observations (B, obs) -> actions (B, act)."""
    actor = pspo.load_tensors(run / "actor.pt", "actor")

    def act(obs: np.ndarray) -> np.ndarray:
        h = (torch.as_tensor(obs, dtype=torch.float32) - actor["obs_mean"]) / actor["obs_std"]
        for i, layer in enumerate(actor["layers"]):
            h = (h.relu() if i else h) @ layer["weight"] + layer["bias"]
        mean = h if actor["log_std"] is not None else h.chunk(2, -1)[0]  # without log_std the net gives both
        return mean.tanh().numpy()

    return act


def read_run(run: Path, script: ModuleType) -> tuple[dict, Any, str, dict[str, torch.Tensor]]:
    """Checkpoint, arguments, domain and data of a run of pspo.py or iql.py (`script`). Raises UserError."""
    checkpoint = script.load_tensors(run / "checkpoint.pt", f"{script.__name__} checkpoint")
    script.require("learner" in checkpoint, f"{run} was stopped before its first iteration: go on with it first")
    args, domain = script.resolve(script.checkpoint_args(script.Args, checkpoint))
    if args.env_id == "liquidation" and args.dataset_path is None:
        arrays = liquidation_env.behaviour_dataset(args.dataset_episodes, args.seed)
        dataset = script.make_dataset(arrays, "liquidation", f"generated, seed {args.seed}")
    else:
        dataset = script.load_dataset(args.env_id, args.dataset_path, args.dataset_mirrors)
    same = checkpoint["data_sha256"] == dataset.sha256
    script.require(same, f"{run} was trained on other data than {dataset.name} is now: restore the data")
    return checkpoint, args, domain, {key: torch.as_tensor(getattr(dataset, key)) for key in script.DATA_KEYS}


def read_learner(run: Path) -> pspo.PSPO:
    """The learner as the last checkpoint of a PSPO run left it, on its data. Raises UserError."""
    checkpoint, args, domain, data = read_run(run, pspo)
    pool = pspo.load_tensors(run / "dynamics.pt", "dynamics")
    args.pool_size, _, _, args.dynamics_hidden, args.dynamics_layers = pool["sizes"]
    learner = pspo.PSPO(args, data, domain)
    learner.load_state_dict(checkpoint["learner"])
    return learner


# --- Figures ---


def figure2(runs: tuple[Path, ...]) -> plt.Figure:
    """PSPO's Figure 2: the return that the models predict for the policy, and the return it earns; one colour a run."""
    fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for run, colour in zip(runs, itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])):
        metrics = read_metrics(run)
        for key, label, style in (
            ("eval/return", "in the environment", "-"),
            ("eval/predicted_return", "predicted by the models, τ ~ P", ":"),
        ):
            pspo.require(key in metrics, f"{run} has no column {key}: give runs of pspo.py")
            label *= run is runs[0]
            ax.plot(metrics["iteration"], metrics[key], color=colour, ls=style, lw=1.4, label=label)
    result = read_result(runs[0])
    if result["optimum_score"]:
        ax.axhline(result["optimum"], color="k", lw=1, label=f"exact optimum {result['optimum']:.1f}")
    name = pspo.figure_name(result["env_id"], result["dataset"]["source"])
    what = f"{name}, {len(runs)} run{'s' * (len(runs) > 1)}"
    ax.set(xlabel="iteration", ylabel="return, undiscounted", title=what)
    ax.legend(fontsize=8)
    return fig


def figure3(runs: tuple[Path, ...]) -> plt.Figure:
    """PSPO's Figure 3: the belief's mean and standard deviation of the models' targets, at states of the data and
    actions of the policy; one panel a run."""
    fig, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.8), layout="constrained", squeeze=False)
    for ax, run in zip(axes[0], runs, strict=True):
        learner = read_learner(run)
        torch.manual_seed(0)
        target, uncertainty = learner.target_and_uncertainty()
        ax.scatter(uncertainty, target, s=5, alpha=0.4, linewidths=0)
        title = f"{learner.args.env_id}, seed {learner.args.seed}: Spearman {pspo.spearman(uncertainty, target):.2f}"
        ax.set(xlabel="standard deviation over models", ylabel="TD target (reward ranges)", title=title)
    return fig


def boundary(runs: tuple[Path, ...]) -> plt.Figure:
    """Liquidation: the fraction that a policy sells by step and price, beside the exact stopping boundary."""
    fig, axes = plt.subplots(
        1, len(runs), figsize=(1.2 + 4 * len(runs), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    price, step = np.linspace(0.5, 2.75, 181), np.arange(20)
    grid = np.stack(np.broadcast_arrays(step[:, None], 100.0, price[None]), -1).reshape(-1, 3)
    for ax, run in zip(axes[0], runs, strict=True):
        result, act = read_result(run), read_actor(run)
        pspo.require(result["domain"] == "liquidation", f"{run} is of {result['env_id']}: give runs on liquidation")
        sold = act(grid.astype(np.float32)).clip(0, 1).reshape(20, -1)
        image = ax.pcolormesh(step, price, sold.T, cmap="Blues", vmin=0, vmax=1, shading="nearest")
        for gamma, style in {result["args"]["gamma"]: "--", 1.0: "-"}.items():
            exact = liquidation_env.optimal_value(discount=gamma).boundary
            ax.plot(step, np.maximum(exact, 0.5), "r" + style, lw=1.5, label=f"exact boundary, γ = {gamma:g}")
        settings, share = result["args"], 100 * result["share_of_optimum"]
        title = f"{settings['exp_name']}, γ = {settings['gamma']:g}, seed {settings['seed']}"
        title += "" if settings.get("regularization", True) else ", no regularisation"
        ax.set(xlabel="step", title=f"{title}\n{share:.1f}% of the optimum")
        ax.set_xticks(range(0, 20, 5))
        ax.legend(fontsize=8, loc="lower left")
    axes[0, 0].set_ylabel("price")
    fig.colorbar(image, ax=axes, label="fraction sold (inventory 100)")
    return fig


def fit_expectile(x: torch.Tensor, y: torch.Tensor, tau: float, updates: int = 1500) -> torch.nn.Module:
    """V(x) by Eq. (5): iql.py's value network and loss on samples x (n, 1), y (n,)."""
    torch.manual_seed(0)
    value = iql.Value(1, 64)
    optimizer = torch.optim.Adam(value.parameters(), lr=3e-3)
    for _ in range(updates):
        rows = torch.randint(len(x), (512,))
        loss = iql.expectile_loss(y[rows] - value(x[rows]), tau).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return value.requires_grad_(False)


TAUS = (0.5, 0.7, 0.9, 0.99)


def expectile(runs: tuple[Path, ...] = ()) -> plt.Figure:
    """IQL's illustration: the loss, expectiles of one random variable, and of a variable whose law depends on x."""
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 3.7), layout="constrained")
    u, generator = torch.linspace(-1, 1, 201), torch.Generator().manual_seed(0)
    for tau in TAUS:
        axes[0].plot(u, iql.expectile_loss(u, tau), label=f"τ = {tau}")
    axes[0].set(xlabel="u = Q̄ − V", ylabel="$L_2^τ(u)$", title="The loss of Eq. (5)")

    sample = torch.randn(200_000, generator=generator).double()
    axes[1].hist(sample.numpy(), bins=120, density=True, color="0.85")
    for i, tau in enumerate(TAUS):
        v = torch.zeros(1, dtype=torch.float64)
        for _ in range(10):  # Newton's method on a piecewise quadratic
            v.requires_grad_(True)
            (gradient,) = torch.autograd.grad(iql.expectile_loss(sample - v, tau).mean(), v, create_graph=True)
            (curvature,) = torch.autograd.grad(gradient, v)
            v = (v - gradient / curvature).detach()
        axes[1].axvline(v.item(), color=f"C{i}", label=f"τ = {tau}: {v.item():.2f}")
    axes[1].set(xlabel="x", ylabel="density", title="Expectiles of a standard normal variable")

    x = 6 * torch.rand(20_000, 1, generator=generator) - 3
    noise = torch.rand(len(x), generator=generator) ** 2  # within [0, 1]: the largest value is known
    y = x[:, 0].sin() + (0.4 + 0.3 * x[:, 0].abs()) * noise
    axes[2].scatter(x[:3000, 0], y[:3000], s=2, color="0.8", linewidths=0)
    grid = torch.linspace(-3, 3, 200)[:, None]
    for i, tau in enumerate(TAUS):
        axes[2].plot(grid, fit_expectile(x, y, tau)(grid), color=f"C{i}", label=f"τ = {tau}")
    axes[2].plot(grid, grid.sin() + 0.4 + 0.3 * grid.abs(), "k--", lw=1, label="largest value")
    axes[2].set(xlabel="state", ylabel="value of a random action", title="Expectiles given the state")
    for ax in axes:
        ax.legend(fontsize=8)
    return fig


def read_cells(runs: tuple[Path, ...]) -> tuple[list[dict], str]:
    """(cells.csv of runs of steer_poe.py with numbers as numbers, the data set's name). Runs may differ in priors and
    shifts, not in data. Raises UserError."""
    results = [read_result(run) for run in runs]
    names = {pspo.figure_name(result["env_id"], result["dataset"]["source"]) for result in results}
    pspo.require(len(names) == 1, f"runs of different data sets ({', '.join(sorted(names))}): draw one at a time")
    cells = []
    for run in runs:
        pspo.require((run / "cells.csv").is_file(), f"{run} has no cells.csv: give runs of steer_poe.py")
        for row in read_csv(run / "cells.csv"):
            words = {"prior", "shift", "goal", "rule", "objective_class", "return_class"}
            cells.append({key: value if key in words else float(value) for key, value in row.items()})
    return cells, names.pop()


def curves(runs: tuple[Path, ...], output: Path) -> None:
    """Steering: each goal's objective against α, every rule."""
    import steer_poe

    cells, env_id = read_cells(runs)
    steer_poe.plot_curves(cells, env_id, "objective", output)


def grid(runs: tuple[Path, ...], output: Path) -> None:
    """Steering: the class of every configuration in every cell."""
    import steer_poe

    steer_poe.plot_grid(*read_cells(runs), output)


FIGURES = {"figure2": figure2, "figure3": figure3, "boundary": boundary, "expectile": expectile}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        pspo.require(bool(args.runs) or args.figure == "expectile", f"{args.figure} needs run folders: name them")
        output = args.output or ROOT / "docs" / "figures" / f"{args.figure}.png"
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.figure in ("curves", "grid"):  # steer_poe.py draws them itself after a run
            {"curves": curves, "grid": grid}[args.figure](args.runs, output)
        else:
            FIGURES[args.figure](args.runs).savefig(output, dpi=110)
    except pspo.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(output)


if __name__ == "__main__":
    main()
