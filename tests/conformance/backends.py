"""The communicators under test, and ranks of theirs that run as threads of the test's process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch.distributed import TCPStore

from everstep.comms.mesh.communicator import (
    Communicator,
    EditReport,
    Peer,
)
from everstep.comms.mesh.gather import barrier
from everstep.comms.mesh.gloo import GlooCommunicator
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.comms.mesh.mesh import MeshCommunicator

RING_BYTES = 4 << 20


class Member(Protocol):
    """A communicator that knows its own address."""

    peer: Peer


class Backend:
    """How to create one kind of communicator, and what the suite may expect of it."""

    name: str
    collective_edit = False  # edit returns only when every member has called it
    send_can_block = True  # a send waits for a receiver that is in no call
    keeps_links = True  # an edit leaves the links between survivors alone

    def make(self, rank: int, incarnation: int) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Release what the communicators of one test share."""

    def victim(self, rank: int) -> Victim:
        """A member in a process of its own, to be killed."""
        return Victim(self.victim_arguments(), rank)

    def victim_arguments(self) -> dict[str, Any]:
        raise NotImplementedError


class MeshBackend(Backend):
    def __init__(self, shared_memory: bool) -> None:
        self.shared_memory = shared_memory
        self.name = "mesh-shm" if shared_memory else "mesh-tcp"

    def victim_arguments(self):
        return {"backend": "mesh", "shared_memory": self.shared_memory}

    def make(self, rank, incarnation, token="job", on_corruption=None):
        return MeshCommunicator(
            rank,
            incarnation,
            host_id="here",
            token=token,
            shared_memory=self.shared_memory,
            ring_bytes=RING_BYTES,
            on_corruption=on_corruption,
        )


class GlooBackend(Backend):
    name = "gloo"
    collective_edit = True
    send_can_block = False  # a thread of the receiver always accepts what arrives
    keeps_links = False

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def victim_arguments(self):
        return {"backend": "gloo", "port": self.store.port}

    def make(self, rank, incarnation):
        return GlooCommunicator(rank, incarnation, store=TCPStore("127.0.0.1", self.store.port, is_master=False))

    def close(self):
        del self.store


class MemoryBackend(Backend):
    name = "memory"
    send_can_block = False

    def __init__(self) -> None:
        self.network = MemoryNetwork()

    def make(self, rank, incarnation):
        return MemoryCommunicator(rank, incarnation, network=self.network)


BACKENDS: Mapping[str, Callable[[], Backend]] = {
    "mesh-tcp": lambda: MeshBackend(False),
    "mesh-shm": lambda: MeshBackend(True),
    "gloo": GlooBackend,
    "memory": MemoryBackend,
}


class Thread(threading.Thread):
    """A thread whose result, or whose exception, `result` returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join()
        if self._error is not None:
            raise self._error
        return self._value


class Cluster:
    """Ranks of one backend, by rank; a rank may be replaced."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.ranks: dict[int, Any] = {}
        self.generation = 0
        self._made: list[Communicator] = []

    def __getitem__(self, rank: int) -> Any:
        return self.ranks[rank]

    def add(self, rank: int, incarnation: int = 1) -> Any:
        self.ranks[rank] = self.backend.make(rank, incarnation)
        self._made.append(self.ranks[rank])
        return self.ranks[rank]

    def start(self, size: int) -> Cluster:
        for rank in range(size):
            self.add(rank)
        self.edit()
        return self

    def peers(self) -> dict[int, Peer]:
        return {rank: comm.peer for rank, comm in self.ranks.items()}

    def edit(self, extra: Mapping[int, Peer] | None = None) -> dict[int, EditReport]:
        """Move all ranks to the next generation, with `extra` members that run elsewhere."""
        self.generation += 1
        peers = {**self.peers(), **(extra or {})}
        return self.everywhere(lambda comm: comm.edit(self.generation, peers))

    def everywhere(self, function: Callable[[Any], Any]) -> dict[int, Any]:
        """Call `function(communicator)` for all ranks at once: the results by rank."""
        threads = {rank: Thread(lambda comm=comm: function(comm)) for rank, comm in self.ranks.items()}
        return {rank: thread.result() for rank, thread in threads.items()}

    def barrier(self, index: int = 0) -> None:
        self.everywhere(lambda comm: barrier(comm, self.generation, index))

    def abort(self) -> None:
        for comm in self.ranks.values():
            comm.abort()

    def close(self) -> None:
        for comm in self._made:
            comm.close()
        self._made.clear()
        self.ranks.clear()
        self.backend.close()


class Victim:
    """A member in a process of its own: it enters one barrier, then waits for a message that is never sent."""

    def __init__(self, arguments: Mapping[str, Any], rank: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victim.py")), json.dumps({**arguments, "rank": rank})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peer = Peer(**json.loads(self._line()))

    def join(self, generation: int, peers: Mapping[int, Peer]) -> None:
        """Send it the plan; it carries it out by itself."""
        assert self._process.stdin is not None
        plan = {"generation": generation, "peers": [asdict(peer) for peer in peers.values()]}
        print(json.dumps(plan), file=self._process.stdin, flush=True)

    def waits(self) -> None:
        """Return once it has left the barrier."""
        assert self._line() == "waiting\n"

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)
