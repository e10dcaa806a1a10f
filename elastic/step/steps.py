"""What one rank has of the step it is in: work to do, work done, gradients held. Recovery edits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from everstep.resharding.work import Segment, Span, Work

from .canonical import TreeSum


@dataclass
class Graph:
    """A forward that waits for its backward."""

    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    statistics: dict[int, list[Tensor]]  # layer -> batch-norm statistics after this micro-batch alone


@dataclass
class StepState:
    """Step `step` as this rank sees it. `work` is that of all ranks, the rest is its own."""

    step: int
    rank: int
    leaves: int
    work: Work
    todo: list[Span] = field(default_factory=list)
    started: dict[Span, Graph] = field(default_factory=dict)
    held: set[Span] = field(default_factory=set)
    sums: dict[int, TreeSum] = field(default_factory=dict)
    outputs: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # (boundary, micro-batch)
    input_gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)  # parameters of which some micro-batch here had a gradient

    @classmethod
    def begin(cls, step: int, rank: int, leaves: int, work: Work) -> StepState:
        """A step of which nothing is done here."""
        return cls(step, rank, leaves, work, todo=list(work.spans_of(rank)))

    def resume(self, work: Work, started: Sequence[Segment]) -> None:
        """Go on with the work of a plan: keep what is held and the forwards that are still ours."""
        self.work = work
        ours = set(work.spans_of(self.rank))
        theirs = {s.span for s in started if s.rank == self.rank}
        self.started = {span: graph for span, graph in self.started.items() if span in ours and span in theirs}
        self.todo = sorted(ours - set(self.started))
        held = {span.micro_batch for span in self.held}
        self.losses = {m: loss for m, loss in self.losses.items() if m in held}

    def hold(self, span: Span, layer: int, gradients: list[Tensor]) -> None:
        """Add one layer's gradient of a micro-batch to the canonical sum."""
        self.sums.setdefault(layer, TreeSum(self.leaves)).add(span.micro_batch, gradients)

    def idle(self, parameters: Sequence[Sequence[int]]) -> list[int]:
        """Which parameters of the layers summed here (layer -> its parameters) had no gradient here."""
        return sorted({index for layer in self.sums for index in parameters[layer]} - self.touched)
