"""Kills conversions: `kills.py FOLDER [PIECES,...] COMMAND...` runs a command of everstep, which is to make FOLDER, in
a forked process, again and again until one ends. It kills each once it has done so many more pieces, and a moment
later, which is the fraction of the number in units of 5 ms; the last one is left to end.

A line of JSON for each attempt: its status (-9: killed), whether the destination is there, and the pieces that were
done by then, each with when its files were written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core import format as formats  # before the fork: what is killed is the conversion
from everstep.checkpointing.convert.drive import driver  # before the fork: what is killed is the conversion
from everstep.cli import main

PARTIAL = ".everstep-partial"
MOMENT_S = 0.005
NEVER = 1e9


def pieces(partial: Path) -> dict[str, dict[str, Any]]:
    """What is done, by the parts of a universal checkpoint or by the journal: when each was written, and how often."""
    found: dict[str, dict[str, Any]] = {}
    for part in (partial / "parts").glob("*.json"):
        try:
            names = list(json.loads(part.read_text())["arrays"])
        except ValueError:  # it is being written
            continue
        found |= {name: {"times": times(partial / name), "told": 1} for name in names}
    journal = partial / ".everstep-journal"
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    for line in lines:
        folders = [path for path in partial.glob(f"*/{json.loads(line)}") if path.is_dir()]
        written = [at for folder in folders for at in times(folder)]
        found[json.loads(line)] = {"times": written, "told": lines.count(line)}
    return found


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()]


def count(partial: Path) -> int:
    """How many pieces are done, found out quickly."""
    try:
        return len(os.listdir(partial / "parts"))
    except OSError:
        pass
    try:
        return (partial / ".everstep-journal").read_bytes().count(b"\n")
    except OSError:
        return 0


def attempt(arguments: list[str], partial: Path, more: float) -> int:
    until = count(partial) + int(more)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(arguments))
    while count(partial) < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
    time.sleep(more % 1 * MOMENT_S)
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run(arguments: list[str], target: Path, kills: list[float]) -> None:
    partial = target.with_name(target.name + PARTIAL)
    for more in [*kills, NEVER]:
        status = attempt(arguments, partial, more)
        print(json.dumps({"status": status, "there": target.exists(), "pieces": pieces(partial)}), flush=True)
        if status != -signal.SIGKILL:
            return


if __name__ == "__main__":
    for name in ("hf", driver.UNIVERSAL, "deepspeed-universal"):
        assert name == driver.UNIVERSAL or formats.load(name)
    run(sys.argv[3:], Path(sys.argv[1]), json.loads(sys.argv[2]))
