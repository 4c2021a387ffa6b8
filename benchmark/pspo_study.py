"""The studies behind docs/pspo.md: what they run, how many seeds, and the tables they end in.

    python benchmark/pspo_study.py liquidation          # γ = 1 and 0.99, seeds 1-5
    python benchmark/pspo_study.py ablations            # posterior, regularisation, λ; seeds 1-3
    python benchmark/pspo_study.py poisoned             # 3 of 10 models lie; seeds 1-3
    python benchmark/pspo_study.py poisoned-reward      # the lie about the reward, until the critic has converged
    python benchmark/pspo_study.py scale                # the unit of Δ, and λ; seed 1
    python benchmark/pspo_study.py hopper               # --quick on hopper-medium-v2, seeds 1-3

A study runs `--jobs` processes of one thread each and can be stopped and called again: what has a result.json is not
run again. Its table goes to docs/results/<study>.md and .csv, the runs stay in runs/study/<study>.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runner import ROOT, Job, UserError, interval, require, run_jobs  # it also makes the scripts importable

import liquidation_env
import pspo

POISONS = ("price", "reward")  # three of ten models add 0.2 to the price at every step, or 20% to every reward
RULES = {"evidence": {}, "uniform": {"posterior": "uniform"}, "pessimistic": {"posterior": "pessimistic"}}
SHORT = {"iterations": 6000, "eval_every": 1000}  # the same budget for every variant of a comparison
SCALES = {"spread": (1.0, 3.0), "mean": (1.0, 5.0), "none": (1.0, 1000.0)}
# Seeds, and variants: settings of pspo.py, and "poison", which becomes a dynamics_path.
STUDIES: dict[str, tuple[range, dict[str, dict[str, Any]]]] = {
    "liquidation": (range(1, 6), {"γ = 1": {}, "γ = 0.99": {"gamma": 0.99}}),
    "ablations": (
        range(1, 4),
        {"evidence, λ = 1": SHORT, "evidence, λ = 10": {"likelihood_coef": 10.0} | SHORT}
        | {rule: settings | SHORT for rule, settings in RULES.items() if settings}
        | {"without regularisation": {"regularization": False} | SHORT},
    ),
    "poisoned": (
        range(1, 4),
        {f"{poison}, {rule}": {"poison": poison} | RULES[rule] | SHORT for poison in POISONS for rule in RULES},
    ),
    "poisoned-reward": (
        range(1, 4),
        {f"reward, {rule}": {"poison": "reward"} | RULES[rule] for rule in ("evidence", "uniform")},
    ),
    "scale": (
        range(1, 2),
        {
            f"{scale}, λ = {strength:g}": {"poison": "price", "evidence_scale": scale, "likelihood_coef": strength}
            | SHORT
            for scale, strengths in SCALES.items()
            for strength in strengths
        },
    ),
    "hopper": (range(1, 4), {"--quick": {"env_id": "hopper-medium-v2", "quick": True}}),
}


@dataclass
class Args:
    study: Annotated[
        Literal["liquidation", "ablations", "poisoned", "poisoned-reward", "scale", "hopper"], tyro.conf.Positional
    ]
    """which study to run"""
    seeds: tuple[int, ...] = ()
    """other seeds than the study's own"""
    variants: tuple[str, ...] = ()
    """only these of the study's variants, by the names in its table"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: Path = ROOT / "runs" / "study"
    """where the runs lie"""
    output_dir: Path = ROOT / "docs" / "results"
    """where the table is written"""


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


def plan(args: Args) -> dict[str, list[Job]]:
    """The jobs of a study: variant -> one a seed. Trains the poisoned pools that are missing. Raises UserError."""
    seeds, variants = STUDIES[args.study]
    unknown = [name for name in args.variants if name not in variants]
    require(not unknown, f"--variants {'; '.join(unknown)}: {args.study} has {'; '.join(variants)}")
    folder, jobs = args.runs_dir.absolute() / args.study, {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.variants or variants:
        jobs[name], variant = [], variants[name]
        for seed in args.seeds or seeds:
            settings = {key: value for key, value in variant.items() if key != "poison"} | {"seed": seed}
            if "poison" in variant:
                settings["dynamics_path"] = str(poisoned_pool(variant["poison"], seed, folder))
            runs = folder / f"{name}__{seed}".replace(" ", "_").replace("/", "_")
            jobs[name].append(Job("pspo", settings, runs))
    return jobs


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
        row["sampled return"] = result["sampled"]["return"]
        row["clone's sampled return"] = result["behaviour_clone"]["sampled_return"]
    row["explained variance of r"] = result["dynamics"]["explained_variance_mean"][0]
    return row


def write_table(args: Args, results: dict[str, list[dict]]) -> str:
    """Mean ± 95% interval over seeds, and the worst seed's return; Markdown and CSV."""
    rows = {name: [columns(r) for r in of_seeds] for name, of_seeds in results.items()}
    keys = list(next(iter(rows.values()))[0])
    every = [result for of_seeds in results.values() for result in of_seeds]
    seeds = sorted({result["args"]["seed"] for result in every})
    known = [("data", lambda r: r["dataset"]["source"].split(", seed")[0])]
    known += [("device", lambda r: f"{r['machine']['device']}, {r['machine']['threads']} thread(s)")]
    known += [("SHA-256 of pspo.py", lambda r: r["script_sha256"][:9])]
    about = "; ".join(f"{name}: {', '.join(sorted({of(r) for r in every}))}" for name, of in known)
    lines = [f"`python benchmark/pspo_study.py {args.study}`, seeds {', '.join(map(str, seeds))}; {about}.", ""]
    lines += ["| variant | " + " | ".join(keys) + " | worst return |", "|---" * (len(keys) + 2) + "|"]
    for name, of_seeds in rows.items():
        cells = []
        for key in keys:
            values = [row[key] for row in of_seeds]
            digits = 3 if abs(np.mean(values)) < 5 else 2 if "%" in key else 1
            spread = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {min(row['return'] for row in of_seeds):.1f} |")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"pspo_{args.study.replace('-', '_')}.md").write_text("\n".join(lines) + "\n")
    with open(args.output_dir / f"pspo_{args.study.replace('-', '_')}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *keys])
        for name, of_seeds in rows.items():
            for row, result in zip(of_seeds, results[name], strict=True):
                writer.writerow([name, result["args"]["seed"], *row.values()])
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        jobs = plan(args)
        failed = run_jobs([job for of_seeds in jobs.values() for job in of_seeds], args.jobs)
        if failed:
            raise UserError("; ".join(failed))
        print(write_table(args, {name: [job.result() for job in of_seeds] for name, of_seeds in jobs.items()}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
