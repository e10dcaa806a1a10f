"""A memory limit that is too low: the kernel kills processes, and the messages name the cause."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs import JOBS, finish, launch, wait_until
from tests.jobs.processes import each

LIMIT_MIB = 1000
ROOT = Path("/sys/fs/cgroup")
SCRIPT = """
import torch, everstep
class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return torch.full((1024,), i / 64), torch.full((1024,), i / 64)
@everstep.elastic(steps=30, global_batch_size=8, micro_batch_size=2)
def train(run):
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(16)])
    optimizer = torch.optim.AdamW(model.parameters())
    for step in run.steps(model, optimizer, Data(), loss_fn=torch.nn.functional.mse_loss):
        pass
train()
"""


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """A control group with this much memory, of the version that this machine has; its file of processes."""
    old = (ROOT / "memory" / "memory.limit_in_bytes").exists()
    group = (ROOT / "memory" if old else ROOT) / f"everstep-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit_bytes))
        if not old:
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        until_s = time.monotonic() + 20
        while (group / "cgroup.procs").read_text().strip() and time.monotonic() < until_s:
            time.sleep(0.05)  # what was killed is gone in a moment
        group.rmdir()


def test_workers_are_the_first_that_the_kernel_kills_and_keepers_the_next(tmp_path: Path) -> None:
    job = launch(
        JOBS / "gpt_job.py", [json.dumps({"out": str(tmp_path), "steps": 10_000, "stages": 1})], ["--nproc-per-node=2"]
    )
    try:
        launcher = psutil.Process(job.pid)
        wait_until(lambda: len(list(tmp_path.glob("worker-*.jsonl"))) == 2, 60, "two workers train")
        workers = {int(path.stem.split("-")[2]) for path in tmp_path.glob("worker-*.jsonl")}
        scores = dict(each(launcher.children(recursive=True), score))
        own = score(launcher)
    finally:
        job.terminate()
        finish(job)
    assert {process.pid for process in scores if scores[process] == own + 500} == workers
    assert len([process for process in scores if scores[process] == own + 250]) == 1, "the keeper"
    assert set(scores.values()) == {own, own + 250, own + 500}


def score(process: psutil.Process) -> int:
    """What is added, in thousandths of the memory, to its size when the kernel chooses which process to kill."""
    return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())


@pytest.mark.soak
def test_what_the_kernel_killed_is_said_to_be_so(tmp_path: Path) -> None:
    script = tmp_path / "large.py"
    script.write_text(SCRIPT)
    with limited(LIMIT_MIB << 20) as processes:
        inside = ["sh", "-c", f'echo $$ > {processes} && exec "$@"', "sh"]
        job = launch(script, [], ["--nproc-per-node=2", "--es-keeper-memory=800MiB"], inside=inside)
        output = finish(job)
    assert job.returncode == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("everstep: error: rank "), output
    assert "killed by SIGKILL by the kernel's OOM killer: control group" in last
    assert f"limited to {LIMIT_MIB:,} MiB" in last
    assert "ConnectionRefusedError" not in output
    assert "BrokenPipeError" not in output
