"""A worker's death is detected before its process is gone, and nothing else is mistaken for a death.

The tests compare the order of events, never their times.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.agents.node.preload import NAME as PRELOADED
from everstep.comms.base.process import exit_status, runs_without_main_thread
from everstep.elastic.contract.progress import create_page
from everstep.elastic.contract.robust_mutex import RobustMutex, hold
from tests.jobs import JOBS, Result, assert_same_run, finish, launch, read_result, reference, run_job, wait_until
from tests.jobs.processes import named
from tests.jobs.threads import end_this_thread, held_at_its_end

# ---------------------------------------------------------------- the mutex itself


class Holder:
    """A process that holds the mutex of its page, and then does what the test asks."""

    def __init__(self, then: Callable[[], None], mib: int = 0) -> None:
        page = create_page()
        RobustMutex.create(page)
        reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            hold(page)
            kept = b"x" * (mib << 20)
            os.write(writes, b"x")
            then()
            os._exit(len(kept) & 1)
        assert os.read(reads, 1) == b"x"
        self.pidfd = os.pidfd_open(self.pid)
        self.ended = False
        self.mutex = RobustMutex(page)
        for fd in (page, reads, writes):
            os.close(fd)

    @property
    def gone(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def end(self) -> int:
        """Kill it, unless it has ended; its exit status. Once."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.mutex.close()
        os.close(self.pidfd)
        self.ended = True
        return status


@pytest.fixture
def holder() -> Iterator[Callable[..., Holder]]:
    made: list[Holder] = []

    def make(then: Callable[[], None], mib: int = 0) -> Holder:
        made.append(Holder(then, mib))
        return made[-1]

    yield make
    for one in made:
        if not one.ended:
            one.end()


def sleep() -> None:
    time.sleep(1000)


def test_a_death_is_seen_while_the_kernel_frees_the_memory(holder: Callable[..., Holder]) -> None:
    """With a gigabyte the kernel takes long. This process may be delayed even longer, but not three times."""
    seen_first = False
    for _ in range(3):
        victim = holder(sleep, mib=1024)
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.mutex.wait()
        seen_first = seen_first or not victim.gone
        assert exit_status(victim.pid) == -signal.SIGKILL
        assert victim.end() == -signal.SIGKILL
    assert seen_first


def test_a_death_is_seen_though_a_thread_has_not_ended(holder: Callable[..., Holder]) -> None:
    victim = holder(lambda: (threading.Thread(target=sleep).start(), sleep()))
    wait_until(lambda: len(list(Path(f"/proc/{victim.pid}/task").iterdir())) == 2, 10, "it has two threads")
    with held_at_its_end(victim.pid):
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.mutex.wait()
        assert not victim.gone
        assert exit_status(victim.pid) == -signal.SIGKILL
    assert select.select([victim.pidfd], [], [], 30)[0], "then it is gone"


def test_the_exit_status_is_known_at_once(holder: Callable[..., Holder]) -> None:
    for status in (0, 7):
        victim = holder(lambda status=status: os._exit(status))
        assert victim.mutex.wait()
        assert exit_status(victim.pid) == status
        assert victim.end() == status


def test_a_main_thread_that_ends_alone_is_told_apart(holder: Callable[..., Holder]) -> None:
    def leave_a_thread() -> None:
        threading.Thread(target=sleep).start()
        end_this_thread()

    victim = holder(leave_a_thread)
    assert victim.mutex.wait()
    assert exit_status(victim.pid) == 0
    assert runs_without_main_thread(victim.pid)
    assert not victim.gone
    assert victim.end() == -signal.SIGKILL


def test_a_process_that_becomes_another_program_lives(holder: Callable[..., Holder]) -> None:
    victim = holder(lambda: os.execvp("sleep", ["sleep", "1000"]))
    assert victim.mutex.wait()
    assert exit_status(victim.pid) is None
    assert not runs_without_main_thread(victim.pid)
    assert not victim.gone


def test_what_it_forks_does_not_hold_it(holder: Callable[..., Holder]) -> None:
    """Its child ends, which is no death; it is killed, which is one, although another child lives."""
    reads, writes = os.pipe()

    def fork_two() -> None:
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        if (child := os.fork()) == 0:
            sleep()
        os.write(writes, child.to_bytes(4, "little"))
        sleep()

    victim = holder(fork_two)
    child = int.from_bytes(os.read(reads, 4), "little")
    os.close(reads)
    os.close(writes)
    try:
        assert not waiting_ends(victim)
    finally:
        os.kill(child, signal.SIGKILL)  # it has lived until now


def test_a_stopped_process_holds_it(holder: Callable[..., Holder]) -> None:
    victim = holder(sleep)
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED, 10, "it is stopped")
    assert not waiting_ends(victim)


def waiting_ends(victim: Holder) -> bool:
    """Whether the wait for its mutex ends before it is killed; then the wait has to end."""
    seen: list[bool] = []
    waiter = threading.Thread(target=lambda: seen.append(victim.mutex.wait()))
    waiter.start()
    waiter.join(0.3)
    ended = not waiter.is_alive()
    os.kill(victim.pid, signal.SIGKILL)
    waiter.join(30)
    assert seen == [True]
    return ended


# ---------------------------------------------------------------- in a job


class Job:
    """A job of two workers, slow while the file `slow` is there."""

    def __init__(self, out: Path, program: Sequence[str] = ()) -> None:
        """`program`: run this, and not the script in the worker itself."""
        self.out = out
        (out / "slow").touch()
        arguments = [*program[1:], json.dumps({"out": str(out), "steps": 8, "stages": 1})]
        flags = ["--nproc-per-node=2", f"--es-events={out}/events.jsonl"]
        if program:
            flags.append("--no-python")
        self.launcher = launch(program[0] if program else JOBS / "gpt_job.py", arguments, flags)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == name]

    def workers(self) -> list[int]:
        (preloaded,) = named(psutil.Process(self.launcher.pid).children(), PRELOADED)
        return [process.pid for process in preloaded.children()]

    def result(self) -> Result:
        output = finish(self.launcher)
        return read_result(self.out, self.launcher.returncode, output)


def test_training_goes_on_before_a_dead_worker_is_gone_and_its_heir_waits(tmp_path: Path) -> None:
    """The memory, ports and devices of a dead worker are free for another one only when its process is gone."""
    job = Job(tmp_path)
    wait_until(lambda: job.events("committed"), 90, "they train")
    before = job.workers()
    victim = int(next(tmp_path.glob("worker-1-*.jsonl")).stem.split("-")[-1])
    assert victim in before
    with held_at_its_end(victim):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: job.events("recovered"), 60, "the other one has recovered")
        (died,) = job.events("worker_died")
        assert died["cause"] == "killed by SIGKILL"
        assert exit_status(victim) == -signal.SIGKILL, "it is not reaped: it is not gone"
        assert job.workers() == before, "nobody was forked in its place"
        assert not job.events("joined")
    wait_until(lambda: job.events("joined"), 60, "its replacement has joined")
    (tmp_path / "slow").unlink()
    assert_same_run(job.result(), reference(8))


def test_a_worker_whose_main_thread_ends_alone_is_replaced() -> None:
    result = run_job(nproc=2, steps=8, script="mortal_job.py", ends="thread")
    (died,) = result.named("worker_died")
    assert died["cause"] == "its main thread has ended, and other threads have not"
    assert_same_run(result, reference(8))


def test_an_exit_status_is_reported_with_the_death() -> None:
    result = run_job(nproc=2, steps=8, script="mortal_job.py", ends="exit")
    (died,) = result.named("worker_died")
    assert died["cause"] == "exit status 7"
    assert_same_run(result, reference(8))


@pytest.mark.soak
def test_a_program_that_a_worker_becomes_holds_the_mutex_again(tmp_path: Path) -> None:
    job = Job(tmp_path, program=[sys.executable, str(JOBS / "gpt_job.py")])
    wait_until(lambda: job.events("committed"), 90, "they train")
    assert [times_held(pid) for pid in job.workers()] == [2, 2]
    victim = int(next(tmp_path.glob("worker-1-*.jsonl")).stem.split("-")[-1])
    with held_at_its_end(victim):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: job.events("recovered"), 60, "the other one has recovered")
        assert exit_status(victim) == -signal.SIGKILL, "it is not reaped: it is not gone"
    (tmp_path / "slow").unlink()
    assert_same_run(job.result(), reference(8))


def times_held(pid: int) -> int:
    """How often a worker's mutex has been taken."""
    page = next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "everstep-progress" in os.readlink(fd))
    with page.open("r+b") as file:
        mutex = RobustMutex(file.fileno())
        held = mutex.holds
        mutex.close()
    return held


def test_a_worker_that_ends_during_its_start_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    launcher = launch(script, [], ["--nproc-per-node=1"])
    output = finish(launcher)
    assert launcher.returncode == 1, output
    assert "killed by SIGKILL" in output
    assert "Signal 9 (SIGKILL) received by PID" in output


@pytest.mark.soak
def test_without_robust_mutexes_the_pidfd_tells(tmp_path: Path) -> None:
    """And the node reports it, once."""
    arguments = [json.dumps({"out": str(tmp_path), "steps": 8, "stages": 1})]
    faults = {"EVERSTEP_FAULTS": json.dumps([{"rank": 1, "phase": "compute", "step": 3}])}
    flags = ["--nproc-per-node=2", f"--es-events={tmp_path}/events.jsonl"]
    program = [str(JOBS / "no_robust_mutex.py")]
    launcher = launch(JOBS / "gpt_job.py", arguments, flags, faults, program=program)
    result = read_result(tmp_path, launcher.wait(120), finish(launcher))
    assert result.output.count("warning: no robust mutexes here (") == 1, result.output
    assert len(result.named("worker_died")) == 1
    assert_same_run(result, reference(8))
