"""Checkpoints of Megatron-core's dist_checkpointing (`torch_dist`), as Megatron-LM and NeMo save them.

Settings: `spec` = local or transformer_engine, if the checkpoint does not record the naming of its modules;
`vocabulary` = rows to keep of embeddings that were padded (kept padded otherwise, as the live modules are).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from everstep.checkpointing.convert.core.carrying import OURS, take_up
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.masters import checked, is_trusted
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.formats.dcp import json_values
from everstep.checkpointing.convert.formats.dcp import tensors as dcp_tensors
from everstep.checkpointing.convert.formats.dcp.metadata import Index, Tensor, read_index

from .common import (
    RANDOM_STATES,
    Chain,
    Common,
    backend,
    chains,
    configuration,
    iteration_folder,
    kept,
    naming,
    read_common,
)
from .groups import add_groups, is_expert
from .names import Naming, expand, layer_of
from .optimizer import (
    MAIN,
    OPTIMIZER_KEY,
    Source,
    States,
    find_states,
    model_tensors,
)
from .writing import write

__all__ = ["detect", "read", "write"]

EXTRA = "megatron"
_SHARD = re.compile(r"(?P<key>.+)/shard_(?P<index>[\d.]+)_(?P<shape>[\d.]+)")
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}


def detect(path: Path) -> bool:
    """Whether `path` is such a checkpoint, or the folder of several."""
    if not path.is_dir():
        return False
    try:
        folder = iteration_folder(path)
        return bool(backend(folder)) or (folder / "common.pt").exists()
    except ConversionError:
        return any(path.glob("iter_*/common.pt")) or any(path.glob("iter_*/metadata.json"))


def read(path: Path, options: Options) -> Content:
    """The checkpoint at `path`; the latest, if it is a folder of several."""
    folder = iteration_folder(path)
    written_by = backend(folder)
    if written_by not in ("", "torch_dist"):
        raise ConversionError(f"{folder}: its tensors are stored by {written_by!r}; expected torch_dist")
    index = read_index(folder)
    common = read_common(folder, index)
    found = chains(common, index)
    states = find_states(index, common, found)
    trusted = is_trusted(options.settings) or any(chain.sharding == "dp_reshardable" for chain in found)
    reading = _Reading(index, common, naming(common, index, options.settings), states, trusted)
    content = Content(step=common.iteration)
    for key, tensor in model_tensors(index).items():
        reading.add(content, key, tensor)
    _settings(content, common, found, options)
    content.extra[EXTRA] = _extra(content, index, common, reading.naming)
    if came_from := configuration(common):
        content.extra["hf"] = came_from
    take_up(content, common.values.get(OURS))
    return content


@dataclass(frozen=True)
class _Reading:
    """The making of a Content from a checkpoint's tensors."""

    index: Index
    common: Common
    naming: Naming
    states: dict[str, States]
    trusted: bool  # whether the masters need not be compared with the weights, or are already

    def add(self, content: Content, key: str, tensor: Tensor) -> None:
        """Everything that a key of the model holds."""
        states = self.states.get(key)
        model = Source(tensor.dtype, lambda offsets, sizes: dcp_tensors.read_box(tensor, offsets, sizes), key)
        for name, place in expand(key, tensor.shape, self.naming):
            shape = tensor.shape[len(place.index) :]

            def whole(source: Source, index: tuple[int, ...] = place.index, shape: tuple[int, ...] = shape) -> Lazy:
                offsets, sizes = (*index, *(0,) * len(shape)), (*(1,) * len(index), *shape)
                return Lazy(shape, source.dtype, lambda: source.read(offsets, sizes).reshape(shape), source.origin)

            content.notes[name] = place.rule
            layer = layer_of(name)
            if layer is not None:
                content.layers[name] = layer
            if states is None:
                room = _room(content, name, tensor, trained=bool(self.states))
                room[name] = whole(model)
                continue
            self._trained(content, name, whole, states, model)

    def _trained(
        self, content: Content, name: str, whole: Callable[[Source], Lazy], states: States, model: Source
    ) -> None:
        main = states.sources.get(MAIN)
        content.params[name] = whole(main or model)
        if main is not None and not self.trusted:
            content.params[name] = checked(name, content.params[name], whole(model).read, model.dtype)
        if main is not None and main.dtype != model.dtype:
            content.dtypes[name] = model.dtype
        for state, source in states.sources.items():
            if state != MAIN:
                content.optimizer.setdefault(state, {})[name] = whole(source)
        step = states.chain.step
        if step is not None:
            dtype = "float32" if isinstance(step, float) else "int64"
            content.scalars.setdefault("step", {})[name] = Scalar(dtype, step)


def _room(content: Content, name: str, tensor: Tensor, *, trained: bool) -> dict[str, Lazy]:
    """Where a tensor that no optimizer has belongs."""
    weight = name.rpartition(".")[2].startswith(("weight", "bias", "layer_norm_"))
    if not weight:
        return content.buffers
    return content.frozen if trained else content.params


def _settings(content: Content, common: Common, found: list[Chain], options: Options) -> None:
    """The optimizer's groups, the schedule, what is tied, and padding that is to go."""
    untied = common.args.get("untie_embeddings_and_output_weights")
    for alias, name in TIED.items():
        if alias not in content.params and name in content.params and untied is not True:
            content.tied[alias] = name
    for chain in found:
        shapes = {
            name: tensor.shape
            for name, tensor in content.params.items()
            if len(found) == 1 or is_expert(name) == chain.expert
        }
        add_groups(content, shapes, chain.groups)
    schedule = common.values.get("opt_param_scheduler")
    if isinstance(schedule, dict):
        content.scheduler = json_values.encode(schedule, common.dropped, "opt_param_scheduler")
    if "vocabulary" in options.settings:
        _strip(content, int(options.settings["vocabulary"]))


def _strip(content: Content, rows: int) -> None:
    for room in (content.params, *content.optimizer.values()):
        for name in PADDED:
            if name in room and room[name].shape[0] > rows:
                room[name] = _first_rows(room[name], rows)
                content.notes[name] += f"; cut to {rows} rows"


def _first_rows(tensor: Lazy, rows: int) -> Lazy:
    def read() -> np.ndarray:
        return np.ascontiguousarray(tensor.read()[:rows])

    return replace(tensor, shape=(rows, *tensor.shape[1:]), read=read)


def _extra(content: Content, index: Index, common: Common, naming: Naming) -> dict[str, object]:
    """What is kept to be written back; what is not is noted in `content`."""
    values = kept(common)
    states: dict[str, list[int]] = {}  # extra states: key -> how many there are on each axis
    content.dropped += [(name, "a class of Megatron's own") for name in common.dropped if name.startswith("args.")]
    content.unknown += [name for name in common.dropped if not name.startswith("args.")]
    random = False
    for name in index.objects:
        shard = _SHARD.fullmatch(name)
        if shard is None or not shard["key"].endswith("_extra_state"):
            if name.startswith("rng_state/"):
                random = True
            elif not OPTIMIZER_KEY.match(name) and not name.startswith("common_state/"):
                content.unknown.append(name)
        elif shard["key"] not in states:
            states[shard["key"]] = [int(size) for size in shard["shape"].split(".")]
            if not _is_empty(index, name):
                content.unknown.append(f"{shard['key']}/*")
    if random:
        content.dropped.append(("rng_state", RANDOM_STATES))
    return {**values, "stacked": naming.stacked, "extra_states": states}


def _is_empty(index: Index, name: str) -> bool:
    """Whether an extra state holds nothing, as all do where nothing is computed in eight bits."""
    try:
        return not any(_leaves(dcp_tensors.load_object(index, name)))
    except ConversionError:
        return False


def _leaves(value: object) -> Iterator[bool]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, FileTensor):
        yield value.elements > 0
    else:
        yield value is not None
