"""Large values of a script in run.state and in registered objects: the bytes of a plain loop, with ranks lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.elastic.contract.stateful import REGISTERED_BYTES
from tests.jobs import assert_same_state, run_job, state_alone
from tests.jobs.hosts import lose_a_node

JOB = "large_state_job.py"
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2, "after": 1},
    {"rank": 1, "phase": "agree", "step": 4},
    {"rank": 2, "phase": "update", "step": 6},
    {"rank": 1, "phase": "commit", "step": 9, "incarnation": 1},
]


def alone(out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    return state_alone(JOB, out, environment, **config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain loop."""
    out = tmp_path_factory.mktemp("large-state") / "plain"
    found = alone(out, plain=True)
    assert found["values"]["queue"].nbytes > 4 * REGISTERED_BYTES
    return out


def losses(out: Path) -> dict[int, str]:
    """First sample of a micro-batch -> its loss, which is the same whenever and wherever it was computed."""
    found: dict[int, str] = {}
    for path in out.glob("losses-*.txt"):
        for line in path.read_text().splitlines():
            if len(parts := line.split()) == 2 and "p" in parts[1]:  # whole: its writer may have been killed
                assert found.setdefault(int(parts[0]), parts[1]) == parts[1], parts
    return found


def assert_same(out: Path, plain: Path, *, over_steps: bool = False) -> None:
    expected = torch.load(plain / "state-0.pt", weights_only=True)
    states = sorted(out.glob("state-*.pt"))
    assert states
    for path in states:
        found = torch.load(path, weights_only=True)
        assert_same_state(found, expected)
        assert all(torch.equal(found["values"][name], value) for name, value in expected["values"].items()), path
    assert not over_steps or not losses(out)
    assert over_steps or losses(out) == losses(plain)


def test_workers_die(plain: Path) -> None:
    job = run_job(nproc=3, script=JOB, faults=KILLS)
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == len(KILLS)
    assert_same(job.out, plain)


def test_workers_die_in_a_loop_over_steps(plain: Path) -> None:
    """There nothing but the agreement of a step has a keeper hold what the step's states refer to."""
    job = run_job(nproc=3, script=JOB, faults=KILLS[:3], over_steps=True, dies={"8": [0, 1, 2]})
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == 3
    assert_same(job.out, plain, over_steps=True)


def test_all_workers_die_between_a_commit_and_the_end_of_its_turn(plain: Path) -> None:
    """What the turn that ended the step has changed is known to the coordinator, and its bytes to the keeper alone."""
    job = run_job(nproc=2, script=JOB, turns=True, dies={"5": [0, 1]})
    assert job.status == 0, job.output
    assert len(job.named("worker_died")) == 2
    assert_same(job.out, plain)


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_a_node_is_lost_and_then_all_workers(plain: Path, every: int, tmp_path: Path) -> None:
    """The lost node is that of the lowest rank; the keepers of the others have all that new workers need."""
    fault, dies = {"rank": 0, "phase": "compute", "step": 5}, {"8": [0, 1, 2]}
    result = lose_a_node(JOB, fault, tmp_path, every=every, dies=dies)
    assert len(result.named("worker_died")) >= 2
    assert_same(result.out, plain)


def test_a_script_is_resumed(plain: Path, tmp_path: Path) -> None:
    alone(tmp_path / "resumed", {"EVERSTEP_CHECKPOINT": str(tmp_path / "saved")}, resumes=True)
    assert_same(tmp_path / "resumed", plain)


def test_a_job_is_resumed_by_another_number_of_workers(plain: Path, tmp_path: Path) -> None:
    saved = [f"--es-checkpoint={tmp_path}/saved"]
    stopped = run_job(nproc=2, script=JOB, flags=saved, stops=True)
    assert stopped.status == 0, stopped.output
    resumed = run_job(nproc=1, script=JOB, flags=saved)
    assert resumed.status == 0, resumed.output
    assert len(losses(resumed.out)) < len(losses(plain))
    (resumed.out / "losses-before.txt").write_text((stopped.out / "losses-0.txt").read_text())
    (resumed.out / "losses-before-1.txt").write_text((stopped.out / "losses-1.txt").read_text())
    assert_same(resumed.out, plain)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("differs", "run.state['queue'] differs in step 3: expected the same on all ranks, got tensor(dtype=float32"),
        ("unseen", "run.state['codebook'] was changed in step 3 or before in a way that torch does not count"),
        ("text", "register_state('run.state'): its state takes 4.0 MiB without its large tensors"),
    ],
)
def test_a_mistake_is_named(mistake: str, text: str) -> None:
    job = run_job(nproc=2, script=JOB, mistake=mistake)
    assert job.status == 1
    assert text in job.output, job.output
