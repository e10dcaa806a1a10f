"""How probable it is that losses of nodes lead a job back to storage, by formula.

The model. Each of n nodes fails at rate 1 / MTBF, independently of the others. A loss is over a time T later, when a
version is protected without the lost node, if no other node is lost before; then the lost node has been replaced.
Losses that follow each other within T add up: j of them happen at the rate

    n / MTBF * product over i = 1 .. j - 1 of (1 - exp(-(n - i) T / MTBF)).

This is the classical product for redundant arrays (Patterson, Gibson, Katz: A Case for Redundant Arrays of Inexpensive
Disks, SIGMOD 1988), with a repair that begins again with every loss. They lead back to storage if they hold more than m
blocks of some stripe of k + m. For one stripe, the number of its blocks on j random nodes is hypergeometric; of s
different sets of nodes, the probability that one is hit is that of drawing s of all sets without repetition, none of
them fatal (as for copysets: Cidon et al., Copysets: Reducing the Frequency of Data Loss in Cloud Storage, ATC 2013).

What is not in the model: losses of whole failure domains, whose rate is not that of nodes, and losses that the
coordinator's store does not survive. Placements that respect domains have fewer fatal sets than random ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .placement import Placement

DAY_H = 24.0
NEGLIGIBLE = 1e-12  # of the sum: later terms are smaller still


@dataclass(frozen=True)
class Survival:
    """The probability that losses lead back to storage within a day, and what it is computed from."""

    nodes: int
    width: int
    losses: int
    mtbf_h: float
    reprotection_s: float
    day: float

    def describe(self) -> str:
        """As a part of a line of text."""
        return (
            f"a day leads back to storage with probability {self.day:.1e}, if a node fails once in {self.mtbf_h:g} h "
            f"and a loss is protected again after {self.reprotection_s:.3g} s"
        )


def survival(placement: Placement, mtbf_h: float, reprotection_s: float) -> Survival | None:
    """For the stripes of a placement; None if it has none."""
    sets = {frozenset((*stripe.nodes, *stripe.parity)) for stripe in placement.stripes}
    if not sets:
        return None
    nodes = len(frozenset().union(*sets))
    rate = returns_per_hour(nodes, placement.width, placement.losses, len(sets), mtbf_h, reprotection_s / 3600.0)
    return Survival(nodes, placement.width, placement.losses, mtbf_h, reprotection_s, -math.expm1(-rate * DAY_H))


def returns_per_hour(nodes: int, width: int, losses: int, sets: int, mtbf_h: float, reprotection_h: float) -> float:
    """How often losses lead back to storage. `sets`: how many different sets of nodes have stripes."""
    rate, chain, before = 0.0, nodes / mtbf_h, 0.0
    for lost in range(1, nodes + 1):
        fatal = fatal_fraction(nodes, width, losses, sets, lost)
        rate += chain * (fatal - before)
        chain *= -math.expm1(-(nodes - lost) * reprotection_h / mtbf_h)
        before = fatal
        if chain <= NEGLIGIBLE * rate:
            break
    return rate


def fatal_fraction(nodes: int, width: int, losses: int, sets: int, lost: int) -> float:
    """The fraction of all sets of `lost` nodes that hold more than `losses` blocks of a stripe."""
    blocks = width + losses
    ways = math.comb(nodes, blocks)
    hit = sum(math.comb(lost, i) * math.comb(nodes - lost, blocks - i) for i in range(losses + 1, blocks + 1))
    spared = 0.0  # the logarithm of the probability that no stripe is hit
    for drawn in range(min(sets, ways)):
        if ways - drawn <= hit:
            return 1.0
        spared += math.log1p(-(hit / (ways - drawn)))
    return -math.expm1(spared)
