"""A simulated worker's step: carries out what `StepWork` decides, on hashes instead of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from everstep.resharding.legs import Await, Backward, Need, StepWork
from everstep.resharding.work import AssignedLeg, Leg, Work

from .links import Key, Links
from .values import (
    backwarded,
    forwarded,
    loss_gradient,
    mixed,
)
from .world import Steps


@dataclass
class StepState(StepWork):
    """Step `step` as one rank sees it: its work, and its hashes."""

    graphs: dict[Leg, list[str]] = field(default_factory=dict)  # running leg -> the inputs of its layers, its output
    sums: dict[int, dict[int, str]] = field(default_factory=dict)  # layer -> micro-batch -> leaf
    outputs: dict[tuple[int, int], str] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int], str] = field(default_factory=dict)

    def resume(self, work: Work, started: Iterable[AssignedLeg]) -> None:
        """Continue with the work of a plan."""
        super().resume(work, started)
        self.graphs = {leg: graph for leg, graph in self.graphs.items() if leg in self.running}


class Pipeline:
    """Runs a rank's legs, at most `depth` in flight."""

    def __init__(self, links: Links, layers: int, values: Callable[[int], Sequence[str]], forward_s: float) -> None:
        self._links = links
        self._layers = layers
        self._values = values
        self._forward_s = forward_s
        self.mark: Callable[[str], None] = lambda phase: None

    def resend(self, state: StepState, started: Iterable[AssignedLeg]) -> None:
        """After a change of generation: send again what others need of the work that is done here."""
        for item in state.resends(started):
            send = self._send_activation if item.kind == "activation" else self._send_gradient
            send(state, item.leg, item.to)

    def run(self, state: StepState, depth: int) -> Steps[None]:
        """Complete this rank's work of the step."""
        while not state.done:
            self._links.check()
            gradients = {_key(need, state.step): need for need in state.gradients()}
            arrived = self._links.ready(gradients)
            action = state.next(depth, gradients[arrived] if arrived is not None else None)
            data = ""
            if isinstance(action, Await):
                needs = {_key(need, state.step): then for need, then in action.needs.items()}
                source, key, data = yield from self._links.receive_any(needs)
                action = needs[(source, key)]
            elif arrived is not None:
                data = yield from self._links.receive(*arrived)
            if isinstance(action, Backward):
                yield from self._backward(state, action.leg, data)
            else:
                yield from self._forward(state, action.leg, data or mixed("data", state.step, action.leg.micro_batch))

    def _forward(self, state: StepState, span: Leg, value: str) -> Steps[None]:
        self.mark("compute")
        yield self._forward_s * (span.stop - span.start)
        inputs = [value]
        for layer in range(span.start, span.stop):
            inputs.append(forwarded(layer, tuple(self._values(layer)), inputs[-1]))
        if span.stop == self._layers:
            self._finish(state, span, inputs, loss_gradient(state.step, span.micro_batch, inputs[-1]))
            return
        state.outputs[(span.stop, span.micro_batch)] = inputs[-1]
        state.graphs[span] = inputs
        state.forwarded(span)
        following = state.work.next_segment(span)
        if following is not None:
            self._send_activation(state, span, following.rank)

    def _backward(self, state: StepState, span: Leg, gradient: str) -> Steps[None]:
        self.mark("compute")
        yield 2 * self._forward_s * (span.stop - span.start)
        self._finish(state, span, state.graphs.pop(span), gradient)

    def _finish(self, state: StepState, span: Leg, inputs: list[str], gradient: str) -> None:
        for layer in reversed(range(span.start, span.stop)):
            value = inputs[layer - span.start]
            gradient, leaf = backwarded(layer, tuple(self._values(layer)), value, gradient)
            leaves = state.sums.setdefault(layer, {})
            if span.micro_batch in leaves:
                raise AssertionError(f"micro-batch {span.micro_batch} of layer {layer} was added twice to one sum")
            leaves[span.micro_batch] = leaf
        state.finished(span)
        if span.start > 0:
            state.input_gradients[(span.start, span.micro_batch)] = gradient
            before = state.work.previous_segment(span)
            if before is not None:
                self._send_gradient(state, span, before.rank)

    def _send_activation(self, state: StepState, span: Leg, to: int) -> None:
        value = state.outputs[(span.stop, span.micro_batch)]
        self._links.send(to, ("activation", state.step, span.micro_batch, span.stop), value)

    def _send_gradient(self, state: StepState, span: Leg, to: int) -> None:
        value = state.input_gradients[(span.start, span.micro_batch)]
        self._links.send(to, ("gradient", state.step, span.micro_batch, span.start), value)


def _key(need: Need, step: int) -> tuple[int, Key]:
    return need.source, (need.kind, step, need.micro_batch, need.boundary)
