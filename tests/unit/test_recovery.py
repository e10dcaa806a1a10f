"""Which messages a worker without any state of the job accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.comms.mesh.tensors import of_bytes
from everstep.elastic.engine.call_log import CallLog
from everstep.elastic.engine.engine import Step
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.protocol import worker_events as w
from everstep.resharding.plan import Plan
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec
from tests.terms import agreed


def test_what_a_guide_told_ends_with_its_plan() -> None:
    """The message's plan is aborted, and the next plan goes back to an older version, with other settings."""
    told = {
        "version": 30,
        "agreement": "{}",
        "after": {"groups": [{"lr": 0.1}]},
        "left": None,
        "records": {"29": {"frozen": []}},
        "unseen": [[29, 1.0, 2.0]],
        "begun": False,
        "calls": {"count": 7, "made": [["after step 29", 0, "run.barrier", "null", 30]]},
    }
    records: list[dict[str, Any]] = []
    comm = SimpleNamespace(receive=lambda rank, key: of_bytes(json.dumps(told).encode()))
    adjustments = SimpleNamespace(take_records=records.append)
    parts = {"adjustments": adjustments, "calls": CallLog()}
    engine = SimpleNamespace(rank=3, comm=comm, results=[], version=0, turn=None, **parts)
    recovery = Recovery.__new__(Recovery)
    recovery.engine, recovery._after = engine, {}
    assert recovery._ask_place(w.AskPlace(1)) == w.Placed(30, "{}", None)
    assert (recovery._after, engine.results) == (told["after"], [Step(29, 1.0, 2.0)])
    assert records == [told["records"]]
    assert (recovery.guide_begun, engine.calls.records()) == (False, told["calls"])
    terms = agreed(step=28, loss=3.0, norm=1.0)
    recovery._take_unseen(w.TakeUnseen(29, terms.to_text()))
    assert recovery.guide_begun, "the guide is gone, and this rank's own code decides"
    assert (recovery._after, engine.results) == ({}, [Step(28, 3.0, 1.0)]), "nobody is left whose code has seen step 28"
    recovery._take_unseen(w.TakeUnseen(29, replace(terms, after={}).to_text()))
    assert engine.results == [], "a checkpoint has what the user's code made of its last step"


@pytest.mark.parametrize("held", [range(6), range(3)])
def test_layers_that_an_aborted_plan_left_are_freed_by_the_next(held: range) -> None:
    """The machine knows the new layers since the first of two plans, which was aborted before they were taken."""
    calls: list[Any] = []
    stack = SimpleNamespace(held=held, hold=lambda *layers, free: calls.append((layers, free)))
    stack.spec = ModelSpec((1.0,) * 6, (ParameterSpec("w", (8, 8), "float32", 4, (0,)),))
    layout = initial_layout(stack.spec, [0, 1], 2, 8)
    orders = SimpleNamespace(placement=None, nodes={})
    recovery = Recovery.__new__(Recovery)
    backups = SimpleNamespace(shards=[], take_places=lambda *rest, **named: None, level=set())
    store, settings = SimpleNamespace(owned=[], own=lambda shards: None), SimpleNamespace(protection="parity")
    left = SimpleNamespace(leave=lambda *rest: None)
    parts = {"backups": backups, "store": store, "settings": settings, "snapshots": left, "orders": {1: orders}}
    recovery.engine = SimpleNamespace(rank=0, stack=stack, protect=lambda **named: None, **parts)
    plan = Plan(layout=layout, version=3)
    recovery._take_places(w.TakePlaces(plan, 3, None, frozenset(), discard=False, seeded=False))
    assert calls == ([] if held == range(3) else [((0, 3), True)])
