"""One number for a whole training state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from everstep.comms.mesh.tensors import raw


def state_digest(state: Mapping[str, Any]) -> str:
    """The xxh3-128 of every name and every byte of a nested mapping of tensors and plain values."""
    hasher = xxhash.xxh3_128()
    _feed(hasher, state)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value):
            hasher.update(f"{name}:".encode())
            _feed(hasher, value[name])
    elif isinstance(value, Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.numel():
            hasher.update(raw(value))
    else:
        hasher.update(repr(value).encode())


def content_digest(item: Any) -> str:
    """The xxh3-128 of a sample: of its structure and of the bytes in it, equal in every process.

    What is neither a container, an array, text nor a number counts by its type alone, unless it gives its bytes.
    """
    hasher = xxhash.xxh3_128()
    _feed_sample(hasher, item)
    return hasher.hexdigest()


def _feed_sample(hasher: Any, item: Any) -> None:
    hasher.update(f"<{type(item).__name__}>".encode())
    if isinstance(item, Mapping):
        for name, value in item.items():
            hasher.update(f"{name!r}:".encode())
            _feed_sample(hasher, value)
    elif isinstance(item, list | tuple):
        for value in item:
            _feed_sample(hasher, value)
    elif isinstance(item, Tensor):
        hasher.update(f"{item.dtype}{tuple(item.shape)}".encode())
        dense = item if item.layout is torch.strided else item.to_dense()
        if dense.numel():
            hasher.update(raw(dense))
    elif isinstance(item, np.ndarray | np.generic):
        hasher.update(f"{item.dtype}{item.shape}".encode())
        hasher.update(repr(item.tolist()).encode() if item.dtype.hasobject else item.tobytes())
    elif isinstance(item, bytes | bytearray):
        hasher.update(bytes(item))
    elif item is None or isinstance(item, bool | int | float | complex | str):
        hasher.update(repr(item).encode())
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            hasher.update(f"{field.name}:".encode())
            _feed_sample(hasher, getattr(item, field.name))
    elif callable(getattr(item, "tobytes", None)):  # such as an image of PIL
        hasher.update(item.tobytes())
