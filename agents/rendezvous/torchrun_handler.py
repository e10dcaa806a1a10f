"""Plain `torchrun --rdzv-backend=everstep --rdzv-endpoint=HOST:PORT`: its agents meet at our coordinator.

Everything else is torchrun's: its workers, its restarts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
import uuid
from typing import Any

import grpc
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from everstep.agents.base.patience import Wait
from everstep.comms.base import addresses
from everstep.comms.base.security import Security, SecurityError, digest_of
from everstep.comms.control import rendezvous_pb2 as pb
from everstep.comms.control.rendezvous_pb2_grpc import RendezvousServiceStub
from everstep.comms.control.rpc import channel_to

BACKEND = "everstep"
POLL_S = 0.2  # while a round forms
CALL_S = 3.0
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)  # it may come back
DEFAULTS = {
    "join_timeout": 600.0,  # until a round has formed, in seconds
    "last_call_timeout": 5.0,  # for more nodes, when the least number is there
    "keep_alive_interval": 1.0,
    "keep_alive_max_attempt": 5.0,  # so many intervals without a word: the node is lost
}


class EverstepRendezvous(RendezvousHandler):
    """One node's end of the rendezvous."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        settings = _settings(parameters)
        self._join_timeout_s = settings["join_timeout"]
        self._interval_s = settings["keep_alive_interval"]
        self._job = parameters.run_id
        try:
            security = Security.of(os.environ)
            security.check_bind(parameters.local_addr or "127.0.0.1")
        except SecurityError as error:
            raise ValueError(str(error)) from None
        self._address = _endpoint(parameters.endpoint)
        self._security = security
        self._connect()
        self._request = pb.MeetRequest(
            job=self._job,
            token_digest=digest_of(security.token) if security.token else "",
            node=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            min_nodes=parameters.min_nodes,
            max_nodes=parameters.max_nodes,
            last_call_s=settings["last_call_timeout"],
            lost_after_s=self._interval_s * settings["keep_alive_max_attempt"],
            rank=-1,
        )
        self._host = parameters.local_addr or addresses.towards(*addresses.parse(self._address))
        self._store: Any = None
        self._answer = pb.MeetResponse()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stays = threading.Thread(target=self._stay, name="everstep-rendezvous", daemon=True)
        atexit.register(self._leave)

    def _connect(self) -> None:
        """A new channel for each attempt, since a failed channel reconnects with a growing delay."""
        self._channel = channel_to(self._address, self._security)
        self._stub: Any = RendezvousServiceStub(self._channel)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------ torch's interface

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_run_id(self) -> str:
        return self._job

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this node is in a round that has a store."""
        deadline_s = time.monotonic() + self._join_timeout_s
        self._store = None
        self._request.store_host, self._request.store_port = "", 0
        wait = Wait(
            f"this node waits at {self._address} for a round of at least {self._request.min_nodes} nodes; it gives up "
            f"after {self._join_timeout_s:g} s"
        )
        answer = self._call(pb.MEET_ACTION_JOIN, deadline_s)
        if not self._stays.is_alive() and not self._closing.is_set():
            self._stays.start()
        while answer.phase != pb.MEET_PHASE_FORMED or not answer.store_host:
            if answer.phase == pb.MEET_PHASE_FORMED and answer.rank == 0 and not self._request.store_host:
                self._open_store()
            elif time.monotonic() > deadline_s:
                raise RendezvousTimeoutError(
                    f"no round of at least {self._request.min_nodes} nodes formed at {self._address} within "
                    f"{self._join_timeout_s:g} s: start the others, or lower --nnodes"
                )
            else:
                wait.look()
                time.sleep(POLL_S)
            answer = self._call(pb.MEET_ACTION_STAY, deadline_s)
        if self._store is None:
            self._store = TCPStore(answer.store_host, answer.store_port, is_master=False)
        bootstrap = RendezvousStoreInfo(answer.store_host, answer.store_port)
        return RendezvousInfo(self._store, answer.rank, answer.world_size, bootstrap)

    def num_nodes_waiting(self) -> int:
        """How many nodes have joined or were lost, so that a new round is due."""
        answer = self._answer
        return answer.waiting if answer.phase == pb.MEET_PHASE_FORMED else 0

    def is_closed(self) -> bool:
        return bool(self._answer.phase == pb.MEET_PHASE_CLOSED)

    def set_closed(self) -> None:
        self._last_word(pb.MEET_ACTION_CLOSE)

    def shutdown(self) -> bool:
        """The job is over."""
        return self._last_word(pb.MEET_ACTION_CLOSE)

    # ------------------------------------------------------------ requests

    def _open_store(self) -> None:
        self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._request.store_host, self._request.store_port = self._host, self._store.port

    def _call(self, action: Any, deadline_s: float) -> Any:
        """Send a request until it is answered. Raises torch's errors for a refusal and when no coordinator answers."""
        while True:
            try:
                answer = self._meet(action)
            except grpc.RpcError as error:
                if error.code() not in GONE or time.monotonic() > deadline_s:
                    raise RendezvousConnectionError(
                        f"the coordinator at {self._address} does not answer: {error.details()} (is `everstep "
                        "coordinator` running there?)"
                    ) from None
                time.sleep(POLL_S)
                continue
            if answer.phase == pb.MEET_PHASE_CLOSED:
                raise RendezvousClosedError(f"job {self._job!r} is over")
            if answer.phase == pb.MEET_PHASE_REFUSED:
                raise RendezvousStateError(f"the coordinator at {self._address} refused this node: {answer.why}")
            return answer

    def _meet(self, action: Any) -> Any:
        """One call. It carries this node's place in the round, in case the coordinator has lost it."""
        with self._lock:
            self._request.action = action
            if action == pb.MEET_ACTION_JOIN:
                self._request.round, self._request.rank, self._request.world_size = 0, -1, 0
            try:
                answer = self._stub.Meet(self._request, timeout=CALL_S)
            except grpc.RpcError:
                self._channel.close()
                self._connect()
                raise
            if answer.phase == pb.MEET_PHASE_FORMED:
                self._request.round, self._request.rank = answer.round, answer.rank
                self._request.world_size = answer.world_size
                if answer.store_host:
                    self._request.store_host, self._request.store_port = answer.store_host, answer.store_port
            self._answer = answer
            return answer

    def _stay(self) -> None:
        """The heartbeat thread of this node. While no coordinator answers, the round stays as it is."""
        while not self._closing.wait(self._interval_s):
            with contextlib.suppress(grpc.RpcError):
                self._meet(pb.MEET_ACTION_STAY)

    def _leave(self) -> None:
        self._last_word(pb.MEET_ACTION_LEAVE)

    def _last_word(self, action: Any) -> bool:
        if self._closing.is_set():
            return True
        self._closing.set()
        try:
            self._meet(action)
        except grpc.RpcError:
            return False  # it finds out by our silence
        finally:
            self._channel.close()
        return True


def _settings(parameters: RendezvousParameters) -> dict[str, float]:
    """The settings of --rdzv-conf, by torch's names. Raises ValueError for unknown names and invalid times."""
    unknown = sorted(parameters.config.keys() - DEFAULTS.keys() - {"timeout"})  # which torch always adds
    if unknown:
        raise ValueError(f"--rdzv-conf: {BACKEND} knows {', '.join(DEFAULTS)}; not {', '.join(unknown)}")
    settings = {}
    for name, default in DEFAULTS.items():
        try:
            settings[name] = float(parameters.get(name, default))
        except ValueError:
            raise ValueError(f"--rdzv-conf: {name} must be a number, got {parameters.get(name)!r}") from None
    return settings


def _endpoint(text: str) -> str:
    try:
        return str(addresses.parse(text, port=addresses.DEFAULT_PORT))
    except addresses.BadAddress as error:
        raise ValueError(f"--rdzv-endpoint must be HOST:PORT of an `everstep coordinator`: {error}") from None
