"""deploy/slurm under a real Slurm: a node of the allocation is lost, with its slurmd, and the job continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.jobs import JOBS, assert_same_run, read_result, reference, slowly, wait_until
from tests.jobs.slurm import Slurm

SCRIPT = JOBS.parent.parent / "deploy" / "slurm" / "train.sbatch"
STEPS = 30


@pytest.mark.soak
def test_a_job_outlives_a_node(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    environment = {
        "EVERSTEP": f"{sys.executable} -m everstep",
        "EVERSTEP_HOST": "127.0.0.1",
        "EVERSTEP_MIN_NODES": "3",
        "EVERSTEP_EVENTS": str(events),
        "EVERSTEP_FLAGS": f"--local-addr=127.0.0.1 --es-snapshot-every=1 --log-dir={tmp_path}/logs",
    }

    def named(event: str) -> list[dict[str, object]]:
        lines = events.read_text().splitlines() if events.exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    arguments = json.dumps({"out": str(tmp_path), "steps": STEPS, "stages": 1})
    script = (str(SCRIPT), str(JOBS / "gpt_job.py"), arguments)
    with Slurm(tmp_path, 3) as slurm, slowly(tmp_path):
        job = slurm.run(
            "sbatch", "--parsable", "--nodes=3", f"--output={tmp_path}/job.out", *script, environment=environment
        ).strip()
        wait_until(lambda: len(named("committed")) > 3, 90, "the job trains")
        slurm.lose("n2")
        wait_until(lambda: named("node_lost"), 30, "a node is lost")
        (tmp_path / "slow").unlink()
        wait_until(lambda: named("ended"), 60, "the job has ended")
        wait_until(lambda: "JobState=COMPLET" in slurm.run("scontrol", "show", "job", job), 30, "Slurm says so too")
        assert "ExitCode=0:0" in slurm.run("scontrol", "show", "job", job)
        (tmp_path / "slow").touch()
    output = (tmp_path / "job.out").read_text()
    assert f"everstep: job slurm-{job}, coordinator at 127.0.0.1:" in output
    result = read_result(tmp_path, 0, output)
    assert len(result.named("node_lost")) == 1
    assert_same_run(result, reference(STEPS))
