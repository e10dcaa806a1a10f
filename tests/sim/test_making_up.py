"""Simulated jobs whose lost shards are made up from their neighbours, which the user has allowed."""

from __future__ import annotations

import pytest

from everstep.elastic.sim.run import SHAPES, simulate

MADE_UP = [name for name, shape in SHAPES.items() if shape.on_loss == "neighbors"]
SEEDS = range(24)


@pytest.mark.parametrize("name", MADE_UP)
def test_more_is_lost_than_the_promise_allows(name: str) -> None:
    """All continue from the same values, and end with the bytes of a run that continues from them undisturbed."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    made_up = [outcome for outcome in outcomes if outcome.happenings["shards made up"]]
    assert len(made_up) >= 2
    assert all(outcome.broken for outcome in made_up)
    assert any(not outcome.why for outcome in made_up), "none came to its end"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("made up", 3),  # a survivor computed on with its replica of a shard that another rank had made up
        ("made up", 2),  # a replacement has version 0 from the seed, where others have made it up
        ("made up, seldom", 2),  # the same
        ("made up", 3019),  # a rank took a newer version of the run as it was before, out of a keeper
        ("made up", 118),  # a rank that joined had version 0 from the seed, of which a shard had been made up
    ],
)
def test_seeds_that_failed(name: str, seed: int) -> None:
    simulate(seed, SHAPES[name])
