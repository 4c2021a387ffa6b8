"""Hand-made episodes in D4RL's layout, for the tests of every script's data loading."""

import h5py
import numpy as np
import torch

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def episodes(*lengths, obs_dim=3, act_dim=2, seed=0):
    """A list of (T + 1 observations, T actions, T rewards), all different numbers."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.standard_normal((length + 1, obs_dim)).astype(np.float32),
            rng.uniform(-1, 1, (length, act_dim)).astype(np.float32),
            rng.standard_normal(length).astype(np.float32),
        )
        for length in lengths
    ]


def columns(trajectories, ends):
    """D4RL's columns of the trajectories; ends[i] is "terminal", "timeout" or "" (not marked)."""
    parts = {key: [] for key in KEYS}
    for (obs, actions, rewards), end in zip(trajectories, ends, strict=True):
        last = np.arange(len(rewards)) == len(rewards) - 1
        values = (obs[:-1], actions, rewards, obs[1:], last & (end == "terminal"), last & (end == "timeout"))
        for key, value in zip(KEYS, values, strict=True):
            parts[key].append(value)
    return {key: np.concatenate(value) for key, value in parts.items()}


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return str(path)


def toy_data(rows=64, obs_dim=3, act_dim=2, seed=0):
    """Random transitions as the learners take them: tensors, shapes alone matter."""
    g = torch.Generator().manual_seed(seed)
    return dict(
        observations=torch.randn(rows, obs_dim, generator=g),
        actions=torch.rand(rows, act_dim, generator=g) * 2 - 1,
        rewards=torch.randn(rows, generator=g),
        next_observations=torch.randn(rows, obs_dim, generator=g),
        terminals=torch.rand(rows, generator=g) < 0.2,
    )
