"""Data: what a row means, what is refused or noted, actions and units, Minari, downloads, evaluation environments."""

import hashlib
import http.server
import threading
from dataclasses import replace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import iql
import liquidation_env
import pspo

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")  # D4RL's layout
ARGS = iql.Args()


def columns(lengths, ends, obs_dim=3, act_dim=2, seed=0):
    """D4RL's columns of smooth random walks; ends[i] is "terminal", "timeout" or "" (flagged as neither)."""
    rng, parts = np.random.default_rng(seed), {key: [] for key in KEYS}
    for length, end in zip(lengths, ends, strict=True):
        obs = rng.normal(size=obs_dim) * 5 + 0.2 * rng.normal(size=(length + 1, obs_dim)).cumsum(0)
        obs, last = obs.astype(np.float32), np.arange(length) == length - 1
        actions, rewards = rng.uniform(-1, 1, (length, act_dim)), rng.normal(size=length)
        flags = last & (end == "terminal"), last & (end == "timeout")
        for key, x in zip(KEYS, (obs[:-1], np.float32(actions), np.float32(rewards), obs[1:], *flags), strict=True):
            parts[key].append(x)
    return {key: np.concatenate(x) for key, x in parts.items()}


def three():
    """Rows 0-3 end in a terminal, 4-8 in a timeout, 9-11 in a terminal."""
    return columns((4, 5, 3), ("terminal", "timeout", "terminal"))


def without(arrays, *keys):
    return {key: x for key, x in arrays.items() if key not in keys}


def make(arrays, env=None):
    return iql.make_dataset(arrays, "x", env)


def lengths(data):
    return np.diff(np.flatnonzero(data.columns["ends"]), prepend=-1).tolist()


def refused(call, *args):
    """The one line that the script stops with."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def task(obs=3, act=2, bound=1.0, limit=None):
    env = gym.Env()
    env.observation_space = Box(-np.inf, np.inf, (obs,))
    env.action_space = Box(-bound, bound, (act,))
    env.spec = gym.envs.registration.EnvSpec("Task-v0", max_episode_steps=limit)
    return env


def record(env_id, rows, seed=0):
    """D4RL's columns of random actions in an environment."""
    env, parts = gym.make(env_id), []
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    for _ in range(rows):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        parts.append((obs, action, reward, next_obs, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return dict(zip(KEYS, map(np.array, zip(*parts, strict=True)), strict=True))


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, x in arrays.items():
            file[key] = x
    return path


def notes(env_id, arrays, rule=None, script=iql, **flags):
    """All that the run would note about these data as data of env_id, in one string."""
    args = script.Args(env_id=env_id, dataset_path="x", **flags)
    env = script.make_env(args)
    data = script.make_dataset(arrays, "x", env)
    if rule is not None:
        pspo.check_rule(rule, data)
    return "; ".join(data.notes + script.doubts(data, env, args, None))


def test_what_settings_go_by():
    """A task by any of its names; what a user's own module registers is nobody else's task."""
    names = {"hopper-medium-v2": "hopper", "mujoco/hopper/medium-v0": "hopper", "Hopper-v5": "hopper"}
    names |= {"D4RL/door/human-v2": "door", "liquidation": "liquidation", "my_env:Door-v0": "my_env:door"}
    for script in (iql, pspo):
        assert {name: script.task_of(name) for name in names} == names
        assert script.SETTINGS.get("my_env:door", {}) == {}


# --- What a row means ---
def test_true_next_states_and_ends():
    arrays = three()
    data = make(arrays)
    for key in KEYS[:5]:
        assert np.array_equal(data.columns[key], arrays[key]), key
        assert data.columns[key].dtype == (bool if key == "terminals" else np.float32)
    assert np.flatnonzero(data.columns["terminals"]).tolist() == [3, 11]  # the timeout is none
    assert data.columns["known"].all() and lengths(data) == [4, 5, 3] and not data.notes
    assert data.returns == pytest.approx([x.sum(dtype=np.float64) for x in np.split(arrays["rewards"], [4, 9])])
    arrays["timeouts"] |= arrays["terminals"]  # Minari's last rows: the terminal counts
    assert make(arrays).sha256 == data.sha256
    other = {key: x.astype(np.float64) for key, x in arrays.items()}
    other |= {key: other[key][:, None] for key in ("rewards", "terminals")} | {"timeouts": np.uint8(arrays["timeouts"])}
    assert make(other).sha256 == data.sha256  # whatever the dtypes, and columns of one
    arrays["rewards"][:4] = [2.0**24, 1, 1, 1]
    assert make(arrays).sha256 != data.sha256 and make(arrays).returns[0] == 2.0**24 + 3  # summed in float64


def test_derived_next_states():
    """Adroit's and AntMaze's files: the terminal row with the reward stays, a timed-out row is dropped."""
    arrays = three()
    data, kept = make(without(arrays, "next_observations")), np.delete(np.arange(12), 8)
    for key in ("observations", "actions", "rewards", "terminals"):
        assert np.array_equal(data.columns[key], arrays[key][kept])
    known = data.columns["known"]
    assert np.flatnonzero(~known).tolist() == [3, 10]  # the terminal rows
    assert np.array_equal(data.columns["next_observations"][known], arrays["next_observations"][kept][known])
    assert lengths(data) == [4, 4, 3]
    assert data.returns[1] == pytest.approx(arrays["rewards"][4:9].sum())  # the dropped row's reward counts
    clusters = make(without(columns((1, 1, 1, 4), ["terminal"] * 3 + ["timeout"]), "next_observations"))
    assert clusters.columns["terminals"].tolist() == [True, True, True, False, False, False]
    lost = columns((1, 1), ("timeout", "timeout"))
    assert "no row has a next state" in refused(make, without(lost, "next_observations"))
    arrays = columns((3, 4), ("terminal", ""))  # the file stops inside an episode
    data, derived = make(arrays), make(without(arrays, "next_observations"))
    assert lengths(data) == [3, 4] and data.returns == pytest.approx([arrays["rewards"][:3].sum()])
    assert lengths(derived) == [3, 3] and len(derived.returns) == 1


@pytest.mark.parametrize("gone", [(), ("timeouts",)])
def test_time_limits_that_nobody_flagged(gone):
    """medium-replay's: found where the next state is not the following row."""
    data = make(without(columns((1000, 1000, 300), ("", "", "terminal")), *gone), task(limit=1000))
    assert lengths(data) == [1000, 1000, 300] and len(data.returns) == 3 and not data.notes


# --- Files that contradict themselves ---
@pytest.mark.parametrize("price", [50_000, 1.0, 5e6, 1.7e9, -3e-8])
def test_rounding_is_no_jump(price):
    """s' stored as s + change; a price, a clock in seconds, a tiny unit."""
    walk = price * (1 + np.random.default_rng(0).normal(0, 6e-4, (2, 51)).cumsum(1))
    obs, change = np.float32(walk), np.float32(np.diff(walk, axis=1))
    last = (np.arange(100) % 50 == 49, np.zeros(100, bool))
    obs, next_obs = (x.reshape(100, 1) for x in (obs[:, :-1], obs[:, :-1] + change))
    actions, rewards = np.random.default_rng(1).uniform(-1, 1, (100, 1)), np.ones(100)
    assert lengths(make(dict(zip(KEYS, (obs, actions, rewards, next_obs, *last), strict=True)))) == [50, 50]


def test_float16_is_no_jump_and_a_small_jump_is():
    arrays = columns((40, 60), ("timeout", "terminal"))
    for keys in (("observations",), ("next_observations",), ("observations", "next_observations")):
        rounded = {key: x.astype(np.float16) if key in keys else x for key, x in arrays.items()}
        assert lengths(make(rounded)) == [40, 60]
    arrays["observations"][20] += 0.1 * arrays["observations"].std(0)
    assert lengths(make(arrays)) == [20, 20, 60]


@pytest.mark.parametrize("which", ["terminals", "timeouts", "both", "first"])
def test_next_state_of_an_automatic_reset_is_unknown(which):
    """next_observations at ends are the next episode's first state: a vector environment in SAME_STEP mode."""
    arrays = columns((10,) * 6, ("terminal", "timeout") * 3)
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])[:-1]
    ends = dict(both=ends, first=ends[:1]).get(which, ends[::2] if which == "terminals" else ends[1::2])
    wrong = dict(arrays, next_observations=arrays["next_observations"].copy())
    wrong["next_observations"][ends] = arrays["observations"][ends + 1]
    data = make(wrong)
    assert f"at {len(ends)} episode ends" in data.notes[0]
    learnt = {x.tobytes() for x in data.columns["next_observations"][data.columns["known"]]}
    assert not learnt & {arrays["observations"][i + 1].tobytes() for i in ends}
    kept = arrays["terminals"] | ~np.isin(np.arange(60), ends)  # a timed-out row goes, a terminal one is masked
    assert np.array_equal(data.columns["rewards"], arrays["rewards"][kept]) and len(data.returns) == 6
    assert (~data.columns["known"]).sum() == arrays["terminals"][ends].sum()


@pytest.mark.parametrize("derived", [False, True])
def test_rows_that_only_reset_a_vector_environment(derived):
    """NEXT_STEP mode: after the end a row leads from the last state to the next episode's first one, reward 0."""
    arrays = columns((30, 20, 30), ("terminal", "timeout", "timeout"))
    rows, final = np.array([30, 50]), arrays["next_observations"][[29, 49]]
    added = dict(observations=final, next_observations=arrays["observations"][rows], rewards=0, terminals=0, timeouts=0)
    added["actions"] = arrays["actions"][rows]
    with_resets = {key: np.insert(x, rows, added[key], 0) for key, x in arrays.items()}
    gone = ("next_observations",) if derived else ()
    data = make(without(with_resets, *gone))
    assert data.sha256 == make(without(arrays, *gone)).sha256 and "without 2 rows that only reset" in data.source
    arrays["rewards"][rows] = 0  # a first reward of 0 alone makes no such row
    assert "reset" not in make(without(arrays, *gone)).source


@pytest.mark.parametrize("how", ["shuffled", "in turn"])
def test_rows_in_no_order(how):
    arrays = columns((50,) * 8, ("terminal", "timeout") * 4)
    order = np.arange(400).reshape(8, 50).T.ravel() if how == "in turn" else np.random.default_rng(0).permutation(400)
    arrays = {key: x[order] for key, x in arrays.items()}
    data = make(arrays)
    assert "in no order" in data.notes[0] and not len(data.returns) and len(data.columns["rewards"]) == 400
    assert "unrelated" in make(without(arrays, "next_observations")).notes[0]


@pytest.mark.parametrize("number", [2, 100])
def test_episodes_longer_than_the_task_has(number):
    arrays = columns((50,) * number, [""] * number)
    arrays = without(arrays, "next_observations")
    assert "nobody set 'timeouts'" in refused(make, arrays, task(limit=50))
    assert "all are one episode" in make(arrays).notes[0]  # without an environment nobody knows the limit
    arrays["timeouts"][99 :: 100 if number > 2 else 98] = True  # every second one
    assert "100 rows" in refused(make, arrays, task(limit=50)) or number == 2
    arrays |= {"next_observations": np.roll(arrays["observations"], -1, 0), "timeouts": arrays["timeouts"] & False}
    assert "nobody set" in make(arrays, task(limit=50)).notes[0]


# --- Data and task ---
def test_terminals_and_the_tasks_rule():
    rule, hopper = pspo.TERMINAL["hopper"], record("Hopper-v4", 600)
    assert hopper["terminals"].sum() > 10 and notes("hopper-random-v2", hopper, rule, pspo) == ""
    swapped = hopper | dict(terminals=hopper["timeouts"], timeouts=hopper["terminals"])
    for wrong in (swapped, hopper | dict(terminals=hopper["terminals"] & False)):
        said = refused(notes, "hopper-random-v2", wrong, rule, pspo)
        assert "terminals 0" in said and "--learn-termination" in said
    cheetah = columns((1000,) * 3, ["terminal"] * 3, 17, 6)
    said = refused(notes, "halfcheetah-medium-v2", cheetah, pspo.TERMINAL["halfcheetah"], pspo)
    assert "rule ends 0 rows, the data's terminals 3" in said
    assert "are they timeouts?" in notes("halfcheetah-medium-v2", cheetah)  # iql.py knows no rule
    assert "are they terminals?" in notes("hopper-random-v2", swapped)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1", "HalfCheetah-v4"])
@pytest.mark.parametrize("derived", [False, True])
def test_normalised_observations(env_id, derived):
    arrays = without(record(env_id, 1500), *(["next_observations"] if derived else []))
    assert notes(env_id, arrays) == ""
    mean, std = arrays["observations"].mean(0), arrays["observations"].std(0)
    normalised = arrays | {k: (arrays[k] - mean) / std for k in arrays if k.endswith("observations")}
    assert "normalised?" in notes(env_id, normalised)
    if env_id == "Hopper-v4" and not derived:
        said = refused(notes, env_id, normalised, pspo.TERMINAL["hopper"], pspo)
        assert "normalised observations?" in said and "--learn-termination" in said
        running = arrays | {k: (arrays[k] - 0.9 * mean) / (1.1 * std) for k in arrays if k.endswith("observations")}
        assert "starts elsewhere than the data's episodes (column 0: " in notes(env_id, running)


@pytest.mark.parametrize("derived", [False, True])
def test_liquidation_of_another_market(derived):
    def said(**market):
        arrays = liquidation_env.behaviour_dataset(300, 0, **market)
        return notes("liquidation", without(arrays, *(["next_observations"] if derived else [])))

    assert said() == ""
    for market in (dict(horizon=40), dict(horizon=21), dict(horizon=10), dict(sigma=0.3), dict(inventory=200.0)):
        assert "another market" in said(**market), market
    assert "starts elsewhere" in said(inventory=50.0) and "starts elsewhere" in said(initial_price=2.0)
    own = gym.make("liquidation_env:Liquidation-v0", sigma=0.3)  # evaluated in that market: nothing differs
    data = make(liquidation_env.behaviour_dataset(300, 0, sigma=0.3), own)
    assert iql.doubts(data, own, replace(ARGS, dataset_path="own"), None) == []


# --- What is refused ---
def spoil(key, index, value):
    def change(arrays):
        arrays[key] = arrays[key].astype(np.float64)
        arrays[key][index] = value

    return change


def put(key, change):
    return lambda arrays: arrays.update({key: change(arrays[key])})


REFUSED = {
    **{f"no {key}": (lambda a, key=key: a.pop(key), f"no {key} in it") for key in (*KEYS[:3], "terminals")},
    "no ends": (lambda a: (a.pop("timeouts"), a.pop("next_observations")), "no timeouts (or next_observations)"),
    "lengths": (put("rewards", lambda x: x[:-1]), "12 observations and 11 rewards"),
    "empty": (lambda a: a.update({key: x[:0] for key, x in a.items()}), "0 observations and 0 rewards"),
    "images": (put("observations", lambda x: np.zeros((12, 8, 8, 3))), "observations have shape (12, 8, 8, 3)"),
    "one feature without its axis": (put("observations", lambda x: x[:, 0]), "only vectors (N, d)"),
    "two rewards": (put("rewards", lambda x: np.stack([x, x], 1)), "rewards have shape (12, 2)"),
    "widths": (put("next_observations", lambda x: x[:, :2]), "next_observations are (12, 2)"),
    "integer actions": (put("actions", lambda x: np.int64(x > 0)), "actions are int64 (12, 2): only continuous"),
    "discrete actions": (put("actions", lambda x: np.int64(x[:, 0] > 0)), "only continuous ones, float (N, d)"),
    "1-d actions": (put("actions", lambda x: x[:, 0]), "actions are float32 (12,): only continuous ones, float (N, d)"),
    "a scale of 50": (spoil("actions", (2, 1), -50.0), "rescale them if the unit differs"),
    "just over": (spoil("actions", (2, 1), -1.01), "leave the bounds [-1. -1.] to [1. 1.]"),
    **{f"NaN {key}": (spoil(key, 7, np.nan), f"{key} are NaN or infinite in 1 rows, first in [7]") for key in KEYS},
    "beyond float32": (spoil("next_observations", (0, 0), 1e39), "next_observations are NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:overflow")
def test_refused_in_one_line(case):
    change, words = REFUSED[case]
    arrays = three()
    change(arrays)
    said = refused(make, arrays, task())
    assert said.startswith("x: ") and words in said and "delete" not in said and "reshape" not in said
    assert "(3, 2) observations and actions, but (11, 2) in Task-v0: --eval-env-id" in refused(make, three(), task(11))


# --- Actions of any bounds ---
def test_actions_are_scaled_both_ways():
    arrays = record("Pendulum-v1", 400)
    env = iql.make_env(replace(ARGS, env_id="Pendulum-v1"))
    data = iql.make_dataset(arrays, "x", env)
    assert data.columns["actions"] == pytest.approx(arrays["actions"] / 2) and data.high == 2 and data.low == -2
    one, theirs = env.reset(seed=3)[0], gym.make("Pendulum-v1")
    theirs.reset(seed=3)
    assert np.array_equal(env.step(np.float32([0.5]))[0], theirs.step(np.float32([1.0]))[0]) and one.shape == (3,)
    first, returns = iql.evaluate(lambda obs: np.full((len(obs), 1), 0.25, np.float32), env, 2, seed=5)
    total, obs = 0.0, theirs.reset(seed=6)[0]  # copy i has seed + i
    assert np.array_equal(first[1], obs)
    for _ in range(200):
        total += theirs.step(np.float32([0.5]))[1]
    assert returns[1] == pytest.approx(total)


def test_actions_at_and_without_bounds():
    arrays = three()
    arrays["actions"][2] = 1.0005, -1.0005  # rounding
    actions = make(arrays, task()).columns["actions"]
    assert actions[2].tolist() == [1, -1] and np.array_equal(actions[3:], arrays["actions"][3:])
    assert make(three(), task(bound=4)).columns["actions"] == pytest.approx(three()["actions"] / 4)
    arrays["actions"] = np.stack([np.linspace(10, 30, 12), np.full(12, 50.0)], 1)
    data = make(arrays)
    assert data.columns["actions"][:, 0] == pytest.approx(np.linspace(-1, 1, 12), abs=1e-6)
    assert (data.columns["actions"][:, 1] == -1).all() and "actions tell their bounds" in data.notes[0]


# --- Units ---
@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("what", ["rewards", "features"])
def test_units_of_the_data_change_nothing_but_units(what, factor):
    arrays = columns((60, 50, 40), ("terminal", "timeout", "terminal"))
    arrays["observations"][:, 2] = arrays["next_observations"][:, 2] = 3.0  # a constant
    keys = ("rewards",) if what == "rewards" else ("observations", "next_observations")
    scaled = arrays | {key: arrays[key] * np.float32(factor) for key in keys}
    reward, feature = (factor, 1) if what == "rewards" else (1, factor)
    one, other = make(arrays), make(scaled)
    assert lengths(one) == lengths(other) and other.returns == pytest.approx(one.returns * reward, rel=1e-5)
    assert np.array_equal(one.columns["known"], other.columns["known"])
    std, other_std = (iql.spread(torch.as_tensor(x["observations"])).double() for x in (arrays, scaled))
    assert torch.allclose(other_std, std * feature, rtol=1e-4, atol=0)


# --- Environments ---
class Goal(gym.Env):
    observation_space = gym.spaces.Dict({"b": Box(-9, 9, (2,)), "a": Box(-9, 9, (1,))})
    action_space = Box(-3, 3, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.step([0.0])[0], {}

    def step(self, action):
        obs = {"b": np.float32([self.np_random.uniform(-1, 1), 2]), "a": np.float32([1])}
        return obs, float(action[0]), False, False, {}


gym.register("Goal-v0", f"{__name__}:Goal", vector_entry_point="its:own")  # no time limit
gym.register("Brief-v0", f"{__name__}:Goal", max_episode_steps=3)


def test_environments_of_ones_own():
    env = iql.make_env(replace(ARGS, env_id="Goal-v0"))
    assert env.reset(seed=0)[0].shape == (3,) and env.action_space.high == 1
    first, returns = iql.evaluate(lambda obs: np.full((len(obs), 1), 0.5, np.float32), env, 3, 0)
    assert (first[:, [0, 2]] == [1, 2]).all() and returns.tolist() == [1500] * 3  # cut at 1,000 steps
    assert iql.make_env(replace(ARGS, env_id="nowhere", eval_episodes=0)) is None
    minari = gym.spec("Goal-v0")  # the environment of its data gives way to one that --env-id names
    for name, found in {"Pendulum-v1": "Pendulum-v1", "mujoco/hopper/medium-v0": "Goal-v0"}.items():
        assert iql.make_env(replace(ARGS, env_id=name), minari).spec.id == found
    assert "Discrete(2): only continuous" in refused(iql.make_env, replace(ARGS, env_id="CartPole-v1"))
    boxes = dict(action_space=Box(-np.inf, np.inf, (1,))), dict(observation_space=Box(0, 9, (8, 8)))
    for space, words in zip(boxes, ("actions bounded", "(8, 8)"), strict=True):
        gym.register("Odd-v0", lambda space=space: type("Odd", (Goal,), space)(), disable_env_checker=True)
        assert words in refused(iql.make_env, replace(ARGS, env_id="Odd-v0"))
        del gym.registry["Odd-v0"]


def test_mujoco_does_not_flood_the_terminal(tmp_path, monkeypatch, capfd):
    """HalfCheetah's model makes MuJoCo warn once for every copy of it, on the terminal and in MUJOCO_LOG.TXT."""
    monkeypatch.chdir(tmp_path)
    env = iql.make_env(replace(ARGS, env_id="halfcheetah-medium-v2"))
    gym.make_vec(env.spec, num_envs=3).close()
    assert "".join(capfd.readouterr()) == "" and not list(tmp_path.iterdir())


# --- Minari ---
def minari_set(name, episodes, env, observe):
    import minari
    from minari.data_collector import EpisodeBuffer

    def episode(i):
        rng, last = np.random.default_rng(i), np.arange(6) == 5
        obs, actions, rewards = observe(rng, 7), np.float32(rng.uniform(-2, 2, (6, 1))), rng.normal(size=6)
        ends = dict(terminations=last & (i % 2 == 1), truncations=last & (i % 2 == 0))
        return EpisodeBuffer(id=i, observations=obs, actions=actions, rewards=rewards, **ends)

    minari.create_dataset_from_buffers(name, [episode(i) for i in range(episodes)], env=env)


@pytest.mark.filterwarnings("ignore")  # Minari asks for authors and code of the data
def test_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    parts = lambda rng, n: {"b": np.float32(rng.normal(size=(n, 2))), "a": np.ones((n, 1), np.float32)}  # noqa: E731
    minari_set("own/goal-v0", 4, gym.make("Goal-v0"), parts)
    args = replace(ARGS, env_id="own/goal-v0")
    arrays, source, spec = iql.load_arrays(args)
    env = iql.make_env(args, spec)
    data = iql.make_dataset(arrays, source, env)
    assert source == "Minari own/goal-v0" and env.spec.id == "Goal-v0" and lengths(data) == [6] * 4 and data.high == 3
    assert np.flatnonzero(data.columns["terminals"]).tolist() == [11, 23] and data.columns["known"].all()
    expected = parts(np.random.default_rng(1), 7)
    expected = gym.spaces.flatten(Goal.observation_space, {key: x[2] for key, x in expected.items()})
    assert np.array_equal(data.columns["observations"][8], expected)
    assert np.array_equal(data.columns["next_observations"][7], expected)
    folder = replace(args, env_id="anything", dataset_path=str(tmp_path / "own" / "goal-v0"))
    assert iql.make_dataset(*iql.load_arrays(folder)[:2], env).sha256 == data.sha256
    nested = {"b": {"d": np.ones((2, 1)), "c": np.zeros((2, 1))}, "a": np.full((2, 2, 1), 5)}
    assert iql.flatten(nested).tolist() == [[5, 5, 0, 1]] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["NormalizeObservation", "NormalizeReward"])
def test_minari_data_behind_wrappers(tmp_path, monkeypatch, wrapper):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = getattr(gym.wrappers, wrapper)(gym.make("Pendulum-v1"))
    minari_set("own/wrapped-v0", 2, env, lambda rng, n: np.float32(rng.uniform(-1, 1, (n, 3))))
    args = replace(ARGS, env_id="own/wrapped-v0")
    arrays, _, spec = iql.load_arrays(args)
    env = iql.make_env(args, spec)
    assert f"through the wrappers {wrapper}" in "".join(iql.doubts(make(arrays, env), env, args, spec))


# --- Files and downloads ---
@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two servers' addresses, what they have, and D4RL's table with one tiny file in it."""
    content = write(tmp_path / "original.hdf5", three()).read_bytes()
    have = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in have:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(have[self.path])))
            self.end_headers()
            return self.wfile.write(have[self.path])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{here.server_port}"
        monkeypatch.setattr(iql, "SERVERS", (base + "/one/{path}", base + "/two/{name}"))
        digits = hashlib.sha256(content).hexdigest()[:8]
        monkeypatch.setattr(iql, "D4RL", {"hopper-medium-v2": ("gym_mujoco_v2/hopper.hdf5", digits)})
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "deep" / "folder"))
        monkeypatch.setenv("no_proxy", "*")
        yield have, content, tmp_path / "deep" / "folder" / "hopper.hdf5"
        here.shutdown()


@pytest.mark.parametrize("first", ["has it", "404", "another file"])
def test_download(server, first, capsys, tmp_path, monkeypatch):
    have, content, file = server
    have["/two/hopper.hdf5"] = content
    if first != "404":
        have["/one/gym_mujoco_v2/hopper.hdf5"] = content if first == "has it" else b"<html>"
    arrays, source, spec = iql.load_arrays(replace(ARGS, env_id="hopper-medium-v2"))
    assert source == "hopper.hdf5 (D4RL's file)" and spec is None and file.read_bytes() == content
    assert make(arrays).sha256 == make(three()).sha256
    said = {"has it": "", "404": "404", "another file": "invalid hash value"}[first]
    assert said in capsys.readouterr().out and list(file.parent.iterdir()) == [file]
    have.clear()  # from now on it is here
    assert iql.load_arrays(replace(ARGS, env_id="hopper-medium-v2"))[1] == source
    write(file, columns((12,), ("terminal",)))
    assert iql.load_arrays(replace(ARGS, env_id="hopper-medium-v2"))[1] == "hopper.hdf5 (not D4RL's file)"
    named = replace(ARGS, env_id="hopper-medium-v2", dataset_path=str(tmp_path / "original.hdf5"))
    assert iql.load_arrays(named)[1] == "original.hdf5 (D4RL's file)"
    monkeypatch.setitem(iql.D4RL, "hopper-medium-v2", ("gym_mujoco_v2/hopper.hdf5", ""))  # nobody knows its checksum
    assert iql.load_arrays(named)[1] == "original.hdf5"
    assert "near: hopper-medium-v2" in refused(iql.load_arrays, replace(ARGS, env_id="hoper-medum-v2"))
