"""The receiver's end of a link of the mesh: reads what has come, and delivers whole messages."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    CorruptFrame,
    Flag,
    FrameKind,
    Header,
    Hello,
    ProtocolError,
    checksum_of,
    pack_credit,
    pack_refusal,
)
from .links import Link, OnCorruption
from .mailbox import Mailbox, allocate
from .poller import Poller
from .ring import RING_MINIMUM_BYTES, RingReader
from .tls import TlsSocket

_INBOX_BYTES = 32 * 1024
_READ_LIMIT_BYTES = 4 << 20  # read from one link before the others, and an abort, have their turn
_RING_LIMIT_BYTES = 1 << 32
_SCRATCH = bytearray(256 * 1024)  # where dropped bytes go


@dataclass
class _Partial:
    """A message of which some parts have come."""

    header: Header  # of its first part
    data: memoryview
    received: int = 0
    began_ns: int = field(default_factory=time.monotonic_ns)

    def accepts(self, header: Header) -> bool:
        first = self.header
        same = (header.generation, header.key, header.total_bytes) == (first.generation, first.key, first.total_bytes)
        return same and header.offset == self.received


@dataclass(frozen=True)
class Local:
    """Who this rank is, for the links that reach it."""

    rank: int
    incarnation: int
    digest: bytes
    mailbox: Mailbox
    generation: Callable[[], int]
    on_corruption: OnCorruption


class InLink(Link):
    """The messages of one incarnation of a peer to this rank: whole ones go to the mailbox, stale ones nowhere.

    A part counts as received once its checksum was found right; a message is delivered with its last part.
    """

    def __init__(self, sock: socket.socket | TlsSocket, local: Local, poller: Poller) -> None:
        super().__init__(sock, poller, local.on_corruption)
        self.hello: Hello | None = None
        self.newest_generation = 0  # that the peer is known to have reached
        self._local = local
        self._unix = sock.family == socket.AF_UNIX
        self._ring: RingReader | None = None
        self._fds: list[int] = []
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._filled = 0
        self._partial: _Partial | None = None
        self._part: Header | None = None  # the part whose bytes the socket brings now
        self._part_left = 0
        poller.watch(sock.fileno(), self._on_event)

    def __str__(self) -> str:
        if self.hello is None:
            return "link from an unknown peer"
        return f"link from rank {self.hello.source} (incarnation {self.hello.source_incarnation})"

    def purge(self, generation: int) -> None:
        """Forget a half-arrived message of a generation before `generation`; its remaining bytes will be dropped."""
        if self._partial is not None and self._partial.header.generation < generation:
            self._partial = None

    def _on_event(self, events: int) -> None:
        budget = _READ_LIMIT_BYTES
        try:
            while budget > 0 or (isinstance(self.sock, TlsSocket) and self.sock.pending()):
                count, asked = self._read()
                if count == 0:
                    self.fail("closed by the peer")
                if count < asked:
                    return  # the socket is empty
                budget -= count
        except BlockingIOError:
            return
        except (OSError, ProtocolError, MemoryError) as error:
            if isinstance(error, CorruptFrame):
                with contextlib.suppress(OSError):
                    self.sock.send(pack_refusal())
            self.fail(error)

    def _read(self) -> tuple[int, int]:
        """Read once: (bytes read, bytes asked for)."""
        if self.hello is None:
            return self._read_hello()
        if self._part_left:
            target = self._target(self._part_left)
            count = self.sock.recv_into(target)
            self._arrived(count)
            return count, len(target)
        space = self._inbox[self._filled :]
        count = self.sock.recv_into(space)
        self._filled += count
        self._parse_inbox()
        return count, len(space)

    def _read_hello(self) -> tuple[int, int]:
        asked = HELLO_BYTES - self._filled
        if self._unix and isinstance(self.sock, socket.socket):
            data, fds, _, _ = socket.recv_fds(self.sock, asked, 1)
            self._fds += fds
        else:
            data = self.sock.recv(asked)
        self._inbox[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
        if self._filled == HELLO_BYTES:
            self._filled = 0
            self._greet(self._parse_hello())
        return len(data), asked

    def _parse_hello(self) -> Hello:
        try:
            return Hello.parse(self._inbox)
        except ProtocolError as error:  # a stranger's bytes look like a hello that changed on its way
            raise CorruptFrame(str(error)) from error

    def _greet(self, hello: Hello) -> None:
        local = self._local
        if not hmac.compare_digest(hello.digest, local.digest):
            raise ProtocolError("the peer belongs to another job: its token differs")
        if (hello.target, hello.target_incarnation) != (local.rank, local.incarnation):
            raise ProtocolError(
                f"the peer looks for rank {hello.target} (incarnation {hello.target_incarnation}), "
                f"this is rank {local.rank} (incarnation {local.incarnation})"
            )
        if bool(hello.ring_bytes) != bool(self._fds):
            raise ProtocolError(f"{len(self._fds)} descriptors came with a ring of {hello.ring_bytes} bytes")
        if hello.ring_bytes:
            if not RING_MINIMUM_BYTES <= hello.ring_bytes <= _RING_LIMIT_BYTES:
                raise ProtocolError(f"a ring of {hello.ring_bytes} bytes")
            self._ring = RingReader(self._fds.pop(), hello.ring_bytes)
        self.hello = hello
        self.newest_generation = hello.generation

    def _parse_inbox(self) -> None:
        at = 0
        while self._filled - at >= HEADER_BYTES:
            header = Header.parse(self._inbox, at)
            at += HEADER_BYTES
            self._begin_part(header)
            while self._part_left and at < self._filled:
                target = self._target(min(self._part_left, self._filled - at))
                target[:] = self._inbox[at : at + len(target)]
                at += len(target)
                self._arrived(len(target))
        rest = bytes(self._inbox[at : self._filled])
        self._inbox[: len(rest)] = rest
        self._filled = len(rest)
        self._return_credit()

    def _begin_part(self, header: Header) -> None:
        if header.kind is not FrameKind.PART or self.hello is None or header.source != self.hello.source:
            raise ProtocolError(f"expected a part of a message of this link's peer, got {header}")
        self.newest_generation = max(self.newest_generation, header.generation)
        if header.generation >= self._local.generation():
            if header.offset == 0:
                self._partial = _Partial(header, allocate(header.total_bytes))
            elif self._partial is None or not self._partial.accepts(header):
                raise ProtocolError(f"part out of order: {header}")
        self._part = header
        self._part_left = header.length
        if header.flags & Flag.IN_RING:
            if self._ring is None:
                raise ProtocolError("a part in a ring, on a link without one")
            target = self._target(header.length) if self._current() else None
            self._ring.read_into(header.ring_position, header.length, target)
            self._arrived(header.length)
        elif header.length == 0:
            self._arrived(0)

    def _current(self) -> _Partial | None:
        """The message that the present part belongs to, or None if its generation is over."""
        if self._part is None or self._part.generation < self._local.generation():
            return None
        return self._partial

    def _target(self, length: int) -> memoryview:
        """Where the next bytes of the present part go: at most `length` of them."""
        partial = self._current()
        if partial is None:
            return memoryview(_SCRATCH)[:length]
        return partial.data[partial.received : partial.received + length]

    def _arrived(self, count: int) -> None:
        self._part_left -= count
        partial = self._current()
        if partial is None:
            return
        partial.received += count
        if self._part_left:
            return
        part = self._part
        assert part is not None
        if checksum_of([partial.data[part.offset : partial.received]]) != part.checksum:
            raise CorruptFrame(f"the checksum of {part} does not match")
        if partial.received == len(partial.data):
            first = partial.header
            self._local.mailbox.put(first.generation, first.source, first.key, partial.data, partial.began_ns)
            self._partial = None

    def _return_credit(self) -> None:
        position = self._ring.credit_due() if self._ring else None
        # The few credits that a ring's length allows to be under way always fit into the socket's buffer.
        if position is None:
            return
        try:
            sent = self.sock.send(pack_credit(position))
        except BlockingIOError:
            sent = 0
        if sent != HEADER_BYTES:
            raise ProtocolError("the peer does not read its credits")

    def _peer_rank(self) -> int | None:
        return None if self.hello is None else self.hello.source

    def _release(self) -> None:
        if self._ring:
            self._ring.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._partial = None
