"""States that a script registered with Everstep, in a checkpoint whose large tensors of them were left out.

A state refers to a large tensor by the digests of its pieces, which are the tensors `registered/<digest>` beside the
model. A state without some of them could not be restored, so it goes with them, as a whole: of run.state, the value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

PIECES = "registered/"  # names of pieces begin with it
_SHARED = "run.state"


def without_lacking(ours: Mapping[str, Any], pieces: set[str]) -> tuple[dict[str, Any], list[str]]:
    """What a checkpoint of Everstep has of its own, without states that refer to other than these pieces; their names.

    `ours`: "registered", and "agreement" as a JSON text, which has the same states, and those behind the step.
    """
    gone: set[str] = set()
    found = {**ours, "registered": _complete(ours.get("registered", {}), pieces, gone)}
    if ours.get("agreement"):
        terms = json.loads(ours["agreement"])
        terms["registered"] = _complete(terms.get("registered", {}), pieces, gone)
        after = terms.get("after") or {}
        if "users" in after:
            terms["after"] = {**after, "users": _complete(after["users"], pieces, gone)}
        found["agreement"] = json.dumps(terms, sort_keys=True)
    return found, sorted(gone)


def _complete(states: Mapping[str, Any], pieces: set[str], gone: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, state in states.items():
        if name == _SHARED and "__everstep__" not in state:
            lacking = [key for key, value in state.items() if not pieces.issuperset(_digests(value))]
            gone.update(f"{_SHARED}[{key!r}]" for key in lacking)
            found[name] = {key: value for key, value in state.items() if key not in lacking}
        elif pieces.issuperset(_digests(state)):
            found[name] = state
        else:
            gone.add(f"the state registered as {name!r}")
    return found


def _digests(value: Any) -> Iterator[str]:
    """The pieces that an encoded state refers to (docs/formats.md)."""
    if isinstance(value, list):
        for item in value:
            yield from _digests(item)
    elif isinstance(value, dict):
        if value.get("__everstep__") in ("large tensor", "large array"):
            yield from value["value"]
        else:
            for item in value.values():
                yield from _digests(item)
