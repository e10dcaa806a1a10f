"""A layout: which rank holds which layers, computes which micro-batches and owns which shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .index import LayoutIndex
from .units import ModelSpec
from .work import AssignedLeg, Work

MUCH_MORE = 1.2  # times the layers and micro-batches that another stage has for each rank


class LayoutError(ValueError):
    """A layout that violates one of its own rules."""


class Block(NamedTuple):
    """A contiguous range of micro-batches [start, stop) computed by one rank."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stage:
    """A contiguous range of layers [start, stop), the ranks that hold it, and their micro-batches."""

    start: int
    stop: int
    ranks: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.stop


def _layers_to_do(stage: Stage) -> int:
    """Layers times micro-batches in a step, of the rank of a stage that has most of them."""
    return (stage.stop - stage.start) * max((block.stop - block.start for block in stage.blocks), default=0)


@dataclass(frozen=True)
class Layout:
    """The three maps, immutable. `home` is the layout of stages the job was started with, to which it returns."""

    generation: int
    micro_batches: int
    stages: tuple[Stage, ...]
    owners: tuple[int, ...]  # shard index -> rank
    home: tuple[Stage, ...]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(rank for stage in self.stages for rank in stage.ranks))

    @cached_property
    def _stage_of_rank(self) -> dict[int, Stage]:
        return {rank: stage for stage in self.stages for rank in stage.ranks}

    @cached_property
    def _stage_of_layer(self) -> dict[int, Stage]:
        return {layer: stage for stage in self.stages for layer in range(stage.start, stage.stop)}

    def __contains__(self, rank: int) -> bool:
        return rank in self._stage_of_rank

    def stage_of(self, rank: int) -> Stage:
        """The stage of a rank. Raises LayoutError if it is no member."""
        if rank not in self._stage_of_rank:
            raise LayoutError(f"rank {rank} is not in the layout of generation {self.generation}")
        return self._stage_of_rank[rank]

    def holders(self, layer: int) -> tuple[int, ...]:
        """The ranks that hold a layer."""
        if layer not in self._stage_of_layer:
            raise LayoutError(f"no stage holds layer {layer}")
        return self._stage_of_layer[layer].ranks

    def index(self, spec: ModelSpec) -> LayoutIndex:
        """The tables of shards, owners and readers: built once for a model, in O(shards + ranks)."""
        known: LayoutIndex | None = self.__dict__.get("_index")
        if known is None or known.spec is not spec:
            known = self.__dict__["_index"] = LayoutIndex(self, spec)
        return known

    @cached_property
    def work(self) -> Work:
        """The work of an undisturbed step."""
        return Work(self.segments(), order=self.order)

    @cached_property
    def order(self) -> Mapping[int, int]:
        """The order in which every rank takes micro-batches: micro-batch -> its place in it.

        Ranks of one stage take theirs in step with each other: of the stage that has the most. So a stage that has
        fewer gets input from all of them all the time; by number, it would first take all that one of them sends, while
        the others wait. Where another stage has much more to do, as after a loss, and several ranks for it, all others
        wait for these: then it is that one.
        """
        leading = max(self.stages, key=lambda stage: (len(stage.blocks), _layers_to_do(stage)))
        busiest = max(self.stages, key=lambda stage: (_layers_to_do(stage), len(stage.blocks)))
        if len(busiest.blocks) > 1 and _layers_to_do(busiest) > MUCH_MORE * _layers_to_do(leading):
            leading = busiest
        passed = {
            micro_batch: (micro_batch - block.start + 0.5) / (block.stop - block.start)
            for block in leading.blocks
            for micro_batch in range(block.start, block.stop)
        }
        return {micro_batch: place for place, micro_batch in enumerate(sorted(passed, key=lambda m: (passed[m], m)))}

    def segments(self) -> tuple[AssignedLeg, ...]:
        """The work of an undisturbed step, in the form of plans."""
        return tuple(
            AssignedLeg(block.rank, micro_batch, stage.start, stage.stop)
            for stage in self.stages
            for block in stage.blocks
            for micro_batch in range(block.start, block.stop)
        )

    def validate(self, spec: ModelSpec) -> None:
        """Raise LayoutError unless every layer, micro-batch and shard has exactly the places that it should have."""
        for problem in self._problems(spec):
            raise LayoutError(f"layout of generation {self.generation}: {problem}")

    def _problems(self, spec: ModelSpec) -> Iterator[str]:
        bounds = [0, *(stage.stop for stage in self.stages)]
        if [stage.start for stage in self.stages] != bounds[:-1] or bounds[-1] != spec.layers:
            yield f"the stages {[(s.start, s.stop) for s in self.stages]} do not cover {spec.layers} layers in order"
        if len(set(self.ranks)) != sum(len(stage.ranks) for stage in self.stages):
            yield "a rank stands in two stages"
        for stage in self.stages:
            if stage.start >= stage.stop or not stage.ranks:
                yield f"an empty stage: {stage}"
            covered = [m for block in stage.blocks for m in range(block.start, block.stop)]
            if covered != list(range(self.micro_batches)):
                yield f"stage {stage.start}-{stage.stop} does not compute every micro-batch exactly once: {covered}"
            if not {block.rank for block in stage.blocks} <= set(stage.ranks):
                yield f"stage {stage.start}-{stage.stop} gives micro-batches to ranks it does not have"
        if len(self.owners) != len(spec.shards):
            yield f"{len(self.owners)} owners for {len(spec.shards)} shards"
        holders = {layer: frozenset(stage.ranks) for layer, stage in self._stage_of_layer.items()}
        for shard, owner in zip(spec.shards, self.owners, strict=False):
            if owner not in holders.get(spec.home(shard), ()):
                yield f"shard {shard.index} is owned by rank {owner}, which does not hold its layer"

    def describe(self) -> str:
        """The stages with their ranks, on one line."""
        return " | ".join(f"layers {s.start}-{s.stop - 1}: ranks {','.join(map(str, s.ranks))}" for s in self.stages)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        raw: dict[str, Any] = json.loads(text)
        return cls(
            raw["generation"],
            raw["micro_batches"],
            tuple(_stage(s) for s in raw["stages"]),
            tuple(raw["owners"]),
            tuple(_stage(s) for s in raw["home"]),
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _stage(raw: dict[str, Any]) -> Stage:
    return Stage(raw["start"], raw["stop"], tuple(raw["ranks"]), tuple(Block(*b) for b in raw["blocks"]))
