"""Which systems continue when their coordinator is killed: everstep's coordinator and torchft's lighthouse.

    python tests/bench/coordinator.py --json

Each system trains the same job with the same number of workers. Once all train, the process that coordinates them gets
a SIGKILL, and they are watched for a while: how many steps they commit, how long the longest pause is, who lives. A
worker is killed some seconds later, since coordinating is what a coordinator is for. torchft's lighthouse is started
once, as its documentation does. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
from recovery import DOCUMENTED, drive, settled
from stamps import Stamps
from systems import Everstep, System, Torchft
from workload import Job

WATCHED_S = 30.0
WORKER_AFTER_S = 5.0
COORDINATOR = "es-coordinator"
SYSTEMS: dict[str, tuple[type[System], dict[str, Any] | None]] = {
    "everstep": (Everstep, None),
    "torchft": (Torchft, DOCUMENTED),
}


class Coordinated:
    """A system whose coordinator may die during the measurement."""

    def __init__(self, system: System) -> None:
        self.system = system

    def pid(self) -> int:
        """The process that coordinates."""
        if isinstance(self.system, Torchft):
            return self.system.lighthouse.pid
        launcher = psutil.Process(self.system.children[0].pid)
        return next(child.pid for child in launcher.children() if child.name() == COORDINATOR)

    def tick(self) -> None:
        """Keep dead replicas coming; a dead lighthouse is what is measured."""
        if isinstance(self.system, Torchft):
            for rank, child in enumerate(self.system.replicas):
                if child.poll() not in (None, 0):
                    self.system.replicas[rank] = self.system._replica(rank)
        else:
            self.system.tick()


def measure(system: System, job: Job) -> dict[str, Any]:
    """Kill its coordinator, and a worker some seconds later."""
    stamps = Stamps(Path(job.folder))
    coordinated = Coordinated(system)
    system.start()
    try:
        drive(system, stamps, lambda: settled(stamps, job.workers, 0.0), 120, "all train")
        before = {commit.pid for commit in stamps.commits()}
        killed_s, at_step = time.monotonic(), stamps.last_step()
        os.kill(coordinated.pid(), signal.SIGKILL)
        lost_worker_s = 0.0
        while time.monotonic() < killed_s + WATCHED_S:
            stamps.poll()
            coordinated.tick()
            if not lost_worker_s and time.monotonic() > killed_s + WORKER_AFTER_S:
                lost_worker_s = time.monotonic()
                victim = max(commit.pid for commit in stamps.commits() if commit.t > killed_s - 5)
                os.kill(victim, signal.SIGKILL)
            time.sleep(0.005)
        after = sorted(commit.t for commit in stamps.commits() if commit.t > killed_s)
        pauses = [b - a for a, b in zip([killed_s, *after], [*after, killed_s + WATCHED_S], strict=True)]
        later = [commit for commit in stamps.commits() if commit.t > lost_worker_s]
        return {
            "steps_after_the_kill": stamps.last_step() - at_step,
            "longest_pause_s": max(pauses),
            "still_training": bool(after) and killed_s + WATCHED_S - after[-1] < 5.0,
            "workers_that_went_on": len(before & {commit.pid for commit in later}),
            "workers": job.workers,
            "steps_with_two_digests": sum(len(found) > 1 for found in stamps.digests().values()),
        }
    finally:
        system.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object (the only form)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
        for name, (kind, options) in SYSTEMS.items():
            if reason := kind.unavailable():
                found[name] = {"skipped": reason}
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            place = Path(folder) / name
            place.mkdir()
            job = Job(layers=2, width=64, context=32, workers=arguments.workers, options=options).moved(place)
            try:
                found[name] = measure(kind(job=job), job)
            except Exception:
                found[name] = {"skipped": f"failed: {traceback.format_exc(limit=3)}"}
    own = found["everstep"]
    targets = [
        {"name": "everstep: still training", "value": own.get("still_training"), "bound": True},
        {"name": "everstep: steps that came out in two ways", "value": own.get("steps_with_two_digests"), "bound": 0},
    ]
    for target in targets:
        target["met"] = target["value"] == target["bound"]
    print(json.dumps({"benchmark": "coordinator", "systems": found, "targets": targets}))


if __name__ == "__main__":
    main()
