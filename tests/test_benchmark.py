"""A smoke test of every program in benchmark/, and the matrix products of speed.py against PyTorch's own count."""

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
from torch.utils.flop_counter import FlopCounterMode

import pspo
from benchmark import figures, pspo_study, reproduce, speed

speed.ROWS = 2_000  # as few as do
TINY = "--dataset-episodes 100 --pool-size 2 --active-models 2 --dynamics-epochs 1 --behaviour-updates 5"
TINY += " --iterations 20 --eval-every 10 --eval-episodes 5 --final-episodes 5 --batch-size 64"


def fake_run(folder: Path, script: str, env_id: str, seed: int, score: float, **changes) -> Path:
    run = folder / f"{env_id}__{script}__{seed}"
    run.mkdir(parents=True)
    result = dict(env_id=env_id, dataset="x.hdf5 (not D4RL's file)", score=score, minutes=1.0, optimum_score=101.8)
    result |= {
        "compared_with": {"behaviour in the data": 40.0},
        "return": score,
        "share_of_optimum": 0.9,
        "optimum": 137,
    }
    (run / "result.json").write_text(json.dumps(result | dict(args=dict(seed=seed) | changes)))
    with open(run / "metrics.csv", "w", newline="") as file:
        names = ["eval/score", "eval/return", "eval/predicted_return" if script == "pspo" else "value/v"]
        csv.writer(file).writerows([["iteration", *names], [10, 5, 5, 6], [20, score, score, score]])
    return run


def test_a_plan_runs_what_is_missing_goes_on_and_counts_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "hopper_medium-v2.hdf5").touch()
    (tmp_path / "iql.py").write_text("raise SystemExit('no')")
    program = "import json, pathlib, sys; run = pathlib.Path(sys.argv[sys.argv.index('--runs-dir') + 1]) / 'run'; "
    program += "run.mkdir(); (run / 'result.json').write_text(json.dumps(dict(words=sys.argv)))"
    (tmp_path / "pspo.py").write_text(program)
    args = reproduce.Args("run", ("table1",), tasks=("hopper",), seeds=(1, 2), runs_dir=tmp_path / "runs")
    jobs, missing = reproduce.plan(args, "table1")
    assert "hopper-random-v2" in missing and "hopper-medium-v2" not in missing
    jobs = [job for job in jobs if job.data == "hopper-medium-v2"]
    assert [job.state() for job in jobs] == ["run"] * 4
    assert reproduce.run(jobs, args) == 2 and "exit 1" in capsys.readouterr().out
    assert [job.state() for job in jobs] == ["done", "run"] * 2
    assert "--quick" in jobs[0].result()["words"]
    stopped = fake_run(jobs[1].folder, "iql", "run", 1, 0.0)
    (stopped / "result.json").rename(stopped / "checkpoint.pt")
    assert jobs[1].command()[2:4] == ["--resume", str(stopped)]
    args.compile = True
    assert all("--compile" in job.command() and job.state() == "run" for job in reproduce.plan(args, "table1")[0])


def test_tables_say_whether_the_criterion_holds_and_runs_are_compared(tmp_path, capsys):
    args = reproduce.Args("table", ("table1",), tasks=("hopper",), runs_dir=tmp_path)
    for table, name in (("table1", "hopper-medium-v2"), ("table2", "liquidation")):
        jobs, _ = reproduce.plan(args, table)
        for job in jobs:
            if job.data == name:
                fake_run(job.folder, job.script, name, job.seed, 100 if job.script == "pspo" else 60)
        text = reproduce.table_text(table, jobs)
        assert "100.0 ± 0.0 (3)" in text and "60.0 ± 0.0 (3)" in text
        if table == "table1":
            assert "regenerated | 40.0" in text and "| yes |" in text and "1 of the 1 sets" in text
    runs = [fake_run(tmp_path / "other", "pspo", "a", i, i, gamma=0.9 + i / 100) for i in (1, 2)]
    assert not reproduce.plan(replace(args, tasks=("ant",)), "table1")[0]  # no such data: nothing is planned
    text = reproduce.compare([*runs, tmp_path])
    assert "| a | pspo | gamma 0.91 | 1.0 (1) |" in text and f"Not finished: {tmp_path}" in text
    runs = [fake_run(tmp_path / name, "iql", "b", 1, 5, dataset_path=name) for name in ("x.hdf5", "y.hdf5")]
    assert "| b | iql | dataset_path y.hdf5 | 5.0 (1) |" in reproduce.compare(runs)


def test_the_readings_of_the_belief_run_and_share_their_pool(tmp_path, monkeypatch):
    for name in ("train_dynamics", "load_arrays", "plot", "PSPO"):
        monkeypatch.setattr(pspo, name, getattr(pspo, name))  # `run` replaces them
    folders = {name: tmp_path / name for name in pspo_study.BELIEFS if name != "A"}
    monkeypatch.setattr(sys, "argv", sys.argv)
    load, plot = pspo.load_arrays, pspo.plot
    for name, folder in folders.items():
        pspo.load_arrays, pspo.plot = load, plot
        variant, flags = pspo_study.BELIEFS[name]
        pspo_study.run(f"{variant}:300", tmp_path, [*TINY.split(), *flags, "--runs-dir", str(folder)])
        pspo.train_dynamics = None  # the pool is there
    paths = {name: [pspo_study.finished(folder)] for name, folder in folders.items()}
    text = pspo_study.table(paths)
    assert all(f"| {name} | 1 |" in text for name in folders) and len(list(tmp_path.glob("*.pt"))) == 1
    assert all("its first 300 rows" in json.loads(path.read_text())["dataset"] for [path] in paths.values())
    last = {name: path.with_name("metrics.csv").read_text() for name, [path] in paths.items()}
    assert len(set(last.values())) == 4  # three readings and the control: four runs


def test_a_study_runs_its_variants_goes_on_and_prints_their_table(tmp_path, monkeypatch, capsys):
    variants = {name: (variant, TINY.split()) for name, variant in {"one": "one model", "on (s, a)": "raw"}.items()}
    monkeypatch.setitem(pspo_study.STUDIES, "ablations", (range(7, 8), variants))
    monkeypatch.setattr(sys, "argv", ["pspo_study.py", "ablations", "--runs-dir", str(tmp_path)])
    pspo_study.main()
    said, results = capsys.readouterr().out, sorted(tmp_path.glob("ablations/*/*/result.json"))
    assert len(results) == 2 and "| one | 7 |" in said and "| on (s, a) | 7 |" in said
    results[0].unlink()  # as if it had been stopped: only this one is made again, from its checkpoint
    before = results[1].stat().st_mtime_ns
    pspo_study.main()
    assert "| on (s, a) | 7 |" in capsys.readouterr().out and results[1].stat().st_mtime_ns == before
    assert results[0].exists() and len(list(tmp_path.glob("ablations/*/*/"))) == 2


def test_the_study_of_models_that_lie(monkeypatch, capsys):
    tiny = dict(dataset_episodes=100, dynamics_epochs=1, behaviour_updates=0, batch_size=64)
    monkeypatch.setitem(pspo.SETTINGS, "liquidation", pspo.SETTINGS["liquidation"] | tiny)
    monkeypatch.setattr(pspo_study, "poisoned", partial(pspo_study.poisoned, iterations=20))
    monkeypatch.setattr(sys, "argv", "pspo_study.py poisoned --seeds 1 --only uniform A".split())
    pspo_study.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    mass = {row[0]: float(row[2]) for row in rows[1:]}
    assert mass["| uniform"] == 0.3 != mass["| A"] > 0


def test_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pspo.py", *TINY.split(), "--runs-dir", str(tmp_path)])
    pspo.main()
    run = next(tmp_path.glob("*__pspo__*"))
    kinds = ("pspo", "liquidation"), ("pspo", "hopper-medium-v2"), ("iql", "liquidation")
    fakes = [fake_run(tmp_path / "fake", script, task, 1, 90) for script, task in kinds]
    output = tmp_path / "figure.png"
    for name, runs in dict(readme=fakes, figure2=[run]).items():
        monkeypatch.setattr(sys, "argv", ["figures.py", name, *map(str, runs), "--output", str(output)])
        figures.main()
        assert output.stat().st_size > 10_000


def test_the_floor_has_all_products_of_a_step():
    for name, make in speed.our_steps(dry=True).items():
        step = make()
        with FlopCounterMode(display=False) as counter:
            step()
        found = sum(2 * s * m * k * n for s, m, k, n in speed.products(step))
        assert found == counter.get_total_flops() > 0, name
    assert all(step() is None for step in speed.floor(speed.Args(dry=True)).values())


def test_speed_on_a_gpu_in_tiny_sizes(monkeypatch, capsys):
    monkeypatch.setattr(pspo, "fast", lambda step, *_: step)
    monkeypatch.setattr(speed, "window", lambda step, *_, **__: step() is None or 1.0)
    speed.on_gpu(speed.Args(dry=True, rounds=1))
    assert capsys.readouterr().out.count("equal, at most 0.0e+00 apart") == 3


def test_d4rl_antmaze():
    pytest.importorskip("gymnasium_robotics")
    env = gym.make("benchmark.d4rl_antmaze:D4RLAntMaze-umaze-v0")
    assert env.reset(seed=0)[0].shape == (29,) and env.spec.max_episode_steps == 700
    assert env.step(env.action_space.sample())[1:3] == (0.0, False)
