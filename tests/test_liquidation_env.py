"""Optimal liquidation: dynamics, Gymnasium interface and exact solution, checked from the mathematics."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from liquidation_env import (
    BASELINES,
    LiquidationEnv,
    LiquidationVectorEnv,
    Market,
    behaviour_dataset,
    behaviour_policy,
    evaluate,
    first_price,
    hold_then_sell_policy,
    next_price,
    optimal_policy,
    optimal_value,
    rollout,
    score,
    threshold_policy,
    threshold_value,
    transition,
)

ROOT = Path(__file__).resolve().parents[1]
HOLD = np.array([-1.0], dtype=np.float32)


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def call_spread_value(boundary: np.ndarray | None, discount: float = 1.0, points: int = 501) -> float:
    """The value by another method: E f = f(0) + Σ slope·E[spread], in closed form for piecewise linear f."""
    x = np.linspace(0.0, 5.0, points)

    def kernel(mean: np.ndarray, std: float) -> np.ndarray:
        d = (mean[:, None] - x) / std
        tail = 0.5 * np.vectorize(math.erfc)(-d / math.sqrt(2))
        call = (mean[:, None] - x) * tail + std * np.exp(-(d**2) / 2) / math.sqrt(2 * math.pi)  # E max(p' − x, 0)
        return (call[:, :-1] - call[:, 1:]) / x[1]

    step, value = kernel(x + 0.05 * (1.5 - x), 0.2), np.zeros(points)
    for t in reversed(range(20)):
        hold = discount * (value[0] + step @ np.diff(value))
        value = np.maximum(x, hold) if boundary is None else np.where(x >= boundary[t], x, hold)
    return 100 * (value[0] + kernel(np.ones(1), 0.05) @ np.diff(value)).item()


# --- Dynamics -----------------------------------------------------------------------------------------------
def test_price_has_the_closed_form_mean_and_variance():
    """x_t − p̄ = (1−θ)^t (x₀ − p̄) + noise; away from the clip mean and variance are geometric sums."""
    market = Market(theta=0.1, mean_price=2.5, sigma=0.1, dt=0.5, initial_price=2.0)
    rng, n, steps = np.random.default_rng(0), 200_000, 20
    price = first_price(market, rng.standard_normal(n))
    for _ in range(steps):
        price = next_price(market, price, rng.standard_normal(n))
    keep = 1 - 0.1 * 0.5
    mean = 2.5 + keep**steps * (2.0 - 2.5)
    variance = keep ** (2 * steps) * 0.05**2 + 0.1**2 * 0.5 * (1 - keep ** (2 * steps)) / (1 - keep**2)
    assert abs(price.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(price.var() / variance - 1) < 4 * math.sqrt(2 / n)


def test_price_is_clipped():
    market = Market()
    assert next_price(market, np.array([0.1, 4.9]), np.array([-9.0, 9.0])).tolist() == [0.0, 5.0]


def test_transition_by_hand():
    market = Market()
    step, inventory, price, reward, terminated = transition(market, 3, 80.0, 2.0, 0.25, 1.0)
    assert (step, inventory, reward, bool(terminated)) == (4, 60.0, 40.0, False)  # sold at the price before
    assert price == pytest.approx(2.0 + 0.05 * (1.5 - 2.0) + 0.2)
    assert transition(market, 3, 80.0, 2.0, 0.9988, 0.0)[4]  # 0.096 left: sold out
    assert not transition(market, 3, 80.0, 2.0, 0.9987, 0.0)[4]  # 0.104 left
    assert transition(market, 19, 80.0, 2.0, 0.0, 0.0)[4] and not transition(market, 18, 80.0, 2.0, 0.0, 0.0)[4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("theta", -0.1),
        ("theta", 1.5),
        ("mean_price", 5.1),
        ("sigma", -1.0),
        ("sigma", math.nan),
        ("dt", 0.0),
        ("dt", math.inf),
        ("horizon", 0),
        ("horizon", 2.5),
        ("initial_price", -1.0),
        ("initial_price_std", -0.1),
        ("inventory", 0.05),
    ],
)
def test_bad_parameters_are_named(name, value):
    for make in (LiquidationEnv, LiquidationVectorEnv, optimal_value):
        with pytest.raises(ValueError, match="theta" if name == "dt" and value == math.inf else name):
            make(**{name: value})


# --- Gymnasium interface ------------------------------------------------------------------------------------
def test_check_env_has_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("liquidation_env:Liquidation-v0", render_mode="rgb_array").unwrapped)


def test_observations_stay_in_the_space():
    env = LiquidationEnv(sigma=2.0, initial_price_std=2.0)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        terminated = False
        while not terminated:
            assert observation in env.observation_space
            observation, reward, terminated, truncated, _ = env.step(HOLD)
            assert reward == 0 and not truncated
        assert observation in env.observation_space and observation[0] == 20


def test_scalar_and_vector_agree_step_for_step():
    """One copy draws the same stream in both, so after holding to the end the second episode agrees too."""
    scalar, vector = LiquidationEnv(), LiquidationVectorEnv(1)
    first, _ = scalar.reset(seed=5)
    observations, _ = vector.reset(seed=5)
    np.testing.assert_array_equal(first, observations[0])
    rng = np.random.default_rng(0)
    for episode in range(2):
        for t in range(20):
            action = np.array([rng.uniform(-1, 0.4) if episode else -rng.random()], dtype=np.float32)
            expected = scalar.step(action)
            observations, rewards, terminated, truncated, _ = vector.step(action[None])
            np.testing.assert_array_equal(expected[0], observations[0])
            assert expected[1:4] == (rewards[0], terminated[0], truncated[0])
            assert expected[2] == (t == 19)
        first, _ = scalar.reset()
        observations, rewards, terminated, _, _ = vector.step(np.ones((1, 1)))  # ignored: it resets
        np.testing.assert_array_equal(first, observations[0])
        assert rewards[0] == 0 and not terminated[0]


def test_autoreset_is_next_step():
    env = LiquidationVectorEnv(3)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    first, _ = env.reset(seed=0)
    assert first.shape == (3, 3) and first.dtype == np.float32
    observation, reward, terminated, truncated, _ = env.step([[1.0], [-1.0], [0.5]])
    assert terminated.tolist() == [True, False, False] and not truncated.any()
    assert observation[:, :2].tolist() == [[1, 0], [1, 100], [1, 50]]  # the true last observation, not a new one
    np.testing.assert_allclose(reward, first[:, 2] * [100, 0, 50], rtol=1e-6)
    terminated[:] = True  # the caller's copy: nothing of it may reach the environment
    observation, reward, terminated, _, _ = env.step([[1.0], [-1.0], [-1.0]])
    assert observation[:, :2].tolist() == [[0, 100], [2, 100], [2, 50]] and 0.7 < observation[0, 2] < 1.3
    assert reward.tolist() == [0, 0, 0] and not terminated.any()
    assert env.step(np.full((3, 1), -1.0))[0][:, 0].tolist() == [1, 3, 3]


def test_actions_are_clipped_and_nan_is_refused():
    scalar, vector = LiquidationEnv(), LiquidationVectorEnv(2)
    with pytest.raises(gym.error.ResetNeeded):
        scalar.step(HOLD)
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(np.zeros((2, 1)))
    scalar.reset(seed=0)
    vector.reset(seed=0)
    assert vector.step([[7.0], [-7.0]])[0][:, 1].tolist() == [0, 100]
    with pytest.raises(ValueError, match="NaN"):
        vector.step([[0.0], [math.nan]])
    with pytest.raises(ValueError, match="shape"):
        vector.step(np.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        scalar.step([math.nan])
    assert scalar.step([7.0])[2]
    with pytest.raises(gym.error.ResetNeeded):
        scalar.step(HOLD)
    with pytest.raises(ValueError, match="num_envs"):
        LiquidationVectorEnv(0)
    with pytest.raises(ValueError, match="render_mode"):
        LiquidationEnv(render_mode="human")


def test_paths_do_not_depend_on_the_policy():
    held = np.stack([row[0][:, 2] for row in rollout(hold_then_sell_policy(), 50, 1)])
    traded = [(row[0][:, 2], row[5]) for row in rollout(behaviour_policy(3), 50, 1)]
    for t, (price, alive) in enumerate(traded):
        np.testing.assert_array_equal(price[alive], held[t][alive])
    env, paths = LiquidationEnv(), []
    for action in (HOLD, np.array([0.3])):  # the second of them sells out early, in both episodes
        env.reset(seed=9)
        while not env.step(action)[2]:
            pass
        first, _ = env.reset()
        paths.append([first[2]] + [env.step(action)[0][2] for _ in range(10)])
    assert paths[0] == paths[1]


def test_inventory_is_conserved():
    market = {"mean_price": 2.5, "initial_price": 2.5}  # never at price 0, where a sale leaves no trace
    for policy in (BASELINES["TWAP"](), behaviour_policy(0)):
        sold, left = np.zeros(500), np.zeros(500)
        for observation, _, reward, following, terminated, alive in rollout(policy, 500, 0, **market):
            sold += alive * reward / observation[:, 2]
            left[alive & terminated] = following[alive & terminated, 1]
        np.testing.assert_allclose(sold + left, 100, rtol=1e-5)


def test_render():
    env = LiquidationEnv(render_mode="rgb_array")
    env.reset(seed=0)
    start = env.render()
    for _ in range(20):
        env.step(HOLD)
    end = env.render()
    assert start.shape == end.shape == (200, 420, 3) and end.dtype == np.uint8
    assert not np.array_equal(start, end)
    assert (end == (31, 58, 95)).all(axis=-1).any(axis=0).sum() == 401  # the line is unbroken over 20 steps
    assert LiquidationEnv().render() is None


def test_registered_ids_from_the_repository_root():
    code = """
import warnings; warnings.simplefilter("error")
import gymnasium
gymnasium.logger.warn = lambda message, *rest: (_ for _ in ()).throw(AssertionError(message))
env = gymnasium.make("liquidation_env:Liquidation-v0", sigma=0.3)
assert env.unwrapped.market.sigma == 0.3
for mode in (None, "vector_entry_point", "sync"):
    envs = gymnasium.make_vec("liquidation_env:Liquidation-v0", num_envs=4, vectorization_mode=mode)
    observation, _ = envs.reset(seed=0)
    assert observation.shape == (4, 3) and observation in envs.observation_space
    observation, *_ = envs.step(envs.action_space.sample())
    assert observation in envs.observation_space
    print(type(envs).__name__)
import importlib, runpy, liquidation_env
importlib.reload(liquidation_env)
runpy.run_path("liquidation_env.py", run_name="second_import")
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["LiquidationVectorEnv", "LiquidationVectorEnv", "SyncVectorEnv"]
    assert result.stderr == ""


# --- Exact solution -----------------------------------------------------------------------------------------
def test_optimum():
    optimum = optimal_value()
    assert optimum.value == pytest.approx(137.48, abs=0.05)
    assert optimum.value == pytest.approx(call_spread_value(None), abs=0.01)
    assert optimum.boundary[0] == pytest.approx(1.92, abs=0.01)
    # One step before the end: p = p + θ(p̄ − p) has the solution p̄ while the clip is far away.
    assert optimum.boundary[18:] == pytest.approx([1.5, 0.0], abs=1e-3)
    assert (np.diff(optimum.boundary) < 0).all()
    assert optimum.table.shape == (20, len(optimum.prices))
    assert (optimum.table >= optimum.prices - 1e-9).all() and (np.diff(optimum.table, axis=0) <= 1e-9).all()


def test_optimum_against_monte_carlo():
    returns = evaluate(optimal_policy(), 100_000, seed=0)
    assert returns.shape == (100_000,) and returns.dtype == np.float64
    assert abs(returns.mean() - optimal_value().value) < 3.5 * returns.std() / math.sqrt(len(returns))


@pytest.mark.parametrize(("discount", "start", "earned"), [(0.99, 1.59, 135.21), (0.98, 1.36, 129.3)])
def test_a_discount_sells_too_early(discount, start, earned):
    solution = optimal_value(discount)
    assert solution.boundary[0] == pytest.approx(start, abs=0.01)
    assert solution.value == pytest.approx(call_spread_value(None, discount), abs=0.01)
    assert threshold_value(solution.boundary, discount) == pytest.approx(solution.value, abs=1e-9)
    exact = threshold_value(solution.boundary)
    assert exact == pytest.approx(earned, abs=0.05)
    returns = evaluate(optimal_policy(discount), 100_000, seed=1)
    assert abs(returns.mean() - exact) < 3.5 * returns.std() / math.sqrt(len(returns))


def test_threshold_value_where_the_answer_is_known():
    assert threshold_value(np.zeros(20)) == pytest.approx(100, abs=1e-6)  # sell at once
    assert threshold_value(np.full(20, np.inf)) == 0.0  # never
    hold = threshold_value(np.append(np.full(19, np.inf), 0.0))
    assert hold == pytest.approx(call_spread_value(np.append(np.full(19, 9.0), 0.0)), abs=0.01)
    # A boundary within the initial prices, where V jumps most: one draw decides.
    jump = np.append(np.full(19, np.inf), 0.0)
    jump[0] = 1.02
    returns = evaluate(threshold_policy(jump), 200_000, seed=2)
    assert abs(returns.mean() - threshold_value(jump)) < 3.5 * returns.std() / math.sqrt(len(returns))


def test_a_market_without_noise():
    still = {"sigma": 0.0, "initial_price_std": 0.0}
    last = 1.5 - 0.5 * 0.95**19
    assert optimal_value(**still).value == pytest.approx(100 * last)  # the price only rises: wait
    assert threshold_value(np.ones(20), **still) == pytest.approx(100)  # p₀ = b sells
    assert optimal_value(**still, mean_price=0.5).value == pytest.approx(100)  # it only falls: do not


def test_no_other_boundary_beats_the_optimum():
    optimum, rng = optimal_value(), np.random.default_rng(0)
    shapes = [np.ones(20), np.linspace(1, 0, 20), np.linspace(0, 1, 20), *rng.standard_normal((3, 20))]
    for shape in shapes:
        losses = []
        for size in (-0.2, -0.05, 0.05, 0.2):
            boundary = optimum.boundary + size * shape
            boundary[-1] = 0.0
            losses.append(optimum.value - threshold_value(boundary))
        assert min(losses) > 0 and losses[0] > losses[1] and losses[3] > losses[2]


def test_bad_arguments_of_the_solver():
    for discount in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="discount"):
            optimal_value(discount)
    for boundary in (np.ones(19), np.full(20, np.nan)):
        with pytest.raises(ValueError, match="boundary"):
            threshold_value(boundary)


# --- Policies and data --------------------------------------------------------------------------------------
def test_baselines():
    """Means within standard errors of the known ones, exact ones for the first two."""
    n = 40_000
    expected = {"optimal": 137.48, "hold-then-sell": 131.95, "TWAP": 118.2, "behaviour": 99.0}
    spread = {"hold-then-sell": 57.9, "TWAP": 35.7, "behaviour": 39.2}
    for name, make in BASELINES.items():
        returns = evaluate(make(), n, seed=0)
        assert abs(returns.mean() - expected[name]) < 4 * returns.std() / math.sqrt(n) + 0.05
        if name in spread:
            assert returns.std() == pytest.approx(spread[name], rel=0.02)
    assert score(135.0) == 100.0 and score(np.zeros(2)).tolist() == [0.0, 0.0]


def test_threshold_policy_takes_any_batch():
    policy = optimal_policy()
    observation = np.array([[[0, 100, 1.9], [0, 100, 1.95]], [[19, 100, 0.1], [20, 100, 0.0]]])
    assert policy(observation)[..., 0].tolist() == [[-1, 1], [1, 1]] and policy(observation[0, 0]).shape == (1,)


def test_twap_sells_equal_amounts():
    env = LiquidationEnv()
    observation, _ = env.reset(seed=0)
    policy, inventory = BASELINES["TWAP"](), [100.0]
    for _ in range(20):
        observation, *_ = env.step(policy(observation))
        inventory.append(observation[1])
    np.testing.assert_allclose(inventory, np.linspace(100, 0, 21), atol=1e-4)


def test_dataset():
    data = behaviour_dataset(2000, seed=0)
    n = len(data["rewards"])
    shapes = {key: (value.shape, value.dtype) for key, value in data.items()}
    assert shapes == {
        "observations": ((n, 3), np.float32),
        "actions": ((n, 1), np.float32),
        "rewards": ((n,), np.float32),
        "next_observations": ((n, 3), np.float32),
        "terminals": ((n,), bool),
        "timeouts": ((n,), bool),
    }
    (step, inventory, price), (step2, inventory2, price2) = (data["observations"].T, data["next_observations"].T)
    action, end = data["actions"][:, 0], data["terminals"]
    assert end.sum() == 2000 and end[-1] and not data["timeouts"].any()
    assert step[0] == 0 and (step[1:][end[:-1]] == 0).all()  # a new episode after each end
    np.testing.assert_array_equal(data["observations"][1:][~end[:-1]], data["next_observations"][:-1][~end[:-1]])
    np.testing.assert_array_equal(end, (step2 == 20) | (inventory2 < 0.1))  # true next states at the end too
    np.testing.assert_array_equal(step2, step + 1)
    np.testing.assert_allclose(inventory2, inventory * (1 - np.maximum(action, 0)), atol=1e-4)
    np.testing.assert_allclose(data["rewards"], inventory * np.maximum(action, 0) * price, rtol=1e-5, atol=1e-4)
    hold, sell = action[action < 0], action[action > 0]
    assert len(hold) + len(sell) == n  # never exactly 0
    assert abs(len(hold) / n - 0.8) < 4 * math.sqrt(0.16 / n)
    assert abs(hold.mean() + 0.5) < 4 / math.sqrt(12 * len(hold)) and hold.min() >= -1
    assert abs(sell.mean() - 0.5) < 4 / math.sqrt(12 * len(sell)) and sell.max() <= 1
    inside = (price > 0.8) & (price < 4)
    z = (price2 - price - 0.05 * (1.5 - price))[inside] / 0.2
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and abs(z.std() - 1) < 4 / math.sqrt(2 * len(z))
    # The noise of the prices must not be the noise of the actions, although one seed makes both.
    assert abs(np.corrcoef(action[inside], z)[0, 1]) < 4 / math.sqrt(len(z))


def test_dataset_depends_on_its_seed_only():
    np.random.seed(1)  # noqa: NPY002 — the global state is what must not matter
    first, state = behaviour_dataset(50, seed=3), np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    second, other = behaviour_dataset(50, seed=3), behaviour_dataset(50, seed=4)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert not np.array_equal(first["rewards"][:50], other["rewards"][:50])
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002 — nor was it used
    assert behaviour_dataset(50, seed=3, horizon=5)["next_observations"][:, 0].max() == 5


# --- Command line -------------------------------------------------------------------------------------------
def test_command(tmp_path):
    figure = tmp_path / "figure.png"
    result = run("liquidation_env.py", "--episodes", "2000", "--output", str(figure))
    assert result.returncode == 0, result.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = {line[:16].strip(): line[16:].split() for line in result.stdout.splitlines()}
    for name in ("optimal", "optimal at 0.99", "hold-then-sell", "TWAP", "behaviour"):
        mean, error, gap = float(rows[name][0]), float(rows[name][2]), float(rows[name][4])
        assert gap == pytest.approx(mean - float(rows["optimal"][0]), abs=0.011)
        assert float(rows[name][7]) == pytest.approx(score(mean), abs=0.06)
        assert 0 < error < 2
    assert "exact: optimal 137.48, optimal at 0.99 135.21" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--episodes", "0"),
        ("--episodes", "-5"),
        ("--seed", "-1"),
        ("--discount", "1.5"),
        ("--episodes", "20", "--output", "no/such/folder/figure.png"),
        ("--episodes", "20", "--output", "figure.nonsense"),
    ],
)
def test_bad_commands_end_in_one_line(arguments, tmp_path):
    result = run(str(ROOT / "liquidation_env.py"), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("liquidation_env.py: ")
