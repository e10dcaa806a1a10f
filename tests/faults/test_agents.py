"""A node's agent is killed and started again: it takes over the keeper, which still holds its segments."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.jobs import assert_same_run, reference, slowly, wait_until
from tests.jobs.hosts import HostJob, Hosts
from tests.jobs.processes import saying

STEPS = 60


def keepers(hosts: Hosts, host: int) -> list[psutil.Process]:
    return saying(hosts.pids(host), "everstep.checkpointing.keeper.service")


@pytest.mark.soak
def test_a_keeper_outlives_its_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "60")
    flags = ["--es-snapshot-every=1", f"--log-dir={tmp_path}/logs"]
    with Hosts(3) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="3:3", steps=STEPS)
        job.launch(0, 1, 2, flags=flags)
        job.reaches(5)
        (keeper,) = keepers(hosts, 1)
        with slowly(tmp_path):
            os.kill(hosts.launchers[1].pid, signal.SIGKILL)
            wait_until(lambda: job.events("node_lost"), 20, "the node is lost")
            wait_until(lambda: len(hosts.pids(1)) == 1, 10, "all but its keeper are gone")
            job.launch(1, flags=flags)
            wait_until(lambda: job.events("joined"), 60, "the node is back")
        assert [p.pid for p in keepers(hosts, 1)] == [keeper.pid]
        result = job.result()
        wait_until(lambda: not keeper.is_running(), 10, "the keeper ends with its job")
    assert_same_run(result, reference(STEPS))


@pytest.mark.soak
def test_a_keeper_that_nobody_takes_over_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "2")
    with Hosts(2) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="2:2", steps=100_000)
        job.launch(0, 1, flags=[f"--log-dir={tmp_path}/logs"])
        job.reaches(2)
        (keeper,) = keepers(hosts, 0)
        os.kill(hosts.launchers[0].pid, signal.SIGKILL)
        wait_until(lambda: len(hosts.pids(0)) == 1, 10, "all but its keeper are gone")
        assert keeper.is_running()
        wait_until(lambda: not hosts.pids(0), 10, "the keeper has ended")
        hosts.kill(1)
