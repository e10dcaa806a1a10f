"""Tensors as message payloads: a JSON head (dtypes and shapes), then the raw bytes. No pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Buffer


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy().data


def encode(tensors: Sequence[Tensor | None]) -> list[Buffer]:
    """A payload of buffers for `Communicator.send`."""
    head = json.dumps([None if t is None else [str(t.dtype)[6:], list(t.shape)] for t in tensors]).encode()
    head += b" " * (-(len(head) + 4) % 16)
    buffers: list[Buffer] = [len(head).to_bytes(4, "little") + head]
    buffers += [raw(t) for t in tensors if t is not None and t.numel()]
    return buffers


def decode(data: memoryview, device: torch.device) -> list[Tensor | None]:
    """The tensors of a payload; they share its memory where they stay on the CPU."""
    size = int.from_bytes(data[:4], "little")
    offset = 4 + size
    tensors: list[Tensor | None] = []
    for item in json.loads(bytes(data[4:offset])):
        if item is None:
            tensors.append(None)
            continue
        dtype: torch.dtype = getattr(torch, item[0])
        count = 1
        for extent in item[1]:
            count *= extent
        tensor = torch.empty(item[1], dtype=dtype)
        if count:
            tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(item[1])
        offset += count * dtype.itemsize
        tensors.append(tensor.to(device))
    return tensors
