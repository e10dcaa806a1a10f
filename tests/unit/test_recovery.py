"""What a worker that has nothing of the job yet believes of what it was told."""

from __future__ import annotations

import json
from types import SimpleNamespace

from everstep.elastic.engine import Step
from everstep.elastic.recovery import Recovery


def test_what_a_guide_told_ends_with_its_plan() -> None:
    """The plan it belonged to is aborted, and the next one goes back to an older version, with other settings."""
    told = {
        "version": 30,
        "agreement": "{}",
        "after": {"groups": [{"lr": 0.1}]},
        "left": None,
        "unseen": [[29, 1.0, 2.0]],
    }
    comm = SimpleNamespace(receive=lambda rank, key: json.dumps(told).encode())
    engine = SimpleNamespace(rank=3, comm=comm, results=[])
    recovery = Recovery.__new__(Recovery)
    recovery.engine, recovery.fresh, recovery._after = engine, True, {}
    assert recovery._find_place(SimpleNamespace(guide=1, version=None)) == (30, "{}")
    assert (recovery._after, engine.results) == (told["after"], [Step(29, 1.0, 2.0)])
    assert recovery._find_place(SimpleNamespace(guide=None, version=29, agreement="of 29")) == (29, "of 29")
    assert (recovery._after, engine.results) == ({}, [])
