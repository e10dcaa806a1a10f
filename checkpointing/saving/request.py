"""What a writer asks its keeper to save. The keeper imports this, and none of what writes checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from everstep.resharding.lines import Lines, lines_of


class Parameter(NamedTuple):
    """A parameter as chunks: `room` is "params" or "buffers"; `rows`: of a chunk."""

    name: str
    room: str
    shape: tuple[int, ...]
    rows: int


class ShardPiece(NamedTuple):
    """A shard: which chunk of which parameter it is."""

    shard: int
    parameter: int
    chunk: int
    elements: int


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """What one writer is to save.

    `manifest`: all but the arrays, equal for all writers. `keep`, `keep_s`: how many checkpoints are retained at least,
    and for how long.
    """

    url: str
    options: Mapping[str, Any]
    name: str
    writer: str
    writers: int  # how many there are
    version: int
    parameters: tuple[Parameter, ...]
    pieces: tuple[ShardPiece, ...]
    expected: tuple[str, ...]  # paths of all arrays that the checkpoint must have, of all writers
    manifest: Mapping[str, Any]
    keep: int
    keep_s: float
    lines: Lines = ()  # which records count

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> SaveRequest:
        raw: dict[str, Any] = json.loads(text)
        raw["parameters"] = tuple(Parameter(p[0], p[1], tuple(p[2]), p[3]) for p in raw["parameters"])
        raw["pieces"] = tuple(ShardPiece(*piece) for piece in raw["pieces"])
        raw["expected"] = tuple(raw["expected"])
        raw["lines"] = lines_of(raw["lines"])
        return cls(**raw)
