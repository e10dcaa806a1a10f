"""The inputs of the node agent's machine (events), and its outputs (instructions to the agent)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .events import WorkerId


@dataclass(frozen=True)
class NodeOutcome:
    """How the job ended; or, with `left`, that it continues without this node."""

    succeeded: bool
    why: str = ""
    detail: str = ""
    rank: int = -1
    lost: tuple[str, ...] = ()  # what a job that succeeded has not completed
    unfit: bool = False  # the node's own health check kept it from joining
    left: bool = False


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Welcomed:
    """A coordinator accepts this node, provided that the node is fit."""


@dataclass(frozen=True)
class HealthChecked:
    """The node's health check has finished. `why`: the reason not to join; empty if the node may join."""

    why: str = ""


@dataclass(frozen=True)
class JoinRefused:
    """The coordinator refuses this node."""

    why: str


@dataclass(frozen=True)
class FenceOrdered:
    """The coordinator has declared this node lost."""

    why: str


@dataclass(frozen=True)
class StartOrdered:
    """The coordinator orders these workers. `order` contains what the executor needs to fork them; opaque here."""

    workers: tuple[WorkerId, ...]
    order: Any = None


@dataclass(frozen=True)
class KillOrdered:
    """The coordinator orders these workers to end, for a restart."""

    workers: tuple[WorkerId, ...]


@dataclass(frozen=True)
class EndOrdered:
    """The job is over, or continues without this node."""

    outcome: NodeOutcome


@dataclass(frozen=True)
class PreloaderReady:
    """The preloaded process is ready to fork workers."""


@dataclass(frozen=True)
class PreloaderLost:
    """The preloaded process has ended."""


@dataclass(frozen=True)
class WorkerForked:
    """A worker's process exists."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerSpoke:
    """A worker has sent its first message, which shows that its script is elastic."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerMoved:
    """A worker that was considered hung has made progress."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerHung:
    """A worker was found hung. `stopped`: by SIGSTOP, so it cannot write its stacks; `stacks`: it has written them."""

    worker: WorkerId
    stopped: bool = False
    stacks: bool = False


@dataclass(frozen=True)
class WorkerDefied:
    """A worker has to be killed for its behaviour: it ignores messages, or its threads outlive its main thread."""

    worker: WorkerId
    why: str


@dataclass(frozen=True)
class MainThreadFailed:
    """A worker's main thread has ended with a failure; its process may still exist."""

    worker: WorkerId


@dataclass(frozen=True)
class WorkerGone:
    """The kernel reports that a worker's process is gone, and has freed its resources."""

    worker: WorkerId


@dataclass(frozen=True)
class KeeperLost:
    """The snapshot keeper of this node has ended."""


@dataclass(frozen=True)
class OutboxFull:
    """The queue of messages to the coordinator has exceeded its bound."""


@dataclass(frozen=True)
class StopAsked:
    """The user asks the job to stop. A second request stops this node at once."""

    why: str


@dataclass(frozen=True)
class PreemptionNoticed:
    """The machine will be taken away: the node is to hand over and leave. It is said again while the notice stands."""

    why: str


@dataclass(frozen=True)
class LeaveAsked:
    """The node is asked to hand over and leave. A second request stops it."""

    why: str


@dataclass(frozen=True)
class TimePassed:
    """Time has passed without another event.

    `unheard_s`: since the last message from a coordinator; `steps`: the step of each running worker; `after`: a worker
    has finished its training.
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
    | PreemptionNoticed
    | TimePassed
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class CheckHealth:
    """Run the health check. Answer: HealthChecked."""


@dataclass(frozen=True)
class ReportUnfit:
    """Report to the coordinator that this node should not join."""

    why: str


@dataclass(frozen=True)
class Announce:
    """Start the node's keeper or take over a running one, and report it to the coordinator. `first`: the first life."""

    first: bool


@dataclass(frozen=True)
class RestartKeeper:
    """Start a keeper that replaces the one that ended."""


@dataclass(frozen=True)
class EndKeeper:
    """End the node's keeper, and free what it holds."""


@dataclass(frozen=True)
class StartPreloader:
    """Start another preloaded process. Answer: PreloaderReady."""


@dataclass(frozen=True)
class PrepareWorker:
    """Create the progress page and the socket of a worker."""

    worker: WorkerId
    local_rank: int
    order: Any


@dataclass(frozen=True)
class DropWorker:
    """Discard what was prepared for a worker that will not be forked."""

    worker: WorkerId


@dataclass(frozen=True)
class ForkWorker:
    """Have the preloaded process fork a worker. Answer: WorkerForked."""

    worker: WorkerId


@dataclass(frozen=True)
class TerminateWorker:
    """Ask a worker to end. `stopping`: with the signal that stopped the job, otherwise with SIGTERM."""

    worker: WorkerId
    stopping: bool = False


@dataclass(frozen=True)
class KillWorker:
    """Kill a worker with SIGKILL."""

    worker: WorkerId
    why: str


@dataclass(frozen=True)
class AskStacks:
    """Ask a worker to write the stacks of its threads."""

    worker: WorkerId


@dataclass(frozen=True)
class KillHung:
    """Store the stacks of a hung worker, and kill it."""

    worker: WorkerId


@dataclass(frozen=True)
class ReportDeath:
    """Report a worker's end and its last activity to the coordinator."""

    worker: WorkerId


@dataclass(frozen=True)
class ForgetFailures:
    """Another attempt begins: forget how the workers of the last one failed."""


@dataclass(frozen=True)
class TellEnded:
    """Notify a worker that the job is over. `failed`: the worker's rank made the job fail."""

    worker: WorkerId
    failed: bool


@dataclass(frozen=True)
class JoinAgain:
    """Ask to join under a new name; all messages from and to the old name are discarded."""

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
    """Print a line on this node's terminal."""

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
