"""What a micro-batch costs in each layer, from what all ranks report: seconds on a rank of speed 1.

A layer's cost is the lower quartile of its newest reports, from whichever ranks held it: what else a machine does adds
to some of them, and takes from none. A layer keeps its cost when it moves. A report of a slow rank is multiplied by its
speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.events import CostsMeasured
from everstep.elastic.protocol.rebalancing import costs_differ
from everstep.elastic.protocol.state import State
from everstep.resharding.forecast import Costs, speed_of

WINDOW = 16  # reports, each the median of what a rank has measured in about a second
LEAST = 2  # of every layer, before any cost is known

Report = tuple[float, float]
"""Seconds of a forward, and of a backward."""


class LayerCosts:
    """Not thread-safe: the observer's lock guards it. Bounded by the number of layers."""

    def __init__(self) -> None:
        self._reports: dict[int, deque[Report]] = {}  # by layer, oldest first

    def take(self, telemetry: pb.Telemetry, speeds: Mapping[int, float]) -> None:
        """Take an agent's report."""
        for times in telemetry.layers:
            speed = speed_of(speeds, times.rank)
            for layer, forward_s, backward_s in zip(times.layer, times.forward_s, times.backward_s, strict=True):
                reports = self._reports.setdefault(layer, deque(maxlen=WINDOW))
                reports.append((forward_s * speed, backward_s * speed))

    def costs(self, layers: int) -> Costs | None:
        """Of a model of so many layers; None until all were reported often enough."""
        reports = [self._reports.get(layer, ()) for layer in range(layers)]
        if not layers or min(map(len, reports)) < LEAST:
            return None
        forward, backward = ([_low_quartile([report[i] for report in of]) for of in reports] for i in range(2))
        return Costs(tuple(forward), tuple(backward))

    def news(self, state: State) -> CostsMeasured | None:
        """The costs, if they differ from those that the coordinator knows."""
        found = self.costs(state.job.model.layers) if state.job is not None else None
        if found is None or (state.costs is not None and not costs_differ(found, state.costs)):
            return None
        return CostsMeasured(found)


def _low_quartile(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4]
