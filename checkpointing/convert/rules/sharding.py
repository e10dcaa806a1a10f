"""Consolidates the pieces that tensor-parallel ranks hold of a tensor, and splits the whole again.

Each rule maps pieces to the whole and the whole to pieces, lazily: data is read when the result is read, and memory
then holds the result and one piece. `split` and `consolidate` are inverses of each other, except where a rule's
documentation states otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Protocol

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype


class Sharding(Protocol):
    """One way to cut a tensor."""

    def describe(self) -> str:
        """What happens to the pieces, in a few words."""

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        """The whole, from the pieces in the order of their ranks. Raises ConversionError if they do not fit."""

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        """The pieces of `ranks` ranks. Raises ConversionError if the tensor cannot be cut so."""


def even(size: int, ranks: int) -> list[int]:
    """`size` in `ranks` parts, of which the first are one larger where it does not divide."""
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one type are equal bit for bit: NaN is itself, and zeros of two signs differ."""
    if one.dtype.kind == "c":
        return same_bits(one.real, other.real) and same_bits(one.imag, other.imag)
    bits = np.dtype(f"u{one.itemsize}")
    return bool(np.array_equal(one.view(bits), other.view(bits)))


def _same_dtype(name: str, pieces: Sequence[Lazy]) -> str:
    if not pieces:
        raise ConversionError(f"{name}: no piece of it was found")
    dtypes = sorted({piece.dtype for piece in pieces})
    if len(dtypes) > 1:
        raise ConversionError(f"{name}: its pieces are of types {' and '.join(dtypes)}; expected one")
    return dtypes[0]


def _same_shape(name: str, pieces: Sequence[Lazy]) -> tuple[int, ...]:
    shapes = sorted({piece.shape for piece in pieces})
    if len(shapes) > 1:
        raise ConversionError(f"{name}: its pieces have shapes {' and '.join(map(str, shapes))}; expected one")
    return shapes[0]


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole; all must be equal, bit for bit."""

    def describe(self) -> str:
        return "replicated: checked equal on all ranks, kept once"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        dtype, shape = _same_dtype(name, pieces), _same_shape(name, pieces)

        def read() -> np.ndarray:
            first = pieces[0].read()
            for rank, piece in enumerate(pieces[1:], 1):
                if not same_bits(piece.read(), first):
                    raise ConversionError(
                        f"{name}: replicated, but rank {rank} ({piece.origin}) differs from rank 0 ({pieces[0].origin})"
                    )
            return first

        return Lazy(shape, dtype, read, pieces[0].origin)

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        return [whole] * ranks


@dataclass(frozen=True)
class Average:
    """Ranks hold slices of the same shape that drifted; the whole is their mean. Cutting gives equal copies."""

    def describe(self) -> str:
        return "averaged over all ranks"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        dtype, shape = _same_dtype(name, pieces), _same_shape(name, pieces)

        def read() -> np.ndarray:
            total = pieces[0].read().copy()
            for piece in pieces[1:]:
                total += piece.read()
            return np.asarray(total / total.dtype.type(len(pieces)), dtype=total.dtype).reshape(shape)

        return Lazy(shape, dtype, read, pieces[0].origin)

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        return [whole] * ranks


@dataclass(frozen=True)
class Fused:
    """Along `dim` lie several sub-parameters, each cut over the ranks: rank r holds [a_r; b_r; ...] of [a; b; ...].

    `sizes`: the widths of the sub-parameters in the whole; or `parts`: that many, equally wide. `widths`: what each
    rank holds of each sub-parameter (for each, a width per rank), where they are not cut evenly. One sub-parameter is
    the ordinary case: see `along`. `view`: the pieces are first seen in the shape that has these sizes elsewhere.
    """

    dim: int = 0
    parts: int = 1
    sizes: tuple[int, ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()
    view: tuple[int, ...] = ()

    def describe(self) -> str:
        if self.parts == 1 and not self.sizes and not self.widths:
            return f"cut along dimension {self.dim}"
        what = self.widths or self.sizes or f"{self.parts} equally wide"
        return f"cut along dimension {self.dim} within each sub-parameter: {what}"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        dtype = _same_dtype(name, pieces)
        widths = self._widths_of_pieces(name, pieces)
        shapes = [self._seen(name, piece, [part[rank] for part in widths]) for rank, piece in enumerate(pieces)]
        others = {shape[: self.dim] + shape[self.dim + 1 :] for shape in shapes}
        if len(others) > 1:
            raise ConversionError(
                f"{name}: pieces of shapes {' and '.join(str(list(shape)) for shape in shapes)} do not fit along "
                f"dimension {self.dim}"
            )
        whole = (*shapes[0][: self.dim], sum(map(sum, widths)), *shapes[0][self.dim + 1 :])

        def read() -> np.ndarray:
            if len(pieces) == 1:
                return pieces[0].read().reshape(whole)
            out = np.empty(whole, numpy_dtype(dtype))
            for rank, piece in enumerate(pieces):
                held = piece.read().reshape(shapes[rank])
                for to, part in self._blocks(widths, rank):
                    out[to] = held[part]
            return out

        return Lazy(whole, dtype, read, f"{pieces[0].origin} and {len(pieces) - 1} more")

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        if not 0 <= self.dim < len(whole.shape):
            raise ConversionError(f"{name}: shape {list(whole.shape)} has no dimension {self.dim}")
        widths = self._widths_of_whole(name, whole.shape[self.dim], ranks)

        def piece(rank: int) -> Lazy:
            width = sum(part[rank] for part in widths)
            shape = (*whole.shape[: self.dim], width, *whole.shape[self.dim + 1 :])

            def read() -> np.ndarray:
                held = whole.read()
                out = np.empty(shape, held.dtype)
                for to, part in self._blocks(widths, rank):
                    out[part] = held[to]
                return out

            return Lazy(shape, whole.dtype, read, whole.origin)

        return [piece(rank) for rank in range(ranks)]

    def _seen(self, name: str, piece: Lazy, widths: list[int]) -> tuple[int, ...]:
        """The shape in which a piece is seen. Raises ConversionError if it does not hold these widths."""
        shape = piece.shape
        if self.view:
            known = [sum(widths) if axis == self.dim else size for axis, size in enumerate(self.view)]
            rest = prod(size for size in known if size >= 0)
            free = piece.elements // rest if rest else 0
            shape = tuple(free if size < 0 else size for size in known)
        if not 0 <= self.dim < len(shape) or shape[self.dim] != sum(widths) or prod(shape) != piece.elements:
            raise ConversionError(
                f"{name}: a piece of shape {list(piece.shape)} ({piece.origin}); expected widths {widths} along "
                f"dimension {self.dim}"
            )
        return shape

    def _widths_of_pieces(self, name: str, pieces: Sequence[Lazy]) -> list[list[int]]:
        """For each sub-parameter, what each of the pieces holds of it."""
        if self.widths or self.sizes:
            return self._widths_of_whole(name, sum(self.sizes) or sum(map(sum, self.widths)), len(pieces))
        for piece in pieces:
            if len(piece.shape) <= self.dim or piece.shape[self.dim] % self.parts:
                raise ConversionError(
                    f"{name}: a piece of shape {list(piece.shape)} ({piece.origin}) is not {self.parts} parts along "
                    f"dimension {self.dim}"
                )
        return [[piece.shape[self.dim] // self.parts for piece in pieces]] * self.parts

    def _widths_of_whole(self, name: str, size: int, ranks: int) -> list[list[int]]:
        if self.widths:
            if any(len(part) != ranks for part in self.widths) or sum(map(sum, self.widths)) != size:
                raise ConversionError(f"{name}: widths {self.widths} do not make {size} on {ranks} ranks")
            return [list(part) for part in self.widths]
        if self.sizes:
            if sum(self.sizes) != size:
                raise ConversionError(f"{name}: sub-parameters of {self.sizes} do not make {size}")
            return [even(part, ranks) for part in self.sizes]
        if size % self.parts:
            raise ConversionError(f"{name}: {size} along dimension {self.dim} is not {self.parts} equal parts")
        return [even(size // self.parts, ranks)] * self.parts

    def _blocks(self, widths: list[list[int]], rank: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """What a rank holds: (where in the whole, where in its piece), a pair for each sub-parameter."""
        blocks = []
        before, held = 0, 0
        for part in widths:
            start = before + sum(part[:rank])
            blocks.append((self._along(start, part[rank]), self._along(held, part[rank])))
            before += sum(part)
            held += part[rank]
        return blocks

    def _along(self, start: int, width: int) -> tuple[slice, ...]:
        return (*[slice(None)] * self.dim, slice(start, start + width))


def along(dim: int) -> Fused:
    """Cut along a dimension; the pieces may be uneven."""
    return Fused(dim)


@dataclass(frozen=True)
class Vocabulary:
    """Rows of a vocabulary of `rows`, padded so that it divides: the padding goes, and zeros come when it is cut.

    Cut again, it is padded to the next multiple of `multiple` times the ranks.
    """

    rows: int
    multiple: int = 1

    def describe(self) -> str:
        return f"vocabulary, cut along dimension 0: padding after row {self.rows} left"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        padded = along(0).consolidate(name, pieces)
        if padded.shape[0] < self.rows:
            raise ConversionError(f"{name}: {padded.shape[0]} rows; expected at least {self.rows} of the vocabulary")
        shape = (self.rows, *padded.shape[1:])
        return Lazy(shape, padded.dtype, lambda: padded.read()[: self.rows].copy(), padded.origin)

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        if not whole.shape or whole.shape[0] != self.rows:
            raise ConversionError(f"{name}: shape {list(whole.shape)}; expected {self.rows} rows of a vocabulary")
        step = self.multiple * ranks
        size = -(-self.rows // step) * step

        def read() -> np.ndarray:
            out = np.zeros((size, *whole.shape[1:]), numpy_dtype(whole.dtype))
            out[: self.rows] = whole.read()
            return out

        padded = Lazy((size, *whole.shape[1:]), whole.dtype, read, whole.origin)
        return along(0).split(name, padded, ranks)


@dataclass(frozen=True)
class Expert:
    """Dimension 0 counts experts, and each rank holds some: `placement`, by rank; without it, equally many in order."""

    placement: tuple[tuple[int, ...], ...] = ()

    def describe(self) -> str:
        return f"experts, by rank: {self.placement}" if self.placement else "experts, equally many on each rank"

    def _placed(self, name: str, experts: int, ranks: int) -> Sequence[Sequence[int]]:
        if not self.placement:
            if experts % ranks:
                raise ConversionError(f"{name}: {experts} experts on {ranks} ranks")
            each = experts // ranks
            return [range(rank * each, (rank + 1) * each) for rank in range(ranks)]
        if len(self.placement) != ranks or sorted(sum(self.placement, ())) != list(range(experts)):
            raise ConversionError(f"{name}: {experts} experts on {ranks} ranks are not placed by {self.placement}")
        return self.placement

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        whole = along(0).consolidate(name, pieces)
        placed = self._placed(name, whole.shape[0], len(pieces))
        if [len(held) for held in placed] != [piece.shape[0] for piece in pieces]:
            raise ConversionError(f"{name}: pieces of {[piece.shape[0] for piece in pieces]} experts for {placed}")

        def read() -> np.ndarray:
            out = np.empty(whole.shape, numpy_dtype(whole.dtype))
            for piece, held in zip(pieces, placed, strict=True):
                out[list(held)] = piece.read()
            return out

        return Lazy(whole.shape, whole.dtype, read, whole.origin)

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        placed = self._placed(name, whole.shape[0], ranks)

        def piece(held: Sequence[int]) -> Lazy:
            return Lazy(
                (len(held), *whole.shape[1:]), whole.dtype, lambda: whole.read()[list(held)].copy(), whole.origin
            )

        return [piece(held) for held in placed]


@dataclass(frozen=True)
class Flat:
    """Ranks hold consecutive runs of the flattened tensor of this shape, with padding after the last or without."""

    shape: tuple[int, ...]

    def describe(self) -> str:
        return f"flat runs, one after the other, seen as {list(self.shape)}"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        dtype = _same_dtype(name, pieces)
        wanted = prod(self.shape)
        ends = list(accumulate(piece.elements for piece in pieces))
        if ends[-1] < wanted:
            raise ConversionError(f"{name}: {ends[-1]} elements were found; shape {list(self.shape)} has {wanted}")

        def read() -> np.ndarray:
            out = np.empty(wanted, numpy_dtype(dtype))
            for piece, end in zip(pieces, ends, strict=True):
                run = out[end - piece.elements : end]
                if run.size:
                    run[:] = piece.read().reshape(-1)[: run.size]
            return out.reshape(self.shape)

        return Lazy(self.shape, dtype, read, pieces[0].origin)

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        if whole.shape != self.shape:
            raise ConversionError(f"{name}: shape {list(whole.shape)}; expected {list(self.shape)}")
        each = -(-whole.elements // ranks)

        def piece(rank: int) -> Lazy:
            def read() -> np.ndarray:
                out = np.zeros(each, numpy_dtype(whole.dtype))
                run = whole.read().reshape(-1)[rank * each : (rank + 1) * each]
                out[: run.size] = run
                return out

            return Lazy((each,), whole.dtype, read, whole.origin)

        return [piece(rank) for rank in range(ranks)]
