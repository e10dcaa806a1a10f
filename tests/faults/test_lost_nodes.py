"""Whole nodes are lost: agent, keeper and workers at one instant. The run must be the undisturbed one, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Result, assert_same_run, run_job
from tests.jobs.hosts import HostJob, Hosts

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join")
EVERY_STEP = ["--es-snapshot-every=1"]


@lru_cache(maxsize=8)
def reference(steps: int) -> Result:
    """The undisturbed run; its layout does not matter to its bytes."""
    return run_job(nproc=2, steps=steps, timeout_s=120)


def see_to_the_end(job: HostJob, timeout_s: float, **launch: Any) -> None:
    """Start every node again that was killed, as a cluster's manager does, until the job has ended."""
    deadline = time.monotonic() + timeout_s
    while not job.events("ended"):
        assert time.monotonic() < deadline, f"the job is at step {job.committed()} after {timeout_s:g} s"
        for host, launcher in list(job.hosts.launchers.items()):
            if launcher.poll() == -signal.SIGKILL:
                job.launch(host, **launch)
        time.sleep(0.05)


def check(job: HostJob, steps: int) -> Result:
    """The verdict: the same losses, the same ledger, the same state; and steps computed again came out the same."""
    (ended,) = job.events("ended")
    assert ended["succeeded"], ended
    members = {event["host"] for event in job.events("node_joined")} - {e["host"] for e in job.events("node_lost")}
    up = [host for host in job.hosts.launchers if job.hosts.address(host) in members]
    result = job.result(*(up or [0]))
    assert_same_run(result, reference(steps))
    assert all(event["same"] for event in result.named("committed_again"))
    return result


def _step(number: int, phase: str) -> int:
    """Far enough apart that each loss is made good before the next: one at a time is what is protected here."""
    return 0 if phase == "join" else 6 + 12 * number if number < 4 else 60 + 40 * (number - 4)


def flags(tmp_path: Path, *more: str) -> list[str]:
    return [*EVERY_STEP, f"--log-dir={tmp_path}/logs", *more]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_node_dies_in_every_phase(stages: int, tmp_path: Path) -> None:
    """Five nodes; each life of the last four ends in another phase. Workers of the first one die too, which all see."""
    steps = 600
    rng = random.Random(stages)
    places = [(rank, life) for life in (0, 1) for rank in (1, 2, 3, 4)]
    first, again = list(PHASES[:5]), list(PHASES[5:])
    rng.shuffle(first)
    phases = [*first[:4], *again, first[4]]  # only a second life can join
    faults = [
        {"rank": rank, "incarnation": life, "phase": phase, "step": _step(number, phase), "kind": "node"}
        for number, ((rank, life), phase) in enumerate(zip(places, phases, strict=True))
    ]
    faults += [{"rank": 0, "incarnation": i, "phase": "compute", "step": 25 * (i + 1)} for i in range(22)]
    with Hosts(5) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="5:5", steps=steps, stages=stages)
        job.launch(*range(5), flags=flags(tmp_path), faults=faults)
        see_to_the_end(job, 200, flags=flags(tmp_path), faults=faults)
        result = check(job, steps)
    lost = result.named("node_lost")
    back = [event["lost_steps"] for event in result.named("recovered") if event["nodes"]]
    print(f"{len(lost)} nodes lost, {len(result.named('worker_died'))} workers, steps gone back: {back}")
    assert len(lost) == len(PHASES)
