"""Training with kills on one device, against training without: are losses, parameters and optimizer state the same?"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.jobs import JOBS, Result, finish, launch, read_result, same

JOB = Path(__file__).with_name("job.py")
WORKERS = 4
LAYOUTS = {"2 stages x 2 ranks": 2, "1 stage x 4 ranks": 1}  # -> stages
RUN_S = 55.0  # in which one run has to end; a cold fork takes seconds to its first step on a GPU
ROOT = JOBS.parent.parent


def kills(steps: int) -> list[dict[str, Any]]:
    """One in a forward or backward pass, one while gradients are summed, one while the optimizer runs."""
    return [
        {"rank": 3, "phase": "compute", "step": steps // 4, "after": 1},
        {"rank": 0, "phase": "reduce", "step": steps // 2},
        {"rank": 2, "phase": "update", "step": 3 * steps // 4},
    ]


def train(
    device: str,
    stages: int,
    steps: int,
    *,
    small: bool = False,
    faults: list[dict[str, Any]] | None = None,
    timeout_s: float = RUN_S,
    **more: Any,
) -> Result:
    """One run of four workers to its end. Raises AssertionError if it hangs."""
    out = Path(tempfile.mkdtemp(prefix="everstep-gpu-"))
    arguments = {"out": str(out), "steps": steps, "stages": stages, "device": device, "small": small, **more}
    environment = {
        "EVERSTEP_FAULTS": json.dumps(faults or []),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    flags = [f"--nproc-per-node={WORKERS}", "--es-share-gpu", f"--es-events={out}/events.jsonl"]
    process = launch(JOB, [json.dumps(arguments)], flags, environment)
    output = finish(process, timeout_s)
    return read_result(out, process.returncode, output)


def differences(found: Result, expected: Result) -> list[str]:
    """What differs between two runs, in words; empty if nothing does."""
    wrong: list[str] = []
    for run in (found, expected):
        if run.status:
            return [f"a run ended with status {run.status}: {run.output[-2000:]}"]
    if found.losses() != {step: loss for step, loss in expected.losses().items() if step in found.losses()}:
        wrong.append("losses")
    ledgers = [[(e["step"], e["loss"], e["digest"]) for e in run.named("committed")] for run in (found, expected)]
    if ledgers[0] != ledgers[1]:
        wrong.append("ledgers")
    reference = torch.load(next(expected.out.glob("state-*.pt")), weights_only=True)
    states = sorted(found.out.glob("state-*.pt"))
    if not states:
        wrong.append("no rank wrote its final state")
    for path in states:
        state = torch.load(path, weights_only=True)
        wrong += [f"{path.stem}: {name}" for name in _unequal(state, reference)]
    return wrong


def _unequal(found: Any, expected: Any, where: str = "") -> list[str]:
    if not isinstance(expected, dict):
        return [] if same(found, expected) else [where]
    if not isinstance(found, dict) or found.keys() != expected.keys():
        return [f"{where}: other names"]
    return [name for key in expected for name in _unequal(found[key], expected[key], f"{where}/{key}")]


def compare(device: str, steps: int, *, small: bool = False, budget_s: float = 4 * RUN_S) -> dict[str, Any]:
    """Both layouts, each without kills and with three; as a JSON object."""
    until_s = time.monotonic() + budget_s
    results: dict[str, Any] = {"device": device, "steps": steps, "workers": WORKERS, "layouts": {}}
    undisturbed: dict[str, Result] = {}
    for name, stages in LAYOUTS.items():
        began_s = time.monotonic()
        entry: dict[str, Any] = {"identical": False}
        results["layouts"][name] = entry
        if until_s - began_s < 2 * 10.0:
            entry["skipped"] = "the time for this is used up"
            continue
        try:
            quiet = train(device, stages, steps, small=small, timeout_s=until_s - began_s)
            left_s = max(10.0, until_s - time.monotonic())
            killed = train(device, stages, steps, small=small, faults=kills(steps), timeout_s=left_s)
        except AssertionError as error:
            entry["failed"] = str(error)[-3000:]
            continue
        undisturbed[name] = quiet
        entry |= _entry(killed, quiet)
        entry["wall_s"] = round(time.monotonic() - began_s, 1)
    first, *others = undisturbed.values() or [None]
    if first is not None and others:
        results["differences_between_layouts"] = [d for other in others for d in differences(other, first)][:20]
    results["identical"] = all(entry["identical"] for entry in results["layouts"].values())
    return results


def _entry(killed: Result, quiet: Result) -> dict[str, Any]:
    wrong = differences(killed, quiet)
    deaths = len(killed.named("worker_died"))
    losses = list(quiet.losses().values())
    return {
        "identical": not wrong and deaths == len(kills(len(losses))),
        "differences": wrong[:20],
        "kills": deaths,
        "devices": sorted({line["device"] for lines in killed.workers.values() for line in lines}),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "recoveries_s": [round(event["total_s"], 3) for event in killed.named("recovered")],
    }
