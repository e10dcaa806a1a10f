"""Which messages a worker without any state of the job accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from everstep.comms.mesh.tensors import of_bytes
from everstep.elastic.engine.call_log import CallLog
from everstep.elastic.engine.engine import Step
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.protocol import worker_events as w
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
