"""Which elements of which rank's flat partitions make a parameter: ZeRO-1 and 2 by their maps, ZeRO-3 by counting."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy, Scalar
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.unpickling import Unpickled
from everstep.checkpointing.convert.formats.dcp.json_values import settings
from everstep.checkpointing.universal.dtypes import numpy_dtype

FP32 = "fp32"
Shapes = dict[str, tuple[int, ...]]
_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")
_EXPERT_GROUP = re.compile(r"ep_size_(\d+)$")


@dataclass
class HeldTogether:
    """What the data-parallel ranks of one model-parallel rank hold together; tensors are that rank's pieces.

    `tensors`: "fp32" or the name of an optimizer's state -> parameter -> tensor.
    """

    tensors: dict[str, dict[str, Lazy]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # states that are neither of the parameter's shape nor a number


def joined(runs: Sequence[FileTensor], shape: tuple[int, ...]) -> Lazy:
    """Runs of elements, one after the other, as a tensor of this shape."""
    dtype = runs[0].dtype

    def read() -> np.ndarray:
        out = np.empty(prod(shape), numpy_dtype(dtype))
        at = 0
        for run in runs:
            run.read_into(out[at : at + run.elements])
            at += run.elements
        return out.reshape(shape)

    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return Lazy(shape, dtype, read, f"{runs[0].path.name}{more}")


class _Collector:
    """Runs as they are found, by state and parameter, in the order of the ranks that hold them."""

    def __init__(self, where: Path) -> None:
        self._where = where
        self._runs: dict[str, dict[str, list[FileTensor]]] = defaultdict(lambda: defaultdict(list))
        self._scalars: dict[str, dict[str, tuple[Scalar, Path]]] = defaultdict(dict)

    def run(self, state: str, name: str, run: FileTensor) -> None:
        if run.elements or name not in self._runs[state]:
            self._runs[state][name].append(run)

    def scalar(self, state: str, name: str, value: Scalar, path: Path) -> None:
        before = self._scalars[state].setdefault(name, (value, path))
        if before[0] != value:
            raise ConversionError(
                f"{self._where}: mixed checkpoints: {state} of {name} is {before[0].value} in {before[1].name} and "
                f"{value.value} in {path.name}"
            )

    def held(self, shapes: Shapes) -> HeldTogether:
        """All that was found. Raises ConversionError for a parameter of which elements are missing."""
        held = HeldTogether()
        missing = [name for name in shapes if name not in self._runs[FP32]]
        if missing:
            raise ConversionError(f"{self._where}: no rank holds anything of {', '.join(missing)}")
        for state, named in self._runs.items():
            held.tensors[state] = {}
            for name, runs in named.items():
                if name not in shapes:
                    raise ConversionError(f"{runs[0].path}: holds {name}, whose shape no model state tells")
                found = sum(run.elements for run in runs)
                if found != prod(shapes[name]):
                    raise ConversionError(
                        f"{self._where}: {found} elements of {state} of {name} were found; expected "
                        f"{prod(shapes[name])} for shape {list(shapes[name])}"
                    )
                held.tensors[state][name] = joined(runs, shapes[name])
                if state == FP32:
                    held.notes[name] = f"{len(runs)} run(s) of flat partitions, joined"
        held.scalars = {
            state: {name: value for name, (value, _) in found.items()} for state, found in self._scalars.items()
        }
        return held


def scalar(value: Any) -> Scalar | None:
    """A number of an optimizer's state; None if it is none."""
    if isinstance(value, FileTensor) and value.elements == 1:
        return Scalar(value.dtype, value.read().reshape(-1)[0].item())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return Scalar("int64" if isinstance(value, int) else "float64", value)


def _group_states(
    state: dict[str, Any], flat: FileTensor, path: Path
) -> tuple[dict[str, FileTensor], dict[str, Scalar]]:
    """Of one group's optimizer state: the tensors as long as the partition, and the numbers."""
    tensors: dict[str, FileTensor] = {}
    numbers: dict[str, Scalar] = {}
    for key, value in state.items():
        if isinstance(value, FileTensor) and len(value.shape) == 1 and value.elements >= flat.elements:
            tensors[key] = value
        elif (number := scalar(value)) is not None:
            numbers[key] = number
        elif isinstance(value, FileTensor):
            raise ConversionError(
                f"{path}: {key} of the optimizer has shape {list(value.shape)}; expected one number or {flat.elements}"
            )
        elif value is not None:
            raise ConversionError(f"{path}: {key} of the optimizer is a {type(value).__name__}: not understood")
    return tensors, numbers


def settings_of(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The settings of an optimizer's group, with the names of its parameters."""
    left: list[str] = []
    made = settings({key: value for key, value in group.items() if key != "params"}, left)
    if left:
        raise ConversionError(f"a setting of the optimizer's groups is not understood: {', '.join(left)}")
    return {**made, "params": names}


@dataclass(frozen=True)
class Experts:
    """DeepSpeed's MoE: a rank's local experts, by their numbers among all. Without experts nothing is renamed."""

    data_before_expert: bool

    def globally(
        self, name: str, rank: int, ranks: int, group: dict[str, Any], names: Sequence[str]
    ) -> tuple[str, int]:
        """The global name of a rank's local parameter, and the rank's place among the ranks that share it."""
        size = _EXPERT_GROUP.search(str(group.get("name", "")))
        found = _EXPERT.fullmatch(name)
        if size is None or found is None:
            return name, rank
        parallel = int(size[1])
        at = rank // (ranks // parallel) if self.data_before_expert else rank % parallel
        place = rank % (ranks // parallel) if self.data_before_expert else rank // parallel
        locals_ = [int(other[2]) for each in names if (other := _EXPERT.fullmatch(each)) and other[1] == found[1]]
        number = int(found[2]) + at * (1 + max(locals_))
        return f"{found[1]}{number}{found[3]}", place

    def shapes(self, groups: Sequence[dict[str, Any]], shapes: Sequence[Shapes], ranks: int) -> Shapes:
        """The shapes of all parameters, of every rank's experts."""
        made: Shapes = {}
        for group, found in zip(groups, shapes, strict=True):
            for rank in range(ranks):
                for name, shape in found.items():
                    made[self.globally(name, rank, ranks, group, list(found))[0]] = shape
        return made


def placed_elements(states: Iterable[dict[str, Any]]) -> list[dict[str, int]]:
    """By group, the parameters that the data-parallel ranks' optimizers hold, and how many elements of each."""
    made: list[dict[str, int]] = []
    for state in states:
        for index, placed in enumerate(state.get("param_slice_mappings") or ()):
            if index == len(made):
                made.append({})
            for name, address in placed.items():
                made[index][name] = made[index].get(name, 0) + int(address.fields["numel"])
    return made


def round_robin_maps(states: Sequence[dict[str, Any]], shapes: Sequence[Shapes]) -> list[list[dict[str, Unpickled]]]:
    """The real offsets of parameters with `round_robin_gradients`, by rank and group: consecutive in the order of
    `shapes`. DeepSpeed stores their offsets in the optimizer's own order, which is wrong in this case."""
    made: list[list[dict[str, Unpickled]]] = []
    for rank, state in enumerate(states):
        flats = state["single_partition_of_fp32_groups"]
        groups: list[dict[str, Unpickled]] = []
        for index, (flat, named) in enumerate(zip(flats, shapes, strict=True)):
            gaps = (state.get("param_alignment_paddings") or [[]] * len(flats))[index] or [0] * len(named)
            share = flat.elements + int((state.get("group_paddings") or [0] * len(flats))[index])
            placed: dict[str, Unpickled] = {}
            start = 0
            for (name, shape), gap in zip(named.items(), gaps, strict=True):
                begin, end = max(start, rank * share), min(start + prod(shape), (rank + 1) * share)
                if begin < end:
                    placed[name] = _address(begin - rank * share, end - begin)
                start += prod(shape) + gap
            groups.append(placed)
        made.append(groups)
    return made


def _address(start: int, count: int) -> Unpickled:
    address = Unpickled()
    address.state = {"start": start, "numel": count}
    return address


def _gathered(names: list[str], ranks: int) -> list[str]:
    """Undo the round-robin distribution of names to ranks: from rank-major order to the original order."""
    order = [at for rank in range(ranks) for at in range(rank, len(names), ranks)]
    made = dict(zip(order, names, strict=True))
    return [made[at] for at in range(len(names))]


def partitioned_states(
    states: dict[Path, dict[str, Any]], shapes: Sequence[Shapes], experts: Experts, *, round_robin: bool = False
) -> HeldTogether:
    """ZeRO-1 and 2: `states` are the optimizer states of the data-parallel ranks in order; `shapes`, by group."""
    paths = list(states)
    dealt = round_robin_maps(list(states.values()), shapes) if round_robin else []
    collector = _Collector(paths[0].parent)
    ranks = len(states)
    runs: list[tuple[str, str, int, int, FileTensor]] = []
    groups: list[dict[str, Any]] = []
    for rank, (path, state) in enumerate(states.items()):
        base = _need(state, "base_optimizer_state", path)
        flats = _need(state, "single_partition_of_fp32_groups", path)
        maps = dealt[rank] if dealt else _need(state, "param_slice_mappings", path)
        elastic = isinstance(base, list)  # a list of lean states, and the step beside it
        settings = _need(state if elastic else base, "param_groups", path) if not elastic else [{} for _ in base]
        groups = groups or settings
        if len({len(flats), len(maps), len(settings), len(shapes)}) != 1:
            raise ConversionError(f"{path}: {len(flats)} partitions, {len(maps)} maps, for {len(shapes)} groups")
        for index, (flat, placed) in enumerate(zip(flats, maps, strict=True)):
            found = base[index] if elastic else base["state"].get(index, {})
            if elastic and "base_optimizer_state_step" in state:
                found = {**found, "step": state["base_optimizer_state_step"]}
            elif "step" in settings[index]:
                found = {"step": settings[index]["step"], **found}
            tensors, numbers = _group_states(found, flat, path)
            for name, address in placed.items():
                whole, place = experts.globally(name, rank, ranks, settings[index], list(shapes[index]))
                start, count = int(address.fields["start"]), int(address.fields["numel"])
                for key, tensor in {FP32: flat, **tensors}.items():
                    runs.append((key, whole, place, rank, tensor.part(start, count)))
                for key, number in numbers.items():
                    collector.scalar(key, whole, number, path)
    for key, whole, _, _, run in sorted(runs, key=lambda item: item[2:4]):
        collector.run(key, whole, run)
    held = collector.held(experts.shapes(groups, shapes, ranks))
    for index, (group, found) in enumerate(zip(groups, shapes, strict=True)):
        if round_robin:
            counts = next(iter(states.values())).get("partition_count") or [ranks] * len(shapes)
            found = {name: found[name] for name in _gathered(list(found), int(counts[index]))}
        held.groups.append(settings_of(group, list(experts.shapes([group], [found], ranks))))
    return held


def _need(state: dict[str, Any], key: str, path: Path) -> Any:
    if key not in state:
        raise ConversionError(f"{path}: has no {key!r}; found {', '.join(map(str, list(state)[:12]))}")
    return state[key]


def counted_states(states: dict[Path, dict[str, Any]], shapes: Sequence[Shapes]) -> HeldTogether:
    """ZeRO-3: every parameter takes the same share of each rank's flat sub-group, in order; `shapes`, by sub-group."""
    paths = list(states)
    collector = _Collector(paths[0].parent)
    settings: list[dict[str, Any]] = []
    runs: list[tuple[int, str, str, FileTensor]] = []
    for rank, (path, state) in enumerate(states.items()):
        flats = _need(state, "fp32_flat_groups", path)
        base = _need(state, "optimizer_state_dict", path)
        partitions = state.get("ds_zero_partition_groups") or [{}] * len(flats)
        settings = settings or base["param_groups"]
        if len(flats) != len(shapes):
            raise ConversionError(f"{path}: {len(flats)} sub-groups; expected {len(shapes)}, as the model states say")
        for index, (flat, named) in enumerate(zip(flats, shapes, strict=True)):
            count = int(partitions[index].get("partition_count", len(states)))
            place = int(partitions[index].get("partition_rank", rank))
            tensors, numbers = _group_states(base["state"].get(index, {}), flat, path)
            start = 0
            for name, shape in named.items():
                share = -(-prod(shape) // count)
                kept = max(0, min(share, prod(shape) - place * share))
                for key, tensor in {FP32: flat, **tensors}.items():
                    runs.append((place, key, name, tensor.part(start, kept)))
                for key, number in numbers.items():
                    collector.scalar(key, name, number, path)
                start += share
    for _, key, name, run in sorted(runs, key=lambda item: item[0]):
        collector.run(key, name, run)
    held = collector.held({name: shape for named in shapes for name, shape in named.items()})
    for group in settings:
        names = [name for index in group["params"] if index < len(shapes) for name in shapes[index]]
        held.groups.append(settings_of(group, names))
    return held


def fragments(parts: Sequence[FileTensor], shape: tuple[int, ...], name: str) -> Lazy:
    """A frozen parameter under ZeRO-3: equal shares, of which the last is padded."""
    left = prod(shape)
    runs: list[FileTensor] = []
    for part in parts:
        kept = min(part.elements, left)
        runs.append(part.part(0, kept))
        left -= kept
    if left:
        raise ConversionError(f"{parts[0].path.parent}: {left} elements of the frozen {name} are missing")
    return joined(runs, shape)
