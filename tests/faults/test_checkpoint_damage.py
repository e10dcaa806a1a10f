"""The universal checkpoint under faults of storage: writers killed at any byte, and every kind of damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpointing.universal.manifest import (
    NAME,
    Array,
    CheckpointError,
    Manifest,
    checksum,
    chunk_shape,
)
from everstep.checkpointing.universal.reader import committed, load, open_checkpoint
from everstep.checkpointing.universal.store import StoreError, open_store
from everstep.checkpointing.universal.writer import (
    ChunkWriter,
    folder_name,
    retain,
    try_commit,
)

KILLS, DAMAGES, SEED = 100, 1000, 7
SHAPES = {"params/a": (40, 50), "params/b": (17,), "optimizer/exp_avg/a": (40, 50), "buffers/c": (), "frozen/d": (9, 3)}


def save(url: Path, step: int, now_s: float) -> None:
    """A checkpoint in which everything has the value `step`."""
    store = open_store(str(url))
    folder = store.inside(folder_name(step, now_s, f"{step:06x}"))
    writer = ChunkWriter(folder)
    for path, shape in SHAPES.items():
        array = Array(shape, "float32", chunk_shape(shape, "float32", 1024))
        writer.declare(path, array)
        for number in range(array.chunks):
            rows = min(array.chunk_rows, array.rows - number * array.chunk_rows)
            writer.put(path, number, np.full(rows * array.row_bytes // 4, step, np.float32))
    writer.finish("w")
    assert try_commit(folder, Manifest(step, extra={"step": step}), SHAPES)
    retain(store, count=1, age_s=0, now_s=now_s)


def killed_while_saving(url: Path, step: int, delay_s: float) -> bool:
    """Whether a writer was killed before it had ended."""
    pid = os.fork()
    if pid == 0:
        try:
            save(url, step, float(step))
        finally:
            os._exit(0)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.fixture
def memory_folder():
    """A folder whose disk is never busy: killing takes a hundred saves."""
    with tempfile.TemporaryDirectory(prefix="everstep-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.soak
def test_whenever_the_writer_is_killed_the_old_or_the_new_one_is_read(memory_folder):
    tmp_path, rng = memory_folder, random.Random(SEED)
    save(tmp_path, 1, 1.0)
    started = time.monotonic()
    save(tmp_path, 2, 2.0)
    took_s = time.monotonic() - started
    step, kills, news = 2, 0, 0
    before = 2
    while kills < KILLS:
        step += 1
        killed = killed_while_saving(tmp_path, step, rng.uniform(0, 1.5 * took_s))
        checkpoint = open_checkpoint(str(tmp_path))
        found = checkpoint.manifest.step
        assert found in (before, step)
        assert killed or found == step
        assert checkpoint.manifest.extra == {"step": found}
        for path in SHAPES:
            assert np.all(checkpoint.read(path) == found)
        assert not list(checkpoint.verify())
        kills += killed
        news += killed and found == step
        before = found
    print(f"{kills} writers killed, {news} of them after they had committed; {step - 2 - kills} ended before")
    save(tmp_path, step + 1, step + 1.0)
    assert len(open_store(str(tmp_path)).folders()) == 1, "what was never finished is cleared away"


def _flip(file: Path, rng: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _truncate(file: Path, rng: random.Random, others: list[Path]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def _lengthen(file: Path, rng: random.Random, others: list[Path]) -> None:
    file.write_bytes(file.read_bytes() + bytes(rng.randrange(1, 100)))


def _remove(file: Path, rng: random.Random, others: list[Path]) -> None:
    file.unlink()


def _swap(file: Path, rng: random.Random, others: list[Path]) -> None:
    different = [other for other in others if other.read_bytes() != file.read_bytes()]
    other = rng.choice(different)
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def _foreign(file: Path, rng: random.Random, others: list[Path]) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def _zeros(file: Path, rng: random.Random, others: list[Path]) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {f.__name__: f for f in (_flip, _truncate, _lengthen, _remove, _swap, _foreign, _zeros)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of random numbers, whose chunks all differ."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    store = open_store(str(folder))
    writer, rng = ChunkWriter(store), np.random.default_rng(SEED)
    for path, shape in SHAPES.items():
        array = Array(shape, "float32", chunk_shape(shape, "float32", 1024))
        writer.declare(path, array)
        values = rng.random(shape, np.float32).reshape(-1)
        step = array.chunk_bytes // 4
        for number in range(array.chunks):
            writer.put(path, number, values[number * step : (number + 1) * step])
    writer.finish("w")
    assert try_commit(store, Manifest(5, scalars={"step": {"a": {"dtype": "float32", "value": 5.0}}}), SHAPES)
    return folder


@pytest.mark.soak
def test_every_damaged_file_is_found_and_named(whole, tmp_path):
    """1,000 random damages of random files: none is read without an error."""
    rng = random.Random(SEED)
    copy = tmp_path / "copy"
    counts = dict.fromkeys(DAMAGE, 0)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    chunks = [name for name in names if name.name not in (NAME, "zarr.json")]
    for _ in range(DAMAGES):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        kind = rng.choice(sorted(DAMAGE))
        name = rng.choice(chunks if kind == "_swap" else names)
        DAMAGE[kind](copy / name, rng, [copy / other for other in chunks if other != name])
        counts[kind] += 1
        assert _noticed(copy, name, kind), (kind, name)
    print(f"{DAMAGES} damages, all found and named: {counts}")


def _noticed(copy: Path, name: Path, kind: str) -> bool:
    """Whether the damage is found: on reading, if it concerns what is read, and by `verify` in any case, by name."""
    try:
        checkpoint = open_checkpoint(str(copy))
    except CheckpointError as error:
        return name.name == NAME and NAME in str(error)
    problems = list(checkpoint.verify())
    if not any(f"{copy}/{name.as_posix()}" in problem for problem in problems):
        return False
    if name.name == "zarr.json":
        return True  # not needed for reading
    path = "/".join(name.parts[: 3 if name.parts[0] == "optimizer" else 2])
    named = path if kind == "_swap" else name.as_posix()  # of two that were swapped, the reader may meet either first
    with pytest.raises(CheckpointError, match=named):
        checkpoint.read(path)
    return True


def test_a_manifest_that_was_edited_with_care_names_what_it_no_longer_fits(whole, tmp_path):
    """Even with a matching checksum of its own: a changed shape, type or checksum does not fit the files."""
    rng = random.Random(SEED)
    for _ in range(50):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        raw = json.loads((copy / NAME).read_bytes())
        path = rng.choice([path for path in sorted(raw["arrays"]) if raw["arrays"][path]["shape"]])
        array = raw["arrays"][path]
        change = rng.choice(["shape", "dtype", "checksum"])
        if change == "shape":
            array["shape"][0] += array["chunk"][0] + 1
        elif change == "dtype":
            array["dtype"] = "float64"
        else:
            array["checksums"][0] = f"{rng.getrandbits(64):016x}"
        del raw["checksum"]
        canonical = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
        (copy / NAME).write_text(json.dumps({**raw, "checksum": checksum(canonical)}))
        try:
            problems = list(open_checkpoint(str(copy)).verify())
        except CheckpointError as error:
            problems = [str(error)]
        assert any(path in problem for problem in problems), (change, path)


def test_parts_of_two_attempts_are_never_mixed(tmp_path):
    """The files of an interrupted save stay in its own folder, which no reader opens."""
    store = open_store(str(tmp_path))
    save(tmp_path, 3, 3.0)
    half = store.inside(folder_name(4, 4.0, "dead"))
    half.put("params/a/c/0/0", [b"half"])
    assert [load(store.inside(name)).manifest.step for name in committed(store)] == [3]
    with pytest.raises((CheckpointError, StoreError), match="not an everstep checkpoint: there is no"):
        open_checkpoint(half.url)
