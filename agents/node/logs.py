"""Where workers' output goes: torch's own log specifications (redirects, tee, filters), for workers forked by us."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.tail_log import TailLog


class WorkerLogs:
    """The log destinations of one node's workers, per restart."""

    def __init__(
        self,
        specs: LogsSpecs,
        slots: int,
        role: str,
        prefix_template: str | None = None,
        filters: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        """`filters`: of teed standard output and error; lines that have one of them go to a file of their own, too."""
        self._specs = specs
        self._filters = filters
        self._files: list[TextIO] = []
        self._slots = slots
        self._role = role
        self._prefix_template = prefix_template
        self._attempt = ""
        self._destinations: LogsDest | None = None
        self._tails: list[Any] = []

    def paths(self, local_rank: int, environment: dict[str, str], ranks: Mapping[int, int]) -> tuple[str, str, str]:
        """(stdout, stderr, error file) of a worker; an empty path is the launcher's own stream.

        `ranks`: local rank -> rank, of all workers of the node.
        """
        attempt = environment["TORCHELASTIC_RESTART_COUNT"]
        if self._destinations is None or attempt != self._attempt:
            self._open(attempt, environment, ranks)
        destinations = self._destinations
        assert destinations is not None
        return (
            destinations.stdouts[local_rank],
            destinations.stderrs[local_rank],
            destinations.error_files[local_rank],
        )

    def _open(self, attempt: str, environment: dict[str, str], ranks: Mapping[int, int]) -> None:
        self.close()
        self._attempt = attempt
        environments = {local_rank: dict(environment) for local_rank in range(self._slots)}
        self._destinations = self._specs.reify(environments)
        prefixes = None
        if self._prefix_template:
            prefixes = {
                local_rank: self._prefix_template.replace("${role_name}", self._role)
                .replace("${rank}", str(ranks.get(local_rank, "?")))
                .replace("${local_rank}", str(local_rank))
                for local_rank in range(self._slots)
            }
        for files, stream in (
            (self._destinations.tee_stdouts, sys.stdout),
            (self._destinations.tee_stderrs, sys.stderr),
        ):
            self._tails.append(TailLog(self._role, files, stream, prefixes).start())
        self._open_filtered(self._destinations, prefixes)

    def _open_filtered(self, destinations: LogsDest, prefixes: dict[int, str] | None) -> None:
        """Torchrun's --duplicate-stdout-filters, --duplicate-stderr-filters."""
        for name, teed, needles in (
            ("filtered_stdout", destinations.tee_stdouts, self._filters[0]),
            ("filtered_stderr", destinations.tee_stderrs, self._filters[1]),
        ):
            if not needles:  # an older torch has neither the flags nor the files
                continue
            stream = Path(getattr(destinations, name)).open("w", errors="replace", buffering=1)  # noqa: SIM115
            self._files.append(stream)

            def wanted(line: str, needles: Sequence[str] = needles) -> bool:
                return any(needle in line for needle in needles)

            tail = TailLog(self._role, teed, stream, prefixes, log_line_filter=wanted)
            self._tails.append(tail.start())

    def close(self) -> None:
        """Print the rest of the teed output, and stop."""
        for tail in self._tails:
            tail.stop()
        self._tails.clear()
        for stream in self._files:
            stream.close()
        self._files.clear()


def discard(specs: LogsSpecs, *, succeeded: bool) -> None:
    """Remove the folder that torch made for a job without --log-dir, unless it holds reports of a failure."""
    folder = Path(specs.root_log_dir)
    if succeeded or not any(path.is_file() for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
