"""A node is lost, with its agent, keeper and workers; a node that is merely silent is treated in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import events as e
from .causes import Cause, Ending
from .leaving import still_needed
from .outcome import Outcome, fail
from .recovering import (
    all_ready,
    begin_recovery,
    begin_training,
    plan_if_complete,
)
from .spare_nodes import spare_lost
from .state import (
    Config,
    Heard,
    Phase,
    State,
    Status,
)

GAP_FACTOR = 4.0  # times the longest silence from which the node has returned
GAP_MEMORY = 0.99  # decay of that silence, per heartbeat
FORMING_TIMEOUT_S = 10.0  # before training starts a node may be busy importing
NOBODY_S = 60.0  # if all nodes are silent at once
LEAST_BEAT_S, BEATS_PER_S = 0.25, 10_000
BEATS_MISSED = 6  # in a row; datagrams may be lost
SLEPT_S = 1.0  # ticks further apart than this: the coordinator itself was not running


def heartbeats(state: State, event: e.HeartbeatsReceived, now: float) -> Outcome:
    """Heartbeats of nodes have arrived."""
    heard = dict(state.heard)
    for node in event.nodes:
        if node in state.nodes or node in state.spares:
            before = heard.get(node, Heard(now))
            heard[node] = Heard(max(now, before.at_s), max(now - before.at_s, before.gap_s * GAP_MEMORY))
    return replace(state, heard=heard), []


def returned(state: State, event: e.CoordinatorReturned, now: float) -> Outcome:
    """Another coordinator has taken over: the silence it has observed so far proves nothing."""
    heard = {node: Heard(now + event.grace_s) for node in (*state.nodes, *state.spares)}
    return replace(state, heard=heard, ticked_s=now), []


def beat_s(config: Config) -> float:
    """The interval of a node's heartbeats, chosen so that the coordinator can receive those of all nodes."""
    return max(LEAST_BEAT_S, config.max_nodes / BEATS_PER_S)


def least_timeout_s(state: State) -> float:
    """How long any node may be silent now."""
    least = max(state.config.heartbeat_timeout_s, BEATS_MISSED * beat_s(state.config))
    return least if state.phase in (Phase.RUNNING, Phase.RECOVERING) else max(least, FORMING_TIMEOUT_S)


Lost = Callable[[State, e.NodeLost, float], Outcome]


def silent_node(state: State, now: float, lost: Lost | None = None) -> Outcome:
    """Declare a node lost that has been silent for too long, not counting time in which the coordinator did not run.

    `lost`: the handler of the loss; None: `node_lost`.
    """
    slept_s = now - state.ticked_s if state.ticked_s else 0.0
    state = replace(state, ticked_s=now)
    if slept_s > SLEPT_S:
        heard = {name: Heard(at_s + slept_s, gap_s) for name, (at_s, gap_s) in state.heard.items()}
        return replace(state, heard=heard), []
    least = least_timeout_s(state)
    if all(now - at_s > least for at_s, _ in state.heard.values()):
        least = max(least, NOBODY_S)  # all nodes are silent: more likely the coordinator is cut off
    for name, (at_s, gap_s) in state.heard.items():
        silent_s = now - at_s
        if silent_s > least and silent_s > min(GAP_FACTOR * gap_s, 4 * least):
            return (lost or node_lost)(state, e.NodeLost(name, f"no heartbeat for {silent_s:.1f} s"), now)
    return state, []


def node_lost(state: State, event: e.NodeLost, now: float) -> Outcome:
    """A node is lost, and with it all state that only it held."""
    if event.node in state.spares:
        return spare_lost(state, event)
    if event.node not in state.nodes:
        return state, []
    lost = state.nodes[event.node]
    ranks = sorted(w.id.rank for w in state.workers.values() if w.node == event.node)
    fields = {"node": event.node, "host": lost.host, "ranks": ranks, "why": event.why}
    told: list[e.Effect] = [e.Record("node_lost", fields), e.FenceNode(event.node, event.why)]
    gone = without_node(state, event.node)
    if state.phase is Phase.FORMING:
        return gone, told
    where = f"node {event.node} ({lost.host}) with ranks {ranks} is lost ({event.why})"
    if not gone.elastic:
        state, effects = fail(gone, Ending.TOO_FEW_NODES, f"{where}, before its script said that it is elastic")
    elif not gone.nodes:
        state, effects = fail(gone, Ending.TOO_MUCH_LOST, f"{where}, and it was the last one")
    elif state.phase is Phase.LAUNCHED:
        state, effects = _lost_before_training(gone, where)
    else:
        state, effects = _lost_in_training(state, gone, event, now)
    return state, [*told, *effects]


def without_node(state: State, node: str) -> State:
    """The state without a node and its workers; their ranks become vacant."""
    vacant = {w.id.rank: w.id.incarnation for w in state.workers.values() if w.node == node}
    return replace(
        state,
        nodes={name: other for name, other in state.nodes.items() if name != node},
        heard={name: heard for name, heard in state.heard.items() if name != node},
        workers={rank: w for rank, w in state.workers.items() if w.node != node},
        vacant={**state.vacant, **vacant},
        leaving={name: leaving for name, leaving in state.leaving.items() if name != node},
    )


def _lost_before_training(state: State, where: str) -> Outcome:
    if len(state.nodes) + len(state.fit_spares()) < state.config.min_nodes:
        return fail(state, Ending.TOO_FEW_NODES, f"{where} before training began, and fewer than --nnodes are left")
    return begin_training(state) if state.job is not None and all_ready(state) else (state, [])


def _lost_in_training(before: State, state: State, event: e.NodeLost, now: float) -> Outcome:
    """Recover, if the node held state of the training."""
    joining = before.join.layout.ranks if before.join is not None else ()
    held = [
        w
        for w in before.workers.values()
        if w.node == event.node
        and (w.status in (Status.MEMBER, Status.FINISHED) or w.id.rank in joining or still_needed(before, w))
    ]
    recovery = before.recovery if before.phase is Phase.RECOVERING else None
    if not held and recovery is None:
        return state, []
    was_awaited = recovery is not None and any(
        w.id in recovery.awaited for w in before.workers.values() if w.node == event.node
    )
    if not held and not was_awaited:
        return plan_if_complete(state, now)
    why = f"node {event.node} is lost ({event.why})"
    entered = [replace(w, since=state.committed + 1) if w.status is Status.READY else w for w in held]
    return begin_recovery(state, None, now, cause=Cause.NODE_LOST, why=why, node=event.node, lost=entered)
