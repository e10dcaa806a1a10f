"""The node agent: starts the keeper, the preloaded process and the workers, watches them, and obeys the coordinator.

One thread and one selector; the gRPC stream delivers into a queue. What is decided is decided by the coordinator; what
is here is fork, watch, fence, pass on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..comms import everstep_pb2 as pb
from ..comms.rpc import AgentStream
from ..elastic.progress import Phase
from ..elastic.protocol.events import WorkerId
from ..elastic.protocol.liveness import FLOOR_S
from ..elastic.settings import WorkerContext
from .logs import WorkerLogs
from .workers import WorkerProcess

HEARTBEAT_S = 0.5
WATCH_S = 0.05
END_GRACE_S = 3.0


class AgentError(Exception):
    """What a user must know when a node agent cannot do its work."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """What the launcher tells its node agent."""

    job: str
    node: str
    host: str
    slots: int
    order: int
    program: Mapping[str, Any]
    logs: WorkerLogs
    environment: Mapping[str, str]
    preload: tuple[str, ...] = ()
    role: str = "default"
    max_restarts: int = 0
    hang_timeout_s: float = FLOOR_S
    shared_memory: bool = True
    host_id: str = field(default_factory=lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip())


@dataclass(frozen=True)
class Outcome:
    """How the job ended."""

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1


class NodeAgent:
    """Runs one node of a job until it ends."""

    def __init__(self, config: NodeConfig, stream: AgentStream, on_started: Callable[[], None] | None = None) -> None:
        self.config = config
        self.stream = stream
        self.on_started = on_started or (lambda: None)
        self.workers: dict[WorkerId, WorkerProcess] = {}
        self.token = ""
        self.outcome: Outcome | None = None
        self._keeper_name = f"everstep-{uuid.uuid4().hex}"
        self._keeper: subprocess.Popen[str] | None = None
        self._keeper_port = 0
        self._preloaded: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._preload_ready = False
        self._waiting: list[tuple[WorkerProcess, pb.StartWorkers]] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(stream.wake_fd, selectors.EVENT_READ, self._stream_woke)
        self._heartbeat_s = 0.0
        self._ending_s = 0.0

    # ------------------------------------------------------------ life

    def run(self) -> Outcome:
        """Serve until the job ends, then leave nothing behind."""
        try:
            self._start_preloaded()
            self.stream.send(hello=pb.Hello(job=self.config.job, node=self.config.node, protocol=1))
            while not self._done():
                for key, _ in self._selector.select(WATCH_S):
                    key.data()
                self._watch()
            assert self.outcome is not None
            return self.outcome
        finally:
            self._close()

    def _done(self) -> bool:
        if self.outcome is None:
            return False
        if not self.workers:
            return True
        now = time.monotonic()
        if not self._ending_s:
            self._ending_s = now
        if now - self._ending_s > END_GRACE_S:
            for worker in self.workers.values():
                worker.kill("the job is over")
        return False

    def _close(self) -> None:
        for worker in self.workers.values():
            worker.kill("the agent ends")
            worker.close()
        for process in (self._preloaded, self._keeper):
            if process is not None:
                process.kill()
                process.wait()
        if self._channel is not None:
            self._channel.close()
        self.config.logs.close()
        self.stream.close()
        self._selector.close()

    def stop(self, why: str) -> None:
        """Ask the coordinator to end the job; safe in a signal handler."""
        self.stream.send(stop=pb.StopRequest(why=why))

    # ------------------------------------------------------------ the coordinator's orders

    def _stream_woke(self) -> None:
        for message in self.stream.received():
            if isinstance(message, str):
                self._stream_broke(message)
            else:
                body = message.WhichOneof("body")
                getattr(self, f"_on_{body}")(getattr(message, body))

    def _stream_broke(self, why: str) -> None:
        if self.outcome is None:
            self.outcome = Outcome(False, f"the coordinator is gone: {why}")
            for worker in self.workers.values():
                worker.kill("the coordinator is gone")

    def _on_welcome(self, message: pb.Welcome) -> None:
        self.token = message.token
        self._start_keeper()
        keeper = f"{self.config.host}:{self._keeper_port}"
        config = self.config
        ready = pb.NodeReady(host=config.host, slots=config.slots, keeper=keeper, order=config.order)
        self.stream.send(ready=ready)

    def _on_refused(self, message: pb.Refused) -> None:
        self.outcome = Outcome(False, f"the coordinator refused node {self.config.node}: {message.why}")

    def _on_start(self, message: pb.StartWorkers) -> None:
        self.on_started()
        for item in message.workers:
            worker = WorkerProcess.prepare(WorkerId(item.rank, item.incarnation))
            self.workers[worker.id] = worker
            if self._preload_ready:
                self._fork(worker, message)
            else:
                self._waiting.append((worker, message))

    def _on_kill(self, message: pb.KillWorkers) -> None:
        for item in message.workers:
            worker = self.workers.get(WorkerId(item.rank, item.incarnation))
            if worker is not None:
                worker.silent = True
                worker.kill("the job restarts")

    def _on_to_worker(self, message: pb.ToWorker) -> None:
        worker = self.workers.get(WorkerId(message.worker.rank, message.worker.incarnation))
        if worker is not None:
            worker.send(message.json.encode())

    def _on_end(self, message: pb.EndJob) -> None:
        self.outcome = Outcome(message.succeeded, message.why, message.detail, message.rank)
        for worker in self.workers.values():
            worker.send(b'{"kind":"end"}')
            if not message.succeeded:
                worker.terminate()

    # ------------------------------------------------------------ processes

    def _start_keeper(self) -> None:
        command = [sys.executable, "-m", "everstep.checkpointing.keeper"]
        command += ["--name", self._keeper_name, "--host", self.config.host, "--port", str(self._keeper_port)]
        environment = {**os.environ, "EVERSTEP_TOKEN": self.token}
        self._keeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        if not line:
            raise AgentError(f"the snapshot keeper of node {self.config.node} did not start on {self.config.host}")
        self._keeper_port = int(line)

    def _start_preloaded(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "everstep.agents.preload", str(theirs.fileno()), *self.config.preload]
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "OMP_NUM_THREADS": "1"}
        self._preloaded = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        ours.setblocking(False)
        self._channel, self._preload_ready = ours, False
        self._selector.register(ours, selectors.EVENT_READ, self._preloaded_spoke)

    def _preloaded_spoke(self) -> None:
        assert self._channel is not None
        try:
            data = self._channel.recv(1 << 16)
        except BlockingIOError:
            return  # read already, on the way to something else
        if not data:
            self._preloaded_died()
            return
        message = json.loads(data)
        if message["kind"] == "ready":
            self._preload_ready = True
            waiting, self._waiting = self._waiting, []
            for worker, start in waiting:
                self._fork(worker, start)
        elif message["kind"] == "forked":
            self._forked(WorkerId(message["rank"], message["incarnation"]), message["pid"])
        else:
            for worker in self.workers.values():
                if worker.pid == message["pid"]:
                    worker.status = message["status"]

    def _preloaded_died(self) -> None:
        assert self._channel is not None
        assert self._preloaded is not None
        self._selector.unregister(self._channel)
        self._channel.close()
        status = self._preloaded.wait()
        if not self._preload_ready:
            raise AgentError(f"the preloaded process ended with status {status} before it could fork a worker")
        self._start_preloaded()

    def _fork(self, worker: WorkerProcess, start: pb.StartWorkers) -> None:
        local_rank = self._local_rank(worker.id, start)
        environment, stdout, stderr = self._environment(worker, start, local_rank)
        fds = [worker.theirs.fileno(), worker.page_fd]
        request = {
            "rank": worker.id.rank,
            "incarnation": worker.id.incarnation,
            "environment": environment,
            "program": self._program(local_rank),
            "stdout": stdout,
            "stderr": stderr,
            "fds": [_CONTROL_FD, _PROGRESS_FD],
        }
        assert self._channel is not None
        socket.send_fds(self._channel, [json.dumps(request).encode()], fds)

    def _program(self, local_rank: int) -> dict[str, Any]:
        program = dict(self.config.program)
        program["arguments"] = [a.replace("${local_rank}", str(local_rank)) for a in program["arguments"]]
        return program

    def _local_rank(self, worker: WorkerId, start: pb.StartWorkers) -> int:
        if len(start.workers) == self.config.slots:
            self._first_rank = start.workers[0].rank
        return worker.rank - self._first_rank

    def _environment(
        self, worker: WorkerProcess, start: pb.StartWorkers, local_rank: int
    ) -> tuple[dict[str, str], str, str]:
        config = self.config
        environment = {
            **config.environment,
            "RANK": str(worker.id.rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(start.world_size),
            "LOCAL_WORLD_SIZE": str(config.slots),
            "GROUP_RANK": str(start.group_rank),
            "GROUP_WORLD_SIZE": str(start.group_world_size),
            "ROLE_RANK": str(worker.id.rank),
            "ROLE_WORLD_SIZE": str(start.world_size),
            "ROLE_NAME": config.role,
            "MASTER_ADDR": start.master_addr,
            "MASTER_PORT": str(start.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(start.restart_count),
            "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
            "TORCHELASTIC_RUN_ID": config.job,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": config.environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        context = WorkerContext(
            rank=worker.id.rank,
            incarnation=worker.id.incarnation,
            world_size=start.world_size,
            host=config.host,
            host_id=config.host_id,
            token=self.token,
            control_fd=_CONTROL_FD,
            progress_fd=_PROGRESS_FD,
            keeper_name=self._keeper_name,
            shared_memory=config.shared_memory,
        )
        environment.update(context.to_environment())
        stdout, stderr, error_file = config.logs.paths(local_rank, environment)
        environment["TORCHELASTIC_ERROR_FILE"] = error_file
        return environment, stdout, stderr

    def _forked(self, worker_id: WorkerId, pid: int) -> None:
        worker = self.workers[worker_id]
        worker.forked(pid)
        self._selector.register(worker.channel, selectors.EVENT_READ, lambda: self._pass_on(worker))
        if worker.pidfd >= 0:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._ended(worker))
        else:
            self._ended(worker)

    def _pass_on(self, worker: WorkerProcess) -> None:
        if worker.id not in self.workers:
            return  # its end was noticed in the same turn
        lines = worker.receive()
        for line in lines:
            body = pb.FromWorker(worker=_proto(worker.id), json=line.decode())
            self.stream.send(from_worker=body)
        if not lines:
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.channel)  # it has closed its end; the pidfd tells the rest

    def _ended(self, worker: WorkerProcess) -> None:
        """A worker process is gone: say so at once, with what it was doing."""
        worker.ended_s = time.monotonic()
        if worker.pidfd >= 0:
            self._selector.unregister(worker.pidfd)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        self._pass_last_words(worker)
        while worker.status is None and self._channel is not None:
            readable, _, _ = select.select([self._channel], [], [], 0.05)
            if not readable:
                break
            self._preloaded_spoke()
        reading = worker.reading()
        del self.workers[worker.id]
        if not worker.silent and self.outcome is None:
            died = pb.WorkerDied(
                worker=_proto(worker.id),
                cause=worker.cause(),
                clean=worker.status == 0,
                step=reading.step,
                phase=Phase(reading.phase).name.lower(),
                finished_micro_batches=reading.finished_micro_batches,
                detected_at_s=worker.ended_s,
                killed_at_s=reading.fault_ns / 1e9,
            )
            self.stream.send(died=died)
        worker.close()

    def _pass_last_words(self, worker: WorkerProcess) -> None:
        for line in worker.receive():
            self.stream.send(from_worker=pb.FromWorker(worker=_proto(worker.id), json=line.decode()))

    # ------------------------------------------------------------ watching

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._heartbeat_s >= HEARTBEAT_S and self.token:
            self._heartbeat_s = now
            self.stream.send(heartbeat=pb.Heartbeat())
        if self._keeper is not None and self._keeper.poll() is not None and self.outcome is None:
            self._start_keeper()  # on the same port and name: workers hand it their segments again
        for worker in self.workers.values():
            if worker.pid and worker.check(now, self.config.hang_timeout_s):
                stood = now - worker.pulse.changed_s
                worker.kill(f"hung: no progress for {stood:.1f} s in {Phase(worker.reading().phase).name.lower()}")


_CONTROL_FD, _PROGRESS_FD = 240, 241


def _proto(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
