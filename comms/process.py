"""What is Linux's own about processes: children die with their parents, and who can share memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    parent = os.getppid()
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGKILL)


def own_command(module: str, *arguments: str) -> list[str]:
    """The command line of a process that runs a module of ours, and finds no others in the working folder."""
    package = sys.modules[__name__.partition(".")[0]]
    root = Path(package.__file__ or "").absolute().parents[1].resolve()
    found = any(Path(folder).resolve() == root for folder in sys.path if folder)  # else it is the working folder itself
    return [sys.executable, *(["-P"] if found else []), "-m", module, *arguments]


def process_name() -> str:
    """The name of this process that `ps` and `top` show (proc(5), comm)."""
    return Path("/proc/self/comm").read_text().removesuffix("\n")


def rename_process(name: str) -> None:
    """Give this process another name, of at most 15 bytes."""
    Path("/proc/self/comm").write_text(name)


def exit_status(pid: int) -> int | None:
    """That of a process which nobody has reaped yet, as `subprocess` has it (proc(5), stat); None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None


def leave(status: int) -> NoReturn:
    """End this process, and do not take its modules apart first: where torch is one, that takes a third of a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(status)


def host_id() -> str:
    """Equal for processes that share a kernel and a network namespace, and so can meet at an abstract unix socket.

    It is the boot id and the namespace's inode: containers of one machine are different hosts unless they share it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLD_MAX = 32 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next step instead of giving it back page by page (mallopt(3)).

    A training step frees and allocates the same sizes again and again; without this every step pays page faults.
    A C library without mallopt is left as it is.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
