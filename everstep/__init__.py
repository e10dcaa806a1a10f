"""Everstep: distributed PyTorch training that never loses a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
if not (_here / "elastic").exists():  # a source checkout, where the rooms stand beside this folder
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from .elastic.decorator import elastic as elastic
    from .elastic.digest import state_digest as state_digest
    from .elastic.engine import Step as Step
    from .elastic.errors import UsageError as UsageError
    from .elastic.run import Run as Run

__version__ = "0.1.0"
__all__ = ["Run", "Step", "UsageError", "elastic", "state_digest"]

_HOMES = {
    "Run": ".elastic.run",
    "Step": ".elastic.engine",
    "UsageError": ".elastic.errors",
    "state_digest": ".elastic.digest",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: the launcher and the keeper need no torch."""
    from importlib import import_module

    if name == "elastic":  # the package, which is callable as the decorator
        return import_module(".elastic", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
