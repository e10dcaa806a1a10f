"""A simulated worker's side of the control plane: the contract of the agent's channel, without a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everstep.elastic.protocol import events as e
from everstep.resharding.plan import Report

from .links import Aborted
from .world import Steps


class JobEnded(Exception):
    """The job is over."""


class Control:
    """The coordinator's messages to one worker, and the worker's answers."""

    def __init__(self, worker: e.WorkerId, tell: Callable[[Any], None], on_abort: Callable[[], None]) -> None:
        self.worker = worker
        self.tell = tell
        self._on_abort = on_abort
        self._aborted = 0
        self._reported = 0
        self._orders: e.CarryOut | None = None
        self._proposal: e.CarryOut | None = None
        self._past_last = False
        self._begun = -1
        self._left_at: int | None = None  # another rank left the loop at this version
        self.conclusion: e.Conclude | None = None  # no rank trains beyond its version
        self.trained = False
        self.ended = False

    def heard(self, effect: e.Effect) -> None:
        """A message from the coordinator arrives."""
        if isinstance(effect, e.AbortGeneration):
            if effect.generation > self._aborted:
                self._aborted = effect.generation
                self._proposal = None
                self.conclusion = None
                self._on_abort()
        elif isinstance(effect, e.CarryOut):
            self._take(effect)
        elif isinstance(effect, e.TellLeft):
            self._left_at = effect.version
            self._tell_if_past()
        elif isinstance(effect, e.Conclude):
            self.conclusion = effect
            if self._begun >= effect.version:  # else it still has the step before that to complete
                self._on_abort()
        elif isinstance(effect, e.EndTraining):
            self.trained = True
        elif isinstance(effect, e.EndJob):
            self.ended = True
            self._on_abort()

    def begun(self, step: int) -> None:
        """This worker needs other ranks for a step. Raises Aborted if no rank trains that far."""
        self._begun = step
        self._tell_if_past()
        if self.conclusion is not None and step >= self.conclusion.version:
            raise Aborted

    def _tell_if_past(self) -> None:
        if self._left_at is not None and self._begun >= self._left_at:
            self.tell(e.WorkerWentOn(self.worker, self._begun))

    def _take(self, orders: e.CarryOut) -> None:
        plan = orders.plan
        if plan.generation < self._aborted:
            return
        if plan.version is None and self.worker.rank not in plan.fresh:
            if self._past_last:
                self.tell(e.WorkerIdled(self.worker, plan.generation))
            else:
                self._proposal = orders
        else:
            self._orders = orders

    def orders(self) -> Steps[e.CarryOut]:
        """Wait for a plan. Raises Aborted if a report is due first."""
        while True:
            if self.ended:
                raise JobEnded
            if self._aborted > self._reported:
                raise Aborted
            if self._orders is not None and self._orders.plan.generation >= self._aborted:
                orders, self._orders = self._orders, None
                return orders
            yield None

    def report(self, make: Callable[[], Report]) -> None:
        """Answer the newest abort."""
        if self.ended:
            raise JobEnded
        self._reported = self._aborted
        self.tell(e.WorkerReported(self.worker, self._aborted, make()))

    def superseded(self, generation: int) -> bool:
        return self.ended or self._aborted > generation

    def proposed(self, last: bool) -> e.CarryOut | None:
        """The join plan that is pending; `last`: no further step will ask."""
        self._past_last = self._past_last or last
        proposal = self._proposal
        if last:
            self._proposal = None
        return proposal

    def wait_for_end(self) -> Steps[bool]:
        """True when training is over; False when a report or the last checkpoint is due. Raises JobEnded."""
        while not self.trained and self.conclusion is None and self._aborted <= self._reported:
            if self.ended:
                raise JobEnded
            yield None
        return self.trained
