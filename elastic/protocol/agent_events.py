"""What happens to a node agent (events), and what its machine has the agent do (instructions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .events import WorkerId


@dataclass(frozen=True)
class NodeOutcome:
    """How the job ended; or how it went on without this node (`left`)."""

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1
    lost: tuple[str, ...] = ()  # what was not got done all the same
    unfit: bool = False  # the node's own health check kept it from joining
    left: bool = False


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Welcomed:
    """A coordinator takes this node in, if it is fit."""


@dataclass(frozen=True)
class HealthChecked:
    """The node has measured itself. `why`: it should not join; empty if it may."""

    why: str = ""


@dataclass(frozen=True)
class JoinRefused:
    """The coordinator does not take this node in."""

    why: str


@dataclass(frozen=True)
class FenceOrdered:
    """The coordinator has declared this node lost."""

    why: str


@dataclass(frozen=True)
class StartOrdered:
    """The coordinator wants these workers. `order` is what forking them takes, opaque here."""

    workers: tuple[WorkerId, ...]
    order: Any = None


@dataclass(frozen=True)
class KillOrdered:
    """The coordinator wants these workers to end, for a restart."""

    workers: tuple[WorkerId, ...]


@dataclass(frozen=True)
class EndOrdered:
    """The job is over, or goes on without this node."""

    outcome: NodeOutcome


@dataclass(frozen=True)
class PreloaderReady:
    """The process that workers are forked from is there."""


@dataclass(frozen=True)
class PreloaderLost:
    """The process that workers are forked from is gone."""


@dataclass(frozen=True)
class WorkerForked:
    """A worker's process exists."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerSpoke:
    """A worker has said something: it is elastic."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerMoved:
    """A worker that was taken for hung makes progress."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerHung:
    """A worker counts as hung, at one look. `stopped`: it can write nothing; `stacks`: it has written its stacks."""

    worker: WorkerId
    stopped: bool = False
    stacks: bool = False


@dataclass(frozen=True)
class WorkerDefied:
    """A worker does what its agent cannot let it do: it does not listen, or threads outlive its main thread."""

    worker: WorkerId
    why: str


@dataclass(frozen=True)
class MainThreadFailed:
    """A worker's main thread has ended with a failure; its process may not be gone yet."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerGone:
    """A worker's process is gone, with all that it had."""

    worker: WorkerId


@dataclass(frozen=True)
class KeeperLost:
    """The snapshot keeper of this node has ended."""


@dataclass(frozen=True)
class OutboxFull:
    """More waits to be said to a coordinator than can be kept."""


@dataclass(frozen=True)
class StopAsked:
    """The user asks the job to stop; asked twice, this node at once."""

    why: str


@dataclass(frozen=True)
class LeaveAsked:
    """The owner of the node asks it to hand over and leave; asked twice, it stops."""

    why: str


@dataclass(frozen=True)
class TimePassed:
    """Nothing else happened. `unheard_s`: since a coordinator was heard; `steps`: where running workers are.

    `after`: a worker is past its training.
    """

    unheard_s: float = 0.0
    steps: tuple[tuple[WorkerId, int], ...] = ()
    after: bool = False


Event = (
    Welcomed
    | HealthChecked
    | JoinRefused
    | FenceOrdered
    | StartOrdered
    | KillOrdered
    | EndOrdered
    | PreloaderReady
    | PreloaderLost
    | WorkerForked
    | WorkerSpoke
    | WorkerMoved
    | WorkerHung
    | WorkerDefied
    | MainThreadFailed
    | WorkerGone
    | KeeperLost
    | OutboxFull
    | StopAsked
    | LeaveAsked
    | TimePassed
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class CheckHealth:
    """Measure whether this node is fit. Answer: HealthChecked."""


@dataclass(frozen=True)
class ReportUnfit:
    """Report to the coordinator that this node should not join."""

    why: str


@dataclass(frozen=True)
class Announce:
    """Start or take over the node's keeper, and tell the coordinator what this node has. `first`: in its first life."""

    first: bool


@dataclass(frozen=True)
class RestartKeeper:
    """Start another keeper in the place of the one that ended."""


@dataclass(frozen=True)
class EndKeeper:
    """End the node's keeper, and what it holds."""


@dataclass(frozen=True)
class StartPreloader:
    """Start another process that workers are forked from. Answer: PreloaderReady."""


@dataclass(frozen=True)
class PrepareWorker:
    """Make what a worker is watched and spoken to by."""

    worker: WorkerId
    local_rank: int
    order: Any


@dataclass(frozen=True)
class DropWorker:
    """A worker that was prepared is not forked after all."""

    worker: WorkerId


@dataclass(frozen=True)
class ForkWorker:
    """Have the preloaded process fork a worker. Answer: WorkerForked."""

    worker: WorkerId


@dataclass(frozen=True)
class TerminateWorker:
    """Ask a worker to end. `stopping`: with the signal by which the job was stopped, else with SIGTERM."""

    worker: WorkerId
    stopping: bool = False


@dataclass(frozen=True)
class KillWorker:
    """Kill a worker with SIGKILL."""

    worker: WorkerId
    why: str


@dataclass(frozen=True)
class AskStacks:
    """Have a worker write down what its threads do."""

    worker: WorkerId


@dataclass(frozen=True)
class KillHung:
    """Keep the stacks of a hung worker, and kill it."""

    worker: WorkerId


@dataclass(frozen=True)
class ReportDeath:
    """Report a worker's end to the coordinator, with what it was doing."""

    worker: WorkerId


@dataclass(frozen=True)
class ForgetFailures:
    """Another attempt begins: how workers of the last one failed is no matter."""


@dataclass(frozen=True)
class TellEnded:
    """Tell a worker that the job is over. `failed`: its rank is the one that ended it."""

    worker: WorkerId
    failed: bool


@dataclass(frozen=True)
class JoinAgain:
    """Ask to be taken in under another name; what was said and heard under the old one is forgotten."""

    node: str


@dataclass(frozen=True)
class AskStop:
    """Ask the coordinator to end the job."""

    why: str


@dataclass(frozen=True)
class AskDrain:
    """Ask the coordinator to let this node hand over and leave."""

    why: str


@dataclass(frozen=True)
class Say:
    """Write a line for the people who watch this node."""

    text: str


Instruction = (
    CheckHealth
    | ReportUnfit
    | Announce
    | RestartKeeper
    | EndKeeper
    | StartPreloader
    | PrepareWorker
    | DropWorker
    | ForkWorker
    | TerminateWorker
    | KillWorker
    | AskStacks
    | KillHung
    | ReportDeath
    | ForgetFailures
    | TellEnded
    | JoinAgain
    | AskStop
    | AskDrain
    | Say
)
