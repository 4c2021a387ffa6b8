"""Kills, hostile files and results run again, in short; benchmark/crash.py is the long mode."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import pytest
import torch

import pspo

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["pspo", "iql", "steer_poe"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def python(*words, cwd=ROOT, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=1800)


def test_kills_and_hostile_files(tmp_path):
    """A kill at every place and some thirty hostile inputs: no run differs, none is lost, none ends in a traceback."""
    done = python("benchmark/crash.py", "--kills", 1, "--hostile", 30, "--out", tmp_path / "table")
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.count("all equal to the uninterrupted one") == 7 and table.count("files whole") == 2
    assert table.count("0 not allowed") == 5 and "FAILED" not in table


# --- Results run again ---


def test_result_run_again(tmp_path):
    """From result.json and the folder's copy of the script: the same to the last bit; and a lie is found out."""
    words = "--no-cuda --num-threads 1 --dataset-episodes 60 --iterations 20 --eval-every 10 --eval-episodes 10"
    words += " --final-episodes 20 --hidden 8 --batch-size 16"
    done = python("iql.py", "--runs-dir", tmp_path / "runs", *words.split())
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    again = python(ROOT / "benchmark" / "reproduce.py", run_dir / "result.json", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same to the last bit" in again.stdout

    sys.path.insert(0, str(ROOT / "benchmark"))
    import reproduce

    sys.path.pop(0)
    result = json.loads((run_dir / "result.json").read_text())
    assert reproduce.compare(result, result | {"score": result["score"] + 1e-9}) == 1
    elsewhere = result["machine"] | {"cpu": "another"}
    assert reproduce.compare(result, result | {"score": result["score"] + 1e-9, "machine": elsewhere}) == 0
    assert reproduce.compare(result, result | {"score": result["score"] + 1e9, "machine": elsewhere}) == 1
    with pytest.raises(reproduce.CannotRun, match="another SHA-256"):
        reproduce.compare(result, result | {"dataset": result["dataset"] | {"sha256": "0"}})
    with pytest.raises(reproduce.CannotRun, match="no script with SHA-256"):
        reproduce.find_script({"script_sha256": "0" * 64}, run_dir)


# --- Numbers that run away ---


@pytest.mark.parametrize("strength", [1.0, 1e6])
@pytest.mark.parametrize("worst", [1e30, 3e38, 1e60])
def test_posterior_neither_under_nor_overflows(strength, worst):
    """Eq. (4) with λ = 1e6 or Δ = 1e30 and beyond: a distribution, with a finite logarithm and entropy."""
    for dtype in (torch.float64, torch.float32)[: 2 if worst < 1e39 else 1]:
        evidence = torch.tensor([0.5, 0.25, worst], dtype=dtype)
        log_belief = pspo.posterior(evidence, strength).float()
        assert log_belief.isfinite().all()
        assert log_belief.exp().sum().item() == pytest.approx(1)
        assert (-(log_belief.exp() * log_belief).sum()).isfinite()
        difference = log_belief[1] - log_belief[0]
        assert difference.item() == pytest.approx(strength / 4, rel=1e-5)
        assert log_belief.argmax() == 1 and log_belief[2].exp() == 0
    equal = pspo.posterior(torch.full((4,), worst, dtype=torch.float64), strength)
    assert equal.exp().tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("scale", ["spread", "mean", "none"])
def test_evidence_of_targets_beyond_the_squares_of_float32(scale):
    """Targets 1e30 apart: Δ = 1e60 is a number, and the model that is right gets the belief."""
    delta = pspo.model_evidence(torch.tensor([[1.0, 1.0], [1e30, 1.0]]), torch.tensor([1.0, 1.0]))
    assert delta.tolist() == pytest.approx([0, 5e59])
    scaled = pspo.PSPO.scaled(SimpleNamespace(args=SimpleNamespace(evidence_scale=scale)), delta)
    belief = pspo.posterior(scaled, 100.0).exp()
    assert belief.tolist() == pytest.approx([1, 0])


def test_guard_names_the_first_bad_tensor_and_its_step(script):
    """NaN spreads: what was computed first, in the first bad step, is the cause. It is found within 100 steps."""
    causes = {"model": "the models", "critic": "the critic"}
    guard = script.Guard("iteration", ["model/reward", "critic/loss", "critic/q"], causes, {"critic/q": 10.0})
    for step in range(1, 100):
        bad = step >= 42
        row = [math.nan if bad else 1.0, math.inf if bad else 1e8, math.nan if step > 42 else 1.0]
        guard.add(step, torch.tensor(row))
    with pytest.raises(script.UserError, match=r"^iteration 42: model/reward, critic/loss not finite: the models$"):
        guard.add(100, torch.ones(3))
    guard.add(101, torch.tensor([1.0, 1e30, -999.0]))
    guard.check()  # no bound for a loss; Q within 100 times its own
    guard.add(102, torch.tensor([1.0, 1.0, -1001.0]))
    with pytest.raises(script.UserError, match=r"^iteration 102: critic/q exploding: the critic$"):
        guard.check()


# --- Files from strangers ---


def test_the_code_of_an_environment_is_never_a_files_choice(script, tmp_path):
    """A Minari folder's EnvSpec may name any function; Gymnasium's own code for that id is what runs."""
    spec = gym.spec("CartPole-v1")
    hostile = gym.envs.registration.EnvSpec("CartPole-v1", entry_point="os:mkdir", kwargs={"path": str(tmp_path / "x")})
    wrapper = gym.envs.registration.WrapperSpec("x", "os:mkdir", {"path": str(tmp_path / "x")})
    hostile.additional_wrappers = (wrapper,)
    safe = script.registered(hostile)
    assert (safe.entry_point, safe.additional_wrappers) == (spec.entry_point, ())
    with pytest.raises(TypeError):
        gym.make(safe)
    assert not (tmp_path / "x").exists()
    with pytest.raises(script.UserError, match="not installed, Nowhere-v3"):
        script.registered(gym.envs.registration.EnvSpec("Nowhere-v3", entry_point="os:mkdir"))
    with pytest.raises(script.UserError, match="episodes of 1000000000 steps"):
        script.registered(gym.envs.registration.EnvSpec("CartPole-v1", max_episode_steps=10**9))


def test_the_evaluation_environment_runs_no_code_of_a_file(script, tmp_path):
    """The same, where an environment is made: the hostile arguments reach CartPole, which has no use for them."""
    arguments = {"path": str(tmp_path / "x")}
    hostile = gym.envs.registration.EnvSpec("CartPole-v1", entry_point="os:mkdir", kwargs=arguments)
    dataset, args = SimpleNamespace(env_spec=hostile), script.Args(env_id="mujoco/hopper/medium-v0")
    with pytest.raises(script.UserError, match="cannot make the evaluation environment CartPole-v1"):
        script.make_eval_env(args, "hopper", dataset)
    assert not (tmp_path / "x").exists()


def test_a_file_that_claims_more_than_it_can_hold(script, tmp_path):
    """A kilobyte that unpacks to terabytes is refused before memory is taken."""
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        file.create_dataset("observations", shape=(10**12, 3), chunks=(1000, 3), dtype="f4")
    with pytest.raises(script.UserError, match=r"claims 1.2e\+13 bytes"):
        script.load_dataset("name", str(tmp_path / "bomb.hdf5"))


def test_errors_have_one_line_and_no_control_characters(script):
    assert str(script.UserError("a\r\nb\x1b[31m\u2028c γ")) == "a  b [31m c γ"


@pytest.mark.parametrize("words", [["--nonsense", "3"], ["--seed", "x"], ["--seed", str(2**63)], ["--seed"], ["word"]])
def test_command_lines_are_refused_in_one_line(script, words, monkeypatch, capsys):
    if not hasattr(script, "command_line"):
        pytest.skip("has no training")
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err


def test_a_terminal_without_greek(tmp_path):
    """The error of γ on a terminal that only knows ASCII."""
    done = python("iql.py", "--gamma", "1", "--env-id", "hopper-medium-v2", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "\\u03b3 = 1" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.45 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_too_little_memory_is_a_line(script, error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as stopped:
        script.exit_cleanly(work)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and str(error)[-20:] in said and "enforce" not in said


def test_a_bug_is_not_too_little_memory(script, tmp_path):
    """An error of the GPU that only mentions memory is shown whole; too little of it is not the file's fault."""

    def work():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        script.exit_cleanly(work)
    with pytest.raises(torch.OutOfMemoryError), script.restoring(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
