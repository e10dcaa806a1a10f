"""bfloat16 models with float32 masters: parameters, masters and optimizer state are those of the undisturbed run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.checkpointing.universal.reader import Checkpoint, open_checkpoint
from tests.conversion.comparing import read
from tests.jobs import Result, assert_same_run, assert_same_state, everstep, reference, run_job
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts

STEPS = 8
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}
LAYOUTS = {"1x2": (1, 2), "2x2": (2, 4)}


def states_of(result: Result) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted(result.out.glob("state-*.pt"))]


def assert_has_masters(state: dict[str, Any]) -> None:
    """float32 masters and moments; the bfloat16 model is the rounded masters, which contain more than it does."""
    assert state["masters"].keys() == state["model"].keys() == state["optimizer"].keys()
    for name, live in state["model"].items():
        master = state["masters"][name]
        assert (live.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(live, master.bfloat16())
        assert state["optimizer"][name]["exp_avg"].dtype == torch.float32
    assert any(not torch.equal(state["masters"][name], live.float()) for name, live in state["model"].items())


@pytest.mark.parametrize("layout", [pytest.param("1x2", marks=pytest.mark.soak), "2x2"])
def test_killed_workers_in_every_phase(layout: str) -> None:
    """Each worker's replacement has the masters of its predecessor, from keepers and from gradients."""
    stages, workers = LAYOUTS[layout]
    phases = ("compute", "reduce", "agree", "update", "commit", "compute")
    faults = [
        {"rank": number % workers, "phase": phase, "step": 1 + number, "incarnation": number // workers}
        for number, phase in enumerate(phases)
    ]
    result = run_job(nproc=workers, stages=stages, steps=STEPS, faults=faults, **BFLOAT16)
    assert_same_run(result, reference(STEPS, **BFLOAT16))
    assert len(result.named("worker_died")) == len(faults)
    for state in states_of(result):
        assert_has_masters(state)


@pytest.mark.soak
def test_flipped_bits_of_the_model_are_made_good_from_masters() -> None:
    """Once of values that the rank only reads, once of values that it owns."""
    faults = [
        {"rank": 1, "phase": "compute", "step": 2, "after": 1, "kind": "flip"},
        {"rank": 0, "phase": "compute", "step": 5, "kind": "flip-owned"},
    ]
    result = run_job(nproc=2, steps=STEPS, faults=faults, flags=["--es-verify-every=1"], **BFLOAT16)
    assert_same_run(result, reference(STEPS, **BFLOAT16))
    assert [(e["where"], e["rank"]) for e in result.named("corruption")] == [("replica", 1), ("replica", 0)]


def same_as_undisturbed(result: Result, first: int, **config: Any) -> None:
    """What was trained from step `first` on."""
    assert result.status == 0, result.output[-4000:]
    expected = reference(STEPS, **config)
    ledgers = [[(e["step"], e["loss"], e["digest"]) for e in r.named("committed")] for r in (result, expected)]
    assert ledgers[0] == ledgers[1][first:]
    for state in states_of(result):
        assert_same_state(state, expected.state())


def stored(checkpoint: Checkpoint, room: str) -> dict[str, str]:
    """The element type of every array of a room."""
    return {name: array.dtype for name, array in checkpoint.manifest.names(room).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a job that saved after four steps, and its state then."""
    folder = tmp_path_factory.mktemp("low") / "saved"
    flags = [f"--es-checkpoint={folder}", "--es-checkpoint-every=4"]
    result = run_job(nproc=4, stages=2, steps=4, flags=flags, **BFLOAT16)
    assert result.status == 0, result.output
    return folder, states_of(result)[0]


def test_checkpoints_hold_masters_and_another_layout_goes_on_from_them(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path / "saved")
    flags = [f"--es-checkpoint={tmp_path / 'saved'}", "--es-checkpoint-every=4"]
    checkpoint = open_checkpoint(str(tmp_path / "saved"))
    assert set(stored(checkpoint, "params").values()) == {"float32"}
    assert set(stored(checkpoint, "optimizer/exp_avg").values()) == {"float32"}
    assert checkpoint.manifest.dtypes == dict.fromkeys(stored(checkpoint, "params"), "bfloat16")
    result = run_job(nproc=2, steps=STEPS, flags=flags, **BFLOAT16)
    assert "warning" not in result.output, result.output
    same_as_undisturbed(result, 4, **BFLOAT16)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_frameworks_get_what_they_compute_in_or_the_masters(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, state = saved
    for name in ("hf", "dcp", "deepspeed"):
        ended = everstep("convert", str(folder), str(tmp_path / name), "--to", name)
        assert ended.status == 0, ended.stderr
    model = read("hf", tmp_path / "hf").params
    assert {name: (t.dtype, t.read().tobytes()) for name, t in model.items()} == {
        name: ("bfloat16", live.view(torch.int16).numpy().tobytes()) for name, live in state["model"].items()
    }
    for room in ("masters", "model"):  # into a float32 model, and into a bfloat16 one
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state[room].items()}
        dcp.load({"model": loaded}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state[room].items()), room
    content = read("deepspeed", tmp_path / "deepspeed")  # compares its masters with the module's own weights
    assert content.dtypes == dict.fromkeys(state["model"], "bfloat16")
    for name, master in state["masters"].items():
        assert content.params[name].read().tobytes() == master.numpy().tobytes()
        moment = state["optimizer"][name]["exp_avg"]
        assert content.optimizer["exp_avg"][name].read().tobytes() == moment.numpy().tobytes()


@pytest.mark.soak
def test_a_job_without_masters_goes_on_without_them(tmp_path: Path) -> None:
    """A job that gains masters, or loses them, warns of it."""
    flags = [f"--es-checkpoint={tmp_path / 'saved'}", "--es-checkpoint-every=4", "--es-master-dtype=none"]
    first = run_job(nproc=2, steps=4, flags=flags, **BFLOAT16)
    assert first.status == 0, first.output
    assert all("masters" not in state for state in states_of(first))
    checkpoint = open_checkpoint(str(tmp_path / "saved"))
    assert set(stored(checkpoint, "params").values()) == {"bfloat16"}
    assert checkpoint.manifest.dtypes == {}
    second = run_job(nproc=4, stages=2, steps=6, flags=flags, **BFLOAT16)
    undisturbed = run_job(nproc=2, steps=6, flags=["--es-master-dtype=none"], **BFLOAT16)
    for state in states_of(second):
        assert_same_state(state, undisturbed.state())
    third = run_job(nproc=2, steps=STEPS, flags=flags[:2], **BFLOAT16)
    assert third.status == 0, third.output
    assert "was saved without float32 masters, which begin with its values" in third.output
    assert_has_masters(third.state())
    fourth = run_job(nproc=2, steps=STEPS + 2, flags=flags, **BFLOAT16)
    assert fourth.status == 0, fourth.output
    assert "has float32 masters, which are rounded" in fourth.output
    assert "masters" not in fourth.state()


@pytest.mark.soak
@pytest.mark.parametrize("protection", ["parity", "replay"])
def test_a_lost_node_and_the_one_that_takes_its_place(protection: str, tmp_path: Path) -> None:
    """Its masters come from parity, or from a backup that ran the optimizer; the newcomer takes over other ones."""
    steps = 40
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=steps, flags=[f"--es-protection={protection}"], **BFLOAT16)
        job.start()
        job.await_whole()
        hosts.kill(1)
        job.await_whole()
        job.see_to_the_end(120)
        result = job.check()
    (lost,) = result.named("node_lost")
    assert [event["ranks"] for event in result.named("joined")] == [lost["ranks"]], "a node took its place"
    assert_has_masters(states_of(result)[0])
