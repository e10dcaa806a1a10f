"""A real Prometheus that scrapes a real job of two nodes while faults are injected, for the tests and for plots."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.prometheus.generate import Speed, rules
from everstep.comms.base.process import die_with_parent
from everstep.elastic.contract.faults import COORDINATOR
from tests.jobs import JOBS, launch, slowly, wait_until
from tests.jobs.ports import free_ports
from tests.jobs.processes import disk_full, named

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
CONFIGURATIONS = Path(__file__).parents[2] / "deploy" / "prometheus"
FAST = Speed(
    evaluate="500ms",
    rate="5s",
    goodput_window="30s",
    counting_window="30s",
    soon="0s",
    later="0s",
    lost_after="0s",
    stalled_steps=2,
    stalled_least_s=0.2,
    goodput=0.999,
    exposure_s=0.01,
    checkpoint_s=0.5,
    failures=2,
    memory=0.0001,
)
STEPS = 100_000  # more than there is time for
# Far behind the first kill, and awaited before the second: a damaged frame to a rank that is killed is not seen.
FAULTS = [{"rank": 2, "phase": "reduce", "step": 60, "kind": "flip-frame"}]


class Prometheus:
    """A server of its own on a free port, with the checked-in rules at the speed of tests."""

    def __init__(self, folder: Path, config: str) -> None:
        assert PROMETHEUS is not None
        self.folder = folder
        (folder / "everstep.rules.yml").write_text(rules(FAST))
        (folder / "prometheus.yml").write_text(config)
        (self.port,) = free_ports(1)
        self.log = (folder / "prometheus.log").open("w")
        command = [
            PROMETHEUS,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent, start_new_session=True
        )

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        return False

    def value(self, expression: str) -> float | None:
        """The first value of an instant query."""
        found = self._get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def series(self, expression: str, start_s: float, end_s: float, step_s: float = 0.5) -> list[dict[str, Any]]:
        """A range query: [{"metric", "values"}]."""
        answer = self._get("query_range", query=expression, start=start_s, end=end_s, step=step_s)
        series: list[dict[str, Any]] = answer["result"]
        return series

    def fired(self) -> set[str]:
        """The names of all alerts that have fired so far."""
        found = self._get("query", query='count by (alertname) (max_over_time(ALERTS{alertstate="firing"}[10m]))')
        return {series["metric"]["alertname"] for series in found["result"]}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.log.close()


def configuration(targets: dict[str, list[str]]) -> str:
    """Of a Prometheus that scrapes often."""
    jobs = [
        {"job_name": name, "static_configs": [{"targets": where, "labels": {"run": "watched"}}]}
        for name, where in targets.items()
    ]
    every = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    return json.dumps({"global": every, "rule_files": ["everstep.rules.yml"], "scrape_configs": jobs})  # JSON is YAML


class WatchedJob:
    """Two nodes of two workers with checkpoints, metrics everywhere, and a Prometheus."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.out.mkdir()
        self.checkpoints = folder / "checkpoints"
        self.rendezvous, coordinator, *agents = free_ports(4)
        self.coordinator = f"127.0.0.1:{coordinator}"
        self.agents = [f"127.0.0.1:{port}" for port in agents]
        self.launchers: list[subprocess.Popen[str]] = []
        self.started_s = time.time()
        folder = folder / "prometheus"
        folder.mkdir()
        targets = {"everstep-coordinator": [self.coordinator], "everstep-agents": self.agents}
        self.prometheus = Prometheus(folder, configuration(targets))  # first: it takes some seconds to find its targets
        self._outputs: list[threading.Thread] = []

    def start(self) -> None:
        """Start the nodes, the one with the coordinator first."""
        arguments = [json.dumps({"out": str(self.out), "steps": STEPS, "stages": 1})]
        for agent in self.agents:
            flags = [
                *("--nnodes=2", "--nproc-per-node=2", f"--rdzv-endpoint=127.0.0.1:{self.rendezvous}"),
                *(f"--es-events={self.out}/events.jsonl", "--es-snapshot-every=1", "--es-keeper-memory=1GiB"),
                *(f"--es-checkpoint={self.checkpoints}", "--es-checkpoint-every=10"),
                *(
                    f"--log-dir={self.out}/logs",
                    f"--es-metrics={agent}",
                    f"--es-coordinator-metrics={self.coordinator}",
                ),
            ]
            faults = {"EVERSTEP_FAULTS": json.dumps(FAULTS)}
            self.launchers.append(launch(JOBS / "gpt_job.py", arguments, flags, faults, forked=True))
            wait_until(lambda: answers(self.coordinator), 30, "the first node has the coordinator")
        self._outputs = [threading.Thread(target=p.stdout.read, daemon=True) for p in self.launchers if p.stdout]
        for reader in self._outputs:
            reader.start()

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def await_steps(self, more: int, timeout_s: float = 60.0) -> None:
        """Until this many more steps are committed."""
        goal = len(self.events("committed")) + more
        self.until(lambda: len(self.events("committed")) >= goal, f"{goal} steps", timeout_s)

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
        """Wait for an event that has to occur while the job runs."""
        wait_until(lambda: condition() or self.events("ended"), timeout_s, what)
        assert not self.events("ended"), self.events("ended")

    def pid(self, rank: int) -> int:
        """Of the newest worker of a rank."""
        return int(max(self.out.glob(f"worker-{rank}-*.jsonl"), key=lambda p: p.stat().st_mtime).stem.split("-")[2])

    def kill_worker(self, rank: int) -> None:
        """And wait until all have recovered."""
        recovered = len(self.events("recovered"))
        os.kill(self.pid(rank), signal.SIGKILL)
        self.until(lambda: len(self.events("recovered")) > recovered, "the recovery")

    def slow_down(self, rank: int, seconds: float) -> None:
        """Let a worker run for only a fifth of the time."""
        pid, until = self.pid(rank), time.monotonic() + seconds
        while time.monotonic() < until:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.04)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)

    def spoil_checkpoints(self) -> None:
        """Put a file in the place of their folder: no checkpoint can be written."""
        self.checkpoints.rename(self.out / "saved")
        self.checkpoints.write_text("")

    def hold_up(self, seconds: float) -> None:
        """Fill the coordinator's disk for a while. Training continues, and decisions follow afterwards."""
        (coordinator,) = named(psutil.Process(self.launchers[0].pid).children(), COORDINATOR)
        with disk_full(coordinator):
            committed = len(self.events("committed"))
            time.sleep(seconds)
            assert len(self.events("committed")) <= committed + 1, "it did write"

    def kill_node(self) -> None:
        """The node without the coordinator."""
        os.killpg(self.launchers[1].pid, signal.SIGKILL)

    def history(self) -> None:
        """All faults from the start of the job to the loss of a node: one for every alert."""
        scraped = "everstep_steps_total > 10 and on () everstep_worker_steps_total > 5"
        self.until(lambda: self.prometheus.ready() and self.prometheus.value(scraped), "scrapes of a job that trains")
        self.kill_worker(3)
        self.await_steps(5)
        with slowly(self.out):
            self.await_steps(6)
        self.await_steps(2)
        self.hold_up(2.5)
        self.await_steps(2)
        self.slow_down(1, 8.0)
        self.until(lambda: self.events("corruption"), "the damaged frame", timeout_s=60.0)
        self.await_steps(5)
        self.kill_worker(3)
        self.spoil_checkpoints()
        self.until(lambda: self.events("checkpoint_failed"), "a checkpoint that fails")
        self.await_steps(10)
        self.kill_node()
        self.until(lambda: self.prometheus.value('up{job="everstep-agents"} == 0') is not None, "a lost target")
        self.await_steps(10)

    def close(self) -> None:
        for launcher in self.launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        self.prometheus.close()
        for launcher, reader in zip(self.launchers, self._outputs, strict=False):
            reader.join(timeout=10)
            if launcher.stdout:
                launcher.stdout.close()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[WatchedJob]:
    """The job, started; killed at the end, and Prometheus with it."""
    job = WatchedJob(folder)
    try:
        job.start()
        yield job
    finally:
        job.close()


def answers(address: str) -> bool:
    """Whether a process listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
