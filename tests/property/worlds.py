"""Strategies: models, layouts, histories of losses and joins, and what survivors may report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st

from everstep.resharding.layout import Layout, Stage
from everstep.resharding.plan import Report
from everstep.resharding.planners import change_layout, deal_micro_batches, deal_shards, initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec
from everstep.resharding.work import Leg

ROW = 1 << 14  # float32 elements: one row is the smallest shard


@st.composite
def models(draw, max_layers: int = 5) -> ModelSpec:
    """A few layers with parameters of odd sizes, scalars, empty and tied ones among them."""
    layers = draw(st.integers(1, max_layers))
    costs = tuple(draw(st.lists(st.floats(0.1, 10.0), min_size=layers, max_size=layers)))
    parameters = []
    for layer in range(layers):
        for number in range(draw(st.integers(0, 3))):
            shape = draw(st.sampled_from([(), (0, 3), (5,), (3, ROW), (2, ROW // 2), (7, ROW + 1), (33, 100)]))
            parameters.append(ParameterSpec(f"{layer}.{number}", shape, "float32", 4, (layer,)))
    for number in range(draw(st.integers(0, 2)) if layers > 1 else 0):
        held = draw(st.sets(st.integers(0, layers - 1), min_size=2))
        parameters.append(ParameterSpec(f"tied.{number}", (4, ROW), "float32", 4, tuple(sorted(held))))
    return ModelSpec(costs, tuple(parameters), draw(st.booleans()))


def layouts_of(spec: ModelSpec, old: Layout, stages: int, speeds: dict[int, float]) -> Iterator[Layout]:
    """Every layout of the ranks of `old` in so many stages."""
    for places in itertools.product(range(stages), repeat=len(old.ranks)):
        groups = [tuple(r for r, at in zip(old.ranks, places, strict=True) if at == i) for i in range(stages)]
        if not all(groups):
            continue
        for inner in itertools.combinations(range(1, spec.layers), stages - 1):
            bounds = [0, *inner, spec.layers]
            cut = [
                Stage(a, b, g, deal_micro_batches(old.micro_batches, g, speeds))
                for g, a, b in zip(groups, bounds[:-1], bounds[1:], strict=True)
            ]
            holders = {layer: s.ranks for s in cut for layer in range(s.start, s.stop)}
            yield Layout(3, old.micro_batches, tuple(cut), deal_shards(spec, holders, old.owners), tuple(cut))


@st.composite
def layouts(draw, spec: ModelSpec, max_ranks: int = 6) -> Layout:
    """The layout a job of some size starts with."""
    stages = draw(st.integers(1, min(spec.layers, max_ranks)))
    ranks = draw(st.integers(stages, max_ranks))
    return initial_layout(spec, range(ranks), stages, draw(st.integers(1, 9)))


@st.composite
def histories(draw) -> tuple[ModelSpec, list[Layout]]:
    """A model, and the layouts of a job that workers leave, return to and join."""
    spec = draw(models())
    history = [draw(layouts(spec))]
    ranks = set(history[0].ranks)
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            ranks = ranks | {max(ranks) + 1}
        live = draw(st.sets(st.sampled_from(sorted(ranks)), min_size=1))
        history.append(change_layout(spec, history[-1], live, history[-1].generation + 1))
    return spec, history


@dataclass(frozen=True)
class Loss:
    """A loss: the layout before it, and what the live workers report."""

    spec: ModelSpec
    layout: Layout
    reports: tuple[Report, ...]
    step: int


@st.composite
def losses(draw) -> Loss:
    """Some ranks die in step `step`; some survivors may have passed its agreement, others may be torn or new."""
    spec, history = draw(histories())
    layout, step = history[-1], draw(st.integers(1, 3))
    survivors = draw(st.sets(st.sampled_from(layout.ranks), min_size=1))
    somebody_agreed = draw(st.booleans())
    reports = [
        _report(draw, spec, layout, rank, step, somebody_agreed and (draw(st.booleans()) or rank == min(survivors)))
        for rank in sorted(survivors)
    ]
    gone = sorted(set(layout.ranks) - survivors)
    fresh = draw(st.sets(st.sampled_from([*gone, max(layout.ranks) + 1])))
    reports += [Report(rank=rank, generation=0, fresh=True) for rank in sorted(fresh)]
    return Loss(spec, layout, tuple(draw(st.permutations(reports))), step)


def _report(draw, spec: ModelSpec, layout: Layout, rank: int, step: int, agreed: bool) -> Report:
    stage = layout.stage_of(rank)
    spans = [Leg(*segment[1:]) for segment in layout.segments() if segment.rank == rank]
    states = [draw(st.sampled_from(["todo", "started", "held"])) for _ in spans]
    torn = agreed or draw(st.integers(0, 4)) == 0
    return Report(
        rank=rank,
        generation=layout.generation,
        owned_version=step + (agreed and draw(st.booleans())),
        owned=tuple(shard for shard, owner in enumerate(layout.owners) if owner == rank),
        values_version=-1 if torn else step,
        layers=(stage.start, stage.stop),
        agreed=step if agreed else step - 1,
        agreement=f"agreement of {step if agreed else step - 1}",
        **{
            kind: tuple(span for span, state in zip(spans, states, strict=True) if state == kind and not torn)
            for kind in ("held", "started", "todo")
        },
    )
