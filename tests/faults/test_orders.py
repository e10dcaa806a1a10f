"""Orders of an operator to a running job: a node hands over, a host stays out, and comes back when it is released."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.jobs import finish, slowly, wait_until
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import COORDINATOR, Hosts

STEPS = 40


def everstep(hosts: Hosts, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, on the coordinator's host."""
    process = hosts.everstep(COORDINATOR, *arguments)
    stdout, _ = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout)


@pytest.mark.soak
def test_drain_quarantine_and_release(tmp_path: Path) -> None:
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=STEPS, least=1)
        job.start()
        job.await_whole()
        first, second = hosts.address(1), hosts.address(2)
        with slowly(tmp_path):
            refused = everstep(hosts, "drain", hosts.endpoint, "nowhere")
            assert refused.returncode == 2
            done = everstep(hosts, "drain", hosts.endpoint, first, "--why", "a hot card")
            assert done.returncode == 0
            assert "hands over" in done.stdout
            job.until(lambda: job.events("node_left"), 40, "the drained node has left")
            assert job.events("node_left")[0]["why"] == "a hot card"
            output = finish(hosts.launchers[1], 60)
            assert hosts.launchers[1].returncode == 0, output
            done = everstep(hosts, "quarantine", hosts.endpoint, second, "--for", "3600")
            assert done.returncode == 0
            job.until(lambda: len(job.events("node_left")) == 2, 40, "the other one has left")
            job.start(2)
            wait_until(lambda: job.events("node_refused"), 60, "it may not join again")
            assert everstep(hosts, "release", hosts.endpoint, second).returncode == 0
            job.until(lambda: job.events("node_released"), 20, "the host is released")
            finish(hosts.launchers[2], 60)
            job.start(2)
            job.until(lambda: job.events("joined"), 60, "it has joined again")
        job.see_to_the_end(60)
        job.check()
        assert not job.events("node_lost")
