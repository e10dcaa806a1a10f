"""torch.compile in a job: survivors of a loss do not compile again, and a replacement finds what was compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.agents.node.compile_cache import PREFIX, VARIABLE
from tests.jobs import JOBS, Result, assert_same_state, launch, run_job, wait_until
from tests.jobs.interpreter import HANG_S, launchers

STEPS = 40
KILLS = [{"rank": 1, "phase": "compute", "step": 2, "after": 1}]


def notes(out: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"compiled-{rank}.jsonl").read_text().splitlines()]


@pytest.mark.soak
def test_a_replacement_compiles_nothing_anew(tmp_path: Path) -> None:
    """The cache is the job's, and is removed with it (`nothing_left`)."""
    job: Result = run_job(nproc=2, script="compiled_job.py", steps=STEPS, ranks=2, faults=KILLS)
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == 1
    survivor, lost = notes(job.out, 0), notes(job.out, 1)
    assert survivor[-1]["step"] == STEPS - 1
    assert survivor[0]["graphs"] > 0
    assert survivor[0]["hit"] + survivor[0]["miss"] > 0
    assert len({(line["graphs"], line["hit"], line["miss"]) for line in survivor}) == 1, "compiled once, in step 0"
    first, last = lost[0], lost[-1]
    assert first["cache"] == last["cache"] == survivor[0]["cache"]
    assert Path(last["cache"]).name.startswith(PREFIX)
    assert (first["new"], last["new"]) == (False, True)
    assert first["graphs"] == last["graphs"]
    assert last["hit"] > 0
    assert last["miss"] == last["bypass"] == 0
    undisturbed = run_job(nproc=2, script="compiled_job.py", steps=STEPS)
    assert undisturbed.status == 0, undisturbed.output
    for rank in (0, 1):
        assert_same_state(job.state(rank), undisturbed.state())


@pytest.mark.soak
def test_the_users_own_cache_is_used_and_kept(tmp_path: Path) -> None:
    folder, out = tmp_path / "own", tmp_path / "out"
    out.mkdir()
    arguments = [str(JOBS / "compiled_job.py"), json.dumps({"out": str(out), "steps": 2})]
    ended = launchers.run(["--nproc-per-node=1", *arguments], {VARIABLE: str(folder)}, HANG_S, mixed=True)
    assert ended.status == 0, ended.stdout
    assert list(folder.rglob("*.so"))
    assert notes(out, 0)[-1]["miss"] > 0


@pytest.mark.soak
def test_a_killed_launcher_leaves_no_folder(tmp_path: Path) -> None:
    """Its preloaded process, which ends the workers, removes the folder, too (`nothing_left`)."""
    arguments = [json.dumps({"out": str(tmp_path), "steps": 10_000, "ranks": 2})]  # one rank: steps take long
    launcher = launch(JOBS / "compiled_job.py", arguments, ["--nproc-per-node=1", f"--log-dir={tmp_path}/logs"])
    try:
        wait_until((tmp_path / "compiled-0.jsonl").exists, HANG_S, "the model is compiled")
        (folder,) = tmp_path.glob(f"{PREFIX}*")
        assert list(folder.rglob("*.so"))
    finally:
        launcher.kill()
        launcher.communicate()
