"""Hidden states that are carried from batch to batch: the bytes of a plain loop, whoever is lost meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, assert_same_state, run_job, state_alone
from tests.jobs.hosts import lose_a_node
from tests.jobs.interpreter import script

JOB = "recurrent_job.py"
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2, "after": 1},
    {"rank": 1, "phase": "agree", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
    {"rank": 1, "phase": "commit", "step": 9, "incarnation": 1},
    {"rank": 0, "phase": "reduce", "step": 12, "incarnation": 1},
]


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    return state_alone(JOB, out, environment, **config)


def losses(out: Path) -> dict[tuple[int, int], str]:
    """(step, micro-batch) -> its loss, which is the same whenever and wherever it was computed."""
    found: dict[tuple[int, int], str] = {}
    for path in out.glob("losses-*.txt"):
        for line in path.read_text().splitlines():
            if len(parts := line.split()) == 3 and parts[2].endswith(("p+0", "p+1")):  # whole: its writer may be killed
                key = int(parts[0]), int(parts[1])
                assert found.setdefault(key, parts[2]) == parts[2], key
    return found


LARGE = {"more": 400_000}  # 6 MiB in the four micro-batches of a step
WAYS = [
    {},
    {"yields": True, **LARGE},
    *(pytest.param(way, marks=pytest.mark.soak) for way in ({"seldom": True}, LARGE)),
]


@pytest.mark.parametrize("way", WAYS, ids=["loop", "steps, large", "seldom", "large"])
def test_workers_die(way: dict[str, Any], tmp_path: Path) -> None:
    """The state of a column is where its micro-batch is computed, whichever rank does that."""
    expected = alone(tmp_path / "plain", plain=True, **way)
    job = run_job(nproc=3, script=JOB, faults=KILLS, **way)
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == len(KILLS)
    assert losses(job.out) == losses(tmp_path / "plain")
    assert len(losses(job.out)) == 15 * 4
    for rank in range(3):
        if (job.out / f"state-{rank}.pt").exists():
            assert_same_state(job.state(rank), expected)


@pytest.mark.soak
def test_a_node_is_lost_with_steps(tmp_path: Path) -> None:
    """Versions are protected every four steps: those since then are computed again, from the states of that time."""
    expected = alone(tmp_path / "plain", plain=True, **LARGE)
    result = lose_a_node(JOB, {"rank": 1, "phase": "compute", "step": 7}, tmp_path, every=4, **LARGE)
    assert sum(event["lost_steps"] for event in result.named("recovered")) > 0
    assert losses(result.out) == losses(tmp_path / "plain")
    for path in result.out.glob("state-*.pt"):
        assert_same_state(torch.load(path, weights_only=True), expected)


@pytest.mark.parametrize("way", [LARGE, {"yields": True}], ids=["loop, large", "steps"])
def test_a_job_is_resumed_after_every_step(way: dict[str, Any], tmp_path: Path) -> None:
    expected = alone(tmp_path / "plain", plain=True, **way)
    saves = {"EVERSTEP_CHECKPOINT": str(tmp_path / "saved")}
    assert_same_state(alone(tmp_path / "resumed", saves, resumes=True, **way), expected)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (
            "late",
            "run.stream_state has values in a turn of the loop over run.prepare's batches, before optimizer.step()",
        ),
        (
            "large",
            "one micro-batch take 256 KiB without its large tensors, those of all 4 of a step 1.0 MiB",
        ),
    ],
)
def test_a_mistake_is_named(mistake: str, text: str, tmp_path: Path) -> None:
    ended = script(JOBS / JOB, json.dumps({"out": str(tmp_path), "mistake": mistake}))
    assert ended.status == 1
    assert text in ended.stderr.splitlines()[-1]
