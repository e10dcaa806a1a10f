"""Drives the worker's state machine: carries out its instructions, and gives it what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.worker import step
from everstep.elastic.protocol.worker_state import WorkerState, violations

Carrier = Callable[[Any], w.Event | None]


class Driver:
    """One worker's state, which only events change."""

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        self._carriers: dict[type[Any], Carrier] = {}

    def carries(self, carriers: Mapping[type[Any], Carrier]) -> None:
        """Say how instructions are carried out: each returns the event that answers it, or None if it has no answer.

        A carrier that waits for other ranks raises `Aborted` when the generation ends.
        """
        self._carriers.update(carriers)

    def happened(self, event: w.Event | None) -> None:
        """Something happened: do what follows from it, until nothing does. Passes on what carriers raise."""
        while event is not None:
            self.state, instructions = step(self.state, event)
            if found := violations(self.state):
                raise AssertionError(f"{'; '.join(found)}; what happened: {', '.join(self.state.story)}")
            event = None
            for instruction in instructions:
                event = self._carriers[type(instruction)](instruction)
