"""Runs as a user meets them: the same bytes twice and after a kill, what is printed and saved, one-line errors."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import columns, write

import iql
import liquidation_env
import pspo

SCRIPTS = {"iql": iql, "pspo": pspo}
BOTH = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
SHORT = dict(
    num_threads=1, hidden=8, iterations=6, eval_every=3, eval_episodes=3, final_episodes=4, batch_size=64,
    dataset_episodes=30, cuda=False,
)  # fmt: skip
TINY = {
    "iql": SHORT,
    "pspo": SHORT | dict(
        pool_size=3, active_models=2, dynamics_hidden=8, dynamics_layers=1, dynamics_epochs=1,
        dynamics_batch=64, behaviour_updates=2, evidence_rows=4, action_samples=2, trust_region_every=3,
        layer_norm=True,
    ),
}  # fmt: skip


def words(script, **settings):
    """Tiny settings, and others, as words of a command line."""
    line = []
    for name, value in (TINY[script.__name__] | settings).items():
        name = name.replace("_", "-")
        line += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return line


def main(script, *line):
    """`python script.py …` in this process."""
    before = sys.argv, torch.get_num_threads()
    sys.argv = [script.__file__, *map(str, line)]
    try:
        script.main()
    finally:
        sys.argv = before[0]
        torch.set_num_threads(before[1])


def train(script, runs_dir, **settings):
    """A tiny run in this process: its folder."""
    main(script, *words(script, runs_dir=runs_dir, **settings))
    return only(runs_dir)


def only(folder):
    (path,) = Path(folder).iterdir()
    return path


def refused(script, *line):
    """The one line that a command stops with; exit code 1, for Python prints a string and exits with 1."""
    with pytest.raises(SystemExit) as error:
        main(script, *line)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def left(run_dir):
    """What two runs must agree in, to the byte."""
    return (run_dir / "metrics.csv").read_bytes(), (run_dir / "actor.pt").read_bytes()


def start(*line, **more):
    """A command in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, *map(str, line)], **pipes, **more)


def rows(episodes=10, **sizes):
    """Columns in D4RL's layout: random walks of 20 rows, cut by a time limit."""
    return columns([20] * episodes, ["timeout"] * episodes, **sizes)


@pytest.fixture
def no_figure(monkeypatch):
    """Half of a tiny run's time is drawing."""
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "plot", lambda *_: None)


# --- As it is typed: stopped by Ctrl-C or killed, then gone on with ---
AS_TYPED = {"iql": dict(iterations=1200, eval_every=120), "pspo": dict(iterations=180, eval_every=36)}


@pytest.fixture(scope="module", params=SCRIPTS)
def typed(request, tmp_path_factory):
    """(script, run folder, printed before the stop, after it, run folder of the same that nobody stopped)."""
    script, folder = SCRIPTS[request.param], tmp_path_factory.mktemp(request.param)
    line = words(script, runs_dir="runs", **AS_TYPED[request.param])
    process = start(script.__file__, *line, cwd=folder)
    first = ""
    for line_out in process.stdout:
        first += line_out
        if first.count("\niteration ") == 2:  # the first one is saved
            process.send_signal(signal.SIGINT if script is iql else signal.SIGKILL)
            break
    rest, error = process.communicate()
    assert process.returncode == -(signal.SIGINT if script is iql else signal.SIGKILL), error
    run_dir = only(folder / "runs")
    assert not (run_dir / "result.json").exists()
    assert f"run folder: runs/{run_dir.name} (--resume goes on" in first
    process = start(script.__file__, "--resume", f"runs/{run_dir.name}", cwd=folder)
    second, error = process.communicate()
    assert process.returncode == 0 and "Traceback" not in error, error
    whole = train(script, folder / "whole", **AS_TYPED[request.param])
    return script, run_dir, first + rest, second, whole


def test_stopped_and_gone_on_with_gives_the_same_bytes(typed):
    _, run_dir, _, _, whole = typed
    assert left(run_dir) == left(whole)


def test_what_is_printed_and_left(typed):
    script, run_dir, first, second, whole = typed
    files = ["actor.pt", "args.json", "checkpoint.pt", "figure.png", "metrics.csv", "result.json"]
    assert sorted(path.name for path in whole.iterdir() if not path.name.startswith("events")) == files
    assert (run_dir / "figure.png").read_bytes().startswith(b"\x89PNG")
    with open(whole / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    lines = [line for line in (first + second).splitlines() if line.startswith("iteration ")]
    for row in table:  # a plain line for every evaluation, where there is no terminal
        start = f"iteration {int(row['iteration']):,}: score {float(row['eval/score']):.4g}, "
        assert any(line.startswith(start) for line in lines)
    assert first.startswith("data: liquidation, generated, seed 1: ") and "30 episodes, return " in first
    assert "of the exact optimum 137.48" in second and "PSPO's paper" in second and "\r" not in second

    def no(constant):
        raise ValueError(constant)

    result = json.loads((run_dir / "result.json").read_text(), parse_constant=no)  # strict: no NaN
    assert result["episodes"] == 4 and result["score"] == pytest.approx(result["return"] / 1.35)
    assert f"score {result['score']:.1f} ± {result['score_ci95']:.1f}" in second
    same = json.loads((whole / "result.json").read_text())
    assert all(result[key] == same[key] for key in ("score", "return", "sha256", "share_of_optimum", "compared_with"))
    assert ("IQL in PSPO's paper (its own has no such task)" in result["compared_with"]) == (script is iql)
    actor = torch.load(whole / "actor.pt", weights_only=True)
    assert actor["env_id"] == "liquidation" and actor["action_high"].tolist() == [1]


# --- Killed at every kind of moment ---
MOMENTS = {  # what is called when the kill comes, and how often it has been called by then
    "between evaluations": (("step", 11),),
    "before a checkpoint is put in place": (("replace", 3),),
    "twice": (("step", 5), ("step", 4)),
    "after the last checkpoint": (("replace", 6),),
}


def child(script, kill, number, line):
    """A run in a forked process, which kills itself."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def deadly(call):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        where, name = {
            "step": (script.IQL, "update") if script is iql else (script.PSPO, "evaluate_policy"),
            "replace": (os, "replace"),
        }[kill]
        setattr(where, name, deadly(getattr(where, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with contextlib.suppress(BaseException):
            main(script, *line)
        os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """Run folders of what the kills below interrupt."""
    folder = tmp_path_factory.mktemp("unkilled")
    KILLED["iql"]["dataset_path"] = write(folder / "data.hdf5", rows(act_dim=1))
    return {name: train(script, folder / name, **KILLED[name]) for name, script in SCRIPTS.items()}


KILLED = {"iql": dict(env_id="test_data:Brief-v0", iterations=6, online_steps=8, eval_every=3)}
KILLED["pspo"] = dict(iterations=15, eval_every=3)


@pytest.mark.parametrize("moment", MOMENTS)
@BOTH
def test_killed_and_resumed(script, moment, unkilled, tmp_path, no_figure):
    settings, line = KILLED[script.__name__], None
    for kill, number in MOMENTS[moment]:
        line = ["--resume", only(tmp_path)] if line else words(script, runs_dir=tmp_path, **settings)
        assert child(script, kill, number, line) == signal.SIGKILL
    main(script, "--resume", only(tmp_path))
    assert left(only(tmp_path)) == left(unkilled[script.__name__])


# --- Resuming elsewhere ---
@BOTH
def test_resume_with_moved_data(script, tmp_path, no_figure):
    data = dict(env_id="plant", eval_episodes=0, dataset_path=write(tmp_path / "a.hdf5", rows(obs_dim=11)))
    run_dir = train(script, tmp_path / "runs", **data)
    bytes_left, kept = left(run_dir), [run_dir / "checkpoint.pt", run_dir / "args.json"]
    saved = [path.read_bytes() for path in kept]
    (run_dir / "actor.pt").unlink()
    shutil.move(tmp_path / "a.hdf5", tmp_path / "b.hdf5")
    assert "No such file or directory" in refused(script, "--resume", run_dir)
    for other in (dict(obs_dim=11, seed=1), dict(obs_dim=7)):
        write(tmp_path / "c.hdf5", rows(**other))
        said = refused(script, "--resume", run_dir, "--dataset-path", tmp_path / "c.hdf5")
        assert "other data (by SHA-256)" in said and [path.read_bytes() for path in kept] == saved
    said = refused(script, "--resume", run_dir, "--gamma", "0.5")
    assert "--gamma: " in said and "has 0.99; leave the flag out" in said
    assert "the one that made it" in refused(iql if script is pspo else pspo, "--resume", run_dir)
    main(script, "--resume", run_dir, "--dataset-path", tmp_path / "b.hdf5", "--num-threads", "2")
    assert left(run_dir) == bytes_left
    args = json.loads((run_dir / "args.json").read_text())
    assert args["dataset_path"] == str(tmp_path / "b.hdf5") and args["num_threads"] == 2 and args["resume"] == ""


@BOTH
def test_resume_of_a_run_from_another_device(script, tmp_path, no_figure, monkeypatch):
    """torch records a step on a GPU only if the optimiser says so; a checkpoint of a CPU says no, and the reverse."""
    path, learners, restore = train(script, tmp_path) / "checkpoint.pt", [], script.restore
    saved = torch.load(path, weights_only=True)
    for optimizer in saved["optimizers"]:
        for group in optimizer["param_groups"]:
            group["capturable"] = True
    torch.save(saved | dict(seconds=6000.0), path)
    monkeypatch.setattr(script, "restore", lambda *args: (learners.append(args[1]), restore(*args))[1])
    main(script, "--resume", path.parent)
    assert not any(group["capturable"] for x in learners[0].optimizers for group in x.param_groups)
    assert json.loads(path.with_name("result.json").read_text())["minutes"] > 100  # those before the stop count


@BOTH
def test_resume_with_and_without_tracking(script, tmp_path, no_figure, monkeypatch, capsys):
    """A stand-in for wandb. --no-track is heeded though it is the default, and the id is the same twice."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text("calls = []\ndef init(**words):\n    calls.append(words)\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "lib")
        run_dir = train(script, tmp_path / "runs", track=True)
        main(script, "--resume", run_dir)
        one, two = sys.modules.pop("wandb").calls
    assert one["id"] == two["id"] == run_dir.name and two["resume"] == "allow"
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "wandb" else name)
    assert "pip install wandb" in refused(script, "--resume", run_dir)
    main(script, "--resume", run_dir, "--no-track")
    assert json.loads((run_dir / "args.json").read_text())["track"] is False
    assert "pip install wandb" in refused(script, "--track")


# --- One's own environment, no environment, one file alone ---
@BOTH
@pytest.mark.parametrize("how", ["eval_env_id", "env_id"])
def test_own_environment(script, how, tmp_path, no_figure, capsys):
    names = dict(env_id="test_data:Brief-v0") if how == "env_id" else dict(env_id="x", eval_env_id="test_data:Brief-v0")
    run_dir = train(script, tmp_path / "runs", **names, dataset_path=write(tmp_path / "x.hdf5", rows(act_dim=1)))
    result = json.loads((run_dir / "result.json").read_text())
    assert result["score"] == result["return"]
    assert "no reference scores, so its return: " in capsys.readouterr().out
    assert torch.load(run_dir / "actor.pt", weights_only=True)["action_high"].tolist() == [3]


@BOTH
def test_the_optimum_is_in_the_unit_of_the_score(script, tmp_path, no_figure, capsys):
    data = write(tmp_path / "data.hdf5", liquidation_env.behaviour_dataset(30, 1))
    train(script, tmp_path / "runs", env_id="liquidation_env:Liquidation-v0", dataset_path=data)
    assert "no reference scores, so its return" in (said := capsys.readouterr().out) and "optimum 137.5" in said


@BOTH
def test_without_an_environment(script, tmp_path, no_figure):
    file = write(tmp_path / "plant.hdf5", rows(obs_dim=5) | {"actions": rows()["actions"] * 7})
    run_dir = train(script, tmp_path / "runs", env_id="plant", dataset_path=file, eval_episodes=0)
    result = json.loads((run_dir / "result.json").read_text())
    assert "score" not in result and "eval/score" not in (run_dir / "metrics.csv").read_text()
    assert "actions tell their bounds" in result["notes"][0]
    assert torch.load(run_dir / "actor.pt", weights_only=True)["action_high"].max() > 6


@BOTH
def test_one_file_alone(script, tmp_path, monkeypatch, capsys):
    """Copied into an empty folder: Pendulum with a file of one's own; one line for the default task."""
    for name in ("iql", "pspo", "liquidation_env"):
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    spec = importlib.util.spec_from_file_location("alone", shutil.copy(script.__file__, tmp_path))
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", alone)
    spec.loader.exec_module(alone)
    file, runs = write(tmp_path / "mine.hdf5", rows(act_dim=1)), tmp_path / "runs"
    main(alone, *words(script, env_id="Pendulum-v1", dataset_path=file, runs_dir=runs))
    assert "Pendulum-v1: no reference scores, so its return: -" in capsys.readouterr().out
    assert (only(runs) / "figure.png").exists()
    assert "needs liquidation_env.py beside this file" in refused(alone)


# --- Flags ---
@BOTH
def test_help_shows_what_would_run(script, capsys):
    def shown(*line):
        with pytest.raises(SystemExit) as error:
            main(script, *line, "--help")
        assert error.value.code == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    text, default = shown("--env-id", "hopper-medium-v2"), shown()
    for name in ("gamma", "iterations", "hidden"):
        assert f"(default: {getattr(script.Args(env_id='hopper-medium-v2'), name)})" in text
        assert f"(default: {(dataclasses.asdict(script.Args()) | script.SETTINGS['liquidation'])[name]})" in default
    assert "None" not in text and f"(default: {script.QUICK['iterations']})" in shown("--quick", "--env-id", "x-v2")


CHANGES = dict(  # another value of each flag that changes what is learnt or reported
    dataset_episodes=40, seed=2, gamma=0.5, iterations=5, batch_size=128, hidden=9, actor_lr=0.1, critic_lr=0.1,
    target_rate=0.5, eval_every=2, eval_episodes=4, final_episodes=5,
)  # fmt: skip
CHANGES = {
    "iql": CHANGES | dict(
        expectile=0.9, beta=1.0, weight_clip=1e-30, reward="raw", dropout=0.5, normalize_observations=True,
        online_steps=3,
    ),
    "pspo": CHANGES | dict(
        pool_size=4, active_models=3, dynamics_hidden=9, dynamics_layers=2, dynamics_batch=32, dynamics_epochs=2,
        dynamics_lr=0.1, learn_termination=True, likelihood_coef=0.0, evidence_rows=8, average_rate=0.5,
        rollout_horizon=2, action_samples=4, alpha=1.0, trust_region=1e-4, trust_region_every=2,
        layer_norm=False, behaviour_updates=3,
    ),
}  # fmt: skip
RARE = dict(eval_every=1000)  # one evaluation, for speed; it may not come before a whole online episode
SEEN_ELSEWHERE = {  # by the tests above and below; a GPU's and a compiler's flags need them
    "env_id", "dataset_path", "eval_env_id", "quick", "runs_dir", "resume", "num_threads", "track",
    "cuda", "compile",
}  # fmt: skip


@BOTH
def test_flags_are_all_tried(script):
    assert {field.name for field in dataclasses.fields(script.Args)} == SEEN_ELSEWHERE | set(CHANGES[script.__name__])


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unchanged")
    return {name: outcome(train(script, folder / name, **RARE)) for name, script in SCRIPTS.items()}


def outcome(run_dir):
    result = json.loads((run_dir / "result.json").read_text())
    numbers = {key: result[key] for key in ("score", "score_ci95", "episodes", "share_of_optimum")}
    actor = torch.load(run_dir / "actor.pt", weights_only=True)
    return (run_dir / "metrics.csv").read_text(), numbers, str(actor["layers"])


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in SCRIPTS for flag in CHANGES[name]])
def test_every_flag_changes_something(name, flag, unchanged, tmp_path, no_figure):
    settings = RARE | {flag: CHANGES[name][flag]}
    assert outcome(train(SCRIPTS[name], tmp_path, **settings)) != unchanged[name]


def test_home_folder_and_a_figure_that_fails(tmp_path, monkeypatch):
    """Runs go to ~ if they shall; and the result is there before anything that may fail for want of a library."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script in SCRIPTS.values():
        with pytest.raises(ImportError):
            main(script, *words(script, runs_dir=f"~/{script.__name__}"))
        assert {"result.json", "actor.pt"} <= {path.name for path in only(tmp_path / script.__name__).iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@BOTH
def test_compiled_is_eager(script, tmp_path, no_figure):
    eager = train(script, tmp_path / "eager")
    compiled = train(script, tmp_path / "compiled", compile=True)
    one, two = (np.genfromtxt(run / "metrics.csv", delimiter=",", skip_header=1) for run in (eager, compiled))
    assert np.allclose(one, two, rtol=1e-3, atol=1e-4)


# --- Bad input of the first hour: one line, nothing written ---
def file_with(**other):
    return lambda path: write(path, rows(act_dim=1) | other)


PENDULUM = "--env-id Pendulum-v1 --dataset-path FILE "
BAD = {  # command line, what makes FILE, words of the answer
    "unknown name": ("--env-id hoper-medum-v2", None, "hoper-medum-v2: no data of that name (near: hopper-medium-v2"),
    "not HDF5": (PENDULUM, lambda path: np.savez(open(path, "wb"), x=np.zeros(3)), "file signature not found"),
    "a folder": (PENDULUM, lambda path: path.mkdir(), "or a Minari folder"),
    "no keys": (PENDULUM, lambda path: write(path, {"x": [1.0]}), "no actions, observations, rewards, terminals"),
    "no module": (PENDULUM + "--eval-env-id nowhere:Tank-v0", file_with(), "No module named 'nowhere'"),
    "no environment": (PENDULUM + "--eval-env-id Nowhere-v0", file_with(), "--eval-episodes 0 trains without one"),
    "no network": ("--env-id hopper-medium-v2", None, "--env-id mujoco/hopper/medium-v0"),
    "no network for Minari": ("--env-id own/set-v0", None, "Unreachable: no network"),
    "no horizon": (PENDULUM + "--gamma 1", file_with(), "--gamma below 1, where there is no horizon"),
    "one episode": ("--final-episodes 1", None, "at least 2, for an interval"),
    "no iterations": ("--iterations 0", None, "--iterations, --eval-every"),
    "a negative number": ("--eval-episodes -1", None, "--eval-episodes and --num-threads 0"),
    "one reward for all": (PENDULUM, lambda path: write(path, rows() | dict(rewards=np.array(1.0))), "TypeError"),
    "no checkpoint": ("--resume nowhere", None, "no checkpoint.pt in nowhere"),
    "another's data": ("--env-id halfcheetah-medium-v2 --dataset-path FILE", file_with(), "but (17, 6) in HalfCheetah"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@BOTH
def test_bad_input_is_one_line(script, case, tmp_path, monkeypatch):
    class Unreachable(Exception):  # the hub's own kind is neither an OSError nor a ValueError
        pass

    def unreachable(*_, **__):
        raise Unreachable("no network")

    monkeypatch.setattr("minari.load_dataset", unreachable)
    monkeypatch.setattr(script, "SERVERS", ("http://127.0.0.1:9/{path}",))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "*")
    line, make, answer = BAD[case]
    if make:
        make(tmp_path / "data.hdf5")
    line = [word.replace("FILE", str(tmp_path / "data.hdf5")) for word in line.split()]
    tiny = [] if "--resume" in line or "--final-episodes" in line else words(script)
    said = refused(script, "--runs-dir", tmp_path / "runs", *tiny, *line)
    assert answer in said and "delete" not in said and "None" not in said
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_still_written(tmp_path):
    write_on = "import h5py, sys; f = h5py.File(sys.argv[1], 'w'); f.flush(); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", write_on, tmp_path / "busy.hdf5"], stdin=-1, stdout=-1) as writer:
        writer.stdout.readline()
        said = refused(iql, "--env-id", "Pendulum-v1", "--dataset-path", tmp_path / "busy.hdf5")
        writer.communicate(b"\n")
    assert "unable to lock file" in said and "delete" not in said


def test_bad_settings_of_one_script(tmp_path, no_figure, monkeypatch):
    tiny, data = words(pspo, runs_dir=tmp_path / "runs"), write(tmp_path / "data.hdf5", rows(act_dim=1))
    for wrong in (0, 9):
        assert f"--active-models {wrong}: the pool has 1 to 3" in refused(pspo, *tiny, "--active-models", wrong)
    assert "multiple of 64" in refused(pspo, *tiny, "--batch-size", 65)
    assert "be even" in refused(pspo, *tiny, "--action-samples", 3)
    full = ["--env-id", "hopper-medium-v2", "--cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(pspo, *full)
    assert "weeks on a CPU" in said and "--quick" in said and "--no-cuda" in said
    online = words(iql, runs_dir=tmp_path / "runs", env_id="Pendulum-v1", dataset_path=data, online_steps=5)
    assert "needs an --eval-every of at least its 200 steps" in refused(iql, *online)
    assert "needs an environment: --eval-episodes" in refused(iql, *online, "--eval-episodes", 0)


@BOTH
def test_a_run_that_diverges(script, tmp_path, no_figure):
    settings = dict(iterations=40, eval_every=10, critic_lr=1e30, actor_lr=1e30)
    said = refused(script, *words(script, runs_dir=tmp_path, **settings))
    assert "not finite any more: lower --critic-lr" in said and (only(tmp_path) / "args.json").exists()
    assert not (only(tmp_path) / "checkpoint.pt").exists()  # the last good one would stay
    if script is pspo:
        said = refused(script, *words(script, runs_dir=tmp_path / "models", dynamics_lr=1e30))
        assert "dynamics models diverged: lower --dynamics-lr" in said
