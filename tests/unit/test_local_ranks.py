"""Every rank of a node has its own slot, whatever ranks the node was given."""

from __future__ import annotations

import random

import pytest

from everstep.elastic.protocol.local_ranks import LocalRanks


def test_a_whole_node_in_the_order_of_ranks() -> None:
    slots = LocalRanks(3)
    slots = slots.give([4, 5, 6], running=())
    assert [slots[rank] for rank in (4, 5, 6)] == [0, 1, 2]
    slots = slots.give([6, 7, 8], running=())  # a restart under other ranks
    assert slots.ranks == {0: 6, 1: 7, 2: 8}


def test_a_replacement_has_the_slot_of_its_predecessor() -> None:
    slots = LocalRanks(3)
    slots = slots.give([4, 5, 6], running=())
    slots = slots.give([5], running={4, 6})
    assert slots[5] == 1
    slots = slots.give([4, 6], running={5})
    assert slots.ranks == {0: 4, 1: 5, 2: 6}


def test_vacant_ranks_are_no_range() -> None:
    """Of nodes with 1, 2 and 1 slots the first and the last are lost, and a node joins with one of two slots."""
    slots = LocalRanks(2)
    slots = slots.give([0, 3], running=())
    assert (slots[0], slots[3]) == (0, 1)


def test_ranks_that_have_gone_leave_their_slots() -> None:
    slots = LocalRanks(2)
    slots = slots.give([0], running=())
    slots = slots.give([7], running={0})
    assert (slots[0], slots[7]) == (0, 1)
    slots = slots.give([9], running={7})
    assert (slots[9], slots[7]) == (0, 1)
    with pytest.raises(ValueError, match=r"1 ranks \(\[1\]\) are to start in 0 free slots of 2"):
        slots.give([1], running={7, 9})


def test_any_history() -> None:
    """No two running ranks share a slot, and none moves while it runs."""
    rng = random.Random(3)
    for _ in range(200):
        count = rng.randrange(1, 5)
        slots, running = LocalRanks(count), set[int]()
        for _ in range(30):
            gone = {rank for rank in running if rng.random() < 0.4}
            before = {rank: slots[rank] for rank in running - gone}
            room = count - len(before)
            if not room:
                continue
            starting = rng.sample([r for r in range(8) if r not in before], rng.randint(1, room))
            slots = slots.give(starting, running=before)
            running = {*before, *starting}
            assert sorted(slots[rank] for rank in running) == sorted({slots[rank] for rank in running})
            assert {slots[rank] for rank in running} <= set(range(count))
            assert all(slots[rank] == slot for rank, slot in before.items())
