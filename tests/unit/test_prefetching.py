"""Copies made ahead of a rebalance: what is read next, when all are up to date, and what their owner then lacks."""

from __future__ import annotations

from dataclasses import replace

from everstep.elastic.protocol.prefetching import NONE, Copies, Copying, Wanted, prefetches
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.moves import ahead, own_moves
from everstep.resharding.plan import Plan

STAGE = Stage(0, 1, (0, 1))
LAYOUT = Layout(2, 2, (STAGE,), (0, 0, 1), (STAGE,))
PLAN = Plan(layout=LAYOUT, version=None, moves=ahead(own_moves(LAYOUT, [0, 1, 2])))


def read_all(copies: Copies, version: int) -> list[Wanted]:
    """Read what is wanted until nothing is."""
    asked = []
    while (wanted := copies.wanted(version)) is not None:
        asked.append(wanted)
        for shard in wanted.shards:
            copies.read(wanted, shard)
        copies.lacked(wanted, version)
    return asked


def test_only_a_switch_that_moves_shards_is_prepared() -> None:
    assert prefetches(PLAN)
    assert not prefetches(replace(PLAN, moves=()))
    assert not prefetches(replace(PLAN, moves=own_moves(LAYOUT, [0, 1, 2]))), "a join, or a departure"
    assert not prefetches(replace(PLAN, version=3)), "a recovery"


def test_records_are_read_one_by_one_and_then_every_gradient() -> None:
    copies = Copies(PLAN, 0)
    assert not copies.current(4)
    assert read_all(copies, 4) == [Wanted((0,), 4, gradient=False), Wanted((1,), 4, gradient=False)]
    assert copies.current(4)
    assert not copies.current(5)
    assert read_all(copies, 5) == [Wanted((0, 1), 4, gradient=True)]
    assert copies.current(5)


def test_gradients_come_before_records_and_the_oldest_first() -> None:
    copies = Copies(PLAN, 0)
    first = copies.wanted(4)
    assert first is not None
    copies.read(first, 0)
    assert read_all(copies, 6) == [
        Wanted((0,), 4, gradient=True),
        Wanted((0,), 5, gradient=True),
        Wanted((1,), 6, gradient=False),
    ]


def test_a_copy_whose_gradient_is_gone_is_made_again() -> None:
    copies = Copies(PLAN, 0)
    read_all(copies, 4)
    late = copies.wanted(5)
    assert late is not None
    copies.lacked(late, 5)
    assert copies.versions == {0: 4, 1: 4}, "the gradient of the last step will come"
    copies.read(late, 0)
    copies.lacked(late, 6)
    assert copies.versions == {0: 5, 1: NONE}
    assert read_all(copies, 6) == [Wanted((0,), 5, gradient=True), Wanted((1,), 6, gradient=False)]


def test_a_record_that_is_missing_does_not_hold_the_others_up() -> None:
    copies = Copies(PLAN, 0)
    first = copies.wanted(4)
    assert first == Wanted((0,), 4, gradient=False)
    copies.lacked(first, 4)
    assert read_all(copies, 4) == [Wanted((1,), 4, gradient=False), first]


def test_a_rank_that_gains_nothing_is_ready_at_once() -> None:
    assert Copies(PLAN, 7).current(3)


def test_a_rank_waits_until_its_copies_are_current_or_it_is_late() -> None:
    copies = Copies(PLAN, 0)
    assert not Copying(2, copies, 4, late=False).waits(None, 0)
    assert not Copying(2, copies, 4, late=False).waits(replace(PLAN, version=3), 0), "a recovery is not waited with"
    assert Copying(1, None, 4, late=False).waits(PLAN, 0), "it has not begun"
    assert not Copying(1, None, 4, late=False).waits(PLAN, 2), "it is to own nothing"
    assert Copying(2, copies, 4, late=False).waits(PLAN, 0)
    assert not Copying(2, copies, 4, late=True).waits(PLAN, 0)
    assert not Copying(2, None, 4, late=False).waits(PLAN, 0), "copies that failed"
    read_all(copies, 4)
    assert not Copying(2, copies, 4, late=False).waits(PLAN, 0)
    assert Copying(2, copies, 5, late=False).waits(PLAN, 0), "a gradient is missing"
