"""A coordinator's server: it listens, is a standby, and leads once it holds the store."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from everstep.agents.base.strict_json import dumps
from everstep.agents.monitoring.observer import Observer
from everstep.agents.monitoring.views import summary_of, to_json
from everstep.agents.rendezvous.service import Rendezvous
from everstep.comms.base import addresses
from everstep.comms.base.security import Security
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.rpc import Server, Session
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol.events import RendezvousClosed
from everstep.elastic.protocol.state import Config, State

from .durable import Durable
from .eventlog import EventLog, Listeners, harmless
from .leader import Leader
from .node_sessions import NodeSessions
from .orders import OperatorOrders
from .span_collector import SpanCollector
from .store import StateStore, StateStoreError

VIEW_STEPS = 1000  # the most that a client may request


NOBODY = -1  # the proxy that listens before the coordinator
LOOPBACK = "127.0.0.1"
RECEIVED_BYTES = 4 << 20  # receive buffer for heartbeats, in bytes; the system may allow less


class PortTaken(Exception):
    """The coordinator's address is in use."""


class NoSuchAddress(Exception):
    """The coordinator cannot listen at its address: it belongs to another machine, or permission is denied."""


class Coordinator:
    """One job's coordinator. All of it runs in one event loop; nothing is served before `lead`."""

    def __init__(self, job: str, config: Config, security: Security, *, events: Path | None = None) -> None:
        self.job = job
        self.listeners = Listeners()
        self.standing_by = "this coordinator has just started: try again"
        self.observer = Observer(job, lambda: self.state, self.now, undecided=lambda: self.undecided)
        self.listeners.record.append(harmless(self.observer.heard))
        self.listeners.heartbeats.append(harmless(self.observer.heartbeat))
        self.listeners.telemetry.append(harmless(self.observer.told))
        self._spans = SpanCollector(self._tell)
        self._orders = OperatorOrders()
        self._config = config
        self._security = security
        self._events = EventLog(events, self.listeners)
        self._server = Server(self, security)
        self._rendezvous = Rendezvous(job, security, self.refusal)
        self._rendezvous.serve(self._server.aio)
        self._udp: socket.socket | None = None
        self._links: NodeSessions | None = None
        self._leader: Leader | None = None
        self._nothing = coordinator.initial_state(config, 0.0)

    @property
    def state(self) -> State:
        """Its current state; immutable."""
        return self._leader.state if self._leader is not None else self._nothing

    @property
    def undecided(self) -> str:
        """Why this coordinator decides nothing now: another one leads, or the store is down. Empty if it decides."""
        return self.standing_by or (self._leader.held_up if self._leader is not None else "")

    def now(self) -> float:
        """The clock of the state's times."""
        return self._leader.now() if self._leader is not None else time.monotonic()

    # ------------------------------------------------------------ serving

    async def serve(self, host: str, port: int, behind: int = NOBODY) -> int:
        """Listen, TCP and UDP by one number (0: any); returns it. Raises PortTaken, NoSuchAddress and SecurityError.

        `behind`: a proxy listens there and forwards the coordinator's traffic to this loopback port, which is returned.
        """
        self._security.check_bind(host)
        if behind != NOBODY:
            self._udp = _datagrams(host, port)
            return await self._start(LOOPBACK, behind)
        tcp, self._udp = _reserve(host, port)
        port = tcp.getsockname()[1]
        tcp.close()  # gRPC would log a line of its own if it were taken
        return await self._start(host, port)

    async def _start(self, host: str, port: int) -> int:
        served = await self._server.start(addresses.join(host, port))
        if not served:
            raise PortTaken(addresses.join(host, port))
        await self._server.tell_health(leads=False)
        return served

    async def lead(self, store: StateStore, on_leading: Callable[[], None] = lambda: None) -> None:
        """Lead the job from the stored state until it ends. Raises StateStoreError and Superseded.

        `on_leading` is called once it is written that this one leads.
        """
        assert self._udp is not None, "serve first"
        token = self._security.token or secrets.token_hex(16)
        durable, state, ahead_s = await asyncio.to_thread(Durable.load, store, self._config, token)
        if self._security.token not in ("", durable.token):
            raise StateStoreError("the store is of a job with another token: give that one, or move the store away")
        self._links = NodeSessions(durable, self._udp)
        self._leader = Leader(
            self.job,
            self._config,
            self._security,
            durable,
            self._links,
            self._events,
            self.listeners,
            polls=(self._rendezvous_over, harmless(self.observer.poll), self._orders.poll),
        )
        self._links.listen()
        self.standing_by = ""
        await self._server.tell_health(leads=True)
        await self._leader.lead(state, ahead_s, on_leading)

    def _rendezvous_over(self) -> RendezvousClosed | None:
        return RendezvousClosed() if self._rendezvous.over() else None

    def stand_by(self, why: str) -> None:
        """This coordinator does not lead, and waits until it may."""
        self.standing_by = f"this coordinator stands by: {why}"

    async def stop(self) -> None:
        """Stop serving. Agents take that for a coordinator that will be back."""
        self.standing_by = "this coordinator stops"
        if self._links is not None:
            self._links.close()
        if self._udp is not None:
            self._udp.close()
        await self._server.stop(1.0)

    # ------------------------------------------------------------ called by the server

    def refusal(self) -> str:
        return self.standing_by

    def deliver(self, session: Session, request: pb.AttachRequest) -> None:
        if self._leader is None:
            return
        if request.WhichOneof("body") == "spans":
            if self._links is not None and self._links.session(session.node) is session:
                self._spans.heard(session.node, request.spans)
            return
        self._leader.put(session, request)

    def lost(self, session: Session, why: str) -> None:
        if self._leader is not None:
            self._leader.put(session, why)

    def status(self) -> str:
        return to_json(summary_of(self.observer.view(0, 0)))

    def view(self, steps: int, rank_steps: int) -> str:
        return to_json(self.observer.view(min(steps, VIEW_STEPS), min(rank_steps, VIEW_STEPS)))

    async def trace(self, steps: int) -> AsyncGenerator[pb.GetTraceResponse, None]:
        first = max(0, self.state.committed + 1 - max(1, steps))
        clock = {"at_s": time.monotonic(), "unix_s": time.time()}
        nodes = {name: node.host for name, node in self.state.nodes.items()}
        head = {"job": self.job, "first_step": first, "nodes": nodes, **clock}
        yield pb.GetTraceResponse(head=dumps(head))
        async with contextlib.aclosing(self._spans.collect(sorted(nodes), first)) as pieces:
            async for node, spans in pieces:
                yield pb.GetTraceResponse(node=node, spans=spans)
        view = self.observer.view(steps, 0)
        told = {name: view.get(name, []) for name in ("recoveries", "events", "series")}
        yield pb.GetTraceResponse(tail=dumps({**told, "silent": self._spans.silent}))

    def order(self, request: pb.OrderRequest) -> pb.OrderResponse:
        return self._orders.take(request, self.state)

    def _tell(self, node: str, message: pb.AttachResponse) -> bool:
        """Send a node a message without a number; returns whether the node is connected."""
        session = self._links.session(node) if self._links is not None else None
        if session is not None:
            session.send(message)
        return session is not None


def _reserve(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket by one number. Raises PortTaken and NoSuchAddress.

    UDP is bound first: it reserves the number among our processes while the TCP port is released for a moment, until
    gRPC listens on it.
    """
    for _ in range(1 if port else 100):
        try:
            udp = _datagrams(host, port)
        except PortTaken:
            continue
        try:
            return addresses.listen(host, udp.getsockname()[1]), udp
        except OSError as error:
            udp.close()
            if error.errno != errno.EADDRINUSE:
                raise _no_such(host, port, error) from None
    raise PortTaken(addresses.join(host, port))


def _datagrams(host: str, port: int) -> socket.socket:
    """A UDP socket. Raises PortTaken and NoSuchAddress."""
    udp: socket.socket | None = None
    try:
        family, place = addresses.resolve(host, port, socket.SOCK_DGRAM)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind(place)
    except OSError as error:
        if udp is not None:
            udp.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(addresses.join(host, port)) from None
        raise _no_such(host, port, error) from None
    udp.setblocking(False)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED_BYTES)
    return udp


def _no_such(host: str, port: int, error: OSError) -> NoSuchAddress:
    why = (error.strerror or str(error)).partition(" (while ")[0]  # which repeats the address
    return NoSuchAddress(f"cannot listen at {addresses.join(host, port)}: {why}")
