"""Nodes that fall silent and return: partitioned, stopped, without power, on a bad cable; and the coordinator stopped.

Silence counts as a loss. A node that was declared lost stops its workers by itself, and returns as a new node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs.cluster import Cluster
from tests.jobs.hosts import COORDINATOR, Hosts

STEPS = 120
BAD_S = 10.0  # TCP waits 0.2 s and more for each lost packet, and a step sends dozens in sequence


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes that train."""
    with Hosts(3) as hosts:
        hosts.require("partition", "loss")
        cluster = Cluster(hosts, tmp_path, steps=STEPS, flags=["--es-coordinator-wait=1"])
        cluster.start()
        cluster.reaches(4)
        yield cluster


def is_declared_lost(job: Cluster, node: str) -> Callable[[], bool]:
    return lambda: any(event["node"] == node and "no heartbeat" in event["why"] for event in job.events("node_lost"))


def comes_back(job: Cluster, host: int, node: str) -> None:
    """As a new node, with the rank of the lost one; then nothing fails until the end."""
    (lost,) = [event for event in job.events("node_lost") if event["node"] == node]
    job.await_whole()
    address = job.hosts.address(host)
    assert job.nodes()[address] != node
    joined = [event["ranks"] for event in job.events("joined")]
    assert lost["ranks"] in joined, (lost, joined)
    job.see_to_the_end(60)


@pytest.mark.soak
def test_a_node_is_cut_off(job: Cluster) -> None:
    """It stops its workers while it cannot be reached, and joins again afterwards."""
    hosts, node = job.hosts, job.nodes()[job.hosts.address(1)]
    assert len(hosts.pids(1)) == 4  # launcher, preloaded process, keeper, worker
    hosts.partition(1)
    job.until(is_declared_lost(job, node), 30, "the node is declared lost")
    job.advance(3)
    with job.slowly():
        job.until(lambda: len(hosts.pids(1)) == 2, 30, "it has stopped its worker and its keeper")
    assert not job.workers_of(1)
    hosts.heal(1)
    comes_back(job, 1, node)
    result = job.check()
    assert len(result.named("node_lost")) == 1
    assert "this node counts as lost" in result.output


@pytest.mark.soak
def test_a_node_stands_still(job: Cluster) -> None:
    """Its sockets live; when it continues, it learns that it was declared lost."""
    hosts, node = job.hosts, job.nodes()[job.hosts.address(2)]
    hosts.stop(2)
    job.until(is_declared_lost(job, node), 30, "the node is declared lost")
    job.advance(3)
    hosts.cont(2)
    comes_back(job, 2, node)
    result = job.check()
    assert len(result.named("node_lost")) == 1
    assert "this node counts as lost" in result.output


@pytest.mark.soak
def test_a_power_cut(job: Cluster) -> None:
    hosts, node = job.hosts, job.nodes()[job.hosts.address(0)]
    job.away.add(0)
    hosts.power_off(0)
    job.until(is_declared_lost(job, node), 30, "the node is declared lost")
    job.advance(3)
    hosts.heal(0)
    job.away.clear()
    comes_back(job, 0, node)
    assert len(job.check().named("node_lost")) == 1


@pytest.mark.soak
def test_a_bad_cable(job: Cluster) -> None:
    """A fifth of all packets is lost for a while, which costs time; it may cause a false alarm, and nothing else."""
    hosts = job.hosts
    started_s, before = time.monotonic(), job.committed()
    hosts.degrade(1, loss=0.2)
    job.until(lambda: time.monotonic() - started_s > BAD_S, 2 * BAD_S, f"{BAD_S:g} s are over")
    alarms = [event["why"] for event in job.events("node_lost")]
    print(f"{job.committed() - before} steps in {BAD_S:g} s, alarms: {alarms}")
    hosts.heal(1)
    job.await_whole()
    job.see_to_the_end(60)
    result = job.check()
    lost = {event["host"] for event in result.named("node_lost")}
    assert lost <= {hosts.address(1)}


@pytest.mark.soak
def test_the_coordinator_stands_still(job: Cluster) -> None:
    """Training continues without it, and no node is declared lost because of its sleep."""
    hosts, started_s = job.hosts, time.monotonic()
    hosts.stop(COORDINATOR)
    job.until(lambda: time.monotonic() - started_s > 3, 10, "three seconds are over")
    hosts.cont(COORDINATOR)
    job.advance(3)
    hosts.kill(1)  # nodes that are lost afterwards are detected
    job.until(lambda: job.events("node_lost"), 30, "the killed node is lost")
    job.await_whole()
    job.see_to_the_end(60)
    assert [event["host"] for event in job.check().named("node_lost")] == [hosts.address(1)]
