"""Failure domains: racks, switches, zones that fail as a whole, and how many blocks of a stripe each of them may hold.

A stripe survives as long as no more of its blocks are lost than it has parity rows. So a domain may be lost as a whole
if it holds at most that many blocks of every stripe. A label is `kind=value`; nodes with the same label are one domain,
and a node without a label of some kind is a domain of its own. Domains may be nested (racks in zones). The sets of
nodes that fit into one stripe are then the independent sets of a laminar matroid: whatever nodes are chosen first, the
others can be chosen to fill the stripe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


def kind_of(label: str) -> str:
    """The kind of domain that a label is of, such as rack."""
    return label.partition("=")[0]


@dataclass(frozen=True)
class Spread:
    """What stripes respect. `most`: blocks of a stripe that one domain may hold; `width`: shards that then fit in one.

    `impossible`: by kind, why the loss of a whole domain of this kind is not covered.
    """

    labels: Mapping[str, tuple[str, ...]]  # of each node: only kinds that are respected
    most: int
    width: int
    impossible: Mapping[str, str]

    def full(self, blocks: Iterable[str]) -> frozenset[str]:
        """The domains that may hold no more of a stripe with blocks on these nodes."""
        held = Counter(label for node in blocks for label in self.labels.get(node, ()))
        return frozenset(label for label, count in held.items() if count >= self.most)

    def admits(self, node: str, full: frozenset[str]) -> bool:
        """Whether a stripe that leaves these domains full may have one more block on `node`."""
        return not full or full.isdisjoint(self.labels.get(node, ()))


def spread(nodes: Sequence[str], labels: Mapping[str, Sequence[str]], losses: int, width: int) -> Spread:
    """How stripes of up to `width` shards and `losses` parity rows are spread over the domains of `nodes`.

    Kinds are respected from the one with the most domains to the one with the fewest. A kind is left out if all nodes
    are in one domain of it, or if its domains cross those of an earlier kind. Stripes become narrower only as far as
    domains require it, and a domain then holds as few blocks of a stripe as this width allows.
    """
    values: dict[str, dict[str, set[str]]] = {}  # kind -> label -> nodes
    for node in nodes:
        for label in labels.get(node, ()):
            values.setdefault(kind_of(label), {}).setdefault(label, set()).add(node)
    impossible: dict[str, str] = {}
    respected: dict[str, set[str]] = {}
    for kind in sorted(values, key=lambda kind: (-len(values[kind]), kind)):
        whole = next((label for label, held in values[kind].items() if len(held) == len(nodes)), "")
        pairs = ((one, other) for one in respected for other in values[kind])
        crossing = next((p for p in pairs if _cross(respected[p[0]], values[kind][p[1]])), None)
        if whole:
            impossible[kind] = f"all {len(nodes)} nodes are in {whole}"
        elif crossing:
            impossible[kind] = f"{crossing[0]} and {crossing[1]} overlap, and neither contains the other"
        else:
            respected.update(values[kind])
    kept = {node: tuple(label for label in labels.get(node, ()) if label in respected) for node in nodes}
    room = [_room(nodes, kept, most) - losses for most in range(1, losses + 1)]
    used = min(width, room[-1])
    most = next(number for number, fits in enumerate(room, 1) if fits >= used)
    return Spread({node: mine for node, mine in kept.items() if mine}, most, used, impossible)


def _cross(one: set[str], other: set[str]) -> bool:
    return bool(one & other) and not (one <= other or other <= one)


def _room(nodes: Sequence[str], labels: Mapping[str, Sequence[str]], most: int) -> int:
    """How many nodes one stripe can use, with at most `most` of each domain."""
    held: Counter[str] = Counter()
    count = 0
    for node in nodes:
        if all(held[label] < most for label in labels[node]):
            held.update(labels[node])
            count += 1
    return count
