"""Golden transcripts of nodes that are lost, fall silent, and join."""

from __future__ import annotations

from everstep.elastic.protocol import events as e

from .script import Script, w


def _trained(nodes: int = 3, *, losses: int = 1) -> Script:
    """One worker on each node, at version 3; version 2 survives lost nodes, and version 3 is whole on no node yet."""
    s = Script(workers=1, losses=losses, min_nodes=nodes, max_nodes=nodes)
    for number in range(nodes):
        s.node(f"n{number}")
    s.elastic(w(0))
    s.ready(*(w(rank) for rank in range(nodes)))
    for step in range(3):
        s.protected = step
        s.committed(w(0), step)
    s.whole = {f"n{number}": (1, 2) for number in range(nodes)}
    s.lines = ["... until step 2 is committed, and version 2 outlives nodes"]
    return s


def _lost(s: Script, node: str) -> None:
    s(e.NodeLost(node, "its stream broke"))


def node_lost_in_training() -> Script:
    """All go back to the version that survives it; a node that joins takes its ranks."""
    s = _trained()
    _lost(s, "n1")
    s.reported(w(0))
    s.reported(w(2))
    s.committed(w(0), 2)
    s.node("n3")
    s.ready(w(1, 1))
    s(e.WorkerSwitched(w(0), 3))
    return s


def node_lost_when_the_newest_version_is_whole() -> Script:
    """Nothing is computed again: all keepers report to hold it, although the members have not agreed on that."""
    s = _trained()
    s.whole = dict.fromkeys(("n0", "n2"), (1, 3))
    _lost(s, "n1")
    s.reported(w(0))
    s.reported(w(2))
    return s


def node_falls_silent() -> Script:
    """It is declared lost; its later messages are ignored, and it is fenced."""
    s = _trained()
    while "n1" in s.state.nodes:
        for node in ("n0", "n2"):
            s(e.HeartbeatsReceived((node,)), 0.2)
        s(e.Ticked())
    s(e.WorkerCommitted(w(1), 3, "a3", generation=1, protected=2))
    s(e.WorkerFinished(w(1)))
    s.reported(w(0))
    s.reported(w(2))
    return s


def second_node_lost_before_all_have_gone_back() -> Script:
    """One member carried out the rollback, the other did not: its earlier agreement does not count."""
    s = _trained(4, losses=2)
    _lost(s, "n1")
    for rank in (0, 2, 3):
        s.reported(w(rank))
    s.whole = {}
    _lost(s, "n3")
    s.reported(w(0))
    s.late(w(2), agreed=2, generation=1)
    return s


def losses_made_good_are_forgotten() -> Script:
    """A worker dies after a node was lost and training continued: the loss of the node causes no second rollback."""
    s = _trained()
    _lost(s, "n1")
    s.reported(w(0))
    s.reported(w(2))
    s.died(w(2))
    s.whole = {}
    s.reported(w(0), agreed=3)
    return s


def more_lost_than_protected() -> Script:
    s = _trained()
    s.whole = {}
    _lost(s, "n1")
    _lost(s, "n2")
    s.reported(w(0))
    s(e.WorkerLacking(w(0), 3, 2, (1, 2, 3)))
    s.reported(w(0), agreed=1)
    return s


def the_others_had_finished() -> Script:
    """The ranks that had still to finish are lost: the job ends when the others have recovered from that."""
    s = _trained()
    for step in range(3, 8):
        s.protected = step
        s.committed(w(0), step)
    s.whole = dict.fromkeys(("n0", "n1", "n2"), (1, 8))
    s.lines = ["... until the last step is committed"]
    s(e.WorkerFinished(w(0)))
    s(e.WorkerFinished(w(2)))
    _lost(s, "n1")
    s.reported(w(0))
    s.reported(w(2))
    s(e.WorkerResumed(w(0), 2, 0.0, 0.0))
    s(e.WorkerResumed(w(2), 2, 0.0, 0.0))
    return s


def node_lost_while_another_is_let_in() -> Script:
    """A join is offered that no member has entered: the keepers' reports are of the generation before."""
    s = _trained()
    _lost(s, "n1")
    s.reported(w(0))
    s.reported(w(2))
    s.committed(w(0), 2)
    s.node("n3")
    s.ready(w(1, 1))
    s.lines = ["... until a node has come in place of a lost one, and its worker is offered a place"]
    s.whole = {"n0": (2, 3), "n2": (2, 3)}
    _lost(s, "n2")
    s.reported(w(0))
    s.reported(w(1, 1), fresh=True)
    return s


NODE_SCRIPTS = (
    node_lost_in_training,
    node_lost_when_the_newest_version_is_whole,
    node_falls_silent,
    second_node_lost_before_all_have_gone_back,
    losses_made_good_are_forgotten,
    more_lost_than_protected,
    the_others_had_finished,
    node_lost_while_another_is_let_in,
)
