"""The look-ups that ranks make in a layout, prepared once for each generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .units import ModelSpec, Shard

if TYPE_CHECKING:
    from .layout import Layout

ByLayer = Mapping[int, tuple[Shard, ...]]


class LayoutIndex:
    """Which rank owns, reads and sends which shards in one layout of one model. See `Layout.index`.

    Built in O(shards + ranks). The tables of an owner are built from its own shards on first use, so a rank pays for
    the ranks that it exchanges with, not for all pairs.
    """

    def __init__(self, layout: Layout, spec: ModelSpec) -> None:
        self.spec = spec
        self._owners = layout.owners
        owned: dict[int, list[Shard]] = {rank: [] for rank in layout.ranks}
        for shard, owner in zip(spec.shards, layout.owners, strict=True):
            owned[owner].append(shard)
        self._owned = owned
        self._stages = tuple(sorted(layout.stages, key=lambda stage: stage.start))
        self._stage_of_layer = [n for n, stage in enumerate(self._stages) for _ in range(stage.start, stage.stop)]
        self._stage_number = {rank: n for n, stage in enumerate(self._stages) for rank in stage.ranks}
        self._by_layer: dict[int, ByLayer] = {}
        self._by_stage: dict[int, Mapping[int, tuple[Shard, ...]]] = {}
        self._owners_in: dict[int, tuple[int, ...]] = {}
        self._sources: dict[int, tuple[int, ...]] = {}

    def owned(self, rank: int) -> Sequence[Shard]:
        """The shards of a rank, in canonical order."""
        return self._owned.get(rank, ())

    def owned_in(self, rank: int) -> ByLayer:
        """Layer -> the shards in it that a rank owns. Those of a tied parameter are listed in several layers."""
        if rank not in self._by_layer:
            self._by_layer[rank] = _grouped((s, self.spec.parameters[s.parameter].layers) for s in self.owned(rank))
        return self._by_layer[rank]

    def owners_in(self, layer: int) -> tuple[int, ...]:
        """The ranks that own shards in a layer, ascending."""
        if layer not in self._owners_in:
            shards = self.spec.shards_of_layer[layer]
            self._owners_in[layer] = tuple(sorted({self._owners[s.index] for s in shards}))
        return self._owners_in[layer]

    def read_from(self, owner: int, reader: int) -> tuple[Shard, ...]:
        """The shards of `owner` that `reader` computes with."""
        return self._read(owner).get(self._stage_number[reader], ())

    def readers(self, owner: int) -> tuple[int, ...]:
        """The ranks that compute with shards of `owner`, ascending."""
        return tuple(sorted(rank for number in self._read(owner) for rank in self._stages[number].ranks))

    def sources(self, reader: int) -> tuple[int, ...]:
        """The owners of the shards that `reader` computes with, ascending."""
        number = self._stage_number[reader]
        if number not in self._sources:
            layers = range(self._stages[number].start, self._stages[number].stop)
            self._sources[number] = tuple(sorted({owner for layer in layers for owner in self.owners_in(layer)}))
        return self._sources[number]

    def copies(self, shard: int) -> int:
        """How many ranks compute with a shard."""
        layers = self.spec.parameters[self.spec.shards[shard].parameter].layers
        return sum(len(self._stages[number].ranks) for number in {self._stage_of_layer[layer] for layer in layers})

    def _read(self, owner: int) -> Mapping[int, tuple[Shard, ...]]:
        """Stage -> the shards of `owner` that its ranks compute with."""
        if owner not in self._by_stage:
            of_layer, parameters = self._stage_of_layer, self.spec.parameters
            self._by_stage[owner] = _grouped(
                (s, dict.fromkeys(of_layer[layer] for layer in parameters[s.parameter].layers))
                for s in self.owned(owner)
            )
        return self._by_stage[owner]


def _grouped(shards: Iterable[tuple[Shard, Iterable[int]]]) -> Mapping[int, tuple[Shard, ...]]:
    found: dict[int, list[Shard]] = {}
    for shard, places in shards:
        for place in places:
            found.setdefault(place, []).append(shard)
    return {place: tuple(members) for place, members in found.items()}
