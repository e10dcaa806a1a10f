"""An object's attributes are set by its own class: others give values at construction, or call a method.

Records (dataclasses, protocol messages) are values that the code at hand fills in. The types of the receivers are
found from annotations and constructor calls, as far as they go; a receiver of unknown type may be of any class that
its file names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("agents", "checkpointing", "comms", "elastic", "everstep", "resharding")
SIMULATOR = "elastic/sim"  # its faults act on what it simulates: a full disk, a machine without power, a cut link
FOREIGN = {"checkpointing/convert/formats/deepspeed/partitions.py": {"address.state"}}  # objects of other libraries
RECORDS = {"NamedTuple", "Protocol", "TypedDict"}

Module = tuple[str, ast.Module]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def product() -> list[Module]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).glob("**/*.py")) if "_pb2" not in path.name]
    names = [(path.relative_to(ROOT).as_posix(), path) for path in found]
    return [(name, ast.parse(path.read_text())) for name, path in names if not name.startswith(SIMULATOR)]


def is_record(node: ast.ClassDef) -> bool:
    marks = {*map(ast.unparse, node.bases), *(ast.unparse(mark).split("(")[0] for mark in node.decorator_list)}
    return bool(marks & {*RECORDS, "dataclass"})


class Classes:
    """The classes of the product: which are records, which attributes the others set, and of which types these are."""

    def __init__(self, modules: list[Module]) -> None:
        self.records: set[str] = set()
        self.set_by: dict[str, set[str]] = {}  # attribute -> classes that are no records and set it
        self.types: dict[str, dict[str, str]] = {}  # class -> attribute -> type
        self.bases: dict[str, list[str]] = {}
        for _, module in [*modules, *modules]:  # twice: types of attributes are found from those of other classes
            for node in ast.walk(module):
                if isinstance(node, ast.ClassDef):
                    self._learn(node)

    def _learn(self, node: ast.ClassDef) -> None:
        types = self.types.setdefault(node.name, {})
        self.bases[node.name] = list(map(ast.unparse, node.bases))
        if is_record(node):
            self.records.add(node.name)
        for item in ast.walk(node):
            if isinstance(item, ast.AnnAssign):
                types.setdefault(ast.unparse(item.target).removeprefix("self."), type_named(item.annotation))
            elif isinstance(item, Function):
                known = parameters(item)
                for part in ast.walk(item):
                    if isinstance(part, ast.Assign) and isinstance(part.value, ast.Name | ast.Call | ast.Attribute):
                        for target in part.targets:
                            found = self.type_of(part.value, known)
                            if found and ast.unparse(target).startswith("self."):
                                types.setdefault(ast.unparse(target).removeprefix("self."), found)
            stores = isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
            if stores and node.name not in self.records and ast.unparse(item.value) == "self":
                self.set_by.setdefault(item.attr, set()).add(node.name)

    def line(self, name: str) -> set[str]:
        """A class and those that it inherits from."""
        return {name}.union(*(self.line(base) for base in self.bases.get(name, ())))

    def type_of(self, node: ast.expr, known: dict[str, str]) -> str:
        """The class of an expression, or ""."""
        if isinstance(node, ast.Name):
            return known.get(node.id, "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id
        if isinstance(node, ast.Attribute):
            return self.types.get(self.type_of(node.value, known), {}).get(node.attr, "")
        return ""


def type_named(annotation: ast.expr | None) -> str:
    """The class that an annotation names, without "or None"."""
    text = ast.unparse(annotation).strip("'\"") if annotation is not None else ""
    return text.removesuffix(" | None").split(".")[-1]


def parameters(function: Function) -> dict[str, str]:
    return {item.arg: type_named(item.annotation) for item in (*function.args.args, *function.args.kwonlyargs)}


def names_in(module: ast.Module) -> set[str]:
    """The names that a module defines, imports or uses."""
    found = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    found |= {node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)}
    return found | {alias.name for node in ast.walk(module) if isinstance(node, ast.ImportFrom) for alias in node.names}


def functions(module: ast.Module) -> Iterator[tuple[str, Function]]:
    """Each function, with the name of its class."""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, item) for item in ast.walk(node) if isinstance(item, Function))
        elif isinstance(node, Function):
            yield from (("", item) for item in ast.walk(node) if isinstance(item, Function))


def set_from_outside(modules: list[Module]) -> Iterator[str]:
    """Every assignment to an attribute of another object that is no record."""
    classes = Classes(modules)
    for name, module in modules:
        named = names_in(module)
        for owner, function in functions(module):
            known = parameters(function) | ({"self": owner} if owner else {})
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    known.setdefault(node.targets[0].id, classes.type_of(node.value, known))
            for node in ast.walk(function):
                if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                    continue
                receiver = ast.unparse(node.value)
                found = classes.type_of(node.value, known)
                own = receiver in ("self", "cls") or (found == owner != "")
                foreign = f"{receiver}.{node.attr}" in FOREIGN.get(name, ())
                suspects = classes.set_by.get(node.attr, set()) & (classes.line(found) if found else named)
                if suspects and not own and not foreign:
                    yield f"{name}:{node.lineno}: {receiver}.{node.attr}"


def test_attributes_are_set_by_their_own_class() -> None:
    assert not list(set_from_outside(product())), "give the value at construction, or write a method of that class"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("def f(engine: Engine) -> None:\n    engine.on_commit = print", True),
        ("def f() -> None:\n    engine = Engine()\n    engine.on_commit = print", True),
        ("def f(unknown) -> None:\n    unknown.on_commit = print", True),
        ("class A:\n    def __init__(self, engine: Engine) -> None:\n        self._e = engine\n"
         "    def g(self) -> None:\n        self._e.on_commit += 1", True),
        ("def f(record: Record) -> None:\n    record.on_commit = print", False),
        ("def f(unknown) -> None:\n    unknown.other = print", False),
        ("def f(engine: Engine) -> None:\n    engine.call(print)", False),
    ],
)  # fmt: skip
def test_the_test_finds_them(body: str, found: bool) -> None:
    classes = "class Engine:\n    def __init__(self) -> None:\n        self.on_commit = None\n"
    classes += "@dataclass\nclass Record:\n    on_commit: object = None\n"
    assert bool(list(set_from_outside([("module.py", ast.parse(classes + body))]))) is found
