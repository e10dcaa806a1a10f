"""The time that a step will take in a layout: the product's own order of work, run in virtual time.

Each rank takes its legs in the order that `StepWork` gives, as in training. Links take no time, unless `hop_s` says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .layout import Layout
from .legs import Await, Backward, Forward, Need, StepWork, in_flight
from .units import ModelSpec
from .work import Leg


@dataclass(frozen=True)
class Costs:
    """What a micro-batch costs in each layer, in seconds (or any unit) on a rank of speed 1."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @classmethod
    def of(cls, spec: ModelSpec) -> Costs:
        """Relative costs from the model alone: a backward pass takes twice the time of its forward."""
        return cls(spec.costs, tuple(2 * cost for cost in spec.costs))

    def scaled(self, total: float) -> Costs:
        """The same proportions, with this total over all layers."""
        factor = total / (sum(self.total) or 1.0)
        return Costs(tuple(factor * c for c in self.forward), tuple(factor * c for c in self.backward))

    @property
    def total(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward, self.backward, strict=True)))


def speed_of(speeds: Mapping[int, float], rank: int) -> float:
    """A rank's speed; 1 where none is known."""
    return speeds.get(rank, 1.0)


def bound(layout: Layout, costs: Costs, speeds: Mapping[int, float]) -> float:
    """The busiest rank's computing in a step: no order of work is faster."""
    prefix = [0.0, *accumulate(costs.total)]
    return max(
        (prefix[stage.stop] - prefix[stage.start]) * (block.stop - block.start) / speed_of(speeds, block.rank)
        for stage in layout.stages
        for block in stage.blocks
    )


def step_time(layout: Layout, costs: Costs, speeds: Mapping[int, float], *, hop_s: float = 0.0) -> float:
    """The time from the first forward of a step to the last backward, in O(legs log legs). Communication of gradients
    and the optimizer are left out: they hardly depend on the layout."""
    return _Run(layout, costs, speeds, hop_s).end()


class _Run:
    """One step in virtual time."""

    def __init__(self, layout: Layout, costs: Costs, speeds: Mapping[int, float], hop_s: float) -> None:
        self._work = {rank: StepWork.begin(0, rank, layout.work) for rank in layout.ranks}
        self._depth = {rank: in_flight(layout, rank) for rank in layout.ranks}
        self._speeds, self._hop_s = speeds, hop_s
        self._layers = len(costs.forward)
        self._forward: Sequence[float] = [0.0, *accumulate(costs.forward)]
        self._backward: Sequence[float] = [0.0, *accumulate(costs.backward)]
        self._there: dict[int, dict[Need, float]] = {rank: {} for rank in layout.ranks}  # arrived, and when
        self._waiting: dict[int, dict[Need, Forward | Backward]] = {}

    def end(self) -> float:
        """Run to the end, and return the time of it."""
        turns = [(0.0, rank) for rank in self._work]
        heapq.heapify(turns)
        last = 0.0
        while turns:
            now, rank = heapq.heappop(turns)
            if self._work[rank].done:
                continue
            action = self._next(rank, now, turns)
            if action is not None:
                free = self._do(rank, action, now, turns)
                last = max(last, free)
                heapq.heappush(turns, (free, rank))
        return last

    def _next(self, rank: int, now: float, turns: list[tuple[float, int]]) -> Forward | Backward | None:
        """What the rank does now; None if it waits for a message that is not sent yet, or on its way."""
        work, there = self._work[rank], self._there[rank]
        arrived = min(
            (n for n in work.gradients() if there.get(n, now + 1) <= now), key=there.__getitem__, default=None
        )
        action = work.next(self._depth[rank], arrived)
        if not isinstance(action, Await):
            return action
        coming = min((n for n in action.needs if n in there), key=there.__getitem__, default=None)
        if coming is None:
            self._waiting[rank] = action.needs
        elif there[coming] > now:
            heapq.heappush(turns, (there[coming], rank))
        else:
            return action.needs[coming]
        return None

    def _do(self, rank: int, action: Forward | Backward, now: float, turns: list[tuple[float, int]]) -> float:
        """Carry it out; returns when the rank is free again."""
        work, leg, speed = self._work[rank], action.leg, speed_of(self._speeds, rank)
        backward = (self._backward[leg.stop] - self._backward[leg.start]) / speed
        if isinstance(action, Backward):
            return self._finish(rank, leg, now + backward, turns)
        now += (self._forward[leg.stop] - self._forward[leg.start]) / speed
        if leg.stop == self._layers:
            return self._finish(rank, leg, now + backward, turns)
        work.forwarded(leg)
        following = work.work.next_segment(leg)
        assert following is not None
        self._send(following.rank, Need("activation", rank, leg.micro_batch, leg.stop), now, turns)
        return now

    def _finish(self, rank: int, leg: Leg, now: float, turns: list[tuple[float, int]]) -> float:
        work = self._work[rank]
        work.finished(leg)
        before = work.work.previous_segment(leg)
        if before is not None:
            self._send(before.rank, Need("gradient", rank, leg.micro_batch, leg.start), now, turns)
        return now

    def _send(self, to: int, what: Need, now: float, turns: list[tuple[float, int]]) -> None:
        self._there[to][what] = now + self._hop_s
        if what in self._waiting.get(to, ()):
            del self._waiting[to]
            heapq.heappush(turns, (now + self._hop_s, to))
