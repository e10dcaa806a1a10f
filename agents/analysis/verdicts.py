"""Findings of slow ranks and links, with a hysteresis: neither reported nor withdrawn at the first observation."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A slow rank or link: what was measured, and with what it was compared."""

    what: str  # compute | link
    rank: int
    peer: int = -1
    node: str = ""
    factor: float
    evidence: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # the numbers in the evidence
    since_s: float = 0.0  # when it was found
    blamed: bool = True  # whether it is clear which node it is

    def view(self, now: float) -> dict[str, Any]:
        """As JSON values, for display."""
        whose = {"what": self.what, "rank": self.rank, "peer": self.peer if self.peer >= 0 else None}
        lasting = {"node": self.node, "factor": self.factor, "for_s": max(0.0, now - self.since_s)}
        return {**whose, **lasting, "blamed": self.blamed, "evidence": self.evidence, "fields": dict(self.fields)}


@dataclass(frozen=True)
class SlowLimits:
    """When something is called slow, and when no longer."""

    slow: float  # as a multiple of what it is compared with
    level: float
    patience: int  # how many consecutive observations must favour a change ...
    patience_s: float  # ... and for how long: steps may be short, and a machine busy for a moment


@dataclass
class Hysteresis:
    """`see` takes the ratio of a rank or link; `slow` are those classified as slow. Bounded by `keep`."""

    limits: SlowLimits
    slow: set[Hashable] = field(default_factory=set)
    _streaks: dict[Hashable, tuple[int, float]] = field(default_factory=dict)  # how many, since when

    def see(self, key: Hashable, ratio: float, now_s: float, observations: int = 1) -> bool:
        """Returns whether the classification changes. One call counts for half of the patience at most."""
        slow = key in self.slow
        speaks = ratio < self.limits.level if slow else ratio > self.limits.slow
        seen = min(observations, max(1, self.limits.patience // 2))
        before, since_s = self._streaks.get(key, (0, now_s))
        changes = speaks and before + seen >= self.limits.patience and now_s - since_s >= self.limits.patience_s
        if changes:
            self.slow ^= {key}
        if speaks and not changes:
            self._streaks[key] = (before + seen, since_s)
        else:
            self._streaks.pop(key, None)
        return changes

    def keep(self, keys: Collection[Hashable]) -> None:
        """Forget all others."""
        self.slow &= set(keys)
        for key in [key for key in self._streaks if key not in keys]:
            del self._streaks[key]


def low_median(values: Sequence[float]) -> float:
    """The middle one; of an even number the lower, so that of two the faster is the measure."""
    return sorted(values)[(len(values) - 1) // 2]
