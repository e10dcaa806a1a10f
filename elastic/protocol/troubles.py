"""Troubles of hosts, failures and slowness: counted by host, whatever the names of its nodes, up to a limit.

A host is the address that its nodes report. Every trouble that counts is a line of the event log, so the count can be
verified from the log. A host with `Config.quarantine_after` troubles is put in quarantine (see quarantine.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import events as e
from .outcome import Effects, Outcome
from .state import (
    Phase,
    Quarantine,
    State,
    Trouble,
)

TROUBLES_KEPT = 16  # per host, the newest
HOSTS_KEPT = 1024
DETAIL_LETTERS = 160
SHOWN = 3  # number of troubles in the reason of a quarantine
_SAYS = {  # event of the log -> the field that describes the trouble
    "node_lost": "why",
    "node_unhealthy": "why",
    "worker_died": "cause",
    "corruption": "detail",
    "straggler_found": "evidence",
    "straggler_lasts": "evidence",
}
COUNTED = frozenset(_SAYS)


def straggler_found(state: State, event: e.StragglerFound, now: float) -> Outcome:
    """Record that a rank or link is slow, and count it against its host."""
    if event.node not in state.nodes:
        return state, []
    return state, [e.Record("straggler_lasts" if event.again else "straggler_found", _fields(event, event.factor))]


def straggler_gone(state: State, event: e.StragglerGone, now: float) -> Outcome:
    """Record the end of that slowness; also for a node that is gone."""
    return state, [e.Record("straggler_gone", _fields(event))]


def _fields(event: e.StragglerFound | e.StragglerGone, factor: float | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {"rank": event.rank, "node": event.node, "what": event.what}
    fields |= {"peer": event.peer} if event.peer >= 0 else {}
    fields |= {"blamed": False} if isinstance(event, e.StragglerFound) and not event.blamed else {}
    fields |= {"factor": round(factor, 3)} if factor is not None else {}
    return {**fields, "evidence": event.evidence, **event.fields}


def node_unhealthy(state: State, event: e.NodeUnhealthy, now: float) -> Outcome:
    """The node's own health check says that it should not take part."""
    if event.node in state.nodes:
        return state, []
    fields = {"node": event.node, "host": event.host, "why": event.why, "health": dict(event.health)}
    return state, [e.Record("node_unhealthy", fields), e.RefuseNode(event.node, event.why)]


def count_troubles(before: State, state: State, effects: Effects, now: float) -> Outcome:
    """Count the troubles in these effects; a host that reaches the limit is put in quarantine."""
    found = [effect for effect in effects if isinstance(effect, e.Record) and effect.event in COUNTED]
    if not found or state.phase is Phase.DONE:
        return state, effects
    more: Effects = []
    for record in found:
        host = _host(before, record.fields)
        if host:
            detail = str(record.fields.get(_SAYS[record.event], ""))[:DETAIL_LETTERS]
            state = _with_trouble(state, host, Trouble(now, record.event, detail))
            state, quarantined = _judge(state, host, now)
            more += quarantined
    return state, [*effects, *more]


def _host(before: State, fields: Mapping[str, Any]) -> str:
    """The host that a line of the log counts against; empty if there is none, or it is unknown."""
    if not fields.get("blamed", True):
        return ""
    if fields.get("host"):
        return str(fields["host"])
    name, worker = fields.get("node"), before.workers.get(fields.get("rank", -1))
    node = before.nodes.get(name or (worker.node if worker is not None else ""))
    return node.host if node is not None else ""


def _with_trouble(state: State, host: str, trouble: Trouble) -> State:
    troubles = {name: known for name, known in state.troubles.items() if name != host}
    troubles[host] = (*state.troubles.get(host, ()), trouble)[-TROUBLES_KEPT:]
    while len(troubles) > HOSTS_KEPT:  # forget the host whose last trouble is the oldest
        del troubles[next(iter(troubles))]
    return replace(state, troubles=troubles)


def _judge(state: State, host: str, now: float) -> Outcome:
    config = state.config
    recent = [known for known in state.troubles[host] if now - known.at_s <= config.quarantine_within_s]
    if not config.quarantine_after or len(recent) < config.quarantine_after or host in state.quarantined:
        return state, []
    evidence = "; ".join(f"{known.what} {now - known.at_s:.0f} s ago ({known.detail})" for known in recent[-SHOWN:])
    why = f"{len(recent)} troubles in {config.quarantine_within_s:g} s: {evidence}"
    nodes = [name for name, node in state.nodes.items() if node.host == host]
    fields = {"host": host, "nodes": nodes, "seconds": config.quarantine_s, "troubles": len(recent), "why": why}
    quarantine = Quarantine(now, now + config.quarantine_s, why)
    state = replace(state, quarantined={**state.quarantined, host: quarantine})
    return state, [e.Record("node_quarantined", fields)]


def kept_out(state: State, host: str, now: float) -> str:
    """Why a node of this host may not join now; empty if it may, which includes that the job needs it."""
    quarantine = state.quarantined.get(host)
    if quarantine is None or now >= quarantine.until_s or not spares(state):
        return ""
    return f"host {host} is in quarantine for {quarantine.until_s - now:.0f} s more: {quarantine.why}"


def spares(state: State, *nodes: str) -> bool:
    """Whether the job has enough nodes, spare ones included, without these and without those that leave."""
    staying = state.nodes.keys() - state.leaving.keys() - set(nodes)
    return len(staying) >= 1 and len(staying) + len(state.fit_spares()) >= state.config.min_nodes
