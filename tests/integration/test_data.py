"""Data in the form that scripts use: DataLoaders with worker processes, data that changes, replacements."""

from __future__ import annotations

import errno
import json
import multiprocessing
import struct
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import Settings
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.streams import StreamPlace
from everstep.elastic.step.worker_processes import Lost
from tests.jobs import JOBS, Result, assert_same_state, command, read_result, run_job, state_alone
from tests.jobs.interpreter import script

STEPS = 8
KILLS = [{"rank": 1, "phase": "compute", "step": 3, "after": 1}, {"rank": 0, "phase": "reduce", "step": 5}]
MANY = 300
ONE_KILL = [{"rank": 1, "phase": "compute", "step": 5}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "data"
    found.mkdir()
    for number in range(100, 140):
        (found / f"{number}.txt").write_text(str(number))
    return found


def alone(out: Path, folder: Path, **config: Any) -> Result:
    """Without the launcher, samples fetched by the script's own process."""
    out.mkdir()
    (out / "events.jsonl").touch()
    arguments = {"out": str(out), "folder": str(folder), "steps": STEPS, **config}
    ended = script(JOBS / "data_job.py", json.dumps(arguments))
    return read_result(out, ended.status, ended.stderr)


def assert_same_end(result: Result, reference: Result) -> None:
    assert result.status == 0, result.output
    assert reference.status == 0, reference.output
    states = sorted(result.out.glob("state-*.pt"))
    assert states
    for path in states:
        assert_same_state(result.state(int(path.stem.removeprefix("state-"))), reference.state())


def warnings(result: Result) -> set[str]:
    return {line["notice"] for line in result.named("warning")}


@pytest.mark.parametrize("loop", [False, True])
def test_a_data_loaders_workers_fetch_the_same_samples(
    loop: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random augmentation in worker processes, two ranks killed: as in one process that fetches for itself.

    In one of the cases a file cannot be read, and is skipped; in the other one the memory of batches is to be pinned,
    which without a GPU it is not.
    """
    loader = {"batch_size": 2, "num_workers": 2, "shuffle": True, "pin_memory": not loop}
    if loop:
        monkeypatch.setenv("EVERSTEP_SKIP_BAD_SAMPLES", "1")
        (folder / "120.txt").write_text("no number")
    result = run_job(
        nproc=2, steps=STEPS, script="data_job.py", faults=KILLS, folder=str(folder), loader=loader, loop=loop
    )
    assert_same_end(result, alone(tmp_path / "alone", folder, loop=loop))
    assert ("sample-skipped" in warnings(result)) == loop
    assert len(result.named("worker_died")) == len(KILLS)
    fetchers = {line.split()[0] for path in result.out.glob("fetched-*") for line in path.read_text().splitlines()}
    assert len(fetchers) > 4, "each of two ranks has two processes, and one that looked at the data first"


@pytest.mark.soak
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_that_import_the_script(method: str, folder: Path, tmp_path: Path) -> None:
    """They fetch what forked ones do; two ranks are killed, and one that comes of a fork server, which ends with its
    rank."""
    loader = {"batch_size": 2, "num_workers": 1, "shuffle": True, "multiprocessing_context": method}
    killed = {"kill_at": 11} if method == "forkserver" else {}
    arguments = {"folder": str(folder), "loader": loader, **killed}
    result = run_job(nproc=2, steps=STEPS, script="data_job.py", faults=KILLS, timeout_s=180, **arguments)
    assert ("data-worker-lost" in warnings(result)) == bool(killed)
    assert_same_end(result, alone(tmp_path / "alone", folder))
    assert len(result.named("worker_died")) == len(KILLS)
    fetchers = {line.split()[0] for path in result.out.glob("fetched-*") for line in path.read_text().splitlines()}
    assert len(fetchers) > 4


def test_a_weighted_sampler(folder: Path, tmp_path: Path) -> None:
    """Two ranks killed: the order of each epoch, of three batches, is that of one process."""
    loader = {"batch_size": 2, "drawn": 24, "pin_memory": True}
    result = run_job(
        nproc=2, steps=STEPS, script="data_job.py", faults=KILLS, folder=str(folder), loader=loader, loop=True
    )
    reference = alone(tmp_path / "alone", folder, loop=True, loader={**loader, "pin_memory": False})
    assert_same_end(result, reference)
    assert len(result.named("worker_died")) == len(KILLS)
    fetched = [int(line.split()[1]) for line in (reference.out / "fetched-0").read_text().splitlines()][-8 * STEPS :]
    assert sum(number % 2 for number in fetched) > 4 * STEPS, "odd ones are drawn three times as often"


def test_a_token_file(tmp_path: Path) -> None:
    """A pair as Megatron writes it, two ranks killed: as in one process."""
    tokens = np.random.default_rng(4).integers(0, 32, 200).astype(np.uint16)
    tokens.tofile(tmp_path / "text.bin")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    (tmp_path / "text.idx").write_bytes(head + struct.pack("<iqqq", len(tokens), 0, 0, 1))
    arguments = {"steps": STEPS, "tokens": str(tmp_path / "text")}
    (tmp_path / "events.jsonl").touch()
    with ThreadPoolExecutor(1) as pool:
        line = [str(JOBS / "tokens_job.py"), json.dumps({"out": str(tmp_path), **arguments})]
        waiting = pool.submit(command, line)
        result = run_job(nproc=2, script="tokens_job.py", faults=KILLS, **arguments)
        ended = waiting.result()
    assert_same_end(result, read_result(tmp_path, ended.status, ended.stderr))
    assert len(result.named("worker_died")) == len(KILLS)


@pytest.mark.soak
def test_a_data_loader_on_pipeline_stages(folder: Path, tmp_path: Path) -> None:
    loader = {"batch_size": 2, "num_workers": 1, "shuffle": True}
    result = run_job(
        nproc=3,
        stages=2,
        steps=STEPS,
        script="data_job.py",
        faults=KILLS,
        folder=str(folder),
        loader=loader,
        timeout_s=120,
    )
    assert_same_end(result, alone(tmp_path / "alone", folder))


def test_a_worker_process_of_a_data_loader_that_is_killed(folder: Path, tmp_path: Path) -> None:
    loader = {"batch_size": 2, "num_workers": 2, "shuffle": True}
    result = run_job(
        nproc=1, steps=STEPS, script="data_job.py", folder=str(folder), loader=loader, kill_at=7, loop=True
    )
    assert (result.out / "killed").exists()
    assert_same_end(result, alone(tmp_path / "alone", folder, loop=True))
    assert "data-worker-lost" in warnings(result)
    assert not result.named("worker_died")


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index])


class Told:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, what: str, fields: Mapping[str, Any]) -> None:
        self.texts.append(fields["text"])


def test_a_killed_worker_process_interrupts_nothing_but_the_fetch() -> None:
    """Not in what the rank does meanwhile, such as a commit; also while the script's own DataLoader runs."""
    settings = Settings(steps=5, global_batch_size=8, micro_batch_size=2)
    told = Told()
    numbers = Numbers()
    loader = torch.utils.data.DataLoader(numbers, batch_size=2, num_workers=2)
    data = DataSource(loader, settings, None, told, StreamPlace(Progress(None, 0, 1, [])))
    ahead = [(step, number) for step in range(5) for number in range(4)]
    data.digests()
    evaluation = iter(torch.utils.data.DataLoader(numbers, batch_size=2, num_workers=1))
    its = set(psutil.Process().children())
    assert data.fetch(0, 0, lambda: ahead).tolist() == [[0], [1]]
    ours = set(psutil.Process().children()) - its
    assert len(ours) == 2
    for process in ours:
        process.kill()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        time.sleep(0.01)  # torch's handler would raise here
    assert [data.fetch(0, number, lambda: ahead).tolist() for number in (1, 2)] == [[[2], [3]], [[4], [5]]]
    assert any("was lost, and its samples are fetched again" in text for text in told.texts)
    assert next(evaluation).tolist() == [[0], [1]]
    data.close()


class Running:
    """An iterator of a DataLoader that has one worker process."""

    def __init__(self, alive_s: float) -> None:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(alive_s,))
        process.start()
        self._workers = [process]

    def _shutdown_workers(self) -> None:
        self._workers[0].kill()
        self._workers[0].join()


def test_a_worker_process_that_is_killed_while_it_sends() -> None:
    """Its sockets are closed before it is seen to be dead: torch passes on what its reader raised."""
    told = Told()
    Lost(told).note(ConnectionResetError(errno.ECONNRESET, "reset by peer"), Running(0.1))
    assert any("was lost, and its samples are fetched again: [Errno 104]" in text for text in told.texts)


def test_an_error_of_the_datasets_own_is_no_lost_process() -> None:
    told = Told()
    with pytest.raises(FileNotFoundError, match="sample 7"):
        Lost(told).note(FileNotFoundError("sample 7"), Running(60))
    assert not told.texts


def test_without_shuffling_samples_come_in_their_order(folder: Path, tmp_path: Path) -> None:
    reference = alone(tmp_path / "alone", folder, loader={"batch_size": 2, "shuffle": False})
    fetched = [int(line.split()[1]) for line in (reference.out / "fetched-0").read_text().splitlines()]
    trained = fetched[-8 * STEPS :]  # the first samples were read before training, for their digests
    assert trained == [index % 40 for index in range(8 * STEPS)]


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            {"batch_size": 4},
            "batch_size=4, which is neither the job's micro_batch_size (2) nor its",
        ),
        ({"batch_size": None}, "give it batch_size=2"),
    ],
)
def test_a_data_loader_that_cannot_be_dealt_out(
    loader: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    result = alone(tmp_path / "alone", folder, loader=loader)
    assert result.status == 1
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.soak
def test_data_that_grew_at_its_end_is_used_as_far_as_the_others_know_it(folder: Path, tmp_path: Path) -> None:
    reference = alone(tmp_path / "alone", folder, steps=MANY)
    grows = {str(number): 0 for number in range(900, 910)}
    result = run_job(
        nproc=2, steps=MANY, script="data_job.py", faults=ONE_KILL, folder=str(folder), patient_from=5, grows=grows
    )
    assert_same_end(result, reference)
    assert result.named("joined"), "the replacement takes part"
    assert "data-grew" in warnings(result)


@pytest.mark.soak
def test_a_replacement_that_sees_other_data_is_left_out(folder: Path, tmp_path: Path) -> None:
    """New files are sorted between the old ones: every index after them is another sample."""
    reference = alone(tmp_path / "alone", folder, steps=MANY)
    grows = {f"100-{number}": 0 for number in range(5)}
    result = run_job(
        nproc=2, steps=MANY, script="data_job.py", faults=ONE_KILL, folder=str(folder), patient_from=5, grows=grows
    )
    assert_same_end(result, reference)
    (refused,) = result.named("newcomer_refused")
    assert refused["rank"] == 1
    assert "give every rank the same data" in refused["why"]
    assert not result.named("joined")
    assert "rank 1 is left out, and not replaced" in result.output


@pytest.mark.soak
def test_a_replacement_with_fewer_samples_is_left_out(folder: Path, tmp_path: Path) -> None:
    reference = alone(tmp_path / "alone", folder, steps=MANY)
    result = run_job(
        nproc=2, steps=MANY, script="data_job.py", faults=ONE_KILL, folder=str(folder), patient_from=5, stretch=30
    )
    assert_same_end(result, reference)
    (refused,) = result.named("newcomer_refused")
    assert refused["why"].startswith("the dataset has 30 samples on rank 1, and 40 on the others")


def test_if_every_replacement_sees_other_data_the_job_ends_and_says_why(folder: Path) -> None:
    everybody = [{**ONE_KILL[0], "rank": rank} for rank in range(2)]
    result = run_job(nproc=2, steps=STEPS, script="data_job.py", faults=everybody, folder=str(folder), stretch=30)
    assert result.status == 1
    assert "the dataset has 30 samples on rank" in result.output


def test_a_script_that_loads_its_own_checkpoint_survives_a_loss(folder: Path, tmp_path: Path) -> None:
    """The replacement loads it into its model and its optimizer; the job's own values and rates take their place."""
    reference = alone(tmp_path / "alone", folder, steps=MANY, own=True)
    result = run_job(
        nproc=2, steps=MANY, script="data_job.py", faults=ONE_KILL, folder=str(folder), patient_from=5, own=True
    )
    assert_same_end(result, reference)
    assert result.named("joined")
    assert {"replacement-values", "replacement-state"} <= warnings(result)
    shown = Counter(line for line in result.output.splitlines() if "[replacement-" in line)
    assert len(shown) == 3, "on standard error, without asking for it"
    assert any("gave its optimizer a state and other settings; lr of parameter group 0 is" in line for line in shown)
    assert set(shown.values()) == {1}


def test_a_dataset_that_is_not_repeatable_is_named(folder: Path, tmp_path: Path) -> None:
    result = alone(tmp_path / "alone", folder, unrepeatable=True)
    assert result.status == 0
    assert "[data-not-repeatable]" in result.output


@pytest.mark.soak
def test_going_on_with_other_data_has_to_be_asked_for(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    flags = [f"--es-checkpoint={saved}"]
    first = run_job(nproc=1, steps=4, script="data_job.py", flags=flags, folder=str(folder))
    assert first.status == 0, first.output
    for number in range(900, 910):
        (folder / f"{number}.txt").write_text("1")
    refused = run_job(nproc=1, steps=STEPS, script="data_job.py", flags=flags, folder=str(folder))
    assert refused.status == 1
    assert "samples was 40, and is 50 now" in refused.output
    assert "--es-resume-data=ignore" in refused.output
    went_on = run_job(
        nproc=1, steps=STEPS, script="data_job.py", flags=[*flags, "--es-resume-data=ignore"], folder=str(folder)
    )
    assert went_on.status == 0, went_on.output
    assert [line["step"] for line in went_on.named("committed")] == [4, 5, 6, 7]
    assert "[resume-data]" in went_on.output


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["workers", "stream"])
def test_a_loader_of_torchdata(kind: str, tmp_path: Path) -> None:
    """The library's own: a dataset with worker processes, and a stream that remembers where it is."""
    expected = state_alone("torchdata_job.py", tmp_path / "alone", kind=kind)
    kills = [*KILLS, {"rank": 1, "phase": "compute", "step": 20, "incarnation": 1}]
    result = run_job(nproc=2, script="torchdata_job.py", kind=kind, faults=kills)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == 3
    assert_same_state(result.state(), expected)
