"""Spares take the places of a node that is lost and of one that is drained; a lost node that comes back is a spare."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.jobs import assert_same_run, everstep, finish, reference, slowly, wait_until
from tests.jobs.hosts import HostJob, Hosts
from tests.jobs.networks import COORDINATOR

STEPS = 16


class Spared(HostJob):
    """A job of two nodes, with two spares."""

    def start_coordinator(self) -> subprocess.Popen[str]:
        self.coordinator = self.hosts.coordinator("2", f"--es-events={self._events}", "--es-spares=2")
        return self.coordinator

    def comes(self, host: int, rack: str, event: str, count: int) -> None:
        """Start a node, and wait for what becomes of it."""
        flags = ["--es-snapshot-every=1", f"--log-dir={self.out}/logs", f"--es-domain=rack={rack}"]
        self.launch(host, flags=flags)
        wait_until(lambda: len(self.events(event)) == count, 30, f"host {host}: {event}")

    def taken(self, host: int, count: int) -> None:
        """Wait until a spare has taken a place, and its rank trains; asserts which one it is."""
        wait_until(lambda: len(self.events("spare_started")) == count, 30, "a spare takes a place")
        started = self.events("spare_started")[-1]
        assert started["host"] == self.hosts.address(host)
        ranks = set(started["ranks"])
        wait_until(lambda: any(ranks <= set(line["ranks"]) for line in self.events("joined")), 30, f"{ranks} train")


@pytest.mark.soak
def test_spares_take_places(tmp_path: Path) -> None:
    with Hosts(4) as hosts:
        job = Spared(hosts, tmp_path, nnodes="2", steps=STEPS)
        with slowly(tmp_path):
            for host in (0, 1):
                job.comes(host, "a", "node_joined", host + 1)
            for host, rack in ((2, "a"), (3, "b")):
                job.comes(host, rack, "spare_joined", host - 1)
            job.reaches(1)
            hosts.kill(0)
            job.taken(3, 1)  # it is of the rack in which no node is
            job.comes(0, "a", "spare_joined", 3)
            drain = hosts.everstep(COORDINATOR, "drain", hosts.endpoint, hosts.address(1))
            finish(drain)
            assert drain.returncode == 0
            job.taken(2, 2)
            wait_until(lambda: job.events("node_left"), 30, "the drained node has left")
            finish(hosts.launchers[1])
            assert hosts.launchers[1].returncode == 0
            hosts.launchers[0].send_signal(signal.SIGTERM)
            assert "it was a spare, and the job continues" in finish(hosts.launchers[0])
            assert not job.events("ended")
        result = job.result(2, 3)
    assert_same_run(result, reference(STEPS))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--es-spares=-1", "--nnodes=2"], "--es-spares -1: give a number of nodes, or 0 for none"),
        (["--es-spares=1", "--nnodes=1"], "--es-spares 1: a job of one node (--nnodes) ends with that node"),
    ],
)
def test_numbers_that_make_no_sense(flags: list[str], text: str) -> None:
    assert everstep("coordinator", "--bind=127.0.0.1:0", *flags).error().startswith(text)
