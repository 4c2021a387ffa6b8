"""docs/*.md and README.md: links, flags, paper maps, formulas that GitHub renders, budgets, code that runs."""

import ast
import functools
import re
import shlex
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from test_steer import stand_in

import steer_poe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {f"{name}.py": import_module(name) for name in ("pspo", "iql", "steer_poe", "liquidation_env")}
MAPS = {  # script, and what its paper numbers; of the third only an abstract, a review and fragments were at hand
    "pspo": "(1)–(15), Table 1–6, Figure 1–3, Remark 1–4, Principle 1–2, Proposition 1–2, Lemma 1, Theorem 1–2, "
    "section 9.1, Algorithm 1: dynamics, Algorithm 1: iteration",
    "iql": "(1)–(7), Table 1–3, Figure 1, Lemma 1–2, Corollary 2.1, Theorem 3, Algorithm 1, Appendix B",
    "steer_poe": "identity theorem, PoE, KL-Reg, graceful degradation, study, (3), Table 11, Table 19",
    "liquidation_env": "state, initial rate, action, reward, rate, horizon, dataset, (15), Table 2, Table 4",
}
LEARNER = "--hidden 16 --iterations 20 --eval-every 20 --final-episodes 2"  # flags for short runs
POOL = "--pool-size 2 --active-models 2 --dynamics-epochs 1 --dynamics-hidden 16 --behaviour-updates 5"
TINY = {"iql.py": LEARNER, "pspo.py": f"{LEARNER} {POOL}", "steer_poe.py": "--hidden 16 --updates 5"}
TICKED = re.compile(r"`([^`]+)`")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_and_code(page):
    """A page without its code blocks, and these: (language, block) each."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return fence.sub("", page.read_text()), fence.findall(page.read_text())


def rows(text):
    """Cells of every table row."""
    return [[x.strip() for x in re.split(r"(?<!\\)\|", line.strip("|"))] for line in re.findall(r"^\|.*$", text, re.M)]


def items(cell):
    """Numbered items, separated by commas; (1)–(3) and Table 1–3 are three."""
    spans = [(item, re.fullmatch(r"(\D*)(\d+)(\D?)–\(?(\d+)\)?", item)) for item in cell.split(", ")]
    return [f"{m[1]}{n}{m[3]}" if m else x for x, m in spans for n in (range(int(m[2]), int(m[4]) + 1) if m else [0])]


@functools.cache
def defined(path):
    """Functions, classes, Class.method and assigned names of a Python file."""
    nodes = ast.parse(path.read_text()).body
    inner = {(node, x.name) for node in nodes for x in getattr(node, "body", []) if isinstance(x, ast.FunctionDef)}
    found = {getattr(node, "name", "") for node in nodes} | {f"{getattr(node, 'name', '')}.{x}" for node, x in inner}
    return found | {x.id for node in nodes for x in getattr(node, "targets", []) if isinstance(x, ast.Name)}


def flags(path):
    """The fields of a script's Args as flags."""
    text = path.read_text() + (ROOT / "steer_poe.py").read_text() * ("steer_poe.Args" in path.read_text())
    names = re.findall(r"^    (\w+): [^\n]*(?: =|  #)", text, re.MULTILINE)
    return {f"--{no}{name.replace('_', '-')}" for name in ["help", *names] for no in ("", "no-")}


@pages
def test_links_lines_and_formulas(page):
    r"""Markdown takes the backslash of \, \; \! \{ in formulas away, * and }_ for emphasis, | for the end of a cell."""
    text = text_and_code(page)[0]
    for file, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        path = page.parent / file if file else page
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert path.exists() and (not anchor or anchor in anchors), f"{file}#{anchor}"
    for line in text.splitlines():
        cell, plain = max(map(len, rows(line)[0])) if line.startswith("|") else 0, re.sub("`[^`]*`", "", line)
        assert cell <= 90 and (line.startswith(("|", "![")) or len(line) <= 140) and plain.count("$") % 2 == 0, line
        for formula in re.findall(r"\$([^$]+)\$", plain):
            assert not re.search(r"\\[^\w|]|\*|\W_|(?<!\\)\||^\s|\s$", formula), formula
            assert formula.count("{") == formula.count("}"), formula


@pages
def test_commands_and_flags(page):
    """`python file.py …` takes these flags, and the four scripts these values; other flags are a script's."""
    text, code = text_and_code(page)
    commands = re.findall(r"^python (\S+\.py)(.*)$", "\n".join(block for _, block in code), re.MULTILINE)
    for file, rest in commands + re.findall(r"`python (\S+\.py)([^`]*)`", text):
        words = shlex.split(re.sub("<.*?>", "x", rest), comments=True)
        wrong = {word for word in words if re.match(r"--\w", word)} - flags(ROOT / file)
        assert not wrong, f"{page.name}: {file} {wrong}"
        if file in SCRIPTS and "--help" not in words:
            tyro.cli(SCRIPTS[file].Args, args=words)
    known = set().union(*(flags(path) for path in [*ROOT.glob("*.py"), *(ROOT / "benchmark").glob("*.py")]))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) <= known | {"--index-url"}


@pytest.mark.parametrize("script", MAPS)
def test_paper_map(script):
    """Every numbered item has one row; its code exists, its test is found by `pytest -k`, its mark is one of three."""
    page = ROOT / "docs" / f"{script.removesuffix('_env')}.md"
    table = rows(page.read_text().split("## Paper map")[1].split("\n#")[0])
    assert table[0] == ["no.", "what it says", "code", "test", "mark"]
    tests = " ".join(set().union(*(defined(path) for path in (ROOT / "tests").glob("test_*.py"))))
    for number, says, code, test, mark in table[2:]:
        assert says and code and test and re.match("stated|derived|reading", mark), number
        assert "–" not in (code, test) or re.search("not|never", mark), number
        for word in TICKED.findall(code):
            *file, name = word.split("::")
            path = ROOT / (word if word.endswith(".py") else [f"{script}.py", *file][-1])
            assert path.is_file() and (word.endswith(".py") or name in defined(path)), word
        assert all(word in tests for word in TICKED.findall(test)), f"{number}: no test has {test} in its name"
    have = [item for row in table[2:] for item in items(row[0])]
    assert len(set(have)) == len(have) and not set(items(MAPS[script])) - set(have)
    if script in ("pspo", "iql"):  # every logged metric is explained
        table = rows(page.read_text().split("## Logged metrics")[1].split("\n#")[0])
        logged = re.findall(r'"(eval/\w+)"', (ROOT / f"{script}.py").read_text())
        logged += getattr(SCRIPTS[f"{script}.py"], script.upper()).METRICS
        assert not set(logged) - {name for row in table for name in TICKED.findall(row[0])}


def test_budgets_and_what_the_readme_says_of_the_scripts():
    readme, docs = PAGES[0].read_text(), "".join(page.read_text() for page in PAGES[1:])
    sizes = [(len(x.splitlines()), len(re.findall(r"\S*\w\S*", x))) for x in (readme, docs)]
    assert not (np.array(sizes) > [(90, 650), (850, 8000)]).any(), sizes
    table = re.findall(r"^\| \[`(\w+\.py)`\].*?\| ([\d,]+) \|.*lines (\d+)–(\d+) \|$", readme, re.MULTILINE)
    assert [name for name, *_ in table] == list(SCRIPTS)
    for name, count, start, end in table:
        lines = (ROOT / name).read_text().splitlines()
        assert abs(len(lines) - int(count.replace(",", ""))) <= 15, f"{name} has {len(lines)} lines"
        assert lines[int(start) - 1] and not lines[int(start) - 2] + lines[int(end)], f"{name}: {start}–{end}"


def test_your_own_runs(tmp_path, monkeypatch):
    """The blocks of docs/your_own.md, in their order: Python as it stands, the scripts' commands with tiny settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # where Minari keeps its data
    names = {}
    for language, block in text_and_code(ROOT / "docs" / "your_own.md")[1]:
        for file, rest in re.findall(r"^python (\w+\.py)(.*)$", block, re.MULTILINE) if language == "bash" else ():
            words = f"{rest.split('  #')[0]} {TINY[file]}" + " --eval-episodes 2" * ("--eval-episodes" not in rest)
            monkeypatch.setattr(sys, "argv", [file, *words.split()])
            SCRIPTS[file].main()
        needs = {"moviepy"} if "RecordVideo" in block else set(re.findall("stable_baselines3", block))
        if block.startswith("# my_env.py"):
            Path("my_env.py").write_text(block)
        elif language == "python" and all(map(find_spec, needs)):
            for path in Path("runs").glob("my_env*iql*/actor.pt"):
                shutil.copy(path, ".")
            exec(compile(block, "docs/your_own.md", "exec"), names)
    for path in Path("runs").glob("my_env*/*actor.pt"):
        action = names["act"](torch.load(path, weights_only=True), names["env"].reset(seed=0)[0][None])
        assert action.shape == (1, 1) and abs(action).max() <= 2
    saved = torch.load(next(Path("runs").glob("my_env*/steered_actor.pt")), weights_only=True)
    frozen, prior = (steer_poe.read_actor(saved[key], stand_in(2, 1)) for key in ("frozen", "prior"))
    for rule in ("poe", "kl-reg", "additive"):
        obs = np.float32([[1, -1], [0, 2]])
        expected = 2 * steer_poe.steer(frozen, prior.gaussian, rule, 0.7)(obs)
        np.testing.assert_allclose(names["act"](saved | dict(rule=rule, alpha=0.7), obs), expected, atol=1e-5)
