"""Memory limits of control groups, versions 1 and 2: the memory left, and the kernel's OOM kills.

A process is subject to the limit of its own group and of every group above it. In a container the group's path may be
the host's, which does not exist inside: then the root of the mounted hierarchy is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")
_NO_LIMIT = 1 << 60  # version 1 reports about 2**63 for no limit


@dataclass(frozen=True)
class ControlGroup:
    """A group and the names of its files."""

    folder: Path
    limit: str
    used: str
    cache: str  # in memory.stat: what the kernel takes back first
    events: str  # has a line "oom_kill N"

    def limit_bytes(self) -> int | None:
        found = _number(self.folder / self.limit)
        return found if found is not None and found < _NO_LIMIT else None

    def left_bytes(self) -> int | None:
        """Bytes left within the limit; None without a limit."""
        limit, used = self.limit_bytes(), _number(self.folder / self.used)
        if limit is None or used is None:
            return None
        return max(0, limit - used + (_field(self.folder / "memory.stat", self.cache) or 0))

    def kills(self) -> int:
        return _field(self.folder / self.events, "oom_kill") or 0


def groups(root: Path = ROOT, own: Path = OWN) -> list[ControlGroup]:
    """The groups that limit this process's memory, its own group first."""
    return [group for group in _all(root, own) if (group.folder / group.used).exists()]


def left(found: list[ControlGroup]) -> int | None:
    """Bytes that this process may still use within all limits; None without any."""
    rooms = [room for group in found if (room := group.left_bytes()) is not None]
    return min(rooms, default=None)


class OutOfMemory:
    """Notices processes that the kernel killed because memory had run out, within a limit or on the whole host."""

    def __init__(self, root: Path = ROOT, own: Path = OWN, vmstat: Path = VMSTAT) -> None:
        self._groups = groups(root, own)
        self._vmstat = vmstat
        self._explained = self._counts()

    def explain(self) -> str:
        """Why the kernel may have killed a process that SIGKILL ended; empty if it counts no kill since the last call.

        Each counted kill explains one process.
        """
        now = self._counts()
        risen = [place for place, count in now.items() if count > self._explained[place]]
        for place in risen:
            self._explained[place] += 1
        if not risen:
            return ""
        limited = [g for g in self._groups if str(g.folder) in risen and g.limit_bytes() is not None]
        if not limited:
            return "by the kernel's OOM killer: memory has run out"
        limit = limited[0].limit_bytes() or 0
        return (
            f"by the kernel's OOM killer: control group {limited[0].folder} is limited to {limit / (1 << 20):,.0f} MiB"
        )

    def _counts(self) -> dict[str, int]:
        counts = {str(group.folder): group.kills() for group in self._groups}
        return {**counts, "host": _field(self._vmstat, "oom_kill") or 0}


def _all(root: Path, own: Path) -> Iterator[ControlGroup]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root if (root / "cgroup.controllers").exists() else root / "unified"
            names = ("memory.max", "memory.current", "inactive_file", "memory.events")
        elif "memory" in controllers.split(","):
            mount = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control")
        else:
            continue
        folder = mount / path.strip("/")
        while folder != mount and folder.is_relative_to(mount):
            yield ControlGroup(folder, *names)
            folder = folder.parent
        yield ControlGroup(mount, *names)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name and value.strip().isdigit():
                return int(value)
    except OSError:
        pass
    return None
