"""Training on a device whose memory must not be touched but by copies: the bytes are the CPU's, through kills too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accelerator import COUNT, library
from tests.gpu import training
from tests.jobs import Result, assert_same_state, command, finish, launch, read_result

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STEPS = 9
KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 0, "phase": "reduce", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    library()  # here, where no clock runs


def environment(devices: int = 1) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), COUNT: str(devices)}


def alone(out: Path, device: str, script: str = "tower_job.py", **config: Any) -> dict[str, Any]:
    """The final state of a run without the launcher."""
    out.mkdir()
    arguments = json.dumps({"out": str(out), "steps": STEPS, "device": device, **config})
    ended = command([str(HERE / script), arguments], environment())
    assert ended.status == 0, ended.stderr
    return torch.load(out / "state-0.pt", weights_only=True)


def together(out: Path, flags: list[str], devices: int = 2, **config: Any) -> Result:
    """Three workers, each of which is killed once."""
    out.mkdir()
    arguments = json.dumps({"out": str(out), "steps": STEPS, "device": "standin", **config})
    own = ["--nproc-per-node=3", f"--es-events={out}/events.jsonl", *flags]
    faults = {"EVERSTEP_FAULTS": json.dumps(KILLS)}
    process = launch(HERE / "tower_job.py", [arguments], own, {**environment(devices), **faults}, forked=True)
    output = finish(process)
    return read_result(out, process.returncode, output)


def test_the_stand_in_is_one() -> None:
    """What takes a device tensor for host memory dies; a copy does not."""
    touch = (
        "from tests import accelerator\naccelerator.use()\nimport ctypes, torch\n"
        "tensor = torch.arange(4.0).to('standin')\nassert tensor.cpu().tolist() == [0, 1, 2, 3]\n"
        "print('copied', flush=True)\nctypes.string_at(tensor.data_ptr(), 4)"
    )
    done = subprocess.run(
        [sys.executable, "-c", touch], capture_output=True, text=True, env={**os.environ, **environment()}
    )
    assert done.stdout == "copied\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.soak
def test_alone_with_checkpoints(tmp_path: Path) -> None:
    """Saved, and gone on from, where the state is on a device."""
    saved = str(tmp_path / "saved")
    expected = alone(tmp_path / "cpu", "cpu")
    assert_same_state(alone(tmp_path / "first", "standin", checkpoint=saved), expected)
    longer = alone(tmp_path / "longer", "cpu", steps=STEPS + 3)
    assert_same_state(alone(tmp_path / "second", "standin", checkpoint=saved, steps=STEPS + 3), longer)


@pytest.mark.parametrize(
    "config",
    [{}, {"protection": "replay", "optimizer": {"fused": True}}],
    ids=["parity", "replay, fused"],
)
def test_workers_that_are_killed(config: dict[str, Any], tmp_path: Path) -> None:
    """On two devices that three workers share; replicas are compared every other step."""
    expected = alone(tmp_path / "cpu", "cpu", optimizer=config.get("optimizer", {}))
    result = together(tmp_path / "run", ["--es-share-gpu"], checkpoint=str(tmp_path / "saved"), **config)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    assert not result.named("corruption")
    states = sorted(result.out.glob("state-*.pt"))
    assert states
    for path in states:
        assert_same_state(torch.load(path, weights_only=True), expected)
    used = {tuple(json.loads(path.read_text())) for path in result.out.glob("devices-*.json")}
    assert used - {()} <= {("standin:0",), ("standin:1",)}  # who came back after the last step had no batch
    assert used - {()}


def test_more_workers_than_devices(tmp_path: Path) -> None:
    result = together(tmp_path / "run", [], devices=2)
    assert result.status == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("everstep: error: ")]
    assert "this node has 3 workers and 2 standin devices: start at most 2 (--nproc-per-node=2)" in line
    assert "--es-share-gpu" in line
    assert "Traceback" not in result.output


@pytest.mark.soak
def test_a_pipeline_with_kills_against_one_without() -> None:
    """The harness of `make gpu`: two stages of two ranks, with dropout, on one device."""
    killed = training.train("standin", stages=2, steps=8, small=True, faults=training.kills(8), timeout_s=110)
    quiet = training.train("standin", stages=2, steps=8, small=True, timeout_s=110)
    assert training.differences(killed, quiet) == []
    assert len(killed.named("worker_died")) == 3


@pytest.mark.soak
def test_only_workers_ask_for_devices(tmp_path: Path) -> None:
    """Not the launcher, the preloaded process, the keeper, the coordinator or the saver."""
    out, recorded = tmp_path / "run", tmp_path / "recorded"
    out.mkdir()
    arguments = json.dumps({"out": str(out), "steps": 6, "device": "cpu", "checkpoint": str(tmp_path / "saved")})
    flags = ["--nproc-per-node=2", f"--es-events={out}/events.jsonl", "--max-restarts=1"]
    paths = {"PYTHONPATH": f"{HERE / 'recorder'}{os.pathsep}{ROOT}", "RECORDED": str(recorded)}
    process = launch(HERE / "tower_job.py", [arguments], flags, paths)
    output = finish(process)
    assert process.returncode == 0, output
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    commands = {" ".join(line["command"]) for line in lines if "loaded" in line}
    for part in ("everstep run", "everstep.checkpointing.keeper.service", "everstep.checkpointing.saving.saver"):
        assert any(part in text for text in commands), (part, commands)
    asked = [line for line in lines if "asked" in line and not line["unseen"]]
    assert any(line["worker"] for line in asked), "nobody records"
    assert [line for line in asked if not line["worker"]] == []
