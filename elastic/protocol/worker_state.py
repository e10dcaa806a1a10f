"""The state of one rank, the report that it makes of it, and its invariants."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from everstep.resharding.layout import Layout
from everstep.resharding.legs import StepWork
from everstep.resharding.plan import Plan, Report
from everstep.resharding.units import ModelSpec

TORN = -1  # the version of values that are being replaced


class WorkerPhase(enum.Enum):
    """The phases of a worker. In all but NEW, WAITING and READY one instruction is being carried out."""

    NEW = "new"  # has not begun
    WAITING = "waiting"  # for a plan
    LINKING = "linking"  # to the members of the plan's generation
    PLACING = "placing"  # asks another rank for the position of the job
    RESTORING = "restoring"  # fetches the shards that it has to own, and lacks
    REFRESHING = "refreshing"  # owners send values to the ranks that lack them
    READY = "ready"  # at a version, with its step to compute; or past the last step
    COMPUTING = "computing"  # runs its legs of the step's micro-batches
    REDUCING = "reducing"  # sums the gradients of the shards it owns
    AGREEING = "agreeing"  # waits for its snapshots, and agrees on the step with all members
    PUBLISHING = "publishing"  # sends the new values of its shards, and receives those of others
    LEAVING = "leaving"  # hands over, and waits to be released
    CONCLUDING = "concluding"  # waits for its version to be protected: the last one, or at the end of an epoch


@dataclass(frozen=True, kw_only=True)
class Holding:
    """The state that a worker holds, and its version."""

    owned: frozenset[int] = frozenset()  # shards that are complete at `owned_version`
    owned_version: int = 0
    values_version: int = 0  # of every value of `layers`; TORN while they are replaced
    layers: tuple[int, int] = (0, 0)
    pristine: bool = True  # every value is still the one made from the seed


@dataclass(frozen=True, kw_only=True)
class Entering:
    """What is known so far of the generation that is being entered."""

    plan: Plan
    version: int = 0
    agreement: str = ""
    fresh: bool = False  # this rank has no state of the job yet
    back: bool = False  # this rank goes back to an older version, and uses nothing of what it holds
    current: bool = False  # every value here is of `version` already


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """The state of one worker. `agreed` is the last step whose agreement it passed, -1 if none, with the agreement."""

    rank: int
    spec: ModelSpec
    steps: int
    phase: WorkerPhase = WorkerPhase.NEW
    fresh: bool = True  # has not carried out a plan yet
    version: int = 0
    holding: Holding = Holding()
    agreed: int = -1
    agreement: str = ""
    layout: Layout | None = None
    entering: Entering | None = None
    switch: Plan | None = None  # a join or departure that all members enter before the next step
    prefetching: int = 0  # the generation whose shards this rank copies ahead; 0: none
    leave_at: int | None = None  # the version at which the user's code has left the loop
    late: int = 0  # number of events that arrived too late to matter
    story: tuple[str, ...] = ()

    def ended(self) -> bool:
        """Whether all steps of the job are committed."""
        return self.version >= (self.steps if self.leave_at is None else self.leave_at)


def new_worker(rank: int, spec: ModelSpec, steps: int) -> WorkerState:
    """A worker whose model has just been built from the seed: it holds version 0 of every value."""
    return WorkerState(rank=rank, spec=spec, steps=steps, holding=Holding(layers=(0, spec.layers)))


def report(
    state: WorkerState,
    work: StepWork | None,
    *,
    protected: tuple[int, int],
    protected_before: tuple[int, int],
    outlives: int,
    calls: int = 0,
) -> Report:
    """What this worker holds, for the coordinator. `work`: the step that was in progress."""
    if state.fresh or state.layout is None or work is None:
        return Report(rank=state.rank, generation=0, fresh=True, calls=calls)
    holding = state.holding
    valid = holding.values_version == work.step  # gradients of values that have not changed
    return Report(
        rank=state.rank,
        generation=state.layout.generation,
        owned_version=holding.owned_version,
        owned=tuple(sorted(holding.owned)),
        values_version=holding.values_version,
        layers=holding.layers,
        agreed=state.agreed,
        agreement=state.agreement,
        protected=protected,
        protected_before=protected_before,
        outlives=outlives,
        held=tuple(sorted(work.held)) if valid else (),
        started=tuple(sorted(work.running)) if valid else (),
        todo=tuple(work.todo) if valid else (),
        calls=calls,
    )


def violations(state: WorkerState) -> list[str]:
    """The invariants that a state violates, in words; cheap enough for every event."""
    found = []
    holding, version = state.holding, state.version
    if state.agreed not in (version - 1, version):
        found.append(f"the last agreed step is {state.agreed} at version {version}")
    if holding.owned_version not in (version, version + 1) and state.entering is None and not state.fresh:
        found.append(f"the owned shards are of version {holding.owned_version} at version {version}")
    if state.phase is WorkerPhase.READY:
        if state.layout is None:
            found.append("there is no layout to train in")
        if holding.values_version != version and holding.values_version != TORN:
            found.append(f"the values are of version {holding.values_version} at version {version}")
        if holding.owned_version != version:
            found.append(f"the owned shards are of version {holding.owned_version} at version {version}")
    if (state.entering is None) == (state.phase in _ENTERING):
        found.append(f"a worker that is {state.phase.value} {'has no' if state.entering is None else 'has a'} plan")
    return found


_ENTERING = (WorkerPhase.LINKING, WorkerPhase.PLACING, WorkerPhase.RESTORING, WorkerPhase.REFRESHING)
INVARIANTS = {
    "agreed": "The last agreed step is the one before the version, or, until it is committed, the version's own.",
    "owned": "Owned shards are of the version, or one ahead between the optimizer's run and the commit.",
    "ready": "A ready worker has a layout, and holds its owned shards and all values it reads at its version.",
    "plan": "A plan is kept exactly while it is being carried out.",
}
