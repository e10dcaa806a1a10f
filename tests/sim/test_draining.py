"""Nodes that hand over and leave: nothing is aborted or computed again, whatever else fails meanwhile."""

from __future__ import annotations

import dataclasses

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Phase, Status
from everstep.elastic.sim.faults import Drain, Fault, NodeFault
from everstep.elastic.sim.run import SHAPES, Outcome, simulate
from everstep.resharding.plan import plan_leave
from everstep.resharding.planners import initial_layout

from .golden_draining import trained
from .script import Script, w

DRAINED = [name for name, shape in SHAPES.items() if shape.drains and not shape.rebalance_s]
SEEDS = range(24)


@pytest.mark.parametrize("name", DRAINED)
def test_seeds(name: str) -> None:
    """Random departures among random deaths and losses."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(outcome.nodes_left for outcome in outcomes) > len(SEEDS) // 2
    assert len([outcome for outcome in outcomes if outcome.why]) <= len(SEEDS) // 5


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("3 nodes, leaving", 2),  # the offer arrived twice, and was entered twice
        ("3 nodes, leaving", 391),  # a leaver died before a member had its last values
        ("3 nodes, leaving", 113),  # a rank of a leaving node has still to finish
        ("4 nodes, leaving", 29),  # all nodes that were to continue are lost
        ("3 nodes, leaving", 1097),  # the last worker that a recovery waits for dies, without a replacement
        ("4 nodes, leaving", 804),  # the protection depends on the node that leaves
        ("4 nodes, leaving", 122),  # the first protected version is known two steps later
    ],
)
def test_seeds_that_fail_when_a_guard_is_missing(name: str, seed: int) -> None:
    """Each once failed, without what its comment names."""
    simulate(seed, SHAPES[name])


def _undisturbed(outcome: Outcome) -> bool:
    return not any("AbortGeneration" in line or "committed_again" in line for line in outcome.log)


@pytest.mark.parametrize("name", [*DRAINED, "3 nodes", "4 nodes, seldom", "6 nodes"])
def test_a_departure_stops_nobody(name: str) -> None:
    """One after another, and two at once, in any phase: one generation each, no abort, no step twice."""
    shape = dataclasses.replace(SHAPES[name], drains=True, late_slots=0, spares=0, steps=16)
    for seed, phase in enumerate(("compute", "reduce", "agree", "update", "commit", "")):
        drains = [
            Drain(victims=1, phase=phase, after=3 + seed, at_s=0.0),
            Drain(victims=2, phase="commit", after=4 * shape.workers, spread_s=0.01),
        ]
        outcome = simulate(seed, shape, faults=list(drains))
        assert not outcome.why
        assert outcome.nodes_left == outcome.nodes_asked >= 2
        assert outcome.generations <= 1 + outcome.nodes_left + outcome.happenings["rebalances"]
        assert _undisturbed(outcome)


@pytest.mark.parametrize("phase", ["agree", "update", "commit", "restore", "leave"])
def test_who_leaves_is_lost(phase: str) -> None:
    """Before it has handed over, and after: as if it had not been asked to leave."""
    for name, after in (("4 nodes", 6), ("5 nodes, leaving", 9), ("4 nodes, leaving", 2)):
        shape = dataclasses.replace(SHAPES[name], drains=True, steps=14)
        drain = Drain(victims=1, phase="commit", after=shape.workers * 3)
        number = 0 if phase in ("leave", "restore") else after + 3 * shape.workers
        loss: Fault = NodeFault(victims=1, phase=phase, after=number)
        assert not simulate(after, shape, faults=[drain, loss]).why
        death = Fault(victims=1, phase=phase, after=number)
        assert not simulate(after, shape, faults=[drain, death]).why


# ---------------------------------------------------------------- the bare machine


def drain(s: Script, node: str) -> list[e.Effect]:
    return s(e.DrainRequested(node, "stopped by SIGTERM"))


def test_the_offer_goes_to_who_leaves_too() -> None:
    s = trained(3, min_nodes=1)
    orders = [effect for effect in drain(s, "n1") if isinstance(effect, e.CarryOut)]
    assert {order.worker.rank for order in orders} == {0, 1, 2}
    plan = orders[0].plan
    assert plan.layout.ranks == (0, 2)
    assert plan.leaving == (1,)
    assert plan.version is None
    assert not plan.fresh
    assert s.state.phase is Phase.RUNNING
    assert not drain(s, "n1"), "asked twice"


def test_the_node_is_let_go_only_when_nobody_needs_it() -> None:
    s = trained(3, min_nodes=1)
    drain(s, "n1")
    generation = s.state.generation
    s(e.WorkerSwitched(w(0), generation))
    assert s.state.workers[1].status is Status.LEFT
    s.protected = 2
    s.committed(w(0), 3)
    assert "n1" in s.state.nodes, "version 3, of the switch, is protected nowhere"
    s.protected = 4
    s.committed(w(0), 4)
    assert "n1" in s.state.nodes, "its worker may have a part of a checkpoint to write"
    s(e.WorkerSwitched(w(1), generation))
    s.committed(w(2), 5)
    assert "n1" not in s.state.nodes
    assert s.state.vacant == {1: 0}
    assert not s(e.NodeLost("n1", "its stream ended")), "it is no loss"


@pytest.mark.parametrize(("nodes", "min_nodes", "leave"), [(2, 2, 1), (3, 2, 2), (1, 1, 1)])
def test_too_few_would_be_left(nodes: int, min_nodes: int, leave: int) -> None:
    """The job is asked to stop, as by a signal to all of it."""
    s = trained(nodes, min_nodes=min_nodes)
    for number in range(leave):
        assert s.state.phase is Phase.RUNNING
        effects = drain(s, f"n{number}")
    (ended,) = [effect for effect in effects if isinstance(effect, e.EndJob)]
    assert not ended.succeeded
    assert ended.why == "stopped by SIGTERM"


def test_a_job_with_checkpoints_saves_instead() -> None:
    s = trained(2, min_nodes=2)
    s.state = dataclasses.replace(s.state, job=dataclasses.replace(s.state.job, checkpoints=True))
    asked = [effect.worker.rank for effect in drain(s, "n1") if isinstance(effect, e.AskSave)]
    assert asked == [0, 1]
    assert not drain(s, "n0"), "it is stopping already"


def test_a_classic_job_stops() -> None:
    s = Script(workers=1, min_nodes=1, max_nodes=2)
    s.node("n0")
    s.node("n1")
    assert any(isinstance(effect, e.EndJob) for effect in drain(s, "n1"))


def test_a_node_that_leaves_before_training_holds_nothing() -> None:
    s = Script(workers=1, min_nodes=1, max_nodes=3)
    s.node("n0")
    s.node("n1")
    assert e.ReleaseNode("n1", "stopped by SIGTERM; the others continue") in drain(s, "n1")
    assert list(s.state.nodes) == ["n0"]


def test_nobody_leaves_with_the_last_step() -> None:
    """The end, which is near, releases it; an offer that was not entered in time is withdrawn."""
    s = trained(3, min_nodes=1)
    for step in range(3, 6):
        s.committed(w(0), step)
    drain(s, "n1")
    assert s.state.join is not None
    s(e.WorkerIdled(w(2), s.state.generation))
    assert s.state.join is None
    assert s.state.phase is Phase.RUNNING
    s.committed(w(0), 6)
    s(e.HeartbeatsReceived(("n0", "n1", "n2")))
    assert not s(e.Ticked()), "another offer"
    s.committed(w(0), 7)
    for rank in range(3):
        effects = s(e.WorkerFinished(w(rank)))
    assert [effect.worker for effect in effects if isinstance(effect, e.EndTraining)] == [w(0), w(1), w(2)]
    for rank in range(3):
        effects = s(e.WorkerDied(w(rank), "exit status 0", clean=True))
    assert e.EndJob(True) in effects


def test_a_node_may_come_in_place_of_one_that_leaves() -> None:
    """Although it is still present."""
    s = trained(3, min_nodes=1)
    drain(s, "n1")
    s.node("n3")
    assert "n3" in s.state.nodes
    s.node("n4")
    assert "n4" not in s.state.nodes


def test_what_a_leave_moves() -> None:
    """What the leaver owned, and no more; readers receive values only where they lack some."""
    spec = Script().job.model
    old = initial_layout(spec, [0, 1, 2, 3], 2, 4)
    plan = plan_leave(spec, old, [1], 2)
    assert {move.shard for move in plan.gained} == {s for s, owner in enumerate(old.owners) if owner == 1}
    assert plan.values == ()
    alone = plan_leave(spec, old, [2, 3], 2)
    assert alone.receivers == (0, 1)
    assert alone.leaving == (2, 3)
