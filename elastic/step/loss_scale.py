"""A loss scaler (`torch.amp.GradScaler`) whose scale is equal on all ranks, since each step agrees on how it changes.

float16 has no numbers below 6e-8, so small gradients become 0. A scaler multiplies the loss, and with it all gradients,
with a scale, which is halved after a step whose gradient overflows, and doubled after many without (Micikevicius et
al., 2018). Here the gradient of the whole step decides, not that of one rank's micro-batches. Where optimizers take
turns on a batch, the scale is that of the batch, as in a script that calls `scaler.update()` behind all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.protocol.terms import Terms

from .order import DataOrder

LOSS_SCALE = "loss_scale"  # its name among the registered objects


class LossScale:
    """The scale of a job's losses, and the number of steps whose gradient was not finite.

    `scaler` is the script's; with None the scale is 1.
    """

    def __init__(self, scaler: GradScaler | None = None) -> None:
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise UsageError(f"scaler= takes a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.skipped = 0
        self._overflowed = False  # a gradient of the present batch

    @property
    def scale(self) -> float:
        """What losses are multiplied with."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss, times the scale."""
        return self.scaler.scale(loss) if self.scaler is not None else loss

    def advance(self, terms: Terms, order: DataOrder) -> None:
        """A step is committed: if it ends its batch, change the scale as `GradScaler.update` would.

        What counts are the gradients of the batch's steps, each of which is that of all micro-batches.
        """
        if terms.norm is None or order.collects(terms.step):  # a checkpoint of another framework has no norm
            return
        finite = math.isfinite(terms.norm)
        self.skipped += terms.skip and not finite
        if self.scaler is None:
            return
        self._overflowed |= not finite
        if not order.ends_batch(terms.step):
            return
        overflowed, self._overflowed = self._overflowed, False
        state = self.scaler.state_dict()
        scale, steps = torch.tensor(state["scale"]), torch.tensor(state["_growth_tracker"], dtype=torch.int32)
        how = (state["growth_factor"], state["backoff_factor"], state["growth_interval"])
        torch._amp_update_scale_(scale, steps, torch.tensor(float(overflowed)), *how)
        self.scaler.load_state_dict({**state, "scale": scale.item(), "_growth_tracker": int(steps)})

    def state_dict(self) -> dict[str, Any]:
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return {"skipped": self.skipped, "scaler": scaler, "overflowed": self._overflowed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        self._overflowed = state.get("overflowed", False)  # earlier versions had one optimizer with a scaler
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))
