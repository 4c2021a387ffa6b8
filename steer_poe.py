# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "minari[hdf5,hf]==0.5.4",
#     "h5py==3.16.0", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Steering a frozen policy in closed form: product of experts and KL-regularised adaptation, within a KL budget.

Paper: "When Policies Cannot Be Retrained: A Unified Closed-Form View of Post-Training Steering in Offline
Reinforcement Learning", arXiv 2604.22873. Goals, prior and the evaluation's details are ours: docs/steer_poe.md.

    π_f = N(μ_f, σ_f²)  frozen actor, never changed     π_p = N(μ_p, σ_p²)  prior of a goal     Λ = 1 / σ²  precisions

    Additive   μ = (1−α) μ_f + α μ_p,   Λ = Λ_f
    PoE        π_f^{1−α} π_p^α:   μ = ((1−α) Λ_f μ_f + α Λ_p μ_p) / Λ,   Λ = (1−α) Λ_f + α Λ_p,   0 ≤ α < 1
    KL-Reg     argmin KL(π ‖ π_f) − β E_π log π_p = π_f π_p^β:   μ = (Λ_f μ_f + β Λ_p μ_p) / Λ,   Λ = Λ_f + β Λ_p
    identity   KL-Reg at β = α / (1−α) has the mean of PoE(α), and (1+β) times its precision
    selector   the largest α with E_s KL(π_α ‖ π_f) ≤ budget

The Gaussians are those before an actor's tanh, if it has one; for PoE that is exact (docs/steer_poe.md).

Run it (minutes of one CPU core):
    python steer_poe.py                                       # liquidation: actor, prior, steering; 1 minute
    python steer_poe.py --goal certainty --alpha 0.5          # another goal, α given
    python steer_poe.py --actor runs/<run folder>/actor.pt    # an actor of pspo.py, iql.py or your own on that task
    python steer_poe.py --env-id hopper-medium-v2 --goal energy               # of a clone of the data; 6 minutes
    python steer_poe.py --env-id Pendulum-v1 --dataset-path pendulum.hdf5 --goal-weights 1 0 0 -0.1    # anything else
    python benchmark/steer_study.py --env-id hopper-medium-v2                 # the paper's study of 975 episodes
"""

import difflib
import hashlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

if find_spec("liquidation_env"):  # this file alone does without
    import liquidation_env


@dataclass
class Args:
    """The values are for MuJoCo's locomotion tasks; SETTINGS has what liquidation changes."""

    env_id: str = "liquidation"  # liquidation, a D4RL name, a Minari id, or any Gymnasium id with --dataset-path
    dataset_path: str = ""  # HDF5 file in D4RL's layout, or a Minari folder, instead of the data that --env-id names
    eval_env_id: str = ""  # Gymnasium id to evaluate in, if not the one that --env-id implies
    dataset_episodes: int = 10_000  # liquidation: episodes of behaviour data to generate
    seed: int = 1  # of every random generator
    # The frozen actor and the goal
    actor: str = "bc"  # file (docs/your_own.md); bc: a clone of the data; awr: one weighted by the task's advantage
    goal: str = "speed"  # speed, balanced or energy; on liquidation certainty, balanced or upside
    # a goal of your own: weights of velocity, effort (mean squared action) and upright; on liquidation of revenue,
    # early and premium; elsewhere of every observation column and the effort
    goal_weights: tuple[float, ...] = ()
    # Steering
    rule: Literal["poe", "kl-reg", "additive"] = "poe"  # how actor and prior are composed
    alpha: float | Literal["budget"] = "budget"  # α in [0, 1); KL-Reg has β = α/(1−α); budget: the selector's
    kl_budget: float = 0.5  # the selector takes the largest α whose mean KL from the frozen actor is within this
    # Learning the prior
    temperature: float = 0.3  # T of exp(A/T), weights of prior and `awr`; A: the advantage in standard deviations
    weight_clip: float = 20.0  # largest of these weights, before they are divided by their mean
    gamma: float = 0.99  # γ of the advantage
    gae_lambda: float = 0.95  # λ of the advantage: 1 is the observed return minus V, 0 a one-step error
    updates: int = 10_000  # of each network
    batch_size: int = 512  # rows per update
    hidden: int = 256  # units in each of two hidden layers
    lr: float = 1e-3  # learning rate, cosine to zero
    # Evaluation and running
    eval_episodes: int = 25  # of every α, the same starts for all; 0 steers and saves without an environment
    runs_dir: str = "runs"  # the run's folder is made in here
    num_threads: int = 1  # CPU threads (0: all cores)
    cuda: bool = True  # learn on a GPU if there is one


SETTINGS = {  # a clone of liquidation's data holds for ever, the mean of two modes; 20 steps need no discount
    "liquidation": dict(actor="awr", goal="upside", gamma=1.0, updates=3_000, hidden=64, eval_episodes=2_000)
}
Gaussian = tuple[torch.Tensor, torch.Tensor]  # mean and log-standard-deviation, (..., act) each


# --- Composition rules: pure functions of two diagonal Gaussians ---


def product(frozen: Gaussian, weight_f: float, prior: Gaussian, weight_p: float) -> Gaussian:
    """π_f^v π_p^w, normalised: Λ = v Λ_f + w Λ_p, μ = (v Λ_f μ_f + w Λ_p μ_p) / Λ."""
    precision_f, precision_p = weight_f * (-2 * frozen[1]).exp(), weight_p * (-2 * prior[1]).exp()
    precision = precision_f + precision_p
    return (precision_f * frozen[0] + precision_p * prior[0]) / precision, -0.5 * precision.log()


def additive(frozen: Gaussian, prior: Gaussian, alpha: float) -> Gaussian:
    """Additive: μ = (1−α) μ_f + α μ_p, Λ = Λ_f; blind to how sure either is."""
    return (1 - alpha) * frozen[0] + alpha * prior[0], frozen[1]


def poe(frozen: Gaussian, prior: Gaussian, alpha: float) -> Gaussian:
    """PoE(α) = π_f^{1−α} π_p^α."""
    return product(frozen, 1 - alpha, prior, alpha)


def kl_reg(frozen: Gaussian, prior: Gaussian, beta: float) -> Gaussian:
    """KL-Reg(β) = argmin KL(π ‖ π_f) − β E_π log π_p = π_f π_p^β."""
    return product(frozen, 1.0, prior, beta)


def compose(rule: str, alpha: float, frozen: Gaussian, prior: Gaussian) -> Gaussian:
    """Every rule on one scale of α; KL-Reg has β = α / (1−α)."""
    if rule == "frozen":
        return frozen
    if rule == "prior-only":
        return prior
    if rule == "additive":
        return additive(frozen, prior, alpha)
    return poe(frozen, prior, alpha) if rule == "poe" else kl_reg(frozen, prior, alpha / (1 - alpha))


# --- Distances, selector, identity ---


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag exp(2 log_std)), (..., act) → (...)."""
    return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_p, log_std_p, mean_q, log_std_q) -> torch.Tensor:
    """KL(p ‖ q) of diagonal Gaussians, (..., act) → (...). The same after a tanh; clipped, at most this."""
    ratio = (2 * (log_std_p - log_std_q)).exp()
    return 0.5 * (ratio + ((mean_p - mean_q) * (-log_std_q).exp()).square() - 1 - ratio.log()).sum(-1)


def mean_kl(rule: str, alpha: float, frozen: Gaussian, prior: Gaussian) -> float:
    """E_s KL(π_α ‖ π_f), over (B, act)."""
    return gaussian_kl(*compose(rule, alpha, frozen, prior), *frozen).mean().item()


def select_alpha(rule: str, budget: float, frozen: Gaussian, prior: Gaussian) -> float:
    """The largest α in [0, 0.999], to four decimals, with E_s KL(π_α ‖ π_f) ≤ budget, by bisection.

    The KL never falls with α: its slope is α Var_{π_α}[log π_p − log π_f] for PoE, and likewise in β for KL-Reg.
    """
    low, high = 0, 9_991  # in units of 1e-4: low fits, high does not or is out of range
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean_kl(rule, middle / 1e4, frozen, prior) <= budget else (low, middle)
    return low / 1e4


def identity_error(alpha: float, frozen: Gaussian, prior: Gaussian) -> tuple[float, float]:
    """PoE(α) against KL-Reg(α/(1−α)): the largest difference of means, in units of the larger expert's mean, and
    of the ratio of variances from 1+β, relative."""
    beta = alpha / (1 - alpha)
    (mean_1, log_std_1), (mean_2, log_std_2) = poe(frozen, prior, alpha), kl_reg(frozen, prior, beta)
    scale = torch.maximum(frozen[0].abs(), prior[0].abs()).clamp(min=1e-300)
    ratio = (2 * (log_std_1 - log_std_2)).exp() / (1 + beta)
    return ((mean_1 - mean_2).abs() / scale).max().item(), (ratio - 1).abs().max().item()


# --- Goals: weights on features of observations and actions ---

WIDTHS = {"liquidation": 3, "hopper": 11, "walker2d": 17, "halfcheetah": 17}  # observations that `features` can read
SPEEDS = {"speed": (1.0, 0.0, 0.0), "balanced": (1.0, -0.5, 1.0), "energy": (0.25, -1.0, 1.0)}
GOALS = dict.fromkeys(("hopper", "walker2d", "halfcheetah"), SPEEDS) | {
    "liquidation": {"certainty": (0.0, 1.0, 0.0), "balanced": (1.0, 0.5, 0.5), "upside": (0.0, 0.0, 1.0)}
}


def features(task: str, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """What goals weigh: (B, obs), (B, act) in [-1, 1] → (B, F) float64.

    Locomotion: forward velocity, mean squared action, cosine of the torso's tilt. Liquidation: revenue, units sold
    times the share of time left, units sold times what the price is above its long-run mean. "": every column of the
    observation and the mean squared action.
    """
    obs, action = obs.astype(np.float64), action.astype(np.float64)
    if task == "liquidation":
        step, inventory, price = obs.T
        sold = np.maximum(action[:, 0], 0) * inventory
        return np.stack([sold * price, sold * (1 - step / 20), sold * np.maximum(price - 1.5, 0)], 1)
    effort = np.square(action).mean(1)
    if task:
        return np.stack([obs[:, 5 if task == "hopper" else 8], effort, np.cos(obs[:, 1])], 1)
    return np.column_stack([obs, effort])


def choose_goal(args: Args, width: int) -> tuple[str, np.ndarray]:
    """(task, weights (F,)) of data whose observations have `width` columns; task "" knows the columns only."""
    task = task_of(args.env_id)
    task = task if WIDTHS.get(task) == width else ""
    weights = np.array(args.goal_weights or GOALS.get(task, {}).get(args.goal, ()))
    if len(weights) != (3 if task else width + 1) or not np.isfinite(weights).all() or not weights.any():
        has = f"has the goals {', '.join(GOALS[task])}" if task else "has no goals of its own"
        own = f"--goal-weights takes {3 if task else width + 1} numbers, not all 0: --help says of what"
        sys.exit(f"{args.env_id} with {width} observations {has}; {own}")
    return task, weights


# --- Networks: each is a stack, evaluated as one batched product ---


class MLP(nn.Module):
    """`size` perceptrons of (x − mean) / std: (B, in) or (size, B, in) → (size, B, out)."""

    def __init__(self, size: int, widths: list[int]):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(widths[0]))
        self.register_buffer("std", torch.ones(widths[0]))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = fan_in**-0.5  # as nn.Linear
            self.weights.append(torch.empty(size, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(size, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor, activation: Callable = torch.relu_) -> torch.Tensor:
        x = ((x - self.mean) / self.std).expand(self.size, *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.bmm(activation(x) if i else x, weight).add_(bias)  # in place: new memory is slow
        return x


ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


class Actor(nn.Module):
    """A diagonal Gaussian over u; the action is tanh(u), or u clipped. (B, obs) → mean, log-std, (B, act) each."""

    def __init__(self, widths: list[int], activation="relu", tanh="sample", log_std=None, log_std_range=(-5.0, 2.0)):
        super().__init__()
        self.net, self.activation, self.tanh = MLP(1, widths), activation, tanh
        self.register_buffer("log_std", log_std)  # None: the second half of the output
        self.log_std_range = log_std_range

    def forward(self, obs: torch.Tensor) -> Gaussian:
        out = self.net(obs, ACTIVATIONS[self.activation])[0]
        mean, log_std = out.chunk(2, -1) if self.log_std is None else (out, self.log_std.expand_as(out))
        return mean.tanh() if self.tanh == "mean" else mean, log_std.clamp(*self.log_std_range)

    def gaussian(self, obs: torch.Tensor) -> Gaussian:
        """The same in double precision, to be composed."""
        mean, log_std = self(obs)
        return mean.double(), log_std.double()

    def squash(self, u: torch.Tensor) -> torch.Tensor:
        return u.tanh() if self.tanh == "sample" else u.clamp(-1, 1)

    def file(self) -> dict:
        """How to act from (obs − obs_mean) / obs_std (docs/your_own.md), of an actor that has been learnt."""
        layers = [dict(weight=w[0], bias=b[0, 0]) for w, b in zip(self.net.weights, self.net.biases, strict=True)]
        squash = dict(activation=self.activation, tanh=self.tanh, log_std_range=list(self.log_std_range))
        log_std = "head" if self.log_std is None else self.log_std
        return dict(layers=layers, log_std=log_std, obs_mean=self.net.mean, obs_std=self.net.std) | squash


def read_actor(content: dict, data: "Dataset") -> Actor:
    """The actor that a file describes (docs/your_own.md), for the sizes and bounds of the data; else an error."""
    obs_dim, act_dim = data.columns["observations"].shape[1], data.columns["actions"].shape[1]

    def need(good: bool, what: str) -> None:
        if not good:
            raise ValueError(what)

    known = "layers activation tanh log_std log_std_range obs_mean obs_std action_low action_high script env_id".split()
    unknown = [str(key) for key in content if key not in known]
    need(not unknown, f"unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key in known[:4] if key not in content]  # the others are optional
    need(not missing, f"no {', '.join(missing)} in it")
    tensors = {"log_std", "obs_mean", "obs_std", "action_low", "action_high"} & content.keys()
    plain = [key for key in sorted(tensors) if not torch.is_tensor(content[key]) and content[key] != "head"]
    need(not plain, f"{', '.join(plain)} must be tensors")
    need(content["activation"] in ACTIVATIONS, "activation must be relu, tanh, elu or silu")
    kinds = "'sample' (a = tanh u, u Gaussian), 'mean' (a Gaussian around a tanh), 'none' (the action is only clipped)"
    need(content["tanh"] in ("sample", "mean", "none"), f"tanh must be one of {kinds}")
    layers, log_std, (low, high) = content["layers"], content["log_std"], content.get("log_std_range", (-20.0, 2.0))
    need(low <= high, "log_std_range must be [low, high]")
    head = isinstance(log_std, str) and log_std == "head"  # the second half of the last layer's output
    widths = [obs_dim, *(len(layer["bias"]) for layer in layers[:-1]), (1 + head) * act_dim]
    state = {} if head else {"log_std": log_std}
    state["net.mean"] = content.get("obs_mean", torch.zeros(obs_dim))
    state["net.std"] = content.get("obs_std", torch.ones(obs_dim))
    for i, layer in enumerate(layers):
        state |= {f"net.weights.{i}": layer["weight"][None], f"net.biases.{i}": layer["bias"][None, None]}
    need(all(x.isfinite().all() for x in state.values()), "a number in it is NaN or infinite")
    need((state["net.std"] > 0).all(), "obs_std must be above 0")
    for key, ours in dict(action_low=data.low, action_high=data.high).items():
        theirs = content.get(key, torch.as_tensor(ours)).numpy()
        need(np.allclose(theirs, ours, rtol=1e-4), f"{key} is {theirs}, in the data {ours}")
    actor = Actor(widths, content["activation"], content["tanh"], None if head else torch.zeros(act_dim), (low, high))
    actor.load_state_dict(state)  # torch names a tensor of another shape
    return actor.requires_grad_(False)


class Critic(nn.Module):
    """Behaviour's values of K rewards: V (B, obs) → (B, K), Q (B, obs), (B, act) → (B, K)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, rewards: int):
        super().__init__()
        self.v = MLP(1, [obs_dim, hidden, hidden, rewards])
        self.q = MLP(1, [obs_dim + act_dim, hidden, hidden, rewards])
        for name in ("mean", "std", "advantage_std"):  # of the returns; of Q − V over the data
            self.register_buffer(name, torch.ones(rewards))

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.v(obs)[0] * self.std + self.mean

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.q(torch.cat([obs, action], -1))[0] * self.std + self.mean


def spread(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column, (N, d) → (d,); of a column that is constant, its own size."""
    size = x.abs().amax(0)
    std = x.double().std(0).to(x.dtype)
    return torch.where(std > 1e-6 * size, std, torch.where(size > 0, size, torch.ones_like(size)))


# --- Learning: every goal's advantage, then policies by weighted regression ---


def fit(net: nn.Module, loss: Callable[[], torch.Tensor], args: Args, what: str) -> None:
    """--updates steps of Adam on a loss of random rows, the learning rate falling to zero."""
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for _ in tqdm(range(args.updates), desc=what, disable=None):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
    if not value.isfinite():
        sys.exit(f"the {what}'s loss is not finite any more: lower --lr")


def discounted_sums(x: np.ndarray, ends: np.ndarray, discount: float) -> np.ndarray:
    """Σ_k discount^k x_{t+k} up to the end of t's episode: (N, K), last rows of the episodes (E,) → (N, K)."""
    lengths, out, total = np.diff(ends, prepend=-1), np.empty_like(x), np.zeros((len(ends), x.shape[1]))
    for k in range(lengths.max()):  # k rows before the end, all episodes at once
        alive = lengths > k
        total[alive] = x[ends[alive] - k] + discount * total[alive]
        out[ends[alive] - k] = total[alive]
    return out


def learn_critic(args: Args, data: dict[str, torch.Tensor], rewards: np.ndarray) -> tuple[Critic, torch.Tensor]:
    """Values of the behaviour policy, and A = (Q − V) / its standard deviation: rewards (N, K) → A (N, K).

    V is fitted to the observed returns; Q to λ-returns, which go on from V, also where a time limit cut an episode
    off. Q averages the noise of the returns away, which the weights of the regression would otherwise reward.
    """
    obs, action, next_obs = data["observations"], data["actions"], data["next_observations"]
    critic = Critic(obs.shape[1], action.shape[1], args.hidden, rewards.shape[1]).to(obs.device)
    for net in (critic.v, critic.q):
        net.mean[: obs.shape[1]], net.std[: obs.shape[1]] = obs.mean(0), spread(obs)
    alive, ends = ~data["terminals"].cpu().numpy()[:, None], np.flatnonzero(data["ends"].cpu().numpy())

    def everywhere(net: Callable, *columns: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            parts = [net(*part) for part in zip(*(x.split(65_536) for x in columns), strict=True)]
        return torch.cat(parts).double().cpu().numpy()

    def regress(net: Callable, owner: nn.Module, target: np.ndarray, what: str, *columns: torch.Tensor) -> None:
        y = torch.as_tensor(target, dtype=torch.float32, device=obs.device)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(y), (args.batch_size,), device=y.device)
            return ((net(*(x[rows] for x in columns)) - y[rows]) / critic.std).square().mean()

        fit(owner, loss, args, what)

    returns = discounted_sums(rewards, ends, args.gamma)
    critic.mean, critic.std = (torch.as_tensor(x).to(critic.mean) for x in (returns.mean(0), returns.std(0) + 1e-12))
    regress(critic.value, critic.v, returns, "value", obs)
    v, next_v = everywhere(critic.value, obs), everywhere(critic.value, next_obs)
    error = rewards + args.gamma * alive * next_v - v
    target = v + discounted_sums(error, ends, args.gamma * args.gae_lambda)
    regress(critic, critic.q, target, "critic", obs, action)
    advantage = everywhere(critic, obs, action) - v
    critic.advantage_std = torch.as_tensor(advantage.std(0) + 1e-12).to(critic.mean)
    return critic.requires_grad_(False), torch.as_tensor(advantage).to(critic.mean) / critic.advantage_std


def regression_weights(advantage: torch.Tensor, temperature: float, clip: float) -> torch.Tensor:
    """min(exp(A / T), clip), divided by their mean over the rows: (N,) → (N,) (Peng et al., 2019)."""
    weights = (advantage / temperature).exp().clamp(max=clip)
    return weights / weights.mean()


def regression(args: Args, data: dict[str, torch.Tensor], weights: torch.Tensor, tanh: str, what: str) -> Actor:
    """A Gaussian policy by maximum likelihood, −E[ w log π(a | s) ], weights (N,); with tanh "sample" it is fitted to
    atanh(a), whose likelihood is that of a up to a constant."""
    obs, action = data["observations"], data["actions"]
    actor = Actor([obs.shape[1], args.hidden, args.hidden, 2 * action.shape[1]], tanh=tanh).to(obs.device)
    actor.net.mean, actor.net.std = obs.mean(0), spread(obs)
    target = action.clamp(-0.97, 0.97).atanh() if tanh == "sample" else action

    def loss() -> torch.Tensor:
        rows = torch.randint(len(obs), (args.batch_size,), device=obs.device)
        return -(weights[rows] * gaussian_log_prob(target[rows], *actor(obs[rows]))).mean()

    fit(actor, loss, args, what)
    return actor.requires_grad_(False).cpu()


def learn(args: Args, data: "Dataset", goal_rewards: np.ndarray, actor: Actor | None) -> tuple:
    """The frozen actor (as given, else bc or awr), a prior of each goal, the critic: goal_rewards (N, G)."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    columns = {key: torch.as_tensor(x, device=device) for key, x in data.columns.items()}
    rewards = np.column_stack([data.columns["rewards"], goal_rewards]).astype(np.float64)  # (N, 1+G)
    critic, advantage = learn_critic(args, columns, rewards)
    if actor is None:  # a clone is weighted by nothing
        weights = regression_weights(advantage[:, 0] * (args.actor == "awr"), args.temperature, args.weight_clip)
        actor = regression(args, columns, weights, "sample", "frozen actor")
    priors = [
        regression(args, columns, regression_weights(a, args.temperature, args.weight_clip), actor.tanh, "prior")
        for a in advantage[:, 1:].T
    ]
    return actor, priors, critic.cpu()


# --- Steering ---


def steer(actor: Actor, prior: Callable, rule: str, alpha: float) -> Callable[[np.ndarray], np.ndarray]:
    """The steered policy, (B, obs) → (B, act) in [-1, 1]: the squashed mean; prior: (B, obs) → Gaussian."""

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        return actor.squash(compose(rule, alpha, actor.gaussian(obs), prior(obs))[0]).float().numpy()

    return act


# --- The paper ends here. Tasks and data ---

LEVELS = ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay")
# D4RL's files (CC BY 4.0): name → path on the server and the first digits of its SHA-256 (TensorFlow Datasets' tables)
D4RL = {
    f"{task}-{level}-v2": (f"gym_mujoco_v2/{task}_{level.replace('-', '_')}-v2.hdf5", digits)
    for task, column in {
        "hopper": "63103ef7 5bdf1bc4 01aa219a 9d51ad87 e121c5f7 56baf959",
        "walker2d": "4e863bb6 cf00f43a 2985dc3d 6b8d7f86 e75de96a f2720f9d",
        "halfcheetah": "25407aef 41324e84 d9fe53bb 015db75d 48d494a4 27fdf7ea",
    }.items()
    for level, digits in zip(LEVELS, column.split(), strict=True)
}
SERVERS = (  # tried in turn: Berkeley's, and a flat copy
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5/{name}",
)
ENVS = {  # where a D4RL task is evaluated
    "liquidation": "liquidation_env:Liquidation-v0",
    "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4",
}  # fmt: skip

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")  # D4RL's layout


def task_of(env_id: str) -> str:
    """What settings, scores and rules go by: hopper-medium-v2, mujoco/hopper/medium-v0 and Hopper-v5 → hopper."""
    return (env_id.split("/")[-2] if "/" in env_id else env_id.split("-")[0]).lower()


def fetch(name: str) -> Path:
    """D4RL's file of that name in $D4RL_DATASET_DIR, else ~/.d4rl/datasets; downloaded if it is not there."""
    path, digits = D4RL[name]
    file = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser() / Path(path).name
    file.parent.mkdir(parents=True, exist_ok=True)
    for server in [] if file.exists() else SERVERS:
        url = server.format(path=path, name=file.name)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digits or None)
            break
        except (OSError, RuntimeError) as error:  # no network, no such file; another SHA-256
            print(f"{url}: {error}")
    if not file.exists():
        where = f"put {file.name} into {file.parent} ($D4RL_DATASET_DIR names another folder), use --dataset-path FILE"
        sys.exit(f"cannot download {name}: {where}, or Minari: --env-id mujoco/hopper/medium-v0")
    return file


def load_arrays(args: Args) -> tuple[dict[str, np.ndarray], str, "gym.envs.registration.EnvSpec | None"]:
    """Columns in D4RL's layout, where they are from, and the environment that Minari's data name."""
    name, path = args.env_id, Path(args.dataset_path).expanduser() if args.dataset_path else None
    if name == "liquidation" and path is None:
        return liquidation_env.behaviour_dataset(args.dataset_episodes, args.seed), f"generated, seed {args.seed}", None
    if path is None and "/" not in name and name not in D4RL:
        near = difflib.get_close_matches(name, ["liquidation", *D4RL], 3, 0)
        sys.exit(f"--env-id {name}: no data of that name (near: {', '.join(near)}); your own: --dataset-path FILE")
    path = fetch(name) if path is None and name in D4RL else path
    if path is None or path.is_dir():
        import minari

        dataset = minari.MinariDataset(path / "data") if path else minari.load_dataset(name, download=True)
        parts = {key: [] for key in KEYS}
        for episode in dataset.iterate_episodes():  # T + 1 observations, so every next one is known
            obs, last = flatten(episode.observations), np.arange(len(episode.rewards)) == len(episode.rewards) - 1
            columns = obs[:-1], episode.actions, episode.rewards, obs[1:], episode.terminations, last
            for key, column in zip(KEYS, columns, strict=True):
                parts[key].append(column)
        return {key: np.concatenate(x) for key, x in parts.items()}, f"Minari {dataset.id}", dataset.env_spec
    with h5py.File(path) as file:
        arrays = {key: file[key][()] for key in KEYS if key in file}
    if name not in D4RL or not D4RL[name][1]:  # nobody knows what it should be
        return arrays, path.name, None
    with open(path, "rb") as file:
        genuine = hashlib.file_digest(file, "sha256").hexdigest().startswith(D4RL[name][1])
    return arrays, f"{path.name} ({'' if genuine else 'not '}D4RL's file)", None


def flatten(values) -> np.ndarray:
    """Observations (T, ...); of (nested) dicts (T, d), keys sorted, as FlattenObservation has them."""
    if not isinstance(values, dict):
        return np.asarray(values)
    parts = [flatten(values[key]) for key in sorted(values)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def make_env(args: Args, spec=None) -> gym.Env | None:
    """The evaluation environment with vectors as observations and actions in [-1, 1]; spec: Minari's."""
    if not args.eval_episodes:
        return None
    warnings.filterwarnings("ignore", message=".*(out of date|settotalmass)")  # D4RL's data are of -v4's kind
    mujoco.set_mju_user_warning(warnings.warn)  # it would print each anew for every copy of an environment
    own = args.env_id if ":" in args.env_id or args.env_id in gym.registry else None
    env = gym.make(args.eval_env_id or own or spec or ENVS.get(task_of(args.env_id), args.env_id))
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    for name, space in dict(observations=env.observation_space, actions=env.action_space).items():
        box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not box or (name == "actions" and not space.is_bounded()):
            sys.exit(f"{env.spec.id} has {name} {space}: only continuous vectors, actions bounded, work here")
    unit = (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    return env if unit else gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


@dataclass
class Dataset:
    """N transitions in order of time, episode after episode."""

    columns: dict[str, np.ndarray]  # KEYS' first four, float32, actions in [-1, 1]; bool: terminals (no value
    # follows; a time limit is none), known (where it is not, s' is a placeholder) and ends (last row of an episode)
    returns: np.ndarray  # (E,) of whole episodes; none where the rows are in no order
    low: np.ndarray  # (act,), what an action of -1 is in the environment
    high: np.ndarray  # (act,), what 1 is
    source: str  # where the data are from
    notes: list[str]  # what is doubtful about them
    sha256: str  # of the columns


def make_dataset(arrays: dict[str, np.ndarray], source: str, env: gym.Env | None = None) -> Dataset:
    """Columns in D4RL's layout, (N, ...), checked and completed; exits with one line if they cannot be right.

    Without `next_observations` a row's next state is the following row, unknown at an episode's end: a timed-out
    row is dropped, a terminal one stays (AntMaze has its reward there), masked in targets and from dynamics models.
    """

    def need(good: bool, what: str) -> None:
        if not good:
            sys.exit(f"{source}: {what}")

    missing = {"observations", "actions", "rewards", "terminals"} - arrays.keys()
    missing |= set() if {"timeouts", "next_observations"} & arrays.keys() else {"timeouts (or next_observations)"}
    need(not missing, f"no {', '.join(sorted(missing))} in it: docs/your_own.md shows D4RL's layout")
    data = {}
    for key, x in arrays.items():
        rank = 1 if key in ("rewards", "terminals", "timeouts") else 2
        x = x[:, 0] if rank == 1 and x.shape[1:] == (1,) else x
        discrete = key == "actions" and (x.dtype.kind != "f" or x.ndim < 2)
        need(not discrete, f"actions are {x.dtype} {x.shape}: only continuous ones, float (N, d), work here")
        need(x.ndim == rank, f"{key} have shape {x.shape}: only {'vectors (N, d)' if rank == 2 else '(N,)'} work here")
        need(len(x) == len(arrays["rewards"]) > 1, f"{len(x)} {key} and {len(arrays['rewards'])} rewards")
        x = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        need(not len(bad), f"{key} are NaN or infinite in {len(bad)} rows, first in {bad[:3]}: repair or drop them")
        data[key] = x.astype(bool) if key in ("terminals", "timeouts") else x
    obs, actions, rewards, terminals = (data[key] for key in ("observations", "actions", "rewards", "terminals"))

    ends, derived, notes = terminals | data.get("timeouts", False), "next_observations" not in data, []
    next_obs = np.roll(obs, -1, 0) if derived else data["next_observations"]
    need(next_obs.shape == obs.shape, f"next_observations are {next_obs.shape}, observations {obs.shape}")
    # A jump ends an episode too, for not every file flags its time limits. Rounding, of what a column holds, is none.
    size, std = np.abs(obs).max(0), obs.std(0, dtype=np.float64)
    jump = np.append((np.abs(next_obs[:-1] - obs[1:]) > 1e-6 * size + 0.01 * std).any(1), True)
    ordered = ends.all() or jump[~ends].mean() < 0.5
    other = ends & ~jump & ordered  # s' is the next episode's first state: an automatic reset, or derived
    after, change = np.flatnonzero(other[:-1]) + 1, np.abs((next_obs - obs) / np.where(std > 0, std, 1)).mean(1)
    if len(after) and not rewards[after].any() and change[after].mean() > 2 * change[after - 1].mean():
        arrays = {key: np.delete(x, after, 0) for key, x in arrays.items()}  # Gymnasium's vector environments
        return make_dataset(arrays, f"{source}, without {len(after):,} rows that only reset the environment", env)
    known = ~other & ~(terminals & (next_obs == obs).all(1))
    known[-1] &= not derived
    if not ordered:
        notes.append("the rows are in no order (shuffled? several environments in turn?): no episodes, no returns")
    if derived and not ends.all() and ((next_obs - obs)[~ends].var(0) >= 1.5 * std**2).all():
        notes.append("rows that follow each other are unrelated (shuffled?), and s' is the following row")
    if derived and not ends.any():
        notes.append("no row has a terminal or a timeout: all are one episode")
    if other.any() and not derived:
        notes.append(f"at {other.sum():,} episode ends s' is the next episode's first state: taken as unknown")
    whole = terminals[-1] or data.get("timeouts", jump)[-1]  # else the file stops inside the last episode
    ends, keep = ends | jump, known | terminals
    need(keep.any(), "no row has a next state: store next_observations")
    returns = np.add.reduceat(rewards.astype(np.float64), np.append(0, np.flatnonzero(ends)[:-1] + 1))
    returns = returns[: len(returns) - (not whole and len(returns) > 1)] if ordered else returns[:0]
    limit, last = env.spec.max_episode_steps if env else None, np.flatnonzero(ends)
    lengths, terminal = np.diff(last, prepend=-1), terminals[last]
    if limit and ordered:
        if lengths.max() > limit:
            what = f"an episode of {lengths.max():,} rows, {env.spec.id} stops after {limit:,}: nobody set 'timeouts'"
            need(not derived, f"{what}, and s' would be another episode's: set them, or store next_observations")
            notes.append(what)
        if (terminal & (lengths == limit)).sum() > 0.5 * terminal.sum():
            notes.append(f"most terminals are in row {limit:,} of an episode, the time limit: are they timeouts?")
        if (data.get("timeouts", terminals)[last] & ~terminal & (lengths < limit)).mean() > 0.5:
            notes.append(f"most episodes time out before row {limit:,}, the time limit: are they terminals?")
    ends[:-1] |= ~keep[1:]  # the row before a dropped one is now the last of its episode

    low, high = -np.ones(actions.shape[1], np.float32), np.ones(actions.shape[1], np.float32)
    if env is not None:
        have, want = (obs.shape[1], actions.shape[1]), (env.observation_space.shape[0], env.action_space.shape[0])
        need(have == want, f"{have} observations and actions, but {want} in {env.spec.id}: --eval-env-id names another")
        box = env.env.action_space if isinstance(env, gym.wrappers.RescaleAction) else env.action_space
        low, high = box.low, box.high
    elif np.abs(actions).max() > 1.001:
        low, high = actions.min(0), np.where(np.ptp(actions, 0) > 0, actions.max(0), actions.min(0) + 1)
        notes.append(f"without an environment the data's actions tell their bounds: {low} to {high}")
    scaled = 2 * (actions.astype(np.float64) - low) / (high - low) - 1
    remedy = "np.clip them if they were recorded before the environment's own clip, rescale them if the unit differs"
    inside = np.abs(scaled).max() <= 1.001
    need(inside, f"actions ({actions.min():.4g} to {actions.max():.4g}) leave the bounds {low} to {high}: {remedy}")
    columns = obs, scaled.clip(-1, 1).astype(np.float32), rewards, next_obs, terminals, known, ends
    columns = dict(zip((*KEYS[:5], "known", "ends"), (column[keep] for column in columns), strict=True))
    digest = hashlib.sha256(b"".join(hashlib.sha256(x.tobytes()).digest() for x in columns.values())).hexdigest()
    return Dataset(columns, returns, low, high, source, notes, digest)


def doubts(data: Dataset, env: gym.Env | None, args: Args, spec) -> list[str]:
    """What in the data does not fit the task; spec: the environment that Minari's data name."""
    notes, obs, name = [], data.columns["observations"], env.spec.id if env else ""
    std = obs.std(0)
    if env is not None and (np.abs(obs.mean(0)) < 0.01).all() and ((np.abs(std - 1) < 0.01) | (std == 0)).all():
        notes.append(f"every observation has mean 0 and std 1: normalised? {name} gives its own units")
    if env is not None and len(data.returns):
        starts = obs[np.append(0, np.flatnonzero(data.columns["ends"])[:-1] + 1)]
        firsts = np.stack([env.reset(seed=seed)[0] for seed in range(10)])
        distance, width = np.abs(firsts.mean(0) - starts.mean(0)), firsts.std(0) + starts.std(0)
        far = distance > 4 * width + 1e-3 * (np.abs(obs).max(0) + np.abs(firsts).max(0))
        for i in np.flatnonzero(far)[:1]:
            where = f"column {i}: {firsts[:, i].mean():.4g}, in the data {starts[:, i].mean():.4g}"
            notes.append(f"{name} starts elsewhere than the data's episodes ({where}): other units, or normalised?")
    if env is not None and spec is not None and spec.additional_wrappers:
        wrappers = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
        notes.append(f"the data were collected through the wrappers {wrappers}, whose state they do not hold")
    if name == "Liquidation-v0" and not env.spec.kwargs and args.dataset_path:
        notes += filter(None, [liquidation_env.market_warning(data.columns)])
    return notes


# --- Evaluation and running ---


def play(
    act: Callable, env: gym.Env, task: str, weights: np.ndarray, episodes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The goal's objectives (n,), weights · features summed over an episode, and returns (n,) of n episodes: the
    first of each copy after reset(seed), so that two policies are compared in pairs.

    An environment without a time limit is cut at 1,000 steps.
    """
    mode = "sync" if env.spec.additional_wrappers else None  # an environment's own vectorised form takes none
    envs = gym.make_vec(env.spec, num_envs=episodes, vectorization_mode=mode)
    obs, _ = envs.reset(seed=seed)
    objectives, returns, alive = np.zeros(episodes), np.zeros(episodes), np.ones(episodes, bool)
    for _ in range(env.spec.max_episode_steps or 1000):
        action = act(obs)
        objectives += alive * (features(task, obs, action) @ weights)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += alive * reward
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    envs.close()
    return objectives, returns


def save(content: dict, path: Path) -> None:
    """torch.save, whole or not at all: a kill leaves the file that was there."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def parse() -> Args:
    """The command line, twice: for the task, then with its settings, so that --help shows what will run."""
    words, about = [word for word in sys.argv[1:] if word not in ("-h", "--help")], __doc__.split("\n\n")[0]
    settings = SETTINGS.get(task_of(tyro.cli(Args, args=words).env_id), {})
    return tyro.cli(Args, description=about, default=replace(Args(), **settings))


def prepare(args: Args) -> tuple["Dataset", gym.Env | None, Actor | None]:
    """Data, environment and a given actor. What can be wrong in a first hour ends here, in one line."""
    if args.env_id == "liquidation" and find_spec("liquidation_env") is None:
        sys.exit("the default task needs liquidation_env.py beside this file; others: --env-id and --dataset-path")
    finite = all(math.isfinite(x) for x in vars(args).values() if isinstance(x, float))
    for flag, good, must in (
        ("alpha", args.alpha == "budget" or 0 <= args.alpha < 1, "in [0, 1): 1 would drop the frozen actor"),
        ("kl-budget", args.kl_budget >= 0 and finite, "0 or more, and every number finite"),
        ("temperature", args.temperature > 0, "above 0"),
        ("gae-lambda", 0 <= args.gae_lambda <= 1, "in [0, 1]"),
        ("gamma", 0 <= args.gamma < 1 or (args.gamma == 1 and task_of(args.env_id) == "liquidation"), "in [0, 1)"),
        ("updates", min(args.updates, args.batch_size, args.hidden) > 0, "above 0, as --batch-size and --hidden"),
        ("weight-clip", args.weight_clip > 0, "above 0"),
        ("num-threads", args.num_threads >= 0, "0 or more"),
        ("eval-episodes", args.eval_episodes == 0 or args.eval_episodes > 1, "0, or at least 2 for an interval"),
    ):
        if not good:
            sys.exit(f"--{flag} {vars(args)[flag.replace('-', '_')]}: it must be {must}")
    torch.set_num_threads(args.num_threads or os.cpu_count())
    where = "--dataset-path takes an HDF5 file in D4RL's layout or a Minari folder; --eval-env-id names another "
    where += "environment, --eval-episodes 0 steers without one"
    reading = f"{' '.join(filter(None, (args.env_id, args.dataset_path, args.eval_env_id)))} ({where})"
    try:
        arrays, source, spec = load_arrays(args)
        env = make_env(args, spec)
        data, actor = make_dataset(arrays, source, env), None
        data.notes += doubts(data, env, args, spec)
        if args.actor not in ("bc", "awr"):
            reading = f"--actor {args.actor} (bc, awr, or a file: docs/your_own.md)"
            content = torch.load(Path(args.actor).expanduser(), map_location="cpu", weights_only=True)
            actor = read_actor(content, data)
            if task_of(content.get("env_id", args.env_id)) != task_of(args.env_id):
                data.notes.append(f"{args.actor} is an actor of {content['env_id']}")
    except Exception as error:  # of a file, a network, somebody's environment: there is no end of kinds
        sys.exit(f"{reading}: {type(error).__name__}: {error}".replace("\n", " "))
    if not len(data.returns):
        sys.exit(f"{source}: {data.notes[0]}, of which a goal's advantage is made: store the rows in order")
    size = f"{len(data.columns['rewards']):,} rows, {len(data.returns):,} episodes"
    print(f"data: {args.env_id}, {data.source}: {size}, mean return {data.returns.mean():.1f}")
    print(*[f"note: {note}\n" for note in data.notes], sep="", end="")
    return data, env, actor


def plot(path: Path, args: Args, data: "Dataset", rows: list[dict], chosen: float) -> None:
    """KL, the goal's objective and the task's return against α; bars: 95% of the paired difference to Frozen."""
    names = {"kl": "mean KL from the frozen actor", "objective": "the goal's objective", "return": "the task's return"}
    names = {key: name for key, name in names.items() if key in rows[0]}
    figure = Figure(figsize=(4.4 * len(names), 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for ax, (key, name) in zip(axes[0], names.items(), strict=True):
        x, y, half = ([row.get(k, 0.0) for row in rows] for k in ("alpha", key, f"{key}_ci95"))
        ax.errorbar(x[:-1], y[:-1], half[:-1], fmt="o-", ms=4, capsize=3, color="#0072b2", label=args.rule)
        ax.errorbar(x[-1:], y[-1:], half[-1:], fmt="s", ms=5, capsize=3, color="#d55e00", label="prior-only")
        ax.axhline(y[0], color="k", ls=":", lw=1, label="frozen")
        ax.axvline(chosen, color="0.5", ls="-.", lw=1, label=f"chosen α {chosen:g}")
        ax.set(xlabel="α", ylabel=name, xlim=(-0.04, 1.04))
    if args.alpha == "budget":
        axes[0, 0].axhline(args.kl_budget, color="#cc79a7", ls="--", lw=1, label=f"budget {args.kl_budget:g}")
    axes[0, 0].legend(fontsize=8)
    goal = "a goal of its own" if args.goal_weights else f"goal {args.goal}"
    figure.suptitle(f"{args.env_id} ({data.source}), {goal}", fontsize=9, wrap=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    args, begun = parse(), time.monotonic()
    data, env, actor = prepare(args)
    obs = data.columns["observations"]
    task, weights = choose_goal(args, obs.shape[1])
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.runs_dir).expanduser() / name.replace("/", "_").replace(":", "_")
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    print(f"run folder: {run_dir}", flush=True)

    # The prior, and how far it may pull the actor
    goal_rewards = features(task, obs, data.columns["actions"]) @ weights  # (N,)
    actor, (prior,), _ = learn(args, data, goal_rewards[:, None], actor)
    states = torch.as_tensor(obs[np.random.default_rng(args.seed).integers(len(obs), size=5_000)])
    gaussians = actor.gaussian(states), prior.gaussian(states)
    chosen = select_alpha(args.rule, args.kl_budget, *gaussians) if args.alpha == "budget" else args.alpha
    errors = identity_error(chosen or 0.5, *gaussians)

    # Every α on the same episodes
    alphas, rows, frozen = sorted({0.1, 0.3, 0.5, 0.7, 0.9, chosen} - {0.0}), [], {}
    listed = [("frozen", 0.0), *((args.rule, alpha) for alpha in alphas), ("prior-only", 1.0)]
    for rule, alpha in tqdm(listed, desc="episodes", disable=None):
        row = dict(rule=rule, alpha=alpha, kl=mean_kl(rule, alpha, *gaussians))
        if env is not None:
            act = steer(actor, prior.gaussian, rule, alpha)
            played = play(act, env, task, weights, args.eval_episodes, args.seed + 20_000)
            for key, x in zip(("objective", "return"), played, strict=True):
                difference = x - frozen.setdefault(key, x)  # the first is Frozen
                half = 1.96 * difference.std(ddof=1) / math.sqrt(len(x))
                row |= {key: float(x.mean()), f"{key}_gain": float(difference.mean()), f"{key}_ci95": float(half)}
        rows.append(row)

    # What came of it
    about = dict(script="steer_poe", env_id=args.env_id, goal=args.goal, goal_weights=weights.tolist())
    about |= dict(rule=args.rule, alpha=chosen)
    box = dict(action_low=torch.as_tensor(data.low), action_high=torch.as_tensor(data.high))
    save(about | box | dict(frozen=actor.file(), prior=prior.file()), run_dir / "steered_actor.pt")
    at = next(row for row in rows if row["alpha"] == chosen)
    shown = [key for key in ("objective", "return") if key in at]
    print(f"{'':11}{'α':>8}{'KL':>9}" + "".join(f"{key:>12}{'minus Frozen':>21}" for key in shown))
    for row in rows:
        words = [f"{row[key]:12.2f}{row[f'{key}_gain']:+12.2f} ± {row[f'{key}_ci95']:<6.2f}" for key in shown]
        print(f"{row['rule']:<11}{row['alpha']:8.4g}{row['kl']:9.4f}", *words, "  ← chosen" * (row is at), sep="")
    why = f"the largest up to 0.999 with KL ≤ {args.kl_budget:g}" if args.alpha == "budget" else "as given"
    print(f"chosen: α {chosen:g}, {why}; mean KL {at['kl']:.4f}")
    share = None
    if env is not None:
        best = max(rows[:-1], key=lambda row: row["objective"])  # of α < 1, Frozen's 0 among them
        share = at["objective_gain"] / best["objective_gain"] if best["objective_gain"] > 0 else None
        part = "no α tried beats Frozen" if share is None else f"{100 * share:.0f}% of α {best['alpha']:g}'s"
        part += ", it loses to Frozen" * (at["objective_gain"] < 0)
        print(f"share of the possible gain: {part} (the best of those tried, on the same episodes)")
        print(f"± is the 95% interval of the paired difference, of {args.eval_episodes} episodes and one trained prior")
    means, ratio = (f"{x:.0e}" for x in errors)
    print(f"identity: PoE's and KL-Reg's means agree to {means}, their variances' ratio with 1+β to {ratio} (relative)")
    result = about | dict(rows=rows, share_of_possible_gain=share, kl=at["kl"], identity_errors=errors)
    result |= dict(dataset=data.source, sha256=data.sha256, notes=data.notes, args=vars(args))
    result["minutes"] = (time.monotonic() - begun) / 60
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(run_dir / "figure.png", args, data, rows, chosen)
    print(f"{result['minutes']:.1f} minutes; steered_actor.pt, result.json and figure.png are in {run_dir}")


if __name__ == "__main__":
    main()
