"""The forecast of a step, and the search for a faster layout, against formulas and against all layouts there are."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.forecast import Costs, bound, step_time
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.memory import Memory
from everstep.resharding.planners import change_layout, deal_micro_batches, initial_layout, partition
from everstep.resharding.rebalance import AS_GOOD, LEAST_GAIN, rebalance
from everstep.resharding.stages import fewest_stages, restage
from everstep.resharding.units import ModelSpec, ParameterSpec

from .worlds import layouts_of

Situation = tuple[ModelSpec, Layout, dict[int, float]]


def model(costs: list[float]) -> ModelSpec:
    parameters = [ParameterSpec(f"p{i}", (4, 8), "float32", 4, (i,)) for i in range(len(costs))]
    return ModelSpec(tuple(costs), tuple(parameters))


@st.composite
def situations(draw: st.DrawFn, most_layers: int = 9, most_ranks: int = 7) -> Situation:
    """A model, a layout after some losses, and speeds."""
    layers = draw(st.integers(2, most_layers))
    costs = draw(st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]), min_size=layers, max_size=layers))
    ranks = draw(st.integers(2, most_ranks))
    stages = draw(st.integers(1, min(ranks, layers, 4)))
    spec = model(costs)
    start = initial_layout(spec, range(ranks), stages, draw(st.integers(1, 14)))
    live = draw(st.sets(st.sampled_from(start.ranks), min_size=1))
    speeds = draw(st.dictionaries(st.sampled_from(start.ranks), st.sampled_from([0.5, 0.8, 2.0])))
    return spec, change_layout(spec, start, live, 2), speeds


@given(situations())
def test_no_step_is_faster_than_its_busiest_rank_and_every_leg_is_run(found: Situation) -> None:
    spec, layout, speeds = found
    costs = Costs.of(spec)
    time = step_time(layout, costs, speeds)
    assert time >= bound(layout, costs, speeds) - 1e-9
    slowest = min([1.0, *speeds.values()])
    assert time <= layout.micro_batches * sum(costs.total) / slowest + 1e-9, "as if one rank computed all, in turn"


@given(st.integers(1, 5), st.integers(1, 12))
def test_the_forecast_of_an_even_pipeline_is_the_textbooks(stages: int, micro_batches: int) -> None:
    """1F1B, Narayanan et al. 2019: (micro-batches + stages - 1) times a stage's forward and backward."""
    spec = model([1.0] * stages)
    layout = initial_layout(spec, range(stages), stages, micro_batches)
    assert step_time(layout, Costs.of(spec), {}) == pytest.approx(3.0 * (micro_batches + stages - 1))


@given(situations())
def test_what_is_proposed_is_valid_and_faster(found: Situation) -> None:
    spec, layout, speeds = found
    proposal = rebalance(spec, layout, 3, speeds=speeds)
    if proposal is None:
        return
    proposal.layout.validate(spec)
    assert proposal.layout.ranks == layout.ranks
    assert proposal.layout.generation == 3
    assert len(proposal.layout.stages) == len(layout.stages)
    costs = Costs.of(spec)
    assert proposal.before == step_time(layout, costs, speeds)
    assert proposal.after == step_time(proposal.layout, costs, speeds)
    assert proposal.gain >= LEAST_GAIN
    again = rebalance(spec, proposal.layout, 4, speeds=speeds, least_gain=0.06)
    assert again is None or again.after < proposal.after, "it does not go back and forth"


def test_nothing_is_much_faster_than_what_is_found() -> None:
    """Of all layouts of the same ranks and stages mostly none is faster, and the search is rarely far from the best."""
    rng = random.Random(1)
    ratios = []
    for _ in range(60):
        layers, ranks = rng.randint(2, 6), rng.randint(2, 5)
        spec = model([rng.choice((0.5, 1.0, 1.0, 2.0, 5.0)) for _ in range(layers)])
        stages, micro_batches = rng.randint(1, min(ranks, layers, 3)), rng.choice((4, 8, 12))
        start = initial_layout(spec, range(ranks), stages, micro_batches)
        live = set(rng.sample(range(ranks), rng.randint(max(1, ranks - 2), ranks)))
        layout = change_layout(spec, start, live, 2)
        speeds = {rank: rng.choice((0.5, 0.8, 2.0)) for rank in live if rng.random() < 0.3}
        costs = Costs.of(spec)
        best = min(step_time(other, costs, speeds) for other in layouts_of(spec, layout, len(layout.stages), speeds))
        proposal = rebalance(spec, layout, 3, speeds=speeds)
        ratios.append((proposal.after if proposal else step_time(layout, costs, speeds)) / best)
    assert statistics.median(ratios) < 1 + 1e-9
    assert sum(ratio < 1 / (1 - LEAST_GAIN) for ratio in ratios) >= 54
    assert max(ratios) < 1.15


@given(situations(), st.integers(1, 9))
def test_no_rank_gets_more_than_its_memory_holds(found: Situation, layers: int) -> None:
    spec, layout, speeds = found
    memory = Memory.of(
        spec, [256] * len(spec.shards), [128] * len(spec.shards), dict.fromkeys(layout.ranks, layers * 384)
    )
    proposal = rebalance(spec, layout, 3, speeds=speeds, memory=memory)
    if proposal is not None:
        assert all(_needed(spec, s) <= layers * 384 for s in proposal.layout.stages)


def _needed(spec: ModelSpec, stage: Stage) -> int:
    """Values, gradients and sums (128 bytes each) of a stage's layers, and this rank's part of their records."""
    layers = range(stage.start, stage.stop)
    shards = [shard for shard in spec.shards if spec.home(shard) in layers]
    return 384 * len(layers) + math.ceil(256 * len(shards) / len(stage.ranks))


@given(situations(), st.integers(1, 9))
def test_another_number_of_stages_is_valid_faster_and_fits(found: Situation, layers: int) -> None:
    spec, layout, speeds = found
    states, gradients = [256] * len(spec.shards), [128] * len(spec.shards)
    memory = Memory.of(spec, states, gradients, dict.fromkeys(layout.ranks, layers * 384))
    measured = {"costs": None, "speeds": speeds, "memory": memory}
    proposal, kept = (search(spec, layout, 3, **measured) for search in (restage, rebalance))
    if proposal is None:
        assert kept is None
        return
    proposal.layout.validate(spec)
    assert proposal.layout.ranks == layout.ranks
    assert proposal.layout.home == tuple(replace(stage, blocks=()) for stage in proposal.layout.stages)
    assert kept is None or proposal.after <= kept.after
    assert proposal.gain >= LEAST_GAIN or memory.too_much(layout)
    assert all(_needed(spec, s) <= layers * 384 for s in proposal.layout.stages)
    assert proposal.after == step_time(proposal.layout, Costs.of(spec), speeds)


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 12))
def test_a_job_begins_with_the_fewest_stages_that_fit(layers: int, ranks: int, held: int) -> None:
    spec = model([1.0] * layers)
    memory = Memory.of(spec, (), [128] * len(spec.shards), dict.fromkeys(range(ranks), held * 384))
    fitting = [
        stages
        for stages in range(1, 1 + min(ranks, layers))
        if all(s.stop - s.start <= held for s in initial_layout(spec, range(ranks), stages, 8).stages)
    ]
    found = fewest_stages(spec, range(ranks), 8, memory, layers)
    assert len(found.stages) == min([*fitting, min(ranks, layers)])
    assert bool(memory.lacking(found)) == (not fitting)


@pytest.mark.parametrize(("lost", "least"), [((3,), 0.93), ((3, 5), 0.93), ((0, 3, 5), 0.93)])
def test_throughput_after_a_loss(lost: tuple[int, ...], least: float) -> None:
    """4 stages x 2 ranks: what is left of the speed, over what is left of the ranks."""
    spec = model([1.0] * 16)
    whole = initial_layout(spec, range(8), 4, 32)
    after = change_layout(spec, whole, set(range(8)) - set(lost), 2)
    costs = Costs.of(spec)
    proposal = rebalance(spec, after, 3)
    assert proposal is not None
    left = (8 - len(lost)) / 8
    assert step_time(whole, costs, {}) / proposal.after / left >= least
    assert step_time(whole, costs, {}) / step_time(after, costs, {}) / left < 0.9, "it was less before"


@pytest.mark.parametrize("lost", [0, 5, 10, 15])
def test_a_stage_that_has_lost_a_rank_does_not_wait_for_others(lost: int) -> None:
    """4 stages x 4 ranks: three ranks do what four did, so a step takes 4/3 of the time, and little more."""
    spec, costs = model([1.0] * 16), Costs.of(model([1.0] * 16))
    whole = initial_layout(spec, range(16), 4, 64)
    layout = change_layout(spec, whole, set(range(16)) - {lost}, 2)
    assert step_time(layout, costs, {}) < 1.4 * step_time(whole, costs, {})


def test_among_many_stages_ranks_may_have_no_work() -> None:
    """12 stages x 8 ranks and one lost: with 7 ranks in each stage nothing waits, and seven ranks do nothing."""
    spec, costs = model([1.0] * 48), Costs.of(model([1.0] * 48))
    whole = initial_layout(spec, range(96), 12, 128)
    layout = change_layout(spec, whole, set(range(96)) - {50}, 2)
    proposal = rebalance(spec, layout, 3)
    assert proposal is not None
    proposal.layout.validate(spec)
    assert proposal.layout.ranks == layout.ranks
    assert {len(stage.blocks) for stage in proposal.layout.stages} == {7}
    assert step_time(whole, costs, {}) / proposal.after > 0.89
    assert step_time(whole, costs, {}) / proposal.before < 0.83


@pytest.mark.parametrize("seed", range(4))
def test_a_new_cut_of_the_layers_alone_is_not_faster(seed: int) -> None:
    """4 stages x 4 ranks, two of which are lost: what needs the least to move is always among what is forecast."""
    spec, costs = model([1.0] * 16), Costs.of(model([1.0] * 16))
    whole = initial_layout(spec, range(16), 4, 64)
    lost = random.Random(seed).sample(range(16), 2)
    layout = change_layout(spec, whole, set(range(16)) - set(lost), 2)
    bounds = partition(costs.total, [len(stage.ranks) for stage in layout.stages])
    stages = tuple(replace(s, start=a, stop=b) for s, (a, b) in zip(layout.stages, pairwise(bounds), strict=True))
    proposal = rebalance(spec, layout, 3)
    after = step_time(layout, costs, {}) if proposal is None else proposal.after
    assert after <= (1 + AS_GOOD) * step_time(replace(layout, stages=stages), costs, {})


@given(st.integers(1, 40), st.lists(st.sampled_from([0.5, 0.7, 1.0, 3.0]), min_size=1, max_size=6))
def test_micro_batches_by_speed_are_done_as_early_as_possible(count: int, speed: list[float]) -> None:
    speeds = dict(enumerate(speed))
    blocks = deal_micro_batches(count, range(len(speed)), speeds)
    assert [m for block in blocks for m in range(block.start, block.stop)] == list(range(count))
    end = max((block.stop - block.start) / speeds[block.rank] for block in blocks)
    least = int(count >= len(speed))  # of each rank
    for time in sorted({n / s for s in speed for n in range(1, count + 1)}):
        if sum(max(least, math.floor(time * s + 1e-9)) for s in speed) >= count and time >= least / min(speed) - 1e-9:
            earliest = time
            break
    if len(set(speed)) > 1:
        assert end == pytest.approx(earliest)
        assert len(blocks) == len(speed) or count < len(speed)
