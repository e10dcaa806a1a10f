"""The node agent's side of the preloaded process: start it, ask it for forks, start it again if it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ANSWER_BYTES = 1 << 16


class Preloader:
    """One preloaded process. Requests may be made once it said that it is ready; nothing here decides anything."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "everstep.agents.preload", str(theirs.fileno()), *modules]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **threads})
        theirs.close()
        self.ready = False

    def fileno(self) -> int:
        return self._channel.fileno()

    def fork(self, request: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Ask for a worker. If the process is dying, `answer` tells so; nothing is raised here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._channel, [json.dumps(request).encode()], fds)

    def answer(self) -> dict[str, Any] | None:
        """What it said; {} if it said nothing, None if it is gone."""
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

    def answers_within(self, timeout_s: float) -> bool:
        """Whether it says something in this time."""
        return bool(select.select([self._channel], [], [], timeout_s)[0])

    def close(self) -> int:
        """Kill it; its forks die with it. Returns its exit status."""
        self.process.kill()
        self._channel.close()
        return self.process.wait()
