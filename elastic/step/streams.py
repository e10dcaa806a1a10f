"""Streams: the samples of a micro-batch from an iterable dataset, as a function of the step.

A stream is read in *units*: the samples of one micro-batch. A plain dataset is one stream: with M micro-batches in a
step, its unit n is micro-batch n % M of step n // M. A dataset that reads `run.stream_index` divides itself: there is a
stream for each micro-batch of a step, whose unit n belongs to step n. So a rank that takes over a micro-batch reads as
far as the step that it is at, and drops what it does not need. States of a dataset that has a `state_dict` are part of
the job's state, and reading begins with the last ones.

Units are read one by one, each with generators that are seeded for it, so a sample does not depend on who has read the
ones before it, or how often.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.protocol.liveness import Pace

from .devices import generators_kept, seed_generators
from .order import derive_seed

KEPT_STEPS = 2  # whose units are kept: the step under way, and the one that is read ahead
KEPT_STATES = 3  # of a line
STATE_STEPS = 8  # between two states that are agreed on
STREAM = "run.stream"  # its name among the registered objects


class StreamPlace:
    """Which stream the code of a dataset is to give, while it runs: `run.stream_index` and `run.stream_count`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = False  # the dataset divides itself
        self._left = False
        self._place: tuple[int, int] | None = None

    def leave_page(self) -> None:
        """In a worker process, which is no sign of life of its rank."""
        if not self._left:
            self.progress, self._left = Progress(None, 0, 1, []), True

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
        self.position = 0  # the next unit to be read
        self._end: int | None = None  # the first unit that is not whole
        self._kept: dict[int, list[Any]] = {}
        self._every = every
        self._current: Any = None  # the copy of the dataset that is iterated over
        self._states: dict[int, Any] = {}  # unit -> the dataset's state in front of it

    def unit(self, number: int, keep: int) -> list[Any] | None:
        """The samples of a unit; None if the dataset ends before the last of them.

        This many units are kept, the last ones, so that they need not be read again.
        """
        if number not in self._kept and number < self.position:
            self._go_back(number)
        while number not in self._kept and (self._end is None or number < self._end):
            self._read(keep)
        return self._kept.get(number)

    def state(self, number: int, keep: int) -> Any:
        """The dataset's state in front of a unit, which is read up to there; None in front of the first."""
        if number and number not in self._states:
            if self.position > number:
                self._go_back(number)
            while self.position < number and self._end is None:
                self._read(keep)
            self._note_state()
        return self._states.get(number)

    def restore(self, number: int, state: Any) -> None:
        """Continue before a unit, with the dataset in this state."""
        self._states = {number: state} if number else {}
        self._samples, self.position, self._end = None, number, None

    def _go_back(self, number: int) -> None:
        self.position = max((at for at in self._states if at <= number), default=0)
        self._samples = None

    def _note_state(self) -> None:
        if self._samples is None or self.position in self._states:
            return
        copied = decode(encode(self._current.state_dict(), "the state_dict() of the stream"))
        self._states[self.position] = copied
        if len(self._states) > KEPT_STATES:
            del self._states[next(iter(self._states))]

    def _read(self, keep: int) -> None:
        number = self.position
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
        self.position = number + 1


class Streams:
    """The streams of a job. `size`: how many items of the dataset make up a micro-batch.

    With a dataset that has a state, the states of all lines in front of a step are agreed on every STATE_STEPS steps:
    this object has them, as a registered one, and a line that this rank begins to read begins with them.
    """

    def __init__(self, dataset: Iterable[Any], size: int, micro_batches: int, seed: int, place: StreamPlace) -> None:
        self._dataset = dataset
        self._size = size
        self.micro_batches = micro_batches
        self._seed = seed
        self.place = place
        self.restored = 0  # how often it was given other states than were agreed on last
        self._kept_steps = KEPT_STEPS
        self._agreed: dict[str, Any] = {"step": 0, "states": {}}  # by line, as text
        self.first = self.again()
        self.divided = place.asked  # by the dataset itself: a line for each micro-batch of a step
        self._units = 1 if self.divided else micro_batches  # of a line, in a step
        methods = (getattr(dataset, name, None) for name in ("state_dict", "load_state_dict"))
        self.stateful = all(map(callable, methods))
        self._lines: dict[int, Line] = {}

    def read_ahead(self, steps: int) -> None:
        """So many steps more than else are read ahead: units are kept as long as their step may be computed again."""
        self._kept_steps = KEPT_STEPS + steps

    def again(self) -> list[Any] | None:
        """The samples of the first micro-batch, read from the beginning; None if there are fewer."""
        return Line(self._dataset, self._size, self._seed, self.place, (0, self.micro_batches), 0).unit(0, 1)

    def samples(self, step: int, micro_batch: int) -> list[Any] | None:
        """The samples of a micro-batch; None if its stream has ended."""
        if self._units == 1 < self.micro_batches:
            return self._line(micro_batch).unit(step, self._kept_steps)
        found = self._line(0).unit(step * self._units + micro_batch, self._kept_steps * self._units)
        if self.place.asked and self.micro_batches > 1:
            raise UsageError(
                "run.stream_index was read behind the first sample of the stream, which is divided already: read it at "
                "the beginning of __iter__"
            )
        return found

    def _line(self, index: int) -> Line:
        """A line; one that this rank has not read for long begins again with the state that was agreed on."""
        key = str(index)
        begin = self._agreed["step"] * self._units if key in self._agreed["states"] else 0
        if index not in self._lines or self._lines[index].position < begin:
            every = self._units * STATE_STEPS if self.stateful else 0
            line = Line(self._dataset, self._size, self._seed, self.place, (index, self.micro_batches), every)
            if begin:
                line.restore(begin, self._agreed["states"][key])
            self._lines[index] = line
        return self._lines[index]

    # ------------------------------------------------------------ states

    def shares(self, step: int) -> bool:
        """Whether the states in front of this step are agreed on."""
        return self.stateful and step > 0 and step % STATE_STEPS == 0

    def states(self, step: int, micro_batches: Collection[int]) -> dict[str, Any]:
        """The dataset's states in front of this step, of the lines of these micro-batches."""
        lines = set(micro_batches) if self._units < self.micro_batches else {0} if micro_batches else set()
        unit, keep = step * self._units, self._kept_steps * self._units
        with generators_kept(), self.place.progress.within(Pace.FETCH):
            found = {str(index): self._line(index).state(unit, keep) for index in sorted(lines)}
        return {index: state for index, state in found.items() if state is not None}

    def agree(self, step: int, states: Mapping[str, Any]) -> None:
        """All ranks have agreed on the states in front of this step."""
        if states:
            self._agreed = {"step": step, "states": dict(states)}

    def state_dict(self) -> dict[str, Any]:
        return self._agreed

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._agreed = dict(state)
        self._lines.clear()
        self.restored += 1
