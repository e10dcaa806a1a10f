"""Checkpoints of earlier versions remain readable: `tests/data/universal-v1` was written when version 1 was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from everstep.checkpointing.universal.manifest import NAME, CheckpointError, checksum
from everstep.checkpointing.universal.reader import open_checkpoint

V1 = Path(__file__).parents[1] / "data" / "universal-v1"
WEIGHT = np.arange(15, dtype=np.float32).reshape(5, 3) / 7
HALF = np.arange(6).astype(ml_dtypes.bfloat16) / 3
DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


def test_version_1_is_read():
    checkpoint = open_checkpoint(str(V1))
    manifest = checkpoint.manifest
    assert manifest.step == 3
    assert np.array_equal(checkpoint.read("params/layer.weight"), WEIGHT)
    assert np.array_equal(checkpoint.read("params/layer.weight", 1, 4), WEIGHT[1:4])
    assert checkpoint.read("params/layer.bias").dtype == ml_dtypes.bfloat16
    assert checkpoint.read("params/layer.bias").tobytes() == HALF.tobytes()
    assert np.array_equal(checkpoint.read("optimizer/exp_avg/layer.weight"), -WEIGHT)
    assert checkpoint.read("buffers/count") == 12
    assert checkpoint.read("frozen/empty").shape == (0, 2)
    assert manifest.states == ("exp_avg",)
    assert manifest.scalars == {"step": {"layer.weight": {"dtype": "float32", "value": 3.0}}}
    assert manifest.tied == {"head.weight": "layer.weight"}
    assert manifest.data["position"] == 48
    assert not list(checkpoint.verify())


def test_version_1_is_read_by_zarr():
    group = zarr.open_group(V1, mode="r")
    assert np.array_equal(np.asarray(group["params/layer.weight"][...]), WEIGHT)
    assert group["params/layer.bias"].attrs["dtype"] == "bfloat16"
    assert np.asarray(group["params/layer.bias"][...]).view(ml_dtypes.bfloat16).tobytes() == HALF.tobytes()


def _with(tmp_path, **changes):
    copy = tmp_path / "copy"
    shutil.copytree(V1, copy)
    raw = json.loads((copy / NAME).read_bytes())
    raw |= changes
    del raw["checksum"]
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    (copy / NAME).write_text(json.dumps({**raw, "checksum": checksum(canonical)}))
    return str(copy)


def test_members_that_a_later_everstep_adds_are_passed_over(tmp_path):
    assert open_checkpoint(_with(tmp_path, colour="blue")).manifest.step == 3


def test_a_later_version_is_refused_by_its_number(tmp_path):
    with pytest.raises(CheckpointError, match="written in version 2 of the format; this everstep reads version 1"):
        open_checkpoint(_with(tmp_path, version=2))


def test_the_document_has_every_member_of_the_manifest():
    raw = json.loads((V1 / NAME).read_bytes())
    text = DOCUMENT.read_text()
    assert not [member for member in raw if f"`{member}`" not in text]
