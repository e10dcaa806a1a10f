"""A robust mutex in a worker's progress page, which its main thread holds: the first sign of the worker's death.

When a thread ends, however it ends, the kernel releases the robust mutexes that it holds before it takes the memory of
the process down (set_robust_list(2)). That takes a quarter of a millisecond; a pidfd turns readable, and sockets close,
only when all memory is freed, which takes 70 ms per GiB.

What is seen is the end of a *thread*. Other threads of the process may run a moment longer, so the pidfd stays the
proof that nothing of the process writes any more. `execve` releases the mutex too, and a fork does not inherit it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
import time

OFFSET = 1024  # in the page, behind what `progress` writes
_COUNTS = struct.Struct("<QQ")  # whether there is a mutex; how often it was taken: again after an execve
_MUTEX_OFFSET = OFFSET + 64
_MUTEX_BYTES, _ATTRIBUTES_BYTES = 64, 64  # at least: glibc and musl need 40 or 48, and 4
_PROCESS_SHARED, _ROBUST, _ERRORCHECK = 1, 1, 2  # <pthread.h>, in glibc and musl
_TAKE_S = 0.1  # the agent has it for some microseconds after an execve

_libc = ctypes.CDLL(None, use_errno=True)
_held: list[RobustMutex] = []  # by this process: its mapping has to last as long as the main thread


class RobustMutex:
    """The mutex in the page `fd`, mapped. One process creates it, another one's main thread holds it."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._bytes = (ctypes.c_char * _MUTEX_BYTES).from_buffer(self._memory, _MUTEX_OFFSET)

    @classmethod
    def create(cls, fd: int) -> None:
        """Make the mutex, in a page that is all zeros. Raises OSError where the C library or the kernel has none."""
        mutex, attributes = cls(fd), ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
        try:
            _check("pthread_mutexattr_init", attributes)
            _check("pthread_mutexattr_settype", attributes, _ERRORCHECK)
            _check("pthread_mutexattr_setpshared", attributes, _PROCESS_SHARED)
            _check("pthread_mutexattr_setrobust", attributes, _ROBUST)
            _check("pthread_mutex_init", mutex._bytes, attributes)
            _COUNTS.pack_into(mutex._memory, OFFSET, 1, 0)
        finally:
            mutex.close()

    @property
    def holds(self) -> int:
        """How often it has been taken; 0: the worker has not come so far."""
        return holds(self._memory)

    @property
    def exists(self) -> bool:
        """Whether the page has one."""
        return bool(_COUNTS.unpack_from(self._memory, OFFSET)[0])

    def hold(self) -> bool:
        """Take it for as long as this thread lives; whether that was possible. Keep this object as long."""
        until_s = time.monotonic() + _TAKE_S
        while (code := _call("pthread_mutex_trylock", self._bytes)) == errno.EBUSY and time.monotonic() < until_s:
            time.sleep(0.001)
        if code == errno.EOWNERDEAD:
            code = _call("pthread_mutex_consistent", self._bytes)
        if code == 0:
            _COUNTS.pack_into(self._memory, OFFSET, 1, self.holds + 1)
        return code == 0

    def wait(self) -> bool:
        """Block until the thread that holds it has ended, or its process has become another program; whether it has.

        Only while it is held: otherwise this returns False at once.
        """
        code = _call("pthread_mutex_lock", self._bytes)
        if code == errno.EOWNERDEAD:
            _call("pthread_mutex_consistent", self._bytes)
        if code in (0, errno.EOWNERDEAD):
            _call("pthread_mutex_unlock", self._bytes)
        return code == errno.EOWNERDEAD

    def close(self) -> None:
        """Unmap it. Never where it is held."""
        del self._bytes
        self._memory.close()


def holds(memory: mmap.mmap) -> int:
    """How often the mutex of this page was taken."""
    count: int = _COUNTS.unpack_from(memory, OFFSET)[1]
    return count


def hold(fd: int) -> None:
    """Hold the mutex of the page `fd` until this process ends, if this is its main thread and the page has one."""
    if not _held and threading.current_thread() is threading.main_thread():
        mutex = RobustMutex(fd)
        if mutex.exists and mutex.hold():
            _held.append(mutex)
        else:
            mutex.close()


def _call(name: str, *arguments: object) -> int:
    function = getattr(_libc, name, None)
    return errno.ENOSYS if function is None else int(function(*arguments))


def _check(name: str, *arguments: object) -> None:
    if code := _call(name, *arguments):
        raise OSError(code, f"{name}: {os.strerror(code)}")
