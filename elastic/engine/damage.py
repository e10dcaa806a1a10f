"""Wrong values on a rank, as a flipped bit leaves them: how they are detected, reported and discarded."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn

import torch

from everstep.checkpointing.memory.record import ShardState
from everstep.comms.mesh.communicator import Aborted
from everstep.elastic.guard.replicas import digest
from everstep.elastic.holding.watch import Changed, differing_bits
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.replicas import Digests, Made, Odd, decide, disputed, odd_ones
from everstep.elastic.protocol.terms import Terms

from .loading import KEEPER_PATIENCE_S, Loader

if TYPE_CHECKING:
    from .engine import Engine

DECISION = "the coordinator to begin a new generation"  # follows "waits for"


class Damage:
    """Handles damaged values for one engine."""

    def __init__(self, engine: Engine, loader: Loader) -> None:
        self._engine = engine
        self._loader = loader
        self.suspects: dict[int, int] = {}  # shard that may be damaged here -> digest of its committed value

    def explains(self, changed: Changed) -> bool:
        """Whether a value differs from the committed one by a single bit: memory fails like that, no script does."""
        engine, index = self._engine, changed.held.index
        shards = [shard for shard in engine.stack.spec.shards if shard.parameter == index]
        committed = self._committed([shard.index for shard in shards])
        flat = changed.held.tensor.detach().reshape(-1)
        if len(committed) < len(shards):
            return False
        values = {s.index: engine.stack.as_live(s.index, committed[s.index]["value"]) for s in shards}
        if sum(differing_bits(flat[s.start : s.stop], values[s.index]) for s in shards) > 1:
            return False
        self.suspects.update({index: digest(value) for index, value in values.items()})
        return True

    def compared(self) -> None:
        """Replicas of the suspects were compared with others."""
        self.suspects = {}

    def _committed(self, shards: list[int]) -> dict[int, ShardState]:
        """What keepers hold of this version; a part, if they still lack some after a while. Raises Aborted."""
        engine = self._engine
        found: dict[int, ShardState] = {}
        engine.snapshots.wait(engine.patient)
        deadline = time.monotonic() + KEEPER_PATIENCE_S
        while self._loader.keepers and len(found) < len(shards) and time.monotonic() < deadline:
            absent = [index for index in shards if index not in found]
            found.update(self._loader.kept(absent, engine.version, engine.patient))
            engine.patient()
        return found

    def distrust(self, step: int, replicas: dict[int, Digests]) -> NoReturn:
        """Replicas differ: no rank passes this agreement. The wrong ones are discarded; raises Aborted, to recover.

        All results of the step are dropped: what a wrong replica computed went into the gradients of other ranks.
        """
        engine = self._engine
        layout, _ = engine.current()
        engine.start_over()
        terms = Terms.of(engine.agreement)
        mine = [shard for shard in disputed(replicas) if layout.owners[shard] == engine.rank]
        made = engine.agreeing.gathered(Made({shard: engine.replicas.made_again(shard, step, terms) for shard in mine}))
        truth = decide(replicas, {shard: value for said in made.values() for shard, value in said.digests.items()})
        odd = odd_ones(replicas, truth)
        for shard in mine:
            if engine.replicas.record_differs(shard, step, truth[shard]):
                engine.snapshots.discard(shard, step)  # the version before it and the gradient reproduce it
        self._discard([item for item in odd if item.rank == engine.rank])
        # No rank reports the difference before all ranks know of it: the abort that follows cancels messages in
        # transit.
        engine.agreeing.gathered(Made({}))
        if engine.rank == min(engine.comm.members):
            self._report(step, layout.generation, odd)
        evicted = engine.settings.on_corruption == "evict" and any(item.rank == engine.rank for item in odd)
        with engine.progress.waiting(DECISION):
            try:
                while True:
                    engine.patient()
                    time.sleep(0.01)
            except Aborted:
                # Not earlier: the abort that follows a death cancels messages that others have yet to receive.
                if evicted:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise

    def _discard(self, odd: list[Odd]) -> None:
        """Values on this rank are wrong: its reports no longer list them as held."""
        engine = self._engine
        for item in odd:
            if item.backup:
                engine.backups.in_sync.discard(item.shard)
                # Earlier versions come from the same copy: the owner has other ones.
                engine.snapshots.discard(item.shard)
        wrong = frozenset(item.shard for item in odd if not item.backup)
        engine.worker.happened(w.Distrusted(wrong, values=bool(wrong)))

    def _report(self, step: int, generation: int, odd: list[Odd]) -> None:
        """Report one shard of each wrong replica to the coordinator, which begins a new generation."""
        engine = self._engine
        detail = f"steps {engine.replicas.since(step)} to {step} may have been computed with other values than replicas"
        for item in {(item.rank, item.backup): item for item in reversed(odd)}.values():
            where = "backup" if item.backup else "replica"
            worker = engine.membership.worker
            found = e.CorruptionFound(worker, generation, where, rank=item.rank, shard=item.shard, detail=detail)
            engine.membership.tell(found)

    def inject(self, kind: str) -> None:
        """An injected fault: flip one bit of a frame, or of a value that this rank owns, only reads, or backs up."""
        engine = self._engine
        layout, _ = engine.current()
        if kind == "flip-frame":
            engine.comm.damage()
            return
        if kind == "flip-backup":
            engine.backups.store.state(engine.backups.shards[-1].index)["value"][:1].view(torch.uint8)[1] ^= 16
            return
        for layer in reversed(engine.stack.held):
            for shard in reversed(engine.stack.spec.shards_of_layer[layer]):
                if shard.elements > 1000 and (layout.owners[shard.index] == engine.rank) == (kind == "flip-owned"):
                    engine.stack.view(shard)[:1].view(torch.uint8)[1] ^= 16
                    return
