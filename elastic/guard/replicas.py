"""The replicas of a parameter compared: every rank that computes with it, and its backups.

A flipped bit in live memory has no checksum of its own; but the same values lie elsewhere. Every n steps, before a
step is agreed on, digests of what each rank computed with are exchanged. Where they differ, the shard's owner makes
the values again, from the version before and the gradient that led on, which have checksums. The odd one out is named,
the step is not agreed on, and is computed again once the values are repaired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.copying import tensor_bytes
from everstep.checkpointing.memory.record import read_record
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.step.exchange import Exchange

from .backups import Backups, Copies

Share = dict[str, dict[str, int]]  # "live" | "backup" -> shard -> digest


class Odd(NamedTuple):
    """A replica that differs from the others."""

    shard: int
    rank: int
    backup: bool = False  # of a copy that is not computed with


def digest(values: Tensor) -> int:
    """A digest of a shard's values; 52 bits, which JSON keeps exactly."""
    return xxhash.xxh3_64_intdigest(tensor_bytes(values.cpu())) >> 12


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

    def share(self) -> Share:
        """The digests this rank can give."""
        spec = self._stack.spec
        read = {s.index: s for layer in self._stack.held for s in spec.shards_of_layer[layer]}
        live = {str(i): digest(self._stack.computed_with(s)) for i, s in read.items() if self._compared(i)}
        backups = {
            str(s.index): digest(self._backups.copies.state(s.index)["value"].reshape(-1))
            for s in self._backups.shards
            if self._compared(s.index)
        }
        return {"live": live, "backup": backups}

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
        copies = Copies(self._backups.copies.user, self._stack)
        copies.own([spec])
        copies.load(shard, read_record(before))
        reduced = torch.frombuffer(bytearray(gradient), dtype=self._exchange.accumulation(spec))
        copies.update({shard: reduced}, terms)
        return digest(copies.state(shard)["value"].reshape(-1))

    def record_differs(self, shard: int, version: int, true: int) -> bool:
        """Whether the snapshot of a shard owned here was made of damaged values."""
        data = self._snapshots.stored(shard, version)
        return data is not None and digest(read_record(data)["value"].reshape(-1)) != true


def disputed(shares: Mapping[int, Share]) -> list[int]:
    """The shards of which not all digests are the same."""
    said: dict[int, set[int]] = {}
    for share in shares.values():
        for digests in share.values():
            for shard, value in digests.items():
                said.setdefault(int(shard), set()).add(value)
    return sorted(shard for shard, values in said.items() if len(values) > 1)


def odd_ones(shares: Mapping[int, Share], truth: Mapping[int, int]) -> list[Odd]:
    """The replicas that differ from what is true."""
    return sorted(
        Odd(int(shard), rank, name == "backup")
        for rank, share in shares.items()
        for name, digests in share.items()
        for shard, value in digests.items()
        if int(shard) in truth and value != truth[int(shard)]
    )


def decide(shares: Mapping[int, Share], made: Mapping[int, int | None]) -> dict[int, int]:
    """What is true of each disputed shard: what its owner made again, else what most say (a tie: the lowest rank)."""
    truth: dict[int, int] = {}
    for shard, value in made.items():
        if value is not None:
            truth[shard] = value
            continue
        said = [d[str(shard)] for _, share in sorted(shares.items()) for d in share.values() if str(shard) in d]
        truth[shard] = Counter(said).most_common(1)[0][0]
    return truth
