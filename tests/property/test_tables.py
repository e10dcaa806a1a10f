"""The tables of a generation against plain scans of the layout, of the shards and of the segments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.layout import Layout, LayoutError
from everstep.resharding.plan import Plan, plan_recovery
from everstep.resharding.units import ModelSpec, Shard
from everstep.resharding.work import AssignedLeg, Leg, Work

from .worlds import Loss, histories, losses


def owned_in(spec: ModelSpec, layout: Layout, layer: int, owner: int) -> list[Shard]:
    return [s for s in spec.shards if layout.owners[s.index] == owner and layer in spec.parameters[s.parameter].layers]


def read_from(spec: ModelSpec, layout: Layout, owner: int, reader: int) -> list[Shard]:
    (stage,) = [stage for stage in layout.stages if reader in stage.ranks]
    return [
        s
        for s in spec.shards
        if layout.owners[s.index] == owner and any(layer in stage for layer in spec.parameters[s.parameter].layers)
    ]


@given(histories())
def test_the_tables_of_a_layout(history: tuple[ModelSpec, list[Layout]]) -> None:
    spec, layouts = history
    for layout in layouts:
        index = layout.index(spec)
        assert layout.index(spec) is index
        for rank in layout.ranks:
            assert [layout.stage_of(rank)] == [stage for stage in layout.stages if rank in stage.ranks]
            assert list(index.owned(rank)) == [s for s in spec.shards if layout.owners[s.index] == rank]
            expected = {layer: owned_in(spec, layout, layer, rank) for layer in range(spec.layers)}
            assert {layer: list(s) for layer, s in index.owned_in(rank).items()} == {
                n: s for n, s in expected.items() if s
            }
            for other in layout.ranks:
                assert list(index.read_from(other, rank)) == read_from(spec, layout, other, rank)
            assert list(index.sources(rank)) == [r for r in layout.ranks if read_from(spec, layout, r, rank)]
            assert list(index.readers(rank)) == [r for r in layout.ranks if read_from(spec, layout, rank, r)]
        for layer in range(spec.layers):
            assert [layout.holders(layer)] == [stage.ranks for stage in layout.stages if layer in stage]
            assert list(index.owners_in(layer)) == [r for r in layout.ranks if owned_in(spec, layout, layer, r)]


@given(histories())
def test_what_is_not_in_a_layout(history: tuple[ModelSpec, list[Layout]]) -> None:
    spec, layouts = history
    with pytest.raises(LayoutError, match="is not in the layout"):
        layouts[-1].stage_of(max(layouts[-1].ranks) + 1)
    with pytest.raises(LayoutError, match="no stage holds layer"):
        layouts[-1].holders(spec.layers)
    assert max(layouts[-1].ranks) + 1 not in layouts[-1]


def same_tables(work: Work, ranks: tuple[int, ...], layers: int) -> None:
    everything = (*work.segments, *work.kept)
    for rank in ranks:
        ours = [Leg(*s[1:]) for s in work.segments if s.rank == rank]
        assert list(work.spans_of(rank)) == sorted(ours, key=work.turn)
        covered = {n for s in everything if s.rank == rank for n in range(s.start, s.stop)}
        assert list(work.layers_of(rank)) == sorted(covered)
    for layer in range(layers):
        assert list(work.contributors(layer)) == sorted({s.rank for s in everything if s.start <= layer < s.stop})
    for segment in everything:
        after = [s for s in everything if (s.micro_batch, s.start) == (segment.micro_batch, segment.stop)]
        before = [s for s in everything if (s.micro_batch, s.stop) == (segment.micro_batch, segment.start)]
        assert work.next_segment(segment.span) == next((s for s in after if s in work.segments), None)
        assert work.previous_segment(segment.span) == next((s for s in before if s in work.segments), None)
        if after:
            assert work.gradient_source(segment.span) == after[0].rank
        if before:
            assert work.activation_source(segment.span) == before[0].rank


@given(histories(), st.data())
def test_the_tables_of_a_step(history: tuple[ModelSpec, list[Layout]], data: st.DataObject) -> None:
    """Undisturbed, and with any part of it done."""
    spec, layouts = history
    layout = layouts[-1]
    assert layout.work.segments == layout.segments()
    same_tables(layout.work, layout.ranks, spec.layers)
    kept: list[AssignedLeg] = [s for s in layout.segments() if data.draw(st.booleans())]
    left = [s for s in layout.segments() if s not in kept]
    same_tables(Work(left, kept), layout.ranks, spec.layers)


@given(losses())
def test_the_tables_of_an_interrupted_step(loss: Loss) -> None:
    plan: Plan = plan_recovery(loss.spec, loss.layout, loss.reports, loss.layout.generation + 1)
    same_tables(Work(plan.work, plan.kept), plan.layout.ranks, loss.spec.layers)
