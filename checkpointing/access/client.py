"""The two ways to a snapshot keeper: over TCP, to fetch from any node's; over a unix socket, to hand one's own node's
keeper what a worker writes. A request is a JSON line; an answer is a JSON line and the bytes it announces.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from everstep.checkpointing.memory.segment import Segment
from everstep.comms.base import addresses
from everstep.comms.base.security import Security, own
from everstep.resharding.lines import Lines

from .keeper_protocol import greeting

SLICE_S = 0.05  # how often a caller that waits is called back
SILENCE_S = 5.0  # a keeper that answers nothing for so long is taken for gone
CONNECT_S = 2.0
RESTART_S = 30.0  # within which a keeper that ended has another in its place
REQUEST_BYTES = 64 << 20  # of one request to a keeper, which closes the connection of who says more
_READ_BYTES = 1 << 16


class Fetched(NamedTuple):
    """A shard from a keeper: its record, and, if that is of the version before, the gradient that leads on."""

    shard: int
    version: int
    parts: list[bytearray]


class KeeperRefused(Exception):
    """A keeper will not, or can no longer, give what was asked for."""


def _request_line(request: dict[str, Any]) -> bytes:
    line = json.dumps(request).encode() + b"\n"
    if len(line) > REQUEST_BYTES:
        raise ValueError(
            f"a request {request.get('op')!r} to a snapshot keeper is {len(line) / 2**20:.0f} MiB, and the limit is "
            f"{REQUEST_BYTES >> 20} MiB: it grows with the number of parameters and of registered states"
        )
    return line


class KeeperClient:
    """A connection to a keeper. Not thread-safe. Raises OSError when the keeper goes away or falls silent.

    `on_wait` is called every 50 ms while it waits, and may raise to give up; the connection is of no more use then.
    """

    def __init__(
        self,
        address: str,
        token: str,
        on_wait: Callable[[], None] = lambda: None,
        security: Security | None = None,
    ) -> None:
        self.address = address
        self.closed = False
        self.on_wait = on_wait
        self._buffer = bytearray()
        self._socket = _encrypted(_connect(address, on_wait), security or own())
        self._socket.settimeout(SILENCE_S)
        self._socket.sendall(greeting(token))
        self._socket.settimeout(SLICE_S)

    def _send(self, request: dict[str, Any]) -> None:
        self._socket.settimeout(SILENCE_S)
        self._socket.sendall(_request_line(request))
        self._socket.settimeout(SLICE_S)

    def _receive(self, patience_s: float, on_wait: Callable[[], None], into: memoryview | None = None) -> int:
        """Read something, into the buffer or `into`; returns how much."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                if into is not None:
                    count = self._socket.recv_into(into)
                else:
                    data = self._socket.recv(_READ_BYTES)
                    count = len(data)
                    self._buffer += data
            except TimeoutError:
                on_wait()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the snapshot keeper at {self.address} is silent") from None
                continue
            if not count:
                raise ConnectionError(f"the snapshot keeper at {self.address} closed the connection")
            return count

    def _line(self, patience_s: float = SILENCE_S, on_wait: Callable[[], None] | None = None) -> dict[str, Any]:
        searched = 0  # of a long line, only what has come since is looked at
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            self._receive(patience_s, on_wait or self.on_wait)
        answer: dict[str, Any] = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        if "error" in answer:
            raise KeeperRefused(answer["error"])
        return answer

    def _fill(self, view: memoryview) -> None:
        have = min(len(self._buffer), len(view))
        view[:have] = self._buffer[:have]
        del self._buffer[:have]
        while have < len(view):
            have += self._receive(SILENCE_S, self.on_wait, view[have:])

    def _bytes(self, length: int) -> bytearray:
        data = bytearray(length)
        with memoryview(data) as view:
            self._fill(view)
        return data

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer's JSON."""
        self._send(request)
        return self._line()

    def fetch(
        self, shards: Sequence[int], version: int, *, replay: bool, lines: Lines = (), agreed_in: int = 0
    ) -> tuple[Iterator[Fetched], list[int]]:
        """What this keeper has of the shards, as it comes in, and the damaged ones.

        With `replay`, a shard may come as the version before, with the gradient that leads on. Only records of `lines`
        count, and gradients of generation `agreed_in`, in which their step was agreed, or newer. All of it has to be
        taken before anything else is asked for.
        """
        request = {"op": "fetch", "shards": list(shards), "version": version, "replay": replay, "lines": lines}
        answer = self.ask({**request, "agreed_in": agreed_in})
        return self._records(answer["found"]), answer["damaged"]

    def gradients(
        self, shards: Sequence[int], step: int, *, lines: Lines = (), agreed_in: int = 0
    ) -> tuple[Iterator[Fetched], list[int]]:
        """The reduced gradients of a step that this keeper has, likewise; `version` is the step, `parts` has one."""
        request = {"op": "gradients", "shards": list(shards), "step": step, "lines": lines, "agreed_in": agreed_in}
        answer = self.ask(request)
        return self._records(answer["found"]), answer["damaged"]

    def _records(self, found: list[dict[str, Any]]) -> Iterator[Fetched]:
        for item in found:
            yield Fetched(item["shard"], item["version"], [self._bytes(length) for length in item["lengths"]])

    def parity(self, shards: Sequence[int], version: int, lines: Lines = ()) -> list[dict[str, Any]]:
        """The parity blocks at `version` of stripes that any of these shards belongs to; see `Block.describe`."""
        answer = self.ask({"op": "parity", "shards": list(shards), "version": version, "lines": lines})
        blocks: list[dict[str, Any]] = answer["blocks"]
        return blocks

    def block(self, number: int) -> bytearray | None:
        """A parity block; None if it is gone, or does not match its checksum."""
        answer = self.ask({"op": "block", "block": number})
        return self._bytes(answer["length"]) if answer["length"] is not None else None

    def contents(self, digests: Sequence[str]) -> Iterator[tuple[str, bytearray]]:
        """Those of the pieces that this keeper has, unchecked. All have to be taken before anything else is asked."""
        answer = self.ask({"op": "contents", "digests": list(digests)})
        for digest, length in zip(digests, answer["lengths"], strict=True):
            if length is not None:
                yield digest, self._bytes(length)

    def collect(
        self,
        shards: Sequence[int],
        version: int,
        generation: int,
        staging: bytearray,
        patient: Callable[[], None],
        lines: Lines = (),
    ) -> Iterator[tuple[int, int]]:
        """Each shard's state at `version` in turn, written into `staging` as soon as it is sealed: (length, checksum).

        `staging` is extended for a longer record; no view of it may be alive when the next one is asked for. Raises
        KeeperRefused when the keeper has gone to a newer generation.
        """
        request = {"op": "collect", "shards": list(shards), "version": version, "generation": generation}
        self._send({**request, "lines": lines})
        for _ in shards:
            answer = self._line(float("inf"), patient)
            if answer["length"] > len(staging):  # it has grown since the generation began
                staging.extend(bytes(answer["length"] - len(staging)))
            with memoryview(staging) as view, view[: answer["length"]] as room:
                self._fill(room)
            yield answer["length"], answer["checksum"]

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        self._socket.close()


def _connect(address: str, on_wait: Callable[[], None]) -> socket.socket:
    deadline = time.monotonic() + CONNECT_S
    family, place = addresses.resolve(*addresses.parse(address))
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(place)
        while not select.select([], [connection], [], SLICE_S)[1]:
            on_wait()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no snapshot keeper answers at {address}")
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"connecting to the snapshot keeper at {address}")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    return connection


def _encrypted(connection: socket.socket, security: Security) -> socket.socket:
    """TLS, where there are certificates. Raises OSError."""
    if not security.encrypts:
        return connection
    connection.settimeout(CONNECT_S)
    try:
        return security.connect(connection)
    except BaseException:
        connection.close()
        raise


class KeeperLink:
    """A worker's connection to its node's keeper: hands over what it writes, again if the keeper restarted."""

    def __init__(self, name: str, token: str, rank: int, incarnation: int) -> None:
        self._name = name
        self._token = token
        self._owner = {"rank": rank, "incarnation": incarnation}
        self._segments: dict[int, Segment] = {}
        self._entered: dict[str, Any] | None = None
        self._sealed: dict[str, Any] | None = None
        self._numbers = 0
        self._lock = threading.RLock()  # the thread that copies speaks too
        self._socket = self._connect_at_last()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(30.0)
            connection.connect("\0" + self._name)
            connection.sendall(greeting(self._token))
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_at_last(self) -> socket.socket:
        """A keeper that was killed is started again by its agent, which takes a moment."""
        deadline_s = time.monotonic() + RESTART_S
        while True:
            try:
                return self._connect()
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise ConnectionError(
                        f"this node's snapshot keeper does not answer, and none was started in its place within "
                        f"{RESTART_S:g} s ({error}): the launcher's log says how it ended"
                    ) from None
                time.sleep(SLICE_S)

    def register(self, segment: Segment) -> int:
        """Hand a segment to the keeper; returns its number."""
        with self._lock:
            self._numbers += 1
            self._segments[self._numbers] = segment
            with self._later():
                self._register(self._numbers, segment)
            return self._numbers

    @contextlib.contextmanager
    def _later(self) -> Iterator[None]:
        """A keeper that is gone has another in its place soon: `ensure` tells that one everything that stands."""
        try:
            yield
        except OSError:
            self._socket.close()

    def _register(self, number: int, segment: Segment) -> None:
        entries = [list(entry) for entry in segment.entries.values()]
        place = {"size": segment.size, "entries": entries, "states": segment.states}
        self._ask({"op": "register", **self._owner, "segment": number, **place}, [segment.fd])

    def drop(self, number: int) -> None:
        """Tell the keeper to let a segment go, and close it here."""
        with self._lock:
            segment = self._segments.pop(number)
            with self._later():
                self._ask({"op": "drop", **self._owner, "segment": number}, [])
            segment.close()

    def enter(
        self,
        generation: int,
        placement: str,
        addresses: dict[str, str],
        capacities: Sequence[int],
        lines: Lines = (),
    ) -> None:
        """Tell the keeper of a new generation, of the parity it holds in it, and which records count."""
        request = {"op": "enter", "generation": generation, "placement": placement, "lines": lines}
        with self._lock:
            self._entered = {**request, "addresses": addresses, "capacities": list(capacities)}
            self._sealed = None
            with self._later():
                self._ask(self._entered, [])

    def sealed(self, generation: int, version: int, protected: int, *, protect: bool) -> None:
        """All of this worker's shards are sealed at `version`; `protect`: it is to outlive nodes."""
        request = {"op": "sealed", "generation": generation, "version": version, "protected": protected}
        with self._lock:
            self._sealed = {**request, "protect": protect}
            with contextlib.suppress(OSError):  # `ensure` says it again
                self._ask(self._sealed, [])

    def state(self) -> dict[str, Any] | None:
        """{"complete", "before", "incidents"}: what is whole at this keeper, as (generation, version); see `Protector`.

        None if the keeper is away.
        """
        with self._lock:
            try:
                return self._ask({"op": "state"}, [])
            except OSError:
                return None

    def contents(self, version: int, oldest: int, digests: Sequence[str], on_wait: Callable[[], None]) -> list[str]:
        """A version has these pieces, and versions before `oldest` are of no more use: which ones the keeper lacks."""
        request = {"op": "contents", "version": version, "oldest": oldest, "digests": list(digests)}
        lacking: list[str] = self._ask_at_last(request, on_wait)["lacking"]
        return lacking

    def hold(self, version: int, pieces: Sequence[tuple[str, int]], fd: int, on_wait: Callable[[], None]) -> None:
        """Hand over pieces, (digest, bytes), which lie one after the other in shared memory."""
        self._ask_at_last({"op": "hold", "version": version, "pieces": list(pieces)}, on_wait, [fd])

    def _ask_at_last(
        self, request: dict[str, Any], on_wait: Callable[[], None], fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Ask the keeper, or the one that is started in its place. Raises ConnectionError after 30 s without any."""
        deadline_s = time.monotonic() + RESTART_S
        while True:
            with self._lock:
                try:
                    return self._ask(request, list(fds))
                except OSError:
                    if time.monotonic() > deadline_s:
                        raise
                    self._socket.close()
            on_wait()
            time.sleep(SLICE_S)
            self.ensure()

    def save(self, request: str) -> None:
        """Have a part of a checkpoint saved (a `SaveRequest`, as JSON). Raises OSError if the keeper is away."""
        with self._lock:
            self._ask({"op": "save", "request": request}, [])

    def abandon(self, writer: str, name: str) -> None:
        """Give up a save that makes no progress."""
        with self._lock, contextlib.suppress(OSError):
            self._ask({"op": "abandon", "writer": writer, "name": name}, [])

    def saves(self, writer: str) -> dict[str, Any] | None:
        """{"results", "open", "still_s"}: what became of that writer's saves since the last time, and those under way.

        A result is {"name", "committed", "error", "seconds"}; "still_s": name -> seconds without progress. None if the
        keeper is away.
        """
        with self._lock:
            try:
                return self._ask({"op": "saves", "writer": writer}, [])
            except OSError:
                return None

    def _ask(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        line = _request_line(request)
        sent = socket.send_fds(self._socket, [line[:1]], fds) if fds else 0
        self._socket.sendall(line[sent:])
        answer = bytearray()
        while not answer.endswith(b"\n"):
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the snapshot keeper closed the connection")
            answer += data
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise KeeperRefused(found["error"])
        return found

    def ensure(self) -> bool:
        """Say everything again if the keeper went away and came back; returns whether it had to."""
        with self._lock:
            if self._socket.fileno() >= 0 and not select.select([self._socket], [], [], 0)[0]:
                return False  # nothing is unasked for but the end of the connection
            self._socket.close()
            try:
                self._socket = self._connect()
                for number, segment in self._segments.items():
                    self._register(number, segment)
                for request in (self._entered, self._sealed):
                    if request is not None:
                        self._ask(request, [])
            except OSError:
                return False  # not back yet; the next step tries again
            return True

    def close(self) -> None:
        """Close the connection; the keeper still guards the segments."""
        self._socket.close()
