"""The nodes as this coordinator meets them: their streams, and their beats."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from everstep.comms.control import beats
from everstep.comms.control.rpc import Session

from .durable import Durable

DATAGRAMS = 2000  # taken in at a time


@dataclass
class NodeSession:
    """One node."""

    session: Session | None = None
    address: Any = None  # where its beats come from
    stamp: int = 0  # of the newest of them


class NodeSessions:
    """All nodes that are in the job, or may return to it. In the event loop."""

    def __init__(self, durable: Durable, udp: socket.socket) -> None:
        self._alive: set[str] = set()  # nodes that sent a heartbeat since the last check
        self.attached = 0  # how often a node was
        self._durable = durable
        self._udp = udp
        self._key = beats.key_of(durable.token)
        self._names = {beats.name_of(node): node for node in durable.channels}
        self._links = {node: NodeSession() for node in durable.channels}

    def __contains__(self, node: str) -> bool:
        return node in self._links

    def session(self, node: str) -> Session | None:
        """The node's stream, if it has one."""
        link = self._links.get(node)
        return link.session if link is not None else None

    def sessions(self) -> list[Session]:
        return [link.session for link in self._links.values() if link.session is not None]

    def detached(self) -> bool:
        """Whether a node of the job has no stream at the moment."""
        return any(link.session is None for link in self._links.values())

    def heard(self, node: str) -> None:
        """A sign of life of a node."""
        self._alive.add(node)

    def take_alive(self) -> tuple[str, ...]:
        """The nodes that gave a sign of life since this was last called."""
        alive, self._alive = tuple(self._alive), set()
        return alive

    def attach(self, node: str, session: Session) -> None:
        """The node's stream from now on."""
        session.attach(node)
        link = self._links.setdefault(node, NodeSession())
        former, link.session = link.session, session
        if former is not None:
            former.end()
        self._names[beats.name_of(node)] = node
        self.heard(node)
        self.attached += 1

    def detach(self, node: str) -> None:
        """Its stream is gone; it may return."""
        self._links[node].session = None

    def forget(self, node: str) -> None:
        """It is out of the job."""
        self._durable.close(node)
        self._names.pop(beats.name_of(node), None)
        self._links.pop(node, None)

    # ------------------------------------------------------------ beats

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._udp, self._hear)

    def close(self) -> None:
        """End all streams, and receive no more heartbeats."""
        asyncio.get_running_loop().remove_reader(self._udp)
        for session in self.sessions():
            session.end()

    def _hear(self) -> None:
        for _ in range(DATAGRAMS):
            try:
                data, address = self._udp.recvfrom(beats.DATAGRAM_BYTES + 1)
            except OSError:  # there are no more, or an earlier answer was refused
                return
            beat = beats.unpack_beat(self._key, data)
            node = self._names.get(beat.node) if beat is not None else None
            if beat is None or node is None or beat.stamp <= self._links[node].stamp:
                continue
            link = self._links[node]
            link.address, link.stamp = address, beat.stamp
            self.heard(node)
            self._durable.acknowledge(node, beat.received)
            self.echo(node)

    def echo(self, node: str, aborted: int = -1) -> None:
        """Answer a node's last beat; `aborted`: the generation that is over."""
        link = self._links.get(node)
        if link is None or link.address is None:
            return
        echo = beats.Echo(beats.name_of(node), link.stamp, self._durable.channels[node].kept, aborted)
        try:
            self._udp.sendto(beats.pack_echo(self._key, echo), link.address)
        except OSError:
            link.address = None  # the datagram was not delivered: the stream carries the order too
