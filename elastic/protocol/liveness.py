"""When a worker whose progress counter stands still counts as hung: adaptive timeouts, without a clock."""

from __future__ import annotations

import enum
from dataclasses import dataclass

FLOOR_S = 2.0  # never sooner than this in a step
GRACE_S = 600.0  # in the user's own code between steps, and in a first step while nothing is known of such
FACTOR = 10.0  # times the longest pause seen


class Pace(enum.IntEnum):
    """What is to be expected of a worker."""

    FREE = 0  # the user's own code between steps, or before them: evaluating, saving, opening files
    FIRST = 1  # the first step of a process, or after its layers changed: may compile, allocate, connect
    STEADY = 2  # any other step


@dataclass(frozen=True)
class Pulse:
    """What is remembered of one worker's counter. Times in seconds, any origin.

    A pause counts for the pace that it began in: whoever returns from the user's code was not slow in a step.
    """

    counter: int
    changed_s: float
    pace: Pace = Pace.FREE
    longest_s: float = 0.0  # pause in steady steps; slowly forgotten
    first_s: float = 0.0  # in first steps

    def read(self, counter: int, now: float, pace: Pace) -> Pulse:
        """The pulse after the counter was read again. Whatever changes the pace also moves the counter."""
        if counter == self.counter:
            return self
        pause = now - self.changed_s
        longest_s, first_s = self.longest_s * 0.999, self.first_s
        if self.pace is Pace.STEADY:
            longest_s = max(longest_s, pause)
        elif self.pace is Pace.FIRST:
            first_s = max(first_s, pause)
        return Pulse(counter, now, pace, longest_s, first_s)

    def timeout_s(self, floor_s: float, first_s: float) -> float:
        """How long the counter may stand still now.

        `first_s`: the longest pause in the first steps that were done on this host; 0 if none was.
        """
        if self.pace is Pace.STEADY:
            return max(floor_s, FACTOR * self.longest_s)
        known = self.pace is Pace.FIRST and first_s > 0
        return max(floor_s, min(GRACE_S, FACTOR * first_s) if known else GRACE_S)

    def hung(self, now: float, floor_s: float, first_s: float) -> bool:
        return now - self.changed_s > self.timeout_s(floor_s, first_s)


@dataclass(frozen=True)
class Hangs:
    """A rank's workers that were taken for hung, one after the other, before they were past their first step.

    Perhaps their host is only so busy that a worker gets no processor; so each is given twice as long as the last one.
    """

    times: int = 0

    def read(self, pace: Pace) -> Hangs:
        """With a worker that goes at this pace now."""
        return Hangs() if pace is Pace.STEADY else self

    def again(self) -> Hangs:
        """One more."""
        return Hangs(self.times + 1)

    def floor_s(self, floor_s: float) -> float:
        """The least time now that a counter must stand still."""
        return floor_s * 2.0**self.times
