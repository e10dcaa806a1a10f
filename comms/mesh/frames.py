"""What goes over a link of the mesh: one `Hello`, then frames with a fixed-size little-endian `Header`.

A message is cut into parts.  A part is a header followed either by its bytes or, where the two ranks share memory,
by nothing: the header then says where in the ring its bytes lie.  Parts of a message follow each other on the link, and
messages do not interleave.  Credits travel the other way and return ring space to the sender.

Nothing is believed unchecked: hellos and headers end with the xxh3_64 of their own bytes, and a part's header
carries that of the part's bytes, wherever those lie.  TCP's 16-bit sums let one bad segment in 65 536 pass, and shared
memory has none.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash
from typing_extensions import Buffer

from .communicator import Key, Kind

PROTOCOL_VERSION = 4
MESSAGE_LIMIT_BYTES = 1 << 36  # a longer message is a bug of ours or a malformed header

_HEADER_MAGIC = b"ESf2"
_HELLO_MAGIC = b"ESh1"
_HEADER = struct.Struct("<4sBBHIiqqiIQQQQ")
_HELLO = struct.Struct("<4sHH32siqiqQQ")
_CHECKSUM = struct.Struct("<Q")
_KEY_KINDS = {kind.value: kind for kind in Kind}

HEADER_BYTES = _HEADER.size + _CHECKSUM.size
HELLO_BYTES = _HELLO.size + _CHECKSUM.size


class ProtocolError(Exception):
    """The peer sent bytes that are no frame of this protocol: the link is closed, and this rank continues."""


class CorruptFrame(ProtocolError):
    """Bytes changed on their way: not the peer's fault. What was hit is not delivered, and its link is closed."""


class FrameKind(enum.IntEnum):
    """What a frame is."""

    PART = 1  # a part of a message, from sender to receiver
    CREDIT = 2  # ring bytes consumed, from receiver to sender
    REFUSED = 3  # what came had changed on its way, from receiver to sender: its last frame


class Flag(enum.IntFlag):
    """Bits of a part's header."""

    IN_RING = 1  # the part's bytes are in the ring, not behind the header


_FRAME_KINDS = {kind.value: kind for kind in FrameKind}
_NO_KEY = Key(Kind.USER, 0)


class Header(NamedTuple):
    """The head of a frame.

    `ring_position` counts all bytes ever reserved in the ring; its offset is the remainder. `checksum` is that of the
    part's bytes (see `checksum_of`).
    """

    kind: FrameKind
    flags: int
    generation: int
    source: int
    key: Key
    total_bytes: int
    offset: int
    length: int
    ring_position: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        """The header as `HEADER_BYTES` bytes."""
        key = self.key
        packed = _HEADER.pack(
            _HEADER_MAGIC,
            self.kind,
            key.kind,
            self.flags,
            self.generation,
            self.source,
            key.step,
            key.index,
            key.micro_batch,
            self.length,
            self.total_bytes,
            self.offset,
            self.ring_position,
            self.checksum,
        )
        return _sealed(packed)

    @classmethod
    def parse(cls, data: Buffer, at: int = 0) -> Header:
        """The header that begins at byte `at`; raises CorruptFrame if it changed on its way, ProtocolError if none."""
        _check(data, at, _HEADER.size, "a header")
        fields = _HEADER.unpack_from(data, at)
        magic, kind_value, key_kind, flags, generation, source, step, index, micro_batch, length = fields[:10]
        total, offset, ring_position, checksum = fields[10:]
        kind = _FRAME_KINDS.get(kind_value)
        key = _KEY_KINDS.get(key_kind)
        if magic != _HEADER_MAGIC:
            raise ProtocolError(f"expected a frame, which begins with {_HEADER_MAGIC!r}, got {magic!r}")
        if kind is None or key is None or flags & ~Flag.IN_RING:
            raise ProtocolError(f"unknown frame: kind {kind_value}, message kind {key_kind}, flags {flags:#x}")
        if total > MESSAGE_LIMIT_BYTES:
            raise ProtocolError(f"a message of {total} bytes, more than the limit of {MESSAGE_LIMIT_BYTES}")
        if offset + length > total or (length == 0 and total > 0):
            raise ProtocolError(f"part {offset}+{length} does not lie in a message of {total} bytes")
        name = Key(key, step, micro_batch, index)
        return cls(kind, flags, generation, source, name, total, offset, length, ring_position, checksum)


def pack_credit(ring_position: int) -> bytes:
    """A frame that says that the ring is consumed up to `ring_position`."""
    return Header(FrameKind.CREDIT, 0, 0, 0, _NO_KEY, 0, 0, 0, ring_position).pack()


def pack_refusal() -> bytes:
    """The frame that tells a sender that its bytes changed on their way, so that it does not take us for dead."""
    return Header(FrameKind.REFUSED, 0, 0, 0, _NO_KEY, 0, 0, 0).pack()


def checksum_of(views: Sequence[Buffer]) -> int:
    """The xxh3_64 of the concatenation of `views`."""
    if len(views) == 1:
        return xxhash.xxh3_64_intdigest(views[0])
    hasher = xxhash.xxh3_64()
    for view in views:
        hasher.update(view)
    return hasher.intdigest()


def _sealed(packed: bytes) -> bytes:
    return packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))


def _check(data: Buffer, at: int, length: int, what: str) -> None:
    """The checksum that follows `length` bytes must be theirs."""
    if xxhash.xxh3_64_intdigest(memoryview(data)[at : at + length]) != _CHECKSUM.unpack_from(data, at + length)[0]:
        raise CorruptFrame(f"the checksum of {what} does not match")


def token_digest(token: str) -> bytes:
    """What stands for the job's token in a hello, so that the token itself never travels."""
    return hashlib.sha256(b"everstep link\0" + token.encode()).digest()


class Hello(NamedTuple):
    """The first bytes on a link, from the rank that connects: who it is, and whom it means to reach.

    `generation` is the newest one that the source knows. `ring_bytes` is 0 on a link without shared memory.
    """

    digest: bytes
    source: int
    source_incarnation: int
    target: int
    target_incarnation: int
    generation: int
    ring_bytes: int
    version: int = PROTOCOL_VERSION

    def pack(self) -> bytes:
        """The hello as `HELLO_BYTES` bytes."""
        packed = _HELLO.pack(
            _HELLO_MAGIC,
            self.version,
            0,
            self.digest,
            self.source,
            self.source_incarnation,
            self.target,
            self.target_incarnation,
            self.generation,
            self.ring_bytes,
        )
        return _sealed(packed)

    @classmethod
    def parse(cls, data: Buffer) -> Hello:
        """The hello in `data`; raises ProtocolError if it is none, or of another version, or changed on its way."""
        magic, version, _, *fields = _HELLO.unpack_from(data)
        if magic != _HELLO_MAGIC:
            raise ProtocolError(f"expected a hello, which begins with {_HELLO_MAGIC!r}, got {magic!r}")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the peer speaks version {version} of the link protocol, this rank {PROTOCOL_VERSION}: "
                "run the same everstep on every rank"
            )
        _check(data, 0, _HELLO.size, "a hello")
        return cls(*fields)
