"""DeepSpeed without ZeRO: the optimizer's own state, which numbers the parameters and does not name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .modules import Module
from .partitions import (
    FP32,
    HeldTogether,
    scalar,
    settings_of,
)

_LARGEST_SAMPLE = 1 << 16  # elements that are compared to distinguish parameters of equal shape


def unpartitioned(path: Path, state: dict[str, Any], module: Module, frozen: str | None) -> HeldTogether:
    """The states of the optimizer in a model state, by the names of the module.

    Within a group the parameters are in the module's order. If the shapes allow several assignments of names, the
    rounded master weights must equal the module's; without masters, `frozen` (an expression) names the untrained
    parameters. Records the frozen names in `module`. Raises ConversionError unless exactly one assignment is left.
    """
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict):
        raise ConversionError(f"{path}: no optimizer state is beside the model states: neither in it nor in files")
    base = optimizer.get("optimizer_state_dict", optimizer)
    if "state" not in base or "param_groups" not in base or "fp32_groups_flat" in optimizer:
        raise ConversionError(
            f"{path}: an optimizer state with {', '.join(map(str, optimizer))}; expected state and param_groups, and "
            "no flat groups: DeepSpeed's fused fp16 optimizer without ZeRO is not read"
        )
    masters = optimizer.get("fp32_groups")
    ids = [list(group["params"]) for group in base["param_groups"]]
    weights = {
        number: master
        for group, found in zip(ids, masters or [[]] * len(ids), strict=True)
        for number, master in zip(group, found, strict=False)
    }
    names = [name for name in module.tensors if name not in module.buffers and name not in module.tied]
    if frozen is not None:
        names = [name for name in names if not re.search(frozen, name)]
    found = _assign(path, base["state"], ids, weights, [(name, module.tensors[name]) for name in names])
    held = HeldTogether(tensors={FP32: {}})
    for number, name in found.items():
        tensor = weights.get(number, module.tensors[name])
        held.tensors[FP32][name] = tensor.lazy(path.name)
        held.notes[name] = f"number {number} of the optimizer: by its group's order and its shape"
        for key, value in base["state"].get(number, {}).items():
            if isinstance(value, FileTensor) and value.shape == tensor.shape and key != "step":
                held.tensors.setdefault(key, {})[name] = value.lazy(path.name)
            elif (count := scalar(value)) is not None:
                held.scalars.setdefault(key, {})[name] = count
            elif value is not None:
                held.unknown.append(f"optimizer/{key}/{name}")
    held.groups = [
        settings_of(group, [found[number] for number in numbers])
        for group, numbers in zip(base["param_groups"], ids, strict=True)
    ]
    for name, tensor in module.tensors.items():
        if name not in held.tensors[FP32] and name not in module.buffers and name not in module.tied:
            module.frozen[name] = tensor.lazy(f"{path.name}, not in the optimizer")
    return held


def _assign(
    path: Path,
    states: dict[int, dict[str, Any]],
    ids: Sequence[Sequence[int]],
    weights: dict[int, FileTensor],
    named: Sequence[tuple[str, FileTensor]],
) -> dict[int, str]:
    """The name of each number. Raises ConversionError if there is none, or more than one way."""
    shapes = {number: _shape(states.get(number, {}), weights.get(number)) for group in ids for number in group}

    def fits(number: int, tensor: FileTensor) -> bool:
        return shapes[number] in (None, tensor.shape) and (
            number not in weights or _is_rounded(weights[number], tensor)
        )

    ways = list(_ways(tuple(tuple(group) for group in ids), named, fits))
    if not ways:
        raise ConversionError(f"{path}: no way to name the {len(shapes)} parameters of the optimizer by the module's")
    if len(ways) > 1:
        differing = sorted({way[number] for way in ways for number in way if way[number] != ways[0][number]})
        raise ConversionError(
            f"{path}: the optimizer numbers its parameters, and more than one way of naming them fits: "
            f"{', '.join(differing)}; say which are frozen: --set frozen=EXPRESSION"
        )
    return ways[0]


def _shape(state: dict[str, Any], weight: FileTensor | None) -> tuple[int, ...] | None:
    if weight is not None:
        return weight.shape
    shapes = [value.shape for key, value in state.items() if isinstance(value, FileTensor) and key != "step"]
    return shapes[0] if shapes else None


def _ways(
    ids: tuple[tuple[int, ...], ...], named: Sequence[tuple[str, FileTensor]], fits: Callable[[int, FileTensor], bool]
) -> Iterator[dict[int, str]]:
    """At most two of the ways to give the numbers names such that in each group they are in the module's order."""
    reachable = {tuple(0 for _ in ids): [dict[int, str]()]}  # how far each group is -> at most two ways to get there
    for name, tensor in named:
        ahead: dict[tuple[int, ...], list[dict[int, str]]] = {}
        for place, ways in reachable.items():
            ahead.setdefault(place, []).extend(ways)  # this one is not trained
            for group, at in enumerate(place):
                if at < len(ids[group]) and fits(ids[group][at], tensor):
                    step = (*place[:group], at + 1, *place[group + 1 :])
                    ahead.setdefault(step, []).extend({**way, ids[group][at]: name} for way in ways)
        reachable = {place: ways[:2] for place, ways in ahead.items()}
    yield from reachable.get(tuple(len(group) for group in ids), [])


def _is_rounded(master: FileTensor, tensor: FileTensor) -> bool:
    """Whether the module's weight is the master weight, rounded; judged by the beginning of a large one."""
    if master.shape != tensor.shape or not (master.is_contiguous and tensor.is_contiguous):
        return master.shape == tensor.shape
    count = min(master.elements, _LARGEST_SAMPLE)
    rounded = master.part(0, count).read().astype(numpy_dtype(tensor.dtype))
    return bool(np.array_equal(rounded.view(np.uint8), tensor.part(0, count).read().view(np.uint8)))
