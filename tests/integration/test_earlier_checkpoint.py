"""A job resumes from a checkpoint of an earlier version, with the numbers of that version."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from everstep.checkpointing.universal.manifest import NAME, checksum
from tests.jobs import command, everstep

EARLIER = Path(__file__).parents[1] / "data" / "versions" / "5fd5c74"
DIGEST = "digest 5ea207164a93313e4b6511e5a0eb92e2"  # which that version printed, with and without a stop between


def resumed(tmp_path: Path) -> str:
    with tarfile.open(EARLIER / "checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return json.dumps({"steps": 8, "checkpoint": str(tmp_path / "checkpoint"), "checkpoint_every": 100})


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("step", "digest"))]


def test_a_script_by_itself_goes_on(tmp_path) -> None:
    ended = command([str(EARLIER / "train.py"), resumed(tmp_path)])
    assert ended.status == 0, ended.stderr
    assert [line.split()[1] for line in lines(ended.stdout)[:-1]] == ["4", "5", "6", "7"]
    assert lines(ended.stdout)[-1] == DIGEST


def test_a_job_of_two_workers_goes_on(tmp_path) -> None:
    ended = everstep("run", "--nproc-per-node=2", str(EARLIER / "train.py"), resumed(tmp_path))
    assert ended.status == 0, ended.stderr
    assert DIGEST in lines(ended.stdout)
    assert not any(line.startswith("step 3 ") for line in lines(ended.stdout))


def test_what_another_version_agreed_on_is_refused_by_name(tmp_path) -> None:
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
