"""Finds stragglers by each rank's own compute time for a micro-batch over its last steps.

Only compute time identifies a straggler; step times are equal on all ranks, since all wait for the slowest. A rank is
compared with the other ranks of its stage, which do the same work. A rank that is alone in its stage is compared with
its own past there, less any slowdown common to the other ranks (longer sequences, a new phase of the training). A
single rank of a stage that was slow from its first step, and the only rank of a job, cannot be judged.

Medians over steps ignore short pauses. Steps right after a change of the membership do not count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .verdicts import (
    Finding,
    Hysteresis,
    SlowLimits,
    low_median,
)

LIMITS = SlowLimits(slow=1.5, level=1.2, patience=8, patience_s=3.0)  # steps
WINDOW_STEPS = 8  # for the median
LEAST_STEPS = 4  # minimum for a judgement
WARM_UP_STEPS = 3  # of a generation

Stages = Iterable[tuple[Hashable, Sequence[int]]]
"""What each stage computes, in whatever form compares, and its ranks."""


@dataclass
class _Series:
    """A rank's last steps in its place."""

    place: Hashable = None  # what it computes
    generation: int = -1
    passing: int = 0  # warm-up steps left
    each_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))  # compute of a micro-batch
    waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))  # in a step
    steps: int = 0  # that counted here
    new: int = 0  # since the last comparison
    micro_batches: int = 0  # of the last step
    now_s: float = 0.0  # median of `each_s`
    past_s: float = 0.0  # the best median so far; 0: none yet
    slow_steps: int = 0  # since it was last level

    def add(self, each_s: float, wait_s: float, micro_batches: int) -> None:
        self.each_s.append(each_s)
        self.waits_s.append(wait_s)
        self.micro_batches = micro_batches
        self.steps += 1
        self.new += 1

    def settle(self) -> None:
        """Process the steps since the last comparison."""
        if self.new:
            self.now_s = low_median(self.each_s)
        if self.new and len(self.each_s) == WINDOW_STEPS:
            self.past_s = min(self.past_s or self.now_s, self.now_s)

    def moved(self, place: Hashable) -> None:
        """The rank computes something else from now on: drop its measurements."""
        self.place = place
        self.each_s.clear()
        self.waits_s.clear()
        self.steps = self.new = self.slow_steps = 0
        self.now_s = self.past_s = 0.0
        self.passing = WARM_UP_STEPS


@dataclass(frozen=True)
class _Compared:
    """A rank's measurement, and its reference."""

    ratio: float
    with_s: float
    against: str  # stage | past
    ranks: int  # how many it was compared with


class Stragglers:
    """`add` takes the times of each rank's steps; `compare` judges within the stages. Bounded by the world size."""

    def __init__(self) -> None:
        self.per_micro_batch_s: dict[int, float] = {}
        self.ratios: dict[int, float] = {}
        self.alone: set[int] = set()  # the ranks whose ratio is to their own past
        self.findings: dict[int, Finding] = {}
        self._hysteresis = Hysteresis(LIMITS)
        self._series: dict[int, _Series] = {}

    @property
    def slow(self) -> set[int]:
        """The ranks that are called slow."""
        return set(self.findings)

    def add(self, rank: int, compute_s: float, micro_batches: int, *, wait_s: float = 0.0, generation: int = 0) -> None:
        """One step of one rank."""
        if not micro_batches:
            return
        series = self._series.setdefault(rank, _Series())
        if generation != series.generation:
            series.generation, series.passing = generation, WARM_UP_STEPS
        if series.passing:
            series.passing -= 1
        else:
            series.add(compute_s / micro_batches, wait_s, micro_batches)

    def compare(self, stages: Stages, now_s: float) -> None:
        """Compare all ranks and forget ranks that are in no stage. `now_s` dates the findings."""
        placed = [(place, list(ranks)) for place, ranks in stages]
        self._place(placed)
        for series in self._series.values():
            series.settle()
        found: dict[int, _Compared] = {}
        alone: list[int] = []
        for _, ranks in placed:
            known = [rank for rank in ranks if self._tells(rank)]
            if len(ranks) > 1:
                found |= self._within(known)
            else:
                alone += known
        found |= self._with_past(alone)
        self.ratios = {rank: compared.ratio for rank, compared in found.items()}
        self.alone = {rank for rank, compared in found.items() if compared.against == "past"}
        self.per_micro_batch_s = {rank: self._series[rank].now_s for rank in self._series if self._tells(rank)}
        self._judge(found, {rank for _, ranks in placed if len(ranks) > 1 for rank in ranks}, now_s)

    def slow_steps(self, rank: int) -> int:
        """For how many steps a rank has been slower than what it is compared with."""
        series = self._series.get(rank)
        return series.slow_steps if series is not None else 0

    def slowest(self, count: int) -> Mapping[int, float]:
        """The highest ratios, by rank."""
        return dict(sorted(self.ratios.items(), key=lambda item: -item[1])[:count])

    def _place(self, stages: Sequence[tuple[Hashable, Sequence[int]]]) -> None:
        places = {rank: place for place, ranks in stages for rank in ranks}
        for rank in [rank for rank in self._series if rank not in places]:
            del self._series[rank]
        for rank, series in self._series.items():
            if series.place is None:
                series.place = places[rank]
            elif series.place != places[rank]:
                series.moved(places[rank])

    def _tells(self, rank: int) -> bool:
        series = self._series.get(rank)
        return series is not None and len(series.each_s) >= LEAST_STEPS and series.now_s > 0

    def _within(self, ranks: Sequence[int]) -> dict[int, _Compared]:
        """Ranks that do the same work, with each other."""
        if len(ranks) < 2:
            return {}
        with_s = low_median([self._series[rank].now_s for rank in ranks])
        return {rank: _Compared(self._series[rank].now_s / with_s, with_s, "stage", len(ranks) - 1) for rank in ranks}

    def _with_past(self, alone: Sequence[int]) -> dict[int, _Compared]:
        """Compare ranks that are alone in their stage with their own past, less any slowdown common to all ranks."""
        changed = {rank: s.now_s / s.past_s for rank, s in self._series.items() if s.past_s} if alone else {}
        if len(changed) < 2:
            return {}
        ranked = sorted(changed.values())
        middle = (len(ranked) - 2) // 2  # of the others
        found = {}
        for rank in alone:
            if rank in changed:
                common = max(1.0, ranked[middle + (changed[rank] <= ranked[middle])])
                series = self._series[rank]
                found[rank] = _Compared(changed[rank] / common, series.past_s * common, "past", len(ranked) - 1)
        return found

    def _judge(self, found: Mapping[int, _Compared], in_company: set[int], now_s: float) -> None:
        # A slow rank of a shared stage stays slow until it is judged again; a rank that is alone starts a new past.
        self._hysteresis.keep({*found, *(self._hysteresis.slow & in_company)})
        for rank, compared in found.items():
            series = self._series[rank]
            series.slow_steps = series.slow_steps + series.new if compared.ratio > LIMITS.level else 0
            if series.new:
                self._hysteresis.see(rank, compared.ratio, now_s, series.new)
            series.new = 0
        kept = {rank: finding for rank, finding in self.findings.items() if rank in self._hysteresis.slow}
        others_wait_s = self._waits(found) if self._hysteresis.slow else 0.0
        for rank in [rank for rank in found if rank in self._hysteresis.slow]:
            since_s = kept[rank].since_s if rank in kept else now_s
            kept[rank] = self._finding(rank, found[rank], since_s, others_wait_s)
        self.findings = kept

    def _waits(self, ranks: Iterable[int]) -> float:
        """The time per step that ranks that are not slow wait for others."""
        waits = [low_median(self._series[rank].waits_s) for rank in ranks if rank not in self._hysteresis.slow]
        return low_median(waits) if waits else 0.0

    def _finding(self, rank: int, compared: _Compared, since_s: float, others_wait_s: float) -> Finding:
        series = self._series[rank]
        wait_s = low_median(series.waits_s)
        held_up_s = max(0.0, series.now_s - compared.with_s) * series.micro_batches
        if compared.against == "stage":
            with_what = f"the {compared.ranks} others of its stage" if compared.ranks > 1 else "the other of its stage"
        else:
            with_what = "its own past in this place, corrected by how the others changed,"
        evidence = (
            f"{series.now_s:.4g} s of compute a micro-batch for {series.slow_steps} steps, {with_what} "
            f"{compared.with_s:.4g} s ({compared.ratio:.2f} times); "
            f"it waits {wait_s:.3g} s a step for others, they {others_wait_s:.3g} s"
        )
        fields = {
            "micro_batch_s": series.now_s,
            "compared_s": compared.with_s,
            "against": compared.against,
            "steps": series.slow_steps,
            "wait_s": wait_s,
            "others_wait_s": others_wait_s,
            "held_up_s": held_up_s,
        }
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
        return Finding(
            what="compute", rank=rank, factor=compared.ratio, evidence=evidence, fields=rounded, since_s=since_s
        )
