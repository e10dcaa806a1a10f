"""Everstep: distributed PyTorch training that never loses a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .elastic.api.decorator import elastic as elastic
    from .elastic.api.decorator import join as join
    from .elastic.api.run import Run as Run
    from .elastic.contract.digest import state_digest as state_digest
    from .elastic.contract.errors import UsageError as UsageError
    from .elastic.engine.user_loop import Step as Step

__version__ = "0.1.0"
__all__ = ["Run", "Step", "UsageError", "elastic", "join", "state_digest"]

_HOMES = {
    "Run": ".elastic.api.run",
    "Step": ".elastic.engine.engine",
    "join": ".elastic.api.decorator",
    "UsageError": ".elastic.contract.errors",
    "state_digest": ".elastic.contract.digest",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: the launcher and the keeper need no torch."""
    from importlib import import_module

    if name == "elastic":  # the package, which is callable as the decorator
        return import_module(".elastic", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
