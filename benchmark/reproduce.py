"""The papers' result tables: plan the runs, run them, set the numbers beside the papers'.

    python benchmark/reproduce.py plan table1                 # what would run, and what is done
    python benchmark/reproduce.py run table1 iql --jobs 2     # stopped, it goes on when called again
    python benchmark/reproduce.py table table1                # Markdown of what is in, to the screen
    python benchmark/reproduce.py run table1 --engine ray     # on the cluster of $RAY_ADDRESS (pip install ray)
    python benchmark/reproduce.py compare runs/*              # any run folders, by task, script and flags

table1: PSPO and IQL on D4RL's locomotion sets. table2: liquidation. table3: PSPO's ablations. iql: the sets of IQL's
Table 1. Settings are CPU-sized, pspo.py --quick (20 minutes a run) and 100,000 updates of iql.py with normalised
observations; --full has the papers'.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are not installed

import iql
import pspo


@dataclass
class Args:
    """Plan, run and tabulate the papers' tables, or compare any runs."""

    command: tyro.conf.Positional[Literal["plan", "run", "table", "compare"]]  # what to do
    what: tyro.conf.Positional[tuple[str, ...]]  # table1, table2, table3, iql; to compare: run folders
    tasks: tuple[str, ...] = ("hopper", "halfcheetah", "walker2d")  # of the D4RL tables
    levels: tuple[str, ...] = pspo.LEVELS  # of the D4RL tables
    seeds: tuple[int, ...] = (1, 2, 3)  # of every cell
    full: bool = False  # the papers' own sizes; wants a GPU
    compile: bool = False  # the scripts' --compile: a fifth to a third faster
    jobs: int = 2  # runs at a time, one thread each
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or Ray's
    runs_dir: Path = Path("runs/reproduce")  # where the runs lie


METHODS = {  # per table: column → script and its flags
    "table1": {"PSPO": ("pspo", ()), "IQL": ("iql", ())},
    "table2": {"PSPO": ("pspo", ()), "PSPO, γ = 0.99": ("pspo", ("--gamma", "0.99")), "IQL": ("iql", ())},
    "table3": {
        "PSPO": ("pspo", ()), "without posterior": ("pspo", ("--likelihood-coef", "0")),
        "without regularisation": ("pspo", ("--alpha", "0")),
    },
    "iql": {"IQL": ("iql", ())},
}  # fmt: skip
IQL_LEVELS = ("medium", "medium-replay", "medium-expert")  # of IQL's Table 1
LOST = {  # Table 3: how many percent of PSPO's score are lost, by task in the order of LEVELS
    "without posterior": dict(
        hopper=(68.1, 68.1, 53.4, 9.9, 67.9, 11.1), halfcheetah=(19.1, 5.9, 11.2, 3.9, 9.4, 5.6),
        walker2d=(14.5, 3.9, 67.1, 16.3, 1.7, 4.8),
    ),
    "without regularisation": dict(
        hopper=(68.1, 13.2, 20.0, 12.8, 4.7, 10.3), halfcheetah=(13.3, 5.8, 23.9, 17.3, 9.1, 7.4),
        walker2d=(13.9, 9.1, 78.6, 8.3, 8.1, 9.3),
    ),
}  # fmt: skip
CRITERION = """\
What counts as a reproduction of the paper's ordering, fixed before the runs: on random, medium, medium-replay and
full-replay data PSPO's mean over seeds is above the behaviour policy's and above IQL's on the same file; on expert and
medium-expert data it is near expert, a score of 90 or more. The final policy counts, no best checkpoint, no seed left
out."""
REGENERATED = "Regenerated: in D4RL's layout but not D4RL's own file, so the papers' numbers are of other data."


def read(run: Path) -> dict:
    """result.json of a run folder, with the behaviour's score and the script's name."""
    result = json.loads((run / "result.json").read_text())
    result.setdefault("script", [*run.name.split("__"), "?"][1])
    return result | {"behaviour": result.get("compared_with", {}).get("behaviour in the data", math.nan)}


@dataclass(frozen=True)
class Job:
    """One run: a script with one seed, whose run folder lies in a folder of its own."""

    data: str
    method: str
    script: str
    flags: tuple[str, ...]
    seed: int
    folder: Path

    def find(self, name: str) -> Path | None:
        """The newest file of that name in its run folders."""
        return max(self.folder.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, default=None)

    def state(self) -> str:
        """done, resume (there is a checkpoint to go on from), or run."""
        return "done" if self.find("result.json") else "resume" if self.find("checkpoint.pt") else "run"

    def command(self) -> list[str]:
        words = ["--env-id", self.data, "--seed", str(self.seed), *self.flags, "--runs-dir", str(self.folder)]
        if self.state() == "resume":
            words = ["--resume", str(self.find("checkpoint.pt").parent)]
        return [sys.executable, str(ROOT / f"{self.script}.py"), *words, "--num-threads", "1"]

    def result(self) -> dict | None:
        path = self.find("result.json")
        return read(path.parent) if path else None


def plan(args: Args, table: str) -> tuple[list[Job], list[str]]:
    """The jobs of a table, smallest data first; and the data sets whose file is not there."""
    levels = [level for level in args.levels if table in ("table1", "table3") or level in IQL_LEVELS]
    names = [f"{task}-{level}-v2" for task in args.tasks for level in levels]
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    files = {name: folder / Path(pspo.D4RL[name][0]).name for name in names if name in pspo.D4RL}
    sizes = {name: file.stat().st_size if file.exists() else -1 for name, file in files.items()}
    if table == "table2":
        sizes = {"liquidation": 0}  # generated
    jobs = []
    for name in sorted(sizes, key=sizes.get):
        for seed, (method, (script, flags)) in itertools.product(args.seeds, METHODS[table].items()):
            if name != "liquidation" and script == "pspo" and not args.full:
                flags = ("--quick", *flags)
            if name != "liquidation" and script == "iql" and not args.full:
                flags = ("--normalize-observations", "--iterations", "100000", *flags)
            flags = (*flags, "--compile") if args.compile else flags
            where = args.runs_dir / script / name / ("".join(flags).lstrip("-") or "default") / f"seed{seed}"
            jobs.append(Job(name, method, script, flags, seed, where.absolute()))
    return jobs, [name for name, size in sizes.items() if size < 0]


def execute(command: list[str], log: str, folder: str) -> int:
    """Run it in `folder`, what it prints goes to the end of `log`; returns the exit status."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def run(jobs: list[Job], args: Args) -> int:
    """Run what is not done; returns how many failed."""
    todo, pool, failed = [job for job in jobs if job.state() != "done"], ThreadPoolExecutor(args.jobs), 0
    submit = pool.submit
    if args.engine == "ray":  # the cluster needs the same paths everywhere
        import ray

        ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else {"num_cpus": args.jobs}))
        remote = ray.remote(num_cpus=1, max_retries=0)(execute)
        submit = lambda _, *words: remote.remote(*words).future()  # noqa: E731
    try:
        words = {job: (job.command(), str(job.folder / "log.txt"), os.getcwd()) for job in todo}
        futures = {submit(execute, *words[job]): job for job in todo}
        for number, future in enumerate(as_completed(futures), 1):
            job, status = futures[future], future.result()
            failed += bool(status)
            end = f"exit {status}, see {job.folder / 'log.txt'}" if status else "done"
            print(f"{number} of {len(todo)}: {job.script}.py, {job.data}, {job.method}, {job.seed}: {end}", flush=True)
    finally:  # after Ctrl-C, which the running processes have had as well
        pool.shutdown(cancel_futures=True)
    return failed


# --- Tables ---


def mean_ci(values: list[float], digits: int = 1) -> str:
    """ "mean ± half-width of Student's 95% interval (how many)"; "–" without values."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    spread = "" if half is None else f" ± {half:.{digits}f}"
    return f"{np.mean(values):.{digits}f}{spread} ({len(values)})" if values else "–"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def column(results: list[dict], key: str = "score") -> list[float]:
    return [result[key] for result in results]


def label(data: str, results: list[dict]) -> str:
    """The set's name, with "regenerated" where a run's file was not D4RL's own."""
    return data + (", regenerated" if any("not D4RL's file" in result["dataset"] for result in results) else "")


def met(data: str, ours: list[dict], theirs: list[dict]) -> str:
    """The criterion on one data set: yes, no and why, or open."""
    if not ours or not (theirs or "expert" in data):
        return "open"
    score = np.mean(column(ours))
    if "expert" in data:
        return "yes" if score >= 90 else "no: below 90"
    others = {"behaviour": np.mean(column(ours, "behaviour")), "IQL": np.mean(column(theirs))}
    below = [name for name, other in others.items() if score <= other]
    return f"no: not above {' and '.join(below)}" if below else "yes"


def table_text(table: str, jobs: list[Job]) -> str:
    """Markdown of one table: a row per data set that has a run."""
    every: dict[str, dict[str, list[dict]]] = {}
    for job in jobs:
        row = every.setdefault(job.data, {name: [] for name in METHODS[table]})
        row[job.method] += filter(None, [job.result()])
    cells = {data: every[data] for data in ("liquidation", *pspo.D4RL) if any(every.get(data, {}).values())}
    below, rows = [REGENERATED] if any("not D4RL's" in str(row) for row in cells.values()) else [], []
    if table in ("table1", "iql"):
        papers = dict(PSPO=pspo.PAPER, IQL=iql.PAPER)
        names = list(METHODS[table])
        rows = [["data set", "behaviour", *names, *(f"{name}'s paper" for name in names)]]
        for data, row in cells.items():
            results = [*itertools.chain(*row.values())]
            published = [str(papers[name].get(data, ("", "–"))[1]) for name in names]
            ours = [mean_ci(column(row[name])) for name in names]
            rows.append([label(data, results), f"{np.mean(column(results, 'behaviour')):.1f}", *ours, *published])
        if table == "table1":
            verdicts = [met(data, row["PSPO"], row["IQL"]) for data, row in cells.items()]
            rows = [[*row, verdict] for row, verdict in zip(rows, ["criterion", *verdicts], strict=True)]
            decided = len(verdicts) - verdicts.count("open")
            below += [CRITERION, f"It holds on {verdicts.count('yes')} of the {decided} sets that are decided."]
    elif table == "table2":
        rows = [["method", "score", "return", "% of the exact optimum", "minutes", "paper"]]
        papers = {"PSPO": "102.3 ± 1.5", "PSPO, γ = 0.99": "102.3 ± 1.5 (its γ)", "IQL": "0.0 ± 0.0"}
        for method, results in cells.get("liquidation", {}).items():
            share = mean_ci([100 * x for x in column(results, "share_of_optimum")], 2)
            found = [mean_ci(column(results, key)) for key in ("score", "return")]
            rows.append([method, *found, share, mean_ci(column(results, "minutes")), papers[method]])
        for result in [*itertools.chain(*cells.get("liquidation", {}).values())][:1]:
            rows.append(["exact optimum", f"{result['optimum_score']:.1f}", f"{result['optimum']:.1f}", "100", "", ""])
            rows.append(["behaviour in the data", f"{result['behaviour']:.1f}", "", "", "", ""])
    else:
        rows = [["data set", "PSPO", *(x for name in LOST for x in (name, "% lost", "% lost, paper"))]]
        for data, row in cells.items():
            task, level = data.removesuffix("-v2").split("-", 1)
            rows.append([label(data, [*itertools.chain(*row.values())]), mean_ci(column(row["PSPO"]))])
            for name, lost in LOST.items():
                full, without = (np.mean(column(row[key]) or [math.nan]) for key in ("PSPO", name))
                here, paper = f"{100 * (1 - without / full):.1f}", str(lost[task][pspo.LEVELS.index(level)])
                rows[-1] += [mean_ci(column(row[name])), here.replace("nan", "–"), paper]
    commands = dict.fromkeys(f"{job.method}: `{' '.join([f'{job.script}.py', *job.flags])}`" for job in jobs)
    done = f"{sum(job.state() == 'done' for job in jobs)} of {len(jobs)} runs are in"
    about = f"{table}: {done}; mean ± 95% interval over seeds (how many). {'; '.join(commands)}."
    empty = [data for data in every if data not in cells]
    return "\n\n".join([about, markdown(rows), *below, *([f"Nothing run: {', '.join(empty)}."] if empty else [])])


def compare(folders: list[Path]) -> str:
    """Runs by task, script and the flags in which they differ; means over seeds."""
    finished = {folder for folder in folders if (folder / "result.json").is_file()}
    results, runs = [read(folder) for folder in sorted(finished)], {}
    for result in results:
        runs.setdefault((result["env_id"], result["script"]), []).append(result)
    digits = dict(score=1, share_of_optimum=3, minutes=1)
    keys = {key: n for key, n in digits.items() if any(key in result for result in results)}
    rows = [["task", "script", "differing flags", *(key.replace("_", " ") for key in keys)]]
    same = {"seed", "runs_dir", *pspo.HOW} - {"dataset_path"}
    for (env_id, script), results in sorted(runs.items()):
        names = {name for result in results for name in result["args"]} - same
        values = {name: {str(result["args"].get(name)) for result in results} for name in sorted(names)}
        differing, groups = [name for name in values if len(values[name]) > 1], {}
        for result in results:
            flags = ", ".join(f"{name} {result['args'].get(name)}" for name in differing)
            groups.setdefault(flags or "–", []).append(result)
        for flags, some in sorted(groups.items()):
            found = [mean_ci([result[key] for result in some if key in result], n) for key, n in keys.items()]
            rows.append([env_id, script, flags, *found])
    rest = ", ".join(str(folder) for folder in folders if folder not in finished) or "none"
    return f"{markdown(rows)}\n\nMean ± 95% interval over seeds (how many). Not finished: {rest}."


def main() -> None:
    args, failed = tyro.cli(Args, description=__doc__.split("\n\n")[0]), 0
    if args.command == "compare":
        print(compare([Path(name) for name in args.what]))
        return
    unknown = [name for name in args.what if name not in METHODS]
    if unknown or not args.what:
        sys.exit(f"{args.command} needs tables, of {', '.join(METHODS)}; not {' '.join(unknown) or 'none'}")
    for table in args.what:
        jobs, missing = plan(args, table)
        if args.command == "table":
            print(table_text(table, jobs), end="\n\n")
            continue
        for name in missing:
            print(f"{name}: its file is not in $D4RL_DATASET_DIR or ~/.d4rl/datasets: skipped")
        jobs = [job for job in jobs if job.data not in missing]
        if args.command == "plan":
            for job in jobs:
                print(f"{job.state():6} {job.script}.py --env-id {job.data} {' '.join(job.flags)} --seed {job.seed}")
        else:
            failed += run(jobs, args)
    sys.exit(f"{failed} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
