"""The memory that layers need in the workers: of values, gradients and optimizer states; activations come on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from .layout import Layout, Stage
from .units import ModelSpec

VALUES = 2  # each held parameter has a value and the gradient of a micro-batch


@dataclass(frozen=True)
class Memory:
    """What layers occupy, and what ranks have, in bytes.

    `held`: of each layer, in every rank that holds it. `owned`: of each layer, in all ranks that hold it together: they
    divide its shards. `limits`: rank -> what it may use; no limit where none is given.
    """

    held: tuple[int, ...]
    owned: tuple[int, ...]
    limits: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, spec: ModelSpec, states: Sequence[int], gradients: Sequence[int], limits: Mapping[int, int] | None = None
    ) -> Memory:
        """`states`, `gradients`: bytes of each shard's record (value and optimizer state) and of its gradient's sum."""
        held, owned = [VALUES * size for size in layer_bytes(spec)], [0] * spec.layers
        for shard in spec.shards:
            for layer in spec.parameters[shard.parameter].layers:
                held[layer] += gradients[shard.index] if gradients else 0
            owned[spec.home(shard)] += states[shard.index] if states else 0
        return cls(tuple(held), tuple(owned), limits or {})

    @cached_property
    def _held(self) -> list[int]:
        return [0, *accumulate(self.held)]

    @cached_property
    def _owned(self) -> list[int]:
        return [0, *accumulate(self.owned)]

    def needed(self, ranks: Sequence[int], start: int, stop: int) -> int:
        """By each of these ranks, for the layers from `start` to `stop`."""
        held, owned = (sums[stop] - sums[start] for sums in (self._held, self._owned))
        return held - (-owned // len(ranks))

    def fits(self, ranks: Sequence[int], start: int, stop: int) -> bool:
        """Whether each of these ranks has the memory for the layers from `start` to `stop`."""
        needed = self.needed(ranks, start, stop) if self.limits else 0
        return all(needed <= self.limits.get(rank, needed) for rank in ranks)

    def too_much(self, layout: Layout) -> tuple[int, Stage, int] | None:
        """A rank that lacks the most memory, its stage, and what it would need; None if all have enough."""
        lacking = [
            (needed - self.limits[rank], rank, stage, needed)
            for stage in layout.stages
            for needed in (self.needed(stage.ranks, stage.start, stage.stop),)
            for rank in stage.ranks
            if needed > self.limits.get(rank, needed)
        ]
        return max(lacking, key=lambda item: (item[0], -item[1]))[1:] if lacking else None

    def lacking(self, layout: Layout) -> str:
        """Which rank lacks memory in a layout, and how much, as an error text; empty if none does."""
        found = self.too_much(layout)
        if found is None:
            return ""
        rank, stage, needed = found
        layers = (
            f"layer {stage.start}" if stage.stop == stage.start + 1 else f"layers {stage.start} to {stage.stop - 1}"
        )
        return (
            f"with {len(layout.stages)} stage(s), rank {rank} needs {_mib(needed)} for parameters, gradients and "
            f"optimizer states of {layers}, and may use {_mib(self.limits[rank])} (worker_memory)"
        )

    def fit(self, groups: Sequence[Sequence[int]], bounds: Sequence[int]) -> bool:
        """Whether every rank has the memory for its stage; `bounds`: [0, ..., layers]."""
        return all(self.fits(ranks, a, b) for ranks, (a, b) in zip(groups, pairwise(bounds), strict=True))


def layer_bytes(spec: ModelSpec) -> tuple[int, ...]:
    """The bytes of the parameters that each layer holds; a shared one counts in each."""
    totals = [0] * spec.layers
    for parameter in spec.parameters:
        for layer in parameter.layers:
            totals[layer] += parameter.elements * parameter.item_bytes
    return tuple(totals)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
