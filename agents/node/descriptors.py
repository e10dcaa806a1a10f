"""File descriptors: how many a node's processes need, and a limit that allows them (getrlimit(2), RLIMIT_NOFILE)."""

from __future__ import annotations

import errno
import fcntl
import os
import resource

# Measured with 1, 4 and 8 workers; the launcher opens the most. A script's own descriptors are added to these.
LEAST, LEAST_A_WORKER = 36, 5
AMPLE, AMPLE_A_WORKER, AMPLE_A_RANK = 512, 16, 4  # two links to every rank, and as many to keepers
OUT_OF_THE_WAY = 240  # from here on: shells and scripts choose low numbers for their own


class TooFewDescriptors(Exception):
    """The limit is below what a node needs, and cannot be raised that far."""


def allow(workers: int, ranks: int) -> None:
    """Raise this process's soft limit, which children inherit, to the need of a node with so many workers in a job with
    so many ranks, within the hard limit. Raises TooFewDescriptors if the hard limit is below the minimum."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _unlimited(hard)
    ample = AMPLE + AMPLE_A_WORKER * workers + AMPLE_A_RANK * ranks
    if _unlimited(soft) < ample:
        soft = min(int(ample), int(most)) if most < ample else ample
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    least = LEAST + LEAST_A_WORKER * workers + _open_now()
    if _unlimited(soft) < least:
        raise TooFewDescriptors(
            f"a process may have {soft} open files, and a node with {workers} workers needs {least} at least, "
            f"{ample} to be safe: raise the hard limit (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of a "
            "container)"
        )


def out_of_the_way(fd: int) -> int:
    """Another number for a descriptor, high where the limit allows, that programs this process becomes inherit."""
    limit = _unlimited(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for lowest in (OUT_OF_THE_WAY, int(min(limit, OUT_OF_THE_WAY)) // 2, 3):
        try:
            moved = fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EMFILE):
                raise
            continue
        os.close(fd)
        return moved
    os.set_inheritable(fd, True)
    return fd


def _unlimited(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _open_now() -> int:
    """Those beyond the standard three that were open when this process started."""
    return sum(int(name) > 2 for name in os.listdir("/proc/self/fd")) - 1  # one reads the folder
