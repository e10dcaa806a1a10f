"""Where checkpoints are: a folder at any fsspec URL, or on a local file system, which is used directly.

Only what both have is used: whole files, put and got by name. An object store has no atomic rename and no folders, so
nothing here needs either.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".everstep-"  # prefix of files that a commit has not renamed yet
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


class StoreError(OSError):
    """The storage refused or is unreachable; the text names the operation, the place and the cause."""


class Store(Protocol):
    """A folder of files. Paths are relative, with `/`. All methods raise StoreError; any thread may call them.

    `tries`: how often it is worth to try what failed; few where the library has tried several times itself.
    """

    url: str
    tries: int

    def put(self, path: str, pieces: Iterable[Buffer]) -> None:
        """Write a file. It is on stable storage once `flush` has returned; until then it may be there in part."""

    def commit(self, path: str, data: Buffer) -> None:
        """Write a small file, all of it or nothing, onto stable storage."""

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file; None if there is no such file."""

    def get_into(self, path: str, room: memoryview) -> int | None:
        """Fill `room` with a file; returns the file's size, also if it has more or less. None if there is none."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder, with its size in bytes."""

    def folders(self) -> list[str]:
        """The folders directly in this one."""

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""

    def flush(self) -> None:
        """Return once everything put so far is on stable storage."""

    def inside(self, folder: str) -> Store:
        """A folder in this one, as a store."""


def open_store(url: str, options: Mapping[str, Any] | None = None) -> Store:
    """The folder at `url`; it need not exist yet. `options` go to the fsspec file system."""
    if not url:
        raise StoreError("the URL of a checkpoint is empty")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return LocalStore(Path(rest if separator else url).expanduser().absolute())
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url, **(options or {}))
    except ImportError as error:
        raise StoreError(f"{url}: {error} (for s3://, pip install 'everstep[s3]')") from None
    except ValueError as error:
        raise StoreError(f"{url}: {error}") from None
    return ObjectStore(system, path.rstrip("/"), url.rstrip("/"))


@contextlib.contextmanager
def _telling(what: str, where: object) -> Iterator[None]:
    """Convert every exception of a storage library to StoreError, with the operation."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise StoreError(f"cannot {what} {where}: {reason or type(error).__name__}") from error


class LocalStore:
    """A folder of the local file system."""

    tries = 5

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)
        self._lock = threading.Lock()
        self._unflushed: list[Path] = []

    def _parent(self, path: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def put(self, path: str, pieces: Iterable[Buffer]) -> None:
        with _telling("write", self.folder / path):
            handle = os.open(self._parent(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_all(handle, pieces)
                _start_writeback(handle)
            finally:
                os.close(handle)
        with self._lock:
            self._unflushed.append(self.folder / path)

    def commit(self, path: str, data: Buffer) -> None:
        with _telling("write", self.folder / path):
            file = self._parent(path)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=file.parent)
            try:
                try:
                    _write_all(handle, [data])
                    os.fchmod(handle, 0o644)
                    os.fsync(handle)
                finally:
                    os.close(handle)
                os.replace(name, file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._flush_folder(file.parent)

    def _flush_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        with _telling("read", self.folder / path):
            try:
                with (self.folder / path).open("rb", buffering=0) as file:
                    if start:
                        file.seek(start)
                    return file.read() if stop is None else file.read(stop - start)
            except FileNotFoundError:
                return None

    def get_into(self, path: str, room: memoryview) -> int | None:
        with _telling("read", self.folder / path):
            try:
                with (self.folder / path).open("rb", buffering=0) as file:
                    rest = room
                    while rest and (count := file.readinto(rest)):
                        rest = rest[count:]
                    return os.fstat(file.fileno()).st_size
            except FileNotFoundError:
                return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        with _telling("list", self.folder / folder):
            found: dict[str, int] = {}
            for base, _, names in os.walk(self.folder / folder):
                for file in [Path(base, name) for name in names if not name.startswith(TEMPORARY)]:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        found[file.relative_to(self.folder).as_posix()] = file.stat().st_size
            return found

    def folders(self) -> list[str]:
        with _telling("list", self.folder):
            if not self.folder.is_dir():
                if self.folder.exists():
                    raise NotADirectoryError(20, os.strerror(20))
                return []
            return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())

    def remove(self, path: str) -> None:
        with _telling("remove", self.folder / path):
            target = self.folder / path
            if path == "" and target.is_dir():
                for entry in target.iterdir():
                    self.remove(entry.name)
            elif target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def flush(self) -> None:
        """Synchronise file by file, after all are written: the disk has been writing meanwhile.

        One syncfs(2) would be faster for many small files, but also waits for writes of other processes: measured, half
        a second on a busy machine instead of ten milliseconds.
        """
        with self._lock:
            files, self._unflushed = self._unflushed, []
        for file in files:
            with _telling("synchronise", file), contextlib.suppress(FileNotFoundError):
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def inside(self, folder: str) -> LocalStore:
        return LocalStore(self.folder / folder)


def _start_writeback(handle: int) -> None:
    """Start writing dirty pages to disk, so that a later fsync has little left to wait for (sync_file_range(2))."""
    if _sync_file_range is not None:
        _sync_file_range(handle, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # 2: write, do not wait


def _write_all(handle: int, pieces: Iterable[Buffer]) -> None:
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            rest = rest[os.write(handle, rest) :]


class ObjectStore:
    """A folder of an fsspec file system. A put is whole and stable when it returns."""

    tries = 2

    def __init__(self, system: Any, root: str, url: str) -> None:
        self._system = system
        self._root = root
        self.url = url

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def put(self, path: str, pieces: Iterable[Buffer]) -> None:
        with _telling("write", f"{self.url}/{path}"):
            self.commit(path, b"".join(pieces))

    def commit(self, path: str, data: Buffer) -> None:
        with _telling("write", f"{self.url}/{path}"):
            self._system.pipe_file(self._path(path), bytes(data))

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        with _telling("read", f"{self.url}/{path}"):
            try:
                if stop is not None and stop <= start:  # HTTP has no empty range
                    self._system.invalidate_cache()
                    return b"" if self._system.isfile(self._path(path)) else None
                data: bytes = self._system.cat_file(self._path(path), start=start or None, end=stop)
            except FileNotFoundError:
                return None
            except Exception:
                if start and self._size(path) <= start:  # servers refuse a range beyond the end
                    return b""
                raise
            return data

    def _size(self, path: str) -> int:
        self._system.invalidate_cache()
        return int(self._system.info(self._path(path))["size"])

    def get_into(self, path: str, room: memoryview) -> int | None:
        data = self.get(path)
        if data is not None and len(data) == len(room):
            room[:] = data
        return None if data is None else len(data)

    def sizes(self, folder: str = "") -> dict[str, int]:
        with _telling("list", f"{self.url}/{folder}"):
            self._system.invalidate_cache()
            found = self._system.find(self._path(folder), detail=True)
            cut = len(self._system._strip_protocol(self._root).rstrip("/")) + 1
            return {name[cut:]: info["size"] for name, info in found.items()}

    def folders(self) -> list[str]:
        with _telling("list", self.url):
            self._system.invalidate_cache()
            try:
                entries = self._system.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
            return sorted(names)

    def remove(self, path: str) -> None:
        with _telling("remove", f"{self.url}/{path}"):
            self._system.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self._system.rm(glob.escape(self._path(path)), recursive=True)  # it takes a name for a pattern

    def flush(self) -> None:
        """Nothing is under way."""

    def inside(self, folder: str) -> ObjectStore:
        return ObjectStore(self._system, self._path(folder), f"{self.url}/{folder}")
