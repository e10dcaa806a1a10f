"""Whole nodes are lost: agent, keeper and workers at one instant. The run equals the undisturbed one, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import pytest

from tests.jobs import finish
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join")
PERIOD = 30
STEPS = 120  # while the test waits for nodes: at most 35 each time


def node_fault(rank: int, life: int, phase: str) -> dict[str, object]:
    """Nodes return when they can, and each dies in steps of its own: one node at a time is protected here."""
    place = {"recover": 20, "restore": 25, "join": 0}.get(phase, 5 * (rank - 1))
    period = 0 if phase == "join" else PERIOD
    return {
        "rank": rank, "incarnation": life, "phase": phase, "step": place + 5 if period else 0,
        "period": period, "kind": "node",
    }  # fmt: skip


def worker_faults(count: int) -> list[dict[str, object]]:
    """The only worker of rank 0 dies repeatedly, in the steps where others die in recoveries."""
    return [
        {"rank": 0, "incarnation": i, "phase": "compute", "step": 25 + 5 * (i % 2), "period": PERIOD}
        for i in range(count)
    ]


@pytest.mark.soak
def test_a_node_dies_in_every_phase(tmp_path: Path) -> None:
    """Five nodes; each life of the last four ends in another phase. Workers of the first one die, too."""
    rng = random.Random(2)
    lives = [(rank, life) for life in (0, 1) for rank in (1, 2, 3, 4)]
    first, again = list(PHASES[:5]), list(PHASES[5:])
    rng.shuffle(first)
    phases = [*first[:4], *again, first[4]]  # only a second life can join
    faults = [node_fault(rank, life, phase) for (rank, life), phase in zip(lives, phases, strict=True)]
    with Hosts(5) as hosts:
        job = Cluster(hosts, tmp_path, steps=180, stages=2)
        job.start(faults=faults + worker_faults(40))
        job.see_all_lives(200)
        result = job.check()
    lost = result.named("node_lost")
    back = [event["lost_steps"] for event in result.named("recovered") if event["nodes"]]
    print(f"{len(lost)} nodes lost, {len(result.named('worker_died'))} workers, steps gone back: {back}")
    assert len(lost) == len(PHASES)


def pair(ranks: tuple[int, int], phases: tuple[str, str], step: int, life: int = 0) -> list[dict[str, object]]:
    return [
        {"rank": rank, "incarnation": life, "phase": phase, "step": step, "kind": "node"}
        for rank, phase in zip(ranks, phases, strict=True)
    ]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("protection", "rounds"),
    [("parity", [(1, 4), (0, 5), (3, 2)]), ("replicate", [(1, 4)])],
    ids=["parity", "replicate"],
)
def test_two_nodes_at_once(protection: str, rounds: list[tuple[int, int]], tmp_path: Path) -> None:
    """Six nodes, of which any two may be lost: at one instant, in different phases, or one while the other recovers.

    In the latter case the second is lost before any version is protected that was made without the first.
    """
    rng = random.Random(6)
    faults = pair((1, 2), ("compute", "reduce"), 4) + pair((3, 4), ("agree", "update"), 12)
    with Hosts(6) as hosts:
        job = Cluster(hosts, tmp_path, steps=STEPS, flags=["--es-node-losses=2", f"--es-protection={protection}"])
        job.start(faults=faults)
        job.reaches(13)
        for number, (first, second) in enumerate(rounds):
            job.await_whole()
            job.advance(rng.randrange(1, 4))
            if number % 2:
                hosts.kill(first, second)
                continue
            planned = len(job.events("planned"))
            hosts.kill(first)
            job.until(lambda before=planned: len(job.events("planned")) > before, 20, "the loss is planned for")
            hosts.kill(second)
        job.see_to_the_end(120)
        result = job.check()
    told = [(len(event["nodes"]), event["lost_steps"]) for event in result.named("recovered") if event["nodes"]]
    print(f"{len(result.named('node_lost'))} nodes lost; recoveries (nodes, steps gone back): {told}")
    assert len(result.named("node_lost")) == 4 + 2 * len(rounds)


@pytest.mark.soak
def test_settings_by_hand_in_steps_computed_again(tmp_path: Path) -> None:
    """Versions are protected every five steps: a lost node takes steps with it, and the loop returns none twice."""
    faults = [{"rank": 1, "phase": "compute", "step": 13, "kind": "node"}]
    faults += [{"rank": 2, "phase": "update", "step": 28, "kind": "node"}]
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=40, flags=["--es-snapshot-every=5"], by_hand=True)
        job.start(faults=faults)
        job.see_to_the_end(120)
        result = job.check()
    assert sum(event["lost_steps"] for event in result.named("recovered") if event["nodes"]) > 0


@pytest.mark.soak
def test_nodes_of_several_workers(tmp_path: Path) -> None:
    """Each node in turn is lost with its two workers, at the same moment as one worker of another node."""
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=STEPS, stages=2)
        job.start(workers=2)
        for host in (2, 0, 1):
            job.await_whole()
            job.advance(2)
            other = min(job.workers_of(*{0, 1, 2} - {host}))
            hosts.stop(host)
            os.kill(other, signal.SIGKILL)
            hosts.kill(host)
        job.await_whole()
        job.see_to_the_end(90)
        result = job.check()
    assert len(result.named("node_lost")) == 3
    assert len(result.named("worker_died")) == 3
    assert not result.named("unprotected"), "training waited for protection in vain"


def joined(job: Cluster) -> list[int]:
    return [rank for event in job.events("joined") for rank in event["ranks"]]


@pytest.mark.soak
def test_a_node_gets_ranks_that_are_no_range(tmp_path: Path) -> None:
    """Of nodes with one, two and one workers the first and the last are lost; one with two takes ranks 0 and 3."""
    with Hosts(4) as hosts:
        job = Cluster(hosts, tmp_path, steps=STEPS, least=3)
        for host, workers in enumerate((1, 2, 1)):
            job.launch(host, flags=job.flags, workers=workers)
            job.until(lambda count=host + 1: len(job.events("node_joined")) == count, 60, f"node {host} joins")
        job.reaches(2)
        job.away = {0, 2}
        with job.slowly():
            for host in (0, 2):
                job.until(job.protected, 90, "a version outlives the loss of a node")
                hosts.kill(host)
                job.until(lambda count=host // 2 + 1: len(job.events("node_lost")) == count, 30, "the loss is noticed")
            job.advance(1)
            job.launch(3, flags=job.flags, workers=2)
            job.until(lambda: {0, 3} <= {*joined(job)}, 90, "the new node's ranks train")
        job.see_to_the_end(90)
        result = job.check()
    assert len(result.named("worker_died")) == 0


@pytest.mark.parametrize(
    ("protection", "lost"),
    [("parity", (1, 2)), pytest.param("none", (2,), marks=pytest.mark.soak)],
    ids=["parity", "none"],
)
def test_more_is_lost_than_was_protected(protection: str, lost: tuple[int, ...], tmp_path: Path) -> None:
    """The job ends, and one line names what is lost, which node held it, and what was protected."""
    with Hosts(4) as hosts:
        job = Cluster(hosts, tmp_path, steps=100_000, flags=[f"--es-protection={protection}"])
        job.start()
        job.reaches(5)
        names = [job.nodes()[hosts.address(host)] for host in lost]
        hosts.kill(*lost)
        rest = [host for host in hosts.hosts if host not in lost]
        outputs = [finish(hosts.launchers[host], 30) for host in rest]
        assert [hosts.launchers[host].returncode for host in rest] == [1] * len(rest)
        assert job.coordinator.wait(timeout=10) == 0
    for output in outputs:
        assert "Traceback" not in output
        (line,) = [line for line in output.splitlines() if line.startswith("everstep: error: ")]
        assert re.search(r"shard\(s\) \d+(, \d+)*( and \d+ more)? of version \d+ are lost: they were held by ", line), (
            line
        )
        assert all(name in line for name in names), line
        assert "on_loss='checkpoint'" in line
        assert ("nothing was protected" if protection == "none" else "was the newest that outlives nodes") in line
    (ended,) = job.events("ended")
    assert not ended["succeeded"]
