"""Golden transcripts of jobs that go to another number of stages."""

from __future__ import annotations

from everstep.elastic.protocol import events as e

from .script import Script, w


def relayout_and_a_loss() -> Script:
    """One stage becomes two; a later loss keeps to two."""
    s = Script(workers=2)
    s.train()
    s(e.RelayoutOrdered(2))
    s(e.WorkerSwitched(w(1), 2, 0.1, 100, 10))
    s(e.WorkerSwitched(w(0), 2, 0.2, 100, 10))
    s.committed(w(0), 3)
    s.died(w(1), 4)
    s.reported(w(0))
    s.ready(w(1, 1))
    return s


def loss_before_the_switch() -> Script:
    """It is answered in one stage; the relayout is offered again when the replacement has joined."""
    s = Script(workers=2)
    s.train()
    s(e.RelayoutOrdered(2))
    s.died(w(1), 3)
    s.reported(w(0))
    s(e.Ticked())
    s.ready(w(1, 1))
    s(e.WorkerSwitched(w(0), s.state.generation))
    s.committed(w(0), 3)
    s(e.Ticked())
    s(e.WorkerSwitched(w(0), s.state.generation))
    return s


SCRIPTS = (relayout_and_a_loss, loss_before_the_switch)
