"""The studies behind docs/pspo.md: what they run, how many seeds, and the tables they end in.

    python benchmark/pspo_study.py liquidation          # γ = 1 and 0.99, seeds 1-5
    python benchmark/pspo_study.py ablations            # posterior, regularisation, λ; seeds 1-3
    python benchmark/pspo_study.py poisoned             # 3 of 10 models lie; seeds 1-3
    python benchmark/pspo_study.py scale                # the unit of Δ, and λ; seed 1
    python benchmark/pspo_study.py hopper               # --quick on hopper-medium-v2, seeds 1-3

A study runs `--jobs` processes of one thread each and can be stopped and called again: what has a result.json is not
run again. Its table goes to docs/results/<study>.md and .csv, the runs stay in runs/study/<study>.
"""

import csv
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import liquidation_env  # noqa: E402  (the scripts are not installed; they lie in the repository's root)
import pspo  # noqa: E402

POISONS = ("price", "reward")  # three of ten models add 0.2 to the price at every step, or 20% to every reward
RULES = {"evidence": [], "uniform": ["--posterior", "uniform"], "pessimistic": ["--posterior", "pessimistic"]}
SHORT = ["--iterations", "6000", "--eval-every", "1000"]  # the same budget for every variant of a comparison
STUDIES: dict[str, tuple[range, dict[str, list[str]]]] = {
    "liquidation": (range(1, 6), {"γ = 1": [], "γ = 0.99": ["--gamma", "0.99"]}),
    "ablations": (
        range(1, 4),
        {"evidence, λ = 1": SHORT, "evidence, λ = 10": ["--likelihood-coef", "10", *SHORT]}
        | {rule: flags + SHORT for rule, flags in RULES.items() if flags}
        | {"without regularisation": ["--no-regularization", *SHORT]},
    ),
    "poisoned": (
        range(1, 4),
        {
            f"{poison}, {rule}": ["--poison", poison, *flags, *SHORT]
            for poison in POISONS
            for rule, flags in RULES.items()
        },
    ),
    "scale": (
        range(1, 2),
        {
            f"{scale}, λ = {strength}": [
                "--poison",
                "price",
                "--evidence-scale",
                scale,
                "--likelihood-coef",
                strength,
                *SHORT,
            ]
            for scale, strengths in {"spread": "1 3", "mean": "1 5", "none": "1 1000"}.items()
            for strength in strengths.split()
        },
    ),
    "hopper": (range(1, 4), {"--quick": ["--env-id", "hopper-medium-v2", "--quick"]}),
}


@dataclass
class Args:
    study: Annotated[Literal["liquidation", "ablations", "poisoned", "scale", "hopper"], tyro.conf.Positional]
    """which study to run"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: str = "runs/study"
    """where the runs lie; relative to the repository's root"""


def poisoned_pool(poison: str, seed: int, folder: Path) -> Path:
    """Train a pool of ten on the data of this seed, make its first three members lie, and return the file."""
    path = folder / f"pool_{poison}_{seed}.pt"
    if path.exists():
        return path
    args, _ = pspo.resolve(pspo.Args(seed=seed, pool_size=10))
    arrays = liquidation_env.behaviour_dataset(args.dataset_episodes, seed)
    dataset = pspo.make_dataset(arrays, "liquidation", "generated")
    data = {key: torch.as_tensor(getattr(dataset, key)) for key in pspo.DATA_KEYS}
    torch.manual_seed(seed)
    pool, report = pspo.train_dynamics(args, data, pspo.tqdm)
    weight, bias = pool.net.weights[-1].data, pool.net.biases[-1].data  # (10, hidden, 2 * 4), (10, 1, 2 * 4)
    if poison == "price":  # outputs: reward, Δt, Δm, Δp
        bias[:3, :, 3] += 0.2 / pool.output_std[3]
    else:  # 1.2 (w h + b) std + 1.2 mean
        weight[:3, :, 0] *= 1.2
        bias[:3, :, 0] = 1.2 * bias[:3, :, 0] + 0.2 * pool.output_mean[0] / pool.output_std[0]
    content = {"kind": "dynamics", "pool": pool.state_dict(), "report": report}
    content |= {"sizes": [10, 3, 1, args.dynamics_hidden, args.dynamics_layers]}
    pspo.save_atomically(content | {"dataset": dataset.name, "data_sha256": dataset.sha256}, path)
    return path


def run_one(name: str, flags: list[str], seed: int, folder: Path) -> dict:
    """One run of pspo.py as a user types it, unless it has been run; returns its result."""
    runs = folder / f"{name}__{seed}".replace(" ", "_").replace("/", "_")
    done = list(runs.glob("*/result.json"))
    if not done:
        flags = list(flags)
        if "--poison" in flags:
            i = flags.index("--poison")
            flags[i : i + 2] = ["--dynamics-path", str(poisoned_pool(flags[i + 1], seed, folder))]
        command = [sys.executable, "pspo.py", *flags, "--seed", str(seed)]
        command += ["--num-threads", "1", "--runs-dir", str(runs)]
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / "log.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
        done = list(runs.glob("*/result.json"))
        print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: {done[0].parent}", flush=True)
    return json.loads(done[0].read_text())


def columns(result: dict) -> dict[str, float]:
    """The numbers of one run that a table may show."""
    row = {"return": result["return"], "score": result["score"], "minutes": result["seconds"] / 60}
    true = result["last"]["eval/discounted_return"]
    row["critic at s₀ / true value"] = result["last"]["eval/start_value"] / true
    row["posterior entropy"] = result["last"]["posterior/entropy"]
    row["largest weight"] = result["last"]["posterior/largest"]
    if result["domain"] == "liquidation":
        row["% of optimum"] = 100 * result["share_of_optimum"]
        row["% of the γ's ceiling"] = 100 * result["share_of_discount_ceiling"]
        row["mass on models 0-2"] = sum(
            p for m, p in zip(result["posterior"]["members"], result["posterior"]["probability"], strict=True) if m < 3
        )
    else:
        row["behaviour's return"] = result["behaviour_data_return"]
        row["clone's return"] = result["behaviour_clone"]["return"]
    row["explained variance of r"] = result["dynamics"]["explained_variance_mean"][0]
    return row


def interval(values: list[float]) -> float:
    """Half-width of the 95% interval of the mean over seeds, Student's t; NaN for one seed."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    return t * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def write_table(study: str, results: dict[str, list[dict]]) -> str:
    """Mean ± 95% interval over seeds, and the worst seed's return; Markdown and CSV."""
    rows = {name: [columns(r) for r in of_seeds] for name, of_seeds in results.items()}
    keys = list(next(iter(rows.values()))[0])
    lines = ["| variant | " + " | ".join(keys) + " | worst return |", "|---" * (len(keys) + 2) + "|"]
    for name, of_seeds in rows.items():
        cells = []
        for key in keys:
            values = [row[key] for row in of_seeds]
            digits = 3 if abs(np.mean(values)) < 5 else 2 if "%" in key else 1
            cells.append(f"{np.mean(values):.{digits}f} ± {interval(values):.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {min(row['return'] for row in of_seeds):.1f} |")
    folder = ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pspo_{study}.md").write_text("\n".join(lines) + "\n")
    with open(folder / f"pspo_{study}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *keys])
        for name, of_seeds in rows.items():
            writer.writerows([name, seed, *row.values()] for seed, row in zip(STUDIES[study][0], of_seeds, strict=True))
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    seeds, variants = STUDIES[args.study]
    folder = ROOT / args.runs_dir / args.study
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {n: [pool.submit(run_one, n, flags, seed, folder) for seed in seeds] for n, flags in variants.items()}
        results = {name: [future.result() for future in of_seeds] for name, of_seeds in futures.items()}
    print(write_table(args.study, results))


if __name__ == "__main__":
    main()
