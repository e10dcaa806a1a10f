"""The map of rooms in CONTRIBUTING.md matches the imports."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    """docs/rooms.py, a script outside any package."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_is_up_to_date(rooms) -> None:
    text = rooms.PAGE.read_text()
    assert text == rooms.page(text), "run python docs/rooms.py"


def test_every_room_has_a_line_in_the_table(rooms) -> None:
    lines = re.findall(r"^\| `([a-z/]+)/` \|", rooms.PAGE.read_text(), re.M)
    assert sorted(lines) == sorted(folder.relative_to(ROOT).as_posix() for folder in rooms.rooms().values())


def test_imports_are_found(rooms, tmp_path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from everstep.g.h import i\n")
    assert list(rooms._imported(path, "everstep.room")) == ["a.b", "everstep.room.c", "everstep.d.e", "everstep.g.h.i"]


def test_an_arrow_that_a_longer_way_implies_is_left_out(rooms) -> None:
    edges = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}
    assert rooms.reduced(edges) == {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset()}


def test_a_circle_is_named(rooms) -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        rooms.reduced({"a": frozenset("b"), "b": frozenset("a")})


def test_a_page_without_its_marks_is_refused(rooms) -> None:
    with pytest.raises(ValueError, match="has no lines"):
        rooms.page("# Contributing\n")


def test_every_source_file_is_in_one_room(rooms) -> None:
    found = [path for _, path in rooms.sources()]
    there = {path for top in rooms.TOPS for path in (ROOT / top).rglob("*.py") if path.stat().st_size}
    assert there <= set(found)
    assert len(found) == len(set(found))
