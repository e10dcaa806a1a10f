"""What a node agent knows of its node, and what always holds of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from .agent_events import NodeOutcome
from .events import WorkerId
from .local_ranks import LocalRanks


class AgentPhase(enum.Enum):
    """What an agent is at."""

    JOINING = "joining"  # has asked to be taken in, for the first time
    CHECKING = "checking"  # is welcome, and measures whether its node is fit
    UNFIT = "unfit"  # has said that its node is not, and waits for the answer
    SERVING = "serving"  # belongs to the job
    FENCED = "fenced"  # is out of the job, and waits until its workers have ended
    REJOINING = "rejoining"  # has asked to be taken in again, under another name
    ENDING = "ending"  # knows how the job ended for this node, and waits until its workers have ended
    ENDED = "ended"  # nothing runs here any more


RUNS = (AgentPhase.SERVING, AgentPhase.FENCED, AgentPhase.ENDING)  # phases in which there may be workers


class WorkerStage(enum.Enum):
    """How far a worker is, as its agent sees it."""

    WAITING = "waiting"  # to be forked: for the preloaded process, or for workers before it to be gone
    FORKING = "forking"  # the preloaded process was asked
    RUNNING = "running"  # its process exists


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """A worker of this node."""

    id: WorkerId
    local_rank: int
    stage: WorkerStage = WorkerStage.WAITING
    elastic: bool = False  # it has spoken, which an ordinary script never does
    silent: bool = False  # ended by order: its end is no news
    lost: bool = False  # its end is reported already, before its process is gone
    killed: str = ""  # why the agent killed it, or will as soon as it is forked
    deadline_s: float = 0.0  # it was asked to end by then
    stacks_s: float = 0.0  # since when its stacks are awaited

    @property
    def leaves(self) -> bool:
        """Whether only its process's end is waited for."""
        return self.silent or self.lost


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What the machine must know of its node."""

    node: str
    slots: int
    rejoin_s: float = 60.0  # how long a node that was fenced tries to come back
    coordinator_wait_s: float = 300.0  # how long workers may make no progress while there is no coordinator
    shutdown_timeout_s: float = 30.0  # how long an ordinary script may take to end when asked to


@dataclass(frozen=True, kw_only=True)
class AgentState:
    """One agent. `life` counts how often its node has asked to be taken in."""

    config: AgentConfig
    phase: AgentPhase = AgentPhase.JOINING
    life: int = 1
    workers: Mapping[WorkerId, LocalWorker] = field(default_factory=dict)
    local_ranks: LocalRanks
    preloaded: bool = False  # the process that workers are forked from is ready
    began: bool = False  # workers were started here
    unfit: str = ""  # why this node should not join
    stop_why: str = ""  # why the user, or the node's owner, has asked it to stop
    since_s: float = 0.0  # of UNFIT and ENDING; FENCED and REJOINING: when the node was fenced
    alone_s: float = 0.0  # since when there has been neither a coordinator nor progress; 0: there is
    steps_alone: tuple[tuple[WorkerId, int], ...] = ()  # where the workers were then
    outcome: NodeOutcome | None = None
    late: int = 0  # events that came too late to matter
    story: tuple[str, ...] = ()

    @property
    def node(self) -> str:
        """The name under which the coordinator knows this node in this life."""
        return self.config.node if self.life == 1 else f"{self.config.node}-{self.life}"

    @property
    def belongs(self) -> bool:
        """Whether a coordinator has taken this node in, as far as it knows."""
        return self.phase in (AgentPhase.CHECKING, AgentPhase.UNFIT, AgentPhase.SERVING)

    @property
    def leaving(self) -> bool:
        """Whether workers that were ended, or are lost, are not gone yet."""
        return any(worker.leaves for worker in self.workers.values())


def new_agent(config: AgentConfig) -> AgentState:
    """An agent that is about to greet its coordinator."""
    return AgentState(config=config, local_ranks=LocalRanks(config.slots))


# ---------------------------------------------------------------- what always holds

INVARIANTS = {
    "slots": "No two workers that run or are being forked have one local rank; one that waits may wait for another's.",
    "workers": "There are workers only in a node that serves, is fenced or is ending, and none waits but in the first.",
    "fenced": "Every worker of a node that is fenced is killed, or is killed as soon as it is forked, and is no news.",
    "preloaded": "Workers are being forked only while there is a process to fork them from.",
    "outcome": "It is known how the job ended exactly while the agent is ending or has ended.",
}


def violations(state: AgentState) -> list[str]:
    """What does not hold of a state, in words; cheap enough for every event."""
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
        found.append("workers are being forked, and there is nothing to fork them from")
    if (state.outcome is not None) != (state.phase in (AgentPhase.ENDING, AgentPhase.ENDED)):
        found.append(f"a node that is {state.phase.value} has the outcome {state.outcome}")
    return found


def _place(worker: LocalWorker) -> str:
    return f"{worker.id} ({worker.stage.value}) in {worker.local_rank}"
