"""PSPO: its steps against the loops of plain.py, its run, then each function against numbers by hand.

Equation numbers are the paper's, as in pspo.py. Propositions, lemma and theorems are in test_theory.py; the command
line, data and runs in files of their own.
"""

import copy
import math
import sys

import numpy as np
import plain
import pytest
import torch

import liquidation_env
import pspo

F64 = torch.float64
OBS, ACT = 3, 2  # sizes of the tiny problem


@pytest.fixture
def exact(monkeypatch):
    """New tensors are float64; two rollouts share a model."""
    monkeypatch.setattr(pspo.PSPO, "GROUP", 2)
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def toy(rows=11, low=-1.0, high=1.0):
    """A data set without sense, every third row terminal, every sixth of them with an unknown next state."""
    uniform, number = torch.rand(rows, 2 * OBS + ACT + 1) * 2 - 1, torch.arange(rows)
    obs, action, next_obs, reward = uniform.split((OBS, ACT, OBS, 1), 1)
    reward = low + (high - low) * (reward[:, 0] + 1) / 2
    reward[:2] = torch.tensor([low, high])
    columns = dict(observations=obs, actions=action, rewards=reward, next_observations=next_obs)
    return columns | dict(terminals=number % 3 == 2, known=number % 6 != 5)


def first_above(obs):
    """A task's rule: the episode ends where the first entry is large, but not beyond the box. (..., obs) -> (...)."""
    return (obs[..., 0] > 0.2) & (obs[..., 0] <= 0.8)


TINY = dict(
    batch_size=8, hidden=5, pool_size=3, active_models=2, dynamics_hidden=4, dynamics_layers=2, evidence_rows=3,
    action_samples=4, rollout_horizon=2, actor_lr=1e-2, critic_lr=2e-2, target_rate=0.1, average_rate=0.2, alpha=0.3,
    trust_region_every=2, likelihood_coef=0.7, cuda=False,
)  # fmt: skip


# --- The steps written again in plain.py: one row, model and sample at a time, from the equations ---


CASES = {  # settings, range of rewards, whether the task's rule is known, log η at the start
    "as it is": (dict(gamma=0.9, trust_region=0.15), (-1, 1), True, 0.0),
    "end learnt": (dict(gamma=0.7, trust_region=50.0, action_samples=2), (-2, -1), False, -5.9),
    "no layer norm": (dict(gamma=0.8, layer_norm=False, trust_region=0.15), (-1, 2), True, 0.0),
    "no μ": (dict(gamma=1.0, alpha=0.0), (1, 2), True, 5.9),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_the_equations(case, exact, monkeypatch):
    """Four iterations of PSPO, each tensor of the learner and each metric, against plain.py."""
    settings, rewards, known_rule, log_eta = CASES[case]
    args, data = pspo.Args(**TINY | settings), toy(11, *rewards)
    rule = first_above if known_rule else None
    pool = pspo.Dynamics(3, OBS, ACT, 4, 2, rule)
    for name, x in pool.named_buffers():
        x.copy_(0.5 + torch.rand(x.shape) if name.endswith("std") else 0.1 * torch.randn(x.shape))
    pool.box.copy_(torch.tensor([[-0.8], [0.8]]).expand(2, OBS))
    pool.box[:, -1] = 0.1  # a column that is constant in the data: nothing can leave it
    pool.net.biases[-1].data[:, 0, 0] += torch.tensor([0.0, 3.0, 1.0])  # models that disagree about the reward
    learner, tape = pspo.PSPO(args, data, pool), plain.Tape()
    with tape.recording(monkeypatch):
        learner.redraw()
    assert learner.log_eta == 0
    assert torch.equal(learner.evidence, torch.ones(3)) and torch.equal(learner.evidence_weight, torch.ones(3))
    assert ((learner.rollout_obs[:, None] == data["observations"]).all(-1).any(1)).all()
    for one, other in zip(learner.critic.parameters(), learner.target_critic.parameters(), strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    for net in (learner.behaviour, learner.actor, learner.previous, learner.average, learner.critic):
        assert torch.equal(net.net.mean[:OBS], data["observations"].mean(0)) and (net.net.mean[OBS:] == 0).all()
        assert torch.equal(net.net.std[:OBS], pspo.spread(data["observations"])) and (net.net.std[OBS:] == 1).all()
    learner.log_eta.fill_(log_eta)
    drawn = tape.take("randperm", 3, bound=3)[:2]
    assert learner.members.tolist() == drawn.tolist() != [0, 1]
    assert all(torch.equal(a, b[drawn]) for a, b in zip(learner.active.parameters(), pool.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(learner.active.buffers(), pool.buffers(), strict=True))
    written = plain.PSPO(learner, args, data, rule, tape)
    assert learner.value_bounds == pytest.approx((written.least, written.most))
    for _ in range(4):
        with tape.recording(monkeypatch):
            metrics = learner.iterate()
        states, expected = written.evaluate()
        expected |= written.improve(states)
        found = dict(zip(learner.METRICS, metrics.tolist(), strict=True))
        assert found == pytest.approx(plain.numbers(expected), abs=1e-10)
        assert not tape.drawn
        plain.assert_same(learner, written.state)


@pytest.mark.parametrize("known_rule, seed", [(True, 9), (False, 0)])
def test_training_of_the_pool_is_maximum_likelihood(known_rule, seed, exact, monkeypatch, capsys):
    """The whole of train_dynamics on 20 rows against plain.py; some member's best epoch is not its last."""
    settings = dict(dynamics_batch=4, dynamics_epochs=5, dynamics_lr=0.3)
    args, data, rule = pspo.Args(**TINY | settings), toy(20), first_above if known_rule else None
    data["next_observations"][:, 2] = data["observations"][:, 2]  # a column that stays as it is
    data["next_observations"][~data["known"]] = torch.tensor(
        [[-1e3], [1e3], [5e2]]
    )  # placeholders, which no model may learn
    pool, tape = pspo.empty_pool(args, data, rule), plain.Tape()
    state = copy.deepcopy(dict(pool.state_dict()))
    monkeypatch.setattr(pspo, "empty_pool", lambda *_: pool)
    torch.manual_seed(seed)  # with 0 a row whose next state is unknown is held out
    with tape.recording(monkeypatch):
        trained = pspo.train_dynamics(args, data, rule)
    assert trained is pool and not any(p.requires_grad for p in pool.parameters())
    explained, best_epochs = plain.train_pool(state, args, data, rule, tape)
    assert min(best_epochs) < 4 and len(set(best_epochs)) > 1 and not tape.drawn  # else the data have to be others
    plain.assert_same(pool, state)
    reward, *state = (f"{100 * x:.1f}%" for x in explained.mean(0).tolist())
    told = f"explain {reward} of the reward's variance, the state's {', '.join(state)}\n"
    assert capsys.readouterr().out.endswith(told)


@pytest.mark.parametrize("rows, passes", [(20, 200), (2_000, 50_000 // (1_799 // 4))])
def test_few_rows_get_many_passes(rows, passes, monkeypatch):
    """--dynamics-epochs 0, as --quick has it: 50,000 updates in whole passes over the rows not held out, or 200."""
    monkeypatch.setattr(pspo, "fast", lambda *_: lambda: None)
    seen, held_out = [], rows // 10 + 1
    monkeypatch.setattr(pspo, "cosine", lambda update, updates: seen.append((update, updates)) or 1.0)
    pspo.train_dynamics(pspo.Args(**TINY | dict(dynamics_batch=4, dynamics_epochs=0)), toy(rows), first_above)
    total = passes * ((rows - held_out) // 4)
    assert seen[0] == (1, total) and seen[-1] == (total, total) and len(seen) == total


def test_behaviour_cloning_is_maximum_likelihood(exact, monkeypatch):
    """clone_behaviour: three Adam steps of −log μ(a); then π, π_i and the average start at μ."""
    args, data = pspo.Args(**TINY | dict(behaviour_updates=3)), toy()
    data["actions"][0] = torch.tensor([1.0, -1.0])
    learner, tape = pspo.PSPO(args, data, pspo.Dynamics(3, OBS, ACT, 4, 2, first_above)), plain.Tape()
    assert any((a != b).any() for a, b in zip(learner.actor.parameters(), learner.average.parameters(), strict=True))
    state = copy.deepcopy(dict(learner.state_dict()))
    with tape.recording(monkeypatch):
        learner.clone_behaviour()
    plain.clone_behaviour(state, args, data, tape)
    assert not tape.drawn and not any(p.requires_grad for p in learner.behaviour.parameters())
    plain.assert_same(learner, state)


def test_main_redraws_lowers_rates_and_evaluates_the_average(tmp_path, monkeypatch):
    """The loop of a run: N models anew every 1,000 iterations; both rates' cosines; rows of means; what is evaluated,
    reported and saved is the average of π."""
    seen, redrawn, asked, kept, redraw = [], [], [], [], pspo.PSPO.redraw

    def iterate(self):
        seen.append([float(optimizer.param_groups[0]["lr"]) for optimizer in self.optimizers])
        self.average.net.biases[-1].data += 1e-4
        return torch.full((len(self.METRICS),), float(len(seen)))

    def counted(self):
        redraw(self)
        redrawn.append((len(seen), *sorted(self.members.tolist())))

    def evaluate(act, env, episodes, seed):
        asked.append((getattr(act, "__self__", "sampled"), episodes, seed))
        return np.ones((episodes, 3)), np.arange(episodes, dtype=float)

    for name, stub in dict(iterate=iterate, redraw=counted).items():
        monkeypatch.setattr(pspo.PSPO, name, stub)
    monkeypatch.setattr(pspo, "evaluate", evaluate)
    monkeypatch.setattr(pspo, "plot", lambda *args: kept.extend(args[3:5]))
    flags = "--dataset-episodes 20 --pool-size 3 --active-models 2 --dynamics-epochs 1 --dynamics-hidden 4 --hidden 4 "
    flags += "--behaviour-updates 3 --iterations 2100 --actor-lr 5e-4 --eval-every 700 --eval-episodes 2 --seed 3 "
    flags += f"--final-episodes 4 --no-cuda --runs-dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["pspo.py", *flags.split()])
    pspo.main()
    rates = [[rate * (1 + math.cos(math.pi * i / 2100)) / 2 for rate in (5e-4, 1e-3)] for i in range(2100)]
    assert np.allclose(seen, rates, rtol=1e-4, atol=1e-9)
    assert [count for count, *_ in redrawn] == [0, 999, 1999] and all(a < b for _, a, b in redrawn)
    learner, rows = kept
    assert [(row["iteration"], row["policy/eta"]) for row in rows] == [(700, 350.5), (1400, 1050.5), (2100, 1750.5)]
    assert all((row["eval/return"], row["eval/score"]) == (0.5, pytest.approx(50 / 135)) for row in rows)
    average, mu = learner.average, learner.behaviour
    final = [(policy, 4, 20_003) for policy in ("sampled", mu, average)]
    assert asked == [(average, 2, 10_003)] * 3 + final
    saved = torch.load(next(tmp_path.iterdir()) / "actor.pt")
    assert torch.equal(saved["layers"][-1]["bias"], average.net.biases[-1][0, 0])


# --- Rules and tables ---


INF, NAN = math.inf, math.nan
EDGES = {  # task: states that are alive, states that are not; entries that are left out are 0
    "hopper": (
        [(0.71, 0.0), (1.2, 0.19), (1.2, -0.19), (1.2, 0, 99.9), (1.2, 0, -99.9), (500.0, 0)],
        [(0.7, 0), (1.2, 0.2), (1.2, -0.2), (1.2, 0, 100.0), (1.2, 0, -101.0), (1.2, 0, 0, 0, 0, 0, -1e6), (NAN, 0)],
    ),
    "hopper, not finite": ([], [(1.2, NAN), (1.2, 0, NAN), (INF, 0), (1.2, 0, -INF)]),
    "walker2d": (
        [(0.81, 0), (1.99, 0), (1.2, 0.99), (1.2, -0.99), (1.2, 0, -1e4)],
        [(0.8, 0), (2.0, 0), (1.2, 1.0), (1.2, -1.0), (-150.0, 0), (NAN, 0), (1.2, NAN)],
    ),
    "halfcheetah": ([(0, 0), (-500, 9), (NAN, 0)], []),
    "liquidation": (  # a model predicts the step t' = 20 with a small error
        [(0, 100, 1.0), (19, 100, 1.0), (19.3, 50, 1.0), (5, 0.1, 1.0)],
        [(20, 100, 1.0), (19.8, 100, 1.0), (5, 0.0999, 1.0), (5, 0, 1.0), (5, -1, 1.0)],
    ),
}


@pytest.mark.parametrize("task", EDGES)
def test_termination_rules_at_their_edges(task):
    """The environments' rules; a model's leading dimensions are kept."""
    for expected, rows in zip((False, True), EDGES[task], strict=True):
        states = torch.tensor([[*row, *[0.0] * (11 - len(row))] for row in rows]).view(-1, 11)
        ends = pspo.TERMINAL[task.split(",")[0]](states.expand(2, *states.shape))
        assert ends.dtype == torch.bool and ends.shape == (2, len(rows)) and (ends == expected).all()
    assert pspo.TERMINAL.keys() == {task.split(",")[0] for task in EDGES}


def test_settings_and_scores_of_the_tables(monkeypatch):
    """Table 5 for each task, as the command line has it; Table 4 with Eq. (15); Tables 1 and 2 by their average."""
    for task, size in (("hopper", 256), ("walker2d", 512), ("halfcheetah", 512)):
        monkeypatch.setattr(sys, "argv", ["pspo.py", "--env-id", f"{task}-medium-v2"])
        args = pspo.parse()
        assert (args.gamma, args.likelihood_coef, args.pool_size, args.active_models) == (0.99, 1.0, 100, 10)
        assert (args.hidden, args.batch_size, args.dynamics_epochs) == (256, 256, 1000)
        assert args.dynamics_hidden == args.dynamics_batch == size and args.alpha > 0
    table_4 = dict(
        hopper=(-20.27, 3234.3), walker2d=(1.63, 4592.3), halfcheetah=(-280.18, 12135.0), liquidation=(0, 135)
    )
    for task, references in table_4.items():
        assert pspo.normalised_score(np.array(references), task).tolist() == pytest.approx([0, 100])
    scores = {name: score for name, (_, score) in pspo.PAPER.items()}
    assert scores.pop("liquidation") == 102.3 and scores.keys() == pspo.D4RL.keys() and len(scores) == 18
    assert np.mean(list(scores.values())) == pytest.approx(91.2, abs=0.05)


# --- Networks ---


def test_actor_acts_by_its_mean_or_a_sample():
    """The mean, clipped; a sample with std = 1; the log-std kept in [−5, 2]."""
    actor, obs = pspo.Actor(3, 2, 8), torch.randn(5, 3)
    actor.net.mean.fill_(0.5)
    actor.net.biases[-1].data[..., 2:] = torch.tensor([-99.0, 99.0])
    mean, log_std = actor(obs)
    assert log_std.tolist() == [[-5, 2]] * 5
    torch.testing.assert_close(torch.as_tensor(actor.act(obs.numpy())), mean.detach().clamp(-1, 1))
    torch.manual_seed(3)
    sample = actor.act(obs.numpy(), std=1.0)
    torch.manual_seed(3)
    noise = torch.tensor([-5.0, 2.0]).exp() * torch.randn(5, 2)
    torch.testing.assert_close(torch.as_tensor(sample), (mean.detach() + noise).clamp(-1, 1))


# --- The learner ---

SMALL = dict(
    env_id="liquidation", pool_size=10, active_models=10, dynamics_hidden=32, dynamics_layers=2, dynamics_epochs=15,
    dynamics_batch=256, dynamics_lr=3e-3, gamma=1.0, hidden=32, batch_size=64, evidence_rows=32, rollout_horizon=20,
    behaviour_updates=200, action_samples=6, actor_lr=1e-3, alpha=0.003, cuda=False,
)  # fmt: skip
RULE = pspo.TERMINAL["liquidation"]


@pytest.fixture(scope="module")
def small():
    """(data, pool): never changed by a test."""
    torch.manual_seed(0)
    columns = pspo.make_dataset(liquidation_env.behaviour_dataset(500, 0), "generated").columns
    data = {key: torch.as_tensor(column) for key, column in columns.items()}
    return data, pspo.train_dynamics(pspo.Args(**SMALL), data, RULE)


def learner_of(small, pool=None, **settings):
    torch.manual_seed(0)
    learner = pspo.PSPO(pspo.Args(**SMALL | settings), small[0], copy.deepcopy(pool or small[1]))
    learner.redraw()
    return learner


@torch.no_grad()
def test_critics_see_the_action_in_units_of_mu():
    """Q depends on the action by (a − mean) / std of μ alone, within ±5."""
    torch.manual_seed(0)
    critic, obs, z = pspo.Critic(3, 2, 16, layer_norm=True), torch.randn(50, 3), torch.randn(50, 2)
    q = critic(obs, z, (torch.zeros(50, 2), torch.zeros(50, 2)))
    mean, log_std = torch.randn(50, 2), torch.randn(50, 2)
    assert torch.allclose(critic(obs, mean + log_std.exp() * z, (mean, log_std)), q, atol=1e-5)
    far = [critic(obs, mean + factor * log_std.exp(), (mean, log_std)) for factor in (3.0, 5.0, 50.0)]
    assert torch.allclose(far[1], far[2], atol=1e-5) and (far[0] - far[1]).abs().mean() > 1e-3


class QuadraticCritic(torch.nn.Module):
    """Q(s, a) = −0.8 (a − p)², p the state's price; the other twin is higher and must not be used."""

    def forward(self, obs, action, mu):
        q = -0.8 * (action[:, 0] - obs[:, 2]).square()
        return torch.stack([q + 1, q])


MU, PI, ALPHA = (-0.3, 0.8), (0.4, 0.5), 0.4  # mean and std of μ and π; a tenth or more of either is clipped


def value_learner(small, alpha=ALPHA, **settings):
    learner = learner_of(small, alpha=alpha, **settings).double()
    for actor, (mean, std) in ((learner.behaviour, MU), (learner.actor, PI)):
        for parameter in actor.net.parameters():
            parameter.data.zero_()
        actor.net.biases[-1].data[0, 0] = torch.tensor([mean, math.log(std)])
    learner.target_critic, learner.value_bounds = QuadraticCritic(), (-math.inf, math.inf)
    return learner


def value_by_quadrature(price, alpha=ALPHA):
    u = torch.linspace(-10, 10, 20_001, dtype=F64)
    density = torch.distributions.Normal(*MU).log_prob(u).exp()
    q = -0.8 * (u.clamp(-1, 1) - price).square()
    return alpha * math.log((density * (q / alpha).exp()).sum() * (u[1] - u[0]))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.05, 0.4, 5.0])
def test_value_by_importance_sampling(small, alpha):
    """Eq. (8): PSPO.value, sampling from the mixture of μ and π, against quadrature over the action; and with 4
    samples exp(V/α) has the right mean, and is at most 2 exp(max Q/α)."""
    learner = value_learner(small, alpha, action_samples=200_000)
    prices = [-0.5, 0.0, 1.5]
    value = learner.value(torch.tensor([[0.0, 0.0, price] for price in prices], dtype=F64))
    exact = [value_by_quadrature(price, alpha) for price in prices]
    assert value.tolist() == pytest.approx(exact, abs=0.007 + 0.006 * alpha)  # 4 standard errors or more
    learner.args.action_samples = 4
    few = (learner.value(torch.tensor([[0.0, 0.0, 0.5]], dtype=F64).expand(50_000, 3)) / alpha).exp()
    expected = math.exp(value_by_quadrature(0.5, alpha) / alpha)
    assert few.mean().item() == pytest.approx(expected, abs=4 * few.std().item() / 50_000**0.5)
    assert few.max() <= 2


@torch.no_grad()
def test_value_without_regularization(small):
    """α = 0, Eq. (5): V = E_π Q, against quadrature."""
    learner = value_learner(small, alpha=0.0, action_samples=200_000)
    value = learner.value(torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)).item()
    u = torch.linspace(-4, 4, 80_001, dtype=F64)
    density = torch.distributions.Normal(*PI).log_prob(u).exp()
    assert value == pytest.approx(-0.8 * ((u.clamp(-1, 1) - 1).square() * density).sum().item() * 1e-4, abs=0.003)


CORRUPTED = [1, 4, 7]


@pytest.mark.parametrize("error, strength, least, most", [
    (0.7, 1.0, 0.0, 0.12), (-0.7, 1.0, 0.0, 0.12), (0.7, 5.0, 0.0, 0.01), (0.7, 0.0, 0.2999, 0.3001),
    (0.0, 1.0, 0.12, 0.6),
])  # fmt: skip
@torch.no_grad()
def test_belief_leaves_models_that_lie(small, error, strength, least, most):
    """Eqs. (3), (4): mass of three models of ten whose reward is off by `error` standard deviations, too high or too
    low (no pessimism), is lost; not at λ = 0 ("Average Utilization"), nor if they are like the others."""
    data, pool = small[0], copy.deepcopy(small[1])
    pool.net.biases[-1][CORRUPTED, 0, 0] += error
    learner = learner_of(small, pool, likelihood_coef=strength)
    for _ in range(60):
        rows = torch.randint(len(data["rewards"]), (32,))
        obs, action, reward, next_obs, ends = (data[key][rows] for key in pspo.KEYS[:5])
        observed = pspo.bellman_target(reward / learner.reward_scale, ends, learner.value(next_obs), 1.0)
        learner.update_belief(obs, action, observed)
    belief = learner.log_belief().exp()
    assert least <= sum(belief[learner.members == member].item() for member in CORRUPTED) <= most


class DisagreeingModels(torch.nn.Module):
    """Model n pays reward n without noise, and moves the state on by one; what it was asked last is kept."""

    def forward(self, obs, action):
        self.asked = obs, action
        reward = torch.arange(10.0)[:, None, None].expand(10, len(obs), 1)
        mean = torch.cat([reward, obs.expand(10, *obs.shape) + 1], -1)
        return mean, torch.zeros_like(mean), mean[..., 0]

    def next(self, mean, std, log_odds, noise):
        assert noise.shape == mean.shape and noise.std() > 0.9
        return mean[..., 0], mean[..., 1:], mean[..., 1] > 3.5


def test_predicted_return_draws_a_model_at_every_step(small):
    """Eq. (1): over 4 steps the mean is 4 E_P[r] and the variance 4 Var_P[r]; one model an episode, Eq. (2), has 16.
    Nothing is earned after the end, here the fourth step or the second, or the given number of steps."""
    learner = learner_of(small)
    learner.active = DisagreeingModels()
    learner.evidence.copy_(1 + torch.linspace(0, 0.2, 10))
    belief, reward = learner.log_belief().exp(), torch.arange(10.0)
    mean = (belief * reward).sum()
    variance = (belief * (reward - mean).square()).sum().item()
    starts = torch.tensor([0.0, 2.0]).repeat_interleave(50_000)[:, None].expand(-1, 3)
    long, short = learner.predicted_return(starts, 20).chunk(2)
    torch.testing.assert_close(learner.active.asked[1], learner.average(learner.active.asked[0])[0].clamp(-1, 1))
    assert long.mean().item() == pytest.approx(4 * mean.item(), abs=4 * (4 * variance / 50_000) ** 0.5)
    assert long.var().item() == pytest.approx(4 * variance, rel=0.05)
    assert short.mean().item() == pytest.approx(2 * mean.item(), rel=0.02)
    assert learner.predicted_return(starts, 1).mean().item() == pytest.approx(mean.item(), rel=0.02)


def test_what_figures_show_of_the_average_policy(small):
    """start_value: the smaller critic at the average's mean action, in the data's unit; target_and_uncertainty: mean
    and spread over P of the models' targets, here of rewards 0 to 9 alone."""
    learner = learner_of(small)
    obs = small[0]["observations"][:7]
    q = learner.critic(obs, learner.average(obs)[0].clamp(-1, 1), learner.behaviour(obs))
    expected = learner.reward_scale * q.min(0).values.mean().item()
    assert learner.start_value(obs) == pytest.approx(expected, rel=1e-5)
    learner.active, learner.value = DisagreeingModels(), lambda obs, copies: torch.zeros(obs.shape[:-1])
    learner.active.next = lambda mean, std, log_odds, noise: (0, mean[..., 1:], mean[..., 0] > 99)
    learner.evidence.copy_(1 + torch.linspace(0, 0.2, 10))
    belief, reward = learner.log_belief().exp(), torch.arange(10.0) / learner.reward_scale
    mean = (belief * reward).sum().item()
    learner.actor.net.biases[-1].data[..., 1] = -2.0  # so narrow that few are clipped
    target, uncertainty = learner.target_and_uncertainty(50)
    asked, action = learner.active.asked
    z = (action - learner.actor(asked)[0]) / learner.actor(asked)[1].exp()  # standard normal: a sample of π
    assert 0.7 < z.std() < 1.3 and z.mean().abs() < 0.5
    assert target.tolist() == pytest.approx([mean] * 50, rel=1e-4)
    assert uncertainty.tolist() == pytest.approx([(belief * (reward - mean) ** 2).sum().sqrt().item()] * 50, rel=1e-4)


@pytest.mark.parametrize("low, high, unit, bounds", [
    (-1.0, 3.0, 4.0, (-2.5, 7.5)), (2.0, 2.0, 2.0, (0, 10)), (-2.0, -2.0, 2.0, (-10, 0)), (0.0, 0.0, 1.0, (0, 0))
])  # fmt: skip
def test_unit_and_bounds_of_values(small, low, high, unit, bounds):
    """Rewards are divided by their range, a constant's own size, or 1; values lie within what those can add up to."""
    data = small[0] | dict(rewards=torch.linspace(low, high, len(small[0]["rewards"])))
    learner = pspo.PSPO(pspo.Args(**SMALL | dict(gamma=0.9)), data, small[1])
    assert learner.reward_scale == unit and learner.value_bounds == pytest.approx(bounds)
    assert 0 <= learner.rollout_age.min() and learner.rollout_age.max() < 20 and len(learner.rollout_age.unique()) > 5
