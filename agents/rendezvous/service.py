"""The coordinator's end of `comms/rendezvous.proto`: agents of plain torchrun meet here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from everstep.comms.base.security import Security
from everstep.comms.control import rendezvous_pb2 as pb
from everstep.comms.control.rendezvous_pb2_grpc import (
    RendezvousServiceServicer,
    add_RendezvousServiceServicer_to_server,
)

from .machine import (
    Action,
    Group,
    RoundLimits,
    RoundPhase,
    RoundPlace,
    Said,
    expire,
    over,
    step,
)

_ACTIONS = {
    pb.MEET_ACTION_JOIN: Action.JOIN,
    pb.MEET_ACTION_STAY: Action.STAY,
    pb.MEET_ACTION_LEAVE: Action.LEAVE,
    pb.MEET_ACTION_CLOSE: Action.CLOSE,
}
_PHASES = {
    RoundPhase.WAITING: pb.MEET_PHASE_WAITING,
    RoundPhase.FORMED: pb.MEET_PHASE_FORMED,
    RoundPhase.CLOSED: pb.MEET_PHASE_CLOSED,
    RoundPhase.REFUSED: pb.MEET_PHASE_REFUSED,
}


class Rendezvous(RendezvousServiceServicer):
    """Answers for one job; all of it is called in one event loop."""

    def __init__(self, job: str, security: Security, refusal: Callable[[], str]) -> None:
        """`refusal`: why this is not the coordinator to ask just now; empty if it is."""
        self._refusal = refusal
        self._job = job
        self._security = security
        self._group = Group()

    def serve(self, server: Any) -> None:
        """Add the service to a gRPC server that is not started yet."""
        add_RendezvousServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    def over(self) -> bool:
        """Whether a job met here that has ended, and all of its agents have gone."""
        if self._group.limits is None:
            return False
        self._group = expire(self._group, time.monotonic())
        return over(self._group)

    async def Meet(self, request: pb.MeetRequest, context: Any) -> pb.MeetResponse:
        why = self._refusal()
        if why:
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)
        if not self._security.admits(request.token_digest):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the node has another token than the coordinator")
        said = _said(request)
        if said is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a request that no node makes")
        if request.job != self._job:
            why = f"this coordinator runs job {self._job!r}, the node asked for {request.job!r} (--rdzv-id)"
            return pb.MeetResponse(phase=pb.MEET_PHASE_REFUSED, why=why)
        assert said is not None
        self._group, answer = step(self._group, said, time.monotonic())
        return pb.MeetResponse(
            phase=_PHASES[answer.phase],
            round=answer.place.round,
            rank=answer.place.rank,
            world_size=answer.place.world_size,
            store_host=answer.store[0],
            store_port=answer.store[1],
            waiting=answer.waiting,
            why=answer.why,
        )


def _said(request: pb.MeetRequest) -> Said | None:
    """A node's request as a value; None if it is invalid."""
    limits = RoundLimits(
        min_nodes=request.min_nodes,
        max_nodes=request.max_nodes,
        last_call_s=request.last_call_s,
        lost_after_s=request.lost_after_s,
    )
    action = _ACTIONS.get(request.action)
    sound = 0 < limits.min_nodes <= limits.max_nodes and limits.last_call_s >= 0 and limits.lost_after_s > 0
    place = RoundPlace(request.round, request.rank, request.world_size)
    placed = place.rank < place.world_size <= limits.max_nodes
    if action is None or not sound or not request.node or (place.rank >= 0 and not placed):
        return None
    store = (request.store_host, request.store_port)
    return Said(node=request.node, action=action, limits=limits, place=place, store=store)
