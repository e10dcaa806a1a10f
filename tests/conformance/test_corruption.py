"""One bit changes between two ranks, anywhere: it is detected, nothing wrong is delivered, and a new link works."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import MeshBackend, Thread
from flipping import FlippingProxy, FlippingSocket, flip
from torch import Tensor

from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.comms.mesh.frames import HEADER_BYTES, HELLO_BYTES
from everstep.comms.mesh.outgoing import TCP_PIECE_BYTES
from everstep.comms.mesh.tensors import of_bytes

pytestmark = pytest.mark.timeout(120)

SEED = 11
SIZES = (0, 1, 90, 3000, TCP_PIECE_BYTES + 70_000)
STREAM_BYTES = sum(SIZES) + (len(SIZES) + 1) * HEADER_BYTES  # the last one is two parts


def key(index: int) -> Key:
    return Key(Kind.USER, 0, 0, index)


def payload(generation: int, index: int) -> Tensor:
    rng = np.random.default_rng((generation, index))
    return torch.from_numpy(rng.integers(0, 256, SIZES[index], dtype=np.uint8))


class Pair:
    """Ranks 0 and 1, of which rank 0 sends; both record what they found corrupt."""

    def __init__(self, shared_memory: bool) -> None:
        backend = MeshBackend(shared_memory)
        self.reports: dict[int, list[tuple[int, str]]] = {0: [], 1: []}
        self.sender, self.receiver = (
            backend.make(rank, 1, on_corruption=lambda generation, *found, own=rank: self.reports[own].append(found))
            for rank in (0, 1)
        )
        self.ranks = (self.sender, self.receiver)
        self.proxy = FlippingProxy(self.receiver.peer.address)
        self.edit()

    def edit(self) -> None:
        """Enter the next generation. Over TCP, rank 0 reaches rank 1 through the proxy."""
        peers = {0: self.sender.peer, 1: replace(self.receiver.peer, address=self.proxy.address)}
        for comm in self.ranks:
            comm.edit(comm.generation + 1, peers if comm is self.sender else {**peers, 1: comm.peer})
        for found in self.reports.values():
            found.clear()

    def exchange(self, done: Callable[[], bool] = lambda: False) -> int:
        """Rank 0 sends until rank 1 has everything or `done` holds; returns how much arrived, all of it right."""
        generation = self.sender.generation

        def send() -> None:
            for index in range(len(SIZES)):
                self.sender.send(1, key(index), [payload(generation, index)])

        sending, deadline, received = Thread(send), time.monotonic() + 30, 0
        while received < len(SIZES) and not done():
            assert time.monotonic() < deadline
            if not sending.is_alive():
                self.sender.ready([(1, key(99))])
            if self.receiver.ready([(0, key(received))]):
                data = self.receiver.receive(0, key(received))
                expected = payload(generation, received)
                assert torch.equal(data, expected), f"delivered wrong: {received}"
                received += 1
        if received < len(SIZES):
            self.sender.abort()
        try:
            sending.result()
        except Aborted:
            self.receiver.abort()
        return received

    def both_know(self) -> None:
        """Both ends reported it, once, and named each other."""
        deadline = time.monotonic() + 30
        while not self.reports[0]:
            assert time.monotonic() < deadline
            self.sender._poller.poll(0.01)  # it may be aborted; the question is what its link finds
        assert [rank for rank, _ in self.reports[0]] == [1]

    def close(self) -> None:
        for comm in self.ranks:
            comm.close()
        self.proxy.close()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    pair.close()


tcp = pytest.mark.parametrize("pair", [False], ids=["tcp"], indirect=True)
shm = pytest.mark.parametrize("pair", [True], ids=["shm"], indirect=True)


def chosen_byte(rng: random.Random, fresh: bool) -> int:
    """Half of all flips are outside payloads: in a hello or in a header."""
    hello = HELLO_BYTES if fresh else 0
    if rng.random() < 0.5:
        return rng.randrange(hello + STREAM_BYTES)
    heads = [range(hello)] if hello else []
    at = hello
    for size in SIZES:
        heads.append(range(at, at + HEADER_BYTES))
        if size > TCP_PIECE_BYTES:
            second = at + HEADER_BYTES + TCP_PIECE_BYTES
            heads.append(range(second, second + HEADER_BYTES))
        at += HEADER_BYTES + size
    return rng.choice(rng.choice(heads))


@tcp
def test_a_flipped_bit_of_a_tcp_stream_is_never_delivered(pair: Pair) -> None:
    rng = random.Random(SEED)
    kept = 0
    for trial in range(250):
        fresh = 1 not in pair.sender._out
        connections = pair.proxy.connections
        byte = chosen_byte(rng, fresh)
        flipper = pair.proxy.next_flipper if fresh else pair.proxy.flipper
        flipper.arm(8 * byte + rng.randrange(8))
        received = pair.exchange(lambda: bool(pair.reports[0] or pair.reports[1]))
        what = f"trial {trial} of seed {SEED}, byte {byte}: {pair.reports}"
        assert not flipper.armed, what
        assert received < len(SIZES), what
        pair.both_know()
        in_hello = fresh and byte < HELLO_BYTES
        assert [rank for rank, _ in pair.reports[1]] == ([] if in_hello else [0]), what
        assert pair.proxy.connections == connections + fresh
        pair.edit()
        if rng.random() < 0.5:  # the next flip is on a link in use; otherwise on a new one
            assert pair.exchange() == len(SIZES)
            assert pair.proxy.connections == connections + fresh + 1
            assert pair.reports == {0: [], 1: []}
            kept += 1
    print(f"{kept} of 250 links were used again")


@shm
def test_a_flipped_bit_of_a_ring_is_never_delivered(pair: Pair) -> None:
    rng = random.Random(SEED)
    for _trial in range(100):
        pair.sender.send(1, key(99), [of_bytes(b"opens the link")])
        ring = pair.sender._out[1].ring
        write, countdown = ring.write, rng.randrange(4)  # parts in the ring: one of 3000 bytes, three of the last

        def flipping_write(position, views, write=write, ring=ring):
            nonlocal countdown
            write(position, views)
            if countdown == 0:
                first = 8 * (position % ring.ring_bytes)
                flip(ring._view, first + rng.randrange(8 * sum(map(len, views))))
            countdown -= 1

        ring.write = flipping_write
        assert pair.exchange(lambda: bool(pair.reports[1])) < len(SIZES)
        pair.both_know()
        assert [rank for rank, _ in pair.reports[1]] == [0]
        pair.edit()
        assert pair.exchange() == len(SIZES)
        pair.edit()


@shm
@pytest.mark.parametrize("side", ["headers", "credits"])
def test_a_flipped_bit_beside_a_ring_is_never_believed(pair: Pair, side: str) -> None:
    rng = random.Random(SEED)
    for _trial in range(100):
        assert pair.exchange() == len(SIZES)
        of_credits = side == "credits"
        link = pair.sender._out[1] if of_credits else next(x for x in pair.receiver._in if not x.broken)
        link.sock = tampered = FlippingSocket(link.sock)
        # What is not in the ring is in the stream: headers, and the small payloads.
        stream = HEADER_BYTES if of_credits else (len(SIZES) + 2) * HEADER_BYTES + sum(s for s in SIZES if s <= 2048)
        tampered.flipper.arm(rng.randrange(8 * stream))
        own, other = (0, 1) if of_credits else (1, 0)
        deadline = time.monotonic() + 30
        while not pair.reports[own]:
            assert time.monotonic() < deadline
            pair.edit()
            pair.exchange(lambda own=own: bool(pair.reports[own]))
            pair.sender._poller.poll(0)
        assert [rank for rank, _ in pair.reports[own]] == [other]
        pair.edit()
