"""The replicas of a parameter compared: every rank that computes with it, and its backups.

A flipped bit in live memory has no checksum of its own; but the same values lie elsewhere. Every n steps, before a
step is agreed on, one number is summed over all ranks, which is 0 if the digests of what they computed with are equal.
Where some are not, these are exchanged, and the shard's owner makes the values again, from the version before and the
gradient that led on, which have checksums. The odd one out is named, the step is not agreed on, and is computed again
once the values are repaired.

A backup of a parameter that has a master is compared with the owner's master, every other replica with the parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.copying import tensor_bytes
from everstep.checkpointing.memory.record import read_record
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.protocol.agreement import imbalance
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout

from .backups import Backups

_WEIGHT = 1 << 64


@dataclass(frozen=True)
class Digests:
    """Shard -> digest: of what may be damaged here as it was committed, of what is computed with, of backups.

    `master`: of masters that are stepped here and backed up elsewhere. Backups of these are masters, too.
    """

    committed: Mapping[int, int] = field(default_factory=dict)
    live: Mapping[int, int] = field(default_factory=dict)
    backup: Mapping[int, int] = field(default_factory=dict)
    master: Mapping[int, int] = field(default_factory=dict)

    def of(self, shards: Collection[int]) -> Digests:
        """Those of some shards."""
        chosen = set(shards)
        kinds = (self.committed, self.live, self.backup, self.master)
        return Digests(*({shard: value for shard, value in kind.items() if shard in chosen} for kind in kinds))

    def each(self) -> list[tuple[int, int]]:
        """(shard, digest), of all of them."""
        return [*self.committed.items(), *self.live.items(), *self.backup.items(), *self.master.items()]


@dataclass(frozen=True)
class Truth:
    """The digests of a shard's values: as they are computed with, and as the optimizer steps them (None: not known)."""

    live: int
    stepped: int | None


@dataclass(frozen=True)
class Made:
    """Shard -> the digests of its values, made again by its owner; None if that could not be."""

    digests: Mapping[int, Truth | None]


class Odd(NamedTuple):
    """A replica that differs from the others."""

    shard: int
    rank: int
    backup: bool = False  # of a copy that is not computed with


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
        """The first step that a difference found in `step` may have been in."""
        return max(0, step - self._every + 1)

    def digests(self, committed: Mapping[int, int]) -> Digests:
        """The digests this rank can give; `committed`: of shards that may be damaged here, what they should be."""
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
        """This rank's part in a sum that is 0 over all ranks only if the copies of every shard are equal."""
        index = layout.index(self._stack.spec)
        counted = [(shard, value, 1) for kind in (digests.live, digests.backup) for shard, value in kind.items()]
        for shard, value in digests.live.items():
            if layout.owners[shard] == rank:
                backups = 0 if shard in digests.master else len(self._backups.ranks_of(shard))
                counted.append((shard, value, -index.copies(shard) - backups))
        counted += [(shard, value, -len(self._backups.ranks_of(shard))) for shard, value in digests.master.items()]
        for shard, value in digests.committed.items():  # weighs more than all copies: these must not make up for it
            counted += [(shard, value, _WEIGHT), (shard, digests.live.get(shard, value), -_WEIGHT)]
        return imbalance(counted)

    def _compared(self, shard: int) -> bool:
        """Not batch-norm statistics: every micro-batch changes them, to be averaged at the end of the step."""
        spec = self._stack.spec.shards[shard]
        return spec.elements > 0 and not self._stack.averaged(spec.parameter)

    def made_again(self, shard: int, version: int, terms: Mapping[str, Any]) -> Truth | None:
        """The digests of `version` of a shard owned here, from the version before it and the gradient that led on.

        `terms`: what was agreed in step version - 1. None if these are not both here, and sound.
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


class _Said(NamedTuple):
    """A digest that a rank gave. `stepped`: of what the optimizer steps, apart from what is computed with."""

    shard: int
    rank: int
    backup: bool
    stepped: bool
    digest: int


def _said(found: Mapping[int, Digests]) -> list[_Said]:
    with_master = {shard for digests in found.values() for shard in digests.master}
    said: list[_Said] = []
    for rank, digests in sorted(found.items()):
        for kind in (digests.committed, digests.live):
            said += [_Said(shard, rank, False, False, value) for shard, value in kind.items()]
        said += [_Said(shard, rank, True, shard in with_master, value) for shard, value in digests.backup.items()]
        said += [_Said(shard, rank, False, True, value) for shard, value in digests.master.items()]
    return said


def disputed(found: Mapping[int, Digests]) -> list[int]:
    """The shards of which not all digests, by rank, are the same."""
    values: dict[tuple[int, bool], set[int]] = {}
    for one in _said(found):
        values.setdefault((one.shard, one.stepped), set()).add(one.digest)
    return sorted({shard for (shard, _), digests in values.items() if len(digests) > 1})


def odd_ones(found: Mapping[int, Digests], truth: Mapping[int, Truth]) -> list[Odd]:
    """The replicas that differ from what is true."""
    odd: set[Odd] = set()
    for one in _said(found):
        known = truth.get(one.shard)
        if known is not None and one.digest != (known.stepped if one.stepped else known.live):
            odd.add(Odd(one.shard, one.rank, one.backup))
    return sorted(odd)


def decide(found: Mapping[int, Digests], made: Mapping[int, Truth | None]) -> dict[int, Truth]:
    """What is true of each disputed shard: what its owner made again, else what most say (a tie: the lowest rank)."""
    truth: dict[int, Truth] = {}
    for shard, value in made.items():
        if value is not None:
            truth[shard] = value
            continue
        of_it = [one for one in _said(found) if one.shard == shard]
        most = [
            Counter(one.digest for one in of_it if one.stepped == stepped).most_common(1) for stepped in (False, True)
        ]
        truth[shard] = Truth(most[0][0][0], most[1][0][0] if most[1] else None)
    return truth
