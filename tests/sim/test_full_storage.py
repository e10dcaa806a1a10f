"""Simulated jobs whose checkpoint storage is full for a while: training continues; only whole versions are saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.sim.cluster import Timing
from everstep.elastic.sim.faults import DiskFault, NodeFault
from everstep.elastic.sim.run import SHAPES, Outcome, simulate
from everstep.elastic.sim.storage import Full

FULL = [name for name, shape in SHAPES.items() if shape.disk_fills]
SEEDS = range(24)
LACKS = {Full.PART: "a part of", Full.MANIFEST: "the manifest of"}
CALM = Timing(slow=0.0, duplicates=0.0, startup_s=(0.02, 0.3))


def saved(outcome: Outcome) -> list[int]:
    return sorted({event.saved.version for _, event in outcome.events if isinstance(event, e.CheckpointSaved)})


@pytest.mark.parametrize("name", FULL)
def test_seeds(name: str) -> None:
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(bool(outcome.happenings["saves that failed"]) for outcome in outcomes) > len(SEEDS) // 4
    assert any(outcome.happenings["saves that failed"] and not outcome.lost for outcome in outcomes)
    assert any(outcome.lost for outcome in outcomes)
    assert all(outcome.broken for outcome in outcomes if outcome.why)


@pytest.mark.parametrize("where", Full)
def test_storage_that_stays_full(where: Full) -> None:
    """All steps are trained, in one generation; the job says that its last state is not saved."""
    shape = SHAPES["full checkpoint storage"]
    full = DiskFault(victims=0, at_s=0.0, full_s=1000.0, where=where)
    outcome, undisturbed = (simulate(5, shape, faults=faults, timing=CALM) for faults in ([full], []))
    assert not outcome.why
    assert saved(outcome) == []
    assert saved(undisturbed) == [2, 4, 6, 8, 10, 12]
    (lost,) = outcome.lost
    assert lost.startswith("the state after 12 steps is not saved (no space for ")
    assert not undisturbed.lost
    assert outcome.generations == undisturbed.generations
    assert {event.step for _, event in outcome.events if isinstance(event, e.WorkerCommitted)} == set(range(12))
    noted = [event for _, event in outcome.events if isinstance(event, e.WorkerNoted)]
    assert {event.fields["version"] for event in noted if event.what == "checkpoint_failed"} == {2, 4, 6, 8, 10, 12}


@pytest.mark.parametrize("where", Full)
def test_storage_that_has_room_again(where: Full) -> None:
    """The next save that is due succeeds; the versions between are not saved."""
    shape = SHAPES["full checkpoint storage"]
    full = DiskFault(victims=0, phase="commit", after=6, full_s=0.3, where=where)
    outcome = simulate(5, shape, faults=[full], timing=CALM)
    assert not outcome.why
    assert not outcome.lost
    versions = saved(outcome)
    assert versions[-1] == 12
    assert 0 < len(versions) < 6
    assert outcome.happenings["saves that failed"]


@pytest.mark.parametrize("where", Full)
def test_the_newest_whole_checkpoint_is_resumed_from(where: Full) -> None:
    """Storage fills up after some checkpoints, and then more is lost than is protected."""
    shape = SHAPES["full checkpoint storage, 3 nodes"]
    full = DiskFault(victims=0, phase="commit", after=20, full_s=1000.0, where=where)
    losses = NodeFault(victims=2, phase="commit", after=32, careful=False, back_s=0.05)
    outcome = simulate(1, shape, faults=[full, losses], timing=replace(CALM, forward_s=0.02))
    assert saved(outcome) == [3, 6]
    assert outcome.happenings["resumes from a checkpoint"] == 2, "at its beginning, and then"
    assert not outcome.why
    (lost,) = outcome.lost
    assert lost.startswith(f"the state after 14 steps is not saved (no space for {LACKS[where]} ")
    assert lost.endswith("; the newest checkpoint is of 6 steps")
