"""A coordinator that leads: how it treats messages before anything is written."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.agents.coordinator.durable import Durable
from everstep.agents.coordinator.eventlog import EventLog, Listeners
from everstep.agents.coordinator.leader import Leader
from everstep.agents.coordinator.node_sessions import NodeSessions
from everstep.agents.coordinator.store import SqliteStore
from everstep.comms.base.security import Security, digest_of
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import PROTOCOL
from everstep.comms.control.rpc import Session
from everstep.elastic.protocol.events import WorkerId, WorkerSwitched
from everstep.elastic.protocol.state import Config, Phase
from everstep.elastic.protocol.worker_messages import write

CONFIG = Config(min_nodes=2, max_nodes=2)
READY = pb.AttachRequest(number=1, ready=pb.NodeReady(host="host", slots=1, keeper="keeper:1"))


@pytest.fixture
def leader(tmp_path: Path) -> Iterator[Leader]:
    store = SqliteStore(tmp_path / "store", "job")
    durable, _, _ = Durable.load(store, CONFIG, "token")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        listeners = Listeners()
        yield Leader(
            "job", CONFIG, Security(), durable, NodeSessions(durable, udp), EventLog(None, listeners), listeners
        )
    store.close(forget=True)


def greeted(leader: Leader, *, returning: bool = False) -> Session:
    session = Session()
    hello = pb.Hello(job="job", node="n0", protocol=PROTOCOL, token_digest=digest_of("token"), returning=returning)
    leader._take(session, pb.AttachRequest(hello=hello))
    return session


def answers(session: Session) -> list[pb.AttachResponse]:
    async def all_of_them() -> list[pb.AttachResponse]:
        return [message async for message in session.messages()]

    session.end()
    return asyncio.run(all_of_them())


def test_a_node_that_says_what_cannot_be_is_expelled_and_the_job_goes_on(leader: Leader) -> None:
    session = greeted(leader)
    leader._take(session, READY)
    assert list(leader.state.nodes) == ["n0"]
    worker = pb.FromWorker(worker=pb.WorkerId(rank=0), json=write(WorkerSwitched(WorkerId(0, 0), 1)))
    leader._take(session, pb.AttachRequest(number=2, from_worker=worker))
    assert leader.state.phase is Phase.FORMING
    assert not leader.state.nodes
    refused = [answer.refused.why for answer in answers(session) if answer.WhichOneof("body") == "refused"]
    assert len(refused) == 1
    assert "it said what cannot be: the job is forming in generation 0" in refused[0]
    assert "WorkerSwitched cannot happen" in refused[0]


def test_a_node_that_returns_keeps_what_is_not_written(leader: Leader) -> None:
    """If this coordinator ends before it has written that, the next one must receive it again."""
    leader._take(greeted(leader), READY)
    (welcome,) = answers(greeted(leader, returning=True))
    assert welcome.welcome.received == 0
