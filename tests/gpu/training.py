"""Training with kills on one device, against training without: are losses, parameters and optimizer state the same?"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.jobs import JOBS, Result, finish, launch, read_result, same

JOB = Path(__file__).with_name("job.py")
WORKERS = 4
CASES: dict[str, dict[str, Any]] = {
    "2 stages x 2 ranks": {"stages": 2},
    "1 stage x 4 ranks": {"stages": 1},
    "bfloat16 autocast": {"stages": 2, "autocast": True},
    "float16 with a loss scaler": {"stages": 2, "float16": True},
    "bfloat16 parameters with float32 masters": {"stages": 2, "bfloat16": True},
    "fused AdamW, replayed": {"stages": 2, "fused": True, "protection": "replay"},
    "compiled layers": {"stages": 1, "compile": True},
}
SAME_BYTES = tuple(CASES)[:2]  # cases whose bytes may be the same; reported, and no part of the verdict
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
    *,
    faults: list[dict[str, Any]] | None = None,
    timeout_s: float = RUN_S,
    **settings: Any,
) -> Result:
    """One run of four workers to its end, with the settings of `job.py`. Raises AssertionError if it hangs."""
    out = Path(tempfile.mkdtemp(prefix="everstep-gpu-"))
    arguments = {"out": str(out), "device": device, **settings}
    environment = {
        "EVERSTEP_FAULTS": json.dumps(faults or []),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    flags = [f"--nproc-per-node={WORKERS}", "--es-share-gpu", f"--es-events={out}/events.jsonl"]
    process = launch(JOB, [json.dumps(arguments)], flags, environment)
    output = finish(process, timeout_s)
    return read_result(out, process.returncode, output)


def differences(found: Result, expected: Result, from_step: int = 0) -> list[str]:
    """What differs between two runs, in words; empty if nothing does. The first run may begin at a later step."""
    wrong: list[str] = []
    for run in (found, expected):
        if run.status:
            return [f"a run ended with status {run.status}: {run.output[-2000:]}"]
    if found.losses() != {step: loss for step, loss in expected.losses().items() if step in found.losses()}:
        wrong.append("losses")
    ledgers = [
        [(e["step"], e["loss"], e["digest"]) for e in run.named("committed") if e["step"] >= from_step]
        for run in (found, expected)
    ]
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


def compare(
    device: str, steps: int, *, small: bool = False, budget_s: float = 4 * RUN_S, cases: Sequence[str] = ()
) -> dict[str, Any]:
    """Each of the cases (all, if none is named) without kills and with three, and a job that resumes; as JSON."""
    until_s = time.monotonic() + budget_s
    results: dict[str, Any] = {"device": device, "steps": steps, "workers": WORKERS, "cases": {}}
    undisturbed: dict[str, Result] = {}
    for name in cases or CASES:
        began_s = time.monotonic()
        entry: dict[str, Any] = {"identical": False}
        results["cases"][name] = entry
        if until_s - began_s < 2 * 10.0:
            entry["skipped"] = "the time for this is used up"
            continue
        settings = {**CASES[name], "small": small}
        try:
            quiet = train(device, steps=steps, timeout_s=until_s - began_s, **settings)
            left_s = max(10.0, until_s - time.monotonic())
            killed = train(device, steps=steps, faults=kills(steps), timeout_s=left_s, **settings)
        except AssertionError as error:
            entry["failed"] = str(error)[-3000:]
            continue
        undisturbed[name] = quiet
        entry |= _entry(killed, quiet)
        entry["wall_s"] = round(time.monotonic() - began_s, 1)
    alike = [name for name in SAME_BYTES if name in undisturbed]
    if len(alike) == len(SAME_BYTES):
        results["differences_between_layouts"] = differences(*(undisturbed[name] for name in alike))[:20]
    if alike and until_s - time.monotonic() > RUN_S:
        settings = {**CASES[alike[0]], "small": small}
        results["cases"]["resumed"] = _resumed(device, steps, undisturbed[alike[0]], settings, until_s)
    results["identical"] = all(entry["identical"] for entry in results["cases"].values())
    return results


def _resumed(device: str, steps: int, expected: Result, settings: dict[str, Any], until_s: float) -> dict[str, Any]:
    """A job that is over after half of the steps, and one that goes on from its checkpoint to the end."""
    began_s = time.monotonic()
    settings = {**settings, "checkpoint": tempfile.mkdtemp(prefix="everstep-gpu-")}
    try:
        train(device, steps=steps // 2, timeout_s=until_s - time.monotonic(), **settings)
        found = train(device, steps=steps, timeout_s=max(10.0, until_s - time.monotonic()), **settings)
    except AssertionError as error:
        return {"identical": False, "failed": str(error)[-3000:]}
    wrong = differences(found, expected, from_step=steps // 2)
    return {"identical": not wrong, "differences": wrong[:20], "wall_s": round(time.monotonic() - began_s, 1)}


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
