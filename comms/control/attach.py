"""A node agent's connection to its job's coordinator; it survives changes of the coordinator process.

Messages are numbered and kept until a coordinator has written them to its store; after a broken stream they are sent
again, and the coordinator skips duplicates. Orders are delivered in the same way. So each message and each order takes
effect exactly once and in order, however often coordinators die.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from everstep.comms.base import addresses
from everstep.comms.base.security import Security, digest_of

from . import beats
from . import everstep_pb2 as pb
from .differences import BadDifference, DifferenceReceiver
from .rpc import channel_to, stub

PROTOCOL = 10  # version of the streams between agents and coordinator, including the workers' messages
BEAT_S = 0.25  # heartbeat interval until the coordinator sets it
BUSY_S = 10.0
SILENT_S = 3.0  # silence after which another coordinator is tried, if there are several
QUIET_S = 1.0  # time without an echo after which heartbeats use the stream as well
RETRY_S = 0.2  # between tries to reach a coordinator
CONNECT_S = 1.0  # for one try
ANSWER_MESSAGES = 1024  # unsent answers that are kept; they are never retransmitted
OUTBOX_MESSAGES, OUTBOX_BYTES = 100_000, 1 << 30  # kept while there is no coordinator; a node that exceeds these ends


class Unreachable(Exception):
    """No coordinator answers."""


@dataclass(frozen=True)
class Broken:
    """The stream ended; another try is under way."""

    why: str


@dataclass(frozen=True)
class AbortHeard:
    """The coordinator's echo reports that all generations before this one are over."""

    generation: int


Heard = pb.AttachResponse | Broken | AbortHeard


class Attachment:
    """Everything between an agent and its coordinators. Methods may be called from any thread, and do not block.

    `received()` yields what has arrived; `wake_fd` is readable when there is something. `heard_s` is the time of the
    coordinator's last sign of life (CLOCK_MONOTONIC).
    """

    def __init__(self, addresses: Sequence[str], job: str, security: Security) -> None:
        self.addresses = tuple(addresses)
        self.job = job
        self.heard_s = time.monotonic()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._security = security
        self._incoming: queue.SimpleQueue[tuple[int, Heard]] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._lives = 0  # incremented with every new name: messages for an older name are dropped
        self._node = ""
        self._outbox: deque[pb.AttachRequest] = deque()
        self._outbox_bytes = 0
        self._number = 0
        self._received = 0  # the number of the last order
        self._beat_s = BEAT_S
        self._welcomed = False  # under this name, ever
        self._attached = False  # now
        self._token = ""
        self._address = ""
        self._aborted = -1
        self._turned_s = 0.0  # when the agent's loop last ran
        self._beat_due = False  # through the stream
        self._passing: pb.AttachRequest | None = None  # the newest best-effort message
        self._answers: deque[pb.AttachRequest] = deque(maxlen=ANSWER_MESSAGES)  # best-effort too, but none is replaced
        self._closing = threading.Event()
        self._call: Any = None
        self._threads = [
            threading.Thread(target=self._attach_always, name="everstep-stream", daemon=True),
            threading.Thread(target=self._beat, name="everstep-heartbeat", daemon=True),
        ]

    def reach(self, timeout_s: float, on_wait: Callable[[], None] = lambda: None) -> str:
        """The first address at which a coordinator answers. Raises Unreachable."""
        deadline = time.monotonic() + timeout_s
        while True:
            for address in self.addresses:
                with contextlib.suppress(Unreachable):
                    _ready(address, self._security, min(CONNECT_S, max(0.05, deadline - time.monotonic()))).close()
                    return address
            if time.monotonic() > deadline:
                raise Unreachable(", ".join(self.addresses))
            on_wait()
            time.sleep(RETRY_S)

    def start(self, node: str) -> None:
        """Join as a node of this name; retries until `close`."""
        self.rename(node)
        for thread in self._threads:
            thread.start()

    def rename(self, node: str) -> None:
        """Join again under a new name; drops the messages and orders of the old one."""
        with self._lock:
            self._lives += 1
            self._node = node
            self._outbox.clear()
            self._outbox_bytes = 0
            self._number = self._received = 0
            self._welcomed = self._attached = False
            self._token, self._aborted = "", -1
            call = self._call
            self._lock.notify_all()
        if call is not None:
            call.cancel()

    def send(self, **body: Any) -> None:
        """Send a message (an AttachRequest's body); it takes effect exactly once, even if the coordinator changes."""
        with self._lock:
            self._number += 1
            self._outbox.append(pb.AttachRequest(number=self._number, **body))
            self._outbox_bytes += self._outbox[-1].ByteSize()
            self._lock.notify_all()

    @property
    def security(self) -> Security:
        return self._security

    def mention(self, **body: Any) -> None:
        """Send best-effort: never retransmitted; a newer message replaces an unsent one."""
        with self._lock:
            self._passing = pb.AttachRequest(**body)
            self._lock.notify_all()

    def answer(self, **body: Any) -> None:
        """Answer an order that has no number: the pieces are sent in order on the current stream, if there is one."""
        with self._lock:
            if self._attached:
                self._answers.append(pb.AttachRequest(**body))
                self._lock.notify_all()

    @property
    def overflowed(self) -> bool:
        """Whether more unsent messages are queued than are kept."""
        return len(self._outbox) > OUTBOX_MESSAGES or self._outbox_bytes > OUTBOX_BYTES

    @property
    def attached(self) -> bool:
        """Whether a coordinator has welcomed this node, and the stream lasts."""
        return self._attached

    def alive(self) -> None:
        """The agent's loop runs; heartbeats stop when it has not run for `BUSY_S`."""
        self._turned_s = time.monotonic()

    def received(self) -> Iterator[Heard]:
        """Everything that has arrived since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        while True:
            try:
                life, item = self._incoming.get_nowait()
            except queue.Empty:
                return
            if life == self._lives:
                yield item

    def close(self) -> None:
        """End the stream and the threads."""
        self._closing.set()
        with self._lock:
            call = self._call
            self._lock.notify_all()
        if call is not None:
            call.cancel()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)
        os.close(self.wake_fd)

    # ------------------------------------------------------------ the stream

    def _put(self, life: int, item: Heard) -> None:
        self._incoming.put((life, item))
        with contextlib.suppress(OSError):  # closed
            os.eventfd_write(self.wake_fd, 1)

    def _attach_always(self) -> None:
        while not self._closing.is_set():
            for address in self.addresses:
                life = self._lives
                why, attached = self._attach_once(address, life)
                if attached and not self._closing.is_set():
                    self._put(life, Broken(why))
            self._closing.wait(RETRY_S)

    def _attach_once(self, address: str, life: int) -> tuple[str, bool]:
        """One stream, from its beginning to its end: why it ended, and whether there was a welcome."""
        try:
            channel = _ready(address, self._security, CONNECT_S)
        except Unreachable:
            return "no coordinator answers", False
        welcomed = threading.Event()
        call = stub(channel).Attach(self._requests(life, welcomed))
        with self._lock:
            self._call = call
        try:
            why = self._read(call, address, life, welcomed)
        finally:
            with self._lock:
                self._call = None
                if self._lives == life:
                    self._attached = False
                self._answers.clear()
                self._lock.notify_all()
            call.cancel()
            channel.close()
        return why, welcomed.is_set()

    def _read(self, call: Any, address: str, life: int, welcomed: threading.Event) -> str:
        orders = DifferenceReceiver()  # the coordinator sends a whole order first on each stream
        try:
            for message in call:
                if self._lives != life or self._closing.is_set():
                    break
                self.heard_s = time.monotonic()
                orders.restore(message)
                if message.WhichOneof("body") == "heartbeat":
                    self._kept(message.heartbeat.received)
                    continue
                self._take(message, address, life, welcomed)
        except grpc.RpcError as error:
            details = getattr(error, "details", None)  # an error of a call is a grpc.Call too
            return str(details() if details else error)
        except BadDifference as error:
            return f"an order is damaged: {error}"  # and sent again, whole, on the next stream
        return "it closed the stream"

    def _take(self, message: pb.AttachResponse, address: str, life: int, welcomed: threading.Event) -> None:
        """Pass an order to the agent, unless it is a duplicate."""
        with self._lock:
            if self._lives != life or (message.number and message.number <= self._received):
                return
            self._received = max(self._received, message.number)
            if message.WhichOneof("body") == "welcome":
                self._token, self._address = message.welcome.token, address
                self._attached = True
                again, self._welcomed = self._welcomed, True
                self._beat_s = message.welcome.beat_s
                self._drop(message.welcome.received)
                welcomed.set()
                self._lock.notify_all()
                if again:
                    return  # the agent has the welcome already
        self._put(life, message)

    def _requests(self, life: int, welcomed: threading.Event) -> Iterator[pb.AttachRequest]:
        """The requests of one stream: a hello, and after the welcome all unacknowledged messages, in order."""
        with self._lock:
            hello = pb.Hello(
                job=self.job,
                node=self._node,
                protocol=PROTOCOL,
                returning=self._welcomed,
                received=self._received,
                token_digest=digest_of(self._token or self._security.token),
            )
        yield pb.AttachRequest(hello=hello)
        said = 0
        while True:
            with self._lock:
                while not self._closing.is_set() and self._lives == life:
                    waiting = [m for m in self._outbox if m.number > said] if welcomed.is_set() else []
                    passing = self._passing is not None or bool(self._answers)
                    if waiting or self._beat_due or (passing and welcomed.is_set()):
                        break
                    self._lock.wait()
                if self._closing.is_set() or self._lives != life:
                    return
                beat, self._beat_due = self._beat_due and welcomed.is_set(), False
                received = self._received
                unnumbered: list[pb.AttachRequest] = []
                if welcomed.is_set():
                    unnumbered += [self._passing] if self._passing is not None else []
                    unnumbered += [self._answers.popleft()] if self._answers else []  # one at a time: a beat is due
                    self._passing = None
            if beat:
                yield pb.AttachRequest(heartbeat=pb.Heartbeat(received=received))
            for message in waiting:
                said = message.number
                yield message
            yield from unnumbered

    def _kept(self, number: int) -> None:
        with self._lock:
            self._drop(number)

    def _drop(self, number: int) -> None:
        while self._outbox and self._outbox[0].number <= number:
            self._outbox_bytes -= self._outbox.popleft().ByteSize()

    # ------------------------------------------------------------ beats

    def _beat(self) -> None:
        """The heartbeat thread: separate, so that a busy moment of the agent's loop does not look like a lost node."""
        address, udp, echoed_s = "", None, 0.0
        while not self._closing.is_set():
            if self._address != address:
                address = self._address
                if udp is not None:
                    udp.close()
                udp = _datagrams_to(address)
            if udp is not None and self._token and time.monotonic() - self._turned_s < BUSY_S:
                stamp = time.monotonic_ns()
                beat = beats.Beat(beats.name_of(self._node), stamp, self._received)
                with contextlib.suppress(OSError):  # refused or unreachable: the stream reports that
                    udp.send(beats.pack_beat(beats.key_of(self._token), beat))
                if time.monotonic() - echoed_s > max(QUIET_S, 4 * self._beat_s) and self._attached:
                    with self._lock:
                        self._beat_due = True
                        self._lock.notify_all()
            self._give_up_silent()
            if self._listen(udp, time.monotonic() + self._beat_s):
                echoed_s = time.monotonic()
        if udp is not None:
            udp.close()

    def _give_up_silent(self) -> None:
        """Drop a coordinator that is silent although its stream is open: it is stopped or partitioned. Try another."""
        if len(self.addresses) == 1:
            return  # there is none
        with self._lock:
            silent = self._attached and time.monotonic() - self.heard_s > SILENT_S
            call = self._call if silent else None
        if call is not None:
            call.cancel()

    def _listen(self, udp: socket.socket | None, until_s: float) -> bool:
        """Take in echoes until a time; whether there was one."""
        if udp is None:
            self._closing.wait(self._beat_s)
            return False
        found = False
        while (left_s := until_s - time.monotonic()) > 0 and not self._closing.is_set():
            if not select.select([udp], [], [], left_s)[0]:
                continue
            with contextlib.suppress(OSError):
                echo = beats.unpack_echo(beats.key_of(self._token), udp.recv(1024))
                found = (echo is not None and self._echoed(echo)) or found
        return found

    def _echoed(self, echo: beats.Echo) -> bool:
        with self._lock:
            if echo.node != beats.name_of(self._node) or not self._token:
                return False
            self._drop(echo.kept)
            news, self._aborted = echo.aborted > self._aborted, max(echo.aborted, self._aborted)
            life = self._lives
        self.heard_s = time.monotonic()
        if news:
            self._put(life, AbortHeard(echo.aborted))
        return True


def _ready(address: str, security: Security, timeout_s: float) -> grpc.Channel:
    channel = channel_to(address, security)
    try:
        grpc.channel_ready_future(channel).result(timeout=timeout_s)
    except grpc.FutureTimeoutError:
        channel.close()
        raise Unreachable(address) from None
    return channel


def _datagrams_to(address: str) -> socket.socket | None:
    try:
        family, place = addresses.resolve(*addresses.parse(address), socket.SOCK_DGRAM)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.connect(place)
        udp.setblocking(False)
    except OSError:
        return None
    return udp
