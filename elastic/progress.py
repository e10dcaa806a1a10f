"""A worker's progress page: a few words of memory shared with its node agent, and the place where faults are injected.

The same memory has, after the page, the ring of what the worker spends its time on (`telemetry`).

The counter rises with everything the worker does, and while it waits; a counter that stands still is a hung worker.
What stands in the page outlives a killed worker: the agent reads there what it was doing.
"""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from .protocol.liveness import Pace
from .telemetry import SHARED_BYTES, Spent, Telemetry

_PAGE = struct.Struct("<QqqqqQ")  # counter, step, phase, finished micro-batches, pace, time of an injected fault (ns)


COORDINATOR = "es-coordinator"  # the name of its process


class Phase(enum.IntEnum):
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


_MOVES = frozenset({Phase.RECOVER, Phase.RESTORE, Phase.JOIN, Phase.LEAVE})  # layers may change hands


@dataclass(frozen=True)
class Reading:
    """What the agent sees of a worker."""

    counter: int
    step: int
    phase: Phase
    finished_micro_batches: int
    pace: Pace
    fault_ns: int


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An injected fault: the `after`-th time that this incarnation of `rank` marks `phase`, from `step` on.

    With `period`, only in every `period`-th step from `step` on: so faults of ranks that come back whenever they can
    keep their distance.
    """

    rank: int
    phase: str
    step: int = 0
    incarnation: int = 0
    after: int = 0
    period: int = 0
    kind: str = "kill"  # kill | stop | loop | pause | node (all of it, at one instant) | coordinator | flip, ...
    seconds: float = 0.0  # of a pause

    VARIABLE = "EVERSTEP_FAULTS"

    @classmethod
    def parse(cls, text: str) -> list[Fault]:
        items = json.loads(text) if text else []
        return [cls(**item) for item in items if item.get("kind") != "unhealthy"]  # that is the agent's


def create_page() -> int:
    """A descriptor of a new progress page, and of the ring of spans behind it."""
    fd = os.memfd_create("everstep-progress", os.MFD_CLOEXEC)
    os.ftruncate(fd, SHARED_BYTES)
    return fd


def read_page(memory: mmap.mmap) -> Reading:
    counter, step, phase, finished, pace, fault_ns = _PAGE.unpack_from(memory, 0)
    return Reading(counter, step, Phase(phase), finished, Pace(pace), fault_ns)


class Progress:
    """The worker's side of its page."""

    def __init__(self, fd: int | None, rank: int, incarnation: int, faults: list[Fault]) -> None:
        self._memory = mmap.mmap(-1 if fd is None else fd, SHARED_BYTES)
        self.telemetry = Telemetry(self._memory)
        self._counter = 0
        self._place = (-1, Phase.START)
        self._finished = 0
        self._first: int | None = None  # the first step of this process, or with these layers, once it has begun
        self._outside = True  # in the user's own code between steps, which may take what it likes
        self._left_ns = time.monotonic_ns()
        self._faults = [f for f in faults if f.rank == rank and f.incarnation == incarnation]
        self._seen: dict[Fault, int] = {}
        self.damage: Callable[[str], None] = lambda kind: None
        self._write()

    def _write(self, fault_ns: int = 0) -> None:
        step, phase = self._place
        pace = Pace.STEADY if self._first is not None and step > self._first else Pace.FIRST
        values = (self._counter, step, phase, self._finished, Pace.FREE if self._outside else pace, fault_ns)
        _PAGE.pack_into(self._memory, 0, *values)

    def tick(self) -> None:
        """Still alive."""
        self._counter += 1
        self._write()

    def leave(self) -> None:
        """The user's own code goes on between steps: evaluating, saving, building a model."""
        self._counter += 1
        if not self._outside:
            self._outside, self._left_ns = True, time.monotonic_ns()
        self._write()

    def mark(self, phase: Phase, step: int, *, finished: int | None = None) -> None:
        """Enter a phase of a step; `finished` micro-batches of it are done here."""
        self._counter += 1
        self._place = (step, phase)
        self.telemetry.step = step
        if finished is not None:
            self._finished = finished
        if phase in _MOVES:
            self._first = None
        elif phase is Phase.COMPUTE and self._first is None:
            self._first = step
        if self._outside:
            self._outside = False
            self.telemetry.span(Spent.OUTSIDE, self._left_ns)
        self._write()
        if self._faults:
            self._inject(phase, step)

    def _inject(self, phase: Phase, step: int) -> None:
        for fault in self._faults:
            if fault.phase != phase.name.lower() or step < fault.step:
                continue
            if fault.period and (step - fault.step) % fault.period:
                continue
            seen = self._seen.get(fault, 0)
            self._seen[fault] = seen + 1
            if seen == fault.after:
                self._suffer(fault)

    def _suffer(self, fault: Fault) -> None:
        self._write(time.monotonic_ns())
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "node":
            _kill_node()
        elif fault.kind == "coordinator":
            _kill_coordinator()
        elif fault.kind.startswith("flip"):
            self.damage(fault.kind)
        elif fault.kind == "pause":
            time.sleep(fault.seconds)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while fault.kind == "loop":
            pass


def _kill_coordinator() -> None:
    """Kill the coordinator that this node's launcher has beside it, as soon as one serves."""
    launcher = psutil.Process(os.getppid()).parent()
    assert launcher is not None
    while True:
        for process in launcher.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # another one ended just now
                if process.name() == COORDINATOR:
                    process.kill()
                    process.wait(10)
                    return
        time.sleep(0.01)


def _kill_node() -> None:
    """Kill this worker's node agent and all that it started: stopped first, so that none sees another die."""
    agent = psutil.Process(os.getppid()).parent()
    assert agent is not None
    family = [agent, *agent.children(recursive=True)]
    others = [process.pid for process in family if process.pid != os.getpid()]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    os.kill(os.getpid(), signal.SIGKILL)
