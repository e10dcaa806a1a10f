"""A shard's state as bytes: a JSON line of contents, then the tensors, each aligned. No pickle.

The first tensor is the shard's parameter values ("value"); the others are the optimizer's state for it, by torch's own
names. Values that are no tensors (Python numbers, None) stand in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from .copying import CheckedCopy, tensor_bytes
from .record_format import ALIGN, Item, aligned, head, items

_ZEROS = memoryview(bytes(ALIGN))
ShardState = Mapping[str, Any]  # name -> Tensor, number or None


def _place(item: tuple[str, Any]) -> tuple[bool, str]:
    """The values first, then the states by name: equal states have equal records, wherever they come from."""
    return item[0] != "value", item[0]


class ShardRecord:
    """A shard's state, ready to be written: `length` bytes."""

    def __init__(self, state: ShardState) -> None:
        items: list[list[Any]] = []
        self._tensors: list[Tensor] = []
        for name, value in sorted(state.items(), key=_place):
            if isinstance(value, Tensor):
                items.append([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
                self._tensors.append(value.detach())
            else:
                items.append([name, None, value])
        contents = json.dumps(items, separators=(",", ":")).encode()
        begin = head(len(contents)) + contents
        self._head = begin + bytes(aligned(len(begin)) - len(begin))  # padding too: equal states, equal checksums
        self.length = len(self._head) + sum(aligned(t.numel() * t.element_size()) for t in self._tensors)

    def write(self, out: memoryview, seed: int = 0) -> int:
        """Write the record to the first `length` bytes of `out`; returns their xxh3_64, taken on the way."""
        self.write_values(out)
        return self.write_rest(out, seed)

    def write_values(self, out: memoryview) -> None:
        """Write what others can change as soon as their code runs: the contents, and the parameter values."""
        out[: len(self._head)] = self._head
        if self._tensors and self._tensors[0].numel():
            source = tensor_bytes(self._tensors[0])
            out[len(self._head) : len(self._head) + len(source)] = source

    def write_rest(self, out: memoryview, seed: int = 0) -> int:
        """Write all that `write_values` left; returns the checksum of the whole, in which its part is as written."""
        copy = CheckedCopy(seed)
        written = len(self._head) + (self._tensors[0].numel() * self._tensors[0].element_size() if self._tensors else 0)
        copy.add(out[:written])
        for start, source in self._pieces(written):
            copy.copy(source, out[start : start + len(source)])
        return copy.checksum

    def _pieces(self, first: int) -> Iterator[tuple[int, memoryview]]:
        """What begins at byte `first` or after it."""
        at = len(self._head)
        for tensor in self._tensors:
            size = tensor.numel() * tensor.element_size()
            if size and at >= first:
                yield at, tensor_bytes(tensor)
            if at + size >= first:
                yield at + size, _ZEROS[: aligned(size) - size]
            at += aligned(size)

    @property
    def devices(self) -> set[torch.device]:
        """Where the state lies."""
        return {tensor.device for tensor in self._tensors}


def record_bytes(state: ShardState) -> int:
    """The length of the record of `state`."""
    return ShardRecord(state).length


def read_record(data: Buffer) -> dict[str, Any]:
    """The state in a record. Raises ValueError if it is malformed.

    Tensors are on the CPU, and share the memory of `data`, or of a copy where that may not be written to.
    """
    view = memoryview(data)
    if view.readonly:
        view = memoryview(bytearray(view))
    return {item.name: _tensor(item) if item.dtype else item.value for item in items(view)}


def _tensor(item: Item) -> Tensor:
    dtype: torch.dtype = getattr(torch, item.dtype)
    array: np.ndarray = item.value
    if not array.size:
        return torch.empty(array.shape, dtype=dtype)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).view(array.shape)
