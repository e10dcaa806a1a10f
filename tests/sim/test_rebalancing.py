"""Rebalancing: when the coordinator looks for a faster layout, what it offers, and what becomes of it under faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.recovering import few_micro_batches
from everstep.elastic.protocol.state import State
from everstep.elastic.sim.run import SHAPES, simulate
from everstep.resharding.forecast import Costs, step_time

from .script import Script, w

REBALANCING = [name for name, shape in SHAPES.items() if shape.rebalance_s]


def trained(**config: object) -> Script:
    """A job of four ranks in one stage that has committed some steps."""
    script = Script(workers=4, **{"rebalance_after_s": 5.0, **config})
    script.job = replace(script.job, steps=1000, micro_batches=12, global_batch_size=12)
    script.train()
    script.committed(w(0), 0)
    return script


def steps(script: Script, count: int, seconds: float) -> None:
    """So many steps are committed, each after so long."""
    for _ in range(count):
        script.now += seconds
        script.committed(w(0), script.state.committed + 1)


def shares(state: State) -> list[int]:
    assert state.layout is not None
    return [block.stop - block.start for block in state.layout.stages[0].blocks]


def offered(effects: list[e.Effect]) -> list[e.CarryOut]:
    return [effect for effect in effects if isinstance(effect, e.CarryOut)]


def test_a_slow_rank_gets_less_once_the_layout_has_lasted() -> None:
    script = trained()
    even = shares(script.state)
    assert not offered(script(e.Ticked()))
    assert not offered(script(e.SpeedsMeasured({1: 0.4})))
    steps(script, 2, 2.0)
    assert not offered(script(e.Ticked(), 0.5)), "the layout has not lasted long enough"
    orders = offered(script(e.Ticked(), 2.0))
    assert [order.worker for order in orders] == [w(0), w(1), w(2), w(3)]
    assert not orders[0].plan.moves, "micro-batches go to other ranks, and nothing else moves"
    assert not offered(script(e.Ticked(), 10.0)), "one at a time"
    script(e.WorkerSwitched(w(2), orders[0].plan.generation))
    assert shares(script.state)[1] < even[1]
    assert max(shares(script.state)) > max(even)
    assert not offered(script(e.Ticked())), "it has only begun"
    steps(script, 8, 1.0)
    assert not offered(script(e.Ticked())) + offered(script(e.Ticked())), "it is balanced now"
    script(e.SpeedsMeasured({}))
    (plan,) = {order.plan.generation: order.plan for order in offered(script(e.Ticked()))}.values()
    script(e.WorkerSwitched(w(0), plan.generation))
    assert shares(script.state) == even, "it has recovered, and gets as much as the others again"


def enter_faster(script: Script, speeds: dict[int, float]) -> None:
    """All members enter the layout that these speeds lead to."""
    script(e.SpeedsMeasured(speeds))
    (plan,) = {order.plan.generation: order.plan for order in offered(script(e.Ticked(), 1.0))}.values()
    script(e.WorkerSwitched(w(2), plan.generation))
    script(e.Ticked())


def test_after_a_broken_promise_a_layout_has_to_last_longer() -> None:
    script = trained()
    script(e.Ticked())
    steps(script, 5, 2.0)
    enter_faster(script, {1: 0.4})
    steps(script, 3, 2.0)
    assert not offered(script(e.Ticked(), 0.1))
    assert script.state.balance.patience == 4, "it saves nothing"
    steps(script, 3, 2.0)
    assert not offered(script(e.SpeedsMeasured({})) + script(e.Ticked(), 0.1)), "speeds changed, but too soon"
    steps(script, 4, 2.0)
    assert offered(script(e.Ticked(), 0.1)), "it has lasted four times as long as the first one had to"


@pytest.mark.parametrize(("saves", "searched"), [(True, False), (False, True)])
def test_a_promise_is_checked_when_the_new_layout_has_lasted(saves: bool, searched: bool) -> None:
    script = trained()
    script(e.Ticked())
    script(e.SpeedsMeasured({1: 0.4}))
    steps(script, 5, 2.0)
    (plan,) = {order.plan.generation: order.plan for order in offered(script(e.Ticked(), 1.0))}.values()
    script(e.WorkerSwitched(w(2), plan.generation))
    script(e.Ticked())
    steps(script, 10, 1.0 if saves else 2.0)
    (record,) = [x for x in script(e.Ticked(), 0.1) if isinstance(x, e.Record) and x.event == "rebalance_measured"]
    assert record.fields["promised"] > 0.2
    assert (record.fields["saved"] > 0.2) == saves
    assert script.state.balance.searched == searched


def rebalanced(effects: list[e.Effect]) -> list[e.Record]:
    return [effect for effect in effects if isinstance(effect, e.Record) and effect.event == "rebalanced"]


def offering() -> tuple[Script, int]:
    """A script in which a faster layout has just been offered, and its generation."""
    script = trained()
    script(e.Ticked())
    script(e.SpeedsMeasured({1: 0.4}))
    steps(script, 5, 2.0)
    return script, offered(script(e.Ticked(), 1.0))[0].plan.generation


def test_the_cost_is_recorded_when_all_members_have_entered() -> None:
    script, generation = offering()
    for rank in (2, 0, 3):
        assert not rebalanced(script(e.WorkerSwitched(w(rank), generation, 0.1 * rank, 100, 10)))
    assert not rebalanced(script(e.WorkerSwitched(w(3), generation, 0.3, 100, 10))), "a message that is repeated"
    (record,) = rebalanced(script(e.WorkerSwitched(w(1), generation, 0.2, 0, 5)))
    assert (record.fields["stall_s"], record.fields["prefetched_bytes"], record.fields["moved_bytes"]) == (0.3, 300, 35)
    assert not rebalanced(script(e.WorkerDied(w(1), "signal 9")))


def test_a_loss_while_members_enter_records_the_cost_so_far() -> None:
    script, generation = offering()
    script(e.WorkerSwitched(w(2), generation, 0.2, 100, 10))
    (record,) = rebalanced(script(e.WorkerDied(w(1), "signal 9")))
    assert (record.fields["generation"], record.fields["stall_s"]) == (generation, 0.2)
    assert not rebalanced(script(e.WorkerSwitched(w(3), generation, 0.1, 100, 10)))


def test_a_loss_before_any_member_enters_records_nothing() -> None:
    script, _ = offering()
    assert not rebalanced(script(e.WorkerDied(w(1), "signal 9")))


def test_measured_costs_are_a_reason_to_search_and_decide_the_layout() -> None:
    script = Script(workers=2, stages=2, rebalance_after_s=5.0)
    script.job = replace(script.job, stages=2, steps=1000, micro_batches=12, global_batch_size=12)
    script.train()
    script.committed(w(0), 0)
    script(e.Ticked())
    steps(script, 4, 2.0)
    assert not offered(script(e.Ticked())), "by what the model says, the layout is the best"
    script(e.CostsMeasured(Costs((0.1, 0.1, 0.1, 0.3), (0.2, 0.2, 0.2, 0.6))))
    orders = script(e.Ticked())
    assert [(s.start, s.stop) for s in offered(orders)[0].plan.layout.stages] == [(0, 3), (3, 4)]
    (record,) = [x for x in orders if isinstance(x, e.Record) and x.event == "rebalance_prepared"]
    assert record.fields["forward_s"] == [0.1, 0.1, 0.1, 0.3]
    layout = offered(orders)[0].plan.layout
    assert record.fields["forecast_s"] == step_time(layout, script.state.costs, {})
    for rank in range(2):
        script(e.WorkerSwitched(w(rank), layout.generation))
    script(e.Ticked())
    steps(script, 10, 1.0)
    (record,) = [x for x in script(e.Ticked(), 0.1) if isinstance(x, e.Record) and x.event == "rebalance_measured"]
    assert record.fields["forecast_s"] == pytest.approx(step_time(layout, script.state.costs, {}))
    assert record.fields["step_s"] == pytest.approx(1.0, rel=0.2)


def test_costs_as_assumed_are_no_reason() -> None:
    script = trained()
    script(e.Ticked())
    steps(script, 4, 3.0)
    script(e.Ticked())
    assert script.state.balance.searched
    assumed = Costs.of(script.job.model)
    script(e.CostsMeasured(assumed.scaled(7.0)))
    assert script.state.balance.searched
    assert sum(script.state.costs.total) == pytest.approx(7.0), "used from now on"
    script(e.CostsMeasured(Costs((1.0,), (2.0,))))
    assert len(script.state.costs.forward) == script.job.model.layers, "of another model"
    script(e.CostsMeasured(assumed.scaled(9.0)))
    assert script.state.balance.searched, "all layers take longer"
    script(e.CostsMeasured(Costs((10.0, *assumed.forward[1:]), assumed.backward)))
    assert not script.state.balance.searched


def test_small_changes_of_speed_are_no_reason() -> None:
    script = trained()
    script(e.Ticked())
    script(e.SpeedsMeasured({1: 0.95}))
    assert not script.state.speeds
    steps(script, 4, 3.0)
    assert not offered(script(e.Ticked()))
    assert script.state.balance.searched


def test_zero_turns_it_off() -> None:
    script = trained(rebalance_after_s=0.0)
    script(e.Ticked())
    script(e.SpeedsMeasured({1: 0.4}))
    steps(script, 4, 30.0)
    assert not offered(script(e.Ticked()))


def test_a_node_that_wants_to_leave_goes_first() -> None:
    script = trained()
    script(e.Ticked())
    script(e.SpeedsMeasured({1: 0.4}))
    steps(script, 4, 3.0)
    script(e.DrainRequested("n0", "maintenance"))
    assert not any(isinstance(x, e.Record) and x.event == "rebalance_prepared" for x in script(e.Ticked()))


@pytest.mark.parametrize("seeds", [range(100, 108), pytest.param(range(108, 128), marks=pytest.mark.soak)], ids=str)
@pytest.mark.parametrize("name", REBALANCING)
def test_rebalances_happen_under_faults(name: str, seeds: range) -> None:
    """`simulate` raises where a job ends with other bytes than the undisturbed one."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in seeds]
    total = sum((outcome.happenings for outcome in outcomes), Counter[str]())
    assert total["rebalances"] >= len(seeds) // 4
    assert total["switches of who has copies"], "some ranks had copied ahead what they came to own"


@pytest.mark.parametrize(("workers", "micro_batches", "said"), [(4, 15, True), (4, 16, False), (1, 1, False)])
def test_too_few_micro_batches_are_said_at_the_start(workers: int, micro_batches: int, said: bool) -> None:
    script = Script(workers=workers)
    script.job = replace(script.job, micro_batches=micro_batches, global_batch_size=micro_batches)
    script.node()
    first = [w(rank) for rank in range(workers)]
    script.elastic(first[0])
    script.ready(*first)
    assert sum("(few_micro_batches)" in line for line in script.lines) == said
    assert script.state.layout is not None
    records = few_micro_batches(script.state.layout)
    expected = [{"micro_batches": micro_batches, "ranks": workers, "enough": 4 * workers}] if said else []
    assert [record.fields for record in records if isinstance(record, e.Record)] == expected
