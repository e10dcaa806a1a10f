"""A worker that is slow itself is found, and its node drained; a host whose workers die repeatedly is kept out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import finish, slowly, wait_until
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts

STEPS = 200


class Watched(Cluster):
    """A job with a policy."""

    def __init__(self, hosts: Hosts, out: Path, *, policy: str, **config: Any) -> None:
        self.policy = policy
        super().__init__(hosts, out, steps=STEPS, **config)

    def start_coordinator(self) -> subprocess.Popen[str]:
        flags = [f"--es-events={self._events}", f"--es-quarantine={self.policy}"]
        self.coordinator = self.hosts.coordinator(self._nnodes, *flags)
        return self.coordinator

    def node_of(self, host: int) -> str:
        return self.nodes()[self.hosts.address(host)]

    def ended(self, host: int, timeout_s: float = 60) -> str:
        """The output of the launcher of a host that has ended by itself."""
        return finish(self.hosts.launchers[host], timeout_s)


@contextlib.contextmanager
def throttled(pids: list[int]) -> Iterator[None]:
    """These processes run for only an eighth of the time."""
    over = threading.Event()

    def send(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def throttle() -> None:
        while not over.is_set():
            send(signal.SIGSTOP)
            time.sleep(0.07)
            send(signal.SIGCONT)
            over.wait(0.01)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        send(signal.SIGCONT)


@pytest.mark.soak
def test_a_slow_worker_is_found_and_its_node_hands_over(tmp_path: Path) -> None:
    """Only it, although all steps are slow then; nothing is computed again, and the result is the same."""
    with Hosts(3) as hosts:
        job = Watched(hosts, tmp_path, policy="1/600", least=2)
        job.start()
        job.reaches(15)
        node = job.node_of(1)
        with throttled(list(job.workers_of(1))):
            job.until(lambda: job.events("draining"), 40, "the slow node hands over")
        assert job.events("node_quarantined")[0]["host"] == hosts.address(1)
        found = job.events("straggler_found")[0]
        assert (found["node"], found["what"], found["against"]) == (node, "compute", "stage")
        assert found["factor"] > 1.5
        assert found["wait_s"] < found["others_wait_s"]
        assert "others of its stage" in found["evidence"]
        output = job.ended(1)
        assert hosts.launchers[1].returncode == 0, output
        assert "quarantine: 1 troubles in 600 s: straggler_found" in output
        job.see_to_the_end(60)
        result = job.check()
        assert not [line for line in result.events if line["event"] in ("planned", "recovered", "node_lost")]


@pytest.mark.soak
def test_a_host_that_fails_again_and_again_is_kept_out(tmp_path: Path) -> None:
    """Its worker dies, then the whole host, which returns under another name. An unfit one may not join."""
    with Hosts(3) as hosts:
        job = Watched(hosts, tmp_path, policy="2/600", least=2)
        job.launch(2, flags=job.flags, faults=[{"kind": "unhealthy", "figures": {"copy_wrong": 1.0}}])
        output = job.ended(2)
        assert hosts.launchers[2].returncode == 1
        assert "is not fit to join: 1 of 4 copies of memory came out wrong" in output
        assert [line["host"] for line in job.events("node_unhealthy")] == [hosts.address(2)]
        job.start(0, 1, 2)
        job.away = {1}
        job.reaches(3)
        (worker,) = job.workers_of(1)
        os.kill(worker, signal.SIGKILL)
        job.until(lambda: job.events("recovered"), 30, "its worker is replaced")
        assert not job.events("node_quarantined")
        job.await_whole()
        with slowly(tmp_path):
            hosts.kill(1)
            job.until(lambda: job.events("node_quarantined"), 30, "it is lost")
            job.launch(1, flags=job.flags)
            output = job.ended(1)
        (quarantined,) = job.events("node_quarantined")
        assert (quarantined["host"], quarantined["troubles"]) == (hosts.address(1), 2)
        assert hosts.launchers[1].returncode == 1
        assert f"host {hosts.address(1)} is in quarantine for" in output
        assert "worker_died" in output
        assert "node_lost" in output
        (refused,) = job.events("node_refused")
        assert refused["host"] == hosts.address(1)
        wait_until(lambda: not hosts.pids(1), 10, "nothing of it is left")
        job.see_to_the_end(60)
        job.check()
