"""A worker's part in making versions outlive nodes: which ones, how far that has come, and what waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.settings import Settings
from everstep.resharding.placement import Placement

from .interval import Interval

PATIENCE_S = 5.0  # for a version that does not get whole; then training goes on without, and says so
POLL_S = 0.002


class Protection:
    """When versions are protected, and how far that has come, as one rank sees it.

    A version is *whole here* when this node's keeper has it and the parity it holds for others; it *outlives nodes*
    (`snapshots.protected`) when all members know that it is whole everywhere, which the agreement of a step tells.
    """

    def __init__(self, settings: Settings, snapshots: Snapshots, membership: Membership) -> None:
        self._snapshots = snapshots
        self._membership = membership
        self._interval = Interval(settings.snapshot_every, settings.snapshot_budget)
        self._generation = 0
        self._stripes = False  # whether there are other nodes to protect from
        self._replay = settings.protection == "replay"  # then backups do it, before each agreement
        self._begun: list[tuple[int, float]] = []  # versions that are being protected, and since when
        self._whole = -1
        self._before: int | None = -1  # what was, in the last generation, and still counts; None: we were not there
        self._given_up = False
        self._stepped_s = 0.0
        self.step_s = 0.0  # how long the last step took, 0 if that is not known
        self._every = max(1, settings.snapshot_every)
        self._told: tuple[int, bool] = (0, False)

    @property
    def nodes(self) -> bool:
        """Whether versions are protected from lost nodes in this generation."""
        return self._stripes

    def enter(self, generation: int, placement: Placement, *, joins: bool) -> None:
        """A new generation: what was under way begins again.

        What was whole here is still good, should all who say so go along (`joins`).
        """
        self._before = (self.look() if self._generation else None) if joins else -1
        self._generation = generation
        self._stripes = bool(placement.stripes)
        self._begun.clear()
        self._whole = -1
        self._given_up = False
        self._stepped_s = 0.0

    def begins(self, version: int, *, anyway: bool = False) -> bool:
        """Whether `version` is one that is to outlive nodes; `anyway`: the first one of a generation is."""
        if self._replay or not self._stripes or not (anyway or version % self._every == 0):
            return False
        if all(version != begun for begun, _ in self._begun):
            self._begun.append((version, time.monotonic()))
        return True

    def look(self) -> int:
        """The newest version that is whole here, in this generation."""
        if not self._stripes:
            return -1
        for generation, version in self._answers():
            if generation == self._generation and version > self._whole:
                self._whole, self._given_up = version, False
                self._begun = [(begun, at) for begun, at in self._begun if begun > version]
        return self._whole

    def report(self, version: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version), twice, for a report: what this node's keeper can answer for.

        In this generation, and in the last one that had any. This rank is at `version`.
        """
        (now, new), (before, old) = self._answers()
        return (now, self._lasting(new, version)), (before, self._lasting(old, version))

    def _lasting(self, whole: int, version: int) -> int:
        """`whole`, unless workers that are at `version` may have written over it: then it is of no use. -1 if so."""
        return whole if whole >= version - 1 or whole <= self._snapshots.protected else -1

    def _answers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the keeper says. Passes on what damage it found."""
        if not self._stripes:
            return (0, -1), (0, -1)
        complete, before, damage = self._snapshots.protection()
        for item in damage:
            self._membership.tell("corruption", generation=self._generation, **item)
        return complete, before

    def wait(self, step: int, on_wait: Callable[[], None]) -> None:
        """Wait, before `step` is agreed on, until the versions before it that are being protected are whole here.

        So a version that outlives nodes is never given up for one that does not yet. Not for ever: a keeper may be
        away, and training goes on without it.
        """
        self.look()
        started = time.monotonic()
        while not self._given_up and any(begun < max(1, step) for begun, _ in self._begun):
            on_wait()
            time.sleep(POLL_S)
            self.look()
            if time.monotonic() - started > PATIENCE_S:
                self._given_up = True
                versions = [begun for begun, _ in self._begun]
                self._membership.tell("noted", what="unprotected", fields={"step": step, "versions": versions})
        self._snapshots.waited_s += time.monotonic() - started

    def share(self, step: int) -> dict[str, Any]:
        """What this rank adds to the agreement of a step."""
        now = time.monotonic()
        step_s, self._stepped_s = (now - self._stepped_s if self._stepped_s else 0.0), now
        self.step_s = step_s
        whole = self._lasting(self._whole, step)
        before = None if self._before is None else self._lasting(self._before, step)
        return {"whole": whole, "before": before, "step_s": step_s, "every": self._interval.proposal}

    def agreed(self, step: int, shares: list[dict[str, Any]], *, speaks: bool) -> dict[str, int]:
        """What the members' shares (lowest rank first) mean: for the agreement, equal on all.

        The member that `speaks` logs a new interval.
        """
        if not self._stripes:
            return {"protected": self._snapshots.protected, "every": self._every}
        if self._replay:
            return {"protected": step, "every": self._every}
        whole = min(share["whole"] for share in shares)
        before = min((share["before"] for share in shares if share["before"] is not None), default=-1)
        step_s = max(share["step_s"] for share in shares)
        if all(share["step_s"] for share in shares):
            self._interval.observe(step_s, protecting=step % self._every == 0)
        every = shares[0]["every"]
        if speaks and every != self._every:
            fields = {"step": step, "every": every, "why": self._interval.why}
            self._membership.tell("noted", what="snapshot_interval", fields=fields)
        return {"protected": max(self._snapshots.protected, whole, before), "every": every}

    def adopt(self, terms: dict[str, Any]) -> None:
        """Take over what was agreed."""
        self._snapshots.protected = max(self._snapshots.protected, terms["protected"])
        self._every = terms["every"]
