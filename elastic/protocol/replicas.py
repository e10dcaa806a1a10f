"""Replicas of a parameter that differ: which ones they are, and which value is right.

Every rank that computes with a parameter has a replica of it, and so have its backups. Each replica has a digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from everstep.resharding.layout import Layout
from everstep.resharding.units import ModelSpec

from .agreement import imbalance

_WEIGHT = 1 << 64


@dataclass(frozen=True)
class Digests:
    """Shard -> digest: of committed values that may be damaged here, of the values in computation, of backups.

    `master`: digests of masters that are stepped here and backed up elsewhere. Their backups are masters, too.
    """

    committed: Mapping[int, int] = field(default_factory=dict)
    live: Mapping[int, int] = field(default_factory=dict)
    backup: Mapping[int, int] = field(default_factory=dict)
    master: Mapping[int, int] = field(default_factory=dict)

    def of(self, shards: Collection[int]) -> Digests:
        """The digests of some shards."""
        chosen = set(shards)
        kinds = (self.committed, self.live, self.backup, self.master)
        return Digests(*({shard: value for shard, value in kind.items() if shard in chosen} for kind in kinds))

    def each(self) -> list[tuple[int, int]]:
        """(shard, digest), of all digests."""
        return [*self.committed.items(), *self.live.items(), *self.backup.items(), *self.master.items()]

    def imbalance(self, layout: Layout, spec: ModelSpec, rank: int, backups: Callable[[int], Collection[int]]) -> int:
        """This rank's addend of a sum that is 0 over all ranks only if the copies of every shard are equal.

        `backups`: shard -> the ranks that back it up.
        """
        index = layout.index(spec)
        counted = [(shard, value, 1) for kind in (self.live, self.backup) for shard, value in kind.items()]
        for shard, value in self.live.items():
            if layout.owners[shard] == rank:
                held = 0 if shard in self.master else len(backups(shard))
                counted.append((shard, value, -index.copies(shard) - held))
        counted += [(shard, value, -len(backups(shard))) for shard, value in self.master.items()]
        for shard, value in self.committed.items():  # outweighs all copies: equal copies must not compensate for it
            counted += [(shard, value, _WEIGHT), (shard, self.live.get(shard, value), -_WEIGHT)]
        return imbalance(counted)


@dataclass(frozen=True)
class Truth:
    """The digests of a shard's values: those computed with, and those that the optimizer steps (None: not known)."""

    live: int
    stepped: int | None


@dataclass(frozen=True)
class Made:
    """Shard -> the digests of its values, recomputed by its owner; None if that was impossible."""

    digests: Mapping[int, Truth | None]


class Odd(NamedTuple):
    """A replica that differs from the others."""

    shard: int
    rank: int
    backup: bool = False  # a copy that takes no part in computation


class _Said(NamedTuple):
    """A digest that a rank reported. `stepped`: of what the optimizer steps, apart from the values computed with."""

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
    """The shards whose digests differ between ranks."""
    values: dict[tuple[int, bool], set[int]] = {}
    for one in _said(found):
        values.setdefault((one.shard, one.stepped), set()).add(one.digest)
    return sorted({shard for (shard, _), digests in values.items() if len(digests) > 1})


def odd_ones(found: Mapping[int, Digests], truth: Mapping[int, Truth]) -> list[Odd]:
    """The replicas that differ from the right value."""
    odd: set[Odd] = set()
    for one in _said(found):
        known = truth.get(one.shard)
        if known is not None and one.digest != (known.stepped if one.stepped else known.live):
            odd.add(Odd(one.shard, one.rank, one.backup))
    return sorted(odd)


def decide(found: Mapping[int, Digests], made: Mapping[int, Truth | None]) -> dict[int, Truth]:
    """The right digests of each disputed shard: the owner's recomputed ones, else the majority's (tie: lowest rank)."""
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
