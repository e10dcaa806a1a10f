"""A worker's part in protecting versions from lost nodes: which ones, their progress, and what waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.settings import Settings
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.agreement import Kept, Share
from everstep.elastic.protocol.protecting import Protecting
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.lines import of_this_line
from everstep.resharding.placement import Placement

from .interval import Interval

PATIENCE_S = 5.0  # for a version that does not become whole; then training continues without it, with a warning
POLL_S = 0.002


class Protection:
    """Asks the keeper, measures, and waits; `Protecting` decides."""

    def __init__(self, settings: Settings, snapshots: Snapshots, membership: Membership) -> None:
        self._snapshots = snapshots
        self._membership = membership
        self._interval = Interval(settings.snapshot_every, settings.snapshot_budget)
        self._state = Protecting(max(1, settings.snapshot_every), replay=settings.protection == "replay")
        self._stepped_s = 0.0
        self.step_s = 0.0  # duration of the last step, 0 if unknown

    @property
    def nodes(self) -> bool:
        """Whether versions are protected from lost nodes in this generation."""
        return self._state.nodes

    def enter(self, generation: int, placement: Placement, *, joins: bool) -> None:
        """Enter a new generation: protection that was in progress begins again."""
        self._look()
        self._state.enter(generation, nodes=bool(placement.stripes), joins=joins)
        self._stepped_s = 0.0

    def begins(self, version: int, *, anyway: bool = False) -> bool:
        """Whether `version` is to be protected; `anyway`: the first version of a generation always is."""
        return self._state.begins(version, anyway=anyway)

    def _look(self) -> None:
        self._state.saw(*self._answers())

    def report(self, version: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version), twice, for a report: the newest versions that this node's keeper holds completely.

        In this generation, and in the last one that had any. This rank is at `version`.
        """
        (now, new), (before, old) = self._answers()
        outlives = self._snapshots.protected
        return (now, Protecting.lasting(new, version, outlives)), (before, Protecting.lasting(old, version, outlives))

    def _answers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Read the keeper's answer, and pass on the damage that it found."""
        if not self._state.nodes:
            return (0, -1), (0, -1)
        complete, before, damage = self._snapshots.protection()
        for item in damage:
            self._membership.tell(e.CorruptionFound(self._membership.worker, self._state.generation, **item))
        return complete, before

    def wait(self, step: int, on_wait: Callable[[], None]) -> None:
        """Wait, before `step` is agreed on, until earlier versions whose protection has begun are whole here.

        The wait is bounded: a keeper may be away, and training continues without it.
        """
        self._look()
        started = time.monotonic()
        while self._state.waits(step):
            on_wait()
            time.sleep(POLL_S)
            self._look()
            if time.monotonic() - started > PATIENCE_S:
                self._state.give_up()
                fields = {"step": step, "versions": list(self._state.begun)}
                self._membership.note("unprotected", fields)

    def share(self, step: int, rank: int) -> tuple[Kept, float]:
        """This rank's contribution to the agreement of a step, with the duration of the last step, 0 if unknown."""
        now = time.monotonic()
        step_s, self._stepped_s = (now - self._stepped_s if self._stepped_s else 0.0), now
        self.step_s = step_s
        return self._state.share(step, self._snapshots.protected, rank, self._interval.proposal), step_s

    def agreed(self, step: int, merged: Share, *, speaks: bool) -> dict[str, Any]:
        """The meaning of the members' merged shares: for the agreement, equal on all ranks.

        The member that `speaks` logs a new interval.
        """
        state = self._state
        terms = state.agreed(step, merged.kept, self._snapshots.protected)
        if state.nodes and not state.replay:
            if merged.timed:
                self._interval.observe(merged.step_s, protecting=step % state.every == 0)
            if speaks and terms["every"] != state.every:
                fields = {"step": step, "every": terms["every"], "why": self._interval.why}
                self._membership.note("snapshot_interval", fields)
        return terms

    def adopt(self, terms: Terms) -> None:
        """Adopt what was agreed."""
        if of_this_line(self._snapshots.lines, terms.step):
            self._snapshots.outlives(terms.protected)
        self._state.adopt(terms.every)
