"""Implicit Q-Learning (IQL): offline reinforcement learning, and fine-tuning online.

Paper: "Offline Reinforcement Learning with Implicit Q-Learning", arXiv 2110.06169; the equation numbers are its own.
No value is ever asked of an action outside the data: V(s) is an upper expectile of Q(s, a) over the data's actions.

    V  value     Q, Q̄  twin critics, target critics (the smaller of two)     π(a | s)  policy     γ  discount
    τ  expectile     β  inverse temperature     D  the data set

    (5)  L_V = E_D[ L₂^τ(Q̄(s, a) − V(s)) ],   L₂^τ(u) = |τ − 1(u < 0)| u²
    (6)  L_Q = E_D[ (r + γ V(s') − Q(s, a))² ]
    (7)  L_π = −E_D[ min(exp(β (Q̄(s, a) − V(s))), 100) log π(a | s) ]

Run it:
    python iql.py                                           # liquidation, generated data, no download
    python iql.py --env-id hopper-medium-v2                 # the paper's setting, a million updates
    python iql.py --env-id hopper-medium-v2 --quick         # 50,000 updates, minutes on a CPU
    python iql.py --env-id antmaze-umaze-v2 --online-steps 1000000      # fine-tuned online afterwards
    python iql.py --env-id D4RL/door/human-v2               # a Minari id
    python iql.py --resume runs/<run folder>                # goes on where a run stopped
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
# TensorFlow Datasets' d4rl tables, for the server publishes none. Not in them, and so not downloaded here (give the
# file with --dataset-path): antmaze-medium-play-v2, relocate, kitchen.
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
        ant         random        384466831 93cc10893eed2b8e17f81d1aa51dc23d27c5ca101a3804249f6bd038c6f06055
        ant         medium        376239825 461c03b9f70f40d66b47608a92965e4ef3642bd9cdb1320d10acc92754167137
        ant         expert        373231677 fa22531ca79ea051006fa48bb652120d2e12c813919c530369a03c2688311b0f
        ant         medium-expert 748335217 8cfb64e62d8944b5d9dada5f0cfc13a295fafe0c6ba58b778e32ebf16c95aef1
        ant         medium-replay 136482252 844c4e5743ef51091f2106a3570b257fb149032c4743f8a5f02f40adc3b42a46
        ant         full-replay   449390167 b95b0a7f34b1d5d1bedfded0f8e9cfc508b59de83cd4cbfb65b18dbd5056f26c
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
D4RL_FILES |= {
    f"{task}-v1": (f"hand_dapg_v1/{task}-v1.hdf5", int(size), sha256)
    for task, size, sha256 in map(
        str.split,
        """
        pen-human     2040573   209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f
        pen-cloned    155074191 6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22
        pen-expert    262040663 3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374
        door-human    3121206   f9691288c3ddf2b4e7b31bdae0d8444b80ba035515495f8a902d60c43ee09370
        door-cloned   294356136 1f6a60ecc4d2a2e5c02f41dd3412be61bb265a33dcf120ceee9e9682d4fe4d48
        door-expert   536056678 66df4cd4e0a1e0b72ea72653ce088e29ecbfa99bac3cd2b52e64092e9a0aaab4
        hammer-human  5606475   3e42f3f49b5c92a901601dfe867c6c62a9651cbe79f6760ec8b402a15816a498
        hammer-cloned 446616879 e48d75b159bdd72f51d3f01448d3eca4d38275714e11e995c14a36f6cf159db3
        hammer-expert 557047483 1c069a0f6e4852493023c77dc3b3a12d8d5ac2e3a034827fea3ab8a161e7185f
        """.strip().splitlines(),
    )
}

# The paper's scores (Tables 1 and 3) by the data they are for. AntMaze and Adroit are its -v0 data: --env-id names
# their successors, close but not the same. Liquidation: what PSPO's paper (Table 2) reports for IQL.
PAPER_SCORES = {
    "liquidation": 0.0,
    "halfcheetah-medium-v2": 47.4, "halfcheetah-medium-replay-v2": 44.2, "halfcheetah-medium-expert-v2": 86.7,
    "hopper-medium-v2": 66.3, "hopper-medium-replay-v2": 94.7, "hopper-medium-expert-v2": 91.5,
    "walker2d-medium-v2": 78.3, "walker2d-medium-replay-v2": 73.9, "walker2d-medium-expert-v2": 109.6,
    "antmaze-umaze-v2": 87.5, "antmaze-umaze-diverse-v2": 62.2, "antmaze-medium-play-v2": 71.2,
    "antmaze-medium-diverse-v2": 70.0, "antmaze-large-play-v2": 39.6, "antmaze-large-diverse-v2": 47.5,
    "kitchen-complete-v0": 62.5, "kitchen-partial-v0": 46.3, "kitchen-mixed-v0": 51.0,
    "pen-human-v1": 71.5, "hammer-human-v1": 1.4, "door-human-v1": 4.3, "relocate-human-v1": 0.1,
    "pen-cloned-v1": 37.3, "hammer-cloned-v1": 2.1, "door-cloned-v1": 1.6, "relocate-cloned-v1": -0.2,
}  # fmt: skip
# Returns of score 0 and 100 (D4RL's). A domain without them is scored by its return.
REFERENCE_RETURNS = {
    "liquidation": (0.0, 135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
    "ant": (-325.6, 3879.7),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331),
    "hammer": (-274.856578, 12794.134825),
    "relocate": (-6.425911, 4233.877798),
    "door": (-56.512833, 2880.569309),
}
SUCCESS_DOMAINS = ("antmaze", "pointmaze")  # scored by the share of episodes that reach the goal: return above 0

# Evaluation environments of D4RL's data; Minari's data bring their own.
EVAL_ENVS = {
    "hopper": dict(id="Hopper-v4"),
    "walker2d": dict(id="Walker2d-v4"),
    "halfcheetah": dict(id="HalfCheetah-v4"),
    "ant": dict(id="Ant-v4"),
    "pen": dict(id="AdroitHandPen-v1", max_episode_steps=100),
    "hammer": dict(id="AdroitHandHammer-v1", max_episode_steps=200),
    "relocate": dict(id="AdroitHandRelocate-v1", max_episode_steps=200),
    "door": dict(id="AdroitHandDoor-v1", max_episode_steps=200),
}
ROBOTICS = ("AntMaze", "PointMaze", "AdroitHand", "FrankaKitchen")  # these ids are gymnasium-robotics'
# D4RL's evaluation mazes, 4 units a cell, y growing downwards; r: start, g: goal.
ANTMAZES = {
    "umaze": "##### #r..# ###.# #g..# #####",
    "medium": "######## #r.##..# #..#...# ##...### #..#...# #.#..#.# #...#.g# ########",
    "large": "############ #r...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### "
    "#..#...#.g.# ############",
}

# Settings per domain; a flag on the command line wins. All are the official code's, but for those marked "ours".
MUJOCO = dict(
    expectile=0.7, beta=3.0, dropout=0.0, reward_transform="return_range",
    gamma=0.99, hidden=256, batch_size=256, actor_lr=3e-4, critic_lr=3e-4, target_rate=0.005,
    iterations=1_000_000, eval_every=5_000, eval_episodes=10, final_episodes=100,  # the last: ours
)  # fmt: skip
MAZE = MUJOCO | dict(expectile=0.9, beta=10.0, reward_transform="minus_one", eval_every=100_000, eval_episodes=100)
HANDS = MUJOCO | dict(beta=0.5, dropout=0.1, reward_transform="raw")
DOMAINS = {
    "liquidation": MUJOCO | dict(  # ours: 20 steps need no discount
        gamma=1.0, iterations=10_000, eval_every=1_000, eval_episodes=2_000, final_episodes=10_000,
    ),
    **dict.fromkeys(("hopper", "walker2d", "halfcheetah", "ant"), MUJOCO),
    **dict.fromkeys(("humanoid", "swimmer", "reacher", "pusher"), MUJOCO),  # ours: Minari has them, the paper not
    **dict.fromkeys(("invertedpendulum", "inverteddoublependulum"), MUJOCO),  # ours, likewise
    "antmaze": MAZE,
    "pointmaze": MAZE,  # ours
    "pointmaze-dense": MAZE | dict(reward_transform="raw", eval_episodes=20),  # ours
    **dict.fromkeys(("kitchen", "pen", "hammer", "relocate", "door"), HANDS),
}  # fmt: skip
QUICK = dict(iterations=50_000, eval_every=5_000, eval_episodes=10, final_episodes=50)  # --quick


@dataclass
class Args:
    # --- Experiment ---
    exp_name: str = "iql"
    """name of this experiment, a part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 0
    """CPU threads for PyTorch (0: PyTorch's own choice)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the training steps; auto: on a CPU with a C++ compiler, of loops of 50,000 updates or more"""
    bfloat16: bool = False
    """training steps multiply between hidden layers in bfloat16: two thirds of the time, where a processor has it"""
    quick: bool = False
    """a CPU-sized setting: 50,000 updates, and 50 episodes at the end"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "iql"
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

    # --- Algorithm, Eqs. (5) to (7) ---
    expectile: float | None = None
    """τ of Eq. (5): 0.5 gives the behaviour's mean value, towards 1 the best value within the data"""
    beta: float | None = None
    """β of Eq. (7), multiplied with the advantage: 0 clones the behaviour, large values pick its best actions"""
    weight_clip: float = 100.0
    """largest weight of Eq. (7)"""
    dropout: float | None = None
    """dropout rate after the policy's hidden layers, in training only"""
    normalize_observations: bool = False
    """the networks see (s - mean) / std of the data's observations; the paper's see s as it is"""
    reward_transform: Literal["return_range", "minus_one", "raw"] | None = None
    """reward learnt from: r · 1000 / (largest - smallest episode return), r - 1, or r"""
    gamma: float | None = None
    """γ, the discount"""
    iterations: int | None = None
    """offline updates of all networks"""
    batch_size: int | None = None
    """rows per update"""
    hidden: int | None = None
    """units in each of the two hidden layers of every network"""
    actor_lr: float | None = None
    """learning rate of the policy (cosine to zero over --iterations; constant with --online-steps)"""
    critic_lr: float | None = None
    """learning rate of V and Q (constant)"""
    target_rate: float | None = None
    """Polyak rate of the target critics"""

    # --- Fine-tuning ---
    online_steps: int = 0
    """steps in the evaluation environment after the offline phase, one update each; the data stay in the buffer"""


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
    """`size` independent multi-layer perceptrons of (x − mean) / std: (B, in) or (size, B, in) -> (size, B, out).

    bfloat16: only between hidden layers; the first and the last layer see states and say values, and cost little.
    """

    def __init__(self, size: int, widths: list[int], activation=torch.relu_):
        super().__init__()
        self.size, self.activation = size, activation
        shapes = list(itertools.pairwise(widths))
        self.register_buffer("mean", torch.zeros(widths[0]))
        self.register_buffer("std", torch.ones(widths[0]))
        self.weights = nn.ParameterList(torch.empty(size, *shape) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(size, 1, shape[1]) for shape in shapes)
        for weight in itertools.chain(*self.weights):  # the last layer's too, as in the official code
            nn.init.orthogonal_(weight, math.sqrt(2))

    def forward(self, x: torch.Tensor, dropout: float = 0.0, bfloat16: bool = False) -> torch.Tensor:
        x = ((x - self.mean) / self.std).expand(self.size, *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                x = self.activation(x)
                x = F.dropout(x, dropout) if dropout else x
            multiply = bfloat16_product if bfloat16 and 0 < i < len(self.weights) - 1 else torch.bmm
            x = multiply(x, weight).add_(bias)
        return x


class Actor(nn.Module):
    """A diagonal Gaussian, not squashed, its std the same in every state. (B, obs) -> mean (B, act), log-std (act,)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(1, [obs_dim, hidden, hidden, act_dim])
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(
        self, obs: torch.Tensor, dropout: float = 0.0, bfloat16: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(obs, dropout, bfloat16)[0].tanh(), self.log_std.clamp(-5, 2)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The deterministic action, the mean: (B, obs) -> (B, act), within [-1, 1]."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.log_std.device)
        return self(obs)[0].cpu().numpy()

    @torch.no_grad()
    def explore(self, obs: np.ndarray) -> np.ndarray:
        """A sample of the Gaussian, clipped: (B, obs) -> (B, act)."""
        mean, log_std = self(torch.as_tensor(obs, dtype=torch.float32, device=self.log_std.device))
        return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1).cpu().numpy()


class Critic(nn.Module):
    """Twin critics. (B, obs), (B, act) -> (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(2, [obs_dim + act_dim, hidden, hidden, 1])

    def forward(self, obs: torch.Tensor, action: torch.Tensor, bfloat16: bool = False) -> torch.Tensor:
        return self.net(torch.cat([obs, action], dim=-1), bfloat16=bfloat16).squeeze(-1)


class Value(nn.Module):
    """(B, obs) -> (B,)."""

    def __init__(self, obs_dim: int, hidden: int):
        super().__init__()
        self.net = MLP(1, [obs_dim, hidden, hidden, 1])

    def forward(self, obs: torch.Tensor, bfloat16: bool = False) -> torch.Tensor:
        return self.net(obs, bfloat16=bfloat16)[0].squeeze(-1)


# --- Equations: pure functions of tensors ---


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, diag exp(2 log_std)), (..., act) -> (...)."""
    return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def expectile_loss(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """Eq. (5): L₂^τ(u) = |τ − 1(u < 0)| u², elementwise; u = Q̄(s, a) − V(s). Its minimiser is the τ-expectile."""
    return torch.where(difference < 0, 1 - expectile, expectile) * difference.square()


def bellman_target(reward, terminal, next_value, gamma: float) -> torch.Tensor:
    """y of Eq. (6): r + γ V(s'), and r alone where the episode ends; any shape."""
    return reward + gamma * torch.where(terminal, torch.zeros_like(next_value), next_value)


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. (6): squared error to y, mean over the batch, summed over the twins: (2, B), (B,) -> scalar."""
    return (q - target).square().mean(1).sum()


def advantage_weights(advantage: torch.Tensor, beta: float, clip: float) -> torch.Tensor:
    """Eq. (7): min(exp(β A), clip), elementwise; A = Q̄(s, a) − V(s)."""
    return (beta * advantage).exp().clamp(max=clip)


def policy_loss(log_prob: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. (7): −E[ w log π(a | s) ], maximum likelihood with weights: (B,), (B,) -> scalar."""
    return -(weights * log_prob).mean()


def cosine(iteration: int, iterations: int) -> float:
    """The policy's learning rate in update 1, 2, … as a share of the first: 1 falling to 0 (Appendix B)."""
    return 0.5 * (1 + math.cos(math.pi * (iteration - 1) / iterations))


def reward_transform(kind: str, dataset: Dataset) -> tuple[float, float]:
    """(scale, shift): what is learnt from is scale · r + shift, of the data's rewards and of those met online."""
    if kind == "return_range":  # so that the returns of the data span 1000
        returns = episode_returns(dataset)
        span = float(returns.max() - returns.min())
        what = f"{dataset.name}: all {len(returns)} complete episodes have the same return"
        require(span > 0, f"{what}, no range to scale by: use --reward-transform raw")
        return 1000 / span, 0.0
    return 1.0, -1.0 if kind == "minus_one" else 0.0


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


# --- Learner ---


DIVERGENCE = {  # likely causes, by the first part of a metric's name
    "value": "V diverges: lower --critic-lr, or look for extreme values in the data",
    "critic": "the critic diverges: lower --critic-lr, or look for extreme values in the data",
    "policy": "the policy diverges: lower --actor-lr or --beta",
}


class IQL(nn.Module):
    """Networks, optimisers and transitions; data["rewards"] are transformed already.

    `data` has room for the steps to come: the first `size` rows count.
    """

    METRICS = (
        "value/loss", "value/v", "critic/loss", "critic/q_data", "policy/loss", "policy/log_prob", "policy/log_std",
        "policy/advantage", "policy/weight", "policy/clipped",
    )  # fmt: skip

    def __init__(self, args: Args, data: dict[str, torch.Tensor], room: int = 0):
        super().__init__()
        self.args, self.size = args, len(data["rewards"])
        self.data = {key: torch.cat([x, x.new_zeros(room, *x.shape[1:])]) for key, x in data.items()}
        self.data["actions"].clamp_(-1 + 1e-5, 1 - 1e-5)
        obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.value = Value(obs_dim, args.hidden)
        self.actor = Actor(obs_dim, act_dim, args.hidden)
        self.critic = Critic(obs_dim, act_dim, args.hidden)
        if args.normalize_observations:
            mean, std = data["observations"].mean(0), data["observations"].std(0)
            for net in (self.value.net, self.actor.net, self.critic.net):
                net.mean[:obs_dim] = mean
                net.std[:obs_dim] = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.target_critic = Critic(obs_dim, act_dim, args.hidden)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("rows", torch.zeros(args.batch_size, dtype=torch.int64), persistent=False)
        self.to(data["rewards"].device)
        self.value_optimizer = Adam((self.value.parameters(), args.critic_lr))
        self.actor_critic_optimizer = Adam(
            (self.actor.parameters(), args.actor_lr), (self.critic.parameters(), args.critic_lr)
        )

    def add(self, obs, action, reward: float, next_obs, terminal: bool) -> None:
        """Append one transition, reward transformed, action within the data's bounds; terminal: not a time limit."""
        for key, value in zip(self.data, (obs, action, reward, next_obs, terminal), strict=True):
            self.data[key][self.size] = torch.as_tensor(value)
        self.data["actions"][self.size].clamp_(-1 + 1e-5, 1 - 1e-5)
        self.size += 1

    def draw(self) -> None:
        """Choose the rows of the next update; not within it, where a captured step would replay the `size` it saw."""
        self.rows.random_(self.size)

    def update(self) -> torch.Tensor:
        """The drawn batch in the official order V → π → Q → Q̄; returns METRICS, (M,)."""
        args = self.args
        obs, action, reward, next_obs, terminal = (column[self.rows] for column in self.data.values())

        # Eq. (5): V towards the upper expectile of Q̄ over the data's actions
        with torch.no_grad():
            target_q = self.target_critic(obs, action, args.bfloat16).amin(0)  # (B,)
        value_loss = expectile_loss(target_q - self.value(obs, args.bfloat16), args.expectile).mean()
        self.value_optimizer.minimise(value_loss)

        # Eqs. (7) and (6) share no parameter and both use the new V: one backward pass and one Adam step for both
        with torch.no_grad():
            v, next_v = self.value(torch.cat([obs, next_obs]), args.bfloat16).chunk(2)
            advantage = target_q - v
            weights = advantage_weights(advantage, args.beta, args.weight_clip)
            target = bellman_target(reward, terminal, next_v, args.gamma)
        mean, log_std = self.actor(obs, args.dropout, args.bfloat16)
        log_prob = gaussian_log_prob(action, mean, log_std)
        actor_loss = policy_loss(log_prob, weights)
        q = self.critic(obs, action, args.bfloat16)  # (2, B)
        q_loss = critic_loss(q, target)
        self.actor_critic_optimizer.minimise(actor_loss + q_loss)

        with torch.no_grad():
            follow(self.target_critic, self.critic, args.target_rate)
            return torch.stack([
                value_loss, v.mean(), q_loss, q.mean(), actor_loss, log_prob.mean(), log_std.mean(),
                advantage.mean(), weights.mean(), (weights >= args.weight_clip).float().mean(),
            ])  # fmt: skip

    def metric_bounds(self, horizon: int) -> dict[str, float]:
        """What the rewards of the data allow V and Q to be, at most, in episodes of up to `horizon` steps."""
        steps = 1 / (1 - self.args.gamma) if self.args.gamma < 1 else horizon
        return dict.fromkeys(("value/v", "critic/q_data"), self.data["rewards"].abs().max().item() * steps)

    @torch.no_grad()
    def advantages(self, num_rows: int = 5000) -> np.ndarray:
        """Q̄(s, a) − V(s) of random rows, (n,)."""
        rows = torch.randint(self.size, (num_rows,), device=self.data["rewards"].device)
        obs, action = self.data["observations"][rows], self.data["actions"][rows]
        return (self.target_critic(obs, action).amin(0) - self.value(obs)).cpu().numpy()


class Collector:
    """Steps in the environment with the exploring policy; every transition goes into the learner's data.

    An environment's state cannot be saved, but its seed and the `actions` so far can, and repeating them leads there.
    """

    def __init__(self, env: gym.Env, learner: IQL, transform: tuple[float, float], seed: int):
        self.env, self.learner, self.transform = env, learner, transform
        self.obs = env.reset(seed=seed)[0]
        self.episode_return, self.returns = 0.0, []  # of the episode under way, of the finished ones
        self.actions = []

    def repeat(self, actions: torch.Tensor) -> None:
        """Take the steps (n, act_dim) of an earlier process again, without learning. Raises UserError."""
        for action in actions.numpy():
            self.play(action)
        last = self.learner.data["next_observations"][self.learner.size - 1].cpu().numpy()
        same = not len(actions) or np.array_equal(np.float32(self.next_obs), last)
        require(same, "the environment does not repeat itself with the same seed and actions: start anew")

    def play(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """One step, and a new episode after the last: next observation, reward, whether the task ended."""
        self.actions.append(action)
        self.next_obs, reward, terminated, truncated, _ = self.env.step(action)
        self.obs, self.episode_return = self.next_obs, self.episode_return + float(reward)
        if terminated or truncated:
            self.returns.append(self.episode_return)
            self.obs, self.episode_return = self.env.reset()[0], 0.0
        return self.next_obs, float(reward), terminated

    def step(self) -> None:
        obs, action = self.obs, self.learner.actor.explore(self.obs[None])[0]
        next_obs, reward, terminated = self.play(action)
        scale, shift = self.transform
        # A time limit is no terminal: V(s') follows
        self.learner.add(obs, action, scale * reward + shift, next_obs, terminated)

    def finish(self) -> list[float]:
        """Give the environment up, and with it an episode under way: the returns of the finished ones."""
        self.env.close()
        return self.returns


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


def make_eval_env(args: Args, domain: str, dataset: Dataset, **kwargs) -> gym.Env:
    """The evaluation environment: --eval-env-id, else the data set's own (Minari), else EVAL_ENVS' (D4RL)."""
    maze = args.env_id.split("-")[1] if domain == "antmaze" and "-" in args.env_id else None
    spec = None if args.eval_env_id else dataset.env_spec
    if args.eval_env_id or spec:
        env_id, maze = args.eval_env_id or spec, None
    elif domain == "antmaze":
        require(maze in ANTMAZES, f"unknown --env-id {args.env_id}: the mazes are {', '.join(ANTMAZES)}")
        env_id = "AntMaze_UMaze-v4"
    elif domain == "liquidation":
        env_id = "liquidation_env:Liquidation-v0"
    else:
        remedy = "name one with --eval-env-id, or use Minari's data, such as D4RL/kitchen/complete-v2"
        known = domain in EVAL_ENVS and "/" not in args.env_id
        require(known, f"no environment of today fits {args.env_id}: {remedy}")
        kwargs = EVAL_ENVS[domain] | kwargs
        env_id = kwargs.pop("id")
    name = getattr(env_id, "id", env_id)  # a Minari data set has an EnvSpec
    try:
        if name.startswith(ROBOTICS):
            import gymnasium_robotics  # not at the top: only these environments need it

            gym.register_envs(gymnasium_robotics)
        if spec:  # some were collected without a time limit: then the registered one counts
            env_id = registered(spec)
            limits = spec.max_episode_steps, gym.registry[name].max_episode_steps
            kwargs["max_episode_steps"] = min((limit for limit in limits if limit), default=None)
        env = D4RLAntMaze(maze, **kwargs) if maze else gym.make(env_id, **kwargs)
    except ModuleNotFoundError as error:
        remedy = "gymnasium-robotics==1.4.2" if name.startswith(ROBOTICS) else error.name
        raise UserError(f"the evaluation environment {name} needs {error.name}: pip install {remedy}") from None
    except AssertionError:  # gymnasium-robotics 1.4.2 compares types of joints in a way that fails with MuJoCo 4
        reason = f"it does not start with MuJoCo {version('mujoco')}"
        raise UserError(f"cannot make the evaluation environment {name}: {reason}: pip install mujoco==3.6.0") from None
    except UserError:
        raise
    except Exception as error:  # an unknown id, or whatever the environment's own code raises
        what = f"cannot make the evaluation environment {name}"
        raise UserError(f"{what}: {type(error).__name__}: {error}: check --eval-env-id") from error
    size = gym.spaces.flatdim(env.observation_space)
    if domain == "ant" and (size, dataset.observations.shape[1]) == (27, 111):
        # D4RL's observations end in 84 contact forces that its simulator left at 0 (D4RL issue 143)
        box = gym.spaces.Box(-np.inf, np.inf, (111,))
        return gym.wrappers.TransformObservation(env, lambda obs: np.pad(obs, (0, 84)), box)
    is_dict = isinstance(env.observation_space, gym.spaces.Dict)
    box = gym.spaces.Box(-np.inf, np.inf, (size,))
    return gym.wrappers.TransformObservation(env, flatten, box) if is_dict else env


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
    """100 (R − R_random) / (R_expert − R_random); in goal mazes 100 or 0: reached, or not."""
    if domain in SUCCESS_DOMAINS:
        return 100.0 * (returns > 0)
    low, high = REFERENCE_RETURNS.get(domain, (0.0, 100.0))
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


def starts_and_returns(dataset: Dataset, transform: tuple[float, float], gamma: float, limit: int = 2000):
    """First observations (E, obs) of up to `limit` episodes and their discounted transformed returns (E,)."""
    ends = episode_ends(dataset)[:limit]
    starts = np.concatenate([[0], ends[:-1] + 1])
    rewards = transform[0] * dataset.rewards[: ends[-1] + 1].astype(np.float64) + transform[1]
    discounts = gamma ** (np.arange(len(rewards)) - np.repeat(starts, ends - starts + 1))
    return dataset.observations[starts], np.add.reduceat(discounts * rewards, starts)


def plot(result: dict, curve: list[dict], advantage: np.ndarray, value: np.ndarray, returns, act, path: Path) -> None:
    """Learning curve, advantages in the data, V against discounted returns, and for liquidation where the policy
    sells beside the exact stopping boundary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    args, liquidation = result["args"], result["domain"] == "liquidation"
    fig, axes = plt.subplots(1, 3 + liquidation, figsize=(4.2 * (3 + liquidation), 3.6), layout="constrained")
    points = [(row["iteration"], row["eval/score"]) for row in curve]
    offline = [point for point in points if point[0] <= args["iterations"]]
    axes[0].plot(*zip(*offline, strict=True), "o-", ms=3, label=f"seed {args['seed']}")
    if args["online_steps"]:
        online = [point for point in points if point[0] >= args["iterations"]]
        axes[0].plot(*zip(*online, strict=True), "o-", ms=3, label="fine-tuning online")
        axes[0].axvline(args["iterations"], color="0.8", lw=1)
    lines = {"exact optimum": ("optimum_score", "k-"), "paper": ("paper_score", "k--")}
    lines["behaviour in the data"] = ("behaviour_data_score", "k:")
    for name, (key, style) in lines.items():
        if result[key] is not None:
            axes[0].axhline(result[key], color=style[0], ls=style[1:], lw=1, label=f"{name}: {result[key]:.1f}")
    name = figure_name(result["env_id"], result["dataset"]["source"])
    axes[0].set(xlabel="iteration", ylabel="score", title=f"{name}: learning curve")
    axes[1].hist(advantage, bins=80, log=True)
    if args["beta"] > 0:
        at = math.log(args["weight_clip"]) / args["beta"]
        axes[1].axvline(at, color="k", ls="--", lw=1, label=f"weight {args['weight_clip']:g} of Eq. (7)")
    axes[1].set(xlabel="advantage Q̄ − V", ylabel="rows", title="Advantages in the data")
    axes[2].scatter(returns, value, s=4, alpha=0.4, linewidths=0)
    axes[2].axline((returns.mean(), returns.mean()), slope=1, color="k", lw=1)
    axes[2].set(xlabel="discounted return of the episode", ylabel="V(s₀)", title="Value of the data's first states")
    if liquidation:
        import liquidation_env

        price, step = np.linspace(0.5, 2.75, 181), np.arange(20)
        grid = np.stack(np.broadcast_arrays(step[:, None], 100.0, price[None]), -1).reshape(-1, 3)
        sold = act(grid.astype(np.float32)).clip(0, 1).reshape(20, -1)
        image = axes[3].pcolormesh(step, price, sold.T, cmap="Blues", vmin=0, vmax=1, shading="nearest")
        fig.colorbar(image, ax=axes[3], label="fraction sold")
        for gamma, style in {args["gamma"]: "--", 1.0: "-"}.items():
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
    if domain == "pointmaze" and "dense" in args.env_id:
        domain = "pointmaze-dense"
    near = " or ".join(difflib.get_close_matches(args.env_id, ["liquidation", *D4RL_FILES], n=3, cutoff=0.4))
    known = f"the environments with known settings are {', '.join(DOMAINS)}"
    require(domain in DOMAINS, f"unknown --env-id {args.env_id}: {f'did you mean {near}? ' if near else ''}{known}")
    if args.quick and domain == "liquidation":
        print("--quick changes nothing here: liquidation's own setting is CPU-sized")
    table = DOMAINS[domain] | (QUICK if args.quick and domain != "liquidation" else {})
    args = Args(**{name: table.get(name) if value is None else value for name, value in vars(args).items()})

    may_be_zero = ("num_threads", "beta", "dropout", "online_steps", "checkpoint_minutes")
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed":
            low = "0 or more" if name in may_be_zero else "greater than 0"
            fine = math.isfinite(value) and (value > 0 or (value == 0 and name in may_be_zero))
            require(fine, f"--{name.replace('_', '-')} {value}: must be {low}")
    for name, fine, remedy in (
        ("gamma", args.gamma <= 1, "must be at most 1"),
        ("gamma", args.gamma < 1 or domain == "liquidation", "only liquidation has a horizon that allows γ = 1"),
        ("target_rate", args.target_rate <= 1, "must be at most 1"),
        ("expectile", args.expectile < 1, "must be below 1"),
        ("dropout", args.dropout < 1, "must be below 1"),
        ("seed", args.seed >= 0, "must be 0 or more"),
    ):
        require(fine, f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")
    return args, domain


def actor_file(actor: Actor, args: Args, domain: str, dataset: Dataset) -> dict:
    """All that is needed to act, as tensors and plain values (docs/iql.md shows the lines that play it).

    h = (obs − obs_mean) / obs_std, then h = h @ weight + bias with ReLU between the layers; tanh of the last output
    is the mean of a diagonal Gaussian, log_std (clipped to log_std_range) its log-std; the action is the mean, or a
    sample clipped to [-1, 1].
    """
    layers = zip(actor.net.weights, actor.net.biases, strict=True)
    return {
        "kind": "actor", "script": "iql", "env_id": args.env_id, "domain": domain, "data_sha256": dataset.sha256,
        "layers": [{"weight": w[0].detach().cpu().clone(), "bias": b[0, 0].detach().cpu().clone()} for w, b in layers],
        "activation": "relu", "squash": "tanh of the mean", "log_std": actor.log_std.detach().cpu().clone(),
        "log_std_range": [-5.0, 2.0], "obs_mean": actor.net.mean.cpu().clone(), "obs_std": actor.net.std.cpu().clone(),
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


SUMMARY = ("score", "score_ci95", "return", "return_std", "return_ci95", "episodes")


def score_summary(returns: np.ndarray, domain: str) -> dict:
    """Means and half-widths of 95% intervals of (n,) returns and their scores."""
    score = normalised_score(returns, domain)
    return {
        "score": score.mean(), "score_ci95": confidence_interval(score),
        "return": returns.mean(), "return_std": returns.std(), "return_ci95": confidence_interval(returns),
        "episodes": len(returns),
    }  # fmt: skip


def print_result(result: dict, run_dir: Path) -> None:
    quick = " (--quick)" if result["quick"] else ""
    if result["offline"]:
        score, interval = result["offline"]["score"], result["offline"]["score_ci95"]
        print(f"\nafter the offline phase: score {score:.1f} ± {interval:.1f}", end="")
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
    if result["paper_score"] is not None:
        print(f"the paper reports {result['paper_score']:.1f}; data used here: {result['dataset']['source']}")
    data_return, data_score = result["behaviour_data_return"], result["behaviour_data_score"]
    print(f"return of the behaviour policy in the data {data_return:.1f}, score {data_score:.1f}")
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
    if args.bfloat16 and not multiplies_bfloat16(device):
        print(f"no instructions for bfloat16 on this {device.type}: --bfloat16 makes it slower")
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
    fits = not args.online_steps or args.eval_every >= horizon
    what = f"an online episode of up to {horizon} steps would never end before an evaluation restarts it"
    require(fits, f"--eval-every {args.eval_every}: {what}: use at least {horizon} with --online-steps")
    if domain == "liquidation" and args.eval_env_id is None:
        play = functools.partial(evaluate_liquidation, gamma=args.gamma)
    else:
        play = functools.partial(evaluate, make_env=make_env, gamma=args.gamma)
    data = {
        key: torch.as_tensor(getattr(dataset, key), device=device)
        for key in ("observations", "actions", "rewards", "next_observations", "terminals")
    }
    transform = reward_transform(args.reward_transform, dataset)
    data["rewards"] = transform[0] * data["rewards"] + transform[1]
    print(f"reward    learnt from: {transform[0]:.4g} · r + {transform[1]:g}")

    # Run folder
    run_dir = run_dir if resumed else make_run_dir(args)
    identity = {
        "kind": "iql checkpoint", "script_sha256": hashlib.sha256(SCRIPT).hexdigest(), "args": vars(args),
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
        torch.manual_seed(args.seed)
        learner = IQL(args, data, room=args.online_steps)
        offline = None  # the final evaluation of the offline phase
        sums, done, log, collector = torch.zeros(len(IQL.METRICS), device=device), 0, None, None
        total = args.iterations + args.online_steps
        if resumed and resumed.get("phase") != "start":
            with restoring(run_dir / "checkpoint.pt"):
                done, rows = saved_history(resumed, total, ("eval/score", "eval/return"))
                learner.load_state_dict(resumed["learner"])
                learner.value_optimizer.load_state_dict(resumed["value_optimizer"])
                learner.actor_critic_optimizer.load_state_dict(resumed["actor_critic_optimizer"])
                learner.size += len(resumed["online"]["rewards"])
                for key, values in resumed["online"].items():
                    learner.data[key][len(dataset.rewards) : learner.size] = values
                num_online, offline = max(0, done - args.iterations), resumed["offline"]
                fits = (
                    learner.size == len(dataset.rewards) + num_online
                    and learner.data.keys() == resumed["online"].keys()
                )
                require(fits, "its online steps are not those of its iteration")
                offline = offline and {key: float(offline[key]) for key in SUMMARY}
                require(bool(offline) == (args.online_steps > 0 and done >= args.iterations), "no offline result")
                sums = resumed["sums"].to(sums).view_as(sums)
                if resumed["actions"] is not None:  # the environment is where it was
                    collector = Collector(make_env(), learner, transform, resumed["env_seed"])
                    collector.repeat(resumed["actions"])
                set_rng_state(resumed["rng"])
                log = RunLog(run_dir, rows)
        log = log or RunLog(run_dir, [])

        # Offline updates, then online steps with one update each
        last = log.rows[-1]["iteration"] if log.rows else 0
        env_seed = args.seed + 30_000 + last + 1
        guard = Guard("iteration", IQL.METRICS, DIVERGENCE, learner.metric_bounds(horizon))
        step = fast(learner.update, device, args.compile, total)
        progress = bar(total=total, initial=done, desc="training")
        for iteration in range(done + 1, total + 1):
            if iteration > args.iterations:
                # A new environment after every evaluation: to get back into it only the steps since are repeated
                collector = collector or Collector(make_env(), learner, transform, env_seed)
                collector.step()
            if not args.online_steps:
                share = cosine(iteration, args.iterations)
                learner.actor_critic_optimizer.rates[0].fill_(args.actor_lr * share)
            learner.draw()
            row = step()
            sums += row
            guard.add(iteration, row)
            progress.update()
            evaluating = iteration % args.eval_every == 0 or iteration in (args.iterations, total)
            if not evaluating and not checkpoint.due():
                continue
            # A checkpoint; before it, once all numbers are known to be good, an evaluation
            guard.check()
            good = all(x.isfinite().all() for x in learner.parameters())
            require(good, f"iteration {iteration}: network weights not finite: {DIVERGENCE['critic']}")
            if evaluating:
                means = dict(zip(IQL.METRICS, (sums / (iteration - last)).tolist(), strict=True))
                played = play(learner.actor.act, episodes=args.eval_episodes, seed=args.seed + 10_000)
                row = {"iteration": iteration} | means
                row |= {
                    "eval/return": played["returns"].mean(),
                    "eval/score": normalised_score(played["returns"], domain).mean(),
                    "eval/discounted_return": played["discounted"].mean(),
                }
                if args.online_steps:
                    returns = collector.finish() if collector else []
                    row |= {"online/steps": max(0, iteration - args.iterations), "online/episodes": len(returns)}
                    row |= {"online/return": np.mean(returns) if returns else math.nan}
                    if iteration == args.iterations:
                        final = play(learner.actor.act, episodes=args.final_episodes, seed=args.seed + 20_000)
                        offline = {key: float(value) for key, value in score_summary(final["returns"], domain).items()}
                log.append({key: value if key == "iteration" else float(value) for key, value in row.items()})
                progress.set_postfix(score=f"{row['eval/score']:.1f}")
                sums, collector, last = torch.zeros_like(sums), None, iteration
                env_seed = args.seed + 30_000 + last + 1
            online = slice(len(dataset.rewards), learner.size)
            checkpoint.save(
                phase="training", iteration=iteration, learner=learner.state_dict(), sums=sums, rows=log.rows,
                value_optimizer=learner.value_optimizer.state_dict(), rng=rng_state(), offline=offline,
                actor_critic_optimizer=learner.actor_critic_optimizer.state_dict(), env_seed=env_seed,
                online={key: column[online].cpu().clone() for key, column in learner.data.items()},
                actions=torch.as_tensor(np.array(collector.actions)) if collector else None,
            )  # fmt: skip
        progress.close()
        checkpoint.finish()

        # Final result
        returns = play(learner.actor.act, episodes=args.final_episodes, seed=args.seed + 20_000)["returns"]
        behaviour = episode_returns(dataset)
        result = {
            "env_id": args.env_id, "domain": domain, "quick": args.quick, **score_summary(returns, domain),
            "offline": offline, "behaviour_data_return": behaviour.mean(),
            "behaviour_data_score": normalised_score(behaviour, domain).mean(),
            "paper_score": PAPER_SCORES.get(args.env_id), "optimum_score": None,
            "reward_scale": transform[0], "reward_shift": transform[1],
            "dataset": {"name": dataset.name, "source": dataset.source, "sha256": dataset.sha256},
            "last": log.rows[-1], "args": vars(args), "seconds": time.monotonic() - checkpoint.started,
            "script_sha256": identity["script_sha256"], "environment": environment, "machine": identity["machine"],
            "versions": identity["machine"]["versions"],
        }  # fmt: skip
        if domain == "liquidation":
            result |= compare_with_optimum(args, returns, play)
        save_atomically(actor_file(learner.actor, args, domain, dataset), run_dir / "actor.pt")
        starts, data_returns = starts_and_returns(dataset, transform, args.gamma)
        with torch.no_grad():
            value = learner.value(torch.as_tensor(starts, device=device)).cpu().numpy()
        with replacing(run_dir / "figure.png") as part:
            plot(result, log.rows, learner.advantages(), value, data_returns, learner.actor.act, part)
        if args.capture_video:
            with replacing(run_dir / "episode.gif") as part:
                save_gif(learner.actor.act, make_env, args.seed, part)
        with replacing(run_dir / "result.json") as part:  # the last one: a folder that has it is complete
            part.write_text(json.dumps(result, indent=2, default=float) + "\n")
    print_result(result, run_dir)
    return run_dir


def main() -> None:
    exit_cleanly(lambda: run(command_line(Args, __doc__.split("\n\n")[0])))


if __name__ == "__main__":
    main()
