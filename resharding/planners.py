"""Planners: pure functions from a model, live ranks and an old layout to a new layout, with minimal moves."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from .layout import (
    Block,
    Layout,
    LayoutError,
    Stage,
)
from .units import ModelSpec, Shard


def partition(costs: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Cut layers into contiguous stages so that the slowest stage is as fast as possible.

    `costs`: cost per layer; `weights`: capacity per stage (its number of ranks, or speed). Returns the bounds
    [0, ..., layers]. Every stage gets at least one layer. Dynamic programming, about O(layers^2). Raises LayoutError
    when there are more stages than layers.
    """
    layers, stages = len(costs), len(weights)
    if stages > layers:
        raise LayoutError(f"{stages} stages need at least as many layers; the model has {layers}")
    prefix = [0.0, *accumulate(costs)]
    best = [prefix[i] / weights[0] if i else 0.0 for i in range(layers + 1)]
    choice: list[list[int]] = []
    for stage in range(1, stages):
        row, cut = [float("inf")] * (layers + 1), [0] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            for start in range(stop - 1, stage - 1, -1):
                own = (prefix[stop] - prefix[start]) / weights[stage]
                if own > row[stop]:
                    break  # and it only grows
                slowest = max(best[start], own)
                if slowest <= row[stop]:
                    row[stop], cut[stop] = slowest, start
        best = row
        choice.append(cut)
    bounds = [layers]
    for cut in reversed(choice):
        bounds.append(cut[bounds[-1]])
    return [0, *reversed(bounds)]


def deal_micro_batches(
    micro_batches: int, ranks: Sequence[int], speeds: Mapping[int, float] | None = None
) -> tuple[Block, ...]:
    """Contiguous ranges: each rank's share of a step, by speed (1 where none is given).

    Ranks of one speed get shares that differ by at most one. Otherwise each gets one, if there are enough, so that its
    speed is still measured; and the rank that would be finished first gets the next one, again and again.
    """
    count = len(ranks)
    speed = [(speeds or {}).get(rank, 1.0) for rank in ranks]
    if min(speed) == max(speed):
        bounds = [micro_batches * i // count for i in range(count + 1)]
    else:
        shares = [int(micro_batches >= count)] * count
        ends = [((shares[i] + 1) / speed[i], i) for i in range(count)]  # with one more
        heapq.heapify(ends)
        for _ in range(micro_batches - sum(shares)):
            i = ends[0][1]
            shares[i] += 1
            heapq.heapreplace(ends, ((shares[i] + 1) / speed[i], i))
        bounds = [0, *accumulate(shares)]
    return tuple(
        Block(rank, start, stop)
        for rank, start, stop in zip(ranks, bounds[:-1], bounds[1:], strict=True)
        if stop > start
    )


def initial_layout(spec: ModelSpec, ranks: Sequence[int], stages: int, micro_batches: int) -> Layout:
    """The layout of a job's start: ranks in order over stages, layers by cost, shards distributed per layer."""
    if stages > len(ranks):
        raise LayoutError(f"{stages} stages need at least as many workers; there are {len(ranks)}")
    sizes = [len(ranks) * (i + 1) // stages - len(ranks) * i // stages for i in range(stages)]
    sizes.sort(reverse=True)
    bounds = partition(spec.costs, sizes)
    home, first = [], 0
    for start, stop, size in zip(bounds[:-1], bounds[1:], sizes, strict=True):
        home.append(Stage(start, stop, tuple(ranks[first : first + size])))
        first += size
    return _layout(spec, 1, micro_batches, tuple(home), frozenset(ranks), ())


def change_layout(spec: ModelSpec, old: Layout, live: Collection[int], generation: int) -> Layout:
    """The layout for the `live` ranks, nearest to `old`.

    Ranks belong to their home stage. A stage without live ranks gives its layers to its neighbours and takes them back
    when one returns; a rank without a home joins the stage with the most work per rank. Shards stay with their owner
    where possible; loads per layer differ by at most one shard.
    """
    if not live:
        raise LayoutError("no live rank is left")
    home = list(old.home)
    homeless = sorted(set(live) - {rank for stage in home for rank in stage.ranks})
    for rank in homeless:
        index = max(range(len(home)), key=lambda i: (_load(spec, home[i]), -i))
        home[index] = replace(home[index], ranks=(*home[index].ranks, rank))
    return _layout(spec, generation, old.micro_batches, tuple(home), frozenset(live), old.owners)


def _load(spec: ModelSpec, stage: Stage) -> float:
    return sum(spec.costs[stage.start : stage.stop]) / len(stage.ranks)


def _layout(
    spec: ModelSpec,
    generation: int,
    micro_batches: int,
    home: tuple[Stage, ...],
    live: frozenset[int],
    owners: Sequence[int],
) -> Layout:
    stages = tuple(
        replace(stage, blocks=deal_micro_batches(micro_batches, stage.ranks))
        for stage in _live_stages(spec, home, live)
    )
    dealt = deal_shards(spec, {layer: s.ranks for s in stages for layer in range(s.start, s.stop)}, owners)
    layout = Layout(generation, micro_batches, stages, dealt, home)
    layout.validate(spec)
    return layout


def _live_stages(spec: ModelSpec, home: Sequence[Stage], live: frozenset[int]) -> list[Stage]:
    """Home stages with their live ranks; the layers of dead stages go to the live neighbours on either side."""
    alive: list[Stage] = []
    for stage in home:
        ranks = tuple(rank for rank in stage.ranks if rank in live)
        if ranks:
            alive.append(Stage(stage.start, stage.stop, ranks))
    if not alive:
        raise LayoutError("no live rank is left")
    alive[0] = replace(alive[0], start=0)
    alive[-1] = replace(alive[-1], stop=spec.layers)
    for i in range(len(alive) - 1):
        left, right = alive[i], alive[i + 1]
        cut = min(
            range(left.stop, right.start + 1),
            key=lambda c: max(
                _load(spec, replace(left, stop=c)),
                _load(spec, replace(right, start=c)),
            ),
        )
        alive[i], alive[i + 1] = replace(left, stop=cut), replace(right, start=cut)
    return alive


def deal_shards(spec: ModelSpec, holders: Mapping[int, Sequence[int]], owners: Sequence[int] = ()) -> tuple[int, ...]:
    """An owner for every shard, among the ranks that hold its layer, with as few moves as balance allows.

    Per layer the loads (in elements) differ by at most the layer's largest shard. Without `owners` all shards are
    distributed. Shards whose owner still holds the layer move only to fill a rank that has too few.
    """
    dealt = list(owners) if owners else [-1] * len(spec.shards)
    total: dict[int, int] = {rank: 0 for ranks in holders.values() for rank in ranks}
    by_home: dict[int, list[Shard]] = {}
    for shard in spec.shards:
        by_home.setdefault(spec.home(shard), []).append(shard)
    for layer, shards in sorted(by_home.items()):
        ranks = holders[layer]
        load = dict.fromkeys(ranks, 0)
        for shard in shards:
            if dealt[shard.index] in load:
                load[dealt[shard.index]] += shard.elements
        lost = [s for s in shards if dealt[s.index] not in load]
        emptiest = [(load[rank], total[rank], rank) for rank in ranks] if lost else []
        heapq.heapify(emptiest)
        for shard in sorted(lost, key=lambda s: (-s.elements, s.index)):
            owner = emptiest[0][2]
            dealt[shard.index] = owner
            load[owner] += shard.elements
            heapq.heapreplace(emptiest, (load[owner], total[owner], owner))
        even_out(shards, dealt, load)
        for rank, elements in load.items():
            total[rank] += elements
    return tuple(dealt)


def even_out(shards: Sequence[Shard], dealt: list[int], load: dict[int, int]) -> None:
    """Move shards from the fullest to the emptiest rank until they differ by at most one (the largest) shard.

    The one that moves comes nearest to half of the difference; of several such, the one with the lowest index.
    """
    largest = max(shard.elements for shard in shards)
    owned: dict[int, _BySize] = {}
    while True:
        full = max(load, key=lambda r: (load[r], -r))
        empty = min(load, key=lambda r: (load[r], r))
        gap = load[full] - load[empty]
        if gap <= largest:
            return
        if not owned:
            owned = {rank: _BySize() for rank in load}
            for shard in shards:
                owned[dealt[shard.index]].add(shard.elements, shard.index)
        elements, index = owned[full].take_nearest_half(gap)
        owned[empty].add(elements, index)
        dealt[index] = empty
        load[full] -= elements
        load[empty] += elements


class _BySize:
    """The shards of a rank by their size, in elements."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # ascending
        self._indices: dict[int, list[int]] = {}  # size -> the shards of that size, as a heap

    def add(self, elements: int, index: int) -> None:
        if elements not in self._indices:
            bisect.insort(self._sizes, elements)
            self._indices[elements] = []
        heapq.heappush(self._indices[elements], index)

    def take_nearest_half(self, gap: int) -> tuple[int, int]:
        """Remove and return the shard nearest to half of `gap`, of those that have elements and fewer than `gap`."""
        above = bisect.bisect_left(self._sizes, gap, key=lambda elements: 2 * elements)
        near = [size for size in self._sizes[max(0, above - 1) : above + 1] if 0 < size < gap]
        elements = min(near, key=lambda size: (abs(gap - 2 * size), self._indices[size][0]))
        indices = self._indices[elements]
        index = heapq.heappop(indices)
        if not indices:
            del self._indices[elements]
            self._sizes.remove(elements)
        return elements, index
