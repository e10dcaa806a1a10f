"""The port of --master-addr and --master-port: torchrun gives it to torch's store, here the coordinator shares it.

A script may connect to the store there by itself (`init_process_group("tcp://HOST:PORT", ...)`), and agents to the
coordinator. The first byte of a connection distinguishes them: HTTP/2 and TLS, which gRPC uses, each begin with a
fixed byte, and torch's store with neither. Bytes are forwarded unchanged; datagrams do not take this path.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from everstep.comms.base import addresses

GRPC = (b"P", b"\x16")  # of "PRI * HTTP/2.0" (RFC 9113) and of a TLS record with a handshake (RFC 8446)
PIECE_BYTES = 1 << 16
BACKLOG = 4096
STORE_S = 600.0  # how long a connection to the store waits until the store serves, as torch's clients do
END_S = 5.0


class MasterPort:
    """Listens from the beginning; passes connections on once it has started. Its thread ends with `close`."""

    def __init__(self, at: addresses.Address) -> None:
        """Raises OSError where it cannot listen."""
        self._listener = addresses.listen(at.host, at.port, BACKLOG)
        self.port = int(self._listener.getsockname()[1])
        self._coordinator = 0  # its port, on this host
        self._store = addresses.Address("", 0)
        self._opened = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="everstep-master-port", daemon=True)

    def start(self, coordinator_port: int) -> None:
        """Pass on, by a thread: only after this process has been forked."""
        self._coordinator = coordinator_port
        self._loop = asyncio.new_event_loop()
        self._thread.start()

    def serve_store(self, host: str, port: int) -> None:
        """Where torch's store is from now on: each attempt of an ordinary script has its own."""

        def moved() -> None:
            self._store = addresses.Address(host, port)
            self._opened.set()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(moved)

    def close(self) -> None:
        """Stop listening, and cut the connections. Idempotent."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_S)
        self._listener.close()

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(self._pass_on, sock=self._listener, limit=PIECE_BYTES))
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its end."""
        with contextlib.suppress(OSError, TimeoutError):
            first = await reader.read(PIECE_BYTES)
            if first:
                there = await self._connect(grpc=first[:1] in GRPC)
                there[1].write(first)
                await _joined((reader, writer), there)
        writer.close()

    async def _connect(self, *, grpc: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not grpc:
            await asyncio.wait_for(self._opened.wait(), STORE_S)
        host, port = ("127.0.0.1", self._coordinator) if grpc else self._store
        reader, writer = await asyncio.open_connection(host, port, limit=PIECE_BYTES)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return reader, writer


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _joined(here: Stream, there: Stream) -> None:
    """Both ways, until either end is closed."""
    ways = [asyncio.ensure_future(_copy(here[0], there[1])), asyncio.ensure_future(_copy(there[0], here[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        there[1].close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(PIECE_BYTES):
            writer.write(data)
            await writer.drain()
