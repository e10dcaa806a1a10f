"""`everstep.join` in a script that trains at module level: it survives kills, and ends as a training function does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs import JOBS, assert_same_state, command, everstep, read_result, run_job

SCRIPT = str(JOBS / "joining_job.py")
STEPS = 8
KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 0, "phase": "update", "step": 5},
    {"rank": 1, "phase": "commit", "step": STEPS - 1, "incarnation": 1},
]


@pytest.mark.parametrize("ends", ["", "exit"])
def test_a_script_joins_its_job(ends: str, tmp_path: Path) -> None:
    """Alone, and on two workers that are killed."""
    (tmp_path / "events.jsonl").touch()
    alone = command([SCRIPT, json.dumps({"out": str(tmp_path), "steps": STEPS, "ends": ends})])
    assert (alone.status, alone.stderr) == (0, "")
    expected = read_result(tmp_path, alone.status, alone.stderr).state()
    result = run_job(nproc=2, steps=STEPS, script="joining_job.py", faults=KILLS, ends=ends)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    for rank in (0, 1):
        assert_same_state(result.state(rank), expected)


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ("nothing", "the script ended without calling run.prepare(...) or run.steps(...): nothing was trained"),
        ("twice", "the script: everstep.join has made this script a training already, and a job is one training"),
        ("raise", "ValueError: the user's own mistake"),
    ],
)
def test_mistakes(ends: str, text: str, tmp_path: Path) -> None:
    """One line for a mistake in the use of Everstep, the user's traceback for one of the script's own."""
    arguments = [SCRIPT, json.dumps({"out": str(tmp_path), "steps": STEPS, "ends": ends})]
    for ended in (command(arguments), everstep("run", "--nproc-per-node=2", f"--log-dir={tmp_path}", *arguments)):
        assert ended.status == 1, ended.stderr
        assert text in ended.stderr.splitlines()[-1], ended.stderr
        assert ended.stderr.count("Traceback") == (ends == "raise"), ended.stderr
        if ends == "raise":
            assert "joining_job.py" in ended.stderr
            assert "preload.py" not in ended.stderr
