"""Changes that a script makes while it trains, in both loops: the same bytes on one process and on killed workers.

And changes that cannot be kept equal: one line that names the change, and what to write instead.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, Result, everstep, read_result, run_job
from tests.jobs.interpreter import script

STEPS = 8
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2},
    {"rank": 1, "phase": "agree", "step": 3},
    {"rank": 2, "phase": "update", "step": 4},
    {"rank": 1, "phase": "reduce", "step": 5, "incarnation": 1},
    {"rank": 0, "phase": "commit", "step": 6, "incarnation": 1},
]
CASES: dict[str, dict[str, Any]] = {
    "rates, frozen layers, bad samples": {"loop": "prepare", "changes": ["rates", "freeze", "skip"], "micro": 1},
    "rates, frozen layers, two stages": {"loop": "steps", "changes": ["rates", "freeze"], "stages": 2, "clip": 0.02},
    "a scheduler left in the loop": {"loop": "prepare", "changes": ["schedule", "decay"], "clip": 0.05},
    "a scheduler beside steps": {"loop": "steps", "changes": ["schedule", "decay", "freeze"], "stages": 2},
}


def alone(out: Path, **config: Any) -> Result:
    """The script without the launcher."""
    out.mkdir()
    (out / "events.jsonl").touch()
    ended = script(JOBS / "changing_job.py", json.dumps({"out": str(out), "steps": STEPS, **config}))
    assert ended.status == 0, ended.stderr
    return read_result(out, ended.status, ended.stderr)


def equal(found: Any, expected: Any) -> bool:
    """Equal in every bit, and in every name, of nested states."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(equal(f, e) for f, e in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def close(found: Any, expected: Any) -> bool:
    """The same as plain torch, except for the order in which a mean is summed."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(close(f, e) for f, e in zip(found, expected, strict=True))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    return found == expected


@pytest.mark.parametrize("name", CASES)
def test_changes(name: str, tmp_path: Path) -> None:
    """Plain torch, the script alone, and three workers that are killed: `state_dict()` of model and optimizer."""
    config = {"stages": 1, **CASES[name]}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path / "alone", **config)
        plainly = pool.submit(alone, tmp_path / "plain", **{**config, "loop": "plain"})
        stages = config.pop("stages")
        result = run_job(nproc=3, steps=STEPS, stages=stages, script="changing_job.py", faults=KILLS, **config)
        reference, plain = waiting.result(), plainly.result()
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    states = sorted(result.out.glob("state-*.pt"))
    assert states, result.output
    for path in states:
        assert equal(torch.load(path), reference.state()), path
    assert close(reference.state()["model"], plain.state()["model"])
    assert close(reference.state()["optimizer"], plain.state()["optimizer"])


def test_a_scheduler_built_on_the_prepared_optimizer() -> None:
    """More workers than micro-batches, so that one never computes; and another number of workers."""
    config: dict[str, Any] = {"loop": "prepare", "changes": ["decay"], "micro": 3, "late": True}
    killed = [fault for fault in KILLS if fault["rank"] == 0]
    results = [
        run_job(nproc=3, steps=STEPS, script="changing_job.py", faults=killed, **config),
        run_job(nproc=1, steps=STEPS, script="changing_job.py", **config),
    ]
    for result in results:
        assert result.status == 0, result.output
    expected = results[1].state()
    assert expected["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.02 * 0.8**STEPS)
    for path in results[0].out.glob("state-*.pt"):
        assert equal(torch.load(path), expected), path


def resumed(folder: Path, steps: int, rate: float, *flags: str, **config: Any) -> tuple[float, str]:
    """The final rate of a job that resumes from this folder, and its standard error."""
    config = {"out": str(folder), "steps": steps, "loop": "steps", "changes": [], "rate": rate, **config}
    folder.mkdir(exist_ok=True)
    flags = (f"--es-checkpoint={folder / 'saved'}", *flags)
    ended = everstep("run", "--nproc-per-node=2", *flags, str(JOBS / "changing_job.py"), json.dumps(config))
    assert ended.status == 0, ended.stderr
    states = [torch.load(folder / f"state-{rank}.pt") for rank in (0, 1)]
    assert equal(*states)
    return states[0]["optimizer"]["param_groups"][0]["lr"], ended.stderr


@pytest.mark.soak
def test_another_rate_in_the_script_on_resume(tmp_path: Path) -> None:
    assert "hyperparameters-differ" not in resumed(tmp_path / "hand", 3, 0.5)[1]
    rate, said = resumed(tmp_path / "hand", 5, 0.25)
    assert rate == 0.5
    assert "lr of parameter group 0 is 0.25, and was 0.5" in said
    assert "--es-resume-hyperparameters=script [hyperparameters-differ]" in said
    assert "hyperparameters-differ" in resumed(tmp_path / "hand", 6, 0.25)[1], "as long as they differ"
    rate, said = resumed(tmp_path / "hand", 8, 0.25, "--es-resume-hyperparameters=script")
    assert (rate, "hyperparameters-differ" in said) == (0.25, False)
    assert "hyperparameters-differ" not in resumed(tmp_path / "hand", 9, 0.25)[1]


@pytest.mark.soak
def test_the_scripts_schedule_on_resume(tmp_path: Path) -> None:
    """A scheduler that the runtime steps is stepped up from the script's rate."""
    resumed(tmp_path / "schedule", 3, 0.5, changes=["schedule"], handed=True)
    script = "--es-resume-hyperparameters=script"
    found = resumed(tmp_path / "schedule", 6, 0.25, script, changes=["schedule"], handed=True)[0]
    assert found == resumed(tmp_path / "whole", 6, 0.25, changes=["schedule"], handed=True)[0]


def test_a_rate_that_one_rank_sets() -> None:
    result = run_job(nproc=2, steps=4, script="changing_job.py", loop="steps", changes=[], alone=0.375)
    assert result.status == 0, result.output
    for rank in (0, 1):
        assert result.state(rank)["optimizer"]["param_groups"][1]["lr"] == 0.375
    assert result.output.count("only rank 1 changed lr of parameter group 1; the change counts on all ranks") == 1


@pytest.mark.parametrize("loop", ["prepare", "steps"])
def test_a_step_without_a_finite_gradient_is_left_out(loop: str) -> None:
    config: dict[str, Any] = {"loop": loop, "changes": ["skip", "schedule"], "whole_steps": True}
    results = [
        run_job(nproc=3, steps=STEPS, script="changing_job.py", faults=KILLS[:2], **config),
        run_job(nproc=1, steps=STEPS, script="changing_job.py", **config),
    ]
    for result in results:
        assert result.status == 0, result.output
    expected = results[1].state()
    assert all(torch.isfinite(tensor).all() for tensor in expected["model"].values())
    assert {state["step"].item() for state in expected["optimizer"]["state"].values()} == {STEPS - 1}
    for path in results[0].out.glob("state-*.pt"):
        assert equal(torch.load(path), expected), path
