"""The pipeline executor: runs a rank's segments of a step, forwards and backwards, in any order that inputs allow.

`StepWork` decides the next operation. The order does not affect the result: every micro-batch's gradient is a leaf of
the canonical sum, and the random numbers of a layer are a function of (seed, step, micro-batch, layer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everstep.comms.mesh.communicator import Communicator, Key, Kind
from everstep.comms.mesh.tensors import aligned, decode, encode, settled
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice
from everstep.elastic.contract.progress import Progress, StepPhase
from everstep.elastic.contract.telemetry import Spent
from everstep.elastic.holding.buffer_rules import leaf
from everstep.elastic.holding.stack import Held, LayerStack
from everstep.elastic.holding.watch import content_of
from everstep.elastic.protocol.liveness import Pace
from everstep.resharding.legs import Await, Backward, Need
from everstep.resharding.work import AssignedLeg, Leg

from .canonical import accumulation_dtype
from .devices import seed_generators, to_device
from .early_parts import EarlyParts
from .forwards import Forwards
from .layer_times import LayerSample, LayerTimes
from .order import StepSize, derive_seed
from .reduction import Reduction
from .repetition import Repetition, copied
from .steps import Graph, StepState
from .stream_states import StreamStates

Batch = tuple[Any, Any]


class Pipeline:
    """Runs segments for one rank. `fetch(step, micro_batch)` returns (inputs, targets)."""

    def __init__(
        self,
        stack: LayerStack,
        comm: Communicator,
        progress: Progress,
        seed: int,
        fetch: Callable[[int, int], Batch],
        loss_fn: Callable[[Any, Any], Any],
        reduction: Reduction,
        warn: Callable[[Notice, str], None],
        early: EarlyParts,
        carried: StreamStates,
    ) -> None:
        self.stack = stack
        self.early = early
        self._carried = carried
        self.forwards = Forwards(stack, partial(warn, Notice.ATTRIBUTE_CHANGED))
        self.repetition = Repetition(stack, partial(warn, Notice.TURN_NOT_REPEATABLE))
        self.comm = comm
        self.progress = progress
        self.seed = seed
        self.fetch = fetch
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.base_statistics: dict[int, list[Tensor]] = {}
        self._undisturbed: set[int] = set()  # layers whose buffers no forward of the step has had yet
        self._warn = warn
        self._layer_times = LayerTimes(lambda number: stack.device_of(number).type == "cpu")

    def resend(self, state: StepState, started: Iterable[AssignedLeg]) -> None:
        """After a change of the membership: send again what others need of the work that is done here."""
        for item in state.resends(started):
            send = self._send_activation if item.kind == "activation" else self._send_gradient
            send(state, item.leg, item.to)

    def run(self, state: StepState, depth: int) -> None:
        """Complete this rank's work of the step. Raises Aborted between two micro-batches when the generation ends."""
        while not state.done:
            self.comm.ready(())  # raises Aborted
            gradients = {_key(need, state.step): need for need in state.gradients()}
            arrived = self.comm.ready(gradients)
            action = state.next(depth, gradients[arrived] if arrived is not None else None)
            data: Tensor | None = None
            if isinstance(action, Await):
                needs = {_key(need, state.step): then for need, then in action.needs.items()}
                source, key, data = self.comm.receive_any(needs)
                action = needs[(source, key)]
            elif arrived is not None:
                data = self.comm.receive(*arrived)
            if isinstance(action, Backward):
                assert data is not None
                self._backward(state, action.leg, data)
            else:
                self._forward(state, action.leg, data)

    def _forward(self, state: StepState, span: Leg, data: Tensor | None) -> None:
        self.progress.mark(StepPhase.COMPUTE, state.step, finished=len(state.held))
        inputs: list[Tensor | None] = []
        value: Any
        targets: Any = None
        is_last = span.stop == len(self.stack.layers)
        telemetry, started_ns = self.progress.telemetry, time.monotonic_ns()
        if data is None or is_last:
            with self.progress.within(Pace.FETCH):
                first, targets = self.fetch(state.step, span.micro_batch)
            counted = tokens_and_samples(first) if data is None else (0, 0.0)
            telemetry.span(Spent.FETCH, started_ns, micro_batch=span.micro_batch, amount=counted[0], value=counted[1])
            started_ns = time.monotonic_ns()
        if data is None and is_last:
            self._repeat(state, span, first, targets)
            started_ns = time.monotonic_ns()
        if data is None:
            value = to_device(first, self.stack.device_of(span.start))
        else:
            inputs = decode(data, self.stack.device_of(span.start))
            for tensor in inputs:
                if tensor is not None and tensor.is_floating_point():
                    tensor.requires_grad_()
            received = tuple(map(_changeable, inputs))
            value = received[0] if len(received) == 1 else received
        statistics: dict[int, list[Tensor]] = {}
        self._carried.enter(state.step, span.micro_batch)
        sample = self._layer_times.sample(state, span)
        for number in range(span.start, span.stop):
            layer_ns = time.monotonic_ns()
            value = self.apply(number, state, span.micro_batch, value, statistics)
            if sample is not None:
                sample.forwarded(layer_ns, value)
            if number + 1 < span.stop:
                value = _handed_on(value)
        if is_last:
            loss, tokens = self._loss(state, span, value, targets)
            weight = self.reduction.weight(state.size, span.micro_batch)
            state.losses[span.micro_batch], state.tokens[span.micro_batch] = weight * float(loss.detach()), tokens
            value = self.reduction.loss_scale.scaled(loss)
            if sample is not None:
                sample.lost()
        outputs = list(value) if isinstance(value, tuple | list) else [value]
        telemetry.span(Spent.FORWARD, started_ns, micro_batch=span.micro_batch)
        graph = Graph(inputs, outputs, statistics, sample)
        if is_last:
            self._finish(state, span, graph, None)
            self._carried.leave()
            return
        state.outputs[(span.stop, span.micro_batch)] = [output.detach() for output in outputs]
        state.graphs[span] = graph
        state.forwarded(span)
        following = state.work.next_segment(span)
        if following is not None:
            self._send_activation(state, span, following.rank)

    def _repeat(self, state: StepState, span: Leg, first: Any, targets: Any) -> None:
        """Compute the rank's first micro-batch of some steps ahead, and drop its gradients: see `Repetition`."""
        due = self.repetition.is_due(state.step) and not state.held and not state.running
        batch = copied((first, targets)) if due else None
        if batch is None:
            return
        value = to_device(batch[0], self.stack.device_of(span.start))
        self._carried.enter(state.step, span.micro_batch)
        for number in range(span.start, span.stop):
            value = self.apply(number, state, span.micro_batch, value, {})
            if number + 1 < span.stop:
                value = _handed_on(value)
        loss, _ = self._loss(state, span, value, batch[1])
        torch.autograd.backward([self.reduction.loss_scale.scaled(loss)])
        self.repetition.remember()
        self.drop_gradients(span)
        self._carried.leave()

    def _loss(self, state: StepState, span: Leg, output: Any, targets: Any) -> tuple[Tensor, int]:
        """A micro-batch's loss, and the number of its tokens."""
        self._seed(state.step, span.micro_batch, span.stop)
        returned = self.loss_fn(output, to_device(targets, self.stack.device_of(span.stop - 1)))
        return self.reduction.measured(returned, self.loss_fn, state.step, span.micro_batch)

    def apply(
        self, number: int, state: StepState, micro_batch: int, value: Any, statistics: dict[int, list[Tensor]]
    ) -> Any:
        """One layer's forward: its own random numbers, batch-norm statistics as at the start of the step."""
        layer = self.stack.layers[number]
        self.restore_statistics(number)
        self._seed(state.step, micro_batch, number)
        self.forwards.before(number)
        value = layer.module(value)
        self.forwards.after(number)
        statistics[number] = self.take_statistics(number, micro_batch, state.size)
        return value

    def restore_statistics(self, number: int) -> None:
        """Before a micro-batch's forward: the buffers that it changes have the values from the start of the step.

        A declared one is lent as a copy: the backward of another micro-batch may need what that forward has seen.
        """
        if number in self._undisturbed:
            self._undisturbed.remove(number)
            self._compare_statistics(number)
        for held, base in zip(self._buffers(number), self.base_statistics.get(number, ()), strict=False):
            if held.places:
                lent = base.clone()
                for module, local in held.places:
                    module._buffers[local] = lent
            else:
                held.tensor.data.copy_(base)  # not seen by autograd: no graph in flight uses a batch norm's statistics

    def _compare_statistics(self, number: int) -> None:
        """Warn where the script's code in front of the step has changed buffers, which now get their values again."""
        for held, base in zip(self._buffers(number), self.base_statistics.get(number, ()), strict=False):
            if content_of(_now(held)) != content_of(base):
                name = self.stack.spec.parameters[held.index].name
                text = (
                    f"the script changed the buffer {name!r} in front of a step, as a forward in training mode does: "
                    "the change is dropped, since a step begins with what the one before it made of its micro-batches. "
                    "Call model.eval() before such a forward, or copy the model for it; behind the loop it stays"
                )
                self._warn(Notice.BUFFER_RESTORED, text)
                return

    def take_statistics(self, number: int, micro_batch: int, size: StepSize) -> list[Tensor]:
        """What a micro-batch's forward made of the buffers of a layer, as their rules sum it."""
        is_last, weight, found = micro_batch == size.micro_batches - 1, size.weight(micro_batch), []
        for held, base in zip(self._buffers(number), self.base_statistics[number], strict=True):
            assert held.rule is not None
            before, after = (_flat(tensor.detach().clone()) for tensor in (base, _now(held)))
            taken = leaf(held.rule, before, after, is_last=is_last)
            found.append(taken * weight if held.rule == "mean" and weight != 1 else taken)
            _give_back(held)
        return found

    def begin_step(self) -> None:
        """Record the batch-norm statistics from which every micro-batch of the step starts."""
        self.forget_statistics()
        self.extend_step()
        self._undisturbed = set(self.base_statistics)

    def forget_statistics(self) -> None:
        """The step is computed: from here on the buffers are those of the next version."""
        self.base_statistics = {}
        self._undisturbed.clear()

    def extend_step(self) -> None:
        """The same for layers that this rank gained in the middle of the step."""
        for number in self.stack.held:
            if number not in self.base_statistics:
                self.base_statistics[number] = [held.tensor.detach().clone() for held in self._buffers(number)]

    def end_step(self) -> None:
        """Reset the buffers to the start of the step, before they are updated."""
        for number in self.base_statistics:
            if number in self.stack.held:
                for held, base in zip(self._buffers(number), self.base_statistics[number], strict=True):
                    held.tensor.data.copy_(base)
                    _give_back(held)

    def _buffers(self, number: int) -> list[Held]:
        return [held for held in self.stack.layers[number].parameters if held.rule is not None]

    def seed_forward(self, step: int, micro_batch: int) -> None:
        """Seed the generators for a turn of the user's loop."""
        self._seed(step, micro_batch, 0)

    def _seed(self, step: int, micro_batch: int, layer: int) -> None:
        """Not all data is fetched in this process, nor by every rank, so what fetching leaves is not relied on."""
        seed_generators(derive_seed("forward", self.seed, step, micro_batch, layer))

    def _backward(self, state: StepState, span: Leg, data: Tensor) -> None:
        self.progress.mark(StepPhase.COMPUTE, state.step, finished=len(state.held))
        self._finish(state, span, state.graphs.pop(span), decode(data, self.stack.device_of(span.stop - 1)))

    def _finish(self, state: StepState, span: Leg, graph: Graph, gradients: Sequence[Tensor | None] | None) -> None:
        """The backward of a span: its gradients become leaves of the sums, and the input's gradient goes upstream."""
        started_ns = time.monotonic_ns()
        pairs = [
            (output, gradient)
            for output, gradient in zip(graph.outputs, gradients or [None] * len(graph.outputs), strict=True)
            if output.requires_grad and (gradients is None or gradient is not None)
        ]
        self.begin_backward(state, span)
        backward_ns = time.monotonic_ns()
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        if graph.sample is not None:
            graph.sample.backward(backward_ns)
        self.repetition.compare()
        self.harvest(state, span, graph.statistics, graph.sample)
        if graph.sample is not None:
            graph.sample.write(self.progress.telemetry)
        self.progress.telemetry.span(Spent.BACKWARD, started_ns, micro_batch=span.micro_batch)
        if span.start > 0:
            found = [_gradient(tensor) for tensor in graph.inputs]
            state.input_gradients[(span.start, span.micro_batch)] = found
            before = state.work.previous_segment(span)
            if before is not None:
                self._send_gradient(state, span, before.rank)
        self.progress.mark(StepPhase.COMPUTE, state.step, finished=len(state.held))

    def begin_backward(self, state: StepState, span: Leg) -> None:
        """A backward follows: what it makes of gradients in this rank's last one of the step goes to their owners."""
        self.early.begin(state, span, self.reduction.weight(state.size, span.micro_batch))

    def harvest(
        self, state: StepState, span: Leg, statistics: dict[int, list[Tensor]], sample: LayerSample | None = None
    ) -> None:
        """Move the gradients of a micro-batch from the parameters into the sums."""
        weight = self.reduction.weight(state.size, span.micro_batch)
        for number in range(span.start, span.stop):
            layer, layer_ns = self.stack.layers[number], time.monotonic_ns()
            after = iter(statistics.get(number, ()))
            leaves: list[Tensor] = []
            for at, held in enumerate(layer.parameters):
                if held.rule is not None:
                    leaves.append(next(after))
                    continue
                gradient, given = self._gradient(held), held.tensor.grad is not None
                leaves.append(gradient * weight if weight != 1 else gradient)
                self.early.taken(number, at, span.micro_batch, leaves[-1], given=given)
                if given:
                    state.touched.add(held.index)
                held.tensor.grad = None
            largest = [at for at, held in enumerate(layer.parameters) if held.rule == "max"]
            state.hold(span, number, leaves, largest)
            if sample is not None:
                sample.harvested(layer_ns)
        state.finished(span)

    def _gradient(self, held: Held) -> Tensor:
        gradient, dtype = held.tensor.grad, accumulation_dtype(held.tensor.dtype)
        if gradient is None:
            return torch.zeros(held.tensor.numel(), dtype=dtype, device=held.tensor.device)
        if gradient.layout != torch.strided:
            if not self.reduction.densifies:
                raise UsageError(
                    f"parameter {self.stack.spec.parameters[held.index].name!r} has a sparse gradient: let the runtime "
                    'make it dense by run.prepare or run.steps(..., sparse_gradients="dense"), or use sparse=False in '
                    "its layer"
                )
            gradient = gradient.to_dense()
        return gradient.reshape(-1).to(dtype)

    def drop_gradients(self, span: Leg) -> None:
        """Drop the gradients of a micro-batch that is no longer this rank's."""
        for number in range(span.start, span.stop):
            for held in self.stack.layers[number].parameters:
                held.tensor.grad = None

    def _send_activation(self, state: StepState, span: Leg, to: int) -> None:
        key = Key(Kind.ACTIVATION, state.step, span.micro_batch, span.stop)
        self.comm.send(to, key, encode(state.outputs[(span.stop, span.micro_batch)]))

    def _send_gradient(self, state: StepState, span: Leg, to: int) -> None:
        key = Key(Kind.GRADIENT, state.step, span.micro_batch, span.start)
        self.comm.send(to, key, encode(state.input_gradients[(span.start, span.micro_batch)]))


def _now(held: Held) -> Tensor:
    """A buffer as the forward has left it, which may be another tensor."""
    for module, local in held.places:
        found = module._buffers[local]
        if found is None or found.shape != held.shape:
            raise UsageError(
                f"a forward has made {_shape(found)} of the buffer {local!r} of {type(module).__name__}, and the job "
                f"keeps {_shape(held.tensor)}: keep its shape"
            )
        return found
    return held.tensor


def _give_back(held: Held) -> None:
    """The buffer is the job's own tensor again."""
    for module, local in held.places:
        module._buffers[local] = held.tensor


class _Received(torch.autograd.Function):
    """An input from another rank, as the output of an operation: a layer may change it in place, and no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _changeable(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.requires_grad:
        return tensor
    return _Received.apply(tensor)  # type: ignore[no-untyped-call]


def _handed_on(value: Any) -> Any:
    """A layer's outputs as the next layer would get them from another rank: that one may be on this rank, or not."""
    if isinstance(value, Tensor):
        return _settled(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_handed_on, value))
    return type(value)(map(_handed_on, value)) if isinstance(value, tuple | list) else value


def _settled(tensor: Tensor) -> Tensor:
    """The tensor as it would arrive, and so its gradient, in the strides of the values."""
    found = settled(tensor)
    if found.requires_grad:
        strides = found.stride()
        found.register_hook(lambda gradient: _laid_out(gradient, strides))  # type: ignore[no-untyped-call]
    return found


def _gradient(tensor: Tensor | None) -> Tensor | None:
    """Of an input that came from another rank, if it has one."""
    return None if tensor is None or tensor.grad is None else _laid_out(tensor.grad, tensor.stride())


def _laid_out(gradient: Tensor, strides: Sequence[int]) -> Tensor:
    """The gradient in memory with these strides."""
    if gradient.stride() == strides:
        return aligned(gradient)
    copy = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
    return copy.copy_(gradient)


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"


def _flat(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype)).reshape(-1)


def _key(need: Need, step: int) -> tuple[int, Key]:
    kind = Kind.ACTIVATION if need.kind == "activation" else Kind.GRADIENT
    return need.source, Key(kind, step, need.micro_batch, need.boundary)


def tokens_and_samples(inputs: Any) -> tuple[int, float]:
    """The number of tokens (0 unless inputs are text: integers in two dimensions) and of samples in a micro-batch."""
    parts = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else (inputs,)
    )
    tensor = next((part for part in parts if isinstance(part, Tensor)), None)
    if tensor is None or not tensor.dim():
        return 0, 0.0
    text = tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex()
    return (tensor.numel() if text else 0), float(tensor.shape[0])
