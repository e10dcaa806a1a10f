"""A worker's progress page: a few words of memory shared with its node agent.

After the page, the same memory has the ring of the worker's telemetry spans (`telemetry`).

The counter rises with everything that the worker does, and while it waits; if it does not move, the worker is hung.
The page outlives a killed worker: the agent reads from it what the worker was doing.
The page also has the mutex that the worker's main thread holds (`robust_mutex`).
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from everstep.elastic.protocol.liveness import Pace
from everstep.elastic.protocol.waiting import Spoken

from . import robust_mutex
from .faults import Fault, WorkerFaults
from .telemetry import SHARED_BYTES, Spent, Telemetry

_PAGE = struct.Struct("<QqqqqQ")  # counter, step, phase, finished micro-batches, pace, time of an injected fault (ns)
_WAITS = struct.Struct("<QHH")  # since when (monotonic ns; 0: no wait), letters of the text, ranks; they follow
_WAITS_OFFSET, MOST_TEXT, MOST_RANKS = 64, 200, 64
STACKS_OFFSET = SHARED_BYTES  # where a worker's own handler writes its stacks, at the agent's signal
STACKS_SIGNAL = signal.SIGRTMAX - 3  # real-time, and neither the first nor the last: few programs have a use for it


class StepPhase(enum.IntEnum):
    """What a worker is doing."""

    START = 0
    COMPUTE = 1
    REDUCE = 2
    AGREE = 3
    UPDATE = 4
    COMMIT = 5
    RECOVER = 6
    RESTORE = 7
    JOIN = 8
    END = 9
    LEAVE = 10
    AFTER = 11  # training is over, and the script continues


_MOVES = frozenset({StepPhase.RECOVER, StepPhase.RESTORE, StepPhase.JOIN, StepPhase.LEAVE})  # layers may change hands


@dataclass(frozen=True)
class Waits:
    """What a worker waits for: a text, or the ranks whose messages are due (the first `MOST_RANKS`)."""

    since_s: float  # of the monotonic clock
    what: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """A worker's page as the agent reads it."""

    counter: int
    step: int
    phase: StepPhase
    finished_micro_batches: int
    pace: Pace
    fault_ns: int
    waits: Waits | None = None


def create_page() -> int:
    """A descriptor of a new progress page, and of the ring of spans behind it."""
    fd = os.memfd_create("everstep-progress", os.MFD_CLOEXEC)
    os.ftruncate(fd, SHARED_BYTES)
    return fd


def read_page(memory: mmap.mmap) -> Reading:
    counter, step, phase, finished, pace, fault_ns = _PAGE.unpack_from(memory, 0)
    return Reading(counter, step, StepPhase(phase), finished, Pace(pace), fault_ns, _read_waits(memory))


def _read_waits(memory: mmap.mmap) -> Waits | None:
    since_ns, letters, count = _WAITS.unpack_from(memory, _WAITS_OFFSET)
    if not since_ns:
        return None
    start = _WAITS_OFFSET + _WAITS.size
    what = bytes(memory[start : start + min(letters, MOST_TEXT)]).decode(errors="replace")
    ranks = struct.unpack_from(f"<{min(count, MOST_RANKS)}i", memory, start + MOST_TEXT)
    return Waits(since_ns / 1e9, what, ranks)


class Progress:
    """The worker's side of its page."""

    def __init__(self, fd: int | None, rank: int, incarnation: int, faults: list[Fault]) -> None:
        self._memory = mmap.mmap(-1 if fd is None else fd, SHARED_BYTES)
        self.telemetry = Telemetry(self._memory)
        self._counter = 0
        self._place = (-1, StepPhase.START)
        self._finished = 0
        self._first: int | None = None  # the first step of this process, or with these layers, once it has begun
        self._outside = True  # in the user's own code between steps, whose duration is not limited
        self._within: Pace | None = None  # in the user's code in the middle of a step: its dataset, or its loop
        self._waiting: Waits | None = None
        self._waits_written = False
        self._said = Spoken() if fd is None else None  # no agent looks at the page
        self._left_ns = time.monotonic_ns()
        self.faults = WorkerFaults(faults, rank, incarnation)
        self._write()
        if fd is not None:  # signals reach the handler also while the interpreter is held
            robust_mutex.hold(fd)  # again, if the worker has become another program
            self._stacks = os.dup(fd)
            os.lseek(self._stacks, STACKS_OFFSET, os.SEEK_SET)
            faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)

    def _write(self, fault_ns: int = 0) -> None:
        step, phase = self._place
        pace = Pace.STEADY if self._first is not None and step > self._first else Pace.FIRST
        pace = Pace.FREE if self._outside else pace if self._within is None else self._within
        _PAGE.pack_into(self._memory, 0, self._counter, step, phase, self._finished, pace, fault_ns)

    def tick(self, awaited: Waits | None = None) -> None:
        """Report progress; called repeatedly during waits. `awaited`: the peers that a transfer waits for."""
        self._counter += 1
        self._write()
        waits = awaited or self._waiting
        if waits is not None:
            self._write_waits(waits)
            if self._said is not None and self._said.due(waited_s := time.monotonic() - waits.since_s, waits.since_s):
                print(f"everstep: this script has waited for {waits.what} for {waited_s:.0f} s", file=sys.stderr)
        elif self._waits_written:
            self._waits_over()

    def _write_waits(self, waits: Waits) -> None:
        text, ranks = waits.what.encode()[:MOST_TEXT], waits.ranks[:MOST_RANKS]
        start = _WAITS_OFFSET + _WAITS.size
        self._memory[start : start + len(text)] = text
        struct.pack_into(f"<{len(ranks)}i", self._memory, start + MOST_TEXT, *ranks)
        _WAITS.pack_into(self._memory, _WAITS_OFFSET, int(waits.since_s * 1e9), len(text), len(ranks))
        self._waits_written = True

    def _waits_over(self) -> None:
        _WAITS.pack_into(self._memory, _WAITS_OFFSET, 0, 0, 0)
        self._waits_written = False

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Wait for something that has no rank: in words, which follow "waits for"."""
        before, self._waiting = self._waiting, Waits(time.monotonic(), what)
        try:
            yield
        finally:
            self._waiting = before
            if self._waits_written:
                self._waits_over()

    @contextlib.contextmanager
    def within(self, pace: Pace) -> Iterator[None]:
        """In the user's dataset, or its loop, in the middle of a step."""
        self.enter(pace)
        try:
            yield
        finally:
            self.enter(None)

    def enter(self, pace: Pace | None) -> None:
        """The same without an end; the next mark ends it too."""
        self._counter += 1
        if self._waits_written:
            self._waits_over()
        self._within = pace
        self._write()

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """During a call from the user's code, at any place; afterwards the phase is the user's code again."""
        outside, within = self._outside, self._within
        try:
            yield
        finally:
            self._outside, self._within = outside, within
            self.tick()

    def leave(self) -> None:
        """The user's own code runs between steps: evaluating, saving, building a model."""
        self._counter += 1
        self._within = None
        if self._waits_written:
            self._waits_over()
        if not self._outside:
            self._outside, self._left_ns = True, time.monotonic_ns()
        self._write()

    def after_training(self, step: int) -> None:
        """The following code is no part of training, and its duration is not limited."""
        self.mark(StepPhase.AFTER, step)
        self.leave()

    def mark(self, phase: StepPhase, step: int, *, finished: int | None = None) -> None:
        """Enter a phase of a step; `finished` micro-batches of it are done here."""
        self._counter += 1
        self._within = None
        if self._waits_written:
            self._waits_over()
        self._place = (step, phase)
        self.telemetry.at(step)
        if finished is not None:
            self._finished = finished
        if phase in _MOVES:
            self._first = None
        elif phase is StepPhase.COMPUTE and self._first is None:
            self._first = step
        if self._outside:
            self._outside = False
            self.telemetry.span(Spent.OUTSIDE, self._left_ns)
        self._write()
        for fault in self.faults.due(phase.name.lower(), step):
            self._write(time.monotonic_ns())
            self.faults.inject(fault)
