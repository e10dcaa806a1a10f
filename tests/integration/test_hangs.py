"""What counts as a hang, and what does not: real workers that stand still in their data, their code, or a lock."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import JOBS, Result, everstep, finish, launch, read_result, run_job, wait_until
from tests.jobs.ports import free_port

STEPS = 12
QUICK = ["--es-hang-timeout=1", "--es-user-timeout=3"]  # in its dataset: a second of silence, three of standing still
PATIENT = ["--es-hang-timeout=1", "--es-user-timeout=100"]


class Job:
    """A job of two workers, one or both of which stand still in a step."""

    def __init__(self, out: Path, flags: list[str], **config: Any) -> None:
        self.out = out
        os.mkfifo(out / "pipe")
        arguments = [json.dumps({"out": str(out), "steps": STEPS, "at": 6, "ranks": [1], **config})]
        self.endpoint = f"127.0.0.1:{free_port()}"
        events = ["--es-events", str(out / "events.jsonl"), "--nproc-per-node=2", "--rdzv-endpoint", self.endpoint]
        self.launcher = launch(JOBS / "slow_job.py", arguments, [*events, *flags], forked=True)

    def status(self) -> str:
        return everstep("status", self.endpoint).stdout

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == name]

    def warned(self, notice: str) -> list[dict[str, Any]]:
        return [line for line in self.events("warning") if line["notice"] == notice]

    def release(self, readers: int) -> None:
        """The storage continues: for this many processes that wait for it."""
        opened = [os.open(self.out / "pipe", os.O_RDWR)]
        wait_until(lambda: len(list(self.out.glob("stall-*"))) >= readers, 60, "all have come to wait")
        for fd in opened:
            os.close(fd)

    def result(self) -> Result:
        output = finish(self.launcher)
        result = read_result(self.out, self.launcher.returncode, output)
        assert result.status == 0, output
        return result


@pytest.fixture(scope="module")
def quiet() -> dict[str, list[tuple[int, float, str]]]:
    """The ledgers of undisturbed jobs, by the kind of loop."""
    found = {}
    for loop in ("steps", "loop"):
        with tempfile.TemporaryDirectory() as folder:
            config = {"place": "loop", "how": "none", "ranks": []} if loop == "loop" else {"ranks": []}
            found[loop] = ledger(Job(Path(folder), [], **config).result())
    return found


def ledger(result: Result) -> list[tuple[int, float, str]]:
    return [(line["step"], line["loss"], line["digest"]) for line in result.named("committed")]


Ledgers = dict[str, list[tuple[int, float, str]]]


@pytest.mark.soak
def test_storage_that_stands_still_for_all_ranks_is_no_hang(tmp_path: Path, quiet: Ledgers) -> None:
    """Longer than any worker alone might; a warning says until when, and then it continues."""
    job = Job(tmp_path, QUICK, place="fetch", how="storage", ranks=[0, 1])
    wait_until(lambda: len(job.warned("no-progress")) >= 2, 90, "both ranks are warned of")
    assert all("in the dataset in step" in line["text"] for line in job.warned("no-progress"))
    assert all("it waits for storage" in line["text"] for line in job.warned("no-progress"))
    job.release(2)
    result = job.result()
    assert result.named("worker_died") == []
    assert ledger(result) == quiet["steps"]
    assert "considered hung after 18 s" in result.output, result.output


def test_a_rank_that_alone_waits_for_storage_is_killed_in_the_end(tmp_path: Path, quiet: Ledgers) -> None:
    job = Job(tmp_path, QUICK, place="fetch", how="storage")
    result = job.result()
    (died,) = result.named("worker_died")
    assert died["cause"].startswith("hung: no progress for 3.")
    assert died["cause"].endswith("waiting for storage")
    assert died["hang"] == "alive"
    assert "stand_in_storage" in died["stacks"]
    assert "stand_in_storage" in result.output, "the stacks are on standard error too"
    assert "showed signs of life; its replacement has 2 times as long" in result.output
    assert ledger(result) == quiet["steps"]


def test_a_dead_lock_in_a_step_is_found_and_shown(tmp_path: Path, quiet: Ledgers) -> None:
    job = Job(tmp_path, ["--es-hang-timeout=1"], place="forward", how="lock")
    result = job.result()
    (died,) = result.named("worker_died")
    assert died["cause"].startswith("hung: no progress for ")
    assert died["hang"] == "silent"
    assert "wait_for_a_lock" in died["stacks"]
    assert "in forward" in died["stacks"]
    assert ledger(result) == quiet["steps"]


def test_an_endless_loop_in_a_step_is_found_though_it_works(tmp_path: Path, quiet: Ledgers) -> None:
    """Its interpreter never releases the lock; the agent still gets the stacks."""
    job = Job(tmp_path, ["--es-hang-timeout=1"], place="forward", how="spin")
    result = job.result()
    (died,) = result.named("worker_died")
    assert died["cause"].endswith(", though it works")
    assert died["hang"] == "alive"
    assert "in spin" in died["stacks"]
    assert ledger(result) == quiet["steps"]


def test_work_in_the_middle_of_a_step_of_the_users_loop_is_no_hang(tmp_path: Path, quiet: Ledgers) -> None:
    """Between a micro-batch and `optimizer.step()`: longer than a step may stand still, and without a sign of life."""
    job = Job(tmp_path, PATIENT, place="loop", how="sleep", seconds=5)
    result = job.result()
    assert result.named("worker_died") == []
    assert ledger(result) == quiet["loop"]


@pytest.mark.soak
def test_a_heartbeat_is_progress(tmp_path: Path, quiet: Ledgers) -> None:
    """An evaluation that takes longer than it may stand still."""
    job = Job(tmp_path, ["--es-hang-timeout=1", "--es-user-timeout=0.5"], place="between", how="beat", seconds=6)
    result = job.result()
    assert result.named("worker_died") == []
    assert ledger(result) == quiet["steps"]


def test_without_one_it_is_killed_once_and_then_given_longer(tmp_path: Path, quiet: Ledgers) -> None:
    """The job continues, however often: each worker has twice the time of the one before."""
    flags = ["--es-hang-timeout=1", "--es-user-timeout=1"]
    result = Job(tmp_path, flags, place="fetch", how="sleep", seconds=2.5, again=True, at=STEPS - 1).result()
    died = result.named("worker_died")
    assert 1 <= len(died) < 5
    assert ledger(result) == quiet["steps"]


# ---------------------------------------------------------------- who waits for whom


@pytest.mark.soak
def test_the_rank_that_the_others_wait_for_is_named(tmp_path: Path, quiet: Ledgers) -> None:
    """In a warning and in status, with the place and the limit."""
    job = Job(tmp_path, [], place="between", how="storage")
    wait_until(lambda: job.warned("waiting"), 90, "a line says who waits for whom")
    (line, *_) = job.warned("waiting")
    assert line["ranks"] == [0]
    assert line["text"].startswith("rank 0 waits for rank 1 in ")
    assert "rank 1: no progress for " in line["text"]
    assert "in the user's code between steps (it waits for storage); considered hung after 7200 s" in line["text"]
    status = job.status()
    assert "rank 0 waits for rank 1 in " in status
    assert "rank 1: no progress for " in status
    job.release(1)
    result = job.result()
    assert result.named("worker_died") == []
    assert "rank 0 waits for rank 1" in result.output, "it is on standard error by default"
    assert ledger(result) == quiet["steps"]


@pytest.mark.soak
def test_a_node_and_its_job_say_that_they_wait_for_other_nodes(tmp_path: Path) -> None:
    job = Job(tmp_path, ["--nnodes=2", "--rdzv-conf=join_timeout=13"])
    output = finish(job.launcher)
    assert job.launcher.returncode == 1, output
    assert "the job waits for nodes: 1 of at least 2 (--nnodes) have joined" in output
    assert "this node has joined, and waits for the coordinator to start workers on it" in output


@pytest.mark.soak
def test_a_node_says_that_it_looks_for_a_coordinator(tmp_path: Path) -> None:
    config = ["--rdzv-conf=is_host=false,join_timeout=12"]
    job = Job(tmp_path, ["--nnodes=2", *config])
    output = finish(job.launcher)
    assert job.launcher.returncode == 2, output
    assert f"this node looks for a coordinator at {job.endpoint}, where none answers" in output
    assert "no coordinator answers at" in output


@pytest.mark.soak
def test_collectives_of_the_script_end_with_a_lost_worker_in_an_error_that_helps(tmp_path: Path) -> None:
    """They work as long as no worker is lost."""
    script = "collective_job.py"
    calm = run_job(nproc=2, steps=6, script=script)
    assert calm.status == 0, calm.output
    assert "all averaged" in calm.output
    faults, flags = [{"rank": 1, "phase": "compute", "step": 3}], [f"--log-dir={tmp_path}/logs"]
    lost = run_job(nproc=2, steps=6, script=script, faults=faults, flags=flags)
    assert lost.status == 1, lost.output
    last = lost.output.strip().splitlines()[-1]
    assert last.startswith("everstep: error: ")
    assert "cannot continue without it. Use what still works: run.mean, run.gather, run.reduce" in last
