"""Which messages a worker without any state of the job accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.comms.mesh.communicator import Aborted
from everstep.elastic.engine.call_log import CallLog
from everstep.elastic.engine.driver import Driver
from everstep.elastic.engine.position import Position
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.engine.user_loop import Step, UserLoop
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.worker_state import Holding, WorkerPhase, WorkerState
from everstep.resharding.plan import Plan
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec
from tests.terms import agreed


def test_what_a_guide_told_ends_with_its_plan() -> None:
    """The message's plan is aborted, and the next plan goes back to an older version, with other settings."""
    told = Position(
        version=30,
        agreement="{}",
        after={"groups": [{"lr": 0.1}]},
        left=None,
        records={"29": {"frozen": []}},
        unseen=(Step(29, 1.0, 2.0),),
        turning=True,
        begun=False,
        calls={"count": 7, "made": [["after step 29", 0, "run.barrier", "null", 30]]},
        attributes={"dropout.p": 0.5},
        turns={"values": ["5"], "at": {"29": {"users": 0}}},
    )
    assert Position.of_message(told.to_message()) == told
    records: list[dict[str, Any]] = []
    comm = SimpleNamespace(receive=lambda rank, key: told.to_message())
    adjustments, turns = (SimpleNamespace(take_records=records.append) for _ in range(2))
    others: list[Any] = []
    pipeline = SimpleNamespace(forwards=SimpleNamespace(attributes=SimpleNamespace(join=others.append)))
    fetched: list[Any] = []
    large = SimpleNamespace(fetch_told=lambda *told: fetched.append(told))
    parts = {"adjustments": adjustments, "turns": turns, "calls": CallLog(), "large": large, "pipeline": pipeline}
    engine = SimpleNamespace(rank=3, comm=comm, user_loop=UserLoop(), version=0, **parts)
    recovery = Recovery.__new__(Recovery)
    recovery.engine, recovery._after = engine, {}
    assert recovery._ask_place(w.AskPlace(1)) == w.Placed(30, "{}", None)
    assert (recovery._after, engine.user_loop.unseen) == (told.after, [Step(29, 1.0, 2.0)])
    assert records == [told.records, told.turns]
    assert fetched == [("{}", told.after)]
    assert others == [told.attributes]
    assert (recovery.guide_begun, engine.calls.records()) == (False, told.calls)
    terms = agreed(step=28, loss=3.0, norm=1.0)
    recovery._take_unseen(w.TakeUnseen(29, terms.to_text()))
    assert recovery.guide_begun, "the guide is gone, and this rank's own code decides"
    assert (recovery._after, engine.user_loop.unseen) == ({}, [Step(28, 3.0, 1.0)]), (
        "nobody is left whose code has seen step 28"
    )
    recovery._take_unseen(w.TakeUnseen(29, replace(terms, after={}).to_text()))
    assert engine.user_loop.unseen == [], "a checkpoint has what the user's code made of its last step"


def test_repeated_steps_that_no_rank_knows_are_named() -> None:
    warnings: list[Mapping[str, Any]] = []
    recovery, shared = Recovery.__new__(Recovery), {"run.state": {"count": 3}}
    parts = {
        "turns": SimpleNamespace(unknown=lambda version: 7),
        "registered": SimpleNamespace(users=lambda: shared),
        "membership": SimpleNamespace(note=lambda what, fields: warnings.append(fields)),
    }
    recovery.engine = SimpleNamespace(rank=2, **parts)
    recovery._warn_of_unknown_states(5)
    (warning,) = warnings
    assert (warning["notice"], warning["rank"], warning["step"]) == ("state-unknown", 2, 5)
    assert "rank 2 computes steps 5 to 6 again" in warning["text"]
    recovery._warn_of_unknown_states(7)
    shared["run.state"] = {}
    recovery._warn_of_unknown_states(5)
    assert len(warnings) == 1, "where all is known, or nothing can differ, there is nothing to say"


def test_an_abort_while_newcomers_are_told_leaves_the_rest_of_the_list() -> None:
    """The machine has the plan's layers and shards already; Restore, which answers, is what an abort interrupts."""

    def aborted(*rest: Any) -> None:
        raise Aborted(7)

    done: list[type[Any]] = []

    class Interrupted(Recovery):
        def note(self, it: Any) -> None:
            done.append(type(it))

        _restore = aborted  # type: ignore[assignment]

    spec = ModelSpec((1.0,) * 6, (ParameterSpec("w", (8, 8), "float32", 4, (0,)),))
    plan = Plan(layout=initial_layout(spec, [0, 1], 2, 8), version=3, agreement=agreed(step=2).to_text(), fresh=(1,))
    holding = Holding(owned=frozenset({0}), owned_version=2, values_version=2, layers=(0, 6))
    state = WorkerState(rank=0, spec=spec, steps=9, version=2, holding=holding, agreed=1, agreement="{}")
    driver = Driver(replace(state, phase=WorkerPhase.READY, fresh=False, layout=plan.layout))
    recovery = Interrupted.__new__(Interrupted)
    turns = SimpleNamespace(state_at=lambda version: {"users": {}}, records=dict)
    adjustments = SimpleNamespace(records=dict)
    pipeline = SimpleNamespace(forwards=SimpleNamespace(attributes=SimpleNamespace(changed=dict)))
    parts = {"adjustments": adjustments, "turns": turns, "calls": CallLog(), "pipeline": pipeline}
    parts |= {"comm": SimpleNamespace(send=aborted), "large": SimpleNamespace(tell_place=lambda *told: None)}
    recovery.engine = SimpleNamespace(version=2, user_loop=UserLoop(), leave_at=None, **parts)
    kinds = (w.EditLinks, w.EnterProtection, w.RunOptimizer, w.TakePlaces)
    driver.carries(dict.fromkeys(kinds, recovery.note))
    driver.carries({w.TellPlace: recovery._tell_place, w.Restore: recovery._restore, w.AwaitPlan: lambda it: None})
    driver.carries({w.SendReport: lambda it: None})
    driver.happened(w.Interrupted())
    driver.happened(w.Assigned(plan))
    with pytest.raises(Aborted):
        driver.happened(w.Linked())
    assert done == [w.EditLinks, w.EnterProtection, w.RunOptimizer, w.TakePlaces]
