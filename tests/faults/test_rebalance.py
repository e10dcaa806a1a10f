"""Layers, micro-batches and ranks move to where they are computed fastest, while training continues: the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import slowly
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts

STEPS = 40


class Rebalancing(Cluster):
    """A job that looks for a faster layout soon."""

    def __init__(self, hosts: Hosts, out: Path, *, after_s: float = 0.3, least: int = 1, **config: Any) -> None:
        self._after_s = after_s
        super().__init__(hosts, out, steps=STEPS, least=least, **config)

    def start_coordinator(self) -> subprocess.Popen[str]:
        """With a store, so that it can be started again."""
        flags = [
            f"--es-events={self.out}/events.jsonl",
            f"--es-store={self.out}/store.sqlite",
            f"--es-rebalance-after={self._after_s}",
        ]
        self.coordinator = self.hosts.coordinator(self._nnodes, *flags)
        return self.coordinator

    def begin(self) -> None:
        """All nodes train, and one may be lost."""
        self.start()
        self.await_whole()

    def offer(self) -> None:
        """The last node is lost, and a faster layout for the others is ready."""
        self.lose(self.hosts.hosts[-1])
        self.until(lambda: self.events("rebalance_prepared"), 40, "a faster layout is ready")

    def lose(self, host: int) -> None:
        """For good."""
        self.away.add(host)
        self.hosts.kill(host)

    def rebalanced(self, times: int = 1) -> str:
        """The layout after so many rebalances."""
        self.until(lambda: len(self.events("rebalanced")) >= times, 40, f"{times} rebalances")
        return str(self.events("rebalanced")[times - 1]["layout"])


def most_layers(layout: str) -> float:
    """The most layers that a stage has for each of its ranks."""
    stages = re.findall(r"layers (\d+)-(\d+): ranks ([\d,]+)", layout)
    return max((int(stop) - int(start) + 1) / len(ranks.split(",")) for start, stop, ranks in stages)


def test_layers_move_after_a_loss(tmp_path: Path) -> None:
    """2 stages x 2 nodes: one is lost, and the other of its stage gets less to do. Then another node comes."""
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=3, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.lose(3)
            after = job.rebalanced()
            assert most_layers(after) < 4, f"a stage of 4 layers has lost one of two ranks: {after}"
            job.advance(3)
            job.away.clear()
            job.until(lambda: job.events("joined"), 40, "another node joins")
        job.see_to_the_end(60)
        job.check()


@pytest.mark.soak
@pytest.mark.parametrize("host", [0, 1, 2])
def test_a_rank_is_lost_while_layers_move(tmp_path: Path, host: int) -> None:
    """On either side of the move, once the plan has been offered."""
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=2, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.offer()
            victim = job.workers_of(host)
            os.kill(next(iter(victim)), signal.SIGKILL)
            job.rebalanced()
            job.advance(3)
        job.see_to_the_end(60)
        job.check()


@pytest.mark.soak
def test_the_coordinator_dies_while_layers_move(tmp_path: Path) -> None:
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=2, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.offer()
            job.coordinator.kill()
            job.coordinator.wait()
            job.start_coordinator()
            job.rebalanced()
            job.advance(3)
        job.see_to_the_end(60)
        job.check()
