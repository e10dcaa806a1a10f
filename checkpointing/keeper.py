"""The snapshot keeper: a process per node that holds its workers' snapshot segments and outlives the workers.

Workers hand it the segments they write (descriptors over a unix socket in the abstract namespace, which leaves no
file). Anyone in the job may fetch shards from it over TCP. A request is a JSON line; an answer is a JSON line and,
for a fetch, the bytes it announces. It never imports torch, and never writes to a segment.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..comms.process import die_with_parent
from .segment import Entry, Segment

MAX_REQUEST_BYTES = 16 << 20
STALE_VERSIONS = 3  # a dead worker's segment this far behind a live one of its node is of no more use


@dataclass(frozen=True)
class Guarded:
    """A segment and whose it is."""

    rank: int
    incarnation: int
    segment: Segment


class Keeper:
    """The segments of a node, and the answers about them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: dict[tuple[int, int, int], Guarded] = {}

    def register(self, rank: int, incarnation: int, number: int, fd: int, size: int, entries: list[Entry]) -> None:
        """Guard a segment. Segments of dead workers that have fallen behind are let go."""
        segment = Segment(fd, size, entries)
        with self._lock:
            self._release((rank, incarnation, number))
            self._segments[(rank, incarnation, number)] = Guarded(rank, incarnation, segment)
            self._prune()

    def drop(self, rank: int, incarnation: int, number: int) -> None:
        """Let a segment go."""
        with self._lock:
            self._release((rank, incarnation, number))

    def _release(self, name: tuple[int, int, int]) -> None:
        guarded = self._segments.pop(name, None)
        if guarded is not None:
            guarded.segment.close()

    def _prune(self) -> None:
        latest = {g.rank: 0 for g in self._segments.values()}
        for guarded in self._segments.values():
            latest[guarded.rank] = max(latest[guarded.rank], guarded.incarnation)
        newest = max((g.segment.newest() for g in self._segments.values()), default=-1)
        for name, guarded in list(self._segments.items()):
            superseded = guarded.incarnation < latest[guarded.rank]
            if superseded and guarded.segment.newest() <= newest - STALE_VERSIONS:
                self._release(name)

    def fetch(self, shards: list[int], version: int, replay: bool) -> tuple[list[dict[str, Any]], list[bytes]]:
        """For each shard that is held: its state at `version`, or, with `replay`, the state before it and the gradient
        of step version - 1. Slots whose checksum does not match are passed over."""
        found: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        with self._lock:
            for shard in shards:
                for parts in self._candidates(shard, version, replay):
                    found.append({"shard": shard, "version": parts[0], "lengths": [len(p) for p in parts[1]]})
                    blobs.extend(parts[1])
                    break
        return found, blobs

    def _candidates(self, shard: int, version: int, replay: bool) -> Iterator[tuple[int, list[bytes]]]:
        holders = [g.segment for g in self._segments.values() if shard in g.segment.entries]
        for segment in holders:
            state = _read(segment, shard, version % 2, version)
            if state is not None:
                yield version, [state]
        for segment in holders if replay and version > 0 else ():
            state = _read(segment, shard, (version - 1) % 2, version - 1)
            gradient = _read(segment, shard, 2 + (version - 1) % 2, version - 1)
            if state is not None and gradient is not None:
                yield version - 1, [state, gradient]

    def held(self) -> dict[str, Any]:
        """How many segments and bytes are held, by rank."""
        with self._lock:
            return {
                "segments": len(self._segments),
                "bytes": sum(g.segment.size for g in self._segments.values()),
                "ranks": sorted({g.rank for g in self._segments.values()}),
            }


def _read(segment: Segment, shard: int, slot: int, version: int) -> bytes | None:
    stored = segment.stored(shard, slot)
    return segment.read(stored) if stored is not None and stored.version == version else None


class KeeperServer:
    """Serves one keeper on a unix socket (registration) and a TCP port (fetching)."""

    def __init__(self, keeper: Keeper, name: str, host: str, port: int, token: str) -> None:
        self.keeper = keeper
        self.token = token
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind("\0" + name)
        self._unix.listen(64)
        self._tcp = socket.create_server((host, port), backlog=64)
        self.port: int = self._tcp.getsockname()[1]

    def serve(self) -> None:
        """Accept until the process ends."""
        threading.Thread(target=self._accept, args=(self._unix, True), daemon=True).start()
        self._accept(self._tcp, False)

    def _accept(self, listener: socket.socket, local: bool) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._converse, args=(connection, local), daemon=True).start()

    def _converse(self, connection: socket.socket, local: bool) -> None:
        with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            reader = _FdReader(connection) if local else None
            stream = connection.makefile("rb")
            hello = json.loads(reader.line() if reader else stream.readline(MAX_REQUEST_BYTES))
            if not hmac.compare_digest(str(hello.get("token")), self.token):
                return
            while True:
                line = reader.line() if reader else stream.readline(MAX_REQUEST_BYTES)
                if not line:
                    return
                self._answer(connection, json.loads(line), reader)

    def _answer(self, connection: socket.socket, request: dict[str, Any], reader: _FdReader | None) -> None:
        operation = request["op"]
        blobs: list[bytes] = []
        answer: dict[str, Any]
        if operation == "register" and reader is not None:
            entries = [Entry(*entry) for entry in request["entries"]]
            owner = (request["rank"], request["incarnation"], request["segment"])
            self.keeper.register(*owner, reader.take_fd(), request["size"], entries)
            answer = {"ok": True}
        elif operation == "drop" and reader is not None:
            self.keeper.drop(request["rank"], request["incarnation"], request["segment"])
            answer = {"ok": True}
        elif operation == "fetch":
            found, blobs = self.keeper.fetch(request["shards"], request["version"], request["replay"])
            answer = {"found": found}
        elif operation == "held":
            answer = self.keeper.held()
        else:
            answer = {"error": f"unknown operation {operation!r}"}
        connection.sendall(json.dumps(answer).encode() + b"\n")
        for blob in blobs:
            connection.sendall(blob)


class _FdReader:
    """Lines from a unix socket, with the descriptors that came along."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._fds: list[int] = []

    def line(self) -> bytes:
        while b"\n" not in self._buffer:
            data, fds, _, _ = socket.recv_fds(self._connection, 1 << 16, 4)
            self._fds.extend(fds)
            if not data or len(self._buffer) > MAX_REQUEST_BYTES:
                return b""
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def take_fd(self) -> int:
        return self._fds.pop(0)


class KeeperClient:
    """A connection to a keeper, for fetching. Not thread-safe."""

    def __init__(self, address: str, token: str, timeout_s: float = 30.0) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=timeout_s)
        self._stream: BinaryIO = self._socket.makefile("rb")
        self._socket.sendall(json.dumps({"token": token}).encode() + b"\n")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer's JSON."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the snapshot keeper closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fetch(self, shards: list[int], version: int, replay: bool) -> dict[int, tuple[int, list[bytes]]]:
        """Shard -> (state version, [state] or [state, gradient]), for the shards that this keeper has."""
        answer = self.ask({"op": "fetch", "shards": shards, "version": version, "replay": replay})
        result = {}
        for item in answer["found"]:
            blobs = [self._stream.read(length) for length in item["lengths"]]
            if [len(blob) for blob in blobs] != item["lengths"]:
                raise ConnectionError("the snapshot keeper went away in the middle of an answer")
            result[item["shard"]] = (item["version"], blobs)
        return result

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class KeeperLink:
    """A worker's connection to its node's keeper: registers the segments it writes, again if the keeper restarted."""

    def __init__(self, name: str, token: str, rank: int, incarnation: int) -> None:
        self._name = name
        self._token = token
        self._owner = {"rank": rank, "incarnation": incarnation}
        self._segments: dict[int, Segment] = {}
        self._numbers = 0
        self._socket = self._connect()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(30.0)
        connection.connect("\0" + self._name)
        connection.sendall(json.dumps({"token": self._token}).encode() + b"\n")
        return connection

    def register(self, segment: Segment) -> int:
        """Hand a segment to the keeper; returns its number."""
        self._numbers += 1
        self._segments[self._numbers] = segment
        self._register(self._numbers, segment)
        return self._numbers

    def _register(self, number: int, segment: Segment) -> None:
        entries = [list(entry) for entry in segment.entries.values()]
        request = {"op": "register", **self._owner, "segment": number, "size": segment.size, "entries": entries}
        self._ask(request, [segment.fd])

    def drop(self, number: int) -> None:
        """Tell the keeper to let a segment go, and close it here."""
        segment = self._segments.pop(number)
        self._ask({"op": "drop", **self._owner, "segment": number}, [])
        segment.close()

    def _ask(self, request: dict[str, Any], fds: list[int]) -> None:
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._socket, [line[:1]], fds) if fds else 0
        self._socket.sendall(line[sent:])
        answer = b""
        while not answer.endswith(b"\n"):
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the snapshot keeper closed the connection")
            answer += data

    def ensure(self) -> bool:
        """Register everything again if the keeper went away and came back; returns whether it had to."""
        if self._socket.fileno() >= 0 and not select.select([self._socket], [], [], 0)[0]:
            return False  # nothing is unasked for but the end of the connection
        self._socket.close()
        try:
            self._socket = self._connect()
            for number, segment in self._segments.items():
                self._register(number, segment)
        except OSError:
            return False  # not back yet; the next step tries again
        return True

    def close(self) -> None:
        """Close the connection; the keeper goes on guarding the segments."""
        self._socket.close()


def main() -> None:
    """Run a keeper; prints its TCP port on standard output when it serves."""
    parser = argparse.ArgumentParser(prog="everstep-keeper")
    parser.add_argument("--name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    token = os.environ.pop("EVERSTEP_TOKEN")
    try:
        server = KeeperServer(Keeper(), arguments.name, arguments.host, arguments.port, token)
    except OSError as error:
        print(error, flush=True)  # our agent reads it
        sys.exit(1)
    print(server.port, flush=True)
    sys.stdout.close()
    server.serve()


if __name__ == "__main__":
    main()
