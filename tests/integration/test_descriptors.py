"""Few file descriptors: the soft limit is raised, a low hard limit is enough or named."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from everstep.agents.node.descriptors import LEAST, LEAST_A_WORKER
from tests.jobs import JOBS, command, finish, launch

SCRIPT = JOBS / "gpt_job.py"
WORKERS = 4


def limited(soft: int, hard: int) -> list[str]:
    """The prefix of a command that may have this many open files."""
    return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh"]


@pytest.mark.parametrize("soft", [64, 128, 240, 256])
def test_a_job_runs_where_little_is_allowed(tmp_path: Path, soft: int) -> None:
    """Even where what its workers inherit would be above the limit."""
    arguments = [json.dumps({"out": str(tmp_path), "steps": 3, "stages": 1})]
    process = launch(SCRIPT, arguments, [f"--nproc-per-node={WORKERS}"], inside=limited(soft, soft))
    output = finish(process)
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("worker-*"))) == WORKERS


def test_the_soft_limit_is_raised(tmp_path: Path) -> None:
    script = tmp_path / "limits.py"
    script.write_text("import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)\n")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip("this machine's own limit is as low")
    process = launch(script, [], ["--nproc-per-node=2"], inside=limited(100, 1000))
    output = finish(process)
    assert (process.returncode, output.split()) == (0, ["552", "1000"] * 2), output
    process = launch(script, [], ["--nproc-per-node=2"], inside=limited(900, 1000))
    assert finish(process).split() == ["900", "1000"] * 2, "an ample limit stays as it is"


def test_too_few_are_named(tmp_path: Path) -> None:
    few = LEAST + LEAST_A_WORKER * WORKERS - 1
    run = [sys.executable, "-m", "everstep", "run", f"--nproc-per-node={WORKERS}", str(SCRIPT)]
    script = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    ended = command(["-c", script, *limited(few, few), *run])
    assert ended.status == 2
    said = ended.error()
    assert f"a process may have {few} open files" in said
    assert f"needs {few + 1} at least" in said


@pytest.mark.soak
def test_what_a_worker_inherits_lies_out_of_the_way(tmp_path: Path) -> None:
    """A shell that opens descriptor 3 for itself does not disconnect the worker."""
    script = tmp_path / "train.sh"
    job = json.dumps({"out": str(tmp_path), "steps": 3, "stages": 1})
    script.write_text(
        f"exec 3>{tmp_path}/three 4>&3 5>&3 6>&3 7>&3 8>&3 9>&3\nexec {sys.executable} {SCRIPT} '{job}'\n"
    )
    process = launch("sh", [str(script)], ["--nproc-per-node=2", "--no-python"])
    output = finish(process)
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("worker-*"))) == 2
