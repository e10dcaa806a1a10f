"""The doing of a conversion: many independent pieces, in parallel, in bounded memory, none of them twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

JOURNAL = ".everstep-journal"


@dataclass(frozen=True)
class Piece:
    """A unit of writing. `key` is its stable name (such as the file); `nbytes`: the memory that it takes meanwhile."""

    key: str
    nbytes: int
    do: Callable[[], object]


def _untold(value: object) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class WorkWatch:
    """Receives the progress: the total in bytes, and each finished piece."""

    planned: Callable[[int], None] = _untold
    done: Callable[[Piece], None] = _untold


NOBODY = WorkWatch()


class PieceWork:
    """Runs pieces on threads; at most `budget_bytes` of them at a time, or one that is larger.

    Finished pieces are recorded in a journal in `folder`, so that a killed conversion continues where it was. So a
    piece must leave its file complete (synchronised) when it returns, and may run again if it did not return.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        threads: int,
        budget_bytes: int,
        watch: WorkWatch = NOBODY,
    ) -> None:
        self._journal = folder / JOURNAL if folder is not None else None
        self._threads = threads
        self._budget = budget_bytes
        self._watch = watch
        self._done = self._read()
        self._lock = threading.Condition()
        self._in_use = 0

    @classmethod
    def unrecorded(cls, threads: int, budget_bytes: int, watch: WorkWatch = NOBODY) -> PieceWork:
        """Without a journal: the destination itself shows which pieces are finished."""
        return cls(None, threads=threads, budget_bytes=budget_bytes, watch=watch)

    def make(self, folder: Path) -> Path:
        """Make a folder for what is to be written, with those above it."""
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def skip(self, piece: Piece) -> None:
        """A piece that an earlier attempt has done."""
        self._watch.planned(piece.nbytes)
        self._watch.done(piece)

    def _read(self) -> set[str]:
        done: set[str] = set()
        if self._journal is not None and self._journal.exists():
            for line in self._journal.read_text().splitlines():
                try:
                    done.add(json.loads(line))
                except ValueError:
                    break  # the line that was being written
        return done

    def run(self, pieces: Iterable[Piece]) -> None:
        """Run all unfinished pieces. Raises what a piece raised, after the running pieces have ended."""
        pieces = list(pieces)
        self._watch.planned(sum(piece.nbytes for piece in pieces))
        failed = threading.Event()
        futures: list[Future[None]] = []
        with ThreadPoolExecutor(self._threads, thread_name_prefix="everstep-convert") as pool:
            try:
                self._submit(pieces, pool, futures, failed)
            except BaseException:  # a user's interrupt
                failed.set()
                raise
        for future in futures:
            future.result()

    def _submit(
        self, pieces: list[Piece], pool: ThreadPoolExecutor, futures: list[Future[None]], failed: threading.Event
    ) -> None:
        for piece in pieces:
            if piece.key in self._done:
                self._watch.done(piece)
                continue
            self._enter(piece)
            if failed.is_set():
                self._leave(piece)
                break
            futures.append(pool.submit(self._one, piece, failed))

    def _enter(self, piece: Piece) -> None:
        with self._lock:
            while self._in_use and self._in_use + piece.nbytes > self._budget:
                self._lock.wait()
            self._in_use += piece.nbytes

    def _leave(self, piece: Piece) -> None:
        with self._lock:
            self._in_use -= piece.nbytes
            self._lock.notify_all()

    def _one(self, piece: Piece, failed: threading.Event) -> None:
        try:
            if failed.is_set():
                return
            piece.do()
            self._note(piece.key)
            self._watch.done(piece)
        except BaseException:
            failed.set()
            raise
        finally:
            self._leave(piece)

    def _note(self, key: str) -> None:
        line = (json.dumps(key) + "\n").encode()
        with self._lock:
            self._done.add(key)
            if self._journal is None:
                return
            handle = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)

    def close(self) -> None:
        """All is done: the journal goes."""
        if self._journal is not None:
            self._journal.unlink(missing_ok=True)


class Planned(Exception):
    """The plan is complete; nothing was written."""


class PlannedWork(PieceWork):
    """Replaces the work in a dry run: names, shapes and settings are checked."""

    def __init__(self) -> None:
        super().__init__(None, threads=1, budget_bytes=1)

    def make(self, folder: Path) -> Path:
        """The folder, which is not made."""
        return folder

    def run(self, pieces: Iterable[Piece]) -> None:
        """Raises Planned when all pieces are known."""
        list(pieces)
        raise Planned
