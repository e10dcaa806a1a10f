"""A learning-rate scheduler that the runtime steps once per committed step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class ScheduledRate:
    """Takes over a scheduler: `advance` is its step, and the user's own calls of `step()` do nothing any more."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler
        self.advance = scheduler.step
        optimizer: Any = scheduler.optimizer
        optimizer._opt_called = True  # shards of it are stepped: torch need not warn that it never was
        scheduler.step = _already_stepped  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, as JSON values."""
        return {name: value for name, value in self._scheduler.state_dict().items() if name != "step"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scheduler.load_state_dict(dict(state))


def _already_stepped(epoch: int | None = None) -> None:
    """The runtime stepped the scheduler when the step was committed."""
