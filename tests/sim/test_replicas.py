"""Simulated jobs with replicas: backups that replay the gradients, and replicas that differ since a bit has flipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.sim.cluster import Timing
from everstep.elastic.sim.faults import Fault, Flip, NodeFault
from everstep.elastic.sim.run import SHAPES, Outcome, SimulationFailed, simulate

REPLAY = [
    name for name, shape in SHAPES.items() if shape.protection == "replay" and not (shape.flips or shape.rebalance_s)
]
DIFFERING = [name for name, shape in SHAPES.items() if shape.flips]
SEEDS = range(24)
CALM = Timing(slow=0.0, duplicates=0.0)


def found(outcome: Outcome) -> list[e.CorruptionFound]:
    return [event for _, event in outcome.events if isinstance(event, e.CorruptionFound)]


@pytest.mark.parametrize("name", REPLAY)
def test_nodes_are_lost_in_replay(name: str) -> None:
    """Within the promise, no lost node takes a version along."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(outcome.nodes_lost for outcome in outcomes) > len(SEEDS) // 2
    if not SHAPES[name].drains:  # else those that would continue may be lost
        assert all(outcome.broken for outcome in outcomes if outcome.why)
    kept = [outcome for outcome in outcomes if not outcome.broken]
    assert len(kept) > len(SEEDS) // 2
    assert not any("committed_again" in line for outcome in kept for line in outcome.log)


@pytest.mark.parametrize("phase", ["compute", "reduce", "agree", "update", "commit", "recover", "restore"])
def test_a_node_is_lost_in_any_phase_of_replay(phase: str) -> None:
    lost = [NodeFault(victims=2, phase=phase, after=after, detected_s=0.02) for after in (3, 9)]
    for fault in lost:
        outcome = simulate(1, SHAPES["4 nodes, replay"], faults=[Fault(victims=1, at_s=0.6), fault])
        assert not outcome.why


@pytest.mark.parametrize("name", DIFFERING)
def test_bits_flip(name: str) -> None:
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    flipped = [outcome for outcome in outcomes if outcome.happenings["bits flipped"]]
    assert len(flipped) > len(SEEDS) // 2
    assert sum(bool(found(outcome)) for outcome in flipped) > len(flipped) // 2


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("differing, replay", 45),  # a rank came to own the shard that it had computed with a damaged replica of
        ("differing, replay", 5012),  # a dead worker left the gradient of an attempt that was given up
        ("4 nodes, replay, leaving", 5040),  # only one node had members, so that no node might be lost
    ],
)
def test_seeds_that_failed(name: str, seed: int) -> None:
    simulate(seed, SHAPES[name])


@pytest.mark.parametrize("kind", ["owned", "read", "backup"])
def test_the_odd_replica_is_named_and_repaired(kind: str) -> None:
    """Without a comparison the same flip ends in other bytes."""
    shape = replace(SHAPES["differing, replay"], flips=("owned",))
    flip = Flip(victims=1, phase="compute", after=14, kind=kind)
    outcome = simulate(5, shape, faults=[flip], timing=CALM)
    (named,) = {event.rank for event in found(outcome)}
    assert {event.where for event in found(outcome)} == {"backup" if kind == "backup" else "replica"}
    assert outcome.generations == 2
    assert outcome.happenings["bits flipped"] == 1
    assert 0 <= named < shape.workers
    if kind != "backup":  # a backup counts only once its owner is lost
        with pytest.raises(SimulationFailed, match="other bytes"):
            simulate(5, replace(shape, flips=()), faults=[flip], timing=CALM)


def test_a_flip_is_found_again_after_a_death_in_the_midst_of_naming_it() -> None:
    """A rank dies while replicas are compared: those that are wrong still are, and are found in the next generation."""
    for after in range(20, 32):
        flip = Flip(victims=1, phase="compute", after=16, kind="owned")
        simulate(2, SHAPES["differing"], faults=[flip, Fault(victims=1, phase="agree", after=after)], timing=CALM)
