"""Large values of a script in run.state and in registered objects: the bytes of a plain loop, with ranks lost."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.elastic.contract.stateful import REGISTERED_BYTES
from tests.jobs import JOBS, assert_same_state, everstep, finish, read_result, run_job, state_alone
from tests.jobs.hosts import Hosts, lose_a_node

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


@pytest.mark.parametrize("config", [{}, {"turns": True}, {"over_steps": True}], ids=str)
def test_steps_are_computed_again(plain: Path, config: dict[str, Any], tmp_path: Path) -> None:
    """A node is lost before another version outlives nodes. Each repeated step reads what it read the first time."""
    result = lose_a_node(JOB, {"rank": 1, "phase": "compute", "step": 4}, tmp_path, every=50, **config)
    assert any("; version 0, " in event["summary"] for event in result.named("planned")), result.named("planned")
    assert [event["same"] for event in result.named("committed_again")] == [True] * 4
    assert_same(result.out, plain, over_steps="over_steps" in config)


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a job that was stopped after its fourth step, and `state-0.pt` beside it."""
    folder = tmp_path_factory.mktemp("saved")
    alone(folder / "out", {"EVERSTEP_CHECKPOINT": str(folder / "saved")}, stops=True)
    return folder / "saved"


@pytest.mark.parametrize("way", [["universal"], ["dcp", "universal"], ["dcp"]], ids="-".join)
def test_a_converted_checkpoint_is_resumed(saved: Path, plain: Path, way: list[str], tmp_path: Path) -> None:
    source = saved
    for number, to in enumerate(way):
        target = tmp_path / f"{number}-{to}"
        done = everstep("convert", str(source), str(target), "--to", to)
        assert done.status == 0, done.stderr
        source = target
    alone(tmp_path / "resumed", {"EVERSTEP_RESUME": str(source)})
    (tmp_path / "resumed" / "losses-before.txt").write_text((saved.parent / "out" / "losses-0.txt").read_text())
    assert_same(tmp_path / "resumed", plain)


@pytest.mark.parametrize("to", ["universal", "dcp"])
def test_a_checkpoint_is_converted_without_its_large_values(saved: Path, to: str, tmp_path: Path) -> None:
    """What refers to them goes with them, and begins on resume as at the start of a job; all the rest stays."""
    target = tmp_path / to
    done = everstep("convert", str(saved), str(target), "--to", to, "--drop", "registered/*")
    assert done.status == 0, done.stderr
    said = next(line for line in done.stderr.splitlines() if "its large tensors were left out" in line)
    assert "run.state['codebook']" in said, done.stderr
    assert "the state registered as 'bank'" in said, done.stderr
    found = alone(tmp_path / "resumed", {"EVERSTEP_RESUME": str(target)})
    kept = alone(tmp_path / "again", {"EVERSTEP_RESUME": str(saved)})
    assert torch.equal(found["values"]["codebook"], kept["values"]["codebook"]), "set in front of the loop"
    steps = found["values"]["steps"]
    assert [int(step) for step in steps[steps >= 0]] == [5, 8, 11], "the turn of the third step was before"


def on_hosts(hosts: Hosts, out: Path, chosen: Sequence[int], *flags: str, faults: Any = (), **config: Any) -> None:
    """Start the job on some hosts, one worker each."""
    arguments, environment = [json.dumps({"out": str(out), **config})], {"EVERSTEP_FAULTS": json.dumps(list(faults))}
    flags = (f"--log-dir={out.parent}/logs", "--nproc-per-node=1", *flags)
    for host in chosen:
        hosts.launch(host, JOBS / JOB, arguments, flags, environment)


def ended(hosts: Hosts) -> tuple[list[int], list[str]]:
    """The statuses of all launchers, sorted, and what they wrote."""
    outputs = [finish(launcher) for launcher in hosts.launchers.values()]
    return sorted(launcher.returncode or 0 for launcher in hosts.launchers.values()), outputs


def test_a_node_with_an_empty_keeper_joins(plain: Path, tmp_path: Path) -> None:
    """Its worker reads large values before its keeper has any."""
    out, deadline_s = tmp_path / "out", time.monotonic() + 60
    out.mkdir()
    fault = {"rank": 1, "phase": "compute", "step": 4, "kind": "node"}
    with Hosts(4) as hosts:
        hosts.coordinator("3", f"--es-events={out}/events.jsonl")
        on_hosts(hosts, out, (0, 1, 2), "--nnodes=3", faults=[fault], joins=8)
        while '"event": "node_lost"' not in (out / "events.jsonl").read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        on_hosts(hosts, out, (3,), "--nnodes=3", joins=8)
        statuses, outputs = ended(hosts)
        assert statuses == [-signal.SIGKILL, 0, 0, 0], outputs
    assert (out / "state-1.pt").exists(), "the rank of the node that joined"
    assert_same(out, plain)


@pytest.mark.soak
def test_a_rank_that_joined_goes_back(plain: Path, tmp_path: Path) -> None:
    """Another node is lost as soon as it has joined: it repeats steps that were computed before its script began.

    Unless the version at which it joined outlives that node already: so this is tried several times.
    """
    back = [_lose_a_node_beside_one_that_joins(plain, tmp_path / str(attempt)) for attempt in range(6)]
    assert any(back), "each time the version at which it joined had outlived the node"


def _lose_a_node_beside_one_that_joins(plain: Path, out: Path) -> bool:
    """Whether the rank that joined goes back behind the version at which it did."""
    out.mkdir()
    deadline_s = time.monotonic() + 90
    faults = [{"rank": 1, "phase": "compute", "step": 3, "kind": "node"}]
    faults += [{"rank": 2, "phase": "compute", "step": 8, "kind": "node"}]
    flags, config = ["--nnodes=3", "--es-snapshot-every=50"], {"turns": True, "joins": 6}
    with Hosts(4) as hosts:
        hosts.coordinator("3", f"--es-events={out}/events.jsonl")
        on_hosts(hosts, out, (0, 1, 2), *flags, faults=faults, **config)
        while '"event": "committed", "step": 6' not in (out / "events.jsonl").read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        on_hosts(hosts, out, (3,), *flags, **config)
        statuses, outputs = ended(hosts)
        assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0, 0], outputs
    result = read_result(out, 0, "\n".join(outputs))
    assert all(event["same"] for event in result.named("committed_again"))
    assert (out / "state-1.pt").exists(), "the rank that joined"
    assert_same(out, plain)
    fresh = "fresh [0, 1]" in result.named("planned")[-1]["summary"]
    lost = bool(result.named("recovered")[-1]["lost_steps"] > 0)
    return fresh and lost


def test_more_is_lost_than_is_protected(plain: Path, tmp_path: Path) -> None:
    """The rank that is left goes back to a checkpoint, to the large values of that time."""
    out, faults = tmp_path / "out", [{"rank": rank, "phase": "compute", "step": 7, "kind": "node"} for rank in (1, 2)]
    out.mkdir()
    saves = [f"--es-checkpoint={tmp_path}/saved", "--es-checkpoint-every=4", "--es-on-loss=checkpoint", "--nnodes=1:3"]
    with Hosts(3) as hosts:
        hosts.coordinator("1:3", f"--es-events={out}/events.jsonl")
        on_hosts(hosts, out, (0, 1, 2), *saves, faults=faults, saved=f"{tmp_path}/saved")
        statuses, outputs = ended(hosts)
        assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0], outputs
    summaries = [event["summary"] for event in read_result(out, 0, "").named("planned")]
    assert any("; version 4, " in summary for summary in summaries), summaries
    assert_same(out, plain)


@pytest.mark.soak
@pytest.mark.parametrize("over_steps", [False, True])
def test_a_checkpoint_is_older_than_what_keepers_hold(over_steps: bool, tmp_path: Path) -> None:
    """The values that the repeated steps read are gone: the job ends with an error, and with equal bytes later."""
    out, faults = tmp_path / "out", [{"rank": rank, "phase": "compute", "step": 11, "kind": "node"} for rank in (1, 2)]
    out.mkdir()
    saves = [f"--es-checkpoint={tmp_path}/saved", "--es-checkpoint-every=6", "--es-on-loss=checkpoint", "--nnodes=1:3"]
    saves, config = (
        [*saves, "--es-snapshot-every=1"],
        {"saved": f"{tmp_path}/saved", "saves": 8, "over_steps": over_steps},
    )
    with Hosts(3) as hosts:
        hosts.coordinator("1:3", f"--es-events={out}/events.jsonl")
        on_hosts(hosts, out, (0, 1, 2), *saves, faults=faults, **config)
        statuses, outputs = ended(hosts)
        assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 1], outputs
    assert "are in no snapshot keeper any more: more nodes were lost at once" in "".join(outputs), outputs
    assert "start it again from its last checkpoint" in "".join(outputs), outputs


def test_a_job_is_resumed_on_another_number_of_nodes(plain: Path, tmp_path: Path) -> None:
    for nodes, stops in ((3, True), (2, False)):
        out = tmp_path / f"{nodes}-nodes"
        out.mkdir()
        with Hosts(nodes) as hosts:
            hosts.coordinator(str(nodes), f"--es-events={out}/events.jsonl")
            flags = [f"--nnodes={nodes}", f"--es-checkpoint={tmp_path}/saved"]
            on_hosts(hosts, out, hosts.hosts, *flags, stops=stops)
            statuses, outputs = ended(hosts)
            assert statuses == [0] * nodes, outputs
    for path in (tmp_path / "3-nodes").glob("losses-*.txt"):
        (out / f"{path.stem}-before.txt").write_text(path.read_text())
    assert_same(out, plain)


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
