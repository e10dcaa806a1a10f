"""Placements of stripes against brute force: what a loss leaves, what a change changes, and who holds how much."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.placement import (
    FRESH_TOLERANCE,
    GROWTH,
    KEPT_TOLERANCE,
    Placement,
    Stripe,
    place,
)

BRUTE_FORCE = 2000  # so many combinations of lost nodes are tried one by one, of more a sample


@dataclass(frozen=True)
class World:
    """What a placement is asked for."""

    owners: tuple[str, ...]
    sizes: tuple[int, ...]
    nodes: tuple[str, ...]
    stages: dict[str, frozenset[int]]
    losses: int
    width: int

    def place(self, old: Placement | None = None, generation: int = 1) -> Placement:
        return place(
            self.owners,
            self.sizes,
            self.nodes,
            losses=self.losses,
            width=self.width,
            stages=self.stages,
            old=old,
            generation=generation,
        )


def names(count: int) -> tuple[str, ...]:
    return tuple(f"node-{i:02}" for i in range(count))


@st.composite
def worlds(draw, max_nodes: int = 64) -> World:
    """Nodes that own shards evenly or not, of sizes that are alike or not; some shards have no live owner."""
    nodes = names(draw(st.one_of(st.integers(2, min(9, max_nodes)), st.integers(2, max_nodes))))
    count = draw(st.integers(0, 80))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    if draw(st.booleans()):
        owners = [nodes[i % len(nodes)] for i in range(count)]
    else:
        some = rng.sample(nodes, rng.randint(1, len(nodes)))
        owners = [rng.choice([*some, "dead"]) for _ in range(count)]
    kind = draw(st.sampled_from(["equal", "classes", "wild"]))
    pick = {"equal": lambda: 4096, "classes": lambda: rng.choice([0, 12, 4096]), "wild": lambda: rng.randrange(1 << 20)}
    sizes = [pick[kind]() for _ in owners]
    stages = draw(st.integers(0, 4))
    homes = {node: frozenset({i * stages // len(nodes), rng.randrange(max(1, stages))}) for i, node in enumerate(nodes)}
    losses, width = draw(st.integers(1, 4)), draw(st.sampled_from([0, 0, 1, 2, 3, 8]))
    return World(tuple(owners), tuple(sizes), nodes, homes if stages else {}, losses, width)


@st.composite
def changes(draw) -> tuple[World, World]:
    """A world, and the same after nodes were lost or joined, and what the lost ones owned has other owners."""
    old = draw(worlds(24))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    gone = set(rng.sample(old.nodes, draw(st.integers(0, min(3, len(old.nodes) - 1)))))
    joined = tuple(f"node-{50 + i}" for i in range(draw(st.integers(0, 3))))
    nodes = (*(node for node in old.nodes if node not in gone), *joined)
    moves = draw(st.sampled_from([0.0, 0.05]))  # besides those of the lost nodes
    owners = tuple(rng.choice(nodes) if o in gone or rng.random() < moves else o for o in old.owners)
    return old, replace(old, nodes=nodes, owners=owners)


# ---------------------------------------------------------------- what every placement promises


def loads(stripes: Sequence[Stripe], sizes: Sequence[int], nodes: Collection[str]) -> dict[str, int]:
    held = dict.fromkeys(nodes, 0)
    for stripe in stripes:
        for node in stripe.parity:
            held[node] += max(sizes[i] for i in stripe.shards)
    return held


def unbalanced(stripes: Sequence[Stripe], world: World, tolerance: int) -> list[tuple[Stripe, str, str]]:
    """Where the bound in the docstring of `place` is broken: a stripe's row on one node that another could take."""
    held = loads(stripes, world.sizes, world.nodes)
    allowance = sum(held.values()) / len(held) / tolerance
    return [
        (stripe, full, empty)
        for stripe in stripes
        for cost in [max(world.sizes[i] for i in stripe.shards)]
        if cost
        for full in stripe.parity
        for empty in world.nodes
        if empty not in (*stripe.nodes, *stripe.parity) and held[full] - held[empty] > 2 * cost + allowance
    ]


def check(world: World, placement: Placement, tolerance: int) -> None:
    expected = [i for i, owner in enumerate(world.owners) if owner in world.nodes]
    if len(world.nodes) > 1:
        assert sorted(i for stripe in placement.stripes for i in stripe.shards) == expected, "each exactly once"
    assert placement.losses == min(world.losses, len(world.nodes) - 1)
    for stripe in placement.stripes:
        blocks = (*stripe.nodes, *stripe.parity)
        assert len(set(blocks)) == len(blocks), f"two blocks of {stripe} on one node"
        assert set(blocks) <= set(world.nodes)
        assert stripe.nodes == tuple(world.owners[i] for i in stripe.shards)
        assert len(stripe.parity) == placement.losses
    widest = max((len(stripe.shards) for stripe in placement.stripes), default=0)
    assert placement.width == widest <= (world.width or 8)
    assert not unbalanced(placement.stripes, world, tolerance)


@given(worlds())
def test_every_shard_lies_in_one_stripe_of_different_nodes(world: World) -> None:
    check(world, world.place(), FRESH_TOLERANCE)


@given(worlds())
def test_any_loss_leaves_enough_blocks_of_every_stripe(world: World) -> None:
    placement = world.place()
    combinations = itertools.combinations(world.nodes, placement.losses)
    tried: list[Collection[str]] = list(itertools.islice(combinations, BRUTE_FORCE + 1))
    if len(tried) > BRUTE_FORCE:
        rng = random.Random(len(world.nodes))
        tried = [rng.sample(world.nodes, placement.losses) for _ in range(200)]
    for lost in map(set, tried):
        for stripe in placement.stripes:
            left = sum(node not in lost for node in (*stripe.nodes, *stripe.parity))
            assert left >= len(stripe.shards)


@given(worlds(), st.randoms())
def test_the_order_of_the_nodes_does_not_matter(world: World, rng: random.Random) -> None:
    shuffled = tuple(rng.sample(world.nodes, len(world.nodes)))
    assert replace(world, nodes=shuffled).place() == world.place()


@given(worlds())
def test_everything_survives_being_sent(world: World) -> None:
    placement = world.place(generation=7)
    again = Placement.from_json(placement.to_json())
    assert again == placement
    assert again.digest == placement.digest
    assert again.generation == 7


@given(worlds())
def test_who_holds_what(world: World) -> None:
    placement = world.place()
    held = {(index, row): node for node in world.nodes for index, row in placement.held_by(node)}
    assert held == {
        (index, row): node for index, stripe in enumerate(placement.stripes) for row, node in enumerate(stripe.parity)
    }
    assert placement.held_by("a stranger") == ()


# ---------------------------------------------------------------- how good it is where it can be good


@given(st.integers(3, 24), st.integers(1, 4), st.integers(1, 6))
def test_an_even_job_has_full_stripes_and_even_parity(nodes: int, losses: int, rounds: int) -> None:
    """Every node owns the same: the fewest possible stripes, and parity within two rows of each other."""
    losses = min(losses, nodes - 1)
    width = min(8, nodes - losses)
    count = nodes * width * rounds
    world = World(tuple(names(nodes)[i % nodes] for i in range(count)), (100,) * count, names(nodes), {}, losses, 0)
    placement = world.place()
    assert placement.note == ("" if width > 1 else "every shard is copied whole")
    assert len(placement.stripes) == nodes * rounds
    held = loads(placement.stripes, world.sizes, world.nodes).values()
    assert max(held) - min(held) <= 200


@given(worlds())
def test_equal_shards_take_no_more_stripes_than_they_must(world: World) -> None:
    world = replace(world, sizes=(64,) * len(world.sizes))
    placement = world.place()
    owned = Counter(owner for owner in world.owners if owner in world.nodes)
    if owned:
        width = max(1, min(world.width or 8, len(world.nodes) - placement.losses))
        assert len(placement.stripes) == max(-(-owned.total() // width), *owned.values())


@given(st.integers(2, 4), st.integers(1, 2), st.integers(1, 2), st.integers(1, 20))
def test_a_stage_may_be_lost_as_a_whole(per_stage: int, losses: int, width: int, rounds: int) -> None:
    """With at least as many stages as blocks to a stripe, no stripe has two blocks in one stage."""
    nodes = names(per_stage * (losses + width))
    count = len(nodes) * rounds
    stages = {node: frozenset({i // per_stage}) for i, node in enumerate(nodes)}
    owners = tuple(nodes[i % len(nodes)] for i in range(count))
    for stripe in World(owners, (4096,) * count, nodes, stages, losses, width).place().stripes:
        homes = [stage for node in (*stripe.nodes, *stripe.parity) for stage in stages[node]]
        if len(stripe.shards) == width:
            assert len(set(homes)) >= len(homes) - 1
    assert _crowded(World(owners, (4096,) * count, nodes, stages, losses, width)) <= 0.1


def _crowded(world: World) -> float:
    """The fraction of stripes with two blocks in one stage."""
    stripes = world.place().stripes
    crowded = [max(Counter(s for n in (*p.nodes, *p.parity) for s in world.stages[n]).values()) > 1 for p in stripes]
    return sum(crowded) / len(crowded)


def test_similar_shards_go_together() -> None:
    rng = random.Random(5)
    sizes = tuple(rng.choice([4 << 20, 3 << 20, 1 << 20, 5000]) for _ in range(2000))
    world = World(tuple(rng.choice(names(16)) for _ in sizes), sizes, names(16), {}, 2, 0)
    parity = sum(loads(world.place().stripes, sizes, world.nodes).values())
    assert parity <= 1.05 * sum(sizes) * 2 / 8


# ---------------------------------------------------------------- changes


@given(changes())
def test_a_changed_placement_promises_the_same(change: tuple[World, World]) -> None:
    before, after = change
    check(after, after.place(before.place()), KEPT_TOLERANCE)


@given(worlds())
def test_nothing_changes_where_nothing_happened(world: World) -> None:
    placement = world.place()
    assert world.place(placement) == placement


@given(changes())
def test_a_changed_placement_stays_as_well(change: tuple[World, World]) -> None:
    before, after = change
    placement = after.place(before.place())
    assert after.place(placement) == placement


def sound(stripe: Stripe, world: World, losses: int) -> bool:
    """The dumb rule: whether nothing that happened since forces a stripe or its parity to change."""
    blocks = (*(world.owners[i] for i in stripe.shards), *stripe.parity)
    room = len(world.nodes) - losses
    return (
        len(set(blocks)) == len(blocks) and set(blocks) <= set(world.nodes) and len(stripe.parity) == losses
    ) and len(stripe.shards) <= min(room, world.width or 8)


@given(changes())
def test_only_stripes_that_have_to_change_do(change: tuple[World, World]) -> None:
    before, after = change
    old = before.place()
    new, anew = after.place(old), after.place()
    if new == anew:
        return  # keeping would have taken too many bytes, or there was nothing to keep
    now = {stripe.shards: stripe for stripe in new.stripes}
    stay = [stripe for stripe in old.stripes if sound(stripe, after, new.losses)]
    changed = [stripe for stripe in stay if now[stripe.shards].parity != stripe.parity]
    if changed:  # for balance only: with their rows where they were it is out of bounds
        was = {stripe.shards: stripe for stripe in changed}
        undone = [s._replace(parity=was[s.shards].parity) if s.shards in was else s for s in new.stripes]
        assert unbalanced(undone, after, KEPT_TOLERANCE)


@given(changes())
def test_of_a_stripe_that_lost_parity_only_the_lost_rows_move(change: tuple[World, World]) -> None:
    before, after = change
    old = before.place()
    new = after.place(old)
    if new == after.place():
        return
    now = {stripe.shards: stripe for stripe in new.stripes}
    for stripe in old.stripes:
        owners = [after.owners[i] for i in stripe.shards]
        if len(set(owners)) == len(owners) and set(owners) <= set(after.nodes) and len(owners) <= (after.width or 8):
            fits = len(owners) <= len(after.nodes) - new.losses
            assert (stripe.shards in now) == fits


@given(changes())
def test_keeping_has_its_price(change: tuple[World, World]) -> None:
    before, after = change
    kept = sum(loads(after.place(before.place()).stripes, after.sizes, after.nodes).values())
    anew = sum(loads(after.place().stripes, after.sizes, after.nodes).values())
    assert kept <= GROWTH * anew


def test_a_lost_node_of_many_changes_little() -> None:
    nodes, count = names(32), 1600
    world = World(tuple(nodes[i % 32] for i in range(count)), (1000,) * count, nodes, {}, 2, 0)
    live = nodes[:-1]
    owners = tuple(live[i % 31] if owner == nodes[-1] else owner for i, owner in enumerate(world.owners))
    after = replace(world, owners=owners, nodes=live)
    old = world.place()
    new = after.place(old)
    kept = {(stripe.shards, stripe.parity) for stripe in new.stripes} & {(s.shards, s.parity) for s in old.stripes}
    assert len(kept) == sum(sound(stripe, after, 2) for stripe in old.stripes) > len(old.stripes) / 2


# ---------------------------------------------------------------- too few nodes, wrong arguments, speed


@pytest.mark.parametrize(
    ("nodes", "losses", "width", "achieved", "used", "note"),
    [
        (10, 2, 0, 2, 8, ""),
        (6, 2, 0, 2, 4, ""),
        (6, 2, 4, 2, 4, ""),
        (5, 2, 4, 2, 3, "5 nodes have room for stripes of 3 shards, not of 4"),
        (3, 2, 0, 2, 1, "every shard is copied whole"),
        (3, 2, 1, 2, 1, ""),
        (3, 2, 4, 2, 1, "3 nodes have room for stripes of 1 shards, not of 4; every shard is copied whole"),
        (2, 2, 0, 1, 1, "2 nodes survive the loss of 1 at once, not of 2; every shard is copied whole"),
        (1, 2, 0, 0, 0, "nothing is protected: 1 node(s) cannot lose any"),
        (0, 1, 0, 0, 0, "nothing is protected: 0 node(s) cannot lose any"),
    ],
)
def test_too_few_nodes(nodes: int, losses: int, width: int, achieved: int, used: int, note: str) -> None:
    owners = tuple(name for name in names(nodes) for _ in range(6))
    placement = place(owners, [8] * len(owners), names(nodes), losses=losses, width=width)
    assert (placement.losses, placement.wanted, placement.width, placement.note) == (achieved, losses, used, note)
    assert bool(placement.stripes) == (nodes > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [1]}, "2 owners but 1 sizes"),
        ({"sizes": [1, -1]}, "a shard of -1 bytes"),
        ({"nodes": ["a", "b", "a"]}, "named twice"),
        ({"losses": 0}, "at least 1 loss"),
        ({"width": -1}, "at least 1 loss"),
        ({"width": 254, "losses": 2}, "at most 255 blocks"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(**{"owners": ["a", "b"], "sizes": [1, 1], "nodes": ["a", "b", "c"], "losses": 1, **arguments})


def test_a_big_job_is_placed_in_no_time() -> None:
    rng = random.Random(1)
    nodes = names(64)
    stages = {node: frozenset({i // 8}) for i, node in enumerate(nodes)}
    world = World(tuple(nodes[i % 64] for i in range(5000)), tuple(rng.choices([1, 2, 3], k=5000)), nodes, stages, 2, 0)
    old = world.place()
    started = time.process_time()
    world.place(old)
    assert time.process_time() - started < 2.0  # 0.3 s on a machine with nothing else to do
