"""Streams: the samples of a micro-batch from an iterable dataset, as a function of the step.

The micro-batches of a step are its *slots*. A stream is read in *units*: the samples of one micro-batch. A plain
dataset is one stream, whose unit n is the micro-batch in slot n % slots of step n // slots. A dataset that reads
`run.stream_index` divides itself: each slot has a stream of its own, whose unit n belongs to step n. So a rank that
takes over a slot reads as far as the step that it is at, and drops what it does not need. Of a plain dataset with a
`state_dict`, the state in front of each step is part of the job's state, and reading begins with the last one.

Units are read one by one, each with generators that are seeded for it, so a sample does not depend on who has read the
ones before it, or how often.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.protocol.liveness import Pace

from .devices import generators_kept, seed_generators
from .order import derive_seed

KEPT_STEPS = 2  # whose units are kept: the step under way, and the one that is read ahead
KEPT_STATES = 3  # of a dataset, in front of these steps and of the next
STREAM = "run.stream"  # its name among the registered objects


class StreamPlace:
    """Which stream the code of a dataset is to give, while it runs: `run.stream_index` and `run.stream_count`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = False  # the dataset divides itself
        self._place: tuple[int, int] | None = None

    @contextlib.contextmanager
    def within(self, index: int, count: int) -> Iterator[None]:
        """The dataset's code runs meanwhile."""
        self._place = index, count
        try:
            yield
        finally:
            self._place = None

    @property
    def index(self) -> int:
        index, _ = self._current("stream_index")
        self.asked = True
        return index

    @property
    def count(self) -> int:
        return self._current("stream_count")[1]

    def _current(self, name: str) -> tuple[int, int]:
        if self._place is None:
            raise UsageError(
                f"run.{name} has a value only while a torch.utils.data.IterableDataset that was passed to run.prepare "
                "or run.steps is iterated over: read it in its __iter__"
            )
        return self._place


class Line:
    """One pass over a dataset, by units of `size` samples. It goes forward; to go back it begins again.

    With `every`, the dataset's state in front of each so many units is kept, for going back to.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        size: int,
        seed: int,
        place: StreamPlace,
        where: tuple[int, int],
        every: int,
    ) -> None:
        self._dataset = dataset
        self._size = size
        self._seed = seed
        self._place = place
        self._where = where
        self._samples: Iterator[Any] | None = None
        self._position = 0  # the next unit to be read
        self._end: int | None = None  # the first unit that is not whole
        self._kept: dict[int, list[Any]] = {}
        self._every = every
        self._current: Any = None  # the copy of the dataset that is iterated over
        self._states: dict[int, Any] = {}  # unit -> the dataset's state in front of it

    def unit(self, number: int, keep: int) -> list[Any] | None:
        """The samples of a unit; None if the dataset ends before the last of them.

        This many units are kept, the last ones, so that they need not be read again.
        """
        if number not in self._kept and number < self._position:
            self._go_back(number)
        while number not in self._kept and (self._end is None or number < self._end):
            self._read(keep)
        return self._kept.get(number)

    def state(self, number: int, keep: int) -> Any:
        """The dataset's state in front of a unit, which is read up to there; None in front of the first."""
        if number and number not in self._states:
            if self._position > number:
                self._go_back(number)
            while self._position < number and self._end is None:
                self._read(keep)
            self._note_state()
        return self._states.get(number)

    def restore(self, number: int, state: Any) -> None:
        """Go on in front of a unit, with the dataset in this state."""
        self._states = {number: state} if number else {}
        self._samples, self._position, self._end = None, number, None

    def _go_back(self, number: int) -> None:
        self._position = max((at for at in self._states if at <= number), default=0)
        self._samples = None

    def _note_state(self) -> None:
        if self._samples is None or self._position in self._states:
            return
        copied = decode(encode(self._current.state_dict(), "the state_dict() of the stream"))
        self._states[self._position] = copied
        if len(self._states) > KEPT_STATES:
            del self._states[next(iter(self._states))]

    def _read(self, keep: int) -> None:
        number = self._position
        self._place.progress.tick()
        with self._place.within(*self._where):
            if self._samples is None:
                self._current = copy.copy(self._dataset)  # a dataset may keep its position in itself
                if number:
                    self._current.load_state_dict(copy.deepcopy(self._states[number]))
                seed_generators(derive_seed("stream", self._seed, self._where[0]))
                self._samples = iter(self._current)
            elif self._every and number % self._every == 0:
                self._note_state()
            seed_generators(derive_seed("stream", self._seed, self._where[0], number))
            found = list(islice(self._samples, self._size))
        if len(found) < self._size:
            self._end = number
            return
        self._kept[number] = found
        self._kept.pop(number - keep, None)
        self._position = number + 1


class Streams:
    """The streams of a job's slots. `size`: how many items of the dataset make up a micro-batch."""

    def __init__(self, dataset: Iterable[Any], size: int, slots: int, seed: int, place: StreamPlace) -> None:
        self._dataset = dataset
        self._size = size
        self._slots = slots
        self._seed = seed
        self._place = place
        first = self._new(0)
        self.first = self.again(first)
        self._divided = place.asked
        methods = (getattr(dataset, name, None) for name in ("state_dict", "load_state_dict"))
        self.stateful = not self._divided and all(map(callable, methods))
        if self.stateful:  # copies may share what holds their states: the one in use is begun last
            first = self._new(0, every=slots)
        self._lines = {0: first}

    def _new(self, slot: int, every: int = 0) -> Line:
        return Line(self._dataset, self._size, self._seed, self._place, (slot, self._slots), every)

    def again(self, line: Line | None = None) -> list[Any] | None:
        """The samples of the first micro-batch, read again from the beginning; None if there are fewer."""
        return (line or self._new(0)).unit(0, KEPT_STEPS * self._slots)

    def samples(self, step: int, slot: int) -> list[Any] | None:
        """The samples of a micro-batch; None if its stream has ended."""
        if self._divided:
            if slot not in self._lines:
                self._lines[slot] = self._new(slot)
            return self._lines[slot].unit(step, KEPT_STEPS)
        found = self._lines[0].unit(step * self._slots + slot, KEPT_STEPS * self._slots)
        if self._place.asked:
            raise UsageError(
                "run.stream_index was read behind the first sample of the stream, which is divided already: read it at "
                "the beginning of __iter__"
            )
        return found

    def state(self, version: int) -> dict[str, Any]:
        """The dataset's state in front of the step of this version, and how many units are in front of it."""
        unit = version * self._slots
        with generators_kept(), self._place.progress.within(Pace.FETCH):
            state = self._lines[0].state(unit, KEPT_STEPS * self._slots)
        return {"unit": unit if state is not None else 0, "state": state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._lines[0].restore(state["unit"], state["state"])


class StreamState:
    """The state of a stream as a registered object: that in front of the step that the job is at."""

    def __init__(self, streams: Streams, version: Callable[[], int]) -> None:
        self._streams = streams
        self._version = version

    def state_dict(self) -> dict[str, Any]:
        return self._streams.state(self._version())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._streams.restore(state)
