"""The node agent's side of the preloaded process: start it, ask it for forks, start it again if it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from everstep.comms.base.process import own_command

from .environment import variables
from .imports import Import
from .orphans import GRACE_S
from .preload import serve

ANSWER_BYTES = 1 << 16
CLOSE_S = 3 * GRACE_S  # for it to end the orphans of workers
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def single_threaded() -> AbstractContextManager[None]:
    """Keep libraries imported meanwhile from starting threads, so that the process can fork."""
    return variables(_ONE_THREAD)


class Preloader:
    """One preloaded process. Requests may be sent once it has reported that it is ready. Decides nothing."""

    def __init__(
        self,
        imports: Sequence[Import],
        pid: int,
        channel: socket.socket,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.imports = tuple(imports)
        self.pid = pid
        self.ready = False
        self._channel = channel
        self._process = process  # None for a fork of this process
        self._status: int | None = None

    @classmethod
    def fork(cls, imports: Sequence[Import]) -> Preloader:
        """Fork it from this process, which has imported torch: saves a second. Only before there are threads."""
        ours, theirs = _channel()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.environ.update(_ONE_THREAD)
            serve(theirs, imports)  # does not return
        theirs.close()
        return cls(imports, pid, ours)

    @classmethod
    def start(cls, imports: Sequence[Import]) -> Preloader:
        """Start it as a new process."""
        ours, theirs = _channel()
        command = own_command("everstep.agents.node.preload", str(theirs.fileno()), json.dumps(imports))
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **_ONE_THREAD})
        theirs.close()
        return cls(imports, process.pid, ours, process)

    def fileno(self) -> int:
        return self._channel.fileno()

    def request(self, worker: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Request a worker. Raises nothing if the process is dying: `answer` reports that.

        The request is sent as a file in memory: an environment may be larger than any datagram.
        """
        with os.fdopen(os.memfd_create("everstep-request"), "wb") as request:
            request.write(json.dumps(worker).encode())
            request.flush()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._channel, [b"fork"], [request.fileno(), *fds])

    def answer(self) -> dict[str, Any] | None:
        """Its next message; {} if there is none, None if the process is gone."""
        try:
            data = self._channel.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return {}
        except ConnectionResetError:
            return None
        if not data:
            return None
        answer: dict[str, Any] = json.loads(data)
        self.ready = self.ready or answer["kind"] == "ready"
        return answer

    def has_spoken(self) -> bool:
        """Whether there is an answer."""
        return bool(select.select([self._channel], [], [], 0)[0])

    def close(self) -> int:
        """End it, its forks and their orphans. Returns its exit status, also when called again."""
        if self._status is None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)  # not only closed: a fork of this process may have it too
            self._channel.close()
            until_s = time.monotonic() + (CLOSE_S if self.ready else 0.0)
            while (status := self._wait(os.WNOHANG)) is None and time.monotonic() < until_s:
                time.sleep(0.005)
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)  # the number is its own until it is waited for, here
                status = self._wait(0)
            self._status = status
            if self._process is not None:
                self._process.returncode = status
        assert self._status is not None
        return self._status

    def _wait(self, options: int) -> int | None:
        pid, status = os.waitpid(self.pid, options)
        return os.waitstatus_to_exitcode(status) if pid else None


def _channel() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
