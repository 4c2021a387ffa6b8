"""Running many runs of the scripts: what is finished is not repeated, what was stopped goes on, on cores or on Ray.

For the programs of this folder; a Job is one run of one script with one seed, in a folder of its own.
"""

import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are not installed

# Arguments that say how and where, not what: runs that differ in these only are the same.
HOW = {"exp_name", "cuda", "num_threads", "track", "wandb_project", "capture_video", "runs_dir", "resume", "quick"}
HOW |= {"dataset_path", "dataset_mirrors", "dynamics_path", "compile"}
POOL = {"pool_size", "dynamics_hidden", "dynamics_layers"}  # what the file of --dynamics-path decides


class UserError(Exception):
    """Something the user can put right, on one line."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


@functools.cache
def script(name: str) -> ModuleType:
    """The module of pspo.py, iql.py or steer_poe.py."""
    return importlib.import_module(name)


@dataclass(frozen=True)
class Job:
    """One run. `settings` are fields of the script's Args that differ from its defaults, the seed among them."""

    script: str  # "pspo"
    settings: dict[str, Any]
    folder: Path  # its run folder lies in here

    def runs(self) -> list[Path]:
        """Run folders, the newest last."""
        return sorted((path.parent for path in self.folder.glob("*/args.json")), key=lambda run: run.stat().st_mtime)

    def finished(self) -> Path | None:
        """The run folder that has a result.json. Raises UserError if it is of other settings."""
        for run in self.runs():
            if (run / "result.json").exists():
                other = self.difference(json.loads((run / "result.json").read_text()))
                where = f"{run} was run with other settings ({other})"
                require(not other, f"{where}: choose another --runs-dir, or delete it")
                return run
        return None

    def result(self) -> dict | None:
        """Its result.json."""
        run = self.finished()
        return json.loads((run / "result.json").read_text()) if run else None

    def difference(self, result: dict) -> str:
        """The settings in which a result.json is not this job's, in words; empty if it is."""
        fields = {field.name for field in dataclasses.fields(script(self.script).Args)}
        if not set(result["args"]) <= fields:
            return "another script, or another version of it"
        wanted, free = self.resolved(), HOW | (POOL if "dynamics_path" in self.settings else set())
        for name, value in self.settings.items():
            if name not in result["args"] and name not in free and value != getattr(script(self.script).Args, name):
                return f"a version without {name}"
        pairs = {name: (value, json.loads(json.dumps(wanted[name]))) for name, value in result["args"].items()}
        return ", ".join(f"{n} {a}, not {b}" for n, (a, b) in pairs.items() if n not in free and a != b)

    def resolved(self) -> dict[str, Any]:
        """All arguments, as the script fills them in."""
        module = script(self.script)
        try:
            return vars(module.resolve(module.Args(**self.settings))[0])
        except module.UserError as error:
            raise UserError(str(error)) from None

    def state(self) -> str:
        """done; resume: stopped after a checkpoint; run: nothing to go on from."""
        if self.result():
            return "done"
        return "resume" if self.unfinished() else "run"

    def unfinished(self) -> Path | None:
        """The newest run folder with a checkpoint."""
        found = [run for run in self.runs() if (run / "checkpoint.pt").exists()]
        return found[-1] if found else None

    def command(self) -> list[str]:
        """The command line that runs it, or goes on with it."""
        command = [sys.executable, f"{self.script}.py"]
        if self.unfinished():
            return [*command, "--resume", str(self.unfinished())]
        settings = {"num_threads": 1} | self.settings | {"runs_dir": str(self.folder)}
        return command + flags(settings)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def keep_data_folders() -> None:
    """Relative folders in the environment are the user's, wherever `execute` starts a run from here on."""
    for name in ("D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))


def execute(command: list[str], cwd: str, log: str) -> int:
    """Run a command, its output appended to a file; returns the exit status."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        return subprocess.run(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT).returncode


def run_local(commands: list[tuple], workers: int) -> Iterator[tuple[int, int]]:
    """(number of the command, exit status) as they end, `workers` at a time."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(execute, *command): number for number, command in enumerate(commands)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # after Ctrl-C too, which the running children have had as well
        pool.shutdown(wait=True, cancel_futures=True)


def run_ray(commands: list[tuple], workers: int) -> Iterator[tuple[int, int]]:
    """The same on Ray: on the cluster that RAY_ADDRESS names, else on `workers` cores of this machine.

    Every machine needs the repository, the Python environment and --runs-dir under the same paths.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install ray") from None
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        **({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}), include_dashboard=False, log_to_driver=False
    )
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(execute)
        waiting = {remote.remote(*command): number for number, command in enumerate(commands)}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done), ray.get(done)
    finally:
        ray.shutdown()


ENGINES: dict[str, Callable] = {"local": run_local, "ray": run_ray}


def run_jobs(jobs: list[Job], workers: int, engine: str = "local") -> list[str]:
    """Run what is not done; returns a line for every job that failed."""
    keep_data_folders()
    todo = [job for job in jobs if job.state() != "done"]
    commands = [(job.command(), str(ROOT), str(job.folder / "log.txt")) for job in todo]
    failed = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="runs", dynamic_ncols=True, disable=None) as bar:
        for number, status in ENGINES[engine](commands, workers):
            bar.update()
            job, log = todo[number], todo[number].folder / "log.txt"
            what = " ".join(commands[number][0][1:])
            if status:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                failed.append(f"{what}: exit {status}: {last[0]}")
            bar.write(
                f"{'failed' if status else 'done'}: {what}" + (f", see {job.folder / 'log.txt'}" if status else "")
            )
    return failed


def interval(values: list[float]) -> float:
    """Half-width of the 95% interval of the mean over seeds, Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    exact = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees of freedom
    t = exact[n - 2] if n <= 10 else 1.96 + 2.37 / (n - 1) + 2.8 / (n - 1) ** 2  # within 0.004
    return t * float(np.std(values, ddof=1)) / math.sqrt(n)
