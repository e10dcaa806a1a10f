"""SIGTERM to a node: it hands over and leaves with status 0, without effect on the other nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import finish, slowly, wait_until
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts
from tests.jobs.ports import free_port

STEPS = 30


class Draining(Cluster):
    """A job in which a few nodes may leave."""

    def __init__(self, hosts: Hosts, out: Path, *, least: int, **config: Any) -> None:
        super().__init__(hosts, out, steps=STEPS, least=least, **config)

    def start_coordinator(self) -> subprocess.Popen[str]:
        """With a store, so that it can be restarted."""
        flags = [f"--es-events={self.out}/events.jsonl", f"--es-store={self.out}/store.sqlite"]
        self.coordinator = self.hosts.coordinator(self._nnodes, *flags)
        return self.coordinator

    def drain(self, *hosts: int) -> None:
        for host in hosts:
            os.kill(self.hosts.launchers[host].pid, signal.SIGTERM)

    def has_left(self, host: int) -> None:
        """The node of a host ended by itself, with success, and printed the reason."""
        launcher = self.hosts.launchers[host]
        output = finish(launcher, 60)
        assert launcher.returncode == 0, output
        assert "everstep: stopped by SIGTERM; the others continue" in output
        wait_until(lambda: not self.hosts.pids(host), 10, "nothing of it is left")

    def check_undisturbed(self) -> None:
        """The verdict, and that no generation was aborted and no step computed again."""
        self.see_to_the_end(60)
        result = self.check()
        assert not [event for event in result.events if event["event"] in ("planned", "recovered", "node_lost")]
        assert not result.named("committed_again")


def test_nodes_hand_over_and_leave(tmp_path: Path) -> None:
    """One, with stages, then two at once, while the coordinator dies: 4 nodes, 3, and at last 1, which holds all."""
    with Hosts(4) as hosts:
        job = Draining(hosts, tmp_path, least=1, stages=2)
        job.start()
        job.await_whole()
        with slowly(tmp_path):
            job.drain(1)
            job.until(lambda: job.events("node_left"), 30, "the first has left")
            job.drain(0, 3)
            job.until(lambda: len(job.events("draining")) == 3, 20, "both ask to leave")
            job.coordinator.kill()
            job.coordinator.wait()
            job.start_coordinator()
            job.until(lambda: sum(len(event["ranks"]) for event in job.events("handed_over")) == 3, 30, "all have")
        for host in (1, 0, 3):
            job.has_left(host)
        job.check_undisturbed()
        assert [len(event["ranks"]) for event in job.events("node_left")] == [1, 1, 1]
        assert re.fullmatch(r"layers 0-\d+: ranks \d", job.events("committed")[-1]["layout"])


@pytest.mark.soak
def test_a_node_leaves_when_its_cloud_gives_notice(tmp_path: Path) -> None:
    """A file server takes the part of Google's metadata service; what it lacks is not found, which is no notice."""
    metadata, port = tmp_path / "metadata", free_port()
    notice = metadata / "computeMetadata" / "v1" / "instance" / "preempted"
    notice.parent.mkdir(parents=True)
    with Hosts(2) as hosts:
        at = hosts.address(1)
        command = (sys.executable, "-m", "http.server", str(port), "--bind", at, "--directory", str(metadata))
        service = hosts.run(1, *command)
        job = Draining(hosts, tmp_path, least=1)
        job.launch(0, flags=job.flags)
        job.launch(1, flags=[*job.flags, "--es-preemption=google", f"--es-preemption-endpoint=http://{at}:{port}"])
        job.await_whole()
        with slowly(tmp_path):
            notice.write_text("TRUE")
            job.until(lambda: job.events("node_left"), 60, "it has left")
        output = finish(hosts.launchers[1], 60)
        assert hosts.launchers[1].returncode == 0, output
        why = "google gives notice of preemption (preempted)"
        assert f"everstep: {why}; the others continue" in output
        assert [event["why"] for event in job.events("draining")] == [why]
        service.kill()
        job.check_undisturbed()


@pytest.mark.soak
def test_what_happens_to_who_leaves(tmp_path: Path) -> None:
    """It is killed while it hands over: a loss like any other. One that leaves meanwhile is released; another joins."""
    with Hosts(3) as hosts:
        job = Draining(hosts, tmp_path, least=1)
        job.launch(0, flags=job.flags, faults=[{"rank": r, "phase": "leave", "kind": "node"} for r in range(3)])
        job.launch(1, 2, flags=job.flags)
        job.await_whole()
        with slowly(tmp_path):
            job.away.add(0)
            job.drain(0, 1)
            job.until(lambda: job.events("node_lost"), 30, "the other one is lost")
            job.launch(0, flags=job.flags)
            job.until(lambda: job.events("joined"), 60, "another comes in its place")
        job.has_left(1)
        job.see_to_the_end(60)
        job.check()
        assert len(job.events("node_lost")) == 1


@pytest.mark.soak
def test_too_few_would_be_left(tmp_path: Path) -> None:
    """The job is asked to save, and ends, as it does on a signal to all of it."""
    with Hosts(2) as hosts:
        job = Draining(hosts, tmp_path, least=2, flags=[f"--es-checkpoint={tmp_path}/checkpoints"])
        job.start()
        job.reaches(2)
        with slowly(tmp_path):
            job.drain(0)
            output = finish(hosts.launchers[0], 60)
        assert hosts.launchers[0].returncode == 1
        assert "everstep: error: stopped by SIGTERM; its state after" in output
        finish(hosts.launchers[1], 60)
        assert hosts.launchers[1].returncode == 1
        assert job.events("checkpoint_saved")
