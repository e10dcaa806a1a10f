"""A job is stopped and resumed, in another layout, from a checkpoint: with the numbers of an uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from everstep.checkpointing.universal.reader import committed, load, open_checkpoint
from everstep.checkpointing.universal.store import open_store
from tests.jobs import (
    JOBS,
    Result,
    assert_same_run,
    assert_same_state,
    everstep,
    finish,
    launch,
    read_result,
    reference,
    run_job,
    wait_until,
)
from tests.jobs.interpreter import script
from tests.jobs.processes import saying

LAYOUTS = {"1x4": (1, 4), "2x2": (2, 4), "4x1": (4, 4), "uneven": (2, 3), "1": (1, 1), "6": (3, 6)}
STEPS = 8


def checkpointing(folder: Path | str, *more: str) -> list[str]:
    return [f"--es-checkpoint={folder}", "--es-checkpoint-every=4", *more]


def trained(name: str, folder: Path, steps: int) -> Result:
    """Train up to `steps` in a layout, from what is in the folder."""
    stages, workers = LAYOUTS[name]
    if workers > 1:
        return run_job(nproc=workers, stages=stages, steps=steps, flags=checkpointing(folder))
    out = folder.with_name(f"{folder.name}-out")
    out.mkdir()
    (out / "events.jsonl").touch()
    environment = {"RANK": "0", "EVERSTEP_CHECKPOINT": str(folder), "EVERSTEP_CHECKPOINT_EVERY": "4"}
    arguments = json.dumps({"out": str(out), "steps": steps, "stages": stages})
    ended = script(JOBS / "gpt_job.py", arguments, environment=environment)
    return read_result(out, ended.status, ended.stdout + ended.stderr)


def assert_continues(result: Result, first: int, steps: int) -> None:
    """From step `first` on, every loss, digest and byte is that of the uninterrupted run."""
    assert result.status == 0, result.output[-4000:]
    expected = reference(steps)
    assert result.losses() == {step: loss for step, loss in expected.losses().items() if step >= first}
    told = [(e["step"], e["loss"], e["digest"]) for e in result.named("committed")]
    ledger = [(e["step"], e["loss"], e["digest"]) for e in expected.named("committed")]
    assert told in ([], ledger[first:])
    states = list(result.out.glob("state-*.pt"))
    assert states
    for path in states:
        assert_same_state(torch.load(path, weights_only=True), expected.state())


@pytest.mark.soak
@pytest.mark.parametrize(
    ("saved", "others"),
    [("1x4", ["2x2", "6"]), ("2x2", ["1x4", "4x1", "uneven"]), ("4x1", ["1", "uneven"]), ("uneven", ["1x4", "6"])],
    ids=["1x4", "2x2", "4x1", "uneven"],
)
def test_what_one_layout_saved_others_go_on_from(saved, others, tmp_path):
    first = tmp_path / "first"
    assert trained(saved, first, 4).status == 0
    assert open_checkpoint(str(first)).manifest.step == 4

    def go_on(name):
        folder = tmp_path / name
        shutil.copytree(first, folder)
        return folder, trained(name, folder, STEPS)

    with ThreadPoolExecutor(2) as pool:
        for folder, result in pool.map(go_on, others):
            assert_continues(result, 4, STEPS)
            assert open_checkpoint(str(folder)).manifest.step == STEPS


def test_sigterm_saves_before_the_job_ends(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "checkpoints"
    out.mkdir()
    (out / "slow").touch()
    flags = ["--nproc-per-node=2", f"--es-checkpoint={folder}", f"--es-events={out}/events.jsonl"]
    arguments = [json.dumps({"out": str(out), "steps": 12, "stages": 1})]
    job = launch(JOBS / "gpt_job.py", arguments, flags, forked=True)
    wait_until(lambda: _steps(out) >= 3, 60, "three steps are done")
    job.send_signal(signal.SIGTERM)
    output = finish(job, 60)
    assert job.returncode not in (0, None)
    step = open_checkpoint(str(folder)).manifest.step
    assert 3 <= step < 12
    assert f"stopped by SIGTERM; its state after {step} steps is saved" in output
    assert "Traceback" not in output
    result = run_job(nproc=3, steps=12, flags=checkpointing(folder))
    assert_continues(result, step, 12)


def _steps(out: Path) -> int:
    events = out / "events.jsonl"
    return events.read_text().count('"committed"') if events.exists() else 0


def assert_trained_unsaved(result: Result) -> None:
    """The undisturbed run; the loss of its last checkpoint is reported, also by its exit status."""
    assert result.status == 3, result.output[-4000:]
    assert f"everstep: error: the state after {STEPS} steps is not saved (" in result.output
    assert_same_run(replace(result, status=0), reference(STEPS))


@pytest.mark.soak
def test_a_save_that_fails_never_stops_training(tmp_path):
    """First the storage is not a folder, then the saver is killed repeatedly; training is the undisturbed one."""
    (tmp_path / "file").write_text("")
    flags = [f"--es-checkpoint={tmp_path}/file/checkpoints", "--es-checkpoint-every=2", "--es-resume=never"]
    result = run_job(nproc=2, steps=STEPS, flags=flags)
    assert_trained_unsaved(result)
    failed = result.named("checkpoint_failed")
    assert failed, result.output
    assert all("file" in event["why"] and "cannot write" in event["why"] for event in failed)
    assert not result.named("checkpoint_saved")


def test_the_saver_may_be_killed(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "checkpoints"
    out.mkdir()
    (out / "slow").touch()
    flags = ["--nproc-per-node=2", f"--es-events={out}/events.jsonl", *checkpointing(folder, "--es-checkpoint-every=1")]
    job = launch(JOBS / "gpt_job.py", [json.dumps({"out": str(out), "steps": STEPS, "stages": 1})], flags, forked=True)
    killed: set[int] = set()
    deadline = time.monotonic() + 60
    while _steps(out) < STEPS - 2 and time.monotonic() < deadline:
        for process in saying(psutil.Process(job.pid).children(recursive=True), "everstep.checkpointing.saving.saver"):
            if process.pid not in killed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                killed.add(process.pid)
        time.sleep(0.05)
    (out / "slow").unlink()
    output = finish(job, 60)
    assert killed
    result = read_result(out, job.returncode, output)
    assert_same_run(result, reference(STEPS))
    assert any("ended with status" in event["why"] for event in result.named("checkpoint_failed"))
    newest = open_checkpoint(str(folder))
    assert newest.manifest.step == STEPS
    assert not list(newest.verify())


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with checkpoints after steps 4 and 6, of a job of 8 steps."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for steps in (4, 6):
        assert run_job(nproc=2, steps=steps, flags=checkpointing(folder)).status == 0
    store = open_store(str(folder))
    assert [load(store.inside(name)).manifest.step for name in committed(store)] == [6, 4]
    return folder


def _damaged(two_checkpoints: Path, tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    newest = folder / committed(open_store(str(folder)))[0]
    chunk = sorted(newest.glob("optimizer/exp_avg/*/c/0/0"))[1]
    data = bytearray(chunk.read_bytes())
    data[5] ^= 4
    chunk.write_bytes(data)
    return folder, chunk


def test_a_damaged_checkpoint_ends_the_job_and_is_named(two_checkpoints, tmp_path):
    folder, chunk = _damaged(two_checkpoints, tmp_path)
    result = run_job(nproc=2, steps=STEPS, flags=checkpointing(folder))
    assert result.status != 0
    assert f"{chunk} is damaged: its checksum is " in result.output
    assert "on_damage='older' would resume from the one before it" in result.output
    assert "Traceback" not in result.output


def test_the_checkpoint_before_a_damaged_one_is_used_if_that_is_allowed(two_checkpoints, tmp_path):
    folder, chunk = _damaged(two_checkpoints, tmp_path)
    result = run_job(nproc=3, steps=STEPS, flags=checkpointing(folder, "--es-on-damage=older"))
    (unreadable,) = {event["why"] for event in result.named("checkpoint_unreadable")}
    assert str(chunk) in unreadable
    assert_continues(result, 4, STEPS)


@pytest.mark.soak
def test_what_does_not_fit_is_refused_in_one_line(two_checkpoints, tmp_path):
    flags = ["--nproc-per-node=2", *checkpointing(two_checkpoints)]
    arguments = json.dumps({"out": str(tmp_path), "steps": 8, "stages": 1})
    script = str(JOBS / "gpt_job.py")
    ended = everstep("run", *flags, "--es-seed=8", script, arguments)
    assert "does not continue this job: seed was 7, and is 8 now: the order of the data would change" in ended.error()
    arguments = json.dumps({"out": str(tmp_path), "steps": 8, "stages": 1, "layers": 3})
    ended = everstep("run", *flags, script, arguments)
    assert "does not continue this job: it has no params/" in ended.error() or "has the shape" in ended.error()
    ended = everstep("run", *flags, "--es-resume=sometimes", script, arguments)
    assert 'resume must be "auto", "never" or the URL of a checkpoint' in ended.error()


@pytest.mark.soak
def test_lost_workers_and_checkpoints_do_not_disturb_each_other(tmp_path):
    """Workers die while checkpoints are saved: a checkpoint is what an undisturbed run has after as many steps."""
    places = [
        *((0, 0, "agree"), (1, 0, "update"), (2, 0, "commit"), (3, 0, "compute")),
        *((0, 1, "commit"), (1, 1, "compute"), (2, 1, "reduce"), (3, 1, "update")),
    ]
    faults = [
        {"rank": rank, "incarnation": incarnation, "phase": phase, "step": 4 + 7 * number}
        for number, (rank, incarnation, phase) in enumerate(places)
    ]
    steps, folder = 64, tmp_path / "checkpoints"
    flags = [f"--es-checkpoint={folder}", "--es-checkpoint-every=1", "--es-checkpoint-keep=100"]
    result = run_job(nproc=4, stages=2, steps=steps, faults=faults, flags=flags, timeout_s=150)
    undisturbed = reference(steps, dump=True)
    assert_same_run(result, undisturbed)
    assert len(result.named("worker_died")) == len(faults)
    store = open_store(str(folder))
    names = committed(store)
    print(f"{len(names)} checkpoints; failed: {[e['why'] for e in result.named('checkpoint_failed')]}")
    assert len(names) >= 3
    for name in names:
        checkpoint = load(store.inside(name))
        truth = torch.load(undisturbed.out / f"at-{checkpoint.manifest.step}.pt", weights_only=True)
        for parameter, tensor in truth["model"].items():
            assert checkpoint.read(f"params/{parameter}").tobytes() == tensor.numpy().tobytes()
        for parameter, states in truth["optimizer"].items():
            for state in ("exp_avg", "exp_avg_sq"):
                found = checkpoint.read(f"optimizer/{state}/{parameter}")
                assert found.tobytes() == states[state].numpy().tobytes()
            assert checkpoint.manifest.scalars["step"][parameter]["value"] == states["step"].item()


@pytest.mark.soak
def test_a_full_disk_is_told_and_survived(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", mount]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        flags = [f"--es-checkpoint={mount}/checkpoints", "--es-checkpoint-every=4"]
        result = run_job(nproc=2, steps=STEPS, flags=flags)
        assert_trained_unsaved(result)
        assert "No space left on device" in result.named("checkpoint_failed")[0]["why"]
    finally:
        subprocess.run(["umount", mount], check=True)
