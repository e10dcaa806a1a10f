"""A layout of the present ranks with another number of pipeline stages, as an operator asks for it.

The stages are cut as those of a job that starts with so many: ranks spread evenly, layers by their costs. Which ranks
form a stage is free, so each goes where it holds most of the layers already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

from .forecast import Costs
from .layout import Layout, LayoutError, Stage
from .memory import layer_bytes
from .planners import deal_micro_batches, deal_shards, partition
from .units import ModelSpec

Cell = tuple[int, int]
"""A stage of the old layout, and one of the new."""


def relayout(
    spec: ModelSpec,
    old: Layout,
    stages: int,
    generation: int,
    *,
    costs: Costs | None = None,
    speeds: Mapping[int, float] | None = None,
) -> Layout:
    """The layout of `old`'s ranks in `stages` stages, which are its home, too.

    Of two cuts that are as even, the one that moves fewer bytes of layers is taken. `costs`: of the layers; from
    the model by default. `speeds`: rank -> speed, by which micro-batches are dealt; 1 where none is given. Pure; equal
    arguments give equal results. Raises LayoutError when there are too few ranks or layers.
    """
    if not 1 <= stages <= len(old.ranks):
        raise LayoutError(f"{stages} stages need at least as many workers; there are {len(old.ranks)}")
    size, cost = [0, *accumulate(layer_bytes(spec))], (costs or Costs.of(spec)).total
    even = [len(old.ranks) * (i + 1) // stages - len(old.ranks) * i // stages for i in range(stages)]
    best: tuple[float, int, list[int], Counter[Cell]] | None = None
    for sizes in (sorted(even, reverse=True), sorted(even)):
        bounds = partition(cost, sizes)
        slowest = max(sum(cost[a:b]) / n for (a, b), n in zip(pairwise(bounds), sizes, strict=True))
        kept = [[_common(size, stage, span) for span in pairwise(bounds)] for stage in old.stages]
        moves = _assign([len(stage.ranks) for stage in old.stages], sizes, kept)
        fetched = sum(n * (size[b] - size[a]) for (a, b), n in zip(pairwise(bounds), sizes, strict=True))
        fetched -= sum(count * kept[i][j] for (i, j), count in moves.items())
        if best is None or (slowest, fetched) < best[:2]:
            best = slowest, fetched, bounds, moves
    assert best is not None
    home = _home(old, best[2], best[3])
    dealt = tuple(replace(s, blocks=deal_micro_batches(old.micro_batches, s.ranks, speeds)) for s in home)
    holders = {layer: stage.ranks for stage in home for layer in range(stage.start, stage.stop)}
    layout = Layout(generation, old.micro_batches, dealt, deal_shards(spec, holders, old.owners), home)
    layout.validate(spec)
    return layout


def _common(size: Sequence[int], stage: Stage, span: tuple[int, int]) -> int:
    """The bytes of the layers that a rank of `stage` holds and needs in a stage of the layers `span`."""
    start, stop = max(stage.start, span[0]), min(stage.stop, span[1])
    return size[stop] - size[start] if start < stop else 0


def _assign(supply: Sequence[int], sizes: Sequence[int], kept: Sequence[Sequence[int]]) -> Counter[Cell]:
    """How many ranks of each old stage go to each new one, so that they keep most; no exchange of two keeps more.

    `supply` and `sizes`: the ranks of the old stages and of the new ones. `kept[i][j]`: what one rank keeps.
    """
    left, room, found = list(supply), list(sizes), Counter[Cell]()
    cells = [(i, j) for i in range(len(supply)) for j in range(len(sizes))]
    for i, j in sorted(cells, key=lambda cell: (-kept[cell[0]][cell[1]], cell)):
        count = min(left[i], room[j])
        left[i] -= count
        room[j] -= count
        if count:
            found[i, j] = count
    while (exchange := _exchange(found, kept)) is not None:
        (i, j), (k, m) = exchange
        count = min(found[i, j], found[k, m])
        found.subtract({(i, j): count, (k, m): count})
        found.update({(i, m): count, (k, j): count})
        found = +found
    return found


def _exchange(found: Counter[Cell], kept: Sequence[Sequence[int]]) -> tuple[Cell, Cell] | None:
    """Two ranks that keep more if they change places."""
    for (i, j), (k, m) in combinations(sorted(found), 2):
        if kept[i][m] + kept[k][j] > kept[i][j] + kept[k][m]:
            return (i, j), (k, m)
    return None


def _home(old: Layout, bounds: Sequence[int], moves: Counter[Cell]) -> tuple[Stage, ...]:
    left = [sorted(stage.ranks) for stage in old.stages]
    groups: list[list[int]] = [[] for _ in pairwise(bounds)]
    for (i, j), count in sorted(moves.items()):
        groups[j] += left[i][:count]
        left[i] = left[i][count:]
    return tuple(Stage(a, b, tuple(sorted(group))) for (a, b), group in zip(pairwise(bounds), groups, strict=True))
