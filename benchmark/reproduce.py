"""Run a result again from its result.json alone, and compare.

    python benchmark/reproduce.py runs/<run folder>/result.json

It needs the run folder's copy of the script (or this repository's, if it is the same one) and the data: generated, in
a file or downloaded, as they were then; their hash is compared. On the machine and the versions of the first run every
number must be the same to the last bit on a CPU; elsewhere the scores are compared by their 95% intervals.
Exit code 0: the same, or within the intervals. 1: not. 2: it cannot be run again, and why.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
OF_THE_RUN = ("seconds", "args", "machine", "versions", "dataset")  # not compared: time, place; data by their hash


@dataclass
class Args:
    result: tyro.conf.Positional[Path]
    """a result.json"""
    runs_dir: Path | None = None
    """where the second run folder goes (default: a temporary folder)"""


class CannotRun(Exception):
    pass


def find_script(result: dict, run_dir: Path) -> Path:
    """The script with the result's SHA-256: the run folder's copy, else this repository's."""
    for path in [*sorted(run_dir.glob("*.py")), *sorted(ROOT.glob("*.py"))]:
        if hashlib.sha256(path.read_bytes()).hexdigest() == result["script_sha256"]:
            return path
    raise CannotRun(f"no script with SHA-256 {result['script_sha256'][:12]} in {run_dir} or {ROOT}")


def command_line(args: dict) -> list[str]:
    """A result's arguments as the words of a command line."""
    words = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if value is None or name in ("resume", "runs_dir", "track") or value == []:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def differences(one, other, path: str = "") -> list[str]:
    """Where two JSON values differ, NaN being equal to itself: lines of "place: this, that"."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [line for key in keys for line in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}/{i}")]
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return [] if one == other or both_nan else [f"{path[1:]}: {one}, now {other}"]


def compare(before: dict, after: dict) -> int:
    """Print what is the same and what is not; the exit code."""
    if before["dataset"]["sha256"] != after["dataset"]["sha256"]:
        raise CannotRun(f"the data {before['dataset']['name']} are not what they were: another SHA-256")
    changed = [key for key in before["machine"] if before["machine"][key] != after["machine"].get(key)]
    found = differences(*({k: v for k, v in result.items() if k not in OF_THE_RUN} for result in (before, after)))
    if "score" in before:  # steer_poe.py has many numbers and no such one
        scores = [f"{result['score']:.3f} ± {result['score_ci95']:.3f}" for result in (before, after)]
        print(f"score {scores[0]}, now {scores[1]}")
    if not found:
        print(f"the same to the last bit: {len(differences(before, {})) - len(OF_THE_RUN)} entries compared")
        return 0
    print(f"{len(found)} numbers differ, such as", *found[:10], sep="\n  ")
    for key in changed:
        print(f"{key} was {before['machine'][key]}, is {after['machine'].get(key)}")
    if not changed and before["machine"]["device"] == "cpu":
        print("machine and versions are the same: this should not be")
        return 1
    if "score" not in before:
        return 1
    apart = abs(after["score"] - before["score"])
    within = apart <= math.hypot(before["score_ci95"], after["score_ci95"])
    print(f"scores {apart:.3f} apart, {'within' if within else 'NOT within'} the interval of their difference")
    return 0 if within else 1


def reproduce(path: Path, runs_dir: Path) -> int:
    try:
        before = json.loads(path.read_text())
        script, words = find_script(before, path.parent), command_line(before["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotRun(f"{path} is not a result.json of this project ({type(error).__name__}: {error})") from error
    print("$ python", script, *words, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for liquidation_env
    done = subprocess.run([sys.executable, script, *words, f"--runs-dir={runs_dir}"], env=environment)
    if done.returncode:
        raise CannotRun(f"the run ended with exit code {done.returncode}")
    newest = max(runs_dir.glob("*/result.json"), key=lambda found: found.stat().st_mtime)
    return compare(before, json.loads(newest.read_text()))


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    try:
        if args.runs_dir:
            sys.exit(reproduce(args.result, args.runs_dir))
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(reproduce(args.result, Path(folder)))
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
