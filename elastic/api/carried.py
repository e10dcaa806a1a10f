"""Which variables of the script change from one turn of its loop to the next: named where turns are not repeatable.

A variable is named if the loop's body reads it before it sets it, or if it is a number that the loop itself sets, as
`i` of `enumerate`, and it has another value at the beginning of the next turn. Numbers, texts, tensors, modules,
generators, containers of these, and the attributes of other objects are compared.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import random
import sys
from collections import deque
from collections.abc import Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))
LOOKED_AT = 100  # items of a container, attributes of an object


class Carried:
    """The values of the loop's variables at the beginning of a turn. `own`: ids of the parameters that are trained."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self._values: dict[str, Any] = {}
        self._frame = _frame_of_script()
        if self._frame is not None:
            self._values = self._look(self._frame)

    def changed(self) -> list[str]:
        """The names of those that have others now. Called where this object was made, at the beginning of a turn."""
        frame, self._frame = self._frame, None
        if frame is None or frame is not _frame_of_script():
            return []
        present = self._look(frame)
        return [name for name, value in present.items() if name in self._values and self._values[name] != value]

    def _look(self, frame: FrameType) -> dict[str, Any]:
        scope = {**frame.f_globals, **frame.f_locals}
        found: dict[str, Any] = {}
        carried, set_by_loop = _names(frame)
        counts = [name for name in set_by_loop if isinstance(scope.get(name), int | float)]
        for name in [*counts, *carried]:
            if name in scope and not name.startswith("__"):
                found.update(self._seen(name, scope[name], inside=True))
        return found

    def _seen(self, name: str, value: Any, *, inside: bool) -> Iterator[tuple[str, Any]]:
        """What is compared of a value, by names; `inside`: of the attributes of objects, too."""
        if isinstance(value, nn.Module):
            tensors = [*value.parameters(), *value.buffers()]
            if not any(id(tensor) in self._own for tensor in tensors):
                yield name, [_mark(tensor) for tensor in tensors]
        elif (mark := _mark(value)) is not None:
            yield name, mark
        elif inside and _is_of_script(value):
            for attribute, item in list(vars(value).items())[:LOOKED_AT]:
                yield from self._seen(f"{name}.{attribute}", item, inside=False)


def _is_of_script(value: Any) -> bool:
    """Whether it is an object of a class of the script's, or of a small library."""
    plain = isinstance(value, type | FunctionType | ModuleType) or not hasattr(value, "__dict__")
    return not plain and not type(value).__module__.startswith(("torch.", "everstep."))


def _mark(value: Any) -> Any:
    """Something that differs where the value does; None for values that are not compared."""
    if isinstance(value, PLAIN):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return value.shape, hashlib.blake2b(value.tobytes()).digest() if value.dtype != object else None
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, list | tuple | deque | set | dict):
        items = list(value.values() if isinstance(value, dict) else value)
        return len(items), [_mark(item) for item in items[-LOOKED_AT:] if isinstance(item, (*PLAIN, Tensor))]
    return None


def _frame_of_script() -> FrameType | None:
    """The frame whose loop asks for the next batch: the nearest that is neither the runtime's nor a library's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("everstep.") and "site-packages" not in (
            frame.f_code.co_filename
        ):
            return frame
        frame = frame.f_back
    return None


def _names(frame: FrameType) -> tuple[list[str], list[str]]:
    """The variables that the loop at the frame's line carries, and those that it sets; without a source, all."""
    every = [*frame.f_code.co_varnames, *frame.f_code.co_freevars, *frame.f_code.co_cellvars, *frame.f_code.co_names]
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return every, []
    line = frame.f_lineno
    loops = [
        node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While) and node.lineno <= line <= _end(node)
    ]
    if not loops:
        return every, []
    order = _Order()
    loop = max(loops, key=lambda node: node.lineno)
    targets = ast.walk(loop.target) if isinstance(loop, ast.For) else ()
    set_by_loop = [node.id for node in targets if isinstance(node, ast.Name)]
    order.known.update(set_by_loop)
    for statement in loop.body:
        order.visit(statement)
    return list(order.carried), set_by_loop


def _end(node: ast.For | ast.While) -> int:
    return node.end_lineno or node.lineno


class _Order(ast.NodeVisitor):
    """The names that a loop's body reads before it sets them, in the order of its text."""

    def __init__(self) -> None:
        self.carried: dict[str, None] = {}
        self.known: set[str] = set()  # what is set before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.target, ast.Name):
            self._read(node.target.id)
        self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.visit(node.target)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._read(node.id)
        else:
            self.known.add(node.id)

    def _read(self, name: str) -> None:
        if name not in self.known:
            self.carried.setdefault(name)
