"""The coordinator's decisions, as a pure function: `step(state, event, now) -> (state, effects)`.

It has no clock, socket or thread; the gRPC service and the simulator both drive this one function. A late event (an
older incarnation, another generation, a repeated message) changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from everstep.resharding.layout import Layout
from everstep.resharding.plan import Plan, plan_join

from . import after
from . import events as e
from .causes import Ending
from .checkpoints import (
    give_up_saving,
    saved,
    stop_requested,
    unreadable,
)
from .draining import (
    cannot_leave,
    drain_requested,
    handed_over,
    offer_leave,
    release,
    withdraw_leave,
)
from .ending import (
    all_finished,
    concluded,
    end_if_finished,
    finished,
    give_up_concluding,
    left,
    went_on,
    went_on_alone,
)
from .forming import (
    last_call,
    node_joined,
    rendezvous_closed,
    store_opened,
)
from .losing import (
    heartbeats,
    node_lost,
    returned,
    silent_node,
)
from .migrating import entered, still_asked
from .newcomers import difference, refused
from .outcome import (
    Effects,
    Outcome,
    current,
    fail,
    with_workers,
)
from .protection import committed_protected
from .quarantine import keep_out, quarantine_ordered, release_ordered
from .rebalancing import costs_measured, rebalance_due, speeds_measured
from .recovering import (
    all_ready,
    begin_recovery,
    begin_training,
    carry_out,
    corrupted,
    died,
    lacking,
    plan_if_complete,
    recovered,
    reported,
    resumed,
    taken_in,
)
from .relayout import relayout_due, relayout_ordered
from .spare_nodes import take_places
from .state import (
    Config,
    Phase,
    State,
    Status,
)
from .troubles import (
    count_troubles,
    node_unhealthy,
    straggler_found,
    straggler_gone,
)


def initial_state(config: Config, now: float) -> State:
    """The state of a job that no node has joined yet."""
    return State(config=config, formed_s=now)


def step(state: State, event: e.Event, now: float) -> Outcome:
    """Return the state and effects after `event` at time `now` (seconds, any origin).

    Raises IllegalJobEvent, and changes nothing, if the event is impossible in this phase.
    """
    place = (state.phase, type(event))
    handler = HANDLED.get(place)
    if handler is None:
        if place in ILLEGAL:
            raise IllegalJobEvent(state, event)
        return state, []
    after, effects = handler(state, event, now)
    return count_troubles(state, after, effects, now)


class IllegalJobEvent(AssertionError):
    """An event that is impossible in this phase: a bug of the node, worker or coordinator that sent it."""

    def __init__(self, state: State, event: e.Event) -> None:
        super().__init__(
            f"the job is {state.phase.value} in generation {state.generation}, with step {state.committed} committed "
            f"and {len(state.workers)} workers, where {type(event).__name__} cannot happen: {event}"
        )


def _ticked(state: State, event: e.Ticked, now: float) -> Outcome:
    state, effects = last_call(state, now)
    if effects:
        return state, effects
    for due in (take_places, give_up_saving, give_up_concluding, went_on_alone, keep_out, cannot_leave, silent_node):
        state, effects = due(state, now)
        if effects:
            return state, effects
    state, effects = offer_leave(state)
    if not effects:
        state, effects = relayout_due(state, now)
    if not effects:
        state, effects = rebalance_due(state, now)
    # A lost node may hold the last replacement that the end of training was waiting for.
    return (state, effects) if effects else end_if_finished(state, [], now)


# ---------------------------------------------------------------- workers


def _declared_elastic(state: State, event: e.WorkerDeclaredElastic, now: float) -> Outcome:
    if state.elastic or current(state, event.worker) is None:
        return state, []
    return replace(state, elastic=True), []


def _ready(state: State, event: e.WorkerReady, now: float) -> Outcome:
    worker = current(state, event.worker)
    if worker is None or worker.status is not Status.STARTING:
        return state, []
    why = difference(state, event.job, event.worker.rank) if state.job is not None else ""
    if why and state.phase is Phase.LAUNCHED:
        return fail(state, Ending.RANKS_DIFFER, why)
    if why:
        state, effects = refused(state, worker, why)
        if state.phase is Phase.RECOVERING:  # the recovery may have been waiting only for it
            state, more = plan_if_complete(state, now)
            effects = [*effects, *more]
        return state, effects
    state = with_workers(state, replace(worker, status=Status.READY, peer=event.peer, memory_bytes=event.memory_bytes))
    state = replace(state, elastic=True, job=state.job or event.job)
    if state.phase is Phase.LAUNCHED:
        state = replace(state, saved=event.saved or state.saved)
        return begin_training(state) if all_ready(state) else (state, [])
    if state.phase is Phase.RECOVERING:
        return plan_if_complete(state, now)
    return _prepare_switch(state, now)


# ---------------------------------------------------------------- joins


def _prepare_switch(state: State, now: float) -> Outcome:
    """Offer a plan that adds every ready worker, or otherwise one that removes the nodes that are leaving.

    The members switch to it by themselves at a step boundary.
    """
    ready = [w for w in state.workers.values() if w.status is Status.READY]
    joiners = sorted(w.id.rank for w in ready if w.node not in state.leaving or w.owes_end)
    if state.phase is not Phase.RUNNING or state.join is not None:
        return state, []
    if not joiners:
        return offer_leave(state)
    assert state.job is not None
    assert state.layout is not None
    if any(w.left >= 0 for w in state.members()):
        return begin_recovery(state, None, now)
    plan = plan_join(state.job.model, state.layout, joiners, state.generation + 1)
    plan = replace(plan, lines=state.lines)
    state = replace(state, generation=plan.generation, join=plan)
    record = e.Record("join_prepared", {"generation": plan.generation, "ranks": joiners})
    state, orders = carry_out(state, plan)
    return state, [*orders, record]


def _switched(state: State, event: e.WorkerSwitched, now: float) -> Outcome:
    plan = state.join
    if current(state, event.worker) is None:
        return state, []
    state, switched = handed_over(state, event)
    if plan is None or event.generation != plan.generation:
        state, entry = entered(state, event)
        return state, [*switched, *entry]
    if not plan.leaving:
        state, switched = _let_in(state, plan)
        state, entry = entered(state, event)
        switched += entry
    state, effects = _prepare_switch(state, now)
    return state, [*switched, *effects]


def _let_in(state: State, plan: Plan) -> Outcome:
    """The members have switched to a join plan: the workers that it adds are members now."""
    joined = [
        replace(w, status=Status.MEMBER, since=state.committed + 1)
        for w in state.workers.values()
        if w.status is Status.READY and w.id.rank in plan.layout.ranks
    ]
    asked = still_asked(state.stages_asked, plan.layout)
    state = replace(with_workers(state, *joined), layout=plan.layout, join=None, stages_asked=asked)
    return state, [taken_in(plan, [w.id.rank for w in joined])] if plan.fresh else []


def _idled(state: State, event: e.WorkerIdled, now: float) -> Outcome:
    if state.join is None or event.generation != state.join.generation or current(state, event.worker) is None:
        return state, []
    return begin_recovery(state, None, now) if state.join.fresh else (withdraw_leave(state), [])


# ---------------------------------------------------------------- progress and end


def _committed(state: State, event: e.WorkerCommitted, now: float) -> Outcome:
    layout = state.layout
    if current(state, event.worker) is None or layout is None:
        return state, []
    if event.generation < state.rolled_back:
        return state, []  # belongs to steps that a rollback discarded
    if event.settled:
        return _settled(state, event), []
    if event.step <= state.committed:
        return state, []
    workers = {rank: replace(w, deaths=0, hangs=0) for rank, w in state.workers.items()}
    protected, every = committed_protected(state, event), event.every or state.snapshot_every
    state = replace(state, committed=event.step, workers=workers, protected=protected, snapshot_every=every)
    if event.step > state.agreed:
        state = replace(state, agreed=event.step, agreement=event.agreement)
    state, effects = _enter_in_ledger(state, layout, event)
    if state.phase is Phase.RUNNING and state.recovery is not None:
        effects.append(recovered(state.recovery, event.step, now))
        state = replace(state, recovery=None)
    state, released = release(state, event)
    return end_if_finished(state, [*effects, *released], now)


def _settled(state: State, event: e.WorkerCommitted) -> State:
    """What the user's code left behind a step belongs to it from now on."""
    if event.step not in state.agreements:
        return state
    state = replace(state, agreements={**state.agreements, event.step: event.agreement})
    return replace(state, agreement=event.agreement) if event.step == state.agreed else state


def _noted(state: State, event: e.WorkerNoted, now: float) -> Outcome:
    return state, [e.Record(event.what, {"rank": event.worker.rank, **event.fields})]


def _wait_noticed(state: State, event: e.WaitNoticed, now: float) -> Outcome:
    fields = {"ranks": list(event.ranks), **({"step": event.step} if event.step >= 0 else {})}
    return state, [e.Record("warning", {"notice": "waiting", "text": event.text, **fields})]


def _enter_in_ledger(state: State, layout: Layout, event: e.WorkerCommitted) -> Outcome:
    """Record a new step; for a step that was computed again, record whether its result is the same."""
    # No recovery can return to a version before this one. The first protected version is known two steps later.
    oldest = state.protected - 1 if state.protected >= 0 else event.step - 2
    kept = {n: text for n, text in state.agreements.items() if n >= oldest}
    if state.saved:  # checkpoints have an agreement of their own
        oldest = min(oldest, state.saved[0].version)
    digests = {n: digest for n, digest in state.digests.items() if n >= oldest}
    state = replace(state, agreements={**kept, event.step: event.agreement})
    if event.step <= state.recorded:
        same = digests.get(event.step, event.digest) == event.digest
        return state, [e.Record("committed_again", {"step": event.step, "digest": event.digest, "same": same})]
    fields = {
        "step": event.step,
        "loss": event.loss,
        "digest": event.digest,
        "generation": layout.generation,
        "layout": layout.describe(),
        "protected": state.protected,
    }
    state = replace(state, recorded=event.step, digests={**digests, event.step: event.digest})
    return state, [e.Record("committed", fields)]


def _finished(state: State, event: e.WorkerFinished, now: float) -> Outcome:
    worker = current(state, event.worker)
    if worker is None or worker.status not in (Status.READY, Status.MEMBER):
        return state, []
    effects: Effects = []
    if state.join is not None and state.join.leaving:
        state = withdraw_leave(state)
    if worker.status is Status.READY and state.join is not None:
        # It joined at the end of the last step, and reports that before the members that switched with it.
        state, effects = _let_in(state, state.join)
    state, ended = finished(state, event, now)
    if state.phase is Phase.DONE:
        return state, [*effects, *ended]
    if state.phase is Phase.RUNNING and all_finished(state):
        return end_if_finished(state, [*effects, *ended], now)
    state, more = begin_recovery(state, None, now) if state.join is not None else _prepare_switch(state, now)
    return state, [*effects, *ended, *more]


def _resumed(state: State, event: e.WorkerResumed, now: float) -> Outcome:
    state, effects = went_on_alone(resumed(state, event, now), now)
    return end_if_finished(state, effects, now)


def _raised(state: State, event: e.WorkerRaised, now: float) -> Outcome:
    if current(state, event.worker) is None:
        return state, []
    if not state.elastic:
        return state, []  # an ordinary job: the process's exit follows, and the restart rule decides
    return fail(state, Ending.RAISED, event.message, event.traceback, event.worker.rank)


_HANDLERS: dict[type[Any], Callable[[State, Any, float], Outcome]] = {
    e.NodeJoined: node_joined,
    e.NodeUnhealthy: node_unhealthy,
    e.NodeLost: node_lost,
    e.HeartbeatsReceived: heartbeats,
    e.StoreOpened: store_opened,
    e.CoordinatorReturned: returned,
    e.WorkerDeclaredElastic: _declared_elastic,
    e.WorkerReady: _ready,
    e.WorkerDied: died,
    e.WorkerReported: reported,
    e.WorkerLacking: lacking,
    e.CorruptionFound: corrupted,
    e.WorkerResumed: _resumed,
    e.WorkerSwitched: _switched,
    e.WorkerIdled: _idled,
    e.WorkerCommitted: _committed,
    e.WorkerNoted: _noted,
    e.WorkerLeft: left,
    e.WorkerWentOn: went_on,
    e.WaitNoticed: _wait_noticed,
    e.WorkerFinished: _finished,
    e.WorkerConcluded: concluded,
    e.WorkerRaised: _raised,
    e.CheckpointSaved: saved,
    e.CheckpointUnreadable: unreadable,
    e.StopRequested: stop_requested,
    e.DrainRequested: drain_requested,
    e.StragglerFound: straggler_found,
    e.StragglerGone: straggler_gone,
    e.SpeedsMeasured: speeds_measured,
    e.CostsMeasured: costs_measured,
    e.QuarantineOrdered: quarantine_ordered,
    e.ReleaseOrdered: release_ordered,
    e.RelayoutOrdered: relayout_ordered,
    e.RendezvousClosed: rendezvous_closed,
    e.Ticked: _ticked,
}
_AFTER_TRAINING: dict[type[Any], Callable[[State, Any, float], Outcome]] = {
    e.NodeJoined: after.node_joined,
    e.NodeUnhealthy: node_unhealthy,
    e.NodeLost: after.node_lost,
    e.HeartbeatsReceived: heartbeats,
    e.CoordinatorReturned: returned,
    e.WorkerDied: after.died,
    e.WorkerNoted: _noted,
    e.WorkerRaised: after.raised,
    e.CheckpointSaved: after.saved,
    e.StopRequested: after.stop_requested,
    e.DrainRequested: after.stop_requested,
    e.Ticked: after.ticked,
}
_BEFORE_THE_END = frozenset({Phase.FORMING, Phase.LAUNCHED, Phase.RUNNING, Phase.RECOVERING})
_TRAINING = frozenset({Phase.RUNNING, Phase.RECOVERING})
# Workers and their agents send these, so workers have to exist.
_OF_WORKERS = (e.WorkerDeclaredElastic, e.WorkerReady, e.WorkerDied, e.WorkerNoted, e.WorkerRaised)
# Phases in which a message from a member of a generation can change something. A plan precedes all of them.
_OF_MEMBERS: dict[type[Any], frozenset[Phase]] = {
    e.WorkerReported: frozenset({Phase.RECOVERING}),
    e.WorkerLacking: frozenset({Phase.RUNNING}),
    e.CorruptionFound: _TRAINING,
    e.WorkerResumed: frozenset({Phase.RUNNING}),
    e.WorkerSwitched: _TRAINING,
    e.WorkerIdled: frozenset({Phase.RUNNING}),
    e.WorkerCommitted: _TRAINING,
    e.WorkerLeft: _TRAINING,
    e.WorkerWentOn: _TRAINING,
    e.WorkerFinished: _TRAINING,
    e.WorkerConcluded: _TRAINING,
    e.CheckpointSaved: _TRAINING,
    e.CheckpointUnreadable: _TRAINING,
}
# Illegal events. Any other event that no table handles is late: nodes and workers learn of a change after it happened.
ILLEGAL: frozenset[tuple[Phase, type[Any]]] = frozenset(
    [(Phase.FORMING, kind) for kind in (*_OF_WORKERS, *_OF_MEMBERS)] + [(Phase.LAUNCHED, kind) for kind in _OF_MEMBERS]
)
_ACTS: dict[type[Any], frozenset[Phase]] = {**_OF_MEMBERS, e.WorkerDeclaredElastic: frozenset({Phase.LAUNCHED})}
HANDLED: dict[tuple[Phase, type[Any]], Callable[[State, Any, float], Outcome]] = {
    (phase, kind): handler
    for kind, handler in _HANDLERS.items()
    for phase in _ACTS.get(kind, _BEFORE_THE_END)
    if (phase, kind) not in ILLEGAL
} | {(Phase.AFTER, kind): handler for kind, handler in _AFTER_TRAINING.items()}
