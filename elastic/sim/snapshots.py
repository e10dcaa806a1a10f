"""Simulated snapshots of a worker: slots that can be torn, and copies that overlap the next step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from everstep.elastic.protocol.events import WorkerId
from everstep.resharding.lines import Lines
from everstep.resharding.placement import Placement

from .keeper import Keeper, Slots, StoredGradient, StoredState
from .values import ShardState
from .world import Process, Steps, World


class Snapshots:
    """One worker's snapshots: the contract of `checkpointing.snapshot.Snapshots`."""

    def __init__(self, world: World, worker: WorkerId, keeper: Keeper, states: int, woken: Callable[[], None]) -> None:
        self._world = world
        self._worker = worker
        self._keeper = keeper
        self._states = states
        self._woken = woken
        self._generation = 0
        self.lines: Lines = ()
        self._home: dict[int, tuple[int, Slots]] = {}
        self._leaving: dict[int, int] = {}  # shard -> the version at which it got another owner
        self._numbers = 0
        self._registered: set[int] = set()
        self._version: dict[int, int] = {}
        self._pending: Process | None = None
        self.protected = -1

    def enter(self, generation: int, placement: Placement, lines: Lines) -> None:
        """Enter a new generation, in which records of `lines` count."""
        self._generation, self.lines = generation, lines
        self._keeper.enter(generation, placement, lines)

    def outlives(self, version: int, *, forget: bool = False) -> None:
        """All members know that `version` outlives lost nodes. `forget`: what they knew before does not count."""
        self.protected = version if forget else max(self.protected, version)

    def has(self, shard: int) -> bool:
        return shard in self._home and shard not in self._leaving

    def protect(self, shards: Iterable[int]) -> None:
        """Allocate slots for shards that have none."""
        new = {shard: Slots(self._states) for shard in shards if not self.has(shard)}
        if not new:
            return
        self._numbers += 1
        self._keeper.register(self._worker, self._numbers, new)
        self._registered.add(self._numbers)
        for shard, slots in new.items():
            self._home[shard] = (self._numbers, slots)
            self._leaving.pop(shard, None)
            self._version.pop(shard, None)

    def begin(
        self, version: int, state: Callable[[int], ShardState], shards: Iterable[int], *, protect: bool = False
    ) -> None:
        """Start copying; the states must not change before `wait` returns."""
        todo, before = [], tuple(fork for fork in self.lines if fork.generation < self._generation)
        for shard in shards:
            if self._version.get(shard) == version:  # it is written: from now on it is of this generation
                self._home[shard][1].renew(version, self._generation, before)
            else:
                todo.append(shard)
                self._version[shard] = version
        copy = self._copy(self._generation, version, state, todo, self._pending, protect=protect)
        self._pending = Process(self._world, copy)
        self._pending.start()

    def _copy(
        self,
        generation: int,
        version: int,
        state: Callable[[int], ShardState],
        shards: list[int],
        earlier: Process | None,
        *,
        protect: bool,
    ) -> Steps[None]:
        before = {shard: state(shard) for shard in shards}
        while earlier is not None and not earlier.ended:
            yield 0.001
        for shard in shards:
            slots = self._home[shard][1]
            slot = slots.free((self.protected, version - 1), self.lines)
            slots.states[slot] = None
            yield self._world.between(0.0001, 0.002)
            if state(shard) != before[shard]:
                raise AssertionError(f"shard {shard} of {self._worker} changed while version {version} was copied")
            slots.states[slot] = StoredState(version, generation, before[shard])
        self._keeper.sealed(generation, version, self.protected, protect=protect)
        self._woken()

    def wait(self) -> Steps[None]:
        """Return when everything that was begun is written."""
        while self._pending is not None and not self._pending.ended:
            yield None
        self._pending = None

    def stored(self, shard: int, version: int, lines: Lines) -> ShardState | None:
        """A shard's state at `version` from this worker's own memory; a state that is found counts as written."""
        state = self._home[shard][1].find(version, lines) if self.has(shard) else None
        if state is not None:
            self._version[shard] = version
        return state

    def kept(self, shard: int, version: int) -> tuple[ShardState | None, str | None]:
        """A shard's state at `version`, and the gradient of that step, from this worker's own memory."""
        if not self.has(shard):
            return None, None
        slots = self._home[shard][1]
        return slots.find(version, self.lines), slots.gradient(version, self.lines)

    def discard(self, shard: int, version: int | None = None) -> None:
        """A shard's state at `version` (None: any) was computed from damaged values: do not use it."""
        if self.has(shard):
            slots = self._home[shard][1]
            slots.states = [None if state and version in (None, state[0]) else state for state in slots.states]
            self._version.pop(shard, None)

    def protection(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version): the newest version that is whole at this node's keeper, twice: now and before."""
        return self._keeper.versions.complete, self._keeper.versions.before

    def open_gradient(self, shard: int, step: int) -> None:
        self._home[shard][1].gradients[step % 2] = None

    def seal_gradient(self, shard: int, step: int, gradient: str) -> None:
        self._home[shard][1].gradients[step % 2] = StoredGradient(step, self._generation, gradient)

    def leave(self, shards: Collection[int], version: int) -> None:
        """These shards have another owner from `version` on."""
        self._leaving.update((shard, version) for shard in shards if shard in self._home)

    def forget(self, *, nodes: bool = False) -> None:
        """Drop segments none of whose shards is needed here any more; `nodes`: nodes may be lost."""
        for shard in [s for s, version in self._leaving.items() if not nodes or self.protected >= version]:
            del self._leaving[shard]
            self._home.pop(shard, None)
            self._version.pop(shard, None)
        used = {number for number, _ in self._home.values()}
        for number in self._registered - used:
            del self._keeper.segments[(*self._worker, number)]
        self._registered &= used

    def kill(self) -> None:
        """The worker died: slots that are being written stay torn."""
        if self._pending is not None:
            self._pending.kill()

    def freeze(self) -> None:
        if self._pending is not None:
            self._pending.frozen = True
