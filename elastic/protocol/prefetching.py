"""Prefetching: future owners of shards copy them during training, and keep the copies at the version of the job.

A rebalance is not entered at once. Each rank that is to own a shard copies its record from a keeper, at whatever
version the job is, and then the reduced gradient of every step, with which it runs the optimizer on its copy. No other
rank does anything for it. When no rank waits for a copy any more, the members switch: what an owner still lacks then is
the gradient of the last step.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from everstep.resharding.moves import SourceKind, received
from everstep.resharding.plan import Plan

PATIENCE_S = 30.0  # how long a rank waits for its copies: what it lacks then is read at the switch
AT_ONCE = 16  # gradients that are read together
NONE = -1  # the version of a copy that is not there


def prefetches(plan: Plan) -> bool:
    """Whether shards are copied before the members enter this plan."""
    return plan.version is None and any(SourceKind.PREFETCHED in move.sources for move in plan.gained)


class Wanted(NamedTuple):
    """Read these shards' records at `version`; or, `gradient`, the gradients of the step that leads on from it."""

    shards: tuple[int, ...]
    version: int
    gradient: bool


class Copies:
    """The copies of one rank: which version each shard has that the rank is to own."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.generation = plan.generation
        self.versions = {move.shard: NONE for move in received(plan.gained, rank)}

    def wanted(self, version: int) -> Wanted | None:
        """What to read next, on a rank that is at `version`; None if every copy is there, too.

        Gradients come first, oldest first: keepers have those of two steps.
        """
        there = [at for at in self.versions.values() if at != NONE]
        oldest = min(there, default=version)
        if oldest < version:
            behind = (shard for shard, at in self.versions.items() if at == oldest)
            return Wanted(tuple(islice(behind, AT_ONCE)), oldest, gradient=True)
        missing = next((shard for shard, at in self.versions.items() if at == NONE), None)
        return None if missing is None else Wanted((missing,), version, gradient=False)

    def read(self, wanted: Wanted, shard: int) -> None:
        """One of the wanted shards was read, and its copy brought up to date with it."""
        self.versions[shard] = wanted.version + wanted.gradient

    def lacked(self, wanted: Wanted, version: int) -> None:
        """What was not read of the wanted is nowhere, with the rank at `version`.

        Copies whose gradient is gone are dropped; that of the step before is there, unless its keeper is away for a
        moment. A record that is missing is asked for again after the others.
        """
        for shard in wanted.shards:
            if wanted.gradient and self.versions[shard] == wanted.version < version - 1:
                self.versions[shard] = NONE
            elif not wanted.gradient and self.versions[shard] == NONE:
                self.versions[shard] = self.versions.pop(shard)

    def current(self, version: int) -> bool:
        """Whether every copy is at `version`."""
        return all(at == version for at in self.versions.values())


class Copying(NamedTuple):
    """How far a rank, at `version`, is with the copies for the plan of `generation`; None: it makes none."""

    generation: int
    copies: Copies | None
    version: int
    late: bool  # it has waited for PATIENCE_S

    def waits(self, plan: Plan | None, rank: int) -> bool:
        """Whether the rank is not ready to enter a plan: copies are missing, and the time for them is not over."""
        if plan is None or not prefetches(plan):
            return False
        if plan.generation != self.generation:
            return bool(Copies(plan, rank).versions)
        return self.copies is not None and not self.late and not self.copies.current(self.version)
