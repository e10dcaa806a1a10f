"""Torchrun's own rule, for jobs whose script is not elastic."""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .causes import Ending
from .forming import launch
from .outcome import (
    Effects,
    Outcome,
    fail,
    with_workers,
)
from .state import (
    Phase,
    State,
    Status,
    Worker,
)


def classic_exit(state: State, worker: Worker, event: e.WorkerDied) -> Outcome:
    """Torchrun's own rule: all workers start again after a failure, up to `max_restarts` times."""
    if event.clean:
        state = with_workers(state, replace(worker, status=Status.EXITED))
        if all(w.status is Status.EXITED for w in state.workers.values()):
            return replace(state, phase=Phase.DONE), [e.EndJob(True)]
        return state, []
    if state.restarts >= state.config.max_restarts:
        rank = worker.id.rank
        return fail(state, Ending.WORKER_FAILED, f"rank {rank} failed: {event.cause}", rank=rank)
    kills: Effects = [
        e.KillWorkers(node, tuple(w.id for w in state.workers.values() if w.node == node)) for node in state.nodes
    ]
    record = e.Record("restarted", {"rank": worker.id.rank, "cause": event.cause, "restart": state.restarts + 1})
    state, effects = launch(replace(state, restarts=state.restarts + 1))
    return state, [record, *kills, *effects]
