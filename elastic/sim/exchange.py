"""Exchange between simulated ranks at the end of a step: partial sums to owners, and new values to readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

from everstep.resharding.layout import Layout
from everstep.resharding.moves import Move
from everstep.resharding.units import ModelSpec, Shard
from everstep.resharding.work import Work

from .links import Key, Links
from .pipeline import StepState
from .values import summed
from .world import Steps

Parts = dict[int, dict[int, str]]  # layer -> micro-batch -> leaf


class Exchange:
    """The contract of `elastic.step.exchange.Exchange`."""

    def __init__(self, spec: ModelSpec, links: Links, micro_batches: int) -> None:
        self._spec = spec
        self._links = links
        self._micro_batches = micro_batches

    def reduce(self, state: StepState, layout: Layout, owned: Sequence[int]) -> Steps[dict[int, str]]:
        """The gradients of the shards owned here: of all leaves, from all ranks."""
        rank, work, key = self._links.rank, state.work, ("partial", state.step)
        others = [other for other in layout.ranks if other != rank]
        for owner in others:
            layers = self._shared(work, layout, rank, owner)
            if layers:
                self._links.send(owner, key, {layer: dict(state.sums[layer]) for layer in layers})
        parts: Parts = {}
        for layer in self._shared(work, layout, rank, rank):
            _merge(parts, layer, state.sums[layer])
        waiting: set[tuple[int, Key]] = {(source, key) for source in others if self._shared(work, layout, source, rank)}
        while waiting:
            source, name, data = yield from self._links.receive_any(waiting)
            waiting.discard((source, name))
            for layer in self._shared(work, layout, source, rank):
                _merge(parts, layer, data[layer])
        yield 0.0005
        return {shard: self._combine(self._spec.shards[shard], parts) for shard in owned}

    def _shared(self, work: Work, layout: Layout, source: int, owner: int) -> list[int]:
        """The layers of which `source` holds a part of the sum and `owner` owns shards."""
        index = layout.index(self._spec)
        owned = {layer for s in index.owned(owner) for layer in self._spec.parameters[s.parameter].layers}
        return [layer for layer in work.layers_of(source) if layer in owned]

    def _combine(self, shard: Shard, parts: Parts) -> str:
        layers = self._spec.parameters[shard.parameter].layers
        for layer in layers:
            if sorted(parts[layer]) != list(range(self._micro_batches)):
                raise AssertionError(f"the sum of layer {layer} has the leaves {sorted(parts[layer])}")
        return summed(shard, [[parts[layer][m] for m in sorted(parts[layer])] for layer in layers])

    def publish(
        self, version: int, layout: Layout, values: MutableMapping[int, str], moves: Iterable[Move] | None = None
    ) -> Steps[None]:
        """Send the owned values to their readers, and receive the values that this rank reads.

        `moves`: only these values; None: all.
        """

        def sent(owner: int, reader: int) -> list[int]:
            if moves is None:
                return self._read_from(layout, owner, reader)
            return [move.shard for move in moves if reader in move.to and layout.owners[move.shard] == owner]

        rank, key = self._links.rank, ("values", version)
        others = [other for other in layout.ranks if other != rank]
        for reader in others:
            shards = sent(rank, reader)
            if shards:
                self._links.send(reader, key, {shard: values[shard] for shard in shards})
        waiting: set[tuple[int, Key]] = {(owner, key) for owner in others if sent(owner, rank)}
        while waiting:
            owner, name, data = yield from self._links.receive_any(waiting)
            waiting.discard((owner, name))
            values.update(data)

    def _read_from(self, layout: Layout, owner: int, reader: int) -> list[int]:
        return [shard.index for shard in layout.index(self._spec).read_from(owner, reader)]


def _merge(parts: Parts, layer: int, leaves: Mapping[int, str]) -> None:
    known = parts.setdefault(layer, {})
    twice = known.keys() & leaves.keys()
    if twice:
        raise AssertionError(f"micro-batches {sorted(twice)} enter the sum of layer {layer} twice")
    known.update(leaves)
