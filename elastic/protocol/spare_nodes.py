"""Spare nodes: registered beyond the nodes of --nnodes, and prepared; they take the places of nodes that are lost.

    registered -> its workers start when a node is lost, or leaves -> they join at a step boundary, as any newcomer's do

A spare is checked, has imported what the script imports, and has its keeper; it holds no state of the job.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .outcome import Effects, Outcome, add_workers
from .state import Heard, Node, Phase, State


def spare_joined(state: State, node: Node, now: float) -> Outcome:
    """A node registered that the job has no place for yet: it waits for one, unless there are enough spares."""
    config = state.config
    if len(state.spares) >= config.spares:
        waiting = f", and {config.spares} spare ones (--es-spares)" if config.spares else ""
        return state, [e.RefuseNode(node.name, f"the job has its {config.max_nodes} nodes already{waiting}")]
    sizes = {other.slots for other in (*state.nodes.values(), *state.spares.values())}
    if sizes != {node.slots}:
        others = " or ".join(map(str, sorted(sizes)))
        return state, [
            e.RefuseNode(
                node.name,
                f"a spare node has as many workers as the node whose place it takes: this one has {node.slots}, the "
                f"nodes of the job {others}: give all of them the same --nproc-per-node",
            )
        ]
    state = replace(state, spares={**state.spares, node.name: node}, heard={**state.heard, node.name: Heard(now)})
    fields = {"node": node.name, "host": node.host, "slots": node.slots}
    known = {"health": dict(node.health), "domains": list(node.domains)}
    record = e.Record("spare_joined", {**fields, **{name: value for name, value in known.items() if value}})
    text = f"the job has its {config.max_nodes} nodes: this node is a spare, and takes the place of one that is lost"
    return state, [record, e.TellNode(node.name, text)]


def take_places(state: State, now: float) -> Outcome:
    """Spare nodes take the places that are free in training: their workers start."""
    effects: Effects = []
    # At a tick, not in the turn of the loss: the plan of that turn names the keepers of the nodes that it knew.
    while (name := _next(state)) is not None:
        node = state.spares[name]
        state = replace(state, nodes={**state.nodes, name: node}, spares=_without(state, name))
        before = state.workers.keys()
        state, started = add_workers(state, node)
        ranks = sorted(state.workers.keys() - before)
        fields = {"node": name, "host": node.host, "ranks": ranks, "spares": len(state.spares)}
        effects += [e.Record("spare_started", fields), *started]
    return state, effects


def _next(state: State) -> str | None:
    """The spare that is to take a place: of the domain that the fewest nodes of the job are in, the oldest first."""
    if not state.spares or not state.elastic or state.stopping is not None:
        return None
    staying = [node for name, node in state.nodes.items() if name not in state.leaving]
    if state.phase not in (Phase.LAUNCHED, Phase.RUNNING, Phase.RECOVERING) or len(staying) >= state.config.max_nodes:
        return None
    domains = [set(node.domains) for node in staying]
    return min(
        state.fit_spares(),
        key=lambda name: sum(bool(known.intersection(state.spares[name].domains)) for known in domains),
        default=None,
    )


def spare_lost(state: State, event: e.NodeLost) -> Outcome:
    """A spare is lost: nothing is lost with it."""
    node = state.spares[event.node]
    fields = {"node": event.node, "host": node.host, "ranks": [], "why": event.why}
    return _gone(state, event.node), [e.Record("node_lost", fields), e.FenceNode(event.node, event.why)]


def spare_leaves(state: State, name: str, why: str) -> Outcome:
    """A spare was asked to leave, or to stop: it is released, and the job continues."""
    fields = {"node": name, "host": state.spares[name].host, "ranks": [], "why": why}
    text = f"{why}; it was a spare, and the job continues"
    return _gone(state, name), [e.Record("node_left", fields), e.ReleaseNode(name, text)]


def _gone(state: State, name: str) -> State:
    heard = {other: known for other, known in state.heard.items() if other != name}
    return replace(state, spares=_without(state, name), heard=heard)


def _without(state: State, name: str) -> dict[str, Node]:
    return {other: node for other, node in state.spares.items() if other != name}
