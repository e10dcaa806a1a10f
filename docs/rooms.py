"""Draw the map of rooms in CONTRIBUTING.md from the imports of the source: `python docs/rooms.py` rewrites it.

A room is a package of one of the top folders; a folder that holds nothing but rooms is none, and everstep/ is one.
`tests/unit/test_rooms.py` checks that the map is up to date.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms: written by docs/rooms.py -->", "<!-- end of rooms -->"
Imports = Mapping[str, frozenset[str]]  # room -> the other rooms from which it imports


TOPS = ("agents", "checkpointing", "comms", "elastic", "everstep", "resharding")


@functools.cache
def rooms() -> dict[str, Path]:
    """Each room with its folder."""
    folders = (path.parent for top in TOPS for path in sorted((ROOT / top).rglob("__init__.py")))
    return {_name(folder): folder for folder in folders if _has_modules(folder) and folder.parent.name != "everstep"}


def _has_modules(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("*.py"))


def _name(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "everstep" else ("everstep", *parts))


def imports() -> Imports:
    """What each room imports from other rooms, wherever in a file the import stands."""
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for room, path in sources():
        package = ".".join([room, *path.parent.relative_to(rooms()[room]).parts])
        found[room] |= {other for name in _imported(path, package) if (other := _room_of(name)) not in (None, room)}
    return {room: frozenset(others) for room, others in found.items()}


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file with its room: the innermost one that it lies in."""
    folders = {folder: room for room, folder in rooms().items()}
    for folder, room in folders.items():
        for path in sorted(folder.rglob("*.py")):
            if next((parent for parent in path.parents if parent in folders), None) == folder:
                yield room, path


def _imported(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # The package's version is a constant that every import of a part loads anyway: it makes no arrow.
            yield from (f"{stem}.{alias.name}" for alias in node.names if alias.name != "__version__")


def _room_of(module: str) -> str | None:
    fitting = [room for room in rooms() if module == room or module.startswith(room + ".")]
    return max(fitting, key=len, default=None)


def reduced(edges: Imports) -> Imports:
    """The edges that no path over other rooms implies. Raises ValueError if rooms import each other in a circle."""
    reach: dict[str, frozenset[str]] = {}

    def reached(room: str, above: tuple[str, ...] = ()) -> frozenset[str]:
        if room in above:
            raise ValueError(f"rooms import each other in a circle: {' -> '.join([*above, room])}")
        if room not in reach:
            reach[room] = edges[room].union(*(reached(other, (*above, room)) for other in edges[room]))
        return reach[room]

    for room in edges:
        reached(room)
    implied = {room: frozenset().union(*(reach[other] for other in others)) for room, others in edges.items()}
    return {room: others - implied[room] for room, others in edges.items()}


def drawn(edges: Imports) -> str:
    """The map as a Mermaid graph: an arrow leads to what a room imports, unless a longer way leads there too."""
    lines = ["```mermaid", "graph TD"]
    lines += [f'    {_key(room)}["{rooms()[room].relative_to(ROOT).as_posix()}/"]' for room in sorted(edges)]
    arrows = sorted((room, other) for room, others in reduced(edges).items() for other in others)
    lines += [f"    {_key(room)} --> {_key(other)}" for room, other in arrows]
    return "\n".join([*lines, "```"])


def _key(room: str) -> str:
    return room.replace(".", "_")


def page(text: str) -> str:
    """CONTRIBUTING.md with the map as it has to be."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{drawn(imports())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
