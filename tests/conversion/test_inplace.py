"""Checkpoints of other frameworks, read in place as by a job that resumes from one."""

from __future__ import annotations

import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.checkpointing.convert.drive.inplace import HELD, ForeignCheckpoint, open_any
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.reader import open_checkpoint

from .commands import Commands, safetensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # saved by one process
DATA = Path(__file__).parent / "data"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.mark.parametrize("place", ["megatron-decoupled-rates/ckpt", "deepspeed-elastic", "hf-distributed-save"])
def test_what_is_read_is_what_a_conversion_writes(place: str, tmp_path: Path, run: Commands) -> None:
    with tarfile.open(DATA / f"{place.partition('/')[0]}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / place
    run.done("convert", source, tmp_path / "u", "--to", "universal")
    converted, found = open_checkpoint(str(tmp_path / "u")), open_any(str(source))
    assert isinstance(found, ForeignCheckpoint)
    assert found.manifest.arrays.keys() == converted.manifest.arrays.keys()
    for path, array in converted.manifest.arrays.items():
        assert (found.array(path).shape, found.array(path).dtype) == (array.shape, array.dtype)
        assert found.read(path).tobytes() == converted.read(path).tobytes()
        if array.rows > 1:
            assert found.read(path, 1, 2).tobytes() == converted.read(path, 1, 2).tobytes()
    assert len(found.held) <= HELD
    for field in ("step", "scalars", "tied", "dtypes", "scheduler", "agreement"):
        assert getattr(found.manifest, field) == getattr(converted.manifest, field), field


def test_one_of_everstep_is_opened_as_ever(tmp_path: Path, run: Commands) -> None:
    safetensors(tmp_path / "model" / "model.safetensors", {"weight": (4, 3)})
    run.done("convert", tmp_path / "model", tmp_path / "u", "--to", "universal")
    assert type(open_any(str(tmp_path / "u"))) is type(open_checkpoint(str(tmp_path / "u")))


def test_what_is_no_checkpoint_is_refused_in_one_way(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not an everstep checkpoint: there is no manifest\.json"):
        open_any(str(tmp_path))


def test_what_needs_options_names_the_command(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(3)}, "thing": Fraction(1, 2)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match=r"thing.*\(everstep convert has options for that"):
        open_any(str(tmp_path / "dcp"))


def test_a_file_that_is_lost_meanwhile_is_named(tmp_path: Path) -> None:
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = open_any(str(tmp_path / "dcp"))
    assert np.array_equal(found.read("params/weight", 1, 3), [1, 1])
    found.held.clear()
    for path in (tmp_path / "dcp").glob("*.distcp"):
        path.unlink()
    with pytest.raises(CheckpointError, match="distcp"):
        found.read("params/weight")
