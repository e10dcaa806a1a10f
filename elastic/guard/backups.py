"""Replay: passive copies of other nodes' shards, kept up to date by running the same optimizer on the same gradients.

A backup receives the reduced gradient of each step (4 bytes per float32 element, where a copy of the state with Adam
has 12) before the step is agreed on. By then its own node's keeper holds the gradient and the state before it. So a
rank that passes the agreement of step k knows that version k + 1 of every shard exists on the required number of nodes,
and a lost node takes no version with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.comms.mesh.communicator import Communicator, Key, Kind
from everstep.comms.mesh.tensors import divide, on_host
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.protocol.backing_up import BackingUp
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout
from everstep.resharding.units import Shard


class Backups:
    """One rank's passive copies. Without shards in every other mode of protection."""

    def __init__(self, optimizer: UserOptimizer, comm: Communicator, snapshots: Snapshots, exchange: Exchange) -> None:
        self._stack = optimizer.stack
        self._comm = comm
        self._snapshots = snapshots
        self._exchange = exchange
        self.store = ShardStore(optimizer)
        self.places = BackingUp(comm.rank)
        self._gradients: dict[int, Tensor] = {}

    @property
    def in_sync(self) -> set[int]:
        """The copies that are at the version of the rank."""
        return self.places.in_sync

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards backed up here."""
        return self.store.owned

    def ranks_of(self, shard: int) -> tuple[int, ...]:
        """The ranks that back a shard up."""
        return self.places.ranks.get(shard, ())

    def take_places(self, layout: Layout, ranks: Mapping[int, tuple[int, ...]], *, discard: bool) -> None:
        """Back up the shards that this generation assigns; `discard`: drop all copies."""
        self.places.enter(ranks, discard=discard)
        self.store.own([self._stack.spec.shards[index] for index in self.places.mine])
        self._gradients = {}

    def exchange(self, step: int, layout: Layout, gradients: Mapping[int, Tensor]) -> None:
        """Send the reduced gradients of owned shards to their backups, and receive those of shards backed up here."""
        key = Key(Kind.BACKUP, step)
        for backup, shards in self.places.sends(gradients).items():
            self._comm.send(backup, key, [on_host(gradients[index]) for index in shards])
        by_owner = {
            owner: [self._stack.spec.shards[index] for index in shards]
            for owner, shards in self.places.takes(layout).items()
        }
        self._gradients = {}
        waiting = {(owner, key) for owner in by_owner}
        while waiting:
            owner, name, data = self._comm.receive_any(waiting)
            waiting.discard((owner, name))
            self._take(step, by_owner[owner], data)

    def _take(self, step: int, shards: Sequence[Shard], data: Tensor) -> None:
        parts = [(self._exchange.accumulation(shard), shard.elements) for shard in shards]
        for shard, (dtype, _), gradient in zip(shards, parts, divide(data, parts), strict=True):
            room = self._snapshots.gradient(shard.index, step, shard.elements, dtype)
            room.copy_(gradient)
            self._snapshots.seal_gradient(shard.index, step, shard.elements, dtype)
            self._gradients[shard.index] = room

    def update(self, terms: Terms) -> None:
        """Run the optimizer on the copies, as their owners do on the originals."""
        if self._gradients:
            self.store.update(self._gradients, terms)
            self._gradients = {}
