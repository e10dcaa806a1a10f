"""The coordinator's state: immutable values, replaced and never changed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everstep.resharding.layout import Layout
from everstep.resharding.placement import Placement
from everstep.resharding.plan import Plan, Report

from .causes import Cause, Departure
from .events import (
    Job,
    Saved,
    Stopping,
    WorkerId,
)


class Phase(enum.Enum):
    """Where a job is. Classic jobs (no elastic decorator) go from LAUNCHED to DONE by restarts only."""

    FORMING = "forming"  # waiting for nodes
    LAUNCHED = "launched"  # workers run; elastic ones are waited for
    RUNNING = "running"  # training
    RECOVERING = "recovering"  # the generation was aborted; reports are awaited
    AFTER = "after training"  # scripts run what comes after; nobody is replaced any more
    DONE = "done"  # the job is over


class Status(enum.Enum):
    """Where a worker is."""

    STARTING = "starting"  # forked, not ready
    READY = "ready"  # has built its model, is no member yet
    MEMBER = "member"
    FINISHED = "finished"  # still a member; the user's function returned
    AFTER = "after training"  # its script runs what comes after
    EXITED = "exited"  # ended with status 0
    LEFT = "left"  # handed over, and is no member any more; its node is still asked for what it held


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the launcher was told. Times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    max_restarts: int = 0
    last_call_s: float = 1.0
    join_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 1.5  # the least; longer for a node that has shown longer gaps
    stop_grace_s: float = 20.0  # how long a job that is to stop may take to save a checkpoint
    last_save_s: float = 3600.0  # how long the last checkpoint is waited for, whatever workers say
    crash_limit: int = 5  # deaths of one rank without a committed step between them
    hang_limit: int = 20  # likewise of those killed as hung while they showed signs of life; each is given longer
    quarantine_after: int = 0  # troubles of one host, until it is kept out; 0: none ever is
    quarantine_within_s: float = 3600.0  # of one another
    quarantine_s: float = 3600.0  # how long it is kept out


@dataclass(frozen=True)
class Node:
    name: str
    host: str
    slots: int
    keeper: str
    memory_bytes: int = 0
    stores: Mapping[int, int] = field(default_factory=dict)  # attempt -> port of torch's store on it
    health: Mapping[str, float] = field(default_factory=dict)  # figures of its health check


class Trouble(NamedTuple):
    """Something that a host failed in, or lagged with."""

    at_s: float
    what: str  # the event that says so in the log
    detail: str


class Quarantine(NamedTuple):
    """A host that is kept out of the job."""

    since_s: float
    until_s: float
    why: str


class Heard(NamedTuple):
    """When a node was last heard of."""

    at_s: float
    gap_s: float = 0.0  # the longest silence it has shown, slowly forgotten


@dataclass(frozen=True)
class Worker:
    id: WorkerId
    node: str
    status: Status = Status.STARTING
    peer: Mapping[str, Any] | None = None
    deaths: int = 0  # of its rank since the last commit
    hangs: int = 0  # likewise: those killed as hung with signs of life, which are none of these
    since: int = 0  # the version at which it became a member: until the next one, all it owns is held elsewhere too
    owes_end: bool = False  # its rank died after the last step: the user's script has not come to its end there
    left: int = -1  # the version at which the user's code left the loop; -1: it has not
    left_s: float = 0.0  # when that was
    last_name: str = ""  # of a checkpoint of that version
    begun: int = -1  # the step that it has begun although somebody had left before it


class Leaving(NamedTuple):
    """A node that hands over. `concluded`: its ranks that have nothing under way any more.

    `since`: a step that was committed without it; -1 as long as it has members, or none was.
    """

    why: str
    concluded: tuple[int, ...] = ()
    since: int = -1
    departure: Departure = Departure.ASKED


class Concluding(NamedTuple):
    """The last checkpoint is tried once more, as `name`, until `deadline_s`.

    `alone`: who left the loop although others went on, if that is how training ends. `told`: who has done its part.
    """

    version: int
    name: str
    deadline_s: float
    alone: str = ""
    told: tuple[WorkerId, ...] = ()
    why: str = ""


class Loss(NamedTuple):
    """A member lost with its node. `since`: when it became one; `planned`: a plan was made since it was lost."""

    since: int
    planned: bool = False


@dataclass(frozen=True, kw_only=True)
class RecoveryStory:
    """A recovery under way, and after it until the next commit: what its log line will say."""

    generation: int
    cause: Cause
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
    nodes_lost: tuple[str, ...] = ()  # what only they held is gone
    losses: tuple[Loss, ...] = ()  # what went with them, as far as it may still be missing
    planned: int = -1  # the version of the last plan of this recovery
    ceiling: int | None = None  # newer versions were tried, and could not be had
    lacking: tuple[int, ...] = ()  # shards of the version that was tried
    substitutes: tuple[int, ...] = ()  # shards that are gone, and made up (on_loss="neighbors")
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
    heard: Mapping[str, Heard] = field(default_factory=dict)
    workers: Mapping[int, Worker] = field(default_factory=dict)
    vacant: Mapping[int, int] = field(default_factory=dict)  # rank -> its last incarnation; its node is lost
    leaving: Mapping[str, Leaving] = field(default_factory=dict)  # nodes that hand over
    troubles: Mapping[str, tuple[Trouble, ...]] = field(default_factory=dict)  # host -> the newest, oldest first
    quarantined: Mapping[str, Quarantine] = field(default_factory=dict)  # hosts that are kept out
    ticked_s: float = 0.0
    elastic: bool = False
    restarts: int = 0
    job: Job | None = None
    generation: int = 0
    layout: Layout | None = None
    join: Plan | None = None  # a join or a leave: prepared, not yet switched to
    recovery: RecoveryStory | None = None
    placement: Placement | None = None  # of parity, in the newest generation
    placements: Mapping[int, Placement] = field(default_factory=dict)  # by generation: the layout's, and the join's
    committed: int = -1  # the last committed step; goes back when a lost node takes versions with it
    recorded: int = -1  # the last step in the ledger; never goes back
    agreed: int = -1  # the newest step known to have been agreed on, by a commit or a report
    agreement: str = ""  # what was agreed in it
    protected: int = -1  # the newest version that is known to outlive nodes
    snapshot_every: int = 0  # steps between versions that outlive nodes, as agreed last; 0 before anything was
    agreements: Mapping[int, str] = field(default_factory=dict)  # step -> what was agreed, from protected - 1 on
    digests: Mapping[int, str] = field(default_factory=dict)  # step -> digest in the ledger, likewise
    saved: tuple[Saved, ...] = ()  # committed checkpoints, newest first
    stopping: Stopping | None = None
    concluding: Concluding | None = None
    lost: tuple[str, ...] = ()  # what was not got done in a job that goes on, or ends, all the same
    rolled_back: int = 0  # the generation of the last return to an older version

    def members(self) -> tuple[Worker, ...]:
        return tuple(w for w in self.workers.values() if w.status in (Status.MEMBER, Status.FINISHED))
