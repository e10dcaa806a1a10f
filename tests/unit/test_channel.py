"""The agent's end of a worker's channel: messages of any size, split in any way, without blocking."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from everstep.agents.node import channel as module
from everstep.agents.node.channel import WorkerChannel

MIB = 1 << 20
LARGE = b"x" * (16 * MIB)


@pytest.fixture
def channel() -> Iterator[WorkerChannel]:
    made = WorkerChannel()
    yield made
    made.close()


def received(channel: WorkerChannel, count: int) -> list[bytes]:
    """Read this many messages as an agent does: only when data is available."""
    lines: list[bytes] = []
    while len(lines) < count:
        assert select.select([channel], [], [], 20)[0], f"{len(lines)} of {count} messages came"
        lines += channel.receive()
    return lines


def test_a_message_of_16_mib_comes_in_one_piece(channel: WorkerChannel) -> None:
    sender = threading.Thread(target=channel.theirs.sendall, args=(b"first\n" + LARGE + b"\nlast\n",))
    sender.start()
    assert received(channel, 3) == [b"first", LARGE, b"last"]
    sender.join()
    assert not channel.closed, "a read that ends within a line is not the end"


def test_lines_may_be_cut_anywhere(channel: WorkerChannel) -> None:
    for piece in (b"a", b"b\nc", b"\n\nd\n"):
        channel.theirs.sendall(piece)
        select.select([channel], [], [], 5)
        last = channel.receive()
    assert last == [b"c", b"", b"d"]
    channel.theirs.close()
    assert channel.receive() == []
    assert channel.closed


def test_who_does_not_read_holds_nobody_up_and_misses_nothing(channel: WorkerChannel) -> None:
    lines = [b"1", LARGE, b"2", LARGE[:MIB], b"3"]
    for line in lines:
        channel.send(line)  # returns, although the other end does not read
    assert channel.waits_to_send
    found: list[bytes] = []

    def read() -> None:
        with os.fdopen(os.dup(channel.theirs.fileno()), "rb") as stream:
            found.extend(stream.readline() for _ in lines)

    reader = threading.Thread(target=read)
    reader.start()
    while channel.waits_to_send:
        assert select.select([], [channel], [], 20)[1], "the reader reads"
        channel.flush()
    reader.join()
    assert found == [line + b"\n" for line in lines]


def test_what_waits_for_a_worker_that_does_not_read_has_a_bound(
    channel: WorkerChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OUTBOX_BYTES", 2 * MIB)
    channel.send(LARGE[: 2 * MIB])
    assert not channel.broken
    channel.send(LARGE[: 2 * MIB])
    assert "does not read" in channel.broken
    assert not channel.waits_to_send, "nothing of it is kept"


def test_a_line_without_an_end_has_a_bound(channel: WorkerChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MESSAGE_BYTES", MIB)
    channel.theirs.setblocking(False)
    sent = 0
    while not channel.broken:
        assert sent < 2 * MIB
        sent += channel.theirs.send(LARGE[: 1 << 16])
        channel.receive()
    assert "more than 1 MiB" in channel.broken


def test_a_worker_that_has_died_is_no_error(channel: WorkerChannel) -> None:
    channel.theirs.close()
    channel.send(LARGE)
    channel.send(b"1")
    assert not channel.waits_to_send
    assert not channel.broken
