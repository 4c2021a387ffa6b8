"""Optimal liquidation: dynamics, Gymnasium interface and exact optimum, checked from the mathematics."""

import math
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import liquidation_env as liq

HOLD_TO_THE_END = np.append(np.full(19, np.inf), 0.0)


def quadrature_value(boundary: np.ndarray | None) -> float:
    """The expected return by another method: Gauss–Hermite quadrature of V, interpolated on another grid."""
    z, weights = np.polynomial.hermite_e.hermegauss(64)
    weights, price = weights / weights.sum(), np.linspace(0.0, 5.0, 2001)
    following, value = np.clip(0.95 * price[:, None] + 0.075 + 0.2 * z, 0.0, 5.0), np.zeros_like(price)
    for t in reversed(range(20)):
        hold = np.interp(following, price, value) @ weights
        value = np.maximum(price, hold) if boundary is None else np.where(price >= boundary[t], price, hold)
    return 100.0 * np.interp(1.0 + 0.05 * z, price, value) @ weights


def within(sample: np.ndarray, mean: float) -> bool:
    """Whether the sample's mean is within four standard errors of `mean`."""
    return abs(sample.mean() - mean) < 4 * sample.std() / math.sqrt(len(sample))


def test_price_has_the_closed_form_mean_and_variance():
    """x_t − p̄ = (1−θdt)^t (x₀ − p̄) + noise; away from the clip mean and variance are geometric sums."""
    market, rng = liq.Market(theta=0.1, mean_price=2.5, sigma=0.1, dt=0.5, initial_price=2.0), np.random.default_rng(0)
    price, keep = market.first_state(rng.standard_normal(100_000))[:, 2], 1 - 0.1 * 0.5
    for _ in range(20):
        price = market.next_price(price, rng.standard_normal(100_000))
    variance = keep**40 * 0.05**2 + 0.1**2 * 0.5 * (1 - keep**40) / (1 - keep**2)
    assert within(price, 2.5 + keep**20 * (2.0 - 2.5)) and within((price - price.mean()) ** 2, variance)


def test_transition_by_hand():
    state = np.array([[3, 80, 2.0], [3, 80, 2.0], [3, 80, 2.0], [19, 80, 0.1], [18, 80, 4.9]])
    action, noise = np.array([[0.25], [0.9988], [0.9987], [-1.0], [7.0]]), np.array([1.0, 0.0, 0.0, -9.0, 9.0])
    following, reward, terminated = liq.Market().transition(state, action, noise)
    np.testing.assert_allclose(following[0], [4, 60, 2.0 + 0.05 * (1.5 - 2.0) + 0.2])
    np.testing.assert_allclose(reward[[0, 3, 4]], [0.25 * 80 * 2.0, 0.0, 80 * 4.9])  # at the price before; clipped
    assert following[3:, 2].tolist() == [0.0, 5.0] and following[3:, 1].tolist() == [80, 0]
    # 0.096 left is sold out, 0.104 is not; step 20 is the end.
    assert terminated.tolist() == [False, True, False, True, True]
    assert not liq.Market().transition(state[4:], action[3:4], noise[4:])[2].any()


def test_bad_parameters_and_actions_are_refused():
    bad = [("theta", -0.1), ("theta", 1.5), ("sigma", 0.01), ("sigma", math.nan), ("mean_price", 5.1), ("dt", 1e-4)]
    for name, value in bad:
        for make in (liq.LiquidationEnv, liq.LiquidationVectorEnv, liq.solve):
            with pytest.raises(ValueError, match=f"{name}={value}"):
                make(**{name: value})
    env = liq.LiquidationVectorEnv(2)
    env.reset(seed=0)
    for action in ([[0.0], [math.nan]], np.zeros(2), np.zeros((1, 1))):
        with pytest.raises(ValueError, match="2 rows of one number"):
            env.step(action)
    assert env.step([[7.0], [-7.0]])[0][:, 1].tolist() == [0, 100]  # outside [−1, 1]: clipped


def test_gymnasium_checker_and_registration():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("liquidation_env:Liquidation-v0", sigma=0.3)
        check_env(env.unwrapped)
        assert '"sigma": 0.3' in env.spec.to_json()  # as Minari keeps the environment of its data
        for mode, kind in [(None, liq.LiquidationVectorEnv), ("sync", gym.vector.SyncVectorEnv)]:
            parameters = {"vectorization_mode": mode, "sigma": 2.0, "initial_price_std": 2.0, "horizon": 7}
            envs = gym.make_vec("liquidation_env:Liquidation-v0", num_envs=50, **parameters)
            assert type(envs) is kind and envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.NEXT_STEP
            assert envs.single_observation_space.high.tolist() == [7, 100, 5]
            observation, _ = envs.reset(seed=0)
            for step in range(8):
                assert observation in envs.observation_space and (observation[:, 0] == step).all()
                observation, reward, terminated, truncated, _ = envs.step(np.full((50, 1), [-1.0, 1.0][step // 7]))
                assert not reward.any() and not truncated.any() and (terminated == (step == 6)).all()


def test_single_and_vector_agree_step_for_step():
    single, vector = gym.make("liquidation_env:Liquidation-v0"), liq.LiquidationVectorEnv(1)
    np.testing.assert_array_equal(single.reset(seed=5)[0], vector.reset(seed=5)[0][0])
    rng = np.random.default_rng(0)
    for _ in range(5):  # episodes; they end at different steps
        ended = False
        while not ended:
            action = rng.uniform(-1, 1, size=1).astype(np.float32)
            observation, reward, ended, truncated, _ = single.step(action)
            observations, rewards, terminated, truncations, _ = vector.step(action[None])
            np.testing.assert_array_equal(observation, observations[0])
            assert (reward, ended, truncated) == (rewards[0], terminated[0], truncations[0])
        np.testing.assert_array_equal(single.reset()[0], vector.step([[1.0]])[0][0])  # that action is ignored


def test_autoreset_is_next_step():
    env = liq.LiquidationVectorEnv(3)
    first, _ = env.reset(seed=0)
    observation, reward, terminated, _, _ = env.step([[1.0], [-1.0], [0.5]])
    # the true last observation, not a new one
    assert observation[:, :2].tolist() == [[1, 0], [1, 100], [1, 50]] and terminated.tolist() == [True, False, False]
    np.testing.assert_allclose(reward, first[:, 2] * [100, 0, 50], rtol=1e-6)
    terminated[:] = True  # the caller's copy: nothing of it may reach the environment
    observation, reward, terminated, _, _ = env.step([[1.0], [-1.0], [-1.0]])
    assert observation[:, :2].tolist() == [[0, 100], [2, 100], [2, 50]] and 0.7 < observation[0, 2] < 1.3
    assert reward.tolist() == [0, 0, 0] and not terminated.any()


def test_prices_do_not_depend_on_the_policy_and_inventory_is_conserved():
    away = {"mean_price": 2.5, "initial_price": 2.5}  # from price 0, where a sale leaves no trace
    held = liq.play(liq.threshold_policy(HOLD_TO_THE_END), 200, 1, **away)[0]["observations"][:, 2].reshape(200, 20)
    data, returns = liq.play(liq.behaviour_policy(3), 200, 1, **away)
    (step, _, price), episode = data["observations"].T, np.cumsum(data["observations"][:, 0] == 0) - 1
    np.testing.assert_array_equal(price, held[episode, step.astype(int)])
    np.testing.assert_allclose(np.bincount(episode, data["rewards"]), returns, rtol=1e-5)
    sold, left = np.bincount(episode, data["rewards"] / price), data["next_observations"][data["terminals"], 1]
    np.testing.assert_allclose(sold + left, 100, rtol=1e-5)


def test_optimum():
    optimum, boundary = liq.solve()
    assert f"{optimum:.2f}" == "137.48" and f"{boundary[0]:.2f}" == "1.92"
    assert optimum == pytest.approx(quadrature_value(None), abs=0.005)
    # One step before the end: p = p + θ(p̄ − p) has the solution p̄ while the clip is far away.
    assert boundary[18:] == pytest.approx([1.5, 0.0], abs=1e-3) and (np.diff(boundary) < 0).all()
    assert within(liq.evaluate(liq.threshold_policy(boundary), 50_000, seed=0), optimum)
    observation = np.array([[0, 100, 1.92], [0, 100, 1.93], [18, 100, 1.49], [18, 100, 1.51], [20, 100, 0.0]])
    assert liq.threshold_policy(boundary)(observation)[:, 0].tolist() == [-1, 1, -1, 1, 1]


def test_optimum_of_markets_with_a_known_answer():
    assert liq.solve(0.0)[0] == pytest.approx(100, abs=1e-3) and not liq.solve(0.0)[1].any()  # no future: sell at once
    still = {"sigma": 0.02, "initial_price_std": 0.0}
    assert liq.solve(**still)[0] == pytest.approx(100 * (1.5 - 0.5 * 0.95**19), abs=0.05)  # it only rises: wait
    assert liq.solve(**still, mean_price=0.2)[0] == pytest.approx(100, abs=1e-3)  # it only falls: sell
    assert liq.solve(theta=0.0, sigma=0.05)[0] == pytest.approx(100, abs=1e-3)  # a martingale: nothing to gain
    assert liq.solve(inventory=1.0)[0] == pytest.approx(liq.solve()[0] / 100)
    other = {"horizon": 12, "dt": 0.5, "sigma": 0.4, "initial_price": 1.2, "initial_price_std": 0.2, "theta": 0.2}
    value, boundary = liq.solve(**other)
    assert within(liq.evaluate(liq.threshold_policy(boundary), 50_000, seed=2, **other), value)


def test_dataset():
    data = liq.behaviour_dataset(1000, seed=0)
    n = len(data["rewards"])
    assert list(data) == ["observations", "actions", "rewards", "next_observations", "terminals", "timeouts"]
    assert [column.shape for column in data.values()] == [(n, 3), (n, 1), (n,), (n, 3), (n,), (n,)]
    assert [column.dtype for column in data.values()] == [np.float32] * 4 + [bool] * 2
    (step, inventory, price), (step2, inventory2, price2) = data["observations"].T, data["next_observations"].T
    action, end = data["actions"][:, 0], data["terminals"]
    assert end.sum() == 1000 and end[-1] and not data["timeouts"].any()
    assert step[0] == 0 and (step[1:][end[:-1]] == 0).all()  # a new episode after each end
    np.testing.assert_array_equal(data["observations"][1:][~end[:-1]], data["next_observations"][:-1][~end[:-1]])
    np.testing.assert_array_equal(end, (step2 == 20) | (inventory2 < 0.1))  # true next states at the end too
    np.testing.assert_allclose(inventory2, inventory * (1 - np.maximum(action, 0)), atol=1e-4)
    np.testing.assert_allclose(data["rewards"], inventory * np.maximum(action, 0) * price, rtol=1e-5, atol=1e-4)
    assert within(action < 0, 0.8) and (action != 0).all() and abs(action).max() <= 1
    assert within(action[action < 0], -0.5) and within(action[action > 0], 0.5) and within(action**2, 1 / 3)
    inside = (price > 0.8) & (price < 4)
    z = (price2 - price - 0.05 * (1.5 - price))[inside] / 0.2
    assert within(z, 0) and within(z**2, 1)
    # The noise of the prices must not be the noise of the actions, although one seed makes both.
    assert abs(np.corrcoef(action[inside], z)[0, 1]) < 4 / math.sqrt(len(z))


def test_dataset_is_the_same_as_ever():
    """Measured results stay comparable only while a seed means the same data: these numbers may not change."""
    data, again, other = (liq.behaviour_dataset(50, seed) for seed in (3, 3, 4))
    assert all((data[name] == again[name]).all() for name in data) and len(data["rewards"]) == 971
    assert data["next_observations"][:2, 2] == pytest.approx([1.0808390, 1.0383660], abs=1e-6)
    assert data["rewards"].sum(dtype=np.float64) == pytest.approx(5014.275313, abs=1e-4)
    assert not np.array_equal(data["rewards"][:50], other["rewards"][:50])


def test_compare_is_the_paired_difference():
    (optimum, boundary), n = liq.solve(), 2000
    envs = gym.make_vec("liquidation_env:Liquidation-v0", num_envs=n)  # as a learner evaluates: the first episodes
    (observation, _), best, alive = envs.reset(seed=11), np.zeros(n), np.ones(n, bool)
    while alive.any():
        observation, reward, terminated, _, _ = envs.step(liq.threshold_policy(boundary)(observation))
        best, alive = best + alive * reward, alive & ~terminated
    shares = {"share_of_optimum": 1.0, "share_of_optimum_ci95": 0.0}
    assert liq.compare(best, seed=11) == {"optimum": optimum, "optimum_score": 100 * optimum / 135} | shares
    held = liq.evaluate(liq.threshold_policy(HOLD_TO_THE_END), n, seed=11)
    result = liq.compare(held, seed=11)
    assert all(type(value) is float for value in result.values())  # fit for JSON
    share, error = result["share_of_optimum"], result["share_of_optimum_ci95"]
    assert share == pytest.approx(1 + np.mean(held - best) / optimum)
    assert error == pytest.approx(1.96 * np.std(held - best, ddof=1) / math.sqrt(n) / optimum)
    assert abs(share - quadrature_value(HOLD_TO_THE_END) / optimum) < 2 * error


def test_market_warning():
    assert not any(liq.market_warning(liq.behaviour_dataset(n, seed)) for n in (20, 200, 1000) for seed in range(5))
    assert liq.market_warning(liq.play(liq.threshold_policy(HOLD_TO_THE_END), 3000, 0)[0]) == ""
    data = liq.behaviour_dataset(300, 0)  # read without next_observations: those of terminal rows are another episode's
    assert liq.market_warning(data | {"next_observations": np.roll(data["observations"], -1, axis=0)}) == ""
    strange = {"the data reach step 39, the market ends at 20": {"horizon": 40}, "reaches 200": {"inventory": 200.0}}
    strange |= {"step 20": {"horizon": 10}, "θ is 0.1": {"theta": 0.15, "initial_price": 1.5}, "σ 0.2": {"sigma": 0.23}}
    strange |= {"θp̄ 0.1": {"mean_price": 2.2}, "any price": {"initial_price": 4.5, "theta": 0.0, "sigma": 0.02}}
    for said, parameters in strange.items():
        warning = liq.market_warning(liq.behaviour_dataset(1500, 0, **parameters))
        assert "these data are of another market" in warning and said in warning and "\n" not in warning


def test_command(tmp_path):
    command = [sys.executable, liq.__file__, "--episodes", "4000", "--output", tmp_path / "figure.png"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0 and result.stderr == ""
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "exact: optimal 137.48, optimal at 0.99 135.21 (undiscounted)" in result.stdout
    rows = {line[:16].strip(): line[16:].split() for line in result.stdout.splitlines()}
    known = {"optimal": 137.48, "optimal at 0.99": 135.21, "hold, then sell": 131.95, "TWAP": 118.2, "behaviour": 99.0}
    for name, value in known.items():
        mean, error, gap, score, share = (float(rows[name][i]) for i in (0, 2, 3, 6, 7))
        assert abs(mean - value) < 4 * error and 0.3 < error < 1
        assert gap == pytest.approx(mean - float(rows["optimal"][0]), abs=0.011)
        assert [score, share] == pytest.approx([100 * mean / 135, 100 * mean / 137.48], abs=0.06)
    prices = liq.play(liq.threshold_policy(HOLD_TO_THE_END), 4000, 0)[0]["observations"][:, 2]
    assert float(rows["TWAP"][0]) == pytest.approx(100 * prices.mean(dtype=np.float64), abs=0.01)  # 5 units at each
