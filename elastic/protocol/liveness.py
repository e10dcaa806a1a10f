"""When a worker whose progress counter stands still counts as hung: a table of limits, without a clock.

Two durations are compared with limits that depend on the worker's activity (its pace). A worker *stands still* since
its counter last moved. It is *silent* since its counter moved or the kernel last showed a sign of life: processor time,
bytes or pages read or written, a wait for storage. A deadlock is silent; an endless loop stands still, but is not
silent.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

FLOOR_S = 2.0  # `--es-hang-timeout`: the least limit
USER_S = 600.0  # `--es-user-timeout`: how long the user's own code may take to show progress
SHARED = 6.0  # factor on the limits while all ranks of a node wait for storage
MOST_DOUBLINGS = 6
SLEPT_S = 1.0  # a longer gap between two looks: the observer was stopped or starved, and perhaps the workers were, too


class Pace(enum.IntEnum):
    """The activity of a worker, which determines its limits."""

    FREE = 0  # the user's own code before, between and after steps: evaluating, saving, opening files
    FIRST = 1  # the first step of a process, or after its layers changed: may compile, allocate, connect
    STEADY = 2  # any other step
    FETCH = 3  # the user's dataset and collation
    USER = 4  # the user's own loop in the middle of a step: from a micro-batch to optimizer.step()


class Sign(enum.IntEnum):
    """What the kernel shows of a worker and its descendants since the last look."""

    NONE = 0  # every thread waits, for a lock, a socket, a timer
    WORKS = 1  # it received processor time or waits for a processor, or it read or wrote
    STORAGE = 2  # a thread waits in the kernel for a file
    STOPPED = 3  # by SIGSTOP: it cannot continue by itself


class Bound(NamedTuple):
    """A limit: the longest of these times. `pauses`: a multiple of the longest pause seen at this pace."""

    floors: float
    users: float
    pauses: float

    def seconds(self, floor_s: float, user_s: float, pause_s: float) -> float:
        return max(self.floors * floor_s, self.users * user_s, self.pauses * pause_s)


class Rule(NamedTuple):
    """How long a worker may be silent, and how long it may stand still, at one pace."""

    place: str  # the activity, as text
    silent: Bound
    still: Bound


STEP = Rule("a step", Bound(1, 0, 10), Bound(5, 0, 50))
FIRST_STEP = Rule("its first step", Bound(1, 1, 0), Bound(1, 3, 0))  # while the node has no completed one to compare
RULES = {
    Pace.FREE: Rule("the user's code between steps", Bound(1, 3, 0), Bound(1, 12, 0)),
    Pace.FIRST: FIRST_STEP,
    Pace.STEADY: STEP,
    Pace.FETCH: Rule("the dataset", Bound(1, 0.2, 10), Bound(1, 1, 30)),
    Pace.USER: Rule("the user's code of a step", Bound(1, 0.2, 10), Bound(1, 1, 30)),
}


class Limits(NamedTuple):
    """In seconds."""

    silent_s: float
    still_s: float


@dataclass(frozen=True)
class Patience:
    """What the limits depend on besides the worker. `first_s`: the longest pause in first steps of its host."""

    floor_s: float = FLOOR_S
    user_s: float = USER_S
    first_s: float = 0.0
    shared: bool = False  # every rank of the node stands still in its dataset, or waits for a rank that is
    doublings: int = 0  # how often its rank was considered hung

    def limits(self, pace: Pace, pause_s: float, sign: Sign) -> Limits:
        """How long a worker may be silent and stand still; `sign` is the last one that the kernel showed."""
        rule = RULES[pace]
        known = pace is Pace.FIRST and self.first_s > 0
        if known:
            rule, pause_s = STEP, self.first_s
        elif sign is Sign.STOPPED and pace is not Pace.FREE:
            rule = STEP
        silent_s, still_s = (bound.seconds(self.floor_s, self.user_s, pause_s) for bound in (rule.silent, rule.still))
        if known:
            silent_s, still_s = min(silent_s, max(self.floor_s, self.user_s)), min(still_s, 3 * self.user_s)
        elif pace is Pace.USER and not pause_s:
            still_s = FIRST_STEP.still.seconds(self.floor_s, self.user_s, 0.0)  # it may compile
        if sign is Sign.STORAGE:
            still_s = max(still_s, self.user_s)
        more = 2.0 ** min(self.doublings, MOST_DOUBLINGS) * (SHARED if self.shared and pace is Pace.FETCH else 1.0)
        if self.shared and pace is Pace.FETCH:
            silent_s = max(silent_s, still_s)
        return Limits(more * silent_s, more * max(silent_s, still_s))

    def usual_s(self, pulse: Pulse, ratio: float) -> float:
        """How long a worker without progress needs no look: `ratio` of its longest pause, a quarter of its limit."""
        silent_s = self.limits(pulse.pace, pulse.pauses[pulse.pace], pulse.sign).silent_s
        return min(ratio * pulse.pauses[pulse.pace], silent_s / 4)


@dataclass(frozen=True)
class Pulse:
    """The history of one worker's counter. Times in seconds, with any origin.

    A pause counts for the pace in which it began: a worker that returns from the user's code was not slow in a step.
    """

    counter: int
    changed_s: float
    pace: Pace = Pace.FREE
    pauses: tuple[float, ...] = (0.0,) * len(Pace)  # the longest at each pace, decaying slowly
    alive_s: float = 0.0  # the last sign of life since the counter stopped; 0: none
    sign: Sign = Sign.NONE  # the last sign that the kernel showed

    def read(self, counter: int, now: float, pace: Pace) -> Pulse:
        """The pulse after the counter was read again. Any change of the pace also moves the counter."""
        if counter == self.counter:
            return self
        pauses = [pause * (1.0 if at is Pace.FIRST else 0.999) for at, pause in zip(Pace, self.pauses, strict=True)]
        pauses[self.pace] = max(pauses[self.pace], now - self.changed_s)
        return Pulse(counter, now, pace, tuple(pauses))

    def seen(self, sign: Sign, now: float) -> Pulse:
        """The pulse after a look at the kernel's figures, while the counter stands still."""
        lives = sign in (Sign.WORKS, Sign.STORAGE)
        return replace(self, sign=sign, alive_s=now if lives else self.alive_s)

    def slept(self, seconds: float) -> Pulse:
        """The pulse after a gap in observation: the gap does not count as a pause."""
        return replace(self, changed_s=self.changed_s + seconds, alive_s=self.alive_s and self.alive_s + seconds)


class Verdict(NamedTuple):
    """The assessment of a worker. Times in seconds."""

    hung: bool
    still_s: float  # since its counter last moved
    silent_s: float  # since its last sign of life
    limit_s: float  # the worker counts as hung once it has stood still for this long, if nothing changes
    lived: bool  # it has shown a sign of life since its counter stopped


def judge(pulse: Pulse, now: float, patience: Patience) -> Verdict:
    """Whether a worker is hung, and when it will count as hung."""
    limits = patience.limits(pulse.pace, pulse.pauses[pulse.pace], pulse.sign)
    still_s, silent_s = now - pulse.changed_s, now - max(pulse.changed_s, pulse.alive_s)
    hung = silent_s > limits.silent_s or still_s > limits.still_s
    silence_ends_s = still_s - silent_s + limits.silent_s
    lives = pulse.sign in (Sign.WORKS, Sign.STORAGE)
    limit_s = limits.still_s if lives else min(limits.still_s, silence_ends_s)
    return Verdict(hung, still_s, silent_s, limit_s, pulse.alive_s > pulse.changed_s)


@dataclass(frozen=True)
class Hangs:
    """The workers of a rank that were considered hung, one after the other, none further than the first.

    Their host may only be so busy that a worker gets no processor; so each one is given twice the time of the last one.
    """

    times: int = 0
    step: int = -1  # the furthest step in which one was considered hung

    def read(self, step: int, pace: Pace) -> Hangs:
        """With the rank's current worker."""
        return Hangs() if pace is Pace.STEADY and step > self.step else self

    def again(self, step: int) -> Hangs:
        """Count one more hung worker."""
        return Hangs(self.times + 1, max(step, self.step))


def stalled_together(standing: Iterable[Pace], others_wait: bool) -> bool:
    """Whether storage stands still for a whole node, which is the fault of no worker.

    `standing`: the paces of the workers that stand still; `others_wait`: all other workers wait for a peer.
    """
    paces = list(standing)
    return others_wait and len(paces) > 1 and all(pace is Pace.FETCH for pace in paces)


def table() -> list[tuple[str, str, str]]:
    """The table of limits as text: the activity, how long a worker may be silent, how long it may stand still."""
    return [(rule.place, _text(rule.silent), _text(rule.still)) for rule in RULES.values()]


def _text(bound: Bound) -> str:
    parts = [
        f"{bound.floors * FLOOR_S:g} s" if not bound.users else "",
        f"{bound.users * USER_S:g} s" if bound.users else "",
        f"{bound.pauses:g} times the longest pause" if bound.pauses else "",
    ]
    return " or ".join(part for part in parts if part)
