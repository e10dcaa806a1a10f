"""The replicas of a parameter compared: every rank that computes with it, and its backups.

A flipped bit in live memory has no checksum of its own; but the same values lie elsewhere. Every n steps, before a
step is agreed on, one number is summed over all ranks, which is 0 if the digests of what they computed with are equal.
Where some are not, these are exchanged, and the shard's owner makes the values again, from the version before and the
gradient that led on, which have checksums. The odd one out is named, the step is not agreed on, and is computed again
once the values are repaired.
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
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.protocol.agreement import imbalance
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout

from .backups import Backups

_WEIGHT = 1 << 64


@dataclass(frozen=True)
class Digests:
    """Shard -> digest: of what may be damaged here as it was committed, of what is computed with, of backups."""

    committed: Mapping[int, int] = field(default_factory=dict)
    live: Mapping[int, int] = field(default_factory=dict)
    backup: Mapping[int, int] = field(default_factory=dict)

    def of(self, shards: Collection[int]) -> Digests:
        """Those of some shards."""
        chosen = set(shards)
        kinds = (self.committed, self.live, self.backup)
        return Digests(*({shard: value for shard, value in kind.items() if shard in chosen} for kind in kinds))

    def each(self) -> list[tuple[int, int]]:
        """(shard, digest), of all of them."""
        return [*self.committed.items(), *self.live.items(), *self.backup.items()]


@dataclass(frozen=True)
class Made:
    """Shard -> the digest of its values, made again by its owner; None if that could not be."""

    digests: Mapping[int, int | None]


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
        self, stack: LayerStack, snapshots: Snapshots, backups: Backups, exchange: Exchange, every: int
    ) -> None:
        self._stack = stack
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
            s.index: digest(self._stack.as_live(s.index, self._backups.store.state(s.index)["value"]))
            for s in self._backups.shards
            if self._compared(s.index)
        }
        return Digests(dict(committed), live, backups)

    def compared(self) -> list[int]:
        """The shards whose replicas are compared."""
        return [shard.index for shard in self._stack.spec.shards if self._compared(shard.index)]

    def imbalance(self, digests: Digests, layout: Layout, rank: int) -> int:
        """This rank's part in a sum that is 0 over all ranks only if the copies of every shard are equal."""
        index = layout.index(self._stack.spec)
        counted = [(shard, value, 1) for kind in (digests.live, digests.backup) for shard, value in kind.items()]
        for shard, value in digests.live.items():
            if layout.owners[shard] == rank:
                counted.append((shard, value, -index.copies(shard) - len(self._backups.ranks_of(shard))))
        for shard, value in digests.committed.items():  # weighs more than all copies: these must not make up for it
            counted += [(shard, value, _WEIGHT), (shard, digests.live.get(shard, value), -_WEIGHT)]
        return imbalance(counted)

    def _compared(self, shard: int) -> bool:
        """Not batch-norm statistics: every micro-batch changes them, to be averaged at the end of the step."""
        spec = self._stack.spec.shards[shard]
        return spec.elements > 0 and not self._stack.averaged(spec.parameter)

    def made_again(self, shard: int, version: int, terms: Mapping[str, Any]) -> int | None:
        """The digest of `version` of a shard owned here, from the version before it and the gradient that led on.

        `terms`: what was agreed in step version - 1. None if these are not both here, and sound.
        """
        before = self._snapshots.stored(shard, version - 1)
        gradient = self._snapshots.stored_gradient(shard, version - 1)
        if before is None or gradient is None:
            return None
        spec = self._stack.spec.shards[shard]
        copies = ShardStore(self._backups.store.optimizer)
        copies.own([spec])
        copies.load(shard, read_record(before))
        reduced = torch.frombuffer(bytearray(gradient), dtype=self._exchange.accumulation(spec))
        copies.update({shard: reduced}, terms)
        return digest(self._stack.as_live(shard, copies.state(shard)["value"]))

    def record_differs(self, shard: int, version: int, true: int) -> bool:
        """Whether the snapshot of a shard owned here was made of damaged values."""
        data = self._snapshots.stored(shard, version)
        return data is not None and digest(self._stack.as_live(shard, read_record(data)["value"])) != true


def disputed(found: Mapping[int, Digests]) -> list[int]:
    """The shards of which not all digests, by rank, are the same."""
    said: dict[int, set[int]] = {}
    for digests in found.values():
        for shard, value in digests.each():
            said.setdefault(shard, set()).add(value)
    return sorted(shard for shard, values in said.items() if len(values) > 1)


def odd_ones(found: Mapping[int, Digests], truth: Mapping[int, int]) -> list[Odd]:
    """The replicas that differ from what is true."""
    odd: set[Odd] = set()
    for rank, digests in found.items():
        for kind in (digests.committed, digests.live):
            odd.update(Odd(s, rank) for s, value in kind.items() if value != truth.get(s, value))
        odd.update(Odd(s, rank, True) for s, value in digests.backup.items() if value != truth.get(s, value))
    return sorted(odd)


def decide(found: Mapping[int, Digests], made: Mapping[int, int | None]) -> dict[int, int]:
    """What is true of each disputed shard: what its owner made again, else what most say (a tie: the lowest rank)."""
    truth: dict[int, int] = {}
    for shard, value in made.items():
        if value is not None:
            truth[shard] = value
            continue
        said = [digest for _, digests in sorted(found.items()) for index, digest in digests.each() if index == shard]
        truth[shard] = Counter(said).most_common(1)[0][0]
    return truth
