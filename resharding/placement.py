"""The placement of the erasure code's blocks: which shards form a stripe, and which nodes hold its parity.

A stripe consists of shards of different nodes, and of as many parity rows on other nodes as nodes may be lost at once.
Each of its blocks can be computed from as many others as it has shards. A row is as long as the longest of its shards:
shorter ones are padded with zeros.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from .domains import Spread, spread

DEFAULT_WIDTH = 8  # shards in a stripe: parity then takes losses / 8 of the state's bytes
MAX_BLOCKS = 255  # of a stripe: the code's field has no more elements
SIMILAR = 0.8  # shards of at least this fraction of the largest one may share a stripe
FRESH_TOLERANCE = 16  # a sixteenth of a node's mean parity may be traded for a better choice of stages
KEPT_TOLERANCE = 4  # a quarter of it may be traded for leaving stripes as they are
GROWTH = 1.5  # limit of the parity bytes relative to a new placement; beyond it, keeping stripes is not worthwhile


class Stripe(NamedTuple):
    """Shards that are coded together, and the nodes of their parity.

    `shards` are the data members in coding order; `nodes` own them, one each, all different; `parity` are the nodes
    that hold the parity rows, row 0 first, different from each other and from `nodes`.
    """

    shards: tuple[int, ...]
    nodes: tuple[str, ...]
    parity: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """All stripes of a job, immutable. A stripe's index has a meaning only within one placement.

    `width`: the largest number of shards in a stripe, 0 without stripes. `losses`: how many nodes may be lost at once,
    which is the number of parity rows of every stripe; `wanted`: how many the user asked for. `note` explains why that
    is less, or why stripes are narrower than requested; it is empty if everything is as requested.
    """

    generation: int
    width: int
    losses: int
    wanted: int
    stripes: tuple[Stripe, ...]
    note: str = ""

    @cached_property
    def _held(self) -> dict[str, tuple[tuple[int, int], ...]]:
        held: dict[str, list[tuple[int, int]]] = {}
        for index, stripe in enumerate(self.stripes):
            for row, node in enumerate(stripe.parity):
                held.setdefault(node, []).append((index, row))
        return {node: tuple(rows) for node, rows in held.items()}

    def held_by(self, node: str) -> tuple[tuple[int, int], ...]:
        """The parity that a node holds, as (index of the stripe, row)."""
        return self._held.get(node, ())

    def to_json(self) -> str:
        """A compact JSON value: every node's name is written once."""
        names = sorted({node for stripe in self.stripes for node in (*stripe.nodes, *stripe.parity)})
        number = {name: i for i, name in enumerate(names)}
        stripes = [[s.shards, [number[n] for n in s.nodes], [number[n] for n in s.parity]] for s in self.stripes]
        fields = {"generation": self.generation, "width": self.width, "losses": self.losses, "wanted": self.wanted}
        return json.dumps({**fields, "note": self.note, "nodes": names, "stripes": stripes}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Placement:
        raw: dict[str, Any] = json.loads(text)
        names = raw["nodes"]
        stripes = tuple(
            Stripe(tuple(shards), tuple(names[i] for i in nodes), tuple(names[i] for i in parity))
            for shards, nodes, parity in raw["stripes"]
        )
        return cls(raw["generation"], raw["width"], raw["losses"], raw["wanted"], stripes, raw["note"])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def place(
    owners: Sequence[str],
    sizes: Sequence[int],
    nodes: Collection[str],
    *,
    losses: int,
    width: int = 0,
    stages: Mapping[str, frozenset[int]] = MappingProxyType({}),
    domains: Mapping[str, Sequence[str]] = MappingProxyType({}),
    old: Placement | None = None,
    generation: int = 0,
) -> Placement:
    """Stripes for every shard whose owner is one of `nodes`, such that any `losses` of the nodes may be lost at once.

    `owners` and `sizes` (bytes, may be 0) are by shard; `nodes` are all live nodes, each of which may hold parity.
    `width` is the number of shards in a stripe: 1 is replication, 0 means `DEFAULT_WIDTH` or as many as the number of
    nodes allows. With too few nodes, stripes become narrower, down to replication, then `losses` becomes smaller;
    `note` says so. `stages` are those of a node's ranks; where there is a choice, a stripe's blocks are on nodes of
    different stages, so that a stage may be lost as a whole. `domains` are a node's labels (`domains.py`): where it is
    possible, no domain holds more than `losses` blocks of a stripe, so that any domain may be lost as a whole; stripes
    become narrower for it.

    Balance: let P be the parity bytes on a node. For every row of c > 0 bytes on a node u, and every node v outside its
    stripe to which domains allow it to move, P(u) - P(v) <= 2 c + mean(P) / 16; with `old` it is mean(P) / 4. (A node v
    that belongs to all the stripes whose rows u holds cannot relieve it.)

    With `old`, a stripe and its parity stay as they are, as long as its shards are on different live nodes, its rows on
    others, and domains allow it; where a stripe has lost only parity nodes, only these are replaced. Otherwise, rows
    change only as far as the balance above requires. If that takes more than `GROWTH` times the parity bytes of a new
    placement, all stripes are made again.

    Deterministic, and independent of the order of `nodes`. Raises ValueError for invalid arguments.
    """
    _check(owners, sizes, nodes, losses, width)
    live = tuple(sorted(nodes))
    achieved = min(losses, len(live) - 1)
    if achieved < 1:
        return Placement(generation, 0, 0, losses, (), f"nothing is protected: {len(live)} node(s) cannot lose any")
    room = max(1, min(width or DEFAULT_WIDTH, len(live) - achieved))
    respected = spread(live, domains, achieved, room)
    used = respected.width
    world = _World(owners, sizes, live, achieved, used, stages, respected)
    best = _anew(world)
    if old is not None:
        kept = _continued(world, old)
        if kept.total_bytes <= GROWTH * best.total_bytes:
            best = kept
    stripes = tuple(best.stripes())
    widest = max((len(stripe.shards) for stripe in stripes), default=0)
    note = _note(len(live), losses, width, achieved, room, respected)
    return Placement(generation, widest, achieved, losses, stripes, note)


def _check(owners: Sequence[str], sizes: Sequence[int], nodes: Collection[str], losses: int, width: int) -> None:
    if len(owners) != len(sizes):
        raise ValueError(f"{len(owners)} owners but {len(sizes)} sizes of shards")
    if min(sizes, default=0) < 0:
        raise ValueError(f"a shard of {min(sizes)} bytes")
    if len(set(nodes)) != len(nodes):
        raise ValueError(f"a node is named twice: {sorted(nodes)}")
    if losses < 1 or width < 0 or (width or DEFAULT_WIDTH) + losses > MAX_BLOCKS:
        raise ValueError(
            f"losses={losses}, width={width}: at least 1 loss and at most {MAX_BLOCKS} blocks to a stripe are possible"
        )


def _note(nodes: int, losses: int, width: int, achieved: int, room: int, respected: Spread) -> str:
    said = []
    if achieved < losses:
        said.append(f"{nodes} nodes survive the loss of {achieved} at once, not of {losses}")
    if room < width:
        said.append(f"{nodes} nodes have room for stripes of {room} shards, not of {width}")
    if respected.width < room:
        said.append(f"stripes of {respected.width} shards instead of {room}, so that any domain may be lost as a whole")
    if respected.width == 1 and width != 1:
        said.append("every shard is copied whole")
    for kind, why in respected.impossible.items():
        said.append(f"a {kind} may not be lost as a whole: {why}")
    return "; ".join(said)


@dataclass(frozen=True)
class _World:
    """The input of a placement; `nodes` sorted, `losses` and `width` as far as they are possible."""

    owners: Sequence[str]
    sizes: Sequence[int]
    nodes: tuple[str, ...]
    losses: int
    width: int
    stages: Mapping[str, frozenset[int]]
    domains: Spread

    @cached_property
    def live(self) -> frozenset[str]:
        return frozenset(self.nodes)

    @cached_property
    def shards(self) -> tuple[int, ...]:
        return tuple(i for i, owner in enumerate(self.owners) if owner in self.live)

    @cached_property
    def window_bytes(self) -> int:
        """Bytes by which a node of better stages may exceed the emptiest one: within `FRESH_TOLERANCE` of the mean."""
        least = sum(self.sizes[i] for i in self.shards) * self.losses // self.width  # without padding and short stripes
        return least // (FRESH_TOLERANCE * len(self.nodes))

    def least_overlapping(self, nodes: Iterable[str], used: Mapping[int, int]) -> str:
        """The first of the nodes for whose stages a stripe has the fewest blocks already."""
        best, least = "", MAX_BLOCKS + 1
        for node in nodes:
            overlap = max((used.get(stage, 0) for stage in self.stages.get(node, ())), default=0)
            if overlap < least:
                best, least = node, overlap
            if not overlap:
                break
        return best


@dataclass
class _Open:
    """A stripe under construction; a parity row without a place is the empty string."""

    shards: tuple[int, ...]
    nodes: tuple[str, ...]
    parity: list[str]
    cost_bytes: int
    kept: bool  # unchanged, with all its parity

    @property
    def blocks(self) -> tuple[str, ...]:
        return (*self.nodes, *self.parity)


@dataclass
class _Draft:
    """A placement under construction: its stripes, and the nodes by the parity they hold: (bytes, rows, name)."""

    world: _World
    open: list[_Open] = field(default_factory=list)
    order: list[tuple[int, int, str]] = field(init=False)
    load: dict[str, tuple[int, int, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.order = [(0, 0, node) for node in self.world.nodes]
        self.load = {entry[2]: entry for entry in self.order}

    @property
    def total_bytes(self) -> int:
        return sum(entry[0] for entry in self.order)

    def stripes(self) -> Iterator[Stripe]:
        for stripe in self.open:
            yield Stripe(stripe.shards, stripe.nodes, tuple(stripe.parity))

    def add(self, shards: tuple[int, ...], parity: Sequence[str] = ()) -> _Open:
        """Add a stripe of these shards; `parity` are the rows that have a place already, empty strings for others."""
        rest = [""] * (self.world.losses - len(parity))
        nodes = tuple(self.world.owners[i] for i in shards)
        stripe = _Open(
            shards, nodes, [*parity, *rest], max(self.world.sizes[i] for i in shards), all(parity) and not rest
        )
        self.open.append(stripe)
        for node in parity:
            if node:
                self._account(node, stripe.cost_bytes, 1)
        return stripe

    def fill(self, stripe: _Open) -> None:
        """Place the rows that have no node: among the emptiest nodes, on those of the least crowded stages."""
        for number, holder in enumerate(stripe.parity):
            if not holder:
                emptiest = next(entry[0] for entry in self._free(stripe.blocks, len(self.order)))
                chosen = self._best(stripe, emptiest + stripe.cost_bytes + self.world.window_bytes + 1)
                stripe.parity[number] = chosen
                self._account(chosen, stripe.cost_bytes, 1)

    def even_out(self, tolerance: int) -> None:
        """Move rows until the bound that `place` promises holds. Every move reduces the sum of the squared loads."""
        allowance = self.total_bytes / (tolerance * len(self.world.nodes))
        # Move rows first that have to be computed in any case, and large ones, so that few rows move.
        order = sorted(self.open, key=lambda stripe: (stripe.kept, -stripe.cost_bytes))
        moved = True
        while moved:
            moved = False
            for stripe in order:
                for number, holder in enumerate(stripe.parity) if stripe.cost_bytes else ():
                    limit = self.load[holder][0] - 2 * stripe.cost_bytes - allowance
                    rest = (*stripe.nodes, *(node for node in stripe.parity if node != holder))
                    if self.order[0][0] >= limit or not any(self._free(rest, self._below(limit))):
                        continue
                    stripe.parity[number] = ""
                    stripe.parity[number] = chosen = self._best(stripe, limit)
                    self._account(holder, -stripe.cost_bytes, -1)
                    self._account(chosen, stripe.cost_bytes, 1)
                    moved = True

    def _free(self, blocks: tuple[str, ...], count: int) -> Iterator[tuple[int, int, str]]:
        """Of the `count` emptiest nodes, those on which a stripe with these blocks may have one more."""
        domains, full = self.world.domains, self.world.domains.full(blocks)
        return (e for e in islice(self.order, count) if e[2] not in blocks and domains.admits(e[2], full))

    def _below(self, limit: float) -> int:
        return bisect_left(self.order, limit, key=lambda entry: entry[0])

    def _best(self, stripe: _Open, limit: float) -> str:
        """The node outside the stripe, with fewer than `limit` bytes, that overlaps least; the emptiest of them."""
        stages = self.world.stages
        used = Counter(s for node in stripe.blocks for s in stages.get(node, ())) if stages else {}
        free = self._free(stripe.blocks, self._below(limit))
        return self.world.least_overlapping((entry[2] for entry in free), used)

    def _account(self, node: str, size: int, rows: int) -> None:
        entry = self.load[node]
        del self.order[bisect_left(self.order, entry)]
        self.load[node] = (entry[0] + size, entry[1] + rows, node)
        insort(self.order, self.load[node])


def _anew(world: _World) -> _Draft:
    draft = _Draft(world)
    for shards in _groups(draft, world.shards):
        draft.fill(draft.add(shards))
    draft.even_out(FRESH_TOLERANCE)
    return draft


def _continued(world: _World, old: Placement) -> _Draft:
    draft = _Draft(world)
    placed: set[int] = set()
    for stripe in old.stripes:
        if _sound(world, stripe):
            members = {world.owners[i] for i in stripe.shards}
            parity: list[str] = []
            for node in stripe.parity[: world.losses]:
                blocks = (*members, *parity)
                free = node not in blocks and world.domains.admits(node, world.domains.full(blocks))
                stays = node in world.live and free
                parity.append(node if stays else "")
            draft.add(stripe.shards, parity)
            placed.update(stripe.shards)
    for unfinished in draft.open:
        draft.fill(unfinished)
    for shards in _groups(draft, [i for i in world.shards if i not in placed]):
        draft.fill(draft.add(shards))
    draft.even_out(KEPT_TOLERANCE)
    return draft


def _sound(world: _World, stripe: Stripe) -> bool:
    """Whether the stripe's shards may stay together."""
    if len(stripe.shards) > world.width or max(stripe.shards) >= len(world.owners):
        return False
    nodes = {world.owners[i] for i in stripe.shards}
    together = all(world.domains.admits(node, world.domains.full(nodes - {node})) for node in nodes)
    return len(nodes) == len(stripe.shards) and nodes <= world.live and together


def _groups(draft: _Draft, shards: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Group shards of different nodes and similar sizes, large ones first, into full stripes as far as possible.

    The rest of one size joins the next smaller one: a place in a stripe whose parity exists anyway costs nothing.
    """
    sizes, width = draft.world.sizes, draft.world.width
    pool: dict[str, deque[int]] = {}
    largest = -1.0
    for shard in sorted(shards, key=lambda i: (-sizes[i], i)):
        if sizes[shard] < SIMILAR * largest:
            while len(pool) >= width:
                yield _take(draft, pool)
            largest = -1.0
        largest = max(largest, sizes[shard])
        pool.setdefault(draft.world.owners[shard], deque()).append(shard)
    while pool:
        yield _take(draft, pool)


def _take(draft: _Draft, pool: dict[str, deque[int]]) -> tuple[int, ...]:
    """The next stripe's shards, chosen so that as few stripes as possible cover the whole pool.

    At least `rounds` stripes are necessary: nodes with that many shards have to be in each of them, and of a domain as
    many nodes as its other shards do not fit into the other stripes; the rest may be chosen by their stages. Among
    equals, nodes with many remaining shards and much parity come first: a node outside the stripe will hold its parity.
    """
    world, width = draft.world, draft.world.width
    domains = world.domains
    counts = {node: len(shards) for node, shards in pool.items()}
    crowds = Counter({label: 0 for node in pool for label in domains.labels.get(node, ())})
    for node, count in counts.items():
        crowds.update(dict.fromkeys(domains.labels.get(node, ()), count))
    rounds = max(-(-sum(counts.values()) // width), *counts.values(), *(-(-n // domains.most) for n in crowds.values()))
    candidates = sorted(pool, key=lambda node: (-counts[node], -draft.load[node][0], node))
    chosen: list[str] = [node for node in candidates if counts[node] == rounds]
    free = [node for node in candidates if counts[node] < rounds]
    used: Counter[int] = Counter(s for node in chosen for s in world.stages.get(node, ()))

    def choose(among: Sequence[str], most: int) -> None:
        """Choose nodes while there are fewer than `most` of them."""
        while len(chosen) < most:
            full = domains.full(chosen)
            allowed = (node for node in among if node not in chosen and domains.admits(node, full))
            node = world.least_overlapping(allowed, used)
            if not node:
                break
            chosen.append(node)
            used.update(world.stages.get(node, ()))

    for label in sorted(crowds, key=lambda label: (crowds[label], label)):  # inner domains before those around them
        lacking = crowds[label] - domains.most * (rounds - 1)
        if lacking > 0:
            lacking -= sum(label in domains.labels.get(node, ()) for node in chosen)
            choose([node for node in free if label in domains.labels.get(node, ())], len(chosen) + lacking)
    choose(free, width)
    taken = tuple(pool[node].popleft() for node in chosen)
    for node in chosen:
        if not pool[node]:
            del pool[node]
    return taken
