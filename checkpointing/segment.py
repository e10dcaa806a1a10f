"""A snapshot segment: the shared memory that holds the protected state of some shards of one worker.

For each shard it has two state slots (version v lies in slot v % 2) and two gradient slots (the reduced gradient of
step k lies in slot k % 2). A slot's header is cleared before its bytes change and written, with their checksum, after:
a torn slot is never valid. The memory is anonymous (memfd): it has no name that could be left behind, and lives as
long as the worker or the keeper holds it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

_HEADER = struct.Struct("<qQQ")  # version or step (-1: invalid), length in bytes, xxh3 of the bytes
_SLOT_HEADER_BYTES = 32
_ALIGN = 64
SLOTS = ("state0", "state1", "gradient0", "gradient1")


class Entry(NamedTuple):
    """Where a shard lies in a segment: offset of its headers, and the capacities of its slots in bytes."""

    shard: int
    offset: int
    state_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Stored:
    """A valid slot: what it holds and where."""

    version: int
    offset: int
    length: int
    checksum: int


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def plan_entries(sizes: Iterable[tuple[int, int, int]]) -> tuple[list[Entry], int]:
    """Lay out (shard, state bytes, gradient bytes) one after the other; returns the entries and the total size."""
    entries, offset = [], 0
    for shard, state_bytes, gradient_bytes in sizes:
        entry = Entry(shard, offset, _aligned(state_bytes), _aligned(gradient_bytes))
        entries.append(entry)
        offset += _aligned(len(SLOTS) * _SLOT_HEADER_BYTES) + 2 * entry.state_bytes + 2 * entry.gradient_bytes
    return entries, offset


class Segment:
    """A mapped segment, in the worker that writes it or the keeper that guards it."""

    def __init__(self, fd: int, size: int, entries: Iterable[Entry]) -> None:
        self.fd = fd
        self.size = size
        self.entries = {entry.shard: entry for entry in entries}
        self.memory = mmap.mmap(fd, max(size, mmap.PAGESIZE), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    @classmethod
    def create(cls, sizes: Iterable[tuple[int, int, int]]) -> Segment:
        """Allocate and touch a segment for (shard, state bytes, gradient bytes)."""
        entries, size = plan_entries(sizes)
        fd = os.memfd_create("everstep-snapshot", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(size, mmap.PAGESIZE))
        segment = cls(fd, size, entries)
        for entry in entries:
            for slot in range(len(SLOTS)):
                segment._write_header(entry, slot, -1, 0, 0)
        return segment

    def _body(self, entry: Entry, slot: int) -> int:
        start = entry.offset + _aligned(len(SLOTS) * _SLOT_HEADER_BYTES)
        if slot < 2:
            return start + slot * entry.state_bytes
        return start + 2 * entry.state_bytes + (slot - 2) * entry.gradient_bytes

    def _capacity(self, entry: Entry, slot: int) -> int:
        return entry.state_bytes if slot < 2 else entry.gradient_bytes

    def _write_header(self, entry: Entry, slot: int, version: int, length: int, checksum: int) -> None:
        _HEADER.pack_into(self.memory, entry.offset + slot * _SLOT_HEADER_BYTES, version, length, checksum)

    def open_slot(self, shard: int, slot: int, length: int) -> int:
        """Invalidate a slot that is about to be written; returns the offset of its bytes."""
        entry = self.entries[shard]
        if length > self._capacity(entry, slot):
            raise ValueError(
                f"shard {shard} needs {length} bytes in slot {SLOTS[slot]}, which was made for "
                f"{self._capacity(entry, slot)}: the optimizer's state grew after its first step"
            )
        self._write_header(entry, slot, -1, 0, 0)
        return self._body(entry, slot)

    def seal_slot(self, shard: int, slot: int, version: int, length: int) -> int:
        """Mark a slot as holding `version`; returns the xxh3 checksum of its bytes."""
        entry = self.entries[shard]
        start = self._body(entry, slot)
        with memoryview(self.memory) as view, view[start : start + length] as body:
            checksum = xxhash.xxh3_64_intdigest(body)
        self._write_header(entry, slot, version, length, checksum)
        return checksum

    def stored(self, shard: int, slot: int) -> Stored | None:
        """What a slot holds, or None if it is empty, torn or out of range. The checksum is not compared here."""
        entry = self.entries[shard]
        version, length, checksum = _HEADER.unpack_from(self.memory, entry.offset + slot * _SLOT_HEADER_BYTES)
        if version < 0 or length > self._capacity(entry, slot):
            return None
        return Stored(version, self._body(entry, slot), length, checksum)

    def read(self, stored: Stored) -> bytes | None:
        """The bytes of a slot, or None if they do not match their checksum."""
        data = self.memory[stored.offset : stored.offset + stored.length]
        return data if xxhash.xxh3_64_intdigest(data) == stored.checksum else None

    def newest(self) -> int:
        """The greatest state version in the segment, -1 if it has none."""
        return max((s.version for s in self._states()), default=-1)

    def _states(self) -> Iterator[Stored]:
        for shard in self.entries:
            for slot in (0, 1):
                stored = self.stored(shard, slot)
                if stored is not None:
                    yield stored

    def close(self) -> None:
        """Unmap and close. Tensors that still view the memory keep it mapped until they go."""
        with contextlib.suppress(BufferError):  # a view is alive: the mapping goes with it
            self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
