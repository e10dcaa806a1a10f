"""The two exchanges of a step: partial sums to the owners of shards, and new values to the readers of parameters.

Both sides derive a message's contents from the layout, so a message contains little more than the tensors' bytes. All
that one rank sends to another in one phase is one message.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everstep.comms.mesh.communicator import Communicator, Key, Kind
from everstep.comms.mesh.tensors import ALIGNMENT_BYTES, divide, host_bytes, of_bytes, on_host
from everstep.elastic.holding.source import Found
from everstep.elastic.holding.stack import LayerStack
from everstep.resharding.index import LayoutIndex
from everstep.resharding.layout import Layout
from everstep.resharding.moves import Move
from everstep.resharding.units import Shard

from .canonical import TreeNode, accumulation_dtype, combine
from .early_parts import EarlyParts, Posted, entries_of, key_of
from .steps import StepState

_NODE = struct.Struct("<II")
_NAME = struct.Struct("<II")  # layer and shard
_EARLY = struct.Struct("<II")  # messages of early parts, and how many of these parts count
Parts = dict[tuple[int, int], dict[TreeNode, Tensor]]  # (layer, shard) -> tree node -> elements


class Exchange:
    """Moves partial sums and values between the members of a layout, for one rank."""

    def __init__(self, stack: LayerStack, comm: Communicator, early: EarlyParts | None = None) -> None:
        """`early`: posts partial sums before `reduce`."""
        self.stack = stack
        self._early = early
        self.comm = comm
        self._position = [{held.index: at for at, held in enumerate(layer.parameters)} for layer in stack.layers]

    def _index(self, layout: Layout) -> LayoutIndex:
        return layout.index(self.stack.spec)

    # ------------------------------------------------------------ partial sums to owners

    def reduce(self, state: StepState, layout: Layout, gradients: dict[int, Tensor], divisor: float) -> None:
        """Write the canonical gradient of every shard owned here into `gradients` (shard -> flat tensor).

        It is the sum over the micro-batches, divided by `divisor`; for a buffer that forwards change, as its rule says.
        """
        index, rank = self._index(layout), self.comm.rank
        # All are sent before any is awaited; `send` takes in what arrives, so that two ranks never block each other.
        for owner in self._others(owner for layer in state.work.layers_of(rank) for owner in index.owners_in(layer)):
            layers = self._shared_layers(state, index, rank, owner)
            early = self._early.posted_to(owner, state.step) if self._early is not None else Posted()
            self.comm.send(owner, key_of(state.step, 0), list(self._partials(state, index, layers, owner, early)))
        parts: Parts = {}
        for layer in self._shared_layers(state, index, rank, rank):
            self._add_own(state, index, layer, parts)
        waiting = {
            (source, key_of(state.step, 0))
            for layer in index.owned_in(rank)
            for source in state.work.contributors(layer)
            if source != rank
        }
        # In order of arrival: a part's place in the sum is its node of the tree, not the time at which it came.
        while waiting:
            source, key, data = self.comm.receive_any(waiting)
            waiting.discard((source, key))
            self._add_received(data, self._shared_layers(state, index, source, rank), index, parts, source, state.step)
        for shard_index, out in gradients.items():
            rule = self.stack.rule(self.stack.spec.shards[shard_index].parameter)
            self._combine(shard_index, parts, state.leaves, out)
            out.div_(divisor if rule is None else state.size.weights if rule == "mean" else 1)

    def _others(self, ranks: Iterable[int]) -> list[int]:
        """The other ones of `ranks`, beginning after this one, so that not all ranks send to the same one first."""
        return sorted(set(ranks) - {self.comm.rank}, key=lambda rank: (rank < self.comm.rank, rank))

    @staticmethod
    def _shared_layers(state: StepState, index: LayoutIndex, source: int, owner: int) -> list[int]:
        """The layers of which `source` holds partial sums and `owner` owns shards, ascending."""
        owned = index.owned_in(owner)
        return [layer for layer in state.work.layers_of(source) if layer in owned]

    def _partials(
        self, state: StepState, index: LayoutIndex, layers: list[int], owner: int, early: Posted
    ) -> Iterator[Tensor]:
        head = _EARLY.pack(early.messages, len(early.counts)) + b"".join(_NAME.pack(*name) for name in early.counts)
        head += b"".join(
            struct.pack("<I", len(state.partial(layer))) + b"".join(_NODE.pack(*n) for n in state.partial(layer))
            for layer in layers
        )
        yield of_bytes(head + bytes(-len(head) % ALIGNMENT_BYTES))
        for layer in layers:
            shards = [shard for shard in index.owned_in(owner)[layer] if (layer, shard.index) not in early.counts]
            for tensors in state.partial(layer).values():
                for shard in shards:
                    yield on_host(self._slice(tensors, layer, shard))

    def _slice(self, tensors: list[Tensor], layer: int, shard: Shard) -> Tensor:
        return tensors[self._position[layer][shard.parameter]][shard.start : shard.stop]

    def _add_own(self, state: StepState, index: LayoutIndex, layer: int, parts: Parts) -> None:
        for shard in index.owned_in(self.comm.rank)[layer]:
            for node, tensors in state.partial(layer).items():
                parts.setdefault((layer, shard.index), {})[node] = self._slice(tensors, layer, shard).cpu()

    def _add_received(
        self, data: Tensor, layers: list[int], index: LayoutIndex, parts: Parts, source: int, step: int
    ) -> None:
        head = host_bytes(data)
        messages, counting = _EARLY.unpack_from(head)
        offset = _EARLY.size
        counts = {_NAME.unpack_from(head, offset + i * _NAME.size) for i in range(counting)}
        offset += counting * _NAME.size
        nodes: dict[int, list[TreeNode]] = {}
        for layer in layers:
            (count,) = struct.unpack_from("<I", head, offset)
            offset += 4
            nodes[layer] = [TreeNode(*_NODE.unpack_from(head, offset + i * _NODE.size)) for i in range(count)]
            offset += count * _NODE.size
        owned = index.owned_in(self.comm.rank)
        contents = [
            (layer, node, shard)
            for layer in layers
            for node in nodes[layer]
            for shard in owned[layer]
            if (layer, shard.index) not in counts
        ]
        sizes = [(self.accumulation(shard), shard.elements) for _, _, shard in contents]
        tensors = divide(data, sizes, offset + -offset % ALIGNMENT_BYTES)
        for (layer, node, shard), tensor in zip(contents, tensors, strict=True):
            parts.setdefault((layer, shard.index), {})[node] = tensor
        for number in range(1, messages + 1):  # they came before it, and those that do not count are dropped
            self._add_early(self.comm.receive(source, key_of(step, number)), counts, parts)

    def _add_early(self, data: Tensor, counts: Collection[tuple[int, int]], parts: Parts) -> None:
        entries, start = entries_of(host_bytes(data))
        shards = [self.stack.spec.shards[entry.shard] for entry in entries]
        tensors = divide(data, [(self.accumulation(shard), shard.elements) for shard in shards], start)
        for entry, tensor in zip(entries, tensors, strict=True):
            if (entry.layer, entry.shard) in counts:
                parts.setdefault((entry.layer, entry.shard), {})[entry.node] = tensor

    def accumulation(self, shard: Shard) -> torch.dtype:
        """The type in which a shard's gradient is summed."""
        dtype: torch.dtype = getattr(torch, self.stack.spec.parameters[shard.parameter].dtype)
        return accumulation_dtype(dtype)

    def _combine(self, index: int, parts: Parts, leaves: int, out: Tensor) -> None:
        """The tree per layer; the layers of a tied parameter in sequence."""
        layers = self.stack.spec.parameters[self.stack.spec.shards[index].parameter].layers
        join = torch.maximum if self.stack.rule(self.stack.spec.shards[index].parameter) == "max" else torch.add
        combine(parts[(layers[0], index)], leaves, out, join)
        for layer in layers[1:]:
            other = torch.empty_like(out)
            combine(parts[(layer, index)], leaves, other, join)
            join(out, other, out=out)

    # ------------------------------------------------------------ values to readers

    def publish(self, version: int, layout: Layout) -> None:
        """Owners send `version` of their shards to all that compute with them, which write it into their parameters."""
        index, rank = self._index(layout), self.comm.rank
        sent = {reader: index.read_from(rank, reader) for reader in index.readers(rank) if reader != rank}
        self._send(version, sent)
        read = {owner: index.read_from(owner, rank) for owner in index.sources(rank) if owner != rank}
        for shard, value in self.values_received(version, read):
            self.stack.view(shard).copy_(value)
        self.stack.refresh()

    def send_values(self, version: int, layout: Layout, moves: Iterable[Move]) -> None:
        """Send the values that these moves name and that this rank owns. See `live_values`."""
        rank, sent = self.comm.rank, dict[int, list[Shard]]()
        for move in moves:
            if layout.owners[move.shard] == rank:
                for reader in move.to:
                    if reader != rank:
                        sent.setdefault(reader, []).append(self.stack.spec.shards[move.shard])
        self._send(version, sent)

    def live_values(self, layout: Layout) -> PeerValues:
        """Receive the values that other ranks send by `send_values`."""
        return PeerValues(self, layout)

    def _send(self, version: int, sent: Mapping[int, Sequence[Shard]]) -> None:
        for reader in self._others(sent):
            values = [on_host(self.stack.view(shard)) for shard in sent[reader]]
            self.comm.send(reader, Key(Kind.VALUES, version), values)

    def values_received(self, version: int, read: Mapping[int, Sequence[Shard]]) -> Iterator[tuple[Shard, Tensor]]:
        """The values of shards (owner -> shards) in order of arrival, sharing the memory of the message."""
        key = Key(Kind.VALUES, version)
        waiting = {(owner, key) for owner in read}
        while waiting:
            owner, _, data = self.comm.receive_any(waiting)
            waiting.discard((owner, key))
            parts = [(self.stack.view(shard).dtype, shard.elements) for shard in read[owner]]
            yield from zip(read[owner], divide(data, parts), strict=True)


@dataclass(frozen=True)
class PeerValues:
    """The live values of other ranks' shards, as a source: these ranks send exactly what this rank reads."""

    exchange: Exchange
    layout: Layout

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        by_owner: dict[int, list[Shard]] = {}
        for index in shards:
            by_owner.setdefault(self.layout.owners[index], []).append(self.exchange.stack.spec.shards[index])
        for shard, value in self.exchange.values_received(version, by_owner):
            yield Found(shard.index, {"value": value})
