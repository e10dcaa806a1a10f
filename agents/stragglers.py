"""A first signal of slow ranks: their own compute for a micro-batch, against that of the others of their stage.

Compute alone tells who is slow; step times are equal everywhere, since all wait for the slowest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SLOW_RATIO = 1.5  # to be called a straggler ...
LEVEL_RATIO = 1.2  # ... and to be no longer called one
PATIENCE_STEPS = 8  # in a row
SMOOTHING = 0.2  # weight of the newest step


@dataclass
class Stragglers:
    """`add` what each rank's steps took; `compare` within the stages. Bounded by the world size."""

    per_micro_batch_s: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)
    slow: set[int] = field(default_factory=set)
    _streak: dict[int, int] = field(default_factory=dict)  # steps in a row that speak for a change
    _steps: dict[int, int] = field(default_factory=dict)  # seen since the last comparison

    def add(self, rank: int, compute_s: float, micro_batches: int) -> None:
        """One step of one rank."""
        if micro_batches:
            each_s = compute_s / micro_batches
            before = self.per_micro_batch_s.get(rank, each_s)
            self.per_micro_batch_s[rank] = before + SMOOTHING * (each_s - before)
            self._steps[rank] = self._steps.get(rank, 0) + 1

    def compare(self, stages: Iterable[Sequence[int]]) -> None:
        """Compare the ranks of each stage; ranks that are in none are forgotten."""
        ratios: dict[int, float] = {}
        placed: set[int] = set()
        for ranks in stages:
            placed.update(ranks)
            known = {rank: self.per_micro_batch_s[rank] for rank in ranks if rank in self.per_micro_batch_s}
            if len(known) >= 2:
                median_s = sorted(known.values())[(len(known) - 1) // 2]
                ratios |= {rank: each_s / median_s for rank, each_s in known.items() if median_s > 0}
        for rank, ratio in ratios.items():
            changes = ratio > SLOW_RATIO if rank not in self.slow else ratio < LEVEL_RATIO
            seen = min(self._steps.pop(rank, 0), PATIENCE_STEPS // 2)  # one look does not decide
            streak = self._streak.get(rank, 0) + seen if changes else 0
            if streak >= PATIENCE_STEPS:
                self.slow ^= {rank}
                streak = 0
            self._streak[rank] = streak
        self.ratios = ratios
        self.slow &= ratios.keys()
        for rank in self.per_micro_batch_s.keys() - placed:
            del self.per_micro_batch_s[rank]
            self._streak.pop(rank, None)
            self._steps.pop(rank, None)

    def slowest(self, count: int) -> Mapping[int, float]:
        """The highest ratios, by rank."""
        return dict(sorted(self.ratios.items(), key=lambda item: -item[1])[:count])
