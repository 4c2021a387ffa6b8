# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "minari[hdf5,hf]==0.5.4",
#     "h5py==3.16.0", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Implicit Q-Learning (IQL): offline reinforcement learning, and fine-tuning online.

Paper: "Offline Reinforcement Learning with Implicit Q-Learning", arXiv 2110.06169; the equation numbers are its own.
No value is ever asked of an action outside the data: V(s) is an upper expectile of Q(s, a) over the data's actions.

    V  value     Q, Q̄  twin critics, target critics (the smaller of two)     π(a | s)  policy     γ  discount
    τ  expectile     β  inverse temperature     D  the data set

    (5)  L_V = E_D[ L₂^τ(Q̄(s, a) − V(s)) ],   L₂^τ(u) = |τ − 1(u < 0)| u²
    (6)  L_Q = E_D[ (r + γ V(s') − Q(s, a))² ]
    (7)  L_π = −E_D[ min(exp(β (Q̄(s, a) − V(s))), 100) log π(a | s) ]

Run it (minutes of one CPU core):
    python iql.py                                                    # liquidation, generated data: 3 minutes
    python iql.py --env-id hopper-medium-v2 --quick                  # 50,000 updates: 10 minutes
    python iql.py --env-id hopper-medium-v2 --compile                # the paper's million updates: hours
    python iql.py --env-id D4RL/door/human-v2                        # a Minari id
    python iql.py --env-id Pendulum-v1 --dataset-path pendulum.hdf5  # any Gymnasium environment, its data
    python iql.py --online-steps 20000                               # fine-tuned online afterwards
    python iql.py --resume runs/<run folder>                         # goes on from the last evaluation
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if find_spec("liquidation_env"):  # this file alone does without
    import liquidation_env


@dataclass
class Args:
    """The values are the official code's for MuJoCo's locomotion tasks; SETTINGS has what other tasks change."""

    env_id: str = "liquidation"  # liquidation, a D4RL name, a Minari id, or any Gymnasium id with --dataset-path
    dataset_path: str = ""  # HDF5 file in D4RL's layout, or a Minari folder, instead of the data that --env-id names
    eval_env_id: str = ""  # Gymnasium id to evaluate in, if not the one that --env-id implies
    dataset_episodes: int = 10_000  # liquidation: episodes of behaviour data to generate
    quick: bool = False  # 50,000 updates, which a CPU does in minutes; liquidation takes fewer
    seed: int = 1  # of every random generator
    # Equations (5) to (7)
    expectile: float = 0.7  # τ: 0.5 is the behaviour's mean value, towards 1 the best value in the data
    beta: float = 3.0  # β: 0 clones the behaviour, large values pick its best actions
    weight_clip: float = 100.0  # largest weight of Eq. (7)
    gamma: float = 0.99  # γ
    reward: Literal["return_range", "minus_one", "raw"] = "return_range"  # learn r·1000/(range of returns), r − 1 or r
    dropout: float = 0.0  # in the policy's hidden layers, while training
    normalize_observations: bool = False  # networks see (s − mean) / std of the data (CORL does; the paper does not)
    iterations: int = 1_000_000  # offline updates
    batch_size: int = 256  # rows per update
    hidden: int = 256  # units in each of two hidden layers
    actor_lr: float = 3e-4  # cosine to zero over --iterations; constant with --online-steps
    critic_lr: float = 3e-4  # of V and Q
    target_rate: float = 0.005  # Polyak rate of Q̄
    online_steps: int = 0  # steps in the environment after the offline phase, one update each
    # Evaluation and running
    eval_every: int = 5_000  # updates between evaluations, which are also the checkpoints
    eval_episodes: int = 10  # of each; 0 trains and saves without an environment
    final_episodes: int = 100  # of the reported score (ours; the paper takes the last evaluation)
    runs_dir: str = "runs"  # the run's folder is made in here
    resume: str = ""  # run folder to go on with; of other flags only those after this one, and a moved --dataset-path
    num_threads: int = 1  # CPU threads (0: all cores)
    cuda: bool = True  # use a GPU if there is one
    compile: bool = False  # torch.compile the update (needs a C++ compiler): a fifth faster, a minute to start
    track: bool = False  # also log to Weights & Biases (into the project $WANDB_PROJECT)


MAZES = dict(expectile=0.9, beta=10.0, reward="minus_one", eval_every=100_000, eval_episodes=100)  # paper's AntMaze
HANDS = dict(beta=0.5, dropout=0.1, reward="raw")  # paper: Kitchen and Adroit
SETTINGS = {
    "liquidation": dict(  # ours: 20 steps need no discount
        gamma=1.0, iterations=10_000, eval_every=1_000, eval_episodes=2_000, final_episodes=10_000
    ),
    "antmaze": MAZES, "pointmaze": MAZES,
    **dict.fromkeys(("kitchen", "pen", "hammer", "relocate", "door"), HANDS),
}  # fmt: skip
QUICK = dict(iterations=50_000, eval_every=5_000)
HOW = ("resume", "dataset_path", "num_threads", "cuda", "compile", "track")  # may change on --resume


# --- Equations ---


def expectile_loss(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """Eq. (5): L₂^τ(u) = |τ − 1(u < 0)| u², elementwise; u = Q̄(s, a) − V(s). Its minimiser is the τ-expectile."""
    return torch.where(difference < 0, 1 - expectile, expectile) * difference.square()


def bellman_target(reward, terminal, next_value, gamma: float) -> torch.Tensor:
    """y of Eq. (6): r + γ V(s'), and r alone where the episode ends; any shape."""
    return reward + gamma * next_value.masked_fill(terminal, 0.0)


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. (6): squared error to y, mean over rows, summed over the twins: (2, B), (B,) → scalar."""
    return (q - target).square().mean(1).sum()


def advantage_weights(advantage: torch.Tensor, beta: float, clip: float) -> torch.Tensor:
    """Eq. (7): min(exp(β A), clip), elementwise; A = Q̄(s, a) − V(s)."""
    return (beta * advantage).exp().clamp(max=clip)


def policy_loss(log_prob: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. (7): −E[ w log π(a | s) ], maximum likelihood with weights: (B,), (B,) → scalar."""
    return -(weights * log_prob).mean()


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag exp(2 log_std)), (..., act) → (...)."""
    return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def cosine(update: int, updates: int) -> float:
    """A learning rate in update 1, 2, … as a share of the first: 1 falling to 0."""
    return 0.5 * (1 + math.cos(math.pi * (update - 1) / updates))


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


def orthogonal(net: MLP) -> MLP:
    """The official code's initial weights: orthogonal, gain √2, the last layer's too; biases 0."""
    for weight in itertools.chain(*net.weights):
        nn.init.orthogonal_(weight, math.sqrt(2))
    for bias in net.biases:
        nn.init.zeros_(bias)
    return net


class Actor(nn.Module):
    """A diagonal Gaussian, not squashed, its std the same in every state. (B, obs) → mean (B, act), log-std (act,)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = orthogonal(MLP(1, [obs_dim, hidden, hidden, act_dim]))
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.net(obs, lambda x: F.dropout(F.relu(x), dropout))[0].tanh()
        return mean, self.log_std.clamp(-5, 2)

    @torch.no_grad()
    def act(self, obs: np.ndarray, std: float = 0.0) -> np.ndarray:
        """The mean, or with std = 1 a clipped sample: (B, obs) → (B, act) in [-1, 1]."""
        mean, log_std = self(torch.as_tensor(obs, dtype=torch.float32, device=self.log_std.device))
        noise = std * log_std.exp() * torch.randn_like(mean) if std else 0.0
        return (mean + noise).clamp(-1, 1).cpu().numpy()

    def file(self) -> dict:
        """How to act from (obs − obs_mean) / obs_std: layers with ReLU between, tanh on the mean."""
        net = copy.deepcopy(self.net).cpu().requires_grad_(False)
        layers = [dict(weight=w[0], bias=b[0, 0]) for w, b in zip(net.weights, net.biases, strict=True)]
        squash = dict(activation="relu", tanh="mean", log_std=self.log_std.detach().cpu(), log_std_range=[-5.0, 2.0])
        return dict(layers=layers, obs_mean=net.mean, obs_std=net.std) | squash


class Critic(nn.Module):
    """Twin critics. (B, obs), (B, act) → (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = orthogonal(MLP(2, [obs_dim + act_dim, hidden, hidden, 1]))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)


class Value(nn.Module):
    """(B, obs) → (B,)."""

    def __init__(self, obs_dim: int, hidden: int):
        super().__init__()
        self.net = orthogonal(MLP(1, [obs_dim, hidden, hidden, 1]))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs)[0].squeeze(-1)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column, (N, d) → (d,); of a column that is constant, its own size."""
    size = x.abs().amax(0)
    std = x.double().std(0).to(x.dtype)
    return torch.where(std > 1e-6 * size, std, torch.where(size > 0, size, torch.ones_like(size)))


def adam(*groups: tuple[nn.Module, float]) -> torch.optim.Optimizer:
    """Adam for (network, learning rate) pairs; the rates are tensors, which a recorded step reads anew."""
    groups = [(list(net.parameters()), rate) for net, rate in groups]
    groups = [dict(params=params, lr=torch.tensor(rate, device=params[0].device)) for params, rate in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=groups[0]["lr"].is_cuda)


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


# --- The algorithm ---


class IQL(nn.Module):
    """Networks, optimisers and transitions; `data` columns (N, ...) are on the device, rewards transformed."""

    METRICS = (
        "value/loss", "value/v", "critic/loss", "critic/q", "policy/loss", "policy/log_prob", "policy/log_std",
        "policy/advantage", "policy/weight", "policy/clipped",
    )  # fmt: skip

    def __init__(self, args: Args, data: dict[str, torch.Tensor]):
        super().__init__()
        self.args, obs, act_dim = args, data["observations"], data["actions"].shape[1]
        room = args.online_steps  # for the rows to come: the first `size` count
        self.data = {key: torch.cat([x, x.new_zeros(room, *x.shape[1:])]) for key, x in data.items()}
        self.data["actions"].clamp_(-1 + 1e-5, 1 - 1e-5)  # official
        self.value = Value(obs.shape[1], args.hidden)
        self.actor = Actor(obs.shape[1], act_dim, args.hidden)
        self.critic, self.target_critic = (Critic(obs.shape[1], act_dim, args.hidden) for _ in range(2))
        if args.normalize_observations:
            for net in (self.value.net, self.actor.net, self.critic.net):
                net.mean[: obs.shape[1]] = obs.mean(0)
                net.std[: obs.shape[1]] = spread(obs)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("size", torch.tensor(len(obs)))
        self.to(obs.device)
        self.value_optimizer = adam((self.value, args.critic_lr))
        self.actor_critic_optimizer = adam((self.actor, args.actor_lr), (self.critic, args.critic_lr))
        self.optimizers, self.device = (self.value_optimizer, self.actor_critic_optimizer), obs.device

    def add(self, obs, action, reward: float, next_obs, terminal: bool) -> None:
        """Append one transition, its reward transformed; a time limit is no terminal."""
        for column, x in zip(self.data.values(), (obs, action, reward, next_obs, terminal), strict=True):
            column[self.size] = torch.as_tensor(x, dtype=column.dtype, device=column.device)
        self.data["actions"][self.size].clamp_(-1 + 1e-5, 1 - 1e-5)
        self.size += 1

    def update(self) -> torch.Tensor:
        """One random batch in the official order V → π → Q → Q̄; returns METRICS, (M,)."""
        args = self.args
        rows = (torch.rand(args.batch_size, dtype=torch.float64, device=self.device) * self.size).long()
        obs, action, reward, next_obs, terminal = (column[rows] for column in self.data.values())  # (B, ...)

        # Eq. (5): V towards the upper expectile of Q̄ over the data's actions
        with torch.no_grad():
            target_q = self.target_critic(obs, action).amin(0)  # (B,)
        value_loss = expectile_loss(target_q - self.value(obs), args.expectile).mean()
        minimise(self.value_optimizer, value_loss)

        # Eqs. (7) and (6) share no parameter and use the new V: one backward pass and one Adam step do both
        with torch.no_grad():
            v, next_v = self.value(torch.cat([obs, next_obs])).chunk(2)
            advantage = target_q - v
            weights = advantage_weights(advantage, args.beta, args.weight_clip)
            target = bellman_target(reward, terminal, next_v, args.gamma)
        mean, log_std = self.actor(obs, args.dropout)
        log_prob = gaussian_log_prob(action, mean, log_std)
        actor_loss = policy_loss(log_prob, weights)
        q = self.critic(obs, action)  # (2, B)
        q_loss = critic_loss(q, target)
        minimise(self.actor_critic_optimizer, actor_loss + q_loss)

        follow(self.target_critic, self.critic, args.target_rate)
        with torch.no_grad():
            return torch.stack([
                value_loss, v.mean(), q_loss, q.mean(), actor_loss, log_prob.mean(), log_std.mean(),
                advantage.mean(), weights.mean(), (weights >= args.weight_clip).float().mean(),
            ])  # fmt: skip


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
D4RL |= {
    f"{task}-{kind}-v1": (f"hand_dapg_v1/{task}-{kind}-v1.hdf5", digits)
    for task, column in {
        "pen": "209e345b 6d1a982c 3791b8ca",
        "door": "f9691288 1f6a60ec 66df4cd4",
        "hammer": "3e42f3f4 e48d75b1 1c069a0f",
    }.items()
    for kind, digits in zip(("human", "cloned", "expert"), column.split(), strict=True)
} | {
    f"antmaze-{task}-v2": (f"ant_maze_v2/Ant_maze_{maze}_sparse_fixed.hdf5", digits)
    for task, maze, digits in (
        ("umaze", "u-maze_noisy_multistart_False_multigoal_False", "5ef15257"),
        ("umaze-diverse", "u-maze_noisy_multistart_True_multigoal_True", "c771dd63"),
        ("medium-play", "big-maze_noisy_multistart_True_multigoal_False", ""),  # in no table of checksums
        ("medium-diverse", "big-maze_noisy_multistart_True_multigoal_True", "ad9dcbac"),
        ("large-play", "hardest-maze_noisy_multistart_True_multigoal_False", "6d353df2"),
        ("large-diverse", "hardest-maze_noisy_multistart_True_multigoal_True", "84f775eb"),
    )
}
ENVS = {  # where a D4RL task is evaluated
    "liquidation": "liquidation_env:Liquidation-v0",
    "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4",
    "pen": "gymnasium_robotics:AdroitHandPen-v1", "hammer": "gymnasium_robotics:AdroitHandHammer-v1",
    "door": "gymnasium_robotics:AdroitHandDoor-v1", "relocate": "gymnasium_robotics:AdroitHandRelocate-v1",
}  # fmt: skip
REFERENCE_RETURNS = {  # of scores 0 and 100; a task that is not here is scored by its return
    "liquidation": (0.0, 135.0), "hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0), "antmaze": (0.0, 1.0), "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.833102), "hammer": (-274.856578, 12794.134825),
    "relocate": (-6.425911, 4233.877798), "door": (-56.512833, 2880.569309),
}  # fmt: skip
PAPER = {  # Table 1
    f"{task}-{level}-v2": ("IQL's paper", score)
    for task, scores in {
        "hopper": (66.3, 94.7, 91.5),
        "walker2d": (78.3, 73.9, 109.6),
        "halfcheetah": (47.4, 44.2, 86.7),
    }.items()
    for level, score in zip(("medium", "medium-replay", "medium-expert"), scores, strict=True)
} | {"liquidation": ("IQL in PSPO's paper (its own has no such task)", 0.0)}

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


def reward_scale(kind: str, returns: np.ndarray) -> tuple[float, float]:
    """(scale, shift): what is learnt from is scale · r + shift, of the data's rewards and of those met online."""
    if kind == "return_range" and len(returns) and returns.max() > returns.min():
        return float(1000 / (returns.max() - returns.min())), 0.0  # so that the returns of the data span 1000
    if kind == "return_range":
        print("note: there is no range of episode returns to scale the rewards by: they are learnt from as they are")
    return 1.0, -1.0 if kind == "minus_one" else 0.0


def plot(path: Path, args: Args, data: Dataset, learner: IQL, rows: list[dict], others: dict[str, float]) -> None:
    """Learning curve; advantages in the data; V against the data's discounted returns; where liquidation sells."""
    liquidation = args.env_id == "liquidation"
    figure = Figure(figsize=(4.4 * (3 + liquidation), 3.8), layout="constrained")
    axes = figure.subplots(1, 3 + liquidation)
    if "eval/score" in rows[-1]:
        axes[0].plot([row["iteration"] for row in rows], [row["eval/score"] for row in rows], "o-", ms=3, label="IQL")
    for (name, score), style in zip(others.items(), (":", "--", "-"), strict=False):
        axes[0].axhline(score, color="k", ls=style, lw=1, label=f"{name} {score:.1f}")
    if args.online_steps:
        axes[0].axvline(args.iterations, color="0.7", label="online from here")
    axes[0].set(xlabel="iteration", ylabel="score", title=f"{args.env_id}\n{data.source}")
    ends, reward = np.flatnonzero(data.columns["ends"])[:2000] + 1, learner.data["rewards"].cpu().numpy()
    starts = np.append(0, ends[:-1])
    returns = [reward[i:j] @ args.gamma ** np.arange(j - i) for i, j in zip(starts, ends, strict=True)]
    with torch.no_grad():
        obs, action = (learner.data[key][: learner.size][:5000] for key in ("observations", "actions"))
        advantage = (learner.target_critic(obs, action).amin(0) - learner.value(obs)).cpu()
        value = learner.value(learner.data["observations"][starts]).cpu()
    axes[1].hist(advantage, bins=80, log=True)
    axes[1].set(xlabel="advantage Q̄ − V", ylabel="rows", title="Advantages in the data")
    axes[2].scatter(returns, value, s=4, alpha=0.4, linewidths=0)
    axes[2].axline((np.mean(returns), np.mean(returns)), slope=1, color="k", lw=1)
    axes[2].set(xlabel="discounted return of the episode", ylabel="V(s₀)", title="Value of the data's first states")
    if liquidation:
        liquidation_env.draw_boundary(axes[3], learner.actor.act, args.gamma)
    for ax in axes[:3]:
        ax.locator_params("x", nbins=5)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    args, begun = parse(), time.monotonic()
    device, data, env = load(args)
    task, limit = task_of(args.env_id), (env.spec.max_episode_steps or 1000) if env else 0
    if args.online_steps and not 0 < limit <= args.eval_every:
        what = f"an --eval-every of at least its {limit} steps an episode (1000 if none are registered)"
        sys.exit(f"--online-steps needs {what if env else 'an environment: --eval-episodes above 0'}")
    run_dir = open_run(args)
    scale, shift = reward_scale(args.reward, data.returns)
    columns = {key: torch.as_tensor(data.columns[key], device=device) for key in KEYS[:5]}
    columns["rewards"] = scale * columns["rewards"] + shift
    torch.manual_seed(args.seed)
    learner, rows, offline = IQL(args, columns), [], None
    if args.resume:
        saved = restore(run_dir, learner, data)
        rows, offline, begun = saved["rows"], saved["offline"], begun - saved["seconds"]
        for key, column in saved["online"].items():
            learner.data[key][len(columns[key]) : learner.size] = column
    (run_dir / "args.json").write_text(json.dumps(vars(args) | {"resume": ""}, indent=2) + "\n")
    done = rows[-1]["iteration"] if rows else 0
    writer = SummaryWriter(str(run_dir), purge_step=done + 1)

    # Offline updates, then online steps with one update each
    step, total, sums, obs = fast(learner.update, device, args.compile), args.iterations + args.online_steps, 0, None
    for iteration in tqdm(range(done + 1, total + 1), initial=done, total=total, disable=None):
        if iteration > args.iterations:
            if obs is None:  # after an evaluation; with a seed of its own, so that a resumed run meets the same
                obs, age = env.reset(seed=args.seed + 30_000 + iteration)[0], 0
            action = learner.actor.act(obs[None], std=1.0)[0]
            next_obs, reward, terminated, truncated, _ = env.step(action)
            learner.add(obs, action, scale * reward + shift, next_obs, terminated)
            obs, age = next_obs, age + 1
            if terminated or truncated or age == limit:
                obs, age = env.reset()[0], 0
        if not args.online_steps:
            learner.actor_critic_optimizer.param_groups[0]["lr"].fill_(args.actor_lr * cosine(iteration, total))
        sums = sums + step()
        if iteration % args.eval_every and iteration not in (args.iterations, total):
            continue
        means = sums / (iteration - (rows[-1]["iteration"] if rows else 0))
        row = {"iteration": iteration} | dict(zip(IQL.METRICS, means.tolist(), strict=True))
        finite = all(map(math.isfinite, row.values())) and all(x.isfinite().all() for x in learner.parameters())
        if not finite:
            sys.exit(f"iteration {iteration}: not finite any more: lower --critic-lr, --actor-lr or --beta")
        if env is not None:
            returns = evaluate(learner.actor.act, env, args.eval_episodes, args.seed + 10_000)[1]
            row |= {"eval/score": float(normalised_score(returns, task).mean()), "eval/return": float(returns.mean())}
            if iteration == args.iterations < total:
                returns = evaluate(learner.actor.act, env, args.final_episodes, args.seed + 20_000)[1]
                offline = summary(returns, task)
        rows.append(row)
        sums, obs = 0, None
        online = {key: column[len(columns[key]) : learner.size].cpu() for key, column in learner.data.items()}
        write_log(rows, run_dir, writer)
        more = dict(offline=offline, online=online, seconds=time.monotonic() - begun)
        save(checkpoint(learner, data, rows) | more, run_dir / "checkpoint.pt")

    about = dict(script=Path(__file__).stem, env_id=args.env_id)  # docs/your_own.md has the lines that play it
    about |= dict(action_low=torch.as_tensor(data.low), action_high=torch.as_tensor(data.high))
    save(about | learner.actor.file(), run_dir / "actor.pt")
    result = dict(offline=offline)
    others = report(args, data, env, learner.actor.act, result, run_dir, begun)
    if offline:
        print(f"after the offline phase: {offline['score']:.1f} ± {offline['score_ci95']:.1f}")
    plot(run_dir / "figure.png", args, data, learner, rows, others)


if __name__ == "__main__":
    main()
