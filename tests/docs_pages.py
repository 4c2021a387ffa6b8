"""Reading the pages of docs/: their sections, tables and names."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def section(page, title):
    """The text under the heading `## title` of docs/<page>, up to the next heading of that level."""
    text = (ROOT / "docs" / page).read_text()
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    found = [body for heading, body in zip(parts[1::2], parts[2::2], strict=True) if heading == title]
    assert len(found) == 1, f"docs/{page} has {len(found)} sections named {title!r}"
    return found[0]


def first_table(text):
    """(header cells, rows of cells) of the first Markdown table in `text`."""
    lines = [line for line in re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE).group().splitlines()]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    assert set("".join(cells[1])) <= set("-:")
    return cells[0], cells[2:]


def names(cell):
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def logged_metrics(page):
    """The metrics that the section "Logged metrics" of a page explains."""
    _, body = first_table(section(page, "Logged metrics"))
    return {name for row in body for name in names(row[0])}
