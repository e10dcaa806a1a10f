"""A loss scaler (`torch.amp.GradScaler`) whose scale is equal on all ranks, since each step agrees on how it changes.

float16 has no numbers below 6e-8, so small gradients become 0. A scaler multiplies the loss, and with it all gradients,
with a scale, which is halved after a step whose gradient overflows, and doubled after many without (Micikevicius et
al., 2018). Here the gradient of the whole step decides, not that of one rank's micro-batches.
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

    @property
    def scale(self) -> float:
        """What losses are multiplied with."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss, times the scale."""
        return self.scaler.scale(loss) if self.scaler is not None else loss

    def advance(self, terms: Terms) -> None:
        """A step is committed: change the scale as `GradScaler.update` would, by the gradient of the whole step."""
        if terms.norm is None:  # of a checkpoint that another framework saved
            return
        finite = math.isfinite(terms.norm)
        self.skipped += terms.skip and not finite
        if self.scaler is None:
            return
        state = self.scaler.state_dict()
        scale, steps = torch.tensor(state["scale"]), torch.tensor(state["_growth_tracker"], dtype=torch.int32)
        how = (state["growth_factor"], state["backoff_factor"], state["growth_interval"])
        torch._amp_update_scale_(scale, steps, torch.tensor(float(not finite)), *how)
        self.scaler.load_state_dict({**state, "scale": scale.item(), "_growth_tracker": int(steps)})

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict() if self.scaler is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))
