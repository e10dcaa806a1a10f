"""The place of a conversion's result: written beside its destination, then renamed into it in one step.

Until then, the folder TARGET.everstep-partial and a file TARGET.everstep-partial.json are beside TARGET. The file's
first line identifies the conversion, and its second, once everything is written, the folder with the complete result.
So an attempt that was killed at any moment can be continued, or was complete; the file is locked against other
processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.core.format import detect
from everstep.checkpointing.universal.manifest import NAME as MANIFEST

PARTIAL = ".everstep-partial"
_REPLACED = ".everstep-replaced"
_RENAME_EXCHANGE = 2  # of renameat2(2)
_AT_FDCWD = -100


def check_apart(source: Path, target: Path) -> None:
    """Raise ConversionError if one is the other, or inside it: a source is never written into, nor replaced."""
    begin, end = source.resolve(), target.resolve()
    if begin == end:
        raise ConversionError(f"{target}: is SRC itself; give another DST")
    if end.is_relative_to(begin) and begin.is_dir():
        raise ConversionError(f"{target}: is inside SRC; give a DST outside of {source}")
    if begin.is_relative_to(end):
        raise ConversionError(f"{target}: has SRC in it; give another DST")


def check_free(target: Path, *, force: bool) -> None:
    """Raise ConversionError if there is what may not be replaced: anything; with `force`, what is no checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise ConversionError(f"{target} exists already: --force replaces it")
    if target.is_dir() and not (target / MANIFEST).exists():
        try:
            detect(target)
        except ConversionError:
            raise ConversionError(
                f"{target} is a folder, but not a checkpoint of a known format: --force replaces only those; remove "
                "it yourself"
            ) from None


class Attempt:
    """One attempt at a conversion to `target`, which is locked. `is_resumed`: an earlier one was at the same."""

    def __init__(self, target: Path, marker: Path, handle: int, identity: Mapping[str, Any]) -> None:
        self.target = target
        self.partial = target.with_name(target.name + PARTIAL)
        self._marker, self._handle = marker, handle
        self._identity = json.dumps(identity)
        lines = os.pread(handle, 1 << 20, 0).decode(errors="replace").splitlines()
        same = lines[:1] == [self._identity]
        self._whole = int(lines[1]) if same and len(lines) == 2 and lines[1].isdecimal() else 0
        self.is_resumed = same and self.partial.is_dir()

    @property
    def is_in_place(self) -> bool:
        """Whether an earlier attempt had put the result in its place, and was killed then."""
        return self._whole != 0 and _number(self.target) == self._whole

    @property
    def is_whole(self) -> bool:
        """Whether all is written, by an earlier attempt."""
        return self._whole != 0 and _number(self.partial) == self._whole

    def begin(self) -> None:
        """Make the folder, empty if what is in it is of another conversion."""
        replaced = self.target.with_name(self.target.name + _REPLACED)
        if replaced.exists() and not self.target.exists():
            os.replace(replaced, self.target)  # an earlier attempt was killed between its two renames
        if self.is_resumed and not self._whole:
            return
        os.truncate(self._handle, 0)
        self.is_resumed = False
        remove(self.partial)
        self.partial.mkdir()
        os.pwrite(self._handle, f"{self._identity}\n".encode(), 0)

    def finish(self) -> None:
        """Everything is written. Synchronises it: an earlier attempt may have been killed before it did."""
        if self.is_resumed:
            for base, _, names in os.walk(self.partial):
                for name in names:
                    _synchronise(Path(base) / name)
        self._whole = _number(self.partial)
        os.pwrite(self._handle, f"{self._identity}\n{self._whole}\n".encode(), 0)

    def put_in_place(self) -> None:
        """Make the folder the target. What was there is there until then, and removed after."""
        if not self.target.is_symlink() and not self.target.exists():
            os.rename(self.partial, self.target)
        elif not _exchange(self.partial, self.target):
            replaced = self.target.with_name(self.target.name + _REPLACED)
            remove(replaced)
            os.rename(self.target, replaced)
            os.rename(self.partial, self.target)
            remove(replaced)
        _synchronise(self.target.parent)

    def clear(self) -> None:
        """Remove all but the target."""
        remove(self.partial)
        self._marker.unlink(missing_ok=True)


@contextlib.contextmanager
def attempt(target: Path, identity: Mapping[str, Any]) -> Iterator[Attempt]:
    """Lock the conversion to `target`. Raises ConversionError if another process is at it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    marker = target.with_name(target.name + PARTIAL + ".json")
    handle = _lock(marker, target)
    try:
        yield Attempt(target, marker, handle, identity)
    finally:
        if os.fstat(handle).st_size == 0:  # nothing was begun
            marker.unlink(missing_ok=True)
        os.close(handle)


def _lock(marker: Path, target: Path) -> int:
    while True:
        handle = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConversionError(f"{target}: another process is converting to it") from None
        except OSError:
            return handle  # a file system without locks
        if _number(marker) == os.fstat(handle).st_ino:
            return handle
        os.close(handle)  # its holder has just removed it


def _number(path: Path) -> int:
    """The inode number; 0 if there is no such file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places, in one step; False where the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
