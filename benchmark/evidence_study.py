"""Could another posterior over the models do better? Evidence from the data, held against what the policy then meets.

    python benchmark/evidence_study.py runs/<pspo run> …

A posterior is of use where its evidence, which is seen on the data, tells which models are right where the *policy*
goes. So for each run of pspo.py on a MuJoCo task: its last policy (sampled actions) plays in the environment; on
these real transitions, which no model saw, every active model's error is known, and so is what a belief is worth:

    target error   squared error of the belief's mean target r + γV(s') against the real one, uniform belief = 1
    log density    log Σ P(τ) τ(r, s' | s, a) of the real transition, minus that of the uniform belief, in nats
    rank           Spearman correlation over models, between the evidence and the error of their targets there
    prediction     undiscounted return of the mean action that models drawn from the belief predict

Evidence: Δ of Eq. (3) on the data; likelihood (−log τ of the data); either one *local*, i.e. averaged over the data's
nearest neighbours of (s, a), a belief for every (s, a); `oracle`: the error on the real transitions themselves, which
nobody has. λ is in units of the evidence's spread over the models as in pspo.py, except for `Bayes`: λ times the
number of rows, i.e. the posterior probability. The tables go to docs/results/pspo_evidence.{md,csv}.
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
from runner import interval  # noqa: E402

import pspo  # noqa: E402  (the scripts are not installed; they lie in the repository's root)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of pspo.py, with the dynamics.pt that was trained there; each counts as one seed"""
    transitions: int = 4000
    """real transitions of the policy that beliefs are judged on"""
    data_rows: int = 30_000
    """rows of the data that evidence is measured on, and neighbours are looked for among"""
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
        "oracle": real_delta,
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


def study(args: Args, run: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What each belief is worth in one run, and a few numbers about the run itself."""
    learner = read_learner(run)
    seed = learner.args.seed
    learner.args.action_samples = 16  # V(s') with less noise than a training step needs
    torch.manual_seed(seed)
    pick = torch.randint(len(learner.data["rewards"]), (args.data_rows,))
    data = {k: v[pick] for k, v in learner.data.items()}
    real, real_return = real_transitions(learner, args.transitions, seed + 30_000)
    on_policy, on_data = judged(learner, real), judged(learner, data)
    error, density = on_policy  # (N, B)
    rms_policy, rms_data = (x[0].double().square().mean(1).sqrt() for x in (on_policy, on_data))  # (N,)
    env = gymnasium.make(pspo.EVAL_ENVS[learner.args.env_id.split("-")[0]])
    start = torch.as_tensor(np.stack([env.reset(seed=i)[0] for i in range(100)]), dtype=torch.float32)
    uniform_error = error.mean(0).double().square().mean()
    uniform_density = (density.double().logsumexp(0) - math.log(len(density))).mean()
    out = {}
    for name, (evidence, log_p) in beliefs(on_data, on_policy, nearest(learner, data, real, args.neighbours)).items():
        weights = log_p.exp().expand(error.shape[1], -1).T  # (N, B)
        mixture = (density.double() + log_p.expand(error.shape[1], -1).T).logsumexp(0).mean()
        row = {
            "target error": ((weights * error).sum(0).square().mean() / uniform_error).item(),
            "log density": (mixture - uniform_density).item(),
            "entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        }
        whole = evidence if evidence.ndim == 1 else evidence.mean(0)
        row["rank"] = pspo.spearman(whole.numpy(), rms_policy.numpy()) if whole.std() > 0 else math.nan
        if log_p.ndim == 1 and name.endswith(("uniform", "λ = 1")):  # a local one needs neighbours at every step
            learner.log_belief = lambda log_p=log_p: log_p.float()
            row["prediction"] = learner.predicted_return(start, 1000).mean().item()
        out[name] = row
    del learner.log_belief
    alone = []
    for i in range(len(density)):
        one = torch.full((len(density),), -math.inf)
        one[i] = 0.0
        learner.log_belief = lambda one=one: one
        alone.append(learner.predicted_return(start, 1000).mean().item())
    facts = {
        "real return, mean action": read_result(run)["return"],
        "real return, sampled actions": real_return,
        "RMS target error on the data, best and worst model": (rms_data.min().item(), rms_data.max().item()),
        "RMS target error where the policy goes, the same": (rms_policy.min().item(), rms_policy.max().item()),
        "return that one model alone predicts, lowest and highest": (min(alone), max(alone)),
        "rank: that return against error where the policy goes": pspo.spearman(np.array(alone), rms_policy.numpy()),
    }
    return out, facts


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    found = []
    for run in args.runs:
        found.append(study(args, run))
        print(run.name, *(f"{k}: {np.round(v, 3)}" for k, v in found[-1][1].items()), sep="\n  ", flush=True)
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
            digits = 0 if column == "prediction" else 3
            half = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{half}" if np.isfinite(values).all() else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for key in found[0][1]:
        lines.append(f"- {key}: " + "; ".join(str(np.round(facts[key], 3)) for _, facts in found))
    Path(f"{args.output}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
