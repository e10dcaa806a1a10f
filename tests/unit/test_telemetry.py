"""The ring of spans: torn spans are not read, lost ones are counted, and a step's sums are the sums of its spans."""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from everstep.agents.analysis.step_times import StepSums
from everstep.elastic.contract.progress import create_page
from everstep.elastic.contract.telemetry import (
    RING_RECORDS,
    SHARED_BYTES,
    Spent,
    Telemetry,
    TelemetryReader,
    spans,
)

WRITER = """
import mmap, sys
from everstep.elastic.contract.telemetry import SHARED_BYTES, Spent, Telemetry
telemetry = Telemetry(mmap.mmap(int(sys.argv[1]), SHARED_BYTES))
for n in range(1, int(sys.argv[2]) + 1):
    telemetry.at(n)
    telemetry.enter(n)
    telemetry.span(Spent.SEND, n, micro_batch=n, peer=n, amount=n, value=n, end_ns=n)
"""


@pytest.fixture
def page() -> Iterator[int]:
    fd = create_page()
    yield fd
    os.close(fd)


@pytest.fixture
def writer(page: int) -> Telemetry:
    return Telemetry(mmap.mmap(page, SHARED_BYTES))


@pytest.fixture
def reader(page: int) -> Iterator[TelemetryReader]:
    reader = TelemetryReader(page)
    yield reader
    reader.close()


def test_what_is_written_is_read_once_and_in_order(writer, reader) -> None:
    writer.at(7)
    writer.enter(2)
    writer.span(Spent.FORWARD, 10, micro_batch=3, end_ns=25)
    writer.span(Spent.WAIT, 30, peer=1, end_ns=40)
    first, second = spans(reader.read())
    assert (first.kind, first.step, first.micro_batch, first.start_ns, first.end_ns) == (Spent.FORWARD, 7, 3, 10, 25)
    assert (second.kind, second.peer, second.generation, second.micro_batch) == (Spent.WAIT, 1, 2, -1)
    assert len(reader.read()) == 0
    writer.span(Spent.SEND, 50, amount=9)
    assert [(s.number, s.amount) for s in spans(reader.read())] == [(3, 9)]
    assert reader.missed == 0


def test_a_reader_that_comes_late_misses_the_oldest_and_counts_them(writer, reader) -> None:
    for n in range(RING_RECORDS + 100):
        writer.span(Spent.SEND, 1, amount=n)
    found = reader.read()
    assert len(found) == RING_RECORDS
    assert int(found["amount"][0]) == 100
    assert reader.missed == 100


def test_nothing_torn_is_ever_read(page, reader) -> None:
    """A process writes at full speed, many times round the ring, with all fields of a span alike."""
    count = 200_000
    os.set_inheritable(page, True)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(page), str(count)], pass_fds=[page])
    read, newest = 0, 0
    while newest < count:
        ended = process.poll() is not None
        found = reader.read()
        for name in ("start_ns", "end_ns", "amount", "value", "step", "generation", "micro_batch", "peer"):
            assert (found[name] == found["number"]).all(), name
        assert (found["number"][:1] > newest).all()
        read += len(found)
        newest = int(found["number"][-1]) if len(found) else newest
        assert not ended or len(found) or newest == count
    assert process.wait() == 0
    assert read + reader.missed == count


def test_threads_share_a_ring(writer, reader) -> None:
    def write() -> None:
        for n in range(1000):
            writer.span(Spent.SNAPSHOT, n, amount=n)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    found = 0
    while any(thread.is_alive() for thread in threads):
        found += len(reader.read())
    found += len(reader.read())
    assert found + reader.missed == 4000


def test_a_span_costs_about_a_microsecond(writer) -> None:
    def once() -> float:
        started = time.perf_counter()
        for _ in range(2000):
            writer.span(Spent.FORWARD, 1, micro_batch=1)
        return (time.perf_counter() - started) / 2000

    assert min(once() for _ in range(20)) < 5e-6


def test_steps_are_the_sums_of_their_spans(writer, reader) -> None:
    sums = StepSums(rank=3)
    writer.at(0)
    writer.enter(1)
    writer.committed(2.0, 16)  # the start of the first step is not known
    assert sums.add(reader.read()) == []
    writer.at(1)
    writer.span(Spent.FETCH, 0, micro_batch=0, amount=64, value=2.0, end_ns=10**6)
    for micro_batch, seconds in ((0, 0.010), (1, 0.030)):
        writer.span(Spent.FORWARD, 0, micro_batch=micro_batch, end_ns=int(seconds * 1e9))
        writer.span(Spent.BACKWARD, 0, micro_batch=micro_batch, end_ns=int(seconds * 1e9))
    writer.span(Spent.SEND, 0, peer=1, amount=100, end_ns=2 * 10**6)
    assert sums.add(reader.read()) == []
    writer.span(Spent.WAIT, 0, peer=1, end_ns=5 * 10**6)
    writer.span(Spent.RECEIVE, 0, peer=1, amount=50, end_ns=3 * 10**6)
    writer.committed(1.5, 16)
    (step,) = sums.add(reader.read())
    assert (step.rank, step.step, step.generation, step.micro_batches) == (3, 1, 1, 2)
    assert (step.tokens, step.samples) == (64, 2)
    assert step.compute_s == pytest.approx(0.080)
    assert step.longest_s == pytest.approx(0.060)
    assert (step.send_s, step.wait_s, step.receive_s) == pytest.approx((0.002, 0.005, 0.003))
    (link,) = sums.links()
    assert (link.peer, link.sent_bytes, link.received_bytes) == (1, 100, 50)
    assert link.wait_s == pytest.approx(0.005)
    assert list(sums.links()) == []
    assert sums.totals.loss == 1.5


def test_the_cost_of_a_layer_is_a_median_since_the_last_message(writer, reader) -> None:
    sums = StepSums(rank=3)
    writer.at(6)
    writer.span(Spent.LAYER, 0, micro_batch=0, amount=9, value=1.2, end_ns=10**9)
    writer.at(7)
    for forward_s, backward_s in ((0.5, 0.1), (0.002, 0.004), (0.003, 0.005)):
        writer.span(Spent.LAYER, 0, micro_batch=1, amount=4, value=backward_s, end_ns=round(forward_s * 1e9))
    writer.span(Spent.LAYER, 0, micro_batch=1, amount=5, value=0.25, end_ns=10**6)
    assert sums.add(reader.read()) == []
    times = sums.layers()
    assert (times.rank, list(times.layer)) == (3, [4, 5]), "the first step of a worker is not like the others"
    assert list(times.forward_s) == pytest.approx([0.003, 0.001])
    assert list(times.backward_s) == pytest.approx([0.005, 0.25])
    assert not sums.layers().layer
    assert sums.totals.seconds["compute_s"] == 0, "the micro-batch's own spans have that time"


def test_a_loss_that_is_not_known_is_nan(writer, reader) -> None:
    sums = StepSums(rank=0)
    writer.committed(None, 8)
    writer.committed(None, 8)
    assert len(sums.add(reader.read())) == 1
    assert math.isnan(sums.totals.loss)


def test_an_interrupted_step_has_no_time_of_its_own(writer, reader) -> None:
    writer.committed(1.0, 8)
    writer.interrupted()
    writer.committed(1.0, 8)
    assert [s.kind for s in spans(reader.read())] == []
