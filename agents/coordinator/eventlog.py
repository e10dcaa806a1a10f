"""The event log: a job's public history, line by line, in the user's file and for listeners."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from everstep.agents.base.strict_json import dumps

P = ParamSpec("P")
R = TypeVar("R")
WAITING_LINES = 10_000  # kept for a file that cannot be written, the newest ones

log = logging.getLogger("everstep.coordinator")


@dataclass
class Listeners:
    """A listener: gets every line of the event log, and the messages that are no events."""

    record: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    news: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)  # the same, without old lines
    heartbeats: list[Callable[[int], None]] = field(default_factory=list)
    telemetry: list[Callable[[str, Any], None]] = field(default_factory=list)  # node, pb.Telemetry


def harmless(listener: Callable[P, R]) -> Callable[P, R | None]:
    """A listener whose exceptions are logged once and suppressed: monitoring must never end a job."""
    told = False

    @functools.wraps(listener)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        nonlocal told
        try:
            return listener(*args, **kwargs)
        except Exception:
            if not told:
                log.exception("monitoring failed, a bug of everstep; the job continues")
            told = True
            return None

    return guarded


class EventLog:
    """Numbered lines; a new coordinator continues where its predecessor stopped.

    A file that cannot be written, because its disk is full, holds nothing up: its lines wait until it can be.
    """

    def __init__(self, path: Path | None, listeners: Listeners) -> None:
        self._path = path
        self._listeners = listeners
        self._waiting: deque[str] = deque(maxlen=WAITING_LINES)
        self._failed = False

    def catch_up(self, lines: list[dict[str, Any]]) -> None:
        """Append the store's lines that the file does not have; listeners get all of them."""
        newest = newest_number(self._path) if self._path is not None else 0
        self._append([line for line in lines if line["number"] > newest])
        self._tell(lines)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """These are in the store by now."""
        self._append(lines)
        self._tell(lines)
        for line in lines:
            for listener in self._listeners.news:
                listener(line)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None or not lines:
            return
        self._waiting.extend(dumps(line) + "\n" for line in lines)
        try:
            _append_whole(self._path, "".join(self._waiting).encode())
        except OSError as error:
            if not self._failed:
                log.warning("--es-events %s: %s; lines are kept until it can be written", self._path, error.strerror)
            self._failed = True
        else:
            self._waiting.clear()
            self._failed = False

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            for listener in self._listeners.record:
                listener(line)


def _append_whole(path: Path, data: bytes) -> None:
    """Append all of it or, where that fails, nothing. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(fd).st_size
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError:
            with contextlib.suppress(OSError):  # a pipe, say
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def newest_number(path: Path) -> int:
    """The number of an event log's last line; 0 if there is none."""
    if not path.is_file():  # no file yet; or it cannot be read, such as a pipe
        return 0
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - (64 << 10)))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["number"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
