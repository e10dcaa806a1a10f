"""More nodes are lost than are protected: the job resumes from its newest checkpoint, and ends with the same state."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.checkpointing.universal.reader import open_checkpoint
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts


@pytest.mark.soak
def test_more_is_lost_than_was_protected_but_there_is_a_checkpoint(tmp_path: Path) -> None:
    folder, lost = tmp_path / "checkpoints", (1, 2)
    flags = [f"--es-checkpoint={folder}", "--es-checkpoint-every=5"]
    with Hosts(3) as hosts:
        job = Cluster(hosts, tmp_path, steps=60, stages=2, flags=flags)
        job.start()
        with job.slowly():
            job.until(lambda: job.events("checkpoint_saved"), 60, "a checkpoint is saved")
            job.advance(2)
            hosts.kill(*lost)
            saved = job.events("checkpoint_saved")[-1]["version"]
            job.until(lambda: job.events("planned"), 60, "the others continue")
        job.see_to_the_end(120)
        result = job.check()
    plans = [event["summary"] for event in result.named("planned")]
    assert any(f"; version {saved}, " in plan for plan in plans), plans
    again = [event["step"] for event in result.named("committed_again")]
    assert again, "steps since the checkpoint are computed again"
    print(f"lost {lost}, back to {saved}, {len(again)} steps computed again, all the same")
    assert open_checkpoint(str(folder)).manifest.step == 60
