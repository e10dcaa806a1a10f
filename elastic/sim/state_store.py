"""The store of a simulated coordinator, which fails for a while: a full disk, or an unreachable database.

It follows the leader (`agents/coordinator/leader.py`): a decision is neither carried out nor adopted before it is
written, and no other decision is made until then. Another coordinator that takes over meanwhile finds the decision in
the store if the write succeeded; otherwise it decides again, as nodes resend what was not acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import State

# Events that a new coordinator does not receive again: it has its own clock, and no heartbeats of lost nodes.
_NOT_SAID_AGAIN = e.Ticked | e.HeartbeatsReceived | e.CoordinatorReturned | e.NodeLost


class Decision(NamedTuple):
    """The result of an event that is not written yet."""

    event: e.Event
    after: State
    effects: Sequence[e.Effect]


@dataclass
class StateStore:
    """Accepts decisions, except while it is `away`."""

    away: bool = False
    unwritten: Decision | None = None  # waits for the store
    inbox: list[e.Event] = field(default_factory=list)  # events that wait for that decision

    def holds(self, decision: Decision) -> bool:
        """Whether a decision has to wait."""
        if self.away:
            self.unwritten = decision
        return self.away

    def back(self) -> tuple[Decision | None, list[e.Event]]:
        """The store works again under the same coordinator: the pending decision, and the events that wait."""
        decision, inbox = self.unwritten, self.inbox
        self.away, self.unwritten, self.inbox = False, None, []
        return decision, inbox

    def taken_over(self, *, written: bool) -> tuple[Decision | None, list[e.Event]]:
        """The same, for another coordinator; `written`: the decision had been written."""
        decision, inbox = self.back()
        if decision is not None and not written:
            inbox = [decision.event, *inbox]
            decision = None
        return decision, [event for event in inbox if not isinstance(event, _NOT_SAID_AGAIN)]
