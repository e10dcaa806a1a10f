"""Parity of other nodes' shards: pulled from their keepers, encoded on arrival, kept until a newer version is complete.

A block describes what it is parity of (shards, lengths, checksums, its row), so it stays usable after changes of the
placement. Only sealed blocks are served.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from everstep.checkpointing.access.erasure import Code
from everstep.checkpointing.memory.checksum import checksum_of, matches
from everstep.resharding.lines import Lines, since
from everstep.resharding.placement import Stripe

ANY_SHARD = -1


@dataclass
class ParityBlock:
    """One parity row of one stripe at one version. `members`: member number -> (length, checksum) once it is in.

    `since`: all of them are of this generation or newer.
    """

    number: int
    version: int
    stripe: Stripe
    row: int
    memory: mmap.mmap
    capacity: int
    members: dict[int, tuple[int, int]] = field(default_factory=dict)
    checksum: int | None = None  # None until sealed
    since: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def length(self) -> int:
        return max((length for length, _ in self.members.values()), default=0)

    def add(self, member: int, data: memoryview, checksum: int) -> None:
        """Encode one member's record; seals the block with the last one."""
        with self.lock:
            if member in self.members:
                return
            self._make_room(len(data))
            with memoryview(self.memory) as view, view[: self.capacity] as room:
                if not self.members:
                    room[:] = bytes(self.capacity)
                code = Code(len(self.stripe.shards), len(self.stripe.parity))
                with room[: len(data)] as row:
                    code.update(member, data, [row], [self.row])
                self.members[member] = (len(data), checksum)
                if len(self.members) == len(self.stripe.shards):
                    with room[: self.length] as whole:
                        self.checksum = checksum_of(whole, ANY_SHARD - self.row, self.version)

    def _make_room(self, length: int) -> None:
        """For a record that is longer than any was when the generation began; parity is zero beyond what is in."""
        if length > self.capacity:
            larger = mmap.mmap(-1, length, flags=_FLAGS)
            larger[: self.capacity] = self.memory[: self.capacity]
            self.memory, self.capacity = larger, length

    def read(self) -> bytes | None:
        """The parity, or None if it does not match its checksum."""
        with self.lock:
            if self.checksum is None:
                return None
            data = self.memory[: self.length]
            return data if matches(data, self.checksum, ANY_SHARD - self.row, self.version) else None

    def describe(self) -> dict[str, Any]:
        """The block's description, for decoding."""
        return {
            "block": self.number,
            "shards": list(self.stripe.shards),
            "rows": len(self.stripe.parity),
            "row": self.row,
            "length": self.length,
            "members": [list(self.members[i]) for i in range(len(self.stripe.shards))],
        }


class ParityStore:
    """The blocks of a node. Memory is allocated and touched once, and used again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, ParityBlock] = {}
        self._free: dict[int, list[mmap.mmap]] = {}
        self._numbers = 0
        self._largest: dict[tuple[int, ...], int] = {}  # shards of a stripe -> the capacity that a block has grown to
        self._encoded = [0, 0.0]

    def encoded(self, length: int, seconds: float) -> None:
        """A member of `length` bytes was checked and taken into a block, in `seconds` of one thread."""
        with self._lock:
            self._encoded[0] += length
            self._encoded[1] += seconds

    def work(self) -> dict[str, float]:
        """The cost of encoding so far: bytes, and seconds of one thread."""
        with self._lock:
            return {"encoded_bytes": self._encoded[0], "encode_s": self._encoded[1]}

    def open(self, version: int, stripe: Stripe, row: int, capacity: int, lines: Lines = ()) -> ParityBlock:
        """The block for this row of a stripe at a version: a sealed or begun one of the same shards, or a new one."""
        first = since(lines, version)
        with self._lock:
            for block in self._blocks.values():
                same = block.stripe.shards == stripe.shards and len(block.stripe.parity) == len(stripe.parity)
                if block.version == version and block.row == row and same and block.since >= first:
                    return block
            capacity = max(capacity, self._largest.get(stripe.shards, 0))
            pool = self._free.get(capacity)
            memory = pool.pop() if pool else mmap.mmap(-1, max(capacity, 1), flags=_FLAGS)
            self._numbers += 1
            block = ParityBlock(self._numbers, version, stripe, row, memory, capacity, since=first)
            self._blocks[block.number] = block
            return block

    def keep(self, versions: Iterable[int]) -> None:
        """Drop the blocks of all other versions."""
        wanted = set(versions)
        with self._lock:
            for number, block in list(self._blocks.items()):
                if block.version not in wanted:
                    del self._blocks[number]
                    shards = block.stripe.shards
                    self._largest[shards] = max(block.capacity, self._largest.get(shards, 0))
                    self._free.setdefault(block.capacity, []).append(block.memory)

    def trim(self, capacities: Iterable[int]) -> None:
        """Free memory that no block of these capacities can use."""
        wanted = set(capacities)
        with self._lock:
            for capacity in [c for c in self._free if c not in wanted]:
                for memory in self._free.pop(capacity):
                    memory.close()

    def covering(self, shards: Iterable[int], version: int, lines: Lines = ()) -> list[ParityBlock]:
        """The sealed blocks at a version that have any of these shards as a member, and are of these lines."""
        wanted, first = set(shards), since(lines, version)
        with self._lock:
            return [
                block
                for block in self._blocks.values()
                if block.version == version
                and block.checksum is not None
                and block.since >= first
                and wanted & set(block.stripe.shards)
            ]

    def block(self, number: int) -> ParityBlock | None:
        """A block by its number."""
        with self._lock:
            return self._blocks.get(number)

    @property
    def bytes(self) -> int:
        """Memory held, in use or not."""
        with self._lock:
            free = sum(capacity * len(pool) for capacity, pool in self._free.items())
            return free + sum(block.capacity for block in self._blocks.values())


_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
