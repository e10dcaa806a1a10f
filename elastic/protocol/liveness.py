"""When a worker whose progress counter stands still counts as hung: an adaptive timeout, without a clock."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR_S = 2.0  # never sooner than this while training
GRACE_S = 600.0  # in the first step, and in the user's own code between steps: evaluating, saving, opening files
FACTOR = 10.0  # times the longest pause seen


@dataclass(frozen=True)
class Pulse:
    """What is remembered of one worker's counter. Times in seconds, any origin."""

    counter: int
    changed_s: float
    longest_s: float = 0.0

    def read(self, counter: int, now: float, *, training: bool) -> Pulse:
        """The pulse after the counter was read again."""
        if counter == self.counter:
            return self
        pause = now - self.changed_s if training else 0.0
        return Pulse(counter, now, max(pause, self.longest_s * 0.999))

    def timeout_s(self, floor_s: float, *, training: bool) -> float:
        """How long the counter may stand still now."""
        return max(floor_s, FACTOR * self.longest_s) if training else max(GRACE_S, floor_s)

    def hung(self, now: float, floor_s: float, *, training: bool) -> bool:
        return now - self.changed_s > self.timeout_s(floor_s, training=training)
