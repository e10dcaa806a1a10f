"""Faults that tests and the demo inject into a worker, at a phase of a step: it is killed, stopped, damaged, ..."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

COORDINATOR = "es-coordinator"  # the name of its process


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


class WorkerFaults:
    """The faults of one worker."""

    def __init__(self, faults: Sequence[Fault], rank: int, incarnation: int) -> None:
        self._faults = [fault for fault in faults if (fault.rank, fault.incarnation) == (rank, incarnation)]
        self._seen: dict[Fault, int] = {}
        self._flip: Callable[[str], None] | None = None

    def flips(self, flip: Callable[[str], None]) -> None:
        """`flip` carries out faults of the kinds that begin with "flip": this worker has values now."""
        self._flip = flip

    def due(self, phase: str, step: int) -> Iterator[Fault]:
        """The faults of this moment: the worker enters `phase` of `step`."""
        for fault in self._faults:
            if fault.phase != phase or step < fault.step or (fault.period and (step - fault.step) % fault.period):
                continue
            seen = self._seen.get(fault, 0)
            self._seen[fault] = seen + 1
            if seen == fault.after:
                yield fault

    def inject(self, fault: Fault) -> None:
        """Carry out a fault on this process, its node or the coordinator."""
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "node":
            _kill_node()
        elif fault.kind == "coordinator":
            _kill_coordinator()
        elif fault.kind.startswith("flip") and self._flip is not None:
            self._flip(fault.kind)
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
    """Kill this worker's node agent and all its descendants: stopped first, so that none sees another die.

    This worker's parent is killed last: this process dies with it, and processes not yet killed would stay stopped.
    """
    parent = psutil.Process(os.getppid())
    agent = parent.parent()
    assert agent is not None
    ancestors = [agent.pid, parent.pid]
    family = [process.pid for process in agent.children(recursive=True)]
    others = [*(pid for pid in family if pid not in (os.getpid(), parent.pid)), *ancestors]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    os.kill(os.getpid(), signal.SIGKILL)
