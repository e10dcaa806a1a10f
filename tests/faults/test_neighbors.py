"""on_loss="neighbors": lost layers are approximated from the layers beside them. Lossy, and reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs.hosts import HostJob, Hosts

STEPS = 40


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [
        (1, "float32"),
        pytest.param(1, "bfloat16", marks=pytest.mark.soak),
        pytest.param(0, "float32", marks=pytest.mark.soak),
    ],
)
def test_a_lost_stage_without_protection(rank: int, dtype: str, tmp_path: Path) -> None:
    """The middle stage has similar layers on both sides; the first one has the embedding, which no layer resembles."""
    faults = [{"rank": rank, "phase": "compute", "step": 20, "kind": "node"}]
    flags = ["--es-protection=none", "--es-on-loss=neighbors", f"--log-dir={tmp_path}/logs"]
    with Hosts(3) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="3:3", steps=STEPS, stages=3, dtype=dtype)
        job.launch(0, 1, 2, flags=flags, faults=faults)
        outputs = [launcher.communicate(timeout=90)[0] for launcher in hosts.launchers.values()]
    (ended,) = job.events("ended")
    if rank == 0:
        assert not ended["succeeded"]
        assert "on_loss='neighbors' could not replace them" in ended["why"]
        assert sum("everstep: error: " in output for output in outputs) == 2
        return
    assert ended["succeeded"], ended
    (made_up,) = job.events("substituted")
    assert made_up["shards"]
    losses = [event["loss"] for event in job.events("committed")]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0], "it still learns"
    state = torch.load(next(tmp_path.glob("state-*.pt")), weights_only=True)
    assert ("masters" in state) == (dtype == "bfloat16")
    for name, master in state.get("masters", {}).items():
        assert torch.equal(master.bfloat16(), state["model"][name]), "what is made up is a master, too"


def _approximated(folder: Path, faults: list[dict[str, object]]) -> dict[str, Any]:
    """Two of four nodes are lost where one is protected: the job goes back to version 4, and approximates two layers.

    Returns what rank 3 has at the end.
    """
    folder.mkdir()
    pause = {"rank": 0, "phase": "compute", "step": 6, "kind": "pause", "seconds": 5.0}
    flags = ["--es-snapshot-every=4", "--es-on-loss=neighbors", "--es-hang-timeout=60", f"--log-dir={folder}/logs"]
    with Hosts(4) as hosts:
        job = HostJob(hosts, folder, nnodes="4:4", steps=12, stages=4)
        job.launch(0, 1, 2, 3, flags=flags, faults=[pause, *faults])
        job.reaches(5)
        joined = [event["host"] for event in job.events("node_joined")]  # in the order of ranks
        hosts.kill(*(host for host in hosts.hosts if hosts.address(host) in joined[1:3]))
        for launcher in hosts.launchers.values():
            launcher.communicate(timeout=90)
    (ended,) = job.events("ended")
    assert ended["succeeded"], ended
    assert {event["version"] for event in job.events("substituted")} == {4}
    died = [event for event in job.events("worker_died") if event["rank"] == 0]
    assert [event["step"] for event in died] == [4] * len(faults)
    state: dict[str, Any] = torch.load(folder / "state-3.pt", weights_only=True)["model"]
    return state


@pytest.mark.soak
def test_a_worker_dies_before_the_next_version(tmp_path: Path) -> None:
    """Its keeper holds version 5 of the former line. It is not used: the loss of a worker changes no byte."""
    undisturbed = _approximated(tmp_path / "undisturbed", [])
    fault = {"rank": 0, "phase": "update", "step": 4, "after": 2}  # it runs step 4 for the second time
    state = _approximated(tmp_path / "killed", [fault])
    assert state.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in state.items())
