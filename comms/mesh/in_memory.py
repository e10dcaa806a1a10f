"""Communicators for the threads of one process: the fake that tests and simulations use, with no socket in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from .communicator import (
    Communicator,
    EditReport,
    Key,
    Peer,
)
from .mailbox import SharedMailbox, joined
from .tensors import host_bytes, over


class MemoryNetwork:
    """Where the mailboxes of all incarnations are found. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mailboxes: dict[tuple[int, int], SharedMailbox] = {}

    def join(self, rank: int, incarnation: int) -> SharedMailbox:
        """A mailbox for a new incarnation of a rank."""
        with self._lock:
            if (rank, incarnation) in self._mailboxes:
                raise ValueError(f"rank {rank} (incarnation {incarnation}) is on the network already")
            mailbox = self._mailboxes[rank, incarnation] = SharedMailbox()
            return mailbox

    def find(self, rank: int, incarnation: int) -> SharedMailbox | None:
        """The mailbox of an incarnation, or None if it is dead."""
        with self._lock:
            return self._mailboxes.get((rank, incarnation))

    def leave(self, rank: int, incarnation: int) -> None:
        """The incarnation is dead: what is sent to it is dropped."""
        with self._lock:
            self._mailboxes.pop((rank, incarnation), None)


class MemoryCommunicator(Communicator):
    """Keyed messages between threads. A send never waits, since the receiver's mailbox has no limit."""

    def __init__(
        self, rank: int, incarnation: int, *, network: MemoryNetwork, on_wait: Callable[[], None] | None = None
    ) -> None:
        super().__init__(rank, on_wait)
        self._network = network
        self._mailbox = network.join(rank, incarnation)
        self._peer = Peer(rank, incarnation, "memory", "", "")
        self._peers: dict[int, Peer] = {}
        self._links: set[tuple[int, int]] = set()  # incarnations that this one has sent to
        self._closed = False

    @property
    def peer(self) -> Peer:
        """Where this rank can be reached, for the others' `edit`."""
        return self._peer

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this generation, ascending."""
        return tuple(self._peers)

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """See `Communicator.send`."""
        self._check((to,))
        data = joined([host_bytes(tensor) for tensor in payload])
        peer = self._peers[to]
        self._links.add((to, peer.incarnation))
        mailbox = self._network.find(to, peer.incarnation)
        if mailbox is not None:
            mailbox.put(self.generation, self.rank, key, data)

    def receive_any(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key, Tensor]:
        """See `Communicator.receive_any`."""
        self._check({source for source, _ in wanted})
        if not wanted:
            raise ValueError("no message is wanted: this would wait for ever")
        source, key, data = self._mailbox.wait_take(wanted, self.on_wait)
        return source, key, over(data)

    def ready(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """See `Communicator.ready`."""
        self._check()
        return self._mailbox.find(wanted)

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._mailbox.abort()

    def edit(self, generation: int, peers: Mapping[int, Peer]) -> EditReport:
        """See `Communicator.edit`. A link is an incarnation that this one has sent to."""
        if self._closed:
            raise RuntimeError("the communicator is closed")
        if generation <= self.generation:
            raise ValueError(f"generation {generation} does not follow generation {self.generation}")
        own = peers.get(self.rank)
        if own is None or own.incarnation != self._peer.incarnation:
            raise ValueError(f"rank {self.rank} (incarnation {self._peer.incarnation}) is no member: {own}")
        kept = self._links & {(peer.rank, peer.incarnation) for peer in peers.values()}
        closed = len(self._links) - len(kept)
        self._links = kept
        self._peers = dict(sorted(peers.items()))
        self.generation = generation
        self._mailbox.begin(generation)
        return EditReport(generation, closed, 0, len(kept))

    def close(self) -> None:
        """See `Communicator.close`."""
        self._closed = True
        self._network.leave(self.rank, self._peer.incarnation)

    def _check(self, ranks: Collection[int] = ()) -> None:
        if self._closed:
            raise RuntimeError("the communicator is closed")
        self._mailbox.check()
        for rank in ranks:
            if rank not in self._peers:
                raise ValueError(f"rank {rank} is no member of generation {self.generation}: {self.members}")
