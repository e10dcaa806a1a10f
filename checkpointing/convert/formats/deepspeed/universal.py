"""DeepSpeed's universal checkpoints: a folder for each parameter, with a file for each of its states."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import Content, ConversionError, Scalar
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.torchfile import load

from .files import (
    Files,
    check_same,
    entries,
    find,
    read_state,
    sizes,
    tag_folder,
)
from .format import fill_extra, merge_groups, merge_rooms
from .modules import (
    Module,
    divided_module,
    pipeline_layers,
    take_unclaimed,
    whole_module,
)
from .partitions import (
    FP32,
    Shapes,
    scalar,
    settings_of,
)
from .rules import INFO, Shardings
from .universal_writing import LATEST, write

__all__ = ["detect", "read", "write"]

_STEP = "step"


def detect(path: Path) -> bool:
    """Whether `path` is a universal checkpoint, or a folder of which the latest is one and there is no other."""
    try:
        if (path / "zero").is_dir():
            return True
        return (path / LATEST).is_file() and not (path / "latest").exists()
    except OSError:
        return False


def read(path: Path, options: Options) -> Content:
    """The checkpoint at `path`: a folder with `latest_universal`, or the folder that this file names."""
    folder = tag_folder(path, LATEST)
    zero = folder / "zero"
    if not zero.is_dir():
        raise ConversionError(f"{folder}: half-written: there is no folder 'zero' in it")
    files = find(folder)
    states = {path: read_state(path) for path in (files.models or files.model_parts).values()}
    check_same(states, "global_steps")
    first = states[files.first]
    modules, tensor = _modules(files, states)
    content = Content(step=int(first["global_steps"]))
    shardings = Shardings(first.get(INFO), tensor, options.rules, folder)
    for number, layers in pipeline_layers(files).items():
        take_unclaimed(modules[number::tensor], layers)
    stages = [modules[at : at + tensor] for at in range(0, len(modules), tensor)]
    for stage in stages:
        merge_rooms(content, stage, shardings)
    optimizer = _optimizer(zero / "optimizer_state.pt")
    for stage in stages:
        merge_groups(content.groups, _groups(optimizer, stage[0].shapes))
    _read_parameters(content, zero, [name for stage in stages for name in stage[0].trained], modules[0].trained)
    _fill_step(content, optimizer)
    types = {name: tensor.dtype for module in modules for name, tensor in module.tensors.items()}
    content.dtypes = {
        name: types[name] for name, tensor in content.params.items() if types.get(name, tensor.dtype) != tensor.dtype
    }
    fill_extra(content, first, optimizer)
    content.extra["deepspeed"]["tensor_parallel"] = tensor
    return content


def _modules(files: Files, states: dict[Path, dict[str, Any]]) -> tuple[list[Module], int]:
    """The modules of the model-parallel ranks that the checkpoint was made of, and how many share a stage."""
    layout = sizes(states[files.first], files)
    if files.models:
        missing = [rank for rank in range(layout.model) if rank not in files.models]
        if missing:
            raise ConversionError(f"{files.folder}: half-written: no model states of model-parallel ranks {missing}")
        layers = pipeline_layers(files)
        ranks = sorted(files.models)
        made = [
            whole_module(files.models[rank], states[files.models[rank]], layers.get(rank % layout.tensor, {}))
            for rank in ranks
        ]
        return made, layout.tensor
    ranks = sorted({model for _, model in files.model_parts})
    parts = [[files.model_parts[place] for place in sorted(files.model_parts) if place[1] == rank] for rank in ranks]
    return [divided_module({path: states[path] for path in ours}) for ours in parts], len(ranks)


def _optimizer(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConversionError(f"{path}: is missing: the checkpoint is half-written")
    return read_state(path)


def _groups(optimizer: dict[str, Any], shapes: Sequence[Shapes]) -> list[dict[str, Any]]:
    """The settings of the groups, with names: groups of parameters, or (ZeRO-3) of sub-groups of them."""
    groups = optimizer.get("param_groups") or []
    divided = "fp32_flat_groups" in optimizer
    made = []
    for index, group in enumerate(groups):
        chosen = [number for number in group["params"] if number < len(shapes)] if divided else [index]
        names = [name for number in chosen if number < len(shapes) for name in shapes[number]]
        made.append(settings_of(group, names))
    return made


def _read_parameters(content: Content, zero: Path, names: Sequence[str], shapes: Shapes) -> None:
    """The states of the parameters that are trained; other folders repeat buffers and ties, rounded."""
    values: dict[str, dict[Path, Any]] = {}
    for name in names:
        folder = zero / name
        if not folder.is_dir():
            raise ConversionError(f"{folder}: is missing: the checkpoint is half-written")
        values.setdefault(name, {path: load(path) for path in entries(folder) if path.suffix == ".pt"})
    numbers = _numbers(values, shapes)
    for name, found in values.items():
        folder = zero / name
        for path, value in found.items():
            if path.stem == _STEP or path.stem in numbers:
                number = scalar(value)
                if number is None:
                    raise ConversionError(f"{path}: is no number")
                content.scalars.setdefault(path.stem, {})[name] = number
                continue
            tensor = _tensor(path, value, shapes.get(name))
            room = content.params if path.stem == FP32 else content.optimizer.setdefault(path.stem, {})
            room[name] = tensor.lazy(f"zero/{name}/{path.name}")
        if name not in content.params:
            raise ConversionError(f"{folder / 'fp32.pt'}: is missing: the checkpoint is half-written")
        content.notes[name] = f"zero/{name}: whole"


def _numbers(values: dict[str, dict[Path, Any]], shapes: Shapes) -> set[str]:
    """The states that are one number for each parameter: bare, and of one element where the parameter has more."""
    return {
        path.stem
        for name, found in values.items()
        for path, value in found.items()
        if not isinstance(value, dict) and scalar(value) is not None and prod(shapes.get(name, (2,))) != 1
    }


def _tensor(path: Path, value: Any, shape: tuple[int, ...] | None) -> FileTensor:
    """The tensor of a file: under "param", in its shape; or bare and flat, as ZeRO-3 leaves it."""
    if isinstance(value, dict) and isinstance(value.get("param"), FileTensor):
        tensor: FileTensor = value["param"]
        return tensor
    if not isinstance(value, FileTensor):
        raise ConversionError(f"{path}: holds neither a tensor nor a dictionary with 'param'")
    if shape is None or prod(shape) != value.elements:
        raise ConversionError(
            f"{path}: {value.elements} elements without a shape; the model states have "
            f"{list(shape) if shape is not None else 'none'}"
        )
    return value.view(*shape)


def _fill_step(content: Content, optimizer: dict[str, Any]) -> None:
    """ZeRO-3 leaves the step in the optimizer's state alone."""
    if content.scalars.get(_STEP):
        return
    states = (optimizer.get("optimizer_state_dict") or {}).get("state") or {}
    numbers: set[Scalar] = set()
    for state in states.values():
        number = scalar(state.get(_STEP))
        if number is not None:
            numbers.add(number)
    if len(numbers) == 1:
        content.scalars[_STEP] = dict.fromkeys(content.params, numbers.pop())
