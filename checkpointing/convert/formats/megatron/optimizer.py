"""Where a Megatron distributed checkpoint keeps the optimizers' tensors of a model's key, by form of sharding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.formats.dcp import tensors as dcp_tensors
from everstep.checkpointing.convert.formats.dcp.metadata import Index, Tensor

from . import buckets as megatron_buckets
from .buckets import is_expert
from .common import Chain, Common

OPTIMIZER_KEY = re.compile(r"^(?:chained_\d+\.)?optimizer\.")
_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(?P<state>\w+)\.(?P<key>.+)$")
_PARAMETER = ("fp32_param", "param")  # the names of the state that is the parameter itself, in full precision
MAIN = "param"


@dataclass(frozen=True)
class Source:
    """One state of one model key: a tensor of the key's shape, of which boxes can be read."""

    dtype: str
    read: Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray]  # (offsets, sizes) -> elements
    origin: str


@dataclass(frozen=True)
class States:
    """What an optimizer holds of one model key, by state ("param": the parameter itself), and which optimizer it is."""

    sources: dict[str, Source]
    chain: Chain


def model_tensors(index: Index) -> dict[str, Tensor]:
    """The tensors of the checkpoint that are the model's."""
    return {name: tensor for name, tensor in index.tensors.items() if not OPTIMIZER_KEY.match(name)}


def find_states(index: Index, common: Common, chains: list[Chain]) -> dict[str, States]:
    """The optimizers' states, by model key. Raises ConversionError for an unknown form."""
    found: dict[str, States] = {}
    for chain in chains:
        if chain.sharding == "dp_reshardable":
            members = _buckets(index, common, chain, single=len(chains) == 1)
        elif chain.sharding in ("", "fully_reshardable", "fully_sharded_model_space"):
            members = _named(index, chain)
        else:
            raise ConversionError(
                f"{index.folder}: the optimizer is stored as {chain.sharding!r}; expected fully_reshardable, "
                "dp_reshardable, or plain mixed precision: save it again as one of these with Megatron"
            )
        found.update({key: States(sources, chain) for key, sources in members.items()})
    return found


def _named(index: Index, chain: Chain) -> dict[str, dict[str, Source]]:
    """Forms that keep a tensor of the parameter's shape for each state, under the optimizer's prefix or without."""
    prefix = chain.prefix + "optimizer.state."
    if not any(name.startswith(prefix) for name in index.tensors):
        prefix = "optimizer.state."
    found: dict[str, dict[str, Source]] = {}
    for name, tensor in index.tensors.items():
        match = _STATE.match(name)
        if match is None or not name.startswith(prefix):
            continue
        if chain.prefix and not prefix.startswith(chain.prefix) and is_expert(match["key"]) != chain.expert:
            continue
        model = index.tensors.get(match["key"])
        if model is None or model.shape != tensor.shape:
            shape = "nothing" if model is None else f"shape {list(model.shape)}"
            raise ConversionError(f"{index.folder}: {name} has shape {list(tensor.shape)}; the model has {shape} there")
        state = MAIN if match["state"] in _PARAMETER else match["state"]
        found.setdefault(match["key"], {})[state] = Source(tensor.dtype, _reader(tensor), name)
    return found


def _reader(tensor: Tensor) -> Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray]:
    return lambda offsets, sizes: dcp_tensors.read_box(tensor, offsets, sizes)


def _buckets(index: Index, common: Common, chain: Chain, *, single: bool) -> dict[str, dict[str, Source]]:
    """The form that keeps the distributed optimizer's flat buckets."""
    world = megatron_buckets.world(common)
    model = {key: tensor for key, tensor in model_tensors(index).items() if single or is_expert(key) == chain.expert}
    slabs = megatron_buckets.locate(index, model, chain, world)
    found: dict[str, dict[str, Source]] = {}
    for (key, state), parts in slabs.items():
        tensor = model[key]
        view = megatron_buckets.Slabs(key, tensor.shape, tuple(parts))
        origin = f"{chain.prefix}optimizer.distributed buckets, {state}"
        found.setdefault(key, {})[state] = Source(parts[0].bucket.dtype, view.read, origin)
    for key, sources in found.items():
        if MAIN in sources:
            sources[MAIN] = _checked(key, model[key], sources[MAIN])
    return found


def _checked(key: str, model: Tensor, source: Source) -> Source:
    """The buckets name nothing: what is read of them must round to the weights that the model has."""

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
        found = source.read(offsets, sizes)
        weights = dcp_tensors.read_box(model, offsets, sizes)
        if not np.array_equal(found.astype(weights.dtype), weights):
            raise ConversionError(
                f"{model.chunks[0].span.file.parent}: {key} at {list(offsets)} in the optimizer's buckets is not the "
                "model's weight: the order of this model's parameters is not known; save it as fully_reshardable "
                "(--dist-ckpt-optim-fully-reshardable)"
            )
        return found

    return Source(source.dtype, read, source.origin)
