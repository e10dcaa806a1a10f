"""The contract of every store of checkpoints, whatever is under it: a local folder, an S3 bucket, memory."""

from __future__ import annotations

import contextlib
import resource
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import fsspec
import numpy as np
import pytest

from everstep.checkpointing.universal.store import Buffer, Store, StoreError, open_store
from tests.jobs.object_store import BUCKET, Line, object_store

ODD = (
    "a name with spaces",
    "per%20cent",
    "hash#question?and&plus+",
    "brackets[0]",
    "star*",
    "Schlüssel-名前-🔑",
    ".dotted",
    "quote'and\"double",
    "semi;colon,comma",
    "tilde~$dollar",
    "x" * 200,
)
LARGE = 104 << 20  # an object store may write it in parts


@dataclass
class Backend:
    """A kind of store, and what its suite needs beside it."""

    url: Callable[[], str]  # of a folder that does not exist yet
    failing: Callable[[], contextlib.AbstractContextManager[None]] | None  # while writes fail
    opened: list[Store] = field(default_factory=list)

    def open(self, url: str = "") -> Store:
        store = open_store(url or self.url())
        self.opened.append(store)
        return store


@contextlib.contextmanager
def _small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _away(line: Line) -> Iterator[None]:
    line.cut()
    try:
        yield
    finally:
        line.restore()
        fsspec.filesystem("s3").clear_instance_cache()  # its other connections are broken


@pytest.fixture(scope="module")
def bucket() -> Iterator[Line]:
    with pytest.MonkeyPatch.context() as patch, object_store(patch) as line:
        fsspec.filesystem("s3").clear_instance_cache()
        yield line
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(params=["local", "s3", "memory"])
def backend(request, tmp_path) -> Iterator[Backend]:
    name = uuid.uuid4().hex
    if request.param == "local":
        found = Backend(lambda: str(tmp_path / uuid.uuid4().hex), _small_disk)
    elif request.param == "s3":
        line: Line = request.getfixturevalue("bucket")
        found = Backend(lambda: f"s3://{BUCKET}/{uuid.uuid4().hex}", lambda: _away(line))
    else:
        found = Backend(lambda: f"memory://{name}/{uuid.uuid4().hex}", None)
    yield found
    for store in found.opened:
        store.remove("")


@pytest.fixture
def store(backend) -> Store:
    return backend.open()


# ---------------------------------------------------------------- whole files


def test_what_is_put_is_got(store) -> None:
    store.put("a/b", [b"one ", bytearray(b"two "), memoryview(b"three")])
    store.flush()
    assert store.get("a/b") == b"one two three"
    store.commit("a/c", memoryview(b"four"))
    assert store.get("a/c") == b"four"


def test_pieces_of_any_shape_and_none(store) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    store.put("values", [memoryview(values), b"", memoryview(values[1])])
    assert store.get("values") == values.tobytes() + values[1].tobytes()
    store.put("empty", [])
    store.commit("empty too", b"")
    assert (store.get("empty"), store.get("empty too")) == (b"", b"")
    assert store.sizes() == {"values": 64, "empty": 0, "empty too": 0}


@pytest.mark.parametrize("write", ["put", "commit"])
def test_a_file_is_replaced_as_a_whole(store, write: str) -> None:
    """A shorter one leaves nothing of the longer one behind."""
    for data in (b"x" * 10_000, b"short", b"", b"y" * 100):
        if write == "put":
            store.put("file", [data])
            store.flush()
        else:
            store.commit("file", data)
        assert store.get("file") == data
        assert store.sizes() == {"file": len(data)}


def test_parts_of_a_file(store) -> None:
    data = bytes(range(256)) * 40
    store.put("file", [data])
    for start, stop in ((0, 10), (0, None), (1, 2), (5000, 5256), (10_239, 10_240), (10_000, None), (0, 10_240)):
        assert store.get("file", start, stop) == data[start:stop], (start, stop)
    assert store.get("file", 10_000, 99_999) == data[10_000:], "no further than it is long"
    for start, stop in ((10_240, None), (99_999, None), (99_999, 100_000)):
        assert store.get("file", start, stop) == b"", "it may be cut short: that is found by what reads it"
    assert store.get("file", 7, 7) == b""
    assert store.get("none", 7, 7) is None
    assert store.get("file", 0, 0) == b""


def test_a_file_into_memory(store) -> None:
    """The store returns its size, also if that differs from the given memory's, which must not be used then."""
    store.put("file", [b"0123456789"])
    room = bytearray(10)
    assert store.get_into("file", memoryview(room)) == 10
    assert room == b"0123456789"
    for size in (0, 4, 11):
        assert store.get_into("file", memoryview(bytearray(size))) == 10
    assert store.get_into("none", memoryview(room)) is None


def test_large_values(store) -> None:
    data = np.random.default_rng(0).integers(0, 256, LARGE, dtype=np.uint8)
    view = memoryview(data)
    store.put("large", (view[start : start + (9 << 20)] for start in range(0, LARGE, 9 << 20)))
    store.flush()
    assert store.sizes() == {"large": LARGE}
    assert store.get("large", LARGE - 1000) == data[-1000:].tobytes()
    assert store.get("large", 50 << 20, (50 << 20) + 777) == data[50 << 20 : (50 << 20) + 777].tobytes()
    room = np.zeros(LARGE, np.uint8)
    assert store.get_into("large", memoryview(room)) == LARGE
    assert np.array_equal(room, data)


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_names_with_odd_characters(store, name: str) -> None:
    """Each is literal: no pattern, no query, no escape. Deleting it leaves its neighbours alone."""
    store.commit("star-and-more", b"kept")
    store.commit("brackets0", b"kept")
    store.put(f"{name}/{name}", [b"inner"])
    store.commit(f"beside/{name}", b"beside")
    assert store.get(f"{name}/{name}") == b"inner"
    assert store.get(f"beside/{name}") == b"beside"
    kept = {"star-and-more": 4, "brackets0": 4}
    assert store.sizes() == {f"{name}/{name}": 5, f"beside/{name}": 6, **kept}
    assert store.sizes(name) == {f"{name}/{name}": 5}
    assert store.folders() == sorted([name, "beside"])
    assert store.inside(name).get(name) == b"inner"
    store.remove(f"beside/{name}")
    assert store.get(f"beside/{name}") is None
    store.remove(name)
    assert store.sizes() == kept


# ---------------------------------------------------------------- what is not there, and listing


def test_what_is_not_there(store) -> None:
    assert store.get("none") is None
    assert store.get("none/at/all", 3, 5) is None
    assert store.sizes() == {}
    assert store.sizes("none") == {}
    assert store.folders() == []
    store.remove("none")
    store.remove("none/at/all")
    store.flush()


def test_a_folder_is_no_file(store) -> None:
    store.commit("folder/file", b"data")
    with contextlib.suppress(StoreError):
        assert store.get("folder") is None
    assert store.get("folder/other") is None
    assert store.get("folde") is None


def test_listing(store) -> None:
    """Names are relative to the store, with `/`; a folder is not every name that begins as it does."""
    files = ["a", "params/w/c/0/0", "params/w/c/1/0", "params/w/zarr.json", "params/w2/zarr.json", "parts/p.json"]
    for number, name in enumerate(files):
        store.put(name, [b"x" * number])
    assert store.sizes() == {name: number for number, name in enumerate(files)}
    assert store.sizes("params/w") == {name: files.index(name) for name in files[1:4]}
    assert store.folders() == ["params", "parts"]
    inner = store.inside("params")
    assert inner.sizes() == {name.removeprefix("params/"): files.index(name) for name in files[1:5]}
    assert inner.sizes("w2") == {"w2/zarr.json": 4}
    assert inner.folders() == ["w", "w2"]
    assert inner.inside("w/c").folders() == ["0", "1"]
    assert inner.url == f"{store.url}/params"


def test_others_see_what_is_written(backend) -> None:
    """Two stores of one folder, each of which has looked before the other wrote."""
    url = backend.url()
    mine, other = backend.open(url), backend.open(url)
    assert (mine.sizes(), other.sizes(), other.folders()) == ({}, {}, [])
    mine.commit("a/b", b"1")
    assert (other.get("a/b"), other.sizes(), other.folders()) == (b"1", {"a/b": 1}, ["a"])
    other.remove("a")
    assert (mine.get("a/b"), mine.sizes(), mine.folders()) == (None, {}, [])
    mine.put("a/b", [b"22"])
    assert other.sizes() == {"a/b": 2}


# ---------------------------------------------------------------- removing


def test_removing(store) -> None:
    for name in ("one", "folder/two", "folder/deep/three", "folder2/four"):
        store.commit(name, b"x")
    store.remove("one")
    assert sorted(store.sizes()) == ["folder/deep/three", "folder/two", "folder2/four"]
    store.remove("folder")
    assert list(store.sizes()) == ["folder2/four"]
    store.remove("")
    assert store.sizes() == {}
    store.commit("folder/two", b"again")
    assert store.get("folder/two") == b"again"


def test_a_folder_that_somebody_removed_is_made_again(store) -> None:
    """Also by the store that created it before, which cannot know."""
    inner = store.inside("folder")
    inner.put("deep/a", [b"1"])
    inner.commit("b", b"2")
    store.remove("folder")
    inner.put("deep/a", [b"3"])
    inner.commit("b", b"4")
    assert store.sizes() == {"folder/deep/a": 1, "folder/b": 1}
    assert (store.get("folder/deep/a"), store.get("folder/b")) == (b"3", b"4")


def test_to_flush_what_was_removed_is_nothing(store) -> None:
    store.put("a/b", [b"1"])
    store.remove("a")
    store.flush()


# ---------------------------------------------------------------- failures


def test_a_put_that_ends_in_the_middle(store) -> None:
    """Whatever the pieces raise becomes a StoreError that names the place; the file exists in part, or not at all."""

    def pieces() -> Iterator[Buffer]:
        yield b"begun"
        raise RuntimeError("no more")

    with pytest.raises(StoreError, match=r"cannot write .*/a/b: no more"):
        store.put("a/b", pieces())
    store.flush()
    assert store.get("a/b") in (None, b"begun")
    store.put("a/b", [b"whole"])
    store.flush()
    assert store.get("a/b") == b"whole"


@pytest.mark.parametrize("backend", ["local", "s3"], indirect=True)  # memory does not fail
def test_a_commit_that_fails_changes_nothing(backend) -> None:
    """A full disk, an unreachable server: earlier files are intact, no other exists, and the error names the place."""
    store = backend.open()
    store.commit("a/manifest", b"before")
    with backend.failing(), pytest.raises(StoreError, match=r"cannot write .*/a/manifest: \S"):
        store.commit("a/manifest", b"after" * 4096)
    assert store.get("a/manifest") == b"before"
    assert store.sizes() == {"a/manifest": 6}
    store.commit("a/manifest", b"after")
    assert store.get("a/manifest") == b"after"


def test_urls_that_are_none() -> None:
    for url in ("", "no-such-scheme://x/y"):
        with pytest.raises(StoreError, match="empty" if not url else "no-such-scheme"):
            open_store(url)


# ---------------------------------------------------------------- several at once


def test_a_reader_sees_one_commit_or_another(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a part, a mixture or nothing; and what is listed meanwhile is whole, too."""
    # moto answers 500 to some requests for an object that is replaced at that moment, which clients of S3 repeat.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    url = backend.url()
    store = backend.open(url)
    values = [bytes([65 + number]) * (20_000 + number) for number in range(4)]
    store.commit("value", values[0])
    done = threading.Event()
    torn: list[object] = []

    def read() -> None:
        mine = open_store(url)
        while not done.is_set():
            data = mine.get("value")
            listed = mine.sizes()
            if data not in values:
                torn.append(data and (len(data), set(data)))
            if listed.keys() != {"value"} or listed["value"] not in map(len, values):
                torn.append(listed)

    def write(number: int) -> None:
        mine = open_store(url)
        for _ in range(12):
            mine.commit("value", values[number])

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write, number) for number in range(4)]
        wait(writers)
        done.set()
        for writer in writers:
            writer.result()
        for reader in readers:
            reader.result()
    assert not torn
    assert store.get("value") in values


def test_threads_write_files_of_one_store(store) -> None:
    """As the ranks of a node do with a checkpoint's chunks; one of them flushes for all."""

    def write(number: int) -> None:
        for index in range(6):
            store.put(f"shared/{number}/{index}", [bytes([number]) * (index + 1)])
        store.commit(f"parts/{number}", b"done")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, number) for number in range(8)]:
            done.result()
    store.flush()
    expected = {f"shared/{number}/{index}": index + 1 for number in range(8) for index in range(6)}
    assert store.sizes("shared") == expected
    assert store.sizes("parts") == {f"parts/{number}": 4 for number in range(8)}
    assert all(store.get(f"shared/{number}/5") == bytes([number]) * 6 for number in range(8))
