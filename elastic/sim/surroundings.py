"""The environment of a simulated worker: what it acts on, and what observes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from everstep.elastic.protocol import events as e
from everstep.resharding.plan import Plan

from .keeper import Board
from .links import Key
from .storage import NoSpace, Storage
from .values import ShardState
from .world import World


class Facts(Protocol):
    """Receives what happens, to check it. See `ledger.Ledger`."""

    def agreed(self, worker: e.WorkerId, step: int, agreement: str) -> None: ...
    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None: ...
    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None: ...
    def went_back(self, worker: e.WorkerId, plan: Plan, since: int) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """The environment of a worker."""

    world: World
    job: e.Job
    board: Board
    node: str
    state_slots: int
    interval: int
    send: Callable[[int, e.WorkerId, int, Key, Any], None]  # from rank, to, generation, key, payload
    tell: Callable[[e.Event], None]
    mark: Callable[[e.WorkerId, str, int], None]  # worker, phase, step
    facts: Facts
    storage: Storage
    saves_every: int  # interval in versions; 0: only the last one is saved
    saved: tuple[e.Saved, ...]  # the checkpoints that this worker finds when it starts
    startup_s: float
    forward_s: float
    epilogue_s: float
    leaves_at: int  # the version at which the user's code leaves the loop; the job's steps: not before its end
    verify_every: int  # steps between comparisons of replicas; 0: none
    memory_bytes: int  # of a worker, for parameters, gradients and optimizer states; 0: no limit

    def save(self, worker: e.WorkerId, saved: e.Saved, states: dict[int, ShardState]) -> str:
        """This node's saver writes a part, though the worker may have ended; returns why it cannot, empty if it did."""
        if not self.board.keepers[self.node].up:
            return "the node is lost"
        try:
            whole = self.storage.put(saved, states)
        except NoSpace as error:
            fields = {"version": saved.version, "name": saved.name, "why": str(error)}
            self.tell(e.WorkerNoted(worker, "checkpoint_failed", fields))
            return str(error)
        if whole:
            self.tell(e.CheckpointSaved(worker, saved, {}))
        return ""
