"""Sees the main threads of workers end, at once, though the kernel takes the memory of a process down for long."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass

from everstep.comms.base.process import exit_status
from everstep.elastic.contract.robust_mutex import RobustMutex, holds
from everstep.elastic.protocol.events import WorkerId

from .workers import WorkerProcess

NO_MUTEX = "warning: no robust mutexes here ({}): a worker's death is seen only when the kernel has freed its memory"


@dataclass(frozen=True)
class MainThreadEnded:
    """A worker's main thread has ended, with the exit status that its process will have if it ends with it."""

    worker: WorkerId
    status: int
    at_s: float  # of the monotonic clock


class DeathWatch:
    """Waits for the mutexes that main threads hold, in one thread per worker. Readable when a main thread has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: list[MainThreadEnded] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._watched: dict[WorkerId, int] = {}  # how often each had taken its mutex when the last wait began
        self._refused = False

    def fileno(self) -> int:
        return self._wake

    def prepare(self, worker: WorkerProcess) -> None:
        """Make the mutex in a worker's page. Without it, only the worker's pidfd reports its death."""
        try:
            RobustMutex.create(worker.page_fd)
        except OSError as error:
            if not self._refused:
                self._refused = True
                print(f"everstep: {NO_MUTEX.format(error)}", file=sys.stderr, flush=True)

    def look(self, worker: WorkerProcess) -> None:
        """Start to wait, if the worker's main thread has taken its mutex since the last time."""
        count = holds(worker.page)
        if worker.pid and count > self._watched.get(worker.id, 0):
            self._watched[worker.id] = count
            arguments = (worker.id, worker.pid, RobustMutex(worker.page_fd))
            threading.Thread(target=self._wait, args=arguments, name="everstep-deaths", daemon=True).start()

    def forget(self, worker: WorkerId) -> None:
        """Its process is gone."""
        self._watched.pop(worker, None)

    def _wait(self, worker: WorkerId, pid: int, mutex: RobustMutex) -> None:
        ended = mutex.wait()
        at_s = time.monotonic()
        mutex.close()
        status = exit_status(pid) if ended else None
        if status is None:
            return  # it has become another program, or is gone
        with self._lock:
            if not self._closed:
                self._ended.append(MainThreadEnded(worker, status, at_s))
                os.eventfd_write(self._wake, 1)

    def ended(self) -> list[MainThreadEnded]:
        """The workers whose main threads ended since the last call."""
        with self._lock:
            if self._ended:
                os.eventfd_read(self._wake)
            found, self._ended = self._ended, []
            return found

    def close(self) -> None:
        """Report nothing more. Threads that still wait end with their workers."""
        with self._lock:
            self._closed = True
            os.close(self._wake)
