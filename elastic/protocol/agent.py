"""The node agent as a state machine: what one node of a job does, from its first greeting to its end.

`step(state, event, now)` returns the next state and the instructions to carry out, in order. The machine only decides:
it has no access to processes, sockets or clocks (`now` is monotonic, in seconds). The executor is the agent's loop in
`agents/node/node.py`, or the simulator.

A worker counts as running until the kernel reports that its process is gone, even after SIGKILL: until then its
memory, ports and device are not free, and no other worker gets its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .agent_events import (
    Announce,
    AskDrain,
    AskStacks,
    AskStop,
    CheckHealth,
    DropWorker,
    EndKeeper,
    EndOrdered,
    Event,
    FenceOrdered,
    ForgetFailures,
    ForkWorker,
    HealthChecked,
    Instruction,
    JoinAgain,
    JoinRefused,
    KeeperLost,
    KillHung,
    KillOrdered,
    KillWorker,
    LeaveAsked,
    MainThreadFailed,
    NodeOutcome,
    OutboxFull,
    PreemptionNoticed,
    PreloaderLost,
    PreloaderReady,
    PrepareWorker,
    ReportDeath,
    ReportUnfit,
    RestartKeeper,
    Say,
    StartOrdered,
    StartPreloader,
    StopAsked,
    TellEnded,
    TerminateWorker,
    TimePassed,
    Welcomed,
    WorkerDefied,
    WorkerForked,
    WorkerGone,
    WorkerHung,
    WorkerMoved,
    WorkerSpoke,
)
from .agent_state import INVARIANTS as INVARIANTS
from .agent_state import RUNS as RUNS
from .agent_state import AgentConfig as AgentConfig
from .agent_state import AgentPhase as AgentPhase
from .agent_state import AgentState, LocalWorker, WorkerStage
from .agent_state import new_agent as new_agent
from .agent_state import violations as violations

ALONE_S = 2.0  # without a message from a coordinator: then none may be running
UNFIT_S = 5.0  # how long a node that is not fit to join waits for the coordinator's answer
END_GRACE_S = 3.0  # of an elastic worker after the job has ended; an ordinary script has `shutdown_timeout_s`
STACKS_S = 1.0  # how long the agent waits for the stacks of a hung worker before it kills the worker
STORY = 16  # number of events that a state remembers for the message of IllegalAgentEvent
JOB_OVER = "the job is over"
NODE_LOST = "the node counts as lost"
FULL = "no coordinator has accepted the messages of this node, and their queue is full"


Result = tuple[AgentState, list[Instruction]]


# ---------------------------------------------------------------- joining and leaving the job


def _welcomed(state: AgentState, event: Welcomed, now: float) -> Result:
    return replace(state, phase=AgentPhase.CHECKING, since_s=0.0), [CheckHealth()]


def _health_checked(state: AgentState, event: HealthChecked, now: float) -> Result:
    if event.why:
        return replace(state, phase=AgentPhase.UNFIT, unfit=event.why, since_s=now), [ReportUnfit(event.why)]
    return replace(state, phase=AgentPhase.SERVING), [Announce(first=state.life == 1)]


def _refused(state: AgentState, event: JoinRefused, now: float) -> Result:
    return _conclude(state, NodeOutcome(False, f"the coordinator refused node {state.node}: {event.why}"), now)


def _unfit(state: AgentState, event: JoinRefused | TimePassed, now: float) -> Result:
    """The coordinator has acknowledged the report, or has not within UNFIT_S: the node ends."""
    if isinstance(event, TimePassed) and now - state.since_s <= UNFIT_S:
        return state, []
    why = f"node {state.node} is not fit to join: {state.unfit}; --es-health-check=off lets it join anyway"
    return _conclude(state, NodeOutcome(False, why, unfit=True), now)


def _fence_ordered(state: AgentState, event: FenceOrdered, now: float) -> Result:
    return _fence(state, event.why, now)


def _fence(state: AgentState, why: str, now: float) -> Result:
    """The node has been declared lost: it kills its workers, ends its keeper and asks to join again."""
    say = Say(f"this node counts as lost ({why}): its workers are stopped, and it asks to join again")
    state = replace(state, phase=AgentPhase.FENCED, since_s=now, alone_s=0.0, steps_alone=())
    state, dropped = _drop_waiting(state)
    workers, kills = _killed(state.workers.values(), NODE_LOST)
    state = _with(state, *workers)
    state = _with(state, *(replace(worker, silent=True) for worker in state.workers.values()))
    state, again = _rejoin(state, now)
    return state, [say, *dropped, *kills, EndKeeper(), *again]


def _rejoin(state: AgentState, now: float) -> Result:
    """Ask to join again once all workers are gone, unless this node was asked to stop."""
    if state.workers:
        return state, []
    if state.stop_why:
        return _conclude(state, _lost(state.stop_why), now)
    state = replace(state, phase=AgentPhase.REJOINING, life=state.life + 1)
    return state, [JoinAgain(state.node)]


def _lost(why: str) -> NodeOutcome:
    return NodeOutcome(False, f"this node counts as lost, and {why}")


def _still_out(state: AgentState, event: TimePassed, now: float) -> Result:
    """A node that could not join again within `rejoin_s` ends."""
    if now - state.since_s <= state.config.rejoin_s:
        return state, []
    return _conclude(state, _lost(f"no coordinator could be reached for {state.config.rejoin_s:g} s"), now)


def _ordered_to_end(state: AgentState, event: EndOrdered, now: float) -> Result:
    """Notify the workers that the job is over. If it failed, terminate them."""
    outcome = event.outcome
    state, dropped = _conclude(state, outcome, now)
    instructions = [*dropped, Say(outcome.why)] if outcome.left else dropped
    for worker in state.workers.values():
        instructions.append(TellEnded(worker.id, failed=worker.id.rank == outcome.rank))
        if (not outcome.succeeded or outcome.lost) and not worker.lost:
            instructions.append(TerminateWorker(worker.id, stopping=True))
    return state, instructions


def _conclude(state: AgentState, outcome: NodeOutcome, now: float) -> Result:
    """Record the outcome of the job for this node. Running workers may end by themselves within their grace."""
    state, dropped = _drop_waiting(state)
    state = replace(state, phase=AgentPhase.ENDING, outcome=outcome, since_s=now)
    return _empty(state), dropped


def _empty(state: AgentState) -> AgentState:
    return state if state.workers else replace(state, phase=AgentPhase.ENDED)


# ---------------------------------------------------------------- workers start


def _start_ordered(state: AgentState, event: StartOrdered, now: float) -> Result:
    running = {worker.id.rank for worker in state.workers.values() if not worker.leaves}
    ranks = [worker.rank for worker in event.workers]
    if running.intersection(ranks) or state.workers.keys() & set(event.workers):
        raise IllegalAgentEvent(state, event, f"of the ranks {ranks}, {sorted(running)} run already")
    try:
        local_ranks = state.local_ranks.give(ranks, running)
    except ValueError as error:
        raise IllegalAgentEvent(state, event, str(error)) from None
    added = {worker: LocalWorker(id=worker, local_rank=local_ranks[worker.rank]) for worker in event.workers}
    state = replace(state, workers={**state.workers, **added}, local_ranks=local_ranks, began=True)
    prepare: list[Instruction] = [PrepareWorker(w.id, w.local_rank, event.order) for w in added.values()]
    state, forks = _fork(state)
    return state, [*prepare, *forks]


def _fork(state: AgentState) -> Result:
    """Fork the waiting workers, once the earlier workers of their slots are gone and their resources are free."""
    if not state.preloaded or state.leaving or state.phase is not AgentPhase.SERVING:
        return state, []
    waiting = [worker for worker in state.workers.values() if worker.stage is WorkerStage.WAITING]
    asked = {worker.id: replace(worker, stage=WorkerStage.FORKING) for worker in waiting}
    return replace(state, workers={**state.workers, **asked}), [ForkWorker(worker) for worker in asked]


def _preloader_ready(state: AgentState, event: PreloaderReady, now: float) -> Result:
    return _fork(replace(state, preloaded=True))


def _preloader_lost(state: AgentState, event: PreloaderLost, now: float) -> Result:
    """The preloaded process has died, and its workers with it, each reported by its own event. Start another one."""
    back = {w.id: replace(w, stage=WorkerStage.WAITING) for w in state.workers.values() if _forks(w)}
    state = replace(state, preloaded=False, workers={**state.workers, **back})
    unwanted = [worker for worker in back.values() if worker.leaves or state.phase is not AgentPhase.SERVING]
    state, dropped = _drop(state, unwanted)
    if state.phase in (AgentPhase.ENDING, AgentPhase.ENDED):
        return _empty(state), dropped
    again: list[Instruction] = []
    if state.phase is AgentPhase.FENCED:
        state, again = _rejoin(state, now)
    return state, [*dropped, StartPreloader(), *again]


def _forks(worker: LocalWorker) -> bool:
    return worker.stage is WorkerStage.FORKING


def _forked(state: AgentState, event: WorkerForked, now: float) -> Result:
    """A worker has been forked: carry out what was decided about it meanwhile."""
    worker = _worker(state, event)
    if not _forks(worker):
        raise IllegalAgentEvent(state, event, f"the worker is {worker.stage.value}")
    why = worker.killed or (JOB_OVER if state.phase is AgentPhase.ENDING else "")
    state = _with(state, replace(worker, stage=WorkerStage.RUNNING, killed=why))
    if why:
        return state, [KillWorker(worker.id, why)]
    return state, [TerminateWorker(worker.id)] if worker.silent else []


# ---------------------------------------------------------------- workers end


def _kill_ordered(state: AgentState, event: KillOrdered, now: float) -> Result:
    """End workers for a restart as torchrun does, with SIGTERM first."""
    deadline_s = now + state.config.shutdown_timeout_s
    found = [state.workers[worker] for worker in event.workers if worker in state.workers]
    found = [worker for worker in found if not worker.leaves]
    state, dropped = _drop(state, [worker for worker in found if worker.stage is WorkerStage.WAITING])
    ended = {w.id: replace(w, silent=True, deadline_s=deadline_s) for w in found if w.id in state.workers}
    asked: list[Instruction] = [TerminateWorker(w.id) for w in ended.values() if w.stage is WorkerStage.RUNNING]
    return replace(state, workers={**state.workers, **ended}), [ForgetFailures(), *dropped, *asked]


def _spoke(state: AgentState, event: WorkerSpoke, now: float) -> Result:
    return _with(state, replace(_worker(state, event), elastic=True)), []


def _moved(state: AgentState, event: WorkerMoved, now: float) -> Result:
    return _with(state, replace(_worker(state, event), stacks_s=0.0)), []


def _hung(state: AgentState, event: WorkerHung, now: float) -> Result:
    """Request the stacks of a hung worker, and kill it once it has written them; unless it makes progress first."""
    worker = _worker(state, event)
    if worker.killed:
        return state, []
    if not worker.stacks_s:
        return _with(state, replace(worker, stacks_s=now)), [AskStacks(worker.id)]
    if not event.stopped and not event.stacks and now - worker.stacks_s < STACKS_S:
        return state, []
    return _with(state, replace(worker, killed="hung")), [KillHung(worker.id)]


def _defied(state: AgentState, event: WorkerDefied, now: float) -> Result:
    workers, kills = _killed([_worker(state, event)], event.why)
    return _with(state, *workers), kills


def _main_thread_failed(state: AgentState, event: MainThreadFailed, now: float) -> Result:
    """The worker is lost. The agent reports it before the kernel has freed the worker's memory."""
    worker = _worker(state, event)
    return _with(state, replace(worker, lost=True)), _report(state, worker)


def _gone(state: AgentState, event: WorkerGone, now: float) -> Result:
    worker = _worker(state, event)
    if worker.stage is not WorkerStage.RUNNING:
        raise IllegalAgentEvent(state, event, f"the worker is {worker.stage.value}")
    report = _report(state, worker)
    state = replace(state, workers={name: other for name, other in state.workers.items() if name != worker.id})
    if state.phase is AgentPhase.ENDING:
        return _empty(state), report
    state, more = _rejoin(state, now) if state.phase is AgentPhase.FENCED else _fork(state)
    return state, [*report, *more]


def _report(state: AgentState, worker: LocalWorker) -> list[Instruction]:
    """Report a worker's end once, unless the agent ended it by order or the job is over."""
    return [] if worker.leaves or state.phase is not AgentPhase.SERVING else [ReportDeath(worker.id)]


# ---------------------------------------------------------------- asked to stop, and time


def _stop_asked(state: AgentState, event: StopAsked, now: float) -> Result:
    if state.phase is AgentPhase.REJOINING:
        return _conclude(state, _lost(event.why), now)
    if state.phase is AgentPhase.FENCED:  # reports the stop when its workers have ended
        return replace(state, stop_why=event.why), []
    again = bool(state.stop_why) and state.phase is not AgentPhase.JOINING
    state = replace(state, stop_why=event.why)
    state, ends = _end_at_once(state, event.why, now) if again else (state, [])
    return state, [*ends, AskStop(event.why)]


def _leave_asked(state: AgentState, event: LeaveAsked, now: float) -> Result:
    if state.stop_why or state.phase in (AgentPhase.FENCED, AgentPhase.REJOINING):
        return _stop_asked(state, StopAsked(event.why), now)
    return replace(state, stop_why=event.why), [AskDrain(event.why)]


def _preemption_noticed(state: AgentState, event: PreemptionNoticed, now: float) -> Result:
    """Request a drain, as on SIGTERM. A signal that follows is the first one: it does not end the node at once."""
    if state.phase in (AgentPhase.FENCED, AgentPhase.REJOINING):  # to join again would not help
        return _stop_asked(state, StopAsked(event.why), now)
    return state, [AskDrain(event.why)]


def _outbox_full(state: AgentState, event: OutboxFull, now: float) -> Result:
    return _end_at_once(state, FULL, now)


def _end_at_once(state: AgentState, why: str, now: float) -> Result:
    state, dropped = _conclude(state, NodeOutcome(False, why), now)
    workers, kills = _killed(state.workers.values(), why)
    return _with(state, *workers), [*dropped, *kills]


def _keeper_lost(state: AgentState, event: KeeperLost, now: float) -> Result:
    """Start another keeper on the same port and under the same name: the workers pass it their segments again."""
    return state, [RestartKeeper()]


def _serving(state: AgentState, event: TimePassed, now: float) -> Result:
    state, alone = _alone_for(state, event, now)
    if alone > state.config.coordinator_wait_s:
        return _fence(state, f"no word from a coordinator for {event.unheard_s:.0f} s, and no progress", now)
    late = [worker for worker in state.workers.values() if worker.deadline_s and now > worker.deadline_s]
    workers, kills = _killed(late, "it did not end when asked to")
    return _with(state, *workers), kills


def _alone_for(state: AgentState, event: TimePassed, now: float) -> tuple[AgentState, float]:
    """How long this node has been without a coordinator and without a connection to other members.


    While its workers commit steps the count stays at 0: only the coordinator is away, and it is expected to return.
    """
    if event.after or event.unheard_s < ALONE_S:
        return replace(state, alone_s=0.0) if state.alone_s else state, 0.0
    if not state.alone_s or event.steps != state.steps_alone:
        state = replace(state, alone_s=now, steps_alone=event.steps)
    return state, now - state.alone_s


def _ending(state: AgentState, event: TimePassed, now: float) -> Result:
    late = [worker for worker in state.workers.values() if now - state.since_s > _grace_s(state, worker)]
    workers, kills = _killed(late, JOB_OVER)
    return _with(state, *workers), kills


def _grace_s(state: AgentState, worker: LocalWorker) -> float:
    return END_GRACE_S if worker.elastic else state.config.shutdown_timeout_s


def _noted(state: AgentState, event: Event, now: float) -> Result:
    """Record the event; it requires no action in this phase."""
    return state, []


# ---------------------------------------------------------------- parts


def _worker(state: AgentState, event: Any) -> LocalWorker:
    worker = state.workers.get(event.worker)
    if worker is None:
        raise IllegalAgentEvent(state, event, f"there is no worker {event.worker} here")
    return worker


def _with(state: AgentState, *workers: LocalWorker) -> AgentState:
    changed = {worker.id: worker for worker in workers}
    return replace(state, workers={**state.workers, **changed}) if changed else state


def _killed(workers: Iterable[LocalWorker], why: str) -> tuple[list[LocalWorker], list[Instruction]]:
    """Kill each of these workers once; a worker that is being forked is killed as soon as it exists."""
    alive = [worker for worker in workers if not worker.killed]
    kills: list[Instruction] = [KillWorker(w.id, why) for w in alive if w.stage is WorkerStage.RUNNING]
    return [replace(worker, killed=why) for worker in alive], kills


def _drop(state: AgentState, workers: Iterable[LocalWorker]) -> Result:
    dropped = [worker.id for worker in workers]
    kept = {name: worker for name, worker in state.workers.items() if name not in dropped}
    return replace(state, workers=kept), [DropWorker(worker) for worker in dropped]


def _drop_waiting(state: AgentState) -> Result:
    return _drop(state, [worker for worker in state.workers.values() if worker.stage is WorkerStage.WAITING])


# ---------------------------------------------------------------- the table

_P = AgentPhase
Handler = Callable[[AgentState, Any, float], Result]
Table = dict[tuple[AgentPhase, type[Any]], Handler]


def _in(
    phases: Iterable[AgentPhase], event: type[Any], handler: Handler
) -> dict[tuple[AgentPhase, type[Any]], Handler]:
    return {(phase, event): handler for phase in phases}


_NOT_OVER = tuple(phase for phase in AgentPhase if phase not in (_P.ENDING, _P.ENDED))
HANDLED: Table = {
    **_in([_P.JOINING, _P.REJOINING], Welcomed, _welcomed),
    **_in([_P.CHECKING], HealthChecked, _health_checked),
    **_in(_NOT_OVER, JoinRefused, _refused),
    **_in([_P.UNFIT], JoinRefused, _unfit),
    **_in([_P.JOINING, _P.CHECKING, _P.SERVING], FenceOrdered, _fence_ordered),
    **_in([_P.SERVING], StartOrdered, _start_ordered),
    **_in([_P.SERVING], KillOrdered, _kill_ordered),
    **_in(_NOT_OVER, EndOrdered, _ordered_to_end),
    **_in(AgentPhase, PreloaderReady, _preloader_ready),
    **_in(AgentPhase, PreloaderLost, _preloader_lost),
    **_in(RUNS, WorkerForked, _forked),
    **_in(RUNS, WorkerSpoke, _spoke),
    **_in(RUNS, WorkerMoved, _moved),
    **_in([_P.SERVING, _P.ENDING], WorkerHung, _hung),
    **_in(RUNS, WorkerDefied, _defied),
    **_in(RUNS, MainThreadFailed, _main_thread_failed),
    **_in(RUNS, WorkerGone, _gone),
    **_in([_P.SERVING], KeeperLost, _keeper_lost),
    **_in([_P.JOINING, _P.CHECKING, _P.SERVING], OutboxFull, _outbox_full),
    **_in(_NOT_OVER, StopAsked, _stop_asked),
    **_in(_NOT_OVER, LeaveAsked, _leave_asked),
    **_in(_NOT_OVER, PreemptionNoticed, _preemption_noticed),
    **_in([_P.JOINING, _P.CHECKING, _P.FENCED, _P.ENDED], TimePassed, _noted),
    **_in([_P.UNFIT], TimePassed, _unfit),
    **_in([_P.SERVING], TimePassed, _serving),
    **_in([_P.REJOINING], TimePassed, _still_out),
    **_in([_P.ENDING], TimePassed, _ending),
}
# Events that may still arrive after the node was fenced, or after the job ended for it.
_ORDERS = (Welcomed, JoinRefused, FenceOrdered, StartOrdered, KillOrdered, EndOrdered)
_ASKED = (StopAsked, LeaveAsked, PreemptionNoticed)
_REST = (HealthChecked, KeeperLost, OutboxFull)
LATE = frozenset(
    {
        *((phase, event) for phase in (_P.ENDING, _P.ENDED) for event in (*_ORDERS, *_REST, *_ASKED)),
        *((_P.FENCED, event) for event in (Welcomed, FenceOrdered, StartOrdered, KillOrdered, WorkerHung, *_REST)),
        *((_P.REJOINING, event) for event in (FenceOrdered, *_REST)),
        *((_P.UNFIT, event) for event in (FenceOrdered, OutboxFull)),
    }
)


class IllegalAgentEvent(AssertionError):
    """An event that is impossible in this phase: a bug of executor or coordinator. Its message names earlier events."""

    def __init__(self, state: AgentState, event: Event, why: str = "") -> None:
        before = ", ".join(state.story) or "nothing"
        super().__init__(
            f"node {state.node} is {state.phase.value}, where {type(event).__name__} cannot happen"
            f"{why and f' ({why})'}; what happened before: {before}"
        )


def step(state: AgentState, event: Event, now: float) -> Result:
    """Return the next state and the instructions. Raises IllegalAgentEvent, and changes nothing, for an illegal one."""
    place = (state.phase, type(event))
    handler = HANDLED.get(place)
    if handler is None:
        if place in LATE:
            return replace(state, late=state.late + 1), []
        raise IllegalAgentEvent(state, event)
    after, instructions = handler(state, event, now)
    if isinstance(event, TimePassed) and not instructions and after.phase is state.phase:
        return after, []  # repeats with every look, so the story leaves it out
    told = f"{state.phase.value}: {type(event).__name__}"
    return replace(after, story=(*state.story[1 - STORY :], told)), instructions
