"""Data that the script changes between epochs: ranks use one order of the sampler, and the dataset as it is then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, Result, run_job, same
from tests.jobs.interpreter import Ended, script


def ended(out: Path, environment: dict[str, str] | None = None, **config: Any) -> Ended:
    """Without the launcher: one rank."""
    out.mkdir()
    arguments = json.dumps({"out": str(out), **config})
    return script(JOBS / "sampler_job.py", arguments, environment=environment or {})


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    done = ended(out, environment, **config)
    assert done.status == 0, done.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


def warned(result: Result) -> list[int]:
    """The ranks whose sampler gave another order."""
    return [line["rank"] for line in result.named("warning") if line["notice"] == "sampler-differs"]


@pytest.mark.parametrize("kept", [True, False])
def test_ranks_die(kept: bool, tmp_path: Path) -> None:
    """Samples and values are those of one rank alone, whether or not replacements have the weights.

    Worker processes fetch ahead, and not what the weights, and the dataset, of the next epoch decide.
    """
    expected = alone(tmp_path / "alone", kept=kept)
    orders = [sorted(n for step, numbers in expected["samples"] if step // 3 == i for n in numbers) for i in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    kills = [[1, 1], [2, 3]]
    result = run_job(nproc=3, script="sampler_job.py", kills=kills, ranks=3, workers=1, kept=kept)
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [1, 2]
    assert bool(warned(result)) != kept
    for path in result.out.glob("state-*.pt"):
        found = torch.load(path, weights_only=True)
        assert all(same(found["model"][name], value) for name, value in expected["model"].items())
        assert all(turn in expected["samples"] for turn in found["samples"])


def test_a_module_that_the_script_has_changed_once() -> None:
    """Before a replacement began: it says what it lacks."""
    result = run_job(nproc=2, script="sampler_job.py", kills=[[1, 2]], ranks=2, kept=True, once=True)
    assert result.status == 0, result.output
    said = [line["text"] for line in result.named("warning") if line["notice"] == "attribute-changed"]
    assert len(said) == 1
    assert "1.p is 0.0 here and 0.5 there" in said[0]


def test_no_rank_is_left_that_has_the_weights(tmp_path: Path) -> None:
    result = run_job(nproc=2, script="sampler_job.py", kills=[[0, 1], [1, 2]], ranks=2)
    assert result.status != 0
    assert "gives another order of epoch 3 than the one with which the job had begun it, and no rank" in result.output


@pytest.mark.parametrize("stop", [3, 4])
def test_a_job_is_resumed(stop: int, tmp_path: Path) -> None:
    """In an epoch and at its end: with the weights in run.state in the same order, else with an error or a warning.

    At an epoch's end, whether the order of the next one is right cannot be told, as the weights change there.
    """
    saved = {kept: {"EVERSTEP_CHECKPOINT": str(tmp_path / f"saved {kept}")} for kept in (True, False)}
    for kept, environment in saved.items():
        alone(tmp_path / f"first {kept}", environment, kept=kept, stop=stop)
    expected = alone(tmp_path / "whole", kept=True)
    found = alone(tmp_path / "second", saved[True], kept=True)
    assert all(same(found["model"][name], value) for name, value in expected["model"].items())
    done = ended(tmp_path / "without", saved[False])
    doubt = "whether that of epoch 2 is right was not checked" in done.stderr
    if stop == 4:
        assert (done.status, doubt) == (0, True), done.stderr
    else:
        assert "gives another order of epoch 1 than the one with which the job had begun it" in done.error()
        ignoring = {**saved[False], "EVERSTEP_RESUME_DATA": "ignore"}
        assert ended(tmp_path / "ignoring", ignoring).status == 0


def test_ranks_differ() -> None:
    result = run_job(nproc=2, script="sampler_job.py", mistake="by rank")
    assert result.status != 0
    assert "gives one order of epoch 2 on rank 0, and another on rank 1" in result.output


def test_a_change_without_epochs(tmp_path: Path) -> None:
    done = ended(tmp_path / "alone", mistake="no epochs")
    assert "was changed, such as its weights, and gives another order of epoch 0 than it did" in done.error()
