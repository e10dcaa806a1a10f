"""Tensors in files, read by position, from any thread, and no more of a file than requested."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype

_LARGEST_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True, slots=True)
class Storage:
    """The location in a file of the contiguous elements of one or more tensors."""

    path: Path
    offset: int
    nbytes: int
    dtype: str

    def __setstate__(self, state: object) -> None:
        raise TypeError("made, never unpickled: a pickle could point it at another file")


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file, not yet read. `offset`: the byte in the file at which its storage, `room` bytes, begins.

    `strides` and `start` (where in the storage the tensor's first element is) are in elements, as in torch.
    `conjugated`, `negated`: the tensor is a view that torch resolves when it is read, and its storage holds the others.
    """

    path: Path
    offset: int
    room: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0
    conjugated: bool = False
    negated: bool = False

    def __setstate__(self, state: object) -> None:
        raise TypeError("made, never unpickled: a pickle could point it at another file")

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.elements * numpy_dtype(self.dtype).itemsize

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.elements == 0
            expected *= size
        return True

    def lazy(self, origin: str = "") -> Lazy:
        return Lazy(self.shape, self.dtype, self.read, origin or self.path.name)

    def part(self, start: int, elements: int) -> FileTensor:
        """Elements [start, start + elements) of a contiguous tensor, as a flat one. Raises ConversionError outside."""
        if not self.is_contiguous or start < 0 or elements < 0 or start + elements > self.elements:
            raise ConversionError(
                f"{self.path}: elements {start} to {start + elements} wanted of a tensor of shape {list(self.shape)}"
            )
        return replace(self, shape=(elements,), strides=(1,), start=self.start + start)

    def view(self, *shape: int) -> FileTensor:
        """The same elements in another shape. Raises ConversionError if their number differs, or they are strided."""
        if int(np.prod(shape, dtype=np.int64)) != self.elements or not self.is_contiguous:
            raise ConversionError(f"{self.path}: a tensor of shape {list(self.shape)} is not a view of {list(shape)}")
        return replace(self, shape=shape, strides=contiguous(shape))

    def read(self) -> np.ndarray:
        """The tensor's elements, C-contiguous, in memory of their own."""
        if self.is_contiguous:
            array = np.empty(self.shape, numpy_dtype(self.dtype))
            self.read_into(array)
            return array
        spread = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = np.empty(spread, numpy_dtype(self.dtype))
        self._pread(flat)
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False), order="C")

    def _resolve(self, array: np.ndarray) -> None:
        if self.conjugated:
            np.conjugate(array, out=array)
        if self.negated:
            np.negative(array, out=array)

    def read_into(self, array: np.ndarray) -> None:
        """Fill a C-contiguous array of the same type and number of elements."""
        if array.size != self.elements or array.dtype != numpy_dtype(self.dtype):
            raise ValueError(f"{array.size} elements of {array.dtype} for {self.elements} of {self.dtype}")
        if self.is_contiguous:
            self._pread(array)
        else:
            array[...] = self.read().reshape(array.shape)

    def _pread(self, array: np.ndarray) -> None:
        if not array.size:
            return
        left = memoryview(array.reshape(-1).view(np.uint8).data)
        at = self.offset + self.start * array.itemsize
        handle = open_file(self.path)
        try:
            while left:
                count = os.preadv(handle, [left[:_LARGEST_READ_BYTES]], at)
                if not count:
                    raise ConversionError(f"{self.path}: ends at byte {at}, inside a tensor; {len(left)} more expected")
                left, at = left[count:], at + count
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot be read: {error.strerror}") from error
        finally:
            os.close(handle)
        self._resolve(array)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
