"""Malformed input from outside is refused, by the documented error, and by no other."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.agents.coordinator.messages import agent_event
from everstep.comms.control import beats
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.mesh.frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    Header,
    Hello,
    ProtocolError,
)
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol.codec import Unreadable, state_of
from everstep.elastic.protocol.events import Record, WorkerId
from everstep.elastic.protocol.state import Config
from everstep.elastic.protocol.worker_messages import FROM_WORKER, TO_WORKER, FromWorker, read_event, read_order, write
from tests.unit.test_worker_messages import SAID

KEY = beats.key_of("a token")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS = [*FROM_WORKER, "unknown"]


@given(data=st.binary(max_size=200))
def test_datagrams(data: bytes) -> None:
    assert beats.unpack_beat(KEY, data) is None
    assert beats.unpack_echo(KEY, data) is None


@given(stamp=st.integers(0, 2**63), received=st.integers(0, 2**62), at=st.integers(0), bit=st.integers(0, 7))
def test_datagrams_with_one_bit_changed(stamp: int, received: int, at: int, bit: int) -> None:
    good = beats.pack_beat(KEY, beats.Beat(beats.name_of("node"), stamp, received))
    assert beats.unpack_beat(KEY, good) == (beats.name_of("node"), stamp, received)
    assert beats.unpack_echo(KEY, good) is None
    damaged = bytearray(good)
    damaged[at % len(damaged)] ^= 1 << bit
    assert beats.unpack_beat(KEY, bytes(damaged)) is None
    assert beats.unpack_beat(beats.key_of("another"), good) is None


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_frames(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Header.parse(data, 0)


@given(data=st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_greetings(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Hello.parse(data)


@settings(max_examples=300)
@given(kind=st.sampled_from(KINDS), body=st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_what_workers_say(kind: str, body: dict[str, object]) -> None:
    """It cannot be read, which is the node's fault; or it concerns an unknown worker, and nothing changes."""
    text = json.dumps({**body, "kind": kind})
    message = pb.AttachRequest(number=1, from_worker=pb.FromWorker(worker=pb.WorkerId(rank=0), json=text))
    try:
        event = agent_event("node", message, lambda stamp: stamp)
    except Exception:  # the node is expelled for any exception
        return
    state = coordinator.initial_state(Config(), 0.0)
    with contextlib.suppress(coordinator.IllegalJobEvent):  # expelled for this, too
        after, effects = coordinator.step(state, event, 1.0) if event is not None else (state, [])
        assert after == state
        assert all(isinstance(effect, Record) for effect in effects)


@settings(max_examples=300)
@given(kind=st.sampled_from([*TO_WORKER, "unknown"]), body=st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_what_workers_hear(kind: str, body: dict[str, object]) -> None:
    with contextlib.suppress(Unreadable):
        read_order(WorkerId(0, 0), json.dumps({**body, "kind": kind}))


@given(message=st.sampled_from(SAID), data=st.data())
def test_what_workers_say_with_one_value_changed(message: FromWorker, data: st.DataObject) -> None:
    """It is read as a message of that kind, or refused by the documented error."""
    fields = json.loads(write(message))
    name = data.draw(st.sampled_from(sorted(fields)))
    with contextlib.suppress(Unreadable):
        read_event(message.worker, json.dumps({**fields, name: data.draw(JSON)}))


@given(
    rows=st.dictionaries(st.sampled_from(["phase", "nodes", "workers", "job", "layout", "saved"]), JSON.map(json.dumps))
)
def test_rows_of_a_store(rows: dict[str, str]) -> None:
    with contextlib.suppress(Unreadable):
        state_of(Config(), rows)
