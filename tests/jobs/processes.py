"""Queries of processes that may end during the query."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psutil

T = TypeVar("T")


def each(
    processes: Iterable[psutil.Process | int], ask: Callable[[psutil.Process], T]
) -> list[tuple[psutil.Process, T]]:
    """The result of `ask` for each process, without those that have ended meanwhile."""
    found = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # also of a zombie, where that has no answer
            process = one if isinstance(one, psutil.Process) else psutil.Process(one)
            found.append((process, ask(process)))
    return found


def those(processes: Iterable[psutil.Process | int], that: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The processes for which it is true."""
    return [process for process, true in each(processes, that) if true]


def named(processes: Iterable[psutil.Process | int], name: str) -> list[psutil.Process]:
    """The processes of this name."""
    return those(processes, lambda process: process.name() == name)


def saying(processes: Iterable[psutil.Process | int], text: str) -> list[psutil.Process]:
    """The processes with this in an argument of their command line; zombies have none."""
    return those(processes, lambda process: any(text in part for part in process.cmdline()))


@contextlib.contextmanager
def disk_full(process: psutil.Process) -> Iterator[None]:
    """Keep a process from making any file longer."""
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
