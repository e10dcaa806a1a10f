"""Large values by their content: cut into pieces, each named by the digest of its bytes, so a name has one meaning.

The rank that asks for a piece compares its digest, so it does not matter which rank wrote it, when, or for which
version. A keeper holds a piece once, however many values, versions and workers have it in common.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash
from typing_extensions import Buffer

PIECE_BYTES = 4 << 20


def digest_of(piece: Buffer) -> str:
    """The name of a piece: the xxh3_128 of its bytes."""
    return str(xxhash.xxh3_128_hexdigest(piece))


def pieces_of(data: memoryview) -> list[memoryview]:
    """The pieces of a value's bytes, in order."""
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]


@dataclass
class _Piece:
    """Where a piece lies. `last`: the newest version that had it."""

    memory: mmap.mmap
    start: int
    length: int
    last: int


class Contents:
    """The pieces that a keeper holds. Thread-safe. Memory goes back with the last piece that lies in it."""

    def __init__(self) -> None:
        self._pieces: dict[str, _Piece] = {}
        self._lock = threading.Lock()

    def use(self, version: int, oldest: int, digests: Iterable[str]) -> list[str]:
        """A version has these pieces, and versions before `oldest` are of no more use: returns what is lacking."""
        with self._lock:
            lacking = []
            for digest in digests:
                piece = self._pieces.get(digest)
                if piece is None:
                    lacking.append(digest)
                else:
                    piece.last = max(piece.last, version)
            for digest in [digest for digest, piece in self._pieces.items() if piece.last < oldest]:
                del self._pieces[digest]
            return lacking

    def hold(self, fd: int, version: int, pieces: Sequence[tuple[str, int]]) -> None:
        """Hold (digest, length) pieces, which lie one after the other in shared memory. The descriptor stays open."""
        memory = mmap.mmap(fd, max(1, sum(length for _, length in pieces)), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        start = 0
        with self._lock:
            for digest, length in pieces:
                self._pieces.setdefault(digest, _Piece(memory, start, length, version))
                start += length

    def find(self, digest: str) -> memoryview | None:
        """A piece, which stays readable while the view is alive."""
        with self._lock:
            piece = self._pieces.get(digest)
            return memoryview(piece.memory)[piece.start : piece.start + piece.length] if piece is not None else None

    @property
    def bytes(self) -> int:
        """How much is held."""
        with self._lock:
            return sum(piece.length for piece in self._pieces.values())
