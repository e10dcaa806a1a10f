"""Moves: which ranks need which shards, and where each shard may be read.

A lost shard, a rank that joins, a stage that takes over its neighbour's layers, a checkpoint to resume from: these
cases differ only in their moves and in the sources of the moves.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .layout import Layout
from .units import ModelSpec


class What(enum.Enum):
    """The purpose for which a rank needs a shard."""

    OWN = "own"  # to own it: its values and the optimizer's state
    VALUE = "value"  # to compute with it: its values alone
    BACKUP = "backup"  # to keep a passive copy of values and state, updated in the same way as its owner's


class SourceKind(enum.Enum):
    """A place from which a shard may be read."""

    PREFETCHED = "prefetched"  # the copy that the rank has made while it trained
    MEMORY = "memory"  # the rank's own snapshots
    KEEPER = "keeper"  # a node's keeper holds it
    REPLAY = "replay"  # a keeper holds it, or the version before it and the gradient of its step
    PARITY = "parity"  # the other shards of its stripe, and their parity
    STORAGE = "storage"  # the plan's checkpoint
    NEIGHBORS = "neighbors"  # an approximation from the shards of the neighbouring layers: lossy
    PEER = "peer"  # its owner's live values


class Move(NamedTuple):
    """A shard that the ranks `to` lack. `sources`: the best one first; the next is asked for what that one lacks.

    The owner of a shard may itself lack its value: it has the value once its own move is done.
    """

    shard: int
    to: tuple[int, ...]
    what: What
    sources: tuple[SourceKind, ...]


PROTECTED = (SourceKind.MEMORY, SourceKind.REPLAY, SourceKind.PARITY)  # the places of what training protects
AHEAD = (SourceKind.PREFETCHED, *PROTECTED)  # the same, where the move was announced
SAVED = (SourceKind.STORAGE,)
STAND_IN = (SourceKind.NEIGHBORS,)
LIVE = (SourceKind.PEER,)


def own_moves(layout: Layout, shards: Iterable[int], sources: tuple[SourceKind, ...] = PROTECTED) -> tuple[Move, ...]:
    """The moves that bring `shards` (ascending) to their owners."""
    ranks = {rank: (rank,) for rank in layout.ranks}
    return tuple(Move(shard, ranks[layout.owners[shard]], What.OWN, sources) for shard in shards)


def value_moves(spec: ModelSpec, layout: Layout, valid: Mapping[int, range]) -> tuple[Move, ...]:
    """The moves that bring ranks the values that they compute with and lack.

    `valid`: rank -> the layers of which it has valid values. Ranks that are not in it have none. A parameter that
    several layers share moves with any of them.
    """
    lacking: list[tuple[int, ...]] = [()] * spec.layers
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal tuples are one object: they are compared by identity
    for stage in layout.stages:
        for layer in range(stage.start, stage.stop):
            ranks = tuple(rank for rank in stage.ranks if layer not in valid.get(rank, ()))
            lacking[layer] = known.setdefault(ranks, ranks)
    moves: list[Move] = []
    for shard in spec.shards:
        layers = spec.parameters[shard.parameter].layers
        ranks = lacking[layers[0]]
        if len(layers) > 1:
            ranks = tuple(sorted({rank for layer in layers for rank in lacking[layer]}))
            ranks = known.setdefault(ranks, ranks)
        if ranks:
            moves.append(Move(shard.index, ranks, What.VALUE, LIVE))
    return tuple(moves)


def ahead(moves: Iterable[Move]) -> tuple[Move, ...]:
    """The same moves, of which owners copy theirs before they are made."""
    return tuple(move._replace(sources=AHEAD) if move.what is What.OWN else move for move in moves)


def standing_in(moves: Sequence[Move], layout: Layout, shards: Collection[int]) -> tuple[Move, ...]:
    """The same moves, with `shards`, which are lost, approximated from neighbours, also on ranks that back them up."""
    gone = set(shards)
    changed = [m._replace(sources=STAND_IN) if m.what is What.OWN and m.shard in gone else m for m in moves]
    backups = [Move(shard, layout.ranks, What.BACKUP, STAND_IN) for shard in sorted(gone)]
    return (*changed, *backups)


def received(moves: Sequence[Move], rank: int) -> list[Move]:
    """The moves to one rank, in O(moves)."""
    meant: dict[int, bool] = {}
    found = []
    for move in moves:
        key = id(move.to)  # most moves share a few tuples
        if key not in meant:
            meant[key] = rank in move.to
        if meant[key]:
            found.append(move)
    return found


def to_runs(moves: Sequence[Move]) -> dict[str, Any]:
    """Moves as JSON values: runs of consecutive shards with equal moves, `[kind, first shard, how many, *ranks]`."""
    kinds: dict[tuple[What, tuple[SourceKind, ...]], int] = {}
    runs: list[list[int]] = []
    before: Move | None = None
    for move in moves:
        if before is not None and before.shard + 1 == move.shard and _alike(before, move):
            runs[-1][2] += 1
        else:
            kind = kinds.setdefault((move.what, move.sources), len(kinds))
            runs.append([kind, move.shard, 1, *move.to])
        before = move
    return {"kinds": [[what.value, [s.value for s in sources]] for what, sources in kinds], "runs": runs}


def _alike(one: Move, other: Move) -> bool:
    same = one.to is other.to or one.to == other.to
    return same and one.what is other.what and one.sources == other.sources


def from_runs(raw: Mapping[str, Any]) -> tuple[Move, ...]:
    """The moves that `to_runs` turned into JSON values."""
    kinds = [(What(what), tuple(SourceKind(name) for name in sources)) for what, sources in raw["kinds"]]
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    found: list[Move] = []
    for kind, first, count, *to in raw["runs"]:
        what, sources = kinds[kind]
        ranks = known.setdefault(tuple(to), tuple(to))
        found += [Move(shard, ranks, what, sources) for shard in range(first, first + count)]
    return tuple(found)
