"""Commit stamps: each worker process appends to a file of its own, the benchmark reads them all.

A line is one JSON object. The first one describes the process; a `step` line says that this process has committed that
step, a `failed` line that the work of a step was discarded. Times are CLOCK_MONOTONIC seconds, comparable between the
processes of a host.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Stamper:
    """The writer, in one worker process."""

    def __init__(self, folder: str, rank: int) -> None:
        path = Path(folder) / f"stamps-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._write({"pid": os.getpid(), "rank": rank, "t": time.monotonic()})

    def committed(self, step: int, **fields: Any) -> None:
        """`step` counts from 0 and is committed on this worker now."""
        self._write({"step": step, "t": time.monotonic(), **fields})

    def failed(self, step: int) -> None:
        """The work of `step` on this worker was discarded, and will be repeated."""
        self._write({"failed": step, "t": time.monotonic()})

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Commit:
    pid: int
    step: int
    t: float
    digest: str | None = None
    samples: int | None = None
    loss: float | None = None


@dataclass
class Process:
    """The stamps of one worker process so far."""

    pid: int
    rank: int
    started: float
    commits: list[Commit] = field(default_factory=list)
    failures: list[tuple[int, float]] = field(default_factory=list)


class Stamps:
    """Reads a folder of stamp files, as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_bytes: dict[Path, int] = {}
        self.processes: dict[int, Process] = {}

    def poll(self) -> list[Commit]:
        """The commits that are new since the last call, by time."""
        fresh: list[Commit] = []
        for path in self._folder.glob("stamps-*.jsonl"):
            offset = self._read_bytes.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read()
            whole = chunk[: chunk.rfind(b"\n") + 1]
            self._read_bytes[path] = offset + len(whole)
            pid = int(path.stem.removeprefix("stamps-"))
            for line in whole.splitlines():
                fresh += self._take(pid, json.loads(line))
        return sorted(fresh, key=lambda c: c.t)

    def _take(self, pid: int, line: dict[str, Any]) -> list[Commit]:
        if "rank" in line:
            self.processes[pid] = Process(pid, line["rank"], line["t"])
        elif "failed" in line:
            self.processes[pid].failures.append((line["failed"], line["t"]))
        else:
            commit = Commit(pid, line["step"], line["t"], line.get("digest"), line.get("samples"), line.get("loss"))
            self.processes[pid].commits.append(commit)
            return [commit]
        return []

    def commits(self) -> list[Commit]:
        """Everything read so far, by time."""
        return sorted((c for p in self.processes.values() for c in p.commits), key=lambda c: c.t)

    def last_step(self, *, until: float = float("inf")) -> int:
        """The newest step that any worker had committed by `until`; -1 before the first."""
        return max((c.step for p in self.processes.values() for c in p.commits if c.t <= until), default=-1)

    def digests(self) -> dict[int, set[str]]:
        """The digests that workers reported of each step."""
        found: dict[int, set[str]] = {}
        for commit in self.commits():
            if commit.digest is not None:
                found.setdefault(commit.step, set()).add(commit.digest)
        return found


def median(values: list[float]) -> float:
    return percentile(values, 50.0)


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks; nan for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
