"""A simulated rank's copies of shards that it is to own: the contract of `elastic.engine.prefetcher.Prefetcher`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from everstep.elastic.protocol.prefetching import PATIENCE_S, Copies, Copying, Wanted
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.lines import Lines
from everstep.resharding.plan import Plan

from .keeper import Board, Keeper
from .values import ShardState, updated
from .world import Process, Steps

AGAIN_S = 0.01


class Prefetcher:
    """The copies of one rank, made by a process of their own."""

    def __init__(self, board: Board, node: str, mark: Callable[[str], None]) -> None:
        self._board = board
        self._node = node
        self._mark = mark
        self._copies: Copies | None = None
        self._states: dict[int, ShardState] = {}
        self._version = 0
        self._agreed_in: dict[int, int] = {}  # step -> generation
        self._deadline_s = 0.0
        self._generation = 0
        self._process: Process | None = None
        self._nodes: Sequence[str] = ()
        self._lines: Lines = ()

    def begin(self, plan: Plan, nodes: Collection[str], rank: int, version: int) -> None:
        """Begin to copy, from these nodes, what this rank is to own by a plan."""
        self.end()
        self._generation, self._version = plan.generation, version
        self._deadline_s = self._board.world.now + PATIENCE_S
        copies = Copies(plan, rank)
        if copies.versions:
            self._copies, self._states, self._agreed_in = copies, {}, {}
            self._nodes, self._lines = sorted(nodes), plan.lines
            self._process = Process(self._board.world, self._run(copies))
            self._process.start()

    def committed(self, terms: Terms) -> None:
        """The rank is at the version after the step of `terms`."""
        self._version = terms.step + 1
        self._agreed_in[terms.step] = terms.generation
        if self._process is not None:
            self._process.poke()

    def waits(self, plan: Plan | None, rank: int) -> bool:
        """Whether this rank is not ready to enter a plan."""
        late = self._board.world.now > self._deadline_s
        return Copying(self._generation, self._copies, self._version, late).waits(plan, rank)

    def read(self, shards: Sequence[int], version: int) -> Steps[dict[int, ShardState]]:
        """The copies at `version`, and those of the version before, with the gradient that leads on."""
        copies, self._copies = self._copies, None
        if copies is not None:
            self._mark("switch")
        there = copies.versions if copies is not None else {}
        found = {shard: self._states[shard] for shard in shards if there.get(shard) == version}
        behind = [shard for shard in shards if there.get(shard) == version - 1 >= 0]
        for node in self._nodes if behind else ():
            yield self._board.delay()
            keeper = self._board.reach(self._node, node)
            if keeper is not None:
                for shard, gradient in self._gradients(keeper, behind, version - 1).items():
                    found[shard] = updated(self._states[shard], gradient)
        return found

    def end(self) -> None:
        """Drop all copies."""
        self._copies, self._states = None, {}
        if self._process is not None:
            self._process.kill()

    def _run(self, copies: Copies) -> Steps[None]:
        while self._copies is copies:
            version = self._version
            wanted = copies.wanted(version)
            if wanted is None:
                yield None
                continue
            if not wanted.gradient:
                self._mark("prefetch")
            for node in self._nodes:
                yield self._board.delay()
                keeper = self._board.reach(self._node, node)
                if keeper is not None and self._copies is copies:
                    self._read(copies, wanted, keeper)
            copies.lacked(wanted, version)
            yield AGAIN_S

    def _read(self, copies: Copies, wanted: Wanted, keeper: Keeper) -> None:
        if not wanted.gradient:
            for shard, state in keeper.fetch(wanted.shards, wanted.version, replay=False, lines=self._lines).items():
                self._states[shard] = state
                copies.read(wanted, shard)
            return
        behind = [shard for shard in wanted.shards if copies.versions[shard] == wanted.version]
        for shard, gradient in self._gradients(keeper, behind, wanted.version).items():
            self._states[shard] = updated(self._states[shard], gradient)
            copies.read(wanted, shard)

    def _gradients(self, keeper: Keeper, shards: Sequence[int], step: int) -> dict[int, str]:
        return keeper.gradients(shards, step, lines=self._lines, agreed_in=self._agreed_in[step])
