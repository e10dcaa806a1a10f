"""Streams read ahead in worker processes, where the script's DataLoader asks for some.

A dataset that divides itself has its streams shared among the processes; any other is one stream, and one process reads
it. Each process has lines of its own (`streams`), as a rank has that reads by itself, and answers questions in their
order: for the samples of a micro-batch, or for the states in front of a step. It lives through changes of the
membership, which change only what it is asked next. A process that is lost is replaced by one that begins with the
states that were agreed on last.

What is read ahead changes no state: a process keeps the states of the places that may be asked for.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import takewhile
from typing import Any

from torch.utils.data import DataLoader

from everstep.elastic.contract.notices import WarningChannel
from everstep.elastic.contract.stateful import decode, encode

from .streams import Streams
from .worker_processes import BROKEN_OFF, Key, Lost, Upcoming, begin, shut, worker_loader

Question = tuple[Any, ...]  # a key, or (STATES, step, *micro-batches), or (AGREED, text), or (NOTHING,)
STATES, AGREED, NOTHING = "states", "agreed", "nothing"


class StreamReaders:
    """The processes that read a rank's streams ahead. `load` gives the item of a key, or None behind the end."""

    def __init__(
        self,
        loader: DataLoader[Any],
        streams: Streams,
        load: Callable[[Key], Any],
        channel: WarningChannel,
    ) -> None:
        self._streams = streams
        self._upcoming: Upcoming = tuple
        self._restored = streams.restored
        self._ahead = loader.prefetch_factor or 2
        streams.read_ahead(self._ahead)
        count = loader.num_workers if streams.divided else 1
        self._readers = [_Reader(loader, streams, load, self._next, Lost(channel)) for _ in range(count)]
        self._places: dict[int, int] = {}  # micro-batch -> the reader of its stream
        self._taken: set[Key] = set()
        self._step = 0  # the step under way

    def take(self, key: Key, upcoming: Upcoming) -> Any:
        """The item of a key; None if its stream has ended. `upcoming`: what is read ahead."""
        self._step, self._upcoming, reader = key[0], upcoming, self._reader(key[1])
        item = reader.answer(key)
        del reader.answers[key]
        self._taken = {taken for taken in self._taken if taken[0] >= key[0]} | {key}
        reader.forget(key[0])
        reader.work()
        return item

    def has(self, key: Key, upcoming: Upcoming) -> bool:
        """Whether the stream of a key has samples for it. They are kept until they are taken."""
        self._step, self._upcoming = key[0] - 1, upcoming
        return self._reader(key[1]).answer(key) is not None

    def states(self, step: int, micro_batches: Collection[int], upcoming: Upcoming) -> dict[str, Any]:
        """The dataset's states in front of a step, of the lines of these micro-batches."""
        self._upcoming = upcoming
        found: dict[str, Any] = {}
        for reader in self._readers:
            mine = sorted(number for number in micro_batches if self._reader(number) is reader)
            if mine:
                question = (STATES, step, *mine)
                found.update(decode(json.loads(reader.answer(question))))
                del reader.answers[question]
        return found

    def _reader(self, micro_batch: int) -> _Reader:
        if self._streams.restored != self._restored:  # the job has gone back, or resumed
            self._restored = self._streams.restored
            self.close()
        place = self._places.setdefault(micro_batch, len(self._places) % len(self._readers))
        return self._readers[place]

    def _next(self, reader: _Reader) -> Key | None:
        """What a reader reads ahead; None if it has read enough: units are kept for so many steps only."""
        for key in takewhile(lambda key: key[0] <= self._step + 1 + self._ahead, self._upcoming()):
            if key not in self._taken and not reader.knows(key) and self._reader(key[1]) is reader:
                return key
        return None

    def close(self) -> None:
        """End the processes."""
        for reader in self._readers:
            reader.close()


class _Reader:
    """One process, the questions that are on their way, and the answers that nobody has wanted yet."""

    def __init__(
        self,
        loader: DataLoader[Any],
        streams: Streams,
        load: Callable[[Key], Any],
        ahead: Callable[[_Reader], Key | None],
        lost: Lost,
    ) -> None:
        self._loader = loader
        self._streams = streams
        self._load = load
        self._ahead = ahead
        self._lost = lost
        self._running: Iterator[tuple[Question, Any]] | None = None
        self._agreed: Any = None  # the agreed states that the process has
        self._asked: set[Question] = set()
        self._first: deque[Question] = deque()  # to be asked before anything is read ahead
        self.answers: dict[Question, Any] = {}

    def answer(self, question: Question) -> Any:
        """The answer to a question, which is kept in `answers`."""
        while question not in self.answers:
            if question not in self._asked:
                self._first.append(question)
                self._asked.add(question)
            self._receive()
        return self.answers[question]

    def work(self) -> None:
        """Receive an answer and ask for another thing, so that the process reads on."""
        if self._running is not None:
            self._receive()

    def knows(self, question: Question) -> bool:
        """Whether it was asked, and the answer is not forgotten."""
        return question in self._asked or question in self.answers

    def forget(self, before: int) -> None:
        """The answers for steps before this one."""
        self.answers = {key: answer for key, answer in self.answers.items() if key[0] == STATES or key[0] >= before}

    def _receive(self) -> None:
        try:
            if self._running is None:
                self._agreed = self._streams.state_dict()
                self._running = begin(worker_loader(self._loader, self._reply, self._questions(), workers=1))
            question, answer = next(self._running)
        except BROKEN_OFF as error:
            running, self._running = self._running, None
            self._lost.note(error, running)
            self._asked.clear()
            self._first.clear()
            return
        self._lost.forget()
        self._asked.discard(question)
        if question[0] not in (AGREED, NOTHING):
            self.answers[question] = answer

    def _questions(self) -> Iterator[Question]:
        """What to ask next, whenever the process can be asked for more."""
        while True:
            if self._agreed is not self._streams.state_dict():
                self._agreed = self._streams.state_dict()
                yield AGREED, json.dumps(encode(self._agreed, "the states of streams"))
            elif self._first:
                yield self._first.popleft()
            elif (key := self._ahead(self)) is not None:
                self._asked.add(key)
                yield key
            else:
                yield (NOTHING,)

    def _reply(self, question: Question) -> Any:
        """In the process: the answer to a question."""
        streams = self._streams
        streams.place.leave_page()
        if question[0] == STATES:
            _, step, *micro_batches = question
            return json.dumps(encode(streams.states(step, micro_batches), "the states of streams"))
        if question[0] == AGREED:
            agreed = decode(json.loads(question[1]))
            streams.agree(agreed["step"], agreed["states"])
            return None
        return None if question[0] == NOTHING else self._load((question[0], question[1]))

    def close(self) -> None:
        """End the process; another one begins when something is asked."""
        running, self._running = self._running, None
        shut(running)
        self._asked.clear()
        self._first.clear()
