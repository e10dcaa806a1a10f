"""Three coordinators that share an etcd: the leader killed, stopped, partitioned; etcd itself unreachable."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everstep.agents.tools.client import Endpoints, NoAnswer
from everstep.comms.base.process import die_with_parent
from everstep.comms.base.security import Security
from tests.jobs import JOBS, Result, assert_same_run, finish, launch, read_result, reference, wait_until
from tests.jobs.object_store import Line
from tests.jobs.ports import free_ports

STEPS = 60
AWAY_S = 2.0  # how long etcd is away, so nothing can be decided: less than a lease lasts


@dataclass
class Coordinator:
    """One of three, with a connection of its own to etcd."""

    process: subprocess.Popen[str]
    address: str
    line: Line

    def leads(self) -> bool:
        with contextlib.suppress(NoAnswer):
            return "phase" in json.loads(Endpoints(self.address, Security()).status().json)
        return False


@dataclass
class Job:
    """A job of two workers, and its coordinators."""

    out: Path
    etcd: int
    etcd_process: subprocess.Popen[str]
    coordinators: list[Coordinator] = field(default_factory=list)
    launcher: subprocess.Popen[str] | None = None

    def stand(self, port: int = 0) -> Coordinator:
        """Start one more coordinator."""
        line, port = Line(self.etcd), port or free_ports(1)[0]
        command = [sys.executable, "-m", "everstep", "coordinator", f"--bind=127.0.0.1:{port}", "--rdzv-id=three"]
        command += [f"--es-store=etcd://127.0.0.1:{line.port}", f"--es-events={self.out}/events.jsonl"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=die_with_parent
        )
        coordinator = Coordinator(process, f"127.0.0.1:{port}", line)
        self.coordinators.append(coordinator)
        assert process.stdout is not None
        assert coordinator.address in process.stdout.readline()
        return coordinator

    def leader(self, *, but: Coordinator | None = None) -> Coordinator:
        """The leader, as soon as there is one."""
        found: list[Coordinator] = []

        def one_leads() -> bool:
            others = [c for c in self.coordinators if c is not but and c.process.poll() is None]
            found[:] = [c for c in others if c.leads()]
            return bool(found)

        wait_until(one_leads, 30, "one of the coordinators leads")
        assert len(found) == 1, f"{len(found)} coordinators lead"
        return found[0]

    def events(self, name: str = "") -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in lines if not name or event["event"] == name]

    def committed(self) -> int:
        return max((event["step"] for event in self.events("committed")), default=-1)

    def advances(self) -> None:
        """Wait until a coordinator learns of more steps."""
        goal = self.committed() + 2
        wait_until(lambda: self.committed() >= goal, 30, f"step {goal} is in the ledger")

    def loses_a_worker(self, count: int) -> None:
        """Kill one, by a fault that rank 1 suffers when it finds a file; check that the job recovers from it."""
        pids = [int(pid.name) for pid in Path("/proc").iterdir() if pid.name.isdigit() and self._is_worker(pid)]
        os.kill(max(pids), signal.SIGKILL)
        wait_until(lambda: len(self.events("recovered")) >= count, 30, "the job has recovered")

    def _is_worker(self, process: Path) -> bool:
        assert self.launcher is not None
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            name = (Path("/proc") / parent / "comm").read_text().strip()
            return name == "es-preloaded" and f"launcher={self.out}".encode() in environment
        return False

    def finish(self) -> Result:
        assert self.launcher is not None
        output = finish(self.launcher)
        return read_result(self.out, self.launcher.returncode, output)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Training, led by one of three."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed (Debian: etcd-server)")
    port, peer = free_ports(2)
    command = ["etcd", f"--data-dir={tmp_path}/etcd", "--log-level=error", "--logger=zap"]
    command += [f"--listen-client-urls=http://127.0.0.1:{port}", f"--advertise-client-urls=http://127.0.0.1:{port}"]
    command += [f"--listen-peer-urls=http://127.0.0.1:{peer}"]
    command += [f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}"]
    command += [f"--initial-cluster=default=http://127.0.0.1:{peer}"]
    etcd = subprocess.Popen(command, text=True, preexec_fn=die_with_parent, stderr=subprocess.DEVNULL)
    job = Job(tmp_path, port, etcd)
    try:
        for _ in range(3):
            job.stand()
        job.leader()
        arguments = [json.dumps({"out": str(tmp_path), "stages": 1, "steps": STEPS})]
        endpoints = ",".join(coordinator.address for coordinator in job.coordinators)
        flags = ["--nproc-per-node=3", "--rdzv-id=three", f"--rdzv-endpoint={endpoints}"]
        flags += [f"--es-store=etcd://127.0.0.1:{port}", f"--log-dir={tmp_path}/logs"]
        (tmp_path / "slow").touch()
        job.launcher = launch(JOBS / "gpt_job.py", arguments, flags, {"MARK": f"launcher={tmp_path}"})
        wait_until(lambda: job.committed() >= 2, 60, "three steps are in the ledger")
        yield job
    finally:
        if job.launcher is not None:
            job.launcher.kill()
            job.launcher.wait()
            if job.launcher.stdout is not None:
                job.launcher.stdout.close()
        for coordinator in job.coordinators:
            coordinator.process.kill()
            coordinator.process.wait()
            if coordinator.process.stdout is not None:
                coordinator.process.stdout.close()
            coordinator.line.cut()
        etcd.kill()
        etcd.wait()


@pytest.mark.soak
def test_leaders_come_and_go(job: Job) -> None:
    """Each is lost in another way, with a worker lost before the next one leads; a former leader can do nothing."""
    killed = job.leader()
    killed.process.kill()
    job.loses_a_worker(1)
    second = job.leader(but=killed)
    job.advances()
    job.stand(int(killed.address.rpartition(":")[2]))  # again, at the same address

    os.kill(second.process.pid, signal.SIGSTOP)
    job.loses_a_worker(2)
    third = job.leader(but=second)
    job.advances()
    os.kill(second.process.pid, signal.SIGCONT)
    wait_until(lambda: not second.leads(), 20, "the leader of before finds that it is none")
    job.advances()

    third.line.cut()
    job.loses_a_worker(3)
    fourth = job.leader(but=third)
    job.advances()
    third.line.restore()
    wait_until(lambda: not third.leads(), 20, "the leader that was cut off finds that it is none")

    os.kill(job.etcd_process.pid, signal.SIGSTOP)
    time.sleep(AWAY_S)  # the duration of the fault; nothing waits for a condition here
    os.kill(job.etcd_process.pid, signal.SIGCONT)
    job.loses_a_worker(4)
    assert fourth.process.poll() is None

    (job.out / "slow").unlink()
    result = job.finish()
    assert_same_run(result, reference(STEPS))
    assert [event["step"] for event in result.named("committed")] == list(range(STEPS))
    assert len(result.named("worker_died")) == 4
    assert len(result.named("coordinator_returned")) >= 3
    assert not result.named("node_lost")
    for coordinator in job.coordinators:
        if coordinator is not killed:
            assert coordinator.process.wait(30) == 0, "who stands by ends with the job"
