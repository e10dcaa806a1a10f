"""The erasure code against an independent, slow implementation."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpointing.access import erasure
from everstep.checkpointing.access.erasure import Code, ErasureLibraryMissing

LENGTHS = [1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 127, 1000, 4097]
POLYNOMIAL = 0x11D  # x^8 + x^4 + x^3 + x^2 + 1, ISA-L's field


# ---------------------------------------------------------------- the slow one


@cache
def times(a: int, b: int) -> int:
    """Multiplication in GF(2^8), bit by bit."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = a << 1 ^ (POLYNOMIAL if a & 0x80 else 0)
        b >>= 1
    return product


@cache
def inverse(a: int) -> int:
    return next(b for b in range(1, 256) if times(a, b) == 1)


@cache
def coefficient(data: int, row: int, member: int) -> int:
    """1 / (x + y) of a Cauchy matrix with x = data + row and y = member, row 0 and column 0 scaled to ones."""

    def cauchy(r: int, j: int) -> int:
        return inverse((data + r) ^ j)

    def columns_scaled(r: int, j: int) -> int:
        return times(cauchy(r, j), inverse(cauchy(0, j)))

    return times(columns_scaled(row, member), inverse(columns_scaled(row, 0)))


def slow_encode(members: Sequence[bytes], parity: int) -> list[bytes]:
    rows = [bytearray(max(map(len, members))) for _ in range(parity)]
    for (number, row), (j, member) in itertools.product(enumerate(rows), enumerate(members)):
        by = coefficient(len(members), number, j)
        for at, byte in enumerate(member):
            row[at] ^= times(by, byte)
    return [bytes(row) for row in rows]


def encode(members: Sequence[bytes], parity: int) -> list[bytes]:
    rows = [bytearray(b"\xaa" * max(map(len, members))) for _ in range(parity)]
    Code(len(members), parity).encode(members, rows)
    return [bytes(row) for row in rows]


@st.composite
def stripes(draw, parity: int | None = None) -> tuple[list[bytes], int]:
    """Members, most of the same length, and a number of parity rows."""
    length = draw(st.sampled_from(LENGTHS))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    lengths = [rng.choice([length, length, rng.randint(0, length)]) for _ in range(draw(st.integers(1, 6)))]
    return [rng.randbytes(size) for size in lengths], draw(st.integers(1, 4)) if parity is None else parity


# ---------------------------------------------------------------- encoding


@given(stripes())
def test_encoding_is_what_the_slow_one_says(stripe: tuple[list[bytes], int]) -> None:
    members, parity = stripe
    assert encode(members, parity) == slow_encode(members, parity)


@given(stripes(), st.data())
def test_pieces_in_any_order_make_the_same_parity(stripe: tuple[list[bytes], int], data: st.DataObject) -> None:
    members, parity = stripe
    pieces = []
    for number, member in enumerate(members):
        cuts = data.draw(st.lists(st.integers(0, len(member)), max_size=4).map(sorted))
        pieces += [(number, a, b) for a, b in itertools.pairwise([0, *cuts, len(member)])]
    rows = [bytearray(max(map(len, members))) for _ in range(parity)]
    some = data.draw(st.sets(st.integers(0, parity - 1)).map(sorted))
    others = [row for row in range(parity) if row not in some]
    code = Code(len(members), parity)
    for number, start, stop in data.draw(st.permutations(pieces)):
        for group in (some, others):  # the rows of a stripe are on different nodes: each updates its own
            views = [memoryview(rows[row])[start:] for row in group]
            code.update(number, memoryview(members[number])[start:stop], views, group)
    assert [bytes(row) for row in rows] == encode(members, parity)


@given(stripes(parity=1))
def test_one_row_is_plain_xor(stripe: tuple[list[bytes], int]) -> None:
    members, _ = stripe
    longest = max(map(len, members))
    xor = bytes(longest)
    for member in members:
        padded = member + bytes(longest - len(member))
        xor = bytes(a ^ b for a, b in zip(xor, padded, strict=True))
    assert encode(members, 1) == [xor]


def test_parity_of_a_single_member_is_a_copy() -> None:
    member = random.Random(3).randbytes(1000)
    assert encode([member], 4) == [member] * 4


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    rng = random.Random(4)
    members = [rng.randbytes(100) for _ in range(5)]
    assert encode(members, 4)[:2] == encode(members, 2)


def test_bytes_beyond_the_stripe() -> None:
    """Encoding writes the whole row, an update leaves what is behind its chunk alone."""
    row = bytearray(b"\xff" * 100)
    Code(2, 1).encode([b"abc", b"a"], [row])
    assert bytes(row) == bytes([0, *b"bc"]) + bytes(97)
    row = bytearray(b"\xff" * 100)
    Code(2, 1).update(1, b"\xff" * 40, [row], [0])
    assert bytes(row) == bytes(40) + b"\xff" * 60


# ---------------------------------------------------------------- decoding


def decode(
    data: int, blocks: dict[int, bytes], lost: Sequence[int], lengths: Sequence[int], parity: int
) -> list[bytes]:
    out = [bytearray(b"\xaa" * length) for length in lengths]
    Code(data, parity).decode(blocks, lost, out)
    return [bytes(buffer) for buffer in out]


@pytest.mark.parametrize(("data", "parity"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 2), (3, 4), (6, 3), (8, 4)])
@pytest.mark.parametrize("uneven", [False, True])
def test_every_loss_of_few_enough_blocks_is_made_good(data: int, parity: int, uneven: bool) -> None:
    rng = random.Random(data * 10 + parity)
    members = [rng.randbytes(rng.choice([0, 5, 64, 129]) if uneven else 129) for _ in range(data)]
    blocks = dict(enumerate([*members, *encode(members, parity)]))
    for count in range(1, parity + 1):
        for lost in itertools.combinations(blocks, count):
            left = {number: block for number, block in blocks.items() if number not in lost}
            got = decode(data, left, lost, [len(blocks[number]) for number in lost], parity)
            assert got == [blocks[number] for number in lost]


@given(stripes(), st.data())
def test_any_members_at_any_lengths(stripe: tuple[list[bytes], int], data: st.DataObject) -> None:
    members, parity = stripe
    blocks = dict(enumerate([*members, *slow_encode(members, parity)]))
    lost = data.draw(st.sets(st.sampled_from(sorted(blocks)), max_size=parity).map(sorted))
    left = {number: block for number, block in blocks.items() if number not in lost}
    got = decode(len(members), left, lost, [len(blocks[number]) for number in lost], parity)
    assert got == [blocks[number] for number in lost]


@pytest.mark.parametrize(("data", "parity"), [(32, 4), (128, 127), (251, 4), (254, 1)])
def test_wide_stripes(data: int, parity: int) -> None:
    rng = random.Random(data)
    members = [rng.randbytes(40) for _ in range(data)]
    blocks = dict(enumerate([*members, *encode(members, parity)]))
    for _ in range(3):
        lost = sorted(rng.sample(sorted(blocks), parity))
        left = {number: block for number, block in blocks.items() if number not in lost}
        assert decode(data, left, lost, [40] * parity, parity) == [blocks[number] for number in lost]


def test_threads_may_share_a_code() -> None:
    rng = random.Random(9)
    members = [rng.randbytes(100_001) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: encode(members, 2), range(16)))
    assert all(result == results[0] for result in results)


# ---------------------------------------------------------------- what is refused


def test_wrong_shapes() -> None:
    for shape in [(0, 1), (1, -1), (200, 56)]:
        with pytest.raises(ValueError, match="members and"):
            Code(*shape)


def test_wrong_buffers() -> None:
    code = Code(2, 1)
    with pytest.raises(ValueError, match="1 members and 1 rows for a code of 2 and 1"):
        code.encode([b"a"], [bytearray(1)])
    with pytest.raises(ValueError, match="room for 1 bytes, but 2 bytes"):
        code.encode([b"a", b"bc"], [bytearray(1)])
    with pytest.raises(ValueError, match="read-only"):
        code.encode([b"a", b"b"], [b"c"])
    with pytest.raises(ValueError, match="room for 1 bytes, but 2 bytes"):
        code.update(0, b"ab", [bytearray(1)], [0])
    with pytest.raises(IndexError, match="member 2"):
        code.update(2, b"a", [bytearray(1)], [0])
    with pytest.raises(IndexError, match=r"rows \[1\]"):
        code.update(0, b"a", [bytearray(1)], [1])
    with pytest.raises(ValueError, match="it takes 2 of 3"):
        code.decode({1: b"a"}, [0], [bytearray(1)])
    with pytest.raises(ValueError, match="2 buffers for the 1 blocks"):
        code.decode({1: b"a", 2: b"b"}, [0], [bytearray(1), bytearray(1)])
    with pytest.raises(IndexError, match="a code that has 3"):
        code.decode({1: b"a", 2: b"b"}, [3], [bytearray(1)])


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_shipped", list)
    monkeypatch.setattr(erasure, "_SYSTEM_LIBRARY", "libno-such-thing.so")
    with pytest.raises(ErasureLibraryMissing, match=r"pip install 'pyeclib"):
        erasure._library.__wrapped__()


def test_pyeclib_itself_is_not_imported() -> None:
    program = (
        "import sys; from everstep.checkpointing.access.erasure import Code; Code(2, 1); "
        "assert not [name for name in sys.modules if 'eclib' in name]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
