"""The communicator on gloo's point-to-point: the yardstick that the mesh is measured against.

gloo cannot be aborted and cannot lose a member: every edit drops the process group and builds another one.  A thread
per peer receives, so that a caller who waits for a message waits for a mailbox, which an abort can wake.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from .communicator import (
    Communicator,
    EditReport,
    Key,
    Peer,
)
from .frames import (
    HEADER_BYTES,
    FrameKind,
    Header,
    ProtocolError,
)
from .mailbox import SharedMailbox, joined
from .tensors import host_bytes, over

_HEADER_TAG = 1
_PAYLOAD_TAG = 2
_KILL_TAG = 3  # no member ever sends with it
_KILL_TIMEOUT = datetime.timedelta(milliseconds=1)


class _Group:
    """One process group and its receiver threads."""

    def __init__(
        self, generation: int, ranks: Sequence[int], own: int, store: Store, timeout: datetime.timedelta
    ) -> None:
        self.generation = generation
        self.ranks = list(ranks)
        self._own = own
        # Ranks of a process group are dense, those of a communicator are not.
        index = self.ranks.index(own)
        self._pg: Any = ProcessGroupGloo(PrefixStore(f"everstep/{generation}", store), index, len(self.ranks), timeout)
        self._threads: list[threading.Thread] = []

    def listen(self, mailbox: SharedMailbox) -> None:
        """Start to receive."""
        for rank in self.ranks:
            if rank != self._own:
                thread = threading.Thread(
                    target=self._receive, args=(rank, mailbox), name=f"gloo-from-{rank}", daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def send(self, to: int, header: Header, payload: memoryview) -> None:
        """Send a header and its payload; raises RuntimeError where the pair is closed."""
        index = self.ranks.index(to)
        works = [self._pg.send([torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)], index, _HEADER_TAG)]
        if len(payload):
            works.append(self._pg.send([torch.frombuffer(payload, dtype=torch.uint8)], index, _PAYLOAD_TAG))
        for work in works:
            work.wait()

    def kill(self) -> None:
        """Close every connection. A receive that times out closes all pairs: the only way that gloo offers.

        One on a pair that is closed already fails at once and closes no other, so each is tried.
        """
        for index, rank in enumerate(self.ranks):
            if rank != self._own:
                with contextlib.suppress(RuntimeError):  # the time-out, which is what is wanted, or closed already
                    self._pg.recv([torch.empty(1, dtype=torch.uint8)], index, _KILL_TAG).wait(_KILL_TIMEOUT)

    def join(self) -> None:
        """Wait for the receiver threads, after `kill`."""
        for thread in self._threads:
            thread.join()

    def _receive(self, source: int, mailbox: SharedMailbox) -> None:
        index = self.ranks.index(source)
        head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        # RuntimeError: the pair was closed, here or by the peer's death. A caller that waits for it gets an abort.
        with contextlib.suppress(RuntimeError, ProtocolError):
            while True:
                self._pg.recv([head], index, _HEADER_TAG).wait()
                header = Header.parse(head.numpy().data)
                data = torch.empty(header.total_bytes, dtype=torch.uint8)
                if header.total_bytes:
                    self._pg.recv([data], index, _PAYLOAD_TAG).wait()
                mailbox.put(header.generation, source, header.key, data.numpy().data)


class GlooCommunicator(Communicator):
    """Keyed messages over a process group that every edit rebuilds.

    `edit` is collective: it returns once all members have called it, and fails after `timeout_s`. `store` is any
    `torch.distributed` store that all members reach; `timeout_s` also bounds how long a receiver may hear nothing.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        *,
        store: Store,
        timeout_s: float = 24 * 3600.0,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(rank, on_wait)
        self._peer = Peer(rank, incarnation, "", "", "")
        self._store = store
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._mailbox = SharedMailbox()
        self._group: _Group | None = None
        self._lock = threading.RLock()  # guards `_group` against an abort from another thread
        self._closed = False

    @property
    def peer(self) -> Peer:
        """Who this rank is, for the others' `edit`; where it is, the store tells them."""
        return self._peer

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this generation, ascending."""
        return tuple(self._group.ranks) if self._group else ()

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """See `Communicator.send`. Returns when gloo has written the message out."""
        self._check((to,))
        views = [host_bytes(tensor) for tensor in payload]
        data = joined(views)  # gloo wants one writable tensor
        if to == self.rank:
            self._mailbox.put(self.generation, to, key, data)
            return
        assert self._group is not None
        size = len(data)
        header = Header(FrameKind.PART, 0, self.generation, self.rank, key, size, 0, size)
        try:
            self._group.send(to, header, data)
        except RuntimeError:
            self._mailbox.check()  # an abort closed the connection; otherwise the peer is dead: dropped

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
        """See `Communicator.abort`. The peers, too, can no longer use the group."""
        self._mailbox.abort()
        with self._lock:
            if self._group:
                self._group.kill()

    def edit(self, generation: int, peers: Mapping[int, Peer]) -> EditReport:
        """See `Communicator.edit`. Collective: every link is closed, and all are opened again."""
        if self._closed:
            raise RuntimeError("the communicator is closed")
        if generation <= self.generation:
            raise ValueError(f"generation {generation} does not follow generation {self.generation}")
        own = peers.get(self.rank)
        if own is None or own.incarnation != self._peer.incarnation:
            raise ValueError(f"rank {self.rank} (incarnation {self._peer.incarnation}) is no member: {own}")
        closed = self._drop()
        self.generation = generation
        self._mailbox.begin(generation)
        group = _Group(generation, sorted(peers), self.rank, self._store, self._timeout)
        group.listen(self._mailbox)
        with self._lock:
            self._group = group
        return EditReport(generation, closed, len(peers) - 1, 0)

    def close(self) -> None:
        """See `Communicator.close`."""
        self._closed = True
        self._drop()

    def _drop(self) -> int:
        with self._lock:
            group, self._group = self._group, None
        if group is None:
            return 0
        group.kill()
        group.join()
        return len(group.ranks) - 1

    def _check(self, ranks: Collection[int] = ()) -> None:
        if self._closed:
            raise RuntimeError("the communicator is closed")
        self._mailbox.check()
        for rank in ranks:
            if rank not in self.members:
                raise ValueError(f"rank {rank} is no member of generation {self.generation}: {self.members}")
