"""Checkpoints in an S3 bucket, over real sockets; also while the server is down and returns."""

from __future__ import annotations

import json
import threading

import fsspec
import numpy as np
import pytest
import torch
import zarr

from everstep.checkpointing.universal.manifest import (
    Array,
    CheckpointError,
    Manifest,
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
from tests.jobs import (
    JOBS,
    assert_same_state,
    everstep,
    finish,
    launch,
    read_result,
    run_job,
    wait_until,
)
from tests.jobs.object_store import BUCKET, object_store

URL = f"s3://{BUCKET}/job"
SHAPE = (300, 100)


@pytest.fixture
def line(monkeypatch):
    with object_store(monkeypatch) as found:
        fsspec.filesystem("s3").clear_instance_cache()
        yield found
        fsspec.filesystem("s3").clear_instance_cache()


def save(folder, step):
    writer = ChunkWriter(folder)
    array = Array(SHAPE, "float32", chunk_shape(SHAPE, "float32", 16 << 10))
    writer.declare("params/a", array)
    for number in range(array.chunks):
        rows = min(array.chunk_rows, array.rows - number * array.chunk_rows)
        writer.put("params/a", number, np.full(rows * 100, step, np.float32))
    writer.finish("w")
    assert try_commit(folder, Manifest(step), ["params/a"])


def test_a_bucket_is_a_store_like_any_other(line, tmp_path):
    store = open_store(URL)
    assert store.folders() == []
    for step in (1, 2, 3):
        save(store.inside(folder_name(step, float(step), "ab12")), step)
    store.inside(folder_name(4, 4.0, "ab12")).put("params/a/c/0/0", [b"half"])
    assert [load(store.inside(name)).manifest.step for name in committed(store)] == [3, 2, 1]
    retain(store, count=1, age_s=0, now_s=5.0)
    assert len(store.folders()) == 2, "the newest, and the one that is being written"
    checkpoint = open_checkpoint(URL)
    assert np.all(checkpoint.read("params/a", 7, 11) == 3)
    assert not list(checkpoint.verify())
    assert np.all(np.asarray(zarr.open_group(checkpoint.url, mode="r")["params/a"][...]) == 3)
    assert everstep("verify", URL).status == 0
    assert everstep("convert", URL, str(tmp_path / "here"), "--to", "universal").status == 0
    assert everstep("convert", str(tmp_path / "here"), f"s3://{BUCKET}/there", "--to", "universal").status == 0
    assert everstep("diff", str(tmp_path / "here"), f"s3://{BUCKET}/there").status == 0
    again = everstep("convert", str(tmp_path / "here"), f"s3://{BUCKET}/there", "--to", "universal")
    assert "has a checkpoint already: --force replaces it" in again.error()
    assert "s3://nowhere/x" in everstep("inspect", "s3://nowhere/x").error()


def test_a_save_that_the_server_leaves_in_the_middle_does_not_exist(line):
    store = open_store(URL)
    save(store.inside(folder_name(1, 1.0, "ab12")), 1)
    sent = line.carried
    ended: list[BaseException] = []

    def second():
        try:
            save(store.inside(folder_name(2, 2.0, "ab12")), 2)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    wait_until(lambda: line.carried > sent + (40 << 10), 30, "the save is under way")
    line.cut()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(ended[0], StoreError), ended
    assert URL in str(ended[0])
    with pytest.raises(StoreError):
        open_checkpoint(URL)
    line.restore()
    checkpoint = open_checkpoint(URL)
    assert checkpoint.manifest.step == 1
    assert not list(checkpoint.verify())
    with pytest.raises(CheckpointError, match="not an everstep checkpoint"):
        open_checkpoint(f"{URL}/{folder_name(2, 2.0, 'ab12')}")


@pytest.mark.soak
def test_a_job_saves_into_a_bucket_that_comes_and_goes(line, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "slow").touch()
    flags = ["--nproc-per-node=2", f"--es-events={out}/events.jsonl", f"--es-checkpoint={URL}"]
    flags.append("--es-checkpoint-every=2")
    job = launch(JOBS / "gpt_job.py", [json.dumps({"out": str(out), "steps": 16, "stages": 1})], flags, forked=True)

    def count(event):
        return (out / "events.jsonl").read_text().count(f'"{event}"') if (out / "events.jsonl").exists() else 0

    wait_until(lambda: count("checkpoint_saved"), 60, "a checkpoint is saved")
    sent = line.carried
    wait_until(lambda: line.carried > sent + (20 << 10), 30, "the next is under way")
    line.cut()
    wait_until(lambda: count("checkpoint_failed"), 60, "that it failed is told")
    line.restore()
    (out / "slow").unlink()
    output = finish(job, 90)
    result = read_result(out, job.returncode, output)
    assert result.status == 0, output
    reference = run_job(nproc=2, steps=18, dump=True)
    assert result.losses() == {step: loss for step, loss in reference.losses().items() if step < 16}
    assert_same_state(result.state(), torch.load(reference.out / "at-16.pt", weights_only=True))
    newest = open_checkpoint(URL)
    assert newest.manifest.step == 16
    assert not list(newest.verify())
    resumed = run_job(nproc=3, stages=2, steps=18, flags=[f"--es-checkpoint={URL}"])
    assert resumed.status == 0, resumed.output
    assert min(resumed.losses()) == 16
    assert resumed.losses() == {step: loss for step, loss in reference.losses().items() if step >= 16}
    for path in resumed.out.glob("state-*.pt"):
        assert_same_state(torch.load(path, weights_only=True), reference.state())
