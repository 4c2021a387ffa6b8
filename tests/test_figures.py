"""benchmark/figures.py: every figure from the run folders of tiny runs, and what it says without one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import iql
import pspo
import steer_poe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import figures  # noqa: E402
import rounding  # noqa: E402

torch.set_num_threads(1)
COMMON = dict(cuda=False, num_threads=1, dataset_episodes=100, eval_episodes=10, final_episodes=20, eval_every=10)
PSPO = dict(
    pool_size=4, active_models=3, evidence_rows=8, dynamics_hidden=16, dynamics_layers=1, dynamics_epochs=1,
    dynamics_batch=64, iterations=20, batch_size=16, hidden=16, model_samples=2, action_samples=4, bc_updates=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run folder of pspo.py, one of iql.py)."""
    folder = str(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        for script in (pspo, iql):
            patch.setattr(script, "plot", lambda *args: args[-1].touch())
        return (
            pspo.run(pspo.Args(runs_dir=folder, **COMMON | PSPO)),
            iql.run(iql.Args(runs_dir=folder, iterations=20, hidden=8, batch_size=16, **COMMON)),
        )


def draw(monkeypatch, *words):
    """benchmark/figures.py as a user types it, in this process."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    figures.main()


def test_pspo_figures(runs, tmp_path, monkeypatch):
    """Figures 2 and 3 as a user types them; Figure 3's learner is the run's own, brought back from its checkpoint."""
    for name in ("figure2", "figure3"):
        draw(monkeypatch, name, runs[0], "--output", tmp_path / "new" / f"{name}.png")
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    learner, metrics = figures.read_learner(runs[0]), figures.read_metrics(runs[0])
    assert metrics["iteration"].tolist() == [10, 20]
    assert learner.log_belief().max().exp().item() > 1 / 3
    axes = figures.figure2(runs[:1]).axes[0]
    assert axes.lines[1].get_ydata().tolist() == metrics["eval/predicted_return"].tolist()
    assert axes.lines[0].get_ydata().tolist() == metrics["eval/return"].tolist()


def test_rounding_of_runs(runs, tmp_path, monkeypatch, capsys):
    """A line for each run; the numbers are those of the learners, and a run that is none is an error in a line."""
    monkeypatch.setattr(sys, "argv", ["rounding.py", *map(str, runs), "--rows", "300"])
    rounding.main()
    lines = capsys.readouterr().out.splitlines()
    assert ": Q over actions, α = " in lines[0] and ": Q(s, a) - V(s): " in lines[1] and len(lines) == 2
    learner = rounding.read_iql(runs[1])
    torch.manual_seed(0)
    rows = torch.randint(learner.size, (300,))
    with torch.no_grad():
        obs, action = learner.data["observations"][rows], learner.data["actions"][rows]
        signal = (learner.target_critic(obs, action).min(0).values - learner.value(obs)).std().item()
    assert f"standard deviation {signal:.4f}" in lines[1]
    for line in lines:
        assert 0 < float(line.split("error of rounding ")[1]) < float(line.split("deviation ")[1].split(",")[0])
    with pytest.raises(pspo.UserError, match="does not exist"):
        rounding.read_iql(tmp_path)


def test_boundary_figure_shows_the_saved_policies(runs):
    """actor.pt of either script is played as the script itself plays it."""
    obs = np.array([[0, 100, 1.0], [19, 50, 2.0]], dtype=np.float32)
    assert np.allclose(figures.read_actor(runs[0])(obs), figures.read_learner(runs[0]).average.act(obs), atol=1e-5)
    actor = iql.load_tensors(runs[1] / "actor.pt", "actor")
    net = iql.Actor(3, 1, 8)
    with torch.no_grad():
        for weight, bias, layer in zip(net.net.weights, net.net.biases, actor["layers"], strict=True):
            weight[0], bias[0, 0] = layer["weight"], layer["bias"]
    assert np.allclose(figures.read_actor(runs[1])(obs), net.act(obs), atol=1e-5)
    assert len(figures.boundary(runs).axes) == 3  # two runs and the colour bar


def test_steering_figures(tmp_path, monkeypatch):
    """Curves and grid of a study, redrawn from its cells.csv."""
    run = steer_poe.run(
        steer_poe.Args(
            study=True,
            episodes=3,
            updates=20,
            hidden=8,
            dataset_episodes=100,
            cuda=False,
            num_threads=1,
            runs_dir=str(tmp_path / "runs"),
        )
    )
    for name in ("curves", "grid"):
        draw(monkeypatch, name, run, "--output", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    cells, env_id = figures.read_cells((run,))
    assert env_id == "liquidation" and len({cell["goal"] for cell in cells}) == 3
    assert {cell["alpha"] for cell in cells if cell["rule"] == "poe"} >= {0.1, 0.3, 0.5, 0.7, 0.9}


def test_expectile_figure():
    """IQL's illustration: expectiles grow with τ in every state, and stay below the largest value."""
    x = 6 * torch.rand(5000, 1, generator=torch.Generator().manual_seed(0)) - 3
    y = x[:, 0].sin() + torch.rand(len(x), generator=torch.Generator().manual_seed(1))
    grid = torch.linspace(-2.5, 2.5, 11)[:, None]
    fits = [figures.fit_expectile(x, y, tau, updates=400)(grid) for tau in (0.5, 0.9, 0.99)]
    assert (fits[0] - grid[:, 0].sin() - 0.5).abs().max() < 0.15
    assert (fits[0] < fits[1]).all() and (fits[1] < fits[2]).all()
    assert (fits[2] < grid[:, 0].sin() + 1.05).all()


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys):
    """A figure without its runs, a folder that is none, a run of the other script."""
    for words, expected in (
        (["figure2"], "needs run folders"),
        (["figure2", tmp_path], "has no metrics.csv"),
        (["figure3", runs[1]], "is not a pspo checkpoint"),
    ):
        with pytest.raises(SystemExit) as stopped:
            draw(monkeypatch, *words, "--output", tmp_path / "x.png")
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        assert expected in err and err.count("\n") == 1
