"""Datasets for training: `TokenFile`, the tokens of a file as samples of a language model."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import Dataset

from .elastic.contract.errors import UsageError

__all__ = ["TokenFile"]

_MAGIC = b"MMIDIDX\x00\x00"  # of Megatron's index; a version, the type's code, and two counts follow
_COUNTS = struct.Struct("<QBQQ")
_MEGATRON_DTYPES = dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), 1))

Sample = tuple[Tensor, Tensor] | dict[str, Tensor]


@dataclass(frozen=True)
class _Tokens:
    """Where the tokens are: `count` of one type in a file, from byte `offset` on."""

    path: Path
    dtype: np.dtype[Any]
    count: int
    offset: int = 0


class TokenFile(Dataset[Sample]):
    """The tokens of a file, cut into sequences: a map-style dataset over a memory-mapped array.

    `path` is a NumPy file (`.npy`, one dimension), a raw file of tokens without a header (`dtype` says of which type,
    such as "uint16"), or either file of Megatron's pair of `.bin` and `.idx`, or their common name without a suffix.
    Documents of a pair follow each other as they are in the file.

    With `items="pairs"` sample i is `(inputs, targets)`: int64 tensors of `sequence_length` tokens, the targets one
    token behind the inputs. With `items="dicts"` it is `{"input_ids": tokens, "labels": tokens}`, for models that
    shift the labels themselves, as those of Hugging Face do. It begins with token `i * stride`; `stride` is
    `sequence_length` unless given. Tokens behind the last whole sample are left out. `vocabulary`, if given, is the
    number of tokens that the model knows: a sample with another one raises.

    Raises UsageError for a file that is missing or not of this form, and for a token outside the vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        *,
        dtype: DTypeLike | None = None,
        stride: int | None = None,
        items: Literal["pairs", "dicts"] = "pairs",
        vocabulary: int | None = None,
    ) -> None:
        given = {"sequence_length": sequence_length, "stride": stride, "vocabulary": vocabulary}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"TokenFile: {name} must be a whole number of at least 1, got {value!r}")
        if items not in ("pairs", "dicts"):
            raise UsageError(f'TokenFile: items must be "pairs" or "dicts", got {items!r}')
        self._tokens = _find(Path(path), dtype)
        self.sequence_length = sequence_length
        self.stride = sequence_length if stride is None else stride
        self.items = items
        self.vocabulary = vocabulary
        self._span = sequence_length + (1 if items == "pairs" else 0)  # tokens that a sample reads
        if self._tokens.count < self._span:
            raise UsageError(
                f"TokenFile: {self._tokens.path} has {self._tokens.count} tokens, and one sample needs {self._span}: "
                "lower sequence_length"
            )
        self._array: np.ndarray[Any, Any] | None = None

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        """All tokens of the file, memory-mapped, in the type that they have there."""
        if self._array is None:
            where = self._tokens
            self._array = np.memmap(where.path, where.dtype, "r", where.offset, (where.count,))
        return self._array

    def __len__(self) -> int:
        return (self._tokens.count - self._span) // self.stride + 1

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index % len(self) * self.stride
        span = torch.from_numpy(self.tokens[start : start + self._span].astype(np.int64))
        if self.vocabulary is not None:
            self._check(span, start, self.vocabulary)
        if self.items == "pairs":
            return span[:-1], span[1:]
        return {"input_ids": span, "labels": span.clone()}

    def _check(self, span: Tensor, start: int, vocabulary: int) -> None:
        outside = ((span < 0) | (span >= vocabulary)).nonzero()
        if len(outside):
            at = int(outside[0])
            raise UsageError(
                f"TokenFile: token {start + at} of {self._tokens.path} is {int(span[at])}, and vocabulary="
                f"{vocabulary}: is the file of another tokenizer, or its type not {self._tokens.dtype}?"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # another process maps the file itself


def _find(path: Path, dtype: DTypeLike | None) -> _Tokens:
    """The tokens in the file, or the pair of files, of this name."""
    given = _integers(dtype) if dtype is not None else None
    index = path.with_suffix(".idx") if path.suffix in (".bin", ".idx") else path.with_name(path.name + ".idx")
    if index.is_file() and (path.suffix in (".bin", ".idx") or not path.is_file()):
        found = _megatron(index)
    elif not path.is_file():
        raise UsageError(f"TokenFile: there is no file {path}")
    elif path.suffix == ".npy":
        found = _numpy(path)
    elif given is None:
        raise UsageError(
            f"TokenFile: the type of the tokens in {path} is not known: give dtype=, such as "
            'dtype="uint16" (a .npy file, or a .bin file with its .idx, says it by itself)'
        )
    else:
        size = path.stat().st_size
        if size % given.itemsize:
            raise UsageError(
                f"TokenFile: {path} has {size} bytes, which is no multiple of the {given.itemsize} bytes of a {given}: "
                "give the dtype it was written with"
            )
        found = _Tokens(path, given, size // given.itemsize)
    if given is not None and given != found.dtype:
        raise UsageError(f"TokenFile: {found.path} has tokens of type {found.dtype}, and dtype={given} was given")
    return found


def _integers(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise UsageError(f"TokenFile: dtype must be a type of NumPy's, such as uint16, got {dtype!r}") from None
    return _checked(found, f"dtype={dtype}")


def _checked(dtype: np.dtype[Any], where: object) -> np.dtype[Any]:
    if dtype.kind not in "iu":
        raise UsageError(f"TokenFile: tokens are integers, and {where} has the type {dtype}")
    return dtype


def _numpy(path: Path) -> _Tokens:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        offset = array.offset
    except (ValueError, EOFError, AttributeError) as error:
        raise UsageError(f"TokenFile: {path} is not a whole NumPy file: {error}") from None
    if array.ndim != 1:
        raise UsageError(
            f"TokenFile: {path} has {array.ndim} dimensions, and tokens are in one: save array.reshape(-1)"
        )
    return _Tokens(path, _checked(array.dtype, path), len(array), offset)


def _megatron(index: Path) -> _Tokens:
    """What Megatron's index says of the file beside it.

    The index holds the length (int32) and the position in bytes (int64) of each sequence, without gaps, then the first
    sequence of each document; all of it little-endian.
    """
    path = index.with_suffix(".bin")
    if not path.is_file():
        raise UsageError(f"TokenFile: there is {index}, but no {path.name} beside it")
    with index.open("rb") as file:
        head = file.read(len(_MAGIC) + _COUNTS.size)
        if len(head) < len(_MAGIC) + _COUNTS.size or not head.startswith(_MAGIC):
            raise UsageError(f"TokenFile: {index} is no index of Megatron's: it does not begin with {_MAGIC!r}")
        version, code, sequences, documents = _COUNTS.unpack(head[len(_MAGIC) :])
        if version != 1 or code not in _MEGATRON_DTYPES:
            raise UsageError(f"TokenFile: {index} has version {version} and type {code}, which are not known")
        if index.stat().st_size < file.tell() + 12 * sequences + 8 * documents:
            raise UsageError(f"TokenFile: {index} ends before its {sequences} sequences and {documents} documents do")
        count = int(np.fromfile(file, "<i4", sequences).sum(dtype=np.int64))
    dtype = _checked(np.dtype(_MEGATRON_DTYPES[code]).newbyteorder("<"), index)
    if path.stat().st_size != count * dtype.itemsize:
        raise UsageError(
            f"TokenFile: {path} has {path.stat().st_size} bytes, and by {index.name} its {count} tokens of {dtype} "
            f"take {count * dtype.itemsize}: are they a pair?"
        )
    return _Tokens(path, dtype, count)
