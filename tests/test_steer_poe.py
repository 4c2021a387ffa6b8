"""steer_poe.py: every rule against the problem it solves, the identity, the selector, and the whole script."""

import csv
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from d4rl_layout import columns, episodes, write

import iql
import pspo
import steer_poe
from steer_poe import UserError, additive, compose, frozen, gaussian_kl, kl_reg, poe, prior_only

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
robotics = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None, reason="needs gymnasium-robotics, which is optional"
)


def pairs(count, act_dim=3, seed=0):
    """μ_f, σ_f², μ_p, σ_p² of random Gaussians, (count, act_dim) float64; variances over twelve decades."""
    g = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, count, act_dim, generator=g, dtype=torch.float64)
    uniform = functools.partial(torch.rand, count, act_dim, generator=g, dtype=torch.float64)
    return 3 * normal(), 10 ** (12 * uniform() - 6), 3 * normal(), 10 ** (12 * uniform() - 6)


def scalars(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


# --- Composition rules ---


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 7.0])
def test_kl_reg_is_the_minimiser_of_its_problem(beta):
    """A numerical optimiser of KL(π ‖ π_f) − β E_π log π_p over the mean and the log-std of π is the formula."""
    mean_f, var_f, mean_p, var_p = scalars(0.4, 0.09, -1.1, 0.5)
    mean, log_std = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS(
        [mean, log_std], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        var = (2 * log_std).exp()
        expected_log_p = -0.5 * ((var + (mean - mean_p) ** 2) / var_p + (2 * math.pi * var_p).log())
        loss = (gaussian_kl(mean, var, mean_f, var_f) - beta * expected_log_p).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    exact_mean, exact_var = kl_reg(mean_f, var_f, mean_p, var_p, beta)
    assert mean.item() == pytest.approx(exact_mean.item(), abs=1e-6)
    assert (2 * log_std).exp().item() == pytest.approx(exact_var.item(), rel=1e-5)


def moments(log_density, grid):
    """Mean and variance of the density exp(log_density), normalised on a grid."""
    weights = torch.softmax(log_density, 0)
    mean = (weights * grid).sum()
    return mean.item(), (weights * (grid - mean) ** 2).sum().item()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.95])
def test_poe_is_the_log_linear_pool(alpha):
    """Normalising π_f^{1−α} π_p^α by quadrature gives the mean and the variance of the formula."""
    gaussians = scalars(0.4, 0.09, -1.1, 0.5)
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    log_f, log_p = (steer_poe.gaussian_log_prob(grid[:, None], gaussians[i], gaussians[i + 1]) for i in (0, 2))
    mean, var = poe(*gaussians, alpha)
    assert moments((1 - alpha) * log_f + alpha * log_p, grid) == pytest.approx((mean.item(), var.item()), abs=1e-8)


def action_moments(rule_log_density, u):
    """Moments of a = tanh(u) under a density over actions given at the points tanh(u), by quadrature in u."""
    jacobian = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    weights = torch.softmax(rule_log_density + jacobian, 0)  # da = exp(jacobian) du
    a = u.tanh()
    return (weights * a).sum().item(), (weights * a**2).sum().item()


def test_composing_before_the_squash_is_exact_for_poe_and_not_for_kl_reg():
    """docs/steer_poe.md: the Jacobian has exponent (1−α) + α = 1 in PoE, but 1 + β in π_f π_p^β over actions."""
    gaussians, alpha = scalars(0.9, 0.2, -0.5, 0.6), 0.4
    u = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    log_f, log_p = (
        steer_poe.log_density(u[:, None], gaussians[i], gaussians[i + 1], "tanh of the sample") for i in (0, 2)
    )
    over_actions = action_moments((1 - alpha) * log_f + alpha * log_p, u)
    before = poe(*gaussians, alpha)
    pushed = action_moments(steer_poe.log_density(u[:, None], *before, "tanh of the sample"), u)
    assert over_actions == pytest.approx(pushed, abs=1e-9)
    beta = alpha / (1 - alpha)
    over_actions = action_moments(log_f + beta * log_p, u)
    pushed = action_moments(steer_poe.log_density(u[:, None], *kl_reg(*gaussians, beta), "tanh of the sample"), u)
    assert abs(over_actions[0] - pushed[0]) > 0.01


@pytest.mark.parametrize("alpha", [1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1 - 1e-9])
def test_identity_on_ten_thousand_pairs(alpha):
    """The paper's theorem, at β = α / (1 − α): equal means, variances in the ratio 1 + β, to 1e-12 relative.

    Relative to the larger of the two experts' means: a weighted mean of opposite signs may itself be anything near 0.
    """
    gaussians, beta = pairs(10_000), alpha / (1 - alpha)
    (mean_1, var_1), (mean_2, var_2) = poe(*gaussians, alpha), kl_reg(*gaussians, beta)
    scale = torch.maximum(gaussians[0].abs(), gaussians[2].abs())
    assert ((mean_1 - mean_2).abs() / scale).max() < 1e-12
    assert (var_1 / var_2 / (1 + beta) - 1).abs().max() < 1e-12
    found = steer_poe.identity_check(alpha, *gaussians)
    assert found["largest_relative_difference_of_means"] < 1e-12
    assert found["largest_relative_difference_of_ratio"] < 1e-12
    assert found["beta"] == beta


def test_identity_check_sees_a_difference(monkeypatch):
    """A check that cannot fail proves nothing: a wrong rule is caught."""
    monkeypatch.setattr(steer_poe, "kl_reg", lambda *gaussians: additive(*gaussians[:4], 0.5))
    assert steer_poe.identity_check(0.3, *pairs(10))["largest_relative_difference_of_means"] > 1e-3


def test_rules_at_their_limits():
    mean_f, var_f, mean_p, var_p = gaussians = pairs(1000)
    assert frozen(*gaussians) == (mean_f, var_f) and prior_only(*gaussians) == (mean_p, var_p)
    for rule in ("additive", "poe", "kl-reg"):
        mean, var = compose(rule, 0.0, *gaussians)  # α → 0 is Frozen
        torch.testing.assert_close(mean, mean_f, rtol=1e-12, atol=0)
        torch.testing.assert_close(var, var_f, rtol=1e-12, atol=0)
    mean, var = poe(*gaussians, 1 - 1e-15)  # α → 1 is Prior-only where variances are within a few decades
    near = (var_p / var_f).log10().abs() < 3
    torch.testing.assert_close(mean[near], mean_p[near], rtol=0, atol=1e-9)
    torch.testing.assert_close(var[near], var_p[near], rtol=1e-9, atol=0)
    # equal variances: PoE is Additive, its variance is the common one
    mean, var = poe(mean_f, var_f, mean_p, var_f, 0.3)
    torch.testing.assert_close(mean, additive(mean_f, var_f, mean_p, var_f, 0.3)[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(var, var_f, rtol=1e-12, atol=0)
    # additive mixes the means and keeps the variance
    mean, var = additive(*scalars(1.0, 0.5, 3.0, 9.0), 0.25)
    assert (mean.item(), var.item()) == (1.5, 0.5)


def test_very_unequal_variances():
    """The surer expert decides, at any α inside (0, 1)."""
    for alpha in (0.1, 0.9):
        mean, _ = poe(*scalars(1.0, 1e-6, -1.0, 1e6), alpha)
        assert mean.item() == pytest.approx(1.0, abs=1e-9)
        mean, _ = poe(*scalars(1.0, 1e6, -1.0, 1e-6), alpha)
        assert mean.item() == pytest.approx(-1.0, abs=1e-9)


def test_precision_lies_between_the_experts():
    gaussians = pairs(10_000, seed=1)
    low, high = torch.minimum(gaussians[1], gaussians[3]), torch.maximum(gaussians[1], gaussians[3])
    for alpha in (0.0, 0.2, 0.8):
        mean, var = poe(*gaussians, alpha)
        assert ((var >= low * (1 - 1e-12)) & (var <= high * (1 + 1e-12))).all()
        between = (mean - gaussians[0]) * (mean - gaussians[2])
        assert (between <= 1e-12).all()  # and so does the mean
        assert (kl_reg(*gaussians, 2.0)[1] <= low * (1 + 1e-12)).all()  # KL-Reg is surer than either, from β = 1


def test_a_random_prior_of_growing_variance_leaves_the_frozen_mean():
    """The offset falls as 1/σ_p²; Additive's does not fall."""
    mean_f, var_f, mean_p = scalars(0.3, 0.04, 2.0)
    offsets = [
        (poe(mean_f, var_f, mean_p, torch.tensor([v]).double(), 0.9)[0] - mean_f).item() for v in (1e2, 1e4, 1e6)
    ]
    assert offsets[0] / offsets[1] == pytest.approx(100, rel=0.01) and offsets[1] / offsets[2] == pytest.approx(
        100, rel=0.01
    )
    assert poe(mean_f, var_f, mean_p, torch.tensor([math.inf]).double(), 0.9)[0].item() == mean_f.item()
    assert (additive(mean_f, var_f, mean_p, torch.tensor([1e6]).double(), 0.9)[0] - mean_f).item() == pytest.approx(
        1.53
    )


@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_degenerate_variances_stay_finite(alpha):
    for gaussians in (scalars(1.0, 0.0, -1.0, 0.5), scalars(1.0, 0.5, -1.0, 0.0), scalars(1.0, 0.0, -1.0, 0.0)):
        for rule in ("poe", "kl-reg"):
            mean, var = compose(rule, alpha, *gaussians)
            assert mean.isfinite().all() and var.isfinite().all() and (var > 0).all() and mean.abs() <= 1


def test_alpha_and_beta_are_checked():
    gaussians = pairs(1)
    for rule in (poe, additive):
        for alpha in (1.0, -0.1, math.nan):
            with pytest.raises(UserError, match="must be in"):
                rule(*gaussians, alpha)
    for beta in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match="β"):
            kl_reg(*gaussians, beta)
    with pytest.raises(UserError, match="α = 1"):
        compose("kl-reg", 1.0, *gaussians)
    with pytest.raises(UserError, match="--kl-budget"):
        steer_poe.select_alpha("poe", -1.0, *gaussians)


def test_iql_guided_solves_its_linearised_problem():
    """With A linear, β E_π A − KL(π ‖ π_f) has its maximum at μ_f + β σ_f² ∇A: any other mean is worse."""
    mean_f, var_f = scalars(0.4, 0.09)
    gradient, beta = torch.tensor([1.7]).double(), 0.8
    best, var = steer_poe.iql_guided(mean_f, var_f, gradient, beta)
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None]
    objective = beta * gradient * grid[:, 0] - gaussian_kl(grid, var_f, mean_f, var_f)
    assert grid[objective.argmax()].item() == pytest.approx(best.item(), abs=1e-3) and var is var_f
    with pytest.raises(UserError):
        steer_poe.iql_guided(mean_f, var_f, gradient, -1.0)


def test_critic_greedy_climbs_without_an_anchor():
    """On Q = −|u − top|² it goes straight to the top, a step's length at a time, whatever the frozen variance."""
    top = torch.tensor([[1.0, 1.0]]).double()
    start = torch.zeros(1, 2, dtype=torch.float64)
    u, _ = steer_poe.critic_greedy(start, 1e-9 * torch.ones_like(start), lambda u: 2 * (top - u), steps=5, size=0.1)
    torch.testing.assert_close(u, 0.5 / math.sqrt(2) * torch.ones_like(u))
    u, _ = steer_poe.critic_greedy(start, torch.ones_like(start), lambda u: 2 * (top - u), steps=100, size=0.1)
    assert (u - top).norm() <= 0.1


def test_degrade():
    mean, var, noise = torch.ones(1, 2).double(), 0.01 * torch.ones(1, 2).double(), torch.tensor([[2.0, -1.0]]).double()
    expected = {
        "clean": (1.0, 1.0, 0.01), "wrong-goal": (1.0, 1.0, 0.01), "noisy": (2.0, 0.5, 0.26),
        "random": (2.0, -1.0, 1.0), "overconfident": (2.0, -1.0, 0.01),
    }  # fmt: skip
    for kind, (first, second, spread) in expected.items():
        got_mean, got_var = steer_poe.degrade(kind, mean, var, noise)
        assert got_mean.tolist() == [[first, second]] and got_var[0].tolist() == pytest.approx([spread, spread])


# --- Selector and diagnostics ---


@pytest.mark.parametrize("rule", ["poe", "kl-reg", "additive"])
@pytest.mark.parametrize("budget", [0.0, 1e-4, 0.1, 0.5, 3.0])
def test_selector_stays_within_the_budget_and_is_maximal(rule, budget):
    g = torch.Generator().manual_seed(3)
    mean_f, mean_p = torch.randn(2, 200, 2, generator=g, dtype=torch.float64)
    var_f, var_p = 0.05 + torch.rand(2, 200, 2, generator=g, dtype=torch.float64)
    gaussians = mean_f, var_f, mean_p, var_p
    alpha = steer_poe.select_alpha(rule, budget, *gaussians)
    assert 0 <= alpha <= steer_poe.MAX_ALPHA
    assert steer_poe.mean_kl(rule, alpha, *gaussians) <= budget + 1e-15  # rounding, at α = 0
    if alpha < steer_poe.MAX_ALPHA:
        assert steer_poe.mean_kl(rule, alpha + 1e-6, *gaussians) > budget
    kls = [steer_poe.mean_kl(rule, a, *gaussians) for a in np.linspace(0, 0.99, 60)]
    assert (np.diff(kls) > 0).all()  # what the bisection rests on


def test_selector_takes_all_of_a_prior_that_is_near():
    mean, var = torch.zeros(5, 1).double(), torch.ones(5, 1).double()
    assert steer_poe.select_alpha("poe", 0.1, mean, var, mean + 0.01, var) == steer_poe.MAX_ALPHA


def test_slope_of_the_kl():
    """dKL(π_α ‖ π_f)/dα = α Var_{π_α}[log π_p − log π_f], so it never falls: finite difference against quadrature."""
    gaussians, alpha = scalars(0.4, 0.09, -0.3, 0.5), 0.6
    step = 1e-5
    kl = [gaussian_kl(*poe(*gaussians, a), *gaussians[:2]).item() for a in (alpha - step, alpha + step)]
    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    log_f, log_p = (steer_poe.gaussian_log_prob(grid[:, None], gaussians[i], gaussians[i + 1]) for i in (0, 2))
    weights = torch.softmax((1 - alpha) * log_f + alpha * log_p, 0)
    ratio = log_p - log_f
    variance = (weights * ratio**2).sum() - (weights * ratio).sum() ** 2
    assert (kl[1] - kl[0]) / (2 * step) == pytest.approx(alpha * variance.item(), rel=1e-5)


def test_kl_against_sampling():
    mean, var, mean_f, var_f = (torch.tensor([x]) for x in ([0.2, 1.0], [0.3, 0.1], [0.0, 0.7], [0.5, 0.2]))
    u = mean + var.sqrt() * torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    sampled = steer_poe.gaussian_log_prob(u, mean, var) - steer_poe.gaussian_log_prob(u, mean_f, var_f)
    assert gaussian_kl(mean, var, mean_f, var_f).item() == pytest.approx(sampled.mean().item(), abs=0.01)


def test_total_variation_against_its_closed_form():
    """Equal variances in one dimension: 2 Φ(d / 2σ) − 1. And Pinsker's inequality anywhere."""
    noise = torch.randn(200_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for distance in (0.0, 0.5, 2.0, 50.0):
        mean_f, var = torch.zeros(1, 1).double(), 0.49 * torch.ones(1, 1).double()
        got = steer_poe.total_variation(mean_f + distance, var, mean_f, var, noise).item()
        assert got == pytest.approx(math.erf(distance / (2 * 0.7) / math.sqrt(2)), abs=0.005)
    mean_f, var_f, mean, var = (x[:20, :1] for x in pairs(20))
    tv = steer_poe.total_variation(mean, var, mean_f, var_f, noise)
    assert (tv <= (gaussian_kl(mean, var, mean_f, var_f) / 2).sqrt().clamp(max=1) + 0.005).all() and (tv >= 0).all()


def test_value_bound_holds_in_random_markov_decision_processes():
    """|V^π − V^{π_f}| ≤ δ R / (1−γ)², values exactly solved, rewards of any sign."""
    rng, gamma, largest = np.random.default_rng(0), 0.9, 0.0
    for _ in range(300):
        states, actions = 4, 3
        dynamics = rng.dirichlet(np.full(states, 0.3), (states, actions))
        reward = rng.uniform(-1, 2, (states, actions))
        policies = rng.dirichlet(np.full(actions, 0.3), (2, states))
        values = [
            np.linalg.solve(np.eye(states) - gamma * np.einsum("sa,sat->st", p, dynamics), (p * reward).sum(1))
            for p in policies
        ]
        delta = 0.5 * np.abs(policies[0] - policies[1]).sum(1).max()
        bound = steer_poe.value_bound(delta, reward.max() - reward.min(), gamma)
        largest = max(largest, np.abs(values[0] - values[1]).max() / bound)
    assert largest <= 1


@pytest.mark.parametrize("squash", steer_poe.SQUASHES)
def test_log_density_is_a_density_over_actions(squash):
    mean, var = scalars(0.3, 0.2)
    a = (
        torch.linspace(-1, 1, 400_001, dtype=torch.float64)[1:-1]
        if "sample" in squash
        else torch.linspace(-6, 6, 100_001).double()
    )
    u = a.atanh() if "sample" in squash else a
    density = steer_poe.log_density(u[:, None], mean, var, squash).exp()
    assert torch.trapezoid(density, a).item() == pytest.approx(1, abs=1e-4)


def test_classification_of_cells_with_known_answers():
    rng = np.random.default_rng(0)

    def label(difference):
        return steer_poe.classify(*steer_poe.paired_bootstrap(difference)[1:])

    noise = rng.standard_normal(25)
    noise -= noise.mean()
    assert label(noise + 1) == "HELP" and label(noise - 1) == "HURT" and label(noise) == "FROZEN"
    assert label(np.zeros(25)) == "FROZEN" and label(np.full(25, 1e-9)) == "HELP"
    assert steer_poe.paired_bootstrap(noise) == steer_poe.paired_bootstrap(noise)  # no state
    # under no difference, one in twenty cells is wrong, or a little more: 25 episodes are few for a percentile interval
    wrong = np.mean([label(rng.standard_normal(25)) != "FROZEN" for _ in range(200)])
    assert 0.02 < wrong < 0.12


def test_bootstrap_of_many_episodes_is_the_normal_interval():
    difference = np.random.default_rng(0).exponential(size=501)
    mean, low, high = steer_poe.paired_bootstrap(difference)
    draws = np.random.default_rng(1).integers(501, size=(4000, 501))
    expected = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    assert (low, high) == pytest.approx(expected, abs=0.02) and mean == difference.mean()


def test_selector_report():
    row = dict(prior="clean", shift="none", goal="speed", objective_class="HELP")
    summary = [row | dict(rule=r, alpha=a, objective=o, **{"return": 10.0 + o}) for r, a, o in (
        ("frozen", 0.0, 10.0), ("prior-only", 1.0, 99.0), ("poe", 0.3, 14.0), ("poe", 0.6, 12.0),
        ("additive", 0.5, 50.0),
    )]  # fmt: skip
    (report,) = steer_poe.compare_selector(summary, "poe", {("clean", "speed"): 0.6})
    assert (report["alpha"], report["oracle_alpha"], report["regret"]) == (0.6, 0.3, 2.0)
    assert report["regret_percent_of_frozen"] == 20 and report["return_percent_of_frozen"] == 110
    worse = [r | {"objective": -r["objective"]} for r in summary]  # then Frozen itself is the oracle
    (report,) = steer_poe.compare_selector(worse, "poe", {("clean", "speed"): 0.6})
    assert (report["oracle_alpha"], report["regret"]) == (0.0, 2.0)


# --- Goals and learning ---


def test_discounted_sums():
    x = np.arange(14, dtype=np.float64).reshape(7, 2)
    ends = np.array([2, 3, 6])
    expected = np.zeros_like(x)
    for t in range(7):
        end = ends[ends >= t][0]
        expected[t] = sum(0.9 ** (k - t) * x[k] for k in range(t, end + 1))
    np.testing.assert_allclose(steer_poe.discounted_sums(x, ends, 0.9), expected)


def test_features_of_liquidation():
    obs = np.array([[5.0, 40.0, 2.0], [5.0, 40.0, 1.0], [5.0, 40.0, 2.0], [0.0, 100.0, 1.0]])
    got = steer_poe.features("liquidation", obs, np.array([[0.5], [0.5], [-0.5], [7.0]]))
    np.testing.assert_allclose(got, [[40, 15, 10], [20, 15, 0], [0, 0, 0], [100, 100, 0]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("domain, env_id", steer_poe.EVAL_ENVS.items())
def test_features_of_locomotion(domain, env_id):
    """Velocity is the simulator's forward velocity of the root, the tilt its pitch."""
    env = gym.make(env_id)
    env.reset(seed=0)
    for _ in range(5):
        action = env.action_space.sample()
        obs, *_ = env.step(action)
    got = steer_poe.features(domain, obs[None], action[None])[0]
    data = env.unwrapped.data
    assert got == pytest.approx([data.qvel[0], np.mean(action**2), math.cos(data.qpos[2])], abs=1e-6)


def test_features_of_antmaze():
    """29 observations of D4RL, 31 of Minari: the same ant. A quarter turn about x lays it on its side."""
    ant = np.zeros(27)
    ant[1:5], ant[13:15] = (math.sqrt(0.5), math.sqrt(0.5), 0, 0), (3.0, 4.0)
    for before in (2, 4):
        got = steer_poe.features("antmaze", np.concatenate([np.ones(before), ant])[None], np.full((1, 8), 2.0))[0]
        np.testing.assert_allclose(got, [5, 1, 0], atol=1e-12)


def test_regression_weights():
    advantage = torch.tensor([[0.0, -5.0], [0.3, 0.0], [9.0, 0.0]])
    weights = steer_poe.regression_weights(advantage, 0.3, 20.0)
    torch.testing.assert_close(weights.mean(0), torch.ones(2))
    assert weights[1, 0] / weights[0, 0] == pytest.approx(math.e) and weights[2, 0] / weights[0, 0] == pytest.approx(20)


def toy_data(count=4000, seed=0):
    """One-step episodes: reward of the task −(a − 0.5)², of a goal +a and of another −a; the behaviour is uniform."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(count, 2, generator=g)
    action = 1.8 * torch.rand(count, 1, generator=g) - 0.9
    rewards = torch.cat([-((action - 0.5) ** 2), action, -action], 1)
    mean, std = torch.zeros(2), torch.ones(2)
    return steer_poe.Data(obs, obs, action, rewards, torch.ones(count, dtype=torch.bool), np.arange(count), mean, std)


@pytest.mark.parametrize("squash", steer_poe.SQUASHES)
def test_learning_on_a_problem_with_known_answers(squash):
    """Q − V is the advantage, and the prior of each goal moves its way; the clone does not."""
    args, data = steer_poe.Args(hidden=32, updates=400, gamma=1.0, batch_size=256), toy_data()
    torch.manual_seed(0)
    bar = functools.partial(steer_poe.tqdm, disable=True)
    critic, advantage = steer_poe.train_critic(args, data, bar)
    exact = data.rewards - data.rewards.mean(0)  # the value of uniform behaviour in a one-step problem
    for column in range(3):
        assert np.corrcoef(advantage[:, column], exact[:, column])[0, 1] > 0.98
    np.testing.assert_allclose(critic.advantage_std, exact.std(0), rtol=0.1)
    goals = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    weights = steer_poe.regression_weights(advantage[:, 1:], 0.3, 20.0)
    prior = steer_poe.weighted_regression(args, data, weights, squash, goals, bar, "prior")
    folded = [steer_poe.fold_goal(prior, goal) for goal in goals]
    for goal, alone in zip(goals, folded, strict=True):  # folding the goal in changes nothing
        together = prior(torch.cat([data.obs[:50], goal.expand(50, 3)], -1))
        for one, other in zip(together, alone(data.obs[:50]), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    clone = steer_poe.weighted_regression(args, data, torch.ones(len(weights), 1), squash, None, bar, "clone")
    up, down, middle = (net(data.obs)[0].mean().item() for net in (*folded, clone))
    assert up > middle + 0.3 and down < middle - 0.3 and abs(middle) < 0.1


def test_lambda_returns_go_on_after_a_time_limit():
    """Reward 1 for ever, cut off every 5 steps: the advantage is 0 everywhere, not less near the cut."""
    count = 2000
    obs = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    data = steer_poe.Data(
        obs, obs, torch.zeros(count, 1), torch.ones(count, 1), torch.zeros(count, dtype=torch.bool),
        np.arange(4, count, 5), torch.zeros(2), torch.ones(2),
    )  # fmt: skip
    args = steer_poe.Args(hidden=8, updates=300, gamma=0.5, gae_lambda=0.0)
    torch.manual_seed(0)
    critic, _ = steer_poe.train_critic(args, data, functools.partial(steer_poe.tqdm, disable=True))
    v, q = critic.value(obs).mean().item(), critic(obs, data.action).mean().item()
    assert v == pytest.approx(np.mean([2 - 0.5**k for k in range(5)]), abs=0.05)  # observed returns
    assert q == pytest.approx(1 + 0.5 * v, abs=0.05)  # one step further, through the cut


# --- Actor files ---


def random_file(script, obs_dim=3, act_dim=2, domain="hopper", seed=0):
    """actor.pt of pspo.py or iql.py with random weights, and that script's actor."""
    torch.manual_seed(seed)
    data = script.make_dataset(columns(episodes(5, 4, obs_dim=obs_dim, act_dim=act_dim), ("terminal",) * 2), "n", "s")
    actor = script.Actor(obs_dim, act_dim, 8)
    if script is iql:
        actor.log_std.data.uniform_(-7, 1)
        actor.net.mean.uniform_(-1, 1)  # as --normalize-observations leaves it
        actor.net.std.uniform_(0.5, 2)
    else:
        actor.obs_mean.uniform_(-1, 1)
    return script.actor_file(actor, script.Args(env_id=f"{domain}-medium-v2"), domain, data), actor


@pytest.mark.parametrize("script", [pspo, iql])
def test_actors_of_both_scripts_are_read(script):
    content, theirs = random_file(script)
    mine, obs = steer_poe.Actor.from_file(content, "actor.pt"), torch.randn(10, 3)
    for one, other in zip(mine(obs), theirs(obs), strict=True):
        torch.testing.assert_close(one, other.expand_as(one))
    again = steer_poe.Actor.from_file(mine.to_file(), "actor.pt")
    assert again.sha256() == mine.sha256()
    steering = steer_poe.Steering(mine, goal_prior(mine.squash), torch.eye(3), None)
    act = functools.partial(steering.act, obs.numpy(), np.zeros((2, 10, 2)))
    np.testing.assert_allclose(act(alpha=0.0), theirs.act(obs.numpy()), atol=1e-6)  # α = 0 acts as its own script does
    assert np.abs(act(alpha=0.7) - theirs.act(obs.numpy())).max() > 1e-3
    assert again.sha256() == mine.sha256() and not any(p.requires_grad for p in mine.parameters())
    content["layers"][1]["bias"] += 1e-3
    assert steer_poe.Actor.from_file(content, "actor.pt").sha256() != mine.sha256()  # the hash sees every number


def goal_prior(squash, obs_dim=3, act_dim=2, seed=1):
    torch.manual_seed(seed)
    return steer_poe.Actor([obs_dim + 3, 8, 8, 2 * act_dim], squash).requires_grad_(False)


def test_an_unsquashed_actor_is_clipped_after_the_composition():
    content, _ = random_file(iql)
    steering = steer_poe.Steering(
        steer_poe.Actor.from_file(content, "f"), goal_prior("tanh of the mean"), torch.eye(3), None
    )
    obs, noise = np.zeros((1, 3), np.float32), np.full((2, 1, 2), 50.0)
    assert np.abs(steering.act(obs, noise, stochastic=True)).tolist() == [[1, 1]]
    mean, var, _, _ = steering.gaussians(torch.zeros(1, 3), 0, "clean", torch.zeros(1, 2))
    assert mean.abs().max() < 1 and var.dtype == torch.float64
    assert steering.actor(torch.zeros(1, 3))[1].tolist()[0] == content["log_std"].clamp(-5, 2).tolist()


def test_wrong_goal_is_another_goals_prior():
    content, _ = random_file(pspo)
    steering = steer_poe.Steering(
        steer_poe.Actor.from_file(content, "f"), goal_prior("tanh of the sample"), torch.eye(3), None
    )
    obs, noise = torch.randn(5, 3), torch.zeros(5, 2)
    for goal, other in enumerate(steer_poe.WRONG_GOAL[:3]):
        assert goal != other
        wrong, right = (
            steering.gaussians(obs, goal, "wrong-goal", noise),
            steering.gaussians(obs, other, "clean", noise),
        )
        assert all(torch.equal(a, b) for a, b in zip(wrong, right, strict=True))


def policy_file(path, nonlinearity=b"relu", distribution=b"tanh_gaussian", leave_out=()):
    """A data file with D4RL's embedded policy, weights (out, in); returns its arrays too."""
    rng = np.random.default_rng(0)
    arrays = columns(episodes(6, 5, 4, obs_dim=11, act_dim=3), ("terminal", "timeout", "terminal"))
    write(path, arrays)
    sizes = dict(fc0=(7, 11), fc1=(5, 7), last_fc=(3, 5), last_fc_log_std=(3, 5))
    policy = {}
    with h5py.File(path, "a") as file:
        for layer, size in sizes.items():
            policy[layer] = rng.standard_normal(size), rng.standard_normal(size[0])
            if layer not in leave_out:
                for key, value in zip(("weight", "bias"), policy[layer], strict=True):
                    file[f"metadata/policy/{layer}/{key}"] = value.astype(np.float32)
        file["metadata/policy/nonlinearity"] = np.bytes_(nonlinearity)
        file["metadata/policy/output_distribution"] = np.bytes_(distribution)
    return policy


@pytest.mark.parametrize("nonlinearity", [b"relu", b"tanh"])
def test_policy_that_a_file_embeds(tmp_path, nonlinearity):
    policy = policy_file(tmp_path / "a.hdf5", nonlinearity)
    actor = steer_poe.embedded_policy(tmp_path / "a.hdf5")
    obs = np.random.default_rng(1).standard_normal((9, 11))
    h, bend = obs, np.tanh if nonlinearity == b"tanh" else lambda x: np.maximum(x, 0)
    for layer in ("fc0", "fc1"):
        h = bend(h @ policy[layer][0].T + policy[layer][1])
    mean, log_std = (h @ policy[layer][0].T + policy[layer][1] for layer in ("last_fc", "last_fc_log_std"))
    got = actor(torch.as_tensor(obs, dtype=torch.float32))
    np.testing.assert_allclose(got[0], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], log_std.clip(-20, 2), rtol=1e-4, atol=1e-4)
    assert actor.squash == "tanh of the sample"


# --- As a user runs it ---

TINY = (
    "--no-cuda --dataset-episodes 200 --updates 60 --hidden 16 --batch-size 64 --episodes 12".split()
)  # a run of some seconds


def in_process(args, monkeypatch, cwd):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["steer_poe.py", *map(str, args)])
    steer_poe.main()


def only_run(folder):
    (found,) = (Path(folder) / "runs").iterdir()
    return found


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(run folder, what it printed) of the default command, small, as a user types it."""
    cwd = tmp_path_factory.mktemp("reference")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "steer_poe.py", *TINY]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(cwd), done.stdout


@pytest.fixture
def no_figure(monkeypatch):
    for name in ("plot_curves", "plot_grid"):
        monkeypatch.setattr(steer_poe, name, lambda *_, **__: None)


def test_run_folder_and_result(reference):
    run_dir, out = reference
    expected = {"args.json", "checkpoint.pt", "steered_actor.pt", "episodes.csv", "cells.csv", "selector.csv"}
    expected |= {"steer_poe.py", "diagnostics.csv", "result.json", "curves.png", "curves_return.png", "grid.png"}
    assert {path.name for path in run_dir.iterdir()} == expected
    result = json.loads((run_dir / "result.json").read_text())
    assert result["domain"] == "liquidation" and result["goal"] == "upside" and result["actor"] == "awr"
    assert result["selector"][0]["kl"] <= result["args"]["kl_budget"] and 0 < result["alpha"] < 1
    # the identity, on a trained actor and prior
    assert result["identity"]["largest_relative_difference_of_means"] < 1e-12
    assert result["identity"]["largest_relative_difference_of_ratio"] < 1e-12
    for words in ("sha256", "selector", "identity", "unchanged", str(run_dir.relative_to(run_dir.parents[1]))):
        assert words in out


def test_tables_agree_with_each_other(reference):
    """cells.csv is what episodes.csv says; Frozen's difference to itself is 0; objectives are weighted features."""
    run_dir, _ = reference
    rows, cells = table(run_dir / "episodes.csv"), table(run_dir / "cells.csv")
    assert len(rows) == 12 * len(cells)
    by = {}
    for row in rows:
        by.setdefault((row["rule"], row["alpha"]), []).append(row)
        assert float(row["objective"]) == pytest.approx(float(row["premium"]))  # the goal upside
        assert float(row["return"]) == pytest.approx(float(row["revenue"]), abs=1e-3)
    for cell in cells:
        values = np.array([float(row["objective"]) for row in by[cell["rule"], cell["alpha"]]])
        base = np.array([float(row["objective"]) for row in by["frozen", "0.0"]])
        assert float(cell["objective"]) == pytest.approx(values.mean())
        mean, low, high = steer_poe.paired_bootstrap(values - base)
        assert [float(cell[f"objective_{key}"]) for key in ("difference", "low", "high")] == pytest.approx(
            [mean, low, high]
        )
        assert cell["objective_class"] == steer_poe.classify(low, high)
    diagnostics = {(row["rule"], row["alpha"]): row for row in table(run_dir / "diagnostics.csv")}
    assert set(diagnostics) == set(by)
    at = diagnostics["frozen", "0.0"]
    assert float(at["kl"]) == 0 and float(at["tv_max"]) == 0 and float(at["violation_mean_0.001"]) < 0.01
    kls = [float(diagnostics["poe", a]["kl"]) for a in ("0.1", "0.3", "0.5", "0.7", "0.9")]
    assert kls == sorted(kls) and kls[0] > 0


def test_same_command_same_numbers(reference, tmp_path, monkeypatch, no_figure):
    in_process(TINY, monkeypatch, tmp_path)
    for name in ("episodes.csv", "cells.csv", "diagnostics.csv"):
        assert (only_run(tmp_path) / name).read_bytes() == (reference[0] / name).read_bytes()


def docs_code():
    """The lines of docs/steer_poe.md that play a steered actor."""
    text = (ROOT / "docs" / "steer_poe.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "steered_actor.pt" in code)


def test_the_deployed_actor_acts_without_the_script(reference, tmp_path, monkeypatch, no_figure):
    """The documented lines, without steer_poe.py: the same actions as the script's, for both kinds of frozen actor."""
    content, _ = random_file(iql, obs_dim=3, act_dim=1, domain="liquidation")
    torch.save(content, tmp_path / "iql.pt")
    in_process([*TINY, "--actor", tmp_path / "iql.pt", "--goal", "certainty", "--alpha", "0.4"], monkeypatch, tmp_path)
    obs = np.stack([np.linspace(0, 19, 20), np.linspace(100, 1, 20), np.linspace(0.5, 2.5, 20)], 1).astype(np.float32)
    for run_dir in (reference[0], only_run(tmp_path)):
        monkeypatch.chdir(run_dir)
        namespace = {}
        exec(docs_code(), namespace)
        resumed = steer_poe.load_tensors("checkpoint.pt", "steer_poe checkpoint")
        result = json.loads(Path("result.json").read_text())
        goals = np.array(list(result["goals"].values()))
        actor, prior = (steer_poe.Actor.from_file(resumed[key], "f") for key in ("actor", "prior"))
        data = steer_poe.make_dataset(liquidation_rows(), "liquidation", "generated")
        told = goals * steer_poe.features("liquidation", data.observations, data.actions).std(0)
        told = torch.as_tensor(told / np.linalg.norm(told, axis=1, keepdims=True), dtype=torch.float32)
        steering = steer_poe.Steering(actor, prior, told, None)
        goal = list(result["goals"]).index(result["goal"])
        expected = steering.act(obs, np.zeros((2, 20, 1)), goal=goal, alpha=result["alpha"])
        np.testing.assert_allclose(namespace["act"](obs), expected, atol=2e-5)
    saved = steer_poe.load_tensors("steered_actor.pt", "steered actor")
    assert all(
        torch.equal(a["weight"], b["weight"]) for a, b in zip(saved["frozen"]["layers"], content["layers"], strict=True)
    )
    assert result["frozen_sha256"] == steer_poe.Actor.from_file(content, "f").sha256()  # nothing changed on the way
    assert saved["alpha"] == 0.4 and saved["goal_weights"] == [0, 1, 0]


def liquidation_rows():
    import liquidation_env

    return liquidation_env.behaviour_dataset(200, 1)


STUDY = [*TINY[:-1], "4", "--study", "--references", "--priors", "clean", "random", "--shifts", "volatility"]


def test_study_stopped_and_resumed_is_the_same(tmp_path, monkeypatch, no_figure):
    """Stopped in the middle of a row and twice: the final tables are those of an uninterrupted study, to the byte."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    in_process(STUDY, monkeypatch, tmp_path / "a")
    played, original = [], steer_poe.evaluate_liquidation

    def stop_at(number):
        def evaluate(*args):
            if len(played) == number:
                raise KeyboardInterrupt
            played.append(1)
            return original(*args)

        return evaluate

    monkeypatch.setattr(steer_poe, "evaluate_liquidation", stop_at(5))
    with pytest.raises(SystemExit) as stopped:
        in_process(STUDY, monkeypatch, tmp_path / "b")
    assert stopped.value.code == 130
    run_dir = only_run(tmp_path / "b")
    with open(run_dir / "episodes.csv", "a") as file:  # the process died while it wrote
        file.write("clean,volatility,certainty,poe,0.7,0,1.2")
    monkeypatch.setattr(steer_poe, "evaluate_liquidation", stop_at(9))
    with pytest.raises(SystemExit):
        in_process(["--resume", run_dir], monkeypatch, tmp_path / "b")
    monkeypatch.setattr(steer_poe, "evaluate_liquidation", stop_at(-1))
    in_process(["--resume", run_dir], monkeypatch, tmp_path / "b")
    whole = only_run(tmp_path / "a")
    for name in ("episodes.csv", "cells.csv", "selector.csv", "diagnostics.csv"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    cells = table(whole / "cells.csv")
    assert len(played) == len(cells)  # nothing was played twice
    paper = [row for row in cells if (row["prior"], row["shift"], row["goal"]) == ("clean", "volatility", "upside")]
    rules = [row["rule"] for row in paper]
    assert rules[:13] == ["frozen", "prior-only", "additive", *["poe"] * 5, *["kl-reg"] * 5]  # the paper's 13
    assert {"critic-greedy", "iql-guided"} <= set(rules) and rules.count("additive") == 5
    assert {row["goal"] for row in cells} == {"certainty", "balanced", "upside"}
    # Frozen does not see the prior, and the deterministic PoE and KL-Reg are one policy
    of = {(r["prior"], r["shift"], r["goal"], r["rule"], r["alpha"]): float(r["objective"]) for r in cells}
    for (prior, shift, goal, rule, alpha), value in of.items():
        if rule == "frozen":
            assert value == of["clean", shift, goal, rule, alpha]
        if rule == "kl-reg":
            assert value == pytest.approx(of[prior, shift, goal, "poe", alpha], rel=1e-5)


def test_a_finished_run_can_be_resumed(reference, tmp_path, monkeypatch, no_figure):
    before = (reference[0] / "episodes.csv").read_bytes()
    monkeypatch.setattr(steer_poe, "evaluate_liquidation", None)  # nothing is left to play
    in_process(["--resume", reference[0]], monkeypatch, tmp_path)
    assert (reference[0] / "episodes.csv").read_bytes() == before


def test_a_playing_run_needs_no_actor_file(tmp_path, monkeypatch, no_figure):
    """The checkpoint holds the frozen actor: once episodes are played, the file of --actor may be gone."""
    torch.save(random_file(pspo, 3, 1, "liquidation")[0], tmp_path / "mine.pt")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(steer_poe, "evaluate_liquidation", stop)
        in_process([*TINY, "--actor", "mine.pt"], patch, tmp_path)
    (tmp_path / "mine.pt").unlink()
    in_process(["--resume", only_run(tmp_path)], monkeypatch, tmp_path)
    assert json.loads((only_run(tmp_path) / "result.json").read_text())["actor"] == "mine.pt"


def test_stochastic_and_own_goal(tmp_path, monkeypatch, no_figure):
    """Sampled actions: PoE and KL-Reg differ, for KL-Reg is narrower. A goal of the user's own is a weighted sum."""
    args = [*TINY, "--stochastic", "--goal-weights", "1", "0", "-0.5", "--rule", "kl-reg", "--kl-budget", "0.05"]
    in_process([*args, "--updates", "5", "--priors", "clean", "wrong-goal"], monkeypatch, tmp_path)
    rows = table(only_run(tmp_path) / "episodes.csv")
    assert {row["prior"] for row in rows} == {"clean", "wrong-goal"}
    assert {row["goal"] for row in rows} == {"own"} and {row["rule"] for row in rows} >= {"kl-reg", "additive"}
    for row in rows:
        assert float(row["objective"]) == pytest.approx(float(row["revenue"]) - 0.5 * float(row["premium"]))
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["goals"]["own"] == [1, 0, -0.5] and result["rule"] == "kl-reg" and result["selector"][0]["kl"] <= 0.05


class Corridor(gym.Env):
    """A stand-in with hopper's sizes: the start is random, actions move the state a little, 6 steps."""

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (11,))
        self.action_space = gym.spaces.Box(-1, 1, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.standard_normal(11)
        return self.state.astype(np.float32), {}

    def step(self, action):
        assert np.abs(action).max() <= 1
        self.state = self.state + 0.1 * action.sum()
        return self.state.astype(np.float32), float(self.state[0]), False, False, {}


def test_episodes_are_paired():
    """The same start and the same noise for every policy and every number of lanes; more episodes than lanes."""
    seen = []

    def make_env():
        return gym.wrappers.TimeLimit(Corridor(), 6)

    def act(seen_obs, noise):
        seen.append((seen_obs, noise))
        return np.zeros((len(seen_obs), 3), np.float32)

    featurise = functools.partial(steer_poe.features, "hopper")
    quiet = steer_poe.evaluate(act, make_env, featurise, 30, 7, 0.0, 0.0)
    noisy = steer_poe.evaluate(act, make_env, featurise, 30, 7, 0.5, 0.3)
    few = steer_poe.evaluate(act, make_env, featurise, 4, 7, 0.5, 0.3)
    np.testing.assert_allclose(few["return"], noisy["return"][:4])
    assert (quiet["length"] == 6).all() and not np.allclose(quiet["return"], noisy["return"])
    np.testing.assert_allclose(quiet["features"][:, 1], 0)  # no effort: features are of what was done
    assert (noisy["features"][:, 1] > 0).all()
    first, with_noise = seen[0][0][0], next(s for s, _ in reversed(seen) if len(s) == 4)
    expected = Corridor()
    expected.reset(seed=7)
    np.testing.assert_allclose(first, expected.state.astype(np.float32))
    assert not np.allclose(with_noise[0], first)


@pytest.mark.filterwarnings("ignore")
def test_deployment_shifts_change_the_simulator():
    data = steer_poe.make_dataset(columns(episodes(5, 4, obs_dim=11, act_dim=3), ("terminal",) * 2), "n", "s")
    make = functools.partial(steer_poe.make_eval_env, steer_poe.Args(env_id="hopper-medium-v2"), "hopper", data)
    models = {shift: make(shift=shift).unwrapped.model for shift in ("none", "friction", "mass", "action-noise")}
    base = models["none"]
    np.testing.assert_allclose(models["friction"].geom_friction, 0.6 * base.geom_friction)
    np.testing.assert_allclose(models["mass"].body_mass, 1.25 * base.body_mass)
    np.testing.assert_allclose(models["mass"].body_inertia, 1.25 * base.body_inertia)
    np.testing.assert_allclose(models["friction"].body_mass, base.body_mass)
    np.testing.assert_allclose(models["action-noise"].geom_friction, base.geom_friction)
    assert (models["mass"].dof_invweight0 < base.dof_invweight0).all()  # what follows from the masses


def test_noise_shifts_of_liquidation(tmp_path, monkeypatch, no_figure):
    shifts = ("none", "action-noise", "observation-noise", "volatility", "reversion")
    in_process([*TINY, "--shifts", *shifts], monkeypatch, tmp_path)
    frozen_returns = {r["shift"]: r["return"] for r in table(only_run(tmp_path) / "cells.csv") if r["rule"] == "frozen"}
    assert list(frozen_returns) == list(shifts) and len(set(frozen_returns.values())) == 5


@pytest.mark.filterwarnings("ignore")
def test_hopper_with_the_policy_of_its_file(tmp_path, monkeypatch):
    """A D4RL file with an embedded policy, the real simulator, figures and a video."""
    policy_file(tmp_path / "hopper.hdf5")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    args = [
        *TINY,
        "--env-id",
        "hopper-medium-v2",
        "--dataset-path",
        "hopper.hdf5",
        "--actor",
        "dataset",
        "--episodes",
        "3",
    ]
    in_process([*args, "--goal", "energy", "--shifts", "mass"], monkeypatch, tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert (
        result["actor"] == "dataset"
        and result["frozen_sha256"] == steer_poe.embedded_policy(tmp_path / "hopper.hdf5").sha256()
    )
    row = table(only_run(tmp_path) / "episodes.csv")[0]
    expected = 0.25 * float(row["velocity"]) - float(row["effort"]) + float(row["upright"])
    assert float(row["objective"]) == pytest.approx(expected) and float(row["length"]) >= 1


@robotics
@pytest.mark.filterwarnings("ignore")
def test_antmaze_diagnostic(tmp_path, monkeypatch, no_figure):
    """Data in D4RL's AntMaze layout, every rule, a behaviour clone: the same command. Episodes are cut short here."""
    arrays = columns(episodes(8, 7, obs_dim=29, act_dim=8), ("terminal", "timeout"))
    del arrays["next_observations"]  # as in D4RL's files
    write(tmp_path / "maze.hdf5", arrays)
    make = steer_poe.make_eval_env
    monkeypatch.setattr(steer_poe, "make_eval_env", lambda *a, **k: gym.wrappers.TimeLimit(make(*a, **k), 3))
    args = [*TINY[:-1], "2", "--env-id", "antmaze-umaze-v2", "--dataset-path", "maze.hdf5", "--study", "--references"]
    in_process([*args, "--shifts", "friction"], monkeypatch, tmp_path)
    cells = table(only_run(tmp_path) / "cells.csv")
    assert {row["goal"] for row in cells} == {"speed", "balanced", "energy"} and len(cells) >= 3 * 19
    assert all(float(row["return"]) == 0 and row["return_class"] == "FROZEN" for row in cells)


# --- Bad input ---


def error_of(args, monkeypatch, capsys, cwd):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["steer_poe.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        steer_poe.main()
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and text.startswith("error: "), text
    return text


@pytest.mark.parametrize(
    "args, message",
    [
        ("--env-id hoper-medium-v2", "did you mean hopper-medium-v2"),
        ("--env-id hopper-medium-v2 --dataset-path absent.hdf5", "absent.hdf5 does not exist"),
        ("--alpha 1", "--alpha 1.0: must be in [0, 1)"),
        ("--alpha -0.1", "--alpha -0.1: must be in [0, 1)"),
        ("--alpha nan", "--alpha nan: must be in [0, 1)"),
        ("--kl-budget -1", "--kl-budget -1.0: must be 0 or more"),
        ("--goal speed", "liquidation has no such goal: one of certainty, balanced, upside"),
        ("--goal own", "or give --goal-weights"),
        ("--goal-weights 0 0 0", "must be finite and not all 0"),
        ("--goal-weights 1 nan 0", "must be finite and not all 0"),
        ("--shifts mass", "liquidation has no such parameter"),
        ("--env-id hopper-medium-v2 --shifts none volatility", "hopper has no such parameter"),
        ("--gamma 1 --env-id hopper-medium-v2", "γ = 1"),
        ("--episodes 1", "an interval needs two"),
        ("--temperature 0", "--temperature 0.0: must be greater than 0"),
        ("--gae-lambda 1.1", "must be at most 1"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--resume absent", "checkpoint.pt does not exist"),
        ("--actor absent.pt", "absent.pt does not exist"),
        ("--actor text.pt", "is not a readable actor file"),
        ("--actor dynamics.pt", "is not a actor file"),
        ("--actor hopper.pt", "is of hopper, this is liquidation"),
        ("--actor wide.pt", "has 5 observations and 1 actions, liquidation 3 and 1"),
        ("--actor nan.pt", "does not describe an actor"),
        ("--actor torn.pt", "does not describe an actor"),
        ("--actor dataset", "is no HDF5 file of D4RL's"),
        ("--env-id hopper-medium-v2 --dataset-path plain.hdf5 --actor dataset", "embeds no tanh-Gaussian policy"),
        ("--env-id hopper-medium-v2 --dataset-path adroit.hdf5 --actor dataset", "embeds no tanh-Gaussian policy"),
        ("--env-id hopper-medium-v2 --dataset-path odd.hdf5 --actor dataset", "its embedded policy is relu gaussian"),
        ("--env-id halfcheetah-medium-v2 --dataset-path plain.hdf5", "11 observations, 3 actions"),
        ("--eval-env-id No-v7", "cannot make the evaluation environment"),
        ("--eval-env-id liquidation_env:Liquidation-v0 --runs-dir text.pt", "choose another --runs-dir"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.pt").write_text("not an actor")
    torch.save({"kind": "dynamics"}, tmp_path / "dynamics.pt")
    files = {name: random_file(pspo, *size)[0] for name, size in dict(
        hopper=(3, 1, "hopper"), wide=(5, 1, "liquidation"), nan=(3, 1, "liquidation"), torn=(3, 1, "liquidation"),
    ).items()}  # fmt: skip
    files["nan"]["layers"][0]["weight"][0, 0] = math.nan
    del files["torn"]["layers"][1]["bias"]
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    write(tmp_path / "plain.hdf5", columns(episodes(6, 5, obs_dim=11, act_dim=3), ("terminal", "timeout")))
    policy_file(tmp_path / "adroit.hdf5", leave_out=("last_fc_log_std",))
    policy_file(tmp_path / "odd.hdf5", distribution=b"gaussian")
    assert message in error_of([*TINY, *args.split()], monkeypatch, capsys, tmp_path)


def test_resume_refuses_other_data(tmp_path, monkeypatch, capsys, no_figure):
    in_process(TINY, monkeypatch, tmp_path)
    checkpoint = only_run(tmp_path) / "checkpoint.pt"
    content = steer_poe.load_tensors(checkpoint, "steer_poe checkpoint")
    torch.save(content | {"data_sha256": "0"}, checkpoint)
    assert "other data" in error_of(["--resume", only_run(tmp_path)], monkeypatch, capsys, tmp_path)
    torch.save(content | {"script_sha256": "0"}, checkpoint)
    assert "go on with the version that it kept" in error_of(
        ["--resume", only_run(tmp_path)], monkeypatch, capsys, tmp_path
    )
    content["critic"].popitem()
    torch.save(content, checkpoint)
    assert "does not fit this run" in error_of(["--resume", only_run(tmp_path)], monkeypatch, capsys, tmp_path)


def test_resume_refuses_contradictions(reference, monkeypatch, capsys, tmp_path):
    text = error_of(["--resume", reference[0], "--goal-weights", "1", "0", "0"], monkeypatch, capsys, tmp_path)
    assert "--goal-weights" in text and "leave --goal-weights out" in text


def test_divergence_is_named(tmp_path, monkeypatch, capsys):
    assert "lower --lr" in error_of([*TINY, "--lr", "1e30"], monkeypatch, capsys, tmp_path)
