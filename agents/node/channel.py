"""The agent's end of a worker's control channel: JSON lines both ways, of any size up to a limit, and never a wait."""

from __future__ import annotations

import contextlib
import socket

from everstep.elastic.contract.membership import MESSAGE_BYTES

OUTBOX_BYTES = 2 * MESSAGE_BYTES  # kept for a worker that does not read; more than one message of the largest size
_READ_BYTES = 1 << 20


class WorkerChannel:
    """Not thread-safe. `theirs` goes to the worker, and is closed here once it has it."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._partial: list[bytes] = []  # the start of an incomplete line
        self._partial_bytes = 0
        self._unsent: list[memoryview] = []  # bytes that the socket has not accepted yet, in order
        self._unsent_bytes = 0
        self.closed = False  # nothing more will come: the worker has closed its end
        self.broken = ""  # why this channel is of no more use, though the worker may live

    def fileno(self) -> int:
        return self._ours.fileno()

    @property
    def waits_to_send(self) -> bool:
        """Whether something is left to be sent, with `flush`, when the socket takes it."""
        return bool(self._unsent)

    def send(self, line: bytes) -> None:
        """Send a message without blocking; the rest is buffered. A dead worker does not receive it."""
        if self.broken or self.closed:
            return
        if self._unsent_bytes + len(line) > OUTBOX_BYTES:
            self._unsent.clear()
            self._unsent_bytes = 0
            self.broken = f"it does not read its orders: more than {OUTBOX_BYTES >> 20} MiB of them are waiting"
            return
        self._unsent += [memoryview(line), memoryview(b"\n")]
        self._unsent_bytes += len(line) + 1
        self.flush()

    def flush(self) -> None:
        """Send buffered bytes, as far as the socket accepts them."""
        while self._unsent:
            try:
                sent = self._ours.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:  # it has died, or closed its end
                self._unsent.clear()
                self._unsent_bytes = 0
                return
            self._unsent_bytes -= sent
            self._unsent[0] = self._unsent[0][sent:]
            if not self._unsent[0]:
                del self._unsent[0]

    def receive(self) -> list[bytes]:
        """The complete messages received so far; sets `closed` at the end of the stream."""
        lines: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while not self.broken:
                try:
                    data = self._ours.recv(_READ_BYTES)
                except ConnectionResetError:
                    data = b""
                if not data:
                    self.closed = True
                    break
                self._take(data, lines)
        return lines

    def _take(self, data: bytes, lines: list[bytes]) -> None:
        """Search only new bytes for the end of a line: a message of many megabytes arrives in many reads."""
        first, *rest = data.split(b"\n")
        self._keep(first)
        for piece in rest:
            lines.append(b"".join(self._partial))
            self._partial, self._partial_bytes = [], 0
            self._keep(piece)

    def _keep(self, piece: bytes) -> None:
        self._partial_bytes += len(piece)
        if self._partial_bytes > MESSAGE_BYTES:
            self.broken = f"it sent a message of more than {MESSAGE_BYTES >> 20} MiB"
            self._partial = []
        elif piece:
            self._partial.append(piece)

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()
