"""Nodes come and go, workers are started; and torchrun's own rule for jobs that are not elastic."""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .outcome import Effects, Outcome, fail, start_workers, with_workers
from .state import Node, Phase, State, Status, Worker


def node_joined(state: State, event: e.NodeJoined, now: float) -> Outcome:
    """A node registered: count it in while forming, start workers on it while running."""
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
        state, effects = add_workers(replace(state, nodes=nodes), node)
        return state, [record, *effects]
    formed_s = now if len(nodes) == state.config.min_nodes else state.formed_s
    if event.order >= 0:
        ordered = list(state.nodes.items())
        ordered.insert(event.order, (event.node, node))
        nodes = dict(ordered)
    state = replace(state, nodes=nodes, formed_s=formed_s)
    if len(nodes) == state.config.max_nodes:
        state, effects = launch(state)
        return state, [record, *effects]
    return state, [record]


def launch(state: State) -> Outcome:
    """Start every worker on every node, ranks in the order of the nodes."""
    workers: dict[int, Worker] = {}
    for node in state.nodes.values():
        for _ in range(node.slots):
            rank = len(workers)
            incarnation = state.workers[rank].id.incarnation + 1 if rank in state.workers else 0
            workers[rank] = Worker(e.WorkerId(rank, incarnation), node.name)
    state = replace(state, phase=Phase.LAUNCHED, workers=workers)
    return state, [start_workers(state, node.name) for node in state.nodes.values()]


def add_workers(state: State, node: Node) -> Outcome:
    """Start workers of new ranks on a node that came while the job runs."""
    workers = dict(state.workers)
    for _ in range(node.slots):
        rank = max(workers, default=-1) + 1
        workers[rank] = Worker(e.WorkerId(rank, 0), node.name)
    state = replace(state, workers=workers)
    return state, [start_workers(state, node.name)]


def ticked(state: State, event: e.Ticked, now: float) -> Outcome:
    """Time passed: the last call for nodes, the join timeout, missing heartbeats."""
    config = state.config
    if state.phase is Phase.FORMING:
        if len(state.nodes) >= config.min_nodes:
            return launch(state) if now - state.formed_s >= config.last_call_s else (state, [])
        if now - state.formed_s >= config.join_timeout_s:
            return fail(
                state,
                f"only {len(state.nodes)} of at least {config.min_nodes} nodes joined in {config.join_timeout_s:g} s:"
                " start the others, or lower --nnodes",
            )
    for node in state.nodes.values():
        if now - node.heard_s > config.heartbeat_timeout_s:
            why = f"no heartbeat for {now - node.heard_s:.1f} s"
            return node_lost(state, e.NodeLost(node.name, why), now)
    return state, []


def heartbeat(state: State, event: e.HeartbeatReceived, now: float) -> Outcome:
    """A node is alive."""
    node = state.nodes.get(event.node)
    if node is None:
        return state, []
    return replace(state, nodes={**state.nodes, node.name: replace(node, heard_s=now)}), []


def node_lost(state: State, event: e.NodeLost, now: float) -> Outcome:
    """A node is gone, and with it what only it held."""
    if event.node not in state.nodes:
        return state, []
    lost = state.nodes[event.node]
    nodes = {name: node for name, node in state.nodes.items() if name != event.node}
    gone = replace(state, nodes=nodes)
    record = e.Record("node_lost", {"node": event.node, "why": event.why})
    if state.phase is Phase.FORMING:
        return gone, [record]
    ranks = sorted(w.id.rank for w in state.workers.values() if w.node == event.node)
    state, effects = fail(
        state,
        f"node {event.node} ({lost.host}) with ranks {ranks} is lost ({event.why}), and with it the only copy of their "
        "shards: snapshots are kept on the worker's own node only",
    )
    return state, [record, *effects]


def classic_exit(state: State, worker: Worker, event: e.WorkerDied) -> Outcome:
    """Torchrun's own rule: all workers start again after a failure, up to `max_restarts` times."""
    if event.clean:
        state = with_workers(state, replace(worker, status=Status.EXITED))
        if all(w.status is Status.EXITED for w in state.workers.values()):
            return replace(state, phase=Phase.DONE), [e.EndJob(True)]
        return state, []
    if state.restarts >= state.config.max_restarts:
        return fail(state, f"rank {worker.id.rank} failed: {event.cause}", rank=worker.id.rank)
    kills: Effects = [
        e.KillWorkers(node, tuple(w.id for w in state.workers.values() if w.node == node)) for node in state.nodes
    ]
    record = e.Record("restarted", {"rank": worker.id.rank, "cause": event.cause, "restart": state.restarts + 1})
    state, effects = launch(replace(state, restarts=state.restarts + 1))
    return state, [record, *kills, *effects]
