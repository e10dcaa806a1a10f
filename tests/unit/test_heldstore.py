"""A store whose files are deleted while its coordinator runs, and after it was killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.agents.coordinator.held_store import HeldStore
from everstep.agents.coordinator.store import SqliteStore

WRITES = """
import os, signal, sys
from pathlib import Path
from everstep.agents.coordinator.store import SqliteStore
store = SqliteStore(Path(sys.argv[1]), "job")
store.commit({"kept": b"before"}, sync=True)
print("serves", flush=True)
sys.stdin.readline()
store.commit({"kept": b"after", "more": b"x" * 100_000}, sync=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("lost", ["nothing", "folder", "store", "log"])
def test_what_was_deleted_is_written_again(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "temporary" / "store.sqlite"
    coordinator = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert coordinator.stdout is not None
    assert coordinator.stdout.readline() == "serves\n"
    held = HeldStore(path)
    held.hold()
    if lost == "folder":
        shutil.rmtree(path.parent)
    elif lost != "nothing":
        Path(f"{path}{'' if lost == 'store' else '-wal'}").unlink()
    coordinator.communicate("\n", timeout=60)
    assert held.mend() == (lost != "nothing")
    held.close()
    store = SqliteStore(path, "job")
    assert store.load() == {"kept": b"after", "more": b"x" * 100_000}
    assert path.stat().st_mode & 0o077 == 0
    store.close(forget=True)
