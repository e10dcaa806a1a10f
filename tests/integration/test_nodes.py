"""Several launchers on one machine are several nodes; launchers, keepers and preloaded processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.agents.node.preload import NAME as PRELOADED
from tests.jobs import (
    JOBS,
    PROTECTION,
    Result,
    assert_same_run,
    assert_same_state,
    everstep,
    finish,
    launch,
    read_result,
    reference,
    slowly,
    wait_until,
)
from tests.jobs.ports import free_port
from tests.jobs.processes import named, saying

KEEPER = "everstep.checkpointing.keeper.service"


@dataclass
class Job:
    """A job whose launchers a test starts one by one."""

    out: Path
    config: dict[str, Any]

    def node(self, *flags: str, faults: list[dict[str, Any]] | None = None) -> subprocess.Popen[str]:
        arguments = [json.dumps({"out": str(self.out), "stages": 1, **self.config})]
        events = ["--es-events", str(self.out / "events.jsonl")]
        injected = {"EVERSTEP_FAULTS": json.dumps(faults or [])}
        return launch(JOBS / "gpt_job.py", arguments, [*events, *flags], injected, forked=True)

    def events(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events() if e["event"] == event]

    def committed(self, step: int) -> bool:
        return any(event["event"] == "committed" and event["step"] >= step for event in self.events())

    def result(self, *launchers: subprocess.Popen[str]) -> Result:
        outputs = [finish(launcher) for launcher in launchers]
        return read_result(self.out, max(abs(p.returncode) for p in launchers), "\n".join(outputs))


def children(launcher: subprocess.Popen[str], has: str) -> list[psutil.Process]:
    """The launcher's children, and theirs, with this in their command line."""
    return saying(psutil.Process(launcher.pid).children(recursive=True), has)


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return preloaded_of(launcher).children()


def preloaded_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    (preloaded,) = named(psutil.Process(launcher.pid).children(), PRELOADED)
    return preloaded


@pytest.mark.soak
def test_two_nodes_lose_a_worker_each(tmp_path: Path) -> None:
    """They meet by c10d; `status` shows the job; each loses a worker by kill -9. The covered losses are printed."""
    job, port = Job(tmp_path, {"steps": 14}), free_port()
    flags = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    flags.append("--es-node-losses=5")  # more than there are
    faults = [{"rank": 0, "phase": "compute", "step": 4}, {"rank": 3, "phase": "update", "step": 8}]
    nodes = [job.node(*flags, faults=faults) for _ in range(2)]
    wait_until(lambda: job.committed(2), 60, "three steps")
    status = everstep("status", f"127.0.0.1:{port}", "--json")
    found = json.loads(status.stdout)
    assert (found["steps"], len(found["nodes"]), len(found["workers"])) == (14, 2, 4)
    result = job.result(*nodes)
    assert_same_run(result, reference(14))
    assert {event["rank"] for event in result.named("worker_died")} == {0, 3}
    said = f"{PROTECTION}parity, of 1 lost node, stripes of 1+1 (2 nodes survive the loss of 1 at once, not of 5; every"
    assert len([line for line in result.output.splitlines() if line.startswith(said)]) == 2, result.output
    for name, lines in result.workers.items():  # survivors keep their process and their objects
        assert len({(line["pid"], line["model"], line["optimizer"]) for line in lines}) == 1, name
    for rank in (1, 2):
        assert len([name for name in result.workers if name.startswith(f"worker-{rank}-")]) == 1


@pytest.mark.soak
def test_a_separate_coordinator_and_a_node_that_joins(tmp_path: Path) -> None:
    """`everstep coordinator` and two nodes, found by --master-addr and --node-rank; a third joins while they train."""
    job, port = Job(tmp_path, {"steps": 60}), free_port()
    coordinator = subprocess.Popen(
        [
            *(sys.executable, "-m", "everstep", "coordinator"),
            f"--bind=127.0.0.1:{port}",
            "--nnodes=2:3",
            f"--es-events={tmp_path}/events.jsonl",
        ],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert coordinator.stdout is not None
        assert str(port) in coordinator.stdout.readline()
        flags = ["--nnodes=2:3", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        nodes = [job.node(*flags, f"--node-rank={rank}") for rank in range(2)]
        wait_until(lambda: job.committed(1), 60, "two steps")
        with slowly(tmp_path):
            nodes.append(job.node(*flags, "--node-rank=2"))
            wait_until(lambda: job.named("joined"), 60, "the third one trains")
        result = job.result(*nodes)
        assert_same_run(result, reference(60))
        assert result.named("joined")
        sizes = {line["world_size"] for lines in result.workers.values() for line in lines}
        assert sizes == {2, 3}
        assert coordinator.wait(timeout=10) == 0
    finally:
        coordinator.kill()
        coordinator.wait()
        if coordinator.stdout:
            coordinator.stdout.close()


@pytest.mark.soak
def test_a_node_without_its_coordinator_ends(tmp_path: Path) -> None:
    """A lost node costs nothing. The coordinator is lost with its node; the other waits a while, and ends."""
    job, port = Job(tmp_path, {"steps": 100_000}), free_port()
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    flags += [f"--log-dir={tmp_path}/logs", "--rdzv-conf=join_timeout=20", "--es-coordinator-wait=1"]
    first = job.node(*flags)
    wait_until(lambda: any(e["event"] == "node_joined" for e in job.events()), 60, "the first node is there")
    second = job.node(*flags)
    wait_until(lambda: job.committed(1), 60, "two steps")
    second.kill()
    finish(second, timeout_s=10)
    wait_until(lambda: job.named("recovered"), 20, "the job continues without it")
    (lost,) = job.named("node_lost")
    assert lost["node"].endswith(f"-{second.pid}")
    assert (lost["host"], lost["ranks"]) == ("127.0.0.1", [1])
    (recovered,) = job.named("recovered")
    assert recovered["nodes"] == [lost["node"]]
    third = job.node(*flags)
    wait_until(lambda: any(e["ranks"] == [1] for e in job.named("joined")), 60, "another node takes its rank")
    first.kill()
    finish(first, timeout_s=10)
    output = finish(third, timeout_s=60)
    assert third.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("everstep: error: ")]
    assert line == "everstep: error: this node counts as lost, and no coordinator could be reached for 20 s"
    assert "lost the coordinator" in output
    assert "no word from a coordinator for" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_takes_all_with_it(number: signal.Signals, tmp_path: Path) -> None:
    job = Job(tmp_path, {"steps": 100_000})
    launcher = job.node("--nproc-per-node=2", f"--log-dir={tmp_path}/logs")
    wait_until(lambda: job.committed(1), 60, "two steps")
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) == 5  # coordinator, keeper, preloaded process, two workers
    os.kill(launcher.pid, number)
    _, alive = psutil.wait_procs(family, timeout=4)
    output = finish(launcher, timeout_s=10)
    assert alive == []
    assert launcher.returncode != 0
    if number != signal.SIGKILL:
        first, *rest = output.strip().splitlines()
        assert first.startswith(f"{PROTECTION}of lost workers, not of lost nodes (nothing is protected: 1 node(s)")
        assert rest == [f"everstep: error: stopped by {number.name}"]


@pytest.mark.soak
def test_shared_memory_needs_no_room_in_dev_shm(tmp_path: Path) -> None:
    """Containers often have 64 KiB there, or a little more: nothing of Everstep uses it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root may mount, and by unshare (Debian: util-linux)")
    small = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    arguments = [json.dumps({"out": str(tmp_path), "stages": 1, "steps": 14})]
    faults = [{"rank": 0, "phase": "compute", "step": 4}, {"rank": 1, "phase": "update", "step": 8}]
    launcher = launch(
        JOBS / "gpt_job.py",
        arguments,
        ["--nproc-per-node=2", "--es-events", str(tmp_path / "events.jsonl"), f"--log-dir={tmp_path}/logs"],
        {"EVERSTEP_FAULTS": json.dumps(faults)},
        inside=["unshare", "--mount", "sh", "-c", small, "sh"],
    )
    result = Job(tmp_path, {}).result(launcher)
    assert_same_run(result, reference(14))
    assert len(result.named("worker_died")) == 2


def disturbed(tmp_path: Path, disturb: Callable[[subprocess.Popen[str]], None], steps: int) -> Result:
    """A job of two workers into which a fault is injected from outside after step 3."""
    job = Job(tmp_path, {"steps": steps})
    launcher = job.node("--nproc-per-node=2", f"--log-dir={tmp_path}/logs")
    wait_until(lambda: job.committed(3), 60, "four steps")
    with slowly(tmp_path):
        disturb(launcher)
    return job.result(launcher)


@pytest.mark.soak
def test_the_keeper_is_killed_and_then_a_worker(tmp_path: Path) -> None:
    """It restarts, the workers pass it their segments again, and a replacement finds its shards there."""

    def disturb(launcher: subprocess.Popen[str]) -> None:
        (keeper,) = children(launcher, KEEPER)
        keeper.kill()
        wait_until(
            lambda: [k.pid for k in children(launcher, KEEPER)] not in ([], [keeper.pid]),
            10,
            "a new keeper",
        )
        before = len(job_steps(tmp_path))
        wait_until(lambda: len(job_steps(tmp_path)) > before + 4, 20, "more steps")
        workers(launcher)[0].kill()

    result = disturbed(tmp_path, disturb, 60)
    assert_same_run(result, reference(60))
    assert len(result.named("worker_died")) == 1


def job_steps(out: Path) -> list[dict[str, Any]]:
    return [event for event in Job(out, {}).events() if event["event"] == "committed"]


def test_the_preloaded_process_is_killed(tmp_path: Path) -> None:
    """Its workers die with it; all start again from what the keeper holds."""

    def disturb(launcher: subprocess.Popen[str]) -> None:
        assert preloaded_of(launcher).num_threads() == 1, "what is forked while it has threads may hang"
        preloaded_of(launcher).kill()

    result = disturbed(tmp_path, disturb, 60)
    assert_same_run(result, reference(60))
    assert len(result.named("worker_died")) == 2


@pytest.mark.soak
def test_the_preloaded_process_gets_no_processor(tmp_path: Path) -> None:
    """The agent learns without it, and at once, how a worker ended."""

    def disturb(launcher: subprocess.Popen[str]) -> None:
        preloaded = preloaded_of(launcher)
        victim = workers(launcher)[0]
        preloaded.suspend()
        victim.kill()
        wait_until(lambda: Job(tmp_path, {}).named("worker_died"), 20, "the worker's death is known")
        preloaded.resume()

    result = disturbed(tmp_path, disturb, 60)
    assert_same_run(result, reference(60))
    assert [event["cause"] for event in result.named("worker_died")] == ["killed by SIGKILL"]


@pytest.mark.soak
def test_an_event_log_that_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    """No space is left on its device; nor is there later. A worker is lost nevertheless, and replaced."""
    arguments = [json.dumps({"out": str(tmp_path), "stages": 1, "steps": 12})]
    faults = {"EVERSTEP_FAULTS": json.dumps([{"rank": 1, "phase": "compute", "step": 4}])}
    flags = ["--nproc-per-node=2", "--es-events=/dev/full", "--es-log=text"]
    launcher = launch(JOBS / "gpt_job.py", arguments, flags, faults, forked=True)
    output = finish(launcher)
    (tmp_path / "events.jsonl").touch()
    result = read_result(tmp_path, launcher.returncode, output)
    assert result.status == 0, output
    assert result.output.count("--es-events /dev/full: No space left on device; lines are kept") == 1, result.output
    assert_same_state(result.state(0), reference(12).state())
    assert "worker of rank 1 killed by SIGKILL" in result.output


@pytest.mark.soak
def test_first_steps_that_take_long_are_no_hangs(tmp_path: Path) -> None:
    """Such as a compiler's: neither the job's first step, nor that of a replacement, nor what others do meanwhile."""
    slow = {"phase": "compute", "kind": "pause", "seconds": 5.0}
    faults = [{"rank": 1, "incarnation": number, **slow} for number in (0, 1)]
    faults.append({"rank": 1, "phase": "compute", "step": 6})
    job = Job(tmp_path, {"steps": 20})
    result = job.result(job.node("--nproc-per-node=2", "--es-hang-timeout=1", faults=faults))
    assert_same_run(result, reference(20))
    assert [event["cause"] for event in result.named("worker_died")] == ["killed by SIGKILL"]


@pytest.mark.soak
def test_a_worker_that_is_only_late_is_given_longer(tmp_path: Path) -> None:
    """The second time it has two seconds, the third time four."""
    late = {"rank": 1, "phase": "join", "kind": "pause", "seconds": 3.0}
    faults = [{**late, "incarnation": number} for number in range(1, 6)]
    faults.append({"rank": 1, "phase": "compute", "step": 6})
    job = Job(tmp_path, {"steps": 20})
    result = job.result(job.node("--nproc-per-node=2", "--es-hang-timeout=1", faults=faults))
    assert_same_run(result, reference(20))
    killed, *hung = [event["cause"] for event in result.named("worker_died")]
    assert killed == "killed by SIGKILL"
    assert 1 <= len(hung) <= 2, hung
    assert all(cause.startswith("hung: ") for cause in hung), hung


@pytest.mark.soak
def test_hung_workers_are_fenced(tmp_path: Path) -> None:
    """One stopped from outside, one in an endless loop of its own."""
    faults = [{"rank": 1, "phase": "compute", "step": 10, "kind": "loop", "incarnation": 1}]
    job = Job(tmp_path, {"steps": 60})
    launcher = job.node("--nproc-per-node=2", "--es-hang-timeout=1", faults=faults)
    wait_until(lambda: job.committed(3), 60, "four steps")
    rank_of = {int(path.stem.split("-")[2]): int(path.stem.split("-")[1]) for path in tmp_path.glob("worker-*")}
    (victim,) = [p for p in workers(launcher) if rank_of[p.pid] == 1]
    victim.suspend()
    result = job.result(launcher)
    assert_same_run(result, reference(60))
    causes = [event["cause"] for event in result.named("worker_died")]
    assert len(causes) == 2
    assert all(cause.startswith("hung: no progress for ") for cause in causes), causes
