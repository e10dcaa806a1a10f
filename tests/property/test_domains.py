"""Placements that respect failure domains, against brute force: what the loss of a domain leaves, and what it costs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.domains import kind_of, spread
from everstep.resharding.placement import KEPT_TOLERANCE, Placement, Stripe, place


@dataclass(frozen=True)
class Labelled:
    """Nodes with labels, and what they own."""

    owners: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: dict[str, tuple[str, ...]]
    losses: int
    width: int

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.labels)

    @property
    def parity(self) -> int:
        """The number of rows: how many nodes may be lost at once."""
        return min(self.losses, len(self.nodes) - 1)

    def place(self, old: Placement | None = None) -> Placement:
        about = {"losses": self.losses, "width": self.width, "domains": self.labels, "old": old}
        return place(self.owners, self.sizes, self.nodes, **about)

    def domains(self) -> dict[str, set[str]]:
        """The nodes of each domain that stripes have to respect."""
        impossible = spread(self.nodes, self.labels, self.parity, 8).impossible
        found: dict[str, set[str]] = {}
        for node, labels in self.labels.items():
            for label in labels:
                if kind_of(label) not in impossible:
                    found.setdefault(label, set()).add(node)
        return found


@st.composite
def labelled(draw, max_nodes: int = 20, max_shards: int = 60) -> Labelled:
    """Nodes in racks, some without a label, and racks in zones or across them."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    racks, zones = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["none", "nested", "crossing"]))
    labels: dict[str, tuple[str, ...]] = {}
    for i in range(draw(st.integers(2, max_nodes))):
        rack = rng.randrange(racks)
        mine = [f"rack={rack}"] if rng.random() < 0.9 else []
        if zones and kind != "none":
            mine += [f"zone={(rack if kind == 'nested' else rng.randrange(9)) % zones}"]
        labels[f"node-{i:02}"] = tuple(sorted(mine))
    nodes = tuple(labels)
    count = draw(st.integers(0, max_shards))
    some = rng.sample(nodes, rng.randint(1, len(nodes)))
    owners = tuple(nodes[i % len(nodes)] if count % 2 else rng.choice(some) for i in range(count))
    sizes = tuple(rng.choice(draw(st.sampled_from([(4096,), (0, 12, 4096)]))) for _ in owners)
    return Labelled(owners, sizes, labels, draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1, 2, 4])))


@st.composite
def changes(draw) -> tuple[Labelled, Labelled]:
    """The same before and after nodes were lost, maybe a whole rack, and others joined."""
    before = draw(labelled())
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    gone = set(rng.sample(before.nodes, draw(st.integers(0, min(2, len(before.nodes) - 1)))))
    rack = draw(st.sampled_from(["", "rack=0", "rack=1"]))
    gone |= {node for node, labels in before.labels.items() if rack in labels}
    joined = {f"node-{50 + i}": (f"rack={rng.randrange(6)}",) for i in range(draw(st.integers(0, 2)))}
    labels = {**{node: mine for node, mine in before.labels.items() if node not in gone}, **joined}
    labels = labels or {"node-99": ()}
    owners = tuple(owner if owner in labels else rng.choice(list(labels)) for owner in before.owners)
    return before, replace(before, labels=labels, owners=owners)


def blocks(stripe: Stripe) -> tuple[str, ...]:
    return (*stripe.nodes, *stripe.parity)


def check(world: Labelled, placement: Placement) -> None:
    """Any so many nodes may be lost, and any one domain whose kind can be respected."""
    if len(world.nodes) < 2:
        return
    assert sorted(i for stripe in placement.stripes for i in stripe.shards) == list(range(len(world.owners)))
    for stripe in placement.stripes:
        held = blocks(stripe)
        assert len(set(held)) == len(held) == len(stripe.shards) + world.parity
        assert stripe.nodes == tuple(world.owners[i] for i in stripe.shards)
        for label, nodes in world.domains().items():
            assert len(set(held) - nodes) >= len(stripe.shards), f"{label} cannot be lost: {stripe}"


@given(labelled())
def test_any_domain_may_be_lost_as_a_whole(world: Labelled) -> None:
    check(world, world.place())


@given(changes())
def test_also_after_losses_and_joins(change: tuple[Labelled, Labelled]) -> None:
    before, after = change
    placement = after.place(before.place())
    check(after, placement)
    assert after.place(placement) == placement


@given(labelled())
def test_nothing_changes_where_nothing_happened(world: Labelled) -> None:
    placement = world.place()
    assert world.place(placement) == placement


@given(labelled(max_nodes=8, max_shards=0), st.integers(1, 8))
def test_stripes_are_as_wide_as_domains_allow(world: Labelled, width: int) -> None:
    """Against all sets of nodes that a stripe could have."""
    room = min(width, len(world.nodes) - world.parity)
    found = spread(world.nodes, world.labels, world.parity, room)

    def fits(most: int, count: int) -> bool:
        return any(
            all(len(nodes & set(chosen)) <= most for nodes in world.domains().values())
            for chosen in itertools.combinations(world.nodes, count)
        )

    possible = [k for k in range(1, room + 1) if fits(world.parity, k + world.parity)]
    assert found.width == max(possible)
    assert fits(found.most, found.width + world.parity)
    assert found.most == 1 or not fits(found.most - 1, found.width + world.parity)


@given(labelled())
def test_a_kind_is_left_out_only_for_a_reason(world: Labelled) -> None:
    found = spread(world.nodes, world.labels, world.parity, 8)
    for kind, why in found.impossible.items():
        labels = {label for mine in world.labels.values() for label in mine if kind_of(label) == kind}
        everywhere = [label for label in labels if all(label in mine for mine in world.labels.values())]
        assert why == f"all {len(world.nodes)} nodes are in {everywhere[0]}" if everywhere else "overlap" in why
    assert not (len(found.impossible) == 1 and "overlap" in str(found.impossible)) or len(found.labels)


@given(labelled())
def test_equal_shards_take_no_more_stripes_than_they_must(world: Labelled) -> None:
    world = replace(world, sizes=(64,) * len(world.sizes))
    found = spread(world.nodes, world.labels, world.parity, min(world.width or 8, len(world.nodes) - world.parity))
    owned = Counter(world.owners)
    if owned:
        crowds = [sum(owned[node] for node in nodes) for nodes in world.domains().values()]
        bounds = [-(-owned.total() // found.width), *owned.values(), *(-(-crowd // found.most) for crowd in crowds)]
        assert len(world.place().stripes) == max(bounds)


@given(changes())
def test_parity_is_even_as_far_as_domains_allow(change: tuple[Labelled, Labelled]) -> None:
    before, after = change
    if len(after.nodes) < 2:
        return
    stripes = after.place(before.place()).stripes
    cost = {stripe: max(after.sizes[i] for i in stripe.shards) for stripe in stripes}
    held = dict.fromkeys(after.nodes, 0)
    for stripe in stripes:
        for node in stripe.parity:
            held[node] += cost[stripe]
    found = spread(after.nodes, after.labels, after.parity, min(after.width or 8, len(after.nodes) - after.parity))
    allowance = sum(held.values()) / len(held) / KEPT_TOLERANCE
    for stripe, full, empty in ((s, u, v) for s in stripes if cost[s] for u in s.parity for v in after.nodes):
        rest = set(blocks(stripe)) - {full}
        if empty not in blocks(stripe) and found.admits(empty, found.full(rest)):
            assert held[full] - held[empty] <= 2 * cost[stripe] + allowance


@given(labelled())
def test_nodes_without_a_label_are_each_a_domain(world: Labelled) -> None:
    apart = {node: (f"rack={i}",) for i, node in enumerate(world.nodes)}
    plain = replace(world, labels=dict.fromkeys(world.nodes, ()))
    assert replace(world, labels=apart).place().stripes == plain.place().stripes


def test_what_is_impossible_is_said() -> None:
    labels = dict.fromkeys("abcd", ("rack=7",))
    note = place(list("abcd"), [8] * 4, labels, losses=1, domains=labels).note
    assert note == "a rack may not be lost as a whole: all 4 nodes are in rack=7"
    two = {"a": ("rack=1",), "b": ("rack=1",), "c": ("rack=2",), "d": ("rack=2",)}
    placement = place(list("abcd"), [8] * 4, two, losses=1, domains=two)
    assert placement.note == (
        "stripes of 1 shards instead of 3, so that any domain may be lost as a whole; every shard is copied whole"
    )
    assert place(list("abcd"), [8] * 4, two, losses=1, width=1, domains=two).note == ""
