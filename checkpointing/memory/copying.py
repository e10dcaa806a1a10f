"""Copies that take the checksum on the way: the bytes come from memory once.

Each chunk is hashed first and then copied out of the cache. So the checksum is that of what was read, not of what was
written: a copy that went wrong, or a source that changed meanwhile, does not match it.

Measured on an AMD EPYC (Zen 4, 1 MiB of second-level cache), single thread, warm shared memory, against a copy by one
call: 0.90 to 0.95 of its speed with chunks of 1 MiB, 0.8 with 128 KiB (the calls cost), 0.93 with 3 MiB; 0.85 to 0.92
for copying first; 0.67 for a copy of everything and then a checksum of everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash
from typing_extensions import Buffer

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20


class CheckedCopy:
    """A copy in several parts with one checksum: the xxh3_64, by `seed`, of all the parts one after the other.

    Hashing and copying release the interpreter's lock. Not thread-safe; sources must not change meanwhile.
    """

    def __init__(self, seed: int = 0) -> None:
        self._hash = xxhash.xxh3_64(seed=seed)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy contiguous bytes. Raises ValueError if the lengths differ or the target is read-only."""
        read = np.frombuffer(memoryview(source), dtype=np.uint8)
        write = np.frombuffer(memoryview(target), dtype=np.uint8)
        if read.size != write.size:
            raise ValueError(f"{read.size} bytes do not fit into exactly {write.size} bytes")
        if not write.flags.writeable:
            raise ValueError(f"the target of {write.size} bytes is read-only")
        for start in range(0, read.size, CHUNK_BYTES):
            chunk = read[start : start + CHUNK_BYTES]
            self._hash.update(chunk.data)
            np.copyto(write[start : start + CHUNK_BYTES], chunk)

    def add(self, written: Buffer) -> None:
        """Count bytes in that were copied already."""
        self._hash.update(written)

    @property
    def checksum(self) -> int:
        """The checksum of what has been copied so far, 64 bits."""
        return self._hash.intdigest()


def copy_with_checksum(source: Buffer, target: Buffer, seed: int = 0) -> int:
    """Copy contiguous bytes and return their checksum: `xxhash.xxh3_64_intdigest(source, seed)`.

    Raises ValueError if the lengths differ or the target is read-only; nothing is copied then.
    """
    copy = CheckedCopy(seed)
    copy.copy(source, target)
    return copy.checksum


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type, in row-major order; a view if it is contiguous and on the CPU, else a copy."""
    import torch  # the keeper copies too, and does without torch

    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
