"""Detects that the user's loop changes gradients between backward and `optimizer.step()`.

Each turn of that loop has the gradient of one micro-batch. The step's gradient is the mean of all of them, computed
later: clipping or scaling between the two would apply to each micro-batch separately, with another result.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.stack import LayerStack


class GradientWatch:
    """The gradients as backward left them, recorded by a hook that torch calls after each accumulation."""

    def __init__(self, stack: LayerStack) -> None:
        self._names: dict[int, str] = {}  # id of a parameter -> its name
        self._left: dict[
            int, tuple[Tensor, int]
        ] = {}  # id of a parameter -> its gradient, and how often it was written
        for layer in stack.layers:
            for held in layer.parameters:
                if held.rule is None:
                    self._names[id(held.tensor)] = stack.spec.parameters[held.index].name
                    held.tensor.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._left[id(parameter)] = (parameter.grad, parameter.grad._version)

    @property
    def found(self) -> bool:
        """Whether a backward has left gradients since they were forgotten."""
        return bool(self._left)

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raise UsageError if a gradient of these differs from what backward left; forget what it was."""
        for parameter in parameters:
            gradient, known = parameter.grad, self._left.pop(id(parameter), None)
            if known is None or gradient is None or (gradient is known[0] and gradient._version == known[1]):
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
