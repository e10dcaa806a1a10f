"""What ranks share between steps, with workers killed in the midst of it: the same values, the same bytes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, assert_same_state, run_job, same
from tests.jobs.hosts import lose_a_node
from tests.jobs.interpreter import script

STEPS = 7
KILLS = [[1, "before"], [0, 3], [2, "behind"]]


def state_of(out: Path, rank: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / f"state-{rank}.pt", weights_only=True)
    return state


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """Without the launcher: one rank."""
    arguments = json.dumps({"out": str(out), "steps": STEPS, **config})
    ended = script(JOBS / "sharing_job.py", arguments, environment=environment)
    assert (ended.status, ended.stderr) == (0, ""), ended.stderr
    return state_of(out)


def assert_same_shared(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["shared"].keys() == expected["shared"].keys()
    for name, value in expected["shared"].items():
        assert same(found["shared"][name], value), name
    assert_same_state({**found, "shared": 0}, {**expected, "shared": 0})


@pytest.mark.parametrize("loop", [pytest.param(False, marks=pytest.mark.soak), True], ids=["steps", "loop"])
def test_ranks_die_between_calls(loop: bool, tmp_path: Path) -> None:
    """Before the loop, after a step and behind the loop: values, states and parameters are those of one rank alone."""
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, loop=loop)
        result = run_job(nproc=3, steps=STEPS, script="sharing_job.py", loop=loop, kills=KILLS)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [1, 0, 2]
    assert expected["shared"]["steps"] == STEPS
    for rank in range(3):
        assert_same_shared(result.state(rank), expected)


@pytest.mark.parametrize("loop", [pytest.param(False, marks=pytest.mark.soak), True], ids=["steps", "loop"])
def test_all_ranks_die_behind_a_step(loop: bool, tmp_path: Path) -> None:
    """What their code has changed since the step was agreed on, its rate too, is not lost with them."""
    kills = [[0, 3], [1, 3], [0, 6], [1, 6]]
    expected = alone(tmp_path, loop=loop, ends=True)
    result = run_job(nproc=2, steps=STEPS, script="sharing_job.py", loop=loop, ends=True, kills=kills, kib=400)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == 4
    for rank in range(2):
        assert_same_shared(result.state(rank), expected)


@pytest.mark.parametrize(("rows", "breaks"), [(1, False), (100, True)], ids=["small", "large, left by break"])
def test_a_rank_joins_in_the_last_turn(rows: int, breaks: bool, tmp_path: Path) -> None:
    """It has no turn any more in which it could change what the others' turns change, and gets it behind the loop."""
    faults = [{"rank": 1, "phase": "compute", "step": STEPS - 2}, {"rank": 2, "phase": "update", "step": STEPS - 1}]
    job = {"loop": True, "rows": rows, "breaks": breaks}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, **job)
        result = run_job(nproc=3, steps=STEPS, script="sharing_job.py", joins=True, faults=faults, **job)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [1, 2]
    assert any("fresh [1]" in event["summary"] for event in result.named("planned")[1:]), result.named("planned")
    assert float(expected["shared"]["rows"][0, 0]) == sum(range(STEPS + 1)), "all turns"
    for rank in range(3):
        assert_same_shared(result.state(rank), expected)


def test_the_last_rank_dies_while_another_joins(tmp_path: Path) -> None:
    """The rank that joins has the results of earlier calls from it, though it has no state yet: they count for all."""
    faults = [
        {"rank": 0, "phase": "compute", "step": 1},
        {"rank": 1, "phase": "compute", "step": 2, "period": 1, "kind": "pause", "seconds": 0.1},  # rank 0 comes back
        {"rank": 1, "phase": "restore", "after": 1, "kind": "pause", "seconds": 0.1},
        {"rank": 1, "phase": "restore", "after": 1},
    ]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path, loop=True, steps=60)
        result = run_job(nproc=2, steps=60, script="sharing_job.py", loop=True, faults=faults)
        expected = waiting.result()
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [0, 1]
    assert "fresh [0, 1]" in result.named("planned")[-1]["summary"]
    for rank in range(2):
        assert_same_shared(result.state(rank), expected)


@pytest.mark.parametrize("loop", [pytest.param(False, marks=pytest.mark.soak), True], ids=["steps", "loop"])
def test_steps_are_computed_again(loop: bool, tmp_path: Path) -> None:
    """A node is lost, and the others go back to the last version that outlives it: what their code counted, too."""
    fault = {"rank": 2, "phase": "update", "step": 5}
    _lose_a_node(fault, tmp_path, every=3, loop=loop)


@pytest.mark.parametrize("loop", [False, True], ids=["steps", "loop"])
def test_ranks_go_back_in_the_midst_of_a_call(loop: bool, tmp_path: Path) -> None:
    """The lost rank is missed in a call behind a step; with what the others' code has set by then, it goes on later."""
    again = _lose_a_node({"rank": 1, "phase": "commit", "step": 4}, tmp_path, every=50, loop=loop, ends=loop)
    assert again == [True] * 5, "the step behind which they called, and all before it"


def _lose_a_node(fault: dict[str, Any], folder: Path, *, every: int, **config: Any) -> list[bool]:
    """Whether each of the steps that are computed again comes out as before."""
    expected = alone(folder, **config)
    result = lose_a_node("sharing_job.py", fault, folder, every=every, steps=STEPS, **config)
    assert [event["lost_steps"] > 0 for event in result.named("recovered")] == [True], result.output
    for path in result.out.glob("state-*.pt"):
        assert_same_shared(torch.load(path, weights_only=True), expected)
    return [event["same"] for event in result.named("committed_again")]


@pytest.mark.soak
def test_a_state_is_in_checkpoints(tmp_path: Path) -> None:
    """A job that is resumed twice ends as one that was not."""
    expected = alone(tmp_path)
    saves = {"EVERSTEP_CHECKPOINT": str(tmp_path / "saved")}
    for steps in (2, 5, STEPS):
        found = alone(tmp_path, saves, steps=steps)
    assert_same_shared(found, expected)
