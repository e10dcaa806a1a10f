"""The two exchanges of a step: partial sums to the owners of shards, and new values to the readers of parameters.

Both sides work out from the layout what a message contains, so messages carry bytes and little else. All of one pair
of ranks in one phase is one message.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from typing_extensions import Buffer

from everstep.comms.mesh.communicator import Communicator, Key, Kind
from everstep.comms.mesh.tensors import raw
from everstep.elastic.holding.stack import LayerStack
from everstep.resharding.layout import Layout
from everstep.resharding.units import Shard

from .canonical import Node, combine
from .pipeline import accumulation_dtype
from .steps import StepState

_NODE = struct.Struct("<II")
Parts = dict[tuple[int, int], dict[Node, Tensor]]  # (layer, shard) -> tree node -> elements


class Exchange:
    """Moves partial sums and values between the members of a layout, for one rank."""

    def __init__(self, stack: LayerStack, comm: Communicator) -> None:
        self.stack = stack
        self.comm = comm
        self._position = [{held.index: at for at, held in enumerate(layer.parameters)} for layer in stack.layers]

        self._generation = 0
        self._owned: dict[int, tuple[tuple[Shard, ...], ...]] = {}
        self._read: dict[tuple[int, int], tuple[Shard, ...]] = {}

    def _forget(self, layout: Layout) -> None:
        if layout.generation != self._generation:
            self._generation = layout.generation
            self._owned.clear()
            self._read.clear()

    def _owned_by_layer(self, layout: Layout, owner: int) -> tuple[tuple[Shard, ...], ...]:
        """For each layer, the shards in it that `owner` owns. A tied parameter's stand in several layers."""
        self._forget(layout)
        if owner not in self._owned:
            self._owned[owner] = tuple(
                tuple(s for s in shards if layout.owners[s.index] == owner)
                for shards in self.stack.spec.shards_of_layer
            )
        return self._owned[owner]

    def _read_from(self, layout: Layout, owner: int, reader: int) -> tuple[Shard, ...]:
        """The shards of `owner` that `reader` computes with."""
        self._forget(layout)
        if (owner, reader) not in self._read:
            spec, stage = self.stack.spec, layout.stage_of(reader)
            self._read[(owner, reader)] = tuple(
                s
                for s in spec.shards
                if layout.owners[s.index] == owner
                and any(layer in stage for layer in spec.parameters[s.parameter].layers)
            )
        return self._read[(owner, reader)]

    # ------------------------------------------------------------ partial sums to owners

    def reduce(self, state: StepState, layout: Layout, gradients: dict[int, Tensor]) -> None:
        """Write the canonical mean gradient of every shard owned here into `gradients` (shard -> flat tensor)."""
        contributors = state.contributors()
        for owner in self._others(layout):
            layers = self._shared_layers(contributors, layout, self.comm.rank, owner)
            if layers:
                key = Key(Kind.PARTIAL, state.step)
                self.comm.send(owner, key, list(self._partials(state, layout, layers, owner)))
        parts: Parts = {}
        for layer in self._shared_layers(contributors, layout, self.comm.rank, self.comm.rank):
            self._add_own(state, layout, layer, parts)
        waiting = {
            (source, Key(Kind.PARTIAL, state.step))
            for source in self._others(layout)
            if self._shared_layers(contributors, layout, source, self.comm.rank)
        }
        while waiting:
            source, key, data = self.comm.receive_any(waiting)
            waiting.discard((source, key))
            layers = self._shared_layers(contributors, layout, source, self.comm.rank)
            self._add_received(data, layers, layout, parts)
        for shard_index, out in gradients.items():
            self._combine(shard_index, parts, state.leaves, out)

    def _others(self, layout: Layout) -> list[int]:
        """The other ranks, starting after this one, so that not all send to the same one first."""
        ranks = list(layout.ranks)
        at = ranks.index(self.comm.rank)
        return ranks[at + 1 :] + ranks[:at]

    def _shared_layers(self, contributors: dict[int, set[int]], layout: Layout, source: int, owner: int) -> list[int]:
        """The layers of which `source` holds partial sums and `owner` owns shards."""
        owned = self._owned_by_layer(layout, owner)
        return [layer for layer in sorted(contributors) if source in contributors[layer] and owned[layer]]

    def _partials(self, state: StepState, layout: Layout, layers: list[int], owner: int) -> Iterator[Buffer]:
        yield b"".join(
            struct.pack("<I", len(state.sums[layer].nodes)) + b"".join(_NODE.pack(*n) for n in state.sums[layer].nodes)
            for layer in layers
        )
        for layer in layers:
            shards = self._owned_by_layer(layout, owner)[layer]
            for tensors in state.sums[layer].nodes.values():
                for shard in shards:
                    yield raw(self._slice(tensors, layer, shard))

    def _slice(self, tensors: list[Tensor], layer: int, shard: Shard) -> Tensor:
        return tensors[self._position[layer][shard.parameter]][shard.start : shard.stop]

    def _add_own(self, state: StepState, layout: Layout, layer: int, parts: Parts) -> None:
        for shard in self._owned_by_layer(layout, self.comm.rank)[layer]:
            for node, tensors in state.sums[layer].nodes.items():
                parts.setdefault((layer, shard.index), {})[node] = self._slice(tensors, layer, shard).cpu()

    def _add_received(self, data: memoryview, layers: list[int], layout: Layout, parts: Parts) -> None:
        offset = 0
        nodes: dict[int, list[Node]] = {}
        for layer in layers:
            (count,) = struct.unpack_from("<I", data, offset)
            offset += 4
            nodes[layer] = [Node(*_NODE.unpack_from(data, offset + i * _NODE.size)) for i in range(count)]
            offset += count * _NODE.size
        for layer in layers:
            shards = self._owned_by_layer(layout, self.comm.rank)[layer]
            for node in nodes[layer]:
                for shard in shards:
                    dtype = self.accumulation(shard)
                    tensor = torch.frombuffer(data, dtype=dtype, count=shard.elements, offset=offset)
                    parts.setdefault((layer, shard.index), {})[node] = tensor
                    offset += shard.elements * dtype.itemsize

    def accumulation(self, shard: Shard) -> torch.dtype:
        """The type in which a shard's gradient is summed."""
        dtype: torch.dtype = getattr(torch, self.stack.spec.parameters[shard.parameter].dtype)
        return accumulation_dtype(dtype)

    def _combine(self, index: int, parts: Parts, leaves: int, out: Tensor) -> None:
        """The tree per layer; the layers of a tied parameter one after the other; divided by the micro-batches."""
        layers = self.stack.spec.parameters[self.stack.spec.shards[index].parameter].layers
        combine(parts[(layers[0], index)], leaves, out)
        for layer in layers[1:]:
            other = torch.empty_like(out)
            combine(parts[(layer, index)], leaves, other)
            out.add_(other)
        out.div_(leaves)

    # ------------------------------------------------------------ values to readers

    def publish(self, version: int, layout: Layout, readers: Collection[int]) -> None:
        """Owners send `version` of their shards to `readers`; readers write it into their parameters."""
        self._publish(version, layout, readers)
        self.stack.refresh()

    def _publish(self, version: int, layout: Layout, readers: Collection[int]) -> None:
        rank = self.comm.rank
        key = Key(Kind.VALUES, version)
        for reader in self._others(layout):
            shards = self._read_from(layout, rank, reader) if reader in readers else ()
            if shards:
                self.comm.send(reader, key, [raw(self.stack.view(shard)) for shard in shards])
        if rank not in readers:
            return
        waiting = {(owner, key) for owner in self._others(layout) if self._read_from(layout, owner, rank)}
        while waiting:
            owner, _, data = self.comm.receive_any(waiting)
            waiting.discard((owner, key))
            self._take_values(data, self._read_from(layout, owner, rank))

    def _take_values(self, data: memoryview, shards: Iterable[Shard]) -> None:
        offset = 0
        for shard in shards:
            view = self.stack.view(shard)
            if shard.elements:
                view.copy_(torch.frombuffer(data, dtype=view.dtype, count=shard.elements, offset=offset))
            offset += shard.elements * view.element_size()
