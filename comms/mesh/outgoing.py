"""A message on its way out: cut into parts as its link takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .communicator import Key
from .frames import Flag, FrameKind, Header, checksum_of
from .mailbox import joined
from .ring import RingWriter, piece_bytes

INLINE_LIMIT_BYTES = 2048  # up to here the socket is cheaper than the ring
TCP_PIECE_BYTES = 1 << 20  # also bounds what an abort has to copy of a frame that is half sent


def cut(views: Sequence[memoryview], piece: int) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut the concatenation of `views` into pieces of `piece` bytes and a rest: (offset, views of the piece).

    Nothing is copied. An empty message is one empty piece.
    """
    offset, room, gathered = 0, piece, list[memoryview]()
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            gathered.append(part)
            at += len(part)
            room -= len(part)
            if room == 0:
                yield offset, gathered
                offset, room, gathered = offset + piece, piece, []
    if gathered or offset == 0:
        yield offset, gathered


class Outgoing:
    """The parts of one message that have not gone. They are views of the caller's buffers until `own_rest`."""

    def __init__(
        self,
        generation: int,
        source: int,
        key: Key,
        views: Sequence[memoryview],
        ring: RingWriter | None,
        damage: Callable[[], int],
    ) -> None:
        """`damage`: what the checksum of the next part is changed by (0: it is not)."""
        self._name = (generation, source, key)
        self._total = sum(map(len, views))
        self._ring = ring if self._total > INLINE_LIMIT_BYTES else None
        self._piece = piece_bytes(self._ring.ring_bytes) if self._ring else TCP_PIECE_BYTES
        self._parts = cut(views, self._piece)
        self._damage = damage
        self._next: tuple[list[memoryview], int] | None = None  # a part that waits for room, and its checksum
        self._gone = 0  # bytes
        self.begun = False  # a part has gone to the link
        self.done = False  # all of them have

    def pop(self) -> tuple[bytes, Sequence[memoryview]] | None:
        """The frame of the next part: its header, and the bytes behind it; None as long as the ring has no room."""
        if self._next is None:
            _, views = next(self._parts)
            self._next = views, checksum_of(views)  # brings them into the cache, from where they are copied next
        views, checksum = self._next
        length = sum(map(len, views))
        position = flags = 0
        if self._ring:
            reserved = self._ring.reserve(length)
            if reserved is None:
                return None
            self._ring.write(reserved, views)
            position, flags, views = reserved, Flag.IN_RING, []
        generation, source, key = self._name
        offset, sealed = self._gone, checksum ^ self._damage()
        header = Header(FrameKind.PART, flags, generation, source, key, self._total, offset, length, position, sealed)
        self._next, self._gone, self.begun = None, offset + length, True
        self.done = self._gone == self._total
        return header.pack(), views

    def own_rest(self) -> None:
        """Copy what has not gone, so that the caller's buffers are free."""
        if self.done:
            return
        waiting = self._next[0] if self._next else []
        rest = joined([*waiting, *(view for _, views in self._parts for view in views)])
        self._parts, self._next = cut([rest], self._piece), None
