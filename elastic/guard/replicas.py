"""Comparison of the replicas of a parameter: those of every rank that computes with it, and of its backups.

A flipped bit in live memory has no checksum; but other ranks hold the same values. Every n steps, before a step is
agreed on, one number is summed over all ranks, which is 0 if the digests of the values that they computed with are
equal. Otherwise the ranks exchange their digests, and the shard's owner recomputes the values from the version before
and its gradient, which have checksums. The rank that differs is named, the step is not agreed on, and is computed
again once the values are repaired.

A backup of a parameter that has a master is compared with the owner's master, every other replica with the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.copying import tensor_bytes
from everstep.checkpointing.memory.record import read_record
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.protocol.replicas import Digests, Truth
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout

from .backups import Backups


def digest(values: Tensor) -> int:
    """A digest of a shard's values; 63 bits."""
    return xxhash.xxh3_64_intdigest(tensor_bytes(values.cpu())) >> 1


class Replicas:
    """One rank's part in the comparison. `every`: in steps, 0 for never."""

    def __init__(
        self, store: ShardStore, snapshots: Snapshots, backups: Backups, exchange: Exchange, every: int
    ) -> None:
        self._store = store
        self._stack = store.optimizer.stack
        self._snapshots = snapshots
        self._backups = backups
        self._exchange = exchange
        self._every = every

    def due(self, step: int) -> bool:
        """Whether the values that `step` was computed with are compared before it is agreed on."""
        return self._every > 0 and step > 0 and step % self._every == 0

    def since(self, step: int) -> int:
        """The first step that a difference found in `step` may have affected."""
        return max(0, step - self._every + 1)

    def digests(self, committed: Mapping[int, int]) -> Digests:
        """The digests that this rank contributes; `committed`: the right ones of shards that may be damaged here."""
        spec = self._stack.spec
        read = {s.index: s for layer in self._stack.held for s in spec.shards_of_layer[layer]}
        live = {i: digest(self._stack.computed_with(s)) for i, s in read.items() if self._compared(i)}
        backups = {
            s.index: digest(self._backups.store.state(s.index)["value"].reshape(-1))
            for s in self._backups.shards
            if self._compared(s.index)
        }
        masters = {
            s.index: digest(self._store.state(s.index)["value"].reshape(-1))
            for s in self._store.owned
            if self._backups.ranks_of(s.index) and self._store.apart(s) and self._compared(s.index)
        }
        return Digests(dict(committed), live, backups, masters)

    def compared(self) -> list[int]:
        """The shards whose replicas are compared."""
        return [shard.index for shard in self._stack.spec.shards if self._compared(shard.index)]

    def imbalance(self, digests: Digests, layout: Layout, rank: int) -> int:
        """This rank's addend of a sum that is 0 over all ranks only if the copies of every shard are equal."""
        return digests.imbalance(layout, self._stack.spec, rank, self._backups.ranks_of)

    def _compared(self, shard: int) -> bool:
        """Batch-norm statistics are excluded: every micro-batch changes them, and the end of the step averages them."""
        spec = self._stack.spec.shards[shard]
        return spec.elements > 0 and not self._stack.is_buffer(spec.parameter)

    def made_again(self, shard: int, version: int, terms: Terms) -> Truth | None:
        """Recompute the digests of `version` of a shard owned here, from the version before it and its gradient.

        `terms`: the agreement of step version - 1. None if the two are not both present here, and intact.
        """
        before = self._snapshots.stored(shard, version - 1)
        gradient = self._snapshots.stored_gradient(shard, version - 1)
        if before is None or gradient is None:
            return None
        spec = self._stack.spec.shards[shard]
        copies = ShardStore(self._store.optimizer)
        copies.own([spec])
        copies.load(shard, read_record(before))
        reduced = torch.frombuffer(bytearray(gradient), dtype=self._exchange.accumulation(spec))
        copies.update({shard: reduced}, terms)
        return self._truth(shard, copies.state(shard)["value"])

    def record_differs(self, shard: int, version: int, truth: Truth) -> bool:
        """Whether the snapshot of a shard owned here was made of damaged values."""
        data = self._snapshots.stored(shard, version)
        if data is None:
            return False
        found = self._truth(shard, read_record(data)["value"])
        return found.live != truth.live or truth.stepped not in (None, found.stepped)

    def _truth(self, shard: int, value: Tensor) -> Truth:
        return Truth(digest(self._stack.as_live(shard, value)), digest(value.reshape(-1)))
