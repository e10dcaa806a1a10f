"""The event log: what everybody may know of a job, line by line, in the user's file and for who listens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REMEMBERED_STEPS = 2000


@dataclass
class Listeners:
    """Who else wants to know: of every line of the event log, and of messages that are no events."""

    record: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    news: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)  # likewise, but not of old lines
    heartbeats: list[Callable[[int], None]] = field(default_factory=list)
    telemetry: list[Callable[[str, Any], None]] = field(default_factory=list)  # node, pb.Telemetry


class EventLog:
    """Lines, numbered; the coordinator that takes over continues where another one stopped."""

    def __init__(self, path: Path | None, listeners: Listeners) -> None:
        self._path = path
        self._listeners = listeners
        self._committed_s: dict[int, float] = {}  # step -> when

    def catch_up(self, lines: list[dict[str, Any]]) -> None:
        """Of the lines that the store has, write those that the file lacks; listeners hear all of them."""
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

    def age_s(self, step: int) -> float | None:
        """How long ago a step was committed."""
        at_s = self._committed_s.get(step)
        return round(time.monotonic() - at_s, 3) if at_s is not None else None

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None or not lines:
            return
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["event"] == "committed":
                self._committed_s[line["step"]] = line["at_s"]
                self._committed_s.pop(line["step"] - REMEMBERED_STEPS, None)
            for listener in self._listeners.record:
                listener(line)


def newest_number(path: Path) -> int:
    """The number of an event log's last line; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - (64 << 10)))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["number"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
