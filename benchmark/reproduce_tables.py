"""The papers' result tables: plan the runs, run them, and write the numbers beside the papers'.

    python benchmark/reproduce_tables.py pspo-table2                   # liquidation: PSPO and IQL, 5 seeds
    python benchmark/reproduce_tables.py pspo-table1 --dry-run         # 18 D4RL data sets: print the plan only
    python benchmark/reproduce_tables.py pspo-table3 --quick --datasets hopper-medium-v2 --seeds 1 2 3
    python benchmark/reproduce_tables.py iql-locomotion --engine ray   # on the cluster that RAY_ADDRESS names
    python benchmark/reproduce_tables.py steering --datasets hopper-medium-v2
    python benchmark/reproduce_tables.py pspo-table2 --report          # only write what has been run

A run that has its result.json is not repeated, one that was stopped goes on; both may have been started by another
table. Cells without a run say "not run". Settings are the scripts' defaults, i.e. the papers' on D4RL; what --quick and
--set change is written above the table, and its file is named so. Markdown and CSV go to docs/results/.
"""

import ast
import csv
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runner import ROOT, Job, UserError, flags, interval, read_csv, require, run_jobs, script

TASKS, LEVELS = ("halfcheetah", "hopper", "walker2d"), ("random", "medium", "expert", "medium-expert", "medium-replay")
D4RL = [f"{task}-{level}-v2" for task in TASKS for level in (*LEVELS, "full-replay")]
LOCOMOTION = [f"{task}-{level}-v2" for level in ("medium", "medium-replay", "medium-expert") for task in TASKS]

# PSPO's Table 1: PSPO, its standard deviation, and what it is compared with.
TABLE1_METHODS = ("PMDB", "ADM", "EPQ", "CQL")
TABLE1 = dict(
    zip(
        D4RL,
        [
            (37.7, 0.5, 37.8, 45.4, 33.0, 31.3), (79.3, 0.9, 75.6, 72.2, 67.3, 46.9),
            (93.3, 0.6, 105.7, 89.4, 107.2, 97.3), (109.7, 1.6, 108.5, 103.7, 95.7, 95.0),
            (78.4, 0.8, 71.7, 67.6, 62.0, 45.3), (94.9, 1.2, 90.0, 86.3, 85.3, 76.9),
            (31.9, 0.6, 32.7, 32.7, 32.1, 5.3), (108.5, 1.3, 106.8, 107.4, 101.3, 61.9),
            (116.6, 1.2, 111.7, 102.3, 112.4, 106.5), (112.8, 1.4, 111.8, 112.7, 108.8, 96.9),
            (110.0, 1.1, 106.2, 104.4, 97.8, 86.3), (112.5, 1.6, 109.1, 108.5, 108.5, 101.9),
            (22.1, 0.1, 21.8, 22.2, 23.0, 5.4), (103.9, 2.5, 94.2, 93.2, 87.8, 79.5),
            (109.8, 1.4, 115.9, 5.5, 109.8, 109.3), (116.1, 1.0, 111.9, 114.9, 112.0, 109.1),
            (97.0, 1.4, 79.9, 95.6, 85.3, 76.8), (107.8, 1.2, 95.4, 99.9, 107.4, 94.2),
        ],
        strict=True,
    )
)  # fmt: skip
# PSPO's Table 3: how many percent an ablation loses, and by how much its standard deviation grows.
TABLE3 = {
    "uniform posterior": dict(zip(D4RL, [
        (19.1, 9), (5.9, 2.2), (11.2, 16), (3.9, 3.1), (9.4, 4), (5.6, 1.9),
        (68.1, 0.5), (68.1, 0.9), (53.4, 4.4), (9.9, 5.4), (67.9, 1.3), (11.1, 6),
        (14.5, 35), (3.9, 0.96), (67.1, 13.5), (16.3, 12), (1.7, 2.2), (4.8, 1.9),
    ], strict=True)),
    "without regularisation": dict(zip(D4RL, [
        (13.3, 1.7), (5.8, 1.6), (23.9, 4.4), (17.3, 1.5), (9.1, 2.1), (7.4, 1.6),
        (68.1, 1.1), (13.2, 9.5), (20.0, 14.9), (12.8, 8), (4.7, 6.8), (10.3, 10.4),
        (13.9, 53), (9.1, 1.6), (78.6, 2), (8.3, 3.6), (8.1, 1.1), (9.3, 1.5),
    ], strict=True)),
}  # fmt: skip
# The rows of PSPO's Table 2 that this project has a script for; γ = 0.99 is the paper's (Table 5), 1 the script's.
TABLE2 = {"PSPO": (102.3, 1.5), "PSPO, γ = 0.99": (102.3, 1.5), "IQL": (0.0, 0.0)}
IQL_TABLE1 = dict(zip(LOCOMOTION, (47.4, 66.3, 78.3, 44.2, 94.7, 73.9, 86.7, 91.5, 109.6), strict=True))


@dataclass(frozen=True)
class Variant:
    """A column of runs: a script and the settings in which it differs from the table's others."""

    name: str
    script: str
    settings: dict[str, Any]


PSPO = Variant("PSPO", "pspo", {})
# The paper's grid: a clean prior and no shift. Its text tells of no cell but these.
STUDY = Variant("study", "steer_poe", {"study": True, "references": True, "priors": ("clean",), "shifts": ("none",)})
STEERING = {"medium-expert": "HURT at every α", "medium-replay": "depends strongly on α"}
TABLES: dict[str, tuple[list[str], list[Variant]]] = {
    "pspo-table1": (D4RL, [PSPO]),
    "pspo-table2": (
        ["liquidation"],
        [PSPO, Variant("PSPO, γ = 0.99", "pspo", {"gamma": 0.99}), Variant("IQL", "iql", {})],
    ),
    "pspo-table3": (
        D4RL,
        [
            PSPO,
            Variant("uniform posterior", "pspo", {"posterior": "uniform"}),
            Variant("without regularisation", "pspo", {"regularization": False}),
        ],
    ),
    "iql-locomotion": (LOCOMOTION, [Variant("IQL", "iql", {})]),
    "steering": (LOCOMOTION, [STUDY]),
}


@dataclass
class Args:
    table: Annotated[
        Literal["pspo-table1", "pspo-table2", "pspo-table3", "iql-locomotion", "steering"], tyro.conf.Positional
    ]
    """which table"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of every cell"""
    datasets: tuple[str, ...] = ()
    """only these of the table's data sets"""
    variants: tuple[str, ...] = ()
    """only these of the table's variants"""
    quick: bool = False
    """the scripts' own --quick: a CPU-sized setting for MuJoCo"""
    set: tuple[str, ...] = ()
    """NAME=VALUE settings of every run, e.g. iterations=1000"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, one thread each"""
    engine: Literal["local", "ray"] = "local"
    """local: processes on this machine; ray (`pip install ray`): the cluster of RAY_ADDRESS, else this machine"""
    runs_dir: Path = ROOT / "runs" / "tables"
    """where the runs lie"""
    output_dir: Path = ROOT / "docs" / "results"
    """where the tables are written"""
    dry_run: bool = False
    """print what would be run, and run nothing"""
    report: bool = False
    """run nothing, write the tables of what has been run"""


def read_settings(words: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE words as settings; a value is a Python literal, else a string. Raises UserError."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        require(bool(name and equals), f"--set {word}: write NAME=VALUE")
        try:
            settings[name.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name.replace("-", "_")] = value
    return settings


def folder_name(settings: dict[str, Any]) -> str:
    """A name for the settings: in words where they are few, else by their hash."""
    words = {name: "+".join(map(str, x)) if isinstance(x, tuple) else x for name, x in settings.items()}
    name = "__".join(f"{name}={value}" for name, value in words.items()).replace("/", "_") or "default"
    return name if len(name) < 60 else hashlib.sha256(name.encode()).hexdigest()[:12]


def plan(args: Args) -> dict[tuple[str, str], list[Job]]:
    """The jobs of every cell: (data set, variant's name) -> one job a seed. Raises UserError."""
    datasets, variants = TABLES[args.table]
    unknown = [name for name in args.datasets if name not in datasets]
    require(not unknown, f"--datasets {' '.join(unknown)}: {args.table} has {', '.join(datasets)}")
    names = [variant.name for variant in variants]
    unknown = [name for name in args.variants if name not in names]
    require(not unknown, f"--variants {' '.join(unknown)}: {args.table} has {'; '.join(names)}")
    variants = [variant for variant in variants if not args.variants or variant.name in args.variants]
    common = read_settings(args.set) | ({"quick": True} if args.quick else {})
    fields = {variant.script: set(script(variant.script).Args.__dataclass_fields__) for variant in variants}
    wrong = [name for name in common if not any(name in of_script for of_script in fields.values())]
    require(not wrong, f"no setting of {', '.join(fields)}: {', '.join(wrong)}; see their --help")
    jobs = {}
    for dataset in args.datasets or datasets:
        for variant in variants:
            changed = {name: value for name, value in common.items() if name in fields[variant.script]}
            if dataset == "liquidation":  # its own setting is CPU-sized already
                changed.pop("quick", None)
            settings = variant.settings | changed
            folder = args.runs_dir / variant.script / dataset / folder_name(settings)
            jobs[dataset, variant.name] = [
                Job(variant.script, {"env_id": dataset} | settings | {"seed": seed}, folder / f"seed{seed}")
                for seed in args.seeds
            ]
    return jobs


# --- Tables ---


def mean_interval(values: list[float]) -> str:
    """ "mean ± half-width (number of seeds)", or "not run"."""
    if not values:
        return "not run"
    spread = f" ± {interval(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread} ({len(values)})"


def sources(results: list[dict]) -> str:
    """Where the data of some results come from, seeds left out."""
    return "; ".join(dict.fromkeys(result["dataset"]["source"].split(", seed")[0] for result in results)) or "–"


def score_table(cells: dict, published: dict[tuple[str, str], str], paper: str) -> list[list[str]]:
    """A row for every data set and variant: the paper's score, ours, the data."""
    table = [["data set", "variant", f"{paper} (published)", "here: mean ± 95% interval (seeds)", "data used here"]]
    for (dataset, variant), results in cells.items():
        scores = [result["score"] for result in results]
        row = [dataset, variant, published.get((dataset, variant), "–"), mean_interval(scores), sources(results)]
        table.append(row)
    return table


def drop(full: list[float], ablated: list[float]) -> str:
    """By how many percent the ablation's mean is lower, and how many times larger its standard deviation."""
    if not full or not ablated or np.mean(full) == 0:
        return "not run"
    percent = 100 * (np.mean(full) - np.mean(ablated)) / abs(np.mean(full))
    if min(len(full), len(ablated)) < 2:
        return f"{percent:.1f}% (one seed)"
    return f"{percent:.1f}% ({np.std(ablated, ddof=1) / np.std(full, ddof=1):.1f}x)"


def ablation_table(cells: dict) -> list[list[str]]:
    """PSPO's Table 3: a row for every data set and ablation."""
    head = ["data set", "ablation", "PSPO here", "ablation here", "loss here (std)", "loss published (std)", "data"]
    table = [head]
    for (dataset, variant), results in cells.items():
        if variant != PSPO.name:
            full, ablated = ([r["score"] for r in some] for some in (cells.get((dataset, PSPO.name), []), results))
            percent, ratio = TABLE3[variant][dataset]
            scores = [mean_interval(full), mean_interval(ablated), drop(full, ablated)]
            table.append([dataset, variant, *scores, f"{percent}% ({ratio}x)", sources(results)])
    return table


def steering_cell(rows: list[dict]) -> tuple[str, str]:
    """PoE minus Frozen, the goal's objective in percent of Frozen's, as words and as a class.

    rows: of cells.csv, joined with Frozen's objective; one a seed. One seed has the paired bootstrap's interval over
    episodes, several have Student's over seeds.
    """
    percent = np.array(
        [
            [100 * float(row[f"objective_{x}"]) / abs(row["frozen"]) for x in ("difference", "low", "high")]
            for row in rows
        ]
    )  # (seeds, 3)
    middle, low, high = percent.mean(0)
    if len(rows) > 1:
        half = interval(list(percent[:, 0]))
        low, high = middle - half, middle + half
    word = script("steer_poe").classify(low, high)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}] {word}", word


def steering_table(cells: dict, jobs: dict) -> tuple[list[list[str]], str]:
    """The steering grid, PoE at the paper's α and at the selector's, and how the cells split, beside the paper's."""
    alphas = (0.1, 0.3, 0.5, 0.7, 0.9)
    head = ["data set", "goal", *(f"PoE({alpha})" for alpha in alphas), "at the selector's α", "the paper's text"]
    table, split = [[*head, "seeds", "data used here"]], []
    for (dataset, variant), results in cells.items():
        found, chosen = {}, {}  # (goal, α) -> rows, one a seed; goal -> rows
        for job in jobs[dataset, variant]:
            run = job.finished()
            if run is None:
                continue
            rows = [
                {**row, "alpha": float(row["alpha"])}
                for row in read_csv(run / "cells.csv")
                if (row["prior"], row["shift"]) == ("clean", "none") and row["rule"] in ("frozen", "poe")
            ]
            frozen = {row["goal"]: float(row["objective"]) for row in rows if row["rule"] == "frozen"}  # one a goal
            picked = {
                row["goal"]: float(row["alpha"])
                for row in read_csv(run / "selector.csv")
                if (row["prior"], row["shift"]) == ("clean", "none")
            }
            for row in rows:
                row["frozen"] = frozen[row["goal"]]
                if row["rule"] == "poe":
                    found.setdefault((row["goal"], row["alpha"]), []).append(row)
                    if row["alpha"] == picked[row["goal"]]:
                        chosen.setdefault(row["goal"], []).append(row)
        quoted = next((text for level, text in STEERING.items() if dataset.endswith(f"-{level}-v2")), "–")
        for goal in list(dict.fromkeys(goal for goal, _ in found)) or ["–"]:
            cells_here = [found.get((goal, alpha)) for alpha in alphas] + [chosen.get(goal)]
            said = [steering_cell(rows) if rows else ("not run", "") for rows in cells_here]
            picked = sorted({f"{row['alpha']:g}" for row in chosen.get(goal, [])})
            words = [text for text, _ in said[:-1]] + [said[-1][0] + (f" (α {', '.join(picked)})" if picked else "")]
            split += [said[-1][1]] if quoted == "–" else []  # the others are not of the paper's 12 cells
            table.append([dataset, goal, *words, quoted, str(len(results)), sources(results)])
    ran = [result for results in cells.values() for result in results]
    how = sorted({f"{r['args']['episodes']} episodes a configuration, actor {r['args']['actor']}" for r in ran})
    counts = [split.count(name) for name in ("HELP", "FROZEN", "HURT")]
    text = (
        f"{counts[0]} HELP, {counts[1]} FROZEN, {counts[2]} HURT of {sum(counts)} cells" if sum(counts) else "not run"
    )
    return table, (
        "PoE minus Frozen: the goal's objective, percent of Frozen's. In brackets the 95% interval: over episodes, "
        f"paired, for one seed (then without the chance in training); over seeds for more. {'; '.join(how)}\n"
        f"Split at the selector's α, medium-replay and medium-expert apart as in the paper: {text}. The paper: 4 HELP, "
        "5 FROZEN, 3 HURT of the 12 cells of its four data sets, which our text of it does not name."
    )


def write(args: Args, jobs: dict[tuple[str, str], list[Job]]) -> str:
    """Markdown and CSV of the finished runs; returns the Markdown."""
    cells, note = {cell: [r for r in (job.result() for job in some) if r] for cell, some in jobs.items()}, ""
    if args.table == "pspo-table3":
        table = ablation_table(cells)
    elif args.table == "steering":
        table, note = steering_table(cells, jobs)
    elif args.table == "iql-locomotion":
        table = score_table(cells, {(d, "IQL"): f"{IQL_TABLE1[d]}" for d in LOCOMOTION}, "IQL's paper")
    else:
        published = {(d, "PSPO"): f"{row[0]} ± {row[1]}" for d, row in TABLE1.items()}
        published |= {("liquidation", name): f"{score} ± {std}" for name, (score, std) in TABLE2.items()}
        table = score_table(cells, published, "PSPO's paper")
        if args.table == "pspo-table1":
            for i, method in enumerate(TABLE1_METHODS):
                table[0].insert(3 + i, f"{method} (published)")
                for row in table[1:]:
                    row.insert(3 + i, str(TABLE1[row[0]][2 + i]))
    changed = [f"`{word}`" for word in (*args.set, *(["--quick"] if args.quick else []))]
    about = f"`python benchmark/reproduce_tables.py {args.table}`, seeds {', '.join(map(str, args.seeds))}"
    about += f"; changed: {', '.join(changed)}" if changed else "; the scripts' own settings"
    ran = [result for results in cells.values() for result in results]
    machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} thread(s)" for r in ran})
    versions = sorted(
        {r.get("script_sha256", "not noted")[:9] for r in ran}
    )  # more than one: the script changed between runs
    about += f".\n{len(ran)} of {sum(map(len, jobs.values()))} runs are in"
    about += f", on {'; '.join(machines)}; SHA-256 of the script: {', '.join(versions)}.\n" if ran else ".\n"
    about += f"{note}\n" if note else ""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" * len(table[0]) + "|")
    name = args.table.replace("-", "_") + ("_quick" if args.quick else "") + ("_changed" if args.set else "")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.md").write_text(about + "\n" + "\n".join(lines) + "\n")
    with open(args.output_dir / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["data set", "variant", "seed", "score", "return", "data", "data sha256", "minutes"])
        for (dataset, variant), results in cells.items():
            for r in results:
                numbers = [
                    r["args"]["seed"],
                    r.get("score", r.get("frozen_score")),
                    r.get("return", r.get("frozen_return")),
                ]
                data = [r["dataset"]["source"], r["dataset"]["sha256"], round(r["seconds"] / 60, 2)]
                writer.writerow([dataset, variant, *numbers, *data])
    return about + "\n" + "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    failed = []
    try:
        jobs = plan(args)
        every = [job for some in jobs.values() for job in some]
        if args.dry_run:
            for job in every:
                print(f"{job.state():6} python {job.script}.py {' '.join(flags(job.settings))}")
            return
        if not args.report:
            failed = run_jobs(every, args.jobs, args.engine)
        print(write(args, jobs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if failed:
        print("error: " + "; ".join(failed), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
