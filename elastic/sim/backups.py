"""A simulated rank's backups: the contract of `elastic.guard.backups.Backups`, whose places `BackingUp` decides."""

from __future__ import annotations

from collections.abc import Mapping

from everstep.elastic.protocol.backing_up import BackingUp
from everstep.resharding.layout import Layout

from .links import Key, Links
from .snapshots import Snapshots
from .values import ShardState, initial, updated
from .world import Steps


class Backups:
    """Passive copies of other nodes' shards. None in every mode of protection but replay."""

    def __init__(self, links: Links, snapshots: Snapshots) -> None:
        self.places = BackingUp(links.rank)
        self.states: dict[int, ShardState] = {}
        self._links = links
        self._snapshots = snapshots
        self._gradients: dict[int, str] = {}

    def enter(self, ranks: Mapping[int, tuple[int, ...]], *, discard: bool, seeded: bool) -> None:
        """Back up what a generation says."""
        places = self.places
        places.enter(ranks, discard=discard)
        self.states = {shard: state for shard, state in self.states.items() if shard in places.mine}
        self._gradients = {}
        if seeded:
            self.load({shard: initial(shard) for shard in places.mine})

    def load(self, states: Mapping[int, ShardState]) -> None:
        """Take copies that are in step from now on."""
        self.states.update(states)
        self.places.level.update(states)

    def exchange(self, step: int, layout: Layout, gradients: Mapping[int, str]) -> Steps[None]:
        """Send the gradients of the shards owned here to their backups, and take in those of the others'."""
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
