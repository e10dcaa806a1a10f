"""Recovery from a lost worker: abort the generation, collect reports, make a plan, distribute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from everstep.resharding.layout import Layout, LayoutError
from everstep.resharding.lines import forked
from everstep.resharding.plan import (
    Plan,
    PlanError,
    Report,
    plan_recovery,
    plan_resume,
    plan_rollback,
    plan_start,
)
from everstep.resharding.planners import change_layout, initial_layout
from everstep.resharding.stages import fewest_stages

from . import events as e
from .causes import Cause, Ending
from .leaving import nobody_left, still_needed, without_the_left
from .migrating import rebalanced, still_asked
from .outcome import (
    Effects,
    Outcome,
    current,
    end_with_loss,
    fail,
    has_trained,
    last_version,
    start_workers,
    with_workers,
)
from .protection import (
    memory_needed,
    outliving,
    placement_for,
    protected_now,
    resumable,
    resume_plan,
    stand_in,
    statements,
    still_missing,
    target,
    too_small,
    worker_memory,
)
from .restarts import classic_exit
from .state import (
    Loss,
    Phase,
    RecoveryStory,
    State,
    Status,
    Worker,
)

MICRO_BATCHES_PER_RANK = 4  # of a stage: with so many, the rank with the most has a quarter more than the others


def died(state: State, event: e.WorkerDied, now: float) -> Outcome:
    """A worker is gone: start its replacement, and recover if the worker held state."""
    worker = current(state, event.worker)
    if worker is None or worker.status is Status.EXITED:
        return state, []
    if not state.elastic:
        return classic_exit(state, worker, event)
    record = e.Record(
        "worker_died",
        {
            "rank": worker.id.rank,
            "incarnation": worker.id.incarnation,
            "node": worker.node,
            "cause": event.cause,
            "step": event.step,
            "phase": event.phase,
            **({"hang": event.hang, "stacks": event.stacks} if event.hang else {}),
        },
    )
    if event.clean and worker.status is Status.MEMBER:
        state, effects = _ended_its_process(state, worker, event, now)
        return state, [record, *effects]
    worker = _counted(worker, event)
    if worker.deaths >= state.config.crash_limit or worker.hangs >= state.config.hang_limit:
        times = f"died {worker.deaths} times" if event.hang != "alive" else f"was considered hung {worker.hangs} times"
        why = f"rank {worker.id.rank} {times} without a committed step between ({event.cause}): giving up"
        state, effects = fail(state, Ending.WORKER_FAILED, why, rank=worker.id.rank)
        return state, [record, *effects]
    was_member = worker.status in (Status.MEMBER, Status.FINISHED) or still_needed(state, worker)
    joining = state.join is not None and worker.id.rank in state.join.layout.ranks
    state, effects = _replaced(state, worker)
    replaced: Effects = [record, *effects]
    if state.phase is Phase.RECOVERING:
        assert state.recovery is not None
        if worker.id not in state.recovery.awaited:
            if worker.id.rank in state.workers:
                return state, replaced
            state, more = plan_if_complete(state, now)  # the recovery may have been waiting only for this worker
            return state, [*replaced, *more]
    elif not (was_member or joining):
        return state, replaced
    # Aborts before the order to start the replacement: the others stop waiting for the dead one that much earlier.
    state, more = begin_recovery(state, event, now)
    return state, [*more, *replaced]


def _counted(worker: Worker, event: e.WorkerDied) -> Worker:
    """The worker with one more death. A worker killed with signs of life did not fail: it may only need longer."""
    if event.hang == "alive":
        return replace(worker, hangs=worker.hangs + 1)
    return replace(worker, deaths=worker.deaths + 1)


def _ended_its_process(state: State, worker: Worker, event: e.WorkerDied, now: float) -> Outcome:
    """A member has ended with status 0, alone. The others save a checkpoint, and the job ends."""
    job = state.job
    assert job is not None
    rank, incarnation = worker.id
    why = (
        f"rank {rank} ended its process with exit status 0 inside the training function, in step {event.step} of "
        f"{job.steps}: leave that function instead, on all ranks after the same step (return, break, sys.exit(0))"
    )
    others = {r: other for r, other in state.workers.items() if r != rank}
    state = replace(state, workers=others, vacant={**state.vacant, rank: incarnation})
    if not job.checkpoints or not others or has_trained(state, worker):
        return end_with_loss(state, Ending.PROCESS_ENDED, why)
    if state.stopping is None:
        deadline_s = now + state.config.stop_grace_s
        state = replace(state, stopping=e.Stopping(why, state.committed, deadline_s, Ending.PROCESS_ENDED))
    asked: Effects = [e.AskSave(w.id) for w in state.members()]
    state, effects = begin_recovery(state, event, now)
    return state, [*effects, *asked]


def _replaced(state: State, worker: Worker) -> Outcome:
    """Start the replacement of a dead worker; none on a leaving node, unless only the end of the job remains."""
    rank, incarnation = worker.id
    trained = has_trained(state, worker)
    if worker.node in state.leaving and not trained:
        others = {r: other for r, other in state.workers.items() if r != rank}
        return replace(state, workers=others, vacant={**state.vacant, rank: incarnation}), []
    replacement = Worker(
        e.WorkerId(rank, incarnation + 1),
        worker.node,
        deaths=worker.deaths,
        hangs=worker.hangs,
        owes_end=trained or worker.owes_end,
    )
    state = with_workers(state, replacement)
    return state, [start_workers(state, worker.node, replacement.id)]


def lacking(state: State, event: e.WorkerLacking, now: float) -> Outcome:
    """A version cannot be restored: go back to an older one that can."""
    if not _in_force(state, event.generation) or current(state, event.worker) is None:
        return state, []
    fields = {"rank": event.worker.rank, "version": event.version, "shards": len(event.shards)}
    record = e.Record("lacking", {**fields, "first_shards": list(event.shards[:8])})
    state, effects = begin_recovery(
        state, None, now, cause=Cause.NOT_WHOLE, why=f"version {event.version} is not whole"
    )
    assert state.recovery is not None
    recovery = replace(state.recovery, ceiling=event.version - 1, lacking=event.shards)
    return replace(state, recovery=recovery), [record, *effects]


def corrupted(state: State, event: e.CorruptionFound, now: float) -> Outcome:
    """Damaged bytes were found and not used. A frame is sent again, a replica repaired: both in a new generation."""
    if current(state, event.worker) is None:
        return state, []
    found = {"where": event.where, "node": event.node, "rank": event.rank, "shard": event.shard}
    record = e.Record("corruption", {**found, "found_by": event.worker.rank, "detail": event.detail})
    if event.where not in ("frame", "replica", "backup") or not _in_force(state, event.generation):
        return state, [record]  # the reader ignored the damaged bytes of a keeper, and found the data elsewhere
    state, effects = begin_recovery(
        state, None, now, cause=Cause.CORRUPTION, why=f"a damaged {event.where} of rank {event.rank}"
    )
    return state, [record, *effects]


def _in_force(state: State, generation: int) -> bool:
    """Whether workers train in this generation: the layout's, or that of a join that some have switched to."""
    return state.phase is Phase.RUNNING and state.layout is not None and generation >= state.layout.generation


def begin_recovery(
    state: State,
    death: e.WorkerDied | None,
    now: float,
    *,
    cause: Cause = Cause.OTHER,
    why: str = "a worker joins",
    node: str = "",
    lost: Sequence[Worker] = (),
) -> Outcome:
    """Abort the generation and request a report from every worker that may hold state."""
    generation = state.generation + 1
    asked = list(state.members())
    if state.join is not None:
        asked += [
            w for w in state.workers.values() if w.status is Status.READY and w.id.rank in state.join.layout.ranks
        ]
    earlier = state.recovery  # in progress, or complete except for the next commit: one recovery, one log line
    if earlier is not None and state.phase is Phase.RECOVERING:
        asked += [w for w in state.workers.values() if w.id in earlier.awaited and w not in asked]
    if death is not None:
        cause, why = Cause.of_death(death.hang), death.cause
    if earlier is None:
        detected_s = death.detected_at_s if death and death.detected_at_s else now
        earlier = RecoveryStory(
            generation=generation,
            cause=cause,
            why=why,
            dead=(),
            step=death.step if death else -1,
            phase=death.phase if death else "",
            lost_micro_batches=0,
            killed_s=death.killed_at_s if death and death.killed_at_s else detected_s,
            detected_s=detected_s,
            started_s=now,
            lines=state.lines,
        )
    recovery = earlier.extended(
        generation,
        cause,
        awaited=frozenset(w.id for w in asked),
        dead=(death.worker,) if death else tuple(worker.id for worker in lost),
        lost_micro_batches=death.finished_micro_batches if death else 0,
        join=state.join,
        nodes_lost=(node,) if node else (),
        losses=tuple(Loss(worker.since) for worker in lost),
    )
    state, switch = rebalanced(state)
    state = replace(state, phase=Phase.RECOVERING, generation=generation, recovery=recovery, join=None, concluding=None)
    aborts: Effects = [e.AbortGeneration(w.id, generation) for w in asked]
    state, effects = plan_if_complete(state, now)
    return state, [*aborts, *switch, *effects]


def reported(state: State, event: e.WorkerReported, now: float) -> Outcome:
    """A survivor reports what it holds."""
    recovery = state.recovery
    if recovery is None or event.generation != recovery.generation or event.worker not in recovery.awaited:
        return state, []
    reports = {**recovery.reports, event.worker: event.report}
    recovery = replace(recovery, reports=reports, busy_s=max(recovery.busy_s, event.busy_s))
    return plan_if_complete(replace(state, recovery=recovery), now)


def plan_if_complete(state: State, now: float) -> Outcome:
    """Make the plan once every live worker has reported."""
    recovery, job = state.recovery, state.job
    assert recovery is not None
    assert job is not None
    live = {w.id for w in state.workers.values()}
    if any(worker not in recovery.reports for worker in recovery.awaited & live):
        return state, []
    state, reports = without_the_left(
        state, recovery.join, [report for worker, report in recovery.reports.items() if worker in live]
    )
    reported = {report.rank for report in reports}
    # A rank that is ready and was not asked has no state: the plan takes it in, where a join would be one more switch.
    ready = [w for w in state.workers.values() if w.status is Status.READY and w.id.rank not in reported]
    reports += [Report(rank=w.id.rank, generation=0, fresh=True) for w in ready]
    starting = any(w.status is Status.STARTING for w in state.workers.values())
    if starting and all(report.fresh for report in reports):
        return state, []  # no member is left: start, with all replacements, from what the keepers hold
    if not reports:
        if state.stopping is not None and state.stopping.left:
            return end_with_loss(state, state.stopping.ending, state.stopping.why)
        return fail(state, Ending.NO_NODE_STAYS if state.leaving else Ending.NO_MEMBER, nobody_left(state))
    furthest = max([state.agreed, *(report.agreed for report in reports)]) + 1
    # Some members may not have carried out a rollback yet: earlier agreements of theirs were given up.
    newest = max([state.agreed, *(r.agreed for r in reports if r.generation >= state.rolled_back)]) + 1
    by_node = [(state.workers[report.rank].node, report) for report in reports]
    recovery = still_missing(state, recovery, newest)
    state = replace(state, protected=outliving(state, reports))
    version = target(state, recovery, newest, by_node)
    if version < 0 and job.on_loss == "neighbors":
        version, recovery = stand_in(state, job, recovery, newest)
    gone = version < 0 or (version < newest and version > 0 and version - 1 not in state.agreements)
    if gone and not resumable(state, recovery, newest):
        return fail(state, Ending.TOO_MUCH_LOST, _everything_gone(state, recovery, newest))
    try:
        if gone:
            state, plan = resume_plan(state, sorted(report.rank for report in reports))
            recovery = replace(recovery, ceiling=None, lacking=(), substitutes=())
        else:
            plan = _recovery_plan(state, job, recovery, reports, version if version < furthest else None)
        plan = replace(plan, protected=max(plan.protected, min(version, protected_now(state, by_node))))
        plan = plan.with_calls(reports)
        state, recovery, plan = _on_its_line(state, recovery, plan.standing_in(recovery.substitutes))
    except (LayoutError, PlanError) as error:
        return fail(
            state,
            Ending.BUG,
            f"generation {recovery.generation} cannot be planned, which is a bug of everstep: {error}",
        )
    state = _adopted(state, recovery, plan, furthest, now)
    state, effects = enter(state, plan, "planned", {"summary": plan.describe()})
    if joined := [w.id.rank for w in ready if w.id.rank in plan.layout.ranks]:  # they had been ready before the plan
        effects.append(taken_in(plan, joined))
    if plan.stand_ins:
        fields = {"version": plan.version, "shards": list(plan.stand_ins)}
        effects.append(e.Record("substituted", fields))
    return state, effects


def _adopted(state: State, recovery: RecoveryStory, plan: Plan, furthest: int, now: float) -> State:
    """The state that a plan leads to. `furthest`: the newest version that was agreed on; the plan may go back."""
    assert plan.version is not None
    lost_steps = max(recovery.lost_steps, state.committed + 1 - plan.version)
    if plan.version != recovery.step:  # the interrupted step had been agreed on, or is computed again from its start
        recovery = replace(recovery, lost_micro_batches=0)
    losses = tuple(loss._replace(planned=True) for loss in recovery.losses)
    recovery = replace(recovery, planned_s=now, lost_steps=lost_steps, losses=losses, planned=plan.version, join=None)
    state = replace(state, recovery=recovery)
    if plan.version < furthest or plan.checkpoint:
        state = replace(
            state,
            committed=plan.version - 1,
            agreed=plan.version - 1,
            agreement=plan.agreement,
            rolled_back=state.generation,
        )
    elif plan.version - 1 > state.agreed:
        state = replace(state, agreed=plan.version - 1, agreement=plan.agreement)
    return replace(state, protected=max(state.protected, plan.protected))


def _on_its_line(state: State, recovery: RecoveryStory, plan: Plan) -> tuple[State, RecoveryStory, Plan]:
    """The plan with the lines of history, which it forks if other bytes follow its version than before.

    They do if it approximates shards, or goes back to an earlier line. A plan in the same recovery as one that forked
    forks again: not every record of the version is of that plan's generation yet.
    """
    assert plan.version is not None
    again = recovery.lines != state.lines
    earlier = bool(state.lines) and (bool(plan.checkpoint) or plan.version < state.lines[-1].version)
    if not (plan.stand_ins or again or earlier):
        return state, recovery, replace(plan, lines=state.lines)
    lines = forked(recovery.lines, plan.version, plan.generation)
    agreements = {step: text for step, text in state.agreements.items() if step < plan.version}
    state = replace(state, lines=lines, protected=-1, placements={}, agreements=agreements)
    if plan.checkpoint:  # all is read from storage: the next plan may read only what was written since, from memory
        recovery = replace(recovery, lines=lines)
    protected = -1 if plan.stand_ins or plan.checkpoint else plan.protected
    return state, recovery, replace(plan, lines=lines, protected=protected)


def _recovery_plan(
    state: State, job: e.Job, recovery: RecoveryStory, reports: list[Report], back_to: int | None
) -> Plan:
    """The version to resume from: the newest step known to be agreed on, or an older one that survived the lost nodes.

    It is version 0, from the seed, if all workers are fresh and nothing was agreed on.
    """
    assert state.layout is not None
    ranks = sorted(report.rank for report in reports)
    if state.agreed < 0 and all(report.fresh for report in reports):
        return plan_start(change_layout(job.model, state.layout, ranks, state.generation))
    # A join that no member switched to changed nothing; in either case the reports say who holds what.
    join, entered = recovery.join, max(report.generation for report in reports)
    old = join.layout if join is not None and entered >= join.generation else state.layout
    if back_to is not None:
        agreement = state.agreements.get(back_to - 1, "")
        return plan_rollback(job.model, old, ranks, state.generation, back_to, agreement)
    if recovery.substitutes:  # approximated shards make it another model: no rank has its values, nor part of a step
        left = [tuple(shard for shard in r.owned if shard not in recovery.substitutes) for r in reports]
        reports = [
            replace(r, owned=owned, values_version=-1, held=(), started=(), todo=())
            for r, owned in zip(reports, left, strict=True)
        ]
    return plan_recovery(job.model, old, reports, state.generation, (state.agreed, state.agreement))


def _everything_gone(state: State, recovery: RecoveryStory, newest: int) -> str:
    """Why the job cannot continue: what is lost, which node held it, and what was protected."""
    assert state.layout is not None
    live = set(state.workers) - set(state.vacant)
    gone = recovery.lacking or [i for i, owner in enumerate(state.layout.owners) if owner not in live]
    named = ", ".join(map(str, gone[:16])) + (f" and {len(gone) - 16} more" if len(gone) > 16 else "")
    kept = "nothing was protected from lost nodes"
    if state.protected >= 0:
        kept = f"version {state.protected} was the newest that outlives nodes"
    where = ", ".join(recovery.nodes_lost) or f"nodes that are still there (what was lost there: {recovery.why})"
    assert state.job is not None
    policy = {
        "checkpoint": "; on_loss='checkpoint': no checkpoint of the job has been saved yet"
        if state.job.checkpoints
        else "; on_loss='checkpoint': the job saves none (checkpoint=URL)",
        "neighbors": "; on_loss='neighbors' could not replace them",
    }.get(state.job.on_loss, "")
    return (
        f"shard(s) {named} of version {newest} are lost: they were held by {where}, and {kept}{policy}. More nodes "
        "were lost at once than node_losses protects"
    )


def all_ready(state: State) -> bool:
    """Whether every worker has built its model."""
    return all(w.status is Status.READY for w in state.workers.values())


def begin_training(state: State) -> Outcome:
    """Every worker is ready: make the first layout."""
    job = state.job
    assert job is not None
    ranks, memory = sorted(state.workers), worker_memory(state)
    try:
        if job.stages:
            layout = initial_layout(job.model, ranks, job.stages, job.micro_batches)
        else:
            state = replace(state, plans_stages=not job.one_stage)
            layout = fewest_stages(job.model, ranks, job.micro_batches, memory, 1 if job.one_stage else len(ranks))
    except LayoutError as error:
        return fail(state, Ending.DOES_NOT_FIT, str(error))
    if lacks := memory.lacking(layout):
        return fail(state, Ending.DOES_NOT_FIT, f"{lacks}: use more workers{', or more stages' if job.stages else ''}")
    layout = replace(layout, generation=state.generation + 1)
    state, effects = _begin(state, layout)
    return state, [*effects, *(few_micro_batches(layout) if state.phase is Phase.RUNNING else [])]


def _begin(state: State, layout: Layout) -> Outcome:
    """With the seed's parameters, or from the newest checkpoint."""
    job = state.job
    assert job is not None
    if not state.saved:
        return enter(state, plan_start(layout), "started", {"layout": layout.describe()})
    newest = state.saved[0]
    plan = plan_resume(job.model, layout, newest.version, newest.agreement, newest.name)
    last = newest.version - 1
    state = replace(state, committed=last, agreed=last, agreement=newest.agreement)
    fields = {"layout": layout.describe(), "checkpoint": newest.name, "version": newest.version}
    return enter(state, plan, "started", fields)


def few_micro_batches(layout: Layout) -> Effects:
    """Say that a step has too few micro-batches to be dealt evenly after a loss, or by the ranks' speeds."""
    widest = max(len(stage.ranks) for stage in layout.stages)
    enough = MICRO_BATCHES_PER_RANK * widest
    if widest == 1 or layout.micro_batches >= enough:
        return []
    return [e.Record("few_micro_batches", {"micro_batches": layout.micro_batches, "ranks": widest, "enough": enough})]


def enter(state: State, plan: Plan, event: str, fields: dict[str, Any]) -> Outcome:
    """Make every rank of the plan a member and have all of them carry it out."""
    members = [
        w if w.status in (Status.FINISHED, Status.MEMBER) else replace(w, status=Status.MEMBER, since=plan.version or 0)
        for w in state.workers.values()
        if w.id.rank in plan.layout.ranks
    ]
    state = replace(
        with_workers(state, *members),
        phase=Phase.RUNNING,
        generation=plan.generation,
        layout=plan.layout,
        join=None,
        stages_asked=still_asked(state.stages_asked, plan.layout),
    )
    state, orders = carry_out(state, plan)
    version = last_version(state)
    told: Effects = [e.TellLeft(w.id, version) for w in state.members() if w.left < 0 and version < _steps(state)]
    record = e.Record(event, {"generation": plan.generation, "plan": plan.digest, **fields})
    return state, [*orders, *told, record]


def _steps(state: State) -> int:
    assert state.job is not None
    return state.job.steps


def carry_out(state: State, plan: Plan) -> Outcome:
    """Send a plan to its members, and to those that leave by it, with the placement of parity from then on."""
    before = state.placement
    placement = placement_for(state, plan.layout)
    in_force = state.layout.generation if state.layout else 0
    placements = {g: p for g, p in state.placements.items() if g >= in_force}
    state = replace(state, placement=placement, placements={**placements, plan.generation: placement})
    needed = memory_needed(state, plan.layout, placement)
    lacks = too_small(state, needed) if before is None else ""
    if lacks:
        return fail(state, Ending.DOES_NOT_FIT, lacks)
    told: Effects = []
    as_before = before is not None and (before.width, before.losses, before.note) == (
        placement.width,
        placement.losses,
        placement.note,
    )
    if not as_before:
        told = statements(state, plan.layout, placement, needed)
    members = [state.workers[rank] for rank in plan.layout.ranks]
    leavers = [state.workers[rank] for rank in plan.leaving]
    peers = {w.id.rank: w.peer for w in members if w.peer is not None}
    keepers = {name: node.keeper for name, node in state.nodes.items()}
    nodes = {w.id.rank: w.node for w in members}
    orders = [e.CarryOut(w.id, plan, peers, keepers, placement, nodes) for w in (*members, *leavers)]
    return state, [*orders, *told]


def resumed(state: State, event: e.WorkerResumed, now: float) -> State:
    """A member carried out the plan of the recovery."""
    recovery = state.recovery
    if recovery is None or event.generation != recovery.generation or current(state, event.worker) is None:
        return state
    resumed = {**recovery.resumed, event.worker: (event.edit_s, event.restore_s)}
    return replace(state, recovery=replace(recovery, resumed=resumed, resumed_s=now))


def taken_in(plan: Plan, ranks: list[int]) -> e.Record:
    """The workers that `plan` makes members."""
    return e.Record("joined", {"generation": plan.generation, "ranks": ranks, "layout": plan.layout.describe()})


def recovered(recovery: RecoveryStory, step: int, now: float) -> e.Record:
    """The log line of a recovery: its phases in seconds, whose sum is the total."""
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
            "reason": recovery.cause.value,
            "why": recovery.why,
            "ranks": [worker.rank for worker in recovery.dead],
            "interrupted_step": recovery.step,
            "phase": recovery.phase,
            "redone_micro_batches": recovery.lost_micro_batches,
            "lost_steps": recovery.lost_steps,
            "nodes": list(recovery.nodes_lost),
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
