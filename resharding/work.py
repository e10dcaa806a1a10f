"""The work of a step: which rank computes which micro-batch through which layers, with the look-ups of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple


class Leg(NamedTuple):
    """A micro-batch's way through the layers [start, stop), on the rank that reports it."""

    micro_batch: int
    start: int
    stop: int


class AssignedLeg(NamedTuple):
    """One micro-batch's way through the layers [start, stop) on one rank: a forward and a backward."""

    rank: int
    micro_batch: int
    start: int
    stop: int

    @property
    def span(self) -> Leg:
        return Leg(self.micro_batch, self.start, self.stop)


def legs_to_runs(legs: Iterable[AssignedLeg]) -> list[list[int]]:
    """Legs as JSON values: runs of consecutive micro-batches, `[rank, start, stop, first micro-batch, how many]`."""
    runs: list[list[int]] = []
    for leg in legs:
        alike = bool(runs) and runs[-1][:3] == [leg.rank, leg.start, leg.stop]
        if alike and runs[-1][3] + runs[-1][4] == leg.micro_batch:
            runs[-1][4] += 1
        else:
            runs.append([leg.rank, leg.start, leg.stop, leg.micro_batch, 1])
    return runs


def legs_from_runs(runs: Iterable[Sequence[int]]) -> tuple[AssignedLeg, ...]:
    """The legs that `legs_to_runs` turned into JSON values."""
    return tuple(
        AssignedLeg(rank, micro_batch, start, stop)
        for rank, start, stop, first, count in runs
        for micro_batch in range(first, first + count)
    )


class Work:
    """The segments of a step that are still to run, and those whose gradients are `kept` from before a recovery.

    Immutable. The tables are built once, in O(segments); a look-up costs O(1). `order`: micro-batch -> its place in the
    order in which every rank takes them; by number where none is given. All ranks have the same order: so no rank waits
    for one that waits for it.
    """

    def __init__(
        self,
        segments: Iterable[AssignedLeg],
        kept: Iterable[AssignedLeg] = (),
        order: Mapping[int, int] | None = None,
    ) -> None:
        self.segments = tuple(segments)
        self.kept = tuple(kept)
        self._order: Mapping[int, int] = order or {}

    def turn(self, leg: Leg) -> tuple[int, int]:
        """What legs are sorted by: the place of their micro-batch, then their layers."""
        return self._order.get(leg.micro_batch, leg.micro_batch), leg.start

    @cached_property
    def _spans(self) -> Mapping[int, tuple[Leg, ...]]:
        found: dict[int, list[Leg]] = {}
        for segment in self.segments:
            found.setdefault(segment.rank, []).append(segment.span)
        return {rank: tuple(sorted(spans, key=self.turn)) for rank, spans in found.items()}

    @cached_property
    def _starting(self) -> Mapping[tuple[int, int], AssignedLeg]:
        return {(s.micro_batch, s.start): s for s in self.segments}

    @cached_property
    def _stopping(self) -> Mapping[tuple[int, int], AssignedLeg]:
        return {(s.micro_batch, s.stop): s for s in self.segments}

    @cached_property
    def _kept_starting(self) -> Mapping[tuple[int, int], AssignedLeg]:
        return {(s.micro_batch, s.start): s for s in self.kept}

    @cached_property
    def _kept_stopping(self) -> Mapping[tuple[int, int], AssignedLeg]:
        return {(s.micro_batch, s.stop): s for s in self.kept}

    @cached_property
    def _layers(self) -> Mapping[int, tuple[int, ...]]:
        ranges: dict[int, set[tuple[int, int]]] = {}
        for segment in (*self.segments, *self.kept):
            ranges.setdefault(segment.rank, set()).add((segment.start, segment.stop))
        return {
            rank: tuple(sorted({layer for start, stop in found for layer in range(start, stop)}))
            for rank, found in ranges.items()
        }

    @cached_property
    def _contributors(self) -> Mapping[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for rank in sorted(self._layers):
            for layer in self._layers[rank]:
                found.setdefault(layer, []).append(rank)
        return {layer: tuple(ranks) for layer, ranks in found.items()}

    def spans_of(self, rank: int) -> tuple[Leg, ...]:
        """What `rank` has still to run, in order."""
        return self._spans.get(rank, ())

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """The layers of which `rank` will hold a part of the sum, ascending."""
        return self._layers.get(rank, ())

    def contributors(self, layer: int) -> tuple[int, ...]:
        """The ranks that will hold a part of a layer's sum, ascending."""
        return self._contributors.get(layer, ())

    def next_segment(self, span: Leg) -> AssignedLeg | None:
        """The segment, still to run, whose input is a span's output."""
        return self._starting.get((span.micro_batch, span.stop))

    def previous_segment(self, span: Leg) -> AssignedLeg | None:
        """The segment, still to run, that waits for a span's input gradient."""
        return self._stopping.get((span.micro_batch, span.start))

    def activation_source(self, span: Leg) -> int:
        """The rank that has, or will have, the input of a span."""
        name = (span.micro_batch, span.start)
        segment = self._stopping.get(name) or self._kept_stopping.get(name)
        assert segment is not None, f"no rank computes the input of {span}"
        return segment.rank

    def gradient_source(self, span: Leg) -> int:
        """The rank that has, or will have, the gradient of a span's output."""
        name = (span.micro_batch, span.stop)
        segment = self._starting.get(name) or self._kept_starting.get(name)
        assert segment is not None, f"no rank computes the output gradient of {span}"
        return segment.rank
