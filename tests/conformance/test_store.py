"""The contract of every store of a coordinator, and the errors for one that cannot be used."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.agents.coordinator import etcd
from everstep.agents.coordinator.etcd import EtcdStore, JobOver
from everstep.agents.coordinator.store import (
    SqliteStore,
    StateStore,
    StateStoreError,
    Superseded,
)
from everstep.comms.base.process import die_with_parent
from everstep.comms.base.security import Security
from tests.jobs.ports import free_ports

Opener = Callable[[], StateStore]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An etcd of one member."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed (Debian: etcd-server)")
    port, peer = free_ports(2)
    here = f"http://127.0.0.1:{port}"
    command = ["etcd", f"--data-dir={tmp_path_factory.mktemp('etcd')}", "--log-level=error", "--logger=zap"]
    command += [f"--listen-client-urls={here}", f"--advertise-client-urls={here}"]
    command += [f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}"]
    command += [f"--initial-cluster=default=http://127.0.0.1:{peer}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    deadline = time.monotonic() + 20
    while True:
        try:
            etcd.EtcdMembers(f"etcd://127.0.0.1:{port}", Security()).ask(lambda client: client.status())
            break
        except StateStoreError:
            assert time.monotonic() < deadline, "etcd answers"
            time.sleep(0.1)
    yield f"etcd://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture(params=["sqlite", "etcd"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same store repeatedly."""
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / "a folder" / "store.sqlite", "job")
    url, job = request.getfixturevalue("cluster"), f"job of {tmp_path.name}"
    return lambda: EtcdStore(url, job, Security(), lambda why: None, stood_by=False)


def test_rows_stay(opener: Opener) -> None:
    store = opener()
    assert store.load() == {}
    store.commit({"a": b"1", "b/\u00e9": b"\0\xff" * 10, "c": b""}, sync=True)
    store.commit({"a": b"2", "c": None, "nobody": None}, sync=False)
    kept = {"a": b"2", "b/\u00e9": b"\0\xff" * 10}
    assert store.load() == kept
    store.close(forget=False)
    again = opener()
    assert again.load() == kept
    assert not again.superseded
    again.close(forget=True)
    last = opener()
    assert last.load() == {}
    last.close(forget=True)


def test_many_and_large(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """More commits than are kept separately, rows of more than one part; the store does not grow with their number."""
    monkeypatch.setattr(etcd, "SNAPSHOT_COMMITS", 7)
    monkeypatch.setattr(etcd, "PART_BYTES", 1000)
    store = opener()
    store.load()
    expected: dict[str, bytes] = {}
    for number in range(40):
        rows: dict[str, bytes | None] = {f"row {number % 10}": bytes([number]) * 50, "same": str(number).encode()}
        rows[f"row {(number + 5) % 10}"] = None
        if number == 20:
            rows["large"] = bytes(range(256)) * 1000
        store.commit(rows, sync=number % 2 == 0)
        for name, data in rows.items():
            expected.pop(name, None)
            if data is not None:
                expected[name] = data
    store.close(forget=False)
    again = opener()
    assert again.load() == expected
    again.close(forget=True)


@pytest.mark.soak
def test_a_row_of_16_mib(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Incompressible rows: as they are written, and as a snapshot."""
    monkeypatch.setattr(etcd, "SNAPSHOT_COMMITS", 2)
    rows = {f"row {i}": random.Random(i).randbytes(16 << 20) for i in range(2)}
    store = opener()
    store.load()
    for name, data in rows.items():
        store.commit({name: data}, sync=True)
        store.close(forget=False)
        store = opener()
        assert store.load()[name] == data
    assert store.load() == rows
    store.close(forget=True)


def test_a_large_row_is_read_in_several_answers(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer with everything in it would take longer than a request may, on a slow machine."""
    store = EtcdStore(cluster, "large", Security(), lambda why: None, stood_by=False)
    row = random.Random(1).randbytes(3 << 20)  # more than eight parts in base64
    store.load()
    store.commit({"row": row}, sync=True)
    sizes = []
    ask = etcd.EtcdMembers.ask

    def observed(self: etcd.EtcdMembers, request: Callable[[Any], Any]) -> Any:
        answer = ask(self, request)
        sizes.append(len(json.dumps(answer, default=repr)))
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(etcd.EtcdMembers, "ask", observed)
        assert store.load() == {"row": row}
    assert len(sizes) > 2
    assert max(sizes) < 2 * etcd.READ_PARTS * etcd.PART_BYTES
    store.close(forget=True)


def test_history_of_etcd_is_compacted(
    cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the leader, except for young keys; keys that another process has removed already do no harm."""
    monkeypatch.setattr(etcd, "SNAPSHOT_COMMITS", 5)
    store = EtcdStore(cluster, "history", Security(), lambda why: None, stood_by=False)
    store.load()
    client = etcd.EtcdMembers(cluster, Security())

    def commit(count: int) -> int:
        """Etcd's revision after it."""
        for number in range(count):
            store.commit({"row": b"%d" % number}, sync=True)
        return int(client.ask(lambda one: one.status())["header"]["revision"])

    def compacted(revision: int) -> bool:
        query = {"key": "YQ==", "revision": revision}
        try:
            client.ask(lambda one: one.post(one.get_url("/kv/range"), json=query))
        except StateStoreError as error:
            return "required revision has been compacted" in str(error)
        return False

    young = commit(12)
    assert not compacted(young - 1)
    monkeypatch.setattr(etcd, "HISTORY_S", 0.0)
    newest = commit(12)
    assert compacted(young)
    assert not compacted(newest)
    client.ask(lambda one: one.post(one.get_url("/kv/compaction"), json={"revision": newest}))
    monkeypatch.setattr(etcd, "HISTORY_S", 1000.0)
    commit(10)  # remembers revisions, of which the first is compacted already
    monkeypatch.setattr(etcd, "HISTORY_S", 0.0)
    young = commit(1)
    ask = store._etcd.ask

    def away(request: object) -> None:
        raise StateStoreError("no member of etcd answers")

    monkeypatch.setattr(store._etcd, "ask", away)
    for _ in range(2):
        store._compact_history()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once"
    monkeypatch.setattr(store._etcd, "ask", ask)
    assert not compacted(young)
    commit(10)
    assert compacted(young), "it was tried again"
    assert store.load() == {"row": b"9"}
    store.close(forget=True)


def test_a_leader_that_was_replaced_writes_nothing(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "RENEW_S", 1000.0)
    first = EtcdStore(cluster, "replaced", Security(), lambda why: None, stood_by=False)
    first.load()
    first.commit({"a": b"1"}, sync=True)
    second = EtcdStore(cluster, "replaced", Security(), lambda why: None, stood_by=False)  # once the lease is over
    assert first.superseded
    assert second.load() == {"a": b"1"}
    second.commit({"a": b"2"}, sync=True)
    with pytest.raises(Superseded):
        first.commit({"a": b"3"}, sync=True)
    first._closing.set()
    assert second.load() == {"a": b"2"}
    second.close(forget=True)
    with pytest.raises(JobOver):
        EtcdStore(cluster, "replaced", Security(), lambda why: None, stood_by=True)


# ---------------------------------------------------------------- what cannot be used


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(StateStoreError) as caught:
        action()
    return str(caught.value)


def test_a_file_in_use(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = SqliteStore(path, "job")
    assert "is in use: another coordinator of this job runs on this machine" in refused(
        lambda: SqliteStore(path, "job")
    )
    store.close(forget=False)
    SqliteStore(path, "job").close(forget=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_job_or_version(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    SqliteStore(path, "job").close(forget=False)
    assert "is of job 'job', not 'other'" in refused(lambda: SqliteStore(path, "other"))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE about SET format = 99")
    db.close()
    assert "has format 99, and this version of everstep reads format" in refused(lambda: SqliteStore(path, "job"))


def test_a_file_that_is_damaged_or_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"not a database, whatever it says" * 100)
    assert "is damaged, or no store of ours" in refused(lambda: SqliteStore(path, "job"))
    path.unlink()
    store = SqliteStore(path, "job")
    store.commit({f"row {number}": bytes([number % 256]) * 3000 for number in range(100)}, sync=True)
    store.close(forget=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = b"\xa5" * 9000
    path.write_bytes(data)
    assert "move the file away to start a new job" in refused(lambda: SqliteStore(path, "job").load())


def test_places_that_are_none(tmp_path: Path) -> None:
    assert "cannot be opened" in refused(lambda: SqliteStore(tmp_path, "job"))
    assert "HOST:PORT" in refused(lambda: etcd.EtcdMembers("etcd://:::", Security()))
    assert "needs certificates" in refused(lambda: etcd.EtcdMembers("etcds://127.0.0.1:1", Security()))
    (port,) = free_ports(1)
    dead = f"etcd://127.0.0.1:{port}"
    why = refused(lambda: EtcdStore(dead, "job", Security(), lambda why: None, stood_by=False))
    assert "no member of etcd answers as it should" in why


def test_who_stood_by_is_not_elected_for_a_job_that_ends_just_then(cluster: str) -> None:
    """It has seen that the job is not over; then the job ends, and no coordinator leads any more."""
    leader = EtcdStore(cluster, "ends", Security(), lambda why: None, stood_by=False)

    class Late(EtcdStore):
        def _get(self, name: str) -> bytes:
            found = super()._get(name)
            if name == "over" and not found:
                leader.close(forget=True)
            return found

    with pytest.raises(JobOver):
        Late(cluster, "ends", Security(), lambda why: None, stood_by=True)
    new = EtcdStore(cluster, "ends", Security(), lambda why: None, stood_by=False)
    assert new.load() == {}, "whoever is started anew begins anew"
    new.close(forget=True)
