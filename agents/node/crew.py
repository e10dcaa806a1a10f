"""Starts, watches and ends a node's worker processes and the preloaded process that forks them. Decides nothing.

What happens to them goes to the agent's machine as events; the machine's instructions are carried out here.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping

from everstep.comms.base.process import exit_status, runs_without_main_thread
from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.contract.progress import StepPhase
from everstep.elastic.contract.settings import WorkerContext
from everstep.elastic.protocol import agent_events as a
from everstep.elastic.protocol.events import WorkerId

from .cgroups import OutOfMemory
from .config import AgentError, NodeConfig
from .deaths import DeathWatch
from .environment import program_for, torch_environment, virtual_rank, worker_environment
from .failures import Failures
from .gatherer import Gatherer
from .orphans import ENDED, GRACE_S, Orphans
from .preloader import Preloader
from .workers import WorkerProcess

REST_S = 3.0  # how long other threads of a worker may outlive its main thread


class Crew:
    """The workers of one node. `happened` gets events, `said` the messages of workers."""

    def __init__(
        self,
        config: NodeConfig,
        selector: selectors.BaseSelector,
        preloader: Preloader,
        gatherer: Gatherer,
        happened: Callable[[a.Event], None],
        said: Callable[[WorkerId, bytes], None],
    ) -> None:
        self.workers: dict[WorkerId, WorkerProcess] = {}
        self.failures = Failures(config.role)
        self.memory = OutOfMemory()
        self._config = config
        self._selector = selector
        self._gatherer = gatherer
        self._happened = happened
        self._said = said
        self._preloader: Preloader | None = preloader
        self._imports = preloader.imports
        self._session = os.getsid(0)
        self._orphans = Orphans(self._is_ours)  # of workers whose preloaded process is dead
        self._bereft = False  # a preloaded process has died: orphans may be reparented to this process
        self._deaths = DeathWatch()
        self._selector.register(self._deaths, selectors.EVENT_READ, self._main_threads_ended)
        self._selector.register(preloader, selectors.EVENT_READ, self._preloader_spoke)

    def look(self, now: float) -> None:
        """Poll for what no descriptor signals."""
        for worker in self.workers.values():
            self._deaths.look(worker)
            if worker.main_ended_s and now - worker.main_ended_s > REST_S and _rest_runs(worker):
                self._happened(a.WorkerDefied(worker.id, "its main thread has ended, and other threads have not"))

    def sweep(self) -> None:
        """End the orphans of workers whose preloaded process is dead."""
        if self._bereft:
            self._orphans.sweep()

    def close(self) -> None:
        """End all processes and their orphans."""
        for worker in self.workers.values():
            worker.kill("the agent ends")
            worker.close()
        if self._preloader is not None:
            self._preloader.close()
            self._preloader = None
        self._orphans.end_all(time.monotonic() + 2 * GRACE_S)
        self._deaths.close()

    # ------------------------------------------------------------ the preloaded process

    def start_preloader(self) -> None:
        """Start a replacement for a preloaded process that died."""
        self._preloader = Preloader.start(self._imports)
        self._selector.register(self._preloader, selectors.EVENT_READ, self._preloader_spoke)

    def _preloader_spoke(self) -> None:
        assert self._preloader is not None
        answer = self._preloader.answer()
        if answer is None:
            self._preloader_died(self._preloader)
            return
        kind = answer.get("kind")
        if kind == "ready":
            self._happened(a.PreloaderReady())
        elif kind == "forked":
            self._forked(self.workers[WorkerId(answer["rank"], answer["incarnation"])], answer["pid"])
        elif kind == "failed":
            self._cannot_preload(answer["module"], answer["why"])
        elif kind == "left":
            print(ENDED.format(", ".join(answer["names"])), file=sys.stderr, flush=True)
        elif kind == "exited":
            for worker in self.workers.values():
                if worker.pid == answer["pid"]:
                    worker.status = answer["status"]

    def _cannot_preload(self, module: str, why: str) -> None:
        """Start another one without a module that was only found. Raises AgentError for one that the user named."""
        former = self._preloader
        if not module or former is None:
            raise AgentError(f"--es-preload: {why}")
        print(
            f"everstep: {module} is not imported before workers are forked: {why}; each worker imports it by itself",
            file=sys.stderr,
            flush=True,
        )
        self._selector.unregister(former)
        former.close()
        self._imports = tuple(item for item in self._imports if item.module != module)
        self.start_preloader()

    def _preloader_died(self, former: Preloader) -> None:
        self._preloader = None
        self._selector.unregister(former)
        status = former.close()
        if not former.ready:
            raise AgentError(f"the process that workers are forked from ended with status {status} before it was ready")
        self._bereft = True
        self._orphans.expect()
        self._happened(a.PreloaderLost())

    def _is_ours(self, pid: int) -> bool:
        """Whether this process made a child: the preloaded process, or a process in its own session.

        Orphans of workers are in other sessions, and are reparented here only if the preloaded process is dead.
        """
        if self._preloader is not None and pid == self._preloader.pid:
            return True
        try:
            return os.getsid(pid) == self._session
        except ProcessLookupError:
            return True

    # ------------------------------------------------------------ workers begin

    def prepare(self, worker_id: WorkerId, local_rank: int, order: pb.StartWorkers) -> None:
        """Make a worker's channel and progress page."""
        worker = WorkerProcess.prepare(worker_id, local_rank, order)
        self._deaths.prepare(worker)
        self.workers[worker.id] = worker
        self._gatherer.watch(worker.id, worker.page_fd, order.group_world_size)

    def drop(self, worker_id: WorkerId) -> None:
        """It is not forked after all."""
        self._gatherer.ended(worker_id)
        self.workers.pop(worker_id).close()

    def fork(self, worker_id: WorkerId, context: WorkerContext, ranks: Mapping[int, int]) -> None:
        """Request a worker from the preloaded process. `ranks`: local rank -> rank, of all workers of the node."""
        config, worker = self._config, self.workers[worker_id]
        torch = torch_environment(
            worker.order,
            rank=worker.id.rank,
            local_rank=worker.local_rank,
            slots=config.slots,
            role=config.role,
            max_restarts=config.max_restarts,
            job=config.job,
        )
        stdout, stderr, worker.error_file = config.logs.paths(worker.local_rank, torch, ranks)
        if config.virtual_local_rank:
            torch |= virtual_rank(config.environment, worker.local_rank)
        torch["TORCHELASTIC_ERROR_FILE"] = worker.error_file
        request = {
            "rank": worker.id.rank,
            "incarnation": worker.id.incarnation,
            "environment": worker_environment(config.environment, torch, context),
            "program": program_for(config.program, worker.local_rank),
            "stdout": stdout,
            "stderr": stderr,
            "numa": [config.numa_binding, worker.local_rank],
        }
        assert self._preloader is not None
        self._preloader.request(request, [worker.channel.theirs.fileno(), worker.page_fd])

    def _forked(self, worker: WorkerProcess, pid: int) -> None:
        worker.forked(pid)
        self.failures.recovered(worker.id.rank)
        self._happened(a.WorkerForked(worker.id))
        self._listen(worker)
        if worker.pidfd >= 0:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._ended(worker))
        else:
            self._ended(worker)

    # ------------------------------------------------------------ conversation

    def tell(self, worker_id: WorkerId, line: bytes) -> None:
        """Send a message to a worker, if it runs, without blocking."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.channel.send(line)
            if worker.pidfd >= 0:
                self._listen(worker)

    def tell_all(self, line: bytes) -> None:
        """Send a message to every running worker."""
        for worker in self.workers.values():
            if worker.pid:
                self.tell(worker.id, line)

    def _converse(self, worker: WorkerProcess) -> None:
        """A worker's channel is readable, or writable again."""
        if worker.id not in self.workers:
            return  # its end was noticed in the same turn
        worker.channel.flush()
        self._pass_lines(worker)
        self._listen(worker)

    def _listen(self, worker: WorkerProcess) -> None:
        """Register its channel for the events that can occur next."""
        channel = worker.channel
        if channel.broken:
            self._happened(a.WorkerDefied(worker.id, channel.broken))
        events = 0 if channel.closed else selectors.EVENT_READ  # then the pidfd reports the death
        events |= selectors.EVENT_WRITE if channel.waits_to_send else 0
        registered = self._selector.get_map().get(channel)
        if registered is None and events:
            self._selector.register(channel, events, lambda: self._converse(worker))
        elif registered is not None and not events:
            self._selector.unregister(channel)
        elif registered is not None and registered.events != events:
            self._selector.modify(channel, events, registered.data)

    def _pass_lines(self, worker: WorkerProcess) -> None:
        """Pass on a worker's messages."""
        lines = worker.channel.receive()
        if lines and not worker.elastic:  # an ordinary script never sends a message
            worker.elastic = True
            self._happened(a.WorkerSpoke(worker.id))
        for line in lines:
            self._said(worker.id, line)

    # ------------------------------------------------------------ workers end

    def _main_threads_ended(self) -> None:
        """Main threads of workers have ended. With a failure, the worker is lost before its process is gone.

        With status 0 nothing is urgent, and other threads may still run: the pidfd reports when they have ended too.
        """
        for end in self._deaths.ended():
            worker = self.workers.get(end.worker)
            if worker is None or worker.gone:
                continue  # its pidfd reports the rest
            worker.main_ended_s = end.at_s
            if end.status:
                worker.status, worker.ended_s = end.status, end.at_s
                self._pass_lines(worker)
                self._happened(a.MainThreadFailed(worker.id))

    def _ended(self, worker: WorkerProcess) -> None:
        """A worker process is gone."""
        if worker.pidfd >= 0:
            self._selector.unregister(worker.pidfd)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        self._pass_lines(worker)
        self._learn_status(worker)
        worker.ended_s = worker.ended_s or time.monotonic()
        self._happened(a.WorkerGone(worker.id))
        del self.workers[worker.id]
        self._gatherer.ended(worker.id)
        self._deaths.forget(worker.id)
        worker.close()

    def _learn_status(self, worker: WorkerProcess) -> None:
        """Find a dead worker's exit status without blocking on its parent, which may not be scheduled for long.

        The parent reports the status before it reaps the worker, so either its report or /proc has the status.
        """
        self._hear_preloader()
        if worker.status is None:
            worker.status = exit_status(worker.pid)
        if worker.status is None:
            self._hear_preloader()

    def _hear_preloader(self) -> None:
        while self._preloader is not None and self._preloader.has_spoken():
            self._preloader_spoke()

    def death(self, worker_id: WorkerId) -> pb.WorkerDied:
        """How a worker ended, and what it was doing."""
        worker = self.workers[worker_id]
        reading = worker.reading()
        if worker.status != 0:
            status = worker.status if worker.status is not None else -int(signal.SIGKILL)
            self.failures.add(worker.id.rank, worker.local_rank, worker.pid, status, worker.error_file)
        cause = worker.cause()
        if not worker.fenced and worker.status == -signal.SIGKILL and (killer := self.memory.explain()):
            cause = f"{cause} {killer}"
        return pb.WorkerDied(
            worker=proto(worker.id),
            cause=cause,
            clean=worker.status == 0,
            step=reading.step,
            phase=StepPhase(reading.phase).name.lower(),
            finished_micro_batches=reading.finished_micro_batches,
            detected_at_s=worker.ended_s,
            killed_at_s=reading.fault_ns / 1e9,
            hang=worker.hang,
            stacks=worker.stacks,
        )


def _rest_runs(worker: WorkerProcess) -> bool:
    """Whether other threads of a worker outlive its main thread and must be ended: it failed, or should train.

    A worker killed by a signal needs no second one: the kernel is tearing it down.
    """
    trains = worker.elastic and worker.reading().phase is not StepPhase.AFTER
    killed = worker.status is not None and worker.status < 0
    return (bool(worker.status) or trains) and not killed and runs_without_main_thread(worker.pid)


def proto(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
