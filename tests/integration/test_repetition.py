"""What a loop carries from turn to turn, and its loss depends on, is noticed: a micro-batch is computed twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs import JOBS, assert_same_state, run_job, state_alone
from tests.jobs.interpreter import script

SAID = "a micro-batch that was computed twice has another gradient the second time"
NAMES = {
    "enumerate": "i",
    "count": "turns",
    "object": "count.turns",
    "average": "average",
    "queue": "queue",
    "teacher": "teacher",
    "generator": "generator",
    "numpy_generator": "numpy_generator",
    "loss_fn": "",
}
KILLS = [
    {"rank": 1, "phase": "compute", "step": 1},  # when the first of its micro-batches is handed out
    {"rank": 0, "phase": "compute", "step": 7, "after": 1},  # when it is handed out again
]


@pytest.mark.parametrize("kind", list(NAMES))
def test_it_is_named(kind: str, tmp_path: Path) -> None:
    """By a warning, on one rank alone, too."""
    ended = script(JOBS / "carrying_job.py", json.dumps({"out": str(tmp_path), "kind": kind}))
    assert ended.status == 0, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if SAID in line]
    assert "[turn-not-repeatable]" in line
    if NAMES[kind]:
        named = line.split("meanwhile: ")[1].split(")")[0].split(", ")
        assert NAMES[kind] in named
        assert not {"x", "y", "loss", "model", "optimizer"} & set(named)


def test_in_a_job() -> None:
    result = run_job(nproc=2, script="carrying_job.py", kind="count")
    assert result.status == 0, result.output
    assert any(SAID in line["text"] for line in result.named("warning"))


def test_what_is_only_logged(tmp_path: Path) -> None:
    """It is no reason for a warning, and turns that are repeated, in which ranks are lost, change no byte."""
    expected = state_alone("carrying_job.py", tmp_path / "alone", kind="none")
    result = run_job(nproc=2, script="carrying_job.py", kind="none", faults=KILLS)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == 2
    assert_same_state(result.state(), expected)
    assert not [line for line in result.named("warning") if line["notice"] == "turn-not-repeatable"]


def test_layers_whose_outputs_are_not_contiguous(tmp_path: Path) -> None:
    """The second time, too, layers hand on their outputs as they would to another rank."""
    config = {"out": str(tmp_path), "kind": "asks", "steps": 2, "stages": 1}
    repeated = {"EVERSTEP_REPEAT_EVERY": "1"}
    ended = script(JOBS / "boundaries_job.py", json.dumps(config), environment=repeated)
    assert ended.status == 0, ended.stderr
    assert SAID not in ended.stderr
