"""Simulated snapshots: keepers that outlive workers, slots that tear, copies that run behind the next step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..protocol.events import WorkerId
from .values import ShardState, updated
from .world import Process, Steps, World

STALE_VERSIONS = 3


@dataclass
class Slots:
    """A shard's slots: state version v in slot v % 2, the gradient of step k in slot k % 2. None: torn or empty."""

    states: list[tuple[int, ShardState] | None] = field(default_factory=lambda: [None, None])
    gradients: list[tuple[int, str] | None] = field(default_factory=lambda: [None, None])


class Keeper:
    """A node's keeper: guards the segments of its workers."""

    def __init__(self) -> None:
        self.segments: dict[tuple[int, int, int], dict[int, Slots]] = {}  # rank, incarnation, number

    def register(self, worker: WorkerId, number: int, shards: dict[int, Slots]) -> None:
        """Guard a segment; segments of dead workers that have fallen behind are let go."""
        self.segments[(*worker, number)] = shards
        latest: dict[int, int] = {}
        for rank, incarnation, _ in self.segments:
            latest[rank] = max(latest.get(rank, 0), incarnation)
        newest = max(map(_newest, self.segments.values()), default=-1)
        for name, segment in list(self.segments.items()):
            if name[1] < latest[name[0]] and _newest(segment) <= newest - STALE_VERSIONS:
                del self.segments[name]

    def fetch(self, shards: Iterable[int], version: int) -> dict[int, ShardState]:
        """Shards at `version`, as themselves or as the version before and the gradient that leads to it."""
        found: dict[int, ShardState] = {}
        for shard in shards:
            holders = [segment[shard] for segment in self.segments.values() if shard in segment]
            for slots in holders:
                state = slots.states[version % 2]
                if state is not None and state[0] == version:
                    found[shard] = state[1]
            for slots in holders if shard not in found and version > 0 else ():
                state = slots.states[(version - 1) % 2]
                gradient = slots.gradients[(version - 1) % 2]
                if state is not None and gradient is not None and state[0] == gradient[0] == version - 1:
                    found[shard] = updated(state[1], gradient[1])
        return found


def _newest(segment: Mapping[int, Slots]) -> int:
    return max((state[0] for slots in segment.values() for state in slots.states if state is not None), default=-1)


class Snapshots:
    """One worker's snapshots: the contract of `checkpointing.snapshot.Snapshots`."""

    def __init__(self, world: World, worker: WorkerId, keeper: Keeper, woken: Callable[[], None]) -> None:
        self._world = world
        self._worker = worker
        self._keeper = keeper
        self._woken = woken
        self._home: dict[int, tuple[int, Slots]] = {}
        self._leaving: set[int] = set()
        self._numbers = 0
        self._registered: set[int] = set()
        self._version: dict[int, int] = {}
        self._pending: Process | None = None

    def has(self, shard: int) -> bool:
        return shard in self._home and shard not in self._leaving

    def protect(self, shards: Iterable[int]) -> None:
        """Make room for shards that have none."""
        new = {shard: Slots() for shard in shards if not self.has(shard)}
        if not new:
            return
        self._numbers += 1
        self._keeper.register(self._worker, self._numbers, new)
        self._registered.add(self._numbers)
        for shard, slots in new.items():
            self._home[shard] = (self._numbers, slots)
            self._leaving.discard(shard)
            self._version.pop(shard, None)

    def begin(self, version: int, state: Callable[[int], ShardState], shards: Iterable[int]) -> None:
        """Start copying; the states must not change before `wait` returns."""
        todo = [shard for shard in shards if self._version.get(shard) != version]
        for shard in todo:
            self._version[shard] = version
        self._pending = Process(self._world, self._copy(version, state, todo, self._pending))
        self._pending.start()

    def _copy(
        self, version: int, state: Callable[[int], ShardState], shards: list[int], earlier: Process | None
    ) -> Steps[None]:
        before = {shard: state(shard) for shard in shards}
        while earlier is not None and not earlier.ended:
            yield 0.001
        for shard in shards:
            slots = self._home[shard][1]
            slots.states[version % 2] = None
            yield self._world.between(0.0001, 0.002)
            if state(shard) != before[shard]:
                raise AssertionError(f"shard {shard} of {self._worker} changed while version {version} was copied")
            slots.states[version % 2] = (version, before[shard])
        self._woken()

    def wait(self) -> Steps[None]:
        """Return when everything begun is written."""
        while self._pending is not None and not self._pending.ended:
            yield None
        self._pending = None

    def open_gradient(self, shard: int, step: int) -> None:
        self._home[shard][1].gradients[step % 2] = None

    def seal_gradient(self, shard: int, step: int, gradient: str) -> None:
        self._home[shard][1].gradients[step % 2] = (step, gradient)

    def leave(self, shards: Collection[int]) -> None:
        """These have another owner now."""
        self._leaving.update(shard for shard in shards if shard in self._home)

    def forget(self) -> None:
        """Let go of segments none of whose shards is protected here any more."""
        for shard in self._leaving:
            self._home.pop(shard, None)
            self._version.pop(shard, None)
        self._leaving.clear()
        used = {number for number, _ in self._home.values()}
        for number in self._registered - used:
            del self._keeper.segments[(*self._worker, number)]
        self._registered &= used

    def kill(self) -> None:
        """The worker died: what is being written stays torn."""
        if self._pending is not None:
            self._pending.kill()

    def freeze(self) -> None:
        if self._pending is not None:
            self._pending.frozen = True
