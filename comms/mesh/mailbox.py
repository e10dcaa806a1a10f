"""Complete messages that wait for their receiver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

import numpy as np

from .communicator import Aborted, Key
from .tensors import ALIGNMENT_BYTES

WAIT_SLICE_S = 0.05  # how often a waiting call attends to `on_wait`, at least


def allocate(size_bytes: int) -> memoryview:
    """Writable bytes that were not zeroed first. They begin where torch would have a tensor begin."""
    memory = np.empty(size_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size_bytes].data


def joined(views: Collection[memoryview]) -> memoryview:
    """A private copy of `views`, one after the other."""
    copy = allocate(sum(map(len, views)))
    at = 0
    for view in views:
        copy[at : at + len(view)] = view
        at += len(view)
    return copy


class Mailbox:
    """Messages by generation, source and key. A second message of the same name replaces the first."""

    def __init__(self) -> None:
        self.arrivals = 0  # grows with every message, so that a waiting caller knows when to look again
        self.began_ns: dict[tuple[int, Key], int] = {}  # when the first of a message that is here had come
        self._boxes: dict[int, dict[tuple[int, Key], memoryview]] = {}

    def put(self, generation: int, source: int, key: Key, data: memoryview, began_ns: int = 0) -> None:
        """A message has arrived in full; its first bytes came at `began_ns` (CLOCK_MONOTONIC), if that is known."""
        self.arrivals += 1
        if began_ns:
            self.began_ns[source, key] = began_ns
        self._boxes.setdefault(generation, {})[source, key] = data

    def find(self, generation: int, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """The first of `wanted` that is here."""
        box = self._boxes.get(generation)
        if not box:
            return None
        return next((name for name in wanted if name in box), None)

    def take(self, generation: int, name: tuple[int, Key]) -> memoryview:
        """Remove a message that is here."""
        return self._boxes[generation].pop(name)

    def purge(self, generation: int) -> None:
        """Drop the messages of every generation before `generation`."""
        for old in [g for g in self._boxes if g < generation]:
            del self._boxes[old]
        self.began_ns.clear()


class SharedMailbox:
    """A mailbox that other threads fill while its owner waits, with the abort flag of the owner's generation."""

    def __init__(self) -> None:
        self._mailbox = Mailbox()
        self._changed = threading.Condition()
        self._aborted = False
        self.generation = 0

    def put(self, generation: int, source: int, key: Key, data: memoryview) -> None:
        """A message has arrived; one of an older generation is dropped. From any thread."""
        with self._changed:
            if generation >= self.generation:
                self._mailbox.put(generation, source, key, data)
                self._changed.notify_all()

    def check(self) -> None:
        """Raise Aborted if the generation is over."""
        if self._aborted:
            raise Aborted(self.generation)

    def find(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """The first of `wanted` that is here."""
        with self._changed:
            self.check()
            return self._mailbox.find(self.generation, wanted)

    def wait_take(
        self, wanted: Collection[tuple[int, Key]], on_wait: Callable[[], None]
    ) -> tuple[int, Key, memoryview]:
        """Wait for the first of `wanted` and remove it."""
        due = time.monotonic() + WAIT_SLICE_S
        while True:
            with self._changed:
                self.check()
                name = self._mailbox.find(self.generation, wanted)
                if name is not None:
                    return (*name, self._mailbox.take(self.generation, name))
                self._changed.wait(max(0.0, due - time.monotonic()))
                self.check()
            if time.monotonic() >= due:
                on_wait()
                due = time.monotonic() + WAIT_SLICE_S

    def abort(self) -> None:
        """End the generation and wake the owner. From any thread."""
        self._aborted = True
        with self._changed:
            self._changed.notify_all()

    def begin(self, generation: int) -> None:
        """Start `generation`: clear the abort and drop what is older."""
        with self._changed:
            self._aborted = False
            self.generation = generation
            self._mailbox.purge(generation)
