"""Which rank backs up which shard under `protection="replay"`, and which of a rank's copies are up to date.

A backup receives the reduced gradient of each step before the step is agreed on, and runs the owner's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from everstep.resharding.layout import Layout
from everstep.resharding.placement import Placement


def backup_ranks(layout: Layout, placement: Placement, nodes: Mapping[int, str]) -> dict[int, tuple[int, ...]]:
    """Shard -> the ranks that back it up: one on each node that the placement names, assigned round-robin."""
    of_node: dict[str, list[int]] = {}
    for rank in layout.ranks:
        of_node.setdefault(nodes[rank], []).append(rank)
    dealt: dict[int, tuple[int, ...]] = {}
    for stripe in placement.stripes:
        for shard in stripe.shards:
            dealt[shard] = tuple(of_node[node][shard % len(of_node[node])] for node in stripe.parity)
    return dealt


@dataclass
class BackingUp:
    """The part of one rank: `mine` are the shards that it backs up; copies of `in_sync` are at the rank's version."""

    rank: int
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # shard -> the ranks that back it up
    mine: tuple[int, ...] = ()
    in_sync: set[int] = field(default_factory=set)

    def enter(self, ranks: Mapping[int, tuple[int, ...]], *, discard: bool) -> None:
        """Enter a generation and its assignment; `discard`: drop all copies."""
        self.ranks = dict(ranks)
        self.mine = tuple(shard for shard, backups in sorted(ranks.items()) if self.rank in backups)
        self.in_sync = set() if discard else self.in_sync.intersection(self.mine)

    def behind(self) -> list[int]:
        """The shards of this rank whose copies have to be fetched."""
        return [shard for shard in self.mine if shard not in self.in_sync]

    def sends(self, shards: Iterable[int]) -> dict[int, list[int]]:
        """Backup rank -> the given shards, owned here, whose gradients this rank sends to it. In the order of ranks."""
        found: dict[int, list[int]] = {}
        for shard in sorted(shards):
            for backup in self.ranks.get(shard, ()):
                if backup != self.rank:
                    found.setdefault(backup, []).append(shard)
        return dict(sorted(found.items()))

    def takes(self, layout: Layout) -> dict[int, list[int]]:
        """Owner -> the shards backed up here whose gradients it sends."""
        found: dict[int, list[int]] = {}
        for shard in self.mine:
            found.setdefault(layout.owners[shard], []).append(shard)
        return found
