"""The job's recent past in bounded memory: steps, recoveries, events and the share of productive time."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEPS_KEPT = 1000
RECOVERIES_KEPT = 200
EVENTS_KEPT = 500
TYPICAL_OF = 33  # undisturbed steps; their median is the typical step time
PHASES = ("detect", "abort", "agree", "edit", "restore", "recompute")
_DISTURBING = frozenset(
    {"worker_died", "node_lost", "planned", "corruption", "lacking", "joined", "started", "restarted", "left"}
)


class StepPoint(NamedTuple):
    """A committed step. `at_s`: when, on the coordinator's monotonic clock; `step_s`: since the commit before."""

    step: int
    at_s: float
    step_s: float
    loss: float | None
    generation: int
    world_size: int
    undisturbed: bool


class RecoveryPoint(NamedTuple):
    """A recovery. `phases`: seconds by phase, in their order, that add up to `total_s`; `at_s`: of the next commit."""

    at_s: float
    reason: str
    why: str
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    generation: int
    step: int
    phases: Mapping[str, float]
    total_s: float
    redone_micro_batches: int
    lost_steps: int


class Commit(NamedTuple):
    """What a committed step means for the account of time. `lost_s` of `step_s` went into a recovery."""

    step_s: float
    lost_s: float


@dataclass
class Series:
    """Fed with the event log's lines, in their order."""

    started_s: float = 0.0  # when training began; 0: not yet
    ended_s: float = 0.0
    committed_s: float = 0.0  # the last commit
    productive_s: float = 0.0
    lost_s: float = 0.0
    steps: deque[StepPoint] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    recoveries: deque[RecoveryPoint] = field(default_factory=lambda: deque(maxlen=RECOVERIES_KEPT))
    events: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    commit_times: dict[int, float] = field(default_factory=dict)  # step -> when; of the last STEPS_KEPT
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=TYPICAL_OF))
    _disturbed: bool = True  # the first step takes what it likes

    @property
    def typical_s(self) -> float:
        """The median time of recent undisturbed steps; 0 if there were none."""
        return statistics.median(self._times) if self._times else 0.0

    def note(self, line: Mapping[str, Any]) -> None:
        """Any line of the log but `committed`."""
        self.events.append(line)
        event = line["event"]
        self._disturbed = self._disturbed or event in _DISTURBING
        if event == "started" and not self.started_s:
            self.started_s = self.committed_s = line["at_s"]
        elif event in ("trained", "ended"):
            self.ended_s = self.ended_s or line["at_s"]

    def commit(self, line: Mapping[str, Any], world_size: int) -> Commit:
        """A `committed` line, or a `committed_again`, which is all loss."""
        at_s, again = line["at_s"], line["event"] == "committed_again"
        if not self.started_s:  # a coordinator that came later
            self.started_s = self.committed_s = at_s
        step_s, typical_s = max(0.0, at_s - self.committed_s), self.typical_s
        lost_s = step_s if again else 0.0
        if not again and self._disturbed and typical_s:
            lost_s = max(0.0, step_s - typical_s)
        if not (again or self._disturbed):
            self._times.append(step_s)
        self.productive_s += step_s - lost_s
        self.lost_s += lost_s
        self.committed_s = at_s
        self.commit_times[line["step"]] = at_s
        self.commit_times.pop(line["step"] - STEPS_KEPT, None)
        if not again:
            place = (line.get("loss"), line.get("generation", 0), world_size, not self._disturbed)
            self.steps.append(StepPoint(line["step"], at_s, step_s, *place))
        self._disturbed = False
        return Commit(step_s, lost_s)

    def recover(self, line: Mapping[str, Any]) -> RecoveryPoint:
        """A `recovered` line."""
        point = RecoveryPoint(
            at_s=line["at_s"],
            reason=line["reason"],
            why=line["why"],
            ranks=tuple(line["ranks"]),
            nodes=tuple(line.get("nodes", ())),
            generation=line["generation"],
            step=line["interrupted_step"],
            phases={phase: line[f"{phase}_s"] for phase in PHASES},
            total_s=line["total_s"],
            redone_micro_batches=line["redone_micro_batches"],
            lost_steps=line.get("lost_steps", 0),
        )
        self.recoveries.append(point)
        return point

    def training_s(self, now: float) -> float:
        """The time from the start to the last commit, and what the step under way has taken beyond a typical one."""
        if not self.started_s:
            return 0.0
        under_way_s = (self.ended_s or now) - self.committed_s
        return self.committed_s - self.started_s + max(0.0, under_way_s - self.typical_s)

    def goodput(self, now: float) -> float:
        """The share of that time that went into steps that were kept."""
        training_s = self.training_s(now)
        return min(1.0, self.productive_s / training_s) if training_s > 0 else 1.0

    def rate(self, of: int = TYPICAL_OF) -> float:
        """Steps per second over the last `of` steps; 0 if there are none."""
        recent = list(self.steps)[-of:]
        seconds = sum(point.step_s for point in recent)
        return len(recent) / seconds if seconds > 0 else 0.0
