"""The links of a mesh: each carries messages one way, and over shared memory credits the other way.

This is the sender's end; `incoming` is the receiver's. Neither blocks: `OutLink.flush` writes what the kernel takes.
A failure of a peer or of its bytes breaks its link, and nothing else. In addition, both ends report bytes that changed
in transit, because in that case no process died whose death would be detected.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from everstep.comms.base import addresses
from everstep.comms.base.security import Security

from .communicator import Peer
from .frames import (
    HEADER_BYTES,
    CorruptFrame,
    FrameKind,
    Header,
    Hello,
    ProtocolError,
)
from .mailbox import joined
from .outgoing import Outgoing
from .poller import READ, WRITE, Poller
from .ring import RingWriter
from .tls import TlsSocket

IOV_LIMIT = 512  # buffers per sendmsg; the kernel's own limit is 1024
SOCKET_BUFFER_BYTES = 4 << 20
_INBOX_BYTES = 32 * 1024

OnCorruption = Callable[[int, str], None]  # the rank at the other end, and what was found

_log = logging.getLogger(__name__)


def ask_for_buffers(sock: socket.socket) -> None:
    """Ask for large kernel buffers, unless the system allows less than its own tuning reaches."""
    for limit, option in (("rmem_max", socket.SO_RCVBUF), ("wmem_max", socket.SO_SNDBUF)):
        try:
            allowed = int(Path("/proc/sys/net/core", limit).read_text())
        except (OSError, ValueError):
            continue
        if allowed >= SOCKET_BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


class Link:
    """What both directions share: a socket in the poll set, open until it breaks or is closed."""

    def __init__(self, sock: socket.socket | TlsSocket, poller: Poller, on_corruption: OnCorruption) -> None:
        self.sock = sock
        self.broken = False
        self._on_corruption = on_corruption
        self._poller = poller
        sock.setblocking(False)

    def fail(self, reason: object) -> None:
        """The peer is gone or talks nonsense: give everything back, and remember."""
        if self.broken:
            return
        _log.log(logging.WARNING if isinstance(reason, ProtocolError) else logging.INFO, "%s: %s", self, reason)
        self.close()
        rank = self._peer_rank()
        if isinstance(reason, CorruptFrame) and rank is not None:
            self._on_corruption(rank, f"{self}: {reason}")

    def close(self) -> None:
        """Close the socket and the memory. Idempotent."""
        if not self.broken:
            self.broken = True
            self._poller.forget(self.sock.fileno())
            self.sock.close()
            self._release()

    def _peer_rank(self) -> int | None:
        """Who is at the other end, or None as long as it has not said so."""
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError


def _place(peer: Peer, *, local: bool) -> tuple[int, Any, OSError | None]:
    """A peer's family and socket address, and what went wrong when its host's name was looked up."""
    if local:
        return socket.AF_UNIX, "\0" + peer.local_name, None
    try:
        return *addresses.resolve(*addresses.parse(peer.address)), None
    except OSError as error:
        return socket.AF_INET, None, error


class OutLink(Link):
    """This rank's messages to one incarnation of a peer. Opens itself; what is queued goes out in order.

    The frames of a part hold views of the caller's buffers until they are written; a caller that gives up before calls
    `drop`, so that a frame once begun is always finished and the stream stays in step.
    """

    def __init__(
        self, peer: Peer, hello: Hello, poller: Poller, on_corruption: OnCorruption, security: Security
    ) -> None:
        self.peer = peer
        self.ring = RingWriter(hello.ring_bytes) if hello.ring_bytes else None
        self._queue: deque[memoryview] = deque([memoryview(hello.pack())])  # frames
        self._messages: deque[Outgoing] = deque()  # whose parts become frames when the queue is empty
        self._inbox = bytearray()
        self._connected = False
        self._watched = False  # by the poller, which must not see a socket before it begins to connect
        self._waits_to_write = False
        family, self._target, unknown = _place(peer, local=self.ring is not None)
        super().__init__(socket.socket(family, socket.SOCK_STREAM), poller, on_corruption)
        self._security = security
        if isinstance(self.sock, socket.socket) and not self.ring:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask_for_buffers(self.sock)
        if unknown is None:
            self._connect()
        else:
            self.fail(unknown)

    def __str__(self) -> str:
        return f"link to rank {self.peer.rank} (incarnation {self.peer.incarnation})"

    def gone(self) -> bool:
        """The link is broken, or its peer has closed it, though the poller has not reported it yet."""
        if self.broken or not self._connected:
            return self.broken
        look = select.poll()
        look.register(self.sock, select.POLLRDHUP)
        return bool(look.poll(0))

    def written(self) -> bool:
        """Nothing is queued any more, or the link is broken."""
        if not self._connected:
            self.flush()  # nothing tells that there is room again in a peer's backlog
        return self.broken or not (self._queue or self._messages)

    def put(self, message: Outgoing) -> None:
        """Queue a message, behind those that are queued already; on a broken link it is dropped."""
        if not self.broken:
            self._messages.append(message)

    def own_rest(self, message: Outgoing) -> None:
        """Copy what is queued of a message, so that the caller's buffers are free."""
        message.own_rest()
        if message.begun:
            self._keep_frames()

    def drop(self, message: Outgoing) -> None:
        """Do not send the rest of a message; a frame once begun is finished, from a copy."""
        if message in self._messages:
            self._messages.remove(message)
        if message.begun:
            self._keep_frames()

    def drop_all(self) -> None:
        """The same for every message that is queued: what is queued of them is a copy already."""
        self._messages.clear()

    def _keep_frames(self) -> None:
        if self._queue:
            self._queue = deque([joined(self._queue)])

    def flush(self) -> bool:
        """Write what the kernel and the ring take; True once nothing is queued, or the link is broken."""
        while self._write_frames() and not self.broken and self._messages:
            message = self._messages[0]
            frame = message.pop()
            if frame is None:
                return False  # the ring is full: its credits call again
            self._queue.append(memoryview(frame[0]))
            self._queue.extend(frame[1])
            if message.done:
                self._messages.popleft()
        return self.broken or not (self._queue or self._messages)

    def _write_frames(self) -> bool:
        """Write what the kernel takes of the frames; True once none is queued, or the link is broken."""
        while self._queue and not self.broken:
            if not self._connected and not self._connect():
                return False
            try:
                self._advance(self.sock.sendmsg(list(islice(self._queue, IOV_LIMIT))))
            except BlockingIOError:
                self._wait_to_write(not (isinstance(self.sock, TlsSocket) and self.sock.wants_read))
                return False
            except OSError as error:
                self._read_credits()  # perhaps it said why before it closed
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
        assert isinstance(self.sock, socket.socket)
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
        if self._security.encrypts and not self.ring:
            self.sock = TlsSocket(self.sock, self._security, server=False)
        self._wait_to_write(False)
        if self.ring:
            # The first bytes on an empty socket: taken whole, together with the descriptor.
            try:
                assert isinstance(self.sock, socket.socket)
                socket.send_fds(self.sock, [self._queue.popleft()], [self.ring.fd])
            except OSError as error:  # it died after its kernel had let us in
                self.fail(error)
                return False
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
            return
        except OSError as error:
            self.fail(error)
            return
        if not data:
            self.fail("closed by the peer")
            return
        self._inbox += data
        whole = len(self._inbox) - len(self._inbox) % HEADER_BYTES
        try:
            for at in range(0, whole, HEADER_BYTES):
                header = Header.parse(self._inbox, at)
                if header.kind is FrameKind.REFUSED:
                    raise CorruptFrame("the peer found that bytes had changed on their way")
                if header.kind is not FrameKind.CREDIT or self.ring is None:
                    raise ProtocolError(f"expected a credit, got {header}")
                self.ring.credit(header.ring_position)
            del self._inbox[:whole]
        except ProtocolError as error:
            self.fail(error)

    def _peer_rank(self) -> int:
        return self.peer.rank

    def _release(self) -> None:
        self._queue.clear()
        self._messages.clear()
        if self.ring:
            self.ring.close()
