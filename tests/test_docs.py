"""The pages of docs/: links and anchors lead somewhere, formulas are closed, the tour's commands have known flags."""

import re

import pytest
import tyro
from docs_pages import ROOT

import iql
import pspo
import steer_poe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"pspo.py": pspo, "iql.py": iql, "steer_poe.py": steer_poe}


def anchors(path):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Files, figures and sections that a page links to exist."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_are_closed(page):
    """$ comes in pairs on a line, and braces in a formula: GitHub shows the rest as it is written."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, f"{page.name}: {line}"
        for formula in re.findall(r"\$([^$]+)\$", line):
            assert formula.count("{") == formula.count("}") and "|" not in formula.replace(r"\|", ""), formula


def test_commands_of_the_pages_are_understood():
    """Every `python <script> …` in a bash block has flags and values that the script takes."""
    count = 0
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for name, flags in re.findall(r"^python (pspo\.py|iql\.py|steer_poe\.py)(.*)$", block, flags=re.MULTILINE):
                words = flags.partition(" #")[0].replace("<run folder>", "folder").split()
                if "--help" not in words:
                    module = SCRIPTS[name]
                    args = tyro.cli(module.Args, args=words)
                    if not args.resume:
                        module.resolve(args)
                    count += 1
    assert count > 15


def test_readme_counts_lines():
    """The README's table of scripts: lines, to within a hundred."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {"pspo.py", "iql.py", "steer_poe.py", "liquidation_env.py"}
    for name, stated in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(stated.replace(",", "")) - lines) < 100, f"{name} has {lines} lines, README says {stated}"
