"""Threads that end alone, and threads of other processes that are held where they end (ptrace(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_SEIZE, _DETACH, _TRACE_EXIT = 0x4206, 17, 0x40
_WALL = 0x40000000  # waitpid(2): threads too
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_EXIT = {"x86_64": 60, "aarch64": 93}
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@contextlib.contextmanager
def held_at_its_end(pid: int) -> Iterator[None]:
    """A thread of this process, not its main one, stops where it ends: the process is gone when this is left."""
    thread = next(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid))
    if _libc.ptrace(_SEIZE, thread, None, _TRACE_EXIT) != 0:
        raise OSError(ctypes.get_errno(), "ptrace(PTRACE_SEIZE)")
    try:
        yield
    finally:
        os.waitpid(thread, _WALL)  # it has stopped
        _libc.ptrace(_DETACH, thread, None, None)


def end_this_thread() -> None:
    """End only this thread, although it is the main one, with status 0."""
    _libc.syscall(_SYS_EXIT[os.uname().machine], 0)
