"""A simulated worker's links: keyed messages of a generation, aborts that wake, and edits of the membership."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from everstep.elastic.protocol.agreement import Send as SendUpOrDown
from everstep.elastic.protocol.agreement import exchange
from everstep.elastic.protocol.events import WorkerId

from .world import Steps

T = TypeVar("T")
Key = tuple[Any, ...]
Send = Callable[[WorkerId, int, Key, Any], None]  # to, generation, key, payload


class Aborted(Exception):
    """The generation is over."""


class Links:
    """The data plane of one worker: the contract of the communicator."""

    def __init__(self, rank: int, send: Send) -> None:
        self.rank = rank
        self.generation = 0
        self.aborted = False
        self.peers: Mapping[int, WorkerId] = {}
        self._send = send
        self._box: dict[tuple[int, int, Key], Any] = {}  # (generation, source, key) -> payload

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.peers))

    def abort(self) -> None:
        self.aborted = True

    def check(self) -> None:
        """Raise Aborted if the generation is over."""
        if self.aborted:
            raise Aborted

    def edit(self, generation: int, peers: Mapping[int, WorkerId]) -> None:
        """Enter another generation, and clear the abort."""
        if generation <= self.generation:
            raise AssertionError(f"rank {self.rank} would go from generation {self.generation} to {generation}")
        self.generation, self.peers, self.aborted = generation, peers, False
        self._box = {name: payload for name, payload in self._box.items() if name[0] >= generation}

    def arrived(self, source: int, generation: int, key: Key, payload: Any) -> None:
        """A message arrived: keep it, unless it is of an older generation."""
        if generation >= self.generation:
            self._box[(generation, source, key)] = payload

    def send(self, to: int, key: Key, payload: Any) -> None:
        self.check()
        self._send(self.peers[to], self.generation, key, payload)

    def ready(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """One of the wanted messages that has arrived."""
        self.check()
        return next(((s, k) for s, k in wanted if (self.generation, s, k) in self._box), None)

    def receive_any(self, wanted: Collection[tuple[int, Key]]) -> Steps[tuple[int, Key, Any]]:
        """Wait for the first of the wanted messages."""
        while True:
            found = self.ready(wanted)
            if found is not None:
                return (*found, self._box.pop((self.generation, *found)))
            yield None

    def receive(self, source: int, key: Key) -> Steps[Any]:
        return (yield from self.receive_any([(source, key)]))[2]

    def merged(self, key: Key, value: T) -> Steps[T]:
        """Merge the values of all members, up the tree and down it, with the product's own walk."""
        steps, answer = exchange(self.rank, self.members, value), None
        try:
            while True:
                asked = steps.send(answer)
                name, answer = ("up" if asked.up else "down", *key), None
                if isinstance(asked, SendUpOrDown):
                    self.send(asked.to, name, asked.value)
                else:
                    answer = yield from self.receive(asked.source, name)
        except StopIteration as end:
            result: T = end.value
            return result

    def gathered(self, key: Key, value: T) -> Steps[dict[int, T]]:
        """Gather the value of each member."""
        found, others = {self.rank: value}, [rank for rank in self.members if rank != self.rank]
        for rank in others:
            self.send(rank, ("gather", *key), value)
        for rank in others:
            found[rank] = yield from self.receive(rank, ("gather", *key))
        return found
