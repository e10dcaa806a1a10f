"""Streams: whatever a rank reads, in whatever order, it is what one process reads that goes through the stream once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.step.streams import STATE_STEPS, StreamPlace, Streams

Noted = tuple[int, int, float]  # stream, number, a random number of the sample


class Numbers(torch.utils.data.IterableDataset[Noted]):
    """Numbers with noise, in batches of three that it draws at once; its position is in the object."""

    def __init__(self, count: int, place: StreamPlace | None) -> None:
        self.count = count
        self.place = place

    def __iter__(self) -> Iterator[Noted]:
        self.number, stream, step = 0, 0, 1
        if self.place is not None:
            stream, step = self.place.index, self.place.count
        while self.number * step + stream < self.count:
            ahead = [random.random() for _ in range(3)]
            for noise in ahead:
                if self.number * step + stream < self.count:
                    yield stream, self.number * step + stream, noise + float(torch.rand(()))
                    self.number += 1


class Stateful(Numbers):
    """The same, with a state in which the numbers that were drawn at once are; it counts what it has given."""

    given = 0

    def __init__(self, count: int, place: StreamPlace | None) -> None:
        super().__init__(count, place)
        self.state: dict[str, Any] = {"number": 0, "ahead": []}

    def __iter__(self) -> Iterator[Noted]:
        state = self.state
        stream, step = (self.place.index, self.place.count) if self.place is not None else (0, 1)
        while (number := state["number"] * step + stream) < self.count:
            if not state["ahead"]:
                state["ahead"] = [random.random() for _ in range(3)]
            noise = state["ahead"].pop(0) + float(torch.rand(()))
            state["number"] += 1
            Stateful.given += 1
            yield stream, number, noise

    def __copy__(self) -> Stateful:
        return Stateful(self.count, self.place)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def streams(count: int, size: int, micro_batches: int, divided: bool) -> Streams:
    place = StreamPlace(Progress(None, 0, 1, []))
    return Streams(Numbers(count, place if divided else None), size, micro_batches, 7, place)


def one_after_another(count: int, size: int, micro_batches: int, divided: bool) -> dict[tuple[int, int], Any]:
    """(step, micro_batch) -> samples, read once from the first to the last whole one."""
    source = streams(count, size, micro_batches, divided)
    keys = [(step, micro_batch) for step in range(count) for micro_batch in range(micro_batches)]
    found = {key: source.samples(*key) for key in keys}
    return {key: samples for key, samples in found.items() if samples is not None}


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.booleans())


@given(SHAPES, st.data())
def test_any_way_through_a_stream_gives_the_same_samples(shape: tuple[int, int, int, bool], data: Any) -> None:
    """A rank that takes over micro-batches, goes back, and skips; the end is the end for it, too."""
    count, size, micro_batches, _ = shape
    expected = one_after_another(*shape)
    source = streams(*shape)
    key = st.tuples(st.integers(0, count // (size * micro_batches) + 1), st.integers(0, micro_batches - 1))
    for step, micro_batch in data.draw(st.lists(key, max_size=25)):
        assert source.samples(step, micro_batch) == expected.get((step, micro_batch))


@given(SHAPES)
def test_every_sample_is_in_one_micro_batch(shape: tuple[int, int, int, bool]) -> None:
    """In the order of the stream, unless it divides itself; only what fills no micro-batch is left out."""
    count, size, micro_batches, divided = shape
    batches = one_after_another(*shape)
    numbers = [number for samples in batches.values() for _, number, _ in samples]
    assert len(set(numbers)) == len(numbers)
    assert all(len(samples) == size for samples in batches.values())
    if divided:
        assert all(stream == micro_batch for (_, micro_batch), samples in batches.items() for stream, _, _ in samples)
        assert len(numbers) > count - size * micro_batches
    else:
        assert numbers == list(range(count - count % size))


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(2, 30))
def test_few_micro_batches_are_remembered(micro_batches: int, size: int, divided: bool, steps: int) -> None:
    source = streams(1000, size, micro_batches, divided)
    for step in range(steps):
        for micro_batch in range(micro_batches):
            source.samples(step, micro_batch)
    kept = [len(line._kept) for line in source._lines.values()]
    assert sum(kept) <= 2 * micro_batches


@given(st.integers(1, 2), st.integers(1, 4), st.booleans(), st.data())
def test_states_take_the_place_of_what_was_read(size: int, micro_batches: int, divided: bool, data: Any) -> None:
    """Ranks that deal out the micro-batches again, join and go back: the same samples, and few are read again."""
    steps = 2 * STATE_STEPS + 3
    count = steps * micro_batches * size
    expected = one_after_another(count, size, micro_batches, divided)

    def rank() -> Streams:
        place = StreamPlace(Progress(None, 0, 1, []))
        return Streams(Stateful(count, place if divided else None), size, micro_batches, 7, place)

    ranks = [rank(), rank()]
    agreed: dict[int, Any] = {0: ranks[0].state_dict()}  # the last states, by the step in front of which they were
    for step in range(steps):
        if data.draw(st.booleans()):
            joined = rank()
            joined.load_state_dict(decode(encode(agreed[max(agreed)], "the states")))
            ranks[data.draw(st.integers(0, 1))] = joined
        since, Stateful.given = step + 2 - max(agreed), 0
        cut = data.draw(st.integers(0, micro_batches))
        dealt = [range(cut), range(cut, micro_batches)]
        for source, mine in zip(ranks, dealt, strict=True):
            for micro_batch in mine:
                assert source.samples(step, micro_batch) == expected[step, micro_batch]
            for micro_batch in mine:  # a step ahead
                assert source.samples(step + 1, micro_batch) == expected.get((step + 1, micro_batch))
        if ranks[0].shares(step) and step + 1 < steps:
            found = [source.states(step, mine) for source, mine in zip(ranks, dealt, strict=True)]
            for source in ranks:
                source.agree(step, {**found[0], **found[1]})
            agreed[step] = ranks[0].state_dict()
            assert len(agreed[step]["states"]) == (micro_batches if divided else 1)
        assert Stateful.given <= len(ranks) * since * micro_batches * size
    back = data.draw(st.sampled_from(sorted(agreed)))
    ranks[0].load_state_dict(agreed[back])
    Stateful.given = 0
    assert ranks[0].samples(back, micro_batches - 1) == expected[back, micro_batches - 1]
    assert Stateful.given <= micro_batches * size


@pytest.mark.parametrize("divided", [False, True])
def test_a_rank_that_has_been_idle_reads_from_the_states_on(divided: bool) -> None:
    place = StreamPlace(Progress(None, 0, 1, []))
    busy, idle = (Streams(Stateful(200, place if divided else None), 2, 2, 7, place) for _ in range(2))
    assert idle.samples(0, 1) == busy.samples(0, 1)
    for step in range(STATE_STEPS + 1):
        busy.samples(step, 1)
    idle.agree(STATE_STEPS, busy.states(STATE_STEPS, [1]))
    expected = busy.samples(STATE_STEPS, 1)
    Stateful.given = 0
    assert idle.samples(STATE_STEPS, 1) == expected
    assert Stateful.given <= 4
