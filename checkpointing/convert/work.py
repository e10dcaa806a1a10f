"""The doing of a conversion: many independent pieces, in parallel, in bounded memory, none of them twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

JOURNAL = ".everstep-journal"


@dataclass(frozen=True)
class Piece:
    """One thing to write. `key` names it for ever (the file, say); `nbytes`: the memory it takes while it is done."""

    key: str
    nbytes: int
    do: Callable[[], object]


class Work:
    """Runs pieces on threads; at most `budget_bytes` of them at a time, or one that is larger.

    What is done is written to a journal in `folder`, so that a conversion that was killed goes on where it was. A
    piece must therefore leave its file complete (synchronised) when it returns, and may be done again if it had not.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        threads: int,
        budget_bytes: int,
        on_done: Callable[[Piece], None] = lambda piece: None,
    ) -> None:
        self._journal = folder / JOURNAL if folder is not None else None
        self._threads = threads
        self._budget = budget_bytes
        self._on_done = on_done
        self._done = self._read()
        self._lock = threading.Condition()
        self._in_use = 0

    @classmethod
    def unrecorded(cls, threads: int, budget_bytes: int, on_done: Callable[[Piece], None]) -> Work:
        """Without a journal: what is done is known from elsewhere."""
        return cls(None, threads=threads, budget_bytes=budget_bytes, on_done=on_done)

    def skip(self, piece: Piece) -> None:
        """A piece that an earlier attempt has done."""
        self._on_done(piece)

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
        """Do all that is not done yet. Raises what a piece raised, after those under way have ended."""
        failed = threading.Event()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="everstep-convert") as pool:
            futures = []
            for piece in pieces:
                if piece.key in self._done:
                    self._on_done(piece)
                    continue
                self._enter(piece)
                if failed.is_set():
                    self._leave(piece)
                    break
                futures.append(pool.submit(self._one, piece, failed))
        for future in futures:
            future.result()

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
            piece.do()
            self._note(piece.key)
            self._on_done(piece)
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
