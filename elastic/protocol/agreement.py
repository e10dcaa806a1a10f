"""The agreement of a generation's ranks at the end of a step: their shares, merged up a tree and sent back down it.

`merge` is associative and commutative, so neither the shape of the tree nor the order of arrival matters, and every
rank ends with the same bytes. The size of a share does not depend on the model: sums are exact (`exact.py`), digests
represent what is equal on all ranks in nearly every step, and the ranks exchange `Details` only where digests differ.

`exchange` is the walk through the tree, for the engine and the simulator alike: it yields what to send and to receive.
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

SHARE_BYTES = 1024  # upper limit of one share on the wire
_WORD = 1 << 128


def _same(first: Any, second: Any) -> Any:
    return first if first == second else None


def _least(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return min(known, default=None)


def _first(first: tuple[int, str] | None, second: tuple[int, str] | None) -> tuple[int, str] | None:
    """What the lowest rank says, of those that say something."""
    return min((said for said in (first, second) if said is not None), default=None)


def _bits(first: bytes, second: bytes) -> bytes:
    size = max(len(first), len(second))
    return (int.from_bytes(first, "little") | int.from_bytes(second, "little")).to_bytes(size, "little")


def _longest(first: tuple[int, tuple[Any, ...]], second: tuple[int, tuple[Any, ...]]) -> tuple[int, tuple[Any, ...]]:
    """The longer sequence; of two equally long ones that of the lower rank."""
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


# The annotation of a field is the function that merges it.
Total = Annotated[int, operator.add]
Exact = Annotated[ExactSum, operator.add]
Every = Annotated[bool, min]
Some = Annotated[bool, max]
Lowest = Annotated[int, min]
Highest = Annotated[int, max]
Equal = Annotated[int | None, _same]  # None: the ranks differ


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The checkpoints of a rank. `first` is of the lowest rank: (rank, now in seconds since 1970, a unique name)."""

    free: Every  # no save is in progress
    asked: Some  # a checkpoint was requested
    again: Some  # a save was abandoned in an older generation
    newest: Highest  # newest version that is saved
    tried: Highest  # newest version whose save was attempted
    first: Annotated[tuple[int, float, str], min]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How far the protection of versions against the loss of nodes has come on a rank's node."""

    whole: Lowest  # the newest version that its keeper holds completely
    before: Annotated[int | None, _least]  # the same, in the previous generation; None: the rank was not a member of it
    every: Annotated[tuple[int, int], min]  # of the lowest rank: (rank, steps between protected versions)


@dataclass(frozen=True, kw_only=True)
class Share:
    """The contribution of one rank to the agreement of a step, or those of several ranks, merged.

    `norm` is the sum of the squared norms of the gradients of the owned shards, `loss` the sum of the losses of
    `losses` micro-batches, and `tokens` the number of tokens in them, where these are counted. `terms` is a digest of
    the settings that this rank expects to be equal. `replicas` is 0 where all copies of every compared shard are equal,
    see `imbalance`.
    """

    digest: Annotated[int, operator.xor]  # of the owned shards' snapshots
    join: Equal  # the generation of the join or departure that this rank knows of, 0 if none
    kept: Annotated[Kept, _merged]
    waits: Some = False  # this rank copies shards that it is to own by that plan, and lacks some
    ranks: Total = 1  # how many shares are merged
    norm: Exact = NOTHING
    loss: Exact = NOTHING
    losses: Total = 0
    tokens: Total = 0
    terms: Equal = 0
    idle: Every = True  # every gradient that is missing here was missing in the previous step, too
    skip_nonfinite: Some = False
    step_s: Annotated[float, max] = 0.0  # duration of the last step
    timed: Every = False  # whether `step_s` is known
    saving: Annotated[Saving | None, _saving] = None
    replicas: Annotated[int, _word] = 0
    suspects: Some = False  # a value on this rank may be damaged
    end: Annotated[tuple[int, str] | None, _first] = None  # a script asks for the end after this step: (rank, why)
    state: Equal = 0  # a digest of what the script keeps in run.state, and of large tensors that it has registered
    carries: Some = False  # a turn here has left something in run.stream_state


@dataclass(frozen=True, kw_only=True)
class Details:
    """The values in which ranks differ: exchanged after the shares, in a step whose digests differ."""

    settings: Annotated[Mapping[str, tuple[int, ...]], _of_both]  # settings as JSON -> the ranks that have them
    touched: Annotated[bytes, _bits]  # one bit for each parameter that had a gradient
    ancestors: Annotated[tuple[int, tuple[tuple[str, float], ...]], _longest]  # (rank, the runs before this one)


@dataclass(frozen=True)
class Sums:
    """Exact sums of the same quantities on every rank."""

    sums: Annotated[tuple[ExactSum, ...], _each]


@dataclass(frozen=True)
class SharedText:
    """What one rank has, as JSON, which is gathered, not merged: run.state where ranks differ, states of streams,
    run.stream_state."""

    text: str


@dataclass(frozen=True)
class Imbalances:
    """The `imbalance` of several sets of shards."""

    words: Annotated[tuple[int, ...], _words]


@functools.cache
def _rules(kind: Any) -> tuple[tuple[str, Callable[[Any, Any], Any]], ...]:
    return tuple((name, hint.__metadata__[0]) for name, hint in get_type_hints(kind, include_extras=True).items())


def merge(first: T, second: T) -> T:
    """Merge two values of one of the types above. Associative and commutative."""
    kind: Any = type(first)
    merged: T = kind(**{name: rule(getattr(first, name), getattr(second, name)) for name, rule in _rules(kind)})
    return merged


def digest(*parts: object) -> int:
    """A 64-bit digest of what ranks compare."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def imbalance(counted: Sequence[tuple[int, int, int]]) -> int:
    """The sum of times * hash(shard, digest) over (shard, digest, times), modulo 2 ** 128.

    Every holder of a copy adds it once, and its owner subtracts the number of all copies. So the sum over all ranks is
    0 if all copies of each shard are equal, and, except with a probability of about 2 ** -120, only then.
    """
    total = 0
    for shard, value, times in counted:
        parts = shard.to_bytes(8, "little") + value.to_bytes(8, "little")
        total += times * int.from_bytes(hashlib.blake2b(parts, digest_size=16).digest(), "little")
    return total % _WORD


# ------------------------------------------------------------ the tree


def parent(position: int) -> int:
    """The parent of a position in a binomial tree. The root, 0, has none."""
    return position & (position - 1)


def children(position: int, size: int) -> list[int]:
    """The children of a position, the smallest subtree first. `size` is that of the tree."""
    found, bit = [], 1
    while position + bit < size and not position & bit:
        found.append(position + bit)
        bit <<= 1
    return found


@dataclass(frozen=True)
class Send:
    """Send `value` to a rank, `up` the tree or down it."""

    to: int
    up: bool
    value: Any


@dataclass(frozen=True)
class Receive:
    """Wait for what a rank sends, `up` the tree or down it. Answer: the value."""

    source: int
    up: bool


def exchange(rank: int, members: Sequence[int], value: T) -> Generator[Send | Receive, Any, T]:
    """Merge the values of all members (ascending) up a binomial tree, and send the result down to all of them.

    Yields what this rank has to do; returns the merged value. The walk takes 2 (n - 1) messages in all, and at most
    2 log2(n) of them in sequence. When it returns, every member has begun its own.
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
