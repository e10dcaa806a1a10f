"""The universal checkpoint: Everstep and zarr-python read what was written, from every kind of store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from everstep.checkpointing.universal.dtypes import NAMES, dtype_name, numpy_dtype
from everstep.checkpointing.universal.manifest import (
    NAME,
    Array,
    CheckpointError,
    Manifest,
    chunk_shape,
    path_of,
    room_and_name,
)
from everstep.checkpointing.universal.reader import committed, load, open_checkpoint
from everstep.checkpointing.universal.store import StoreError, open_store
from everstep.checkpointing.universal.writer import (
    ChunkWriter,
    commit,
    folder_name,
    read_parts,
    retain,
    try_commit,
)


def noise(shape, dtype, seed=0):
    size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, dtype=np.uint8)
    return raw.view(numpy_dtype(dtype)).reshape(shape)


def save(store, arrays, *, step=3, limit=256, **fields):
    """Write a checkpoint of `arrays` (path -> numpy array)."""
    writer = ChunkWriter(store)
    for path, values in arrays.items():
        dtype = dtype_name(values.dtype)
        array = Array(values.shape, dtype, chunk_shape(values.shape, dtype, limit))
        writer.declare(path, array)
        for number in range(array.chunks):
            rows = values[number * array.chunk_rows : (number + 1) * array.chunk_rows] if values.shape else values
            writer.put(path, number, rows.tobytes())
    writer.finish("all")
    assert try_commit(store, Manifest(step, **fields), arrays)


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "there") if request.param == "local" else f"memory://{tmp_path.parent.name}-{tmp_path.name}"


SHAPES = [(), (1,), (7,), (67, 3), (5, 2, 3), (0,), (3, 0), (1, 400)]


@pytest.mark.parametrize("dtype", NAMES)
def test_what_is_written_is_read_by_us_and_by_zarr(tmp_path, dtype):
    arrays = {path_of("params", f"layer.{i}"): noise(shape, dtype, i) for i, shape in enumerate(SHAPES)}
    save(open_store(str(tmp_path)), arrays)
    checkpoint = open_checkpoint(str(tmp_path))
    group = zarr.open_group(tmp_path, mode="r")
    for path, values in arrays.items():
        assert checkpoint.read(path).tobytes() == values.tobytes()
        other = group[path]
        seen = np.asarray(other[...])
        assert seen.shape == values.shape
        assert seen.tobytes() == values.tobytes()
        assert other.attrs.get("dtype", str(other.dtype)) == dtype
    assert not list(checkpoint.verify())


def test_a_part_of_an_array_is_read_from_its_chunks_alone(tmp_path):
    values = noise((67, 3), "float32")
    store = open_store(str(tmp_path))
    save(store, {"params/a": values})
    array = open_checkpoint(str(tmp_path)).array("params/a")
    assert array.chunks > 2
    for number in range(1, array.chunks):
        store.remove(f"params/a/{array.key(number)}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert np.array_equal(checkpoint.read("params/a", 2, 9), values[2:9])
    with pytest.raises(CheckpointError, match=r"params/a/c/1/0 is missing"):
        checkpoint.read("params/a", 2, array.chunk_rows + 1)


def test_every_store_gives_back_what_it_was_given(url):
    store = open_store(url)
    assert store.folders() == []
    assert store.get("a/b") is None
    store.put("a/b", [b"12", bytearray(b"345")])
    store.commit("a/c", b"67")
    store.flush()
    assert store.get("a/b") == b"12345"
    assert store.get("a/b", 1, 3) == b"23"
    assert store.inside("a").get("c") == b"67"
    assert store.sizes() == {"a/b": 5, "a/c": 2}
    assert store.inside("a").sizes() == {"b": 5, "c": 2}
    assert store.folders() == ["a"]
    store.put("a/b", [b"9"])
    assert store.get("a/b") == b"9"
    store.remove("a")
    store.remove("a")
    assert store.sizes() == {}


def test_writers_need_not_know_of_each_other(url):
    store = open_store(url)
    values = noise((10, 4), "float32")
    array = Array((10, 4), "float32", (4, 4))
    for writer, chunks in (("w0", [2, 0]), ("w1", [1])):
        chunk_writer = ChunkWriter(store)
        chunk_writer.declare("params/a", array)
        for number in chunks:
            chunk_writer.put("params/a", number, values[number * 4 : number * 4 + 4])
        assert not read_parts(store).arrays
        chunk_writer.finish(writer)
        if writer == "w0":
            assert not try_commit(store, Manifest(1), ["params/a"])
            with pytest.raises(CheckpointError, match="not an everstep checkpoint"):
                open_checkpoint(url)
    assert try_commit(store, Manifest(1), ["params/a"])
    assert np.array_equal(open_checkpoint(url).read("params/a"), values)


def test_nothing_is_committed_while_a_file_is_missing_or_short(tmp_path):
    store = open_store(str(tmp_path))
    writer = ChunkWriter(store)
    writer.declare("params/a", Array((4,), "int64", (2,)))
    writer.put("params/a", 0, bytes(16))
    writer.put("params/a", 1, bytes(16))
    writer.finish("w")
    (tmp_path / "params/a/c/1").write_bytes(bytes(7))
    with pytest.raises(CheckpointError, match="params/a/c/1: expected 16 bytes, found 7"):
        commit(store, Manifest(1, read_parts(store).arrays))
    assert load(store) is None


def test_a_manifest_survives_the_trip_and_an_edited_one_does_not(tmp_path):
    store = open_store(str(tmp_path))
    scalars = {"step": {"a": {"dtype": "float32", "value": 3.0}}}
    save(store, {"params/a": noise((3,), "float32")}, scalars=scalars, tied={"b": "a"}, extra={"x": [1, None]})
    manifest = open_checkpoint(str(tmp_path)).manifest
    assert (manifest.scalars, manifest.tied, manifest.extra) == (scalars, {"b": "a"}, {"x": [1, None]})
    file = tmp_path / NAME
    file.write_text(file.read_text().replace('"step":3', '"step":4'))
    with pytest.raises(CheckpointError, match="was changed"):
        open_checkpoint(str(tmp_path))


def test_a_future_version_is_refused_by_its_number(tmp_path):
    (tmp_path / NAME).write_text(json.dumps({"format": "everstep-checkpoint", "version": 2}))
    with pytest.raises(CheckpointError, match="version 2 of the format; this everstep reads version 1"):
        open_checkpoint(str(tmp_path))


def test_names_of_any_kind_have_a_path_and_come_back():
    for name in ("a.b", "a/b", "__private", "ü%2F", "with space", "_x"):
        assert room_and_name(path_of("optimizer/exp_avg", name)) == ("optimizer/exp_avg", name)
        assert path_of("params", name).count("/") == 1
        assert not path_of("params", name).partition("/")[2].startswith("__")


def test_retention_keeps_the_newest_and_the_young_and_clears_what_was_never_finished(url):
    store = open_store(url)
    names = [folder_name(step, 1000.0 + step, "abcd") for step in range(6)]
    for step, name in enumerate(names):
        if step in (2, 5):
            store.inside(name).put("params/half", [b"1"])  # 2 was abandoned, 5 is being written
        else:
            save(store.inside(name), {"params/a": noise((3,), "float32")}, step=step)
    assert committed(store) == [names[4], names[3], names[1], names[0]]
    assert retain(store, count=1, age_s=4.5, now_s=1006.0).removed == [names[0], names[1], names[2]]
    assert committed(store) == [names[4], names[3]]
    assert store.folders() == [names[3], names[4], names[5]]
    assert open_checkpoint(url).manifest.step == 4


def test_mistakes_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*File exists"):
        open_store(str(tmp_path / "file")).put("a", [b""])
    with pytest.raises(StoreError, match="nosuch"):
        open_store("nosuch://somewhere")
    with pytest.raises(CheckpointError, match=r"there is no manifest\.json"):
        open_checkpoint(str(Path(tmp_path) / "empty"))


LONG = ["layer." * 60 + "weight", "layer." * 60 + "bias", "ä" * 150, "/" * 90, "x" * 200, "x" * 201]


@pytest.mark.parametrize("name", LONG)
def test_names_that_no_file_system_takes_are_cut_and_known(tmp_path, name):
    values = noise((3, 2), "float32")
    store, path = open_store(str(tmp_path)), path_of("params", name)
    assert all(len(part) <= 200 for part in path.split("/"))
    writer = ChunkWriter(store)
    writer.declare(path, Array((3, 2), "float32", (3, 2)).named(name))
    writer.put(path, 0, values.tobytes())
    writer.finish("all")
    assert try_commit(store, Manifest(1), [path])
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.manifest.names("params")) == [name]
    assert checkpoint.read(path_of("params", name)).tobytes() == values.tobytes()
    assert not list(checkpoint.verify())
    assert np.array_equal(np.asarray(zarr.open_group(tmp_path, mode="r")[path][...]), values)
    assert zarr.open_group(tmp_path, mode="r")[path].attrs.get("name", name) == name


def test_names_that_are_cut_stay_apart():
    names = ["a" * size + end for size in (200, 300) for end in ("b", "c")]
    assert len({path_of("params", name) for name in names}) == len(names)
    assert path_of("params", LONG[0]) != path_of("params", LONG[0][:140])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["r", "a"])
def test_zarr_opens_it_without_a_warning_and_lists_no_folder(tmp_path, mode):
    arrays = {"params/a.weight": noise((3, 3, 2), "bfloat16"), "other/rng": noise((5,), "uint8")}
    save(open_store(str(tmp_path)), arrays)
    before = open_store(str(tmp_path)).sizes()
    group = zarr.open_group(tmp_path, mode=mode)
    assert group.metadata.consolidated_metadata is not None
    assert {name for name, _ in group.members(max_depth=None)} >= {"params", "optimizer", "other", *arrays}
    assert group["params/a.weight"].metadata.dimension_names == ("size_3", "size_3_2", "size_2")
    assert {name for name, _ in group["params"].members()} == {"a.weight"}
    assert open_store(str(tmp_path)).sizes() == before
    assert not list(open_checkpoint(str(tmp_path)).verify())
