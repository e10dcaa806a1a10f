"""The agreement of a step: merged in any order and any tree it is the same, exact, and small."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from everstep.elastic.protocol.agreement import (
    SHARE_BYTES,
    Details,
    Kept,
    Receive,
    Saving,
    Send,
    Share,
    Sums,
    children,
    exchange,
    imbalance,
    merge,
    parent,
)
from everstep.elastic.protocol.exact import ExactSum
from everstep.elastic.protocol.wire import Malformed, decode, encode

LARGEST = math.ldexp(math.nextafter(1.0, 0.0), 1024)
NASTY = [5e-324, -5e-324, 2.2250738585072014e-308, LARGEST, -LARGEST, 1e308, 1.0, -1.0, 2.0**-53, 1e16, 0.1, 0.0, -0.0]
floats = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(NASTY)
anything = floats | st.sampled_from([math.nan, math.inf, -math.inf])
words = st.integers(-(1 << 63), (1 << 63) - 1)
versions = st.integers(-1, 1 << 40)


def nearest(values: list[float]) -> float:
    """The correctly rounded sum, by fractions; math.fsum fails where a partial sum is too large."""
    special = {value for value in values if not math.isfinite(value)}
    if special:
        return special.pop() if len(special) == 1 else math.nan
    exact = sum(map(Fraction, values), Fraction(0))
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def in_any_tree(items: list[Any], rng: random.Random) -> Any:
    """All items merged, two that are drawn at a time."""
    items = list(items)
    while len(items) > 1:
        first, second = (items.pop(rng.randrange(len(items))) for _ in range(2))
        items.append(merge(first, second))
    return items[0]


@given(st.lists(floats, max_size=60), st.randoms(use_true_random=False))
@example([LARGEST, LARGEST, -LARGEST], random.Random(0))
@example([1e16, 1.0, -1e16], random.Random(0))
@example([5e-324] * 3, random.Random(0))
@example([1.0, 2.0**-53, 5e-324], random.Random(0))  # just above the middle of two floats
def test_a_sum_is_the_correctly_rounded_one_in_any_order_and_tree(values: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))
    cuts = sorted(rng.randrange(len(values) + 1) for _ in range(rng.randrange(6)))
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    sums = [Sums((ExactSum.of(part),)) for part in parts]
    total = in_any_tree(sums, rng).sums[0]
    assert total == ExactSum.of(values)
    assert total.rounded() == nearest(values)
    if sum(map(abs, map(Fraction, values))) < LARGEST:
        assert total.rounded() == math.fsum(values)
    assert decode(Sums, encode(Sums((total,)))) == Sums((total,))


@given(st.lists(anything, max_size=20), st.randoms(use_true_random=False))
def test_what_is_no_number(values: list[float], rng: random.Random) -> None:
    """As IEEE 754 defines it, in any order: infinities of both signs, and NaN, make NaN."""
    expected = math.nan if any(map(math.isnan, values)) else nearest(values)
    total = in_any_tree([Sums((ExactSum.of([value]),)) for value in [*values, 0.0]], rng)
    assert same(total.sums[0].rounded(), expected)


savings = st.builds(
    Saving,
    free=st.booleans(),
    asked=st.booleans(),
    again=st.booleans(),
    newest=versions,
    tried=versions,
    first=st.tuples(st.integers(0, 1 << 20), st.floats(0, 1e12), st.text("0123456789abcdef", min_size=8, max_size=24)),
)
shares = st.builds(
    Share,
    ranks=st.integers(1, 1 << 20),
    norm=st.lists(anything, max_size=4).map(ExactSum.of),
    loss=st.lists(anything, max_size=4).map(ExactSum.of),
    losses=st.integers(0, 1 << 20),
    tokens=st.integers(0, 1 << 40),
    digest=words,
    terms=st.none() | st.integers(0, 2),
    idle=st.booleans(),
    skip_nonfinite=st.booleans(),
    join=st.none() | st.integers(0, 2),
    kept=st.builds(
        Kept,
        whole=versions,
        before=st.none() | versions,
        every=st.tuples(st.integers(0, 1 << 20), st.integers(1, 1000)),
    ),
    step_s=st.floats(0, 1e9),
    timed=st.booleans(),
    saving=savings,
    replicas=st.integers(0, (1 << 128) - 1),
    suspects=st.booleans(),
)
details = st.builds(
    Details,
    settings=st.dictionaries(
        st.text(max_size=8), st.lists(st.integers(0, 50), min_size=1).map(lambda r: tuple(sorted(set(r)))), max_size=4
    ),
    touched=st.binary(max_size=5),
    ancestors=st.tuples(st.integers(0, 9), st.lists(st.tuples(st.text(max_size=3), st.floats(0, 9))).map(tuple)),
)


def with_ranks_apart(found: list[Any]) -> list[Any]:
    """Fields of the lowest rank are distinguished by the rank, which no two members share."""
    if isinstance(found[0], Details):
        return [replace(item, ancestors=(n, item.ancestors[1])) for n, item in enumerate(found)]
    return [
        replace(
            item,
            kept=replace(item.kept, every=(n, item.kept.every[1])),
            saving=replace(item.saving, first=(n, *item.saving.first[1:])),
        )
        for n, item in enumerate(found)
    ]


@given(st.lists(shares, min_size=1, max_size=8) | st.lists(details, min_size=1, max_size=8), st.randoms())
def test_merging_is_associative_and_commutative(found: list[Any], rng: random.Random) -> None:
    found = with_ranks_apart(found)
    expected = found[0]
    for item in found[1:]:
        expected = merge(expected, item)
    merged = in_any_tree(found, rng)
    assert merged == expected
    assert encode(merged) == encode(expected)
    assert decode(type(merged), encode(merged)) == merged


@given(st.lists(shares, min_size=3, max_size=3))
def test_what_each_field_means(found: list[Share]) -> None:
    found = with_ranks_apart(found)
    merged = in_any_tree(found, random.Random(0))
    assert merged.ranks == sum(share.ranks for share in found)
    assert merged.tokens == sum(share.tokens for share in found)
    assert merged.digest == found[0].digest ^ found[1].digest ^ found[2].digest
    assert merged.terms == (found[0].terms if len({share.terms for share in found}) == 1 else None)
    assert merged.join == (found[0].join if len({share.join for share in found}) == 1 else None)
    assert merged.kept.whole == min(share.kept.whole for share in found)
    known = [share.kept.before for share in found if share.kept.before is not None]
    assert merged.kept.before == min(known, default=None)
    assert merged.kept.every == found[0].kept.every
    assert merged.saving.first == found[0].saving.first
    assert merged.saving.free == all(share.saving.free for share in found)
    assert merged.saving.asked == any(share.saving.asked for share in found)
    assert merged.saving.newest == max(share.saving.newest for share in found)
    assert merged.idle == all(share.idle for share in found)
    assert merged.suspects == any(share.suspects for share in found)


@pytest.mark.parametrize("seed", range(3))
def test_a_share_of_any_number_of_shards_is_small(seed: int) -> None:
    """The largest possible sums: 65,536 addends over the whole range of floats."""
    rng = random.Random(seed)
    values = [
        math.ldexp(rng.uniform(0.5, 1.0), rng.randint(-1073, 1023)) * rng.choice([1, -1]) for _ in range(1 << 16)
    ] + NASTY
    worst = ExactSum.of(values)
    share = Share(
        ranks=1 << 20,
        norm=worst,
        loss=worst,
        losses=1 << 40,
        tokens=1 << 60,
        digest=-(1 << 63),
        terms=(1 << 63) - 1,
        idle=True,
        skip_nonfinite=True,
        join=1 << 40,
        kept=Kept(whole=1 << 60, before=1 << 60, every=(1 << 20, 1 << 20)),
        step_s=1e9,
        timed=True,
        saving=Saving(
            free=True, asked=True, again=True, newest=1 << 60, tried=1 << 60, first=(1 << 20, 1e10, "f" * 24)
        ),
        replicas=(1 << 128) - 1,
        suspects=True,
    )
    assert len(encode(share)) <= SHARE_BYTES
    assert len(encode(merge(share, share))) <= SHARE_BYTES


@given(
    st.binary(max_size=60) | shares.map(encode).flatmap(lambda data: st.integers(0, len(data)).map(lambda n: data[:n]))
)
def test_what_is_not_a_share_is_refused(data: bytes) -> None:
    try:
        share = decode(Share, data)
    except Malformed:
        return
    assert decode(Share, encode(share)) == share


# ------------------------------------------------------------ the tree


@pytest.mark.parametrize("size", [*range(1, 20), 64, 255, 256, 1000])
def test_the_tree(size: int) -> None:
    edges = [(parent(position), position) for position in range(1, size)]
    assert sorted(edges) == sorted((p, child) for p in range(size) for child in children(p, size))
    depth = {0: 0}
    for above, position in edges:
        depth[position] = depth[above] + 1
    assert max(depth.values()) <= (size - 1).bit_length()


def hops(size: int) -> int:
    """The number of messages on the longest path of an exchange; a rank sends one at a time."""
    members = list(range(size))
    ready = dict.fromkeys(members, 0)
    running = {rank: exchange(rank, members, Sums(())) for rank in members}
    asked = {rank: next(steps, None) for rank, steps in running.items()}
    box: dict[tuple[int, int], int] = {}
    while any(asked.values()):
        for rank, wish in asked.items():
            answer = None
            if isinstance(wish, Send):
                ready[rank] += 1
                box[rank, wish.to] = ready[rank]
            elif isinstance(wish, Receive) and (wish.source, rank) in box:
                ready[rank], answer = max(ready[rank], box.pop((wish.source, rank))), Sums(())
            else:
                continue
            try:
                asked[rank] = running[rank].send(answer)
            except StopIteration:
                asked[rank] = None
    return max(ready.values())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 12, 64, 256, 1024])
def test_an_exchange_takes_logarithmically_many_hops(size: int) -> None:
    assert hops(size) <= 2 * (size - 1).bit_length()


@given(st.lists(shares, min_size=1, max_size=12), st.sets(st.integers(0, 99), min_size=12, max_size=12), st.integers())
def test_an_exchange_gives_all_the_same_and_is_a_barrier(found: list[Share], named: set[int], seed: int) -> None:
    """Ranks proceed in any order; no rank has the result before every rank has begun."""
    rng = random.Random(seed)
    members = sorted(named)[: len(found)]
    of = dict(zip(members, with_ranks_apart(found), strict=True))
    expected = in_any_tree(list(of.values()), rng)
    running = {rank: exchange(rank, members, of[rank]) for rank in members}
    asked: dict[int, Send | Receive | None] = {}
    box: dict[tuple[int, int, bool], bytes] = {}
    sent: Counter[int] = Counter()
    done: dict[int, Share] = {}
    turns = 0
    while len(done) < len(members):
        turns += 1
        assert turns < 10_000, f"ranks {sorted(set(members) - done.keys())} wait for ever"
        rank = rng.choice([r for r in members if r not in done])
        answer = None
        try:
            if rank not in asked:
                asked[rank] = next(running[rank])
                continue
            wish = asked[rank]
            if isinstance(wish, Send):
                box[rank, wish.to, wish.up] = encode(wish.value)
                sent[rank] += 1
            elif wish is not None:
                name = (wish.source, rank, wish.up)
                if name not in box:
                    continue
                answer = decode(Share, box.pop(name))
            asked[rank] = running[rank].send(answer)
        except StopIteration as end:
            asked.setdefault(rank, None)
            assert asked.keys() == set(members)
            done[rank] = end.value
    assert not box
    assert sum(sent.values()) == 2 * (len(members) - 1)
    assert {encode(share) for share in done.values()} == {encode(expected)}


# ------------------------------------------------------------ replicas


@given(
    st.dictionaries(st.integers(0, 40), st.tuples(words.map(abs), st.integers(1, 9)), min_size=1),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8), st.integers(1, 1 << 50)), max_size=4),
    st.randoms(),
)
def test_replicas_balance_only_if_all_are_equal(
    shards: dict[int, tuple[int, int]], flips: list[tuple[int, int, int]], rng: random.Random
) -> None:
    """Copies by shard, some of them changed: pairs that are wrong in the same way must not cancel out."""
    copies = {(shard, n): value for shard, (value, count) in shards.items() for n in range(count)}
    for shard, n, bits in flips:
        if (shard, n) in copies:
            copies[shard, n] ^= bits
    counted = [(shard, value, 1) for (shard, _), value in copies.items()]
    counted += [(shard, copies[shard, 0], -count) for shard, (_, count) in shards.items()]  # the owner's
    rng.shuffle(counted)
    cut = rng.randrange(len(counted) + 1)
    total = (imbalance(counted[:cut]) + imbalance(counted[cut:])) % (1 << 128)
    equal = all(copies[shard, n] == copies[shard, 0] for shard, n in copies)
    assert (total == 0) == equal
