"""Parity blocks of records that have grown since the generation began."""

from __future__ import annotations

import random

import pytest

from everstep.checkpointing.access.erasure import Code
from everstep.checkpointing.keeper.parity import ParityStore
from everstep.resharding.placement import Stripe

STRIPE = Stripe(shards=(3, 4, 5), nodes=("a", "b", "c"), parity=("d", "e"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_block_grows_with_its_members(order: tuple[int, ...]) -> None:
    """In any order of arrival: the parity is that of all records, padded with zeros."""
    rng = random.Random(1)
    store = ParityStore()
    for version, lengths in enumerate([(40, 64, 7), (300, 64, 200)]):
        members = [rng.randbytes(length) for length in lengths]
        expected = [bytearray(max(lengths)) for _ in STRIPE.parity]
        Code(3, 2).encode(members, expected)
        for row, parity in enumerate(expected):
            block = store.open(version, STRIPE, row, 64)
            for member in order:
                block.add(member, memoryview(members[member]), member)
            assert block.read() == bytes(parity)
    store.keep([])
    assert store.open(2, STRIPE, 0, 64).capacity == 300, "the next version has room from the beginning"
