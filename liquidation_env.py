"""Optimal liquidation: sell 100 units of a currency within 20 steps while its price wanders.

The stochastic benchmark of PSPO (arXiv 2605.07393, appendix 12.1.2, scores of Table 4), with 1R2R's dynamics.
State (t, m, p): step, inventory, price. Action a ∈ [−1, 1]: sell the fraction max(a, 0) of the inventory.

    price       p₀ ~ N(1, 0.05²),  p' = clip(p + θ(p̄ − p)dt + σ√dt·z, 0, 5),  z ~ N(0, 1)
    inventory   m' = m − sold,  sold = max(a, 0)·m
    reward      r = sold·p, at the price before the step; the episode ends at t' = 20 or when m' < 0.1
    optimum     V(t, p) = max(p, γ E[V(t+1, p')]) per unit of inventory, V(20, ·) = 0
    score       100·return / 135

The return is linear in every sale, so selling all or nothing is optimal: a stopping problem with a boundary
p*(t), solved here to four digits. Nobody can earn more than 137.48 (score 101.8) in expectation.

    python liquidation_env.py [--output figure.png]      # the baselines' table, and a figure: 2 seconds
    envs = gymnasium.make_vec("liquidation_env:Liquidation-v0", num_envs=4096)   # all copies in one array
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro

MAX_PRICE = 5.0  # prices are clipped to [0, MAX_PRICE]
EXPERT = 135.0  # the return of score 100; score 0 is a return of 0 (PSPO, Table 4)
Policy = Callable[[np.ndarray], np.ndarray]  # observations (n, 3) → actions (n, 1)


@dataclass(frozen=True)
class Market:
    """The problem's parameters; the defaults are the benchmark's."""

    theta: float = 0.05  # θ, rate of mean reversion
    mean_price: float = 1.5  # p̄
    sigma: float = 0.2  # σ, volatility
    dt: float = 1.0
    horizon: int = 20  # steps in an episode
    initial_price: float = 1.0
    initial_price_std: float = 0.05
    inventory: float = 100.0  # units to sell

    def __post_init__(self) -> None:
        if not (0 <= self.theta * self.dt <= 1 and self.sigma * self.dt**0.5 >= 0.02 and 0 <= self.mean_price <= 5.0):
            raise ValueError(f"0 ≤ θ·dt ≤ 1, σ√dt ≥ 0.02 (four cells of `solve`) and 0 ≤ p̄ ≤ 5 must hold, not {self}")

    def first_state(self, noise: np.ndarray) -> np.ndarray:
        """Standard normal noise (n,) → states (n, 3)."""
        price = np.clip(self.initial_price + self.initial_price_std * noise, 0.0, MAX_PRICE)
        return np.stack([np.zeros_like(price), np.full_like(price, self.inventory), price], axis=1)

    def next_price(self, price: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """One Euler step of the Ornstein–Uhlenbeck price."""
        drift = self.theta * (self.mean_price - price) * self.dt
        return np.clip(price + drift + self.sigma * math.sqrt(self.dt) * noise, 0.0, MAX_PRICE)

    def transition(self, state: np.ndarray, action: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
        """States (n, 3), actions (n, 1), noise (n,) → next states (n, 3), rewards (n,), terminated (n,)."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (len(state), 1) or np.isnan(action).any():
            raise ValueError(f"actions must be {len(state)} rows of one number, not {action}")
        step, inventory, price = state.T
        sold = np.clip(action[:, 0], 0.0, 1.0) * inventory
        terminated = (step + 1 >= self.horizon) | (inventory - sold < 0.1)  # so little counts as sold out
        return np.stack([step + 1, inventory - sold, self.next_price(price, noise)], axis=1), sold * price, terminated


class LiquidationVectorEnv(gym.vector.VectorEnv):
    """Observations float32 (n, 3): t, m, p; actions (n, 1); rewards float64 (n,). Keywords are `Market`'s fields."""

    def __init__(self, num_envs: int = 1, **parameters: float) -> None:
        self.market = market = Market(**parameters)
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # the step after the end starts anew
        self.single_observation_space = gym.spaces.Box(0.0, np.float32([market.horizon, market.inventory, MAX_PRICE]))
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.market.first_state(self.np_random.standard_normal(self.num_envs))
        self.ended = np.zeros(self.num_envs, dtype=bool)
        return self.state.astype(np.float32), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        noise = self.np_random.standard_normal(self.num_envs)  # also for ended copies: one seed, one set of prices
        state, reward, terminated = self.market.transition(self.state, actions, noise)
        self.state = np.where(self.ended[:, None], self.market.first_state(noise), state)
        reward, self.ended = np.where(self.ended, 0.0, reward), terminated & ~self.ended
        return self.state.astype(np.float32), reward, self.ended.copy(), np.zeros_like(self.ended), {}


class LiquidationEnv(gym.Env):
    """One copy: observations float32 (3,), actions (1,). Reset it after an episode's end."""

    def __init__(self, **parameters: float) -> None:
        self.one = LiquidationVectorEnv(1, **parameters)
        self.observation_space, self.action_space = self.one.single_observation_space, self.one.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.one.np_random = self.np_random
        return self.one.reset()[0][0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, terminated, _, _ = self.one.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(terminated[0]), False, {}


gym.register(
    "Liquidation-v0", "liquidation_env:LiquidationEnv", vector_entry_point="liquidation_env:LiquidationVectorEnv"
)


def solve(discount: float = 1.0, **parameters: float) -> tuple[float, np.ndarray]:
    """The policy that is optimal for a discount in [0, 1]: what it earns undiscounted, and its boundary (horizon,)."""
    market, price = Market(**parameters), np.linspace(0.0, MAX_PRICE, 1001)
    edges = np.concatenate([[-np.inf], (price[1:] + price[:-1]) / 2, [np.inf]])  # the outer cells take what is clipped
    mean = np.append(market.next_price(price, 0.0), market.initial_price)  # the last row is the price at reset
    std = np.append(np.full(len(price), market.sigma * math.sqrt(market.dt)), max(market.initial_price_std, 1e-9))
    z = (edges - mean[:, None]) / std[:, None]
    chances = np.diff(0.5 + 0.5 * np.vectorize(math.erf)(z / math.sqrt(2.0)), axis=1)  # (G + 1, G)
    matrix, boundary = chances[:-1], np.zeros(market.horizon)
    value = earned = np.zeros_like(price)  # (G,), per unit of inventory; discounted, and not
    for t in reversed(range(market.horizon)):
        hold = discount * matrix @ value  # γ P V
        boundary[t] = np.interp(0.0, price - hold, price)  # the gain of selling now increases with the price
        value = np.maximum(price, hold)
        sells = np.clip((price - boundary[t]) / price[1] + 0.5, 0.0, 1.0)  # the share of the cell above the boundary
        earned = sells * price + (1.0 - sells) * (matrix @ earned)
    return float(market.inventory * chances[-1] @ earned), boundary


def threshold_policy(boundary: np.ndarray) -> Policy:
    """Sell everything (1) when p ≥ boundary[t], else hold (−1)."""
    boundary = np.append(boundary, 0.0)  # the observation after the end has t = horizon
    return lambda observation: np.where(observation[:, 2:] >= boundary[observation[:, :1].astype(int)], 1.0, -1.0)


def behaviour_policy(seed: int) -> Policy:
    """The data's policy: with probability 0.8 hold, a ~ U[−1, 0), else a ~ U(0, 1]."""
    rng = np.random.default_rng([seed, 1])  # not the stream of an environment with the same seed
    return lambda obs: np.sign(rng.random((len(obs), 1)) - 0.8) * (1 - rng.random((len(obs), 1), dtype=np.float32))


def play(policy: Policy, num_episodes: int, seed: int, **parameters: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One episode in each of n copies: N rows in D4RL's layout, episode after episode, and the returns (n,)."""
    envs = LiquidationVectorEnv(num_episodes, **parameters)
    observation, _ = envs.reset(seed=seed)
    alive, returns, rows = np.ones(num_episodes, dtype=bool), np.zeros(num_episodes), []
    while alive.any():
        action = np.float32(policy(observation))
        following, reward, terminated, truncated, _ = envs.step(action)
        rows.append((observation, action, np.float32(reward), following, terminated, truncated, alive))
        returns += reward * alive
        observation, alive = following, alive & ~terminated
    *columns, alive = (np.stack(column, axis=1) for column in zip(*rows, strict=True))  # (n, T, …)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {name: column[alive] for name, column in zip(names, columns, strict=True)}, returns


def evaluate(policy: Policy, num_episodes: int, seed: int, **parameters: float) -> np.ndarray:
    """Undiscounted returns, float64 (n,). Episode i has the same prices for every policy: compare in pairs."""
    return play(policy, num_episodes, seed, **parameters)[1]


def behaviour_dataset(num_episodes: int, seed: int, **parameters: float) -> dict[str, np.ndarray]:
    """The behaviour policy's rows in D4RL's layout, float32 and bool; terminal rows keep their true next ones."""
    return play(behaviour_policy(seed), num_episodes, seed, **parameters)[0]


def compare(returns: np.ndarray, seed: int) -> dict[str, float]:
    """Returns (n,) of `make_vec(…, num_envs=n)` reset with `seed`, against the optimal policy's on the same prices."""
    optimum, boundary = solve()
    difference = returns - evaluate(threshold_policy(boundary), len(returns), seed)
    return {
        "optimum": optimum,
        "optimum_score": 100.0 * optimum / EXPERT,
        "share_of_optimum": float(1.0 + difference.mean() / optimum),
        "share_of_optimum_ci95": float(1.96 * difference.std(ddof=1) / math.sqrt(len(returns)) / optimum),
    }


def draw_boundary(ax, act: Policy, gamma: float = 1.0) -> None:
    """Colours: the fraction that `act`, (B, 3) float32 → (B, 1), sells at inventory 100. Lines: exact boundaries."""
    step, price = np.meshgrid(np.arange(20), np.linspace(0.5, 2.75, 226))
    observation = np.stack([step, np.full(step.shape, 100), price], axis=-1, dtype=np.float32)
    sold = np.clip(np.asarray(act(observation.reshape(-1, 3))), 0.0, 1.0).reshape(step.shape)
    ax.figure.colorbar(ax.pcolormesh(step, price, sold, cmap="Blues", vmin=0, vmax=1), ax=ax, label="fraction sold")
    for discount, style in {gamma: "--", 1.0: "-"}.items():
        ax.plot(solve(discount)[1], style, color="#d55e00", label=f"exact boundary, γ = {discount:g}")
    ax.set(xlabel="step $t$", ylabel="price $p$", ylim=(0.5, 2.75), xticks=range(0, 20, 2))
    ax.legend(loc="upper right")


def market_warning(data: dict[str, np.ndarray]) -> str:
    """Empty if `data` fit the default market, else one line: what differs by 5 standard errors and 5% of σ."""
    market, other = Market(), "these data are of another market: "
    step, inventory, price = np.asarray(data["observations"], dtype=np.float64).T
    if step.max() >= market.horizon:
        return other + f"the data reach step {step.max():g}, the market ends at {market.horizon}"
    if inventory.max() > market.inventory:
        return other + f"the inventory reaches {inventory.max():g}, the market's is {market.inventory:g}"
    left, terminal = inventory * (1 - data["actions"][:, 0].clip(0, 1)), data["terminals"]
    if (terminal & (step + 1 < market.horizon) & (left > 0.101)).any():
        return other + f"episodes end before step {market.horizon} with more than 0.1 left"
    inside = ~terminal & (abs(price - 2.5) < 2.5 - 4 * market.sigma)  # p' is known, and hardly ever clipped
    if inside.sum() < 3:
        return other + "hardly any price lies between 0.8 and 4.2, where the market starts"
    z = (data["next_observations"][:, 2] - market.next_price(price, 0.0))[inside] / market.sigma  # N(0, 1), any p
    errors = np.abs([z.mean(), z.std() - 1.0, np.corrcoef(z, price[inside])[0, 1]])  # standard errors below 1/√n
    if errors.max() <= max(5.0 / math.sqrt(len(z)), 0.05):
        return ""
    slope, constant = np.polyfit(price[inside], 0.2 * z, 1)  # least squares: what p' − p = θp̄ − θp + σz lacks
    return other + f"θ is {0.05 - slope:.3f}, θp̄ {0.075 + constant:.3f}, σ {0.2 * z.std():.3f}, not 0.05, 0.075, 0.2"


@dataclass
class Args:
    """Compare the baselines with the exact optimum on the same prices."""

    episodes: int = 10_000  # of each policy
    seed: int = 0  # of the prices and of the behaviour policy
    discount: float = 0.99  # γ of the second optimal policy: what does a discount cost?
    output: str = ""  # save a figure here: prices and boundaries, the returns' distribution


def main(args: Args) -> None:
    (optimum, boundary), (ceiling, early) = solve(), solve(args.discount)
    policies = {
        "optimal": threshold_policy(boundary),
        f"optimal at {args.discount:g}": threshold_policy(early),
        "hold, then sell": threshold_policy(np.append(np.full(19, np.inf), 0.0)),
        "TWAP": lambda observation: 1.0 / (20.0 - observation[:, :1]),  # 5 units at every step
        "behaviour": behaviour_policy(args.seed),
    }
    returns = {name: evaluate(policy, args.episodes, args.seed) for name, policy in policies.items()}
    print(f"{'policy':<16}{'return ± s.e.':>16}{'minus optimal':>17}{'score':>8}{'% of optimum':>14}")
    for name, got in returns.items():
        mean, gap = (f"{x.mean():.2f} ± {x.std(ddof=1) / len(x) ** 0.5:.2f}" for x in (got, got - returns["optimal"]))
        print(f"{name:<16}{mean:>16}{gap:>17}{100 * got.mean() / EXPERT:8.1f}{100 * got.mean() / optimum:14.1f}")
    print(f"exact: optimal {optimum:.2f}, optimal at {args.discount:g} {ceiling:.2f} (undiscounted)")
    if args.output:
        from matplotlib.figure import Figure  # here, because an environment must import fast

        left, right = Figure(figsize=(11, 4.4), layout="constrained").subplots(1, 2)
        draw_boundary(left, policies["optimal"], args.discount)
        prices = play(policies["hold, then sell"], 30, args.seed)[0]["observations"][:, 2].reshape(30, 20)
        left.plot(prices.T, color="0.5", lw=0.6)
        right.boxplot([*returns.values()], tick_labels=[*returns], orientation="horizontal", showmeans=True, sym="")
        right.set(xlabel="return of an episode (▲ mean)")
        left.figure.savefig(args.output, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args))
