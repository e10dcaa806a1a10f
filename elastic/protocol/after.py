"""The phase after training: the rest of the script runs, no worker is replaced, and the job ends with the last script.

This phase has no time limit, unless a stop is requested.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .causes import Ending
from .draining import let_go
from .losing import silent_node, without_node
from .outcome import (
    Effects,
    Outcome,
    current,
    fail,
    ranks_text,
    with_workers,
)
from .spare_nodes import spare_leaves, spare_lost
from .state import Phase, State, Status


def training_over(state: State, version: int) -> Outcome:
    """Release the scripts to the code after their training. Workers that were to join training are killed."""
    members = {w.id.rank: w for w in state.members()}
    if state.stopping is not None:
        return fail(state, state.stopping.ending, "; ".join((state.stopping.why, *state.lost)))
    released: Effects = []
    for node in [node for node in state.leaving if all(w.node != node for w in members.values())]:
        state, let_go_of = let_go(state, node)
        released += let_go_of
    others = [w for w in state.workers.values() if w.id.rank not in members]
    kills: Effects = [
        e.KillWorkers(node, tuple(w.id for w in others if w.node == node)) for node in {w.node: None for w in others}
    ]
    vacant = {w.id.rank: w.id.incarnation for w in others}
    after = {rank: replace(w, status=Status.AFTER) for rank, w in members.items()}
    state = replace(
        state,
        phase=Phase.AFTER,
        workers=after,
        vacant={**state.vacant, **vacant},
        join=None,
        recovery=None,
        concluding=None,
        stopping=None,
    )
    record = e.Record("trained", {"step": version - 1, "ranks": sorted(after), "lost": list(state.lost)})
    return state, [record, *released, *kills, *(e.EndTraining(w.id) for w in after.values())]


def died(state: State, event: e.WorkerDied, now: float) -> Outcome:
    """A script has ended. The job ends with the last script, or fails with the first one that fails."""
    worker = current(state, event.worker)
    if worker is None or worker.status is Status.EXITED:
        return state, []
    state = with_workers(state, replace(worker, status=Status.EXITED))
    if not event.clean and state.stopping is None:
        why = f"training is done, but the code after it failed: {event.cause}"
        return fail(state, Ending.AFTER_TRAINING, why, rank=worker.id.rank)
    if not event.clean:
        cut = f"the code after training was interrupted on rank {worker.id.rank}: {event.cause}"
        state = replace(state, lost=(*state.lost, cut))
    return _end_when_all_have(state)


def _end_when_all_have(state: State) -> Outcome:
    """End the job once every script has ended."""
    if any(w.status is Status.AFTER for w in state.workers.values()):
        return state, []
    return replace(state, phase=Phase.DONE), [e.EndJob(True, lost=state.lost)]


def stop_requested(state: State, event: e.StopRequested | e.DrainRequested, now: float) -> Outcome:
    """A stop is requested after training: the scripts may finish within the stop's grace."""
    if event.node in state.spares:
        return spare_leaves(state, event.node, event.why)
    if state.stopping is not None:
        return state, []
    why, grace_s = event.why, state.config.stop_grace_s
    text = f"{why}: training is done; the code after it has {grace_s:g} s to end"
    state = replace(state, stopping=e.Stopping(why, state.committed, now + grace_s))
    record = e.Record("stopping", {"why": why, "committed": state.committed})
    return state, [record, *(e.TellNode(node, text) for node in state.nodes)]


def ticked(state: State, event: e.Ticked, now: float) -> Outcome:
    """End the job when the grace is over; declare silent nodes lost."""
    stopping = state.stopping
    if stopping is None or now < stopping.deadline_s:
        return silent_node(state, now, node_lost)
    ranks = [w.id.rank for w in state.workers.values() if w.status is Status.AFTER]
    why = f"{stopping.why}; it had not ended after {state.config.stop_grace_s:g} s"
    lost = (*state.lost, f"the code after training was interrupted on {ranks_text(ranks)}: {why}")
    return replace(state, phase=Phase.DONE), [e.EndJob(True, lost=lost)]


def node_lost(state: State, event: e.NodeLost, now: float) -> Outcome:
    """A node is lost. The job fails if one of the node's scripts was still running."""
    if event.node in state.spares:
        return spare_lost(state, event)
    if event.node not in state.nodes:
        return state, []
    node = state.nodes[event.node]
    here = sorted(w.id.rank for w in state.workers.values() if w.node == event.node)
    running = [rank for rank in here if state.workers[rank].status is Status.AFTER]
    fields = {"node": event.node, "host": node.host, "ranks": here, "why": event.why}
    told: Effects = [e.Record("node_lost", fields), e.FenceNode(event.node, event.why)]
    gone = without_node(state, event.node)
    if running:
        where = f"node {event.node} ({node.host}) is lost ({event.why})"
        gone, effects = fail(
            gone,
            Ending.AFTER_TRAINING,
            f"training is done, but the code after it was lost on {ranks_text(running)}: {where}",
        )
    else:
        gone, effects = _end_when_all_have(gone)
    return gone, [*told, *effects]


def node_joined(state: State, event: e.NodeJoined, now: float) -> Outcome:
    """Refuse the node: no work is left for it."""
    return state, [e.RefuseNode(event.node, "the job has finished training already")]


def saved(state: State, event: e.CheckpointSaved, now: float) -> Outcome:
    """A checkpoint has been committed after the job stopped waiting for it."""
    if any(item.name == event.saved.name for item in state.saved):
        return state, []
    state = replace(state, saved=(event.saved, *state.saved)[: e.REMEMBERED_CHECKPOINTS])
    return state, [
        e.Record("checkpoint_saved", {"version": event.saved.version, "name": event.saved.name, **event.fields})
    ]


def raised(state: State, event: e.WorkerRaised, now: float) -> Outcome:
    """A script raised after training, or requested what only training can provide."""
    if current(state, event.worker) is None:
        return state, []
    return fail(
        state,
        Ending.AFTER_TRAINING,
        f"training is done, but the code after it failed: {event.message}",
        event.traceback,
        event.worker.rank,
    )
