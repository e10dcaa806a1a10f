"""A snapshot segment: the shared memory that holds the protected state of some shards of one worker.

For each shard it has a few state slots, each for one version, and two gradient slots (the reduced gradient of step k
lies in slot k % 2). A slot's header is cleared before its bytes change and written, with their checksum, after: a torn
slot is never valid. The checksum (see `checksum`) covers the header too, so damage to it is noticed as well; not the
generation in which they were written, since a record may count as written again. The memory is
anonymous (memfd): it has no name that could be left behind, and lives as long as the worker or the keeper holds it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from everstep.resharding.lines import Lines, since, slot_to_write

from .checksum import checksum_of, matches

_HEADER = struct.Struct("<qQQq")  # version or step (-1: invalid), length in bytes, checksum, generation
_GENERATION = struct.Struct("<q")
_SLOT_HEADER_BYTES = 32
_ALIGN = 64
_GRADIENTS = 2
_Data = TypeVar("_Data", bytes, memoryview)


class Entry(NamedTuple):
    """Where a shard lies in a segment: offset of its headers, and the capacities of its slots in bytes."""

    shard: int
    offset: int
    state_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Stored:
    """A slot that says it is valid: what it holds and where."""

    shard: int
    version: int
    offset: int
    length: int
    checksum: int
    gradient: bool = False
    generation: int = 0  # in which it was written

    def checked(self, data: _Data) -> _Data | None:
        """The bytes that were read from the slot, or None if they do not match its checksum."""
        sound = matches(data, self.checksum, self.shard, self.version, gradient=self.gradient)
        return data if sound else None


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def plan_entries(sizes: Iterable[tuple[int, int, int]], states: int) -> tuple[list[Entry], int]:
    """Lay out (shard, state bytes, gradient bytes) one after the other; returns the entries and the total size."""
    entries, offset = [], 0
    for shard, state_bytes, gradient_bytes in sizes:
        entry = Entry(shard, offset, _aligned(state_bytes), _aligned(gradient_bytes))
        entries.append(entry)
        offset += _aligned((states + _GRADIENTS) * _SLOT_HEADER_BYTES)
        offset += states * entry.state_bytes + _GRADIENTS * entry.gradient_bytes
    return entries, offset


class Segment:
    """A mapped segment, in the worker that writes it or the keeper that guards it. `states`: state slots per shard."""

    def __init__(self, fd: int, size: int, entries: Iterable[Entry], states: int) -> None:
        self.fd = fd
        self.size = size
        self.states = states
        self.entries = {entry.shard: entry for entry in entries}
        self.memory = mmap.mmap(fd, max(size, mmap.PAGESIZE), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    @classmethod
    def create(cls, sizes: Iterable[tuple[int, int, int]], states: int = 2) -> Segment:
        """Allocate and touch a segment for (shard, state bytes, gradient bytes)."""
        entries, size = plan_entries(sizes, states)
        fd = os.memfd_create("everstep-snapshot", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(size, mmap.PAGESIZE))
        segment = cls(fd, size, entries, states)
        for entry in entries:
            for slot in range(states + _GRADIENTS):
                segment._write_header(entry, slot, -1, 0, 0, 0)
        return segment

    # ------------------------------------------------------------ writing

    def gradient_slot(self, step: int) -> int:
        """The slot of a step's gradient."""
        return self.states + step % _GRADIENTS

    def free_slot(self, shard: int, keep: Collection[int], lines: Lines = ()) -> int:
        """The state slot to write next; see `slot_to_write`."""
        held = [self.stored(shard, slot) for slot in range(self.states)]
        return slot_to_write([(s.version, s.generation) if s is not None else None for s in held], keep, lines)

    def open_slot(self, shard: int, slot: int, length: int) -> int:
        """Invalidate a slot that is about to be written; returns the offset of its bytes."""
        entry = self.entries[shard]
        if length > self._capacity(entry, slot):
            raise ValueError(
                f"shard {shard} needs {length} bytes in slot {slot}, which was made for {self._capacity(entry, slot)}"
            )
        self._write_header(entry, slot, -1, 0, 0, 0)
        return self._body(entry, slot)

    def seal_slot(
        self, shard: int, slot: int, version: int, length: int, checksum: int | None = None, generation: int = 0
    ) -> int:
        """Mark a slot as holding `version`, written in `generation`.

        Returns its checksum, which is taken here unless it is given.
        """
        entry = self.entries[shard]
        start = self._body(entry, slot)
        if checksum is None:
            with memoryview(self.memory) as view, view[start : start + length] as body:
                checksum = checksum_of(body, shard, version, gradient=slot >= self.states)
        self._write_header(entry, slot, version, length, checksum, generation)
        return checksum

    def renew(self, shard: int, version: int, generation: int, lines: Lines) -> None:
        """A shard's state at `version` counts as written in `generation`."""
        entry = self.entries[shard]
        for slot in range(self.states):
            stored = self.stored(shard, slot)
            if stored is not None and stored.version == version and stored.generation >= since(lines, version):
                place = entry.offset + slot * _SLOT_HEADER_BYTES + _HEADER.size - _GENERATION.size
                _GENERATION.pack_into(self.memory, place, generation)

    def _write_header(self, entry: Entry, slot: int, version: int, length: int, checksum: int, generation: int) -> None:
        place = entry.offset + slot * _SLOT_HEADER_BYTES
        _HEADER.pack_into(self.memory, place, version, length, checksum, generation)

    # ------------------------------------------------------------ reading

    def _header(self, entry: Entry, slot: int) -> tuple[int, int, int, int]:
        version, length, checksum, generation = _HEADER.unpack_from(
            self.memory, entry.offset + slot * _SLOT_HEADER_BYTES
        )
        return version, length, checksum, generation

    def _body(self, entry: Entry, slot: int) -> int:
        start = entry.offset + _aligned((self.states + _GRADIENTS) * _SLOT_HEADER_BYTES)
        if slot < self.states:
            return start + slot * entry.state_bytes
        return start + self.states * entry.state_bytes + (slot - self.states) * entry.gradient_bytes

    def _capacity(self, entry: Entry, slot: int) -> int:
        return entry.state_bytes if slot < self.states else entry.gradient_bytes

    def stored(self, shard: int, slot: int) -> Stored | None:
        """What a slot says it holds, or None if it is empty or torn. The checksum is not compared here."""
        entry = self.entries[shard]
        version, length, checksum, generation = self._header(entry, slot)
        if version < 0 or length > self._capacity(entry, slot):
            return None
        return Stored(shard, version, self._body(entry, slot), length, checksum, slot >= self.states, generation)

    def find(self, shard: int, version: int, lines: Lines = ()) -> Stored | None:
        """The slot that holds a shard's state at `version`, of these lines."""
        slots = (self.stored(shard, slot) for slot in range(self.states))
        first = since(lines, version)
        return next((s for s in slots if s is not None and s.version == version and s.generation >= first), None)

    def find_gradient(self, shard: int, step: int, lines: Lines = (), agreed_in: int = 0) -> Stored | None:
        """The slot that holds a shard's reduced gradient of `step`, which leads to the version after it.

        One from before the generation in which the step was agreed may have been computed with damaged values.
        """
        found = self.stored(shard, self.gradient_slot(step))
        first = max(agreed_in, since(lines, step + 1))
        sound = found is not None and found.version == step and found.generation >= first
        return found if sound else None

    def read(self, stored: Stored) -> bytes | None:
        """The bytes of a slot, or None if they do not match their checksum."""
        return stored.checked(self.memory[stored.offset : stored.offset + stored.length])

    def view(self, stored: Stored) -> memoryview | None:
        """The bytes of a slot, in place, or None if they do not match their checksum.

        A later version overwrites them.
        """
        return stored.checked(memoryview(self.memory)[stored.offset : stored.offset + stored.length])

    def newest(self, lines: Lines = ()) -> int:
        """The greatest state version in the segment that is of these lines, -1 if it has none."""
        return max((s.version for s in self._states() if s.generation >= since(lines, s.version)), default=-1)

    def _states(self) -> Iterator[Stored]:
        for shard in self.entries:
            for slot in range(self.states):
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
