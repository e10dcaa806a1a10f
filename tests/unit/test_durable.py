"""What the next coordinator finds after one died between writing a decision and sending it."""

from __future__ import annotations

from pathlib import Path

from everstep.agents.coordinator.durable import Durable
from everstep.agents.coordinator.store import SqliteStore
from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol.events import NodeJoined
from everstep.elastic.protocol.state import Config

CONFIG = Config(max_nodes=2)


def written(path: Path) -> None:
    """A node has joined, and has received two orders and acknowledged one; then the coordinator died."""
    store = SqliteStore(path, "job")
    durable, state, _ = Durable.load(store, CONFIG, "the token")
    assert state is None
    state, _ = coordinator.step(coordinator.initial_state(CONFIG, 5.0), NodeJoined("n0", "host", 1, "keeper"), 6.0)
    durable.open("n0")
    durable.saw("n0", 7)
    for text in ("first", "second"):
        assert durable.order("n0", pb.AttachResponse(notice=pb.Notice(text=text)))
    assert not durable.order("nobody", pb.AttachResponse())
    durable.record({"event": "node_joined"})
    durable.write(durable.gather(state, 6.0), sync=True)
    durable.acknowledge("n0", 1)
    durable.record({"event": "later"})
    durable.write(durable.gather(state, 7.0), sync=True)
    store.close(forget=False)


def test_what_was_decided_is_told_by_the_next(tmp_path: Path) -> None:
    written(tmp_path / "store")
    store = SqliteStore(tmp_path / "store", "job")
    durable, state, ahead_s = Durable.load(store, CONFIG, "another token")
    assert state is not None
    assert list(state.nodes) == ["n0"]
    assert durable.token == "the token"
    channel = durable.channels["n0"]
    assert (channel.seen, channel.kept, channel.ordered) == (7, 7, 2)
    orders = {number: pb.AttachResponse.FromString(data) for number, data in channel.pending.items()}
    assert {number: (o.number, o.notice.text) for number, o in orders.items()} == {2: (2, "second")}
    assert [(line["number"], line["event"]) for line in durable.records] == [(1, "node_joined"), (2, "later")]
    message = pb.AttachResponse(notice=pb.Notice(text="third"))
    durable.order("n0", message)
    assert message.number == 3, "numbers continue"
    assert isinstance(ahead_s, float)
    durable.close("n0")
    durable.write(durable.gather(state, 8.0), sync=False)
    assert not [name for name in store.load() if name.startswith(("order/", "node/"))], "who is gone leaves nothing"
    store.close(forget=True)
