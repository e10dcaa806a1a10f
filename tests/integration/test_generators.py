"""What a script draws from the global generators is the same on any number of ranks, and after losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.jobs import assert_same_state, run_job, state_alone

KILLS = [
    {"rank": 1, "phase": "reduce", "step": 2},
    {"rank": 0, "phase": "compute", "step": 5},
    {"rank": 1, "phase": "update", "step": 9, "incarnation": 1},
]


@pytest.mark.parametrize("kind", ["here", "workers", "stream", "stages"])
def test_ranks_die(kind: str, tmp_path: Path) -> None:
    """In turns of the loop and in forwards, in functions of `run.on_step`, around the batches of an epoch, at the end.

    Whether the rank itself has fetched its samples, which seeds the generators for them, or not.
    """
    expected = state_alone("drawing_job.py", tmp_path / "alone", kind=kind)
    result = run_job(nproc=2, script="drawing_job.py", kind=kind, faults=KILLS)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    states = [torch.load(path, weights_only=True) for path in result.out.glob("state-*.pt")]
    assert states
    for state in states:
        assert_same_state(state, expected)
        assert state["drawn"] == expected["drawn"]
        assert state["last"] == expected["last"]
    assert len(set(expected["drawn"])) == len(expected["drawn"])
