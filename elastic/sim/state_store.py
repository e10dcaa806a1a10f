"""The store of a simulated coordinator, which fails for a while: a full disk, or a database that is away.

What the leader does then (`agents/coordinator/leader.py`) is done here: a decision is neither carried out nor believed
before it is written, and nothing else is decided until then. Another coordinator that takes over meanwhile has the
decision if its write had come through, and else decides again, as nodes say again what was not acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import State

# What another coordinator does not hear again: it has its own clock, and misses the beats of who is gone.
_NOT_SAID_AGAIN = e.Ticked | e.HeartbeatsReceived | e.CoordinatorReturned | e.NodeLost


class Decision(NamedTuple):
    """What followed from an event, and is not written yet."""

    event: e.Event
    after: State
    effects: Sequence[e.Effect]


@dataclass
class StateStore:
    """Takes decisions, but for the time that it is `away`."""

    away: bool = False
    unwritten: Decision | None = None  # waits for the store
    inbox: list[e.Event] = field(default_factory=list)  # and these for what it decides

    def holds(self, decision: Decision) -> bool:
        """Whether a decision has to wait."""
        if self.away:
            self.unwritten = decision
        return self.away

    def back(self) -> tuple[Decision | None, list[e.Event]]:
        """The store takes what waits, and the coordinator is the same: what it decided, and what it has heard."""
        decision, inbox = self.unwritten, self.inbox
        self.away, self.unwritten, self.inbox = False, None, []
        return decision, inbox

    def taken_over(self, *, written: bool) -> tuple[Decision | None, list[e.Event]]:
        """The same, for another coordinator; `written`: the decision had come through."""
        decision, inbox = self.back()
        if decision is not None and not written:
            inbox = [decision.event, *inbox]
            decision = None
        return decision, [event for event in inbox if not isinstance(event, _NOT_SAID_AGAIN)]
