"""benchmark/reproduce_tables.py and runner.py: plans, runs that are not repeated or go on, honest tables, Ray."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import iql
import pspo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import pspo_study  # noqa: E402
import reproduce_tables as tables  # noqa: E402
import runner  # noqa: E402

TINY = ["iterations=20", "eval_every=10", "dataset_episodes=100", "eval_episodes=10", "final_episodes=20"]
TINY += ["hidden=8", "batch_size=16", "cuda=False"]


def call(monkeypatch, capsys, folder, *words, expect=None):
    """The program as a user types it, in this process, writing into `folder`; returns (stdout, stderr)."""
    words = [*words, "--runs-dir", folder / "runs", "--output-dir", folder / "out"]
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", *map(str, words)])
    if expect is None:
        tables.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            tables.main()
        assert stopped.value.code == expect
    return capsys.readouterr()


def test_a_relative_data_folder_is_the_users(tmp_path, monkeypatch):
    """The runs start in the repository, wherever their user is."""
    code = "import os; print(os.path.exists(os.environ['D4RL_DATASET_DIR']))"
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", "data")
    job = runner.Job("iql", {"seed": 1}, tmp_path / "job")
    monkeypatch.setattr(runner.Job, "command", lambda job: [sys.executable, "-c", code])
    assert runner.run_jobs([job], 1) == []
    assert (tmp_path / "job" / "log.txt").read_text() == "True\n"


# --- The papers' numbers ---


def test_published_numbers():
    """The averages that the papers print, and the same scores as the scripts quote."""
    assert np.mean(list(tables.TABLE1.values()), axis=0)[[0, 2, 3, 4, 5]] == pytest.approx(
        [91.2, 88.2, 81.3, 85.4, 73.7], abs=0.06
    )
    assert {name: row[0] for name, row in tables.TABLE1.items()} | {"liquidation": 102.3} == pspo.PAPER_SCORES
    assert all(iql.PAPER_SCORES[name] == score for name, score in tables.IQL_TABLE1.items())
    assert tables.TABLE3["uniform posterior"]["hopper-medium-replay-v2"] == (67.9, 1.3)
    assert tables.TABLE3["without regularisation"]["walker2d-random-v2"] == (13.9, 53)
    assert all(rows.keys() == tables.TABLE1.keys() for rows in tables.TABLE3.values())


def test_interval():
    """Student's t: the quantiles of a printed table, and the formula beyond it."""
    values = [1.0, 2.0, 4.0]
    assert runner.interval(values) == pytest.approx(4.303 * np.std(values, ddof=1) / 3**0.5)
    assert np.isnan(runner.interval([1.0]))
    many = list(np.random.default_rng(0).normal(size=31))  # 2.042 for 30 degrees of freedom
    assert runner.interval(many) == pytest.approx(2.042 * np.std(many, ddof=1) / 31**0.5, rel=2e-3)


def test_drop():
    """Table 3's entries: the loss in percent and the ratio of standard deviations; unknown ones are not run."""
    assert tables.drop([100.0, 102.0], [50.0, 51.0]) == "50.0% (0.5x)"
    assert tables.drop([], [50.0]) == "not run"
    assert tables.drop([100.0, 102.0], [111.1]) == "-10.0% (one seed)"


# --- Plans ---


@pytest.mark.parametrize(
    "table, runs",
    [("pspo-table1", 90), ("pspo-table2", 15), ("pspo-table3", 270), ("iql-locomotion", 45), ("steering", 45)],
)
def test_plan(table, runs):
    """Data set × variant × seed; Table 3 shares its first column with Table 1."""
    jobs = tables.plan(tables.Args(table))
    assert sum(map(len, jobs.values())) == runs
    assert len({job.folder for some in jobs.values() for job in some}) == runs
    if table == "pspo-table3":
        first = tables.plan(tables.Args("pspo-table1"))
        assert all(jobs[cell] == first[cell] for cell in first)


def test_dry_run_prints_commands_of_the_scripts(monkeypatch, capsys, tmp_path):
    """What it prints can be typed: the scripts' own parser takes it."""
    out, _ = call(monkeypatch, capsys, tmp_path, "pspo-table3", "--dry-run", "--quick", "--seeds", 7)
    lines = out.splitlines()
    assert len(lines) == 54 and not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
    (line,) = [line for line in lines if "hopper-random" in line and "--no-regularization" in line]
    state, python, name, *words = line.split()
    assert (state, python, name) == ("run", "python", "pspo.py")
    args, _ = pspo.resolve(pspo.tyro.cli(pspo.Args, args=words))
    assert (args.env_id, args.seed, args.quick, args.regularization) == ("hopper-random-v2", 7, True, False)


def test_report_of_nothing(monkeypatch, capsys, tmp_path):
    """Without runs every cell of ours says so, beside the paper's number."""
    out, _ = call(monkeypatch, capsys, tmp_path, "pspo-table1", "--report")
    assert out == (tmp_path / "out" / "pspo_table1.md").read_text()
    assert "0 of 90 runs are in" in out
    assert "| hopper-medium-v2 | PSPO | 108.5 ± 1.3 | 106.8 | 107.4 | 101.3 | 61.9 | not run | – |" in out
    assert out.count("not run") == 18
    out, _ = call(monkeypatch, capsys, tmp_path, "pspo-table3", "--report", "--quick")
    assert "68.1% (0.9x)" in (tmp_path / "out" / "pspo_table3_quick.md").read_text()


def cells_of(difference, low, high, alpha, **others):
    """A row of cells.csv in which PoE(α) differs from Frozen's 50.0 by so much, with the bootstrap's interval."""
    numbers = dict(objective_difference=difference, objective_low=low, objective_high=high)
    return dict(prior="clean", shift="none", goal="speed", rule="poe", alpha=alpha, objective=0) | numbers | others


def steering_run(job, selected, rows):
    """A finished run folder of steer_poe.py with these cells."""
    run = job.folder / "run"
    run.mkdir(parents=True)
    (run / "args.json").write_text("{}")
    machine = {"device": "cpu", "threads": 1}
    data = {"source": "generated, seed 1", "sha256": "0"}
    result = dict(args=job.resolved(), machine=machine, dataset=data, seconds=60, frozen_score=1, frozen_return=2)
    result["script_sha256"] = "0123456789"
    (run / "result.json").write_text(json.dumps(result))
    rows = [cells_of(0, 0, 0, 0.0, rule="frozen", objective=-50.0), *rows]
    picked = [dict(prior=p, shift="none", goal="speed", alpha=a) for p, a in (("noisy", 0.1), ("clean", selected))]
    for name, content in (("cells.csv", rows), ("selector.csv", picked)):
        with open(run / name, "w", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)


def test_steering_table(monkeypatch, capsys, tmp_path):
    """Differences in percent of |Frozen|; one seed has the episodes' interval, two have Student's; the split counts
    the selector's α on the medium data sets alone; degraded priors and other rules stay out."""
    words = ["steering", "--report", "--seeds", 1, 2, "--datasets", "hopper-medium-v2", "walker2d-medium-expert-v2"]
    out, _ = call(monkeypatch, capsys, tmp_path, *words)
    assert "as in the paper: not run." in out and "4 HELP, 5 FROZEN, 3 HURT of the 12 cells" in out
    args = tables.Args(
        "steering", (1, 2), ("hopper-medium-v2", "walker2d-medium-expert-v2"), runs_dir=tmp_path / "runs"
    )
    (first, second), (third, _) = tables.plan(args).values()
    for job, difference in ((first, 10.0), (second, 12.0)):
        wrong = [cells_of(-99, -99, -99, 0.5, prior="noisy"), cells_of(-99, -99, -99, 0.5, rule="additive")]
        steering_run(job, 0.5, [cells_of(difference, 1.0, 20.0, 0.5), cells_of(-5.0, -6.0, -4.0, 0.9), *wrong])
    steering_run(third, 0.77, [cells_of(-10.0, -15.0, 5.0, 0.5), cells_of(-10.0, -15.0, -5.0, 0.77)])
    out, _ = call(monkeypatch, capsys, tmp_path, *words)
    both = "+22.0 [-3.4, +47.4] FROZEN"  # 100 / 50 of (10 + 12) / 2 and of 12.706 · √2 / √2
    assert (
        f"| speed | not run | not run | {both} | not run | -10.0 [-10.0, -10.0] HURT | {both} (α 0.5) | – | 2 |" in out
    )
    one = (
        "| -20.0 [-30.0, +10.0] FROZEN | not run | not run | -20.0 [-30.0, -10.0] HURT (α 0.77) | HURT at every α | 1 |"
    )
    assert one in out
    assert "as in the paper: 0 HELP, 1 FROZEN, 0 HURT of 1 cells." in out and "3 of 4 runs are in" in out
    assert "25 episodes a configuration, actor bc" in out and "SHA-256 of the script: 012345678." in out


# --- Running ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which IQL's row of table 2 has been run with tiny settings, seeds 1 and 2, two runs at a time."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["pspo-table2", "--variants", "IQL", "--seeds", "1", "2", "--jobs", "2", "--set", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reproduce_tables.py", *words, *places(folder)])
        tables.main()
    return folder, words


def places(folder):
    return ["--runs-dir", str(folder / "runs"), "--output-dir", str(folder / "out")]


def test_table_of_runs(finished):
    """Means, intervals and sources are those of the runs' result.json; what was changed stands above."""
    folder, _ = finished
    text = (folder / "out" / "pspo_table2_changed.md").read_text()
    assert "2 of 2 runs are in" in text and "`iterations=20`" in text
    with open(folder / "out" / "pspo_table2_changed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [("IQL", "1"), ("IQL", "2")]
    results = [json.loads(path.read_text()) for path in sorted((folder / "runs" / "iql").rglob("result.json"))]
    scores = [result["score"] for result in results]
    assert {result["args"]["iterations"] for result in results} == {20}
    assert f"| liquidation | IQL | 0.0 ± 0.0 | {tables.mean_interval(scores)} | generated |" in text
    assert {float(row["score"]) for row in rows} == set(scores)


def test_finished_runs_are_not_repeated(finished, monkeypatch, capsys):
    """The same command again runs nothing and writes the same table; another setting under the same name is refused."""
    folder, words = finished
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a finished run was run again"))
    table = folder / "out" / "pspo_table2_changed.md"
    before = table.read_text()
    call(monkeypatch, capsys, folder, *words)
    assert table.read_text() == before
    (result,) = (folder / "runs" / "iql").rglob("seed1/*/result.json")
    content = json.loads(result.read_text())
    original = result.read_text()
    content["args"]["expectile"] = 0.8
    result.write_text(json.dumps(content))
    _, err = call(monkeypatch, capsys, folder, *words, expect=2)
    result.write_text(original)
    assert "was run with other settings (expectile 0.8, not 0.7)" in err and err.count("\n") == 1


def test_stopped_runs_go_on(finished, tmp_path):
    """A run folder with a checkpoint and no result is resumed; one without a checkpoint is started anew."""
    job = runner.Job("pspo", {"env_id": "liquidation", "seed": 1}, tmp_path)
    assert (job.state(), job.command()[1:4]) == ("run", ["pspo.py", "--num-threads", "1"])
    run = tmp_path / "liquidation__pspo__1"
    run.mkdir()
    (run / "args.json").write_text("{}")
    assert job.state() == "run"
    (run / "checkpoint.pt").touch()
    assert (job.state(), job.command()[1:]) == ("resume", ["pspo.py", "--resume", str(run)])


def test_failures_are_reported_and_stop_nothing_else(monkeypatch, capsys, tmp_path):
    """A run that fails is named with its last line; the others' results are in the table; exit code 1."""
    path = tmp_path / "nothing.hdf5"
    words = [
        "iql-locomotion",
        "--datasets",
        "hopper-medium-v2",
        "--seeds",
        1,
        "--set",
        f"dataset_path={path}",
        "cuda=False",
    ]
    _, err = call(monkeypatch, capsys, tmp_path, *words, expect=1)
    assert "exit 2: error:" in err and "nothing.hdf5" in err
    assert "0 of 1 runs are in" in (tmp_path / "out" / "iql_locomotion_changed.md").read_text()


def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path):
    """Unknown data sets and settings, values that a script refuses."""
    for words, expected in (
        (["--datasets", "hopper-v2"], "--datasets hopper-v2: pspo-table1 has"),
        (["--set", "iteration=3"], "no setting of pspo: iteration"),
        (["--set", "iterations"], "write NAME=VALUE"),
        (["--variants", "CQL"], "--variants CQL: pspo-table1 has PSPO"),
    ):
        _, err = call(monkeypatch, capsys, tmp_path, "pspo-table1", *words, expect=2)
        assert expected in err and err.count("\n") == 1


def test_studies_of_pspo(monkeypatch, tmp_path):
    """benchmark/pspo_study.py: every variant is one that pspo.py accepts; a lying pool is shared by its rules."""
    monkeypatch.setattr(pspo_study, "poisoned_pool", lambda poison, seed, folder: folder / f"{poison}{seed}.pt")
    for study, (seeds, variants) in pspo_study.STUDIES.items():
        jobs = pspo_study.plan(pspo_study.Args(study, runs_dir=tmp_path))
        assert [len(of_seeds) for of_seeds in jobs.values()] == [len(seeds)] * len(variants)
        assert all(job.resolved()["seed"] in seeds for of_seeds in jobs.values() for job in of_seeds)
    one = pspo_study.plan(pspo_study.Args("poisoned", (4,), ("price, uniform",), runs_dir=tmp_path))
    ((job,),) = one.values()
    assert job.settings["dynamics_path"].endswith("poisoned/price4.pt") and job.resolved()["posterior"] == "uniform"
    with pytest.raises(runner.UserError, match="scale has spread, λ = 1"):
        pspo_study.plan(pspo_study.Args("scale", variants=("mean",), runs_dir=tmp_path))


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
def test_ray_runs_what_processes_run(finished, tmp_path):
    """--engine ray with two workers on this machine: the same scores as the local engine's."""
    folder, words = finished
    command = [sys.executable, ROOT / "benchmark" / "reproduce_tables.py", *words, "--engine", "ray", *places(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    name = "pspo_table2_changed.csv"
    ours, theirs = ((place / "out" / name).read_text().splitlines() for place in (folder, tmp_path))
    assert [line.rsplit(",", 1)[0] for line in ours] == [line.rsplit(",", 1)[0] for line in theirs]  # but for minutes
