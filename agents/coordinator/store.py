"""A coordinator's durable store: rows of bytes, written in atomic batches."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

FORMAT = 1


class StateStoreError(Exception):
    """A store that cannot be opened: in use, damaged, of another version or another job."""


class Superseded(Exception):
    """Another coordinator leads: decisions of this one are void."""


class StateStore(Protocol):
    """The store of one coordinator. Calls block; one at a time. `url` names it for users."""

    url: str

    @property
    def superseded(self) -> bool:
        """Whether another coordinator is known to lead."""

    def load(self) -> dict[str, bytes]:
        """All rows. Raises StateStoreError."""

    def commit(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        """Write rows (None: remove), all or none. Raises Superseded, and StateStoreError where nothing can be written.

        With `sync` they outlive a power cut once this returns; without, the death of the process.
        """

    def close(self, *, forget: bool) -> None:
        """Release it; with `forget`, the job is over and its rows may be deleted."""


class SqliteStore:
    """A file (SQLite, write-ahead log), locked by one process for its lifetime."""

    superseded = False  # the file is ours until this process ends

    def __init__(self, path: Path, job: str) -> None:
        """Open or make it. Raises StateStoreError."""
        self.path = path
        self.url = str(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it holds the job's token
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.5)
        except (OSError, sqlite3.Error) as error:
            raise StateStoreError(f"{path} cannot be opened: {error}") from None
        try:
            self._open(job)
        except sqlite3.Error as error:
            self._db.close()
            raise StateStoreError(self._explain(error)) from None
        except StateStoreError:
            self._db.close()
            raise

    def _open(self, job: str) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")  # takes the lock, for good
        db.execute("CREATE TABLE IF NOT EXISTS rows (name TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID")
        db.execute("CREATE TABLE IF NOT EXISTS about (format INTEGER, job TEXT)")
        about = db.execute("SELECT format, job FROM about").fetchall()
        if not about:
            db.execute("INSERT INTO about VALUES (?, ?)", (FORMAT, job))
        db.execute("COMMIT")
        if about and about[0][0] != FORMAT:
            raise StateStoreError(
                f"{self.path} has format {about[0][0]}, and this version of everstep reads format {FORMAT}: run "
                "the version that wrote it, or move the file away to start a new job"
            )
        if about and about[0][1] != job:
            raise StateStoreError(f"{self.path} is of job {about[0][1]!r}, not {job!r}: choose another --es-store")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _explain(self, error: sqlite3.Error) -> str:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return f"{self.path} is in use: another coordinator of this job runs on this machine"
        return f"{self.path} is damaged, or no store of ours ({error}): move the file away to start a new job"

    def load(self) -> dict[str, bytes]:
        try:
            return dict(self._db.execute("SELECT name, data FROM rows"))
        except sqlite3.Error as error:
            raise StateStoreError(self._explain(error)) from None

    def commit(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        db = self._db
        kept = [(name, data) for name, data in rows.items() if data is not None]
        gone = [(name,) for name, data in rows.items() if data is None]
        try:
            db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            db.execute("BEGIN")
            db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", kept)
            db.executemany("DELETE FROM rows WHERE name = ?", gone)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise StateStoreError(f"{self.path} cannot be written: {error}") from None

    def close(self, *, forget: bool) -> None:
        self._db.close()
        if forget:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
