"""After a conversion: what was written, read again by our own readers, is what was to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.reader import Checkpoint

_EXACT = ("dcp",)  # formats that keep every element type; others keep what the module computes in, or float32
_RUN_BYTES = 1 << 20
Key = tuple[str, str]  # ("weight" or "optimizer/<state>" or "other", name)


def verify_universal(checkpoint: Checkpoint, work: PieceWork) -> None:
    """Raise ConversionError if a file is not what was written: every one is read, and its checksum compared."""
    pieces = [
        Piece(f"verify {file}", size, partial(checkpoint.check_file, file, told, size))
        for file, told, size in checkpoint.manifest.files()
    ]
    try:
        work.run(pieces)
    except CheckpointError as error:
        raise _wrong(str(error)) from None


def verify(wanted: Content, found: Content, to: str, work: PieceWork) -> None:
    """Raise ConversionError if a format's own reader finds other tensors, numbers or steps than were to be written.

    Tensors are compared one by one, within the memory and on the threads of `work`.
    """
    if found.step != wanted.step and not (to == "hf" or not wanted.scalars):
        raise _wrong(f"step {found.step} where {wanted.step} was written")
    pieces = []
    for (room, name), ours, theirs in _pairs(wanted, found):
        size = ours.nbytes + 2 * theirs.nbytes
        pieces.append(Piece(f"verify {room}/{name}", size, _comparing(f"{room}/{name}", ours, theirs, to in _EXACT)))
    work.run(pieces)
    for state, name, ours_, theirs_ in _numbers(wanted, found):
        if theirs_ is None or theirs_.value != ours_.value:
            raise _wrong(f"{state} of {name} is {theirs_ and theirs_.value} where {ours_.value} was written")


def _pairs(wanted: Content, found: Content) -> Iterator[tuple[Key, Lazy, Lazy]]:
    ours, theirs = _flat(wanted), _flat(found)
    for key, tensor in ours.items():
        if key not in theirs:
            raise _wrong(f"{'/'.join(key)} is not there")
        if (
            theirs[key].shape != tensor.shape
            and not _is_padded(tensor, theirs[key])
            and not _is_padded(theirs[key], tensor)
        ):
            raise _wrong(f"{'/'.join(key)} has shape {list(theirs[key].shape)} where {list(tensor.shape)} was written")
        yield key, tensor, theirs[key]
    for key, tensor in theirs.items():
        if key not in ours:
            owner = ours.get((key[0], wanted.tied.get(key[1], "")))
            if owner is None:
                raise _wrong(f"{'/'.join(key)} is there, and was not written")
            yield key, owner, tensor


def _flat(content: Content) -> dict[Key, Lazy]:
    """Parameters, buffers and frozen tensors together: some formats do not distinguish them."""
    weights = ("params", "buffers", "frozen")
    return {("weight" if room in weights else room, name): tensor for room, name, tensor in content.tensors()}


def _is_padded(one: Lazy, other: Lazy) -> bool:
    """Whether `other` has more rows and is else alike: formats pad vocabularies, or leave padding."""
    return len(one.shape) == len(other.shape) > 0 and one.shape[1:] == other.shape[1:] and one.shape[0] < other.shape[0]


def _comparing(what: str, ours: Lazy, theirs: Lazy, exact: bool) -> Callable[[], None]:
    def do() -> None:
        if exact and ours.dtype != theirs.dtype:
            raise _wrong(f"{what} is {theirs.dtype} where {ours.dtype} was written")
        read, written = theirs.read(), cast(ours.read(), theirs.dtype)
        if read.shape != written.shape:
            rows = min(len(read), len(written))
            read, written = read[:rows], written[:rows]
        if not _same_bits(read, written):
            raise _wrong(f"{what} holds other numbers than were written")

    return do


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two contiguous arrays of the same size hold the same bytes; compared run by run, in little memory."""
    ours, theirs = (array.reshape(-1).view(np.uint8) for array in (one, other))
    starts = range(0, len(ours), _RUN_BYTES)
    return all(np.array_equal(ours[at : at + _RUN_BYTES], theirs[at : at + _RUN_BYTES]) for at in starts)


def _numbers(wanted: Content, found: Content) -> Iterator[tuple[str, str, Scalar, Scalar | None]]:
    for state, values in wanted.scalars.items():
        for name, value in values.items():
            yield state, name, value, found.scalars.get(state, {}).get(name)


def _wrong(what: str) -> ConversionError:
    return ConversionError(
        f"what was written reads back otherwise: {what}; nothing is put in place. This is a fault of the disk or a "
        "bug of everstep (--no-verify goes without the check)"
    )
