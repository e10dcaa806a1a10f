"""What a script does in its turns and between epochs without effect, or with one that depends on ranks, is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.jobs import JOBS, run_job
from tests.jobs.interpreter import script

NAMED = {
    "zip": ["other-loader"],
    "next": ["other-loader"],
    "statistics": ["buffer-restored"],
    "range": ["loop-without-batches"],
    "counted": ["batches-left"],
    "turns": [],  # an evaluation in a turn
    "nothing": [],
}


@pytest.mark.parametrize("kind", list(NAMED))
def test_it_is_named_once(kind: str, tmp_path: Path) -> None:
    ended = script(JOBS / "between_job.py", json.dumps({"out": str(tmp_path), "kind": kind}))
    assert ended.status == 0, ended.stderr
    assert re.findall(r"\[([a-z-]+)\]$", ended.stderr, re.M) == NAMED[kind], ended.stderr
    assert ("'1.running_mean'" in ended.stderr) == (kind == "statistics")


def test_turns_that_are_counted_in_a_job() -> None:
    """The script's variables are gone when a worker ends its training."""
    result = run_job(nproc=2, script="between_job.py", kind="counted")
    assert result.status == 0, result.output
    (text,) = {line["text"] for line in result.named("warning")}
    assert text.startswith("the script has ended after 4 of 8 steps, and takes batches by next()")
