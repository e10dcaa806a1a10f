"""The worker as a state machine: what one rank holds, at which version, and what it does next.

`step(state, event)` returns the next state and the instructions to carry out, in order. It decides and does nothing: it
knows no tensor, clock, socket or thread. An executor carries the instructions out: the engine on tensors, the simulator
on hashes. The last instruction of a list may have to wait for other ranks; its answer is the next event. When the
generation ends meanwhile, the executor drops the rest of the list and says `Interrupted`; the state is then that of the
last event, so nothing that was not completed is believed.

Versions count committed steps: version v is the state before step v.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from everstep.resharding.layout import Layout
from everstep.resharding.plan import Plan, Report
from everstep.resharding.units import ModelSpec
from everstep.resharding.work import Work

from .legs import StepWork

TORN = -1  # the version of values that are being replaced
STORY = 16  # events that a state remembers


class WorkerPhase(enum.Enum):
    """What a worker is at. In all but NEW, WAITING and READY one instruction is being carried out."""

    NEW = "new"  # has not begun
    WAITING = "waiting"  # for a plan
    LINKING = "linking"  # to the members of the plan's generation
    PLACING = "placing"  # asks another rank where the job is
    RESTORING = "restoring"  # fetches the shards it gains
    REFRESHING = "refreshing"  # owners send values to the ranks that lack them
    READY = "ready"  # at a version, with its step to compute; or past the last one
    COMPUTING = "computing"  # runs its legs of the step's micro-batches
    REDUCING = "reducing"  # sums the gradients of the shards it owns
    AGREEING = "agreeing"  # waits for its snapshots, and agrees on the step with all members
    PUBLISHING = "publishing"  # sends the new values of its shards, and takes those of others
    LEAVING = "leaving"  # hands over, and waits to be let go
    CONCLUDING = "concluding"  # waits for its last version to be protected


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a worker holds, and at which version."""

    owned: frozenset[int] = frozenset()  # shards in good order at `owned_version`
    owned_version: int = 0
    values_version: int = 0  # of every value of `layers`; TORN while they are replaced
    layers: tuple[int, int] = (0, 0)
    pristine: bool = True  # every value is still as it was made from the seed


@dataclass(frozen=True, kw_only=True)
class Entering:
    """What is known so far of the generation that is being entered."""

    plan: Plan
    version: int = 0
    agreement: str = ""
    fresh: bool = False  # this rank has nothing of the job yet
    back: bool = False  # this rank goes back to an older version, and uses nothing of what it holds
    current: bool = False  # every value here is of `version` already


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """One worker. `agreed` is the last step whose agreement it passed, -1 if none, with what was agreed in it."""

    rank: int
    spec: ModelSpec
    steps: int
    phase: WorkerPhase = WorkerPhase.NEW
    fresh: bool = True  # has carried out no plan yet
    version: int = 0
    holding: Holding = Holding()
    agreed: int = -1
    agreement: str = ""
    layout: Layout | None = None
    entering: Entering | None = None
    switch: Plan | None = None  # a join or leave that all members enter before the next step
    leave_at: int | None = None  # the version at which the user's code has left the loop
    late: int = 0  # events that came too late to matter
    story: tuple[str, ...] = ()

    def ended(self) -> bool:
        """Whether every step is committed that there is to be."""
        return self.version >= (self.steps if self.leave_at is None else self.leave_at)


def new_worker(rank: int, spec: ModelSpec, steps: int) -> WorkerState:
    """A worker whose model has just been built from the seed: it holds version 0 of every value."""
    return WorkerState(rank=rank, spec=spec, steps=steps, holding=Holding(layers=(0, spec.layers)))


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Started:
    """The worker is ready to train. `seeded`: its values are those that the seed gives."""

    seeded: bool = True


@dataclass(frozen=True)
class Interrupted:
    """The generation has ended."""


@dataclass(frozen=True)
class Assigned:
    """The coordinator's plan has come."""

    plan: Plan


@dataclass(frozen=True)
class Linked:
    """The links to the members of the plan's generation are there, and what was being copied is copied."""


@dataclass(frozen=True)
class Placed:
    """Another rank has said where the job is: its version, what was agreed last, and where the loop was left."""

    version: int
    agreement: str
    left: int | None = None


@dataclass(frozen=True)
class Restored:
    """Every shard that is owned in the new generation is here."""


@dataclass(frozen=True)
class Published:
    """Every value that this rank reads is of the version that was published."""


@dataclass(frozen=True)
class StepDue:
    """Training goes on: the step of this version is to be computed."""


@dataclass(frozen=True)
class Computed:
    """This rank's work of the step is done."""


@dataclass(frozen=True)
class Reduced:
    """The gradients of the owned shards are reduced, and are in the keeper's memory."""


@dataclass(frozen=True)
class Agreed:
    """All members agree on the step. `proposal`: the join or leave offered here; `wanted`: by all members."""

    agreement: str
    proposal: Plan | None = None
    wanted: bool = False


@dataclass(frozen=True)
class Distrusted:
    """Replicas differ: the step is not agreed. The shards here that are wrong, and whether values read here are."""

    shards: frozenset[int] = frozenset()
    values: bool = False


@dataclass(frozen=True)
class Spoiled:
    """The script has put other values in place of the committed ones: no other rank may have them."""


@dataclass(frozen=True)
class SwitchDue:
    """The step boundary is here at which the agreed join or leave takes place."""


@dataclass(frozen=True)
class LoopLeft:
    """The user's code has left the training loop."""


@dataclass(frozen=True)
class EndDue:
    """No step is left: the last version is to be protected."""


@dataclass(frozen=True)
class Concluded:
    """The last version is whole here."""


Event = (
    Started
    | Interrupted
    | Assigned
    | Linked
    | Placed
    | Restored
    | Published
    | StepDue
    | Computed
    | Reduced
    | Agreed
    | Distrusted
    | Spoiled
    | SwitchDue
    | LoopLeft
    | EndDue
    | Concluded
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class SendReport:
    """Report to the coordinator what is held here (`report`)."""


@dataclass(frozen=True)
class AwaitPlan:
    """Wait for a plan that is not out of date; `first`: of this worker's life. Answer: Assigned."""

    first: bool = False


@dataclass(frozen=True)
class EditLinks:
    """Edit the links to the members of the plan's generation; wait until nothing is copied any more. Answer: Linked."""

    plan: Plan


@dataclass(frozen=True)
class AskPlace:
    """Ask a rank that has been training where the job is. Answer: Placed."""

    rank: int


@dataclass(frozen=True)
class TellPlace:
    """Tell fresh ranks where the job is, before anything here is changed."""

    ranks: tuple[int, ...]
    version: int
    agreement: str


@dataclass(frozen=True)
class TakeUnseen:
    """A fresh rank that no other rank guides: the step before `version` is what the user's code has not seen."""

    version: int
    agreement: str


@dataclass(frozen=True)
class EnterProtection:
    """The keeper of this node enters the generation: what it holds for others is that of the plan's placement."""

    plan: Plan


@dataclass(frozen=True)
class ForgetSince:
    """Go back from version `since` to `version`: what was agreed and computed between is dropped."""

    since: int
    version: int
    agreement: str


@dataclass(frozen=True)
class RunOptimizer:
    """Run the optimizer on the owned shards, with the reduced gradients, as agreed."""

    agreement: str


@dataclass(frozen=True)
class TakePlaces:
    """Hold the layers and own the shards of the plan. `free`: layers not held any more, and new ones, have no values.

    `discard`: nothing that was held is used. `seeded`: every value is that of the seed.
    """

    plan: Plan
    version: int
    layers: tuple[int, int] | None  # None: as before
    shards: frozenset[int]
    discard: bool
    seeded: bool


@dataclass(frozen=True)
class ReadCheckpoint:
    """Read the owned shards from the plan's checkpoint. Answer: Restored."""

    plan: Plan
    version: int
    agreement: str


@dataclass(frozen=True)
class Restore:
    """Fetch the missing shards of `version` from wherever they are. Answer: Restored."""

    plan: Plan
    version: int
    agreement: str
    missing: frozenset[int]


@dataclass(frozen=True)
class Publish:
    """Owners send `version` of their shards to the readers of `layout`. Answer: Published."""

    version: int
    layout: Layout
    readers: tuple[int, ...]


@dataclass(frozen=True)
class NoteChange:
    """The membership has changed at `version`: the script's next changes of settings may come on some ranks only."""

    version: int


@dataclass(frozen=True)
class ComeUp:
    """A fresh rank: bring what the user's code and the scheduler have changed to where the job is."""

    plan: Plan
    version: int
    agreement: str


@dataclass(frozen=True)
class AdoptAgreement:
    """Take over what was agreed about protection."""

    agreement: str


@dataclass(frozen=True)
class TellCommitted:
    """Tell the coordinator that the step of this agreement is committed: a line of the ledger."""

    agreement: str
    generation: int


@dataclass(frozen=True)
class CommitStep:
    """The version after the agreed step is whole here: begin to protect it. `free` frees layers of other stages."""

    agreement: str
    layout: Layout
    free: bool


@dataclass(frozen=True)
class Protect:
    """Have the keeper hold this version of every owned shard, and its parity too."""


@dataclass(frozen=True)
class BeginStep:
    """Begin the step of `version`, of which nothing is done here."""

    version: int
    work: Work


@dataclass(frozen=True)
class ResumeStep:
    """Go on with the step under way: keep what is held, send again what other ranks need of it."""

    plan: Plan


@dataclass(frozen=True)
class TellEntered:
    """The plan is carried out, by a switch at a step boundary or a recovery. `tell`: the coordinator waits to hear."""

    generation: int
    switched: bool
    tell: bool


@dataclass(frozen=True)
class Compute:
    """Run this rank's work of the step, with at most `depth` micro-batches in flight. Answer: Computed."""

    step: int
    depth: int


@dataclass(frozen=True)
class Reduce:
    """Send partial sums to the owners of shards; sum those of the owned ones. Answer: Reduced."""

    step: int


@dataclass(frozen=True)
class Agree:
    """Wait for this rank's snapshots, and agree with all members. Answer: Agreed. `last`: no step follows."""

    step: int
    last: bool


@dataclass(frozen=True)
class TellIdled:
    """Tell the coordinator that this rank will not enter a proposed generation: it is past its last step."""

    generation: int


@dataclass(frozen=True)
class ForgetSnapshots:
    """All owners have this version in their keepers: copies of older ones may be written over."""


@dataclass(frozen=True)
class HandOver:
    """The other ranks go on without this one: it stays until the coordinator lets it go. Ends the job, or aborts."""

    generation: int


@dataclass(frozen=True)
class ReportLeft:
    """Tell the coordinator that the user's code has left the loop, and decline what is proposed from now on."""

    version: int


@dataclass(frozen=True)
class WaitUntilWhole:
    """Wait until the last version, its parity and its checkpoints are whole here. Answer: Concluded."""

    protect: bool


Instruction = (
    SendReport
    | AwaitPlan
    | EditLinks
    | AskPlace
    | TellPlace
    | TakeUnseen
    | EnterProtection
    | ForgetSince
    | RunOptimizer
    | TakePlaces
    | ReadCheckpoint
    | Restore
    | Publish
    | NoteChange
    | ComeUp
    | AdoptAgreement
    | TellCommitted
    | CommitStep
    | Protect
    | BeginStep
    | ResumeStep
    | TellEntered
    | Compute
    | Reduce
    | Agree
    | TellIdled
    | ForgetSnapshots
    | HandOver
    | ReportLeft
    | WaitUntilWhole
)
Outcome = tuple[WorkerState, list[Instruction]]


# ---------------------------------------------------------------- waiting for a plan, and entering its generation


def _started(state: WorkerState, event: Started) -> Outcome:
    holding = replace(state.holding, pristine=event.seeded)
    return replace(state, phase=WorkerPhase.WAITING, holding=holding), [AwaitPlan(first=True)]


def _interrupted(state: WorkerState, event: Interrupted) -> Outcome:
    return replace(state, phase=WorkerPhase.WAITING, entering=None, switch=None), [SendReport(), AwaitPlan()]


def _spoiled(state: WorkerState, event: Spoiled) -> Outcome:
    return replace(state, holding=replace(state.holding, owned=frozenset(), values_version=TORN)), []


def _assigned(state: WorkerState, event: Assigned) -> Outcome:
    return _enter(state, event.plan)


def _switch_due(state: WorkerState, event: SwitchDue) -> Outcome:
    plan = state.switch
    if plan is None:
        raise IllegalEvent(state, event)
    state = replace(state, switch=None)
    if state.rank in plan.leaving:
        return replace(state, phase=WorkerPhase.LEAVING), [HandOver(plan.generation)]
    return _enter(state, plan)


def _enter(state: WorkerState, plan: Plan) -> Outcome:
    fresh = state.fresh
    entering = Entering(plan=plan, fresh=fresh, back=not fresh and state.rank in plan.fresh)
    return replace(state, phase=WorkerPhase.LINKING, entering=entering), [EditLinks(plan)]


def _linked(state: WorkerState, event: Linked) -> Outcome:
    entering = _entering(state)
    plan = entering.plan
    if entering.fresh:  # what a guide said in a generation that was aborted since may be of another version
        state = replace(state, leave_at=None)
        if plan.guide is not None:
            return replace(state, phase=WorkerPhase.PLACING), [AskPlace(plan.guide)]
    version = state.version if plan.version is None else plan.version
    agreement = state.agreement if plan.version is None else plan.agreement
    instructions: list[Instruction] = []
    if entering.fresh:
        instructions.append(TakeUnseen(version, agreement))
    if state.rank == plan.guide:
        instructions.append(TellPlace(plan.fresh, version, agreement))
    return _take_places(state, version, agreement, instructions)


def _placed(state: WorkerState, event: Placed) -> Outcome:
    return _take_places(replace(state, leave_at=event.left), event.version, event.agreement, [])


def _take_places(state: WorkerState, version: int, agreement: str, instructions: list[Instruction]) -> Outcome:
    """Own the plan's shards and hold its layers, at `version`; what is missing is fetched."""
    entering, holding = _entering(state), state.holding
    plan, back, discard = entering.plan, entering.back, entering.fresh or entering.back
    # Not before all ranks know where the job is: this node's keeper may serve others of the last generation.
    instructions.append(EnterProtection(plan))
    if back:
        instructions.append(ForgetSince(state.version, version, agreement))
        state = replace(state, version=version, agreed=version - 1, agreement=agreement)
        holding = replace(holding, owned=frozenset(), owned_version=version, values_version=TORN)
    elif not entering.fresh and holding.owned_version == version - 1:
        instructions.append(RunOptimizer(agreement))
        holding = replace(holding, pristine=False)
    current = not discard and holding.values_version == version
    seeded = version == 0 and holding.pristine and not plan.checkpoint
    layout = plan.layout
    stage = layout.stage_of(state.rank)
    layers = (stage.start, stage.stop)
    moved = layers != holding.layers
    shards = frozenset(s.index for s in layout.index(state.spec).owned(state.rank))
    gained = {gain.shard for gain in plan.gains if gain.rank == state.rank}
    kept = frozenset() if discard else shards - gained
    holding = Holding(
        owned=shards if seeded else kept,
        owned_version=version,
        values_version=TORN if moved and not seeded else holding.values_version,
        layers=layers,
        pristine=seeded,
    )
    instructions.append(TakePlaces(plan, version, layers if moved else None, shards, discard, seeded))
    entering = replace(entering, version=version, agreement=agreement, current=current)
    state = replace(state, phase=WorkerPhase.RESTORING, holding=holding, entering=entering)
    if plan.checkpoint:
        return state, [*instructions, ReadCheckpoint(plan, version, agreement)]
    return state, [*instructions, Restore(plan, version, agreement, shards - holding.owned)]


def _restored(state: WorkerState, event: Restored) -> Outcome:
    entering = _entering(state)
    layout = entering.plan.layout
    owned = frozenset(s.index for s in layout.index(state.spec).owned(state.rank))
    holding = replace(state.holding, owned=owned)
    if state.rank in entering.plan.refresh:
        holding = replace(holding, values_version=TORN)
    publish = Publish(entering.version, layout, entering.plan.refresh)
    return replace(state, phase=WorkerPhase.REFRESHING, holding=holding), [publish]


def _refreshed(state: WorkerState, event: Published) -> Outcome:
    """Everything here is at the plan's version: go on with its step."""
    entering, before = _entering(state), state.version
    plan, version, agreement = entering.plan, entering.version, entering.agreement
    layout = plan.layout
    instructions: list[Instruction] = [NoteChange(version)] if plan.generation > 1 else []
    behind = not entering.fresh and before == version - 1
    state = replace(
        state,
        phase=WorkerPhase.READY,
        fresh=False,
        version=version,
        holding=replace(state.holding, values_version=version),
        layout=layout,
        entering=None,
    )
    if entering.fresh or behind:
        state = replace(state, agreed=version - 1, agreement=agreement)
    if entering.fresh:
        instructions.append(ComeUp(plan, version, agreement))
    if agreement and (entering.fresh or entering.back):  # all that committed it may have died before they said so
        instructions.append(TellCommitted(agreement, layout.generation))
    if entering.current and plan.version is not None:
        instructions += [Protect(), ResumeStep(plan)]
    else:
        if behind:
            instructions += [AdoptAgreement(agreement), CommitStep(agreement, layout, free=version == 1)]
        instructions += [Protect(), BeginStep(version, Work(plan.work, plan.kept))]
    switched = plan.version is None and not entering.fresh
    instructions.append(TellEntered(plan.generation, switched, tell=plan.generation > 1))
    return state, instructions


def _entering(state: WorkerState) -> Entering:
    assert state.entering is not None
    return state.entering


# ---------------------------------------------------------------- one step


def _step_due(state: WorkerState, event: StepDue) -> Outcome:
    layout = _layout(state)
    stages = sum(stage.start >= layout.stage_of(state.rank).start for stage in layout.stages)
    depth = 1 + stages  # one more than 1F1B needs, which hides the latency of links
    return replace(state, phase=WorkerPhase.COMPUTING), [Compute(state.version, depth)]


def _computed(state: WorkerState, event: Computed) -> Outcome:
    return replace(state, phase=WorkerPhase.REDUCING), [Reduce(state.version)]


def _reduced(state: WorkerState, event: Reduced) -> Outcome:
    return replace(state, phase=WorkerPhase.AGREEING), [Agree(state.version, last=state.version + 1 == state.steps)]


def offered(state: WorkerState, proposal: Plan | None) -> Plan | None:
    """A proposed join or leave, unless its generation is entered already."""
    known = state.layout.generation if state.layout is not None else 0
    return proposal if proposal is not None and proposal.generation > known else None


def _agreed(state: WorkerState, event: Agreed) -> Outcome:
    """This rank passes the agreement: the step will be committed, by these members or by those after them."""
    step, proposal, layout = state.version, event.proposal, _layout(state)
    last = step + 1 == state.steps
    instructions: list[Instruction] = []
    switch = None
    if proposal is not None and event.wanted and not (last and proposal.leaving):
        switch = proposal  # the end of the job lets go of ranks that leave
    elif proposal is not None and last:
        instructions.append(TellIdled(proposal.generation))
    instructions += [AdoptAgreement(event.agreement), ForgetSnapshots(), RunOptimizer(event.agreement)]
    holding = replace(state.holding, owned_version=step + 1, values_version=TORN, pristine=False)
    state = replace(
        state,
        phase=WorkerPhase.PUBLISHING,
        agreed=step,
        agreement=event.agreement,
        switch=switch,
        holding=holding,
    )
    return state, [*instructions, Publish(step + 1, layout, layout.ranks)]


def _distrusted(state: WorkerState, event: Distrusted) -> Outcome:
    """The step is not agreed; the coordinator, which hears of it, ends this generation."""
    holding = replace(state.holding, owned=state.holding.owned - event.shards)
    if event.values:
        holding = replace(holding, values_version=TORN)
    return replace(state, holding=holding), []


def _committed(state: WorkerState, event: Published) -> Outcome:
    version, layout = state.version + 1, _layout(state)
    holding = replace(state.holding, values_version=version)
    commit = CommitStep(state.agreement, layout, free=version == 1)
    return replace(state, phase=WorkerPhase.READY, version=version, holding=holding), [
        commit,
        BeginStep(version, layout.work),
    ]


def _layout(state: WorkerState) -> Layout:
    assert state.layout is not None
    return state.layout


# ---------------------------------------------------------------- the end


def _loop_left(state: WorkerState, event: LoopLeft) -> Outcome:
    if state.leave_at is not None:
        return state, []
    state = replace(state, leave_at=state.version)
    return state, [ReportLeft(state.version)] if state.version < state.steps else []


def _end_due(state: WorkerState, event: EndDue) -> Outcome:
    return replace(state, phase=WorkerPhase.CONCLUDING), [WaitUntilWhole(protect=state.version < state.steps)]


def _concluded(state: WorkerState, event: Concluded) -> Outcome:
    return replace(state, phase=WorkerPhase.READY), []


# ---------------------------------------------------------------- the table

_TRAINING = (WorkerPhase.READY, WorkerPhase.COMPUTING)
HANDLED: dict[tuple[WorkerPhase, type[Any]], Callable[[WorkerState, Any], Outcome]] = {
    (WorkerPhase.NEW, Started): _started,
    (WorkerPhase.WAITING, Assigned): _assigned,
    (WorkerPhase.LINKING, Linked): _linked,
    (WorkerPhase.PLACING, Placed): _placed,
    (WorkerPhase.RESTORING, Restored): _restored,
    (WorkerPhase.REFRESHING, Published): _refreshed,
    (WorkerPhase.READY, StepDue): _step_due,
    (WorkerPhase.READY, SwitchDue): _switch_due,
    (WorkerPhase.READY, LoopLeft): _loop_left,
    (WorkerPhase.READY, EndDue): _end_due,
    **dict.fromkeys([(phase, Computed) for phase in _TRAINING], _computed),
    (WorkerPhase.REDUCING, Reduced): _reduced,
    (WorkerPhase.AGREEING, Agreed): _agreed,
    (WorkerPhase.AGREEING, Distrusted): _distrusted,
    (WorkerPhase.PUBLISHING, Published): _committed,
    (WorkerPhase.CONCLUDING, Concluded): _concluded,
    **dict.fromkeys([(phase, Interrupted) for phase in WorkerPhase if phase is not WorkerPhase.NEW], _interrupted),
    **dict.fromkeys([(phase, Spoiled) for phase in WorkerPhase if phase is not WorkerPhase.NEW], _spoiled),
}
# Answers to instructions that an abort has overtaken.
ANSWERS = (Linked, Placed, Restored, Published, Computed, Reduced, Agreed, Distrusted, Concluded)
LATE = frozenset((WorkerPhase.WAITING, answer) for answer in ANSWERS)


class IllegalEvent(AssertionError):
    """An event that cannot happen in this phase: a bug of the executor. Tells what led to it."""

    def __init__(self, state: WorkerState, event: Event) -> None:
        before = ", ".join(state.story) or "nothing"
        super().__init__(
            f"rank {state.rank} is {state.phase.value} at version {state.version}, where {type(event).__name__} cannot "
            f"happen; what happened before: {before}"
        )


def step(state: WorkerState, event: Event) -> Outcome:
    """The next state, and what to do. Raises IllegalEvent, and changes nothing, for what cannot happen now."""
    place = (state.phase, type(event))
    handler = HANDLED.get(place)
    if handler is None:
        if place in LATE:
            return replace(state, late=state.late + 1), []
        raise IllegalEvent(state, event)
    after, instructions = handler(state, event)
    told = f"{state.phase.value}: {type(event).__name__}"
    return replace(after, story=(*state.story[1 - STORY :], told)), instructions


# ---------------------------------------------------------------- what is told, and what always holds


def report(
    state: WorkerState,
    work: StepWork | None,
    *,
    protected: tuple[int, int],
    protected_before: tuple[int, int],
    outlives: int,
) -> Report:
    """What this worker has, for the coordinator. `work`: the step that was under way."""
    if state.fresh or state.layout is None or work is None:
        return Report(rank=state.rank, generation=0, fresh=True)
    holding = state.holding
    valid = holding.values_version == work.step  # gradients of values that are still the same
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
    )


def violations(state: WorkerState) -> list[str]:
    """What does not hold of a state, in words; cheap enough for every event."""
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


def step_of(agreement: str) -> int:
    """The step that was agreed on."""
    return int(json.loads(agreement)["step"])
