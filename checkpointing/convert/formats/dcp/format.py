"""Checkpoints of torch.distributed.checkpoint: FSDP2, DTensor and plain state, however the application nested it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.carrying import OURS, carried, take_up
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import PieceWork
from everstep.checkpointing.convert.files.filetensor import FileTensor

from . import json_values
from . import tensors as dcp_tensors
from .metadata import (
    NAME,
    Index,
    Tensor,
    read_index,
)
from .names import (
    Nesting,
    Scheme,
    dotted,
    find_nesting,
    states,
)
from .writing import Object, Part, write_checkpoint

EXTRA = "dcp"
_STEPS = ("step", "global_step", "iteration", "train_step", "current_step")
_BUFFER = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|freqs_cis|.*_cached)$")
# Settings of torch's AdamW that choose an implementation: torch requires them on loading, other frameworks lack them.
_NEUTRAL = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def detect(path: Path) -> bool:
    """Whether `path` is such a checkpoint, perhaps one half written."""
    return path.is_dir() and ((path / NAME).exists() or any(path.glob("*.distcp")))


def read(path: Path, options: Options) -> Content:
    """The checkpoint in the folder `path`. Setting: `model`, the key of the model's parameters where there are two."""
    index = read_index(path)
    nesting = find_nesting(index, options.settings.get("model"))
    content = Content(step=0, warnings=list(nesting.warnings))
    taken: set[str] = set()
    optimizers = [_optimizer(content, index, scheme, taken) for scheme in nesting.optimizers]
    _model(content, index, nesting, taken)
    _rest(content, index, taken)
    content.extra[EXTRA] |= {"model": list(nesting.model), "optimizers": optimizers}
    steps = [int(scalar.value) for scalar in content.scalars.get("step", {}).values()]
    content.step = _said_step(content) or max(steps, default=0)
    restore(content, index)
    return content


def _optimizer(content: Content, index: Index, scheme: Scheme, taken: set[str]) -> dict[str, Any]:
    """The states and settings of one optimizer; returns what is needed to write it so again."""
    prefix = dotted((*scheme.optimizer, ""))
    of: dict[str, None] = {}
    for parameter, state in states(index, prefix):
        name = dotted(scheme.state(parameter, state))
        taken.add(name)
        of[parameter] = None
        whole = index.tensors[dotted(scheme.parameter(parameter))]
        tensor = index.tensors.get(name)
        if any(parameter in room.get(state, ()) for room in (content.optimizer, content.scalars)):
            raise ConversionError(f"{index.folder}: two optimizers have {state} of {parameter}: {name} is the second")
        if tensor is not None and tensor.shape == whole.shape and state != "step":
            content.optimizer.setdefault(state, {})[parameter] = dcp_tensors.lazy(tensor)
        elif tensor is not None and prod(tensor.shape) != 1:  # a factor of a matrix, and the like
            taken.remove(name)
        else:
            content.scalars.setdefault(state, {})[parameter] = _scalar(index, name, tensor)
    before = len(content.groups)
    _groups(content, index, scheme, taken)
    kept: dict[str, Any] = {"path": list(scheme.optimizer), "flat": scheme.flat}
    return {**kept, "groups": len(content.groups) - before, "params": list(of)}


def _scalar(index: Index, name: str, tensor: Tensor | None) -> Scalar:
    if tensor is None:
        value = dcp_tensors.load_object(index, name)
        if isinstance(value, FileTensor):
            return Scalar(value.dtype, _number(value.read(), name))
        if not isinstance(value, int | float):
            raise ConversionError(f"{index.folder}: {name} is {type(value).__name__}; expected a number")
        return Scalar("int64" if isinstance(value, int) else "float64", value)
    return Scalar(tensor.dtype, _number(dcp_tensors.lazy(tensor).read(), name))


def _number(array: np.ndarray, name: str) -> float | int:
    if array.size != 1:
        raise ConversionError(f"{name} has shape {list(array.shape)}; expected its parameter's, or one number")
    number: float | int = array.reshape(()).item()
    return number


def _groups(content: Content, index: Index, scheme: Scheme, taken: set[str]) -> None:
    """The settings of the optimizer: by group, or by parameter where those of each group are put together."""
    start = dotted((*scheme.optimizer, "param_groups", ""))
    by_group: dict[str, dict[str, Any]] = {}
    for name in (*index.objects, *index.tensors):
        if name.startswith(start):
            taken.add(name)
            group, _, setting = name.removeprefix(start).rpartition(".")
            by_group.setdefault(group, {})[setting] = _value(index, name)
    by_group = {group: json_values.plain(settings) for group, settings in by_group.items()}
    if not scheme.flat:
        # A list of settings is stored by its elements, if it holds tensors; none of torch's optimizers has one.
        content.groups += [by_group[group] for group in sorted(by_group, key=lambda each: (len(each), each))]
        return
    before = len(content.groups)
    for parameter, settings in by_group.items():
        for known in content.groups[before:]:
            if {key: value for key, value in known.items() if key != "params"} == settings:
                known["params"].append(parameter)
                break
        else:
            content.groups.append({"params": [parameter], **settings})


def _value(index: Index, name: str) -> Any:
    if name in index.tensors:
        tensor = dcp_tensors.lazy(index.tensors[name])
        return {
            "$tensor": {"dtype": tensor.dtype, "shape": list(tensor.shape), "values": tensor.read().ravel().tolist()}
        }
    unknown: list[str] = []
    value = json_values.encode(dcp_tensors.load_object(index, name), unknown, name)
    if unknown:
        raise ConversionError(f"{index.folder}: a setting of an optimizer is not understood: {', '.join(unknown)}")
    return value


def _model(content: Content, index: Index, nesting: Nesting, taken: set[str]) -> None:
    prefix = dotted((*nesting.model, "")) if nesting.model else ""
    trained = {name for tensors in content.optimizer.values() for name in tensors}
    trained |= {name for values in content.scalars.values() for name in values}
    grouped = {name for group in content.groups for name in group.get("params", ())}
    for name, tensor in index.tensors.items():
        if not name.startswith(prefix) or name in taken:
            continue
        if not nesting.model and not nesting.everything and len(index.paths.get(name, (name,))) > 1:
            continue  # nested, beside a model that is not
        taken.add(name)
        parameter = name.removeprefix(prefix)
        floating = tensor.dtype.startswith(("float", "bfloat", "complex"))
        alias = _alias(content, index, prefix, parameter, tensor) if trained and parameter not in trained else None
        if alias is not None:
            content.tied[parameter] = alias
            content.notes[parameter] = f"holds what {alias} holds, and has no state of its own"
            continue
        weight = parameter.rpartition(".")[2] in ("weight", "bias")
        room = content.params if not trained or parameter in trained | grouped else content.frozen
        if not floating or _BUFFER.search(parameter) or (room is content.frozen and not weight):
            room = content.buffers
        room[parameter] = dcp_tensors.lazy(tensor)
        content.notes[parameter] = f"{name}, of {len(tensor.chunks)} chunks"


def _alias(content: Content, index: Index, prefix: str, name: str, tensor: Tensor) -> str | None:
    """The trained parameter that a stateless one is tied to, if there is one: torch stores both, and they are equal."""
    if len(tensor.shape) < 2:
        return None
    for other in next(iter(content.optimizer.values()), {}):
        twin = index.tensors[prefix + other]
        if (twin.shape, twin.dtype) == (tensor.shape, tensor.dtype) and _same(tensor, twin):
            return other
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes; looks at one row before it reads all."""
    for sizes in ((1, *one.shape[1:]), one.shape):
        if one.shape[0] == 0:
            return False
        offsets = (0,) * len(sizes)
        left, right = dcp_tensors.read_box(one, offsets, sizes), dcp_tensors.read_box(other, offsets, sizes)
        if left.tobytes() != right.tobytes():
            return False
    return True


def _rest(content: Content, index: Index, taken: set[str]) -> None:
    """What is neither model nor optimizer, and where it was."""
    kept: list[dict[str, Any]] = []
    places: dict[str, list[str | int]] = {}
    for name in (*index.objects, *index.tensors):
        if name in taken or name == OURS:
            continue
        place = list(index.paths.get(name, (name,)))
        if name in index.tensors and index.tensors[name].shape != ():
            content.other[name] = dcp_tensors.lazy(index.tensors[name])
            content.notes[name] = "neither of the model nor of an optimizer"
            places[name] = place
            continue
        if name in index.tensors:
            value = _value(index, name)
        else:
            value = json_values.encode(dcp_tensors.load_object(index, name), content.unknown, name, content.other)
        kept.append({"name": name, "path": place, "value": value})
    content.extra[EXTRA] = {"objects": kept, "places": places}


def _said_step(content: Content) -> int:
    for entry in content.extra[EXTRA]["objects"]:
        if entry["path"] and entry["path"][-1] in _STEPS and isinstance(entry["value"], int):
            return int(entry["value"])
    return 0


def write(content: Content, out: Path, options: Options, work: PieceWork) -> None:
    """Write `content` into `out`, nested as it was if it is from such a checkpoint, else as {"model", "optimizer"}."""
    kept = content.extra.get(EXTRA, {})
    paths: dict[str, tuple[str | int, ...]] = {}
    parts = list(_parts(content, kept, paths))
    objects = list(_objects(content, kept, paths))
    write_checkpoint(out, parts, objects, work, paths)


@dataclass(frozen=True)
class _Optimizer:
    """An optimizer to write: its place, the parameters with state, and its groups."""

    scheme: Scheme
    members: Callable[[str], bool]
    groups: list[dict[str, Any]]


def _optimizers(content: Content, kept: dict[str, Any]) -> list[_Optimizer]:
    """The original optimizers; a single one, if they are unknown."""
    model = tuple(kept.get("model", ("model",)))
    known = kept.get("optimizers") or [{"path": kept.get("optimizer", ("optimizer",)), "flat": kept.get("flat", False)}]
    if len(known) == 1:
        scheme = Scheme(model, tuple(known[0]["path"]), known[0]["flat"])
        return [_Optimizer(scheme, lambda name: True, content.groups)]
    made: list[_Optimizer] = []
    at = 0
    for each in known:
        groups = content.groups[at : at + each["groups"]]
        at += each["groups"]
        named = {name for group in groups for name in group.get("params", ())} | set(each["params"])
        made.append(_Optimizer(Scheme(model, tuple(each["path"]), each["flat"]), named.__contains__, groups))
    return made


def _parts(content: Content, kept: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> Iterator[Part]:
    def part(path: tuple[str | int, ...], tensor: Lazy) -> Part:
        name = dotted(path)
        paths[name] = path
        return Part(name, tensor.dtype, tensor.shape, (0,) * len(tensor.shape), tensor.shape, tensor.read)

    optimizers = _optimizers(content, kept)
    of_model = optimizers[0].scheme.parameter
    for room in (content.params, content.frozen, content.buffers):
        for name, tensor in room.items():
            yield part(of_model(name), tensor)
    for alias, name in content.tied.items():
        yield part(of_model(alias), content.params.get(name) or content.frozen[name])
    for each in optimizers:
        for state, tensors in content.optimizer.items():
            for name, tensor in tensors.items():
                if each.members(name):
                    yield part(each.scheme.state(name, state), tensor)
        for state, scalars in content.scalars.items():
            for name, scalar in scalars.items():
                if each.members(name):
                    yield part(each.scheme.state(name, state), _number_tensor(scalar))
    places = kept.get("places", {})
    for name, tensor in content.other.items():
        if name in places or not kept:  # else it is within an object
            yield part(tuple(places.get(name, (name,))), tensor)


def _number_tensor(scalar: Scalar) -> Lazy:
    """torch keeps the step of an optimizer as a float32 tensor of no dimensions."""
    dtype = "float32" if scalar.dtype.startswith("int") else scalar.dtype
    return Lazy((), dtype, lambda: np.array(scalar.value, dtype))


def _objects(content: Content, kept: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> Iterator[Object]:
    def named(path: tuple[str | int, ...], value: Any) -> Object:
        name = dotted(path)
        paths[name] = path
        return Object(name, json_values.decode(value, content.other))

    for each in _optimizers(content, kept) if content.optimizer or content.scalars else ():
        for number, group in enumerate(each.groups):
            settings = {**_NEUTRAL, **group} if "betas" in group else dict(group)
            members = settings.pop("params", [])
            if isinstance(settings.get("betas"), list):
                settings["betas"] = {"$tuple": settings["betas"]}
            if each.scheme.flat:
                for name in members:
                    for setting, value in settings.items():
                        yield named(each.scheme.setting(name, setting), value)
                continue
            for setting, value in (*settings.items(), ("params", members)):
                yield named(each.scheme.setting(number, setting), value)
    for entry in kept.get("objects", ()):
        yield named(tuple(entry["path"]), entry["value"])
    if not kept:
        yield named(("step",), content.step)
    yield named((OURS,), carried(content, EXTRA))


def restore(content: Content, index: Index) -> None:
    """What an everstep that wrote the checkpoint kept of other formats beside it."""
    if OURS in index.objects:
        take_up(content, dcp_tensors.load_object(index, OURS))
