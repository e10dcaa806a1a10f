"""The end of training: all ranks leave the loop, or one does alone; the code after it; the last checkpoint."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch

from everstep.checkpointing.universal.reader import committed, open_checkpoint
from everstep.checkpointing.universal.store import open_store
from tests.jobs import JOBS, Ended, assert_same_state, command, everstep, launch, processes_of, wait_until
from tests.jobs.ports import free_port
from tests.jobs.processes import saying

SCRIPT = JOBS / "leaving_job.py"
AT = 5  # the last step that is done: six are


def job(out: Path, *flags: str, faults: list[dict[str, object]] | None = None, **config: object) -> Ended:
    """Run it on two ranks, with a checkpoint folder and no checkpoint due before the end."""
    out.mkdir(exist_ok=True)
    arguments = json.dumps({"out": str(out), "folder": str(out / "checkpoints"), "at": AT, **config})
    saving = [f"--es-checkpoint={out}/checkpoints", "--es-checkpoint-every=1000"]
    environment = {"EVERSTEP_FAULTS": json.dumps(faults or [])}
    return everstep("run", "--nproc-per-node=2", *saving, *flags, str(SCRIPT), arguments, environment=environment)


def saved(out: Path) -> list[int]:
    """The versions of the checkpoints there are, newest first."""
    store = open_store(str(out / "checkpoints"), {})
    return [open_checkpoint(f"{out}/checkpoints/{name}", {}).manifest.step for name in committed(store)]


def state(out: Path, rank: int = 0) -> dict[str, object]:
    return torch.load(out / f"state-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("loop", [False, True], ids=["steps", "loop"])
def test_everybody_leaves_at_one_step(tmp_path: Path, loop: bool) -> None:
    """The last checkpoint is saved, the code after training runs, and the job has succeeded; killed or not."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    ended = job(plain, how="break", loop=loop)
    assert ended.status == 0, ended.stderr
    fault = {"rank": 1, "phase": "commit", "step": AT, "kind": "kill"}
    ended = job(killed, how="break", loop=loop, faults=[fault])
    assert ended.status == 0, ended.stderr
    assert "worker of rank 1 killed by SIGKILL" in ended.stderr
    for out in (plain, killed):
        assert set(saved(out)) == {AT + 1}
        for rank in (0, 1):
            assert (out / f"left-{rank}").read_text() == str(AT + 1)
            assert (out / f"done-{rank}").exists()
            assert_same_state(state(out, rank), state(plain))


def test_all_leave_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Both loops; a rank that is lost then is replaced, and its replacement finds nothing left to do in them."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for out, phases in ((plain, ()), (killed, ("commit",))):
        faults: list[dict[str, object]] = [{"rank": 1, "phase": phase, "step": AT} for phase in phases]
        ended = job(out, how="break", epochs=3, faults=faults)
        assert ended.status == 0, ended.stderr
        assert ("worker of rank 1 killed by SIGKILL" in ended.stderr) == bool(faults)
        assert set(saved(out)) == {AT + 1}
        for rank in (0, 1):
            assert (out / f"left-{rank}").read_text() == str(AT + 1)
            assert (out / f"steps-{rank}").read_text().split() == [str(step) for step in range(AT + 1)]
            assert_same_state(state(out, rank), state(plain))


@pytest.mark.parametrize(("how", "loop"), [("return", False), ("return", True), ("exit", False), ("exit", True)])
def test_ways_to_leave(tmp_path: Path, how: str, loop: bool) -> None:
    """A return from the training function continues with the script; sys.exit(0) ends it, with success."""
    ended = job(tmp_path, how=how, loop=loop)
    assert ended.status == 0, ended.stderr
    assert saved(tmp_path) == [AT + 1]
    assert (tmp_path / "done-0").exists() == (how == "return")


@pytest.mark.parametrize("loop", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["steps", "loop"])
def test_a_script_stops_training(tmp_path: Path, loop: bool) -> None:
    """One rank asks in the turn after a step: all end after the next one, killed or not, and each step is told once."""
    plain, killed, whole = tmp_path / "plain", tmp_path / "killed", tmp_path / "whole"
    ended = job(plain, "--es-log=text", how="stop", loop=loop, alone=1)
    assert ended.status == 0, ended.stderr
    assert f"the script ends training after step {AT + 1}: good enough" in ended.stderr
    fault = {"rank": 0, "phase": "commit", "step": AT + 1, "kind": "kill"}
    ended = job(killed, how="stop", loop=loop, faults=[fault])
    assert ended.status == 0, ended.stderr
    assert "worker of rank 0 killed by SIGKILL" in ended.stderr
    assert job(whole, loop=loop, steps=AT + 2).status == 0
    for out in (plain, killed):
        assert saved(out) == [AT + 2]
        for rank in (0, 1):
            assert (out / f"left-{rank}").read_text() == str(AT + 2)
            assert (out / f"done-{rank}").exists()
            assert_same_state(state(out, rank), state(whole))
    steps = [str(step) for step in range(AT + 2)]
    assert (plain / "steps-0").read_text().split() == (plain / "steps-1").read_text().split() == steps
    assert (killed / "steps-1").read_text().split() == steps
    again = job(plain, "--es-resume-data=ignore", loop=loop, steps=AT + 5)
    assert again.status == 0, again.stderr
    assert saved(plain)[0] == AT + 5, "a job that resumes there continues training"


@pytest.mark.parametrize(("how", "loop"), [("break", False), ("break", True), ("exit", False), ("vanish", True)])
def test_one_rank_leaves_alone(tmp_path: Path, how: str, loop: bool) -> None:
    """The error names the step, no rank waits for it, and what all had done is saved."""
    ended = job(tmp_path, how=how, loop=loop, alone=1)
    assert ended.status == 3, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert "rank 1" in line, ended.stderr
    if how == "vanish":
        assert "ended its process with exit status 0 inside the training function" in line
        assert saved(tmp_path)[0] > AT
    else:
        assert f"rank 1 left the training loop after step {AT} of 30, and rank 0 continued" in line
        assert saved(tmp_path) == [AT + 1]
    assert not list(tmp_path.glob("done-*"))


def test_the_last_step_may_be_left_too(tmp_path: Path) -> None:
    """Leaving at the last step is the end of training, however the other ranks leave."""
    ended = job(tmp_path, how="break", loop=True, steps=AT + 1)
    assert ended.status == 0, ended.stderr
    assert saved(tmp_path) == [AT + 1]


def test_after_training(tmp_path: Path) -> None:
    """It takes as long as it needs, and `status` shows it."""
    out, port = tmp_path / "out", free_port()
    out.mkdir()
    endpoint = f"127.0.0.1:{port}"
    process = launch(
        SCRIPT,
        [json.dumps({"out": str(out), "after": "wait", "steps": 4})],
        ["--nproc-per-node=2", f"--rdzv-endpoint={endpoint}"],
        forked=True,
    )
    try:
        wait_until(lambda: len(list(out.glob("after-*"))) == 2, 60, "training is over")
        view = json.loads(everstep("status", endpoint, "--json").stdout)["view"]
        assert view["phase"] == "after training"
        assert [worker["status"] for worker in view["workers"]] == ["after training", "after training"]
        assert "after training" in everstep("status", endpoint).stdout
    finally:
        (out / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert len(list(out.glob("done-*"))) == 2


@pytest.mark.parametrize(
    ("after", "cause"),
    [("raise", "exit status 1"), ("exit", "exit status 7"), ("kill", "killed by SIGKILL")],
)
def test_what_comes_after_training_fails(tmp_path: Path, after: str, cause: str) -> None:
    """Training is done, and the job has failed: no rank trains again."""
    ended = job(tmp_path, after=after, steps=4)
    assert ended.status == 1, ended.stderr
    assert f"training is done, but the code after it failed: {cause} (rank " in ended.stderr
    assert ("ValueError: the evaluation failed" in ended.stderr) == (after == "raise")
    assert saved(tmp_path) == [4]


def test_a_second_training_is_refused(tmp_path: Path) -> None:
    ended = job(tmp_path, after="again", steps=4)
    assert ended.status == 1
    assert "train: this script has trained already (train), and a job is one training" in ended.error()


def test_stopped_after_training(tmp_path: Path) -> None:
    """The code after training has the grace of a stop, and is then interrupted: a line, and a status of its own."""
    process = launch(
        SCRIPT,
        [json.dumps({"out": str(tmp_path), "after": "wait", "steps": 4})],
        ["--nproc-per-node=2", "--es-stop-grace=1"],
        forked=True,
    )
    wait_until(lambda: len(list(tmp_path.glob("after-*"))) == 2, 60, "training is over")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "stopped by SIGTERM: training is done; the code after it has 1 s to end" in output
    assert "everstep: error: the code after training was interrupted on ranks 0, 1: stopped by SIGTERM" in output


@pytest.mark.soak
def test_the_last_checkpoint_is_lost(tmp_path: Path) -> None:
    """Reported when it happens, and at the end, with a status of its own; also by a script without the launcher."""
    launched, alone = tmp_path / "launched", tmp_path / "alone"
    ended = job(launched, "--es-checkpoint-every=2", spoil=3, steps=6)
    assert ended.status == 3, ended.stderr
    assert ended.stderr.count("alarm   checkpoint_failed") >= 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("everstep: error: the state after 6 steps is not saved ("), ended.stderr
    assert re.search(r"; (there is none|the newest checkpoint is of \d steps)$", last), last
    assert (launched / "done-0").exists()
    alone.mkdir()
    settings = {"out": str(alone), "folder": str(alone / "checkpoints"), "spoil": 3, "steps": 6}
    environment = {"EVERSTEP_CHECKPOINT": str(alone / "checkpoints"), "EVERSTEP_CHECKPOINT_EVERY": "2"}
    ended = command([str(SCRIPT), json.dumps(settings)], environment)
    assert ended.status == 3, ended.stderr
    assert "everstep: error: the state after 6 steps is not saved (" in ended.stderr
    assert (alone / "done-0").exists()


def test_a_save_that_hangs_is_given_up(tmp_path: Path) -> None:
    """Its process stands still: that is reported, the process is ended in time, and the next save gets another one."""
    arguments, events = {"out": str(tmp_path), "steps": 10**6}, tmp_path / "events"
    flags = [f"--es-checkpoint={tmp_path}/checkpoints", "--es-checkpoint-every=2", "--es-checkpoint-timeout=3"]
    process = launch(SCRIPT, [json.dumps(arguments)], ["--nproc-per-node=2", *flags, f"--es-events={events}"])

    def savers() -> list[psutil.Process]:
        return saying(processes_of(str(tmp_path)), "everstep.checkpointing.saving.saver")

    def told(event: str) -> list[dict[str, object]]:
        lines = map(json.loads, events.read_text().splitlines() if events.exists() else ())
        return [line for line in lines if line["event"] == event]

    try:
        wait_until(lambda: told("checkpoint_saved"), 60, "a checkpoint")
        (stopped,) = savers()
        stopped.suspend()
        wait_until(lambda: told("checkpoint_failed"), 60, "the save is given up")
        before = len(told("checkpoint_saved"))
        wait_until(lambda: len(told("checkpoint_saved")) > before, 60, "another one is saved")
        why = str(told("checkpoint_failed")[0]["why"])  # of the rank that waited, or of another one in the same process
        assert re.search(r"no progress for 3 s|was ended, since \S+ made no progress", why), why
        assert any(line["notice"] == "save-stalls" for line in told("warning"))
        assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "is saved" in output


@pytest.mark.soak
def test_two_jobs_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    """Neither removes the other's checkpoints; a job that would have to guess which to resume from asks."""
    folder = tmp_path / "checkpoints"
    assert job(tmp_path, steps=4).status == 0
    (first,) = committed(open_store(str(folder), {}))
    anew = job(tmp_path, "--es-resume=never", "--es-checkpoint-keep=1", steps=2)
    assert anew.status == 0
    assert f"{folder} has checkpoints of another run ({first}), and resume='never'" in anew.stderr
    second, kept = committed(open_store(str(folder), {}))
    assert kept == first
    line = job(tmp_path, steps=6).error()
    assert f"has checkpoints of several runs, {second} and {first}: choose with resume=URL" in line
    chosen = job(tmp_path, f"--es-resume={folder}/{first}", steps=6)
    assert chosen.status == 0, chosen.stderr
    assert [step for step in saved(tmp_path) if step != 2] == [6, 4]


def test_nothing_left_to_train_is_said(tmp_path: Path) -> None:
    assert job(tmp_path, steps=4).status == 0
    again = job(tmp_path, steps=4)
    assert again.status == 0
    assert "has 4 steps, and the job 4: nothing is left to train" in again.stderr
