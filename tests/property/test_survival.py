"""The probability of going back to storage, against a Monte Carlo of losses on stripes that are really placed."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from everstep.resharding.placement import Placement, place
from everstep.resharding.survival import fatal_fraction, returns_per_hour, survival

WORLDS = [  # nodes, losses, width, shards of each node
    (2, 1, 0, 4),
    (4, 1, 0, 8),
    (8, 1, 1, 4),
    (8, 2, 0, 8),
    (12, 1, 2, 2),
    (12, 2, 0, 8),
    (16, 1, 0, 8),
    (16, 2, 1, 2),
    (24, 1, 1, 2),
    (24, 1, 4, 2),
]


def placed(nodes: int, losses: int, width: int, shards: int) -> Placement:
    names = [f"n{i:02}" for i in range(nodes)]
    owners = [names[i % nodes] for i in range(nodes * shards)]
    return place(owners, [8] * len(owners), names, losses=losses, width=width)


def node_sets(placement: Placement) -> set[frozenset[str]]:
    return {frozenset((*stripe.nodes, *stripe.parity)) for stripe in placement.stripes}


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_fraction_of_fatal_losses(world: tuple[int, int, int, int]) -> None:
    """Against all sets of lost nodes; exact where shards are copied whole."""
    placement, sets = placed(*world), node_sets(placed(*world))
    nodes = sorted(frozenset().union(*sets))
    for lost in range(placement.losses, min(len(nodes), placement.losses + 2) + 1):
        ways = list(itertools.combinations(nodes, lost))
        fatal = sum(any(len(held & set(gone)) > placement.losses for held in sets) for gone in ways) / len(ways)
        formula = fatal_fraction(len(nodes), placement.width, placement.losses, len(sets), lost)
        if placement.width == 1 and lost == placement.losses + 1:
            assert formula == pytest.approx(fatal)
        assert formula == pytest.approx(fatal, rel=0.35, abs=0.02)
        assert lost > placement.losses or formula == fatal == 0.0


def returned(placement: Placement, mtbf_h: float, reprotection_h: float, hours: float, rng: random.Random) -> int:
    """How often a job that loses nodes at random goes back to storage in so many hours."""
    sets = node_sets(placement)
    nodes = sorted(frozenset().union(*sets))
    count, now, lost = 0, 0.0, set[str]()
    while True:
        wait = rng.expovariate((len(nodes) - len(lost)) / mtbf_h)
        if lost and wait > reprotection_h:  # all is protected again, and lost nodes are replaced
            now, lost = now + reprotection_h, set()
            continue
        now += wait
        if now > hours:
            return count
        lost.add(rng.choice([node for node in nodes if node not in lost]))
        if any(len(held & lost) > placement.losses for held in sets):
            count, lost = count + 1, set()


@pytest.mark.parametrize("world", [(2, 1, 0, 4), (6, 1, 1, 2), (12, 2, 1, 2), (12, 1, 0, 8), (9, 2, 0, 8)], ids=str)
def test_how_often_losses_lead_back_to_storage(world: tuple[int, int, int, int]) -> None:
    """Protection takes long here, so that losses often meet within it."""
    placement, mtbf_h, reprotection_h = placed(*world), 100.0, 1.0
    nodes, sets = world[0], len(node_sets(placement))
    rate = returns_per_hour(nodes, placement.width, placement.losses, sets, mtbf_h, reprotection_h)
    hours = 600 / rate
    found = returned(placement, mtbf_h, reprotection_h, hours, random.Random(7)) / hours
    assert found == pytest.approx(rate, rel=0.25)


def test_a_day() -> None:
    """Two copies on two nodes: the second is lost within a minute of the first."""
    found = survival(placed(2, 1, 1, 1), 6000.0, 60.0)
    assert found is not None
    assert (found.nodes, found.width, found.losses) == (2, 1, 1)
    assert found.day == pytest.approx(24 * (2 / 6000) * (1 / 60) / 6000, rel=1e-3)
    assert found.describe() == (
        "a day leads back to storage with probability 2.2e-08, if a node fails once in 6000 h and a loss is protected "
        "again after 60 s"
    )
    assert survival(placed(1, 1, 0, 1), 6000.0, 60.0) is None, "nothing is protected"


def test_what_makes_it_more_probable() -> None:
    base = returns_per_hour(16, 8, 2, 16, 6000.0, 0.02)
    assert returns_per_hour(16, 8, 1, 16, 6000.0, 0.02) > 100 * base
    assert returns_per_hour(16, 8, 2, 16, 600.0, 0.02) > 100 * base
    assert returns_per_hour(16, 8, 2, 16, 6000.0, 0.2) > 50 * base
    assert returns_per_hour(16, 1, 2, 16, 6000.0, 0.02) < base / 10
    assert 0 < returns_per_hour(1000, 8, 2, 4000, 6000.0, 0.02) < math.inf
