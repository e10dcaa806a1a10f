"""Streams: whatever a rank reads, in whatever order, it is what one process reads that goes through the stream once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.step.streams import StreamPlace, Streams

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

    def __init__(self, count: int) -> None:
        super().__init__(count, None)
        self.state: dict[str, Any] = {"number": 0, "ahead": []}

    def __iter__(self) -> Iterator[Noted]:
        state = self.state
        while state["number"] < self.count:
            if not state["ahead"]:
                state["ahead"] = [random.random() for _ in range(3)]
            number, noise = state["number"], state["ahead"].pop(0) + float(torch.rand(()))
            state["number"] += 1
            Stateful.given += 1
            yield 0, number, noise
        state["number"] = self.count

    def __copy__(self) -> Stateful:
        return Stateful(self.count)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def streams(count: int, size: int, slots: int, divided: bool) -> Streams:
    place = StreamPlace(Progress(None, 0, 1, []))
    return Streams(Numbers(count, place if divided else None), size, slots, 7, place)


def one_after_another(count: int, size: int, slots: int, divided: bool) -> dict[tuple[int, int], Any]:
    """(step, slot) -> samples, read once from the first to the last whole one."""
    source = streams(count, size, slots, divided)
    keys = [(step, slot) for step in range(count) for slot in range(slots)]
    found = {key: source.samples(*key) for key in keys}
    return {key: samples for key, samples in found.items() if samples is not None}


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.booleans())


@given(SHAPES, st.data())
def test_any_way_through_a_stream_gives_the_same_samples(shape: tuple[int, int, int, bool], data: Any) -> None:
    """A rank that takes over slots, goes back, and skips; what is behind the end is behind the end for it, too."""
    count, size, slots, _ = shape
    expected = one_after_another(*shape)
    source = streams(*shape)
    key = st.tuples(st.integers(0, count // (size * slots) + 1), st.integers(0, slots - 1))
    for step, slot in data.draw(st.lists(key, max_size=25)):
        assert source.samples(step, slot) == expected.get((step, slot))


@given(SHAPES)
def test_every_sample_is_in_one_micro_batch(shape: tuple[int, int, int, bool]) -> None:
    """In the order of the stream, unless it divides itself; only what fills no micro-batch is left out."""
    count, size, slots, divided = shape
    batches = one_after_another(*shape)
    numbers = [number for samples in batches.values() for _, number, _ in samples]
    assert len(set(numbers)) == len(numbers)
    assert all(len(samples) == size for samples in batches.values())
    if divided:
        assert all(stream == slot for (_, slot), samples in batches.items() for stream, _, _ in samples)
        assert len(numbers) > count - size * slots
    else:
        assert numbers == list(range(count - count % size))


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(2, 30))
def test_few_micro_batches_are_remembered(slots: int, size: int, divided: bool, steps: int) -> None:
    source = streams(1000, size, slots, divided)
    for step in range(steps):
        for slot in range(slots):
            source.samples(step, slot)
    kept = [len(line._kept) for line in source._lines.values()]
    assert sum(kept) <= 2 * slots


@given(st.integers(4, 40), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_state_takes_the_place_of_what_was_read(count: int, size: int, slots: int, data: Any) -> None:
    """In a new process and in one that goes back: the same samples, and few are read again."""
    expected = one_after_another(count, size, slots, False)
    steps = list(range(count // (size * slots)))
    place = StreamPlace(Progress(None, 0, 1, []))
    states: dict[int, Any] = {}
    for at in data.draw(st.lists(st.sampled_from([-1, *steps]), max_size=12)):
        if at < 0 or not states:  # a process that joins
            source = Streams(Stateful(count), size, slots, 7, place)
        begin = data.draw(st.sampled_from(sorted(states))) if states else 0
        if states:
            source.restore(states[begin])
        Stateful.given = 0
        for step in range(begin, min(begin + 2, len(steps))):
            for slot in data.draw(st.permutations(range(slots)))[: data.draw(st.integers(0, slots))]:
                assert source.samples(step, slot) == expected[step, slot]
            if data.draw(st.booleans()):  # looks ahead before the state is agreed on
                assert source.samples(step + 1, slots - 1) == expected.get((step + 1, slots - 1))
            states[step] = decode(encode(source.state(step), "the state"))
        assert Stateful.given <= 3 * slots * size, "of the steps that were asked for, once"
