"""The interval of protected versions: every n steps, with n chosen from the cost of protection and its budget. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

WARM_UP_STEPS = 4  # the first steps import, allocate and connect
PROBE_STEPS = 12  # every second version is protected, to see steps with and without
PERIOD_STEPS = 256  # between probes
MEMORY_STEPS = 24  # times that count
LARGEST = 1000


@dataclass
class Interval:
    """Chooses n. `fixed` is the user's number, 0 for "auto"; `budget` is the share of a step that protection may cost.

    Every member keeps one, fed with the same times; the choice of the lowest rank applies to all.
    """

    fixed: int
    budget: float
    steps: int = 0
    chosen: int = 1
    why: str = "not measured yet"
    _with: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_STEPS))
    _without: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_STEPS))

    def __post_init__(self) -> None:
        if self.fixed:
            self.chosen, self.why = self.fixed, "as asked"

    def observe(self, step_s: float, *, protecting: bool) -> None:
        """Record how long a step took, and whether a version was being protected meanwhile."""
        self.steps += 1
        if self.fixed or self.steps <= WARM_UP_STEPS or step_s <= 0:
            return
        (self._with if protecting else self._without).append(step_s)
        if self._probing() or not self._with or not self._without:
            return
        if (self.steps - WARM_UP_STEPS - PROBE_STEPS) % PERIOD_STEPS == 1:
            self._choose()

    def _probing(self) -> bool:
        return (self.steps - WARM_UP_STEPS) % PERIOD_STEPS <= PROBE_STEPS

    def _choose(self) -> None:
        base = median(self._without)
        cost = max(0.0, median(self._with) - base)
        self.chosen = min(LARGEST, max(1, math.ceil(cost / (self.budget * base))))
        self.why = (
            f"a step takes {base * 1e3:.1f} ms, {cost * 1e3:.1f} ms more while a version is protected, and "
            f"{self.budget:.1%} are allowed"
        )

    @property
    def proposal(self) -> int:
        """The n to use for the next step."""
        if self.fixed:
            return self.fixed
        return max(2, self.chosen) if self._probing() and self.steps > WARM_UP_STEPS else self.chosen
