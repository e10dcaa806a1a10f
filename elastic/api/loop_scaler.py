"""A loss scaler (`torch.amp.GradScaler`) in the user's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

from everstep.elastic.contract.errors import UsageError


class LoopScaler:
    """Takes over a GradScaler in the user's own loop: it scales losses, and the runtime does all else.

    The step's gradient is divided by the scale when it is complete, before it is clipped, and the scale changes when
    the step is committed. Where optimizers take turns on a batch, it changes when the last of its steps is.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._called = False  # scale(), in this turn
        self._scale = scaler.scale
        self._optimizers: Sequence[Optimizer] = ()
        for name in ("scale", "unscale_", "step", "update"):
            setattr(scaler, name, getattr(self, name))

    def serve(self, optimizers: Sequence[Optimizer]) -> None:
        """The optimizers that `prepare` returns."""
        self._optimizers = optimizers

    def begin_turn(self) -> None:
        """A turn of the user's loop begins."""
        self._called = False

    def check_called(self, step: int) -> None:
        """A turn of the user's loop is over. Raises UsageError if the loss was not scaled."""
        if not self._called:
            raise UsageError(
                f"scaler.scale(loss) was not called for a micro-batch of step {step}, and the gradient of the step is "
                "divided by the scale: write scaler.scale(loss).backward(), or leave out run.prepare(scaler=)"
            )

    def scale(self, outputs: Any) -> Any:
        self._called = True
        return self._scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """The gradient of one micro-batch stays as it is: it is a part of the step's."""
        self._check(optimizer, "unscale_")

    def step(self, optimizer: Optimizer, *arguments: Any, **named: Any) -> Any:
        self._check(optimizer, "step")
        return optimizer.step(*arguments, **named)

    def update(self, new_scale: Any = None) -> None:
        """The scale has changed when the step was committed."""
        if new_scale is not None:
            raise UsageError(
                "scaler.update(new_scale): all ranks agree on the scale. Leave new_scale out, and give the GradScaler "
                "its init_scale, growth_factor, backoff_factor and growth_interval"
            )

    def _check(self, optimizer: Optimizer, name: str) -> None:
        if all(optimizer is not one for one in self._optimizers):
            raise UsageError(
                f"scaler.{name}(optimizer) was called with another optimizer than the one that run.prepare returned"
            )
