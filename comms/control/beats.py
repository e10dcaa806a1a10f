"""Heartbeats as datagrams, so that those of ten thousand nodes cost their coordinator little.

    agent -> coordinator    Beat: the node, an increasing stamp, the last order that the node received
    coordinator -> agent    Echo: the same stamp, the last message that is stored, the newest aborted generation

Each carries a keyed BLAKE2b of all its bytes (RFC 7693); a datagram that does not verify, has the wrong length or an
older stamp than a previous one is dropped silently. They carry no secrets. They may be lost: the stream carries the
same information, later. The coordinator's UDP port has the number of its TCP port.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

_BEAT = struct.Struct("<4s8sQqq")  # kind, node, stamp, orders received, spare
_ECHO = struct.Struct("<4s8sQqq")  # kind, node, stamp, messages kept, generation aborted
_MAC_BYTES = 16
_BEATS, _ECHOES = b"esb1", b"ese1"
DATAGRAM_BYTES = _BEAT.size + _MAC_BYTES


class Beat(NamedTuple):
    """A node is alive. `stamp`: CLOCK_MONOTONIC of the node, ns; `received`: the number of its last order."""

    node: bytes
    stamp: int
    received: int


class Echo(NamedTuple):
    """The coordinator is alive. `kept`: the number of the node's last message in its store."""

    node: bytes
    stamp: int
    kept: int
    aborted: int  # the newest generation that is over; -1 for none


def key_of(token: str) -> bytes:
    """The key that authenticates a job's datagrams."""
    return hashlib.sha256(b"everstep beats\0" + token.encode()).digest()


def name_of(node: str) -> bytes:
    """The fixed-size identifier of a node's name in a datagram."""
    return hashlib.blake2b(node.encode(), digest_size=8).digest()


def pack_beat(key: bytes, beat: Beat) -> bytes:
    return _sealed(key, _BEAT.pack(_BEATS, beat.node, beat.stamp, beat.received, 0))


def pack_echo(key: bytes, echo: Echo) -> bytes:
    return _sealed(key, _ECHO.pack(_ECHOES, echo.node, echo.stamp, echo.kept, echo.aborted))


def unpack_beat(key: bytes, data: bytes) -> Beat | None:
    """The beat that these bytes are; None if they are none of this job's."""
    body = _opened(key, data, _BEATS)
    if body is None:
        return None
    _, node, stamp, received, _ = _BEAT.unpack(body)
    return Beat(node, stamp, received)


def unpack_echo(key: bytes, data: bytes) -> Echo | None:
    """The echo that these bytes are; None if they are none of this job's."""
    body = _opened(key, data, _ECHOES)
    if body is None:
        return None
    _, node, stamp, kept, aborted = _ECHO.unpack(body)
    return Echo(node, stamp, kept, aborted)


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + hashlib.blake2b(body, key=key, digest_size=_MAC_BYTES).digest()


def _opened(key: bytes, data: bytes, kind: bytes) -> bytes | None:
    if len(data) != DATAGRAM_BYTES or data[:4] != kind:
        return None
    body = data[:-_MAC_BYTES]
    mac = hashlib.blake2b(body, key=key, digest_size=_MAC_BYTES).digest()
    return body if hmac.compare_digest(mac, data[-_MAC_BYTES:]) else None
