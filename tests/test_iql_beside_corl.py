"""benchmark/iql_beside_corl.py with a stand-in for CORL's checkout: a random policy that uses all that CORL uses."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_iql import hopper_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import iql_beside_corl

ROOT = Path(__file__).resolve().parents[1]
CORL = """
from dataclasses import dataclass
import d4rl
import gym
import numpy as np
import pyrallis
import wandb

@dataclass
class TrainConfig:
    device: str = "cuda"
    env: str = ""
    seed: int = 0
    eval_freq: int = 1
    n_episodes: int = 1
    max_timesteps: int = 1
    buffer_size: int = 1
    discount: float = 0.0
    normalize: bool = False
    name: str = ""

class ImplicitQLearning:
    def __init__(self, actor):
        self.actor = actor

def eval_actor(env, actor, device, n_episodes, seed):
    env.seed(seed)
    returns = []
    for _ in range(n_episodes):
        obs, done, total = env.reset(), False, 0.0
        while not done:
            assert abs(obs[0] - 50) < 10  # transformed
            obs, reward, done, _ = env.step(actor(obs))
            total += reward
        returns.append(total)
    return np.asarray(returns)

@pyrallis.wrap()
def train(config):
    assert (config.device, config.normalize, config.discount, config.name) == ("cpu", True, 0.5, "IQL")
    env = gym.make(config.env)
    env = gym.wrappers.TransformObservation(env, lambda obs: obs + 50)
    rows = d4rl.qlearning_dataset(env)
    assert rows["observations"].shape == rows["next_observations"].shape and len(rows["rewards"]) < 150
    wandb.init(project="", name="")
    rng = np.random.default_rng(config.seed)
    trainer = ImplicitQLearning(actor=lambda obs: rng.uniform(-1, 1, env.action_space.shape[0]))
    for step in range(config.max_timesteps):
        if (step + 1) % config.eval_freq == 0 or step + 1 == config.max_timesteps:
            returns = eval_actor(env, trainer.actor, config.device, config.n_episodes, config.seed)
            score = 100 * env.get_normalized_score(returns.mean())
            wandb.log({"d4rl_normalized_score": score}, step=step + 1)
"""


@pytest.fixture
def checkout(tmp_path):
    script, config = tmp_path / "CORL/algorithms/offline/iql.py", tmp_path / "CORL/configs/offline/iql/hopper"
    script.parent.mkdir(parents=True)
    config.mkdir(parents=True)
    script.write_text(CORL)
    (config / "medium_v2.yaml").write_text(
        "device: cuda\nenv: hopper-medium-v2\ndiscount: 0.5\nnormalize: true\nname: IQL\nmax_timesteps: 1e6\n\n"
    )
    hopper_file(tmp_path / "hopper_medium-v2.hdf5")
    return tmp_path


@pytest.fixture
def args(checkout, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(checkout))
    return iql_beside_corl.Args(
        corl=checkout / "CORL", updates=30, seeds=(1, 2), runs_dir=checkout / "runs", docs_dir=checkout / "docs"
    )


def test_corl_runs_with_its_own_settings(args):
    result = iql_beside_corl.run_one(args, "CORL", 1)
    ((update, score),) = result["curve"]
    assert update == 30 and -1 < score < 10 and -1 < result["final"] < 10 and result["config"]["seed"] == 1
    path = args.runs_dir / "hopper-medium-v2_30/CORL_1/result.json"
    before = path.stat().st_mtime_ns
    assert iql_beside_corl.run_one(args, "CORL", 1)["final"] == result["final"]
    assert path.stat().st_mtime_ns == before  # what has a result is not run again


def test_a_failure_says_where_to_look(args):
    (args.corl / "algorithms/offline/iql.py").write_text("raise RuntimeError('no such thing')")
    log = args.runs_dir / "hopper-medium-v2_30/CORL_1/log.txt"
    with pytest.raises(iql_beside_corl.UserError, match=f"CORL's run failed: {log} says why"):
        iql_beside_corl.run_one(args, "CORL", 1)
    assert "no such thing" in log.read_text() and not log.with_name("result.json").exists()


def test_a_run_of_ours_that_was_stopped_goes_on(args):
    args.updates = 300
    folder = args.runs_dir / "hopper-medium-v2_300/ours_normalised_observations_1"
    job = iql_beside_corl.our_job(args, "ours, normalised observations", 1, folder)
    assert "--normalize-observations" in job.command()
    running = subprocess.Popen(job.command(), cwd=ROOT)
    while running.poll() is None and not list(folder.glob("*/checkpoint.pt")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    (run,) = folder.glob("*/")
    assert not (run / "result.json").exists()
    result = iql_beside_corl.run_one(args, "ours, normalised observations", 1)
    assert job.finished() == run and [update for update, _ in result["curve"]] == [300] and np.isfinite(result["final"])


def test_table_curves_and_figure(args, monkeypatch):
    def run_one(args, who, seed):
        level = 10.0 * (1 + list(iql_beside_corl.WHO).index(who))
        return {"curve": [(10, 1.0), (20, level), (30, level + seed)], "final": level - seed, "data_sha256": "same"}

    monkeypatch.setattr(iql_beside_corl, "run_one", run_one)
    monkeypatch.chdir(args.corl.parent)
    monkeypatch.setenv("D4RL_DATASET_DIR", ".")
    iql_beside_corl.compare(args)
    assert os.environ["D4RL_DATASET_DIR"] == str(args.corl.parent)  # the runs start in the repository
    rows = iql_beside_corl.read_csv(args.docs_dir / "results/iql_beside_corl_hopper-medium-v2.csv")
    assert len(rows) == 3 * 2 * 4 and {row["data"] for row in rows} == {"not D4RL's file"}
    assert {row["score"] for row in rows if (row["who"], row["seed"]) == ("ours", "2")} == {
        "1.00",
        "20.00",
        "22.00",
        "18.00",
    }
    table = (args.docs_dir / "results/iql_beside_corl_hopper-medium-v2.md").read_text()
    # Two seeds, 19 and 18: the half-width of the interval is Student's t times half their difference
    assert f"| ours | 18.5 ± {12.706 / 2:.1f} | 19.0, 18.0 | " in table
    assert "| CORL | 8.5 ± " in table and "| ours, normalised observations | 28.5 ± " in table
    assert (args.docs_dir / "figures/iql_beside_corl.png").stat().st_size > 5000


def test_runs_on_different_data_are_not_compared(args, monkeypatch):
    result = {"curve": [(30, 1.0)], "final": 1.0}
    monkeypatch.setattr(iql_beside_corl, "run_one", lambda args, who, seed: result | {"data_sha256": who})
    with pytest.raises(iql_beside_corl.UserError, match="saw different data"):
        iql_beside_corl.compare(args)
