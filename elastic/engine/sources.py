"""The places from which a shard may be read: this rank's memory, keepers, parity, a checkpoint, neighbouring layers.

`elastic/step/exchange.py` reads the live values of other ranks. `loading.py` asks all sources in the same way.
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
from everstep.resharding.lines import Lines
from everstep.resharding.neighbors import stand_ins

from .resume import CheckpointStates


@dataclass(frozen=True)
class OwnMemory:
    """This rank's snapshots. A shard that is found there counts as written: it need not be copied again."""

    snapshots: Snapshots
    lines: Lines = ()

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard in shards:
            data = self.snapshots.resume(shard, version, self.lines)
            if data is not None:
                yield Found(shard, read_record(data))


@dataclass(frozen=True)
class KeeperRecords:
    """The snapshots that keepers hold, nearest keeper first.

    With `replay`, a keeper that lacks a version supplies the one before it and the gradient, if it has both.
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
    """What can be computed from the other shards of a stripe and its parity, both in keepers."""

    keepers: Keepers

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard, _, parts in self.keepers.decode(shards, version):
            yield Found(shard, read_record(parts[0]))


@dataclass(frozen=True)
class SavedShards:
    """The checkpoint that training resumes from. Raises CheckpointError or StoreError for a damaged one."""

    states: CheckpointStates
    stack: LayerStack

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        for shard in shards:
            yield Found(shard, self.states.state(self.stack.spec.shards[shard]))


@dataclass(frozen=True)
class NeighborLayers:
    """Approximations of shards that are lost everywhere: averages of neighbours, weighted by their gradient norms.

    Lossy, at the user's request (on_loss="neighbors"). The optimizer's state starts from zero. `load` loads other
    shards from wherever they are; `norms` has the gradient's norm by layer.
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
