"""The documentation against the repository: links, files and tests that it names, flags, settings and events."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.agents.launch.command import parser
from everstep.elastic.contract.settings import SETTINGS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
COLUMNS = 120
REFERENCE = DOCS / "reference.md"
ROOMS = ("agents", "checkpointing", "comms", "elastic", "everstep", "resharding")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|proto|toml|md|yml|yaml|sbatch))[:`]")
BARE = re.compile(r"`([a-z_]+\.(?:py|proto))`")  # a file without its folder
ROW = re.compile(r"^\| `((?:[a-z_]+/)+)` \|")  # of a table of folders
TEST = re.compile(r"`(test_\w+)`")


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page outside fenced code."""
    code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, line


def anchors(page: Path) -> set[str]:
    """What a link may name in a page, as GitHub makes it of headings."""
    headings = [line.lstrip("# ") for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    """Each page in turn."""
    return request.param


def test_links_lead_somewhere(page) -> None:
    for number, line in prose(page):
        for target in LINK.findall(line):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"line {number}: {target}"
            assert not anchor or anchor in anchors(other), f"line {number}: {target}"


def test_lines_are_narrow(page) -> None:
    """Only tables and fenced code may be wider."""
    wide = [(n, line) for n, line in prose(page) if len(line) > COLUMNS and not line.lstrip().startswith("|")]
    assert not wide, wide


def test_files_that_are_named_exist(page) -> None:
    named = {(number, path) for number, line in prose(page) for path in FILE.findall(line)}
    missing = [f"line {number}: {path}" for number, path in sorted(named) if not _exists(path, page)]
    assert not missing, missing


def _exists(path: str, page: Path) -> bool:
    return any((folder / path).exists() for folder in (ROOT, page.parent))


def test_files_that_are_named_without_their_folder_exist(page) -> None:
    """Somewhere; in a row of a table about a folder, in that folder."""
    missing = []
    for number, line in prose(page):
        row = ROW.match(line)
        for name in BARE.findall(line):
            found = (ROOT / row[1] / name).exists() if row else name in file_names()
            if not found:
                missing.append(f"line {number}: {name}")
    assert not missing, missing


@functools.cache
def file_names() -> frozenset[str]:
    folders = [ROOT / name for name in (*ROOMS, "tests", "docs", "deploy")]
    return frozenset(path.name for folder in folders for path in folder.rglob("*") if path.is_file())


def test_tests_that_are_named_exist(page) -> None:
    names = {name for _, line in prose(page) for name in TEST.findall(line)}
    assert names <= defined_tests(), names - defined_tests()


@functools.cache
def defined_tests() -> frozenset[str]:
    """Every test, and every file of tests, by name."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    functions = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return frozenset({n.name for n in functions if isinstance(n, ast.FunctionDef)} | {path.stem for path in paths})


def test_the_readme_and_the_index_link_every_page() -> None:
    for start in (ROOT / "README.md", DOCS / "README.md"):
        linked = {(start.parent / target.partition("#")[0]).resolve() for target in LINK.findall(start.read_text())}
        missing = set(PAGES) - linked - {start}
        assert not missing, f"{start.relative_to(ROOT)} does not link {sorted(map(str, missing))}"


# ---------------------------------------------------------------- the reference


def test_every_flag_of_ours_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    flags = {flag for action in parser()._actions for flag in action.option_strings if flag.startswith("--es-")}
    assert len(flags) > len(SETTINGS)
    assert not [flag for flag in sorted(flags) if f"`{flag}`" not in text and f"`{flag} " not in text]


def test_every_event_is_in_the_reference() -> None:
    """Those that are recorded by a name that stands in the source."""
    cells = re.findall(r"^\| (`[a-z_]+`.*?) \|", REFERENCE.read_text().partition("## Events")[2], re.M)
    listed = {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}
    recorded = {name for room in ROOMS for path in (ROOT / room).rglob("*.py") for name in _recorded(path)}
    assert len(recorded) > 30
    assert not recorded - listed, recorded - listed


def _recorded(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        first = node.args[0] if called == "Record" and node.args else None
        named = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
        if called == "tell":  # what a worker reports: `what` is the event
            named = [keyword.value for keyword in node.keywords if keyword.arg == "what"]
        yield from (n.value for n in named if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_the_quick_start_shows_the_script_that_it_runs() -> None:
    """For readers who have the package alone."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "quickstart.md").read_text(), re.M | re.S)
    assert blocks == [(ROOT / "docs" / "examples" / "train.py").read_text()]
