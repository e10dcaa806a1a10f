"""Optimizer state that appears in the middle of training: records outgrow their slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs import assert_same_run, reference, run_job
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts

LATE: dict[str, Any] = {"momentum_from": 2}  # plain SGD, and from step 3 on SGD with momentum


def test_workers_killed_around_the_step_in_which_it_appears() -> None:
    """Before it exists, in the step that creates it (replayed from a smaller record and the gradient), and after."""
    steps = 60  # enough for replacements that a loaded machine is slow to start
    faults = [
        {"rank": 0, "phase": "reduce", "step": 3},
        {"rank": 1, "phase": "update", "step": 3},
        {"rank": 2, "phase": "commit", "step": 3},
        {"rank": 0, "phase": "compute", "step": 4, "incarnation": 1},
        {"rank": 1, "phase": "update", "step": 5, "incarnation": 1},
    ]
    result = run_job(nproc=4, stages=2, steps=steps, faults=faults, **LATE)
    assert_same_run(result, reference(steps, **LATE))
    assert len(result.named("worker_died")) == len(faults)
    assert all("momentum_buffer" in state for state in reference(steps, **LATE).state()["optimizer"].values())


@pytest.mark.soak
def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Of the step after which it appeared."""
    flags = [f"--es-checkpoint={tmp_path}/saved", "--es-checkpoint-every=4"]
    assert run_job(nproc=2, steps=4, flags=flags, **LATE).status == 0
    result = run_job(nproc=4, stages=2, steps=8, flags=flags, **LATE)
    assert result.status == 0, result.output
    expected = reference(8, **LATE)
    ledgers = [[(e["step"], e["digest"]) for e in r.named("committed")] for r in (result, expected)]
    assert ledgers[0] == ledgers[1][4:]


@pytest.mark.soak
@pytest.mark.parametrize("protection", ["parity", "replay"])
def test_lost_nodes(protection: str, tmp_path: Path) -> None:
    """A node is lost soon after. Parity grows with the records: there, another is lost when all train again."""
    steps = 80
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=steps, flags=[f"--es-protection={protection}"], **LATE)
        job.start()
        job.reaches(4)
        job.await_whole()
        hosts_lost = (1, 2) if protection == "parity" else (1,)
        for lost, host in enumerate(hosts_lost, start=1):
            hosts.kill(host)
            # Or the job is already whole again.
            job.until(lambda lost=lost: len(job.events("node_lost")) == lost, 30, "the loss is seen")
            job.await_whole()
        job.see_to_the_end(120)
        result = job.check()
    assert len(result.named("node_lost")) == len(hosts_lost)
    assert len(result.named("joined")) == len(hosts_lost)
    assert result.named("committed")[-1]["protected"] > 70, "versions outlive nodes after the growth"
