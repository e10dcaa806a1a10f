"""The flat buckets of Megatron's distributed optimizer (`dp_reshardable`), which do not name their content.

The content follows from Megatron's layout: one set of buckets for each model-parallel rank, with its parameters in the
reverse of their order in the live model, each aligned to 64 elements. The chunks of the model's own tensors show which
part of a parameter a rank had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from everstep.checkpointing.convert.core.boxes import Boxes
from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.formats.dcp import tensors as dcp_tensors
from everstep.checkpointing.convert.formats.dcp.metadata import Index, Tensor
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .common import Chain, Common

_ALIGNMENT = 64  # elements
_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?layers)\.(?:(?P<layer>\d+)\.)?(?P<rest>.+)$")
_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)\.dtype_\(torch\.(?P<dtype>\w+), "
    r"[^)]*\)\.bucket_idx_(?P<bucket>\d+)\.(?P<state>\w+)$"
)
# The order in which the live modules are made, outside of layers and within one; the names are the checkpoint's.
_MODEL_ORDER = (
    "embedding.word_embeddings.",
    "embedding.position_embeddings.",
    "embedding.tokentype_embeddings.",
    "decoder.layers.",
    "decoder.final_layernorm.",
    "output_layer.",
)
_LAYER_ORDER = (
    "input_layernorm.",
    "self_attention.core_attention.",
    "self_attention.linear_proj.",
    "self_attention.linear_q_proj.",
    "self_attention.linear_q_down_proj.",
    "self_attention.linear_q_up_proj.",
    "self_attention.linear_kv_down_proj.",
    "self_attention.linear_kv_up_proj.",
    "self_attention.linear_qkv.",
    "self_attention.q_layernorm.",
    "self_attention.kv_layernorm.",
    "self_attention.k_layernorm.",
    "pre_mlp_layernorm.",
    "mlp.router.",
    "mlp.experts.",
    "mlp.shared_experts.",
    "mlp.linear_fc1.",
    "mlp.linear_fc2.",
)
_KIND_ORDER = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
# A local norm that checkpoints fuse into a linear module is, in the live model, before all of that block's modules.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class ModelParallelWorld:
    """The model-parallel world that a checkpoint was saved by."""

    tp: int
    pp: int
    ep: int
    expert_tp: int
    layers: int
    tied: bool
    local: bool
    grouped: bool


@dataclass(frozen=True)
class Slab:
    """A box of a model's tensor in a bucket, from element `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bucket: Tensor
    start: int


@dataclass(frozen=True)
class Slabs:
    """A tensor whose elements are in buckets."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[Slab, ...]

    @cached_property
    def _boxes(self) -> Boxes[Slab]:
        return Boxes(self.parts)

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
        out = np.empty(sizes, numpy_dtype(self.parts[0].bucket.dtype))
        filled = 0
        for slab, source, target in self._boxes.meeting(offsets, sizes):
            flat = dcp_tensors.read_box(slab.bucket, (slab.start,), (int(np.prod(slab.sizes, dtype=np.int64)),))
            out[target] = flat.reshape(slab.sizes)[tuple(slice(*each) for each in source)]
            filled += out[target].size
        if filled != out.size:
            raise ConversionError(
                f"{self.key}: the optimizer's buckets hold {filled} elements of the {out.size} at {list(offsets)}"
            )
        return out


def world(common: Common) -> ModelParallelWorld:
    """The parallel layout of the saving job, from its stored arguments. Raises ConversionError if they lack it."""
    args = common.args
    if "num_layers" not in args or "pipeline_model_parallel_size" not in args:
        raise ConversionError("the optimizer is stored in buckets, and no arguments say by which parallel world")
    for name in ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"):
        if args.get(name) not in (None, 1):
            raise ConversionError(
                f"the optimizer is stored in buckets (dp_reshardable) of a world with {name}={args[name]}; expected "
                "it without: save it as fully_reshardable"
            )
    tp = common.argument("tensor_model_parallel_size", 1)
    return ModelParallelWorld(
        tp=tp,
        pp=common.argument("pipeline_model_parallel_size", 1),
        ep=common.argument("expert_model_parallel_size", 1),
        expert_tp=common.argument("expert_tensor_parallel_size", tp),
        layers=common.argument("num_layers", 0),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        local=args.get("transformer_impl", "local") == "local",
        grouped=bool(args.get("moe_grouped_gemm")),
    )


def is_expert(key: str) -> bool:
    """Whether an expert-parallel optimizer has this key."""
    return ".experts.experts." in key


def locate(
    index: Index, model: dict[str, Tensor], chain: Chain, world: ModelParallelWorld
) -> dict[tuple[str, str], list[Slab]]:
    """Where in the buckets the model's tensors are, by (key, state)."""
    found: dict[tuple[str, str], list[Slab]] = {}
    for (group, dtype), states in _buckets_by_rank(index, chain.prefix).items():
        members = [member for member in _members(model, chain, world, group) if model[member.key].dtype == dtype]
        for state, buckets in states.items():
            for member, bucket, start in _lay_out(members, buckets, f"{index.folder}: buckets of rank {group}"):
                for offsets, sizes in member.part.boxes:
                    if not member.part.copy:
                        found.setdefault((member.key, state), []).append(Slab(offsets, sizes, bucket, start))
                    start += int(np.prod(sizes, dtype=np.int64))
    return found


def _buckets_by_rank(index: Index, prefix: str) -> dict[tuple[int, str], dict[str, list[Tensor]]]:
    """{(model-parallel rank, element type of the parameters): {state: its buckets in order}}."""
    named: dict[tuple[int, str], dict[str, list[tuple[int, int, Tensor]]]] = {}
    for name, tensor in index.tensors.items():
        match = _BUCKET.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is not None:
            states = named.setdefault((int(match["group"]), match["dtype"]), {})
            states.setdefault(match["state"], []).append((int(match["buffer"]), int(match["bucket"]), tensor))
    return {
        rank: {
            state: [each[2] for each in sorted(buckets, key=lambda each: each[:2])] for state, buckets in states.items()
        }
        for rank, states in named.items()
    }


@dataclass(frozen=True)
class _Part:
    """A rank's part of a live parameter, as boxes of its key. `copy`: a duplicate; another rank has the original."""

    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    copy: bool = False

    @property
    def elements(self) -> int:
        return sum(int(np.prod(sizes, dtype=np.int64)) for _, sizes in self.boxes)


@dataclass(frozen=True)
class _Member:
    """A part, its key, and its place in the order of the live model."""

    key: str
    part: _Part
    order: tuple[int, ...]


@dataclass(frozen=True)
class _Rank:
    """A place in the model-parallel world."""

    tensor: int
    tensors: int
    expert: int
    stage: int


def _rank(chain: Chain, world: ModelParallelWorld, group: int) -> _Rank:
    if chain.expert:
        stage, within = divmod(group, world.expert_tp * world.ep)
        return _Rank(within % world.expert_tp, world.expert_tp, within // world.expert_tp, stage)
    return _Rank(group % world.tp, world.tp, 0, group // world.tp)


def _members(model: dict[str, Tensor], chain: Chain, world: ModelParallelWorld, group: int) -> list[_Member]:
    """The parameters of a model-parallel rank, in the order of its live model."""
    rank = _rank(chain, world, group)
    found = []
    for key, tensor in model.items():
        if key == "embedding.word_embeddings.weight" and world.tied and world.pp > 1 and rank.stage == world.pp - 1:
            boxes = _boxes(tensor, (), rank.tensor, rank.tensors).boxes
            found.append(_Member(key, _Part(boxes, copy=True), (len(_MODEL_ORDER),)))
        found += [_Member(key, part, order) for part, order in _of_stage(key, tensor, world, rank)]
    return sorted(found, key=lambda member: member.order)


def _of_stage(
    key: str, tensor: Tensor, world: ModelParallelWorld, rank: _Rank
) -> Iterator[tuple[_Part, tuple[int, ...]]]:
    """(part, its place in the live model) of every live parameter that a key is to one rank."""
    section = _position(key, _MODEL_ORDER, key)
    match = _LAYER.match(key)
    if match is None:
        if rank.stage == (0 if section < _MODEL_ORDER.index("decoder.layers.") else world.pp - 1):
            kind = _position(key.rpartition(".")[2], _KIND_ORDER, key)
            yield _boxes(tensor, (), rank.tensor, rank.tensors), (section, 0, kind)
        return
    each, uneven = divmod(world.layers, world.pp)
    if uneven:
        raise ConversionError(f"{world.layers} layers in {world.pp} stages: in which each is, the buckets do not say")
    layers = range(rank.stage * each, (rank.stage + 1) * each)
    for layer in layers if match["layer"] is None else {int(match["layer"])} & set(layers):
        index = (layer,) if match["layer"] is None else ()
        module, linear, kind = _within(match["rest"], key, world)
        if not is_expert(key):
            part = _boxes(tensor, index, rank.tensor, rank.tensors)
            yield part, (section, layer, module, linear, kind)
            continue
        share = tensor.shape[len(index)] // world.ep
        for expert in range(rank.expert * share, (rank.expert + 1) * share):
            order = (module, linear, expert, kind) if world.grouped else (module, expert, linear, kind)
            yield _boxes(tensor, (*index, expert), rank.tensor, rank.tensors), (section, layer, *order)


def _within(rest: str, key: str, world: ModelParallelWorld) -> tuple[int, ...]:
    """The place of a parameter in its layer: (module, second module in it, kind)."""
    for fused, live in _FUSED_NORMS.items() if world.local else ():
        if rest.startswith(fused):
            return _LAYER_ORDER.index(live), 0, _position(rest.removeprefix(fused), _KIND_ORDER, key)
    second = int("linear_fc2" in rest)
    return _position(rest, _LAYER_ORDER, key), second, _position(rest.rpartition(".")[2], _KIND_ORDER, key)


def _position(text: str, order: tuple[str, ...], key: str) -> int:
    for at, start in enumerate(order):
        if text.startswith(start):
            return at
    raise ConversionError(
        f"the optimizer is stored in buckets (dp_reshardable), and where {key} is in them is not known; save it as "
        "fully_reshardable (--dist-ckpt-optim-fully-reshardable)"
    )


def _boxes(tensor: Tensor, index: tuple[int, ...], rank: int, ranks: int) -> _Part:
    """The part that one of `ranks` tensor-parallel ranks had of a tensor at `index`, derived from the chunks."""
    chunks = [(chunk.offsets, chunk.sizes) for chunk in tensor.boxes.beginning(index)]
    if len(chunks) == 1:
        return _Part((chunks[0],), copy=rank > 0)
    if len(chunks) == ranks:
        return _Part((chunks[rank],))
    if len(chunks) == 2 * ranks:  # a gate and what it gates, each split
        return _Part((chunks[rank], chunks[ranks + rank]))
    raise ConversionError(
        f"{tensor.name}: {len(chunks)} chunks at {list(index)}; expected 1, {ranks} or {2 * ranks} of {ranks} ranks"
    )


def _lay_out(members: list[_Member], buckets: list[Tensor], where: str) -> list[tuple[_Member, Tensor, int]]:
    """[(parameter, its bucket, the element it begins at)]. Raises ConversionError if they do not fill the buckets."""
    found = []
    at, begin = 0, 0
    for member in reversed(members):
        begin = -(-begin // _ALIGNMENT) * _ALIGNMENT
        if at < len(buckets) and begin >= buckets[at].shape[0]:
            at, begin = at + 1, 0
        if at == len(buckets) or begin + member.part.elements > buckets[at].shape[0]:
            raise ConversionError(f"{where}: {member.key} does not fit where it should be; its order is not known")
        found.append((member, buckets[at], begin))
        begin += member.part.elements
    if at != len(buckets) - 1 or begin != buckets[at].shape[0]:
        raise ConversionError(f"{where}: more is in them than the model has; its parameters' order is not known")
    return found
