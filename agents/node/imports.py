"""The modules that are imported before workers are forked: named by `--es-preload`, or found by reading the script.

A script's imports of installed packages take each worker seconds, a replacement too, which the others wait for. What
the script imports first, at module level, has in the process that workers are forked from the effect that it has in a
worker. Behind a statement that sets the environment or the path of imports, that is not certain: reading ends there.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

AUTO, NONE = "auto", "none"
OWN = frozenset({"torch", "everstep"})  # imported, as far as workers need it
INSTALLED = frozenset({"site-packages", "dist-packages"})
_SETTERS = frozenset({"setdefault", "update", "pop", "clear", "append", "insert", "extend", "remove"})


class Import(NamedTuple):
    """A module, and what is taken from it. `asked`: the user named it, so a failure ends the job."""

    module: str
    names: tuple[str, ...] = ()
    asked: bool = False


def chosen(text: str, script: Path | None) -> list[Import]:
    """What `--es-preload` means for a script: names of modules; "auto", also among them; or "none"."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    found = found_in(script) if AUTO in words and script is not None else []
    return [*found, *(Import(word, asked=True) for word in words if word not in (AUTO, NONE))]


def script_of(target: str, *, module: bool) -> Path | None:
    """The file of a script, or of a module as `python -m` finds it; None if it is no file of Python code."""
    if not module:
        path = Path(target)
        return path if path.is_file() and path.suffix in (".py", "") else None
    folder = Path.cwd().joinpath(*target.split("."))
    candidates = (folder.with_suffix(".py"), folder / "__main__.py")
    return next((path for path in candidates if path.is_file()), None)


def found_in(script: Path) -> list[Import]:
    """The installed packages that a script imports at module level, itself and by modules in its folder, in order."""
    found: dict[str, tuple[str, ...]] = {}
    reader = _Reader(script.resolve().parent)
    for module, names in reader.read(script):
        found[module] = tuple(dict.fromkeys((*found.get(module, ()), *names)))
    return [Import(module, names) for module, names in found.items()]


class _Reader:
    """Reads a script and the modules beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[Path] = set()
        self._uncertain = False  # what follows depends on what the script does first

    def read(self, path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
        if path in self._seen:
            return
        self._seen.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):  # the worker says what is wrong
            self._uncertain = True
            return
        yield from self._statements(tree.body)

    def _statements(self, statements: Sequence[ast.stmt]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for statement in statements:
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    yield from self._imported(alias.name, ())
            elif isinstance(statement, ast.ImportFrom):
                if statement.level == 0 and statement.module:
                    names = tuple(alias.name for alias in statement.names if alias.name != "*")
                    yield from self._imported(statement.module, names)
            elif isinstance(statement, ast.Try):  # of an import that may fail, as a rule
                yield from self._statements(statement.body)
            elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._uncertain = self._uncertain or any(map(_sets, ast.walk(statement)))
            if self._uncertain:
                return

    def _imported(self, module: str, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        top = module.partition(".")[0]
        if top in OWN or top in sys.stdlib_module_names:
            return
        if any(path.is_file() for path in _files(self._folder, [top])):
            parts = module.split(".")
            for length in range(1, len(parts) + 1):
                yield from self._read_first(parts[:length])
            for name in names:
                yield from self._read_first([*parts, name])
        elif module not in sys.modules and _is_installed(top):
            yield module, names

    def _read_first(self, parts: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for path in _files(self._folder, parts):
            if path.is_file():
                yield from self.read(path)
                return


def _files(folder: Path, parts: Sequence[str]) -> tuple[Path, Path]:
    """Where a module of these names may be, in the order in which Python looks."""
    place = folder.joinpath(*parts)
    return place / "__init__.py", place.with_name(f"{place.name}.py")


def _is_installed(name: str) -> bool:
    """Whether a top-level module comes from where packages are installed, and not from where a user still edits."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())  # of a namespace package
    return bool(places) and all(INSTALLED.intersection(Path(place).parts) for place in places)


def _sets(node: ast.AST) -> bool:
    """Whether this changes the environment or the path of imports, which a later import may depend on."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        called = node.func
        return called.attr in ("putenv", "unsetenv", "addsitedir") or (
            called.attr in _SETTERS and _is_process_wide(called.value)
        )
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return _is_process_wide(node) or _is_process_wide(node.value)
    return False


def _is_process_wide(node: ast.AST) -> bool:
    """Whether this is `os.environ` or `sys.path`, under whatever name `os` and `sys` have."""
    if isinstance(node, ast.Name):
        return node.id == "environ"
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "path", "meta_path", "path_hooks", "modules")
