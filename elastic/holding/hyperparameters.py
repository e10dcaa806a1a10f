"""The settings of an optimizer's parameter groups (lr, betas, ...) as JSON values, compact where they repeat.

Every step's agreement contains them, and there may be a thousand groups: each setting is a column of runs of equal
values, `[[count, value], ...]`, in the order of the groups; `[count]` stands for groups that lack the setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Groups = list[dict[str, Any]]
_MEMBERS = frozenset({"params", "param_names"})


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings as JSON values; others (functions, objects) remain with the script."""
    found = {name: plain(value) for name, value in group.items() if name not in _MEMBERS}
    return {name: value for name, value in found.items() if _is_json(value)}


def plain(value: Any) -> Any:
    """A setting as a JSON value."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def same(first: Any, second: Any) -> bool:
    """Whether two settings are equal; not-a-number equals itself."""
    return bool(first == second) or (first != first and second != second)


def give_settings(groups: Sequence[dict[str, Any]], settings: Groups) -> None:
    """Give an optimizer's parameter groups these settings, in their order."""
    for group, wanted in zip(groups, settings, strict=True):
        for name, value in wanted.items():
            present = group.get(name)
            if name in group and same(plain(present), value):
                continue
            if isinstance(present, Tensor):
                present.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(present, tuple) else value


def pack(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The groups' settings by column."""
    columns: dict[str, list[list[Any]]] = {}
    for name in sorted({name for group in groups for name in group}):
        runs: list[list[Any]] = []
        for group in groups:
            entry = [group[name]] if name in group else []
            if runs and len(runs[-1]) == len(entry) + 1 and (not entry or same(runs[-1][1], entry[0])):
                runs[-1][0] += 1
            else:
                runs.append([1, *entry])
        columns[name] = runs
    return {"number": len(groups), "settings": columns}


def unpack(packed: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Groups:
    """The settings of each group. The list that earlier versions wrote is returned as it is."""
    if not isinstance(packed, Mapping):
        return [dict(group) for group in packed]
    groups: Groups = [{} for _ in range(packed["number"])]
    for name, runs in packed["settings"].items():
        at = 0
        for count, *value in runs:
            for group in groups[at : at + count] if value else ():
                group[name] = value[0].copy() if isinstance(value[0], list | dict) else value[0]
            at += count
    return groups
