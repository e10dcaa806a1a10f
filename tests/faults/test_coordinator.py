"""The coordinator is killed: in every phase of a step and of a recovery, together with workers, and unobserved.

Training continues, no step is lost, and the next coordinator handles what failed meanwhile.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.comms.base.process import die_with_parent
from tests.jobs import HANG_S, JOBS, assert_same_run, finish, launch, read_result, reference, run_job, wait_until
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import COORDINATOR, Hosts
from tests.jobs.ports import free_ports

STEPS = 40
MOST_DEATHS = 60
# A worker that kills a coordinator stands still until another one runs: that is no hang, and the worker is not slow.
PATIENT = ["--es-hang-timeout=60", "--es-rebalance-after=0"]
STEP_PHASES = ("compute", "reduce", "agree", "update", "commit")
RECOVERY_PHASES = ("recover", "restore", "join")


def kill_coordinator(rank: int, phase: str, step: int = 0, incarnation: int = 0) -> dict[str, Any]:
    return {"rank": rank, "phase": phase, "step": step, "incarnation": incarnation, "kind": "coordinator"}


def run(faults: list[dict[str, Any]], *, nproc: int = 2, stages: int = 1, steps: int = STEPS) -> Any:
    result = run_job(nproc=nproc, stages=stages, steps=steps, faults=faults, flags=PATIENT)
    assert_same_run(result, reference(steps))
    assert [event["step"] for event in result.named("committed")] == list(range(steps)), "the ledger has every step"
    assert len({event["number"] for event in result.events}) == len(result.events)
    return result


def test_in_every_phase_of_a_step() -> None:
    """No worker is lost because of it, and no generation ends."""
    result = run([kill_coordinator(0, phase, 3 + 7 * i) for i, phase in enumerate(STEP_PHASES)])
    assert len(result.named("coordinator_returned")) == len(STEP_PHASES)
    assert {event["generation"] for event in result.named("committed")} == {1}
    assert not result.named("node_lost")


@pytest.mark.soak
def test_in_every_phase_of_a_recovery() -> None:
    """Rank 1 dies repeatedly, and each time the coordinator dies during the decisions that follow."""
    faults = []
    for life, phase in enumerate(RECOVERY_PHASES):
        faults.append({"rank": 1, "phase": "compute", "step": 4 + 9 * life, "incarnation": life})
        newcomer = phase == "join"
        faults.append(kill_coordinator(1, phase, 0, life + 1) if newcomer else kill_coordinator(0, phase, 4 + 9 * life))
    result = run(faults, nproc=2)
    assert len(result.named("worker_died")) == len(RECOVERY_PHASES)
    assert len(result.named("coordinator_returned")) == len(RECOVERY_PHASES)


@pytest.mark.soak
def test_together_with_a_worker() -> None:
    """The worker dies while no coordinator runs; the next one handles it. In every phase of a step."""
    faults = []
    for life, phase in enumerate(STEP_PHASES):
        place = {"phase": phase, "step": 4 + 7 * life, "incarnation": life}
        faults += [{"rank": 1, "kind": "coordinator", **place}, {"rank": 1, **place}]
    result = run(faults, nproc=3)
    assert len(result.named("coordinator_returned")) == len(STEP_PHASES)
    assert [event["rank"] for event in result.named("worker_died")] == [1] * len(STEP_PHASES)
    assert len(result.named("recovered")) == len(STEP_PHASES)


@pytest.mark.soak
def test_again_and_again_with_stages() -> None:
    """Every few steps, in whatever phase the step is, in a pipeline that loses workers, too."""
    faults = [kill_coordinator(0, STEP_PHASES[i % 5], 2 * i) for i in range(16)]
    faults += [{"rank": rank, "phase": "compute", "step": 6 + 8 * rank} for rank in (1, 2, 3)]
    result = run(faults, nproc=4, stages=2)
    assert len(result.named("coordinator_returned")) == 16
    assert len(result.named("worker_died")) == 3


@pytest.mark.soak
def test_at_every_decision(tmp_path: Path) -> None:
    """Each one lives until it decides something for others to do: it dies before that is written, and the next one when
    it is written and no node was notified. A worker is lost meanwhile."""
    (port,) = free_ports(1)
    where = [f"--bind=127.0.0.1:{port}", "--rdzv-id=doomed", "--nnodes=1", f"--es-store={tmp_path}/store"]
    where.append(f"--es-events={tmp_path}/events.jsonl")
    own = ["--rdzv-backend=everstep", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=doomed", "--nproc-per-node=2"]
    own += ["--rdzv-conf=is_host=false", f"--log-dir={tmp_path}/logs"]
    faults = json.dumps([{"rank": 1, "phase": "reduce", "step": 6}])
    arguments = [json.dumps({"out": str(tmp_path), "steps": STEPS, "stages": 1})]
    launcher = launch(JOBS / "gpt_job.py", arguments, own, {"EVERSTEP_FAULTS": faults}, forked=True)
    deaths = 0
    while launcher.poll() is None and deaths < MOST_DEATHS:
        command = [sys.executable, JOBS / "dying_coordinator.py", ("before", "after")[deaths % 2], *where]
        with subprocess.Popen(command, preexec_fn=die_with_parent) as coordinator:
            wait_until(lambda: coordinator.poll() is not None or launcher.poll() is not None, HANG_S, "an end")
            coordinator.kill()
        deaths += coordinator.returncode != 0
    output = finish(launcher)
    result = read_result(tmp_path, launcher.returncode, output)
    assert_same_run(result, reference(STEPS))
    assert [event["step"] for event in result.named("committed")] == list(range(STEPS)), "the ledger has every step"
    assert [event["rank"] for event in result.named("worker_died")] == [1]
    assert 6 <= deaths <= len(result.named("coordinator_returned")) + 2 < MOST_DEATHS


def test_a_node_that_cannot_keep_what_it_has_to_say_ends(tmp_path: Path) -> None:
    """The coordinator is stopped for good. The node's queue is bounded; when full, the node reports that and ends."""
    (port,) = free_ports(1)
    where = [f"--bind=127.0.0.1:{port}", "--rdzv-id=mute", "--nnodes=1", f"--es-store={tmp_path}/store"]
    where.append(f"--es-events={tmp_path}/events.jsonl")
    own = ["--rdzv-backend=everstep", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=mute", "--nproc-per-node=2"]
    own += ["--rdzv-conf=is_host=false", f"--log-dir={tmp_path}/logs"]
    arguments = [json.dumps({"out": str(tmp_path), "steps": 100_000, "stages": 1})]
    command = [sys.executable, "-m", "everstep", "coordinator", *where]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent) as coordinator:
        try:
            launcher = launch(JOBS / "gpt_job.py", arguments, own, program=[JOBS / "forgetful.py"])
            events = tmp_path / "events.jsonl"
            wait_until(lambda: events.exists() and '"committed"' in events.read_text(), 60, "it trains")
            coordinator.send_signal(signal.SIGSTOP)
            output = finish(launcher)
        finally:
            coordinator.kill()
    assert launcher.returncode == 1
    why = "no coordinator has accepted the messages of this node, and their queue is full"
    assert output.splitlines()[-1] == f"everstep: error: {why}"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes that train, and a coordinator in a process of its own."""
    with Hosts(3) as hosts:
        cluster = Cluster(hosts, tmp_path, steps=60)
        cluster.start()
        cluster.reaches(4)
        yield cluster


def coordinator_dies(job: Cluster) -> None:
    job.hosts.kill(COORDINATOR)
    assert job.coordinator.wait(10) == -signal.SIGKILL


@pytest.mark.soak
def test_a_node_is_lost_while_there_is_no_coordinator(job: Cluster) -> None:
    """`everstep coordinator`, restarted by the same command, loads its state, and notices that a node is missing."""
    with job.slowly():
        job.until(job.whole, 60, "the job is whole")
        coordinator_dies(job)
        job.away.add(1)
        job.hosts.kill(1)
        job.start_coordinator()
        job.until(lambda: job.events("node_lost"), 30, "the lost node is noticed")
        job.until(lambda: job.events("recovered"), 30, "the others have recovered")
    job.away.clear()
    job.await_whole()
    job.see_to_the_end(60)
    result = job.check()
    assert [event["host"] for event in result.named("node_lost")] == [job.hosts.address(1)]
    assert len(result.named("coordinator_returned")) == 1


@pytest.mark.soak
def test_a_coordinator_that_was_only_stopped_meets_its_successor(job: Cluster) -> None:
    """SIGSTOP, and another one for the same store: it reports that the store is in use, and nothing is damaged."""
    with job.slowly():
        job.until(job.whole, 60, "the job is whole")
        job.hosts.stop(COORDINATOR)
        with pytest.raises(AssertionError, match="did not start"):
            job.start_coordinator()
        job.hosts.cont(COORDINATOR)
    job.see_to_the_end(60)
    assert not job.check().named("node_lost")
