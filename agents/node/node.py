"""The node agent: starts the keeper, the preloaded process and the workers, watches them, and obeys the coordinator.

One thread and one selector; the gRPC stream delivers into a queue. What is decided is decided by the coordinator; what
is here is fork, watch, fence, pass on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from everstep.agents.analysis.health import judge
from everstep.agents.base.patience import Wait
from everstep.checkpointing.access.keeper_protocol import NameTaken
from everstep.comms.base import addresses
from everstep.comms.base.process import exit_status, host_id, runs_without_main_thread
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import AbortHeard, Attachment, Broken
from everstep.comms.control.telemetry_pb2 import AskSpans
from everstep.elastic.contract.notices import Notice
from everstep.elastic.contract.progress import Fault, StepPhase
from everstep.elastic.contract.settings import WorkerContext
from everstep.elastic.protocol.events import Begun, WorkerId
from everstep.elastic.protocol.liveness import FLOOR_S, USER_S

from . import checkup
from .cgroups import OutOfMemory
from .deaths import DeathWatch
from .environment import (
    program_for,
    torch_environment,
    virtual_rank,
    worker_environment,
)
from .failures import Failures, pass_on
from .gatherer import Gatherer
from .hangs import HangWatch
from .keeper_process import (
    EarlierKeeper,
    KeeperCannotServe,
    KeeperProcess,
    obtain,
)
from .keeper_process import start as start_keeper
from .local_ranks import LocalRanks
from .logs import WorkerLogs
from .orphans import ENDED, GRACE_S, Orphans
from .preloader import Preloader
from .torchstore import TorchStores
from .workers import WorkerProcess

WATCH_S = 0.05
SWEEP_S = 0.5
ALONE_S = 2.0  # without a word from a coordinator: there may be none
UNFIT_S = 5.0  # how long the answer is waited for that a node which is not fit to join gets
END_GRACE_S = 3.0  # of an elastic worker; a classic one has `shutdown_timeout_s`
REST_S = 3.0  # how long other threads of a worker may outlive its main thread


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
    role: str = "default"
    max_restarts: int = 0
    max_nodes: int = 1
    memory_bytes: int = 0  # for protection; 0: not known
    rejoin_s: float = 60.0  # how long a node that was fenced tries to come back
    coordinator_wait_s: float = 300.0  # how long it keeps workers that make no progress while there is no coordinator
    keeper_linger_s: float = 30.0  # how long its keeper waits for another agent after this one died
    hang_timeout_s: float = FLOOR_S
    user_timeout_s: float = USER_S
    shared_memory: bool = True
    share_gpu: bool = False
    shutdown_timeout_s: float = 30.0
    virtual_local_rank: bool = False
    numa_binding: str = ""  # one of torch's AffinityMode
    metrics: str = ""  # host:port; empty: not served
    health_check: str = "quick"  # one of checkup.LEVELS
    host_id: str = field(default_factory=host_id)


@dataclass(frozen=True)
class NodeOutcome:
    """How the job ended; or, with success and a reason, how it went on without this node (`left`)."""

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1
    lost: tuple[str, ...] = ()  # what was not got done all the same
    unfit: bool = False  # the node's own health check kept it from joining

    @property
    def left(self) -> bool:
        return self.succeeded and bool(self.why)


class NodeAgent:
    """Runs one node of a job until it ends."""

    def __init__(
        self,
        config: NodeConfig,
        link: Attachment,
        preloader: Preloader,
        on_started: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.link = link
        self.node = config.node
        self._lives = 0  # how often this node has joined
        self.on_stop: Callable[[str], None] = lambda why: None  # asked to stop when the job is over here already
        self.on_store: Callable[[str, int], None] = lambda host, port: None  # where torch's store of this attempt is
        self.on_started = on_started or (lambda: None)
        self.workers: dict[WorkerId, WorkerProcess] = {}
        self.token = ""
        self.outcome: NodeOutcome | None = None
        self._keeper: KeeperProcess | None = None
        self._preloader: Preloader | None = preloader
        self._waiting: list[tuple[WorkerProcess, pb.StartWorkers]] = []  # to be forked
        self._asked: dict[WorkerId, pb.StartWorkers] = {}  # the preloaded process was asked to fork these
        self._failures = Failures(config.role)
        self._local_ranks = LocalRanks(config.slots)
        self._memory = OutOfMemory()
        self._deaths = DeathWatch()
        self._stop_why = ""
        self.signal = signal.SIGTERM  # that workers get when the job is stopped: torchrun passes its own on
        self._selector = selectors.DefaultSelector()
        self._session = os.getsid(0)
        self._orphans = Orphans(self._is_ours)  # of workers whose preloaded process is dead
        self._swept_s = 0.0
        self._stores = TorchStores(config.host)
        self._rejoining = False  # has asked to be taken in again
        self._wait = Wait()
        self._began = False  # workers were started here
        self._steps_alone: dict[WorkerId, int] = {}
        self._alone_s = 0.0  # since when there has been neither a coordinator nor progress
        self._fenced_s = 0.0  # since when this node has been out
        self._ending_s = 0.0
        self._hang_watch = HangWatch(config.hang_timeout_s, config.user_timeout_s, self._warn)
        self._unfit = ""  # why this node should not join
        self._unfit_s = 0.0  # since when the coordinator knows
        self._gatherer = Gatherer(
            config.job,
            config.node,
            lambda message: self.link.mention(telemetry=message),
            self._keeper_place,
            lambda: self._hang_watch.states,
            keeper_limit_bytes=config.memory_bytes,
            serve_at=config.metrics,
            security=link.security,
        )
        if self._gatherer.url:
            self._say(f"metrics of this node: {self._gatherer.url}")

    # ------------------------------------------------------------ life

    def run(self) -> NodeOutcome:
        """Serve until the job ends, then leave nothing behind."""
        try:
            self._watch_preloader()
            self._selector.register(self.link.wake_fd, selectors.EVENT_READ, self._link_woke)
            self._selector.register(self._deaths, selectors.EVENT_READ, self._main_threads_ended)
            self.link.start(self._new_name())
            self._gatherer.start()
            while not self._done():
                self.link.alive()
                for key, _ in self._selector.select(WATCH_S):
                    key.data()
                self._watch()
            assert self.outcome is not None
            if not self.outcome.succeeded and not self.outcome.detail:
                return replace(self.outcome, detail=self._failures.report())
            return self.outcome
        finally:
            self._close()

    def _new_name(self) -> str:
        self._lives += 1
        self.node = self.config.node if self._lives == 1 else f"{self.config.node}-{self._lives}"
        return self.node

    def _keeper_place(self) -> tuple[str, str] | None:
        """The keeper's address, and the token to speak with it."""
        keeper = self._keeper
        return (
            (addresses.join(self.config.host, keeper.port), self.token) if keeper is not None and self.token else None
        )

    def _send(self, **body: Any) -> None:
        self.link.send(**body)

    def _done(self) -> bool:
        if self.outcome is None:
            return False
        for worker, _ in self._waiting:
            del self.workers[worker.id]
            worker.close()
        self._waiting.clear()
        now = time.monotonic()
        self._ending_s = self._ending_s or now
        for worker in self.workers.values():
            grace = END_GRACE_S if worker.elastic else self.config.shutdown_timeout_s
            if now - self._ending_s > grace:
                worker.kill("the job is over")
        return not self.workers

    def _close(self) -> None:
        self._gatherer.close()
        for worker in self.workers.values():
            worker.kill("the agent ends")
            worker.close()
        if self._preloader is not None:
            self._preloader.close()
            self._preloader = None
        self._orphans.end_all(time.monotonic() + 2 * GRACE_S)
        self._end_keeper()
        self.config.logs.close()
        self._stores.close()
        self._selector.close()
        self._deaths.close()
        self.link.close()

    def _end_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper = None

    # ------------------------------------------------------------ fenced, and back

    def _fence(self, why: str) -> None:
        """This node is out of the job: stop all that it runs, and ask to be taken in again."""
        self._say(f"this node was lost to the job ({why}): its workers are stopped, and it asks to join again")
        self.token = ""
        for worker, _ in self._waiting:
            del self.workers[worker.id]
            worker.close()
        self._waiting.clear()
        for worker in self.workers.values():
            worker.silent = True
            worker.kill("the node was lost to the job")
        self._end_keeper()
        self._fenced_s = time.monotonic()

    def _rejoin(self, now: float) -> None:
        """Once all is stopped, join by another name; the job is over for this node when that takes too long."""
        if self.workers or self.outcome is not None:
            return
        if self._stop_why or now - self._fenced_s > self.config.rejoin_s:
            why = self._stop_why or f"no coordinator could be reached for {self.config.rejoin_s:g} s"
            self.outcome = NodeOutcome(False, f"this node was lost to the job, and {why}")
        elif not self._rejoining:
            self._rejoining = True
            self.link.rename(self._new_name())

    def _say(self, text: str) -> None:
        print(f"everstep: {text}", file=sys.stderr, flush=True)

    def stop(self, why: str) -> None:
        """Ask the coordinator to end the job; asked twice, end this node at once. Safe in a signal handler."""
        if self.outcome is not None:
            self.on_stop(why)
            return
        if self._stop_why and self.token:
            self._end_at_once(why)
        self._stop_why = why
        self._send(stop=pb.StopRequest(why=why))

    def leave(self, why: str) -> None:
        """Ask the coordinator to let this node hand over and go; asked twice, end it at once. Safe like `stop`."""
        if self.outcome is not None or self._stop_why:
            self.stop(why)
            return
        self._stop_why = why
        self._send(drain=pb.DrainRequest(why=why))

    def _end_at_once(self, why: str) -> None:
        self.outcome = self.outcome or NodeOutcome(False, why)
        for worker in list(self.workers.values()):
            worker.kill(why)

    # ------------------------------------------------------------ the coordinator's orders

    def _link_woke(self) -> None:
        for message in self.link.received():
            if isinstance(message, Broken):
                if self.outcome is None and self.token:
                    self._say(f"the coordinator is gone ({message.why}); training goes on, and it is looked for")
            elif isinstance(message, AbortHeard):
                self._abort(message.generation)
            else:
                body = message.WhichOneof("body")
                getattr(self, f"_on_{body}")(getattr(message, body))

    def _abort(self, generation: int) -> None:
        """What every worker here is about to be told; the order itself follows."""
        line = json.dumps({"kind": "abort", "generation": generation}).encode()
        for worker in self.workers.values():
            if worker.pid:
                self._tell(worker, line)

    def _on_welcome(self, message: pb.Welcome) -> None:
        self.token = message.token
        self._fenced_s, self._rejoining = 0.0, False
        faults = self.config.environment.get(Fault.VARIABLE, "")
        health = checkup.measure(self.config.health_check, self.config.host, message.unix_s, faults)
        if reasons := judge(health):
            self._unfit, self._unfit_s = "; ".join(reasons), time.monotonic()
            self._send(unhealthy=pb.NodeUnhealthy(host=self.config.host, why=self._unfit, health=health))
            return
        keeper = addresses.join(self.config.host, self._obtain_keeper().port)
        config = self.config
        ready = pb.NodeReady(
            host=config.host,
            slots=config.slots,
            keeper=keeper,
            order=config.order if self._lives == 1 else -1,
            memory_bytes=config.memory_bytes,
            stores=[self._stores.reserve(), self._stores.reserve()],
            health=health,
        )
        self._send(ready=ready)

    def _on_fence(self, message: pb.Fence) -> None:
        if self.outcome is None and not self._fenced_s:
            self._fence(message.why)

    def _on_notice(self, message: pb.Notice) -> None:
        self._say(message.text)

    def _on_ask_spans(self, message: AskSpans) -> None:
        self._gatherer.tell_spans(message, lambda spans: self.link.answer(spans=spans))

    def _on_refused(self, message: pb.Refused) -> None:
        if self._unfit:
            why = f"node {self.node} is not fit to join: {self._unfit}; --es-health-check=off lets it join all the same"
            self.outcome = NodeOutcome(False, why, unfit=True)
            return
        self.outcome = NodeOutcome(False, f"the coordinator refused node {self.node}: {message.why}")

    def _on_start(self, message: pb.StartWorkers) -> None:
        self.on_started()
        self.on_store(message.master_addr, message.master_port)
        self._began = True
        if message.group_rank == 0:
            self._stores.open(message.master_port)
            if message.restart_count:
                self._send(store=pb.StoreOpened(port=self._stores.reserve()))
        running = {worker.id.rank for worker in self.workers.values() if not worker.silent}
        self._local_ranks.give([item.rank for item in message.workers], running)
        for item in message.workers:
            worker = WorkerProcess.prepare(WorkerId(item.rank, item.incarnation))
            self._deaths.prepare(worker)
            worker.local_rank = self._local_ranks[item.rank]
            self.workers[worker.id] = worker
            self._gatherer.watch(worker.id, worker.page_fd, message.group_world_size)
            self._waiting.append((worker, message))
        self._fork_waiting()

    def _on_kill(self, message: pb.KillWorkers) -> None:
        """End workers for a restart: torchrun's way, SIGTERM first."""
        self._failures.clear()
        deadline_s = time.monotonic() + self.config.shutdown_timeout_s
        for item in message.workers:
            worker = self.workers.get(WorkerId(item.rank, item.incarnation))
            if worker is not None and not worker.lost:
                worker.silent, worker.deadline_s = True, deadline_s
                worker.terminate()

    def _on_to_worker(self, message: pb.ToWorker) -> None:
        worker = self.workers.get(WorkerId(message.worker.rank, message.worker.incarnation))
        if worker is not None:
            self._tell(worker, message.json.encode())

    def _on_end(self, message: pb.EndJob) -> None:
        self.outcome = NodeOutcome(message.succeeded, message.why, message.detail, message.rank, tuple(message.lost))
        if self.outcome.left:
            self._say(message.why)
        for worker in self.workers.values():
            if worker.id.rank == message.rank:
                pass_on(worker.error_file, 1)
            self._tell(worker, b'{"kind":"end"}')
            if not message.succeeded or message.lost:
                worker.terminate(self.signal)

    # ------------------------------------------------------------ processes

    def _obtain_keeper(self) -> KeeperProcess:
        """Take over this host's keeper of the job, or start one; one that ended is started again in its place."""
        config, former = self.config, self._keeper
        try:
            if former is None:
                self._keeper = obtain(self.node, config.host, self.token, config.keeper_linger_s)
            else:
                former.kill()
                place = (former.name, self.node, config.host, former.port)
                self._keeper = start_keeper(*place, self.token, config.keeper_linger_s)
        except EarlierKeeper as error:
            raise AgentError(str(error)) from None
        except (KeeperCannotServe, NameTaken) as error:
            raise AgentError(
                f"the snapshot keeper of node {self.node} cannot serve on {config.host}: {error} (choose "
                "this node's address with --local-addr)"
            ) from None
        return self._keeper

    def _keeper_end(self, keeper: KeeperProcess) -> str:
        """How it ended, in words."""
        status = keeper.process.returncode if keeper.process is not None else None
        if status is None:
            return "has ended"
        if status >= 0:
            return f"has ended with status {status}"
        killer = self._memory.explain() if status == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{killer and ' '}{killer}"

    def _watch_preloader(self) -> None:
        assert self._preloader is not None
        self._selector.register(self._preloader, selectors.EVENT_READ, self._preloader_spoke)

    def _preloader_spoke(self) -> None:
        assert self._preloader is not None
        answer = self._preloader.answer()
        if answer is None:
            self._preloader_died()
            return
        kind = answer.get("kind")
        if kind == "ready":
            self._fork_waiting()
        elif kind == "forked":
            self._forked(WorkerId(answer["rank"], answer["incarnation"]), answer["pid"])
        elif kind == "failed":
            raise AgentError(f"--es-preload: {answer['why']}")
        elif kind == "left":
            print(ENDED.format(", ".join(answer["names"])), file=sys.stderr, flush=True)
        elif kind == "exited":
            for worker in self.workers.values():
                if worker.pid == answer["pid"]:
                    worker.status = answer["status"]

    def _preloader_died(self) -> None:
        """Its workers die with it, and are reported one by one; who was not forked yet waits for the next one."""
        assert self._preloader is not None
        former, self._preloader = self._preloader, None
        self._selector.unregister(former)
        status = former.close()
        if not former.ready:
            raise AgentError(f"the process that workers are forked from ended with status {status} before it was ready")
        self._orphans.expect()
        self._waiting += [(self.workers[worker], start) for worker, start in self._asked.items()]
        self._asked.clear()
        if self.outcome is None:
            self._preloader = Preloader.start(former.modules)
            self._watch_preloader()

    def _is_ours(self, pid: int) -> bool:
        """Whether a child is one that this process made: the preloaded one, or one in its own session.

        What workers leave behind is in other sessions, and comes here only if the preloaded process is dead.
        """
        if self._preloader is not None and pid == self._preloader.pid:
            return True
        try:
            return os.getsid(pid) == self._session
        except ProcessLookupError:
            return True

    def _fork_waiting(self) -> None:
        """Fork what can be. New workers wait until those before them are gone: their memory, ports and devices too."""
        if self._preloader is None or not self._preloader.ready or self._ending():
            return
        waiting, self._waiting = self._waiting, []
        for worker, start in waiting:
            self._fork(self._preloader, worker, start)

    def _ending(self) -> bool:
        """Whether workers that were ended, or are lost, are not gone yet."""
        return any(worker.silent or worker.lost for worker in self.workers.values())

    def _fork(self, preloader: Preloader, worker: WorkerProcess, start: pb.StartWorkers) -> None:
        config = self.config
        torch = torch_environment(
            start,
            rank=worker.id.rank,
            local_rank=worker.local_rank,
            slots=config.slots,
            role=config.role,
            max_restarts=config.max_restarts,
            job=config.job,
        )
        stdout, stderr, worker.error_file = config.logs.paths(worker.local_rank, torch, self._local_ranks.ranks)
        if config.virtual_local_rank:
            torch |= virtual_rank(config.environment, worker.local_rank)
        torch["TORCHELASTIC_ERROR_FILE"] = worker.error_file
        request = {
            "rank": worker.id.rank,
            "incarnation": worker.id.incarnation,
            "environment": worker_environment(config.environment, torch, self._context(worker, start)),
            "program": program_for(config.program, worker.local_rank),
            "stdout": stdout,
            "stderr": stderr,
            "numa": [config.numa_binding, worker.local_rank],
        }
        self._asked[worker.id] = start
        preloader.request(request, [worker.channel.theirs.fileno(), worker.page_fd])

    def _context(self, worker: WorkerProcess, start: pb.StartWorkers) -> WorkerContext:
        return WorkerContext(
            rank=worker.id.rank,
            incarnation=worker.id.incarnation,
            world_size=start.world_size,
            host=self.config.host,
            host_id=self.config.host_id,
            token=self.token,
            keeper_name=self._keeper.name if self._keeper is not None else "",
            node=self.node,
            max_nodes=self.config.max_nodes,
            shared_memory=self.config.shared_memory,
            local_rank=0 if self.config.virtual_local_rank else worker.local_rank,
            gpu_workers=1 if self.config.virtual_local_rank else self.config.slots,
            share_gpu=self.config.share_gpu,
            begun=Begun(start.begun.samples, start.begun.values) if start.HasField("begun") else None,
        )

    def _forked(self, worker_id: WorkerId, pid: int) -> None:
        self._asked.pop(worker_id, None)
        worker = self.workers[worker_id]
        worker.forked(pid)
        if self.outcome is not None:
            worker.kill("the job is over")
        self._listen(worker)
        if worker.pidfd >= 0:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._ended(worker))
        else:
            self._ended(worker)

    def _converse(self, worker: WorkerProcess) -> None:
        """A worker has said something, or takes more of what is said to it."""
        if worker.id not in self.workers:
            return  # its end was noticed in the same turn
        worker.channel.flush()
        self._pass_lines(worker)
        self._listen(worker)

    def _tell(self, worker: WorkerProcess, line: bytes) -> None:
        """Say something to a worker, without waiting for it to listen."""
        worker.channel.send(line)
        if worker.pidfd >= 0:
            self._listen(worker)

    def _listen(self, worker: WorkerProcess) -> None:
        """Wait for what can happen next on its channel."""
        channel = worker.channel
        if channel.broken:
            worker.kill(channel.broken)
        events = 0 if channel.closed else selectors.EVENT_READ  # then the pidfd tells the rest
        events |= selectors.EVENT_WRITE if channel.waits_to_send else 0
        registered = self._selector.get_map().get(channel)
        if registered is None and events:
            self._selector.register(channel, events, lambda: self._converse(worker))
        elif registered is not None and not events:
            self._selector.unregister(channel)
        elif registered is not None and registered.events != events:
            self._selector.modify(channel, events, registered.data)

    def _main_threads_ended(self) -> None:
        """Main threads of workers have ended. With a failure, the worker is lost: say so before its process is gone.

        With status 0 nothing is in a hurry, and other threads may go on: the pidfd tells when they have ended too.
        """
        for end in self._deaths.ended():
            worker = self.workers.get(end.worker)
            if worker is None or worker.gone:
                continue  # its pidfd tells
            worker.main_ended_s = end.at_s
            if end.status:
                worker.status, worker.ended_s, worker.lost = end.status, end.at_s, True
                self._pass_lines(worker)
                self._report_death(worker)

    def _ended(self, worker: WorkerProcess) -> None:
        """A worker process is gone: say so at once, with what it was doing, unless that was said already."""
        if worker.pidfd >= 0:
            self._selector.unregister(worker.pidfd)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        self._pass_lines(worker)
        self._learn_status(worker)
        if not worker.lost:
            worker.ended_s = time.monotonic()
            self._report_death(worker)
        del self.workers[worker.id]
        self._gatherer.ended(worker.id)
        self._deaths.forget(worker.id)
        worker.close()
        self._fork_waiting()

    def _learn_status(self, worker: WorkerProcess) -> None:
        """Without waiting for its parent, which may get no processor for long: it reaps a worker after it has told."""
        self._hear_preloader()
        if worker.status is None:
            worker.status = exit_status(worker.pid)
        if worker.status is None:
            self._hear_preloader()

    def _hear_preloader(self) -> None:
        while self._preloader is not None and self._preloader.has_spoken():
            self._preloader_spoke()

    def _report_death(self, worker: WorkerProcess) -> None:
        if worker.silent or self.outcome is not None:
            return
        reading = worker.reading()
        if worker.status != 0:
            status = worker.status if worker.status is not None else -int(signal.SIGKILL)
            self._failures.add(worker.id.rank, worker.local_rank, worker.pid, status, worker.error_file)
        cause = worker.cause()
        if not worker.fenced and worker.status == -signal.SIGKILL and (killer := self._memory.explain()):
            cause = f"{cause} {killer}"
        died = pb.WorkerDied(
            worker=_proto(worker.id),
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
        self._send(died=died)

    def _pass_lines(self, worker: WorkerProcess) -> None:
        """Pass on what a worker said."""
        for line in worker.receive():
            self._send(from_worker=pb.FromWorker(worker=_proto(worker.id), json=line.decode()))

    # ------------------------------------------------------------ watching

    def _waits_for(self, now: float) -> str:
        """What this node can do nothing without; empty if there is no such thing."""
        where = ", ".join(self.link.addresses)
        if self.outcome is not None or self._unfit:
            return ""
        if not self.token:
            return f"this node waits for the coordinator at {where} to take it in"
        if now - self.link.heard_s > ALONE_S:
            limit_s = self.config.coordinator_wait_s
            return (
                f"this node has no word from a coordinator at {where}; training goes on, and its workers are stopped "
                f"after {limit_s:g} s without progress"
            )
        if self._ending():
            return "this node waits for workers of the last attempt to end"
        if self._waiting:
            return "this node waits for the process that its workers are forked from, which imports --es-preload"
        if not self._began:
            return (
                "this node has joined, and waits for the coordinator to start workers on it (for other nodes, perhaps)"
            )
        return ""

    def _watch(self) -> None:
        now = time.monotonic()
        self._wait.look(self._waits_for(now))
        if now - self._swept_s > SWEEP_S:
            self._swept_s = now
            self._orphans.sweep()
        if self._unfit:
            if now - self._unfit_s > UNFIT_S and self.outcome is None:
                self._on_refused(pb.Refused(why=self._unfit))
            return
        if self._fenced_s:
            self._rejoin(now)
            return
        if self.link.overflowed and self.outcome is None:
            self._end_at_once("no coordinator took in what this node had to say, and it is more than can be kept")
            return
        if self._alone_too_long(now):
            self._fence(f"no word from a coordinator for {now - self.link.heard_s:.0f} s, and no progress")
            return
        if self._keeper is not None and self._keeper.gone() and self.outcome is None:
            self._say(
                f"warning: the snapshot keeper of this node {self._keeper_end(self._keeper)}; another one is started"
            )
            self._obtain_keeper()  # on the same port and name: workers hand it their segments again
        for worker in self.workers.values():
            self._deaths.look(worker)
            if worker.deadline_s and now > worker.deadline_s:
                worker.kill("it did not end when asked to")
            if worker.main_ended_s and now - worker.main_ended_s > REST_S:
                self._end_rest(worker)
        self._hang_watch.look([worker for worker in self.workers.values() if not worker.main_ended_s], now)

    def _end_rest(self, worker: WorkerProcess) -> None:
        """End what goes on of a worker whose main thread has ended, if it is lost or was to train.

        One that a signal has killed needs no other: the kernel is busy with it.
        """
        trains = worker.elastic and worker.reading().phase is not StepPhase.AFTER
        killed = worker.status is not None and worker.status < 0
        if (worker.lost or trains) and not killed and runs_without_main_thread(worker.pid):
            worker.kill("its main thread has ended, and other threads have not")

    def _warn(self, worker: WorkerProcess, notice: Notice, text: str) -> None:
        """A warning about a worker, for all who watch the job."""
        fields = {"notice": str(notice), "text": text, "step": worker.reading().step}
        line = json.dumps({"kind": "noted", "what": "warning", "fields": fields})
        self._send(from_worker=pb.FromWorker(worker=_proto(worker.id), json=line))

    def _alone_too_long(self, now: float) -> bool:
        """Whether this node has been cut off for so long, from coordinator and members both, that it may as well stop.

        While its workers commit steps it is not cut off: then only the coordinator is away, and will be back.
        """
        after = any(worker.reading().phase is StepPhase.AFTER for worker in self.workers.values())
        if after or not self.token or self.outcome is not None or now - self.link.heard_s < ALONE_S:
            self._alone_s = 0.0
            return False
        steps = {worker.id: worker.reading().step for worker in self.workers.values() if worker.pid}
        if not self._alone_s or steps != self._steps_alone:
            self._alone_s, self._steps_alone = now, steps
        return now - self._alone_s > self.config.coordinator_wait_s


def _proto(worker: WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
