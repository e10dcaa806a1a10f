"""The comparison of replicas on a simulated rank: the contract of `elastic.guard.replicas` and `agreeing`."""

from __future__ import annotations

from collections.abc import Mapping

from everstep.elastic.protocol.agreement import Share
from everstep.elastic.protocol.replicas import Digests, Made, Odd, Truth, decide, disputed, odd_ones
from everstep.resharding.layout import Layout
from everstep.resharding.units import ModelSpec

from .backups import Backups
from .links import Links
from .snapshots import Snapshots
from .values import mixed, updated
from .world import Steps


class Replicas:
    """The part of one rank. `every`: the steps between comparisons, 0 for never."""

    def __init__(self, spec: ModelSpec, links: Links, snapshots: Snapshots, backups: Backups, every: int) -> None:
        self._spec = spec
        self._links = links
        self._snapshots = snapshots
        self._backups = backups
        self._every = every
        self._digests = Digests()

    def imbalance(self, step: int, layout: Layout, layers: tuple[int, int], values: Mapping[int, str]) -> int:
        """This rank's addend of a sum that is 0 if all replicas are equal; `values`: those computed with."""
        if not self._every or step == 0 or step % self._every:
            return 0
        read = {s.index for layer in range(*layers) for s in self._spec.shards_of_layer[layer]}
        backups = {shard: _digest(state.value) for shard, state in self._backups.states.items()}
        self._digests = Digests(live={shard: _digest(values[shard]) for shard in read}, backup=backups)
        ranks = self._backups.places.ranks
        return self._digests.imbalance(layout, self._spec, self._links.rank, lambda shard: ranks.get(shard, ()))

    def odd(self, step: int, layout: Layout, merged: Share) -> Steps[list[Odd]]:
        """The replicas that differ, of all ranks; none in nearly every step."""
        if not merged.replicas:
            return []
        found = yield from self._links.gathered(("digests", step), self._digests)
        mine = [shard for shard in disputed(found) if layout.owners[shard] == self._links.rank]
        made = yield from self._links.gathered(("made", step), Made({s: self._made_again(s, step) for s in mine}))
        truth = decide(found, {shard: value for said in made.values() for shard, value in said.digests.items()})
        for shard in mine:
            kept = self._snapshots.kept(shard, step)[0]
            if kept is not None and _digest(kept.value) != truth[shard].live:
                self._snapshots.discard(shard, step)
        return odd_ones(found, truth)

    def all_know(self, step: int) -> Steps[None]:
        """Return when all ranks know which replicas differ."""
        yield from self._links.gathered(("known", step), None)

    def _made_again(self, shard: int, version: int) -> Truth | None:
        before, gradient = self._snapshots.kept(shard, version - 1)
        if before is None or gradient is None:
            return None
        made = _digest(updated(before, gradient).value)
        return Truth(made, made)


def flipped(value: str, rank: int) -> str:
    """A value with a flipped bit."""
    return mixed("flipped", rank, value)


def _digest(value: str) -> int:
    return int(mixed("digest", value), 16) >> 1
