"""Hosts that are kept out of the job: their nodes hand over and leave as soon as the job can spare them.

    too many troubles -> quarantined -> its nodes are drained, where enough others stay -> joins are refused -> released

Quarantine never leaves the job with fewer than `min_nodes` nodes: in that case it keeps, and accepts, quarantined ones.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .causes import Departure
from .draining import drain_requested
from .outcome import Effects, Outcome
from .state import Phase, Quarantine, State, Status
from .troubles import spares


def keep_out(state: State, now: float) -> Outcome:
    """Release hosts whose quarantine is over, and drain a node of a host whose quarantine is not."""
    if not state.quarantined:
        return state, []
    state, released = _release(state, now)
    state = _take_back(state)
    state, drained = _drain_one(state, now)
    return state, [*released, *drained]


def quarantine_ordered(state: State, event: e.QuarantineOrdered, now: float) -> Outcome:
    """From now on for so long, whatever the host's troubles; it replaces a quarantine that the host is in."""
    nodes = [name for name, node in state.nodes.items() if node.host == event.host]
    troubles = len(state.troubles.get(event.host, ()))
    fields = {"host": event.host, "nodes": nodes, "seconds": event.seconds, "troubles": troubles, "why": event.why}
    quarantine = Quarantine(now, now + event.seconds, event.why)
    state = replace(state, quarantined={**state.quarantined, event.host: quarantine})
    return state, [e.Record("node_quarantined", fields)]


def release_ordered(state: State, event: e.ReleaseOrdered, now: float) -> Outcome:
    """The next tick releases the host, and forgets its troubles."""
    quarantine = state.quarantined.get(event.host)
    if quarantine is None:
        return state, []
    over = quarantine._replace(until_s=min(now, quarantine.until_s))
    return replace(state, quarantined={**state.quarantined, event.host: over}), []


def _release(state: State, now: float) -> Outcome:
    over = [host for host, quarantine in state.quarantined.items() if now >= quarantine.until_s]
    if not over:
        return state, []
    kept = {host: quarantine for host, quarantine in state.quarantined.items() if host not in over}
    troubles = {host: known for host, known in state.troubles.items() if host not in over}
    effects: Effects = [e.Record("node_released", {"host": host}) for host in over]
    return replace(state, quarantined=kept, troubles=troubles), effects


def _drain_one(state: State, now: float) -> Outcome:
    """Drain the first node that can be spared; the next one follows at a later tick."""
    job = state.job
    if state.phase is not Phase.RUNNING or job is None or state.stopping is not None or state.join is not None:
        return state, []
    if state.committed + 2 >= job.steps or any(w.status is Status.FINISHED for w in state.members()):
        return state, []  # the end of the job releases it
    for name, node in state.nodes.items():
        quarantine = state.quarantined.get(node.host)
        if quarantine is not None and name not in state.leaving and spares(state, name):
            drain = e.DrainRequested(name, f"quarantine: {quarantine.why}", Departure.QUARANTINE)
            return drain_requested(state, drain, now)
    return state, []


def _take_back(state: State) -> State:
    """The nodes that were to continue without this one are lost: it stays, unless it has handed over already."""
    if state.nodes.keys() - state.leaving.keys() or state.join is not None:
        return state
    left = {worker.node for worker in state.workers.values() if worker.status is Status.LEFT}
    leaving = {
        name: known
        for name, known in state.leaving.items()
        if name in left or known.departure is not Departure.QUARANTINE
    }
    return replace(state, leaving=leaving) if len(leaving) < len(state.leaving) else state
