"""A simulated worker's step: the contract of `StepState` and `Pipeline`, with hashes for tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from everstep.resharding.work import Segment, Span

from .links import Key, Links
from .values import (
    backwarded,
    forwarded,
    loss_gradient,
    mixed,
)
from .world import Steps


@dataclass
class StepState:
    """Step `step` as one rank sees it."""

    step: int
    rank: int
    work: tuple[Segment, ...]
    kept: tuple[Segment, ...] = ()
    todo: list[Span] = field(default_factory=list)
    started: dict[Span, list[str]] = field(default_factory=dict)  # span -> the inputs of its layers, then its output
    held: set[Span] = field(default_factory=set)
    sums: dict[int, dict[int, str]] = field(default_factory=dict)  # layer -> micro-batch -> leaf
    outputs: dict[tuple[int, int], str] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def begin(cls, step: int, rank: int, work: tuple[Segment, ...]) -> StepState:
        return cls(step, rank, work, todo=sorted(Span(*s[1:]) for s in work if s.rank == rank))

    def resume(self, work: tuple[Segment, ...], kept: tuple[Segment, ...], started: tuple[Segment, ...]) -> None:
        """Go on with the work of a plan."""
        self.work, self.kept = work, kept
        ours = {Span(*s[1:]) for s in work if s.rank == self.rank}
        theirs = {Span(*s[1:]) for s in started if s.rank == self.rank}
        self.started = {span: graph for span, graph in self.started.items() if span in ours and span in theirs}
        self.todo = sorted(ours - set(self.started))

    def contributors(self) -> dict[int, set[int]]:
        """layer -> the ranks that will hold a part of its sum."""
        found: dict[int, set[int]] = {}
        for segment in (*self.work, *self.kept):
            for layer in range(segment.start, segment.stop):
                found.setdefault(layer, set()).add(segment.rank)
        return found

    def following(self, span: Span) -> Segment | None:
        """The segment still to run that takes this span's output."""
        return next((s for s in self.work if s.micro_batch == span.micro_batch and s.start == span.stop), None)

    def before(self, span: Span) -> Segment | None:
        """The segment still to run that waits for this span's input gradient."""
        return next((s for s in self.work if s.micro_batch == span.micro_batch and s.stop == span.start), None)

    def source(self, micro_batch: int, *, start: int = -1, stop: int = -1) -> int:
        """The rank that has, or will have, the segment that starts, or stops, there."""
        return _rank_of((*self.work, *self.kept), micro_batch, start, stop)


def _rank_of(segments: Iterable[Segment], micro_batch: int, start: int, stop: int) -> int:
    for segment in segments:
        if segment.micro_batch == micro_batch and (segment.start == start or segment.stop == stop):
            return segment.rank
    raise AssertionError(f"nobody computes micro-batch {micro_batch} from {start} or to {stop}")


class Pipeline:
    """Runs a rank's segments, backward first, at most `depth` in flight."""

    def __init__(self, links: Links, layers: int, values: Callable[[int], Sequence[str]], forward_s: float) -> None:
        self._links = links
        self._layers = layers
        self._values = values
        self._forward_s = forward_s
        self.mark: Callable[[str], None] = lambda phase: None

    def resend(self, state: StepState, started: Iterable[Segment]) -> None:
        """After a change of generation: send again what others need of the work already done here."""
        elsewhere = {Span(*segment[1:]) for segment in started}
        for span in (*sorted(state.held), *sorted(state.started)):
            following = state.following(span)
            if following is not None and Span(*following[1:]) not in elsewhere:
                self._send_activation(state, span, following.rank)
        for span in sorted(state.held):
            before = state.before(span)
            if before is not None:
                self._send_gradient(state, span, before.rank)

    def run(self, state: StepState, depth: int) -> Steps[None]:
        """Finish this rank's work of the step."""
        while state.todo or state.started:
            self._links.check()
            gradients: Mapping[tuple[int, Key], Span] = {
                (
                    state.source(span.micro_batch, start=span.stop),
                    ("gradient", state.step, span.micro_batch, span.stop),
                ): span
                for span in state.started
            }
            arrived = self._links.ready(gradients)
            if arrived is not None:
                data = yield from self._links.receive(*arrived)
                yield from self._backward(state, gradients[arrived], data)
                continue
            span = self._next_forward(state, depth)
            if span is None:
                source, key, data = yield from self._links.receive_any(gradients)
                yield from self._backward(state, gradients[(source, key)], data)
            elif span.start == 0:
                yield from self._forward(state, span, mixed("data", state.step, span.micro_batch))
            else:
                upstream = state.source(span.micro_batch, stop=span.start)
                wanted: tuple[int, Key] = (upstream, ("activation", state.step, span.micro_batch, span.start))
                source, key, data = yield from self._links.receive_any([wanted, *gradients])
                if (source, key) == wanted:
                    yield from self._forward(state, span, data)
                else:
                    yield from self._backward(state, gradients[(source, key)], data)

    @staticmethod
    def _next_forward(state: StepState, depth: int) -> Span | None:
        if not state.todo:
            return None
        span = state.todo[0]
        lowest = min((s.micro_batch for s in state.started), default=span.micro_batch)
        return span if len(state.started) < depth or span.micro_batch <= lowest else None

    def _forward(self, state: StepState, span: Span, value: str) -> Steps[None]:
        self.mark("compute")
        yield self._forward_s * (span.stop - span.start)
        inputs = [value]
        for layer in range(span.start, span.stop):
            inputs.append(forwarded(layer, tuple(self._values(layer)), inputs[-1]))
        state.todo.remove(span)
        if span.stop == self._layers:
            self._finish(state, span, inputs, loss_gradient(state.step, span.micro_batch, inputs[-1]))
            return
        state.outputs[(span.stop, span.micro_batch)] = inputs[-1]
        state.started[span] = inputs
        following = state.following(span)
        if following is not None:
            self._send_activation(state, span, following.rank)

    def _backward(self, state: StepState, span: Span, gradient: str) -> Steps[None]:
        self.mark("compute")
        yield 2 * self._forward_s * (span.stop - span.start)
        self._finish(state, span, state.started.pop(span), gradient)

    def _finish(self, state: StepState, span: Span, inputs: list[str], gradient: str) -> None:
        for layer in reversed(range(span.start, span.stop)):
            value = inputs[layer - span.start]
            gradient, leaf = backwarded(layer, tuple(self._values(layer)), value, gradient)
            leaves = state.sums.setdefault(layer, {})
            if span.micro_batch in leaves:
                raise AssertionError(f"micro-batch {span.micro_batch} of layer {layer} was added twice to one sum")
            leaves[span.micro_batch] = leaf
        state.held.add(span)
        if span.start > 0:
            state.input_gradients[(span.start, span.micro_batch)] = gradient
            before = state.before(span)
            if before is not None:
                self._send_gradient(state, span, before.rank)

    def _send_activation(self, state: StepState, span: Span, to: int) -> None:
        value = state.outputs[(span.stop, span.micro_batch)]
        self._links.send(to, ("activation", state.step, span.micro_batch, span.stop), value)

    def _send_gradient(self, state: StepState, span: Span, to: int) -> None:
        value = state.input_gradients[(span.start, span.micro_batch)]
        self._links.send(to, ("gradient", state.step, span.micro_batch, span.start), value)
