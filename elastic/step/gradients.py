"""Detects that the user's loop changes gradients between backward and `optimizer.step()`.

Each turn of that loop has the gradient of one micro-batch. The step's gradient is the mean of all of them, computed
later: clipping or scaling between the two would apply to each micro-batch separately, with another result.

A write that autograd sees raises a gradient's version. One through `.data`, as in `p.grad.data.clamp_(-1, 1)`, shows in
the content alone, which is compared in a rank's first turn of each step; on a device, where that has the host wait, of
every hundredth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.watch import content_of

DEVICE_STEPS = 100  # contents of gradients on a device are compared in every so many steps


class GradientWatch:
    """The gradients as backward left them, recorded by a hook that torch calls after each accumulation."""

    def __init__(self, stack: LayerStack) -> None:
        self._names: dict[int, str] = {}  # id of a parameter -> its name
        # id of a parameter -> its gradient, how often it was written, and a hash of its content if that is compared
        self._left: dict[int, tuple[Tensor, int, int | None]] = {}
        self._hashes = self._hashes_on_device = False  # in this turn
        for layer in stack.layers:
            for held in layer.parameters:
                if held.rule is None:
                    self._names[id(held.tensor)] = stack.spec.parameters[held.index].name
                    held.tensor.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]

    def _accumulated(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            self._left[id(parameter)] = (gradient, gradient._version, self._content(gradient))

    def _content(self, gradient: Tensor) -> int | None:
        if gradient.layout != torch.strided or not (self._hashes if gradient.is_cpu else self._hashes_on_device):
            return None
        return content_of(gradient)

    def begin(self, step: int, *, first: bool) -> None:
        """A turn of a step begins; `first`: on this rank, of the step. What gradients were is forgotten."""
        self.forget()
        self._hashes, self._hashes_on_device = first, first and step % DEVICE_STEPS == 0

    @property
    def found(self) -> bool:
        """Whether a backward has left gradients since they were forgotten."""
        return bool(self._left)

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raise UsageError if a gradient of these differs from what backward left; forget what it was."""
        for parameter in parameters:
            gradient, known = parameter.grad, self._left.pop(id(parameter), None)
            if known is None or gradient is None:
                continue
            same = gradient is known[0] and gradient._version == known[1]
            if same and (known[2] is None or content_of(gradient) == known[2]):
                continue
            name = self._names[id(parameter)]
            raise UsageError(
                f"the gradient of {name!r} was changed between backward() and optimizer.step(), where it is of one "
                "micro-batch alone. To clip the step's whole gradient write run.clip_grad_norm_(x) for "
                "torch.nn.utils.clip_grad_norm_(model.parameters(), x), and run.clip_grad_value_(x) for "
                "clip_grad_value_; to scale it, scale the loss"
            )

    def forget(self) -> None:
        """Forget the gradients, which are being dropped."""
        self._left = {}
