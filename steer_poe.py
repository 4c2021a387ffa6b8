"""Steering a frozen policy in closed form: product of experts, KL-regularised adaptation, and the study of both.

Paper: "When Policies Cannot Be Retrained: A Unified Closed-Form View of Post-Training Steering in Offline
Reinforcement Learning", arXiv 2604.22873. Most of its text was not at hand: docs/steer_poe.md says what is read from
it and what is chosen here.

    π_f = N(μ_f, σ_f²)  frozen actor, never changed     π_p = N(μ_p, σ_p²)  prior of a goal     Λ = 1 / σ²  precisions

    Additive   μ = (1−α) μ_f + α μ_p,                              Λ = Λ_f
    PoE        π_f^{1−α} π_p^α:    μ = ((1−α) Λ_f μ_f + α Λ_p μ_p) / Λ,   Λ = (1−α) Λ_f + α Λ_p,   0 ≤ α < 1
    KL-Reg     argmin KL(π ‖ π_f) − β E_π log π_p = π_f π_p^β:   μ = (Λ_f μ_f + β Λ_p μ_p) / Λ,   Λ = Λ_f + β Λ_p
    identity   KL-Reg at β = α / (1−α) has the mean of PoE(α), and (1+β) times its precision
    selector   the largest α with E_s KL(π_α ‖ π_f) ≤ budget

The Gaussians are those before an actor's tanh, if it has one. For PoE that is exact (docs/steer_poe.md).

Run it:
    python steer_poe.py                                     # liquidation: actor, prior, steering; 1 CPU minute
    python steer_poe.py --goal certainty --alpha 0.5          # another goal, no selector
    python steer_poe.py --actor runs/<run folder>/actor.pt  # an actor of pspo.py or iql.py on the same task
    python steer_poe.py --env-id hopper-medium-v2 --actor dataset --goal energy     # the policy within D4RL's file
    python steer_poe.py --study --env-id hopper-medium-v2   # 13 configurations, 25 episodes, 3 goals
    python steer_poe.py --study --priors clean noisy random wrong-goal --shifts none friction mass --env-id …
    python steer_poe.py --resume runs/<run folder>          # goes on where a run stopped
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
from collections.abc import Callable, Iterator, Sequence
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
D4RL_FILES |= {
    f"antmaze-{task}-v2": (
        f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5",
        int(size),
        sha256,
    )
    for task, maze, starts, goals, size, sha256 in map(
        str.split,
        """
    umaze          u-maze       False False 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
    umaze-diverse  u-maze       True  True  230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
    medium-diverse big-maze     True  True  231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
    large-play     hardest-maze True  False 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
    large-diverse  hardest-maze True  True  231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
        """.strip().splitlines(),
    )
}

# Returns of score 0 and 100 (D4RL's; PSPO's for liquidation).
REFERENCE_RETURNS = {
    "liquidation": (0.0, 135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
    "antmaze": (0.0, 1.0),  # the return is 1 or 0: the goal reached, or not
}

# What goals are made of: three numbers of a state and an action (function `features`), and each goal's weights.
LOCOMOTION = ("velocity", "effort", "upright")
FEATURES = dict.fromkeys(("hopper", "walker2d", "halfcheetah", "antmaze"), LOCOMOTION) | {
    "liquidation": ("revenue", "early", "premium")
}
LOCOMOTION_GOALS = {"speed": (1.0, 0.0, 0.0), "balanced": (1.0, -0.5, 1.0), "energy": (0.25, -1.0, 1.0)}
GOALS = dict.fromkeys(("hopper", "walker2d", "halfcheetah", "antmaze"), LOCOMOTION_GOALS) | {
    "liquidation": {"certainty": (0.0, 1.0, 0.0), "balanced": (1.0, 0.5, 0.5), "upside": (0.0, 0.0, 1.0)}
}
WRONG_GOAL = (2, 2, 0, 0)  # the prior "wrong-goal" of the first, second and third goal, and of --goal-weights
NOISE = 0.5  # standard deviation of what the prior "noisy" adds to the mean before the squash

# Deployment shifts: what changes between the data and the evaluation, and by how much.
SHIFTS = {
    "none": 0.0,
    "action-noise": 0.1,  # standard deviation, of actions in [-1, 1]
    "observation-noise": 0.05,  # standard deviation, in those of the data's observations
    "friction": 0.6,  # factor on every friction of the MuJoCo model
    "mass": 1.25,  # factor on every mass and inertia of the MuJoCo model
    "volatility": 1.5,  # liquidation: factor on σ
    "reversion": 3.0,  # liquidation: factor on θ
}

EVAL_ENVS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
# D4RL's evaluation mazes, 4 units a cell, y growing downwards; r: start, g: goal.
ANTMAZES = {
    "umaze": "##### #r..# ###.# #g..# #####",
    "medium": "######## #r.##..# #..#...# ##...### #..#...# #.#..#.# #...#.g# ########",
    "large": "############ #r...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### "
    "#..#...#.g.# ############",
}

# Settings per domain; a flag on the command line wins.
MUJOCO = dict(actor="bc", goal="speed", gamma=0.99, hidden=256, updates=10_000, episodes=25)
DOMAINS = {
    # A clone of liquidation's data holds for ever, the mean of two modes: no actor to steer. 20 steps need no discount.
    "liquidation": MUJOCO | dict(actor="awr", goal="upside", gamma=1.0, hidden=64, updates=3_000, episodes=2_000),
    **dict.fromkeys(("hopper", "walker2d", "halfcheetah", "antmaze"), MUJOCO),
}


@dataclass
class Args:
    # --- Experiment ---
    exp_name: str = "steer_poe"
    """name of this experiment, a part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    cuda: bool = True
    """use the GPU, if there is one, to train the prior"""
    num_threads: int = 1
    """CPU threads for PyTorch (0: PyTorch's own choice; more than one only slow small networks down)"""
    capture_video: bool = False
    """save an animated GIF of one episode of the steered policy"""
    runs_dir: str = "runs"
    """the folder that run folders are made in"""
    resume: str | None = None
    """a run folder to go on with, with its own arguments; another flag that contradicts them is refused"""

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
    episodes: int | None = None
    """episodes of each configuration, the same starts and noise for all (25; liquidation without --study: 2,000)"""
    stochastic: bool = False
    """act with samples of the steered Gaussian instead of its mean"""

    # --- Frozen actor ---
    actor: str | None = None
    """actor.pt of pspo.py or iql.py; bc: a clone of the data; awr: a clone weighted by the task's advantage; dataset:
    the policy that D4RL's medium and expert files embed"""

    # --- Goal and prior ---
    goal: str | None = None
    """speed, balanced or energy; on liquidation certainty, balanced or upside; own: --goal-weights"""
    goal_weights: tuple[float, float, float] | None = None
    """a goal of your own: weights on velocity, effort and upright; on liquidation on revenue, early and premium"""
    temperature: float = 0.3
    """T of the prior's weights exp(A / T), A: the goal's advantage in standard deviations"""
    weight_clip: float = 20.0
    """largest of these weights"""
    gae_lambda: float = 0.95
    """λ of the advantage: 1 is the observed return minus the baseline, 0 a one-step error"""
    gamma: float | None = None
    """γ, the discount"""
    hidden: int | None = None
    """units in each of the two hidden layers of every network that is trained here"""
    updates: int | None = None
    """gradient steps of each of them"""
    batch_size: int = 512
    """rows per update"""
    lr: float = 1e-3
    """learning rate (cosine to zero)"""

    # --- Steering ---
    rule: Literal["poe", "kl-reg", "additive"] = "poe"
    """how actor and prior are composed"""
    alpha: float | None = None
    """α in [0, 1); KL-Reg has β = α / (1 − α) (default: the selector's)"""
    kl_budget: float = 0.5
    """the selector takes the largest α whose mean KL from the frozen actor, over states of the data, is within this"""

    # --- Study ---
    study: bool = False
    """all three goals and the paper's 13 configurations: Frozen, Prior-only, Additive, PoE and KL-Reg at 5 α"""
    references: bool = False
    """also Additive at every α, Critic-Greedy and IQL-Guided, along the gradient of the goal's critic"""
    priors: tuple[Literal["clean", "noisy", "random", "overconfident", "wrong-goal"], ...] = ("clean",)
    """what the prior is degraded to"""
    shifts: tuple[
        Literal["none", "action-noise", "observation-noise", "friction", "mass", "volatility", "reversion"], ...
    ] = ("none",)
    """what changes at deployment; friction and mass on MuJoCo, volatility and reversion on liquidation"""


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

# --- Goals: functions of observations and actions alone ---


def features(domain: str, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """What goals weigh, columns as FEATURES has them: (B, obs), (B, act) -> (B, 3) float64. Actions are clipped.

    Locomotion: forward velocity (AntMaze: speed), mean squared action, cosine of the torso's tilt. Liquidation:
    revenue, units sold times the share of time left, units sold times what the price is above its long-run mean.
    """
    obs, action = np.asarray(obs, np.float64), np.clip(np.asarray(action, np.float64), -1, 1)
    if domain == "liquidation":
        step, inventory, price = obs.T
        sold = np.maximum(action[:, 0], 0) * inventory
        return np.stack([sold * price, sold * (1 - step / 20), sold * np.maximum(price - 1.5, 0)], 1)
    if domain == "antmaze":  # (achieved goal, Minari: desired goal,) height, quaternion, 8 joints, velocities
        body = obs[:, 2 if obs.shape[1] == 29 else 4 :]
        velocity, upright = np.hypot(body[:, 13], body[:, 14]), 1 - 2 * (body[:, 2] ** 2 + body[:, 3] ** 2)
    else:
        velocity, upright = obs[:, 5 if domain == "hopper" else 8], np.cos(obs[:, 1])
    return np.stack([velocity, (action**2).mean(1), upright], 1)


def discounted_sums(x: np.ndarray, ends: np.ndarray, discount: float) -> np.ndarray:
    """Σ_k discount^k x_{t+k} up to the end of t's episode: (N, F), last rows of the episodes (E,) -> (N, F)."""
    lengths = np.diff(ends, prepend=-1)
    out, total = np.empty_like(x), np.zeros((len(ends), x.shape[1]), x.dtype)
    for k in range(lengths.max()):  # k rows before the end, all episodes at once
        alive = lengths > k
        total[alive] = x[ends[alive] - k] + discount * total[alive]
        out[ends[alive] - k] = total[alive]
    return out


# --- Networks: every one is a stack evaluated as one batched matrix product ---


class MLP(nn.Module):
    """`size` independent multi-layer perceptrons: (B, in) or (size, B, in) -> (size, B, out)."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.expand(self.size, *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.bmm(self.activation(x) if i else x, weight).add_(bias)
        return x


ACTIVATIONS = {"relu": torch.relu_, "tanh": torch.tanh_}
SQUASHES = ("tanh of the sample", "tanh of the mean")  # pspo.py's actors; iql.py's, whose actions are clipped


class Actor(nn.Module):
    """A diagonal Gaussian over u, as an actor.pt of any script describes it. (B, obs) -> mean, log-std, (B, act) each.

    squash "tanh of the sample": the action is tanh(u). "tanh of the mean": it is u, clipped to [-1, 1].
    """

    def __init__(
        self, widths: list[int], squash: str, activation: str = "relu", log_std=None, log_std_range=(-5.0, 2.0)
    ):
        super().__init__()
        self.net = MLP(1, widths, ACTIVATIONS[activation])
        self.squash, self.activation, self.log_std_range = squash, activation, tuple(log_std_range)
        self.register_buffer("log_std", log_std)  # None: the network's second half
        self.register_buffer("obs_mean", torch.zeros(widths[0]))
        self.register_buffer("obs_std", torch.ones(widths[0]))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.net((obs - self.obs_mean) / self.obs_std)[0]
        mean, log_std = out.chunk(2, dim=-1) if self.log_std is None else (out, self.log_std.expand_as(out))
        mean = mean.tanh() if self.squash == "tanh of the mean" else mean
        return mean, log_std.clamp(*self.log_std_range)

    def sha256(self) -> str:
        """Of every number in it: the same hash, the same actor."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to_file(self) -> dict:
        """actor.pt's description (docs/pspo.md and docs/iql.md show the lines that play it)."""
        pairs = zip(self.net.weights, self.net.biases, strict=True)
        return {
            "layers": [{"weight": w[0].data.cpu().clone(), "bias": b[0, 0].data.cpu().clone()} for w, b in pairs],
            "activation": self.activation, "squash": self.squash,
            "log_std": None if self.log_std is None else self.log_std.cpu().clone(),
            "log_std_range": list(self.log_std_range),
            "obs_mean": self.obs_mean.cpu().clone(), "obs_std": self.obs_std.cpu().clone(),
        }  # fmt: skip

    @classmethod
    def from_file(cls, content: dict, path: Path | str) -> "Actor":
        """The actor that `to_file`, pspo.py or iql.py describes. Raises UserError if it is not whole."""
        try:
            weights = [layer["weight"] for layer in content["layers"]]
            widths = [len(weights[0]), *(weight.shape[1] for weight in weights)]
            actor = cls(widths, content["squash"], content["activation"], content["log_std"], content["log_std_range"])
            for i, layer in enumerate(content["layers"]):
                actor.net.weights[i].data.copy_(layer["weight"][None])
                actor.net.biases[i].data.copy_(layer["bias"][None, None])
            actor.obs_mean.copy_(content["obs_mean"])
            actor.obs_std.copy_(content["obs_std"])
            finite = all(value.isfinite().all() for value in actor.state_dict().values())
            if not (finite and content["squash"] in SQUASHES and (actor.obs_std > 0).all()):
                raise ValueError("numbers that are not finite, or an unknown squash")
            actor(torch.zeros(1, widths[0]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"[:160]
            raise UserError(f"{path} does not describe an actor ({reason}): use one that a run saved") from None
        return actor.requires_grad_(False)


class Critic(nn.Module):
    """Behaviour's values of the task's reward and of every goal's: Q (B, obs), (B, act) -> (B, 1 + G)."""

    def __init__(self, obs_dim: int, act_dim: int, columns: int, hidden: int):
        super().__init__()
        self.q = MLP(1, [obs_dim + act_dim, hidden, hidden, columns])
        self.v = MLP(1, [obs_dim, hidden, hidden, columns])
        for name, dim in dict(obs=obs_dim, out=columns).items():  # standardisation
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        self.register_buffer("advantage_std", torch.ones(columns))  # of Q − V over the data

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)
        return self.q(inputs)[0] * self.out_std + self.out_mean

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V, (B, obs) -> (B, 1 + G)."""
        return self.v((obs - self.obs_mean) / self.obs_std)[0] * self.out_std + self.out_mean


# --- Composition rules: pure functions of means and variances, (..., act) each, to a mean and a variance ---

MIN_VARIANCE = 1e-8  # a smaller one, and 0, counts as this
MAX_ALPHA = 0.999  # the selector goes no further


def precision(variance: torch.Tensor) -> torch.Tensor:
    """Λ = 1 / σ², with a floor under σ² so that a degenerate Gaussian stays finite."""
    return 1 / variance.clamp(min=MIN_VARIANCE)


def check_alpha(alpha: float) -> None:
    require(0 <= alpha < 1, f"α = {alpha}: must be in [0, 1); 1 would drop the frozen actor: that is Prior-only")


def check_beta(beta: float) -> None:
    require(0 <= beta < math.inf, f"β = {beta}: must be 0 or more, and finite")


def frozen(mean_f, var_f, mean_p, var_p, alpha: float = 0.0):
    """Frozen: π = π_f."""
    return mean_f, var_f


def prior_only(mean_f, var_f, mean_p, var_p, alpha: float = 0.0):
    """Prior-only: π = π_p."""
    return mean_p, var_p


def additive(mean_f, var_f, mean_p, var_p, alpha: float):
    """Additive: μ = (1−α) μ_f + α μ_p, Λ = Λ_f; blind to how sure either is."""
    check_alpha(alpha)
    return (1 - alpha) * mean_f + alpha * mean_p, var_f


def poe(mean_f, var_f, mean_p, var_p, alpha: float):
    """PoE(α) = π_f^{1−α} π_p^α: Λ = (1−α) Λ_f + α Λ_p, μ = ((1−α) Λ_f μ_f + α Λ_p μ_p) / Λ."""
    check_alpha(alpha)
    weight_f, weight_p = (1 - alpha) * precision(var_f), alpha * precision(var_p)
    return (weight_f * mean_f + weight_p * mean_p) / (weight_f + weight_p), 1 / (weight_f + weight_p)


def kl_reg(mean_f, var_f, mean_p, var_p, beta: float):
    """KL-Reg(β) = argmin KL(π ‖ π_f) − β E_π log π_p = π_f π_p^β: Λ = Λ_f + β Λ_p, μ = (Λ_f μ_f + β Λ_p μ_p) / Λ."""
    check_beta(beta)
    weight_f, weight_p = precision(var_f), beta * precision(var_p)
    return (weight_f * mean_f + weight_p * mean_p) / (weight_f + weight_p), 1 / (weight_f + weight_p)


def iql_guided(mean_f, var_f, gradient: torch.Tensor, beta: float):
    """IQL-Guided(β) = argmax β E_π A − KL(π ‖ π_f), A linear around μ_f: μ = μ_f + β σ_f² ∇A(μ_f), Λ = Λ_f."""
    check_beta(beta)
    return mean_f + beta * var_f * gradient, var_f


def critic_greedy(mean_f, var_f, gradient: Callable, steps: int = 20, size: float = 0.1):
    """Critic-Greedy: from μ_f uphill on Q by `steps` steps of length `size`, no anchor; Λ = Λ_f."""
    u = mean_f
    for _ in range(steps):
        ascent = gradient(u)
        u = u + size * ascent / ascent.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return u, var_f


RULES = {"frozen": frozen, "prior-only": prior_only, "additive": additive, "poe": poe, "kl-reg": kl_reg}


def compose(rule: str, alpha: float, mean_f, var_f, mean_p, var_p):
    """Any rule of RULES on one scale: KL-Reg takes β = α / (1 − α)."""
    if rule == "kl-reg":
        check_alpha(alpha)
        alpha = alpha / (1 - alpha)
    return RULES[rule](mean_f, var_f, mean_p, var_p, alpha)


def degrade(kind: str, mean: torch.Tensor, var: torch.Tensor, noise: torch.Tensor):
    """The prior as it comes, or spoilt; noise: standard normal, (..., act), drawn anew at every step.

    noisy: N(0, NOISE²) on the mean, and the variance says so. random: no information, and the variance says so.
    overconfident: no information, with the clean prior's variance. (wrong-goal is another goal's clean prior.)
    """
    if kind == "noisy":
        return mean + NOISE * noise, var + NOISE**2
    if kind in ("random", "overconfident"):
        return noise, torch.ones_like(var) if kind == "random" else var
    return mean, var


# --- Distances, selector, diagnostics ---


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag var), (..., act) -> (...)."""
    return -0.5 * ((u - mean).square() / var + var.log() + math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean, var, mean_f, var_f) -> torch.Tensor:
    """KL(π ‖ π_f), (..., act) -> (...). The same after a tanh of both: it is invertible."""
    ratio = var / var_f
    return 0.5 * (ratio + (mean - mean_f).square() / var_f - 1 - ratio.log()).sum(-1)


def mean_kl(rule: str, alpha: float, mean_f, var_f, mean_p, var_p) -> float:
    """E_s KL(π_α ‖ π_f) over (B, act)."""
    return gaussian_kl(*compose(rule, alpha, mean_f, var_f, mean_p, var_p), mean_f, var_f).mean().item()


def select_alpha(rule: str, budget: float, mean_f, var_f, mean_p, var_p) -> float:
    """The largest α in [0, MAX_ALPHA] with E_s KL(π_α ‖ π_f) ≤ budget, by bisection: the KL never falls with α.

    dKL/dα = α Var_{π_α}[log π_p − log π_f] for PoE, and likewise in β for KL-Reg. Raises UserError for a bad budget.
    """
    require(0 <= budget < math.inf, f"--kl-budget {budget}: must be 0 or more, and finite")
    low, high = 0.0, MAX_ALPHA
    if mean_kl(rule, high, mean_f, var_f, mean_p, var_p) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        fits = mean_kl(rule, middle, mean_f, var_f, mean_p, var_p) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def log_density(u: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, squash: str) -> torch.Tensor:
    """log π(a | s) of the action that u stands for: with a tanh, minus log da/du, (..., act) -> (...)."""
    jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u)) if squash == "tanh of the sample" else torch.zeros_like(u)
    return gaussian_log_prob(u, mean, var) - jacobian.sum(-1)


def total_variation(mean, var, mean_f, var_f, noise: torch.Tensor) -> torch.Tensor:
    """TV(π, π_f) = E_{u ~ π_f} max(0, 1 − π(u) / π_f(u)) by M samples: (B, act), noise (M, B, act) -> (B,).

    Half the L1 distance, in [0, 1]; the same after a tanh of both.
    """
    u = mean_f + var_f.sqrt() * noise
    log_ratio = gaussian_log_prob(u, mean, var) - gaussian_log_prob(u, mean_f, var_f)
    return torch.expm1(log_ratio.clamp(max=0)).mean(0).abs()


def value_bound(total_variation: float, reward_range: float, gamma: float) -> float:
    """|V^π − V^{π_f}| ≤ δ R / (1−γ)², δ the largest TV of any state, R the width of the reward's range."""
    return total_variation * reward_range / (1 - gamma) ** 2


def identity_check(alpha: float, mean_f, var_f, mean_p, var_p) -> dict[str, float]:
    """PoE(α) against KL-Reg(β = α / (1−α)) in float64: difference of means, ratio of variances against 1 + β."""
    gaussians, beta = [x.double() for x in (mean_f, var_f, mean_p, var_p)], alpha / (1 - alpha)
    (mean_1, var_1), (mean_2, var_2) = poe(*gaussians, alpha), kl_reg(*gaussians, beta)
    scale = torch.maximum(gaussians[0].abs(), gaussians[2].abs()).clamp(min=1e-300)
    return {
        "alpha": alpha, "beta": beta, "states": len(mean_1),
        "largest_relative_difference_of_means": ((mean_1 - mean_2).abs() / scale).max().item(),
        "largest_relative_difference_of_ratio": (var_1 / var_2 / (1 + beta) - 1).abs().max().item(),
    }  # fmt: skip


def paired_bootstrap(difference: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (n,) paired differences and the ends of its 95% percentile bootstrap interval."""
    rng, count = np.random.default_rng(seed), len(difference)
    if count > 500:  # the bootstrap's limit, without an array of draws times n
        mean, half = difference.mean(), confidence_interval(difference)
        return float(mean), float(mean - half), float(mean + half)
    means = difference[rng.integers(count, size=(draws, count))].mean(1)
    return (float(difference.mean()), *map(float, np.percentile(means, [2.5, 97.5])))


def classify(low: float, high: float) -> str:
    """HELP: the interval of (steered − frozen) lies above 0. HURT: below 0. FROZEN: it contains 0."""
    return "HELP" if low > 0 else "HURT" if high < 0 else "FROZEN"


# --- Learning: the advantage of every goal, then policies by weighted regression ---


@dataclass
class Data:
    """What learning needs of a data set, on the device; F features, G goals."""

    obs: torch.Tensor  # (N, obs)
    next_obs: torch.Tensor  # (N, obs)
    action: torch.Tensor  # (N, act)
    rewards: torch.Tensor  # (N, 1 + G): the task's, then every goal's
    terminal: torch.Tensor  # (N,) bool
    ends: np.ndarray  # (E,) last rows of the episodes
    obs_mean: torch.Tensor
    obs_std: torch.Tensor

    def standardise(self, net: nn.Module) -> nn.Module:
        """Give a network the data's statistics (further inputs, a goal's weights, stay as they are)."""
        net.obs_mean[: len(self.obs_mean)] = self.obs_mean
        net.obs_std[: len(self.obs_std)] = self.obs_std
        return net


def minimise(args: Args, net: nn.Module, loss: Callable, bar: Callable, what: str) -> float:
    """--updates steps of Adam on loss(rows), the learning rate falling to zero; the mean loss of the last tenth."""
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    last = []
    for update in bar(range(args.updates), desc=what):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        if update >= int(0.9 * args.updates):
            last.append(value.detach())
    mean = torch.stack(last).mean().item()
    require(math.isfinite(mean), f"training of the {what} diverged (loss not finite): lower --lr")
    return mean


def train_critic(args: Args, data: Data, bar: Callable) -> tuple[Critic, torch.Tensor]:
    """Values of the behaviour policy, and A = (Q − V) / its standard deviation for the task and every goal, (N, 1 + G).

    V is fitted to the observed returns; Q to λ-returns, which go on from V, also where a time limit cut an episode
    off. Q averages the noise of the returns away, which the weights of the regression would otherwise reward.
    """
    device, count = data.obs.device, len(data.obs)
    critic = Critic(data.obs.shape[1], data.action.shape[1], data.rewards.shape[1], args.hidden).to(device)
    data.standardise(critic)
    rewards, alive = data.rewards.cpu().numpy().astype(np.float64), ~data.terminal.cpu().numpy()[:, None]

    def everywhere(net: Callable, *columns: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            parts = zip(*(column.split(65536) for column in columns), strict=True)
            return torch.cat([net(*part) for part in parts]).cpu().numpy().astype(np.float64)

    def fit(net: Callable, target: np.ndarray, what: str, *columns: torch.Tensor) -> None:
        y = torch.as_tensor(target, dtype=torch.float32, device=device)

        def loss() -> torch.Tensor:
            rows = torch.randint(count, (args.batch_size,), device=device)
            return ((net(*(column[rows] for column in columns)) - y[rows]) / critic.out_std).square().mean()

        minimise(args, critic, loss, bar, what)

    returns = discounted_sums(rewards, data.ends, args.gamma)
    critic.out_mean.copy_(torch.as_tensor(returns.mean(0)))
    critic.out_std.copy_(torch.as_tensor(returns.std(0).clip(1e-6)))
    fit(critic.value, returns, "V", data.obs)
    v, next_v = everywhere(critic.value, data.obs), everywhere(critic.value, data.next_obs)
    error = rewards + args.gamma * alive * next_v - v
    fit(critic, v + discounted_sums(error, data.ends, args.gamma * args.gae_lambda), "Q", data.obs, data.action)
    advantage = everywhere(critic, data.obs, data.action) - v
    critic.advantage_std.copy_(torch.as_tensor(advantage.std(0).clip(1e-12)))
    return critic.requires_grad_(False), torch.as_tensor(advantage, device=device).float() / critic.advantage_std


def regression_weights(advantage: torch.Tensor, temperature: float, clip: float) -> torch.Tensor:
    """min(exp(A / T), clip), divided by their mean over the rows: (N, G) -> (N, G) (Peng et al., 2019)."""
    weights = (advantage / temperature).exp().clamp(max=clip)
    return weights / weights.mean(0)


def weighted_regression(
    args: Args, data: Data, weights: torch.Tensor, squash: str, goals: torch.Tensor | None, bar: Callable, what: str
) -> Actor:
    """A Gaussian policy by maximum likelihood, −E[ w log π(a | s, g) ]; weights (N, G), goals (G, F) or None.

    A squashed policy is fitted to atanh(a): so its likelihood is that of a, up to a constant.
    """
    count, act_dim = data.action.shape
    goal_dim = 0 if goals is None else goals.shape[1]
    actor = Actor([data.obs.shape[1] + goal_dim, args.hidden, args.hidden, 2 * act_dim], squash).to(data.obs.device)
    data.standardise(actor)
    target = data.action.clamp(-0.999, 0.999).atanh() if squash == "tanh of the sample" else data.action

    def loss() -> torch.Tensor:
        rows = torch.randint(count, (args.batch_size,), device=target.device)
        goal = torch.randint(weights.shape[1], (args.batch_size,), device=target.device)
        inputs = data.obs[rows] if goals is None else torch.cat([data.obs[rows], goals[goal]], -1)
        mean, log_std = actor(inputs)
        return -(weights[rows, goal] * gaussian_log_prob(target[rows], mean, (2 * log_std).exp())).mean()

    minimise(args, actor, loss, bar, what)
    return actor.requires_grad_(False)


def fold_goal(prior: Actor, goal: torch.Tensor) -> Actor:
    """The prior of one goal, π_p(a | s), as an actor of its own: the goal's inputs move into the first bias."""
    content, obs_dim = prior.to_file(), len(prior.obs_mean) - len(goal)
    first, goal = content["layers"][0], goal.cpu()
    first["bias"] += goal @ first["weight"][obs_dim:]
    first["weight"] = first["weight"][:obs_dim].clone()
    content |= {key: content[key][:obs_dim].clone() for key in ("obs_mean", "obs_std")}
    return Actor.from_file(content, "the prior")


def embedded_policy(path: Path) -> Actor:
    """The behaviour policy that D4RL's medium and expert files of MuJoCo tasks hold under metadata/policy: a
    tanh-Gaussian of two hidden layers, weights (out, in). Raises UserError where there is none."""
    try:
        with h5py.File(path, "r") as file:
            policy = file.get("metadata/policy")
            has = isinstance(policy, h5py.Group) and "last_fc_log_std" in policy
            what = f"{path.name} embeds no tanh-Gaussian policy (D4RL's medium and expert files of MuJoCo tasks do)"
            require(has, f"{what}: use --actor bc")
            read = {
                layer: {key: torch.as_tensor(policy[layer][key][()], dtype=torch.float32) for key in ("weight", "bias")}
                for layer in ("fc0", "fc1", "last_fc", "last_fc_log_std")
            }
            names = [policy[key][()] for key in ("nonlinearity", "output_distribution") if key in policy]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its embedded policy cannot be read ({error}): use --actor bc") from error
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    known = len(names) == 2 and names[0] in ACTIVATIONS and names[1] == "tanh_gaussian"
    require(known, f"{path}: its embedded policy is {' '.join(names)}, not relu tanh_gaussian: use --actor bc")
    heads = [read["last_fc"], read["last_fc_log_std"]]
    layers = [{"weight": read[name]["weight"].T.contiguous(), "bias": read[name]["bias"]} for name in ("fc0", "fc1")]
    last = {"weight": torch.cat([head["weight"] for head in heads]).T.contiguous()}
    layers.append(last | {"bias": torch.cat([head["bias"] for head in heads])})
    obs_dim = len(layers[0]["weight"])
    content = {
        "layers": layers, "activation": names[0], "squash": "tanh of the sample", "log_std": None,
        "log_std_range": [-20.0, 2.0], "obs_mean": torch.zeros(obs_dim), "obs_std": torch.ones(obs_dim),
    }  # fmt: skip
    return Actor.from_file(content, path)


# --- Steering ---


class Steering(nn.Module):
    """Frozen actor, goal-conditioned prior and critic; means and variances in float64."""

    def __init__(self, actor: Actor, prior: Actor, goals: torch.Tensor, critic: Critic):
        super().__init__()
        self.actor, self.critic = actor, critic
        self.priors = nn.ModuleList(fold_goal(prior, goal) for goal in goals)  # one per goal

    def gaussians(self, obs: torch.Tensor, goal: int, kind: str, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """μ_f, σ_f², μ_p, σ_p² of a goal and a prior of Args.priors: (B, obs), noise (B, act) -> (B, act) each."""
        prior = self.priors[WRONG_GOAL[goal] if kind == "wrong-goal" else goal]
        (mean_f, log_std_f), (mean_p, log_std_p) = self.actor(obs), prior(obs)
        var_f, var_p = (2 * log_std_f.double()).exp(), (2 * log_std_p.double()).exp()
        return mean_f.double(), var_f, *degrade(kind, mean_p.double(), var_p, noise)

    def gradient(self, obs: torch.Tensor, u: torch.Tensor, goal: int) -> torch.Tensor:
        """∇_u of a goal's Q / std(A) at the action that u stands for: (B, obs), (B, act) -> (B, act)."""
        with torch.enable_grad():
            u = u.float().requires_grad_(True)
            q = self.critic(obs, self.squash(u))[:, 1 + goal] / self.critic.advantage_std[1 + goal]
            return torch.autograd.grad(q.sum(), u)[0].double()

    def steered(self, obs, goal: int, kind: str, rule: str, alpha: float, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of a rule, (B, act) each, before the squash."""
        gaussians = self.gaussians(obs, goal, kind, noise)
        mean_f, var_f, *_ = gaussians
        if rule == "iql-guided":
            return iql_guided(mean_f, var_f, self.gradient(obs, mean_f, goal), alpha / (1 - alpha))
        if rule == "critic-greedy":
            return critic_greedy(mean_f, var_f, lambda u: self.gradient(obs, u, goal))
        return compose(rule, alpha, *gaussians)

    def squash(self, u: torch.Tensor) -> torch.Tensor:
        return u.tanh() if self.actor.squash == "tanh of the sample" else u.clamp(-1, 1)

    @torch.no_grad()
    def act(self, obs, noise, goal=0, kind="clean", rule="poe", alpha=0.0, stochastic=False) -> np.ndarray:
        """(B, obs), standard normal noise (2, B, act) of the prior and of the sample -> actions (B, act) float32."""
        noise = torch.as_tensor(noise)
        mean, var = self.steered(torch.as_tensor(obs, dtype=torch.float32), goal, kind, rule, alpha, noise[0])
        u = mean + var.sqrt() * noise[1] if stochastic else mean
        return self.squash(u).float().numpy()


ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the sweep


def configurations(args: Args, chosen: float) -> list[tuple[str, float]]:
    """(rule, α) of a cell: the paper's 13 (or --rule at 5 α beside Additive), the chosen one, the references."""
    listed = [("frozen", 0.0), ("prior-only", 1.0)]
    if args.study:
        listed += [("additive", 0.5), *(("poe", a) for a in ALPHAS), *(("kl-reg", a) for a in ALPHAS)]
    else:
        listed += [(rule, a) for rule in dict.fromkeys(("additive", args.rule)) for a in ALPHAS]
    listed.append((args.rule, chosen))
    if args.references:
        listed += [("additive", a) for a in ALPHAS] + [("critic-greedy", 1.0), ("iql-guided", 0.5)]
    return list(dict.fromkeys(listed))


@torch.no_grad()
def diagnose(
    steering: Steering, obs, noise, goal: int, kind: str, rule: str, alpha: float, reward_range: float
) -> dict:
    """KL, total variation, value bound and support violation of one configuration on (B, obs) states.

    noise: standard normal (M, B, act); the first is the prior's, the others sample. Support violation: the share of
    actions with π_f(a | s) < ε, of the configuration's mean action and of actions drawn from it.
    """
    mean_f, var_f, *_ = steering.gaussians(obs, goal, kind, noise[0])
    mean, var = steering.steered(obs, goal, kind, rule, alpha, noise[0])
    tv = total_variation(mean, var, mean_f, var_f, noise[1:])
    out = {
        "kl": gaussian_kl(mean, var, mean_f, var_f).mean().item(),
        "tv_mean": tv.mean().item(), "tv_max": tv.max().item(),
        "value_bound_mean_tv": value_bound(tv.mean().item(), reward_range, 0.99),
        "value_bound_max_tv": value_bound(tv.max().item(), reward_range, 0.99),
    }  # fmt: skip
    for what, u in dict(mean=mean[None], drawn=mean + var.sqrt() * noise[1:]).items():
        density = log_density(u, mean_f, var_f, steering.actor.squash)
        for epsilon in (0.001, 0.01, 0.05):
            out[f"violation_{what}_{epsilon}"] = (density < math.log(epsilon)).double().mean().item()
    return out


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


# --- Evaluation environments ---


class D4RLAntMaze(gym.Wrapper):
    """D4RL's AntMaze on gymnasium-robotics': 29 observations without the goal, reward 1 and the end at the goal.

    Other than there, the start is the origin, y grows downwards in the map, and the ant has torques up to 30 at
    10 Hz instead of 150 at 20 Hz. Made from D4RL's published maps and constants, not compared with its simulator.
    """

    def __init__(self, maze: str, **kwargs):
        rows = ANTMAZES[maze].split()
        grid = [[1 if cell == "#" else 0 if cell == "." else cell for cell in row] for row in rows]
        limit = 700 if maze == "umaze" else 1000
        # gymnasium-robotics counts rows from the north, D4RL from the south
        kwargs |= dict(maze_map=grid[::-1], continuing_task=False, max_episode_steps=limit)
        super().__init__(gym.make("AntMaze_UMaze-v4", **kwargs))
        self.task = self.env.unwrapped
        self.origin = self.task.maze.unique_reset_locations[0].copy()
        self.goal_cell = self.task.maze.unique_goal_locations[0].copy()
        self.task.position_noise_range, self.task.ant_env._reset_noise_scale = 0.0, 0.1
        model = self.task.ant_env.model
        model.opt.timestep, model.actuator_gear[:, 0] = 0.02, 30.0
        model.geom_solref[:], model.geom_solimp[:, :3] = (0.02, 1.0), (0.8, 0.8, 0.01)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,))

    def observation(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([obs["achieved_goal"] - self.origin, obs["observation"]])

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        random = self.task.np_random
        self.goal = self.goal_cell - self.origin + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2)
        return self.observation(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, truncated, info = self.env.step(action)
        obs = self.observation(obs)
        reached = bool(np.linalg.norm(obs[:2] - self.goal) <= 0.5)
        return obs, float(reached), reached, truncated, info


def flatten(obs: Any) -> np.ndarray:
    """One observation, array or (nested) dict, to (obs_dim,): keys sorted, as in the data (flatten_observations)."""
    return np.concatenate([flatten(obs[key]) for key in sorted(obs)]) if isinstance(obs, dict) else np.ravel(obs)


def make_eval_env(args: Args, domain: str, dataset: Dataset, shift: str = "none", **kwargs) -> gym.Env:
    """The evaluation environment: --eval-env-id, else the data set's own (Minari), else EVAL_ENVS' (D4RL), shifted."""
    maze = args.env_id.split("-")[1] if domain == "antmaze" and "-" in args.env_id else None
    spec = None if args.eval_env_id else dataset.env_spec
    if args.eval_env_id or spec:
        env_id, maze = args.eval_env_id or spec, None
    elif domain == "antmaze":
        require(maze in ANTMAZES, f"unknown --env-id {args.env_id}: the mazes are {', '.join(ANTMAZES)}")
        env_id = "AntMaze_UMaze-v4"
    else:
        env_id = EVAL_ENVS.get(domain, "liquidation_env:Liquidation-v0")
    name = getattr(env_id, "id", env_id)  # a Minari data set has an EnvSpec
    with warnings.catch_warnings():  # -v4 is what D4RL's data need; Gymnasium says that it is old every time
        warnings.filterwarnings("ignore", message=".*is out of date")
        try:
            if name.startswith("AntMaze"):
                import gymnasium_robotics  # not at the top: only these environments need it

                gym.register_envs(gymnasium_robotics)
            env_id = registered(spec) if spec else env_id
            env = D4RLAntMaze(maze, **kwargs) if maze else gym.make(env_id, **kwargs)
        except ModuleNotFoundError as error:
            remedy = "gymnasium-robotics==1.4.2" if name.startswith("AntMaze") else error.name
            raise UserError(f"the evaluation environment {name} needs {error.name}: pip install {remedy}") from None
        except UserError:
            raise
        except Exception as error:  # an unknown id, or whatever the environment's own code raises
            what = f"cannot make the evaluation environment {name}"
            raise UserError(f"{what}: {type(error).__name__}: {error}: check --eval-env-id") from error
    if shift in ("friction", "mass"):
        shift_model(env, shift)
    is_dict = isinstance(env.observation_space, gym.spaces.Dict)
    box = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(env.observation_space),))
    return gym.wrappers.TransformObservation(env, flatten, box) if is_dict else env


def shift_model(env: gym.Env, shift: str) -> None:
    """Scale the friction, or the masses and inertias, of this environment's own MuJoCo model."""
    import mujoco

    robot = getattr(env.unwrapped, "ant_env", env.unwrapped)
    require(hasattr(robot, "model"), f"--shifts {shift}: {env.spec.id} has no MuJoCo model: leave that shift out")
    if shift == "friction":
        robot.model.geom_friction[:] *= SHIFTS["friction"]
        robot.model.pair_friction[:] *= SHIFTS["friction"]
    else:
        robot.model.body_mass[:] *= SHIFTS["mass"]
        robot.model.body_inertia[:] *= SHIFTS["mass"]
        mujoco.mj_setConst(robot.model, robot.data)  # what the model derives from its masses


# --- Evaluation ---


class Noise:
    """Standard normal numbers of episode i, the same for every policy: generator (seed, i), `width` a step."""

    def __init__(self, seed: int, width: int):
        self.seed, self.width, self.generators = seed, width, {}

    def draw(self, episodes: list[int]) -> np.ndarray:
        """(B, width), the next numbers of each episode."""
        for i in episodes:
            self.generators.setdefault(i, np.random.default_rng([self.seed, i]))
        return np.stack([self.generators[i].standard_normal(self.width) for i in episodes])


def disturb(obs, z: np.ndarray, act_dim: int, obs_noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Split (B, obs + 3 act) normals: the observation the policy sees, its noise (2, B, act), the action's noise."""
    seen = obs + obs_noise * z[:, : obs.shape[1]]
    parts = z[:, obs.shape[1] :].reshape(len(z), 3, act_dim).transpose(1, 0, 2)
    return seen, parts[:2], parts[2]


def evaluate(act: Callable, make_env: Callable, featurise: Callable, episodes: int, seed: int, obs_noise, act_noise):
    """Play episodes, one each on a number of environments side by side, with one batched policy call per step.

    Episode i has the start `reset(seed=seed + i)` and its own noise, whatever the policy: two policies are compared in
    pairs. act(seen (B, obs), noise (2, B, act)) -> (B, act). Returns float64 "return" and "length", (episodes,), and
    "features", their sums over an episode, (episodes, 3).
    """
    envs = [make_env() for _ in range(min(episodes, 25))]
    space = envs[0].action_space
    noise = Noise(seed, envs[0].observation_space.shape[0] + 3 * space.shape[0])
    out = {"return": np.zeros(episodes), "length": np.zeros(episodes), "features": np.zeros((episodes, 3))}
    lanes, episode, waiting = list(range(len(envs))), list(range(len(envs))), len(envs)
    obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    while lanes:
        running, current = [episode[i] for i in lanes], np.stack([obs[i] for i in lanes])
        seen, policy_noise, action_noise = disturb(current, noise.draw(running), space.shape[0], obs_noise)
        # D4RL clips actions before every step, Gymnasium does not, and the control cost sees the difference
        actions = np.clip(act(seen, policy_noise) + act_noise * action_noise, space.low, space.high)
        out["features"][running] += featurise(current, actions)
        for i, action in zip(list(lanes), actions.astype(np.float32), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            out["return"][episode[i]] += float(reward)
            out["length"][episode[i]] += 1
            if (terminated or truncated) and waiting < episodes:
                episode[i], waiting = waiting, waiting + 1
                obs[i] = envs[i].reset(seed=seed + episode[i])[0]
            elif terminated or truncated:
                lanes.remove(i)
    for env in envs:
        env.close()
    return out


def evaluate_liquidation(
    act: Callable, market: dict, featurise: Callable, episodes: int, seed: int, obs_noise, act_noise
):
    """The same for liquidation, all episodes at once; one seed is one set of price paths for every policy."""
    envs = gym.make_vec("liquidation_env:Liquidation-v0", num_envs=episodes, **market)
    obs, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    out = {"return": np.zeros(episodes), "length": np.zeros(episodes), "features": np.zeros((episodes, 3))}
    alive = np.ones(episodes, bool)
    while alive.any():
        seen, policy_noise, action_noise = disturb(obs, rng.standard_normal((episodes, 6)), 1, obs_noise)
        actions = np.clip(act(seen, policy_noise) + act_noise * action_noise, -1, 1)
        out["features"] += alive[:, None] * featurise(obs, actions)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        out["return"] += alive * reward
        out["length"] += alive
        alive &= ~(terminated | truncated)
    envs.close()
    return out


def normalised_score(returns: float | np.ndarray, domain: str) -> float | np.ndarray:
    """100 (R − R_random) / (R_expert − R_random)."""
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


# --- Study: cells of (prior, shift, goal), configurations of (rule, α), one CSV row per episode ---


class EpisodeTable:
    """episodes.csv, written after every configuration; what a stopped run left whole is not played again."""

    KEYS = ("prior", "shift", "goal", "rule", "alpha")

    def __init__(self, path: Path, names: tuple[str, ...], tasks: list[tuple], episodes: int):
        self.path, self.names, self.tasks, self.episodes = path, names, tasks, episodes
        self.fields = [*self.KEYS, "episode", "objective", "return", "length", *names]
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        self.done = 0  # configurations that are whole
        for number, task in enumerate(tasks):
            part = rows[number * episodes : (number + 1) * episodes]
            whole = len(part) == episodes and all(None not in row.values() for row in part)
            if not whole or any(tuple(row[key] for key in self.KEYS) != tuple(map(str, task)) for row in part):
                break
            self.done += 1
        self.rows = rows[: self.done * episodes]
        with replacing(path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(self.rows)

    def append(self, task: tuple, weights: np.ndarray, played: dict[str, np.ndarray]) -> None:
        """The episodes of one configuration; the goal's objective is weights · features, summed over an episode."""
        objective, rows = played["features"] @ weights, []
        for i in range(self.episodes):
            values = (i, objective[i], played["return"][i], int(played["length"][i]), *played["features"][i])
            row = zip(self.fields, (*task, *values), strict=True)
            rows.append({key: str(value.item() if isinstance(value, np.generic) else value) for key, value in row})
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerows(rows)
            file.flush()
        self.rows += rows
        self.done += 1

    def column(self, task: tuple, key: str) -> np.ndarray:
        """(episodes,) of a configuration that is done."""
        number = self.tasks.index(task)
        return np.array([float(row[key]) for row in self.rows[number * self.episodes : (number + 1) * self.episodes]])


def summarise(table: EpisodeTable) -> list[dict]:
    """Per configuration: mean objective and return, and their paired differences to Frozen of the same cell."""
    summary = []
    for task in table.tasks:
        row = dict(zip(table.KEYS, task, strict=True)) | {"episodes": table.episodes}
        base = (*task[:3], "frozen", 0.0)
        for key in ("objective", "return"):
            values = table.column(task, key)
            difference, low, high = paired_bootstrap(values - table.column(base, key))
            row |= {key: values.mean(), f"{key}_std": values.std(), f"{key}_difference": difference}
            row |= {f"{key}_low": low, f"{key}_high": high, f"{key}_class": classify(low, high)}
        summary.append(row | {"length": table.column(task, "length").mean()})
    return summary


def compare_selector(summary: list[dict], rule: str, chosen: dict[tuple, float]) -> list[dict]:
    """Per cell: the selector's α and the oracle's, the best of all that were played, Frozen (α = 0) among them."""
    cells = list(dict.fromkeys((row["prior"], row["shift"], row["goal"]) for row in summary))
    out = []
    for cell in cells:
        rows = [row for row in summary if (row["prior"], row["shift"], row["goal"]) == cell]
        family = [row for row in rows if row["rule"] in ("frozen", rule)]
        selected = next(row for row in family if row["alpha"] == chosen[cell[0], cell[2]] and row["rule"] == rule)
        best = max(family, key=lambda row: row["objective"])
        base = rows[0]["objective"]
        out.append({
            "prior": cell[0], "shift": cell[1], "goal": cell[2], "alpha": selected["alpha"],
            "objective": selected["objective"], "class": selected["objective_class"], "frozen": base,
            "oracle_alpha": best["alpha"], "oracle_objective": best["objective"],
            "regret": best["objective"] - selected["objective"],
            "regret_percent_of_frozen": 100 * (best["objective"] - selected["objective"]) / max(abs(base), 1e-12),
            "return_percent_of_frozen": 100 * selected["return"] / (rows[0]["return"] or math.nan),
        })  # fmt: skip
    return out


def write_rows(path: Path, rows: list[dict]) -> None:
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


COLOURS = {"kl-reg": "C2", "poe": "C0", "additive": "C1", "prior-only": "C3", "critic-greedy": "C4", "iql-guided": "C5"}


CURVES = {"objective": "", "return": "_return"}  # what is drawn, and how its file name ends


def plot_curves(summary: list[dict], env_id: str, what: str, path: Path) -> None:
    """Objective, or return, against α: a column for every goal, a row for every prior and shift, a line for every rule.

    The bar around a point is the 95% interval of its paired difference to Frozen, so it is right where it clears the
    dotted line, which is Frozen.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    goals = list(dict.fromkeys(row["goal"] for row in summary))
    cells = list(dict.fromkeys((row["prior"], row["shift"]) for row in summary))
    size = (4.4 * len(goals), 0.4 + 3.0 * len(cells))
    fig, axes = plt.subplots(len(cells), len(goals), figsize=size, layout="constrained", squeeze=False)
    for (prior, shift), line in zip(cells, axes, strict=True):
        for goal, ax in zip(goals, line, strict=True):
            rows = [r for r in summary if (r["prior"], r["shift"], r["goal"]) == (prior, shift, goal)]
            ax.axhline(rows[0][what], color="k", ls=":", lw=1, label="frozen")
            for rule, colour in COLOURS.items():
                some = sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["alpha"])
                if some:
                    some = rows[:1] + some if rule in ("poe", "kl-reg", "additive") else some  # α = 0 is Frozen
                    y = np.array([r[what] for r in some])
                    ends = (np.array([r[f"{what}_{end}"] for r in some]) for end in ("low", "high"))
                    low, high = (rows[0][what] + end for end in ends)
                    wide = dict(lw=4, alpha=0.35) if rule == "kl-reg" else dict(lw=1)  # it lies under PoE
                    bars = np.stack([y - low, high - y]).clip(0)
                    x = [r["alpha"] for r in some]
                    ax.errorbar(x, y, bars, fmt="o-", ms=3, capsize=2, color=colour, label=rule, **wide)
            shifted = "" if shift == "none" else f", {shift}"
            ax.set(
                title=f"{goal}: {prior} prior{shifted}",
                xlabel="α",
                ylabel=f"goal's {what}" if what == "objective" else what,
            )
    axes[0, 0].legend(fontsize=7)
    fig.suptitle(env_id)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_grid(summary: list[dict], env_id: str, path: Path) -> None:
    """HELP, FROZEN or HURT of every configuration (rows) in every cell (columns), for objective and for return."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = list(dict.fromkeys((row["goal"], row["prior"], row["shift"]) for row in summary))
    order = ["prior-only", "additive", "poe", "kl-reg", "iql-guided", "critic-greedy"]

    def name(row: dict) -> tuple[int, str]:
        """The selector's α differs from cell to cell: one line for all of them."""
        alpha = f"{row['alpha']:g}" if row["alpha"] in (*ALPHAS, 1.0) else "selected"
        return order.index(row["rule"]), f"{row['rule']}  {alpha}"

    frozen_of = {(row["goal"], row["prior"], row["shift"]): row for row in summary if row["rule"] == "frozen"}
    rows = [row for row in summary if row["rule"] != "frozen"]
    lines = sorted(set(map(name, rows)))
    shade = {"HELP": (0.62, 0.82, 0.62), "FROZEN": (0.9, 0.9, 0.9), "HURT": (0.93, 0.62, 0.6)}
    across = (1, 2) if len(cells) <= 6 else (2, 1)
    size = (1.6 + 0.85 * len(cells) * across[1], 1.0 + (0.6 + 0.26 * len(lines)) * across[0])
    fig, axes = plt.subplots(*across, figsize=size, layout="constrained", sharey=True)
    for ax, what in zip(axes, ("objective", "return"), strict=True):
        image = np.ones((len(lines), len(cells), 3))
        for row in rows:
            cell = row["goal"], row["prior"], row["shift"]
            y, x = lines.index(name(row)), cells.index(cell)
            image[y, x] = shade[row[f"{what}_class"]]
            base = abs(frozen_of[cell][what])
            percent = round(100 * row[f"{what}_difference"] / base) if base else 0
            ax.text(x, y, f"{percent:+d}%" if base and percent else "0", ha="center", va="center", fontsize=7)
        ax.imshow(image, aspect="auto")
        labels = ["\n".join([goal, prior] + [shift] * (shift != "none")) for goal, prior, shift in cells]
        ax.set_xticks(range(len(cells)), labels, fontsize=6)
        ax.set_yticks(range(len(lines)), [text for _, text in lines], fontsize=7)
        ax.set_title({"objective": "goal's objective", "return": "task's return"}[what], fontsize=9)
    fig.suptitle(f"{env_id}: green HELP, grey FROZEN, red HURT; change against Frozen", fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- Main ---


def resolve(args: Args) -> tuple[Args, str, dict[str, tuple[float, ...]]]:
    """Fill what the command line left open and check it: (args, domain, every goal's weights). Raises UserError."""
    domain = (args.env_id.split("/")[-2] if "/" in args.env_id else args.env_id.split("-")[0]).lower()
    near = " or ".join(difflib.get_close_matches(args.env_id, ["liquidation", *D4RL_FILES], n=3, cutoff=0.4))
    known = f"the environments with goals are {', '.join(DOMAINS)}"
    require(domain in DOMAINS, f"unknown --env-id {args.env_id}: {f'did you mean {near}? ' if near else ''}{known}")
    table = DOMAINS[domain] | ({"episodes": 25} if args.study else {}) | ({"goal": "own"} if args.goal_weights else {})
    args = Args(**{name: table.get(name) if value is None else value for name, value in vars(args).items()})

    goals = dict(GOALS[domain]) | ({"own": tuple(args.goal_weights)} if args.goal_weights else {})
    fine = all(math.isfinite(w) for w in goals.get("own", ())) and any(goals.get("own", (1,)))
    require(fine, f"--goal-weights {args.goal_weights}: must be finite and not all 0")
    remedy = f"one of {', '.join(goals)}" + ("" if args.goal_weights else ", or give --goal-weights")
    require(args.goal in goals, f"--goal {args.goal}: {domain} has no such goal: {remedy}")
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in ("seed", "alpha"):
            zero = name in ("num_threads", "kl_budget", "gae_lambda")
            fine = math.isfinite(value) and (value > 0 or (value == 0 and zero))
            require(fine, f"--{name.replace('_', '-')} {value}: must be {'0 or more' if zero else 'greater than 0'}")
    if args.alpha is not None:
        fine = 0 <= args.alpha < 1
        require(fine, f"--alpha {args.alpha}: must be in [0, 1); 1 would drop the frozen actor: see Prior-only")
    for name, fine, remedy in (
        ("gamma", args.gamma <= 1, "must be at most 1"),
        ("gamma", args.gamma < 1 or domain == "liquidation", "only liquidation has a horizon that allows γ = 1"),
        ("gae_lambda", args.gae_lambda <= 1, "must be at most 1"),
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("episodes", args.episodes >= 2, "must be at least 2: an interval needs two"),
    ):
        require(fine, f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")
    foreign = ("friction", "mass") if domain == "liquidation" else ("volatility", "reversion")
    bad = [shift for shift in args.shifts if shift in foreign]
    fitting = [shift for shift in SHIFTS if shift not in foreign]
    require(not bad, f"--shifts {' '.join(bad)}: {domain} has no such parameter: use {', '.join(fitting)}")
    return args, domain, goals


def given_actor(args: Args, domain: str, dataset: Dataset) -> Actor | None:
    """The actor that --actor names, refused unless it fits the task; None for one to be trained. Raises UserError."""
    if args.actor in ("bc", "awr"):
        return None
    if args.actor == "dataset":
        folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
        listed = folder / Path(D4RL_FILES[args.env_id][0]).name if args.env_id in D4RL_FILES else None
        path = Path(args.dataset_path).expanduser() if args.dataset_path else listed
        what = f"--actor dataset: {dataset.name} is no HDF5 file of D4RL's, which may embed a policy"
        require(path is not None and path.is_file(), f"{what}: use --actor bc")
        actor = embedded_policy(path)
    else:
        path = args.actor
        content = load_tensors(path, "actor")
        theirs = content.get("domain")
        require(theirs == domain, f"--actor {path} is of {theirs}, this is {domain}: give an actor of this task")
        actor = Actor.from_file(content, path)
    have = len(actor.obs_mean), actor(torch.zeros(1, len(actor.obs_mean)))[0].shape[1]
    need = dataset.observations.shape[1], dataset.actions.shape[1]
    what = f"--actor {path} has {have[0]} observations and {have[1]} actions, {dataset.name} {need[0]} and {need[1]}"
    require(have == need, f"{what}: give an actor of this task")
    return actor


def print_result(result: dict, summary: list[dict], run_dir: Path) -> None:
    print(
        f"\n{'prior':<14}{'shift':<18}{'goal':<11}{'rule':<14}{'α':>7}{'objective':>11}{'minus Frozen, 95%':>32}",
        end="",
    )
    print(f"{'':<8}{'return':>9}{'minus frozen':>25}")
    for row in summary:
        print(f"{row['prior']:<14}{row['shift']:<18}{row['goal']:<11}{row['rule']:<14}{row['alpha']:7.4g}", end="")
        for what, width in (("objective", 11), ("return", 9)):
            low, high = row[f"{what}_low"], row[f"{what}_high"]
            print(f"{row[what]:{width}.2f}", end="")
            print(
                ""
                if row["rule"] == "frozen"
                else f"{row[f'{what}_difference']:+10.2f} [{low:+.2f}, {high:+.2f}]".rjust(32),
                end="",
            )
            print(
                f" {'' if row['rule'] == 'frozen' else row[f'{what}_class']:<7}" if what == "objective" else "\n",
                end="",
            )
    print("\nselector: largest α within the KL budget; oracle: best α of those played, chosen on the same episodes")
    for row in result["selector"]:
        print(
            f"  {row['prior']}, {row['shift']}, {row['goal']}: α {row['alpha']:.4g} (KL {row['kl']:.3f}), "
            f"{row['class']}, return {row['return_percent_of_frozen']:.0f}% of Frozen's; oracle α "
            f"{row['oracle_alpha']:.4g}, regret {row['regret']:.3g} ({row['regret_percent_of_frozen']:.1f}%)"
        )
    identity = result["identity"]
    print(
        f"identity at α {identity['alpha']:.4g}, β {identity['beta']:.4g}: means of PoE and KL-Reg differ by at most "
        f"{identity['largest_relative_difference_of_means']:.1e}, their variance ratio from 1 + β by "
        f"{identity['largest_relative_difference_of_ratio']:.1e} (relative)"
    )
    print(f"the frozen actor's SHA-256 is unchanged: {result['frozen_sha256'][:12]}")
    print(f"{result['seconds'] / 60:.1f} minutes; steered_actor.pt, cells.csv, curves.png, grid.png are in {run_dir}")


def run(args: Args) -> Path:
    """Learn the prior, steer, evaluate; returns the run folder."""
    resumed, run_dir = None, Path(args.resume or "")
    if args.resume:
        resumed, capture_video = load_checkpoint(run_dir), args.capture_video
        args = checkpoint_args(Args, resumed)
        args.capture_video = capture_video or args.capture_video
    args, domain, goals = resolve(args)
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
    for shift in args.shifts:  # before anything is trained
        env = make_env(shift=shift)
        check_spaces(dataset, env)
        environment = env.spec.id
        env.close()
    actor = None if resumed and resumed["phase"] == "playing" else given_actor(args, domain, dataset)
    weights = {name: np.array(values, np.float64) for name, values in goals.items()}
    featurise = functools.partial(features, domain)
    rows = featurise(dataset.observations, dataset.actions)  # (N, 3)
    goal_rewards = rows @ np.stack(list(weights.values()), 1)  # (N, G)
    names, obs_std = FEATURES[domain], dataset.observations.std(0)
    pairs = zip(names, rows.mean(0), rows.std(0), strict=True)
    print("features  " + ", ".join(f"{name} {mean:.3g} ± {std:.3g}" for name, mean, std in pairs))
    # The prior is told the goal as its weights in standard deviations of the features, of length 1.
    told = np.stack(list(weights.values())) * rows.std(0)
    told = torch.as_tensor(told / np.linalg.norm(told, axis=1, keepdims=True).clip(1e-12), dtype=torch.float32)

    # Run folder
    run_dir = run_dir if resumed else make_run_dir(args)
    identity = {
        "kind": "steer_poe checkpoint", "script_sha256": hashlib.sha256(SCRIPT).hexdigest(), "args": vars(args),
        "data_sha256": dataset.sha256, "environment": environment, "machine": machine(device),
    }  # fmt: skip
    with restoring(run_dir / "checkpoint.pt"):
        checkpoint = Checkpoint(run_dir, identity, math.inf, resumed["seconds"] if resumed else 0.0)
        if resumed:
            checkpoint.check(resumed)
    checkpoint.at_once = True  # a signal need not wait: learning starts again, episodes.csv has what was played
    print(f"run folder: {run_dir}")

    with checkpoint:
        # Frozen actor, prior and critic, or the checkpoint's
        if not resumed:
            checkpoint.save(phase="learning")
        torch.manual_seed(args.seed)
        if resumed and resumed["phase"] == "playing":
            with restoring(run_dir / "checkpoint.pt"):
                actor, prior = (Actor.from_file(resumed[key], run_dir / "checkpoint.pt") for key in ("actor", "prior"))
                report, critic = resumed["report"], Critic(*resumed["critic_sizes"])
                critic.load_state_dict(resumed["critic"])
        else:
            tensor = functools.partial(torch.as_tensor, device=device)
            std = torch.where(tensor(obs_std) > 1e-6, tensor(obs_std), torch.ones_like(tensor(obs_std)))
            rewards = tensor(np.column_stack([dataset.rewards, goal_rewards]).astype(np.float32))
            data = Data(
                tensor(dataset.observations), tensor(dataset.next_observations), tensor(dataset.actions), rewards,
                tensor(dataset.terminals), episode_ends(dataset), tensor(dataset.observations.mean(0)), std,
            )  # fmt: skip
            critic, advantage = train_critic(args, data, bar)
            if actor is None:  # a clone is weighted by nothing, awr's by the task's advantage
                task = advantage[:, :1] if args.actor == "awr" else torch.zeros_like(advantage[:, :1])
                weighted = regression_weights(task, args.temperature, args.weight_clip)
                actor = weighted_regression(args, data, weighted, SQUASHES[0], None, bar, "frozen actor").cpu()
            before = actor.sha256()
            row_weights = regression_weights(advantage[:, 1:], args.temperature, args.weight_clip)
            effective = row_weights.mean(0).square() / row_weights.square().mean(0)
            report = {"frozen_sha256": before, "effective_rows": dict(zip(goals, effective.tolist(), strict=True))}
            report["advantage_std"] = dict(zip(("task", *goals), critic.advantage_std.tolist(), strict=True))
            prior = weighted_regression(args, data, row_weights, actor.squash, told.to(device), bar, "prior").cpu()
            critic, sizes = critic.cpu(), [*data.obs.shape[1:], *data.action.shape[1:], 1 + len(goals), args.hidden]
            checkpoint.save(
                phase="playing", actor=actor.to_file(), prior=prior.to_file(), critic=critic.state_dict(),
                critic_sizes=sizes, report=report,
            )  # fmt: skip
        steering = Steering(actor, prior, told, critic).requires_grad_(False)

        # The KL-budget selector, on states of the data
        generator = torch.Generator().manual_seed(args.seed)
        states = torch.randint(len(rows), (5000,), generator=generator)
        states = torch.as_tensor(dataset.observations)[states]
        noise = torch.randn(33, len(states), dataset.actions.shape[1], generator=generator, dtype=torch.float64)
        played_goals = list(goals) if args.study else [args.goal]
        chosen, kls = {}, {}
        for kind, goal in itertools.product(dict.fromkeys(("clean", *args.priors)), played_goals):
            gaussians = steering.gaussians(states, list(goals).index(goal), kind, noise[0])
            alpha = args.alpha
            if alpha is None:  # rounded down: within the budget, and readable
                alpha = math.floor(1e4 * select_alpha(args.rule, args.kl_budget, *gaussians)) / 1e4
            chosen[kind, goal], kls[kind, goal] = alpha, mean_kl(args.rule, alpha, *gaussians)

        # Episodes
        cells = list(itertools.product(dict.fromkeys(args.priors), dict.fromkeys(args.shifts), played_goals))
        tasks = [(*cell, *c) for cell in cells for c in configurations(args, chosen[cell[0], cell[2]])]
        table = EpisodeTable(run_dir / "episodes.csv", names, tasks, args.episodes)
        progress = bar(total=len(tasks) * args.episodes, initial=table.done * args.episodes, desc="episodes")
        for task in tasks[table.done :]:
            kind, shift, goal, rule, alpha = task
            progress.set_postfix_str(f"{goal} {rule} {alpha:g}")
            options = dict(goal=list(goals).index(goal), kind=kind, rule=rule, alpha=alpha)
            act = functools.partial(steering.act, **options, stochastic=args.stochastic)
            obs_noise = SHIFTS[shift] * obs_std if shift == "observation-noise" else 0.0
            rest = featurise, args.episodes, args.seed + 20_000, obs_noise, SHIFTS[shift] * (shift == "action-noise")
            if domain == "liquidation" and args.eval_env_id is None:
                market = {"volatility": {"sigma": 0.2 * SHIFTS[shift]}, "reversion": {"theta": 0.05 * SHIFTS[shift]}}
                played = evaluate_liquidation(act, market.get(shift, {}), *rest)
            else:
                played = evaluate(act, functools.partial(make_env, shift=shift), *rest)
            table.append(task, weights[goal], played)
            progress.update(args.episodes)
        progress.close()

        # Final result
        summary = summarise(table)
        selector = compare_selector(summary, args.rule, chosen)
        for row in selector:
            row["kl"] = kls[row["prior"], row["goal"]]
        diagnostics = []
        for kind, goal in dict.fromkeys((prior, goal) for prior, _, goal in cells):
            number = list(goals).index(goal)
            reward_range = max(goal_rewards[:, number].max(), 0) - min(goal_rewards[:, number].min(), 0)
            for rule, alpha in configurations(args, chosen[kind, goal]):
                row = {"prior": kind, "goal": goal, "rule": rule, "alpha": alpha}
                diagnostics.append(
                    row | diagnose(steering, states, noise, number, kind, rule, alpha, float(reward_range))
                )
        goal = list(goals).index(args.goal)
        alpha = chosen["clean", args.goal]
        check = identity_check(alpha or 0.5, *steering.gaussians(states, goal, "clean", noise[0]))
        after = actor.sha256()
        same = after == report["frozen_sha256"]
        require(same, "the frozen actor has changed: this is a defect of steer_poe.py, please report it")
        about = {"script": "steer_poe", "env_id": args.env_id, "domain": domain, "data_sha256": dataset.sha256}
        save_atomically(
            {
                "kind": "steered actor", **about, "goal": args.goal, "goal_weights": list(goals[args.goal]),
                "rule": args.rule, "alpha": alpha, "frozen": actor.to_file(), "frozen_sha256": after,
                "prior": steering.priors[goal].to_file(),
            },
            run_dir / "steered_actor.pt",
        )  # fmt: skip
        result = {
            **about, "goals": goals, "goal": args.goal, "rule": args.rule, "alpha": alpha, "features": names,
            "actor": args.actor, "frozen_sha256": after, "frozen_return": summary[0]["return"],
            "frozen_score": normalised_score(summary[0]["return"], domain), "learning": report, "identity": check,
            "selector": selector, "episodes": args.episodes, "cells": len(cells), "configurations": len(tasks),
            "behaviour_data_return": float(episode_returns(dataset).mean()),
            "dataset": {"name": dataset.name, "source": dataset.source, "sha256": dataset.sha256},
            "args": vars(args), "seconds": time.monotonic() - checkpoint.started,
            "script_sha256": identity["script_sha256"], "environment": environment, "machine": identity["machine"],
            "versions": identity["machine"]["versions"],
        }  # fmt: skip
        for name, content in dict(cells=summary, selector=selector, diagnostics=diagnostics).items():
            write_rows(run_dir / f"{name}.csv", content)
        plots = {f"curves{end}": functools.partial(plot_curves, what=what) for what, end in CURVES.items()}
        for name, draw in (plots | {"grid": plot_grid}).items():
            with replacing(run_dir / f"{name}.png") as part:
                draw(summary, figure_name(args.env_id, dataset.source), path=part)
        if args.capture_video:
            zeros = np.zeros((2, 1, dataset.actions.shape[1]))
            act = functools.partial(steering.act, noise=zeros, goal=goal, rule=args.rule, alpha=alpha)
            with replacing(run_dir / "episode.gif") as part:
                save_gif(act, make_env, args.seed, part)
        with replacing(run_dir / "result.json") as part:  # the last one: a folder that has it is complete
            part.write_text(json.dumps(result, indent=2, default=float) + "\n")
    print_result(result, summary, run_dir)
    return run_dir


def main() -> None:
    exit_cleanly(lambda: run(command_line(Args, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    main()
