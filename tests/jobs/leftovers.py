"""Checks that a test that starts real processes leaves no process or resource behind, even when it fails."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import MARKER, processes_of, wait_until
from tests.jobs.interpreter import launchers, references
from tests.jobs.networks import own_namespaces


def left_behind(folder: Path) -> set[str]:
    """What a job could leave besides processes: torch's log folders, named shared memory, network namespaces."""
    shared = {str(path) for path in Path("/dev/shm").glob("*everstep*")}
    return shared | own_namespaces() | {str(path) for path in folder.glob("torchelastic_*")}


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    marker = uuid.uuid4().hex
    monkeypatch.setenv(MARKER, marker)
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "1")  # a keeper waits for its agent to come back, but not here
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the processes; what they leave is looked for there too
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = left_behind(tmp_path)
    yield

    def running() -> set[int]:
        return {*processes_of(marker), *launchers.descendants(), *references.descendants()}

    try:
        wait_until(lambda: not running(), 5, "all processes of the test have ended")
        wait_until(lambda: not left_behind(tmp_path) - before, 5, f"{left_behind(tmp_path) - before} is gone")
    finally:
        for pid in running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
