"""Packages that a script imports are imported once a node, before workers are forked."""

from __future__ import annotations

from pathlib import Path

from tests.jobs import everstep

SCRIPT = """
import os
from heavy import part
import busy
print(part.PID == os.getppid(), busy.PID == os.getpid())
"""
BUSY = """
import os, threading, time
PID = os.getpid()
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
"""


def packages(folder: Path) -> dict[str, str]:
    """`heavy` finds its parts when they are first asked for; `busy` starts a thread, which no fork would have."""
    heavy, busy = folder / "heavy", folder / "busy"
    for package in (heavy, busy):
        package.mkdir(parents=True)
    (heavy / "__init__.py").touch()
    (heavy / "part.py").write_text("import os\nPID = os.getpid()\n")
    (busy / "__init__.py").write_text(BUSY)
    return {"PYTHONPATH": str(folder)}


def test_what_a_script_imports(tmp_path: Path) -> None:
    """Unless a fork could not use it, which is said; nothing is imported if so asked."""
    environment = packages(tmp_path / "site-packages")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    common = ["run", "--nproc-per-node=1", f"--log-dir={tmp_path}/logs"]
    ended = everstep(*common, str(script), environment=environment)
    assert (ended.status, ended.stdout) == (0, "True True\n")
    assert ended.stderr.splitlines() == [
        "everstep: imported before workers are forked: heavy, busy (--es-preload=none: not)",
        "everstep: busy is not imported before workers are forked: it has started threads, which a fork cannot use; "
        "each worker imports it by itself",
    ]
    ended = everstep(*common, "--es-preload=none", str(script), environment=environment)
    assert (ended.status, ended.stdout, ended.stderr) == (0, "False True\n", "")


def test_ranks_of_an_unseeded_script_draw_other_numbers(tmp_path: Path) -> None:
    """As under torchrun, whose workers import numpy themselves; a training of Everstep's seeds it."""
    script = tmp_path / "script.py"
    script.write_text("import random, numpy\nprint(random.random(), numpy.random.random())\n")
    lines: list[str] = []
    for _ in range(2):
        ended = everstep("run", "--nproc-per-node=2", f"--log-dir={tmp_path}/logs", str(script))
        assert ended.status == 0, ended.stderr
        lines += ended.stdout.splitlines()
    drawn = [number for line in lines for number in line.split()]
    assert len(set(drawn)) == len(drawn) == 8, drawn
