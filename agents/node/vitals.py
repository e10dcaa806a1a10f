"""The kernel's view of a worker without progress: signs of life, and where its threads wait.

Read from /proc, for the worker and its descendants, without the worker's cooperation.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from everstep.elastic.protocol.liveness import Sign

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BUSY_RATIO = 0.05  # of a processor: less is a timer that ticks
BUSY_TICKS = 2  # at least
READ_BYTES = 4096  # likewise
MOST_THREADS = 256  # looked at
SHOWN_THREADS = 32
_SLEEPING_IN_STORAGE = re.compile(
    r"nfs|rpc_|fuse|request_wait_answer|ceph|cifs|smb|ll_|lustre|gpfs|9p|p9_|folio_wait|wait_on_page|io_schedule"
)
# System calls by number: calls that read or write a descriptor, and calls that resolve a path.
_ON_FILES = {"x86_64": {0, 1, 17, 18, 19, 20, 74, 75, 78, 217, 295}, "aarch64": {61, 63, 64, 65, 66, 67, 68, 69, 82}}
_ON_PATHS = {"x86_64": {2, 4, 6, 21, 257, 262, 332}, "aarch64": {48, 56, 79, 291}}
_FILES, _PATHS = (table.get(platform.machine(), set()) for table in (_ON_FILES, _ON_PATHS))


class _Totals(NamedTuple):
    """Of a process and its descendants, since they began."""

    at_s: float
    ticks: int = 0
    faults: int = 0  # pages that had to be read
    bytes: int = 0

    def __add__(self, other: object) -> _Totals:
        assert isinstance(other, _Totals)
        return _Totals(self.at_s, self.ticks + other.ticks, self.faults + other.faults, self.bytes + other.bytes)


@dataclass
class Vitals:
    """Samples one worker. The first sample shows waits only: the others need a previous sample."""

    pid: int
    _last: _Totals | None = None

    def look(self, now: float) -> Sign:
        """The signs of life since the last sample."""
        states: list[str] = []
        stored = False
        totals = _Totals(now)
        for process in _family(self.pid):
            totals += _totals(process)
            for thread in _threads(process):
                state = _state(thread)
                states.append(state)
                stored = stored or state == "D" or (state == "S" and _waits_for_storage(thread))
        before, self._last = self._last, totals
        if states and all(state == "T" for state in states):
            return Sign.STOPPED
        if before is not None and _moved(before, totals):
            return Sign.WORKS
        if stored:
            return Sign.STORAGE
        return Sign.WORKS if {"R", "t"} & set(states) else Sign.NONE  # t: a debugger holds it

    def forget(self) -> None:
        """It makes progress again."""
        self._last = None


def _moved(before: _Totals, now: _Totals) -> bool:
    ticks = now.ticks - before.ticks
    busy = ticks >= max(BUSY_TICKS, BUSY_RATIO * _TICKS_PER_S * (now.at_s - before.at_s))
    return busy or now.faults > before.faults or now.bytes - before.bytes >= READ_BYTES


def describe(pid: int) -> str:
    """Where the threads of a process wait in the kernel, one line each; unreadable threads are left out."""
    lines = []
    for thread in _threads(Path("/proc") / str(pid))[:SHOWN_THREADS]:
        name, waits = _text(thread / "comm").strip(), _text(thread / "wchan").strip()
        call = _text(thread / "syscall").split(" ", 1)[0].strip()
        stack = " < ".join(re.findall(r"\] (\w+)", _text(thread / "stack"))[:8])
        parts = [f"state {_state(thread)}"]
        parts += [f"waits in {waits}"] if waits not in ("", "0") else []
        parts += [f"system call {call}"] if call not in ("", "running") else []
        parts += [f"kernel stack {stack}"] if stack else []
        lines.append(f"thread {thread.name} ({name}): {', '.join(parts)}")
    return "\n".join(lines)


def _family(pid: int) -> Iterator[Path]:
    """The /proc folders of a process and its descendants."""
    found = [str(pid)]
    for one in found:
        folder = Path("/proc") / one
        yield folder
        for thread in _threads(folder):
            found += _text(thread / "children").split()[: MOST_THREADS - len(found)]


def _threads(process: Path) -> list[Path]:
    try:
        return [process / "task" / name for name in sorted(os.listdir(process / "task"), key=int)[:MOST_THREADS]]
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # it is gone, or another user's
        return ""


def _state(thread: Path) -> str:
    return _text(thread / "stat").rpartition(")")[2].strip()[:1]


def _totals(process: Path) -> _Totals:
    fields = _text(process / "stat").rpartition(")")[2].split()
    if len(fields) < 13:
        return _Totals(0.0)
    counted = dict(line.split(": ") for line in _text(process / "io").splitlines() if ": " in line)
    moved = sum(int(counted.get(name, 0)) for name in ("rchar", "wchar"))
    return _Totals(0.0, int(fields[11]) + int(fields[12]), int(fields[9]), moved)


def _waits_for_storage(thread: Path) -> bool:
    """Whether a sleeping thread waits for a file: by where the kernel has it sleep, or by its system call."""
    if _SLEEPING_IN_STORAGE.search(_text(thread / "wchan")):
        return True
    call = _text(thread / "syscall").split()
    if len(call) < 2 or not call[0].isdigit():
        return False
    number = int(call[0])
    if number in _PATHS:
        return True
    if number not in _FILES:
        return False
    try:
        place = os.readlink(thread / "fd" / str(int(call[1], 16)))
    except (OSError, ValueError):
        return False
    return place.startswith("/") and not place.startswith(("/dev/", "/memfd:"))
