"""Causes are values: the texts beside them affect no decision."""

from __future__ import annotations

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Cause, Departure, Ending

from .golden_draining import trained
from .script import Script, w


def recovered(s: Script) -> dict:
    """The log line of the current recovery, once it is complete."""
    for worker in [member.id for member in s.state.members()]:
        s.reported(worker)
    (line,) = [effect.fields for effect in _finish(s) if isinstance(effect, e.Record) and effect.event == "recovered"]
    return dict(line)


def _finish(s: Script) -> list[e.Effect]:
    for worker in [x.id for x in s.state.workers.values() if x.status.value == "starting"]:
        s.ready(worker)
    assert s.state.layout is not None
    for worker in [x.id for x in s.state.members()]:
        s(e.WorkerResumed(worker, s.state.layout.generation, 0.01, 0.01))
    committed = e.WorkerCommitted(w(0), s.state.committed + 1, "a", generation=s.state.layout.generation)
    return s(committed)


@pytest.mark.parametrize(("hang", "cause"), [("", Cause.WORKER_DIED), ("silent", Cause.WORKER_HUNG)])
@pytest.mark.parametrize("text", ["killed by SIGKILL", "hung: a damaged frame is not whole"])
def test_a_death(hang: str, cause: Cause, text: str) -> None:
    s = trained(3, min_nodes=1)
    s(e.WorkerDied(w(1), text, step=3, phase="compute", hang=hang))
    line = recovered(s)
    assert (line["reason"], line["why"]) == (cause.value, text)


def test_a_lost_node_weighs_more_than_the_death_before_it() -> None:
    s = trained(3, min_nodes=1)
    s(e.WorkerDied(w(1), "killed by SIGKILL", step=3, phase="compute"))
    s(e.NodeLost("n2", "its stream ended"))
    assert s.state.recovery is not None
    assert s.state.recovery.cause is Cause.NODE_LOST
    s(e.WorkerDied(w(0), "killed by SIGKILL", step=3, phase="compute"))
    assert s.state.recovery.cause is Cause.NODE_LOST


@pytest.mark.parametrize("where", ["frame", "replica", "backup"])
def test_damaged_bytes(where: str) -> None:
    s = trained(3, min_nodes=1)
    assert s.state.layout is not None
    s(e.CorruptionFound(w(0), s.state.layout.generation, where, rank=1))
    assert s.state.recovery is not None
    assert s.state.recovery.cause is Cause.CORRUPTION


def test_shards_that_are_found_nowhere() -> None:
    s = trained(3, min_nodes=1)
    assert s.state.layout is not None
    s(e.WorkerLacking(w(0), s.state.layout.generation, 3, (0,)))
    assert s.state.recovery is not None
    assert s.state.recovery.cause is Cause.NOT_WHOLE


def test_an_operator_who_writes_quarantine_is_obeyed() -> None:
    """The node that its operator drains leaves although the others are lost; one in quarantine would be kept."""
    s = trained(2, min_nodes=1)
    s(e.DrainRequested("n1", "quarantine: the rack is serviced"))
    assert s.state.leaving["n1"].departure is Departure.ASKED
    s(e.NodeLost("n0", "its stream ended"))
    s(e.HeartbeatsReceived(("n1",)))
    s(e.Ticked())
    assert "n1" in s.state.leaving


def ends(effects: list[e.Effect]) -> list[e.EndJob]:
    return [effect for effect in effects if isinstance(effect, e.EndJob)]


def test_endings() -> None:
    (end,) = ends(trained(2, min_nodes=2)(e.DrainRequested("n1", "stopped by SIGTERM")))
    assert end.ending is Ending.NO_NODE_STAYS
    (end,) = ends(trained(2, min_nodes=1)(e.StopRequested("asked to leave")))
    assert end.ending is Ending.STOPPED
    (end,) = ends(trained(1, min_nodes=1)(e.NodeLost("n0", "its stream ended")))
    assert end.ending is Ending.TOO_MUCH_LOST
    (end,) = ends(trained(1, min_nodes=1)(e.WorkerRaised(w(0), "ValueError: the node was the last one", "")))
    assert end.ending is Ending.RAISED
