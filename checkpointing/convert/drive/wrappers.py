"""Names that wrappers put around a module's own: left off, so that a checkpoint fits the module itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypeVar

from everstep.checkpointing.convert.core.content import Content, ConversionError

# torch.compile's, FSDP's and activation checkpointing's.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
T = TypeVar("T")


def unwrap(content: Content, where: str) -> None:
    """Leave the wrappers' names off. Raises ConversionError if two names become one."""
    names = [name for _, name, _ in content.tensors()] + list(content.tied)
    wrapped = sorted({name for name in names if _plain(name) != name})
    if not wrapped:
        return
    for item in fields(content):
        value = getattr(content, item.name)
        if item.name in ("optimizer", "scalars"):
            setattr(content, item.name, {state: _renamed(found, where) for state, found in value.items()})
        elif item.name in ("params", "buffers", "frozen", "tied", "dtypes", "layers", "notes"):
            setattr(content, item.name, _renamed(value, where))
    content.tied = {alias: _plain(owner) for alias, owner in content.tied.items()}
    content.groups = [
        {**group, "params": _all(group["params"])} if "params" in group else group for group in content.groups
    ]
    for each in content.extra.get("dcp", {}).get("optimizers", ()):
        each["params"] = _all(each["params"])
    content.warnings.append(
        f"{where}: names of a wrapped module ({wrapped[0]} and the like, {len(wrapped)} names) are converted without "
        "the wrapper's part"
    )


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _all(names: Iterable[str]) -> list[str]:
    return [_plain(name) for name in names]


def _renamed(found: Mapping[str, T], where: str) -> dict[str, T]:
    made: dict[str, T] = {}
    for name, value in found.items():
        if _plain(name) in made:
            raise ConversionError(f"{where}: holds {_plain(name)} twice, once as {name}: with and without a wrapper")
        made[_plain(name)] = value
    return made
