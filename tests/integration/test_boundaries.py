"""What a layer hands on may lie in memory in any way, and bits do not depend on whether the next layer is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import assert_same_state, run_job, state_alone

JOB, STEPS = "boundaries_job.py", 6
KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 0, "phase": "compute", "step": 4, "after": 2},
]


@pytest.mark.parametrize(
    "kind",
    ["asks", "in_place", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("heads", "expanded", "pairs"))],
)
def test_bits_do_not_depend_on_where_stages_are_cut(kind: str, tmp_path: Path) -> None:
    whole = state_alone(JOB, tmp_path / "alone", kind=kind, steps=STEPS, stages=1)
    assert_all(run_job(nproc=4, stages=4, steps=STEPS, script=JOB, kind=kind), whole)


def test_with_kills(tmp_path: Path) -> None:
    """The other rank has all layers for a while, which come apart again."""
    whole = state_alone(JOB, tmp_path / "alone", kind="channels_last", steps=STEPS, stages=1)
    result = run_job(nproc=2, stages=2, steps=STEPS, script=JOB, kind="channels_last", faults=KILLS)
    assert len(result.named("worker_died")) == len(KILLS)
    assert_all(result, whole)


def assert_all(result: Any, whole: dict[str, Any]) -> None:
    assert result.status == 0, result.output
    states = [torch.load(path, weights_only=True) for path in result.out.glob("state-*.pt")]
    assert states
    for state in states:
        assert_same_state(state, whole)
