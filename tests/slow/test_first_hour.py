"""docs/first_hour.md, run from top to bottom as it stands: `python -m pytest -m slow`, about a quarter of an hour.

Nothing is shortened. The commands are the page's own; what it tells the reader to see is checked in what they leave.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def commands(page):
    """The lines of a page's bash blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """A fresh copy of the repository in which every command of the page has run; returns runs/first_hour of it."""
    copy = tmp_path_factory.mktemp("hour") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands("first_hour.md"):
        done = subprocess.run(
            ["bash", "-c", command], cwd=copy, env=os.environ | {"PATH": path}, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return copy / "runs" / "first_hour"


def result(hour, name):
    """(run folder, its result.json) of the run with that --exp-name."""
    (run,) = hour.glob(f"*__{name}__1__*")
    return run, json.loads((run / "result.json").read_text())


def test_pictures(hour):
    """Every picture that the page names, and each run's own."""
    pictures = [hour / name for name in ("optimum.png", "boundary.png", "iql.png", "expectile.png")]
    pictures += [result(hour, name)[0] / "figure.png" for name in ("whole", "no-mu", "iql", "cloning")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_pspo_is_near_the_optimum(hour):
    """Step 1."""
    _, whole = result(hour, "whole")
    assert whole["share_of_optimum"] > 0.985
    assert whole["last"]["eval/predicted_return"] > whole["last"]["eval/return"] - 1


def test_the_posterior_leaves_the_liars(hour):
    """Step 2: the liars' mass, and what the belief costs."""
    found = {}
    for path in (hour / "study" / "poisoned").glob("price*/*/result.json"):
        content = json.loads(path.read_text())
        belief = zip(content["posterior"]["members"], content["posterior"]["probability"], strict=True)
        ratio = content["last"]["eval/start_value"] / content["last"]["eval/discounted_return"]
        found[content["args"]["posterior"]] = sum(p for member, p in belief if member < 3), ratio
    assert found["evidence"][0] < 0.1 and found["uniform"][0] == pytest.approx(0.3)
    assert abs(found["evidence"][1] - 1) < 0.05 and found["uniform"][1] > 1.2
    assert "price, evidence" in (hour / "pspo_poisoned.md").read_text()


def test_without_regularisation_it_sells_at_once(hour):
    """Step 3."""
    assert result(hour, "no-mu")[1]["return"] == pytest.approx(100, abs=1)


def test_iql_and_its_clone(hour):
    """Step 5: a compromise, and exactly nothing."""
    assert 80 < result(hour, "iql")[1]["score"] < 95
    assert result(hour, "cloning")[1]["score"] == 0


def test_steering(hour):
    """Step 6: the identity, a frozen actor that stays, and two figures."""
    run, content = result(hour, "steer")
    assert content["identity"]["largest_relative_difference_of_means"] < 1e-9
    assert content["frozen_return"] > 120
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "grid.png"))
