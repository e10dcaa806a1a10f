"""How far a lost worker moves a training run: the loss of fixed samples, against the same job in which none is lost.

    python tests/bench/convergence.py --json [--kills N] [--systems everstep,torchft-tuned,...] [--keep FOLDER]

Each system trains the same small GPT with dropout three times: undisturbed, undisturbed again, and with workers that
are killed at step 20 and every 40 steps from there; each is replaced as the system does it. After each step the workers
evaluate the same samples, without dropout. `deviation` is the mean over the 200 steps after the first kill of
|loss - loss of the undisturbed run| / loss of the undisturbed run; `repeated` is that of the second undisturbed run.

`everstep-own-random` is everstep whose dropout draws from a generator of each process, which is not carried over to
whoever computes a micro-batch again: what the resharding of random numbers is worth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recovery import DOCUMENTED, START_TIMEOUT_S, TUNED, chosen, drive, say
from stamps import Stamps
from systems import Everstep, System, Torchft, Torchrun, versions
from workload import Job

FIRST, EVERY, STEPS = 20, 40, 200
SYSTEMS: dict[str, tuple[type[System], dict[str, Any]]] = {
    "everstep": (Everstep, {}),
    "everstep-own-random": (Everstep, {"own_random_numbers": True}),
    "torchft-tuned": (Torchft, TUNED),
    "torchft": (Torchft, DOCUMENTED),
    "torchrun": (Torchrun, {"checkpoint_every_steps": 1}),
}


def run(system: System, kills: Sequence[int]) -> dict[int, float]:
    """The losses by step, of a job in which a worker is killed as soon as each of these steps is committed."""
    stamps = Stamps(system.folder)
    try:
        system.start()
        for number, step in enumerate(kills):
            drive(system, stamps, lambda: stamps.last_step() >= step, START_TIMEOUT_S, f"step {step}")  # noqa: B023
            newest = sorted({commit.pid for commit in stamps.commits() if commit.step >= step - 2})
            os.kill(newest[number % len(newest)], signal.SIGKILL)
        drive(system, stamps, lambda: stamps.last_step() >= FIRST + STEPS, 2 * START_TIMEOUT_S, "the last step")
    finally:
        system.stop()
    stamps.poll()
    return {commit.step: commit.loss for commit in reversed(stamps.commits()) if commit.loss is not None}


def deviation(losses: dict[int, float], reference: dict[int, float]) -> float:
    """The mean relative distance over the steps after the first kill. Raises KeyError if a step is missing."""
    steps = range(FIRST + 1, FIRST + STEPS + 1)
    return sum(abs(losses[step] - reference[step]) / reference[step] for step in steps) / STEPS


def measure(name: str, job: Job, kills: Sequence[int], folder: Path) -> dict[str, Any]:
    """The three runs of one system."""
    kind, settings = SYSTEMS[name]
    if reason := kind.unavailable():
        return {"skipped": reason}
    job = replace(job, options=settings)
    found: dict[str, dict[int, float]] = {}
    for label, struck in (("undisturbed", []), ("repeated", []), ("struck", kills)):
        say(f"{name}: {label}")
        try:
            found[label] = run(kind(job=job.moved(folder / f"{name}-{label}")), struck)
        except (RuntimeError, TimeoutError, OSError) as error:
            return {"failed": f"{label}: {type(error).__name__}: {error}"}
    last = FIRST + STEPS
    return {
        "deviation": deviation(found["struck"], found["undisturbed"]),
        "repeated": deviation(found["repeated"], found["undisturbed"]),
        "first_different_step": next(
            (step for step in range(last + 1) if found["struck"][step] != found["undisturbed"][step]), None
        ),
        "last_loss": {label: losses[last] for label, losses in found.items()},
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--kills", type=int, default=3, help="of each struck run")
    parser.add_argument("--systems", help=f"a comma-separated choice of {', '.join(SYSTEMS)}")
    parser.add_argument("--keep", type=Path, help="keep logs and stamps in this folder")
    options = parser.parse_args()
    systems = chosen(parser, options.systems, SYSTEMS)
    kills = [FIRST + EVERY * number for number in range(options.kills)]
    job = Job(
        layers=2,
        width=64,
        context=32,
        global_batch_size=32,
        micro_batch_size=2,
        dropout=0.1,
        digests=False,
        losses=True,
        steps=FIRST + STEPS + 50,
    )
    folder = options.keep or Path(tempfile.mkdtemp(prefix="everstep-convergence-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = {name: measure(name, job, kills, folder) for name in systems}
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    ours = found.get("everstep", {}).get("deviation")
    target = {"name": "everstep: deviation", "value": ours, "bound": 0, "met": None if ours is None else ours == 0}
    shown = {k: v for k, v in asdict(job).items() if k not in ("folder", "options", "steps")}
    result = {"benchmark": "convergence", "versions": versions(), "job": shown, "killed_at": kills}
    print(json.dumps({**result, "steps": STEPS, "systems": found, "targets": [target]}, indent=2))


if __name__ == "__main__":
    main()
