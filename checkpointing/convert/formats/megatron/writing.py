"""Writing Megatron-core's `torch_dist` with the optimizer in its `fully_reshardable` form, for any TP, PP and EP."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.carrying import OURS, carried
from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import PieceWork
from everstep.checkpointing.convert.formats.dcp import json_values
from everstep.checkpointing.convert.formats.dcp.writing import (
    Object,
    Part,
    save_with_torch,
    write_checkpoint,
)

from .common import HF, SPEC
from .names import (
    Naming,
    StackedPlace,
    naming_of,
    place,
)

_LINEAR = re.compile(r".*\.linear_\w+\.weight\d*")  # the modules that have an extra state
_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_GROUP = {"lr_mult": 1.0, "is_decoupled_lr": False, "default_config": True}  # by which Megatron distinguishes groups


def write(content: Content, out: Path, options: Options, work: PieceWork) -> None:
    """Write `content` as the only iteration in `out`; its names are those of Megatron's live modules."""
    _check_states(content)
    if not any(name.startswith("decoder.") for name in content.params):
        raise ConversionError(
            f"the parameters' names are not Megatron's (decoder.layers.0...., embedding....), but "
            f"{next(iter(content.params), 'none')!r} and the like; expected those of a Megatron model: see --names"
        )
    kept = content.extra.get("megatron", {})
    naming = naming_of(content.params)
    folder = out / f"iter_{content.step:07d}"
    work.make(folder)
    layout = _Layout(naming, _shapes(content, naming))
    padding = _padding(kept, options)
    common = _common(content, naming, kept)
    write_checkpoint(folder, _parts(content, layout, padding), _objects(content, layout, kept), work)
    _write_common(folder, common)
    _replace(folder / "metadata.json", lambda path: path.write_text(json.dumps(_METADATA)))
    _replace(out / "latest_checkpointed_iteration.txt", lambda path: path.write_text(str(content.step)))


def _check_states(content: Content) -> None:
    """Raise ConversionError for states that Megatron's one optimizer does not have of every parameter, or of any."""
    for state, tensors in content.optimizer.items():
        if missing := [name for name in content.params if name not in tensors]:
            raise ConversionError(
                f"{state} of the optimizer is not there for {missing[0]} and {len(missing) - 1} more parameters: "
                f"Megatron keeps it of all or of none; leave it out with --drop 'optimizer/{state}/*'"
            )
    if others := [state for state in content.scalars if state != "step"]:
        raise ConversionError(
            f"{', '.join(others)} of the optimizer is one number for each parameter, and Megatron has no place for it; "
            f"leave it out with --drop 'optimizer/{others[0]}/*'"
        )


@dataclass(frozen=True)
class _Layout:
    """Where live parameters go. `axes`: key -> how many there are on each of its stacked axes."""

    naming: Naming
    axes: dict[str, tuple[int, ...]]

    def part(self, prefix: str, name: str, dtype: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Part:
        where = place(name, self.naming)
        axes = self.axes[where.key]
        return Part(
            prefix + where.key,
            dtype,
            (*axes, *shape),
            (*where.index, *(0,) * len(shape)),
            (*(1,) * len(axes), *shape),
            read,
        )


def _shapes(content: Content, naming: Naming) -> dict[str, tuple[int, ...]]:
    places: dict[str, list[StackedPlace]] = {}
    for name in (*content.params, *content.buffers, *content.frozen):
        where = place(name, naming)
        places.setdefault(where.key, []).append(where)
    axes = {}
    for key, found in places.items():
        sizes = tuple(max(column) + 1 for column in zip(*(each.index for each in found), strict=True))
        if len({each.index for each in found}) != int(np.prod(sizes, dtype=np.int64)):
            raise ConversionError(f"{key}: {len(found)} parts for layers and experts {list(sizes)}; expected every one")
        axes[key] = sizes
    _check_alike(content, naming)
    return axes


def _check_alike(content: Content, naming: Naming) -> None:
    """Raise ConversionError if what is to be stacked has different shapes."""
    first: dict[str, tuple[str, Lazy]] = {}
    for name, tensor in (*content.params.items(), *content.buffers.items(), *content.frozen.items()):
        other, twin = first.setdefault(place(name, naming).key, (name, tensor))
        if tensor.shape != twin.shape:
            raise ConversionError(
                f"{name} has shape {list(tensor.shape)}, and {other} has {list(twin.shape)}: Megatron stacks them"
            )


def _padding(kept: dict[str, Any], options: Options) -> int:
    """The rows that embeddings are padded to; 0: as they are."""
    rows = options.settings.get("padded_vocabulary") or kept.get("padded_vocab_size")
    return int(rows) if rows else 0


def _parts(content: Content, layout: _Layout, padding: int) -> Iterator[Part]:
    single = not any(_is_expert(name) for name in content.params)
    for name, tensor in content.params.items():
        rows = padding if name in ("embedding.word_embeddings.weight", "output_layer.weight") else 0
        shape = (max(rows, tensor.shape[0]), *tensor.shape[1:]) if rows else tensor.shape
        dtype = content.dtypes.get(name, tensor.dtype)
        yield layout.part("", name, dtype, shape, _reader(tensor, dtype, shape))
        if not content.optimizer:
            continue
        prefix = "" if single else f"chained_{int(_is_expert(name))}."
        yield layout.part(f"{prefix}optimizer.state.param.", name, "float32", shape, _reader(tensor, "float32", shape))
        for state, tensors in content.optimizer.items():
            read = _reader(tensors[name], tensors[name].dtype, shape)
            yield layout.part(f"{prefix}optimizer.state.{state}.", name, tensors[name].dtype, shape, read)
    for name, tensor in (*content.buffers.items(), *content.frozen.items()):
        dtype = content.dtypes.get(name, tensor.dtype)
        yield layout.part("", name, dtype, tensor.shape, _reader(tensor, dtype, tensor.shape))


def _reader(tensor: Lazy, dtype: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = cast(tensor.read(), dtype)
        if array.shape == shape:
            return array
        padded = np.zeros(shape, array.dtype)
        padded[: array.shape[0]] = array
        return padded

    return read


def _is_expert(name: str) -> bool:
    return ".experts." in name and ".shared_experts." not in name


def _objects(content: Content, layout: _Layout, kept: dict[str, Any]) -> Iterator[Object]:
    """The extra states that Megatron's modules ask for, all empty."""
    states = {key: tuple(axes) for key, axes in kept.get("extra_states", {}).items()}
    if not states:
        for name in content.params:
            if _LINEAR.match(name):
                key = place(name, layout.naming).key
                states[f"{key.removesuffix('weight')}_extra_state"] = layout.axes[key]
    for key, axes in states.items():
        shape = ".".join(map(str, axes or (1,)))
        for index in np.ndindex(*(axes or (1,))):
            yield Object(f"{key}/shard_{'.'.join(map(str, index))}_{shape}", [None])


def _common(content: Content, naming: Naming, kept: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the tensors."""
    common: dict[str, Any] = json_values.decode(kept.get("common", {}))
    if "args" in kept:
        common["args"] = Namespace(**json_values.decode(kept["args"]))
    common.setdefault("checkpoint_version", 3.0)
    common["iteration"] = content.step
    common[SPEC] = "local" if naming.local else "transformer_engine"
    if content.scheduler is not None:
        common["opt_param_scheduler"] = json_values.decode(content.scheduler)
    if content.optimizer:
        common["optimizer"] = _optimizer(content)
    if "hf" in content.extra:
        common[HF] = json.dumps(content.extra["hf"])
    for at, values in kept.get("optimizer", {}).items():
        chains = common.get("optimizer", {})
        chain = chains.get(int(at)) if 0 in chains else chains
        if chain:
            chain.update(json_values.decode(values))
    common[OURS] = carried(content, "megatron")
    common["content_metadata"] = {"distrib_optim_sharding_type": "fully_reshardable"}
    return common


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    _replace(folder / "common.pt", lambda path: save_with_torch(path, common))


def _optimizer(content: Content) -> dict[Any, Any]:
    """The settings of the optimizers, as the distributed optimizer keeps them: the step is in each group."""
    steps = {scalar.value for scalar in content.scalars.get("step", {}).values()}
    if len(steps) > 1:
        raise ConversionError(f"the optimizer's steps are {sorted(steps)}; expected one: Megatron has one for all")
    step = steps.pop() if steps else content.step
    chains: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for group in content.groups:
        values = json_values.decode_settings({key: value for key, value in group.items() if key != "params"})
        expert = bool(values.get("is_expert_parallel") or any(map(_is_expert, group.get("params", ()))))
        known = _GROUP | {"is_expert_parallel": expert, "wd_mult": float(values.get("weight_decay") != 0.0)}
        chains[int(expert)].append(known | values | {"step": step})
    stored = {
        at: {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
        for at, groups in chains.items()
        if groups
    }
    return stored if len(stored) > 1 else next(iter(stored.values()), {})


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file that appears complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    make(partial)
    handle = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    partial.replace(path)
