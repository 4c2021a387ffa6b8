# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "minari[hdf5,hf]==0.5.4",
#     "h5py==3.16.0", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Posterior Sampling-based Policy Optimization (PSPO): model-based offline reinforcement learning.

Paper: "Offline Policy Optimization with Posterior Sampling", arXiv 2605.07393; the equation numbers are its own.
Most equations have one reading; where they have more, docs/pspo.md says which one is taken here, and why.

    τ(s', r | s, a)  a dynamics model, a diagonal Gaussian, one of a pool      P₀, P  prior, posterior over models
    μ(a | s)  behaviour policy     π(a | s)  policy     Q, Q̄  critic, target critic     V  value (8)     γ  discount
    r̂, s''  a model's reward, next state     λ, α  strength of the evidence, of the tie to μ     ε  trust region

    (1)  J(π) = E[ Σ γᵗ r(s_t, a_t) ],  a model τ ~ P drawn anew at every step, s_{t+1} ~ τ
    (3)  Δ_τ = ( E_τ[r̂ + γ V(s'')] − (r + γ V(s')) )²  on an observed transition (s, a, r, s') of the data
    (4)  P(τ) ∝ P₀(τ) exp(−λ Δ_τ)                     = argmin E_P[Δ_τ] + KL(P ‖ P₀) / λ
    (6)  Q ← Q + η_t (y − Q),   y = r + γ V(s'),  s' ~ τ,  τ ~ P
    (7)  J̄(π) = J(π) − α E[ Σ γᵗ KL(π ‖ μ) ]
    (8)  (T*Q)(s, a) = E_{τ~P}[ r + γ E_{s'~τ} V(s') ],   V(s) = α log E_{a~μ} exp(Q(s, a) / α)
    (9)  π_{i+1} = argmax E_s[ E_π Q − α KL(π ‖ μ) ]  subject to  E_s KL(π ‖ π_i) ≤ ε   (η: its multiplier)

Run it (minutes of one CPU core):
    python pspo.py                                                   # liquidation, generated data: 7 minutes
    python pspo.py --env-id hopper-medium-v2 --quick                 # a CPU-sized setting: 20 minutes
    python pspo.py --env-id hopper-medium-v2 --cuda                  # the paper's sizes; wants a GPU
    python pspo.py --env-id Pendulum-v1 --dataset-path pendulum.hdf5 --quick  # your environment and data
    python pspo.py --resume runs/<run folder>                        # goes on from the last evaluation
"""

import copy
import csv
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

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if find_spec("liquidation_env"):  # this file alone does without
    import liquidation_env


@dataclass
class Args:
    """Table 5 where it has a number ("paper"); "PMDB": the closest public relative; "ours": by measurement."""

    env_id: str = "liquidation"  # liquidation, a D4RL name, a Minari id, or any Gymnasium id with --dataset-path
    dataset_path: str = ""  # HDF5 file in D4RL's layout, or a Minari folder, instead of the data that --env-id names
    eval_env_id: str = ""  # Gymnasium id to evaluate in, if not the one that --env-id implies
    dataset_episodes: int = 10_000  # liquidation: episodes of behaviour data to generate
    quick: bool = False  # a setting of MuJoCo's and your own tasks that one CPU core does in minutes
    seed: int = 1  # of every random generator
    # The pool of dynamics models
    pool_size: int = 100  # models (paper), each trained on its own bootstrap of the data (ours)
    active_models: int = 10  # N, drawn from the pool anew every 1,000 iterations (paper; how often: ours)
    dynamics_hidden: int = 512  # units of a hidden layer (paper; hopper 256)
    dynamics_layers: int = 4  # hidden layers (PMDB)
    dynamics_batch: int = 512  # rows per update and model (paper; hopper 256)
    dynamics_epochs: int = 1000  # passes over the data (paper); 0: those of 50,000 updates, at most 200
    dynamics_lr: float = 1e-4  # AdamW (PMDB), cosine to zero (ours)
    learn_termination: bool = False  # models predict the end from `terminals`, also where the task's rule is known
    # The posterior, Eqs. (3) and (4)
    likelihood_coef: float = 1.0  # λ (paper); 0 is its ablation "Average Utilization"
    evidence_rows: int = 16  # observed transitions per iteration that Δ is measured on (ours)
    # Policy iteration, Eqs. (6) to (9)
    gamma: float = 0.99  # γ (paper)
    iterations: int = 2_000_000  # a rollout step, a critic update and a policy update each (PMDB)
    batch_size: int = 256  # rows per update, half of the data, half of the models (paper; half: PMDB)
    hidden: int = 256  # units in each of two hidden layers of policy (paper) and critics
    layer_norm: bool = True  # in the critics: steadier far from the data, less exact where values have cliffs (ours)
    actor_lr: float = 3e-5  # cosine to zero over the iterations (PMDB; cosine: ours)
    critic_lr: float = 3e-4  # η_t of Eq. (6), cosine to zero (PMDB; cosine: ours)
    target_rate: float = 0.005  # Polyak rate of Q̄ (PMDB)
    average_rate: float = 1e-5  # Polyak rate of the average of π's weights, which is evaluated and saved (PMDB)
    rollout_horizon: int = 1000  # steps after which a rollout starts again from a state of the data (PMDB)
    action_samples: int = 20  # actions for V of Eq. (8), half from μ, half from π; half as many for E_π Q (PMDB)
    alpha: float = 0.3  # α of Eq. (7), in units of the reward's range (ours); 0: the ablation "Without Regularization"
    trust_region: float = 0.02  # ε of Eq. (9) (ours)
    trust_region_every: int = 50  # policy updates of one i of Eq. (9) (ours)
    behaviour_updates: int = 50_000  # of μ by maximum likelihood (ours)
    # Evaluation and running
    eval_every: int = 20_000  # iterations between evaluations, also the checkpoints; they draw random numbers
    eval_episodes: int = 10  # of each; 0 trains and saves without an environment
    final_episodes: int = 100  # of the reported score
    runs_dir: str = "runs"  # the run's folder is made in here
    resume: str = ""  # run folder to go on with; of other flags only those after this one, and a moved --dataset-path
    num_threads: int = 1  # CPU threads (0: all cores)
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # torch.compile the steps (needs a C++ compiler); a minute to start
    track: bool = False  # also log to Weights & Biases (into the project $WANDB_PROJECT)


SETTINGS = {
    "liquidation": dict(  # ours: 4 inputs need no large network, and 20 steps no discount
        gamma=1.0, pool_size=20, dynamics_hidden=64, dynamics_layers=2, dynamics_batch=256, dynamics_epochs=8,
        dynamics_lr=3e-3, hidden=128, layer_norm=False, actor_lr=1e-3, critic_lr=1e-3,
        average_rate=1e-3, alpha=0.001, iterations=20_000, behaviour_updates=1_000,
        rollout_horizon=20, action_samples=6, eval_every=2_000, eval_episodes=2_000, final_episodes=10_000,
    ),
    "hopper": dict(dynamics_hidden=256, dynamics_batch=256),  # paper
}  # fmt: skip
QUICK = dict(
    pool_size=5, active_models=5, dynamics_hidden=200, dynamics_layers=3, dynamics_batch=256, dynamics_epochs=0,
    dynamics_lr=4e-3, gamma=0.997, hidden=128, actor_lr=1e-4, target_rate=0.04, average_rate=5e-4, iterations=20_000,
    behaviour_updates=30_000, action_samples=4, eval_every=2_000,
)  # fmt: skip
HOW = ("resume", "dataset_path", "num_threads", "cuda", "compile", "track")  # may change on --resume


# --- Equations ---


def model_evidence(model_target: torch.Tensor, observed_target: torch.Tensor) -> torch.Tensor:
    """Eq. (3): Δ_τ, the mean squared error of each model's Bellman target: (N, B), (B,) → (N,)."""
    return (model_target - observed_target).square().mean(-1)


def posterior(evidence: torch.Tensor, strength: float) -> torch.Tensor:
    """Eq. (4): log P(τ) = −λ Δ_τ + constant over the last dimension, P₀ uniform; it cannot underflow to NaN."""
    excess = evidence - evidence.amin(-1, keepdim=True)
    return F.log_softmax((-strength * excess).clamp(min=-1e30), -1)


def sample_models(log_belief: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """τ ~ P by the Gumbel-max trick: (N,), or a P for each row (B, N) → indices of the given shape."""
    gumbel = -torch.empty(*shape, log_belief.shape[-1], device=log_belief.device).exponential_().log()
    return (log_belief + gumbel).argmax(-1)


def bellman_target(reward, terminal, next_value, gamma: float) -> torch.Tensor:
    """y of Eq. (6): r + γ V(s'), and r alone where the episode ends; any shape."""
    return reward + gamma * next_value.masked_fill(terminal, 0.0)


def soft_value(q: torch.Tensor, log_weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. (8): V = α log Σ_j w_j exp(Q_j / α), (M, ...) → (...).

    For M actions drawn from ρ, log_weights is log( μ(a_j) / (M ρ(a_j)) ); for all actions of a finite set, log μ(a_j).
    """
    return alpha * torch.logsumexp(q / alpha + log_weights, 0)


def mixture_log_weights(u, mu_mean, mu_log_std, pi_mean, pi_log_std) -> torch.Tensor:
    """log( μ(u) / (M ρ(u)) ) of M samples, half from μ, half from π, ρ = (μ + π) / 2: (M, B, act) → (M, B)."""
    log_mu, log_pi = gaussian_log_prob(u, mu_mean, mu_log_std), gaussian_log_prob(u, pi_mean, pi_log_std)
    return log_mu - (torch.logaddexp(log_mu, log_pi) - math.log(2)) - math.log(len(u))


def policy_objective(q, alpha, kl_behaviour, eta, kl_previous) -> torch.Tensor:
    """Eq. (9) with its multiplier η (KKT): E_s[ E_π Q − α KL(π ‖ μ) − η KL(π ‖ π_i) ], (B,) each → scalar."""
    return (q - alpha * kl_behaviour - eta * kl_previous).mean()


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag exp(2 log_std)), (..., act) → (...)."""
    return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_p, log_std_p, mean_q, log_std_q) -> torch.Tensor:
    """KL(p ‖ q) of diagonal Gaussians, (..., act) → (...). The same after a tanh; clipped, at most this."""
    ratio = (2 * (log_std_p - log_std_q)).exp()
    return 0.5 * (ratio + ((mean_p - mean_q) * (-log_std_q).exp()).square() - 1 - ratio.log()).sum(-1)


def beta_nll(mean, log_std, target) -> torch.Tensor:
    """Gaussian negative log-likelihood, each term times its (constant) variance^β (Seitzer et al., 2022): (...).

    β = 1/2; plain maximum likelihood, β = 0, learns nothing about a reward that is zero on most rows.
    """
    nll = log_std + 0.5 * ((target - mean) * (-log_std).exp()).square()
    return nll * log_std.exp().detach()


def cosine(update: int, updates: int) -> float:
    """A learning rate in update 1, 2, … as a share of the first: 1 falling to 0."""
    return 0.5 * (1 + math.cos(math.pi * (update - 1) / updates))


TERMINAL = {  # the environments' own rules: next states (..., obs) → terminal (...); another's is learnt
    "hopper": lambda obs: (
        ~(obs.isfinite().all(-1) & (obs[..., 1:].abs() < 100).all(-1) & (obs[..., 0] > 0.7) & (obs[..., 1].abs() < 0.2))
    ),
    "walker2d": lambda obs: ~((obs[..., 0] > 0.8) & (obs[..., 0] < 2.0) & (obs[..., 1].abs() < 1.0)),
    "halfcheetah": lambda obs: torch.zeros_like(obs[..., 0], dtype=torch.bool),
    "liquidation": lambda obs: (obs[..., 0] > 19.5) | (obs[..., 1] < 0.1),  # t' = 20, predicted with a small error
}


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


class Dynamics(nn.Module):
    """Models τ(r, s' | s, a): diagonal Gaussians of the reward and the change of state; and the log-odds of an end.

    The end is learnt and asked for only where `rule`, next states (..., obs) → terminal (...), is None.
    """

    def __init__(self, size: int, obs_dim: int, act_dim: int, hidden: int, layers: int, rule: Callable | None):
        super().__init__()
        self.net = MLP(size, [obs_dim + act_dim, *[hidden] * layers, 2 * (1 + obs_dim) + 1])
        self.rule = rule
        self.register_buffer("output_mean", torch.zeros(1 + obs_dim))
        self.register_buffer("output_std", torch.ones(1 + obs_dim))
        self.register_buffer("box", torch.zeros(2, obs_dim))  # next states are kept inside

    def standardised(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, obs+act) or (size, B, obs+act) → mean, log-std (size, B, 1+obs) in standard units, log-odds (size, B)."""
        out = self.net(inputs, F.silu)
        mean, log_std = out[..., :-1].chunk(2, -1)
        log_std = 1 - F.softplus(1 - log_std)  # soft clamp to (-6, 1)
        return mean, -6 + F.softplus(log_std + 6), out[..., -1]

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., obs), (..., act) → mean and std of (r, s'), each (size, B, 1+obs), in the data's units; log-odds."""
        mean, log_std, log_odds = self.standardised(torch.cat([obs, action], -1))
        mean = mean * self.output_std + self.output_mean
        return torch.cat([mean[..., :1], mean[..., 1:] + obs], -1), log_std.exp() * self.output_std, log_odds

    def next(self, mean, std, log_odds, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean + std · noise (..., 1+obs) → reward (...), next state (..., obs) in the data's box, terminal (...)."""
        sample = mean + std * noise
        next_obs = sample[..., 1:].clamp(self.box[0], self.box[1])
        ends = torch.rand_like(noise[..., 0]) < log_odds.sigmoid() if self.rule is None else self.rule(next_obs)
        return sample[..., 0], next_obs, ends

    @torch.no_grad()
    def load_members(self, pool: "Dynamics", members: torch.Tensor) -> None:
        """Copy the models `members` (size,) of another pool into this one, in place."""
        for mine, theirs in zip(self.net.parameters(), pool.net.parameters(), strict=True):
            mine.copy_(theirs[members])
        for mine, theirs in zip(self.buffers(), pool.buffers(), strict=True):
            mine.copy_(theirs)


class Actor(nn.Module):
    """A diagonal Gaussian over u; the action is u, clipped. (B, obs) → mean and log-std of u, each (B, act)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(1, [obs_dim, hidden, hidden, 2 * act_dim])

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs)[0].chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    @torch.no_grad()
    def act(self, obs: np.ndarray, std: float = 0.0) -> np.ndarray:
        """The mean, or with std = 1 a sample, clipped: (B, obs) → (B, act) in [-1, 1]."""
        mean, log_std = self(torch.as_tensor(obs, dtype=torch.float32, device=self.net.mean.device))
        noise = std * log_std.exp() * torch.randn_like(mean) if std else 0.0
        return (mean + noise).clamp(-1, 1).cpu().numpy()

    def file(self) -> dict:
        """How to act from (obs − obs_mean) / obs_std: layers with ReLU between, mean and log-std, clipped."""
        net = copy.deepcopy(self.net).cpu().requires_grad_(False)
        layers = [dict(weight=w[0], bias=b[0, 0]) for w, b in zip(net.weights, net.biases, strict=True)]
        squash = dict(activation="relu", tanh="none", log_std="head", log_std_range=[-5.0, 2.0])
        return dict(layers=layers, obs_mean=net.mean, obs_std=net.std) | squash


class Critic(nn.Module):
    """Twin critics, with layer normalisation or without. (B, obs), (B, act), μ's mean and log-std there → (2, B).

    They see the action as its distance from μ's mean in μ's standard deviations: where the data's actions are nearly
    a function of the state, the action itself says more of the state than of what acting otherwise is worth.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, layer_norm: bool):
        super().__init__()
        self.net = MLP(2, [obs_dim + act_dim, hidden, hidden, 1])
        self.activation = (lambda h: torch.relu_(F.layer_norm(h, h.shape[-1:]))) if layer_norm else torch.relu_

    def forward(self, obs: torch.Tensor, action: torch.Tensor, mu: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        deviation = ((action - mu[0]) * (-mu[1]).exp()).clamp(-5, 5)
        return self.net(torch.cat([obs, deviation], -1), self.activation).squeeze(-1)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column, (N, d) → (d,); of a column that is constant, its own size."""
    size = x.abs().amax(0)
    std = x.double().std(0).to(x.dtype)
    return torch.where(std > 1e-6 * size, std, torch.where(size > 0, size, torch.ones_like(size)))


def adam(net: nn.Module, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW; the rate is a tensor, which a recorded step reads anew."""
    params = list(net.parameters())
    lr = torch.tensor(rate, device=params[0].device)
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True, capturable=lr.is_cuda)


def minimise(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimiser's own parameters; others that the loss depends on stay as they are."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


def follow(net: nn.Module, leader: nn.Module, rate: float | torch.Tensor) -> None:
    """Polyak averaging: net ← (1 − rate) net + rate leader."""
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), leader.parameters(), strict=True):
            mine.lerp_(theirs, rate)


# --- The pool: every model by maximum likelihood on its own bootstrap of the data ---


def empty_pool(args: Args, data: dict[str, torch.Tensor], rule: Callable | None) -> Dynamics:
    sizes = data["observations"].shape[1], data["actions"].shape[1], args.dynamics_hidden, args.dynamics_layers
    return Dynamics(args.pool_size, *sizes, rule).to(data["rewards"].device)


def train_dynamics(args: Args, data: dict[str, torch.Tensor], rule: Callable | None) -> Dynamics:
    """A pool on `data`, columns (n, ...) on the device; each member keeps its epoch with the least held-out error.

    Prints the explained variance of (r, s'), 1 − Var(error) / Var, on rows held out.
    """
    obs, device = data["observations"], data["observations"].device
    inputs = torch.cat([obs, data["actions"]], -1)  # (n, obs+act)
    outputs = torch.cat([data["rewards"][:, None], data["next_observations"] - obs], -1)  # (n, 1+obs)
    pool, known = empty_pool(args, data, rule), data["known"]  # elsewhere s' is a placeholder
    pool.net.mean.copy_(inputs.mean(0))
    pool.net.std.copy_(spread(inputs))
    pool.output_mean.copy_(outputs[known].mean(0))
    pool.output_std.copy_(spread(outputs[known]))
    low, high = data["next_observations"][known].amin(0), data["next_observations"][known].amax(0)
    pool.box.copy_(torch.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)]))
    weight = torch.cat([torch.ones_like(known)[:, None], known[:, None].expand_as(obs)], -1).float()  # (n, 1+obs)

    order = torch.randperm(len(obs), device=device)
    num_held_out = min(len(obs) // 10 + 1, 5000)
    held_out, train = order[:num_held_out], order[num_held_out:]
    held_out = held_out[known[held_out]]
    bootstrap = torch.randint(len(train), (args.pool_size, len(train)), device=device, dtype=torch.int32)
    optimizer = adam(pool.net, args.dynamics_lr, weight_decay=7.5e-5)

    def learn() -> torch.Tensor:
        columns = torch.randint(len(train), (args.pool_size, args.dynamics_batch), device=device)
        rows = train[bootstrap.gather(1, columns).long()]  # (pool, batch)
        mean, log_std, log_odds = pool.standardised(inputs[rows])
        target = (outputs[rows] - pool.output_mean) / pool.output_std
        loss = (weight[rows] * beta_nll(mean, log_std, target)).mean((1, 2)).sum()
        if rule is None:
            ended = data["terminals"][rows].float()
            loss = loss + F.binary_cross_entropy_with_logits(log_odds, ended, reduction="none").mean(1).sum()
        minimise(optimizer, loss)
        return loss.detach()

    @torch.no_grad()
    def held_out_errors() -> torch.Tensor:
        target = (outputs[held_out] - pool.output_mean) / pool.output_std
        return (pool.standardised(inputs[held_out])[0] - target).cpu()  # (pool, held out, 1+obs)

    step, updates = fast(learn, device, args.compile), max(1, len(train) // args.dynamics_batch)  # of a pass
    epochs = args.dynamics_epochs or min(200, max(1, 50_000 // updates))  # few rows need many passes
    best, least = [p.detach().clone() for p in pool.net.parameters()], torch.full((args.pool_size,), math.inf)
    for update in tqdm(range(1, epochs * updates + 1), desc="dynamics", disable=None):
        optimizer.param_groups[0]["lr"].fill_(args.dynamics_lr * cosine(update, epochs * updates))
        step()
        if update % updates == 0:
            error = held_out_errors().square().mean((1, 2))  # (pool,)
            better, least = (error < least).to(device), torch.minimum(error, least)
            for kept, p in zip(best, pool.net.parameters(), strict=True):
                kept.copy_(torch.where(better[:, None, None], p.detach(), kept))
    for kept, p in zip(best, pool.net.parameters(), strict=True):
        p.data.copy_(kept)
    if not least.isfinite().all():
        sys.exit("the dynamics models diverged: lower --dynamics-lr, or look for extreme values in the data")
    variance = ((outputs[held_out] - pool.output_mean) / pool.output_std).cpu().var(0)
    # Of what is constant: the error itself
    variance = torch.where(variance > 1e-6, variance, torch.ones_like(variance))
    explained = 1 - held_out_errors().var(1) / variance  # (pool, 1+obs)
    reward, *state = (f"{100 * x:.1f}%" for x in explained.mean(0).tolist())
    print(f"on held-out rows the models explain {reward} of the reward's variance, the state's {', '.join(state)}")
    return pool.requires_grad_(False)


# --- The algorithm ---


class PSPO(nn.Module):
    """All that policy iteration changes; `data` columns (N, ...) are on the device."""

    METRICS = (
        "critic/loss", "critic/q_data", "critic/q_model", "critic/target_max", "rollout/terminals",
        "posterior/entropy", "posterior/largest", "policy/objective", "policy/kl_behaviour", "policy/kl_previous",
        "policy/eta", "policy/log_std",
    )  # fmt: skip
    GROUP = 32  # rollouts that share a model τ ~ P in a step

    def __init__(self, args: Args, data: dict[str, torch.Tensor], pool: Dynamics):
        super().__init__()
        self.args, self.data, obs = args, data, data["observations"]
        sizes = obs.shape[1], data["actions"].shape[1]
        rollouts = args.batch_size // 2
        self.groups = max(1, rollouts // self.GROUP)
        self.behaviour, self.actor, self.previous, self.average = (Actor(*sizes, args.hidden) for _ in range(4))
        self.critic, self.target_critic = (Critic(*sizes, args.hidden, args.layer_norm) for _ in range(2))
        self.target_critic.load_state_dict(self.critic.state_dict())
        for net in self.children():  # μ, π, π_i, the average of π, Q, Q̄
            net.net.mean[: obs.shape[1]] = obs.mean(0)
            net.net.std[: obs.shape[1]] = spread(obs)
        self.pool = pool
        shape = args.dynamics_hidden, args.dynamics_layers, pool.rule
        self.active, self.sampled = (Dynamics(n, *sizes, *shape) for n in (args.active_models, self.groups))
        for name, value in dict(
            members=torch.arange(args.active_models),  # which of the pool are active
            evidence=torch.ones(args.pool_size), evidence_weight=torch.ones(args.pool_size),  # sums behind Δ
            rollout_obs=obs[torch.randint(len(obs), (rollouts,), device=obs.device)],
            rollout_age=torch.randint(args.rollout_horizon, (rollouts,)),  # so that not all end at once
            log_eta=torch.tensor(0.0), updates=torch.tensor(0),
        ).items():  # fmt: skip
            self.register_buffer(name, value)
        self.to(obs.device)
        frozen = self.behaviour, self.previous, self.average, self.target_critic, self.active, self.sampled, self.pool
        for net in frozen:
            net.requires_grad_(False)
        # Rewards are divided by their range, not shifted: a shift would pay or punish staying alive.
        low, high = data["rewards"].min().item(), data["rewards"].max().item()
        self.reward_scale = (high - low) or abs(high) or 1.0
        steps = 1 / (1 - args.gamma) if args.gamma < 1 else args.rollout_horizon
        self.value_bounds = min(low, 0.0) * steps / self.reward_scale, max(high, 0.0) * steps / self.reward_scale
        self.actor_optimizer = adam(self.actor, args.actor_lr)
        self.critic_optimizer = adam(self.critic, args.critic_lr)
        self.optimizers, self.device = (self.actor_optimizer, self.critic_optimizer), obs.device

    def clone_behaviour(self) -> None:
        """μ by maximum likelihood on the data; π and π_i start there."""
        args, data, optimizer = self.args, self.data, adam(self.behaviour.requires_grad_(True), 5e-3)

        def learn() -> torch.Tensor:
            rows = torch.randint(len(data["actions"]), (args.batch_size,), device=self.device)
            loss = -gaussian_log_prob(data["actions"][rows], *self.behaviour(data["observations"][rows])).mean()
            minimise(optimizer, loss)
            return loss.detach()

        step = fast(learn, self.device, args.compile)
        for update in tqdm(range(1, args.behaviour_updates + 1), desc="behaviour", disable=None):
            optimizer.param_groups[0]["lr"].fill_(5e-3 * cosine(update, args.behaviour_updates))
            step()
        self.behaviour.requires_grad_(False)
        for net in (self.actor, self.previous, self.average):
            net.load_state_dict(self.behaviour.state_dict())

    def redraw(self) -> None:
        """Draw the N active models from the pool, without replacement."""
        self.members.copy_(torch.randperm(self.pool.net.size, device=self.device)[: len(self.members)])
        self.active.load_members(self.pool, self.members)

    def log_belief(self) -> torch.Tensor:
        """Eq. (4): log P over the active models, (N,). The unit of Δ is a tenth of its mean over the models (ours)."""
        evidence = self.evidence[self.members] / self.evidence_weight[self.members]
        return posterior(evidence, 10 * self.args.likelihood_coef)

    def model_targets(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Each active model's y of Eq. (6), its mean reward and one s'': (B, obs), (B, act) → (N, B).

        The same noise for every model, in s'', its end and the actions of V: its part of Δ cancels between models.
        """
        mean, std, log_odds = self.active(obs, action)  # (N, B, 1+obs)
        noise = torch.randn_like(mean[0])
        _, next_obs, terminal = self.active.next(mean, std, log_odds, noise)
        next_value = self.value(next_obs, len(mean))
        return bellman_target(mean[..., 0] / self.reward_scale, terminal, next_value, self.args.gamma)

    def update_belief(self, obs, action, observed_target) -> None:
        """Eq. (3) on observed transitions: (E, obs), (E, act), (E,) → the running averages behind Eq. (4)."""
        delta = model_evidence(self.model_targets(obs, action), observed_target)
        delta = delta / delta.mean().clamp(min=1e-30)  # the critic's scale drifts: average what is relative
        self.evidence[self.members] = 0.98 * self.evidence[self.members] + delta
        self.evidence_weight[self.members] = 0.98 * self.evidence_weight[self.members] + 1

    def value(self, obs: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """V(s) of Eq. (8) by importance sampling from the mixture of μ and π: (..., obs) → (...).

        Samples of μ alone would miss the actions where Q is high; the weights μ / (μ/2 + π/2) of the balance
        heuristic are at most 2. copies: how many parts of the rows share their noise.
        """
        args, shape, obs = self.args, obs.shape[:-1], obs.reshape(-1, obs.shape[-1])
        pi_mean, pi_log_std = self.actor(obs)  # (B, act)
        noise = torch.randn(args.action_samples, len(obs) // copies, pi_mean.shape[-1], device=obs.device)
        noise = noise.repeat(1, copies, 1)  # (M, B, act)
        mu = self.behaviour(obs)
        if args.alpha:
            from_mu, from_pi = noise.chunk(2)
            u = torch.cat([mu[0] + mu[1].exp() * from_mu, pi_mean + pi_log_std.exp() * from_pi])
            log_weights = mixture_log_weights(u, *mu, pi_mean, pi_log_std)
            value = soft_value(self.q_value(self.target_critic, obs, u, mu), log_weights, args.alpha)
        else:  # no μ: the plain policy evaluation of Eq. (5)
            value = self.q_value(self.target_critic, obs, pi_mean + pi_log_std.exp() * noise, mu).mean(0)
        return value.clamp(*self.value_bounds).view(shape)

    def q_value(self, critic: Critic, obs: torch.Tensor, u: torch.Tensor, mu: tuple) -> torch.Tensor:
        """The smaller of the twin critics at action u, clipped: (B, obs), (M, B, act), μ at obs → (M, B)."""
        obs, mean, log_std = (x.repeat(len(u), 1) for x in (obs, *mu))  # (M * B, ...)
        return critic(obs, u.clamp(-1, 1).flatten(0, 1), (mean, log_std)).amin(0).view(u.shape[:2])

    def rollout(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step of all rollouts, each group in a model τ ~ P, Eq. (1): r (B,), s' (B, obs), terminal (B,)."""
        self.sampled.load_members(self.active, sample_models(self.log_belief(), (self.groups,)))
        obs, action = (x.view(self.groups, -1, x.shape[-1]) for x in (self.rollout_obs, action))
        mean, std, log_odds = self.sampled(obs, action)  # (groups, B / groups, 1+obs)
        return tuple(x.flatten(0, 1) for x in self.sampled.next(mean, std, log_odds, torch.randn_like(mean)))

    def evaluate_policy(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Eqs. (3) to (6), (8): a rollout step, the belief, a critic update. Returns states (B, obs), metrics."""
        args, data = self.args, self.data
        rows = torch.randint(len(data["rewards"]), (args.batch_size // 2,), device=self.device)
        obs, action, reward, next_obs, terminal = (data[key][rows] for key in KEYS[:5])
        with torch.no_grad():
            data_target = bellman_target(reward / self.reward_scale, terminal, self.value(next_obs), args.gamma)
            few = slice(args.evidence_rows)
            self.update_belief(obs[few], action[few], data_target[few])
            pi_mean, pi_log_std = self.actor(self.rollout_obs)
            noise = torch.randn_like(pi_mean)
            noise[::2] = 0  # half of the rollouts act by π's mean, which is what is evaluated
            rollout_action = (pi_mean + pi_log_std.exp() * noise).clamp(-1, 1)
            rollout_reward, rollout_next, rollout_end = self.rollout(rollout_action)
            next_value = self.value(rollout_next)
            model_target = bellman_target(rollout_reward / self.reward_scale, rollout_end, next_value, args.gamma)
        obs, action = torch.cat([obs, self.rollout_obs]), torch.cat([action, rollout_action])
        target = torch.cat([data_target, model_target])  # (B,)

        q = self.critic(obs, action, self.behaviour(obs))  # (2, B)
        loss = (q - target).square().mean(1).sum()  # Eq. (6) as a stochastic gradient step of both critics
        minimise(self.critic_optimizer, loss)
        follow(self.target_critic, self.critic, args.target_rate)

        with torch.no_grad():  # rollouts go on from s'; finished, or out of the data, they start again at a state of it
            self.rollout_age.add_(1)
            low, high = self.pool.box
            outside = (((rollout_next <= low) | (rollout_next >= high)) & (low < high)).any(-1)
            restart = rollout_end | outside | (self.rollout_age >= args.rollout_horizon)
            rows = torch.randint(len(data["rewards"]), restart.shape, device=restart.device)
            self.rollout_obs.copy_(torch.where(restart[:, None], data["observations"][rows], rollout_next))
            self.rollout_age.mul_(~restart)
            q_data, q_model, belief = *q.mean(0).chunk(2), self.log_belief()
            entropy = -(belief.exp() * belief).sum()
            metrics = [loss, q_data.mean(), q_model.mean(), target.abs().max(), rollout_end.float().mean()]
            return obs, [*metrics, entropy, belief.max().exp()]

    def improve_policy(self, obs: torch.Tensor) -> list[torch.Tensor]:
        """Eq. (9) at states (B, obs): a stochastic gradient step of π, then of η. Returns metrics."""
        args = self.args
        pi_mean, pi_log_std = self.actor(obs)
        u = pi_mean + pi_log_std.exp() * torch.randn(args.action_samples // 2, *pi_mean.shape, device=obs.device)
        mu = self.behaviour(obs)
        q = self.q_value(self.critic, obs, u, mu)  # (M/2, B)
        kl_behaviour = gaussian_kl(pi_mean, pi_log_std, *mu)
        kl_previous = gaussian_kl(pi_mean, pi_log_std, *self.previous(obs))
        objective = policy_objective(q.mean(0), args.alpha, kl_behaviour, self.log_eta.exp(), kl_previous)
        self.updates.add_(1)  # π is the next π_i once the trust region has had its updates
        follow(self.previous, self.actor, (self.updates % args.trust_region_every == 0).float())
        minimise(self.actor_optimizer, -objective)
        follow(self.average, self.actor, args.average_rate)
        with torch.no_grad():  # dual ascent: η grows while its constraint is violated
            self.log_eta.add_(0.05 * (kl_previous.mean() / args.trust_region - 1).clamp(-1, 1)).clamp_(-6, 6)
            return [objective, kl_behaviour.mean(), kl_previous.mean(), self.log_eta.exp(), pi_log_std.mean()]

    def iterate(self) -> torch.Tensor:
        """One iteration: policy evaluation, policy improvement; returns METRICS, (M,)."""
        obs, metrics = self.evaluate_policy()
        return torch.stack([x.detach() for x in metrics + self.improve_policy(obs)])

    @torch.no_grad()
    def predicted_return(self, obs: torch.Tensor, steps: int) -> torch.Tensor:
        """Undiscounted return of the average policy in the models from states (B, obs), Eq. (1): (B,)."""
        total, alive = torch.zeros_like(obs[:, 0]), torch.ones_like(obs[:, 0])
        rows, belief = torch.arange(len(obs), device=obs.device), self.log_belief()
        for _ in range(steps):
            member = sample_models(belief, (len(obs),))
            mean, std, log_odds = (x[member, rows] for x in self.active(obs, self.average(obs)[0].clamp(-1, 1)))
            reward, obs, terminal = self.active.next(mean, std, log_odds, torch.randn_like(mean))
            total += alive * reward
            alive *= ~terminal
            if not alive.any():
                break
        return total

    @torch.no_grad()
    def start_value(self, obs: torch.Tensor) -> float:
        """The critic's value of the average policy at first states (B, obs), in the data's unit of reward."""
        q = self.q_value(self.critic, obs, self.average(obs)[0][None], self.behaviour(obs))
        return (q.mean() * self.reward_scale).item()

    @torch.no_grad()
    def target_and_uncertainty(self, num_states: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
        """Figure 3: mean and std over P of the models' targets, s from the data, a ~ π: (num_states,) each."""
        obs = self.data["observations"][torch.randint(len(self.data["rewards"]), (num_states,), device=self.device)]
        pi_mean, pi_log_std = self.actor(obs)
        action = (pi_mean + pi_log_std.exp() * torch.randn_like(pi_mean)).clamp(-1, 1)
        target = self.model_targets(obs, action)  # (N, n)
        belief = self.log_belief().exp()[:, None]
        average = (belief * target).sum(0)
        return average.cpu(), (belief * (target - average).square()).sum(0).sqrt().cpu()


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
REFERENCE_RETURNS = {  # Table 4: of scores 0 and 100; a task that is not here is scored by its return
    "liquidation": (0.0, 135.0), "hopper": (-20.27, 3234.3), "walker2d": (1.63, 4592.3),
    "halfcheetah": (-280.18, 12135.0),
}  # fmt: skip
PAPER = {  # Tables 1 and 2
    f"{task}-{level}-v2": ("PSPO's paper", score)
    for task, scores in {
        "hopper": (31.9, 108.5, 116.6, 112.8, 110.0, 112.5),
        "walker2d": (22.1, 103.9, 109.8, 116.1, 97.0, 107.8),
        "halfcheetah": (37.7, 79.3, 93.3, 109.7, 78.4, 94.9),
    }.items()
    for level, score in zip(LEVELS, scores, strict=True)
} | {"liquidation": ("PSPO's paper", 102.3)}

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


def check_rule(rule: Callable, data: Dataset) -> None:
    """The task's rule and the data's terminals must agree: training would be on something else than it seems."""
    ended, told = rule(torch.as_tensor(data.columns["next_observations"])).numpy(), data.columns["terminals"]
    wrong = ((ended != told) & data.columns["known"]).sum()
    if wrong > 0.05 * (ended | told).sum():
        what = f"the task's rule ends {ended.sum():,} rows, the data's terminals {told.sum():,}, {wrong:,} differ"
        why = "normalised observations? terminals and timeouts mixed up? an environment that does not end?"
        sys.exit(f"{data.source}: {what} ({why}): --learn-termination believes the data")


# --- Evaluation and running ---


def normalised_score(returns: np.ndarray, task: str) -> np.ndarray:
    """100 (R − low) / (high − low) with D4RL's reference returns; the return itself for a task without them."""
    low, high = REFERENCE_RETURNS.get(task, (0.0, 100.0))
    return 100 * (returns - low) / (high - low)


def summary(returns: np.ndarray, task: str) -> dict[str, float]:
    """Means of (n,) returns and of their scores, each with the half-width of its normal 95% interval."""
    out = {"episodes": len(returns)}
    for name, x in {"score": normalised_score(returns, task), "return": returns}.items():
        out |= {name: float(x.mean()), f"{name}_ci95": float(1.96 * x.std(ddof=1) / math.sqrt(len(x)))}
    return out


def evaluate(act: Callable, env: gym.Env, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """First observations (n, obs) and returns (n,) of n episodes: the first of each copy after reset(seed).

    act: (n, obs) → (n, act) in [-1, 1]. An environment without a time limit is cut at 1,000 steps.
    """
    mode = "sync" if env.spec.additional_wrappers else None  # an environment's own vectorised form takes none
    envs = gym.make_vec(env.spec, num_envs=episodes, vectorization_mode=mode)
    obs, _ = envs.reset(seed=seed)
    first, returns, alive = obs.copy(), np.zeros(episodes), np.ones(episodes, bool)
    for _ in range(env.spec.max_episode_steps or 1000):
        obs, reward, terminated, truncated, _ = envs.step(act(obs))
        returns += alive * reward
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    envs.close()
    return first, returns


def fast(step: Callable[[], torch.Tensor], device: torch.device, compiled: bool) -> Callable[[], torch.Tensor]:
    """`step` as a long loop should call it: compiled with --compile; on a GPU recorded, all kernels in one launch.

    A recorded step replays on the tensors it has seen, so `step` takes no arguments, keeps its state in place, draws
    random numbers on the device and returns one tensor. Its first three calls run as they are: CUDA's warm-up.
    """
    if compiled:
        step = torch.compile(step, options={"fallback_random": True})  # eager mode's random numbers
    if device.type != "cuda":
        return step
    graph, stream, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None

    def recorded() -> torch.Tensor:
        nonlocal calls, result
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = step()
            torch.cuda.current_stream().wait_stream(stream)
            return out
        if calls == 4:
            with torch.cuda.graph(graph, stream=stream):
                result = step()
        graph.replay()
        return result.clone()

    return recorded


def save(content: dict, path: Path) -> None:
    """torch.save, whole or not at all: a kill leaves the file that was there."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def checkpoint(learner: nn.Module, data: Dataset, rows: list[dict]) -> dict:
    """All that a run has changed."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
    optimizers = [optimizer.state_dict() for optimizer in learner.optimizers]
    return dict(learner=learner.state_dict(), optimizers=optimizers, rng=rng, rows=rows, sha256=data.sha256)


def restore(run_dir: Path, learner: nn.Module, data: Dataset) -> dict:
    """Put the run's checkpoint back; returns it."""
    saved = torch.load(run_dir / "checkpoint.pt", map_location=learner.device, weights_only=True)
    if saved["sha256"] != data.sha256:
        sys.exit(f"{data.source} has other data (by SHA-256) than {run_dir}: --dataset-path names the right file")
    learner.load_state_dict(saved["learner"])
    for optimizer, state in zip(learner.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["capturable"] = learner.device.type == "cuda"  # the run may have been on another device
    torch.set_rng_state(saved["rng"][0].cpu())
    if len(saved["rng"]) > 1 and learner.device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng"][1].cpu())
    return saved


def write_log(rows: list[dict], run_dir: Path, writer: SummaryWriter) -> None:
    """metrics.csv anew, the last row to TensorBoard, and a line to read, in a terminal or not."""
    with open(run_dir / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[-1])
        table.writeheader()
        table.writerows(rows)
    for key, value in rows[-1].items():
        writer.add_scalar(key, value, rows[-1]["iteration"])
    writer.flush()
    shown = [f"{key.split('/')[1]} {value:.4g}" for key, value in rows[-1].items() if key.startswith("eval/")]
    tqdm.write(f"iteration {rows[-1]['iteration']:,}: {', '.join(shown) or 'saved'}")
    sys.stdout.flush()


def parse() -> Args:
    """The command line, twice: for what decides the defaults, then with them, so that --help shows what will run."""
    words, about = [word for word in sys.argv[1:] if word not in ("-h", "--help")], __doc__.split("\n\n")[0]
    first = tyro.cli(Args, args=words)
    if not first.resume:
        quick = QUICK if first.quick and first.env_id != "liquidation" else {}
        settings = SETTINGS.get(task_of(first.env_id), {}) | quick
        return tyro.cli(Args, description=about, default=replace(Args(), **settings))
    if not (Path(first.resume).expanduser() / "checkpoint.pt").exists():
        sys.exit(f"no checkpoint.pt in {first.resume}: nothing is saved before the first evaluation; start anew")
    saved = json.loads((Path(first.resume).expanduser() / "args.json").read_text())
    if saved.keys() != vars(first).keys():
        sys.exit(f"{first.resume} is a run of another script or version: go on with the one that made it")
    saved = Args(**saved)
    args = tyro.cli(Args, description=about, default=saved)
    for name, value in vars(saved).items():
        if vars(args)[name] != value and name not in HOW:
            sys.exit(f"--{name.replace('_', '-')}: {first.resume} has {value}; leave the flag out, or start anew")
    return args


def load(args: Args) -> tuple[torch.device, Dataset, gym.Env | None]:
    """Device, data, environment. What can be wrong in a first hour ends here, in one line."""
    if args.env_id == "liquidation" and find_spec("liquidation_env") is None:
        sys.exit("the default task needs liquidation_env.py beside this file; others: --env-id and --dataset-path")
    if args.track and find_spec("wandb") is None:
        sys.exit("--track needs Weights & Biases: pip install wandb")
    if args.final_episodes < 2 or (args.gamma >= 1 and task_of(args.env_id) != "liquidation"):
        sys.exit("--final-episodes must be at least 2, for an interval; --gamma below 1, where there is no horizon")
    least = min(args.iterations, args.eval_every, args.hidden, args.batch_size, args.dataset_episodes)
    if least < 1 or min(args.eval_episodes, args.num_threads) < 0:
        names = "--iterations, --eval-every, --hidden, --batch-size, --dataset-episodes"
        sys.exit(f"{names} must be at least 1, --eval-episodes and --num-threads 0")
    torch.set_num_threads(args.num_threads or os.cpu_count())
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    try:
        arrays, source, spec = load_arrays(args)
        env = make_env(args, spec)
        data = make_dataset(arrays, source, env)
        data.notes += doubts(data, env, args, spec)
    except Exception as error:  # of a file, a network, somebody's environment: there is no end of kinds
        names = " ".join(filter(None, (args.env_id, args.dataset_path, args.eval_env_id)))
        remedy = "--dataset-path takes an HDF5 file in D4RL's layout or a Minari folder; --eval-env-id names another "
        remedy += "environment, --eval-episodes 0 trains without one"
        sys.exit(f"{names}: {type(error).__name__}: {error} ({remedy})".replace("\n", " "))
    size, returns = f"{len(data.columns['rewards']):,} rows", data.returns
    if len(returns):
        size += f", {len(returns):,} episodes, return {returns.mean():.1f} ({returns.min():.1f} to {returns.max():.1f})"
    print(f"data: {args.env_id}, {data.source}: {size}")
    print(*[f"note: {note}\n" for note in data.notes], sep="", end="")
    return device, data, env


def open_run(args: Args) -> Path:
    """The run's folder, a new one or --resume's; --track begins."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.resume or Path(args.runs_dir) / name.replace("/", "_").replace(":", "_")).expanduser()
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))

    if args.track:
        import wandb

        wandb.init(id=run_dir.name, resume="allow", config=vars(args), sync_tensorboard=True)
    print(f"run folder: {run_dir} (--resume goes on with it after a stop)", flush=True)
    return run_dir


def report(
    args: Args, data: Dataset, env: gym.Env | None, act: Callable, result: dict, run_dir: Path, begun: float
) -> dict:
    """Evaluate the final policy, say what its score compares with, write result.json; returns those other scores."""
    task, others = task_of(args.env_id), {}
    result |= dict(env_id=args.env_id, dataset=data.source, sha256=data.sha256, notes=data.notes, args=vars(args))
    if len(data.returns):
        others["behaviour in the data"] = float(normalised_score(data.returns, task).mean())
    if args.env_id in PAPER:
        others[PAPER[args.env_id][0]] = PAPER[args.env_id][1]
    if env is not None:
        returns = evaluate(act, env, args.final_episodes, args.seed + 20_000)[1]
        result |= summary(returns, task)
        what = "score" if task in REFERENCE_RETURNS else "no reference scores, so its return:"
        print(f"{args.env_id}: {what} {result['score']:.1f} ± {result['score_ci95']:.1f}, ", end="")
        print(f"return {result['return']:.1f} ± {result['return_ci95']:.1f} of {len(returns)} episodes (95% interval)")
        if env.spec.id == "Liquidation-v0" and not env.spec.kwargs:  # the default market
            result |= liquidation_env.compare(returns, args.seed + 20_000)
            others["exact optimum"] = float(normalised_score(np.array(result["optimum"]), task))
            share, ci = 100 * result["share_of_optimum"], 100 * result["share_of_optimum_ci95"]
            print(f"{share:.2f} ± {ci:.2f}% of the exact optimum {result['optimum']:.2f}, on the same price paths")
    if others:
        print("beside it:", ", ".join(f"{name} {score:.1f}" for name, score in others.items()))
    result |= dict(compared_with=others, minutes=(time.monotonic() - begun) / 60)
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['minutes']:.1f} minutes; result.json, actor.pt, metrics.csv and figure.png are in {run_dir}")
    return others


def plot(path: Path, args: Args, data: Dataset, learner: PSPO, rows: list[dict], others: dict[str, float]) -> None:
    """Learning curve; predicted and real return (Figure 2); target and uncertainty (Figure 3); where it sells."""
    liquidation = args.env_id == "liquidation"
    figure = Figure(figsize=(4.4 * (3 + liquidation), 3.8), layout="constrained")
    axes = figure.subplots(1, 3 + liquidation)
    x = [row["iteration"] for row in rows]
    if "eval/score" in rows[-1]:
        axes[0].plot(x, [row["eval/score"] for row in rows], "o-", ms=3, label="PSPO")
        for key, label in {"predicted_return": "predicted by the models", "return": "in the environment"}.items():
            axes[1].plot(x, [row[f"eval/{key}"] for row in rows], "o-", ms=3, label=label)
        axes[1].legend(fontsize=7)
    for (name, score), style in zip(others.items(), (":", "--", "-"), strict=False):
        axes[0].axhline(score, color="k", ls=style, lw=1, label=f"{name} {score:.1f}")
    axes[0].set(xlabel="iteration", ylabel="score", title=f"{args.env_id}\n{data.source}")
    axes[1].set(xlabel="iteration", ylabel="return", title="Predicted and real return (Figure 2)")
    target, uncertainty = learner.target_and_uncertainty()
    axes[2].scatter(uncertainty, target, s=4, alpha=0.4, linewidths=0)
    axes[2].set(xlabel="standard deviation over models", ylabel="target (reward ranges)", title="Figure 3")
    if liquidation:
        liquidation_env.draw_boundary(axes[3], learner.average.act, args.gamma)
    for ax in axes[:3]:
        ax.locator_params("x", nbins=5)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    args, begun = parse(), time.monotonic()
    if not 1 <= args.active_models <= args.pool_size:
        sys.exit(f"--active-models {args.active_models}: the pool has 1 to {args.pool_size}")
    if args.batch_size % 64 or args.action_samples % 2:
        sys.exit("--batch-size must be a multiple of 64 (two halves, 32 rows to a model), --action-samples be even")
    slow = args.pool_size * args.dynamics_epochs > 5000 and not args.resume
    if slow and args.cuda and not torch.cuda.is_available():
        sys.exit("no GPU here, and this setting takes weeks on a CPU: add --quick (--no-cuda starts it anyway)")
    task = task_of(args.env_id)
    rule = None if args.learn_termination else TERMINAL.get(task)
    device, data, env = load(args)
    if rule is not None:
        check_rule(rule, data)
    run_dir = open_run(args)
    columns = {key: torch.as_tensor(data.columns[key], device=device) for key in (*KEYS[:5], "known")}
    torch.manual_seed(args.seed)
    if args.resume:
        learner = PSPO(args, columns, empty_pool(args, columns, rule))
        saved = restore(run_dir, learner, data)
        rows, begun = saved["rows"], begun - saved["seconds"]
    else:
        learner, rows = PSPO(args, columns, train_dynamics(args, columns, rule)), []
        learner.clone_behaviour()
        learner.redraw()
    (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": ""}, indent=2) + "\n")
    done = rows[-1]["iteration"] if rows else 0
    writer = SummaryWriter(str(run_dir), purge_step=done + 1)

    iterate, total, sums = fast(learner.iterate, device, args.compile), args.iterations, 0
    for iteration in tqdm(range(done + 1, total + 1), initial=done, total=total, disable=None):
        if iteration % 1000 == 0 and args.active_models < args.pool_size:
            learner.redraw()
        for optimizer, rate in zip(learner.optimizers, (args.actor_lr, args.critic_lr), strict=True):
            optimizer.param_groups[0]["lr"].fill_(rate * cosine(iteration, total))  # η_t of Eq. (6)
        sums = sums + iterate()
        if iteration % args.eval_every and iteration != total:
            continue
        means = sums / (iteration - (rows[-1]["iteration"] if rows else 0))
        row = {"iteration": iteration} | dict(zip(PSPO.METRICS, means.tolist(), strict=True))
        finite = all(map(math.isfinite, row.values())) and all(x.isfinite().all() for x in learner.parameters())
        if not finite:
            sys.exit(f"iteration {iteration}: not finite any more: lower --critic-lr or --actor-lr")
        if env is not None:
            first, returns = evaluate(learner.average.act, env, args.eval_episodes, args.seed + 10_000)
            first = torch.as_tensor(first[:1000], dtype=torch.float32, device=device)
            predicted = learner.predicted_return(first, env.spec.max_episode_steps or 1000)
            row |= {"eval/score": float(normalised_score(returns, task).mean()), "eval/return": float(returns.mean())}
            row |= {"eval/predicted_return": predicted.mean().item(), "eval/start_value": learner.start_value(first)}
        rows.append(row)
        sums = 0
        write_log(rows, run_dir, writer)
        save(checkpoint(learner, data, rows) | dict(seconds=time.monotonic() - begun), run_dir / "checkpoint.pt")

    about = dict(script=Path(__file__).stem, env_id=args.env_id)  # docs/your_own.md has the lines that play it
    about |= dict(action_low=torch.as_tensor(data.low), action_high=torch.as_tensor(data.high))
    save(about | learner.average.file(), run_dir / "actor.pt")
    result = {}
    if env is not None:
        acts = dict(sampled=lambda obs: learner.average.act(obs, std=1.0), clone=learner.behaviour.act)
        for name, act in acts.items():
            result[name] = summary(evaluate(act, env, args.final_episodes, args.seed + 20_000)[1], task)
        scores = ", ".join(f"{result[name]['score']:.1f}" for name in acts)
        print(f"sampled actions, μ: {scores}")
    others = report(args, data, env, learner.average.act, result, run_dir, begun)
    plot(run_dir / "figure.png", args, data, learner, rows, others)


if __name__ == "__main__":
    main()
