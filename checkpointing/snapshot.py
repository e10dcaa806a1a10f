"""A worker's side of its snapshots: writes every committed version of its shards to keeper memory, behind compute.

The order that makes any single loss exact:

1. the state of version k is copied while step k computes; the optimizer waits for what is not copied yet;
2. the reduced gradient of step k is summed straight into keeper memory and sealed before the step is agreed on;
3. so once anybody has passed the agreement of step k, the keepers can give version k + 1 of every shard: as itself, or
   as version k and the gradient that leads to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .keeper import KeeperLink
from .record import ShardState, record_bytes, write_record
from .segment import Segment


class Snapshots:
    """Writes this worker's shards into segments that its node's keeper guards.

    Without a keeper (`link` None: a script that runs alone) the memory is private and only the gradient slots are used.
    """

    def __init__(self, link: KeeperLink | None) -> None:
        self._link = link
        self._home: dict[int, tuple[int, Segment]] = {}  # shard -> segment
        self._bytes: dict[int, Tensor] = {}  # segment number -> its memory as uint8
        self._leaving: set[int] = set()
        self._numbers = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="everstep-snapshot") if link else None
        self._pending: Future[None] | None = None
        self.checksums: dict[int, int] = {}  # shard -> xxh3 of its newest record
        self.version: dict[int, int] = {}  # shard -> newest version written or being written
        self.waited_s = 0.0

    def has(self, shard: int) -> bool:
        """Whether there is room for a shard already."""
        return shard in self._home and shard not in self._leaving

    def protect(self, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Make room for (shard, state bytes, gradient bytes); shards that have room already are passed over."""
        new = [item for item in sizes if not self.has(item[0])]
        if not new:
            return
        segment = Segment.create(new)
        number = self._link.register(segment) if self._link else self._next()
        self._bytes[number] = torch.frombuffer(segment.memory, dtype=torch.uint8)
        for shard, _, _ in new:
            self._home[shard] = (number, segment)
            self._leaving.discard(shard)
            self.version.pop(shard, None)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def begin(self, version: int, states: Callable[[int], ShardState], shards: Iterable[int]) -> None:
        """Start copying `version` of the shards; their memory must not change before `wait` returns."""
        if self._link is None:
            return
        self._link.ensure()
        todo = [shard for shard in shards if self.version.get(shard) != version]
        for shard in todo:
            self.version[shard] = version
        assert self._pool is not None
        earlier = self._pending
        snapshots = {shard: states(shard) for shard in todo}
        self._pending = self._pool.submit(self._copy, version, snapshots, earlier)

    def _copy(self, version: int, states: Mapping[int, ShardState], earlier: Future[None] | None) -> None:
        if earlier is not None:
            earlier.result()
        for shard, state in states.items():
            self._write(shard, version, state)

    def _write(self, shard: int, version: int, state: ShardState) -> None:
        number, segment = self._home[shard]
        slot = version % 2
        entry = segment.entries[shard]
        start = segment.open_slot(shard, slot, record_bytes(state))
        room = self._bytes[number][start : start + entry.state_bytes]
        length = write_record(state, room)
        self.checksums[shard] = segment.seal_slot(shard, slot, version, length)

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return when everything begun is written; calls `on_wait` every 50 ms, adds the time to `waited_s`."""
        if self._pending is None:
            return
        started = time.monotonic()
        while not futures.wait([self._pending], timeout=0.05).done:
            on_wait()
        self._pending.result()
        self._pending = None
        self.waited_s += time.monotonic() - started

    def gradient(self, shard: int, step: int, elements: int, dtype: torch.dtype) -> Tensor:
        """Where to write the reduced gradient of `step`: a view of keeper memory, invalid until sealed."""
        number, segment = self._home[shard]
        length = elements * dtype.itemsize
        start = segment.open_slot(shard, 2 + step % 2, length)
        return self._bytes[number][start : start + length].view(dtype)

    def seal_gradient(self, shard: int, step: int, elements: int, dtype: torch.dtype) -> None:
        """Declare the gradient of `step` complete."""
        if self._link is not None:
            _, segment = self._home[shard]
            segment.seal_slot(shard, 2 + step % 2, step, elements * dtype.itemsize)

    def leave(self, shards: Iterable[int]) -> None:
        """These shards have another owner now; what is kept of them is let go by the next `forget`."""
        for shard in shards:
            if shard in self._home:
                self._leaving.add(shard)

    def forget(self) -> None:
        """Let go of segments none of whose shards is still protected here. Call when their new owners protect them."""
        for shard in self._leaving:
            self._home.pop(shard, None)
            self.checksums.pop(shard, None)
            self.version.pop(shard, None)
        self._leaving.clear()
        used = {number for number, _ in self._home.values()}
        for number in [n for n in self._bytes if n not in used]:
            del self._bytes[number]
            if self._link is not None:
                self._link.drop(number)

    def close(self) -> None:
        """Stop copying. The keeper goes on guarding what was written."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self._link is not None:
            self._link.close()
