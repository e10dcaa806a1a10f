"""Data and messages of another version are read, or refused by an error that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import lzma
import os
import socket
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everstep.agents.coordinator.durable import Durable, Writer
from everstep.agents.coordinator.store import SqliteStore, StateStoreError
from everstep.agents.node import keeper_process
from everstep.checkpointing.access import keeper_protocol
from everstep.checkpointing.access.client import KeeperClient, KeeperLink, KeeperRefused
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.record import ShardRecord, read_record
from everstep.checkpointing.memory.record_format import VERSION, items
from everstep.checkpointing.memory.segment import Entry, Segment
from everstep.checkpointing.universal.reader import open_checkpoint
from everstep.elastic.protocol import codec, coordinator
from everstep.elastic.protocol.state import Config, State

EARLIER = Path(__file__).parents[1] / "data" / "versions" / "5fd5c74"
CONFIG = Config(max_nodes=2)
TOKEN = "token of a test"


# ---------------------------------------------------------------- the coordinator's store


def store_at(path: Path) -> SqliteStore:
    return SqliteStore(path, "older")


def test_a_store_of_an_earlier_version_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(lzma.decompress((EARLIER / "store.sqlite.xz").read_bytes()))
    store = store_at(path)
    assert b"5" in store.load()["state/committed"] or int(store.load()["state/committed"]) > 5, "it is one, of a job"
    message = (
        rf"^{path} was written by everstep of an earlier release \(format 1, state unknown, protocol 0\), and this is "
        r"everstep \S+ \(format 2, state [0-9a-f]{16}, protocol \d+\): continue with the version that wrote it, or "
        "move the store away to start the job again$"
    )
    with pytest.raises(StateStoreError, match=message):
        Durable.load(store, CONFIG, TOKEN)
    store.close(forget=False)


@pytest.mark.parametrize("changed", [{"format": 3}, {"state": "0" * 16}, {"protocol": 99}])
def test_a_store_of_another_version_is_refused(tmp_path, changed: dict[str, object]) -> None:
    store = store_at(tmp_path / "store")
    durable, _, _ = Durable.load(store, CONFIG, TOKEN)
    durable.write(durable.gather(coordinator.initial_state(CONFIG, 0.0), 0.0), sync=True)
    assert Durable.load(store, CONFIG, TOKEN)[1] is not None, "its own is read"
    other = Writer.this()._replace(release="9.9", **changed)
    store.commit({"about": json.dumps(other).encode()}, sync=True)
    with pytest.raises(StateStoreError, match=r"was written by everstep 9\.9 .*, and this is everstep"):
        Durable.load(store, CONFIG, TOKEN)
    store.commit({"about": json.dumps(Writer.this()._replace(release="9.9")).encode()}, sync=True)
    assert Durable.load(store, CONFIG, TOKEN)[1] is not None, "another release that writes the same is read"
    store.close(forget=True)


def test_every_class_of_the_state_counts(monkeypatch) -> None:
    """One more field, anywhere in the state, makes another version."""
    before = codec.schema()
    seen: dict[str, object] = {}
    codec._describe(State, seen)
    parts = {"State", "Plan", "Layout", "RecoveryStory", "Job", "ModelSpec", "Placement", "Cause", "Trouble"}
    assert parts <= seen.keys()
    assert "Config" not in seen, "a coordinator is told that"
    more = dataclasses.make_dataclass("Worker", [("colour", str)])
    hints = {**codec._hints(State), "workers": dict[int, more]}
    original = codec._hints
    monkeypatch.setattr(codec, "_hints", lambda kind: hints if kind is State else original(kind))
    codec.schema.cache_clear()
    try:
        assert codec.schema() != before
    finally:
        monkeypatch.undo()
        codec.schema.cache_clear()


# ---------------------------------------------------------------- a keeper's records, and the keeper


@pytest.fixture
def segment() -> Iterator[Segment]:
    data = lzma.decompress((EARLIER / "segment.bin.xz").read_bytes())
    place = json.loads((EARLIER / "segment.json").read_text())
    fd = os.memfd_create("earlier", os.MFD_CLOEXEC)
    os.write(fd, data)
    found = Segment(fd, place["size"], [Entry(*entry) for entry in place["entries"]], place["states"])
    yield found
    found.close()


@pytest.mark.parametrize("shard", [0, 1, 4])
@pytest.mark.parametrize("version", [6, 7])
def test_a_keepers_records_of_an_earlier_version_are_read(segment, shard: int, version: int) -> None:
    stored = segment.find(shard, version)
    data = segment.read(stored)
    assert data is not None
    state = read_record(data)
    generator = torch.Generator().manual_seed(100 * shard + version)
    rows = 3 + shard
    assert torch.equal(state["value"], torch.randn(rows, 4, generator=generator))
    assert torch.equal(state["exp_avg"], torch.randn(rows, 4, generator=generator).bfloat16())
    assert torch.equal(state["exp_avg_sq"], torch.zeros(rows, 4))
    assert (state["step"], state["note"], state["rate"]) == (torch.tensor(float(version)), None, 0.125)
    assert segment.stored(shard, 2) is None, "the slot that was torn"
    gradient = segment.read(segment.find_gradient(shard, 7))
    assert gradient == torch.full((rows, 4), 0.5 * shard + 1).numpy().tobytes()


def test_a_record_of_a_later_version_is_refused_by_its_number() -> None:
    record = ShardRecord({"value": torch.ones(3)})
    data = bytearray(record.length)
    record.write(memoryview(data))
    assert [item.name for item in items(bytes(data))] == ["value"]
    data[6:8] = (VERSION + 1).to_bytes(2, "little")
    with pytest.raises(ValueError, match=f"is of version {VERSION + 1} of the format, and this everstep reads version"):
        items(bytes(data))


@pytest.fixture
def server() -> Iterator[tuple[KeeperServer, str]]:
    name = f"everstep-test-{uuid.uuid4().hex}"
    found = KeeperServer(Keeper("n0"), name, "127.0.0.1", 0, TOKEN)
    threading.Thread(target=found.serve, daemon=True).start()
    yield found, name
    found.close()


@pytest.mark.parametrize("protocol", [None, 1, keeper_protocol.PROTOCOL + 1])
def test_a_keeper_refuses_who_speaks_another_version(server, monkeypatch, protocol: int | None) -> None:
    said = {"token": TOKEN, **({} if protocol is None else {"protocol": protocol})}
    keeper, name = server
    message = (
        f"speaks version {keeper_protocol.PROTOCOL} of the keeper protocol, and who connects speaks version "
        f"{protocol or 1}: run the same everstep on every node"
    )
    monkeypatch.setattr(
        "everstep.checkpointing.access.client.greeting", lambda token: json.dumps(said).encode() + b"\n"
    )
    client = KeeperClient(f"127.0.0.1:{keeper.port}", TOKEN)
    with contextlib.closing(client), pytest.raises(KeeperRefused, match=message):
        client.ask({"op": "held"})
    link = KeeperLink(name, TOKEN, 0, 0)
    with contextlib.closing(link), pytest.raises(KeeperRefused, match=message):
        link.state()


def test_a_keeper_that_speaks_the_same_version_answers(server) -> None:
    keeper, name = server
    with contextlib.closing(KeeperClient(f"127.0.0.1:{keeper.port}", TOKEN)) as client:
        assert client.ask({"op": "held"})["parity_bytes"] == 0
    with contextlib.closing(KeeperLink(name, TOKEN, 0, 0)) as link:
        assert link.state() is not None


def test_a_keeper_that_an_earlier_version_left_is_not_taken_over() -> None:
    """It would misread what a new worker passes to it."""
    name = f"everstep-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                assert json.loads(lines.readline())["token"] == TOKEN
                assert json.loads(lines.readline())["op"] == "adopt"
                connection.sendall(b'{"adopted": true, "port": 5, "pid": 77}\n')

        keeper = threading.Thread(target=answer)
        keeper.start()
        message = r"\(process 77\) speaks version 1 of the keeper protocol, and this everstep version \d+: end that"
        with pytest.raises(keeper_process.EarlierKeeper, match=message):
            keeper_process._take_over(name, "n0", TOKEN)
        keeper.join(10)


# ---------------------------------------------------------------- a checkpoint


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path) -> None:
    with tarfile.open(EARLIER / "checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    assert not list(checkpoint.verify())
    assert (checkpoint.manifest.step, checkpoint.manifest.states) == (4, ("exp_avg", "exp_avg_sq"))
    assert checkpoint.read("params/0.weight").shape == (5, 2)
    assert checkpoint.manifest.data["position"] == 32
