"""The worker as a state machine: what one rank holds, at which version, and what it does next.

`step(state, event)` returns the next state and the instructions to carry out, in order. The machine only decides: it
has no access to tensors, clocks, sockets or threads. An executor carries the instructions out: the engine on tensors,
the simulator on hashes. The last instruction of a list may have to wait for other ranks; its answer is the next event.
If the generation ends meanwhile, the executor drops the rest of the list and reports `Interrupted`; the state is then
that of the last event, so an instruction that was not completed leaves no trace in it.

Versions count committed steps: version v is the state before step v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from everstep.resharding.layout import Layout
from everstep.resharding.legs import in_flight
from everstep.resharding.lines import since
from everstep.resharding.moves import What, received
from everstep.resharding.plan import Plan
from everstep.resharding.work import Work

from .prefetching import prefetches
from .worker_events import (
    AdoptAgreement,
    Agree,
    Agreed,
    AskPlace,
    Assigned,
    AwaitPlan,
    BeginStep,
    ComeUp,
    CommitStep,
    Compute,
    Computed,
    Concluded,
    Distrusted,
    DropPrefetched,
    EditLinks,
    EndDue,
    EnterProtection,
    Event,
    ForgetSince,
    ForgetSnapshots,
    HandOver,
    Instruction,
    Interrupted,
    Linked,
    LoopLeft,
    NoteChange,
    OpenCheckpoint,
    PauseDue,
    Placed,
    Prefetch,
    Protect,
    Publish,
    Published,
    Reduce,
    Reduced,
    Refresh,
    ReportLeft,
    Restore,
    Restored,
    ResumeStep,
    RunOptimizer,
    SendReport,
    Spoiled,
    Started,
    StepDue,
    SwitchDue,
    TakePlaces,
    TakeUnseen,
    TellCommitted,
    TellEntered,
    TellIdled,
    TellPlace,
    WaitUntilWhole,
)
from .worker_state import (
    TORN,
    Entering,
    Holding,
    WorkerPhase,
    WorkerState,
)

STORY = 16  # number of events that a state remembers for the message of IllegalEvent
Outcome = tuple[WorkerState, list[Instruction]]


# ---------------------------------------------------------------- waiting for a plan, and entering its generation


def _started(state: WorkerState, event: Started) -> Outcome:
    holding = replace(state.holding, pristine=event.seeded)
    return replace(state, phase=WorkerPhase.WAITING, holding=holding), [AwaitPlan(first=True)]


def _interrupted(state: WorkerState, event: Interrupted) -> Outcome:
    dropped, state = _without_copies(state)
    state = replace(state, phase=WorkerPhase.WAITING, entering=None, switch=None)
    return state, [*dropped, SendReport(), AwaitPlan()]


def _without_copies(state: WorkerState) -> tuple[list[Instruction], WorkerState]:
    """Drop what was copied ahead, if anything was."""
    return ([DropPrefetched()] if state.prefetching else []), replace(state, prefetching=0)


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
    if entering.fresh:  # the answer of a guide may stem from an aborted generation, and describe another version
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
    """Own the plan's shards and hold its layers, at `version`; missing shards are fetched."""
    entering, holding = _entering(state), state.holding
    plan, back, discard = entering.plan, entering.back, entering.fresh or entering.back
    # Only after all ranks know the position of the job: this node's keeper may still serve the last generation.
    instructions.append(EnterProtection(plan))
    if back:
        instructions.append(ForgetSince(state.version, version, agreement))
        state = replace(state, version=version, agreed=version - 1, agreement=agreement)
        holding = replace(holding, owned=frozenset(), owned_version=version, values_version=TORN)
    elif not entering.fresh and holding.owned_version == version - 1:
        instructions.append(RunOptimizer(agreement))
        holding = replace(holding, pristine=False)
    current = not discard and holding.values_version == version and not plan.stand_ins
    approximated = since(plan.lines_before, 0) > 0  # version 0 too: what a seed gives is of another line
    seeded = version == 0 and holding.pristine and not plan.checkpoint and not approximated
    layout = plan.layout
    stage = layout.stage_of(state.rank)
    layers = (stage.start, stage.stop)
    moved = layers != holding.layers
    shards = frozenset(s.index for s in layout.index(state.spec).owned(state.rank))
    gained = {move.shard for move in received(plan.gained, state.rank)}
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
        instructions.append(OpenCheckpoint(plan.checkpoint, version, agreement))
    moves = plan.moves_of(sorted(shards - holding.owned), state.rank, What.OWN)
    return state, [*instructions, Restore(plan, version, agreement, moves)]


def _restored(state: WorkerState, event: Restored) -> Outcome:
    entering = _entering(state)
    layout = entering.plan.layout
    owned = frozenset(s.index for s in layout.index(state.spec).owned(state.rank))
    holding = replace(state.holding, owned=owned)
    if state.rank in entering.plan.receivers:
        holding = replace(holding, values_version=TORN)
    refresh = Refresh(entering.plan, entering.version, entering.agreement)
    dropped, state = _without_copies(state)
    return replace(state, phase=WorkerPhase.REFRESHING, holding=holding), [*dropped, refresh]


def _refreshed(state: WorkerState, event: Published) -> Outcome:
    """All state here is at the plan's version: continue with its step."""
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
    if agreement and (entering.fresh or entering.back):  # every rank that committed it may have died before its report
        instructions.append(TellCommitted(agreement, layout.generation))
    if entering.current and plan.version is not None:
        instructions += [Protect(), ResumeStep(plan)]
    else:
        if behind:
            instructions += [AdoptAgreement(agreement), CommitStep(agreement, layout, free=version == 1)]
        instructions += [Protect(), BeginStep(version, Work(plan.work, plan.kept, plan.layout.order))]
    switched = plan.version is None and not entering.fresh
    instructions.append(TellEntered(plan.generation, switched, tell=plan.generation > 1))
    return state, instructions


def _entering(state: WorkerState) -> Entering:
    assert state.entering is not None
    return state.entering


# ---------------------------------------------------------------- one step


def _step_due(state: WorkerState, event: StepDue) -> Outcome:
    layout = _layout(state)
    return replace(state, phase=WorkerPhase.COMPUTING), [Compute(state.version, in_flight(layout, state.rank))]


def _computed(state: WorkerState, event: Computed) -> Outcome:
    return replace(state, phase=WorkerPhase.REDUCING), [Reduce(state.version)]


def _reduced(state: WorkerState, event: Reduced) -> Outcome:
    return replace(state, phase=WorkerPhase.AGREEING), [Agree(state.version, last=state.version + 1 == state.steps)]


def offered(state: WorkerState, proposal: Plan | None) -> Plan | None:
    """A proposed join or departure, unless its generation has been entered already."""
    known = state.layout.generation if state.layout is not None else 0
    return proposal if proposal is not None and proposal.generation > known else None


def _agreed(state: WorkerState, event: Agreed) -> Outcome:
    """This rank passes the agreement: the step will be committed, by these members or by their successors."""
    step, proposal, layout = state.version, event.proposal, _layout(state)
    last = step + 1 == state.steps
    instructions: list[Instruction] = []
    switch, prefetching = None, state.prefetching
    if proposal is not None and event.wanted and not event.waits and not (last and proposal.leaving):
        switch = proposal  # the end of the job releases the ranks that leave
    elif proposal is not None and last:
        instructions.append(TellIdled(proposal.generation))
    elif proposal is not None and prefetches(proposal) and proposal.generation != prefetching:
        prefetching = proposal.generation
        instructions.append(Prefetch(proposal))
    instructions += [AdoptAgreement(event.agreement), ForgetSnapshots(), RunOptimizer(event.agreement)]
    holding = replace(state.holding, owned_version=step + 1, values_version=TORN, pristine=False)
    state = replace(
        state,
        phase=WorkerPhase.PUBLISHING,
        agreed=step,
        agreement=event.agreement,
        switch=switch,
        prefetching=prefetching,
        holding=holding,
    )
    return state, [*instructions, Publish(step + 1, layout)]


def _distrusted(state: WorkerState, event: Distrusted) -> Outcome:
    """The step is not agreed; the coordinator, which learns of it, ends this generation."""
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
    dropped, state = _without_copies(state)
    wait = WaitUntilWhole(protect=state.version < state.steps)
    return replace(state, phase=WorkerPhase.CONCLUDING), [*dropped, wait]


def _pause_due(state: WorkerState, event: PauseDue) -> Outcome:
    return replace(state, phase=WorkerPhase.CONCLUDING), [WaitUntilWhole(protect=True, last=False)]


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
    (WorkerPhase.READY, PauseDue): _pause_due,
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
    """An event that is impossible in this phase: a bug of the executor. Its message lists the events before it."""

    def __init__(self, state: WorkerState, event: Event) -> None:
        before = ", ".join(state.story) or "nothing"
        super().__init__(
            f"rank {state.rank} is {state.phase.value} at version {state.version}, where {type(event).__name__} cannot "
            f"happen; what happened before: {before}"
        )


def step(state: WorkerState, event: Event) -> Outcome:
    """Return the next state and the instructions. Raises IllegalEvent, and changes nothing, for an illegal event."""
    place = (state.phase, type(event))
    handler = HANDLED.get(place)
    if handler is None:
        if place in LATE:
            return replace(state, late=state.late + 1), []
        raise IllegalEvent(state, event)
    after, instructions = handler(state, event)
    told = f"{state.phase.value}: {type(event).__name__}"
    return replace(after, story=(*state.story[1 - STORY :], told)), instructions
