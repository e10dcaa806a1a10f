"""The gRPC shell of the control plane: the agent's stream, and the server that coordinators answer on."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from . import everstep_pb2 as pb
from .everstep_pb2_grpc import (
    CoordinatorServiceServicer,
    CoordinatorServiceStub,
    add_CoordinatorServiceServicer_to_server,
)

_LIMITS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
]
_PROXY: list[tuple[str, int]] = [("grpc.enable_http_proxy", 0)]


def _stub(channel: grpc.Channel) -> Any:
    return CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]


class Unreachable(Exception):
    """No coordinator answers at the address."""


class AgentStream:
    """A node agent's stream to the coordinator. `send` is callable from any thread; nothing here blocks.

    Messages arrive in a queue; `wake_fd` becomes readable when there are some. The end of the stream arrives as a
    string that says why.
    """

    def __init__(self, address: str, connect_timeout_s: float) -> None:
        self._channel = grpc.insecure_channel(address, options=_LIMITS + _PROXY)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=connect_timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise Unreachable(address) from None
        self._outgoing: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.AttachResponse | str] = queue.SimpleQueue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._call = _stub(self._channel).Attach(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read, name="everstep-stream", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        why = "it closed the stream"
        try:
            for message in self._call:
                self._put(message)
        except grpc.RpcError as error:
            details = getattr(error, "details", None)  # an error of a call is a grpc.Call too
            why = str(details() if details else error)
        self._put(why)

    def _put(self, message: pb.AttachResponse | str) -> None:
        self._incoming.put(message)
        try:
            os.eventfd_write(self.wake_fd, 1)
        except OSError:
            return  # closed

    def received(self) -> Iterator[pb.AttachResponse | str]:
        """Everything that has come."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        while True:
            try:
                yield self._incoming.get_nowait()
            except queue.Empty:
                return

    def send(self, **body: Any) -> None:
        """Send an AttachRequest with this body."""
        self._outgoing.put(pb.AttachRequest(**body))

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join(timeout=5)
        os.close(self.wake_fd)


class Session:
    """The coordinator's end of one agent's stream."""

    def __init__(self) -> None:
        self.node = ""
        self.outgoing: queue.SimpleQueue[pb.AttachResponse | None] = queue.SimpleQueue()

    def send(self, **body: Any) -> None:
        self.outgoing.put(pb.AttachResponse(**body))

    def end(self) -> None:
        """Let the stream end after what is queued."""
        self.outgoing.put(None)


class Servicer(CoordinatorServiceServicer):
    """Turns streams into calls: `attach(session, hello)` at first, then `deliver(session, message)`, then `lost`."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def Attach(self, request_iterator: Iterator[pb.AttachRequest], context: Any) -> Iterator[pb.AttachResponse]:
        session = Session()
        reader = threading.Thread(target=self._read, args=(session, request_iterator), daemon=True)
        reader.start()
        context.add_callback(session.end)
        yield from iter(session.outgoing.get, None)

    def _read(self, session: Session, requests: Iterator[pb.AttachRequest]) -> None:
        why = "its stream ended"
        try:
            for request in requests:
                self._shell.deliver(session, request)
        except Exception as error:  # grpc raises bare Exception subclasses when a stream breaks
            why = f"its stream broke ({type(error).__name__})"
        self._shell.lost(session, why)
        session.end()

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(json=self._shell.status())


def serve(address: str, shell: Any, max_agents: int = 256) -> tuple[grpc.Server, int] | None:
    """Serve a coordinator at `host:port` (port 0: any); None if the port is taken."""
    options = [*_LIMITS, ("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_agents + 8), options=options)
    add_CoordinatorServiceServicer_to_server(Servicer(shell), server)  # type: ignore[no-untyped-call]
    host, _, number = address.rpartition(":")
    try:
        socket.create_server((host, int(number))).close()  # gRPC would log a line of its own
        port = server.add_insecure_port(address)
    except (RuntimeError, OSError):
        return None
    if port == 0:
        return None
    server.start()
    return server, port


def get_status(address: str, timeout_s: float) -> str:
    """The coordinator's status, as JSON."""
    with grpc.insecure_channel(address, options=_PROXY) as channel:
        try:
            response = _stub(channel).GetStatus(pb.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError:
            raise Unreachable(address) from None
        return str(response.json)
