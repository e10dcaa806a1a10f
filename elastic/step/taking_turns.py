"""Which of several optimizers a step of the job is for, where they take turns on each batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class TakingTurns:
    """Optimizer k steps in every `every[k]`-th batch, from the first on; a step of the job is a step of one of them.

    The batches of a step are counted from the start of the run, or of its epoch where epochs begin with a batch of
    their own. At least one optimizer steps in every batch. `collects`: the first one collects values of the batch for
    those behind it, and has no gradient of a loss.
    """

    every: tuple[int, ...] = (1,)
    collects: bool = False

    @property
    def period(self) -> int:
        """After so many batches the same optimizers are due again."""
        return math.lcm(*self.every)

    @property
    def alternates(self) -> bool:
        """Whether a batch may take several steps."""
        return len(self.every) > 1

    @cached_property
    def _ends(self) -> list[int]:
        """For each batch of a period, the steps of the period up to its end."""
        return list(accumulate(len(self.due(batch)) for batch in range(self.period)))

    @property
    def period_steps(self) -> int:
        """Steps of a period."""
        return self._ends[-1]

    def due(self, batch: int) -> tuple[int, ...]:
        """The optimizers that step in a batch."""
        return tuple(number for number, every in enumerate(self.every) if batch % every == 0)

    def steps(self, batches: int) -> int:
        """How many steps the first `batches` batches take."""
        periods, rest = divmod(batches, self.period)
        return periods * self.period_steps + (self._ends[rest - 1] if rest else 0)

    def batch_of(self, step: int) -> tuple[int, int]:
        """The batch of a step, and which of the batch's steps it is."""
        periods, rest = divmod(step, self.period_steps)
        batch = bisect_right(self._ends, rest)
        return periods * self.period + batch, rest - (self._ends[batch - 1] if batch else 0)


ONE_EACH = TakingTurns()  # one optimizer, which steps in each batch
