"""Step times after losses in virtual time, under several policies: what `after_loss.py --simulated` prints.

All by the same forecast, which runs the product's order of work (`resharding/forecast.py`), with layers of equal costs
and links that take no time. The global batch stays. Nothing here is measured.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from everstep.resharding.forecast import Costs, bound, step_time
from everstep.resharding.layout import Layout
from everstep.resharding.planners import change_layout, initial_layout, partition
from everstep.resharding.rebalance import rebalance
from everstep.resharding.units import ModelSpec, ParameterSpec

LOSSES = (1, 2, 3)


class Shape(NamedTuple):
    """A job."""

    stages: int
    width: int  # ranks per stage
    layers: int
    micro_batches: int
    draws: int  # of which ranks are lost


SHAPES = {
    "4x2": Shape(4, 2, 16, 32, 4),
    "8x2": Shape(8, 2, 32, 32, 4),
    "4x4": Shape(4, 4, 16, 64, 4),
    "96 ranks, 12x8": Shape(12, 8, 48, 128, 1),
    "1024 ranks, 16x64": Shape(16, 64, 64, 320, 1),
}


def drawn(shape: Shape, lost: int, seed: int) -> tuple[int, ...]:
    """The ranks that are lost: any, but each stage keeps one."""
    rng = random.Random(seed)
    while True:
        victims = tuple(rng.sample(range(shape.stages * shape.width), lost))
        if max(Counter(rank // shape.width for rank in victims).values()) < shape.width:
            return victims


def resized_and_migrated(layout: Layout, costs: Costs) -> float:
    """As in ElasWave's abstract: micro-batches are dealt again and layers move; ranks stay in their stages."""
    bounds = partition(costs.total, [len(stage.ranks) for stage in layout.stages])
    stages = tuple(replace(s, start=a, stop=b) for s, (a, b) in zip(layout.stages, pairwise(bounds), strict=True))
    return min(step_time(layout, costs, {}), step_time(replace(layout, stages=stages), costs, {}))


def times(shape: Shape, victims: Sequence[int]) -> dict[str, float]:
    """The step time of each policy over that before the loss."""
    parameters = tuple(ParameterSpec(f"p{i}", (8, 8), "float32", 4, (i,)) for i in range(shape.layers))
    spec = ModelSpec((1.0,) * shape.layers, parameters)
    costs, ranks = Costs.of(spec), range(shape.stages * shape.width)
    whole = initial_layout(spec, ranks, shape.stages, shape.micro_batches)
    rerouted = change_layout(spec, whole, set(ranks) - set(victims), 2)
    found = rebalance(spec, rerouted, 3)
    columns = shape.width - len({rank % shape.width for rank in victims})
    steps = {
        "ours": found.after if found else step_time(rerouted, costs, {}),
        "reroute only": step_time(rerouted, costs, {}),
        "reroute, no bubbles": bound(rerouted, costs, {}),
        "resize and migrate": resized_and_migrated(rerouted, costs),
    }
    if columns:  # else the job ends
        left = initial_layout(spec, range(shape.stages * columns), shape.stages, shape.micro_batches)
        steps["replica dropped"] = step_time(left, costs, {})
    before = step_time(whole, costs, {})
    return {name: seconds / before for name, seconds in steps.items()}


def simulated(shape: Shape, lost: int) -> dict[str, Any]:
    """Throughput over (N - k) / N of that before, of each policy: mean and least over some draws of the lost ranks."""
    left = 1 - lost / (shape.stages * shape.width)
    draws = [times(shape, drawn(shape, lost, seed)) for seed in range(shape.draws)]
    found: dict[str, Any] = {}
    for name in ("ours", "resize and migrate", "reroute only", "reroute, no bubbles", "replica dropped"):
        of_ideal = [1 / draw[name] / left if name in draw else 0.0 for draw in draws]
        found[name] = {"mean": round(statistics.mean(of_ideal), 3), "least": round(min(of_ideal), 3)}
    return found


def table(names: Sequence[str]) -> dict[str, Any]:
    """Of these shapes, by number of losses."""
    return {name: {str(lost): simulated(SHAPES[name], lost) for lost in LOSSES} for name in names}
