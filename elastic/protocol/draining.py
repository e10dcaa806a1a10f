"""Draining: a node hands over while training continues, and is released when no member needs it any more.

    asked -> a plan without its ranks is offered -> all enter it at a step boundary, and fetch from its keeper
          -> a version that was made since is protected without it -> the node ends with success

No step is aborted or computed again. Until the last arrow, the loss of the node is handled as that of any other.
"""

from __future__ import annotations

from dataclasses import replace

from everstep.resharding.plan import plan_leave

from . import events as e
from .causes import Ending
from .checkpoints import stop_requested
from .leaving import concluded, left, nobody_left
from .losing import without_node
from .outcome import Effects, Outcome
from .recovering import all_ready, begin_training, carry_out
from .spare_nodes import spare_leaves
from .state import (
    Leaving,
    Phase,
    State,
    Status,
)
from .troubles import spares


def drain_requested(state: State, event: e.DrainRequested, now: float) -> Outcome:
    """A node asks to leave. If the others cannot continue without it, the job saves a checkpoint and ends."""
    if event.node in state.spares:
        return spare_leaves(state, event.node, event.why)
    if event.node not in state.nodes or event.node in state.leaving or state.stopping is not None:
        return state, []
    if not spares(state, event.node) or not (state.elastic or state.phase is Phase.FORMING):
        return stop_requested(state, e.StopRequested(event.why, Ending.NO_NODE_STAYS), now)
    state = replace(state, leaving={**state.leaving, event.node: Leaving(event.why, departure=event.departure)})
    record = e.Record("draining", {"node": event.node, "why": event.why, "ranks": _ranks(state, event.node)})
    if state.phase in (Phase.FORMING, Phase.LAUNCHED):  # the node holds no state yet
        state, effects = let_go(state, event.node)
        if state.phase is Phase.LAUNCHED and state.job is not None and all_ready(state):
            state, more = begin_training(state)
            effects += more
        return state, [record, *effects]
    told = e.TellNode(event.node, f"{event.why}: this node hands over to the others, and then leaves the job")
    state, effects = offer_leave(state)
    return state, [record, told, *effects]


def _ranks(state: State, node: str) -> list[int]:
    return sorted(worker.id.rank for worker in state.workers.values() if worker.node == node)


def offer_leave(state: State) -> Outcome:
    """Offer a plan without the ranks of the leaving nodes; the members switch to it at a step boundary.

    After the last step no plan is offered: the end of the job is near and releases them.
    """
    job, layout = state.job, state.layout
    if not state.leaving or state.phase is not Phase.RUNNING or state.join is not None or state.stopping is not None:
        return state, []
    assert job is not None
    assert layout is not None
    ending = state.committed + 2 >= job.steps or any(w.left >= 0 for w in state.members())
    leavers = [rank for rank in layout.ranks if state.workers[rank].node in state.leaving]
    if ending or not leavers or len(leavers) == len(layout.ranks):
        return state, []
    plan = replace(plan_leave(job.model, layout, leavers, state.generation + 1), lines=state.lines)
    record = e.Record("leave_prepared", {"generation": plan.generation, "ranks": leavers})
    state, orders = carry_out(replace(state, generation=plan.generation, join=plan), plan)
    return state, [*orders, record]


def withdraw_leave(state: State) -> State:
    """The last step was agreed on without the switch: no member will enter it."""
    return replace(state, join=None)


def handed_over(state: State, event: e.WorkerSwitched) -> Outcome:
    """A member has entered the generation that leaves ranks out, or has left with it; the other members will follow."""
    plan, effects = state.join, Effects()
    if plan is not None and plan.leaving and event.generation == plan.generation:
        state = replace(left(state, plan.leaving), layout=plan.layout, join=None)
        fields = {"generation": plan.generation, "ranks": list(plan.leaving), "layout": plan.layout.describe()}
        effects = [e.Record("handed_over", fields)]
    return concluded(state, [event.worker.rank]), effects


def release(state: State, event: e.WorkerCommitted) -> Outcome:
    """Release the nodes that no member needs any more, now that this step is committed.

    A member that commits a step in a generation without them knows that the keepers of that generation hold all its
    shards; and every version that has been protected since then is protected without them.
    """
    layout, effects = state.layout, Effects()
    if not state.leaving or state.phase is not Phase.RUNNING or layout is None or event.generation < layout.generation:
        return state, []
    members = {*layout.ranks, *(state.join.layout.ranks if state.join is not None else ())}
    protects = bool(state.placements[layout.generation].stripes)
    for node, leaving in list(state.leaving.items()):
        ranks = _ranks(state, node)
        since = -1 if members & set(ranks) else leaving.since if leaving.since >= 0 else event.step
        state = replace(state, leaving={**state.leaving, node: leaving._replace(since=since)})
        left_there = [rank for rank in ranks if state.workers[rank].status is Status.LEFT]
        under_way = [rank for rank in left_there if rank not in leaving.concluded]
        # A recovery that left it out may have begun at a version whose protection still depends on it.
        safe = state.protected >= since + (not left_there) or not protects
        if since >= 0 and safe and not under_way:
            state, more = let_go(state, node)
            effects += more
    return state, effects


def let_go(state: State, node: str) -> Outcome:
    """A node leaves the job; what its keeper holds is discarded."""
    why, host, ranks = state.leaving[node].why, state.nodes[node].host, _ranks(state, node)
    state = without_node(state, node)
    placements = {
        generation: placement
        for generation, placement in state.placements.items()
        if all(node not in (*stripe.nodes, *stripe.parity) for stripe in placement.stripes)
    }
    record = e.Record("node_left", {"node": node, "host": host, "ranks": ranks, "why": why})
    return replace(state, placements=placements), [record, e.ReleaseNode(node, f"{why}; the others continue")]


def cannot_leave(state: State, now: float) -> Outcome:
    """The nodes that were to continue are lost: the leaving ones save a checkpoint, and the job ends."""
    if not state.leaving or state.stopping is not None or state.nodes.keys() - state.leaving.keys():
        return state, []
    return stop_requested(state, e.StopRequested(nobody_left(state), Ending.NO_NODE_STAYS), now)
