"""Torch's own report of failed workers (ChildFailedError) and its error files."""

from __future__ import annotations

import os

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler


class Failures:
    """The workers of this node that failed in the present attempt."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._found: dict[int, ProcessFailure] = {}

    def add(self, rank: int, local_rank: int, pid: int, status: int, error_file: str) -> None:
        """A worker ended with this exit status (negative: the signal that killed it)."""
        self._found[rank] = ProcessFailure(local_rank, pid, status, error_file)

    def recovered(self, rank: int) -> None:
        """A replacement of this rank has started: its predecessor is not what a later failure comes from."""
        self._found.pop(rank, None)

    def clear(self) -> None:
        """All workers start again."""
        self._found.clear()

    def report(self) -> str:
        """The report that torchrun prints; empty if nothing failed here."""
        if not self._found:
            return ""
        error = ChildFailedError(self._role, self._found)
        _, first = error.get_first_failure()
        pass_on(first.error_file, first.exitcode)
        return str(error) + "\n"


def pass_on(error_file: str, status: int) -> None:
    """Copy a worker's error file to the path where this process's caller expects one."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and os.path.isfile(error_file):
        get_error_handler().dump_error_file(error_file, status)
