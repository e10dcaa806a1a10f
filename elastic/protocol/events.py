"""What happens to a job (events, past tense) and what its coordinator wants done (effects, imperative)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everstep.resharding.placement import Placement
from everstep.resharding.plan import Plan, Report
from everstep.resharding.units import ModelSpec

from .causes import Departure, Ending


class WorkerId(NamedTuple):
    """A worker process: its rank, and how many processes had that rank before it."""

    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of an elastic job says of it when it is ready; equal on all, or the job does not start."""

    steps: int
    stages: int
    micro_batches: int
    global_batch_size: int
    model: ModelSpec
    seed: int = 0
    values: str = ""  # a digest of what the model was initialised with
    constants: str = ""  # a digest of what training does not change: frozen parameters, buffers
    samples: int = 0  # of the dataset
    shuffle: bool = True  # whether their order is permuted
    sample_digests: tuple[str, ...] = ()  # of the first, the middle and the last sample
    optimizer: str = ""  # its type and settings, as text
    protection: str = "parity"  # parity | replay | replicate | none
    node_losses: int = 1  # how many nodes may be lost at once
    on_loss: str = "checkpoint"  # checkpoint | neighbors | stop
    checkpoints: bool = False  # whether it saves any
    on_damage: str = "stop"  # what is done about a damaged checkpoint: stop | older
    state_bytes: tuple[int, ...] = ()  # of each shard's record
    gradient_bytes: tuple[int, ...] = ()  # of each shard's reduced gradient


@dataclass(frozen=True)
class Begun:
    """What a worker is told of the job when training had begun before it was started."""

    samples: int  # of the dataset that the job trains on
    values: str  # a digest of what the model was initialised with


class Saved(NamedTuple):
    """A committed checkpoint: the version, its name, and what was agreed in step version - 1."""

    version: int
    name: str
    agreement: str


class Stopping(NamedTuple):
    """The job is to end, and waits for a checkpoint of a version after step `committed`, until `deadline_s`.

    `ending`: how it ends then; where that is PROCESS_ENDED, by a mistake of the script.
    """

    why: str
    committed: int
    deadline_s: float
    ending: Ending = Ending.STOPPED

    @property
    def left(self) -> bool:
        """Whether a rank ended its process."""
        return self.ending is Ending.PROCESS_ENDED


REMEMBERED_CHECKPOINTS = 8


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class NodeJoined:
    """A node agent registered. `keeper` is the address of its snapshot keeper, `memory_bytes` what that may use."""

    node: str
    host: str
    slots: int
    keeper: str
    order: int = -1  # the user's --node-rank, -1 if not given
    memory_bytes: int = 0  # 0: not known
    stores: tuple[int, ...] = ()  # ports of torch stores for the first attempts, should it be the first node
    health: Mapping[str, float] = field(default_factory=dict)  # figures of its health check; empty: it made none


@dataclass(frozen=True)
class NodeUnhealthy:
    """A node agent's own health check says that it should not take part: it is not in the job, and does not join."""

    node: str
    host: str
    why: str
    health: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeLost:
    """A node's agent went away: its stream broke, or its heartbeats stopped."""

    node: str
    why: str


@dataclass(frozen=True)
class HeartbeatsReceived:
    """These nodes are alive."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StoreOpened:
    """A node has opened torch's store for one more attempt."""

    node: str
    port: int


@dataclass(frozen=True)
class CoordinatorReturned:
    """A coordinator took up where another one had stopped: nodes have this long to be heard of."""

    grace_s: float


@dataclass(frozen=True)
class WorkerDeclaredElastic:
    """A worker reached the elastic decorator: losses are to be recovered inside the step from now on."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerReady:
    """A worker built its model and waits for a plan. `peer` is its data-plane address, opaque here."""

    worker: WorkerId
    peer: Mapping[str, Any]
    job: Job
    saved: tuple[Saved, ...] = ()  # the checkpoints there are, newest first; the lowest rank looks


@dataclass(frozen=True)
class WorkerDied:
    """A worker process ended, or was fenced because it hung. `clean` means exit status 0."""

    worker: WorkerId
    cause: str
    clean: bool = False
    step: int = -1
    phase: str = ""
    finished_micro_batches: int = 0  # of the interrupted step, lost with it
    detected_at_s: float = 0.0
    killed_at_s: float = 0.0  # 0 when nobody knows: only an injected fault tells
    hang: str = ""  # it was killed as hung: "silent", or "alive", with signs of life
    stacks: str = ""  # what its threads did then


@dataclass(frozen=True)
class WorkerReported:
    """A survivor stopped for `generation` and says what it has. `busy_s`: how long compute kept it from doing so."""

    worker: WorkerId
    generation: int
    report: Report
    busy_s: float = 0.0


@dataclass(frozen=True)
class WorkerLacking:
    """A member cannot restore shards of `version`: every keeper answered, and none has them nor enough parity."""

    worker: WorkerId
    generation: int
    version: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class CorruptionFound:
    """Bytes that do not match their checksum, or their replicas. `where`: keeper | parity | frame | replica."""

    worker: WorkerId
    generation: int
    where: str
    node: str = ""  # that held them
    rank: int = -1  # that sent or computed with them
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
    """A member entered a switch's generation at a step boundary, or, where that plan leaves it out, left with it."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True)
class WorkerIdled:
    """A member is past the last step, so a switch will not be reached by stepping."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True)
class WorkerCommitted:
    """A member holds version `step` + 1. `agreement` is what was agreed in the step, opaque here."""

    worker: WorkerId
    step: int
    agreement: str
    loss: float | None = None
    digest: str = ""
    generation: int = 0  # in which it was committed
    protected: int = -1  # the newest version that may lose nodes
    every: int = 0  # steps between versions that outlive nodes, 0 if not said


@dataclass(frozen=True)
class WorkerNoted:
    """Something that is worth a line in the log and decides nothing."""

    worker: WorkerId
    what: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is committed. `fields`: how long it took, how large it is."""

    worker: WorkerId
    saved: Saved
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointUnreadable:
    """A member cannot read the checkpoint `name` that it was to go on from."""

    worker: WorkerId
    name: str
    why: str


@dataclass(frozen=True)
class WorkerLeft:
    """The user's code has left the training loop with `version` steps committed; its function still runs.

    `name`: of a checkpoint of that version, should one be saved.
    """

    worker: WorkerId
    version: int
    name: str = ""


@dataclass(frozen=True)
class WorkerWentOn:
    """A worker has begun `step`, although another one has left the loop before it."""

    worker: WorkerId
    step: int


@dataclass(frozen=True)
class WorkerFinished:
    """The user's function returned, with `version` steps committed; -1: all of the job's. `name`: see WorkerLeft."""

    worker: WorkerId
    version: int = -1
    name: str = ""


@dataclass(frozen=True)
class WorkerConcluded:
    """A worker's part in the last checkpoint, `name`, is over. `why`: what came between, if something did."""

    worker: WorkerId
    name: str
    why: str = ""


@dataclass(frozen=True)
class WorkerRaised:
    """The user's function raised: the user's error, not a failure of the machine."""

    worker: WorkerId
    message: str
    traceback: str


@dataclass(frozen=True)
class StopRequested:
    """The job is to end: by a signal to its launcher, by a command, or since its time is over."""

    why: str
    ending: Ending = Ending.STOPPED


@dataclass(frozen=True)
class DrainRequested:
    """A node is to go away (preemption, maintenance): it wants to hand over first, and then to leave the job."""

    node: str
    why: str
    departure: Departure = Departure.ASKED


@dataclass(frozen=True)
class StragglerFound:
    """What is measured says that a rank of this node is slow itself, or a link of it, and holds the others up.

    `again`: it was found before, and still is slow after a while.
    """

    node: str
    rank: int
    what: str  # compute | link
    factor: float
    evidence: str
    peer: int = -1
    fields: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    blamed: bool = True  # it is clear that it is this node; else it does not count against it


@dataclass(frozen=True)
class WaitNoticed:
    """Ranks, or the job (no ranks), wait for long; `text` says for whom. Worth a warning, and decides nothing."""

    text: str
    ranks: tuple[int, ...] = ()
    step: int = -1


@dataclass(frozen=True)
class StragglerGone:
    """A rank, or a link, that was slow is level with the others again, or is not there any more."""

    node: str
    rank: int
    what: str
    evidence: str
    peer: int = -1
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RendezvousClosed:
    """A job of plain torchrun, whose agents met here, is over, and all of them have gone."""


@dataclass(frozen=True)
class Ticked:
    """Time passed."""


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
    begun: Begun | None = None  # where training has begun


@dataclass(frozen=True)
class KillWorkers:
    """Kill these workers on `node` and report nothing of it."""

    node: str
    workers: tuple[WorkerId, ...]


@dataclass(frozen=True)
class AbortGeneration:
    """Tell a worker that its generation is over; it stops and reports for the new one."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True)
class CarryOut:
    """Give a worker a plan. `peers` are its fellow members' addresses, `keepers` the snapshot keepers' by node.

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
    """Tell a worker that a checkpoint is wanted, as soon as the members can agree on one."""

    worker: WorkerId


@dataclass(frozen=True)
class TellLeft:
    """Tell a worker that another one has left the loop at `version`: it answers if it goes on past that."""

    worker: WorkerId
    version: int


@dataclass(frozen=True)
class Conclude:
    """Tell a worker that nobody trains beyond `version`: it is to save its part of it, as `name`, and to say so."""

    worker: WorkerId
    version: int
    name: str


@dataclass(frozen=True)
class EndTraining:
    """Tell a worker that training is over: its script goes on with what comes after."""

    worker: WorkerId


@dataclass(frozen=True)
class EndWorker:
    """Tell a worker that the job is over. Its node's agent does, when it hears of it."""

    worker: WorkerId


@dataclass(frozen=True)
class RefuseNode:
    """Tell a node that it cannot join this job, and why."""

    node: str
    why: str


@dataclass(frozen=True)
class ReleaseNode:
    """Nothing that a node holds is needed any more: it is out of the job, and ends with success."""

    node: str
    why: str


@dataclass(frozen=True)
class FenceNode:
    """Tell a node that was declared lost, should it still hear us, that it is out: it stops, and may join again."""

    node: str
    why: str


@dataclass(frozen=True)
class TellNode:
    """A line for the people who watch a node."""

    node: str
    text: str


@dataclass(frozen=True)
class EndJob:
    """The job is over. `why` is empty when it succeeded; `detail` is the user's traceback, when there is one.

    `lost`: what a job that succeeded has not got done all the same, a line each.
    """

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1
    lost: tuple[str, ...] = ()
    ending: Ending = Ending.DONE


@dataclass(frozen=True)
class Record:
    """A line for the event log."""

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
