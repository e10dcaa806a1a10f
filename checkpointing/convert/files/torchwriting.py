"""Files that `torch.load` reads, written without torch and one tensor at a time: a pickle, and a zip around it."""

from __future__ import annotations

import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .filetensor import contiguous
from .unpickling import STORAGES, Dtype

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_ROOT = "archive"


@dataclass(frozen=True)
class Size:
    """torch.Size, where it is a value in a file."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """An object of a class that the reader's library has: `module.name`, with these attributes."""

    module: str
    name: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A flat tensor that is too large to be held: `chunks` gives its elements run by run, in order."""

    elements: int
    dtype: str
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.elements,)

    @property
    def nbytes(self) -> int:
        return self.elements * numpy_dtype(self.dtype).itemsize


def save(path: Path, value: Any) -> None:
    """Write a file of `torch.save`, synchronised. In `value`: what JSON has, tuples, `Lazy`s, sizes and types.

    A `Lazy` is read when its turn comes and let go. Equal objects (the same `Lazy` twice) are one storage.
    """
    save_all({path: value})


def save_all(files: Mapping[Path, Any]) -> None:
    """As `save`, for several files: synchronised together at the end, which takes fewer turns of the disk."""
    with ExitStack() as opened:
        handles = [(_save(opened.enter_context(path.open("wb")), value)) for path, value in files.items()]
        for handle in handles:
            os.fsync(handle)


def _save(file: BinaryIO, value: Any) -> int:
    pickler = _Pickler()
    data = pickler.dump(value)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), data)
        archive.writestr(_entry("byteorder"), b"little")
        for number, tensor in enumerate(pickler.tensors):
            _write(archive, number, tensor)
        archive.writestr(_entry("version"), b"3\n")
    file.flush()
    return file.fileno()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{_ROOT}/{name}")


def _write(archive: zipfile.ZipFile, number: int, tensor: Lazy | Stream) -> None:
    if isinstance(tensor, Stream):
        written = 0
        with archive.open(_entry(f"data/{number}"), "w", force_zip64=tensor.nbytes >= 1 << 31) as entry:
            for chunk in tensor.chunks():
                entry.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                written += chunk.nbytes
        if written != tensor.nbytes:
            raise ConversionError(f"a flat tensor of {tensor.nbytes} bytes was given {written}")
        return
    array = tensor.read()
    if array.shape != tensor.shape or array.nbytes != tensor.nbytes:
        raise ConversionError(f"{tensor.origin}: gave {array.dtype}{list(array.shape)}; expected {list(tensor.shape)}")
    with archive.open(_entry(f"data/{number}"), "w", force_zip64=array.nbytes >= 1 << 31) as entry:
        if array.nbytes:
            entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class _Pickler:
    """Protocol 2, of the few kinds of values that there are. Tensors are numbered in the order they are met."""

    def __init__(self) -> None:
        self.tensors: list[Lazy | Stream] = []
        self._numbers: dict[int, int] = {}
        self._out: list[bytes] = []

    def dump(self, value: Any) -> bytes:
        self._out = [b"\x80\x02"]
        self._save(value)
        self._out.append(b".")
        return b"".join(self._out)

    def _save(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self._out.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self._out.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            data = value.encode()
            self._out.append(b"X" + struct.pack("<I", len(data)) + data)
        elif isinstance(value, Lazy | Stream):
            self._tensor(value)
        elif isinstance(value, Dtype):
            self._global("torch", value.name)
        elif isinstance(value, Size):
            self._call("torch", "Size", (value.shape,))
        elif isinstance(value, Instance):
            self._instance(value)
        else:
            self._container(value)

    def _container(self, value: Any) -> None:
        if isinstance(value, OrderedDict):
            self._call("collections", "OrderedDict", ())
            self._items(value)
        elif isinstance(value, dict):
            self._out.append(b"}")
            self._items(value)
        elif isinstance(value, tuple):
            self._sequence(b"(", value, b"t")
        elif isinstance(value, list):
            self._sequence(b"](", value, b"e")
        else:
            raise TypeError(f"a {type(value).__name__} cannot be written: {value!r}")

    def _sequence(self, begin: bytes, items: Any, end: bytes) -> None:
        self._out.append(begin)
        for item in items:
            self._save(item)
        self._out.append(end)

    def _items(self, value: dict[Any, Any]) -> None:
        self._out.append(b"(")
        for key, item in value.items():
            self._save(key)
            self._save(item)
        self._out.append(b"u")

    def _integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._out.append(b"J" + struct.pack("<i", value))
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        self._out.append(b"\x8a" + bytes([len(data)]) + data)

    def _global(self, module: str, name: str) -> None:
        self._out.append(f"c{module}\n{name}\n".encode())

    def _call(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self._global(module, name)
        self._save(arguments)
        self._out.append(b"R")

    def _instance(self, value: Instance) -> None:
        self._global(value.module, value.name)
        self._out.append(b")\x81")
        self._save(value.fields)
        self._out.append(b"b")

    def _tensor(self, tensor: Lazy | Stream) -> None:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        kind = _STORAGE_NAMES.get(tensor.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3")
        self._out.append(b"((")
        self._save("storage")
        self._global(*(("torch", kind) if kind else ("torch.storage", "UntypedStorage")))
        self._save(str(self._numbers[id(tensor)]))
        self._save("cpu")
        self._save(tensor.elements if kind else tensor.nbytes)
        self._out.append(b"tQ")
        arguments: tuple[Any, ...] = (0, tensor.shape, contiguous(tensor.shape), False, OrderedDict())
        for value in arguments:
            self._save(value)
        if not kind:
            self._save(Dtype(tensor.dtype))
        self._out.append(b"tR")
