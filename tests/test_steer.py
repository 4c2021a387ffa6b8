"""steer_poe.py: every rule against the problem it solves, the identity, the selector, actor files, the whole script."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import iql
import liquidation_env
import pspo
import steer_poe
from benchmark import steer_study as study
from steer_poe import additive, compose, gaussian_kl, gaussian_log_prob, kl_reg, mean_kl, poe, product, select_alpha

ROOT = Path(__file__).resolve().parents[1]
F64 = torch.float64
torch.set_num_threads(1)


def gaussian(mean, var):
    """Mean and log-std, (1,) float64 each."""
    return torch.tensor([mean], dtype=F64), 0.5 * torch.tensor([var], dtype=F64).log()


def pairs(count, act_dim=3, seed=0):
    """Two stacks of random Gaussians, (count, act_dim) float64; variances over twelve decades."""
    g = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(2, count, act_dim, generator=g, dtype=F64)
    log_std = math.log(10) * (6 * torch.rand(2, count, act_dim, generator=g, dtype=F64) - 3)
    return (mean[0], log_std[0]), (mean[1], log_std[1])


def variance(pair):
    return (2 * pair[1]).exp()


def moments(log_density, grid):
    """Mean and variance of exp(log_density), normalised on a grid."""
    weights = torch.softmax(log_density, 0)
    mean = (weights * grid).sum()
    return mean.item(), (weights * (grid - mean) ** 2).sum().item()


FROZEN, PRIOR = gaussian(0.4, 0.09), gaussian(-1.1, 0.5)


# --- Rules: what each is the answer to ---


@pytest.mark.parametrize("beta", [0.0, 0.3, 7.0])
def test_kl_reg_is_the_minimiser_of_its_problem(beta):
    """A numerical optimiser of KL(π ‖ π_f) − β E_π log π_p over mean and log-std of π finds the formula."""
    mean, log_std = (torch.zeros(1, dtype=F64, requires_grad=True) for _ in range(2))
    settings = dict(max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([mean, log_std], **settings)

    def objective():
        optimizer.zero_grad()
        var, var_p = (2 * log_std).exp(), variance(PRIOR)
        kl = 0.5 * ((var + (mean - FROZEN[0]) ** 2) / variance(FROZEN) - 1 - (var / variance(FROZEN)).log())
        expected_log_p = -0.5 * ((var + (mean - PRIOR[0]) ** 2) / var_p + (2 * math.pi * var_p).log())
        loss = (kl - beta * expected_log_p).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    exact = kl_reg(FROZEN, PRIOR, beta)
    assert mean.item() == pytest.approx(exact[0].item(), abs=1e-6)
    assert log_std.item() == pytest.approx(exact[1].item(), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.95])
def test_poe_is_the_log_linear_pool(alpha):
    """Normalising π_f^{1−α} π_p^α by quadrature gives the mean and the variance of the formula."""
    grid = torch.linspace(-8, 8, 100_001, dtype=F64)
    log_f, log_p = (gaussian_log_prob(grid[:, None], *pair) for pair in (FROZEN, PRIOR))
    found = poe(FROZEN, PRIOR, alpha)
    expected = moments((1 - alpha) * log_f + alpha * log_p, grid)
    assert expected == pytest.approx((found[0].item(), variance(found).item()), abs=1e-8)


def test_composing_before_the_tanh_is_exact_for_poe_and_not_for_kl_reg():
    """The Jacobian has the exponent (1−α) + α = 1 in PoE, but 1 + β in π_f π_p^β over actions."""
    frozen, prior, alpha = gaussian(0.9, 0.2), gaussian(-0.5, 0.6), 0.4
    u = torch.linspace(-9, 9, 200_001, dtype=F64)
    jacobian = (1 - u.tanh() ** 2).log()  # log da/du
    over_u = [gaussian_log_prob(u[:, None], *pair) for pair in (frozen, prior)]
    over_a = [x - jacobian for x in over_u]

    def mean_action(log_density_over_a):
        return (torch.softmax(log_density_over_a + jacobian, 0) * u.tanh()).sum().item()

    for weights, rule, same in (
        ((1 - alpha, alpha), poe(frozen, prior, alpha), True),
        ((1.0, alpha / (1 - alpha)), kl_reg(frozen, prior, alpha / (1 - alpha)), False),
    ):
        composed = mean_action(weights[0] * over_a[0] + weights[1] * over_a[1])
        pushed = mean_action(gaussian_log_prob(u[:, None], *rule) - jacobian)
        assert abs(composed - pushed) < 1e-9 if same else abs(composed - pushed) > 0.01


def test_rules_at_their_limits():
    frozen, prior = pairs(1000)
    assert compose("frozen", 0.3, frozen, prior) is frozen and compose("prior-only", 0.3, frozen, prior) is prior
    for rule in ("additive", "poe", "kl-reg"):  # α → 0 is Frozen
        for found, expected in zip(compose(rule, 0.0, frozen, prior), frozen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    near = (frozen[1] - prior[1]).abs() < 3
    for found, expected in zip(poe(frozen, prior, 1 - 1e-15), prior, strict=True):  # α → 1 is Prior-only
        torch.testing.assert_close(found[near], expected[near], rtol=0, atol=1e-9)
    mean, log_std = additive(gaussian(1.0, 0.5), gaussian(3.0, 9.0), 0.25)  # the actor's variance stays
    assert mean.item() == 1.5 and variance((mean, log_std)).item() == pytest.approx(0.5)
    same = prior[0], frozen[1]  # equal variances: PoE is Additive
    for found, expected in zip(poe(frozen, same, 0.3), additive(frozen, same, 0.3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- The identity: PoE(α) and KL-Reg(α / (1 − α)) act alike ---


@pytest.mark.parametrize("alpha", [1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1 - 1e-9])
def test_identity_on_ten_thousand_pairs(alpha, monkeypatch):
    """Equal means, variances in the ratio 1 + β, to 1e-12; relative to the larger of the two experts' means, for a
    weighted mean of opposite signs may itself be anything near 0."""
    frozen, prior = pairs(10_000)
    first, second = compose("poe", alpha, frozen, prior), compose("kl-reg", alpha, frozen, prior)
    scale = torch.maximum(frozen[0].abs(), prior[0].abs())
    assert ((first[0] - second[0]).abs() / scale).max() < 1e-12
    assert (variance(first) / variance(second) * (1 - alpha) - 1).abs().max() < 1e-12
    assert max(steer_poe.identity_error(alpha, frozen, prior)) < 1e-12
    monkeypatch.setattr(steer_poe, "kl_reg", lambda f, p, beta: product(f, 1.0, p, 1.01 * beta))  # which it can see
    assert min(steer_poe.identity_error(0.3, frozen, prior)) > 1e-4


# --- Selector and graceful degradation ---


@pytest.mark.parametrize("rule", ["poe", "kl-reg", "additive"])
@pytest.mark.parametrize("budget", [0.0, 0.1, 3.0])
def test_selector_stays_within_the_budget_and_is_maximal(rule, budget):
    g = torch.Generator().manual_seed(3)
    mean, log_std = torch.randn(2, 200, 2, generator=g, dtype=F64), 0.5 * torch.randn(2, 200, 2, generator=g, dtype=F64)
    frozen, prior = (mean[0], log_std[0]), (mean[1], log_std[1])
    alpha = select_alpha(rule, budget, frozen, prior)
    assert 0 <= alpha <= 0.999 and alpha == round(alpha, 4)
    assert mean_kl(rule, alpha, frozen, prior) <= budget + 1e-15  # rounding, at α = 0
    assert alpha == 0.999 or mean_kl(rule, alpha + 1e-4, frozen, prior) > budget
    kls = [mean_kl(rule, a, frozen, prior) for a in np.linspace(0, 0.99, 60)]
    assert (np.diff(kls) > 0).all()  # what the bisection rests on
    assert select_alpha("poe", 0.1, gaussian(0.0, 1.0), gaussian(0.01, 1.0)) == 0.999  # all of a prior that is near
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (frozen, prior)]
    torch.testing.assert_close(gaussian_kl(*frozen, *prior), torch.distributions.kl_divergence(*normals).sum(-1))


def test_slope_of_the_kl():
    """dKL(π_α ‖ π_f)/dα = α Var_{π_α}[log π_p − log π_f], so it never falls: finite difference against quadrature."""
    alpha, step = 0.6, 1e-5
    kl = [mean_kl("poe", a, FROZEN, PRIOR) for a in (alpha - step, alpha + step)]
    grid = torch.linspace(-6, 6, 100_001, dtype=F64)
    log_f, log_p = (gaussian_log_prob(grid[:, None], *pair) for pair in (FROZEN, PRIOR))
    weights = torch.softmax((1 - alpha) * log_f + alpha * log_p, 0)
    spread = (weights * (log_p - log_f) ** 2).sum() - (weights * (log_p - log_f)).sum() ** 2
    assert (kl[1] - kl[0]) / (2 * step) == pytest.approx(alpha * spread.item(), rel=1e-5)


def test_poe_stays_with_the_frozen_actor_only_if_the_bad_prior_knows_it_is_bad():
    """The offset falls as 1/σ_p²; a wrong prior that is sure takes PoE all the way. Additive does not ask. Only the KL
    budget holds the sure and wrong one."""
    frozen = gaussian(0.0, 0.1)
    offsets = [poe(frozen, gaussian(5.0, var), 0.5)[0].item() for var in (1e3, 1e5, 1e7)]
    assert offsets[0] < 0.001 and np.divide(offsets[:-1], offsets[1:]) == pytest.approx(100, rel=0.01)
    sure = gaussian(5.0, 1e-4)
    assert poe(frozen, sure, 0.1)[0].item() > 4.9
    assert additive(frozen, sure, 0.1)[0].item() == additive(frozen, gaussian(5.0, 1e3), 0.1)[0].item() == 0.5
    mean, log_std = gaussian(5.0, 1e-2)
    alpha = select_alpha("poe", 0.5, frozen, (mean, log_std))
    held = poe(frozen, (mean, log_std), alpha)
    assert gaussian_kl(*held, *frozen).item() <= 0.5 and 0 < alpha < 0.01 and held[0].item() < 0.4


# --- The study's value bound, references and classes ---


def test_total_variation_against_its_closed_form():
    """Equal variances: 2 Φ(d / 2σ) − 1. And a density over actions integrates to 1."""
    noise = torch.randn(100_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    for distance in (0.0, 0.5, 2.0, 50.0):
        pair = gaussian(distance, 0.49), gaussian(0.0, 0.49)
        found = study.total_variation(*[(m[None], ls[None]) for m, ls in pair], noise).item()
        assert found == pytest.approx(math.erf(distance / (2 * 0.7) / math.sqrt(2)), abs=0.006)
    a = torch.linspace(-1, 1, 200_001, dtype=F64)[1:-1]
    density = study.log_density(a.atanh()[:, None], gaussian(0.3, 0.2), "sample").exp()
    assert torch.trapezoid(density, a).item() == pytest.approx(1, abs=1e-4)


def test_value_bound_holds_for_the_largest_total_variation_only():
    """|V^π − V^{π_f}| ≤ δ R / (1−γ)² in random MDPs. With the mean of δ over data it can be false: 999 of 1,000 rows
    lie where π = π_f, one at a fork where π turns the other way, to reward 0 for ever in place of 1. And it is loose:
    at γ = 0.99 a δ of 1% allows the whole range of values."""
    rng, gamma = np.random.default_rng(0), 0.9
    for _ in range(200):
        dynamics, reward = rng.dirichlet(np.full(4, 0.3), (4, 3)), rng.uniform(-1, 2, (4, 3))
        policies = rng.dirichlet(np.full(3, 0.3), (2, 4))
        v = [
            np.linalg.solve(np.eye(4) - gamma * np.einsum("sa,sat->st", p, dynamics), (p * reward).sum(1))
            for p in policies
        ]
        delta = 0.5 * np.abs(policies[0] - policies[1]).sum(1).max()
        assert np.abs(v[0] - v[1]).max() <= study.value_bound(delta, reward.max() - reward.min(), gamma)
    assert study.value_bound(1.0, 1.0, 0.99) >= 1 / (1 - 0.99) > study.value_bound(1e-3, 1.0, 0.99)
    assert study.value_bound(0.01, 1.0, 0.99) == pytest.approx(1 / (1 - 0.99))


def test_references_and_degraded_priors():
    """IQL-Guided maximises β E_π A − KL for a linear A; Critic-Greedy goes uphill whatever the variance."""
    best, log_std = study.iql_guided(FROZEN, torch.tensor([1.7], dtype=F64), 0.8)
    grid = torch.linspace(-2, 2, 4001, dtype=F64)[:, None]
    problem = 0.8 * 1.7 * grid[:, 0] - gaussian_kl(grid, FROZEN[1], *FROZEN)
    assert grid[problem.argmax()].item() == pytest.approx(best.item(), abs=1e-3) and log_std is FROZEN[1]
    start = torch.zeros(1, 2, dtype=F64)
    u, _ = study.critic_greedy((start, start - 9), lambda u: 2 * (1 - u), steps=5, size=0.1)
    torch.testing.assert_close(u, 0.5 / math.sqrt(2) * torch.ones_like(u))
    noise = torch.tensor([2.0], dtype=F64)
    for kind, mean, var in (
        ("clean", 0.4, 0.09),
        ("noisy", 1.4, 0.34),
        ("random", 2.0, 1.0),
        ("overconfident", 2.0, 0.09),
    ):
        found = study.degrade(kind, FROZEN, noise)
        assert (found[0].item(), variance(found).item()) == pytest.approx((mean, var))


def test_classes_with_known_answers():
    z = np.random.default_rng(0).standard_normal((100, 25))
    centred = z[0] - z[0].mean()
    for difference, expected in (centred + 1, "HELP"), (centred - 1, "HURT"), (centred, "FROZEN"), (0 * z[0], "FROZEN"):
        assert study.classify(*study.interval(difference)) == expected
    wrong = np.mean([study.classify(*study.interval(x)) != "FROZEN" for x in z])  # one in twenty, or a little more
    assert 0.01 < wrong < 0.15


# --- Goals and learning ---


def test_sums_weights_and_features():
    x, ends = np.arange(14, dtype=np.float64).reshape(7, 2), np.array([2, 3, 6])
    expected = [sum(0.9 ** (k - t) * x[k] for k in range(t, ends[ends >= t][0] + 1)) for t in range(7)]
    np.testing.assert_allclose(steer_poe.discounted_sums(x, ends, 0.9), expected)
    weights = steer_poe.regression_weights(torch.tensor([0.0, 0.3, 9.0, -5.0]), 0.3, 20.0)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[1:3] / weights[0]).tolist() == pytest.approx([math.e, 20])
    obs = np.array([[5.0, 40.0, 2.0], [5.0, 40.0, 1.0], [5.0, 40.0, 2.0]], np.float32)
    got = steer_poe.features("liquidation", obs, np.array([[0.5], [0.5], [-0.5]], np.float32))
    np.testing.assert_allclose(got, [[40, 15, 10], [20, 15, 0], [0, 0, 0]])
    got = steer_poe.features("", obs[:1], np.array([[0.5, 1.0]], np.float32))
    np.testing.assert_allclose(got, [[5, 40, 2, 0.625]])


@pytest.mark.parametrize("task, env_id", [("hopper", "Hopper-v4"), ("halfcheetah", "HalfCheetah-v4")])
def test_features_of_locomotion(task, env_id):
    """Velocity is the simulator's forward velocity of the root, the tilt its pitch."""
    env = gym.make(env_id)
    env.reset(seed=0)
    for _ in range(3):
        action = env.action_space.sample()
        obs, *_ = env.step(action)
    got, data = steer_poe.features(task, obs[None], action[None])[0], env.unwrapped.data
    assert got == pytest.approx([data.qvel[0], np.mean(action**2), math.cos(data.qpos[2])], abs=1e-6)
    assert steer_poe.WIDTHS[task] == len(obs)


def toy_data(count=4000):
    """One-step episodes of a uniform behaviour; the task's reward is −(a − 0.5)², goals are +a and −a."""
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(count, 2)), rng.uniform(-0.9, 0.9, (count, 1))
    columns = dict(observations=obs, actions=action, rewards=-((action[:, 0] - 0.5) ** 2), next_observations=obs)
    data = steer_poe.make_dataset(columns | dict(terminals=np.ones(count, bool)), "toy")
    return data, np.concatenate([action, -action], 1)


def test_learning_on_a_problem_with_known_answers():
    """Q − V is the advantage, in any unit; each goal's prior moves its way, awr moves to the task's best action, bc
    does not; a given actor stays what it is, and its prior is learnt in its coordinates."""
    data, goal_rewards = toy_data()
    goal_rewards *= 1e3, 1e-8
    args = steer_poe.Args(hidden=32, updates=300, gamma=1.0, batch_size=256, lr=3e-3, cuda=False, actor="awr")
    awr, (up, down), critic = steer_poe.learn(args, data, goal_rewards, None)
    exact = np.column_stack([data.columns["rewards"], goal_rewards])
    obs, action = (torch.as_tensor(data.columns[key]) for key in ("observations", "actions"))
    advantage = (critic(obs, action) - critic.value(obs)).numpy()
    np.testing.assert_allclose(critic.advantage_std, exact.std(0), rtol=0.1)
    assert all(np.corrcoef(advantage[:, i], exact[:, i])[0, 1] > 0.97 for i in range(3))
    args.actor = "bc"
    clone = steer_poe.learn(args, data, goal_rewards[:, :0], None)[0]
    high, low, task, middle = (x.squash(x(obs)[0]).mean().item() for x in (up, down, awr, clone))
    assert clone(obs)[1].exp().mean().item() == pytest.approx(action.atanh().std().item(), rel=0.07)
    assert high > 0.4 and low < -0.4 and abs(middle) < 0.1 and task == pytest.approx(0.5, abs=0.15)
    for tanh in ("mean", "none"):
        given = steer_poe.Actor([2, 8, 2], tanh=tanh).requires_grad_(False)
        before = copy.deepcopy(given.state_dict())
        same, (prior,), _ = steer_poe.learn(args, data, goal_rewards[:, :1], given)
        assert same is given and equal(given.state_dict(), before) and prior.tanh == tanh
        assert prior.squash(prior(obs)[0]).mean() > 0.35


def test_lambda_returns_go_on_after_a_time_limit_and_stop_at_a_terminal():
    """Reward 1, cut off every 5 steps: V sees the observed returns, Q at λ = 0 one step further, through the cut."""
    step = np.arange(2000) % 5
    obs = step[:, None].astype(np.float32)
    for terminals in (step < 0, step == 4):
        data = dict(observations=obs, actions=0 * obs, next_observations=np.roll(obs, -1), terminals=terminals)
        tensors = {key: torch.as_tensor(x) for key, x in (data | dict(ends=step == 4)).items()}
        args = steer_poe.Args(hidden=32, updates=500, lr=0.02, gamma=0.5, gae_lambda=0.0)
        torch.manual_seed(0)
        critic, _ = steer_poe.learn_critic(args, tensors, np.ones((2000, 1)))
        v, q = critic.value(tensors["observations"][:5])[:, 0], critic(*(tensors[key][:5] for key in list(data)[:2]))
        exact = 2 - 0.5 ** torch.arange(4, -1, -1)
        torch.testing.assert_close(v, exact, atol=0.05, rtol=0)
        torch.testing.assert_close(q[:, 0], 1 + 0.5 * exact.roll(-1) * ~tensors["terminals"][:5], atol=0.05, rtol=0)


# --- Actor files ---


def stand_in(obs_dim=3, act_dim=2):
    """A Dataset of these sizes."""
    columns = dict(observations=np.zeros((9, obs_dim), np.float32), actions=np.zeros((9, act_dim), np.float32))
    high = np.ones(act_dim, np.float32)
    return steer_poe.Dataset(columns, np.zeros(1), -high, high, "a stand-in", [], "")


def through_a_file(content, tmp_path):
    torch.save(content, tmp_path / "actor.pt")
    return steer_poe.read_actor(torch.load(tmp_path / "actor.pt", weights_only=True), stand_in())


def equal(state, other):
    """Two state_dicts are the same to the bit."""
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def play(actor, obs):
    """The deterministic action, at α = 0 of whatever prior."""
    return steer_poe.steer(actor, actor.gaussian, "frozen", 0.0)(np.asarray(obs, np.float32))


def about(script, act_dim=2):
    """What an actor.pt holds beside the actor."""
    return dict(script=script, env_id="liquidation", action_low=-torch.ones(act_dim), action_high=torch.ones(act_dim))


@pytest.mark.parametrize("script", [iql, pspo])
def test_actors_of_both_learners_act_as_in_their_own_script(script, tmp_path):
    torch.manual_seed(0)
    theirs = script.Actor(3, 2, 8)
    theirs.net.mean.uniform_(-1, 1)
    theirs.net.std.uniform_(0.5, 2)
    if script is iql:
        theirs.log_std.data.copy_(torch.tensor([-7.0, 0.5]))  # of which -5 is the least
    mine = through_a_file(about(script.__name__) | theirs.file(), tmp_path)
    obs = torch.randn(50, 3)
    for one, other in zip(mine(obs), theirs(obs), strict=True):
        torch.testing.assert_close(one, other.expand_as(one))
    np.testing.assert_allclose(play(mine, obs), theirs.act(obs.numpy()), atol=1e-6)
    assert equal(through_a_file(mine.file(), tmp_path).state_dict(), mine.state_dict())


def linears(*parts):
    """Layers of an actor file from torch.nn modules."""
    found = [m for part in parts for m in part.modules() if isinstance(m, torch.nn.Linear)]
    return [dict(weight=m.weight.detach().T.clone(), bias=m.bias.detach().clone()) for m in found]


@pytest.mark.parametrize("name", ["elu", "silu", "tanh", "relu"])
def test_a_plain_sequential(name, tmp_path):
    layer = dict(elu=torch.nn.ELU, silu=torch.nn.SiLU, tanh=torch.nn.Tanh, relu=torch.nn.ReLU)[name]
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), layer(), torch.nn.Linear(8, 2), torch.nn.Tanh())
    content = dict(layers=linears(net), activation=name, tanh="mean", log_std=torch.full((2,), -1.0))
    obs = torch.randn(20, 3)
    actor = through_a_file(content, tmp_path)
    np.testing.assert_allclose(play(actor, obs), net(obs).detach(), atol=1e-6)
    assert actor(obs)[1].unique().item() == -1


def test_the_clipped_mean_of_ppo(tmp_path):
    """A Gaussian around a linear mean, in the environment's unit, whose action is clipped: often at its bound."""
    weight, bias, obs = torch.randn(3, 2), torch.full((2,), 0.8), torch.randn(500, 3)
    content = dict(layers=[dict(weight=weight, bias=bias)], activation="tanh", tanh="none", log_std=torch.zeros(2))
    actor, expected = through_a_file(content, tmp_path), (obs @ weight + bias).clamp(-1, 1)
    np.testing.assert_allclose(play(actor, obs), expected, atol=1e-6)
    assert 0.2 < (expected.abs() == 1).float().mean() < 0.8


def layer(*shape, bias=4, of=1.0):
    return dict(layers=[dict(weight=torch.full(shape, of), bias=torch.zeros(bias))])


GOOD = layer(3, 4) | dict(activation="relu", tanh="sample", log_std="head")
WRONG = [
    (layer(4, 3), r"net.weights.0: .*\[1, 4, 3\].*\[1, 3, 4\]"),
    (layer(3, 4, of=math.nan), "NaN or infinite"),
    (dict(activation="gelu"), "activation must be relu, tanh, elu or silu"),
    (dict(tanh=True), "tanh must be one of 'sample'"),
    (layer(3, 2, bias=2) | dict(log_std=torch.zeros(3)), r"log_std: .*\[3\]"),
    (dict(obs_std=torch.tensor([1.0, 0.0, 1.0])), "obs_std must be above 0"),
    (dict(action_high=torch.tensor([2.0, 2.0])), r"action_high is \[2. 2.\], in the data \[1. 1.\]"),
    (dict(log_std_range=[2.0, -5.0]), r"log_std_range must be \[low, high\]"),
    (dict(squash="tanh"), "unknown keys squash; known are layers, activation"),
    (dict(log_std=-1.0, obs_mean=[0.0] * 3), "log_std, obs_mean must be tensors"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_errors_name_what_is_wrong_in_an_actor_file(change, message):
    steer_poe.read_actor(GOOD, stand_in())
    with pytest.raises(Exception, match=message):
        steer_poe.read_actor(GOOD | change, stand_in())
    with pytest.raises(ValueError, match="no tanh in it"):
        steer_poe.read_actor({key: GOOD[key] for key in GOOD if key != "tanh"}, stand_in())


# --- As a user runs it ---

TINY = "--no-cuda --updates 150 --lr 0.02 --batch-size 128 --dataset-episodes 300 --hidden 16 --eval-episodes 50"
TINY = [*TINY.split(), "--kl-budget", "0.05"]


def run(monkeypatch, folder, *args):
    """The script with these arguments; returns its run folder, or the line that it ends with."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["steer_poe.py", *TINY, *map(str, args)])
    before = set(folder.glob("runs/*"))
    try:
        steer_poe.main()
    except SystemExit as stop:
        assert isinstance(stop.code, str) and "\n" not in stop.code
        return stop.code
    (found,) = set(folder.glob("runs/*")) - before
    return found


def test_as_typed(tmp_path, monkeypatch):
    """The default command, small: what is in the folder, what is said, and that the same command says it again."""
    command, environment = [sys.executable, ROOT / "steer_poe.py", *TINY], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert {x.name for x in folder.iterdir()} == {"args.json", "steered_actor.pt", "result.json", "figure.png"}
    result = json.loads((folder / "result.json").read_text())
    frozen, *steered, prior = result["rows"]
    assert (frozen["rule"], frozen["kl"], frozen["objective_gain"], prior["rule"]) == ("frozen", 0, 0, "prior-only")
    (at,) = (row for row in steered if row["alpha"] == result["alpha"])
    assert at["kl"] <= 0.05 < min(row["kl"] for row in steered if row["alpha"] > result["alpha"])  # within the budget
    assert at["objective_gain"] - at["objective_ci95"] > 0  # the objective moves with the goal
    share = at["objective_gain"] / max(row["objective_gain"] for row in steered)
    assert result["share_of_possible_gain"] == pytest.approx(share) and 0 < share < 1
    assert f"share of the possible gain: {100 * share:.0f}%" in done.stdout and max(result["identity_errors"]) < 1e-12
    again = json.loads((run(monkeypatch, tmp_path) / "result.json").read_text())
    assert all(again[key] == result[key] for key in result if key not in ("minutes", "args"))


def test_a_given_actor_stays_as_it_is_and_the_file_acts_alone(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(about("iql", 1) | iql.Actor(3, 1, 8).file(), tmp_path / "mine.pt")
    folder = run(
        monkeypatch, tmp_path, "--actor", "mine.pt", "--goal", "certainty", "--alpha", "0.4", "--rule", "kl-reg"
    )
    saved, given = (torch.load(path, weights_only=True) for path in (folder / "steered_actor.pt", tmp_path / "mine.pt"))
    frozen, prior = (steer_poe.read_actor(saved[key], stand_in(3, 1)) for key in ("frozen", "prior"))
    assert equal(frozen.state_dict(), steer_poe.read_actor(given, stand_in(3, 1)).state_dict())
    assert (saved["goal_weights"], saved["alpha"], saved["rule"]) == ([0.0, 1.0, 0.0], 0.4, "kl-reg")
    obs = torch.tensor([[3.0, 70.0, 1.2], [9.0, 20.0, 1.9]])
    (mean_f, log_std_f), (mean_p, log_std_p) = frozen(obs), prior(obs)
    weight_f, weight_p = (-2 * log_std_f).exp(), 0.4 / 0.6 * (-2 * log_std_p).exp()
    expected = ((weight_f * mean_f + weight_p * mean_p) / (weight_f + weight_p)).clamp(-1, 1)
    np.testing.assert_allclose(steer_poe.steer(frozen, prior.gaussian, "kl-reg", 0.4)(obs.numpy()), expected, atol=1e-5)


def test_episodes_are_paired_and_end():
    """One seed is one set of prices; after its end an episode adds nothing; the objective is weights · features."""
    env, weights = gym.make("liquidation_env:Liquidation-v0"), np.array([1.0, 0.0, 0.0])

    def act(obs):  # episodes of different lengths; the copies that have ended go on with a new one
        return np.where(obs[:, 2:] >= 1.1, 1, -1).astype(np.float32)

    objectives, returns = steer_poe.play(act, env, "liquidation", weights, 50, 7)
    np.testing.assert_allclose(returns, liquidation_env.evaluate(act, 50, 7))
    np.testing.assert_allclose(objectives, returns, rtol=1e-5)  # the feature revenue is the reward
    assert np.array_equal(returns, steer_poe.play(act, env, "liquidation", weights, 50, 7)[1]) and returns.std() > 1


def own_data(path, act_dim=1, obs_dim=3):
    rng, ends = np.random.default_rng(0), np.arange(400) % 20 == 19
    with h5py.File(path, "w") as file:
        columns = dict(observations=rng.normal(size=(400, obs_dim)), actions=rng.uniform(-2, 2, (400, act_dim)))
        columns |= dict(rewards=rng.normal(size=400), terminals=ends & False, timeouts=ends)
        for key, x in columns.items():
            file[key] = x


def test_any_environment_with_a_goal_of_ones_own(tmp_path, monkeypatch, capsys):
    """Pendulum: actions in [-2, 2] are scaled; the goal weighs columns and effort; and without a simulator."""
    own_data(tmp_path / "mine.hdf5")
    own = ["--env-id", "Pendulum-v1", "--dataset-path", "mine.hdf5", "--eval-episodes", "2", "--updates", "5"]
    message = run(monkeypatch, tmp_path, *own)
    assert "has no goals of its own; --goal-weights takes 4 numbers" in message
    own += ["--goal-weights", "1", "0", "0", "-0.1"]
    saved = torch.load(run(monkeypatch, tmp_path, *own) / "steered_actor.pt", weights_only=True)
    assert saved["action_high"].tolist() == [2.0] and saved["goal_weights"] == [1, 0, 0, -0.1]
    result = json.loads((run(monkeypatch, tmp_path, *own, "--eval-episodes", "0") / "result.json").read_text())
    assert "objective" not in result["rows"][0] and result["rows"][1]["kl"] > 0 and "chosen" in capsys.readouterr().out


BAD = """
--env-id hopper-x --dataset-path own.hdf5 --eval-env-id Pendulum-v1 => hopper-x with 3 observations has no goals
--env-id own/set-v0 => Unreachable: no network
--alpha 1 => --alpha 1.0: it must be in [0, 1)
--kl-budget -1 => --kl-budget -1.0
--goal speed => has the goals certainty, balanced, upside
--goal-weights 0 0 0 => takes 3 numbers, not all 0
--goal-weights 1 nan 0 => takes 3 numbers
--env-id Pendulum-v1 --dataset-path own.hdf5 --gamma 1 => --gamma 1.0: it must be in [0, 1)
--eval-episodes 1 => 0, or at least 2
--temperature 0 => --temperature 0.0
--weight-clip 0 => --weight-clip 0.0: it must be above 0
--actor absent.pt => absent.pt (bc, awr, or a file: docs/your_own.md): FileNotFoundError
--actor wide.pt => size mismatch for net.weights.0
--lr 1e30 => lower --lr
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_is_one_line(line, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise type("Unreachable", (Exception,), {})("no network")  # the hub's own kind

    monkeypatch.setattr("minari.load_dataset", unreachable)
    args, message = line.split(" => ")
    torch.save(pspo.Actor(5, 1, 8).file(), tmp_path / "wide.pt")
    own_data(tmp_path / "own.hdf5")
    found = run(monkeypatch, tmp_path, *args.split())
    assert isinstance(found, str) and message in found
