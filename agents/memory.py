"""How much memory a node can give to protection."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_CGROUP = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """Bytes in "512MiB", "8G" or "1000000". Raises ValueError for anything else, and for nothing at all."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError(f"expected a size such as 512MiB or 8G, got {text!r}")
    size = int(float(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise ValueError(f"expected a size of more than nothing, got {text!r}")
    return size


def available() -> int:
    """What is free on this host now, in bytes, within the limit of the control group we are in.

    Snapshots lie in anonymous shared memory (memfd), which the size of /dev/shm does not limit.
    """
    free = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return free if limit is None or used is None else max(1, min(free, limit - used))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
