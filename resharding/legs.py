"""One step's work on one rank: which legs are still to run, are running and are done, and which operation is next.

A leg is a micro-batch's way through consecutive layers. The order of legs is 1F1B (Narayanan et al., 2019): a backward
if its gradient has arrived, otherwise the next forward while fewer than `depth` micro-batches are in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

from .layout import Layout
from .work import AssignedLeg, Leg, Work


class Need(NamedTuple):
    """The input that a leg waits for: the activation or the gradient of a micro-batch at a boundary, from a rank."""

    kind: Literal["activation", "gradient"]
    source: int
    micro_batch: int
    boundary: int


class Forward(NamedTuple):
    """Run a leg's forward; its input is the one it needed, or a sample when the leg begins at layer 0."""

    leg: Leg


class Backward(NamedTuple):
    """Run a leg's backward with the gradient that has arrived."""

    leg: Leg


class Await(NamedTuple):
    """Wait for any of these inputs."""

    needs: dict[Need, Forward | Backward]


Action = Forward | Backward | Await


class Resend(NamedTuple):
    """A result that a rank has already computed and another rank needs after a change of the membership."""

    kind: Literal["activation", "gradient"]
    leg: Leg
    to: int


def in_flight(layout: Layout, rank: int) -> int:
    """How many micro-batches a rank has in flight at most: one more than 1F1B needs, which hides links' latency.

    A rank of a stage with fewer ranks than another works for several of that one's at a time.
    """
    own = layout.stage_of(rank)
    following = sum(stage.start >= own.start for stage in layout.stages)
    widest = max(len(stage.blocks) for stage in layout.stages)
    return 1 + math.ceil(following * widest / len(own.blocks))


@dataclass
class StepWork:
    """Step `step` as one rank sees it. `work` is that of all ranks, the other fields are the rank's own."""

    step: int
    rank: int
    work: Work
    todo: list[Leg] = field(default_factory=list)
    running: set[Leg] = field(default_factory=set)  # forward done
    held: set[Leg] = field(default_factory=set)  # gradient held

    @classmethod
    def begin(cls, step: int, rank: int, work: Work) -> Self:
        """A step of which this rank has computed nothing."""
        return cls(step, rank, work, list(work.spans_of(rank)))

    def resume(self, work: Work, started: Iterable[AssignedLeg]) -> None:
        """Adopt the work of a plan: keep the gradients that are held, and the forwards that are still this rank's."""
        self.work = work
        ours = set(work.spans_of(self.rank))
        still = {segment.span for segment in started if segment.rank == self.rank}
        self.running &= ours & still
        self.todo = sorted(ours - self.running, key=work.turn)

    @property
    def done(self) -> bool:
        """Whether this rank's legs are all finished."""
        return not self.todo and not self.running

    # ------------------------------------------------------------ the next operation

    def gradients(self) -> dict[Need, Forward | Backward]:
        """The gradients that running legs wait for."""
        return {
            Need("gradient", self.work.gradient_source(leg), leg.micro_batch, leg.stop): Backward(leg)
            for leg in sorted(self.running, key=self.work.turn)
        }

    def next(self, depth: int, arrived: Need | None) -> Action:
        """The next operation; `arrived`: one of `gradients` that has arrived already."""
        gradients = self.gradients()
        if arrived is not None:
            return gradients[arrived]
        leg = self._next_forward(depth)
        if leg is None:
            return Await(gradients)
        if leg.start == 0:
            return Forward(leg)
        wanted = Need("activation", self.work.activation_source(leg), leg.micro_batch, leg.start)
        return Await({wanted: Forward(leg), **gradients})

    def _next_forward(self, depth: int) -> Leg | None:
        if not self.todo:
            return None
        leg = self.todo[0]
        first = min(map(self.work.turn, (leg, *self.running)))
        return leg if len(self.running) < depth or self.work.turn(leg) == first else None

    def forwarded(self, leg: Leg) -> None:
        """The forward of a leg is done."""
        self.todo.remove(leg)
        self.running.add(leg)

    def finished(self, leg: Leg) -> None:
        """The gradient of a leg is held. A leg that the user's own loop computes was never in `running`."""
        if leg in self.running:
            self.running.remove(leg)
        else:
            self.todo.remove(leg)
        self.held.add(leg)

    # ------------------------------------------------------------ what ranks need from each other

    def resends(self, started: Iterable[AssignedLeg]) -> list[Resend]:
        """What to send again after a change of the membership. `started`: segments whose forward is done elsewhere."""
        elsewhere = {segment.span for segment in started}
        found = []
        for leg in (*sorted(self.held), *sorted(self.running)):
            following = self.work.next_segment(leg)
            if following is not None and following.span not in elsewhere:
                found.append(Resend("activation", leg, following.rank))
        for leg in sorted(self.held):
            before = self.work.previous_segment(leg)
            if before is not None:
                found.append(Resend("gradient", leg, before.rank))
        return found
