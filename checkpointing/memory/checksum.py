"""The checksums of keeper memory: of records, gradients and parity. All that writes or compares one calls this file.

A checksum covers what the bytes are (shard, version, length) too, so the same bytes under another name do not match.
It is compared where the bytes are read, before anything uses them: only there can the next copy be taken instead.
"""

from __future__ import annotations

import struct

import xxhash
from typing_extensions import Buffer

_SEED = struct.Struct("<qqqq")


def seed_of(shard: int, version: int, length: int, *, gradient: bool = False) -> int:
    """The xxh3 seed for bytes that claim to be this, for a checksum that is taken while they are copied."""
    return xxhash.xxh3_64_intdigest(_SEED.pack(shard, version, length, gradient))


def checksum_of(data: Buffer, shard: int, version: int, *, gradient: bool = False) -> int:
    """The checksum of a shard's record, of its gradient, or of a parity row."""
    view = memoryview(data)
    return xxhash.xxh3_64_intdigest(view, seed_of(shard, version, view.nbytes, gradient=gradient))


def matches(data: Buffer, checksum: int, shard: int, version: int, *, gradient: bool = False) -> bool:
    """Whether these bytes are what they claim to be."""
    return checksum_of(data, shard, version, gradient=gradient) == checksum
