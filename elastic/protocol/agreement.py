"""What the ranks of a generation agree on at the end of a step: one share of each, merged up a tree and sent down it.

`merge` is associative and commutative, so neither the shape of the tree nor the order of arrival matters, and every
rank ends with the same bytes. A share has a fixed size whatever the model: sums are exact (`exact.py`), digests stand
for what is equal on all ranks in nearly every step, and only where digests differ do the `Details` follow.

`exchange` is the way through the tree, for the engine and the simulator alike: it says what to send and to wait for.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

from .exact import NOTHING, ExactSum

T = TypeVar("T")

SHARE_BYTES = 1024  # of one share on the wire, at most
_WORD = 1 << 128


def _same(first: Any, second: Any) -> Any:
    return first if first == second else None


def _least(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return min(known, default=None)


def _bits(first: bytes, second: bytes) -> bytes:
    size = max(len(first), len(second))
    return (int.from_bytes(first, "little") | int.from_bytes(second, "little")).to_bytes(size, "little")


def _longest(first: tuple[int, tuple[Any, ...]], second: tuple[int, tuple[Any, ...]]) -> tuple[int, tuple[Any, ...]]:
    """The longer sequence; of two that are equally long that of the lower rank."""
    return min(first, second, key=lambda item: (-len(item[1]), item[0]))


def _of_both(first: Mapping[str, tuple[int, ...]], second: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted({*first.get(name, ()), *second.get(name, ())})) for name in sorted({*first, *second})}


def _word(first: int, second: int) -> int:
    return (first + second) % _WORD


def _words(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(_word, first, second))


def _each(first: Sequence[ExactSum], second: Sequence[ExactSum]) -> tuple[ExactSum, ...]:
    return tuple(map(operator.add, first, second))


def _merged(first: T, second: T) -> T:
    return merge(first, second)


def _saving(first: Saving | None, second: Saving | None) -> Saving | None:
    return merge(first, second) if first and second else None


# How a field is merged is said behind its type.
Total = Annotated[int, operator.add]
Exact = Annotated[ExactSum, operator.add]
Every = Annotated[bool, min]
Some = Annotated[bool, max]
Lowest = Annotated[int, min]
Highest = Annotated[int, max]
Equal = Annotated[int | None, _same]  # None: not all say the same


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A rank's part in checkpoints. `first` is of the lowest rank: (rank, now in seconds since 1970, a unique name)."""

    free: Every  # no save is under way
    asked: Some  # a checkpoint is wished for now
    again: Some  # one was given up in an older generation
    newest: Highest  # version that is saved
    tried: Highest  # version that was to be saved
    first: Annotated[tuple[int, float, str], min]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How far a rank's node is with versions that are to outlive the loss of nodes."""

    whole: Lowest  # the newest version that is whole in its keeper
    before: Annotated[int | None, _least]  # the same, in the generation before; None: the rank was not in that
    every: Annotated[tuple[int, int], min]  # of the lowest rank: (rank, steps between protected versions)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank adds to the agreement of a step, or several ranks, merged.

    `norm` is the sum of the squared norms of the gradients of the owned shards, `loss` that of the `losses` of as many
    micro-batches. `terms` is a digest of what this rank expects to be agreed about settings. `replicas` is 0 where all
    copies of every compared shard are equal, see `imbalance`.
    """

    digest: Annotated[int, operator.xor]  # of the owned shards' snapshots
    join: Equal  # the generation of the join or leave that is known here, 0 if none
    kept: Annotated[Kept, _merged]
    ranks: Total = 1  # how many are merged
    norm: Exact = NOTHING
    loss: Exact = NOTHING
    losses: Total = 0
    terms: Equal = 0
    idle: Every = True  # no gradient was missing here but those that were missing in the step before
    skip_nonfinite: Some = False
    step_s: Annotated[float, max] = 0.0  # how long the last step took
    timed: Every = False  # whether that is known
    saving: Annotated[Saving | None, _saving] = None
    replicas: Annotated[int, _word] = 0
    suspects: Some = False  # a value here may be damaged


@dataclass(frozen=True, kw_only=True)
class Details:
    """What ranks differ in: exchanged after their shares, in a step in which they do."""

    settings: Annotated[Mapping[str, tuple[int, ...]], _of_both]  # what ranks say of the settings, as JSON -> which do
    touched: Annotated[bytes, _bits]  # one bit for each parameter that had a gradient
    ancestors: Annotated[tuple[int, tuple[tuple[str, float], ...]], _longest]  # (rank, the runs before this one)


@dataclass(frozen=True)
class Sums:
    """Exact sums, of the same things on every rank."""

    sums: Annotated[tuple[ExactSum, ...], _each]


@dataclass(frozen=True)
class Imbalances:
    """The `imbalance` of several sets of shards."""

    words: Annotated[tuple[int, ...], _words]


@functools.cache
def _rules(kind: Any) -> tuple[tuple[str, Callable[[Any, Any], Any]], ...]:
    return tuple((name, hint.__metadata__[0]) for name, hint in get_type_hints(kind, include_extras=True).items())


def merge(first: T, second: T) -> T:
    """Two values of one of the types above as one. Associative and commutative."""
    kind: Any = type(first)
    merged: T = kind(**{name: rule(getattr(first, name), getattr(second, name)) for name, rule in _rules(kind)})
    return merged


def digest(*parts: object) -> int:
    """64 bits that stand for what is compared between ranks."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def imbalance(counted: Sequence[tuple[int, int, int]]) -> int:
    """The sum of times * hash(shard, digest) over (shard, digest, times), modulo 2 ** 128.

    Every holder of a copy counts it once, and its owner takes the number of all copies off. So the sum over all ranks
    is 0 if all copies of each shard are equal, and, but for a chance of about 2 ** -120, only then.
    """
    total = 0
    for shard, value, times in counted:
        parts = shard.to_bytes(8, "little") + value.to_bytes(8, "little")
        total += times * int.from_bytes(hashlib.blake2b(parts, digest_size=16).digest(), "little")
    return total % _WORD


# ------------------------------------------------------------ the tree


def parent(position: int) -> int:
    """The position in a binomial tree that a position other than the root, 0, sends its share to."""
    return position & (position - 1)


def children(position: int, size: int) -> list[int]:
    """The positions that send theirs to this one, the smallest subtree first. `size` is that of the tree."""
    found, bit = [], 1
    while position + bit < size and not position & bit:
        found.append(position + bit)
        bit <<= 1
    return found


@dataclass(frozen=True)
class Send:
    """Send `value` to a rank: `up` the tree, or down it."""

    to: int
    up: bool
    value: Any


@dataclass(frozen=True)
class Receive:
    """Wait for what a rank sends `up` the tree, or down it. Answer: the value."""

    source: int
    up: bool


def exchange(rank: int, members: Sequence[int], value: T) -> Generator[Send | Receive, Any, T]:
    """Merge the values of all members (ascending), up a binomial tree of them; the result comes down it to all.

    Yields what this rank is to do; returns what all values merged are. 2 (n - 1) messages in all, at most
    2 log2(n) one after the other. A rank that returns knows that every member has begun.
    """
    position = members.index(rank)
    below = children(position, len(members))
    for child in below:
        value = merge(value, (yield Receive(members[child], up=True)))
    if position:
        yield Send(members[parent(position)], up=True, value=value)
        value = yield Receive(members[parent(position)], up=False)
    for child in reversed(below):  # the largest subtree first
        yield Send(members[child], up=False, value=value)
    return value
