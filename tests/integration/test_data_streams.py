"""Jobs over streams: alone, resumed after every step, with ranks killed: the same bytes after the same step."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.elastic.step.streams import STATE_STEPS
from tests.jobs import JOBS, assert_same_state, run_job
from tests.jobs.interpreter import script

STEPS, SAMPLES, WHOLE = 14, 92, 11  # the stream has 11 batches of 8
KILLS = [{"rank": 1, "phase": "compute", "step": 2, "after": 1}, {"rank": 0, "phase": "reduce", "step": 9}]


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """Without the launcher: one rank."""
    out.mkdir()
    arguments = {"out": str(out), "steps": STEPS, "samples": SAMPLES, **config}
    ended = script(JOBS / "stream_job.py", json.dumps(arguments), environment=environment)
    assert ended.status == 0, ended.stderr
    assert f"the stream has ended, and training ends after step {WHOLE - 1}" in ended.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ({"loop": True}, 0),
        ({"divided": True, "stateful": True}, 0),
        pytest.param({"loop": True}, 1, marks=pytest.mark.soak),
        ({"loop": True, "divided": True, "stateful": True}, 2),
    ],
)
def test_ranks_die_and_the_stream_ends(how: dict[str, bool], workers: int, tmp_path: Path) -> None:
    """Whether the ranks read for themselves, or processes that are killed, too, read ahead for them."""
    saves = {"EVERSTEP_CHECKPOINT": str(tmp_path / "saved")}
    if "loop" not in how:  # where a stream is read from is no hyper-parameter
        saves["EVERSTEP_RESUME_HYPERPARAMETERS"] = "script"
    with ThreadPoolExecutor(3) as pool:
        undisturbed = pool.submit(alone, tmp_path / "alone", **how)
        resumed = pool.submit(alone, tmp_path / "resumed", saves, resumes=True, workers=workers, **how)
        reads = {"workers": workers, "kills": 4 if workers else -1, "faults": KILLS, **how}
        job = run_job(nproc=2, script="stream_job.py", steps=STEPS, samples=SAMPLES, **reads)
    expected = undisturbed.result()
    assert job.status == 0, job.output
    assert expected["step"] == WHOLE
    assert_same_state(resumed.result(), expected)
    assert len(job.named("worker_died")) == 2
    if workers:
        assert (job.out / "killed").read_text() == str(workers)
        assert "data-worker-lost" in [event["notice"] for event in job.named("warning")]
    assert [event["why"] for event in job.named("script_stopped")] == ["the stream has ended"]
    for rank in range(2):
        assert job.state(rank)["step"] == WHOLE
        assert_same_state(job.state(rank), expected)
    if how.get("stateful"):
        begun = [int(line) for line in (tmp_path / "resumed" / "begun-0").read_text().splitlines()]
        per_step, buffer = 2, 3
        assert set(begun) == {0, STATE_STEPS * per_step + buffer}


@pytest.mark.soak
def test_a_stream_on_pipeline_stages(tmp_path: Path) -> None:
    job = run_job(nproc=3, stages=3, script="stream_job.py", steps=STEPS, samples=SAMPLES, faults=KILLS)
    assert job.status == 0, job.output
    assert_same_state(job.state(), alone(tmp_path / "alone"))
