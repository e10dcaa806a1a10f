"""Golden transcripts of nodes that hand over and leave."""

from __future__ import annotations

from everstep.elastic.protocol import events as e

from .script import Script, w


def trained(nodes: int, *, min_nodes: int) -> Script:
    """One worker on each node, at version 3; version 2 outlives nodes."""
    s = Script(workers=1, min_nodes=min_nodes, max_nodes=nodes)
    for number in range(nodes):
        s.node(f"n{number}")
    s.elastic(w(0))
    s.ready(*(w(rank) for rank in range(nodes)))
    for step in range(3):
        s.protected = step
        s.committed(w(0), step)
    s.lines = ["... until step 2 is committed, and version 2 outlives nodes"]
    return s


def node_leaves() -> Script:
    """It is asked to leave, the others enter a generation without it, and it is released when they need it no more."""
    s = trained(3, min_nodes=1)
    s(e.DrainRequested("n1", "stopped by SIGTERM"))
    s.committed(w(0), 3)
    for rank in (1, 0, 2):
        s(e.WorkerSwitched(w(rank), 2))
    s.committed(w(2), 4)
    s.protected = 4
    s.committed(w(0), 5)
    s(e.NodeLost("n1", "its stream ended"))
    return s


def worker_dies_before_its_node_has_left() -> Script:
    """An ordinary loss, except that no worker replaces it; its node is released later."""
    s = trained(3, min_nodes=1)
    s(e.DrainRequested("n1", "stopped by SIGTERM"))
    s.died(w(1))
    s.reported(w(0))
    s.reported(w(2))
    s.protected = 4
    s.committed(w(0), 3)
    s.committed(w(0), 4)
    return s


SCRIPTS = (node_leaves, worker_dies_before_its_node_has_left)
