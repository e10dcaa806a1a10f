"""The canonical sum: the same bits for any ownership and any order as by a simple recursive tree."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everstep.elastic.step.canonical import (
    TreeNode,
    TreeSum,
    combine,
    covering,
    promote,
    root,
)


def dumb(leaves: list[Tensor], start: int, size: int) -> Tensor:
    """The sum over [start, start + size), size a power of two: halves first, left + right."""
    if size == 1:
        return leaves[start].clone()
    half = size // 2
    left = dumb(leaves, start, half)
    return left if start + half >= len(leaves) else left + dumb(leaves, start + half, half)


def dumb_sum(leaves: list[Tensor]) -> Tensor:
    size = 1
    while size < len(leaves):
        size *= 2
    return dumb(leaves, 0, size)


def drawn_leaves(count: int, seed: int) -> list[Tensor]:
    """Numbers of very different sizes, so that another order gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator) * 10.0 ** ((i * 7) % 11 - 5) for i in range(count)]


def collect(leaves: list[Tensor], owners: list[int], rng: random.Random) -> dict[TreeNode, Tensor]:
    """Every owner's partial sums, its leaves added in a random order."""
    count = len(leaves)
    parts: dict[TreeNode, Tensor] = {}
    for owner in set(owners):
        tree = TreeSum(count)
        mine = [m for m in range(count) if owners[m] == owner]
        rng.shuffle(mine)
        for m in mine:
            tree.add(m, [leaves[m].clone()])
        assert set(tree.nodes) == covering(mine, count)
        parts.update({node: tensors[0] for node, tensors in tree.nodes.items()})
    items = list(parts.items())
    rng.shuffle(items)
    return dict(items)


@given(st.integers(1, 21), st.integers(1, 6), st.integers(0, 2**32))
def test_any_owners_in_any_order_give_the_same_bits(count: int, ranks: int, seed: int) -> None:
    rng = random.Random(seed)
    leaves = drawn_leaves(count, seed)
    parts = collect(leaves, [rng.randrange(ranks) for _ in range(count)], rng)
    before = {node: tensor.clone() for node, tensor in parts.items()}
    out = torch.empty(5)
    combine(parts, count, out)
    assert torch.equal(out, dumb_sum(leaves))
    assert all(torch.equal(parts[node], before[node]) for node in parts), "the parts are not changed"


@given(st.integers(1, 21), st.integers(1, 6), st.integers(0, 2**32))
def test_largest_values(count: int, ranks: int, seed: int) -> None:
    """Of the tensors that are named; the others beside them are summed."""
    rng = random.Random(seed)
    leaves = drawn_leaves(count, seed)
    parts: list[dict[TreeNode, Tensor]] = [{}, {}]
    owners = [rng.randrange(ranks) for _ in range(count)]
    for owner in set(owners):
        tree = TreeSum(count, largest=[1])
        for m in (m for m in range(count) if owners[m] == owner):
            tree.add(m, [leaves[m].clone(), leaves[m].clone()])
        for node, tensors in tree.nodes.items():
            for part, tensor in zip(parts, tensors, strict=True):
                part[node] = tensor
    summed, largest = torch.empty(5), torch.empty(5)
    combine(parts[0], count, summed)
    combine(parts[1], count, largest, torch.maximum)
    assert torch.equal(summed, dumb_sum(leaves))
    assert torch.equal(largest, torch.stack(leaves).amax(0))


def test_order_matters_to_these_numbers() -> None:
    leaves = drawn_leaves(16, 1)
    assert not torch.equal(sum(leaves[1:], leaves[0]), dumb_sum(leaves))


@given(st.integers(2, 21), st.integers(0, 2**32))
def test_missing_and_repeated_leaves_raise(count: int, seed: int) -> None:
    rng = random.Random(seed)
    leaves = drawn_leaves(count, seed)
    parts = collect(leaves, [rng.randrange(4) for _ in range(count)], rng)
    gone = rng.choice(sorted(parts))
    with pytest.raises(ValueError, match=r"missing|up to"):
        combine({node: part for node, part in parts.items() if node != gone}, count, torch.empty(5))
    again = promote(TreeNode(0, rng.randrange(count)), count)
    if again not in parts:
        with pytest.raises(ValueError, match=r"twice|up to"):
            combine({**parts, again: leaves[0]}, count, torch.empty(5))
    tree = TreeSum(count)
    order = rng.sample(range(count), count)
    for m in order:
        tree.add(m, [leaves[m].clone()])
    assert set(tree.nodes) == {root(count)}
    with pytest.raises(ValueError, match="in the sum already"):
        tree.add(order[0], [leaves[order[0]].clone()])


@given(st.sets(st.integers(0, 30)), st.integers(31, 40))
def test_a_cover_is_exact_and_smallest(micro_batches: set[int], leaves: int) -> None:
    nodes = covering(micro_batches, leaves)
    covered = [m for node in nodes for m in range(node.start, node.stop(leaves))]
    assert sorted(covered) == sorted(micro_batches)
    for node in nodes - {root(leaves)}:
        assert TreeNode(node.level, node.index ^ 1) not in nodes, "two siblings are one node"
        assert promote(node, leaves) == node


@given(st.integers(1, 64))
def test_leaves_in_order_keep_few_buffers(count: int) -> None:
    tree = TreeSum(count)
    for m in range(count):
        tree.add(m, [torch.zeros(1)])
        assert len(tree.nodes) <= count.bit_length()
