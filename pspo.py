"""Posterior Sampling-based Policy Optimization (PSPO): model-based offline reinforcement learning.

Paper: "Offline Policy Optimization with Posterior Sampling", arXiv 2605.07393; the equation numbers are its own.
Most equations have one reading; where they have more, docs/pspo.md says which one is taken here, and why.

    τ(s', r | s, a)  a dynamics model, a diagonal Gaussian, one of a pool      P₀, P  prior, posterior over models
    μ(a | s)  behaviour policy     π(a | s)  policy     Q, Q̄  critic, target critic     γ  discount

    (1)  J(π) = E[ Σ γᵗ r(s_t, a_t) ],  a model τ ~ P drawn anew at every step, s_{t+1} ~ τ
    (3)  Δ_τ = ( E_τ[r̂ + γ V(s'')] − (r + γ V(s')) )²  on an observed transition (s, a, r, s') of the data set
    (4)  P(τ) ∝ P₀(τ) exp(−λ Δ_τ)                     = argmin E_P[Δ_τ] + KL(P ‖ P₀) / λ
    (6)  Q ← Q + η_t (y − Q),   y = r + γ V(s'),  s' ~ τ,  τ ~ P
    (7)  J̄(π) = J(π) − α E[ Σ γᵗ KL(π ‖ μ) ]
    (8)  (T*Q)(s, a) = E_{τ~P}[ r + γ E_{s'~τ} V(s') ],   V(s) = α log E_{a~μ} exp(Q(s, a) / α)
    (9)  π_{i+1} = argmax E_s[ E_π Q − α KL(π ‖ μ) ]  subject to  E_s KL(π ‖ π_i) ≤ ε   (η: its multiplier)

Run it:
    python pspo.py                                          # liquidation: 99% of the optimum in 4 CPU minutes
    python pspo.py --env-id hopper-medium-v2 --cuda         # the paper's setting; wants a GPU
    python pspo.py --env-id hopper-medium-v2 --quick        # a CPU-sized setting of the same
    python pspo.py --resume runs/<run folder>               # goes on where a run stopped
"""

import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# D4RL's files (CC BY 4.0): dataset id → (path under the server's root, bytes, SHA-256). Checksums: those of
# TensorFlow Datasets' d4rl tables, for the server publishes none.
D4RL_FILES = {
    f"{task}-{level}-v2": (f"gym_mujoco_v2/{task}_{level.replace('-', '_')}-v2.hdf5", int(size), sha256)
    for task, level, size, sha256 in map(
        str.split,
        """
        hopper      random        152525345 63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054
        hopper      medium        152756557 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
        hopper      expert        152427435 01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b
        hopper      medium-expert 304537315 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
        hopper      medium-replay 75854457  e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
        hopper      full-replay   187998921 56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e
        walker2d    random        216109364 4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa
        walker2d    medium        232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
        walker2d    expert        230567195 2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a
        walker2d    medium-expert 462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
        walker2d    medium-replay 86323963  e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
        walker2d    full-replay   285115514 f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a
        halfcheetah random        237338037 25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba
        halfcheetah medium        237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
        halfcheetah expert        237464597 d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f
        halfcheetah medium-expert 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
        halfcheetah medium-replay 59448533  48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
        halfcheetah full-replay   291381762 27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0
        """.strip().splitlines(),
    )
}

# The paper's scores (Tables 1 and 2) and the reference returns of Eq. (15) (Table 4).
PAPER_SCORES = {"liquidation": 102.3} | {
    f"{task}-{level}-v2": score
    for task, scores in {
        "halfcheetah": (37.7, 79.3, 93.3, 109.7, 78.4, 94.9),
        "hopper": (31.9, 108.5, 116.6, 112.8, 110.0, 112.5),
        "walker2d": (22.1, 103.9, 109.8, 116.1, 97.0, 107.8),
    }.items()
    for level, score in zip(
        ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay"), scores, strict=True
    )
}
REFERENCE_RETURNS = {
    "liquidation": (0.0, 135.0),
    "hopper": (-20.27, 3234.3),
    "walker2d": (1.63, 4592.3),
    "halfcheetah": (-280.18, 12135.0),
}
EVAL_ENVS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}

# Settings per domain; a flag on the command line wins. "paper": Table 5; "PMDB": the closest public relative, used
# where the paper's text has no number; "ours": chosen by measurement (docs/pspo.md).
MUJOCO = dict(
    gamma=0.99,  # paper
    pool_size=100, active_models=10,  # paper
    dynamics_hidden=512, dynamics_layers=4, dynamics_batch=512, dynamics_epochs=1000,  # paper; layers: PMDB
    dynamics_lr=1e-4, dynamics_patience=20,  # PMDB; ours
    hidden=256, batch_size=256,  # paper
    actor_lr=3e-5, average_rate=0.001, critic_lr=3e-4, target_rate=0.005,  # PMDB; ours; PMDB; PMDB
    alpha=0.1, target_kl=5.0, projection="reverse",  # PMDB; PMDB; paper
    iterations=2_000_000, bc_updates=50_000, eval_every=20_000,  # PMDB; ours; ours
    rollout_horizon=1000, model_samples=10, action_samples=20,  # PMDB
    eval_episodes=10, final_episodes=100, num_threads=0,
)  # fmt: skip
DOMAINS = {
    "liquidation": MUJOCO | dict(  # ours: 4 inputs need no large network, and 20 steps need no discount
        gamma=1.0, pool_size=20, dynamics_hidden=64, dynamics_layers=2, dynamics_batch=256, dynamics_epochs=4,
        dynamics_lr=1e-3, dynamics_patience=0, hidden=64, actor_lr=1e-3, critic_lr=1e-3, alpha=0.003, target_kl=2.0,
        projection="symmetric",
        iterations=20_000, bc_updates=1_000, eval_every=2_000, rollout_horizon=20, model_samples=2,
        action_samples=6, eval_episodes=2_000, final_episodes=10_000, num_threads=1,
    ),
    "hopper": MUJOCO | dict(dynamics_hidden=256, dynamics_batch=256),  # paper
    "walker2d": MUJOCO,
    "halfcheetah": MUJOCO,
}  # fmt: skip
QUICK = dict(  # --quick: what 2 CPU cores can do on a MuJoCo task within 45 minutes
    pool_size=10, dynamics_hidden=200, dynamics_layers=3, dynamics_batch=256, dynamics_epochs=6, dynamics_lr=1e-3,
    dynamics_patience=0, hidden=128, actor_lr=1e-4, average_rate=5e-4, target_rate=0.02, target_kl=1.5,
    iterations=60_000, bc_updates=3_000, eval_every=5_000, rollout_horizon=100, model_samples=1, action_samples=4,
    num_threads=1,
)  # fmt: skip


@dataclass
class Args:
    # --- Experiment ---
    exp_name: str = "pspo"
    """name of this experiment, a part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int | None = None
    """CPU threads for PyTorch (0: PyTorch's own choice, all cores; more than one only slow small networks down)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the training steps; auto: on a CPU with a C++ compiler, of loops of 50,000 updates or more"""
    quick: bool = False
    """a CPU-sized setting for the MuJoCo tasks: smaller pool and networks, fewer epochs and iterations"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "pspo"
    """the Weights & Biases project"""
    capture_video: bool = False
    """save an animated GIF of one episode of the final policy"""
    runs_dir: str = "runs"
    """the folder that run folders are made in"""
    resume: str | None = None
    """a run folder to go on with, with its own arguments; another flag that contradicts them is refused"""
    checkpoint_minutes: float = 5.0
    """minutes between checkpoints, which evaluations, Ctrl-C and SIGTERM also write (0: every step)"""

    # --- Data and environment ---
    env_id: str = "liquidation"
    """liquidation (data generated), a D4RL name (hopper-medium-v2) or a Minari id (mujoco/hopper/medium-v0)"""
    dataset_path: str | None = None
    """an HDF5 file in D4RL format, or a Minari folder, to use instead of the data set that --env-id names"""
    dataset_mirrors: tuple[str, ...] = ()
    """base URLs to fetch D4RL files from (default: $D4RL_MIRRORS, else the D4RL server)"""
    eval_env_id: str | None = None
    """Gymnasium id of the evaluation environment (default: -v4 for D4RL data, Minari data have their own)"""
    dataset_episodes: int = 10_000
    """liquidation only: episodes of behaviour data to generate"""
    eval_episodes: int | None = None
    """episodes of each evaluation during training"""
    final_episodes: int | None = None
    """episodes of the final evaluation"""
    eval_every: int | None = None
    """iterations between evaluations and checkpoints"""

    # --- Dynamics pool (section 12.3) ---
    dynamics_path: str | None = None
    """reuse the pool of this dynamics.pt (refused if it was trained on other data)"""
    pool_size: int | None = None
    """number of models that are trained, each on its own bootstrap of the data"""
    active_models: int | None = None
    """N, the number of models drawn from the pool that are in use at a time"""
    redraw_every: int = 1000
    """iterations after which the N active models are drawn anew (0: drawn once)"""
    dynamics_hidden: int | None = None
    """units per hidden layer of a model"""
    dynamics_layers: int | None = None
    """hidden layers of a model"""
    dynamics_epochs: int | None = None
    """passes over the data"""
    dynamics_batch: int | None = None
    """batch size per model"""
    dynamics_lr: float | None = None
    """learning rate of the models (cosine to zero)"""
    dynamics_bfloat16: bool = False
    """training multiplies between hidden layers in bfloat16: 0.6 of a large pool's time, where a processor has it"""
    dynamics_patience: int | None = None
    """stop after this many epochs in which no model improved on held-out data (0: never)"""

    # --- Posterior over models, Eqs. (3) and (4) ---
    posterior: Literal["evidence", "uniform", "pessimistic"] = "evidence"
    """evidence: Eq. (4); uniform: the paper's "Average Utilization"; pessimistic: k-th smallest target (PMDB)"""
    evidence: Literal["data", "critic", "likelihood"] = "data"
    """what Δ compares a model's target with: observed transitions (reading A) or the critic itself (reading B);
    likelihood: Δ is −log τ(r, s' | s, a) of observed transitions instead, plain Bayes without a critic"""
    evidence_scale: Literal["spread", "mean", "none"] = "spread"
    """the unit of Δ: its standard deviation over the active models, its mean over them, or squared reward ranges"""
    evidence_decay: float = 0.98
    """per-iteration decay of the running averages of Δ; the critic moves, so old evidence is forgotten"""
    evidence_rows: int = 16
    """observed transitions per iteration that Δ is measured on"""
    likelihood_coef: float = 1.0
    """λ of Eq. (4): how strongly evidence moves the posterior"""
    pessimistic_k: int = 2
    """k of --posterior pessimistic"""

    # --- Policy iteration, Eqs. (6) to (9) ---
    gamma: float | None = None
    """γ, the discount"""
    iterations: int | None = None
    """policy iterations: one rollout step, one critic update and one policy update each"""
    batch_size: int | None = None
    """rows per update, half from the data set, half from the models"""
    hidden: int | None = None
    """units in each of the two hidden layers of policy and critics"""
    actor_lr: float | None = None
    """learning rate of the policy"""
    average_rate: float | None = None
    """rate of the running average of the policy's weights, which is what is evaluated and saved"""
    critic_lr: float | None = None
    """learning rate of the critics, η_t of Eq. (6) (linear to zero)"""
    target_rate: float | None = None
    """Polyak rate of the target critics"""
    rollout_horizon: int | None = None
    """steps after which a model rollout is started again from a state of the data"""
    model_samples: int | None = None
    """models, hence next states, drawn from P for each target of Eq. (6)"""
    action_samples: int | None = None
    """actions drawn for V(s) of Eq. (8), half from μ, half from π; E_π Q of Eq. (9) takes that half of them"""
    alpha: float | None = None
    """α of Eq. (7), in units of the reward range; the starting value if --target-kl is above 0"""
    target_kl: float | None = None
    """adapt α so that E KL(π ‖ μ) is about this (0: α is fixed)"""
    alpha_lr: float = 3e-4
    """step size of log α under --target-kl"""
    trust_region: float = 0.02
    """ε of Eq. (9): bound on E KL(π ‖ π_i)"""
    trust_region_every: int = 50
    """updates after which π replaces π_i of Eq. (9), as soon as the measured KL is at most ε"""
    projection: Literal["reverse", "symmetric"] | None = None
    """policy step towards π* ∝ μ exp(Q/α): Eq. (9), i.e. KL(π ‖ π*), or KL(π ‖ π*) + KL(π* ‖ π)"""
    eta_lr: float = 0.05
    """step size of the dual ascent on log η, the multiplier of Eq. (9)"""
    regularization: bool = True
    """--no-regularization: the paper's ablation "Without Regularization" (no μ: α = 0)"""
    bc_updates: int | None = None
    """updates of the behaviour policy μ by maximum likelihood"""


# --- Data: identical in every script of this project (tests/test_shared_blocks.py) ---
D4RL_SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
SILENCE = 30  # seconds without a byte after which a server is given up
# What is read of a file, and its number of dimensions.
DATA_KEYS = dict(observations=2, actions=2, rewards=1, next_observations=2, terminals=1, timeouts=1)


class UserError(Exception):
    """Something the user can put right, on one line: what is wrong, then the remedy (main: exit code 2)."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, eq=False)
class Dataset:
    """N transitions in order of time, episode after episode, checked and finite."""

    observations: np.ndarray  # (N, obs_dim) float32
    actions: np.ndarray  # (N, act_dim) float32, within [-1, 1]
    rewards: np.ndarray  # (N,) float32, as they came
    next_observations: np.ndarray  # (N, obs_dim) float32, never another episode's first observation
    terminals: np.ndarray  # (N,) bool: the task ended, no value follows
    timeouts: np.ndarray  # (N,) bool: last row of an episode that stopped otherwise (time limit, jump, end of file)
    name: str  # "hopper-medium-v2"
    source: str  # where the numbers come from: "file hopper_medium-v2.hdf5 (D4RL's)", "Minari …", "generated, …"
    sha256: str  # of the six arrays: the same hash means the same data
    dropped: int  # rows left out because their next observation is unknown
    cut: bool  # the file stops inside the last episode
    env_spec: Any = None  # gymnasium's EnvSpec, where a Minari data set has one


def make_dataset(arrays: dict[str, np.ndarray], name: str, source: str, env_spec: Any = None) -> Dataset:
    """Check columns in D4RL's layout (DATA_KEYS; N rows, any real dtype) and complete them to a Dataset.

    `next_observations` or `timeouts` may be absent. Without the former a row's next state is the next row of
    its episode. At an episode's end it is unknown: a timed-out row is dropped; a terminal row stays (there
    AntMaze has its reward) with its own observation as a placeholder, which (1 - terminal) masks in a Bellman
    target and no dynamics model must learn. (D4RL's qlearning_dataset takes the next episode's first state.)
    Raises UserError for columns that are missing, misshapen, not numbers, not finite or out of range.
    """
    missing = [key for key in ("observations", "actions", "rewards", "terminals") if key not in arrays]
    if "next_observations" not in arrays and "timeouts" not in arrays:
        missing.append("timeouts (or next_observations)")
    has = ", ".join(arrays) or "none of D4RL's keys"
    require(not missing, f"{source}: no {', '.join(missing)}; it has {has}: use a file in D4RL's layout")
    data = {}
    for key in [key for key in DATA_KEYS if key in arrays]:
        what, flag, values = f"{source}: '{key}'", key in ("terminals", "timeouts"), np.asarray(arrays[key])
        rank = DATA_KEYS[key]
        if rank == 1 and values.shape[1:] == (1,):
            values = values[:, 0]  # some of D4RL's files have (N, 1)
        require(values.dtype.kind in "biuf", f"{what} has dtype {values.dtype}: store real numbers")
        require(values.ndim == rank, f"{what} has shape {values.shape}, it must be {rank}-d: reshape it")
        require(values.size > 0, f"{what} is empty, shape {values.shape}: use a file with transitions")
        shape = data.get("observations", values).shape
        same = values.shape == shape if key == "next_observations" else len(values) == shape[0]
        require(same, f"{what} has shape {values.shape}, 'observations' {shape}: fetch the file again")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
            values = values.astype(np.float32)
        good = (values == 0) | (values == 1) if flag else np.isfinite(values)
        row = good.reshape(len(good), -1).all(1).argmin()  # the first bad one, if any is bad
        found = "a value other than 0 and 1" if flag else "a NaN or infinite value"
        require(good[row].all(), f"{what} has {found}, first in row {row}: repair the data")
        data[key] = values.astype(bool) if flag else values
    largest = np.abs(data["actions"]).max()
    require(largest <= 1.001, f"{source}: 'actions' reach {largest:.4g}: rescale them to [-1, 1], as D4RL's")
    data["actions"] = data["actions"].clip(-1, 1)  # a little over 1 is rounding

    observations, terminals = data["observations"], data["terminals"]
    ends = terminals | data.get("timeouts", False)
    if "next_observations" in data:
        # Files do not flag every timeout (medium-replay), so a jump between two rows ends an episode too.
        ends[:-1] |= np.linalg.norm(observations[1:] - data["next_observations"][:-1], axis=1) > 1e-6
        keep, cut = np.ones_like(ends), not ends[-1]
    else:
        cut = not ends[-1] and not ends[-2:-1].any()  # a last episode of one row vanishes
        ends[-1] = True
        keep = terminals | ~ends
        require(keep.any(), f"{source}: no row has a known next state: use a file with 'next_observations'")
        data["next_observations"] = np.where(ends[:, None], observations, np.roll(observations, -1, axis=0))
        ends[:-1] |= ~keep[1:]  # the row before a dropped one is now its episode's last
    ends[-1] = True
    data["timeouts"] = ends & ~terminals
    data = {key: np.ascontiguousarray(data[key][keep]) for key in DATA_KEYS}
    digest = hashlib.sha256(repr([values.shape for values in data.values()]).encode())
    for values in data.values():
        digest.update(values)
    dropped, sha256 = int((~keep).sum()), digest.hexdigest()
    return Dataset(**data, name=name, source=source, sha256=sha256, dropped=dropped, cut=bool(cut), env_spec=env_spec)


def load_dataset(env_id: str, dataset_path: str | None = None, mirrors: tuple[str, ...] = ()) -> Dataset:
    """The HDF5 file or Minari folder `dataset_path`, else D4RL's `env_id`, else Minari's (with a /).

    What is not here yet is downloaded: D4RL's to $D4RL_DATASET_DIR (default ~/.d4rl/datasets) from `mirrors`,
    else $D4RL_MIRRORS (comma-separated), else Berkeley; Minari's to $MINARI_DATASETS_PATH. Raises UserError.
    """
    if dataset_path is not None:
        path = Path(dataset_path).expanduser()
        return load_minari(env_id, path) if path.is_dir() else load_hdf5(env_id, path)
    if env_id in D4RL_FILES:
        folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
        path = folder / Path(D4RL_FILES[env_id][0]).name
        if not os.path.exists(path):
            listed = os.environ.get("D4RL_MIRRORS") or D4RL_SERVER
            download(env_id, path, mirrors or tuple(url.strip() for url in listed.split(",")))
        return load_hdf5(env_id, path)
    nearest = ", ".join(difflib.get_close_matches(env_id, D4RL_FILES, n=3, cutoff=0))
    advice = f"did you mean {nearest}? A Minari id has a '/'; --dataset-path takes a file"
    require("/" in env_id, f"unknown data set '{env_id}': {advice}")
    return load_minari(env_id)


def load_hdf5(name: str, path: Path) -> Dataset:
    """Read an HDF5 file in D4RL's layout; `source` says whether it is D4RL's own. Raises UserError."""
    try:
        with h5py.File(path, "r") as file:
            tables = {key: file[key] for key in DATA_KEYS if isinstance(file.get(key), h5py.Dataset)}
            claimed, size = sum(table.nbytes for table in tables.values()), path.stat().st_size
            possible = claimed <= 1100 * size + 10**6  # gzip's best ratio is 1032
            require(possible, f"{path} claims {claimed:.3g} bytes of data in a file of {size:,}: fetch it again")
            arrays = {key: table[()] for key, table in tables.items()}
        source = f"file {path.name}"
        if name in D4RL_FILES:  # hashing takes a second: compare the size first
            _, size, sha256 = D4RL_FILES[name]
            genuine = path.stat().st_size == size and file_sha256(path) == sha256
            source += " (D4RL's)" if genuine else " (regenerated or modified: not D4RL's size/hash)"
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check --dataset-path") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: change its permissions or its folder's") from None
    except UserError:
        raise
    except Exception as error:  # not HDF5, truncated, a damaged chunk or link: h5py raises many types
        raise UserError(f"{path} is not a whole HDF5 file ({error}): delete it and fetch it again") from error
    return make_dataset(arrays, name, source)


def load_minari(name: str, folder: Path | None = None) -> Dataset:
    """Read the Minari data set in `folder`, else the id `name`, downloaded if need be. Raises UserError.

    An episode has T + 1 observations, so every next state is known.
    """
    rows = {key: [] for key in DATA_KEYS}
    try:
        import minari  # not at the top: only Minari's data need it

        dataset = minari.MinariDataset(folder / "data") if folder else minari.load_dataset(name, download=True)
        for episode in dataset:
            states, steps = flatten_observations(episode.observations), len(episode)
            last = np.arange(steps) == steps - 1  # truncated or not
            columns = states[:-1], episode.actions, episode.rewards, states[1:], episode.terminations, last
            for key, values in zip(DATA_KEYS, columns, strict=True):
                rows[key].append(values)
        arrays = {key: np.concatenate(parts) for key, parts in rows.items()}
        source, env_spec = f"Minari {dataset.id}", dataset.env_spec
    except ImportError as error:  # no extra of Minari's names Pillow, which its storage imports
        raise UserError(f"Minari: {error}: pip install 'minari[hdf5,hf]' pillow") from error
    except Exception as error:  # Minari, h5py, the hub and its HTTP client share no class of errors
        remedy = f"check the id (minari list remote) and the network, then: minari download --force {name}"
        if folder:
            remedy = "give an HDF5 file, or a Minari folder, the one that contains data/metadata.json"
        raise UserError(f"Minari data {folder or name}: {type(error).__name__}: {error}: {remedy}") from error
    return make_dataset(arrays, name, source, env_spec)


def registered(spec: Any) -> Any:
    """A data set's EnvSpec with the code that Gymnasium knows under its id, in place of the code that the file names.

    A file may set parameters, but must not choose what is executed. Raises UserError for an id that is not known.
    """
    known, advice = gym.registry.get(spec.id), "choose one with --eval-env-id"
    require(known is not None, f"the data name an environment that is not installed, {spec.id}: {advice}")
    steps = spec.max_episode_steps
    fine = steps is None or (type(steps) is int and 0 < steps <= 100_000)
    require(fine, f"the data's environment {spec.id} has episodes of {steps} steps: {advice}")
    code = dict(entry_point=known.entry_point, vector_entry_point=known.vector_entry_point, additional_wrappers=())
    return dataclasses.replace(spec, **code)


def flatten_observations(values: Any) -> np.ndarray:
    """Array or (nested) dict of arrays to (T + 1, obs_dim): keys sorted, as FlattenObservation has them."""
    if isinstance(values, dict):
        return np.concatenate([flatten_observations(values[key]) for key in sorted(values)], axis=1)
    return np.asarray(values).reshape(len(values), -1)


def download(name: str, path: Path, mirrors: tuple[str, ...]) -> None:
    """Fetch D4RL's file `name` to `path` from the first mirror that has it with the right size and SHA-256.

    It grows in PATH.part, which the next mirror and the next run continue, and is renamed when checked:
    `path` is always a whole file. Raises UserError with the answer of every mirror and the way by hand.
    """
    remote, size, sha256 = D4RL_FILES[name]
    part, answers = path.with_name(path.name + ".part"), []
    for url in [f"{mirror.rstrip('/')}/{remote}" for mirror in mirrors]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(url, part, size)
            if file_sha256(part) == sha256:
                os.replace(part, path)
                return
            part.unlink()
            answers.append(f"{url}: not D4RL's file (wrong SHA-256), deleted")
        except (OSError, ValueError, http.client.HTTPException) as error:  # no file, network, space or sense
            answers.append(f"{url}: {error}")
    advice = f"run again (a .part file is continued), or fetch it by hand and save it as {path}"
    require(False, f"cannot download {name}: {'; '.join(answers)}: {advice}")


def fetch(url: str, part: Path, size: int) -> None:
    """Append to `part` what it lacks of `size` bytes, or all if the server ignores Range. Raises OSError."""
    done = part.stat().st_size if part.exists() else 0
    if done == size:  # an earlier run was stopped between the last byte and the check
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if 0 < done < size else {})
    with urllib.request.urlopen(request, timeout=SILENCE) as answer:
        done = done if answer.status == 206 else 0
        offered = done + int(answer.headers.get("Content-Length", size - done))
        if offered != size:  # refused before a byte is written: an error page must not end up in the file
            raise OSError(f"offers {offered:,} bytes instead of {size:,}")
        bar = tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=url.rsplit("/")[-1])
        with bar, open(part, "ab" if done else "wb") as file:
            while done < size and (chunk := answer.read1(1 << 20)):
                alone = os.fstat(file.fileno()).st_size == done
                require(alone, f"another process writes {part}: wait until it has finished, then run again")
                file.write(chunk)
                file.flush()
                done += len(chunk)
                bar.update(len(chunk))
    if done < size:
        raise OSError(f"the connection broke after {done:,} of {size:,} bytes")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_spaces(dataset: Dataset, env: gym.Env) -> None:
    """Raise UserError unless `env` has the data's observation and action sizes and actions in [-1, 1]."""
    env_name, box = env.spec.id if env.spec else str(env), env.action_space
    unit = isinstance(box, gym.spaces.Box) and (box.low == -1).all() and (box.high == 1).all()
    require(unit, f"{env_name} has actions {box}: choose an environment with actions in [-1, 1]")
    have = f"{dataset.observations.shape[1]} observations, {dataset.actions.shape[1]} actions"
    want = f"{gym.spaces.flatdim(env.observation_space)} observations, {gym.spaces.flatdim(box)} actions"
    require(have == want, f"{dataset.name} has {have}, but {env_name} {want}: choose another environment")


def episode_ends(dataset: Dataset) -> np.ndarray:
    """(E,) row number of the last row of every episode, ascending; the last one is N - 1."""
    return np.flatnonzero(dataset.terminals | dataset.timeouts)


def episode_returns(dataset: Dataset) -> np.ndarray:
    """(E,) undiscounted returns, summed in float64; (E - 1,) if the file cuts the last episode off."""
    starts = np.concatenate([[0], episode_ends(dataset)[:-1] + 1])
    returns = np.add.reduceat(dataset.rewards.astype(np.float64), starts)
    return returns[:-1] if dataset.cut and len(returns) > 1 else returns


def data_card(dataset: Dataset) -> str:
    """What the numbers of a run rest on, in five lines."""
    rows, obs_dim = dataset.observations.shape
    returns = episode_returns(dataset)
    low, mean, high = returns.min(), returns.mean(), returns.max()
    dropped = f" ({dataset.dropped:,} more without a next state left out)" if dataset.dropped else ""
    cut = ", the last one cut off by the end of the file" if dataset.cut else ""
    ends = f"{dataset.terminals.sum():,} terminals, {dataset.timeouts.sum():,} timeouts{cut}"
    return f"""data      {dataset.name}: {dataset.source}
rows      {rows:,}{dropped}, observations {obs_dim}, actions {dataset.actions.shape[1]}
episodes  {len(episode_ends(dataset)):,}: {ends}
returns   min {low:.1f}, mean {mean:.1f}, max {high:.1f} of {len(returns):,} complete episodes
sha256    {dataset.sha256[:12]}"""


def figure_name(name: str, source: str) -> str:
    """A data set's name as figures print it: D4RL's ids are for D4RL's own files. source: Dataset.source."""
    return name + (" (not D4RL's file)" if "not D4RL's" in source else "")


# --- end of the shared data block ---


# --- Networks: every one is a stack evaluated as one batched matrix product ---


def bfloat16_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight, factors and result rounded to bfloat16: (size, B, in), (size, in, out) -> (size, B, out)."""
    return torch.bmm(x.bfloat16(), weight.bfloat16()).to(x.dtype)


class MLP(nn.Module):
    """`size` independent multi-layer perceptrons: (B, in) or (size, B, in) -> (size, B, out).

    bfloat16: only between hidden layers; the first and the last layer see states and say values, and cost little.
    """

    def __init__(self, size: int, widths: list[int], activation=torch.relu_):
        super().__init__()
        self.size, self.activation = size, activation
        bounds = [fan_in**-0.5 for fan_in in widths[:-1]]  # PyTorch's default for nn.Linear
        shapes = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList(
            torch.empty(size, *s).uniform_(-b, b) for s, b in zip(shapes, bounds, strict=True)
        )
        self.biases = nn.ParameterList(
            torch.empty(size, 1, s[1]).uniform_(-b, b) for s, b in zip(shapes, bounds, strict=True)
        )

    def forward(self, x: torch.Tensor, bfloat16: bool = False) -> torch.Tensor:
        x = x.expand(self.size, *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            multiply = bfloat16_product if bfloat16 and 0 < i < len(self.weights) - 1 else torch.bmm
            x = multiply(self.activation(x) if i else x, weight).add_(bias)
        return x


class Dynamics(nn.Module):
    """Models τ(r, s' | s, a), each a diagonal Gaussian over the reward and the change of state."""

    def __init__(self, size: int, obs_dim: int, act_dim: int, hidden: int, layers: int):
        super().__init__()
        self.net = MLP(size, [obs_dim + act_dim, *[hidden] * layers, 2 * (1 + obs_dim)], F.silu)
        for name, dim in dict(input=obs_dim + act_dim, output=1 + obs_dim).items():  # standardisation
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        self.register_buffer("box", torch.zeros(2, obs_dim))  # next states are kept inside

    def standardised(self, inputs: torch.Tensor, bfloat16: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw (B, obs+act) or (size, B, obs+act) -> mean, log-std, each (size, B, 1+obs), in standardised units."""
        mean, log_std = self.net((inputs - self.input_mean) / self.input_std, bfloat16).chunk(2, dim=-1)
        log_std = 1 - F.softplus(1 - log_std)  # soft clamp to (-6, 1)
        return mean, -6 + F.softplus(log_std + 6)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, obs), (B, act) -> mean and std of (r, s'), each (size, B, 1+obs), in the data's units."""
        mean, log_std = self.standardised(torch.cat([obs, action], dim=-1))
        mean = mean * self.output_std + self.output_mean
        return torch.cat([mean[..., :1], mean[..., 1:] + obs], dim=-1), log_std.exp() * self.output_std

    def split(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., 1+obs) -> reward (...), next state (..., obs), the latter kept inside the box of the data."""
        return sample[..., 0], sample[..., 1:].clamp(self.box[0], self.box[1])

    @torch.no_grad()
    def load_members(self, pool: "Dynamics", members: torch.Tensor) -> None:
        """Copy the given members (size,) of a larger pool into this one, in place."""
        for mine, theirs in zip(self.net.parameters(), pool.net.parameters(), strict=True):
            mine.copy_(theirs[members])
        for mine, theirs in zip(self.buffers(), pool.buffers(), strict=True):
            mine.copy_(theirs)


class Actor(nn.Module):
    """A diagonal Gaussian over u, the action is tanh(u). (B, obs) -> mean and log-std of u, each (B, act)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(1, [obs_dim, hidden, hidden, 2 * act_dim])
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net((obs - self.obs_mean) / self.obs_std)[0].chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The deterministic action tanh(mean): (B, obs) -> (B, act)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device)
        return self(obs)[0].tanh().cpu().numpy()

    def sampler(self, seed: int) -> Callable:
        """Acts by tanh(u), u ~ N(mean, std²), with random numbers of its own: (B, obs) -> (B, act)."""
        generator = torch.Generator().manual_seed(seed)

        @torch.no_grad()
        def act(obs: np.ndarray) -> np.ndarray:
            mean, log_std = (
                x.cpu() for x in self(torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device))
            )
            return (mean + log_std.exp() * torch.randn(mean.shape, generator=generator)).tanh().numpy()

        return act


class Critic(nn.Module):
    """Twin critics. (B, obs), (B, act) -> (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(2, [obs_dim + act_dim, hidden, hidden, 1])
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)).squeeze(-1)


# --- Equations: pure functions of tensors ---


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag exp(2 log_std)), (..., act) -> (...). The tanh's Jacobian cancels in all our ratios."""
    return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_p, log_std_p, mean_q, log_std_q) -> torch.Tensor:
    """KL(p ‖ q) of diagonal Gaussians, (..., act) -> (...). The same after a tanh of both: it is invertible."""
    ratio = (2 * (log_std_p - log_std_q)).exp()
    return 0.5 * (ratio + ((mean_p - mean_q) * (-log_std_q).exp()).square() - 1 - ratio.log()).sum(-1)


def beta_nll(mean, log_std, target, beta: float = 0.5) -> torch.Tensor:
    """Gaussian negative log-likelihood, each term times its (constant) variance^β (Seitzer et al., 2022): (...).

    β = 0 is plain maximum likelihood, which learns nothing about a reward that is zero on most rows.
    """
    nll = log_std + 0.5 * ((target - mean) * (-log_std).exp()).square()
    return nll * (2 * beta * log_std).exp().detach()


def model_evidence(model_target: torch.Tensor, observed_target: torch.Tensor) -> torch.Tensor:
    """Eq. (3): Δ_τ, the squared error of each model's Bellman target: (N, B), (B,) -> (N,)."""
    return (model_target - observed_target).double().square().mean(-1)  # float32's squares end at 1e38


def mean_surprise(mean, std, observed, known) -> torch.Tensor:
    """−log τ(r, s' | s, a) of the known observed (r, s'), averaged: (N, B, 1+obs) twice, (B, 1+obs), (B,) -> (N,)."""
    surprise = (std.log() + 0.5 * ((observed - mean) / std).square()).sum(-1).double()  # (N, B), up to a constant
    return (surprise * known).sum(-1) / known.sum().clamp(min=1)


def posterior(evidence: torch.Tensor, strength: float) -> torch.Tensor:
    """Eq. (4): log P(τ) = −λ Δ_τ + constant over the last dimension, P₀ uniform.

    In log space it cannot underflow: a hopeless model has log P = −1e30, not −inf.
    """
    excess = evidence - evidence.amin(-1, keepdim=True)
    return F.log_softmax((-strength * excess).clamp(min=-1e30), dim=-1)


def sample_models(log_belief: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw τ ~ P by the Gumbel-max trick: (N,) or (B, N) -> indices of the given shape (K, B)."""
    gumbel = -torch.empty(*shape, log_belief.shape[-1], device=log_belief.device).exponential_().log()
    return (log_belief + gumbel).argmax(-1)


def soft_value(q: torch.Tensor, log_weights: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Eq. (8): V = α log Σ_j w_j exp(Q_j / α), (M, ...) -> (...).

    For M actions drawn from q, log_weights is log( μ(a_j) / (M q(a_j)) ); for all actions of a finite set, log μ(a_j).
    """
    return alpha * torch.logsumexp(q / alpha + log_weights, dim=0)


def mixture_log_weights(u, mu_mean, mu_log_std, pi_mean, pi_log_std) -> torch.Tensor:
    """log( μ(u) / (M q(u)) ) of M samples, half from μ, half from π, q = (μ + π) / 2: (M, B, act) -> (M, B)."""
    log_mu, log_pi = gaussian_log_prob(u, mu_mean, mu_log_std), gaussian_log_prob(u, pi_mean, pi_log_std)
    return log_mu - (torch.logaddexp(log_mu, log_pi) - math.log(2)) - math.log(len(u))


def projection_loss(q, log_weights, alpha, log_pi) -> torch.Tensor:
    """−E_{π*} log π with Theorem 1's π* ∝ μ exp(Q/α), self-normalised over M samples: (M, B) each -> scalar.

    It is KL(π* ‖ π) up to a constant; Eq. (9) is −α KL(π ‖ π*) up to a constant, which cannot see past a valley of Q.
    """
    return -((q / alpha + log_weights).softmax(0) * log_pi).sum(0).mean()


def bellman_target(reward, terminal, next_value, gamma: float) -> torch.Tensor:
    """y of Eq. (6): r + γ V(s'), and r alone where the episode ends; any shape."""
    return reward + gamma * torch.where(terminal, torch.zeros_like(next_value), next_value)


def cosine(update: int, updates: int) -> float:
    """A learning rate in update 1, 2, … as a share of the first: 1 falling to 0."""
    return 0.5 * (1 + math.cos(math.pi * (update - 1) / updates))


def policy_objective(q, alpha, kl_behaviour, eta, kl_previous) -> torch.Tensor:
    """Eq. (9) with its multiplier η (KKT): E_s[ E_π Q − α KL(π ‖ μ) − η KL(π ‖ π_i) ], (B,) each -> scalar."""
    return (q - alpha * kl_behaviour - eta * kl_previous).mean()


def terminal_hopper(obs: torch.Tensor) -> torch.Tensor:
    height, angle = obs[..., 0], obs[..., 1]
    return ~(obs.isfinite().all(-1) & (obs[..., 1:].abs() < 100).all(-1) & (height > 0.7) & (angle.abs() < 0.2))


def terminal_walker2d(obs: torch.Tensor) -> torch.Tensor:
    height, angle = obs[..., 0], obs[..., 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


def terminal_halfcheetah(obs: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(obs[..., 0], dtype=torch.bool)


def terminal_liquidation(obs: torch.Tensor) -> torch.Tensor:
    return (obs[..., 0] > 19.5) | (obs[..., 1] < 0.1)  # the step t' = 20, predicted with a small error


# The environments' own rules: next state (..., obs) -> terminal (...)
TERMINAL = {
    "hopper": terminal_hopper, "walker2d": terminal_walker2d,
    "halfcheetah": terminal_halfcheetah, "liquidation": terminal_liquidation,
}  # fmt: skip


# --- Fast steps: identical in every script of this project (tests/test_shared_blocks.py) ---


class Adam:
    """Adam, decoupled weight decay included, with torch.optim's fused kernel and all of its state in tensors.

    Nothing is left that Python changes between two steps, so torch.compile and a CUDA graph can record a step whole.
    groups: (parameters, learning rate) each; `rates` are the learning rates, 0-dimensional tensors to `fill_`.
    """

    def __init__(self, *groups: tuple[Iterable[nn.Parameter], float], weight_decay: float = 0.0):
        self.groups, self.weight_decay = [list(params) for params, _ in groups], weight_decay
        params = [p for group in self.groups for p in group]
        self.rates = [torch.tensor(rate, device=params[0].device) for _, rate in groups]
        self.count = torch.zeros((), device=params[0].device)  # of steps so far
        self.means, self.squares = ([torch.zeros_like(p) for p in params] for _ in range(2))

    def minimise(self, loss: torch.Tensor) -> None:
        """One step down the gradient of `loss`, taken with respect to these parameters only."""
        gradients = torch.autograd.grad(loss, list(itertools.chain(*self.groups)))
        state = zip(gradients, self.means, self.squares, strict=True)
        with torch.no_grad():
            self.count.add_(1)
            for params, rate in zip(self.groups, self.rates, strict=True):
                self.update(params, *zip(*itertools.islice(state, len(params)), strict=True), rate)

    def update(self, params, gradients, means, squares, rate: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():
            torch._fused_adamw_(
                params, gradients, means, squares, [], [self.count] * len(params), lr=rate, beta1=0.9, beta2=0.999,
                eps=1e-8, weight_decay=self.weight_decay, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        mean_scale, square_scale = 1 - 0.9**self.count, 1 - 0.999**self.count
        for p, gradient, mean, square in zip(params, gradients, means, squares, strict=True):  # the compiler fuses it
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.001)
            step = (mean / mean_scale) / ((square / square_scale).sqrt() + 1e-8)
            p.mul_(1 - rate * self.weight_decay).sub_(rate * step)

    def state_dict(self) -> dict[str, Any]:
        return dict(count=self.count, means=self.means, squares=self.squares)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: what recorded this optimiser's steps goes on to see its tensors. The rates are the caller's."""
        mine, theirs = ([x["count"], *x["means"], *x["squares"]] for x in (self.state_dict(), state))
        for tensor, saved in zip(mine, theirs, strict=True):
            require(tensor.shape == saved.shape, "the optimiser's state is of other networks")
            tensor.copy_(saved)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products in bfloat16; without them float32 is several times as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Captured:
    """A step as a CUDA graph: all its kernels in one launch. It takes no arguments and returns one tensor.

    The first calls run as they are, on a side stream, where PyTorch wants the warm-up; the next one is recorded, and
    every later one replays the recording with whatever is by then in the tensors that the step reads and writes. So
    a step must keep its state in the same tensors, draw random numbers on the device and never wait for it.
    """

    def __init__(self, step: Callable[[], torch.Tensor]):
        self.step, self.warm_up, self.result = step, 3, None
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # libraries keep memory for each stream

    def __call__(self) -> torch.Tensor:
        if self.warm_up:
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.result is None:
            with torch.cuda.graph(self.graph, stream=self.stream):  # the default random generator takes part in it
                self.result = self.step()
        self.graph.replay()
        return self.result.clone()


def follow(net: nn.Module, leader: nn.Module, rate: float) -> None:
    """Polyak averaging: net ← (1 − rate) net + rate leader, all parameters at once."""
    torch._foreach_lerp_(list(net.parameters()), list(leader.parameters()), rate)


def fast(
    step: Callable[[], torch.Tensor], device: torch.device, compiled: str, updates: int
) -> Callable[[], torch.Tensor]:
    """`step` as a loop of so many `updates` should call it: compiled as a whole, and on a GPU captured.

    compiled: on, off, or auto: where it pays. Compiled or not, numbers agree to rounding, and each repeats its own.
    """
    compiler = os.environ.get("CXX", "g++")
    able = shutil.which(compiler) is not None
    require(able or compiled != "on", f"--compile on needs {compiler}: install a C++ compiler")
    if compiled == "on" or (compiled == "auto" and able and device.type == "cpu" and updates >= 50_000):
        known = hasattr(torch._dynamo.config, "trace_autograd_ops")
        require(known, f"PyTorch {torch.__version__} compiles no gradients: torch==2.13.0 does, or use --compile off")
        print("compiling the training step, half a minute before the first one (not with --compile off)")
        torch._dynamo.config.trace_autograd_ops = True
        options = {"fallback_random": True}  # PyTorch's own random numbers
        whole = torch.compile(step, fullgraph=True, dynamic=False, options=options)
        step = whole if compiled == "on" else unless_it_fails(whole, step)
    return Captured(step) if device.type == "cuda" else step


def unless_it_fails(whole: Callable[[], torch.Tensor], step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A compiled step, or the step itself from its first call on if this machine cannot compile, e.g. lacks headers."""
    chosen = whole

    def call() -> torch.Tensor:
        nonlocal chosen
        try:
            return chosen()
        except torch._dynamo.exc.TorchDynamoException as error:  # while compiling: nothing has been computed yet
            tqdm.write(f"going on without compiling (--compile off does not try): {str(error).strip().splitlines()[0]}")
            chosen = step
            return chosen()

    return call


# --- end of the shared fast-steps block ---


# --- Dynamics pool ---


def explained_variance(pool: Dynamics, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """1 − Var(error) / Var(output) for each model and dimension: (n, obs+act), (n, 1+obs) -> (pool, 1+obs)."""
    error = outputs - (pool.standardised(inputs)[0] * pool.output_std + pool.output_mean)
    return 1 - error.var(1) / pool.output_std.square()


def saved_update(state: dict, updates: int) -> int:
    """How many of `updates` were done when `state` was saved. Raises UserError if that cannot be."""
    fine = type(state["done"]) is int and 0 < state["done"] <= updates
    require(fine, f"the checkpoint is from update {state['done']} of {updates}: use one that a run saved")
    return state["done"]


def train_dynamics(
    args: Args,
    data: dict[str, torch.Tensor],
    bar: Callable,
    checkpoint: "Checkpoint | None" = None,
    state: dict | None = None,
) -> tuple[Dynamics, dict]:
    """Maximum likelihood, each member on its own bootstrap; each keeps its epoch with the least held-out error.

    Returns the pool and a report: held-out error per member, explained variance per dimension. state: what it saved
    to `checkpoint`, to go on there; the random generators must be as they were at the first call.
    """
    device = data["observations"].device
    if args.dynamics_bfloat16 and not multiplies_bfloat16(device):
        print(f"no instructions for bfloat16 on this {device.type}: --dynamics-bfloat16 makes it slower")
    change = data["next_observations"] - data["observations"]
    known = ~(data["terminals"] & (change == 0).all(1))  # files without next states have a placeholder there
    inputs = torch.cat([data["observations"], data["actions"]], -1)[known]  # (n, obs+act)
    outputs = torch.cat([data["rewards"][:, None], change], -1)[known]  # (n, 1+obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    pool = Dynamics(args.pool_size, obs_dim, act_dim, args.dynamics_hidden, args.dynamics_layers).to(device)
    for name, x in dict(input=inputs, output=outputs).items():
        std = x.std(0)
        getattr(pool, f"{name}_mean").copy_(x.mean(0))
        getattr(pool, f"{name}_std").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
    low, high = (f(data["next_observations"], 0) for f in (torch.amin, torch.amax))
    pool.box.copy_(torch.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)]))

    few = f"only {len(inputs)} rows have a next state, which are too few to train and test models on"
    require(len(inputs) >= 20, f"{few}: use at least 20")
    order = torch.randperm(len(inputs), device=device)
    num_held_out = min(len(inputs) // 10 + 1, 5000)
    held_in, held_out = inputs[order[:num_held_out]], outputs[order[:num_held_out]]
    train_rows = order[num_held_out:]
    size = (args.pool_size, len(train_rows))
    bootstrap = torch.randint(len(train_rows), size, device=device, dtype=torch.int32)
    optimizer = Adam((pool.parameters(), args.dynamics_lr), weight_decay=7.5e-5)
    updates_per_epoch = max(1, len(train_rows) // args.dynamics_batch)
    num_updates = args.dynamics_epochs * updates_per_epoch
    best = {k: v.detach().clone() for k, v in pool.net.state_dict().items()}
    best_error = torch.full((args.pool_size,), math.inf, device=device)
    stale_epochs, done = 0, 0
    drawn = torch.cat([order[:100], bootstrap[:, -1]])  # the bootstrap is too large for a checkpoint
    if state:
        same = torch.equal(drawn.cpu(), state["drawn"].cpu())
        require(same, "the same seed draws other rows on this device or PyTorch: resume where the run began")
        with restoring("the checkpoint"):
            pool.net.load_state_dict(state["best"])
            best = {key: value.clone() for key, value in pool.net.state_dict().items()}
            pool.net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            best_error, stale_epochs = state["best_error"].to(best_error).view_as(best_error), state["stale_epochs"]
            done = saved_update(state, num_updates)
            require(type(stale_epochs) is int, "its count of stale epochs is no number")
            set_rng_state(state["rng"])
    cause = "the dynamics models diverged: lower --dynamics-lr, or look for extreme values in the data"
    names = [f"loss of model {i}" for i in range(args.pool_size)]
    guard = Guard("dynamics update", names, dict.fromkeys(names, cause), dict.fromkeys(names, 1e4))

    def learn() -> torch.Tensor:
        columns = torch.randint(bootstrap.shape[1], (args.pool_size, args.dynamics_batch), device=device)
        rows = train_rows[bootstrap.gather(1, columns).long()]  # (pool, batch)
        mean, log_std = pool.standardised(inputs[rows], args.dynamics_bfloat16)
        target = (outputs[rows] - pool.output_mean) / pool.output_std
        losses = beta_nll(mean, log_std, target).mean((1, 2))  # (pool,)
        optimizer.minimise(losses.sum())
        return losses.detach()

    step = fast(learn, device, args.compile, num_updates)
    progress = bar(total=num_updates, initial=done, desc="dynamics")
    for update in range(done + 1, num_updates + 1):
        optimizer.rates[0].fill_(args.dynamics_lr * cosine(update, num_updates))
        guard.add(update, step())
        progress.update()
        if update % updates_per_epoch == 0:
            with torch.no_grad():
                target = (held_out - pool.output_mean) / pool.output_std
                error = (pool.standardised(held_in)[0] - target).square().mean((1, 2))  # (pool,)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                for key, value in pool.net.state_dict().items():
                    best[key] = torch.where(better[:, None, None], value, best[key])
            progress.set_postfix(held_out_mse=f"{best_error.mean().item():.4f}")
            stale_epochs = 0 if better.any() else stale_epochs + 1
            if 0 < args.dynamics_patience <= stale_epochs:
                break
        if checkpoint and checkpoint.due():
            guard.check()
            checkpoint.save(
                phase="dynamics", done=update, net=pool.net.state_dict(), optimizer=optimizer.state_dict(),
                best=best, best_error=best_error, stale_epochs=stale_epochs, drawn=drawn, rng=rng_state(),
            )  # fmt: skip
    guard.check()
    progress.close()
    pool.net.load_state_dict(best)
    with torch.no_grad():
        explained = explained_variance(pool, held_in, held_out)
    finite = bool(explained.isfinite().all() and best_error.isfinite().all())
    require(finite, "the dynamics models diverged (errors not finite): lower --dynamics-lr")
    report = dict(
        bfloat16=args.dynamics_bfloat16,
        held_out_mse=[round(x, 6) for x in best_error.tolist()],
        explained_variance_mean=[round(x, 5) for x in explained.mean(0).tolist()],
        explained_variance_worst_model=[round(x, 5) for x in explained.amin(0).tolist()],
    )
    return pool, report


# --- Policy iteration ---


DIVERGENCE = {  # likely causes, by the first part of a metric's name
    "rollout": "the dynamics models' predictions run away: train them longer, or lower --dynamics-lr",
    "critic": "the critic diverges: lower --critic-lr, or --actor-lr",
    "policy": "the policy diverges: lower --actor-lr or --critic-lr, or raise --alpha",
    "posterior": "the models' errors cannot be compared: lower --dynamics-lr",
}


class PSPO(nn.Module):
    """Everything that policy iteration changes; `state_dict()` and the optimisers are all a checkpoint needs."""

    METRICS = (  # in the order in which they are computed
        "rollout/state_max", "critic/target_max", "critic/loss", "critic/q_data",
        "critic/q_model", "critic/q_max", "policy/objective", "policy/kl_behaviour", "policy/kl_previous",
        "policy/eta", "policy/alpha", "policy/log_std", "policy/i",
        "posterior/entropy", "posterior/largest", "rollout/terminals",
    )  # fmt: skip

    def __init__(self, args: Args, data: dict[str, torch.Tensor], domain: str):
        super().__init__()
        self.args, self.data, self.terminal = args, data, TERMINAL[domain]
        obs, obs_dim, act_dim = data["observations"], data["observations"].shape[1], data["actions"].shape[1]
        self.learns_belief = args.posterior == "evidence" and args.evidence != "critic"  # reading A of Eq. (3)
        self.behaviour = Actor(obs_dim, act_dim, args.hidden)  # μ
        self.actor = Actor(obs_dim, act_dim, args.hidden)  # π
        self.previous = Actor(obs_dim, act_dim, args.hidden)  # π_i
        self.average = Actor(obs_dim, act_dim, args.hidden)  # running average of π's weights
        self.critic = Critic(obs_dim, act_dim, args.hidden)
        self.target_critic = Critic(obs_dim, act_dim, args.hidden)
        self.target_critic.load_state_dict(self.critic.state_dict())
        std = obs.std(0)
        for net in (self.behaviour, self.actor, self.previous, self.average, self.critic, self.target_critic):
            net.obs_mean.copy_(obs.mean(0))
            net.obs_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.active = Dynamics(args.active_models, obs_dim, act_dim, args.dynamics_hidden, args.dynamics_layers)
        num_model_rows = args.batch_size // 2
        start = torch.randint(len(obs), (num_model_rows,))
        for name, value in dict(
            members=torch.arange(args.active_models),  # which of the pool are active
            # running sums of Δ / mean Δ and of their weights; to begin with, one pseudo-observation of average quality
            evidence_sum=torch.ones(args.pool_size, dtype=torch.float64),
            evidence_weight=torch.ones(args.pool_size, dtype=torch.float64),
            rollout_obs=obs[start.to(obs.device)].clone(),
            rollout_age=torch.randint(args.rollout_horizon, (num_model_rows,)),  # so that not all end at once
            log_alpha=torch.tensor(math.log(args.alpha)),
            log_eta=torch.tensor(0.0),
            updates=torch.tensor(0),  # of π since π_i
            policy_iteration=torch.tensor(0),  # i of Eq. (9)
        ).items():
            self.register_buffer(name, value)
        self.to(obs.device)
        # Rewards are divided by their range, not shifted: a shift would pay or punish staying alive.
        low, high = data["rewards"].min().item(), data["rewards"].max().item()
        self.reward_scale = (high - low) or max(abs(high), 1.0)
        steps = 1 / (1 - args.gamma) if args.gamma < 1 else args.rollout_horizon
        self.value_bounds = [bound * steps / self.reward_scale for bound in (min(low, 0.0), max(high, 0.0))]
        self.actor_optimizer = Adam((self.actor.parameters(), args.actor_lr))
        self.critic_optimizer = Adam((self.critic.parameters(), args.critic_lr))

    # --- Behaviour policy ---

    def clone_behaviour(self, bar: Callable, checkpoint: "Checkpoint | None" = None, state: dict | None = None) -> None:
        """μ by maximum likelihood on the data set; π and π_i start there. state: as in train_dynamics."""
        args, data = self.args, self.data
        optimizer, done = Adam((self.behaviour.parameters(), 1e-3)), 0
        if state:
            with restoring("the checkpoint"):
                self.load_state_dict(state["learner"])
                optimizer.load_state_dict(state["optimizer"])
                done = saved_update(state, args.bc_updates)
                set_rng_state(state["rng"])
        guard = Guard("behaviour update", ["loss"], {"loss": "look for extreme values in the data"}, {"loss": 1e4})

        def learn() -> torch.Tensor:
            rows = torch.randint(len(data["actions"]), (args.batch_size,), device=data["actions"].device)
            u = data["actions"][rows].clamp(-0.999, 0.999).atanh()
            loss = -gaussian_log_prob(u, *self.behaviour(data["observations"][rows])).mean()
            optimizer.minimise(loss)
            return loss.detach()[None]

        step = fast(learn, data["actions"].device, args.compile, args.bc_updates)
        for update in bar(range(done + 1, args.bc_updates + 1), initial=done, total=args.bc_updates, desc="behaviour"):
            optimizer.rates[0].fill_(1e-3 * cosine(update, args.bc_updates))
            guard.add(update, step())
            if checkpoint and checkpoint.due():
                guard.check()
                checkpoint.save(
                    phase="behaviour", done=update, learner=self.state_dict(), optimizer=optimizer.state_dict(),
                    rng=rng_state(),
                )  # fmt: skip
        guard.check()
        self.behaviour.requires_grad_(False)
        for net in (self.actor, self.previous, self.average):
            net.load_state_dict(self.behaviour.state_dict())

    # --- Posterior ---

    def redraw(self, pool: Dynamics) -> None:
        """Draw the N active models from the pool, uniformly and without replacement."""
        self.members.copy_(torch.randperm(pool.net.size, device=self.members.device)[: len(self.members)])
        self.active.load_members(pool, self.members)

    def log_belief(self) -> torch.Tensor:
        """log P over the active models, (N,)."""
        if not self.learns_belief:
            return posterior(torch.zeros_like(self.members, dtype=torch.float32), 0.0)
        evidence = self.evidence_sum[self.members] / self.evidence_weight[self.members]
        return posterior(self.scaled(evidence), self.args.likelihood_coef).float()

    def scaled(self, evidence: torch.Tensor) -> torch.Tensor:
        """Δ in the unit that --evidence-scale names, over the last dimension (the models)."""
        if self.args.evidence_scale == "spread":
            return evidence / evidence.std(-1, keepdim=True).clamp(min=1e-8)  # a shift changes nothing in Eq. (4)
        if self.args.evidence_scale == "mean":
            return evidence / evidence.mean(-1, keepdim=True).clamp(min=1e-30)
        return evidence

    def update_belief(self, obs, action, reward, next_obs, terminal, observed_target) -> None:
        """Eq. (3) on observed transitions into the running averages behind Eq. (4).

        obs and next_obs (E, obs), action (E, act), reward, terminal and the observed Bellman target (E,).
        """
        mean, std = self.active(obs, action)  # (N, E, 1+obs)
        if self.args.evidence == "likelihood":
            known = ~(terminal & (next_obs == obs).all(1))  # files without next states have a placeholder there
            delta = mean_surprise(mean, std, torch.cat([reward[:, None], next_obs], -1), known)
            delta = delta - delta.mean() + 1  # average quality is 1, as below
        else:
            # The same noise for every model, in s'' and in the actions of V: its part of Δ cancels between models.
            _, predicted = self.active.split(mean + std * torch.randn_like(mean[0]))
            next_value = self.value(predicted, common_noise=True)
            reward, terminal = mean[..., 0] / self.reward_scale, self.terminal(predicted)
            delta = model_evidence(bellman_target(reward, terminal, next_value, self.args.gamma), observed_target)
            if self.args.evidence_scale != "none":
                delta = delta / delta.mean().clamp(min=1e-30)  # the critic's scale drifts: average relative evidence
        decay = self.args.evidence_decay
        self.evidence_sum[self.members] = decay * self.evidence_sum[self.members] + delta
        self.evidence_weight[self.members] = decay * self.evidence_weight[self.members] + 1

    # --- Policy evaluation ---

    def value(self, obs: torch.Tensor, common_noise: bool = False) -> torch.Tensor:
        """V(s) of Eq. (8) by importance sampling from the mixture of μ and π: (..., obs) -> (...).

        Samples of μ alone would miss the actions where Q is high; the weights μ / (μ/2 + π/2) of the balance
        heuristic are at most 2. common_noise: the entries of the leading dimension share their noise.
        """
        args, shape = self.args, obs.shape[:-1]
        obs = obs.reshape(-1, obs.shape[-1])
        pi_mean, pi_log_std = self.actor(obs)  # (B, act)
        copies = shape[0] if common_noise else 1
        noise = torch.randn(args.action_samples, len(obs) // copies, pi_mean.shape[-1], device=obs.device)
        noise = noise.repeat(1, copies, 1)  # (M, B, act)
        if not args.regularization:  # α = 0: no μ, the plain policy evaluation of Eq. (5)
            u = pi_mean + pi_log_std.exp() * noise
            return self.q_value(self.target_critic, obs, u).mean(0).clamp(*self.value_bounds).view(shape)
        mu_mean, mu_log_std = self.behaviour(obs)
        from_mu, from_pi = noise.chunk(2)
        u = torch.cat([mu_mean + mu_log_std.exp() * from_mu, pi_mean + pi_log_std.exp() * from_pi])
        log_weights = mixture_log_weights(u, mu_mean, mu_log_std, pi_mean, pi_log_std)
        value = soft_value(self.q_value(self.target_critic, obs, u), log_weights, self.log_alpha.exp())
        return value.clamp(*self.value_bounds).view(shape)

    def q_value(self, critic: Critic, obs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The smaller of the twin critics at action tanh(u): (B, obs), (M, B, act) -> (M, B)."""
        flat = critic(obs.repeat(len(u), 1), u.tanh().reshape(-1, u.shape[-1]))  # (2, M * B)
        return flat.amin(0).view(len(u), len(obs))

    def model_targets(self, obs, action) -> tuple[torch.Tensor, ...]:
        """Posterior-sampled y of Eq. (6) and a rollout step: (B, obs), (B, act) -> y (B,), s' (B, obs), end (B,)."""
        args = self.args
        rows = torch.arange(len(obs), device=obs.device)
        mean, std = self.active(obs, action)  # (N, B, 1+obs)
        log_belief = self.log_belief()  # (N,)
        drawn = args.posterior == "uniform" or self.learns_belief
        if drawn:
            member = sample_models(log_belief, (args.model_samples, len(obs)))  # (K, B)
        else:  # every active model is asked, once
            member = torch.arange(len(mean), device=obs.device)[:, None].expand(-1, len(obs))  # (N, B)
        mean, std = mean[member, rows], std[member, rows]  # (K, B, 1+obs)
        sample = mean + std * torch.randn_like(mean)
        reward, next_obs = self.active.split(sample)
        terminal = self.terminal(next_obs)
        target = bellman_target(reward / self.reward_scale, terminal, self.value(next_obs), args.gamma)
        if drawn:
            return target.mean(0), next_obs[0], terminal[0]
        if args.posterior == "pessimistic":
            y = target.kthvalue(args.pessimistic_k, dim=0).values
            successor = sample_models(log_belief, (1, len(obs)))[0]
        else:  # reading B: the model's residual against the critic itself, a posterior of its own for every (s, a)
            residual = (target - self.target_critic(obs, action).amin(0)).double().square().T  # (B, N)
            log_belief = posterior(self.scaled(residual), args.likelihood_coef).float()
            y = (log_belief.exp().T * target).sum(0)
            successor = sample_models(log_belief, (1, len(obs)))[0]
        return y, next_obs[successor, rows], terminal[successor, rows]

    # --- One iteration ---

    def iterate(self) -> torch.Tensor:
        """One step of every rollout, one update of all that is learnt and of the multipliers; returns METRICS, (M,)."""
        args, data, num_data_rows = self.args, self.data, self.args.batch_size - self.args.batch_size // 2
        rows = torch.randint(len(data["rewards"]), (num_data_rows,), device=self.rollout_obs.device)
        obs, action, reward, next_obs, terminal = (
            data[k][rows] for k in ("observations", "actions", "rewards", "next_observations", "terminals")
        )
        with torch.no_grad():
            data_target = bellman_target(reward / self.reward_scale, terminal, self.value(next_obs), args.gamma)
            if self.learns_belief:
                few = slice(args.evidence_rows)
                self.update_belief(*(x[few] for x in (obs, action, reward, next_obs, terminal, data_target)))
            pi_mean, pi_log_std = self.actor(self.rollout_obs)
            rollout_action = (pi_mean + pi_log_std.exp() * torch.randn_like(pi_mean)).tanh()
            model_target, rollout_next, rollout_terminal = self.model_targets(self.rollout_obs, rollout_action)
        obs, action = torch.cat([obs, self.rollout_obs]), torch.cat([action, rollout_action])
        target = torch.cat([data_target, model_target])

        # Eq. (6): a stochastic gradient step of both critics towards y
        q = self.critic(obs, action)  # (2, B)
        critic_loss = (q - target).square().mean(1).sum()
        self.critic_optimizer.minimise(critic_loss)

        # Eq. (9): a stochastic gradient step of the policy, then of the multipliers
        pi_mean, pi_log_std = self.actor(obs)
        noise = torch.randn(args.action_samples // 2, *pi_mean.shape, device=obs.device)
        u = pi_mean + pi_log_std.exp() * noise  # (M/2, B, act)
        q_pi = self.q_value(self.critic, obs, u)  # (M/2, B)
        with torch.no_grad():
            mu, previous = self.behaviour(obs), self.previous(obs)
        kl_behaviour = gaussian_kl(pi_mean, pi_log_std, *mu)
        kl_previous = gaussian_kl(pi_mean, pi_log_std, *previous)
        with torch.no_grad():  # π becomes the next π_i only where the constraint of Eq. (9) holds
            self.updates.add_(1)
            accept = (self.updates >= args.trust_region_every) & (kl_previous.mean() <= args.trust_region)
            for mine, theirs in zip(self.previous.parameters(), self.actor.parameters(), strict=True):
                mine.lerp_(theirs, accept.float())
            self.updates.mul_(~accept)
            self.policy_iteration.add_(accept)
        alpha = self.log_alpha.exp() if args.regularization else 0.0
        actor_loss = -policy_objective(q_pi.mean(0), alpha, kl_behaviour, self.log_eta.exp(), kl_previous)
        if args.projection == "symmetric" and args.regularization:
            with torch.no_grad():  # samples of the mixture of μ and π, as for V
                u = torch.cat([mu[0] + mu[1].exp() * torch.randn_like(noise), u])  # (M, B, act)
                q = torch.cat([self.q_value(self.critic, obs, u[: len(noise)]), q_pi])
                log_weights = mixture_log_weights(u, *mu, pi_mean, pi_log_std)
            log_pi = gaussian_log_prob(u, pi_mean, pi_log_std)
            actor_loss = actor_loss + alpha * projection_loss(q, log_weights, alpha, log_pi)
        self.actor_optimizer.minimise(actor_loss)

        with torch.no_grad():
            # Dual ascent: η grows while the constraint of Eq. (9) is violated and shrinks while it is slack.
            violation = (kl_previous.mean() / args.trust_region - 1).clamp(-1, 1)
            self.log_eta.add_(args.eta_lr * violation).clamp_(-6, 6)
            if args.target_kl > 0:
                excess = kl_behaviour.mean() / args.target_kl - 1
                self.log_alpha.add_(args.alpha_lr * excess.clamp(-1, 1))
            follow(self.target_critic, self.critic, args.target_rate)
            follow(self.average, self.actor, args.average_rate)
            # Rollouts go on from the sampled next state; a finished one starts again at a state of the data.
            self.rollout_age.add_(1)
            restart = rollout_terminal | (self.rollout_age >= args.rollout_horizon)
            rows = torch.randint(len(data["rewards"]), restart.shape, device=restart.device)
            fresh = data["observations"][rows]
            self.rollout_obs.copy_(torch.where(restart[:, None], fresh, rollout_next))
            self.rollout_age.mul_(~restart)
            log_belief = self.log_belief()
        with torch.no_grad():
            return torch.stack([  # in the order of METRICS
                rollout_next.abs().max(), target.abs().max(), critic_loss, q[:, :num_data_rows].mean(),
                q[:, num_data_rows:].mean(), q.max(), -actor_loss, kl_behaviour.mean(), kl_previous.mean(),
                self.log_eta.exp(), self.log_alpha.exp(), pi_log_std.mean(), self.policy_iteration.float(),
                -(log_belief.exp() * log_belief).sum(), log_belief.max().exp(), rollout_terminal.float().mean(),
            ])  # fmt: skip

    # --- Diagnostics ---

    def metric_bounds(self) -> dict[str, float]:
        """What the rewards allow the critic to be, at most; targets are clipped to it."""
        bound = max(map(abs, self.value_bounds))
        return {f"critic/{name}": bound for name in ("target_max", "q_data", "q_model", "q_max")}

    @torch.no_grad()
    def predicted_return(self, obs: torch.Tensor, steps: int) -> torch.Tensor:
        """Undiscounted return of the evaluated policy in the models, τ ~ P anew at every step, Eq. (1): (B,)."""
        total, alive = torch.zeros_like(obs[:, 0]), torch.ones_like(obs[:, 0])
        rows, log_belief = torch.arange(len(obs), device=obs.device), self.log_belief()
        for _ in range(steps):
            mean, std = self.active(obs, self.average(obs)[0].tanh())
            member = sample_models(log_belief, (len(obs),))
            sample = mean[member, rows] + std[member, rows] * torch.randn_like(mean[0])
            reward, obs = self.active.split(sample)
            total += alive * reward
            alive *= ~self.terminal(obs)
        return total

    @torch.no_grad()
    def target_and_uncertainty(self, num_states: int = 2000) -> tuple[np.ndarray, np.ndarray]:
        """Figure 3: P's mean and standard deviation of the models' targets, s from the data, a ~ π: (n,) each."""
        obs = self.data["observations"][torch.randint(len(self.data["rewards"]), (num_states,))]
        pi_mean, pi_log_std = self.actor(obs)
        mean, std = self.active(obs, (pi_mean + pi_log_std.exp() * torch.randn_like(pi_mean)).tanh())
        _, next_obs = self.active.split(mean + std * torch.randn_like(mean[0]))  # the same noise for every model
        reward, terminal = mean[..., 0] / self.reward_scale, self.terminal(next_obs)
        target = bellman_target(reward, terminal, self.value(next_obs, common_noise=True), self.args.gamma)
        belief = self.log_belief().exp()[:, None]
        average = (belief * target).sum(0)
        return average.cpu().numpy(), (belief * (target - average).square()).sum(0).sqrt().cpu().numpy()

    @torch.no_grad()
    def start_value(self, obs: torch.Tensor) -> float:
        """The critic's value E_{s₀} min Q(s₀, tanh(mean)), in the data's reward units."""
        return (self.critic(obs, self.average(obs)[0].tanh()).amin(0).mean() * self.reward_scale).item()


# --- Run folder: identical in every script of this project (tests/test_shared_blocks.py) ---
SCRIPT = Path(__file__).read_bytes()  # as it was imported: a run folder keeps it, a checkpoint knows its hash
MAY_CHANGE = ("track", "wandb_project", "capture_video", "checkpoint_minutes")  # what --resume heeds of other flags


def command_line(args_class: type, description: str) -> Any:
    """The command line as an `args_class`. Raises UserError: also for a flag that contradicts the run of --resume."""

    def parse(**options) -> Any:
        text = io.StringIO()
        try:
            with contextlib.redirect_stderr(text):
                return tyro.cli(args_class, description=description, **options)
        except SystemExit as error:
            lines = [line.strip("╭╮╰╯│─ ") for line in text.getvalue().splitlines()[1:]]
            require(not error.code, ": ".join(filter(None, lines)))  # 0: --help, which is printed by now
            raise

    args = parse()
    for name, value in vars(args).items():
        fine = not isinstance(value, int) or abs(value) < 2**31
        require(fine, f"--{name.replace('_', '-')} {value}: must be below {2**31:,}")
    if args.resume:
        saved = checkpoint_args(args_class, load_checkpoint(Path(args.resume)))
        given = vars(parse(default=saved))  # a flag that was not typed has the run's own value
        for name, value in vars(saved).items():
            same = given[name] == value or name in (*MAY_CHANGE, "resume")
            flag, own = "--" + name.replace("_", "-"), f"{args.resume} has {value}"
            require(same, f"{flag} {given[name]}: {own}: leave {flag} out to go on, or --resume to start anew")
    return args


def exit_cleanly(work: Callable[[], Any]) -> None:
    """Call `work`; what a user can put right ends in one line on stderr and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal can show γ
    try:
        work()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full or unwritable disk; checkpoints on it are whole
        message = str(UserError(f"{error}; the last checkpoint, if any, is intact"))
    except (MemoryError, RuntimeError) as error:  # PyTorch has a type of its own for the GPU's memory only
        texts = ("out of memory", "allocate memory", "not enough memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(x in str(error) for x in texts):
            raise
        reason = str(UserError(str(error).rpartition("] ")[2][:200]))
        message = f"out of memory ({reason}): use smaller batches, networks or data, or another machine"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def make_run_dir(args: Any) -> Path:
    """<runs_dir>/<env>__<exp>__<seed>__<time>, new, with args.json and this script in it. Raises UserError."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "_")
    run_dir, number = Path(args.runs_dir) / name, 2
    try:
        while run_dir.exists():  # another run started in this second
            run_dir, number = run_dir.with_name(f"{name}-{number}"), number + 1
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        (run_dir / Path(__file__).name).write_bytes(SCRIPT)
    except OSError as error:
        raise UserError(f"cannot write {run_dir}: {error}: choose another --runs-dir") from error
    return run_dir


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, which becomes `path` when the block has ended well: `path` is always a whole file."""
    part = path.with_stem(path.stem + ".part")
    try:
        yield part
        if part.exists():
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_atomically(content: dict, path: Path) -> None:
    """torch.save and the file's SHA-256 after it, flushed to the disk, then renamed. Raises UserError."""
    try:
        with replacing(path) as part, open(part, "w+b") as file:
            torch.save(content, file)  # its zip format has no checksum that torch.load would check
            file.seek(0)
            file.write(b"sha256:" + hashlib.file_digest(file, "sha256").hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}: free space or choose another --runs-dir") from error


def load_tensors(path: Path | str, kind: str, device: str = "cpu") -> dict:
    """Read what save_atomically wrote; nothing in it is executed. Raises UserError unless it is whole and of that kind.

    A file without a checksum is read too: one that a user made with torch.save.
    """
    try:
        data = Path(path).read_bytes()
        data, mark, digest = data[:-71], data[-71:-64], data[-64:]
        altered = mark == b"sha256:" and hashlib.sha256(data).hexdigest().encode() != digest
        require(not altered, f"{path} was altered or damaged (wrong SHA-256): use one that a run saved")
        content = torch.load(io.BytesIO(data + mark + digest), map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a {kind} file") from None
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load raises many types on broken files
        reason = f"{type(error).__name__}: {error}"[:160]
        raise UserError(f"{path} is not a readable {kind} file ({reason}): use one that a run saved") from None
    is_kind = isinstance(content, dict) and content.get("kind") == kind
    require(is_kind, f"{path} is not a {kind} file: use one that a run of this project saved")
    return content


@contextlib.contextmanager
def restoring(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong while a readable file is put to use is the file's fault. Raises UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a key, a type, a shape
        reason = f"{type(error).__name__}: {error}"[:160]
        raise UserError(f"{path} does not fit this run ({reason}): use one that a run saved") from error


def load_checkpoint(run_dir: Path) -> dict:
    """RUN_DIR/checkpoint.pt, refused if another version of this script wrote it. Raises UserError."""
    path, name = run_dir / "checkpoint.pt", Path(__file__).name
    saved = load_tensors(path, f"{Path(name).stem} checkpoint")
    ours, theirs = hashlib.sha256(SCRIPT).hexdigest()[:12], str(saved.get("script_sha256"))[:12]
    remedy = f"PYTHONPATH={shlex.quote(str(Path(__file__).parent))} python {shlex.quote(str(run_dir / name))}"
    remedy = f"go on with the version that it kept: {remedy} --resume {shlex.quote(str(run_dir))}"
    require(ours == theirs, f"{path} is of {name} with SHA-256 {theirs}, this is {ours}: {remedy}")
    seconds = saved.get("seconds")
    require(type(seconds) is float and 0 <= seconds < math.inf, f"{path} has no running time: use one that a run saved")
    return saved


def checkpoint_args(args_class: type, saved: dict) -> Any:
    """The arguments in a checkpoint, their types checked. Raises UserError."""

    def fits(value: Any, hint: Any) -> bool:
        if get_origin(hint) is Literal:
            return value in get_args(hint)
        if get_origin(hint) is tuple:
            kinds = [kind for kind in get_args(hint) if kind is not ...]
            kinds = kinds if len(kinds) > 1 else kinds * len(value)  # (x, y, z), or any number of x
            return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
        if get_args(hint):  # a union
            return any(fits(value, choice) for choice in get_args(hint))
        return type(value) is hint

    with restoring("the checkpoint"):
        args = args_class(**saved["args"])
        bad = [name for name, hint in get_type_hints(args_class).items() if not fits(getattr(args, name), hint)]
        require(not bad, f"the checkpoint has bad arguments ({', '.join(bad)}): use one that a run saved")
    return args


def saved_history(saved: dict, iterations: int, columns: Sequence[str]) -> tuple[int, list[dict]]:
    """(iteration, rows of metrics.csv) of a checkpoint. Raises UserError unless a run can have come that far."""
    iteration, rows = saved["iteration"], saved["rows"]
    steps = [row["iteration"] for row in rows]
    fine = type(iteration) is int and 0 <= iteration <= iterations and steps == sorted(set(steps))
    fine = fine and type(rows) is list and all(type(step) is int and 0 < step <= iteration for step in steps)
    fine = fine and (iteration < iterations or steps[-1:] == [iteration])
    for row in rows:
        numbers = all(type(value) is float for key, value in row.items() if key != "iteration")
        fine = fine and numbers and row.keys() == rows[0].keys() and row.keys() >= set(columns)
    require(fine, "the checkpoint's history is not one of a run with its arguments: use one that a run saved")
    return iteration, rows


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on beside script, arguments and data."""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "minari")
    return {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads(),
        "platform": platform.platform(), "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if importlib.util.find_spec(name)},
        "C++ compiler": shutil.which(os.environ.get("CXX", "g++")) is not None,  # --compile auto asks for one
    }  # fmt: skip


class Checkpoint:
    """RUN_DIR/checkpoint.pt: what it knows of its run, when it is written, and how a run ends before its time.

    Inside `with`, Ctrl-C and SIGTERM are noted and make `due()` true: the script saves at its next step, and the run
    ends there with the command to go on with, exit code 130 or 143. A second one ends it at once; the checkpoint
    before stays.
    """

    def __init__(self, run_dir: Path, identity: dict, minutes: float, seconds: float = 0.0):
        self.run_dir, self.identity, self.minutes = run_dir, identity, minutes
        self.signal, self.at_once, self.handlers = None, False, {}
        self.saved = time.monotonic()
        self.started = self.saved - seconds  # of the whole run, what came before --resume included

    def check(self, saved: dict) -> None:
        """Refuse what was saved with other data or another environment; name what else differs. Raises UserError."""
        remedies = dict(environment="install what it ran in", data_sha256="restore the data, or start anew")
        for key, remedy in remedies.items():
            ours, theirs, what = self.identity[key], saved.get(key), key.removesuffix("_sha256")
            what = f"{self.run_dir} was trained on other {what} ({str(theirs)[:60]}) than there is now ({ours[:60]})"
            require(ours == theirs, f"{what}: {remedy}")
        for key, ours in self.identity["machine"].items():
            theirs = saved.get("machine", {}).get(key)
            if ours != theirs and key != "platform":
                print(f"note: {key} was {theirs}, is {ours}: numbers may differ from an uninterrupted run's")

    def __enter__(self) -> "Checkpoint":
        if threading.current_thread() is threading.main_thread():  # no other may do this
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a background job
                    self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: Any) -> None:
        first, self.signal = self.signal is None, number
        if self.at_once or not first:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping at the next step (the same again: at once)\n")  # print is not safe in here

    def due(self) -> bool:
        """After a signal, or `minutes` after the last checkpoint; costs nothing worth mentioning."""
        return self.signal is not None or time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, **content) -> None:
        """Replace the last checkpoint; then, after a signal, end the run. Raises UserError, KeyboardInterrupt."""
        content = self.identity | content | {"seconds": time.monotonic() - self.started}
        save_atomically(content, self.run_dir / "checkpoint.pt")
        self.saved = time.monotonic()
        if self.signal is not None:
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Nothing is left to save: from here on a signal ends the run at once."""
        self.at_once = True
        if self.signal is not None:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            command = f"python {Path(__file__).name} --resume {shlex.quote(str(self.run_dir))}"
            exists = (self.run_dir / "checkpoint.pt").exists()
            message = f"go on with {command}" if exists else "no checkpoint yet, run the same command again"
            print(f"\ninterrupted: {message}", file=sys.stderr)
            raise SystemExit(128 + (self.signal or signal.SIGINT)) from None


class Guard:
    """Stops a run whose numbers run away, without waiting for the device at every step: it looks at 100 at a time.

    names: the entries of a row, in the order in which they are computed, so that the first bad one is the cause.
    causes: what to tell the user, by the first part of a name ("critic" of "critic/loss"). bounds: what an entry
    can be at most; it runs away when it is 100 times that, and 100 times what it was at first.
    """

    def __init__(self, what: str, names: Sequence[str], causes: dict[str, str], bounds: dict[str, float]):
        self.what, self.names, self.causes = what, list(names), causes
        self.bounds = torch.tensor([100 * bounds.get(name, math.inf) for name in names])
        self.steps, self.rows, self.first = [], [], True

    def add(self, step: int, row: torch.Tensor) -> None:
        """row: (names,), which nobody writes to later. Raises UserError, at the latest 100 steps later."""
        self.steps.append(step)
        self.rows.append(row)
        if len(self.rows) == 100:
            self.check()

    def check(self) -> None:
        """Look at the rows that were added since the last time. Raises UserError."""
        if not self.rows:
            return
        rows, steps = torch.stack(self.rows).abs().cpu(), self.steps
        self.steps, self.rows = [], []
        if self.first:  # before anything was learnt
            self.bounds, self.first = torch.maximum(self.bounds, 100 * rows[0].nan_to_num(0, 0)), False
        bad = ~(rows.isfinite() & (rows <= self.bounds))
        if bad.any():
            i = int(bad.any(1).nonzero()[0])
            names = [name for name, is_bad in zip(self.names, bad[i].tolist(), strict=True) if is_bad]
            how = "exploding" if rows[i][bad[i]].isfinite().all() else "not finite"
            cause = self.causes[names[0].split("/")[0]]
            raise UserError(f"{self.what} {steps[i]}: {', '.join(names)} {how}: {cause}")


class RunLog:
    """metrics.csv and TensorBoard in one; `rows` is the whole history, part of the checkpoint."""

    def __init__(self, run_dir: Path, rows: list[dict]):
        self.path, self.rows = run_dir / "metrics.csv", rows
        # TensorBoard forgets what an earlier process logged after the checkpoint
        self.writer = SummaryWriter(str(run_dir), purge_step=rows[-1]["iteration"] + 1 if rows else 0)
        self.write_csv()

    def write_csv(self) -> None:
        with replacing(self.path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0] if self.rows else [])
            if self.rows:
                writer.writeheader()
            writer.writerows(self.rows)

    def append(self, row: dict) -> None:
        """A row has the key "iteration" and the same keys every time. It is in both files when this returns."""
        self.rows.append(row)
        self.write_csv()
        for key, value in row.items():
            self.writer.add_scalar(key, value, row["iteration"])
        self.writer.flush()


def rng_state() -> dict[str, torch.Tensor]:
    """The states of PyTorch's random generators, for a checkpoint."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what rng_state returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def confidence_interval(x: np.ndarray) -> float:
    """Half-width of the normal 95% interval of the mean of (n,) values."""
    return float(1.96 * x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


# --- end of the shared run-folder block ---


# --- Evaluation ---


def evaluate(act: Callable, make_env: Callable, episodes: int, seed: int, gamma: float) -> dict[str, np.ndarray]:
    """Play episodes, one each on a number of environments side by side, with one batched policy call per step.

    The environments share the cores: MuJoCo lets go of Python while it computes, so threads do. Episode i starts
    from `reset(seed=seed + i)`, whatever the policy: two policies meet the same starts. Returns "returns" and
    "discounted", (episodes,) float64, and "start", the first observations (episodes, obs).
    """
    envs = [make_env() for _ in range(min(episodes, 25))]
    low, high = envs[0].action_space.low, envs[0].action_space.high
    out = {"returns": np.zeros(episodes), "discounted": np.zeros(episodes)}
    start = [None] * episodes
    lanes, episode = list(range(len(envs))), list(range(len(envs)))
    obs, steps, waiting = [None] * len(envs), [0] * len(envs), len(envs)
    for i in lanes:
        obs[i] = start[i] = envs[i].reset(seed=seed + i)[0]

    def step(part: list[tuple[int, np.ndarray]]) -> list[tuple]:
        return [envs[i].step(action) for i, action in part]

    threads = min(len(envs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    pool = ThreadPoolExecutor(threads)
    while lanes:
        # D4RL clips actions before every step, Gymnasium does not, and the control cost sees the difference
        actions = np.clip(act(np.stack([obs[i] for i in lanes])), low, high)
        work, size = list(zip(lanes, actions, strict=True)), math.ceil(len(lanes) / threads)
        steps_taken = pool.map(step, [work[k : k + size] for k in range(0, len(work), size)])
        for i, (next_obs, reward, terminated, truncated, _) in zip(
            list(lanes), itertools.chain(*steps_taken), strict=True
        ):
            out["returns"][episode[i]] += float(reward)
            out["discounted"][episode[i]] += gamma ** steps[i] * float(reward)
            obs[i], steps[i] = next_obs, steps[i] + 1
            if (terminated or truncated) and waiting < episodes:
                episode[i], steps[i] = waiting, 0
                obs[i] = start[waiting] = envs[i].reset(seed=seed + waiting)[0]
                waiting += 1
            elif terminated or truncated:
                lanes.remove(i)
    pool.shutdown()
    for env in envs:
        env.close()
    return out | {"start": np.stack(start)}


def evaluate_liquidation(act: Callable, episodes: int, seed: int, gamma: float) -> dict[str, np.ndarray]:
    """The same for liquidation, all episodes at once; one seed is one set of price paths for every policy."""
    envs = gym.make_vec("liquidation_env:Liquidation-v0", num_envs=episodes)
    obs, _ = envs.reset(seed=seed)
    out = {"returns": np.zeros(episodes), "discounted": np.zeros(episodes), "start": obs.copy()}
    alive, step = np.ones(episodes, bool), 0
    while alive.any():
        obs, reward, terminated, truncated, _ = envs.step(act(obs))
        out["returns"] += alive * reward
        out["discounted"] += alive * reward * gamma**step
        alive, step = alive & ~(terminated | truncated), step + 1
    envs.close()
    return out


def normalised_score(returns: float | np.ndarray, domain: str) -> float | np.ndarray:
    """Eq. (15). A difference of returns must be divided by the same range, not passed through here."""
    low, high = REFERENCE_RETURNS[domain]
    return 100 * (returns - low) / (high - low)


def save_gif(act: Callable, make_env: Callable, seed: int, path: Path) -> None:
    """One episode of the policy as an animated GIF, at most 1000 frames."""
    import imageio.v3 as imageio

    env = make_env(render_mode="rgb_array")
    obs, frames, done = env.reset(seed=seed)[0], [], False
    while not done and len(frames) < 1000:
        frames.append(env.render())
        action = np.clip(act(obs[None])[0], env.action_space.low, env.action_space.high)
        obs, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    env.close()
    imageio.imwrite(path, np.stack(frames), duration=40 if len(frames) > 100 else 400, loop=0)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays without ties."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def plot(result: dict, curve: list[dict], target: np.ndarray, uncertainty: np.ndarray, act, path: Path) -> None:
    """Learning curve, predicted and real return (Figure 2), target and uncertainty (Figure 3), and for liquidation
    where the policy sells beside the exact stopping boundary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    liquidation = result["domain"] == "liquidation"
    fig, axes = plt.subplots(1, 3 + liquidation, figsize=(4.2 * (3 + liquidation), 3.6), layout="constrained")
    iterations = [row["iteration"] for row in curve]
    axes[0].plot(iterations, [row["eval/score"] for row in curve], "o-", ms=3, label=f"seed {result['args']['seed']}")
    lines = {"exact optimum": ("optimum_score", "k-"), "paper": ("paper_score", "k--")}
    lines["behaviour in the data"] = ("behaviour_data_score", "k:")
    for name, (key, style) in lines.items():
        if result[key] is not None:
            axes[0].axhline(result[key], color=style[0], ls=style[1:], lw=1, label=f"{name}: {result[key]:.1f}")
    name = figure_name(result["env_id"], result["dataset"]["source"])
    axes[0].set(xlabel="iteration", ylabel="score, Eq. (15)", title=f"{name}: learning curve")
    for key, label in {"predicted_return": "predicted by the models", "return": "in the environment"}.items():
        axes[1].plot(iterations, [row[f"eval/{key}"] for row in curve], "o-", ms=3, label=label)
    axes[1].set(xlabel="iteration", ylabel="return", title="Predicted and real return (Figure 2)")
    axes[2].scatter(uncertainty, target, s=4, alpha=0.4, linewidths=0)
    axes[2].set(
        xlabel="standard deviation over models", ylabel="TD target (reward ranges)",
        title=f"Figure 3: rank correlation {result['spearman']:.2f}",
    )  # fmt: skip
    if liquidation:
        import liquidation_env

        price, step = np.linspace(0.5, 2.75, 181), np.arange(20)
        grid = np.stack(np.broadcast_arrays(step[:, None], 100.0, price[None]), -1).reshape(-1, 3)
        sold = act(grid.astype(np.float32)).clip(0, 1).reshape(20, -1)
        image = axes[3].pcolormesh(step, price, sold.T, cmap="Blues", vmin=0, vmax=1, shading="nearest")
        fig.colorbar(image, ax=axes[3], label="fraction sold")
        for gamma, style in {result["args"]["gamma"]: "--", 1.0: "-"}.items():
            boundary = liquidation_env.optimal_value(discount=gamma).boundary
            axes[3].plot(step, np.maximum(boundary, 0.5), "r" + style, lw=1.5, label=f"exact boundary, γ = {gamma:g}")
        axes[3].set(xlabel="step", ylabel="price", title="Where it sells (inventory 100)")
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# --- Main ---


def resolve(args: Args) -> tuple[Args, str]:
    """Fill what the command line left open from the domain's table and check it: (args, domain). Raises UserError."""
    domain = (args.env_id.split("/")[-2] if "/" in args.env_id else args.env_id.split("-")[0]).lower()
    near = " or ".join(difflib.get_close_matches(args.env_id, ["liquidation", *D4RL_FILES], n=3, cutoff=0.4))
    known = f"the environments with a known termination rule are {', '.join(DOMAINS)}"
    require(domain in DOMAINS, f"unknown --env-id {args.env_id}: {f'did you mean {near}? ' if near else ''}{known}")
    if args.quick and domain == "liquidation":
        print("--quick changes nothing here: liquidation's own setting is CPU-sized")
    table = DOMAINS[domain] | (QUICK if args.quick and domain != "liquidation" else {})
    given = vars(args)
    args = Args(**{name: table.get(name) if value is None else value for name, value in given.items()})
    if args.dynamics_path:  # the file tells
        args.pool_size = given["pool_size"]

    may_be_zero = ("num_threads", "redraw_every", "dynamics_patience", "evidence_decay", "likelihood_coef", "target_kl")
    may_be_zero += ("checkpoint_minutes",)
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed":
            low = "0 or more" if name in may_be_zero else "greater than 0"
            fine = math.isfinite(value) and (value > 0 or (value == 0 and name in may_be_zero))
            require(fine, f"--{name.replace('_', '-')} {value}: must be {low}")
    for name, fine, remedy in (
        ("gamma", args.gamma <= 1, "must be at most 1"),
        ("gamma", args.gamma < 1 or domain == "liquidation", "only liquidation has a horizon that allows γ = 1"),
        ("target_rate", args.target_rate <= 1, "must be at most 1"),
        ("evidence_decay", args.evidence_decay < 1, "must be below 1"),
        (
            "evidence_scale",
            (args.evidence, args.evidence_scale) != ("likelihood", "mean"),
            "a log-likelihood has no unit to divide by: use spread or none",
        ),
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("active_models", args.active_models >= 2, "must be at least 2, or there is nothing to weigh"),
        ("active_models", args.active_models <= (args.pool_size or math.inf), f"the pool has only {args.pool_size}"),
        ("pessimistic_k", args.pessimistic_k <= args.active_models, f"only {args.active_models} models are active"),
        ("action_samples", args.action_samples % 2 == 0, "must be even: half are drawn from μ, half from π"),
        ("batch_size", args.batch_size >= 2, "must be at least 2: half are data rows, half model rows"),
        ("evidence_rows", args.evidence_rows <= (args.batch_size + 1) // 2, "must be at most half of --batch-size"),
    ):
        require(fine, f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")
    return args, domain


def load_pool(path: Path | str, args: Args, dataset: Dataset, device: torch.device) -> tuple[Dynamics, dict]:
    """The pool that a run saved, refused if it does not fit the data set; args' sizes become the file's."""
    saved = load_tensors(path, "dynamics", device)
    with restoring(path):
        theirs, ours = f"{saved['dataset']} {saved['data_sha256'][:12]}", f"{dataset.name} {dataset.sha256[:12]}"
        same = saved["data_sha256"] == dataset.sha256
        require(same, f"{path} was trained on {theirs}, this is {ours}: leave --dynamics-path out to train a new pool")
        size, _, _, hidden, layers = saved["sizes"]
        require(args.active_models <= size, f"--active-models {args.active_models}: {path} has only {size}")
        args.pool_size, args.dynamics_hidden, args.dynamics_layers = size, hidden, layers
        obs_dim, act_dim = dataset.observations.shape[1], dataset.actions.shape[1]
        same = saved["pool"]["net.weights.0"].shape == (size, obs_dim + act_dim, hidden)  # before memory is taken
        same = same and len(saved["pool"]) == 2 * layers + 7 and len(saved["report"]["explained_variance_mean"])
        require(same, f"{path}: its weights are not of its sizes: use one that a run saved")
        pool = Dynamics(size, obs_dim, act_dim, hidden, layers).to(device)
        pool.load_state_dict(saved["pool"])
        require(all(x.isfinite().all() for x in pool.parameters()), f"{path} has weights that are not finite")
        return pool, saved["report"]


def make_eval_env(args: Args, domain: str, dataset: Dataset, **kwargs) -> gym.Env:
    """The evaluation environment: --eval-env-id, else the data set's own (Minari), else -v4 (D4RL)."""
    env_id = args.eval_env_id or EVAL_ENVS.get(domain, "liquidation_env:Liquidation-v0")
    if dataset.env_spec and not args.eval_env_id:
        env_id = registered(dataset.env_spec)
    with warnings.catch_warnings():  # -v4 is what D4RL's data need; Gymnasium says that it is old every time
        warnings.filterwarnings("ignore", message=".*is out of date")
        try:
            return gym.make(env_id, **kwargs)
        except Exception as error:  # an unknown id, or whatever the environment's own code raises
            what = f"cannot make the evaluation environment {getattr(env_id, 'id', env_id)}"
            raise UserError(f"{what}: {type(error).__name__}: {error}: check --eval-env-id") from error


def actor_file(actor: Actor, args: Args, domain: str, dataset: Dataset) -> dict:
    """All that is needed to act, as tensors and plain values (docs/pspo.md shows the lines that play it).

    h = (obs − obs_mean) / obs_std, then h = h @ weight + bias with ReLU between the layers; the last output is mean
    and log-std (clipped to log_std_range) of a diagonal Gaussian; the action is tanh of its mean, or of a sample.
    """
    layers = zip(actor.net.weights, actor.net.biases, strict=True)
    return {
        "kind": "actor", "script": "pspo", "env_id": args.env_id, "domain": domain, "data_sha256": dataset.sha256,
        "layers": [{"weight": w[0].detach().cpu().clone(), "bias": b[0, 0].detach().cpu().clone()} for w, b in layers],
        "activation": "relu", "squash": "tanh of the sample", "log_std": None, "log_std_range": [-5.0, 2.0],
        "obs_mean": actor.obs_mean.cpu().clone(), "obs_std": actor.obs_std.cpu().clone(),
    }  # fmt: skip


def compare_with_optimum(args: Args, returns: np.ndarray, play: Callable) -> dict:
    """The exact optimum of liquidation and the paired difference to the optimal policy on the same price paths.

    The difference has a far smaller error than either return; the exact value plus the mean difference is the
    estimate of the policy's return, reported as a share of the optimum and of what is optimal for the run's γ.
    """
    import liquidation_env

    exact, discounted = liquidation_env.optimal_value(), liquidation_env.optimal_value(discount=args.gamma)
    ceiling = liquidation_env.threshold_value(discounted.boundary)
    best = play(liquidation_env.optimal_policy(), episodes=len(returns), seed=args.seed + 20_000)["returns"]
    difference = returns - best
    estimate = exact.value + difference.mean()
    return {
        "optimum": exact.value, "optimum_score": normalised_score(exact.value, "liquidation"),
        "paired_difference": difference.mean(), "paired_difference_ci95": confidence_interval(difference),
        "share_of_optimum": estimate / exact.value,
        "share_of_optimum_ci95": confidence_interval(difference) / exact.value,
        "discount_ceiling": ceiling, "share_of_discount_ceiling": estimate / ceiling,
    }  # fmt: skip


def print_result(result: dict, run_dir: Path) -> None:
    quick = " (--quick)" if result["quick"] else ""
    print(
        f"\n{result['env_id']}{quick}: score {result['score']:.1f} ± {result['score_ci95']:.1f} "
        f"(return {result['return']:.1f} ± {result['return_ci95']:.1f}, {result['episodes']} episodes, 95% interval)"
    )
    if result["optimum_score"]:
        print(
            f"exact optimum {result['optimum']:.2f} (score {result['optimum_score']:.1f}): "
            f"{100 * result['share_of_optimum']:.2f} ± {100 * result['share_of_optimum_ci95']:.2f}% of it, paired "
            f"on the same price paths; {100 * result['share_of_discount_ceiling']:.2f}% of what is best for "
            f"γ = {result['args']['gamma']:g}"
        )
    if result["paper_score"]:
        print(f"the paper reports {result['paper_score']:.1f}; data used here: {result['dataset']['source']}")
    clone, sampled = result["behaviour_clone"], result["sampled"]
    print(
        f"returns: mean action {result['return']:.1f}, sampled action {sampled['return']:.1f} ± "
        f"{sampled['return_ci95']:.1f}; the behaviour policy's clone {clone['return']:.1f} and "
        f"{clone['sampled_return']:.1f} ± {clone['sampled_return_ci95']:.1f}; the behaviour policy in the data "
        f"{result['behaviour_data_return']:.1f}"
    )
    print(f"{result['seconds'] / 60:.1f} minutes; result.json, actor.pt and figure.png are in {run_dir}")


def run(args: Args) -> Path:
    """Train and evaluate; returns the run folder."""
    resumed, run_dir = None, Path(args.resume or "")
    if args.resume:
        resumed, given = load_checkpoint(run_dir), args
        args = checkpoint_args(Args, resumed)
        for name in MAY_CHANGE:
            if getattr(given, name) != getattr(Args, name):
                setattr(args, name, getattr(given, name))
    args, domain = resolve(args)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("no GPU found: running on the CPU")
    bar = functools.partial(tqdm, dynamic_ncols=True, mininterval=0.5, disable=None)

    # Data
    if args.env_id == "liquidation" and args.dataset_path is None:
        import liquidation_env

        arrays = liquidation_env.behaviour_dataset(args.dataset_episodes, args.seed)
        dataset = make_dataset(arrays, "liquidation", f"generated, seed {args.seed}")
    else:
        dataset = load_dataset(args.env_id, args.dataset_path, args.dataset_mirrors)
    print(data_card(dataset))
    make_env = functools.partial(make_eval_env, args, domain, dataset)
    env = make_env()
    check_spaces(dataset, env)
    horizon = 20 if domain == "liquidation" else env.spec.max_episode_steps or 1000
    environment = env.spec.id
    env.close()
    if domain == "liquidation" and args.eval_env_id is None:
        play = functools.partial(evaluate_liquidation, gamma=args.gamma)
    else:
        play = functools.partial(evaluate, make_env=make_env, gamma=args.gamma)
    data = {
        key: torch.as_tensor(getattr(dataset, key), device=device)
        for key in ("observations", "actions", "rewards", "next_observations", "terminals")
    }

    # Run folder
    run_dir = run_dir if resumed else make_run_dir(args)
    identity = {
        "kind": "pspo checkpoint", "script_sha256": hashlib.sha256(SCRIPT).hexdigest(), "args": vars(args),
        "data_sha256": dataset.sha256, "environment": environment, "machine": machine(device),
    }  # fmt: skip
    with restoring(run_dir / "checkpoint.pt"):
        checkpoint = Checkpoint(run_dir, identity, args.checkpoint_minutes, resumed["seconds"] if resumed else 0.0)
        if resumed:
            checkpoint.check(resumed)
    if args.track:
        try:
            import wandb
        except ImportError:
            raise UserError("--track needs Weights & Biases: pip install wandb") from None
        wandb.init(project=args.wandb_project, name=run_dir.name, config=vars(args), sync_tensorboard=True)
    print(f"run folder: {run_dir}")

    with checkpoint:
        if not resumed:
            checkpoint.save(phase="start")
        state = resumed or {"phase": "start"}
        phase = state.get("phase")
        phases = ("start", "dynamics", "networks", "behaviour", "policy")
        require(phase in phases, f"{run_dir}/checkpoint.pt is of no known phase: use one that a run saved")
        torch.manual_seed(args.seed)

        # Dynamics pool
        pool_path = run_dir / "dynamics.pt"
        if phase in ("start", "dynamics"):
            if args.dynamics_path:
                pool, report = load_pool(args.dynamics_path, args, dataset, device)
            else:
                pool, report = train_dynamics(args, data, bar, checkpoint, state if phase == "dynamics" else None)
            sizes = [args.pool_size, *(data[key].shape[1] for key in ("observations", "actions"))]
            content = {"kind": "dynamics", "pool": pool.state_dict(), "report": report, "data_sha256": dataset.sha256}
            content |= {"dataset": dataset.name, "sizes": [*sizes, args.dynamics_hidden, args.dynamics_layers]}
            save_atomically(content, pool_path)
        else:
            same = pool_path.exists() and file_sha256(pool_path) == state.get("pool_sha256")
            require(same, f"{pool_path} is not the file that this run wrote: restore it, or start anew")
            pool, report = load_pool(pool_path, args, dataset, device)
        checkpoint.identity["pool_sha256"] = file_sha256(pool_path)
        explained = report["explained_variance_mean"]
        print(f"explained variance on held-out data: reward {explained[0]:.4f}, state {explained[1:]}")

        # Behaviour policy
        if phase in ("start", "dynamics"):
            checkpoint.save(phase="networks", rng=rng_state())
        elif phase == "networks":
            with restoring(run_dir / "checkpoint.pt"):
                set_rng_state(state["rng"])
        learner = PSPO(args, data, domain)
        if phase != "policy":
            learner.clone_behaviour(bar, checkpoint, state if phase == "behaviour" else None)
            learner.redraw(pool)
            log, done, sums = RunLog(run_dir, []), 0, None
        else:
            with restoring(run_dir / "checkpoint.pt"):
                learner.load_state_dict(state["learner"])
                learner.behaviour.requires_grad_(False)
                learner.actor_optimizer.load_state_dict(state["actor_optimizer"])
                learner.critic_optimizer.load_state_dict(state["critic_optimizer"])
                set_rng_state(state["rng"])
                columns = ("eval/score", "eval/return", "eval/predicted_return")
                done, rows = saved_history(state, args.iterations, columns)
                log, sums = RunLog(run_dir, rows), None if state["sums"] is None else state["sums"].to(device)

        # Policy iteration
        guard = Guard("iteration", PSPO.METRICS, DIVERGENCE, learner.metric_bounds())
        step = fast(learner.iterate, device, args.compile, args.iterations)
        progress = bar(total=args.iterations, initial=done, desc="policy")
        for iteration in range(done + 1, args.iterations + 1):
            # The decreasing step sizes of Eq. (6)
            learner.critic_optimizer.rates[0].fill_(args.critic_lr * (1 - (iteration - 1) / args.iterations))
            if args.redraw_every and iteration % args.redraw_every == 0:
                learner.redraw(pool)
            row = step()
            require(sums is None or sums.shape == row.shape, "the checkpoint's sums are not those of the metrics")
            sums = row if sums is None else sums + row
            guard.add(iteration, row)
            progress.update()
            evaluating = iteration % args.eval_every == 0 or iteration == args.iterations
            if not evaluating and not checkpoint.due():
                continue
            # A checkpoint; before it, no sooner than all numbers are known to be good, an evaluation
            guard.check()
            good = all(x.isfinite().all() for x in learner.parameters())
            require(good, f"iteration {iteration}: network weights not finite: {DIVERGENCE['policy']}")
            if evaluating:
                since = (iteration - 1) % args.eval_every + 1
                means = dict(zip(PSPO.METRICS, (sums / since).tolist(), strict=True))
                played = play(learner.average.act, episodes=args.eval_episodes, seed=args.seed + 10_000)
                start = torch.as_tensor(played["start"], dtype=torch.float32, device=device)
                row = {"iteration": iteration} | means
                row |= {
                    "eval/return": played["returns"].mean(),
                    "eval/score": normalised_score(played["returns"].mean(), domain),
                    "eval/discounted_return": played["discounted"].mean(),
                    "eval/start_value": learner.start_value(start),
                    "eval/predicted_return": learner.predicted_return(start[:1000], horizon).mean().item(),
                }
                log.append({key: value if key == "iteration" else float(value) for key, value in row.items()})
                progress.set_postfix(score=f"{row['eval/score']:.1f}")
                sums = None
            checkpoint.save(
                phase="policy", iteration=iteration, learner=learner.state_dict(), sums=sums, rows=log.rows,
                actor_optimizer=learner.actor_optimizer.state_dict(), rng=rng_state(),
                critic_optimizer=learner.critic_optimizer.state_dict(),
            )  # fmt: skip
        progress.close()
        checkpoint.finish()

        # Final result
        final = functools.partial(play, episodes=args.final_episodes, seed=args.seed + 20_000)
        returns, clone = final(learner.average.act)["returns"], final(learner.behaviour.act)["returns"]
        sampled, sampled_clone = (
            final(actor.sampler(args.seed))["returns"] for actor in (learner.average, learner.behaviour)
        )
        target, uncertainty = learner.target_and_uncertainty()
        behaviour = float(episode_returns(dataset).mean())
        low, high = REFERENCE_RETURNS[domain]
        result = {
            "env_id": args.env_id, "domain": domain, "quick": args.quick,
            "score": normalised_score(returns.mean(), domain),
            "score_ci95": 100 * confidence_interval(returns) / (high - low),
            "return": returns.mean(), "return_std": returns.std(), "return_ci95": confidence_interval(returns),
            "episodes": len(returns),
            "sampled": {"return": sampled.mean(), "score": normalised_score(sampled.mean(), domain),
                        "return_ci95": confidence_interval(sampled)},
            "behaviour_clone": {"return": clone.mean(), "score": normalised_score(clone.mean(), domain),
                                "return_ci95": confidence_interval(clone), "sampled_return": sampled_clone.mean(),
                                "sampled_return_ci95": confidence_interval(sampled_clone)},
            "behaviour_data_return": behaviour, "behaviour_data_score": normalised_score(behaviour, domain),
            "paper_score": PAPER_SCORES.get(args.env_id), "optimum_score": None,
            "spearman": spearman(uncertainty, target), "dynamics": report,
            "posterior": {"members": learner.members.tolist(), "probability": learner.log_belief().exp().tolist()},
            "dataset": {"name": dataset.name, "source": dataset.source, "sha256": dataset.sha256},
            "last": log.rows[-1], "args": vars(args), "seconds": time.monotonic() - checkpoint.started,
            "script_sha256": identity["script_sha256"], "environment": environment, "machine": identity["machine"],
            "versions": identity["machine"]["versions"],
        }  # fmt: skip
        if domain == "liquidation":
            result |= compare_with_optimum(args, returns, play)
        save_atomically(actor_file(learner.average, args, domain, dataset), run_dir / "actor.pt")
        with replacing(run_dir / "figure.png") as part:
            plot(result, log.rows, target, uncertainty, learner.average.act, part)
        if args.capture_video:
            with replacing(run_dir / "episode.gif") as part:
                save_gif(learner.average.act, make_env, args.seed, part)
        with replacing(run_dir / "result.json") as part:  # the last one: a folder that has it is complete
            part.write_text(json.dumps(result, indent=2, default=float) + "\n")
    print_result(result, run_dir)
    return run_dir


def main() -> None:
    exit_cleanly(lambda: run(command_line(Args, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    main()
