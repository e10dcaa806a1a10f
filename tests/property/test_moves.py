"""Moves bring every rank what it lacks and no more, and a plan contains what changed, not the whole state."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.protocol.invariants import InvariantBroken, check_plan
from everstep.resharding.layout import Layout
from everstep.resharding.moves import (
    LIVE,
    PROTECTED,
    SAVED,
    STAND_IN,
    Move,
    SourceKind,
    What,
    from_runs,
    own_moves,
    received,
    to_runs,
    value_moves,
)
from everstep.resharding.plan import (
    Plan,
    Report,
    plan_join,
    plan_leave,
    plan_recovery,
    plan_resume,
    plan_rollback,
)
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec

from .worlds import ROW, Loss, histories, losses


def layers_of(layout: Layout, rank: int) -> range:
    stage = layout.stage_of(rank)
    return range(stage.start, stage.stop)


def reads(spec: ModelSpec, layout: Layout, rank: int) -> set[int]:
    """The shards that a rank computes with."""
    return {s.index for layer in layers_of(layout, rank) for s in spec.shards_of_layer[layer]}


def arrives(plan: Plan, rank: int) -> set[int]:
    """The shards whose values are valid on a rank because a plan's moves brought them."""
    return {m.shard for m in received(plan.moves, rank) if m.what is not What.BACKUP}


@given(losses())
def test_after_the_moves_every_rank_has_what_it_owns_and_computes_with(loss: Loss) -> None:
    spec = loss.spec
    plan = plan_recovery(spec, loss.layout, loss.reports, loss.layout.generation + 1, (loss.step - 1, "known"))
    for report in loss.reports:
        valid = report.values_version == plan.version and not report.fresh
        kept = {
            s.index
            for s in spec.shards
            if valid and any(layer in range(*report.layers) for layer in spec.parameters[s.parameter].layers)
        }
        here = kept | set(report.owned) | arrives(plan, report.rank)
        assert reads(spec, plan.layout, report.rank) <= here


@given(losses())
def test_valid_values_do_not_move(loss: Loss) -> None:
    spec = loss.spec
    plan = plan_recovery(spec, loss.layout, loss.reports, loss.layout.generation + 1, (loss.step - 1, "known"))
    for report in loss.reports:
        if report.fresh or report.values_version != plan.version:
            continue
        for move in received(plan.values, report.rank):
            layers = set(spec.parameters[spec.shards[move.shard].parameter].layers)
            new = layers & set(layers_of(plan.layout, report.rank)) - set(range(*report.layers))
            assert new, f"{move} is there already"


@given(histories())
def test_a_stage_that_grows_gets_the_new_layers_alone(world: tuple[ModelSpec, list[Layout]]) -> None:
    spec, history = world
    old = history[-1]
    if len(old.ranks) < 2:
        return
    plan = plan_leave(spec, old, old.ranks[:1], old.generation + 1)
    check_plan(spec, plan)
    for rank in plan.layout.ranks:
        before = old.stage_of(rank)
        for move in received(plan.values, rank):
            layers = spec.parameters[spec.shards[move.shard].parameter].layers
            assert any(layer not in before for layer in layers)


@given(histories(), st.integers(0, 9))
def test_going_back_and_resuming_move_everything(world: tuple[ModelSpec, list[Layout]], version: int) -> None:
    spec, history = world
    old = history[-1]
    everything = set(range(len(spec.shards)))
    back = plan_rollback(spec, old, old.ranks, old.generation + 1, version, "a")
    saved = plan_resume(spec, old, version, "a", "step-1")
    for plan, sources in ((back, PROTECTED), (saved, SAVED)):
        check_plan(spec, plan)
        assert {m.shard for m in plan.gained} == everything
        assert {m.sources for m in plan.gained} <= {sources}
        for rank in plan.layout.ranks:
            assert {m.shard for m in received(plan.values, rank)} == reads(spec, plan.layout, rank)
    for plan, sources in ((back, PROTECTED), (saved, SAVED)):  # for backups, which no plan names
        assert plan.moves_of([0], 0, What.BACKUP) == (Move(0, (0,), What.BACKUP, sources),)


@given(losses())
def test_stand_ins_have_one_source(loss: Loss) -> None:
    plan = plan_recovery(loss.spec, loss.layout, loss.reports, loss.layout.generation + 1)
    gone = [move.shard for move in plan.gained][::2]
    standing = plan.standing_in(gone)
    check_plan(loss.spec, standing)
    assert standing.stand_ins == tuple(gone)
    assert [m.shard for m in standing.gained] == [m.shard for m in plan.gained]
    for move in standing.gained:
        assert move.sources == (STAND_IN if move.shard in gone else PROTECTED)
    for shard in gone:
        assert standing.moves_of([shard], plan.layout.ranks[0], What.BACKUP)[0].sources == STAND_IN


MOVES = st.builds(
    Move,
    st.integers(0, 40),
    st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(lambda ranks: tuple(sorted(ranks))),
    st.sampled_from(list(What)),
    st.lists(st.sampled_from(list(SourceKind)), min_size=1, max_size=3, unique=True).map(tuple),
)


@given(st.lists(MOVES, max_size=30), st.integers(0, 5))
def test_runs_of_moves_are_the_moves(moves: list[Move], rank: int) -> None:
    assert from_runs(to_runs(moves)) == tuple(moves)
    assert received(moves, rank) == [move for move in moves if rank in move.to]


def large(layers: int) -> tuple[ModelSpec, Layout]:
    parameters = tuple(ParameterSpec(f"{i}", (64, ROW), "float32", 4, (i,)) for i in range(layers))
    spec = ModelSpec((1.0,) * layers, parameters)
    return spec, initial_layout(spec, range(16), 4, 16)


def test_a_plan_says_what_changed() -> None:
    """Its moves grow with the lost shards, not with all shards; values are encoded as runs of shards."""
    spec, layout = large(32)
    reports = [
        Report(
            rank=rank,
            generation=1,
            owned=tuple(i for i, owner in enumerate(layout.owners) if owner == rank),
            owned_version=1,
            values_version=1,
            agreed=0,
            layers=(layout.stage_of(rank).start, layout.stage_of(rank).stop),
        )
        for rank in layout.ranks[1:]
    ]
    plan = plan_recovery(spec, layout, reports, 2)
    assert len(plan.moves) == sum(owner == 0 for owner in layout.owners), "what the lost rank owned"
    join = plan_join(spec, plan.layout, [16], 3)
    stage = join.layout.stage_of(16)
    assert {move.to for move in join.values} == {(16,)}
    assert len(to_runs(join.values)["runs"]) == 1, f"layers {stage.start}-{stage.stop}, whose shards are neighbours"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"what": What.OWN, "to": (1,)}, "not to its owner"),
        ({"what": What.VALUE, "to": (15,)}, "a rank that does not read it"),
        ({"sources": ()}, "from nowhere"),
        ({"to": ()}, "to no rank"),
    ],
)
def test_wrong_moves_break_a_rule(wrong: dict[str, object], message: str) -> None:
    spec, layout = large(8)
    assert layout.owners[0] == 0
    move = Move(0, (0,), What.OWN, PROTECTED)
    plan = plan_rollback(spec, layout, layout.ranks, 2, 0, "")
    moves = tuple(m for m in plan.moves if m.shard != 0)
    with pytest.raises(InvariantBroken, match=message):
        check_plan(spec, replace(plan, moves=(*moves, move._replace(**wrong))))
    with pytest.raises(InvariantBroken, match="move twice"):
        check_plan(spec, replace(plan, moves=(*plan.moves, plan.moves[0])))


def test_values_of_a_shared_parameter_move_with_any_of_its_layers() -> None:
    tied = ParameterSpec("table", (4, ROW), "float32", 4, (0, 2))
    spec = ModelSpec((1.0,) * 3, (tied, ParameterSpec("w", (4, ROW), "float32", 4, (1,))))
    layout = initial_layout(spec, [0], 1, 1)
    assert value_moves(spec, layout, {0: range(3)}) == ()
    moves = value_moves(spec, layout, {0: range(2)})
    assert {(m.to, m.what, m.sources) for m in moves} == {((0,), What.VALUE, LIVE)}
    assert {spec.shards[m.shard].parameter for m in moves} == {0}
    assert own_moves(layout, [0], SAVED) == (Move(0, (0,), What.OWN, SAVED),)
