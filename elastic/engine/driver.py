"""Drives the worker's state machine: carries out its instructions, and passes their answers back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.worker import step
from everstep.elastic.protocol.worker_state import WorkerState, violations

Carrier = Callable[[Any], w.Event | None]


class Driver:
    """The state of one worker, which only events change."""

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        self._carriers: dict[type[Any], Carrier] = {}

    def carries(self, carriers: Mapping[type[Any], Carrier]) -> None:
        """Register how instructions are carried out: each function returns the answer, an event, or None.

        A function that waits for other ranks raises `Aborted` when the generation ends.
        """
        self._carriers.update(carriers)

    def happened(self, event: w.Event | None) -> None:
        """Pass an event to the machine, and carry out its instructions until none is left. Raises what they raise."""
        while event is not None:
            self.state, instructions = step(self.state, event)
            if found := violations(self.state):
                raise AssertionError(f"{'; '.join(found)}; what happened: {', '.join(self.state.story)}")
            event = None
            for instruction in instructions:
                event = self._carriers[type(instruction)](instruction)
