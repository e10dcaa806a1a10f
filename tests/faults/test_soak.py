"""Two hundred random kills in one job, several or all at once among them; a hundred disturbances of all kinds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.jobs import assert_same_run, reference, run_job
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import COORDINATOR, Hosts

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join")
KILLS = 200


def random_faults(workers: int, kills: int, seed: int) -> list[dict[str, object]]:
    """Every incarnation dies in a random phase, some steps after the death of the last one."""
    rng = random.Random(seed)
    faults: list[dict[str, object]] = []
    for rank in range(workers):
        step = 1
        for incarnation in range(kills // workers):
            phase = rng.choice(PHASES if incarnation else PHASES[:5])
            faults.append(
                {"rank": rank, "incarnation": incarnation, "phase": phase, "step": step if phase != "join" else 0}
            )
            step += rng.choice((1, 2, 3, 4))
    return faults


@pytest.mark.soak
def test_two_hundred_random_kills() -> None:
    workers, steps = 4, 160
    faults = random_faults(workers, KILLS + 20, seed=3)
    undisturbed = run_job(nproc=1, steps=steps, timeout_s=60)
    result = run_job(nproc=workers, stages=2, steps=steps, faults=faults, timeout_s=220)
    assert_same_run(result, undisturbed)
    deaths = result.named("worker_died")
    together = sum(len(e["ranks"]) > 1 for e in result.named("recovered"))
    print(f"{len(deaths)} kills in {len(result.named('recovered'))} recoveries, {together} of them of several workers")
    assert len(deaths) >= KILLS


def test_all_workers_at_once() -> None:
    """No member is left: the replacements start from what the keepers hold."""
    faults = [{"rank": rank, "phase": "compute", "step": 3} for rank in range(2)]
    faults += [{"rank": rank, "phase": "update", "step": 6, "incarnation": 1} for rank in range(2)]
    result = run_job(nproc=2, stages=2, steps=8, faults=faults)
    assert_same_run(result, reference(8))
    assert len(result.named("worker_died")) >= 4


def test_one_worker_alone() -> None:
    faults = [{"rank": 0, "phase": phase, "step": 2 + i, "incarnation": i} for i, phase in enumerate(PHASES[:5])]
    result = run_job(nproc=1, steps=8, faults=faults)
    assert_same_run(result, reference(8))


NODES = {"node killed": 4, "node stopped": 4, "node cut off": 4}
OTHERS = {"worker killed": 52, "worker stopped": 8, "worker slowed": 12, "relayout": 16}
SLOWED_S = 1.5
SLOWED_PAUSES = 30


class Soak:
    """Disturbs a job: one node at a time is lost, and workers, their speeds and the layout in between and meanwhile."""

    def __init__(self, job: Cluster, seed: int) -> None:
        self.job, self.hosts = job, job.hosts
        self.rng = random.Random(seed)
        self.struck: Counter[str] = Counter()

    def run(self) -> None:
        nodes, others = self._shuffled(NODES), self._shuffled(OTHERS)
        share = -(-len(others) // len(nodes))
        while nodes:
            self.job.await_whole()
            self.job.advance(self.rng.randrange(1, 4))
            host, kind = self.rng.choice(self.hosts.hosts), nodes.pop()
            self._strike_node(kind, host)
            for _ in range(min(share, len(others))):
                self._disturb(others.pop(), host)
                self.job.advance(self.rng.randrange(1, 4))
            if kind == "node cut off":
                self.hosts.heal(host)

    def _shuffled(self, kinds: dict[str, int]) -> list[str]:
        found = [kind for kind, count in kinds.items() for _ in range(count)]
        self.rng.shuffle(found)
        return found

    def _strike_node(self, kind: str, host: int) -> None:
        """The host is lost; a stopped one continues as soon as it has been declared lost."""
        node = self.job.nodes()[self.hosts.address(host)]
        {"node killed": self.hosts.kill, "node stopped": self.hosts.stop, "node cut off": self.hosts.partition}[kind](
            host
        )
        self.job.until(lambda: any(e["node"] == node for e in self.job.events("node_lost")), 30, f"{kind} is noticed")
        if kind == "node stopped":
            self.hosts.cont(host)
        self.struck[kind] += 1

    def _disturb(self, kind: str, lost: int) -> None:
        if kind == "relayout":
            self._relayout()
        elif kind == "worker slowed":
            self._slow_worker(lost)
        else:
            self._strike_worker(kind, lost)

    def _worker(self, lost: int) -> int:
        """The process of a worker of a live host."""
        others = [host for host in self.hosts.hosts if host != lost]
        found: dict[int, object] = {}
        self.job.until(lambda: found.update(self.job.workers_of(*others)) or found, 30, "there is a worker")
        return self.rng.choice(sorted(found))

    def _strike_worker(self, kind: str, lost: int) -> None:
        """A stopped one counts as hung, unless it was in the user's code."""
        pid, died = self._worker(lost), len(self.job.events("worker_died"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP)
            self.struck[kind] += 1
            if kind == "worker stopped" and not self.job.within(6, lambda: len(self.job.events("worker_died")) > died):
                self.struck["of these not fenced"] += 1
                os.kill(pid, signal.SIGCONT)

    def _slow_worker(self, lost: int) -> None:
        """It has half of its processor for a while."""
        pid = self._worker(lost)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(SLOWED_PAUSES):
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    os.kill(pid, number)
                    time.sleep(SLOWED_S / SLOWED_PAUSES / 2)
        self.struck["worker slowed"] += 1

    def _relayout(self) -> None:
        """To another number of stages; what follows may come before it, in it, or behind it."""
        with self.job.slowly():
            self.job.until(self._order, 60, "a relayout is taken")
        self.struck["relayout"] += 1

    def _order(self) -> bool:
        """Whether the coordinator takes it: there may be too few workers, or a recovery under way."""
        stages = str(self.rng.choice((1, 2, 3)))
        arguments = ["relayout", self.hosts.endpoint, "--stages", stages]
        process = self.hosts.everstep(COORDINATOR, *arguments)
        process.communicate(timeout=60)
        return process.returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_hundred_faults_slow_workers_and_relayouts(tmp_path: Path) -> None:
    """Workers and nodes are killed, stopped and unplugged in training; the bytes are those of a quiet run."""
    with Hosts(4) as hosts:
        hosts.require("partition")
        flags = ["--es-hang-timeout=1"]
        job = Cluster(hosts, tmp_path, steps=800, flags=flags, global_batch_size=8)
        job.start()
        soak = Soak(job, seed=1)
        soak.run()
        job.await_whole()
        print(f"{dict(soak.struck)}, at step {job.committed()}")
        job.see_to_the_end(240)
        result = job.check()
    lost, died = result.named("node_lost"), result.named("worker_died")
    again, changed = result.named("committed_again"), result.named("rebalanced")
    joined = result.named("joined")
    print(f"{len(lost)} nodes and {len(died)} workers lost, {len(joined)} joined, {len(again)} steps computed again")
    print(f"{len(changed)} new layouts without a loss, {len(result.named('relayout_prepared'))} of them ordered")
    assert (
        sum(soak.struck[kind] for kind in (*NODES, *OTHERS)) >= 98
    )  # the process of a worker may have ended by itself
    assert changed
