"""A job on hosts that return: killed nodes are restarted, as a cluster's manager does; and the verdict."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from everstep.agents.node.preload import NAME as PRELOADED
from tests.jobs import Result, assert_same_run, reference, slowly
from tests.jobs.hosts import HostJob, Hosts

from .processes import named, those

_CHANGES = ("started", "planned", "joined", "node_lost", "worker_died")


class Cluster(HostJob):
    """The job of `HostJob`, on all hosts, with a protected version after every step."""

    def __init__(
        self,
        hosts: Hosts,
        out: Path,
        *,
        steps: int,
        stages: int | str = 1,
        flags: Sequence[str] = (),
        least: int = 0,
        **config: Any,
    ) -> None:
        """`least`: the minimum number of nodes with which the job continues when others leave; 0: all."""
        count = len(hosts.hosts)
        super().__init__(hosts, out, nnodes=f"{least or count}:{count}", steps=steps, stages=stages, **config)
        self.steps, self.config = steps, config
        self.flags = ["--es-snapshot-every=1", f"--log-dir={out}/logs", *flags]
        self.workers = 1
        self.faults: Sequence[Any] = ()
        self.away: set[int] = set()  # hosts that are down and stay down

    def start(self, *hosts: int, faults: Sequence[Any] = (), workers: int = 1) -> None:
        """Start the nodes of these hosts, or of all; with the same faults each time they are restarted."""
        self.faults, self.workers = faults, workers
        self.launch(*(hosts or self.hosts.hosts), flags=self.flags, faults=faults, workers=workers)

    def restart(self) -> list[int]:
        """Restart killed nodes that are not away; returns their hosts."""
        killed = [
            host
            for host, launcher in self.hosts.launchers.items()
            if launcher.poll() == -signal.SIGKILL and host not in self.away
        ]
        if killed:
            self.launch(*killed, flags=self.flags, faults=self.faults, workers=self.workers)
        return killed

    def within(self, timeout_s: float, condition: Callable[[], Any]) -> bool:
        """Whether a condition becomes true in time, or before the job ends; killed nodes are restarted meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.events("ended"):
                return bool(condition())
            self.restart()
            time.sleep(0.02)
        return True

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> None:
        """Wait for a condition that has to become true before the job ends."""
        happened = self.within(timeout_s, condition)
        assert happened, f"not within {timeout_s:g} s, at step {self.committed()}, {self.events('ended')}: {what}"

    def see_to_the_end(self, timeout_s: float) -> None:
        """Restart killed nodes until the job has ended."""
        self.until(lambda: self.events("ended"), timeout_s, "the job has ended")

    def see_all_lives(self, timeout_s: float) -> None:
        """To the end, but slowly while a node is away, so that steps are left for faults in its next life."""
        deadline = time.monotonic() + timeout_s
        while not self.events("ended"):
            self.until(
                lambda: self.events("ended") or not self.complete(), deadline - time.monotonic(), "the job has ended"
            )
            with self.slowly():
                self.within(deadline - time.monotonic(), self.complete)

    def nodes(self) -> dict[str, str]:
        """Address -> node, of the nodes that are in the job now."""
        found: dict[str, str] = {}
        for event in self.events():
            if event["event"] == "node_joined":
                found[event["host"]] = event["node"]
            elif event["event"] in ("node_lost", "node_left") and found.get(event["host"]) == event["node"]:
                del found[event["host"]]
        return found

    def complete(self) -> bool:
        """Whether every host has a node in the job."""
        members = self.nodes()
        return all(self.hosts.address(host) in members for host in self.hosts.hosts)

    def protected(self) -> bool:
        """Whether a version is protected that was made since the last change of the membership."""
        since = self._since_changes()
        return bool(since) and since[-1]["protected"] > since[0]["step"]

    def whole(self) -> bool:
        """Whether all hosts train, and a version is protected that was made since they do."""
        since = self._since_changes()  # read once: the job runs meanwhile
        if not since or since[-1]["protected"] <= since[0]["step"]:
            return False
        stages = re.findall(r"ranks ([\d,]+)", since[-1]["layout"])
        ranks = {rank for stage in stages for rank in stage.split(",")}
        return len(ranks) == len(self.hosts.hosts) * self.workers

    def _since_changes(self) -> list[dict[str, Any]]:
        events = self.events()
        last = max((i for i, event in enumerate(events) if event["event"] in _CHANGES), default=-1)
        return [event for event in events[last + 1 :] if event["event"] == "committed"]

    def slowly(self) -> contextlib.AbstractContextManager[None]:
        """Steps take longer meanwhile, so that some are left for what the test does."""
        return slowly(self.out)

    def await_whole(self, timeout_s: float = 90.0) -> None:
        """Wait until the next loss may be injected."""
        with self.slowly():
            self.until(self.whole, timeout_s, "the job is whole")

    def advance(self, steps: int) -> None:
        """Wait for some more committed steps."""
        goal = self.committed() + steps
        self.until(lambda: self.committed() >= goal, 60, f"step {goal} is committed")

    def workers_of(self, *hosts: int) -> dict[int, psutil.Process]:
        """The worker processes on these hosts, by process id."""
        found = those(self.hosts.pids(*hosts), lambda process: bool(named([process.ppid()], PRELOADED)))
        return {process.pid: process for process in found}

    def check(self) -> Result:
        """The verdict: the same losses, the same ledger, the same state; and steps computed again came out the same."""
        (ended,) = self.events("ended")
        assert ended["succeeded"], ended
        members = self.nodes()
        up = [host for host in self.hosts.launchers if self.hosts.address(host) in members]
        result = self.result(*up)
        assert_same_run(result, reference(self.steps, **self.config))
        assert all(event["same"] for event in result.named("committed_again"))
        return result
