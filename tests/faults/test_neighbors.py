"""on_loss="neighbors": what is gone for good is made up from the layers beside it. Lossy, and said to be."""

from __future__ import annotations

import math
from pathlib import Path

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
    """The middle stage has layers of its kind on both sides; the first one has the embedding, which nothing is like."""
    faults = [{"rank": rank, "phase": "compute", "step": 20, "kind": "node"}]
    flags = ["--es-protection=none", "--es-on-loss=neighbors", f"--log-dir={tmp_path}/logs"]
    with Hosts(3) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="3:3", steps=STEPS, stages=3, dtype=dtype)
        job.launch(0, 1, 2, flags=flags, faults=faults)
        outputs = [launcher.communicate(timeout=90)[0] for launcher in hosts.launchers.values()]
    (ended,) = job.events("ended")
    if rank == 0:
        assert not ended["succeeded"]
        assert "on_loss='neighbors' could not stand in for them" in ended["why"]
        assert sum("everstep: error: " in output for output in outputs) == 2
        return
    assert ended["succeeded"], ended
    (made_up,) = job.events("substituted")
    assert made_up["shards"]
    losses = [event["loss"] for event in job.events("committed")]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0], "it goes on learning"
    state = torch.load(next(tmp_path.glob("state-*.pt")), weights_only=True)
    assert ("masters" in state) == (dtype == "bfloat16")
    for name, master in state.get("masters", {}).items():
        assert torch.equal(master.bfloat16(), state["model"][name]), "what is made up is a master, too"
