"""The canonical sum: one binary tree over the micro-batches of a step, whichever ranks computed them.

Floating-point addition is not associative, so the order of a sum over micro-batches 0..M-1 is fixed once: node
(level, index) covers the micro-batches [index << level, (index + 1) << level) and is left child + right child; a right
child entirely beyond M - 1 does not exist, and its parent is its left child. A rank keeps the roots of the subtrees
that it has completed; owners combine the roots of all ranks by the same rule, so the bits of the result do not depend
on the distribution of the work. See docs/design.md, "The same numbers".

Where the largest value is taken in place of the sum, the tree is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are in float32; in float64 for parameters of that type, and for buffers of integers."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else torch.float64


class TreeNode(NamedTuple):
    """A node of the tree: the sum of the micro-batches [index << level, (index + 1) << level) below M."""

    level: int
    index: int  # type: ignore[assignment]  # not tuple.index

    @property
    def start(self) -> int:
        return self.index << self.level

    def stop(self, leaves: int) -> int:
        return min((self.index + 1) << self.level, leaves)


def root(leaves: int) -> TreeNode:
    """The node that covers every leaf."""
    return TreeNode((leaves - 1).bit_length(), 0)


def promote(node: TreeNode, leaves: int) -> TreeNode:
    """The highest node with the same leaves: a left child without a right sibling is its parent."""
    while node != root(leaves) and node.index % 2 == 0 and (node.index + 1) << node.level >= leaves:
        node = TreeNode(node.level + 1, node.index // 2)
    return node


def covering(micro_batches: Iterable[int], leaves: int) -> set[TreeNode]:
    """The roots of the maximal complete subtrees over a set of micro-batches."""
    nodes: set[TreeNode] = set()
    for micro_batch in micro_batches:
        node = promote(TreeNode(0, micro_batch), leaves)
        while (sibling := TreeNode(node.level, node.index ^ 1)) in nodes:
            nodes.discard(sibling)
            node = promote(TreeNode(node.level + 1, node.index // 2), leaves)
        nodes.add(node)
    return nodes


class TreeSum:
    """The partial sums that a rank holds of one layer's gradient: per node, one tensor per parameter.

    Leaves may arrive in any order. The sum takes over a leaf's tensors and modifies them; when leaves arrive in order,
    about log2 of their number are alive at a time.
    """

    def __init__(self, leaves: int, largest: Collection[int] = ()) -> None:
        """`largest`: of these of a leaf's tensors, by position, the largest values are taken in place of the sum."""
        self.leaves = leaves
        self._largest = largest
        self.nodes: dict[TreeNode, list[Tensor]] = {}

    def add(self, micro_batch: int, gradients: list[Tensor]) -> None:
        """Add the leaf of a micro-batch. Raises ValueError if it has been added already."""
        if any(node.start <= micro_batch < node.stop(self.leaves) for node in self.nodes):
            raise ValueError(f"micro-batch {micro_batch} is in the sum already")
        node, value = promote(TreeNode(0, micro_batch), self.leaves), gradients
        while (sibling := TreeNode(node.level, node.index ^ 1)) in self.nodes:
            other = self.nodes.pop(sibling)
            if node.index % 2:
                value, other = other, value
            self._join(value, other)
            node = promote(TreeNode(node.level + 1, node.index // 2), self.leaves)
        self.nodes[node] = value

    def with_leaf(self, micro_batch: int, leaf: Tensor, at: int, start: int, stop: int) -> dict[TreeNode, Tensor]:
        """What the elements [start, stop) of the tensor at position `at` will be once a leaf is added.

        `leaf`: these elements of it. Nothing is modified; the result shares memory with both.
        """
        nodes = {node: tensors[at][start:stop] for node, tensors in self.nodes.items()}
        node, value = promote(TreeNode(0, micro_batch), self.leaves), leaf
        while (sibling := TreeNode(node.level, node.index ^ 1)) in nodes:
            other = nodes.pop(sibling)
            value = torch.add(other, value) if node.index % 2 else torch.add(value, other)
            node = promote(TreeNode(node.level + 1, node.index // 2), self.leaves)
        nodes[node] = value
        return nodes

    def _join(self, left: list[Tensor], right: list[Tensor]) -> None:
        """Write into `left` the values of both."""
        for at in self._largest:
            torch.maximum(left[at], right[at], out=left[at])
        if self._largest:
            added = [at for at in range(len(left)) if at not in self._largest]
            left, right = [left[at] for at in added], [right[at] for at in added]
        if left:  # a layer may have no parameters
            torch._foreach_add_(left, right)

    def clear(self) -> None:
        """Drop all partial sums."""
        self.nodes.clear()


def combine(
    parts: Mapping[TreeNode, Tensor], leaves: int, out: Tensor, join: Callable[..., Tensor] = torch.add
) -> None:
    """Write the canonical sum of the subtree roots `parts` into `out`; the parts are not modified.

    With `join=torch.maximum` it is the largest value of each element.
    All tensors have one shape and dtype. Raises ValueError unless the parts cover every leaf exactly once.
    """
    _check_cover(parts, leaves)
    _fold(root(leaves), parts, leaves, out, join)


def _fold(
    node: TreeNode,
    parts: Mapping[TreeNode, Tensor],
    leaves: int,
    out: Tensor | None,
    join: Callable[..., Tensor],
) -> Tensor:
    if node in parts:
        return parts[node] if out is None else out.copy_(parts[node])
    left = TreeNode(node.level - 1, 2 * node.index)
    right = TreeNode(node.level - 1, 2 * node.index + 1)
    if right.start >= leaves:
        return _fold(left, parts, leaves, out, join)
    first = _fold(left, parts, leaves, None, join)
    second = _fold(right, parts, leaves, None, join)
    return join(first, second) if out is None else join(first, second, out=out)


def _check_cover(parts: Iterable[TreeNode], leaves: int) -> None:
    at = 0
    for node in sorted(parts, key=lambda n: n.start):
        if node.start != at:
            raise ValueError(f"micro-batches {sorted((at, node.start))} of the sum are missing or come twice")
        at = node.stop(leaves)
    if at != leaves:
        raise ValueError(f"the sum has micro-batches up to {at} of {leaves}")
