"""The leading coordinator: feeds events to the pure machine, writes its decisions to a store, then carries them out.

Every decision is written before any agent learns of it. So a coordinator may die at any moment: its successor has all
decisions, sends unacknowledged orders again, and receives again the messages that were not committed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from everstep.comms.base.security import Security, digest_of
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import PROTOCOL
from everstep.comms.control.rpc import Session
from everstep.elastic.protocol import coordinator, invariants
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Ending
from everstep.elastic.protocol.losing import beat_s
from everstep.elastic.protocol.state import Config, Phase, State

from .durable import Durable, NodeChannel
from .eventlog import EventLog, Listeners
from .gc_tuning import LongLived
from .messages import WorkerOrders, agent_event, order
from .node_sessions import NodeSessions
from .store import StateStoreError

TICK_S = 0.1
STORY = 32
CLOCK_TRUST_S = 60.0  # a node's monotonic clock that is further off than this is another machine's
RETURN_S = 3.0  # how long nodes have to find the coordinator that took over
SLEPT_S = 1.0  # between turns: this process was stopped, or starved
END_S = 10.0  # how long a disconnected node may take to return and learn that the job is over
STORE_RETRY_S = 0.5
MOST_NAME = 200  # characters of a node's name

log = logging.getLogger("everstep.coordinator")


class Leader:
    """Decides for as long as it leads according to the store. Everything runs in one event loop."""

    def __init__(
        self,
        job: str,
        config: Config,
        security: Security,
        durable: Durable,
        links: NodeSessions,
        events: EventLog,
        listeners: Listeners,
        polls: Sequence[Callable[[], e.Event | None]] = (),
    ) -> None:
        self.state = coordinator.initial_state(config, 0.0)
        self.events = events
        self._polls = polls  # asked at every tick
        self._job = job
        self._config = config
        self._security = security
        self._durable = durable
        self._links = links
        self._listeners = listeners
        self._inbox: list[tuple[Session, pb.AttachRequest | str]] = []
        self._wake = asyncio.Event()
        self._ahead_s = 0.0  # of time.monotonic()
        self._turned_s = 0.0
        self._lenient_s = 0.0  # until when a stream that breaks is no loss
        self._expected_s = 0.0  # until when nodes of the store are waited for, and no others are taken in
        self._knocked = False  # another process asked for the end
        self.held_up = ""  # why writes fail at the moment; without writes there are no decisions
        self._worker_orders = WorkerOrders()
        self._long_lived = LongLived()
        self._story: deque[str] = deque(maxlen=STORY)  # the last events that had effects

    def put(self, session: Session, item: pb.AttachRequest | str) -> None:
        """A message from an agent; or a text, when its stream has ended."""
        self._inbox.append((session, item))
        self._wake.set()

    def now(self) -> float:
        """The clock of the state's times."""
        return time.monotonic() + self._ahead_s

    # ------------------------------------------------------------ the turns

    async def lead(self, state: State | None, ahead_s: float, on_leading: Callable[[], None]) -> None:
        """Run until the job is over, from the stored state, if there is one. Raises Superseded."""
        self._ahead_s = ahead_s
        self.state = state or coordinator.initial_state(self._config, self.now())
        await self._carry_out(self._take_over() if state is not None else [])
        on_leading()
        await self._work()
        await self._see_off()

    def _take_over(self) -> list[e.Effect]:
        """Take over from another coordinator: continue its event log and wait for its nodes."""
        self.events.catch_up(list(self._durable.records))
        log.info("took over job %s at step %d, generation %d", self._job, self.state.committed, self.state.generation)
        self._expected_s = time.monotonic() + 2 * RETURN_S
        self._lenient_s = time.monotonic() + RETURN_S
        returned = e.Record("coordinator_returned", {"nodes": sorted(self._durable.channels)})
        return [returned, *self._decide(e.CoordinatorReturned(RETURN_S))]

    def _abandon(self) -> list[e.Effect]:
        """No stored node reconnected: abandon the stored job and start a new one."""
        log.warning("no node of the stored job has reconnected: a new job is started")
        for node in list(self._durable.channels):
            self._links.forget(node)
        self._expected_s, self._knocked = 0.0, False
        abandoned = e.Record("abandoned", {"step": self.state.committed})
        self.state = coordinator.initial_state(self._config, self.now())
        return [abandoned]

    async def _work(self) -> None:
        """Turn by turn until the job is over: take the received events, decide, write, send."""
        next_tick = self._turned_s = time.monotonic()
        while self.state.phase is not Phase.DONE:
            try:
                async with asyncio.timeout(max(0.0, next_tick - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if time.monotonic() - self._turned_s > SLEPT_S:
                self._lenient_s = time.monotonic() + RETURN_S
                await self._carry_out(self._decide(e.CoordinatorReturned(RETURN_S)))
            self._turned_s = time.monotonic()
            self._durable.check()
            inbox, self._inbox = self._inbox, []
            effects: list[e.Effect] = []
            try:
                for session, item in inbox:
                    effects += self._take(session, item)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    effects += self._tick()
            except Exception as error:  # a bug of ours: end the job rather than let it stand still
                effects = [self._fail(error)]
            await self._carry_out(effects)

    def _tick(self) -> list[e.Effect]:
        effects: list[e.Effect] = []
        self._long_lived.look(self._links.attached)
        alive = self._links.take_alive()
        if self._expected_s and alive:
            self._expected_s, self._knocked = 0.0, False
        elif self._expected_s and self._knocked and time.monotonic() > self._expected_s:
            effects += self._abandon()
        if alive:
            for listener in self._listeners.heartbeats:
                listener(len(alive))
            effects += self._decide(e.HeartbeatsReceived(alive))
        for poll in self._polls:
            event = poll()
            effects += self._decide(event) if event is not None else []
        return effects + self._decide(e.Ticked())

    def _decide(self, event: e.Event) -> list[e.Effect]:
        """The effects of an event. Raises InvariantBroken or IllegalJobEvent before any effect is written or sent."""
        try:
            after, effects = coordinator.step(self.state, event, self.now())
            invariants.check_turn(self.state, after, effects)
        except (invariants.InvariantBroken, coordinator.IllegalJobEvent) as error:
            error.add_note(f"the events before: {', '.join(self._story)}")
            log.error("broken by %s; the events before: %s", type(event).__name__, ", ".join(self._story))
            raise
        if effects:
            self._story.append(type(event).__name__)
        self.state = after
        return effects

    def _fail(self, error: Exception) -> e.EndJob:
        self.state = replace(self.state, phase=Phase.DONE)
        why = f"the coordinator failed, a bug of everstep: {error!r}"
        return e.EndJob(False, why, traceback.format_exc(), ending=Ending.BUG)

    # ------------------------------------------------------------ messages of agents

    def _take(self, session: Session, item: pb.AttachRequest | str) -> list[e.Effect]:
        """What a message leads to: each once, in the order of its numbers, and only from a node that is in the job."""
        if isinstance(item, str):
            return self._gone(session, item)
        if item.WhichOneof("body") == "hello":
            self._greet(session, item.hello)
            return []
        if self._links.session(session.node) is not session:
            return []  # the node has not said hello, or was declared lost: its messages are ignored
        if item.WhichOneof("body") == "heartbeat":
            self._durable.acknowledge(session.node, item.heartbeat.received)
            self._links.heard(session.node)
            kept = self._durable.channels[session.node].kept
            session.send(pb.AttachResponse(heartbeat=pb.Heartbeat(received=kept)))
            return []
        if item.WhichOneof("body") == "telemetry":
            for listener in self._listeners.telemetry:
                listener(session.node, item.telemetry)
            return []
        seen = self._durable.channels[session.node].seen
        if item.number <= seen:
            return []  # a retransmission
        try:
            if item.number != seen + 1:
                raise ValueError(f"message {item.number} came after {seen}")
            event = agent_event(session.node, item, self._local)
            self._check_worker(session.node, item)
        except Exception as error:  # an unreadable message is the fault of this node alone: only its stream ends
            return self._expel(session, f"it sent an invalid message: {error!r}")
        self._durable.saw(session.node, item.number)
        try:
            return self._decide(event) if event is not None else []
        except coordinator.IllegalJobEvent as error:
            return self._expel(session, f"it said what cannot be: {error}")

    def _check_worker(self, node: str, message: pb.AttachRequest) -> None:
        """A node may report only about its own workers. Raises ValueError if it reports about others."""
        if message.WhichOneof("body") not in ("died", "from_worker"):
            return
        rank = getattr(message, message.WhichOneof("body")).worker.rank
        known = self.state.workers.get(rank)
        if known is not None and known.node != node:
            raise ValueError(f"rank {rank} is a worker of node {known.node}")

    def _gone(self, session: Session, why: str) -> list[e.Effect]:
        """A stream that breaks while its coordinator lives is a node that is lost."""
        if self._links.session(session.node) is not session:
            return []
        if time.monotonic() < self._lenient_s:
            self._links.detach(session.node)  # it may have left during our pause; else its heartbeats will be missed
            return []
        self._links.forget(session.node)
        return self._decide(e.NodeLost(session.node, why))

    def _expel(self, session: Session, why: str) -> list[e.Effect]:
        log.warning("node %s is expelled: %s", session.node, why)
        session.send(pb.AttachResponse(refused=pb.Refused(why=why)))
        session.end()
        return self._gone(session, why)

    def _local(self, stamp: float) -> float:
        """A node's time by our clock; 0 if the node is on another machine."""
        return stamp + self._ahead_s if 0 <= time.monotonic() - stamp <= CLOCK_TRUST_S else 0.0

    # ------------------------------------------------------------ nodes that come

    def _greet(self, session: Session, hello: pb.Hello) -> None:
        """Welcome a new or returning node. A returning node that is not known any more was declared lost."""
        why = self._refusal(hello)
        channel = self._durable.channels.get(hello.node)
        if why and hello.returning:
            log.warning("node %s cannot come back: %s", hello.node, why)  # it trains, and looks for its coordinator
        elif why:
            session.send(pb.AttachResponse(refused=pb.Refused(why=why)))
        elif channel is None and not hello.returning and (self._expected_s or self._links.detached()):
            self._knocked = True  # a disconnected node returns, or is lost and frees its place; this one retries
        elif channel is None and hello.returning:
            session.send(pb.AttachResponse(fence=pb.Fence(why="it was gone for too long")))
        elif channel is not None and not self._may_return(hello, channel):
            why = f"a node named {hello.node!r} is in the job already"
            session.send(pb.AttachResponse(refused=pb.Refused(why=why)))
        else:
            self._welcome(session, hello, channel or self._durable.open(hello.node))
            return
        session.end()

    def _refusal(self, hello: pb.Hello) -> str:
        if hello.protocol != PROTOCOL:
            return (
                f"this coordinator speaks version {PROTOCOL} of the control protocol, and the node speaks version "
                f"{hello.protocol}: run the same everstep on every node, and beside the coordinator"
            )
        if hello.job != self._job:
            return f"this coordinator runs job {self._job!r}; the node asked for {hello.job[:MOST_NAME]!r} (--rdzv-id)"
        shown, own = hello.token_digest.encode(), digest_of(self._durable.token).encode()
        if (self._security.token or hello.returning) and not secrets.compare_digest(shown, own):
            return "its token is not this job's: give every node the same EVERSTEP_JOB_TOKEN or EVERSTEP_TOKEN_FILE"
        if not 0 < len(hello.node) <= MOST_NAME or not hello.node.isprintable() or "/" in hello.node:
            shown_name = hello.node[:MOST_NAME]
            return f"a node's name is 1 to {MOST_NAME} printable characters without a slash, got {shown_name!r}"
        return ""

    def _may_return(self, hello: pb.Hello, channel: NodeChannel) -> bool:
        """A node reconnects whose stream broke unnoticed, or was held by the previous coordinator."""
        return hello.returning or (self._links.session(hello.node) is None and channel.seen == 0)

    def _welcome(self, session: Session, hello: pb.Hello, channel: NodeChannel) -> None:
        self._links.attach(hello.node, session)
        self._durable.acknowledge(hello.node, hello.received)
        welcome = pb.Welcome(token=self._durable.token, received=channel.kept, beat_s=beat_s(self._config))
        welcome.unix_s = time.time()
        session.send(pb.AttachResponse(welcome=welcome))
        for number in sorted(channel.pending):
            session.send(pb.AttachResponse.FromString(channel.pending[number]))

    # ------------------------------------------------------------ carrying out

    async def _carry_out(self, effects: list[e.Effect]) -> None:
        """Write first, then send: an agent must never act on a decision that a crash could lose."""
        orders: list[tuple[str, pb.AttachResponse]] = []
        records: list[dict[str, Any]] = []
        for effect in effects:
            if isinstance(effect, e.Record):
                records.append(self._record(effect.event, effect.fields))
            else:
                orders += self._orders(effect)
                if isinstance(effect, e.EndJob):
                    how = {"succeeded": effect.succeeded, "reason": effect.ending.value}
                    fields = {**how, "why": effect.why, "lost": list(effect.lost)}
                    records.append(self._record("ended", fields))
        if not self._durable.due():
            return
        seen = {node: channel.seen for node, channel in self._durable.channels.items()}
        rows = self._durable.gather(self.state, self.now())
        await self._write(rows, sync=bool(orders))
        self._durable.kept(seen)
        self._abort_at_once(effects)
        for node, message in orders:
            session = self._links.session(node)
            if session is not None:
                session.send(message)
        for effect in effects:
            if isinstance(effect, e.FenceNode | e.RefuseNode):
                self._turn_away(effect)
        self.events.add(records)

    async def _write(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        """Until it is written: a store that is away for a while holds decisions up, and nothing else."""
        while True:
            try:
                await asyncio.to_thread(self._durable.write, rows, sync=sync)
                self.held_up = ""
                return
            except StateStoreError as error:
                if not self.held_up:
                    log.warning("nothing can be decided until the store is back: %s", error)
                self.held_up = str(error)
                self._durable.check()
                await asyncio.sleep(STORE_RETRY_S)

    def _orders(self, effect: e.Effect) -> list[tuple[str, pb.AttachResponse]]:
        """The numbered orders that an effect sends to nodes."""
        if isinstance(effect, e.EndJob):
            end = pb.EndJob(succeeded=effect.succeeded, why=effect.why, detail=effect.detail, rank=effect.rank)
            end.lost.extend(effect.lost)
            found = [(node, pb.AttachResponse(end=end)) for node in self._durable.channels]
        elif (to_worker := self._worker_orders.write(effect)) is not None:
            known = self.state.workers.get(to_worker[0].rank)
            found = [(known.node, to_worker[1])] if known is not None else []
        else:
            to_node = order(effect)
            found = [to_node] if to_node is not None else []
        return [(node, message) for node, message in found if self._durable.order(node, message)]

    def _abort_at_once(self, effects: list[e.Effect]) -> None:
        """Send aborts as datagrams, ten times faster than streams, first to nodes whose workers all have to stop."""
        told: dict[str, int] = {}
        generation = -1
        for effect in effects:
            worker = self.state.workers.get(effect.worker.rank) if isinstance(effect, e.AbortGeneration) else None
            if worker is not None and isinstance(effect, e.AbortGeneration):
                told[worker.node] = told.get(worker.node, 0) + 1
                generation = max(generation, effect.generation)
        if not told:
            return
        workers: dict[str, int] = {}
        for worker in self.state.workers.values():
            workers[worker.node] = workers.get(worker.node, 0) + 1
        for node, count in told.items():
            if count == workers[node]:
                self._links.echo(node, generation)

    def _turn_away(self, effect: e.FenceNode | e.RefuseNode) -> None:
        session = self._links.session(effect.node)
        if session is not None:
            if isinstance(effect, e.FenceNode):
                session.send(pb.AttachResponse(fence=pb.Fence(why=effect.why)))
            else:
                session.send(pb.AttachResponse(refused=pb.Refused(why=effect.why)))
            session.end()
        self._links.forget(effect.node)

    async def _see_off(self) -> None:
        """The job is over: wait until every node has acknowledged it, disconnected nodes for a limited time."""
        deadline = time.monotonic() + END_S
        while self._durable.channels and time.monotonic() < deadline:
            for session in self._links.sessions():
                session.end()
            await asyncio.sleep(0.02)
            inbox, self._inbox = self._inbox, []
            for session, item in inbox:
                if isinstance(item, str) and self._links.session(session.node) is session:
                    self._links.forget(session.node)
                elif not isinstance(item, str) and item.WhichOneof("body") == "hello":
                    self._greet(session, item.hello)

    def _record(self, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._durable.record({"at_s": time.monotonic(), "event": event, **fields})
