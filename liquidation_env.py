"""Optimal liquidation: sell 100 units of a currency within 20 steps while its price wanders.

The stochastic benchmark of PSPO (arXiv 2605.07393, appendix 12.1.2), with the dynamics of the 1R2R benchmark.
State (t, m, p): step, inventory, price.  Action a ∈ [−1, 1]: sell the fraction max(a, 0) of the inventory.

    price          p₀ ~ N(1, 0.05²),  p' = clip(p + θ(p̄ − p)dt + σ√dt·z, 0, 5),  z ~ N(0, 1)
    inventory      m' = m − sold,  sold = max(a, 0)·m
    reward         r = sold·p, at the price seen before the step; the episode ends at t' = 20 or when m' < 0.1
    optimum        V*(t, p) = max(p, γ E[V*(t+1, p')]) per unit of inventory, and V*(20, ·) = 0
    score          100·return / 135

The return is linear in every sale, so selling all or nothing is optimal: a stopping problem with a boundary
p*(t), solved here to four digits.  Nobody can earn more than 137.48 (score 101.8) in expectation.

    python liquidation_env.py                                # the baselines against the optimum, 2 seconds
    python liquidation_env.py --episodes 100000 --discount 0.98 --output liquidation.png

    env = gymnasium.make("liquidation_env:Liquidation-v0")                       # one copy
    envs = gymnasium.make_vec("liquidation_env:Liquidation-v0", num_envs=4096)   # all copies in one array
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

ENV_ID = "Liquidation-v0"
MAX_PRICE = 5.0  # the price is clipped to [0, MAX_PRICE]
MIN_INVENTORY = 0.1  # less than this counts as sold out
HOLD_PROBABILITY = 0.8  # of the behaviour policy
RANDOM_RETURN, EXPERT_RETURN = 0.0, 135.0  # scores 0 and 100 (PSPO, Table 4)
GRID_POINTS, QUADRATURE_NODES = 2001, 64  # values to about 0.01

Policy = Callable[[np.ndarray], np.ndarray]  # observations (..., 3) → actions (..., 1)


# --- Dynamics -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Market:
    """The problem's parameters; the defaults are the benchmark's. Raises ValueError that names a bad one."""

    theta: float = 0.05  # θ, rate of mean reversion
    mean_price: float = 1.5  # p̄, long-run price
    sigma: float = 0.2  # σ, volatility
    dt: float = 1.0
    horizon: int = 20  # steps in an episode
    initial_price: float = 1.0
    initial_price_std: float = 0.05
    inventory: float = 100.0  # units to sell

    def __post_init__(self) -> None:
        rules = {
            "theta": self.theta >= 0 and self.theta * self.dt <= 1,  # no overshooting of the mean
            "mean_price": 0 <= self.mean_price <= MAX_PRICE,
            "sigma": self.sigma >= 0,
            "dt": self.dt > 0,
            "horizon": isinstance(self.horizon, (int, np.integer)) and self.horizon >= 1,
            "initial_price": 0 <= self.initial_price <= MAX_PRICE,
            "initial_price_std": self.initial_price_std >= 0,
            "inventory": self.inventory >= MIN_INVENTORY,
        }
        for name, holds in rules.items():
            if not (holds and np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


def first_price(market: Market, noise: np.ndarray) -> np.ndarray:
    """Price at reset for standard normal noise of any shape."""
    return np.clip(market.initial_price + market.initial_price_std * noise, 0.0, MAX_PRICE)


def next_price(market: Market, price: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """One Euler step of the Ornstein–Uhlenbeck price, clipped; price and noise broadcast."""
    drift = market.theta * (market.mean_price - price) * market.dt
    return np.clip(price + drift + market.sigma * np.sqrt(market.dt) * noise, 0.0, MAX_PRICE)


def transition(market: Market, step, inventory, price, fraction, noise) -> tuple[np.ndarray, ...]:
    """The one transition function of everything in this file; arrays of one shape, or scalars.

    `fraction` of the inventory is sold, in [0, 1]. Returns step', inventory', price', reward, terminated.
    """
    sold = fraction * inventory
    left = inventory - sold
    terminated = (step + 1 >= market.horizon) | (left < MIN_INVENTORY)
    return step + 1, left, next_price(market, price, noise), sold * price, terminated


def sale_fraction(action: Any, shape: tuple[int, ...]) -> np.ndarray:
    """max(a, 0) of actions clipped to [−1, 1], without the last axis; ValueError for NaN or a wrong shape."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != shape:
        raise ValueError(f"action has shape {action.shape}, expected {shape}")
    if np.isnan(action).any():
        raise ValueError("action is NaN")
    return np.clip(action[..., 0], 0.0, 1.0)


def spaces(market: Market) -> tuple[gym.spaces.Box, gym.spaces.Box]:
    """Observation box [t, m, p] in raw units and action box, both float32."""
    high = np.array([market.horizon, market.inventory, MAX_PRICE], dtype=np.float32)
    return gym.spaces.Box(np.zeros(3, np.float32), high), gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


# --- Environments -------------------------------------------------------------------------------------------
class LiquidationEnv(gym.Env):
    """One copy. Observation float32 (3,): step 0…20, inventory 0…100, price 0…5. Action float32 (1,).

    Keyword arguments are `Market`'s fields. Out-of-range actions are clipped, NaN raises ValueError. The
    price path depends on the seed and the number of resets only: the noise of an episode is drawn at reset.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None, **parameters: float) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.render_mode = render_mode
        self.market = Market(**parameters)
        self.observation_space, self.action_space = spaces(self.market)
        self._done = True

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; `options` is not used."""
        super().reset(seed=seed)
        self._noise = self.np_random.standard_normal(self.market.horizon + 1)
        self._step, self._inventory = 0, self.market.inventory
        self._price = first_price(self.market, self._noise[0])
        self._history = [(self._inventory, self._price)]  # what render draws
        self._done = False
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Sell, then move the price. Never truncates. Raises ResetNeeded outside an episode."""
        if self._done:
            raise gym.error.ResetNeeded("call reset() first: no episode is under way")
        fraction = sale_fraction(action, (1,))
        self._step, self._inventory, self._price, reward, terminated = transition(
            self.market, self._step, self._inventory, self._price, fraction, self._noise[self._step + 1]
        )
        self._history.append((self._inventory, self._price))
        self._done = bool(terminated)
        return self._observation(), float(reward), self._done, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self._step, self._inventory, self._price], dtype=np.float32)

    def render(self) -> np.ndarray | None:
        """uint8 (200, 21·20, 3): the price as a dark line over the inventory as light bars."""
        if self.render_mode is None:
            return None
        height, width = 200, 20  # of the image, of one step in it
        history = np.array(self._history)  # (t + 1, 2)
        image = np.full((height, width * (self.market.horizon + 1), 3), 255, dtype=np.uint8)
        row = np.arange(height)[::-1, None]  # 0 at the bottom
        bar = np.repeat(history[:, 0] / self.market.inventory, width) * (height - 1)
        image[:, : len(bar)][row <= bar] = (190, 214, 236)
        x = np.arange(width * (len(history) - 1) + 1)
        line = np.interp(x / width, np.arange(len(history)), history[:, 1]) / MAX_PRICE * (height - 1)
        thickness = 1.5 + np.abs(np.gradient(line)) / 2 if len(line) > 1 else 1.5  # steep parts stay joined
        image[:, width // 2 : width // 2 + len(x)][np.abs(row - line) <= thickness] = (31, 58, 95)
        return image


class LiquidationVectorEnv(gym.vector.VectorEnv):
    """`num_envs` copies in arrays: observations float32 (n, 3), actions (n, 1), rewards float64 (n,).

    Autoreset is NEXT_STEP: the step that ends an episode returns its true last observation; the next step
    ignores the copy's action and returns the new episode's first observation, reward 0, terminated False.
    Noise is drawn for all copies at every step, so the price path of copy i's first episode after a seeded
    reset depends on the seed and `num_envs` only; later episodes start where the actions end earlier ones.
    """

    metadata: ClassVar[dict] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = 1, **parameters: float) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        self.num_envs = num_envs
        self.market = Market(**parameters)
        self.single_observation_space, self.single_action_space = spaces(self.market)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._done: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode in every copy; `options` is not used."""
        super().reset(seed=seed)
        self._step = np.zeros(self.num_envs)
        self._inventory = np.full(self.num_envs, float(self.market.inventory))
        self._price = first_price(self.market, self.np_random.standard_normal(self.num_envs))
        self._done = np.zeros(self.num_envs, dtype=bool)
        return self._observation(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step every copy, or reset it if its episode ended at the step before. Never truncates."""
        if self._done is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        fraction = sale_fraction(actions, (self.num_envs, 1))
        noise = self.np_random.standard_normal(self.num_envs)
        self._step, self._inventory, self._price, reward, terminated = transition(
            self.market, self._step, self._inventory, self._price, fraction, noise
        )
        if (again := self._done).any():
            self._step[again], self._inventory[again] = 0.0, self.market.inventory
            self._price[again] = first_price(self.market, noise[again])
            reward[again], terminated[again] = 0.0, False
        self._done = terminated.copy()  # the caller may write into what it gets
        return self._observation(), reward, terminated, np.zeros(self.num_envs, dtype=bool), {}

    def _observation(self) -> np.ndarray:
        observation = np.empty((self.num_envs, 3), dtype=np.float32)
        observation[:, 0], observation[:, 1], observation[:, 2] = self._step, self._inventory, self._price
        return observation


if ENV_ID not in gym.registry:  # running the file and importing it are two modules with one registry
    gym.register(
        ENV_ID, entry_point="liquidation_env:LiquidationEnv", vector_entry_point="liquidation_env:LiquidationVectorEnv"
    )


# --- Exact solution -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OptimalValue:
    """The solved stopping problem: sell everything at step t when p ≥ boundary[t]."""

    value: float  # expected (discounted) return from the start distribution, in reward units
    boundary: np.ndarray  # (horizon,); 0 at the last step
    prices: np.ndarray  # (GRID_POINTS,)
    table: np.ndarray  # (horizon, GRID_POINTS), V(t, p) per unit of inventory


def _backward_induction(market: Market, discount: float, boundary: np.ndarray | None) -> OptimalValue:
    """V(t, p) = p where it sells, else γ E[V(t+1, p')]. Sells where that is best if `boundary` is None."""
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], not {discount}")
    z, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    weights = weights / weights.sum()
    prices = np.linspace(0.0, MAX_PRICE, GRID_POINTS)
    optimise = boundary is None
    boundary = np.zeros(market.horizon) if optimise else np.clip(boundary, 0.0, 2 * MAX_PRICE)  # inf·0 is NaN
    table = np.empty((market.horizon, GRID_POINTS))

    # At a boundary b that is not optimal V jumps. Quadrature needs a continuous function, so V is kept as a
    # continuous part and a jump at b, whose expectation is a normal tail. Both are 0 after the horizon.
    continuous, jump, b = np.zeros(GRID_POINTS), 0.0, 0.0

    def expectation(price_of: Callable[[np.ndarray], np.ndarray], std: float) -> np.ndarray:
        mean = price_of(np.zeros(1))[..., 0]
        # The slack and the floor let a price without noise that equals b sell there.
        sells = 0.5 * np.vectorize(math.erfc)((b - 1e-9 - mean) / (max(std, 1e-12) * math.sqrt(2.0)))
        sells = np.where(b > MAX_PRICE, 0.0, np.where(b <= 0.0, 1.0, sells))
        return np.interp(price_of(z), prices, continuous) @ weights + jump * sells

    for t in reversed(range(market.horizon)):
        std = market.sigma * math.sqrt(market.dt)
        hold = discount * expectation(lambda noise: next_price(market, prices[:, None], noise), std)
        gain = prices - hold  # of selling now; increasing in the price
        if optimise and (i := int(np.argmax(gain >= -1e-12))) > 0:  # a tie, up to rounding, sells
            boundary[t] = np.interp(0.0, gain[i - 1 : i + 1], prices[i - 1 : i + 1])
        b = boundary[t]
        table[t] = np.where(prices >= b, prices, hold)
        jump = b - np.interp(b, prices, hold)
        continuous = np.where(prices >= b, prices - jump, hold)
    value = market.inventory * expectation(lambda noise: first_price(market, noise), market.initial_price_std)
    return OptimalValue(float(value), boundary, prices, table)


def optimal_value(discount: float = 1.0, **parameters: float) -> OptimalValue:
    """Optimal stopping by dynamic programming over a price grid with Gauss–Hermite quadrature.

    `discount` in [0, 1], else ValueError; `parameters` are `Market`'s. With discount < 1 value and table are
    discounted; what that policy earns undiscounted is `threshold_value(optimal_value(discount).boundary)`.
    """
    return _backward_induction(Market(**parameters), discount, None)


def threshold_value(boundary: np.ndarray, discount: float = 1.0, **parameters: float) -> float:
    """Expected return, in reward units, of selling everything when p ≥ boundary[t], by the same quadrature.

    `boundary` has shape (horizon,), inf where it never sells; what is unsold at the end earns nothing.
    """
    market, boundary = Market(**parameters), np.asarray(boundary, dtype=np.float64)
    if boundary.shape != (market.horizon,) or np.isnan(boundary).any():
        raise ValueError(f"boundary must be {market.horizon} numbers, got shape {boundary.shape}")
    return _backward_induction(market, discount, boundary).value


# --- Policies -----------------------------------------------------------------------------------------------
def threshold_policy(boundary: np.ndarray) -> Policy:
    """Sell everything (1.0) when p ≥ boundary[t], else hold (−1.0)."""
    boundary = np.asarray(boundary, dtype=np.float64)

    def policy(observation: np.ndarray) -> np.ndarray:
        step = np.minimum(observation[..., 0].astype(int), len(boundary) - 1)  # t = horizon when it has ended
        return np.where(observation[..., 2] >= boundary[step], 1.0, -1.0)[..., None].astype(np.float32)

    return policy


def optimal_policy(discount: float = 1.0, **parameters: float) -> Policy:
    """The policy that is exactly optimal for this discount."""
    return threshold_policy(optimal_value(discount, **parameters).boundary)


def hold_then_sell_policy(**parameters: float) -> Policy:
    """Hold until the last step, then sell everything."""
    return threshold_policy(np.append(np.full(Market(**parameters).horizon - 1, np.inf), 0.0))


def twap_policy(**parameters: float) -> Policy:
    """The same amount at every step: the fraction 1/(horizon − t) of what is left."""
    horizon = Market(**parameters).horizon
    return lambda observation: 1.0 / np.maximum(horizon - observation[..., :1], 1.0)


def behaviour_policy(seed: int = 0) -> Policy:
    """The data's policy: with probability 0.8 hold, a ~ U[−1, 0), else a ~ U(0, 1]. Owns a generator."""
    rng = np.random.default_rng([seed, 1])  # not the stream of an environment with the same seed

    def policy(observation: np.ndarray) -> np.ndarray:
        shape = (*observation.shape[:-1], 1)
        hold, u = rng.random(shape) < HOLD_PROBABILITY, rng.random(shape, dtype=np.float32)
        return np.where(hold, u - 1, 1 - u)  # u < 1, so neither is ever 0

    return policy


# Each entry makes a policy; called without arguments, for the benchmark's parameters.
BASELINES: dict[str, Callable[..., Policy]] = {
    "optimal": optimal_policy,
    "hold-then-sell": hold_then_sell_policy,
    "TWAP": twap_policy,
    "behaviour": behaviour_policy,
}


# --- Data and evaluation ------------------------------------------------------------------------------------
def rollout(policy: Policy, num_episodes: int, seed: int, **parameters: float) -> Iterator[tuple]:
    """Yield (o, a, r, o', terminated, alive) of each step; one episode in each of `num_episodes` copies."""
    env = LiquidationVectorEnv(num_episodes, **parameters)
    observation, _ = env.reset(seed=seed)
    alive = np.ones(num_episodes, dtype=bool)
    while alive.any():
        action = policy(observation)
        next_observation, reward, terminated, _, _ = env.step(action)
        yield observation, action, reward, next_observation, terminated, alive
        observation, alive = next_observation, alive & ~terminated


def evaluate(policy: Policy, num_episodes: int, seed: int, **parameters: float) -> np.ndarray:
    """Undiscounted returns, float64 (num_episodes,), one episode each.

    Episode i has the same price path for every policy under the same seed and num_episodes: compare in pairs.
    """
    steps = rollout(policy, num_episodes, seed, **parameters)
    return sum(alive * reward for _, _, reward, _, _, alive in steps)


def score(returns: np.ndarray | float) -> np.ndarray | float:
    """PSPO's Eq. (15): 0 at return 0, 100 at return 135."""
    return 100.0 * (returns - RANDOM_RETURN) / (EXPERT_RETURN - RANDOM_RETURN)


def behaviour_dataset(num_episodes: int, seed: int, **parameters: float) -> dict[str, np.ndarray]:
    """Offline data of the behaviour policy in D4RL's layout, N rows, episode after episode.

    observations, next_observations float32 (N, 3), actions float32 (N, 1), rewards float32 (N,), terminals
    and timeouts bool (N,). The next observation of a terminal row is the true one; no row is a timeout.
    """
    steps = rollout(behaviour_policy(seed), num_episodes, seed, **parameters)
    columns = [np.stack(column, axis=1) for column in zip(*steps, strict=True)]  # (episode, step, …)
    alive = columns.pop()
    observations, actions, rewards, next_observations, terminals = (column[alive] for column in columns)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards.astype(np.float32),
        "next_observations": next_observations,
        "terminals": terminals,
        "timeouts": np.zeros_like(terminals),
    }


# --- Command line -------------------------------------------------------------------------------------------
@dataclass
class Args:
    """Compare the baselines with the exact optimum on the same price paths, and draw them."""

    episodes: int = 10_000
    """episodes of each policy"""
    seed: int = 0
    """seed of the price paths and of the behaviour policy"""
    discount: float = 0.99
    """γ of the second optimal policy, to see what a discount costs; the first one has γ = 1"""
    output: Path = Path("liquidation.png")
    """where to save the figure"""


def draw_figure(path: Path, solutions: dict[str, OptimalValue], returns: dict[str, np.ndarray]) -> None:
    """Left: price paths and the stopping boundaries. Right: the distribution of each policy's return."""
    import matplotlib  # here, because an environment must import fast

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    optimum = solutions["γ = 1"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.15, 1), layout="constrained")
    prices = np.stack([row[0][:, 2] for row in rollout(hold_then_sell_policy(), 40, seed=0)])  # (step, path)
    left.plot(prices[:, 0], color="0.82", lw=0.8, label="price paths")
    left.plot(prices[:, 1:], color="0.82", lw=0.8)
    for (name, solution), style in zip(solutions.items(), ("C0-", "C1--"), strict=False):
        left.plot(solution.boundary, style, lw=2.2, label=f"boundary, {name}")
    sale = (prices >= optimum.boundary[:, None]).argmax(axis=0)  # (path,), first step at or above
    left.plot(sale, prices[sale, range(40)], "o", ms=5, color="C0", mec="white", label="sale, γ = 1", clip_on=False)
    left.set(title="Sell everything at or above the boundary", xlabel="step $t$", ylabel="price $p$")
    left.set(xlim=(0, len(prices) - 1), ylim=(0, 2.8), xticks=range(0, len(prices), 2))
    left.legend(loc="upper left", ncols=2, frameon=False)

    diamond = {"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 5}
    style = {"widths": 0.55, "patch_artist": True, "showmeans": True, "showfliers": False, "whis": (5, 95)}
    style |= {"boxprops": {"facecolor": "#bed6ec"}, "medianprops": {"color": "black"}, "meanprops": diamond}
    names = list(reversed(returns))
    right.boxplot([returns[name] for name in names], orientation="horizontal", tick_labels=names, **style)
    right.axvline(optimum.value, color="C0", ls=":")
    right.set(title="Quartiles, 5–95% and mean (◇)")
    right.set(xlabel=f"return of an episode (dotted: exact optimum {optimum.value:.1f})")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> None:
    """Print the table and save the figure. ValueError or OSError for bad arguments."""
    if args.episodes < 2 or args.seed < 0:
        raise ValueError("--episodes must be at least 2 (a standard error needs two) and --seed at least 0")
    solutions = {f"γ = {discount:g}": optimal_value(discount) for discount in (1.0, args.discount)}
    discounted = solutions[f"γ = {args.discount:g}"].boundary
    policies = {name: make() for name, make in BASELINES.items()}
    policies["behaviour"] = behaviour_policy(args.seed)
    policies[f"optimal at {args.discount:g}"] = threshold_policy(discounted)
    returns = {name: evaluate(policy, args.episodes, args.seed) for name, policy in policies.items()}
    returns = dict(sorted(returns.items(), key=lambda item: -item[1].mean()))

    def mean_error(sample: np.ndarray) -> str:
        return f"{sample.mean():.2f} ± {sample.std(ddof=1) / math.sqrt(len(sample)):.2f}"

    optimum = solutions["γ = 1"].value
    print(f"{'policy':<16}{'return ± s.e.':>16}{'std':>7}{'minus optimal':>17}{'score':>8}{'% of optimum':>14}")
    for name, sample in returns.items():
        print(f"{name:<16}{mean_error(sample):>16}{sample.std(ddof=1):7.1f}", end="")
        print(f"{mean_error(sample - returns['optimal']):>17}{score(sample.mean()):8.1f}", end="")
        print(f"{100 * sample.mean() / optimum:14.1f}")
    ceiling = threshold_value(discounted)
    print(f"exact: optimal {optimum:.2f}, optimal at {args.discount:g} {ceiling:.2f} (undiscounted)")
    draw_figure(args.output, solutions, returns)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, ValueError) as error:
        print(f"liquidation_env.py: {error}", file=sys.stderr)
        sys.exit(2)
