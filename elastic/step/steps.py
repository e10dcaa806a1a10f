"""One rank's state of its current step: its work, and the tensors that belong to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from everstep.resharding.legs import StepWork
from everstep.resharding.work import AssignedLeg, Leg, Work

from .canonical import TreeNode, TreeSum
from .layer_times import LayerSample
from .order import StepSize

_NO_SAMPLES = StepSize(0, 1)


@dataclass
class Graph:
    """A forward that waits for its backward."""

    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    statistics: dict[int, list[Tensor]]  # layer -> batch-norm statistics after this micro-batch alone
    sample: LayerSample | None = None  # times its layers


@dataclass
class StepState(StepWork):
    """Step `step` as one rank sees it: its work, and its tensors.

    A micro-batch without samples has no leaf in the sums: there is nothing to do where it is assigned, nor held there.
    """

    size: StepSize = _NO_SAMPLES
    graphs: dict[Leg, Graph] = field(default_factory=dict)  # of running legs
    sums: dict[int, TreeSum] = field(default_factory=dict)
    outputs: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # (boundary, micro-batch)
    input_gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)  # micro-batch -> number, where they are counted
    touched: set[int] = field(default_factory=set)  # parameters of which a micro-batch here had a gradient

    @classmethod
    def begin(cls, step: int, rank: int, work: Work, size: StepSize = _NO_SAMPLES) -> Self:
        """See `StepWork.begin`."""
        state = cls(step, rank, work, list(work.spans_of(rank)), size=size)
        state._leave_out_empty()
        return state

    @property
    def leaves(self) -> int:
        """Of a sum: the micro-batches that have samples."""
        return self.size.micro_batches

    def resume(self, work: Work, started: Iterable[AssignedLeg]) -> None:
        """Continue with the work of a plan; results that other ranks compute now are dropped."""
        super().resume(work, started)
        self._leave_out_empty()
        self.graphs = {leg: graph for leg, graph in self.graphs.items() if leg in self.running}
        held = {leg.micro_batch for leg in self.held}
        self.losses = {m: loss for m, loss in self.losses.items() if m in held}
        self.tokens = {m: count for m, count in self.tokens.items() if m in held}

    def _leave_out_empty(self) -> None:
        self.todo = [leg for leg in self.todo if leg.micro_batch < self.leaves]

    def hold(self, span: Leg, layer: int, gradients: list[Tensor], largest: Collection[int] = ()) -> None:
        """Add one layer's gradient of a micro-batch to the canonical sum; `largest` as for TreeSum."""
        if layer not in self.sums:
            self.sums[layer] = TreeSum(self.leaves, largest)
        self.sums[layer].add(span.micro_batch, gradients)

    def partial(self, layer: int) -> dict[TreeNode, list[Tensor]]:
        """The partial sums of a layer; none where all micro-batches of this rank are empty."""
        return self.sums[layer].nodes if layer in self.sums else {}

    def partial_with(
        self, layer: int, micro_batch: int, leaf: Tensor, at: int, start: int, stop: int
    ) -> dict[TreeNode, Tensor]:
        """What `partial` will have of some elements once a micro-batch is held. See `TreeSum.with_leaf`."""
        return self.sums.get(layer, TreeSum(self.leaves)).with_leaf(micro_batch, leaf, at, start, stop)

    def summed(self, parameters: Sequence[Sequence[int]]) -> set[int]:
        """The parameters of the layers (layer -> its parameters) of whose gradients this rank holds a partial sum."""
        return {index for layer in self.sums for index in parameters[layer]}
