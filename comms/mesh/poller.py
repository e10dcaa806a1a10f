"""One epoll set with a handler per descriptor, and a wake-up that any thread or signal handler may ring."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

_EVENTS_PER_POLL = 64


class Poller:
    """Calls the handlers of ready descriptors. Not thread-safe, except `wake`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.RLock()  # reentrant: a signal handler may ring while its own thread closes
        self._epoll.register(self._wake_fd, READ)

    def watch(self, fd: int, handler: Callable[[int], None], events: int = READ) -> None:
        """Call `handler(events)` from `poll` whenever `fd` is ready."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a watched `fd`."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; to be called before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def poll(self, timeout_s: float) -> None:
        """Wait until something is ready, for `timeout_s` at most, and handle it. A rung wake-up ends the wait."""
        for fd, events in self._epoll.poll(timeout_s, _EVENTS_PER_POLL):
            handler = self._handlers.get(fd)  # None: the wake-up, or forgotten by an earlier handler of this round
            if handler is not None:
                handler(events)

    def wake(self) -> None:
        """End the present `poll`, and every later one at once until `calm`. From any thread; idempotent."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def calm(self) -> None:
        """Take the wake-up back."""
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return  # it was not rung

    def close(self) -> None:
        """Close the set and the wake-up; the watched descriptors are their owners'. Idempotent."""
        with self._wake_lock:
            if self._wake_fd < 0:
                return
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._handlers.clear()
        self._epoll.close()
