"""Workers and a node are lost under optimizers that torch lacks, or that step whole parameters: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import assert_same_state, run_job
from tests.jobs.hosts import lose_a_node
from tests.jobs.optimizers import WHOLE

STEPS = 6
SCRIPT = "optimizers_job.py"
FAULTS = [
    {"rank": 1, "phase": "update", "step": 1},
    {"rank": 0, "phase": "compute", "step": 3, "after": 1},
    {"rank": 2, "phase": "reduce", "step": 4},
]


def alone(**config: Any) -> dict[str, Any]:
    result = run_job(nproc=1, steps=STEPS, script=SCRIPT, **config)
    assert result.status == 0, result.output
    return result.state()


def assert_same_models(states: list[Path], expected: dict[str, Any]) -> None:
    assert states
    for path in states:
        assert_same_state(torch.load(path, weights_only=True), expected)


@pytest.mark.parametrize(
    "name", [name if name == "shampoo" else pytest.param(name, marks=pytest.mark.soak) for name in WHOLE]
)
def test_workers_are_killed(name: str) -> None:
    expected = alone(name=name)
    assert expected["optimizer"]
    result = run_job(nproc=3, steps=STEPS, script=SCRIPT, faults=FAULTS, name=name)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) >= 2, "rank 2 is there if it is back in time"
    assert_same_models(list(result.out.glob("state-*.pt")), expected)


@pytest.mark.soak
def test_workers_are_killed_under_sparse_gradients() -> None:
    expected = alone(name="AdamW", sparse=True)
    dense = alone(name="AdamW")
    assert all(torch.equal(value, dense["model"][name]) for name, value in expected["model"].items())
    result = run_job(nproc=3, steps=STEPS, script=SCRIPT, faults=FAULTS, name="AdamW", sparse=True)
    assert result.status == 0, result.output
    assert_same_models(list(result.out.glob("state-*.pt")), expected)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["shampoo", "adam8bit"])
def test_a_node_is_lost(name: str, tmp_path: Path) -> None:
    """States of other shapes and element types than their parameters' are read from parity."""
    fault = {"rank": 2, "phase": "update", "step": 4}
    result = lose_a_node(SCRIPT, fault, tmp_path, every=1, steps=STEPS, name=name)
    assert_same_models(list(result.out.glob("state-*.pt")), alone(name=name))
