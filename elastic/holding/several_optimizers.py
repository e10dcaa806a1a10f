"""The optimizers of a loop that trains several models, such as a GAN: to the runtime they are one.

Its parameter groups are theirs, one after the other. A parameter belongs to one of them, and is stepped by that one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SeveralOptimizers:
    """Steps each of its parts, which have disjoint parameters. `alternating`: a step of the job is one of one part."""

    def __init__(self, parts: Sequence[Optimizer], *, alternating: bool) -> None:
        self.parts = list(parts)
        self.alternating = alternating and len(self.parts) > 1

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Of clones, which share it."""
        return self.parts[0].state

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Collector(Optimizer):
    """Takes the gradient of a parameter for its value: what the micro-batches of a step have put together."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(parameter.grad)


AnyOptimizer = Optimizer | SeveralOptimizers


def parts_of(optimizer: AnyOptimizer) -> list[Optimizer]:
    """The optimizers that the user built."""
    return optimizer.parts if isinstance(optimizer, SeveralOptimizers) else [optimizer]


def takes_turns(optimizer: AnyOptimizer) -> bool:
    """Whether a step of the job is one of a part of it."""
    return isinstance(optimizer, SeveralOptimizers) and optimizer.alternating


def clone_of(optimizer: AnyOptimizer) -> AnyOptimizer:
    """The same optimizer with no parameters and no state."""
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    if isinstance(optimizer, SeveralOptimizers):
        return SeveralOptimizers([_clone(part, state) for part in optimizer.parts], alternating=optimizer.alternating)
    return _clone(optimizer, state)


def _clone(optimizer: Optimizer, state: defaultdict[Tensor, Any]) -> Optimizer:
    clone: Optimizer = type(optimizer).__new__(type(optimizer))
    clone.__dict__.update(optimizer.__dict__)
    clone.__dict__.pop("step", None)  # a scheduler may have patched the user's instance
    clone.state = state
    clone.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    return clone
