"""A seed under which a simulated job fails is shrunk to the fewest faults under which it still does."""

from __future__ import annotations

import pytest

from everstep.elastic.sim import run as module
from everstep.elastic.sim.run import SHAPES, SimulationFailed, circumstances, simulate

SEED = 0  # has several faults


def test_the_fewest_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several faults, one is guilty: the message has it alone, and the transcript of a job with it alone."""
    shape = SHAPES["2x2"]
    drawn = circumstances(SEED, shape)
    assert len(drawn.faults) > 2
    guilty = drawn.faults[1]
    tried = []

    def run(seed: int, shape: module.Shape, around: module.Circumstances) -> None:
        tried.append(around)
        if guilty in around.faults:
            raise SimulationFailed(f"fails with {len(around.faults)} faults")

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(SimulationFailed) as failure:
        simulate(SEED, shape)
    assert str(failure.value).startswith("fails with 1 faults\n")
    assert str(guilty) in str(failure.value)
    assert all(str(other) not in str(failure.value) for other in drawn.faults if other != guilty)
    assert len(tried) <= 1 + len(drawn.faults) * (len(drawn.faults) + 1) // 2 + 1


def test_what_makes_messages_late_is_left_out_where_it_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int, shape: module.Shape, around: module.Circumstances) -> None:
        raise SimulationFailed("fails whatever there is")

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(SimulationFailed, match=r"slow=0.0, duplicates=0.0.*faults=\(\)"):
        simulate(SEED, SHAPES["2x2"])
