"""A simulated rank's backups: the contract of `elastic.guard.backups.Backups`. `BackingUp` decides where they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from everstep.elastic.protocol.backing_up import BackingUp
from everstep.resharding.layout import Layout

from .links import Key, Links
from .snapshots import Snapshots
from .values import ShardState, initial, updated
from .world import Steps


class Backups:
    """Passive copies of other nodes' shards, held only under `protection="replay"`."""

    def __init__(self, links: Links, snapshots: Snapshots) -> None:
        self.places = BackingUp(links.rank)
        self.states: dict[int, ShardState] = {}
        self._links = links
        self._snapshots = snapshots
        self._gradients: dict[int, str] = {}

    def enter(
        self, ranks: Mapping[int, tuple[int, ...]], *, discard: bool, seeded: bool, gone: Collection[int]
    ) -> None:
        """Enter a generation and its assignment of backups; copies of shards that are `gone` are not used."""
        places = self.places
        places.enter(ranks, discard=discard)
        places.in_sync.difference_update(gone)
        self.states = {shard: state for shard, state in self.states.items() if shard in places.mine}
        self._gradients = {}
        if seeded:
            self.load({shard: initial(shard) for shard in places.mine})

    def load(self, states: Mapping[int, ShardState]) -> None:
        """Adopt copies that are up to date."""
        self.states.update(states)
        self.places.in_sync.update(states)

    def exchange(self, step: int, layout: Layout, gradients: Mapping[int, str]) -> Steps[None]:
        """Send the gradients of the owned shards to their backups, and receive those of the shards backed up here."""
        key: Key = ("backup", step)
        for backup, shards in self.places.sends(gradients).items():
            self._links.send(backup, key, {shard: gradients[shard] for shard in shards})
        self._gradients = {}
        takes = self.places.takes(layout)
        waiting = {(owner, key) for owner in takes}
        while waiting:
            owner, name, data = yield from self._links.receive_any(waiting)
            waiting.discard((owner, name))
            for shard in takes[owner]:
                self._snapshots.open_gradient(shard, step)
                self._gradients[shard] = data[shard]
                self._snapshots.seal_gradient(shard, step, data[shard])

    def update(self) -> None:
        """Run the optimizer on the copies, as their owners do on the originals."""
        for shard, gradient in self._gradients.items():
            self.states[shard] = updated(self.states[shard], gradient)
        self._gradients = {}
