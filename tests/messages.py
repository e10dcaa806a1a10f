"""What the product's code can say to a user: the errors and warnings in it, as templates with `…` for what varies.

`docs/troubleshooting.md` is compared with these, so that it lists every one of them. They are found in the source: what
is given to an error class that users meet, and to `fail`, by which the coordinator ends a job. Warnings have names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("agents", "checkpointing", "comms", "elastic", "everstep", "resharding")
GAP = "…"
SPEAKERS = {"fail": 2, "RefuseNode": 1}  # function or effect -> which argument is the text
REASONS = frozenset({"difference"})  # functions that return a text that ends a job, or keeps a newcomer out
ERRORS = frozenset(
    {
        *("UsageError", "LaunchError", "AgentError", "CoordinatorFailed", "SecurityError", "CheckpointError"),
        *("StoreError", "StateStoreError", "ConversionError", "AddressTaken", "BadAddress", "Unreachable"),
        *("KeeperCannotServe", "EarlierKeeper", "CannotPreload", "TooFewDescriptors", "NoAnswer"),
        *("ErasureLibraryMissing", "ArgumentTypeError", "EvaluationFailed"),
    }
)


@dataclass(frozen=True, order=True)
class Message:
    """A text in the source."""

    text: str
    room: str  # where it is said, such as `agents` or `checkpointing/convert`
    kind: str  # the class of the error, or the function that says it


def messages() -> list[Message]:
    """All of them, each once, by room and text."""
    found: dict[str, Message] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if "sim" in path.parts or "_pb2" in path.name:
                continue
            where = path.parent.relative_to(ROOT).as_posix()
            for kind, text in _said(ast.parse(path.read_text())):
                found.setdefault(text, Message(text, where, kind))
    return sorted(found.values(), key=lambda m: (m.room, m.text))


def _said(tree: ast.Module) -> Iterator[tuple[str, str]]:
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for reason in REASONS & functions.keys():
        for returned in ast.walk(functions[reason]):
            if isinstance(returned, ast.Return) and returned.value is not None:
                yield from ((reason, text) for text in _texts(returned.value, functions) if text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        place = 0 if name in ERRORS or _is_problem(node.func) else SPEAKERS.get(name)
        if place is None or len(node.args) <= place:
            continue
        for text in _texts(node.args[place], functions):
            if len(text.replace(GAP, "").strip(" :.,()'")) >= 8:
                yield name, text


def _is_problem(function: ast.expr) -> bool:
    """`problems.append(text)`: what is wrong with something, collected."""
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "append"
        and isinstance(function.value, ast.Name)
        and function.value.id == "problems"
    )


def _texts(node: ast.expr, functions: dict[str, ast.FunctionDef], depth: int = 0) -> list[str]:
    """The templates that an expression may come to; none for what is not written there."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values]
        return [_tidy("".join(parts))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _texts(node.left, functions, depth), _texts(node.right, functions, depth)
        return [_tidy(a + b) for a in left or [GAP] for b in right or [GAP]]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, functions, depth), *_texts(node.orelse, functions, depth)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and depth < 3:
        function = functions.get(node.func.id)
        returns = [r.value for r in ast.walk(function) if isinstance(r, ast.Return) and r.value] if function else []
        return [text for value in returns for text in _texts(value, functions, depth + 1)]
    return []


def _tidy(text: str) -> str:
    return re.sub(f"{GAP}+", GAP, " ".join(text.split()))
