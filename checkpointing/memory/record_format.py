"""The layout of a shard's record, without torch: a JSON line of contents, then the tensors, each aligned."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from everstep.checkpointing.universal.dtypes import numpy_dtype

ALIGN = 64


class Item(NamedTuple):
    """One entry of a record: a tensor, as an array that shares the record's memory, or a JSON value."""

    name: str
    dtype: str  # torch's name; empty for a JSON value
    value: Any


def aligned(size: int) -> int:
    """`size`, rounded up to where the next tensor begins."""
    return -(-size // ALIGN) * ALIGN


def items(data: bytes | memoryview) -> list[Item]:
    """What is in a record, in order. Raises ValueError if it is malformed."""
    view = memoryview(data)
    size = int.from_bytes(view[:8], "little")
    try:
        contents = json.loads(bytes(view[8 : 8 + size]))
    except ValueError as error:
        raise ValueError(f"a shard record does not begin with its contents: {error}") from None
    found: list[Item] = []
    offset = aligned(8 + size)
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
