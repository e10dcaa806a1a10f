"""What goes with tensors and has no place in the format that is written: kept beside it as JSON, for the way back."""

from __future__ import annotations

import json
from typing import Any

from .content import Content

OURS = "everstep"  # the key of it
_VERSION = 1


def carried(content: Content, form: str) -> str:
    """The content that a checkpoint of format `form` cannot express by itself."""
    kept = {name: value for name, value in content.extra.items() if name != form}
    return json.dumps(
        {
            "version": _VERSION,
            "extra": kept,
            "dtypes": content.dtypes,
            "layers": content.layers,
            "tied": content.tied,
            "scheduler": content.scheduler,
            "groups": [] if content.optimizer else content.groups,  # else they are with the states
            "frozen": list(content.frozen),
            "buffers": list(content.buffers),
        },
        separators=(",", ":"),
    )


def take_up(content: Content, text: Any) -> None:
    """The reverse; what is not ours, or of another everstep, is left."""
    try:
        kept = json.loads(text)
        if kept["version"] != _VERSION:
            return
        extra: dict[str, Any] = dict(kept["extra"])
        scheduler: dict[str, Any] | None = kept["scheduler"]
        dtypes: dict[str, str] = dict(kept["dtypes"])
        layers: dict[str, int] = dict(kept["layers"])
        tied: dict[str, str] = dict(kept["tied"])
        groups: list[dict[str, Any]] = list(kept["groups"])
        rooms = ((content.frozen, set(kept["frozen"])), (content.buffers, set(kept["buffers"])))
    except (TypeError, ValueError, KeyError):
        return
    content.extra = {**extra, **content.extra}
    stateful = {name for values in content.optimizer.values() for name in values}
    stateful |= {name for numbers in content.scalars.values() for name in numbers}
    for alias, owner in tied.items():  # stored twice, for readers other than Everstep
        if owner in content.params and alias in content.params and alias not in stateful:
            del content.params[alias]
            content.tied[alias] = owner
    for room, members in rooms:
        for name in members & content.params.keys() - stateful:
            room[name] = content.params.pop(name)
    content.groups = content.groups or groups
    names = {name for _, name, _ in content.tensors()} | content.tied.keys()
    content.dtypes = {name: dtype for name, dtype in dtypes.items() if name in names} | content.dtypes
    content.layers = {name: layer for name, layer in layers.items() if name in names} | content.layers
    content.scheduler = content.scheduler if content.scheduler is not None else scheduler
