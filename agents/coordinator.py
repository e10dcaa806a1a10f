"""The coordinator's shell: feeds events to the pure machine, writes what follows to a store, then carries it out.

Whatever a decision says is written before anybody hears of it. So a coordinator may end at any moment: the next one has
all that was decided, says again what was not acknowledged, and hears again what was not taken in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..comms import beats
from ..comms import everstep_pb2 as pb
from ..comms.attach import PROTOCOL
from ..comms.rpc import Server, Session
from ..comms.security import Security, digest_of
from ..elastic.protocol import coordinator
from ..elastic.protocol import events as e
from ..elastic.protocol.protection import describe_protection
from ..elastic.protocol.state import Config, Phase
from .durable import Channel, Durable
from .messages import agent_event, order, worker_order
from .rendezvous_service import Rendezvous
from .store import Store, StoreError

TICK_S = 0.1
REMEMBERED_STEPS = 2000
CLOCK_TRUST_S = 60.0  # a node's monotonic clock that is further off than this is another machine's
RETURN_S = 3.0  # how long nodes have to find the coordinator that took over
SLEPT_S = 1.0  # between turns: this process was stopped, or starved
END_S = 10.0  # how long a node that is away may take to come and hear that the job is over
STORE_RETRY_S = 0.5
DATAGRAMS = 2000  # taken in at a time

log = logging.getLogger("everstep.coordinator")


class PortTaken(Exception):
    """The coordinator's address is in use."""


@dataclass
class Link:
    """A node as this coordinator meets it."""

    session: Session | None = None
    address: Any = None  # where its beats come from
    stamp: int = 0  # of the newest of them


@dataclass
class Listeners:
    """Who else wants to know: of every line of the event log, and of messages that are no events."""

    record: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    heartbeats: list[Callable[[int], None]] = field(default_factory=list)
    telemetry: list[Callable[[str, Any], None]] = field(default_factory=list)  # node, pb.Telemetry


class Coordinator:
    """One job's coordinator. All of it runs in one event loop; nothing is served before `lead`."""

    def __init__(self, job: str, config: Config, security: Security, *, events: Path | None = None) -> None:
        self.job = job
        self.listeners = Listeners()
        self.state = coordinator.initial_state(config, 0.0)
        self.standing_by = "this coordinator has just started: try again"
        self._config = config
        self._security = security
        self._events = events
        self._server = Server(self, security)
        self._rendezvous = Rendezvous(job, security, self.refusal)
        self._rendezvous.serve(self._server.aio)
        self._udp: socket.socket | None = None
        self._durable: Durable | None = None
        self._key = b""
        self._links: dict[str, Link] = {}
        self._names: dict[bytes, str] = {}
        self._inbox: list[tuple[Session, pb.AttachRequest | str]] = []
        self._alive: set[str] = set()
        self._aborted = -1
        self._ahead_s = 0.0  # of time.monotonic()
        self._committed_s: dict[int, float] = {}  # step -> when
        self._wake = asyncio.Event()
        self._turned_s = 0.0
        self._lenient_s = 0.0  # until when a stream that breaks is no loss
        self._knocked = False  # another one has asked
        self._expected_s = 0.0  # until when nodes of the store are waited for, and no others are taken in

    # ------------------------------------------------------------ serving

    async def serve(self, host: str, port: int) -> int:
        """Listen, TCP and UDP by one number (port 0: any); returns it. Raises PortTaken and SecurityError."""
        self._security.check_bind(host)
        tcp, self._udp = _reserve(host, port)
        port = tcp.getsockname()[1]
        tcp.close()  # gRPC would log a line of its own if it were taken
        shown = f"[{host}]" if ":" in host else host
        if not await self._server.start(f"{shown}:{port}"):
            raise PortTaken(f"{host}:{port}")
        asyncio.get_running_loop().add_reader(self._udp, self._hear_beats)
        await self._server.tell_health(leads=False)
        return port

    async def lead(self, store: Store, on_leading: Callable[[], None] = lambda: None) -> None:
        """Be the job's coordinator until the job ends, from what the store has. Raises StoreError and Superseded.

        `on_leading` is called once it is written that this one leads.
        """
        self._durable, state, self._ahead_s = await asyncio.to_thread(
            Durable.load, store, self._config, self._security.token or secrets.token_hex(16)
        )
        if self._security.token not in ("", self._durable.token):
            raise StoreError("the store is of a job with another token: give that one, or move the store away")
        self._key = beats.key_of(self._durable.token)
        self._names = {beats.name_of(node): node for node in self._durable.channels}
        self._links = {node: Link() for node in self._durable.channels}
        self.state = state or coordinator.initial_state(self._config, self.now())
        first = self._take_over(self._durable) if state is not None else []
        self.standing_by = ""
        await self._server.tell_health(leads=True)
        await self._carry_out(first)
        on_leading()
        await self._work()
        await self._see_off()

    def _take_over(self, durable: Durable) -> list[e.Effect]:
        """Go on where another coordinator stopped: its event log is continued, its nodes are waited for."""
        if self._events is not None:
            newest = _newest_number(self._events)
            self._append_events([line for line in durable.records if line["number"] > newest])
        for line in durable.records:
            self._tell(line)
        log.info("took over job %s at step %d, generation %d", self.job, self.state.committed, self.state.generation)
        self._expected_s = time.monotonic() + 2 * RETURN_S
        self._lenient_s = time.monotonic() + RETURN_S
        returned = e.Record("coordinator_returned", {"nodes": sorted(durable.channels)})
        return [returned, *self._decide(e.CoordinatorReturned(RETURN_S))]

    def _abandon(self) -> list[e.Effect]:
        """None of the nodes that the store knows has come back: its job is over, and those who come are another."""
        assert self._durable is not None
        log.warning("no node of the job in the store has come back: it is begun anew")
        for node in list(self._durable.channels):
            self._forget(node)
        self._expected_s, self._knocked = 0.0, False
        abandoned = e.Record("abandoned", {"step": self.state.committed})
        self.state = coordinator.initial_state(self._config, self.now())
        return [abandoned]

    async def stop(self) -> None:
        """Stop serving. Agents take that for a coordinator that will be back."""
        self.standing_by = "this coordinator stops"
        for link in self._links.values():
            if link.session is not None:
                link.session.end()
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp)
            self._udp.close()
        await self._server.stop(1.0)

    # ------------------------------------------------------------ called by the server

    def refusal(self) -> str:
        return self.standing_by

    def deliver(self, session: Session, request: pb.AttachRequest) -> None:
        self._inbox.append((session, request))
        self._wake.set()

    def lost(self, session: Session, why: str) -> None:
        self._inbox.append((session, why))
        self._wake.set()

    def status(self) -> str:
        state = self.state
        return json.dumps(
            {
                "job": self.job,
                "phase": state.phase.value,
                "generation": state.layout.generation if state.layout else 0,
                "committed_step": state.committed,
                "steps": state.job.steps if state.job else None,
                "layout": state.layout.describe() if state.layout else None,
                "protection": describe_protection(state.job.protection, state.placement)
                if state.job and state.placement
                else None,
                "exposure": self._exposure(),
                "checkpoint": {"steps": state.saved[0].version, "name": state.saved[0].name} if state.saved else None,
                "nodes": sorted(state.nodes),
                "workers": {str(w.id.rank): w.status.value for w in state.workers.values()},
            }
        )

    def _exposure(self) -> dict[str, float | None] | None:
        """What the loss of a node would take along: versions, and seconds since the one that outlives it was made."""
        state = self.state
        if state.placement is None or not state.placement.stripes:
            return None
        made_s = self._committed_s.get(state.protected - 1)
        seconds = round(time.monotonic() - made_s, 3) if made_s is not None else None
        return {"steps": state.committed + 1 - state.protected, "seconds": seconds}

    # ------------------------------------------------------------ beats

    def _hear_beats(self) -> None:
        assert self._udp is not None
        for _ in range(DATAGRAMS):
            try:
                data, address = self._udp.recvfrom(beats.DATAGRAM_BYTES + 1)
            except OSError:  # there are no more, or an earlier answer was refused
                return
            beat = beats.unpack_beat(self._key, data) if self._durable is not None else None
            node = self._names.get(beat.node) if beat is not None else None
            if beat is None or node is None or beat.stamp <= self._links[node].stamp:
                continue
            link = self._links[node]
            link.address, link.stamp = address, beat.stamp
            self._alive.add(node)
            assert self._durable is not None
            self._durable.acknowledge(node, beat.received)
            self._echo(node, link)

    def _echo(self, node: str, link: Link, aborted: int = -1) -> None:
        assert self._udp is not None
        assert self._durable is not None
        if link.address is None:
            return
        echo = beats.Echo(beats.name_of(node), link.stamp, self._durable.channels[node].kept, aborted)
        try:
            self._udp.sendto(beats.pack_echo(self._key, echo), link.address)
        except OSError:
            link.address = None  # it cannot be reached so: the stream tells

    # ------------------------------------------------------------ the turns

    def now(self) -> float:
        """The clock of the state's times."""
        return time.monotonic() + self._ahead_s

    async def _work(self) -> None:
        """Turn by turn: take in what has come, decide, write, tell. Until the job is over."""
        assert self._durable is not None
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
        if self._expected_s and self._alive:
            self._expected_s, self._knocked = 0.0, False
        elif self._knocked and time.monotonic() > self._expected_s:
            effects += self._abandon()
        if self._alive:
            alive, self._alive = tuple(self._alive), set()
            for listener in self.listeners.heartbeats:
                listener(len(alive))
            effects += self._decide(e.HeartbeatsReceived(alive))
        if self._rendezvous.over():
            effects += self._decide(e.RendezvousClosed())
        return effects + self._decide(e.Ticked())

    def _decide(self, event: e.Event) -> list[e.Effect]:
        self.state, effects = coordinator.step(self.state, event, self.now())
        return effects

    def _fail(self, error: Exception) -> e.EndJob:
        self.state = replace(self.state, phase=Phase.DONE)
        return e.EndJob(False, f"the coordinator failed, a bug of everstep: {error!r}", traceback.format_exc())

    def _take(self, session: Session, item: pb.AttachRequest | str) -> list[e.Effect]:
        """What a message leads to: each once, in the order of its numbers, and only from a node that is in the job."""
        assert self._durable is not None
        if isinstance(item, str):
            return self._gone(session, item)
        if item.WhichOneof("body") == "hello":
            self._greet(session, item.hello)
            return []
        link = self._links.get(session.node)
        if link is None or link.session is not session:
            return []  # has not said hello, or was declared lost: nothing it says counts
        if item.WhichOneof("body") == "heartbeat":
            self._durable.acknowledge(session.node, item.heartbeat.received)
            self._alive.add(session.node)
            kept = self._durable.channels[session.node].kept
            session.send(pb.AttachResponse(heartbeat=pb.Heartbeat(received=kept)))
            return []
        if item.WhichOneof("body") == "telemetry":
            for listener in self.listeners.telemetry:
                listener(session.node, item.telemetry)
            return []
        seen = self._durable.channels[session.node].seen
        if item.number <= seen:
            return []  # said again
        try:
            if item.number != seen + 1:
                raise ValueError(f"message {item.number} came after {seen}")
            event = agent_event(session.node, item, self._local)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return self._expel(session, f"it said what no agent says: {error!r}")
        self._durable.saw(session.node, item.number)
        return self._decide(event) if event is not None else []

    def _gone(self, session: Session, why: str) -> list[e.Effect]:
        """A stream that breaks while its coordinator lives is a node that is lost."""
        link = self._links.get(session.node)
        if link is None or link.session is not session:
            return []
        if time.monotonic() < self._lenient_s:
            link.session = None  # it may have given us up while we slept; if it is gone, its beats are missed
            return []
        self._forget(session.node)
        return self._decide(e.NodeLost(session.node, why))

    def _expel(self, session: Session, why: str) -> list[e.Effect]:
        log.warning("node %s is expelled: %s", session.node, why)
        session.send(pb.AttachResponse(refused=pb.Refused(why=why)))
        session.end()
        return self._gone(session, why)

    def _forget(self, node: str) -> None:
        assert self._durable is not None
        self._durable.close(node)
        self._names.pop(beats.name_of(node), None)
        self._links.pop(node, None)

    def _local(self, stamp: float) -> float:
        """A node's time by our clock; 0 for one of another machine."""
        return stamp + self._ahead_s if 0 <= time.monotonic() - stamp <= CLOCK_TRUST_S else 0.0

    # ------------------------------------------------------------ nodes that come

    def _greet(self, session: Session, hello: pb.Hello) -> None:
        """Welcome a node, new or returning. One that returns and is not known any more was declared lost."""
        assert self._durable is not None
        why = self._refusal(hello)
        channel = self._durable.channels.get(hello.node)
        if why and hello.returning:
            log.warning("node %s cannot come back: %s", hello.node, why)  # it trains, and looks for its coordinator
        elif why:
            session.send(pb.AttachResponse(refused=pb.Refused(why=why)))
        elif channel is None and not hello.returning and self._expected_s:
            self._knocked = True  # it will ask again
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
        assert self._durable is not None
        if hello.job != self.job or hello.protocol != PROTOCOL:
            return (
                f"this coordinator runs job {self.job!r}, protocol {PROTOCOL}; the node asked for {hello.job!r}, "
                f"protocol {hello.protocol}"
            )
        must_show = self._security.token or hello.returning
        if must_show and not secrets.compare_digest(hello.token_digest, digest_of(self._durable.token)):
            return "its token is not this job's: give every node the same EVERSTEP_JOB_TOKEN or EVERSTEP_TOKEN_FILE"
        return ""

    def _may_return(self, hello: pb.Hello, channel: Channel) -> bool:
        """A node whose stream broke without our noticing, or with the coordinator before us."""
        return hello.returning or (self._links[hello.node].session is None and channel.seen == 0)

    def _welcome(self, session: Session, hello: pb.Hello, channel: Channel) -> None:
        assert self._durable is not None
        session.node = hello.node
        link = self._links.setdefault(hello.node, Link())
        former, link.session = link.session, session
        if former is not None:
            former.end()
        self._names[beats.name_of(hello.node)] = hello.node
        self._alive.add(hello.node)
        self._durable.acknowledge(hello.node, hello.received)
        welcome = pb.Welcome(token=self._durable.token, received=channel.seen)
        session.send(pb.AttachResponse(welcome=welcome))
        for number in sorted(channel.pending):
            session.send(pb.AttachResponse.FromString(channel.pending[number]))

    # ------------------------------------------------------------ carrying out

    async def _carry_out(self, effects: list[e.Effect]) -> None:
        """Write first, then tell."""
        assert self._durable is not None
        orders: list[tuple[str, pb.AttachResponse]] = []
        records: list[dict[str, Any]] = []
        for effect in effects:
            if isinstance(effect, e.Record):
                records.append(self._record({"event": effect.event, **effect.fields}))
            else:
                orders += self._orders(effect)
                if isinstance(effect, e.EndJob):
                    ended = {"event": "ended", "succeeded": effect.succeeded, "why": effect.why}
                    records.append(self._record(ended))
        if not self._durable.due():
            return
        seen = {node: channel.seen for node, channel in self._durable.channels.items()}
        rows = self._durable.gather(self.state, self.now())
        await self._write(rows, sync=bool(orders))
        self._durable.kept(seen)
        self._abort_at_once(effects)
        for node, message in orders:
            link = self._links.get(node)
            if link is not None and link.session is not None:
                link.session.send(message)
        for effect in effects:
            if isinstance(effect, e.FenceNode | e.RefuseNode):
                self._turn_away(effect)
        self._append_events(records)
        for line in records:
            self._tell(line)

    async def _write(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        """Until it is written: a store that is away for a while holds decisions up, and nothing else."""
        assert self._durable is not None
        told = False
        while True:
            try:
                await asyncio.to_thread(self._durable.write, rows, sync=sync)
                return
            except StoreError as error:
                if not told:
                    log.warning("nothing can be decided until the store is back: %s", error)
                told = True
                self._durable.check()
                await asyncio.sleep(STORE_RETRY_S)

    def _orders(self, effect: e.Effect) -> list[tuple[str, pb.AttachResponse]]:
        """What an effect has nodes told, numbered."""
        assert self._durable is not None
        if isinstance(effect, e.EndJob):
            end = {"succeeded": effect.succeeded, "why": effect.why, "detail": effect.detail, "rank": effect.rank}
            found = [(node, pb.AttachResponse(end=pb.EndJob(**end))) for node in self._durable.channels]
        elif (to_worker := worker_order(effect)) is not None:
            known = self.state.workers.get(to_worker[0].rank)
            found = [(known.node, to_worker[1])] if known is not None else []
        else:
            to_node = order(effect)
            found = [to_node] if to_node is not None else []
        return [(node, message) for node, message in found if self._durable.order(node, message)]

    def _abort_at_once(self, effects: list[e.Effect]) -> None:
        """Datagrams are ten times faster than streams; nodes of which every worker has to stop get one first."""
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
            if count == workers[node] and node in self._links:
                self._echo(node, self._links[node], generation)

    def _turn_away(self, effect: e.FenceNode | e.RefuseNode) -> None:
        link = self._links.get(effect.node)
        if link is not None and link.session is not None:
            if isinstance(effect, e.FenceNode):
                link.session.send(pb.AttachResponse(fence=pb.Fence(why=effect.why)))
            else:
                link.session.send(pb.AttachResponse(refused=pb.Refused(why=effect.why)))
            link.session.end()
        self._forget(effect.node)

    async def _see_off(self) -> None:
        """The job is over: wait until every node has heard so, those that are away for a while too."""
        assert self._durable is not None
        deadline = time.monotonic() + END_S
        while self._durable.channels and time.monotonic() < deadline:
            for link in self._links.values():
                if link.session is not None:
                    link.session.end()
            await asyncio.sleep(0.02)
            inbox, self._inbox = self._inbox, []
            for session, item in inbox:
                if isinstance(item, str) and self._links.get(session.node, Link()).session is session:
                    self._forget(session.node)
                elif not isinstance(item, str) and item.WhichOneof("body") == "hello":
                    self._greet(session, item.hello)

    # ------------------------------------------------------------ the event log

    def _record(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert self._durable is not None
        return self._durable.record({"at_s": time.monotonic(), **fields})

    def _append_events(self, lines: list[dict[str, Any]]) -> None:
        """To the user's file."""
        if self._events is None or not lines:
            return
        with self._events.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _tell(self, line: Mapping[str, Any]) -> None:
        if line["event"] == "committed":
            self._committed_s[line["step"]] = line["at_s"]
            self._committed_s.pop(line["step"] - REMEMBERED_STEPS, None)
        for listener in self.listeners.record:
            listener(line)


def _newest_number(path: Path) -> int:
    """The number of an event log's last line; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - (64 << 10)))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["number"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _reserve(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket by one number. Raises PortTaken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(100):
        try:
            tcp = socket.create_server((host, port), family=family)
        except OSError:
            break
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            udp.bind((host, tcp.getsockname()[1]))
        except OSError:
            tcp.close()
            udp.close()
            if port:
                break
            continue
        udp.setblocking(False)
        return tcp, udp
    raise PortTaken(f"{host}:{port}")
