"""The index of a torch distributed checkpoint, `.metadata`: read without torch, checked against the files beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.boxes import Boxes
from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files import torchfile
from everstep.checkpointing.universal.dtypes import NAMES

NAME = ".metadata"
_MODULE = "torch.distributed.checkpoint"
_STUBS = {
    (module, name): torchfile.record(f"{module}.{name}")
    for module, names in {
        f"{_MODULE}.metadata": (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{_MODULE}.filesystem": ("_StorageInfo",),
        # megatron-core keeps the plans that it saved by
        f"{_MODULE}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class FileSpan:
    """The location of an item: a file embedded in `file`, at [offset, offset + length)."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, in its coordinates, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: FileSpan


@dataclass(frozen=True)
class Tensor:
    """A tensor of the index; its chunks cover it exactly once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def boxes(self) -> Boxes[Chunk]:
        return Boxes(self.chunks)


@dataclass
class Index:
    """The content of a `.metadata`. `paths`: each name's keys in the nested dictionary that was saved, if recorded."""

    folder: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, FileSpan] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)


def read_index(folder: Path) -> Index:
    """The index in `folder`. Raises ConversionError if there is none, or what it names is not there or is short."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConversionError(f"{folder}: no {NAME}: not a torch distributed checkpoint, or one half written") from None
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
    root = torchfile.load_pickle(data, str(path), stubs=_STUBS)
    fields = getattr(root, "fields", {})
    if not {"state_dict_metadata", "storage_data"} <= fields.keys():
        raise ConversionError(f"{path}: holds {type(root).__name__}; expected torch.distributed.checkpoint's Metadata")
    try:
        return _index(folder, fields)
    except ConversionError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: not as torch.distributed.checkpoint writes it: {error!r}") from error


def _index(folder: Path, fields: dict[str, Any]) -> Index:
    spans = _Spans(folder, fields["storage_data"] or {})
    index = Index(folder, paths=_paths(fields.get("planner_data")))
    for name, entry in fields["state_dict_metadata"].items():
        if entry.kind.endswith("BytesStorageMetadata"):
            index.objects[name] = spans.find(name, None)
        else:
            index.tensors[name] = _tensor(name, entry.fields, spans)
    return index


def _paths(planner_data: Any) -> dict[str, tuple[str | int, ...]]:
    if not isinstance(planner_data, dict):
        return {}
    return {name: tuple(path) for name, path in planner_data.items() if isinstance(path, tuple | list)}


def _tensor(name: str, fields: dict[str, Any], spans: _Spans) -> Tensor:
    properties = fields["properties"]
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.fields["dtype"]
    if dtype.name not in NAMES:
        raise ConversionError(f"{spans.where}: {name}: element type {dtype.name} is not known")
    shape = tuple(int(size) for size in fields["size"])
    chunks = []
    for chunk in fields["chunks"]:
        offsets, sizes = tuple(chunk.fields["offsets"]), tuple(chunk.fields["sizes"])
        chunks.append(Chunk(offsets, sizes, spans.find(name, offsets)))
        if any(at < 0 or at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise ConversionError(
                f"{spans.where}: {name}: chunk {list(offsets)}+{list(sizes)} is outside {list(shape)}"
            )
    covered = sum(int(np.prod(chunk.sizes, dtype=np.int64)) for chunk in chunks)
    if covered != int(np.prod(shape, dtype=np.int64)):
        raise ConversionError(
            f"{spans.where}: {name}: its chunks have {covered} elements; expected {list(shape)}, each element once"
        )
    return Tensor(name, dtype.name, shape, tuple(chunks))


class _Spans:
    """Where the items are, by name and offset; each file is looked at once."""

    def __init__(self, folder: Path, storage_data: dict[Any, Any]) -> None:
        self.where = str(folder / NAME)
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._items: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
        for key, info in storage_data.items():
            offset = key.fields.get("offset")
            self._items[key.fields["fqn"], None if offset is None else tuple(offset)] = info.fields

    def find(self, name: str, offset: tuple[int, ...] | None) -> FileSpan:
        item = self._items.get((name, offset))
        if item is None:
            raise ConversionError(f"{self.where}: says nowhere where {name} at {list(offset or ())} is stored")
        if item.get("transform_descriptors"):
            raise ConversionError(
                f"{self.where}: {name} is stored transformed by {list(item['transform_descriptors'])}; "
                "expected it as torch.save wrote it"
            )
        relative, begin, length = str(item["relative_path"]), int(item["offset"]), int(item["length"])
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts or begin < 0 or length < 0:
            raise ConversionError(
                f"{self.where}: {name} is at {relative!r}; expected a file in the checkpoint's folder"
            )
        if relative not in self._sizes:
            try:
                self._sizes[relative] = (self._folder / relative).stat().st_size
            except OSError as error:
                raise ConversionError(
                    f"{self._folder / relative}: {error.strerror}, but {NAME} says that {name} is in it"
                ) from error
        if begin + length > self._sizes[relative]:
            raise ConversionError(
                f"{self._folder / relative}: torn: it has {self._sizes[relative]} bytes; expected {begin + length} "
                f"or more, for {name}"
            )
        return FileSpan(self._folder / relative, begin, length)
