"""How each measured system is started, supervised and stopped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from processes import PEERS, start, stop, wait_until_file
from workload import Job


@dataclass(kw_only=True)
class System:
    """A running job. `tick` is called every few milliseconds while it runs."""

    job: Job
    patience_s: float = 0.0  # what `stop` grants between SIGTERM and SIGKILL

    def __post_init__(self) -> None:
        self.folder = Path(self.job.folder)
        self.log = self.folder / "log"
        self.children: list[subprocess.Popen[bytes]] = []
        self.path = self.job.write()

    def start(self) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        """Supervise the job. Raises RuntimeError when it has ended too early."""
        for child in self.children:
            if child.poll() not in (None, 0):
                raise RuntimeError(f"ended with {child.returncode}: {self.tail()}")

    def finished(self) -> bool:
        return all(child.poll() == 0 for child in self.children)

    def stop(self) -> None:
        for child in self.children:
            stop(child, patience_s=self.patience_s)

    def tail(self, size_bytes: int = 1500) -> str:
        return self.log.read_bytes()[-size_bytes:].decode(errors="replace") if self.log.exists() else ""

    @classmethod
    def unavailable(cls) -> str | None:
        """The reason why this system cannot be measured here; empty if it can."""
        return None

    def events(self) -> list[dict[str, Any]]:
        """The system's own event log, if it has one."""
        return []


class Torchrun(System):
    """One script under `torch.distributed.run`, which restarts all workers when one dies."""

    script = "ddp_worker.py"

    def start(self) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc-per-node={self.job.workers}"]
        command = [*launch, "--max-restarts=100000", str(PEERS / self.script), str(self.path)]
        # As shipped in torch 2.13, a restarted worker can meet keys of the dead one in the shared rendezvous store.
        self.children = [start(command, self.log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")]


class Pipelining(Torchrun):
    """`torch.distributed.pipelining`, under torchrun."""

    script = "pipelining_worker.py"


class Torchft(System):
    """A lighthouse and one replica group per worker; a dead replica is restarted at once."""

    @classmethod
    def unavailable(cls) -> str | None:
        if importlib.util.find_spec("torchft") is None:
            return "torchft is not installed (pip install torchft==0.2.0)"
        return None

    def start(self) -> None:
        script = str(PEERS / "torchft_worker.py")
        self.script = script
        self.lighthouse = start([script, str(self.path)], self.folder / "lighthouse.log")
        self.children.append(self.lighthouse)
        wait_until_file(self.folder / "lighthouse", timeout_s=60)
        self.replicas = [self._replica(rank) for rank in range(self.job.workers)]
        self.deaths = 0

    def _replica(self, rank: int) -> subprocess.Popen[bytes]:
        child = start([self.script, str(self.path)], self.log, REPLICA=str(rank))
        self.children.append(child)
        return child

    def tick(self) -> None:
        self._open_gate()
        for rank, child in enumerate(self.replicas):
            if child.poll() not in (None, 0):
                self.deaths += 1
                self.replicas[rank] = self._replica(rank)
        if self.lighthouse.poll() is not None:
            raise RuntimeError("the lighthouse has ended")

    def _open_gate(self) -> None:
        """Let the first replicas start together, so that all take part in the first step."""
        gate = self.folder / "go"
        if not gate.exists() and len(list(self.folder.glob("stamps-*"))) >= self.job.workers:
            time.sleep(1.0)
            gate.touch()

    def finished(self) -> bool:
        return all(child.poll() == 0 for child in self.replicas)


class Everstep(System):
    """`everstep run`."""

    @classmethod
    def unavailable(cls) -> str | None:
        if importlib.util.find_spec("everstep.cli") is None:
            return "this checkout has no everstep.cli"
        return None

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    def start(self) -> None:
        self.patience_s = 10.0
        flags = ["--standalone", f"--nproc-per-node={self.job.workers}", "--es-events", str(self.events_path)]
        flags += self.job.option("flags", [])
        command = ["-m", "everstep", "run", *flags, str(PEERS / "everstep_worker.py"), str(self.path)]
        self.children = [start(command, self.log)]

    def events(self) -> list[dict[str, Any]]:
        if not self.events_path.exists():
            return []
        return [json.loads(line) for line in self.events_path.read_text().splitlines()]


class Protected(Everstep):
    """Two nodes of one worker each; every version outlives either of them."""

    protection = "parity"

    def start(self) -> None:
        self.patience_s = 10.0
        with socket.create_server(("127.0.0.1", 0)) as probe:
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = [f"--nnodes={self.job.workers}", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench"]
        flags += ["--rdzv-backend=c10d", f"--es-protection={self.protection}", "--es-snapshot-every=1"]
        command = ["-m", "everstep", "run", *flags, "--es-events", str(self.events_path)]
        script = [str(PEERS / "everstep_worker.py"), str(self.path)]
        self.children = [start([*command, *script], self.log) for _ in range(self.job.workers)]


class Replicated(Protected):
    """The same, protected by copies."""

    protection = "replicate"


class Replayed(Protected):
    """The same, protected by backups that run the same optimizer."""

    protection = "replay"


class Unprotected(Protected):
    """The same two nodes without protection: a lost node loses its shards."""

    protection = "none"


class EverstepNodes(Everstep):
    """A coordinator, and a node of one worker for each worker of the job; every version outlives a node."""

    def start(self) -> None:
        self.patience_s = 10.0
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        self.nnodes = f"--nnodes=1:{self.job.workers}"
        command = ["-m", "everstep", "coordinator", f"--bind={self.endpoint}", self.nnodes]
        store = [f"--es-store={self.folder / 'store.sqlite'}", f"--es-events={self.events_path}"]
        self.children = [start([*command, *store], self.log)]
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.stopped: set[int] = set()
        for number in range(self.job.workers):
            self._start_node(number)

    def _start_node(self, number: int) -> None:
        flags = ["--rdzv-backend=everstep", f"--rdzv-endpoint={self.endpoint}", "--rdzv-conf=is_host=false"]
        flags += [self.nnodes, "--nproc-per-node=1", f"--local-addr=127.0.0.{10 + number}", "--es-snapshot-every=1"]
        script = [str(PEERS / "everstep_worker.py"), str(self.path)]
        self.nodes[number] = start(["-m", "everstep", "run", *flags, *self.job.option("flags", []), *script], self.log)

    def _processes(self, number: int) -> list[psutil.Process]:
        launcher = psutil.Process(self.nodes[number].pid)
        return [launcher, *launcher.children(recursive=True)]

    def node_of(self, worker: int) -> int:
        """The node that runs this worker process."""
        parents = {process.pid for process in psutil.Process(worker).parents()}
        return next(number for number, launcher in self.nodes.items() if launcher.pid in parents)

    def signal(self, number: int, sent: signal.Signals) -> None:
        """Signal all processes of a node; for a stop, also those that they start meanwhile."""
        reached: set[int] = set()
        while new := [process for process in self._processes(number) if process.pid not in reached]:
            for process in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
                reached.add(process.pid)
            if sent == signal.SIGKILL:
                break
        self.stopped.add(number)

    def restart(self) -> None:
        """Restart the nodes that were stopped, were killed or have left."""
        for number, launcher in list(self.nodes.items()):
            if number in self.stopped or launcher.poll() is not None:
                stop(launcher, patience_s=0.0)
                self._start_node(number)
        self.stopped.clear()

    def stop(self) -> None:
        for launcher in self.nodes.values():
            stop(launcher, patience_s=0.0)
        super().stop()


def versions() -> dict[str, str | float | None]:
    """Versions of what was measured, and the machine."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    found: dict[str, str | float | None] = {name: version(name) for name in ("everstep", "torch", "torchft")}
    return {**found, "cpus": os.cpu_count(), "load_average_1min": round(os.getloadavg()[0], 2)}
