"""A script's request that training ends, until all ranks have agreed on it."""

from __future__ import annotations

from everstep.elastic.contract.membership import Membership
from everstep.elastic.protocol.terms import Terms

WHY_CHARACTERS = 200  # of the reason; it travels in the agreement of a step, whose size is limited


class StopRequest:
    """What this rank's script has asked for. It counts from the step on that was under way at the first request.

    So a step that is computed again after a rollback does not end training earlier than it did the first time.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._step = 0
        self._why = ""

    def ask(self, version: int, why: str) -> None:
        """The script asks while the step of `version` is under way."""
        if not self._why:
            self._step, self._why = version, why[:WHY_CHARACTERS]

    def at(self, step: int) -> str:
        """The reason for which training is to end after this step; empty if it is not."""
        return self._why if step >= self._step else ""

    def committed(self, terms: Terms, *, first: bool) -> None:
        """A step is committed: the first rank records it in the event log if it is the last one."""
        if terms.end and first:
            self._membership.note("script_stopped", {"step": terms.step, "why": terms.end})

    @staticmethod
    def agreed(agreement: str) -> str:
        """The reason for which training ends with the version that this agreement made; empty if it continues."""
        return Terms.of(agreement).end if agreement else ""
