"""A node's worker processes: forked, watched through their pidfds and progress pages, fenced with SIGKILL."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import time
from dataclasses import dataclass, field

from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.contract.progress import (
    STACKS_OFFSET,
    STACKS_SIGNAL,
    Reading,
    create_page,
    read_page,
)
from everstep.elastic.protocol.events import WorkerId
from everstep.elastic.protocol.liveness import Pulse, Verdict

from .channel import WorkerChannel
from .vitals import Vitals

STACKS_BYTES = 64 << 10  # of a worker's stacks, read at most


@dataclass
class WorkerProcess:
    """One worker: its channel, its progress page and, once it is forked, its process."""

    id: WorkerId
    channel: WorkerChannel
    page_fd: int
    page: mmap.mmap
    local_rank: int
    order: pb.StartWorkers
    pid: int = 0
    pidfd: int = -1
    status: int | None = None
    fenced: str = ""  # why we killed it
    elastic: bool = False  # it has declared itself so
    error_file: str = ""
    ended_s: float = 0.0
    main_ended_s: float = 0.0  # its main thread has ended since then; its process may not be gone
    pulse: Pulse = field(default_factory=lambda: Pulse(0, time.monotonic()))
    vitals: Vitals = field(default_factory=lambda: Vitals(0))
    looked_s: float = 0.0  # time of the last read of /proc
    verdict: Verdict | None = None  # while its counter does not move
    warned: bool = False  # the lack of progress was reported
    hang: str = ""  # it was killed as hung: silent | alive
    stacks: str = ""  # its threads' stacks at that time
    _seen: int = 0  # bytes of stacks at the last look

    @classmethod
    def prepare(cls, worker: WorkerId, local_rank: int, order: pb.StartWorkers) -> WorkerProcess:
        """The pages and channel of a worker that is about to be forked according to `order`."""
        fd = create_page()
        return cls(worker, WorkerChannel(), fd, mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ), local_rank, order)

    def forked(self, pid: int) -> None:
        """The process exists."""
        self.pid = pid
        with contextlib.suppress(ProcessLookupError):
            self.pidfd = os.pidfd_open(pid)
        self.pulse = Pulse(0, time.monotonic())
        self.vitals = Vitals(pid)
        self.channel.theirs.close()

    def reading(self) -> Reading:
        return read_page(self.page)

    @property
    def gone(self) -> bool:
        """Whether its process has ended with all that is its own: nothing of it writes anywhere any more."""
        return self.pidfd < 0 or bool(select.select([self.pidfd], [], [], 0)[0])

    def moves(self) -> None:
        """Its counter has moved: reset the hang detection."""
        if self.verdict is not None:
            self.vitals.forget()
            self.verdict, self.warned = None, False

    def ask_stacks(self) -> None:
        """Make it dump its threads' stacks; the signal handler does not need the interpreter."""
        os.ftruncate(self.page_fd, STACKS_OFFSET)
        self._seen = 0
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, STACKS_SIGNAL)

    def has_stacks(self) -> bool:
        """Whether it has, and no more comes."""
        before, self._seen = self._seen, os.fstat(self.page_fd).st_size - STACKS_OFFSET
        return 0 < self._seen == before

    def read_stacks(self) -> str:
        """As far as they are there; empty where nothing is."""
        return os.pread(self.page_fd, STACKS_BYTES, STACKS_OFFSET).replace(b"\0", b"").decode(errors="replace")

    def kill(self, why: str) -> None:
        """Fence it."""
        self.fenced = self.fenced or why
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Request its end; for an ordinary script, like torchrun, also that of its process group.

        An elastic one ends its own: it would take a process that fetches data, and dies, for a failure.
        """
        if self.pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):  # it has just been forked, and has no group; or it is gone
            if not self.elastic:
                os.killpg(self.pid, number)
                return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def cause(self) -> str:
        """Why it ended, in words."""
        if self.fenced:
            return self.fenced
        if self.status is None:
            return "the process is gone"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"

    def close(self) -> None:
        self.channel.close()
        self.page.close()
        for fd in (self.page_fd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.page_fd = self.pidfd = -1
