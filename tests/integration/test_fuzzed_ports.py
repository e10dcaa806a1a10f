"""Every port of a training job gets ten thousand malformed inputs: no process dies or leaks, and the numbers stay.

The inputs are made of valid pieces (greetings, frames, requests, beats), cut, joined, repeated, enlarged and with
changed bytes, from a seed that is printed. Keepers and the coordinator also get them with the right token.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import AF_INET, AF_UNIX

import psutil
import pytest
import torch

from everstep.comms.base.security import Security, digest_of
from everstep.comms.control import beats
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import PROTOCOL
from everstep.comms.control.rpc import channel_to, stub
from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.comms.mesh.frames import Hello, token_digest
from everstep.comms.mesh.mesh import MeshCommunicator
from everstep.elastic.contract.faults import COORDINATOR
from tests.jobs import JOBS, assert_same_run, finish, launch, read_result, reference, wait_until
from tests.jobs.ports import free_ports
from tests.jobs.processes import each, named, saying

INPUTS = 10_000  # a port
STEPS = 80
TOKEN = "the job's own token"
HOST = "127.0.0.1"
Place = int | str  # a TCP port, or an abstract name
GROWN_BYTES = 48 << 20  # allocators keep what a burst of connections took
SEED = int(os.environ.get("EVERSTEP_FUZZ_SEED", "1"))


def pieces(token: str) -> list[bytes]:
    """Valid messages of a peer for the various ports."""
    hello = Hello(token_digest("wrong"), 0, 0, 1, 0, 1, 0).pack()
    keeper = [
        {"token": token},
        {"op": "fetch", "shards": [0, 1], "version": 3, "replay": True},
        {"op": "fetch", "shards": [-1, 10**9], "version": -5, "replay": False},
        {"op": "parity", "shards": "all", "version": None},
        {"op": "block", "block": 2**70},
        {"op": "held"},
        {"op": "adopt", "node": "me"},
        {"op": "register", "rank": 0, "incarnation": 0, "segment": 1, "size": -1, "entries": [], "states": []},
        {"op": "enter", "generation": 99, "placement": "{}", "addresses": {}, "capacities": []},
        {"op": "sealed", "generation": 99, "version": 99, "protected": 99, "protect": True},
    ]
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    headers = struct.pack(">I", 40)[1:] + bytes([1, 4, 0, 0, 0, 1]) + os.urandom(40)
    shown = b"Host: localhost\r\nAuthorization: Bearer " + token.encode() + b"\r\n"
    http = b"GET /metrics HTTP/1.1\r\n" + shown + b"Content-Length: 99999999\r\n\r\n"
    lines = [json.dumps(item).encode() + b"\n" for item in keeper]
    return [hello, hello[:-3], preface, headers, http, b"[" * 5000 + b"\n", b"\n", b"\0" * 64, *lines]


def malformed(rng: random.Random, known: list[bytes]) -> bytes:
    """Valid pieces, corrupted."""
    data = bytearray(b"".join(rng.choices(known, k=rng.randint(1, 4))))
    for _ in range(rng.choice([0, 1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    kind = rng.randrange(10)
    if kind == 0:
        data = bytearray(rng.randbytes(rng.randint(0, 2000)))
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2 and rng.random() < 0.02:
        data *= 300  # oversized
    return bytes(data)


def throw(place: Place, data: bytes, *, reset: bool) -> None:
    """Send it, and hang up without reading: by a reset, or with a last message."""
    with contextlib.suppress(OSError), socket.socket(AF_INET if isinstance(place, int) else AF_UNIX) as connection:
        connection.settimeout(5.0 if isinstance(place, int) else None)  # else a queue that is full is no reason to wait
        connection.connect((HOST, place) if isinstance(place, int) else place)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(1.0)
        connection.sendall(data)


def own_names(process: psutil.Process) -> list[str]:
    """The names, in the namespace of the host's network, at which a process listens."""
    names = {connection.laddr for connection in process.net_connections("unix")}
    return sorted("\0" + name[1:] for name in names if name.startswith("@everstep"))


def datagrams(port: int, rng: random.Random) -> Iterator[bytes]:
    key, names = beats.key_of(TOKEN), [beats.name_of("nobody"), bytes(8), rng.randbytes(8)]
    for number in range(INPUTS):
        good = beats.pack_beat(key, beats.Beat(rng.choice(names), rng.randrange(2**63), rng.randrange(2**40)))
        if number % 2:
            damaged = bytearray(good)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            good = bytes(damaged)
        yield good if number % 5 else rng.randbytes(rng.randint(0, 1400))


def attach_badly(port: int, rng: random.Random, count: int) -> None:
    """Streams with the right token and messages that no agent sends."""
    texts = [
        "",
        "null",
        "[]",
        "{}",
        '{"kind": 7}',
        '{"kind": "WorkerCommitted"}',
        "[" * 100_000,
        '{"kind": "WorkerReady", "peer": [], "job": 3, "saved": []}',
    ]
    texts += ['{"kind": "WorkerReported", "report": "{}", "generation": "x", "busy_s": 0}']
    texts += ['{"kind": "WorkerNoted", "what": 1, "fields": []}']
    with channel_to(f"{HOST}:{port}", Security()) as channel:
        for number in range(count):
            worker = pb.WorkerId(rank=rng.choice([0, 1, -1, 2**31 - 1]), incarnation=rng.choice([0, 5, -7]))
            hello = pb.Hello(
                job=rng.choice(["fuzz", "", "x" * 10_000]),
                node=rng.choice([f"stranger-{number}", "", "a/b", "\0", "é" * 500]),
                protocol=rng.choice([PROTOCOL, PROTOCOL, PROTOCOL, -1]),
                returning=rng.random() < 0.3,
                received=rng.choice([0, -1, 2**62]),
                token_digest=rng.choice([digest_of(TOKEN), "", "é"]),
            )
            said = [
                pb.AttachRequest(hello=hello),
                pb.AttachRequest(
                    number=rng.choice([0, 1, 2, -1]), from_worker=pb.FromWorker(worker=worker, json=rng.choice(texts))
                ),
                pb.AttachRequest(
                    number=2, died=pb.WorkerDied(worker=worker, cause="a lie", step=-9, detected_at_s=1e300)
                ),
                pb.AttachRequest(
                    number=3, ready=pb.NodeReady(host="", slots=-1, keeper="?", order=-5, stores=[-1] * 9)
                ),
                pb.AttachRequest(heartbeat=pb.Heartbeat(received=2**60)),
                pb.AttachRequest(),
            ]
            rng.shuffle(said) if number % 3 == 0 else None
            with contextlib.suppress(Exception):  # it may refuse in any way it likes
                for _ in zip(stub(channel).Attach(iter(said), timeout=5), range(2), strict=False):
                    pass


def figures(processes: list[psutil.Process]) -> dict[int, tuple[int, int]]:
    """Process -> (descriptors, bytes)."""
    return {process.pid: (process.num_fds(), process.memory_info().rss) for process in processes}


@pytest.mark.soak
@pytest.mark.timeout(280)
def test_ten_thousand_malformed_inputs_a_port(tmp_path: Path) -> None:
    print(f"EVERSTEP_FUZZ_SEED={SEED}")
    rng = random.Random(SEED)
    port, metrics, page = free_ports(3)
    arguments = [json.dumps({"out": str(tmp_path), "stages": 1, "steps": STEPS})]
    flags = ["--nproc-per-node=2", "--rdzv-id=fuzz", f"--rdzv-endpoint={HOST}:{port}", "--es-tcp"]
    flags += [f"--es-events={tmp_path}/events.jsonl", f"--log-dir={tmp_path}/logs", f"--es-metrics={HOST}:{metrics}"]
    flags.append(f"--es-coordinator-metrics={HOST}:{page}")
    flags.append("--es-rebalance-after=0")  # the processor time that the inputs take makes a rank slow
    (tmp_path / "slow").touch()
    launcher = launch(JOBS / "gpt_job.py", arguments, flags, {"EVERSTEP_JOB_TOKEN": TOKEN})
    events = tmp_path / "events.jsonl"
    try:
        wait_until(lambda: events.exists() and '"step": 2' in events.read_text(), 60, "it trains")
        root = psutil.Process(launcher.pid)
        family = [root, *root.children(recursive=True)]
        keepers, coordinators = saying(family, "everstep.checkpointing.keeper.service"), named(family, COORDINATOR)
        ports: set[tuple[str, Place]] = {
            (process.name(), connection.laddr.port)
            for process, connections in each(family, lambda process: process.net_connections("tcp"))
            for connection in connections
            if connection.status == psutil.CONN_LISTEN
            and (connection.laddr.port == metrics or process in (*coordinators, *keepers))
        }
        ports |= {(process.name(), name) for process in keepers for name in own_names(process)}
        assert len(ports) == 5, f"coordinator and its page, keeper by port and name, metrics: {ports}"
        assault(rng, ports, port, 200)  # what is made at the first contact is no leak
        before = figures(family)
        assault(rng, ports, port, INPUTS)
        attach_badly(port, rng, 400)
        wait_until(lambda: not leaks(before, figures(family)), 20, f"nothing leaked: {leaks(before, figures(family))}")
        assert all(process.is_running() for process in family)
        (tmp_path / "slow").unlink()
        output = finish(launcher)
    except BaseException:
        launcher.kill()
        print(finish(launcher))
        raise
    result = read_result(tmp_path, launcher.returncode, output)
    assert_same_run(result, reference(STEPS))
    assert {event["generation"] for event in result.named("committed")} == {1}, "nobody was disturbed"
    assert not result.named("node_lost")
    assert not result.named("worker_died")
    assert "Traceback" not in output


def assault(rng: random.Random, ports: set[tuple[str, Place]], coordinator: int, inputs: int) -> None:
    """Malformed inputs for each place where a process listens, and for the coordinator's heartbeats."""
    known = pieces("wrong") + pieces(TOKEN)
    seeds = [rng.randrange(2**32) for _ in ports]
    with ThreadPoolExecutor(len(ports)) as pool:
        for _ in pool.map(
            lambda port, seed: throw_all(port, random.Random(seed), known, inputs), sorted(ports, key=str), seeds
        ):
            pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for data in datagrams(coordinator, rng):
            with contextlib.suppress(OSError):
                udp.sendto(data, (HOST, coordinator))


def throw_all(port: tuple[str, Place], rng: random.Random, known: list[bytes], inputs: int) -> None:
    """All inputs of one place, in the order of a seed."""
    begun = time.monotonic()
    for number in range(inputs):
        throw(port[1], malformed(rng, known), reset=number % 4 == 0)
    print(f"{inputs} inputs for {port[0]} at {port[1]!r} in {time.monotonic() - begun:.1f} s")


def leaks(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> list[str]:
    """Processes with more descriptors than before, or much more memory."""
    return [
        f"{psutil.Process(pid).name()}: {before[pid]} -> {after[pid]}"
        for pid in before
        if after[pid][0] > before[pid][0] + 4 or after[pid][1] > before[pid][1] + GROWN_BYTES
    ]


def test_ten_thousand_malformed_inputs_for_a_rank() -> None:
    """Two ranks exchange messages, while strangers send to one of them."""
    rng = random.Random(SEED)
    known = pieces("wrong")
    stop = threading.Event()
    ranks = [MeshCommunicator(rank, 0, host_id=f"host-{rank}", token=TOKEN) for rank in range(2)]
    peers = {comm.rank: comm.peer for comm in ranks}
    passed = [0, 0]

    def pass_on(comm: MeshCommunicator) -> None:
        other = 1 - comm.rank
        with contextlib.suppress(Aborted):
            while not stop.is_set():
                number = passed[comm.rank]
                comm.send(other, Key(Kind.USER, number), [torch.full((500,), number)])
                assert (comm.receive(other, Key(Kind.USER, number)).view(torch.int64) == number).all()
                passed[comm.rank] += 1

    for comm in ranks:
        comm.edit(1, peers)
    threads = [threading.Thread(target=pass_on, args=(comm,), daemon=True) for comm in ranks]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: min(passed) > 10, 10, "they talk")
        port = int(ranks[0].peer.address.rpartition(":")[2])
        descriptors = psutil.Process().num_fds()
        names = own_names(psutil.Process())
        assert names, "ranks of one host meet there"
        for place in (port, names[0]):
            throw_all(("a rank", place), rng, known, INPUTS)
        so_far = min(passed)
        wait_until(lambda: min(passed) > so_far + 10, 10, "they still communicate")
        wait_until(lambda: psutil.Process().num_fds() <= descriptors + 4, 10, "descriptors are given back")
        assert ranks[0].broken == ranks[1].broken == ()
    finally:
        stop.set()
        for comm in ranks:
            comm.abort()
        for thread in threads:
            thread.join(timeout=10)
        for comm in ranks:
            comm.close()
