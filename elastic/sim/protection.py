"""A simulated worker's part in making versions outlive nodes: the contract of `elastic.protection.Protection`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from everstep.resharding.placement import Placement

from .snapshots import Snapshots
from .world import Steps, World

PATIENCE_S = 5.0
POLL_S = 0.003


class Protection:
    """When versions are protected, and how far that has come. `interval` 0: it changes all the time."""

    def __init__(self, world: World, snapshots: Snapshots, interval: int) -> None:
        self._world = world
        self._snapshots = snapshots
        self._interval = interval
        self._generation = 0
        self._stripes = False
        self._begun: list[int] = []
        self._whole = -1
        self._before: int | None = -1  # what was, in the last generation, and still counts; None: we were not there
        self._given_up = False
        self._every = max(1, interval)

    @property
    def nodes(self) -> bool:
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

    def begins(self, version: int, *, anyway: bool = False) -> bool:
        """Whether `version` is one that is to outlive nodes."""
        if not self._stripes or not (anyway or version % self._every == 0):
            return False
        if version not in self._begun:
            self._begun.append(version)
        return True

    def look(self) -> int:
        """The newest version that is whole here, in this generation."""
        for generation, version in self._answers():
            if generation == self._generation and version > self._whole:
                self._whole, self._given_up = version, False
                self._begun = [begun for begun in self._begun if begun > version]
        return self._whole

    def report(self, version: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version), in this generation and the last one that had any, for a report."""
        (now, new), (before, old) = self._answers()
        return (now, self._lasting(new, version)), (before, self._lasting(old, version))

    def _lasting(self, whole: int, version: int) -> int:
        """`whole`, unless workers that are at `version` may have written over it: then it is of no use. -1 if so."""
        return whole if whole >= version - 1 or whole <= self._snapshots.protected else -1

    def _answers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self._snapshots.protection() if self._stripes else ((0, -1), (0, -1))

    def wait(self, step: int, on_wait: Callable[[], None]) -> Steps[None]:
        """Wait, before `step` is agreed on, until the versions before it that are being protected are whole here."""
        self.look()
        started = self._world.now
        while not self._given_up and any(begun < max(1, step) for begun in self._begun):
            on_wait()
            yield POLL_S
            self.look()
            if self._world.now - started > PATIENCE_S:
                self._given_up = True

    def share(self, step: int) -> dict[str, Any]:
        """What this rank adds to the agreement of a step."""
        every = self._interval or self._world.random.randint(1, 4)
        whole = self._lasting(self._whole, step)
        before = None if self._before is None else self._lasting(self._before, step)
        return {"whole": whole, "before": before, "every": every}

    def agreed(self, shares: Sequence[dict[str, Any]]) -> dict[str, int]:
        """What the members' shares (lowest rank first) mean: for the agreement, equal on all."""
        if not self._stripes:
            return {"protected": self._snapshots.protected, "every": self._every}
        whole = min(share["whole"] for share in shares)
        before = min((share["before"] for share in shares if share["before"] is not None), default=-1)
        return {"protected": max(self._snapshots.protected, whole, before), "every": shares[0]["every"]}

    def adopt(self, agreement: str) -> None:
        """Take over what was agreed."""
        terms: dict[str, Any] = json.loads(agreement)
        self._snapshots.protected = max(self._snapshots.protected, terms["protected"])
        self._every = terms["every"]
