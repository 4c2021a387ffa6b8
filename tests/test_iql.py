"""IQL: its update against the loops of plain.py, its run, networks and settings.

Theorems are in test_theory.py; the command line, data and runs in files of their own.
"""

import math
import sys

import gymnasium as gym
import numpy as np
import plain
import pytest
import torch

import iql

F64 = torch.float64
OBS, ACT = 3, 2
TINY = dict(batch_size=6, hidden=5, actor_lr=1e-2, critic_lr=2e-2, target_rate=0.1, gamma=0.8, cuda=False)


def toy(rows=12, dtype=torch.float32):
    """A data set without sense; every third row is terminal."""
    torch.manual_seed(0)
    uniform = torch.rand(rows, 2 * OBS + ACT + 1, dtype=dtype) * 2 - 1
    obs, action, next_obs, reward = uniform.split((OBS, ACT, OBS, 1), 1)
    columns = dict(observations=obs, actions=action, rewards=reward[:, 0], next_observations=next_obs)
    return columns | dict(terminals=torch.arange(rows) % 3 == 2)


def learner_of(data=None, **settings):
    data, _ = toy() if data is None else data, torch.manual_seed(0)
    return iql.IQL(iql.Args(**TINY | settings), data)


# --- The update written again in plain.py: one row at a time, from the equations ---


@pytest.mark.parametrize("settings", [
    dict(dropout=0.3, expectile=0.9, weight_clip=1.2), dict(normalize_observations=True, beta=10.0, dropout=0.1)
])  # fmt: skip
def test_updates_are_the_equations(settings, monkeypatch):
    """Three updates with two rows met online in the buffer, each tensor of the learner and each metric, in float64."""
    torch.set_default_dtype(F64)
    try:
        data = toy(dtype=F64)
        data["actions"][0] = torch.tensor([1.0, -1.0])
        online = [(torch.randn(OBS), torch.tensor([0.5, 1.0]), 3.0 * i, torch.randn(OBS), i == 1) for i in range(2)]
        learner, tape = learner_of(data, online_steps=4, **settings), plain.Tape()
        for one, other in zip(learner.critic.parameters(), learner.target_critic.parameters(), strict=True):
            assert torch.equal(one, other) and not other.requires_grad
        learner.actor.log_std.data[:] = torch.tensor([-5.5, 0.3])  # one below its range: it stays where it is
        for transition in online:
            learner.add(*transition)
        bound = 1 - 1e-5
        rows = [*zip(*data.values(), strict=True), *online]
        written = plain.IQL(learner, learner.args, [(s, a.clamp(-bound, bound), *rest) for s, a, *rest in rows], tape)
        for update, rate in enumerate((1e-2, 7e-3, 4e-3)):  # main lowers π's rate in place
            learner.actor_critic_optimizer.param_groups[0]["lr"].fill_(rate)
            with tape.recording(monkeypatch):
                metrics = learner.update()
            expected = plain.numbers(written.update(rate))
            found = dict(zip(learner.METRICS, metrics.tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-10) and not tape.drawn, update
            plain.assert_same(learner, written.state)
    finally:
        torch.set_default_dtype(torch.float32)


class Corridor(gym.Env):
    """Ends by itself after 3 steps, or in `endless` is cut after 5 by its time limit; the reward is 7."""

    def __init__(self, ends=3, render_mode=None):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, (OBS,)), gym.spaces.Box(-1, 1, (ACT,))
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.t, *self.np_random.uniform(-1, 1, 2)], dtype=np.float32)

    def step(self, action):
        assert (np.abs(action) <= 1).all()
        self.t += 1
        return self.observation(), 7.0, self.t == self.ends, False, {}


@pytest.mark.parametrize("ends, online", [(3, 12), (99, 12), (3, 0)])
def test_main_fine_tunes_online_and_lowers_the_policys_rate(ends, online, tmp_path, monkeypatch):
    """Online: sampled actions, rewards transformed as the data's were, a time limit that is no terminal, one update
    a step at constant rates. Offline alone: the cosine of π's rate, of no other."""
    agents, rates, stds, update, act = [], [], [], iql.IQL.update, iql.Actor.act

    def watched(self):
        rates.append([float(group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups])
        return update(self)

    def acted(self, obs, std=0.0):
        stds.append(std)
        return act(self, obs, std)

    arrays = {key: column.numpy() for key, column in toy().items()}
    arrays["timeouts"] = np.arange(12) % 4 == 1
    patches = dict(load_arrays=lambda args: (arrays, "toy", None), plot=lambda *args: agents.append(args[3]))
    for name, patch in patches.items():
        monkeypatch.setattr(iql, name, patch)
    monkeypatch.setattr(iql.IQL, "update", watched)
    monkeypatch.setattr(iql.Actor, "act", acted)
    name = f"IqlCorridor{ends}-v0"
    if name not in gym.registry:
        gym.register(name, Corridor, max_episode_steps=5, kwargs=dict(ends=ends))
    flags = f"--env-id {name} --iterations 20 --online-steps {online} --eval-every 20 --eval-episodes 2 --hidden 4 "
    flags += "--final-episodes 2 --batch-size 8 --actor-lr 1e-3 --critic-lr 2e-3 --reward minus_one --no-cuda"
    monkeypatch.setattr(sys, "argv", ["iql.py", *flags.split(), "--dataset-path", "-", "--runs-dir", str(tmp_path)])
    iql.main()
    data, kept = agents[0].data, len(arrays["rewards"])
    assert len(rates) == 20 + online and agents[0].size == len(data["rewards"]) == kept + online
    assert np.allclose([(v, q) for v, _, q in rates], 2e-3)
    share = [1.0] * len(rates) if online else [(1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    assert np.allclose([rate for _, rate, _ in rates], 1e-3 * np.array(share), rtol=1e-4, atol=1e-9)
    assert stds.count(1.0) == online and stds.count(0.0) == len(stds) - online
    assert np.allclose(data["rewards"][:kept], arrays["rewards"] - 1)
    new, length = {key: column[kept:] for key, column in data.items()}, min(ends, 5)
    assert new["rewards"].tolist() == [6.0] * online
    assert np.flatnonzero(new["terminals"]).tolist() == ([2, 5, 8, 11] if ends == 3 else [])[:online]
    assert new["observations"][:, 0].tolist() == [i % length for i in range(online)]
    assert new["next_observations"][:, 0].tolist() == [i % length + 1 for i in range(online)]
    inner = torch.arange(online) % length < length - 1
    following = torch.roll(new["observations"], -1, 0)
    assert torch.equal(new["next_observations"][inner][:-1], following[inner][:-1])


# --- Networks ---


def test_every_layer_is_orthogonal_with_gain_root_two():
    """The official initial weights, in all networks: also of the last layer; biases 0; the twins are different."""
    agent = learner_of()
    for net in (agent.actor.net, agent.critic.net, agent.value.net):
        assert all((bias == 0).all() for bias in net.biases)
        for weight in net.weights:
            for w in weight:
                gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
                torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert (agent.critic.net.weights[0][0] != agent.critic.net.weights[0][1]).any()
    assert agent.actor.log_std.tolist() == [0, 0]


def test_actor_acts_by_its_mean_or_a_clipped_sample():
    """The mean is tanh of the network; std = 1 adds noise of the policy's own std, kept in [exp −5, exp 2]."""
    torch.manual_seed(0)
    actor, obs = iql.Actor(3, 2, 8), torch.randn(50, 3)
    actor.net.mean.fill_(0.5)
    mean = actor(obs)[0].detach()
    assert np.allclose(actor.act(obs.numpy()), mean) and mean.abs().max() <= 1
    for log_std, kept in (([-9.0, 9.0], [-5.0, 2.0]), ([-1.0, -2.0], [-1.0, -2.0])):
        actor.log_std.data[:] = torch.tensor(log_std)
        assert actor(obs)[1].tolist() == kept
        torch.manual_seed(3)
        sample = actor.act(obs.numpy(), std=1.0)
        torch.manual_seed(3)
        noise = torch.tensor(kept).exp() * torch.randn(50, 2)
        assert np.allclose(sample, (mean + noise).clamp(-1, 1), atol=1e-6)


# --- The learner ---


def test_no_action_outside_the_data_reaches_the_critic(monkeypatch):
    """What IQL is about: Q and Q̄ are only asked of pairs (s, a) that are in the data."""
    agent, seen, forward = learner_of(dropout=0.1), [], iql.Critic.forward
    pairs = {tuple(row.tolist()) for row in torch.cat([agent.data["observations"], agent.data["actions"]], -1)}

    def watched(self, obs, action):
        seen.append((id(self), torch.cat([obs, action], -1)))
        return forward(self, obs, action)

    monkeypatch.setattr(iql.Critic, "forward", watched)
    for _ in range(30):
        agent.update()
    assert {net for net, _ in seen} == {id(agent.critic), id(agent.target_critic)} and len(seen) == 60
    assert all({tuple(row.tolist()) for row in batch} <= pairs for _, batch in seen)


@pytest.mark.parametrize("flag", [True, False])
def test_normalised_observations_have_no_unit(flag):
    """Data in other units train the same networks; without the flag they do not. The action's part stays as it is."""
    units, shift, found = torch.tensor([1e3, 1e-2, 5.0]), torch.tensor([7.0, -3.0, 0.0]), []
    for scale, offset in ((torch.ones(3), torch.zeros(3)), (units, shift)):
        data = toy()
        data |= {key: scale * data[key] + offset for key in ("observations", "next_observations")}
        agent = learner_of(data, normalize_observations=flag)
        found.append([torch.stack([agent.update() for _ in range(3)])])
        found[-1].append(torch.as_tensor(agent.actor.act((scale * torch.ones(1, 3) + offset).numpy())))
    assert [torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found, strict=True)] == [flag, flag]
    for net in (agent.value.net, agent.actor.net, agent.critic.net, agent.target_critic.net):
        inputs = (data["observations"] - net.mean[:3]) / net.std[:3]
        assert bool(inputs.mean(0).abs().max() < 1e-3 and (inputs.std(0) - 1).abs().max() < 1e-3) == flag
        assert (net.std[3:] == 1).all() and (net.mean[3:] == 0).all()


def test_actions_are_kept_off_the_bounds_and_a_constant_column_is_harmless():
    """Actions of the data and those met online; a constant observation (ant's contact forces) trains."""
    data = toy()
    data["actions"][0], data["observations"][:, 1] = torch.tensor([1.0, -1.0]), 0.0
    agent = learner_of(data, normalize_observations=True, online_steps=2)
    agent.add(np.zeros(3), np.array([-1.0, 1.0]), 0.0, np.zeros(3), False)
    edge = torch.tensor([1 - 1e-5, -1 + 1e-5])
    assert torch.equal(agent.data["actions"][0], edge) and torch.equal(agent.data["actions"][12], -edge)
    assert agent.value.net.std[1] == 1 and agent.update().isfinite().all()


def test_reward_transforms():
    """Returns of the data span 1,000; r − 1; r; and no range is no transform."""
    returns = np.array([4.0, 6.0, -1.0])
    assert iql.reward_scale("return_range", returns) == (pytest.approx(1000 / 7), 0.0)
    assert iql.reward_scale("minus_one", returns) == (1.0, -1.0) and iql.reward_scale("raw", returns) == (1.0, 0.0)
    for same in (np.ones(3), np.ones(0)):
        assert iql.reward_scale("return_range", same) == (1.0, 0.0)


def test_settings_and_scores_of_the_paper(monkeypatch):
    """What the command line has for each domain, and Table 1's average of 77.0."""
    expected = {
        **dict.fromkeys(("hopper-medium-v2", "mujoco/walker2d/expert-v0"), (0.7, 3.0, 0.0, "return_range")),
        "antmaze-large-play-v2": (0.9, 10.0, 0.0, "minus_one"), "D4RL/antmaze/umaze-v1": (0.9, 10.0, 0.0, "minus_one"),
        "door-human-v1": (0.7, 0.5, 0.1, "raw"), "D4RL/kitchen/mixed-v2": (0.7, 0.5, 0.1, "raw"),
    }  # fmt: skip
    for env_id, values in expected.items():
        monkeypatch.setattr(sys, "argv", ["iql.py", "--env-id", env_id])
        args = iql.parse()
        assert (args.expectile, args.beta, args.dropout, args.reward) == values, env_id
        common = args.gamma, args.hidden, args.batch_size, args.actor_lr, args.critic_lr, args.target_rate
        assert common == (0.99, 256, 256, 3e-4, 3e-4, 0.005) and (args.iterations, args.weight_clip) == (10**6, 100)
    scores = [score for name, (_, score) in iql.PAPER.items() if name != "liquidation"]
    assert len(scores) == 9 and np.mean(scores) == pytest.approx(77.0, abs=0.05)
