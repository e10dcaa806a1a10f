"""Shard records and snapshot segments: what goes in comes out, what is torn or flipped does not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everstep.checkpointing.memory.record import ShardRecord, read_record
from everstep.checkpointing.memory.segment import Segment, plan_entries

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool", "complex64")
NAMES = st.text(min_size=1, max_size=12)


@st.composite
def tensors(draw) -> Tensor:
    """Any dtype and shape, 0-dimensional and empty ones too, any bits."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).view(shape)
    size = count * torch.empty(0, dtype=dtype).element_size()
    data = draw(st.binary(min_size=size, max_size=size))
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
STATES = st.dictionaries(NAMES, tensors() | PLAIN, max_size=5)


def same(left: Tensor, right: Tensor) -> bool:
    def bits(tensor: Tensor) -> bytes:
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


@given(STATES)
def test_a_record_comes_back_bit_for_bit(state: dict[str, object]) -> None:
    record = ShardRecord(state)
    out = bytearray(b"\xff" * (record.length + 128))
    checksum = record.write(memoryview(out), seed=5)
    assert checksum == xxhash.xxh3_64_intdigest(out[: record.length], 5)
    assert out[record.length :] == b"\xff" * 128
    again = read_record(bytes(out[: record.length]))
    assert again.keys() == state.keys()
    backwards = ShardRecord(dict(reversed(state.items())))
    other = bytearray(backwards.length)
    assert backwards.write(memoryview(other), seed=5) == checksum, "equal states have equal records"
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert same(again[name], value)
        else:
            assert again[name] == value
            assert type(again[name]) is type(value)


def test_a_view_with_strides_is_recorded_as_it_reads() -> None:
    state = {"value": torch.arange(12.0).view(3, 4).t()}
    out = bytearray(ShardRecord(state).length)
    ShardRecord(state).write(memoryview(out))
    assert torch.equal(read_record(bytes(out))["value"], state["value"])


def test_what_is_no_record() -> None:
    with pytest.raises(ValueError, match="does not begin with its contents"):
        read_record(b"\x08" + b"\0" * 7 + b"not JSON")


SIZES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5)


@given(SIZES, st.integers(2, 4))
def test_slots_do_not_overlap(sizes: list[tuple[int, int]], states: int) -> None:
    segment = Segment.create([(shard, *pair) for shard, pair in enumerate(sizes)], states)
    places = []
    for shard, entry in segment.entries.items():
        places.append((entry.offset, entry.offset + 32 * (states + 2)))
        for slot in range(states + 2):
            start = segment.open_slot(shard, slot, 0)
            places.append((start, start + sizes[shard][slot >= states]))
    places.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert places[-1][1] <= plan_entries([(i, *pair) for i, pair in enumerate(sizes)], states)[1]
    segment.close()


@given(st.binary(min_size=1, max_size=200), st.integers(0, 3), st.integers(0, 9), st.data())
def test_a_slot_is_valid_only_when_sealed_and_whole(data: bytes, slot: int, version: int, draw: st.DataObject) -> None:
    segment = Segment.create([(7, 200, 200), (8, 10, 10)])
    assert segment.stored(7, slot) is None
    start = segment.open_slot(7, slot, len(data))
    written = draw.draw(st.integers(0, len(data)))
    segment.memory[start : start + written] = data[:written]
    assert segment.stored(7, slot) is None, "torn: not sealed"
    segment.memory[start : start + len(data)] = data
    segment.seal_slot(7, slot, version, len(data))
    stored = segment.stored(7, slot)
    assert stored is not None
    assert (stored.version, segment.read(stored)) == (version, data)
    assert [segment.stored(7, other) for other in range(4) if other != slot] == [None] * 3
    assert segment.newest() == (version if slot < 2 else -1)
    if slot < 2:
        assert segment.find(7, version) == stored
        assert segment.find(7, version + 1) is None
        assert segment.free_slot(7, (version,)) == 1 - slot
        header = segment.entries[7].offset + 32 * slot + draw.draw(st.integers(0, 23))
        was = segment.memory[header]
        segment.memory[header] = was ^ 1 << draw.draw(st.integers(0, 7))
        damaged = segment.stored(7, slot)
        assert damaged is None or segment.read(damaged) is None, "a flipped bit in a header is seen"
        segment.memory[header] = was
    flipped = start + draw.draw(st.integers(0, len(data) - 1))
    segment.memory[flipped : flipped + 1] = bytes([segment.memory[flipped] ^ 1 << draw.draw(st.integers(0, 7))])
    assert segment.read(stored) is None, "a flipped bit is seen"
    segment.open_slot(7, slot, len(data))
    assert segment.stored(7, slot) is None, "torn: being written again"
    segment.close()


@given(st.integers(11, 500), st.integers(0, 3))
def test_what_does_not_fit_a_slot_is_refused(length: int, slot: int) -> None:
    segment = Segment.create([(1, 10, 10)])
    capacity = 64  # slots are aligned
    if length > capacity:
        with pytest.raises(ValueError, match=r"needs \d+ bytes in slot"):
            segment.open_slot(1, slot, length)
    else:
        segment.open_slot(1, slot, length)
    segment.close()
