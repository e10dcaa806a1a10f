"""A tensor far beyond what a step can agree on, which turns of the loop change: a buffer with a rule, in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.elastic.contract.stateful import REGISTERED_BYTES
from tests.jobs import run_job, state_alone
from tests.jobs.hosts import lose_a_node

JOB = "large_tensor_job.py"
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2, "after": 1},
    {"rank": 1, "phase": "agree", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
]


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    return state_alone(JOB, out, environment, **config)


def assert_same(out: Path, expected: dict[str, Any]) -> None:
    states = sorted(out.glob("state-*.pt"))
    assert states
    for path in states:
        found = torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), path


def test_workers_die_and_a_job_is_resumed(tmp_path: Path) -> None:
    """With the bytes of a plain loop, in which the turn of a step's last part leaves the queue."""
    expected = alone(tmp_path / "plain", plain=True)
    assert expected["queue"].nbytes > 4 * REGISTERED_BYTES
    assert int(expected["pointer"]) == 9
    job = run_job(nproc=3, script=JOB, faults=KILLS)
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == len(KILLS)
    assert_same(job.out, expected)
    alone(tmp_path / "resumed", {"EVERSTEP_CHECKPOINT": str(tmp_path / "saved")}, resumes=True)
    assert_same(tmp_path / "resumed", expected)


@pytest.mark.soak
def test_a_node_is_lost(tmp_path: Path) -> None:
    """With the steps since the last protected version."""
    expected = alone(tmp_path / "plain", plain=True)
    result = lose_a_node(JOB, {"rank": 1, "phase": "compute", "step": 5}, tmp_path, every=3)
    assert_same(result.out, expected)
