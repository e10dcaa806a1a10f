"""Which ranks leave the training loop, and at which step; the last checkpoint; and the code after training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Ending
from everstep.elastic.protocol.ending import ALONE_S
from everstep.elastic.protocol.state import Phase, Status
from everstep.elastic.sim.run import SHAPES, simulate

from .script import Script, w


def trained(workers: int = 2, *, saves: bool = False, **config: object) -> Script:
    """Step 2 of 8 is committed."""
    s = Script(workers=workers, **config)
    s.job = replace(s.job, checkpoints=saves)
    s.train()
    return s


def of(effects: list[e.Effect], kind: type[e.Effect]) -> list[e.Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def after_training(s: Script) -> Script:
    """All leave after step 2, and no checkpoint is due."""
    for rank in range(s.workers):
        s(e.WorkerFinished(w(rank), 3, "n"))
    assert s.state.phase is Phase.AFTER
    return s


def test_all_leave_at_one_step() -> None:
    s = trained(3)
    told = s(e.WorkerLeft(w(1), 3, "n1"))
    assert of(told, e.TellLeft) == [e.TellLeft(w(0), 3), e.TellLeft(w(2), 3)]
    for rank in (1, 0):
        assert not of(s(e.WorkerFinished(w(rank), 3, f"n{rank}")), e.EndTraining)
    ended = s(e.WorkerFinished(w(2), 3, "n2"))
    assert len(of(ended, e.EndTraining)) == 3
    assert not of(ended, e.EndJob), "what comes after training is part of the job"


def test_one_goes_on() -> None:
    """That is an error which names both; but not at once: the rank may be about to report an exception."""
    s = trained(3)
    s(e.WorkerLeft(w(1), 3, "n1"), after_s=0.0)
    assert not s(e.WorkerWentOn(w(0), 3), after_s=ALONE_S / 2)
    (end,) = of(s(e.Ticked(), after_s=ALONE_S), e.EndJob)
    assert end.lost == (end.why,)
    said = "rank 1 left the training loop after step 2 of 8, and rank 0 continued: all ranks have to "
    assert end.why.startswith(said)


def test_an_exception_is_told_instead() -> None:
    s = trained()
    s(e.WorkerLeft(w(1), 3, "n1"), after_s=0.0)
    s(e.WorkerWentOn(w(0), 3), after_s=0.0)
    (end,) = of(s(e.WorkerRaised(w(1), "ValueError: no", "trace"), after_s=0.0), e.EndJob)
    assert (end.why, end.lost) == ("ValueError: no", ())


def test_who_returns_alone_is_named_at_once() -> None:
    s = trained()
    s(e.WorkerWentOn(w(0), 3))
    (end,) = of(s(e.WorkerFinished(w(1), 3, "n1")), e.EndJob)
    assert "rank 1 left the training loop after step 2" in end.why


def test_what_all_have_is_saved_before_that_ends() -> None:
    s = trained(saves=True)
    s(e.WorkerFinished(w(1), 3, "n1"))
    asked = of(s(e.WorkerWentOn(w(0), 3)), e.Conclude)
    assert [(order.worker, order.version) for order in asked] == [(w(0), 3), (w(1), 3)]
    name = asked[0].name
    s(e.CheckpointSaved(w(0), e.Saved(3, name, "a2"), {}))
    assert not of(s(e.WorkerConcluded(w(0), name)), e.EndJob)
    (end,) = of(s(e.WorkerConcluded(w(1), name)), e.EndJob)
    assert end.why.endswith("the state after 3 steps is saved")


@pytest.mark.parametrize("why", ["", "read-only file system"])
def test_the_last_checkpoint_is_tried_once_more(why: str) -> None:
    """If it is not saved then, the job continues without it, and reports that at its end."""
    s = trained(saves=True)
    s(e.WorkerFinished(w(0), 3, "n0"))
    (first, second) = of(s(e.WorkerFinished(w(1), 3, "n1")), e.Conclude)
    assert s.state.phase is Phase.RUNNING
    if not why:
        s(e.CheckpointSaved(w(1), e.Saved(3, first.name, "a2"), {}))
    s(e.WorkerConcluded(w(0), first.name, why))
    assert of(s(e.WorkerConcluded(w(1), second.name)), e.EndTraining)
    s(e.WorkerDied(w(0), "exit status 0", clean=True))
    (end,) = of(s(e.WorkerDied(w(1), "exit status 0", clean=True)), e.EndJob)
    assert end.succeeded
    lost = f"the state after 3 steps is not saved ({why}); there is none"
    assert end.lost == ((lost,) if why else ())


def test_a_death_begins_the_last_checkpoint_anew() -> None:
    """Under another name: what was written of the first attempt is not mixed with it."""
    s = trained(saves=True)
    s(e.WorkerFinished(w(0), 3, "n0"))
    first = of(s(e.WorkerFinished(w(1), 3, "n1")), e.Conclude)
    s.died(w(1))
    s.reported(w(0))
    s(e.WorkerResumed(w(0), s.state.generation, 0.0, 0.0))
    assert s.state.phase is Phase.RUNNING
    assert not of(s(e.Ticked()), e.EndTraining), "rank 1 has yet to come to its end"
    s.ready(w(1, 1))
    s.reported(w(0))
    for worker in (w(0), w(1, 1)):
        s(e.WorkerResumed(worker, s.state.generation, 0.0, 0.0))
    again = of(s(e.WorkerFinished(w(1, 1), 3, "n1")), e.Conclude)
    assert [order.worker for order in again] == [w(0), w(1, 1)]
    assert {order.name for order in again}.isdisjoint(order.name for order in first)


def test_the_last_checkpoint_is_not_waited_for_for_ever() -> None:
    s = trained(saves=True, last_save_s=30.0)
    s(e.WorkerFinished(w(0), 3, "n0"))
    (order, _) = of(s(e.WorkerFinished(w(1), 3, "n1")), e.Conclude)
    s(e.WorkerConcluded(w(0), order.name))
    s(e.HeartbeatsReceived(("n0",)), after_s=29.0)
    assert s.state.phase is Phase.RUNNING
    s(e.HeartbeatsReceived(("n0",)), after_s=2.0)
    assert of(s(e.Ticked(), after_s=0.0), e.EndTraining)
    assert "rank 1 did not get it done in 30 s" in s.state.lost[0]


def test_a_process_that_ends_itself_in_training() -> None:
    """It has not been lost, and gets no replacement: the others save, and the job ends."""
    s = trained(3, saves=True)
    effects = s(e.WorkerDied(w(2), "exit status 0", clean=True, step=3, phase="compute"))
    assert not of(effects, e.StartWorkers)
    assert [order.worker for order in of(effects, e.AskSave)] == [w(0), w(1)]
    s.reported(w(0))
    s.reported(w(1))
    s.committed(w(0), 3)
    (end,) = of(s(e.CheckpointSaved(w(0), e.Saved(4, "n", "a3"), {})), e.EndJob)
    assert end.lost == (end.why,)
    assert end.why.startswith(
        "rank 2 ended its process with exit status 0 inside the training function, in step 3 of 8"
    )
    assert end.why.endswith("its state after 4 steps is saved")


def test_scripts_end_one_by_one() -> None:
    s = after_training(trained())
    assert not s(e.WorkerDied(w(1), "exit status 0", clean=True))
    assert [worker.status for worker in s.state.workers.values()] == [Status.AFTER, Status.EXITED]
    assert s(e.WorkerDied(w(0), "exit status 0", clean=True)) == [e.EndJob(True)]


def test_a_failure_after_training_ends_the_job() -> None:
    """No worker is replaced, and nothing is trained again."""
    s = after_training(trained())
    effects = s(e.WorkerDied(w(1), "killed by SIGKILL"))
    why = "training is done, but the code after it failed: killed by SIGKILL"
    assert effects == [e.EndJob(False, why, rank=1, ending=Ending.AFTER_TRAINING)]


def test_a_node_lost_after_training() -> None:
    """Its scripts are, unless they had ended."""
    for ended in (True, False):
        s = Script(workers=4, max_nodes=2)
        s.node("n0", 2)
        s.node("n1", 2)
        s.elastic(w(0))
        s.ready(*map(w, range(4)))
        s.committed(w(0), 2)
        after_training(s)
        if ended:
            for rank in (2, 3):
                s(e.WorkerDied(w(rank), "exit status 0", clean=True))
        found = of(s(e.NodeLost("n1", "its stream broke")), e.EndJob)
        if ended:
            assert not found
            assert s.state.phase is Phase.AFTER
        else:
            assert "training is done, but the code after it was lost on ranks 2, 3" in found[0].why


def test_a_stop_after_training_has_its_grace() -> None:
    s = after_training(trained(stop_grace_s=20.0))
    told = s(e.StopRequested("stopped by SIGTERM"))
    assert "training is done; the code after it has 20 s to end" in of(told, e.TellNode)[0].text
    s(e.WorkerDied(w(0), "exit status 0", clean=True), after_s=15.0)
    s(e.HeartbeatsReceived(("n0",)), after_s=4.0)
    assert not s(e.Ticked(), after_s=0.0)
    (end,) = s(e.Ticked(), after_s=2.0)
    assert end.succeeded
    assert end.lost == (
        "the code after training was interrupted on rank 1: stopped by SIGTERM; it had not ended after 20 s",
    )


def test_a_script_that_ends_in_that_grace_has_lost_nothing() -> None:
    s = after_training(trained(stop_grace_s=20.0))
    s(e.StopRequested("stopped by SIGTERM"))
    s(e.WorkerDied(w(0), "exit status 0", clean=True))
    assert s(e.WorkerDied(w(1), "exit status 0", clean=True)) == [e.EndJob(True)]


def test_one_leaves_alone_among_deaths() -> None:
    """It is named, unless it died and its replacement did not leave; no rank waits forever, and no byte differs."""
    outcomes = [simulate(seed, SHAPES["leaving alone"]) for seed in range(20)]
    assert sum("rank 1 left the training loop after step 2 of 8" in outcome.why for outcome in outcomes) > 15


def test_nobody_joins_after_training() -> None:
    s = Script(workers=2, max_nodes=2, last_call_s=0.0)
    s.node()
    s(e.Ticked())
    s.elastic(w(0))
    s.ready(w(0), w(1))
    s.committed(w(0), 2)
    after_training(s)
    (refused,) = s(e.NodeJoined("n9", "host-n9", 2, "n9:1"))
    assert refused == e.RefuseNode("n9", "the job has finished training already")
