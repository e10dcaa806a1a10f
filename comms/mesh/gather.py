"""Every member's payload on every member, by the messages of a communicator."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from .communicator import Communicator, Key, Kind
from .tensors import host_bytes, of_bytes

_WORD_BYTES = 8


def all_gather(comm: Communicator, step: int, index: int, payload: Tensor) -> dict[int, Tensor]:
    """Every member's payload, on every member: gathered by the lowest rank and scattered again. Also a barrier.

    Payloads may differ in size; they come as tensors of uint8 in one dimension.
    2 (n - 1) messages, two hops. A rank that returns knows that every member entered.
    """
    members = comm.members
    root = members[0]
    gather = Key(Kind.GATHER, step, 0, index)
    scatter = Key(Kind.SCATTER, step, 0, index)
    if comm.rank != root:
        comm.send(root, gather, [payload])
        return _unpack(comm.receive(root, scatter))
    packed = of_bytes(host_bytes(payload))
    table = {root: packed}
    waiting = {(rank, gather) for rank in members[1:]}
    while waiting:
        source, key, data = comm.receive_any(waiting)
        table[source] = data
        waiting.discard((source, key))
    message = [_head(table), *(table[rank] for rank in members)]
    for rank in members[1:]:
        comm.send(rank, scatter, message)
    return {rank: table[rank] for rank in members}


def barrier(comm: Communicator, step: int, index: int) -> None:
    """Return once every member has entered."""
    all_gather(comm, step, index, torch.empty(0, dtype=torch.uint8))


def _head(table: Mapping[int, Tensor]) -> Tensor:
    words = [len(table), *(word for rank in sorted(table) for word in (rank, table[rank].nbytes))]
    return of_bytes(struct.pack(f"<{len(words)}q", *words))


def _unpack(message: Tensor) -> dict[int, Tensor]:
    head = host_bytes(message)
    (count,) = struct.unpack_from("<q", head)
    words = struct.unpack_from(f"<{2 * count}q", head, _WORD_BYTES)
    at = _WORD_BYTES * (1 + 2 * count)
    table = {}
    for rank, size in zip(words[::2], words[1::2], strict=True):
        table[rank] = message[at : at + size]
        at += size
    return table
