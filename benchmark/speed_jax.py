"""The JAX implementations' IQL updates, for benchmark/speed.py: python speed_jax.py CHECKOUTS ROUNDS -> JSON.

Runs in a Python that has jax, flax, optax, distrax and, for JAX-CORL, pydantic. Many updates a call, as both
projects do, compiled before; random rows.
"""

import importlib.util
import json
import os
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

UPDATES = {"unifloral": 50, "JAX-CORL": 8}  # in one timed call; JAX-CORL unrolls them, 8 is its default


def load(path: Path):
    """A module with empty ones for what it imports and an update does not use."""
    for name in ("gym", "d4rl", "wandb", "tyro", "tqdm", "omegaconf"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].Env = object
    sys.modules["omegaconf"].OmegaConf = types.SimpleNamespace(from_cli=dict)
    spec = importlib.util.spec_from_file_location(path.parent.parent.name.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    flags = dict(os.environ)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(flags)  # they set an option that only GPUs know
    return module


def rows(count: int = 100_000) -> tuple:
    rng = np.random.default_rng(0)
    x, a, y = (rng.standard_normal((count, n), np.float32) for n in (11, 3, 11))
    return x, np.tanh(a), rng.random(count, np.float32), y, (rng.random(count) < 0.01).astype(np.float32)


def unifloral(folder: Path):
    module = load(folder / "unifloral/algorithms/iql.py")
    args = module.Args()
    x, a, r, y, d = map(jnp.array, rows())
    data = module.Transition(obs=x, action=a, reward=r, next_obs=y, done=d)
    stats = x.mean(0), x.std(0)
    actor, q, value = (
        module.TanhGaussianActor(3, *stats),
        module.DualQNetwork(*stats),
        module.StateValueFunction(*stats),
    )
    rng = jax.random.PRNGKey(0)
    make = partial(module.create_train_state, args, rng)
    one, action = jnp.zeros(11), jnp.zeros(3)
    state = module.AgentTrainState(
        actor=make(actor, [one]), dual_q=make(q, [one, action]),
        dual_q_target=make(q, [one, action]), value=make(value, [one]),
    )  # fmt: skip
    step = module.make_train_step(args, actor.apply, q.apply, value.apply, data)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, UPDATES["unifloral"])[0])
    return scan, (rng, state)


def jax_corl(folder: Path):
    module = load(folder / "JAX-CORL/algos/iql.py")
    x, a, r, y, d = map(jnp.array, rows())
    fields = dict(observations=x, actions=a, rewards=r, next_observations=y, dones=d, dones_float=d)
    data = module.Transition(**{key: fields[key] for key in module.Transition._fields})
    config = module.IQLConfig(n_jitted_updates=UPDATES["JAX-CORL"])
    rng = jax.random.PRNGKey(0)
    state = module.create_iql_train_state(rng, x[:1], a[:1], config)
    update = jax.jit(lambda s, key: module.IQL.update_n_times(s, data, key, config)[0])
    return lambda carry: (update(carry[0], carry[1]), jax.random.split(carry[1])[0]), (state, rng)


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    times = {}
    for name, prepare in {"unifloral, IQL (JAX)": unifloral, "JAX-CORL, IQL (JAX)": jax_corl}.items():
        try:
            step, carry = prepare(folder)
            times[name] = []
            for i in range(max(rounds // 5, 4) + 1):
                start = time.perf_counter()
                carry = jax.block_until_ready(step(carry))
                if i:  # the first call compiles
                    times[name].append(1e3 * (time.perf_counter() - start) / UPDATES[name.split(",")[0]])
        except Exception as error:  # a missing checkout, or another version of it
            times.pop(name, None)
            print(f"{name}: not measured: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
