"""IQL: its equations by hand, its bookkeeping, and the script as a user runs it. Theorems: test_theorems_iql.py."""

import csv
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from d4rl_layout import columns, episodes, toy_data, write
from docs_pages import logged_metrics

import iql

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--iterations", "20", "--eval-every", "10", "--eval-episodes", "2", "--final-episodes", "2"]
TINY += ["--hidden", "8", "--batch-size", "16", "--num-threads", "1", "--no-cuda"]


# --- Equations ---
def test_expectile_loss_and_its_gradient():
    u = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = iql.expectile_loss(u, 0.9)
    assert torch.allclose(loss, torch.tensor([0.4, 0.025, 0.0, 0.9, 8.1], dtype=torch.float64))
    loss.sum().backward()
    assert torch.allclose(u.grad, torch.tensor([-0.4, -0.1, 0.0, 1.8, 5.4], dtype=torch.float64))
    assert torch.allclose(iql.expectile_loss(u, 0.5), 0.5 * u**2)  # τ = 1/2 is least squares, halved


def test_advantage_weights_and_their_clip():
    advantage = torch.tensor([-1.0, 0.0, 1.0, 2.0, 1000.0])
    weights = iql.advantage_weights(advantage, 3.0, 100.0)
    assert torch.allclose(weights, torch.tensor([np.exp(-3), 1, np.exp(3), 100, 100], dtype=torch.float32))
    assert iql.advantage_weights(advantage, 0.0, 100.0).tolist() == [1] * 5  # β = 0: plain behaviour cloning


def test_policy_loss_is_weighted_maximum_likelihood():
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = iql.policy_loss(log_prob, torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx(2.0)
    loss.backward()
    assert log_prob.grad.tolist() == [-1.5, -0.25]


def test_critic_loss_and_target():
    q, reward, value = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0])
    target = iql.bellman_target(reward, torch.tensor([False, True]), value, 0.9)
    assert target.tolist() == [10.0, 1.0]
    assert iql.critic_loss(q, target).item() == pytest.approx((81 + 1) / 2 + (100 + 1) / 2)


def test_gaussian_log_prob_is_not_squashed():
    u, mean, log_std = torch.randn(5, 3), torch.randn(5, 3).tanh(), torch.tensor([-1.0, 0.0, 0.5])
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum(-1)
    assert torch.allclose(iql.gaussian_log_prob(u, mean, log_std), expected, atol=1e-5)


def test_cosine():
    assert iql.cosine(1, 100) == 1 and iql.cosine(51, 100) == pytest.approx(0.5) and 0 < iql.cosine(100, 100) < 1e-3


# --- Networks ---
def test_every_layer_is_orthogonal_with_gain_root_two():
    for weight in iql.MLP(2, [3, 16, 16, 1]).weights:
        for w in weight:
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-5)
    critic = iql.Critic(3, 2, 8)
    assert all((b == 0).all() for b in critic.net.biases)
    q = critic(torch.randn(4, 3), torch.randn(4, 2))
    assert q.shape == (2, 4) and not torch.allclose(q[0], q[1])


def test_twin_critics_are_two_separate_networks():
    critic, obs, action = iql.Critic(3, 2, 8), torch.randn(4, 3), torch.randn(4, 2)
    x = torch.cat([obs, action], -1)
    for i in range(2):
        h = x
        for k, (w, b) in enumerate(zip(critic.net.weights, critic.net.biases, strict=True)):
            h = (h.relu() if k else h) @ w[i] + b[i]
        assert torch.allclose(critic(obs, action)[i], h[:, 0], atol=1e-6)


def test_actor_mean_dropout_and_std():
    torch.manual_seed(0)
    actor, obs = iql.Actor(3, 2, 64), 100 * torch.randn(50, 3)
    assert actor(obs)[0].abs().max() <= 1 and torch.equal(actor(obs)[0], actor(obs)[0])
    assert not torch.equal(actor(obs, 0.1)[0], actor(obs, 0.1)[0])
    assert np.array_equal(actor.act(obs.numpy()), actor(obs)[0].detach().numpy())
    actor.log_std.data[:] = torch.tensor([-9.0, 9.0])
    assert actor(obs)[1].tolist() == [-5, 2]
    samples = np.stack([actor.explore(obs.numpy()) for _ in range(20)])
    assert np.abs(samples).max() == 1 and samples[..., 1].std() > 0.5 and samples[..., 0].std(0).max() < 0.02


# --- The learner ---
def learner(room=0, **changes):
    args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", hidden=16, batch_size=32, **changes))
    torch.manual_seed(0)
    return iql.IQL(args, toy_data(), room)


def update(agent):
    agent.draw()
    return agent.update()


def test_no_action_outside_the_data_reaches_the_critic(monkeypatch):
    agent = learner(dropout=0.1)
    pairs = {tuple(row.tolist()) for row in torch.cat([agent.data["observations"], agent.data["actions"]], -1)}
    seen, forward = [], iql.Critic.forward

    def watched(self, obs, action, *rest):
        seen.append((self, torch.cat([obs, action], -1)))
        return forward(self, obs, action, *rest)

    monkeypatch.setattr(iql.Critic, "forward", watched)
    for _ in range(30):
        update(agent)
    assert {id(net) for net, _ in seen} == {id(agent.critic), id(agent.target_critic)} and len(seen) == 60
    for _, batch in seen:
        assert {tuple(row.tolist()) for row in batch} <= pairs


def test_update_is_the_official_order():
    """Against a second writing of one update: V with Q̄, policy and Q with the new V, then the target."""
    agent, reference = learner(), learner()
    agent.value_optimizer.rates[0].fill_(0.1)
    torch.manual_seed(5)
    update(agent)
    torch.manual_seed(5)
    rows = torch.randint(64, (32,))
    s, a, r, s2, end = (column[rows] for column in reference.data.values())
    target_q = reference.target_critic(s, a).min(0).values.detach()
    u = target_q - reference.value(s)
    loss = (torch.abs(0.7 - (u < 0).float()) * u**2).mean()
    loss.backward()
    torch.optim.Adam(reference.value.parameters(), lr=0.1).step()
    weights = torch.exp(3 * (target_q - reference.value(s))).clamp(max=100).detach()
    mean, log_std = reference.actor(s)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a).sum(-1)
    loss = -(weights * log_prob).mean()
    loss.backward()
    torch.optim.Adam(reference.actor.parameters(), lr=3e-4).step()
    y = (r + 0.99 * (1 - end.float()) * reference.value(s2)).detach()
    q = reference.critic(s, a)
    (((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()).backward()
    torch.optim.Adam(reference.critic.parameters(), lr=3e-4).step()
    for mine, theirs in zip(reference.target_critic.parameters(), reference.critic.parameters(), strict=True):
        mine.data = 0.995 * mine.data + 0.005 * theirs.data
    moments = {}  # the first one after one step: a tenth of the gradient
    for optimizer in (agent.value_optimizer, agent.actor_critic_optimizer):
        moments |= dict(zip(itertools.chain(*optimizer.groups), optimizer.means, strict=True))
    for (name, mine), theirs in zip(agent.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name
        if mine.requires_grad:  # Adam's first step tells no more than the gradient's sign
            assert torch.allclose(moments[mine], theirs.grad / 10, rtol=1e-3, atol=1e-7), name


def test_normalised_observations_have_no_unit():
    """Data in other units train the same networks; without the flag they do not."""
    units, shift = torch.tensor([1e3, 1e-2, 5.0]), torch.tensor([7.0, -3.0, 0.0])
    for flag in (True, False):
        rows = []
        for scale, offset in ((1.0, 0.0), (units, shift)):
            args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", hidden=16, normalize_observations=flag))
            data = toy_data()
            data |= {key: scale * data[key] + offset for key in ("observations", "next_observations")}
            torch.manual_seed(0)
            agent = iql.IQL(args, data)
            rows.append(torch.stack([update(agent) for _ in range(5)]))
            acted = agent.actor.act((scale * torch.ones(1, 3) + offset).numpy())
            rows.append(torch.as_tensor(acted))
        same = torch.allclose(rows[0], rows[2], rtol=1e-3), torch.allclose(rows[1], rows[3], atol=1e-4)
        assert same == (flag, flag)
        net = agent.target_critic.net  # its inputs are the observation and the action; the latter stays
        inputs = (agent.data["observations"] - net.mean[:3]) / net.std[:3]
        standard = inputs.mean(0).abs().max() < 1e-4 and torch.allclose(inputs.std(0), torch.ones(3), atol=1e-4)
        assert bool(standard) == flag and (net.std[3:] == 1).all() and (net.mean[3:] == 0).all()


def test_a_constant_observation_is_not_divided_by_its_spread():
    data = toy_data()
    data["observations"][:, 1] = 5.0  # as ant's contact forces, all 0
    args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", hidden=16, normalize_observations=True))
    agent = iql.IQL(args, data)
    for net in (agent.value.net, agent.actor.net, agent.critic.net, agent.target_critic.net):
        assert net.mean[1] == 5 and net.std[1] == 1
    assert update(agent).isfinite().all()


def test_actions_are_kept_off_the_bounds():
    data = toy_data()
    data["actions"][0] = torch.tensor([1.0, -1.0])
    args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", hidden=8))
    agent = iql.IQL(args, data)
    assert torch.allclose(agent.data["actions"][0], torch.tensor([1 - 1e-5, -1 + 1e-5]), atol=1e-8)
    assert agent.data["actions"].abs().max() < 1


# --- Reward transforms ---
def test_reward_transforms():
    arrays = columns(episodes(4, 3, 2), ("terminal", "timeout", "terminal"))
    arrays["rewards"][:] = [1, 1, 1, 1, 2, 2, 2, 0, -1]  # returns 4, 6, -1
    data = iql.make_dataset(arrays, "name", "source")
    assert iql.reward_transform("return_range", data) == (pytest.approx(1000 / 7), 0.0)
    assert iql.reward_transform("minus_one", data) == (1.0, -1.0)
    assert iql.reward_transform("raw", data) == (1.0, 0.0)


@pytest.mark.parametrize("rows", [1000, 999])
def test_return_range_of_time_limit_episodes(rows):
    """With the file's next states an episode that times out has 1000 rows, without them 999: boundaries hold."""
    arrays = columns(episodes(1000, 1000, 300), ("timeout", "timeout", "terminal"))
    arrays["rewards"] = np.repeat([1.0, 3.0, 2.0], [1000, 1000, 300]).astype(np.float32)
    if rows == 999:
        del arrays["next_observations"]
    scale, _ = iql.reward_transform("return_range", iql.make_dataset(arrays, "name", "source"))
    assert scale == pytest.approx(1000 / (3 * rows - 600))


def test_return_range_needs_a_range():
    arrays = columns(episodes(4, 4), ("terminal", "terminal"))
    arrays["rewards"][:] = 1
    with pytest.raises(iql.UserError, match="use --reward-transform raw"):
        iql.reward_transform("return_range", iql.make_dataset(arrays, "name", "source"))


# --- Fine-tuning ---
class Corridor(gym.Env):
    """Ends by itself after `ends` steps, or is cut after 5 by its time limit; the reward is 7."""

    ends = 3

    def __init__(self, render_mode=None):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))

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


def test_a_time_limit_is_no_terminal():
    for ends, terminals in ((3, [2, 5, 8, 11]), (99, [])):
        agent = learner(room=12, online_steps=12)
        env = gym.wrappers.TimeLimit(Corridor(), 5)
        env.unwrapped.ends = ends
        collector = iql.Collector(env, agent, (2.0, -1.0), seed=0)
        agent.actor.log_std.data[:] = 2
        for _ in range(12):
            collector.step()
        new = {key: column[64:] for key, column in agent.data.items()}
        assert agent.size == 76 and torch.equal(agent.data["observations"][:64], toy_data()["observations"])
        assert np.flatnonzero(new["terminals"]).tolist() == terminals
        assert new["rewards"].tolist() == [13.0] * 12  # transformed, as the data's were
        assert new["actions"].abs().max() == np.float32(1 - 1e-5)
        length = min(ends, 5)
        assert new["observations"][:, 0].tolist() == [i % length for i in range(12)]
        assert new["next_observations"][:, 0].tolist() == [i % length + 1 for i in range(12)]
        inner = torch.arange(12) % length < length - 1
        following = torch.roll(new["observations"], -1, 0)
        assert torch.equal(new["next_observations"][inner][:-1], following[inner][:-1])
        assert collector.finish() == [7.0 * length] * (12 // length)


def test_new_rows_are_learnt_from_and_empty_ones_are_not():
    agent = learner(room=100, online_steps=100)
    agent.data["observations"][64:] = np.nan
    assert update(agent).isfinite().all()
    for _ in range(100):
        agent.add(np.full(3, np.nan), np.zeros(2), 0.0, np.zeros(3), False)
    assert not update(agent).isfinite().all()


# --- Settings ---
def test_settings_per_domain():
    expected = {
        "hopper-medium-v2": (0.7, 3.0, 0.0, "return_range", 10),
        "mujoco/walker2d/expert-v0": (0.7, 3.0, 0.0, "return_range", 10),
        "ant-random-v2": (0.7, 3.0, 0.0, "return_range", 10),
        "antmaze-large-play-v2": (0.9, 10.0, 0.0, "minus_one", 100),
        "D4RL/antmaze/umaze-v1": (0.9, 10.0, 0.0, "minus_one", 100),
        "door-human-v1": (0.7, 0.5, 0.1, "raw", 10),
        "D4RL/kitchen/mixed-v2": (0.7, 0.5, 0.1, "raw", 10),
        "D4RL/pointmaze/umaze-dense-v2": (0.9, 10.0, 0.0, "raw", 20),
    }
    for env_id, values in expected.items():
        args, _ = iql.resolve(iql.Args(env_id=env_id))
        assert (args.expectile, args.beta, args.dropout, args.reward_transform, args.eval_episodes) == values, env_id
        common = (args.gamma, args.hidden, args.batch_size, args.actor_lr, args.critic_lr, args.target_rate)
        assert common == (0.99, 256, 256, 3e-4, 3e-4, 0.005) and args.iterations == 1_000_000
        assert iql.resolve(iql.Args(env_id=env_id, quick=True, beta=2.0))[0].beta == 2.0
    assert len(iql.D4RL_FILES) == 18 + 6 + 5 + 9


def test_paper_scores_of_locomotion():
    """Table 1: nine data sets that sum to 692.6, the paper's 77.0 on average."""
    tasks = itertools.product(("halfcheetah", "hopper", "walker2d"), ("medium", "medium-replay", "medium-expert"))
    scores = [iql.PAPER_SCORES[f"{task}-{level}-v2"] for task, level in tasks]
    assert sum(scores) == pytest.approx(692.6) and np.mean(scores) == pytest.approx(77.0, abs=0.05)


def test_scores():
    assert iql.normalised_score(3234.3, "hopper") == pytest.approx(100)
    assert iql.normalised_score(np.array([0.0, 1.0, 57.0]), "antmaze").tolist() == [0, 100, 100]
    assert iql.normalised_score(12.0, "swimmer") == 12.0


def test_dicts_are_flattened_by_sorted_keys():
    obs = {"observation": np.array([3.0]), "desired_goal": np.array([2.0]), "achieved_goal": {"b": [1.0], "a": [0.0]}}
    assert iql.flatten(obs).tolist() == [0, 1, 2, 3]


class D4RLData:
    """As far as make_eval_env asks: a data set from a file."""

    env_spec, observations = None, np.zeros((1, 29))


robotics = pytest.mark.skipif(not importlib.util.find_spec("gymnasium_robotics"), reason="needs gymnasium-robotics")


@robotics
@pytest.mark.filterwarnings("ignore")
def test_d4rl_antmaze_geometry():
    env = iql.make_eval_env(iql.Args(env_id="antmaze-umaze-v2"), "antmaze", D4RLData)
    obs, _ = env.reset(seed=0)
    model = env.task.ant_env.model
    blocks = [i for i in range(model.ngeom) if "block" in model.geom(i).name]
    walls = {tuple((model.geom_pos[i][:2] - env.origin).tolist()) for i in blocks}
    rows = iql.ANTMAZES["umaze"].split()  # start at column 1, row 1
    expected = {
        (4.0 * (x - 1), 4.0 * (y - 1)) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == "#"
    }
    assert walls == expected and obs.shape == (29,) and np.abs(obs[:2]).max() < 0.1
    assert 0 <= env.goal[0] <= 1.5 and 8 <= env.goal[1] <= 9.5 and env.task.ant_env.dt == pytest.approx(0.1)
    env.goal = obs[:2]
    _, reward, terminated, _, _ = env.step(np.zeros(8, dtype=np.float32))
    assert reward == 1 and terminated


# --- As a user runs it ---
def run(args, cwd, expect=0, env=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    done = subprocess.run(
        [sys.executable, ROOT / "iql.py", *args], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def only_run(folder):
    (found,) = (Path(folder) / "runs").iterdir()
    return found


def in_process(args, monkeypatch, cwd):
    """The same without a new interpreter: the run folder."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["iql.py", *args])
    iql.main()


def metrics(folder):
    return (folder / "metrics.csv").read_text()


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_every_metric_is_documented(tmp_path, monkeypatch):
    """docs/iql.md explains what metrics.csv holds, fine-tuning too: all of it and nothing else."""
    monkeypatch.setattr(iql, "plot", lambda *args: args[-1].touch())
    in_process([*TINY, "--eval-every", "20", "--online-steps", "20", "--dataset-episodes", "20"], monkeypatch, tmp_path)
    assert logged_metrics("iql.md") == rows(only_run(tmp_path))[-1].keys() - {"iteration"}


def test_liquidation_as_a_user_types_it_twice(tmp_path):
    args = [*TINY, "--dataset-episodes", "50", "--final-episodes", "50"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        done = run(args, tmp_path / name)
    assert "exact optimum 137.48" in done.stdout and "the paper reports 0.0" in done.stdout
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    assert metrics(one) == metrics(two) and [row["iteration"] for row in rows(one)] == ["10", "20"]
    names = {path.name for path in one.iterdir()}
    assert {"args.json", "metrics.csv", "result.json", "actor.pt", "figure.png", "checkpoint.pt"} <= names
    result = json.loads((one / "result.json").read_text())
    assert result["domain"] == "liquidation" and result["optimum_score"] == pytest.approx(101.8, abs=0.05)


def hopper_file(path, steps=150):
    """Random play of Hopper-v4 in D4RL's layout."""
    env = gym.make("Hopper-v4")
    parts, rng = {key: [] for key in iql.DATA_KEYS}, np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(steps):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for key, value in zip(parts, (obs, action, reward, next_obs, terminated, truncated), strict=True):
            parts[key].append(value)
        obs = env.reset()[0] if terminated or truncated else next_obs
    return write(path, {key: np.asarray(value) for key, value in parts.items()})


def play_actor(path, obs):
    """The lines of docs/iql.md that play an actor.pt."""
    actor = torch.load(path, weights_only=True)
    h = (torch.as_tensor(obs, dtype=torch.float32) - actor["obs_mean"]) / actor["obs_std"]
    for i, layer in enumerate(actor["layers"]):
        h = (h.relu() if i else h) @ layer["weight"] + layer["bias"]
    return h.tanh().numpy(), actor["log_std"].clamp(*actor["log_std_range"]).exp().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", [[], ["--normalize-observations"]])
def test_hopper_file_and_its_actor(flags, tmp_path, monkeypatch):
    path = hopper_file(tmp_path / "hopper_medium-v2.hdf5")
    in_process([*TINY, "--env-id", "hopper-medium-v2", "--dataset-path", path, *flags], monkeypatch, tmp_path)
    folder = only_run(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert "regenerated or modified" in result["dataset"]["source"] and result["paper_score"] == 66.3
    data = iql.load_dataset("hopper-medium-v2", path)
    returns = iql.episode_returns(data)
    assert result["reward_scale"] == pytest.approx(1000 / (returns.max() - returns.min()))
    agent = learner_of(folder, data)
    mean, std = play_actor(folder / "actor.pt", data.observations[:9])
    assert np.allclose(mean, agent.actor.act(data.observations[:9]), atol=1e-6)
    assert np.allclose(std, agent.actor(torch.zeros(1, 11))[1].exp().detach(), atol=1e-6)
    saved = torch.load(folder / "actor.pt", weights_only=True)
    assert torch.allclose(saved["obs_std"], torch.as_tensor(data.observations).std(0)) == bool(flags)
    assert saved["kind"] == "actor" and saved["squash"] == "tanh of the mean" and saved["data_sha256"] == data.sha256


def learner_of(folder, dataset):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    data = {k: torch.as_tensor(getattr(dataset, k)) for k in list(iql.DATA_KEYS)[:5]}
    agent = iql.IQL(iql.Args(**saved["args"]), data)
    agent.load_state_dict(saved["learner"])
    return agent


class PointMaze(gym.Env):
    """A goal task with dict observations; its space keeps the order of its keyword arguments, unlike Minari."""

    def __init__(self, render_mode=None):
        box = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = gym.spaces.Dict(observation=box, desired_goal=box, achieved_goal=box)
        self.action_space = gym.spaces.Box(-1, 1, (2,))

    def observation(self):
        return {"observation": np.zeros(2), "desired_goal": np.ones(2), "achieved_goal": self.xy.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.xy = self.np_random.uniform(-0.1, 0.1, 2)
        return self.observation(), {}

    def step(self, action):
        self.xy = self.xy + 0.1 * action
        return self.observation(), float(np.linalg.norm(self.xy - 1) < 0.3), False, False, {}


def minari_pointmaze(root, dataset_id, num=6, steps=20):
    import minari
    from minari.data_collector import EpisodeBuffer

    if "IqlTestMaze-v0" not in gym.registry:
        gym.register("IqlTestMaze-v0", f"{__name__}:PointMaze", max_episode_steps=25)
    rng, buffers, arrays = np.random.default_rng(0), [], []
    for i in range(num):
        env = PointMaze()
        steps_of = [env.reset(seed=i)[0]]
        actions = rng.uniform(-0.5, 1, (steps, 2)).astype(np.float32)
        rewards = []
        for action in actions:
            obs, reward, *_ = env.step(action)
            steps_of.append(obs)
            rewards.append(reward)
        last = np.arange(steps) == steps - 1
        observations = {key: np.stack([obs[key] for obs in steps_of]) for key in steps_of[0]}
        buffers.append(
            EpisodeBuffer(
                id=i, observations=observations, actions=actions, rewards=np.array(rewards),
                terminations=np.zeros(steps, bool), truncations=last,
            )
        )  # fmt: skip
        flat = np.concatenate([observations[k] for k in ("achieved_goal", "desired_goal", "observation")], 1)
        arrays.append((flat.astype(np.float32), actions, np.array(rewards, dtype=np.float32)))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=gym.make("IqlTestMaze-v0"))
    return columns(arrays, ["timeout"] * num)


@pytest.fixture
def maze(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return minari_pointmaze(tmp_path, "test/pointmaze/tiny-v0")


@pytest.mark.filterwarnings("ignore")
def test_minari_dict_data_trains_evaluates_and_fine_tunes(maze, tmp_path, monkeypatch):
    args = [*TINY, "--env-id", "test/pointmaze/tiny-v0", "--online-steps", "60", "--eval-every", "30"]
    in_process(args, monkeypatch, tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["domain"] == "pointmaze" and 0 <= result["score"] <= 100 and result["reward_shift"] == -1
    hdf5 = iql.make_dataset(maze, "name", "source")
    assert result["dataset"]["sha256"] == hdf5.sha256  # the same tensors as from an HDF5 file
    table = rows(only_run(tmp_path))
    assert [row["iteration"] for row in table] == ["20", "30", "60", "80"]
    assert [float(row["online/steps"]) for row in table] == [0, 10, 40, 60]
    assert [float(row["online/episodes"]) for row in table] == [0, 0, 1, 0]  # 25 steps an episode, cut at evaluations
    assert result["offline"]["episodes"] == 2
    # evaluation and data agree on what stands where
    env = iql.make_eval_env(
        iql.Args(env_id="test/pointmaze/tiny-v0"), "pointmaze", iql.load_dataset("test/pointmaze/tiny-v0")
    )
    assert env.reset(seed=0)[0][2:].tolist() == [1, 1, 0, 0] and hdf5.observations[0, 2:].tolist() == [1, 1, 0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("online", [0, 60])
def test_resume_is_no_different(maze, tmp_path, monkeypatch, online):
    args = [*TINY, "--env-id", "test/pointmaze/tiny-v0", "--iterations", "90", "--eval-every", "30"]
    args += ["--online-steps", str(online), "--dropout", "0.1"]
    (tmp_path / "whole").mkdir()
    in_process(args, monkeypatch, tmp_path / "whole")
    whole = only_run(tmp_path / "whole")
    for stop in [30, 47, 90, 103, 120, 131] if online else [7, 30, 60]:
        cwd = tmp_path / f"stopped{stop}"
        cwd.mkdir()
        update, count = iql.IQL.update, itertools.count(1)

        def signalled(self, update=update, count=count, stop=stop):
            if next(count) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self)

        monkeypatch.setattr(iql.IQL, "update", signalled)
        with pytest.raises(SystemExit) as stopped:
            in_process(args, monkeypatch, cwd)
        assert stopped.value.code == 143
        saved = torch.load(only_run(cwd) / "checkpoint.pt", weights_only=True)
        assert saved["iteration"] == stop  # the very step, also within an episode
        monkeypatch.setattr(iql.IQL, "update", update)
        in_process(["--resume", str(only_run(cwd))], monkeypatch, cwd)
        assert metrics(only_run(cwd)) == metrics(whole)
        one, two = (torch.load(f / "actor.pt", weights_only=True) for f in (whole, only_run(cwd)))
        assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(one["layers"], two["layers"], strict=True))
        results = [json.loads((f / "result.json").read_text()) for f in (whole, only_run(cwd))]
        assert all(result.pop("seconds") > 0 for result in results)
        assert results[0] == results[1]


def door_file(path):
    """A few short human-like demonstrations: 39 observations, 28 actions, no next_observations."""
    arrays = columns(episodes(30, 25, 20, obs_dim=39, act_dim=28), ["timeout"] * 3)
    del arrays["next_observations"]
    return write(path, arrays)


@robotics
@pytest.mark.filterwarnings("ignore")
def test_door_human_style_data(tmp_path, monkeypatch):
    path = door_file(tmp_path / "door-human-v1.hdf5")
    in_process([*TINY, "--env-id", "door-human-v1", "--dataset-path", path], monkeypatch, tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["args"]["dropout"] == 0.1 and result["reward_scale"] == 1 and np.isfinite(result["score"])


# --- Bad input ---
def error_of(args, monkeypatch, capsys, cwd):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["iql.py", *args])
    with pytest.raises(SystemExit) as stopped:
        iql.main()
    text = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and text.startswith("error: ") and "\n" not in text, text
    return text


@pytest.mark.filterwarnings("ignore")
def test_missing_gymnasium_robotics_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    path = door_file(tmp_path / "door.hdf5")
    text = error_of(["--env-id", "door-human-v1", "--dataset-path", path], monkeypatch, capsys, tmp_path)
    assert "pip install gymnasium-robotics" in text and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env-id", "hoper-medium-v2"], "did you mean hopper-medium-v2"),
        (["--env-id", "hopper-medium-v2", "--dataset-path", "absent.hdf5"], "absent.hdf5 does not exist"),
        (["--expectile", "1.0"], "--expectile 1.0: must be below 1"),
        (["--expectile", "0"], "greater than 0"),
        (["--beta", "-1"], "--beta -1.0: must be 0 or more"),
        (["--dropout", "1"], "must be below 1"),
        (["--batch-size", "-4"], "--batch-size -4"),
        (["--gamma", "1", "--env-id", "hopper-medium-v2"], "γ = 1"),
        (["--online-steps", "-1"], "--online-steps -1"),
        (["--eval-every", "5", "--online-steps", "10", "--dataset-episodes", "5"], "use at least 20"),
        (["--resume", "absent"], "checkpoint.pt does not exist"),
        (["--env-id", "kitchen-partial-v0", "--dataset-path", "door.hdf5"], "--eval-env-id"),
        (["--env-id", "door-human-v1", "--dataset-path", "door.hdf5", "--eval-env-id", "Hopper-v4"], "39 observations"),
        (["--env-id", "hopper-medium-v2", "--dataset-path", "door.hdf5", "--eval-env-id", "No-v7"], "cannot make"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    door_file(tmp_path / "door.hdf5")
    assert message in error_of(args, monkeypatch, capsys, tmp_path)


def test_bad_data_and_files(tmp_path, monkeypatch, capsys):
    text = "not a checkpoint"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_text(text)
    assert "not a readable iql checkpoint" in error_of(["--resume", "run"], monkeypatch, capsys, tmp_path)
    torch.save({"kind": "pspo checkpoint"}, tmp_path / "run" / "checkpoint.pt")
    assert "is not a iql checkpoint file" in error_of(["--resume", "run"], monkeypatch, capsys, tmp_path)
    (tmp_path / "file").write_text("in the way")
    args = [*TINY, "--dataset-episodes", "5", "--runs-dir", "file"]
    assert "choose another --runs-dir" in error_of(args, monkeypatch, capsys, tmp_path)


def test_divergence_is_reported(tmp_path, monkeypatch, capsys):
    args = [*TINY, "--dataset-episodes", "5", "--critic-lr", "1e30"]
    assert "not finite" in error_of(args, monkeypatch, capsys, tmp_path)


def test_resume_refuses_other_data(tmp_path, monkeypatch, capsys):
    arrays = columns(episodes(5, 6, 7), ("terminal",) * 3)
    path = write(tmp_path / "data.hdf5", arrays)
    gym.register("IqlCorridor-v0", Corridor, max_episode_steps=5)
    args = [*TINY, "--env-id", "hopper-medium-v2", "--dataset-path", path, "--eval-env-id", "IqlCorridor-v0"]
    in_process(args, monkeypatch, tmp_path)
    arrays["rewards"] += 1
    write(path, arrays)
    capsys.readouterr()
    assert "other data" in error_of(["--resume", str(only_run(tmp_path))], monkeypatch, capsys, tmp_path)


def test_actor_file_format():
    agent = learner()
    data = iql.make_dataset(columns(episodes(5, 4), ("terminal",) * 2), "name", "source")
    saved = iql.actor_file(agent.actor, iql.Args(), "hopper", data)
    keys = {"kind", "script", "env_id", "domain", "data_sha256", "layers", "activation", "squash", "log_std"}
    assert set(saved) == keys | {"log_std_range", "obs_mean", "obs_std"}
    assert saved["log_std"].shape == (2,) and [tuple(x["weight"].shape) for x in saved["layers"]] == [
        (3, 16), (16, 16), (16, 2)
    ]  # fmt: skip
