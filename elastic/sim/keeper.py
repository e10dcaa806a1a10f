"""Simulated keepers: they hold segments, fetch the members of their parity blocks, and are lost with their node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from everstep.elastic.protocol.events import WorkerId
from everstep.resharding.lines import Lines, since, slot_to_write
from everstep.resharding.parity_versions import ParityVersions
from everstep.resharding.placement import Placement, Stripe

from .values import ShardState, updated
from .world import Process, Steps, World

STALE_VERSIONS = 3
RETRY_S = 0.05


class StoredState(NamedTuple):
    """A state at a version, and the generation in which it was written."""

    version: int
    generation: int
    state: ShardState


class StoredGradient(NamedTuple):
    """The gradient of a step, and the generation in which it was written."""

    step: int
    generation: int
    value: str


class Slots:
    """A shard's slots: some for states of any version, two for gradients (step k in k % 2). None: torn or empty."""

    def __init__(self, states: int) -> None:
        self.states: list[StoredState | None] = [None] * states
        self.gradients: list[StoredGradient | None] = [None, None]

    def free(self, keep: Collection[int], lines: Lines) -> int:
        """The state slot to write next; see `slot_to_write`."""
        return slot_to_write([(r.version, r.generation) if r else None for r in self.states], keep, lines)

    def _record(self, version: int, lines: Lines) -> int | None:
        """The slot of the state at a version."""
        first = since(lines, version)
        slots = enumerate(self.states)
        return next((i for i, r in slots if r is not None and r.version == version and r.generation >= first), None)

    def find(self, version: int, lines: Lines) -> ShardState | None:
        """The state at a version, of these lines."""
        slot = self._record(version, lines)
        record = self.states[slot] if slot is not None else None
        return record.state if record is not None else None

    def renew(self, version: int, generation: int, lines: Lines) -> None:
        """The state at a version counts as written in `generation`."""
        slot = self._record(version, lines)
        record = self.states[slot] if slot is not None else None
        if slot is not None and record is not None:
            self.states[slot] = record._replace(generation=generation)

    def gradient(self, step: int, lines: Lines, agreed_in: int = 0) -> str | None:
        """The gradient of a step, of the generation in which that was agreed, or newer."""
        found, first = self.gradients[step % 2], max(agreed_in, since(lines, step + 1))
        return found.value if found and found.step == step and found.generation >= first else None

    def replayed(self, version: int, lines: Lines, agreed_in: int) -> ShardState | None:
        """The state at a version, from the one before it and the gradient between."""
        before, gradient = self.find(version - 1, lines), self.gradient(version - 1, lines, agreed_in)
        return updated(before, gradient) if before and gradient else None

    def newest(self, lines: Lines = ()) -> int:
        records = [record for record in self.states if record is not None]
        return max((r.version for r in records if r.generation >= since(lines, r.version)), default=-1)


Segment = dict[int, Slots]


@dataclass
class Block:
    """One parity row of a stripe at a version: its members as they were fetched. Sealed when all are present."""

    version: int
    stripe: Stripe
    row: int
    since: int  # all its members are of this generation or newer
    members: dict[int, ShardState] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        return len(self.members) == len(self.stripe.shards)


class Board:
    """All keepers of a job, by node; wakes the waiting processes when one of them has news."""

    def __init__(self, world: World, delay_s: tuple[float, float]) -> None:
        self.world = world
        self.delay_s = delay_s
        self.keepers: dict[str, Keeper] = {}
        self.made_up = False  # shards were approximated, so parity may be of earlier values
        self.on_protect: Callable[[str, int], None] = lambda node, version: None
        self._processes: list[Process] = []

    def add(self, node: str) -> None:
        self.keepers[node] = Keeper(self, node)

    def reach(self, source: str, node: str) -> Keeper | None:
        """A node's keeper as seen from another node; None if it cannot be reached."""
        keeper = self.keepers[node]
        open_way = keeper.up and (source == node or not (keeper.cut_off or self.keepers[source].cut_off))
        return keeper if open_way else None

    def run(self, keeper: Keeper, steps: Steps[None]) -> Process:
        """Start a process that is woken by every news; it ends with the keeper."""
        self._processes = [process for process in self._processes if process.alive and not process.ended]
        process = Process(self.world, steps)
        self._processes.append(process)
        keeper.processes.append(process)
        process.start()
        return process

    def changed(self) -> None:
        """Wake all that wait for news of a keeper."""
        for process in self._processes:
            process.poke()

    def delay(self) -> float:
        """The time that it takes to fetch a shard from another keeper."""
        return self.world.between(*self.delay_s)


class Keeper:
    """A node's keeper: the contract of `checkpointing.keeper.Keeper` and `checkpointing.protector.Protector`."""

    def __init__(self, board: Board, node: str) -> None:
        self.node = node
        self.up = True
        self.cut_off = False  # it runs, but no other node reaches it
        self.generation = 0
        self.placement: Placement | None = None
        self.lines: Lines = ()
        self.segments: dict[tuple[int, int, int], Segment] = {}  # rank, incarnation, number
        self.blocks: list[Block] = []
        self.versions = ParityVersions()
        self.processes: list[Process] = []
        self._board = board
        self._protected = -1
        board.run(self, self._protect())

    def go_down(self) -> None:
        """The node is lost."""
        self.up = False
        for process in self.processes:
            process.kill()
        self._board.changed()

    # ------------------------------------------------------------ what workers say

    def register(self, worker: WorkerId, number: int, segment: Segment) -> None:
        """Hold a segment; segments of dead workers that no rank needs any more are dropped."""
        self.segments[(*worker, number)] = segment
        self._prune()

    @property
    def _line(self) -> int:
        return self.lines[-1].generation if self.lines else 0

    def enter(self, generation: int, placement: Placement, lines: Lines) -> None:
        """Enter a newer generation: what the last one was waiting for is requested again."""
        if generation > self.generation:
            line = self._line
            self.generation, self.placement, self.lines = generation, placement, lines
            self.versions.enter(generation, self._line)
            if self._line > line:  # what outlived nodes was of another line
                self._protected = -1
            self._board.changed()

    def sealed(self, generation: int, version: int, protected: int, *, protect: bool) -> None:
        """A worker of this node sealed a version of its shards; `protect`: it is to survive the loss of nodes."""
        if generation >= self._line:
            self._protected = max(self._protected, protected)
        self._prune()
        if protect and generation == self.generation:
            self.versions.want(version, protected)
        self._board.changed()

    def _prune(self) -> None:
        latest: dict[int, int] = {}
        for rank, incarnation, _ in self.segments:
            latest[rank] = max(latest.get(rank, 0), incarnation)
        newest = max((_newest(segment, self.lines) for segment in self.segments.values()), default=-1)
        needed = newest - STALE_VERSIONS + 1 if self._protected < 0 else min(self._protected, newest - 1)
        for name, segment in list(self.segments.items()):
            if name[1] < latest[name[0]] and _newest(segment) < needed:
                del self.segments[name]

    # ------------------------------------------------------------ answers

    def fetch(
        self, shards: Iterable[int], version: int, *, replay: bool, lines: Lines = (), agreed_in: int = 0
    ) -> dict[int, ShardState]:
        """Shards at `version`; with `replay`, also as the version before and the gradient of its step.

        Only records of `lines` count.
        """
        found: dict[int, ShardState] = {}
        for shard in shards:
            holders = [segment[shard] for segment in self.segments.values() if shard in segment]
            states = [slots.find(version, lines) for slots in holders]
            states += [slots.replayed(version, lines, agreed_in) for slots in holders] if replay and version > 0 else []
            state = next((state for state in states if state is not None), None)
            if state is not None:
                found[shard] = state
        return found

    def gradients(self, shards: Iterable[int], step: int, *, lines: Lines = (), agreed_in: int = 0) -> dict[int, str]:
        """The reduced gradients of a step."""
        found: dict[int, str] = {}
        for shard in shards:
            held = [s[shard].gradient(step, lines, agreed_in) for s in self.segments.values() if shard in s]
            gradient = next((value for value in held if value is not None), None)
            if gradient is not None:
                found[shard] = gradient
        return found

    def covering(self, shards: Collection[int], version: int, lines: Lines) -> list[Block]:
        """The sealed blocks at a version that have any of these shards as a member, and are of these lines."""
        first, wanted = since(lines, version), set(shards)
        blocks = [b for b in self.blocks if b.version == version and b.sealed and b.since >= first]
        return [block for block in blocks if wanted & set(block.stripe.shards)]

    def located(self, shard: int, version: int, lines: Lines) -> ShardState | None:
        return self.fetch([shard], version, replay=False, lines=lines).get(shard)

    # ------------------------------------------------------------ the parity held here

    def _protect(self) -> Steps[None]:
        while True:
            while not self.versions.wanted:
                yield None
            generation, placement, lines, version = self.generation, self.placement, self.lines, self.versions.wanted[0]
            assert placement is not None
            kept = self.versions.kept()
            self.blocks = [block for block in self.blocks if block.version in kept]
            self._board.on_protect(self.node, version)
            yield 0.0
            whole = (yield from self._encode(placement, generation, version, lines)) and (
                yield from self._await_own(placement, generation, version, lines)
            )
            if self.versions.done(generation, version, whole=whole):
                self._board.changed()

    def _given_up(self, generation: int) -> bool:
        return self.versions.is_over(generation)

    def _open(self, version: int, stripe: Stripe, row: int, first: int) -> Block:
        for block in self.blocks:
            same = block.stripe.shards == stripe.shards and len(block.stripe.parity) == len(stripe.parity)
            if block.version == version and block.row == row and same and block.since >= first:
                return block
        self.blocks.append(Block(version, stripe, row, first))
        return self.blocks[-1]

    def _encode(self, placement: Placement, generation: int, version: int, lines: Lines) -> Steps[bool]:
        """Bring the blocks of this node to `version`; whether all are sealed."""
        held = [(placement.stripes[number], row) for number, row in placement.held_by(self.node)]
        blocks = [(stripe, self._open(version, stripe, row, since(lines, version))) for stripe, row in held]
        by_node: dict[str, list[tuple[Block, int]]] = {}
        for stripe, block in blocks:
            for shard, node in zip(stripe.shards, stripe.nodes, strict=True):
                if shard not in block.members:
                    by_node.setdefault(node, []).append((block, shard))
        pulls = [
            self._board.run(self, self._pull(generation, version, lines, node, pieces))
            for node, pieces in by_node.items()
        ]
        while not all(pull.ended for pull in pulls):
            yield None
        return all(block.sealed for _, block in blocks)

    def _pull(
        self, generation: int, version: int, lines: Lines, node: str, pieces: list[tuple[Block, int]]
    ) -> Steps[None]:
        for block, shard in pieces:
            yield self._board.delay()
            while (source := self._board.reach(self.node, node)) is None or not source.located(shard, version, lines):
                if self._given_up(generation) or (source is not None and source.generation > generation):
                    self._ended()
                    return
                yield RETRY_S if source is None else None
            state = source.located(shard, version, lines)
            assert state is not None
            block.members[shard] = state
        self._ended()

    def _ended(self) -> None:
        self._board.world.after(0.0, self._board.changed)

    def _await_own(self, placement: Placement, generation: int, version: int, lines: Lines) -> Steps[bool]:
        own = [shard for stripe in placement.stripes for shard in self._of_ours(stripe)]
        while not self._given_up(generation):
            if all(self.located(shard, version, lines) for shard in own):
                return True
            yield None
        return False

    def _of_ours(self, stripe: Stripe) -> Iterator[int]:
        return (shard for shard, node in zip(stripe.shards, stripe.nodes, strict=True) if node == self.node)


def _newest(segment: Segment, lines: Lines = ()) -> int:
    return max((slots.newest(lines) for slots in segment.values()), default=-1)


def sources_first(nodes: Iterable[str], own: str) -> list[str]:
    """Nodes in the order in which they are asked: this rank's own first."""
    return sorted(nodes, key=functools.partial(str.__ne__, own))
