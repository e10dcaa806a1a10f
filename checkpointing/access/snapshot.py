"""A worker's side of its snapshots: writes every committed version of its shards to keeper memory, behind compute.

The order that makes any single loss exact:

1. the state of version k is copied while step k computes; the optimizer waits for what is not copied yet. The
   parameter values, which the user's code can change as soon as it runs, are copied before that;
2. the reduced gradient of step k is summed straight into keeper memory and sealed before the step is agreed on;
3. so once any rank has passed the agreement of step k, the keepers can give version k + 1 of every shard: as itself, or
   as version k and the gradient that leads to it.

Where nodes may be lost, a third slot holds the newest version that is known to outlive them (`protected`) until a newer
one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from everstep.checkpointing.memory.checksum import seed_of
from everstep.checkpointing.memory.record import ShardRecord, ShardState
from everstep.checkpointing.memory.segment import Segment
from everstep.resharding.lines import Lines
from everstep.resharding.placement import Placement

from .client import KeeperLink


class _Begun(NamedTuple):
    """A record on its way into a slot: its values are there."""

    shard: int
    record: ShardRecord
    segment: Segment
    slot: int
    room: Tensor


class Snapshots:
    """Writes this worker's shards into segments that its node's keeper guards.

    Without a keeper (`link` None: a script that runs alone) the memory is private and only the gradient slots are used.
    `on_copied` is called, in the thread that copies, when a version is sealed: with the start in monotonic nanoseconds,
    the bytes, and the seconds less the pauses.
    """

    def __init__(
        self,
        link: KeeperLink | None,
        states: int = 2,
        on_copied: Callable[[int, int, float], None] = lambda started_ns, length, busy_s: None,
    ) -> None:
        self._link = link
        self._states = states
        self._on_copied = on_copied
        self._generation = 0
        self.lines: Lines = ()  # which records count from this generation on
        self._home: dict[int, tuple[int, Segment]] = {}  # shard -> segment
        self._bytes: dict[int, Tensor] = {}  # segment number -> its memory as uint8
        self._leaving: dict[int, int] = {}  # shard -> the version at which it got another owner
        self._outgrown: list[tuple[int, int]] = []  # (version that was too large, segment number with those before it)
        self._numbers = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="everstep-snapshot") if link else None
        self._pending: Future[None] | None = None
        self.checksums: dict[int, int] = {}  # shard -> xxh3 of its newest record
        self.version: dict[int, int] = {}  # shard -> newest version written or being written
        self.protected = -1  # the newest version that all members know to outlive lost nodes
        self._saving = -1  # the version that a checkpoint is being made of
        self._hurry = threading.Event()

    def outlives(self, version: int, *, forget: bool = False) -> None:
        """All members know that `version` outlives lost nodes. `forget`: what they knew before does not count."""
        self.protected = version if forget else max(self.protected, version)

    def begin_saving(self, version: int) -> None:
        """A checkpoint is made of `version`: it stays in its slots until `end_saving`."""
        self._saving = version

    def end_saving(self) -> None:
        """The checkpoint is made, or given up."""
        self._saving = -1

    def enter(
        self,
        generation: int,
        placement: Placement,
        addresses: Mapping[str, str],
        sizes: list[int],
        lines: Lines = (),
    ) -> None:
        """Go to a new generation. `sizes`: bytes of each shard's record at most; `lines`: which records count in it."""
        self._generation, self.lines = generation, lines
        if self._link is not None:
            self._link.ensure()
            capacities = [max(sizes[shard] for shard in stripe.shards) for stripe in placement.stripes]
            self._link.enter(generation, placement.to_json(), dict(addresses), capacities, lines)

    def has(self, shard: int) -> bool:
        """Whether there is room for a shard already."""
        return shard in self._home and shard not in self._leaving

    def digest(self, owned: Collection[int]) -> int:
        """A digest of the newest records of `owned`; its xor over all ranks does not depend on who owns what."""
        total = 0
        for shard, checksum in self.checksums.items():
            if shard in owned:
                total ^= xxhash.xxh3_64_intdigest(shard.to_bytes(8, "little") + checksum.to_bytes(8, "little"))
        return total

    def protect(self, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Make room for (shard, state bytes, gradient bytes); shards that have room already are skipped."""
        new = [item for item in sizes if not self.has(item[0])]
        if not new:
            return
        self._allocate(new)
        for shard, _, _ in new:
            self._leaving.pop(shard, None)
            self.version.pop(shard, None)

    def _allocate(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        """A new segment for (shard, state bytes, gradient bytes), in which their versions lie from now on."""
        segment = Segment.create(sizes, self._states)
        number = self._link.register(segment) if self._link else self._next()
        self._bytes[number] = torch.frombuffer(segment.memory, dtype=torch.uint8)
        for shard, _, _ in sizes:
            self._home[shard] = (number, segment)

    def _grow(self, version: int, records: Mapping[int, ShardRecord]) -> None:
        """Make larger room for the records that have outgrown theirs, because optimizer state has appeared.

        The versions before, and their gradients, stay where they are until `forget`.
        """
        grown: list[tuple[int, int, int]] = []
        for shard, record in records.items():
            number, segment = self._home[shard]
            entry = segment.entries[shard]
            if record.length > entry.state_bytes:
                grown.append((shard, record.length, entry.gradient_bytes))
                self._outgrown.append((version, number))
        if grown:
            self._allocate(grown)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def begin(
        self,
        version: int,
        states: Callable[[int], ShardState],
        shards: Iterable[int],
        *,
        protect: bool = False,
        spread_s: float = 0.0,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Start copying `version` of the shards. The values are copied already when this returns.

        The memory of the rest, the optimizer's state, must not change before `wait` returns. With `protect` it is to
        outlive nodes too: keepers then make parity of it, behind all this. The copy takes `spread_s` seconds unless a
        caller waits for it, to leave time for compute. `then` is called, in the thread that copies, when all is sealed.
        """
        if self._link is None:
            return
        self._link.ensure()
        todo, before = [], tuple(fork for fork in self.lines if fork.generation < self._generation)
        for shard in shards:
            if self.version.get(shard) == version:  # it is written: from now on it is of this generation
                self._home[shard][1].renew(shard, version, self._generation, before)
            else:
                todo.append(shard)
                self.version[shard] = version
        assert self._pool is not None
        self._hurry.clear()
        records = {shard: ShardRecord(states(shard)) for shard in todo}
        self._grow(version, records)
        opened = [self._open(shard, version, record) for shard, record in records.items()]
        for device in {device for begun in opened for device in begun.record.devices}:
            if device.type != "cpu":  # another thread copies the rest, on a stream of its own: all is there by now
                torch.get_device_module(device).synchronize(device)
        self._pending = self._pool.submit(
            self._copy, self._generation, version, opened, self._pending, spread_s, protect=protect, then=then
        )

    def _open(self, shard: int, version: int, record: ShardRecord) -> _Begun:
        """Open a slot for a record, and copy its values, so that they cannot change any more."""
        number, segment = self._home[shard]
        slot = segment.free_slot(shard, (self.protected, version - 1, self._saving), self.lines)
        start = segment.open_slot(shard, slot, record.length)
        room = self._bytes[number][start : start + segment.entries[shard].state_bytes]
        record.write_values(room.numpy().data)
        return _Begun(shard, record, segment, slot, room)

    def _copy(
        self,
        generation: int,
        version: int,
        opened: Sequence[_Begun],
        earlier: Future[None] | None,
        spread_s: float,
        *,
        protect: bool,
        then: Callable[[], None] | None,
    ) -> None:
        if earlier is not None:
            earlier.result()
        total, done, started = sum(begun.record.length for begun in opened), 0, time.monotonic()
        started_ns, paused_s = time.monotonic_ns(), 0.0
        for begun in opened:
            self._write(generation, version, begun)
            done += begun.record.length
            ahead_s = spread_s * done / total - (time.monotonic() - started)
            if ahead_s > 0:
                pause = time.monotonic()
                self._hurry.wait(ahead_s)
                paused_s += time.monotonic() - pause
        self._on_copied(started_ns, total, time.monotonic() - started - paused_s)
        assert self._link is not None
        self._link.sealed(generation, version, self.protected, protect=protect)
        if then is not None:
            then()

    def _write(self, generation: int, version: int, begun: _Begun) -> None:
        shard, record, segment, slot, room = begun
        checksum = record.write_rest(room.numpy().data, seed_of(shard, version, record.length))
        self.checksums[shard] = segment.seal_slot(shard, slot, version, record.length, checksum, generation)

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return when everything begun is written; calls `on_wait` every 50 ms."""
        if self._pending is None:
            return
        self._hurry.set()
        while not futures.wait([self._pending], timeout=0.05).done:
            on_wait()
        self._pending.result()
        self._pending = None

    def stored(self, shard: int, version: int) -> bytes | None:
        """A shard's record at `version` from this worker's own memory; None if it is not there, or damaged."""
        if self._link is None or not self.has(shard):
            return None
        segment = self._home[shard][1]
        slot = segment.find(shard, version, self.lines)
        return segment.read(slot) if slot is not None else None

    def resume(self, shard: int, version: int, lines: Lines = ()) -> memoryview | None:
        """`stored` of other `lines`, in place; what is found counts as written: `begin` need not write it again."""
        if self._link is None or not self.has(shard):
            return None
        segment = self._home[shard][1]
        slot = segment.find(shard, version, lines)
        data = segment.view(slot) if slot is not None else None
        if slot is not None and data is not None:
            self.version[shard] = version
            self.checksums[shard] = slot.checksum
        return data

    def stored_gradient(self, shard: int, step: int) -> bytes | None:
        """The reduced gradient of a step from this worker's own memory; None if it is not there, or damaged."""
        if self._link is None or not self.has(shard):
            return None
        segment = self._home[shard][1]
        slot = segment.find_gradient(shard, step, self.lines)
        return segment.read(slot) if slot is not None else None

    def discard(self, shard: int, version: int | None = None) -> None:
        """A shard's record at `version` (None: any) was made of damaged values: do not use it."""
        if self._link is None or not self.has(shard):
            return
        segment = self._home[shard][1]
        for slot in range(segment.states):
            stored = segment.stored(shard, slot)
            if stored is not None and version in (None, stored.version):
                segment.open_slot(shard, slot, 0)
        self.version.pop(shard, None)

    def protection(self) -> tuple[tuple[int, int], tuple[int, int], list[dict[str, Any]]]:
        """(generation, version), twice, and damage found: the newest version that is whole at this node's keeper.

        Parity included; in this generation, and in the last one that had any.
        """
        state = self._link.state() if self._link is not None else None
        if state is None:
            return (0, -1), (0, -1), []
        (generation, version), (earlier, old) = state["complete"], state["before"]
        return (generation, version), (earlier, old), state["incidents"]

    def gradient(self, shard: int, step: int, elements: int, dtype: torch.dtype) -> Tensor:
        """Where to write the reduced gradient of `step`: a view of keeper memory, invalid until sealed."""
        number, segment = self._home[shard]
        length = elements * dtype.itemsize
        start = segment.open_slot(shard, segment.gradient_slot(step), length)
        return self._bytes[number][start : start + length].view(dtype)

    def seal_gradient(self, shard: int, step: int, elements: int, dtype: torch.dtype) -> None:
        """Declare the gradient of `step` complete."""
        if self._link is not None:
            _, segment = self._home[shard]
            length = elements * dtype.itemsize
            segment.seal_slot(shard, segment.gradient_slot(step), step, length, generation=self._generation)

    def leave(self, shards: Iterable[int], version: int) -> None:
        """These shards have another owner from `version` on; what is kept of them is let go by a later `forget`."""
        for shard in shards:
            if shard in self._home:
                self._leaving[shard] = version

    def forget(self, *, nodes: bool = False) -> None:
        """Let go of segments none of whose shards is still needed here. Call when their new owners protect them.

        With `nodes` (they may be lost), a shard is needed until a version of its new owner outlives them. What a
        checkpoint is being made of is needed, too.
        """
        if self._saving >= 0:
            return
        for shard in [s for s, version in self._leaving.items() if not nodes or self.protected >= version]:
            del self._leaving[shard]
            self._home.pop(shard, None)
            self.checksums.pop(shard, None)
            self.version.pop(shard, None)
        self._outgrown = [item for item in self._outgrown if nodes and self.protected < item[0]]
        used = {number for number, _ in self._home.values()} | {number for _, number in self._outgrown}
        for number in [n for n in self._bytes if n not in used]:
            del self._bytes[number]
            if self._link is not None:
                self._link.drop(number)

    def close(self) -> None:
        """Stop copying. The keeper still guards what was written."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self._link is not None:
            self._link.close()
