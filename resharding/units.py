"""The units that a layout places: layers, micro-batches and shards, as described by a `ModelSpec`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

MAX_SHARD_BYTES = 4 << 20
MIN_SHARD_BYTES = 64 << 10
SHARDS_PER_LAYER = 8  # a layer is cut into at least about this many shards, for an even distribution


@dataclass(frozen=True)
class ParameterSpec:
    """A trainable parameter: its name in the user's model, and the layers that hold it (several when tied)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    item_bytes: int
    layers: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


class Shard(NamedTuple):
    """A block of rows of one parameter; `start` and `stop` count elements in row-major order."""

    index: int  # type: ignore[assignment]  # not tuple.index
    parameter: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ModelSpec:
    """The description of a model for planners. Equal on every rank, or the job does not start.

    `costs` are relative costs of the layers (any unit); `whole` forbids cutting parameters (the optimizer is not
    element-wise).
    """

    costs: tuple[float, ...]
    parameters: tuple[ParameterSpec, ...]
    whole: bool = False

    @property
    def layers(self) -> int:
        return len(self.costs)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Every shard, in canonical order: by parameter, then by row. A function of the model alone."""
        shards: list[Shard] = []
        for index, parameter in enumerate(self.parameters):
            for start, stop in self._cuts(parameter):
                shards.append(Shard(len(shards), index, start, stop))
        return tuple(shards)

    @cached_property
    def shards_of_layer(self) -> tuple[tuple[Shard, ...], ...]:
        """For each layer, the shards of the parameters it holds, in canonical order."""
        found: list[list[Shard]] = [[] for _ in range(self.layers)]
        for shard in self.shards:
            for layer in self.parameters[shard.parameter].layers:
                found[layer].append(shard)
        return tuple(map(tuple, found))

    @cached_property
    def _layer_bytes(self) -> tuple[int, ...]:
        totals = [0] * self.layers
        for parameter in self.parameters:
            totals[parameter.layers[0]] += parameter.elements * parameter.item_bytes
        return tuple(totals)

    def _cuts(self, parameter: ParameterSpec) -> Iterable[tuple[int, int]]:
        if self.whole or parameter.elements == 0:
            return [(0, parameter.elements)]
        row = parameter.elements // parameter.rows
        share = self._layer_bytes[parameter.layers[0]] // SHARDS_PER_LAYER
        limit = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, share))
        rows = max(1, limit // (row * parameter.item_bytes))
        pieces = math.ceil(parameter.rows / rows)
        even = math.ceil(parameter.rows / pieces)  # all equal but the last: a shard is a chunk of a checkpoint's array
        bounds = [*range(0, parameter.rows, even), parameter.rows]
        return [(first * row, last * row) for first, last in itertools.pairwise(bounds)]

    def home(self, shard: Shard) -> int:
        """The layer by which a shard is assigned: the first one that holds its parameter."""
        return self.parameters[shard.parameter].layers[0]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        raw: dict[str, Any] = json.loads(text)
        parameters = tuple(
            ParameterSpec(p["name"], tuple(p["shape"]), p["dtype"], p["item_bytes"], tuple(p["layers"]))
            for p in raw["parameters"]
        )
        return cls(tuple(raw["costs"]), parameters, raw["whole"])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
