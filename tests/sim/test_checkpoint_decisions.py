"""The coordinator's decisions about checkpoints: which one a job starts from, or goes back to, and when it stops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Phase
from tests.sim.script import Script, w

SAVED = (e.Saved(6, "step-6", "a5"), e.Saved(4, "step-4", "a3"))


def script(*, workers: int = 2, nodes: int = 1, saved: tuple[e.Saved, ...] = (), **job: object) -> Script:
    """A job that saves checkpoints, all of whose workers are ready."""
    s = Script(workers=workers, min_nodes=nodes, max_nodes=nodes)
    s.job = replace(s.job, checkpoints=True, **job)
    for number in range(nodes):
        s.node(f"n{number}", slots=workers // nodes)
    for rank in range(workers):
        s(e.WorkerReady(w(rank), {"at": str(rank)}, s.job, saved if rank == 0 else ()))
    return s


def plans(s: Script, event: e.Event) -> list[e.CarryOut]:
    return [effect for effect in s(event) if isinstance(effect, e.CarryOut)]


def ends(effects: list[e.Effect]) -> list[e.EndJob]:
    return [effect for effect in effects if isinstance(effect, e.EndJob)]


def test_a_job_starts_from_the_newest_checkpoint():
    s = script(workers=1)
    assert s.state.committed == -1
    s = Script(workers=1)
    s.job = replace(s.job, checkpoints=True)
    s.node()
    (order,) = plans(s, e.WorkerReady(w(0), {}, s.job, SAVED))
    plan = order.plan
    assert (plan.version, plan.agreement, plan.checkpoint) == (6, "a5", "step-6")
    assert plan.fresh == plan.receivers == (0,)
    assert s.state.committed == 5
    s.committed(w(0), 5)  # reported again by a rank that resumes
    assert s.state.recorded == -1, "it is no line of this run's ledger"
    s.committed(w(0), 6)
    assert s.state.recorded == 6


@pytest.mark.parametrize("on_loss", ["checkpoint", "stop"])
def test_a_damaged_checkpoint_is_passed_over_only_if_that_is_allowed(on_loss):
    s = script(saved=SAVED, on_damage="older", on_loss=on_loss)
    s(e.CheckpointUnreadable(w(1), "step-6", "chunk 3 is damaged"))
    assert s.state.phase is Phase.RECOVERING
    s(e.CheckpointUnreadable(w(0), "step-6", "chunk 4 is damaged"))  # the other rank found it, too
    for rank in (0, 1):
        s.reported(w(rank), fresh=True)
    assert s.state.phase is Phase.RUNNING
    assert s.state.committed == 3
    assert [saved.name for saved in s.state.saved] == ["step-4"]
    assert ends(s(e.CheckpointUnreadable(w(0), "step-4", "chunk 5 is damaged")))[0].why.startswith("chunk 5 is damaged")
    s = script(saved=SAVED, on_damage="stop")
    (end,) = ends(s(e.CheckpointUnreadable(w(1), "step-6", "chunk 3 is damaged")))
    assert end.why == "chunk 3 is damaged (on_damage='older' would resume from the one before it)"


def _lose_a_node(s: Script) -> list[e.Effect]:
    """Node n1 is lost after step 6 is committed; nothing is protected from that."""
    for step in (5, 6):
        s.committed(w(0), step)
    s(e.NodeLost("n1", "gone"))
    before = len(s.lines)
    s.reported(w(0))
    return s.lines[before:]


def test_what_no_memory_has_is_read_from_the_checkpoint():
    s = script(nodes=2, protection="none", on_loss="checkpoint")
    s.committed(w(0), 0)
    s(e.CheckpointSaved(w(0), e.Saved(5, "step-5", "a4"), {}))
    _lose_a_node(s)
    assert s.state.phase is Phase.RUNNING
    assert s.state.committed == 4
    assert s.state.recorded == 6, "the ledger never goes back"
    assert s.state.layout.ranks == (0,)


def test_without_one_or_against_the_policy_the_job_ends():
    s = script(nodes=2, protection="none", on_loss="checkpoint")
    _lose_a_node(s)
    assert s.state.phase is Phase.DONE
    assert "no checkpoint of the job has been saved yet" in s.text()
    s = script(nodes=2, protection="none", on_loss="stop")
    s.committed(w(0), 0)
    s(e.CheckpointSaved(w(0), e.Saved(5, "step-5", "a4"), {}))
    _lose_a_node(s)
    assert s.state.phase is Phase.DONE


def test_going_on_from_where_it_only_just_resumed_is_no_loss():
    """A node is lost before the first commit after resuming: everything is still in the checkpoint."""
    s = script(nodes=2, protection="none", on_loss="stop", saved=SAVED)
    s(e.NodeLost("n1", "gone"))
    s.reported(w(0), agreed=5)
    s(e.WorkerLacking(w(0), s.state.generation, 6, (1, 2)))
    s.reported(w(0), agreed=5)
    assert s.state.phase is Phase.RUNNING
    assert s.state.committed == 5


def test_a_stop_waits_for_a_checkpoint_but_not_for_ever():
    s = script()
    s.committed(w(0), 2)
    asked = s(e.StopRequested("stopped by SIGTERM"))
    assert [x.worker for x in asked if isinstance(x, e.AskSave)] == [w(0), w(1)]
    assert not ends(asked)
    assert not ends(s(e.StopRequested("stopped by SIGTERM")))
    assert not ends(s(e.CheckpointSaved(w(0), e.Saved(2, "step-2", "a1"), {}))), "it is older than the request"
    (end,) = ends(s(e.CheckpointSaved(w(0), e.Saved(4, "step-4", "a3"), {})))
    assert not end.succeeded
    assert end.why == "stopped by SIGTERM; its state after 4 steps is saved"
    s = script()
    s.committed(w(0), 2)
    s(e.StopRequested("stopped by SIGTERM"))
    found = []
    for _ in range(300):
        s(e.HeartbeatsReceived(("n0",)))
        found = ends(s(e.Ticked()))
        if found:
            break
    assert found[0].why == "stopped by SIGTERM; no checkpoint was saved in the 20 s there were"


def test_a_stop_of_a_job_without_checkpoints_is_at_once():
    s = Script()
    s.train()
    assert ends(s(e.StopRequested("stopped by SIGINT")))[0].why == "stopped by SIGINT"


def test_the_newest_checkpoints_are_remembered_and_no_more():
    s = script()
    for version in (5, 3, 5, *range(7, 30)):
        s(e.CheckpointSaved(w(0), e.Saved(version, f"step-{version}", ""), {}))
    versions = [saved.version for saved in s.state.saved]
    assert versions == sorted(versions, reverse=True)
    assert versions[0] == 29
    assert len(versions) == e.REMEMBERED_CHECKPOINTS
