"""Where a shard may be read: this rank's memory, keepers, parity, a checkpoint, the neighbouring layers.

The live values of other ranks are read by `elastic/step/exchange.py`. `loading.py` asks all of them in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.record import read_record
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.source import Found
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.neighbors import stand_ins

from .resume import CheckpointStates


@dataclass(frozen=True)
class OwnMemory:
    """This rank's snapshots. What is found there counts as written: it need not be copied again."""

    snapshots: Snapshots

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard in shards:
            data = self.snapshots.resume(shard, version)
            if data is not None:
                yield Found(shard, read_record(data))


@dataclass(frozen=True)
class KeeperRecords:
    """The snapshots that keepers guard, nearest keeper first.

    With `replay`, a keeper that lacks a version gives the one before it and the gradient, where it has these.
    """

    keepers: Keepers
    exchange: Exchange
    replay: bool

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard, stored, parts in self.keepers.fetch(shards, version, replay=self.replay):
            gradient = None
            if stored < version:
                dtype = self.exchange.accumulation(self.exchange.stack.spec.shards[shard])
                gradient = torch.frombuffer(parts[1], dtype=dtype) if parts[1] else torch.empty(0, dtype=dtype)
            yield Found(shard, read_record(parts[0]), gradient)


@dataclass(frozen=True)
class Stripes:
    """What can be computed from the other shards of a stripe and its parity, which are in keepers."""

    keepers: Keepers

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard, _, parts in self.keepers.decode(shards, version):
            yield Found(shard, read_record(parts[0]))


@dataclass(frozen=True)
class SavedShards:
    """The checkpoint that training goes on from. Raises CheckpointError or StoreError for one that is damaged."""

    states: CheckpointStates
    stack: LayerStack

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard in shards:
            yield Found(shard, self.states.state(self.stack.spec.shards[shard]))


@dataclass(frozen=True)
class NeighborLayers:
    """Stand-ins for shards that are gone for good: the average of their neighbours, weighted by the norms of those.

    Lossy, and what the user asked for (on_loss="neighbors"). The optimizer's state starts from nothing. `load` loads
    other shards from wherever they are; `norms` has the gradient's norm by layer.
    """

    optimizer: UserOptimizer
    gone: Collection[int]
    norms: Mapping[str, float]
    load: Callable[[ShardStore, Sequence[int]], None]

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        spec = self.optimizer.stack.spec
        twins_of = stand_ins(spec, self.gone)
        for shard in shards:
            twins = twins_of.get(shard, ())
            if not twins:
                continue
            store = ShardStore(self.optimizer)
            store.own(spec.shards[twin] for twin in twins)
            self.load(store, twins)
            weights = [self.norms.get(str(spec.home(spec.shards[twin])), 0.0) for twin in twins]
            if not sum(weights):
                weights = [1.0] * len(twins)
            found = [store.state(twin)["value"] for twin in twins]
            weighted = [value.double() * weight for value, weight in zip(found, weights, strict=True)]
            value = torch.stack(weighted).sum(0) / sum(weights)
            yield Found(shard, {"value": value.to(found[0].dtype)})
