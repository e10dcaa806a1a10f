"""Files that `torch.save` wrote, read without torch and without trust: see `unpickling` for what may be in them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError

from .filetensor import FileTensor, Storage, open_file
from .unpickling import (
    NO_STUBS,
    Dtype,
    Stubs,
    Unpickled,
    Unpickler,
    record,
)

__all__ = ["Dtype", "FileTensor", "Stubs", "Unpickled", "load", "load_pickle", "load_span", "record"]

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what the format before zip (torch < 1.6) begins with
_LOCAL_HEADER_BYTES = 30  # of a zip entry; then its name and its extra field, whose lengths are at 26 and 28


def load(path: Path, *, stubs: Stubs = NO_STUBS) -> Any:
    """The object in a file of `torch.save`; its tensors as `FileTensor`s. `stubs`: more globals, by (module, name).

    Raises ConversionError, naming the file, if it is none, or torn, or holds what is not allowed.
    """
    handle = open_file(path)
    try:
        size = os.fstat(handle).st_size
        return _load(_Span(path, handle, 0, size), str(path), stubs)
    finally:
        os.close(handle)


def load_span(path: Path, offset: int, length: int, *, stubs: Stubs = NO_STUBS) -> Any:
    """Like `load`, for a whole file of `torch.save` that is embedded in another at [offset, offset + length)."""
    handle = open_file(path)
    try:
        if offset + length > os.fstat(handle).st_size:
            raise ConversionError(f"{path}: ends before byte {offset + length}, which its index points to; it is torn")
        return _load(_Span(path, handle, offset, length), f"{path} at byte {offset}", stubs)
    finally:
        os.close(handle)


def load_pickle(data: bytes, where: str, *, stubs: Stubs = NO_STUBS) -> Any:
    """The object in a bare pickle without tensors, under the same rules. `where` names it in errors."""
    return Unpickler(data, where, stubs).load()


class _Span(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, path: Path, handle: int, begin: int, length: int) -> None:
        self.path, self.handle, self.begin, self.length = path, handle, begin, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self._at, 0)
        data = self.at(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def at(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self.handle, size, self.begin + offset)
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot be read: {error.strerror}") from error


class _Archive:
    """The zip around a pickle: where in the file its storages are."""

    def __init__(self, span: _Span, where: str) -> None:
        self._span, self.where = span, where
        begins = span.at(0, len(_LEGACY_MAGIC))
        if begins == _LEGACY_MAGIC:
            raise ConversionError(f"{where}: in torch's format from before 1.6; load and save it again with torch")
        try:
            with zipfile.ZipFile(span) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
                if len(roots) != 1:
                    raise ConversionError(f"{where}: a zip file, but not one of torch.save: it holds no data.pkl")
                self._root = roots[0]
                self.pickle = archive.read(self._root + "data.pkl")
                if self._root + "byteorder" in self._entries:
                    self._check_order(archive.read(self._root + "byteorder"))
        except ConversionError:
            raise
        except Exception as error:  # zipfile has many, and others for names that are no text
            what = "torn: it begins as a file of torch.save" if begins[:2] == b"PK" else "not a file of torch.save"
            raise ConversionError(f"{where}: {what} ({error})") from error

    def _check_order(self, order: bytes) -> None:
        if order != b"little":
            raise ConversionError(f"{self.where}: byte order {order.decode(errors='replace')!r}; expected 'little'")

    def storage(self, key: object, dtype: str, nbytes: int) -> Storage:
        name = f"{self._root}data/{key}"
        entry = self._entries.get(name)
        if entry is None:
            raise ConversionError(f"{self.where}: torn: it has no {name}, which one of its tensors is in")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(f"{self.where}: {name} is compressed; torch.save compresses nothing")
        head = self._span.at(entry.header_offset, _LOCAL_HEADER_BYTES)
        lengths = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        begin = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
        if head[:4] != b"PK\x03\x04" or begin + entry.file_size > self._span.length:
            raise ConversionError(f"{self.where}: torn: {name} is not where the zip's directory says")
        if entry.file_size < nbytes:
            raise ConversionError(f"{self.where}: torn: {name} has {entry.file_size} bytes; expected {nbytes}")
        return Storage(self._span.path, self._span.begin + begin, nbytes, dtype)


def _load(span: _Span, where: str, stubs: Stubs) -> Any:
    archive = _Archive(span, where)
    return Unpickler(archive.pickle, where, stubs, archive.storage).load()
