"""Writing torch distributed checkpoints: one file for each tensor, in parallel, and `.metadata` when all are there."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .metadata import NAME

_COPIES = 2  # of a tensor in memory while it is written: as read, and converted
_SMALL_BYTES = 1 << 16  # tensors up to here share a file


@dataclass(frozen=True)
class Part:
    """A box of the tensor `name`, whose whole shape is `shape`; `read` gives its elements, of `sizes`, as `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.sizes, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Object:
    """Something that is no tensor, stored as torch.save stores it."""

    name: str
    value: Any


def write_checkpoint(
    out: Path,
    parts: Iterable[Part],
    objects: Iterable[Object],
    work: PieceWork,
    paths: dict[str, tuple[str | int, ...]] | None = None,
) -> None:
    """Write them into `out`. `paths`: where each name is in the nested dictionary that a reader will get."""
    work.make(out)
    parts = list(parts)
    large = [part for part in parts if part.nbytes > _SMALL_BYTES]
    small = [part for part in parts if part.nbytes <= _SMALL_BYTES]
    files = [f"__0_{at + 1}.distcp" for at in range(len(large))]
    work.run(
        Piece(file, part.nbytes * _COPIES, _writer(out / file, part)) for part, file in zip(large, files, strict=True)
    )
    spans: _Spans = {
        (part.name, part.offsets): (file, 0, (out / file).stat().st_size)
        for part, file in zip(large, files, strict=True)
    }
    named = list(objects)
    _write_small(out / "__0_0.distcp", small, named, spans)
    _write_index(out, parts, named, spans, paths)


_Spans = dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]  # (name, offsets) -> (file, offset, length)


def _writer(path: Path, part: Part) -> Callable[[], None]:
    return lambda: save_with_torch(path, tensor_of(part.read().reshape(part.sizes), part.dtype))


class _Kept:
    """A file for torch to write to; it keeps the first error, since torch's own error hides the cause."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_with_torch(path: Path, value: Any) -> None:
    """torch.save, synchronised. Raises OSError for what the disk refuses."""
    import torch

    with path.open("wb", buffering=0) as stream:
        kept = _Kept(stream)
        try:
            torch.save(value, kept)  # type: ignore[arg-type]
        except (RuntimeError, OSError):
            if kept.error is None:
                raise
            raise OSError(kept.error.errno, kept.error.strerror, str(path)) from None
        os.fsync(stream.fileno())


def tensor_of(array: np.ndarray, dtype: str) -> Any:
    """A torch tensor that shares the memory of an array with torch's element type `dtype`."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype.isbuiltin == 1:  # 2: of ml_dtypes, which torch does not take
        return torch.from_numpy(array)
    raw = torch.from_numpy(array.reshape(-1).view(f"uint{array.dtype.itemsize * 8}"))
    return raw.view(getattr(torch, dtype)).reshape(array.shape)


def _write_small(path: Path, parts: list[Part], objects: list[Object], spans: _Spans) -> None:
    """Write small tensors and objects into one file, and note in `spans` where they are."""
    import torch

    with path.open("wb") as stream:

        def add(name: str, offsets: tuple[int, ...] | None, value: Any) -> None:
            data = io.BytesIO()
            torch.save(value, data)
            spans[name, offsets] = (path.name, stream.tell(), data.tell())
            stream.write(data.getbuffer())

        for part in parts:
            add(part.name, part.offsets, tensor_of(part.read().reshape(part.sizes), part.dtype))
        for each in objects:
            add(each.name, None, each.value)
        stream.flush()
        os.fsync(stream.fileno())


def _write_index(
    out: Path,
    parts: list[Part],
    objects: list[Object],
    spans: _Spans,
    paths: dict[str, tuple[str | int, ...]] | None,
) -> None:
    import torch
    from torch.distributed.checkpoint import metadata as of
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for part in parts:
        properties = of.TensorProperties(dtype=getattr(torch, part.dtype))
        entry = entries.setdefault(
            part.name, of.TensorStorageMetadata(properties=properties, size=torch.Size(part.shape), chunks=[])
        )
        at = len(entry.chunks)
        entry.chunks.append(of.ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
        storage[of.MetadataIndex(part.name, part.offsets, at)] = _StorageInfo(*spans[part.name, part.offsets])
    for each in objects:
        entries[each.name] = of.BytesStorageMetadata()
        storage[of.MetadataIndex(each.name)] = _StorageInfo(*spans[each.name, None])
    known = {field.name for field in fields(of.Metadata)}
    values: dict[str, Any] = {
        "planner_data": paths,
        "storage_data": storage,
        "storage_meta": of.StorageMeta(),
        "version": "1.0.0",
    }
    save(out / NAME, of.Metadata(entries, **{key: value for key, value in values.items() if key in known}))


def save(path: Path, value: Any) -> None:
    """Pickle a value to a file that appears complete or not at all."""
    import pickle

    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        pickle.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
