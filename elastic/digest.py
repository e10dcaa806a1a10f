"""One number for a whole training state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xxhash
from torch import Tensor

from ..comms.tensors import raw


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
