"""benchmark/steer_study.py: a small study, its numbers against each other."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import steer_study

FLAGS = "--dataset-episodes 60 --updates 20 --hidden 8 --batch-size 32 --eval-episodes 4 --references --no-cuda"
FLAGS += " --priors random --shifts volatility action-noise --folder study"


def test_small_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steer_study.py", *FLAGS.split()])
    steer_study.main()
    rows = list(csv.DictReader((tmp_path / "study" / "cells.csv").open()))
    of = {tuple(r[key] for key in steer_study.KEYS): r for r in rows}
    assert len({key[:3] for key in of}) == 2 * 3 and len(rows) >= 6 * (13 + 2)
    for (*cell, rule, alpha), r in of.items():
        if rule == "kl-reg":  # deterministic, it is PoE
            assert float(r["objective"]) == pytest.approx(float(of[*cell, "poe", alpha]["objective"]), 1e-5)
        assert rule != "frozen" or float(r["kl"]) == float(r["tv_max"]) == float(r["objective_gain"]) == 0
        assert float(r["objective_low"]) <= float(r["objective_gain"]) <= float(r["objective_high"])
    assert len({r["return"] for r in rows if r["rule"] == "frozen"}) == 2  # of a shift, not of a goal or prior
    assert sum(r["selected"] == "True" for r in rows) == 2 * 3  # one a cell
    played = list(csv.DictReader((tmp_path / "study" / "episodes.csv").open()))
    mean = sum(float(r["objective"]) for r in played[:4]) / 4
    assert len(played) == 4 * len(rows) and float(rows[0]["objective"]) == pytest.approx(mean)


def test_a_cell_whose_selected_alpha_is_0():
    played = {("good", "none", "goal", rule, alpha): np.ones((3, 2)) for rule, alpha in (("frozen", 0.0), ("poe", 0.5))}
    for chosen, selected in ((0.0, [True, False]), (0.5, [False, True])):
        rows = steer_study.summarise(played, {("good", "goal"): chosen}, "poe")
        assert [row["selected"] for row in rows] == selected
