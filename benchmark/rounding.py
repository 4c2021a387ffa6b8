"""What rounding the products between hidden layers to bfloat16 does to what trained networks say.

    python benchmark/rounding.py runs/<run of pspo.py or iql.py> …

A learner needs differences: IQL's policy is weighted by Q(s, a) - V(s), PSPO's values compare Q over actions drawn at
one state, in units of the temperature α. For each run, on rows of its data: the standard deviation of that difference
in float32, and of the error that rounding adds to it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures import read_learner, read_run

import iql
import pspo


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of pspo.py or iql.py"""
    rows: int = 5000
    """rows of the data"""
    actions: int = 16
    """PSPO: actions of the policy at each of them"""


@torch.no_grad()
def advantage_error(learner: iql.IQL, rows: torch.Tensor) -> tuple[float, float]:
    """Standard deviations over rows (n,): of Q(s, a) - V(s), and of what rounding adds to it."""
    obs, action = learner.data["observations"][rows], learner.data["actions"][rows]
    exact, rounded = (learner.target_critic(obs, action, b).amin(0) - learner.value(obs, b) for b in (False, True))
    return exact.std().item(), (rounded - exact).std().item()


@torch.no_grad()
def action_error(learner: pspo.PSPO, rows: torch.Tensor, actions: int) -> tuple[float, float]:
    """Standard deviations over actions of π, averaged over rows (n,): of Q(s, a), and of what rounding adds to it."""
    obs, critic = learner.data["observations"][rows], learner.target_critic
    mean, log_std = learner.actor(obs)
    action = (mean + log_std.exp() * torch.randn(actions, *mean.shape)).tanh().view(-1, mean.shape[1])
    inputs = torch.cat([((obs - critic.obs_mean) / critic.obs_std).repeat(actions, 1), action], -1)
    exact, rounded = (critic.net(inputs, bfloat16).amin(0).view(actions, -1) for bfloat16 in (False, True))  # (M, n)
    return exact.std(0).mean().item(), (rounded - exact).std(0).mean().item()


def read_iql(run: Path) -> iql.IQL:
    """The learner as the last checkpoint of an IQL run left it, on the offline data. Raises pspo.UserError."""
    try:
        checkpoint, args, _, data = read_run(run, iql)
    except iql.UserError as error:
        raise pspo.UserError(str(error)) from None
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    learner = iql.IQL(args, {name: data[name] for name in names})
    learner.load_state_dict(checkpoint["learner"])
    return learner


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for run in args.runs:
        is_pspo = (run / "dynamics.pt").exists()
        learner = read_learner(run) if is_pspo else read_iql(run)
        torch.manual_seed(0)
        rows = torch.randint(len(learner.data["rewards"]), (args.rows,))
        if is_pspo:
            what = f"Q over actions, α = {learner.log_alpha.exp().item():.4f}"
            signal, error = action_error(learner, rows, args.actions)
        else:
            what = "Q(s, a) - V(s)"
            signal, error = advantage_error(learner, rows)
        print(f"{run.name}: {what}: standard deviation {signal:.4f}, error of rounding {error:.4f}", flush=True)


if __name__ == "__main__":
    pspo.exit_cleanly(main)
