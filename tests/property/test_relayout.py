"""Layouts with another number of stages: valid, cut as those of a job that starts so, and near to what ranks hold."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.layout import Layout, LayoutError
from everstep.resharding.moves import What
from everstep.resharding.plan import plan_switch
from everstep.resharding.planners import change_layout, initial_layout
from everstep.resharding.rebalance import moved_values
from everstep.resharding.relayout import relayout
from everstep.resharding.units import ModelSpec

from .worlds import histories


def slowest(spec: ModelSpec, layout: Layout) -> float:
    """The most cost for each rank of a stage."""
    return max(sum(spec.costs[s.start : s.stop]) / len(s.ranks) for s in layout.stages)


@given(histories(), st.data())
def test_every_number_of_stages_has_a_whole_layout(found: tuple[ModelSpec, list[Layout]], data: st.DataObject) -> None:
    """Also after losses; and each micro-batch of each layer, and each shard, has one rank."""
    spec, history = found
    old, at = history[-1], 100
    for stages in data.draw(st.lists(st.integers(1, min(spec.layers, len(old.ranks))), min_size=1, max_size=3)):
        new = relayout(spec, old, stages, at := at + 1)
        new.validate(spec)
        assert (new.generation, new.ranks, len(new.stages)) == (at, old.ranks, stages)
        sizes = sorted(len(stage.ranks) for stage in new.stages)
        assert sizes[-1] - sizes[0] <= 1
        started = initial_layout(spec, old.ranks, stages, old.micro_batches)
        assert slowest(spec, new) <= slowest(spec, started) + 1e-9
        legs = {(leg.micro_batch, layer) for leg in new.segments() for layer in range(leg.start, leg.stop)}
        assert len(legs) == old.micro_batches * spec.layers
        assert sum(leg.stop - leg.start for leg in new.segments()) == len(legs)
        plan = plan_switch(spec, old, new)
        assert not plan.fresh + plan.leaving
        assert {m.shard for m in plan.moves if m.what is What.OWN} == {
            shard.index for shard in spec.shards if new.owners[shard.index] != old.owners[shard.index]
        }
        later = change_layout(spec, new, new.ranks[1:] or new.ranks, at + 1)
        assert later.home == new.home, "a later recovery keeps to the new number of stages"
        old = new


@given(histories(), st.data())
def test_no_exchange_of_two_ranks_moves_less(found: tuple[ModelSpec, list[Layout]], data: st.DataObject) -> None:
    spec, history = found
    old = history[-1]
    new = relayout(spec, old, data.draw(st.integers(1, min(spec.layers, len(old.ranks)))), 100)
    moved = moved_values(spec, old, new)
    for one, other in itertools.combinations(new.ranks, 2):
        swap = {one: other, other: one}
        stages = tuple(
            type(s)(s.start, s.stop, tuple(swap.get(rank, rank) for rank in s.ranks), s.blocks) for s in new.stages
        )
        assert moved <= moved_values(spec, old, Layout(100, new.micro_batches, stages, new.owners, stages))


@given(histories())
def test_back_to_the_same_cut(found: tuple[ModelSpec, list[Layout]]) -> None:
    """There and back, the stages are cut as before, and one stage holds all."""
    spec, history = found
    ranks = history[-1].ranks
    first = initial_layout(spec, ranks, min(spec.layers, len(ranks)), history[-1].micro_batches)
    one = relayout(spec, first, 1, 2)
    assert [(s.start, s.stop, s.ranks) for s in one.stages] == [(0, spec.layers, ranks)]
    again = relayout(spec, one, len(first.stages), 3)
    assert slowest(spec, again) <= slowest(spec, first) + 1e-9
    assert moved_values(spec, one, again) == 0, "every rank held everything"


@given(histories())
def test_too_many_stages_are_refused(found: tuple[ModelSpec, list[Layout]]) -> None:
    spec, history = found
    old = history[-1]
    with pytest.raises(LayoutError, match="stages need at least as many workers"):
        relayout(spec, old, len(old.ranks) + 1, 100)
    if len(old.ranks) > spec.layers:
        with pytest.raises(LayoutError, match="stages need at least as many layers"):
            relayout(spec, old, spec.layers + 1, 100)
