"""Operators' orders (`everstep drain`, `quarantine`, `release`, `relayout`), checked against the job as it is.

An order that is taken becomes an event of the coordinator's machine at its next turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence

from google.protobuf import json_format

from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.relayout import why_not
from everstep.elastic.protocol.state import Phase, State
from everstep.elastic.protocol.troubles import spares

MOST = 64  # orders that wait


class Refused(Exception):
    """An order that cannot be carried out: why, for the user."""


class OperatorOrders:
    """The orders that were taken, and wait for the machine's next turn."""

    def __init__(self) -> None:
        self._taken: deque[e.Event] = deque()

    def poll(self) -> e.Event | None:
        """The next one."""
        return self._taken.popleft() if self._taken else None

    def take(self, request: pb.OrderRequest, state: State) -> pb.OrderResponse:
        """Take an order for a job in this state."""
        try:
            if state.phase in (Phase.AFTER, Phase.DONE) or state.stopping is not None:
                raise Refused("the job is about to end")
            if len(self._taken) >= MOST:
                raise Refused("too many orders wait already: try again")
            event, text = _event(request, state, self._taken)
        except Refused as error:
            return pb.OrderResponse(refused=str(error))
        self._taken.append(event)
        return pb.OrderResponse(text=text)


def take_text(text: bytes, take: Callable[[pb.OrderRequest], pb.OrderResponse]) -> tuple[int, str]:
    """Take an order of the page: an OrderRequest as JSON. The status of the answer (RFC 9110), and its text."""
    try:
        answer = take(json_format.Parse(text, pb.OrderRequest()))
    except (json_format.ParseError, UnicodeDecodeError) as error:
        return 400, f"no order: {error}"
    return (409, answer.refused) if answer.refused else (200, answer.text)


def _event(request: pb.OrderRequest, state: State, taken: Collection[e.Event]) -> tuple[e.Event, str]:
    """The event, and what is done. `taken`: orders that wait."""
    drained = [event.node for event in taken if isinstance(event, e.DrainRequested)]
    if request.WhichOneof("order") == "drain":
        node = _node(request.drain.node, state, drained)
        text = f"node {node} hands over, and leaves when the others do not need it any more"
        return e.DrainRequested(node, request.drain.why or "drained by an operator"), text
    if request.WhichOneof("order") == "quarantine":
        host, seconds = request.quarantine.host, request.quarantine.seconds
        if not host or not 0 < seconds < math.inf:
            raise Refused("name a host, and a time of more than 0 s that ends")
        why = request.quarantine.why or "by an operator's order"
        there = [name for name, node in state.nodes.items() if node.host == host]
        now = f"; {' and '.join(there)} hand over as soon as the job can spare them" if there else ""
        return e.QuarantineOrdered(host, seconds, why), f"host {host} is kept out for {seconds:g} s{now}"
    if request.WhichOneof("order") == "release":
        if request.release.host not in state.quarantined:
            known = ", ".join(sorted(state.quarantined)) or "none"
            raise Refused(f"host {request.release.host!r} is not in quarantine; hosts that are: {known}")
        return e.ReleaseOrdered(request.release.host), f"host {request.release.host} may join again"
    if request.WhichOneof("order") == "relayout":
        stages = request.relayout.stages
        if stages < 0:
            raise Refused("a job has at least one stage")
        if drained or any(isinstance(event, e.RelayoutOrdered) for event in taken):
            raise Refused("another order waits: try again when that is over")
        if why := why_not(state, stages):
            raise Refused(why)
        if not stages:
            return e.RelayoutOrdered(0), "the job has as many stages as its planner finds best from now on"
        return e.RelayoutOrdered(stages), f"the job goes to {stages} stage(s) at a step boundary; training continues"
    raise Refused("no order that this version knows")


def _node(asked: str, state: State, drained: Sequence[str]) -> str:
    """The node of this name or host. Raises Refused unless it can leave."""
    found = [asked] if asked in state.nodes else [name for name, node in state.nodes.items() if node.host == asked]
    if len(found) != 1:
        known = ", ".join(f"{name} ({node.host})" for name, node in sorted(state.nodes.items())) or "none"
        what = "names several nodes" if found else "is no node of the job"
        raise Refused(f"{asked!r} {what}; nodes: {known}")
    if found[0] in state.leaving or found[0] in drained:
        why = state.leaving[found[0]].why if found[0] in state.leaving else "an operator asked before"
        raise Refused(f"node {found[0]} leaves already: {why}")
    if not spares(state, found[0], *drained):
        least = max(1, state.config.min_nodes)
        raise Refused(
            f"the job cannot spare node {found[0]}: it needs {least} (--nnodes). To save a checkpoint and end the job, "
            "stop it with SIGTERM"
        )
    return found[0]
