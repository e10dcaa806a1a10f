"""Another number of stages, on an operator's order: when it is offered, what refuses it, and what faults make of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.relayout import why_not
from everstep.elastic.protocol.state import Node, State
from everstep.elastic.sim.run import SHAPES, simulate

from .script import Script, w

RELAYOUTS = [name for name, shape in SHAPES.items() if shape.relayouts]


def trained(workers: int = 4, stages: int = 2, **config: object) -> Script:
    script = Script(workers=workers, stages=stages, **config)
    script.job = replace(script.job, steps=1000, micro_batches=12, global_batch_size=12)
    script.train()
    return script


def stages(state: State) -> int:
    assert state.layout is not None
    return len(state.layout.stages)


def plans(effects: list[e.Effect]) -> list[e.CarryOut]:
    return [effect for effect in effects if isinstance(effect, e.CarryOut)]


def records(effects: list[e.Effect], event: str) -> list[e.Record]:
    return [effect for effect in effects if isinstance(effect, e.Record) and effect.event == event]


@pytest.mark.parametrize("prefetch", [True, False])
def test_all_members_go_to_it_at_a_step_boundary(prefetch: bool) -> None:
    script = trained(prefetch=prefetch)
    effects = script(e.RelayoutOrdered(4))
    orders = plans(effects)
    assert [order.worker for order in orders] == [w(0), w(1), w(2), w(3)]
    plan = orders[0].plan
    assert (len(plan.layout.stages), plan.version, plan.fresh, plan.leaving) == (4, None, (), ())
    assert records(effects, "relayout_prepared")
    assert not any(isinstance(effect, e.AbortGeneration) for effect in effects)
    assert script.state.stages_asked == 4
    for rank in range(4):
        effects = script(e.WorkerSwitched(w(rank), plan.generation, 0.1, 100, 10))
        assert (stages(script.state), script.state.stages_asked) == (4, 0)
    (cost,) = records(effects, "rebalanced")
    assert (cost.fields["prefetched_bytes"], cost.fields["moved_bytes"]) == (400, 40)
    script.died(w(3))
    for rank in range(3):
        script.reported(w(rank))
    assert script.state.layout is not None
    assert len(script.state.layout.home) == 4, "recoveries keep to it"


def test_a_loss_before_the_switch_leaves_the_order_standing() -> None:
    script = trained()
    script(e.RelayoutOrdered(1))
    script.died(w(3))
    for rank in range(3):
        script.reported(w(rank))
    assert stages(script.state) == 2
    assert not plans(script(e.Ticked())), "the replacement comes first"
    script.ready(w(3, 1))
    script(e.WorkerSwitched(w(0), script.state.generation))
    script.committed(w(0), 3)
    (plan,) = {order.plan.generation: order.plan for order in plans(script(e.Ticked()))}.values()
    script(e.WorkerSwitched(w(1), plan.generation))
    assert (stages(script.state), script.state.stages_asked) == (1, 0)


def test_a_loss_after_the_first_has_entered_goes_on_in_the_new_layout() -> None:
    script = trained()
    generation = plans(script(e.RelayoutOrdered(1)))[0].plan.generation
    script(e.WorkerSwitched(w(0), generation))
    script.died(w(3))
    for rank in range(3):
        script.reported(w(rank))
    assert (stages(script.state), script.state.stages_asked) == (1, 0)


def test_an_order_that_has_become_impossible_is_dropped() -> None:
    script = Script(workers=1, stages=1, min_nodes=1, max_nodes=2)
    script.job = replace(script.job, steps=1000)
    script.node("n0")
    script.node("n1")
    script.elastic(w(0))
    script.ready(w(0), w(1))
    script.committed(w(0), 0)
    script.protected = 1
    script.committed(w(0), 1)
    script(e.RelayoutOrdered(2))
    script(e.NodeLost("n1", "its stream ended"))
    script.whole["n0"] = (1, 1)
    script.reported(w(0))
    script.committed(w(0), 2)
    script(e.HeartbeatsReceived(("n0",)))
    (dropped,) = records(script(e.Ticked()), "relayout_dropped")
    assert "2 stages need at least as many workers; there are 1" in dropped.fields["why"]
    assert script.state.stages_asked == 0
    assert not script(e.Ticked())


def recovering(script: Script) -> None:
    script.died(w(1))


def small(script: Script) -> None:
    """Nodes with hardly any memory for snapshots."""
    job = replace(script.job, state_bytes=(1 << 20,) * len(script.job.model.shards))
    job = replace(job, gradient_bytes=job.state_bytes)
    nodes = {"n0": Node("n0", "a", 4, "", memory_bytes=1 << 20)}
    script.state = replace(script.state, job=job, nodes=nodes)


def loop(script: Script) -> None:
    script.state = replace(script.state, job=replace(script.job, one_stage="run.prepare drives one"))


def switching(script: Script) -> None:
    """Another layout is offered that no operator asked for."""
    script(e.RelayoutOrdered(1))
    script.state = replace(script.state, stages_asked=0)


REFUSED: list[tuple[Callable[[Script], object], int, str]] = [
    (lambda s: None, 2, r"has 2 stage\(s\) already"),
    (lambda s: None, 5, "5 stages need at least as many workers; there are 4"),
    (loop, 4, "the job has one stage only: run.prepare drives one"),
    (small, 4, "of memory for snapshots and parity"),
    (recovering, 4, "a recovery is under way: try again"),
    (lambda s: s(e.RelayoutOrdered(1)), 4, r"a relayout to 1 stage\(s\) is under way: try again"),
    (switching, 4, "a rebalance is under way: try again"),
    (lambda s: s(e.StopRequested("SIGTERM")), 4, "the job is about to end"),
    (lambda s: s.committed(w(0), 998), 4, "the job is about to end"),
]


@pytest.mark.parametrize(("before", "asked", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_cannot_be_done_is_refused(before: Callable[[Script], object], asked: int, why: str) -> None:
    script = trained()
    before(script)
    assert re.search(why, why_not(script.state, asked)), why_not(script.state, asked)
    asked_before, layout = script.state.stages_asked, script.state.layout
    assert not plans(script(e.RelayoutOrdered(asked)))
    assert (script.state.stages_asked, script.state.layout) == (asked_before, layout)


def test_too_few_layers_are_refused() -> None:
    assert "5 stages need at least as many layers; the model has 4" in why_not(trained(workers=6).state, 5)


def test_nothing_begins_before_training_or_while_nodes_leave() -> None:
    script = Script(workers=1, min_nodes=1, max_nodes=3)
    assert "training has not begun: try again" in why_not(script.state, 2)
    for name in ("n0", "n1", "n2"):
        script.node(name)
    script.elastic(w(0))
    script.ready(w(0), w(1), w(2))
    script.committed(w(0), 0)
    script(e.DrainRequested("n1", "maintenance"))
    assert "node n1 hands over, to leave the job: try again" in why_not(script.state, 2)


@pytest.mark.parametrize("seeds", [range(100, 108), pytest.param(range(108, 128), marks=pytest.mark.soak)], ids=str)
@pytest.mark.parametrize("name", RELAYOUTS)
def test_relayouts_happen_under_faults(name: str, seeds: range) -> None:
    """`simulate` raises where a job ends with other bytes than the undisturbed one."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in seeds]
    total = sum((outcome.happenings for outcome in outcomes), Counter[str]())
    assert total["relayouts"] >= len(seeds) // 2
    assert total["switches of who has copies"], "some ranks had copied ahead what they came to own"
