"""Virtual time: an event queue, processes that wait, and links with delays. One seed determines all of it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[float | None, None, T]  # yields seconds to spend, or None to wait until something arrives


class World:
    """The clock and the events to come."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.seed = seed
        self.random = random.Random(seed)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """Schedule an event."""
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), action))

    def advance(self, until_s: float) -> bool:
        """Process the next event; False if there is none before `until_s`."""
        if not self._queue or self._queue[0][0] > until_s:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        action()
        return True

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)


class Process:
    """A process that runs, spends time, waits, and can be killed or frozen at any instant."""

    def __init__(self, world: World, steps: Steps[None]) -> None:
        self.world = world
        self.alive = True
        self.frozen = False
        self.ended = False
        self._steps = steps
        self._waiting = False
        self._poked = False

    def start(self) -> None:
        self.world.after(0.0, self._go_on)

    def poke(self) -> None:
        """Something arrived: wake up. A process that is spending time wakes up when that is over."""
        if self._waiting and not self._poked:
            self._poked = True
            self.world.after(0.0, self._go_on)

    def kill(self) -> None:
        self.alive = False

    def _go_on(self) -> None:
        if not self.alive or self.frozen or self.ended:
            return
        self._waiting = self._poked = False
        try:
            spend_s = next(self._steps)
        except StopIteration:
            self.ended = True
            return
        if spend_s is None:
            self._waiting = True
        else:
            self.world.after(spend_s, self._go_on)


class Pipe:
    """A link that delays messages and keeps their order. When cut, it delivers only a part of what is in transit."""

    def __init__(
        self,
        world: World,
        deliver: Callable[[object], None],
        slow: float,
        closed_until: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._world = world
        self._deliver = deliver
        self._slow = slow  # probability of a long delay
        self._closed_until = closed_until  # messages sent before this time arrive after it
        self._last_s = 0.0
        self._cut_s: float | None = None

    def send(self, item: object) -> None:
        world = self._world
        long = world.random.random() < self._slow
        delay_s = world.between(0.01, 0.3) if long else world.between(0.0001, 0.004)
        arrives_s = max(max(world.now, self._closed_until()) + delay_s, self._last_s)
        self._last_s = arrives_s
        world.after(arrives_s - world.now, lambda: self._arrive(item, arrives_s))

    def cut(self) -> None:
        """The sender died."""
        self._cut_s = self._world.between(self._world.now, max(self._world.now, self._last_s))

    def _arrive(self, item: object, at_s: float) -> None:
        if self._cut_s is None or at_s <= self._cut_s:
            self._deliver(item)
