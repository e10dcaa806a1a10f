"""The simulator runs the product's agents: fenced by order or by themselves, rejoining, early to notice deaths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from everstep.elastic.protocol import agent
from everstep.elastic.sim.cluster import Timing
from everstep.elastic.sim.faults import Fault, NodeFault
from everstep.elastic.sim.run import SHAPES, simulate

SHAPE = replace(SHAPES["3 nodes"], steps=500)  # long enough to rejoin
QUICK = Timing(slow=0.0, duplicates=0.0, forward_s=0.0005)
SEEDS = range(2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """The events of agents: (phase, event), and how often they entered each phase."""
    counted: Counter[tuple[str, str]] = Counter()
    real = agent.step

    def step(state: agent.AgentState, event: agent.Event, now: float) -> agent.Result:
        after, instructions = real(state, event, now)
        counted[state.phase.value, type(event).__name__] += 1
        if after.phase is not state.phase:
            counted["to", after.phase.value] += 1
        return after, instructions

    monkeypatch.setattr(agent, "step", step)
    return counted


def test_a_node_that_was_silent_for_too_long_is_fenced_and_comes_back(seen: Counter[tuple[str, str]]) -> None:
    for seed in SEEDS:
        simulate(seed, SHAPE, faults=[NodeFault(victims=1, at_s=0.5, silent_s=3.0)], timing=QUICK)
    assert seen["serving", "FenceOrdered"]
    assert seen["rejoining", "Welcomed"]
    assert seen["to", "ended"] == 3 * len(SEEDS), "every agent came to its end"


def test_a_node_that_is_cut_off_from_all_fences_itself(seen: Counter[tuple[str, str]]) -> None:
    for seed in SEEDS:
        simulate(seed, SHAPE, faults=[NodeFault(victims=1, at_s=0.5, silent_s=9.0, alone=True)], timing=QUICK)
    assert seen["to", "fenced"] > seen["serving", "FenceOrdered"]


def test_deaths_are_seen_early_and_replacements_wait_for_their_end(seen: Counter[tuple[str, str]]) -> None:
    for seed in range(8):
        simulate(
            seed, SHAPES["1x4"], faults=[Fault(victims=2, phase="compute", after=9), Fault(victims=1, phase="join")]
        )
    assert seen["serving", "MainThreadFailed"]
