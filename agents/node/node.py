"""The node agent: starts the keeper, the preloaded process and the workers, watches them, and obeys the coordinator.

One thread and one selector; the gRPC stream delivers into a queue. Everything that happens is an event of the agent's
machine (`elastic/protocol/agent.py`), which decides; what it instructs is carried out here.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from everstep.agents.analysis.health import judge
from everstep.agents.base.patience import Wait, say
from everstep.comms.base import addresses
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import AbortHeard, Attachment, Broken
from everstep.comms.control.telemetry_pb2 import AskSpans
from everstep.elastic.contract.faults import Fault
from everstep.elastic.contract.notices import Notice
from everstep.elastic.contract.progress import StepPhase
from everstep.elastic.contract.settings import WorkerContext
from everstep.elastic.protocol import agent, worker_messages
from everstep.elastic.protocol import agent_events as a
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.events import Begun, WorkerId

from . import checkup
from .config import AgentError, NodeConfig
from .crew import Crew, proto
from .failures import pass_on
from .gatherer import Gatherer
from .hangs import HangWatch
from .keeper_process import NodeKeeper
from .preemption import PreemptionWatch
from .preloader import Preloader
from .torchstore import TorchStores
from .waits import waits_for
from .workers import WorkerProcess

WATCH_S = 0.05
SWEEP_S = 0.5
EVERYBODY = WorkerId(-1, 0)  # whom a line is for that every worker of the node gets: its channel names the worker


class NodeAgent:
    """Runs one node of a job until it ends. `on_store` gets the address of torch's store of each attempt."""

    def __init__(
        self,
        config: NodeConfig,
        link: Attachment,
        preloader: Preloader,
        on_store: Callable[[str, int], None] | None = None,
    ) -> None:
        self.config = config
        self.link = link
        self.state = agent.new_agent(config)
        self._events: deque[a.Event] = deque()
        self._stepping = False
        self._token = ""
        self._coordinator_unix_s = 0.0
        self._health: Mapping[str, float] = {}
        self._on_store = on_store
        self._when_over: Callable[[], None] = lambda: None
        self._signal = signal.SIGTERM  # that workers get when the job is stopped: torchrun passes its own on
        self._selector = selectors.DefaultSelector()
        self._watched_s = 0.0
        self._swept_s = 0.0
        self._stores = TorchStores(config.host)
        self._wait = Wait()
        self._hang_watch = HangWatch(config.hang_timeout_s, config.user_timeout_s, self._warn, self._happened)
        self._gatherer = Gatherer(
            config.job,
            config.node,
            lambda message: self.link.mention(telemetry=message),
            lambda: self._keeper.place,
            lambda: self._hang_watch.states,
            keeper_limit_bytes=config.memory_bytes,
            serve_at=config.metrics,
            security=link.security,
        )
        self._crew = Crew(config, self._selector, preloader, self._gatherer, self._happened, self._from_worker)
        self._keeper = NodeKeeper(config, self._crew.memory)
        self._preemption: PreemptionWatch | None = None
        if config.preemption:
            about = (config.preemption, config.preemption_endpoint)
            self._preemption = PreemptionWatch(*about, self._preempted, say)
        self._on_message = self._messages()
        self._do = self._instructions()
        if self._gatherer.url:
            say(f"metrics of this node: {self._gatherer.url}")

    # ------------------------------------------------------------ life

    def run(self, on_error: Callable[[], None]) -> a.NodeOutcome:
        """Serve until the job ends, then leave nothing behind. `on_error` is called before an error ends the node."""
        try:
            self._selector.register(self.link.wake_fd, selectors.EVENT_READ, self._link_woke)
            self.link.start(self.state.node)
            self._gatherer.start()
            if self._preemption is not None:
                self._preemption.start()
            while self.state.phase is not agent.AgentPhase.ENDED:
                self.link.alive()
                for key, _ in self._selector.select(max(0.0, self._watched_s + WATCH_S - time.monotonic())):
                    key.data()
                if time.monotonic() - self._watched_s >= WATCH_S:
                    self._watch()
            outcome = self.state.outcome
            assert outcome is not None
            if not outcome.succeeded and not outcome.detail:
                return replace(outcome, detail=self._crew.failures.report())
            return outcome
        except AgentError:
            on_error()
            raise
        finally:
            self._close()

    def _close(self) -> None:
        if self._preemption is not None:
            self._preemption.close()
        self._gatherer.close()
        self._crew.close()
        self._keeper.end()
        self.config.logs.close()
        self._stores.close()
        self._selector.close()
        self.link.close()

    def stop(self, why: str, number: signal.Signals) -> None:
        """Request the job's end from the coordinator; a second call ends this node. Safe in a signal handler."""
        self._ask(a.StopAsked(why), number)

    def leave(self, why: str, number: signal.Signals) -> None:
        """Request a drain of this node from the coordinator; a second call ends it at once. Safe like `stop`."""
        self._ask(a.LeaveAsked(why), number)

    def _preempted(self, why: str) -> None:
        """Called by the thread that looks for notices. The loop turns within `WATCH_S`."""
        self._events.append(a.PreemptionNoticed(why))

    def _ask(self, event: a.StopAsked | a.LeaveAsked, number: signal.Signals) -> None:
        """Only note it: a signal handler may interrupt a transition. The loop turns within `WATCH_S`."""
        self._signal = number
        if self.state.outcome is not None:
            self._when_over()
        else:
            self._events.append(event)

    def when_over(self, action: Callable[[], None]) -> None:
        """Change the effect of `stop`, since the job is over on this node already."""
        self._when_over = action

    # ------------------------------------------------------------ the machine

    def _happened(self, *events: a.Event) -> None:
        """Pass an event to the machine and carry out its instructions. Events that occur meanwhile are taken next."""
        self._events.extend(events)
        if self._stepping:
            return
        self._stepping = True
        while self._events:
            before = self.state
            self.state, instructions = agent.step(before, self._events.popleft(), time.monotonic())
            if self.state is not before and (found := agent.violations(self.state)):
                raise AssertionError(f"{'; '.join(found)}; what happened: {', '.join(self.state.story)}")
            for instruction in instructions:
                self._do[type(instruction)](instruction)
        self._stepping = False

    def _instructions(self) -> dict[type[Any], Callable[[Any], None]]:
        """How each instruction is carried out."""
        crew, link, keeper = self._crew, self.link, self._keeper
        return {
            a.CheckHealth: lambda do: self._check_health(),
            a.ReportUnfit: self._report_unfit,
            a.Announce: self._announce,
            a.RestartKeeper: lambda do: self._restart_keeper(),
            a.EndKeeper: lambda do: keeper.end(),
            a.StartPreloader: lambda do: crew.start_preloader(),
            a.PrepareWorker: lambda do: crew.prepare(do.worker, do.local_rank, do.order),
            a.DropWorker: lambda do: crew.drop(do.worker),
            a.ForkWorker: self._fork,
            a.TerminateWorker: self._terminate,
            a.KillWorker: lambda do: crew.workers[do.worker].kill(do.why),
            a.AskStacks: lambda do: crew.workers[do.worker].ask_stacks(),
            a.KillHung: lambda do: self._hang_watch.kill(crew.workers[do.worker]),
            a.ReportDeath: lambda do: link.send(died=crew.death(do.worker)),
            a.ForgetFailures: lambda do: crew.failures.clear(),
            a.TellEnded: self._tell_ended,
            a.JoinAgain: lambda do: link.rename(do.node),
            a.AskStop: lambda do: link.send(stop=pb.StopRequest(why=do.why)),
            a.AskDrain: lambda do: link.send(drain=pb.DrainRequest(why=do.why)),
            a.Say: lambda do: say(do.text),
        }

    def _fork(self, do: a.ForkWorker) -> None:
        config, worker = self.config, self._crew.workers[do.worker]
        begun = worker.order.begun
        context = WorkerContext(
            rank=worker.id.rank,
            incarnation=worker.id.incarnation,
            world_size=worker.order.world_size,
            host=config.host,
            host_id=config.host_id,
            token=self._token,
            keeper_name=self._keeper.name,
            node=self.state.node,
            max_nodes=config.max_nodes,
            shared_memory=config.shared_memory,
            local_rank=0 if config.virtual_local_rank else worker.local_rank,
            gpu_workers=1 if config.virtual_local_rank else config.slots,
            share_gpu=config.share_gpu,
            begun=Begun(begun.samples, begun.values, begun.settings) if worker.order.HasField("begun") else None,
            memory_bytes=config.worker_memory_bytes,
        )
        self._crew.fork(do.worker, context, self.state.local_ranks.ranks)

    def _terminate(self, do: a.TerminateWorker) -> None:
        self._crew.workers[do.worker].terminate(self._signal if do.stopping else signal.SIGTERM)

    def _tell_ended(self, do: a.TellEnded) -> None:
        if do.failed:
            pass_on(self._crew.workers[do.worker].error_file, 1)
        self._crew.tell(do.worker, worker_messages.write(e.EndWorker(do.worker)).encode())

    # ------------------------------------------------------------ into the job

    def _check_health(self) -> None:
        config = self.config
        faults = config.environment.get(Fault.VARIABLE, "")
        self._health = checkup.measure(config.health_check, config.host, self._coordinator_unix_s, faults)
        self._happened(a.HealthChecked("; ".join(judge(self._health))))

    def _report_unfit(self, do: a.ReportUnfit) -> None:
        self.link.send(unhealthy=pb.NodeUnhealthy(host=self.config.host, why=do.why, health=self._health))

    def _announce(self, do: a.Announce) -> None:
        config = self.config
        ready = pb.NodeReady(
            host=config.host,
            slots=config.slots,
            keeper=addresses.join(config.host, self._keeper.obtain(self.state.node, self._token)),
            order=config.order if do.first else -1,
            memory_bytes=config.memory_bytes,
            stores=[self._stores.reserve(), self._stores.reserve()],
            health=self._health,
            domains=config.domains,
        )
        self.link.send(ready=ready)

    def _restart_keeper(self) -> None:
        say(f"warning: the snapshot keeper of this node {self._keeper.how_it_ended()}; another one is started")
        self._keeper.restart()

    # ------------------------------------------------------------ messages of the coordinator

    def _link_woke(self) -> None:
        for message in self.link.received():
            if isinstance(message, Broken):
                if self.state.belongs:
                    say(f"lost the coordinator ({message.why}); training continues, and this node reconnects")
            elif isinstance(
                message, AbortHeard
            ):  # every worker here is about to receive the order; the order itself follows
                self._crew.tell_all(worker_messages.write(e.AbortGeneration(EVERYBODY, message.generation)).encode())
            else:
                body = message.WhichOneof("body")
                self._on_message[body](getattr(message, body))

    def _messages(self) -> dict[str, Callable[[Any], None]]:
        """The handler of each message of the coordinator."""
        return {
            "welcome": self._welcomed,
            "refused": lambda message: self._happened(a.JoinRefused(message.why)),
            "fence": lambda message: self._happened(a.FenceOrdered(message.why)),
            "start": self._start,
            "kill": lambda message: self._happened(a.KillOrdered(tuple(map(_worker, message.workers)))),
            "to_worker": lambda message: self._crew.tell(_worker(message.worker), message.json.encode()),
            "end": lambda message: self._happened(a.EndOrdered(_outcome(message))),
            "notice": lambda message: say(message.text),
            "ask_spans": self._tell_spans,
        }

    def _welcomed(self, message: pb.Welcome) -> None:
        self._token, self._coordinator_unix_s = message.token, message.unix_s
        self._happened(a.Welcomed())

    def _tell_spans(self, message: AskSpans) -> None:
        self._gatherer.tell_spans(message, lambda spans: self.link.answer(spans=spans))

    def _start(self, message: pb.StartWorkers) -> None:
        if self._on_store is not None:
            self._on_store(message.master_addr, message.master_port)
        if message.group_rank == 0:
            self._stores.open(message.master_port)
            if message.restart_count:
                self.link.send(store=pb.StoreOpened(port=self._stores.reserve()))
        self._happened(a.StartOrdered(tuple(map(_worker, message.workers)), message))

    # ------------------------------------------------------------ watching

    def _watch(self) -> None:
        now = self._watched_s = time.monotonic()
        unheard_s = now - self.link.heard_s
        self._wait.look(waits_for(self.state, unheard_s, ", ".join(self.link.addresses)))
        if now - self._swept_s > SWEEP_S:
            self._swept_s = now
            self._crew.sweep()
        if self.link.overflowed:
            self._happened(a.OutboxFull())
        readings = [(worker, worker.reading()) for worker in self._crew.workers.values() if worker.pid]
        after = any(reading.phase is StepPhase.AFTER for _, reading in readings)
        steps = tuple((worker.id, reading.step) for worker, reading in readings)
        self._happened(a.TimePassed(unheard_s, steps, after))
        if self._keeper.lost():
            self._happened(a.KeeperLost())
        self._crew.look(now)
        self._hang_watch.look([(worker, reading) for worker, reading in readings if not worker.main_ended_s], now)

    def _from_worker(self, worker: WorkerId, line: bytes) -> None:
        self.link.send(from_worker=pb.FromWorker(worker=proto(worker), json=line.decode()))

    def _warn(self, worker: WorkerProcess, notice: Notice, text: str) -> None:
        """Send a warning about a worker to the job's event log."""
        fields = {"notice": str(notice), "text": text, "step": worker.reading().step}
        line = worker_messages.write(e.WorkerNoted(worker.id, "warning", fields))
        self._from_worker(worker.id, line.encode())


def _worker(message: pb.WorkerId) -> WorkerId:
    return WorkerId(message.rank, message.incarnation)


def _outcome(message: pb.EndJob) -> a.NodeOutcome:
    how = (message.succeeded, message.why, message.detail, message.rank, tuple(message.lost))
    return a.NodeOutcome(*how, left=message.released)
