"""The coordinator's state: immutable values, replaced and never changed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...resharding.layout import Layout
from ...resharding.plan import Plan, Report
from .events import Job, WorkerId


class Phase(enum.Enum):
    """Where a job is. Classic jobs (no elastic decorator) go from LAUNCHED to DONE by restarts only."""

    FORMING = "forming"  # waiting for nodes
    LAUNCHED = "launched"  # workers run; elastic ones are waited for
    RUNNING = "running"  # training
    RECOVERING = "recovering"  # the generation was aborted; reports are awaited
    DONE = "done"


class Status(enum.Enum):
    """Where a worker is."""

    STARTING = "starting"  # forked, not ready
    READY = "ready"  # has built its model, is no member yet
    MEMBER = "member"
    FINISHED = "finished"  # still a member; the user's function returned
    EXITED = "exited"  # classic: ended with status 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the launcher was told. Times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    max_restarts: int = 0
    last_call_s: float = 1.0
    join_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 5.0
    crash_limit: int = 5  # deaths of one rank without a committed step between them


@dataclass(frozen=True)
class Node:
    name: str
    host: str
    slots: int
    keeper: str
    heard_s: float


@dataclass(frozen=True)
class Worker:
    id: WorkerId
    node: str
    status: Status = Status.STARTING
    peer: Mapping[str, Any] | None = None
    deaths: int = 0  # of its rank since the last commit
    owes_end: bool = False  # its rank died after the last step, in what the user's function does then


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A recovery under way, and after it until the next commit: what its log line will say."""

    generation: int
    why: str
    dead: tuple[WorkerId, ...]
    step: int
    phase: str
    lost_micro_batches: int
    lost_steps: int = 0
    killed_s: float  # when it happened, if that is known, else when it was noticed
    detected_s: float  # when the (first) death was noticed
    started_s: float  # when the coordinator began
    join: Plan | None = None  # the join plan that some may have switched to
    awaited: frozenset[WorkerId] = frozenset()
    reports: Mapping[WorkerId, Report] = field(default_factory=dict)
    busy_s: float = 0.0
    planned_s: float = 0.0
    resumed: Mapping[WorkerId, tuple[float, float]] = field(default_factory=dict)
    resumed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything the coordinator knows."""

    config: Config
    phase: Phase = Phase.FORMING
    formed_s: float = 0.0  # when forming began, then when the minimum was reached
    nodes: Mapping[str, Node] = field(default_factory=dict)
    workers: Mapping[int, Worker] = field(default_factory=dict)
    elastic: bool = False
    restarts: int = 0
    job: Job | None = None
    generation: int = 0
    layout: Layout | None = None
    join: Plan | None = None  # prepared, not yet switched to
    recovery: Recovery | None = None
    committed: int = -1  # the last committed step
    agreed: int = -1  # the newest step known to have been agreed on, by a commit or a report
    agreement: str = ""  # what was agreed in it

    def members(self) -> tuple[Worker, ...]:
        return tuple(w for w in self.workers.values() if w.status in (Status.MEMBER, Status.FINISHED))
