"""The load of a coordinator with thousands of nodes that send a heartbeat a second, and its time to abort.

    python tests/bench/control.py --json [--agents 1000,4000,10000]

The coordinator is the real one (`everstep coordinator`), alone on one core; it takes up a job that trains on n nodes of
one worker each, from a store that this script wrote. On another core one process plays all agents: each has a gRPC
stream and sends its beats as agents do. Then one worker dies, and every other one has to hear that its generation is
over. Times are taken where the agents are. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
from processes import die_with_parent

from everstep.agents.coordinator.durable import Durable
from everstep.agents.coordinator.store import SqliteStore
from everstep.agents.tools.client import Endpoints, NoAnswer
from everstep.comms.base.security import Security, digest_of
from everstep.comms.control import beats
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import PROTOCOL
from everstep.comms.control.everstep_pb2_grpc import CoordinatorServiceStub
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import (
    Config,
    Node,
    Phase,
    State,
    Status,
    Worker,
)
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec

JOB, TOKEN = "control", "a token of the benchmark"
STREAMS_PER_CHANNEL = 100
SETTLE_S, MEASURE_S = 3.0, 10.0
SLOTS = 100  # of a second, over which the beats are spread
ABORT_TIMEOUT_S = 30.0


def names(count: int) -> list[str]:
    return [f"node-{number:05}" for number in range(count)]


def training(count: int) -> State:
    """A job that trains on this number of nodes."""
    parameters = tuple(ParameterSpec(f"{i}.weight", (1024, 256), "float32", 4, (i,)) for i in range(4))
    model = ModelSpec((1.0,) * 4, parameters)
    job = e.Job(steps=10**6, stages=1, micro_batches=count, global_batch_size=count, model=model, protection="none")
    layout = replace(initial_layout(model, range(count), 1, count), generation=1)
    nodes = {name: Node(name, "127.0.0.1", 1, "127.0.0.1:1") for name in names(count)}
    workers = {
        rank: Worker(e.WorkerId(rank, 0), name, Status.MEMBER, {"address": "127.0.0.1"})
        for rank, name in enumerate(nodes)
    }
    return State(
        config=Config(min_nodes=count, max_nodes=count),
        phase=Phase.RUNNING,
        nodes=nodes,
        workers=workers,
        elastic=True,
        job=job,
        generation=1,
        layout=layout,
        committed=10,
        recorded=10,
        agreed=10,
    )


def write_store(path: Path, count: int) -> None:
    """Write what an earlier coordinator would have stored."""
    store = SqliteStore(path, JOB)
    durable = Durable(store, TOKEN)
    for name in names(count):
        durable.open(name)
    durable.write(durable.gather(training(count), time.monotonic()), sync=True)
    store.close(forget=False)


# ---------------------------------------------------------------- the agents


class Agents:
    """All agents of the job, in one process."""

    def __init__(self, address: str, count: int) -> None:
        self.names = names(count)
        self._address = address
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        host, _, port = address.rpartition(":")
        self._udp.connect((host, int(port)))
        self._udp.setblocking(False)
        self._key = beats.key_of(TOKEN)
        self._digests = [beats.name_of(name) for name in self.names]
        self._calls: list[Any] = []
        self._channels: list[Any] = []
        self.latencies_s: list[float] = []
        self.by_datagram: dict[bytes, float] = {}  # node -> when it heard that the generation is over
        self.by_stream: dict[str, float] = {}
        self._readers: list[asyncio.Task[None]] = []

    async def attach(self) -> None:
        """Every agent opens its stream, and is welcomed."""
        begun, sent = time.monotonic(), 0
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        for i, name in enumerate(self.names):
            if i % STREAMS_PER_CHANNEL == 0:
                self._channels.append(grpc.aio.insecure_channel(self._address, options=options))
            self._calls.append(await self._hello(name))
            due = int((time.monotonic() - begun) * len(self.names))  # agents beat also while they look for it
            self.beat(range(sent, due))
            sent = due
            self.hear()
        for name, call in zip(self.names, self._calls, strict=True):
            welcome = await call.read()
            assert welcome.WhichOneof("body") == "welcome", (name, welcome)
        self._readers = [
            asyncio.create_task(self._read(name, call)) for name, call in zip(self.names, self._calls, strict=True)
        ]

    async def _hello(self, name: str) -> Any:
        call = CoordinatorServiceStub(self._channels[-1]).Attach()
        hello = pb.Hello(job=JOB, node=name, protocol=PROTOCOL, returning=True, token_digest=digest_of(TOKEN))
        await call.write(pb.AttachRequest(hello=hello))
        return call

    async def detach(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self._channels))
        self._udp.close()

    async def _read(self, name: str, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("body") == "to_worker":
                self.by_stream.setdefault(name, time.monotonic())

    def beat(self, which: range) -> None:
        for i in which:
            beat = beats.Beat(self._digests[i % len(self.names)], time.monotonic_ns(), 0)
            try:
                self._udp.send(beats.pack_beat(self._key, beat))
            except BlockingIOError:
                continue

    def hear(self) -> None:
        while True:
            try:
                data = self._udp.recv(1024)
            except BlockingIOError:
                return
            echo = beats.unpack_echo(self._key, data)
            assert echo is not None
            if echo.aborted >= 0:
                self.by_datagram.setdefault(echo.node, time.monotonic())
            else:
                self.latencies_s.append((time.monotonic_ns() - echo.stamp) / 1e9)

    async def live(self, seconds: float) -> None:
        """One beat a second from each, spread evenly."""
        share = -(-len(self.names) // SLOTS)
        begun = time.monotonic()
        for slot in range(int(seconds * SLOTS)):
            first = slot % SLOTS * share
            self.beat(range(first, min(first + share, len(self.names))))
            until = begun + (slot + 1) / SLOTS
            while (left := until - time.monotonic()) > 0:
                with selectors.DefaultSelector() as selector:
                    selector.register(self._udp, selectors.EVENT_READ)
                    selector.select(min(left, 0.002))
                self.hear()
                await asyncio.sleep(0)

    async def lose_a_worker(self) -> dict[str, float]:
        """Until every other one has heard of it, and longer for the streams."""
        died = pb.WorkerDied(worker=pb.WorkerId(rank=0, incarnation=0), cause="killed by the benchmark", step=11)
        at = time.monotonic()
        await self._calls[0].write(pb.AttachRequest(number=1, died=died))
        others = len(self.names) - 1
        while time.monotonic() - at < ABORT_TIMEOUT_S and (
            len(self.by_stream) < others or len(self.by_datagram) < others
        ):
            self.hear()
            await asyncio.sleep(0.001)
        assert len(self.by_stream) == others, f"{len(self.by_stream)} of {others} have heard of it"
        heard = {
            name: min(self.by_datagram.get(digest, float("inf")), self.by_stream.get(name, float("inf")))
            for name, digest in zip(self.names[1:], self._digests[1:], strict=True)
        }
        return {
            "abort_to_all_s": max(heard.values()) - at,
            "abort_to_all_by_datagram_s": max(self.by_datagram.values(), default=float("nan")) - at,
            "datagrams_lost": others - len(self.by_datagram),
            "abort_to_all_by_stream_s": max(self.by_stream.values()) - at,
        }


async def play(address: str, count: int, coordinator: int) -> dict[str, Any]:
    agents = Agents(address, count)
    begun = time.monotonic()
    await agents.attach()
    attached_s = time.monotonic() - begun
    gc.disable()  # ten thousand agents have no pause in common
    await agents.live(SETTLE_S)
    agents.latencies_s.clear()
    process = psutil.Process(coordinator)
    cpu, wall = sum(process.cpu_times()[:2]), time.monotonic()
    await agents.live(MEASURE_S)
    cores = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - wall)
    latencies = sorted(agents.latencies_s)
    result = {
        "agents": count,
        "attached_s": attached_s,
        "beats_per_s": len(latencies) / MEASURE_S,
        "cores": cores,
        "rss_gb": process.memory_info().rss / 1e9,
        "latency_p50_ms": 1e3 * statistics.median(latencies),
        "latency_p99_ms": 1e3 * latencies[int(0.99 * len(latencies))],
    }
    result |= await agents.lose_a_worker()
    result["rss_gb_after_abort"] = process.memory_info().rss / 1e9
    await agents.detach()
    gc.enable()
    return result


# ---------------------------------------------------------------- the measurement


def measure(count: int) -> dict[str, Any]:
    """Measure one coordinator with this number of agents."""
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
        store = Path(folder) / "store.sqlite"
        write_store(store, count)
        cores = sorted(os.sched_getaffinity(0))

        def alone() -> None:
            die_with_parent()
            os.sched_setaffinity(0, cores[:1])

        command = [sys.executable, "-m", "everstep", "coordinator", "--bind=127.0.0.1:0", f"--rdzv-id={JOB}"]
        command += [f"--nnodes={count}", f"--es-store={store}"]
        environment = {**os.environ, "EVERSTEP_JOB_TOKEN": TOKEN}
        coordinator = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=alone, env=environment)
        try:
            assert coordinator.stdout is not None
            address = coordinator.stdout.readline().split()[-1]
            until_it_leads(address)
            os.sched_setaffinity(0, cores[-1:])
            return asyncio.run(play(address, count, coordinator.pid))
        finally:
            os.sched_setaffinity(0, cores)
            coordinator.kill()
            coordinator.wait()
            if coordinator.stdout is not None:
                coordinator.stdout.close()


def until_it_leads(address: str) -> None:
    while True:
        with contextlib.suppress(NoAnswer):
            Endpoints(address, Security(token=TOKEN)).status()
            return
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object (the only form)")
    parser.add_argument("--agents", default="1000,4000,10000")
    arguments = parser.parse_args()
    runs = [measure(int(count)) for count in arguments.agents.split(",")]
    most = runs[-1]
    targets = [
        (f"{most['agents']} agents: cores of the coordinator", most["cores"], 0.5),
        (f"{most['agents']} agents: GB of memory", most["rss_gb_after_abort"], 2.0),
        (f"{most['agents']} agents: seconds from a death to the abort at all", most["abort_to_all_s"], 1.0),
    ]
    shown = [{"name": name, "value": value, "bound": bound, "met": value <= bound} for name, value, bound in targets]
    print(json.dumps({"benchmark": "control", "cpu_count": os.cpu_count(), "runs": runs, "targets": shown}))


if __name__ == "__main__":
    main()
