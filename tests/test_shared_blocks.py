"""The scripts are self-contained, so what they share is copied: here it is held identical, letter for letter."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("pspo.py", "iql.py", "steer_poe.py")
BLOCKS = {
    "data": (
        "# --- Data: identical in every script of this project (tests/test_shared_blocks.py) ---",
        "# --- end of the shared data block ---",
    ),
    "run folder": (
        "# --- Run folder: identical in every script of this project (tests/test_shared_blocks.py) ---",
        "# --- end of the shared run-folder block ---",
    ),
    "fast steps": (
        "# --- Fast steps: identical in every script of this project (tests/test_shared_blocks.py) ---",
        "# --- end of the shared fast-steps block ---",
    ),
}


def block(script, name):
    """The lines between a block's two landmark comments, which must each be one whole line, once, in order."""
    lines = (ROOT / script).read_text().splitlines()
    first, last = BLOCKS[name]
    assert (lines.count(first), lines.count(last)) == (1, 1), f"{script}: the landmarks of the {name} block"
    assert lines.index(first) < lines.index(last), f"{script}: the {name} block ends before it begins"
    return lines[lines.index(first) + 1 : lines.index(last)]


@pytest.mark.parametrize("name", BLOCKS)
def test_pspo_has_the_block(name):
    """An empty block would make every comparison pass."""
    assert len([line for line in block("pspo.py", name) if line.strip()]) > 20


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("script", [script for script in SCRIPTS[1:] if (ROOT / script).exists()])
def test_block_is_identical(script, name):
    """pytest's comparison of the two lists shows the first line that differs."""
    if (script, name) == ("steer_poe.py", "fast steps"):
        pytest.skip("its actors are frozen, and what it trains is small")
    assert block(script, name) == block("pspo.py", name)


@pytest.mark.parametrize("name", ["evaluate", "evaluate_liquidation", "save_gif", "compare_with_optimum"])
def test_function_is_identical(name):
    """Functions outside the blocks that the two learners share."""
    sources = []
    for script in ("pspo.py", "iql.py"):
        text = (ROOT / script).read_text()
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(nodes) == 1
        sources.append(ast.get_source_segment(text, nodes[0]).splitlines())
    assert sources[0] == sources[1]
