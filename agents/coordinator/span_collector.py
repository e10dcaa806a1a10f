"""Collects the newest spans of all workers from the nodes when a client requests a trace.

Runs in the event loop and buffers only what is in flight: a few nodes are asked at a time, each sends a bounded
amount, and the client takes it as it arrives. Nodes that do not answer in time are named.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control import telemetry_pb2 as tpb
from everstep.comms.control.rpc import Busy

AT_ONCE_BYTES = 64 << 20  # in flight to the client, of all nodes that were asked together
NODE_BYTES = 16 << 20  # of one node
NODES_AT_ONCE = 16
ANSWER_S = 5.0  # for a node to send its next piece


class SpanCollector:
    """Asks nodes for their spans. `send` gives a node an order, if it can be reached, and says whether it can."""

    def __init__(self, send: Callable[[str, pb.AttachResponse], bool], answer_s: float = ANSWER_S) -> None:
        self._send = send
        self._answer_s = answer_s
        self._tickets = itertools.count(1)
        self._ticket = 0  # of the current request; 0: there is none
        self._came: asyncio.Queue[tuple[str, tpb.Spans]] = asyncio.Queue()
        self.silent: list[str] = []  # nodes that did not answer the last question, or not to the end

    def heard(self, node: str, spans: tpb.Spans) -> None:
        """Take a piece of an answer; a piece of an abandoned request is dropped."""
        if spans.ticket == self._ticket:
            self._came.put_nowait((node, spans))

    async def collect(self, nodes: Iterable[str], first_step: int) -> AsyncGenerator[tuple[str, tpb.Spans], None]:
        """The pieces of all nodes' answers as they arrive. Raises Busy while another client is served."""
        if self._ticket:
            raise Busy("another trace is being made: try again when it is")
        self._ticket, self._came, self.silent = next(self._tickets), asyncio.Queue(), []
        waiting, loop = deque(nodes), asyncio.get_running_loop()
        limit = min(NODE_BYTES, AT_ONCE_BYTES // max(1, min(NODES_AT_ONCE, len(waiting))))
        question = tpb.AskSpans(ticket=self._ticket, first_step=first_step, limit_bytes=limit)
        due_s: dict[str, float] = {}  # of nodes that were asked
        try:
            while waiting or due_s:
                while waiting and len(due_s) < NODES_AT_ONCE:
                    node = waiting.popleft()
                    if self._send(node, pb.AttachResponse(ask_spans=question)):
                        due_s[node] = loop.time() + self._answer_s
                    else:
                        self.silent.append(node)
                if not due_s:
                    continue
                try:
                    async with asyncio.timeout_at(min(due_s.values())):
                        node, spans = await self._came.get()
                except TimeoutError:
                    late = [name for name, at_s in due_s.items() if at_s <= loop.time()]
                    self.silent += late
                    for name in late:
                        del due_s[name]
                    continue
                if node not in due_s:
                    continue  # it was given up
                due_s[node] = loop.time() + self._answer_s
                if spans.last:
                    del due_s[node]
                yield node, spans
        finally:
            self._ticket = 0
