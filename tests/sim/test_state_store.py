"""Simulated jobs whose coordinator cannot write for a while: nothing is done that is not written."""

from __future__ import annotations

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.sim.cluster import Timing
from everstep.elastic.sim.faults import PHASES, Fault, StoreFault
from everstep.elastic.sim.run import SHAPES, simulate

FULL = [name for name, shape in SHAPES.items() if shape.store_fails]
SEEDS = range(24)
CALM = Timing(slow=0.0, duplicates=0.0)


@pytest.mark.parametrize("name", FULL)
def test_seeds(name: str) -> None:
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(outcome.happenings["times the store was away"] for outcome in outcomes) > len(SEEDS) // 2
    assert any(outcome.happenings["takeovers while the store was away"] for outcome in outcomes)
    assert all(outcome.broken for outcome in outcomes if outcome.why)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("replaced", "written"), [(False, False), (True, False), (True, True)])
def test_the_store_is_away_in_any_phase(phase: str, replaced: bool, written: bool) -> None:
    away = StoreFault(victims=0, phase=phase, after=1, away_s=0.5, replaced=replaced, written=written)
    outcome = simulate(3, SHAPES["full disk"], faults=[Fault(victims=1, phase="compute", after=9), away], timing=CALM)
    assert not outcome.why


def test_nothing_is_decided_while_the_store_is_away() -> None:
    """A worker dies then: its generation ends when the store is back, not before."""
    away = StoreFault(victims=0, at_s=0.9, away_s=2.0)
    outcome = simulate(
        3, SHAPES["full disk"], faults=[Fault(victims=1, at_s=1.0), away], timing=Timing(forward_s=0.1, slow=0.0)
    )
    died = min(at_s for at_s, event in outcome.events if isinstance(event, e.WorkerDied))
    told = [float(line.split()[0]) for line in outcome.log if "AbortGeneration" in line]
    assert died < 1.5
    assert min(told) >= 2.9
