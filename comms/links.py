"""The links of a mesh: each carries messages one way, and over shared memory credits the other way.

Neither end blocks: `OutLink.flush` writes what the kernel takes, `InLink` reads what has come and delivers whole messages.
Whatever goes wrong with a peer or with its bytes breaks its link, and nothing else.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from .communicator import Peer
from .frames import HEADER_BYTES, HELLO_BYTES, Flag, FrameKind, Header, Hello, ProtocolError, pack_credit
from .mailbox import Mailbox, allocate, joined
from .poller import READ, WRITE, Poller
from .ring import RING_MINIMUM_BYTES, RingReader, RingWriter

IOV_LIMIT = 512  # buffers per sendmsg; the kernel's own limit is 1024
TCP_PIECE_BYTES = 1 << 20  # also bounds what an abort has to copy of a frame that is half sent
_INBOX_BYTES = 32 * 1024
_READ_LIMIT_BYTES = 4 << 20  # read from one link before the others, and an abort, have their turn
_RING_LIMIT_BYTES = 1 << 32
_SCRATCH = bytearray(256 * 1024)  # where dropped bytes go

_log = logging.getLogger(__name__)


def cut(views: Sequence[memoryview], piece: int) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut the concatenation of `views` into pieces of `piece` bytes and a rest: (offset, views of the piece).

    Nothing is copied. An empty message is one empty piece.
    """
    offset, room, gathered = 0, piece, list[memoryview]()
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            gathered.append(part)
            at += len(part)
            room -= len(part)
            if room == 0:
                yield offset, gathered
                offset, room, gathered = offset + piece, piece, []
    if gathered or offset == 0:
        yield offset, gathered


class Link:
    """What both directions share: a socket in the poll set, open until it breaks or is closed."""

    def __init__(self, sock: socket.socket, poller: Poller) -> None:
        self.sock = sock
        self.broken = False
        self._poller = poller
        sock.setblocking(False)

    def fail(self, reason: object) -> None:
        """The peer is gone or talks nonsense: give everything back, and remember."""
        if not self.broken:
            _log.log(logging.WARNING if isinstance(reason, ProtocolError) else logging.INFO, "%s: %s", self, reason)
        self.close()

    def close(self) -> None:
        """Close the socket and the memory. Idempotent."""
        if not self.broken:
            self.broken = True
            self._poller.forget(self.sock.fileno())
            self.sock.close()
            self._release()

    def _release(self) -> None:
        raise NotImplementedError


class OutLink(Link):
    """This rank's messages to one incarnation of a peer. Opens itself; what is queued goes out in order.

    The queue holds views of the caller's buffers until `flush` has emptied it; a caller that gives up before calls
    `keep_rest`, so that a frame once begun is always finished and the stream stays in step.
    """

    def __init__(self, peer: Peer, hello: Hello, poller: Poller) -> None:
        self.peer = peer
        self.ring = RingWriter(hello.ring_bytes) if hello.ring_bytes else None
        self._queue: deque[memoryview] = deque([memoryview(hello.pack())])
        self._inbox = bytearray()
        self._connected = False
        self._watched = False  # by the poller, which must not see a socket before it begins to connect
        self._waits_to_write = False
        host, _, port = peer.address.rpartition(":")
        family = socket.AF_UNIX if self.ring else socket.AF_INET6 if ":" in host else socket.AF_INET
        self._target: str | tuple[str, int] = "\0" + peer.local_name if self.ring else (host, int(port))
        super().__init__(socket.socket(family, socket.SOCK_STREAM), poller)
        if not self.ring:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connect()

    def __str__(self) -> str:
        return f"link to rank {self.peer.rank} (incarnation {self.peer.incarnation})"

    def written(self) -> bool:
        """Nothing is queued any more, or the link is broken."""
        if not self._connected:
            self.flush()  # nothing tells that there is room again in a peer's backlog
        return self.broken or not self._queue

    def enqueue(self, frame: bytes, views: Sequence[memoryview] = ()) -> None:
        """Queue a frame: its header and the bytes behind it."""
        self._queue.append(memoryview(frame))
        self._queue.extend(views)

    def keep_rest(self) -> None:
        """Copy what is queued still, so that the caller's buffers are free."""
        if self._queue:
            self._queue = deque([joined(self._queue)])

    def flush(self) -> bool:
        """Write what the kernel takes; True once nothing is queued, or the link is broken."""
        while self._queue and not self.broken:
            if not self._connected and not self._connect():
                return False
            try:
                self._advance(self.sock.sendmsg(list(islice(self._queue, IOV_LIMIT))))
            except BlockingIOError:
                self._wait_to_write(True)
                return False
            except OSError as error:
                self.fail(error)
        if not self.broken:
            self._wait_to_write(False)
        return True

    def _advance(self, sent: int) -> None:
        while sent:
            head = self._queue[0]
            if len(head) > sent:
                self._queue[0] = head[sent:]
                return
            sent -= len(head)
            self._queue.popleft()

    def _connect(self) -> bool:
        code = self.sock.connect_ex(self._target)
        if code == errno.EAGAIN:
            return False  # the peer's backlog is full: the next flush tries again
        if code in (errno.EINPROGRESS, errno.EALREADY):
            self._wait_to_write(True)
            return False
        if code not in (0, errno.EISCONN):
            self.fail(OSError(code, os.strerror(code)))
            return False
        self._connected = True
        self._wait_to_write(False)
        if self.ring:
            # The first bytes on an empty socket: taken whole, together with the descriptor.
            socket.send_fds(self.sock, [self._queue.popleft()], [self.ring.fd])
            self.ring.forget_fd()
        return True

    def _wait_to_write(self, wait: bool) -> None:
        events = READ | WRITE if wait else READ
        if not self._watched:
            self._poller.watch(self.sock.fileno(), self._on_event, events)
        elif wait != self._waits_to_write:
            self._poller.change(self.sock.fileno(), events)
        self._watched = True
        self._waits_to_write = wait

    def _on_event(self, events: int) -> None:
        if events & ~WRITE and self._connected:
            self._read_credits()
        if not self.broken:
            self.flush()

    def _read_credits(self) -> None:
        try:
            data = self.sock.recv(_INBOX_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            return self.fail(error)
        if not data:
            return self.fail("closed by the peer")
        self._inbox += data
        whole = len(self._inbox) - len(self._inbox) % HEADER_BYTES
        try:
            for at in range(0, whole, HEADER_BYTES):
                header = Header.parse(self._inbox, at)
                if header.kind is not FrameKind.CREDIT or self.ring is None:
                    raise ProtocolError(f"expected a credit, got {header}")
                self.ring.credit(header.ring_position)
        except ProtocolError as error:
            return self.fail(error)
        del self._inbox[:whole]

    def _release(self) -> None:
        self._queue.clear()
        if self.ring:
            self.ring.close()


@dataclass
class _Partial:
    """A message of which some parts have come."""

    header: Header  # of its first part
    data: memoryview
    received: int = 0

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


class InLink(Link):
    """The messages of one incarnation of a peer to this rank: whole ones go to the mailbox, stale ones nowhere."""

    def __init__(self, sock: socket.socket, local: Local, poller: Poller) -> None:
        super().__init__(sock, poller)
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
            while budget > 0 and not self.broken:
                count, asked = self._read()
                if count == 0:
                    return self.fail("closed by the peer")
                budget -= count
                if count < asked:
                    return None  # the socket is empty
        except BlockingIOError:
            return None
        except (OSError, ProtocolError, MemoryError) as error:
            return self.fail(error)
        return None

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
        if self._unix:
            data, fds, _, _ = socket.recv_fds(self.sock, asked, 1)
            self._fds += fds
        else:
            data = self.sock.recv(asked)
        self._inbox[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
        if self._filled == HELLO_BYTES:
            self._filled = 0
            self._greet(Hello.parse(self._inbox))
        return len(data), asked

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
        if partial.received == len(partial.data):
            first = partial.header
            self._local.mailbox.put(first.generation, first.source, first.key, partial.data)
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

    def _release(self) -> None:
        if self._ring:
            self._ring.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._partial = None
