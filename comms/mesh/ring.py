"""A ring of bytes in memory that two processes of one host share: one writes, the other reads.

Positions count every byte ever reserved, so they only grow; the offset in the ring is the remainder.  A reservation is
contiguous: where one would wrap, the tail is skipped.  The ring says nothing about order or arrival: headers on the
link's socket do, and credits on the same socket return space.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from .frames import ProtocolError

PIECE_LIMIT_BYTES = 512 * 1024  # small enough that copying in and copying out overlap
RING_MINIMUM_BYTES = 64 * 1024

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # a peer that shrank the file would kill its reader with SIGBUS


def piece_bytes(ring_bytes: int) -> int:
    """The longest reservation: with skipped tails and withheld credits three pieces always fit."""
    return min(PIECE_LIMIT_BYTES, ring_bytes // 8)


class RingWriter:
    """The sender's end, which creates the memory; `take_fd` hands it over once."""

    def __init__(self, ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        self.fd = os.memfd_create("everstep-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, ring_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, ring_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._view = memoryview(self._map)
        self._head = 0
        self._credited = 0

    def forget_fd(self) -> None:
        """Close the file descriptor, after the peer was given its own."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def reserve(self, length: int) -> int | None:
        """The position of `length` bytes that may be written now, or None until more credit comes."""
        start = self._head
        left = self.ring_bytes - start % self.ring_bytes
        if left < length:
            start += left
        if start + length - self._credited > self.ring_bytes:
            return None
        self._head = start + length
        return start

    def write(self, position: int, views: Sequence[memoryview]) -> None:
        """Copy `views`, one after the other, to a reserved position."""
        at = position % self.ring_bytes
        for view in views:
            self._view[at : at + len(view)] = view
            at += len(view)

    def credit(self, position: int) -> None:
        """The reader has consumed everything before `position`."""
        if not self._credited <= position <= self._head:
            raise ProtocolError(f"credit for {position}, which is not in {self._credited}..{self._head}")
        self._credited = position

    def close(self) -> None:
        """Unmap the memory. Idempotent."""
        self.forget_fd()
        self._view.release()
        self._map.close()


class RingReader:
    """The receiver's end. Takes ownership of `fd`, and closes it."""

    def __init__(self, fd: int, ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        try:
            if os.fstat(fd).st_size != ring_bytes or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError(f"the shared memory of a link is not a sealed file of {ring_bytes} bytes")
            self._map = mmap.mmap(fd, ring_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"the shared memory of a link cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._consumed = 0
        self._credited = 0

    def read_into(self, position: int, length: int, target: memoryview | None) -> None:
        """Consume `length` bytes at `position`, copied to `target` or dropped."""
        at = position % self.ring_bytes
        if position < self._consumed or at + length > self.ring_bytes:
            raise ProtocolError(f"part at {position}+{length} of a ring of {self.ring_bytes}, read to {self._consumed}")
        if target is not None:
            target[:] = self._view[at : at + length]
        self._consumed = position + length

    def credit_due(self) -> int | None:
        """The position to credit, once a piece has been consumed since the last credit."""
        if self._consumed - self._credited < piece_bytes(self.ring_bytes):
            return None
        self._credited = self._consumed
        return self._consumed

    def close(self) -> None:
        """Unmap the memory. Idempotent."""
        self._view.release()
        self._map.close()
