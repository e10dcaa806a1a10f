"""torch.compile in a job: survivors of a loss do not compile again, and a replacement finds what was compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Result, assert_same_state, run_job

STEPS = 40
KILLS = [{"rank": 1, "phase": "compute", "step": 2, "after": 1}]


def notes(out: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"compiled-{rank}.jsonl").read_text().splitlines()]


@pytest.mark.soak
def test_a_replacement_compiles_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # empty, unlike that of this machine
    job: Result = run_job(nproc=2, script="compiled_job.py", steps=STEPS, ranks=2, faults=KILLS)
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == 1
    survivor, lost = notes(job.out, 0), notes(job.out, 1)
    assert survivor[-1]["step"] == STEPS - 1
    assert survivor[0]["graphs"] > 0
    assert survivor[0]["hit"] + survivor[0]["miss"] > 0
    assert len({(line["graphs"], line["hit"], line["miss"]) for line in survivor}) == 1, "compiled once, in step 0"
    first, last = lost[0], lost[-1]
    assert (first["new"], last["new"]) == (False, True)
    assert first["graphs"] == last["graphs"]
    assert last["hit"] > 0
    assert last["miss"] == last["bypass"] == 0
    undisturbed = run_job(nproc=2, script="compiled_job.py", steps=STEPS)
    assert undisturbed.status == 0, undisturbed.output
    for rank in (0, 1):
        assert_same_state(job.state(rank), undisturbed.state())
