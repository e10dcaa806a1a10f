"""What a script changes while it trains, in both loops: the same bytes on one process and on workers that are killed.

And what cannot be kept equal: one line that names it, and what to write instead.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, Result, command, read_result, run_job

STEPS = 8
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2},
    {"rank": 1, "phase": "agree", "step": 3},
    {"rank": 2, "phase": "update", "step": 4},
    {"rank": 1, "phase": "reduce", "step": 5, "incarnation": 1},
    {"rank": 0, "phase": "commit", "step": 6, "incarnation": 1},
]
CASES: dict[str, dict[str, Any]] = {
    "rates, frozen layers, bad samples": {"loop": "prepare", "changes": ["rates", "freeze", "skip"], "micro": 1},
    "rates, frozen layers, two stages": {"loop": "steps", "changes": ["rates", "freeze"], "stages": 2, "clip": 0.02},
    "a scheduler left in the loop": {"loop": "prepare", "changes": ["schedule", "decay"], "clip": 0.05},
    "a scheduler beside steps": {"loop": "steps", "changes": ["schedule", "decay", "freeze"], "stages": 2},
}


def alone(out: Path, **config: Any) -> Result:
    """The script without the launcher."""
    out.mkdir()
    (out / "events.jsonl").touch()
    ended = command([str(JOBS / "changing_job.py"), json.dumps({"out": str(out), "steps": STEPS, **config})])
    assert ended.status == 0, ended.stderr
    return read_result(out, ended.status, ended.stderr)


def equal(found: Any, expected: Any) -> bool:
    """Equal in every bit, and in every name, of nested states."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(equal(f, e) for f, e in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def close(found: Any, expected: Any) -> bool:
    """The same as plain torch, but for the order in which a mean is summed."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(close(f, e) for f, e in zip(found, expected, strict=True))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    return found == expected


@pytest.mark.parametrize("name", CASES)
def test_changes(name: str, tmp_path: Path) -> None:
    """Plain torch, the script alone, and three workers that are killed: `state_dict()` of model and optimizer."""
    config = {"stages": 1, **CASES[name]}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path / "alone", **config)
        plainly = pool.submit(alone, tmp_path / "plain", **{**config, "loop": "plain"})
        stages = config.pop("stages")
        result = run_job(nproc=3, steps=STEPS, stages=stages, script="changing_job.py", faults=KILLS, **config)
        reference, plain = waiting.result(), plainly.result()
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    states = sorted(result.out.glob("state-*.pt"))
    assert states, result.output
    for path in states:
        assert equal(torch.load(path), reference.state()), path
    assert close(reference.state()["model"], plain.state()["model"])
    assert close(reference.state()["optimizer"], plain.state()["optimizer"])


def test_a_scheduler_built_on_the_prepared_optimizer() -> None:
    """More workers than micro-batches, so that one never has a turn; and another number of workers."""
    config: dict[str, Any] = {"loop": "prepare", "changes": ["decay"], "micro": 3, "late": True}
    killed = [fault for fault in KILLS if fault["rank"] == 0]
    results = [
        run_job(nproc=3, steps=STEPS, script="changing_job.py", faults=killed, **config),
        run_job(nproc=1, steps=STEPS, script="changing_job.py", **config),
    ]
    for result in results:
        assert result.status == 0, result.output
    expected = results[1].state()
    assert expected["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.02 * 0.8**STEPS)
    for path in results[0].out.glob("state-*.pt"):
        assert equal(torch.load(path), expected), path
