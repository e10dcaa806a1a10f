"""A worker's telemetry: records of spans in a ring of shared memory, which its node agent reads.

The worker only writes to memory, about a microsecond per span, and never blocks: a slow reader misses the oldest
spans. The ring outlives the worker. Metrics, traces and the search for stragglers all read it.

Each record is a seqlock, because several threads of the worker write: its number is written first and last. The
reader copies the ring three times. It takes a record from the second copy if the record's last word was right in the
first (the record was complete) and its first word is still right in the third (no writer had begun to overwrite it).
This relies on stores becoming visible in program order, which x86 guarantees; elsewhere microseconds separate the
copies.
"""

from __future__ import annotations

import enum
import itertools
import mmap
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RING_RECORDS = 8192  # of one worker: at 72 bytes each, 576 KiB; some seconds of the busiest steps
SPANS_KEPT = 65536  # of one worker, by its agent: 4.5 MiB, what a trace can show
_RECORD = struct.Struct("<QqqqdiiiiiiQ")
RECORD_BYTES = _RECORD.size
RING_OFFSET = mmap.PAGESIZE  # page 0 is the progress page
SHARED_BYTES = RING_OFFSET + -(-RING_RECORDS * RECORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
RECORD_LAYOUT = np.dtype(
    [
        ("number", "<u8"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("amount", "<i8"),
        ("value", "<f8"),
        ("step", "<i4"),
        ("generation", "<i4"),
        ("micro_batch", "<i4"),
        ("peer", "<i4"),
        ("kind", "<i4"),
        ("spare", "<i4"),
        ("again", "<u8"),
    ]
)
Records = NDArray[np.void]  # of RECORD_LAYOUT


class Spent(enum.IntEnum):
    """What a span was spent on. `amount` and `value` of its record, where they mean something, in brackets."""

    FETCH = 1  # samples read and collated [tokens, samples: of a micro-batch that begins here]
    FORWARD = 2
    BACKWARD = 3  # with the adding up of gradients
    COMPUTE = 4  # forward and backward in the user's own loop
    SEND = 5  # in the call that sends; includes waiting for a receiver that does not drain its link [bytes]
    WAIT = 6  # for the first byte of a message of `peer`
    RECEIVE = 7  # from then on until it was complete, as far as the worker waited for it [bytes]
    REDUCE = 8  # a phase: partial sums to their owners; contains sends, waits and receives
    AGREE = 9  # a phase: the agreement of a step, with its waiting
    UPDATE = 10  # the optimizer
    PUBLISH = 11  # a phase: new values to their readers
    COMMIT = 12
    STEP = 13  # a whole step, from commit to commit [samples of all ranks, loss or nan]
    SNAPSHOT = 14  # a version copied to keeper memory, by a separate thread, overlapping compute [bytes, busy seconds]
    BLOCKED = 15  # waited for a snapshot, or for its protection
    RECOVER = 16  # a phase: from the abort to the next generation, edit and restore within
    EDIT = 17  # links closed and opened
    RESTORE = 18  # fetching shards and values
    OUTSIDE = 19  # the user's own code between steps
    LAYER = 20  # one layer's forward, in the micro-batch of a step that is timed [layer, seconds of its backward]


PHASES = frozenset({Spent.REDUCE, Spent.AGREE, Spent.PUBLISH, Spent.STEP, Spent.RECOVER, Spent.SNAPSHOT, Spent.LAYER})
"""Kinds that other spans lie in, or beside: times of the rest add up, on the main thread, to no more than the step."""


@dataclass(frozen=True, slots=True)
class Span:
    """A record, for people and tests. Times are CLOCK_MONOTONIC nanoseconds; -1 where a field means nothing."""

    number: int
    kind: Spent
    step: int
    micro_batch: int
    generation: int
    peer: int
    start_ns: int
    end_ns: int
    amount: int
    value: float


class Telemetry:
    """The worker's side: writes spans. `memory` is None for a worker without a reader."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory if memory is not None else mmap.mmap(-1, SHARED_BYTES)
        self._numbers = itertools.count(1)  # `next` is atomic: threads need no lock
        self._step = -1
        self._generation = 0
        self._stepped_ns = 0  # when the last step was committed here; 0: none was, or a recovery came between

    def span(
        self,
        kind: Spent,
        start_ns: int,
        *,
        micro_batch: int = -1,
        peer: int = -1,
        amount: int = 0,
        value: float = 0.0,
        end_ns: int = 0,
    ) -> None:
        """Write a span that began at `start_ns` and ends at `end_ns`, or now. From any thread."""
        end_ns = end_ns or time.monotonic_ns()
        number = next(self._numbers)
        offset = RING_OFFSET + (number - 1) % RING_RECORDS * RECORD_BYTES
        place = (self._step, self._generation, micro_batch, peer, kind, 0)
        _RECORD.pack_into(self._memory, offset, number, start_ns, end_ns, amount, value, *place, number)

    def copied(self, started_ns: int, length: int, busy_s: float) -> None:
        """A snapshot of `length` bytes is copied."""
        self.span(Spent.SNAPSHOT, started_ns, amount=length, value=busy_s)

    def at(self, step: int) -> None:
        """The worker is in this step: spans that are written from now on belong to it."""
        self._step = step

    def enter(self, generation: int) -> None:
        """The same for a generation."""
        self._generation = generation

    def committed(self, loss: float | None, samples: int) -> None:
        """The step is committed: its span starts at the previous commit, if there was one."""
        now = time.monotonic_ns()
        if self._stepped_ns:
            value = float("nan") if loss is None else loss
            self.span(Spent.STEP, self._stepped_ns, amount=samples, value=value, end_ns=now)
        self._stepped_ns = now

    def interrupted(self) -> None:
        """The generation is over: the time of this step would be that of a recovery."""
        self._stepped_ns = 0


class TelemetryReader:
    """The agent's side of one worker's ring, in a separate mapping. Not thread-safe."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SHARED_BYTES, prot=mmap.PROT_READ)
        self._seen = 0  # the number of the newest record that was read
        self.missed = 0  # records that were overwritten before they were read

    def read(self) -> Records:
        """The whole records that were written since the last time, oldest first."""
        copies = [self._memory[RING_OFFSET : RING_OFFSET + RING_RECORDS * RECORD_BYTES] for _ in range(3)]
        finished, records, untouched = (np.frombuffer(copy, dtype=RECORD_LAYOUT) for copy in copies)
        number = records["number"]
        whole = (finished["again"] == number) & (untouched["number"] == number) & (number > self._seen)
        found: Records = np.sort(records[whole], order="number")
        if not len(found):
            return found
        # Wait for a record that another thread is still writing, unless there are hundreds of newer ones.
        gaps = np.flatnonzero(np.diff(found["number"], prepend=np.uint64(self._seen)) > 1)
        newest = int(found["number"][-1])
        for gap in gaps:
            missing = int(found["number"][gap]) - 1
            if newest - missing < min(256, RING_RECORDS // 2):
                found = found[:gap]
                break
        if len(found):
            first, newest = self._seen, int(found["number"][-1])
            self.missed += newest - first - len(found)
            self._seen = newest
        return found

    def close(self) -> None:
        self._memory.close()


def spans(records: Records) -> Iterable[Span]:
    """Records as values."""
    for r in records.tolist():
        number, start_ns, end_ns, amount, value, step, generation, micro_batch, peer, kind, _, _ = r
        yield Span(number, Spent(kind), step, micro_batch, generation, peer, start_ns, end_ns, amount, value)
