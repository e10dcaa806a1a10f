"""Safetensors files: a JSON header with the location of each tensor, then the bytes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .filetensor import FileTensor, contiguous, open_file

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_NAMES = {name: code for code, name in _DTYPES.items()}
_HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class SafetensorsHeader:
    """The tensors of a file, and the strings that were stored with them."""

    tensors: dict[str, FileTensor]
    metadata: dict[str, str]


def begins(path: Path) -> bool:
    """Whether a file looks as if it were one of safetensors: a length, then a brace."""
    handle = open_file(path)
    try:
        first = os.pread(handle, 9, 0)
    finally:
        os.close(handle)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") <= _HEADER_LIMIT_BYTES


def read_header(path: Path) -> SafetensorsHeader:
    """The file's tensors. Raises ConversionError if it is truncated, or its tensors overlap or exceed it."""
    handle = open_file(path)
    try:
        size = os.fstat(handle).st_size
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if size < 8 or length > min(_HEADER_LIMIT_BYTES, size - 8):
            raise ConversionError(f"{path}: not a safetensors file, or torn: {size} bytes, a header of {length}")
        data = os.pread(handle, length, 8)
    finally:
        os.close(handle)
    try:
        header = json.loads(data)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path}: its header is not that of a safetensors file: {error!r}") from error
    _check_apart(path, tensors)
    return SafetensorsHeader(tensors, metadata)


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> FileTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ConversionError(f"{path}: {name}: element type {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if not all(isinstance(each, int) and each >= 0 for each in (*shape, begin, end)):
        raise ConversionError(f"{path}: {name}: shape {list(shape)} at bytes {begin} to {end}")
    tensor = FileTensor(path, base + begin, end - begin, _DTYPES[dtype], shape, contiguous(shape))
    if tensor.nbytes != end - begin:
        raise ConversionError(f"{path}: {name}: {dtype} {list(shape)} has {tensor.nbytes} bytes, not {end - begin}")
    if base + end > size:
        raise ConversionError(f"{path}: torn: {name} ends at byte {base + end}; the file has {size}")
    return tensor


def _check_apart(path: Path, tensors: dict[str, FileTensor]) -> None:
    ends, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].room)):
        if tensor.offset < ends:
            raise ConversionError(f"{path}: {name} and {before} overlap at byte {tensor.offset}")
        ends, before = tensor.offset + tensor.room, name


def layout(tensors: dict[str, Lazy], dtypes: dict[str, str], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """(the file's header, the offset of each tensor in the file) for tensors stored with these `dtypes`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    begins_at: dict[str, int] = {}
    # Large elements first, as the library does it, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-numpy_dtype(dtypes[name]).itemsize, name))
    for name in order:
        nbytes = tensors[name].elements * numpy_dtype(dtypes[name]).itemsize
        code = _NAMES.get(dtypes[name])
        if code is None:
            raise ConversionError(f"{name}: element type {dtypes[name]} cannot be stored in safetensors")
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [at, at + nbytes]}
        begins_at[name] = at
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins_at.items()}
