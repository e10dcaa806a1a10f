"""Plain torchrun, whose agents use our rendezvous: `torchrun --rdzv-backend=everstep`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.comms.base.process import die_with_parent
from tests.jobs import JOBS, finish, wait_until

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
CONF = "last_call_timeout=1,keep_alive_interval=0.3,keep_alive_max_attempt=6,join_timeout=60"


class Meeting:
    """A coordinator, and agents of torchrun that use its rendezvous."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.agents: list[subprocess.Popen[str]] = []
        self.bind = "127.0.0.1:0"
        self.coordinators = [self.start_coordinator()]

    def start_coordinator(self) -> subprocess.Popen[str]:
        command = ["coordinator", f"--bind={self.bind}", "--rdzv-id=meeting", f"--es-store={self.out}/store.sqlite"]
        process = self._start(sys.executable, "-m", "everstep", *command)
        assert process.stdout is not None
        self.bind = process.stdout.readline().split()[-1]
        return process

    def agent(self, nnodes: str, *arguments: str, flags: tuple[str, ...] = (), job: str = "meeting") -> Any:
        rendezvous = ["--rdzv-backend=everstep", f"--rdzv-endpoint={self.bind}", f"--rdzv-id={job}"]
        settings = [f"--nnodes={nnodes}", f"--rdzv-conf={CONF}", "--max-restarts=1", "--local-addr=127.0.0.1"]
        settings.append(f"--log-dir={self.out}/logs")
        script = [str(JOBS / "rendezvous_job.py"), str(self.out), *arguments]
        self.agents.append(self._start(TORCHRUN, *rendezvous, *settings, *flags, *script))
        return self.agents[-1]

    def _start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def ranks(self) -> list[dict[str, Any]]:
        path = self.out / "ranks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def worked(self, world_size: int, groups: int) -> bool:
        """Whether all ranks of a world of this size, on so many nodes, have added themselves up."""
        found = [r for r in self.ranks() if r["world_size"] == world_size]
        assert all(r["sum"] == world_size for r in found)
        return len({r["rank"] for r in found}) == world_size and len({r["group"] for r in found}) == groups

    def close(self) -> None:
        """Kill all of it: torchrun's workers are in sessions of their own, and may outlive its agents."""
        for worker in psutil.process_iter(["cmdline"]):
            if str(self.out) in (worker.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        for process in (*self.agents, *self.coordinators):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                print(process.communicate()[0][-4000:])
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    found = Meeting(tmp_path)
    yield found
    found.close()


@pytest.mark.soak
def test_torchrun_meets_at_our_coordinator(meeting: Meeting) -> None:
    """2:3 nodes. Two meet; a worker fails; a third comes; an agent is lost, and the coordinator, too."""
    agents = [meeting.agent("2:3", "2", "fails") for _ in range(2)]
    wait_until(lambda: len(meeting.ranks()) >= 4, 60, "they start again")
    assert sorted(r["attempt"] for r in meeting.ranks()) == ["0", "0", "0", "1"], "torchrun's own count"
    agents.append(meeting.agent("2:3", "2", "fails"))
    wait_until(lambda: meeting.worked(3, 3), 60, "a third node is taken in")
    os.killpg(agents[0].pid, signal.SIGKILL)
    meeting.coordinators[0].kill()
    before = len(meeting.ranks())
    meeting.coordinators.append(meeting.start_coordinator())
    wait_until(lambda: len(meeting.ranks()) >= before + 2, 60, "the other two continue")
    assert [r["world_size"] for r in meeting.ranks()[before:]] == [2, 2]
    (meeting.out / "go").touch()
    for agent in agents[1:]:
        output = finish(agent, 60)
        assert agent.returncode == 0, output
    assert meeting.coordinators[-1].wait(timeout=20) == 0, "it ends with the job"


def test_torchrun_is_told_what_is_wrong(meeting: Meeting) -> None:
    wrong = {
        "refused this node: this coordinator runs job 'meeting', the node asked for 'other'": meeting.agent(
            "1", "1", job="other"
        ),
        "everstep knows join_timeout, last_call_timeout": meeting.agent("1", "1", flags=("--rdzv-conf=colour=red",)),
    }
    for text, agent in wrong.items():
        output = finish(agent, 60)
        assert agent.returncode != 0
        assert text in output
