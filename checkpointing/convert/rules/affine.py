"""DeepSpeed's affine maps: for each block its place in the whole tensor and in a rank's piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .sharding import same_bits


@dataclass(frozen=True)
class Strides:
    """`shape` elements at these offsets and strides of the flattened whole, and of the flattened piece."""

    shape: tuple[int, ...]
    whole: tuple[int, tuple[int, ...]]
    piece: tuple[int, tuple[int, ...]]
    holders: tuple[int, ...]
    scale: float

    def within(self, elements: int, place: tuple[int, tuple[int, ...]]) -> bool:
        """Whether this block, with these strides, stays within that many elements."""
        offset, strides = place
        if len(strides) != len(self.shape) or min((offset, *strides, *self.shape), default=0) < 0:
            return False
        last = offset + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
        return not prod(self.shape) or last < elements

    def view(self, flat: np.ndarray, place: tuple[int, tuple[int, ...]]) -> np.ndarray:
        offset, strides = place
        steps = [stride * flat.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], self.shape, steps)


@dataclass(frozen=True)
class Affine:
    """A sharding given block by block. Blocks that several ranks hold must be equal."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], tuple[Strides, ...]], ...]  # for each rank: the shape it holds, its blocks

    def describe(self) -> str:
        return f"affine map onto {list(self.shape)}, {sum(len(blocks) for _, blocks in self.pieces)} blocks"

    @property
    def is_scaled(self) -> bool:
        return any(block.scale != 1 for _, blocks in self.pieces for block in blocks)

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        held = [prod(shape) for shape, _ in self.pieces]
        if [piece.elements for piece in pieces] != held:
            raise ConversionError(
                f"{name}: pieces of {[piece.elements for piece in pieces]} elements; its affine map has {held}"
            )
        dtype = pieces[0].dtype

        def read() -> np.ndarray:
            out = np.empty(prod(self.shape), numpy_dtype(dtype))
            written = np.zeros(out.shape, np.bool_)
            for rank, (piece, (_, blocks)) in enumerate(zip(pieces, self.pieces, strict=True)):
                flat = piece.read().reshape(-1)
                for block in blocks:
                    self._place(name, rank, block, flat, out, written)
            if not written.all():
                raise ConversionError(f"{name}: its affine map leaves {int((~written).sum())} elements uncovered")
            return out.reshape(self.shape)

        return Lazy(self.shape, dtype, read, pieces[0].origin)

    def _place(
        self, name: str, rank: int, block: Strides, flat: np.ndarray, out: np.ndarray, written: np.ndarray
    ) -> None:
        if not prod(block.shape):
            return
        values = block.view(flat, block.piece)
        if block.scale != 1:
            values = values / values.dtype.type(block.scale)
        to, done = block.view(out, block.whole), block.view(written, block.whole)
        if done.any() and not (same_bits(to, values) if done.all() else same_bits(to[done], values[done])):
            raise ConversionError(f"{name}: ranks {list(block.holders)} hold a block differently; first seen on {rank}")
        to[...] = values
        done[...] = True

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        if ranks != len(self.pieces) or whole.shape != self.shape:
            raise ConversionError(
                f"{name}: shape {list(whole.shape)} for {ranks} ranks; its affine map is of {list(self.shape)} for "
                f"{len(self.pieces)}"
            )

        def piece(rank: int) -> Lazy:
            shape, blocks = self.pieces[rank]

            def read() -> np.ndarray:
                flat = whole.read().reshape(-1)
                out = np.empty(prod(shape), flat.dtype)
                for block in blocks:
                    values = block.view(flat, block.whole)
                    block.view(out, block.piece)[...] = values if block.scale == 1 else values * block.scale
                return out.reshape(shape)

            return Lazy(shape, whole.dtype, read, whole.origin)

        return [piece(rank) for rank in range(ranks)]


def affine(where: str, entry: dict[str, Any]) -> Affine:
    """The map that DeepSpeed stored for one parameter. Raises ConversionError if it points outside anything."""
    try:
        shape = tuple(int(size) for size in entry["logical_shape"])
        ranks = {int(rank): value for rank, value in entry["ranks"].items()}
        pieces = []
        for rank in range(len(ranks)):
            held = tuple(int(size) for size in ranks[rank]["shard_shape"])
            pieces.append((held, tuple(_block(piece) for piece in ranks[rank]["pieces"])))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConversionError(f"{where}: not an affine map: {error!r}") from error
    for held, blocks in pieces:
        for block in blocks:
            if not block.within(prod(shape), block.whole) or not block.within(prod(held), block.piece):
                raise ConversionError(f"{where}: a block of its affine map lies outside the tensor: {block}")
        if sum(prod(block.shape) for block in blocks) != prod(held):
            raise ConversionError(f"{where}: the blocks of its affine map do not fill a piece of shape {list(held)}")
    return Affine(shape, tuple(pieces))


def _block(piece: dict[str, Any]) -> Strides:
    shape = tuple(int(size) for size in piece["shape"])

    def place(key: str) -> tuple[int, tuple[int, ...]]:
        offset, strides = piece[key]
        return int(offset), tuple(int(stride) for stride in strides)

    holders = tuple(int(rank) for rank in piece.get("locations", ()))
    return Strides(shape, place("source"), place("dest"), holders, float(piece.get("scale", 1)))
