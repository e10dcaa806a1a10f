"""Signals that ask a job to end, whichever of its processes gets them: the job saves, and ends; and other signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.checkpointing.universal.reader import committed
from everstep.checkpointing.universal.store import open_store
from everstep.comms.base.process import NOTICES, SAME_S, STOPS
from everstep.elastic.contract.faults import COORDINATOR
from tests.jobs import JOBS, Result, assert_same_state, finish, launch, read_result, wait_until
from tests.jobs.ports import free_port
from tests.jobs.processes import named

SCRIPT = JOBS / "family_job.py"
STEPS = 40


class Job:
    """`family_job.py` with a folder for checkpoints, whose steps are slow from the start."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.out, self.checkpoints = folder / "out", folder / "checkpoints"
        self.out.mkdir(exist_ok=True)
        (self.out / "slow").touch()
        self.arguments = [json.dumps({"out": str(self.out), "steps": STEPS, **config})]

    def start(self, *more: str, inside: Sequence[str] = (), nproc: int = 2) -> subprocess.Popen[str]:
        flags = [f"--nproc-per-node={nproc}", f"--es-checkpoint={self.checkpoints}", "--es-checkpoint-every=1000"]
        return launch(SCRIPT, self.arguments, [*flags, f"--es-events={self.out}/events.jsonl", *more], inside=inside)

    def start_alone(self, inside: Sequence[str] = (), checkpoints: bool = True) -> subprocess.Popen[str]:
        """`python family_job.py`."""
        folder = {"EVERSTEP_CHECKPOINT": str(self.checkpoints)} if checkpoints else {}
        return subprocess.Popen(
            [*inside, sys.executable, str(SCRIPT), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **folder, "EVERSTEP_CHECKPOINT_EVERY": "1000"},
            start_new_session=True,
        )

    def steps(self) -> list[int]:
        try:
            return [
                int(line.split()[2]) for line in (self.out / "steps").read_text().splitlines() if line.count(" ") == 2
            ]
        except FileNotFoundError:
            return []

    def await_step(self, step: int = 2) -> None:
        wait_until(lambda: step in self.steps(), 90, f"step {step} is done")

    def noted(self, name: str) -> list[Path]:
        return [path for path in self.out.glob(f"{name}-*") if path.suffix != ".new"]

    def saved(self) -> int:
        """The number of steps of the newest checkpoint; 0 if there is none."""
        names = committed(open_store(str(self.checkpoints))) if self.checkpoints.exists() else []
        return int(str(names[0]).split("-")[1]) if names else 0

    def assert_said(self, output: str, number: signal.Signals) -> None:
        """Check that the state with which the job ended is saved in the folder."""
        said = re.search(rf"stopped by {number.name}; its state after (\d+) steps is saved", output)
        assert said, output
        names = committed(open_store(str(self.checkpoints)))
        assert int(said[1]) in {int(name.split("-")[1]) for name in names}, (output, names)
        assert 2 < int(said[1]) < STEPS
        assert "Traceback" not in output

    def fast(self) -> None:
        (self.out / "slow").unlink(missing_ok=True)

    def state(self, rank: int = 0) -> Result:
        return read_result(self.out, 0, "")


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def signal_all(processes: list[psutil.Process], number: int) -> None:
    """As scancel and systemd do: every process of the job, wherever it is."""
    for process in processes:
        process.send_signal(number)


def final_state(job: Job) -> dict[str, Any]:
    return job.state().state()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    job.fast()
    process = job.start_alone(checkpoints=False)
    output = finish(process)
    assert process.returncode == 0, output
    (job.out / "events.jsonl").touch()
    return final_state(job)


def each_stop() -> list[Any]:
    """The first two of them always, the others if time permits."""
    return [
        pytest.param(number, id=number.name, marks=pytest.mark.soak if i > 1 else ()) for i, number in enumerate(STOPS)
    ]


@pytest.mark.parametrize("number", each_stop())
def test_a_signal_to_every_process_saves_the_job(number: signal.Signals, tmp_path: Path) -> None:
    job = Job(tmp_path)
    launcher = job.start()
    job.await_step()
    everybody = tree(launcher)
    assert len(everybody) == 6, "launcher, coordinator, keeper, preloaded process, two workers"
    signal_all(everybody, number)
    output = finish(launcher)
    assert launcher.returncode == 1
    job.assert_said(output, number)
    assert not read_result(job.out, 1, output).named("worker_died"), "nobody dies of it"


def test_processes_that_fetch_data_outlive_it(tmp_path: Path) -> None:
    """They receive it, too, while their workers still need them for a step."""
    job = Job(tmp_path, loader=True, prepared=True)
    launcher = job.start()
    job.await_step()
    everybody = tree(launcher)
    assert len(everybody) == 8, "with a process of each worker that fetches data"
    signal_all(everybody, signal.SIGTERM)
    output = finish(launcher)
    job.assert_said(output, signal.SIGTERM)


@pytest.mark.soak
def test_what_was_saved_so_is_gone_on_from(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """As a shell, a terminal and timeout do: to the group of the launcher; and timeout sends its signal twice."""
    job = Job(tmp_path)
    timeout = job.start(inside=["timeout", "1000"])
    job.await_step()
    timeout.send_signal(signal.SIGTERM)
    output = finish(timeout)
    job.assert_said(output, signal.SIGTERM)
    job.fast()
    again = job.start(nproc=3)
    output = finish(again)
    assert again.returncode == 0, output
    assert_same_state(final_state(job), undisturbed)


def test_nohup(tmp_path: Path) -> None:
    """A dropped connection ends nothing: neither the launcher nor any other process."""
    job = Job(tmp_path)
    launcher = job.start(inside=["nohup"])
    job.await_step()
    signal_all(tree(launcher), signal.SIGHUP)
    seen = max(job.steps())
    job.await_step(seen + 3)
    job.fast()
    output = finish(launcher)
    assert launcher.returncode == 0, output
    assert not read_result(job.out, 0, output).named("worker_died")


def test_asked_twice_it_ends_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, waits_at=2)
    launcher = job.start("--es-stop-grace=1000")
    wait_until(lambda: len(job.noted("waits")) == 2, 90, "both workers wait in the user's code")
    launcher.send_signal(signal.SIGTERM)
    first_s = time.monotonic()
    wait_until(lambda: time.monotonic() > first_s + SAME_S, 10, "the second one is another one")
    assert launcher.poll() is None, "it waits for a checkpoint"
    launcher.send_signal(signal.SIGTERM)
    finish(launcher, 30)
    assert launcher.returncode == 1


@pytest.mark.soak
def test_a_coordinator_by_itself_stays_until_all_is_saved(tmp_path: Path) -> None:
    """When a batch system cancels a job, it gets the signal too; alone with it, it ends soon."""
    job, port = Job(tmp_path), free_port()
    command = [
        sys.executable,
        "-m",
        "everstep",
        "coordinator",
        f"--bind=127.0.0.1:{port}",
        f"--es-store={tmp_path}/store",
    ]
    coordinator = subprocess.Popen([*command, f"--es-events={job.out}/events.jsonl"], stdout=subprocess.DEVNULL)
    flags = ["--rdzv-backend=everstep", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host=false"]
    try:
        launcher = job.start(*flags)
        job.await_step()
        signal_all([psutil.Process(coordinator.pid), *tree(launcher)], signal.SIGTERM)
        output = finish(launcher)
        job.assert_said(output, signal.SIGTERM)
        assert coordinator.wait(30) == 0
        again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert again.stdout is not None
        again.stdout.readline()  # it serves
        wait_until(lambda: named([again.pid], COORDINATOR), 30, "it leads")
        again.send_signal(signal.SIGTERM)
        assert again.wait(30) == 128 + signal.SIGTERM
        again.stdout.close()
    finally:
        coordinator.kill()
        coordinator.wait()


# ---------------------------------------------------------------- what is the script's own


def test_a_scripts_own_handlers_are_left_alone(tmp_path: Path) -> None:
    """What it starts ends with it, too, even though its workers themselves ignore the signal."""
    job = Job(tmp_path, handles=True, ends_children=True)
    launcher = job.start()
    job.await_step()
    assert len(job.noted("ended-children")) == 2
    workers = [psutil.Process(int(path.name.split("-")[-1])) for path in job.noted("ended-children")]
    for number in NOTICES:
        signal_all(workers, number)
        wait_until(lambda name=number.name: len(job.noted(f"heard-{name}")) == 2, 30, f"both have heard {number.name}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal_all(workers, number)
    job.await_step(max(job.steps()) + 3)
    job.fast()
    output = finish(launcher)
    assert launcher.returncode == 0, output
    assert not read_result(job.out, 0, output).named("worker_died")


@pytest.mark.soak
def test_an_ordinary_script_hears_a_signal_to_its_group_by_its_launcher(tmp_path: Path) -> None:
    """As under torchrun: a worker has a session of its own, and the launcher forwards its signals."""
    launcher = launch(JOBS / "environment_job.py", ["wait"], ["--nproc-per-node=2"], {"OUT": str(tmp_path)})
    wait_until(lambda: len(list(tmp_path.glob("*.waits"))) == 2, 60, "both workers wait")
    (tmp_path / "shutdown").touch()
    os.killpg(launcher.pid, signal.SIGUSR1)
    wait_until(lambda: len(list(tmp_path.glob("*.signal"))) == 2, 30, "both have heard it")
    first_s = time.monotonic()
    wait_until(lambda: time.monotonic() > first_s + SAME_S, 10, "the second one is another one")
    launcher.send_signal(signal.SIGUSR1)  # rank 1 ignores signals, and would be waited for
    finish(launcher, 40)
    assert launcher.returncode == 1
    assert {path.read_text() for path in tmp_path.glob("*.signal")} == {"SIGUSR1"}


# ---------------------------------------------------------------- without the launcher


@pytest.mark.parametrize(
    ("number", "prepared"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.soak),
        (signal.SIGINT, True),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.soak),
    ],
)
def test_a_script_alone_saves_and_ends(
    number: signal.Signals, prepared: bool, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    job = Job(tmp_path, prepared=prepared)
    process = job.start_alone(inside=["timeout", "1000"] if number == signal.SIGTERM else ())
    job.await_step()
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 128 + number, output
    job.assert_said(output, number)
    assert job.noted("left"), "the script's own way out was taken"
    job.fast()
    again = job.start_alone()
    output = finish(again)
    assert again.returncode == 0, output
    (job.out / "events.jsonl").touch()
    assert_same_state(final_state(job), undisturbed)


def test_a_script_alone_ends_at_once_when_asked_twice(tmp_path: Path) -> None:
    job = Job(tmp_path, waits_at=2)
    process = job.start_alone()
    wait_until(lambda: job.noted("waits"), 90, "it waits in the user's code")
    process.send_signal(signal.SIGTERM)
    first_s = time.monotonic()
    wait_until(lambda: time.monotonic() > first_s + SAME_S, 10, "the second one is another one")
    process.send_signal(signal.SIGTERM)
    output = finish(process, 30)
    assert process.returncode == -signal.SIGTERM
    assert "again: ends at once" in output
    assert job.saved() == 0


def test_a_script_alone_that_saves_nothing_ends_as_python_does(tmp_path: Path) -> None:
    job = Job(tmp_path)
    process = job.start_alone(checkpoints=False)
    job.await_step()
    process.send_signal(signal.SIGTERM)
    output = finish(process, 30)
    assert process.returncode == -signal.SIGTERM
    assert "everstep" not in output


def test_a_script_alone_under_nohup_goes_on(tmp_path: Path) -> None:
    job = Job(tmp_path)
    process = job.start_alone(inside=["nohup"])
    job.await_step()
    process.send_signal(signal.SIGHUP)
    job.await_step(max(job.steps()) + 3)
    job.fast()
    output = finish(process)
    assert process.returncode == 0, output
