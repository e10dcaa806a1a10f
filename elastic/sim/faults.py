"""Faults from a seed: which workers die when, how late that is noticed, and which nodes come."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from ..protocol.events import WorkerId
from .cluster import Cluster

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join", "end")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`victims` workers die: at `at_s`, or the `after`-th time that anyone enters `phase`, that one among them."""

    victims: int
    at_s: float = 0.0
    phase: str = ""
    after: int = 0
    detected_s: float = 0.01
    spread_s: float = 0.0  # the victims die within this time of each other


def draw(rng: random.Random, workers: int, horizon_s: float) -> list[Fault]:
    """Some faults: mostly one at a time, sometimes several or all at once, sometimes noticed late."""
    faults = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        victims = rng.choice((1, 1, 1, 1, 2, workers))
        detected_s = rng.uniform(1.0, 2.5) if rng.random() < 0.15 else rng.uniform(0.001, 0.05)
        spread_s = rng.choice((0.0, 0.002, 0.05))
        if rng.random() < 0.5:
            at_s = rng.uniform(0.0, horizon_s)
            faults.append(Fault(victims=victims, at_s=at_s, detected_s=detected_s, spread_s=spread_s))
        else:
            phase = rng.choice(PHASES)
            after = rng.randrange(60 if phase == "compute" else 20 if phase in PHASES[:5] else 4)
            faults.append(Fault(victims=victims, phase=phase, after=after, detected_s=detected_s, spread_s=spread_s))
    return faults


class Injector:
    """Lets faults strike a cluster."""

    def __init__(self, cluster: Cluster, faults: list[Fault]) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._waiting = [fault for fault in faults if fault.phase]
        self._seen: dict[str, int] = {}
        self.last_s = 0.0
        cluster.on_mark = self._marked
        for fault in faults:
            if not fault.phase:
                self._world.after(fault.at_s, functools.partial(self._strike, fault, None))

    def _marked(self, worker: WorkerId, phase: str, step: int) -> None:
        seen = self._seen.get(phase, 0)
        self._seen[phase] = seen + 1
        for fault in [f for f in self._waiting if f.phase == phase and f.after == seen]:
            self._waiting.remove(fault)
            self._world.after(0.0, functools.partial(self._strike, fault, worker))

    def _strike(self, fault: Fault, first: WorkerId | None) -> None:
        alive = self._cluster.alive()
        self._world.random.shuffle(alive)
        if first in alive:
            alive.remove(first)
            alive.insert(0, first)
        self.last_s = self._world.now + fault.spread_s + fault.detected_s
        cause = f"fault in {fault.phase or 'no phase in particular'}"
        for worker in alive[: fault.victims]:
            delay_s = 0.0 if worker == first else self._world.between(0.0, fault.spread_s)
            self._world.after(delay_s, functools.partial(self._cluster.kill, worker, cause, fault.detected_s))
