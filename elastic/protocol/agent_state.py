"""The state of a node agent, and its invariants."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from .agent_events import NodeOutcome
from .events import WorkerId
from .local_ranks import LocalRanks


class AgentPhase(enum.Enum):
    """The phases of an agent."""

    JOINING = "joining"  # has asked to join for the first time
    CHECKING = "checking"  # was accepted, and runs its health check
    UNFIT = "unfit"  # has reported that its node is not fit, and waits for the answer
    SERVING = "serving"  # is part of the job
    FENCED = "fenced"  # was declared lost, and waits until its workers have ended
    REJOINING = "rejoining"  # has asked to join again, under another name
    ENDING = "ending"  # knows the outcome of the job, and waits until its workers have ended
    ENDED = "ended"  # no worker runs any more


RUNS = (AgentPhase.SERVING, AgentPhase.FENCED, AgentPhase.ENDING)  # phases in which workers may exist


class WorkerStage(enum.Enum):
    """The stages of a worker, as its agent sees them."""

    WAITING = "waiting"  # for the preloaded process, or for the end of the earlier worker of its slot
    FORKING = "forking"  # the preloaded process has received the request
    RUNNING = "running"  # its process exists


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """A worker of this node."""

    id: WorkerId
    local_rank: int
    stage: WorkerStage = WorkerStage.WAITING
    elastic: bool = False  # it has sent a message, which an ordinary script never does
    silent: bool = False  # it was ended by order, so its end is not reported
    lost: bool = False  # its end was reported before its process was gone
    killed: str = ""  # why the agent killed it, or will kill it as soon as it is forked
    deadline_s: float = 0.0  # when the agent kills it, after it was asked to end
    stacks_s: float = 0.0  # when its stacks were requested

    @property
    def leaves(self) -> bool:
        """Whether only the end of its process is awaited."""
        return self.silent or self.lost


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The settings of the agent's machine."""

    node: str
    slots: int
    rejoin_s: float = 60.0  # how long a fenced node tries to join again
    coordinator_wait_s: float = 300.0  # how long workers may make no progress while no coordinator can be reached
    shutdown_timeout_s: float = 30.0  # how long an ordinary script may take to end when asked to


@dataclass(frozen=True, kw_only=True)
class AgentState:
    """The state of one agent. `life` counts how often its node has asked to join again."""

    config: AgentConfig
    phase: AgentPhase = AgentPhase.JOINING
    life: int = 1
    workers: Mapping[WorkerId, LocalWorker] = field(default_factory=dict)
    local_ranks: LocalRanks
    preloaded: bool = False  # the preloaded process is ready
    began: bool = False  # this node has started workers
    unfit: str = ""  # why this node should not join
    stop_why: str = ""  # why the user, or the node's operator, asked it to stop
    since_s: float = 0.0  # start of UNFIT and ENDING; in FENCED and REJOINING: when the node was fenced
    alone_s: float = 0.0  # when coordinator and progress both went missing; 0: at least one is present
    steps_alone: tuple[tuple[WorkerId, int], ...] = ()  # the workers' steps at that time
    outcome: NodeOutcome | None = None
    late: int = 0  # number of events that arrived too late to matter
    story: tuple[str, ...] = ()

    @property
    def node(self) -> str:
        """The name of this node in its current life, as the coordinator knows it."""
        return self.config.node if self.life == 1 else f"{self.config.node}-{self.life}"

    @property
    def belongs(self) -> bool:
        """Whether a coordinator has accepted this node, to the node's knowledge."""
        return self.phase in (AgentPhase.CHECKING, AgentPhase.UNFIT, AgentPhase.SERVING)

    @property
    def leaving(self) -> bool:
        """Whether a worker that was ended or lost still has a process."""
        return any(worker.leaves for worker in self.workers.values())


def new_agent(config: AgentConfig) -> AgentState:
    """The initial state: the agent is about to contact its coordinator."""
    return AgentState(config=config, local_ranks=LocalRanks(config.slots))


# ---------------------------------------------------------------- invariants

INVARIANTS = {
    "slots": "No two workers that run or are being forked share a local rank; a waiting one may wait for another's.",
    "workers": "Only a serving, fenced or ending node has workers, and only a serving one has workers that wait.",
    "fenced": "Every worker of a fenced node is killed, or will be once it is forked, and its end is not reported.",
    "preloaded": "Workers are being forked only while the preloaded process exists.",
    "outcome": "The outcome of the job is known exactly while the agent is ending or has ended.",
}


def violations(state: AgentState) -> list[str]:
    """The invariants that a state violates, in words; cheap enough for every event."""
    found = []
    workers = list(state.workers.values())
    there = [worker.local_rank for worker in workers if worker.stage is not WorkerStage.WAITING]
    staying = [worker.local_rank for worker in workers if not worker.leaves]
    if len(set(there)) < len(there) or len(set(staying)) < len(staying):
        found.append(f"two workers share a slot: {sorted(map(_place, workers))}")
    if any(not 0 <= worker.local_rank < state.config.slots for worker in workers):
        found.append(f"a worker is in none of {state.config.slots} slots: {sorted(map(_place, workers))}")
    if workers and state.phase not in RUNS:
        found.append(f"a node that is {state.phase.value} has workers: {sorted(map(_place, workers))}")
    if len(there) < len(workers) and state.phase is not AgentPhase.SERVING:
        found.append(f"workers wait to be forked on a node that is {state.phase.value}")
    if state.phase is AgentPhase.FENCED and not all(worker.killed and worker.silent for worker in workers):
        found.append("a fenced node has a worker that is not killed")
    if any(worker.stage is WorkerStage.FORKING for worker in workers) and not state.preloaded:
        found.append("workers are being forked without a preloaded process")
    if (state.outcome is not None) != (state.phase in (AgentPhase.ENDING, AgentPhase.ENDED)):
        found.append(f"a node that is {state.phase.value} has the outcome {state.outcome}")
    return found


def _place(worker: LocalWorker) -> str:
    return f"{worker.id} ({worker.stage.value}) in {worker.local_rank}"
