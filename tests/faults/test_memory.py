"""Thirty recoveries leave memory, shared memory, descriptors and threads of every surviving process unchanged."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from everstep.agents.node.preload import NAME as PRELOADED
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import COORDINATOR, Hosts
from tests.jobs.processes import each, saying

KEEPER = "everstep.checkpointing.keeper.service"
WARM_UP, RECOVERIES = 10, 30


# Twenty recoveries lie between the measurements. One of these left behind in each would be 20 descriptors or threads,
# 80 MiB of rings (4 MiB each), some 20 MiB of segments (1 MiB), 20 MiB of copies of what a worker owns. What changes
# without a leak is which shards a worker owns, on how many connections a keeper is asked, and how many of its threads
# have allocated (each may get an arena of its own).
LIMITS = {"private_bytes": 12 << 20, "shared_bytes": 4 << 20, "descriptors": 12, "threads": 6}


@dataclass(frozen=True)
class Usage:
    """The resources of a process: its resident memory, mapped shared memory, descriptors, threads."""

    what: str
    private_bytes: int
    shared_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int, what: str) -> Usage:
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        mapped = [
            line.split()[0].split("-") for line in (process / "maps").read_text().splitlines() if "/memfd:" in line
        ]
        return cls(
            what,
            private_bytes=int(status["RssAnon"].split()[0]) * 1024,
            shared_bytes=sum(int(end, 16) - int(start, 16) for start, end in mapped),
            descriptors=len(os.listdir(process / "fd")),
            threads=int(status["Threads"]),
        )


def usages(job: Cluster) -> dict[int, Usage]:
    """All processes of the job, by process id."""
    found = {}
    for host in (*job.hosts.hosts, COORDINATOR):
        workers = job.workers_of(host)
        for process, command in each(job.hosts.pids(host), lambda process: [process.name(), *process.cmdline()]):
            pid = process.pid
            kinds = {KEEPER: "keeper", PRELOADED: "preloaded process", "coordinator": "coordinator", "run": "launcher"}
            kind = "worker" if pid in workers else next(kind for has, kind in kinds.items() if has in command)
            found[pid] = Usage.of(pid, f"{kind} of host {host}")
    return found


# Run on a keeper's host, with its process id: prints the keeper's report of what it holds.
HELD = """
import json, pathlib, psutil, sys
from everstep.checkpointing.access.client import KeeperClient
environment = pathlib.Path(f"/proc/{sys.argv[1]}/environ").read_text().split(chr(0))
(token,) = [item.partition("=")[2] for item in environment if item.startswith("EVERSTEP_TOKEN=")]
connections = psutil.Process(int(sys.argv[1])).net_connections("tcp")
(address,) = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
print(json.dumps(KeeperClient(f"{address.ip}:{address.port}", token).ask({"op": "held"})))
"""


def held(job: Cluster) -> list[dict[str, int]]:
    """What each host's keeper reports to hold."""
    answers = []
    for host in job.hosts.hosts:
        (keeper,) = saying(job.hosts.pids(host), KEEPER)
        process = job.hosts.run(host, sys.executable, "-c", HELD, str(keeper.pid))
        answers.append(json.loads(process.communicate(timeout=30)[0]))
    return answers


def recoveries(job: Cluster, count: int, rng: random.Random) -> None:
    """Workers die one after the other, all but one; and, once in ten times, the last host."""
    survivor = min(job.workers_of(0))

    def losses() -> int:
        return len(job.events("worker_died")) + len(job.events("node_lost"))

    for number in range(count):
        before = losses()
        if number % 10 == 5:
            job.hosts.kill(2)
            job.until(lambda lost=before: losses() > lost, 30, "the loss is noticed")
            job.await_whole()
        else:
            psutil.Process(rng.choice(sorted(set(job.workers_of(*job.hosts.hosts)) - {survivor}))).kill()
        job.until(
            lambda lost=before: losses() > lost and job.whole(), 90, f"recovery {number} is over, and all are back"
        )


@pytest.mark.soak
def test_thirty_recoveries_leave_nothing(tmp_path: Path) -> None:
    rng = random.Random(4)
    with Hosts(3, forked=False) as hosts:  # whose command lines say what they are, and whose memory is their own
        job = Cluster(hosts, tmp_path, steps=100_000, global_batch_size=12)
        job.start(workers=2)
        job.until(job.whole, 90, "all train")
        recoveries(job, WARM_UP, rng)
        before, held_before = usages(job), held(job)
        recoveries(job, RECOVERIES - WARM_UP, rng)
        after, held_after = usages(job), held(job)
    survivors = {usage.what: (usage, after[pid]) for pid, usage in before.items() if pid in after}
    for what, (old, new) in survivors.items():
        changes = {name: (getattr(old, name), getattr(new, name)) for name in LIMITS}
        print(f"{what:30}", ", ".join(f"{name} {first:,} -> {last:,}" for name, (first, last) in changes.items()))
        grown = {name: last - first for name, (first, last) in changes.items() if last - first > LIMITS[name]}
        assert not grown, (what, changes)
    kinds = [f"{kind} of host {host}" for host in (0, 1) for kind in ("launcher", "preloaded process", "keeper")]
    assert survivors.keys() == {*kinds, "worker of host 0", f"coordinator of host {COORDINATOR}"}

    needed = sum(job.events("protection")[-1]["bytes"].values())  # the coordinator's estimate of what all this takes
    for answers in (held_before, held_after):
        total = sum(answer["bytes"] + answer["parity_bytes"] for answer in answers)
        print(f"keepers hold {total:,} bytes of {needed:,}, in {[answer['segments'] for answer in answers]} segments")
        # Former owners hold shards that moved, too, until a version of the new owner is protected.
        assert total < 2 * needed
        assert max(answer["segments"] for answer in answers) <= 12
    assert not job.events("unprotected"), "training waited for protection in vain"
