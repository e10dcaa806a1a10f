"""Losses that are sums over tokens, a loss scaler, accumulation: with kills, in any layout, the same bytes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, assert_same_state, run_job
from tests.jobs.interpreter import script

STEPS = 9
KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 0, "phase": "agree", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
]


def alone(out: Path, **config: Any) -> dict[str, Any]:
    """Without the launcher: one rank."""
    out.mkdir(exist_ok=True)
    arguments = json.dumps({"out": str(out), "steps": STEPS, **config})
    environment = {"EVERSTEP_LOSS_REDUCTION": config["reduction"]}
    ended = script(JOBS / "precision_job.py", arguments, environment=environment)
    assert ended.status == 0, ended.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


def assert_same_job(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("scaler", "skipped", "shared"):
        assert repr(found[name]) == repr(expected[name]), name  # there are NaNs in it
    assert_same_state(found, expected)


def assert_adapted(state: dict[str, Any]) -> None:
    """The scale has been lowered and raised, and some steps were left out."""
    assert 0 < state["skipped"] < STEPS - 2
    assert state["scaler"]["scale"] != 2.0**9


@pytest.mark.parametrize(
    "how",
    [
        {"reduction": "tokens", "stages": 2},
        {"reduction": "mean", "accumulation": 4},
        pytest.param({"reduction": "tokens", "accumulation": 1}, marks=pytest.mark.soak),
    ],
)
def test_ranks_die_and_the_scale_goes_on(how: dict[str, Any], tmp_path: Path) -> None:
    """Replacements have the scale and the count of skipped steps that the others have."""
    stages = how.get("stages", 1)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, scaler=True, **how)
        flags = [f"--es-loss-reduction={how['reduction']}", f"--es-stages={stages}"]
        config = {"steps": STEPS, "script": "precision_job.py", "scaler": True, "flags": flags, **how}
        result = run_job(nproc=3, faults=KILLS, **config)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    assert_adapted(expected)
    finished = list(result.out.glob("state-*.pt"))
    assert finished, "who died in the last steps may not be back, but the others are there"
    for path in finished:
        assert_same_job(torch.load(path, weights_only=True), expected)
