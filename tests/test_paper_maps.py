"""The paper maps of docs/: every numbered item of a paper has a row, every name that a row gives exists."""

import ast
import functools
import re

import pytest
from docs_pages import ROOT, first_table, names, section

# What the papers number, from their texts; equations in round brackets.
PSPO_EQUATIONS = [f"({number})" for number in range(1, 16)]
ITEMS = {
    "pspo.md": PSPO_EQUATIONS
    + ["Principle 1", "Principle 2", "Proposition 1", "Proposition 2", "Lemma 1", "Theorem 1", "Theorem 2"]
    + ["Remark 1", "Remark 2", "Remark 3", "Remark 4", "section 9.1", "Algorithm 1"]
    + [f"Table {number}" for number in range(1, 7)]
    + [f"Figure {number}" for number in range(1, 4)],
    "iql.md": [f"({number})" for number in range(1, 8)]
    + ["Lemma 1", "Lemma 2", "Corollary 2.1", "Theorem 3", "Algorithm 1", "Appendix B"]
    + ["Table 1", "Table 2", "Table 3", "Figure 1"],
    "liquidation.md": [f"12.1.2 {what}" for what in ("state", "initial rate", "action", "reward", "rate", "dataset")]
    + ["12.1.2 horizon", "(15)", "Table 2", "Table 4"],
    # Its text was not at hand: what its abstract, a review and fragments of its appendix name.
    "steer_poe.md": [
        "identity theorem",
        "PoE",
        "KL-Reg",
        "graceful degradation",
        "study",
        "(3)",
        "Table 11",
        "Table 19",
    ],
}
SCRIPTS = {
    "pspo.md": "pspo.py",
    "iql.md": "iql.py",
    "liquidation.md": "liquidation_env.py",
    "steer_poe.md": "steer_poe.py",
}
HEADER = ["no.", "what it says", "code", "test", "mark; other readings"]
MARKS = ("stated", "derived", "our reading")


def rows(page):
    header, body = first_table(section(page, "Paper map"))
    assert header == HEADER
    return body


def items(cell):
    """The items of a "no." cell: separated by commas, (1)–(3) is three, what follows a colon is a part."""
    found = []
    for item in cell.split(", "):
        span = re.fullmatch(r"\((\d+)\)–\((\d+)\)", item)
        found += [f"({n})" for n in range(int(span[1]), int(span[2]) + 1)] if span else [item]
    return found


@functools.cache
def defined(path):
    """Names that a Python file defines: functions, classes, Class.method, and assigned constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.fixture(scope="module")
def all_tests():
    return {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined(path) if name.startswith("test_")}


@pytest.mark.parametrize("page", ITEMS)
def test_every_numbered_item_has_a_row(page):
    found = [item for row in rows(page) for item in items(row[0])]
    assert sorted(set(found)) == sorted(found), "an item has two rows"
    missing = [item for item in ITEMS[page] if not any(re.match(rf"{re.escape(item)}(:|$)", have) for have in found)]
    assert missing == []


@pytest.mark.parametrize("page", ITEMS)
def test_every_name_exists(page, all_tests):
    """`name` is defined in the page's script, `file.py::name` in another one, `folder/file.py` is there."""
    for number, _, code, tests, _ in rows(page):
        for name in names(code):
            file, _, inner = name.rpartition("::") if "::" in name else (SCRIPTS[page], "", name)
            if name.endswith(".py"):
                assert (ROOT / name).is_file(), f"{page} {number}: {name}"
            else:
                assert inner in defined(ROOT / file), f"{page} {number}: {name}"
        for name in names(tests):
            assert name in all_tests, f"{page} {number}: {name}"


@pytest.mark.parametrize("page", ITEMS)
def test_every_row_is_marked_and_honest_about_gaps(page):
    """A row without code or without a test says why in its last cell, by a "not", "never" or "nothing"."""
    for number, says, code, tests, mark in rows(page):
        assert says and mark.startswith(MARKS), f"{page} {number}: {mark}"
        for cell in (code, tests):
            assert names(cell) or (cell == "–" and re.search(r"\b(not|never|nothing)\b", mark)), f"{page} {number}"
