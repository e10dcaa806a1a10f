"""Asking the coordinator that leads a job, from outside: one of several addresses; one clear line if none answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from everstep.comms.base import addresses
from everstep.comms.base.security import CERTIFICATES, Security
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.rpc import channel_to, stands_by, stub

TIMEOUT_S = 5.0

T = TypeVar("T")


class NoAnswer(Exception):
    """No coordinator answers; the text is for the user. `away`: a retry may succeed."""

    def __init__(self, why: str, *, away: bool = True) -> None:
        super().__init__(why)
        self.away = away


class Endpoints:
    """HOST:PORT[,HOST:PORT...] of a job's coordinators, of which one leads. Raises NoAnswer for what is no address."""

    def __init__(self, text: str, security: Security, timeout_s: float = TIMEOUT_S) -> None:
        try:
            self.addresses = [str(addresses.parse(one.strip())) for one in text.split(",")]
        except addresses.BadAddress as error:
            raise NoAnswer(str(error), away=False) from None
        if any(addresses.parse(address).port == 0 for address in self.addresses):
            raise NoAnswer(f"{text!r} is not HOST:PORT: 0 is not a port", away=False)
        self.leader = ""  # that answered last
        self._security = security
        self._timeout_s = timeout_s

    def status(self, steps: int = 0, rank_steps: int = 0) -> pb.GetStatusResponse:
        """The coordinator's view of the job. Raises NoAnswer."""
        request = pb.GetStatusRequest(steps=steps, rank_steps=rank_steps)
        found: pb.GetStatusResponse = self._ask(lambda channel: stub(channel).GetStatus(request, **self._wait()))
        return found

    def order(self, request: pb.OrderRequest) -> str:
        """What is done. Raises NoAnswer, also where the coordinator refuses."""
        found: pb.OrderResponse = self._ask(lambda channel: stub(channel).Order(request, **self._wait()))
        if found.refused:
            raise NoAnswer(found.refused, away=False)
        return found.text

    def trace(self, steps: int, timeout_s: float) -> list[pb.GetTraceResponse]:
        """The spans of all ranks in the last steps, in pieces. Raises NoAnswer."""
        request = pb.GetTraceRequest(steps=steps)
        told = {"timeout": timeout_s, "metadata": self._security.metadata()}
        return self._ask(lambda channel: list(stub(channel).GetTrace(request, **told)))

    def _wait(self) -> dict[str, Any]:
        return {"timeout": self._timeout_s, "wait_for_ready": False, "metadata": self._security.metadata()}

    def _ask(self, call: Callable[[grpc.Channel], T]) -> T:
        """The answer of the first coordinator that responds, beginning with the last responder."""
        reasons = []
        for address in sorted(self.addresses, key=lambda one: one != self.leader):
            with channel_to(address, self._security) as channel:
                try:
                    found = call(channel)
                except grpc.RpcError as error:
                    reasons.append(self._reason(address, error))
                    continue
            self.leader = address
            return found
        away = any(again for _, again in reasons)
        raise NoAnswer("; ".join(text for text, _ in reasons), away=away)

    def _reason(self, address: str, error: Any) -> tuple[str, bool]:
        """Why an address gave no answer, and whether it may give one later."""
        code, details = error.code(), str(error.details() or "")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no coordinator answers at {address} in time", True
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return f"the coordinator at {address} is of another version, which does not support this", False
        if stands_by(error):
            return f"{address}: {details}", True
        if code != grpc.StatusCode.UNAVAILABLE:
            return f"{address} refuses: {details}", code == grpc.StatusCode.RESOURCE_EXHAUSTED
        if any(word in details.lower() for word in ("handshake", "certificate", "ssl")):
            return (
                f"TLS with {address} fails: are {CERTIFICATES} here and there of one authority, and valid?",
                True,
            )
        hint = "" if self._security.encrypts else f" (a job with certificates answers only those: {CERTIFICATES}=DIR)"
        return f"no coordinator answers at {address}{hint}", True
