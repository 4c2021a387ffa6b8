"""Could another posterior over the models do better? Evidence from the data, held against what the policy then meets.

    python benchmark/evidence_study.py runs/<pspo run> …

A posterior is of use where its evidence, which is seen on the data, tells which models are right where the *policy*
goes. So for each run of pspo.py on a MuJoCo task: its last policy (sampled actions) plays in the environment; on
these real transitions, which no model saw, every active model's error is known, and so is what a belief is worth:

    target error   squared error of the belief's mean target r + γV(s') against the real one, uniform belief = 1
    log density    log Σ P(τ) τ(r, s' | s, a) of the real transition, minus that of the uniform belief, in nats
    rank           Spearman correlation over models, between the evidence and the error of their targets there
    prediction     undiscounted return of the mean action that models drawn from the belief predict

Evidence comes from the rows that the pool's training held out: Δ of Eq. (3), here at the models' mean next states;
likelihood (−log τ of the data); either one *local*, i.e. averaged over the nearest of these rows to (s, a), a belief
for every (s, a). For comparison: `own error there`, the models weighted by their error on the real transitions, and
`hindsight`, the fixed weights with the least target error there, which no belief over the pool can beat. λ is in
units of the evidence's spread over the models as in pspo.py, except for `Bayes`: λ is the number of rows, i.e. the
posterior probability. The tables go to docs/results/pspo_evidence.{md,csv}.
"""

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from figures import read_learner, read_result  # noqa: E402

import pspo  # noqa: E402  (the scripts are not installed; they lie in the repository's root)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of pspo.py, with the dynamics.pt that was trained there; each counts as one seed"""
    transitions: int = 4000
    """real transitions of the policy that beliefs are judged on"""
    neighbours: int = 50
    """rows that local evidence is averaged over"""
    output: Path = ROOT / "docs" / "results" / "pspo_evidence"
    """path of the tables, without .md and .csv"""


def real_transitions(learner: pspo.PSPO, count: int, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """`count` transitions spread evenly over what the last policy does in the environment, and its mean return."""
    env = gymnasium.make(pspo.EVAL_ENVS[learner.args.env_id.split("-")[0]])
    act, rows, returns = learner.average.sampler(seed), [], []
    while len(rows) < 10 * count:
        obs, total, over = env.reset(seed=seed + len(returns))[0], 0.0, False
        while not over:
            action = act(obs[None])[0]
            next_obs, reward, terminal, truncated, _ = env.step(action)
            rows.append((obs, action, reward, next_obs, terminal))
            obs, total, over = next_obs, total + float(reward), terminal or truncated
        returns.append(total)
    rows = rows[:: len(rows) // count][:count]
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    columns = (np.array(column) for column in zip(*rows, strict=True))
    types = (torch.float32,) * 4 + (torch.bool,)
    return {k: torch.as_tensor(c, dtype=t) for k, c, t in zip(names, columns, types, strict=True)}, np.mean(returns)


@torch.no_grad()
def judged(learner: pspo.PSPO, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed errors of the models' targets, in reward ranges, and log τ(r, s' | s, a), in nats: (N, B) each."""
    errors, densities = [], []
    for rows in torch.arange(len(data["rewards"])).split(2000):
        obs, action, reward, next_obs, terminal = (
            data[k][rows] for k in ("observations", "actions", "rewards", "next_observations", "terminals")
        )
        mean, std = learner.active(obs, action)  # (N, B, 1+obs)
        seen = torch.cat([reward[:, None], next_obs], -1)
        densities.append(torch.distributions.Normal(mean, std).log_prob(seen).sum(-1))
        reached = torch.cat([mean[..., 1:], next_obs[None]]).clamp(*learner.active.box)  # the models' s', then the real
        value = learner.value(reached, common_noise=True)
        ends = torch.cat([learner.terminal(reached[:-1]), terminal[None]])
        paid = torch.cat([mean[..., 0], reward[None]]) / learner.reward_scale
        target = pspo.bellman_target(paid, ends, value, learner.args.gamma)
        errors.append(target[:-1] - target[-1])
    return torch.cat(errors, 1), torch.cat(densities, 1)


def held_out_rows(learner: pspo.PSPO, run: Path) -> torch.Tensor:
    """The rows that train_dynamics of this run kept from its models, by drawing them again. Raises UserError.

    That they are the same rows is seen from the models' errors on them, which the run reported.
    """
    args, data = learner.args, learner.data
    torch.manual_seed(args.seed)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    pool = pspo.Dynamics(args.pool_size, obs_dim, act_dim, args.dynamics_hidden, args.dynamics_layers)
    change = data["next_observations"] - data["observations"]
    known = torch.arange(len(change))[~(data["terminals"] & (change == 0).all(1))]
    rows = known[torch.randperm(len(known))[: min(len(known) // 10 + 1, 5000)]]
    content = pspo.load_tensors(run / "dynamics.pt", "dynamics")
    pool.load_state_dict(content["pool"])
    inputs = torch.cat([data["observations"], data["actions"]], -1)[rows]
    outputs = torch.cat([data["rewards"][:, None], change], -1)[rows]
    with torch.no_grad():
        error = pool.standardised(inputs)[0] - (outputs - pool.output_mean) / pool.output_std
    mine, reported = error.square().mean((1, 2)), torch.tensor(content["report"]["held_out_mse"])
    same = torch.allclose(mine, reported, rtol=0.01, atol=1e-5)
    pspo.require(same, f"{run}: its pool was trained in another run: give the run that trained it")
    return rows


def nearest(learner: pspo.PSPO, data: dict[str, torch.Tensor], real: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    """Rows of `data` nearest to each real (s, a), in standard deviations of each coordinate: (B, k)."""
    points, places = (
        (torch.cat([x["observations"], x["actions"]], -1) - learner.active.input_mean) / learner.active.input_std
        for x in (data, real)
    )
    return torch.cat([torch.cdist(part, points).topk(k, largest=False).indices for part in places.split(200)])


def beliefs(on_data, on_policy, near: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> evidence and log P over the models, (N,) or, local, (B, N) each.

    on_data, on_policy: what `judged` says of either, (N, rows) and (N, B) twice; near: (B, k), `nearest`.
    """
    delta, surprise = on_data[0].double().square(), -on_data[1].double()  # (N, rows)
    real_delta = on_policy[0].double().square().mean(1)
    evidence = {
        "Δ": delta.mean(1), "likelihood": surprise.mean(1),
        "local Δ": delta[:, near].mean(-1).T, "local likelihood": surprise[:, near].mean(-1).T,
        "own error there": real_delta,
    }  # fmt: skip

    def spread(x: torch.Tensor, strength: float) -> torch.Tensor:
        return pspo.posterior(x / x.std(-1, keepdim=True).clamp(min=1e-12), strength)

    uniform = torch.zeros(len(delta), dtype=torch.float64)
    out = {"uniform": (uniform, pspo.posterior(uniform, 0.0))}
    for name, x in evidence.items():
        for strength in (1.0, 3.0):
            out[f"{name}, λ = {strength:.0f}"] = x, spread(x, strength)
    rows = {"likelihood": delta.shape[1], "local likelihood": near.shape[1]}
    for name, count in rows.items():
        out[f"{name}, Bayes"] = evidence[name], pspo.posterior(evidence[name], count)
    return out


def worth(error: torch.Tensor, density: torch.Tensor, log_p: torch.Tensor) -> dict[str, float]:
    """What a belief log P, (N,) or (B, N), is worth on B transitions: errors and log densities of N models (N, B)."""
    error, density, log_p = error.double(), density.double(), log_p.double().expand(error.shape[1], -1).T  # (N, B)
    uniform_error = error.mean(0).square().mean()
    uniform_density = density.logsumexp(0).mean() - math.log(len(density))
    return {
        "target error": ((log_p.exp() * error).sum(0).square().mean() / uniform_error).item(),
        "log density": ((density + log_p).logsumexp(0).mean() - uniform_density).item(),
        "entropy": -(log_p.exp() * log_p.clamp(min=-1e9)).sum(0).mean().item(),
    }


def hindsight(error: torch.Tensor, steps: int = 3000) -> torch.Tensor:
    """log P of the fixed weights whose mean target has the least squared error, by mirror descent: (N, B) -> (N,)."""
    moments = error.double() @ error.double().T / error.shape[1]  # (N, N); the error is P' moments P
    log_p, rate = torch.full((len(error),), -math.log(len(error)), dtype=torch.float64), 1 / moments.abs().max()
    for _ in range(steps):
        log_p = (log_p - rate * 2 * moments @ log_p.exp()).log_softmax(0)
    return log_p


def study(args: Args, run: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What each belief is worth in one run, and a few numbers about the run itself."""
    learner = read_learner(run)
    domain = learner.args.env_id.split("-")[0]
    pspo.require(domain in pspo.EVAL_ENVS, f"{run} is of {learner.args.env_id}: give runs on D4RL's MuJoCo data")
    seed = learner.args.seed
    learner.args.action_samples = 16  # V(s') with less noise than a training step needs
    held_out = held_out_rows(learner, run)
    data = {k: v[held_out] for k, v in learner.data.items()}
    torch.manual_seed(seed)
    real, real_return = real_transitions(learner, args.transitions, seed + 30_000)
    on_policy, on_data = judged(learner, real), judged(learner, data)
    rms_real, rms_data = (x[0].double().square().mean(1).sqrt() for x in (on_policy, on_data))  # (N,)
    env = gymnasium.make(pspo.EVAL_ENVS[domain])
    start = torch.as_tensor(np.stack([env.reset(seed=i)[0] for i in range(100)]), dtype=torch.float32)

    def predicted(log_p: torch.Tensor) -> float:
        learner.log_belief = log_p.float
        return learner.predicted_return(start, 1000).mean().item()

    found = beliefs(on_data, on_policy, nearest(learner, data, real, args.neighbours))
    found["hindsight"] = torch.zeros(len(rms_real)), hindsight(on_policy[0])
    out = {}
    for name, (evidence, log_p) in found.items():
        out[name] = worth(*on_policy, log_p)
        whole = evidence if evidence.ndim == 1 else evidence.mean(0)
        out[name]["rank"] = pspo.spearman(whole.numpy(), rms_real.numpy()) if whole.std() > 0 else math.nan
        if log_p.ndim == 1 and name.endswith(("uniform", "λ = 1", "hindsight")):  # local: neighbours at every step
            out[name]["prediction"] = predicted(log_p)
    alone = [predicted(row) for row in torch.eye(len(rms_real)).log()]
    facts = {
        "real return, mean action": read_result(run)["return"],
        "real return, sampled actions": real_return,
        "RMS target error on the data, best and worst model": (rms_data.min().item(), rms_data.max().item()),
        "RMS target error where the policy goes, the same": (rms_real.min().item(), rms_real.max().item()),
        "return that one model alone predicts, lowest and highest": (min(alone), max(alone)),
        "rank: that return against error where the policy goes": pspo.spearman(np.array(alone), rms_real.numpy()),
    }
    return out, facts


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    try:
        found = [study(args, run) for run in args.runs]
    except pspo.UserError as error:
        sys.exit(f"error: {error}")
    columns = ("target error", "log density", "rank", "entropy", "prediction")
    lines = ["| belief | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    with open(f"{args.output}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "belief", *columns))
        for run, (table, _) in zip(args.runs, found, strict=True):
            for name, row in table.items():
                writer.writerow((run.name, name, *(f"{row.get(c, math.nan):.4f}" for c in columns)))
    for name in found[0][0]:
        cells = []
        for column in columns:
            values = [table[name].get(column, math.nan) for table, _ in found]
            digits = 0 if column == "prediction" else 2
            cells.append("; ".join(f"{x:.{digits}f}" for x in values) if np.isfinite(values).all() else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = f"`python benchmark/evidence_study.py` of {', '.join(run.name for run in args.runs)}: one number a run"
    lines = [f"{about}; {args.transitions} real transitions, {args.neighbours} neighbours.", "", *lines, ""]
    for key in found[0][1]:
        lines.append(f"- {key}: " + "; ".join(" to ".join(f"{x:.4g}" for x in np.atleast_1d(f[key])) for _, f in found))
    Path(f"{args.output}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
