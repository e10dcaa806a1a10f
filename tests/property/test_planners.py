"""The planners against dumb ones, and against what a layout and a plan promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.protocol.invariants import check_plan
from everstep.resharding.layout import Layout, LayoutError
from everstep.resharding.plan import (
    Plan,
    PlanError,
    Report,
    plan_join,
    plan_recovery,
    plan_start,
)
from everstep.resharding.planners import (
    change_layout,
    deal_micro_batches,
    deal_shards,
    even_out,
    initial_layout,
    partition,
)
from everstep.resharding.units import ModelSpec, ParameterSpec, Shard
from everstep.resharding.work import AssignedLeg, Leg

from .worlds import ROW, Loss, histories, losses, models

# ---------------------------------------------------------------- partition


def slowest(costs: list[float], weights: list[float], bounds: list[int]) -> float:
    return max(sum(costs[a:b]) / w for (a, b), w in zip(itertools.pairwise(bounds), weights, strict=True))


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=7),
    st.lists(st.integers(1, 4).map(float), min_size=1, max_size=4),
)
def test_partition_is_as_good_as_the_best_of_all(costs: list[float], weights: list[float]) -> None:
    if len(weights) > len(costs):
        with pytest.raises(LayoutError, match="at least as many layers"):
            partition(costs, weights)
        return
    bounds = partition(costs, weights)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert all(a < b for a, b in itertools.pairwise(bounds))
    cuts = itertools.combinations(range(1, len(costs)), len(weights) - 1)
    best = min(slowest(costs, weights, [0, *cut, len(costs)]) for cut in cuts)
    assert slowest(costs, weights, bounds) == pytest.approx(best)


@given(st.integers(0, 40), st.integers(1, 9))
def test_micro_batches_are_dealt_once_and_evenly(count: int, ranks: int) -> None:
    blocks = deal_micro_batches(count, range(ranks))
    assert [m for block in blocks for m in range(block.start, block.stop)] == list(range(count))
    sizes = [block.stop - block.start for block in blocks] + [0] * (ranks - len(blocks))
    assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- layouts


def loads_of(spec: ModelSpec, layout: Layout, layer: int) -> tuple[dict[int, int], int]:
    """Elements per holder of the shards dealt with a layer, and the largest of these shards."""
    shards = [s for s in spec.shards if spec.home(s) == layer]
    loads = dict.fromkeys(layout.holders(layer), 0)
    for shard in shards:
        loads[layout.owners[shard.index]] += shard.elements
    return loads, max((s.elements for s in shards), default=0)


@given(histories())
def test_any_history_keeps_every_layout_sound_and_even(world: tuple[ModelSpec, list[Layout]]) -> None:
    spec, history = world
    for layout in history:
        layout.validate(spec)
        for layer in range(spec.layers):
            loads, largest = loads_of(spec, layout, layer)
            assert max(loads.values()) - min(loads.values()) <= largest


@given(histories())
def test_only_what_has_to_move_moves(world: tuple[ModelSpec, list[Layout]]) -> None:
    spec, history = world
    for old, new in itertools.pairwise(history):
        for layer in range(spec.layers):
            before, after = set(old.holders(layer)), set(new.holders(layer))
            moved = [
                s.index for s in spec.shards if spec.home(s) == layer and old.owners[s.index] != new.owners[s.index]
            ]
            lost = [
                i for i in range(len(spec.shards)) if old.owners[i] not in after and spec.home(spec.shards[i]) == layer
            ]
            if after <= before:
                assert moved == lost, f"layer {layer}: nobody new holds it, so only shards without an owner move"
            assert set(lost) <= set(moved)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_a_join_moves_no_more_equal_shards_than_balance_demands(rows: int, ranks: int, joiners: int) -> None:
    spec = ModelSpec((1.0,), (ParameterSpec("weight", (rows, ROW), "float32", 4, (0,)),))
    old = initial_layout(spec, range(ranks), 1, 4)
    new = change_layout(spec, old, range(ranks + joiners), 2)
    moved = sum(a != b for a, b in zip(old.owners, new.owners, strict=True))
    # The dumb bound: within one shard of each other, every joiner has at least the rounded-down mean.
    needed = joiners * (len(spec.shards) // (ranks + joiners))
    assert needed <= moved <= needed + joiners


@given(st.data())
def test_who_leaves_and_returns_gets_the_home_stages_back(data: st.DataObject) -> None:
    spec = data.draw(models())
    stages = data.draw(st.integers(1, spec.layers))
    start = initial_layout(spec, range(data.draw(st.integers(stages, 6))), stages, 6)
    left = change_layout(spec, start, data.draw(st.sets(st.sampled_from(start.ranks), min_size=1)), 2)
    back = change_layout(spec, left, start.ranks, 3)
    assert back.stages == start.stages
    assert back.home == start.home


@given(models(), st.data())
def test_shards_are_dealt_to_holders_only(spec: ModelSpec, data: st.DataObject) -> None:
    holders = {
        layer: tuple(data.draw(st.sets(st.integers(0, 5), min_size=1).map(sorted))) for layer in range(spec.layers)
    }
    owners = deal_shards(spec, holders)
    again = deal_shards(spec, holders, owners)
    assert all(owners[s.index] in holders[spec.home(s)] for s in spec.shards)
    assert again == owners, "what is even already stays"


def dumb_even_out(sizes: list[int], dealt: list[int], load: dict[int, int]) -> None:
    while True:
        full = max(load, key=lambda rank: (load[rank], -rank))
        empty = min(load, key=lambda rank: (load[rank], rank))
        gap = load[full] - load[empty]
        if gap <= max(sizes):
            return
        movable = [i for i, size in enumerate(sizes) if dealt[i] == full and 0 < size < gap]
        moved = min(movable, key=lambda i: (abs(gap - 2 * sizes[i]), i))
        dealt[moved] = empty
        load[full] -= sizes[moved]
        load[empty] += sizes[moved]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=40))
def test_what_evens_out_is_what_a_search_of_all_shards_finds(given_: list[tuple[int, int]]) -> None:
    """In a layer of very many shards, looking at all of them for each that moves takes minutes."""
    sizes, owners = [size for size, _ in given_], [rank for _, rank in given_]
    load = {rank: sum(size for size, owner in given_ if owner == rank) for rank in range(4)}
    expected, loads = list(owners), dict(load)
    dumb_even_out(sizes, expected, loads)
    even_out([Shard(i, i, 0, size) for i, size in enumerate(sizes)], owners, load)
    assert (owners, load) == (expected, loads)


@given(models())
def test_shards_cover_every_parameter_once_and_in_order(spec: ModelSpec) -> None:
    for index, parameter in enumerate(spec.parameters):
        pieces = [s for s in spec.shards if s.parameter == index]
        assert [s.start for s in pieces] == [0, *(s.stop for s in pieces[:-1])]
        assert pieces[-1].stop == parameter.elements
        if spec.whole:
            assert len(pieces) == 1
    assert [s.index for s in spec.shards] == list(range(len(spec.shards)))
    for layer, shards in enumerate(spec.shards_of_layer):
        assert {s.parameter for s in shards} == {i for i, p in enumerate(spec.parameters) if layer in p.layers}


def test_no_live_rank() -> None:
    spec = ModelSpec((1.0,), ())
    with pytest.raises(LayoutError, match="no live rank"):
        change_layout(spec, initial_layout(spec, [0], 1, 1), [], 2)


# ---------------------------------------------------------------- plans


@given(histories())
def test_join_plans(world: tuple[ModelSpec, list[Layout]]) -> None:
    spec, history = world
    old = history[-1]
    joiner = max(rank for stage in old.home for rank in stage.ranks) + 1
    plan = plan_join(spec, old, [joiner], old.generation + 1)
    check_plan(spec, plan)
    assert plan.fresh == (joiner,)
    assert {move.shard for move in plan.gained} == {
        i for i, (a, b) in enumerate(zip(old.owners, plan.layout.owners, strict=True)) if a != b
    }
    assert plan.guide in old.ranks


@given(losses())
def test_recovery_plans(loss: Loss) -> None:
    spec, reports = loss.spec, loss.reports
    generation = loss.layout.generation + 1
    plan = plan_recovery(spec, loss.layout, reports, generation, (loss.step - 1, "known"))
    check_plan(spec, plan)
    by_rank = {report.rank: report for report in reports}
    agreed = any(r.agreed == loss.step for r in reports)
    assert plan.version == loss.step + agreed
    assert set(plan.layout.ranks) == set(by_rank)
    assert plan.fresh == tuple(sorted(r.rank for r in reports if r.fresh))
    for rank in set(plan.fresh) - set(plan.receivers):
        stage = plan.layout.stage_of(rank)
        assert not any(spec.shards_of_layer[layer] for layer in range(stage.start, stage.stop))
    if agreed:
        assert plan.agreement == f"agreement of {loss.step}"
    current = [r for r in reports if r.values_version == plan.version]
    held = {AssignedLeg(r.rank, *span) for r in current for span in r.held}
    assert set(plan.kept) == held
    assert not {s[1:] for s in plan.work} & {s[1:] for s in held}
    for report in current:
        stage = plan.layout.stage_of(report.rank)
        for span in (*report.todo, *report.started):
            if (stage.start, stage.stop) == (span.start, span.stop):
                assert AssignedLeg(report.rank, *span) in plan.work, "claims stay with their rank"
    forwards = {AssignedLeg(r.rank, *span) for r in current for span in r.started}
    assert set(plan.started) == forwards & set(plan.work)
    for shard, owner in enumerate(plan.layout.owners):
        assert (shard in {move.shard for move in plan.gained}) == (shard not in by_rank[owner].owned)


@given(losses())
def test_recovery_does_not_depend_on_the_order_of_the_reports(loss: Loss) -> None:
    generation = loss.layout.generation + 1
    plan = plan_recovery(loss.spec, loss.layout, loss.reports, generation)
    again = plan_recovery(loss.spec, loss.layout, sorted(loss.reports, key=lambda r: r.rank), generation)
    assert replace(plan, kept=(), work=()) == replace(again, kept=(), work=())
    assert sorted(plan.kept) == sorted(again.kept)
    assert plan.work == again.work


@given(losses())
def test_everything_survives_being_sent(loss: Loss) -> None:
    plan = plan_recovery(loss.spec, loss.layout, loss.reports, loss.layout.generation + 1)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest == plan.digest
    assert Layout.from_json(loss.layout.to_json()) == loss.layout
    assert ModelSpec.from_json(loss.spec.to_json()) == loss.spec
    assert ModelSpec.from_json(loss.spec.to_json()).digest == loss.spec.digest
    for report in loss.reports:
        assert Report.from_json(report.to_json()) == report


def _reports(**second: object) -> tuple[ModelSpec, Layout, list[Report]]:
    spec = ModelSpec((1.0, 1.0), tuple(ParameterSpec(f"{i}", (4, ROW), "float32", 4, (i,)) for i in range(2)))
    layout = initial_layout(spec, range(2), 1, 2)
    first = Report(rank=0, generation=1, owned_version=3, values_version=3, layers=(0, 2), agreed=2, agreement="a")
    other = replace(first, rank=1, held=(Leg(1, 0, 2),))
    return spec, layout, [replace(first, held=(Leg(0, 0, 2),)), replace(other, **second)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"owned_version": 1}, "hold shards of other versions"),
        ({"owned_version": 4}, "hold shards of other versions"),
        ({"held": (Leg(0, 0, 2),)}, "held twice"),
        ({"held": (Leg(0, 1, 2),)}, "held twice"),
        ({"rank": 0}, "two reports of one rank"),
    ],
)
def test_contradictions(second: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_recovery(*_reports(**second), 2)


def test_what_is_known_to_be_agreed_is_not_undone() -> None:
    """A survivor carried out an agreement that it heard of in a plan; those who had passed it are dead."""
    spec, layout, reports = _reports(owned_version=4, values_version=-1, held=())
    plan = plan_recovery(spec, layout, reports, 2, (3, "b"))
    assert (plan.version, plan.agreement) == (4, "b")
    assert plan.kept == ()


def test_the_start_is_from_the_seed() -> None:
    spec, layout, _ = _reports()
    plan = plan_start(layout)
    check_plan(spec, plan)
    assert plan.version == 0
    assert plan.guide is None
