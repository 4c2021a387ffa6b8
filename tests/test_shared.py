"""The scripts are self-contained, so what they share is copied: here it is held the same text. And plain Python."""

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

import iql
import pspo
import steer_poe

ROOT = Path(__file__).resolve().parents[1]
TEXT = {name: (ROOT / name).read_text() for name in ("iql.py", "pspo.py", "steer_poe.py")}
DIFFERENT = {  # of one name, and rightly not one text
    "Actor": "each paper's Gaussian: what is squashed, what its std depends on",
    "Args": "each paper's settings",
    "Critic": "PSPO's sees the action in units of μ, with layer normalisation; steering's values several rewards",
    "adam": "PSPO's models have weight decay",
    "main": "other loops",
    "parse": "steering has nothing to resume",
    "plot": "other figures",
}


def pieces(name):
    """Functions and classes of a script by name, each with its decorators, comments and layout."""
    nodes = [node for node in ast.parse(TEXT[name]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = TEXT[name].splitlines()
    first = {node.name: min([node.lineno, *[d.lineno for d in node.decorator_list]]) - 1 for node in nodes}
    return {node.name: lines[first[node.name] : node.end_lineno] for node in nodes}


@pytest.mark.parametrize("one, other", list(combinations(TEXT, 2)))
def test_one_name_is_one_text(one, other):
    mine, theirs = pieces(one), pieces(other)
    common = mine.keys() & theirs.keys()
    different = {name for name in common if mine[name] != theirs[name]}
    assert len(common) > 15 and different <= DIFFERENT.keys(), different - DIFFERENT.keys()


@pytest.mark.parametrize("script", (iql, pspo, steer_poe))
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_spread_has_the_unit_of_its_column(script, unit):
    """Standard deviations in any unit; a constant column's own size, and 1 of one that is 0."""
    torch.manual_seed(0)
    x = torch.randn(1000, 4) * torch.tensor([1.0, 1e-3, 0.0, 0.0]) + torch.tensor([5.0, 0.0, -3.0, 0.0])
    expected = [unit * x[:, 0].std(), unit * x[:, 1].std(), 3 * unit, 1.0]
    assert script.spread(unit * x).tolist() == pytest.approx([float(e) for e in expected], rel=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_installs_what_the_requirements_say(name):
    """`uv run iql.py` reads the block at the top (PEP 723)."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///\n", TEXT[name], re.MULTILINE).group(1)
    wanted = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert re.findall(r'"([^"]+==[^"]+)"', block) == [line for line in wanted if line]
    assert TEXT[name].startswith("# /// script") and 'requires-python = ">=3.11"' in block


@pytest.mark.parametrize("name", TEXT)
def test_plain_python(name):
    """At most two `try`, and nothing private of a library's."""
    nodes = list(ast.walk(ast.parse(TEXT[name])))
    assert sum(isinstance(node, ast.Try) for node in nodes) <= 2
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {part for node in nodes if isinstance(node, ast.ImportFrom) for part in node.module.split(".")}
    names |= {
        part for node in nodes if isinstance(node, ast.Import) for alias in node.names for part in alias.name.split(".")
    }
    assert {name for name in names if re.match("_[a-z]", name)} == set()
