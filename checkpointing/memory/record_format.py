"""The layout of a shard's record, without torch: a head, a JSON line of contents, then the tensors, each aligned.

The head is the length of the JSON in six bytes and the version of the format in two, little-endian. The first records
had no version: there these two bytes are zero, and all the rest is as in version 1.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from everstep.checkpointing.universal.dtypes import numpy_dtype

ALIGN = 64
HEAD_BYTES = 8
VERSION = 1
_LENGTH_BYTES = 6


class Item(NamedTuple):
    """One entry of a record: a tensor, as an array that shares the record's memory, or a JSON value."""

    name: str
    dtype: str  # torch's name; empty for a JSON value
    value: Any


def aligned(size: int) -> int:
    """`size`, rounded up to where the next tensor begins."""
    return -(-size // ALIGN) * ALIGN


def head(size: int) -> bytes:
    """What stands before `size` bytes of contents."""
    return size.to_bytes(_LENGTH_BYTES, "little") + VERSION.to_bytes(HEAD_BYTES - _LENGTH_BYTES, "little")


def items(data: bytes | memoryview) -> list[Item]:
    """What is in a record, in order. Raises ValueError if it is malformed."""
    view = memoryview(data)
    size = int.from_bytes(view[:_LENGTH_BYTES], "little")
    version = int.from_bytes(view[_LENGTH_BYTES:HEAD_BYTES], "little")
    if version not in (0, VERSION):
        raise ValueError(
            f"a shard record is of version {version} of the format, and this everstep reads version {VERSION}: run the "
            "same everstep on every node"
        )
    try:
        contents = json.loads(bytes(view[HEAD_BYTES : HEAD_BYTES + size]))
    except ValueError as error:
        raise ValueError(f"a shard record does not begin with its contents: {error}") from None
    found: list[Item] = []
    offset = aligned(HEAD_BYTES + size)
    for name, dtype, rest in contents:
        if dtype is None:
            found.append(Item(name, "", rest))
            continue
        kind = numpy_dtype(dtype)
        count = int(np.prod(rest, dtype=np.int64))
        array = np.frombuffer(view, kind, count, offset) if count else np.empty(0, kind)
        found.append(Item(name, dtype, array.reshape(rest)))
        offset += aligned(count * kind.itemsize)
    return found
