"""Epochs: alone, with workers killed in front of and behind their batches, resumed at every step: the same bytes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, assert_same_state, run_job, same
from tests.jobs.interpreter import script

EPOCHS, STEPS = 3, 2  # of 21 samples, 8 in a batch
KILLS = [[1, "epoch 1"], [0, "end 1"], [2, "evaluation 1"], [1, "evaluation 2 averaged"], [2, "last"]]
SHORT = {"micro_batch_size": "2", "last_batch": "short"}  # the last batch of an epoch: 2, 2, 1 and 0 samples
FAULTS = [{"rank": 1, "phase": "compute", "step": 4, "after": 1, "incarnation": 1}]


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """Without the launcher: one rank."""
    out.mkdir(exist_ok=True)
    ended = script(JOBS / "epochs_job.py", json.dumps({"out": str(out), **config}), environment=environment)
    assert ended.status == 0, ended.stderr
    assert all("SIGTERM" in line for line in ended.stderr.splitlines()), ended.stderr
    return state_of(out)


def state_of(out: Path, rank: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / f"state-{rank}.pt", weights_only=True)
    return state


def samples(out: Path) -> dict[int, list[int]]:
    """Step -> the samples that one rank alone has had in it."""
    found: dict[int, list[int]] = {}
    for step, numbers in json.loads((out / "seen-0.json").read_text()):
        found.setdefault(step, []).extend(numbers)
    return found


def assert_same_job(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["shared"].keys() == expected["shared"].keys()
    for name, value in expected["shared"].items():
        assert same(found["shared"][name], value), name
    for name, value in expected.get("average", {}).items():
        assert torch.equal(found["average"][name], value), name
        assert not torch.equal(value, expected["model"][name])
    assert_same_state({**found, "shared": 0, "step": 0}, {**expected, "shared": 0, "step": 0})


def test_ranks_die_around_epochs(tmp_path: Path) -> None:
    """In front of the batches of one, in the middle, behind those, in evaluations, and behind the last one."""
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, average=True)
        result = run_job(nproc=3, script="epochs_job.py", average=True, kills=KILLS, faults=FAULTS)
        expected = waiting.result()
    assert result.status == 0, result.output
    died = [event["rank"] for event in result.named("worker_died")]
    assert died[:3] == [1, 0, 2], "the others die if they are back in time"
    assert [entry[:2] for entry in expected["shared"]["epochs"]] == [[0, 2], [1, 4], [2, 6]]
    assert expected["shared"]["rates"] == pytest.approx([0.007, 0.0049, 0.00343])
    assert (expected["shared"]["begun"], expected["shared"]["last"]) == (EPOCHS, STEPS)
    for rank in range(3):
        assert_same_job(result.state(rank), expected)
    steps = samples(tmp_path)
    assert sorted(steps) == list(range(EPOCHS * STEPS))
    for epoch in range(EPOCHS):
        once = [number for step in range(2 * epoch, 2 * epoch + 2) for number in steps[step]]
        assert len(set(once)) == len(once) == 16
    assert steps[0] != steps[2]


def variables(settings: dict[str, str]) -> dict[str, str]:
    return {f"EVERSTEP_{name.upper()}": value for name, value in settings.items()}


def flags(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--es-{name.replace('_', '-')}", value)]


def test_ranks_die_in_shorter_batches(tmp_path: Path) -> None:
    """In the last step of each epoch, where a rank has only an empty micro-batch, and so no turn."""
    faults = [
        {"rank": 0, "phase": "compute", "step": 2, "after": 1},
        {"rank": 2, "phase": "compute", "step": 5},
        {"rank": 3, "phase": "reduce", "step": 5},
        {"rank": 1, "phase": "reduce", "step": 8},
    ]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, variables(SHORT))
        result = run_job(nproc=4, script="epochs_job.py", flags=flags(SHORT), faults=faults)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(faults)
    assert [entry[:2] for entry in expected["shared"]["epochs"]] == [[0, 3], [1, 6], [2, 9]]
    for path in result.out.glob("state-*.pt"):
        assert_same_job(torch.load(path, weights_only=True), expected)
    steps = samples(tmp_path)
    for epoch in range(EPOCHS):
        numbers = [number for step in range(3 * epoch, 3 * epoch + 3) for number in steps[step]]
        assert sorted(numbers) == list(range(21))


def test_ranks_of_stages_die_in_shorter_batches(tmp_path: Path) -> None:
    """In either stage: what the others have to send again is what micro-batches with samples have made."""
    faults = [
        {"rank": 3, "phase": "compute", "step": 2},
        {"rank": 0, "phase": "compute", "step": 5, "after": 1},
        {"rank": 1, "phase": "agree", "step": 5},
    ]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, variables(SHORT), yields=True)
        settings = flags({**SHORT, "stages": "2"})
        result = run_job(nproc=4, script="epochs_job.py", flags=settings, faults=faults, yields=True)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(faults)
    states = list(result.out.glob("state-*.pt"))
    assert states
    for path in states:
        assert_same_job(torch.load(path, weights_only=True), expected)


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{"last_batch": "pad"}, SHORT], ids=["pad", "short"])
def test_a_job_is_resumed_again_and_again(settings: dict[str, str], tmp_path: Path) -> None:
    """At the end of an epoch, too; with the last batch padded, or shorter, every sample is seen in every epoch."""
    pads = variables(settings)
    expected = alone(tmp_path / "whole", pads, average=True)
    saves = {**pads, "EVERSTEP_CHECKPOINT": str(tmp_path / "saved"), "EVERSTEP_CHECKPOINT_KEEP": "20"}
    found = alone(tmp_path / "resumed", saves, average=True, resumes=True)
    assert_same_job(found, expected)
    steps = samples(tmp_path / "resumed")
    assert steps == samples(tmp_path / "whole")
    for epoch in range(EPOCHS):
        numbers = [number for step in range(3 * epoch, 3 * epoch + 3) for number in steps[step]]
        assert set(numbers) == set(range(21))
        assert numbers[21:] == (numbers[:3] if settings["last_batch"] == "pad" else [])


@pytest.mark.soak
def test_the_steps_of_epochs(tmp_path: Path) -> None:
    """`run.steps` with epochs, and a stop in the middle of one: the code behind its batches runs."""
    assert alone(tmp_path / "steps", yields=True)["shared"]["epochs"] == [0, 0, 1, 1, 2, 2]
    stopped = alone(tmp_path / "stopped", stops=1)
    assert [entry[:2] for entry in stopped["shared"]["epochs"]] == [[0, 2], [1, 3]]


def test_a_stop_with_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    """The code behind its batches runs, and no other epoch begins, also on ranks that die there and behind the loop."""
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, stops=2)
        result = run_job(nproc=3, script="epochs_job.py", stops=2, kills=[[1, "end 1"], [2, "last"]])
        expected = waiting.result()
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [1, 2]
    assert [entry[:2] for entry in expected["shared"]["epochs"]] == [[0, 2], [1, 4]]
    assert expected["shared"]["begun"] == 2
    for rank in range(3):
        assert_same_job(result.state(rank), expected)
