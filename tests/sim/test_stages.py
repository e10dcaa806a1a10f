"""The number of stages where the planner chooses it: at the start, after a loss, and by an operator's order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Ending
from everstep.elastic.protocol.relayout import why_not
from everstep.resharding.memory import layer_bytes

from .script import Script, w
from .test_relayout import plans, records, stages


def values(script: Script) -> int:
    """The bytes of all parameters."""
    return sum(layer_bytes(script.job.model))


def begun(part: float, workers: int = 4, **job: object) -> Script:
    """A job whose workers have memory for this part of all values and gradients, and no record or sum."""
    script = Script(workers=workers, stages=0, rebalance_after_s=1.0)
    script.job = replace(script.job, **{"steps": 1000, "micro_batches": 12, "global_batch_size": 12, **job})
    script.node()
    for rank in range(workers):
        script.elastic(w(rank))
        memory = int(2 * values(script) * part)
        script(e.WorkerReady(w(rank), {"at": str(rank)}, script.job, (), memory))
    return script


@pytest.mark.parametrize(("part", "count"), [(1.0, 1), (0.7, 2), (0.3, 4)])
def test_a_job_begins_with_the_fewest_that_fit(part: float, count: int) -> None:
    assert stages(begun(part).state) == count


def test_a_job_without_limits_has_one() -> None:
    script = Script(workers=4, stages=0)
    script.train()
    assert stages(script.state) == 1


def test_workers_without_enough_memory_end_the_job_and_say_what_is_needed() -> None:
    script = Script(workers=2, stages=0)
    script.node()
    script.elastic(w(0), w(1))
    script(e.WorkerReady(w(0), {"at": "0"}, script.job, (), 1 << 19))
    (end,) = [x for x in script(e.WorkerReady(w(1), {"at": "1"}, script.job, (), 1 << 19)) if isinstance(x, e.EndJob)]
    assert end.ending is Ending.DOES_NOT_FIT
    assert "with 2 stage(s), rank 0 needs " in end.why
    assert "for parameters, gradients and optimizer states of layers 0 to " in end.why
    assert "and may use 0.5 MiB (worker_memory): use more workers" in end.why


def test_a_given_number_that_does_not_fit_is_refused_at_the_start() -> None:
    script = Script(workers=2, stages=1)
    script.node()
    script.elastic(w(0), w(1))
    script(e.WorkerReady(w(0), {"at": "0"}, script.job))
    found = script(e.WorkerReady(w(1), {"at": "1"}, script.job, (), 1 << 20))
    (end,) = [x for x in found if isinstance(x, e.EndJob)]
    assert "with 1 stage(s), rank 1 needs " in end.why
    assert end.why.endswith(": use more workers, or more stages")


def after_a_while(script: Script, steps: int = 8) -> list[e.Effect]:
    """Steps are committed and nothing else happens."""
    effects: list[e.Effect] = []
    for _ in range(steps):
        script.committed(w(0), script.state.committed + 1)
        effects += script(e.Ticked(), after_s=0.5)
    return effects


def test_another_number_is_the_only_one_that_fits() -> None:
    """As after a loss, where fewer ranks divide the records. The step takes longer, and nothing is promised of it."""
    script = begun(1.0)
    script.committed(w(0), 0)
    workers = {
        rank: replace(worker, memory_bytes=int(1.4 * values(script))) for rank, worker in script.state.workers.items()
    }
    script.state = replace(script.state, workers=workers)
    (prepared,) = records(after_a_while(script), "rebalance_prepared")
    assert prepared.fields["why"].startswith("ranks lack the memory for their layers; ")
    assert script.state.join is not None
    assert len(script.state.join.layout.stages) == 2
    assert script.state.balance.promised == 0


def test_an_order_for_a_number_ends_it_and_an_order_for_none_begins_it() -> None:
    script = begun(1.0)
    script.committed(w(0), 0)
    assert script.state.plans_stages
    plan = plans(script(e.RelayoutOrdered(2)))[0].plan
    assert not script.state.plans_stages
    for rank in range(4):
        script(e.WorkerSwitched(w(rank), plan.generation, 0.1, 0, 0))
    assert stages(script.state) == 2
    assert why_not(script.state, 2) == "the job has 2 stage(s) already"
    after_a_while(script)
    target = script.state.join.layout if script.state.join is not None else script.state.layout
    assert target is not None
    assert len(target.stages) == 2, "the order stands"
    generation = script.state.join.generation if script.state.join is not None else 0
    for rank in range(4 if generation else 0):
        script(e.WorkerSwitched(w(rank), generation, 0.1, 0, 0))
    script(e.RelayoutOrdered(0))
    (prepared,) = records(after_a_while(script, 40), "rebalance_prepared")
    assert "% less time by the forecast" in prepared.fields["why"]
    assert script.state.join is not None
    assert len(script.state.join.layout.stages) == 1


def test_an_order_for_the_present_number_keeps_it() -> None:
    script = begun(0.7)
    script.committed(w(0), 0)
    assert not plans(script(e.RelayoutOrdered(2)))
    assert (stages(script.state), script.state.plans_stages) == (2, False)


def test_what_does_not_fit_is_refused() -> None:
    script = begun(0.7)
    script.committed(w(0), 0)
    assert "with 1 stage(s), rank 0 needs " in why_not(script.state, 1)
    assert script.state.plans_stages


def test_a_script_that_drives_one_has_one() -> None:
    script = begun(1.0, one_stage="run.prepare drives one")
    script.committed(w(0), 0)
    assert stages(script.state) == 1
    assert not script.state.plans_stages
    assert why_not(script.state, 0) == "the job has one stage only: run.prepare drives one"
