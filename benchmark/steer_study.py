"""The steering paper's study with steer_poe.py: 13 configurations, 25 episodes and every goal of a task.

    python benchmark/steer_study.py --env-id hopper-medium-v2                       # 975 episodes and the selector's
    python benchmark/steer_study.py --priors clean noisy random overconfident wrong-goal --references    # liquidation
    python benchmark/steer_study.py --env-id hopper-medium-v2 --shifts none action-noise observation-noise friction mass

Frozen, Prior-only, Additive(0.5), PoE and KL-Reg at five α, on the same starts and noise; then PoE at the α that the KL
budget selects. A cell (prior, shift, goal) is HELP, HURT or FROZEN by the 95% percentile bootstrap interval of its
episodes' paired differences to Frozen. --folder gets episodes.csv, cells.csv and table.md. Degraded priors, shifts and
references are readings of ours: docs/steer_poe.md.
"""

import csv
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from scipy.stats import bootstrap
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import steer_poe  # the scripts are not installed; they lie in the repository's root
from steer_poe import Gaussian, gaussian_kl, gaussian_log_prob

Priors = tuple[Literal["clean", "noisy", "random", "overconfident", "wrong-goal"], ...]
Shifts = tuple[Literal["none", "action-noise", "observation-noise", "friction", "mass", "volatility", "reversion"], ...]


@dataclass
class Args(steer_poe.Args):
    goal: tyro.conf.Suppress[str] = ""  # all of the task, or --goal-weights
    alpha: tyro.conf.Suppress[str] = "budget"
    runs_dir: tyro.conf.Suppress[str] = ""
    rule: Literal["poe", "kl-reg"] = "poe"  # whose α the KL budget selects
    priors: Priors = ("clean",)  # what the prior is degraded to
    shifts: Shifts = ("none",)  # at deployment; friction and mass on MuJoCo, volatility and reversion on liquidation
    references: bool = False  # also Critic-Greedy and IQL-Guided, along the gradient of the goal's critic
    folder: str = "runs/steer_study"  # of the results


ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PAPER = [("frozen", 0.0), ("prior-only", 1.0), ("additive", 0.5)]
PAPER += [(rule, alpha) for rule in ("poe", "kl-reg") for alpha in ALPHAS]  # 13
REFERENCES = [("critic-greedy", 1.0), ("iql-guided", 0.5)]
NOISE = 0.5  # standard deviation of what the prior "noisy" adds to the mean before the squash
ACTION_NOISE, OBSERVATION_NOISE = 0.1, 0.05  # the latter in standard deviations of the data's observations
MODEL = {"friction": dict(friction=0.6), "mass": dict(mass=1.25)}  # factors on MuJoCo's
MARKET = {"volatility": dict(sigma=0.3), "reversion": dict(theta=0.15)}  # liquidation: σ × 1.5, θ × 3
EPSILONS = (0.001, 0.01, 0.05)
GAMMA = 0.99  # of the value bound
KEYS = ("prior", "shift", "goal", "rule", "alpha")


# --- Priors, references, shifts ---


def degrade(kind: str, gaussian: Gaussian, noise: torch.Tensor) -> Gaussian:
    """noisy: N(0, NOISE²) on the mean, and the variance says so. random: no information, and the variance says so.
    overconfident: no information, with the clean prior's variance. noise: standard normal (B, act), new every step."""
    mean, log_std = gaussian
    if kind == "noisy":
        return mean + NOISE * noise, 0.5 * ((2 * log_std).exp() + NOISE**2).log()
    if kind in ("random", "overconfident"):
        return noise, torch.zeros_like(log_std) if kind == "random" else log_std
    return gaussian


def iql_guided(frozen: Gaussian, gradient: torch.Tensor, beta: float) -> Gaussian:
    """IQL-Guided(β) = argmax β E_π A − KL(π ‖ π_f), A linear around μ_f: μ = μ_f + β σ_f² ∇A(μ_f), Λ = Λ_f."""
    return frozen[0] + beta * (2 * frozen[1]).exp() * gradient, frozen[1]


def critic_greedy(frozen: Gaussian, gradient: Callable, steps: int = 20, size: float = 0.1) -> Gaussian:
    """Critic-Greedy: from μ_f uphill on Q by `steps` steps of length `size`, no anchor; Λ = Λ_f."""
    u = frozen[0]
    for _ in range(steps):
        ascent = gradient(u)
        u = u + size * ascent / ascent.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return u, frozen[1]


class Study:
    """Frozen actor, one prior a goal, critic; `prior` gives what a configuration composes the actor with."""

    def __init__(self, actor: steer_poe.Actor, priors: list[steer_poe.Actor], critic: steer_poe.Critic):
        self.actor, self.priors, self.critic = actor, priors, critic

    def gradient(self, obs: torch.Tensor, u: torch.Tensor, goal: int) -> torch.Tensor:
        """∇_u of the goal's Q / std(A) at the action that u stands for: (B, obs), (B, act) → (B, act)."""
        with torch.enable_grad():
            u = u.float().requires_grad_(True)
            q = self.critic(obs, self.actor.squash(u))[:, 1 + goal] / self.critic.advantage_std[1 + goal]
            return torch.autograd.grad(q.sum(), u)[0].double()

    def prior(self, rule: str, alpha: float, goal: int, kind: str, seed: int) -> tuple[str, Callable]:
        """(rule of steer_poe.compose, prior (B, obs) → Gaussian); a reference is Prior-only with another prior."""
        if rule == "iql-guided":
            return "prior-only", lambda obs: iql_guided(
                frozen := self.actor.gaussian(obs), self.gradient(obs, frozen[0], goal), alpha / (1 - alpha)
            )
        if rule == "critic-greedy":
            return "prior-only", lambda obs: critic_greedy(
                self.actor.gaussian(obs), lambda u: self.gradient(obs, u, goal)
            )
        wrong = kind == "wrong-goal"
        prior = self.priors[(-1 if goal < len(self.priors) - 1 else 0) if wrong else goal]
        generator = torch.Generator().manual_seed(seed)

        def gaussian(obs: torch.Tensor) -> Gaussian:
            clean = prior.gaussian(obs)
            return degrade(kind, clean, torch.randn(clean[0].shape, generator=generator, dtype=torch.float64))

        return rule, gaussian


class Shifted(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Another MuJoCo model: every friction, every mass and inertia times a factor."""

    def __init__(self, env: gym.Env, friction: float = 1.0, mass: float = 1.0):
        gym.utils.RecordConstructorArgs.__init__(self, friction=friction, mass=mass)
        gym.Wrapper.__init__(self, env)
        import mujoco

        model = env.unwrapped.model
        for column, factor in (
            (model.geom_friction, friction), (model.pair_friction, friction), (model.body_mass, mass),
            (model.body_inertia, mass),
        ):  # fmt: skip
            column[:] *= factor
        mujoco.mj_setConst(model, env.unwrapped.data)  # what the model derives from its masses


def shifted_env(env: gym.Env, shift: str) -> gym.Env:
    """The evaluation environment under a shift of the simulator; exits if it has no such parameter."""
    if shift in MARKET and env.spec.id == "Liquidation-v0":
        return gym.make(env.spec, **MARKET[shift])
    if shift in MODEL and hasattr(env.unwrapped, "model"):
        return Shifted(gym.make(env.spec), **MODEL[shift])
    if shift in MARKET or shift in MODEL:
        sys.exit(f"--shifts {shift}: {env.spec.id} has no such parameter; leave it out")
    return env


def disturb(act: Callable, shift: str, obs_std: np.ndarray, act_dim: int, seed: int) -> Callable:
    """`act` under noise on what it sees and does, the same for every policy."""
    rng = np.random.default_rng(seed)

    def noisy(obs: np.ndarray) -> np.ndarray:
        z, z_action = rng.standard_normal(obs.shape), rng.standard_normal((len(obs), act_dim))
        seen = obs + (shift == "observation-noise") * OBSERVATION_NOISE * obs_std * z
        action = act(seen.astype(np.float32)) + (shift == "action-noise") * ACTION_NOISE * z_action
        return action.clip(-1, 1).astype(np.float32)

    return noisy


# --- Diagnostics ---


def log_density(u: torch.Tensor, gaussian: Gaussian, tanh: str) -> torch.Tensor:
    """log π(a | s) of the action that u stands for: with a tanh, minus log da/du, (..., act) → (...)."""
    jacobian = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u)) if tanh == "sample" else 0 * u
    return gaussian_log_prob(u, *gaussian) - jacobian.sum(-1)


def total_variation(gaussian: Gaussian, frozen: Gaussian, noise: torch.Tensor) -> torch.Tensor:
    """TV(π, π_f) = E_{u ~ π_f} max(0, 1 − π(u) / π_f(u)) by M samples: (B, act), noise (M, B, act) → (B,).

    Half the L1 distance, in [0, 1]; the same after a tanh of both.
    """
    u = frozen[0] + frozen[1].exp() * noise
    log_ratio = gaussian_log_prob(u, *gaussian) - gaussian_log_prob(u, *frozen)
    return torch.expm1(log_ratio.clamp(max=0)).mean(0).abs()


def value_bound(total_variation: float, reward_range: float, gamma: float) -> float:
    """|V^π − V^{π_f}| ≤ δ R / (1−γ)², δ the largest TV of any state, R the width of the reward's range."""
    return total_variation * reward_range / (1 - gamma) ** 2


@torch.no_grad()
def diagnose(gaussian: Gaussian, frozen: Gaussian, tanh: str, reward_range: float, noise: torch.Tensor) -> dict:
    """KL, total variation, value bound, and the share of actions with π_f(a | s) < ε: of the mean and of drawn ones."""
    tv = total_variation(gaussian, frozen, noise)
    out = dict(kl=gaussian_kl(*gaussian, *frozen).mean().item(), tv_mean=tv.mean().item(), tv_max=tv.max().item())
    out["value_bound"] = value_bound(out["tv_max"], reward_range, GAMMA)
    for name, u in dict(mean=gaussian[0], drawn=gaussian[0] + gaussian[1].exp() * noise).items():
        density = log_density(u, frozen, tanh)
        out |= {f"violation_{name}_{e}": (density < math.log(e)).double().mean().item() for e in EPSILONS}
    return out


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of (n,) paired differences."""
    found = bootstrap((difference,), np.mean, method="percentile", n_resamples=9_999, batch=200, rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def classify(low: float, high: float) -> str:
    """HELP: the interval of (steered − frozen) lies above 0. HURT: below 0. FROZEN: it contains 0."""
    return "HELP" if low > 0 else "HURT" if high < 0 else "FROZEN"


# --- The study ---


def summarise(episodes: dict[tuple, np.ndarray], chosen: dict[tuple, float], rule: str) -> list[dict]:
    """Per configuration: means of objective and return, paired differences to Frozen of the same cell, classes."""
    out = []
    for (prior, shift, goal, name, alpha), played in episodes.items():
        row = dict(zip(KEYS, (prior, shift, goal, name, alpha), strict=True)) | dict(episodes=len(played))
        row["selected"] = (name, alpha) == ((rule, chosen[prior, goal]) if chosen[prior, goal] else ("frozen", 0.0))
        base = episodes[prior, shift, goal, "frozen", 0.0]
        for i, key in enumerate(("objective", "return")):
            low, high = interval(played[:, i] - base[:, i])
            row |= {key: played[:, i].mean(), f"{key}_gain": (played[:, i] - base[:, i]).mean()}
            row |= {f"{key}_low": low, f"{key}_high": high, f"{key}_class": classify(low, high)}
        out.append(row)
    return out


def table(rows: list[dict], rule: str) -> str:
    """Markdown: per cell the rule's gain at every α and at the selected one, and its share of the possible gain."""
    head = [f"{rule}({alpha:g})" for alpha in ALPHAS] + ["prior-only", "selected α", "gain there", "of the possible"]
    lines = ["| prior | shift | goal | Frozen | " + " | ".join(head) + " |", "|---" * (4 + len(head)) + "|"]
    for cell in dict.fromkeys(tuple(r[key] for key in KEYS[:3]) for r in rows):
        some = [r for r in rows if tuple(r[key] for key in KEYS[:3]) == cell]
        of = {(r["rule"], r["alpha"]): r for r in some}
        at = next(r for r in some if r["selected"])
        best = max(r["objective_gain"] for r in some if r["rule"] in ("frozen", rule))
        share = "no gain possible" if best <= 0 else "it loses"
        share = f"{100 * at['objective_gain'] / best:.0f}%" if at["objective_gain"] > 0 else share
        shown = [of[rule, alpha] for alpha in ALPHAS] + [of["prior-only", 1.0]]
        words = [f"{r['objective_gain']:+.4g} {r['objective_class']}" for r in shown] + [f"{at['alpha']:g}"]
        gain = f"{at['objective_gain']:+.4g} [{at['objective_low']:+.4g}, {at['objective_high']:+.4g}]"
        words += [f"{gain} {at['objective_class']}", share]
        lines.append(f"| {' | '.join(cell)} | {some[0]['objective']:.4g} | {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    task = steer_poe.task_of(tyro.cli(Args, args=words).env_id)
    settings = steer_poe.SETTINGS.get(task, {}) | dict(goal="")
    args, begun = tyro.cli(Args, description=__doc__, default=replace(Args(), **settings)), time.monotonic()
    data, env, actor = steer_poe.prepare(args)
    if env is None:
        sys.exit("--eval-episodes: the study needs an environment and at least 2 episodes")
    obs, action = data.columns["observations"], data.columns["actions"]
    goals = ["own"] if args.goal_weights else list(steer_poe.GOALS.get(task, {"": ()}))
    task, weights = zip(*(steer_poe.choose_goal(replace(args, goal=goal), obs.shape[1]) for goal in goals), strict=True)
    task, goal_rewards = task[0], steer_poe.features(task[0], obs, action) @ np.stack(weights, 1)  # (N, G)

    folder = Path(args.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if "wrong-goal" in args.priors and len(goals) < 2:
        sys.exit("--priors wrong-goal: there is only one goal")
    for shift in args.shifts:  # before anything is learnt
        shifted_env(env, shift)
    study = Study(*steer_poe.learn(args, data, goal_rewards, actor))

    # The KL-budget selector, on states of the data
    states = torch.as_tensor(obs[np.random.default_rng(args.seed).integers(len(obs), size=5_000)])
    frozen, chosen = study.actor.gaussian(states), {}
    for kind in args.priors:
        for number, goal in enumerate(goals):
            _, prior = study.prior(args.rule, 0.0, number, kind, args.seed)
            chosen[kind, goal] = steer_poe.select_alpha(args.rule, args.kl_budget, frozen, prior(states))

    # Episodes
    tasks = [
        (kind, shift, goal, rule, alpha)
        for kind in dict.fromkeys(args.priors)
        for shift in dict.fromkeys(args.shifts)
        for goal in goals
        for rule, alpha in dict.fromkeys(
            PAPER + [(args.rule, chosen[kind, goal])] * (chosen[kind, goal] > 0) + REFERENCES * args.references
        )
    ]
    episodes = {}
    for key in tqdm(tasks, desc="configurations", disable=None):
        kind, shift, goal, rule, alpha = key
        seed, number = args.seed + 20_000, goals.index(goal)
        composed, prior = study.prior(rule, alpha, number, kind, seed)
        act = steer_poe.steer(study.actor, prior, composed, alpha)
        act = disturb(act, shift, obs.std(0), action.shape[1], seed)
        shifted = shifted_env(env, shift)
        played = steer_poe.play(act, shifted, task, weights[number], args.eval_episodes, seed)
        episodes[key] = np.stack(played, 1)
    with open(folder / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerow((*KEYS, "episode", "objective", "return"))
        for key, values in episodes.items():
            csv.writer(file).writerows((*key, i, *map(float, x)) for i, x in enumerate(values))

    # Tables
    rows, generator = summarise(episodes, chosen, args.rule), torch.Generator().manual_seed(args.seed)
    noise = torch.randn(32, *frozen[0].shape, generator=generator, dtype=torch.float64)
    for row in rows:
        number = goals.index(row["goal"])
        composed, prior = study.prior(row["rule"], row["alpha"], number, row["prior"], args.seed)
        gaussian = steer_poe.compose(composed, row["alpha"], frozen, prior(states))
        width = max(goal_rewards[:, number].max(), 0) - min(goal_rewards[:, number].min(), 0)
        row |= diagnose(gaussian, frozen, study.actor.tanh, float(width), noise)
    with open(folder / "cells.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, args.rule)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    selected = [row["objective_class"] for row in rows if row["selected"]]
    count = {kind: selected.count(kind) for kind in ("HELP", "FROZEN", "HURT")}
    print(f"{len(tasks)} configurations of {args.eval_episodes} episodes; at the selected α: {count}")
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes; episodes.csv, cells.csv and table.md are in {folder}")


if __name__ == "__main__":
    main()
