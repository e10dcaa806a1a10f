"""Nodes join and leave, workers start; and torchrun's own rule for jobs that are not elastic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import events as e
from .causes import Ending
from .outcome import Outcome, add_workers, fail, start_workers
from .spare_nodes import spare_joined
from .state import (
    Heard,
    Node,
    Phase,
    State,
    Worker,
)
from .troubles import kept_out


def node_joined(state: State, event: e.NodeJoined, now: float) -> Outcome:
    """A node registered: count it while the job forms, start workers on it while the job runs.

    One that there is no place for waits as a spare, if the job has spares.
    """
    if event.node in state.nodes or event.node in state.spares:
        return state, []
    full = len(state.nodes.keys() - state.leaving.keys()) >= state.config.max_nodes
    if full and not state.config.spares:
        return state, [e.RefuseNode(event.node, f"the job has its {state.config.max_nodes} nodes already")]
    if why := kept_out(state, event.host, now):
        return state, [
            e.Record("node_refused", {"node": event.node, "host": event.host, "why": why}),
            e.RefuseNode(event.node, why),
        ]
    stores = {state.restarts + number: port for number, port in enumerate(event.stores)}
    about = (event.host, event.slots, event.keeper, event.memory_bytes)
    node = Node(event.node, *about, stores, event.health, event.domains)
    if full:
        return spare_joined(state, node, now)
    if state.phase is not Phase.FORMING and not state.elastic:
        return state, [e.RefuseNode(event.node, "the job is running and its script is not elastic")]
    order = event.order if event.order >= 0 else len(state.nodes)
    nodes = {**state.nodes, event.node: node}
    state = replace(state, heard={**state.heard, event.node: Heard(now)})
    fields = {"node": event.node, "host": event.host, "slots": event.slots, "order": order}
    known: dict[str, Any] = {"health": dict(event.health), "domains": list(event.domains)}
    record = e.Record("node_joined", {**fields, **{name: value for name, value in known.items() if value}})
    if state.phase is not Phase.FORMING:
        state, effects = add_workers(replace(state, nodes=nodes), node)
        return state, [record, *effects]
    formed_s = now if len(nodes) in (1, state.config.min_nodes) else state.formed_s
    if event.order >= 0:
        ordered = list(state.nodes.items())
        ordered.insert(event.order, (event.node, node))
        nodes = dict(ordered)
    state = replace(state, nodes=nodes, formed_s=formed_s)
    if len(nodes) == state.config.max_nodes:
        state, effects = launch(state)
        return state, [record, *effects]
    return state, [record]


def store_opened(state: State, event: e.StoreOpened, now: float) -> Outcome:
    """Ports of a node's torch stores for later attempts; those of earlier attempts are forgotten."""
    node = state.nodes.get(event.node)
    if node is None:
        return state, []
    number = max(node.stores, default=state.restarts - 1) + 1
    stores = {attempt: port for attempt, port in node.stores.items() if attempt >= state.restarts}
    node = replace(node, stores={**stores, number: event.port})
    return replace(state, nodes={**state.nodes, node.name: node}), []


def launch(state: State) -> Outcome:
    """Start every worker on every node, with ranks in the order of the nodes."""
    workers: dict[int, Worker] = {}
    for node in state.nodes.values():
        for _ in range(node.slots):
            rank = len(workers)
            incarnation = state.workers[rank].id.incarnation + 1 if rank in state.workers else 0
            workers[rank] = Worker(e.WorkerId(rank, incarnation), node.name)
    state = replace(state, phase=Phase.LAUNCHED, workers=workers)
    return state, [start_workers(state, node.name) for node in state.nodes.values()]


def last_call(state: State, now: float) -> Outcome:
    """Start with the present nodes once the time for joining is over, or give up if they are too few."""
    config = state.config
    if state.phase is not Phase.FORMING or not state.nodes:  # there is no limit for the first node
        return state, []
    if len(state.nodes) >= config.min_nodes:
        return launch(state) if now - state.formed_s >= config.last_call_s else (state, [])
    if now - state.formed_s >= config.join_timeout_s:
        return fail(
            state,
            Ending.TOO_FEW_NODES,
            f"only {len(state.nodes)} of at least {config.min_nodes} nodes joined in {config.join_timeout_s:g} s:"
            " start the others, or lower --nnodes",
        )
    return state, []


def rendezvous_closed(state: State, event: e.RendezvousClosed, now: float) -> Outcome:
    """The job that used this rendezvous has ended by itself: nothing is left to coordinate."""
    return (state, []) if state.nodes else (replace(state, phase=Phase.DONE), [e.EndJob(True)])
