"""Processes that workers leave behind: their child processes, including daemons.

Each worker is a subreaper (prctl(2)): its orphaned descendants become its children. So when a worker dies, its
remaining descendants are reparented to the next subreaper above, which is the preloaded process, or, if that is dead,
the launcher. Orphans have GRACE_S to end by themselves, since some clean up after a dead parent (multiprocessing's
resource tracker, torch's manager of shared memory); then they are killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from everstep.comms.base.process import children

GRACE_S = 2.0
ENDED = "everstep: processes that workers left behind were ended: {}"


class Orphans:
    """Children of this process that it did not create; `ours` returns whether a child is no orphan."""

    def __init__(self, ours: Callable[[int], bool]) -> None:
        self._ours = ours
        self._due_s: dict[int, float] = {}  # process -> when it is killed
        self._bereft_s = time.monotonic()  # when a process died whose children they may be
        self._killed: set[int] = set()

    def expect(self) -> None:
        """A worker has died, or the process that adopted workers' children before."""
        self._bereft_s = time.monotonic()

    @property
    def found(self) -> bool:
        """Whether there were any when `sweep` looked."""
        return bool(self._due_s)

    def sweep(self) -> list[str]:
        """Reap ended orphans, kill those past their grace time; returns the names of the killed."""
        there = {pid for pid in children() if not self._ours(pid)}
        self._due_s = {pid: self._due_s.get(pid, self._bereft_s + GRACE_S) for pid in there}
        named = []
        for pid, due_s in list(self._due_s.items()):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    del self._due_s[pid]
                    self._killed.discard(pid)
                    continue
            if time.monotonic() >= due_s and pid not in self._killed:
                named.append(f"{_name(pid)} ({pid})")
                self._killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # a child that is not waited for keeps its number
        return named

    def end_all(self, until_s: float) -> list[str]:
        """Sweep until no orphan is left or the deadline (CLOCK_MONOTONIC); returns the names of the killed."""
        named = self.sweep()
        while self.found and time.monotonic() < until_s:
            time.sleep(0.01)
            named += self.sweep()
        return named


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
