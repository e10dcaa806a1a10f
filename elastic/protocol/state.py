"""The coordinator's state: immutable values, replaced and never changed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from everstep.resharding.forecast import Costs
from everstep.resharding.layout import Layout
from everstep.resharding.lines import Lines
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
    """The phases of a job. Ordinary jobs (no elastic decorator) pass from LAUNCHED to DONE by restarts only."""

    FORMING = "forming"  # waiting for nodes
    LAUNCHED = "launched"  # workers run; the job waits until the elastic ones are ready
    RUNNING = "running"  # training
    RECOVERING = "recovering"  # the generation was aborted; the coordinator collects reports
    AFTER = "after training"  # scripts run the code after training; no worker is replaced any more
    DONE = "done"  # the job is over


class Status(enum.Enum):
    """The stages of a worker."""

    STARTING = "starting"  # forked, not ready
    READY = "ready"  # has built its model, and is not yet a member
    MEMBER = "member"
    FINISHED = "finished"  # still a member; the user's function returned
    AFTER = "after training"  # its script runs the code after training
    EXITED = "exited"  # ended with status 0
    LEFT = "left"  # handed over, and is no longer a member; the keeper of its node still serves its shards


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of the launcher. Times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    spares: int = 0  # nodes beyond max_nodes that wait for a place
    max_restarts: int = 0
    last_call_s: float = 1.0
    join_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 1.5  # the least limit; longer for a node that has shown longer gaps
    stop_grace_s: float = 20.0  # how long a job that is asked to stop may take to save a checkpoint
    last_save_s: float = 3600.0  # how long the job waits for the last checkpoint, whatever workers report
    crash_limit: int = 5  # deaths of one rank without a committed step between them
    hang_limit: int = 20  # likewise of workers killed as hung with signs of life; each one is given longer
    quarantine_after: int = 0  # number of troubles of one host that puts it in quarantine; 0: never
    quarantine_within_s: float = 3600.0  # the window in which troubles are counted
    quarantine_s: float = 3600.0  # the duration of a quarantine
    rebalance_after_s: float = 10.0  # how long a layout has to last before a faster one is looked for; 0: never
    node_mtbf_h: float = 6000.0  # mean time between failures of one node: about that of the cluster of Llama 3 (2024)
    prefetch: bool = True  # what a rebalance moves is copied ahead; otherwise it is read at the switch


@dataclass(frozen=True)
class Node:
    name: str
    host: str
    slots: int
    keeper: str
    memory_bytes: int = 0
    stores: Mapping[int, int] = field(default_factory=dict)  # attempt -> port of torch's store on it
    health: Mapping[str, float] = field(default_factory=dict)  # figures of its health check
    domains: tuple[str, ...] = ()  # labels of its failure domains


class Trouble(NamedTuple):
    """A failure or slowness that counts against a host."""

    at_s: float
    what: str  # the event of the log that reports it
    detail: str


class Quarantine(NamedTuple):
    """A host that is kept out of the job."""

    since_s: float
    until_s: float
    why: str


class Heard(NamedTuple):
    """When a node was last heard of."""

    at_s: float
    gap_s: float = 0.0  # the longest silence it has shown, decaying slowly


@dataclass(frozen=True)
class Worker:
    id: WorkerId
    node: str
    status: Status = Status.STARTING
    peer: Mapping[str, Any] | None = None
    deaths: int = 0  # of its rank since the last commit
    hangs: int = 0  # likewise: workers killed as hung with signs of life, which `deaths` does not include
    since: int = 0  # the version at which it became a member: before the next one, others still hold all it owns
    owes_end: bool = False  # its rank died after the last step: the user's script has yet to end on it
    left: int = -1  # the version at which the user's code left the loop; -1: it has not
    left_s: float = 0.0  # when that was
    last_name: str = ""  # of a checkpoint of that version
    begun: int = -1  # the step that it has begun although another rank left the loop before that
    memory_bytes: int = 0  # what it may use for parameters, gradients and optimizer states; 0: no limit


class Leaving(NamedTuple):
    """A node that hands over. `concluded`: its ranks that have no operation in progress any more.

    `since`: a step that was committed without it; -1 while it has members, or until there is such a step.
    """

    why: str
    concluded: tuple[int, ...] = ()
    since: int = -1
    departure: Departure = Departure.ASKED


class Concluding(NamedTuple):
    """The last checkpoint is attempted once more, as `name`, until `deadline_s`.

    `alone`: the error if some ranks left the loop and others did not. `told`: the ranks that have done their part.
    """

    version: int
    name: str
    deadline_s: float
    alone: str = ""
    told: tuple[WorkerId, ...] = ()
    why: str = ""


class Switched(NamedTuple):
    """A rank entered a faster layout: how long that took, and how many bytes it read before and meanwhile."""

    rank: int
    seconds: float
    prefetched: int
    moved: int


class Balance(NamedTuple):
    """The search for a faster layout than that of `generation`, which has lasted since `since_s`, after `since_step`.

    `offered`: the generation of the faster layout that was found, which is to save the part `promised` of the step time
    `step_s`. Of a layout that was found so, these are what was promised of it; `promised` is 0 of any other.
    `forecast_s`: the step time that the forecast gave it, from costs that were measured; 0 if they were assumed.
    `switched`: the ranks that have entered it, until all have.
    `patience`: by how much longer than the first one a layout has to last before another is searched for.
    """

    generation: int = 0
    since_s: float = 0.0
    since_step: int = -1
    searched: bool = False
    offered: int = 0
    promised: float = 0.0
    step_s: float = 0.0
    forecast_s: float = 0.0
    switched: tuple[Switched, ...] = ()
    patience: int = 1


NOT_SEARCHED = Balance()


class Loss(NamedTuple):
    """A member lost with its node. `since`: when it became a member; `planned`: a plan was made after the loss."""

    since: int
    planned: bool = False


@dataclass(frozen=True, kw_only=True)
class RecoveryStory:
    """A recovery in progress, kept until the next commit: the contents of its log line."""

    generation: int
    cause: Cause
    why: str
    dead: tuple[WorkerId, ...]
    step: int
    phase: str
    lost_micro_batches: int
    lost_steps: int = 0
    killed_s: float  # when the worker was killed, if known; otherwise when its death was noticed
    detected_s: float  # when the (first) death was noticed
    started_s: float  # when the coordinator began
    join: Plan | None = None  # the join plan that some members may have switched to
    nodes_lost: tuple[str, ...] = ()  # state that only they held is lost
    losses: tuple[Loss, ...] = ()  # the members lost with them whose state may still be missing
    planned: int = -1  # the version of the last plan of this recovery
    ceiling: int | None = None  # newer versions were attempted, and could not be restored
    lacking: tuple[int, ...] = ()  # shards of the attempted version that are missing
    substitutes: tuple[int, ...] = ()  # lost shards that are approximated (on_loss="neighbors")
    lines: Lines = ()  # which records count, before any plan of this recovery
    awaited: frozenset[WorkerId] = frozenset()
    reports: Mapping[WorkerId, Report] = field(default_factory=dict)
    busy_s: float = 0.0
    planned_s: float = 0.0
    resumed: Mapping[WorkerId, tuple[float, float]] = field(default_factory=dict)
    resumed_s: float = 0.0

    def extended(
        self,
        generation: int,
        cause: Cause,
        *,
        awaited: frozenset[WorkerId],
        dead: tuple[WorkerId, ...],
        lost_micro_batches: int,
        join: Plan | None,
        nodes_lost: tuple[str, ...],
        losses: tuple[Loss, ...],
    ) -> RecoveryStory:
        """This recovery begins again, for another cause: reports, and what was carried out, were of its last plan."""
        return replace(
            self,
            generation=generation,
            cause=cause.after(self.cause),
            awaited=awaited,
            dead=self.dead + dead,
            lost_micro_batches=self.lost_micro_batches + lost_micro_batches,
            join=join or self.join,
            nodes_lost=self.nodes_lost + nodes_lost,
            losses=self.losses + losses,
            reports={},
            busy_s=0.0,
            planned_s=0.0,
            resumed={},
            resumed_s=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of the coordinator."""

    config: Config
    phase: Phase = Phase.FORMING
    formed_s: float = 0.0  # when forming began, then when the minimum was reached
    nodes: Mapping[str, Node] = field(default_factory=dict)
    spares: Mapping[str, Node] = field(default_factory=dict)  # nodes that wait for a place
    heard: Mapping[str, Heard] = field(default_factory=dict)
    workers: Mapping[int, Worker] = field(default_factory=dict)
    vacant: Mapping[int, int] = field(default_factory=dict)  # rank -> its last incarnation; its node is lost
    leaving: Mapping[str, Leaving] = field(default_factory=dict)  # nodes that hand over
    troubles: Mapping[str, tuple[Trouble, ...]] = field(default_factory=dict)  # host -> newest ones, oldest first
    quarantined: Mapping[str, Quarantine] = field(default_factory=dict)  # hosts that are kept out
    ticked_s: float = 0.0
    elastic: bool = False
    restarts: int = 0
    job: Job | None = None
    generation: int = 0
    layout: Layout | None = None
    join: Plan | None = None  # a prepared join, departure, rebalance or relayout that no member has switched to yet
    recovery: RecoveryStory | None = None
    balance: Balance = NOT_SEARCHED
    plans_stages: bool = False  # the planner chooses their number, by the job's setting or by an order
    stages_asked: int = 0  # the number of stages that was ordered, until members are in such a layout; 0: none
    speeds: Mapping[int, float] = field(default_factory=dict)  # of ranks, as measured; 1 where none is
    costs: Costs | None = None  # of layers, as measured; None: not yet, and the model's are assumed
    placement: Placement | None = None  # of parity, in the newest generation
    placements: Mapping[int, Placement] = field(default_factory=dict)  # by generation: the layout's, and the join's
    committed: int = -1  # the last committed step; goes back when versions are lost with a node
    recorded: int = -1  # the last step in the ledger; never goes back
    agreed: int = -1  # the newest step known to have been agreed on, by a commit or a report
    agreement: str = ""  # the agreement of that step
    protected: int = -1  # the newest version known to survive the loss of nodes
    snapshot_every: int = 0  # steps between protected versions, as agreed last; 0 before the first agreement
    agreements: Mapping[int, str] = field(default_factory=dict)  # step -> its agreement, from protected - 1 on
    digests: Mapping[int, str] = field(default_factory=dict)  # step -> digest in the ledger, likewise
    saved: tuple[Saved, ...] = ()  # committed checkpoints, newest first
    stopping: Stopping | None = None
    concluding: Concluding | None = None
    lost: tuple[str, ...] = ()  # what a job that continues, or ends, has nevertheless not completed
    rolled_back: int = 0  # the generation of the last return to an older version
    lines: Lines = ()  # which records count, after the newest plan

    def fit_spares(self) -> tuple[str, ...]:
        """The spare nodes that may take a place: not those of hosts in quarantine."""
        return tuple(name for name, node in self.spares.items() if node.host not in self.quarantined)

    def members(self) -> tuple[Worker, ...]:
        return tuple(w for w in self.workers.values() if w.status in (Status.MEMBER, Status.FINISHED))
