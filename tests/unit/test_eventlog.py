"""The file of the event log: whole lines, even on a disk that is temporarily full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.agents.coordinator.eventlog import (
    WAITING_LINES,
    EventLog,
    Listeners,
    harmless,
    newest_number,
)

# Run with a file name: no file may exceed 1000 bytes for a while.
FULL = """
import resource, sys
from pathlib import Path
from everstep.agents.coordinator.eventlog import EventLog, Listeners
path = Path(sys.argv[1])
heard = []
log = EventLog(path, Listeners(record=[heard.append]))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
for number in range(1, 41):
    log.add([{"number": number, "event": "x" * 50, "at_s": 1.0}])
assert len(heard) == 40
print(path.stat().st_size, path.read_bytes()[-1:] == b"\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.add([{"number": 41, "event": "y", "at_s": 1.0}])
"""


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def line(number: int) -> dict[str, object]:
    return {"number": number, "event": "e", "at_s": 1.0}


def test_a_full_disk_tears_no_line_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "events"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    size, whole = done.stdout.split()
    assert 800 < int(size) <= 1000
    assert whole == "True"
    assert numbers(path) == list(range(1, 42))
    assert done.stderr.count("File too large; lines are kept until it can be written") == 1


def test_a_folder_that_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mounted" / "events"
    log = EventLog(path, Listeners())
    log.add([line(1), line(2)])
    log.add([line(3)])
    path.parent.mkdir()
    log.add([line(4)])
    path.unlink()
    path.parent.rmdir()
    log.add([line(5)])
    path.parent.mkdir()
    log.add([line(6)])
    assert numbers(path) == [5, 6]
    assert len(caplog.records) == 2, "once each time"


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "mounted" / "events"
    log = EventLog(path, Listeners())
    log.add([line(number) for number in range(WAITING_LINES + 10)])
    path.parent.mkdir()
    log.add([line(-1)])
    assert numbers(path) == [*range(11, WAITING_LINES + 10), -1]


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fails(line: object) -> None:
        raise KeyError("a field of another version")

    heard: list[object] = []
    log = EventLog(None, Listeners(record=[harmless(fails), heard.append], news=[harmless(fails)]))
    for number in range(3):
        log.add([line(number)])
    assert len(heard) == 3
    assert len(caplog.records) == 2, "once each"


def test_who_takes_over_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "events"
    assert newest_number(path) == 0
    EventLog(path, Listeners()).add([line(1), line(2)])
    EventLog(path, Listeners()).catch_up([line(1), line(2), line(3)])
    assert numbers(path) == [1, 2, 3]
    assert newest_number(Path("/dev/full")) == 0, "which can be read without end"
