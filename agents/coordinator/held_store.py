"""The files of a coordinator's store, held open by its launcher, so that deleting them loses nothing.

The default store is in a temporary folder, and such folders are cleaned (systemd-tmpfiles, tmpreaper, a user). A
running coordinator keeps writing to files that have no name any more; a restarted coordinator would find no store, and
would decide as if the job had just begun. While a process has the files open, their bytes are still there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

_SUFFIXES = ("", "-wal")  # of SQLite's; the rest is made again


class HeldStore:
    """Not thread-safe. Reads of the files only while no coordinator runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, int] = {}

    def hold(self) -> None:
        """The files as they are now, of a coordinator that serves."""
        self.close()
        for suffix in _SUFFIXES:
            with contextlib.suppress(OSError):
                self._held[suffix] = os.open(self._name(suffix), os.O_RDONLY | os.O_CLOEXEC)

    def mend(self) -> bool:
        """Write deleted files again; returns whether there were any. Raises OSError if that fails."""
        if not self._held or all(self._stands(suffix) for suffix in self._held):
            return False
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for suffix in ("-wal", "-shm", ""):
            self._name(suffix).unlink(missing_ok=True)  # never mix files of two stores
        for suffix, fd in self._held.items():
            os.lseek(fd, 0, os.SEEK_SET)
            copy = os.open(self._name(suffix), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it holds the job's token
            with open(fd, "rb", closefd=False) as source, open(copy, "wb") as target:
                shutil.copyfileobj(source, target)
        return True

    def close(self) -> None:
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def _name(self, suffix: str) -> Path:
        return Path(f"{self._path}{suffix}")

    def _stands(self, suffix: str) -> bool:
        try:
            return os.path.samestat(os.stat(self._name(suffix)), os.fstat(self._held[suffix]))
        except OSError:
            return False
