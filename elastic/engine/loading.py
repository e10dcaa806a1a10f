"""The loader carries out moves: it reads each shard from the first of its sources that has it, and stores it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.memory.record import ShardState, read_record
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.source import Found, ShardSource
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.lines import Lines
from everstep.resharding.moves import PROTECTED, Move, SourceKind, What
from everstep.resharding.plan import Plan

from .prefetcher import Prefetched
from .resume import CheckpointStates
from .sources import KeeperRecords, NeighborLayers, OwnMemory, SavedShards, Stripes

if TYPE_CHECKING:
    from .engine import Engine

KEEPER_PATIENCE_S = 5.0  # how long to wait for a keeper that cannot be reached: it may be starting again
ANSWERED_PATIENCE_S = 1.0  # how long to wait for shards that all keepers lack: a worker may be writing them
FETCH_AGAIN_S = 0.02  # interval at which keepers are asked again for shards that they lack


class Target(Protocol):
    """The destination of a load: `ShardStore`, to own shards or to back them up, or `LiveValues`."""

    def load(self, shard: int, state: ShardState) -> None:
        """Store a copy of a shard's state."""
        ...

    def update(self, gradients: Mapping[int, Tensor], terms: Terms) -> None:
        """Run the optimizer on shards that are a version behind."""
        ...


class LiveValues:
    """The parameters that forwards compute with."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack

    def load(self, shard: int, state: ShardState) -> None:
        """Write a shard's values."""
        view = self._stack.view(self._stack.spec.shards[shard])
        view.copy_(state["value"].reshape(-1))

    def update(self, gradients: Mapping[int, Tensor], terms: Terms) -> None:
        """Values always arrive at the requested version, so nothing can be behind."""
        raise AssertionError(f"values of shards {sorted(gradients)} are a version behind")


class Loader:
    """Loads shards for one rank."""

    def __init__(self, engine: Engine, token: str, node: str) -> None:
        self._engine = engine
        self._token = token
        self.node = node
        self._keepers: Mapping[str, str] = {}  # node -> address, this rank's own node first
        self._lines: Lines = ()  # which records count once all is loaded
        self.checkpoint: CheckpointStates | None = None  # the checkpoint that the generation resumes from
        self.moved = 0  # bytes read from elsewhere in this generation

    def enter(self, keepers: Mapping[str, str], lines: Lines) -> None:
        """Begin a generation with these keepers: node -> address; `lines`: which of their records count in it."""
        self._lines = lines
        self._keepers = dict(sorted(keepers.items(), key=lambda item: item[0] != self.node))
        self.checkpoint, self.moved = None, 0

    def open_checkpoint(self, name: str) -> CheckpointStates:
        """Resume from a checkpoint. Raises CheckpointError or StoreError."""
        self.checkpoint = CheckpointStates(self._engine.settings, self._engine.stack, name)
        return self.checkpoint

    def load(self, plan: Plan, target: Target, moves: Sequence[Move], version: int, agreement: str) -> None:
        """Carry out moves to this rank: every shard arrives at `version`, with the last step replayed where necessary.

        The loader waits for a keeper that restarts. When some shards are missing everywhere, it reports them to the
        coordinator, which ends the generation. Raises Aborted then, and whatever a source raises.
        """
        if not moves:
            return
        remaining = {move.shard: move.sources for move in moves}
        # Stored last, when nothing can interrupt any more: the target is a version ahead of them.
        behind: list[Found] = []
        started, told, membership = time.monotonic(), False, self._engine.membership
        agreed_in = Terms.of(agreement).generation if agreement else 0
        with self._engine.progress.waiting(f"{len(moves)} shards of version {version} in {_places(moves)}"):
            while True:
                keepers = Keepers(self._keepers, self._token, self._patient, plan.lines_before, agreed_in)
                try:
                    for found in self._read(plan, keepers, remaining, version, agreement):
                        if found.gradient is None:
                            target.load(found.shard, found.state)
                        else:
                            behind.append(found)
                        self._patient()
                finally:
                    keepers.close()
                    for item in keepers.damage:
                        membership.tell(e.CorruptionFound(membership.worker, plan.generation, **item))
                if not remaining:
                    break
                patience_s = KEEPER_PATIENCE_S if keepers.unreachable else ANSWERED_PATIENCE_S
                if not told and time.monotonic() - started > patience_s:
                    told = True
                    gone = tuple(sorted(remaining))
                    membership.tell(e.WorkerLacking(membership.worker, plan.generation, version, gone))
                self._patient()
                time.sleep(FETCH_AGAIN_S)
        for found in behind:
            target.load(found.shard, found.state)
        gradients = {found.shard: found.gradient for found in behind if found.gradient is not None}
        if gradients:
            target.update(gradients, Terms.of(agreement))

    def _read(
        self,
        plan: Plan,
        keepers: Keepers,
        remaining: dict[int, tuple[SourceKind, ...]],
        version: int,
        agreement: str,
    ) -> Iterator[Found]:
        """The available shards of `remaining` (shard -> its sources), which are removed from it."""
        for choice in range(max(map(len, remaining.values()))):
            asked: dict[SourceKind, list[int]] = {}
            for shard, kinds in remaining.items():
                if choice < len(kinds):
                    asked.setdefault(kinds[choice], []).append(shard)
            for kind, shards in asked.items():
                for found in self._source(plan, kind, keepers, version, agreement).read(shards, version):
                    del remaining[found.shard]
                    self.moved += _bytes(found, kind)
                    yield found

    def _source(self, plan: Plan, kind: SourceKind, keepers: Keepers, version: int, agreement: str) -> ShardSource:
        engine = self._engine
        if kind is SourceKind.MEMORY:
            return OwnMemory(engine.snapshots, plan.lines_before)
        if kind is SourceKind.PREFETCHED:
            return Prefetched(engine.prefetch, self._patient)
        if kind is SourceKind.PARITY:
            return Stripes(keepers)
        if kind is SourceKind.STORAGE:
            assert self.checkpoint is not None
            return SavedShards(self.checkpoint, engine.stack)
        if kind is SourceKind.PEER:
            return engine.exchange.live_values(plan.layout)
        if kind is SourceKind.NEIGHBORS:
            norms: Mapping[str, float] = Terms.of(agreement).layers if agreement else {}

            def load(store: ShardStore, shards: Sequence[int]) -> None:
                moves = [Move(shard, (engine.rank,), What.OWN, PROTECTED) for shard in shards]
                self.load(plan, store, moves, version, agreement)

            return NeighborLayers(engine.optimizer, plan.stand_ins, norms, load)
        return KeeperRecords(keepers, engine.exchange, replay=kind is SourceKind.REPLAY)

    def kept(self, shards: Sequence[int], version: int, on_wait: Callable[[], None]) -> dict[int, dict[str, Any]]:
        """The states of `version` that keepers hold now, or that parity reproduces."""
        keepers = Keepers(self._keepers, self._token, on_wait, self._lines)
        try:
            return {shard: read_record(data) for shard, data in keepers.records(shards, version).items()}
        finally:
            keepers.close()

    @property
    def keepers(self) -> bool:
        """Whether keepers are known."""
        return bool(self._keepers)

    def _patient(self) -> None:
        self._engine.progress.tick()
        self._engine.comm.ready(())  # raises Aborted


def _bytes(found: Found, kind: SourceKind) -> int:
    """The bytes of what was found that were not in this rank's memory."""
    here = kind in (SourceKind.MEMORY, SourceKind.PREFETCHED)
    read = [] if here else [value for value in found.state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*read, found.gradient) if tensor is not None)


def _places(moves: Sequence[Move]) -> str:
    """The sources of the moves, in words that follow "in"."""
    first = moves[0].sources[0]
    if first is SourceKind.STORAGE:
        return "the checkpoint"
    return "the memory of other ranks" if first is SourceKind.PEER else "the keepers"
