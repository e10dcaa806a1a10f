"""What a node's snapshot keeper holds: the segments of its workers, and the parity it keeps for other nodes.

It outlives the workers. It never imports torch, and never writes to a segment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.checkpointing.memory.contents import Contents
from everstep.checkpointing.memory.segment import Entry, Segment, Stored
from everstep.resharding.lines import Lines
from everstep.resharding.placement import Placement

STALE_VERSIONS = 3  # without parity: a dead worker's segment this far behind a live one is obsolete


@dataclass(frozen=True)
class Guarded:
    """A segment and the worker that it belongs to."""

    rank: int
    incarnation: int
    segment: Segment
    connection: int = 0  # over which it was handed over


@dataclass(frozen=True)
class Generation:
    """A generation as keepers see it. `capacities`: bytes of the largest record of each stripe.

    `lines`: which records count in it.
    """

    generation: int
    placement: Placement
    addresses: dict[str, str]
    capacities: tuple[int, ...]
    lines: Lines = ()

    @property
    def line(self) -> int:
        """The generation in which this line of history began."""
        return self.lines[-1].generation if self.lines else 0


Candidate = tuple[int, list[tuple[Segment, Stored]]]
"""The version of what a keeper may answer with, and the slots that it consists of."""


def _first_sound(
    candidates: Iterable[tuple[int, Iterable[Candidate]]],
) -> tuple[list[dict[str, Any]], list[bytes], list[int]]:
    """Of each shard, the first candidate whose bytes match their checksums; and the shards of which some did not."""
    found: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    damaged: list[int] = []
    for shard, slots in candidates:
        for held, parts in slots:
            data = [segment.read(stored) for segment, stored in parts]
            sound = [blob for blob in data if blob is not None]
            if len(sound) == len(data):
                found.append({"shard": shard, "version": held, "lengths": [len(blob) for blob in sound]})
                blobs.extend(sound)
                break
            damaged.append(shard)
    return found, blobs, damaged


class VersionOver(Exception):
    """The awaited version will not arrive: the generation, or the version, is over."""


class Keeper:
    """The segments of a node, and queries of them. Thread-safe; `changed` is notified of every change."""

    def __init__(self, node: str = "") -> None:
        self.node = node
        self.contents = Contents()
        self.changed = threading.Condition()
        self.membership: Generation | None = None
        self.incidents: list[dict[str, Any]] = []  # damage found, for the workers to pass on
        self._segments: dict[tuple[int, int, int], Guarded] = {}
        self._dead: set[tuple[int, int]] = set()  # workers whose segments are released once they are no longer needed
        self._protected = -1

    def adopt(self, node: str) -> None:
        """A new agent has adopted this keeper: this is its node's name."""
        self.node = node

    # ------------------------------------------------------------ requests of workers

    def register(
        self,
        rank: int,
        incarnation: int,
        number: int,
        fd: int,
        size: int,
        entries: list[Entry],
        states: int,
        connection: int = 0,
    ) -> None:
        """Hold a segment. Releases segments of dead workers that are no longer needed."""
        segment = Segment(fd, size, entries, states)
        with self.changed:
            self._release((rank, incarnation, number))
            self._dead.discard((rank, incarnation))
            self._segments[(rank, incarnation, number)] = Guarded(rank, incarnation, segment, connection)
            self._prune()
            self.changed.notify_all()

    def drop(self, rank: int, incarnation: int, number: int) -> None:
        """Let a segment go."""
        with self.changed:
            self._release((rank, incarnation, number))

    def left(self, rank: int, incarnation: int, connection: int) -> None:
        """A worker's connection ended: it is dead, unless it has registered its segments over a newer connection."""
        with self.changed:
            guarded = [g for g in self._segments.values() if (g.rank, g.incarnation) == (rank, incarnation)]
            if all(g.connection == connection for g in guarded):
                self._dead.add((rank, incarnation))

    def enter(self, membership: Generation) -> bool:
        """Go to a newer generation; returns whether it is news."""
        with self.changed:
            if self.membership is not None and membership.generation <= self.membership.generation:
                return False
            if self.membership is not None and membership.line > self.membership.line:
                self._protected = -1  # what outlived nodes was of another line
            self.membership = membership
            self.changed.notify_all()
            return True

    def sealed(self, generation: int, protected: int) -> None:
        """A worker sealed a version of its shards; versions before `protected` are of no more use."""
        with self.changed:
            if self.membership is None or generation >= self.membership.line:
                self._protected = max(self._protected, protected)
            self._prune()
            self.changed.notify_all()

    def found_damage(self, where: str, node: str, shard: int, detail: str) -> None:
        """Keep an incident until a worker fetches it."""
        with self.changed:
            if len(self.incidents) < 1000:
                self.incidents.append({"where": where, "node": node, "shard": shard, "detail": detail})

    def take_incidents(self) -> list[dict[str, Any]]:
        """The incidents that no worker has fetched."""
        with self.changed:
            taken, self.incidents = self.incidents, []
            return taken

    def _release(self, name: tuple[int, int, int]) -> None:
        guarded = self._segments.pop(name, None)
        if guarded is not None:
            guarded.segment.close()

    def _prune(self) -> None:
        latest = {g.rank: 0 for g in self._segments.values()}
        for guarded in self._segments.values():
            latest[guarded.rank] = max(latest[guarded.rank], guarded.incarnation)
        lines = self.membership.lines if self.membership is not None else ()
        newest = max((g.segment.newest(lines) for g in self._segments.values()), default=-1)
        needed = newest - STALE_VERSIONS + 1 if self._protected < 0 else min(self._protected, newest - 1)
        for name, guarded in list(self._segments.items()):
            dead = (guarded.rank, guarded.incarnation) in self._dead or guarded.incarnation < latest[guarded.rank]
            if dead and guarded.segment.newest() < needed:
                self._release(name)

    # ------------------------------------------------------------ answers

    def fetch(
        self, shards: Sequence[int], version: int, *, replay: bool, lines: Lines = (), agreed_in: int = 0
    ) -> tuple[list[dict[str, Any]], list[bytes], list[int]]:
        """For each held shard: its state at `version`, or, with `replay`, the previous state and the gradient
        of step version - 1. Only records of `lines` count. Slots whose bytes do not match their checksum are skipped,
        and their shards listed.
        """
        with self.changed:
            return _first_sound((shard, self._candidates(shard, version, replay, lines, agreed_in)) for shard in shards)

    def gradients(
        self, shards: Sequence[int], step: int, *, lines: Lines = (), agreed_in: int = 0
    ) -> tuple[list[dict[str, Any]], list[bytes], list[int]]:
        """The same for the reduced gradients of a step, as of version `step`."""
        with self.changed:
            return _first_sound((shard, self._gradients(shard, step, lines, agreed_in)) for shard in shards)

    def _gradients(self, shard: int, step: int, lines: Lines, agreed_in: int) -> Iterator[Candidate]:
        for segment in [g.segment for g in self._segments.values() if shard in g.segment.entries]:
            gradient = segment.find_gradient(shard, step, lines, agreed_in)
            if gradient is not None:
                yield step, [(segment, gradient)]

    def _candidates(self, shard: int, version: int, replay: bool, lines: Lines, agreed_in: int) -> Iterator[Candidate]:
        holders = [g.segment for g in self._segments.values() if shard in g.segment.entries]
        for segment in holders:
            state = segment.find(shard, version, lines)
            if state is not None:
                yield version, [(segment, state)]
        for segment in holders if replay and version > 0 else ():
            state = segment.find(shard, version - 1, lines)
            gradient = segment.find_gradient(shard, version - 1, lines, agreed_in)
            if state is not None and gradient is not None:
                yield version - 1, [(segment, state), (segment, gradient)]

    def located(self, shard: int, version: int, lines: Lines = ()) -> tuple[Segment, Stored] | None:
        """The location of a shard's state at `version`. Call with `changed` held."""
        for guarded in self._segments.values():
            stored = guarded.segment.find(shard, version, lines) if shard in guarded.segment.entries else None
            if stored is not None:
                return guarded.segment, stored
        return None

    def await_shard(
        self, shard: int, version: int, generation: int, slice_s: float, lines: Lines = ()
    ) -> tuple[Segment, Stored] | None:
        """Wait until a version of a shard is sealed, for `slice_s` at most. Raises Superseded in a newer generation."""
        with self.changed:
            place = self.located(shard, version, lines)
            if place is None:
                if self.membership is not None and self.membership.generation > generation:
                    raise VersionOver
                self.changed.wait(slice_s)
                place = self.located(shard, version, lines)
            return place

    def held(self) -> dict[str, Any]:
        """How many segments and bytes are held, by rank."""
        with self.changed:
            return {
                "segments": len(self._segments),
                "bytes": sum(g.segment.size for g in self._segments.values()) + self.contents.bytes,
                "ranks": sorted({g.rank for g in self._segments.values()}),
            }
