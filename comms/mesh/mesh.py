"""The communicator of a job: sockets between hosts, shared memory within one, and no thread of its own.

Every call moves whatever can move on any link.  A link is one way and opens at its first message, so two ranks never
race to connect to each other; a rank that sends large messages takes its own in meanwhile, so two of them never wait
for each other.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from everstep.comms.base import addresses
from everstep.comms.base.security import Security, own

from .communicator import (
    Aborted,
    Communicator,
    EditReport,
    Key,
    Peer,
)
from .frames import MESSAGE_LIMIT_BYTES, Hello, token_digest
from .incoming import InLink, Local
from .links import OutLink, ask_for_buffers
from .mailbox import (
    WAIT_SLICE_S,
    Mailbox,
    joined,
)
from .outgoing import Outgoing
from .poller import Poller
from .ring import RING_MINIMUM_BYTES
from .tensors import host_bytes, over
from .tls import TlsSocket

UNGREETED_LIMIT = 1024  # connections that have not said hello; the oldest go first
_BACKLOG = 4096


class MeshCommunicator(Communicator):
    """Keyed messages over a full mesh of one-way links.

    `host` is the address to listen on, and for others to connect to; ranks of equal `host_id` must share a network
    namespace, and reach each other through shared memory unless `shared_memory` is off on either. Ranks with another
    `token` are refused. `security` is what this process was started with, unless given: with certificates, TCP links
    are TLS. Every byte is checked on arrival (see `frames`). `ring_bytes` is the shared memory of one link.
    `on_corruption` is called once for a link whose bytes changed on their way, with the generation, the rank at its
    other end and what was found. Both ends call, from within a call of theirs. The link is closed and what was hit is
    not delivered, so the generation must be given up: after the next `edit` a new link takes its place.
    The messages that a rank has not asked for yet are held in its memory, without a limit of their own: the order of a
    training step bounds them.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        *,
        host: str = "127.0.0.1",
        host_id: str,
        token: str,
        shared_memory: bool = True,
        ring_bytes: int = 4 << 20,
        on_wait: Callable[[], None] | None = None,
        on_corruption: Callable[[int, int, str], None] | None = None,
        security: Security | None = None,
    ) -> None:
        super().__init__(rank, on_wait)
        self._on_corruption = on_corruption
        self._security = security or own()
        self._security.check_bind(host)
        if ring_bytes < RING_MINIMUM_BYTES:
            raise ValueError(f"ring_bytes is {ring_bytes}, and must be {RING_MINIMUM_BYTES} at least")
        self._ring_bytes = ring_bytes
        self._peers: dict[int, Peer] = {}
        self._aborted = False
        self._damaging = False
        self._closed = False
        self.began_ns = 0  # when the first bytes of the message last received had come (CLOCK_MONOTONIC)
        self._mailbox = Mailbox()
        self._local = Local(
            rank, incarnation, token_digest(token), self._mailbox, lambda: self.generation, self._report_corruption
        )
        self._out: dict[int, OutLink] = {}
        self._in: list[InLink] = []
        self._posted: set[OutLink] = set()  # with messages for which no call waits
        self._poller = Poller()
        self._listeners: list[socket.socket] = []
        port = self._listen(*addresses.resolve(host, 0)).getsockname()[1]
        name = f"everstep-{secrets.token_hex(12)}" if shared_memory else ""
        if name:
            self._listen(socket.AF_UNIX, "\0" + name)
        self._peer = Peer(rank, incarnation, host_id, name, addresses.join(host, port))

    @property
    def peer(self) -> Peer:
        """Where this rank can be reached, for the others' `edit`."""
        return self._peer

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this generation, ascending."""
        return tuple(self._peers)

    @property
    def broken(self) -> tuple[int, ...]:
        """Members to which, or from which, a link broke in this generation: dead, or cut off."""
        ranks = {rank for rank, link in self._out.items() if link.broken}
        ranks |= {link.hello.source for link in self._in if link.broken and link.hello is not None}
        return tuple(sorted(ranks & self._peers.keys()))

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """See `Communicator.send`."""
        queued = self._queue(to, key, payload)
        if queued is None:
            return
        link, message = queued
        try:
            if not link.flush():
                self._wait(link.written)
        except BaseException:
            link.drop(message)
            raise

    def post(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """See `Communicator.post`."""
        queued = self._queue(to, key, payload)
        if queued is None:
            return
        link, message = queued
        if not link.flush():
            link.own_rest(message)
            self._posted.add(link)

    def _queue(self, to: int, key: Key, payload: Sequence[Tensor]) -> tuple[OutLink, Outgoing] | None:
        """Put a message into the queue of its link; None for one to this rank, which is delivered."""
        self._check()
        self._check_members((to,))
        views = [host_bytes(tensor) for tensor in payload]
        total = sum(map(len, views))
        if total > MESSAGE_LIMIT_BYTES:
            raise ValueError(f"a message of {total} bytes to rank {to}: the limit is {MESSAGE_LIMIT_BYTES}")
        if to == self.rank:
            self._mailbox.put(self.generation, to, key, joined(views))
            return None
        link = self._link(to)
        message = Outgoing(self.generation, self.rank, key, views, link.ring, self._take_damage)
        link.put(message)
        return link, message

    def _take_damage(self) -> int:
        """An injected fault: to the receiver, as if a bit had flipped on the way."""
        damage, self._damaging = int(self._damaging), False
        return damage

    def receive_any(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key, Tensor]:
        """See `Communicator.receive_any`."""
        self._check()
        if not wanted:
            raise ValueError("no message is wanted: this would wait for ever")
        self._check_members({source for source, _ in wanted})
        name: tuple[int, Key] | None = None
        looked_at = -1

        def arrived() -> bool:
            nonlocal name, looked_at
            if looked_at != self._mailbox.arrivals:
                looked_at = self._mailbox.arrivals
                name = self._mailbox.find(self.generation, wanted)
            return name is not None

        self._wait(arrived)
        assert name is not None
        self.began_ns = self._mailbox.began_ns.pop(name, 0)
        return (*name, over(self._mailbox.take(self.generation, name)))

    def ready(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """See `Communicator.ready`."""
        self._check()
        self._push_posted()
        self._poller.poll(0)
        self._check()
        return self._mailbox.find(self.generation, wanted)

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._aborted = True
        self._poller.wake()

    def edit(self, generation: int, peers: Mapping[int, Peer]) -> EditReport:
        """See `Communicator.edit`. Nothing is opened here: links open at their first message.

        A link that broke, at either end, is closed too, and a new one takes its place when it is needed.
        An incarnation that was left out of a generation must not come back in a later one.
        """
        if self._closed:
            raise RuntimeError("the communicator is closed")
        if generation <= self.generation:
            raise ValueError(f"generation {generation} does not follow generation {self.generation}")
        own = peers.get(self.rank)
        if own is None or own.incarnation != self._peer.incarnation:
            raise ValueError(f"rank {self.rank} (incarnation {self._peer.incarnation}) is no member: {own}")
        self._aborted = False  # first: an abort from here on is meant for the new generation
        self._poller.calm()
        if self._aborted:
            self._poller.wake()
        closed = 0
        for rank, out in list(self._out.items()):
            if out.gone() or rank not in peers or peers[rank].incarnation != out.peer.incarnation:
                out.close()
                del self._out[rank]
                closed += 1
            else:
                out.drop_all()
        incarnations = {(peer.rank, peer.incarnation) for peer in peers.values()}
        for link in list(self._in):
            if link.broken or _left(link, generation, incarnations):
                link.close()
                self._in.remove(link)
                closed += link.hello is not None
            else:
                link.purge(generation)
        self.generation = generation
        self._peers = dict(sorted(peers.items()))
        self._mailbox.purge(generation)
        kept = len(self._out) + sum(link.hello is not None for link in self._in)
        return EditReport(generation, closed, 0, kept)

    def close(self) -> None:
        """See `Communicator.close`."""
        self._closed = True
        for link in [*self._out.values(), *self._in]:
            link.close()
        for listener in self._listeners:
            listener.close()
        self._poller.close()
        self._mailbox = Mailbox()

    def damage(self) -> None:
        """Inject a fault: the next part that is sent arrives damaged."""
        self._damaging = True

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the communicator is closed")
        if self._aborted:
            raise Aborted(self.generation)

    def _check_members(self, ranks: Collection[int]) -> None:
        for rank in ranks:
            if rank not in self._peers:
                raise ValueError(f"rank {rank} is no member of generation {self.generation}: {self.members}")

    def _wait(self, done: Callable[[], bool]) -> None:
        """Make progress until `done`, attending to `on_wait`, or raise Aborted."""
        due = time.monotonic() + WAIT_SLICE_S
        while not done():
            now = time.monotonic()
            if now >= due:
                self.on_wait()
                due = now + WAIT_SLICE_S
            self._push_posted()
            self._poller.poll(max(0.0, due - now))
            self._check()

    def _push_posted(self) -> None:
        """Open links that only posted messages wait for. The poller does the rest."""
        if self._posted:
            self._posted = {link for link in self._posted if not link.written()}

    def _link(self, to: int) -> OutLink:
        link = self._out.get(to)
        if link is None:
            link = self._out[to] = self._open(self._peers[to])
        return link

    def is_remote(self, rank: int) -> bool:
        """See `Communicator.is_remote`."""
        return rank != self.rank and not self._shares_memory(self._peers[rank])

    def _shares_memory(self, peer: Peer) -> bool:
        return peer.host_id == self._peer.host_id and bool(peer.local_name and self._peer.local_name)

    def _open(self, peer: Peer) -> OutLink:
        hello = Hello(
            self._local.digest,
            self.rank,
            self._local.incarnation,
            peer.rank,
            peer.incarnation,
            self.generation,
            self._ring_bytes if self._shares_memory(peer) else 0,
        )
        return OutLink(peer, hello, self._poller, self._report_corruption, self._security)

    def _report_corruption(self, source_rank: int, what: str) -> None:
        if self._on_corruption is not None:
            self._on_corruption(self.generation, source_rank, what)

    def _listen(self, family: int, address: Any) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        self._listeners.append(listener)
        if family != socket.AF_UNIX:
            ask_for_buffers(listener)  # what it accepts inherits them
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._poller.watch(listener.fileno(), lambda _: self._accept(listener))
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the backlog is empty, or the connection in it was closed
            encrypted = self._security.encrypts and sock.family != socket.AF_UNIX
            end = TlsSocket(sock, self._security, server=True) if encrypted else sock
            self._in.append(InLink(end, self._local, self._poller))
            strangers = [link for link in self._in if link.hello is None]
            if len(strangers) > UNGREETED_LIMIT:
                strangers[0].close()
            self._in = [link for link in self._in if link.hello is not None or not link.broken]


def _left(link: InLink, generation: int, members: Collection[tuple[int, int]]) -> bool:
    """Whether the peer of `link` is out; one that is ahead of `generation` will be a member of a later one."""
    if link.hello is None:
        return False
    member = (link.hello.source, link.hello.source_incarnation) in members
    return not member and link.newest_generation <= generation
