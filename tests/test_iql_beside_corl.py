"""benchmark/iql_beside_corl.py with a stand-in for CORL's checkout: a random policy that uses all that CORL uses."""

import csv
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


def command(checkout, *words):
    program = [sys.executable, ROOT / "benchmark/iql_beside_corl.py", "--corl", checkout / "CORL", "--updates", "30"]
    where = ["--runs-dir", checkout / "runs", "--docs-dir", checkout / "docs"]
    return [str(word) for word in (*program, *where, *words)]


def environment(checkout):
    return os.environ | {"D4RL_DATASET_DIR": str(checkout)}


def test_both_sides_run_and_are_reported(checkout):
    done = subprocess.run(
        command(checkout, "--seeds", "1", "2"), env=environment(checkout), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(checkout / "docs/results/iql_beside_corl_hopper-medium-v2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"CORL", "ours", "ours, normalised observations"}
    assert {(r["who"], r["seed"], r["update"]) for r in rows} == {
        (who, seed, update) for who in kinds for seed in "12" for update in ("30", "final")
    }
    assert {row["data"] for row in rows} == {"not D4RL's file"}
    finals = {(row["who"], row["seed"]): float(row["score"]) for row in rows if row["update"] == "final"}
    assert all(-1 < score < 10 for score in finals.values()) and len(set(finals.values())) == 6
    table = (checkout / "docs/results/iql_beside_corl_hopper-medium-v2.md").read_text()
    for who in kinds:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {who} |")]
        one, two = finals[who, "1"], finals[who, "2"]
        half = 12.706 * abs(one - two) / 2  # Student's t of two values
        assert f"{(one + two) / 2:.1f} ± " in line and float(line.split("± ")[1].split(" ")[0]) == pytest.approx(
            half, abs=0.2
        )
    assert (checkout / "docs/figures/iql_beside_corl.png").stat().st_size > 5000
    # What has a result is not run again
    results = sorted((checkout / "runs").rglob("result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    again = subprocess.run(
        command(checkout, "--seeds", "1", "2"), env=environment(checkout), capture_output=True, text=True
    )
    assert again.returncode == 0 and [path.stat().st_mtime_ns for path in results] == times and len(results) == 6


def test_a_failure_says_where_to_look(checkout, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(checkout))
    (checkout / "CORL/algorithms/offline/iql.py").write_text("raise RuntimeError('no such thing')")
    args = iql_beside_corl.Args(corl=checkout / "CORL", updates=30, runs_dir=checkout / "runs")
    log = checkout / "runs/hopper-medium-v2_30/CORL_1/log.txt"
    with pytest.raises(SystemExit, match=f"error: CORL's run failed: {log} says why"):
        iql_beside_corl.run_one(args, "CORL", 1)
    assert "no such thing" in log.read_text() and not log.with_name("result.json").exists()


def test_a_run_of_ours_that_was_stopped_goes_on(checkout, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(checkout))
    args = iql_beside_corl.Args(corl=checkout / "CORL", updates=300, runs_dir=checkout / "runs")
    folder = checkout / "runs/hopper-medium-v2_300/ours_1"
    job = iql_beside_corl.our_job(args, "ours", 1, folder)
    running = subprocess.Popen(job.command(), cwd=ROOT)
    while running.poll() is None and not list(folder.glob("*/checkpoint.pt")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    (run,) = folder.glob("*/")
    assert not (run / "result.json").exists()
    result = iql_beside_corl.run_one(args, "ours", 1)
    assert job.finished() == run and [update for update, _ in result["curve"]] == [300] and np.isfinite(result["final"])
