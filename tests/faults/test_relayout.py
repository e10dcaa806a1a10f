"""`everstep relayout`: a running job goes to another number of pipeline stages and back, in the same processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.agents.tools.orders import order
from everstep.agents.tools.status import status
from tests.jobs import JOBS, Result, assert_same_run, finish, launch, read_result, reference, slowly, wait_until
from tests.jobs.ports import free_ports

STEPS = 40
FEW = 12


class Job:
    """Workers on one node, and an operator."""

    def __init__(self, out: Path, workers: int, stages: int, steps: int) -> None:
        self.out = out
        (port,) = free_ports(1)
        self.endpoint = f"127.0.0.1:{port}"
        flags = [
            *(f"--nproc-per-node={workers}", f"--rdzv-endpoint={self.endpoint}", "--es-rebalance-after=0"),
            *(f"--es-events={out}/events.jsonl", f"--log-dir={out}/logs"),
        ]
        arguments = [json.dumps({"out": str(out), "steps": steps, "stages": stages, "model": True})]
        self.launcher = launch(JOBS / "gpt_job.py", arguments, flags, forked=True)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == name]

    def until(self, condition: Any, what: str) -> None:
        wait_until(lambda: condition() or self.events("ended"), 60, what)
        assert not self.events("ended"), (what, self.events("ended"))

    def trains(self, more: int = 2) -> None:
        """Until so many more steps are committed."""
        goal = len(self.events("committed")) + more
        self.until(lambda: len(self.events("committed")) >= goal, f"{goal} steps")

    def order(self, stages: int) -> int:
        return order("relayout", [self.endpoint, "--stages", str(stages)])

    def goes_to(self, stages: int) -> None:
        """Order it, as soon as nothing else is under way, and wait until a step is committed in that layout."""
        self.until(lambda: self.order(stages) == 0, f"the order to go to {stages} stages is taken")
        self.until(lambda: self.stages() == stages, f"a step in {stages} stages")

    def stages(self) -> int:
        """Of the newest committed step."""
        return len(re.findall("ranks", str(self.events("committed")[-1]["layout"])))

    def pids(self) -> dict[int, set[int]]:
        """The processes of each rank."""
        found: dict[int, set[int]] = {}
        for path in self.out.glob("worker-*.jsonl"):
            rank, pid = map(int, path.stem.split("-")[1:])
            found.setdefault(rank, set()).add(pid)
        return found

    def result(self) -> Result:
        output = finish(self.launcher, 60)
        return read_result(self.out, self.launcher.returncode, output)


@contextlib.contextmanager
def running(out: Path, *, workers: int, stages: int, steps: int) -> Iterator[Job]:
    job = Job(out, workers, stages, steps)
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.launcher.pid, signal.SIGKILL)
        job.launcher.wait()


def test_from_one_stage_to_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same processes, with nothing aborted; what is asked in vain is refused in one line."""
    with running(tmp_path, workers=2, stages=1, steps=FEW) as job:
        with slowly(tmp_path):
            job.until(lambda: job.events("committed"), "training begins")
            assert job.order(3) == 2
            assert "3 stages need at least as many workers; there are 2" in capsys.readouterr().err
            job.goes_to(2)
            assert "the job goes to 2 stage(s) at a step boundary" in capsys.readouterr().out
            assert status([job.endpoint]) == 0
            assert "2 ranks in 2 stages" in capsys.readouterr().out
        result = job.result()
    assert_same_run(result, reference(FEW))
    for rank in (0, 1):
        model = torch.load(tmp_path / f"model-{rank}.pt", weights_only=True)
        whole = result.state(rank)["model"]
        assert all(torch.equal(model[name], tensor) for name, tensor in whole.items()), "layers of other stages lack"
    assert len(result.named("relayout_prepared")) == len(result.named("rebalanced")) == 1
    assert not result.named("recovered")
    assert [len(pids) for pids in job.pids().values()] == [1, 1]


@pytest.mark.soak
def test_there_and_back_with_a_death_in_a_switch(tmp_path: Path) -> None:
    """2 stages -> 1 -> 4 -> 2 on four ranks; one dies while layers move, and the order stands."""
    with running(tmp_path, workers=4, stages=2, steps=STEPS) as job:
        with slowly(tmp_path):
            job.until(lambda: job.events("committed"), "training begins")
            job.goes_to(1)
            job.until(lambda: job.order(4) == 0, "the order is taken")
            job.until(lambda: len(job.events("relayout_prepared")) == 2, "a layout of 4 stages is ready")
            os.kill(max(job.pids()[3]), signal.SIGKILL)
            job.until(lambda: job.events("recovered"), "the others continue")
            job.until(lambda: job.stages() == 4 and job.events("joined"), "4 stages")
            job.trains(1)
            job.goes_to(2)
        result = job.result()
    assert_same_run(result, reference(STEPS))
    assert len(result.named("worker_died")) == 1
    assert sorted(len(pids) for pids in job.pids().values()) == [1, 1, 1, 2]
