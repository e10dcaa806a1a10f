"""Simulated jobs that lose nodes: the undisturbed run's bytes, or, where too much was lost, an end that says so."""

from __future__ import annotations

import itertools

import pytest
import torch

from everstep.checkpointing.access.snapshot import Snapshots
from everstep.elastic.sim.faults import NODE_PHASES, Fault, NodeFault
from everstep.elastic.sim.run import SHAPES, Outcome, simulate

SHAPES_WITH_NODES = [
    name
    for name, shape in SHAPES.items()
    if shape.loses_nodes and shape.protection == "parity" and not (shape.drains or shape.reckless or shape.rebalance_s)
]
LONG = ("6 nodes", "4 nodes, seldom", "3 nodes, seldom")
QUICK_FIRST = [pytest.param(name, marks=pytest.mark.soak) if name in LONG else name for name in SHAPES_WITH_NODES]
RECKLESS = [name for name, shape in SHAPES.items() if shape.reckless and shape.saves and not shape.rebalance_s]
SEEDS = range(24)


def _gone_back(outcome: Outcome) -> bool:
    return any("committed_again" in line for line in outcome.log)


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_seeds(name: str) -> None:
    """Random faults. `simulate` raises where a job ends early although no more was lost than it must survive."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(outcome.nodes_lost for outcome in outcomes) > len(SEEDS)
    assert sum(map(_gone_back, outcomes)) >= 3, "hardly anything was computed again"
    early = [outcome for outcome in outcomes if outcome.why]
    assert all(outcome.broken for outcome in early)
    assert len(early) <= len(SEEDS) // 5


@pytest.mark.parametrize("name", RECKLESS)
def test_more_is_lost_than_the_promise_allows_and_checkpoints_are_saved(name: str) -> None:
    """The job goes back to a checkpoint, an older one where the newest is damaged, and ends with the same bytes."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    saved = [outcome for outcome in outcomes if any("checkpoint_saved" in line for line in outcome.log)]
    assert len(saved) > len(SEEDS) // 2
    assert any(_gone_back(outcome) for outcome in outcomes)
    went_on = [outcome for outcome in outcomes if outcome.broken and not outcome.why]
    assert len(went_on) >= 3, "hardly any job outlived the loss of too many nodes"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("3 nodes", 5),  # a node is lost while a join is offered: keepers speak of the generation before
        ("4 nodes", 7),  # a rollback to version 0 is interrupted: values are no longer those of the seed
        ("4 nodes", 9),  # a worker dies after the recovery from a lost node, before the next commit is reported
        ("4 nodes, seldom", 9),  # those who had still to finish are lost
        ("4 nodes, seldom", 20),  # a survivor missed the agreement that says what is protected
        ("5 nodes", 25),  # a version that is made again took two slots
        ("3 nodes, seldom", 210),  # a version that was whole everywhere was forgotten by a join
        ("4 nodes", 697),  # the same, by the keepers
        ("4 nodes", 1528),  # a keeper's word for a version whose slots had been used again
        ("3 nodes", 119),  # a version is whole when it is at every node, not at one
        ("5 nodes", 95),  # the same
        ("3 nodes", 69),  # the node is lost whose replacement the end waited for
        ("5 nodes", 612),  # one finishes while another that had finished makes the last step again
    ],
)
def test_seeds_that_fail_when_a_guard_is_missing(name: str, seed: int) -> None:
    """Each once failed, for want of what its comment names."""
    simulate(seed, SHAPES[name])


@pytest.mark.parametrize("phase", NODE_PHASES)
@pytest.mark.parametrize("name", ["3 nodes", "3 nodes, seldom", "4 nodes"])
def test_as_many_nodes_as_promised_in_every_phase(name: str, phase: str) -> None:
    """All at once, at the first opportunity and later; a worker's death starts a recovery to strike in."""
    shape = SHAPES[name]
    death = Fault(victims=1, phase="reduce", after=9)
    for after, spread_s in itertools.product((0, 5), (0.0, 0.05)):
        loss = NodeFault(victims=shape.losses, phase=phase, after=after, spread_s=spread_s, back_s=0.5)
        outcome = simulate(after, shape, faults=[loss, death] if phase in ("recover", "restore", "join") else [loss])
        assert not outcome.why


@pytest.mark.parametrize("name", ["3 nodes", "4 nodes, seldom", "6 nodes"])
def test_again_and_again(name: str) -> None:
    """Losses follow each other as fast as the promise allows; nodes come in place of those that are lost."""
    shape = SHAPES[name]
    for seed in range(4):
        losses = [
            NodeFault(victims=shape.losses, phase="commit", after=3 * i, detected_s=0.002 * i, back_s=0.1)
            for i in range(1, 6)
        ]
        outcome = simulate(seed, shape, faults=list(losses))
        assert outcome.nodes_lost > shape.losses
        assert not outcome.why


@pytest.mark.parametrize("alone", [False, True], ids=["from the coordinator", "from everybody"])
def test_a_silent_node(alone: bool) -> None:
    """It is declared lost while its workers continue; nothing that it sends or does afterwards counts."""
    for name, seed in itertools.product(("3 nodes", "4 nodes", "5 nodes"), range(4)):
        fault = NodeFault(victims=1, phase="commit", after=1 + 2 * seed, silent_s=8.0, alone=alone, back_s=0.1)
        outcome = simulate(seed, SHAPES[name], faults=[fault])
        assert not outcome.why
        assert any("Ticked -> (node_lost)" in line for line in outcome.log)


def test_a_short_silence_costs_nothing() -> None:
    for seed in range(4):
        fault = NodeFault(victims=1, phase="commit", after=3, silent_s=0.3, alone=True)
        outcome = simulate(seed, SHAPES["3 nodes"], faults=[fault])
        assert outcome.generations == 1


def test_more_nodes_than_promised() -> None:
    """The job ends with its reason, or continues with the right bytes if nothing that only they held was needed."""
    ended = 0
    for name, seed in itertools.product(("3 nodes", "4 nodes", "6 nodes"), range(8)):
        shape = SHAPES[name]
        fault = NodeFault(victims=shape.losses + 1, phase="update", after=3 + seed, careful=False)
        outcome = simulate(seed, shape, faults=[fault])
        ended += bool(outcome.why)
        assert outcome.broken
    assert ended >= 12


def test_a_seed_replays() -> None:
    first, second = (simulate(3, SHAPES["4 nodes"]) for _ in range(2))
    assert first.log == second.log


def test_a_moved_shard_is_kept_until_its_new_owner_has_it_on_other_nodes() -> None:
    """The real snapshots: the simulator's seeds have not found a loss that needs this."""
    snapshots = Snapshots(None, states=3)
    snapshots.protect([(0, 64, 64)])
    snapshots.leave([0], version=5)
    for protected in (-1, 4):
        snapshots.protected = protected
        snapshots.forget(nodes=True)
        assert snapshots.gradient(0, 4, 8, torch.float32).numel() == 8
    snapshots.protected = 5
    snapshots.forget(nodes=True)
    with pytest.raises(KeyError):
        snapshots.gradient(0, 4, 8, torch.float32)
