"""Safetensors that torch's HuggingFaceStorageWriter saved rank by rank (`save_distributed=True`): shards of tensors.

The files record the offset of each piece, but neither the whole's size nor the number of files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.boxes import Boxes
from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files import safetensors_file
from everstep.checkpointing.convert.files.safetensors_file import SafetensorsHeader
from everstep.checkpointing.convert.formats.dcp.metadata import Chunk, FileSpan, Tensor

_KEY = "DCP_SHARDING_INFO"
_PREFIX = "shard-"
_NUMBERED = re.compile(r"shard-(\d+)-")


def offsets_of(path: Path, header: SafetensorsHeader) -> dict[str, tuple[int, ...]] | None:
    """Where in its tensor each piece of a file begins; None if the file is none of a sharded save."""
    text = header.metadata.get(_KEY)
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        offsets = {name: tuple(int(at) for at in found[name]["saved_offsets"]) for name in header.tensors}
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: its {_KEY} is not as torch writes it: {error!r}") from error
    whole = not any(any(each) for each in offsets.values())
    return None if whole and not path.name.startswith(_PREFIX) else offsets


def check_whole(path: Path, header: SafetensorsHeader) -> None:
    """Raise ConversionError for a file that is one shard of several."""
    if offsets_of(path, header) is not None:
        raise ConversionError(
            f"{path}: is one shard of a distributed save, and its tensors are parts: give the folder with all shards"
        )


def assemble(paths: Sequence[Path]) -> dict[str, Tensor] | None:
    """The whole tensors that files of one sharded save make up; None if they are something else."""
    if not paths:
        return None
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, str] = {}
    for path in paths:
        header = safetensors_file.read_header(path)
        offsets = offsets_of(path, header)
        if offsets is None:
            return None
        for name, tensor in header.tensors.items():
            if dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
                raise ConversionError(f"{path}: {name} is {tensor.dtype} here, and {dtypes[name]} in other shards")
            if len(offsets[name]) != len(tensor.shape):
                raise ConversionError(f"{path}: {name} of shape {list(tensor.shape)} begins at {list(offsets[name])}")
            chunks.setdefault(name, []).append(Chunk(offsets[name], tensor.shape, FileSpan(path, 0, 0)))
    numbers = {int(found[1]) for path in paths if (found := _NUMBERED.match(path.name))}
    if numbers and (missing := set(range(1, max(numbers) + 1)) - numbers):
        raise ConversionError(f"{paths[0].parent}: shard {min(missing)} is missing: there are {len(numbers)} others")
    return {name: _whole(name, dtypes[name], found) for name, found in chunks.items()}


def _whole(name: str, dtype: str, chunks: list[Chunk]) -> Tensor:
    where = chunks[0].span.file.parent
    if len({len(chunk.offsets) for chunk in chunks}) > 1:
        raise ConversionError(f"{where}: {name} has different numbers of dimensions in different shards")
    ends = [[at + size for at, size in zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in chunks]
    shape = tuple(max(axis) for axis in zip(*ends, strict=True))
    boxes = Boxes(chunks)
    for chunk in chunks:
        if sum(1 for _ in boxes.meeting(chunk.offsets, chunk.sizes)) > 1:
            raise ConversionError(f"{where}: two shards hold the same part of {name}, at {list(chunk.offsets)}")
    covered = sum(int(np.prod(chunk.sizes, dtype=np.int64)) for chunk in chunks)
    if covered != int(np.prod(shape, dtype=np.int64)):
        raise ConversionError(
            f"{where}: the shards hold {covered} elements of {name}; expected {list(shape)}, each element once: a "
            "shard is missing"
        )
    return Tensor(name, dtype, shape, tuple(chunks))
