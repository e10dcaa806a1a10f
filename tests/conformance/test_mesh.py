"""The contract of the mesh alone: its links, its sockets, and connections of strangers."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress

import pytest
import torch
from backends import BACKENDS, Cluster, Thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.comms.mesh.frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    PROTOCOL_VERSION,
    FrameKind,
    Header,
    Hello,
    ProtocolError,
    checksum_of,
    token_digest,
)
from everstep.comms.mesh.mesh import MeshCommunicator
from everstep.comms.mesh.outgoing import cut
from everstep.comms.mesh.ring import RingReader, RingWriter, piece_bytes
from everstep.comms.mesh.tensors import host_bytes, of_bytes

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20


def key(index: int = 0) -> Key:
    return Key(Kind.USER, 0, 0, index)


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def part(generation=1, source=1, total=10, offset=0, length=10, flags=0, position=0, data=b"0123456789") -> bytes:
    """The header of a part that has the checksum of `data`."""
    checksum = checksum_of([data])
    return Header(FrameKind.PART, flags, generation, source, key(), total, offset, length, position, checksum).pack()


def hello(
    target: int = 0, incarnation: int = 1, ring_bytes: int = 0, token: str = "job", version: int = PROTOCOL_VERSION
) -> bytes:
    return Hello(token_digest(token), 1, 1, target, incarnation, 1, ring_bytes, version).pack()


def flipped(data: bytes, bit: int) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def until(condition, *polled) -> None:
    """Let the `polled` communicators make progress until `condition` holds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        for comm in polled:
            comm.ready([(comm.rank, key(99))])


def all_to_all(cluster: Cluster) -> None:
    """Every pair exchanges a message; each rank receives while others still send, as a send may wait for that."""

    def exchange(comm):
        others = [rank for rank in cluster.ranks if rank != comm.rank]
        for other in others:
            comm.send(other, key(50 + comm.rank), [of_bytes(b"hi")])
        for other in others:
            comm.receive(other, key(50 + other))

    cluster.everywhere(exchange)


def sockets(comm) -> set[int]:
    return {id(link.sock) for link in [*comm._out.values(), *comm._in] if not link.broken}


def test_edit_touches_only_the_links_of_the_rank_that_left(mesh):
    mesh.start(4)
    all_to_all(mesh)
    before = {rank: sockets(comm) for rank, comm in mesh.ranks.items()}
    mesh.abort()
    mesh.ranks.pop(3).close()
    for rank, report in mesh.edit().items():
        assert (report.closed, report.opened, report.kept) == (2, 0, 4)
        assert sockets(mesh[rank]) < before[rank]
    all_to_all(mesh)
    for rank, comm in mesh.ranks.items():
        assert sockets(comm) < before[rank]


def test_only_links_without_shared_memory_are_remote(mesh):
    mesh.start(3)
    for rank, comm in mesh.ranks.items():
        remote = [other for other in comm.members if comm.is_remote(other)]
        assert remote == ([] if mesh.backend.shared_memory else [other for other in range(3) if other != rank])


def test_an_abort_inside_a_message_keeps_the_stream_in_step(mesh):
    mesh.start(2)
    all_to_all(mesh)
    before = sockets(mesh[0])
    data = noise(64 * MIB)
    for generation in range(2, 6):
        waiting = threading.Event()
        mesh[0].on_wait = waiting.set
        sender = Thread(lambda: mesh[0].send(1, key(), [data]))
        assert waiting.wait(30)
        mesh.abort()
        with pytest.raises(Aborted):
            sender.result()
        data[:] = generation  # the caller's again: what is left of the old frame must not show it
        mesh.edit()
        fresh = noise(9 * MIB, generation)
        receiver = Thread(lambda: mesh[1].receive(0, key()))
        mesh[0].send(1, key(), [fresh])
        assert torch.equal(receiver.result(), fresh)
        assert sockets(mesh[0]) == before


def test_parts_of_an_aborted_message_are_forgotten(mesh):
    mesh.start(2)
    waiting = threading.Event()
    mesh[0].on_wait = waiting.set
    sender = Thread(lambda: mesh[0].send(1, key(), [noise(64 * MIB)]))
    assert waiting.wait(30)
    until(lambda: any(link._partial for link in mesh[1]._in), mesh[1])
    mesh.abort()
    with pytest.raises(Aborted):
        sender.result()
    mesh.edit()
    assert not any(link._partial for link in mesh[1]._in)
    all_to_all(mesh)


def test_a_newcomer_may_be_ahead_by_several_plans(mesh):
    mesh.start(2)
    all_to_all(mesh)
    newcomer = mesh.backend.make(2, 7)
    try:
        final = {**mesh.peers(), 2: newcomer.peer}
        newcomer.edit(3, final)
        newcomer.send(0, key(1), [of_bytes(b"early")])
        until(lambda: any(link.hello and link.hello.source == 2 for link in mesh[0]._in), mesh[0])
        assert mesh.edit()[0].kept == 3  # generation 2, which the newcomer is not in
        for rank in (0, 1):
            mesh[rank].edit(3, final)
        assert bytes(host_bytes(mesh[0].receive(2, key(1)))) == b"early"
        newcomer.send(0, key(2), [of_bytes(b"again")])
        assert bytes(host_bytes(mesh[0].receive(2, key(2)))) == b"again"
    finally:
        newcomer.close()


def test_a_message_to_a_dead_address_is_dropped(mesh):
    mesh.start(3)
    mesh[2].close()
    for size in (10, 3 * MIB):
        mesh[0].send(2, key(), [noise(size)])
    assert mesh[0].broken == (2,)
    mesh[0].send(1, key(), [of_bytes(b"fine")])
    assert bytes(host_bytes(mesh[1].receive(0, key()))) == b"fine"


def test_another_jobs_token_is_refused(mesh):
    mesh.add(0)
    intruder = mesh.backend.make(1, 1, token="another job")
    try:
        peers = {0: mesh[0].peer, 1: intruder.peer}
        mesh[0].edit(1, peers)
        intruder.edit(1, peers)
        intruder.send(0, key(), [of_bytes(b"let me in")])
        until(lambda: intruder.broken == (0,), mesh[0], intruder)
        assert mesh[0].ready([(1, key())]) is None
    finally:
        intruder.close()


def knock(comm, data: bytes) -> None:
    """Send `data` to each listener as a stranger, and let the communicator handle it."""
    host, _, port = comm.peer.address.rpartition(":")
    targets = [(socket.AF_INET, (host, int(port)))]
    if comm.peer.local_name:
        targets.append((socket.AF_UNIX, "\0" + comm.peer.local_name))
    for family, address in targets:
        with socket.socket(family, socket.SOCK_STREAM) as stranger:
            stranger.connect(address)
            with suppress(OSError):
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(0.0)

            def refused(stranger=stranger) -> bool:
                try:
                    return stranger.recv(1) == b""
                except BlockingIOError:
                    return False
                except OSError:
                    return True

            until(refused, comm)


MALFORMED = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "half a hello": hello()[:20],
    "another version": hello(version=PROTOCOL_VERSION + 1),
    "another rank": hello(target=4),
    "another incarnation": hello(incarnation=9),
    "another token": hello(token="?"),
    "a ring without memory": hello(ring_bytes=4 * MIB),
    "no frame": hello() + b"\xff" * HEADER_BYTES,
    "half a frame": hello() + part()[:30],
    "half a payload": hello() + part() + b"123",
    "another source": hello() + part(source=3) + b"0123456789",
    "a part outside its message": hello() + part(total=10, offset=8, length=10),
    "another payload": hello() + part() + b"0123456780",
    "a header with a bit more": hello() + flipped(part(), 100) + b"0123456789",
    "an endless message": hello() + part(total=1 << 60, length=1),
    "a part that begins nothing": hello() + part(total=20, offset=10),
    "a gap": hello() + part(total=30) + b"0123456789" + part(total=30, offset=20),
    "a ring that is not there": hello() + part(flags=1),
    "a credit": hello() + Header(FrameKind.CREDIT, 0, 1, 1, key(), 0, 0, 0, 5).pack(),
}


@pytest.mark.parametrize("case", list(MALFORMED))
def test_malformed_bytes_close_their_connection_only(mesh, case):
    mesh.start(2)
    all_to_all(mesh)
    knock(mesh[0], MALFORMED[case])
    assert mesh[0].ready([(1, key())]) is None
    all_to_all(mesh)


@pytest.mark.parametrize("name", ["mesh-tcp", "mesh-shm"])
def test_any_bytes_close_their_connection_only(name):
    cluster = Cluster(BACKENDS[name]()).start(2)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.booleans(), st.binary(max_size=300))
    def check(greeted, data):
        knock(cluster[0], hello() + data if greeted else data)

    try:
        check()
        all_to_all(cluster)
    finally:
        cluster.close()


def test_a_silent_stranger_holds_nobody_up(mesh):
    mesh.start(2)
    host, _, port = mesh[0].peer.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        all_to_all(mesh)
        mesh.abort()
        assert mesh.edit()[0].closed == 0
        all_to_all(mesh)


# --- the pieces -----------------------------------------------------------------------------------------------------


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.binary(max_size=HEADER_BYTES))
def test_a_header_parses_or_is_refused(data, tail):
    for candidate in (data, (part()[: HEADER_BYTES - len(tail)] + tail)[:HEADER_BYTES]):
        with suppress(ProtocolError):
            assert Header.parse(candidate).pack() == candidate


@given(st.sampled_from(Kind), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**40))
def test_a_header_survives_its_packing(kind, step, micro_batch, index):
    header = Header(
        FrameKind.PART, 1, 2**32 - 1, 7, Key(kind, step, micro_batch, index), 2**36, 2**35, 2**20, 2**60, 2**63
    )
    assert len(header.pack()) == HEADER_BYTES == 80
    assert Header.parse(header.pack()) == header


@given(st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_a_hello_parses_or_is_refused(data):
    with suppress(ProtocolError):
        Hello.parse(data)
    assert Hello.parse(hello()).pack() == hello()


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_pieces_are_the_whole(buffers, piece):
    pieces = list(cut([memoryview(buffer) for buffer in buffers], piece))
    joined = [b"".join(views) for _, views in pieces]
    assert b"".join(joined) == b"".join(buffers)
    assert [offset for offset, _ in pieces] == [i * piece for i in range(len(pieces))]
    assert all(len(part) == piece for part in joined[:-1])
    assert len(joined[-1]) > 0 or pieces == [(0, [])]


@given(st.lists(st.tuples(st.integers(1, 8192), st.booleans()), max_size=200))
def test_a_ring_never_stalls_and_never_mixes(steps):
    size = 64 * 1024
    writer = RingWriter(size)
    reader = RingReader(writer.fd, size)
    writer.fd = -1  # the reader closed it
    written: list[tuple[int, bytes]] = []

    def drain():
        for position, data in written:
            target = bytearray(len(data))
            reader.read_into(position, len(data), memoryview(target))
            assert target == data
            credit = reader.credit_due()
            if credit is not None:
                writer.credit(credit)
        written.clear()

    try:
        for number, (length, drained) in enumerate(steps):
            data = bytes([number % 251]) * min(length, piece_bytes(size))
            position = writer.reserve(len(data))
            if position is None:
                drain()
                position = writer.reserve(len(data))
            assert position is not None
            writer.write(position, [memoryview(data)])
            written.append((position, data))
            if drained:
                drain()
        drain()
    finally:
        writer.close()
        reader.close()


def test_a_peer_that_dies_while_it_is_connected_to_breaks_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel accepts, and it ends before the ring is handed over: no error of the sender's."""
    first, second = (MeshCommunicator(rank, 0, host_id="here", token="job") for rank in (0, 1))
    with closing(first), closing(second):
        first.edit(1, {0: first.peer, 1: second.peer})

        def refuse(*arguments: object) -> int:
            raise BrokenPipeError

        monkeypatch.setattr("socket.send_fds", refuse)
        first.send(1, Key(Kind.USER, 0), [of_bytes(b"x" * 100_000)])
        assert first.broken == (1,)
