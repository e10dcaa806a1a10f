"""A shard's state as bytes: a JSON line of contents, then the tensors, each aligned. No pickle.

The first tensor is the shard's parameter values ("value"); the others are the optimizer's state for it, by torch's own
names. Values that are no tensors (Python numbers, None) stand in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64
ShardState = Mapping[str, Any]  # name -> Tensor, number or None


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def record_bytes(state: ShardState) -> int:
    """The length of the record of `state`."""
    return _plan(state)[1]


def _plan(state: ShardState) -> tuple[bytes, int, list[tuple[int, Tensor]]]:
    items: list[list[Any]] = []
    tensors: list[Tensor] = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            items.append([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
            tensors.append(value)
        else:
            items.append([name, None, value])
    head = json.dumps(items, separators=(",", ":")).encode()
    head = len(head).to_bytes(8, "little") + head
    places, offset = [], _aligned(len(head))
    for tensor in tensors:
        places.append((offset, tensor))
        offset += _aligned(tensor.numel() * tensor.element_size())
    return head, offset, places


def write_record(state: ShardState, out: Tensor) -> int:
    """Write the record of `state` into the uint8 tensor `out`; returns its length."""
    head, length, places = _plan(state)
    out[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    out[len(head) : _aligned(len(head))].zero_()  # padding too, so that equal states have equal checksums
    for offset, tensor in places:
        size = tensor.numel() * tensor.element_size()
        out[offset : offset + size].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        out[offset + size : offset + _aligned(size)].zero_()
    return length


def read_record(data: bytes) -> dict[str, Any]:
    """The state in a record; tensors are new and on the CPU. Raises ValueError if it is malformed."""
    size = int.from_bytes(data[:8], "little")
    try:
        items = json.loads(data[8 : 8 + size])
    except ValueError as error:
        raise ValueError(f"a shard record does not begin with its contents: {error}") from None
    state: dict[str, Any] = {}
    offset = _aligned(8 + size)
    for name, dtype, rest in items:
        if dtype is None:
            state[name] = rest
            continue
        tensor = torch.empty(rest, dtype=getattr(torch, dtype))
        count = tensor.numel()
        if count:
            raw = torch.frombuffer(bytearray(data[offset : offset + count * tensor.element_size()]), dtype=tensor.dtype)
            tensor.view(-1).copy_(raw)
        state[name] = tensor
        offset += _aligned(count * tensor.element_size())
    return state
