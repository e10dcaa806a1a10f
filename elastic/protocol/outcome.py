"""The result of every decision of the coordinator: a new state, and the effects that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import events as e
from .causes import Ending
from .state import (
    Node,
    Phase,
    State,
    Status,
    Worker,
)

Effects = list[e.Effect]
Outcome = tuple[State, Effects]


def current(state: State, worker: e.WorkerId) -> Worker | None:
    """The worker, unless it is unknown or has been replaced."""
    known = state.workers.get(worker.rank)
    return known if known is not None and known.id == worker else None


def with_workers(state: State, *workers: Worker) -> State:
    """The state with these workers in place of the earlier ones of their ranks."""
    return replace(state, workers={**state.workers, **{w.id.rank: w for w in workers}})


def start_workers(state: State, node: str, only: e.WorkerId | None = None) -> e.StartWorkers:
    """The order to start the workers of a node, or `only` one of them."""
    started = tuple(w.id for w in state.workers.values() if w.node == node and only in (None, w.id))
    names = list(state.nodes)
    first = state.nodes[names[0]]
    master = (first.host, first.stores.get(state.restarts, 0))
    place = (names.index(node), len(names))
    begun, job = None, state.job
    if job is not None and state.layout is not None:
        begun = e.Begun(job.samples, job.values, job.settings)
    return e.StartWorkers(node, started, len(state.workers), state.restarts, master, *place, begun)


def add_workers(state: State, node: Node) -> Outcome:
    """Start workers on a node that joins a running job: first for vacant ranks of lost nodes, then for new ranks."""
    workers, vacant = dict(state.workers), dict(state.vacant)
    for _ in range(node.slots):
        rank = min(vacant, default=max(workers, default=-1) + 1)
        workers[rank] = Worker(e.WorkerId(rank, vacant.pop(rank, -1) + 1), node.name)
    state = replace(state, workers=dict(sorted(workers.items())), vacant=vacant)
    return state, [start_workers(state, node.name)]


def fail(state: State, ending: Ending, why: str, detail: str = "", rank: int = -1) -> Outcome:
    """End the job with a failure."""
    return replace(state, phase=Phase.DONE), [e.EndJob(False, why, detail, rank, ending=ending)]


def end_with_loss(state: State, ending: Ending, why: str) -> Outcome:
    """End the job early, although no machine failed."""
    end = e.EndJob(False, why, lost=(*state.lost, why), ending=ending)
    return replace(state, phase=Phase.DONE, concluding=None), [end]


def last_version(state: State) -> int:
    """The version at which training ends: that after the job's last step, or the one at which a rank left the loop."""
    assert state.job is not None
    return min([state.job.steps, *(w.left for w in state.members() if w.left >= 0)])


def has_trained(state: State, worker: Worker) -> bool:
    """Whether a member has finished training, so that only the end of its script is missing."""
    member = worker.status in (Status.MEMBER, Status.FINISHED)
    return member and state.job is not None and state.committed + 1 >= last_version(state)


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks, as part of a sentence."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
