"""The temporary folder is cleaned under a running job, whose coordinator is then killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from everstep.elastic.contract.faults import COORDINATOR
from tests.jobs import JOBS, assert_same_run, finish, launch, read_result, reference, slowly, wait_until

STEPS = 14


@pytest.mark.soak
def test_the_store_of_a_killed_coordinator_was_deleted(tmp_path: Path) -> None:
    """The job continues as if the folder were complete, with the same bytes."""
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    arguments = [json.dumps({"out": str(out), "steps": STEPS, "stages": 1})]
    flags = ["--nproc-per-node=2", f"--es-events={out}/events.jsonl"]
    process = launch(JOBS / "gpt_job.py", arguments, flags, {"TMPDIR": str(temporary)})

    def lines() -> int:
        return min((len(path.read_text().splitlines()) for path in out.glob("worker-*")), default=0)

    def coordinators() -> list[psutil.Process]:
        return [child for child in psutil.Process(process.pid).children() if child.name() == COORDINATOR]

    with slowly(out):
        wait_until(lambda: lines() >= 2, 60, "a step")
        (former,) = coordinators()
        for entry in temporary.iterdir():
            shutil.rmtree(entry)
        seen = lines()
        wait_until(lambda: lines() > seen, 60, "a step after the folder was cleaned")
        former.kill()
        wait_until(lambda: [one.pid for one in coordinators()] not in ([], [former.pid]), 60, "another coordinator")
    output = finish(process)
    assert "store.sqlite was deleted, and has been written again" in output
    assert_same_run(read_result(out, process.returncode, output), reference(STEPS))
