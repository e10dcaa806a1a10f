"""A checkpoint's content in any format: named tensors, read lazily, and their metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everstep.checkpointing.universal.dtypes import numpy_dtype


class ConversionError(ValueError):
    """A checkpoint cannot be read, understood or written as requested: one line that says what, where and why."""


@dataclass(frozen=True)
class Lazy:
    """A whole tensor that is read lazily. `read` may be called from any thread, and more than once.

    `dtype` is torch's name ("float32", "bfloat16"); `read` gives a C-contiguous array of that type and shape;
    `origin` says where it is from, for errors and `--explain`.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    origin: str = ""

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.elements * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Scalar:
    """One number of an optimizer's state that is no tensor of the parameter's shape: its step count."""

    dtype: str
    value: float | int


@dataclass
class Content:
    """A checkpoint. Names are those of the live module: one per layer, nothing stacked, nothing fused that was not.

    `params`: trainable, in the highest precision there is. `optimizer`: state name ("exp_avg") -> parameter name ->
    tensor of the parameter's shape. `scalars`: state name ("step") -> parameter name -> number. `tied`: alias -> the
    name in `params` it shares its tensor with. `dtypes`: what the module computes in, where it is not the type in
    `params`. `groups`: the optimizer's settings, each with the names of its "params". `extra`: JSON values that are
    kept and not understood, by the name of the format they are from. `other`: tensors that are neither the model's nor
    an optimizer's, by their whole names. `unknown`: names of what is not understood and cannot be kept.
    """

    step: int
    params: dict[str, Lazy] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Lazy]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    buffers: dict[str, Lazy] = field(default_factory=dict)
    frozen: dict[str, Lazy] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)  # parameter -> pipeline layer, where known
    scheduler: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # parameter -> the rule that made it, for `--explain`
    other: dict[str, Lazy] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # lines that the user should see
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (what is not in the result, why)

    def tensors(self) -> Iterator[tuple[str, str, Lazy]]:
        """Every tensor as (room, name, tensor); rooms: "params", "optimizer/<state>", "buffers", "frozen", "other"."""
        for name, tensor in self.params.items():
            yield "params", name, tensor
        for state, tensors in self.optimizer.items():
            for name, tensor in tensors.items():
                yield f"optimizer/{state}", name, tensor
        for name, tensor in self.buffers.items():
            yield "buffers", name, tensor
        for name, tensor in self.frozen.items():
            yield "frozen", name, tensor
        for name, tensor in self.other.items():
            yield "other", name, tensor
