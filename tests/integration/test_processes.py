"""What workers start ends with them: after each recovery, after the job, and whichever process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.agents.node.preload import NAME as PRELOADED
from tests.jobs import JOBS, finish, launch, wait_until
from tests.jobs.processes import named

SCRIPT = JOBS / "family_job.py"
HELPERS = 5  # of a worker: one forked, a shell with two programs, and a daemon


class Family:
    """A job whose workers have helpers."""

    def __init__(self, folder: Path, nproc: int = 2, inside: tuple[str, ...] = (), **config: Any) -> None:
        self.out = folder / "out"
        self.out.mkdir()
        (self.out / "slow").touch()
        arguments = [json.dumps({"out": str(self.out), "steps": 2000, "helpers": True, **config})]
        flags = [f"--nproc-per-node={nproc}", f"--es-events={self.out}/events.jsonl", f"--log-dir={folder}/logs"]
        self.launcher = launch(SCRIPT, arguments, flags, inside=inside)

    def daemons(self) -> list[int]:
        """The daemons that workers have made, dead or alive."""
        return [int(path.read_text()) for path in self.out.glob("daemon-*") if path.suffix != ".new"]

    def await_daemons(self, count: int) -> None:
        wait_until(lambda: len(self.daemons()) == count, 90, f"{count} workers have all their helpers")
        wait_until((self.out / "steps").exists, 60, "they train")

    def committed(self) -> int:
        return sum(event["event"] == "committed" for event in self.events())

    def events(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def preloaded(self) -> psutil.Process:
        (found,) = named(psutil.Process(self.launcher.pid).children(), PRELOADED)
        return found

    def workers(self) -> list[psutil.Process]:
        """Oldest first."""
        pids = {int(path.name.split("-")[-1]) for path in self.out.glob("helpers-*") if path.suffix != ".new"}
        found = [process for process in self.preloaded().children() if process.pid in pids]
        return sorted(found, key=lambda process: process.create_time())

    def advance(self) -> None:
        goal = self.committed() + 2
        wait_until(lambda: self.committed() >= goal, 60, "training continues")


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path)
    yield made
    if made.launcher.poll() is None:
        os.killpg(made.launcher.pid, signal.SIGKILL)
    made.launcher.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    """Reaped too: a zombie is not gone."""
    return not any(process.is_running() for process in processes)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def test_helpers_end_with_their_worker_and_do_not_pile_up(family: Family) -> None:
    family.await_daemons(2)
    for losses in (1, 2, 3):
        victim, survivor = family.workers()
        mine, others = descendants(victim), descendants(survivor)
        assert len(mine) == len(others) == HELPERS, "a daemon is a child of its worker, too"
        victim.kill()
        wait_until(lambda mine=mine: gone(mine), 30, "all that the dead worker had is gone")
        family.await_daemons(2 + losses)
        family.advance()
        assert all(process.is_running() for process in others), "and nothing of the other one"
    assert len(descendants(family.preloaded())) == 2 * (1 + HELPERS)


def test_helpers_end_with_the_job(tmp_path: Path) -> None:
    """And the launcher reports what it had to end."""
    family = Family(tmp_path, steps=3)
    output = finish(family.launcher)
    assert family.launcher.returncode == 0, output
    assert all(not psutil.pid_exists(pid) for pid in family.daemons())
    assert "everstep: processes that workers left behind were ended: " in output
    assert "sleep (" in output


def test_helpers_end_when_their_launcher_is_killed(family: Family) -> None:
    family.await_daemons(2)
    everything = descendants(psutil.Process(family.launcher.pid))
    assert len(everything) >= 3 + 2 * (1 + HELPERS)
    family.launcher.kill()
    wait_until(lambda: gone(everything), 60, "all are gone")


def test_helpers_end_when_the_preloaded_process_is_killed(family: Family) -> None:
    """Then the launcher inherits them; training continues with a new one, and new workers."""
    family.await_daemons(2)
    former = family.preloaded()
    everything = [former, *descendants(former)]
    former.kill()
    wait_until(lambda: gone(everything), 30, "all are gone")
    family.await_daemons(4)
    family.advance()


@pytest.mark.soak
def test_helpers_end_when_launcher_and_group_are_killed_while_stopped(family: Family) -> None:
    """A stopped preloaded process wakes when its launcher dies, and cleans up."""
    family.await_daemons(2)
    former = family.preloaded()
    everything = [former, *descendants(former)]
    former.suspend()
    os.killpg(family.launcher.pid, signal.SIGKILL)
    wait_until(lambda: gone(everything), 60, "all are gone")


def test_what_cleans_up_after_a_dead_worker_may_do_so(tmp_path: Path) -> None:
    """Python's resource tracker unlinks the shared memory of a killed process: it is not killed before it has."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "print(SharedMemory(create=True, size=100).name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    launcher = launch(script, [], ["--nproc-per-node=1", f"--log-dir={tmp_path}/logs"])
    output = finish(launcher)
    assert launcher.returncode == 1
    name = output.split()[0]
    assert name.startswith("psm_"), output
    assert not Path("/dev/shm", name).exists()


def test_an_ordinary_scripts_helpers_end_with_it(tmp_path: Path) -> None:
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(
        f"import subprocess, sys\nprint(subprocess.Popen(['sleep', '1000']).pid, file=open({str(pids)!r}, 'a'))\n"
    )
    launcher = launch(script, [], ["--nproc-per-node=2"])
    output = finish(launcher)
    assert launcher.returncode == 0
    assert "everstep: processes that workers left behind were ended: sleep" in output
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())


# ---------------------------------------------------------------- the first process of a container


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes needs root")
def test_as_the_first_process_it_reaps_and_hears_signals(tmp_path: Path) -> None:
    """In a PID namespace, as in a container: no zombie stays, SIGTERM is handled, the status is the job's."""
    unshare = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    family = Family(tmp_path, inside=unshare)
    try:
        wait_until(lambda: family.committed() >= 2, 90, "it trains")
        (first,) = psutil.Process(family.launcher.pid).children()
        everything = descendants(first)
        strangers = subprocess.Popen(  # as `docker exec` does: its orphans come to the first process
            [
                "nsenter",
                f"--target={first.pid}",
                "--pid",
                "--mount",
                "sh",
                "-c",
                "(sh -c 'exit 0' & sleep 0.1) & exit 0",
            ]
        )
        assert strangers.wait(20) == 0
        wait_until(lambda: not zombies(first), 20, "what ends there is waited for")
        first.send_signal(signal.SIGTERM)
        output = finish(family.launcher)
        assert "everstep: error: stopped by SIGTERM" in output
        assert family.launcher.returncode == 1
        wait_until(lambda: gone(everything), 20, "all are gone")
    finally:
        if family.launcher.poll() is None:
            family.launcher.kill()
            family.launcher.communicate()


def zombies(process: psutil.Process) -> list[int]:
    found = []
    for child in process.children():
        try:
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found
