"""What each layer costs: one micro-batch of a step is timed layer by layer, its forward and its backward apart.

The micro-batch is another one in each step, in turn, so that no place in the step is preferred. In it a layer takes
about 20 microseconds longer. So steps are timed at most once in `PAUSE_S` for each layer, which is below 0.5% of any
step. Only layers in host memory are timed: elsewhere a call returns before its work is done.

Autograd runs the backward of a leg in one call. A hook on what a layer gave to the next one notes when the gradient of
that is complete: the backward of the next layer is over then, with the gradients of its parameters, which autograd
takes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from everstep.elastic.contract.telemetry import Spent, Telemetry
from everstep.resharding.legs import StepWork
from everstep.resharding.work import Leg

PAUSE_S = 0.005  # times the layers of a leg: from one that is timed to the next


class LayerSample:
    """The times of one leg's layers, in nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self._forwards: list[tuple[int, int]] = []  # of each layer: start, end
        self._reached_ns: dict[int, int] = {}  # layer -> when the gradient of what it was given was complete
        self._backward: tuple[int, int] = (0, 0)
        self._harvest_ns: list[int] = []

    def forwarded(self, started_ns: int, value: Any) -> None:
        """The next layer's forward is over; `value` is what it gives to the one behind it."""
        self._forwards.append((started_ns, time.monotonic_ns()))
        following = self.leg.start + len(self._forwards)
        if following == self.leg.stop:
            return
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:  # a hook on a leaf would outlive the step
                tensor.register_hook(partial(self._reached, following))  # type: ignore[no-untyped-call]

    def lost(self) -> None:
        """The loss is computed: it belongs to the last layer."""
        self._forwards[-1] = self._forwards[-1][0], time.monotonic_ns()

    def _reached(self, layer: int, gradient: Tensor) -> None:
        self._reached_ns[layer] = time.monotonic_ns()

    def backward(self, started_ns: int) -> None:
        """Autograd has run the whole backward."""
        self._backward = started_ns, time.monotonic_ns()

    def harvested(self, started_ns: int) -> None:
        """The next layer's gradients are in the sums."""
        self._harvest_ns.append(time.monotonic_ns() - started_ns)

    def backwards_ns(self) -> Sequence[int]:
        """The backward of each layer. Where no gradient reached a layer's input, the ones below it took no time."""
        began, reached = self._backward
        ends = []  # of each layer's backward
        for layer in range(self.leg.start, self.leg.stop):
            reached = self._reached_ns.get(layer, reached)
            ends.append(reached)
        times = [end - max(begin, began) for end, begin in zip(ends, (*ends[1:], began), strict=True)]
        return [max(0, ns) + harvest_ns for ns, harvest_ns in zip(times, self._harvest_ns, strict=True)]

    def write(self, telemetry: Telemetry) -> None:
        """One span for each layer."""
        layers = zip(self._forwards, self.backwards_ns(), strict=True)
        for layer, ((start_ns, end_ns), backward_ns) in enumerate(layers, self.leg.start):
            telemetry.span(
                Spent.LAYER,
                start_ns,
                micro_batch=self.leg.micro_batch,
                amount=layer,
                value=backward_ns / 1e9,
                end_ns=end_ns,
            )


class LayerTimes:
    """Chooses the leg of a step that is timed. `on_host`: whether a layer is in host memory."""

    def __init__(self, on_host: Callable[[int], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_host = on_host
        self._clock = clock
        self._due_s = 0.0  # when the next step may be timed
        self._step = -1
        self._passing = 0  # legs of this step that come before the one that is timed

    def sample(self, work: StepWork, leg: Leg) -> LayerSample | None:
        """The forward of a leg begins: what times it, if it is the one."""
        if work.step != self._step:
            self._step, self._passing = work.step, work.step % len(work.todo)
        self._passing -= 1
        if self._passing != -1 or self._clock() < self._due_s:
            return None
        if not all(map(self._on_host, range(leg.start, leg.stop))):
            return None
        self._due_s = self._clock() + PAUSE_S * (leg.stop - leg.start)
        return LayerSample(leg)
