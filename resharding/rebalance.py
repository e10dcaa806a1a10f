"""A layout in which the ranks that are there compute a step in the least time: for after a loss, a join, a slow-down.

`change_layout` answers at once, and moves as little as it can. This planner looks for what is best afterwards: it deals
micro-batches by the ranks' speeds, cuts the model into stages by their ranks' speeds, and moves ranks between stages
(ElasWave, 2025: resize, then migrate). The forecast of the schedule decides, not the balance of sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise, permutations

from .forecast import Costs, bound, speed_of, step_time
from .layout import Layout, Stage
from .memory import Memory, layer_bytes
from .planners import deal_micro_batches, deal_shards, partition
from .units import ModelSpec

LEAST_GAIN = 0.05  # of the step time: less is not worth a move
MOST_LEGS = 6_000  # in all forecasts together; a step that has more is judged by its busiest rank
MOST_CUTS = 100_000  # stages times layers, of all candidates together
AS_GOOD = 0.01  # of the step time: among layouts that differ by less, the one that moves least
FINALISTS = 6  # candidates that are forecast
MANY_STAGES = 8  # up to which every pair of stages is tried for the move of a rank

Groups = tuple[tuple[int, ...], ...]
"""The ranks of each stage."""
Candidate = tuple[Groups, tuple[int, ...]]
"""The ranks of each stage, and the bounds of their layers."""


@dataclass(frozen=True)
class Proposal:
    """A layout that is faster. Times of a step, in the unit of the costs; `moved`: bytes of parameters that move.

    `before` is infinite if ranks lack the memory for the layout that they are in.
    """

    layout: Layout
    before: float
    after: float
    moved: int

    @property
    def gain(self) -> float:
        """The part of the step time that is saved; 0 where it is memory that is gained."""
        return 1 - self.after / self.before if self.before < math.inf else 0.0

    def why(self) -> str:
        """The reason, in words."""
        gained = f"a step takes {self.gain:.0%} less time by the forecast"
        if self.before == math.inf:
            gained = "ranks lack the memory for their layers"
        return f"{gained}; {self.moved / 2**20:.1f} MiB move"


def rebalance(
    spec: ModelSpec,
    layout: Layout,
    generation: int,
    *,
    costs: Costs | None = None,
    speeds: Mapping[int, float] | None = None,
    memory: Memory | None = None,
    least_gain: float = LEAST_GAIN,
) -> Proposal | None:
    """The best layout found for the ranks of `layout`, or None if none saves `least_gain` of the step time.

    `costs`: seconds per layer and micro-batch; from the model's relative costs by default. `speeds`: rank -> speed, 1
    where none is given. `memory`: what ranks have; no limit by default. The number of
    stages stays. Pure; equal arguments give equal results.
    """
    costs, speeds = costs or Costs.of(spec), speeds or {}
    memory = memory or Memory.of(spec, (), ())
    before = present_time(layout, costs, speeds, memory)
    found = _Search(spec, layout, generation, costs, speeds, memory).run()
    if found is None or found[1] > (1 - least_gain) * before:
        return None
    shape, after = found
    holders = {layer: stage.ranks for stage in shape.stages for layer in range(stage.start, stage.stop)}
    best = replace(shape, owners=deal_shards(spec, holders, layout.owners))
    best.validate(spec)
    return Proposal(best, before, after, moved_bytes(spec, layout, best))


def present_time(layout: Layout, costs: Costs, speeds: Mapping[int, float], memory: Memory) -> float:
    """The forecast of a step as it is; infinite if ranks lack the memory for it."""
    return math.inf if memory.too_much(layout) else forecast(layout, costs, speeds)


def forecast(layout: Layout, costs: Costs, speeds: Mapping[int, float]) -> float:
    """The time of a step, or of its busiest rank alone, which is cheap, where the step has very many legs."""
    if layout.micro_batches * len(layout.stages) > MOST_LEGS:
        return bound(layout, costs, speeds)
    return step_time(layout, costs, speeds)


class _Search:
    """From the groups of ranks as they are, by the move of one rank at a time, to the best ones.

    On the way candidates are judged by their busiest rank, which is cheap; the best few are then forecast. The layouts
    have no owners of shards so far. Both parts have a budget, since the coordinator does nothing else meanwhile.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        generation: int,
        costs: Costs,
        speeds: Mapping[int, float],
        memory: Memory,
    ) -> None:
        self._spec = spec
        self._old = layout
        self._generation = generation
        self._costs = costs
        self._speeds = speeds
        self._memory = memory
        self._prefix = [0.0, *accumulate(costs.total)]
        self._slowest: dict[tuple[int, ...], float] = {}  # ranks of a stage -> micro-batches over speed, of the last
        self._found: dict[Candidate, float] = {}  # -> time of its busiest rank

    def run(self) -> tuple[Layout, float] | None:
        """The best layout, and its time; None where none has the memory."""
        groups: Groups = tuple(stage.ranks for stage in self._old.stages)
        least = self._judge(groups)
        while True:
            budget = MOST_CUTS // (self._spec.layers * len(groups)) - len(self._found) // 2
            tried = [(self._judge(other), other) for other in islice(self._neighbours(groups), max(0, budget))]
            found = min(tried, default=(math.inf, groups))
            if found[0] >= least:
                break
            least, groups = found
        if not self._found:
            return None
        timed = self._forecast()
        least = min(time for time, _ in timed.values())
        equal = [item for item in timed.values() if item[0] <= (1 + AS_GOOD) * least]
        time, layout = min(equal, key=lambda item: (moved_values(self._spec, self._old, item[1]), item[0]))
        return layout, time

    def _forecast(self) -> dict[Candidate, tuple[float, Layout]]:
        """The candidates that promise most, and what is close to the best of them, as long as the budget lasts."""
        left = 1 + MOST_LEGS // (self._old.micro_batches * len(self._old.stages))
        timed: dict[Candidate, tuple[float, Layout]] = {}
        as_now = tuple(stage.ranks for stage in self._old.stages)  # least is moved, and the busiest rank is not all
        ahead = [candidate for candidate in self._found if candidate[0] == as_now]
        rest = [candidate for candidate in self._found if candidate[0] != as_now]
        ahead += sorted(rest, key=lambda item: (self._found[item], item))[:FINALISTS]
        while ahead:
            for candidate in ahead[: max(left, 1 - len(timed))]:
                for dealt in self._layouts(*candidate):
                    time = forecast(dealt, self._costs, self._speeds)
                    if candidate not in timed or time < timed[candidate][0]:
                        timed[candidate] = time, dealt
                    left -= 1
            best = min(timed, key=lambda item: (timed[item][0], item))
            ahead = [candidate for candidate in self._close(*best) if candidate not in timed] if left > 0 else []
        return timed

    def _close(self, groups: Groups, bounds: tuple[int, ...]) -> list[Candidate]:
        """The same with one layer, or one rank, in another stage."""
        found = [
            (groups, (*bounds[:i], bounds[i] + by, *bounds[i + 1 :])) for i in range(1, len(groups)) for by in (-1, 1)
        ]
        found += [(other, bounds) for other in self._neighbours(groups)]
        return [(g, b) for g, b in found if all(x < y for x, y in pairwise(b)) and self._memory.fit(g, b)]

    def _judge(self, groups: Groups) -> float:
        """The time of the busiest rank, in the best cut of the stages among these groups."""
        weights = [sum(speed_of(self._speeds, rank) for rank in ranks) for ranks in groups]
        as_now = [0, *(stage.stop for stage in self._old.stages)]
        least = math.inf
        for bounds in (partition(self._costs.total, weights), as_now):
            if self._memory.fit(groups, bounds):
                spans = zip(groups, bounds[:-1], bounds[1:], strict=True)
                time = max((self._prefix[stop] - self._prefix[start]) * self._share(g) for g, start, stop in spans)
                self._found[groups, tuple(bounds)] = time
                least = min(least, time)
        return least

    def _share(self, ranks: tuple[int, ...]) -> float:
        if ranks not in self._slowest:
            blocks = deal_micro_batches(self._old.micro_batches, ranks, self._speeds)
            self._slowest[ranks] = max((b.stop - b.start) / speed_of(self._speeds, b.rank) for b in blocks)
        return self._slowest[ranks]

    def _layouts(self, groups: Groups, bounds: Sequence[int]) -> Iterator[Layout]:
        """With work for all ranks; and, if stages differ in width, for as many in each as the narrowest has.

        Among many stages those of one width pass micro-batches on without a wait, which may be worth more than some
        ranks that compute.
        """
        micro_batches = self._old.micro_batches
        spans = zip(groups, bounds[:-1], bounds[1:], strict=True)
        home = tuple(Stage(start, stop, ranks) for ranks, start, stop in spans)
        narrowest = min(map(len, groups))
        for width in dict.fromkeys((max(map(len, groups)), narrowest)):
            blocks = (deal_micro_batches(micro_batches, self._fastest(s.ranks, width), self._speeds) for s in home)
            stages = tuple(replace(stage, blocks=dealt) for stage, dealt in zip(home, blocks, strict=True))
            yield Layout(self._generation, micro_batches, stages, (), home)

    def _fastest(self, ranks: tuple[int, ...], count: int) -> tuple[int, ...]:
        """So many of these ranks, in their order."""
        chosen = sorted(ranks, key=lambda rank: (-speed_of(self._speeds, rank), rank))[:count]
        return tuple(rank for rank in ranks if rank in chosen)

    def _neighbours(self, groups: Groups) -> Iterator[Groups]:
        """The groups with one rank in another stage, or two that have changed places.

        Of each stage its slowest rank and its fastest are tried.
        """
        by_speed = [sorted(ranks, key=lambda rank: (speed_of(self._speeds, rank), rank)) for ranks in groups]
        for source, target in self._pairs(len(groups)):
            ends = dict.fromkeys((by_speed[source][0], by_speed[source][-1]))
            if len(groups[source]) > 1:
                for rank in ends:
                    yield _moved(groups, {rank: target})
            slow, fast = by_speed[source][0], by_speed[target][-1]
            if speed_of(self._speeds, slow) < speed_of(self._speeds, fast):
                yield _moved(groups, {slow: target, fast: source})

    def _pairs(self, stages: int) -> Iterator[tuple[int, int]]:
        for source, target in permutations(range(stages), 2):
            if abs(source - target) == 1 or stages <= MANY_STAGES:
                yield source, target


def _moved(groups: Groups, moves: Mapping[int, int]) -> Groups:
    """The groups with these ranks in other stages."""
    stayed = [[rank for rank in ranks if rank not in moves] for ranks in groups]
    for rank, stage in moves.items():
        stayed[stage].append(rank)
    return tuple(map(tuple, stayed))


def moved_bytes(spec: ModelSpec, old: Layout, new: Layout) -> int:
    """The bytes of parameters that ranks have to get: of layers that they did not hold, and of shards that they own."""
    return moved_values(spec, old, new) + sum(
        shard.elements * spec.parameters[shard.parameter].item_bytes
        for shard in spec.shards
        if new.owners[shard.index] != old.owners[shard.index]
    )


def moved_values(spec: ModelSpec, old: Layout, new: Layout) -> int:
    """The bytes of the layers that ranks of `new` did not hold."""
    size = layer_bytes(spec)
    held = {rank: range(stage.start, stage.stop) for stage in old.stages for rank in stage.ranks}
    return sum(
        size[layer]
        for stage in new.stages
        for rank in stage.ranks
        for layer in range(stage.start, stage.stop)
        if layer not in held.get(rank, ())
    )
