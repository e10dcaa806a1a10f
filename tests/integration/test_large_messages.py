"""Every channel between processes of Everstep carries 16 MiB; a message with a lower limit is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.agents.node.channel import WorkerChannel
from everstep.agents.node.keeper_process import start as start_keeper
from everstep.agents.node.preloader import Preloader
from everstep.agents.tools.client import Endpoints
from everstep.checkpointing.access import client as keeper_client
from everstep.checkpointing.access.client import KeeperClient, KeeperLink, KeeperRefused
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.segment import Segment
from everstep.checkpointing.saving.request import SaveRequest
from everstep.comms.base.security import Security
from everstep.comms.control import beats
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import Attachment
from everstep.comms.control.rpc import Server, Session
from everstep.elastic.contract.progress import create_page
from everstep.elastic.contract.settings import WorkerContext
from everstep.elastic.protocol.events import Conclude, EndWorker, WorkerId
from everstep.elastic.protocol.worker_messages import write
from tests.jobs import assert_same_run, finish, launch, run_job, wait_until

MIB = 1 << 20
LARGE = "0123456789abcdef" * MIB  # 16 MiB
CONTEXT = WorkerContext(rank=0, incarnation=0, world_size=1, host="127.0.0.1", host_id="h", token="t", keeper_name="")
TOKEN = "a job's token"

# ---------------------------------------------------------------- agent, coordinator and clients


class Echo:
    """A coordinator that welcomes every node, and sends messages of workers back to them."""

    def refusal(self) -> str:
        return ""

    def deliver(self, session: Session, request: pb.AttachRequest) -> None:
        if request.WhichOneof("body") == "hello":
            session.send(pb.AttachResponse(welcome=pb.Welcome(token=TOKEN, beat_s=1.0)))
        elif request.WhichOneof("body") == "from_worker":
            told = pb.ToWorker(worker=request.from_worker.worker, json=request.from_worker.json)
            session.send(pb.AttachResponse(number=1, to_worker=told))

    def lost(self, session: Session, why: str) -> None:
        pass

    def status(self) -> str:
        return json.dumps({"job": LARGE})

    def view(self, steps: int, rank_steps: int) -> str:
        return json.dumps({"steps": LARGE})

    async def trace(self, steps: int) -> AsyncGenerator[pb.GetTraceResponse, None]:
        yield pb.GetTraceResponse(head=json.dumps({"job": LARGE}))


@pytest.fixture
def coordinator() -> Iterator[str]:
    """The address of a coordinator that answers in large messages."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout=10)

    async def start() -> tuple[Server, int]:
        server = Server(Echo(), Security())
        return server, await server.start("127.0.0.1:0")

    server, port = run(start())
    yield f"127.0.0.1:{port}"
    run(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_agent_and_its_coordinator(coordinator: str) -> None:
    link = Attachment([coordinator], "job", Security())
    link.start("a node")
    try:
        link.send(from_worker=pb.FromWorker(worker=pb.WorkerId(rank=3), json=LARGE))
        heard: list[Any] = []

        def echoed() -> bool:
            heard.extend(m for m in link.received() if isinstance(m, pb.AttachResponse))
            return any(m.WhichOneof("body") == "to_worker" for m in heard)

        wait_until(echoed, 30, "the coordinator has sent it back")
        (order,) = [m for m in heard if m.WhichOneof("body") == "to_worker"]
        assert order.to_worker.json == LARGE
    finally:
        link.close()


def test_whoever_asks_a_coordinator(coordinator: str) -> None:
    endpoints = Endpoints(coordinator, Security(), 30.0)
    answer = endpoints.status(1, 1)
    assert json.loads(answer.json) == {"job": LARGE}
    assert json.loads(answer.view) == {"steps": LARGE}
    assert json.loads(endpoints.trace(1, 30.0)[0].head) == {"job": LARGE}


def test_heartbeats_are_of_one_size_whatever_is_in_them() -> None:
    beat = beats.Beat(beats.name_of("n" * 200), 2**64 - 1, 2**63 - 1)
    assert len(beats.pack_beat(beats.key_of(LARGE), beat)) == beats.DATAGRAM_BYTES < 200


# ---------------------------------------------------------------- worker and agent


WORKER = """
import sys, time
from everstep.elastic.contract import membership
from everstep.elastic.protocol import events as e
from everstep.elastic.contract.errors import JobEnded, UsageError

me = e.WorkerId(0, 0)
worker = membership.AgentMembership(int(sys.argv[1]), me)
worker.note("x", {"text": "0123456789abcdef" * 2**20})
while worker.conclusion is None:
    time.sleep(0.01)
membership.MESSAGE_BYTES = 2**20
try:
    worker.tell(e.CheckpointUnreadable(me, worker.conclusion.name, ""))
except UsageError as error:
    worker.tell(e.WorkerRaised(me, str(error), ""))
worker.take_conclusion()
try:
    worker.wait_for_end(lambda: None)
except JobEnded:
    sys.exit(0)
sys.exit(1)
"""


def test_a_worker_and_its_agent() -> None:
    """16 MiB each way; more than the limit is refused by the sender, by name."""
    channel = WorkerChannel()
    fd = channel.theirs.fileno()
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(fd)], pass_fds=[fd])
    lines: list[dict[str, Any]] = []

    def said(count: int) -> bool:
        channel.flush()
        lines.extend(json.loads(line) for line in channel.receive())
        return len(lines) == count

    try:
        wait_until(lambda: said(1), 60, "the agent has all of it")
        assert lines[0]["fields"]["text"] == LARGE
        channel.send(write(Conclude(WorkerId(0, 0), 3, LARGE)).encode())
        wait_until(lambda: said(2), 60, "the worker has all of it, and has answered")
        assert "('CheckpointUnreadable') has 16 MiB, and the limit is 1 MiB" in lines[1]["message"]
        channel.send(write(EndWorker(WorkerId(0, 0))).encode())
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()
        channel.close()


# ---------------------------------------------------------------- agent and preloaded process


def test_a_preloaded_process_is_given_16_mib(tmp_path: Path) -> None:
    """An environment, and arguments, larger than any datagram."""
    script, out = tmp_path / "worker.py", tmp_path / "out"
    script.write_text("import os, sys\nprint(len(os.environ['LARGE']), len(sys.argv[1]), flush=True)\n")
    preloader, channel = Preloader.start([]), WorkerChannel()
    page = create_page()
    heard: list[dict[str, Any]] = []

    def heard_of(kind: str) -> bool:
        heard.append(preloader.answer() or {})
        return heard[-1].get("kind") == kind

    try:
        wait_until(lambda: heard_of("ready"), 60, "it is ready")
        request = {
            "rank": 0,
            "incarnation": 0,
            "environment": {"LARGE": LARGE, "TORCHELASTIC_RESTART_COUNT": "0", **CONTEXT.to_environment()},
            "program": {"kind": "script", "target": str(script), "arguments": [LARGE]},
            "stdout": str(out),
            "stderr": "",
            "numa": ["", 0],
        }
        preloader.request(request, [channel.theirs.fileno(), page])
        wait_until(lambda: heard_of("exited"), 60, "the worker has ended")
        assert heard[-1]["status"] == 0
        assert out.read_text().split() == [str(len(LARGE))] * 2
    finally:
        preloader.close()
        channel.close()
        os.close(page)


# ---------------------------------------------------------------- workers, keepers and savers


@pytest.fixture
def keeper() -> Iterator[tuple[KeeperLink, KeeperClient]]:
    """A keeper, asked by its own worker and over TCP."""
    unix = f"everstep-test-{uuid.uuid4().hex}"
    server = KeeperServer(Keeper("a"), unix, "127.0.0.1", 0, TOKEN)
    threading.Thread(target=server.serve, daemon=True).start()
    link, client = KeeperLink(unix, TOKEN, 0, 0), KeeperClient(f"127.0.0.1:{server.port}", TOKEN)
    yield link, client
    link.close()
    client.close()
    server.close()


def test_a_keeper_is_asked_and_answers_with_16_mib(keeper: tuple[KeeperLink, KeeperClient]) -> None:
    link, client = keeper
    for ask in (lambda request: link._ask(request, []), client.ask):
        with pytest.raises(KeeperRefused) as refused:
            ask({"op": LARGE})
        assert str(refused.value) == f"unknown operation {LARGE!r}"


def test_a_record_of_16_mib(keeper: tuple[KeeperLink, KeeperClient]) -> None:
    link, client = keeper
    data = os.urandom(16 * MIB)
    with contextlib.closing(Segment.create([(0, len(data), 100)], states=2)) as segment:
        link.register(segment)
        slot = segment.free_slot(0, ())
        start = segment.open_slot(0, slot, len(data))
        segment.memory[start : start + len(data)] = data
        segment.seal_slot(0, slot, 7, len(data))
        found, damaged = client.fetch([0], 7, replay=False)
        assert not damaged
        assert [item.parts[0] for item in found] == [data]


def test_what_is_too_large_for_a_keeper_is_said_where_it_is_said(
    keeper: tuple[KeeperLink, KeeperClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "REQUEST_BYTES", MIB)
    link, client = keeper
    for ask in (lambda request: link._ask(request, []), client.ask):
        with pytest.raises(ValueError, match=r"'save'.* is 16 MiB, and the limit is 1 MiB"):
            ask({"op": "save", "request": LARGE})


def test_a_saver_is_asked_with_16_mib(tmp_path: Path) -> None:
    """By its keeper, through a pipe; its answer is as long."""
    request = SaveRequest(
        url=str(tmp_path),
        options={},
        name=LARGE,  # a name that no file can have: the error contains it
        writer="rank-0",
        writers=1,
        version=1,
        parameters=(),
        pieces=(),
        expected=(),
        manifest={"agreement": LARGE},
        keep=1,
        keep_s=0.0,
    )
    process = start_keeper(f"everstep-test-{uuid.uuid4().hex}", "a", "127.0.0.1", 0, TOKEN, 0.0)
    link = KeeperLink(process.name, TOKEN, 0, 0)
    results: list[dict[str, Any]] = []
    try:
        link.save(request.to_json())

        def ended() -> bool:
            results.extend((link.saves("rank-0") or {"results": []})["results"])
            return bool(results)

        wait_until(ended, 60, "the saver has answered")
        assert results[0]["name"] == LARGE
        assert results[0]["error"]
    finally:
        link.close()
        process.kill()


# ---------------------------------------------------------------- whole jobs


def test_a_large_environment(tmp_path: Path) -> None:
    """One of a megabyte, which is more than a datagram takes, reaches a worker."""
    script = tmp_path / "script.py"
    count = "count = sum(len(os.environ[f'LARGE_{i}']) for i in range(10))"
    script.write_text(f"import os\n{count}\nos.write(1, f'{{count}} '.encode())\n")  # one write: ranks share the pipe
    large = {f"LARGE_{i}": LARGE[: 100 << 10] for i in range(10)}
    process = launch(script, [], ["--nproc-per-node", "2"], large)
    assert finish(process).split() == [str(1000 << 10)] * 2
    assert process.returncode == 0


def test_a_model_of_2200_parameters_survives_a_kill() -> None:
    faults = [
        {"rank": 1, "phase": "compute", "step": 2},
        {"rank": 0, "phase": "update", "step": 3},
    ]
    settings = {"script": "many_parameters_job.py", "nproc": 2, "steps": 5, "parameters": 2200}
    killed, undisturbed = run_job(faults=faults, **settings), run_job(**settings)
    assert len(killed.named("worker_died")) == len(faults)
    assert_same_run(killed, undisturbed)


@pytest.mark.soak
def test_registered_states_have_a_limit() -> None:
    """Below the limit all works, kills included; what exceeds it is refused at the call, or when it grows, by name."""
    settings = {"script": "many_parameters_job.py", "nproc": 2, "steps": 5}
    kill = [{"rank": 1, "phase": "compute", "step": 3}]
    below = run_job(registered_kib=[400, 500], faults=kill, **settings)
    assert below.status == 0, below.output
    assert len(below.named("worker_died")) == 1
    above = run_job(registered_kib=[400, 700], **settings)
    assert above.status == 1
    assert "register_state('kept-1'): its state takes 700 KiB" in above.output
    assert "all registered states 1.1 MiB, and the limit is 1.0 MiB in all" in above.output
    assert "Traceback" not in above.output
    grows = run_job(registered_kib=[150], grows_at=2, **settings)
    assert grows.status == 1
    assert "register_state('kept-0'): its state takes 1.5 MiB" in grows.output
    assert not grows.named("worker_died"), "nobody is killed for it"


def test_an_exception_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    flags = ["--log-dir", str(tmp_path / "logs")]
    result = run_job(script="many_parameters_job.py", nproc=2, steps=5, raises_at=2, flags=flags)
    assert result.status == 1
    assert "ValueError: a row of the data: 999" in result.output
    assert "characters left out" in result.output
