"""Restores shards from wherever they are, in a simulated job: the contract of the product's `Keepers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from everstep.resharding.lines import Lines

from .keeper import Block, Board, Keeper
from .values import ShardState
from .world import Steps

UNREACHABLE_S = 0.2  # until a connection counts as failed


class Sources:
    """The keepers that one rank reaches, in the order in which it asks them; `on_wait` may raise to give up."""

    def __init__(
        self, board: Board, node: str, nodes: Sequence[str], on_wait: Callable[[], None], lines: Lines, agreed_in: int
    ) -> None:
        self._board = board
        self._node = node
        self._nodes = nodes
        self._on_wait = on_wait
        self._lines, self._agreed_in = lines, agreed_in
        self.unreachable: set[str] = set()

    def fetch(
        self, shards: Iterable[int], version: int, *, replay: bool, decode: bool = True
    ) -> Steps[dict[int, ShardState]]:
        """The shards that keepers hold at `version`; with `replay`, also as the version before and its gradient."""
        missing = list(shards)
        found: dict[int, ShardState] = {}
        for node in self._nodes:
            keeper = (yield from self._ask(node)) if missing else None
            if keeper is not None:
                found.update(
                    keeper.fetch(missing, version, replay=replay, lines=self._lines, agreed_in=self._agreed_in)
                )
            missing = [shard for shard in missing if shard not in found]
        if missing and decode:
            found.update((yield from self._decode(missing, version)))
        return found

    def _ask(self, node: str) -> Steps[Keeper | None]:
        if node in self.unreachable:
            return None
        yield self._board.delay()
        self._on_wait()
        keeper = self._board.reach(self._node, node)
        if keeper is None:
            yield UNREACHABLE_S
            self._on_wait()
            self.unreachable.add(node)
        return keeper

    def _decode(self, shards: Sequence[int], version: int) -> Steps[dict[int, ShardState]]:
        """What can be reconstructed from the other members of its stripe and their parity, at exactly `version`."""
        stripes: dict[tuple[tuple[int, ...], frozenset[tuple[int, ShardState]]], list[tuple[Keeper, Block]]] = {}
        for node in self._nodes:
            keeper = yield from self._ask(node)
            for block in keeper.covering(shards, version, self._lines) if keeper is not None else ():
                assert keeper is not None
                made_of = frozenset(block.members.items())  # blocks of two lines do not go together
                stripes.setdefault((block.stripe.shards, made_of), []).append((keeper, block))
        found: dict[int, ShardState] = {}
        for (members, _), described in stripes.items():
            lost = [shard for shard in members if shard in shards and shard not in found]
            if lost:
                others = [shard for shard in members if shard not in lost]
                present = yield from self.fetch(others, version, replay=False, decode=False)
                blocks = [block for keeper, block in described if keeper.up and block in keeper.blocks]
                found.update(_decoded(members, blocks, present, lost, alike=not self._board.made_up))
        return found


def _decoded(
    members: tuple[int, ...],
    blocks: Sequence[Block],
    present: dict[int, ShardState],
    lost: Iterable[int],
    *,
    alike: bool,
) -> dict[int, ShardState]:
    """The lost members of a stripe, if there is as much of it, parity included, as it has members.

    A member of which the parity was not made is unusable: it is of another line of history, or (`alike`: no shard was
    made up) a bug.
    """
    for block in blocks:
        odd = [shard for shard, state in present.items() if block.members[shard] != state]
        if odd and alike:
            raise AssertionError(f"version {block.version} of shards {odd} is not what its parity was made of")
        present = {shard: state for shard, state in present.items() if shard not in odd}
    if len(present) + len({block.row for block in blocks}) < len(members):
        return {}
    return {shard: blocks[0].members[shard] for shard in lost}
