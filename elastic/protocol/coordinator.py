"""The coordinator's decisions, as a pure function: `step(state, event, now) -> (state, effects)`.

No clock, socket or thread is here; the gRPC service and the simulator both drive this one function. An event that
does not fit (an older incarnation, another generation, a repeated message) changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...resharding.layout import LayoutError
from ...resharding.plan import Plan, PlanError, Report, plan_join, plan_recovery, plan_start
from ...resharding.planners import initial_layout
from . import events as e
from .state import Config, Node, Phase, Recovery, State, Status, Worker

Effects = list[e.Effect]
Outcome = tuple[State, Effects]


def initial_state(config: Config, now: float) -> State:
    """A job that nobody has joined."""
    return State(config=config, formed_s=now)


def step(state: State, event: e.Event, now: float) -> Outcome:
    """What follows from `event` at time `now` (seconds, any origin)."""
    if state.phase is Phase.DONE:
        return state, []
    handler: Callable[[State, Any, float], Outcome] = _HANDLERS[type(event)]
    return handler(state, event, now)


# ---------------------------------------------------------------- forming


def _node_joined(state: State, event: e.NodeJoined, now: float) -> Outcome:
    if event.node in state.nodes:
        return state, []
    if len(state.nodes) >= state.config.max_nodes:
        return state, [e.RefuseNode(event.node, f"the job has its {state.config.max_nodes} nodes already")]
    if state.phase is not Phase.FORMING and not state.elastic:
        return state, [e.RefuseNode(event.node, "the job is running and its script is not elastic")]
    order = event.order if event.order >= 0 else len(state.nodes)
    node = Node(event.node, event.host, event.slots, event.keeper, now)
    nodes = {**state.nodes, event.node: node}
    record = e.Record("node_joined", {"node": event.node, "host": event.host, "slots": event.slots, "order": order})
    if state.phase is not Phase.FORMING:
        state, effects = _add_workers(replace(state, nodes=nodes), node)
        return state, [record, *effects]
    formed_s = now if len(nodes) == state.config.min_nodes else state.formed_s
    if event.order >= 0:
        ordered = list(state.nodes.items())
        ordered.insert(event.order, (event.node, node))
        nodes = dict(ordered)
    state = replace(state, nodes=nodes, formed_s=formed_s)
    if len(nodes) == state.config.max_nodes:
        state, effects = _launch(state)
        return state, [record, *effects]
    return state, [record]


def _launch(state: State) -> Outcome:
    """Start every worker on every node, ranks in the order of the nodes."""
    workers: dict[int, Worker] = {}
    for node in state.nodes.values():
        for _ in range(node.slots):
            rank = len(workers)
            incarnation = state.workers[rank].id.incarnation + 1 if rank in state.workers else 0
            workers[rank] = Worker(e.WorkerId(rank, incarnation), node.name)
    state = replace(state, phase=Phase.LAUNCHED, workers=workers)
    return state, [_start(state, node.name) for node in state.nodes.values()]


def _add_workers(state: State, node: Node) -> Outcome:
    workers = dict(state.workers)
    for _ in range(node.slots):
        rank = max(workers, default=-1) + 1
        workers[rank] = Worker(e.WorkerId(rank, 0), node.name)
    state = replace(state, workers=workers)
    return state, [_start(state, node.name)]


def _start(state: State, node: str, only: e.WorkerId | None = None) -> e.StartWorkers:
    started = tuple(w.id for w in state.workers.values() if w.node == node and only in (None, w.id))
    return e.StartWorkers(node, started, len(state.workers), state.restarts)


def _ticked(state: State, event: e.Ticked, now: float) -> Outcome:
    config = state.config
    if state.phase is Phase.FORMING:
        if len(state.nodes) >= config.min_nodes:
            return _launch(state) if now - state.formed_s >= config.last_call_s else (state, [])
        if now - state.formed_s >= config.join_timeout_s:
            return _fail(
                state,
                f"only {len(state.nodes)} of at least {config.min_nodes} nodes joined in {config.join_timeout_s:g} s:"
                " start the others, or lower --nnodes",
            )
    for node in state.nodes.values():
        if now - node.heard_s > config.heartbeat_timeout_s:
            why = f"no heartbeat for {now - node.heard_s:.1f} s"
            return _node_lost(state, e.NodeLost(node.name, why), now)
    return state, []


def _heartbeat(state: State, event: e.HeartbeatReceived, now: float) -> Outcome:
    node = state.nodes.get(event.node)
    if node is None:
        return state, []
    return replace(state, nodes={**state.nodes, node.name: replace(node, heard_s=now)}), []


def _node_lost(state: State, event: e.NodeLost, now: float) -> Outcome:
    if event.node not in state.nodes:
        return state, []
    lost = state.nodes[event.node]
    nodes = {name: node for name, node in state.nodes.items() if name != event.node}
    gone = replace(state, nodes=nodes)
    record = e.Record("node_lost", {"node": event.node, "why": event.why})
    if state.phase is Phase.FORMING:
        return gone, [record]
    ranks = sorted(w.id.rank for w in state.workers.values() if w.node == event.node)
    state, effects = _fail(
        state,
        f"node {event.node} ({lost.host}) with ranks {ranks} is lost ({event.why}), and with it the only copy of their "
        "shards: snapshots are kept on the worker's own node only",
    )
    return state, [record, *effects]


# ---------------------------------------------------------------- workers


def _current(state: State, worker: e.WorkerId) -> Worker | None:
    """The worker, unless it is unknown or has been replaced."""
    known = state.workers.get(worker.rank)
    return known if known is not None and known.id == worker else None


def _with(state: State, *workers: Worker) -> State:
    return replace(state, workers={**state.workers, **{w.id.rank: w for w in workers}})


def _declared_elastic(state: State, event: e.WorkerDeclaredElastic, now: float) -> Outcome:
    if state.elastic or _current(state, event.worker) is None:
        return state, []
    return replace(state, elastic=True), []


def _ready(state: State, event: e.WorkerReady, now: float) -> Outcome:
    worker = _current(state, event.worker)
    if worker is None or worker.status is not Status.STARTING:
        return state, []
    if state.job is not None and event.job != state.job:
        return _fail(state, _difference(state.job, event.job, event.worker.rank))
    state = _with(state, replace(worker, status=Status.READY, peer=event.peer))
    state = replace(state, elastic=True, job=event.job)
    if state.phase is Phase.LAUNCHED:
        return _begin_training(state) if _all_ready(state) else (state, [])
    if state.phase is Phase.RECOVERING:
        return _plan_if_complete(state, now)
    return _prepare_join(state, now)


def _difference(ours: e.Job, theirs: e.Job, rank: int) -> str:
    for name in ("steps", "stages", "micro_batches", "global_batch_size", "seed"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            return f"rank {rank} has {name} = {other}, the others {mine}: give every rank the same settings"
    if ours.model != theirs.model:
        names = [p.name for p in ours.model.parameters]
        others = [p.name for p in theirs.model.parameters]
        odd = sorted(set(names) ^ set(others))[:3]
        shown = f" (for example {', '.join(odd)})" if odd else ""
        return f"rank {rank} built another model than the others{shown}: build the same model on every rank"
    if ours.optimizer != theirs.optimizer:
        return (
            f"rank {rank} built another optimizer than the others ({theirs.optimizer}, not {ours.optimizer}): "
            "build the same one on every rank"
        )
    return (
        f"rank {rank} initialised its model with other values than the others: use the same seed (or load the same "
        "weights) on every rank"
    )


def _all_ready(state: State) -> bool:
    return all(w.status is Status.READY for w in state.workers.values())


def _begin_training(state: State) -> Outcome:
    job = state.job
    assert job is not None
    try:
        layout = initial_layout(job.model, sorted(state.workers), job.stages, job.micro_batches)
    except LayoutError as error:
        return _fail(state, str(error))
    layout = replace(layout, generation=state.generation + 1)
    return _enter(state, plan_start(layout), "started", {"layout": layout.describe()})


def _enter(state: State, plan: Plan, event: str, fields: dict[str, Any]) -> Outcome:
    """Make every rank of the plan a member and let all carry it out."""
    members = [
        w if w.status is Status.FINISHED else replace(w, status=Status.MEMBER)
        for w in state.workers.values()
        if w.id.rank in plan.layout.ranks
    ]
    state = replace(
        _with(state, *members),
        phase=Phase.RUNNING,
        generation=plan.generation,
        layout=plan.layout,
        join=None,
    )
    record = e.Record(event, {"generation": plan.generation, "plan": plan.digest, **fields})
    return state, [*_carry_out(state, plan), record]


def _carry_out(state: State, plan: Plan) -> Effects:
    members = [state.workers[rank] for rank in plan.layout.ranks]
    peers = {w.id.rank: w.peer for w in members if w.peer is not None}
    keepers = tuple(node.keeper for node in state.nodes.values())
    return [e.CarryOut(w.id, plan, peers, keepers) for w in members]


# ---------------------------------------------------------------- losses


def _died(state: State, event: e.WorkerDied, now: float) -> Outcome:
    worker = _current(state, event.worker)
    if worker is None or worker.status is Status.EXITED:
        return state, []
    if not state.elastic:
        return _classic_exit(state, worker, event)
    record = e.Record(
        "worker_died",
        {
            "rank": worker.id.rank,
            "incarnation": worker.id.incarnation,
            "node": worker.node,
            "cause": event.cause,
            "step": event.step,
            "phase": event.phase,
        },
    )
    deaths = worker.deaths + 1
    if deaths >= state.config.crash_limit:
        why = f"rank {worker.id.rank} died {deaths} times without a committed step between ({event.cause}): giving up"
        state, effects = _fail(state, why, rank=worker.id.rank)
        return state, [record, *effects]
    trained = worker.status is Status.MEMBER and state.job is not None and state.committed + 1 >= state.job.steps
    heir = Worker(
        e.WorkerId(worker.id.rank, worker.id.incarnation + 1),
        worker.node,
        deaths=deaths,
        owes_end=trained or worker.owes_end,
    )
    was_member = worker.status in (Status.MEMBER, Status.FINISHED)
    joining = state.join is not None and worker.id.rank in state.join.layout.ranks
    state = _with(state, heir)
    replaced: Effects = [record, _start(state, worker.node, heir.id)]
    if state.phase is Phase.RECOVERING:
        assert state.recovery is not None
        if worker.id not in state.recovery.awaited:
            return state, replaced
    elif not (was_member or joining):
        return state, replaced
    state, more = _begin_recovery(state, event, now)
    return state, [*more, *replaced]


def _begin_recovery(state: State, cause: e.WorkerDied | None, now: float) -> Outcome:
    """Abort the generation and ask everyone who may hold something for a report."""
    generation = state.generation + 1
    asked = list(state.members())
    if state.join is not None:
        asked += [
            w for w in state.workers.values() if w.status is Status.READY and w.id.rank in state.join.layout.ranks
        ]
    earlier = state.recovery  # under way, or over but for the next commit: one story, one line in the log
    if earlier is not None and state.phase is Phase.RECOVERING:
        asked += [w for w in state.workers.values() if w.id in earlier.awaited and w not in asked]
    died = (cause.worker,) if cause else ()
    detected_s = cause.detected_at_s if cause and cause.detected_at_s else now
    killed_s = cause.killed_at_s if cause and cause.killed_at_s else detected_s
    recovery = Recovery(
        generation=generation,
        why=earlier.why if earlier else (cause.cause if cause else "a worker joins"),
        dead=(earlier.dead if earlier else ()) + died,
        step=earlier.step if earlier else (cause.step if cause else -1),
        phase=earlier.phase if earlier else (cause.phase if cause else ""),
        lost_micro_batches=(earlier.lost_micro_batches if earlier else 0)
        + (cause.finished_micro_batches if cause else 0),
        killed_s=earlier.killed_s if earlier else killed_s,
        detected_s=earlier.detected_s if earlier else detected_s,
        started_s=earlier.started_s if earlier else now,
        lost_steps=earlier.lost_steps if earlier else 0,
        join=state.join or (earlier.join if earlier else None),
        awaited=frozenset(w.id for w in asked),
    )
    state = replace(state, phase=Phase.RECOVERING, generation=generation, recovery=recovery, join=None)
    aborts: Effects = [e.AbortGeneration(w.id, generation) for w in asked]
    state, effects = _plan_if_complete(state, now)
    return state, [*aborts, *effects]


def _reported(state: State, event: e.WorkerReported, now: float) -> Outcome:
    recovery = state.recovery
    if (
        state.phase is not Phase.RECOVERING
        or recovery is None
        or event.generation != recovery.generation
        or event.worker not in recovery.awaited
    ):
        return state, []
    reports = {**recovery.reports, event.worker: event.report}
    recovery = replace(recovery, reports=reports, busy_s=max(recovery.busy_s, event.busy_s))
    return _plan_if_complete(replace(state, recovery=recovery), now)


def _plan_if_complete(state: State, now: float) -> Outcome:
    recovery, job = state.recovery, state.job
    assert recovery is not None
    assert job is not None
    live = {w.id for w in state.workers.values()}
    if any(worker not in recovery.reports for worker in recovery.awaited & live):
        return state, []
    reports = [report for worker, report in recovery.reports.items() if worker in live]
    reported = {report.rank for report in reports}
    ready = [w for w in state.workers.values() if w.status is Status.READY and w.id.rank not in reported]
    reports += [Report(rank=w.id.rank, generation=0, fresh=True) for w in ready]
    starting = any(w.status is Status.STARTING for w in state.workers.values())
    if starting and all(report.fresh for report in reports):
        return state, []  # nobody is left who was training: start, with all replacements, from what the keepers hold
    try:
        plan = _recovery_plan(state, job, reports)
    except (LayoutError, PlanError) as error:
        return _fail(state, f"generation {recovery.generation} cannot be planned, which is a bug of everstep: {error}")
    assert plan.version is not None
    if plan.version - 1 > state.agreed:
        state = replace(state, agreed=plan.version - 1, agreement=plan.agreement)
    if plan.version != recovery.step:  # the interrupted step had been agreed on: nothing of it is computed again
        recovery = replace(recovery, lost_micro_batches=0)
    assert plan.version is not None
    lost_steps = max(recovery.lost_steps, state.committed + 1 - plan.version)
    recovery = replace(recovery, planned_s=now, lost_steps=lost_steps)
    return _enter(replace(state, recovery=recovery), plan, "planned", {"summary": plan.describe()})


def _recovery_plan(state: State, job: e.Job, reports: list[Report]) -> Plan:
    """Forward to the newest step known to be agreed on; from the seed again if all are fresh and there is none."""
    assert state.layout is not None
    assert state.recovery is not None
    if state.agreed < 0 and all(report.fresh for report in reports):
        ranks = sorted(report.rank for report in reports)
        layout = initial_layout(job.model, ranks, job.stages, job.micro_batches)
        return plan_start(replace(layout, generation=state.generation))
    # A join that nobody switched to has cost nothing; who holds what is taken from the reports in either case.
    join, entered = state.recovery.join, max(report.generation for report in reports)
    old = join.layout if join is not None and entered >= join.generation else state.layout
    return plan_recovery(job.model, old, reports, state.generation, (state.agreed, state.agreement))


def _resumed(state: State, event: e.WorkerResumed, now: float) -> Outcome:
    recovery = state.recovery
    if recovery is None or event.generation != recovery.generation or _current(state, event.worker) is None:
        return state, []
    resumed = {**recovery.resumed, event.worker: (event.edit_s, event.restore_s)}
    return replace(state, recovery=replace(recovery, resumed=resumed, resumed_s=now)), []


# ---------------------------------------------------------------- joins


def _prepare_join(state: State, now: float) -> Outcome:
    """Offer a plan that takes in every ready worker; the members switch to it by themselves at a step boundary."""
    joiners = sorted(w.id.rank for w in state.workers.values() if w.status is Status.READY)
    if state.phase is not Phase.RUNNING or state.join is not None or not joiners:
        return state, []
    assert state.job is not None
    assert state.layout is not None
    if any(w.status is Status.FINISHED for w in state.members()):
        return _begin_recovery(state, None, now)
    plan = plan_join(state.job.model, state.layout, joiners, state.generation + 1)
    state = replace(state, generation=plan.generation, join=plan)
    record = e.Record("join_prepared", {"generation": plan.generation, "ranks": joiners})
    return state, [*_carry_out(state, plan), record]


def _switched(state: State, event: e.WorkerSwitched, now: float) -> Outcome:
    plan = state.join
    if plan is None or event.generation != plan.generation or _current(state, event.worker) is None:
        return state, []
    state, joined = _let_in(state, plan)
    state, effects = _prepare_join(state, now)
    return state, [*joined, *effects]


def _let_in(state: State, plan: Plan) -> Outcome:
    """The members have switched to a join plan: those it takes in are members."""
    joined = [
        replace(w, status=Status.MEMBER)
        for w in state.workers.values()
        if w.status is Status.READY and w.id.rank in plan.layout.ranks
    ]
    state = replace(_with(state, *joined), layout=plan.layout, join=None)
    fields = {
        "generation": plan.generation,
        "ranks": [w.id.rank for w in joined],
        "layout": plan.layout.describe(),
    }
    return state, [e.Record("joined", fields)]


def _idled(state: State, event: e.WorkerIdled, now: float) -> Outcome:
    if state.join is None or event.generation != state.join.generation or _current(state, event.worker) is None:
        return state, []
    return _begin_recovery(state, None, now)


# ---------------------------------------------------------------- progress and end


def _committed(state: State, event: e.WorkerCommitted, now: float) -> Outcome:
    layout = state.layout
    if _current(state, event.worker) is None or event.step <= state.committed or layout is None:
        return state, []
    workers = {rank: replace(w, deaths=0) for rank, w in state.workers.items()}
    state = replace(state, committed=event.step, workers=workers)
    if event.step > state.agreed:
        state = replace(state, agreed=event.step, agreement=event.agreement)
    fields = {
        "step": event.step,
        "loss": event.loss,
        "digest": event.digest,
        "generation": layout.generation,
        "layout": layout.describe(),
    }
    effects: Effects = [e.Record("committed", fields)]
    if state.phase is Phase.RUNNING and state.recovery is not None:
        effects.append(_recovered(state.recovery, event.step, now))
        state = replace(state, recovery=None)
    return state, effects


def _recovered(recovery: Recovery, step: int, now: float) -> e.Record:
    """The log line of a recovery: its phases in seconds, which add up to the total."""
    detect_s = recovery.detected_s - recovery.killed_s
    abort_s = max(0.0, recovery.started_s - recovery.detected_s)
    agree_s = max(0.0, recovery.planned_s - recovery.started_s - recovery.busy_s)
    edit_s = max((times[0] for times in recovery.resumed.values()), default=0.0)
    restore_s = max((times[1] for times in recovery.resumed.values()), default=0.0)
    total_s = now - recovery.killed_s
    return e.Record(
        "recovered",
        {
            "generation": recovery.generation,
            "why": recovery.why,
            "ranks": [worker.rank for worker in recovery.dead],
            "interrupted_step": recovery.step,
            "phase": recovery.phase,
            "redone_micro_batches": recovery.lost_micro_batches,
            "lost_steps": recovery.lost_steps,
            "detect_s": detect_s,
            "abort_s": abort_s,
            "agree_s": agree_s,
            "edit_s": edit_s,
            "restore_s": restore_s,
            "recompute_s": max(0.0, total_s - detect_s - abort_s - agree_s - edit_s - restore_s),
            "total_s": total_s,
            "step": step,
        },
    )


def _finished(state: State, event: e.WorkerFinished, now: float) -> Outcome:
    worker = _current(state, event.worker)
    if worker is None or worker.status not in (Status.READY, Status.MEMBER):
        return state, []
    effects: Effects = []
    if worker.status is Status.READY and state.join is not None:
        # It joined at the last step's end, and says so before any of those who let it in.
        state, effects = _let_in(state, state.join)
    state = _with(state, replace(worker, status=Status.FINISHED, owes_end=False))
    if state.phase is Phase.RUNNING and _all_finished(state):
        return replace(state, phase=Phase.DONE), [*effects, e.EndJob(True)]
    state, more = _begin_recovery(state, None, now) if state.join is not None else _prepare_join(state, now)
    return state, [*effects, *more]


def _all_finished(state: State) -> bool:
    """Whether the user's function has returned wherever it got to the last step."""
    return all(w.status is Status.FINISHED for w in state.members()) and not any(
        w.owes_end for w in state.workers.values()
    )


def _raised(state: State, event: e.WorkerRaised, now: float) -> Outcome:
    if _current(state, event.worker) is None:
        return state, []
    if not state.elastic:
        return state, []  # a classic job: its exit follows, and restarts decide
    return _fail(state, event.message, event.traceback, event.worker.rank)


def _stop_requested(state: State, event: e.StopRequested, now: float) -> Outcome:
    return _fail(state, event.why)


def _fail(state: State, why: str, detail: str = "", rank: int = -1) -> Outcome:
    return replace(state, phase=Phase.DONE), [e.EndJob(False, why, detail, rank)]


def _classic_exit(state: State, worker: Worker, event: e.WorkerDied) -> Outcome:
    """Torchrun's own rule: all workers start again after a failure, up to `max_restarts` times."""
    if event.clean:
        state = _with(state, replace(worker, status=Status.EXITED))
        if all(w.status is Status.EXITED for w in state.workers.values()):
            return replace(state, phase=Phase.DONE), [e.EndJob(True)]
        return state, []
    if state.restarts >= state.config.max_restarts:
        return _fail(state, f"rank {worker.id.rank} failed: {event.cause}", rank=worker.id.rank)
    kills: Effects = [
        e.KillWorkers(node, tuple(w.id for w in state.workers.values() if w.node == node)) for node in state.nodes
    ]
    record = e.Record("restarted", {"rank": worker.id.rank, "cause": event.cause, "restart": state.restarts + 1})
    state, effects = _launch(replace(state, restarts=state.restarts + 1))
    return state, [record, *kills, *effects]


_HANDLERS: dict[type[Any], Callable[[State, Any, float], Outcome]] = {
    e.NodeJoined: _node_joined,
    e.NodeLost: _node_lost,
    e.HeartbeatReceived: _heartbeat,
    e.WorkerDeclaredElastic: _declared_elastic,
    e.WorkerReady: _ready,
    e.WorkerDied: _died,
    e.WorkerReported: _reported,
    e.WorkerResumed: _resumed,
    e.WorkerSwitched: _switched,
    e.WorkerIdled: _idled,
    e.WorkerCommitted: _committed,
    e.WorkerFinished: _finished,
    e.WorkerRaised: _raised,
    e.StopRequested: _stop_requested,
    e.Ticked: _ticked,
}
