"""torch.distributed between steps, with workers killed: the results of a run without faults, on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.jobs import JOBS, assert_same_state, run_job, same
from tests.jobs.interpreter import script

STEPS = 8
KILLS = [
    {"rank": 0, "phase": "commit", "step": 2},
    {"rank": 1, "phase": "reduce", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
]


def test_a_script_of_torch_distributed(tmp_path: Path) -> None:
    ended = script(JOBS / "group_job.py", json.dumps({"out": str(tmp_path), "steps": STEPS}))
    assert ended.status == 0, ended.stderr
    expected = torch.load(tmp_path / "state-0.pt", weights_only=True)
    result = run_job(nproc=3, steps=STEPS, script="group_job.py", faults=KILLS)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    assert len(expected["shared"]["log"]) == STEPS
    for rank in range(3):
        found = torch.load(result.out / f"state-{rank}.pt", weights_only=True)
        assert same(found["shared"], expected["shared"])
        assert_same_state({**found, "shared": 0}, {**expected, "shared": 0})
