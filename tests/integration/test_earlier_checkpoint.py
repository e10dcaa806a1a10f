"""A job resumes from a checkpoint of an earlier version, with the numbers of that version."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from everstep.checkpointing.universal.manifest import NAME, checksum
from tests.jobs import command, everstep

EARLIER = Path(__file__).parents[1] / "data" / "versions" / "5fd5c74"
STATE = "digest 26bd5f5f12384fa9e8b14675edcda666"  # of what the checkpoint has, read and not trained on
# The losses that a run of that version has from there. Another processor may round them otherwise.
LOSSES = {4: 0.0100435, 5: 0.0468861, 6: 0.1098546, 7: 0.0918915}


def resumed(tmp_path: Path, steps: int = 8) -> str:
    with tarfile.open(EARLIER / "checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return json.dumps({"steps": steps, "checkpoint": str(tmp_path / "checkpoint"), "checkpoint_every": 100})


def losses(text: str) -> dict[int, float]:
    words = [line.split() for line in text.splitlines() if line.startswith("step")]
    return {int(step): float(loss) for _, step, _, loss in words}


def digest(text: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith("digest")]
    return found


def test_its_state_is_read(tmp_path: Path) -> None:
    ended = command([str(EARLIER / "train.py"), resumed(tmp_path, steps=4)])
    assert (ended.status, digest(ended.stdout), losses(ended.stdout)) == (0, STATE, {}), ended.stderr


def test_training_continues(tmp_path: Path) -> None:
    """With the numbers of that version, and the same bytes whether by itself or as a job of two workers."""
    alone = command([str(EARLIER / "train.py"), resumed(tmp_path / "alone")])
    assert alone.status == 0, alone.stderr
    assert losses(alone.stdout) == pytest.approx(LOSSES, rel=1e-5)
    job = everstep("run", "--nproc-per-node=2", str(EARLIER / "train.py"), resumed(tmp_path / "job"))
    assert job.status == 0, job.stderr
    assert losses(job.stdout) == losses(alone.stdout)
    assert digest(job.stdout) == digest(alone.stdout) != STATE


def test_what_another_version_agreed_on_is_refused_by_name(tmp_path: Path) -> None:
    settings = resumed(tmp_path)
    (path,) = tmp_path.glob(f"checkpoint/*/{NAME}")
    raw = json.loads(path.read_text())
    del raw["checksum"]
    raw["agreement"] = json.dumps({**json.loads(raw["agreement"]), "weather": "fine"})
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**raw, "checksum": checksum(canonical)}))
    ended = command([str(EARLIER / "train.py"), settings])
    assert ended.status != 0
    assert (
        "does not continue this job: another version of Everstep wrote what was agreed in its last step" in ended.stderr
    )
    assert "'weather'" in ended.stderr
