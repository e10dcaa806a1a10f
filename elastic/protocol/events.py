"""The inputs of the coordinator's machine (events, past tense) and its outputs (effects, imperative)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.resharding.forecast import Costs
from everstep.resharding.placement import Placement
from everstep.resharding.plan import Plan, Report

from .causes import Departure, Ending
from .job import Begun as Begun
from .job import Job as Job
from .job import Saved as Saved
from .job import Stopping as Stopping
from .job import WorkerId as WorkerId

REMEMBERED_CHECKPOINTS = 8


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class NodeJoined:
    """A node agent registered. `keeper` is the address of its snapshot keeper, `memory_bytes` the keeper's limit."""

    node: str
    host: str
    slots: int
    keeper: str
    order: int = -1  # the user's --node-rank, -1 if not given
    memory_bytes: int = 0  # 0: unknown
    stores: tuple[int, ...] = ()  # ports of torch stores for the first attempts, used if this is the first node
    health: Mapping[str, float] = field(default_factory=dict)  # figures of its health check; empty: no check was made
    domains: tuple[str, ...] = ()  # labels of its failure domains, such as rack=7


@dataclass(frozen=True)
class NodeUnhealthy:
    """A node's health check has failed: the node is not part of the job, and does not join."""

    node: str
    host: str
    why: str
    health: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeLost:
    """The connection to a node's agent has ended: its stream broke, or its heartbeats stopped."""

    node: str
    why: str


@dataclass(frozen=True)
class HeartbeatsReceived:
    """Heartbeats of these nodes have arrived."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StoreOpened:
    """A node has opened torch's store for the next attempt."""

    node: str
    port: int


@dataclass(frozen=True)
class CoordinatorReturned:
    """A coordinator has taken over from another one: nodes have this long to send a heartbeat."""

    grace_s: float


@dataclass(frozen=True)
class WorkerDeclaredElastic:
    """A worker reached the elastic decorator: from now on, losses are recovered within the step."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerReady:
    """A worker built its model and waits for a plan. `peer` is its address in the data plane, opaque here."""

    worker: WorkerId
    peer: Mapping[str, Any]
    job: Job
    saved: tuple[Saved, ...] = ()  # the existing checkpoints, newest first; only the lowest rank looks them up
    memory_bytes: int = 0  # what it may use for parameters, gradients and optimizer states; 0: no limit


@dataclass(frozen=True)
class WorkerDied:
    """A worker process ended, or its agent killed it because it hung. `clean` means exit status 0."""

    worker: WorkerId
    cause: str
    clean: bool = False
    step: int = -1
    phase: str = ""
    finished_micro_batches: int = 0  # micro-batches of the interrupted step whose results are lost
    detected_at_s: float = 0.0
    killed_at_s: float = 0.0  # 0 when unknown: only an injected fault reports it
    hang: str = ""  # it was killed as hung: "silent", or "alive" if it showed signs of life
    stacks: str = ""  # the stacks of its threads at that time


@dataclass(frozen=True)
class WorkerReported:
    """A survivor stopped for `generation` and reports what it holds. `busy_s`: how long compute delayed the report."""

    worker: WorkerId
    generation: int
    report: Report
    busy_s: float = 0.0


@dataclass(frozen=True)
class WorkerLacking:
    """A member cannot restore shards of `version`: every keeper answered, and they and their parity are missing."""

    worker: WorkerId
    generation: int
    version: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class CorruptionFound:
    """Bytes do not match their checksum or their replicas. `where`: keeper | parity | frame | replica."""

    worker: WorkerId
    generation: int
    where: str
    node: str = ""  # the node whose keeper held them
    rank: int = -1  # the rank that sent them or computed with them
    shard: int = -1
    detail: str = ""


@dataclass(frozen=True)
class WorkerResumed:
    """A member carried out the plan of `generation`."""

    worker: WorkerId
    generation: int
    edit_s: float
    restore_s: float


@dataclass(frozen=True)
class WorkerSwitched:
    """A member entered a switch's generation at a step boundary, or left with it if that plan leaves the member out.

    It took `switch_s` seconds. `prefetched` bytes were copied before it, and `moved` bytes at it.
    """

    worker: WorkerId
    generation: int
    switch_s: float = 0.0
    prefetched: int = 0
    moved: int = 0


@dataclass(frozen=True)
class WorkerIdled:
    """A member is past the last step, so no step boundary remains at which to switch."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True)
class WorkerCommitted:
    """A member holds version `step` + 1. `agreement` is the result that was agreed in the step, opaque here."""

    worker: WorkerId
    step: int
    agreement: str
    loss: float | None = None
    digest: str = ""
    generation: int = 0  # in which it was committed
    protected: int = -1  # the newest version that survives the loss of nodes
    every: int = 0  # steps between protected versions, 0 if not known
    settled: bool = False  # sent again: `agreement` has what the user's code changed behind the step


@dataclass(frozen=True)
class WorkerNoted:
    """An observation for the event log that affects no decision."""

    worker: WorkerId
    what: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is committed. `fields`: its duration and its size."""

    worker: WorkerId
    saved: Saved
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointUnreadable:
    """A member cannot read the checkpoint `name` from which the job was to resume."""

    worker: WorkerId
    name: str
    why: str


@dataclass(frozen=True)
class WorkerLeft:
    """The user's code has left the training loop with `version` steps committed; its function still runs.

    `name`: the name of a checkpoint of that version, if one is saved.
    """

    worker: WorkerId
    version: int
    name: str = ""


@dataclass(frozen=True)
class WorkerWentOn:
    """A worker has begun `step`, although another rank left the loop before that step."""

    worker: WorkerId
    step: int


@dataclass(frozen=True)
class WorkerFinished:
    """The user's function returned after `version` committed steps; -1: all of the job's. `name`: see WorkerLeft."""

    worker: WorkerId
    version: int = -1
    name: str = ""


@dataclass(frozen=True)
class WorkerConcluded:
    """A worker has finished its part of the last checkpoint, `name`. `why`: the reason if it could not save it."""

    worker: WorkerId
    name: str
    why: str = ""


@dataclass(frozen=True)
class WorkerRaised:
    """The user's function raised an exception: an error of the user's code, not a failure of a machine."""

    worker: WorkerId
    message: str
    traceback: str


@dataclass(frozen=True)
class StopRequested:
    """A stop is requested: by a signal to a launcher, by a command, or because the job's time is over."""

    why: str
    ending: Ending = Ending.STOPPED
    node: str = ""  # whose launcher got the signal; empty for a command


@dataclass(frozen=True)
class DrainRequested:
    """A node is asked to leave (preemption, maintenance): it hands over first, and then leaves the job."""

    node: str
    why: str
    departure: Departure = Departure.ASKED


@dataclass(frozen=True)
class StragglerFound:
    """Measurements show that a rank of this node, or a link of it, is slow and delays the others.

    `again`: it was reported before, and has stayed slow.
    """

    node: str
    rank: int
    what: str  # compute | link
    factor: float
    evidence: str
    peer: int = -1
    fields: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    blamed: bool = True  # this node is clearly the cause; otherwise the trouble does not count against it


@dataclass(frozen=True)
class WaitNoticed:
    """Ranks, or the job (no ranks), have waited for long; `text` says for what. A warning that affects no decision."""

    text: str
    ranks: tuple[int, ...] = ()
    step: int = -1


@dataclass(frozen=True)
class StragglerGone:
    """A rank, or a link, that was slow is as fast as the others again, or no longer exists."""

    node: str
    rank: int
    what: str
    evidence: str
    peer: int = -1
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantineOrdered:
    """An operator keeps a host out of the job for so long."""

    host: str
    seconds: float
    why: str


@dataclass(frozen=True)
class ReleaseOrdered:
    """An operator ends the quarantine of a host."""

    host: str


@dataclass(frozen=True)
class RelayoutOrdered:
    """An operator asks for so many pipeline stages, or lets the planner choose."""

    stages: int  # 0: as many as the planner finds best, from then on


@dataclass(frozen=True)
class SpeedsMeasured:
    """How fast ranks compute, as measured: rank -> speed, 1 for one that is as fast as most of its stage."""

    speeds: Mapping[int, float]


@dataclass(frozen=True)
class CostsMeasured:
    """What a micro-batch costs in each layer, as measured."""

    costs: Costs


@dataclass(frozen=True)
class RendezvousClosed:
    """An ordinary job under torchrun, whose agents used this rendezvous, is over, and its agents have disconnected."""


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


Event = (
    NodeJoined
    | NodeUnhealthy
    | NodeLost
    | HeartbeatsReceived
    | StoreOpened
    | CoordinatorReturned
    | WorkerDeclaredElastic
    | WorkerReady
    | WorkerDied
    | WorkerReported
    | WorkerLacking
    | CorruptionFound
    | WorkerResumed
    | WorkerSwitched
    | WorkerIdled
    | WorkerCommitted
    | WorkerNoted
    | CheckpointSaved
    | CheckpointUnreadable
    | WorkerLeft
    | WorkerWentOn
    | WorkerFinished
    | WorkerConcluded
    | WorkerRaised
    | StopRequested
    | DrainRequested
    | StragglerFound
    | StragglerGone
    | QuarantineOrdered
    | ReleaseOrdered
    | RelayoutOrdered
    | SpeedsMeasured
    | CostsMeasured
    | WaitNoticed
    | RendezvousClosed
    | Ticked
)


# ---------------------------------------------------------------- effects


@dataclass(frozen=True)
class StartWorkers:
    """Fork these workers on `node`."""

    node: str
    workers: tuple[WorkerId, ...]
    world_size: int
    restart_count: int
    master: tuple[str, int] = ("", 0)  # torch's store: host and port
    group_rank: int = 0
    group_world_size: int = 1
    begun: Begun | None = None  # present if training has begun


@dataclass(frozen=True)
class KillWorkers:
    """Kill these workers on `node`; their ends are not reported."""

    node: str
    workers: tuple[WorkerId, ...]


@dataclass(frozen=True)
class AbortGeneration:
    """Notify a worker that its generation is over; the worker stops and reports for the new one."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True)
class CarryOut:
    """Send a plan to a worker. `peers` are its fellow members' addresses, `keepers` the snapshot keepers' by node.

    `placement` says which nodes hold parity of which shards from this generation on.
    """

    worker: WorkerId
    plan: Plan
    peers: Mapping[int, Mapping[str, Any]]
    keepers: Mapping[str, str]
    placement: Placement
    nodes: Mapping[int, str]  # rank -> node


@dataclass(frozen=True)
class AskSave:
    """Notify a worker that a checkpoint is requested, as soon as the members can agree on one."""

    worker: WorkerId


@dataclass(frozen=True)
class TellLeft:
    """Notify a worker that another one left the loop at `version`: it answers if it continues past that version."""

    worker: WorkerId
    version: int


@dataclass(frozen=True)
class Conclude:
    """Notify a worker that no rank trains beyond `version`: it saves its part of that as `name`, and confirms."""

    worker: WorkerId
    version: int
    name: str


@dataclass(frozen=True)
class EndTraining:
    """Notify a worker that training is over: its script continues with the code after training."""

    worker: WorkerId


@dataclass(frozen=True)
class EndWorker:
    """Notify a worker that the job is over. The worker's agent does this itself when it learns the outcome."""

    worker: WorkerId


@dataclass(frozen=True)
class RefuseNode:
    """Refuse a node, with the reason."""

    node: str
    why: str


@dataclass(frozen=True)
class ReleaseNode:
    """Release a node: no member needs what it holds, it leaves the job and ends with success."""

    node: str
    why: str


@dataclass(frozen=True)
class FenceNode:
    """Notify a node that it was declared lost, in case it is still alive: it stops its workers, and may join again."""

    node: str
    why: str


@dataclass(frozen=True)
class TellNode:
    """Print a line on a node's terminal."""

    node: str
    text: str


@dataclass(frozen=True)
class EndJob:
    """The job is over. `why` is empty when it succeeded; `detail` is the user's traceback, when there is one.

    `lost`: what a job that succeeded has nevertheless not completed, one line each.
    """

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1
    lost: tuple[str, ...] = ()
    ending: Ending = Ending.DONE


@dataclass(frozen=True)
class Record:
    """Write a line to the event log."""

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Effect = (
    StartWorkers
    | KillWorkers
    | AbortGeneration
    | CarryOut
    | AskSave
    | TellLeft
    | Conclude
    | EndTraining
    | RefuseNode
    | ReleaseNode
    | FenceNode
    | TellNode
    | EndJob
    | Record
)
