"""Tensors of a torch distributed checkpoint: boxes of them, put together of the chunks that they are stored in."""

from __future__ import annotations

from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.convert.files import safetensors_file, torchfile
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .metadata import Chunk, Index, Tensor


def lazy(tensor: Tensor) -> Lazy:
    """The whole tensor."""
    return box(tensor, (0,) * len(tensor.shape), tensor.shape, tensor.shape)


def box(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> Lazy:
    """The box at `offsets` of `sizes`, as a tensor of `shape`, which has as many elements."""
    return Lazy(shape, tensor.dtype, lambda: read_box(tensor, offsets, sizes).reshape(shape), tensor.name)


def read_box(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """The elements of a box of a tensor. Reads no more of the chunks than the rows that it needs."""
    out = np.empty(sizes, numpy_dtype(tensor.dtype))
    for chunk, source, target in tensor.boxes.meeting(offsets, sizes):
        place: Any = (*target, ...)  # a view even where there are no axes
        _fill(out[place], stored(tensor, chunk), source)
    return out


def stored(tensor: Tensor, chunk: Chunk) -> FileTensor:
    """A chunk in its file. Raises ConversionError if the file's content contradicts the index."""
    span = chunk.span
    if safetensors_file.begins(span.file):
        found: Any = safetensors_file.read_header(span.file).tensors.get(tensor.name)
    else:
        found = torchfile.load_span(span.file, span.offset, span.length)
    if not isinstance(found, FileTensor):
        raise ConversionError(f"{span.file} at byte {span.offset}: expected {tensor.name}, a tensor; it holds none")
    if found.shape != chunk.sizes or found.dtype != tensor.dtype:
        raise ConversionError(
            f"{span.file} at byte {span.offset}: holds {found.dtype} {list(found.shape)}; the index says that it is "
            f"{tensor.name} at {list(chunk.offsets)}, {tensor.dtype} {list(chunk.sizes)}"
        )
    return found


def _fill(out: np.ndarray, found: FileTensor, ranges: list[tuple[int, int]]) -> None:
    """Read a box of a stored chunk into `out`, without a copy if both are runs of memory.

    Otherwise the run of the file that holds the box is read, and what is not of the box is left.
    """
    if not found.is_contiguous:
        out[...] = found.read()[tuple(slice(*each) for each in ranges)]
        return
    start, inner = 0, found.elements
    axis = 0
    for axis, (begin, end) in enumerate(ranges):
        inner //= found.shape[axis]
        start += begin * inner
        if end - begin > 1:
            break
    begin, end = ranges[axis] if ranges else (0, 1)
    run = found.part(start, (end - begin) * inner)
    if run.elements == out.size and out.flags.c_contiguous:
        run.read_into(out)
        return
    rows = run.read().reshape((1,) * axis + (end - begin, *found.shape[axis + 1 :]))
    out[...] = rows[(slice(None),) * (axis + 1) + tuple(slice(*each) for each in ranges[axis + 1 :])]


def load_object(index: Index, name: str) -> Any:
    """An object of the checkpoint that is no tensor, read without trust."""
    span = index.objects[name]
    return torchfile.load_span(span.file, span.offset, span.length)
