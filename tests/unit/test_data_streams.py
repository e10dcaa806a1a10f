"""Streams as the data of a job: loaders, the place of a stream, the end of one, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import Settings
from everstep.elastic.contract.stateful import decode
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.streams import StreamPlace

SETTINGS = Settings(steps=9, global_batch_size=8, micro_batch_size=2)


class Numbers(torch.utils.data.IterableDataset[Any]):
    def __init__(self, count: int, place: StreamPlace | None = None, late: bool = False) -> None:
        self.count = count
        self.place = place
        self.late = late

    def __iter__(self) -> Iterator[Any]:
        first, step = 0, 1
        if self.place and not self.late:
            first, step = self.place.index, self.place.count
        for number in range(first, self.count, step):
            yield number
            assert not self.late or self.place is None or self.place.index >= 0


class Batches(Numbers):
    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield torch.tensor([2 * number, 2 * number + 1])


class Told:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, what: str, fields: Mapping[str, Any]) -> None:
        self.texts.append(f"{fields['notice']}: {fields['text']}")


def place() -> StreamPlace:
    return StreamPlace(Progress(None, 0, 1, []))


made: list[DataSource] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


def source(data: Any, settings: Settings = SETTINGS, told: Told | None = None, at: StreamPlace | None = None) -> Any:
    made.append(DataSource(data, settings, None, told or Told(), at or place()))
    return made[-1]


@pytest.mark.parametrize(
    "data",
    [
        Numbers(40),
        DataLoader(Numbers(40), batch_size=2),
        DataLoader(Batches(20), batch_size=None),
        DataLoader(Numbers(40), batch_size=2, num_workers=1),
        DataLoader(Batches(20), batch_size=None, num_workers=2),
        DataLoader(Numbers(40), batch_size=8),
    ],
)
def test_a_loader_and_its_dataset_give_the_same(data: Any) -> None:
    told = Told()
    found = source(data, told=told)
    keys = [(step, micro_batch) for step in range(5) for micro_batch in range(4)]
    batches = [found.fetch(*key, partial(iter, keys)).tolist() for key in keys]
    assert batches == [[2 * number, 2 * number + 1] for number in range(20)]
    described = found.described()
    assert (described["samples"], described["shuffle"], len(described["sample_digests"])) == (0, False, 1)
    workers = "setting-ignored: the DataLoader has num_workers=2, and one process reads its stream ahead: several would"
    assert [text for text in told.texts if not text.startswith(workers)] == []
    assert bool(told.texts) == (getattr(data, "num_workers", 0) == 2)


@pytest.mark.parametrize("data", [Numbers(40), DataLoader(Batches(20), batch_size=None)])
def test_a_batch_that_the_script_changes_is_fetched_again_as_it_was(data: Any) -> None:
    found = source(data)
    found.fetch(1, 0).mul_(-1)
    assert found.fetch(1, 0).tolist() == [8, 9]


def test_a_dataset_that_divides_itself_has_a_stream_for_each_micro_batch() -> None:
    at = place()
    found = source(Numbers(40, at), at=at)
    assert [found.fetch(1, micro_batch).tolist() for micro_batch in (3, 0)] == [[11, 15], [8, 12]]


def test_the_end_is_seen_one_step_ahead() -> None:
    """By the rank whose micro-batch is missing; the generators stay as they were."""
    told = Told()
    found = source(Numbers(22), told=told)

    def numbers(*wanted: int) -> list[tuple[int, int]]:
        return [(step, micro_batch) for step in range(9) for micro_batch in wanted]

    for step in range(2):
        found.fetch(step, 1)
        before = torch.get_rng_state()
        assert found.ends(step, lambda: numbers(1, 2)) == ""
        assert torch.equal(torch.get_rng_state(), before)
    assert found.ends(0, lambda: numbers(0, 3)) == ""
    assert found.ends(1, lambda: numbers(0, 3)) == "the stream has ended"
    assert told.texts == [
        "stream-ended: the stream has ended, and training ends after step 1, in front of the last of the job"
    ]
    with pytest.raises(UsageError, match="Numbers ended before it had the samples of micro-batch 3 of step 2"):
        found.fetch(2, 3)


class Counting(Numbers):
    """Random samples, with a state that says how many were given; it notes where each iteration begins, and how far
    it has come.
    """

    def __init__(self, count: int, place: StreamPlace, log: Path) -> None:
        super().__init__(count, place)
        self.given = 0
        self.log = log

    def __iter__(self) -> Iterator[Any]:
        assert self.place is not None
        number = self.place.index
        self.write(f"{os.getpid()} begins {number} {self.given}")
        while self.given < self.count:
            self.given += 1
            self.write(f"{os.getpid()} gives {number} {self.given}")
            yield torch.rand(()) + 100 * number + self.given

    def write(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line + "\n")

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.given = state["given"]

    def lines(self, what: str) -> list[tuple[int, int, int]]:
        """(process, stream, how many were given), of what it has noted."""
        found = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(pid), int(number), int(given)) for pid, how, number, given in found if how == what]


def counting(log: Path, workers: int, told: Told | None = None) -> tuple[Any, Counting]:
    at = place()
    numbers = Counting(60, at, log)
    return source(DataLoader(numbers, batch_size=2, num_workers=workers), told=told, at=at), numbers


def test_states_are_those_of_what_was_handed_out(tmp_path: Path) -> None:
    """Not of what worker processes have read ahead; one that is killed goes on with the states that were agreed on."""
    told = Told()
    expected, _ = counting(tmp_path / "here", 0)
    found, numbers = counting(tmp_path / "there", 2, told)
    said: list[Any] = []
    upcoming: dict[Any, Any] = {}

    def share(data: Any, step: int) -> dict[str, Any]:
        def exchange(text: str) -> dict[int, str]:
            said.append(text)
            return {0: text, 1: said[0]}

        registered: dict[str, Any] = {}
        data.share_states(step, registered, exchange, upcoming[data])
        return registered

    for step in range(30):
        mine = (0, 1, 2) if step < 20 else (0, 1, 2, 3)  # the last is taken over from another rank
        for data, slots in ((expected, (0, 1, 2, 3)), (found, mine)):
            upcoming[data] = partial(iter, [(later, slot) for later in range(step, 30) for slot in slots])
        if step == 21:
            readers = multiprocessing.active_children()
            assert len(readers) == 2
            readers[0].kill()
            readers[0].join()
            killed = len(numbers.lines("begins"))
        batches = [expected.fetch(step, slot) for slot in range(4)]
        for slot in mine:
            assert torch.equal(found.fetch(step, slot, upcoming[found]), batches[slot]), (step, slot)
        said.clear()
        assert [data.ends(step, upcoming[data]) for data in (expected, found)] == ["", ""]
        assert share(expected, step) == share(found, step)
        assert bool(said) == (step in (8, 16, 24))
        if said:
            whole, own = (decode(json.loads(text)) for text in said)
            assert own == {slot: whole[slot] for slot in map(str, mine)}
    begun = [(number, given) for _, number, given in numbers.lines("begins")]
    assert (3, 2 * 16) in begun[:killed], "who takes over begins with the state that was agreed on"
    assert [given for _, given in begun[killed:]] == [2 * 16] * 2, "two streams go on behind step 16"
    assert [text.split(":")[0] for text in told.texts] == ["data-worker-lost"]


def test_processes_outlive_a_change_of_the_membership(tmp_path: Path) -> None:
    """They are asked for other micro-batches next, and have not forgotten those of a step that is computed again."""
    found, numbers = counting(tmp_path / "log", 2)
    expected, _ = counting(tmp_path / "here", 0)
    first = len(numbers.lines("begins"))
    slots = {0: (0, 1), 1: (0, 1), 2: (0, 1, 2, 3), 3: (0, 1, 2, 3), 4: (3,), 5: (3,)}
    for step, mine in slots.items():
        keys = [(later, slot) for later in range(step, 9) for slot in mine]
        for slot in (*mine, mine[0]):
            assert torch.equal(found.fetch(step, slot, partial(iter, keys)), expected.fetch(step, slot)), (step, slot)
    begun = numbers.lines("begins")[first:]
    assert sorted(number for _, number, _ in begun) == [0, 1, 2, 3], "each stream was begun once"
    assert len({pid for pid, _, _ in begun}) == 2


def test_the_end_is_seen_by_processes_that_read_ahead() -> None:
    found = source(DataLoader(Numbers(22), batch_size=2, num_workers=1))
    upcoming = partial(iter, [(step, slot) for step in range(9) for slot in range(4)])
    found.fetch(0, 3, upcoming)
    assert found.ends(0, upcoming) == ""
    assert found.ends(1, upcoming) == "the stream has ended"
    assert found.fetch(1, 3).tolist() == [14, 15]
    with pytest.raises(UsageError, match="Numbers ended before it had the samples of micro-batch 3 of step 2"):
        found.fetch(2, 3)


def test_a_dataset_with_a_length_does_not_end() -> None:
    assert source(list(range(10))).ends(7, lambda: [(8, 0)]) == ""


def test_a_stream_that_gives_other_samples_each_time_is_noticed() -> None:
    class Shared(Numbers):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            self.numbers = iter(range(count))

        def __iter__(self) -> Iterator[Any]:
            return self.numbers

    told = Told()
    assert source(Shared(40), told=told).described()["sample_digests"] == []
    assert told.texts[0].startswith("data-not-repeatable: the dataset gives another sample")


def test_streams_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UsageError, match=r"epochs=3 needs a dataset with a length, and Numbers is a stream: give step"):
        source(Numbers(40), Settings(epochs=3, global_batch_size=8, micro_batch_size=2))
    with pytest.raises(UsageError, match="Numbers ended before it had the samples of micro-batch 0 of step 0"):
        source(Numbers(1))
    with pytest.raises(
        UsageError,
        match=r"batch_size=4, which is neither the job's micro_batch_size \(2\) nor its global_batch_size \(8\)",
    ):
        source(DataLoader(Numbers(40), batch_size=4))
    with pytest.raises(UsageError, match=r"map-style \(have __len__ and __getitem__\) or a torch.* got list_iterator"):
        source(iter([1, 2]))


def test_the_place_of_a_stream_is_read_at_its_beginning() -> None:
    at = place()
    with pytest.raises(UsageError, match=r"run.stream_index has a value only while a torch"):
        assert at.index
    with pytest.raises(UsageError, match=r"run.stream_count has a value only while a torch"):
        assert at.count
    found = source(Numbers(40, at, late=True), Settings(steps=9, global_batch_size=8, micro_batch_size=1), at=at)
    with pytest.raises(UsageError, match=r"run.stream_index was read behind the first sample"):
        found.fetch(0, 1)


@pytest.mark.parametrize("size", [2, 8])
def test_a_loader_has_the_size_of_the_micro_batch_or_of_the_batch(size: int) -> None:
    """Either way a micro-batch is fetched, by the worker processes as well."""
    numbers = list(range(16))
    for workers in (0, 1):
        found = source(DataLoader(numbers, batch_size=size, num_workers=workers))  # type: ignore[arg-type]
        keys = [(0, 0), (0, 1)]
        assert [found.fetch(*key, partial(iter, keys)).tolist() for key in keys] == [[0, 1], [2, 3]]


class Broken(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OSError("a picture that is none")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_skipped(workers: int) -> None:
    told = Told()
    found = source(DataLoader(Broken(), batch_size=2, num_workers=workers), replace(SETTINGS, skip_bad_samples=1), told)
    keys = [(0, 2), (2, 2)]
    assert [found.fetch(*key, lambda: keys).tolist() for key in keys] == [[4, 6], [4, 6]]
    assert told.texts == [
        "sample-skipped: sample 5 of the dataset (Broken) cannot be read, and the next one takes its place: OSError: a "
        "picture that is none"
    ]


def test_more_samples_than_allowed_cannot_be_read() -> None:
    class Sparse(Broken):
        def __getitem__(self, index: int) -> Any:
            if index % 4 == 1:
                raise OSError(f"no {index}")
            return index

    found = source(DataLoader(Sparse(), batch_size=2), replace(SETTINGS, skip_bad_samples=2))
    assert [found.fetch(0, number).tolist() for number in range(3)] == [[0, 2], [2, 3], [4, 6]]
    with pytest.raises(UsageError, match=r"^skip_bad_samples=2: 3 samples of the dataset \(Sparse\) could not be read"):
        found.fetch(1, 0)
    with pytest.raises(UsageError, match="is a stream, which cannot continue after an exception"):
        source(Numbers(40), replace(SETTINGS, skip_bad_samples=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    found = source(DataLoader(Broken(), batch_size=2, num_workers=workers))
    with pytest.raises(OSError, match="a picture that is none") as caught:
        found.fetch(0, 2, lambda: [(0, 2)])
    text = "".join(traceback.format_exception(caught.value))
    assert "everstep: this is sample 5 of the dataset (Broken)" in text
