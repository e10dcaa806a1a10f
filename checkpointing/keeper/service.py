"""The snapshot keeper's process: serves one keeper on a unix socket (its node's workers) and a TCP port (all nodes).

The unix socket is in the abstract namespace, which leaves no file; descriptors of segments come over it.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from everstep.checkpointing.access.client import REQUEST_BYTES
from everstep.checkpointing.access.keeper_protocol import PROTOCOL, Failure, KeeperStart, NameTaken, refusal
from everstep.checkpointing.memory.segment import Entry
from everstep.checkpointing.saving.handle import Saver
from everstep.checkpointing.saving.request import SaveRequest
from everstep.comms.base import addresses
from everstep.comms.base.process import leave_signals_to_launcher, let_compute_go_first, let_oom_killer_take_first
from everstep.comms.base.security import Security, SecurityError, own
from everstep.resharding.lines import lines_of
from everstep.resharding.placement import Placement

from .keeper import Generation, Keeper, VersionOver
from .parity import ParityStore
from .protector import Protector

GREETING_BYTES, GREETING_S = 4096, 10.0  # limits of a client before it has authenticated
OOM_THOUSANDTHS = 250  # behind workers, which a keeper's memory replaces; before the launcher
STRANGERS = 256  # such connections at a time
WAIT_SLICE_S = 0.1


class Leash:
    """Ties a keeper to its agent. The process exits `linger_s` after the agent's end, unless a new one adopts it."""

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._lock = threading.Lock()
        self._held = True
        self._times = 0

    def take(self) -> bool:
        """Take the leash if it is free; returns whether it was."""
        with self._lock:
            free, self._held = not self._held, True
            return free

    def let_go(self) -> None:
        """Its holder is gone."""
        with self._lock:
            self._held = False
            self._times += 1
            timer = threading.Timer(self._linger_s, self._end, (self._times,))
            timer.daemon = True
            timer.start()

    def _end(self, times: int) -> None:
        with self._lock:
            if not self._held and times == self._times:
                os._exit(0)

    def follow(self, stream: Any) -> None:
        """Hold it for as long as `stream` lasts."""

        def watch() -> None:
            stream.read()
            self.let_go()

        threading.Thread(target=watch, name="everstep-leash", daemon=True).start()


class KeeperServer:
    """Serves one keeper until the process ends."""

    def __init__(
        self,
        keeper: Keeper,
        name: str,
        host: str,
        port: int,
        token: str,
        leash: Leash | None = None,
        security: Security | None = None,
    ) -> None:
        self.keeper = keeper
        self.leash = leash or Leash(0.0)
        self.token = token
        self.store = ParityStore()
        self.protector = Protector(keeper, self.store, token)
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._unix.bind("\0" + name)
        except OSError as error:
            raise NameTaken(f"another keeper has the name {name}") from error
        self._unix.listen(64)
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self._security = security or own()
        self._security.check_bind(host)
        self._tcp = addresses.listen(host, port, backlog=1024)
        self.port: int = self._tcp.getsockname()[1]
        self.saver = Saver(addresses.join(host, self.port), token)

    def serve(self) -> None:
        """Accept until the process ends."""
        threading.Thread(target=self._accept, args=(self._unix, True), daemon=True).start()
        self._accept(self._tcp, False)

    def close(self) -> None:
        """Stop accepting; conversations end with their clients."""
        for listener in (self._unix, self._tcp):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            listener.close()

    def _accept(self, listener: socket.socket, local: bool) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed
            if not self._strangers.acquire(blocking=False):
                connection.close()  # so many that have not shown the token: that is no job of ours
                continue
            threading.Thread(target=self._welcome, args=(connection, local), daemon=True).start()

    def _welcome(self, connection: socket.socket, local: bool) -> None:
        greeted = [False]

        def greet() -> None:
            greeted[0] = True
            self._strangers.release()

        try:
            self._converse(connection, local, greet)
        finally:
            if not greeted[0]:
                self._strangers.release()

    def _converse(self, connection: socket.socket, local: bool, greeted: Callable[[], None]) -> None:
        owners: set[tuple[int, int]] = set()
        wrong = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
        with connection, contextlib.ExitStack() as stack, contextlib.suppress(*wrong):
            connection.settimeout(GREETING_S)
            if not local:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = stack.enter_context(self._security.accept(connection))
            reader = stack.enter_context(_Lines(connection, fds=local))
            hello = json.loads(reader.line(GREETING_BYTES) or b"{}")
            if not hmac.compare_digest(str(hello.get("token")).encode(), self.token.encode()):
                return
            if why := refusal(hello):
                reader.line(GREETING_BYTES)  # read the request: else the connection's reset may overtake the answer
                _answer(connection, {"error": why})
                return
            connection.settimeout(None)
            greeted()
            while line := reader.line():
                request = json.loads(line)
                if request["op"] == "collect":
                    let_compute_go_first()
                    self._collect(connection, request)
                elif local and request["op"] == "adopt":
                    self._adopt(connection, request["node"], reader)
                elif local:
                    if request["op"] == "register":
                        owners.add((request["rank"], request["incarnation"]))
                    _answer(connection, self._local(request, reader, id(connection)))
                else:
                    self._remote(connection, request)
        for rank, incarnation in owners:
            self.keeper.left(rank, incarnation, id(connection))

    def _adopt(self, connection: socket.socket, node: str, reader: _Lines) -> None:
        """An agent adopts this keeper from a dead agent; it holds the leash for as long as this connection lasts."""
        if not self.leash.take():
            _answer(connection, {"adopted": False})
            return
        self.keeper.adopt(node)
        _answer(connection, {"adopted": True, "protocol": PROTOCOL, "port": self.port, "pid": os.getpid()})
        with contextlib.suppress(OSError):
            reader.line()
        self.leash.let_go()

    # ------------------------------------------------------------ from the node's own workers

    def _local(self, request: dict[str, Any], reader: _Lines, connection: int) -> dict[str, Any]:
        keeper, operation = self.keeper, request["op"]
        if operation == "register":
            entries = [Entry(*entry) for entry in request["entries"]]
            owner = (request["rank"], request["incarnation"], request["segment"])
            fd = reader.take_fd()
            keeper.register(*owner, fd, request["size"], entries, request["states"], connection)
        elif operation == "drop":
            keeper.drop(request["rank"], request["incarnation"], request["segment"])
        elif operation == "enter":
            placement = Placement.from_json(request["placement"])
            capacities = tuple(request["capacities"])
            lines = lines_of(request["lines"])
            if keeper.enter(Generation(request["generation"], placement, request["addresses"], capacities, lines)):
                self.protector.enter()
        elif operation == "sealed":
            keeper.sealed(request["generation"], request["protected"])
            if request["protect"]:
                self.protector.want(request["generation"], request["version"], request["protected"])
        elif operation == "contents":
            return {"lacking": keeper.contents.use(request["version"], request["oldest"], request["digests"])}
        elif operation == "hold":
            fd = reader.take_fd()
            try:
                keeper.contents.hold(fd, request["version"], request["pieces"])
            finally:
                os.close(fd)
        elif operation == "save":
            self.saver.save(SaveRequest.from_json(request["request"]))
        elif operation == "abandon":
            self.saver.abandon(request["writer"], request["name"])
        elif operation == "saves":
            return self.saver.results(request["writer"])
        elif operation == "state":
            complete, before = self.protector.state()
            return {"complete": complete, "before": before, "incidents": keeper.take_incidents()}
        else:
            return {"error": f"unknown operation {operation!r}"}
        return {"ok": True}

    # ------------------------------------------------------------ from anyone in the job

    def _remote(self, connection: socket.socket, request: dict[str, Any]) -> None:
        operation = request["op"]
        if operation in ("fetch", "gradients"):
            shards, lines, agreed_in = request["shards"], lines_of(request["lines"]), request["agreed_in"]
            found, blobs, damaged = (
                self.keeper.fetch(
                    shards, request["version"], replay=request["replay"], lines=lines, agreed_in=agreed_in
                )
                if operation == "fetch"
                else self.keeper.gradients(shards, request["step"], lines=lines, agreed_in=agreed_in)
            )
            _answer(connection, {"found": found, "damaged": damaged})
            for blob in blobs:
                connection.sendall(blob)
        elif operation == "parity":
            blocks = self.store.covering(request["shards"], request["version"], lines_of(request["lines"]))
            _answer(connection, {"blocks": [block.describe() for block in blocks]})
        elif operation == "block":
            block = self.store.block(request["block"])
            data = block.read() if block is not None else None
            _answer(connection, {"length": None if data is None else len(data)})
            connection.sendall(data or b"")
        elif operation == "contents":
            pieces = [self.keeper.contents.find(digest) for digest in request["digests"]]
            _answer(connection, {"lengths": [None if piece is None else len(piece) for piece in pieces]})
            for piece in pieces:
                connection.sendall(piece or b"")
        elif operation == "held":
            _answer(connection, {**self.keeper.held(), "parity_bytes": self.store.bytes, **self.store.work()})
        else:
            _answer(connection, {"error": f"unknown operation {operation!r}"})

    def _collect(self, connection: socket.socket, request: dict[str, Any]) -> None:
        """Send each shard as soon as it is sealed, directly from the segment; the receiver verifies the bytes."""
        version, generation, lines = request["version"], request["generation"], lines_of(request["lines"])
        for shard in request["shards"]:
            place = None
            while place is None:
                try:
                    place = self.keeper.await_shard(shard, version, generation, WAIT_SLICE_S, lines)
                except VersionOver:
                    _answer(connection, {"error": f"generation {generation} is over"})
                    return
                if place is None and select.select([connection], [], [], 0)[0]:
                    return  # clients send nothing more: the client is gone
            segment, stored = place
            with memoryview(segment.memory) as view, view[stored.offset : stored.offset + stored.length] as body:
                _answer(connection, {"shard": shard, "length": stored.length, "checksum": stored.checksum})
                connection.sendall(body)


def _answer(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


class _Lines:
    """Lines from a socket, with the descriptors that came along."""

    def __init__(self, connection: socket.socket, *, fds: bool) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._with_fds = fds
        self._fds: list[int] = []

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def line(self, limit: int = REQUEST_BYTES) -> bytes:
        """The next line, without its end; empty when there is none, or it is longer than `limit` bytes."""
        searched = 0  # of a long line, only new bytes are searched
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if self._with_fds:
                data, fds, _, _ = socket.recv_fds(self._connection, 1 << 16, 4)
                self._fds.extend(fds)
            else:
                data = self._connection.recv(1 << 16)
            if not data or len(self._buffer) > limit:
                return b""
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def take_fd(self) -> int:
        return self._fds.pop(0)


def main() -> None:
    """Run a keeper; prints the outcome of its start, a line of `KeeperStart`, on standard output."""
    parser = argparse.ArgumentParser(prog="everstep-keeper")
    parser.add_argument("--node", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--linger", type=float, default=0.0)
    arguments = parser.parse_args()
    leave_signals_to_launcher()
    let_oom_killer_take_first(OOM_THOUSANDTHS)
    token = os.environ.pop("EVERSTEP_TOKEN")
    try:
        keeper, leash = Keeper(arguments.node), Leash(arguments.linger)
        server = KeeperServer(keeper, arguments.name, arguments.host, arguments.port, token, leash)
    except (OSError, SecurityError) as error:
        failure = Failure.NAME_TAKEN if isinstance(error, NameTaken) else Failure.OTHER
        print(KeeperStart(failure=failure, why=str(error)).line(), flush=True)
        sys.exit(1)
    leash.follow(sys.stdin)
    print(KeeperStart(server.port).line(), flush=True)
    sys.stdout.close()
    server.serve()


if __name__ == "__main__":
    main()
