"""pspo.py as its user meets it: run folders, the same numbers twice, going on after a stop, one-line errors."""

import contextlib
import csv
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from docs_pages import logged_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pspo

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # more is slower on networks this small, much slower on a busy machine

# Redraws, renewals of π_i and evaluations fall on different iterations, so that a stop meets each half done.
TINY = dict(
    cuda=False, num_threads=1, dataset_episodes=300, eval_episodes=50, final_episodes=100, eval_every=10, pool_size=4,
    active_models=3, redraw_every=15, dynamics_hidden=16, dynamics_layers=1, dynamics_epochs=3, dynamics_batch=64,
    dynamics_lr=3e-3, dynamics_patience=0, evidence_rows=16, iterations=40, batch_size=32, hidden=16, model_samples=2,
    action_samples=4, actor_lr=1e-3, critic_lr=1e-3, target_kl=0.5, trust_region_every=7, bc_updates=30,
)  # fmt: skip


def flags(settings):
    """A dictionary of settings as words of a command line."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def start(*words):
    """`python pspo.py …` in the repository's root."""
    command, pipe = [sys.executable, "pspo.py", *map(str, words)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def train(runs_dir, **settings):
    """pspo.run in this process; returns the run folder."""
    return pspo.run(pspo.Args(runs_dir=str(runs_dir), **TINY | settings))


def metrics(run_dir):
    """metrics.csv to the byte: {column: values}."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    return dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))


def only_folder(runs_dir):
    (folder,) = runs_dir.iterdir()
    return folder


@pytest.fixture
def no_figure(monkeypatch):
    """Half of a tiny run's time is drawing."""
    monkeypatch.setattr(pspo, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(run folder, what it printed) of the tiny run, as a user types it. No test changes the folder."""
    runs_dir = tmp_path_factory.mktemp("reference")
    process = start("--runs-dir", runs_dir, *flags(TINY))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return only_folder(runs_dir), out


# --- What a run leaves ---


def test_run_folder(reference):
    """Every file that the documentation promises, and nothing half written."""
    run_dir, out = reference
    names = {path.name for path in run_dir.iterdir()}
    expected = {"actor.pt", "args.json", "checkpoint.pt", "dynamics.pt", "figure.png", "metrics.csv", "result.json"}
    expected |= {"pspo.py"}
    assert expected <= names
    assert [name.startswith("events.out.tfevents") for name in names - expected] == [True]
    assert (run_dir / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert run_dir.name.startswith("liquidation__pspo__1__")
    saved = json.loads((run_dir / "args.json").read_text())
    assert {name: saved[name] for name in TINY} == TINY
    assert None not in (saved[name] for name in ("gamma", "alpha", "rollout_horizon"))  # what was left open is filled
    for words in ("episodes  300", "explained variance", "exact optimum 137.48", "result.json", str(run_dir)):
        assert words in out


def test_metrics(reference):
    """One row per evaluation, all numbers finite; λ, α and η move."""
    columns = {name: np.array(values, float) for name, values in metrics(reference[0]).items()}
    assert columns["iteration"].tolist() == [10, 20, 30, 40]
    assert all(np.isfinite(values).all() for values in columns.values())
    assert (columns["posterior/entropy"] <= np.log(3) + 1e-6).all()
    assert (columns["posterior/largest"] >= 1 / 3 - 1e-6).all()
    for name in ("policy/alpha", "policy/eta", "posterior/largest"):
        assert len(set(columns[name])) == 4
    score = pspo.normalised_score(columns["eval/return"], "liquidation")
    assert columns["eval/score"] == pytest.approx(score)


def test_every_metric_is_documented(reference):
    """docs/pspo.md explains what metrics.csv holds, all of it and nothing else."""
    assert logged_metrics("pspo.md") == metrics(reference[0]).keys() - {"iteration"}


def test_result(reference):
    """result.json: the score of the return, an interval without the reference's minimum, what the run rests on."""
    run_dir, _ = reference
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["env_id"], result["episodes"], result["quick"]) == ("liquidation", 100, False)
    assert 0 <= result["return"] < 250
    assert result["score"] == pytest.approx(100 * result["return"] / 135)
    assert result["return_ci95"] == pytest.approx(1.96 * result["return_std"] / 99**0.5)  # std with ddof=0
    assert result["score_ci95"] == pytest.approx(100 * result["return_ci95"] / 135)
    assert result["optimum"] == pytest.approx(137.48, abs=0.05)
    estimate = result["optimum"] + result["paired_difference"]
    assert result["share_of_optimum"] == pytest.approx(estimate / result["optimum"])
    assert result["discount_ceiling"] <= result["optimum"] + 1e-9
    assert result["share_of_optimum"] <= 1 + 2 * result["share_of_optimum_ci95"]
    assert -1 <= result["spearman"] <= 1
    assert result["args"] == json.loads((run_dir / "args.json").read_text())
    assert result["last"] == {name: pytest.approx(float(v[-1])) for name, v in metrics(run_dir).items()}
    assert result["dataset"]["sha256"] == torch.load(run_dir / "dynamics.pt", weights_only=True)["data_sha256"]
    assert result["versions"]["torch"] == metadata.version("torch")


def test_actor_file_plays_the_reported_return(reference):
    """actor.pt alone, as its docstring explains it, earns result.json's return on the same price paths."""
    run_dir, _ = reference
    actor = torch.load(run_dir / "actor.pt", weights_only=True)
    assert (actor["kind"], actor["script"], actor["activation"], actor["log_std"]) == ("actor", "pspo", "relu", None)

    def act(obs):
        h = (torch.as_tensor(obs) - actor["obs_mean"]) / actor["obs_std"]
        for i, layer in enumerate(actor["layers"]):
            h = (h.relu() if i else h) @ layer["weight"] + layer["bias"]
        return h.chunk(2, dim=-1)[0].tanh().numpy()

    envs = gym.make_vec("liquidation_env:Liquidation-v0", num_envs=100)
    obs, _ = envs.reset(seed=1 + 20_000)
    returns, alive = np.zeros(100), np.ones(100, bool)
    while alive.any():
        obs, reward, terminated, _, _ = envs.step(act(obs))
        returns += alive * reward
        alive &= ~terminated
    result = json.loads((run_dir / "result.json").read_text())
    assert returns.mean() == pytest.approx(result["return"], rel=1e-4)


# --- The same numbers twice, and other numbers ---


def test_same_seed_same_metrics(reference, tmp_path, no_figure):
    """The reference's settings again, in another process: metrics.csv is the same to the byte."""
    run_dir = train(tmp_path)
    assert (run_dir / "metrics.csv").read_bytes() == (reference[0] / "metrics.csv").read_bytes()


def test_switches_change_the_metrics(reference, tmp_path, no_figure):
    """No switch is dead: each changes what is learned, and no two do the same."""
    switches = [
        dict(seed=2), dict(posterior="uniform"), dict(posterior="pessimistic"), dict(evidence="critic"),
        dict(regularization=False), dict(evidence_scale="mean"), dict(evidence_scale="none"),
        dict(likelihood_coef=10.0), dict(likelihood_coef=0.0), dict(gamma=0.9),
        dict(evidence_decay=0.5), dict(trust_region=1e-4), dict(projection="reverse"),
    ]  # fmt: skip
    reports = {"reference": metrics(reference[0])}
    for i, switch in enumerate(switches):
        reports[str(switch)] = metrics(train(tmp_path / str(i), **switch))
    for (name, one), (other_name, other) in itertools.combinations(reports.items(), 2):
        # λ = 0 is the uniform posterior but for the evidence it still computes, hence another stream of noise.
        assert one["critic/loss"] != other["critic/loss"], (name, other_name)
    for switch in (dict(posterior="uniform"), dict(likelihood_coef=0.0)):
        assert np.array(reports[str(switch)]["posterior/entropy"], float) == pytest.approx(np.log(3))
    assert float(reports[str(dict(likelihood_coef=10.0))]["posterior/largest"][-1]) > float(
        reports["reference"]["posterior/largest"][-1]
    )


# --- Going on after a stop ---


def stopped(monkeypatch, runs_dir, owner, method, call, number=signal.SIGINT):
    """Train until the given call of a method has done its work, when a signal arrives."""
    original, count = getattr(owner, method), itertools.count(1)

    def signalled(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(count) == call:
            os.kill(os.getpid(), number)
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(owner, method, signalled)
        train(runs_dir)
    assert stop.value.code == 128 + number
    time.sleep(1.01 - time.time() % 1)  # TensorBoard orders its files by the second in their names
    return only_folder(runs_dir)


def resume(monkeypatch, command):
    """What the user copies from the terminal: python pspo.py …"""
    words = shlex.split(command)
    assert words[:2] == ["python", "pspo.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    pspo.main()


def assert_same(run_dir, reference):
    """Metrics, actor and result are those of the uninterrupted run, to the bit; nothing half written lies about."""
    assert (run_dir / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    actors = [torch.load(folder / "actor.pt", weights_only=True)["layers"] for folder in (run_dir, reference)]
    for mine, theirs in zip(*actors, strict=True):
        assert torch.equal(mine["weight"], theirs["weight"])
        assert torch.equal(mine["bias"], theirs["bias"])
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, reference)]
    for result in results:  # what may differ
        del result["seconds"], result["args"]["runs_dir"]
    assert results[0] == results[1]
    assert not [path.name for path in run_dir.iterdir() if ".part" in path.name]
    events = EventAccumulator(str(run_dir)).Reload()
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    for key in events.Tags()["scalars"]:  # TensorBoard's history: every row, once
        assert [event.step for event in events.Scalars(key)] == [int(row["iteration"]) for row in rows]
        assert [event.value for event in events.Scalars(key)] == pytest.approx([float(row[key]) for row in rows])


@pytest.mark.parametrize(
    ("owner", "method", "call", "phase"),
    [
        (pspo, "beta_nll", 1, "dynamics"),
        (pspo, "beta_nll", 83, "dynamics"),
        (pspo, "explained_variance", 1, "networks"),
        (pspo.PSPO, "log_belief", 17, "policy"),
        (pspo.PSPO, "iterate", 3, "policy"),
        (pspo.PSPO, "iterate", 36, "policy"),
        (pspo.RunLog, "append", 3, "policy"),
        (pspo.PSPO, "start_value", 4, "policy"),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_resume_is_the_uninterrupted_run(
    reference, tmp_path, monkeypatch, capsys, no_figure, owner, method, call, phase
):
    """Stopped by a signal and resumed by the printed command: everything is as in one run."""
    number = signal.SIGTERM if call % 2 else signal.SIGINT
    run_dir = stopped(monkeypatch, tmp_path, owner, method, call, number)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["phase"] == phase
    if method == "iterate":
        assert saved["iteration"] == call  # the very step
    message = capsys.readouterr().err.strip().splitlines()[-1]
    torch.manual_seed(12345)  # another process would have another state
    resume(monkeypatch, message.split("go on with ")[1])
    assert_same(run_dir, reference[0])


def test_stopped_in_behaviour_cloning(reference, tmp_path, monkeypatch, no_figure):
    """gaussian_log_prob is first called by behaviour cloning."""
    run_dir = stopped(monkeypatch, tmp_path, pspo, "gaussian_log_prob", 11)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert (saved["phase"], saved["done"]) == ("behaviour", 11)
    pspo.run(pspo.Args(resume=str(run_dir)))
    assert_same(run_dir, reference[0])


def test_stopped_at_every_phase_in_turn(reference, tmp_path, monkeypatch, no_figure):
    """One run, stopped nine times."""
    run_dir = stopped(monkeypatch, tmp_path, pspo, "beta_nll", 5)
    for owner, method, call in [
        (pspo, "beta_nll", 1), (pspo, "beta_nll", 40), (pspo, "gaussian_log_prob", 3), (pspo, "gaussian_log_prob", 20),
        (pspo.PSPO, "iterate", 2), (pspo.PSPO, "iterate", 1), (pspo.PSPO, "iterate", 12), (pspo.RunLog, "append", 1),
    ]:  # fmt: skip
        original, count = getattr(owner, method), itertools.count(1)

        def signalled(*args, original=original, count=count, call=call):
            result = original(*args)
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
            patch.setattr(owner, method, signalled)
            pspo.run(pspo.Args(resume=str(run_dir)))
    pspo.run(pspo.Args(resume=str(run_dir)))
    assert_same(run_dir, reference[0])


def test_a_checkpoint_at_every_step_changes_nothing(reference, tmp_path, no_figure):
    """--checkpoint-minutes only says how often; results do not depend on it."""
    run_dir = train(tmp_path, checkpoint_minutes=0.0)
    assert (run_dir / "metrics.csv").read_bytes() == (reference[0] / "metrics.csv").read_bytes()


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys, no_figure):
    """Without waiting for a step to end, and with the checkpoint before."""
    original, count = pspo.PSPO.iterate, itertools.count(1)

    def signalled(*args):
        if next(count) == 15:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(pspo.PSPO, "iterate", signalled)
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path)
    run_dir = only_folder(tmp_path)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["iteration"] == 10
    assert f"interrupted: go on with python pspo.py --resume {run_dir}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def stopped_in_the_terminal(number, begun, *words):
    """stderr of `python pspo.py …`, to which the signal comes as soon as begun() is true."""
    process = start(*words)
    while process.poll() is None and not begun():
        time.sleep(0.05)
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    return err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_terminal(tmp_path, number):
    """To the process, as soon as there is a run folder: exit code 130 or 143, and the command to go on works."""
    words = ["--runs-dir", tmp_path, *flags(TINY | dict(iterations=40_000))]
    err = stopped_in_the_terminal(number, lambda: list(tmp_path.glob("*/checkpoint.pt")), *words)
    assert "Traceback" not in err
    run_dir = only_folder(tmp_path)
    assert err.strip().splitlines()[-1] == f"interrupted: go on with python pspo.py --resume {run_dir}"
    stopped_in_the_terminal(number, (run_dir / "metrics.csv").exists, "--resume", run_dir)


def test_nothing_left_to_read(reference, tmp_path, no_figure):
    """A run folder without checkpoint, and one whose pool is gone or was exchanged: one line."""
    with pytest.raises(pspo.UserError, match=r"checkpoint\.pt does not exist"):
        pspo.run(pspo.Args(resume=str(tmp_path)))
    run_dir = shutil.copytree(reference[0], tmp_path / "copy")
    pool = torch.load(run_dir / "dynamics.pt", weights_only=True)
    pspo.save_atomically(pool | {"dataset": "other"}, run_dir / "dynamics.pt")
    with pytest.raises(pspo.UserError, match="not the file that this run wrote"):
        pspo.run(pspo.Args(resume=str(run_dir)))
    (run_dir / "dynamics.pt").unlink()
    with pytest.raises(pspo.UserError, match="not the file that this run wrote"):
        pspo.run(pspo.Args(resume=str(run_dir)))


def test_every_flipped_byte_is_noticed(reference, tmp_path):
    """torch.load reads a file with flipped bits without complaint; ours has a checksum."""
    original = (reference[0] / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    for position in np.random.default_rng(0).integers(len(original) - 71, size=40):
        damaged = bytearray(original)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(pspo.UserError, match="altered or damaged"):
            pspo.load_tensors(path, "pspo checkpoint")


def test_resume_with_other_flags(reference, monkeypatch, capsys, tmp_path):
    """What contradicts the run is refused and named, also where it is the default; what does not is heeded."""
    run_dir = shutil.copytree(reference[0], tmp_path / "copy")
    refused(monkeypatch, capsys, dict(resume=run_dir, seed=5), "--seed 5", "has 1")
    refused(monkeypatch, capsys, dict(resume=run_dir, dynamics_patience=3), "--dynamics-patience 3", "has 0")
    refused(monkeypatch, capsys, dict(resume=run_dir, eval_every=2000), "--eval-every 2000", "has 10")
    refused(monkeypatch, capsys, dict(resume=run_dir, cuda=True), "--cuda True", "has False")
    words = flags(dict(resume=run_dir, seed=1, hidden=16, checkpoint_minutes=7.5))
    monkeypatch.setattr(sys, "argv", ["pspo.py", *words])
    args = pspo.command_line(pspo.Args, "")
    assert (args.resume, args.checkpoint_minutes) == (str(run_dir), 7.5)


def test_resume_with_another_script(reference, monkeypatch, capsys, tmp_path):
    """The run folder has the script that made it, and the message says how to run that one."""
    monkeypatch.setattr(pspo, "SCRIPT", pspo.SCRIPT + b"# edited")
    message = refused(monkeypatch, capsys, dict(resume=reference[0]), "pspo.py with SHA-256", "version that it kept")
    command = message.split("version that it kept: ")[1]
    assert command == f"PYTHONPATH={ROOT} python {reference[0]}/pspo.py --resume {reference[0]}"
    assert (reference[0] / "pspo.py").read_bytes() == (ROOT / "pspo.py").read_bytes()


def test_resume_on_another_machine(reference, monkeypatch, capsys, tmp_path, no_figure):
    """It goes on, and says what the last bits may differ by; another environment is refused."""
    run_dir = shutil.copytree(reference[0], tmp_path / "copy")
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    saved["machine"]["versions"]["torch"] = "1.0"
    pspo.save_atomically(saved, run_dir / "checkpoint.pt")
    pspo.run(pspo.Args(resume=str(run_dir)))
    assert "note: versions was" in capsys.readouterr().out
    pspo.save_atomically(saved | {"environment": "Hopper-v4"}, run_dir / "checkpoint.pt")
    with pytest.raises(pspo.UserError, match=r"other environment \(Hopper-v4\)"):
        pspo.run(pspo.Args(resume=str(run_dir)))


def test_resume_of_a_finished_run(reference, tmp_path, no_figure):
    """Nothing is left to train; the final evaluation is repeated."""
    run_dir = shutil.copytree(reference[0], tmp_path / "copy")
    (run_dir / "result.json").unlink()
    assert pspo.run(pspo.Args(resume=str(run_dir))) == run_dir
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, reference[0])]
    assert results[0]["return"] == results[1]["return"]
    assert (run_dir / "metrics.csv").read_bytes() == (reference[0] / "metrics.csv").read_bytes()


def test_dynamics_of_another_run(reference, tmp_path, no_figure, monkeypatch):
    """--dynamics-path: the pool is not trained again, its sizes come from the file, flags about it are not needed."""

    def no_training(*_):
        raise AssertionError("the pool was trained again")

    monkeypatch.setattr(pspo, "train_dynamics", no_training)
    path = reference[0] / "dynamics.pt"
    run_dir = train(tmp_path, dynamics_path=str(path), pool_size=None, dynamics_hidden=None, dynamics_layers=None)
    saved, theirs = (torch.load(folder / "dynamics.pt", weights_only=True) for folder in (run_dir, reference[0]))
    assert saved["sizes"] == theirs["sizes"] == [4, 3, 1, 16, 1]
    assert all(torch.equal(value, theirs["pool"][key]) for key, value in saved["pool"].items())
    result = json.loads((run_dir / "result.json").read_text())
    assert result["args"]["pool_size"] == 4
    assert result["dynamics"] == json.loads((reference[0] / "result.json").read_text())["dynamics"]


# --- Other data: files in D4RL's format, Minari folders ---


def hopper_columns(rows=400):
    """Random walks near Hopper's start; an episode is 40 rows, every second one ends with a fall."""
    rng = np.random.default_rng(0)
    first = np.tile(np.eye(11)[0] * 1.25, (rows, 1))
    observations = first + 0.02 * rng.standard_normal((rows, 11))
    ends = np.arange(rows) % 40 == 39
    falls = ends & (np.arange(rows) // 40 % 2 == 0)
    next_observations = np.roll(observations, -1, axis=0)
    next_observations[ends] = first[ends] + 0.02 * rng.standard_normal((ends.sum(), 11))
    next_observations[falls, 0] = 0.65
    return dict(
        observations=observations, actions=rng.uniform(-1, 1, (rows, 3)), rewards=1 + 0.3 * rng.standard_normal(rows),
        next_observations=next_observations, terminals=falls, timeouts=ends & ~falls,
    )  # fmt: skip


def write_hdf5(path, columns):
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values.astype(np.float32) if values.dtype.kind == "f" else values
    return str(path)


# Random policies fall after some 20 steps. One evaluation, for the predicted return goes on for 1,000 steps.
HOPPER = dict(
    env_id="hopper-medium-v2", iterations=4, eval_every=4, eval_episodes=1, final_episodes=2, rollout_horizon=10
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_d4rl_file(tmp_path):
    """A file in D4RL's layout trains, and the policy plays in Hopper-v4."""
    path = write_hdf5(tmp_path / "hopper.hdf5", hopper_columns())
    run_dir = train(tmp_path / "runs", dataset_path=path, **HOPPER)
    result = json.loads((run_dir / "result.json").read_text())
    low, high = -20.27, 3234.3
    assert result["score"] == pytest.approx(100 * (result["return"] - low) / (high - low))
    assert result["score_ci95"] == pytest.approx(100 * result["return_ci95"] / (high - low))
    assert (result["domain"], result["episodes"], result["paper_score"]) == ("hopper", 2, 108.5)
    assert "not D4RL's" in result["dataset"]["source"]
    assert result["optimum_score"] is None
    assert result["args"]["gamma"] == 0.99
    assert (run_dir / "figure.png").exists()
    actor = torch.load(run_dir / "actor.pt", weights_only=True)
    assert [tuple(layer["weight"].shape) for layer in actor["layers"]] == [(11, 16), (16, 16), (16, 6)]


@pytest.mark.filterwarnings("ignore")  # Minari asks for the data's authors and code
def test_minari_folder(tmp_path, monkeypatch, no_figure):
    """A Minari folder trains and is played in the environment that it names."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    columns, buffers = hopper_columns(), []
    for i, rows in enumerate(np.split(np.arange(400), 10)):
        states = np.concatenate([columns["observations"][rows], columns["next_observations"][rows[-1:]]])
        keys = ("actions", "rewards", "terminals", "timeouts")
        actions, rewards, ends, cuts = (columns[key][rows] for key in keys)
        buffer = EpisodeBuffer(
            id=i, observations=states, actions=actions.astype(np.float32), rewards=rewards, terminations=ends,
            truncations=cuts,
        )  # fmt: skip
        buffers.append(buffer)
    minari.create_dataset_from_buffers("mujoco/hopper/test-v0", buffers, env="Hopper-v4")
    folder = tmp_path / "minari" / "mujoco" / "hopper" / "test-v0"
    settings = HOPPER | dict(env_id="mujoco/hopper/test-v0", dataset_path=str(folder))
    run_dir = train(tmp_path / "runs", **settings)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["dataset"]["source"] == "Minari mujoco/hopper/test-v0"
    assert (result["domain"], result["paper_score"], result["args"]["eval_env_id"]) == ("hopper", None, None)
    assert run_dir.name.startswith("mujoco_hopper_test-v0__pspo__1__")


# --- Errors: one line that says what to do, exit code 2 ---


def one_line_error(err, *words):
    """The one line on stderr, which must contain the words."""
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return line


def refused(monkeypatch, capsys, settings, *words):
    """Run pspo.main in this process on a command line that must be refused."""
    monkeypatch.setattr(sys, "argv", ["pspo.py", *flags(settings)])
    with pytest.raises(SystemExit) as stop:
        pspo.main()
    assert stop.value.code == 2
    return one_line_error(capsys.readouterr().err, *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(env_id="hoper-medium-v2"), ["hoper-medium-v2", "did you mean hopper-medium-v2"]),
        (dict(env_id="CartPole-v1"), ["CartPole-v1", "liquidation, hopper, walker2d, halfcheetah"]),
        (dict(env_id="hopper-medum-v2"), ["hopper-medum-v2", "did you mean hopper-medium-v2"]),
        (dict(iterations=0), ["--iterations 0", "greater than 0"]),
        (dict(batch_size=-8), ["--batch-size -8", "greater than 0"]),
        (dict(batch_size=1, evidence_rows=1), ["--batch-size 1", "at least 2"]),
        (dict(actor_lr=-1e-3), ["--actor-lr -0.001", "greater than 0"]),
        (dict(critic_lr=float("nan")), ["--critic-lr nan"]),
        (dict(trust_region=float("inf")), ["--trust-region inf"]),
        (dict(alpha=0.0), ["--alpha 0.0", "greater than 0"]),
        (dict(likelihood_coef=-1.0), ["--likelihood-coef -1.0", "0 or more"]),
        (dict(seed=-1), ["--seed -1", "0 or more"]),
        (dict(gamma=1.5), ["--gamma 1.5", "at most 1"]),
        (dict(gamma=1.0, env_id="hopper-medium-v2"), ["--gamma 1.0", "horizon"]),
        (dict(target_rate=2.0), ["--target-rate 2.0", "at most 1"]),
        (dict(evidence_decay=1.0), ["--evidence-decay 1.0", "below 1"]),
        (dict(action_samples=5), ["--action-samples 5", "even"]),
        (dict(active_models=5), ["--active-models 5", "only 4"]),
        (dict(active_models=1, pessimistic_k=1), ["--active-models 1", "at least 2"]),
        (dict(pessimistic_k=4), ["--pessimistic-k 4", "only 3"]),
        (dict(evidence_rows=17), ["--evidence-rows 17", "half of --batch-size"]),
        (dict(eval_env_id="NoSuchEnv-v0"), ["NoSuchEnv", "evaluation environment"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_impossible_arguments(monkeypatch, capsys, tmp_path, settings, words):
    """Refused before any work is done: no run folder is made."""
    refused(monkeypatch, capsys, TINY | dict(runs_dir=tmp_path / "runs") | settings, *words)
    assert not (tmp_path / "runs").exists()


def without_rewards(path):
    write_hdf5(path, {key: values for key, values in hopper_columns().items() if key != "rewards"})


def with_nan(path):
    columns = hopper_columns()
    columns["observations"][7, 3] = np.nan
    write_hdf5(path, columns)


def with_one_action_too_few(path):
    columns = hopper_columns()
    write_hdf5(path, columns | dict(actions=columns["actions"][:, :2]))


def truncated(path):
    write_hdf5(path, hopper_columns())
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, ["does not exist", "--dataset-path"]),
        (truncated, ["not a whole HDF5 file"]),
        (lambda path: path.write_text("hello"), ["not a whole HDF5 file"]),
        (without_rewards, ["no rewards"]),
        (with_nan, ["'observations'", "row 7"]),
        (with_one_action_too_few, ["2 actions", "3 actions", "Hopper"]),
    ],
    ids=["missing", "truncated", "not-HDF5", "no-rewards", "NaN", "wrong-size"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bad_data_files(monkeypatch, capsys, tmp_path, spoil, words):
    """The file and what is wrong with it are named; no run folder is made."""
    path = tmp_path / "data.hdf5"
    spoil(path)
    settings = TINY | HOPPER | dict(dataset_path=path, runs_dir=tmp_path / "runs")
    refused(monkeypatch, capsys, settings, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("spoil", ["missing", "truncated", "dynamics", "actor", "numbers"])
def test_bad_checkpoint(reference, monkeypatch, capsys, tmp_path, spoil):
    """--resume of a folder whose checkpoint is missing, cut off, or a file of another kind."""
    path, original = tmp_path / "checkpoint.pt", reference[0] / "checkpoint.pt"
    if spoil == "truncated":
        path.write_bytes(original.read_bytes()[:5000])
    elif spoil == "numbers":
        torch.save([1, 2, 3], path)
    elif spoil != "missing":
        shutil.copy(reference[0] / f"{spoil}.pt", path)
    refused(monkeypatch, capsys, dict(resume=tmp_path), str(path), "checkpoint file")


@pytest.mark.parametrize("spoil", ["missing", "truncated", "checkpoint", "actor"])
def test_bad_dynamics_file(reference, monkeypatch, capsys, tmp_path, spoil):
    """--dynamics-path to a file that is missing, cut off, or of another kind."""
    path = tmp_path / "dynamics.pt"
    if spoil == "truncated":
        path.write_bytes((reference[0] / "dynamics.pt").read_bytes()[:3000])
    elif spoil != "missing":
        shutil.copy(reference[0] / f"{spoil}.pt", path)
    settings = TINY | dict(dynamics_path=path, runs_dir=tmp_path / "runs")
    refused(monkeypatch, capsys, settings, str(path), "dynamics file")


def test_dynamics_of_other_data(reference, monkeypatch, capsys, tmp_path):
    """A pool belongs to the data it was trained on: another seed is other data, and so is another task."""
    settings = TINY | dict(dynamics_path=reference[0] / "dynamics.pt", runs_dir=tmp_path / "runs")
    refused(monkeypatch, capsys, settings | dict(seed=2), "was trained on liquidation", "train a new pool")


def test_dynamics_pool_too_small(reference, monkeypatch, capsys, tmp_path):
    """N active models cannot be drawn from fewer."""
    settings = TINY | dict(dynamics_path=reference[0] / "dynamics.pt", runs_dir=tmp_path / "runs", active_models=5)
    refused(monkeypatch, capsys, settings, "--active-models 5", "has only 4")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_resume_after_the_data_changed(monkeypatch, capsys, tmp_path, no_figure):
    """The file behind a stopped run is not what it was: going on would mix two data sets."""
    path = write_hdf5(tmp_path / "hopper.hdf5", hopper_columns())
    run_dir = train(tmp_path / "runs", dataset_path=path, **HOPPER)
    write_hdf5(path, hopper_columns(rows=360))
    capsys.readouterr()
    refused(monkeypatch, capsys, dict(resume=run_dir), "trained on other data")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(critic_lr=1e30), "not finite"),
        (dict(actor_lr=1e10), "not finite"),
        (dict(dynamics_lr=1e12), "dynamics models diverged"),
    ],
)
def test_divergence_is_named(tmp_path, no_figure, settings, words):
    """Numbers that run away stop the run with the reason, before they reach the environment."""
    with pytest.raises(pspo.UserError, match=words):
        train(tmp_path, **settings)


@pytest.mark.parametrize(
    ("owner", "name", "call", "words"),
    [
        (pspo, "beta_nll", 50, r"dynamics update 50: loss of model 0, .* not finite: the dynamics models diverged"),
        (pspo, "bellman_target", 37, r"iteration 13: critic/target_max, critic/loss.* not finite: the critic"),
        (
            pspo.Dynamics,
            "split",
            60,
            r"iteration \d+: rollout/state_max.* not finite: the dynamics models' predictions",
        ),
        (pspo, "policy_objective", 33, r"iteration 33: policy/objective not finite: the policy diverges"),
    ],
    ids=["loss", "target", "prediction", "policy"],
)
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    reference, tmp_path, monkeypatch, no_figure, owner, name, call, words
):
    """Each tensor made NaN once: it is named with its step; the checkpoint before it leads to the uninterrupted run."""
    original, count = getattr(owner, name), itertools.count(1)

    def spoiled(*args):
        result = original(*args)
        if next(count) != call:
            return result
        return (
            tuple(x * math.nan if x.is_floating_point() else x for x in result)
            if type(result) is tuple
            else (result * math.nan)
        )

    with monkeypatch.context() as patch, pytest.raises(pspo.UserError, match=words):
        patch.setattr(owner, name, spoiled)
        train(tmp_path)
    run_dir = only_folder(tmp_path)
    pspo.run(pspo.Args(resume=str(run_dir)))
    assert_same(run_dir, reference[0])


def test_errors_of_the_whole_program(tmp_path):
    """The same for the process itself: exit code 2, one line on stderr, no traceback."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "short.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    cases = {
        ("--env-id", "walker-medium-v2"): ["did you mean walker2d-medium-v2"],
        ("--env-id", "hopper-medium-v2", "--dataset-path", tmp_path / "short.hdf5"): ["short.hdf5"],
        ("--runs-dir", tmp_path / "file" / "runs", *flags(TINY)): ["cannot write", "--runs-dir"],
    }
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(*words)) for words in cases]
        for process, words in zip(processes, cases.values(), strict=True):
            _, err = process.communicate()
            assert process.returncode == 2
            one_line_error(err, *words)
