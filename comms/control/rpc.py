"""The gRPC shell of the control plane: channels and stubs, and the server that a coordinator answers on.

The server is asyncio: ten thousand idle streams cost memory, and no threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

# A coordinator is a fork of its launcher, and starts gRPC after that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or every stranger is a line in the log

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from everstep.comms.base.security import NAME, TOKEN_ASKED, Security

from . import everstep_pb2 as pb
from .differences import DifferenceSender
from .everstep_pb2_grpc import (
    CoordinatorServiceServicer,
    CoordinatorServiceStub,
    add_CoordinatorServiceServicer_to_server,
)

MESSAGE_BYTES = 256 << 20  # the largest message: a plan with its placement, for thousands of shards
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
]
# Calls that the event loop has not accepted yet. By default gRPC's core cancels some beyond 1,000 and all beyond 3,000;
# more agents than that may reconnect at once after a coordinator has taken over.
BURST: list[tuple[str, Any]] = [
    ("grpc.server.max_pending_requests", 30_000),
    ("grpc.server.max_pending_requests_hard_limit", 60_000),
]
# A coordinator that was killed is back within the second that gRPC by itself waits before it tries again.
IMPATIENT: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
SERVICE = "everstep.v1.CoordinatorService"
STANDS_BY = ("everstep-stands-by", "1")  # sent with UNAVAILABLE: this coordinator answers, but another one leads
HEALTHY, STANDING_BY = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Busy(Exception):
    """Another such request is being served: try again."""


def stands_by(error: grpc.RpcError) -> bool:
    """Whether it was a coordinator that refused, because it does not lead; else none may be there."""
    return any(item.key == STANDS_BY[0] for item in error.trailing_metadata() or ())


def channel_to(address: str, security: Security) -> grpc.Channel:
    """A channel to a coordinator; mutual TLS where there are certificates."""
    options = [*OPTIONS, *IMPATIENT, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    credentials = security.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", NAME)])


def stub(channel: grpc.Channel) -> Any:
    return CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]


class Session:
    """The coordinator's end of one agent's stream."""

    def __init__(self) -> None:
        self.node = ""
        self._outgoing: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self._orders = DifferenceSender()

    def attach(self, node: str) -> None:
        """The agent of this node has said hello."""
        self.node = node

    def send(self, message: pb.AttachResponse) -> None:
        self._outgoing.put_nowait(self._orders.reduce(message))

    def end(self) -> None:
        """End the stream after the queued messages."""
        self._outgoing.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.AttachResponse]:
        while (message := await self._outgoing.get()) is not None:
            yield message


class Shell(Protocol):
    """The coordinator's interface to a server; called in the event loop only."""

    def refusal(self) -> str:
        """Why this coordinator cannot answer now; empty if it can."""

    def deliver(self, session: Session, request: pb.AttachRequest) -> None:
        """A message from an agent."""

    def lost(self, session: Session, why: str) -> None:
        """An agent's stream ended."""

    def status(self) -> str:
        """A summary, as JSON. Called in another thread."""

    def view(self, steps: int, rank_steps: int) -> str:
        """The complete view, as JSON. Called in another thread."""

    def trace(self, steps: int) -> AsyncGenerator[pb.GetTraceResponse, None]:
        """The spans of all ranks in the last steps. Raises Busy while another client is served."""

    def order(self, request: pb.OrderRequest) -> pb.OrderResponse:
        """Take an operator's order, or say why not."""


class Servicer(CoordinatorServiceServicer):
    """Turns streams into calls of a shell."""

    def __init__(self, shell: Shell, security: Security) -> None:
        self._shell = shell
        self._security = security
        self._viewer = ThreadPoolExecutor(1, "everstep-viewer")  # one view at a time: for a large job it takes long
        # Only these references keep a task that waits for gRPC alive: else the garbage collector would end its stream.
        self._tasks: set[tuple[asyncio.Task[Any] | None, asyncio.Task[None]]] = set()

    async def Attach(self, requests: AsyncIterator[pb.AttachRequest], context: Any) -> None:
        await self._available(context)
        session = Session()
        reader = asyncio.create_task(self._read(session, requests))
        tasks = (asyncio.current_task(), reader)
        self._tasks.add(tasks)
        try:
            async for message in session.messages():
                await context.write(message)
        finally:
            self._tasks.discard(tasks)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            self._shell.lost(session, "its stream ended")

    async def _read(self, session: Session, requests: AsyncIterator[pb.AttachRequest]) -> None:
        try:
            async for request in requests:
                self._shell.deliver(session, request)
        except grpc.RpcError:
            pass  # the stream broke; `finally` reports its end
        finally:
            session.end()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        await self._admitted(context)
        await self._available(context)
        loop, wanted = asyncio.get_running_loop(), (request.steps, request.rank_steps)
        text = await loop.run_in_executor(self._viewer, self._shell.status)
        view = await loop.run_in_executor(self._viewer, self._shell.view, *wanted) if any(wanted) else ""
        return pb.GetStatusResponse(json=text, view=view)

    async def GetTrace(self, request: pb.GetTraceRequest, context: Any) -> AsyncIterator[pb.GetTraceResponse]:
        await self._admitted(context)
        await self._available(context)
        try:
            async with contextlib.aclosing(self._shell.trace(request.steps)) as parts:
                async for part in parts:
                    yield part
        except Busy as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def Order(self, request: pb.OrderRequest, context: Any) -> pb.OrderResponse:
        await self._admitted(context)
        await self._available(context)
        return self._shell.order(request)

    async def _admitted(self, context: Any) -> None:
        if not self._security.admits_call(context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, TOKEN_ASKED)

    async def _available(self, context: Any) -> None:
        why = self._shell.refusal()
        if why:
            await context.abort(grpc.StatusCode.UNAVAILABLE, why, (STANDS_BY,))


class Server:
    """A coordinator's gRPC server, with the standard health service (grpc.health.v1)."""

    def __init__(self, shell: Shell, security: Security) -> None:
        self.aio = grpc.aio.server(options=[*OPTIONS, *BURST, ("grpc.so_reuseport", 0)])
        self._security = security
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        add_CoordinatorServiceServicer_to_server(Servicer(shell, security), self.aio)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.aio)

    async def start(self, address: str) -> int:
        """Serve at `host:port`; returns the port, or 0 if it is taken."""
        credentials = self._security.server_credentials()
        try:
            if credentials is None:
                port = self.aio.add_insecure_port(address)
            else:
                port = self.aio.add_secure_port(address, credentials)
        except RuntimeError:
            return 0
        if port:
            await self.aio.start()
        return port

    async def tell_health(self, *, leads: bool) -> None:
        """What the health service answers: of the process, that it lives; of the service, whether it leads."""
        await self._health.set("", HEALTHY)
        await self._health.set(SERVICE, HEALTHY if leads else STANDING_BY)

    async def stop(self, grace_s: float) -> None:
        await self.aio.stop(grace_s)
