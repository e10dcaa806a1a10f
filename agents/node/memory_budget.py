"""The memory that a node can use for protection."""

from __future__ import annotations

import psutil

from . import cgroups


def available() -> int:
    """Free memory of this host now, in bytes, within the limits of this process's control groups.

    Snapshots are in anonymous shared memory (memfd), which the size of /dev/shm does not limit.
    """
    free = int(psutil.virtual_memory().available)
    room = cgroups.left(cgroups.groups())
    return free if room is None else max(1, min(free, room))
