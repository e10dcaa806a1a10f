"""Ways to change one bit between two ranks: on a real TCP connection, in a socket's hands, in a ring's memory."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import Any


def flip(data: bytearray | memoryview, bit: int) -> None:
    data[bit // 8] ^= 1 << bit % 8


class Flipper:
    """Changes the bit `bit` of what passes from now on."""

    def __init__(self) -> None:
        self._bit: int | None = None

    def arm(self, bit: int) -> None:
        self._bit = bit

    @property
    def armed(self) -> bool:
        return self._bit is not None

    def passes(self, data: bytearray | memoryview) -> None:
        if self._bit is None:
            return
        if self._bit < 8 * len(data):
            flip(data, self._bit)
            self._bit = None
        else:
            self._bit -= 8 * len(data)


class FlippingProxy:
    """A TCP port that passes everything on to `target`, and what `target` answers back, but for one bit."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.flipper = Flipper()  # of the newest connection
        self.next_flipper = Flipper()
        self.connections = 0
        self._target = (host, int(port))
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._closing, closer = socket.socketpair()
        self._closer = closer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closer.close()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._closing, selectors.EVENT_READ)
            while True:
                for ready, _ in selector.select():
                    if ready.fileobj is self._closing:
                        for other in list(selector.get_map().values()):
                            other.fileobj.close()
                        return
                    if ready.fileobj is self._listener:
                        self._accept(selector)
                    elif ready.fileobj.fileno() >= 0:
                        self._pass_on(selector, ready.fileobj, *ready.data)

    def _accept(self, selector: Any) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._target)
        self.connections += 1
        self.flipper, self.next_flipper = self.next_flipper, Flipper()
        selector.register(client, selectors.EVENT_READ, (server, self.flipper))
        selector.register(server, selectors.EVENT_READ, (client, Flipper()))

    def _pass_on(self, selector: Any, source: socket.socket, target: socket.socket, flipper: Flipper) -> None:
        try:
            data = bytearray(source.recv(1 << 16))
        except OSError:
            data = bytearray()
        if data:
            flipper.passes(data)
            with contextlib.suppress(OSError):  # it closed: what it said last is still to be read
                target.sendall(data)
            return
        for end in (source, target):
            selector.unregister(end)
            end.close()


class FlippingSocket:
    """A socket that hands over what it receives with one bit changed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.flipper = Flipper()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, count: int) -> bytes:
        data = bytearray(self._sock.recv(count))
        self.flipper.passes(data)
        return bytes(data)

    def recv_into(self, target: memoryview) -> int:
        count = self._sock.recv_into(target)
        self.flipper.passes(target[:count])
        return count
