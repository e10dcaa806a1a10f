"""One rank's state of its current step: its work, and the tensors that belong to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from everstep.resharding.legs import StepWork
from everstep.resharding.work import AssignedLeg, Leg, Work

from .canonical import TreeSum


@dataclass
class Graph:
    """A forward that waits for its backward."""

    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    statistics: dict[int, list[Tensor]]  # layer -> batch-norm statistics after this micro-batch alone


@dataclass
class StepState(StepWork):
    """Step `step` as one rank sees it: its work, and its tensors."""

    leaves: int = 0  # of a sum: the micro-batches of the step
    graphs: dict[Leg, Graph] = field(default_factory=dict)  # of running legs
    sums: dict[int, TreeSum] = field(default_factory=dict)
    outputs: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # (boundary, micro-batch)
    input_gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)  # micro-batch -> number, where they are counted
    touched: set[int] = field(default_factory=set)  # parameters of which a micro-batch here had a gradient

    @classmethod
    def begin(cls, step: int, rank: int, work: Work, leaves: int = 0) -> Self:
        """See `StepWork.begin`."""
        return cls(step, rank, work, list(work.spans_of(rank)), leaves=leaves)

    def resume(self, work: Work, started: Iterable[AssignedLeg]) -> None:
        """Continue with the work of a plan; results that other ranks compute now are dropped."""
        super().resume(work, started)
        self.graphs = {leg: graph for leg, graph in self.graphs.items() if leg in self.running}
        held = {leg.micro_batch for leg in self.held}
        self.losses = {m: loss for m, loss in self.losses.items() if m in held}
        self.tokens = {m: count for m, count in self.tokens.items() if m in held}

    def hold(self, span: Leg, layer: int, gradients: list[Tensor], largest: Collection[int] = ()) -> None:
        """Add one layer's gradient of a micro-batch to the canonical sum; `largest` as for TreeSum."""
        if layer not in self.sums:
            self.sums[layer] = TreeSum(self.leaves, largest)
        self.sums[layer].add(span.micro_batch, gradients)

    def summed(self, parameters: Sequence[Sequence[int]]) -> set[int]:
        """The parameters of the layers (layer -> its parameters) of whose gradients this rank holds a partial sum."""
        return {index for layer in self.sums for index in parameters[layer]}
