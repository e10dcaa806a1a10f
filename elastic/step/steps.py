"""What one rank has of the step it is in: work to do, work done, gradients held. Recovery edits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from everstep.resharding.layout import Segment
from everstep.resharding.plan import Span

from .canonical import TreeSum


@dataclass
class Graph:
    """A forward that waits for its backward."""

    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    statistics: dict[int, list[Tensor]]  # layer -> batch-norm statistics after this micro-batch alone


@dataclass
class StepState:
    """Step `step` as this rank sees it. `work` and `kept` are everybody's segments, the rest is its own."""

    step: int
    rank: int
    leaves: int
    work: tuple[Segment, ...]
    kept: tuple[Segment, ...] = ()
    todo: list[Span] = field(default_factory=list)
    started: dict[Span, Graph] = field(default_factory=dict)
    held: set[Span] = field(default_factory=set)
    sums: dict[int, TreeSum] = field(default_factory=dict)
    outputs: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # (boundary, micro-batch)
    input_gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)  # parameters of which some micro-batch here had a gradient

    @classmethod
    def begin(cls, step: int, rank: int, leaves: int, work: tuple[Segment, ...]) -> StepState:
        """A step of which nothing is done."""
        todo = [Span(s.micro_batch, s.start, s.stop) for s in work if s.rank == rank]
        return cls(step, rank, leaves, work, todo=sorted(todo))

    def resume(self, work: tuple[Segment, ...], kept: tuple[Segment, ...], started: tuple[Segment, ...]) -> None:
        """Go on with the work of a plan: keep what is held and the forwards that are still ours."""
        self.work, self.kept = work, kept
        ours = {Span(s.micro_batch, s.start, s.stop) for s in work if s.rank == self.rank}
        theirs = {Span(s.micro_batch, s.start, s.stop) for s in started if s.rank == self.rank}
        self.started = {span: graph for span, graph in self.started.items() if span in ours and span in theirs}
        self.todo = sorted(ours - set(self.started))
        self.losses = {m: loss for m, loss in self.losses.items() if any(s.micro_batch == m for s in self.held)}

    def hold(self, span: Span, layer: int, gradients: list[Tensor]) -> None:
        """Add one layer's gradient of a micro-batch to the canonical sum."""
        self.sums.setdefault(layer, TreeSum(self.leaves)).add(span.micro_batch, gradients)

    def idle(self, parameters: Sequence[Sequence[int]]) -> list[int]:
        """Which parameters of the layers summed here (layer -> its parameters) had no gradient here."""
        return sorted({index for layer in self.sums for index in parameters[layer]} - self.touched)

    def contributors(self) -> dict[int, set[int]]:
        """layer -> the ranks that will hold a part of its sum."""
        found: dict[int, set[int]] = {}
        for segment in (*self.work, *self.kept):
            for layer in range(segment.start, segment.stop):
                found.setdefault(layer, set()).add(segment.rank)
        return found

    def next_segment(self, span: Span) -> Segment | None:
        """The segment still to run that takes this span's output."""
        return _find(self.work, span.micro_batch, start=span.stop)

    def previous_segment(self, span: Span) -> Segment | None:
        """The segment still to run that waits for this span's input gradient."""
        return _find(self.work, span.micro_batch, stop=span.start)

    def activation_source(self, span: Span) -> int:
        """The rank that has, or will have, the input of a span."""
        segment = _find((*self.work, *self.kept), span.micro_batch, stop=span.start)
        assert segment is not None, f"nobody computes the input of {span}"
        return segment.rank

    def gradient_source(self, span: Span) -> int:
        """The rank that has, or will have, the gradient of a span's output."""
        segment = _find((*self.work, *self.kept), span.micro_batch, start=span.stop)
        assert segment is not None, f"nobody computes the output gradient of {span}"
        return segment.rank


def _find(
    segments: Iterable[Segment], micro_batch: int, *, start: int | None = None, stop: int | None = None
) -> Segment | None:
    for segment in segments:
        if segment.micro_batch == micro_batch and start in (None, segment.start) and stop in (None, segment.stop):
            return segment
    return None
