"""The number of pipeline stages, where the planner chooses it (`stages="auto"`).

A stage more costs the time that its ranks wait for each other at both ends of a step, and saves the memory of layers
that a rank need not hold. So a job begins with the fewest stages for which its ranks have the memory, and goes to
another number when ranks are lost or join and that is faster, or when it is the only one for which there is memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .forecast import Costs
from .layout import Layout
from .memory import Memory
from .planners import initial_layout
from .rebalance import LEAST_GAIN, Proposal, moved_bytes, present_time, rebalance
from .relayout import relayout
from .units import ModelSpec


def fewest_stages(spec: ModelSpec, ranks: Sequence[int], micro_batches: int, memory: Memory, most: int) -> Layout:
    """The first layout, in the fewest stages for which the ranks have the memory; in `most` if none will do."""
    layout = initial_layout(spec, ranks, 1, micro_batches)
    for stages in range(2, 1 + min(most, len(ranks), spec.layers)):
        if memory.too_much(layout) is None:
            break
        layout = initial_layout(spec, ranks, stages, micro_batches)
    return layout


def restage(
    spec: ModelSpec,
    layout: Layout,
    generation: int,
    *,
    costs: Costs | None,
    speeds: Mapping[int, float],
    memory: Memory,
) -> Proposal | None:
    """As `rebalance`, but the number of stages may change: by one, or to one. Pure, as it is."""
    costs = costs or Costs.of(spec)
    before = present_time(layout, costs, speeds, memory)
    best = rebalance(spec, layout, generation, costs=costs, speeds=speeds, memory=memory)
    least = best.after if best is not None else (1 - LEAST_GAIN) * before
    for stages in sorted({1, len(layout.stages) - 1, len(layout.stages) + 1} - {0, len(layout.stages)}):
        if stages > min(len(layout.ranks), spec.layers):
            continue
        found = relayout(spec, layout, stages, generation, costs=costs, speeds=speeds)
        better = rebalance(spec, found, generation, costs=costs, speeds=speeds, memory=memory)
        found = better.layout if better is not None else found
        time = present_time(found, costs, speeds, memory)
        if time < least:
            least, best = time, Proposal(found, before, time, moved_bytes(spec, layout, found))
    return best
